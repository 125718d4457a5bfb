"""A closed, single-walled mesh from what the views saw: a field on a grid, marching cubes, cleaning.

The field's *sign* comes from visibility, as in space carving (Kutulakos and Seitz 2000): a place is outside if some view sees through it or
sees something behind it; what the views hide is inside, so there are no inner walls and no holes. The field's *zero* comes from depth:
the depth that the views carry, or else the mean of the depths that the splats have in all views, and their density.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int
from numba import prange
from scipy.spatial import cKDTree

from backend.mesh.bins import sorted_into_bins
from backend.mesh.clean import drop_pieces, smooth
from backend.mesh.cloud import Cloud, cloud, summed_normals, surface_points
from backend.mesh.decimate import decimate
from backend.mesh.field import OUTSIDE, ROUGH_REACH, STEPS, Field, Sights, activate, carve, lookups, sights, within
from backend.mesh.march import SIDE, march
from backend.mesh.mesh import Mesh
from backend.progress import Progress, silent
from backend.splats.model import SH_C0, Splats
from backend.splats.parallel import kernel, parallel_kernel
from backend.splats.render import render
from backend.views.views import Views
from protocol import recipes
from protocol.errors import KilnError

MARGIN = 3  # cells of empty space around the subject
CORE = 0.5  # cells: how far along a thin part its core is averaged
THINNEST = 0.7  # cells: radius of the parts that are kept although they are thinner than the grid resolves
BALL = 2.5  # cells around such a part in which the field knows of it
DENSITY = 0.5  # opacity-weighted Gaussian density at the surface (levels 0.3 to 0.7 score alike)
CROSSING = 0.8  # transmittance at which splats begin to be a surface
SETTLING = 3  # passes in which vertices are moved onto the surface points around them
COARSEST, COARSER = 16, 0.7  # cells along the longest side to which a budget of triangles may lead, and each step there
SKIN = 1.6  # deviations of a Gaussian by which its surface lies before its centre


def extract(splats: Splats, views: Views, p: recipes.Surface, progress: Progress = silent) -> Mesh:
    """The surface of the subject with at most `p.faces` triangles: `dense` and `within_budget` in one."""
    surface = dense(splats, views, p, lambda done, text="", preview=None: progress(0.85 * done, text))
    return within_budget(surface, splats, views, p, lambda done, text="", preview=None: progress(0.85 + 0.15 * done, text))


def within_budget(surface: Mesh, splats: Splats, views: Views, p: recipes.Surface, progress: Progress = silent) -> Mesh:
    """A dense surface of the subject with at most `p.faces` triangles.

    A closed surface with g handles has more than 4 g triangles: wheels of spokes and lattices are found again on coarser grids, on which
    their holes close, until the budget is met or the grid is COARSEST.
    """
    made = decimate(surface, p.faces, progress)
    grid = recipes.cells(p.grid, p.faces)
    while len(made.faces) > p.faces and grid > COARSEST:
        grid = max(COARSEST, int(COARSER * grid))
        coarse = dense(splats, views, dataclasses.replace(p, grid=grid), lambda done, text="", preview=None: progress(done, text))
        made = decimate(coarse, p.faces, progress)
    return made


def dense(splats: Splats, views: Views, p: recipes.Surface, progress: Progress = silent) -> Mesh:
    """The surface of the subject as the grid has it, unit frame. Uses the views that may be fitted alone; splats only where the views have
    no depth.

    Raises `KilnError("no-surface")` if there is none.
    """
    seen = views.for_fitting
    progress(0.0, "Reading depth")
    exact = seen.depth is not None
    # A pixel that its own view calls empty has no surface, whatever its depth
    depth, slack = (np.where(seen.alpha > 0, seen.depth, 0), 0.0) if exact else _splat_depth(splats, seen, progress)
    points, normals, radii = surface_points(seen, depth)
    looks = sights(seen.cameras, depth, seen.alpha)
    if not exact:  # what other views see through is no surface
        points = points[within(points, looks.poses, looks.lenses, looks.kind)]
    if len(points) < 50:
        raise KilnError(
            "no-surface", "The views show no surface: hardly any pixel has depth.", "Check that the subject fills the pictures."
        )
    low, high = points.min(0).astype(np.float64), points.max(0).astype(np.float64)
    cell = float((high - low).max()) / recipes.cells(p.grid, p.faces)
    margin = MARGIN * cell + ROUGH_REACH * slack
    origin = low - margin
    shape = tuple(int(n) for n in np.ceil((high - low + 2 * margin) / cell).astype(int) + 1)

    progress(0.2, "Carving")
    density = None if exact else _density_in_blocks(splats, origin, cell)
    field = carve(looks, origin, cell, shape, lambda done, text="", preview=None: progress(0.2 + 0.5 * done, text), slack, density)
    progress(0.7, "Keeping thin parts")
    if exact:
        carved = dataclasses.replace(field, index=field.index.copy(), blocks=field.blocks.copy())
        places = (points - origin.astype(np.float32)) / np.float32(cell)
        thin = keep_thin(field, looks, places, normals)
        cores = (points[thin] - normals[thin] * radii[thin, None] - origin) / cell

    progress(0.8, "Marching cubes")
    surface = march(field.blocks, field.places, field.shape, STEPS)
    if len(surface.faces) == 0:
        raise KilnError("no-surface", "No surface was found.", "Check the views' alpha and depth, or raise surface.grid.")
    progress(0.87, "Removing floaters")
    surface = drop_pieces(surface, p.smallest_piece)
    progress(0.92, "Smoothing")
    surface = smooth(surface, p.smoothing)
    if exact and seen.normals is None and thin.any():
        surface = _slim(surface, carved, cores, radii[thin] / cell)
    surface = Mesh((surface.vertices * cell + origin).astype(np.float32), surface.faces)
    if seen.normals is not None and exact:
        progress(0.95, "Settling on the surface points")
        surface = settle(surface, cloud(points, normals, cell))
    return surface


def _splat_depth(splats: Splats, seen: Views, progress: Progress) -> tuple[Float[np.ndarray, "v h w"], float]:
    """Depth as the splats have it, where the views' own alpha says that something is there; and how uncertain it is, unit frame.

    A Gaussian is met before its centre: its density along a ray is a bell (Yu et al. 2024, Gaussian Opacity Fields, section 4.1). So depth
    is taken where the transmittance falls to CROSSING, and brought forward by SKIN times the deviation that the pixel's Gaussians have on
    the mean along its ray; flat ones that face the view are hardly brought forward.
    """
    if len(splats) == 0:
        return np.zeros_like(seen.alpha), 1.0
    scales = np.exp(splats.log_scales.astype(np.float64))
    axes = _axes(splats.quaternions)
    deviation = np.zeros((len(splats), 1, 3), np.float32)
    unit = float(np.median(scales.max(1)))
    maps = []
    for i, camera in enumerate(seen.cameras):
        progress(0.2 * i / len(seen), "Depth of the splats")
        ray = splats.means - camera.centre
        ray /= np.linalg.norm(ray, axis=1, keepdims=True)
        along = 1 / np.sqrt(((np.einsum("nij,ni->nj", axes, ray) / scales) ** 2).sum(1))
        deviation[:, 0] = ((along / unit - 0.5) / SH_C0)[:, None]  # drawn as a colour
        drawn = render(dataclasses.replace(splats, sh=deviation), camera, crossing=CROSSING)
        there = (drawn.depth > 0) & (drawn.alpha > 0.5) & (seen.alpha[i] > 0.5)
        forward = SKIN * unit * drawn.color[..., 0] / np.maximum(drawn.alpha, 0.5)
        maps.append(np.where(there, np.maximum(drawn.depth - forward, 1e-3), 0))
    return np.stack(maps).astype(np.float32), unit


def keep_thin(field: Field, looks: Sights, points: Float[np.ndarray, "n 3"], normals: Float[np.ndarray, "n 3"]) -> Bool[np.ndarray, "n"]:
    """Puts a ball of THINNEST cells at every surface point (cells) that has no solid behind it, and says which these are: a part thinner
    than the grid resolves, or one that some view's pixels missed. Every such point was seen, so something is there."""
    thin = lookups(field.index, field.blocks, points - np.float32(0.6) * normals) > 0.15
    centres = (points - np.float32(0.25) * normals)[thin].astype(np.float64)
    touched = np.zeros(field.index.shape, bool)
    _touch(touched, field.index, centres)
    activate(field, looks, np.argwhere(touched))
    _stamp(field.index, field.blocks, centres)
    return thin


@kernel
def _touch(touched, index, centres):
    """Marks the blocks without values that the balls reach."""
    for n in range(len(centres)):
        low, high = _reached(centres[n], index.shape)
        for a in range(low[0], high[0]):
            for b in range(low[1], high[1]):
                for c in range(low[2], high[2]):
                    touched[a, b, c] |= index[a, b, c] == OUTSIDE


@kernel
def _reached(centre, counts):
    """The blocks that hold grid points within BALL cells along each axis: first and one past the last."""
    low, high = np.empty(3, np.int64), np.empty(3, np.int64)
    for axis in range(3):
        low[axis] = max(int(np.ceil((np.ceil(centre[axis] - BALL) - SIDE) / SIDE)), 0)
        high[axis] = min(int(np.floor(centre[axis] + BALL)) // SIDE + 1, counts[axis])
    return low, high


@kernel
def _stamp(index, blocks, centres):
    for n in range(len(centres)):
        low, high = _reached(centres[n], index.shape)
        for a in range(low[0], high[0]):
            for b in range(low[1], high[1]):
                for c in range(low[2], high[2]):
                    if index[a, b, c] < 0:
                        continue
                    block = blocks[index[a, b, c]]
                    x, y, z = centres[n, 0] - a * SIDE, centres[n, 1] - b * SIDE, centres[n, 2] - c * SIDE
                    for i in range(max(0, int(np.ceil(x - BALL))), min(SIDE, int(np.floor(x + BALL))) + 1):
                        for j in range(max(0, int(np.ceil(y - BALL))), min(SIDE, int(np.floor(y + BALL))) + 1):
                            for k in range(max(0, int(np.ceil(z - BALL))), min(SIDE, int(np.floor(z + BALL))) + 1):
                                distance = np.sqrt((i - x) ** 2 + (j - y) ** 2 + (k - z) ** 2) - THINNEST
                                block[i, j, k] = min(block[i, j, k], np.int16(distance * STEPS))


def _slim(mesh: Mesh, carved: Field, cores: Float[np.ndarray, "n 3"], radii: Float[np.ndarray, "n"]) -> Mesh:
    """Draws the parts that `keep_thin` added, fat as the grid makes them, in to their own thickness around their cores (cells)."""
    vertices = mesh.vertices.astype(np.float64)
    outside = lookups(carved.index, carved.blocks, vertices)
    moved = np.flatnonzero(outside > 0.1)
    tree = cKDTree(cores)
    distance, index = tree.query(vertices[moved], 32, distance_upper_bound=2.0, workers=-1)
    weight = np.where(np.isfinite(distance), np.exp(-((distance / CORE) ** 2) / 2), 0)
    index = np.where(np.isfinite(distance), index, 0)
    total = weight.sum(1)
    moved, weight, index, total = moved[total > 1e-6], weight[total > 1e-6], index[total > 1e-6], total[total > 1e-6]
    core = (cores[index] * weight[..., None]).sum(1) / total[:, None]
    radius = (radii[index] * weight).sum(1) / total
    away = vertices[moved] - core
    length = np.linalg.norm(away, axis=1)
    slim = core + away * (np.minimum(radius, length) / np.maximum(length, 1e-9))[:, None]
    share = np.clip((outside[moved] - 0.1) / 0.4, 0, 1)[:, None]  # none where the part meets what the grid does resolve
    vertices[moved] += share * (slim - vertices[moved])
    return Mesh(vertices.astype(np.float32), mesh.faces)


def settle(mesh: Mesh, around: Cloud) -> Mesh:
    """Moves the vertices onto the surface of the points around them, which know more than the grid; those without points stay."""
    vertices = mesh.vertices.astype(np.float64)
    for _ in range(SETTLING):
        distance, normal = around.around(vertices, summed_normals(vertices, mesh.faces))
        vertices -= distance[:, None] * normal
    return Mesh(vertices.astype(np.float32), mesh.faces)


def _density_in_blocks(
    splats: Splats, origin: Float[np.ndarray, "3"], cell: float
) -> Callable[[Int[np.ndarray, "n s s s"], Int[np.ndarray, "n 3"]], None]:
    """What fills blocks of the field with how far the splats' opacity-weighted density is from DENSITY, cut off at a cell."""
    axes = _axes(splats.quaternions)
    # A Gaussian thinner than half a cell would slip through between grid points
    deviations = np.maximum(np.exp(splats.log_scales.astype(np.float64)) / cell, 0.5)
    opacity = 1 / (1 + np.exp(-splats.opacity_logits.astype(np.float64)))
    reach = 3 * np.sqrt(((axes * deviations[:, None, :]) ** 2).sum(2))
    inverse_axes = np.ascontiguousarray(np.swapaxes(axes, 1, 2) / deviations[:, :, None])
    means = (splats.means - origin) / cell
    most = int(means.max()) // SIDE + 1 if len(means) else 0

    def fill(blocks, places):
        low, high = np.minimum(places.min(0), most), places.max(0) + 1
        first = np.maximum(np.floor((np.ceil(means - reach) - 1) / SIDE).astype(np.int64), low)
        last = np.minimum(np.floor((means + reach) / SIDE).astype(np.int64), high - 1)
        order, starts = sorted_into_bins(first - low, last - low, high - low)
        _density(blocks, places, low, high, means, inverse_axes, opacity, reach, order, starts)

    return fill


@parallel_kernel
def _density(blocks, places, low, high, means, inverse_axes, opacity, reach, order, starts):
    """blocks: cells by which the sum of opacity x exp(-r^2 / 2) falls short of DENSITY, -1 to 1 in STEPS; inverse_axes[n] takes an offset
    in cells to standard deviations."""
    counts = high - low
    for n in prange(len(blocks)):
        at = places[n] - low
        box = (at[0] * counts[1] + at[1]) * counts[2] + at[2]
        density = np.zeros((SIDE + 1, SIDE + 1, SIDE + 1), np.float32)
        for slot in range(starts[box], starts[box + 1]):
            g = order[slot]
            a = inverse_axes[g]
            x, y, z = means[g, 0] - places[n, 0] * SIDE, means[g, 1] - places[n, 1] * SIDE, means[g, 2] - places[n, 2] * SIDE
            for i in range(max(0, int(np.ceil(x - reach[g, 0]))), min(SIDE, int(np.floor(x + reach[g, 0]))) + 1):
                for j in range(max(0, int(np.ceil(y - reach[g, 1]))), min(SIDE, int(np.floor(y + reach[g, 1]))) + 1):
                    for k in range(max(0, int(np.ceil(z - reach[g, 2]))), min(SIDE, int(np.floor(z + reach[g, 2]))) + 1):
                        p = a[0, 0] * (i - x) + a[0, 1] * (j - y) + a[0, 2] * (k - z)
                        q = a[1, 0] * (i - x) + a[1, 1] * (j - y) + a[1, 2] * (k - z)
                        r = a[2, 0] * (i - x) + a[2, 1] * (j - y) + a[2, 2] * (k - z)
                        power = 0.5 * (p * p + q * q + r * r)
                        if power < 4.5:
                            density[i, j, k] += np.float32(opacity[g] * np.exp(-power))
        for i in range(SIDE + 1):
            for j in range(SIDE + 1):
                for k in range(SIDE + 1):
                    short = (DENSITY - density[i, j, k]) / DENSITY
                    blocks[n, i, j, k] = np.int16(max(short, -1.0) * STEPS)


def _axes(quaternions: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 3 3"]:
    """Rotation matrices; columns are the Gaussians' axes."""
    w, x, y, z = (quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)).astype(np.float64).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)
