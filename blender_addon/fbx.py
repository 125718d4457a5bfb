"""A result's GLB as FBX, as Unity, Unreal and others take it: metres or centimetres, axes and levels of detail as each expects them.

Blender's exporter keeps names, normals, tangents and one UV map. Its materials are Phong: they hold base colour, opacity, normal map and
emission, but roughness and metallic in one picture, as glTF has them, they cannot name: such pictures are written beside the file.
"""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path

import bpy
import numpy as np
from bpy_extras.node_shader_utils import PrincipledBSDFWrapper
from mathutils import Matrix

from .protocol.errors import KilnError

LEVEL = re.compile(r"(.+)_LOD(\d+)$")

# Y up and facing +Z, in metres (a unit scale of 100 cm), which every reader but Unreal's takes; Unity shows scale 1 and no rotation for it.
METRES = {"axis_forward": "-Z", "axis_up": "Y", "apply_scale_options": "FBX_SCALE_ALL"}
# Z up as the world is, in centimetres, which are Unreal's own: what it imports needs no scale and no rotation either.
CENTIMETRES = {"axis_forward": "Y", "axis_up": "Z", "apply_scale_options": "FBX_SCALE_NONE"}
ENGINES = {"unreal": CENTIMETRES}  # all others: METRES


def write(glb: Path, out: Path, engine: str = "", up: str = "y", scale: float = 1.0, textures: str = "embed") -> list[Path]:
    """Reads `glb` into the open file, which has to be empty, and writes it as FBX; returns all files written, the FBX first.

    engine: "unreal", or anything else. up, scale: what the GLB was written with (game.up, game.scale). textures: "embed", or "beside": as
    files of their own in the FBX's folder. Raises KilnError("bad-file", "fbx-failed").
    """
    if textures not in ("embed", "beside"):
        raise KilnError("bad-parameter", f"There is no way {textures!r} to keep textures.", "Use embed or beside.")
    try:
        bpy.ops.import_scene.gltf(filepath=str(glb), merge_vertices=False, disable_bone_shape=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0].removeprefix("Error: ")
        raise KilnError("bad-file", f"{glb.name} cannot be read: {reason}.", "Run the job again.") from error
    scene = bpy.context.scene
    if not any(thing.type == "MESH" for thing in scene.objects):
        raise KilnError("bad-file", f"{glb.name} holds no mesh.", "Run the job again.")
    for thing in bpy.data.objects:  # from 4.5 on, levels, which are no part of the GLB's scene, are in a collection that does not show
        for holder in thing.users_collection:
            holder.objects.unlink(thing)
        scene.collection.objects.link(thing)
    _to_metres(scene, up, scale)
    if engine == "unreal":
        _group_levels(scene)
    moves = any(thing.type == "ARMATURE" or thing.animation_data for thing in scene.objects) or bool(bpy.data.shape_keys)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = textures == "beside"
    with tempfile.TemporaryDirectory(prefix="kiln-fbx-") as scratch:
        kept = _textures_as_files(out, out.parent if beside else Path(scratch), flip=engine == "unreal")
        try:
            bpy.ops.export_scene.fbx(
                filepath=str(out),
                object_types={"EMPTY", "MESH", "ARMATURE"},
                use_space_transform=True,
                bake_space_transform=not moves,  # into the vertices: nodes without rotation and scale; Blender cannot with armatures
                mesh_smooth_type="FACE",  # Unreal warns without
                use_tspace=True,
                add_leaf_bones=False,
                bake_anim=moves,
                path_mode="RELATIVE" if beside else "COPY",
                embed_textures=not beside,
                **ENGINES.get(engine, METRES),
            )
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].removeprefix("Error: ")
            raise KilnError("fbx-failed", f"{out.name} cannot be written: {reason}.", "Check the folder.") from error
    return [out, *kept]


def _to_metres(scene: bpy.types.Scene, up: str, scale: float) -> None:
    """Brings a GLB of another up axis or scale back to Blender's world, in its vertices: no node is left with a scale or a turn."""
    roots = [thing for thing in scene.objects if thing.parent is None]
    turn = Matrix.Rotation(-math.pi / 2, 4, "X") if up == "z" else Matrix()  # the reader took what points up for what points back
    back = Matrix.Scale(1 / scale, 4) @ turn
    if back == Matrix():
        return
    if any(thing.type == "ARMATURE" for thing in scene.objects):
        for root in roots:
            root.matrix_world = back @ root.matrix_world
        return
    undo = back.inverted()
    for mesh in bpy.data.meshes:
        mesh.transform(back, shape_keys=True)
    for thing in scene.objects:
        thing.matrix_parent_inverse = Matrix()
        thing.matrix_basis = back @ thing.matrix_basis @ undo


def _group_levels(scene: bpy.types.Scene) -> None:
    """NAME_LOD0, NAME_LOD1, ... into a LodGroup NAME, the levels in their order; hulls and all else stay outside."""
    levels: dict[str, list[tuple[int, bpy.types.Object]]] = {}
    for thing in scene.objects:
        found = LEVEL.match(thing.name)
        if thing.type == "MESH" and found and not thing.name.startswith("UCX_"):
            levels.setdefault(found[1], []).append((int(found[2]), thing))
    for name, found in levels.items():
        if len(found) < 2:
            continue
        group = bpy.data.objects.new(name, None)
        group["fbx_type"] = "LodGroup"  # what Blender's exporter makes the node's kind
        scene.collection.objects.link(group)
        for _, thing in sorted(found, key=lambda level: level[0]):  # children are written in the order in which they were linked
            scene.collection.objects.unlink(thing)
            scene.collection.objects.link(thing)
            thing.parent = group
    bpy.context.view_layer.update()


def _textures_as_files(out: Path, folder: Path, flip: bool) -> list[Path]:
    """Makes files in `folder` of the pictures that lie in the GLB, from where the exporter takes them, and beside `out` of those that FBX
    cannot name. `flip`: normal maps' green, which glTF has up and Unreal down. Returns what lies beside it."""
    normals = {_normal_map(material) for material in bpy.data.materials if material.node_tree}
    named = {image for material in bpy.data.materials if material.node_tree for image in _held(material)}
    kept = []
    for image in bpy.data.images:
        if image.packed_file is None or not image.users:
            continue
        stem = re.sub(r"[^\w.-]+", "_", Path(image.name).stem)
        stem = stem if stem.startswith(out.stem) else f"{out.stem}_{stem}"
        place = (folder if image in named else out.parent) / f"{stem}{'.jpg' if image.file_format == 'JPEG' else '.png'}"
        if flip and image in normals:
            place = place.with_suffix(".png")
            _green_down(image, place)
        else:
            place.write_bytes(image.packed_file.data)
        image.unpack(method="REMOVE")
        image.filepath = str(place)
        if place.parent == out.parent:
            kept.append(place)
    return kept


def _green_down(image: bpy.types.Image, place: Path) -> None:
    """Writes a picture as PNG with its green turned round."""
    values = np.empty(len(image.pixels), np.float32)
    image.pixels.foreach_get(values)
    values[1::4] = 1 - values[1::4]
    turned = bpy.data.images.new("Kiln normal", *image.size, alpha=False, is_data=True)
    try:
        turned.pixels.foreach_set(values)
        turned.file_format, turned.filepath_raw = "PNG", str(place)
        turned.save()
    finally:
        bpy.data.images.remove(turned)


def _normal_map(material: bpy.types.Material) -> bpy.types.Image | None:
    texture = PrincipledBSDFWrapper(material, is_readonly=True).normalmap_texture
    return texture.image if texture is not None else None


def _held(material: bpy.types.Material) -> list[bpy.types.Image]:
    """The pictures of a material that Blender's exporter finds: those that feed a socket directly, or through one normal map."""
    shader = PrincipledBSDFWrapper(material, is_readonly=True)
    names = ("base_color", "alpha", "roughness", "metallic", "normalmap", "emission_color", "emission_strength", "specular")
    textures = [getattr(shader, f"{name}_texture", None) for name in names]
    return [texture.image for texture in textures if texture is not None and texture.image is not None]
