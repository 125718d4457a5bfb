"""Where points lie by a surface: the nearest place on it, and where lines through them meet it. Triangles stand in the bins of a grid, each
in all that the box around it touches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numba import prange

from backend.mesh.bins import sorted_into_bins
from backend.mesh.mesh import Mesh
from backend.splats.parallel import kernel, parallel_kernel

LEAST_BINS, MOST_BINS = 4, 128  # along the longest side
SAME_SIDE = 0.2  # cosine: a surface that looks away further than this from a line's direction is another one


@dataclass(frozen=True)
class Triangles:
    """The triangles of a mesh, those of bin i at order[starts[i] : starts[i + 1]]. Lengths in the mesh's unit."""

    vertices: Float[np.ndarray, "n 3"]
    faces: Int[np.ndarray, "f 3"]
    origin: Float[np.ndarray, "3"]
    side: float  # of a bin
    counts: Int[np.ndarray, "3"]
    starts: Int[np.ndarray, "bins+1"]
    order: Int[np.ndarray, "k"]

    def nearest(self, points: Float[np.ndarray, "m 3"]) -> tuple[Float[np.ndarray, "m"], Int[np.ndarray, "m"], Float[np.ndarray, "m 3"]]:
        """Distance of each point from the surface, and the face and its corners' weights where it is nearest."""
        given = np.ascontiguousarray(points, np.float64)
        return _nearest(given, self.vertices, self.faces, self.origin, self.side, self.counts, self.starts, self.order)

    def along(
        self, points: Float[np.ndarray, "m 3"], directions: Float[np.ndarray, "m 3"], reach: float
    ) -> tuple[Int[np.ndarray, "m"], Float[np.ndarray, "m 3"]]:
        """The face that the line through each point meets nearest to it, at most `reach` away and looking to the same side as the unit
        direction (-1: none), and the weights of its corners there."""
        lines = np.ascontiguousarray(points, np.float64), np.ascontiguousarray(directions, np.float64)
        return _along(*lines, reach, self.vertices, self.faces, self.origin, self.side, self.counts, self.starts, self.order)


def triangles(mesh: Mesh) -> Triangles:
    vertices, faces = mesh.vertices.astype(np.float64), np.ascontiguousarray(mesh.faces, np.int32)
    low, high = vertices.min(0), vertices.max(0)
    side = float((high - low).max()) / min(max(math.sqrt(len(faces)) / 2, LEAST_BINS), MOST_BINS)
    side = max(side, 1e-12)
    counts = np.floor((high - low) / side).astype(np.int64) + 1
    corners = vertices[faces]
    first, last = (np.floor((end - low) / side).astype(np.int64).clip(0, counts - 1) for end in (corners.min(1), corners.max(1)))
    order, starts = sorted_into_bins(first, last, counts)
    return Triangles(vertices, faces, low, side, counts, starts, order)


@kernel
def _place(value, origin, side, count):
    return min(max(int(np.floor((value - origin) / side)), 0), count - 1)


@parallel_kernel
def _nearest(points, vertices, faces, origin, side, counts, starts, order):
    distance = np.full(len(points), np.inf)
    face = np.full(len(points), np.int32(-1))
    weights = np.zeros((len(points), 3))
    for n in prange(len(points)):
        x, y, z = points[n, 0], points[n, 1], points[n, 2]
        a = _place(x, origin[0], side, counts[0])
        b = _place(y, origin[1], side, counts[1])
        c = _place(z, origin[2], side, counts[2])
        best = np.inf
        for ring in range(max(counts[0], counts[1], counts[2])):
            if max((ring - 1) * side, 0.0) ** 2 > best:  # of bins so many away
                break
            for i in range(max(a - ring, 0), min(a + ring + 1, counts[0])):
                for j in range(max(b - ring, 0), min(b + ring + 1, counts[1])):
                    shell = abs(i - a) == ring or abs(j - b) == ring
                    step = 1 if shell or ring == 0 else 2 * ring
                    for k in range(c - ring, c + ring + 1, step):
                        if k < 0 or k >= counts[2]:
                            continue
                        box = (i * counts[1] + j) * counts[2] + k
                        for slot in range(starts[box], starts[box + 1]):
                            f = order[slot]
                            square, u, v, w = _to_triangle(vertices, faces[f, 0], faces[f, 1], faces[f, 2], x, y, z)
                            if square < best or (square == best and f < face[n]):
                                best = square
                                face[n] = f
                                weights[n, 0], weights[n, 1], weights[n, 2] = u, v, w
        distance[n] = np.sqrt(best)
    return distance, face, weights


@kernel
def _to_triangle(vertices, i, j, k, x, y, z):
    """Squared distance of a place from a triangle, and the corners' weights at the nearest point (Ericson 2004, section 5.1.5)."""
    ax, ay, az = vertices[i, 0], vertices[i, 1], vertices[i, 2]
    bx, by, bz = vertices[j, 0] - ax, vertices[j, 1] - ay, vertices[j, 2] - az
    cx, cy, cz = vertices[k, 0] - ax, vertices[k, 1] - ay, vertices[k, 2] - az
    px, py, pz = x - ax, y - ay, z - az
    d1, d2 = bx * px + by * py + bz * pz, cx * px + cy * py + cz * pz
    bb, bc, cc = bx * bx + by * by + bz * bz, bx * cx + by * cy + bz * cz, cx * cx + cy * cy + cz * cz
    d3, d4 = d1 - bb, d2 - bc  # the same seen from b
    d5, d6 = d1 - bc, d2 - cc  # and from c
    va, vb, vc = d3 * d6 - d5 * d4, d5 * d2 - d1 * d6, d1 * d4 - d3 * d2
    if d1 <= 0 and d2 <= 0:
        v, w = 0.0, 0.0
    elif d3 >= 0 and d4 <= d3:
        v, w = 1.0, 0.0
    elif d6 >= 0 and d5 <= d6:
        v, w = 0.0, 1.0
    elif vc <= 0 and d1 >= 0 and d3 <= 0:
        v, w = d1 / max(d1 - d3, 1e-300), 0.0
    elif vb <= 0 and d2 >= 0 and d6 <= 0:
        v, w = 0.0, d2 / max(d2 - d6, 1e-300)
    elif va <= 0 and d4 - d3 >= 0 and d5 - d6 >= 0:
        w = (d4 - d3) / max((d4 - d3) + (d5 - d6), 1e-300)
        v = 1 - w
    else:
        total = max(va + vb + vc, 1e-300)
        v, w = vb / total, vc / total
    rx, ry, rz = px - v * bx - w * cx, py - v * by - w * cy, pz - v * bz - w * cz
    return rx * rx + ry * ry + rz * rz, 1 - v - w, v, w


@parallel_kernel
def _along(points, directions, reach, vertices, faces, origin, side, counts, starts, order):
    face = np.full(len(points), np.int32(-1))
    weights = np.zeros((len(points), 3))
    for n in prange(len(points)):
        x, y, z = points[n, 0], points[n, 1], points[n, 2]
        dx, dy, dz = directions[n, 0], directions[n, 1], directions[n, 2]
        best = reach
        a0, a1 = _place(x - reach * abs(dx), origin[0], side, counts[0]), _place(x + reach * abs(dx), origin[0], side, counts[0])
        b0, b1 = _place(y - reach * abs(dy), origin[1], side, counts[1]), _place(y + reach * abs(dy), origin[1], side, counts[1])
        c0, c1 = _place(z - reach * abs(dz), origin[2], side, counts[2]), _place(z + reach * abs(dz), origin[2], side, counts[2])
        for i in range(a0, a1 + 1):
            for j in range(b0, b1 + 1):
                for k in range(c0, c1 + 1):
                    box = (i * counts[1] + j) * counts[2] + k
                    for slot in range(starts[box], starts[box + 1]):
                        f = order[slot]
                        t, u, v, w = _meets(vertices, faces[f, 0], faces[f, 1], faces[f, 2], x, y, z, dx, dy, dz)
                        if abs(t) < best or (abs(t) == best and f < face[n]):
                            best = abs(t)
                            face[n] = f
                            weights[n, 0], weights[n, 1], weights[n, 2] = u, v, w
    return face, weights


@kernel
def _meets(vertices, i, j, k, x, y, z, dx, dy, dz):
    """How far along a unit direction a line meets a triangle that looks to the same side (inf: nowhere), and the corners' weights there
    (Moeller and Trumbore 1997)."""
    ax, ay, az = vertices[i, 0], vertices[i, 1], vertices[i, 2]
    bx, by, bz = vertices[j, 0] - ax, vertices[j, 1] - ay, vertices[j, 2] - az
    cx, cy, cz = vertices[k, 0] - ax, vertices[k, 1] - ay, vertices[k, 2] - az
    nx, ny, nz = by * cz - bz * cy, bz * cx - bx * cz, bx * cy - by * cx
    size = np.sqrt(nx * nx + ny * ny + nz * nz)
    facing = nx * dx + ny * dy + nz * dz
    if size == 0 or facing < SAME_SIDE * size:
        return np.inf, 0.0, 0.0, 0.0
    px, py, pz = x - ax, y - ay, z - az
    t = -(px * nx + py * ny + pz * nz) / facing
    qx, qy, qz = px + t * dx, py + t * dy, pz + t * dz
    square = size * size
    v = ((qy * cz - qz * cy) * nx + (qz * cx - qx * cz) * ny + (qx * cy - qy * cx) * nz) / square
    w = ((by * qz - bz * qy) * nx + (bz * qx - bx * qz) * ny + (bx * qy - by * qx) * nz) / square
    slack = -1e-9
    if v < slack or w < slack or 1 - v - w < slack:
        return np.inf, 0.0, 0.0, 0.0
    return t, 1 - v - w, v, w
