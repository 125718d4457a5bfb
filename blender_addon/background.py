"""Kiln's part in a Blender without a window: reads models and renders their views, and writes what Blender alone can write, as others ask.

`serve()` is the process that backend/batch/blender.py starts: JSON lines come in on standard input and go out on standard output, and what
Blender prints goes to standard error, a log file. `answer()` does one request in any Blender that has nothing to lose. Every request begins
with an empty file, so that nothing of one is left to the next, and imports nothing that the extension's wheels bring.
"""

from __future__ import annotations

import fnmatch
import json
import os
import queue
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import bpy

from . import capture, capture_motion, export, fbx, importers, library, splat_nodes
from .protocol import pipes, recipes
from .protocol.errors import KilnError

LARGEST = 6 << 30  # bytes of memory that this process may have held: what Blender does not give back adds up

Report = Callable[[float, str], None]


def answer(do: str, fields: dict, report: Report) -> dict:
    """Does one request; the open file is lost. Raises KilnError."""
    if do not in DO:
        raise KilnError("bad-request", f"There is no request {do!r}.", f"There are {', '.join(DO)}.")
    bpy.ops.wm.read_homefile(use_factory_startup=True, use_empty=True)
    try:
        return DO[do](report=report, **fields)
    except OSError as error:
        words = f"{error.strerror or error}: {error.filename or 'a file'}."
        raise KilnError("disk", words, "Check the folder and the free space on the disk.") from error


# What is in a file


def list_subjects(report: Report, file: str, object: str | None = None, collection: str | None = None, recipe: str = "") -> dict:
    """`subjects`: of a .blend the objects or collections whose names fit the pattern, or all objects that have a surface; of another file
    one, the whole. Each has `kind`, `name`, `splats` (whether it holds Gaussians) and, of a .blend, `scene`."""
    path = Path(file)
    if path.suffix.lower() != ".blend":
        importers.check(path)
        return {"subjects": [{"kind": "file", "name": path.stem, "splats": False}], "warnings": []}
    warnings = importers.load(path)
    found, refused = [], []
    kind, pattern = ("collection", collection) if collection else ("object", object)
    for scene, thing in _everything(kind):
        if pattern and thing.name != pattern and not fnmatch.fnmatchcase(thing.name, pattern):
            continue
        splats = kind == "object" and splat_nodes.is_splats(thing)
        try:
            if splats:
                if recipe and recipes.recipe_named(recipe).INPUT != "splats":
                    continue
            elif recipe and recipes.recipe_named(recipe).INPUT == "splats":
                continue
            else:
                _subject(scene, kind, thing)
        except KilnError as error:
            refused.append(error)
            continue
        found.append({"kind": kind, "name": thing.name, "splats": splats, "scene": scene.name})
    if not found and len(refused) == 1:
        raise refused[0]
    if not found:
        names = [thing.name for _, thing in _everything(kind)]
        asked = f"{kind} {pattern!r} with a surface" if pattern else "object with a surface"
        there = f"It has {', '.join(names[:10])}{' and more' if len(names) > 10 else ''}." if names else f"It has no {kind}."
        raise KilnError("no-object", f"{path.name} has no {asked}.", there)
    return {"subjects": found, "warnings": warnings}


def _everything(kind: str) -> list[tuple]:
    """(scene, object or collection), those of the scene that was open first, each once."""
    scenes = sorted(bpy.data.scenes, key=lambda scene: scene != bpy.context.scene)
    found = {}
    for scene in scenes:
        for thing in scene.objects if kind == "object" else scene.collection.children_recursive:
            found.setdefault(thing, scene)
    return [(scene, thing) for thing, scene in found.items()]


def _subject(scene: bpy.types.Scene, kind: str, thing) -> capture.Subject:
    with bpy.context.temp_override(scene=scene, view_layer=scene.view_layers[0]):
        if kind == "collection":
            return capture.subject(bpy.context, collection=thing)
        return capture.subject(bpy.context, objects=thing if isinstance(thing, list) else [thing])


# Views of it


def take(report: Report, file: str, folder: str, recipe: str, values: dict | None = None, subject: dict | None = None) -> dict:
    """Renders what a recipe wants of a subject into a folder, as the panel's Generate does.

    `inputs`: wire name -> path. `source`: what import_asset needs. `values`: the recipe's parameters, with the frames that were captured
    and the like filled in; the job is to have these. `picture`: of the inputs the one that shows the subject best, or null. `warnings`:
    sentences. `seconds`.
    """
    started = time.perf_counter()
    path, into = Path(file), Path(folder)
    made = recipes.make(recipe, values or {})
    if made.INPUT not in ("views", "motion", "splats"):
        raise KilnError("bad-recipe", f"The recipe {recipe} takes a {made.INPUT}: there is nothing to render for it.", "Give it a picture.")
    report(0.0, f"reading {path.name}")
    importers.load(path)
    notes = []
    scene, what = _chosen(path, subject)
    into.mkdir(parents=True, exist_ok=True)
    if made.INPUT == "splats":
        made = recipes.make(recipe, {**recipes.values(made), "subject.up": "auto"})  # they go out as they stand in the scene
        work = export.Export(export.subject(bpy.context, thing=what[0]), into)
    else:
        if made.INPUT == "motion":
            if path.suffix.lower() != ".blend":
                clips = importers.choose_clip()
                if len(clips) > 1:
                    notes.append(f"It has {len(clips)} clips: the longest, {clips[0]}, is taken.")
            made = recipes.make(recipe, capture_motion.resolved(recipes.values(made), scene))
        kind = "collection" if isinstance(what, bpy.types.Collection) else "object"
        chosen = _subject(scene, kind, what)
        work = (capture_motion.MovingCapture if made.INPUT == "motion" else capture.Capture)(chosen, made.capture, into, made.seed)
    try:
        doing = "writing" if made.INPUT == "splats" else "rendering"
        while work.step():
            report(work.done / work.steps, f"{doing} {work.done} of {work.steps}")
        inputs, source = work.finish()
    finally:
        work.close()
    table = inputs.get("transforms.json")
    return {
        "inputs": {name: str(place) for name, place in inputs.items()},
        "source": source,
        "values": recipes.values(made),
        "picture": str(capture.from_the_front(table)) if table else None,
        "warnings": notes + importers.warnings(path),  # only now are drivers known that were not run
        "seconds": round(time.perf_counter() - started, 3),
    }


def _show(scene: bpy.types.Scene) -> None:
    """Makes a scene the one that is open: in others, nothing is evaluated after a file was read, and all stands at the origin."""
    for window in bpy.context.window_manager.windows:
        window.scene = scene
    scene.view_layers[0].update()


def _chosen(path: Path, subject: dict | None) -> tuple[bpy.types.Scene, list[bpy.types.Object] | bpy.types.Collection]:
    """The scene and the objects or the collection that a subject of `list_subjects` names; all that has a surface where none is named."""
    kind = (subject or {}).get("kind", "file")
    if kind == "file":
        scene = bpy.context.scene
        return scene, importers.surfaces(path, scene)
    for scene, thing in _everything(kind):
        if thing.name == subject["name"] and subject.get("scene", scene.name) == scene.name:
            _show(scene)
            return scene, thing if kind == "collection" else [thing]
    raise KilnError("no-object", f"{path.name} has no {kind} {subject['name']!r}.", "")


# What Blender writes of results


def write_fbx(report: Report, glb: str, out: str, options: dict | None = None) -> dict:
    """`file`: the FBX of a result; `files`: it and what belongs beside it. options: those of `fbx.write`."""
    report(0.0, f"writing {Path(out).name}")
    written = fbx.write(Path(glb), Path(out), **(options or {}))
    return {"file": str(written[0]), "files": [str(path) for path in written]}


def write_library(report: Report, assets: list[dict], file: str, catalog: str = "Kiln", splats: bool = False) -> dict:
    """`file`: the library to which results were added; `assets`: how many it now has."""
    return {"file": file, "assets": library.write(assets, Path(file), catalog, splats, report)}


DO: dict[str, Callable[..., dict]] = {"list": list_subjects, "capture": take, "fbx": write_fbx, "library": write_library}


# The process


def serve(scratch: str) -> None:
    """Answers requests until it is told to quit, or until whoever asks is gone; then removes the folder `scratch`. Never returns."""
    requests, replies = pipes.take()
    lock = threading.Lock()

    def send(message: dict) -> None:
        line = json.dumps(message).encode() + b"\n"  # ASCII: one line whatever it holds
        with lock:
            try:
                replies.write(line)
                replies.flush()
            except OSError:
                _leave(scratch)

    todo: queue.SimpleQueue[dict] = queue.SimpleQueue()

    def listen() -> None:
        for line in requests:
            todo.put(json.loads(line))
        _leave(scratch)  # in the middle of a render too: nobody waits for it

    threading.Thread(target=listen, daemon=True).start()
    send({"ready": bpy.app.version_string})
    while (request := todo.get()).get("do") != "quit":
        number, last = request.pop("id"), 0.0

        def report(fraction: float, text: str, number=number) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > 0.1:
                last = now
                send({"id": number, "fraction": fraction, "text": text})

        try:
            done = answer(request.pop("do"), request, report)
            send({"id": number, "ok": {**done, "restart": _peak_memory() > LARGEST}})
        except KilnError as error:
            send({"id": number, "error": error.to_wire()})
        except Exception as error:
            traceback.print_exc()
            words = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}."
            send({"id": number, "error": KilnError("internal", words, "This is a defect of Kiln; Blender's log has more.").to_wire()})
    _leave(scratch)


def _leave(scratch: str) -> None:
    """Ends the process. Not by sys.exit: Blender would free everything first, and may crash doing so."""
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)


def _peak_memory() -> int:
    """The most bytes that this process has held."""
    if sys.platform != "win32":
        import resource

        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return held if sys.platform == "darwin" else held * 1024
    import ctypes

    counters = (ctypes.c_size_t * 10)()  # PROCESS_MEMORY_COUNTERS: two 32-bit numbers, then PeakWorkingSetSize, ...
    process = ctypes.windll.kernel32.GetCurrentProcess
    process.restype = ctypes.c_void_p
    size = ctypes.sizeof(ctypes.c_size_t) * 9
    known = ctypes.windll.kernel32.K32GetProcessMemoryInfo(ctypes.c_void_p(process()), ctypes.byref(counters), size)
    return counters[1] if known else 0
