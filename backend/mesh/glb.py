"""glTF 2.0 binary files (Khronos, glTF 2.0 specification): one mesh, one material, one texture inside."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from backend.mesh.mesh import TexturedMesh
from backend.views.views import Frame

ROUGHNESS = 0.6  # what the views do not tell
FLOAT, UINT32 = 5126, 5125
VERTICES, INDICES = 34962, 34963
LINEAR, LINEAR_MIPMAP_LINEAR, CLAMP = 9729, 9987, 33071


def save(path: Path, mesh: TexturedMesh, frame: Frame, name: str) -> None:
    """Writes the mesh in world metres, Y up as glTF wants it. The node carries the frame's centre, so that vertices stay small numbers."""
    positions = _y_up(mesh.vertices.astype(np.float64) / frame.scale).astype(np.float32)
    texture = io.BytesIO()
    Image.fromarray(mesh.base_color).save(texture, "PNG")
    uv = np.stack([mesh.uv[:, 0], 1 - mesh.uv[:, 1]], 1)  # glTF's origin is the upper left
    blobs = [
        (positions.astype("<f4").tobytes(), VERTICES),
        (_y_up(mesh.normals).astype("<f4").tobytes(), VERTICES),
        (uv.astype("<f4").tobytes(), VERTICES),
        (mesh.faces.astype("<u4").tobytes(), INDICES),
        (texture.getvalue(), None),
    ]
    binary, buffer_views = bytearray(), []
    for data, target in blobs:
        view = {"buffer": 0, "byteOffset": len(binary), "byteLength": len(data)}
        buffer_views.append(view if target is None else {**view, "target": target})
        binary += data + b"\0" * (-len(data) % 4)
    count = len(positions)
    primitive = {"attributes": {"POSITION": 0, "NORMAL": 1, "TEXCOORD_0": 2}, "indices": 3, "material": 0}
    document = {
        "asset": {"version": "2.0", "generator": "Kiln"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"name": name, "mesh": 0, "translation": _y_up(np.asarray(frame.centre, np.float64)).tolist()}],
        "meshes": [{"name": name, "primitives": [primitive]}],
        "accessors": [
            {"bufferView": 0, "componentType": FLOAT, "count": count, "type": "VEC3",
             "min": positions.min(0).tolist(), "max": positions.max(0).tolist()},
            {"bufferView": 1, "componentType": FLOAT, "count": count, "type": "VEC3"},
            {"bufferView": 2, "componentType": FLOAT, "count": count, "type": "VEC2"},
            {"bufferView": 3, "componentType": UINT32, "count": mesh.faces.size, "type": "SCALAR"},
        ],
        "materials": [
            {"name": name, "pbrMetallicRoughness": {"baseColorTexture": {"index": 0}, "metallicFactor": 0.0, "roughnessFactor": ROUGHNESS}}
        ],
        "textures": [{"sampler": 0, "source": 0}],
        "samplers": [{"magFilter": LINEAR, "minFilter": LINEAR_MIPMAP_LINEAR, "wrapS": CLAMP, "wrapT": CLAMP}],
        "images": [{"name": f"{name} base color", "bufferView": 4, "mimeType": "image/png"}],
        "bufferViews": buffer_views,
        "buffers": [{"byteLength": len(binary)}],
    }  # fmt: skip
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    header = struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(text) + 8 + len(binary))
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(binary), b"BIN\0") + bytes(binary)
    path.write_bytes(header + chunks)


def _y_up(vectors: np.ndarray) -> np.ndarray:
    """Z up to Y up: x, z, -y."""
    return np.stack([vectors[..., 0], vectors[..., 2], -vectors[..., 1]], -1)
