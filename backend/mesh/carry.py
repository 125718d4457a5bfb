"""A rest surface carried through time by its motion, and drawn onto the depth that each moment's views have."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from scipy.sparse import coo_matrix, csr_matrix, diags

from backend.mesh.bake import vertex_normals
from backend.mesh.mesh import Mesh, MovingMesh
from backend.progress import Progress, silent
from backend.splats.motion import Motion
from backend.views.sequence import ViewSequence
from backend.views.views import Views

REACH = 0.02  # unit frame: how far a surface may lie from where the motion carried it; what lies farther is another part
FACING = 0.3  # cosine: flatter looks tell little of depth, and the pixel beside them is another surface
ROUNDS = 3  # of looking up depth and moving
SPREAD = 6  # passes that spread what vertices were told over those that no view told anything
STEADY = 0.5  # how much a vertex's offset at one moment takes after those before and after


def carry(surface: Mesh, motion: Motion, views: ViewSequence, progress: Progress = silent) -> MovingMesh:
    """The surface (unit frame, at moment motion.rest) at every moment of `views`.

    Nodes are too few for every bulge: what remains between the carried surface and the views' depth is made up along the surface's own
    normals, smoothly over the surface and over time. Places are never slid along the surface, so points stay the points that they are.
    """
    binding = motion.bind(surface.vertices)
    average = _average(surface)
    moments = len(views)
    carried = np.stack([motion.carry(surface.vertices, binding, moment) for moment in range(moments)])
    carried[motion.rest] = surface.vertices
    offsets = np.zeros(carried.shape[:2])
    looks = [views.at(moment) for moment in range(moments)]
    if looks[0].depth is not None:
        for number in range(ROUNDS):
            for moment in range(moments):
                progress((number * moments + moment) / (ROUNDS * moments), f"Moment {moment + 1} of {moments}")
                if moment == motion.rest:
                    continue
                normals = vertex_normals(Mesh(carried[moment], surface.faces))
                placed = carried[moment] + offsets[moment][:, None] * normals
                told, known = _distances(placed, normals, looks[moment])
                offsets[moment] += _spread(told, known, average)
            offsets = _steadied(np.clip(offsets, -REACH, REACH))
            offsets[motion.rest] = 0
        for moment in range(moments):
            if moment != motion.rest:
                normals = vertex_normals(Mesh(carried[moment], surface.faces))
                carried[moment] += (offsets[moment][:, None] * normals).astype(np.float32)
    return MovingMesh(carried, surface.faces, motion.rest, views.frames, views.fps)


def _distances(
    points: Float[np.ndarray, "n 3"], normals: Float[np.ndarray, "n 3"], seen: Views
) -> tuple[Float[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """How far along their normals the surface lies that the views see at these points, averaged over views; whether any sees it."""
    total, weight = np.zeros(len(points)), np.zeros(len(points))
    for index, camera in enumerate(seen.cameras):
        screen, depth = camera.project(points)
        column, row = np.floor(screen).astype(int).T
        towards = camera.centre - points
        towards /= np.linalg.norm(towards, axis=1, keepdims=True)
        cosine = (normals * towards).sum(1)
        there = (depth > 0) & (column >= 0) & (row >= 0) & (column < camera.width) & (row < camera.height) & (cosine > FACING)
        there = np.flatnonzero(there)
        found = seen.depth[index, row[there], column[there]]
        there, found = there[found > 0], found[found > 0]
        # The pixel's ray does not meet the vertex itself: compare with the plane of what it saw
        centre = np.stack([column[there] + 0.5, row[there] + 0.5], 1)
        local = np.stack([(centre[:, 0] - camera.cx) / camera.fx * found, (centre[:, 1] - camera.cy) / camera.fy * found, found], 1)
        world = camera.world_from_camera
        hit = local @ world[:3, :3].T + world[:3, 3]
        plane = normals[there]
        if seen.normals is not None:
            given = seen.normals[index, row[there], column[there]].astype(np.float64)
            alike = (given * plane).sum(1) > 0.5
            there, hit, plane = there[alike], hit[alike], given[alike]
        gap = ((hit - points[there]) * plane).sum(1)
        near = np.abs(gap) < REACH
        there, gap = there[near], gap[near]
        total[there] += gap * cosine[there]
        weight[there] += cosine[there]
    return total / np.maximum(weight, 1e-9), weight > 0


def _average(surface: Mesh) -> csr_matrix:
    """The matrix that takes the mean over each vertex's neighbours."""
    ends = surface.faces[:, [0, 1, 2, 1, 2, 0]].reshape(-1, 2, 3).transpose(0, 2, 1).reshape(-1, 2)
    count = len(surface.vertices)
    both = np.concatenate([ends, ends[:, ::-1]])
    graph = coo_matrix((np.ones(len(both)), both.T), shape=(count, count)).tocsr()
    graph.data[:] = 1
    return diags(1 / np.maximum(np.asarray(graph.sum(1)).ravel(), 1)) @ graph


def _spread(told: Float[np.ndarray, "n"], known: Bool[np.ndarray, "n"], average: csr_matrix) -> Float[np.ndarray, "n"]:
    """Smoothed over the surface; vertices that no view sees take after their neighbours."""
    value, weight = np.where(known, told, 0.0), known.astype(float)
    for _ in range(SPREAD):
        value, weight = (value + average @ value) / 2, (weight + average @ weight) / 2
    return value / np.maximum(weight, 0.05)


def _steadied(offsets: Float[np.ndarray, "t n"]) -> Float[np.ndarray, "t n"]:
    """Smoothed over time, so that noise does not shimmer."""
    if len(offsets) < 3:
        return offsets
    before, after = offsets[[0, *range(len(offsets) - 1)]], offsets[[*range(1, len(offsets)), len(offsets) - 1]]
    return (1 - STEADY) * offsets + STEADY * (before + after) / 2
