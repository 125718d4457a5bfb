"""A recipe for the tests of jobs and workers: three stages that take as long, and go as wrong, as its parameters say.

Tests name this module in KILN_PIPELINES, so server and worker import it like any recipe kept outside the repository.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from backend.pipelines import PIPELINES
from backend.pipelines.run import Run
from backend.progress import Progress, silent
from protocol import recipes
from protocol.errors import KilnError

FAULTS = ("none", "stuck", "stop", "memory", "exception", "refuse", "exit", "kill", "full")


@dataclass(frozen=True)
class Steps:
    """Noise, scaled, summed."""

    NAME: ClassVar[str] = "steps"
    TITLE: ClassVar[str] = "Steps"
    INPUT: ClassVar[str] = "files"
    WEIGHTS: ClassVar[tuple[str, ...]] = ()
    PRESETS: ClassVar[dict] = {"draft": {"size": 10}, "standard": {}}

    size: int = field(default=1000, metadata=dict(help="Numbers.", low=1, high=100_000_000))
    factor: float = field(default=2.0, metadata=dict(help="Of the second stage.", low=0.0, high=1e9))
    seconds: float = field(default=0.0, metadata=dict(help="Of each stage.", low=0.0, high=1e9))
    fault: str = field(default="none", metadata=dict(help="Of the second stage.", options=tuple((name, name) for name in FAULTS)))
    seed: int = field(default=0, metadata=dict(help="Of the noise.", low=0, high=1e9))


@dataclass
class Sum:
    total: float
    report: dict

    def save(self, folder: Path) -> None:
        (folder / "sum.txt").write_text(f"{self.total!r}\n")
        (folder / "more").mkdir()
        (folder / "more" / "stages.txt").write_text(",".join(self.report["cached_stages"]))


def draw(text: bytes, size: int, seed: int, seconds: float, progress: Progress = silent) -> np.ndarray:
    work(seconds, progress)
    return np.random.default_rng([seed, *text]).random(size)


def scale(numbers: np.ndarray, factor: float, fault: str, seconds: float, marks: str, progress: Progress = silent) -> np.ndarray:
    with open(marks, "a") as file:
        file.write("scale\n")
    work(seconds, progress)
    if fault == "stuck":
        while True:
            time.sleep(0.1)
    if fault == "stop":
        os.kill(os.getpid(), 19)  # SIGSTOP: not even the heartbeat goes on
    if fault == "memory":
        raise MemoryError("Unable to allocate 90 TiB")
    if fault == "exception":
        raise ZeroDivisionError("of all things")
    if fault == "refuse":
        raise KilnError("bad-input", "These numbers are no good.", "Give better ones.")
    if fault == "exit":
        os._exit(3)
    if fault == "kill":
        os.kill(os.getpid(), 9)
    if fault == "full":
        raise OSError(28, "No space left on device")
    return numbers * factor


def add(numbers: np.ndarray, seconds: float, progress: Progress = silent) -> float:
    work(seconds, progress)
    return float(numbers.sum())


def work(seconds: float, progress: Progress) -> None:
    start = time.monotonic()
    while (passed := time.monotonic() - start) < seconds:
        progress(passed / seconds, f"{passed:.1f} s", preview=np.full((600, 900, 3), passed / seconds, np.float32))
        time.sleep(0.02)


def steps(run: Run, folder: Path, p: Steps) -> Sum:
    marks = os.environ["KILN_TEST_MARKS"]  # a line for each time that the second stage really runs
    numbers = run.stage("Draw", draw, (folder / "in" / "text.txt").read_bytes(), p.size, p.seed, p.seconds)
    scaled = run.stage("Scale", scale, numbers, p.factor, p.fault, p.seconds, marks)
    total = run.stage("Add", add, scaled, p.seconds)
    return Sum(total, run.report(p))


recipes.RECIPES["steps"] = Steps
PIPELINES["steps"] = ("tests.backend.steps_recipe", "steps")
