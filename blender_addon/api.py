"""Kiln for scripts.

    import bpy
    from bl_ext.user_default.kiln import api

    asset = api.reconstruct("Suzanne", preset="draft", fit_iterations=500)
    print(asset.mesh.name, asset.splats.name, asset.report["mesh_psnr"])

Works the same in `blender -b --python script.py` and in Blender's own text editor, where the window waits for the result.
A parameter is named as in the panel's tooltip and in the recipe's table, with `_` for the dot: `fit.iterations` is `fit_iterations`.
What goes wrong is raised as `KilnError`, with `.code` for scripts and `.message` and `.hint` for people.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import bpy

from . import capture, properties, session
from .import_asset import Imported
from .protocol import recipes
from .protocol.errors import KilnError

__all__ = ["Imported", "KilnError", "reconstruct", "run"]


def reconstruct(source: str | bpy.types.Object | Iterable[str | bpy.types.Object], preset: str = "standard", **parameters) -> Imported:
    """Captures objects as one subject, reconstructs it, and imports the result beside them.

    `source`: an object, its name, or several of either, in the current scene. `preset` and `parameters`: those of the recipe `reconstruct`.
    """
    return run("reconstruct", source, preset, **parameters)


def run(recipe: str, source, preset: str = "standard", **parameters) -> Imported:
    """Like `reconstruct`, for any recipe by its name."""
    named = {properties.identifier(parameter.name): parameter.name for parameter in recipes.parameters(recipes.recipe_named(recipe))}
    values = {named.get(name, name): value for name, value in parameters.items()}
    made = recipes.make(recipe, values, preset)  # refuses what is unknown or out of range
    now = session.current
    subject = capture.subject(bpy.context, objects=_objects(source))
    now.want_backend()
    scratch = Path(tempfile.mkdtemp(prefix="views-", dir=now.folder))
    taken = None
    try:
        taken = capture.Capture(subject, made.capture, scratch)
        for number in range(taken.steps):
            taken.step()
            session.terminal(f"{subject.title}: view {number + 1} of {taken.steps}")
        inputs, origin = taken.finish()
        job = now.submit(recipe, recipes.values(made), inputs, origin, subject.title, scratch)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    finally:
        if taken:
            taken.close()
    now.wait_for_results(job)
    imported = now.import_results(bpy.context, job)
    session.terminal(f"{subject.title}: imported", last=True)
    return imported


def _objects(source) -> list[bpy.types.Object]:
    given = [source] if isinstance(source, (str, bpy.types.Object)) else list(source)
    found = []
    for item in given:
        obj = bpy.context.scene.objects.get(item) if isinstance(item, str) else item
        if obj is None:
            raise KilnError("no-object", f"There is no object {item!r} in the scene {bpy.context.scene.name!r}.", "")
        found.append(obj)
    return found
