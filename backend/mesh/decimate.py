"""Fewer triangles by quadric error edge collapse (Garland and Heckbert 1997), closed and manifold at every step.

A collapse is refused where it would pinch the surface (the link condition, Dey et al. 1999) or turn a face over. Libraries that skip these
checks are faster and return meshes with edges between one, three or four faces.
"""

from __future__ import annotations

import heapq

import numpy as np
from numba import njit

from backend.mesh.mesh import Mesh

PULL = 1e-6  # weight of the distance to the edge's middle: places vertices well where the surface is flat
VALENCE = 48  # most faces around a vertex
TURN = 0.2  # least cosine between a face's normals before and after


def decimate(mesh: Mesh, faces: int) -> Mesh:
    """At most `faces` triangles; more only where every further collapse would break the surface.

    The input should be a closed manifold; where it is not, it stays as it is.
    """
    if len(mesh.faces) <= faces:
        return mesh
    vertices, triangles = mesh.vertices.astype(np.float64), mesh.faces.astype(np.int32).copy()
    centre = vertices.mean(0)
    vertices -= centre
    alive = _collapse_edges(vertices, triangles, faces)
    used, index = np.unique(triangles[alive], return_inverse=True)
    return Mesh((vertices[used] + centre).astype(np.float32), index.reshape(-1, 3).astype(np.int32))


@njit(nogil=True, cache=True)
def _best_place(q, pa, pb):
    """Where an edge's vertex goes, and what it costs: x'Ax + 2b'x + c with q = (A: xx xy xz yy yz zz, b: x y z, c)."""
    mx, my, mz = (pa[0] + pb[0]) / 2, (pa[1] + pb[1]) / 2, (pa[2] + pb[2]) / 2
    pull = PULL * (q[0] + q[3] + q[5]) + 1e-30
    xx, xy, xz, yy, yz, zz = q[0] + pull, q[1], q[2], q[3] + pull, q[4], q[5] + pull
    rx, ry, rz = pull * mx - q[6], pull * my - q[7], pull * mz - q[8]
    c00, c01, c02 = yy * zz - yz * yz, xz * yz - xy * zz, xy * yz - xz * yy
    det = xx * c00 + xy * c01 + xz * c02
    x = (c00 * rx + c01 * ry + c02 * rz) / det
    y = (c01 * rx + (xx * zz - xz * xz) * ry + (xy * xz - xx * yz) * rz) / det
    z = (c02 * rx + (xy * xz - xx * yz) * ry + (xx * yy - xy * xy) * rz) / det
    length = (pa[0] - pb[0]) ** 2 + (pa[1] - pb[1]) ** 2 + (pa[2] - pb[2]) ** 2
    away = (x - mx) ** 2 + (y - my) ** 2 + (z - mz) ** 2
    if not away <= 4 * length:  # nearly singular
        x, y, z, away = mx, my, mz, 0.0
    cost = (
        q[0] * x * x + q[3] * y * y + q[5] * z * z + 2 * (q[1] * x * y + q[2] * x * z + q[4] * y * z)
        + 2 * (q[6] * x + q[7] * y + q[8] * z) + q[9] + pull * away
    )  # fmt: skip
    return max(cost, 0.0), x, y, z


@njit(nogil=True, cache=True)
def _around(v, first, following, faces, alive, found):
    """The live corners (3 * face + corner) at a vertex, and their number; forgets dead ones on the way."""
    count, previous, corner = 0, -1, first[v]
    while corner >= 0:
        after = following[corner]
        if not alive[corner // 3]:
            if previous < 0:
                first[v] = after
            else:
                following[previous] = after
        else:
            if count < len(found):
                found[count] = corner
            count += 1
            previous = corner
        corner = after
    return count


@njit(nogil=True, cache=True)
def _turns(vertices, faces, corners, count, other, place):
    """Whether moving a vertex to `place` turns one of its faces over or makes it needle-thin; faces that hold `other` vanish."""
    for n in range(count):
        f, k = corners[n] // 3, corners[n] % 3
        b, c = faces[f, (k + 1) % 3], faces[f, (k + 2) % 3]
        if b == other or c == other:
            continue
        p, q, r = vertices[faces[f, k]], vertices[b], vertices[c]
        old = np.cross(q - p, r - p)
        new = np.cross(q - place, r - place)
        size, fresh = np.sqrt((old * old).sum()), np.sqrt((new * new).sum())
        longest = max(((q - place) ** 2).sum(), ((r - place) ** 2).sum(), ((r - q) ** 2).sum())
        if fresh < 0.02 * longest or (old * new).sum() < TURN * size * fresh:
            return True
    return False


@njit(nogil=True, cache=True)
def _collapse_edges(vertices, faces, target):
    count = len(vertices)
    alive = np.ones(len(faces), np.bool_)
    first = np.full(count, -1, np.int64)
    following = np.full(3 * len(faces), -1, np.int64)
    quadrics = np.zeros((count, 10))
    for f in range(len(faces)):
        p = vertices[faces[f, 0]]
        normal = np.cross(vertices[faces[f, 1]] - p, vertices[faces[f, 2]] - p)
        size = np.sqrt((normal * normal).sum())
        if size > 0:
            nx, ny, nz = normal / size
            d = -(nx * p[0] + ny * p[1] + nz * p[2])
            plane = np.array([nx * nx, nx * ny, nx * nz, ny * ny, ny * nz, nz * nz, nx * d, ny * d, nz * d, d * d]) * size
            for k in range(3):
                quadrics[faces[f, k]] += plane
        for k in range(3):
            following[3 * f + k] = first[faces[f, k]]
            first[faces[f, k]] = 3 * f + k
    version = np.zeros(count, np.int64)
    heap = [(0.0, 0, 0, 0, 0)]  # cost, two vertices, their versions; the entry tells the compiler the types
    heap.clear()
    for f in range(len(faces)):
        for k in range(3):
            a, b = faces[f, k], faces[f, (k + 1) % 3]
            if a < b:  # a closed surface has each edge once in either direction
                cost, _, _, _ = _best_place(quadrics[a] + quadrics[b], vertices[a], vertices[b])
                heap.append((cost, int(a), int(b), 0, 0))
    heapq.heapify(heap)
    left = len(faces)
    at_a, at_b = np.empty(VALENCE + 1, np.int64), np.empty(VALENCE + 1, np.int64)
    place = np.empty(3)
    while left > target and len(heap) > 0:
        _, a, b, version_a, version_b = heapq.heappop(heap)
        if version[a] != version_a or version[b] != version_b:
            continue
        around_a, around_b = _around(a, first, following, faces, alive, at_a), _around(b, first, following, faces, alive, at_b)
        if around_a + around_b > VALENCE:
            continue
        # The link condition: a and b share their edge's two opposite vertices and no other neighbour
        shared_faces, shared, c, d = 0, 0, -1, -1
        sound = True
        for n in range(around_a):
            f, k = at_a[n] // 3, at_a[n] % 3
            following_one, last_one = faces[f, (k + 1) % 3], faces[f, (k + 2) % 3]
            if following_one == b:
                shared_faces, c = shared_faces + 1, last_one
            elif last_one == b:
                shared_faces, d = shared_faces + 1, following_one
            if following_one != b:  # on a closed fan every neighbour follows once
                for m in range(around_b):
                    if faces[at_b[m] // 3, (at_b[m] % 3 + 1) % 3] == following_one:
                        shared += 1
        if shared_faces != 2 or shared != 2 or c < 0 or d < 0 or c == d:
            continue
        for n in range(around_a):  # a tetrahedron is as small as a closed surface gets
            f, k = at_a[n] // 3, at_a[n] % 3
            x, y = faces[f, (k + 1) % 3], faces[f, (k + 2) % 3]
            if (x == c and y == d) or (x == d and y == c):
                for m in range(around_b):
                    g, j = at_b[m] // 3, at_b[m] % 3
                    u, w = faces[g, (j + 1) % 3], faces[g, (j + 2) % 3]
                    if (u == c and w == d) or (u == d and w == c):
                        sound = False
        if not sound:
            continue
        merged = quadrics[a] + quadrics[b]
        _, place[0], place[1], place[2] = _best_place(merged, vertices[a], vertices[b])
        if _turns(vertices, faces, at_a, around_a, b, place) or _turns(vertices, faces, at_b, around_b, a, place):
            continue
        for n in range(around_b):
            corner = at_b[n]
            f, k = corner // 3, corner % 3
            if faces[f, (k + 1) % 3] == a or faces[f, (k + 2) % 3] == a:
                alive[f] = False
                left -= 1
            else:
                faces[f, k] = a
                following[corner] = first[a]
                first[a] = corner
        first[b] = -1
        vertices[a] = place
        quadrics[a] = merged
        version[a] += 1
        version[b] += 1
        around_a = _around(a, first, following, faces, alive, at_a)
        for n in range(around_a):
            # Its neighbours' costs do not change with a's place, only the edges at a
            x = int(faces[at_a[n] // 3, (at_a[n] % 3 + 1) % 3])
            low, high = min(a, x), max(a, x)
            cost, _, _, _ = _best_place(quadrics[low] + quadrics[high], vertices[low], vertices[high])
            heapq.heappush(heap, (cost, low, high, int(version[low]), int(version[high])))
    return alive
