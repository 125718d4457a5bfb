"""Batches of this computer: what was asked for lies in a folder under Kiln's home, and `kiln batch` works through it in a process of its
own, which outlives Blender. What it tells stands in OUT/report.json (docs/batch.md).

    batches/<id>/batch.json     what was asked for: an Order
    batches/<id>/manifest.toml  the items
    batches/<id>/scene.blend    the open file as it was, where items are objects of it
    batches/<id>/log.txt        what the process printed

Saving the open file is the main thread's; all else is plain files and processes, which `Watch` looks at on a thread of its own.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import bpy

from . import capture, session
from .backend_link import tail
from .protocol import connection, recipes
from .protocol.errors import KilnError

LOOK = 0.5  # seconds between two looks at the batches
QUIET = 120.0  # seconds without news after which a batch may be taken up again: its process's number may be another's by now
OVER = ("done", "failed", "cancelled")  # states of a batch
ENDED = ("done", "failed", "cancelled")  # states of an item
TOLD = {"state", "begun", "pid", "updated", "items"}  # what a batch's report.json says; a recipe's is another file of that name
_processes: dict[str, subprocess.Popen] = {}  # those that this Blender started, by batch


@dataclass
class Order:
    """What was asked for. Paths are absolute."""

    title: str
    created: float  # seconds since 1970
    manifest: str  # a file, or a folder of files
    out: str
    options: list[str] = field(default_factory=list)  # further ones of `kiln batch`
    collection: str = ""  # name of the collection of `file` that the results are wanted in
    wants_import: bool = False
    library: str = ""  # asset library file that the process puts them into
    file: str = ""  # .blend file of the items; "" if it was never saved
    session: str = ""  # of Blender, and the number of the file that was open: the same file, even if it has another name by now
    opened: int = 0


@dataclass(frozen=True)
class Batch:
    """How a batch stands."""

    id: str
    folder: Path
    order: Order
    report: dict | None  # report.json; None until there is one of the process that was started last
    state: str  # "starting", "running", "interrupted", "done", "failed" or "cancelled"
    said: str = ""  # the end of its log, where it was interrupted
    pictures: dict[str, Path] = field(default_factory=dict)  # of items, by name: of the result, before of the source

    @property
    def items(self) -> list[dict]:
        return (self.report or {}).get("items", [])

    @property
    def out(self) -> Path:
        return Path(self.order.out)

    @property
    def active(self) -> bool:
        return self.state in ("starting", "running")

    def count(self, *states: str) -> int:
        return sum(item["state"] in states for item in self.items)


def home() -> Path:
    return connection.home() / "batches"


# What to make


def is_surface(thing: bpy.types.Object) -> bool:
    """Whether an asset could be made of the object, as far as its kind tells."""
    return thing.type in capture.SURFACES or thing.instance_type != "NONE" or bool(thing.particle_systems)


def items_of(things) -> list[dict]:
    """Manifest entries of objects, collections (both of the open file) and paths."""
    found = []
    for thing in things:
        if isinstance(thing, bpy.types.Object):
            found.append({"name": "{object}", "object": glob.escape(thing.name)})
        elif isinstance(thing, bpy.types.Collection):
            found.append({"name": "{object}", "collection": glob.escape(thing.name)})
        else:
            path = Path(bpy.path.abspath(str(thing))).absolute()
            if not path.is_file():
                raise KilnError("bad-input", f"There is no file {path}.", "Check its path.")
            found.append({"file": str(path)})
    if not found:
        raise KilnError("nothing-selected", "There is nothing to make a batch of.", "Select objects, or choose a collection or a folder.")
    return found


def toml(defaults: dict, items: list[dict]) -> str:
    """A manifest. Strings of JSON are strings of TOML, as long as no letter is written as two halves."""

    def value(one) -> str:
        if isinstance(one, dict):
            return "{ " + ", ".join(f"{json.dumps(name)} = {value(inner)}" for name, inner in one.items()) + " }"
        return json.dumps(one, ensure_ascii=False)

    def table(entries: dict) -> list[str]:
        return [f"{name} = {value(one)}" for name, one in entries.items() if one not in ("", {})]

    lines = ["[defaults]", *table(defaults)]
    for item in items:
        lines += ["", "[[items]]", *table(item)]
    return "\n".join(lines) + "\n"


def wanted(recipe: str, preset: str, values: dict) -> dict:
    """A manifest's defaults for a recipe with these parameters: those that the preset does not say. Raises KilnError."""
    of_preset = recipes.values(recipes.make(recipe, preset=preset))
    values = recipes.values(recipes.make(recipe, values, preset))
    return {"recipe": recipe, "preset": preset, "parameters": {name: one for name, one in values.items() if one != of_preset[name]}}


def order(context, given: Path | list[dict], defaults: dict, out: str, title: str, **more) -> Batch:
    """Writes down what is asked for, ready to `start`. given: a manifest, a folder of files, or entries of a manifest. defaults: as
    `wanted` returns them; of a manifest, {} leaves what it says. more: further fields of Order. Raises KilnError."""
    python()  # before anything is written
    where = Path(bpy.path.abspath(out)).absolute() if out else None
    if where is not None:
        refuse_foreign(where)
    kept = home() / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    with session.disk_errors():
        kept.mkdir(parents=True)
    try:
        options = list(more.pop("options", ()))
        if isinstance(given, list):
            manifest = kept / "manifest.toml"
            if any("file" not in item for item in given):
                scene = save_copy(context, kept / "scene.blend")
                given = [item if "file" in item else {"file": scene.name, **item} for item in given]
            manifest.write_text(toml(defaults, given), encoding="utf-8")
        else:
            manifest = given
            for name, value in defaults.get("parameters", {}).items():
                options += ["--set", f"{name}={json.dumps(value) if not isinstance(value, str) else value}"]
            options += [part for name in ("recipe", "preset") if defaults.get(name) for part in (f"--{name}", defaults[name])]
        where = where or kept / "results"
        refuse_unwritable(where)
        made = Order(title, time.time(), str(manifest), str(where), options, **more)
        made.file, made.session, made.opened = bpy.data.filepath, session.current.id, session.current.file
        _write(kept / "batch.json", dataclasses.asdict(made))
    except BaseException:
        shutil.rmtree(kept, ignore_errors=True)
        raise
    return look(kept)


def save_copy(context, path: Path) -> Path:
    """The open file as it is now, in another place; itself, its name and whether it is saved stay."""
    missing = [library for library in bpy.data.libraries if not Path(bpy.path.abspath(library.filepath)).is_file()]
    if missing:
        words = f"The linked library {missing[0].filepath} is not there, so what is linked from it would be lost."
        raise KilnError("bad-library", words, "Save it, or find it in the Outliner (Blender File, Libraries, Relocate).")
    painted = [image for image in bpy.data.images if image.is_dirty and image.users and image.source in ("FILE", "GENERATED", "TILED")]
    painted = [image for image in painted if image.type not in ("RENDER_RESULT", "COMPOSITING")]
    if painted:
        words = f"The image {painted[0].name} was painted and not saved, and a copy of this file would not have it."
        raise KilnError("unsaved-image", words, "Save or pack it (Image Editor, Image, Save or Pack).")
    with session.disk_errors():
        try:
            bpy.ops.wm.save_as_mainfile(filepath=str(path), copy=True, relative_remap=True, compress=True, check_existing=False)
        except RuntimeError as error:
            reason = str(error).removeprefix("Error: ").strip()
            raise KilnError("disk", f"A copy of this file cannot be saved: {reason}", f"Check the folder {path.parent}.") from None
    return path


def refuse_unwritable(folder: Path) -> None:
    """Makes a folder for results, or KilnError says why that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        words = f"The output folder {folder} cannot be written: {error.strerror or error}."
        raise KilnError("disk", words, "Choose another one, or check its permissions.") from None


def refuse_foreign(folder: Path) -> None:
    """A batch would write over a report.json of something else, as `kiln run --out` leaves one: KilnError says so."""
    try:
        foreign = _report(folder) is None
    except ValueError:
        foreign = True
    except OSError:  # there is none
        foreign = False
    if foreign:
        words = f"The output folder {folder} holds a report.json that is not a batch's."
        raise KilnError("bad-output", words, "Choose another output folder, or a new one in it.")


# The process


def python() -> Path:
    """The Python of this computer's backend environment, or KilnError."""
    session.current.connect()
    where = session.current.where
    found = where.python or session.environment.python(session.environment_folder())  # where another computer computes, too
    if found is None:
        raise KilnError("no-backend", "Kiln's backend is not set up on this computer.", "Press Set Up Backend in the Kiln tab.")
    return found


def kiln(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """The backend's `kiln` command with these words, and its environment variables."""
    found, where = python(), session.current.where
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "PYTHONPATH")}
    if where.pythonpath:
        environment["PYTHONPATH"] = where.pythonpath
    environment["KILN_EXTENSION"] = str(Path(__file__).resolve().parent)  # whose code captures
    remote = ["--connection", str(where.remote)] if where.remote else []
    return [str(found), "-P", "-m", "backend.cli", *remote, *words], environment


def blender() -> list[str]:
    """The option by which `kiln batch` captures with this very Blender, or with the Python that this is a module of."""
    return ["--blender", bpy.app.binary_path or sys.executable]


def start(batch: Batch, again: bool = False) -> subprocess.Popen:
    """Starts or takes up a batch: finished items are not made again; with `again`, what failed is. The process outlives Blender."""
    order = batch.order
    library = ["--library", order.library] if order.library else []
    failed = ["--retry-failed"] if again else []
    command, environment = kiln(["batch", order.manifest, "--out", order.out, *blender(), *library, *order.options, *failed])
    if sys.platform == "win32":
        apart = {"creationflags": subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP}
    else:
        apart = {"start_new_session": True}
    with session.disk_errors():
        with suppress(FileNotFoundError):
            (Path(order.out) / "cancel").unlink()
        with open(batch.folder / "log.txt", "wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=str(batch.folder), **apart
            )
        _processes[batch.id] = process
        (batch.folder / "pid").write_text(str(process.pid))
    return process


def at_work(batch: Batch) -> bool:
    """Whether the process that this Blender started for it runs still."""
    process = _processes.get(batch.id)
    return process is not None and process.poll() is None


def finish(batch: Batch, progress: Callable[[dict], None] | None = None, again: bool = False) -> dict:
    """Starts a batch, waits for its end and returns its report: for scripts. Ctrl-C cancels it, and so does what `progress` raises;
    a second Ctrl-C does not wait for what it is at. Raises KilnError."""
    shown = None
    try:
        process = start(batch, again)
        while process.poll() is None:
            time.sleep(0.1)
            now = look(batch.folder)
            if now is None or now.report is None or now.report == shown:
                continue
            shown = now.report
            if progress is not None:
                progress(shown)
            else:
                session.terminal(f"{batch.order.title}: {now.count(*ENDED)} of {len(now.items)}{' · '.join(['', *doing(now)])}")
    except BaseException as error:
        _stop(batch)
        if not isinstance(error, KeyboardInterrupt):
            raise
        raise KilnError("cancelled", "The batch was cancelled.", "The same again goes on where it stopped.") from None
    now = look(batch.folder)
    if now is None or now.report is None or now.state not in OVER:
        last = (tail(batch.folder / "log.txt").splitlines() or ["it said nothing"])[-2:]
        raise KilnError("batch-failed", f"`kiln batch` ended with status {process.returncode}: {' '.join(' '.join(last).split())}", "")
    return now.report


def _stop(batch: Batch) -> None:
    """Cancels a batch of this Blender's and waits until its process has ended; a Ctrl-C meanwhile ends that at once."""
    try:
        while at_work(batch):
            cancel(batch)  # again and again: what is asked before it has begun, it does not see
            time.sleep(0.1)
    except BaseException:
        process = _processes[batch.id]
        process.terminate()
        process.wait()


def doing(batch: Batch) -> list[str]:
    """What is being worked on: "Pot: fit splats"."""
    return [
        f"{item['name']}: {(item['stage'] or item['state']).lower()}" for item in batch.items if item["state"] in ("capturing", "computing")
    ]


def cancel(batch: Batch) -> None:
    with session.disk_errors():
        (batch.out / "cancel").touch()


def remove(batch: Batch) -> None:
    """Forgets a batch; results outside its folder stay."""
    _processes.pop(batch.id, None)
    shutil.rmtree(batch.folder, ignore_errors=True)


def lives(pid: int) -> bool:
    """Whether there is a process of this number."""
    if pid <= 0:
        return False
    if sys.platform == "win32":
        import ctypes

        handle = ctypes.windll.kernel32.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
        if not handle:
            return False
        code = ctypes.c_ulong()
        ctypes.windll.kernel32.GetExitCodeProcess(handle, ctypes.byref(code))
        ctypes.windll.kernel32.CloseHandle(handle)
        return code.value == 259  # STILL_ACTIVE
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


# How they stand


def look(folder: Path) -> Batch | None:
    """A batch as its folder and its report tell; None for a folder that is none, or is being written or removed."""
    try:
        known = {one.name for one in dataclasses.fields(Order)}
        order = Order(**{name: value for name, value in json.loads((folder / "batch.json").read_text("utf-8")).items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    out, report, begun = Path(order.out), None, 0.0
    with suppress(OSError, ValueError):
        report = _report(out)
    with suppress(OSError):
        begun = (folder / "pid").stat().st_mtime
    alive = _alive(folder, report)
    fresh = report is not None and report["begun"] >= begun - 1.0  # else of an earlier run, not of the process that was started last
    told = report["state"] if fresh else "starting"
    if alive:
        state, report = told if told in (*OVER, "starting") else "running", report if fresh else None
    else:  # it may have ended without a word but in its log; what an earlier run did is shown still
        state = told if told in OVER else "interrupted"
    pictures = {}
    for item in (report or {}).get("items", ()):
        for which in ("result", "source"):
            if (picture := out / "thumbnails" / f"{item['name']}.{which}.png").is_file():
                pictures[item["name"]] = picture
                break
    return Batch(folder.name, folder, order, report, state, tail(folder / "log.txt") if state == "interrupted" else "", pictures)


def _report(out: Path) -> dict | None:
    """A batch's report.json; None if it is that of something else. Raises OSError and ValueError."""
    report = json.loads((out / "report.json").read_text("utf-8"))
    return report if isinstance(report, dict) and TOLD <= report.keys() else None


def _alive(folder: Path, report: dict | None) -> bool:
    """Whether somebody works through it: the process that was started last, or one that was started in a terminal. A number alone says
    little, as the system gives it to another process some day: one that was heard of lately counts."""
    process = _processes.get(folder.name)
    if process is not None and process.poll() is None:
        return True
    started, numbers = 0.0, set()
    with suppress(OSError, ValueError):
        started = (folder / "pid").stat().st_mtime
        if process is None:
            numbers.add(int((folder / "pid").read_text()))
    if report and report["state"] == "running":
        numbers.add(report["pid"])
    last = max(started, (report or {}).get("updated", 0.0))
    return time.time() - last < QUIET and any(map(lives, numbers))


class Watch(threading.Thread):
    """Looks at the batches and tells how they stand: `told` gets {id: Batch}, newest first, whenever that changes."""

    def __init__(self):
        super().__init__(name="Kiln batches", daemon=True)
        self.told: queue.SimpleQueue = queue.SimpleQueue()
        self._home = home()
        self._closing = threading.Event()
        self._known: dict[str, tuple[tuple, Batch]] = {}
        self._unreadable: set[str] = set()  # folders whose fault was printed

    def run(self) -> None:
        first = True
        while not self._closing.is_set():
            try:
                if self.look() or first:
                    self.told.put(self.batches())
                    first = False
            except Exception:  # a fault of ours: the thread stays alive
                traceback.print_exc()
            self._closing.wait(LOOK)

    def close(self) -> None:
        self._closing.set()
        if self.is_alive():
            self.join(3.0)

    def batches(self) -> dict[str, Batch]:
        """As of the last look."""
        return {id: batch for id, (_, batch) in sorted(self._known.items(), reverse=True)}

    def look(self) -> bool:
        """One look; whether something is different. What has not been written since is not read again."""
        known: dict[str, tuple[tuple, Batch]] = {}
        folders = []
        with suppress(OSError):
            folders = [folder for folder in self._home.iterdir() if folder.is_dir()]
        for folder in folders:
            try:
                if (one := self._look(folder)) is not None:
                    known[folder.name] = one
            except Exception:  # one that cannot be read hides itself alone
                if folder.name not in self._unreadable:
                    traceback.print_exc()
                self._unreadable.add(folder.name)
        different = {id: one for id, (_, one) in known.items()} != {id: one for id, (_, one) in self._known.items()}
        self._known = known
        return different

    def _look(self, folder: Path) -> tuple[tuple, Batch] | None:
        before = self._known.get(folder.name)
        report = before[1].out / "report.json" if before else None
        stamp = (_stamp(folder / "batch.json"), _stamp(folder / "pid"), _stamp(report) if report else None)
        still = before and before[0] == stamp and (not before[1].active or _alive(folder, before[1].report))
        found = before[1] if still else look(folder)
        return ((*stamp[:2], _stamp(found.out / "report.json")), found) if found is not None else None


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _write(path: Path, content: dict) -> None:
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(unfinished, path)
