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
class MovingMesh:
    """One topology at T moments; `rest` is the moment whose surface it was made from. frames, fps: as in ViewSequence."""

    vertices: Float[np.ndarray, "t n 3"]  # float32
    faces: Int[np.ndarray, "f 3"]  # int32
    rest: int
    frames: Float[np.ndarray, "t"]
    fps: float

    def at(self, moment: int) -> Mesh:
        return Mesh(self.vertices[moment], self.faces)


@dataclass(frozen=True)
class TexturedMesh:
    """A mesh cut along its UV seams: vertices repeat where charts meet."""

    vertices: Float[np.ndarray, "n 3"]  # float32
    normals: Float[np.ndarray, "n 3"]  # float32, unit length, smooth across seams
    uv: Float[np.ndarray, "n 2"]  # float32 in [0, 1], origin at the picture's lower left, as in Blender
    faces: Int[np.ndarray, "f 3"]  # int32
    base_color: UInt8[np.ndarray, "h w 3"]  # sRGB, row 0 at the top
    opacity: UInt8[np.ndarray, "h w"] | None = None  # None: opaque all over
    material: UInt8[np.ndarray, "h w 2"] | None = None  # roughness and metallic in 255ths
    normal_map: UInt8[np.ndarray, "h w 3"] | None = None  # tangent space, +Y up, as Blender and glTF mean it; needs `tangents`
    emission: UInt8[np.ndarray, "h w 3"] | None = None  # sRGB; its light times `emission_strength` is what is given off
    emission_strength: float = 1.0  # at least 1
    tangents: Float[np.ndarray, "n 4"] | None = None  # float32; w: the bitangent's sign (tangents.py)
    texels_seen: float | None = None  # share of the charts' texels that some view saw


@dataclass(frozen=True)
class AnimatedMesh:
    """One topology and one texture, and where the vertices are at each moment.

    mesh: at rest. vertices, normals: at each of T moments, unit frame. frames: the timeline's frame number of each moment. fps: timeline
    frames a second.
    """

    mesh: TexturedMesh
    vertices: Float[np.ndarray, "t n 3"]  # float32
    normals: Float[np.ndarray, "t n 3"]  # float32, unit length
    frames: Float[np.ndarray, "t"]
    fps: float


@dataclass(frozen=True)
class Rig:
    """B bones that move a mesh: v(t) = sum over its bones of weight x (R(t) A S(t) A^-1 (v - head) + head + translation(t)), unit frame
    throughout. S(t): one factor for each of the bone's own axes at rest, the columns of A.

    heads, tails: the bones at rest. axes: A as unit quaternions, w first; the second axis points from head to tail, as in Blender. parents:
    index of each bone's parent, less than its own, or -1. joints, weights: at most four bones a vertex, the heaviest first; weights sum to
    1. rotations: R, unit quaternions, w first. translations: of the heads. scales: 1 where bones may not scale. All three are the bone's
    own, not by its parent, and no bone takes over another's scale: a turned child under a scaled parent would be sheared, which neither
    glTF's nodes nor Blender's bones can say. So glb.py writes each factor into a joint that has no children.
    """

    heads: Float[np.ndarray, "b 3"]
    tails: Float[np.ndarray, "b 3"]
    axes: Float[np.ndarray, "b 4"]
    parents: Int[np.ndarray, "b"]
    joints: Int[np.ndarray, "n 4"]
    weights: Float[np.ndarray, "n 4"]
    rotations: Float[np.ndarray, "t b 4"]
    translations: Float[np.ndarray, "t b 3"]
    scales: Float[np.ndarray, "t b 3"]
