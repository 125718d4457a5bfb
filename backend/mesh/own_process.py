"""Work of libraries that hold the GIL or cannot be stopped, in a process of its own: this one stays alive to report and to be cancelled.

A module that works so ends with `if __name__ == "__main__": answer(function)`, where the function takes the given arrays by their names and
returns a map of arrays.
"""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from backend import disk
from backend.progress import Progress
from protocol.errors import KilnError

FULL = 28  # exit status of one whose disk is full


def in_own_process(module: str, given: dict[str, Any], seconds: float, what: str, hint: str, progress: Progress) -> dict[str, np.ndarray]:
    """What `module`'s function answers. seconds: that it takes, about, for the progress alone. Raises `KilnError("internal")` that begins
    with `what` and ends with the process' last words."""
    with tempfile.TemporaryDirectory(prefix="kiln-") as folder:
        told, answered, said = Path(folder, "given.npz"), Path(folder, "answer.npz"), Path(folder, "said.txt")
        np.savez(told, **given)
        with said.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(told), str(answered), str(os.getpid())],
                cwd=Path(__file__).parents[2],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),  # Windows: no console flashes up
            )
            started = time.monotonic()
            try:
                while process.poll() is None:
                    progress(1 - math.exp(-(time.monotonic() - started) / seconds))
                    try:
                        process.wait(0.3)
                    except subprocess.TimeoutExpired:
                        pass
            finally:  # also when `progress` raised Cancelled
                if process.poll() is None:
                    process.kill()
                process.wait()
        if process.returncode == FULL:
            raise disk.no_space(Path(folder))
        if process.returncode != 0:
            last = said.read_text(errors="replace").strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
            raise KilnError("internal", f"{what} failed: {last[0]}.", hint)
        with np.load(answered, allow_pickle=False) as arrays:
            return dict(arrays)


def answer(function: Callable[..., dict[str, Any]]) -> None:
    """What the process does. It ends with the one that started it."""
    _end_with(int(sys.argv[3]))
    with np.load(sys.argv[1], allow_pickle=False) as arrays:
        found = function(**arrays)
    try:
        np.savez(sys.argv[2], **found)
    except OSError as error:
        if disk.is_full(error):
            sys.exit(FULL)
        raise


def _end_with(parent: int) -> None:
    if sys.platform == "linux":  # by the kernel: a library that holds the GIL lets no thread look
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    if hasattr(os, "getppid") and sys.platform != "win32":

        def watch() -> None:
            while os.getppid() == parent:
                time.sleep(1.0)
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
