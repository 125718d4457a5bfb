"""Files of 3D models into the open, empty file, as File > Import and File > Open bring them in: one line for each kind.

A .blend is opened as it is, but nothing in it runs: no script, no driver that is Python. Whatever a reader of Blender's raises becomes a
sentence, and what is missing beside the file a warning.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import bpy

from .capture import SURFACES
from .protocol.errors import KilnError


def _import(name: str, **options) -> Callable[[str], None]:
    """A reader by its operator's name ("wm.obj_import"); options that this Blender's does not have are left out."""

    def read(path: str) -> None:
        group, _, operator = name.partition(".")
        call = getattr(getattr(bpy.ops, group), operator)
        try:
            known = call.get_rna_type().properties.keys()
        except KeyError:
            hint = "Use a Blender from blender.org, or convert the file."
            raise KilnError("no-importer", f"This Blender was built without a reader of {Path(path).suffix} files.", hint) from None
        if "FINISHED" not in call(filepath=path, **{key: value for key, value in options.items() if key in known}):
            raise RuntimeError("Blender's reader gave up")

    return read


def _fbx(path: str) -> None:
    # From 4.5 on there is one in C++, which also reads ASCII and old versions; before, that in Python alone.
    fast = hasattr(bpy.types, "WM_OT_fbx_import")
    _import("wm.fbx_import" if fast else "import_scene.fbx")(path)


def _open(path: str) -> None:
    bpy.ops.wm.open_mainfile(filepath=path, load_ui=False, use_scripts=False)


def _ply(path: str) -> None:
    """Blender's reader ends the process where a count in the header is none, and makes points of Gaussian splats."""
    with open(path, "rb") as file:
        header = file.read(1 << 20).partition(b"end_header")[0].decode("latin-1")
    counts = re.findall(r"^element[ \t]+\S+[ \t]+(.*?)[ \t\r]*$", header, re.MULTILINE)
    if not header.startswith("ply") or not counts or len(counts) != len(re.findall(r"^element", header, re.MULTILINE)):
        raise ValueError("its header is no PLY header")
    if not all(re.fullmatch(r"\d{1,9}", count) for count in counts):
        raise ValueError("a count in its header is no number")
    if re.search(r"^property \S+ f_dc_0\b", header, re.MULTILINE):
        raise KilnError("bad-file", f"{Path(path).name} holds Gaussian splats and no mesh.", "Use the recipe mesh_splats.")
    _import("wm.ply_import")(path)


_gltf = _import("import_scene.gltf", disable_bone_shape=True)
_usd = _import("wm.usd_import")

IMPORTERS: dict[str, Callable[[str], None]] = {
    ".glb": _gltf,
    ".gltf": _gltf,
    ".obj": _import("wm.obj_import"),
    ".fbx": _fbx,
    ".usd": _usd,
    ".usda": _usd,
    ".usdc": _usd,
    ".usdz": _usd,
    ".ply": _ply,
    ".stl": _import("wm.stl_import"),
    ".blend": _open,
}


def check(path: Path) -> None:
    """Raises KilnError("bad-file") for what no reader needs to look at."""
    if path.suffix.lower() not in IMPORTERS:
        raise KilnError("bad-file", f"{path.name} is of no kind that can be imported.", f"Use one of {', '.join(IMPORTERS)}.")
    if not path.is_file():
        raise KilnError("bad-file", f"There is no file {path}.", "Check its name.")
    if path.stat().st_size == 0:
        raise KilnError("bad-file", f"{path.name} is empty: it has 0 bytes.", "Export it again.")


def load(path: Path) -> list[str]:
    """Reads a file into Blender's open file, which has to be empty; returns warnings. Raises KilnError("bad-file")."""
    check(path)
    try:
        IMPORTERS[path.suffix.lower()](str(path.resolve()))
    except KilnError:
        raise
    except Exception as error:  # Blender's readers, of files from anywhere, fail in any way
        raise KilnError("bad-file", f"{path.name} cannot be read: {_reason(error)}.", _hint(path)) from error
    if path.suffix.lower() != ".blend":
        bpy.context.view_layer.update()
    return warnings(path)


def surfaces(path: Path, scene: bpy.types.Scene) -> list[bpy.types.Object]:
    """Everything that has a surface in an imported file, but for what the glTF reader adds to show bones. Or KilnError("bad-subject")."""
    helpers = [collection for collection in bpy.data.collections if collection.name.startswith("glTF_not_exported")]
    hidden = {thing for collection in helpers for thing in collection.all_objects}
    found = [thing for thing in scene.objects if thing not in hidden and (thing.type in SURFACES or thing.instance_type == "COLLECTION")]
    if not found:
        kinds = ", ".join(sorted({thing.type.replace("_", " ").lower() for thing in scene.objects}))
        holds = f"it holds {kinds} alone" if kinds else "it holds no object"
        raise KilnError("bad-subject", f"{path.name} has no surface: {holds}.", "Give a file with a mesh.")
    return found


def warnings(path: Path) -> list[str]:
    """What a file names that is not there, or could not be used: it is imported without."""
    found = []
    for image in bpy.data.images:
        if image.source == "FILE" and image.users and image.packed_file is None and image.filepath:
            place = Path(bpy.path.abspath(image.filepath, library=image.library))
            if not place.is_file():
                found.append(f"The texture {place.name} is missing: it was looked for in {place.parent}.")
                continue
        if image.source == "FILE" and image.users and not image.size[0]:
            found.append(f"The texture {image.name} cannot be read.")
    for library in bpy.data.libraries:
        place = Path(bpy.path.abspath(library.filepath))
        if not place.is_file():
            found.append(f"The library {place.name} is missing: what was linked from it is left out.")
    if path.suffix.lower() == ".blend":
        if bpy.app.autoexec_fail:
            found.append(f"Scripts and Python drivers of the file were not run ({bpy.app.autoexec_fail_message}).")
        if tuple(bpy.data.version[:2]) > bpy.app.version[:2]:
            saved = ".".join(map(str, bpy.data.version[:2]))
            found.append(f"The file was saved by Blender {saved}, which is newer than {bpy.app.version_string}: some of it may be lost.")
    return found


def choose_clip(name: str | None = None, most: int | None = None) -> list[str]:
    """Plays one clip of an imported file alone, the longest where none is named, and sets the scene's range to its first `most` frames, or
    all. Returns the names of all clips, the chosen one first. Raises KilnError("bad-parameter")."""
    owners = [*bpy.data.objects, *bpy.data.shape_keys]
    tracks = [(owner, track) for owner in owners if owner.animation_data for track in owner.animation_data.nla_tracks]
    lengths: dict[str, float] = {}
    for _, track in tracks:
        for strip in track.strips:
            lengths[track.name] = max(lengths.get(track.name, 0), strip.frame_end - strip.frame_start)
    if name is not None and name not in lengths:
        raise KilnError("bad-parameter", f"There is no clip {name!r}.", f"There are: {', '.join(sorted(lengths)) or 'none'}.")
    scene = bpy.context.scene
    if lengths:
        chosen = name or max(lengths, key=lambda one: lengths[one])
        first = min(strip.frame_start for _, track in tracks if track.name == chosen for strip in track.strips)
        for owner, track in tracks:
            owner.animation_data.action = None
            track.mute = track.name != chosen
        scene.frame_start, scene.frame_end = round(first), round(first + lengths[chosen])
        names = [chosen, *(one for one in lengths if one != chosen)]
    else:  # an action that is simply active, or something else that moves
        names = []
        ranges = [owner.animation_data.action.frame_range for owner in owners if owner.animation_data and owner.animation_data.action]
        if ranges:
            scene.frame_start, scene.frame_end = round(min(low for low, _ in ranges)), round(max(high for _, high in ranges))
    if most is not None:
        scene.frame_end = min(scene.frame_end, scene.frame_start + most - 1)
    scene.frame_set(scene.frame_start)
    return names


def _reason(error: Exception) -> str:
    """What an operator's exception says, without its traceback."""
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if "Traceback" in text:  # of a reader in Python: the last line names the exception, and lines after it the call
        named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
        lines = named[-1:] or lines[-1:]
    reason = (lines[0] if lines else type(error).__name__).removeprefix("Error: ").strip()
    return reason.rstrip(".")[:300]


def _hint(path: Path) -> str:
    if path.suffix.lower() == ".blend":
        return f"Open it in the Blender that saved it; this is {bpy.app.version_string}, which cannot open files of much newer ones."
    return "Open it in another program to see whether it is whole, or export it again."
