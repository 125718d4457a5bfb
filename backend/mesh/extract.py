"""A closed, single-walled mesh from what the views saw: a field on a grid, marching cubes, cleaning.

The field's *sign* comes from visibility, as in space carving (Kutulakos and Seitz 2000): a place is outside if and only if some view sees
through it or sees something behind it; what no view sees is inside, so there are no inner walls and no holes. The field's *zero* comes from
depth: the depth that the views carry, or else the splats' density, with the splats' depth deciding only what is hidden.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numba import njit, prange
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes

from backend.mesh.clean import drop_pieces, smooth
from backend.mesh.decimate import decimate
from backend.mesh.mesh import Mesh
from backend.progress import Progress, silent
from backend.splats.model import Splats
from backend.splats.render import render
from backend.views.views import Views
from protocol import recipes
from protocol.errors import KilnError

REACH = 4.0  # cells: the field is cut off beyond this distance
STEPS = 8000  # the field is kept as int16, this many steps a cell
MARGIN = 3  # cells of empty space around the subject
SLAB = 64  # layers of the grid that marching cubes holds as float32 at a time
STEEPEST = 6.0  # depth change between neighbouring pixels, in pixel sizes, above which they show two surfaces
AGREE = 0.5  # cells: views that see the same surface within this distance are averaged
FAINTEST = 0.06  # alpha below which a pixel shows background alone
CORE = 0.5  # cells: how far along a thin part its core is averaged
THINNEST = 0.7  # cells: radius of the parts that are kept although they are thinner than the grid resolves
DENSITY = 0.4  # opacity-weighted Gaussian density at the surface (levels 0.3 to 0.7 score alike)


def extract(splats: Splats, views: Views, p: recipes.Surface, progress: Progress = silent) -> Mesh:
    """The surface of the subject, unit frame. Uses the views that may be fitted alone; splats only where the views have no depth.

    Raises `KilnError("no-surface")` if there is none.
    """
    seen = views.for_fitting
    progress(0.0, "Reading depth")
    exact = seen.depth is not None
    depth = seen.depth if exact else _splat_depth(splats, seen, progress)
    points, normals, radii = _surface_samples(seen, depth)
    if len(points) < 50:
        raise KilnError(
            "no-surface", "The views show no surface: hardly any pixel has depth.", "Check that the subject fills the pictures."
        )
    low, high = points.min(0).astype(np.float64), points.max(0).astype(np.float64)
    cell = float((high - low).max()) / p.grid
    origin = low - MARGIN * cell
    shape = tuple(int(n) for n in np.ceil((high - origin) / cell).astype(int) + MARGIN + 1)

    progress(0.2, "Carving")
    field = np.empty(shape, np.int16)
    inverse, kind = np.empty(depth.shape, np.float32), np.empty(depth.shape, np.uint8)
    rim = np.empty((len(seen), 2, *depth.shape[1:]), np.float32)
    for i, camera in enumerate(seen.cameras):
        inverse[i], kind[i], rim[i] = _prepare(depth[i], seen.alpha[i], camera.fx, camera.fy)
    poses = np.stack([camera.camera_from_world for camera in seen.cameras])
    lenses = np.array([[camera.fx, camera.fy, camera.cx, camera.cy] for camera in seen.cameras])
    for first in range(0, shape[0], 16):
        progress(0.2 + 0.4 * first / shape[0], "Carving")
        _carve(field, first, min(first + 16, shape[0]), origin, cell, poses, lenses, inverse, kind, rim)
    progress(0.6, "Keeping thin parts")
    if exact:
        carved = field.copy()
        thin = _keep_thin(field, (points - origin.astype(np.float32)) / np.float32(cell), normals)
        cores = (points[thin] - normals[thin] * radii[thin, None] - origin) / cell
    else:
        _add_density(field, splats, origin, cell)
    _close(field)

    progress(0.7, "Marching cubes")
    surface = _march(field)
    if len(surface.faces) == 0:
        raise KilnError("no-surface", "No surface was found.", "Check the views' alpha and depth, or raise surface.grid.")
    progress(0.75, "Removing floaters")
    surface = drop_pieces(surface, p.smallest_piece)
    progress(0.8, "Smoothing")
    surface = smooth(surface, p.smoothing)
    if exact and thin.any():
        surface = _slim(surface, carved, cores, radii[thin] / cell)
    progress(0.85, "Decimating")
    surface = decimate(surface, p.faces)
    return Mesh((surface.vertices * cell + origin).astype(np.float32), surface.faces)


def _splat_depth(splats: Splats, seen: Views, progress: Progress) -> Float[np.ndarray, "v h w"]:
    """Depth as the splats have it, where the views' own alpha says that something is there."""
    maps = []
    for i, camera in enumerate(seen.cameras):
        progress(0.2 * i / len(seen), "Depth of the splats")
        drawn = render(splats, camera)
        maps.append(np.where((drawn.alpha > 0.5) & (seen.alpha[i] > 0.5), drawn.depth, 0))
    return np.stack(maps).astype(np.float32)


def _surface_samples(
    seen: Views, depth: Float[np.ndarray, "v h w"]
) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "n 3"], Float[np.ndarray, "n"]]:
    """Every pixel's surface point, its normal towards the camera (the viewing ray where the views have no normals), and how thick a part
    thinner than a pixel would be there: the covered share of half a pixel."""
    points, normals, radii = [], [], []
    for i, camera in enumerate(seen.cameras):
        hit = depth[i] > 0
        place = camera.unproject(depth[i])[hit]
        points.append(place.astype(np.float32))  # all pixels of all views: half the memory
        radii.append((0.5 * seen.alpha[i][hit] * depth[i][hit] / camera.fx).astype(np.float32))
        towards = camera.centre - place
        towards /= np.linalg.norm(towards, axis=1, keepdims=True)
        if seen.normals is None:
            normals.append(towards.astype(np.float32))
        else:
            given = seen.normals[i][hit].astype(np.float64)
            facing = (given * towards).sum(1, keepdims=True)
            usable = np.linalg.norm(given, axis=1, keepdims=True) > 0.5
            normals.append(np.where(usable, given * np.where(facing < 0, -1, 1), towards).astype(np.float32))
    return np.concatenate(points), np.concatenate(normals), np.concatenate(radii)


@njit(nogil=True, cache=True)
def _prepare(depth, alpha, fx, fy):
    """What carving looks up in one view: 1 / depth, what each 2 x 2 block of pixels shows, and the alpha at a silhouette.

    kind[r, c] for the block whose first pixel is (r, c): 0 background alone, 1 one smooth surface, 2 a rim against the background, 3 a
    step between two surfaces. rim: alpha, and the alpha above which a pixel belongs to the subject: half of what its neighbourhood
    reaches, so that parts thinner than a pixel are not taken for background.
    """
    height, width = depth.shape
    inverse = np.zeros((height, width), np.float32)
    kind = np.zeros((height, width), np.uint8)
    rim = np.zeros((2, height, width), np.float32)
    rim[0] = alpha
    for r in range(height):
        for c in range(width):
            if depth[r, c] > 0:
                inverse[r, c] = 1 / depth[r, c]
            most = FAINTEST
            for i in range(max(0, r - 1), min(height, r + 2)):
                for j in range(max(0, c - 1), min(width, c + 2)):
                    most = max(most, float(alpha[i, j]))
            rim[1, r, c] = most / 2
    for r in range(height - 1):
        for c in range(width - 1):
            near, far, hits, faint = np.inf, 0.0, 0, 0
            for i in range(r, r + 2):
                for j in range(c, c + 2):
                    if depth[i, j] > 0:
                        near, far, hits = min(near, depth[i, j]), max(far, depth[i, j]), hits + 1
                    if alpha[i, j] < FAINTEST:
                        faint += 1
            if hits == 0:
                kind[r, c] = 0 if faint == 4 else 2
            elif hits < 4:
                kind[r, c] = 2
            else:
                kind[r, c] = 1 if far - near < STEEPEST * near / min(fx, fy) else 3
    return inverse, kind, rim


@njit(nogil=True, cache=True)
def _signed_distance(x, y, z, lens, inverse, kind, rim):
    """How far a place (camera axes) lies in front of what one view sees, in world units; -inf where the view says nothing. And the cosine
    of the view's angle to the surface, 0 where it is unknown.

    On a smooth surface 1 / depth, linear over the screen on any plane, gives the tangent plane, and the distance is the one to that plane.
    """
    fx, fy, cx, cy = lens
    if z <= 1e-6:
        return -np.inf, 0.0
    px, py = x / z, y / z
    u, v = fx * px + cx - 0.5, fy * py + cy - 0.5
    height, width = inverse.shape
    if u < 0 or v < 0 or u >= width - 1 or v >= height - 1:
        return -np.inf, 0.0
    c, r = int(u), int(v)
    a, b = u - c, v - r
    shows = kind[r, c]
    if shows == 0:
        return np.inf, 0.0
    if shows == 1:
        q00, q01, q10, q11 = inverse[r, c], inverse[r, c + 1], inverse[r + 1, c], inverse[r + 1, c + 1]
        q = (q00 * (1 - a) + q01 * a) * (1 - b) + (q10 * (1 - a) + q11 * a) * b
        qx = ((q01 - q00) * (1 - b) + (q11 - q10) * b) * fx
        qy = ((q10 - q00) * (1 - a) + (q11 - q01) * a) * fy
        qz = q - qx * px - qy * py
        length = np.sqrt(qx * qx + qy * qy + qz * qz)
        return (1 - z * q) / length, q / (length * np.sqrt(1 + px * px + py * py))
    # Several surfaces share these pixels: only what lies in front of all of them is free
    nearest = max(max(inverse[r, c], inverse[r, c + 1]), max(inverse[r + 1, c], inverse[r + 1, c + 1]))
    distance = 1 / nearest - z if nearest > 0 else -np.inf
    if shows == 2:  # the rest is background, and the silhouette runs where alpha crosses `rim`
        given = (rim[0, r, c] * (1 - a) + rim[0, r, c + 1] * a) * (1 - b) + (rim[0, r + 1, c] * (1 - a) + rim[0, r + 1, c + 1] * a) * b
        level = (rim[1, r, c] * (1 - a) + rim[1, r, c + 1] * a) * (1 - b) + (rim[1, r + 1, c] * (1 - a) + rim[1, r + 1, c + 1] * a) * b
        distance = max(distance, (level - given) / (2 * level) * 1.5 * z / fx)
    return distance, 0.0


@njit(parallel=True, nogil=True, cache=True)
def _carve(field, first, last, origin, cell, poses, lenses, inverse, kind, rim):
    """field[first:last]: the largest free distance over all views, averaged over those that agree; STEPS of a cell, cut off at REACH."""
    views = len(poses)
    _, ny, nz = field.shape
    for line in prange((last - first) * ny):
        i, j = first + line // ny, line % ny
        distances, cosines = np.empty(views), np.empty(views)
        latest = 0  # the view that last found a place free: its neighbour most likely is so there too
        for k in range(nz):
            wx, wy, wz = origin[0] + i * cell, origin[1] + j * cell, origin[2] + k * cell
            largest = -np.inf
            for step in range(views):
                n = (latest + step) % views
                m = poses[n]
                x = m[0, 0] * wx + m[0, 1] * wy + m[0, 2] * wz + m[0, 3]
                y = m[1, 0] * wx + m[1, 1] * wy + m[1, 2] * wz + m[1, 3]
                z = m[2, 0] * wx + m[2, 1] * wy + m[2, 2] * wz + m[2, 3]
                distances[n], cosines[n] = _signed_distance(x, y, z, lenses[n], inverse[n], kind[n], rim[n])
                distances[n] /= cell
                if distances[n] > largest:
                    largest = distances[n]
                if largest >= REACH:
                    latest = n
                    break
            if -REACH < largest < REACH:
                total, weight = largest * 1e-3, 1e-3
                for n in range(views):
                    gap = largest - distances[n]
                    if gap < AGREE and cosines[n] > 0:
                        w = cosines[n] ** 2 * (1 - gap / AGREE)
                        total += w * distances[n]
                        weight += w
                largest = total / weight
            field[i, j, k] = np.int16(min(max(largest, -REACH), REACH) * STEPS)


@njit(nogil=True, cache=True)
def _keep_thin(field, points, normals):
    """Puts a ball of THINNEST cells at every surface point (cells) that has no solid behind it: a part thinner than the grid resolves, or
    one that some view's pixels missed. Every such point was seen, so something is there."""
    nx, ny, nz = field.shape
    thin = np.zeros(len(points), np.bool_)
    for n in range(len(points)):
        x, y, z = points[n, 0] - 0.6 * normals[n, 0], points[n, 1] - 0.6 * normals[n, 1], points[n, 2] - 0.6 * normals[n, 2]
        thin[n] = _lookup(field, x, y, z) > 0.15
    for n in range(len(points)):
        if not thin[n]:
            continue
        x, y, z = points[n, 0] - 0.25 * normals[n, 0], points[n, 1] - 0.25 * normals[n, 1], points[n, 2] - 0.25 * normals[n, 2]
        for i in range(max(0, int(x) - 2), min(nx, int(x) + 4)):
            for j in range(max(0, int(y) - 2), min(ny, int(y) + 4)):
                for k in range(max(0, int(z) - 2), min(nz, int(z) + 4)):
                    distance = np.sqrt((i - x) ** 2 + (j - y) ** 2 + (k - z) ** 2) - THINNEST
                    field[i, j, k] = min(field[i, j, k], np.int16(min(distance, REACH) * STEPS))
    return thin


@njit(nogil=True, cache=True)
def _lookup(field, x, y, z):
    """The field between grid points, in cells; 0 outside the grid."""
    i, j, k = int(x), int(y), int(z)
    if x < 0 or y < 0 or z < 0 or i >= field.shape[0] - 1 or j >= field.shape[1] - 1 or k >= field.shape[2] - 1:
        return 0.0
    a, b, c = x - i, y - j, z - k
    value = 0.0
    for di in range(2):
        for dj in range(2):
            for dk in range(2):
                value += (a if di else 1 - a) * (b if dj else 1 - b) * (c if dk else 1 - c) * field[i + di, j + dj, k + dk]
    return value / STEPS


def _slim(mesh: Mesh, carved: np.ndarray, cores: Float[np.ndarray, "n 3"], radii: Float[np.ndarray, "n"]) -> Mesh:
    """Draws the parts that `_keep_thin` added, fat as the grid makes them, in to their own thickness around their cores (cells)."""
    vertices = mesh.vertices.astype(np.float64)
    outside = _lookups(carved, vertices)
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


@njit(nogil=True, cache=True)
def _lookups(field, points):
    values = np.empty(len(points))
    for n in range(len(points)):
        values[n] = _lookup(field, points[n, 0], points[n, 1], points[n, 2])
    return values


def _add_density(field: np.ndarray, splats: Splats, origin: Float[np.ndarray, "3"], cell: float) -> None:
    """Makes solid also what the splats fill: their opacity-weighted density above DENSITY (splats.md, section 4, "d")."""
    axes = _axes(splats.quaternions)
    # A Gaussian thinner than half a cell would slip through between grid points
    deviations = np.maximum(np.exp(splats.log_scales.astype(np.float64)) / cell, 0.5)
    opacity = 1 / (1 + np.exp(-splats.opacity_logits.astype(np.float64)))
    reach = 3 * np.sqrt(((axes * deviations[:, None, :]) ** 2).sum(2))
    inverse_axes = np.ascontiguousarray(np.swapaxes(axes, 1, 2) / deviations[:, :, None])
    density = _density(field.shape, (splats.means - origin) / cell, inverse_axes, opacity, reach)
    np.minimum(field, (np.clip((DENSITY - density) / DENSITY, -1, 1) * STEPS).astype(np.int16), out=field)


@njit(parallel=True, nogil=True, cache=True)
def _density(shape, means, inverse_axes, opacity, reach):
    """Sum of opacity x exp(-r^2 / 2) at every grid point; inverse_axes[n] takes an offset in cells to standard deviations."""
    density = np.zeros(shape, np.float32)
    slabs = (shape[0] + 7) // 8
    for slab in prange(slabs):
        for n in range(len(means)):
            x0 = max(int(np.ceil(means[n, 0] - reach[n, 0])), slab * 8)
            x1 = min(int(np.floor(means[n, 0] + reach[n, 0])), min(slab * 8 + 7, shape[0] - 1))
            if x0 > x1:
                continue
            a = inverse_axes[n]
            for i in range(x0, x1 + 1):
                for j in range(max(0, int(np.ceil(means[n, 1] - reach[n, 1]))), min(shape[1] - 1, int(means[n, 1] + reach[n, 1])) + 1):
                    for k in range(max(0, int(np.ceil(means[n, 2] - reach[n, 2]))), min(shape[2] - 1, int(means[n, 2] + reach[n, 2])) + 1):
                        x, y, z = i - means[n, 0], j - means[n, 1], k - means[n, 2]
                        p = a[0, 0] * x + a[0, 1] * y + a[0, 2] * z
                        q = a[1, 0] * x + a[1, 1] * y + a[1, 2] * z
                        r = a[2, 0] * x + a[2, 1] * y + a[2, 2] * z
                        power = 0.5 * (p * p + q * q + r * r)
                        if power < 4.5:
                            density[i, j, k] += np.float32(opacity[n] * np.exp(-power))
    return density


def _axes(quaternions: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 3 3"]:
    """Rotation matrices; columns are the Gaussians' axes."""
    w, x, y, z = (quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)).astype(np.float64).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def _close(field: np.ndarray) -> None:
    """Outside at the grid's border, so that the surface is closed where no view looked."""
    outside = np.int16(REACH * STEPS)
    for axis in range(3):
        border = np.moveaxis(field, axis, 0)
        border[0] = border[-1] = outside


def _march(field: np.ndarray) -> Mesh:
    """Marching cubes (Lewiner 2003, skimage) in slabs that share a layer, in cells."""
    vertices, faces, offset = [], [], 0
    for first in range(0, field.shape[0] - 1, SLAB):
        slab = field[first : first + SLAB + 1]
        if slab.min() >= 0 or slab.max() <= 0:
            continue
        # A vertex on a grid point would make faces without area, and could be two vertices where slabs meet
        values = slab.astype(np.float32) / np.float32(STEPS)
        values = np.where(values >= 0, np.maximum(values, np.float32(0.01)), np.minimum(values, np.float32(-0.01)))
        v, f, _, _ = marching_cubes(values, 0.0, method="lewiner", gradient_direction="descent")
        vertices.append(v + np.array([first, 0, 0], v.dtype))
        faces.append(f.astype(np.int64) + offset)
        offset += len(v)
    if not vertices:
        return Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32))
    points, triangles = np.concatenate(vertices), np.concatenate(faces)
    if len(vertices) > 1:  # one vertex for each place where slabs meet
        on_seam = np.flatnonzero(np.isin(points[:, 0], np.arange(SLAB, field.shape[0], SLAB)))
        _, kept, index = np.unique(np.round(points[on_seam], 3), axis=0, return_index=True, return_inverse=True)
        same = np.arange(len(points))
        same[on_seam] = on_seam[kept][index.reshape(-1)]
        used, triangles = np.unique(same[triangles], return_inverse=True)
        points, triangles = points[used], triangles.reshape(-1, 3)
    return Mesh(points.astype(np.float32), triangles.astype(np.int32))
