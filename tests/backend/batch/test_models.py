"""Models, through a Blender in the background: captured ahead, tried again when Blender dies, exported, put into a library."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from backend.batch import blender
from protocol.errors import KilnError

# Small, but with as many views as give time to kill Blender among them.
TINY = {
    "capture.views": 16, "capture.size": 160, "capture.holdout": 2, "fit.splats": 500, "fit.iterations": 50, "surface.grid": 32,
    "surface.faces": 200, "texture.size": 64,
}  # fmt: skip
SCENE = """
import bpy
bpy.ops.wm.read_homefile(use_empty=True)
for number, name in enumerate(("Chair A", "Chair B", "Lamp")):
    bpy.ops.mesh.primitive_cube_add(size=1 + number)
    bpy.context.object.name = name
bpy.data.objects.new("Chair handle", None)
bpy.ops.wm.save_as_mainfile(filepath=PATH)
bpy.ops.export_scene.gltf(filepath=PATH.replace("level.blend", "all.glb"))
"""


@pytest.fixture(scope="module")
def command():
    try:
        return blender.find()
    except KilnError as missing:
        pytest.skip(str(missing))


@pytest.mark.skipif(sys.platform == "win32", reason="finds and kills Blender as POSIX does")
def test_models_of_a_file_by_pattern_with_a_blender_that_dies(bench, tmp_path, command):
    code = f"PATH = {str(tmp_path / 'level.blend')!r}\n{SCENE}"
    subprocess.run(command.line(code), check=True, capture_output=True, timeout=120)
    (tmp_path / "broken.glb").write_bytes((tmp_path / "all.glb").read_bytes()[:300])
    parameters = "{ " + ", ".join(f'"{name}" = {value}' for name, value in TINY.items()) + " }"
    (tmp_path / "list.toml").write_text(
        f'[defaults]\npreset = "draft"\nparameters = {parameters}\n[[items]]\nfile = "broken.glb"\n'
        '[[items]]\nfile = "level.blend"\nobject = "Chair*"\n'
    )
    process = bench.begin("--blender", command.path)
    bench.until(lambda: bench.states()["Chair_A"] == "capturing", "Blender captures")
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    (background,) = {int(pid) for pid in children} - {bench.backend()}
    os.kill(background, signal.SIGKILL)
    bench.end(process, 1)
    found = {item["name"]: item for item in bench.report()["items"]}
    assert {name: item["state"] for name, item in found.items()} == {"broken": "failed", "Chair_A": "done", "Chair_B": "done"}
    assert sum(item["attempts"] for item in found.values()) == 5  # the broken one twice, and the one that Blender died of
    assert found["broken"]["error"]["message"].startswith("broken.glb") and not found["Chair_A"]["error"]
    assert found["Chair_A"]["object"] == "Chair A" and found["Chair_A"]["seconds"]["capture"] > 0
    for name in ("Chair_A", "Chair_B"):
        assert found[name]["figures"]["faces"] <= 200 and (bench.out / name / "mesh.glb").exists()
        for which in ("source", "result"):
            with Image.open(bench.out / "thumbnails" / f"{name}.{which}.png") as picture:
                assert picture.mode == "RGBA" and picture.getextrema()[3] == (0, 255)  # something, on nothing
    assert not (bench.out / ".work" / "Chair_A").exists()

    listed = os.stat(bench.out / ".work" / "blender-1.log").st_mtime_ns
    before = (bench.out / "Chair_A" / "mesh.glb").stat().st_mtime_ns
    bench.batch("--blender", command.path, code=1)  # nothing is left to do, so no Blender starts
    assert os.stat(bench.out / ".work" / "blender-1.log").st_mtime_ns == listed

    words = ["--blender", command.path, "--fbx", "--library", "props.blend", "--catalog", "Kit/Chairs"]
    bench.batch(*words, code=1)
    assert (bench.out / "Chair_A" / "mesh.glb").stat().st_mtime_ns == before
    for name in ("Chair_A", "Chair_B"):
        assert (bench.out / name / f"{name}.fbx").read_bytes().startswith(b"Kaydara FBX Binary")
        assert f"{name}.fbx" in json.loads((bench.out / name / "item.json").read_text())["files"]
    library = {"file": str(tmp_path / "props.blend"), "catalog": "Kit/Chairs", "assets": 2, "error": None}
    assert bench.report()["library"] == library
    assert ":Kit/Chairs:" in (tmp_path / "blender_assets.cats.txt").read_text()
    written = (tmp_path / "props.blend").stat().st_mtime_ns
    bench.batch(*words, code=1)
    assert bench.report()["library"] == library and (tmp_path / "props.blend").stat().st_mtime_ns == written

    words[-1] = "Kit/Seats"
    process = bench.begin(*words)
    bench.until(lambda: bench.report()["state"] == "running" and bench.report()["library"], "Blender opens the library")
    (bench.out / "cancel").touch()
    bench.end(process, 130)
    assert bench.report()["state"] == "cancelled" and bench.report()["library"]["assets"] == 0
    bench.batch(*words, code=1)
    assert bench.report()["library"] == {**library, "catalog": "Kit/Seats"}
    assert ":Kit/Seats:" in (tmp_path / "blender_assets.cats.txt").read_text()


def test_captures_leave_room_on_the_disk(bench, tmp_path, command, small_disk):
    (tmp_path / "cube.glb").write_bytes(b"glTF")
    (tmp_path / "list.toml").write_text('[[items]]\nfile = "cube.glb"\n')
    (bench.folder / "out").symlink_to(small_disk)
    said = bench.batch("--blender", command.path, code=1)
    assert "a capture wants" in said and "Free some space; the same command goes on" in said


def test_without_a_blender_models_are_refused_before_anything_runs(bench, tmp_path):
    (tmp_path / "cube.glb").write_bytes(b"glTF")
    (tmp_path / "list.toml").write_text('[[items]]\nfile = "cube.glb"\n')
    said = bench.batch("--blender", Path(sys.executable), code=2)
    assert "cannot be used as Blender: it is a Python without bpy" in said and bench.states() == {"cube": "waiting"}
