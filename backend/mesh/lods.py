"""Levels of detail of a textured mesh that keep its UVs, so that all share one set of textures.

Vertices vanish by moving onto a neighbour (half-edge collapse: Kobbelt et al. 1998, "A general framework for mesh decimation") in the order
of the quadric error (Garland and Heckbert 1997): what is left are vertices of the mesh with the normals, tangents and places in the
texture that they had, moved along their normals alone, which slides no texture. A vertex on a seam moves along the seam, so charts keep
their borders; seams count as edges of the surface that should stay where they are. At a price, small charts may vanish (the texture slides
over the seam) and at a higher one the surface may be pinched, so that every level has as few faces as asked.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from backend.mesh.decimate import VALENCE, connect, corners_at, linked, plane_quadrics, turns
from backend.mesh.mesh import Mesh, TexturedMesh
from backend.mesh.nearest import triangles
from backend.progress import Progress, silent
from backend.splats.parallel import kernel

FEWEST = 4  # faces of a level, whatever is asked for
SEAM = 1.0  # weight of a seam's staying where it is against the surface's
SHORT = 1e-5  # weight of an edge's length: where the surface is flat, the shortest goes first
STRICT, SLIDING, PINCHING = range(3)  # what a collapse may do
PRICE = (0.0, 0.1, 8.0)  # of that: share of what the surface's moving by the whole edge would cost
SAMPLES = 8_000  # points of either surface by which they are compared
WITHIN = 0.99  # share of the points that lie as near to the other surface as a level's error says
LINES = 1080  # of the screen on which an error of one pixel is looked for


@dataclass(frozen=True)
class Level:
    """A level of detail, cut along its seams as `TexturedMesh`, whose textures it shares. error: how far it lies from the mesh that it was
    made from, for 99 of 100 points of either, unit frame."""

    vertices: Float[np.ndarray, "n 3"]
    normals: Float[np.ndarray, "n 3"]
    uv: Float[np.ndarray, "n 2"]
    faces: Int[np.ndarray, "f 3"]
    tangents: Float[np.ndarray, "n 4"] | None
    error: float


def budgets(faces: int, ratio: float, count: int) -> list[int]:
    """Faces of each of `count` further levels, at most."""
    return [max(FEWEST, int(faces * ratio**level)) for level in range(1, count + 1)]


def levels(mesh: TexturedMesh, wanted: list[int], progress: Progress = silent) -> list[Level]:
    """For each number of faces (falling) a level with at most so many, each made from the one before."""
    state = _State(mesh)
    found = []
    for number, faces in enumerate(wanted):
        progress(number / len(wanted), f"Level {number + 1}: at most {faces:,} faces")
        state.reduce(faces)
        found.append(state.level(mesh))
    return found


def switches(mesh: TexturedMesh, chain: list[Level]) -> list[float]:
    """For each level the share of the screen's height that the ball around the mesh takes when the level's error is one pixel of LINES:
    from there on down nobody sees the difference. At most 1, falling."""
    low, high = mesh.vertices.min(0).astype(np.float64), mesh.vertices.max(0).astype(np.float64)
    diameter = 2 * float(np.linalg.norm(mesh.vertices - (low + high) / 2, axis=1).max())
    sizes, most = [], 1.0
    for level in chain:
        most = min(most, diameter / (LINES * max(level.error, 1e-9)))
        sizes.append(round(most, 4))
    return sizes


def error(one: Mesh, other: Mesh) -> float:
    """The distance within which WITHIN of either surface's points have the other surface."""
    return max(
        float(np.quantile(triangles(to).nearest(_samples(of))[0], WITHIN)) for of, to in ((one, other), (other, one))
    )  # fmt: skip


def _samples(mesh: Mesh) -> Float[np.ndarray, "n 3"]:
    """Points evenly over the surface, the same ones each time."""
    corner = mesh.vertices.astype(np.float64)[mesh.faces]
    area = np.linalg.norm(np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), axis=1)
    random = np.random.default_rng(0)
    face = np.searchsorted(np.cumsum(area), (np.arange(SAMPLES) + 0.5) / SAMPLES * area.sum()).clip(0, len(area) - 1)
    along, across = random.random((2, SAMPLES, 1))
    root = np.sqrt(along)
    return corner[face, 0] * (1 - root) + corner[face, 1] * root * (1 - across) + corner[face, 2] * root * across


class _State:
    """A mesh on its way down. Topology goes by places (vertices without their seams), textures by wedges (vertices of the cut mesh)."""

    def __init__(self, mesh: TexturedMesh):
        places, first, index = np.unique(mesh.vertices, axis=0, return_index=True, return_inverse=True)
        self.place_of = index.ravel().astype(np.int32)  # of each wedge
        self.wedge_of = first  # of each place, one
        self.middle = places.mean(0, dtype=np.float64)
        self.scale = max(float(np.ptp(places, axis=0).max()), 1e-12)
        self.points = (places - self.middle) / self.scale
        self.uv = np.ascontiguousarray(mesh.uv, np.float64)
        self.normals = mesh.normals[first].astype(np.float64)
        self.faces, self.wedges = self.place_of[mesh.faces], np.ascontiguousarray(mesh.faces, np.int32)
        whole = (self.faces != np.roll(self.faces, 1, 1)).all(1)  # of a triangle of no area nothing is left
        self.faces, self.wedges = np.ascontiguousarray(self.faces[whole]), np.ascontiguousarray(self.wedges[whole])
        self.quadrics = plane_quadrics(self.points, self.faces)
        _hold_seams(self.quadrics, self.points, self.faces, self.wedges)

    def reduce(self, target: int) -> None:
        before = -1
        while before != len(self.faces) > target:
            before = len(self.faces)
            alive, first, following = connect(self.faces, len(self.points))
            tables = self.points, self.normals, self.faces, self.wedges, self.uv, self.quadrics, alive, first, following
            _fold_cheapest(_edges(self.faces), target, np.array(PRICE), *tables)
            self.faces, self.wedges = np.ascontiguousarray(self.faces[alive]), np.ascontiguousarray(self.wedges[alive])

    def level(self, mesh: TexturedMesh) -> Level:
        corners, index = np.unique(np.stack([self.wedges.ravel(), self.faces.ravel()], 1), axis=0, return_inverse=True)
        wedge, place = corners.T
        moved = self.place_of[wedge] != place  # its chart has gone over a seam
        normals = np.where(moved[:, None], mesh.normals[self.wedge_of[place]], mesh.normals[wedge])
        vertices, faces = (self.points[place] * self.scale + self.middle).astype(np.float32), index.reshape(-1, 3).astype(np.int32)
        tangents = None if mesh.tangents is None else _upright(mesh.tangents[wedge], normals)
        away = error(Mesh(mesh.vertices, mesh.faces), Mesh(vertices, faces))
        return Level(vertices, normals.astype(np.float32), mesh.uv[wedge], faces, tangents, away)


def _edges(faces: Int[np.ndarray, "f 3"]) -> Int[np.ndarray, "e 2"]:
    """Every edge once, of a surface that may be pinched already."""
    return np.unique(np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), 1), axis=0).astype(np.int32)


def _upright(tangents: Float[np.ndarray, "n 4"], normals: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 4"]:
    """Unit tangents at right angles to the normals."""
    flat = tangents[:, :3] - normals * (tangents[:, :3] * normals).sum(1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    aside = np.where(np.abs(normals[:, :1]) < 0.9, np.array([1.0, 0, 0]), np.array([0, 1.0, 0]))
    aside = aside - normals * (aside * normals).sum(1, keepdims=True)
    flat = np.where(length > 1e-4, flat / np.maximum(length, 1e-4), aside / np.linalg.norm(aside, axis=1, keepdims=True))
    return np.concatenate([flat, tangents[:, 3:]], 1).astype(np.float32)


def _hold_seams(
    quadrics: Float[np.ndarray, "n 10"], points: Float[np.ndarray, "n 3"], faces: Int[np.ndarray, "f 3"], wedges: Int[np.ndarray, "f 3"]
) -> None:
    """Adds to the places of each seam the plane through it that stands on the surface, in place."""
    start, end = faces.ravel(), np.roll(faces, -1, 1).ravel()
    left, right = wedges.ravel(), np.roll(wedges, -1, 1).ravel()
    count = np.int64(len(points))
    key, opposite = start * count + end, end * count + start
    order = np.argsort(key, kind="stable")
    other = order[np.searchsorted(key[order], opposite).clip(0, len(order) - 1)]
    seam = np.flatnonzero((key[other] != opposite) | (left != right[other]) | (right != left[other]))
    corner = points[faces[seam // 3]]
    across = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    edge = points[end[seam]] - points[start[seam]]
    plane = np.cross(edge, across)
    plane /= np.maximum(np.linalg.norm(plane, axis=1, keepdims=True), 1e-30)
    offset = -(plane * points[start[seam]]).sum(1)
    x, y, z = plane.T
    terms = np.stack([x * x, x * y, x * z, y * y, y * z, z * z, x * offset, y * offset, z * offset, offset * offset], 1)
    terms *= SEAM * (edge * edge).sum(1, keepdims=True)
    for at in (start[seam], end[seam]):
        np.add.at(quadrics, at, terms)


@kernel
def _best_place(quadrics, points, normals, a, b):
    """What moving vertex a onto b costs, and where b then lies best along its normal: x'Ax + 2b'x + c with q = (A: xx xy xz yy yz zz,
    b: x y z, c)."""
    x, y, z = points[b, 0], points[b, 1], points[b, 2]
    u, v, w = normals[b, 0], normals[b, 1], normals[b, 2]
    q0, q1, q2 = quadrics[a, 0] + quadrics[b, 0], quadrics[a, 1] + quadrics[b, 1], quadrics[a, 2] + quadrics[b, 2]
    q3, q4, q5 = quadrics[a, 3] + quadrics[b, 3], quadrics[a, 4] + quadrics[b, 4], quadrics[a, 5] + quadrics[b, 5]
    q6, q7, q8 = quadrics[a, 6] + quadrics[b, 6], quadrics[a, 7] + quadrics[b, 7], quadrics[a, 8] + quadrics[b, 8]
    square = (x - points[a, 0]) ** 2 + (y - points[a, 1]) ** 2 + (z - points[a, 2]) ** 2
    bend = q0 * u * u + q3 * v * v + q5 * w * w + 2 * (q1 * u * v + q2 * u * w + q4 * v * w)
    slope = u * (q0 * x + q1 * y + q2 * z + q6) + v * (q1 * x + q3 * y + q4 * z + q7) + w * (q2 * x + q4 * y + q5 * z + q8)
    if bend > 0:
        most = np.sqrt(square) / 2
        step = min(max(-slope / bend, -most), most)
        x, y, z = x + step * u, y + step * v, z + step * w
    cost = (
        q0 * x * x + q3 * y * y + q5 * z * z + 2 * (q1 * x * y + q2 * x * z + q4 * y * z)
        + 2 * (q6 * x + q7 * y + q8 * z) + quadrics[a, 9] + quadrics[b, 9]
    )  # fmt: skip
    whole = (quadrics[a, 0] + quadrics[a, 3] + quadrics[a, 5]) * square  # a's faces moved by the edge's length
    return max(cost, 0.0) + SHORT * whole, x, y, z, whole


@kernel
def _uv_area(uv, a, b, c):
    """Twice the signed area in the texture."""
    return (uv[b, 0] - uv[a, 0]) * (uv[c, 1] - uv[a, 1]) - (uv[c, 0] - uv[a, 0]) * (uv[b, 1] - uv[a, 1])


@kernel
def _fold(a, b, may, points, normals, faces, wedges, uv, quadrics, alive, first, following, at_a, at_b, source, target):
    """Moves vertex a onto b; returns how many faces vanish, 0 if surface or texture forbid it."""
    around_a, around_b = corners_at(a, first, following, faces, alive, at_a), corners_at(b, first, following, faces, alive, at_b)
    if may < PINCHING and around_a + around_b > VALENCE:
        return 0
    if may < PINCHING and not linked(a, b, faces, at_a, around_a, at_b, around_b):
        return 0
    _, x, y, z, _ = _best_place(quadrics, points, normals, a, b)
    if may < PINCHING and (turns(points, faces, at_a, around_a, b, x, y, z) or turns(points, faces, at_b, around_b, a, x, y, z)):
        return 0
    pairs = 0  # what each wedge of a becomes, by the faces that hold both
    for n in range(around_a):
        f, k = at_a[n] // 3, at_a[n] % 3
        for j in range(3):
            if faces[f, j] != b:
                continue
            known = False
            for m in range(pairs):
                if source[m] == wedges[f, k]:
                    known = True
                    if target[m] != wedges[f, j] and may == STRICT:  # a seam ends here
                        return 0
            if not known and pairs < len(source):
                source[pairs], target[pairs] = wedges[f, k], wedges[f, j]
                pairs += 1
    if may < PINCHING:
        for n in range(around_a):
            f, k = at_a[n] // 3, at_a[n] % 3
            s, t = (k + 1) % 3, (k + 2) % 3
            if faces[f, s] == b or faces[f, t] == b:
                continue
            becomes = -1
            for m in range(pairs):
                if source[m] == wedges[f, k]:
                    becomes = target[m]
            if becomes < 0:
                if may == STRICT:  # another chart, which would be torn from its place
                    return 0
                continue
            before = _uv_area(uv, wedges[f, k], wedges[f, s], wedges[f, t])
            if before * _uv_area(uv, becomes, wedges[f, s], wedges[f, t]) <= 0 and before != 0:
                return 0
    lost = 0
    for n in range(around_a):
        corner = at_a[n]
        f, k = corner // 3, corner % 3
        if faces[f, (k + 1) % 3] == b or faces[f, (k + 2) % 3] == b:
            alive[f] = False
            lost += 1
            continue
        for m in range(pairs):
            if source[m] == wedges[f, k]:
                wedges[f, k] = target[m]
                break
        faces[f, k] = b
        following[corner] = first[b]
        first[b] = corner
    first[a] = -1
    points[b, 0], points[b, 1], points[b, 2] = x, y, z
    for k in range(10):
        quadrics[b, k] += quadrics[a, k]
    return lost


@kernel
def _fold_cheapest(edges, most, price, points, normals, faces, wedges, uv, quadrics, alive, first, following):
    """Always the cheapest, until at most `most` faces are left. What is refused comes back at the price of what it takes."""
    version = np.zeros(len(points), np.int32)
    heap = [(0.0, np.int32(0), np.int32(0), np.int32(0), np.int32(0))]  # cost, from, to, what it may do, sum of their versions
    heap.clear()
    for n in range(len(edges)):
        for way in range(2):
            a, b = edges[n, way], edges[n, 1 - way]
            heap.append((_best_place(quadrics, points, normals, a, b)[0], a, b, np.int32(STRICT), np.int32(0)))
    heapq.heapify(heap)
    left = len(faces)
    at_a, at_b = np.empty(left + 1, np.int64), np.empty(left + 1, np.int64)
    source, target = np.empty(16, np.int32), np.empty(16, np.int32)
    while left > most and len(heap) > 0:
        cost, a, b, may, versions = heapq.heappop(heap)
        if version[a] + version[b] != versions:  # they only grow
            continue
        tables = points, normals, faces, wedges, uv, quadrics, alive, first, following
        lost = _fold(a, b, may, *tables, at_a, at_b, source, target)
        if lost == 0:
            if may < PINCHING:
                whole = _best_place(quadrics, points, normals, a, b)[4]
                heapq.heappush(heap, (cost + (price[may + 1] - price[may]) * whole, a, b, np.int32(may + 1), versions))
            continue
        left -= lost
        version[b] += 1
        version[a] = -(2**30)  # no sum fits it any more
        for n in range(corners_at(b, first, following, faces, alive, at_b)):
            for step in range(1, 3):
                other = faces[at_b[n] // 3, (at_b[n] % 3 + step) % 3]
                versions = np.int32(version[b] + version[other])
                there, back = _best_place(quadrics, points, normals, b, other)[0], _best_place(quadrics, points, normals, other, b)[0]
                heapq.heappush(heap, (there, b, other, np.int32(STRICT), versions))
                heapq.heappush(heap, (back, other, b, np.int32(STRICT), versions))
