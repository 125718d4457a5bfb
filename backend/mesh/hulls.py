"""Convex hulls that together fill a closed mesh, for collisions.

CoACD (Wei et al. 2022, "Approximate Convex Decomposition for 3D Meshes with Collision-Aware Concavity and Tree Search") cuts the mesh into
nearly convex parts. Here these are merged, always the two whose common hull adds the least volume, down to the number asked for. CoACD's
own limit does the same by concavity, and ends farther from the mesh's volume (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.spatial import ConvexHull, QhullError

from backend.mesh.decimate import decimate
from backend.mesh.mesh import Mesh
from backend.mesh.own_process import answer, in_own_process
from backend.progress import Progress, silent
from protocol.errors import KilnError

FACES = 1500  # of the mesh that is cut: time grows faster than their number, and hulls do not show them
DETAIL = (0.05, 0.03, 0.015)  # CoACD's concavity threshold, finer where the parts themselves are far off
CLOSE = 0.05  # of the volume: where fewer hulls come so near, fewer are made
FAR = 0.1  # of the volume: what hulls should stay within
CORNERS = 64  # of a hull: physics engines take 255 at most, and are faster with fewer
SHARP = 0.002  # of the mesh's size: corners that stand out less are left out
GAP = 0.02  # of the mesh's size: parts further apart are not merged while others are there
SAMPLES = 2000  # points in each hull that tell how much of it others hold too
PARTS = 400  # at most: of more, those of less volume are left out before they are merged
SECONDS = 8.0  # of one cut, about, for the progress alone


@dataclass(frozen=True)
class Hulls:
    """Convex closed meshes in the frame of the mesh. error: how much the volume of their union differs from the mesh's, as a share of
    that: hulls' own volumes exactly, what several of them share by SAMPLES points in each."""

    hulls: list[Mesh]
    error: float


def hulls(mesh: Mesh, most: int, seed: int = 0, progress: Progress = silent) -> Hulls:
    """At most `most` convex hulls of a closed mesh: fewer where these come within CLOSE of its volume, and within FAR if so many can. The
    same seed gives the same hulls."""
    low, size = mesh.vertices.min(0), float(np.ptp(mesh.vertices, axis=0).max())
    share = abs(volume(mesh)) / size**3
    coarse = decimate(mesh, FACES)
    points = (coarse.vertices.astype(np.float64) - low) / size  # of one scale, whatever the mesh's
    best: Hulls | None = None
    for number, detail in enumerate(DETAIL):

        def part(done: float, text: str = f"Cutting into convex parts, attempt {number + 1}", first: float = number) -> None:
            progress((first + done) / len(DETAIL), text)

        given = {"points": points, "faces": coarse.faces, "detail": detail, "seed": seed, "mend": False}
        words = "Cutting the mesh into convex parts", "Ask for no hulls (game.hulls)."
        try:
            cut = in_own_process("backend.mesh.hulls", given, SECONDS, *words, lambda done: part(0.8 * done))
        except KilnError:  # the surface touches itself somewhere: CoACD makes one that does not, coarser
            cut = in_own_process("backend.mesh.hulls", {**given, "mend": True}, SECONDS, *words, lambda done: part(0.8 * done))
        parts = [one for one in map(_corners, np.split(cut["corners"], np.cumsum(cut["counts"])[:-1])) if one is not None]
        made = [_simple(corners) for corners in _merge(parts, most, share, lambda: part(0.8, "Merging hulls"))]
        found = Hulls(
            [Mesh((one.vertices * size + low).astype(np.float32), one.faces) for one in made], round(abs(union(made) / share - 1), 4)
        )
        if best is None or found.error < best.error:
            best = found
        # Finer parts are of no use where these are near enough already, or far more than there may be hulls
        if best.error <= FAR or sum(ConvexHull(one).volume for one in parts) <= (1 + FAR) * share or len(parts) > 4 * most:
            break
    return best


def volume(mesh: Mesh) -> float:
    """Of a closed mesh."""
    corner = (mesh.vertices.astype(np.float64) - mesh.vertices.mean(0, dtype=np.float64))[mesh.faces]
    return float((corner[:, 0] * np.cross(corner[:, 1], corner[:, 2])).sum()) / 6


def union(parts: list[Mesh]) -> float:
    """Volume of what convex parts fill together: the sum over parts of their volume times the mean over points in it of one over how many
    parts hold the point."""
    if not parts:
        return 0.0
    planes = [ConvexHull(part.vertices).equations for part in parts]
    low, high = (np.stack([getattr(part.vertices, end)(0) for part in parts]) for end in ("min", "max"))
    random, total = np.random.default_rng(0), 0.0
    for part in parts:
        points, own = _inside(part, random)
        holders = np.zeros(len(points))
        first, last = points.min(0), points.max(0)
        for other in np.flatnonzero((low <= last).all(1) & (high >= first).all(1)):
            equations = planes[other]
            holders += (points @ equations[:, :3].T + equations[:, 3] <= 1e-9).all(1)
        total += own * float((1 / np.maximum(holders, 1)).mean())
    return total


def _inside(part: Mesh, random: np.random.Generator) -> tuple[Float[np.ndarray, "m 3"], float]:
    """Points evenly in a convex part, and its volume: by the tetrahedra between its middle and its faces."""
    middle = part.vertices.mean(0, dtype=np.float64)
    corner = part.vertices.astype(np.float64)[part.faces] - middle
    sizes = np.abs((corner[:, 0] * np.cross(corner[:, 1], corner[:, 2])).sum(1)) / 6
    chosen = random.choice(len(sizes), SAMPLES, p=sizes / sizes.sum())
    weights = random.dirichlet(np.ones(4), SAMPLES)[:, :3]
    return middle + (corner[chosen] * weights[..., None]).sum(1), float(sizes.sum())


def _merge(parts: list[Float[np.ndarray, "k 3"]], most: int, whole: float, report: Callable[[], None]) -> list[Float[np.ndarray, "k 3"]]:
    """Corners of at most `most` hulls, and fewer where the volume stays within CLOSE of `whole`."""
    live = dict(enumerate(parts))
    sizes = {number: ConvexHull(part).volume for number, part in live.items()}
    for number in sorted(live, key=lambda number: sizes[number])[:-PARTS]:
        del live[number], sizes[number]
    boxes = {number: (part.min(0), part.max(0)) for number, part in live.items()}
    costs: dict[tuple[int, int], tuple[float, np.ndarray]] = {}

    def weigh(one: int, other: int) -> None:
        both = np.concatenate([live[one], live[other]])
        hull = ConvexHull(both)
        costs[one, other] = hull.volume - sizes[one] - sizes[other], both[hull.vertices]

    def near(one: int, other: int) -> bool:
        return bool((boxes[one][0] <= boxes[other][1] + GAP).all() and (boxes[other][0] <= boxes[one][1] + GAP).all())

    def pairs(close: bool) -> list[tuple[int, int]]:
        return [(one, other) for one in live for other in live if one < other and near(one, other) == close]

    for number, pair in enumerate(pairs(True)):
        if number % 50 == 0:
            report()
        weigh(*pair)
    while len(live) > 1:
        if not costs and len(live) > most:
            for pair in pairs(False):
                weigh(*pair)
        if not costs:
            break
        one, other = min(costs, key=lambda pair: (costs[pair][0], pair))
        added, corners = costs[one, other]
        if len(live) <= most and abs((sum(sizes.values()) + added) / whole - 1) > CLOSE:
            break
        report()
        live[one], sizes[one] = corners, sizes[one] + sizes[other] + added
        boxes[one] = corners.min(0), corners.max(0)
        del live[other], sizes[other]
        costs = {pair: cost for pair, cost in costs.items() if not {one, other} & set(pair)}
        for third in live:
            if third != one and near(one, third):
                weigh(*sorted((one, third)))
    return list(live.values())


def _corners(points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "k 3"] | None:
    """The points that are corners of their hull; None where they lie in a plane."""
    try:
        hull = ConvexHull(points)
    except QhullError:
        return None
    return points[hull.vertices] if hull.volume > 1e-12 else None


def _simple(points: Float[np.ndarray, "n 3"]) -> Mesh:
    """The hull of at most CORNERS of its corners: those that stand out most, one after the other."""
    directions = np.concatenate([np.eye(3), -np.eye(3), [[s, t, u] for s in (-1, 1) for t in (-1, 1) for u in (-1, 1)]])
    chosen = sorted({int(number) for number in (points @ directions.T).argmax(0)})
    hull = None
    while len(chosen) < min(CORNERS, len(points)):
        try:
            hull = ConvexHull(points[chosen])
        except QhullError:  # what was chosen lies in a plane
            chosen.append(next(number for number in range(len(points)) if number not in chosen))
            continue
        out = (points @ hull.equations[:, :3].T + hull.equations[:, 3]).max(1)
        if out.max() < SHARP:
            break
        chosen.append(int(out.argmax()))
    hull = ConvexHull(points[chosen])
    faces = hull.simplices.copy()
    corner = hull.points[faces]
    inward = (np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]) * hull.equations[:, :3]).sum(1) < 0
    faces[inward] = faces[inward][:, ::-1]
    index = np.full(len(hull.points), -1)
    index[hull.vertices] = np.arange(len(hull.vertices))
    return Mesh(hull.points[hull.vertices], index[faces].astype(np.int32))


def _cut(
    points: Float[np.ndarray, "n 3"],
    faces: Int[np.ndarray, "f 3"],
    detail: Float[np.ndarray, ""],
    seed: Int[np.ndarray, ""],
    mend: Bool[np.ndarray, ""],
) -> dict[str, np.ndarray]:
    """What the process of `hulls` does. The search is a short one: a longer one takes three times the time and changes the number of parts
    by one in thirty."""
    import coacd

    coacd.set_log_level("error")
    settings = {"merge": False, "preprocess_mode": "on" if mend else "off", "mcts_nodes": 10, "mcts_iterations": 40, "mcts_max_depth": 2}
    parts = coacd.run_coacd(coacd.Mesh(points, faces), threshold=float(detail), seed=int(seed), **settings)
    corners = [part for part, _ in parts]
    return {"corners": np.concatenate(corners), "counts": np.array([len(part) for part in corners])}


if __name__ == "__main__":
    answer(_cut)
