"""Gaussians that move: one set of them, and what changes about each from moment to moment."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from .model import Splats
from .motion import product


@dataclass(frozen=True)
class SplatSequence:
    """N Gaussians at T moments, unit frame, float32. The same splat is the same point of the subject at every moment.

    splats: the canonical ones. means: their places at each moment. turns: unit quaternions, w first, by which each has turned from its
    canonical rotation. What follows is added to the canonical values and None where it does not change: log_scales, opacity_logits, and
    colors, to the constant spherical harmonic.
    """

    splats: Splats
    means: Float[np.ndarray, "t n 3"]
    turns: Float[np.ndarray, "t n 4"]
    log_scales: Float[np.ndarray, "t n 3"] | None = None
    opacity_logits: Float[np.ndarray, "t n"] | None = None
    colors: Float[np.ndarray, "t n 3"] | None = None

    def __len__(self) -> int:
        return len(self.means)

    def at(self, moment: int) -> Splats:
        """The Gaussians of one moment."""
        still = self.splats
        sh = still.sh
        if self.colors is not None:
            sh = sh.copy()
            sh[:, 0] += self.colors[moment]
        return replace(
            still,
            means=self.means[moment],
            quaternions=product(self.turns[moment], still.quaternions).astype(np.float32),
            log_scales=still.log_scales if self.log_scales is None else still.log_scales + self.log_scales[moment],
            opacity_logits=still.opacity_logits if self.opacity_logits is None else still.opacity_logits + self.opacity_logits[moment],
            sh=sh,
        )
