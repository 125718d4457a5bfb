"""glTF 2.0 binary files (Khronos, glTF 2.0 specification): one mesh and one metallic-roughness material with its textures inside."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from backend.mesh.mesh import TexturedMesh
from backend.mesh.raster import linear_from_srgb
from backend.views.views import Frame

ROUGHNESS = 0.6  # what the views do not tell
FLOAT, UINT32 = 5126, 5125
VERTICES, INDICES = 34962, 34963
CUT_OUT = 0.25  # share of the texels that are not opaque: with fewer half-clear ones than that, opacity is a stencil
STRENGTH = "KHR_materials_emissive_strength"
LINEAR, LINEAR_MIPMAP_LINEAR, CLAMP = 9729, 9987, 33071


def save(path: Path, mesh: TexturedMesh, frame: Frame, name: str) -> None:
    """Writes the mesh in world metres, Y up as glTF wants it. The node carries the frame's centre, so that vertices stay small numbers."""
    binary = _Binary()
    positions = _y_up(mesh.vertices.astype(np.float64) / frame.scale).astype("<f4")
    bounds = {"min": positions.min(0).tolist(), "max": positions.max(0).tolist()}
    attributes = {
        "POSITION": binary.accessor(positions, "VEC3", VERTICES, **bounds),
        "NORMAL": binary.accessor(_y_up(mesh.normals).astype("<f4"), "VEC3", VERTICES),
        # glTF's origin is the upper left
        "TEXCOORD_0": binary.accessor(np.stack([mesh.uv[:, 0], 1 - mesh.uv[:, 1]], 1).astype("<f4"), "VEC2", VERTICES),
    }
    if mesh.normal_map is not None and mesh.tangents is not None:
        tangents = np.concatenate([_y_up(mesh.tangents[:, :3]), mesh.tangents[:, 3:]], 1)
        attributes["TANGENT"] = binary.accessor(tangents.astype("<f4"), "VEC4", VERTICES)
    indices = binary.accessor(mesh.faces.reshape(-1).astype("<u4"), "SCALAR", INDICES)
    material, used = _material(mesh, name, binary)
    document = {
        "asset": {"version": "2.0", "generator": "Kiln"},
        **({"extensionsUsed": used} if used else {}),
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"name": name, "mesh": 0, "translation": _y_up(np.asarray(frame.centre, np.float64)).tolist()}],
        "meshes": [{"name": name, "primitives": [{"attributes": attributes, "indices": indices, "material": 0}]}],
        "accessors": binary.accessors,
        "materials": [material],
        "textures": [{"sampler": 0, "source": number} for number in range(len(binary.images))],
        "samplers": [{"magFilter": LINEAR, "minFilter": LINEAR_MIPMAP_LINEAR, "wrapS": CLAMP, "wrapT": CLAMP}],
        "images": binary.images,
        "bufferViews": binary.views,
        "buffers": [{"byteLength": len(binary.data)}],
    }
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    header = struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(text) + 8 + len(binary.data))
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(binary.data), b"BIN\0") + bytes(binary.data)
    path.write_bytes(header + chunks)


class _Binary:
    """The file's one buffer, and the tables that say what lies where in it."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.views: list[dict[str, Any]] = []
        self.accessors: list[dict[str, Any]] = []
        self.images: list[dict[str, Any]] = []

    def accessor(self, values: np.ndarray, kind: str, target: int, **more: Any) -> int:
        view = self._add(values.tobytes(), target=target)
        component = UINT32 if values.dtype.kind == "u" else FLOAT
        self.accessors.append({"bufferView": view, "componentType": component, "count": len(values), "type": kind, **more})
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


def _material(mesh: TexturedMesh, name: str, binary: _Binary) -> tuple[dict[str, Any], list[str]]:
    """The material, and the extensions that it uses. A map that is one value all over becomes a factor."""
    color = mesh.base_color if mesh.opacity is None else np.dstack([mesh.base_color, mesh.opacity])
    surface: dict[str, Any] = {"baseColorTexture": binary.texture(color, f"{name} base color")}
    if mesh.material is None:
        surface |= {"metallicFactor": 0.0, "roughnessFactor": ROUGHNESS}
    elif (value := _constant(mesh.material)) is not None:
        surface |= {"roughnessFactor": round(value[0] / 255, 4), "metallicFactor": round(value[1] / 255, 4)}
    else:  # red is free for occlusion: white is none
        packed = np.dstack([np.full_like(mesh.material[..., 0], 255), mesh.material])
        surface["metallicRoughnessTexture"] = binary.texture(packed, f"{name} roughness metallic")
    material: dict[str, Any] = {"name": name, "pbrMetallicRoughness": surface}
    used = []
    if mesh.normal_map is not None and mesh.tangents is not None:
        material["normalTexture"] = binary.texture(mesh.normal_map, f"{name} normal")
    if mesh.emission is not None:
        value = _constant(mesh.emission)
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


def _constant(pixels: UInt8[np.ndarray, "h w c"]) -> Float[np.ndarray, "c"] | None:
    """The mean value of a map whose pixels differ by rounding alone."""
    flat = pixels.reshape(-1, pixels.shape[-1])
    return flat.mean(0) if (np.ptp(flat, axis=0) <= 2).all() else None


def _y_up(vectors: np.ndarray) -> np.ndarray:
    """Z up to Y up: x, z, -y."""
    return np.stack([vectors[..., 0], vectors[..., 2], -vectors[..., 1]], -1)
