"""A mesh's texture from the views: charts, a first blend of the sharpest views, then the texture that best explains all pixels.

All averaging is of linear light, as the renderer that made the views and the one that shows the texture both filter light before they
encode it to sRGB. Errors are weighed in sRGB, where people and PSNR see them.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from numba import njit, prange
from scipy.ndimage import distance_transform_edt, maximum_filter, minimum_filter
from scipy.spatial import cKDTree

from backend.mesh import raster
from backend.mesh.mesh import Mesh, TexturedMesh
from backend.mesh.raster import linear_from_srgb, srgb_from_linear
from backend.mesh.unwrap import unwrap
from backend.progress import Progress, silent
from backend.splats.model import SH_C0, Splats
from backend.views.views import Views
from protocol import recipes

BEST = 4  # views blended in a texel
SLACK = 0.012  # unit frame: what lies this much behind the depth seen is still taken for the same surface
UNCLEAN = 1e-3  # weight of a pixel at a silhouette or a step in depth: used where nothing else saw the place
BEND = 2.0  # pixel sizes: a larger second difference of depth is a step between two surfaces
SWEEPS = 16  # of the solver; more of them sharpen noise
RAYS = 12_000_000  # the solver's memory: 20 bytes each


def bake(mesh: Mesh, splats: Splats, views: Views, p: recipes.Texture, progress: Progress = silent) -> TexturedMesh:
    """`mesh` cut into charts, with a texture of p.size pixels a side. Uses the views that may be fitted alone.

    Texels that no view saw take the colour of the splats around them, or of the nearest seen texel where there are no splats.
    """
    seen = views.for_fitting
    progress(0.0, "Cutting charts")
    source, uv, faces = unwrap(mesh, p.size, p.padding, lambda done: progress(0.3 * done, "Cutting charts"))
    normals = vertex_normals(mesh)
    cut = Mesh(np.ascontiguousarray(mesh.vertices[source]), faces)

    progress(0.3, "Looking for each texel in the views")
    place, position, direction = _texels(cut, normals[source], uv, p.size)
    depths = np.empty(seen.alpha.shape, np.float32)
    clean = np.empty(seen.alpha.shape, bool)
    for i, camera in enumerate(seen.cameras):
        progress(0.3 + 0.2 * i / len(seen), "Looking for each texel in the views")
        depths[i] = raster.depth(mesh, camera)[0]
        given = None if seen.depth is None else seen.depth[i]
        if given is not None:  # what stands before the mesh in the view hides it, even if the mesh has no such part
            hidden = (given > 0) & (given < depths[i] - SLACK)
            depths[i][hidden] = given[hidden]
        clean[i] = _clean(depths[i], seen.alpha[i], given, camera.fx)
        if given is not None:
            clean[i] &= ~hidden
    light = np.empty_like(seen.images)
    for i, image in enumerate(seen.images):
        light[i] = linear_from_srgb(image)
    poses = np.stack([camera.camera_from_world for camera in seen.cameras])
    lenses = np.array([[camera.fx, camera.fy, camera.cx, camera.cy] for camera in seen.cameras])
    color, weight = _blend(position, direction, poses, lenses, light, seen.alpha, depths, clean)

    progress(0.55, "Colouring what no view saw")
    unseen = weight <= 0
    if unseen.any():
        color[unseen] = _from_splats(splats, position[unseen]) if splats is not None and len(splats) else 0
        if (splats is None or not len(splats)) and not unseen.all():
            color[unseen] = color[~unseen][cKDTree(position[~unseen]).query(position[unseen])[1]]
    texture = np.zeros((p.size, p.size, 3), np.float32)
    texture[place[:, 0], place[:, 1]] = color
    covered = np.zeros((p.size, p.size), bool)
    covered[place[:, 0], place[:, 1]] = True
    texture = _spread(texture, covered)

    texture = _solve(texture, cut, uv, seen, light, clean, lambda done: progress(0.6 + 0.35 * done, "Solving for the texture"))
    texture = _spread(texture, covered)
    base_color = (srgb_from_linear(texture) * 255 + 0.5).astype(np.uint8)
    return TexturedMesh(cut.vertices, normals[source].astype(np.float32), uv, faces, base_color)


def vertex_normals(mesh: Mesh) -> Float[np.ndarray, "n 3"]:
    """Smooth unit normals: the faces' normals weighted by their angle at the vertex (Thuermer and Wuethrich 1998)."""
    corners = mesh.vertices.astype(np.float64)[mesh.faces]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-30)
    total = np.zeros((len(mesh.vertices), 3))
    for k in range(3):
        a, b = corners[:, (k + 1) % 3] - corners[:, k], corners[:, (k + 2) % 3] - corners[:, k]
        angle = np.arctan2(np.linalg.norm(np.cross(a, b), axis=1), (a * b).sum(1))
        for axis in range(3):
            total[:, axis] += np.bincount(mesh.faces[:, k], angle * normal[:, axis], len(total))
    length = np.linalg.norm(total, axis=1, keepdims=True)
    return np.where(length > 1e-12, total / np.maximum(length, 1e-12), np.array([0.0, 0.0, 1.0]))


def _texels(
    cut: Mesh, normals: Float[np.ndarray, "n 3"], uv: Float[np.ndarray, "n 2"], size: int
) -> tuple[Int[np.ndarray, "t 2"], Float[np.ndarray, "t 3"], Float[np.ndarray, "t 3"]]:
    """Row and column, place and normal of every texel whose centre lies in a chart."""
    screen = np.stack([uv[:, 0].astype(np.float64) * size, (1 - uv[:, 1].astype(np.float64)) * size], 1)
    flat = np.ones(len(screen))
    _, triangle = raster.z_buffer(screen, flat, cut.faces, size, size)
    place = np.argwhere(triangle >= 0)
    face = cut.faces[triangle[place[:, 0], place[:, 1]]]
    weights = _weights(screen, flat, face, place)
    position = (cut.vertices[face].astype(np.float64) * weights[..., None]).sum(1)
    direction = (normals[face] * weights[..., None]).sum(1)
    return place, position, direction / np.maximum(np.linalg.norm(direction, axis=1, keepdims=True), 1e-12)


@njit(nogil=True, cache=True)
def _weights(screen, flat, faces, place):
    weights = np.empty((len(place), 3))
    for t in range(len(place)):
        weights[t, 0], weights[t, 1], weights[t, 2] = raster.barycentric(screen, flat, faces[t], place[t, 1] + 0.5, place[t, 0] + 0.5)
    return weights


def _clean(
    depth: Float[np.ndarray, "h w"], alpha: Float[np.ndarray, "h w"], given: Float[np.ndarray, "h w"] | None, focal: float
) -> Bool[np.ndarray, "h w"]:
    """Pixels whose neighbourhood shows one surface of the mesh, no background, and the depth that the view itself has."""
    height, width = depth.shape
    framed = np.pad(depth, 1)

    def shifted(rows: int, columns: int):
        return framed[1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]

    clean = (minimum_filter(depth, 3) > 0) & (minimum_filter(alpha, 3) > 0.98)
    for rows, columns in ((0, 1), (1, 0), (1, 1), (1, -1)):  # a step bends the line through a pixel's neighbours, a slope does not
        clean &= np.abs(shifted(rows, columns) + shifted(-rows, -columns) - 2 * depth) < BEND * depth / focal
    if given is not None:
        steep = maximum_filter(depth, 3) - minimum_filter(depth, 3)
        clean &= (given > 0) & (np.abs(given - depth) < SLACK + steep)
    return clean


@njit(parallel=True, nogil=True, cache=True)
def _blend(position, direction, poses, lenses, light, alpha, depths, clean):
    """Mean colour of the BEST views of each texel, and their weight, 0 where none saw it.

    A view's weight is the texel's size in its picture times its angle: sharp, frontal views win; pixels that are not clean hardly count.
    """
    count, views = len(position), len(poses)
    height, width = alpha.shape[1:]
    color = np.zeros((count, 3), np.float32)
    weight = np.zeros(count, np.float32)
    for t in prange(count):
        best = np.zeros(BEST)
        chosen = np.zeros((BEST, 3))
        for n in range(views):
            m = poses[n]
            x = m[0, 0] * position[t, 0] + m[0, 1] * position[t, 1] + m[0, 2] * position[t, 2] + m[0, 3]
            y = m[1, 0] * position[t, 0] + m[1, 1] * position[t, 1] + m[1, 2] * position[t, 2] + m[1, 3]
            z = m[2, 0] * position[t, 0] + m[2, 1] * position[t, 1] + m[2, 2] * position[t, 2] + m[2, 3]
            nx = m[0, 0] * direction[t, 0] + m[0, 1] * direction[t, 1] + m[0, 2] * direction[t, 2]
            ny = m[1, 0] * direction[t, 0] + m[1, 1] * direction[t, 1] + m[1, 2] * direction[t, 2]
            nz = m[2, 0] * direction[t, 0] + m[2, 1] * direction[t, 1] + m[2, 2] * direction[t, 2]
            cosine = -(x * nx + y * ny + z * nz) / np.sqrt(x * x + y * y + z * z)
            if z <= 0 or cosine <= 0.05:
                continue
            u, v = lenses[n, 0] * x / z + lenses[n, 2] - 0.5, lenses[n, 1] * y / z + lenses[n, 3] - 0.5
            if u < 0 or v < 0 or u >= width - 1 or v >= height - 1:
                continue
            c, r = int(u), int(v)
            a, b = u - c, v - r
            slack = SLACK + 2 * z / lenses[n, 0] * min(np.sqrt(1 / (cosine * cosine) - 1), 6.0)
            share, sharp = 0.0, 1.0
            red, green, blue = 0.0, 0.0, 0.0
            for tap in range(4):
                i, j = r + tap // 2, c + tap % 2
                w = (b if tap // 2 else 1 - b) * (a if tap % 2 else 1 - a)
                if depths[n, i, j] <= 0 or abs(depths[n, i, j] - z) > slack:  # another surface, or none
                    sharp = min(sharp, UNCLEAN)
                    continue
                if not clean[n, i, j]:
                    sharp = min(sharp, UNCLEAN)
                w *= alpha[n, i, j]
                share += w
                red += w * light[n, i, j, 0]
                green += w * light[n, i, j, 1]
                blue += w * light[n, i, j, 2]
            if share < 0.3:
                continue
            w = sharp * cosine**4 / (z * z)
            slot = 0
            for k in range(1, BEST):
                if best[k] < best[slot]:
                    slot = k
            if w > best[slot]:
                best[slot] = w
                chosen[slot, 0], chosen[slot, 1], chosen[slot, 2] = red / share, green / share, blue / share
        total = best.sum()
        weight[t] = total
        if total > 0:
            for k in range(3):
                color[t, k] = (best * chosen[:, k]).sum() / total
    return color, weight


def _from_splats(splats: Splats, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """Linear colour of the nearest splats, weighted by opacity and distance; their constant harmonic alone."""
    opacity = 1 / (1 + np.exp(-splats.opacity_logits.astype(np.float64)))
    color = linear_from_srgb(np.clip(0.5 + SH_C0 * splats.sh[:, 0], 0, 1))
    near = min(8, len(splats))
    distance, index = cKDTree(splats.means).query(points, near)
    distance, index = distance.reshape(-1, near), index.reshape(-1, near)
    weight = opacity[index] / (distance**2 + 1e-6)
    return (color[index] * weight[..., None]).sum(1) / weight.sum(1, keepdims=True)


def _spread(texture: Float[np.ndarray, "h w 3"], covered: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "h w 3"]:
    """The colour of the nearest covered texel everywhere else: no seams at small mip levels, and nothing dark between charts."""
    if not covered.any():
        return texture
    row, column = distance_transform_edt(~covered, return_distances=False, return_indices=True)
    return texture[row, column]


def _solve(texture, cut: Mesh, uv, seen: Views, light, clean, progress) -> Float[np.ndarray, "h w 3"]:
    """The texture whose pictures differ least from the views (SIRT: Gilbert 1972), from the blended one.

    Every clean pixel is a mean of bilinear lookups along its rays. Each sweep spreads the pixels' errors back over the texels that they
    looked up. What no clean pixel shows stays as it was.
    """
    height, width = seen.alpha.shape[1:]
    subject = int(clean.sum())
    supersample = 3 if subject * 9 <= RAYS else 2 if subject * 4 <= RAYS else 1
    if subject == 0:
        return texture
    random = np.random.default_rng(0)
    parts = []
    for i, camera in enumerate(seen.cameras):
        progress(0.3 * i / len(seen))
        fine = camera.scaled(supersample)
        screen, inverse = raster.project(cut.vertices, fine)
        _, triangle = raster.z_buffer(screen, inverse, cut.faces, fine.width, fine.height)
        pixels = np.argwhere(clean[i])
        if subject > RAYS:  # an even share of every view
            pixels = pixels[random.random(len(pixels)) < RAYS / subject]
        base, share, whole = _rays(
            screen, inverse, cut.faces, triangle, uv.astype(np.float64), pixels, supersample, texture.shape[0], texture.shape[1]
        )
        pixels, base, share = pixels[whole], base[whole], share[whole]
        parts.append((base, share, light[i][pixels[:, 0], pixels[:, 1]]))
    base = np.concatenate([part[0] for part in parts])
    share = np.concatenate([part[1] for part in parts])
    target = np.concatenate([part[2] for part in parts])
    # An error of light counts by how much it changes the sRGB value
    weight = (1 / (target + 0.02) ** (2 * (1 - 1 / 2.4))).astype(np.float32)
    order = np.argsort(base[..., 0].ravel(), kind="stable")
    rows = np.searchsorted(base[..., 0].ravel()[order], np.arange(texture.shape[0] + 1))
    reached = _scatter(weight, base, share, order, rows, texture.shape)
    texture = np.ascontiguousarray(texture, np.float32)
    for sweep in range(SWEEPS):
        progress(0.3 + 0.7 * sweep / SWEEPS)
        error = (target - _gather(texture, base, share)) * weight
        step = _scatter(error, base, share, order, rows, texture.shape)
        texture = np.clip(texture + np.where(reached > 0, 1.5 * step / np.maximum(reached, 1e-6), 0), 0, 1).astype(np.float32)
    return texture


@njit(parallel=True, nogil=True, cache=True)
def _rays(screen, inverse_depth, faces, triangle, uv, pixels, supersample, height, width):
    """For each pixel's rays the first texel (row, column) and the shares of the next ones; whether all its rays meet the mesh."""
    count = supersample * supersample
    base = np.zeros((len(pixels), count, 2), np.int32)
    share = np.zeros((len(pixels), count, 2), np.float32)
    whole = np.ones(len(pixels), np.bool_)
    for n in prange(len(pixels)):
        for ray in range(count):
            y, x = pixels[n, 0] * supersample + ray // supersample, pixels[n, 1] * supersample + ray % supersample
            f = triangle[y, x]
            if f < 0:
                whole[n] = False
                continue
            face = faces[f]
            wa, wb, wc = raster.barycentric(screen, inverse_depth, face, x + 0.5, y + 0.5)
            u = wa * uv[face[0], 0] + wb * uv[face[1], 0] + wc * uv[face[2], 0]
            v = wa * uv[face[0], 1] + wb * uv[face[1], 1] + wc * uv[face[2], 1]
            base[n, ray, 1], base[n, ray, 0], share[n, ray, 1], share[n, ray, 0] = raster.texel_taps(u, v, width, height)
    return base, share, whole


@njit(parallel=True, nogil=True, cache=True)
def _gather(texture, base, share):
    """The pixels that a texture makes."""
    count = base.shape[1]
    pixels = np.zeros((len(base), 3), np.float32)
    for n in prange(len(base)):
        for ray in range(count):
            r, c = base[n, ray]
            b, a = share[n, ray]
            for k in range(3):
                top = texture[r, c, k] * (1 - a) + texture[r, c + 1, k] * a
                bottom = texture[r + 1, c, k] * (1 - a) + texture[r + 1, c + 1, k] * a
                pixels[n, k] += (top * (1 - b) + bottom * b) / count
    return pixels


@njit(parallel=True, nogil=True, cache=True)
def _scatter(pixels, base, share, order, rows, shape):
    """The transpose of `_gather`. Each texture row is summed by one thread in one order: the result does not depend on their number."""
    texture = np.zeros(shape, np.float32)
    count = base.shape[1]
    for row in prange(shape[0]):
        for lower in range(2):  # rays whose first texel is in this row, and those whose second is
            first = row - lower
            if first < 0:
                continue
            for slot in range(rows[first], rows[first + 1]):
                n, ray = order[slot] // count, order[slot] % count
                c = base[n, ray, 1]
                b, a = share[n, ray]
                w = (b if lower else 1 - b) / count
                for k in range(3):
                    texture[row, c, k] += pixels[n, k] * w * (1 - a)
                    texture[row, c + 1, k] += pixels[n, k] * w * a
    return texture
