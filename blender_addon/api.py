"""Kiln for scripts.

    import bpy
    from bl_ext.user_default.kiln import api

    asset = api.reconstruct("Suzanne", preset="draft", fit_iterations=500)
    print(asset.mesh_object.name, asset.collection.name)

Works the same in `blender -b --python script.py` and in Blender's own text editor, where the window waits for the result.
A parameter is named as in the panel's tooltip and in the recipe's table, with `_` for the dot: `fit.iterations` is `fit_iterations`
(or itself: `**{"fit.iterations": 500}`).
What goes wrong is raised as `KilnError`, with `.code` for scripts and `.message` and `.hint` for people.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import bpy

from . import capture, capture_motion, export, import_motion, picture_input, properties, rebake, session
from .import_asset import Imported
from .protocol import recipes
from .protocol.errors import KilnError

__all__ = ["Imported", "KilnError", "animate", "mesh_splats", "picture_to_3d", "reconstruct", "run"]


def reconstruct(source, preset: str = "standard", save_to: str | Path | None = None, **parameters) -> Imported:
    """Captures objects as one subject, reconstructs it, and imports the result beside them.

    `source`: an object, its name, several of either, or a collection, in the current scene. `preset` and
    `parameters`: those of the recipe. `save_to`: a folder that gets the files too: mesh.glb, splats.ply, report.json, comparison.png.
    """
    return run("reconstruct", source, preset, save_to, **parameters)


def mesh_splats(source, preset: str = "standard", save_to: str | Path | None = None, **parameters) -> Imported:
    """Makes a textured mesh of Gaussian splats and imports it.

    `source`: an object that holds splats, or its name; or the path of a .ply or .spz file. The rest as of `reconstruct`.
    """
    return run("mesh_splats", source, preset, save_to, **parameters)


def animate(
    source,
    preset: str = "standard",
    save_to: str | Path | None = None,
    motion: str = "SHAPE_KEYS",
    loop: bool = False,
    start: int | None = None,
    **parameters,
) -> Imported:
    """Captures objects that move as one subject over the scene's frame range, and imports a mesh with their motion beside them.

    `motion`: "SHAPE_KEYS", "ARMATURE" or "CACHE" (a file beside the .blend). `loop`: let the end turn into the beginning, and repeat it.
    `start`: the scene's frame of the first moment; None is where it was captured. The rest as of `reconstruct`.
    """
    return run("animate", source, preset, save_to, 0, motion, loop, start, **parameters)


def picture_to_3d(
    image=None,
    prompt: str = "",
    model: str | None = None,
    views: str | Path | None = None,
    preset: str = "standard",
    save_to: str | Path | None = None,
    **parameters,
) -> Imported:
    """Makes a textured mesh of a picture, or of words, and imports it at the 3D cursor, selected.

    `image`: a picture's path; or an image of this file, or its name. `prompt`: what it shows; without `image`, the picture is made from it.
    `model`: what generates the views (`generate.model`). `views`: a folder of pictures once round a subject instead of `image`; nothing is
    generated then. The rest as of `reconstruct`.
    """
    if image is not None and views is not None:
        raise KilnError("bad-parameter", "A picture and a folder of views were given.", "Give one of them.")
    given = {**parameters, **({"generate_prompt": prompt} if prompt else {}), **({"generate_model": model} if model else {})}
    return run("im3d", image if views is None else Path(views), preset, save_to, **given)


def run(
    recipe: str,
    source,
    preset: str = "standard",
    save_to: str | Path | None = None,
    quads: int = 0,
    motion: str = "SHAPE_KEYS",
    loop: bool = False,
    start: int | None = None,
    **parameters,
) -> Imported:
    """Like `reconstruct`, for any recipe by its name. `quads`: about how many quads to remesh the result to; 0 leaves its triangles.
    `motion`, `loop` and `start`: as of `animate`, where the result moves."""
    named = {properties.identifier(parameter.name): parameter.name for parameter in recipes.parameters(recipes.recipe_named(recipe))}
    values = capture_motion.with_own_range({named.get(name, name): value for name, value in parameters.items()})
    made = recipes.make(recipe, values, preset)  # refuses what is unknown or out of range
    if motion not in import_motion.FILES:
        raise KilnError("bad-parameter", f"There is no motion {motion!r}.", f"Choose one of {', '.join(import_motion.FILES)}.")
    if quads and made.INPUT == "motion":
        raise KilnError("bad-parameter", "Quads of a result that moves would stand still.", "Leave quads out.")
    if made.INPUT == "picture" and made.generate.only:
        raise KilnError("bad-parameter", "With generate.only there would be views and no asset.", "Leave it out.")
    now = session.current
    if made.INPUT == "picture":
        subject = _picture(source, made.generate.prompt)
    elif made.INPUT == "splats" and (isinstance(source, Path) or isinstance(source, str) and source.lower().endswith(export.SUFFIXES)):
        subject = export.subject(bpy.context, file=source)
    elif made.INPUT == "splats":
        subject = export.subject(bpy.context, thing=_objects(source)[0])
    elif isinstance(source, bpy.types.Collection):
        subject = capture.subject(bpy.context, collection=source)
    else:
        subject = capture.subject(bpy.context, objects=_objects(source))
    job = session.Shoot(subject, made).all_at_once()
    now.wait_for_results(job, everything=save_to is not None)
    if save_to is not None:
        shutil.copytree(job.results, save_to, dirs_exist_ok=True)
    job.motion = import_motion.How(motion, loop, start)
    imported = now.import_results(bpy.context, job)
    if quads:
        with session.quiet():
            rebake.remesh_quads(bpy.context, imported.mesh_object, quads)
    return imported


def _picture(source, prompt: str) -> picture_input.Subject:
    """A path (of a folder: its views), an image of this file, its name, or None for the words alone."""
    if isinstance(source, str) and not Path(source).exists() and source in bpy.data.images:
        source = bpy.data.images[source]
    if isinstance(source, bpy.types.Image):
        return picture_input.subject(bpy.context, prompt, image=source)
    if source and Path(source).is_dir():
        return picture_input.subject(bpy.context, prompt, views=source)
    return picture_input.subject(bpy.context, prompt, file=source)


def _objects(source) -> list[bpy.types.Object]:
    given = [source] if isinstance(source, (str, bpy.types.Object)) else list(source)
    found = []
    for item in given:
        obj = bpy.context.scene.objects.get(item) if isinstance(item, str) else item
        if obj is None:
            raise KilnError("no-object", f"There is no object {item!r} in the scene {bpy.context.scene.name!r}.", "")
        found.append(obj)
    return found
