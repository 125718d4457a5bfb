"""How well silhouettes of a turntable fit together if its cameras stood at a given height and turned a given way: their visual hull
(Laurentini 1994) should fill them. From a wrong height it cannot, nor if the turn goes the other way, except with subjects that look the
same all around. Needs nothing but silhouettes."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from numba import njit

CELLS, BINS = 32, 32  # along each side: of the hull, and of the silhouettes that it is to fill


def unexplained(
    cover: Float[np.ndarray, "k s s"], azimuths: Float[np.ndarray, "k"], elevations: Float[np.ndarray, "e"], fov: float
) -> Float[np.ndarray, "e"]:
    """For each elevation, which share of the silhouettes no part of the hull lies behind, softly: 0 where all fits, up to 1. Degrees.

    cover: coverage of square pictures whose middle the subject's axis is in, a multiple of 32 pixels a side. Cameras as
    `orbit.Orbit` places them, at the distance from which a picture just holds the unit sphere.
    """
    half = math.radians(fov) / 2
    return _unexplained(
        np.ascontiguousarray(cover, np.float32), np.radians(np.asarray(azimuths, float)), np.radians(np.asarray(elevations, float)),
        math.tan(half), 1 / math.sin(half),
    )  # fmt: skip


@njit(nogil=True, cache=True, error_model="numpy")
def _unexplained(cover, azimuths, elevations, half, distance):
    views, size = cover.shape[0], cover.shape[1]
    points, count = np.empty((CELLS**3, 3)), 0
    for i in range(CELLS**3):
        x = (i // CELLS**2 + 0.5) / CELLS * 2 - 1
        y = (i // CELLS % CELLS + 0.5) / CELLS * 2 - 1
        z = (i % CELLS + 0.5) / CELLS * 2 - 1
        if x * x + y * y + z * z < 1:
            points[count, 0], points[count, 1], points[count, 2] = x, y, z
            count += 1
    step = size // BINS
    full = np.zeros((views, BINS * BINS), np.bool_)  # places of the silhouettes that are to be filled
    for view in range(views):
        for row in range(BINS):
            for column in range(BINS):
                total = 0.0
                for pixel in range(step * step):
                    total += cover[view, row * step + pixel // step, column * step + pixel % step]
                full[view, row * BINS + column] = total > 0.9 * step * step
    found, place = np.zeros(len(elevations)), np.empty((views, count), np.int32)
    votes, best = np.empty(count), np.empty(BINS * BINS)
    for number in range(len(elevations)):
        sine, cosine = math.sin(elevations[number]), math.cos(elevations[number])
        votes[:] = 0
        for view in range(views):
            s, c = math.sin(azimuths[view]), math.cos(azimuths[view])
            for p in range(count):
                x, y, z = points[p]
                near = x * s - y * c  # towards the camera, along the ground
                depth = (distance - near * cosine - z * sine) * half
                across, down = 0.5 + 0.5 * (x * c + y * s) / depth, 0.5 - 0.5 * (z * cosine - near * sine) / depth
                if 0 <= across < 1 and 0 <= down < 1:
                    votes[p] += cover[view, int(down * size), int(across * size)]
                    place[view, p] = int(down * BINS) * BINS + int(across * BINS)
                else:
                    place[view, p] = -1
        missing, whole = 0.0, 0
        for view in range(views):
            best[:] = 0
            for p in range(count):
                if place[view, p] >= 0 and votes[p] > best[place[view, p]]:
                    best[place[view, p]] = votes[p]
            for q in range(BINS * BINS):
                if full[view, q]:
                    whole += 1
                    missing += 1 - best[q] / views
        found[number] = missing / max(whole, 1)
    return found
