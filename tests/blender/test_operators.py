"""What goes wrong before a job exists: each case has its sentence, in the exception and in the panel, and the scene is as it was."""

import errno
import functools
import queue
from pathlib import Path

import bmesh
import bpy
import numpy as np
import pytest
from bl_ext.kiln_test.kiln import api, backend_link, operators, panel, preferences, session, splat_files, splat_nodes
from bl_ext.kiln_test.kiln.protocol import recipes
from bl_ext.kiln_test.kiln.protocol.errors import KilnError
from mathutils import Matrix


@pytest.fixture(autouse=True)
def no_backend(monkeypatch, tmp_path):
    """An empty Kiln folder, and nothing set up."""
    monkeypatch.setenv("KILN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KILN_BACKEND_PYTHON", raising=False)
    session.current.notices.clear()
    session.current._look_again = 0.0


@pytest.fixture
def some_backend(monkeypatch):
    """For what is refused before a backend is asked."""
    monkeypatch.setattr(session.Session, "want_backend", lambda self: None)


def contents():
    kinds = ("objects", "scenes", "collections", "meshes", "cameras", "materials")
    return {kind: sorted(item.name for item in getattr(bpy.data, kind)) for kind in kinds}


def refused(call, **arguments) -> str:
    """The sentence of a call that fails; it must stand in the panel as well, and the file must be as before."""
    before = contents()
    with pytest.raises(RuntimeError) as failure:
        call(**arguments)
    assert contents() == before
    assert session.current.notices, "nothing in the panel"
    notice = session.current.notices[-1].error
    assert notice.message in str(failure.value) and notice.hint in str(failure.value)
    return str(failure.value)


@pytest.mark.oldest
def test_nothing_selected(some_backend):
    assert "Nothing is selected." in refused(bpy.ops.kiln.generate)


def test_a_camera_selected(some_backend):
    bpy.ops.object.camera_add()
    assert "Camera is a camera" in refused(bpy.ops.kiln.generate)


def test_an_object_without_faces(some_backend):
    mesh = bpy.data.meshes.new("Points")
    mesh.from_pydata([(0, 0, 0), (1, 0, 0)], [], [])
    obj = bpy.data.objects.new("Points", mesh)
    bpy.context.collection.objects.link(obj)
    obj.select_set(True)
    assert "Points has no faces" in refused(bpy.ops.kiln.generate)


def test_no_collection_chosen_and_one_that_is_not_there(some_backend):
    bpy.context.scene.kiln.source = "COLLECTION"
    assert "No collection is chosen." in refused(bpy.ops.kiln.generate)
    assert "There is no collection 'Props'." in refused(bpy.ops.kiln.generate, collection="Props")


@pytest.mark.oldest
def test_a_backend_that_is_not_set_up():
    bpy.ops.mesh.primitive_cube_add()
    assert "Kiln's backend is not set up. Press Set Up Backend" in refused(bpy.ops.kiln.generate)


def test_a_remote_backend_whose_file_is_missing(tmp_path):
    bpy.ops.mesh.primitive_cube_add()
    chosen = preferences.get()
    chosen.connection_file, chosen.place = str(tmp_path / "nowhere.json"), "REMOTE"
    try:
        session.current._look_again = 0.0
        assert "nowhere.json" in refused(bpy.ops.kiln.generate)
    finally:
        chosen.place = "LOCAL"


def test_a_connection_file_that_is_none(tmp_path):
    path = tmp_path / "connection.json"
    path.write_text("{}")
    assert "is not a Kiln connection file" in refused(bpy.ops.kiln.connect, filepath=str(path))
    assert preferences.get().place == "LOCAL"


def test_a_backend_python_that_does_not_run(monkeypatch, tmp_path):
    monkeypatch.setenv("KILN_BACKEND_PYTHON", str(tmp_path / "python"))
    bpy.ops.mesh.primitive_cube_add()
    assert "cannot be started" in refused(bpy.ops.kiln.generate)


def test_no_online_access(monkeypatch):
    if bpy.app.online_access:
        bpy.context.preferences.system.use_online_access = False
    assert "not allowed to go online" in refused(bpy.ops.kiln.set_up_backend)


def test_an_offline_bundle_that_is_none(tmp_path):
    path = tmp_path / "bundle.zip"
    path.write_bytes(b"not a zip")
    assert refused(bpy.ops.kiln.set_up_from_bundle, filepath=str(path))


def test_a_disk_that_fills_while_views_are_rendered(some_backend, monkeypatch):
    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(session.capture.Capture, "step", full)
    bpy.ops.mesh.primitive_cube_add()
    assert "The disk is full" in refused(bpy.ops.kiln.generate)
    assert not list(session.current.folder.glob("views-*")), "rendered views are left behind"
    assert session.current.capture is None


def splats(name="Cloud", place=None, count=50):
    """An object that holds splats, as an import leaves it."""
    random = np.random.default_rng(1)
    points = splat_files.Points(
        means=random.normal(size=(count, 3)),
        scales=random.uniform(0.01, 0.1, (count, 3)).astype(np.float32),
        quaternions=np.tile(np.float32([1, 0, 0, 0]), (count, 1)),
        colors=random.uniform(size=(count, 3)).astype(np.float32),
        opacities=random.uniform(0.2, 0.9, count).astype(np.float32),
    )
    thing = splat_nodes.make_object(name, points)
    bpy.context.scene.collection.objects.link(thing)
    bpy.context.view_layer.objects.active = thing
    thing.matrix_world = place or Matrix()
    bpy.context.view_layer.update()
    return thing, points


def test_a_mesh_from_splats_says_what_it_needs(some_backend, tmp_path):
    generate = functools.partial(bpy.ops.kiln.generate, recipe="mesh_splats")
    bpy.context.view_layer.objects.active = None
    assert "No splats are selected." in refused(generate)
    bpy.ops.mesh.primitive_cube_add()
    assert "Cube does not hold splats." in refused(generate)
    assert "There is no file" in refused(generate, file=str(tmp_path / "gone.ply"))
    assert "photo.jpg is no splat file" in refused(generate, file=str(tmp_path / "photo.jpg"))
    bpy.context.scene.kiln.splats_source = "FILE"
    assert "No splat file is chosen." in refused(generate)


def sent(monkeypatch):
    """Where submissions end that would go to a backend."""
    found = []

    def submit(self, recipe, inputs, source, title, views, picture):
        found.append((recipe, inputs, source, title))
        return session.Job({"id": "sending-1", "state": "queued", "title": title})

    monkeypatch.setattr(session.Session, "submit", submit)
    monkeypatch.setattr(session.Session, "want_backend", lambda self: None)
    return found


def test_the_active_objects_splats_are_sent_as_they_stand_in_the_world(monkeypatch):
    found = sent(monkeypatch)
    place = Matrix.LocRotScale((4.0, 2.0, -1.0), Matrix.Rotation(0.5, 3, "X").to_quaternion(), (2.0, 2.0, 2.0))
    thing, points = splats(place=place)
    bpy.context.scene.unit_settings.scale_length = 0.1
    before = contents()
    session.Shoot(session.chosen_subject(bpy.context, "mesh_splats"), recipes.make("mesh_splats", {"subject.up": "y_down"})).all_at_once()
    assert contents() == before
    ((recipe, inputs, source, title),) = found
    assert recipe.subject.up == "auto", "as placed, whatever is set for files"
    assert recipe.NAME == "mesh_splats" and list(inputs) == ["splats.ply"] and title == "Cloud"
    written = splat_files.read(inputs["splats.ply"])
    world = np.array(place)
    assert np.allclose(written.means, 0.1 * (points.means @ world[:3, :3].T + world[:3, 3]), atol=1e-4)
    assert np.allclose(np.sort(written.scales, 1), np.sort(0.2 * points.scales, 1), rtol=1e-3)
    assert source["location"] == pytest.approx([4.0, 2.0, -1.0]) and source["unit_scale"] == pytest.approx(0.1)
    assert source["object"] == "Cloud" and source["splats"] == 50
    assert session.current.capture is None


def test_cropped_splats_are_not_sent(monkeypatch):
    found = sent(monkeypatch)
    thing, _ = splats()
    shape = bmesh.new()
    shape.from_mesh(thing.data)
    bmesh.ops.delete(shape, geom=[vertex for vertex in shape.verts if vertex.co.x > 0], context="VERTS")
    shape.to_mesh(thing.data)
    shape.free()
    left = len(thing.data.vertices)
    session.Shoot(session.chosen_subject(bpy.context, "mesh_splats"), recipes.make("mesh_splats")).all_at_once()
    written = splat_files.read(found[0][1]["splats.ply"])
    assert len(written) == left < 50 and written.means[:, 0].max() <= 0


def test_a_splat_file_is_sent_as_it_is(monkeypatch, tmp_path):
    found = sent(monkeypatch)
    path = tmp_path / "Garden.SPZ"
    path.write_bytes(b"whatever the backend makes of it")
    session.Shoot(session.chosen_subject(bpy.context, "mesh_splats", file=str(path)), recipes.make("mesh_splats")).all_at_once()
    ((_, inputs, source, title),) = found
    assert inputs == {"splats.spz": path} and title == "Garden" and source["location"] == [0, 0, 0]
    assert path.exists()


def test_baking_onto_something_that_is_no_result_is_refused():
    bpy.ops.mesh.primitive_cube_add()
    for call in (bpy.ops.kiln.retexture, bpy.ops.kiln.remesh_quads):
        assert "Cube is no result of Kiln." in refused(call)


def test_an_import_of_splats_is_one_undo_step_and_asks_for_no_backend(tmp_path):
    path = tmp_path / "Cloud.ply"
    splat_files.write_ply(path, splats()[1])
    bpy.ops.ed.undo_push(message="before")
    before = contents()
    bpy.ops.kiln.import_splats("EXEC_DEFAULT", True, filepath=str(path))
    (made,) = set(bpy.data.objects) - {bpy.data.objects[name] for name in before["objects"]}
    assert splat_nodes.is_splats(made) and len(made.data.vertices) == 50
    assert bpy.context.object == made and bpy.context.selected_objects == [made], "as after Blender's own importers"
    bpy.ops.ed.undo()
    assert contents() == before


def test_dropped_files_come_in_together(tmp_path):
    points = splats()[1]
    for name in ("a.ply", "b.ply"):
        splat_files.write_ply(tmp_path / name, points)
    before = len(bpy.data.objects)
    bpy.ops.kiln.import_splats(directory=str(tmp_path), files=[{"name": "a.ply"}, {"name": "b.ply"}])
    assert len(bpy.data.objects) == before + 2


def test_a_file_that_holds_no_splats_is_said_in_the_panel(tmp_path):
    path = tmp_path / "cube.ply"
    path.write_text("no ply")
    assert "cube.ply" in refused(bpy.ops.kiln.import_splats, filepath=str(path))


def test_splats_that_would_come_out_dark_are_told_of_unless_they_are_hidden(monkeypatch):
    words = []
    monkeypatch.setattr(panel, "draw_text", lambda layout, context, text, icon: words.append(text))
    scene, (thing, _) = bpy.context.scene, splats()
    scene.render.engine, scene.cycles.transparent_max_bounces = "CYCLES", 8
    panel.draw_advice(None, bpy.context, [thing])
    thing.hide_viewport = thing.hide_render = True
    panel.draw_advice(None, bpy.context, [thing])
    assert len(words) == 1 and "transparent bounces" in words[0]


def test_blenders_own_importer_keeps_dropped_ply_files():
    assert ".ply" not in operators.KILN_FH_splats.bl_file_extensions


def test_parameters_come_from_the_call_over_the_preset_over_the_panel(monkeypatch):
    """What would be sent off, read where the capture would begin."""
    seen = {}

    def shoot(subject, recipe):
        seen["recipe"] = recipe
        raise KilnError("stop", "Stop.")

    monkeypatch.setattr(session, "Shoot", shoot)
    bpy.ops.mesh.primitive_cube_add()
    bpy.context.scene.kiln.reconstruct.fit_iterations = 321
    standard, draft = (recipes.make("reconstruct", preset=preset) for preset in ("standard", "draft"))
    for arguments, iterations, grid in (
        ({}, 321, standard.surface.grid),
        ({"surface_grid": 64}, 321, 64),
        ({"preset": "draft"}, draft.fit.iterations, draft.surface.grid),
        ({"preset": "draft", "fit_iterations": 50}, 50, draft.surface.grid),
    ):
        with pytest.raises(RuntimeError, match="Stop"):
            bpy.ops.kiln.generate(**arguments)
        assert (seen["recipe"].fit.iterations, seen["recipe"].surface.grid) == (iterations, grid)


@pytest.mark.parametrize("name", ["fit_iterations", "fit.iterations"])
def test_the_python_call_refuses_a_bad_value_with_its_name_and_range(name):
    bpy.ops.mesh.primitive_cube_add()
    with pytest.raises(KilnError) as failure:
        api.reconstruct("Cube", **{name: -1})
    assert failure.value.code == "bad-parameter"
    assert "fit.iterations" in failure.value.message and "50 to 100000" in failure.value.hint


def test_the_python_call_refuses_an_object_that_is_not_there():
    with pytest.raises(KilnError, match="no object 'Teapot'") as failure:
        api.reconstruct("Teapot")
    assert failure.value.code == "no-object"


def test_dismissing_a_notice_removes_it(some_backend):
    refused(bpy.ops.kiln.generate)
    count = len(session.current.notices)
    bpy.ops.kiln.dismiss(index=count - 1)
    assert len(session.current.notices) == count - 1


def test_a_remote_backend_is_neither_stopped_nor_set_up_from_here(tmp_path):
    chosen = preferences.get()
    chosen.connection_file, chosen.place = str(tmp_path / "nowhere.json"), "REMOTE"
    try:
        for call in (bpy.ops.kiln.stop_backend, bpy.ops.kiln.remove_backend):
            session.current._look_again = 0.0
            assert "Press Use This Computer first." in refused(call)
        assert session.current.setting_up is None
    finally:
        chosen.place = "LOCAL"


def test_removing_jobs_and_results_leaves_what_else_lies_in_kilns_home(tmp_path):
    home = tmp_path / "shared"
    for name in ("artifacts/ab", "stages", "logs", "holiday"):
        (home / name).mkdir(parents=True)
    for name in ("kiln.sqlite", "kiln.sqlite-wal", "artifacts/ab/abcd", "holiday/photo.jpg", "letter.txt"):
        (home / name).write_text("x")
    session.remove_store(home)
    assert sorted(path.name for path in home.iterdir()) == ["holiday", "letter.txt"]


@pytest.fixture
def link(tmp_path):
    """A client thread that is not started: the test does its turns."""
    return backend_link.Link(backend_link.Where(log=tmp_path / "log"), tmp_path / "pictures")


def told(link, kind):
    found = []
    while True:
        try:
            found.append(link.told.get_nowait())
        except queue.Empty:
            return [message for message in found if message["kind"] == kind]


def test_stop_and_start_at_once_are_both_obeyed_and_what_waited_is_answered_once(link):
    waiting, stop, start = link.ask("remove", job="a"), link.ask("stop"), link.ask("start")
    link._obey()
    link._obey()
    answers = told(link, "answer")
    assert sorted(answer["ticket"] for answer in answers) == [waiting, stop, start]
    assert {answer["ticket"]: answer["error"] and answer["error"]["code"] for answer in answers} == {
        waiting: "backend-stopped", stop: None, start: None,
    }  # fmt: skip


class Slow:
    """Takes a submission in ten parts; what was asked for between two of them is in `asked`."""

    def __init__(self, asked):
        self.asked, self.done, self.sent = list(asked), [], 0

    def submit(self, *_, progress, id, **__):
        while self.sent < 10:
            self.sent += 1
            if self.asked and self.sent == 5:
                self.asked.pop()()
            progress(self.sent, 10)
        self.done.append(("submit", id))
        return {"id": "b"}

    def cancel(self, job):
        self.done.append(("cancel", job))


def submission(link):
    return link.ask("submit", recipe="reconstruct", values={}, inputs={}, title="", source={}, id="once")


def test_a_cancel_does_not_wait_for_a_transfer_which_goes_on_where_it_was(link):
    link._client = Slow([lambda: link.ask("cancel", job="a")])
    submission(link)
    link._obey()
    assert link._client.done == [("cancel", "a"), ("submit", "once")]


def test_an_upload_can_be_given_up(link):
    ticket = submission(link)
    link._client = Slow([lambda: link.ask("give_up", transfer=ticket)])
    link._obey()
    assert link._client.done == []
    answers = {answer["ticket"]: answer["error"] for answer in told(link, "answer")}
    assert answers[ticket]["code"] == "cancelled" and list(answers.values()).count(None) == 1


@pytest.mark.parametrize("name", ["../mesh.glb", "..", "C:mesh.glb", "mesh.glb:hidden", "a\\b", "nul.glb", "con", "mesh.", "", "/etc/x"])
def test_a_result_whose_name_leads_elsewhere_is_refused(link, name, tmp_path):
    with pytest.raises(KilnError) as failure:
        link._order_fetch(1, {name: {"hash": "0" * 64, "size": 1}}, tmp_path / "results")
    assert failure.value.code == "bad-result"


def test_a_full_disk_costs_the_preview_and_is_told_once(link, monkeypatch):
    class Blobs:
        def blob(self, artifact):
            return b"picture"

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    link._client = Blobs()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        link._fetch_picture("a", "0" * 64)
        link._fetch_picture("a", "1" * 64)
    (trouble,) = told(link, "trouble")
    assert "No space left" in trouble["error"]["message"]
    link._fetch_picture("a", "1" * 64)
    (preview,) = told(link, "preview")
    assert preview["path"].read_bytes() == b"picture"


def test_views_that_could_not_be_sent_are_kept_and_sent_again_as_the_same_submission(monkeypatch, tmp_path):
    now, sent = session.current, []

    def ask(order, then=None, **values):
        sent.append((order, values, then))
        return len(sent)

    monkeypatch.setattr(now, "ask", ask)
    monkeypatch.setattr(now, "want_backend", lambda: None)
    views = tmp_path / "views"
    views.mkdir()
    picture = tmp_path / "picture.png"
    image = bpy.data.images.new("picture", 4, 4)
    image.filepath_raw, image.file_format = str(picture), "PNG"
    image.save()
    job = now.submit(recipes.make("reconstruct"), {"transforms.json": views / "transforms.json"}, {}, "Pot", views, picture)
    sent[0][2](None, KilnError("unavailable", "Gone."))
    assert job.state == "failed" and views.exists()
    bpy.ops.kiln.retry_job(job=job.data["id"])
    assert [order for order, *_ in sent] == ["submit", "submit"] and sent[0][1] == sent[1][1]
    sent[1][2]({**job.data, "id": "b"}, None)
    assert now.jobs["b"] is job and not views.exists()
    now._forget(job)


def test_what_was_asked_for_just_before_the_end_is_still_obeyed(link):
    link._client = Slow([])
    link._client.close = lambda: link._client.done.append("closed")
    link.ask("cancel", job="a")
    link._closing.set()
    link.run()
    assert link._client.done == [("cancel", "a"), "closed"]


def test_a_choice_of_backend_is_saved_with_the_preferences():
    bpy.context.preferences.is_dirty = False
    bpy.ops.kiln.use_local()
    assert bpy.context.preferences.is_dirty


def test_the_log_of_a_backend_that_is_not_set_up_is_that_of_the_set_up():
    session.current.connect()
    session.current.wait(lambda: session.current.backend["state"] == "missing")
    session.environment_log().unlink(missing_ok=True)
    assert "set-up.log" in refused(bpy.ops.kiln.open_log)
