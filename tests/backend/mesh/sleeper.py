"""Work for test_own_process.py that never ends, or whose answer a small disk does not hold: `python -m tests.backend.mesh.sleeper`."""

import os
import sys
import time
from pathlib import Path

import numpy as np

from backend.mesh.own_process import answer, in_own_process


def sleep(mark) -> dict:
    if str(mark) == "large":
        return {"zeros": np.zeros(50_000_000, np.uint8)}
    Path(str(mark)).write_text(str(os.getpid()))
    while True:
        time.sleep(1)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        answer(sleep)
    else:
        in_own_process("tests.backend.mesh.sleeper", {"mark": sys.argv[1]}, 1.0, "Sleeping", "", lambda done: None)
