"""How a subject moves: a few nodes on its surface, each moved rigidly from moment to moment; what lies between them is blended.

Embedded deformation (Sumner et al. 2007, section 3), which SC-GS (Huang et al. 2024, section 4) uses as sparse control of Gaussians. All in
the unit frame (views/views.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial import cKDTree


@dataclass(frozen=True)
class Binding:
    """Which nodes carry N points, and how much: weights of each point sum to 1."""

    nodes: Int[np.ndarray, "n k"]  # int32
    weights: Float[np.ndarray, "n k"]  # float32


@dataclass(frozen=True)
class Motion:
    """M nodes at T moments. At moment t node m moves a point x to R(rotations[t, m]) (x - nodes[m]) + nodes[m] + translations[t, m].

    nodes: where they are at rest, the moment `rest`, whose transforms are the identity. rotations: unit quaternions, w first.
    anchors: points of the rest surface with their binding, which knows distances along the surface: legs that touch stay two.
    """

    rest: int
    nodes: Float[np.ndarray, "m 3"]  # float32, as all of these
    rotations: Float[np.ndarray, "t m 4"]
    translations: Float[np.ndarray, "t m 3"]
    anchors: Float[np.ndarray, "a 3"]
    anchoring: Binding

    def __len__(self) -> int:
        return len(self.rotations)

    def bind(self, points: Float[np.ndarray, "n 3"]) -> Binding:
        """What carries any points near the rest surface: each takes the nodes of the nearest anchor."""
        _, nearest = cKDTree(self.anchors).query(points, workers=-1)
        return Binding(self.anchoring.nodes[nearest], self.anchoring.weights[nearest])

    def carry(self, points: Float[np.ndarray, "n 3"], binding: Binding, moment: int) -> Float[np.ndarray, "n 3"]:
        """Rest points at a moment: each of its nodes moves a point rigidly, and the places are blended (Sumner et al. 2007, eq. 2)."""
        turns = matrices(self.rotations[moment])[binding.nodes]
        centres = self.nodes[binding.nodes]
        moved = np.einsum("nkij,nkj->nki", turns, points[:, None] - centres) + centres + self.translations[moment][binding.nodes]
        return (moved * binding.weights[..., None]).sum(1).astype(np.float32)

    def turns(self, binding: Binding, moment: int) -> Float[np.ndarray, "n 4"]:
        """How much the surroundings of bound points have turned since rest: blended unit quaternions, w first."""
        several = self.rotations[moment][binding.nodes]
        several = several * np.where((several * several[:, :1]).sum(-1, keepdims=True) < 0, -1, 1)
        blended = (several * binding.weights[..., None]).sum(1)
        return (blended / np.maximum(np.linalg.norm(blended, axis=1, keepdims=True), 1e-9)).astype(np.float32)


def matrices(quaternions: Float[np.ndarray, "*b 4"]) -> Float[np.ndarray, "*b 3 3"]:
    """Rotation matrices of unit quaternions, w first."""
    w, x, y, z = np.moveaxis(np.asarray(quaternions), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def product(first: Float[np.ndarray, "*b 4"], second: Float[np.ndarray, "*b 4"]) -> Float[np.ndarray, "*b 4"]:
    """The rotation `second`, then `first`, as quaternions, w first."""
    a, b, c, d = np.moveaxis(np.asarray(first), -1, 0)
    w, x, y, z = np.moveaxis(np.asarray(second), -1, 0)
    return np.stack(
        [a * w - b * x - c * y - d * z, a * x + b * w + c * z - d * y, a * y - b * z + c * w + d * x, a * z + b * y - c * x + d * w], -1
    )
