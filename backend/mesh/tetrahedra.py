"""A deformable tetrahedral grid around a surface (DMTet, Shen et al. 2021) and marching tetrahedra on it, differentiable by the values at
its nodes and by the nodes' places.

The grid is the body-centred cubic lattice: the corners and centres of cubes, and around each line between the centres of two neighbouring
cubes the four tetrahedra that it makes with the edges of the face between them. Its tetrahedra are all alike and nearly regular. Only what
lies near the surface is kept, in whole *diamonds*, the four tetrahedra around one line.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.spatial import cKDTree

from backend.mesh.mesh import Mesh
from backend.progress import Progress, silent

EDGES = np.array([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])  # of a tetrahedron, as pairs of its corners
SHORTEST = 3**0.5 / 2  # edge from a centre to a corner, in cubes; the other edges are 1
SAMPLES = 3.0  # points on the surface for each cube that it passes, to find the nearest triangle by
NEAREST = 6  # of these points are looked at
BATCH = 20_000  # points between two reports
LEAST = 1e-3  # cubes: a vertex keeps as much from the ends of its edge, or faces would have no area


@dataclass(frozen=True)
class Grid:
    """Nodes at `origin + cube * places / 2`: corners have even places, centres odd ones. All tetrahedra are positively oriented."""

    origin: Float[np.ndarray, "3"]
    cube: float  # side
    places: Int[np.ndarray, "n 3"]
    cells: Int[np.ndarray, "m 4"]
    edges: Int[np.ndarray, "e 2"]  # lower node first
    cell_edges: Int[np.ndarray, "m 6"]  # in the order of EDGES
    border: Bool[np.ndarray, "n"]  # nodes that miss some of their tetrahedra

    @property
    def nodes(self) -> Float[np.ndarray, "n 3"]:
        return self.origin + self.places * (self.cube / 2)


def grid_around(mesh: Mesh, cube: float, rings: int, progress: Progress = silent) -> tuple[Grid, Float[np.ndarray, "n"]]:
    """The tetrahedra that the surface cuts with `rings` rings of their neighbours, and the nodes' signed distance to the surface, negative
    inside. The mesh should be closed; inside is what it winds around."""
    vertices = mesh.vertices.astype(np.float64)
    margin = (rings + 2) * cube
    origin = vertices.min(0) - margin
    counts = np.ceil((vertices.max(0) + margin - origin) / cube).astype(int)
    progress(0.0, "Building the tetrahedral grid")
    corners = _inside(vertices, mesh.faces, origin, cube, counts + 1)
    centres = _inside(vertices, mesh.faces, origin + cube / 2, cube, counts)
    diamonds = [_mixed(corners, centres, axis) for axis in range(3)]
    for _ in range(rings):
        near_corners, near_centres = _nodes_of(diamonds, corners.shape, centres.shape)
        diamonds = [_any(near_corners, near_centres, axis) for axis in range(3)]
    progress(0.2, "Building the tetrahedral grid")
    grid = _build(diamonds, origin, cube, corners.shape, centres.shape)
    at_corner = (grid.places[:, 0] & 1) == 0
    inside = np.empty(len(grid.places), bool)
    inside[at_corner] = corners[tuple((grid.places[at_corner] // 2).T)]
    inside[~at_corner] = centres[tuple((grid.places[~at_corner] // 2).T)]
    return grid, distance_to(mesh, grid.nodes, cube, progress) * np.where(inside, -1, 1)


def whole_grid(origin: Float[np.ndarray, "3"], cube: float, counts: tuple[int, int, int]) -> Grid:
    """All diamonds between `counts` cubes along the axes."""
    diamonds = [np.ones(tuple(n - (k == axis) for k, n in enumerate(counts)), bool) for axis in range(3)]
    return _build(diamonds, np.asarray(origin, np.float64), cube, tuple(n + 1 for n in counts), counts)


def distance_to(mesh: Mesh, points: Float[np.ndarray, "n 3"], cube: float, progress: Progress = silent) -> Float[np.ndarray, "n"]:
    """Distance of points to the triangles near them: exact to the nearest of those whose samples are nearest."""
    corners = mesh.vertices.astype(np.float64)[mesh.faces]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2
    count = int(np.clip(SAMPLES * area.sum() / cube**2, 1000, 1_000_000))
    random = np.random.default_rng(0)
    along = (np.arange(count) + random.random(count)) / count * area.sum()
    face = np.concatenate([np.arange(len(area)), np.minimum(np.searchsorted(np.cumsum(area), along), len(area) - 1)])
    root, share = np.sqrt(random.random(len(face)))[:, None], random.random(len(face))[:, None]
    a, b, c = corners[face, 0], corners[face, 1], corners[face, 2]
    samples = a * (1 - root) + b * root * (1 - share) + c * root * share
    tree, best = cKDTree(samples), np.full(len(points), np.inf)
    for first in range(0, len(points), BATCH):
        progress(0.4 + 0.6 * first / len(points), "Building the tetrahedral grid")
        part = slice(first, first + BATCH)
        nearest = tree.query(points[part], NEAREST, workers=-1)[1]
        for k in range(NEAREST):
            best[part] = np.minimum(best[part], _to_triangles(points[part], corners[face[nearest[:, k]]]))
    return best


def _to_triangles(points, corners):
    """Distance of each point to its own triangle."""
    best = np.full(len(points), np.inf)
    for k in range(3):
        start, along = corners[:, k], corners[:, (k + 1) % 3] - corners[:, k]
        share = np.clip(((points - start) * along).sum(1) / np.maximum((along**2).sum(1), 1e-30), 0, 1)
        best = np.minimum(best, np.linalg.norm(points - start - share[:, None] * along, axis=1))
    u, v, w = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0], points - corners[:, 0]
    normal = np.cross(u, v)
    square = np.maximum((normal**2).sum(1), 1e-30)
    p, q = (np.cross(w, v) * normal).sum(1) / square, (np.cross(u, w) * normal).sum(1) / square
    over = (p >= 0) & (q >= 0) & (p + q <= 1)
    return np.where(over, np.minimum(best, np.abs((w * normal).sum(1)) / np.sqrt(square)), best)


def _inside(vertices, faces, origin, cube, counts):
    """Which points of a cubic lattice the surface winds around, by its crossings with the lattice's lines along Z."""
    # Irrational, so that no line meets an edge
    shifted = (vertices - origin) / cube + np.array([1.7320508e-6, 1.4142136e-6, 0])
    corners = shifted[faces]
    low = np.maximum(np.ceil(corners[:, :, :2].min(1)).astype(int), 0)
    high = np.minimum(np.floor(corners[:, :, :2].max(1)).astype(int), np.asarray(counts[:2]) - 1)
    sizes = np.maximum(high - low + 1, 0)
    per_face = sizes[:, 0] * sizes[:, 1]
    face = np.repeat(np.arange(len(faces)), per_face)
    number = np.arange(len(face)) - np.repeat(np.cumsum(per_face) - per_face, per_face)
    x, y = low[face, 0] + number // sizes[face, 1], low[face, 1] + number % sizes[face, 1]
    a, b, c = (corners[face, k] for k in range(3))

    def turn(p, q):
        return (q[:, 0] - p[:, 0]) * (y - p[:, 1]) - (q[:, 1] - p[:, 1]) * (x - p[:, 0])

    wa, wb, wc = turn(b, c), turn(c, a), turn(a, b)
    total = wa + wb + wc
    hit = ((wa > 0) & (wb > 0) & (wc > 0)) | ((wa < 0) & (wb < 0) & (wc < 0))
    x, y, total = x[hit], y[hit], total[hit]
    z = (wa[hit] * a[hit, 2] + wb[hit] * b[hit, 2] + wc[hit] * c[hit, 2]) / total
    below = np.clip(np.ceil(z).astype(int), 0, counts[2])  # points of the line that lie below the crossing
    steps = np.zeros((counts[0], counts[1], counts[2] + 1), np.int32)
    np.add.at(steps, (x, y, below), np.where(total > 0, 1, -1))  # the face looks up
    return np.cumsum(steps[:, :, ::-1], 2)[:, :, ::-1][:, :, 1:] > 0


def _parts(corners, centres, axis):
    """For each diamond along an axis, the values at its two centres and at the face's corners, in turn around the axis."""
    u, v = (axis + 1) % 3, (axis + 2) % 3

    def cut(values, starts, stops):
        return values[tuple(slice(starts.get(k, None), stops.get(k, None)) for k in range(3))]

    found = [cut(centres, {}, {axis: -1}), cut(centres, {axis: 1}, {})]
    for du, dv in ((0, 0), (1, 0), (1, 1), (0, 1)):
        starts, stops = {axis: 1}, {axis: -1}
        for k, d in ((u, du), (v, dv)):
            starts, stops = {**starts, k: d}, {**stops, k: None if d else -1}
        found.append(cut(corners, starts, stops))
    return found


def _any(corners, centres, axis):
    return np.logical_or.reduce(_parts(corners, centres, axis))


def _mixed(corners, centres, axis):
    return _any(corners, centres, axis) & ~np.logical_and.reduce(_parts(corners, centres, axis))


def _nodes_of(diamonds, corner_shape, centre_shape):
    corners, centres = np.zeros(corner_shape, bool), np.zeros(centre_shape, bool)
    for axis, chosen in enumerate(diamonds):
        for part in _parts(corners, centres, axis):
            part |= chosen
    return corners, centres


def _build(diamonds, origin, cube, corner_shape, centre_shape):
    corner_count = int(np.prod(corner_shape))
    corners = np.arange(corner_count, dtype=np.int64).reshape(corner_shape)
    centres = corner_count + np.arange(int(np.prod(centre_shape)), dtype=np.int64).reshape(centre_shape)
    found = []
    for axis, chosen in enumerate(diamonds):
        one, two, *around = (part[chosen] for part in _parts(corners, centres, axis))
        found += [np.stack([one, two, around[k], around[(k + 1) % 4]], 1) for k in range(4)]
    cells = np.concatenate(found)
    nodes, cells = np.unique(cells, return_inverse=True)
    cells = cells.reshape(-1, 4)
    places = np.empty((len(nodes), 3), np.int64)
    at_corner = nodes < corner_count
    places[at_corner] = 2 * np.stack(np.unravel_index(nodes[at_corner], corner_shape), 1)
    places[~at_corner] = 2 * np.stack(np.unravel_index(nodes[~at_corner] - corner_count, centre_shape), 1) + 1
    pairs = np.sort(cells[:, EDGES], 2).reshape(-1, 2)
    keys, which = np.unique(pairs[:, 0] * len(nodes) + pairs[:, 1], return_inverse=True)
    edges = np.stack([keys // len(nodes), keys % len(nodes)], 1)
    border = np.bincount(cells.reshape(-1), minlength=len(nodes)) < 24  # tetrahedra around a node of the whole lattice
    return Grid(origin, cube, places, cells, edges, which.reshape(-1, 6), border)


def _cases():
    """For each of the 16 sets of inside corners its triangles as edges, counter-clockwise from outside."""
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1.0]])  # positively oriented
    middles = corners[EDGES].mean(1)
    count, triangles = np.zeros(16, np.int64), np.zeros((16, 2, 3), np.int64)
    for case in range(1, 15):
        inside = np.array([bool(case >> k & 1) for k in range(4)])
        cut = [n for n, (a, b) in enumerate(EDGES) if inside[a] != inside[b]]
        if len(cut) == 4:  # two edges that share no corner are not neighbours in the loop
            other = next(n for n in cut[1:] if not set(EDGES[n]) & set(EDGES[cut[0]]))
            rest = [n for n in cut[1:] if n != other]
            found = [[cut[0], rest[0], other], [cut[0], other, rest[1]]]
        else:
            found = [cut]
        away = corners[~inside].mean(0) - corners[inside].mean(0)
        for loop in found:
            a, b, c = middles[loop]
            triangles[case, count[case]] = loop if np.cross(b - a, c - a) @ away > 0 else loop[::-1]
            count[case] += 1
    return count, triangles


COUNT, TRIANGLES = _cases()


@dataclass(frozen=True)
class Cut:
    """How a surface passes the grid: one vertex on each of `edges`, from its inner to its outer node, and the faces between them."""

    edges: Int[torch.Tensor, "v 2"]
    faces: Int[torch.Tensor, "f 3"]

    def vertices(self, nodes: Float[torch.Tensor, "n 3"], values: Float[torch.Tensor, "n"]) -> Float[torch.Tensor, "v 3"]:
        """Where the values, linear along each edge, are zero. Values that have changed sign since the cut was made count as nearly zero,
        and are still given gradients, so that they may go on."""
        inner, outer = values[self.edges[:, 0]], values[self.edges[:, 1]]
        inner = inner + (inner.clamp_max(-LEAST) - inner).detach()
        outer = outer + (outer.clamp_min(LEAST) - outer).detach()
        share = (inner / (inner - outer))[:, None]
        return nodes[self.edges[:, 0]] * (1 - share) + nodes[self.edges[:, 1]] * share


def cut(grid: Grid, inside: Bool[np.ndarray, "n"], device: str = "cpu") -> Cut:
    """Marching tetrahedra (Doi and Koide 1991): closed and manifold where no border node's neighbour differs from it."""
    case = (inside[grid.cells] << np.arange(4)).sum(1)
    crossed = inside[grid.edges[:, 0]] != inside[grid.edges[:, 1]]
    number = np.cumsum(crossed) - 1
    edges = grid.edges[crossed]
    edges = np.where(inside[edges[:, :1]], edges, edges[:, ::-1])
    faces = []
    for n in range(2):
        has = np.flatnonzero(COUNT[case] > n)
        faces.append(np.take_along_axis(number[grid.cell_edges[has]], TRIANGLES[case[has], n], 1))
    return Cut(torch.as_tensor(edges, device=device), torch.as_tensor(np.concatenate(faces), device=device))
