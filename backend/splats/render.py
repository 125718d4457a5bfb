"""Pictures of splats for people, for scoring and for finding the surface; fitting has its own loop around the same kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from backend.views.cameras import Camera
from protocol.errors import KilnError

from .model import Splats
from .raster_cpu import Rasteriser, pack

MEDIAN = 0.5  # transmittance at which a ray has met the surface


@dataclass(frozen=True)
class Rendering:
    """color: sRGB, composed on the background. alpha: opacity. depth: where transmittance falls to one half, along the camera's axis in the
    splats' units; 0 where it never does. It is taken on the Gaussian that brings the fall, where the pixel's ray meets its plane, not at
    its centre (Zhang et al. 2024, RaDe-GS, section 4). The median stays on one surface at a silhouette, where a mean would lie between two
    (Huang et al. 2024, 2DGS, section 5)."""

    color: Float[np.ndarray, "h w 3"]  # float32
    alpha: Float[np.ndarray, "h w"]
    depth: Float[np.ndarray, "h w"]


def render(splats: Splats, camera: Camera, background: tuple[float, float, float] = (0.0, 0.0, 0.0), crossing: float = MEDIAN) -> Rendering:
    """The splats as `camera` sees them. `crossing`: the transmittance at which depth is taken, if not one half."""
    if camera.width < 1 or camera.height < 1 or camera.width * camera.height > 2**28:
        raise KilnError("bad-input", f"No picture can have {camera.width} x {camera.height} pixels.", "Ask for 1 to 16384 a side.")
    rasteriser = Rasteriser()
    rasteriser.project(pack(splats), len(splats), camera)
    planes = rasteriser.cropped(rasteriser.compose(crossing))
    depth = rasteriser.cropped(rasteriser.crossed)[0]
    alpha = np.minimum(planes[4], 1)
    color = np.moveaxis(planes[:3], 0, -1) + (1 - alpha[..., None]) * np.asarray(background, np.float32)
    return Rendering(np.ascontiguousarray(color), alpha.copy(), depth.copy())
