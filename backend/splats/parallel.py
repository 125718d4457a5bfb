"""Compiles kernels and runs them on every core.

Threads of `run` are Python's own and kernels drop the GIL: no OpenMP that would fight torch's for the cores, no threading layer that aborts
when two threads call it, the same on every platform. A kernel takes its next piece of work from a shared counter, so whichever thread is
free goes on, and what it computes does not depend on who computes it.

Compiled code is kept per user and per version of the kernels' source: in NUMBA_CACHE_DIR if set, else the user's cache folder, else (a
read-only home) a temporary folder.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numba
import numpy as np

THREADS = numba.config.NUMBA_NUM_THREADS  # the cores this process may use; the environment variable of that name overrides


@cache
def _cache_folder(room: Path) -> Path:
    """Numba knows a cached kernel by its own file's date, not by what it calls, so every state of the sources gets a folder of its own.

    A room is a folder of sources; kernels call kernels of their own room alone.
    """
    sources = hashlib.sha256(numba.__version__.encode())
    for path in sorted(room.glob("*.py")):
        source = path.read_bytes()
        if any(mark in source for mark in (b"@kernel", b"@parallel_kernel", b"@intrinsic")):
            sources.update(source)
    name = f"kernels-{sources.hexdigest()[:16]}"
    if numba.config.CACHE_DIR:
        homes = [Path(numba.config.CACHE_DIR)]
    elif sys.platform == "win32":
        homes = [Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "kiln"]
    elif sys.platform == "darwin":
        homes = [Path.home() / "Library/Caches/kiln"]
    else:
        homes = [Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kiln"]
    for home in homes:
        try:
            (home / name).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=home / name):
                return home / name
        except OSError:
            continue
    return Path(tempfile.mkdtemp(prefix="kiln-"))


_FOLDER = str(_cache_folder(Path(__file__).parent))


def kernel(function, parallel: bool = False):
    """Compiles `function` on first use: no GIL, no checks of indices and divisions, kept on disk. `parallel`: numba's prange."""
    folder = str(_cache_folder(Path(function.__code__.co_filename).parent))
    elsewhere, numba.config.CACHE_DIR = numba.config.CACHE_DIR, folder
    try:
        return numba.njit(function, nogil=True, cache=True, error_model="numpy", boundscheck=False, parallel=parallel)
    finally:
        numba.config.CACHE_DIR = elsewhere


def parallel_kernel(function):
    """A `kernel` whose `prange` loops numba spreads over the cores, with numba's own threads: call it from one thread at a time."""
    return kernel(function, parallel=True)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="kernel")


def run(threads: int, worker, *arguments) -> None:
    """Calls `worker(counter, *arguments)` on `threads` threads at once; `counter` is a fresh int64 array [0] for `simd.take`."""
    counter = np.zeros(1, np.int64)
    others = [_pool(threads).submit(worker, counter, *arguments) for _ in range(threads - 1)]
    worker(counter, *arguments)
    for other in others:
        if not other.cancel():  # one that has not begun finds nothing left to do
            other.result()
