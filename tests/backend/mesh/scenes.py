"""Analytic subjects for the mesh tests: exact depth, normals and colour without any of the code under test."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from backend.views.cameras import look_at
from backend.views.views import Frame, Views

FOV = 0.6
DISTANCE = 3.5
FILTER = 2  # rays a pixel's side, for soft silhouettes


def cameras(count: int, size: int):
    """Evenly around the unit sphere."""
    k = np.arange(count) + 0.5
    height, turn = 1 - 2 * k / count, np.pi * (1 + 5**0.5) * k
    ring = np.sqrt(1 - height**2)
    return [look_at(DISTANCE * eye, (0, 0, 0), size, FOV) for eye in np.stack([ring * np.cos(turn), ring * np.sin(turn), height], 1)]


def capture(distance, color, count: int = 24, size: int = 64) -> Views:
    """Views of a signed distance function (n,3)->(n,) by sphere tracing, coloured by a function of the place. Every fourth is held out."""
    found = {"images": [], "alpha": [], "depth": [], "normals": []}
    rig = cameras(count, size)
    for camera in rig:
        point, hit = _trace(distance, camera)
        found["depth"].append(np.where(hit, camera.project(point.reshape(-1, 3))[1].reshape(size, size), 0).astype(np.float32))
        normal = np.zeros((size, size, 3), np.float32)
        slope = np.stack([distance(point[hit] + e) - distance(point[hit] - e) for e in np.eye(3) * 1e-4], 1)
        normal[hit] = slope / np.linalg.norm(slope, axis=1, keepdims=True)
        found["normals"].append(normal)
        fine, covered = _trace(distance, camera.scaled(FILTER))
        light = np.where(covered[..., None], color(fine), 0).reshape(size, FILTER, size, FILTER, 3).sum((1, 3))
        cover = covered.reshape(size, FILTER, size, FILTER).sum((1, 3))
        found["images"].append((light / np.maximum(cover, 1)[..., None]).astype(np.float32))
        found["alpha"].append((cover / FILTER**2).astype(np.float32))
    holdout = np.arange(count) % 4 == 3
    return Views(rig, *(np.stack(found[key]) for key in ("images", "alpha", "depth", "normals")), holdout, Frame(np.zeros(3), 1.0))


def _trace(distance, camera):
    eye = camera.centre
    ray = camera.unproject(np.ones((camera.height, camera.width))) - eye
    ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
    ray = ray.reshape(-1, 3)
    nearest = -ray @ eye
    inside = eye @ eye - nearest**2 < 1.0  # of the unit sphere, where every subject lies
    half = np.sqrt(np.maximum(1 - (eye @ eye - nearest**2), 0))
    along = np.where(inside, nearest - half, 0)
    point, hit = eye + ray * along[:, None], np.zeros(len(ray), bool)
    active = np.flatnonzero(inside)
    for _ in range(200):
        if len(active) == 0:
            break
        value = distance(point[active])
        hit[active[value < 1e-4]] = True
        along[active] += np.maximum(value, 0)
        point[active] = eye + ray[active] * along[active, None]
        active = active[(value >= 1e-4) & (along[active] < (nearest + half)[active])]
    return point.reshape(camera.height, camera.width, 3), hit.reshape(camera.height, camera.width)


def sphere(radius: float, centre=(0.0, 0.0, 0.0)):
    return lambda p: np.linalg.norm(p - np.asarray(centre), axis=1) - radius


def torus(major: float, minor: float):
    return lambda p: np.hypot(np.hypot(p[:, 0], p[:, 1]) - major, p[:, 2]) - minor


def box(half):
    def distance(p):
        q = np.abs(p) - np.asarray(half)
        return np.linalg.norm(np.maximum(q, 0), axis=1) + np.minimum(q.max(1), 0)

    return distance


def rod(radius: float, half: float):
    """Upright, with round ends."""
    return lambda p: np.hypot(np.hypot(p[:, 0], p[:, 1]), np.maximum(np.abs(p[:, 2]) - half, 0)) - radius


def union(*parts):
    return lambda p: np.min([part(p) for part in parts], axis=0)


def minus(whole, taken):
    return lambda p: np.maximum(whole(p), -taken(p))


def waves(p):
    """A smooth colour that differs all over the subject, sRGB."""
    return 0.5 + 0.4 * np.sin(p * np.array([5.0, 6.0, 7.0]) + np.array([0.0, 1.0, 2.0]))


def grey(p):
    return np.full(p.shape, 0.5)


def patches(p):
    """Roughness, metallic and opacity that differ over the subject and change at once, 0 to 1."""
    stripe = (np.sin(9 * p[..., 2]) > 0).astype(float)
    return np.stack([0.3 + 0.5 * stripe, (p[..., 0] > 0.1).astype(float), np.ones(p.shape[:-1])], -1)


def glow(p):
    """Linear light up to 4, on one side alone."""
    return np.maximum(p[..., 1:2], 0) * np.array([6.0, 3.0, 0.0])


def bumps(p, normal):
    """Normals of a surface with grooves too fine for the mesh, unit length."""
    bent = normal + 0.5 * np.stack([np.sin(14 * p[..., 2]), np.zeros(p.shape[:-1]), np.cos(11 * p[..., 0])], -1)
    return bent / np.maximum(np.linalg.norm(bent, axis=-1, keepdims=True), 1e-9)


def with_passes(views: Views, material=patches, emission=None, normals=bumps) -> Views:
    """Views with the passes that Blender would give, at pixels' centres, by functions of the place."""
    hit = views.depth > 0
    points = np.stack([camera.unproject(depth) for camera, depth in zip(views.cameras, views.depth, strict=True)])
    surface = np.where(hit[..., None], np.round(material(points) * 255), 0).astype(np.uint8)
    light = None if emission is None else np.where(hit[..., None], emission(points), 0).astype(np.float16)
    bent = views.normals if normals is None else np.where(hit[..., None], normals(points, views.normals), 0).astype(np.float32)
    return replace(views, material=surface, emission=light, normals=bent)
