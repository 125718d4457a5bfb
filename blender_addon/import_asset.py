"""Finished results into the open scene: the mesh with its material and the splats, in one collection beside the source, marked as an
asset with a picture and with where it came from. One undo step; the user's selection, mode and active object stay."""

from __future__ import annotations

import json
import math
import os
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import bpy
import numpy as np
from mathutils import Matrix, Quaternion

from . import import_motion, scratch, splat_files, splat_nodes
from .protocol import recipes
from .protocol.errors import KilnError

CLEANED = ("objects", "meshes", "materials", "images", "collections", "node_groups", "actions", "armatures", "cameras", "lights", "scenes")
ROLES = {
    "Base Color": "base color", "Roughness": "roughness", "Metallic": "metallic", "Normal": "normal", "Emission Color": "emission",
    "Alpha": "alpha", "Occlusion": "occlusion",
}  # fmt: skip
COLORS = ("base color", "emission", "texture")
CATALOG = "3f0d6f4e-4b8e-4c39-9a51-6b1f2d6c0a77"  # of all of Kiln's assets, in every library


@dataclass(frozen=True)
class Imported:
    """What an import made. Use it at once: references to Blender's data do not outlive undo."""

    collection: bpy.types.Collection
    mesh_object: bpy.types.Object
    splats_object: bpy.types.Object | None
    armature_object: bpy.types.Object | None = None


def import_asset(
    context: bpy.types.Context,
    folder: Path,
    source: dict,
    provenance: dict,
    motion: import_motion.How | None = None,
    splats: bool = True,
    catalog: str = "Kiln",
    home: bpy.types.Collection | None = None,
    undo: bool = True,
) -> Imported:
    """Bring `mesh.glb` and, where they are there, `splats.ply` and `preview.png` from `folder` into the scene of `source`; of the recipe
    `animate` its motion too, as `motion` says. What was made of a picture, and so lies on no object of the scene, is selected.

    source: as from capture.Capture.finish(), perhaps stored in between; a job from elsewhere has none of its places, and comes in at the
    origin. provenance: what the asset should tell of its making (recipe, parameters, job, kiln). splats: whether they come in too. catalog:
    the asset's, a path such as "Props/Wood". home: the collection to put it into; None: beside the source. undo: whether this is an undo
    step; one of many is not.
    Raises KilnError("import-failed"); then nothing was imported.
    """
    folder = Path(folder)
    title = source.get("title") or "Kiln asset"
    if not (folder / "mesh.glb").is_file():
        raise KilnError("import-failed", f"The result of {title} has no mesh.glb.", "Run the job again.")
    motion = motion or import_motion.How()
    moves = provenance.get("recipe") == "animate"
    if moves and not (folder / import_motion.FILES[motion.way]).is_file():
        raise KilnError("import-failed", f"The result of {title} has no {import_motion.FILES[motion.way]}.", "Run the job again.")
    scene = bpy.data.scenes.get(source.get("scene", "")) or context.scene
    source = {"location": (0, 0, 0), "rotation": (1, 0, 0, 0), "unit_scale": scene.unit_settings.scale_length, **source}
    before = {name: set(getattr(bpy.data, name)) for name in CLEANED}
    try:
        collection = bpy.data.collections.new(f"{title} (Kiln)")
        (home or _beside(scene, source)).children.link(collection)
        mesh_object = _mesh(context, folder / "mesh.glb", source, collection)
        splats_object = armature_object = None
        if splats and (folder / "splats.ply").is_file():
            splats_object = _splats(folder / "splats.ply", source, collection)
        _mark(context, collection, folder, source, provenance, catalog)
        show(collection, "mesh")
        if moves:  # last, as it may write a file
            frame = _own_frame_from_metres(source)
            armature_object = import_motion.animate(context, mesh_object, folder, frame, motion, scene, collection)
    except Exception as error:  # a file from another machine, read by Blender's importer: it may fail in any way
        for name, known in before.items():
            for made in set(getattr(bpy.data, name)) - known:
                getattr(bpy.data, name).remove(made)
        reason = str(error).removeprefix("Error: ").strip()
        raise KilnError("import-failed", f"The result of {title} cannot be imported: {reason}", "Run the job again.") from error
    kind = getattr(recipes.RECIPES.get(provenance.get("recipe", "")), "INPUT", "")
    if kind == "picture" and context.scene == scene and context.mode == "OBJECT":
        _select_alone(context.view_layer, mesh_object)
    if undo:
        undo_step(context, f"Kiln: import {title}")
    return Imported(collection, mesh_object, splats_object, armature_object)


def import_splats(context: bpy.types.Context, path: str | os.PathLike, select: bool = False) -> bpy.types.Object:
    """Splats of any origin (PLY or SPZ) as an object at the 3D cursor, in the collection that is active in the view layer. One undo step;
    the user's mode stays, and selection and active object unless `select` asks for the new object alone, as Blender's own importers do.
    What was left out stands in the object's property "kiln_notes".

    A file that does not say which way is up most likely has Y down, as the structure-from-motion tools behind most splats do: the object
    is turned for it, not the splats, so that clearing its rotation brings the file's own axes back.
    Raises KilnError("bad-splats"); then nothing was imported.
    """
    path = Path(path)
    points = splat_files.read(path)
    scene = context.scene
    points = splat_files.transformed(points, np.eye(3) / scene.unit_settings.scale_length, np.zeros(3))
    thing = splat_nodes.make_object(path.stem, points)
    thing.location = scene.cursor.location
    if not points.z_up:
        thing.rotation_euler = (-math.pi / 2, 0, 0)
    if points.notes:
        thing["kiln_notes"] = "\n".join(points.notes)
    home = context.collection if context.collection is not None and context.collection.is_editable else scene.collection
    home.objects.link(thing)
    if select:
        _select_alone(context.view_layer, thing)
    undo_step(context, f"Kiln: import {path.name}")
    return thing


def _select_alone(layer: bpy.types.ViewLayer, thing: bpy.types.Object) -> None:
    """Makes an object the selected and active one, where the view layer does not leave its collection out."""
    with suppress(RuntimeError):
        thing.select_set(True, view_layer=layer)
        for other in list(layer.objects):
            if other != thing:
                other.select_set(False, view_layer=layer)
        layer.objects.active = thing


def show(collection: bpy.types.Collection, what: str) -> None:
    """Show the "mesh", the "splats" or "both" of an imported asset, in the viewport and in renders."""
    for thing in collection.objects:
        hidden = what == ("mesh" if splat_nodes.is_splats(thing) else "splats")
        thing.hide_viewport = thing.hide_render = hidden


def _beside(scene: bpy.types.Scene, source: dict) -> bpy.types.Collection:
    """The collection that holds the collection of the source; the scene's own where that is gone or linked from a library."""

    def parent_of(wanted: bpy.types.Collection) -> bpy.types.Collection | None:
        branches = [scene.collection, *scene.collection.children_recursive]
        return next((branch for branch in branches if wanted.name in branch.children), None)

    home = bpy.data.collections.get(source.get("collection") or "")
    thing = scene.objects.get(source.get("object", ""))
    if home is None and thing is not None:
        home = next((collection for collection in scene.collection.children_recursive if thing.name in collection.objects), None)
    parent = parent_of(home) if home is not None else None
    return parent if parent is not None and parent.is_editable else scene.collection


# The mesh


def _mesh(context: bpy.types.Context, path: Path, source: dict, collection: bpy.types.Collection) -> bpy.types.Object:
    title = collection.name
    with scratch.scene(context) as empty:
        wanted = dict(import_pack_images=True, merge_vertices=False, import_select_created_objects=False)
        known = bpy.ops.import_scene.gltf.get_rna_type().properties.keys()
        bpy.ops.import_scene.gltf(filepath=str(path), **{key: value for key, value in wanted.items() if key in known})
        empty.view_layers[0].update()
        made = list(empty.collection.all_objects)
        meshes = [thing for thing in made if thing.type == "MESH"]
        if len(meshes) != 1:
            raise ValueError(f"mesh.glb holds {len(meshes)} meshes")
        thing = meshes[0]
        thing.select_set(False, view_layer=empty.view_layers[0])  # Blender 4.2 selects what it imports
        placed = np.array(thing.matrix_world, np.float64)
        for holder in list(thing.users_collection):
            holder.objects.unlink(thing)
        thing.parent = None
        for other in made:
            if other != thing:
                bpy.data.objects.remove(other)
    # In double precision: far from the origin, Blender's own matrices would lose what the difference keeps.
    thing.data.transform(Matrix((_own_frame_from_metres(source) @ placed).tolist()))
    thing.data.update()
    _place(thing, source)
    thing.name, thing.data.name = f"{title} mesh", f"{title} mesh"
    for material in thing.data.materials:
        material.name = title
        for node in material.node_tree.nodes:
            if node.bl_idname == "ShaderNodeTexImage" and node.image is not None:
                role = _role(node)
                node.image.name = f"{title} {role}"
                if role not in COLORS:
                    node.image.colorspace_settings.name = "Non-Color"
                if node.image.packed_file is None:
                    node.image.pack()
    collection.objects.link(thing)
    return thing


def _role(texture: bpy.types.Node) -> str:
    """What an image is for, by the sockets that it feeds, directly or through other nodes: "base color", "roughness metallic", ..."""
    fed, ahead, seen = set(), [texture], set()
    while ahead:
        node = ahead.pop()
        seen.add(node)
        for link in (link for output in node.outputs for link in output.links):
            if link.to_socket.name in ROLES and link.to_node.bl_idname in ("ShaderNodeBsdfPrincipled", "ShaderNodeGroup"):
                fed.add(link.to_socket.name)
            elif link.to_node not in seen:
                ahead.append(link.to_node)
    if "Base Color" in fed:  # its alpha is in the same image
        fed.discard("Alpha")
    return " ".join(role for socket, role in ROLES.items() if socket in fed) or "texture"


# The splats


def _splats(path: Path, source: dict, collection: bpy.types.Collection) -> bpy.types.Object:
    points = splat_files.read(path)
    matrix = _own_frame_from_metres(source)
    thing = splat_nodes.make_object(f"{collection.name} splats", splat_files.transformed(points, matrix[:3, :3], matrix[:3, 3]))
    _place(thing, source)
    collection.objects.link(thing)
    return thing


def _own_frame_from_metres(source: dict) -> np.ndarray:
    """From the results' world (metres) into the source's rigid frame (Blender units), 4x4. The source's `anchor` is the point of that
    world, in Blender units, that comes to lie on its `location`: the same, but for results that have no place in the scene."""
    rotation = np.array(Quaternion(source["rotation"]).to_matrix(), np.float64)
    matrix = np.eye(4)
    matrix[:3, :3] = rotation.T / source["unit_scale"]
    matrix[:3, 3] = -rotation.T @ np.array(source.get("anchor", source["location"]), np.float64)
    return matrix


def _place(thing: bpy.types.Object, source: dict) -> None:
    thing.location = source["location"]
    thing.rotation_mode = "XYZ"
    thing.rotation_euler = Quaternion(source["rotation"]).to_euler()
    thing.scale = (1, 1, 1)


# The asset


def _mark(context: bpy.types.Context, collection: bpy.types.Collection, folder: Path, source: dict, provenance: dict, catalog: str) -> None:
    """Asset with picture, tags and a description; the full story as custom properties."""
    parameters = provenance.get("parameters", {})
    recipe, version = str(provenance.get("recipe", "")), str(provenance.get("kiln", ""))
    properties = {
        "kiln_recipe": recipe,
        "kiln_preset": str(provenance.get("preset", "")),
        "kiln_seed": int(parameters.get("seed", 0)),
        "kiln_parameters": json.dumps(parameters, sort_keys=True),
        "kiln_source": source.get("title", ""),
        "kiln_source_hash": source.get("fingerprint", ""),
        "kiln_source_blender": source.get("blender", ""),
        "kiln_version": version,
        "kiln_job": str(provenance.get("job", "")),
    }
    for name, value in properties.items():
        collection[name] = value
    collection.asset_mark()
    asset = collection.asset_data
    asset.author = f"Kiln {version}".strip()
    made = {key: value for key, value in properties.items() if value not in ("", "{}") and key not in ("kiln_parameters", "kiln_job")}
    asset.description = "; ".join(f"{key.removeprefix('kiln_').replace('_', ' ')}: {value}" for key, value in made.items())
    for tag in ("Kiln", recipe):
        if tag:
            asset.tags.new(tag, skip_if_exists=True)
    _catalogue(context, asset, catalog)
    if (folder / "preview.png").is_file():
        with context.temp_override(id=collection):
            bpy.ops.ed.lib_id_load_custom_preview(filepath=str(folder / "preview.png"))


def _catalogue(context: bpy.types.Context, asset: bpy.types.AssetMetaData, name: str) -> None:
    """Files the asset under a catalog. Catalogs are named in a text file of the asset library that holds the file, or beside it; in a file
    that was never saved the asset carries the catalog's id alone."""
    # The same name has the same id everywhere, so that assets of several files meet under it; one that the library has keeps its own.
    asset.catalog_id = CATALOG if name == "Kiln" else str(uuid.uuid5(uuid.UUID(CATALOG), name))
    if not bpy.data.filepath:
        return
    file = Path(bpy.data.filepath).resolve()
    libraries = [
        Path(bpy.path.abspath(library.path)).resolve() for library in context.preferences.filepaths.asset_libraries if library.path
    ]
    catalogs = next((root for root in libraries if file.is_relative_to(root)), file.parent) / "blender_assets.cats.txt"
    try:
        known = catalogs.read_text(encoding="utf-8") if catalogs.exists() else "VERSION 1\n"
        lines = [line.split(":") for line in known.splitlines() if line.count(":") == 2]
        if there := next((identity for identity, path, _ in lines if path == name), None):
            asset.catalog_id = there
        else:
            simple = name.replace("/", "-")  # as Blender names them
            whole = catalogs.with_name(f"{catalogs.name}.new")  # the user's catalogs are in there: all of them or the old file
            whole.write_text(f"{known.rstrip()}\n{asset.catalog_id}:{name}:{simple}\n", encoding="utf-8")
            os.replace(whole, catalogs)
    except OSError as error:  # a folder that may not be written: the asset is whole without its catalog's name
        print(f"Kiln: the asset catalog could not be written: {error}")


def undo_step(context: bpy.types.Context, message: str) -> None:
    """What was done so far is one step of undo."""
    windows = context.window_manager.windows
    if context.window is None and windows:  # a timer has no window of its own
        with context.temp_override(window=windows[0]):
            bpy.ops.ed.undo_push(message=message)
    else:
        bpy.ops.ed.undo_push(message=message)
