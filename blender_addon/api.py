"""Kiln for scripts.

    import bpy
    from bl_ext.user_default.kiln import api

    asset = api.reconstruct("Suzanne", preset="draft", fit_iterations=500)
    print(asset.mesh_object.name, asset.collection.name)

Works the same in `blender -b --python script.py`, in a Python that has `bpy`, and in Blender's own text editor, where the window waits for
the result. A parameter is named as in the panel's tooltip and in the recipe's table, with `_` for the dot: `fit.iterations` is
`fit_iterations` (or itself: `**{"fit.iterations": 500}`).
What goes wrong is raised as `KilnError`, with `.code` for scripts and `.message` and `.hint` for people. docs/scripting.md has more.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import bpy

from . import batches, capture, capture_motion, export, import_motion, picture_input, properties, rebake, session
from .import_asset import Imported
from .protocol import recipes
from .protocol.errors import KilnError

__all__ = ["Imported", "KilnError", "Result", "animate", "batch", "compute", "mesh_splats", "picture_to_3d", "reconstruct", "run"]


@dataclass(frozen=True)
class Result:
    """What became of one asset whose files stay in a folder."""

    name: str
    recipe: str
    state: str  # "done", "failed" or "cancelled"
    folder: Path | None  # with mesh.glb and so on, where it is done
    figures: dict = field(default_factory=dict)  # of report.json, of a batch the main ones: faces, mesh_psnr, ... (protocol/SPEC.md)
    warnings: tuple[str, ...] = ()
    error: KilnError | None = None  # why it failed


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
    made = _made(recipe, preset, parameters)
    if motion not in import_motion.FILES:
        raise KilnError("bad-parameter", f"There is no motion {motion!r}.", f"Choose one of {', '.join(import_motion.FILES)}.")
    if quads and made.INPUT == "motion":
        raise KilnError("bad-parameter", "Quads of a result that moves would stand still.", "Leave quads out.")
    if made.INPUT == "picture" and made.generate.only:
        raise KilnError("bad-parameter", "With generate.only there would be views and no asset.", "Leave it out, or use api.compute.")
    job = _finished(made, source, "", everything=save_to is not None)
    if save_to is not None:
        shutil.copytree(job.results, save_to, dirs_exist_ok=True)
    job.motion = import_motion.How(motion, loop, start)
    imported = session.current.import_results(bpy.context, job)
    if quads:
        with session.quiet():
            rebake.remesh_quads(bpy.context, imported.mesh_object, quads)
    return imported


def compute(recipe: str, source, out: str | Path, preset: str = "standard", title: str = "", **parameters) -> Result:
    """Like `run`, but imports nothing: every file of the result goes to the folder `out`. `title`: the asset's name; else its source's."""
    job = _finished(_made(recipe, preset, parameters), source, title, everything=True)
    with session.disk_errors():
        shutil.copytree(job.results, out, dirs_exist_ok=True)
        shutil.rmtree(job.results)
        job.results = None
        report = Path(out, "report.json")
        figures = json.loads(report.read_text("utf-8")) if report.is_file() else {}
    return Result(job.data["title"], recipe, "done", Path(out), figures, tuple(figures.get("warnings", ())))


def batch(
    items,
    out: str | Path,
    recipe: str = "",
    preset: str = "",
    library: str | Path = "",
    options: Iterable[str] = (),
    progress: Callable[[dict], None] | None = None,
    **parameters,
) -> list[Result]:
    """Makes many assets by `kiln batch`, in processes of its own, and waits for them. A failed item does not stop the rest: it is in the
    list with its error.

    `items`: a manifest (.toml or .csv) or a folder of files; or objects, collections, names of objects and paths of files, one or several,
    each an asset. `recipe`, `preset`, `parameters`: of all of them; those of a manifest are set over. `library`: an asset library's
    .blend that the assets are put into. `options`: further ones of `kiln batch`, such as "--captures=2". `progress`: is called with the
    report (docs/batch.md) as it changes.
    In `out` each asset has a folder; the same call again makes only what is not there yet, where the items are files.
    """
    given = [items] if isinstance(items, (str, Path, bpy.types.ID)) else list(items)
    paths = [Path(bpy.path.abspath(str(one))).absolute() for one in given if isinstance(one, (str, Path))]
    if len(given) == 1 and paths and (paths[0].is_dir() or paths[0].suffix.lower() in (".toml", ".csv")):
        listed = paths[0]
    else:
        listed = batches.items_of(_items(given))
    defaults = {"recipe": recipe, "preset": preset, "parameters": _flat(recipe, parameters)}
    if recipe:
        recipes.make(recipe, defaults["parameters"], preset or "standard")  # refused before anything is written
    ordered = batches.order(
        bpy.context, listed, defaults, str(out), "Batch", options=list(options), library=str(library and Path(library).absolute())
    )
    try:
        report = batches.finish(ordered, progress)
    finally:
        if not batches.at_work(ordered):  # else, after many a Ctrl-C, its files are still read
            batches.remove(ordered)
    return [
        Result(
            item["name"], item["recipe"], item["state"], Path(item["folder"]) if item["state"] == "done" else None, item["figures"] or {},
            tuple(item["warnings"]), KilnError.from_wire(item["error"]) if item["error"] else None,
        )
        for item in report["items"]
    ]  # fmt: skip


def _items(given: list) -> list:
    """Names of objects as the objects; what is there as a file stays a path."""
    found = []
    for one in given:
        if isinstance(one, Path) or isinstance(one, str) and one not in bpy.data.objects and Path(bpy.path.abspath(one)).exists():
            found.append(one)
        elif isinstance(one, bpy.types.Collection):
            found.append(one)
        else:
            found += _objects(one)
    return found


def _flat(recipe: str, parameters: dict) -> dict:
    """Parameters by their flat names; of several recipes' where none is named."""
    known = [recipes.recipe_named(recipe)] if recipe else list(recipes.RECIPES.values())
    named = {properties.identifier(one.name): one.name for recipe in known for one in recipes.parameters(recipe)}
    return {named.get(name, name): value for name, value in parameters.items()}


def _made(recipe: str, preset: str, parameters: dict):
    """The recipe with these parameters, by their flat names or Blender's. Refuses what is unknown or out of range."""
    recipes.recipe_named(recipe)
    return recipes.make(recipe, capture_motion.with_own_range(_flat(recipe, parameters)), preset)


def _finished(made, source, title: str, everything: bool) -> session.Job:
    """The job of a recipe on what the source says, done, its results in this session's folder."""
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
    shoot = session.Shoot(subject, made)
    shoot.title = title or shoot.title
    job = shoot.all_at_once()
    session.current.wait_for_results(job, everything)
    return job


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
