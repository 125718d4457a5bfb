"""Views of a coloured ball, computed from its equation: something to reconstruct where no input is at hand."""

from __future__ import annotations

import math

import numpy as np

from .cameras import around
from .views import Frame, Views

FIELD_OF_VIEW = math.radians(40)


def ball(size: int, count: int, radius: float = 0.7) -> Views:
    """`count` views of `size` pixels all around a ball at the origin, with exact depth and normals; every seventh is held out."""
    cameras = around(count, size, FIELD_OF_VIEW)
    eyes = np.stack([camera.centre for camera in cameras])
    rays = np.stack([camera.unproject(np.ones((size, size))) - camera.centre for camera in cameras])  # depth 1, so lengths are depths
    along, squared = np.einsum("vhwc,vc->vhw", rays, eyes), (rays * rays).sum(-1)
    inside = along**2 - squared * ((eyes**2).sum(1)[:, None, None] - radius**2)
    hit = inside > 0
    depth = np.where(hit, (-along - np.sqrt(np.maximum(inside, 0))) / squared, 0)
    points = eyes[:, None, None] + rays * depth[..., None]
    return Views(
        cameras=cameras,
        images=np.where(hit[..., None], 0.5 + 0.4 * np.sin(6 * points), 0).astype(np.float32),
        alpha=hit.astype(np.float32),
        depth=depth.astype(np.float32),
        normals=np.where(hit[..., None], points / radius, 0).astype(np.float32),
        holdout=np.arange(count) % 7 == 3,
        frame=Frame(np.zeros(3), 1.0),
    )
