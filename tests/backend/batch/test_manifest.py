"""Manifests: what a list or a folder means, what is refused as a whole, and what is one item's own failure."""

import json
import os
import shutil

import pytest

from backend.batch import items, manifest
from backend.batch.manifest import Overrides, named, resolved, safe_name
from protocol.errors import KilnError

PLY = "ply\nformat ascii 1.0\nelement vertex 1\n{}end_header\n0 0 0\n"


@pytest.fixture
def props(tmp_path):
    """A folder as artists have them: models with their textures, a captured folder, splats, pictures."""
    folder = tmp_path / "props"
    for name in (
        "chair.glb", "lamp/lamp.obj", "lamp/lamp.mtl", "lamp/wood.png", "lamp/tex/dark.png", "kit/source/kit.fbx", "kit/textures/kit.png",
        "art/mug.png", "art/Mug.jpg", "scan.spz", "notes.txt", ".hidden/old.glb", "chair.blend1",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    (folder / "splats.ply").write_text(PLY.format("property float x\nproperty float f_dc_0\n"))
    (folder / "mesh.PLY").write_text(PLY.format("property float x\n"))
    (folder / "views").mkdir()
    (folder / "views" / "transforms.json").write_text('{"frames": [{"file_path": "a.png"}]}')
    (folder / "views" / "a.png").write_bytes(b"")
    (folder / "moving").mkdir()
    (folder / "moving" / "transforms.json").write_text('{"frames": [{"file_path": "a.png", "frame": 1}]}')
    return folder


def read(path, overrides=Overrides(), out="/nowhere", said=None):  # noqa: B008
    from pathlib import Path

    return named(
        manifest.read(path, overrides, [Path(out), Path(out).with_name("library.blend")], (said if said is not None else []).append)
    )


def of_toml(folder, text, **options):
    (folder / "list.toml").write_text(text, encoding="utf-8")
    return read(folder / "list.toml", **options)


def of_csv(folder, text, **options):
    (folder / "list.csv").write_text(text, encoding="utf-8")
    return read(folder / "list.csv", **options)


def test_a_folder_is_a_list_of_what_is_in_it(props):
    said = []
    found = {item.file.relative_to(props).as_posix(): (item.name, item.kind, item.recipe) for item in read(props, said=said)}
    assert found == {
        "art/Mug.jpg": ("Mug", "picture", "im3d"),
        "art/mug.png": ("mug-2", "picture", "im3d"),  # names differ in more than case, for Windows and macOS
        "chair.glb": ("chair", "model", "reconstruct"),
        "kit/source/kit.fbx": ("kit", "model", "reconstruct"),
        "lamp/lamp.obj": ("lamp", "model", "reconstruct"),
        "mesh.PLY": ("mesh", "model", "reconstruct"),
        "moving": ("moving", "views", "animate"),
        "scan.spz": ("scan", "splats", "mesh_splats"),
        "splats.ply": ("splats", "splats", "mesh_splats"),
        "views": ("views", "views", "reconstruct"),
    }
    assert len(said) == 1 and said[0].startswith("3 pictures lie beside models")


def test_results_inside_the_folder_are_no_sources(props):
    (props / "out" / "chair").mkdir(parents=True)
    (props / "out" / "chair" / "mesh.glb").write_bytes(b"")
    (props / "library.blend").write_bytes(b"")
    assert not any({"out", "library.blend"} & set(item.file.parts) for item in read(props, out=props / "out"))


def test_a_pattern_means_no_results_of_an_earlier_run(props):
    text = '[[items]]\nfile = "**/*.glb"\n[[items]]\nfile = "*.blend"\n[[items]]\nfile = "{}/chair/mesh.glb"'
    for out in (props / "out", props):
        (out / "chair").mkdir(parents=True)
        for name in ("mesh.glb", "item.json"):
            (out / "chair" / name).write_bytes(b"")
        for library in (out.with_name("library.blend"), props / "hero.blend"):
            library.write_bytes(b"")
        place = "out" if out != props else "."
        found = [item.file.relative_to(props).as_posix() for item in of_toml(props, text.format(place), out=out)]
        assert found == ["chair.glb", "hero.blend", f"{place}/chair/mesh.glb".removeprefix("./")]  # the last by its whole name
        shutil.rmtree(out / "chair")
        out.with_name("library.blend").unlink()


def test_results_among_the_sources_are_refused(props):
    with pytest.raises(KilnError, match="The results would lie among the sources") as refused:
        read(props, out=props)
    assert refused.value.code == "bad-manifest" and refused.value.hint == "Name another --out."


def test_defaults_items_and_the_command_line_in_this_order(props):
    text = """
    [defaults]
    preset = "draft"
    parameters = { "texture.size" = 256, "look.count" = 20 }
    [[items]]
    file = "chair.glb"
    [[items]]
    file = "lamp/*.obj"
    name = "big {stem} {number}"
    preset = "high"
    parameters = { texture.size = 1024, surface = { faces = 300 } }
    [[items]]
    file = "scan.spz"
    """
    chair, lamp, scan = of_toml(props, text, overrides=Overrides(parameters={"texture.padding": "3", "fit.iterations": "99"}))
    assert chair.preset == "draft" and chair.values["texture.size"] == 256 and chair.values["surface.faces"] == 5000
    assert lamp.preset == "high" and lamp.values["texture.size"] == 1024 and lamp.values["surface.faces"] == 300
    assert chair.values["fit.iterations"] == lamp.values["fit.iterations"] == 99
    assert lamp.name == "big_lamp_002" and scan.values["look.count"] == 20 and scan.error is None


def test_a_table_of_a_spreadsheet(props):
    text = "\ufefffile;preset;texture.size;capture.materials;name\nchair.glb;draft;512;off;A chair\n\nlamp/lamp.obj;;;;\n"
    chair, lamp = of_csv(props, text)
    assert (chair.name, chair.values["texture.size"], chair.values["capture.materials"]) == ("A_chair", 512, False)
    assert lamp.preset == "standard" and lamp.values["capture.materials"] is True


@pytest.mark.parametrize(
    "text, words",
    [
        ("file,colour\na,1\n", "line 1: 'colour' is no column"),
        ("preset\ndraft\n", "no column `file`"),
        ("file,preset\nchair.glb,draft,x\n", "line 2: 3 cells under 2 columns"),
        ("file\n", "it lists nothing"),
        ("", "no column `file`"),
        ("file,file\na,b\n", "stands there twice"),
        ('file\n"chair.glb\n', "list.csv"),
    ],
)
def test_a_broken_table_is_refused_with_its_line(props, text, words):
    with pytest.raises(KilnError) as refused:
        of_csv(props, text)
    assert refused.value.code == "bad-manifest" and words in refused.value.message and refused.value.hint


@pytest.mark.parametrize(
    "text, words",
    [
        ("[[items]\nfile = 3", "it is no TOML"),
        ("", "it lists nothing"),
        ("items = 3", "it lists nothing"),
        ('[default]\npreset = "draft"', "'default' stands there"),
        ('[defaults]\nfile = "a"\n[[items]]\nfile = "b"', "[defaults] has 'file'"),
        ('[defaults.parameters]\n"no.such" = 1\n[[items]]\nfile = "b"', "no recipe has a parameter 'no.such'"),
        ('[defaults]\npreset = 3\n[[items]]\nfile = "b"', "`preset` is 3"),
    ],
)
def test_a_broken_list_is_refused(props, text, words):
    with pytest.raises(KilnError) as refused:
        of_toml(props, text)
    assert refused.value.code == "bad-manifest" and words in refused.value.message and refused.value.hint


@pytest.mark.parametrize(
    "entry, code, words",
    [
        ('file = "gone.glb"', "bad-input", "no file 'gone.glb'"),
        ('file = "*.abc"', "bad-input", "No file fits '*.abc'"),
        ('file = "notes.txt"', "bad-input", "notes.txt is nothing that Kiln reads"),
        ('name = "x"', "bad-manifest", "names no file"),
        ('file = "chair.glb"\nsize = 3', "bad-manifest", "no key 'size'"),
        ('file = "chair.glb"\nparameters = { "texture.size" = 1 }', "bad-parameter", "texture.size cannot be 1"),
        ('file = "chair.glb"\nparameters = { "look.count" = 20 }', "bad-parameter", "no parameter 'look.count'"),
        ('file = "chair.glb"\nrecipe = "im3d"', "bad-recipe", "im3d cannot start from chair.glb, which is a model"),
        ('file = "art/mug.png"\nrecipe = "reconstruct"', "bad-recipe", "reconstruct cannot start from mug.png, which is a picture"),
        ('file = "chair.glb"\nrecipe = "bake"', "bad-recipe", "no recipe 'bake'"),
        ('file = "chair.glb"\npreset = "low"', "bad-parameter", "no preset 'low'"),
        ('file = "chair.glb"\nobject = "A*"', "bad-manifest", "chair.glb is one asset"),
        ('file = "chair.glb"\nname = "{seed}"', "bad-manifest", "asks for {seed}"),
        ('file = "chair.glb"\nname = "{stem"', "bad-manifest", "is no pattern"),
    ],
)
def test_what_is_wrong_with_an_item_stops_no_other(props, entry, code, words):
    bad, good = of_toml(props, f'[[items]]\n{entry}\n[[items]]\nfile = "scan.spz"')
    assert bad.error.code == code and words in bad.error.message and bad.error.message.startswith("list.toml, line 1: ") and bad.error.hint
    assert good.error is None and bad.name and bad.name != good.name


@pytest.mark.parametrize(
    "overrides, words",
    [
        (Overrides(recipe="bake"), "no recipe 'bake'"),
        (Overrides(preset="low"), "no preset 'low'"),
        (Overrides(parameters={"no.such": "1"}), "No recipe has a parameter 'no.such'"),
        (Overrides(parameters={"surface.grid": "many"}), "surface.grid cannot be 'many'"),
        (Overrides(recipe="reconstruct", parameters={"look.count": "3"}), "No recipe has a parameter 'look.count'"),
    ],
)
def test_overrides_that_no_item_could_follow_are_refused_at_once(props, overrides, words):
    with pytest.raises(KilnError) as refused:
        read(props, overrides)
    assert words in refused.value.message and refused.value.hint


def test_a_blend_gives_an_item_for_each_subject(props):
    (props / "level.blend").write_bytes(b"")
    (props / "hero.blend").write_bytes(b"")
    text = '[[items]]\nfile = "level.blend"\nobject = "Ch*"\n[[items]]\nfile = "hero.blend"\n[[items]]\nfile = "*.blend"\nname = "{stem}"'

    def ask(item):
        if item.object:
            return [{"kind": "object", "name": name} for name in ("Chair", "Ch/air", "CON")]
        if item.file.name == "hero.blend":
            return [{"kind": "object", "name": "Cube.003"}]
        raise KilnError("bad-input", "It is damaged.", "Mend it.")

    found = named(resolved(manifest.read(write(props, text), Overrides(), []), ask))
    assert [item.name for item in found] == ["Chair", "Ch_air", "asset_CON", "hero", "hero-2", "level"]
    assert (
        found[0].subject == {"kind": "object", "name": "Chair"}
        and found[4].note == "Named hero-2, because hero is the name of list.toml, line 4."
    )
    assert found[5].error.message == "list.toml, line 6: It is damaged."


def test_a_blend_without_what_was_asked_for_is_said(props):
    (props / "level.blend").write_bytes(b"")
    (item,) = resolved(manifest.read(write(props, '[[items]]\nfile = "level.blend"\nobject = "Ch*"'), Overrides(), []), lambda item: [])
    assert "level.blend has no object 'Ch*'" in item.error.message


def write(folder, text):
    (folder / "list.toml").write_text(text)
    return folder / "list.toml"


@pytest.mark.parametrize("text", ["CON", "nul.x", "a/b:c", " x. ", "", "...", "Stühle ä", "x" * 300, "-rf", "a\n", "лампа", "report "])
def test_names_are_file_names_everywhere(text, tmp_path):
    name = safe_name(text)
    assert 1 <= len(name) <= 90 and not set(name) & set('<>:"/\\|?* \n') and name[0] not in ".-" and name[-1] != "."
    assert name.partition(".")[0].lower() not in ("con", "nul")
    (tmp_path / name).mkdir()


def test_a_result_never_lies_where_the_report_does(props):
    (props / "report.glb").write_bytes(b"")
    (props / "thumbnails.glb").write_bytes(b"")
    names = {item.name for item in read(props)}
    assert {"report-2", "thumbnails-2"} <= names and not names & set(manifest.TAKEN_NAMES)


def test_the_lists_of_the_documentation_are_good(props):
    from pathlib import Path

    text = (Path(__file__).parents[3] / "docs" / "batch.md").read_text(encoding="utf-8")
    blocks = {kind: text.partition(f"```{kind}\n")[2].partition("```")[0] for kind in ("toml", "csv")}
    for name in ("props/chair.glb", "props/lamp.glb", "level.blend", "hero.fbx"):
        (props / name).parent.mkdir(exist_ok=True)
        (props / name).write_bytes(b"")
    chair, lamp, level, hero = of_toml(props, blocks["toml"])
    assert all(item.error is None for item in (chair, lamp, level, hero)) and level.object == "Chair*" and hero.recipe == "animate"
    chair, lamp = of_csv(props, blocks["csv"])
    assert (chair.name, chair.values["surface.faces"], lamp.name, lamp.values["texture.size"]) == ("Chair", 1500, "lamp", 1024)


# What an item is made of


def fingerprint(path):
    return items.fingerprint(read(path)[0])


def test_the_fingerprint_knows_every_file_that_a_model_names(tmp_path):
    (tmp_path / "a.obj").write_text("mtllib my stuff.mtl\nv 0 0 0\n")
    (tmp_path / "my stuff.mtl").write_text("newmtl x\nmap_Kd -s 1 1 1 wood.png\n")
    (tmp_path / "wood.png").write_bytes(b"1")
    (tmp_path / "a.gltf").write_text(json.dumps({"buffers": [{"uri": "a%20b.bin"}], "images": [{"uri": "data:image/png;base64,AA"}]}))
    (tmp_path / "a b.bin").write_bytes(b"1")
    for model, changing in (("a.obj", "my stuff.mtl"), ("a.obj", "wood.png"), ("a.obj", "a.obj"), ("a.gltf", "a b.bin")):
        before = fingerprint(tmp_path / model)
        assert fingerprint(tmp_path / model) == before
        with open(tmp_path / changing, "ab") as file:
            file.write(b"\n")
        os.utime(tmp_path / changing, (1, 1))
        assert fingerprint(tmp_path / model) != before, changing


def test_an_item_is_finished_while_its_files_are_whole(tmp_path):
    folder = items.Folder(tmp_path, "chair")
    folder.fetched.mkdir(parents=True)
    (folder.fetched / "mesh.glb").write_bytes(b"12345")
    (folder.fetched / "old.png").write_bytes(b"1")
    folder.take_results({"fingerprint": "one"})
    (folder.results / "mine.txt").write_text("the user's")
    assert folder.finished("one") and not folder.finished("two")
    folder.fetched.mkdir(exist_ok=True)
    (folder.fetched / "mesh.glb").write_bytes(b"123")
    folder.take_results({"fingerprint": "two"})
    assert sorted(path.name for path in folder.results.iterdir()) == ["item.json", "mesh.glb", "mine.txt"]  # an old result has gone
    assert folder.finished("two")
    (folder.results / "mesh.glb").write_bytes(b"12")
    assert not folder.finished("two")


def test_results_that_were_moved_half_way_are_still_known_as_kilns(tmp_path, monkeypatch):
    folder = items.Folder(tmp_path, "chair")
    folder.fetched.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        (folder.fetched / name).write_bytes(b"1")

    def die(source, target):
        if target.name == "b.png":
            raise KeyboardInterrupt
        return replace(source, target)

    replace = os.replace
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", die)
        folder.take_results({"fingerprint": "one"})
    assert (folder.results / "a.png").exists() and not folder.is_foreign() and not folder.finished("one")
    folder.take_results({"fingerprint": "one"})
    assert folder.finished("one")


def test_a_folder_with_files_of_somebody_else_is_foreign(tmp_path):
    folder = items.Folder(tmp_path, "chair")
    assert not folder.is_foreign()
    folder.results.mkdir()
    assert not folder.is_foreign()
    (folder.results / "lods").mkdir()
    (folder.results / "lods" / "mesh.glb").write_bytes(b"1")
    assert folder.is_foreign()
