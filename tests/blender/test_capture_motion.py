"""Capture over time against the geometry that Blender itself evaluates frame by frame, still captures, and the user's file before and
after."""

import dataclasses
import json
import math
import types

import bpy
import numpy as np
import pytest
from bl_ext.kiln_test.kiln import capture, capture_motion, properties, session
from bl_ext.kiln_test.kiln.protocol import messages, recipes
from bl_ext.kiln_test.kiln.protocol.errors import KilnError
from PIL import Image

from tests.blender.test_capture import add, everything, furnished, plain, rays

QUICK = recipes.CaptureMotion(
    scene_frames=False, frame_start=1, frame_end=6, frame_step=2, views=4, cameras=8, size=32, holdout=1, samples=1
)


def taken(folder, p=QUICK, thing=None):
    """A finished capture, its table, inputs and source."""
    work = capture_motion.MovingCapture(capture.subject(bpy.context, objects=thing and [thing]), p, folder)
    while work.step():
        pass
    inputs, source = work.finish()
    return work, json.loads((folder / "transforms.json").read_text()), inputs, source


def moving_cube(size=1):
    """A cube that goes 3 m along x in 5 frames."""
    thing = add("cube", size=size)
    thing.keyframe_insert("location", frame=1)
    thing.location.x = 3
    thing.keyframe_insert("location", frame=6)
    bpy.context.scene.frame_set(1)
    return thing


def bounds(folder, table, frame):
    """The box of all that depth shows at a frame, in metres."""
    points = []
    for entry in table["frames"]:
        if entry["frame"] == frame:
            depth = np.load(folder / entry["geometry_file_path"])["depth"][entry["layer"]]
            eye, axis, directions = rays(table, entry)
            points.append((eye + directions * (depth / (directions @ axis))[..., None])[depth > 0])
    points = np.concatenate(points)
    return points.min(0), points.max(0)


# Cameras and times


@pytest.mark.parametrize(("cameras", "views"), [(24, 8), (24, 6), (36, 12), (8, 8), (4, 8)])
def test_every_moment_is_seen_from_all_sides_and_all_cameras_have_their_turn(cameras, views):
    found = capture_motion.views_of(recipes.CaptureMotion(cameras=cameras, views=views, holdout=2), 12, seed=0)
    random = np.random.default_rng(1).normal(size=(5000, 3))
    random /= np.linalg.norm(random, axis=1, keepdims=True)

    def gap(directions):
        return np.arccos((random @ directions.T).max(1).min())

    for moment in range(12):
        fitted = np.array([view.direction for view in found if view.moment == moment and not view.held_out])
        held_out = np.array([view.direction for view in found if view.moment == moment and view.held_out])
        assert fitted.shape == (views, 3) and held_out.shape == (2, 3)
        assert gap(fitted) < 1.05 * gap(capture.directions(views))
        assert np.degrees(np.arccos((held_out @ fitted.T).max())) > 8
    every = np.unique(np.array([view.direction for view in found if not view.held_out]).round(9), axis=0)
    assert len(every) == max(cameras, views)
    if cameras > views:
        assert gap(every) < 0.9 * gap(capture.directions(views))  # what one moment does not see, another does


@pytest.mark.oldest
def test_files_say_which_frame_each_view_shows(tmp_path):
    moving_cube().data.materials.append(plain((0.5, 0.1, 0.1)))
    scene = bpy.context.scene
    scene.render.fps, scene.render.fps_base = 30, 1.25
    work, table, inputs, source = taken(tmp_path)
    assert table["fps"] == 24.0
    assert [entry["frame"] for entry in table["frames"]] == [1] * 5 + [3] * 5 + [5] * 5
    assert [entry["split"] for entry in table["frames"]] == (["train"] * 4 + ["holdout"]) * 3
    assert {path.name for path in tmp_path.iterdir()} == set(inputs)
    assert len(inputs) == 1 + 15 + 3 and "color_00003_004.png" in inputs and "passes_00005.npz" in inputs
    assert {name: source[name] for name in ("frame_start", "frame_end", "frame_step", "fps")} == {
        "frame_start": 1, "frame_end": 5, "frame_step": 2, "fps": 24.0,
    }  # fmt: skip
    assert source["location"] == pytest.approx([0, 0, 0]) and source["dimensions"] == pytest.approx([1, 1, 1])  # at the first frame
    assert json.loads(json.dumps(source)) == source
    assert work.steps == 3 + 2 * 15  # frames looked at, then colour and passes of each view


def test_a_moment_is_what_a_still_capture_at_that_frame_shows(tmp_path):
    """From the same cameras, bit by bit: colour, depth, normals, material and the glow that only one frame has."""
    thing = add("monkey")
    paint = plain((0.2, 0.5, 0.1))
    thing.data.materials.append(paint)
    thing.keyframe_insert("rotation_euler", frame=1)
    thing.rotation_euler.z = 1
    thing.keyframe_insert("rotation_euler", frame=5)
    shader = paint.node_tree.nodes["Principled BSDF"]
    shader.inputs["Emission Color"].default_value = (1, 0.5, 0, 1)
    strength = shader.inputs["Emission Strength"]
    for frame, value in ((1, 0.0), (4, 0.0), (5, 2.0)):
        strength.default_value = value
        strength.keyframe_insert("default_value", frame=frame)
    scene = bpy.context.scene
    scene.frame_set(1)
    p = dataclasses.replace(QUICK, frame_step=4, samples=4)
    work, table, _, _ = taken(tmp_path / "moving", p)
    for number, frame in enumerate((1, 5)):
        scene.frame_set(frame)
        views = [view._replace(moment=0) for view in work._views if view.moment == number]
        cameras = types.SimpleNamespace(_centre=work._centre, _radius=work._radius, _views=views)
        still = capture.Capture(
            capture.subject(bpy.context), recipes.Capture(views=4, holdout=1, size=32, samples=4), tmp_path / f"still {frame}", like=cameras
        )
        while still.step():
            pass
        still.finish()
        entries = [entry for entry in table["frames"] if entry["frame"] == frame]
        for one, entry in enumerate(entries):
            picture = np.asarray(Image.open(tmp_path / "moving" / entry["file_path"]))
            assert np.array_equal(picture, np.asarray(Image.open(still.folder / f"color_{one:03}.png")))
            passes = np.load(tmp_path / "moving" / entry["geometry_file_path"])
            for kind in ("geometry", "material"):
                expected = np.load(still.folder / f"{kind}_{one:03}.npz")
                for name in expected.files:
                    assert np.array_equal(passes[name][one], expected[name]), (frame, one, name)
        assert ("emission" in np.load(tmp_path / "moving" / entries[0]["material_file_path"]).files) == (frame == 5)


# Everything that moves


def armature():
    bones = bpy.data.objects.new("Bones", bpy.data.armatures.new("Bones"))
    bpy.context.scene.collection.objects.link(bones)
    bpy.context.view_layer.objects.active = bones
    bpy.ops.object.mode_set(mode="EDIT")
    bone = bones.data.edit_bones.new("bone")
    bone.head, bone.tail = (0, 0, 0), (0, 0, 1)
    bpy.ops.object.mode_set(mode="OBJECT")
    thing = add("cube", size=1, location=(0, 0, 1))
    thing.vertex_groups.new(name="bone").add(range(8), 1.0, "REPLACE")
    thing.modifiers.new("bones", "ARMATURE").object = bones
    pose = bones.pose.bones["bone"]
    pose.rotation_mode = "XYZ"
    pose.keyframe_insert("rotation_euler", frame=1)
    pose.rotation_euler.x = 1.5
    pose.keyframe_insert("rotation_euler", frame=6)
    return thing


def shape_keys():
    thing = add("cube", size=1)
    thing.shape_key_add(name="Basis")
    key = thing.shape_key_add(name="tall")
    for point in key.data:
        point.co.z *= 3
    for frame, value in ((1, 0.0), (6, 1.0)):
        key.value = value
        key.keyframe_insert("value", frame=frame)
    return thing


def parented():
    parent = bpy.data.objects.new("parent", None)
    bpy.context.scene.collection.objects.link(parent)
    thing = add("cube", size=1, location=(1, 0, 0))
    thing.parent = parent
    parent.keyframe_insert("rotation_euler", frame=1)
    parent.rotation_euler.z = 1.2
    parent.keyframe_insert("rotation_euler", frame=6)
    return thing


def cloth():
    thing = add("grid", size=2, x_subdivisions=6, y_subdivisions=6)
    thing.modifiers.new("cloth", "CLOTH")
    return thing


def soft_body():
    thing = add("cube", size=1)
    thing.modifiers.new("soft", "SOFT_BODY").settings.use_goal = False
    return thing


def rigid_body():
    thing = add("cube", size=1, rotation=(0.3, 0, 0))
    bpy.ops.rigidbody.world_add()
    bpy.ops.rigidbody.object_add()
    return thing


def child_of_a_rigid_body():
    falling = rigid_body()
    thing = add("cube", size=1, location=(1, 0, 0))
    thing.parent = falling
    return thing


def nodes(build):
    def make():
        thing = add("cube", size=1)
        group = bpy.data.node_groups.new("nodes", "GeometryNodeTree")
        for way in ("INPUT", "OUTPUT"):
            group.interface.new_socket("Geometry", in_out=way, socket_type="NodeSocketGeometry")
        build(group, group.nodes.new("NodeGroupInput").outputs[0], group.nodes.new("NodeGroupOutput").inputs[0])
        thing.modifiers.new("nodes", "NODES").node_group = group
        return thing

    make.__name__ = build.__name__
    return make


@nodes
def scene_time(group, given, result):
    time, move, up = (group.nodes.new(kind) for kind in ("GeometryNodeInputSceneTime", "GeometryNodeSetPosition", "ShaderNodeCombineXYZ"))
    group.links.new(time.outputs["Seconds"], up.inputs["Z"])
    group.links.new(up.outputs[0], move.inputs["Offset"])
    group.links.new(given, move.inputs["Geometry"])
    group.links.new(move.outputs[0], result)


@nodes
def simulation_zone(group, given, result):
    begin, end, move = (
        group.nodes.new(kind) for kind in ("GeometryNodeSimulationInput", "GeometryNodeSimulationOutput", "GeometryNodeSetPosition")
    )
    begin.pair_with_output(end)
    move.inputs["Offset"].default_value = (0.1, 0, 0)
    group.links.new(given, begin.inputs["Geometry"])
    group.links.new(begin.outputs["Geometry"], move.inputs["Geometry"])
    group.links.new(move.outputs[0], end.inputs["Geometry"])
    group.links.new(end.outputs["Geometry"], result)


def evaluated_bounds(thing):
    found = thing.evaluated_get(bpy.context.evaluated_depsgraph_get())
    mesh = found.to_mesh()
    points = np.array([found.matrix_world @ vertex.co for vertex in mesh.vertices])
    found.to_mesh_clear()
    return points.min(0), points.max(0)


KINDS = [armature, shape_keys, parented, cloth, soft_body, rigid_body, child_of_a_rigid_body, scene_time, simulation_zone]


@pytest.mark.oldest
@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("at", [1, 40])
def test_each_frame_shows_what_playing_the_timeline_shows(tmp_path, make, at, monkeypatch):
    """At every third frame, in the smallest of steps, after each of which the user's scene is back where it was."""
    p = dataclasses.replace(QUICK, frame_end=13, frame_step=3)
    scene = bpy.context.scene
    thing = make()
    truth = {}
    for frame in range(1, 14):
        scene.frame_set(frame)
        truth[frame] = evaluated_bounds(thing)
    bpy.ops.wm.read_homefile(use_factory_startup=True, use_empty=True)  # nothing in any cache
    scene = bpy.context.scene
    scene.frame_set(at)
    thing = make()
    scene.frame_set(at)
    monkeypatch.setattr(capture_motion, "SLICE", 0.0)
    work = capture_motion.MovingCapture(capture.subject(bpy.context, objects=[thing]), p, tmp_path)
    while work.step():
        assert scene.frame_current_final == at
    work.finish()
    table = json.loads((tmp_path / "transforms.json").read_text())
    moved = 0
    for frame, moment in zip(range(1, 14, 3), work._moments, strict=True):
        assert np.allclose((moment.lowest, moment.highest), truth[frame], atol=1e-4), frame
        assert np.allclose(bounds(tmp_path, table, frame), truth[frame], atol=0.15), frame
        moved = max(moved, np.abs(moment.lowest - work._moments[0].lowest).max())
    assert moved > 0.2


def test_the_scenes_own_range_is_taken_unless_another_is_set(tmp_path):
    moving_cube()
    scene = bpy.context.scene
    scene.frame_start, scene.frame_end = 2, 4
    subject = capture.subject(bpy.context)
    assert list(capture_motion.MovingCapture(subject, dataclasses.replace(QUICK, scene_frames=True), tmp_path).frames) == [2, 4]
    assert list(capture_motion.MovingCapture(subject, QUICK, tmp_path).frames) == [1, 3, 5]


def test_one_sphere_holds_the_subject_at_all_frames(tmp_path):
    """It fills the pictures as a whole, and touches their edges in none."""
    moving_cube()
    work, table, _, _ = taken(tmp_path, dataclasses.replace(QUICK, frame_step=1, size=64))
    assert work._radius == pytest.approx(math.sqrt(2**2 + 0.5**2 + 0.5**2), rel=0.01) and work._centre == pytest.approx(
        [1.5, 0, 0], abs=0.03
    )
    for entry in table["frames"]:
        alpha = np.asarray(Image.open(tmp_path / entry["file_path"]))[..., 3]
        assert alpha.any() and not np.concatenate([alpha[[0, -1]].ravel(), alpha[:, [0, -1]].ravel()]).any()


# What makes no motion


def refusal(tmp_path, p=QUICK, thing=None):
    before = bpy.context.scene.frame_current_final
    with pytest.raises(KilnError) as error:
        taken(tmp_path, p, thing)
    assert bpy.context.scene.frame_current_final == before and len(bpy.data.scenes) == 1
    assert error.value.hint
    return error.value


@pytest.mark.oldest
def test_what_stands_still_is_for_reconstruct(tmp_path):
    add("monkey")
    said = refusal(tmp_path)
    assert (said.code, said.message) == ("bad-subject", "Suzanne does not move from frame 1 to 5.") and "Reconstruct" in said.hint
    moving_cube()
    assert refusal(tmp_path, thing=bpy.data.objects["Suzanne"]).message == said.message  # another object moves


def test_a_part_that_moves_within_an_unchanged_box_is_motion(tmp_path):
    """One vertex of thousands, which is no extreme in any direction."""
    thing = add("uv_sphere", segments=64, ring_count=32)
    thing.shape_key_add(name="Basis")
    key = thing.shape_key_add(name="dent")
    key.data[500].co *= 0.8
    for frame, value in ((1, 0.0), (5, 1.0)):
        key.value = value
        key.keyframe_insert("value", frame=frame)
    assert len(taken(tmp_path)[1]["frames"]) == 15


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"frame_end": 1}, "Frame 1 is the only one to capture"),
        ({"frame_step": 100}, "Frame 1 is the only one to capture"),
        ({"frame_end": -3}, "The frames end at -3, before they begin at 1"),
        ({"frame_end": 5000, "frame_step": 1, "views": 8}, "5000 frames of 9 views of 32 pixels are more than a job can hold"),
        ({"frame_end": 100, "frame_step": 1, "size": 4096}, "100 frames of 5 views of 4096 pixels are more than a job can hold"),
    ],
)
def test_frames_that_make_no_motion_or_too_much_are_refused_before_anything_is_rendered(tmp_path, changes, sentence):
    moving_cube()
    said = refusal(tmp_path / "views", dataclasses.replace(QUICK, **changes))
    assert said.code == "bad-parameter" and said.message.startswith(sentence)
    assert not (tmp_path / "views").exists()


def test_the_longest_capture_fits_into_one_request(tmp_path):
    """500 frames of 10 views, far down the timeline."""
    moving_cube()
    p = recipes.CaptureMotion(scene_frames=False, frame_start=999_501, frame_end=1_000_000)
    work = capture_motion.MovingCapture(capture.subject(bpy.context), p, tmp_path)
    assert len(work._views) == 5000
    names = {"transforms.json"}
    for number in range(5000):
        names |= {work._file_name("color", number), work._file_name("passes", number)}
    values = recipes.values(recipes.Animate(capture=p))
    header = {"type": "submit", "id": "i" * 100, "recipe": "animate", "values": values, "inputs": dict.fromkeys(names, "0" * 64)}
    assert len(names) <= messages.INPUTS and len(messages.pack({**header, "title": "t" * 200, "source": {"place": "p" * 4000}})) > 400_000


def test_the_step_that_a_refusal_names_fits():
    p = recipes.CaptureMotion(frame_start=1, frame_end=3000, views=8)
    with pytest.raises(KilnError) as error:
        capture_motion.frames(p)
    assert error.value.hint.startswith("Capture every 6 frames")
    assert len(capture_motion.frames(dataclasses.replace(p, frame_step=6))) == 500


def test_an_object_that_vanishes_is_refused_with_the_frame(tmp_path):
    thing = moving_cube()
    for frame, hidden in ((1, False), (5, True)):
        thing.hide_render = hidden
        thing.keyframe_insert("hide_render", frame=frame)
    bpy.context.scene.frame_set(1)
    assert refusal(tmp_path).message == "Cube is not there at frame 5: no faces, hair or instances of it render."
    thing.animation_data_clear()
    thing.hide_render = False
    for frame, scale in ((1, 1.0), (3, 0.0), (5, 1.0)):
        thing.scale = (scale,) * 3
        thing.keyframe_insert("scale", frame=frame)
    bpy.context.scene.frame_set(1)
    assert refusal(tmp_path).message == "Cube has no size at frame 3: all its points lie in one place."


def test_what_is_transparent_at_a_frame_is_refused_with_the_frame(tmp_path):
    thing = moving_cube()
    paint = plain((0.5, 0.5, 0.5))
    thing.data.materials.append(paint)
    alpha = paint.node_tree.nodes["Principled BSDF"].inputs["Alpha"]
    for frame, value in ((1, 1.0), (4, 1.0), (5, 0.0)):
        alpha.default_value = value
        alpha.keyframe_insert("default_value", frame=frame)
    assert refusal(tmp_path).message == "Cube renders as nothing at frame 5: every view is empty."


def test_parts_that_come_and_go_are_refused(tmp_path):
    leaf = add("cube", size=0.1, location=(30, 0, 0))
    thing = add("plane")
    bpy.ops.object.particle_system_add()
    settings = thing.particle_systems[0].settings
    settings.count, settings.frame_start, settings.frame_end = 60, 1, 6
    settings.render_type, settings.instance_object, settings.particle_size = "OBJECT", leaf, 1.0
    said = refusal(tmp_path, thing=thing)
    assert "instances at frame 5: one mesh cannot follow parts that come and go." in said.message


def test_what_travels_far_is_refused(tmp_path):
    thing = moving_cube()
    thing.animation_data_clear()
    for frame, x in ((1, 0.0), (5, 100.0)):
        thing.location.x = x
        thing.keyframe_insert("location", frame=frame)
    assert refusal(tmp_path).message.startswith("Cube travels 5")


# What the user had stays


@pytest.mark.oldest
@pytest.mark.parametrize("end", ["finished", "cancelled", "failed"])
def test_everything_is_as_it_was_after_a_capture(tmp_path, end):
    first, _ = furnished()
    for frame, x in ((1, 1.0), (6, 2.0)):
        first.location.x = x
        first.keyframe_insert("location", frame=frame)
    bpy.context.scene.frame_set(17, subframe=0.25)
    before = everything()
    work = capture_motion.MovingCapture(capture.subject(bpy.context), QUICK, tmp_path / "views")
    assert everything() == before
    while work.step():
        assert everything() == before
        if end != "finished" and work.done > 5:
            break
    if end == "finished":
        work.finish()
    elif end == "failed":
        for path in (tmp_path / "views").iterdir():
            path.unlink()
        (tmp_path / "views").rmdir()
        (tmp_path / "views").write_text("a file where a folder should be")
        with pytest.raises(KilnError, match="written|render"):
            while work.step():
                pass
    work.close()
    assert everything() == before
    bpy.app.handlers.render_post.clear()


def test_what_changes_at_a_frame_between_steps_ends_the_capture(tmp_path):
    thing = moving_cube()
    work = capture_motion.MovingCapture(capture.subject(bpy.context), QUICK, tmp_path)
    while work.done < 4:
        work.step()
    thing.animation_data_clear()
    thing.location.x = 7
    with pytest.raises(KilnError, match="moved while it was captured"):
        while work.step():
            pass
    assert bpy.context.scene.frame_current == 1


# From the panel


@pytest.fixture
def submitted(monkeypatch):
    """What Generate would send, without a backend."""
    sent = []
    monkeypatch.setattr(session.Session, "want_backend", lambda self: None)
    monkeypatch.setattr(
        session.Session, "submit", lambda self, *given: sent.append(given) or types.SimpleNamespace(quads=0, data={"parameters": {}})
    )
    monkeypatch.setattr(session.Session, "wait_for_results", lambda self, job: (_ for _ in ()).throw(KilnError("enough", "Enough.")))
    return sent


def test_the_job_says_which_frames_of_the_scene_it_is_of(submitted):
    moving_cube()
    scene = bpy.context.scene
    scene.frame_start, scene.frame_end = 3, 6
    given = {name.replace(".", "_"): value for name, value in {
        "capture.views": 4, "capture.cameras": 4, "capture.holdout": 0, "capture.size": 64, "capture.samples": 1, "capture.frame_step": 3,
    }.items()}  # fmt: skip
    with pytest.raises(RuntimeError, match="Enough"):
        bpy.ops.kiln.generate(recipe="animate", preset="standard", **given)
    recipe, inputs, source, *_ = submitted[0]
    values = recipes.values(recipe)
    assert (values["capture.scene_frames"], values["capture.frame_start"], values["capture.frame_end"]) == (True, 3, 6)
    assert len(inputs) == 1 + 2 * 4 + 2 and (source["frame_start"], source["frame_end"], source["frame_step"]) == (3, 6, 3)
    preset = recipes.values(recipes.make("animate", preset="draft"))
    assert properties.preset_of("animate", {**preset, "capture.frame_start": 3, "capture.frame_end": 6}) == "draft"


def test_the_panel_reckons_with_the_scenes_frames():
    """500 frames are captured if one wants to; what they take is said before."""
    scene = bpy.context.scene
    scene.frame_start, scene.frame_end = 1, 500
    preset = recipes.values(recipes.make("animate"))
    values = capture_motion.resolved(preset, scene)
    assert capture_motion.sentence(recipes.make("animate", values).capture) == "Frames 1 to 500: 500 of 10 views, 5,000 in all"
    expected, short = session.current.estimate("animate", values), session.current.estimate("animate", preset)
    assert expected.seconds > 4 * short.seconds and expected.bytes > 5 * short.bytes
    own = {**preset, "capture.scene_frames": False}
    assert capture_motion.resolved(own, scene) == own
    reconstruct = recipes.values(recipes.make("reconstruct"))
    assert capture_motion.resolved(reconstruct, scene) == reconstruct
