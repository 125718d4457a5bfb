"""The batch panel and the real backend: a batch outlives the Blender that started it, and makes what the button makes, byte for byte."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import bpy
import pytest
from bl_ext.kiln_test.kiln import api, batch_panel, session

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("blender_program.py")
TINY = {
    "capture.views": 8, "capture.size": 64, "capture.holdout": 1, "fit.splats": 500, "fit.iterations": 50, "surface.grid": 40,
    "surface.faces": 500, "texture.size": 64,
}  # fmt: skip

# Runs in the first Blender: starts a batch of two, one of which has no face, and is gone while it runs.
FIRST = """
import os, sys, time
import bpy
from bl_ext.user_default.kiln import batch_panel, batches

bpy.ops.wm.read_homefile(use_empty=True)
bpy.ops.mesh.primitive_cube_add(location=(3, 0, 1))
bpy.context.object.name = "Box"
wire = bpy.data.objects.new("Wire", bpy.data.meshes.new("Wire"))
wire.data.from_pydata([(0, 0, 0), (1, 0, 0)], [(0, 1)], [])
bpy.context.scene.collection.objects.link(wire)
wire.select_set(True)
settings = bpy.context.scene.kiln
for name, value in {parameters!r}.items():
    setattr(settings.reconstruct, name.replace(".", "_"), value)
batch = batch_panel.ordered(bpy.context)
batches.start(batch)
while not any(item["state"] == "computing" for item in batches.look(batch.folder).items):
    assert batches.look(batch.folder).active, batches.look(batch.folder)
    time.sleep(0.05)
os._exit(0)
"""


pytestmark = pytest.mark.skipif(bool(bpy.app.binary_path), reason="a second Blender is started by the bpy wheel")


@pytest.fixture(autouse=True)
def backend(home):
    yield


def until(ready, seconds=300):
    end = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def only_batch():
    batch_panel.known.refresh()
    (batch,) = batch_panel.known.all.values()
    return batch


def test_a_batch_outlives_its_blender_and_a_kill_and_comes_into_the_file_as_one_undo_step(tmp_path, home, blender_user):
    (tmp_path / "first.py").write_text(FIRST.format(parameters=TINY))
    environment = {**os.environ, "BLENDER_USER_RESOURCES": str(blender_user)}
    command = [sys.executable, str(PROGRAM), "-b", "--python", str(tmp_path / "first.py")]
    first = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]

    batch = only_batch()
    assert batch.state == "running" and len(batch.items) == 2
    os.kill(batch.report["pid"], 9 if sys.platform != "win32" else 15)
    batch = until(lambda: (found := only_batch()).state == "interrupted" and found)
    assert not batch_panel.to_import(batch)

    bpy.ops.kiln.resume_batch(batch=batch.id)  # in `blender -b` it waits
    batch = only_batch()
    assert batch.state == "done" and batch.order.title == "Box and 1 more"
    box, wire = sorted(batch.items, key=lambda item: item["name"])
    assert (box["state"], wire["state"], wire["error"]["code"]) == ("done", "failed", "bad-subject")
    assert (batch.out / "index.html").is_file()

    bpy.ops.ed.undo_push(message="Before")
    bpy.ops.kiln.import_batch(batch=batch.id)
    (made,) = [one for one in bpy.data.collections if one.get("kiln_batch")]
    assert made.name in bpy.data.collections["Box and 1 more (Kiln batch)"].children
    assert made.asset_data is not None and json.loads(made["kiln_parameters"])["fit.iterations"] == 50
    mesh = next(thing for thing in made.objects if thing.name.endswith("mesh"))
    assert tuple(round(value, 1) for value in mesh.matrix_world.translation) == (3.0, 0.0, 1.0), "where its source stood"
    assert batch_panel.to_import(batch) == []
    bpy.ops.ed.undo()
    assert not [one for one in bpy.data.collections if one.get("kiln_batch")] and batch_panel.to_import(batch) == ["Box"]

    library = tmp_path / "library" / "props.blend"
    done, failed = sorted(api.batch(batch.order.manifest, batch.out, library=library), key=lambda one: one.name)
    assert (done.state, done.folder, done.figures["faces"]) == ("done", batch.out / "Box", 500)
    assert (failed.state, failed.folder, failed.error.code) == ("failed", None, "bad-subject")
    with bpy.data.libraries.load(str(library), assets_only=True) as (there, _):
        assert there.collections == ["Box"]

    bpy.ops.kiln.remove_batch(batch=batch.id)
    assert not batch.folder.exists() and not batch_panel.known.all


def test_the_button_and_a_batch_make_the_same_files_byte_for_byte(tmp_path, backend_python):
    bpy.ops.mesh.primitive_uv_sphere_add(segments=12, ring_count=6, location=(1, 2, 3), rotation=(0.3, 0.2, 0.1))
    ball = bpy.context.object
    ball.name = "Ball"
    material = bpy.data.materials.new("Clay")
    if bpy.app.version < (5, 0, 0):
        material.use_nodes = True
    material.node_tree.nodes["Principled BSDF"].inputs["Base Color"].default_value = (0.6, 0.1, 0.05, 1.0)
    ball.data.materials.append(material)
    parameters = {**TINY, "fit.device": "cpu", "seed": 7, "game.engine": "godot", "game.pivot": "source"}
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "Ball.blend"))
    assert bpy.ops.kiln.generate(**{name.replace(".", "_"): value for name, value in parameters.items()}) == {"FINISHED"}
    results = session.current.listed()[0].data["results"]

    # In a home of its own: there is no finished stage to be found.
    environment = {**os.environ, "KILN_HOME": str(tmp_path / "home")}
    blender = bpy.app.binary_path or sys.executable
    words = [part for name, value in parameters.items() for part in ("--set", f"{name}={value}")]
    kiln = [str(backend_python), "-P", "-m", "backend.cli"]
    command = [*kiln, "batch", str(tmp_path / "Ball.blend"), "--out", str(tmp_path / "out"), "--blender", blender, *words]
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert run.returncode == 0, run.stderr[-2000:]
    finally:
        subprocess.run([*kiln, "stop"], env=environment, capture_output=True, timeout=60, check=False)
    for name in ("mesh.glb", "game.glb", "splats.ply"):
        assert hashlib.sha256((tmp_path / "out" / "Ball" / name).read_bytes()).hexdigest() == results[name]["hash"], name
