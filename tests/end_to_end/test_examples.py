"""Every example of examples/ runs for real, at the smallest settings, and docs/scripting.md says nothing that is not so.

Where the examples call the program `blender`, blender_program.py does the same by the bpy wheel; test_real_window.py runs the real one.
"""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import bpy
import pytest
from bl_ext.kiln_test.kiln import capture, session
from bl_ext.kiln_test.kiln.protocol import recipes

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PROGRAM = Path(__file__).with_name("blender_program.py")
TINY = {
    "capture.views": 8, "capture.size": 64, "capture.holdout": 1, "capture.materials": False, "fit.splats": 500, "fit.iterations": 50,
    "surface.grid": 40, "surface.faces": 500, "texture.size": 64,
}  # fmt: skip


pytestmark = pytest.mark.skipif(bool(bpy.app.binary_path), reason="examples are run by the bpy wheel")


@pytest.fixture(autouse=True)
def backend(home):
    session.current.start_backend()


def run(command, user, *, code=0):
    """What a command prints, after a look at its exit code."""
    environment = {**os.environ, "BLENDER_USER_RESOURCES": str(user)}
    done = subprocess.run(
        [str(word) for word in command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def faces(glb: Path) -> int:
    """Triangles of a GLB, read without any of Kiln."""
    content = glb.read_bytes()
    table = json.loads(content[20 : 20 + int.from_bytes(content[12:16], "little")])
    primitives = [primitive for mesh in table["meshes"] for primitive in mesh["primitives"]]
    return sum(table["accessors"][primitive["indices"]]["count"] // 3 for primitive in primitives)


def blend(path: Path, *names: str) -> Path:
    """A .blend with a cube for each name, all selected."""
    bpy.ops.wm.read_homefile(use_empty=True)
    for number, name in enumerate(names):
        bpy.ops.mesh.primitive_cube_add(location=(3 * number, 0, 0), scale=(1, 1, 1 + number))
        bpy.context.object.name = name
    for thing in bpy.context.scene.objects:
        thing.select_set(True)
    bpy.ops.wm.save_as_mainfile(filepath=str(path))
    return path


def test_in_blender(tmp_path, blender_user):
    target = tmp_path / "assets.blend"
    scene = blend(tmp_path / "props.blend", "Crate", "Ghost")
    bpy.data.objects["Ghost"].hide_render = True
    bpy.ops.wm.save_mainfile()
    program = [sys.executable, PROGRAM, "-b", scene, "--python", EXAMPLES / "in_blender.py", "--"]
    said = run([*program, target, json.dumps(TINY)], blender_user, code=1)
    assert "Crate: 500 faces" in said and "Ghost: [bad-subject] Ghost is hidden in renders." in said
    bpy.ops.wm.open_mainfile(filepath=str(target))
    (made,) = [one for one in bpy.data.collections if one.get("kiln_source")]
    assert made["kiln_source"] == "Crate" and made.asset_data is not None


def test_with_bpy(tmp_path, blender_user):
    extension = tmp_path / "kiln.zip"
    installed = blender_user / "extensions" / "user_default" / "kiln"
    with zipfile.ZipFile(extension, "w") as archive:
        for file in installed.rglob("*"):
            archive.write(file, file.relative_to(installed))
    out = tmp_path / "suzanne"
    said = run([sys.executable, EXAMPLES / "with_bpy.py", extension, out, json.dumps(TINY)], tmp_path / "user")
    assert "Suzanne: 500 faces" in said
    assert faces(out / "mesh.glb") == 500


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
def test_command_line(tmp_path, blender_user):
    blender = tmp_path / "blender"
    blender.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{PROGRAM}" "$@"\n')
    blender.chmod(blender.stat().st_mode | stat.S_IXUSR)
    settings = [word for name, value in TINY.items() for word in ("--set", f"{name}={value}")]
    scene, broken = blend(tmp_path / "crate.blend", "Crate"), tmp_path / "broken.glb"
    broken.write_text("not a model")
    example = [sys.executable, EXAMPLES / "command_line.py", tmp_path / "assets", "--blender", blender]
    said = run([*example, scene, broken, *settings], blender_user, code=1)
    assert "broken.glb cannot be read" in said and "1 of 2 made; failed: broken.glb" in said
    assert faces(tmp_path / "assets" / "crate" / "mesh.glb") == 500
    (tmp_path / "nothing").mkdir()
    batch = [blender, "--command", "kiln", "batch", tmp_path / "nothing", "--out", tmp_path / "out"]
    assert "nothing that Kiln reads" in run(batch, blender_user, code=2)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_an_interrupted_command_ends_at_once_with_exit_code_130(tmp_path, blender_user):
    scene = blend(tmp_path / "crate.blend", "Crate")
    command = [sys.executable, PROGRAM, "--command", "kiln", "run", scene, "--out", tmp_path / "out", "--set", "capture.views=200"]
    environment = {**os.environ, "BLENDER_USER_RESOURCES": str(blender_user)}
    with subprocess.Popen(list(map(str, command)), env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "rendering" in line:
                process.send_signal(signal.SIGINT)
                break
        assert process.wait(120) == 130
    assert not (tmp_path / "out").exists()


def test_without_blender(tmp_path, backend_python, blender_user):
    blend(tmp_path / "crate.blend", "Crate")
    views = tmp_path / "views"
    views.mkdir()
    recipe = recipes.make("reconstruct", TINY)
    capture.capture(capture.subject(bpy.context, objects=[bpy.data.objects["Crate"]]), recipe.capture, views, recipe.seed)
    example = [backend_python, EXAMPLES / "without_blender.py", views, tmp_path / "crate"]
    assert "500 faces" in run([*example, json.dumps(TINY)], blender_user)
    assert faces(tmp_path / "crate" / "mesh.glb") == 500
    assert "[bad-input]" in run([*example[:2], tmp_path, tmp_path / "nothing"], blender_user, code=1)


def test_batch(tmp_path, blender_user):
    blend(tmp_path / "kitchen.blend", "Chair A", "Chair B", "Table")
    (tmp_path / "hero.glb").write_text("not a model")
    values = ", ".join(f'"{name}" = {json.dumps(value)}' for name, value in TINY.items())
    manifest = (EXAMPLES / "batch.toml").read_text("utf-8")
    manifest = re.sub(r"(?m)^parameters = .*\n\n", f"parameters = {{ {values} }}\n\n", manifest, count=1)
    (tmp_path / "batch.toml").write_text(manifest.replace('"Chair*"', '"Chair A"'), encoding="utf-8")
    program = [sys.executable, PROGRAM, "-b", "--python", EXAMPLES / "batch.py", "--"]
    said = run([*program, tmp_path / "batch.toml", tmp_path / "assets"], blender_user, code=1)
    assert "kitchen_Chair_A: 500 faces" in said, said
    assert "hero: [bad-file]" in said and "[bad-input]" in said and "props/*.glb" in said, said
    assert faces(tmp_path / "assets" / "kitchen_Chair_A" / "mesh.glb") == 500
    assert json.loads((tmp_path / "assets" / "report.json").read_text("utf-8"))["state"] == "done"


# Codes that no script meets: what the panel alone asks for.
OF_THE_WINDOW = {
    "no-job", "no-views", "bad-target", "no-log", "remote", "import", "bad-result", "bad-uvs", "no-source", "no-batch", "no-report",
    "bad-request", "unknown-message",
}  # fmt: skip


def test_the_scripting_page_links_every_example_and_tells_every_error_code():
    page = (ROOT / "docs" / "scripting.md").read_text("utf-8")
    assert {file.name for file in EXAMPLES.iterdir() if file.is_file()} == set(re.findall(r"\(\.\./examples/([\w.]+)\)", page))
    told = {code for row in re.findall(r"^\| (`[a-z-]+`.*?) \|", page, re.MULTILINE) for code in re.findall(r"`([a-z-]+)`", row)}

    def raised(*folders):
        files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
        return {code for file in files for code in re.findall(r'(?:KilnError\(\s*|code=)"([a-z-]+)"', file.read_text("utf-8"))}

    assert told - {"set-up"} <= raised("backend", "blender_addon", "protocol")  # that one is environment.py's own error's
    assert raised("blender_addon") - told <= OF_THE_WINDOW
