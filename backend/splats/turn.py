"""Splats in other axes: means, rotations and the directions of their spherical harmonics turned together."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from .model import SH_C0, Splats

Z_UP_FROM_Y_UP = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])  # glTF's axes to Blender's, as importers turn them


def turned(splats: Splats, rotation: Float[np.ndarray, "3 3"]) -> Splats:
    """The splats after `x -> rotation @ x` of their world: seen from a turned camera they look as before."""
    rotation = np.asarray(rotation, np.float64)
    if np.array_equal(rotation, np.eye(3)):
        return splats
    x, y, z, w = Rotation.from_matrix(rotation).as_quat()
    of_rotation = np.array([[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]])  # q -> (w, x, y, z) * q
    count, bases, sh = len(splats), splats.sh.shape[1], splats.sh
    if bases > 1:
        of_harmonics = _of_harmonics(rotation, bases).astype(np.float32)
        sh = np.moveaxis((np.moveaxis(sh, 1, 2).reshape(-1, bases) @ of_harmonics.T).reshape(count, 3, bases), 2, 1)
    return dataclasses.replace(
        splats,
        means=(splats.means @ rotation.T).astype(np.float32),
        quaternions=(splats.quaternions @ of_rotation.T).astype(np.float32),
        sh=np.ascontiguousarray(sh),
    )


def harmonics(directions: Float[np.ndarray, "n 3"], degree: int) -> Float[np.ndarray, "n k"]:
    """The K = (degree + 1)^2 real spherical harmonics of unit directions, degree up to 3, in the order and with the signs of Kerbl et al.
    2023 and its published code."""
    x, y, z = np.asarray(directions, np.float64).T
    xx, yy, zz = x * x, y * y, z * z
    values = [
        np.full_like(x, SH_C0),
        *(0.4886025119029199 * v for v in (-y, z, -x)),
        1.0925484305920792 * x * y,
        -1.0925484305920792 * y * z,
        0.31539156525252005 * (2 * zz - xx - yy),
        -1.0925484305920792 * x * z,
        0.5462742152960396 * (xx - yy),
        -0.5900435899266435 * y * (3 * xx - yy),
        2.890611442640554 * x * y * z,
        -0.4570457994644658 * y * (4 * zz - xx - yy),
        0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy),
        -0.4570457994644658 * x * (4 * zz - xx - yy),
        1.445305721320277 * z * (xx - yy),
        -0.5900435899266435 * x * (xx - 3 * yy),
    ]
    return np.stack(values[: (degree + 1) ** 2], 1)


def _of_harmonics(rotation: Float[np.ndarray, "3 3"], bases: int) -> Float[np.ndarray, "k k"]:
    """What a turned world does to coefficients: Y(d) c' = Y(rotation^T d) c for every direction d, solved on enough of them."""
    directions = np.random.default_rng(0).normal(size=(8 * bases, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    degree = round(bases**0.5) - 1
    return np.linalg.lstsq(harmonics(directions, degree), harmonics(directions @ rotation, degree), rcond=None)[0]
