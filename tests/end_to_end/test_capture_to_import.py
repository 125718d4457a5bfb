"""From a selected object to an imported asset; and a session or a backend that ends in the middle loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import addon_utils
import bpy
import numpy as np
import pytest
from bl_ext.kiln_test.kiln import api, preferences, session
from bl_ext.kiln_test.kiln.protocol import client, connection
from bl_ext.kiln_test.kiln.protocol.errors import KilnError
from mathutils import Matrix

MODULE = "bl_ext.kiln_test.kiln"
# The smallest job that still makes an asset.
SMALL = {
    "capture_views": 16, "capture_size": 128, "capture_holdout": 2, "fit_splats": 1500, "fit_iterations": 60, "surface_grid": 64,
    "surface_faces": 1500, "texture_size": 128,
}  # fmt: skip


@pytest.fixture(autouse=True)
def backend(home):
    yield


def subject(name="Pot", place=None):
    """A torus with a colour, somewhere, turned and scaled."""
    bpy.ops.mesh.primitive_torus_add(major_radius=1.0, minor_radius=0.45, major_segments=24, minor_segments=12)
    thing = bpy.context.object
    thing.name = name
    thing.matrix_world = place or Matrix.LocRotScale((3.0, -1.0, 0.5), Matrix.Rotation(0.7, 3, "Y").to_quaternion(), (0.3, 0.3, 0.4))
    material = bpy.data.materials.new("Clay")
    material.use_nodes = True
    material.node_tree.nodes["Principled BSDF"].inputs["Base Color"].default_value = (0.6, 0.1, 0.05, 1.0)
    thing.data.materials.append(material)
    bpy.context.view_layer.update()
    return thing


def sits_on(made, thing, within=0.02):
    """Whether the imported mesh lies on its source: the world distance of its vertices to the source's surface, and the same back."""
    bpy.context.view_layer.update()
    size = max(thing.dimensions)

    def distances(points_of, surface):
        into = surface.matrix_world.inverted()
        places = [points_of.matrix_world @ vertex.co for vertex in points_of.data.vertices]
        return [(surface.matrix_world @ surface.closest_point_on_mesh(into @ place)[1] - place).length for place in places]

    # A cell of this coarse grid is 2 % of the size.
    return np.percentile(distances(made, thing), 95) < within * size and np.percentile(distances(thing, made), 95) < within * size


def kiln_collections():
    return [collection for collection in bpy.data.collections if "kiln_job" in collection]


@pytest.mark.oldest
def test_the_button_in_blender_b_leaves_an_asset_on_its_source():
    thing = subject()
    others = set(bpy.data.objects)
    assert bpy.ops.kiln.generate(**SMALL) == {"FINISHED"}
    (collection,) = kiln_collections()
    mesh = next(made for made in collection.objects if made.name.endswith("mesh"))
    assert sits_on(mesh, thing)
    assert set(bpy.data.objects) - others == set(collection.objects)
    assert collection.asset_data is not None and json.loads(collection["kiln_parameters"])["fit.iterations"] == 60
    assert collection["kiln_preset"] == "custom" and collection["kiln_source"] == "Pot"
    assert bpy.context.scene.objects.get(mesh.name) is mesh
    assert bpy.context.selected_objects == [thing]


def test_the_python_call_returns_what_it_imported():
    subject("First")
    thing = subject("Second", Matrix.Translation((0.0, 5.0, 0.0)))
    made = api.reconstruct(["Second"], preset="draft", **SMALL)
    assert made.mesh_object.type == "MESH" and made.mesh_object.name in made.collection.objects
    assert sits_on(made.mesh_object, thing)
    assert len(made.mesh_object.data.polygons) <= 1500


def test_splats_that_were_moved_become_a_mesh_where_they_stand(tmp_path):
    thing = subject()
    first = api.reconstruct("Pot", save_to=tmp_path, **{**SMALL, "fit_iterations": 200, "fit_splats": 4000})
    place = Matrix.LocRotScale((5.0, 4.0, 3.0), Matrix.Rotation(1.0, 3, "Z").to_quaternion(), (2.0, 2.0, 2.0))
    for moved in (thing, first.splats_object):
        moved.matrix_world = place @ moved.matrix_world
    bpy.context.view_layer.objects.active = first.splats_object
    bpy.context.view_layer.update()
    small = {"look_count": 24, "look_size": 128, "surface_grid": 64, "surface_faces": 1500, "texture_size": 128}
    assert bpy.ops.kiln.generate(recipe="mesh_splats", **small) == {"FINISHED"}
    (made,) = [collection for collection in kiln_collections() if collection["kiln_recipe"] == "mesh_splats"]
    assert made["kiln_source"] == first.splats_object.name
    assert sits_on(next(one for one in made.objects if one.name.endswith("mesh")), thing, within=0.05)
    again = api.mesh_splats(tmp_path / "splats.ply", **small)
    thing.matrix_world = place.inverted() @ thing.matrix_world
    assert sits_on(again.mesh_object, thing, within=0.05)


def test_a_result_comes_in_as_quads_where_that_is_asked_for_and_can_retexture_its_source():
    thing = subject()
    bpy.context.scene.kiln.quads, bpy.context.scene.kiln.quad_faces = True, 800
    assert bpy.ops.kiln.generate(**SMALL) == {"FINISHED"}
    (collection,) = kiln_collections()
    mesh = next(made for made in collection.objects if made.name.endswith("mesh"))
    sides = [len(face.vertices) for face in mesh.data.polygons]
    assert sides.count(4) >= 0.95 * len(sides) and 300 < len(sides) < 2400
    assert sits_on(mesh, thing)
    bpy.ops.kiln.retexture(result=mesh.name, size=256)
    copy = bpy.data.objects["Pot retextured"]
    image = next(node.image for node in copy.data.materials[0].node_tree.nodes if node.bl_idname == "ShaderNodeTexImage")
    pixels = np.empty(len(image.pixels), np.float32)
    image.pixels.foreach_get(pixels)
    clay = np.array([0.6, 0.1, 0.05]) ** (1 / 2.4) * 1.055 - 0.055
    assert np.abs(np.median(pixels.reshape(-1, 4)[:, :3], axis=0) - clay).max() < 0.03


def test_a_bad_parameter_never_reaches_the_backend():
    subject()
    with pytest.raises(KilnError) as failure:
        api.reconstruct("Pot", **{"fit.iterations": 1})
    assert failure.value.code == "bad-parameter"


def start(**more):
    """A job that is not waited for."""
    now = session.current
    from bl_ext.kiln_test.kiln.protocol import recipes

    flat = {name.replace("_", ".", 1): value for name, value in {**SMALL, **more}.items()}
    recipe = recipes.make("reconstruct", flat)
    return now, session.Shoot(session.chosen_subject(bpy.context), recipe).all_at_once()


def until(now, ready, seconds=90):
    end = time.monotonic() + seconds

    def come():
        assert time.monotonic() < end, "waited in vain"
        return ready()

    now.wait(come)


def test_a_cancelled_job_ends_within_two_seconds_and_can_be_retried():
    subject()
    now, job = start(fit_iterations=100_000)
    until(now, lambda: job.state == "running" and job.data["stage"])
    asked = time.monotonic()
    bpy.ops.kiln.cancel_job(job=job.data["id"])
    until(now, lambda: job.state == "cancelled")
    assert time.monotonic() - asked < 3.0  # two, and what a busy machine adds
    bpy.ops.kiln.retry_job(job=job.data["id"])
    until(now, lambda: job.state == "running")
    bpy.ops.kiln.cancel_job(job=job.data["id"])
    until(now, lambda: job.state == "cancelled")
    bpy.ops.kiln.remove_job(job=job.data["id"])
    until(now, lambda: job.data["id"] not in now.jobs)


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is POSIX's")
def test_a_backend_that_dies_in_the_middle_is_started_again_and_the_job_is_finished():
    subject()
    now, job = start(fit_iterations=400)
    until(now, lambda: job.state == "running" and job.data["stage"])
    pid = connection.Connection.load(connection.default_path()).pid
    os.kill(pid, signal.SIGKILL)
    until(now, lambda: now.backend["state"] != "running")
    now.wait_for_results(job)
    assert now.import_results(bpy.context, job).mesh_object.name in bpy.context.scene.objects
    assert connection.Connection.load(connection.default_path()).pid != pid


def test_a_session_that_opens_later_finds_the_job_and_can_import_its_result():
    thing = subject()
    now, job = start()
    now.wait_for_results(job)
    name = job.data["id"]
    addon_utils.disable(MODULE)
    addon_utils.enable(MODULE)
    bpy.ops.kiln.import_job(job=name)
    (collection,) = kiln_collections()
    assert collection["kiln_job"] == name
    assert sits_on(next(made for made in collection.objects if made.name.endswith("mesh")), thing)


def test_two_blenders_share_one_backend(backend_python):
    bpy.ops.kiln.start_backend()
    pid = connection.Connection.load(connection.default_path()).pid
    command = [str(backend_python), "-m", "backend.cli", "serve", "--until-idle"]
    second = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert session.current.backend["state"] == "running"
    assert connection.Connection.load(connection.default_path()).pid == pid, second.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a script that is a program")
def test_a_backend_that_cannot_start_says_so_with_its_last_words(monkeypatch, tmp_path):
    monkeypatch.setenv("KILN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("bl_ext.kiln_test.kiln.backend_link.RESTART_AFTER", (0.1, 0.1))
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho the library is missing\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("KILN_BACKEND_PYTHON", str(broken))
    session.current._look_again = 0.0
    subject()
    with pytest.raises(RuntimeError, match=r"did not start \(exit status 3\).*tried 3 times"):
        bpy.ops.kiln.generate(**SMALL)
    assert "the library is missing" in session.current.backend["text"]
    monkeypatch.undo()
    session.current._look_again = 0.0
    session.current.connect()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a script that is a program")
def test_a_python_that_only_launches_another_one_serves_and_so_does_one_that_failed_before(monkeypatch, tmp_path, backend_python):
    """As on Windows, where an environment's python.exe starts the real Python as a process of its own."""
    launcher = tmp_path / "python"
    launcher.write_text("#!/bin/sh\nexit 3\n")
    launcher.chmod(0o755)
    monkeypatch.setenv("KILN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KILN_BACKEND_PYTHON", str(launcher))
    monkeypatch.setattr("bl_ext.kiln_test.kiln.backend_link.RESTART_AFTER", (0.1,))
    monkeypatch.setattr("bl_ext.kiln_test.kiln.backend_link.START_TIME", 20.0)
    now = session.current
    now._look_again = 0.0
    with pytest.raises(RuntimeError, match="did not start"):
        bpy.ops.kiln.start_backend()
    launcher.write_text(f'#!/bin/sh\n"{backend_python}" "$@"\nexit $?\n')
    try:
        bpy.ops.kiln.start_backend()
        assert now.backend["state"] == "running"
        with pytest.raises(KilnError, match="no job"):  # in `blender -b` an order's error is its caller's
            now.order(session.Job({"id": "gone", "title": "Gone", "state": "running"}), "cancel")
    finally:
        bpy.ops.kiln.stop_backend()
    assert not connection.default_path().exists()
    monkeypatch.undo()
    now._look_again = 0.0
    now.connect()


def test_after_blender_has_closed_the_backend_finishes_the_job_and_the_next_blender_finds_it():
    subject()
    now, job = start(fit_iterations=100)
    until(now, lambda: job.state == "running")
    addon_utils.disable(MODULE)
    with client.Client(connection.Connection.load(connection.default_path())) as other:
        assert [event["kind"] for event in other.watch(job.data["id"], timeout=90)][-1] == "done"
    addon_utils.enable(MODULE)
    session.current.need_jobs()
    assert session.current.jobs[job.data["id"]].state == "done"


def test_where_closing_blender_stops_the_backend_the_next_one_goes_on_with_the_job():
    subject()
    now, job = start(fit_iterations=300)
    until(now, lambda: job.state == "running" and job.data["stage"])
    pid = connection.Connection.load(connection.default_path()).pid
    preferences.get().on_close = "STOP"
    try:
        addon_utils.disable(MODULE)
        end = time.monotonic() + 10
        while connection.default_path().exists():
            assert time.monotonic() < end, "the backend goes on"
            time.sleep(0.05)
        addon_utils.enable(MODULE)
    finally:
        preferences.get().on_close = "FINISH"
    session.current.need_jobs()
    again = session.current.jobs[job.data["id"]]
    session.current.wait_for_results(again)
    assert again.state == "done"
    assert connection.Connection.load(connection.default_path()).pid != pid


def test_a_backend_that_another_blender_stopped_stays_stopped():
    bpy.ops.kiln.start_backend()
    now = session.current
    with client.Client(connection.Connection.load(connection.default_path())) as other:
        other.shutdown()
    until(now, lambda: now.backend["state"] == "stopped", 15)
    time.sleep(1.5)
    now.drain()
    assert now.backend["state"] == "stopped" and not now.notices
