"""A recipe that takes a second and writes down how many threads its process may use."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from backend.pipelines import PIPELINES
from backend.pipelines.run import Run
from protocol import recipes


@dataclass(frozen=True)
class Cores:
    """Waits."""

    NAME: ClassVar[str] = "cores"
    TITLE: ClassVar[str] = "Cores"
    INPUT: ClassVar[str] = "files"
    WEIGHTS: ClassVar[tuple[str, ...]] = ()
    PRESETS: ClassVar[dict] = {"draft": {}, "standard": {}}

    seconds: float = field(default=1.0, metadata=dict(help="Waited.", low=0.0, high=1e9))


@dataclass
class Words:
    text: str

    def save(self, folder: Path) -> None:
        (folder / "threads.txt").write_text(self.text)


def cores(run: Run, folder: Path, p: Cores) -> Words:
    begun = time.time()
    while time.time() < begun + p.seconds:
        run.progress(0.5)
        time.sleep(0.02)
    names = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS")
    return Words(" ".join([str(begun), str(time.time()), *(os.environ.get(name, "-") for name in names)]))


recipes.RECIPES["cores"] = Cores
PIPELINES["cores"] = ("tests.backend.batch.cores_recipe", "cores")
