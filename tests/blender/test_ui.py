"""The panel's controls come from the recipes' definitions, its texts fit, and switching the extension off leaves nothing behind."""

import threading

import addon_utils
import bpy
import pytest
from bl_ext.kiln_test.kiln import panel, properties, session
from bl_ext.kiln_test.kiln.protocol import estimates, recipes

MODULE = "bl_ext.kiln_test.kiln"
RECIPES = list(recipes.RECIPES.values())


def group(recipe):
    return getattr(bpy.context.scene.kiln, recipe.NAME)


@pytest.mark.oldest
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.NAME)
def test_every_recipe_parameter_is_a_control_with_its_default_range_and_sentence(recipe):
    controls = group(recipe).bl_rna.properties
    for parameter in recipes.parameters(recipe):
        control = controls[parameter.name.replace(".", "_")]
        assert control.description + "." == parameter.help or control.description == parameter.help
        if parameter.options:
            assert [item.identifier for item in control.enum_items] == [value for value, _ in parameter.options]
            assert control.default == parameter.default
        elif parameter.type in (bool, str):
            assert control.default == parameter.default
        else:
            assert (control.hard_min, control.hard_max) == (pytest.approx(parameter.low), pytest.approx(parameter.high))
            assert control.default == pytest.approx(parameter.default)


@pytest.mark.oldest
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.NAME)
def test_an_untouched_panel_asks_for_exactly_the_standard_preset(recipe):
    assert properties.values(group(recipe), recipe) == recipes.values(recipes.make(recipe.NAME))


@pytest.mark.parametrize("preset", ["draft", "high"])
def test_choosing_a_preset_sets_every_parameter_and_counts_as_unchanged(preset):
    controls = group(recipes.Reconstruct)
    controls.fit_iterations = 77
    controls.preset = preset
    assert properties.values(controls, recipes.Reconstruct) == recipes.values(recipes.make("reconstruct", preset=preset))
    assert properties.changed(controls, recipes.Reconstruct) == []


def test_a_changed_parameter_is_named_and_reset_puts_it_back():
    controls = group(recipes.Reconstruct)
    controls.preset = "draft"
    controls.fit_iterations, controls.fit_ssim_weight = 777, 0.3
    assert properties.changed(controls, recipes.Reconstruct) == ["fit.iterations", "fit.ssim_weight"]
    assert properties.values(controls, recipes.Reconstruct)["fit.ssim_weight"] == 0.3  # not 0.30000001192092896
    bpy.ops.kiln.reset_parameters()
    assert controls.fit_iterations == recipes.Reconstruct.PRESETS["draft"]["fit.iterations"]
    assert properties.changed(controls, recipes.Reconstruct) == []


def test_settings_are_saved_with_the_file(tmp_path):
    controls = group(recipes.Reconstruct)
    controls.preset = "high"
    controls.surface_faces = 1234
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "scene.blend"))
    bpy.ops.wm.read_homefile(use_empty=True)
    assert group(recipes.Reconstruct).surface_faces != 1234
    bpy.ops.wm.open_mainfile(filepath=str(tmp_path / "scene.blend"))
    assert (group(recipes.Reconstruct).preset, group(recipes.Reconstruct).surface_faces) == ("high", 1234)


@pytest.mark.parametrize("width", [1, 7, 12, 40, 500])
def test_wrapped_text_never_exceeds_the_width_and_loses_no_letter(width):
    text = "There is no room left in /home/anna/.config/blender/5.2/extensions/user: 0.1 GB.\nMake room, then try again."
    lines = panel.wrapped(text, width, len)
    assert max(map(len, lines)) <= width
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")


def test_words_are_kept_whole_where_they_fit():
    assert panel.wrapped("one two three", 8, len) == ["one two", "three"]


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (59, "59 s"), (62, "1 min 02 s"), (3661, "1 h 01 min")])
def test_times_read_like_times(seconds, words):
    assert panel.time_text(seconds) == words


@pytest.mark.oldest
def test_switching_off_and_on_again_leaves_no_thread_handler_or_property_behind():
    assert session.current is not None
    session.current.connect()
    folder = session.current.folder
    for _ in range(2):
        addon_utils.disable(MODULE)
        assert session.current is None
        assert not folder.exists()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("Kiln")]
        assert not [handler for handler in bpy.app.handlers.load_post if "kiln" in getattr(handler, "__module__", "")]
        assert not hasattr(bpy.types.Scene, "kiln") and not hasattr(bpy.types.WindowManager, "kiln")
        assert not hasattr(bpy.types, "KILN_PT_generate")
        addon_utils.enable(MODULE, default_set=True)
        session.current.connect()
        folder = session.current.folder
    assert bpy.context.scene.kiln.recipe in recipes.RECIPES


def test_opening_another_file_keeps_the_session_and_its_jobs():
    before = session.current
    before.jobs["a"] = session.Job(record("a", "done"))
    before._sync_rows()
    bpy.ops.wm.read_homefile(use_empty=True)
    assert session.current is before
    assert [row.name for row in bpy.context.window_manager.kiln.jobs] == ["a"]


def test_jobs_are_listed_newest_first_and_the_chosen_one_stays_chosen():
    now, window = session.current, bpy.context.window_manager.kiln
    for number, name in enumerate("abc"):
        now.jobs[name] = session.Job(record(name, "done", created=number))
    now._sync_rows(select="a")
    assert [row.name for row in window.jobs] == ["c", "b", "a"]
    now.jobs["d"] = session.Job(record("d", "queued", created=9))
    now._sync_rows()
    assert window.jobs[window.active_job].name == "a"


def test_pictures_of_a_moving_result_turn_come_to_rest_and_go_with_the_job(tmp_path):
    now = session.current
    job = now.jobs["a"] = session.Job(record("a", "done", recipe="animate"), results=tmp_path)
    for number in range(3):
        picture = bpy.data.images.new("turn", 8, 8)
        picture.filepath_raw, picture.file_format = str(tmp_path / f"turntable_{number:02}.png"), "PNG"
        picture.save()
        bpy.data.images.remove(picture)
    now._show_turntable(job)
    shown = []
    for _ in range(3 * session.TURNS + 2):
        shown.append(now.picture_now(job))
        now.turned_from -= session.TURN
    assert shown == ["a/turntable_00", "a/turntable_01", "a/turntable_02"] * session.TURNS + ["a/turntable_00"] * 2
    assert set(shown) <= set(now.pictures)
    now._forget(job)
    assert not [name for name in now.pictures if name.startswith("a")]


def test_the_splats_of_each_frame_are_fetched_only_where_they_are_wanted(monkeypatch):
    now, asked = session.current, []
    names = ["mesh.glb", "splats.ply", "splats_0001.ply", "splats_n0012.5.ply", "turntable_00.png"]
    job = session.Job(record("b", "done", results={name: {"hash": "0" * 64, "size": 1} for name in names}))
    monkeypatch.setattr(now, "ask", lambda order, then, **values: asked.append(set(values["results"])) or 1)
    now.fetch(job), now.fetch(job, everything=True)
    assert asked == [{"mesh.glb", "splats.ply", "turntable_00.png"}, set(names)]


def test_the_expected_time_is_that_of_a_job_with_exactly_these_parameters_or_none():
    now = session.current
    standard, draft = (recipes.values(recipes.make("reconstruct", preset=preset)) for preset in ("standard", "draft"))
    now.jobs["a"] = session.Job(record("a", "done", parameters=draft, started=100.0, finished=142.0))
    assert now.expected_seconds("reconstruct", draft) == 42.0
    assert now.expected_seconds("reconstruct", standard) is None


def test_the_estimate_follows_what_this_backend_took_and_before_that_its_cores():
    now = session.current
    standard, draft = (recipes.values(recipes.make("reconstruct", preset=preset)) for preset in ("standard", "draft"))
    now.jobs.clear()
    now.backend = {**now.backend, "hello": {"device": {"kind": "cpu", "cores": 2}}}
    now._sync_rows()
    guess = now.estimate("reconstruct", standard)
    assert guess == estimates.estimate("reconstruct", standard)
    took = 4 * estimates.backend_seconds("reconstruct", draft)
    now.jobs["a"] = session.Job(record("a", "done", parameters=draft, started=100.0, finished=100.0 + took))
    now.jobs["b"] = session.Job(record("b", "done", parameters=draft, started=300.0, finished=300.5))  # found its stages finished
    now.jobs["c"] = session.Job(record("c", "done", parameters={"of": "another version"}, started=1.0, finished=2.0))
    now._sync_rows()
    in_blender = estimates.blender_seconds("reconstruct", standard)
    assert now.estimate("reconstruct", standard).seconds - in_blender == pytest.approx(4 * (guess.seconds - in_blender))
    assert now.estimate("reconstruct", draft).seconds == pytest.approx(took + estimates.blender_seconds("reconstruct", draft))
    assert now.speed("mesh_splats") == pytest.approx(0.25), "of another recipe's jobs where there are none of its own"
    now.backend = {**now.backend, "hello": {"device": {"kind": "cpu", "cores": 16}}}
    now.jobs.clear()
    now._sync_rows()
    assert 1 < now.speed("reconstruct") < 8
    now.backend = {**now.backend, "hello": None}


def test_a_preset_says_in_its_tooltip_and_below_what_it_takes():
    now = session.current
    now.jobs.clear()
    now._sync_rows()
    items = properties._preset_items_now(recipes.Reconstruct)
    assert [item[0] for item in items] == list(recipes.Reconstruct.PRESETS)
    for name, _, told, _, _ in items:
        expected = now.estimate("reconstruct", recipes.values(recipes.make("reconstruct", preset=name)))
        assert panel.estimate_text(expected) in told
    text = panel.estimate_text(estimates.Estimate(25.2, 1.12e9))
    assert text == "About 25 s, 1.1 GB of memory"


def test_a_job_that_needs_more_memory_than_is_free_is_warned_about():
    now = session.current
    now.backend = {**now.backend, "hello": {"device": {"kind": "cpu", "cores": 2, "free_memory": 900_000_000}}}
    assert "900 MB" in panel.memory_warning(estimates.Estimate(1, 1.2e9))
    assert panel.memory_warning(estimates.Estimate(1, 0.8e9)) == ""
    now.backend = {**now.backend, "hello": None}
    assert panel.memory_warning(estimates.Estimate(1, 1e15)) == "", "unknown is not too little"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (7.4, "7 s"), (33, "35 s"), (98, "1 min 40 s"), (131, "2 min 10 s"), (700, "12 min"), (4000, "1 h 05 min")],
)
def test_estimated_times_have_no_more_digits_than_they_deserve(seconds, words):
    assert panel.about_text(seconds) == words


def test_a_gpu_that_cannot_be_used_counts_as_none():
    now = session.current
    for problem, used in (({}, True), ({"problem": "no engine runs on it"}, False)):
        now.backend = {**now.backend, "hello": {"device": {"kind": "cuda", "name": "A card", **problem}}}
        assert now.gpu is used
    now.backend = {**now.backend, "hello": None}


def test_a_log_line_of_a_running_job_is_kept_for_the_panel_and_a_cached_stage_is_remembered():
    now = session.current
    now.jobs["a"] = session.Job(record("a", "running"))
    now._on_event({"job": "a", "kind": "log", "text": "The GPU is not used: there is no NVIDIA driver"})
    now._on_event({"job": "a", "kind": "stage", "stage": "Fit splats", "cached": True})
    assert now.jobs["a"].log == ["The GPU is not used: there is no NVIDIA driver"] and now.jobs["a"].cached


def test_an_import_says_what_it_waits_for_and_the_button_puts_a_running_tool_aside(monkeypatch):
    job = session.Job(record("a", "done"), wants_import=True)
    assert session.why_import_waits(job) == ""
    bpy.ops.mesh.primitive_cube_add()
    bpy.ops.object.mode_set(mode="EDIT")
    assert "Object Mode" in session.why_import_waits(job)
    bpy.ops.object.mode_set(mode="OBJECT")
    monkeypatch.setattr(session.current, "capture", (1, 2, "Pot"))
    assert "render" in session.why_import_waits(job)


def test_show_switches_every_import_of_the_job(monkeypatch):
    shown = []
    monkeypatch.setattr(session.import_asset, "show", lambda collection, what: shown.append((collection.name, what)))
    monkeypatch.setattr(session.Session, "need_jobs", lambda self: None)
    session.current.jobs["a"] = session.Job(record("a", "done"))
    for name, job in (("Pot", "a"), ("Pot again", "a"), ("Other", "b")):
        bpy.data.collections.new(name)["kiln_job"] = job
    bpy.ops.kiln.show(job="a", what="splats")
    assert shown == [("Pot", "splats"), ("Pot again", "splats")]


def test_another_choice_answers_what_was_asked_of_the_one_before_and_a_set_up_holds_it_up(monkeypatch, tmp_path):
    now, answers = session.current, []
    now.connect()
    now._then[-1] = lambda result, error: answers.append(error.code)
    link = now.link
    monkeypatch.setattr(session, "where", lambda: session.Where(log=tmp_path / "log"))
    monkeypatch.setattr(now, "setting_up", object())
    now._look_again = 0.0
    now.connect()
    assert now.link is link and answers == []
    now.setting_up = None
    now._look_again = 0.0
    now.connect()
    assert now.link is not link and answers == ["unavailable"]


@pytest.mark.parametrize(("name", "label"), [("fit.sh_degree", "SH degree"), ("fit.ssim_weight", "SSIM weight"), ("seed", "Seed")])
def test_labels_write_abbreviations_in_capitals(name, label):
    assert next(one for one in recipes.parameters(recipes.Reconstruct) if one.name == name).label == label


def record(name, state, **changes):
    """A job as the backend tells it."""
    return {
        "id": name, "recipe": "reconstruct", "parameters": {}, "title": name, "source": {}, "state": state, "stage": "", "fraction": 0.0,
        "text": "", "created": 0.0, "started": None, "finished": None, "attempts": 1, "error": None, "results": {}, "inputs": {}, **changes,
    }  # fmt: skip
