"""Exact views of a patterned sphere, ray by ray: the smallest subject with colour, silhouette, depth and normals that are known."""

import numpy as np

from backend.views.cameras import look_at
from backend.views.views import Frame, Views

RADIUS = 0.6


def color(normals: np.ndarray) -> np.ndarray:
    x, y, z = np.moveaxis(normals, -1, 0)
    return np.stack([0.5 + 0.4 * np.sin(9 * x + 2 * z), 0.5 + 0.3 * np.sin(7 * y), 0.5 + 0.4 * np.cos(8 * z - 3 * x)], -1)


def picture(camera, rays: int = 4):
    """Colour (straight), alpha as means of rays^2 rays a pixel; depth and normal at the pixel's centre."""

    def trace(view):
        world = view.world_from_camera
        ends = view.unproject(np.ones((view.height, view.width)))
        direction = ends - world[:3, 3]
        length = np.linalg.norm(direction, axis=-1)
        unit = direction / length[..., None]
        middle = -(unit @ world[:3, 3])
        inside = RADIUS**2 - (world[:3, 3] @ world[:3, 3] - middle**2)
        hit = inside > 0
        distance = middle - np.sqrt(np.maximum(inside, 0))
        normal = (world[:3, 3] + distance[..., None] * unit) / RADIUS
        return hit, np.where(hit, distance / length, 0), np.where(hit[..., None], normal, 0)

    hit, _, normal = trace(camera.scaled(rays))
    height, width = camera.height, camera.width
    cover = hit.reshape(height, rays, width, rays).mean((1, 3))
    total = (color(normal) * hit[..., None]).reshape(height, rays, width, rays, 3).mean((1, 3))
    straight = total / np.maximum(cover, 1e-9)[..., None]
    _, depth, normal = trace(camera)
    return [values.astype(np.float32) for values in (straight, cover, depth, normal)]


def views(count: int = 14, held_out: int = 3, size: int = 64, geometry: bool = False) -> Views:
    """Cameras on a spiral around the sphere, the last `held_out` of them between the others."""
    cameras = []
    for i in range(count):
        height = -0.85 + 1.7 * (i + 0.5) / count
        angle = 2.399963 * i
        cameras.append((np.sqrt(1 - height**2) * np.cos(angle), np.sqrt(1 - height**2) * np.sin(angle), height))
    for i in range(held_out):
        angle = 1.0 + 2.1 * i
        cameras.append((0.9 * np.cos(angle), 0.9 * np.sin(angle), 0.43))
    cameras = [look_at(2.6 * np.array(eye), (0, 0, 0), size, 0.7) for eye in cameras]
    images, alpha, depth, normals = (np.stack(part) for part in zip(*(picture(camera) for camera in cameras), strict=True))
    return Views(
        cameras, images, alpha, depth if geometry else None, normals if geometry else None,
        np.arange(count + held_out) >= count, Frame(np.zeros(3), 1.0),
    )  # fmt: skip
