import dataclasses
import io
import json
import struct

import numpy as np
import pytest
import trimesh
from PIL import Image

from backend.mesh import glb
from backend.mesh.bake import vertex_normals
from backend.mesh.mesh import Mesh, TexturedMesh
from backend.mesh.tangents import tangents
from backend.views.views import Frame

FRAME = Frame(np.array([100.0, -40.0, 7.0]), 0.25)


def textured() -> TexturedMesh:
    shape = trimesh.creation.box((0.4, 0.6, 0.8))
    mesh = Mesh(shape.vertices.astype(np.float32), shape.faces.astype(np.int32))
    uv = np.random.default_rng(1).random((len(mesh.vertices), 2)).astype(np.float32)
    texture = np.random.default_rng(2).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    return TexturedMesh(mesh.vertices, vertex_normals(mesh).astype(np.float32), uv, mesh.faces, texture)


def full() -> TexturedMesh:
    """With every map, each of random pixels, and with tangents."""
    plain = textured()
    source, faces, turned = tangents(plain.vertices, plain.normals, plain.uv, plain.faces)
    random = np.random.default_rng(3)
    return dataclasses.replace(
        plain,
        **{name: getattr(plain, name)[source] for name in ("vertices", "normals", "uv")},
        faces=faces,
        tangents=turned,
        opacity=np.where(random.random((32, 32)) < 0.5, 0, 255).astype(np.uint8),
        **{
            name: random.integers(0, 256, (32, 32, count)).astype(np.uint8)
            for name, count in (("material", 2), ("normal_map", 3), ("emission", 3))
        },
        emission_strength=3.5,
    )


def contents(path):
    """The document and the buffer, by the container's rules."""
    data = path.read_bytes()
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data)) and length % 4 == 0
    size, kind = struct.unpack_from("<I4s", data, 12)
    assert kind == b"JSON" and size % 4 == 0
    document = json.loads(data[20 : 20 + size])
    binary_size, kind = struct.unpack_from("<I4s", data, 20 + size)
    assert kind == b"BIN\0" and binary_size == document["buffers"][0]["byteLength"]
    return document, data[28 + size :]


def saved(path, mesh):
    glb.save(path, mesh, FRAME, "box")
    return contents(path)


def pixels(document, binary, texture):
    view = document["bufferViews"][document["images"][document["textures"][texture["index"]]["source"]]["bufferView"]]
    return np.asarray(Image.open(io.BytesIO(binary[view["byteOffset"] : view["byteOffset"] + view["byteLength"]])))


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
    document, binary = contents(tmp_path / "mesh.glb")
    for accessor in document["accessors"]:
        assert document["bufferViews"][accessor["bufferView"]]["byteOffset"] % 4 == 0
    position = document["accessors"][0]
    view = document["bufferViews"][position["bufferView"]]
    points = np.frombuffer(binary, "<f4", position["count"] * 3, view["byteOffset"]).reshape(-1, 3)
    assert np.array_equal(points.min(0), np.float32(position["min"])) and np.array_equal(points.max(0), np.float32(position["max"]))
    assert np.abs(points).max() < 10  # the place in the world is the node's: vertices keep their digits


def test_every_map_stands_where_gltf_wants_it(tmp_path):
    mesh = full()
    document, binary = saved(tmp_path / "mesh.glb", mesh)
    (material,) = document["materials"]
    surface = material["pbrMetallicRoughness"]
    color, packed = pixels(document, binary, surface["baseColorTexture"]), pixels(document, binary, surface["metallicRoughnessTexture"])
    assert np.array_equal(color[..., :3], mesh.base_color) and np.array_equal(color[..., 3], mesh.opacity)
    assert np.array_equal(packed[..., 1], mesh.material[..., 0]) and np.array_equal(packed[..., 2], mesh.material[..., 1])
    assert surface.get("roughnessFactor", 1) == surface.get("metallicFactor", 1) == 1  # factors multiply the texture
    assert np.array_equal(pixels(document, binary, material["normalTexture"]), mesh.normal_map)
    assert np.array_equal(pixels(document, binary, material["emissiveTexture"]), mesh.emission)
    assert material["emissiveFactor"] == [1, 1, 1] and document["extensionsUsed"] == ["KHR_materials_emissive_strength"]
    assert material["extensions"]["KHR_materials_emissive_strength"]["emissiveStrength"] == 3.5
    assert len({image["name"] for image in document["images"]}) == 4
    tangent = document["accessors"][document["meshes"][0]["primitives"][0]["attributes"]["TANGENT"]]
    assert tangent["type"] == "VEC4" and tangent["count"] == len(mesh.vertices)
    found = trimesh.load(tmp_path / "mesh.glb", process=False).to_geometry().visual.material  # an independent reader
    assert np.array_equal(np.asarray(found.normalTexture), mesh.normal_map) and np.array_equal(
        np.asarray(found.emissiveTexture), mesh.emission
    )
    assert found.alphaMode == "MASK"


def test_tangents_stay_at_right_angles_to_the_normals_in_gltf_s_axes(tmp_path):
    document, binary = saved(tmp_path / "mesh.glb", full())

    def values(name, width):
        accessor = document["accessors"][document["meshes"][0]["primitives"][0]["attributes"][name]]
        start = document["bufferViews"][accessor["bufferView"]]["byteOffset"]
        return np.frombuffer(binary, "<f4", accessor["count"] * width, start).reshape(-1, width)

    tangent, normal = values("TANGENT", 4), values("NORMAL", 3)
    assert np.allclose(np.linalg.norm(tangent[:, :3], axis=1), 1, atol=1e-5) and set(tangent[:, 3]) <= {-1.0, 1.0}
    assert np.abs((tangent[:, :3] * normal).sum(1)).max() < 1e-5


def test_maps_of_one_value_are_factors_without_a_texture(tmp_path):
    material, emission = np.full((8, 8, 2), (51, 255), np.uint8), np.full((8, 8, 3), (255, 0, 188), np.uint8)
    mesh = dataclasses.replace(textured(), material=material, emission=emission)
    document, _ = saved(tmp_path / "mesh.glb", mesh)
    surface = document["materials"][0]["pbrMetallicRoughness"]
    assert surface["roughnessFactor"] == pytest.approx(0.2) and surface["metallicFactor"] == 1
    assert document["materials"][0]["emissiveFactor"] == pytest.approx([1, 0, 0.5029], abs=1e-3)  # linear
    assert len(document["images"]) == 1 and "extensionsUsed" not in document and "alphaMode" not in document["materials"][0]


@pytest.mark.parametrize(("values", "mode"), [((0, 255), "MASK"), ((120, 140), "BLEND"), ((0, 100, 255), "BLEND")])
def test_a_stencil_is_cut_out_and_glass_is_blended(tmp_path, values, mode):
    opacity = np.random.default_rng(0).choice(np.uint8(values), (32, 32))
    document, _ = saved(tmp_path / "mesh.glb", dataclasses.replace(textured(), opacity=opacity))
    assert document["materials"][0]["alphaMode"] == mode
