"""A recipe whose job says whether a network was in memory when it began, and leaves one there. Tests name this module in KILN_PIPELINES."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from backend.diffusion import loading
from backend.pipelines import PIPELINES
from backend.pipelines.run import Run
from protocol import recipes


@dataclass(frozen=True)
class Held:
    NAME: ClassVar[str] = "held"
    TITLE: ClassVar[str] = "Held"
    INPUT: ClassVar[str] = "files"
    WEIGHTS: ClassVar[tuple[str, ...]] = ()
    PRESETS: ClassVar[dict] = {"standard": {}}


@dataclass
class Found:
    warm: bool
    model: str = "held"

    def save(self, folder: Path) -> None:
        (folder / ("warm" if self.warm else "cold")).write_text("")


def held(run: Run, folder: Path, p: Held) -> Found:
    found = Found(loading.is_warm())
    loading._warm = found  # what stands for a network here; real ones are in test_loading.py
    return found


if "held_recipe" in os.environ.get("KILN_PIPELINES", ""):  # a worker of these tests, not the tests themselves
    recipes.RECIPES["held"] = Held
    PIPELINES.clear()  # nothing else to warm up
    PIPELINES["held"] = ("tests.backend.diffusion.held_recipe", "held")
