"""A picture as a job's source: files, images of Blender's, turntables and words; the views of a finished job, and what is wanted of them;
the asset of a picture, which has no place in the scene of its own."""

import json
import shutil
from types import SimpleNamespace

import bpy
import numpy as np
import pytest
from bl_ext.kiln_test.kiln import api, backend_link, import_asset, operators, picture_input, properties, session, turntable
from bl_ext.kiln_test.kiln.protocol import picture, recipes
from bl_ext.kiln_test.kiln.protocol.errors import KilnError
from PIL import Image

from tests.blender.test_import import make_results, world_vertices
from tests.blender.test_ui import record

Im3d = recipes.Im3d


@pytest.fixture(autouse=True)
def quiet_session(monkeypatch, tmp_path):
    """Nobody is asked for a backend; what would be ordered of it is kept."""
    monkeypatch.setenv("KILN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(session.Session, "want_backend", lambda self: None)
    monkeypatch.setattr(session.Session, "need_jobs", lambda self: None)
    now, ordered = session.current, []
    monkeypatch.setattr(
        session.Session, "ask", lambda self, order, then=None, **values: ordered.append((order, values, then)) or len(ordered)
    )
    now.jobs.clear()
    now.notices.clear()
    yield ordered
    for job in list(now.jobs.values()):
        now._forget(job)


@pytest.fixture
def settings():
    bpy.context.scene.kiln.recipe = "im3d"
    return bpy.context.scene.kiln


def some_pixels(seed=0, height=24, width=40):
    """uint8, straight alpha that is never 0."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4)).astype(np.uint8)
    pixels[..., 3] = np.maximum(pixels[..., 3], 40)
    return pixels


def linear(srgb):
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def filled(name, pixels, **options):
    """An image of Blender's with these values, first row at the top."""
    image = bpy.data.images.new(name, pixels.shape[1], pixels.shape[0], alpha=True, **options)
    image.pixels.foreach_set(np.ascontiguousarray(pixels[::-1], np.float32).ravel())
    return image


# Words as parameters


def test_a_text_is_a_control_of_its_own_and_presets_leave_it_alone(settings):
    group = settings.im3d
    group.generate_prompt, group.generate_model, group.generate_steps = "a red fox", "kiln-tiny-turntable", 33
    assert properties.values(group, Im3d)["generate.prompt"] == "a red fox"
    assert properties.changed(group, Im3d) == ["generate.steps"]
    group.preset = "draft"
    assert (group.generate_prompt, group.generate_model) == ("a red fox", "kiln-tiny-turntable")
    assert group.generate_steps == Im3d.PRESETS["draft"]["generate.steps"]
    made = recipes.values(recipes.make("im3d", properties.values(group, Im3d)))
    assert properties.preset_of("im3d", made) == "draft"
    assert properties.preset_of("im3d", {**made, "fit.splats": 777}) == "custom"


@pytest.mark.parametrize("text", ["x" * 501, "two\nlines"])
def test_a_text_that_is_too_long_or_no_line_is_refused_by_name(settings, text):
    with pytest.raises(RuntimeError, match="generate.prompt cannot be"):
        bpy.ops.kiln.generate(recipe="im3d", generate_prompt=text)


# Sources


@pytest.mark.oldest
def test_neither_picture_nor_words_is_said(settings):
    with pytest.raises(RuntimeError, match="There is neither a picture nor a prompt. Choose a picture"):
        bpy.ops.kiln.generate(recipe="im3d")
    assert session.current.notices
    for source, sentence in (
        ("IMAGE", "No image is chosen"),
        ("VIEWS", "No folder of views"),
        ("PROMPT", "neither a picture nor a prompt"),
    ):
        settings.picture_source = source
        with pytest.raises(KilnError, match=sentence):
            session.chosen_subject(bpy.context)


@pytest.mark.oldest
def test_each_source_is_sent_under_the_name_that_the_recipe_knows(settings, tmp_path, quiet_session):
    Image.fromarray(some_pixels()[..., :3]).save(tmp_path / "Fox.JPG")
    (tmp_path / "turn").mkdir()
    for number in (2, 1, 10, 9):
        Image.new("RGB", (8, 8)).save(tmp_path / "turn" / f"{number}.png")
    painted = filled("painted", some_pixels() / 255)
    group = settings.im3d
    settings.picture_file, settings.picture_image, settings.picture_views = str(tmp_path / "Fox.JPG"), painted, str(tmp_path / "turn")
    group.generate_prompt = "a fox"
    sent = {}
    for source in ("FILE", "IMAGE", "VIEWS", "PROMPT"):
        settings.picture_source = source
        session.Shoot(session.chosen_subject(bpy.context), recipes.make("im3d")).all_at_once()
        order, values, _ = quiet_session[-1]
        assert order == "submit" and values["recipe"] == "im3d"
        sent[source] = values["title"], list(values["inputs"]), values["source"]["kind"]
    assert sent == {
        "FILE": ("Fox", ["image.jpg"], "picture"),
        "IMAGE": ("painted", ["image.png"], "image"),
        "VIEWS": ("turn", ["view_000.png", "view_001.png", "view_002.png", "view_003.png"], "views"),
        "PROMPT": ("a fox", [], "prompt"),
    }
    job = session.current.listed()[0]
    assert json.loads(json.dumps(job.data["source"])) == job.data["source"]


def test_an_operators_own_words_come_before_what_the_panel_says(settings, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    filled("b", some_pixels() / 255)
    chosen = [
        session.chosen_subject(bpy.context, "im3d", **given)
        for given in ({"file": str(tmp_path / "a.png")}, {"image": "b"}, {"views": str(tmp_path)}, {"prompt": "c"})
    ]
    assert [(subject.title, subject.kind) for subject in chosen] == [
        ("a", "picture"), ("b", "image"), (tmp_path.name, "views"), ("c", "prompt")
    ]  # fmt: skip
    with pytest.raises(KilnError, match="There is no image 'nobody'"):
        session.chosen_subject(bpy.context, "im3d", image="nobody")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("clip.mp4", "clip.mp4 is a video, not a picture"),
        ("fox.exr", "fox.exr is no picture of a kind that Kiln reads"),
        ("nowhere.png", "There is no file"),
        ("folder.png", "is a folder, not a picture"),
    ],
)
def test_a_file_that_is_no_picture_is_said_with_the_way_out(settings, tmp_path, name, sentence):
    for known in ("clip.mp4", "fox.exr"):
        (tmp_path / known).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    settings.picture_file = str(tmp_path / name)
    with pytest.raises(RuntimeError, match=sentence):
        bpy.ops.kiln.generate(recipe="im3d")
    assert session.current.notices[-1].error.hint and session.current.capture is None


def test_a_folder_without_views_is_said(settings, tmp_path):
    settings.picture_source, settings.picture_views = "VIEWS", str(tmp_path)
    with pytest.raises(RuntimeError, match="holds no pictures. A turntable needs 4 or more"):
        bpy.ops.kiln.generate(recipe="im3d")


@pytest.mark.parametrize("source", ["MOVIE", "SEQUENCE", "TILED"])
def test_an_image_that_is_not_one_picture_is_said(settings, source):
    image = filled("many", some_pixels() / 255)
    image.source = source
    settings.picture_source, settings.picture_image = "IMAGE", image
    with pytest.raises(RuntimeError, match="not one picture"):
        bpy.ops.kiln.generate(recipe="im3d")


def test_an_image_whose_file_is_gone_or_that_is_too_large_is_said(tmp_path):
    image = bpy.data.images.new("gone", 4, 4)
    image.source, image.filepath_raw = "FILE", str(tmp_path / "gone.png")
    with pytest.raises(KilnError, match="gone cannot be written as a picture"):
        picture_input.save(image, tmp_path / "out.png")
    with pytest.raises(KilnError, match="8200 x 4 pixels; 8192 a side"):
        picture_input.save(bpy.data.images.new("wide", 8200, 4), tmp_path / "out.png")
    assert "Kiln picture" not in bpy.data.scenes


def kinds_of_images(folder):
    """Name and image, each of which shows `some_pixels()`."""
    pixels = some_pixels()
    Image.fromarray(pixels).save(folder / "file.png")
    yield "a file", bpy.data.images.load(str(folder / "file.png"))
    packed = bpy.data.images.load(str(folder / "file.png"), check_existing=False)
    packed.pack()
    packed.filepath_raw = "//gone.png"
    yield "packed, without its file", packed
    yield "generated", filled("generated", pixels / 255)
    painted = bpy.data.images.load(str(folder / "file.png"), check_existing=False)
    painted.pixels.foreach_set(np.ones(pixels.size, np.float32))
    painted.pixels.foreach_set((pixels[::-1] / 255).astype(np.float32).ravel())
    yield "painted on, not saved", painted
    data = bpy.data.images.load(str(folder / "file.png"), check_existing=False)
    data.colorspace_settings.name = "Non-Color"
    yield "shown as it is", data
    floats = pixels / 255
    floats[..., :3] = linear(floats[..., :3]) * floats[..., 3:]  # Blender's floats are linear with alpha multiplied in
    yield "floats", filled("floats", floats, float_buffer=True)
    scene = bpy.data.scenes.new("writer")
    scene.render.image_settings.file_format, scene.render.image_settings.color_mode = "OPEN_EXR", "RGBA"
    scene.render.image_settings.color_depth = "32"
    bpy.data.images["floats"].save_render(str(folder / "file.exr"), scene=scene)
    bpy.data.scenes.remove(scene)
    yield "an EXR file", bpy.data.images.load(str(folder / "file.exr"))


@pytest.mark.oldest
def test_an_image_is_sent_as_it_looks_however_it_is_stored(tmp_path):
    for name, image in kinds_of_images(tmp_path):
        sent = np.asarray(Image.open(picture_input.save(image, tmp_path / "out.png")))
        off = np.abs(sent.astype(int) - some_pixels()).max()
        assert sent.shape == some_pixels().shape and off <= 1, f"{name}: off by {off}"
    encoded = bpy.data.images.load(str(tmp_path / "file.png"), check_existing=False)
    encoded.colorspace_settings.name = "Linear Rec.709"  # the same bytes mean lighter colours
    sent = np.asarray(Image.open(picture_input.save(encoded, tmp_path / "out.png")))[..., :3] / 255
    assert np.abs(linear(sent) - some_pixels()[..., :3] / 255).max() < 0.01


def test_a_picture_that_is_dropped_becomes_the_source_and_blenders_own_drop_stays(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "fox.webp")
    assert bpy.ops.kiln.use_picture(filepath=str(tmp_path / "fox.webp")) == {"FINISHED"}
    chosen = bpy.context.scene.kiln
    assert (chosen.recipe, chosen.picture_source, chosen.picture_file) == ("im3d", "FILE", str(tmp_path / "fox.webp"))
    assert session.chosen_subject(bpy.context).title == "fox"
    with pytest.raises(RuntimeError, match="is a video"):
        bpy.ops.kiln.use_picture(filepath=str(tmp_path / "fox.mp4"))
    handler = operators.KILN_FH_picture
    assert set(handler.bl_file_extensions.split(";")) == set(picture.SUFFIXES) and handler.bl_import_operator == "kiln.use_picture"
    assert {".png", ".jpg"} <= set(bpy.types.VIEW3D_FH_empty_image.bl_file_extensions.split(";"))


# The turntable of a finished job


@pytest.fixture
def viewed(tmp_path):
    """A job that stopped after its views, which are here."""
    parameters = recipes.values(recipes.make("im3d", {"generate.only": True, "generate.rerolls": "3"}))
    results = {f"view_{number:03d}.png": {"hash": "0" * 64, "size": 1} for number in range(8)} | {"turntable.png": {}, "report.json": {}}
    data = record("a", "done", recipe="im3d", parameters=parameters, results=results, source={"kind": "picture", "title": "Fox"})
    job = session.current.jobs["a"] = session.Job(data, file=session.current.file, wants_import=True)
    session.current._sync_rows(select="a")
    return job


def arrived(job, ordered):
    """The views that were asked for, as if they had come."""
    order, values, then = ordered[-1]
    assert order == "fetch"
    values["folder"].mkdir(parents=True)
    for number, name in enumerate(values["results"]):
        Image.new("RGBA", (8, 8), (30 * number, 0, 0, 255)).save(values["folder"] / name)
    then(values["folder"], None)


def test_the_views_of_a_chosen_job_are_fetched_once_and_nothing_is_imported(viewed, quiet_session):
    now = session.current
    now._bring_in()
    now._bring_in()
    assert [(order, list(values["results"])) for order, values, _ in quiet_session] == [
        ("fetch", [f"view_{number:03d}.png" for number in range(8)])
    ]
    assert viewed.wants_import is False
    arrived(viewed, quiet_session)
    assert list(viewed.turntable.pictures) == list(range(8))
    assert all(f"a/view_{number}" in now.pictures for number in range(8))
    with pytest.raises(RuntimeError, match="stopped after its views"):
        bpy.ops.kiln.import_job(job="a")
    folder = viewed.turntable.folder
    now._forget(viewed)
    assert not folder.exists() and not [name for name in now.pictures if name.startswith("a/")]


def test_views_are_marked_replaced_and_kept_again(viewed, quiet_session, tmp_path):
    session.current._bring_in()
    arrived(viewed, quiet_session)
    table = viewed.turntable
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.jpg")
    assert table.sentence() == ""
    for view in (5, 2, 5, 7):
        bpy.ops.kiln.reroll_view(job="a", view=view)
    assert table.again == {2, 7}
    bpy.ops.kiln.replace_view(job="a", view=7, filepath=str(tmp_path / "mine.jpg"))
    bpy.ops.kiln.replace_view(job="a", view=4, filepath=str(tmp_path / "mine.jpg"))
    assert table.again == {2} and sorted(path.name for path in table.replaced.values()) == ["replace_004.jpg", "replace_007.jpg"]
    assert table.sentence() == "View 2 to be generated anew, views 4 and 7 replaced."
    bpy.ops.kiln.reroll_view(job="a", view=4)
    assert table.again == {2, 4} and list(table.replaced) == [7]
    with pytest.raises(RuntimeError, match="View 0 is the picture itself"):
        bpy.ops.kiln.reroll_view(job="a", view=0)
    with pytest.raises(RuntimeError, match="no view 8"):
        bpy.ops.kiln.reroll_view(job="a", view=8)
    with pytest.raises(RuntimeError, match="is a video"):
        bpy.ops.kiln.replace_view(job="a", view=1, filepath=str(tmp_path / "mine.mp4"))
    assert table.again == {2, 4} and list(table.replaced) == [7]


@pytest.mark.parametrize("only", [True, False])
def test_going_on_is_the_same_job_with_what_is_wanted_of_its_views(viewed, quiet_session, tmp_path, only):
    session.current._bring_in()
    arrived(viewed, quiet_session)
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    for view in (6, 3):
        bpy.ops.kiln.reroll_view(job="a", view=view)
    bpy.ops.kiln.replace_view(job="a", view=1, filepath=str(tmp_path / "mine.png"))
    made = session.current.go_on(viewed, only)
    order, values, _ = quiet_session[-2]
    assert (order, values["base"], list(values["inputs"])) == ("submit", "a", ["replace_001.png"])
    assert quiet_session[-1][:2] == ("take", {"job": "a"})
    assert values["without"] == ("replace_001.", "replace_003.", "replace_006.")
    before = viewed.data["parameters"]
    assert values["values"] == {**before, "generate.rerolls": "3 3 6", "generate.only": only}
    assert values["source"] == viewed.data["source"] and made.data["id"] in session.current.jobs
    assert values["inputs"]["replace_001.png"].read_bytes() == (tmp_path / "mine.png").read_bytes()
    assert not viewed.turntable.edited, "what was wanted is under way"


def test_the_link_sends_the_first_jobs_inputs_but_those_that_are_superseded():
    class Backend:
        def job(self, name):
            return {"inputs": {"image.png": "i", "replace_001.jpg": "old", "replace_010.png": "stays"}}

        def submit(self, recipe, values, inputs, **rest):
            return inputs

    link = backend_link.Link.__new__(backend_link.Link)
    link._client = Backend()
    sent = link._order_submit(1, "im3d", {}, {"replace_001.png": "new"}, "t", {}, "id", "a", ("replace_001.",))
    assert sent == {"image.png": "i", "replace_010.png": "stays", "replace_001.png": "new"}


@pytest.mark.parametrize(("before", "again", "after"), [("", [], ""), ("", [7, 3], "3 7"), ("7, 3;7", [3], "7 3 7 3"), ("  1 ", [], "1")])
def test_rerolls_are_added_behind_those_of_before(before, again, after):
    assert picture.rerolled(before, again) == after


def test_rerolls_that_fill_the_line_are_refused(viewed, tmp_path):
    table = turntable.Turntable(tmp_path, again={5})
    viewed.data["parameters"]["generate.rerolls"] = " ".join(["11"] * 67)
    with pytest.raises(KilnError, match="generate.rerolls cannot be"):
        turntable.onward(viewed.data, table, True)


def test_the_views_of_a_users_own_turntable_are_shown_and_not_changed(viewed, quiet_session):
    viewed.data["source"] = {"kind": "views"}
    session.current._bring_in()
    arrived(viewed, quiet_session)
    with pytest.raises(RuntimeError, match="no view 0 to change"):
        bpy.ops.kiln.reroll_view(job="a", view=0)


# Memory


def test_a_render_has_the_backend_give_back_memory_and_our_own_renders_do_not(monkeypatch):
    asked = []
    monkeypatch.setattr(session.current, "link", SimpleNamespace(ask=asked.append))
    scene = bpy.context.scene
    scene.camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    scene.render.engine, scene.cycles.samples, scene.render.resolution_x, scene.render.resolution_y = "CYCLES", 1, 8, 8
    bpy.ops.render.render()
    assert asked == ["release"]
    monkeypatch.setattr(session.current, "capture", (1, 2, "views"))
    bpy.ops.render.render()
    assert asked == ["release"]
    monkeypatch.setattr(session.current, "capture", None)
    bpy.ops.wm.read_homefile(use_factory_startup=True, use_empty=True)
    assert session._renders in bpy.app.handlers.render_init, "in the next file too"


def test_only_a_backend_on_this_machine_is_asked_for_its_memory():
    released = []
    link = backend_link.Link.__new__(backend_link.Link)
    for link._client, remote in ((None, None), (SimpleNamespace(release=lambda: released.append(1)), "file.json")):
        link._where = SimpleNamespace(remote=remote)
        link._local_release(1)
    assert not released
    link._where = SimpleNamespace(remote=None)
    link._local_release(1)
    assert released == [1]


# The asset of a picture


def results_on_the_ground(folder):
    """What the backend makes of a picture: 0.5 m long, on the ground over the origin."""
    bpy.ops.mesh.primitive_cone_add(radius1=0.25, depth=0.4, location=(0, 0, 0.2))
    thing = bpy.context.object
    make_results(folder, thing)
    bpy.data.objects.remove(thing)


def source_at(cursor, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "fox.png")
    bpy.context.scene.cursor.location = cursor
    work = picture_input.Gathering(picture_input.subject(bpy.context, "", file=tmp_path / "fox.png"), tmp_path)
    assert not work.step()
    inputs, source = work.finish()
    assert inputs == {"image.png": tmp_path / "fox.png"}
    return json.loads(json.dumps(source))


PROVENANCE = {"recipe": "im3d", "parameters": {"seed": 7}, "job": "job-1", "kiln": "1.2.3"}


@pytest.mark.oldest
@pytest.mark.parametrize("unit_scale", [1.0, 0.01])
def test_the_asset_of_a_picture_stands_at_the_cursor_selected_in_one_undo_step(tmp_path, unit_scale):
    results_on_the_ground(tmp_path / "results")
    bpy.context.scene.unit_settings.scale_length = unit_scale
    bpy.ops.mesh.primitive_cube_add(location=(9, 9, 9))
    bpy.ops.ed.undo_push(message="cube")
    source = source_at((1, -2, 3), tmp_path)
    bpy.context.scene.cursor.location = (7, 7, 7)  # moved since: the asset comes in where it was asked for
    made = import_asset.import_asset(bpy.context, tmp_path / "results", source, PROVENANCE)
    corners = world_vertices(made.mesh_object)
    assert np.allclose(corners.min(0), np.array([1, -2, 3]) + np.array([-0.25, -0.25, 0]) / unit_scale, atol=1e-4 / unit_scale)
    assert np.allclose(corners.max(0), np.array([1, -2, 3]) + np.array([0.25, 0.25, 0.4]) / unit_scale, atol=1e-4 / unit_scale)
    assert np.allclose(made.mesh_object.location, (1, -2, 3))
    assert [thing.name for thing in bpy.context.view_layer.objects if thing.select_get()] == [made.mesh_object.name]
    assert bpy.context.view_layer.objects.active == made.mesh_object
    assert made.collection.name in bpy.context.scene.collection.children and made.collection["kiln_recipe"] == "im3d"
    bpy.ops.ed.undo()
    assert [thing.name for thing in bpy.data.objects] == ["Cube"] and bpy.data.objects["Cube"].select_get()


def test_it_comes_into_another_file_and_from_the_command_line_too(tmp_path):
    results_on_the_ground(tmp_path / "results")
    source = source_at((1, 2, 3), tmp_path)
    bpy.ops.wm.read_homefile(use_factory_startup=True, use_empty=True)
    bpy.context.scene.name = "elsewhere"
    for given, place in ((source, (1, 2, 3)), ({"input": "fox.png", "preset": "draft"}, (0, 0, 0))):
        made = import_asset.import_asset(bpy.context, tmp_path / "results", given, PROVENANCE)
        assert np.allclose(world_vertices(made.mesh_object).min(0), np.array(place) + (-0.25, -0.25, 0), atol=1e-4)
        assert made.mesh_object.select_get()


def test_views_with_cameras_keep_the_place_that_these_tell(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "transforms.json").write_text(json.dumps({"frames": [{"file_path": "a.png"}]}))
    bpy.context.scene.cursor.location = (5, 5, 5)
    work = picture_input.Gathering(picture_input.subject(bpy.context, "", views=tmp_path), tmp_path)
    assert work.steps == 2 and [work.step(), work.step()] == [True, False]
    inputs, source = work.finish()
    assert set(inputs) == {"transforms.json", "a.png"} and source["location"] == [0, 0, 0] and "anchor" not in source


def test_scripts_have_it_too(monkeypatch, tmp_path):
    results_on_the_ground(tmp_path / "results")
    Image.new("RGB", (8, 8)).save(tmp_path / "fox.png")
    filled("painted", some_pixels() / 255)
    (tmp_path / "turn").mkdir()
    for number in range(4):
        shutil.copyfile(tmp_path / "fox.png", tmp_path / "turn" / f"{number}.png")
    seen = []

    def at_once(shoot):
        seen.append((shoot.capture.subject.kind, shoot.capture.subject.title, shoot.recipe.generate.model, shoot.recipe.generate.prompt))
        shoot.close()
        source = {"title": "Fox", "kind": "picture"}
        results = shutil.copytree(tmp_path / "results", tmp_path / f"job {len(seen)}")
        return session.Job(record("a", "done", recipe="im3d", parameters=recipes.values(shoot.recipe), source=source), results=results)

    monkeypatch.setattr(session.Shoot, "all_at_once", at_once)
    monkeypatch.setattr(session.Session, "wait_for_results", lambda self, job, everything=False: None)
    made = api.picture_to_3d(tmp_path / "fox.png", model="kiln-tiny-turntable", preset="draft")
    assert made.mesh_object.select_get() and made.collection.name == "Fox (Kiln)"
    api.picture_to_3d("painted", prompt="a fox")
    api.picture_to_3d(prompt="a fox")
    api.picture_to_3d(views=tmp_path / "turn")
    assert [(kind, title) for kind, title, _, _ in seen] == [
        ("picture", "fox"), ("image", "painted"), ("prompt", "a fox"), ("views", "turn")
    ]  # fmt: skip
    assert seen[0][2:] == ("kiln-tiny-turntable", "") and seen[1][3] == "a fox"
    for wrong in ({}, {"image": "a.png", "views": "b"}, {"prompt": "a", "generate_only": True}):
        with pytest.raises(KilnError):
            api.picture_to_3d(**wrong)
