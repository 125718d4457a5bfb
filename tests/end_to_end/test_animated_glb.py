"""The backend's moving GLBs, opened by Blender's own importer: at every frame the vertices are where the backend says."""

import subprocess

import bpy
import numpy as np
import pytest

# A tube that bends at two places while its upper end grows, off the origin; its rig has scaling bones in a chain, as the solver may give.
WRITE = """
import sys
from pathlib import Path
import numpy as np
from scipy.spatial.transform import Rotation
from backend.mesh import glb, rig
from backend.mesh.bake import vertex_normals
from backend.mesh.mesh import AnimatedMesh, Mesh, Rig, TexturedMesh
from backend.views.views import Frame
out, moments = Path(sys.argv[1]), 9
turn, z = np.meshgrid(np.linspace(0, 2 * np.pi, 12, endpoint=False), np.linspace(0, 1.5, 16))
rest = np.stack([0.2 * np.cos(turn), 0.2 * np.sin(turn), z], -1).reshape(-1, 3).astype(np.float32)
corner = np.arange(15 * 12).reshape(15, 12)
right = np.roll(corner, -1, 1)
faces = np.concatenate([np.stack([corner, right, right + 12], -1), np.stack([corner, right + 12, corner + 12], -1)])
faces = faces.reshape(-1, 3).astype(np.int32)
quaternions = lambda turns: np.roll(Rotation.concatenate(turns).as_quat(), 1, -1)
tilt = Rotation.from_rotvec([np.pi / 2, 0, 0])  # the bones' own y axis goes up
heads = np.array([[0, 0, 0.1], [0.02, 0, 0.5], [0, 0.01, 1.0]])
axes = [Rotation.from_rotvec([0, 0, 0.7 * bone]) * tilt for bone in range(3)]
along = np.stack([turn.as_matrix()[:, 1] for turn in axes])
share = np.clip(rest[:, 2:] / 0.5 - 0.3, 0, 2)
weights = np.clip(1 - np.abs(share - np.arange(3)), 0, 1)
order = np.argsort(-weights, 1)
weights = np.concatenate([np.take_along_axis(weights, order, 1), np.zeros((len(rest), 1))], 1)
joints = np.concatenate([order, order[:, :1]], 1)
time = np.linspace(0, 1, moments)
turns = np.stack([quaternions([Rotation.from_rotvec([bone * 0.9 * t, 0.5 * t * bone, 0.3 * t]) for bone in range(3)]) for t in time])
moved = time[:, None, None] * np.array([[0.1, 0, 0], [0.1, -0.1, 0], [0.2, -0.4, -0.2]])
scales = 1 + time[:, None, None] * np.array([[0, 0, 0], [0.4, 0.8, -0.3], [-0.4, 1.0, 0.5]])
bones = Rig(heads, heads + 0.3 * along, quaternions(axes), np.array([-1, 0, 1]), joints, weights, turns, moved, scales)
vertices = np.stack([rig.posed(bones, rest, moment) for moment in range(moments)]).astype(np.float32)
normals = np.stack([vertex_normals(Mesh(there, faces)) for there in vertices]).astype(np.float32)
uv = np.stack([turn, z], -1).reshape(-1, 2).astype(np.float32) / 7
still = TexturedMesh(rest, vertex_normals(Mesh(rest, faces)).astype(np.float32), uv, faces, np.full((8, 8, 3), 120, np.uint8))
mesh, frame = AnimatedMesh(still, vertices, normals, np.arange(moments) + 5.0, 24.0), Frame(np.array([20.0, -3.0, 1.0]), 0.4)
glb.save_shape_keys(out / "shape_keys.glb", mesh, frame, "tube")
glb.save_armature(out / "armature.glb", mesh, bones, frame, "tube")
np.save(out / "world.npy", np.stack([frame.to_world(there.astype(np.float64)) for there in vertices]))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory, home, backend_python):
    folder = tmp_path_factory.mktemp("moving")
    subprocess.run([backend_python, "-c", WRITE, folder], check=True, timeout=600)
    return folder


def world_vertices(thing):
    mesh = thing.evaluated_get(bpy.context.evaluated_depsgraph_get()).to_mesh()
    corners = np.empty(3 * len(mesh.vertices), np.float32)
    mesh.vertices.foreach_get("co", corners)
    matrix = np.array(thing.matrix_world)
    return corners.reshape(-1, 3) @ matrix[:3, :3].T + matrix[:3, 3]


@pytest.mark.parametrize("name", ["shape_keys.glb", "armature.glb"])
def test_blender_plays_the_file_as_it_was_made(written, name):
    bpy.context.scene.render.fps = 24
    bpy.ops.import_scene.gltf(filepath=str(written / name))
    expected = np.load(written / "world.npy")
    (thing,) = [thing for thing in bpy.data.objects if thing.type == "MESH" and len(thing.data.vertices) == expected.shape[1]]
    size = np.linalg.norm(np.ptp(expected.reshape(-1, 3), axis=0))
    assert np.abs(expected - expected[0]).max() > 0.2 * size
    for moment, there in enumerate(expected):  # Blender's importer puts second 0 at frame 0
        bpy.context.scene.frame_set(moment)
        assert np.abs(world_vertices(thing) - there).max() < 1e-4 * size, moment


def test_targets_and_bones_have_names_and_bones_their_direction(written):
    bpy.ops.import_scene.gltf(filepath=str(written / "shape_keys.glb"))
    (mesh,) = [mesh for mesh in bpy.data.meshes if mesh.shape_keys]
    assert [key.name for key in mesh.shape_keys.key_blocks][1:] == [f"frame {number}" for number in range(5, 14)]
    bpy.ops.import_scene.gltf(filepath=str(written / "armature.glb"))
    (armature,) = bpy.data.armatures
    assert {bone.name for bone in armature.bones} == {"Bone 001", "Bone 002", "Bone 003", "Bone 002 scale", "Bone 003 scale"}
    assert armature.bones["Bone 002"].parent.name == "Bone 001" and armature.bones["Bone 002 scale"].parent.name == "Bone 002"
    for name in ("Bone 001", "Bone 002", "Bone 003"):
        bone = armature.bones[name]
        assert (bone.tail_local - bone.head_local).normalized().z > 0.99  # up in the scene, whatever the file's axes
