"""Bones and weights that follow a moving mesh, solved from its vertices alone.

Smooth skinning decomposition: Le and Deng, "Smooth Skinning Decomposition with Rigid Bones" (SIGGRAPH Asia 2012; "SSDR" below), with the
splitting of clusters and the skeleton from Le and Deng, "Robust and Accurate Skeletal Rigging from Mesh Sequences" (SIGGRAPH 2014; "RASR").
Beyond both: bones may scale along axes of their own. Lengths inside are in diagonals of the mesh's bounding box at rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse
from scipy.sparse import csgraph
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from backend.mesh.mesh import AnimatedMesh, Rig
from backend.progress import Progress, silent
from backend.splats.parallel import kernel
from protocol import recipes

MOST = 4  # bones of a vertex: what glTF and game engines take
CANDIDATES = 10  # bones near a vertex along the surface, of which those are chosen
GAP = 3  # times longer than an edge: the way over to a piece that only lies near
SURPLUS = 1.5  # so many times the bones asked for are solved for first: the least useful then go, one by one
CLUSTER_ROUNDS = 3  # of fitting and assigning after every split
EXACT = 3e-4  # mean error below which fewer bones are better than less error
PLAIN = 8e-4  # and below which fewer bones that scale are
WORTH = 0.01  # share of the error that a bone has to take away, where it is not so small
LOSS = 1.2  # squared error that taking scale away may leave, to that before
SMOOTH = 5e-4  # a difference between a vertex's weights and its neighbours' costs as much as this distance times the difference
STIFF = 2e-3  # what a scale of 2 would cost, as a distance: flat or small bones have no size along some axis that could be seen to change
ROUNDS, LAST_ROUNDS = 12, 40  # of weights and bones in turn: before bones go, and at the end
HINGE = 1e-3  # squared radians: bones that turn less against each other than its root have their joint where they share weight
LEVER = 0.05  # the same as a share of how much they turn
REACH = 1.5  # times the extent of what they share: how far from its middle a joint may lie
LOOSE = 0.01  # a joint that comes apart by so much is half as good a joint
LEAST_LENGTH = 0.01  # of a bone


def solve(mesh: AnimatedMesh, p: recipes.Armature, progress: Progress = silent) -> Rig:
    """The rig of at most `p.bones` bones whose motion of `mesh.mesh` is nearest to `mesh.vertices`: least squares over vertices
    and moments.

    Vertices at one place that stay together (copies along UV seams) get the same weights.
    """
    rest = mesh.mesh.vertices.astype(np.float64)
    low, high = rest.min(0), rest.max(0)
    centre, size = (low + high) / 2, max(float(np.linalg.norm(high - low)), 1e-12)
    rest, moved = (rest - centre) / size, (mesh.vertices - centre) / size
    first, place = _weld(rest, moved)
    thing = _Thing.of(np.ascontiguousarray(rest[first]), np.ascontiguousarray(moved[:, first].transpose(1, 0, 2)), place[mesh.mesh.faces])

    def part(begin: float, end: float, text: str) -> Progress:
        return lambda share: progress(begin + (end - begin) * share, text)

    bones, skin = _clusters(thing, int(np.ceil(SURPLUS * p.bones)), p.scale, part(0.0, 0.3, "Parts that move alike"))
    skin = _alternate(thing, skin, bones, p.scale, ROUNDS, part(0.3, 0.4, "Weights and bones"))
    skin, bones = _drop(thing, skin, bones, p, part(0.4, 0.7, "Bones that are not needed"))
    if p.scale:
        skin = _settle(thing, skin, bones, part(0.7, 0.8, "Bones that stretch"))
    skin = _alternate(thing, skin, bones, p.scale, LAST_ROUNDS, part(0.8, 1.0, "Weights and bones"))
    return _rig(thing, skin, bones, place, centre, size)


def posed(rig: Rig, vertices: Float[np.ndarray, "n 3"], moment: int) -> Float[np.ndarray, "n 3"]:
    """Where the rig takes vertices that are at `vertices` at rest, in the order of `rig.joints`; float64."""
    axes = _matrices(rig.axes)
    linear = _matrices(rig.rotations[moment]) @ (axes * rig.scales[moment][:, None, :]) @ axes.transpose(0, 2, 1)
    shift = rig.heads + rig.translations[moment] - np.einsum("bij,bj->bi", linear, rig.heads.astype(np.float64))
    out = np.zeros((len(vertices), 3))
    for joints, weights in zip(rig.joints.T, rig.weights.T):
        out += weights[:, None] * (np.einsum("nij,nj->ni", linear[joints], vertices) + shift[joints])
    return out


@dataclass(frozen=True)
class _Thing:
    """The moving points, and what lies next to what. average: each point's mean over its neighbours along the surface. graph: lengths of
    the edges, and of links between pieces that have no edge in common."""

    points: Float[np.ndarray, "n 3"]  # at rest
    area: Float[np.ndarray, "n"]  # of the surface around each
    moved: Float[np.ndarray, "n t 3"]
    average: sparse.csr_matrix
    graph: sparse.csr_matrix

    @property
    def moments(self) -> int:
        return self.moved.shape[1]

    @staticmethod
    def of(points: Float[np.ndarray, "n 3"], moved: Float[np.ndarray, "n t 3"], faces: Int[np.ndarray, "f 3"]) -> _Thing:
        count = len(points)
        pairs = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
        pairs = np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0).astype(np.int64)
        neighbours = _symmetric(pairs, np.ones(len(pairs)), count)
        degree = np.asarray(neighbours.sum(1)).ravel()
        alone = sparse.diags((degree == 0).astype(float))
        average = sparse.csr_matrix(sparse.diags(1 / np.maximum(degree, 1)) @ neighbours + alone)
        links = _links(points, csgraph.connected_components(neighbours, directed=False)[1])
        every = np.concatenate([pairs, links])
        length = np.linalg.norm(points[every[:, 0]] - points[every[:, 1]], axis=1) + 1e-9
        length[len(pairs) :] *= GAP
        edges = points[faces[:, 1:]] - points[faces[:, :1]]
        area = np.bincount(faces.reshape(-1), np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1).repeat(3) / 6, count)
        return _Thing(points, area, moved, average, _symmetric(every, length, count))


def _symmetric(pairs: Int[np.ndarray, "k 2"], values: Float[np.ndarray, "k"], count: int) -> sparse.csr_matrix:
    rows, columns = np.concatenate([pairs, pairs[:, ::-1]]).T
    return sparse.csr_matrix((np.tile(values, 2), (rows, columns)), (count, count))


def _links(points: Float[np.ndarray, "n 3"], piece: Int[np.ndarray, "n"]) -> Int[np.ndarray, "k 2"]:
    """Pairs of near points of different pieces of the surface, enough to join all pieces."""
    count = len(points)
    if piece.max() == 0:
        return np.zeros((0, 2), np.int64)
    near = cKDTree(points).query(points, min(9, count))[1].reshape(count, -1)[:, 1:]
    found = np.stack([np.repeat(np.arange(count), near.shape[1]), near.reshape(-1)], 1)
    found = np.unique(np.sort(found[piece[found[:, 0]] != piece[found[:, 1]]], axis=1), axis=0)
    while True:  # Boruvka: what is still apart is joined to what is nearest
        joined = sparse.csr_matrix((np.ones(len(found)), (piece[found[:, 0]], piece[found[:, 1]])), (piece.max() + 1,) * 2)
        pieces, group = csgraph.connected_components(joined, directed=False)
        if pieces == 1:
            return found
        apart = group[piece]
        more = []
        for number in range(pieces):
            own, other = np.flatnonzero(apart == number), np.flatnonzero(apart != number)
            distance, index = cKDTree(points[other]).query(points[own])
            best = int(np.argmin(distance))
            more.append(sorted((int(own[best]), int(other[index[best]]))))
        found = np.unique(np.concatenate([found, np.array(more)]), axis=0)


@dataclass
class _Skin:
    joints: Int[np.ndarray, "n 4"]
    weights: Float[np.ndarray, "n 4"]

    def dense(self, bones: int) -> Float[np.ndarray, "n b"]:
        out = np.zeros((len(self.joints), bones))
        np.add.at(out, (np.arange(len(out))[:, None], self.joints), self.weights)
        return out


class _Bones:
    """x -> R A diag(s) A^T x + T for each bone and moment. Solved one bone at a time with the others held (SSDR 4.3), from the moments of
    the weighted points alone (RASR 4.2): vertices are not touched."""

    def __init__(self, count: int, moments: int) -> None:
        self.turn = np.tile(np.eye(3), (count, moments, 1, 1))
        self.axes = np.tile(np.eye(3), (count, 1, 1))
        self.scale = np.ones((count, moments, 3))
        self.shift = np.zeros((count, moments, 3))
        self.scales = np.ones(count, bool)

    def __len__(self) -> int:
        return len(self.turn)

    def add(self) -> None:
        more = _Bones(1, self.turn.shape[1])
        for name in ("turn", "axes", "scale", "shift", "scales"):
            setattr(self, name, np.concatenate([getattr(self, name), getattr(more, name)]))

    def keep(self, which: np.ndarray) -> None:
        for name in ("turn", "axes", "scale", "shift", "scales"):
            setattr(self, name, getattr(self, name)[which])

    def linear(self, bone: int) -> Float[np.ndarray, "t 3 3"]:
        axes = self.axes[bone]
        return self.turn[bone] @ ((axes * self.scale[bone][:, None, :]) @ axes.T)

    def affine(self) -> Float[np.ndarray, "b t 3 4"]:
        linear = self.turn @ (self.axes[:, None] * self.scale[:, :, None, :]) @ self.axes.transpose(0, 2, 1)[:, None]
        return np.concatenate([linear, self.shift[..., None]], -1)

    def fit(self, points, moved, skin: _Skin, scale: bool, sweeps: int = 1, axes: bool = False, first: int = 0) -> None:
        """Moves the bones from number `first` on to where the weighted points are. axes: turns the axes of scale, too."""
        pairs, crossed = _moments(points, moved, skin.joints, skin.weights, len(self))
        affine = self.affine()
        for _ in range(sweeps):
            for bone in range(first, len(self)):
                mass, centre, goal, spread, joint = _alone(bone, affine, pairs, crossed)
                if mass < 1e-9:
                    continue
                self._turn(bone, spread, joint, mass * STIFF**2, scale, axes)
                linear = self.linear(bone)
                self.shift[bone] = goal - np.einsum("tij,j->ti", linear, centre)
                affine[bone, :, :, :3], affine[bone, :, :, 3] = linear, self.shift[bone]

    def _turn(self, bone: int, spread, joint, stiff: float, scale: bool, axes: bool) -> None:
        scale = scale and bool(self.scales[bone])
        if not scale:
            self.turn[bone] = _procrustes(joint)
            return
        frame = self.axes[bone]
        # A little of the identity keeps a point's or a line's rotation from being noise: it stays with the turn it has.
        for _ in range(2):
            stretch = (frame * self.scale[bone][:, None, :]) @ frame.T
            self.turn[bone] = _procrustes((joint + stiff * self.turn[bone]) @ stretch)
            if axes:
                full = np.linalg.solve(spread + stiff * np.eye(3), (joint + stiff * self.turn[bone]).transpose(0, 2, 1)).transpose(0, 2, 1)
                own = self.turn[bone].transpose(0, 2, 1) @ full
                own = (own + own.transpose(0, 2, 1)) / 2 - np.eye(3)
                _, frame = np.linalg.eigh(np.einsum("tij,tjk->ik", own, own))
                self.axes[bone] = frame
            seen = np.einsum("ji,tkj,tkl,li->ti", frame, self.turn[bone], joint, frame)
            self.scale[bone] = np.clip((seen + stiff) / (np.einsum("ji,jk,ki->i", frame, spread, frame) + stiff), 0.05, 20)

    def gains(self, points, moved, skin: _Skin) -> Float[np.ndarray, "b"]:
        """By how much the sum of squared distances would grow if a bone had no scale, the others as they are."""
        pairs, crossed = _moments(points, moved, skin.joints, skin.weights, len(self))
        affine = self.affine()
        out = np.zeros(len(self))
        for bone in np.flatnonzero(self.scales).tolist():
            mass, _, _, spread, joint = _alone(bone, affine, pairs, crossed)
            if mass >= 1e-9:
                without, now = (((a @ spread) * a).sum() - 2 * (a * joint).sum() for a in (_procrustes(joint), self.linear(bone)))
                out[bone] = max(without - now, 0.0)
        return out


def _alone(bone: int, affine, pairs, crossed):
    """What is left for one bone to explain: the mass and centre of its points, their centre at each moment, and the covariances of the
    points with themselves and with where they should be (SSDR eq. 10-12)."""
    own = pairs[bone, bone]
    mass = own[3, 3]
    rest = crossed[bone] - np.einsum("ctij,cjk->tik", affine, pairs[:, bone]) + np.einsum("tij,jk->tik", affine[bone], own)
    centre, goal = own[:3, 3] / max(mass, 1e-300), rest[:, :, 3] / max(mass, 1e-300)
    return mass, centre, goal, own[:3, :3] - mass * np.outer(centre, centre), rest[:, :, :3] - mass * goal[:, :, None] * centre


def _procrustes(covariance: Float[np.ndarray, "*t 3 3"]) -> Float[np.ndarray, "*t 3 3"]:
    """The rotation R with the largest trace of R^T covariance (Kabsch 1976)."""
    left, _, right = np.linalg.svd(covariance)
    sign = np.sign(np.linalg.det(left) * np.linalg.det(right))
    left[..., 2] *= np.where(sign == 0, 1, sign)[..., None]
    return left @ right


def _weld(rest, moved) -> tuple[Int[np.ndarray, "k"], Int[np.ndarray, "n"]]:
    """One vertex of each place and motion, and the number of each vertex's place."""
    _, first, group = np.unique(np.round(rest * 1e6).astype(np.int64), axis=0, return_index=True, return_inverse=True)
    group = group.reshape(-1)
    apart = np.round((moved - moved[:, first[group]]) * 1e3).astype(np.int64).transpose(1, 0, 2).reshape(len(rest), -1)
    _, first, place = np.unique(np.concatenate([group[:, None], apart], 1), axis=0, return_index=True, return_inverse=True)
    return first, place.reshape(-1)


def _clusters(thing: _Thing, count: int, scale: bool, progress: Progress) -> tuple[_Bones, _Skin]:
    """Parts that each move as one bone (SSDR 4.1, RASR 4.1): the worst part is split at its worst point until there are enough
    or all fit."""
    points, moved = thing.points, thing.moved
    every, one = np.arange(len(points)), np.ones((len(points), 1))
    bones = _Bones(1, thing.moments)
    labels = np.zeros(len(points), np.int64)
    touching = sparse.csr_matrix(thing.graph + sparse.eye(len(points)))
    bones.fit(points, moved, _Skin(labels[:, None], one), scale, axes=True)
    errors = _errors(points, moved, bones.affine())
    while len(bones) < min(count, len(points)):
        progress(len(bones) / count)
        own = errors[every, labels]
        if np.sqrt(own / thing.moments).mean() < EXACT / 2:
            break
        sizes = np.bincount(labels, minlength=len(bones))
        worst = int(np.argmax(np.where(sizes > 1, np.bincount(labels, own, len(bones)), -1)))
        members = np.flatnonzero(labels == worst)
        away = np.linalg.norm(points[members] - points[members].mean(0), axis=1)
        seed = points[members[np.argmax(own[members] * (away + 1e-6))]]
        order = np.argsort(np.linalg.norm(points[members] - seed, axis=1), kind="stable")
        patch = members[order[: max(4, len(members) // 8)]]
        bones.add()
        new = len(bones) - 1
        labels[patch] = new
        bones.fit(points[patch], moved[patch], _Skin(labels[patch, None], one[patch]), scale, 1, True, new)
        errors = np.concatenate([errors, _errors(points, moved, bones.affine()[new:])], 1)
        labels[members] = np.where(errors[members, new] < errors[members, worst], new, worst)
        for _ in range(CLUSTER_ROUNDS):
            bones.fit(points, moved, _Skin(labels[:, None], one), scale, axes=True)
            errors = _errors(points, moved, bones.affine())
            # a part grows along the surface alone: what moves alike far away is another part
            around = touching @ sparse.csr_matrix((one[:, 0], (every, labels)), (len(points), len(bones)))
            labels = np.where(around.toarray() > 0, errors, np.inf).argmin(1)
    used = np.unique(labels)
    bones.keep(used)
    joints = np.searchsorted(used, labels)[:, None].repeat(MOST, 1)
    return bones, _Skin(joints, np.tile([1.0] + [0.0] * (MOST - 1), (len(points), 1)))


def _near(thing: _Thing, skin: _Skin, bones: int) -> Int[np.ndarray, "n c"]:
    """The bones whose own parts of the surface are nearest to each point, along it."""
    dense = skin.dense(bones)
    core = dense.argmax(1)
    away = np.empty((bones, len(dense)))
    for bone in range(bones):
        (seeds,) = np.nonzero((core == bone) | (dense[:, bone] > 0.3))
        if not len(seeds):
            seeds = dense[:, [bone]].argmax(0)
        away[bone] = csgraph.dijkstra(thing.graph, directed=True, indices=seeds, min_only=True)
    return np.argsort(away, axis=0, kind="stable")[:CANDIDATES].T


def _weigh(thing: _Thing, skin: _Skin, bones: _Bones, near: Int[np.ndarray, "n c"]) -> _Skin:
    """Weights for bones that are held (SSDR 4.2): convex least squares, drawn to the mean of the neighbours' weights."""
    drawn = np.take_along_axis(thing.average @ skin.dense(len(bones)), near, 1)
    every = np.arange(len(near))
    joints, weights, _ = _weights(thing.points, thing.moved, bones.affine(), every, near, drawn, SMOOTH**2 * thing.moments)
    return _Skin(joints, weights)


def _alternate(thing: _Thing, skin: _Skin, bones: _Bones, scale: bool, rounds: int, progress: Progress = silent) -> _Skin:
    """Weights and bones in turn. Moves `bones`, and returns the weights."""
    for number in range(rounds):
        progress(number / rounds)
        if number % 8 == 0:
            near = _near(thing, skin, len(bones))
        skin = _weigh(thing, skin, bones, near)
        bones.fit(thing.points, thing.moved, skin, scale, 2, number % 4 == 3)
    return _weigh(thing, skin, bones, near)


def _drop(thing: _Thing, skin: _Skin, bones: _Bones, p: recipes.Armature, progress: Progress) -> tuple[_Skin, _Bones]:
    """Takes away one bone after the other, each time the one that is missed least: down to the budget, and on while nothing is lost."""
    begin = len(bones)
    while len(bones) > 1:
        progress((begin - len(bones)) / begin)
        affine, near, dense = bones.affine(), _near(thing, skin, len(bones)), skin.dense(len(bones))
        misses = _misses(thing.points, thing.moved, affine, skin.joints, skin.weights)
        distance = np.sqrt(misses / thing.moments)
        users, gone = np.nonzero(dense)  # every bone of every point: what would the point do without?
        others = np.where(near[users] == gone[:, None], -1, near[users])
        joints, weights, after = _weights(thing.points, thing.moved, affine, users, others, np.zeros(others.shape), 0.0)
        cost = np.bincount(gone, after - misses[users], len(bones))
        farther = np.bincount(gone, np.sqrt(after / thing.moments) - distance[users], len(bones)) / len(distance)
        least = int(np.argmin(cost))
        mean = distance.mean()
        if len(bones) <= p.bones and mean + farther[least] > EXACT and farther[least] > WORTH * mean:
            break
        skin.joints[users[gone == least]], skin.weights[users[gone == least]] = joints[gone == least], weights[gone == least]
        skin = _Skin(np.where(skin.joints > least, skin.joints - 1, skin.joints), skin.weights)
        bones.keep(np.arange(len(bones)) != least)
        skin = _alternate(thing, skin, bones, p.scale, 3)
    return skin, bones


def _settle(thing: _Thing, skin: _Skin, bones: _Bones, progress: Progress) -> _Skin:
    """Takes their scale from bones that do about as well without: those of a body, most often all."""
    rounds = 5
    for number in range(rounds):
        progress(number / rounds)
        now = _misses(thing.points, thing.moved, bones.affine(), skin.joints, skin.weights).sum()
        if number == 0:
            limit = max(PLAIN**2 * len(thing.points) * thing.moments, LOSS * now)
        gains = np.where(bones.scales, bones.gains(thing.points, thing.moved, skin), 0)
        order = np.argsort(gains, kind="stable")
        free = order[np.cumsum(gains[order]) <= limit - now]
        if not bones.scales[free].any():
            break
        bones.scales[free] = False
        bones.scale[free] = 1
        skin = _alternate(thing, skin, bones, True, 6)
    return skin


def _rig(thing: _Thing, skin: _Skin, bones: _Bones, place: Int[np.ndarray, "n"], centre: Float[np.ndarray, "3"], size: float) -> Rig:
    """Order, joints and directions of the bones (RASR 4.3 and 5): parents are those with which a bone shares most weight."""
    used = np.unique(skin.joints)
    bones.keep(used)
    skin = _Skin(np.searchsorted(used, skin.joints), skin.weights)
    count = len(bones)
    dense = skin.dense(count)
    mass = (dense * thing.area[:, None]).sum(0)
    middle = np.stack([_mean(thing.points, np.where(own > 0.5, thing.area, 1e-6) * own) for own in dense.T])
    linear = np.stack([bones.linear(bone) for bone in range(count)])
    apart = np.linalg.norm(middle[:, None] - middle, axis=2)
    reluctance = np.zeros((count, count))
    for bone in range(count):
        for other in range(bone):
            both = dense[:, bone] * dense[:, other]
            if both.sum() > 1e-6:
                _, miss = _joint(thing, both, linear, bones.shift, bone, other)
                reluctance[bone, other] = (miss**2 + LOOSE**2) / both.sum()
            else:  # bones that share nothing hang on the nearest
                reluctance[bone, other] = 1e6 * (1 + apart[bone, other])
    tree = csgraph.minimum_spanning_tree(reluctance).tocoo()
    tree = _symmetric(np.stack([tree.row, tree.col], 1).astype(np.int64), apart[tree.row, tree.col] + 1e-9, count)
    # root: the bone from which the way along the tree to all of the surface is shortest
    root = int(np.argmin((csgraph.dijkstra(tree) * mass).sum(1)))
    order, before = csgraph.breadth_first_order(tree, root, directed=False)
    number = np.empty(count, np.int64)
    number[order] = np.arange(count)
    parents = np.where(before >= 0, number[np.maximum(before, 0)], -1)[order]
    dense, mass, middle, linear = dense[:, order], mass[order], middle[order], linear[order]
    bones.keep(order)

    heads = middle.copy()
    for bone in range(1, count):
        both = dense[:, bone] * dense[:, parents[bone]]
        if both.sum() > 1e-6:
            heads[bone], _ = _joint(thing, both, linear, bones.shift, bone, int(parents[bone]))
    below = mass.copy()  # of a bone and all that hangs on it
    for bone in range(count - 1, 0, -1):
        below[parents[bone]] += below[bone]
    axes, tails = np.empty((count, 3, 3)), np.empty((count, 3))
    for bone in range(count):
        children = np.flatnonzero(parents == bone)
        children = children[np.linalg.norm(heads[children] - heads[bone], axis=1) > LEAST_LENGTH]
        if len(children):
            along = heads[children[np.argmax(below[children])]] - heads[bone]
            length = float(np.linalg.norm(along))
        else:
            along = middle[bone] - heads[bone]
            along = along if np.linalg.norm(along) > 1e-6 else np.array([0.0, 0.0, 1.0])
            own = thing.points[dense[:, bone] > 0.5]
            reach = ((own - heads[bone]) * along).sum(1) / np.linalg.norm(along)
            length = max(float(reach.max()) if len(reach) else 0.0, LEAST_LENGTH)
        axes[bone], columns = _frame(along / np.linalg.norm(along), bones.axes[bone] if bones.scales[bone] else None)
        bones.scale[bone] = bones.scale[bone][:, columns]
        tails[bone] = heads[bone] + length * axes[bone][:, 1]
    moved = np.einsum("btij,bj->bti", linear, heads) + bones.shift - heads[:, None]
    return Rig(
        heads=heads * size + centre,
        tails=tails * size + centre,
        axes=_quaternions(axes),
        parents=parents.astype(np.int32),
        joints=number[skin.joints][place].astype(np.int32),
        weights=skin.weights[place].astype(np.float32),
        rotations=_continuous(_quaternions(bones.turn)).transpose(1, 0, 2),
        translations=moved.transpose(1, 0, 2) * size,
        scales=bones.scale.transpose(1, 0, 2).copy(),
    )


def _joint(thing: _Thing, both: Float[np.ndarray, "n"], linear, shift, bone: int, other: int) -> tuple[Float[np.ndarray, "3"], float]:
    """The point that two bones move most alike, near where they share their weight (RASR eq. 8), and by how much they do not."""
    near = _mean(thing.points, both)
    extent = float(np.sqrt((both * ((thing.points - near) ** 2).sum(1)).sum() / both.sum()))
    turned, gone = linear[bone] - linear[other], shift[bone] - shift[other]
    matrix = np.einsum("tji,tjk->ik", turned, turned)
    # along a hinge's axis any point would do
    pull = HINGE * thing.moments + LEVER * float(np.trace(matrix))
    off = np.linalg.solve(matrix + pull * np.eye(3), -np.einsum("tji,tj->i", turned, gone + np.einsum("tij,j->ti", turned, near)))
    point = near + off * min(1.0, REACH * extent / max(float(np.linalg.norm(off)), 1e-12))
    return point, float(np.sqrt(((np.einsum("tij,j->ti", turned, point) + gone) ** 2).sum() / thing.moments))


def _mean(points: Float[np.ndarray, "n 3"], weights: Float[np.ndarray, "n"]) -> Float[np.ndarray, "3"]:
    return (weights[:, None] * points).sum(0) / weights.sum()


def _frame(along: Float[np.ndarray, "3"], scaled: Float[np.ndarray, "3 3"] | None) -> tuple[Float[np.ndarray, "3 3"], list[int]]:
    """A bone's axes in columns, the second along it, or along that axis of its scale that is nearest; and which axis of its
    scale each is."""
    if scaled is None:
        side = np.cross(along, np.eye(3)[np.argmin(np.abs(along))])
        side /= np.linalg.norm(side)
        return np.stack([side, along, np.cross(side, along)], 1), [0, 1, 2]
    second = int(np.argmax(np.abs(along @ scaled)))
    columns = [(second + 2) % 3, second, (second + 1) % 3]
    first, second_axis = scaled[:, columns[0]], scaled[:, second] * (1 if along @ scaled[:, second] >= 0 else -1)
    return np.stack([first, second_axis, np.cross(first, second_axis)], 1), columns


def _quaternions(matrices: Float[np.ndarray, "*n 3 3"]) -> Float[np.ndarray, "*n 4"]:
    """w first."""
    flat = Rotation.from_matrix(matrices.reshape(-1, 3, 3)).as_quat()
    return np.roll(flat, 1, -1).reshape(*matrices.shape[:-2], 4)


def _matrices(quaternions: Float[np.ndarray, "b 4"]) -> Float[np.ndarray, "b 3 3"]:
    return Rotation.from_quat(np.roll(quaternions, -1, -1)).as_matrix()


def _continuous(quaternions: Float[np.ndarray, "b t 4"]) -> Float[np.ndarray, "b t 4"]:
    """The same turns, each with the sign that is nearer to the moment before."""
    turned = np.where((quaternions[:, 1:] * quaternions[:, :-1]).sum(-1) < 0, -1.0, 1.0)
    return quaternions * np.concatenate([np.ones((len(turned), 1)), np.cumprod(turned, 1)], 1)[..., None]


@kernel
def _errors(points, moved, affine):
    """n x b: sum over moments of the squared distance of each point from where each bone takes it."""
    count, bones, moments = len(points), affine.shape[0], affine.shape[1]
    out = np.empty((count, bones))
    for i in range(count):
        x, y, z = points[i]
        for b in range(bones):
            total = 0.0
            for t in range(moments):
                for r in range(3):
                    a = affine[b, t, r]
                    d = a[0] * x + a[1] * y + a[2] * z + a[3] - moved[i, t, r]
                    total += d * d
            out[i, b] = total
    return out


@kernel
def _misses(points, moved, affine, joints, weights):
    count, moments = len(points), affine.shape[1]
    out = np.empty(count)
    for i in range(count):
        x, y, z = points[i]
        total = 0.0
        for t in range(moments):
            for r in range(3):
                d = -moved[i, t, r]
                for k in range(joints.shape[1]):
                    a = affine[joints[i, k], t, r]
                    d += weights[i, k] * (a[0] * x + a[1] * y + a[2] * z + a[3])
                total += d * d
        out[i] = total
    return out


@kernel
def _moments(points, moved, joints, weights, bones):
    """b x b x 4 x 4: sum of w_b w_c x x^T, and b x t x 3 x 4: sum of w_b y x^T, x = (x, y, z, 1); always in the same order."""
    count, moments, most = len(points), moved.shape[1], joints.shape[1]
    pairs = np.zeros((bones, bones, 4, 4))
    crossed = np.zeros((bones, moments, 3, 4))
    x = np.ones(4)
    for i in range(count):
        x[:3] = points[i]
        for k in range(most):
            for m in range(most):
                w = weights[i, k] * weights[i, m]
                if w > 0:
                    for r in range(4):
                        for c in range(4):
                            pairs[joints[i, k], joints[i, m], r, c] += w * x[r] * x[c]
    for t in range(moments):
        for i in range(count):
            for k in range(most):
                w = weights[i, k]
                if w > 0:
                    b = joints[i, k]
                    for r in range(3):
                        wy = w * moved[i, t, r]
                        crossed[b, t, r, 0] += wy * points[i, 0]
                        crossed[b, t, r, 1] += wy * points[i, 1]
                        crossed[b, t, r, 2] += wy * points[i, 2]
                        crossed[b, t, r, 3] += wy
    return pairs, crossed


@kernel
def _weights(points, moved, affine, which, near, drawn, smooth):
    """For each point of `which` the weights >= 0 with sum 1 of at most MOST of the bones `near` it that minimise the sum over moments of
    the squared distance, plus `smooth` |weights - drawn|^2. Returns joints and weights, the heaviest first, and that sum of squared
    distances."""
    count, moments, most = len(which), affine.shape[1], near.shape[1]
    joints = np.zeros((count, MOST), np.int64)
    weights = np.zeros((count, MOST))
    misses = np.empty(count)
    for i in range(count):
        x, y, z = points[which[i]]
        own = np.empty(most, np.int64)
        size = 0
        for c in range(most):
            if near[i, c] >= 0:
                own[size] = c
                size += 1
        off = np.empty((size, 3 * moments))
        for c in range(size):
            for t in range(moments):
                for r in range(3):
                    a = affine[near[i, own[c]], t, r]
                    off[c, 3 * t + r] = a[0] * x + a[1] * y + a[2] * z + a[3] - moved[which[i], t, r]
        gram = np.empty((size, size))
        slope = np.empty(size)
        for c in range(size):
            for d in range(c + 1):
                total = 0.0
                for t in range(3 * moments):
                    total += off[c, t] * off[d, t]
                gram[c, d] = gram[d, c] = total
        ridge = 1e-12 * moments
        for c in range(size):
            gram[c, c] += smooth + ridge
            slope[c] = -smooth * drawn[i, own[c]]
        allowed = np.ones(size, np.bool_)
        solution = _simplex(gram, slope, allowed)
        order = np.argsort(-solution, kind="mergesort")
        if size > MOST and solution[order[MOST]] > 0:
            allowed[:] = False
            allowed[order[:MOST]] = True
            solution = _simplex(gram, slope, allowed)
            order = np.argsort(-solution, kind="mergesort")
        total = 0.0
        for k in range(min(MOST, size)):
            c = order[k]
            joints[i, k] = near[i, own[c]] if solution[c] > 0 else near[i, own[order[0]]]
            weights[i, k] = max(solution[c], 0.0)
            total += weights[i, k]
        for k in range(size, MOST):
            joints[i, k] = joints[i, 0]
        weights[i] /= total
        total = 0.0
        for t in range(3 * moments):
            miss = 0.0
            for k in range(min(MOST, size)):
                miss += weights[i, k] * off[order[k], t]
            total += miss * miss
        misses[i] = total
    return joints, weights, misses


@kernel
def _simplex(gram, slope, allowed):
    """The w >= 0 with sum 1 that minimises w gram w / 2 + slope w, by an active set (Nocedal and Wright, Numerical Optimization, 16.5)."""
    size = len(slope)
    w = np.zeros(size)
    best, start = np.inf, 0
    for c in range(size):
        value = 0.5 * gram[c, c] + slope[c]
        if allowed[c] and value < best:
            best, start = value, c
    w[start] = 1.0
    active = np.zeros(size, np.bool_)
    active[start] = True
    chosen = np.empty(size, np.int64)
    for _ in range(6 * size + 6):
        count = 0
        for c in range(size):
            if active[c]:
                chosen[count] = c
                count += 1
        lower = np.zeros((count, count))
        u, v = np.empty(count), np.empty(count)
        for a in range(count):
            for b in range(a + 1):
                total = gram[chosen[a], chosen[b]]
                for m in range(b):
                    total -= lower[a, m] * lower[b, m]
                if a == b:
                    lower[a, a] = np.sqrt(max(total, 1e-18))
                else:
                    lower[a, b] = total / lower[b, b]
            u[a], v[a] = 1.0, -slope[chosen[a]]
        for a in range(count):
            for m in range(a):
                u[a] -= lower[a, m] * u[m]
                v[a] -= lower[a, m] * v[m]
            u[a] /= lower[a, a]
            v[a] /= lower[a, a]
        for a in range(count - 1, -1, -1):
            for m in range(a + 1, count):
                u[a] -= lower[m, a] * u[m]
                v[a] -= lower[m, a] * v[m]
            u[a] /= lower[a, a]
            v[a] /= lower[a, a]
        pressure = (1.0 - v.sum()) / u.sum()
        step, blocked = 1.0, -1
        for a in range(count):
            goal = v[a] + pressure * u[a]
            now = w[chosen[a]]
            if goal <= 0 and now - goal > 0 and now / (now - goal) < step:
                step, blocked = now / (now - goal), a
        for a in range(count):
            c = chosen[a]
            w[c] += step * (v[a] + pressure * u[a] - w[c])
        if blocked >= 0:
            w[chosen[blocked]] = 0.0
            active[chosen[blocked]] = False
            continue
        worst, enter = -1e-13, -1
        for c in range(size):
            if allowed[c] and not active[c]:
                gradient = slope[c] - pressure
                for a in range(count):
                    gradient += gram[c, chosen[a]] * w[chosen[a]]
                if gradient < worst:
                    worst, enter = gradient, c
        if enter < 0:
            break
        active[enter] = True
    return w
