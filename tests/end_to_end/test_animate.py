"""From an object that moves to a keyframed asset that moves the same way, on the timeline, in each of the three forms."""

import json

import bpy
import numpy as np
import pytest
from bl_ext.kiln_test.kiln import api, session
from bl_ext.kiln_test.kiln.protocol.errors import KilnError
from mathutils import Matrix

SMALL = {
    "capture_views": 6, "capture_cameras": 12, "capture_size": 96, "capture_holdout": 1, "fit_splats": 1200, "fit_iterations": 120,
    "fit_nodes": 40, "surface_grid": 56, "surface_faces": 1200, "texture_size": 128, "armature_bones": 6,
}  # fmt: skip
FRAMES = (3, 6)


@pytest.fixture(autouse=True)
def backend(home):
    yield


def subject():
    """A capsule of two colours whose upper half leans over, by a shape key, and which moves along."""
    bpy.ops.mesh.primitive_uv_sphere_add(segments=24, ring_count=24, radius=0.3)
    thing = bpy.context.object
    thing.name = "Capsule"
    places = np.array([vertex.co[:] for vertex in thing.data.vertices])
    places[:, 2] += 0.5 * np.sign(places[:, 2])
    thing.shape_key_add(name="Basis")
    lean = thing.shape_key_add(name="Lean")
    angle = 0.9 * np.clip(places[:, 2] / 0.5, 0, 1) ** 2
    moved = places.copy()
    moved[:, 0] = places[:, 0] * np.cos(angle) + places[:, 2] * np.sin(angle)
    moved[:, 2] = places[:, 2] * np.cos(angle) - places[:, 0] * np.sin(angle)
    thing.data.shape_keys.key_blocks["Basis"].data.foreach_set("co", places.ravel())
    lean.data.foreach_set("co", moved.ravel())
    for frame, value, place in ((FRAMES[0], 0.0, 0.0), (FRAMES[1], 1.0, 0.2)):
        lean.value = value
        lean.keyframe_insert("value", frame=frame)
        thing.location.y = place
        thing.keyframe_insert("location", frame=frame)
    material = bpy.data.materials.new("Paint")
    material.use_nodes = True
    nodes, links = material.node_tree.nodes, material.node_tree.links
    checks, place = nodes.new("ShaderNodeTexChecker"), nodes.new("ShaderNodeTexCoord")
    checks.inputs["Scale"].default_value = 6.0
    checks.inputs["Color1"].default_value, checks.inputs["Color2"].default_value = (0.8, 0.2, 0.1, 1), (0.1, 0.3, 0.8, 1)
    links.new(place.outputs["Generated"], checks.inputs["Vector"])
    links.new(checks.outputs["Color"], nodes["Principled BSDF"].inputs["Base Color"])
    thing.data.materials.append(material)
    scene = bpy.context.scene
    scene.frame_start, scene.frame_end = FRAMES
    scene.frame_set(5)
    return thing


def points(thing):
    """Evaluated vertices in the world."""
    evaluated = thing.evaluated_get(bpy.context.evaluated_depsgraph_get())
    matrix = evaluated.matrix_world
    return np.array([matrix @ vertex.co for vertex in evaluated.data.vertices])


def surface_distance(made, thing):
    """Mean distance of the made mesh's vertices from the source's surface at the current frame."""
    evaluated = thing.evaluated_get(bpy.context.evaluated_depsgraph_get())
    into = evaluated.matrix_world.inverted()
    return np.mean([(evaluated.closest_point_on_mesh(into @ Matrix.Translation(place).to_translation())[1] -
                     (into @ Matrix.Translation(place).to_translation())).length for place in points(made)])  # fmt: skip


def test_what_moves_comes_out_as_a_mesh_that_moves_the_same_way(tmp_path):
    thing = subject()
    made = api.animate("Capsule", save_to=tmp_path, **SMALL)
    scene = bpy.context.scene
    assert scene.frame_current == 5 and (scene.frame_start, scene.frame_end) == FRAMES
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert (tmp_path / "splats_0003.ply").is_file() and (tmp_path / "turntable_35.png").is_file()
    assert report["frames"] == [3, 4, 5, 6] and report["recipe"] == "animate"
    assert made.mesh_object.data.shape_keys.animation_data.action is not None
    for frame in range(FRAMES[0], FRAMES[1] + 1):
        scene.frame_set(frame)
        assert surface_distance(made.mesh_object, thing) < 0.02 * 1.6


def test_a_first_frame_that_is_given_counts_before_the_scene_s_range():
    subject()
    made = api.animate("Capsule", **{**SMALL, "capture_frame_start": 4, "capture_frame_end": 6, "capture_frame_step": 2})
    assert [key.name for key in made.mesh_object.data.shape_keys.key_blocks][1:] == ["frame 4", "frame 6"]


def test_the_same_result_as_armature_and_cache_without_computing_again():
    subject()
    before = set(session.current.jobs)
    first = api.animate("Capsule", **SMALL)
    (name,) = set(session.current.jobs) - before
    job = session.current.jobs[name]
    scene = bpy.context.scene
    frames = range(FRAMES[0], FRAMES[1] + 1)

    def followed(thing):
        found = []
        for frame in frames:
            scene.frame_set(frame)
            found.append(points(thing))
        return np.stack(found)

    keys = followed(first.mesh_object)
    known = set(bpy.data.objects)
    for way, within in (("CACHE", 1e-4), ("ARMATURE", 0.02)):
        assert bpy.ops.kiln.import_job(job=job.data["id"], motion=way) == {"FINISHED"}
        (again,) = [one for one in set(bpy.data.objects) - known if one.type == "MESH" and len(one.data.polygons)]
        known |= set(bpy.data.objects)
        assert np.linalg.norm(followed(again) - keys, axis=-1).mean() < within * 1.6
    assert set(session.current.jobs) - before == {name} and job.data["attempts"] == 1


def test_what_does_not_move_is_refused_before_anything_is_sent():
    bpy.ops.mesh.primitive_torus_add()
    bpy.context.scene.frame_start, bpy.context.scene.frame_end = 1, 3
    before = set(session.current.jobs)
    with pytest.raises(KilnError) as failure:
        api.animate(bpy.context.object.name, **SMALL)
    assert "Reconstruct" in failure.value.hint
    assert set(session.current.jobs) == before
