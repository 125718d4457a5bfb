"""Fewer triangles by quadric error edge collapse (Garland and Heckbert 1997), closed and manifold at every step.

A collapse is refused where it would pinch the surface (the link condition, Dey et al. 1999) or turn a face over. Libraries that skip these
checks are faster and return meshes with edges between one, three or four faces.
"""

from __future__ import annotations

import heapq

import numpy as np
from numba import prange

from backend.mesh.mesh import Mesh
from backend.progress import Progress, silent
from backend.splats.parallel import kernel, parallel_kernel

PULL = 1e-6  # weight of the distance to the edge's middle: places vertices well where the surface is flat
VALENCE = 48  # most faces around a vertex
WHOLE = 2  # times the faces asked for: below it, the cheapest edge of the whole mesh goes first
ROUND = 0.4  # share of the edges that one round may collapse
NEEDLE = 0.02  # least height of a face over its longest edge
TURN = 0.2  # least cosine between a face's normals before and after


def decimate(mesh: Mesh, faces: int, progress: Progress = silent) -> Mesh:
    """At most `faces` triangles; more only where every further collapse would break the surface.

    The input should be a closed manifold; where it is not, it stays as it is. Large meshes first lose their cheapest edges in rounds, in
    each of which a vertex takes part once; from WHOLE times the faces asked for on, always the cheapest edge of all goes.
    """
    if len(mesh.faces) <= faces:
        return mesh
    vertices, triangles = mesh.vertices.astype(np.float64), mesh.faces.astype(np.int32)
    centre = vertices.mean(0)
    vertices -= centre
    quadrics = plane_quadrics(vertices, triangles)
    left = len(triangles)
    while left > WHOLE * faces:
        progress(1 - left / len(mesh.faces), "Decimating")
        alive, first, following = connect(triangles, len(vertices))
        edges = edges_of(triangles)
        costs = _costs(quadrics, vertices, edges)
        count = min(int(ROUND * len(edges)), len(edges) - 1)
        cheap = np.flatnonzero(costs <= np.partition(costs, count)[count])
        order = cheap[np.argsort(costs[cheap], kind="stable")]
        before, most = left, (left - WHOLE * faces + 1) // 2
        left -= _sweep(edges[order], most, vertices, triangles, quadrics, alive, first, following)
        triangles = triangles[alive]
        if left > 0.98 * before:  # what is cheap cannot go
            break
    alive, first, following = connect(triangles, len(vertices))
    _collapse_cheapest(edges_of(triangles), faces, vertices, triangles, quadrics, alive, first, following)
    used, index = np.unique(triangles[alive], return_inverse=True)
    return Mesh((vertices[used] + centre).astype(np.float32), index.reshape(-1, 3).astype(np.int32))


@kernel
def plane_quadrics(vertices, faces):
    """Each vertex's squared distance to the planes of its faces, weighted by their areas."""
    quadrics = np.zeros((len(vertices), 10))
    for f in range(len(faces)):
        a = faces[f, 0]
        x, y, z = vertices[a, 0], vertices[a, 1], vertices[a, 2]
        nx, ny, nz, _ = area_normal(vertices, faces[f, 1], faces[f, 2], x, y, z)
        size = np.sqrt(nx * nx + ny * ny + nz * nz)
        if size > 0:
            nx, ny, nz = nx / size, ny / size, nz / size
            d = -(nx * x + ny * y + nz * z)
            for k in range(3):
                v = faces[f, k]
                quadrics[v, 0] += nx * nx * size
                quadrics[v, 1] += nx * ny * size
                quadrics[v, 2] += nx * nz * size
                quadrics[v, 3] += ny * ny * size
                quadrics[v, 4] += ny * nz * size
                quadrics[v, 5] += nz * nz * size
                quadrics[v, 6] += nx * d * size
                quadrics[v, 7] += ny * d * size
                quadrics[v, 8] += nz * d * size
                quadrics[v, 9] += d * d * size
    return quadrics


@kernel
def connect(faces, count):
    """Which faces live (all), and each vertex's corners (3 * face + corner) as chains: the first, and the one after each."""
    first, following = np.full(count, -1, np.int32), np.full(3 * len(faces), -1, np.int32)
    for f in range(len(faces)):
        for k in range(3):
            following[3 * f + k] = first[faces[f, k]]
            first[faces[f, k]] = 3 * f + k
    return np.ones(len(faces), np.bool_), first, following


@kernel
def edges_of(faces):
    """Every edge once: a closed surface has it in either direction."""
    edges, count = np.empty((3 * len(faces), 2), np.int32), 0
    for f in range(len(faces)):
        for k in range(3):
            a, b = faces[f, k], faces[f, (k + 1) % 3]
            if a < b:
                edges[count, 0], edges[count, 1] = a, b
                count += 1
    return edges[:count]


@parallel_kernel
def _costs(quadrics, vertices, edges):
    costs = np.empty(len(edges))
    for n in prange(len(edges)):
        costs[n] = _best_place(quadrics, vertices, edges[n, 0], edges[n, 1])[0]
    return costs


@kernel
def _sweep(edges, most, vertices, faces, quadrics, alive, first, following):
    """Collapses edges in their order, at most `most`, if neither end did yet; returns how many faces are gone."""
    touched = np.zeros(len(vertices), np.bool_)
    at_a, at_b = np.empty(VALENCE + 1, np.int64), np.empty(VALENCE + 1, np.int64)
    gone = 0
    for n in range(len(edges)):
        a, b = edges[n, 0], edges[n, 1]
        if touched[a] or touched[b]:
            continue
        lost = _collapse(a, b, vertices, faces, quadrics, alive, first, following, at_a, at_b)
        if lost > 0:
            touched[a] = touched[b] = True
            gone += lost
            most -= 1
            if most <= 0:
                break
    return gone


@kernel
def _best_place(quadrics, vertices, a, b):
    """Where the vertex of edge a, b goes, and what it costs: x'Ax + 2b'x + c with q = (A: xx xy xz yy yz zz, b: x y z, c)."""
    q0, q1, q2 = quadrics[a, 0] + quadrics[b, 0], quadrics[a, 1] + quadrics[b, 1], quadrics[a, 2] + quadrics[b, 2]
    q3, q4, q5 = quadrics[a, 3] + quadrics[b, 3], quadrics[a, 4] + quadrics[b, 4], quadrics[a, 5] + quadrics[b, 5]
    q6, q7, q8 = quadrics[a, 6] + quadrics[b, 6], quadrics[a, 7] + quadrics[b, 7], quadrics[a, 8] + quadrics[b, 8]
    dx, dy, dz = vertices[a, 0] - vertices[b, 0], vertices[a, 1] - vertices[b, 1], vertices[a, 2] - vertices[b, 2]
    mx, my, mz = vertices[b, 0] + dx / 2, vertices[b, 1] + dy / 2, vertices[b, 2] + dz / 2
    pull = PULL * (q0 + q3 + q5) + 1e-30
    xx, yy, zz = q0 + pull, q3 + pull, q5 + pull
    rx, ry, rz = pull * mx - q6, pull * my - q7, pull * mz - q8
    c00, c01, c02 = yy * zz - q4 * q4, q2 * q4 - q1 * zz, q1 * q4 - q2 * yy
    per_det = 1 / (xx * c00 + q1 * c01 + q2 * c02)
    x = (c00 * rx + c01 * ry + c02 * rz) * per_det
    y = (c01 * rx + (xx * zz - q2 * q2) * ry + (q1 * q2 - xx * q4) * rz) * per_det
    z = (c02 * rx + (q1 * q2 - xx * q4) * ry + (xx * yy - q1 * q1) * rz) * per_det
    away = (x - mx) ** 2 + (y - my) ** 2 + (z - mz) ** 2
    if not away <= 4 * (dx * dx + dy * dy + dz * dz):  # nearly singular
        x, y, z, away = mx, my, mz, 0.0
    cost = (
        q0 * x * x + q3 * y * y + q5 * z * z + 2 * (q1 * x * y + q2 * x * z + q4 * y * z)
        + 2 * (q6 * x + q7 * y + q8 * z) + quadrics[a, 9] + quadrics[b, 9] + pull * away
    )  # fmt: skip
    return max(cost, 0.0), x, y, z


@kernel
def corners_at(v, first, following, faces, alive, found):
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


@kernel
def area_normal(vertices, b, c, x, y, z):
    """Twice the area vector of the triangle of a place and two vertices."""
    ux, uy, uz = vertices[b, 0] - x, vertices[b, 1] - y, vertices[b, 2] - z
    vx, vy, vz = vertices[c, 0] - x, vertices[c, 1] - y, vertices[c, 2] - z
    longest = max(ux * ux + uy * uy + uz * uz, vx * vx + vy * vy + vz * vz)
    return uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx, longest


@kernel
def turns(vertices, faces, corners, count, other, x, y, z):
    """Whether moving a vertex to a place turns one of its faces over or makes it needle-thin; faces that hold `other` vanish."""
    for n in range(count):
        f, k = corners[n] // 3, corners[n] % 3
        a, b, c = faces[f, k], faces[f, (k + 1) % 3], faces[f, (k + 2) % 3]
        if b == other or c == other:
            continue
        px, py, pz, _ = area_normal(vertices, b, c, vertices[a, 0], vertices[a, 1], vertices[a, 2])
        qx, qy, qz, longest = area_normal(vertices, b, c, x, y, z)
        side = (vertices[b, 0] - vertices[c, 0]) ** 2 + (vertices[b, 1] - vertices[c, 1]) ** 2 + (vertices[b, 2] - vertices[c, 2]) ** 2
        fresh = np.sqrt(qx * qx + qy * qy + qz * qz)
        turned = px * qx + py * qy + pz * qz < TURN * fresh * np.sqrt(px * px + py * py + pz * pz)
        if turned or fresh < NEEDLE * max(longest, side):
            return True
    return False


@kernel
def linked(a, b, faces, at_a, around_a, at_b, around_b):
    """Whether edge a, b may be collapsed: both ends share its two opposite vertices and no other neighbour (the link condition), and are no
    corners of a tetrahedron, as small as a closed surface gets."""
    shared_faces, shared, c, d = 0, 0, -1, -1
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
        return False
    for n in range(around_a):
        f, k = at_a[n] // 3, at_a[n] % 3
        s, t = faces[f, (k + 1) % 3], faces[f, (k + 2) % 3]
        if (s == c and t == d) or (s == d and t == c):
            for m in range(around_b):
                g, j = at_b[m] // 3, at_b[m] % 3
                u, w = faces[g, (j + 1) % 3], faces[g, (j + 2) % 3]
                if (u == c and w == d) or (u == d and w == c):
                    return False
    return True


@kernel
def _collapse(a, b, vertices, faces, quadrics, alive, first, following, at_a, at_b):
    """Moves vertex a to the edge's best place and b into it; returns how many faces vanish, 0 if the surface forbids it."""
    around_a, around_b = corners_at(a, first, following, faces, alive, at_a), corners_at(b, first, following, faces, alive, at_b)
    if around_a + around_b > VALENCE:
        return 0
    if not linked(a, b, faces, at_a, around_a, at_b, around_b):
        return 0
    _, x, y, z = _best_place(quadrics, vertices, a, b)
    if turns(vertices, faces, at_a, around_a, b, x, y, z) or turns(vertices, faces, at_b, around_b, a, x, y, z):
        return 0
    for n in range(around_b):
        corner = at_b[n]
        f, k = corner // 3, corner % 3
        if faces[f, (k + 1) % 3] == a or faces[f, (k + 2) % 3] == a:
            alive[f] = False
        else:
            faces[f, k] = a
            following[corner] = first[a]
            first[a] = corner
    first[b] = -1
    vertices[a, 0], vertices[a, 1], vertices[a, 2] = x, y, z
    for k in range(10):
        quadrics[a, k] += quadrics[b, k]
    return 2


@kernel
def _collapse_cheapest(edges, target, vertices, faces, quadrics, alive, first, following):
    """Always the cheapest edge, until `target` faces are left."""
    version = np.zeros(len(vertices), np.int32)
    heap = [(0.0, np.int32(0), np.int32(0), np.int32(0))]  # cost, two vertices, sum of their versions; says which types
    heap.clear()
    for n in range(len(edges)):
        a, b = edges[n, 0], edges[n, 1]
        heap.append((_best_place(quadrics, vertices, a, b)[0], a, b, np.int32(0)))
    heapq.heapify(heap)
    left = len(faces)
    at_a, at_b = np.empty(VALENCE + 1, np.int64), np.empty(VALENCE + 1, np.int64)
    while left > target and len(heap) > 0:
        _, a, b, versions = heapq.heappop(heap)
        if version[a] + version[b] != versions:  # they only grow
            continue
        lost = _collapse(a, b, vertices, faces, quadrics, alive, first, following, at_a, at_b)
        if lost == 0:
            continue
        left -= lost
        version[a] += 1
        version[b] = -(2**30)  # no sum fits it any more
        for n in range(corners_at(a, first, following, faces, alive, at_a)):
            # Its neighbours' costs do not change with a's place, only the edges at a
            other = faces[at_a[n] // 3, (at_a[n] % 3 + 1) % 3]
            low, high = min(a, other), max(a, other)
            versions = np.int32(version[low] + version[high])
            heapq.heappush(heap, (_best_place(quadrics, vertices, low, high)[0], low, high, versions))
