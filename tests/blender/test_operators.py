"""What goes wrong before a job exists: each case has its sentence, in the exception and in the panel, and the scene is as it was."""

import errno

import bpy
import pytest
from bl_ext.kiln_test.kiln import api, preferences, session
from bl_ext.kiln_test.kiln.protocol.errors import KilnError


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


def test_parameters_come_from_the_call_over_the_preset_over_the_panel(monkeypatch):
    """What would be sent off, read where the capture would begin."""
    seen = {}

    def shoot(subject, recipe):
        seen["recipe"] = recipe
        raise KilnError("stop", "Stop.")

    monkeypatch.setattr(session, "Shoot", shoot)
    bpy.ops.mesh.primitive_cube_add()
    bpy.context.scene.kiln.reconstruct.fit_iterations = 321
    for arguments, iterations, grid in (
        ({}, 321, 160),
        ({"surface_grid": 64}, 321, 64),
        ({"preset": "draft"}, 300, 96),
        ({"preset": "draft", "fit_iterations": 50}, 50, 96),
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
