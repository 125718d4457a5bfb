"""Results as assets of one .blend file, for an asset library: each a collection with preview and textures, all in one catalog."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import bpy
import numpy as np
from mathutils import Vector

from . import import_asset
from .protocol.errors import KilnError

GAP = 0.25  # between assets that stand side by side in the file, as a share of the new one's width


def write(
    assets: list[dict], file: Path, catalog: str = "Kiln", splats: bool = False, report: Callable[[float, str], None] = lambda *_: None
) -> int:
    """Adds results to the library `file`, which is made if it is not there; returns how many assets it then has. What is in it stays, but
    an asset of the same name is replaced. The open file is lost.

    assets: each `name` and `folder` (with mesh.glb, perhaps preview.png and report.json), and where known `source`, as from
    capture.Capture.finish(): its place is the asset's origin, else the middle of its base is. splats: whether these come along.
    Raises KilnError("import-failed", "bad-file", "disk"); then the file is as it was.
    """
    catalog = "/".join(part.strip() for part in catalog.replace(":", "-").split("/") if part.strip()) or "Kiln"
    file = file.resolve()
    existed = file.exists()
    try:
        if existed:
            bpy.ops.wm.open_mainfile(filepath=str(file), load_ui=False, use_scripts=False)
        else:  # the catalog's file lies beside it, which the import has to know
            file.parent.mkdir(parents=True, exist_ok=True)
            bpy.ops.wm.save_as_mainfile(filepath=str(file), compress=True)
        for number, asset in enumerate(assets):
            report(number / len(assets), f"importing {asset['name']}")
            _add(asset, catalog, splats)
        bpy.context.preferences.filepaths.save_version = int(existed)  # a backup of what was there, none of the empty beginning
        bpy.ops.wm.save_as_mainfile(filepath=str(file), compress=True)
    except RuntimeError as error:
        if not existed:
            file.unlink(missing_ok=True)
        reason = str(error).strip().splitlines()[0].removeprefix("Error: ")
        raise KilnError("bad-file", f"The library {file.name} cannot be read or written: {reason}.", "Name another file.") from error
    except BaseException:
        if not existed:
            file.unlink(missing_ok=True)
        raise
    return sum(collection.asset_data is not None for collection in bpy.data.collections)


def _add(asset: dict, catalog: str, splats: bool) -> None:
    name, folder = asset["name"], Path(asset["folder"])
    provenance = {}
    if (folder / "report.json").is_file():
        told = json.loads((folder / "report.json").read_text("utf-8"))
        provenance = {
            "recipe": told.get("recipe", ""), "parameters": told.get("parameters", {}), "kiln": told.get("versions", {}).get("kiln", ""),
        }  # fmt: skip
    # Where it was captured: there it gets its own frame, and from there it goes to its place in the row.
    kept = ("location", "rotation", "unit_scale", "fingerprint", "blender")
    source = {key: value for key, value in (asset.get("source") or {}).items() if key in kept}
    source = _in_metres(source)
    edge = _right_edge()
    before = bpy.data.collections.get(name)
    if before is not None and before.asset_data is not None:
        _remove(before)
        bpy.data.orphans_purge(do_recursive=True)  # else the new asset's parts could not have the old one's names
    elif before is not None:
        before.name = f"{name} (other)"
    made = import_asset.import_asset(bpy.context, folder, {**source, "title": name}, provenance, splats=splats, catalog=catalog, undo=False)
    collection = made.collection
    for kind in ("objects", "meshes", "materials", "images", "actions", "armatures"):
        for block in getattr(bpy.data, kind):
            block.name = block.name.replace(collection.name, name)
    collection.name = name
    bpy.context.view_layer.update()
    low, high = _bounds([collection])
    origin = Vector(source["location"]) if "location" in source else Vector(((low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]))
    left = low[0] if edge is None else low[0] - edge - GAP * (high[0] - low[0])
    shift = Vector((-left if edge is not None else -origin.x, -origin.y, -origin.z))
    for thing in collection.objects:
        if thing.parent is None:
            thing.location += shift
    collection.instance_offset = origin + shift  # what lies at the cursor where the asset is dropped


def _in_metres(source: dict) -> dict:
    """A source as of a scene in metres, which the library's is."""
    unit = source.get("unit_scale", 1.0)
    if "location" not in source:
        return {key: value for key, value in source.items() if key != "rotation"}
    return {**source, "location": [value * unit for value in source["location"]], "unit_scale": 1.0}


def _remove(collection: bpy.types.Collection) -> None:
    """Takes a collection and what only it holds out of the file."""
    for thing in list(collection.all_objects):
        if all(holder == collection or holder in set(collection.children_recursive) for holder in thing.users_collection):
            bpy.data.objects.remove(thing)
    bpy.data.collections.remove(collection)


def _right_edge() -> float | None:
    """How far to the right the assets reach that are in the file; None where there are none."""
    bounds = _bounds([collection for collection in bpy.data.collections if collection.asset_data is not None])
    return None if bounds is None else float(bounds[1][0])


def _bounds(collections: list[bpy.types.Collection]) -> tuple[np.ndarray, np.ndarray] | None:
    """The lowest and the highest corner of what collections hold, world axes."""
    corners = [thing.matrix_world @ Vector(corner) for one in collections for thing in one.all_objects if thing.type == "MESH"
               for corner in thing.bound_box]  # fmt: skip
    if not corners:
        return None
    points = np.array(corners)
    return points.min(0), points.max(0)
