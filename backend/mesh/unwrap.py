"""UV charts: chosen by xatlas on a smoothed surface, relaxed until lengths are those of the true one, packed by xatlas.

xatlas holds the GIL for as long as it works, half a minute for a large mesh: it runs in a process of its own, so that this one stays
alive to report and to be cancelled. Large meshes are split in space first, as the time grows faster than the number of faces.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xatlas
from jaxtyping import Float, Int
from scipy.sparse import coo_matrix, diags
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import splu

from backend.mesh.mesh import Mesh
from backend.mesh.own_process import answer, in_own_process
from backend.progress import Progress, silent
from protocol.errors import KilnError

MAX_COST = 8.0  # xatlas' price of a chart; its default of 2 cuts smooth surfaces into more charts
EVEN = 2  # passes of smoothing before charts are chosen
RELAXATIONS = 8
UNFOLDS = 50
WHOLE = 100_000  # faces up to which a mesh is cut into charts as a whole
PART = 25_000  # faces of a larger mesh that are cut together: each border between parts is a seam, but the time stays in proportion
PACKED = 2048  # pixels at most that charts are packed in: larger textures take the same layout
ATTEMPTS = 5
RESULTS = ("source", "uv", "faces", "chart", "flat")
FACES_A_SECOND = 5_000  # about, for the progress alone


def unwrap(
    mesh: Mesh, size: int, padding: int, progress: Progress = silent
) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n 2"], Int[np.ndarray, "f 3"]]:
    """Charts for a texture of size x size pixels, at least about `padding` pixels apart.

    Returns, for each vertex of the cut mesh, the vertex of `mesh` that it came from and its place in the texture ([0, 1], origin at the
    lower left), and the faces of the cut mesh in the order of `mesh.faces`.
    """
    # xatlas drops faces that are small in absolute terms: give it the mesh at a size of its liking
    points = mesh.vertices.astype(np.float64)
    extent = float(np.ptp(points, axis=0).max())
    if not np.isfinite(points).all() or extent == 0:
        raise KilnError("no-surface", "The surface has no extent, or vertices that are not numbers.", "Extract it again with another grid.")
    points = ((points - points.min(0)) * (10 / extent)).astype(np.float32)
    given = {"points": points, "faces": mesh.faces, "size": size, "padding": padding}
    source, uv, faces, chart, flat = _aside(given, _within(progress, 0.0, 0.8))
    folded = _folded(uv, faces, chart, size)
    if len(folded):  # these charts are cut again, the others only packed again
        laid = {"source": source, "flat": flat, "cut": faces, "chart": chart, "folded": folded}
        source, uv, faces, _, _ = _aside({**given, **laid}, _within(progress, 0.8, 1.0))
    return source, uv, faces


def _within(progress: Progress, first: float, last: float) -> Progress:
    return lambda done: progress(first + (last - first) * done)


def _aside(given: dict[str, Any], progress: Progress) -> list[np.ndarray]:
    """`_cut` in a process of its own."""
    seconds, what, hint = len(given["faces"]) / FACES_A_SECOND, "Cutting the surface into charts", "Try fewer faces (surface.faces)."
    found = in_own_process("backend.mesh.unwrap", given, seconds, what, hint, progress)
    return [found[name] for name in RESULTS]


def _folded(uv: Float[np.ndarray, "n 2"], faces: Int[np.ndarray, "f 3"], label: Int[np.ndarray, "f"], size: int) -> Int[np.ndarray, "c"]:
    """Charts that lie over themselves: where the order of the faces decides which of them a pixel sees, and the two are no neighbours."""
    from backend.mesh import raster  # not at the top: the process that cuts would load numba for nothing

    screen = uv.astype(np.float64) * size
    flat = np.ones(len(screen))
    first, last = (raster.z_buffer(screen, flat, order, size, size)[1] for order in (faces, faces[::-1]))
    row, column = np.nonzero((first >= 0) & (first + last != len(faces) - 1))
    upper, lower = first[row, column], len(faces) - 1 - last[row, column]
    touching = (faces[upper][:, :, None] == faces[lower][:, None, :]).any((1, 2))
    return np.unique(label[upper[~touching]])


def _parts(centres: Float[np.ndarray, "f 3"], faces: Int[np.ndarray, "f"]) -> list[Int[np.ndarray, "p"]]:
    """Faces in groups of at most PART that lie together: halved across the longest side until they fit."""
    if len(faces) <= PART:
        return [np.sort(faces)]
    axis = int(np.ptp(centres[faces], axis=0).argmax())
    order = faces[np.argsort(centres[faces, axis], kind="stable")]
    return _parts(centres, order[: len(order) // 2]) + _parts(centres, order[len(order) // 2 :])


def _cut(
    points: Float[np.ndarray, "n 3"], triangles: Int[np.ndarray, "f 3"]
) -> tuple[Int[np.ndarray, "m"], Float[np.ndarray, "m 2"], Int[np.ndarray, "f 3"], Int[np.ndarray, "f"]]:
    """Charts side by side nowhere yet: source vertices, places in the points' unit, faces, and which chart of the smoothed surface each
    face was in. Charts that fold when they are relaxed are cut again."""
    everything = np.arange(len(triangles))
    parts = [everything] if len(triangles) <= WHOLE else _parts(points[triangles].mean(1), everything)
    source, rough, faces = _charts(_even(points, triangles), triangles, parts)
    rough, label = _scaled(rough, points[source], faces)
    chart = label[faces[:, 0]]
    uv = _unfold(_relax(points.astype(np.float64)[source], rough, faces), faces)
    bad = np.unique(chart[(_area(uv, faces) <= 0) & (_area(rough, faces) > 0)])
    return *_cut_again(points, triangles, source, uv, faces, chart, bad), chart


def _cut_again(
    points: Float[np.ndarray, "n 3"],
    triangles: Int[np.ndarray, "f 3"],
    source: Int[np.ndarray, "m"],
    uv: Float[np.ndarray, "m 2"],
    faces: Int[np.ndarray, "f 3"],
    chart: Int[np.ndarray, "f"],
    bad: Int[np.ndarray, "c"],
) -> tuple[Int[np.ndarray, "k"], Float[np.ndarray, "k 2"], Int[np.ndarray, "f 3"]]:
    """The same with the charts in `bad` cut as the true surface asks, and as xatlas lays them out."""
    again = [np.flatnonzero(chart == number) for number in bad]
    if again:
        new, places, cut = _charts(points, triangles, again)
        places, _ = _scaled(places, points[new], cut[cut[:, 0] >= 0])
        faces = np.where(cut >= 0, cut + len(source), faces)
        source, uv = np.concatenate([source, new]), np.concatenate([uv, places])
        kept, index = np.unique(faces, return_inverse=True)
        source, uv, faces = source[kept], uv[kept], index.reshape(-1, 3)
    return source, uv, faces.astype(np.int32)


def _even(points: Float[np.ndarray, "n 3"], triangles: Int[np.ndarray, "f 3"]) -> Float[np.ndarray, "n 3"]:
    """The surface smoothed so far that bumps of a triangle's size and thin triangles do not make charts of their own."""
    a, b = triangles[:, [0, 1, 2]].ravel(), triangles[:, [1, 2, 0]].ravel()
    graph = coo_matrix((np.ones(2 * len(a)), (np.r_[a, b], np.r_[b, a])), shape=(len(points),) * 2).tocsr()
    graph.data[:] = 1
    around = graph.getnnz(1)[:, None]
    even = points.astype(np.float64)
    for _ in range(EVEN):
        even = np.where(around > 0, (even + graph @ even / np.maximum(around, 1)) / 2, even)
    return even.astype(np.float32)


def _charts(
    points: Float[np.ndarray, "n 3"], triangles: Int[np.ndarray, "f 3"], parts: list[Int[np.ndarray, "p"]]
) -> tuple[Int[np.ndarray, "m"], Float[np.ndarray, "m 2"], Int[np.ndarray, "f 3"]]:
    """xatlas' charts of each part: source vertices, places in any unit, and faces, -1 where no part holds the face."""
    atlas = xatlas.Atlas()
    used = []
    for part in parts:
        own, index = np.unique(triangles[part], return_inverse=True)
        used.append(own)
        atlas.add_mesh(points[own], index.reshape(-1, 3).astype(np.uint32))
    charts, pack = xatlas.ChartOptions(), xatlas.PackOptions()
    charts.max_cost = MAX_COST
    pack.resolution = 256  # it is packed again
    atlas.generate(charts, pack)
    sources, places, faces, count = [], [], np.full((len(triangles), 3), -1, np.int64), 0
    for number, (part, own) in enumerate(zip(parts, used, strict=True)):
        source, cut, uv = atlas[number]
        sources.append(own[source])
        places.append(uv.astype(np.float64) * [atlas.width, atlas.height])
        faces[part] = cut.astype(np.int64) + count
        count += len(source)
    return np.concatenate(sources).astype(np.int64), np.concatenate(places), faces


def _scaled(
    uv: Float[np.ndarray, "n 2"], points: Float[np.ndarray, "n 3"], faces: Int[np.ndarray, "f 3"]
) -> tuple[Float[np.ndarray, "n 2"], Int[np.ndarray, "n"]]:
    """Every chart face up and with the area of its surface; and each vertex's chart."""
    label = _labels(faces, len(uv))
    count = label.max() + 1
    corner, chart, area = points.astype(np.float64)[faces], label[faces[:, 0]], _area(uv, faces)
    across = np.linalg.norm(np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), axis=1)
    scale = np.sqrt(np.bincount(chart, across, count) / np.maximum(np.bincount(chart, np.abs(area), count), 1e-12))
    mirror = np.where(np.bincount(chart, area, count) < 0, -1, 1)
    return uv * np.stack([scale * mirror, scale], 1)[label], label


def _labels(faces: Int[np.ndarray, "f 3"], count: int) -> Int[np.ndarray, "n"]:
    """Each vertex's chart; a vertex without faces is one, too."""
    a, b, c = faces.T
    graph = coo_matrix((np.ones(2 * len(faces), bool), (np.r_[a, a], np.r_[b, c])), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def _relax(points: Float[np.ndarray, "n 3"], uv: Float[np.ndarray, "n 2"], faces: Int[np.ndarray, "f 3"]) -> Float[np.ndarray, "n 2"]:
    """Charts as nearly isometric as they go, in the points' unit (ARAP: Liu et al. 2008, "A local/global approach to mesh
    parameterization").

    Places in the plane are complex numbers.
    """
    corner = points[faces]
    side, other = corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]
    length = np.maximum(np.linalg.norm(side, axis=1), 1e-12)
    along = (side * other).sum(1) / length
    height = np.linalg.norm(other - side * (along / length)[:, None], axis=1)
    flat = np.stack([np.zeros(len(faces)), length, along + 1j * height], 1)
    edges = []  # from, to, as they lie in the flat triangle, cotangent of the angle across
    for k in range(3):
        a, b, c = flat[:, k], flat[:, (k + 1) % 3], flat[:, (k + 2) % 3]
        turn = (a - c).conj() * (b - c)
        edges.append((faces[:, k], faces[:, (k + 1) % 3], b - a, np.clip(turn.real / np.maximum(np.abs(turn.imag), 1e-12), 0.01, 50)))
    count = len(uv)
    rows, columns, _, weights = (np.concatenate([edge[n] for edge in edges]) for n in range(4))
    laplace = coo_matrix((-weights, (rows, columns)), shape=(count, count))
    laplace = (laplace + laplace.T).tocsc()
    anchor = 1e-9  # holds each chart where it is
    system = laplace - diags(np.asarray(laplace.sum(1)).ravel() - anchor)
    solver = splu(system.tocsc(), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    place = uv[:, 0] + 1j * uv[:, 1]
    for _ in range(RELAXATIONS):
        turns = sum((place[to] - place[start]) * edge.conj() * weight for start, to, edge, weight in edges)
        turns /= np.maximum(np.abs(turns), 1e-20)
        wanted = anchor * place
        for start, to, edge, weight in edges:
            step = weight * turns * edge
            wanted += np.bincount(to, step.real, count) - np.bincount(start, step.real, count)
            wanted += 1j * (np.bincount(to, step.imag, count) - np.bincount(start, step.imag, count))
        place = solver.solve(wanted.real) + 1j * solver.solve(wanted.imag)
    return np.stack([place.real, place.imag], 1)


def _unfold(uv: Float[np.ndarray, "n 2"], faces: Int[np.ndarray, "f 3"]) -> Float[np.ndarray, "n 2"]:
    """Faces that lie upside down are turned by moving their corners to the middle of their neighbours, again and again."""
    a, b = faces[:, [0, 1, 2]].ravel(), faces[:, [1, 2, 0]].ravel()
    graph = coo_matrix((np.ones(2 * len(a)), (np.r_[a, b], np.r_[b, a])), shape=(len(uv),) * 2).tocsr()
    graph.data[:] = 1
    for _ in range(UNFOLDS):
        corners = np.unique(faces[_area(uv, faces) <= 0])
        if len(corners) == 0:
            break
        near = graph[corners]
        uv[corners] = near @ uv / near.getnnz(1)[:, None]
    return uv


def _area(uv: Float[np.ndarray, "n 2"], faces: Int[np.ndarray, "f 3"]) -> Float[np.ndarray, "f"]:
    """Twice the faces' signed areas."""
    side, other = uv[faces[:, 1]] - uv[faces[:, 0]], uv[faces[:, 2]] - uv[faces[:, 0]]
    return side[:, 0] * other[:, 1] - side[:, 1] * other[:, 0]


def _pack(uv: Float[np.ndarray, "n 2"], faces: Int[np.ndarray, "f 3"], size: int, padding: int) -> Float[np.ndarray, "n 2"]:
    """The charts side by side in the unit square, all at one scale, as large as they fit in a few attempts."""
    side = min(size, PACKED)
    wide = side * math.sqrt(0.5 / len(np.unique(_labels(faces, len(uv))[faces[:, 0]])))  # of a chart: many small ones stand closer
    padding = max(min(padding + 1, round(wide * size / side / 8)), 2)
    pack = xatlas.PackOptions()
    pack.padding, pack.bilinear, pack.blockAlign, pack.rotate_charts = -(-padding * side // size), True, False, True
    pack.resolution = 0
    pack.texels_per_unit = side * math.sqrt(0.6 / max(np.abs(_area(uv, faces)).sum() / 2, 1e-12))
    best, largest = None, math.inf
    for _ in range(ATTEMPTS):
        atlas = xatlas.Atlas()
        atlas.add_uv_mesh(uv.astype(np.float32), faces.astype(np.uint32))
        atlas.generate(xatlas.ChartOptions(), pack)
        source, cut, found = atlas[0]
        filled = max(atlas.width, atlas.height)
        miss = filled / side if filled > side else (side / filled) ** 0.5  # too large costs padding, too small costs texels
        if miss < largest:
            best, largest = np.empty_like(uv), miss
            best[faces.ravel()] = found[cut.ravel()] * np.array([atlas.width, atlas.height]) / max(filled, side)
        if 0.98 * side <= filled <= side:
            break
        pack.texels_per_unit *= 0.99 * side / filled
    return np.clip(best, 0, 1).astype(np.float32)


def _run(points, faces, size, padding, source=None, flat=None, cut=None, chart=None, folded=None) -> dict[str, Any]:
    """What the process of `_aside` does: everything, or the folded charts of an earlier run again."""
    if folded is None:
        source, flat, cut, chart = _cut(points, faces)
    else:
        source, flat, cut = _cut_again(points, faces, source, flat, cut, chart, folded)
    packed = _pack(flat, cut, int(size), int(padding))
    return dict(zip(RESULTS, (source, packed, cut, chart, flat), strict=True))


if __name__ == "__main__":
    answer(_run)
