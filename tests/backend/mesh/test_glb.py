import json
import struct

import numpy as np
import trimesh

from backend.mesh import glb
from backend.mesh.bake import vertex_normals
from backend.mesh.mesh import Mesh, TexturedMesh
from backend.views.views import Frame

FRAME = Frame(np.array([100.0, -40.0, 7.0]), 0.25)


def textured() -> TexturedMesh:
    shape = trimesh.creation.box((0.4, 0.6, 0.8))
    mesh = Mesh(shape.vertices.astype(np.float32), shape.faces.astype(np.int32))
    uv = np.random.default_rng(1).random((len(mesh.vertices), 2)).astype(np.float32)
    texture = np.random.default_rng(2).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    return TexturedMesh(mesh.vertices, vertex_normals(mesh).astype(np.float32), uv, mesh.faces, texture)


def test_trimesh_reads_the_same_mesh_in_world_metres_y_up(tmp_path):
    mesh = textured()
    glb.save(tmp_path / "mesh.glb", mesh, FRAME, "bôx")
    scene = trimesh.load(tmp_path / "mesh.glb", process=False)
    found = scene.to_geometry() if hasattr(scene, "to_geometry") else scene.dump(concatenate=True)
    world = FRAME.to_world(mesh.vertices)
    assert np.allclose(found.vertices, np.stack([world[:, 0], world[:, 2], -world[:, 1]], 1), atol=1e-5)
    assert np.array_equal(found.faces, mesh.faces)
    assert np.allclose(found.visual.uv, mesh.uv, atol=1e-6)  # trimesh's origin is the lower left, as ours
    assert np.array_equal(np.asarray(found.visual.material.baseColorTexture)[..., :3], mesh.base_color)
    assert found.visual.material.metallicFactor == 0
    assert found.volume > 0


def test_the_file_keeps_the_container_s_rules(tmp_path):
    glb.save(tmp_path / "mesh.glb", textured(), FRAME, "box")
    data = (tmp_path / "mesh.glb").read_bytes()
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data)) and length % 4 == 0
    size, kind = struct.unpack_from("<I4s", data, 12)
    assert kind == b"JSON" and size % 4 == 0
    document = json.loads(data[20 : 20 + size])
    binary_size, kind = struct.unpack_from("<I4s", data, 20 + size)
    assert kind == b"BIN\0" and binary_size == document["buffers"][0]["byteLength"]
    binary = data[28 + size :]
    for accessor in document["accessors"]:
        assert document["bufferViews"][accessor["bufferView"]]["byteOffset"] % 4 == 0
    position = document["accessors"][0]
    view = document["bufferViews"][position["bufferView"]]
    points = np.frombuffer(binary, "<f4", position["count"] * 3, view["byteOffset"]).reshape(-1, 3)
    assert np.array_equal(points.min(0), np.float32(position["min"])) and np.array_equal(points.max(0), np.float32(position["max"]))
    assert np.abs(points).max() < 10  # the place in the world is the node's: vertices keep their digits
