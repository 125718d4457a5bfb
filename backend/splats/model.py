"""The Gaussian model itself: plain arrays, in the conventions of 3D Gaussian Splatting (Kerbl et al. 2023) and of gsplat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

SH_C0 = 0.28209479177387814  # the constant spherical harmonic: colour = 0.5 + SH_C0 * sh[:, 0]


@dataclass(frozen=True)
class Splats:
    """N Gaussians in the unit frame (views/views.py), float32.

    Standard deviations are exp(log_scales) along the axes of the quaternion (w first, not necessarily unit length); opacity is
    sigmoid(opacity_logits); colour (sRGB) is 0.5 + the spherical harmonics `sh` with K = (degree + 1)^2 in the viewing direction, clamped
    at 0.
    """

    means: Float[np.ndarray, "n 3"]
    quaternions: Float[np.ndarray, "n 4"]
    log_scales: Float[np.ndarray, "n 3"]
    opacity_logits: Float[np.ndarray, "n"]
    sh: Float[np.ndarray, "n k 3"]

    def __len__(self) -> int:
        return len(self.means)
