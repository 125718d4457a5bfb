"""Pictures of one moving subject: some cameras at every frame, loaded from the same layout as still views (SPEC.md, "Motion")."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from backend.progress import Progress, silent
from protocol.errors import KilnError
from protocol.views import MOST_MOVING_VIEWS

from .views import Entry, Views, check_silhouettes, in_unit_frame, read, read_table

LEAST_VIEWS = 3  # of a moment that may be fitted
CUT = 0.1  # share of the views whose edge the subject may touch
AROUND = 0.05  # of a moment's extent: how far around it its hull is looked for


@dataclass(frozen=True)
class ViewSequence:
    """V pictures of T moments. One unit frame holds the subject at all of them.

    views: all pictures; those that may be fitted first, held-out ones last, each in the order of time. time: which moment a view shows, 0
    to T - 1. frames: the timeline's frame number of each moment, rising. fps: timeline frames a second.
    """

    views: Views
    time: Int[np.ndarray, "v"]
    frames: Float[np.ndarray, "t"]
    fps: float

    def __len__(self) -> int:
        return len(self.frames)

    def at(self, moment: int) -> Views:
        """The views of one moment that may be fitted; their pictures are shared, not copied."""
        return self.views.subset((self.time == moment) & ~self.views.holdout)

    def scored_at(self, moment: int) -> Views:
        """The held-out views of one moment, perhaps none."""
        return self.views.subset((self.time == moment) & self.views.holdout)


def load(folder: Path, progress: Progress = silent) -> ViewSequence:
    """The views of `folder/transforms.json` in the order of time, or `KilnError("bad-input")` that names the file and what is wrong."""
    table, entries = read_table(folder, MOST_MOVING_VIEWS)
    fps = _number(table.get("fps"))
    if not fps > 0:
        raise KilnError("bad-input", "transforms.json does not say how many frames a second has.", "Give 'fps', a number above 0.")
    entries.sort(key=lambda entry: (entry.held_out, _frame(entry)))
    shown = np.array([_frame(entry) for entry in entries])
    frames, time = np.unique(shown, return_inverse=True)
    _refuse_too_little(entries, shown, frames)

    views = in_unit_frame(read(folder, table, entries, lambda fraction, text: progress(0.9 * fraction, text)))
    sequence = ViewSequence(views, time, frames, fps)
    for moment, frame in enumerate(frames):
        progress(0.9 + 0.1 * moment / len(frames), f"frame {frame:g}")
        _check_moment(sequence.at(moment), f"{frame:g}")
    _refuse_cut(sequence)
    return sequence


def _number(value: Any) -> float:
    """A finite number, or NaN."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else math.nan


def _frame(entry: Entry) -> float:
    number = _number(entry.values.get("frame"))
    if math.isnan(number):
        raise KilnError(
            "bad-input",
            f"{entry.where} does not say which frame it shows.",
            "Give each view its 'frame', a number of the timeline; views of what stands still are for the recipe reconstruct.",
        )
    return number


def _refuse_too_little(entries: list[Entry], shown: Float[np.ndarray, "v"], frames: Float[np.ndarray, "t"]) -> None:
    """Refuses what shows no motion, or shows it from too few sides, before any picture is read."""
    if len(frames) < 2:
        what = f"All views show frame {frames[0]:g}: nothing moves in it." if len(frames) else "There are no views."
        raise KilnError("bad-input", what, "Give views of at least 2 frames; what stands still is for the recipe reconstruct.")
    if len(entries) == len(frames):
        raise KilnError(
            "bad-input",
            "Each frame is seen by one camera only.",
            f"This recipe needs {LEAST_VIEWS} cameras or more at every frame; no recipe takes a video from one camera yet.",
        )
    fitted = Counter(frame for frame, entry in zip(shown, entries, strict=True) if not entry.held_out)
    for frame in frames:
        if fitted[frame] < LEAST_VIEWS:
            what = f"Frame {frame:g} has {fitted[frame]} views to fit."
            raise KilnError(
                "bad-input", what, f"Give at least {LEAST_VIEWS} from different sides at every frame, 6 or more for a good result."
            )
    if not all("geometry_file_path" in entry.values for entry in entries):
        where = next(entry.where for entry in entries if "geometry_file_path" not in entry.values)
        raise KilnError(
            "bad-input",
            f"{where} has no depth and normals, which motion is found by.",
            "Give every view a geometry_file_path (SPEC.md, Motion), or capture the subject with Kiln's extension.",
        )


def _check_moment(views: Views, frame: str) -> None:
    """Refuses a moment at which the subject is not there, or whose views do not show one subject."""
    seen = views.depth > 0
    if not seen.any() or float(views.alpha.max()) < 0.5:
        raise KilnError("bad-input", f"At frame {frame} all views are empty.", "Give frames at which the subject shows.")
    points = [camera.unproject(depth)[there] for camera, depth, there in zip(views.cameras, views.depth, seen, strict=True)]
    low, high = np.min([one.min(0) for one in points if len(one)], 0), np.max([one.max(0) for one in points if len(one)], 0)
    slack = AROUND * float((high - low).max()) + 1e-3
    check_silhouettes(views.cameras, views.alpha, low - slack, high + slack, f" of frame {frame}")


def _refuse_cut(sequence: ViewSequence) -> None:
    """Refuses a subject that leaves the pictures: what lies beyond their edges, nothing tells."""
    alpha = sequence.views.alpha
    edges = (alpha[:, [0, -1]].max((1, 2)) > 0.5) | (alpha[:, :, [0, -1]].max((1, 2)) > 0.5)
    if edges.mean() > CUT:
        first = sequence.frames[sequence.time[edges].min()]
        raise KilnError(
            "bad-input",
            f"The subject leaves the pictures: it reaches the edge of {int(edges.sum())} of {len(edges)} views, first at frame {first:g}.",
            "Let every camera see the whole subject at all frames.",
        )
