"""Marching cubes (Lorensen and Cline 1987) over the blocks of a sparse field, closed and manifold by construction.

The table of cases is derived here, not copied: on every face of a cube the outside corners are cut off one by one (so that thin solid
parts stay joined), a rule of the face's own four signs, on which the two cubes at a face therefore agree; the segments chain into
loops, and a loop becomes triangles none of whose inner edges lies in a face of the cube. No two edges of the mesh then fall together.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from backend.mesh.mesh import Mesh
from backend.splats.parallel import kernel, parallel_kernel

SIDE = 8  # cubes along a side of a block, which holds the SIDE + 1 points of its corners
LEAST = np.float32(0.01)  # cells: a vertex on a grid point would make faces without area


def _cases():
    """For each of the 256 sets of inside corners, its triangles as edges; and each edge's lower corner and axis.

    Corner c of a cube lies at (c & 1, c >> 1 & 1, c >> 2); edge 4 * axis + n is the n-th whose lower corner has no bit of that axis.
    """
    edge_of = {}
    for axis in range(3):
        for n, corner in enumerate(c for c in range(8) if not c >> axis & 1):
            edge_of[corner, corner | 1 << axis] = edge_of[corner | 1 << axis, corner] = 4 * axis + n
    faces = []  # corners counter-clockwise from outside the cube
    for axis in range(3):
        u, v = 1 << (axis + 1) % 3, 1 << (axis + 2) % 3
        faces += [(0, v, u | v, u), tuple(1 << axis | c for c in (0, u, u | v, v))]
    on_face = [{edge_of[face[n], face[(n + 1) % 4]] for n in range(4)} for face in faces]
    count, triangles = np.zeros(256, np.int64), np.zeros((256, 5, 3), np.int64)
    for case in range(256):
        following = {}
        for face in faces:
            steps = [(face[n], face[(n + 1) % 4]) for n in range(4)]
            leaves = [case >> a & 1 and not case >> b & 1 for a, b in steps]
            enters = [case >> b & 1 and not case >> a & 1 for a, b in steps]
            for n in range(4):
                if leaves[n]:
                    m = next(m % 4 for m in range(n + 1, n + 4) if enters[m % 4])
                    following[edge_of[steps[n]]] = edge_of[steps[m]]
        while following:
            loop = [min(following)]
            while (after := following.pop(loop[-1])) != loop[0]:
                loop.append(after)
            turns = [loop[n:] + loop[:n] for n in range(len(loop))]
            fan = next(t for t in turns if not any({t[0], end} <= face for end in t[2:-1] for face in on_face))  # every case has one
            for n in range(1, len(fan) - 1):
                triangles[case, count[case]] = fan[0], fan[n + 1], fan[n]
                count[case] += 1
    lower, axes = np.zeros(12, np.int64), np.zeros(12, np.int64)
    for (a, b), edge in edge_of.items():
        lower[edge], axes[edge] = min(a, b), (a ^ b).bit_length() - 1
    return count, triangles, lower, axes


COUNT, TRIANGLES, LOWER, AXIS = _cases()


def march(blocks: np.ndarray, places: np.ndarray, shape: tuple[int, ...], steps: float) -> Mesh:
    """The surface where a field changes sign, in cells; faces look to where it is positive.

    blocks: (n, SIDE + 1, SIDE + 1, SIDE + 1) values, `steps` of them a cell; places: (n, 3) position of each block in the grid of blocks;
    shape: points of the whole grid. Points that two blocks share have to have the same value in both, and blocks that are missing one sign.
    """
    sizes = _sizes(blocks)
    first = np.zeros((len(blocks) + 1, 2), np.int64)
    np.cumsum(sizes, axis=0, out=first[1:])
    points, keys = np.empty((first[-1, 0], 3), np.float32), np.empty(first[-1, 0], np.int64)
    faces = np.empty((first[-1, 1], 3), np.int32)
    _triangulate(blocks, places, np.asarray(shape, np.int64), np.float32(1 / steps), first, points, keys, faces)
    shared = np.flatnonzero(keys >= 0)  # on the border of a block: one vertex of all that lie on one edge of the grid
    _, kept, which = np.unique(keys[shared], return_index=True, return_inverse=True)
    only = np.ones(len(points), bool)
    only[shared] = False
    only[shared[kept]] = True
    index = np.cumsum(only, dtype=np.int32) - np.int32(1)
    index[shared] = index[shared[kept]][which.reshape(-1)]
    _renumber(faces, index)
    return Mesh(points[only], faces)


@kernel
def _case(block, i, j, k):
    case = 0
    for corner in range(8):
        if block[i + (corner & 1), j + (corner >> 1 & 1), k + (corner >> 2)] < 0:
            case |= 1 << corner
    return case


@parallel_kernel
def _sizes(blocks):
    """Vertices and triangles of each block."""
    sizes = np.zeros((len(blocks), 2), np.int64)
    for n in prange(len(blocks)):
        block = blocks[n]
        vertices, triangles = 0, 0
        for i in range(SIDE + 1):
            for j in range(SIDE + 1):
                for k in range(SIDE + 1):
                    inside = block[i, j, k] < 0
                    vertices += i < SIDE and (block[min(i + 1, SIDE), j, k] < 0) != inside
                    vertices += j < SIDE and (block[i, min(j + 1, SIDE), k] < 0) != inside
                    vertices += k < SIDE and (block[i, j, min(k + 1, SIDE)] < 0) != inside
                    if i < SIDE and j < SIDE and k < SIDE:
                        triangles += COUNT[_case(block, i, j, k)]
        sizes[n, 0], sizes[n, 1] = vertices, triangles
    return sizes


@kernel
def _clear(value, scale):
    cells = np.float32(value) * scale
    return max(cells, LEAST) if value >= 0 else min(cells, -LEAST)


@parallel_kernel
def _triangulate(blocks, places, shape, scale, first, points, keys, faces):
    for n in prange(len(blocks)):
        block = blocks[n]
        if first[n, 1] == first[n + 1, 1]:
            continue
        corner = places[n] * SIDE
        vertex, face = first[n, 0], first[n, 1]
        numbers = np.empty((3, SIDE + 1, SIDE + 1, SIDE + 1), np.int32)
        for i in range(SIDE + 1):
            for j in range(SIDE + 1):
                for k in range(SIDE + 1):
                    for axis in range(3):
                        a, b, c = i + (axis == 0), j + (axis == 1), k + (axis == 2)
                        if a > SIDE or b > SIDE or c > SIDE or (block[i, j, k] < 0) == (block[a, b, c] < 0):
                            continue
                        here, there = _clear(block[i, j, k], scale), _clear(block[a, b, c], scale)
                        share = here / (here - there)
                        points[vertex, 0] = np.float32(corner[0] + i) + (share if axis == 0 else np.float32(0))
                        points[vertex, 1] = np.float32(corner[1] + j) + (share if axis == 1 else np.float32(0))
                        points[vertex, 2] = np.float32(corner[2] + k) + (share if axis == 2 else np.float32(0))
                        border = False  # an edge along x lies on the border if its y or z does, and so on
                        border |= axis != 0 and (i == 0 or i == SIDE)
                        border |= axis != 1 and (j == 0 or j == SIDE)
                        border |= axis != 2 and (k == 0 or k == SIDE)
                        keys[vertex] = -1
                        if border:
                            keys[vertex] = 3 * (((corner[0] + i) * shape[1] + corner[1] + j) * shape[2] + corner[2] + k) + axis
                        numbers[axis, i, j, k] = vertex
                        vertex += 1
        for i in range(SIDE):
            for j in range(SIDE):
                for k in range(SIDE):
                    case = _case(block, i, j, k)
                    if COUNT[case] == 0:
                        continue
                    own = np.empty(12, np.int32)
                    for edge in range(12):
                        low = LOWER[edge]
                        own[edge] = numbers[AXIS[edge], i + (low & 1), j + (low >> 1 & 1), k + (low >> 2)]
                    for m in range(COUNT[case]):
                        for axis in range(3):
                            faces[face, axis] = own[TRIANGLES[case, m, axis]]
                        face += 1


@parallel_kernel
def _renumber(faces, index):
    for n in prange(len(faces)):
        for k in range(3):
            faces[n, k] = index[faces[n, k]]
