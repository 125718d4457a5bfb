# environment: blender
"""The main job as an artist has it, without a window: an object in, the asset beside it; then what it is worth, in figures and pictures.

Runs the real extension in bpy against a real backend. Leaves the recipe's files, scene.blend, report.json and contact_sheet.png (of what
moves strip.png) in --out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = Path(tempfile.mkdtemp(prefix="kiln-demo-"))
os.environ["BLENDER_USER_RESOURCES"] = str(SCRATCH / "user")  # before bpy is imported: nobody's own preferences count
sys.path.insert(0, str(ROOT))

import bpy  # noqa: E402
import numpy as np  # noqa: E402

import build  # noqa: E402
from benchmarks import demo_motion  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(prog="build.py demo", description=__doc__)
    parser.add_argument("--object", type=Path, help="any model: GLB, OBJ, FBX, USD, PLY, STL or .blend (default: one made on the spot)")
    parser.add_argument("--recipe", default="reconstruct")
    parser.add_argument("--preset", default="standard")
    parser.add_argument("--out", type=Path, default=ROOT / "demo" / "result")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a recipe parameter, such as fit.splats=5000")
    parser.add_argument("--clip", help="of an animated file, for the recipe animate (default: the longest)")
    parser.add_argument("--frames", type=int, default=demo_motion.MOST_FRAMES, help="at most, of a clip")
    parser.add_argument("--keep-views", type=Path, metavar="DIR", help="leave the views there, for bench fit")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    blender_prints_to(a.out / "blender.log")
    api, capture, recipes = extension()
    values = {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in a.set)}
    recipe = recipes.make(a.recipe, values, a.preset)
    moves = recipe.INPUT == "motion"
    made = demo_motion.built_in_object if moves else built_in_object
    subjects = import_object(a.object) if a.object else [made()]
    if moves and a.object:
        choose_clip(a.clip, a.frames)
    bpy.context.view_layer.update()
    subject = capture.subject(bpy.context, objects=subjects)

    started = time.perf_counter()
    imported = api.run(a.recipe, subjects, a.preset, save_to=a.out, **values)
    total = time.perf_counter() - started
    if moves:
        finish_motion(a.out, capture, recipes, subjects, imported, total)
    else:
        finish(a, capture, recipe, subject, subjects, imported, total)


def finish(a, capture, recipe, subject, subjects, imported, total: float) -> None:
    views = views_of(capture, subject, recipe.capture, SCRATCH / "views")
    if a.keep_views:
        shutil.copytree(SCRATCH / "views", a.keep_views, dirs_exist_ok=True)
    mesh = capture.subject(bpy.context, objects=[imported.mesh_object])
    views_of(capture, mesh, recipe.capture, SCRATCH / "imported", like=views)
    source = a.object if a.object and a.object.suffix == ".glb" else export_source(subjects, SCRATCH / "source.glb")
    keep(a.out, total)
    given = ["--views", SCRATCH / "views", "--imported", SCRATCH / "imported"]
    in_backend("benchmarks.contact_sheet", a.out.resolve(), "--source", source.resolve(), *given)


def finish_motion(out: Path, capture, recipes, subjects, imported, total: float) -> None:
    """What the imported animation is against the source, read back and seen frame by frame."""
    report = keep(out, total)
    frames, result = report["frames"], [imported.mesh_object]
    true, true_faces = demo_motion.tracks(subjects, frames)
    made, faces = demo_motion.tracks(result, frames)
    np.savez(SCRATCH / "tracks.npz", true=true, true_faces=true_faces, made=made, faces=faces)
    demo_motion.pictures(capture, recipes, subjects, result, frames, SCRATCH)
    in_backend("benchmarks.motion_sheet", out.resolve(), "--scratch", SCRATCH)


def keep(out: Path, total: float) -> dict:
    """Adds the whole job's seconds to the report, and saves the scene."""
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    report["total_seconds"] = round(total, 2)
    (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    bpy.ops.file.pack_all()
    bpy.ops.wm.save_as_mainfile(filepath=str((out / "scene.blend").resolve()), compress=True)
    return report


def in_backend(module: str, *arguments) -> None:
    """Runs a module in the backend's environment."""
    command = [os.environ["KILN_BACKEND_PYTHON"], "-m", module, *map(str, arguments)]
    subprocess.run(command, check=True, stdout=sys.stdout, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def blender_prints_to(path: Path) -> None:
    """Blender reports every render on the process's standard output; this sends it to a file, and leaves Python's own print as it was."""
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    with open(path, "wb") as log:
        os.dup2(log.fileno(), 1)


def extension():
    """The extension from this checkout, enabled in an empty Blender; its api, capture and recipes."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    build.assemble(SCRATCH / "extensions" / "kiln")
    bpy.context.preferences.extensions.repos.new(name="checkout", module="checkout", custom_directory=str(SCRATCH / "extensions"))
    bpy.ops.preferences.addon_refresh()
    bpy.ops.preferences.addon_enable(module="bl_ext.checkout.kiln")
    from bl_ext.checkout.kiln import api, capture
    from bl_ext.checkout.kiln.protocol import recipes

    return api, capture, recipes


def import_object(path: Path) -> list[bpy.types.Object]:
    """Everything that has a surface in a file, as one subject."""
    from bl_ext.checkout.kiln import importers
    from bl_ext.checkout.kiln.protocol.errors import KilnError

    try:
        for warning in importers.load(path):
            print(warning)
        return importers.surfaces(path, bpy.context.scene)
    except KilnError as error:
        sys.exit(str(error))


def choose_clip(name: str | None, most: int) -> None:
    from bl_ext.checkout.kiln import importers
    from bl_ext.checkout.kiln.protocol.errors import KilnError

    try:
        importers.choose_clip(name, most)
    except KilnError as error:
        sys.exit(str(error))


def built_in_object() -> bpy.types.Object:
    """A painted Suzanne: open eye sockets, separate parts, a procedural material, nothing to download."""
    bpy.ops.mesh.primitive_monkey_add(size=0.4, location=(0.3, -0.2, 0.5), rotation=(0, 0, 0.95))
    thing = bpy.context.object
    thing.modifiers.new("Subdivision", "SUBSURF").render_levels = 2
    bpy.ops.object.shade_smooth()
    material = bpy.data.materials.new("Glaze")
    material.use_nodes = True
    nodes, links = material.node_tree.nodes, material.node_tree.links
    place = nodes.new("ShaderNodeTexCoord")
    waves = nodes.new("ShaderNodeTexWave")
    waves.inputs["Scale"].default_value, waves.inputs["Distortion"].default_value = 2.2, 5.0
    waves.inputs["Detail"].default_value = 1.0
    ramp = nodes.new("ShaderNodeValToRGB")
    ramp.color_ramp.elements[0].color = (0.02, 0.12, 0.2, 1)
    ramp.color_ramp.elements[1].color = (0.85, 0.62, 0.3, 1)
    ramp.color_ramp.elements.new(0.45).color = (0.1, 0.35, 0.33, 1)
    links.new(place.outputs["Object"], waves.inputs["Vector"])
    links.new(waves.outputs["Color"], ramp.inputs["Fac"])
    links.new(ramp.outputs["Color"], nodes["Principled BSDF"].inputs["Base Color"])
    thing.data.materials.append(material)
    return thing


def export_source(subjects: list[bpy.types.Object], path: Path) -> Path:
    """The source's evaluated surface in world space, for scoring alone."""
    bpy.ops.object.select_all(action="DESELECT")
    for thing in subjects:
        thing.select_set(True)
    bpy.ops.export_scene.gltf(filepath=str(path), export_format="GLB", use_selection=True, export_apply=True, export_materials="NONE")
    return path


def views_of(capture, subject, p, folder: Path, like=None):
    """The captured views of a subject, from the cameras of another capture where one is given."""
    work = capture.Capture(subject, p, folder, like=like)
    try:
        while work.step():
            pass
        work.finish()
    finally:
        work.close()
    return work


if __name__ == "__main__":
    try:
        main()
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)
