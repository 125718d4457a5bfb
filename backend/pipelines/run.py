"""`Run`: the only thing a pipeline knows of the outside. It names steps, reports, stops a cancelled job, and keeps finished stages.

A stage's result is stored under the SHA-256 of what determines it: the function, the source code of this package, the inputs. A job that is
run again, after a crash or with a later parameter changed, finds what has not changed. Files hold arrays, numbers, text and this package's
dataclasses, never code, and a checksum: a truncated or damaged one is computed again.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import math
import os
import platform
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from jaxtyping import Float

from backend import disk
from protocol import VERSION, recipes
from protocol.errors import Cancelled, KilnError

MOST_BYTES = 20_000_000_000  # of finished stages on disk; the least recently used go first
_MAGIC = b"KILNSTAGE1"
_ALIGNMENT = 64


class Run:
    """One run of a pipeline.

    stages: folder of finished stages, shared by all jobs; None computes everything and keeps nothing. report: called with a map, `kind`
    stage (name `stage`, its `index`, and whether it was `cached`), progress (`fraction` of the stage, `text`, `preview`: a picture as in
    backend/progress.py or None) or log (`text`). cancelled: asked at each report; true raises `Cancelled` there. title: what the job is
    called.
    """

    def __init__(
        self,
        stages: Path | None = None,
        report: Callable[[dict[str, Any]], None] = lambda event: None,
        cancelled: Callable[[], bool] = lambda: False,
        most_bytes: int = MOST_BYTES,
        title: str = "",
    ):
        self.stages, self.most_bytes, self.title = stages, most_bytes, title
        self.seconds: dict[str, float] = {}  # of computing each stage, also where this run found it finished
        self.cached: list[str] = []  # the stages that this run found finished
        self._report, self._cancelled = report, cancelled
        self._index = 0
        self._started = time.time()
        with contextlib.suppress(OSError):  # Linux: an earlier job of this process does not count
            Path("/proc/self/clear_refs").write_text("5")
        self._fingerprints: dict[int, tuple[Any, bytes]] = {}

    def stage(self, name: str, function: Callable, *inputs: Any) -> Any:
        """`function(*inputs)`, or its stored result. A function that takes `progress` gets this run's."""
        path = None if self.stages is None else self._file(function, inputs)
        found = None if path is None else _load(path)
        self.begin(name, cached=found is not None)
        if found is not None:
            result, seconds = found
            self.cached.append(name)
        else:
            extra = {"progress": self.progress} if "progress" in inspect.signature(function).parameters else {}
            start = time.perf_counter()
            result = function(*inputs, **extra)
            seconds = time.perf_counter() - start
            if path is not None:
                self._keep(path, name, result, seconds)
        self.seconds[name] = round(self.seconds.get(name, 0.0) + seconds, 3)
        self.progress(1.0)
        return result

    def begin(self, name: str, cached: bool = False) -> None:
        """Names a step that is not worth keeping: reports from here on belong to it."""
        self._stop_if_cancelled()
        self._report({"kind": "stage", "stage": name, "index": self._index, "cached": cached})
        self._index += 1

    def progress(self, fraction: float, text: str = "", preview: Float[np.ndarray, "h w 3"] | None = None) -> None:
        """Reports how far the current stage is. Raises `Cancelled` once the job is cancelled."""
        self._stop_if_cancelled()
        fraction = min(max(float(fraction), 0.0), 1.0) if math.isfinite(fraction) else 0.0
        self._report({"kind": "progress", "fraction": fraction, "text": text, "preview": preview})

    def log(self, text: str) -> None:
        """A line for the job's log: what a person may want to read afterwards."""
        self._report({"kind": "log", "text": text})

    def report(self, recipe: Any) -> dict[str, Any]:
        """What every report.json says of its run: recipe, parameters, versions, seconds a stage, which stages were found finished, and the
        most memory that the process has held (bytes)."""
        return {
            "recipe": type(recipe).NAME,
            "parameters": recipes.values(recipe),
            "versions": versions(),
            "seconds": dict(self.seconds),
            "cached_stages": list(self.cached),
            "peak_memory": peak_memory(),
        }

    def _stop_if_cancelled(self) -> None:
        if self._cancelled():
            raise Cancelled

    # -- Finished stages ----------------------------------------------------------------------------------------------------------

    def _file(self, function: Callable, inputs: tuple) -> Path:
        digest = hashlib.sha256()
        for part in (f"{function.__module__}.{function.__qualname__}", VERSION, _source(function.__module__)):
            digest.update(part.encode() + b"\0")
        for given in inputs:
            digest.update(self._fingerprint(given))
        return self.stages / f"{digest.hexdigest()}.stage"

    def _fingerprint(self, given: Any) -> bytes:
        # Stages never change their inputs, so the same object need not be read again; views can be gigabytes.
        if id(given) not in self._fingerprints:
            digest = hashlib.sha256()
            _feed(digest, given)
            if not dataclasses.is_dataclass(given):
                return digest.digest()
            self._fingerprints[id(given)] = (given, digest.digest())
        return self._fingerprints[id(given)][1]

    def _keep(self, path: Path, name: str, result: Any, seconds: float) -> None:
        chunks = pack({"result": result, "seconds": seconds})
        size = sum(len(chunk) for chunk in chunks)
        if size > self.most_bytes:
            return
        self.stages.mkdir(parents=True, exist_ok=True)
        self._make_room(size)
        try:
            disk.write(path, chunks, self.stages, durable=False)  # what a power cut damages is computed again
        except KilnError as error:  # the results may still fit, and then a job that has come this far is done
            self.log(f"{name!r} is not kept for a later run. {error}")

    def _make_room(self, size: int) -> None:
        """Removes the least recently used stages until `size` more bytes are within the limit and, if that can be, on the disk."""
        entries = []
        for path in self.stages.iterdir():
            with contextlib.suppress(FileNotFoundError):
                entry = path.stat()
                if path.suffix == ".stage":
                    entries.append((entry.st_mtime, entry.st_size, path))
                elif time.time() - entry.st_mtime > 3600:
                    path.unlink(missing_ok=True)  # half written by a worker that was killed
        total = sum(entry_size for _, entry_size, _ in entries)
        free = shutil.disk_usage(self.stages).free
        wanted = 2 * size if 2 * size <= free + total else 0  # room for the results too
        for used, entry_size, path in sorted(entries):
            if total + size <= self.most_bytes and (free >= wanted or used >= self._started):
                break
            with contextlib.suppress(OSError):  # another worker removed it, or reads it on Windows
                path.unlink()
                total, free = total - entry_size, free + entry_size


def _load(path: Path) -> tuple[Any, float] | None:
    """A stored result and its seconds, or None where there is none that can be trusted."""
    try:
        content = bytearray(path.stat().st_size)  # a bytearray, so that the arrays can be written to like fresh ones
        with open(path, "rb") as file:
            file.readinto(content)
        stored = unpack(content)
        os.utime(path)
        return stored["result"], stored["seconds"]
    except FileNotFoundError:
        return None
    except (ValueError, OSError):
        path.unlink(missing_ok=True)
        return None


@functools.cache
def _source(module: str) -> str:
    """A hash of this package's source and weights and of `module`'s: a changed step must not find what the old one made."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    files = sorted(path for kind in ("*.py", "*.toml", "*.safetensors") for path in root.rglob(kind))
    if not module.startswith("backend."):
        files += [Path(found)] if (found := inspect.getsourcefile(importlib.import_module(module))) else []
    for path in files:
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def peak_memory() -> int | None:
    """Bytes of memory that this process has held at most; None where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        counters = (ctypes.c_size_t * 9)()  # PROCESS_MEMORY_COUNTERS: two 32-bit numbers, then sizes; the second of these is the peak
        handle = ctypes.c_void_p(ctypes.windll.kernel32.GetCurrentProcess())
        told = ctypes.windll.kernel32.K32GetProcessMemoryInfo(handle, ctypes.byref(counters), ctypes.sizeof(counters))
        return counters[1] if told else None
    import resource  # no such module on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@functools.cache
def versions() -> dict[str, str]:
    """Of Kiln, Python and the libraries that figures depend on."""
    found = {"kiln": VERSION, "python": platform.python_version()}
    for name in ("numpy", "scipy", "numba", "torch", "gsplat", "warp-lang", "diffusers", "transformers", "scikit-image", "xatlas", "coacd"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _feed(digest: Any, given: Any) -> None:
    """Feeds a value into a hash so that different values, types and structures differ. A path counts with the content behind it."""

    def tag(letter: str, content: bytes = b"") -> None:
        digest.update(letter.encode() + struct.pack("<q", len(content)) + content)

    if given is None or isinstance(given, bool):
        tag("c", repr(given).encode())
    elif isinstance(given, (np.ndarray, np.generic)):
        _refuse_objects(given, "an input")
        tag("a", f"{given.dtype.str}{given.shape}".encode())
        digest.update(_bytes(given))
    elif isinstance(given, int):
        tag("i", str(given).encode())
    elif isinstance(given, float):
        tag("f", struct.pack("<d", given))
    elif isinstance(given, str):
        tag("s", given.encode())
    elif isinstance(given, bytes):
        tag("b", given)
    elif isinstance(given, (list, tuple)):
        tag("l" if isinstance(given, list) else "t", str(len(given)).encode())
        for item in given:
            _feed(digest, item)
    elif isinstance(given, dict):
        tag("d", str(len(given)).encode())
        for key, value in given.items():
            _feed(digest, key)
            _feed(digest, value)
    elif dataclasses.is_dataclass(given) and not isinstance(given, type):
        tag("o", f"{type(given).__module__}:{type(given).__qualname__}".encode())
        for entry in dataclasses.fields(given):
            tag("n", entry.name.encode())
            _feed(digest, getattr(given, entry.name))
    elif isinstance(given, Path):
        files = [given] if given.is_file() else sorted(path for path in given.rglob("*") if path.is_file())
        tag("p", str(len(files)).encode())
        for path in files:
            tag("n", path.relative_to(given).as_posix().encode())
            with open(path, "rb") as file:
                tag("h", hashlib.file_digest(file, "sha256").digest())
    else:
        raise TypeError(
            f"A stage cannot take {type(given).__qualname__}: give arrays, numbers, text, paths, lists, maps or dataclasses of them."
        )


# -- Values as files ------------------------------------------------------------------------------------------------------------------
# magic, SHA-256 of the rest, length of the outline, the outline in msgpack, then the arrays' bytes, each at a multiple of 64. In the
# outline a list stands for itself and everything else that msgpack lacks is a map with one key, "$...".


def pack(value: Any) -> list[bytes | memoryview]:
    """The chunks of a file that `unpack` reads. Raises TypeError that names what cannot be stored."""
    arrays: list[memoryview] = []
    offset = 0

    def outline(value: Any, where: str) -> Any:
        nonlocal offset
        if value is None or isinstance(value, (bool, float, str, bytes)) and not isinstance(value, np.generic):
            return value
        if isinstance(value, (np.ndarray, np.generic)):
            _refuse_objects(value, where)
            array = np.ascontiguousarray(value)
            start, offset = offset, offset + -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
            arrays.append(_bytes(array))
            return {"$array": [array.dtype.str, list(value.shape), start, isinstance(value, np.generic)]}
        if isinstance(value, int):
            return value if -(2**63) <= value < 2**63 else {"$int": str(value)}
        if isinstance(value, list):
            return [outline(item, f"{where}[{index}]") for index, item in enumerate(value)]
        if isinstance(value, tuple):
            return {"$tuple": [outline(item, f"{where}[{index}]") for index, item in enumerate(value)]}
        if isinstance(value, dict):
            return {"$map": [[outline(key, f"{where}, a key"), outline(item, f"{where}[{key!r}]")] for key, item in value.items()]}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            name = f"{type(value).__module__}:{type(value).__qualname__}"
            if _dataclass(name) is not type(value):
                raise TypeError(f"{where} is a {name}, which is not a module-level dataclass of backend or protocol.")
            fields = {entry.name: outline(getattr(value, entry.name), f"{where}.{entry.name}") for entry in dataclasses.fields(value)}
            return {"$dataclass": [name, fields]}
        raise TypeError(
            f"{where} is a {type(value).__qualname__}; a stage returns arrays, numbers, text, lists, maps or dataclasses of them."
        )

    head = msgpack.packb(outline(value, "the stage's result"))
    head = struct.pack("<q", len(head)) + head
    chunks: list[bytes | memoryview] = [head, bytes(-(len(_MAGIC) + 32 + len(head)) % _ALIGNMENT)]
    for array in arrays:
        chunks += [array, bytes(-len(array) % _ALIGNMENT)]
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return [_MAGIC, digest.digest(), *chunks]


def unpack(content: bytes | bytearray) -> Any:
    """The value of a packed file; ValueError if it is truncated, damaged or of another Kiln. Arrays look into `content`."""
    rest = memoryview(content)[len(_MAGIC) + 32 :]
    if content[: len(_MAGIC)] != _MAGIC or hashlib.sha256(rest).digest() != content[len(_MAGIC) : len(_MAGIC) + 32]:
        raise ValueError("not a whole stage file")
    (length,) = struct.unpack_from("<q", rest)
    start = len(_MAGIC) + 32 + 8 + length
    data = memoryview(content)[start + -start % _ALIGNMENT :]

    def value(outline: Any) -> Any:
        if isinstance(outline, list):
            return [value(item) for item in outline]
        if not isinstance(outline, dict):
            return outline
        ((kind, inner),) = outline.items()
        if kind == "$array":
            dtype, shape, offset, is_scalar = inner
            count = math.prod(shape)
            array = np.frombuffer(data, np.dtype(dtype), count, offset).reshape(shape) if count else np.zeros(shape, dtype)
            return array[()] if is_scalar else array
        if kind == "$int":
            return int(inner)
        if kind == "$tuple":
            return tuple(value(item) for item in inner)
        if kind == "$map":
            return {value(key): value(item) for key, item in inner}
        name, fields = inner
        kind_of = _dataclass(name)
        if kind_of is None or {entry.name for entry in dataclasses.fields(kind_of)} != set(fields):
            raise ValueError(f"{name} is not what it was")
        made: Any = object.__new__(kind_of)  # the values were checked when they were made, so no __init__ runs
        for field_name, item in fields.items():
            object.__setattr__(made, field_name, value(item))
        return made

    return value(msgpack.unpackb(rest[8 : 8 + length], strict_map_key=True))


def _dataclass(name: str) -> type | None:
    """The dataclass `module:Class` of this repository's own packages, else None: a stage file can name no other code."""
    module, _, qualname = name.partition(":")
    if module.partition(".")[0] not in ("backend", "protocol"):
        return None
    try:
        found = getattr(importlib.import_module(module), qualname, None)
    except ImportError:
        return None
    return found if isinstance(found, type) and dataclasses.is_dataclass(found) else None


def _bytes(array: np.ndarray | np.generic) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _refuse_objects(array: np.ndarray | np.generic, where: str) -> None:
    if array.dtype.hasobject or array.dtype.names:
        raise TypeError(f"{where} is an array of {array.dtype}; only plain numbers and text can be stored.")
