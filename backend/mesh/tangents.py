"""Tangents for normal maps, by the rules of MikkTSpace (Mikkelsen 2008, "Simulation of wrinkled surfaces revisited", and its code, which
Blender runs and glTF 2.0 names): a map baked for them looks the same wherever it is shown.

A face's tangent is the direction in which u grows. A vertex takes the mean over the faces around it, each laid into the plane of the
vertex's normal and weighed by its angle there. Faces whose chart is mirrored have a bitangent of the other sign and share no vertex with
the others.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def tangents(
    vertices: Float[np.ndarray, "n 3"], normals: Float[np.ndarray, "n 3"], uv: Float[np.ndarray, "n 2"], faces: Int[np.ndarray, "f 3"]
) -> tuple[Int[np.ndarray, "m"], Int[np.ndarray, "f 3"], Float[np.ndarray, "m 4"]]:
    """Unit tangents and the bitangents' signs (float32), +v up as in Blender.

    Vertices where mirrored faces meet others are split: the first array names, for each vertex, the one of the input that it came from.
    """
    corner = vertices.astype(np.float64)[faces]
    place = uv.astype(np.float64)[faces]
    side, other = corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]
    along, across = place[:, 1] - place[:, 0], place[:, 2] - place[:, 0]
    area = along[:, 0] * across[:, 1] - along[:, 1] * across[:, 0]
    direction = _unit((across[:, 1:] * side - along[:, 1:] * other) * np.sign(area)[:, None])

    mirrored = area < 0
    key = faces * 2 + mirrored[:, None]
    flat = area == 0  # has no direction of its own, and takes part in whatever is around
    holders = np.unique(key[~flat])
    lacking = np.setdiff1d(faces[flat], holders // 2)
    used = np.concatenate([holders, lacking * 2])
    key = np.where(flat[:, None] & ~np.isin(key, used), key ^ 1, key)
    unused = np.setdiff1d(np.arange(len(vertices)), used // 2)
    used = np.sort(np.concatenate([used, unused * 2]))
    source, cut = used // 2, np.searchsorted(used, key).astype(np.int32)

    # Corners at one place with one normal and one place in the texture are one vertex, whoever cut it
    exact = np.concatenate([vertices[source], normals[source], uv[source], (used % 2)[:, None]], 1).astype(np.float32) + np.float32(0)
    _, welded = np.unique(exact, axis=0, return_inverse=True)
    welded = welded.ravel()
    normal = _unit(normals.astype(np.float64))[source]
    total = np.zeros((len(used), 3))
    for k in range(3):
        at = normal[cut[:, k]]
        before = _unit(_flat(corner[:, (k + 2) % 3] - corner[:, k], at))
        after = _unit(_flat(corner[:, (k + 1) % 3] - corner[:, k], at))
        angle = np.arccos(np.clip((before * after).sum(1), -1, 1))
        part = _unit(_flat(direction, at)) * np.where(flat, 0, angle)[:, None]
        for axis in range(3):
            total[:, axis] += np.bincount(welded[cut[:, k]], part[:, axis], len(total))
    found = _unit(total[welded])
    missing = (found == 0).all(1)
    if missing.any():  # no face with a direction: any vector in the plane
        aside = np.where(np.abs(normal[missing, :1]) < 0.9, np.array([1.0, 0, 0]), np.array([0, 1.0, 0]))
        found[missing] = _unit(_flat(aside, normal[missing]))
    sign = np.where(used % 2, -1.0, 1.0)[:, None]
    return source, cut, np.concatenate([found, sign], 1).astype(np.float32)


def _unit(vectors: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(length > 1e-30, vectors / np.maximum(length, 1e-30), 0.0)


def _flat(vectors: Float[np.ndarray, "n 3"], normal: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    return vectors - normal * (vectors * normal).sum(1, keepdims=True)
