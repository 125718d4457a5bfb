"""How a surface moves through pictures of a moving subject: an embedded deformation graph that follows depth, silhouettes and colour.

The graph is that of Sumner et al. 2007 (sections 3 and 4: nodes, blending, rigidity), solved by Gauss-Newton against every view of a
moment at once, moment after moment outwards from the rest pose, as in DynamicFusion (Newcombe et al. 2015, section 3.3). Colours of the
surface are those of the rest pose throughout, so that errors do not add up. Unit frame; only the pictures tell of the motion.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numba import prange
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components, dijkstra
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from backend.mesh import raster
from backend.mesh.mesh import Mesh
from backend.progress import Progress, silent
from backend.splats.motion import Binding, Motion
from backend.splats.parallel import kernel, parallel_kernel
from backend.views.sequence import ViewSequence
from backend.views.views import Views
from protocol import recipes

CARRIERS = 5  # nodes that carry a point
NEIGHBOURS = 8  # nodes that a node is held to
SAMPLES = 9000  # points of the surface that are matched with the pictures
CLOUD = 5000  # of the points that the views see, those that look for the surface
OPEN_REACH = 0.05  # of the subject's extent: surfaces that face each other nearer than this count as touching
CELLS = (40, 50, 65)  # along the subject's extent, to measure its area by
HIDING = 2.0  # what hidden area weighs against touching area
TIE = 0.02  # moments whose openness differs less are equally open

# What is weighed against what. Residuals are lengths in the unit frame; a node's surroundings weigh 1 altogether.
COLOUR = 0.12  # unit-frame length that a colour difference of 1 counts as
OUTLINE = 0.5  # weight of what draws points into the silhouette
MATCH = 0.3  # weight of closest points
RIGID = 0.3  # weight of a node's neighbours, by p.rigidity_weight
STEADY = 0.05  # weight of a node's expected place, by p.smoothness_weight
HIDDEN = 4.0  # how many times longer ways are across what no view sees at rest: it may be nothing but the gap between two parts
UNSEEN = 0.1  # weight of what no view sees at rest
YIELD = 0.7  # share of a strain that is there already which the graph takes for its own shape: parts may stretch and shrink for good
BEND = 0.08  # of an edge's length: what a joint may strain before it gives way


@dataclass(frozen=True)
class Stage:
    """Some Gauss-Newton steps. blur: of the pictures, pixels, or None for closest points alone. reach: how far a point may be from what it
    is matched with. rigidity: factor on RIGID."""

    steps: int
    blur: int | None
    reach: float
    rigidity: float


STAGES = (Stage(4, None, 0.3, 4.0), Stage(3, 0, 0.1, 2.0), Stage(3, 1, 0.06, 1.0), Stage(4, 2, 0.04, 0.5))
AGAIN = (Stage(3, 2, 0.04, 0.5),)
BLURS = (4.0, 2.0, 0.8)  # standard deviations, pixels of a 256-pixel picture


def most_open(views: ViewSequence, progress: Progress = silent) -> int:
    """The moment at which the least surface faces other surface closely, and the most is to be seen; of equals, nearest to the middle.

    What is pressed together hides some of it: the area counts too, as parts that touch would be one in the mesh.
    """
    moments, extent = len(views), 0.0
    for moment in range(moments):
        progress(0.3 * moment / moments, f"Moment {moment + 1} of {moments}")
        points, _, _ = _cloud(views.at(moment))
        extent = max(extent, float(np.ptp(points, axis=0).max())) if len(points) else extent
    areas, contacts = np.zeros(moments), np.ones(moments)
    for moment in range(moments):  # read anew: the points of hundreds of moments would not fit into memory
        progress(0.3 + 0.7 * moment / moments, f"Moment {moment + 1} of {moments}")
        points, normals, _ = _cloud(views.at(moment))
        if len(points) == 0:
            continue
        for cells in CELLS:  # the cells that the surface meets; several sizes, as each lies on the grid by chance
            _, first = np.unique(np.round(points * (cells / extent)).astype(np.int64), axis=0, return_index=True)
            areas[moment] += len(first) / cells**2
        points, normals = points[first], normals[first]
        pairs = cKDTree(points).query_pairs(OPEN_REACH * extent, output_type="ndarray")
        towards = points[pairs[:, 1]] - points[pairs[:, 0]]
        ahead = np.minimum((towards * normals[pairs[:, 0]]).sum(1), -(towards * normals[pairs[:, 1]]).sum(1))
        facing = (ahead > 0.5 * np.linalg.norm(towards, axis=1)) & ((normals[pairs[:, 0]] * normals[pairs[:, 1]]).sum(1) < -0.3)
        contacts[moment] = len(np.unique(pairs[facing])) / len(points)
    closed = contacts + HIDING * (1 - areas / areas.max())
    closed = np.convolve(np.pad(closed, 1, mode="edge"), np.full(3, 1 / 3), "valid")  # other cameras see other parts: that is no motion
    middle = np.abs(np.arange(moments) - (moments - 1) / 2)
    return int(np.argmin(np.where(closed <= closed.min() + TIE, middle, np.inf)))


def follow(surface: Mesh, views: ViewSequence, rest: int, p: recipes.FitMotion, seed: int, progress: Progress = silent) -> Motion:
    """The motion of `surface`, which is the subject at the moment `rest`. Views need depth and normals; held-out ones are not used."""
    progress(0.0, "Placing nodes")
    random = np.random.default_rng(seed)
    at_rest = _Pictures.of(views.at(rest))
    graph = _Graph.on(surface, at_rest, p.nodes, random)
    moments, count = len(views), len(graph.nodes)
    rotations, translations = np.tile(np.eye(3), (moments, count, 1, 1)), np.zeros((moments, count, 3))
    tracker = _Tracker(surface, graph, p)
    order = [(moment, moment - 1) for moment in range(rest + 1, moments)] + [(moment, moment + 1) for moment in range(rest - 1, -1, -1)]
    done, told, total = 0, time.monotonic(), len(order) * (len(STAGES) + len(AGAIN)) - 2 * len(AGAIN)
    pictures: dict[int, _Pictures] = {}  # of the newest two moments alone: hundreds of them would not fit into memory

    def pass_over(moment: int, stages: tuple[Stage, ...], state, expected, own) -> None:
        nonlocal done, told
        for stage in stages:
            state = tracker.steps(stage, pictures[moment], state, expected, own, p.smoothness_weight * STEADY)
            rotations[moment], translations[moment] = state
            done += 1
            preview = None
            if time.monotonic() - told > 1:
                told = time.monotonic()
                preview = tracker.picture(pictures[moment], rotations[moment], translations[moment])
            progress(0.02 + 0.98 * done / max(total, 1), f"Frame {views.frames[moment]:g}", preview)

    for moment, last in order:
        pictures = {one: pictures[one] for one in pictures if one == last}
        pictures[moment] = _Pictures.of(views.at(moment))
        earlier = 2 * last - moment
        turned, moved = rotations[last], translations[last]
        if 0 <= earlier < moments and last != rest:  # keeps its speed
            turned = turned @ np.swapaxes(rotations[earlier], 1, 2) @ turned
            moved = 2 * moved - translations[earlier]
        elif last == rest and 0 <= 2 * rest - moment < moments and translations[2 * rest - moment].any():  # the other way, backwards
            turned, moved = np.swapaxes(rotations[2 * rest - moment], 1, 2), -translations[2 * rest - moment]
        pass_over(moment, STAGES, (turned, moved), (turned, moved), (rotations[last], translations[last]))
        if last != rest:  # again, now that what comes after it is known too
            expected = _halfway((rotations[earlier], translations[earlier]), (rotations[moment], translations[moment]))
            own = rotations[last].copy(), translations[last].copy()
            pass_over(last, AGAIN, own, expected, own)
    quaternions = Rotation.from_matrix(rotations.reshape(-1, 3, 3)).as_quat(canonical=True)[:, [3, 0, 1, 2]]
    return Motion(
        rest,
        graph.nodes.astype(np.float32),
        quaternions.reshape(moments, count, 4).astype(np.float32),
        translations.astype(np.float32),
        surface.vertices.astype(np.float32),
        graph.anchoring,
    )


def _halfway(first, second):
    """Rotations and translations halfway between two moments."""
    between = Rotation.from_matrix(np.swapaxes(first[0], 1, 2) @ second[0]).as_rotvec()
    return first[0] @ Rotation.from_rotvec(between / 2).as_matrix(), (first[1] + second[1]) / 2


def _cloud(seen: Views) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "n 3"], Float[np.ndarray, "n 3"]]:
    """Points, normals and colours of all pixels that show the subject."""
    points, normals, colours = [], [], []
    for i, camera in enumerate(seen.cameras):
        hit = (seen.depth[i] > 0) & (seen.alpha[i] > 0.5)
        points.append(camera.unproject(seen.depth[i])[hit])
        normals.append(seen.normals[i][hit].astype(np.float64))
        colours.append(seen.images[i][hit].astype(np.float64))
    return np.concatenate(points), np.concatenate(normals), np.concatenate(colours)


@dataclass(frozen=True)
class _Graph:
    """Nodes on the rest surface, and the points that are matched with pictures.

    edges: pairs (i, j): j is held where i expects it. share: what each sample weighs, 1 a node altogether. seen: 1, or UNSEEN where no view
    sees a sample at rest. colours, certain: what samples look like at rest, at each blur, and how sure that is (0 to 1). starts,
    columns: pattern of the normal equations' 6 x 6 blocks, by rows. slots: the block of each pair of a sample's carriers. edge_slots:
    blocks (i,i), (i,j), (j,i), (j,j).
    """

    nodes: Float[np.ndarray, "m 3"]
    edges: Int[np.ndarray, "e 2"]
    anchoring: Binding
    faces: Int[np.ndarray, "s"]
    corners: Float[np.ndarray, "s 3"]
    points: Float[np.ndarray, "s 3"]
    carriers: Int[np.ndarray, "s k"]
    weights: Float[np.ndarray, "s k"]
    share: float
    seen: Float[np.ndarray, "s"]
    colours: Float[np.ndarray, "l s 3"]
    certain: Float[np.ndarray, "l s"]
    starts: Int[np.ndarray, "m+1"]
    columns: Int[np.ndarray, "b"]
    diagonal: Int[np.ndarray, "m"]
    slots: Int[np.ndarray, "s k k"]
    edge_slots: Int[np.ndarray, "e 4"]

    @staticmethod
    def on(surface: Mesh, at_rest: _Pictures, nodes: int, random: np.random.Generator) -> _Graph:
        vertices, faces = surface.vertices.astype(np.float64), surface.faces
        normals = _face_normals(vertices, faces)
        smooth = np.zeros_like(vertices)
        for corner in range(3):
            np.add.at(smooth, faces[:, corner], normals)
        smooth /= np.maximum(np.linalg.norm(smooth, axis=1, keepdims=True), 1e-12)
        _, _, open_ = at_rest.colours_of(vertices, smooth)
        ways = _ways(vertices, faces)
        places = _spread(ways, min(nodes, len(vertices)), vertices)
        edge = ways.tocoo()
        longer = 1 + (HIDDEN - 1) * (1 - (open_[edge.row] + open_[edge.col]) / 2)
        ways = coo_matrix((edge.data * longer, (edge.row, edge.col)), edge.shape).tocsr()
        distance = dijkstra(ways, indices=places)
        anchoring = _bind(distance, CARRIERS)
        face, corners = _sample(vertices, faces, SAMPLES, random)
        points = (vertices[faces[face]] * corners[..., None]).sum(1)
        from_corner = np.linalg.norm(vertices[faces[face]] - points[:, None], axis=2)
        binding = _bind(np.min([distance[:, faces[face, c]] + from_corner[:, c] for c in range(3)], axis=0), CARRIERS)
        edges = _edges(distance[:, places], vertices[places])
        colours, certain, seen = at_rest.colours_of(points, normals[face])
        carriers = binding.nodes.astype(np.int64)
        count = len(places)
        pairs = carriers[:, :, None] * count + carriers[:, None, :]
        held = np.stack([edges[:, a] * count + edges[:, b] for a, b in ((0, 0), (0, 1), (1, 0), (1, 1))], 1)
        alone = np.arange(count) * (count + 1)
        used = np.unique(np.concatenate([pairs.ravel(), held.ravel(), alone]))
        starts = np.searchsorted(used, np.arange(count + 1) * count)
        return _Graph(
            nodes=vertices[places],
            edges=edges,
            anchoring=anchoring,
            faces=face,
            corners=corners,
            points=points,
            carriers=carriers,
            weights=binding.weights.astype(np.float64),
            share=count / len(points),
            seen=UNSEEN + (1 - UNSEEN) * seen,
            colours=colours,
            certain=certain,
            starts=starts,
            columns=used % count,
            diagonal=np.searchsorted(used, alone),
            slots=np.searchsorted(used, pairs),
            edge_slots=np.searchsorted(used, held),
        )


def _ways(vertices, faces):
    """The mesh's edges as a graph of their lengths, both ways, and across each edge to the opposite corner, so that ways are straighter."""
    sides = np.concatenate([faces[:, [0, 1, 2]], faces[:, [1, 2, 0]], faces[:, [2, 0, 1]]]).astype(np.int64)
    sides = sides[np.lexsort((np.maximum(sides[:, 0], sides[:, 1]), np.minimum(sides[:, 0], sides[:, 1])))]
    low, high = np.minimum(sides[:, 0], sides[:, 1]), np.maximum(sides[:, 0], sides[:, 1])
    twin = np.flatnonzero((low[1:] == low[:-1]) & (high[1:] == high[:-1]))
    a, b, p, q = low[twin], high[twin], sides[twin, 2], sides[twin + 1, 2]
    # unfolded into a plane, from corner to corner; where that line leaves the two triangles it is shorter than any way, so it is left out
    axis = vertices[b] - vertices[a]
    long = np.maximum(np.linalg.norm(axis, axis=1), 1e-12)
    along = [((vertices[o] - vertices[a]) * axis).sum(1) / long for o in (p, q)]
    away = [np.sqrt(np.maximum(((vertices[o] - vertices[a]) ** 2).sum(1) - x**2, 0)) for o, x in zip((p, q), along)]
    crossing = along[0] + (along[1] - along[0]) * away[0] / np.maximum(away[0] + away[1], 1e-12)
    inside = (crossing > 0) & (crossing < long) & (p != q)
    length = np.hypot(along[1] - along[0], away[0] + away[1])[inside]
    one, two = np.concatenate([low, p[inside]]), np.concatenate([high, q[inside]])
    weight = np.concatenate([np.linalg.norm(vertices[low] - vertices[high], axis=1), length])
    first, second = np.minimum(one, two), np.maximum(one, two)
    _, once = np.unique(first * len(vertices) + second, return_index=True)
    first, second, weight = first[once], second[once], np.maximum(weight[once], 1e-9)
    shape = (len(vertices), len(vertices))
    return coo_matrix((np.tile(weight, 2), (np.concatenate([first, second]), np.concatenate([second, first]))), shape).tocsr()


def _spread(ways, count, vertices):
    """Vertices far from one another along the surface (farthest point sampling), every piece among them."""
    start = int(np.argmax(((vertices - vertices.mean(0)) ** 2).sum(1)))
    chosen, nearest = [start], dijkstra(ways, indices=start)
    while len(chosen) < count:
        following = int(np.argmax(nearest))
        if nearest[following] <= 0:
            break
        reach = float(nearest[following])
        chosen.append(following)
        nearest = np.minimum(nearest, dijkstra(ways, indices=following, limit=reach))
    return np.array(chosen)


def _bind(distance: Float[np.ndarray, "m n"], several: int) -> Binding:
    """The nearest nodes of each point; weights fall to 0 at the first node that is not among them (Sumner et al. 2007, section 3)."""
    several = min(several, max(len(distance) - 1, 1))
    nearest = np.argsort(distance, axis=0, kind="stable")[: several + 1].T
    length = np.take_along_axis(distance.T, nearest, 1)
    there = np.isfinite(length[:, :several])
    there[:, 0] = True
    farthest = np.where(np.isfinite(length), length, 0).max(1) * 1.001 + 1e-9
    if length.shape[1] > several:
        beyond = length[:, several]
        farthest = np.where(np.isfinite(beyond), beyond, farthest * 1.2) + 1e-9
    weights = np.where(there, np.maximum(1 - np.where(there, length[:, :several], 0) / farthest[:, None], 0) ** 2, 0)
    weights[:, 0] = np.maximum(weights[:, 0], 1e-6)
    weights /= weights.sum(1, keepdims=True)
    nodes = np.where(there, nearest[:, :several], nearest[:, :1])
    return Binding(nodes.astype(np.int32), weights.astype(np.float32))


def _sample(vertices, faces, count, random):
    """Faces and places on them, evenly by area."""
    corner = vertices[faces]
    area = np.linalg.norm(np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), axis=1)
    steps = (np.arange(count) + random.random(count)) / count
    face = np.minimum(np.searchsorted(np.cumsum(area) / area.sum(), steps), len(faces) - 1)
    root, other = np.sqrt(random.random(count)), random.random(count)
    return face, np.stack([1 - root, root * (1 - other), root * other], 1)


def _edges(distance, nodes):
    """Each node with its nearest along the surface; pieces of few nodes with those nearest through the air, or they would be lost."""
    nearest = np.argsort(distance, axis=1, kind="stable")[:, 1 : NEIGHBOURS + 1]
    there = np.isfinite(np.take_along_axis(distance, nearest, 1))
    one = np.repeat(np.arange(len(nodes)), nearest.shape[1])[there.ravel()]
    two = nearest[there]
    _, piece = connected_components(coo_matrix((np.ones(len(one)), (one, two)), (len(nodes), len(nodes))), directed=False)
    size = np.bincount(piece)[piece]
    lost = np.flatnonzero(size < 3)
    if len(lost) and len(lost) < len(nodes):
        rest = np.flatnonzero(size >= 3)
        _, near = cKDTree(nodes[rest]).query(nodes[lost], min(3, len(rest)))
        near = rest[near].reshape(len(lost), -1)
        one = np.concatenate([one, np.repeat(lost, near.shape[1])])
        two = np.concatenate([two, near.ravel()])
    both = np.unique(np.concatenate([one * len(nodes) + two, two * len(nodes) + one]))
    return np.stack([both // len(nodes), both % len(nodes)], 1)


@dataclass(frozen=True)
class _Pictures:
    """The views of a moment, ready to be matched.

    poses: camera_from_world. lenses: fx, fy, cx, cy. levels: of BLURS, colour and its slopes along x and y (v h w 9). clear: pixels from
    the nearest edge of something, 0 outside. inward: the way to the silhouette's nearest pixel, pixels. cloud: points seen, their normals
    and colours.
    """

    seen: Views
    poses: Float[np.ndarray, "v 4 4"]
    lenses: Float[np.ndarray, "v 4"]
    depth: Float[np.ndarray, "v h w"]
    normals: Float[np.ndarray, "v h w 3"]
    levels: list[Float[np.ndarray, "v h w 9"]]
    clear: Float[np.ndarray, "v h w"]
    inward: Float[np.ndarray, "v h w 2"]
    cloud: tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "n 3"], Float[np.ndarray, "n 3"]]

    @staticmethod
    def of(seen: Views) -> _Pictures:
        there = (seen.depth > 0) & (seen.alpha > 0.5)
        depth = np.where(there, seen.depth, 0).astype(np.float32)
        factor = seen.alpha.shape[2] / 256
        levels = []
        for blur in BLURS:
            level = np.zeros((*there.shape, 9), np.float32)
            for i in range(len(there)):
                cover = gaussian_filter(there[i].astype(np.float32), blur * factor, truncate=2.5)
                for c in range(3):
                    color = gaussian_filter(np.where(there[i], seen.images[i, ..., c], 0), blur * factor, truncate=2.5)
                    color = color / np.maximum(cover, 1e-4)
                    level[i, ..., c] = color
                    level[i, 1:-1, :, 6 + c] = (color[2:] - color[:-2]) / 2
                    level[i, :, 1:-1, 3 + c] = (color[:, 2:] - color[:, :-2]) / 2
            levels.append(level)
        clear, inward = np.zeros(there.shape, np.float32), np.zeros((*there.shape, 2), np.float32)
        rows, columns = np.indices(there.shape[1:])
        for i in range(len(there)):
            jump = 6 * depth[i] / seen.cameras[i].fx + 0.01
            edge = ~there[i]
            for axis in (0, 1):
                for step in (1, -1):
                    edge |= depth[i] - np.roll(depth[i], step, axis) > jump
                    edge |= np.roll(depth[i], step, axis) - depth[i] > jump
            clear[i] = distance_transform_edt(~edge)
            if there[i].any():
                nearest = distance_transform_edt(~there[i], return_distances=False, return_indices=True)
                inward[i] = np.stack([nearest[1] - columns, nearest[0] - rows], -1)
        points, normals, colours = _cloud(seen)
        if len(points) > CLOUD:  # thinned evenly: one of each small cell and side
            size = math.sqrt(np.prod(np.sort(np.ptp(points, axis=0))[1:]) * 4 / CLOUD)
            cells = np.concatenate([np.floor(points / size), normals > 0], 1).astype(np.int64)
            _, first = np.unique(cells, axis=0, return_index=True)
            first = np.sort(first)[:: max(1, len(first) // CLOUD)]
            points, normals, colours = points[first], normals[first], colours[first]
        return _Pictures(
            seen,
            np.stack([camera.camera_from_world for camera in seen.cameras]),
            np.array([(camera.fx, camera.fy, camera.cx, camera.cy) for camera in seen.cameras]),
            depth,
            seen.normals.astype(np.float32),
            levels,
            clear / np.float32(factor),
            inward,
            (points, normals, colours),
        )

    def colours_of(self, points: Float[np.ndarray, "n 3"], normals: Float[np.ndarray, "n 3"]):
        """What points of a surface look like at each blur, how sure that is (0: no view sees them well), and whether any view sees them."""
        return _colours(points, normals, self.poses, self.lenses, self.depth, self.clear, np.stack(self.levels), np.array(BLURS))


def _face_normals(vertices, faces):
    corner = vertices[faces]
    normals = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)


class _Tracker:
    """Brings the nodes' transforms to what the pictures of a moment show, some steps at a time."""

    def __init__(self, surface: Mesh, graph: _Graph, p: recipes.FitMotion):
        self.surface, self.graph, self.colours, self.certain = surface, graph, graph.colours, graph.certain
        bound = graph.anchoring
        self.anchors = surface.vertices.astype(np.float64), bound.nodes.astype(np.int64), bound.weights.astype(np.float64)
        self.blocks = np.zeros((len(graph.columns), 6, 6))
        self.rigid = RIGID * p.rigidity_weight
        self.arms = graph.nodes[graph.edges[:, 1]] - graph.nodes[graph.edges[:, 0]]
        length = np.linalg.norm(graph.nodes[graph.edges[:, 0]] - graph.nodes[graph.edges[:, 1]], axis=1)
        self.give = BEND * length.mean()
        self.edge_weight = np.bincount(graph.edges[:, 0], minlength=len(graph.nodes))[graph.edges[:, 0]] ** -1.0

    def vertices(self, rotations, translations):
        points, nodes, weights = self.anchors
        return _deform(points, nodes, weights, self.graph.nodes, rotations, translations)

    def steps(self, stage: Stage, pictures: _Pictures, state, expected, shape, steady: float):
        """`state` after a stage's steps. expected: where the temporal term draws it. shape: a state whose strains have yielded."""
        graph = self.graph
        one, two = graph.edges.T
        strained = graph.nodes[two] + shape[1][two] - graph.nodes[one] - shape[1][one]
        arms = (1 - YIELD) * self.arms + YIELD * np.einsum("eji,ej->ei", shape[0][one], strained)
        rotations, translations = state[0].copy(), state[1].copy()
        seen = pictures.seen
        for step in range(stage.steps):
            vertices = self.vertices(rotations, translations)
            normals = _face_normals(vertices, self.surface.faces)[graph.faces]
            points = _deform(graph.points, graph.carriers, graph.weights, graph.nodes, rotations, translations)
            system, gradient = np.zeros((len(points), 3, 3)), np.zeros((len(points), 3))
            if stage.blur is None:
                reach = stage.reach * 0.7**step
                _pull(system, gradient, *self._matches(points, normals, pictures, reach))
            else:
                if step % 2 == 0:
                    surface = Mesh(vertices, self.surface.faces)
                    front = np.stack([raster.depth(surface, camera)[0] for camera in seen.cameras])
                _look(
                    system, gradient, points, normals, self.colours[stage.blur], self.certain[stage.blur], pictures.poses, pictures.lenses,
                    front, pictures.depth, pictures.normals, pictures.levels[stage.blur], pictures.clear, pictures.inward,
                    BLURS[stage.blur], stage.reach, COLOUR, OUTLINE,
                )  # fmt: skip
            system *= graph.seen[:, None, None]
            gradient *= graph.seen[:, None]
            right = np.zeros((len(graph.nodes), 6))
            self.blocks[:] = 0
            _data(self.blocks, right, points, graph.points, graph.carriers, graph.weights, graph.nodes, rotations,
                  graph.slots, system, gradient, graph.share)  # fmt: skip
            held = self.edge_weight * self.rigid * stage.rigidity
            _rigid(self.blocks, right, graph.nodes, arms, graph.edges, graph.edge_slots, held, rotations, translations, self.give)
            spread = self.give / BEND  # a turn of 1 moves what is around a node by about this
            away = Rotation.from_matrix(rotations @ np.swapaxes(expected[0], 1, 2)).as_rotvec()
            weight = np.repeat([steady * (0.5 * spread) ** 2, steady], 3)
            right += np.concatenate([away, translations - expected[1]], 1) * weight
            extra = weight + np.repeat([1e-4 * spread**2, 1e-4], 3)
            self.blocks[graph.diagonal[:, None], np.arange(6), np.arange(6)] += extra
            change = _solve(self.blocks, graph.starts, graph.columns, graph.diagonal, -right, 120, 1e-4)
            rotations = Rotation.from_rotvec(change[:, :3]).as_matrix() @ rotations
            translations = translations + change[:, 3:]
        return rotations, translations

    def _matches(self, points, normals, pictures: _Pictures, reach: float):
        """Closest points in place, direction and colour, both ways: sample, where it should be, the normal there, weight."""
        there, facing, look = pictures.cloud
        mine = np.concatenate([points, 0.1 * normals, 0.1 * self.colours[-1]], 1)
        others = np.concatenate([there, 0.1 * facing, 0.1 * look], 1)
        known = np.flatnonzero(self.certain[-1] > 0)
        some = known[::2] if len(known) else np.arange(len(points))
        _, near = cKDTree(others).query(mine[some], workers=-1)
        _, back = cKDTree(mine[some]).query(others[::2], workers=-1)
        sample = np.concatenate([some, some[back]])
        place = np.concatenate([there[near], there[::2]])
        normal = np.concatenate([facing[near], facing[::2]])
        apart = np.linalg.norm(place - points[sample], axis=1)
        weight = MATCH * 2 * np.maximum(1 - (apart / reach) ** 2, 0) ** 2 * ((normal * normals[sample]).sum(1) > 0.2)
        return points, sample, place, normal, weight * len(points) / len(sample)

    def picture(self, pictures: _Pictures, rotations, translations):
        """The followed surface beside what the first view shows."""
        camera = pictures.seen.cameras[0]
        _, face = raster.depth(Mesh(self.vertices(rotations, translations), self.surface.faces), camera)
        colour = np.zeros((len(self.surface.faces), 3), np.float32)
        colour[self.graph.faces] = self.colours[-1]
        drawn = np.where((face >= 0)[..., None], colour[np.maximum(face, 0)], 0)
        source = pictures.seen.images[0] * pictures.seen.alpha[0][..., None]
        return np.concatenate([source, drawn], 1).astype(np.float32)


@parallel_kernel
def _deform(points, carriers, weights, nodes, rotations, translations):
    """Sumner et al. 2007, eq. 2."""
    moved = np.zeros_like(points)
    for s in prange(len(points)):
        for k in range(carriers.shape[1]):
            n, w = carriers[s, k], weights[s, k]
            for i in range(3):
                place = nodes[n, i] + translations[n, i]
                for j in range(3):
                    place += rotations[n, i, j] * (points[s, j] - nodes[n, j])
                moved[s, i] += w * place
    return moved


@parallel_kernel
def _colours(points, normals, poses, lenses, depth, clear, levels, blurs):
    count, height, width = depth.shape
    colours = np.zeros((len(blurs), len(points), 3), np.float64)
    total = np.zeros((len(blurs), len(points)), np.float64)
    seen = np.zeros(len(points), np.float64)
    for s in prange(len(points)):
        for v in range(count):
            m = poses[v]
            x = m[0, 0] * points[s, 0] + m[0, 1] * points[s, 1] + m[0, 2] * points[s, 2] + m[0, 3]
            y = m[1, 0] * points[s, 0] + m[1, 1] * points[s, 1] + m[1, 2] * points[s, 2] + m[1, 3]
            z = m[2, 0] * points[s, 0] + m[2, 1] * points[s, 1] + m[2, 2] * points[s, 2] + m[2, 3]
            if z < 1e-3:
                continue
            facing = 0.0
            for i in range(3):
                facing -= (m[0, i] * x + m[1, i] * y + m[2, i] * z) * normals[s, i]
            facing /= np.sqrt(x * x + y * y + z * z)
            u, w = lenses[v, 0] * x / z + lenses[v, 2], lenses[v, 1] * y / z + lenses[v, 3]
            c, r = int(np.floor(u)), int(np.floor(w))
            if facing < 0.1 or c < 0 or r < 0 or c >= width or r >= height or depth[v, r, c] <= 0:
                continue
            if abs(depth[v, r, c] - z) > 0.02 / facing:
                continue
            seen[s] = 1.0
            if facing < 0.3:
                continue
            for level in range(len(blurs)):
                sure = facing * facing * min(max(clear[v, r, c] / blurs[level] - 0.5, 0.0), 1.0)
                if sure <= 0:
                    continue
                total[level, s] += sure
                for channel in range(3):
                    colours[level, s, channel] += sure * _between(levels[level, v], u - 0.5, w - 0.5, channel)
        for level in range(len(blurs)):
            for channel in range(3):
                colours[level, s, channel] /= max(total[level, s], 1e-9)
            total[level, s] = min(total[level, s] / 0.3, 1.0)
    return colours, total, seen


@kernel
def _between(picture, x, y, channel):
    """Bilinear, held at the borders."""
    height, width = picture.shape[:2]
    x, y = min(max(x, 0.0), width - 1.001), min(max(y, 0.0), height - 1.001)
    c, r = int(x), int(y)
    a, b = x - c, y - r
    top = picture[r, c, channel] * (1 - a) + picture[r, c + 1, channel] * a
    return top * (1 - b) + (picture[r + 1, c, channel] * (1 - a) + picture[r + 1, c + 1, channel] * a) * b


@parallel_kernel
def _look(
    system, gradient, points, normals, colours, certain, poses, lenses, front, depth, facing_there, level, clear, inward, blur, reach,
    colour, outline,
):  # fmt: skip
    """Adds what all views say of each sample: a quadratic in its movement d, d.system.d / 2 + gradient.d."""
    count, height, width = depth.shape
    for s in prange(len(points)):
        rows = np.zeros((3, 3))
        found = np.zeros(3)
        total = 0.0
        for v in range(count):
            m = poses[v]
            x = m[0, 0] * points[s, 0] + m[0, 1] * points[s, 1] + m[0, 2] * points[s, 2] + m[0, 3]
            y = m[1, 0] * points[s, 0] + m[1, 1] * points[s, 1] + m[1, 2] * points[s, 2] + m[1, 3]
            z = m[2, 0] * points[s, 0] + m[2, 1] * points[s, 1] + m[2, 2] * points[s, 2] + m[2, 3]
            if z < 1e-3:
                continue
            fx, fy = lenses[v, 0], lenses[v, 1]
            u, w = fx * x / z + lenses[v, 2], fy * y / z + lenses[v, 3]
            c, r = int(np.floor(u)), int(np.floor(w))
            if c < 0 or r < 0 or c >= width or r >= height:
                continue
            across = np.empty((2, 3))  # how far the pixel moves as the point does
            for i in range(3):
                across[0, i] = fx / z * (m[0, i] - x / z * m[2, i])
                across[1, i] = fy / z * (m[1, i] - y / z * m[2, i])
            if depth[v, r, c] <= 0:  # outside the silhouette: draw it in, at most as far as it may be off
                dx, dy = inward[v, r, c, 0], inward[v, r, c, 1]
                far = np.sqrt(dx * dx + dy * dy)
                if far > 0.5 and far * z / fx < 3 * reach:
                    size = z / fx
                    weight = outline / (1 + (far * size / reach) ** 2)
                    g = np.empty(3)
                    for i in range(3):
                        g[i] = size * (across[0, i] * dx + across[1, i] * dy) / far
                    for i in range(3):
                        for j in range(3):
                            rows[i, j] += weight * g[i] * g[j]
                        found[i] -= weight * g[i] * far * size
                    total += outline
                continue
            facing = 0.0
            for i in range(3):
                facing -= (m[0, i] * x + m[1, i] * y + m[2, i] * z) * normals[s, i]
            facing /= np.sqrt(x * x + y * y + z * z)
            if facing < 0.15 or front[v, r, c] < z - 0.02 - 2 * z / fx / facing:
                continue
            alike = 0.0
            for i in range(3):
                alike += normals[s, i] * facing_there[v, r, c, i]
            if alike < 0.4:
                continue
            away = z - depth[v, r, c]  # along the axis; the pixel's point on the plane of its normal
            px, py = (c + 0.5 - lenses[v, 2]) / fx * depth[v, r, c], (r + 0.5 - lenses[v, 3]) / fy * depth[v, r, c]
            distance = 0.0
            for i in range(3):
                distance += facing_there[v, r, c, i] * (m[0, i] * (x - px) + m[1, i] * (y - py) + m[2, i] * away)
            if abs(distance) > reach:
                continue
            slack = 1 - (distance / reach) ** 2
            weight = facing * slack * slack
            for i in range(3):
                for j in range(3):
                    rows[i, j] += weight * facing_there[v, r, c, i] * facing_there[v, r, c, j]
                found[i] += weight * facing_there[v, r, c, i] * distance
            total += facing
            sure = weight * certain[s] * min(max(clear[v, r, c] / blur - 0.5, 0.0), 1.0)
            if sure <= 0:
                continue
            difference = np.empty(3)
            size = 0.0
            for k in range(3):
                difference[k] = _between(level[v], u - 0.5, w - 0.5, k) - colours[s, k]
                size += difference[k] * difference[k]
            sure *= colour * colour / (1 + size / 0.04) ** 2
            for k in range(3):
                gx, gy = _between(level[v], u - 0.5, w - 0.5, 3 + k), _between(level[v], u - 0.5, w - 0.5, 6 + k)
                g = np.empty(3)
                for i in range(3):
                    g[i] = gx * across[0, i] + gy * across[1, i]
                for i in range(3):
                    for j in range(3):
                        rows[i, j] += sure * g[i] * g[j]
                    found[i] += sure * g[i] * difference[k]
        scale = 1 / max(total, 1.0)
        for i in range(3):
            for j in range(3):
                system[s, i, j] += scale * rows[i, j]
            gradient[s, i] += scale * found[i]


@kernel
def _pull(system, gradient, points, sample, place, normal, weight):
    """Adds closest points: to the plane, and a quarter as much to the point itself."""
    for n in range(len(sample)):
        s = sample[n]
        for i in range(3):
            for j in range(3):
                plane = normal[n, i] * normal[n, j] + (0.25 if i == j else 0.0)
                system[s, i, j] += weight[n] * plane
                gradient[s, i] += weight[n] * plane * (points[s, j] - place[n, j])


@kernel
def _turned(arm, x, y, z):
    """arm = the matrix that takes a small turn to the movement of a point at (x, y, z) from the node."""
    arm[0, 0], arm[0, 1], arm[0, 2] = 0.0, z, -y
    arm[1, 0], arm[1, 1], arm[1, 2] = -z, 0.0, x
    arm[2, 0], arm[2, 1], arm[2, 2] = y, -x, 0.0


@kernel
def _data(blocks, right, moved, points, carriers, weights, nodes, rotations, slots, system, gradient, share):
    """Adds the samples' quadratics, as quadratics of their nodes' turns and translations."""
    several = carriers.shape[1]
    arms, product = np.zeros((several, 3, 3)), np.zeros((3, 3))
    for s in range(len(points)):
        strength = system[s, 0, 0] + system[s, 1, 1] + system[s, 2, 2]
        if strength == 0:
            continue
        for a in range(several):
            n = carriers[s, a]
            x, y, z = 0.0, 0.0, 0.0
            for j in range(3):
                d = points[s, j] - nodes[n, j]
                x += rotations[n, 0, j] * d
                y += rotations[n, 1, j] * d
                z += rotations[n, 2, j] * d
            _turned(arms[a], x, y, z)
            w = weights[s, a] * share
            for i in range(3):
                turn = 0.0
                for j in range(3):
                    turn += arms[a, j, i] * gradient[s, j]
                right[n, i] += w * turn
                right[n, 3 + i] += w * gradient[s, i]
        for b in range(several):
            if weights[s, b] == 0:
                continue
            for i in range(3):
                for j in range(3):
                    product[i, j] = system[s, i, 0] * arms[b, 0, j] + system[s, i, 1] * arms[b, 1, j] + system[s, i, 2] * arms[b, 2, j]
            for a in range(several):
                w = weights[s, a] * weights[s, b] * share
                if w == 0:
                    continue
                block = blocks[slots[s, a, b]]
                for i in range(3):
                    p, q, r = w * arms[a, 0, i], w * arms[a, 1, i], w * arms[a, 2, i]
                    for j in range(3):
                        block[i, j] += p * product[0, j] + q * product[1, j] + r * product[2, j]
                        block[i, 3 + j] += p * system[s, 0, j] + q * system[s, 1, j] + r * system[s, 2, j]
                        block[3 + i, j] += w * product[i, j]
                        block[3 + i, 3 + j] += w * system[s, i, j]


@kernel
def _rigid(blocks, right, nodes, arms, edges, slots, weights, rotations, translations, give):
    """Adds as-rigid-as-possible: a node's neighbours are where it would take them (Sumner et al. 2007, eq. 9); joints give way."""
    arm, error = np.zeros((3, 3)), np.zeros(3)
    turned = np.zeros(3)
    for e in range(len(edges)):
        a, b = edges[e, 0], edges[e, 1]
        size = 0.0
        for i in range(3):
            turned[i] = 0.0
            for j in range(3):
                turned[i] += rotations[a, i, j] * arms[e, j]
            error[i] = turned[i] + nodes[a, i] + translations[a, i] - nodes[b, i] - translations[b, i]
            size += error[i] * error[i]
        w = weights[e] / np.sqrt(1 + size / (give * give))
        _turned(arm, turned[0], turned[1], turned[2])
        own, across, back, other = blocks[slots[e, 0]], blocks[slots[e, 1]], blocks[slots[e, 2]], blocks[slots[e, 3]]
        for i in range(3):
            turn = 0.0
            for j in range(3):
                turn += arm[j, i] * error[j]
                own[i, j] += w * (arm[0, i] * arm[0, j] + arm[1, i] * arm[1, j] + arm[2, i] * arm[2, j])
                own[i, 3 + j] += w * arm[j, i]
                own[3 + j, i] += w * arm[j, i]
                across[i, 3 + j] -= w * arm[j, i]
                back[3 + j, i] -= w * arm[j, i]
            own[3 + i, 3 + i] += w
            other[3 + i, 3 + i] += w
            across[3 + i, 3 + i] -= w
            back[3 + i, 3 + i] -= w
            right[a, i] += w * turn
            right[a, 3 + i] += w * error[i]
            right[b, 3 + i] -= w * error[i]


@kernel
def _solve(blocks, starts, columns, diagonal, right, most, enough):
    """Conjugate gradients, preconditioned by the inverse of each node's own block."""
    count = len(right)
    inverse = np.empty((count, 6, 6))
    for n in range(count):
        inverse[n] = np.linalg.inv(blocks[diagonal[n]])
    x, r = np.zeros_like(right), right.copy()
    z, q = np.zeros_like(right), np.zeros_like(right)
    for n in range(count):
        for i in range(6):
            for j in range(6):
                z[n, i] += inverse[n, i, j] * r[n, j]
    direction = z.copy()
    old = (r * z).sum()
    first = old
    for _ in range(most):
        if old <= enough * enough * first or old <= 1e-30:
            break
        q[:] = 0
        for n in range(count):
            for slot in range(starts[n], starts[n + 1]):
                block, other = blocks[slot], direction[columns[slot]]
                for i in range(6):
                    for j in range(6):
                        q[n, i] += block[i, j] * other[j]
        step = old / (direction * q).sum()
        x += step * direction
        r -= step * q
        z[:] = 0
        for n in range(count):
            for i in range(6):
                for j in range(6):
                    z[n, i] += inverse[n, i, j] * r[n, j]
        new = (r * z).sum()
        direction = z + new / old * direction
        old = new
    return x
