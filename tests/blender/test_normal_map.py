"""A baked GLB as Blender's own importer, tangents and Cycles see it. The bake itself runs in the backend's Python."""

import os
import subprocess
from pathlib import Path

import bpy
import numpy as np
import pytest
from bl_ext.kiln_test.kiln import exr
from mathutils import Matrix

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("KILN_BACKEND_PYTHON")
SIZE = 96

BAKE = """
import sys
from pathlib import Path
import numpy as np, trimesh
from backend.mesh import glb
from backend.mesh.bake import bake
from backend.mesh.mesh import Mesh
from backend.views.cameras import OPENCV_FROM_OPENGL
from protocol import recipes
from tests.backend.mesh.scenes import FOV, bumps, capture, glow, torus, waves, with_passes
folder = Path(sys.argv[1])
views = with_passes(capture(torus(0.6, 0.22), waves, size=96), emission=glow)
ring = trimesh.creation.torus(0.6, 0.22, 64, 32)
mesh = bake(Mesh(ring.vertices.astype(np.float32), ring.faces.astype(np.int32)), None, views, recipes.Texture(size=512))
glb.save(folder / "mesh.glb", mesh, views.frame, "ring")
np.savez(
    folder / "truth.npz", vertices=mesh.vertices, faces=mesh.faces, tangents=mesh.tangents, uv=mesh.uv,
    normals=views.normals[views.holdout], depth=views.depth[views.holdout], strength=mesh.emission_strength,
    poses=[c.world_from_camera @ OPENCV_FROM_OPENGL for c, out in zip(views.cameras, views.holdout) if out], fov=FOV,
)
"""


@pytest.fixture(scope="module")
def baked(tmp_path_factory):
    """A folder with mesh.glb and what it should look like."""
    if not PYTHON:
        pytest.skip("needs the backend's Python in KILN_BACKEND_PYTHON")
    folder = tmp_path_factory.mktemp("baked")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([PYTHON, "-c", BAKE, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


def imported(folder):
    bpy.ops.import_scene.gltf(filepath=str(folder / "mesh.glb"))
    (thing,) = [thing for thing in bpy.context.scene.objects if thing.type == "MESH"]
    return thing, np.load(folder / "truth.npz")


def test_tangents_are_blender_s_own(baked):
    thing, truth = imported(baked)
    mesh = thing.data
    mesh.calc_tangents()
    corner = np.empty(len(mesh.loops), np.int32)
    mesh.loops.foreach_get("vertex_index", corner)
    tangent, sign = np.empty((len(corner), 3), np.float32), np.empty(len(corner), np.float32)
    mesh.loops.foreach_get("tangent", tangent.ravel())
    mesh.loops.foreach_get("bitangent_sign", sign)
    uv = np.empty((len(corner), 2), np.float32)
    mesh.uv_layers.active.data.foreach_get("uv", uv.ravel())
    place = np.empty((len(mesh.vertices), 3), np.float32)
    mesh.vertices.foreach_get("co", place.ravel())

    def key(points, places):  # the importer may renumber vertices
        return [tuple(row) for row in np.round(np.concatenate([points, places], 1), 4)]

    expected = dict(zip(key(truth["vertices"], truth["uv"]), truth["tangents"], strict=True))
    matched = np.array([expected.get(name, [np.nan] * 4) for name in key(place[corner], uv)])
    there = np.isfinite(matched[:, 0])
    assert there.mean() > 0.99
    assert (matched[there, 3] == sign[there]).all()
    cosine = (matched[there, :3] * tangent[there]).sum(1)
    assert cosine.min() > 0.999 and np.median(cosine) > 0.999999


def test_cycles_shows_the_source_s_normals(baked, tmp_path):
    """The normal pass of the imported mesh against the source's exact normals, from cameras that the bake did not see."""
    thing, truth = imported(baked)
    scene = bpy.context.scene
    data = bpy.data.cameras.new("camera")
    camera = bpy.data.objects.new("camera", data)
    scene.collection.objects.link(camera)
    scene.camera = camera
    data.angle = float(truth["fov"])
    scene.render.engine = "CYCLES"
    scene.cycles.samples, scene.cycles.max_bounces, scene.cycles.use_denoising = 1, 0, False
    scene.cycles.pixel_filter_type, scene.cycles.filter_width = "BOX", 0.01  # rays through the pixels' centres
    scene.render.resolution_x = scene.render.resolution_y = SIZE
    scene.render.resolution_percentage = 100
    bpy.context.view_layer.use_pass_normal = True
    settings = scene.render.image_settings
    if bpy.app.version >= (5, 0, 0):
        settings.media_type = "MULTI_LAYER_IMAGE"
    settings.file_format, settings.color_depth, settings.exr_codec = "OPEN_EXR_MULTILAYER", "32", "ZIP"
    if hasattr(settings, "use_exr_interleave"):
        settings.use_exr_interleave = True

    def errors():
        found = []
        for pose, normals, depth in zip(truth["poses"][:2], truth["normals"], truth["depth"], strict=False):
            camera.matrix_world = Matrix(pose.tolist())
            scene.render.filepath = str(tmp_path / "normal.exr")
            bpy.ops.render.render(write_still=True)
            channels = exr.read(tmp_path / "normal.exr")
            seen = np.stack([next(value for name, value in channels.items() if name.endswith(f"Normal.{axis}")) for axis in "XYZ"], -1)
            both = (np.abs(seen).sum(-1) > 0) & (depth > 0)
            assert both.sum() > 500
            cosine = (seen * normals).sum(-1)[both] / np.linalg.norm(seen[both], axis=-1)
            found.append(np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean())
        return np.mean(found)

    assert errors() < 8
    tree = thing.active_material.node_tree
    for link in [link for link in tree.links if link.to_socket.name == "Normal" and link.to_node.type == "BSDF_PRINCIPLED"]:
        tree.links.remove(link)
    assert errors() > 15  # without the map, the mesh is smooth


def test_the_importer_wires_every_map(baked):
    thing, truth = imported(baked)
    (shader,) = [node for node in thing.active_material.node_tree.nodes if node.type == "BSDF_PRINCIPLED"]
    for name in ("Base Color", "Roughness", "Metallic", "Normal", "Emission Color"):
        assert shader.inputs[name].is_linked, name
    assert shader.inputs["Emission Strength"].default_value == pytest.approx(float(truth["strength"]), rel=1e-3)
