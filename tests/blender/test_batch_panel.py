"""The panel Batch: what it asks for, what it shows of each state, how results come in, and what it refuses. Batches are folders written
here; that of a real run is tests/end_to_end/test_batch.py's."""

import _thread
import fnmatch
import json
import os
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import bpy
import pytest
from bl_ext.kiln_test.kiln import api, batch_panel, batches, commands, operators, panel, properties, session
from bl_ext.kiln_test.kiln.protocol import recipes
from bl_ext.kiln_test.kiln.protocol.errors import KilnError

from tests.blender.layout import Button, Layout


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Kiln's home, with no batch in it; a backend environment counts as there."""
    folder = tmp_path / "home"
    monkeypatch.setenv("KILN_HOME", str(folder))
    monkeypatch.setenv("KILN_BACKEND_PYTHON", sys.executable)
    monkeypatch.setattr(batch_panel, "known", batch_panel.Batches())
    monkeypatch.setattr(panel, "draw_text", lambda layout, context, text, icon="NONE", indent=0.0: layout.label(text=text, icon=icon))
    session.current._look_again = 0.0
    yield folder
    session.current.notices.clear()
    session.current._look_again = 0.0


@pytest.fixture
def alive():
    """The number of a process that lives."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate(b"\n")


DEAD = 2**22 + 7  # beyond what a process's number can be


def cube(name, location=(0, 0, 0)):
    bpy.ops.mesh.primitive_cube_add(location=location)
    bpy.context.object.name = name
    return bpy.context.object


def select(*things):
    for thing in bpy.context.scene.objects:
        thing.select_set(thing in things)


def item(name, state="waiting", **changes):
    """An item as report.json tells it (docs/batch.md)."""
    return {
        "name": name, "file": "scene.blend", "object": name, "recipe": "reconstruct", "preset": "draft", "state": state, "stage": "",
        "fraction": 0.0, "text": "", "attempts": 0, "error": None, "warnings": [], "folder": "", "seconds": {}, "figures": {}, **changes,
    }  # fmt: skip


def make(home, state="running", items=(), pid=DEAD, id="20260101-000000-aaaaaa", began=0.0, **order):
    """A batch's folder, and its report where `state` is one."""
    folder = home / "batches" / id
    out = Path(order.pop("out", folder / "results"))
    folder.mkdir(parents=True)
    out.mkdir(parents=True, exist_ok=True)
    now = time.time()
    told = batches.Order("Props", now, str(folder / "manifest.toml"), str(out), **order)
    (folder / "batch.json").write_text(json.dumps(batches.dataclasses.asdict(told)))
    (folder / "pid").write_text(str(pid))
    (folder / "log.txt").write_text("kiln: Blender is missing.\n      Install it.\n")
    if state:
        report = {
            "state": state, "pid": pid, "begun": now + began, "updated": now + began, "seconds_left": 90.0, "items": list(items),
            "error": None, "library": None,
        }  # fmt: skip
        (out / "report.json").write_text(json.dumps(report))
    return folder


def drawn():
    """What a person sees of the panel, and its buttons by what stands on them."""
    batch_panel.known.refresh()
    layout = Layout()
    stand_in = type(
        "Drawn", (), {"layout": layout, **{name: getattr(batch_panel.KILN_PT_batch, name) for name in ("draw_order", "draw_batch")}}
    )
    batch_panel.KILN_PT_batch.draw(stand_in, bpy.context)
    buttons = {one.label: one for one in layout.seen if isinstance(one, Button)}
    words = " | ".join(one if isinstance(one, str) else one[0] for one in layout.seen if not isinstance(one, Button))
    return words, buttons


def refused(call, *arguments, **given):
    with pytest.raises(KilnError) as failure:
        call(*arguments, **given)
    assert failure.value.message.endswith(".") and (failure.value.hint == "" or failure.value.hint.endswith((".", ")")))
    return failure.value.code


# What is asked for


@pytest.mark.oldest
def test_each_selected_surface_becomes_an_item_of_a_manifest_with_the_panels_parameters_and_the_file_stays_as_it_is(tmp_path):
    odd, plain = cube('Ring [1]* "ö😀\\'), cube("Box")
    bpy.ops.object.light_add()
    lamp = bpy.context.object
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "mine.blend"))
    select(odd, plain, lamp)
    settings = bpy.context.scene.kiln
    settings.reconstruct.preset = "draft"
    settings.reconstruct.surface_faces, settings.reconstruct.game_engine = 1234, "godot"
    odd.location.x, name = 5, odd.name
    batch = batch_panel.ordered(bpy.context)
    assert bpy.data.filepath == str(tmp_path / "mine.blend")
    told = tomllib.loads(Path(batch.order.manifest).read_text("utf-8"))
    assert told["defaults"] == {
        "recipe": "reconstruct", "preset": "draft", "parameters": {"surface.faces": 1234, "game.engine": "godot"},
    }  # fmt: skip
    assert {one["file"] for one in told["items"]} == {"scene.blend"}
    patterns = [one["object"] for one in told["items"]]
    assert [[thing.name for thing in (odd, plain, lamp) if fnmatch.fnmatchcase(thing.name, one)] for one in sorted(patterns)] == [
        ["Box"], [odd.name],
    ]  # fmt: skip
    assert batch.order.wants_import and batch.order.title == f"{odd.name} and 1 more"
    bpy.ops.wm.open_mainfile(filepath=str(batch.folder / "scene.blend"))
    assert bpy.data.objects[name].location.x == 5, "what was not saved yet counts"
    bpy.ops.wm.open_mainfile(filepath=str(tmp_path / "mine.blend"))
    assert bpy.data.objects[name].location.x == 0, "the file itself was not written"


def test_a_copy_finds_what_the_file_names_relatively(tmp_path):
    image = bpy.data.images.new("wood", 4, 4)
    image.filepath_raw, image.file_format = str(tmp_path / "wood.png"), "PNG"
    image.save()
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "mine.blend"))
    image.filepath, image.use_fake_user = "//wood.png", True
    select(cube("Box"))
    batch = batch_panel.ordered(bpy.context)
    assert image.filepath == "//wood.png"
    bpy.ops.wm.open_mainfile(filepath=str(batch.folder / "scene.blend"))
    assert Path(bpy.path.abspath(bpy.data.images["wood"].filepath)).resolve() == (tmp_path / "wood.png").resolve()


def test_a_collection_gives_its_objects_or_its_collections():
    chosen = bpy.context.scene.kiln.batch
    chosen.source = "COLLECTION"
    props = chosen.collection = bpy.data.collections.new("Props")
    bpy.context.scene.collection.children.link(props)
    for name in ("Chair", "Table"):
        child = bpy.data.collections.new(name)
        props.children.link(child)
        for part in ("Seat", "Legs"):
            thing = cube(f"{name} {part}")
            bpy.context.scene.collection.objects.unlink(thing)
            child.objects.link(thing)
    props.children.link(bpy.data.collections.new("Nothing"))
    assert [thing.name for thing in batch_panel.things(bpy.context)] == ["Chair Seat", "Chair Legs", "Table Seat", "Table Legs"]
    chosen.each = "COLLECTION"
    batch = batch_panel.ordered(bpy.context)
    told = tomllib.loads(Path(batch.order.manifest).read_text("utf-8"))
    assert [(one["collection"], one["name"]) for one in told["items"]] == [("Chair", "{object}"), ("Table", "{object}")]
    assert batch.order.title == "Props"


def test_a_folder_is_handed_over_as_it_is(tmp_path):
    (tmp_path / "props").mkdir()
    settings = bpy.context.scene.kiln
    settings.batch.source, settings.batch.folder, settings.batch.fbx = "FOLDER", str(tmp_path / "props"), True
    settings.reconstruct.preset = "draft"
    settings.reconstruct.capture_geometry = False
    order = batch_panel.ordered(bpy.context).order
    assert order.manifest == str(tmp_path / "props")
    assert order.options == ["--fbx", "--set", "capture.geometry=false", "--recipe", "reconstruct", "--preset", "draft"]


def test_a_library_is_asked_for_with_its_catalog_and_nothing_comes_into_this_file(tmp_path):
    chosen = bpy.context.scene.kiln.batch
    select(cube("Box"))
    chosen.results, chosen.library, chosen.catalog = "LIBRARY", str(tmp_path / "assets" / "props.blend"), "Props/Wood"
    order = batch_panel.ordered(bpy.context).order
    assert (order.library, order.options, order.wants_import) == (chosen.library, ["--catalog", "Props/Wood"], False)


def test_what_cannot_be_asked_for_is_refused_with_what_to_do_and_leaves_nothing(tmp_path, home, monkeypatch):
    chosen = bpy.context.scene.kiln.batch
    assert refused(batch_panel.ordered, bpy.context) == "nothing-selected"
    box = cube("Box")
    box.hide_render = True
    assert refused(batch_panel.ordered, bpy.context) == "bad-subject"
    box.hide_render = False
    chosen.results = "LIBRARY"
    assert refused(batch_panel.ordered, bpy.context) == "bad-library"
    chosen.results = "COLLECTION"
    (tmp_path / "file").write_text("")
    chosen.out = str(tmp_path / "file" / "out")
    assert refused(batch_panel.ordered, bpy.context) == "disk"
    chosen.out = ""
    painted = bpy.data.images.new("painted", 4, 4)
    painted.use_fake_user = True
    painted.pixels[0] = 0.5
    assert refused(batch_panel.ordered, bpy.context) == "unsaved-image"
    painted.pack()
    bpy.context.scene.kiln.recipe = "im3d"
    assert refused(batch_panel.ordered, bpy.context) == "bad-subject"
    bpy.context.scene.kiln.recipe = "mesh_splats"
    assert refused(batch_panel.ordered, bpy.context) == "nothing-selected"
    bpy.context.scene.kiln.recipe = "reconstruct"
    for source in ("COLLECTION", "FOLDER"):
        chosen.source = source
        assert refused(batch_panel.ordered, bpy.context) == "nothing-selected"
    chosen.folder = str(tmp_path / "none")
    assert refused(batch_panel.ordered, bpy.context) == "bad-input"
    chosen.source = "SELECTION"
    monkeypatch.delenv("KILN_BACKEND_PYTHON")
    session.current._look_again = 0.0
    assert refused(batch_panel.ordered, bpy.context) == "no-backend"
    assert not (home / "batches").exists() or not list((home / "batches").iterdir())


def test_a_library_file_that_is_gone_is_told_before_the_copy_loses_what_is_linked(tmp_path):
    cube("Linked")
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "library.blend"))
    bpy.ops.wm.read_homefile(use_empty=True)
    with bpy.data.libraries.load(str(tmp_path / "library.blend"), link=True) as (_, target):
        target.objects = ["Linked"]
    bpy.context.scene.collection.objects.link(bpy.data.objects["Linked"])
    select(cube("Box"))
    os.remove(tmp_path / "library.blend")
    assert refused(batch_panel.ordered, bpy.context) == "bad-library"


def test_two_batches_do_not_share_an_output_folder(tmp_path, home, alive):
    make(home, items=[item("Box", "computing")], pid=alive, out=str(tmp_path / "out"))
    batch_panel.known.refresh()
    select(cube("Box"))
    bpy.context.scene.kiln.batch.out = str(tmp_path / "out")
    assert refused(batch_panel.ordered, bpy.context) == "already-running"


@pytest.mark.parametrize("content", ['{"faces": 800, "parameters": {}}', "[1]", "My notes"])
def test_a_folder_with_the_report_of_something_else_is_refused_and_stays_as_it_is(tmp_path, home, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text(content)
    select(cube("Box"))
    bpy.context.scene.kiln.batch.out = str(out)
    assert refused(batch_panel.ordered, bpy.context) == "bad-output"
    assert [one.name for one in out.iterdir()] == ["report.json"] and not (home / "batches").exists()
    make(home, "done", [item("Box", "done")], out=str(tmp_path / "earlier"))
    bpy.context.scene.kiln.batch.out = str(tmp_path / "earlier")
    assert batch_panel.ordered(bpy.context).out == tmp_path / "earlier", "a batch's folder is gone on with"


# How batches stand


@pytest.mark.parametrize(
    ("told", "lives", "began", "state"),
    [
        ("", True, 0, "starting"),
        ("", False, 0, "interrupted"),
        ("running", True, 0, "running"),
        ("running", False, 0, "interrupted"),  # after a crash, or when the computer was started anew
        ("done", False, 0, "done"),
        ("cancelled", False, 0, "cancelled"),
        ("failed", False, 0, "failed"),
        ("done", True, -60, "starting"),  # taken up again: the report is of the run before
        ("done", False, -60, "interrupted"),  # taken up again, and ended without a word but in the log
    ],
)
def test_the_state_follows_from_the_report_and_whether_somebody_works_on_it(home, alive, told, lives, began, state):
    batch = batches.look(make(home, told, [item("Box")], alive if lives else DEAD, began=began))
    assert batch.state == state
    assert ("Blender is missing" in batch.said) == (state == "interrupted")


@pytest.mark.parametrize("told", ["", "running", "done"])
def test_a_process_that_got_the_number_of_one_long_gone_holds_no_batch(home, alive, told):
    day = 86400
    folder = make(home, told, [item("Box", "computing")], alive, began=-day)
    os.utime(folder / "pid", (time.time() - day, time.time() - day))
    watch = batches.Watch()
    watch.look()
    batch = watch.batches()[folder.name]
    assert not batch.active and batch.state == (told if told == "done" else "interrupted")
    if told:  # it goes on in a terminal
        report = json.loads((batch.out / "report.json").read_text())
        (batch.out / "report.json").write_text(json.dumps({**report, "state": "running", "updated": time.time()}))
        watch.look()
        assert watch.batches()[folder.name].state == "running"


def test_a_batch_without_news_is_taken_for_dead_while_the_thread_looks(home, alive, monkeypatch):
    folder = make(home, "running", [item("Box", "computing")], alive)
    watch = batches.Watch()
    watch.look()
    assert watch.batches()[folder.name].state == "running"
    monkeypatch.setattr(batches, "QUIET", 0.0)
    assert watch.look() and watch.batches()[folder.name].state == "interrupted"


BROKEN = item("A", "failed", error={"code": "bad-file", "message": "It is broken.", "hint": "Mend it."})
FINISHED = item("A", "done", figures={"faces": 800, "mesh_psnr": 31.2}, seconds={"compute": 70.0}, warnings=["Thin."])
AT_WORK = item("A", "computing", stage="Fit splats", fraction=0.5, text="step 3")


@pytest.mark.parametrize(
    ("told", "lives", "items", "words", "buttons"),
    [
        ("", True, [], ["Starting"], {"Cancel"}),
        (
            "running", True, [AT_WORK, item("B"), item("C", "done")], ["1 of 3", "About 90 s left", "Fit splats 50%", "Step 3"],
            {"Cancel", "Report", "Folder"},
        ),
        ("running", False, [item("A", "done"), item("B")], ["Stopped after 1 of 2", "Install it."], {"Resume", "Import Results"}),
        (
            "done", False, [BROKEN, item("B", "done")], ["1 of 2 done, 1 failed", "It is broken.", "Mend it."],
            {"Retry Failed", "Import Results", "Report", "Copy Details"},
        ),
        ("done", False, [FINISHED], ["1 of 1 done", "800 faces, 31.2 dB, 1 min 10 s", "Thin."], {"Import Results"}),
        ("cancelled", False, [item("A", "cancelled")], ["Cancelled, 0 of 1 done"], {"Resume"}),
    ],
)  # fmt: skip
def test_each_state_shows_what_is_known_and_what_can_be_done(home, alive, told, lives, items, words, buttons):
    make(home, told, items, alive if lives else DEAD)
    seen, there = drawn()
    assert all(one in seen for one in words), seen
    assert buttons <= set(there), set(there)
    assert ("Cancel" in there) == lives and ("Remove" in there or "" in there) == (not lives)


def test_before_there_is_a_batch_the_panel_says_what_it_would_make_or_what_is_missing():
    seen, buttons = drawn()
    assert "No objects are selected that have a surface" in seen and set(buttons) == {"Start Batch"}
    select(cube("A"), bpy.context.object)
    cube("B").select_set(True)
    bpy.data.objects["A"].select_set(True)
    seen, buttons = drawn()
    assert "2 assets: Reconstruct, standard. About" in seen


@pytest.mark.parametrize("each", ["OBJECT", "COLLECTION"])
def test_the_panel_looks_at_few_objects_of_a_large_collection_and_at_many_once_a_second(monkeypatch, each):
    props = bpy.data.collections.new("Props")
    bpy.context.scene.collection.children.link(props)
    for group in range(3):
        child = bpy.data.collections.new(f"Group {group}")
        props.children.link(child)
        for number in range(40):
            content = bpy.data.meshes.new("Box") if number % 2 else None  # the others are empties
            child.objects.link(bpy.data.objects.new(f"{group} {number}", content))
    chosen = bpy.context.scene.kiln.batch
    chosen.source, chosen.collection, chosen.each = "COLLECTION", props, each
    now, looks = [0.0], []
    plain = batches.is_surface
    monkeypatch.setattr(batches, "is_surface", lambda thing: looks.append(thing) or plain(thing))
    monkeypatch.setattr(batch_panel.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(batch_panel, "FEW", 5)
    count, most = (60, 120) if each == "OBJECT" else (3, 6)

    assert f"{count} assets: Reconstruct" in drawn()[0] and len(looks) == most
    bpy.data.objects.remove(props.children[0].objects[1])
    now[0] = 0.9
    assert f"{count} assets: Reconstruct" in drawn()[0] and len(looks) == most, "at most once a second"
    assert not batch_panel.known._draw_count()
    now[0] = 1.0
    assert batch_panel.known._draw_count(), "what was drawn is old: once more"
    count -= each == "OBJECT"
    assert f"{count} assets: Reconstruct" in drawn()[0] and len(looks) > most
    assert not batch_panel.known._draw_count()
    chosen.collection = props.children[1]
    words = "20 assets: Reconstruct" if each == "OBJECT" else "No objects are in this collection"
    assert words in drawn()[0], "another choice is shown at once"

    chosen.collection, now[0] = props, 9.0
    monkeypatch.setattr(batch_panel, "LOOKED_AT", 5)
    looks.clear()
    seen, buttons = drawn()
    assert "2 or more assets: Reconstruct" in seen and len(looks) <= 6
    assert len(batch_panel.things(bpy.context)) == count, "the batch itself is of all"


def test_what_ended_the_run_as_a_whole_and_what_became_of_the_library_is_told(home):
    folder = make(home, "failed", [item("A", "done"), item("B")])
    file = folder / "results" / "report.json"
    report = json.loads(file.read_text())
    file.write_text(json.dumps({**report, "error": {"code": "no-space", "message": "The disk is full.", "hint": "Make room."}}))
    seen, buttons = drawn()
    assert "The disk is full." in seen and "Resume" in buttons
    library = {"file": "/assets/props.blend", "assets": 1, "error": None}
    file.write_text(json.dumps({**report, "state": "done", "library": library}))
    assert "1 assets in props.blend" in drawn()[0]


def test_the_thread_tells_changes_once_reads_nothing_twice_and_forgets_what_is_gone(home, alive, monkeypatch):
    folder = make(home, items=[item("Box", "computing")], pid=alive)
    watch, reads = batches.Watch(), []
    plain = batches.look
    monkeypatch.setattr(batches, "look", lambda one: reads.append(one) or plain(one))
    assert watch.look() and not watch.look() and not watch.look()
    assert len(reads) == 1
    report = json.loads((folder / "results" / "report.json").read_text())
    (folder / "results" / "report.json").write_text(json.dumps({**report, "state": "done", "more": 1}))
    assert watch.look() and [batch.state for batch in watch.batches().values()] == ["done"]
    (folder / "batch.json").write_text("{")  # in the middle of being written by somebody
    assert watch.look() and not watch.batches()


@pytest.mark.parametrize("content", ['{"faces": 800, "parameters": {}}', "[1]", '{"state": "done", "pid": 1, "updated": 0, "items": []}'])
def test_a_foreign_report_in_the_output_folder_counts_as_none(home, content):
    folder = make(home, "", [], DEAD)
    (folder / "results" / "report.json").write_text(content)
    batch = batches.look(folder)
    assert (batch.state, batch.report) == ("interrupted", None)


def test_a_batch_that_cannot_be_read_hides_itself_alone(home, capsys):
    bad, good = (make(home, "done", [item("A", "done")], id=f"20260101-000000-{name}") for name in ("bad", "good"))
    report = json.loads((bad / "results" / "report.json").read_text())
    (bad / "results" / "report.json").write_text(json.dumps({**report, "begun": "yesterday"}))
    watch = batches.Watch()
    assert watch.look() and list(watch.batches()) == [good.name]
    assert not watch.look() and capsys.readouterr().err.count("Traceback") == 1, "told once"


def test_the_list_has_the_newest_first_keeps_the_choice_and_shows_its_items(home):
    make(home, "done", [item("A", "done"), item("B", "failed")], id="20260101-000000-aaaaaa")
    make(home, "done", [item("C", "done")], id="20260102-000000-aaaaaa")
    window = bpy.context.window_manager.kiln
    batch_panel.properties.batch_chosen = batch_panel.known.fill_items
    batch_panel.known.refresh()
    assert [row.name[:8] for row in window.batches] == ["20260102", "20260101"]
    assert [row.name for row in window.batch_items] == ["C"]
    window.active_batch = 1
    assert [row.name for row in window.batch_items] == ["A", "B"]
    make(home, "done", [], id="20260103-000000-aaaaaa")
    batch_panel.known.refresh()
    assert window.batches[window.active_batch].name.startswith("20260101")


# What can be done about them


def test_cancel_leaves_the_word_in_the_output_folder_and_remove_takes_the_batch_but_no_folder_of_the_users(tmp_path, home, alive):
    folder = make(home, items=[item("Box", "computing")], pid=alive, out=str(tmp_path / "out"))
    with pytest.raises(RuntimeError, match="at work"):
        bpy.ops.kiln.remove_batch(batch=folder.name)
    bpy.ops.kiln.cancel_batch(batch=folder.name)
    assert (tmp_path / "out" / "cancel").exists()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (tmp_path / "out" / "report.json").write_text(json.dumps({**report, "state": "cancelled"}))
    (folder / "pid").write_text(str(DEAD))
    bpy.ops.kiln.remove_batch(batch=folder.name)
    assert not folder.exists() and (tmp_path / "out").exists() and not batch_panel.known.all


def results(folder: Path, name: str, **source):
    """What lies in OUT/<name>/ of a finished item: a cube as the backend would write it."""
    (folder / name).mkdir(parents=True)
    thing = cube(name)
    select(thing)
    bpy.ops.export_scene.gltf(filepath=str(folder / name / "mesh.glb"), use_selection=True)
    bpy.data.objects.remove(thing)
    (folder / name / "item.json").write_text(json.dumps({"source": source}))
    (folder / name / "report.json").write_text(json.dumps({"parameters": {}, "versions": {"kiln": "1.2.3"}}))


def test_results_come_one_a_tick_into_the_chosen_collection_as_one_undo_step_and_once(home):
    folder = make(home, "done", id="20260101-000000-aaaaaa", collection="Shelf")
    shelf = bpy.data.collections.new("Shelf")
    bpy.context.scene.collection.children.link(shelf)
    out = folder / "results"
    for name in ("A", "B"):
        results(out, name)
    report = json.loads((out / "report.json").read_text())
    items = [item("A", "done", file="/props/a.glb"), item("B", "done", file="/props/b.glb"), item("C", "failed")]
    (out / "report.json").write_text(json.dumps({**report, "items": items}))
    bpy.ops.ed.undo_push(message="Before")
    batch_panel.known.refresh()
    known = batch_panel.known
    known.bring_in(known.all[folder.name], asked=True)
    assert known.import_next(bpy.context) and len(shelf.children) == 1
    assert not known.import_next(bpy.context) and len(shelf.children) == 2
    places = sorted(thing.location.x for made in shelf.children for thing in made.objects if thing.type == "MESH")
    assert places == pytest.approx([1.0, 3.5]), "files have no place in this scene: they stand side by side"
    assert refused(known.bring_in, known.all[folder.name], asked=True) == "no-results"
    assert "In This File" in drawn()[1]
    bpy.ops.ed.undo()
    assert len(bpy.data.collections["Shelf"].children) == 0 and batch_panel.to_import(known.all[folder.name]) == ["A", "B"]


def finished(home, *names, id="20260101-000000-aaaaaa", without=(), **order):
    """A batch that is done, its results where they belong; of those in `without` there is an empty folder."""
    folder = make(home, "done", [item(name, "done", file=f"/props/{name}.glb") for name in names], id=id, **order)
    for name in names:
        if name in without:
            (folder / "results" / name).mkdir()
        else:
            results(folder / "results", name)
    return folder


def brought_in():
    return sorted(made["kiln_batch"].partition("/")[2] for made in bpy.data.collections if made.get("kiln_batch"))


def test_a_result_that_cannot_come_in_is_told_and_holds_up_no_other(home):
    folder = finished(home, "A", "B", "C", "D", without=("A", "C"))
    (folder / "results" / "C" / "mesh.glb").write_bytes(b"no mesh")
    bpy.ops.ed.undo_push(message="Before")
    known = batch_panel.known
    known.refresh()
    known.bring_in(known.all[folder.name], asked=True)
    assert [known.import_next(bpy.context) for _ in range(4)] == [True, True, True, False]
    assert brought_in() == ["B", "D"] and known.importing is None
    assert ["of A has no mesh.glb" in notice.error.message for notice in session.current.notices] == [True, False]
    with pytest.raises(RuntimeError, match="of A has no mesh.glb"):
        bpy.ops.kiln.import_batch(batch=folder.name)  # tries those that are missing, in `blender -b` to their end
    results(folder / "results2", "A")
    (folder / "results2" / "A" / "mesh.glb").rename(folder / "results" / "A" / "mesh.glb")
    with pytest.raises(RuntimeError, match="of C|C "):
        bpy.ops.kiln.import_batch(batch=folder.name)
    assert brought_in() == ["A", "B", "D"]
    bpy.ops.ed.undo()
    assert brought_in() == ["B", "D"]
    bpy.ops.ed.undo()
    assert brought_in() == []


def test_what_came_in_before_its_batch_was_removed_is_an_undo_step(home):
    folder = finished(home, "A", "B")
    bpy.ops.ed.undo_push(message="Before")
    known = batch_panel.known
    known.refresh()
    known.bring_in(known.all[folder.name], asked=True)
    assert known.import_next(bpy.context)
    bpy.ops.kiln.remove_batch(batch=folder.name)
    assert not known.import_next(bpy.context) and brought_in() == ["A"]
    bpy.ops.object.empty_add()
    bpy.ops.ed.undo_push(message="Empty")
    bpy.ops.ed.undo()
    assert brought_in() == ["A"]
    bpy.ops.ed.undo()
    assert brought_in() == []


def test_an_import_that_runs_is_not_replaced_by_another(home):
    first = finished(home, "A", "B")
    second = finished(home, "C", id="20260102-000000-aaaaaa")
    known = batch_panel.known
    known.refresh()
    known.bring_in(known.all[first.name], asked=True)
    assert known.import_next(bpy.context)
    assert refused(known.bring_in, known.all[second.name], asked=True) == "busy"
    known.bring_in(known.all[second.name], asked=False)  # it has just ended
    known.bring_in(known.all[first.name], asked=False)  # what failed of it was tried anew: what is there by then comes in once
    bpy.context.window_manager.kiln.active_batch = 0
    seen, buttons = drawn()
    assert "Comes in after Props" in seen and "Import Results" not in buttons
    while known.import_next(bpy.context):
        pass
    assert brought_in() == ["A", "B", "C"] and known.importing is None and known.queue == []


def test_a_result_of_an_object_of_this_file_stands_where_that_stood(home):
    folder = make(home, "done")
    results(folder / "results", "Box", scene=bpy.context.scene.name, location=[3.0, 2.0, 1.0], rotation=[1, 0, 0, 0], unit_scale=1.0)
    report = json.loads((folder / "results" / "report.json").read_text())
    items = [item("Box", "done", file=str(folder / "scene.blend"))]
    (folder / "results" / "report.json").write_text(json.dumps({**report, "items": items}))
    bpy.ops.kiln.import_batch(batch=folder.name)
    (made,) = bpy.data.collections["Props (Kiln batch)"].children
    (mesh,) = (thing for thing in made.objects if thing.type == "MESH")
    assert tuple(mesh.location) == (3.0, 2.0, 1.0)
    corners = [mesh.matrix_world @ vertex.co for vertex in mesh.data.vertices]
    assert max(abs(value) for corner in corners for value in corner) == pytest.approx(1.0), "the mesh itself lies as it was made"


def test_a_batch_that_ends_comes_in_by_itself_only_into_the_file_that_it_was_started_from(home, alive, monkeypatch):
    now, asked = session.current, []
    monkeypatch.setattr(batch_panel.Batches, "bring_in", lambda self, batch, asked_for=False, **given: asked.append(batch.id))
    for id, opened in (("20260101-000000-aaaaaa", now.file), ("20260101-000000-bbbbbb", now.file - 1)):
        make(home, items=[item("A", "done")], pid=alive, id=id, session=now.id, opened=opened, wants_import=True)
    batch_panel.known.refresh()
    assert asked == []
    for report in home.glob("batches/*/results/report.json"):
        report.write_text(json.dumps({**json.loads(report.read_text()), "state": "done"}))
    batch_panel.known.refresh()
    batch_panel.known.refresh()
    assert asked == ["20260101-000000-aaaaaa"]


def test_the_process_is_started_apart_with_this_blender_and_its_words_go_to_the_log(tmp_path, home, monkeypatch):
    """The backend's command is one that prints what it was given: what it does is the end-to-end test's matter."""
    stand_in = tmp_path / "modules" / "backend"
    stand_in.mkdir(parents=True)
    (stand_in / "cli.py").write_text("import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd()]))")
    monkeypatch.setenv("PYTHONPATH", str(stand_in.parent))
    session.current.connect()
    folder = make(home, "", library="/assets/props.blend", options=["--fbx"])
    batch_panel.known.refresh()
    (batch,) = batch_panel.known.all.values()
    (batch.out / "cancel").touch()
    process = batches.start(batch, again=True)
    assert process.wait(60) == 0
    words, place = json.loads((folder / "log.txt").read_text())
    blender = bpy.app.binary_path or sys.executable
    assert words == [
        "batch", batch.order.manifest, "--out", batch.order.out, "--blender", blender, "--library", "/assets/props.blend", "--fbx",
        "--retry-failed",
    ]  # fmt: skip
    assert Path(place).samefile(folder) and not (batch.out / "cancel").exists()
    assert (folder / "pid").read_text() == str(process.pid)
    batches._processes.clear()


# Runs as `kiln batch`: tells that it is at work and waits for the word to stop, which it heeds only where SLOW is not set. Then it takes
# its time, and leaves behind whether what it was asked for was still there.
STAND_IN = """
import json, os, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
def tell(state):
    report = {"state": state, "pid": os.getpid(), "begun": time.time(), "updated": time.time(), "items": []}
    (out / "new.json").write_text(json.dumps(report))
    os.replace(out / "new.json", out / "report.json")
tell("running")
end = time.monotonic() + 60
while time.monotonic() < end and (os.environ.get("SLOW") or not (out / "cancel").exists()):
    time.sleep(0.02)
time.sleep(0.3)
(out / "ended.txt").write_text(str(os.path.exists("manifest.toml")))
tell("cancelled")
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A backend whose `kiln batch` does nothing but wait; gives the file to make an asset of and the folder for results."""
    (tmp_path / "modules" / "backend").mkdir(parents=True)
    (tmp_path / "modules" / "backend" / "cli.py").write_text(STAND_IN)
    (tmp_path / "box.glb").write_bytes(b"")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    session.current.connect()
    yield tmp_path / "box.glb", tmp_path / "out"
    for process in batches._processes.values():
        process.kill()
        process.wait()
    batches._processes.clear()


@pytest.mark.parametrize(("raised", "seen"), [(ValueError("mine"), ValueError), (KeyboardInterrupt(), KilnError)])
def test_what_a_script_raises_cancels_its_batch_and_waits_for_it_before_its_files_go(home, stand_in, raised, seen):
    file, out = stand_in

    def progress(report):
        raise raised

    with pytest.raises(seen) as failure:
        api.batch(file, out, progress=progress)
    assert seen is ValueError or failure.value.code == "cancelled"
    assert (out / "ended.txt").read_text() == "True" and not list((home / "batches").iterdir())


def test_a_second_interrupt_ends_a_process_that_takes_its_time(home, stand_in, monkeypatch):
    file, out = stand_in
    monkeypatch.setenv("SLOW", "1")
    held = []

    def again():
        while not (out / "cancel").exists():
            time.sleep(0.02)
        _thread.interrupt_main()

    def progress(report):
        held.extend(batches._processes.values())
        threading.Thread(target=again).start()
        raise KeyboardInterrupt

    with pytest.raises(KilnError, match="was cancelled"):
        api.batch(file, out, progress=progress)
    assert held[0].poll() is not None and not (out / "ended.txt").exists()
    assert not list((home / "batches").iterdir())


def test_the_files_of_a_batch_stay_as_long_as_its_process_lives(home, stand_in, monkeypatch):
    file, out = stand_in

    def given_up(batch, progress):
        batches.start(batch)
        raise KeyboardInterrupt

    monkeypatch.setattr(batches, "finish", given_up)
    with pytest.raises(KeyboardInterrupt):
        api.batch(file, out)
    (folder,) = (home / "batches").iterdir()
    assert (folder / "manifest.toml").exists() and batches.look(folder).active


# Scripts and the command line


@pytest.mark.oldest
def test_every_parameter_of_every_recipe_is_one_of_the_operator_and_of_a_script():
    known = bpy.ops.kiln.generate.get_rna_type().properties.keys()
    for name, recipe in recipes.RECIPES.items():
        for parameter in recipes.parameters(recipe):
            assert properties.identifier(parameter.name) in known
            assert api._flat(name, {properties.identifier(parameter.name): 1}) == {parameter.name: 1}
    assert set(operators.every_parameter()) <= set(known)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run"], "--out"),
        (["run", "none.glb", "--out", "x"], "There is no file none.glb"),
        (["run", "x.png", "--out", "x", "--set", "surface.faces"], "says no value"),
        (["run", "x.png", "--out", "x", "--set", "capture.views=20"], "im3d has no parameter 'capture.views'"),
        (["run", "x.glb", "--out", "x", "--set", "surface.faces=1.5"], "surface.faces cannot be 1.5"),
        (["run", "x.glb", "--out", "x", "--set", "capture.geometry=maybe"], "capture.geometry cannot be 'maybe'"),
        (["run", "x.glb", "--out", "x", "--recipe", "nothing"], "invalid choice"),
    ],
)
def test_a_wrong_command_says_what_is_wrong_with_exit_code_2(capsys, words, said):
    assert commands.main(words) == 2
    assert said in capsys.readouterr().err


def test_the_game_group_is_a_box_of_its_own_and_no_preset_changes_it():
    group = bpy.context.scene.kiln.reconstruct
    group.game_engine = "unity"
    group.preset = "draft"
    assert group.game_engine == "unity" and properties.changed(group, recipes.Reconstruct) == []
    layout = Layout()
    panel.draw_game(layout, group, recipes.Reconstruct)
    assert layout.seen[0] == "Game Engine: Unity"
    names = [parameter.name for parameter in recipes.parameters(recipes.Reconstruct) if parameter.group == "game"]
    assert [one for one in layout.seen if one in group.bl_rna.properties] == [properties.identifier(name) for name in names]
    apart = Layout()
    panel.draw_parameters(apart, group, recipes.Reconstruct, advanced=False, without=("game.",))
    assert not [one for one in apart.seen if str(one).startswith("game_")]
