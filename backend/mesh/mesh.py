"""Triangles, bare and textured. Vertices in the unit frame (views/views.py), counter-clockwise from outside."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8


@dataclass(frozen=True)
class Mesh:
    vertices: Float[np.ndarray, "n 3"]  # float32
    faces: Int[np.ndarray, "f 3"]  # int32


@dataclass(frozen=True)
class TexturedMesh:
    """A mesh cut along its UV seams: vertices repeat where charts meet."""

    vertices: Float[np.ndarray, "n 3"]  # float32
    normals: Float[np.ndarray, "n 3"]  # float32, unit length, smooth across seams
    uv: Float[np.ndarray, "n 2"]  # float32 in [0, 1], origin at the picture's lower left, as in Blender
    faces: Int[np.ndarray, "f 3"]  # int32
    base_color: UInt8[np.ndarray, "h w 3"]  # sRGB, row 0 at the top
