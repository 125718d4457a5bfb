"""Pinhole cameras in OpenCV axes (x right, y down, z forward), as everything behind the loader uses them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

OPENCV_FROM_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])  # both are camera frames; the flip is its own inverse


@dataclass(frozen=True)
class Camera:
    """`camera_from_world` takes a world point to OpenCV camera axes; fx, fy, cx, cy in pixels, pixel (0, 0)'s centre at (0.5, 0.5)."""

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    camera_from_world: Float[np.ndarray, "4 4"]  # float64

    @property
    def world_from_camera(self) -> Float[np.ndarray, "4 4"]:
        rotation, translation = self.camera_from_world[:3, :3], self.camera_from_world[:3, 3]
        inverse = np.eye(4)
        inverse[:3, :3], inverse[:3, 3] = rotation.T, -rotation.T @ translation
        return inverse

    @property
    def centre(self) -> Float[np.ndarray, "3"]:
        """The eye, in world units."""
        return self.world_from_camera[:3, 3]

    def project(self, points: Float[np.ndarray, "n 3"]) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, "n"]]:
        """Pixel coordinates and depth along the camera's axis. Depth <= 0 lies behind the camera."""
        local = points @ self.camera_from_world[:3, :3].T + self.camera_from_world[:3, 3]
        depth = local[:, 2]
        safe = np.where(np.abs(depth) < 1e-12, 1e-12, depth)
        return np.stack([self.fx * local[:, 0] / safe + self.cx, self.fy * local[:, 1] / safe + self.cy], 1), depth

    def unproject(self, depth: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w 3"]:
        """World points of a depth map (along the axis), one for each pixel's centre."""
        u, v = np.meshgrid(np.arange(self.width) + 0.5, np.arange(self.height) + 0.5)
        local = np.stack([(u - self.cx) / self.fx * depth, (v - self.cy) / self.fy * depth, depth], -1)
        world = self.world_from_camera
        return local @ world[:3, :3].T + world[:3, 3]

    def scaled(self, factor: float) -> Camera:
        """The same view with `factor` times the pixels."""
        width, height = round(self.width * factor), round(self.height * factor)
        sx, sy = width / self.width, height / self.height
        return Camera(width, height, self.fx * sx, self.fy * sy, self.cx * sx, self.cy * sy, self.camera_from_world)

    def moved(self, centre: Float[np.ndarray, "3"], scale: float) -> Camera:
        """The same picture of a world moved and scaled by `x -> (x - centre) * scale`."""
        matrix = self.camera_from_world.copy()
        matrix[:3, 3] = (matrix[:3, :3] @ np.asarray(centre, float) + matrix[:3, 3]) * scale
        return Camera(self.width, self.height, self.fx, self.fy, self.cx, self.cy, matrix)


def around(count: int, size: int, fov: float) -> list[Camera]:
    """`count` square cameras of `size` pixels and `fov` radians, evenly around the unit sphere, each of which just holds it."""
    heights, turns = 1 - 2 * (np.arange(count) + 0.5) / count, np.arange(count) * 2.399963  # a Fibonacci lattice on the sphere
    across = np.sqrt(1 - heights**2)
    eyes = np.stack([across * np.cos(turns), across * np.sin(turns), heights], 1) / math.sin(fov / 2)
    return [look_at(eye, (0, 0, 0), size, fov) for eye in eyes]


def look_at(eye, target, size: int, fov: float, up=(0.0, 0.0, 1.0)) -> Camera:
    """A square camera of `size` pixels and `fov` radians at `eye` that looks at `target`; `up` in a Z-up world."""
    forward = np.asarray(target, float) - np.asarray(eye, float)
    forward /= np.linalg.norm(forward)
    up = np.asarray(up, float)
    if abs(forward @ up) > 0.999:
        up = np.array([0.0, 1.0, 0.0])
    right = np.cross(forward, up)
    right /= np.linalg.norm(right)
    matrix = np.eye(4)
    matrix[:3, :3] = np.stack([right, np.cross(forward, right), forward])
    matrix[:3, 3] = -matrix[:3, :3] @ np.asarray(eye, float)
    focal = size / (2 * math.tan(fov / 2))
    return Camera(size, size, focal, focal, size / 2, size / 2, matrix)
