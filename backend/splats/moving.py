"""Gaussians carried by the nodes of a motion, and the chain rule back to them and to the nodes, on the CPU. No torch.

Means after embedded deformation (Sumner et al. 2007, eq. 2), rotations by the nodes' blended quaternions (Huang et al. 2024, SC-GS, section
4.1). Harmonics stay in the directions of the world. Sums run in one fixed order: results are bitwise the same on any number of threads.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from .motion import Binding, matrices, product
from .parallel import kernel, run
from .raster_cpu import CHUNK, LOG_SCALE, MEAN, OPACITY, QUATERNION, SH
from .simd import take

F = np.float32
# Rows of what a Gaussian may do by itself at one moment, added to its parameters once it has been carried.
OWN_MEAN, OWN_COLOR, OWN_OPACITY, OWN_ROWS = 0, 3, 6, 7
_STATE = 16  # numbers of a node's state: rotation matrix, the place it takes the origin to, quaternion
_BLEND = 13  # of a Gaussian's blend: rotation matrices blended, quaternions blended
_NODES = 8  # nodes whose gradients are one piece of work


@kernel
def carry(counter, count, rows, stride, still, carriers, weights, states, own, has_own, moved, blends, signed):
    """Moved parameters, each Gaussian's blend of its nodes, and its weights with the sign that each quaternion was taken with."""
    several = weights.shape[1]
    while True:
        first = take(counter) * CHUNK
        if first >= count:
            break
        last = min(first + CHUNK, count)
        for row in range(LOG_SCALE, rows):
            for g in range(first, last):
                moved[row * stride + g] = still[row * stride + g]
        for g in range(first, last):
            x, y, z = still[g], still[stride + g], still[2 * stride + g]
            blend = blends[g]
            for i in range(_BLEND):
                blend[i] = F(0)
            tx, ty, tz = F(0), F(0), F(0)
            lead = states[carriers[g, 0]]
            for k in range(several):
                state, weight = states[carriers[g, k]], weights[g, k]
                for i in range(9):
                    blend[i] += weight * state[i]
                tx += weight * state[9]
                ty += weight * state[10]
                tz += weight * state[11]
                along = lead[12] * state[12] + lead[13] * state[13] + lead[14] * state[14] + lead[15] * state[15]
                sign = -weight if along < 0 else weight
                signed[g, k] = sign
                for i in range(4):
                    blend[9 + i] += sign * state[12 + i]
            mx = blend[0] * x + blend[1] * y + blend[2] * z + tx
            my = blend[3] * x + blend[4] * y + blend[5] * z + ty
            mz = blend[6] * x + blend[7] * y + blend[8] * z + tz
            if has_own:
                mx += own[g]
                my += own[stride + g]
                mz += own[2 * stride + g]
                for channel in range(3):
                    moved[(SH + channel) * stride + g] += own[(OWN_COLOR + channel) * stride + g]
                moved[OPACITY * stride + g] += own[OWN_OPACITY * stride + g]
            moved[g], moved[stride + g], moved[2 * stride + g] = mx, my, mz
            a, b, c, d = blend[9], blend[10], blend[11], blend[12]
            w, i, j, k_ = still[3 * stride + g], still[4 * stride + g], still[5 * stride + g], still[6 * stride + g]
            moved[3 * stride + g] = a * w - b * i - c * j - d * k_
            moved[4 * stride + g] = a * i + b * w + c * k_ - d * j
            moved[5 * stride + g] = a * j - b * k_ + c * w + d * i
            moved[6 * stride + g] = a * k_ + b * j - c * i + d * w


@kernel
def carry_back(counter, count, stride, still, blends, gradients, pulls):
    """Turns the gradient by moved parameters into the one by those at rest, in place; `pulls` keeps what the nodes need: by the moved mean
    and by the blended quaternion."""
    while True:
        first = take(counter) * CHUNK
        if first >= count:
            break
        for g in range(first, min(first + CHUNK, count)):
            blend, pull = blends[g], pulls[g]
            x, y, z = gradients[g], gradients[stride + g], gradients[2 * stride + g]
            pull[0], pull[1], pull[2] = x, y, z
            for i in range(3):
                gradients[i * stride + g] = blend[i] * x + blend[3 + i] * y + blend[6 + i] * z
            p, q, r, s = gradients[3 * stride + g], gradients[4 * stride + g], gradients[5 * stride + g], gradients[6 * stride + g]
            a, b, c, d = blend[9], blend[10], blend[11], blend[12]
            w, i, j, k = still[3 * stride + g], still[4 * stride + g], still[5 * stride + g], still[6 * stride + g]
            # u (x) v is linear in both: by v it is conj(u) (x) gradient, by u gradient (x) conj(v).
            gradients[3 * stride + g] = a * p + b * q + c * r + d * s
            gradients[4 * stride + g] = a * q - b * p - c * s + d * r
            gradients[5 * stride + g] = a * r + b * s - c * p - d * q
            gradients[6 * stride + g] = a * s - b * r + c * q - d * p
            pull[3] = p * w + q * i + r * j + s * k
            pull[4] = q * w - p * i - r * k + s * j
            pull[5] = r * w - p * j - s * i + q * k
            pull[6] = s * w - p * k - q * j + r * i


@kernel
def gather(counter, stride, still, starts, members, several, signed, states, centres, pulls, result):
    """Each node's gradient: torque about its moved centre, by its translation, and by its quaternion as it turns Gaussians."""
    count = len(starts) - 1
    while True:
        first = take(counter) * _NODES
        if first >= count:
            break
        for m in range(first, min(first + _NODES, count)):
            state = states[m]
            tx, ty, tz, fx, fy, fz = F(0), F(0), F(0), F(0), F(0), F(0)
            qa, qb, qc, qd = F(0), F(0), F(0), F(0)
            for entry in range(starts[m], starts[m + 1]):
                place = members[entry]
                g = place // several
                sign = signed[g, place % several]
                weight = abs(sign)
                pull = pulls[g]
                dx, dy, dz = still[g] - centres[m, 0], still[stride + g] - centres[m, 1], still[2 * stride + g] - centres[m, 2]
                rx = state[0] * dx + state[1] * dy + state[2] * dz
                ry = state[3] * dx + state[4] * dy + state[5] * dz
                rz = state[6] * dx + state[7] * dy + state[8] * dz
                gx, gy, gz = weight * pull[0], weight * pull[1], weight * pull[2]
                fx += gx
                fy += gy
                fz += gz
                tx += ry * gz - rz * gy
                ty += rz * gx - rx * gz
                tz += rx * gy - ry * gx
                qa += sign * pull[3]
                qb += sign * pull[4]
                qc += sign * pull[5]
                qd += sign * pull[6]
            values = result[m]
            values[0], values[1], values[2], values[3], values[4], values[5] = tx, ty, tz, fx, fy, fz
            values[6], values[7], values[8], values[9] = qa, qb, qc, qd


class Carried:
    """N Gaussians bound to M nodes; buffers are reused from call to call, and what a call returned is overwritten by the next."""

    def __init__(self, threads: int, nodes: Float[np.ndarray, "m 3"], binding: Binding, stride: int):
        self.threads, self.nodes, self.stride = threads, np.ascontiguousarray(nodes, np.float32), stride
        self.carriers = np.ascontiguousarray(binding.nodes, np.int32)
        self.weights = np.ascontiguousarray(binding.weights, np.float32)
        count, several = self.carriers.shape
        self.count = count
        self.members = np.argsort(self.carriers.reshape(-1), kind="stable")
        self.starts = np.searchsorted(self.carriers.reshape(-1)[self.members], np.arange(len(nodes) + 1))
        self.blends = np.zeros((count, _BLEND), np.float32)
        self.signed = np.zeros((count, several), np.float32)
        self.pulls = np.zeros((count, 7), np.float32)
        self.sums = np.zeros((len(nodes), 10), np.float32)
        self.states = np.zeros((len(nodes), _STATE), np.float32)
        self._none = np.zeros(1, np.float32)

    def carry(
        self,
        still: Float[np.ndarray, "rows columns"],
        rotations: Float[np.ndarray, "m 4"],
        translations: Float[np.ndarray, "m 3"],
        own: Float[np.ndarray, "7 columns"] | None,
        moved: Float[np.ndarray, "rows columns"],
    ) -> None:
        """Writes the parameters of the moved Gaussians; padding in `moved` is left as it is. rotations: unit quaternions, w first."""
        turns = matrices(rotations)
        self.states[:, :9] = turns.reshape(-1, 9)
        self.states[:, 9:12] = self.nodes + translations - np.einsum("mij,mj->mi", turns, self.nodes)
        self.states[:, 12:] = rotations
        run(
            self.threads, carry, self.count, len(still), self.stride, still.reshape(-1), self.carriers, self.weights, self.states,
            self._none if own is None else own.reshape(-1), own is not None, moved.reshape(-1), self.blends, self.signed,
        )  # fmt: skip

    def carry_back(
        self, still: Float[np.ndarray, "rows columns"], gradients: Float[np.ndarray, "rows columns"]
    ) -> tuple[Float[np.ndarray, "m 4"], Float[np.ndarray, "m 3"]]:
        """Takes the gradient by what `carry` has just written back to `still`, in place; returns the nodes' own, by quaternion and by
        translation. The one by a unit quaternion has no part along it."""
        run(self.threads, carry_back, self.count, self.stride, still.reshape(-1), self.blends, gradients.reshape(-1), self.pulls)
        run(
            self.threads, gather, self.stride, still.reshape(-1), self.starts, self.members, self.carriers.shape[1], self.signed,
            self.states, self.nodes, self.pulls, self.sums,
        )  # fmt: skip
        quaternions = self.states[:, 12:]
        return by_quaternion(self.sums[:, :3], quaternions) + across(self.sums[:, 6:], quaternions), self.sums[:, 3:6]


def own_gradients(gradients: Float[np.ndarray, "rows columns"], result: Float[np.ndarray, "7 columns"]) -> None:
    """By what the Gaussians do by themselves, of the gradient by moved parameters: call it before `carry_back`."""
    result[OWN_MEAN:OWN_COLOR] = gradients[MEAN:QUATERNION]
    result[OWN_COLOR:OWN_OPACITY] = gradients[SH : SH + 3]
    result[OWN_OPACITY] = gradients[OPACITY]


def by_quaternion(torques: Float[np.ndarray, "m 3"], quaternions: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "m 4"]:
    """The gradient by unit quaternions, of the one by small turns in the world (dq = (0, turn) (x) q / 2)."""
    return 2 * product(np.concatenate([np.zeros_like(torques[:, :1]), torques], 1), quaternions)


def across(vectors: Float[np.ndarray, "m 4"], quaternions: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "m 4"]:
    """The part at right angles to unit quaternions."""
    return vectors - (vectors * quaternions).sum(1, keepdims=True) * quaternions
