"""Where Gaussians begin: on the surface that the views' depth shows, or in the shell of the visual hull of their silhouettes."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.ndimage import binary_dilation, binary_erosion, gaussian_filter
from scipy.spatial import cKDTree

from backend.views.views import Views
from protocol.errors import KilnError

from .model import SH_C0, Splats

SOLID = 0.5  # alpha from which a pixel belongs to the subject
HULL_GRID = 96  # cells along each side of the hull's grid
VOTES = 0.9  # share of the views whose silhouette must hold a cell: they may disagree a little
OPACITY = 0.3  # of splats in a hull at the start, so that those behind others get gradients
# On a surface that is known nothing has to be looked for behind it, and what is small, thin and solid lets fine print through at once.
SURFACE_OPACITY = 0.7
SURFACE_EXTENT = 0.6  # standard deviation along the surface by the distance to the neighbours
FLATNESS = 0.1  # thickness by extent
BASE_SHARE = 0.25  # of the splats on a surface are spread evenly; the rest go where one colour says least
HALVINGS = 2  # how often an even cell may be halved there


def on_surface(
    views: Views, count: int, sh_degree: int, random: np.random.Generator, counts: Float[np.ndarray, "v h w"] | None = None
) -> Splats:
    """Flat Gaussians on the surface that depth and normals of all views show, at most `count`: more where colours change within less.

    counts: how much each pixel counts, 0 to 1.
    """
    return on_points(*surface_points(views, counts), count, sh_degree, random)


def surface_points(
    views: Views, counts: Float[np.ndarray, "v h w"] | None = None
) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "n 3"], Float[np.ndarray, "n 3"], Float[np.ndarray, "n"]]:
    """The points of all views' pixels, their colours and normals, and how well each is seen."""
    found: list[tuple] = []
    for i, camera in enumerate(views.cameras):
        solid = (views.alpha[i] > SOLID) & (views.depth[i] > 0)
        if counts is not None:
            solid &= counts[i] > 0
        points, normals = camera.unproject(views.depth[i])[solid], views.normals[i][solid]
        towards = camera.centre - points
        facing = (towards * normals).sum(1) / np.linalg.norm(towards, axis=1)
        # A view that looks along the surface smears its colours over it.
        share = np.maximum(facing, 0.05) ** 2 * (1.0 if counts is None else counts[i][solid])
        found.append((points, views.images[i][solid], normals, share))
    points, colors, normals, weights = (np.concatenate(part) for part in zip(*found, strict=True))
    return points, colors, normals, weights


def on_points(points, colors, normals, weights, count: int, sh_degree: int, random: np.random.Generator) -> Splats:
    """Flat Gaussians on weighted, coloured points of a surface, at most `count`."""
    if len(points) == 0:
        raise KilnError("bad-input", "No view has depth where its alpha shows the subject.", "Capture the views again.")
    cells = _cells(points, colors, weights, count)
    sums = np.bincount(cells, weights)
    points, colors, normals = (
        np.stack([np.bincount(cells, weights * column) for column in part.T], 1) / sums[:, None] for part in (points, colors, normals)
    )
    spacing = _spacing(points)
    if len(points) > count:
        kept = random.choice(len(points), count, replace=False)
        points, colors, normals, spacing = points[kept], colors[kept], normals[kept], spacing[kept]
    scales = SURFACE_EXTENT * np.stack([spacing, spacing, FLATNESS * spacing], 1)
    return _splats(points, _quaternions_to(normals), scales, SURFACE_OPACITY, colors, sh_degree)


def in_hull(
    views: Views, count: int, sh_degree: int, random: np.random.Generator, counts: Float[np.ndarray, "v h w"] | None = None
) -> Splats:
    """Round Gaussians in the shell of the visual hull (Laurentini 1994), at most `count`, coloured by the views that face them.

    counts: how much each pixel's colour counts, 0 to 1; its silhouette is the alpha's all the same.
    """
    axis = (np.arange(HULL_GRID) + 0.5) / HULL_GRID * 2 - 1
    centres = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    left, outside = np.arange(len(centres)), np.zeros(len(centres), np.int32)  # cells that may still belong to the hull
    for i, camera in enumerate(views.cameras):
        # A cell is as wide as several pixels, so silhouettes grow by half a cell: thin parts leave a hull.
        cell = camera.fx * 2 / HULL_GRID / np.linalg.norm(camera.centre)
        solid = binary_dilation(views.alpha[i] > SOLID, iterations=max(1, round(cell / 2)))
        hit, visible = _look_up(solid, camera, centres[left])
        outside[left] += ~(hit & visible)
        left = left[len(views) - outside[left] >= VOTES * len(views)]
    hull = np.zeros((HULL_GRID,) * 3, bool)  # the unit sphere is what all views show
    hull.reshape(-1)[left] = True
    if not hull.any():
        raise KilnError(
            "bad-input", "The silhouettes of the views do not fit together: they enclose nothing.",
            "Check that the cameras belong to the pictures and that alpha shows one subject.",
        )  # fmt: skip
    shell = (hull & ~binary_erosion(hull, iterations=2)).reshape(-1)
    candidates = centres[shell]
    # As many points as asked for: several to a cell, or a random choice of cells.
    rounds = [random.permutation(candidates) for _ in range(-(-count // len(candidates)))]
    chosen = np.concatenate(rounds)[:count]
    points = chosen + random.uniform(-1, 1, chosen.shape) / HULL_GRID
    outward = _outward(hull, points)
    spacing = _spacing(points)
    quaternions = np.tile([1.0, 0.0, 0.0, 0.0], (len(points), 1))
    colors = _facing_colors(views, points, outward, counts)
    return _splats(points, quaternions, np.repeat(spacing[:, None], 3, 1), OPACITY, colors, sh_degree)


def _look_up(picture, camera, points):
    """The picture's values where points fall, and which points it shows."""
    pixels, depth = camera.project(points)
    x, y = np.floor(pixels).astype(np.int64).T
    visible = (depth > 0) & (x >= 0) & (x < camera.width) & (y >= 0) & (y < camera.height)
    return picture[np.clip(y, 0, camera.height - 1), np.clip(x, 0, camera.width - 1)], visible


def _outward(hull, points):
    """Unit vectors out of the hull at points near its surface: downhill in how full the neighbourhood is."""
    full = gaussian_filter(hull.astype(np.float32), 2)
    cells = np.clip(((points + 1) / 2 * HULL_GRID).astype(int), 1, HULL_GRID - 2)
    slope = np.stack([full[tuple((cells + step).T)] - full[tuple((cells - step).T)] for step in np.eye(3, dtype=int)], 1)
    return -slope / np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), 1e-9)


def _facing_colors(views: Views, points, outward, counts):
    """Colour of each point: the mean over the views that see it inside the subject, weighted by how much they face it."""
    total, weight = np.zeros((len(points), 3)), np.zeros((len(points), 1))
    for i, camera in enumerate(views.cameras):
        towards = camera.centre - points
        facing = np.maximum((towards * outward).sum(1) / np.linalg.norm(towards, axis=1), 0) ** 4 + 1e-6
        solid, visible = _look_up(views.alpha[i], camera, points)
        color, _ = _look_up(views.images[i], camera, points)
        facing = (facing * solid * visible * (1.0 if counts is None else _look_up(counts[i], camera, points)[0]))[:, None]
        total += facing * color
        weight += facing
    return np.where(weight > 0, total / np.maximum(weight, 1e-12), 0.5)


def _cells(points, colors, weights, count):
    """A number for each point, equal for points of one cell: an octree of about `count` leaves.

    It begins with even cells and halves, over and over, the one whose colours differ most from their mean (summed squares, weighted): what
    one splat for each cell gets wrong in all views together. Fine print gets small splats, a plain side large ones.
    """
    size = _even_size(points, max(int(count * BASE_SHARE), 1))
    cells: list[np.ndarray] = []  # of each point, level by level
    errors: list[np.ndarray] = []  # of each cell; a level's `above` is the least error of the cells around one
    above: list[np.ndarray] = []
    for level in range(HALVINGS + 1):
        here = np.unique(_cell_keys(points, size / 2**level), return_inverse=True)[1].reshape(-1)
        sums = np.maximum(np.bincount(here, weights), 1e-12)
        means = [np.bincount(here, weights * column) / sums for column in colors.T]
        around = np.full(len(sums), np.inf)
        if level:
            around[here] = np.minimum(above[-1], errors[-1])[cells[-1]]
        off = sum(((column - mean[here]) ** 2 for column, mean in zip(colors.T, means, strict=True)), np.zeros(len(points)))
        errors.append(np.bincount(here, weights * off))
        cells.append(here)
        above.append(around)

    def leaves(limit):
        """How many there are when every cell with an error above `limit` is halved."""
        inner = [int(((around > limit) & (error <= limit)).sum()) for around, error in zip(above[:-1], errors[:-1], strict=True)]
        return sum(inner) + int((above[-1] > limit).sum())

    low, high = 1e-9, float(errors[0].max()) + 2e-9
    for _ in range(24):
        middle = (low * high) ** 0.5
        if leaves(middle) > count:
            low = middle
        else:
            high = middle
    found = cells[0]
    for level in range(1, HALVINGS + 1):
        found = np.where(above[level][cells[level]] > high, cells[level] + level * len(points), found)
    return np.unique(found, return_inverse=True)[1].reshape(-1)


def _cell_keys(points, size):
    cells = ((points - points.min(0)) / size).astype(np.int64)
    return (cells[:, 0] << 42) + (cells[:, 1] << 21) + cells[:, 2]


def _even_size(points, count):
    """The size of the cubes of which points fill about `count`."""
    extent = float(np.ptp(points, axis=0).max()) + 1e-9
    small, large = extent / 4096, extent
    for _ in range(14):
        size = (small * large) ** 0.5
        if len(np.unique(_cell_keys(points, size))) > count:
            small = size
        else:
            large = size
    return large


def _spacing(points):
    """Mean distance to the three nearest neighbours, kept within a factor of ten of the median."""
    if len(points) < 4:
        return np.full(len(points), 0.02)
    nearest = cKDTree(points).query(points, k=4)[0][:, 1:].mean(1)
    middle = float(np.median(nearest))
    return np.clip(nearest, middle / 10, middle * 10) + 1e-6


def _quaternions_to(normals):
    """Rotations (w first) that take the z axis to each normal; none where a normal is 0."""
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    unit = np.where(length > 1e-6, normals / np.maximum(length, 1e-6), [0.0, 0.0, 1.0])
    unit = np.where(unit[:, 2:] < 0, -unit, unit)  # a flat Gaussian has no front: stay away from the half turn
    quaternions = np.stack([1 + unit[:, 2], -unit[:, 1], unit[:, 0], np.zeros(len(unit))], 1)
    return quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)


def _splats(points, quaternions, scales, opacity, colors, sh_degree) -> Splats:
    sh = np.zeros((len(points), (sh_degree + 1) ** 2, 3), np.float32)
    sh[:, 0] = (colors - 0.5) / SH_C0
    logits = np.full(len(points), np.log(opacity / (1 - opacity)), np.float32)
    return Splats(points.astype(np.float32), quaternions.astype(np.float32), np.log(scales).astype(np.float32), logits, sh)
