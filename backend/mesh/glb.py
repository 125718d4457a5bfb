"""glTF 2.0 binary files (Khronos, glTF 2.0 specification): one mesh and one metallic-roughness material with its textures inside, at
rest or moving, by morph targets or by a skin (protocol/SPEC.md, "Results of animate"), or with levels of detail and hulls."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image
from scipy.spatial.transform import Rotation

from backend.mesh.lods import Level
from backend.mesh.mesh import AnimatedMesh, Mesh, Rig, TexturedMesh
from backend.mesh.raster import linear_from_srgb
from backend.views.views import Frame

ROUGHNESS = 0.6  # what the views do not tell
COMPONENTS = {"f4": 5126, "u4": 5125, "u2": 5123, "u1": 5121}
VERTICES, INDICES = 34962, 34963
CUT_OUT = 0.25  # share of the texels that are not opaque: with fewer half-clear ones than that, opacity is a stencil
LEVELS = "MSFT_lod"
STRENGTH = "KHR_materials_emissive_strength"
LINEAR, LINEAR_MIPMAP_LINEAR, CLAMP = 9729, 9987, 33071
Y_UP = Rotation.from_rotvec([-np.pi / 2, 0, 0])  # what _y_up does


def save(path: Path, mesh: TexturedMesh, frame: Frame, name: str) -> None:
    """Writes the mesh in world metres, Y up as glTF wants it. The node carries the frame's centre, so that vertices stay small numbers."""
    binary = _Binary()
    document = _still(mesh, frame, name, binary)
    document["scenes"] = [{"nodes": [0]}]
    document["nodes"] = [{"name": name, "mesh": 0, "translation": _place(frame)}]
    _write(path, document, binary)


def save_shape_keys(path: Path, mesh: AnimatedMesh, frame: Frame, name: str) -> None:
    """Writes the mesh as `save` does, with a morph target for every moment and an animation that goes from one to the next."""
    binary = _Binary()
    document = _still(mesh.mesh, frame, name, binary)
    document["scenes"] = [{"nodes": [0]}]
    document["nodes"] = [{"name": name, "mesh": 0, "translation": _place(frame)}]
    (body,) = document["meshes"]
    (primitive,) = body["primitives"]
    primitive["targets"] = []
    for vertices, normals in zip(mesh.vertices, mesh.normals):
        moved = _y_up((vertices.astype(np.float64) - mesh.mesh.vertices) / frame.scale).astype("<f4")
        turned = _y_up(normals - mesh.mesh.normals).astype("<f4")
        bounds = {"min": moved.min(0).tolist(), "max": moved.max(0).tolist()}
        target = {"POSITION": binary.accessor(moved, "VEC3", VERTICES, **bounds), "NORMAL": binary.accessor(turned, "VEC3", VERTICES)}
        primitive["targets"].append(target)
    moments = len(mesh.frames)
    body["weights"] = [0.0] * moments
    body["extras"] = {"targetNames": [f"frame {number:g}" for number in mesh.frames]}  # where Blender and three.js look for names
    animation = _Animation(mesh, name, binary)
    animation.add(0, "weights", np.eye(moments).reshape(-1), "SCALAR")
    document["animations"] = [animation.entry]
    _write(path, document, binary)


def save_armature(path: Path, mesh: AnimatedMesh, rig: Rig, frame: Frame, name: str) -> None:
    """Writes the mesh at rest as `save` does, with the rig as its skin and an animation of the bones.

    glTF's nodes take over their parents' scales, the rig's bones do not: a bone is a joint that turns and moves, and a bone that scales has
    one more joint under it, without children, that does this alone.
    """
    binary = _Binary()
    document = _still(mesh.mesh, frame, name, binary)
    document["scenes"] = [{"nodes": [0, 1]}]
    (body,) = document["meshes"]
    (primitive,) = body["primitives"]
    scaling = np.flatnonzero((np.abs(rig.scales - 1) > 1e-6).any((0, 2)))
    count = len(rig.parents)
    bones = 2  # number of the first bone's node
    orientations = [Y_UP * _rotation(rig.axes[bone]) for bone in range(count)]
    turned = [Y_UP * _rotation(rig.rotations[:, bone]) * _rotation(rig.axes[bone]) for bone in range(count)]
    heads = _y_up(rig.heads.astype(np.float64) / frame.scale)
    moved = _y_up((rig.heads + rig.translations.astype(np.float64)) / frame.scale)
    lengths = np.linalg.norm(rig.tails - rig.heads, axis=1) / frame.scale

    animation = _Animation(mesh, name, binary)
    nodes: list[dict[str, Any]] = [
        {"name": name, "translation": _place(frame), "children": []},
        {"name": f"{name} mesh", "mesh": 0, "skin": 0},
    ]
    digits = max(3, len(str(count)))
    for bone, parent in enumerate(rig.parents):
        if parent < 0:
            place, turn, places, turns = heads[bone], orientations[bone], moved[:, bone], turned[bone]
        else:
            back, backs = orientations[parent].inv(), turned[parent].inv()
            place, turn = back.apply(heads[bone] - heads[parent]), back * orientations[bone]
            places, turns = backs.apply(moved[:, bone] - moved[:, parent]), backs * turned[bone]
        node = {"name": f"Bone {bone + 1:0{digits}}", "translation": place.tolist(), "rotation": turn.as_quat().tolist()}
        nodes.append({**node, "extras": {"length": float(lengths[bone])}})
        nodes[0 if parent < 0 else bones + parent].setdefault("children", []).append(bones + bone)
        animation.add(bones + bone, "translation", places, "VEC3")
        animation.add(bones + bone, "rotation", _continuous(turns.as_quat()), "VEC4")
    deforming = np.arange(count)  # number in `joints` of the joint that moves the vertices
    for number, bone in enumerate(scaling.tolist()):
        deforming[bone] = count + number
        nodes[bones + bone].setdefault("children", []).append(len(nodes))
        animation.add(len(nodes), "scale", rig.scales[:, bone], "VEC3")
        nodes.append({"name": f"{nodes[bones + bone]['name']} scale", "extras": {"scales": bone}})

    inverse = np.tile(np.eye(4), (count, 1, 1))
    for bone in range(count):
        back = orientations[bone].inv()
        inverse[bone, :3, :3], inverse[bone, :3, 3] = back.as_matrix(), -back.apply(heads[bone])
    inverse = np.concatenate([inverse, inverse[scaling]]).transpose(0, 2, 1)  # column by column
    joints, weights = _influences(deforming[rig.joints], rig.weights)
    primitive["attributes"]["JOINTS_0"] = binary.accessor(joints.astype("<u2" if joints.max() > 255 else "u1"), "VEC4", VERTICES)
    primitive["attributes"]["WEIGHTS_0"] = binary.accessor(weights, "VEC4", VERTICES)
    matrices = binary.accessor(inverse.reshape(-1, 16).astype("<f4"), "MAT4", None)
    document["nodes"] = nodes
    document["skins"] = [{"name": name, "skeleton": 0, "joints": list(range(bones, len(nodes))), "inverseBindMatrices": matrices}]
    document["animations"] = [animation.entry]
    _write(path, document, binary)


def save_game(
    path: Path, mesh: TexturedMesh, levels: Mapping[str, Level], sizes: Sequence[float], hulls: Mapping[str, Mesh], material: str
) -> None:
    """Writes an engine's file: levels of detail and collision hulls by their names, all without a place of their own (vertices metres or
    whatever the file counts in, Z up), one material. `mesh` gives its textures.

    The first level names the others in MSFT_lod and `sizes`, where each ends, in MSFT_screencoverage; they are no part of the scene, so
    that a reader that does not know this shows the first alone.
    """
    binary = _Binary()
    look, used = _material(mesh, material, binary)
    bodies, nodes, scene = [], [], []
    mapped = mesh.normal_map is not None and mesh.tangents is not None
    for name, level in levels.items():
        primitive = {**_primitive(level, level.tangents if mapped else None, 1.0, binary), "material": 0}
        bodies.append({"name": name, "primitives": [primitive]})
    for name, hull in hulls.items():
        bodies.append({"name": name, "primitives": [_bare(hull, binary)]})
    for number, body in enumerate(bodies):
        nodes.append({"name": body["name"], "mesh": number})
        if number == 0 or number >= len(levels):
            scene.append(number)
    if len(levels) > 1:
        used.append(LEVELS)
        nodes[0] |= {"extensions": {LEVELS: {"ids": list(range(1, len(levels)))}}, "extras": {"MSFT_screencoverage": list(sizes)}}
    document = _document(bodies, look, used, binary)
    document["scenes"] = [{"nodes": scene}]
    document["nodes"] = nodes
    _write(path, document, binary)


def _still(mesh: TexturedMesh, frame: Frame, name: str, binary: _Binary) -> dict[str, Any]:
    """The document of a mesh with its material, but for nodes and scenes."""
    mapped = mesh.normal_map is not None and mesh.tangents is not None
    primitive = _primitive(mesh, mesh.tangents if mapped else None, frame.scale, binary)
    material, used = _material(mesh, name, binary)
    return _document([{"name": name, "primitives": [{**primitive, "material": 0}]}], material, used, binary)


def _document(meshes: list[dict[str, Any]], material: dict[str, Any], used: list[str], binary: _Binary) -> dict[str, Any]:
    return {
        "asset": {"version": "2.0", "generator": "Kiln"},
        **({"extensionsUsed": used} if used else {}),
        "scene": 0,
        "scenes": [],
        "nodes": [],
        "meshes": meshes,
        "materials": [material],
        "textures": [{"sampler": 0, "source": number} for number in range(len(binary.images))],
        "samplers": [{"magFilter": LINEAR, "minFilter": LINEAR_MIPMAP_LINEAR, "wrapS": CLAMP, "wrapT": CLAMP}],
    }


def _primitive(mesh: TexturedMesh | Level, tangents: Float[np.ndarray, "n 4"] | None, scale: float, binary: _Binary) -> dict[str, Any]:
    positions = _y_up(mesh.vertices.astype(np.float64) / scale).astype("<f4")
    bounds = {"min": positions.min(0).tolist(), "max": positions.max(0).tolist()}
    attributes = {
        "POSITION": binary.accessor(positions, "VEC3", VERTICES, **bounds),
        "NORMAL": binary.accessor(_y_up(mesh.normals).astype("<f4"), "VEC3", VERTICES),
        # glTF's origin is the upper left
        "TEXCOORD_0": binary.accessor(np.stack([mesh.uv[:, 0], 1 - mesh.uv[:, 1]], 1).astype("<f4"), "VEC2", VERTICES),
    }
    if tangents is not None:
        turned = np.concatenate([_y_up(tangents[:, :3]), tangents[:, 3:]], 1)
        attributes["TANGENT"] = binary.accessor(turned.astype("<f4"), "VEC4", VERTICES)
    indices = binary.accessor(mesh.faces.reshape(-1).astype("<u4"), "SCALAR", INDICES)
    return {"attributes": attributes, "indices": indices}


def _bare(mesh: Mesh, binary: _Binary) -> dict[str, Any]:
    """A shape that is not drawn."""
    positions = _y_up(mesh.vertices.astype(np.float64)).astype("<f4")
    bounds = {"min": positions.min(0).tolist(), "max": positions.max(0).tolist()}
    place = binary.accessor(positions, "VEC3", VERTICES, **bounds)
    return {"attributes": {"POSITION": place}, "indices": binary.accessor(mesh.faces.reshape(-1).astype("<u4"), "SCALAR", INDICES)}


def _write(path: Path, document: dict[str, Any], binary: _Binary) -> None:
    tables = {
        "accessors": binary.accessors,
        "images": binary.images,
        "bufferViews": binary.views,
        "buffers": [{"byteLength": len(binary.data)}],
    }
    text = json.dumps(document | tables, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    header = struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(text) + 8 + len(binary.data))
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(binary.data), b"BIN\0")
    with path.open("wb") as file:
        file.write(header + chunks)
        file.write(binary.data)


class _Binary:
    """The file's one buffer, and the tables that say what lies where in it."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.views: list[dict[str, Any]] = []
        self.accessors: list[dict[str, Any]] = []
        self.images: list[dict[str, Any]] = []

    def accessor(self, values: np.ndarray, kind: str, target: int | None, **more: Any) -> int:
        """Number of a new accessor. target: what a graphics card will use the values for, if it will."""
        entry = {"componentType": COMPONENTS[values.dtype.str[1:]], "count": len(values), "type": kind, **more}
        if values.any():  # an accessor without a view is all zeros: the moment at rest takes no room
            entry["bufferView"] = self._add(values.tobytes(), **({} if target is None else {"target": target}))
        self.accessors.append(entry)
        return len(self.accessors) - 1

    def texture(self, pixels: np.ndarray, name: str) -> dict[str, int]:
        """Reference to a picture, h x w or h x w x 3 or 4, uint8."""
        packed = io.BytesIO()
        Image.fromarray(pixels).save(packed, "PNG")
        self.images.append({"name": name, "bufferView": self._add(packed.getvalue()), "mimeType": "image/png"})
        return {"index": len(self.images) - 1}

    def _add(self, data: bytes, **more: Any) -> int:
        self.views.append({"buffer": 0, "byteOffset": len(self.data), "byteLength": len(data), **more})
        self.data += data + b"\0" * (-len(data) % 4)
        return len(self.views) - 1


class _Animation:
    """One glTF animation, all of whose samplers have the same times."""

    def __init__(self, mesh: AnimatedMesh, name: str, binary: _Binary) -> None:
        times = ((mesh.frames - mesh.frames[0]) / mesh.fps).astype("<f4")
        self._binary = binary
        self._times = binary.accessor(times, "SCALAR", None, min=[float(times.min())], max=[float(times.max())])
        extras = {"fps": float(mesh.fps), "frames": [float(number) for number in mesh.frames]}
        self.entry: dict[str, Any] = {"name": name, "channels": [], "samplers": [], "extras": extras}

    def add(self, node: int, path: str, values: np.ndarray, kind: str) -> None:
        output = self._binary.accessor(values.astype("<f4"), kind, None)
        self.entry["channels"].append({"sampler": len(self.entry["samplers"]), "target": {"node": node, "path": path}})
        self.entry["samplers"].append({"input": self._times, "output": output, "interpolation": "LINEAR"})


def _material(mesh: TexturedMesh, name: str, binary: _Binary) -> tuple[dict[str, Any], list[str]]:
    """The material, and the extensions that it uses. A map that is one value all over becomes a factor."""
    color = mesh.base_color if mesh.opacity is None else np.dstack([mesh.base_color, mesh.opacity])
    surface: dict[str, Any] = {"baseColorTexture": binary.texture(color, f"{name} base color")}
    if mesh.material is None:
        surface |= {"metallicFactor": 0.0, "roughnessFactor": ROUGHNESS}
    elif (value := constant(mesh.material)) is not None:
        surface |= {"roughnessFactor": round(value[0] / 255, 4), "metallicFactor": round(value[1] / 255, 4)}
    else:  # red is free for occlusion: white is none
        packed = np.dstack([np.full_like(mesh.material[..., 0], 255), mesh.material])
        surface["metallicRoughnessTexture"] = binary.texture(packed, f"{name} roughness metallic")
    material: dict[str, Any] = {"name": name, "pbrMetallicRoughness": surface}
    used = []
    if mesh.normal_map is not None and mesh.tangents is not None:
        material["normalTexture"] = binary.texture(mesh.normal_map, f"{name} normal")
    if mesh.emission is not None:
        value = constant(mesh.emission)
        if value is None:
            material |= {"emissiveTexture": binary.texture(mesh.emission, f"{name} emission"), "emissiveFactor": [1.0, 1.0, 1.0]}
        else:
            material["emissiveFactor"] = linear_from_srgb(value / np.float32(255)).astype(float).round(5).tolist()
        if mesh.emission_strength > 1:
            used.append(STRENGTH)
            material["extensions"] = {STRENGTH: {"emissiveStrength": round(float(mesh.emission_strength), 4)}}
    if mesh.opacity is not None:
        clear = mesh.opacity[mesh.opacity < 230]
        between = (clear > 25).mean() if len(clear) else 0.0
        material |= {"alphaMode": "BLEND"} if between > CUT_OUT else {"alphaMode": "MASK", "alphaCutoff": 0.5}
    return material, used


def constant(pixels: UInt8[np.ndarray, "h w c"]) -> Float[np.ndarray, "c"] | None:
    """The mean value of a map whose pixels differ by rounding alone."""
    flat = pixels.reshape(-1, pixels.shape[-1])
    return flat.mean(0) if (np.ptp(flat, axis=0) <= 2).all() else None


def _influences(
    joints: Int[np.ndarray, "n 4"], weights: Float[np.ndarray, "n 4"]
) -> tuple[Int[np.ndarray, "n 4"], Float[np.ndarray, "n 4"]]:
    """Joints and float32 weights as glTF wants them: sums of 1, and joint 0 where the weight is 0."""
    weights = (weights / weights.sum(1, keepdims=True, dtype=np.float64)).astype("<f4")
    return np.where(weights > 0, joints, 0), weights


def _rotation(quaternions: Float[np.ndarray, "*n 4"]) -> Rotation:
    """w first, to scipy's w last."""
    return Rotation.from_quat(np.roll(quaternions.astype(np.float64), -1, -1))


def _continuous(quaternions: Float[np.ndarray, "t 4"]) -> Float[np.ndarray, "t 4"]:
    """The same rotations, each quaternion with the sign that is nearer to the one before, for readers that mix components."""
    turned = np.sign((quaternions[1:] * quaternions[:-1]).sum(1))
    return quaternions * np.concatenate([[1.0], np.cumprod(np.where(turned < 0, -1.0, 1.0))])[:, None]


def _place(frame: Frame) -> list[float]:
    return _y_up(np.asarray(frame.centre, np.float64)).tolist()


def _y_up(vectors: np.ndarray) -> np.ndarray:
    """Z up to Y up: x, z, -y."""
    return np.stack([vectors[..., 0], vectors[..., 2], -vectors[..., 1]], -1)
