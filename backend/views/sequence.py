"""Pictures of one moving subject: some cameras at every frame, loaded from the same layout as still views (SPEC.md, "Motion")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from .views import Views


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
