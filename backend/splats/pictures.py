"""Pictures of splats from all around: the views that a mesh is made from where there are no better ones."""

from __future__ import annotations

import math

import numpy as np

from backend.progress import Progress, silent
from backend.views.cameras import around
from backend.views.views import Frame, Views
from protocol import recipes
from protocol.errors import KilnError

from .clean import chosen
from .model import Splats
from .render import render

FIELD_OF_VIEW = math.radians(40)
SCORED = 8  # one picture in so many more is kept from the mesh, to score it
MIST = 0.05  # opacity of splats that make no surface; without them clean models look the same to 50 dB


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
