"""An item on its way through a batch, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from backend.batch.items import Folder
from backend.batch.manifest import Item
from protocol import estimates
from protocol.errors import KilnError

OVER = ("done", "failed", "cancelled")


@dataclass
class Work:
    """`state`: waiting, capturing, queued, computing, done, failed, cancelled."""

    item: Item
    folder: Folder
    state: str = "waiting"
    fingerprint: str = ""
    stage: str = ""
    fraction: float = 0.0  # of the stage
    text: str = ""
    attempts: int = 0
    error: KilnError | None = None
    warnings: list[str] = field(default_factory=list)  # somebody should look
    notes: list[str] = field(default_factory=list)  # what the job said, and how it got its name
    seconds: dict[str, float] = field(default_factory=dict)  # capture, queue, compute
    figures: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Path] | None = None  # once captured
    values: dict[str, Any] = field(default_factory=dict)  # as captured
    source: dict[str, Any] = field(default_factory=dict)  # where it stands, for who imports the result
    job: str = ""  # the engine's id, once submitted
    submitted: float = 0.0  # time.monotonic
    begun: float = 0.0
    record: dict[str, Any] | None = None  # item.json, once the results are there
    is_old: bool = False  # finished by an earlier run
    left_out: bool = False  # by the command line

    def at(self, state: str, stage: str = "", fraction: float = 0.0, text: str = "") -> None:
        self.state, self.stage, self.fraction, self.text = state, stage, fraction, text

    def leave_out(self, option: str) -> None:
        self.left_out, self.text = True, f"left out by {option}"

    def add(self, texts: Iterable[str], kind: str = "warnings") -> None:
        found: list[str] = getattr(self, kind)
        found += [text for text in dict.fromkeys(texts) if text and text not in found]

    @cached_property
    def cost(self) -> tuple[float, float]:
        """What the cost model says of its capture and its job, seconds on two cores; (1, 1) for recipes that it does not know."""
        try:
            parts = (of(self.item.recipe, self.item.values) for of in (estimates.blender_seconds, estimates.backend_seconds))
            in_blender, computing = (max(part, 1e-3) for part in parts)
        except (KeyError, KilnError):
            return 1.0, 1.0
        return in_blender, computing

    @property
    def memory(self) -> float:
        """Bytes that a worker takes for it at most; 0 for recipes that the cost model does not know."""
        try:
            return estimates.peak_bytes(self.item.recipe, self.item.values)
        except (KeyError, KilnError):
            return 0.0

    def told(self) -> dict[str, Any]:
        """Its entry in report.json."""
        return {
            "name": self.item.name, "file": str(self.item.file), "object": (self.item.subject or {}).get("name", ""),
            "recipe": self.item.recipe, "preset": self.item.preset, "state": self.state, "stage": self.stage,
            "fraction": round(self.fraction, 3), "text": self.text, "attempts": self.attempts,
            "error": self.error.to_wire() if self.error else None, "warnings": self.warnings, "notes": self.notes,
            "folder": str(self.folder.results), "seconds": self.seconds, "figures": self.figures, "earlier": self.is_old,
        }  # fmt: skip


def seconds_left(works: list[Work], captures: int, slots: int) -> float | None:
    """What finished items took, over what the cost model says of them, tells of the others: those of the same recipe and preset where
    there are any, else all. None before the first has finished.

    Captures and jobs run side by side, `captures` and `slots` at once, so the longer of the two queues counts.
    """
    ratios: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for work in works:
        if work.state == "done" and work.seconds.get("compute"):
            ratio = (work.seconds.get("capture", 0.0) / work.cost[0], work.seconds["compute"] / work.cost[1])
            for key in ((work.item.recipe, work.item.preset), ("", "")):
                ratios.setdefault(key, []).append(ratio)
    if not ratios:
        return None
    means = {key: [sum(column) / len(found) for column in zip(*found)] for key, found in ratios.items()}
    in_blender = computing = 0.0
    for work in works:
        if work.state in OVER or work.left_out:
            continue
        capture_ratio, compute_ratio = means.get((work.item.recipe, work.item.preset), means["", ""])
        if work.state in ("waiting", "capturing") and work.item.kind == "model":
            in_blender += work.cost[0] * capture_ratio * (1 - (work.state == "capturing") * work.fraction)
        begun = time.monotonic() - work.begun if work.state == "computing" and work.begun else 0.0
        computing += max(work.cost[1] * compute_ratio - begun, 0.0)
    return round(max(in_blender / captures, computing / slots), 1)
