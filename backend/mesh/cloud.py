"""The points that the views' pixels show, with their normals: a pixel's centre is exact, and many views give more points than a grid has
cells. They say where a surface lies that is thinner than a cell or a pixel.

The surface is the zero of the weighted mean of the distances to the points' planes (implicit moving least squares: Kolluri 2005); points
whose normals differ, on another side of a thin part or beyond an edge, hardly count (Oeztireli et al. 2009, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numba import prange

from backend.splats.parallel import kernel, parallel_kernel
from backend.views.views import Views

REACH = 1.25  # units: how far the points around a place are; what is half as far counts a tenth
SAME_SIDE = 0.3  # cosine: points whose normal is further from a place's own do not count
LEAST = 1e-4  # weight of all points around a place, below which there are none
MOST = 4_000_000  # points that are kept: of more, every second or third and so on


@dataclass(frozen=True)
class Cloud:
    """n points in bins of REACH units, in the order of the bins. Lengths are units from the origin."""

    origin: Float[np.ndarray, "3"]
    unit: float
    points: Float[np.ndarray, "n 3"]
    normals: Float[np.ndarray, "n 3"]
    key: Int[np.ndarray, "n"]
    counts: Int[np.ndarray, "3"]  # bins along each axis, with an empty one at either end

    def around(
        self, places: Float[np.ndarray, "m 3"], directions: Float[np.ndarray, "m 3"]
    ) -> tuple[Float[np.ndarray, "m"], Float[np.ndarray, "m 3"]]:
        """How far outside the surface each place lies, and the surface's unit normal there: of the points that look to the same side as
        `directions`, of any length. Both 0 where there are none."""
        local = (np.asarray(places, np.float64) - self.origin) / self.unit
        distance, normal = _around(local, np.asarray(directions, np.float64), self.key, self.counts, self.points, self.normals)
        return distance * self.unit, normal


def cloud(points: Float[np.ndarray, "n 3"], normals: Float[np.ndarray, "n 3"], unit: float) -> Cloud:
    """unit: as far as one point speaks for the surface, the size of a cell or a pixel."""
    every = max(1, -(-len(points) // MOST))
    points, normals = points[::every], normals[::every]
    origin = points.min(0) - np.float32(REACH * unit)
    local = (points - origin) / np.float32(unit)
    place = np.floor(local / np.float32(REACH)).astype(np.int64)
    counts = place.max(0) + 2
    key = (place[:, 0] * counts[1] + place[:, 1]) * counts[2] + place[:, 2]
    order = np.argsort(key, kind="stable")
    return Cloud(origin.astype(np.float64), unit, local[order], np.ascontiguousarray(normals[order], np.float32), key[order], counts)


def surface_points(
    seen: Views, depth: Float[np.ndarray, "v h w"]
) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "n 3"], Float[np.ndarray, "n"]]:
    """Every pixel's surface point, its normal towards the camera (the viewing ray where the views have no normals), and how thick a part
    thinner than a pixel would be there: the covered share of half a pixel."""
    points, normals, radii = [], [], []
    for i, camera in enumerate(seen.cameras):
        hit = depth[i] > 0
        place = camera.unproject(depth[i])[hit]
        points.append(place.astype(np.float32))  # all pixels of all views: half the memory
        radii.append((0.5 * seen.alpha[i][hit] * depth[i][hit] / camera.fx).astype(np.float32))
        towards = camera.centre - place
        towards /= np.linalg.norm(towards, axis=1, keepdims=True)
        if seen.normals is None:
            normals.append(towards.astype(np.float32))
        else:
            given = seen.normals[i][hit].astype(np.float64)
            facing = (given * towards).sum(1, keepdims=True)
            usable = np.linalg.norm(given, axis=1, keepdims=True) > 0.5
            normals.append(np.where(usable, given * np.where(facing < 0, -1, 1), towards).astype(np.float32))
    return np.concatenate(points), np.concatenate(normals), np.concatenate(radii)


@kernel
def summed_normals(vertices, faces):
    """At each vertex the sum of its faces' normals, weighted by their areas; not of unit length."""
    total = np.zeros((len(vertices), 3))
    for f in range(len(faces)):
        a, b, c = faces[f]
        ux, uy, uz = vertices[b, 0] - vertices[a, 0], vertices[b, 1] - vertices[a, 1], vertices[b, 2] - vertices[a, 2]
        vx, vy, vz = vertices[c, 0] - vertices[a, 0], vertices[c, 1] - vertices[a, 1], vertices[c, 2] - vertices[a, 2]
        x, y, z = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        for v in (a, b, c):
            total[v, 0] += x
            total[v, 1] += y
            total[v, 2] += z
    return total


@parallel_kernel
def _around(places, directions, key, counts, points, normals):
    distance, direction = np.zeros(len(places)), np.zeros((len(places), 3))
    reach = REACH * REACH
    for v in prange(len(places)):
        x, y, z = places[v, 0], places[v, 1], places[v, 2]
        dx, dy, dz = directions[v, 0], directions[v, 1], directions[v, 2]
        length = np.sqrt(dx * dx + dy * dy + dz * dz)
        if length == 0:
            continue
        dx, dy, dz = dx / length, dy / length, dz / length
        a, b, c = int(np.floor(x / REACH)), int(np.floor(y / REACH)), int(np.floor(z / REACH))
        total, off, nx, ny, nz = 0.0, 0.0, 0.0, 0.0, 0.0
        for i in range(max(a - 1, 0), min(a + 2, counts[0])):
            for j in range(max(b - 1, 0), min(b + 2, counts[1])):
                row = (i * counts[1] + j) * counts[2]
                first = np.searchsorted(key, row + max(c - 1, 0))
                end = row + min(c + 2, counts[2])  # of the bins
                for n in range(first, len(key)):
                    if key[n] >= end:
                        break
                    px, py, pz = x - points[n, 0], y - points[n, 1], z - points[n, 2]
                    square = px * px + py * py + pz * pz
                    facing = dx * normals[n, 0] + dy * normals[n, 1] + dz * normals[n, 2]
                    if square >= reach or facing <= SAME_SIDE:
                        continue
                    near = 1 - square / reach
                    weight = near**8 * ((facing - SAME_SIDE) / (1 - SAME_SIDE)) ** 4
                    total += weight
                    off += weight * (px * normals[n, 0] + py * normals[n, 1] + pz * normals[n, 2])
                    nx += weight * normals[n, 0]
                    ny += weight * normals[n, 1]
                    nz += weight * normals[n, 2]
        length = np.sqrt(nx * nx + ny * ny + nz * nz)
        if total < LEAST or length == 0:
            continue
        distance[v] = off / length
        direction[v, 0], direction[v, 1], direction[v, 2] = nx / length, ny / length, nz / length
    return distance, direction
