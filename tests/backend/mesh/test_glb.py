import dataclasses
import io
import json
import struct

import numpy as np
import pytest
import trimesh
from PIL import Image
from scipy.spatial.transform import Rotation

from backend.mesh import glb, rig
from backend.mesh.bake import vertex_normals
from backend.mesh.mesh import AnimatedMesh, Mesh, Rig, TexturedMesh
from backend.mesh.tangents import tangents
from backend.views.views import Frame
from tests import gltf

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


def moving(moments=5):
    """The box in motion: at rest at first, then turning, rising and growing."""
    mesh = full()
    random = np.random.default_rng(4)
    vertices = np.stack(
        [mesh.vertices * (1 + 0.1 * t) + [0, 0.02 * t, 0.3 * t] + random.normal(size=3) * 0.1 * (t > 0) for t in range(moments)]
    )
    normals = np.stack([Rotation.from_rotvec([0, 0, 0.2 * t]).apply(mesh.normals) for t in range(moments)])
    return AnimatedMesh(mesh, vertices.astype(np.float32), normals.astype(np.float32), np.arange(moments) * 2.0 + 10, 24.0)


def chain(mesh, count=4, seed=5):
    """A rig of `count` bones, each the child of one before; all but the first turn and scale along axes of their own."""
    random = np.random.default_rng(seed)
    moments, vertices = len(mesh.frames), len(mesh.mesh.vertices)

    def turns(shape, number):
        return np.roll(Rotation.random(int(np.prod(shape)), random_state=number).as_quat(), 1, -1).reshape(*shape, 4)

    axes = turns((count,), 1)
    heads = random.normal(size=(count, 3)) * 0.3
    along = Rotation.from_quat(np.roll(axes, -1, -1)).as_matrix()[:, :, 1]
    weights = np.sort(random.random((vertices, 4)), 1)[:, ::-1].copy()
    weights[: vertices // 2, 2:] = 0
    scales = random.uniform(0.5, 2, (moments, count, 3))
    scales[:, 0] = 1
    return Rig(
        heads=heads,
        tails=heads + along * random.uniform(0.1, 0.3, (count, 1)),
        axes=axes,
        parents=np.array([-1, *random.integers(0, np.arange(1, count))]),
        joints=np.stack([random.permutation(count)[:4] for _ in range(vertices)]),
        weights=weights / weights.sum(1, keepdims=True),
        rotations=turns((moments, count), 2),
        translations=random.normal(size=(moments, count, 3)) * 0.2,
        scales=scales,
    )


WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
TYPES = {5126: "<f4", 5125: "<u4", 5123: "<u2", 5121: "<u1"}


def read(document, binary, number):
    """An accessor's values, one row an element, as the specification says."""
    accessor = document["accessors"][number]
    width, kind = WIDTHS[accessor["type"]], np.dtype(TYPES[accessor["componentType"]])
    if "bufferView" not in accessor:
        values = np.zeros((accessor["count"], width), kind)
    else:
        view = document["bufferViews"][accessor["bufferView"]]
        assert "byteStride" not in view and view["byteLength"] == accessor["count"] * width * kind.itemsize
        values = np.frombuffer(binary, kind, accessor["count"] * width, view["byteOffset"]).reshape(-1, width)
    if "min" in accessor:
        assert np.array_equal(values.min(0), np.array(accessor["min"], kind)) and np.array_equal(
            values.max(0), np.array(accessor["max"], kind)
        )
    return values


def played(document, binary, moment):
    """Places of the vertices at a key of the one animation, in the scene: node hierarchy, morph targets and skin by the specification."""
    nodes = [dict(node) for node in document["nodes"]]
    (body,) = document["meshes"]
    (primitive,) = body["primitives"]
    targets = primitive.get("targets", [])
    weights = np.zeros(len(targets))
    (animation,) = document["animations"]
    for channel in animation["channels"]:
        sampler = animation["samplers"][channel["sampler"]]
        times, values = read(document, binary, sampler["input"]), read(document, binary, sampler["output"])
        value = values.reshape(len(times), -1)[moment]
        if channel["target"]["path"] == "weights":
            weights = value
        else:
            nodes[channel["target"]["node"]][channel["target"]["path"]] = value
    local, parent = [], {}
    for number, node in enumerate(nodes):
        matrix = np.eye(4)
        turn = Rotation.from_quat(np.asarray(node.get("rotation", [0, 0, 0, 1]), np.float64)).as_matrix()
        matrix[:3, :3], matrix[:3, 3] = turn * node.get("scale", [1, 1, 1]), node.get("translation", [0, 0, 0])
        local.append(matrix)
        parent |= {child: number for child in node.get("children", [])}

    def whole(number):
        return whole(parent[number]) @ local[number] if number in parent else local[number]

    points = read(document, binary, primitive["attributes"]["POSITION"]).astype(np.float64)
    points = points + sum(weight * read(document, binary, target["POSITION"]) for weight, target in zip(weights, targets))
    points = np.concatenate([points, np.ones((len(points), 1))], 1)
    (holder,) = [number for number, node in enumerate(nodes) if "mesh" in node]
    if "skin" not in nodes[holder]:
        return (points @ whole(holder).T)[:, :3]
    skin = document["skins"][nodes[holder]["skin"]]
    inverse = read(document, binary, skin["inverseBindMatrices"]).reshape(-1, 4, 4).transpose(0, 2, 1)
    joints = np.stack([whole(number) for number in skin["joints"]]) @ inverse
    influence, share = (read(document, binary, primitive["attributes"][name]) for name in ("JOINTS_0", "WEIGHTS_0"))
    return np.einsum("nk,nkij,nj->ni", share.astype(np.float64), joints[influence], points)[:, :3]


def in_the_scene(vertices):
    world = FRAME.to_world(np.asarray(vertices, np.float64))
    return np.stack([world[:, 0], world[:, 2], -world[:, 1]], 1)


def test_morph_targets_are_the_moments(tmp_path):
    mesh = moving()
    glb.save_shape_keys(tmp_path / "shape_keys.glb", mesh, FRAME, "box")
    document, binary = contents(tmp_path / "shape_keys.glb")
    for moment, vertices in enumerate(mesh.vertices):
        assert np.allclose(played(document, binary, moment), in_the_scene(vertices), atol=2e-5)
    (body,), (animation,) = document["meshes"], document["animations"]
    assert body["extras"]["targetNames"] == ["frame 10", "frame 12", "frame 14", "frame 16", "frame 18"]
    assert len(body["weights"]) == len(body["primitives"][0]["targets"]) == 5
    (sampler,) = animation["samplers"]
    assert sampler["interpolation"] == "LINEAR" and np.allclose(read(document, binary, sampler["input"])[:, 0], np.arange(5) / 12)
    assert np.array_equal(read(document, binary, sampler["output"]).reshape(5, 5), np.eye(5))
    assert animation["extras"] == {"fps": 24.0, "frames": [10, 12, 14, 16, 18]}
    y_up = np.stack([mesh.normals[..., 0], mesh.normals[..., 2], -mesh.normals[..., 1]], -1)
    rest = read(document, binary, body["primitives"][0]["attributes"]["NORMAL"])
    for target, normals in zip(body["primitives"][0]["targets"], y_up):
        assert np.allclose(rest + read(document, binary, target["NORMAL"]), normals, atol=1e-6)


def test_a_moment_at_rest_takes_no_room(tmp_path):
    glb.save_shape_keys(tmp_path / "shape_keys.glb", moving(), FRAME, "box")
    document, _ = contents(tmp_path / "shape_keys.glb")
    first, second = document["meshes"][0]["primitives"][0]["targets"][:2]
    assert all("bufferView" not in document["accessors"][number] for number in first.values())
    assert all("bufferView" in document["accessors"][number] for number in second.values())


def test_the_skin_moves_as_the_rig_says_though_parents_scale(tmp_path):
    mesh = moving()
    bones = chain(mesh)
    glb.save_armature(tmp_path / "armature.glb", mesh, bones, FRAME, "box")
    document, binary = contents(tmp_path / "armature.glb")
    for moment in range(5):
        expected = in_the_scene(rig.posed(bones, mesh.mesh.vertices, moment))
        assert np.allclose(played(document, binary, moment), expected, atol=5e-5)
    still = {**document, "animations": [{"channels": [], "samplers": []}]}
    assert np.allclose(played(still, binary, 0), in_the_scene(mesh.mesh.vertices), atol=2e-5)  # the nodes' own transforms are the rest pose


def test_the_skin_keeps_the_specification_s_rules(tmp_path):
    mesh = moving()
    bones = chain(mesh)
    glb.save_armature(tmp_path / "armature.glb", mesh, bones, FRAME, "box")
    document, binary = contents(tmp_path / "armature.glb")
    nodes, (skin,) = document["nodes"], document["skins"]
    assert document["scenes"] == [{"nodes": [0, 1]}] and set(nodes[1]) == {"name", "mesh", "skin"}  # a skinned mesh's place is its joints'
    assert len({node["name"] for node in nodes}) == len(nodes) == 2 + 4 + 3  # of the four bones, three scale
    seen = [child for node in nodes for child in node.get("children", [])]
    assert sorted(seen) == skin["joints"] == list(range(2, 9))  # each has one parent
    for number, node in enumerate(nodes[2:6]):
        assert "scale" not in node and node["extras"]["length"] == pytest.approx(
            np.linalg.norm(bones.tails[number] - bones.heads[number]) / FRAME.scale
        )
    for node, bone in zip(nodes[6:], (1, 2, 3)):
        assert "children" not in node and node["extras"] == {"scales": bone} and nodes.index(node) in nodes[2 + bone]["children"]
    attributes = document["meshes"][0]["primitives"][0]["attributes"]
    influence, share = read(document, binary, attributes["JOINTS_0"]), read(document, binary, attributes["WEIGHTS_0"])
    assert influence.dtype == np.uint8 and np.allclose(share.sum(1), 1, atol=1e-6) and (influence[share == 0] == 0).all()
    for joints, weights in zip(influence, share):
        assert len(set(joints[weights > 0])) == (weights > 0).sum()
    inverse = read(document, binary, skin["inverseBindMatrices"])
    assert np.array_equal(inverse[:, [3, 7, 11, 15]], np.tile([0, 0, 0, 1], (7, 1)))
    (animation,) = document["animations"]
    times = {sampler["input"] for sampler in animation["samplers"]}
    assert len(times) == 1 and "min" in document["accessors"][times.pop()]
    targets = [(channel["target"]["node"], channel["target"]["path"]) for channel in animation["channels"]]
    assert len(set(targets)) == len(targets) == 2 * 4 + 3
    for (_, path), sampler in zip(targets, animation["samplers"]):
        assert "target" not in document["bufferViews"][document["accessors"][sampler["output"]]["bufferView"]]
        if path == "rotation":
            turns = read(document, binary, sampler["output"])
            assert np.allclose(np.linalg.norm(turns, axis=1), 1, atol=1e-6) and ((turns[1:] * turns[:-1]).sum(1) >= 0).all()


def test_many_joints_have_wider_numbers(tmp_path):
    mesh = moving()
    glb.save_armature(tmp_path / "armature.glb", mesh, chain(mesh, 200), FRAME, "box")  # 399 joints
    document, binary = contents(tmp_path / "armature.glb")
    influence = read(document, binary, document["meshes"][0]["primitives"][0]["attributes"]["JOINTS_0"])
    assert influence.dtype == np.uint16 and influence.max() > 255
    assert np.allclose(played(document, binary, 3), in_the_scene(rig.posed(chain(mesh, 200), mesh.mesh.vertices, 3)), atol=5e-4)


def test_a_reader_without_motion_finds_the_same_mesh_in_all_three(tmp_path):
    mesh = moving()
    glb.save(tmp_path / "mesh.glb", mesh.mesh, FRAME, "box")
    glb.save_shape_keys(tmp_path / "shape_keys.glb", mesh, FRAME, "box")
    glb.save_armature(tmp_path / "armature.glb", mesh, chain(mesh), FRAME, "box")
    still, keys, skinned = (
        next(iter(trimesh.load(tmp_path / name, process=False).geometry.values()))
        for name in ("mesh.glb", "shape_keys.glb", "armature.glb")
    )
    for other in (keys, skinned):
        assert np.array_equal(other.vertices, still.vertices) and np.array_equal(other.faces, still.faces)
        assert np.array_equal(other.visual.uv, still.visual.uv)
        assert np.array_equal(np.asarray(other.visual.material.normalTexture), np.asarray(still.visual.material.normalTexture))


def test_the_khronos_validator_finds_no_fault_in_any_file(tmp_path):
    mesh = moving()
    glb.save(tmp_path / "plain.glb", textured(), FRAME, "bôx")
    glb.save(tmp_path / "mesh.glb", full(), FRAME, "box")
    glb.save_shape_keys(tmp_path / "shape_keys.glb", mesh, FRAME, "box")
    glb.save_armature(tmp_path / "armature.glb", mesh, chain(mesh), FRAME, "box")
    assert gltf.faults(*sorted(tmp_path.glob("*.glb"))) == []
