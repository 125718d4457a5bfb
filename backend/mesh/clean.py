"""What marching cubes leaves behind: floaters, inner walls, steps."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int
from numba import prange
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from backend.mesh import raster
from backend.mesh.mesh import Mesh
from backend.splats.parallel import kernel, parallel_kernel
from backend.views.cameras import look_at

TAUBIN = (0.5, -0.53)  # Taubin 1995: a shrinking and a growing pass, pass band 0.11
WITNESSES = 48  # outside cameras that decide whether a piece can be seen


def pieces(mesh: Mesh) -> Int[np.ndarray, "f"]:
    """The number of the connected piece that each face belongs to."""
    a, b = mesh.faces[:, [0, 1, 2]].ravel(), mesh.faces[:, [1, 2, 0]].ravel()
    graph = coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(len(mesh.vertices),) * 2)
    return connected_components(graph, directed=False)[1][mesh.faces[:, 0]]


def drop_pieces(mesh: Mesh, smallest_share: float) -> Mesh:
    """Without pieces below a share of the whole area, hollows turned inside out, and pieces that no camera outside sees."""
    piece = pieces(mesh)
    count = piece.max() + 1
    area, volume = (np.bincount(piece, of_face, count) for of_face in _sizes(mesh.vertices, mesh.faces))
    keep = (area >= smallest_share * area.sum()) & (volume > 0)
    keep[np.argmax(area)] = True
    if keep.sum() > 1:
        keep &= np.bincount(piece, visible(mesh, WITNESSES, 384), count) > 0
    return subset(mesh, keep[piece])


@kernel
def _sizes(vertices, faces):
    """Each face's area, and the volume between it and the origin."""
    area, volume = np.empty(len(faces)), np.empty(len(faces))
    for f in range(len(faces)):
        a, b, c = faces[f]
        px, py, pz = np.float64(vertices[a, 0]), np.float64(vertices[a, 1]), np.float64(vertices[a, 2])
        qx, qy, qz = vertices[b, 0] - px, vertices[b, 1] - py, vertices[b, 2] - pz
        rx, ry, rz = vertices[c, 0] - px, vertices[c, 1] - py, vertices[c, 2] - pz
        x, y, z = qy * rz - qz * ry, qz * rx - qx * rz, qx * ry - qy * rx
        area[f] = np.sqrt(x * x + y * y + z * z) / 2
        volume[f] = (px * x + py * y + pz * z) / 6
    return area, volume


def visible(mesh: Mesh, cameras: int, size: int) -> Bool[np.ndarray, "f"]:
    """The faces that hold the nearest point of some pixel in `cameras` pictures from all around."""
    low, high = mesh.vertices.min(0).astype(np.float64), mesh.vertices.max(0).astype(np.float64)
    centre, radius = (low + high) / 2, float(np.linalg.norm(high - low)) / 2
    seen = np.zeros(len(mesh.faces), bool)
    k = np.arange(cameras) + 0.5
    height, turn = 1 - 2 * k / cameras, np.pi * (1 + 5**0.5) * k  # the golden spiral
    ring = np.sqrt(1 - height**2)
    for direction in np.stack([ring * np.cos(turn), ring * np.sin(turn), height], 1):
        camera = look_at(centre + direction * radius * 4, centre, size, 2 * np.arcsin(1 / 4) * 1.02)
        triangle = raster.depth(mesh, camera)[1]
        seen[triangle[triangle >= 0]] = True
    return seen


def subset(mesh: Mesh, faces: Bool[np.ndarray, "f"]) -> Mesh:
    """The chosen faces and the vertices that they use."""
    kept = mesh.faces[faces]
    used = np.zeros(len(mesh.vertices), bool)
    used[kept] = True
    return Mesh(mesh.vertices[used], (np.cumsum(used, dtype=np.int32) - 1)[kept])


def smooth(mesh: Mesh, passes: int) -> Mesh:
    """Taubin's lambda-mu smoothing with uniform weights: a low-pass filter that keeps the volume."""
    points = mesh.vertices.astype(np.float64)
    neighbours, starts = _neighbours(mesh.faces, len(points))
    for _ in range(passes):
        for step in TAUBIN:
            points = _towards_mean(points, neighbours, starts, step)
    return Mesh(points.astype(np.float32), mesh.faces)


@kernel
def _neighbours(faces, count):
    """Each vertex's neighbours, vertex after vertex, and where they start. On a closed surface each is in one face its successor."""
    starts = np.zeros(count + 1, np.int64)
    for f in range(len(faces)):
        for k in range(3):
            starts[faces[f, k] + 1] += 1
    for v in range(count):
        starts[v + 1] += starts[v]
    neighbours, cursor = np.empty(starts[count], np.int32), starts[:-1].copy()
    for f in range(len(faces)):
        for k in range(3):
            v = faces[f, k]
            neighbours[cursor[v]] = faces[f, (k + 1) % 3]
            cursor[v] += 1
    return neighbours, starts


@parallel_kernel
def _towards_mean(points, neighbours, starts, step):
    moved = np.empty_like(points)
    for v in prange(len(points)):
        count = max(starts[v + 1] - starts[v], 1)
        for k in range(3):
            total = 0.0
            for n in range(starts[v], starts[v + 1]):
                total += points[neighbours[n], k]
            if starts[v + 1] == starts[v]:
                total = points[v, k]
            moved[v, k] = points[v, k] + step * (total / count - points[v, k])
    return moved
