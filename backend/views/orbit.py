"""Cameras of a turntable: one height, one lens, one direction for each view, around a subject whose front faces -Y."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from .cameras import Camera, look_at


@dataclass(frozen=True)
class Orbit:
    """K cameras that look at the origin of the unit frame.

    azimuths: degrees; 0 looks from -Y, where the input picture is taken, 90 from +X. elevation: degrees above the equator. fov: degrees, of
    the whole square picture. distance: of every eye from the origin, in the unit frame.
    """

    azimuths: Float[np.ndarray, "k"]
    elevation: float
    fov: float
    distance: float

    @staticmethod
    def turn(views: int, elevation: float, fov: float) -> Orbit:
        """`views` equal steps of a whole turn, at the distance from which a picture just holds the unit sphere."""
        return Orbit(np.arange(views) * 360.0 / views, elevation, fov, 1 / math.sin(math.radians(fov) / 2))

    def cameras(self, size: int) -> list[Camera]:
        """Square cameras of `size` pixels."""
        height, out = math.sin(math.radians(self.elevation)), math.cos(math.radians(self.elevation))
        eyes = [
            self.distance * np.array([out * math.sin(turn), -out * math.cos(turn), height]) for turn in np.radians(self.azimuths).tolist()
        ]
        return [look_at(eye, (0, 0, 0), size, math.radians(self.fov)) for eye in eyes]
