"""`python -m backend.worker`: the process that computes. It takes commands from jobs.py on its standard input and reports on its standard
output, as frames of a 4-byte length (big-endian) and a msgpack map; what libraries print goes to its standard error, a log file.

In: `run` (job, title, recipe, parameters, inputs: name -> [path, hash], folder, stages, stages_bytes), `cancel` (job), `release` (give back
what memory networks hold between jobs; after the job that runs), `quit`. Out: `ready`, `device`, `warm` once it has compiled ahead, `alive`
every 2 s, and for a job: `stage`, `progress`, `preview` (PNG), `log`, then one of `done` (results: names), `failed` (error), `cancelled`.
The process ends by itself when its standard input closes: it never outlives the server.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import importlib
import io
import os
import queue
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import msgpack

from backend import disk
from backend.pipelines import PIPELINES
from backend.store import CHUNK, check_name
from protocol import pipes, recipes
from protocol.errors import Cancelled, KilnError

ALIVE_SECONDS = 2.0
PROGRESS_SECONDS = 0.1  # at most one progress report in this time
PREVIEW_SECONDS = 0.5
PREVIEW_SIZE = 512  # pixels, the longer side at most
LOG_LINES = 500  # of one job
LARGEST_FRAME = 64 << 20
IDLE_SECONDS = float(os.environ.get("KILN_IDLE_SECONDS", "300"))  # that networks stay in memory for a next job


def write_frame(stream: IO[bytes], message: dict[str, Any]) -> None:
    packed = msgpack.packb(message)
    stream.write(struct.pack(">I", len(packed)) + packed)
    stream.flush()


def read_frame(stream: IO[bytes]) -> dict[str, Any] | None:
    """The next message, or None at the end of the stream (in the middle of a message too: its writer was killed)."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    (length,) = struct.unpack(">I", head)
    if length > LARGEST_FRAME:
        raise ValueError(f"a frame of {length} bytes")
    packed = stream.read(length)
    return msgpack.unpackb(packed) if len(packed) == length else None


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the server's terminal: the server decides what becomes of the job
    if hasattr(os, "nice"):
        os.nice(5)  # Blender and the server come first; on Windows jobs.py sets the priority
    commands, replies = pipes.take()
    faulthandler.enable(2)
    lock = threading.Lock()

    def send(message: dict[str, Any]) -> None:
        with lock:
            try:
                write_frame(replies, message)
            except OSError:
                os._exit(0)  # the server is gone

    todo: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    cancelled: set[str] = set()

    def listen() -> None:
        while command := read_frame(commands):
            if command["command"] in ("run", "release"):
                todo.put(command)
            elif command["command"] == "cancel":
                cancelled.add(command["job"])
            else:
                break
        os._exit(0)  # at once, in the middle of a step too: stages are written whole or not at all

    printed = Path("logs", "worker.log").absolute()  # jobs.py starts this process in the store's folder

    def beat() -> None:
        while True:
            send({"kind": "alive"})
            disk.limit_log(2, printed)
            time.sleep(ALIVE_SECONDS)

    threading.Thread(target=listen, daemon=True).start()
    threading.Thread(target=beat, daemon=True).start()
    send({"kind": "ready"})
    warm = False
    while True:
        if not warm and todo.empty():  # a job that waits already loads what it needs, and no more
            warm = True
            send({"kind": "device", "device": device()})
            warm_up(todo.empty)
            send({"kind": "warm"})
        try:
            command = todo.get(timeout=IDLE_SECONDS if _holds_networks() else None)
        except queue.Empty:
            command = {"command": "release"}
        if command["command"] == "release":
            _release_networks()
        else:
            run_job(command, send, cancelled)
        free_memory()


def warm_up(idle: Callable[[], bool]) -> None:
    """Loads and compiles ahead what jobs need, as long as none waits."""
    for module, _ in PIPELINES.values():
        try:
            if idle() and hasattr(loaded := importlib.import_module(module), "warm_up"):
                loaded.warm_up()
        except Exception:  # the job that needs it says so; the others run
            traceback.print_exc()


def device() -> dict[str, Any]:
    """What the worker computes on: `kind` (cuda, rocm, mps, cpu), `name`, `memory` and `free_memory` in bytes, `cores`, `torch`, and as
    `problem` why splats are not fitted on a GPU, where they are not."""
    found: dict[str, Any] = {"kind": "cpu", "name": "CPU", "cores": cores(), "memory": 0, "free_memory": 0, "torch": None}
    try:
        import torch

        found["torch"] = torch.__version__
        from backend.splats import gpu

        if reason := gpu.why_not():
            found["problem"] = reason
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            kind = "rocm" if torch.version.hip else "cuda"
            found.update(kind=kind, name=torch.cuda.get_device_name(), memory=total, free_memory=free)
            return found
        if torch.backends.mps.is_available():
            found.update(kind="mps", name="Apple GPU")
    except Exception as error:  # a broken driver or build: `kiln doctor` tells more, the CPU still works
        found["problem"] = f"{type(error).__name__}: {error}"
    found["memory"], found["free_memory"] = main_memory()
    if found["kind"] == "cpu":
        found["name"] = f"CPU, {found['cores']} cores"
    return found


def cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: those of its affinity, or its container's share of their time (`quota`, Linux) if that is less."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no container, or "max": no limit
        share, period = map(int, quota.read_text().split())
        count = max(1, min(count, round(share / period)))
    return count


def main_memory() -> tuple[int, int]:
    """Total and free bytes, (0, 0) where the system does not say."""
    if sys.platform == "linux":
        table = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(table["MemTotal"].split()[0]) * 1024, int(table["MemAvailable"].split()[0]) * 1024
    if sys.platform == "win32":
        import ctypes

        status = (ctypes.c_ulonglong * 8)()  # MEMORYSTATUSEX: length and load share the first 8 bytes, then total, free, ...
        status[0] = ctypes.sizeof(status)
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return status[1], status[2]
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total, total // 2  # macOS gives pages back as they are asked for; half is a fair guess


def run_job(command: dict[str, Any], send: Callable[[dict[str, Any]], None], cancelled: set[str]) -> None:
    """Runs one job to its end, which is the last message it sends. `cancelled`: the jobs that are to stop."""
    job = command["job"]
    reports = Reports(lambda message: send({"job": job, **message}))
    with _temporary_files_in(Path(command["folder"]) / "temporary"):
        outcome = compute(command, reports, lambda: job in cancelled)
    send({"job": job, **outcome})
    cancelled.discard(job)


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """jobs.py removes the job's folder however the job ends, and with it what a killed library left."""
    folder.mkdir(parents=True, exist_ok=True)
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def compute(command: dict[str, Any], reports: Reports, cancelled: Callable[[], bool]) -> dict[str, Any]:
    """Runs the recipe of a `run` command, in this process, and returns the message that ends the job. The results lie in `results` of the
    command's folder."""
    folder = Path(command["folder"])
    try:
        from backend.pipelines.run import Run  # numpy and more: not before the server has its answer

        run = Run(Path(command["stages"]), reports, cancelled, command["stages_bytes"], command.get("title", ""))
        run.begin("Read inputs")
        inputs, results = folder / "inputs", folder / "results"
        results.mkdir(parents=True, exist_ok=True)
        lay_out(command["inputs"], inputs, run.progress)
        recipe = recipes.make(command["recipe"], command["parameters"])
        module, name = PIPELINES[command["recipe"]]
        asset = getattr(importlib.import_module(module), name)(run, inputs, recipe)
        run.begin("Save")
        with disk.full_disk_named(folder):
            asset.save(results)
        run.progress(1.0)
        return {"kind": "done", "results": sorted(path.relative_to(results).as_posix() for path in results.rglob("*") if path.is_file())}
    except Cancelled:
        return {"kind": "cancelled"}
    except BaseException as error:
        if cancelled():  # whatever a library made of the Cancelled that went through it
            return {"kind": "cancelled"}
        traceback.print_exc()
        return {"kind": "failed", "error": describe(error, command, reports.stage).to_wire(), "trace": traceback.format_exc()[-8000:]}


def describe(error: BaseException, command: dict[str, Any], stage: str) -> KilnError:
    """Any exception of a pipeline as an error that says what to do."""
    if isinstance(error, KilnError):
        return error
    if disk.is_full(error):
        return disk.no_space(Path(command["folder"]))
    where = f" in {stage!r}" if stage else ""
    text = str(error).strip().partition("\n")[0][:300]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return out_of_memory(
            command["recipe"], command["parameters"], f"The memory did not suffice{where}: {text or type(error).__name__}."
        )
    return KilnError(
        "internal", f"{type(error).__name__}{where}: {text}.", "This is a defect of Kiln; the job's log holds what a report needs."
    )


def out_of_memory(recipe: str, parameters: dict[str, Any], message: str) -> KilnError:
    """`KilnError("out-of-memory")` that names the parameters which ask for more than the preset draft does."""
    draft = getattr(recipes.RECIPES.get(recipe), "PRESETS", {}).get("draft", {})
    large = [
        f"{name} (now {parameters[name]}, draft {least})"
        for name, least in draft.items()
        if isinstance(least, (int, float)) and not isinstance(least, bool) and parameters.get(name, least) > least
    ]
    advice = f"Lower {' or '.join(large)}, or close" if large else "Close"
    return KilnError("out-of-memory", message, f"{advice} other programs that need memory, then retry.")


def lay_out(inputs: dict[str, list[str]], folder: Path, progress: Callable[..., None]) -> None:
    """Makes the job's input folder from artifacts: `inputs` maps relative names to (path, SHA-256). Links where it can, else copies."""
    folder.mkdir(parents=True)
    for number, (name, (path, hash)) in enumerate(inputs.items()):
        progress(number / len(inputs), name)
        target = folder / check_name(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with disk.full_disk_named(folder):
            try:
                os.link(path, target)
            except FileNotFoundError:
                raise damaged(name) from None
            except OSError:
                shutil.copyfile(path, target)
        digest = hashlib.sha256()
        with open(target, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != hash:
            raise damaged(name)


def damaged(name: str) -> KilnError:
    return KilnError("damaged-input", f"The stored input {name} is damaged.", "Submit the job again: the file is then sent anew.")


class Reports:
    """Passes a run's reports on, no more often than a person can see, previews as PNG unless nobody looks at them."""

    def __init__(self, send: Callable[[dict[str, Any]], None], previews: bool = True):
        self._send, self._previews, self.stage = send, previews, ""
        self._lines = 0
        self._next_progress = self._next_preview = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        if event["kind"] == "stage":
            self.stage = event["stage"]
            self._send(event)
            self._next_progress = 0.0
        elif event["kind"] == "log":
            self._lines += 1
            if self._lines <= LOG_LINES:
                self._send({"kind": "log", "text": event["text"][:2000]})
        else:
            preview = event.get("preview")
            if self._previews and preview is not None and now >= self._next_preview:
                self._send({"kind": "preview", "png": _png(preview)})
                self._next_preview = time.monotonic() + PREVIEW_SECONDS
            if now >= self._next_progress:
                self._send({"kind": "progress", "fraction": event["fraction"], "text": event["text"][:200]})
                self._next_progress = now + PROGRESS_SECONDS


def _png(picture: Any) -> bytes:
    """H x W x 3, float in [0, 1] or uint8, as a small PNG."""
    import numpy as np
    from PIL import Image

    picture = np.asarray(picture)
    skip = max(1, max(picture.shape[:2]) // (2 * PREVIEW_SIZE))
    picture = picture[::skip, ::skip]
    if picture.dtype != np.uint8:
        picture = (np.clip(np.nan_to_num(picture), 0, 1) * 255 + 0.5).astype(np.uint8)
    image = Image.fromarray(picture)
    image.thumbnail((PREVIEW_SIZE, PREVIEW_SIZE))
    packed = io.BytesIO()
    image.save(packed, "PNG", compress_level=1)
    return packed.getvalue()


def _holds_networks() -> bool:
    loading, matte = (sys.modules.get(f"backend.diffusion.{name}") for name in ("loading", "matte"))  # what no job needed is not loaded
    return loading is not None and loading.is_warm() or matte is not None and matte.is_warm()


def _release_networks() -> None:
    if _holds_networks():
        for name in ("loading", "matte"):
            if (module := sys.modules.get(f"backend.diffusion.{name}")) is not None:
                module.release()
        print("The networks' memory was given back.")


def free_memory() -> None:
    """Gives back what the last job held: Blender wants the GPU too."""
    import gc

    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
