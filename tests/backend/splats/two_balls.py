"""Exact views of two patterned balls that move: one turns, the other swings around it. Where their points are is known at all times."""

from dataclasses import replace

import numpy as np
from scipy.spatial.transform import Rotation

from backend.splats.motion import Binding, Motion
from backend.views.cameras import look_at
from backend.views.sequence import ViewSequence
from backend.views.views import Frame, Views
from tests.backend.splats import sphere

RADII = (0.35, 0.25)
RAYS = 3  # each way in a pixel
OFFSET = np.array([0.62, 0.0, 0.0])  # of the second ball from the first, at rest
SWING = 0.25  # radians a moment


def poses(moment: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rotation matrix and centre of both balls; the first moment is rest."""
    turn = Rotation.from_rotvec([0, 0.1 * moment, 0]).as_matrix()
    swing = Rotation.from_rotvec([0, 0, SWING * moment]).as_matrix()
    return [(turn, np.array([-0.2, 0, 0])), (swing, np.array([-0.2, 0, 0]) + swing @ OFFSET)]


def picture(camera, moment: int):
    """Straight colour, alpha, depth and normal of a pixel, as `sphere.picture`."""

    def trace(view):
        eye = view.centre
        ray = view.unproject(np.ones((view.height, view.width))) - eye
        squared = (ray**2).sum(-1)
        near, colors, normals = np.full(squared.shape, np.inf), np.zeros(ray.shape), np.zeros(ray.shape)
        for (turn, centre), radius in zip(poses(moment), RADII, strict=True):
            along = ray @ (centre - eye)
            inside = along**2 - squared * (((centre - eye) ** 2).sum() - radius**2)
            depth = np.where(inside > 0, (along - np.sqrt(np.maximum(inside, 0))) / squared, np.inf)
            hit = depth < near
            normal = (eye + np.where(hit, depth, 0)[..., None] * ray - centre) / radius
            near = np.where(hit, depth, near)
            colors = np.where(hit[..., None], sphere.color(normal @ turn), colors)
            normals = np.where(hit[..., None], normal, normals)
        return np.isfinite(near), np.where(np.isfinite(near), near, 0), colors, normals

    hit, _, colors, _ = trace(camera.scaled(RAYS))
    split = (camera.height, RAYS, camera.width, RAYS)
    cover = hit.reshape(split).mean((1, 3))
    straight = (colors * hit[..., None]).reshape(*split, 3).mean((1, 3)) / np.maximum(cover, 1e-9)[..., None]
    _, depth, _, normals = trace(camera)
    return [values.astype(np.float32) for values in (straight, cover, depth, normals)]


def views(moments: int = 4, fitted: int = 6, size: int = 64) -> ViewSequence:
    """Some cameras at each moment, other ones at the next, and one more that is held out."""
    cameras, pictures, time, held = [], [], [], []
    for moment in range(moments):
        for i in range(fitted + 1):
            height, angle = -0.7 + 1.4 * (i + 0.5) / (fitted + 1), 2.399963 * (i + moment)
            if i == fitted:
                height, angle = 0.3, 0.5 + 1.3 * moment
            eye = np.array([np.sqrt(1 - height**2) * np.cos(angle), np.sqrt(1 - height**2) * np.sin(angle), height])
            cameras.append(look_at(2.6 * eye, (0, 0, 0), size, 0.7))
            pictures.append(picture(cameras[-1], moment))
            time.append(moment)
            held.append(i == fitted)
    order = np.argsort(held, kind="stable")
    images, alpha, depth, normals = (np.stack([pictures[i][part] for i in order]) for part in range(4))
    seen = Views([cameras[i] for i in order], images, alpha, depth, normals, np.array(held)[order], Frame(np.zeros(3), 1.0))
    return ViewSequence(seen, np.array(time)[order], np.arange(moments) + 1.0, 24.0)


def points(each: int) -> tuple[np.ndarray, np.ndarray]:
    """Evenly spread points of both balls at rest, and which ball each belongs to."""
    i = np.arange(each) + 0.5
    height, angle = 1 - 2 * i / each, 2.399963 * i
    unit = np.stack([np.sqrt(1 - height**2) * np.cos(angle), np.sqrt(1 - height**2) * np.sin(angle), height], 1)
    balls = [radius * unit + centre for (_, centre), radius in zip(poses(0), RADII, strict=True)]
    return np.concatenate(balls).astype(np.float32), np.repeat([0, 1], each)


def carried(rest: np.ndarray, ball: np.ndarray, moment: int) -> np.ndarray:
    """Where points of the balls are at a moment."""
    moved = [(rest - poses(0)[i][1]) @ poses(moment)[i][0].T + poses(moment)[i][1] for i in (0, 1)]
    return np.where(ball[:, None] == 0, *moved).astype(np.float32)


def motion(moments: int = 4, error: float = 0.0) -> Motion:
    """The true motion by some nodes on each ball; with `error`, nodes lie that far off (standard deviation) but at rest."""
    nodes, of_node = points(14)
    anchors, of_anchor = points(300)
    apart = np.linalg.norm(anchors[:, None] - nodes, axis=2) + 10.0 * (of_anchor[:, None] != of_node)
    nearest = np.argsort(apart, 1, kind="stable")[:, :3]
    weights = np.exp(-((np.take_along_axis(apart, nearest, 1) / 0.2) ** 2))
    turns = [[Rotation.from_matrix(poses(moment)[ball][0]).as_quat()[[3, 0, 1, 2]] for ball in of_node] for moment in range(moments)]
    shifts = np.stack([carried(nodes, of_node, moment) - nodes for moment in range(moments)])
    shifts[1:] += np.random.default_rng(5).normal(0, error, shifts[1:].shape)
    binding = Binding(nearest.astype(np.int32), (weights / weights.sum(1, keepdims=True)).astype(np.float32))
    return Motion(0, nodes, np.array(turns, np.float32), shifts.astype(np.float32), anchors, binding)


def still(moments: int) -> Motion:
    """Nodes that do not move at all."""
    found = motion(moments)
    return replace(found, rotations=np.tile(found.rotations[:1], (moments, 1, 1)), translations=np.zeros_like(found.translations))
