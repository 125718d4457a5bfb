"""The Blender that runs in the background, as `kiln batch` asks it: against the same files imported and captured here, and read back by
Blender's own importers."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import bpy
import numpy as np
import pytest
from bl_ext.kiln_test.kiln import background, capture, export, import_asset, splat_files, splat_nodes
from bl_ext.kiln_test.kiln.protocol import recipes
from PIL import Image

from backend.batch import blender as talk
from protocol.errors import KilnError

ROOT = Path(__file__).parents[2]
TINY = {"capture.views": 4, "capture.size": 64, "capture.holdout": 0, "capture.samples": 4}
WITH_USD = pytest.mark.skipif(not bpy.app.build_options.usd, reason="this Blender was built without USD")
HERE = Path(bpy.app.binary_path or sys.executable)


# Files to read


def material(name, color, picture=None):
    made = bpy.data.materials.new(name)
    if bpy.app.version < (5, 0, 0):
        made.use_nodes = True
    shader = made.node_tree.nodes["Principled BSDF"]
    shader.inputs["Base Color"].default_value = (*color, 1)
    if picture is not None:
        texture = made.node_tree.nodes.new("ShaderNodeTexImage")
        texture.image = picture
        made.node_tree.links.new(texture.outputs["Color"], shader.inputs["Base Color"])
    return made


def wedge(name="Wedge", at=(0.4, -0.3, 0.2), color=(0.8, 0.1, 0.05)):
    """A mesh that no turn or mirroring maps onto itself, away from the origin."""
    points = [(0, 0, 0), (1.0, 0, 0), (0, 0.6, 0), (0, 0, 0.3), (0.2, 0.1, 0.5)]
    mesh = bpy.data.meshes.new(name)
    mesh.from_pydata(points, [], [(0, 2, 1), (0, 1, 4), (0, 4, 3), (1, 2, 4), (3, 4, 2), (0, 3, 2)])
    mesh.uv_layers.new(name="UVMap")
    mesh.materials.append(material(name, color))
    thing = bpy.data.objects.new(name, mesh)
    thing.location = at
    bpy.context.collection.objects.link(thing)
    return thing


def checker(path, size=8):
    values = np.indices((size, size)).sum(0) % 2 * 255
    Image.fromarray(np.dstack([values, values // 2, 255 - values]).astype(np.uint8)).save(path)
    return path


WRITERS = {
    ".glb": lambda path: bpy.ops.export_scene.gltf(filepath=path),
    ".gltf": lambda path: bpy.ops.export_scene.gltf(filepath=path, export_format="GLTF_SEPARATE"),
    ".obj": lambda path: bpy.ops.wm.obj_export(filepath=path),
    ".fbx": lambda path: bpy.ops.export_scene.fbx(filepath=path),
    ".usda": lambda path: bpy.ops.wm.usd_export(filepath=path),
    ".usdc": lambda path: bpy.ops.wm.usd_export(filepath=path),
    ".usdz": lambda path: bpy.ops.wm.usd_export(filepath=path),
    ".ply": lambda path: bpy.ops.wm.ply_export(filepath=path),
    ".stl": lambda path: bpy.ops.wm.stl_export(filepath=path),
    ".blend": lambda path: bpy.ops.wm.save_as_mainfile(filepath=path, copy=True),
}


def fresh():
    bpy.ops.wm.read_homefile(use_factory_startup=True, use_empty=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The wedge in a file of every kind, as views/ has it captured here."""
    folder = tmp_path_factory.mktemp("files")
    fresh()
    thing = wedge()
    bpy.context.view_layer.update()
    capture.capture(capture.subject(bpy.context, objects=[thing]), recipes.make("reconstruct", TINY).capture, folder / "views")
    for suffix, write in WRITERS.items():
        if not suffix.startswith(".usd") or bpy.app.build_options.usd:
            write(str(folder / f"wedge{suffix}"))
    return folder


@pytest.fixture(scope="module")
def command():
    return talk.find(HERE)


@pytest.fixture(scope="module")
def blender(tmp_path_factory, command):
    """One for all tests, which it survives. Neither msgpack nor zmq can be imported in it: a real Blender has none."""
    folder = tmp_path_factory.mktemp("blender")
    for name in ("msgpack", "zmq"):
        (folder / f"{name}.py").write_text("raise ImportError('this is not needed')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        started = talk.Blender(command, folder / "log.txt")
    yield started
    started.close()
    assert not Path(started._scratch).exists()


def take(blender, file, folder, values=None, recipe="reconstruct", subject=None, progress=None):
    fields = {"file": str(file), "folder": str(folder), "recipe": recipe, "values": {**TINY, **(values or {})}}
    return blender.request("capture", progress, **fields, **({"subject": subject} if subject else {}))


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


def covers(folder):
    return np.stack([np.asarray(Image.open(path))[..., 3] / 255 for path in sorted(Path(folder).glob("color_*.png"))])


# Reading models


@pytest.mark.parametrize("suffix", [pytest.param(one, marks=WITH_USD if one.startswith(".usd") else ()) for one in WRITERS])
def test_a_file_of_every_kind_gives_the_views_of_its_surface(blender, files, tmp_path, suffix):
    told = []
    done = take(blender, files / f"wedge{suffix}", tmp_path, progress=lambda *news: told.append(news))
    assert set(done["inputs"]) == {"transforms.json", *(f"{kind}_{n:03}.{end}" for n in range(4) for kind, end in KINDS)}
    assert all(Path(place).is_file() for place in done["inputs"].values()) and Path(done["picture"]).is_file()
    assert told and all(0 <= fraction <= 1 and text for fraction, text in told)
    seen, wanted = covers(tmp_path), covers(files / "views")
    assert 0.05 < wanted.mean() < 0.5
    assert np.abs(seen - wanted).mean() < 2e-3  # the same shape, as large, in the same place, the same way up
    if suffix not in (".ply", ".stl"):  # they hold no material
        color, true = (np.asarray(Image.open(sorted(place.glob("color_*"))[0]), float) for place in (tmp_path, files / "views"))
        inside = (true[..., 3] == 255) & (color[..., 3] == 255)
        assert np.abs(color[inside] - true[inside]).max() <= 3
    assert done["warnings"] == []


KINDS = [("color", "png"), ("geometry", "npz"), ("material", "npz")]


@pytest.mark.oldest
def test_the_views_are_those_that_an_artist_gets_from_the_panel(blender, files, tmp_path):
    """Byte by byte: imported here by hand and captured, and the file that is open here."""
    bpy.ops.import_scene.gltf(filepath=str(files / "wedge.glb"))
    chosen = capture.subject(bpy.context, objects=[bpy.data.objects["Wedge"]])
    capture.capture(chosen, recipes.make("reconstruct", TINY).capture, tmp_path / "panel")
    take(blender, files / "wedge.glb", tmp_path / "glb")
    assert contents(tmp_path / "glb") == contents(tmp_path / "panel")
    take(blender, files / "wedge.blend", tmp_path / "blend")
    assert contents(tmp_path / "blend") == contents(files / "views")


def test_an_item_gives_the_same_bytes_first_and_later(blender, files, tmp_path):
    first = take(blender, files / "wedge.obj", tmp_path / "1")
    take(blender, files / "wedge.fbx", tmp_path / "2", {"capture.color": "cycles"})
    with pytest.raises(KilnError):
        take(blender, files / "views" / "transforms.json", tmp_path / "3")
    last = take(blender, files / "wedge.obj", tmp_path / "4")
    assert contents(tmp_path / "1") == contents(tmp_path / "4")
    assert first["source"] == last["source"]


def several(path):
    """Two chairs, a table, a camera, one hidden thing, two collections of which one is empty, and a cup in a scene in centimetres."""
    fresh()
    for number, name in enumerate(["Chair", "Chair [old]", "Table"]):
        wedge(name, at=(2 * number, 0, 0))
    wedge("Hidden").hide_render = True
    bpy.ops.object.camera_add()
    sets = bpy.data.collections.new("Set")
    bpy.context.scene.collection.children.link(sets)
    bpy.context.scene.collection.children.link(bpy.data.collections.new("Set empty"))
    for name in ("Chair", "Table"):
        sets.objects.link(bpy.data.objects[name])
    sets.instance_offset = (1, 2, 3)
    small = bpy.data.scenes.new("Centimetres")
    small.unit_settings.scale_length = 0.01
    thing = wedge("Cup", at=(10, 0, 0))
    bpy.context.collection.objects.unlink(thing)
    small.collection.objects.link(thing)
    bpy.ops.wm.save_as_mainfile(filepath=str(path), copy=True)


@pytest.mark.oldest
def test_of_a_blend_objects_and_collections_are_found_by_pattern_and_units_are_its_scenes(blender, tmp_path):
    several(path := tmp_path / "several.blend")

    def names(**asked):
        return [one["name"] for one in blender.request("list", file=str(path), **asked)["subjects"]]

    assert sorted(names()) == ["Chair", "Chair [old]", "Cup", "Table"]
    assert sorted(names(object="Chair*")) == ["Chair", "Chair [old]"]
    assert names(object="Chair [old]") == ["Chair [old]"]  # a name is no pattern where there is a thing of that name
    assert names(collection="Set*") == ["Set"]
    with pytest.raises(KilnError, match="no object 'Sofa' with a surface.*Chair.*Table") as missing:
        names(object="Sofa")
    assert missing.value.code == "no-object"
    with pytest.raises(KilnError, match="Hidden is hidden in renders"):
        names(object="Hidden")

    subjects = blender.request("list", file=str(path))["subjects"]
    cup = take(blender, path, tmp_path / "cup", subject=next(one for one in subjects if one["name"] == "Cup"))
    table = json.loads((tmp_path / "cup" / "transforms.json").read_text())
    assert cup["source"]["unit_scale"] == pytest.approx(0.01)
    assert table["pivot"] == pytest.approx([0.1, 0, 0])
    assert np.linalg.norm(np.array(table["frames"][0]["transform_matrix"])[:3, 3] - table["pivot"]) < 0.05
    take(blender, path, tmp_path / "set", subject={"kind": "collection", "name": "Set"})
    assert json.loads((tmp_path / "set" / "transforms.json").read_text())["pivot"] == [1, 2, 3]


def test_several_objects_of_a_file_are_one_subject_with_the_origin_of_what_they_hang_from(blender, tmp_path):
    root = bpy.data.objects.new("Root", None)
    bpy.context.collection.objects.link(root)
    root.location = (0.5, 0, 0)
    for number in range(2):
        wedge(f"Part {number}", at=(number, 0, 0)).parent = root
    bpy.ops.export_scene.gltf(filepath=str(tmp_path / "parts.glb"))
    done = take(blender, tmp_path / "parts.glb", tmp_path / "views")
    assert done["source"]["kind"] == "objects" and done["source"]["dimensions"][0] == pytest.approx(2, abs=1e-5)
    assert done["source"]["pivot"] == pytest.approx([0.5, 0, 0])


@pytest.mark.parametrize("what", ["script", "driver"])
def test_nothing_in_a_blend_runs_and_what_did_not_is_said(blender, tmp_path, what):
    thing = wedge()
    proof = tmp_path / "ran.txt"
    if what == "script":
        text = bpy.data.texts.new("attack.py")
        text.write(f"open({str(proof)!r}, 'w').close()")
        text.use_module = True
    else:
        thing.driver_add("location", 0).driver.expression = f"len([open({str(proof)!r}, 'w').close()])"
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "a.blend"), copy=True)
    proof.unlink(missing_ok=True)  # in this process, scripts may have run
    (warning,) = take(blender, tmp_path / "a.blend", tmp_path / "views")["warnings"]
    assert not proof.exists()
    assert "were not run" in warning and ("attack.py" if what == "script" else "open(") in warning


def test_textures_that_are_missing_are_named_and_do_not_stop_it(blender, tmp_path):
    thing = wedge()
    picture = bpy.data.images.load(str(checker(tmp_path / "paint.png")))
    thing.data.materials[0] = material("painted", (1, 1, 1), picture)
    bpy.ops.wm.obj_export(filepath=str(tmp_path / "a.obj"), path_mode="RELATIVE")
    bpy.ops.export_scene.fbx(filepath=str(tmp_path / "a.fbx"), path_mode="RELATIVE")
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "a.blend"), copy=True)
    for suffix in (".obj", ".blend", ".fbx"):
        assert take(blender, tmp_path / f"a{suffix}", tmp_path / f"with{suffix}")["warnings"] == []
    (tmp_path / "paint.png").unlink()
    for suffix in (".obj", ".blend", ".fbx"):
        (warning,) = take(blender, tmp_path / f"a{suffix}", tmp_path / f"without{suffix}")["warnings"]
        assert "paint.png is missing" in warning


PLY = b"ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty float y\nproperty float z\n%send_header\n"
BROKEN = {
    "a.xyz": (b"what", "of no kind that can be imported.*glb"),
    "gone.glb": (None, "no file"),
    "empty.fbx": (b"", "is empty"),
    "garbage.glb": (b"glTF, so it says" * 9, "cannot be read"),
    "garbage.fbx": (b"; FBX 7.3" + bytes(100), "cannot be read|no surface"),
    "garbage.obj": (bytes(range(256)) * 4, "cannot be read|no surface"),
    "garbage.blend": (b"BLENDER-v999" + bytes(200), "cannot be read.*open"),
    "garbage.ply": (b"ply\nformat ascii 1.0\nelement", "cannot be read|no surface"),
    "points.ply": (PLY % b"" + b"0 0 0\n1 1 1\n", "no faces"),
    "splats.ply": (PLY % b"property float f_dc_0\n" + b"0 0 0 1\n1 1 1 0\n", "splats.*mesh_splats"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_used_is_refused_in_a_sentence(blender, tmp_path, name):
    content, says = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = blender.pid
    with pytest.raises(KilnError, match=says) as refused:
        take(blender, tmp_path / name, tmp_path / "views")
    assert refused.value.code in ("bad-file", "bad-subject") and "Traceback" not in str(refused.value)
    assert blender.alive and blender.pid == before


def test_a_file_without_a_surface_says_what_it_holds(blender, tmp_path):
    bpy.ops.object.camera_add()
    bpy.ops.export_scene.gltf(filepath=str(tmp_path / "camera.glb"), export_cameras=True)
    with pytest.raises(KilnError, match="camera.glb has no surface: it holds camera"):
        take(blender, tmp_path / "camera.glb", tmp_path / "views")


def test_of_what_moves_the_longest_clip_is_captured_and_the_job_is_told_its_frames(blender, tmp_path):
    thing = wedge()
    for name, last in (("Nod", 4), ("Walk", 7)):
        thing.animation_data_clear()
        for frame, height in ((1, 0.0), (last, 0.4)):
            thing.location.z = height
            thing.keyframe_insert("location", index=2, frame=frame)
        action = thing.animation_data.action
        action.name = name
        tracks = bpy.context.scene.get("tracks", [])
        bpy.context.scene["tracks"] = [*tracks, name]
    thing.animation_data_clear()
    for name in ("Nod", "Walk"):
        animation = thing.animation_data_create()
        animation.nla_tracks.new().strips.new(name, 1, bpy.data.actions[name])
        animation.nla_tracks[-1].name = name
    bpy.ops.export_scene.gltf(filepath=str(tmp_path / "moves.glb"))
    values = {"capture.views": 4, "capture.cameras": 4, "capture.size": 64, "capture.holdout": 0, "capture.frame_step": 3}
    fields = {"recipe": "animate", "values": values, "folder": str(tmp_path / "views")}
    done = blender.request("capture", file=str(tmp_path / "moves.glb"), **fields)
    frames = [entry["frame"] for entry in json.loads((tmp_path / "views" / "transforms.json").read_text())["frames"]]
    start, end = done["values"]["capture.frame_start"], done["values"]["capture.frame_end"]
    assert end - start == 6 and sorted(set(frames)) == [start, start + 3, start + 6]
    assert done["warnings"] == ["It has 2 clips: the longest, Walk, is taken."]


def test_splats_in_a_blend_go_out_as_they_stand(blender, tmp_path):
    random = np.random.default_rng(0)
    points = splat_files.Points(
        means=random.normal(size=(40, 3)), scales=np.full((40, 3), 0.05, np.float32),
        quaternions=np.eye(4, dtype=np.float32)[np.zeros(40, int)],
        colors=random.random((40, 3)).astype(np.float32), opacities=np.full(40, 0.8, np.float32),
    )  # fmt: skip
    thing = splat_nodes.make_object("Cloud", points)
    thing.location = (1, 2, 3)
    bpy.context.collection.objects.link(thing)
    wedge()
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "a.blend"), copy=True)
    bpy.context.view_layer.update()
    work = export.Export(export.subject(bpy.context, thing=thing), tmp_path)
    while work.step():
        pass
    subjects = blender.request("list", file=str(tmp_path / "a.blend"))["subjects"]
    assert {one["name"]: one["splats"] for one in subjects} == {"Cloud": True, "Wedge": False}
    (subject,) = blender.request("list", file=str(tmp_path / "a.blend"), recipe="mesh_splats")["subjects"]
    done = blender.request("capture", file=str(tmp_path / "a.blend"), recipe="mesh_splats", folder=str(tmp_path / "out"), subject=subject)
    assert list(done["inputs"]) == ["splats.ply"] and done["values"]["subject.up"] == "auto"
    assert (tmp_path / "out" / "splats.ply").read_bytes() == (tmp_path / "splats.ply").read_bytes()


# The process


def test_what_blender_prints_goes_to_its_log_and_disturbs_nobody(blender, files, tmp_path):
    odd = tmp_path / '{"id": 1, "ok": {}} é'
    odd.mkdir()
    shutil.copyfile(files / "wedge.glb", odd / "wedge.glb")
    done = take(blender, odd / "wedge.glb", odd / "views")
    assert len(done["inputs"]) == 13
    assert "Saved: '" in blender.log.read_text("utf-8", "replace")


def test_an_unknown_request_and_unknown_fields_are_errors_of_that_request_alone(blender, files):
    with pytest.raises(KilnError, match="no request 'dance'"):
        blender.request("dance")
    with pytest.raises(KilnError, match="TypeError") as error:
        blender.request("list", file=str(files / "wedge.glb"), colour="red")
    assert error.value.code == "internal"
    assert blender.request("list", file=str(files / "wedge.glb"))["subjects"] == [{"kind": "file", "name": "wedge", "splats": False}]


def test_a_blender_that_dies_or_says_nothing_is_over_and_the_next_one_does_the_work(command, files, tmp_path, monkeypatch):
    """These have their code from an installed extension: one folder, with protocol in it."""
    monkeypatch.setenv("KILN_EXTENSION", str(Path(capture.__file__).parent))
    endless = {"capture.size": 2048, "capture.samples": 256, "capture.views": 50}

    def ends(blender, how):
        with pytest.raises(KilnError, match=f"{how}.*capturing wedge.glb") as over:
            take(blender, files / "wedge.glb", tmp_path / how, endless)
        assert over.value.code == "blender-died" and not blender.alive and not Path(blender._scratch).exists()
        with pytest.raises(KilnError, match="ended by|ended with"):
            blender.request("list", file=str(files / "wedge.glb"))

    dying = talk.Blender(command, tmp_path / "log.txt")
    deadly = getattr(signal, "SIGKILL", signal.SIGTERM)
    threading.Timer(0.3, os.kill, (dying.pid, deadly)).start()
    ends(dying, "ended")
    next_one = talk.Blender(command, tmp_path / "log.txt")
    assert contents(files / "views").keys() == take(next_one, files / "wedge.glb", tmp_path / "views")["inputs"].keys()
    monkeypatch.setattr(talk, "QUIET_SECONDS", 0.3)
    ends(next_one, "said nothing")


def test_none_outlives_the_process_that_started_it(command, tmp_path):
    code = (
        "import time; from pathlib import *; from backend.batch.blender import Blender, Command\n"
        f"b = Blender({command!r}, Path({str(tmp_path / 'log.txt')!r})); print(b._scratch, flush=True); time.sleep(100)"
    )
    python = os.environ.get("KILN_BACKEND_PYTHON", sys.executable)
    starter = subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    scratch = Path(starter.stdout.readline().strip())
    assert scratch.is_dir()
    starter.kill()
    starter.wait()
    deadline = time.monotonic() + 60
    while scratch.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not scratch.exists()  # the last that it does


def test_how_much_memory_it_has_held_is_known():
    assert 2**26 < background._peak_memory() < 2**40


def test_only_a_blender_that_is_new_enough_is_used(tmp_path, monkeypatch):
    with pytest.raises(KilnError, match="cannot be used as Blender: it does not start") as error:
        talk.find(tmp_path / "nowhere")
    assert error.value.code == "no-blender"
    monkeypatch.setenv("KILN_BLENDER", sys._base_executable if not bpy.app.binary_path else sys.executable)
    with pytest.raises(KilnError, match="a Python without bpy"):
        talk.find()
    if os.name == "posix":
        old = tmp_path / "blender"
        old.write_text("#!/bin/sh\necho Blender 3.6.5\n")
        old.chmod(0o755)
        with pytest.raises(KilnError, match="3.6.5 is older than 4.2"):
            talk.find(old)
        with pytest.raises(KilnError, match="older"):  # the folder that it lies in
            talk.find(tmp_path)
    found = talk.find(HERE)
    assert found.version.startswith(".".join(map(str, bpy.app.version)))


# What Blender writes


def game_glb(path):
    """Two levels, one of which MSFT_lod alone names, a hull, a material with colour, normals, and roughness with metallic in one map."""
    made = material("Crate", (1, 1, 1))
    shader = made.node_tree.nodes["Principled BSDF"]
    pictures = {}
    for name, value in (("Crate_BaseColor", (200, 120, 40)), ("Crate_Normal", (128, 200, 240)), ("Crate_ORM", (255, 90, 10))):
        Image.new("RGB", (16, 16), value).save(path.with_name(f"{name}.png"))
        node = pictures[name] = made.node_tree.nodes.new("ShaderNodeTexImage")
        node.image = bpy.data.images.load(str(path.with_name(f"{name}.png")))
        if name != "Crate_BaseColor":
            node.image.colorspace_settings.name = "Non-Color"
    link = made.node_tree.links.new
    link(pictures["Crate_BaseColor"].outputs["Color"], shader.inputs["Base Color"])
    bump = made.node_tree.nodes.new("ShaderNodeNormalMap")
    link(pictures["Crate_Normal"].outputs["Color"], bump.inputs["Color"])
    link(bump.outputs["Normal"], shader.inputs["Normal"])
    split = made.node_tree.nodes.new("ShaderNodeSeparateColor")
    link(pictures["Crate_ORM"].outputs["Color"], split.inputs["Color"])
    link(split.outputs["Green"], shader.inputs["Roughness"])
    link(split.outputs["Blue"], shader.inputs["Metallic"])
    for name, cuts in (("Crate_LOD1", 1), ("Crate_LOD0", 3), ("UCX_Crate_LOD0_00", 0)):
        bpy.ops.mesh.primitive_grid_add(x_subdivisions=cuts + 1, y_subdivisions=cuts + 1, size=2)
        thing = bpy.context.object
        thing.name = thing.data.name = name
        for vertex in thing.data.vertices:
            vertex.co = (vertex.co.x, 0.5 * vertex.co.y, 0.25 * vertex.co.x)
        if "UCX" not in name:
            thing.data.materials.append(made)
    bpy.ops.export_scene.gltf(filepath=str(path), export_tangents=True)
    data = path.read_bytes()
    size = int.from_bytes(data[12:16], "little")
    document = json.loads(data[20 : 20 + size])
    first, second = (next(n for n, node in enumerate(document["nodes"]) if node["name"] == f"Crate_LOD{level}") for level in (0, 1))
    document["nodes"][first]["extensions"] = {"MSFT_lod": {"ids": [second]}}
    document["extensionsUsed"] = ["MSFT_lod"]
    document["scenes"][0]["nodes"].remove(second)
    packed = json.dumps(document).encode()
    packed += b" " * (-len(packed) % 4)
    rest = data[20 + size :]
    head = b"glTF" + (2).to_bytes(4, "little") + (20 + len(packed) + len(rest)).to_bytes(4, "little")
    path.write_bytes(head + len(packed).to_bytes(4, "little") + b"JSON" + packed + rest)


def tree(path):
    """An FBX file by Blender's own parser of the format: properties of its global settings, models by name, kinds of nodes."""
    from io_scene_fbx import parse_fbx

    root, _ = parse_fbx.parse(str(path))
    part = {element.id: element for element in root.elems}

    def properties(element):
        (table,) = [inner for inner in element.elems if inner.id == b"Properties70"]
        return {one.props[0].decode(): one.props[4:] for one in table.elems}

    models = {one.props[1].split(b"\0")[0].decode(): one for one in part[b"Objects"].elems if one.id == b"Model"}
    numbers = {one.props[0]: name for name, one in models.items()}
    links = [(numbers.get(link.props[1]), numbers.get(link.props[2])) for link in part[b"Connections"].elems]
    kinds = [one.props for one in part[b"Objects"].elems if one.id == b"NodeAttribute"]
    groups = [props[1].split(b"\0")[0].decode() for props in kinds if props[2] == b"LodGroup"]
    return properties(part[b"GlobalSettings"]), {name: properties(one) for name, one in models.items()}, links, groups


@pytest.mark.parametrize("engine", ["unity", "unreal"])
def test_fbx_is_as_the_engine_takes_it(blender, tmp_path, engine):
    game_glb(tmp_path / "game.glb")
    out = tmp_path / "out" / "Crate.fbx"
    done = blender.request("fbx", glb=str(tmp_path / "game.glb"), out=str(out), options={"engine": engine})
    beside = out.with_name("Crate_ORM.png")
    assert done["files"] == [str(out), str(beside)] and sorted(out.parent.iterdir()) == [out, beside]

    settings, models, links, groups = tree(out)
    for node in models.values():  # nothing is left to be applied: an engine shows scale 1 and no rotation
        assert not {"Lcl Scaling", "Lcl Rotation"} & set(node)
    unreal = engine == "unreal"
    assert settings["UnitScaleFactor"] == [1.0 if unreal else 100.0]
    assert settings["UpAxis"] == [2 if unreal else 1]
    assert groups == (["Crate"] if unreal else [])
    if unreal:
        assert [child for child, parent in links if child and parent == "Crate"] == ["Crate_LOD0", "Crate_LOD1"]
        assert ("UCX_Crate_LOD0_00", "Crate") not in links

    fresh()
    bpy.ops.import_scene.fbx(filepath=str(out))
    found = {thing.name: thing for thing in bpy.data.objects if thing.type == "MESH"}
    assert {name: len(thing.data.polygons) for name, thing in found.items()} == {
        "Crate_LOD0": 32, "Crate_LOD1": 8, "UCX_Crate_LOD0_00": 2,
    }  # fmt: skip
    for thing in found.values():
        corners = np.array([thing.matrix_world @ vertex.co for vertex in thing.data.vertices])
        assert np.ptp(corners, axis=0) == pytest.approx([2, 1, 0.5], abs=1e-5)
        assert np.corrcoef(corners[:, 0], corners[:, 2])[0, 1] == pytest.approx(1, abs=1e-4)  # not mirrored
    assert [one.name for one in found["Crate_LOD0"].data.materials] == ["Crate"]
    images = {image.name.partition(".")[0]: image for image in bpy.data.images if image.size[0]}
    assert {"Crate_BaseColor", "Crate_Normal"} <= set(images)
    green = images["Crate_Normal"].pixels[1] * 255
    assert green == pytest.approx(55 if unreal else 200, abs=1)


def test_fbx_of_a_glb_in_other_units_and_axes_stands_and_measures_as_the_source(blender, tmp_path):
    thing = wedge(at=(0, 0, 0))
    true = np.array([vertex.co for vertex in thing.data.vertices])
    # 100 units for a metre and Z up, in a format whose Y is up: what stands in the file as x y z is the world's x y z.
    thing.data.transform(bpy_matrix([[100, 0, 0, 0], [0, 0, -100, 0], [0, 100, 0, 0], [0, 0, 0, 1]]))
    bpy.ops.export_scene.gltf(filepath=str(tmp_path / "game.glb"))
    options = {"engine": "unity", "up": "z", "scale": 100.0, "textures": "beside"}
    blender.request("fbx", glb=str(tmp_path / "game.glb"), out=str(tmp_path / "a.fbx"), options=options)
    fresh()
    bpy.ops.import_scene.fbx(filepath=str(tmp_path / "a.fbx"))
    (made,) = [one for one in bpy.data.objects if one.type == "MESH"]
    corners = np.array([made.matrix_world @ vertex.co for vertex in made.data.vertices])
    assert np.abs(corners[:, None] - true[None]).max(-1).min(1).max() < 1e-5
    with pytest.raises(KilnError, match="cannot be read"):
        (tmp_path / "broken.glb").write_bytes(b"glTF")
        blender.request("fbx", glb=str(tmp_path / "broken.glb"), out=str(tmp_path / "b.fbx"))


def bpy_matrix(rows):
    from mathutils import Matrix

    return Matrix(rows)


def result(folder, name, color):
    """A result's folder: mesh, preview and report."""
    folder.mkdir()
    fresh()
    thing = wedge(name, color=color)
    image = bpy.data.images.load(str(checker(folder.parent / f"{name}.png")))
    thing.data.materials[0] = material(name, color, image)
    bpy.ops.export_scene.gltf(filepath=str(folder / "mesh.glb"))
    Image.new("RGBA", (32, 32), tuple(round(255 * value) for value in color) + (255,)).save(folder / "preview.png")
    told = {"recipe": "reconstruct", "parameters": {"seed": 7}, "versions": {"kiln": "0.1.0"}}
    (folder / "report.json").write_text(json.dumps(told))
    return {"name": name, "folder": str(folder)}


def preview(collection):
    values = np.array(list(collection.preview.image_pixels_float)).reshape(-1, 4)
    return values[len(values) // 2, :3]


def test_a_library_takes_results_and_keeps_what_it_has(blender, tmp_path):
    red = result(tmp_path / "red", "Red", (1, 0, 0))
    blue = result(tmp_path / "blue", "Blue", (0, 0, 1))
    green = result(tmp_path / "green", "Red", (0, 1, 0))  # of the same name
    green["source"] = {"location": [0.4, -0.3, 0.2], "rotation": [1, 0, 0, 0], "unit_scale": 1.0}
    file = tmp_path / "library" / "props.blend"
    assert blender.request("library", assets=[red, blue], file=str(file), catalog="Props/Wood")["assets"] == 2
    (line,) = [one for one in catalogs(file) if one[1] == "Props/Wood"]

    bpy.ops.wm.open_mainfile(filepath=str(file))  # someone adds to it by hand
    wedge("By hand").asset_mark()
    bpy.ops.wm.save_mainfile()
    assert blender.request("library", assets=[green], file=str(file), catalog="Props/Wood")["assets"] == 2
    assert [one for one in catalogs(file) if one[1] == "Props/Wood"] == [line]
    blender.request("library", assets=[red | {"name": "Third"}], file=str(file), catalog="Props/Stone")

    fresh()
    with bpy.data.libraries.load(str(file), assets_only=True) as (there, _):
        assert sorted(there.collections) == ["Blue", "Red", "Third"] and there.objects == ["By hand"]
    assert file.read_bytes()[:4] == b"\x28\xb5\x2f\xfd"  # zstd
    bpy.ops.wm.open_mainfile(filepath=str(file))
    found = {one.name: one for one in bpy.data.collections if one.asset_data}
    assert found["Red"].asset_data.catalog_id == found["Blue"].asset_data.catalog_id == line[0]
    assert found["Third"].asset_data.catalog_id != line[0]
    assert preview(found["Red"]) == pytest.approx([0, 1, 0], abs=0.05)
    assert preview(found["Blue"]) == pytest.approx([0, 0, 1], abs=0.05)
    assert found["Red"]["kiln_recipe"] == "reconstruct" and found["Red"]["kiln_seed"] == 7
    reach = []
    for name, collection in found.items():
        (thing,) = collection.objects
        assert thing.name == f"{name} mesh"
        images = [node.image for one in thing.data.materials for node in one.node_tree.nodes if node.type == "TEX_IMAGE"]
        assert images and all(image.packed_file for image in images)
        assert [one.name for one in thing.data.materials] == [name] and [image.name for image in images] == [f"{name} base color"]
        corners = np.array([thing.matrix_world @ vertex.co for vertex in thing.data.vertices])
        reach.append((corners[:, 0].min(), corners[:, 0].max()))
        origin = np.array(collection.instance_offset)
        # The object's own origin where it is known, a corner of the wedge's base; else the middle of the base.
        wanted = corners.min(0) if name == "Red" else [*(corners.min(0) + corners.max(0))[:2] / 2, corners[:, 2].min()]
        assert origin == pytest.approx(wanted, abs=1e-5)
        assert origin[1:] == pytest.approx([0, 0], abs=1e-5)
    reach.sort()
    assert all(left[1] < right[0] for left, right in zip(reach, reach[1:], strict=False))  # side by side


def catalogs(file):
    lines = file.with_name("blender_assets.cats.txt").read_text().splitlines()
    return [line.split(":") for line in lines if line.count(":") == 2]


def test_a_library_that_cannot_be_read_or_a_result_without_mesh_leaves_the_file_as_it_was(blender, tmp_path):
    whole = result(tmp_path / "red", "Red", (1, 0, 0))
    (tmp_path / "props.blend").write_bytes(b"my own notes")
    with pytest.raises(KilnError, match="props.blend cannot be read or written"):
        blender.request("library", assets=[whole], file=str(tmp_path / "props.blend"))
    assert (tmp_path / "props.blend").read_bytes() == b"my own notes"
    (tmp_path / "nothing").mkdir()
    with pytest.raises(KilnError, match="no mesh.glb"):
        blender.request("library", assets=[whole, {"name": "b", "folder": str(tmp_path / "nothing")}], file=str(tmp_path / "new.blend"))
    assert not (tmp_path / "new.blend").exists()


def test_the_catalog_has_the_same_id_in_every_library(tmp_path):
    """What import_asset does for a file that was saved."""
    thing = wedge()
    identities = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / name / "x.blend"))
        thing = bpy.data.objects["Wedge"]
        thing.asset_mark()
        import_asset._catalogue(bpy.context, thing.asset_data, "Props/Wood")
        identities.append(catalogs(tmp_path / name / "x.blend"))
    assert identities[0] == identities[1]
