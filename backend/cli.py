"""The `kiln` command: serve, run, batch, jobs, weights, stop, doctor. `kiln run RECIPE --help` lists a recipe's parameters, as it defines
them.

Exit codes: 0 all well, 1 a job or an item failed (or doctor found a problem), 2 a bad argument or input, 3 no backend, 4 one runs already
(`serve`; `batch` in the same folder), 130 cancelled with Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import backend.pipelines  # noqa: F401 - recipes kept outside this repository enter themselves
from backend import weights
from backend.disk import size_text
from backend.inputs import gather, gather_picture
from backend.store import check_name, size_of
from protocol import VERSION, connection, picture, recipes
from protocol.errors import KilnError

DONE, FAILED, BAD, UNAVAILABLE, RUNS_ALREADY, CANCELLED = 0, 1, 2, 3, 4, 130
START_SECONDS = 30.0  # that a started backend may take to answer; it takes one
STOP_SECONDS = 20.0  # that a backend may take to end
_BAD_CODES = (
    "bad-parameter", "bad-recipe", "bad-input", "bad-request", "no-job", "bad-state", "no-model", "bad-registry", "licence-needed",
    "bad-manifest", "no-blender", "no-extension", "no-ray",
)  # fmt: skip
_ENDED = ("done", "failed", "cancelled")
_INPUTS = {
    "views": "the views: a folder with transforms.json",
    "motion": "the views of a moving subject: a folder with transforms.json",
    "splats": "the splats: a .ply or .spz file, or a folder with one",
    "picture": "the picture, or a folder of views; as --image or --views",
}
_SHORT = ("generate.model", "generate.prompt")  # of a recipe that starts from a picture: --model and --prompt say the same


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code. Every expected failure is one sentence and a hint on standard error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    given = _parser().parse_args(arguments)
    if getattr(given, "home", None):
        os.environ["KILN_HOME"] = str(Path(given.home).expanduser().absolute())
    try:
        return given.command(given)
    except KilnError as error:
        print(f"kiln: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"      {error.hint}", file=sys.stderr)
        if error.code == "already-running":
            return RUNS_ALREADY
        return BAD if error.code in _BAD_CODES else UNAVAILABLE if error.code in ("unavailable", "refused", "timeout") else FAILED
    except KeyboardInterrupt:
        return CANCELLED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kiln", description="Turns views of an object into a textured mesh asset.")
    parser.add_argument("--version", action="version", version=f"kiln {VERSION}")
    parser.add_argument("--home", help="Kiln's folder; default: $KILN_HOME, else the user's data folder")
    parser.add_argument("--connection", type=Path, help="connection file of the backend to use; default: this user's own backend")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the backend in this terminal")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; another than 127.0.0.1 opens it to the network")
    serve.add_argument("--port", type=int, default=0, help="TCP port; 0 lets the system choose")
    serve.add_argument("--workers", type=_count, default=1, metavar="N", help="jobs that run at once and share the cores (default: 1)")
    serve.add_argument("--until-idle", action="store_true", help="end when no client is connected and no job waits or runs")
    serve.add_argument("--home", help=argparse.SUPPRESS, default=argparse.SUPPRESS)
    serve.set_defaults(command=_serve)

    run = commands.add_parser("run", help="run a recipe on a folder or a file and fetch the results")
    kinds = run.add_subparsers(required=True, metavar="RECIPE")
    for recipe in recipes.RECIPES.values():
        _recipe_parser(kinds, recipe)

    _batch_parser(commands)

    jobs = commands.add_parser("jobs", help="list jobs; show, cancel, retry, remove one, or download its results")
    jobs.set_defaults(command=_list_jobs, json=False)
    jobs.add_argument("--json", action="store_true", help="print the jobs as JSON")
    actions = jobs.add_subparsers(metavar="ACTION")
    listing = actions.add_parser("list", help="every job, oldest first (the default)")
    listing.add_argument("--json", action="store_true", help="print the jobs as JSON", default=argparse.SUPPRESS)
    listing.set_defaults(command=_list_jobs)
    for name, command, help in (
        ("show", _show_job, "print a job with its parameters, results and error"),
        ("cancel", _cancel_job, "stop a job"),
        ("retry", _retry_job, "queue a failed or cancelled job again; finished stages are kept"),
        ("remove", _remove_job, "forget a job and its files"),
        ("download", _download_job, "fetch a job's results"),
    ):
        action = actions.add_parser(name, help=help)
        action.add_argument("id", metavar="ID")
        if name == "show":
            action.add_argument("--json", action="store_true", help="print the job as JSON", default=argparse.SUPPRESS)
        if name == "download":
            action.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files")
        action.set_defaults(command=command)

    _weights_parser(commands)
    _train_parser(commands)

    store = commands.add_parser("store", help="what the backend keeps on the disk; make room")
    actions = store.add_subparsers(required=True, metavar="ACTION")
    shown = actions.add_parser("show", help="print where it lies, how large it is, and what its limits are")
    cleaned = actions.add_parser("clean", help="remove what may go: never what waits, runs, or was not fetched or imported yet")
    cleaned.add_argument("--days", type=float, metavar="N", help="jobs that ended longer ago (default: the backend's limit)")
    cleaned.add_argument("--limit", type=float, metavar="GB", help="until no more than this is used (default: the backend's limit)")
    cleaned.add_argument("--dry-run", action="store_true", help="only say what would go")
    for action, command in ((shown, _show_store), (cleaned, _clean_store)):
        action.add_argument("--json", action="store_true", help="print it as JSON")
        action.set_defaults(command=command)

    keys = commands.add_parser("keys", help="the keys that let clients in")
    rotate = keys.add_subparsers(required=True, metavar="ACTION").add_parser(
        "rotate", help="make new keys: copies of the connection file let nobody in any more, and open connections end"
    )
    rotate.set_defaults(command=_rotate_keys)

    stop = commands.add_parser("stop", help="end the backend; what runs resumes with the next one")
    stop.add_argument("--when-idle", action="store_true", help="finish what waits and runs first")
    stop.set_defaults(command=_stop)

    doctor = commands.add_parser("doctor", help="check device, driver, packages, memory, disk and backend, and say what to fix")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(command=_doctor)
    return parser


def _batch_parser(commands: Any) -> None:
    batch = commands.add_parser(
        "batch",
        help="make many assets: of a folder, or of a list in TOML or CSV",
        description=_BATCH_ABOUT,
        epilog=_BATCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    batch.add_argument("manifest", type=Path, metavar="MANIFEST|FOLDER", help="a .toml or .csv list, a folder of assets, or one .blend")
    batch.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    batch.add_argument("--dry-run", action="store_true", help="say what would be done, and how large it is; make nothing")
    batch.add_argument("--json", action="store_true", help="print the report as JSON at the end")
    what = batch.add_argument_group("what is made (over what the list says)")
    what.add_argument("--recipe", default="", choices=["", *recipes.RECIPES], metavar="RECIPE", help="default: by the file's kind")
    what.add_argument("--preset", default="", metavar="PRESET", help="draft, standard or high (default: standard)")
    what.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter, such as texture.size=1024; repeatable")
    what.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these items alone; * stands for any characters")
    what.add_argument("--retry-failed", action="store_true", help="try items again that failed in an earlier run and are unchanged")
    what.add_argument("--fbx", action="store_true", help="an FBX beside each GLB")
    what.add_argument("--library", type=Path, metavar="FILE.blend", help="put all results into an asset library")
    what.add_argument("--catalog", default="", metavar="NAME", help="catalog of the library, such as Props/Kitchen")
    how = batch.add_argument_group("how it runs")
    how.add_argument("--captures", type=_count, default=1, metavar="N", help="Blenders that render at once (default: 1)")
    how.add_argument("--blender", metavar="PATH", help="a Blender, or a Python with bpy (default: $KILN_BLENDER, else the first found)")
    how.add_argument("--workers", type=_count, metavar="N", help="jobs at once, if this command starts the backend (default: 1)")
    how.add_argument("--engine", choices=("local", "ray"), default="local", help="the backend, or a Ray cluster (default: local)")
    how.add_argument("--address", metavar="HOST:PORT", help="of the Ray cluster; without one, a cluster is started on this machine")
    how.add_argument("--cpus", type=_count, metavar="N", help="cores of a Ray task (default: 4, or those of the smallest node)")
    how.add_argument(
        "--shard", type=_shard, metavar="K/N", help="the K-th of N runs that share the items, for a farm; docs/farm.md tells how they end"
    )
    batch.set_defaults(command=_batch)


def _weights_parser(commands: Any) -> None:
    parser = commands.add_parser("weights", help="list trained weights; download, check, remove them, or bundle them for other machines")
    parser.set_defaults(command=_list_weights, json=False)
    actions = parser.add_subparsers(metavar="ACTION")
    listing = actions.add_parser("list", help="all weights, and which are installed (the default)")
    listing.add_argument("--json", action="store_true", help="print them as JSON")
    listing.set_defaults(command=_list_weights)
    for name, command, count, help in (
        ("show", _show_weights, None, "print purpose, size, memory, licence and state"),
        ("pull", _pull_weights, "+", "download them, or go on with a download that broke off"),
        ("verify", _verify_weights, "*", "read every byte of what is installed and compare its hash"),
        ("remove", _remove_weights, None, "delete them"),
        ("bundle", _bundle_weights, "+", "write installed weights into one file for machines without a network"),
    ):
        action = actions.add_parser(name, help=help)
        action.add_argument("ids" if count else "id", metavar="ID", nargs=count)
        if name == "pull":
            action.add_argument("--accept-licence", action="store_true", help="agree to the licences, which `kiln weights show ID` tells")
            action.add_argument("--from", dest="source", type=Path, metavar="PATH", help="take them from a folder or a bundle instead")
        if name == "bundle":
            action.add_argument("--out", type=Path, required=True, metavar="FILE.zip", help="file to write")
        action.set_defaults(command=command)


def _train_parser(commands: Any) -> None:
    parser = commands.add_parser("train", help="train a network of Kiln's own")
    kinds = parser.add_subparsers(required=True, metavar="NETWORK")
    elevation = kinds.add_parser("elevation", help="the guess of a turntable's elevation, on turntables of procedural objects")
    elevation.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run; one that was stopped goes on")
    elevation.add_argument("--turntables", type=int, metavar="N", help="objects to learn from")
    elevation.add_argument("--steps", type=int, metavar="N", help="optimisation steps")
    elevation.add_argument("--seed", type=int, metavar="N", help="start of every random draw")
    elevation.set_defaults(command=_train_elevation)
    turntable = kinds.add_parser("turntable", help="a LoRA on a turntable generator, on turntables of your own assets")
    turntable.add_argument("--model", required=True, metavar="ID", help="generator of the registry: Wan's or SV3D")
    turntable.add_argument("--data", type=Path, required=True, nargs="+", metavar="FOLDER", help="folders of views, one turntable each")
    turntable.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run; one that was stopped goes on")
    turntable.add_argument("--steps", type=int, default=1000, metavar="N", help="optimisation steps (default: 1000)")
    turntable.add_argument("--batch", type=int, default=1, metavar="N", help="turntables a step (default: 1)")
    turntable.add_argument("--rate", type=float, default=1e-4, metavar="N", help="learning rate (default: 0.0001)")
    turntable.add_argument("--rank", type=int, default=16, metavar="N", help="of the LoRA (default: 16)")
    turntable.add_argument("--prompt", default="", metavar="TEXT", help="what all of them show, for models that read a text")
    turntable.add_argument("--seed", type=int, default=0, metavar="N", help="start of every random draw")
    turntable.set_defaults(command=_train_turntable)
    tiny = kinds.add_parser("tiny", help="kiln-tiny-turntable from nothing, on turntables of procedural objects")
    tiny.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run; one that was stopped goes on")
    tiny.set_defaults(command=_train_tiny)


def _recipe_parser(actions: Any, recipe: Any) -> None:
    parser = actions.add_parser(recipe.NAME, help=recipe.__doc__.strip().partition("\n")[0])
    about = _INPUTS.get(recipe.INPUT, f"the {recipe.INPUT}: a folder or a file")
    parser.add_argument("input", type=Path, metavar="INPUT", help=about, nargs="?" if recipe.INPUT == "picture" else None)
    if recipe.INPUT == "picture":
        parser.add_argument("--image", type=Path, metavar="FILE", help="the picture of the subject; without one, --prompt says what it is")
        parser.add_argument("--lora", type=Path, metavar="PATH", help="your own LoRA of the model: a safetensors file, or a run's folder")
        parser.add_argument("--views", type=Path, metavar="FOLDER", help="pictures all around the subject, which nothing generates then")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--preset", choices=list(recipe.PRESETS), default="standard", help="values to start from (default: standard)")
    parser.add_argument("--title", default="", help="name of the job in lists; default: the input's name")
    parser.add_argument("--json", action="store_true", help="print the finished job as JSON")
    groups: dict[str, Any] = {}
    for parameter in _flags(recipe):
        title = parameter.group if "." in parameter.name else "general"
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        options: dict[str, Any] = {"dest": parameter.name, "default": None}
        allowed = ""
        if parameter.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif parameter.options:
            options.update(choices=[value for value, _ in parameter.options], metavar="|".join(value for value, _ in parameter.options))
        elif parameter.type is str:
            options["metavar"] = "TEXT"
            allowed = f", at most {parameter.high:.0f} characters"
        else:
            options.update(type=parameter.type, metavar=parameter.unit.upper() or "N")
            allowed = f", {parameter.low} to {parameter.high}"
        default = "none" if parameter.default == "" else parameter.default
        help = f"{parameter.help} (default: {default}{allowed})".replace("%", "%%")
        names = ["--" + parameter.name.replace(".", "-").replace("_", "-")]
        if recipe.INPUT == "picture" and parameter.name in _SHORT:
            names.append("--" + parameter.name.partition(".")[2])
        groups[title].add_argument(*names, help=help, **options)
    parser.set_defaults(command=_run, recipe=recipe)


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 64")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    first, _, last = text.partition("/")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is no shard; the third of twenty is 3/20")
    return int(first), int(last)


def _flags(recipe: Any) -> list[Any]:
    """The parameters that matter for a folder of inputs: its views are taken already."""
    return [parameter for parameter in recipes.parameters(recipe) if parameter.group.lower() != "capture"]


# -- serve and the way to a backend ----------------------------------------------------------------------------------------------------


def _serve(given: argparse.Namespace) -> int:
    from backend import server

    server.serve(connection.home(), given.host, given.port, given.until_idle, workers=given.workers)
    return DONE


def _connect(given: argparse.Namespace, start: bool = False, workers: int = 1) -> Any:
    """A client of the backend that runs; with `start`, of one that is started if none does, then with this many workers."""
    from protocol.client import Client

    path = given.connection or connection.default_path()
    try:
        client = Client(connection.Connection.load(path))
        client.hello()
        return client
    except KilnError as error:
        # refused: by one that is stopping, or by another program that has the port of a backend which was killed
        if error.code not in ("unavailable", "refused") or not start or given.connection is not None:
            raise
    return _start(path, workers)


def _start(path: Path, workers: int = 1) -> Any:
    """Starts a backend that ends by itself when it is no longer needed, and returns a client of it."""
    from protocol.client import Client

    logs = connection.home() / "logs"
    for folder in (connection.home(), logs):
        connection.private_folder(folder)
    package = str(Path(__file__).resolve().parents[1])
    paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in paths)}
    apart: dict[str, Any] = {"start_new_session": True}  # Ctrl-C in this terminal is for the job, not for the backend
    if sys.platform == "win32":
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    log = logs / "server.log"

    def spawn() -> subprocess.Popen:
        with open(log, "ab") as output:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "backend.cli", "serve", "--until-idle", "--workers", str(workers)], stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, env=environment, cwd=connection.home(), **apart,
            )  # fmt: skip

    process = spawn()
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            client = Client(connection.Connection.load(path))
            client.hello()
            return client
        except KilnError as error:
            if error.code not in ("unavailable", "timeout", "refused"):
                raise
        ended = process.poll()
        if ended in (DONE, RUNS_ALREADY):  # another one is ending, or was started at the same time
            time.sleep(0.3)
            process = spawn()
        elif ended is not None:
            break
        time.sleep(0.05)
    last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
    raise KilnError("unavailable", f"The backend did not start: {last[0]}", f"Its log is {log}; `kiln doctor` checks this machine.")


def _show_store(given: argparse.Namespace) -> int:
    with _connect(given, start=True) as client:
        found = client.store()
    found = {key: found[key] for key in ("folder", "bytes", "limit", "days", "jobs", "untaken", "unfinished")}
    if given.json:
        print(json.dumps(found, indent=1))
        return DONE
    print(found["folder"])
    for name, size in found["bytes"].items():
        print(f"  {name:<12} {size_text(size)}")
    limit = size_text(found["limit"]) if found["limit"] is not None else "none"
    age = f"{found['days']:g} days" if found["days"] is not None else "none"
    print(f"  limit        {limit} (KILN_STORE_GB), age of ended jobs {age} (KILN_STORE_DAYS)")
    print(f"  jobs         {', '.join(f'{count} {state}' for state, count in sorted(found['jobs'].items())) or 'none'}")
    for name, words in (("unfinished", "wait or run"), ("untaken", "are done and were not fetched or imported yet")):
        if found[name]["jobs"]:
            print(f"  stays        {len(found[name]['jobs'])} jobs that {words}, {size_text(found[name]['bytes'])}")
    return DONE


def _clean_store(given: argparse.Namespace) -> int:
    with _connect(given, start=True) as client:
        gone = client.clean_store(
            bytes=None if given.limit is None else int(given.limit * 1e9),
            seconds=None if given.days is None else given.days * 86400,
            dry_run=given.dry_run,
        )
    if given.json:
        print(json.dumps({key: gone[key] for key in ("jobs", "stages", "freed")}, indent=1))
    else:
        would = "would go" if given.dry_run else "went"
        print(f"{len(gone['jobs'])} jobs and {gone['stages']} finished stages {would}, about {size_text(gone['freed'])}")
    return DONE


def _rotate_keys(given: argparse.Namespace) -> int:
    from backend.server import is_served

    try:
        with _connect(given) as client:
            client.rotate_keys()
    except KilnError as error:
        if error.code != "unavailable" or given.connection is not None or is_served(connection.home()):
            raise
        connection.Keys.of(connection.home(), anew=True)
    print("The keys are new. Programs of yours on this machine find them by themselves; carry remote.json to other machines again.")
    return DONE


def _stop(given: argparse.Namespace) -> int:
    with _connect(given) as client:
        client.shutdown(now=not given.when_idle)
    if given.connection is None and not given.when_idle:  # a `kiln serve` that follows finds the port, the store and the log free
        from backend import server

        deadline = time.monotonic() + STOP_SECONDS
        while server.is_served(connection.home()):
            if time.monotonic() > deadline:
                raise KilnError("timeout", f"The backend has not ended after {STOP_SECONDS:.0f} s.", "End its process.")
            time.sleep(0.05)
    return DONE


# -- run -------------------------------------------------------------------------------------------------------------------------------


def _run(given: argparse.Namespace) -> int:
    recipe = given.recipe
    chosen = {p.name: value for p in _flags(recipe) if (value := getattr(given, p.name)) is not None}
    values = recipes.values(recipes.make(recipe.NAME, chosen, given.preset))
    if recipe.INPUT == "picture":
        inputs, start = gather_picture(given.input, given.image, given.views, values.get("generate.prompt", ""))
        inputs |= picture.lora(given.lora)
    else:
        inputs, start = gather(given.input, recipe.INPUT), given.input
    title = given.title or (start.resolve().name if start else values.get("generate.prompt", ""))
    bar = _Bar()
    with _connect(given, start=True) as client:
        job = client.submit(recipe.NAME, values, inputs, title, {"input": str(start or ""), "preset": given.preset}, bar.sent)
        bar.say(f"Job {job['id']}")
        try:
            job = _follow(client, job, bar)
        except KeyboardInterrupt:
            bar.say("Cancelling; the backend keeps what is finished. Ctrl-C again to leave at once.")
            client.cancel(job["id"])
            for _ in client.watch(job["id"], timeout=10.0):
                pass
            bar.say(f"Cancelled. `kiln jobs retry {job['id']}` goes on where it stopped.")
            return CANCELLED
        if job["state"] == "failed":
            raise _as_failure(job)
        if job["state"] == "cancelled":
            bar.say(f"Job {job['id']} was cancelled by another client.")
            return CANCELLED
        _fetch(client, job, given.out, bar)
        if given.json:
            print(json.dumps(job, indent=1))
    return DONE


def _train_elevation(given: argparse.Namespace) -> int:
    from dataclasses import replace

    from backend.train import elevation  # torch, which no other command needs

    chosen = {name: value for name in ("turntables", "steps", "seed") if (value := getattr(given, name)) is not None}
    bar = _Bar()
    bar.stage("Train elevation")

    def tell(share: float, text: str = "", preview: Any = None) -> None:
        bar.say(text) if text.startswith("{") else bar.show(share, text)  # lines of the log stay

    error = elevation.train(given.out, replace(elevation.Settings(), **chosen), progress=tell)
    bar.close()
    print(f"Mean error {error:.2f} degrees on objects of families that it has not seen. Weights: {given.out / elevation.FILE}")
    return DONE


def _train_turntable(given: argparse.Namespace) -> int:
    from backend.train import lora  # torch, as above
    from backend.train.turntable import Settings

    settings = Settings(steps=given.steps, batch=given.batch, rate=given.rate, shift=3.0, seed=given.seed)
    bar = _Bar()
    bar.stage("Train turntable")
    file = lora.fine_tune(
        given.model, given.data, given.out, settings, given.rank, given.prompt, lambda share, text="", preview=None: bar.show(share, text)
    )
    bar.close()
    print(f"LoRA: {file}. Log and sample pictures: {given.out}")
    return DONE


def _train_tiny(given: argparse.Namespace) -> int:
    from backend.train import tiny  # torch, as above

    bar = _Bar()
    bar.stage("Train tiny")
    folder = tiny.make(given.out, progress=lambda share, text="", preview=None: bar.show(share, text))
    bar.close()
    print(f"Model: {folder}. Log and sample pictures: {given.out}")
    return DONE


# -- batch -----------------------------------------------------------------------------------------------------------------------------

_BATCH_ABOUT = """\
Makes an asset of every model, picture and splat file of a folder or a list: one folder each in DIR,
and a report for people (index.html) and for programs (report.json). Models are rendered by Blender
in the background while the backend computes others. Stopped anywhere, by Ctrl-C, a crash or a power
cut, the same command goes on: finished items are not made again. More in docs/batch.md.
"""
_BATCH_EXAMPLES = """\
examples:
  kiln batch props/ --out assets --preset draft
  kiln batch props.toml --out assets --set texture.size=1024 --fbx
  kiln batch level.blend --out assets --library props.blend --catalog Level
  kiln batch props.csv --out assets --only 'chair*' --retry-failed

a list in TOML:
  [defaults]
  preset = "draft"
  [[items]]
  file = "props/*.glb"
  [[items]]
  file = "hero.blend"
  object = "Hero*"
  parameters = { "texture.size" = 2048 }

exit codes: 0 all went well, 1 some items failed, 2 a bad argument or list, 3 no backend, 4 another batch has DIR, 130 cancelled
"""


def _batch(given: argparse.Namespace) -> int:
    from backend.batch import manifest, run

    parameters = {}
    for text in given.set:
        name, sign, value = text.partition("=")
        if not sign:
            raise KilnError("bad-parameter", f"--set {text} names no value.", "Write --set texture.size=1024.")
        parameters[name.strip()] = value.strip()
    if given.library is not None and given.library.suffix.lower() != ".blend":
        raise KilnError("bad-parameter", f"--library {given.library} is no .blend file.", "An asset library is a .blend file in a folder.")
    if given.shard is not None and (given.library is not None or given.engine == "ray"):
        hint = "Run the shards first, and then the same without --shard."
        raise KilnError("bad-parameter", "--shard goes with neither --library nor --engine ray.", hint)
    out = Path(os.path.abspath(given.out))
    bar = _Bar()
    library = given.library and Path(os.path.abspath(given.library))
    overrides = manifest.Overrides(given.recipe, given.preset, parameters)
    found = manifest.read(given.manifest, overrides, [path for path in (out, library) if path], bar.say)
    options = run.Options(
        out, str(Path(os.path.abspath(given.manifest))), given.captures, given.blender, given.fbx,
        library, given.catalog, tuple(given.only), given.retry_failed, given.shard,
    )  # fmt: skip
    bar.stage("Batch")
    if given.dry_run:
        return _plan_batch(run.plan(found, options, bar), given.workers or 1)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends it politely wants it to clean up, too
    try:
        told = run.run(found, options, lambda: _engine(given, out, bar), bar)
    finally:
        bar.close()
        signal.signal(signal.SIGTERM, before)
    counts = {state: sum(item["state"] == state for item in told["items"]) for state in ("done", "failed", "cancelled", "waiting")}
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "Nothing to do"
    bar.say(f"{said}. Report: {options.place / 'index.html'}")
    for item in told["items"]:
        if item["state"] == "failed":
            bar.say(f"  {item['name']}: {item['error']['message']} {item['error']['hint']}".rstrip())
    if told["state"] == "cancelled":
        bar.say("Cancelled; the same command goes on where it stopped.")
    if given.json:
        print(json.dumps(told, indent=1))
    if given.shard is not None and told["state"] == "done":
        return DONE  # what failed is kept, and told by the run of the whole that follows
    return run.exit_code(told)


def _engine(given: argparse.Namespace, out: Path, bar: _Bar) -> Any:
    """The engine that the command line asks for."""
    if given.engine == "ray":
        from backend.batch.ray_engine import RayEngine

        return RayEngine(out / ".work" / ".ray", given.address, given.cpus)
    from backend.batch.local import Local

    engine = Local(lambda: _connect(given, start=True, workers=given.workers or 1), bar.say, 60.0 if given.connection else 0.0)
    if given.workers not in (None, engine.slots):
        bar.say(f"A backend runs already, with --workers {engine.slots}; that is used. `kiln stop` first for another number.")
    return engine


def _plan_batch(works: list[Any], workers: int) -> int:
    """Prints what a batch would do."""
    from backend.batch import items, report

    seconds = most = 0.0
    for work in works:
        item, size = work.item, ""
        if item.error is None:
            size = size_text(sum(file.stat().st_size for file in items.sources(item) if file.is_file()))
        doing = {"done": "is finished", "failed": "fails"}.get(work.state, "is left out")
        if work.state == "waiting" and not work.left_out:
            in_blender, computing = work.cost
            doing = "to capture" if item.kind == "model" else "to compute"
            seconds += computing + in_blender * (item.kind == "model")
            most = max(most, work.memory)
        print(f"{item.name:<32} {doing:<12} {item.recipe:<12} {item.preset:<9} {size:>8}  {item.file.name}".rstrip())
        if work.error is not None:
            print(f"{'':<32} {work.error}")
    count = sum(work.state == "waiting" and not work.left_out for work in works)
    about = f", about {report.duration(seconds)} on two quiet cores, {size_text(workers * most)} of memory at most" if count else ""
    print(f"{count} of {len(works)} items to make{about}.")
    return FAILED if any(work.state == "failed" for work in works) else DONE


def _follow(client: Any, job: dict[str, Any], bar: _Bar) -> dict[str, Any]:
    for event in client.watch(job["id"]):
        kind = event["kind"]
        if kind == "stage":
            bar.stage(event["stage"] + (" (found finished)" if event.get("cached") else ""))
        elif kind == "progress":
            bar.show(event["fraction"], event.get("text", ""))
        elif kind == "log" and "\n" not in event["text"]:  # a defect's trace has many lines; `kiln jobs show` prints it
            bar.say(event["text"])
        elif kind == "started" and event.get("text") or kind == "queued" and event["number"] > 1:
            bar.say(event.get("text", ""))
    bar.close()
    return client.job(job["id"])


def _fetch(client: Any, job: dict[str, Any], folder: Path, bar: _Bar) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in job["results"].items():
        target = folder / check_name(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        client.download(result["hash"], target)
        bar.say(f"{target}  {size_text(result['size'])}")
    client.take(job["id"])


def _as_failure(job: dict[str, Any]) -> KilnError:
    error = KilnError.from_wire(job["error"] or {})
    hint = f"{error.hint} Then: kiln jobs retry {job['id']}".strip()
    return KilnError("failed", f"Job {job['id']} failed ({error.code}). {error.message}", hint)


class _Bar:
    """Progress on standard error: one line that is redrawn on a terminal, one line a stage elsewhere."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self._name, self._drawn, self._begun = "", False, time.monotonic()

    def stage(self, name: str) -> None:
        self.close()
        self._name, self._begun = name, time.monotonic()
        if not self.terminal:
            self.say(name)

    def show(self, fraction: float, text: str) -> None:
        if not self.terminal:
            return
        width = shutil.get_terminal_size().columns - 1
        filled = round(20 * fraction)
        bar, seconds = "#" * filled + "." * (20 - filled), time.monotonic() - self._begun
        line = f"{self._name:<18} [{bar}] {100 * fraction:3.0f}%  {seconds:4.0f} s  {text}"
        print(f"\r{line[:width]:<{width}}", end="", file=sys.stderr, flush=True)
        self._drawn = True

    def sent(self, done: int, total: int) -> None:
        self._name = "Send inputs"
        self.show(done / total if total else 1.0, size_text(total))

    def say(self, text: str) -> None:
        self.close()
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._drawn:
            print(file=sys.stderr)
        self._drawn = False


# -- jobs ------------------------------------------------------------------------------------------------------------------------------


def _list_jobs(given: argparse.Namespace) -> int:
    with _connect(given) as client:
        jobs = client.jobs()
    if given.json:
        print(json.dumps(jobs, indent=1))
        return DONE
    for job in jobs:
        doing = (job["error"] or {}).get("code", "")
        if job["state"] in ("running", "cancelling"):
            doing = f"{job['stage']} {100 * job['fraction']:.0f}%"
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(job["created"]))
        print(f"{job['id']}  {created}  {job['recipe']:<12} {job['state']:<10} {doing:<24} {job['title']}".rstrip())
    if not jobs:
        print("No jobs.", file=sys.stderr)
    return DONE


def _show_job(given: argparse.Namespace) -> int:
    with _connect(given) as client:
        job = client.job(given.id)
        log = [event["text"] for event in client.events(given.id) if event["kind"] == "log"]
    if given.json:
        print(json.dumps({**job, "log": log}, indent=1))
        return DONE
    for name in ("id", "title", "recipe", "state", "stage", "text", "attempts"):
        print(f"{name:<10} {job[name]}")
    for name in ("created", "started", "finished"):
        if job[name]:
            print(f"{name:<10} {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(job[name]))}")
    for name, value in job["parameters"].items():
        print(f"  {name} = {value}")
    for name, result in job["results"].items():
        print(f"result     {name}  {size_text(result['size'])}")
    for text in log:
        print(text)
    if job["error"]:
        print(f"error      {job['error']['code']}: {job['error']['message']} {job['error']['hint']}")
    return DONE


def _cancel_job(given: argparse.Namespace) -> int:
    with _connect(given) as client:
        print(client.cancel(given.id)["state"])
    return DONE


def _retry_job(given: argparse.Namespace) -> int:
    with _connect(given) as client:
        print(client.retry(given.id)["state"])
    return DONE


def _remove_job(given: argparse.Namespace) -> int:
    with _connect(given) as client:
        client.remove(given.id)
    return DONE


def _download_job(given: argparse.Namespace) -> int:
    with _connect(given) as client:
        job = client.job(given.id)
        if job["state"] == "failed":
            raise _as_failure(job)
        if job["state"] != "done":
            raise KilnError("bad-state", f"Job {job['id']} is {job['state']}.", "Results are there when it is done.")
        _fetch(client, job, given.out, _Bar())
    return DONE


# -- weights ---------------------------------------------------------------------------------------------------------------------------


def _list_weights(given: argparse.Namespace) -> int:
    found = [weights.describe(one) for one in weights.entries().values()]
    if given.json:
        print(json.dumps(found, indent=1))
        return DONE
    for one in found:
        size = size_text(one["bytes"]) if one["bytes"] else ""
        pinned = "" if one["pinned"] else "at a pinned commit" if one["revision"] else "not pinned"
        print(f"{one['id']:<30} {one['state']:<10} {size:>8}  {one['licence']['name']:<30} {pinned}".rstrip())
    print(f"They lie in {weights.root()}. `kiln weights show ID` tells more.", file=sys.stderr)
    return DONE


def _show_weights(given: argparse.Namespace) -> int:
    for one in weights.chain(given.id):
        found = weights.describe(one)
        print(weights.terms(one))
        print(f"  State      {found['state']}{': ' + found['problem'] if found['problem'] else ''}, {weights.place(one)}")
        if found["revision"]:
            print(f"  Revision   {found['revision']}" + (f", files checked by the {found['checked']}" if found["checked"] else ""))
        if found["accepted"]:
            print(f"  Agreed     on {found['accepted']}")
    return DONE


def _pull_weights(given: argparse.Namespace) -> int:
    from backend import fetch

    for id in given.ids:
        unread = [
            one for one in weights.chain(id) if weights.state(one.id) in ("missing", "partial", "damaged") and not weights.accepted(one)
        ]
        for one in unread:
            print(weights.terms(one), file=sys.stderr)
        accept = given.accept_licence
        if unread and not accept and sys.stdin.isatty() and sys.stderr.isatty():
            print("Do you agree to the terms, and shall it be fetched? [y/N] ", end="", file=sys.stderr, flush=True)
            with contextlib.suppress(EOFError):
                accept = input().strip().lower() in ("y", "yes")
        bar = _Bar()
        bar.stage(f"Fetch {id}")
        try:
            place = fetch.pull(id, accept, True, given.source, bar.show)
        except KeyboardInterrupt:
            bar.say("Stopped; what came is kept, and the same command goes on.")
            raise
        finally:
            bar.close()
        found = weights.describe(weights.entry(id))
        bar.say(f"{place}  {size_text(found['here'])}" + (f", checked by the {found['checked']}" if found["checked"] else ""))
    return DONE


def _verify_weights(given: argparse.Namespace) -> int:
    from backend import fetch

    ids = given.ids or [id for id in weights.entries() if weights.state(id) in ("installed", "bundled", "damaged")]
    damaged = False
    for id in ids:
        bar, one = _Bar(), weights.entry(id)
        wrong = fetch.verify(id, bar.show)
        bar.close()
        damaged = damaged or bool(wrong)
        unknown = one.bundled and not one.files
        print(f"{id:<30} {'; '.join(wrong) or ('it comes with Kiln, without a hash' if unknown else 'as it was fetched')}")
        if wrong:
            print(f"kiln: repair it with `kiln weights pull {id}`", file=sys.stderr)
    return FAILED if damaged else DONE


def _remove_weights(given: argparse.Namespace) -> int:
    from backend import fetch

    print(f"{size_text(fetch.remove(given.id))} freed")
    return DONE


def _bundle_weights(given: argparse.Namespace) -> int:
    from backend import fetch

    bar = _Bar()
    bar.stage("Bundle")
    path = fetch.bundle(given.ids, given.out, bar.show)
    bar.say(f"{path}  {size_text(path.stat().st_size)}")
    return DONE


# -- doctor ----------------------------------------------------------------------------------------------------------------------------


def _doctor(given: argparse.Namespace) -> int:
    findings = examine(given.connection)
    if given.json:
        print(json.dumps(findings, indent=1))
    else:
        for finding in findings:
            print(f"{finding['state']:<8} {finding['what']:<10} {finding['found']}")
            if finding["fix"]:
                print(f"{'':<19} -> {finding['fix']}")
    return FAILED if any(finding["state"] == "problem" for finding in findings) else DONE


def examine(path: Path | None = None) -> list[dict[str, str]]:
    """What this machine offers: maps of `what`, `state` (ok, warning: works but less well, problem), what was `found`, and the `fix`."""
    findings: list[dict[str, str]] = []

    def note(what: str, found: str, problem: str = "", warning: str = "") -> None:
        state = "problem" if problem else "warning" if warning else "ok"
        findings.append({"what": what, "state": state, "found": found, "fix": problem or warning})

    note("kiln", f"{VERSION}, {Path(__file__).resolve().parents[1]}")
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    note("python", f"{platform.python_version()}, {sys.executable}", "" if supported else "Kiln's backend needs Python 3.11 to 3.13.")
    _examine_packages(note)
    _examine_device(note)
    home = connection.home()
    _examine_disk(note, home)
    _examine_backend(note, path or connection.default_path())
    return findings


def _examine_packages(note: Any) -> None:
    repair = "Run `python build.py setup`, or press Repair in Blender's preferences for Kiln."
    names = (
        "numpy", "scipy", "numba", "torch", "gsplat", "scikit-image", "trimesh", "xatlas", "coacd", "pillow", "jaxtyping", "msgpack",
        "pyzmq",
    )  # fmt: skip
    found, missing = [], []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    note("packages", ", ".join(found) + (f"; missing: {', '.join(missing)}" if missing else ""), repair if missing else "")
    if "pyzmq" not in missing:
        import zmq

        if not zmq.has("curve"):
            note(
                "encryption",
                f"libzmq {zmq.zmq_version()} without CURVE",
                "Reinstall pyzmq from its wheel: pip install --force-reinstall pyzmq",
            )


def _examine_device(note: Any) -> None:
    from backend import worker

    device = worker.device()
    driver = _nvidia_driver()
    text = f"{device['name']}, {size_text(device['free_memory'])} of {size_text(device['memory'])} free"
    if device["torch"] is None:
        note("device", text, f"torch cannot be loaded: {device.get('problem', 'it is not installed')}.")
        return
    text += f", torch {device['torch']}"
    warning = ""
    if driver and device["kind"] != "cuda":
        text += f"; {driver}"
        if "+cpu" in device["torch"] or not importlib.import_module("torch").version.cuda:
            warning = "This torch is built for the CPU. Set the backend up again for CUDA: the GPU is many times faster."
        else:
            warning = f"torch does not see the GPU ({device.get('problem', 'no reason given')}). Update the NVIDIA driver, then restart."
    elif device["kind"] == "cpu" and Path("/dev/kfd").exists():
        warning = "An AMD GPU is here, but this torch has no ROCm. Set the backend up again for ROCm."
    elif device["kind"] == "cuda" and driver:
        text += f"; {driver}"
    note("device", text, warning=warning)
    _examine_engines(note)
    total, free = worker.main_memory()
    note(
        "memory",
        f"{size_text(free)} of {size_text(total)} free",
        warning="Close other programs: 3 GB should be free." if 0 < free < 3e9 else "",
    )


def _examine_engines(note: Any) -> None:
    """What draws and fits splats: gsplat or NVIDIA Warp on an NVIDIA GPU, else the CPU."""
    try:
        from backend.splats import gpu
    except ImportError as error:  # a package is missing; what the packages are like is told above
        note("splats", f"cannot be loaded: {error}", "Run `python build.py setup`.")
        return
    if gpu.why_no_cuda():
        note("splats", f"the CPU rasteriser ({gpu.why_no_cuda()})")
        return
    gsplat, warp = gpu.why_no_gsplat(), gpu.why_no_warp()
    if gsplat and warp:
        fix = "Update the NVIDIA driver, then set the backend up again; until then the CPU fits."
        note("splats", f"the CPU rasteriser ({gsplat}; {warp})", warning=fix)
    elif gsplat:
        note("splats", f"NVIDIA Warp ({gsplat})")
    elif gpu.gsplat_is_built():
        note("splats", "gsplat with its compiled CUDA code")
    else:
        note("splats", "gsplat, which compiles its CUDA code at its first use, in some minutes")


def _nvidia_driver() -> str:
    program = shutil.which("nvidia-smi")
    if not program:
        return ""
    try:
        query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not answer ({error})"
    lines = answer.stdout.strip().splitlines()
    return f"{lines[0].replace(', ', ', driver ')}" if answer.returncode == 0 and lines else ""


def _examine_disk(note: Any, home: Path) -> None:
    there = home
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    fix = "Free some space, or set KILN_HOME to a folder on another disk." if free < 5e9 else ""
    if not os.access(there, os.W_OK):
        note("home", str(home), f"{there} cannot be written to. Change its permissions, or set KILN_HOME to another folder.")
        return
    used = size_of(home) if home.exists() else 0
    text = f"{home} holds {size_text(used)}, {size_text(free)} free on its disk"
    note("home", text, problem=fix if free < 500e6 else "", warning=fix)


def _examine_backend(note: Any, path: Path) -> None:
    from protocol.client import Client

    try:
        with Client(connection.Connection.load(path), timeout=5.0, patience=0.0) as client:
            hello = client.hello()
    except KilnError as error:
        if error.code == "unavailable":
            note("backend", "none runs; `kiln run` and Blender start one when they need it")
        else:
            note("backend", error.message, error.hint or "Start it again.")
        return
    version = str(hello.get("version", "unknown"))
    note(
        "backend",
        f"{version} runs on {hello.get('host', '')} ({hello.get('device', '')})",
        "" if version == VERSION else "Run `kiln stop`; the next one is new.",
    )


if __name__ == "__main__":
    sys.exit(main())
