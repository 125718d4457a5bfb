"""A z-buffer for triangles: depth, which triangle a pixel sees, and pictures of a textured mesh, without a GPU or Blender.

The picture is cut into bands of rows; each band is filled by one thread in the triangles' order, so the result does not depend on the
number of threads. Interpolation is perspective-correct: 1 / depth is linear on the screen.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from numba import prange

from backend.mesh.mesh import Mesh, TexturedMesh
from backend.splats.parallel import kernel, parallel_kernel
from backend.views.cameras import Camera

BAND = 8  # rows that one thread fills at a time
NEAREST = 1e-4  # unit frame: triangles that reach nearer to the camera's plane are left out
EDGE = 1e-7  # pixels: two triangles that share an edge leave no crack between them


def depth(mesh: Mesh | TexturedMesh, camera: Camera) -> tuple[Float[np.ndarray, "h w"], Int[np.ndarray, "h w"]]:
    """What each pixel's centre sees: distance along the camera's axis (float32, 0 = nothing) and the face (int32, -1 = nothing)."""
    screen, inverse_depth = project(mesh.vertices, camera)
    inverse, triangle = z_buffer(screen, inverse_depth, mesh.faces, camera.width, camera.height)
    return np.where(triangle >= 0, 1 / np.where(triangle >= 0, inverse, 1), 0).astype(np.float32), triangle


def render(
    mesh: TexturedMesh, camera: Camera, background: tuple[float, float, float] = (0.0, 0.0, 0.0), supersample: int = 3
) -> tuple[Float[np.ndarray, "h w 3"], Float[np.ndarray, "h w"]]:
    """The unlit texture as the camera sees it (float32, sRGB, on `background`), and its coverage.

    Each pixel is the mean of supersample^2 rays through a bilinear texture. As in Blender, light is averaged in linear values and encoded
    to sRGB afterwards; the background is put behind in sRGB, as a viewer does with a straight-alpha PNG. Behind a clear surface nothing is
    drawn.
    """
    fine = camera.scaled(supersample)
    screen, inverse_depth = project(mesh.vertices, fine)
    _, triangle = z_buffer(screen, inverse_depth, mesh.faces, fine.width, fine.height)
    texture = linear_from_srgb(np.arange(256, dtype=np.float32) / 255)[mesh.base_color]
    if mesh.opacity is not None:
        cover = mesh.opacity[..., None] / np.float32(255)
        texture = np.concatenate([texture * cover, cover], 2)
    light, alpha = _shade(screen, inverse_depth, mesh.faces, triangle, mesh.uv.astype(np.float64), texture, supersample)
    if mesh.opacity is not None:
        light, alpha = light[..., :3], light[..., 3]
    straight = srgb_from_linear(light / np.maximum(alpha, 1e-9)[..., None])
    color = straight * alpha[..., None] + np.asarray(background, np.float32) * (1 - alpha[..., None])
    return color.astype(np.float32), alpha


def sample(
    mesh: TexturedMesh, camera: Camera, texture: Float[np.ndarray, "th tw c"]
) -> tuple[Float[np.ndarray, "h w c"], Bool[np.ndarray, "h w"]]:
    """What each pixel's centre sees of a texture laid on the mesh, looked up bilinearly, and where the mesh is."""
    screen, inverse_depth = project(mesh.vertices, camera)
    _, triangle = z_buffer(screen, inverse_depth, mesh.faces, camera.width, camera.height)
    values, alpha = _shade(screen, inverse_depth, mesh.faces, triangle, mesh.uv.astype(np.float64), np.asarray(texture, np.float32), 1)
    return values, alpha > 0


def normals(mesh: TexturedMesh, camera: Camera) -> tuple[Float[np.ndarray, "h w 3"], Bool[np.ndarray, "h w"]]:
    """The shading normal that each pixel's centre sees, unit length, world axes, by the normal map if there is one; where the mesh is."""
    screen, inverse_depth = project(mesh.vertices, camera)
    _, triangle = z_buffer(screen, inverse_depth, mesh.faces, camera.width, camera.height)
    place = np.argwhere(triangle >= 0)
    face = mesh.faces[triangle[place[:, 0], place[:, 1]]]
    weights = corner_weights(screen, inverse_depth, face, place)
    if mesh.normal_map is None or mesh.tangents is None:
        direction = (mesh.normals[face] * weights[..., None]).sum(1)
    else:
        mapped = sample(mesh, camera, mesh.normal_map / np.float32(127.5) - 1)[0][place[:, 0], place[:, 1]]
        direction = (tangent_frame(mesh.normals, mesh.tangents, face, weights) * mapped[:, :, None]).sum(1)
    found = np.zeros((*triangle.shape, 3), np.float32)
    found[place[:, 0], place[:, 1]] = direction / np.maximum(np.linalg.norm(direction, axis=1, keepdims=True), 1e-12)
    return found, triangle >= 0


def tangent_frame(
    normals: Float[np.ndarray, "n 3"], tangents: Float[np.ndarray, "n 4"], face: Int[np.ndarray, "t 3"], weights: Float[np.ndarray, "t 3"]
) -> Float[np.ndarray, "t 3 3"]:
    """Rows tangent, bitangent, normal at places of faces, neither unit length nor at right angles: what Cycles and glTF viewers multiply a
    normal map with."""
    normal, tangent = (normals[face] * weights[..., None]).sum(1), (tangents[face] * weights[..., None]).sum(1)
    bitangent = np.cross(normal, tangent[:, :3]) * np.where(tangent[:, 3:] < 0, -1, 1)
    return np.stack([tangent[:, :3], bitangent, normal], 1)


def project(vertices: Float[np.ndarray, "n 3"], camera: Camera) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, "n"]]:
    """Pixel coordinates and 1 / depth; 1 / depth is 0 for what lies too near to the camera's plane to be drawn."""
    screen, z = camera.project(np.asarray(vertices, np.float64))
    return screen, np.where(z > NEAREST, 1 / np.maximum(z, NEAREST), 0.0)


def z_buffer(
    screen: Float[np.ndarray, "n 2"], inverse_depth: Float[np.ndarray, "n"], faces: Int[np.ndarray, "f 3"], width: int, height: int
) -> tuple[Float[np.ndarray, "h w"], Int[np.ndarray, "h w"]]:
    """The largest 1 / depth at each pixel's centre (0 = nothing) and its face (-1 = nothing; of equals, the first)."""
    faces = np.ascontiguousarray(faces, np.int32)
    order, starts = _bin(screen, inverse_depth, faces, width, height)
    return _fill(screen, inverse_depth, faces, order, starts, width, height)


def linear_from_srgb(color):
    """IEC 61966-2-1, decoding."""
    return np.where(color <= 0.04045, color / 12.92, ((np.maximum(color, 0.04045) + 0.055) / 1.055) ** 2.4).astype(np.float32)


def srgb_from_linear(light):
    """IEC 61966-2-1, encoding, clamped to [0, 1]."""
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * np.maximum(light, 0.0031308) ** (1 / 2.4) - 0.055).astype(np.float32)


@kernel
def _rows(screen, inverse_depth, face, width, height):
    """The first and last row whose centres a face can cover; first > last if it covers none."""
    a, b, c = face
    if inverse_depth[a] <= 0 or inverse_depth[b] <= 0 or inverse_depth[c] <= 0:
        return 1, 0
    left = min(screen[a, 0], screen[b, 0], screen[c, 0])
    right = max(screen[a, 0], screen[b, 0], screen[c, 0])
    if right < 0 or left > width:
        return 1, 0
    top = min(screen[a, 1], screen[b, 1], screen[c, 1])
    bottom = max(screen[a, 1], screen[b, 1], screen[c, 1])
    if bottom < 0 or top > height:
        return 1, 0
    return max(0, int(np.ceil(top - 0.5 - EDGE))), min(height - 1, int(np.floor(bottom - 0.5 + EDGE)))


@kernel
def _bin(screen, inverse_depth, faces, width, height):
    """Faces listed by band of rows, in their own order within a band."""
    bands = (height + BAND - 1) // BAND
    starts = np.zeros(bands + 1, np.int64)
    for f in range(len(faces)):
        first, last = _rows(screen, inverse_depth, faces[f], width, height)
        if first <= last:
            for band in range(first // BAND, last // BAND + 1):
                starts[band + 1] += 1
    for band in range(bands):
        starts[band + 1] += starts[band]
    order = np.empty(starts[bands], np.int32)
    cursor = starts[:-1].copy()
    for f in range(len(faces)):
        first, last = _rows(screen, inverse_depth, faces[f], width, height)
        if first <= last:
            for band in range(first // BAND, last // BAND + 1):
                order[cursor[band]] = f
                cursor[band] += 1
    return order, starts


@kernel
def _span(screen, face, sign, y, width):
    """First and last column whose centres lie in the face on the row at height y."""
    low, high = -0.5, width - 0.5
    for k in range(3):
        p, q = face[k], face[(k + 1) % 3]
        slope = -(screen[q, 1] - screen[p, 1]) * sign  # edge function: slope * x + rest >= 0 inside
        rest = ((screen[q, 0] - screen[p, 0]) * (y - screen[p, 1]) + (screen[q, 1] - screen[p, 1]) * screen[p, 0]) * sign
        if slope > 0:
            low = max(low, -rest / slope - EDGE)
        elif slope < 0:
            high = min(high, -rest / slope + EDGE)
        elif rest < 0:
            return 1, 0
    return max(0, int(np.ceil(low - 0.5))), min(width - 1, int(np.floor(high - 0.5)))


@kernel
def _area(screen, face):
    """Twice the signed area on the screen."""
    a, b, c = face
    return (screen[b, 0] - screen[a, 0]) * (screen[c, 1] - screen[a, 1]) - (screen[b, 1] - screen[a, 1]) * (screen[c, 0] - screen[a, 0])


@parallel_kernel
def _fill(screen, inverse_depth, faces, order, starts, width, height):
    inverse = np.zeros((height, width))
    triangle = np.full((height, width), np.int32(-1))
    for band in prange(len(starts) - 1):
        for slot in range(starts[band], starts[band + 1]):
            f = order[slot]
            face = faces[f]
            area = _area(screen, face)
            if area == 0:
                continue
            a, b, c = face
            # 1 / depth as a plane over the screen: value at a, and its two slopes
            db, dc = inverse_depth[b] - inverse_depth[a], inverse_depth[c] - inverse_depth[a]
            bx, by = screen[b, 0] - screen[a, 0], screen[b, 1] - screen[a, 1]
            cx, cy = screen[c, 0] - screen[a, 0], screen[c, 1] - screen[a, 1]
            slope_x, slope_y = (db * cy - dc * by) / area, (dc * bx - db * cx) / area
            first, last = _rows(screen, inverse_depth, face, width, height)
            for row in range(max(first, band * BAND), min(last, band * BAND + BAND - 1) + 1):
                y = row + 0.5
                left, right = _span(screen, face, 1.0 if area > 0 else -1.0, y, width)
                for column in range(left, right + 1):
                    value = inverse_depth[a] + slope_x * (column + 0.5 - screen[a, 0]) + slope_y * (y - screen[a, 1])
                    if value > inverse[row, column]:
                        inverse[row, column] = value
                        triangle[row, column] = f
    return inverse, triangle


@kernel
def barycentric(screen, inverse_depth, face, x, y):
    """Perspective-correct weights of a face's corners at a place on the screen."""
    a, b, c = face
    ax, ay, bx, by, cx, cy = screen[a, 0] - x, screen[a, 1] - y, screen[b, 0] - x, screen[b, 1] - y, screen[c, 0] - x, screen[c, 1] - y
    wa = (bx * cy - by * cx) * inverse_depth[a]
    wb = (cx * ay - cy * ax) * inverse_depth[b]
    wc = (ax * by - ay * bx) * inverse_depth[c]
    total = wa + wb + wc
    if total == 0:
        return 1.0, 0.0, 0.0
    return wa / total, wb / total, wc / total


@kernel
def corner_weights(screen, inverse_depth, faces, place):
    """Perspective-correct weights of each place's face's corners; place: row and column of a pixel, whose centre is meant."""
    weights = np.empty((len(place), 3))
    for t in range(len(place)):
        weights[t, 0], weights[t, 1], weights[t, 2] = barycentric(screen, inverse_depth, faces[t], place[t, 1] + 0.5, place[t, 0] + 0.5)
    return weights


@kernel
def texel_taps(u, v, width, height):
    """The four texels around a place in a texture, as columns, rows (row 0 at the top) and the share of the second of each."""
    x = min(max(u * width - 0.5, 0.0), width - 1.0)
    y = min(max((1 - v) * height - 0.5, 0.0), height - 1.0)
    column, row = min(int(x), width - 2), min(int(y), height - 2)
    return column, row, x - column, y - row


@parallel_kernel
def _shade(screen, inverse_depth, faces, triangle, uv, texture, supersample):
    height, width = triangle.shape[0] // supersample, triangle.shape[1] // supersample
    channels = texture.shape[2]
    light = np.zeros((height, width, channels), np.float32)
    alpha = np.zeros((height, width), np.float32)
    share = np.float32(1 / supersample**2)
    for row in prange(height):
        for column in range(width):
            for ray in range(supersample * supersample):
                y, x = row * supersample + ray // supersample, column * supersample + ray % supersample
                f = triangle[y, x]
                if f < 0:
                    continue
                face = faces[f]
                wa, wb, wc = barycentric(screen, inverse_depth, face, x + 0.5, y + 0.5)
                u = wa * uv[face[0], 0] + wb * uv[face[1], 0] + wc * uv[face[2], 0]
                v = wa * uv[face[0], 1] + wb * uv[face[1], 1] + wc * uv[face[2], 1]
                tx, ty, fx, fy = texel_taps(u, v, texture.shape[1], texture.shape[0])
                for k in range(channels):
                    top = texture[ty, tx, k] * (1 - fx) + texture[ty, tx + 1, k] * fx
                    bottom = texture[ty + 1, tx, k] * (1 - fx) + texture[ty + 1, tx + 1, k] * fx
                    light[row, column, k] += np.float32(top * (1 - fy) + bottom * fy) * share
                alpha[row, column] += share
    return light, alpha
