"""Pictures of splats from all around: the views that a mesh is made from where there are no better ones."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float
from scipy.spatial import cKDTree

from backend.progress import Progress, silent
from backend.views.cameras import Camera, around
from backend.views.views import Frame, Views
from protocol import recipes
from protocol.errors import KilnError

from .clean import chosen
from .model import SH_C0, Splats
from .raster_cpu import SH, Rasteriser, pack
from .render import render

FIELD_OF_VIEW = math.radians(40)
SCORED = 8  # one picture in so many more is kept from the mesh, to score it
MIST = 0.05  # opacity of splats that make no surface; without them clean models look the same to 50 dB
HIDDEN = 0.05  # share of a splat's light that reaches the views: one with less has a colour of its own that nobody asked for
NEIGHBOURS = 8  # seen splats that lend such a one their colours


def shown(splats: Splats, cameras: list[Camera]) -> Float[np.ndarray, "n"]:
    """How much of each splat the camera sees that sees most of it: the light of it that reaches the picture, by what would reach it if
    nothing stood before it."""
    opacity = 1 / (1 + np.exp(-splats.opacity_logits.astype(np.float64)))
    scales = np.sort(np.exp(splats.log_scales.astype(np.float64)), 1)
    matrix, most = pack(dataclasses.replace(splats, sh=np.zeros((len(splats), 1, 3), np.float32))), np.zeros(len(splats))
    rasteriser = Rasteriser()
    for camera in cameras:
        rasteriser.project(matrix, len(splats), camera)
        planes = np.zeros_like(rasteriser.compose())
        planes[0] = 1  # of all red light, each splat's share is its gradient
        gradients = np.zeros_like(matrix)
        rasteriser.backward(planes, np.zeros(3, np.float32), gradients)
        reached = gradients[SH, : len(splats)].astype(np.float64) / SH_C0
        depth = np.maximum(camera.project(splats.means.astype(np.float64))[1], 1e-3)
        free = 2 * np.pi * opacity * scales[:, 1] * scales[:, 2] * camera.fx * camera.fy / depth**2
        most = np.maximum(most, reached / np.maximum(free, 1e-9))
    return np.clip(most, 0, 1)


def recolored(splats: Splats, cameras: list[Camera]) -> Splats:
    """The splats with what no camera sees, a top or a bottom say, in the colours of what is seen around it."""
    hidden = shown(splats, cameras) < HIDDEN
    if hidden.all() or not hidden.any():
        return splats
    count = min(NEIGHBOURS, int((~hidden).sum()))
    distance, nearest = cKDTree(splats.means[~hidden]).query(splats.means[hidden], k=range(1, count + 1))
    weights = 1 / (distance + 1e-3)
    sh = splats.sh.copy()
    sh[hidden] = np.einsum("nk,nkcd->ncd", weights / weights.sum(1, keepdims=True), splats.sh[~hidden][nearest])
    return dataclasses.replace(splats, sh=sh)


def without_mist(splats: Splats) -> Splats:
    """The splats that can be part of a surface. Faint ones around a subject add up to a veil that its silhouettes would include."""
    solid = splats.opacity_logits >= math.log(MIST / (1 - MIST))
    return chosen(splats, solid) if solid.any() else splats


def pictures(splats: Splats, frame: Frame, p: recipes.Look, progress: Progress = silent) -> Views:
    """The splats as `p.count` cameras all around see them, and some more cameras whose pictures only score the mesh."""
    scored = -(-p.count // SCORED)
    total = p.count + scored
    cameras = around(total, p.size, FIELD_OF_VIEW)
    last = np.zeros(total, bool)
    last[(np.arange(scored) * total) // scored + total // (2 * scored)] = True
    order = np.argsort(last, kind="stable")  # those that score at the end: parts of arrays that follow one another need no copy
    images, alpha = np.empty((total, p.size, p.size, 3), np.float32), np.empty((total, p.size, p.size), np.float32)
    for number, index in enumerate(order):
        drawn = render(splats, cameras[index])
        alpha[number] = drawn.alpha
        np.clip(drawn.color / np.maximum(drawn.alpha[..., None], 1e-3), 0, 1, out=images[number])
        progress((number + 1) / total, f"picture {number + 1} of {total}", images[number] * drawn.alpha[..., None])
    if float(alpha.max()) < 0.5:
        raise KilnError(
            "bad-input",
            "The splats show nothing solid from any side.",
            "Check the file in a splat viewer, and subject.keep and subject.radius.",
        )
    return Views([cameras[index] for index in order], images, alpha, None, None, np.arange(total) >= p.count, frame)
