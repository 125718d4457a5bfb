"""Motion of a finished result onto the timeline (SPEC.md, "Results of `animate`"): shape keys, an armature with weights, or a mesh cache.

Each of the three is driven by one action, so that it can be retimed in the NLA, and gives the file's vertices at every moment: moments keep
their time in seconds, whatever the scene's frame rate is. Between moments shape keys and cache blend vertices linearly, bones turn.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import bpy
import numpy as np
from mathutils import Vector
from mathutils.kdtree import KDTree

from . import scratch

WAYS = (
    ("SHAPE_KEYS", "Shape Keys", "One shape key for each moment, keyframed: exact, and every moment can be edited"),
    ("ARMATURE", "Armature", "Bones and weights with an action: small, and the motion can be changed bone by bone"),
    ("CACHE", "Mesh Cache", "A file beside the .blend with every moment's vertices: exact, for long or dense motion"),
)
FILES = {"SHAPE_KEYS": "shape_keys.glb", "ARMATURE": "armature.glb", "CACHE": "shape_keys.glb"}
CLOSING = 0.25  # share of a loop's time in which its end turns into its beginning
SAME_PLACE = 1e-4  # of the diagonal: two files of one mesh, both in single precision
Z_UP = np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], np.float64)  # glTF's axes to Blender's
NUMBERS = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}


@dataclass(frozen=True)
class How:
    """How motion comes onto the timeline. start: the scene's frame of the first moment; None: the number that it was captured at."""

    way: str = "SHAPE_KEYS"
    loop: bool = False
    start: int | None = None


def animate(
    context: bpy.types.Context,
    thing: bpy.types.Object,
    folder: Path,
    to_own_frame: np.ndarray,
    how: How,
    scene: bpy.types.Scene,
    collection: bpy.types.Collection,
) -> bpy.types.Object | None:
    """Gives `thing`, made of `mesh.glb` in `folder`, the motion of the files beside it. Returns the armature where there is one.

    to_own_frame: from the results' world (metres, Z up) into the frame of the object's vertices, 4 x 4. scene: whose frame rate counts.
    collection: gets the armature, and gives everything its name.
    Raises ValueError or OSError; then no file of ours stays, and the caller removes what is in Blender.
    """
    path = folder / FILES[how.way]
    try:
        glb = Glb(path)
        moments = _moments(glb)
        into = to_own_frame @ Z_UP
        into, order = _same_vertices(thing.data, glb, into)
        if how.way == "ARMATURE":
            rig = _rig(glb, len(moments.names))
        else:
            vertices = _moving(glb, into, order, len(moments.names))
    except (KeyError, IndexError, TypeError, AttributeError, StopIteration, struct.error) as error:
        raise ValueError(f"{path.name} is damaged: {error!r}.") from error
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged: {error}.") from error
    at = moments.at(scene, how.start)
    loop = how.loop and len(at) > 1
    name, made = collection.name, None
    thing["kiln_motion"] = how.way
    if how.way == "ARMATURE":
        made = _armature(context, thing, rig, into, order, at, loop, name)
        collection.objects.link(made)
    else:
        if loop:
            vertices += _closing(at)[:, None, None] * (vertices[0] - vertices[-1])
        if how.way == "CACHE":
            _cache(thing, vertices, at, loop, name, scene)
        else:
            _shape_keys(thing, vertices, moments.names, at, loop, name)
    return made


# Files


class Glb:
    """A binary glTF file, as far as its numbers are concerned."""

    def __init__(self, path: Path):
        """Raises ValueError for what is no such file."""
        data, chunks, offset = path.read_bytes(), {}, 12
        while offset + 8 <= len(data):
            length, kind = struct.unpack_from("<I4s", data, offset)
            chunks.setdefault(kind, data[offset + 8 : offset + 8 + length])
            offset += 8 + length
        if data[:4] != b"glTF" or struct.unpack_from("<I", data, 8)[0] != len(data) or b"JSON" not in chunks:
            raise ValueError("it is no whole glTF file")
        self.json = json.loads(chunks[b"JSON"])
        self._binary = chunks.get(b"BIN\0", b"")

    def accessor(self, number: int) -> np.ndarray:
        """Its values, (count, components); normalised integers as floats."""
        about = self.json["accessors"][number]
        kind, shape = NUMBERS[about["componentType"]], (about["count"], WIDTHS[about["type"]])
        values = self._view(about, kind, shape) if "bufferView" in about else np.zeros(shape, kind)
        if "sparse" in about:
            sparse, values = about["sparse"], values.copy()
            places = self._view(sparse["indices"], NUMBERS[sparse["indices"]["componentType"]], (sparse["count"], 1))[:, 0]
            values[places] = self._view(sparse["values"], kind, (sparse["count"], shape[1]))
        if about.get("normalized"):
            values = np.maximum(values / np.iinfo(values.dtype).max, -1.0)
        if not np.isfinite(values).all():
            raise ValueError("not all of its numbers are numbers")
        return values

    def _view(self, about: dict, kind: str, shape: tuple[int, int]) -> np.ndarray:
        view, size = self.json["bufferViews"][about["bufferView"]], np.dtype(kind).itemsize
        offset = view.get("byteOffset", 0) + about.get("byteOffset", 0)
        return np.ndarray(shape, kind, self._binary, offset, (view.get("byteStride", size * shape[1]), size))

    def primitive(self) -> dict:
        return self.json["meshes"][0]["primitives"][0]

    def channels(self) -> dict[tuple[int, str], np.ndarray]:
        """What the animation moves: node and path -> values at the moments."""
        animation = self.json["animations"][0]
        samplers = animation["samplers"]
        return {
            (channel["target"]["node"], channel["target"]["path"]): self.accessor(samplers[channel["sampler"]]["output"])
            for channel in animation["channels"]
        }


@dataclass(frozen=True)
class Moments:
    """The T moments: their time in seconds since the first, and their names."""

    seconds: np.ndarray  # float64
    first: float  # frame number of the first on the source's timeline
    names: list[str]

    def at(self, scene: bpy.types.Scene, start: int | None) -> np.ndarray:
        """Frames of the scene."""
        rate = scene.render.fps / scene.render.fps_base
        frames = (self.first if start is None else start) + self.seconds * rate
        near = np.round(frames)
        return np.where(np.abs(frames - near) < 1e-4, near, frames)


def _moments(glb: Glb) -> Moments:
    extras = glb.json["animations"][0]["extras"]
    frames, rate = np.array(extras["frames"], np.float64), float(extras["fps"])
    if frames.ndim != 1 or not len(frames) or not np.isfinite(frames).all() or (np.diff(frames) <= 0).any() or not 0 < rate < 1e6:
        raise ValueError("its moments are in no order")
    return Moments((frames - frames[0]) / rate, frames[0], [f"frame {frame:.10g}" for frame in frames])


def _same_vertices(mesh: bpy.types.Mesh, glb: Glb, into: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`into` with its translation made that of the mesh, and for each vertex of the mesh its number in the file.

    The importer keeps the file's order; another order is found by place, which is enough: vertices that share one lie along a seam and
    move as one. The translation is taken from the mesh, whose place the importer rounded, so that nothing jumps at rest.
    """
    rest = np.empty(3 * len(mesh.vertices), np.float32)
    mesh.vertices.foreach_get("co", rest)
    rest = rest.reshape(-1, 3).astype(np.float64)
    primitive = glb.primitive()
    used = np.unique(glb.accessor(primitive["indices"])[:, 0])
    placed = glb.accessor(primitive["attributes"]["POSITION"])[used] @ into[:3, :3].T
    strangers = ValueError("it does not hold the mesh of mesh.glb")
    if not len(rest) or not len(placed):
        raise strangers
    offset = (rest.min(0) + rest.max(0) - placed.min(0) - placed.max(0)) / 2
    placed += offset
    near = SAME_PLACE * np.linalg.norm(np.ptp(rest, 0))
    order = np.arange(len(rest))
    if len(placed) != len(rest) or np.abs(placed - rest).max() > near:
        tree = KDTree(len(placed))
        for number, place in enumerate(placed):
            tree.insert(place, number)
        tree.balance()
        found = [tree.find(place) for place in rest]
        if max(distance for _, _, distance in found) > near:
            raise strangers
        order = np.array([number for _, number, _ in found])
    moved = into.copy()
    moved[:3, 3] = offset
    return moved, used[order]


def _moving(glb: Glb, into: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """The vertices at each moment in the object's frame, (T, n, 3) float32."""
    primitive = glb.primitive()
    base, targets = glb.accessor(primitive["attributes"]["POSITION"])[order], primitive["targets"]
    weights = next(values for (_, path), values in glb.channels().items() if path == "weights").reshape(-1)
    if len(targets) != count or not np.array_equal(weights, np.eye(count).reshape(-1)):
        raise ValueError("it does not hold one morph target for each moment")
    vertices = np.empty((count, len(order), 3), np.float32)
    for moment, target in enumerate(targets):
        if "POSITION" in target:
            moved = base.astype(np.float64) + glb.accessor(target["POSITION"])[order]
        else:
            moved = base.astype(np.float64)
        vertices[moment] = moved @ into[:3, :3].T + into[:3, 3]
    return vertices


@dataclass(frozen=True)
class Rig:
    """B bones over T moments, in the file's axes and metres, by the armature's node."""

    names: list[str]
    parents: list[int]  # -1: none; a parent stands before its children
    lengths: list[float]
    back: np.ndarray  # (B, 4, 4), inverse of each bone at rest
    moved: np.ndarray  # (B, T, 4, 4), rotation, translation and scale along the bone's own axes
    scaled: bool
    joints: np.ndarray  # (n, k) bones of each vertex of the file
    weights: np.ndarray  # (n, k)


def _rig(glb: Glb, count: int) -> Rig:
    nodes, skin = glb.json["nodes"], glb.json["skins"][0]
    channels, joints = glb.channels(), skin["joints"]
    extras = [nodes[joint].get("extras", {}) for joint in joints]
    scale_joints = {about["scales"]: place for place, about in enumerate(extras) if "scales" in about}
    bones = [place for place, about in enumerate(extras) if "scales" not in about]
    if bones != list(range(len(bones))):
        raise ValueError("scale joints stand between its bones")
    bone_of = np.array([about.get("scales", place) for place, about in enumerate(extras)])
    above = {child: parent for parent, node in enumerate(nodes) for child in node.get("children", ())}

    def values(node: int, path: str, default: list[float]) -> np.ndarray:
        moving = channels.get((node, path))
        if moving is None:
            return np.tile(np.array(nodes[node].get(path, default), np.float64), (count, 1))
        if moving.shape != (count, len(default)):
            raise ValueError("an animation has not one value for each moment")
        return moving.astype(np.float64)

    back = glb.accessor(skin["inverseBindMatrices"]).astype(np.float64).reshape(-1, 4, 4).transpose(0, 2, 1)[bones]
    stiff, moved, parents = [], [], []
    for place in bones:
        node = joints[place]
        local = _matrices(values(node, "rotation", [0, 0, 0, 1]), values(node, "translation", [0, 0, 0]))
        parent = joints.index(above[node]) if above.get(node) in joints else -1
        if parent >= place:
            raise ValueError("a bone stands before its parent")
        stiff.append(stiff[parent] @ local if parent >= 0 else local)
        parents.append(parent)
        moved.append(stiff[-1].copy())
        if place in scale_joints:
            moved[-1][:, :3, :3] *= values(joints[scale_joints[place]], "scale", [1, 1, 1])[:, None, :]
    attributes = glb.primitive()["attributes"]
    return Rig(
        names=[nodes[joints[place]]["name"] for place in bones],
        parents=parents,
        lengths=[float(extras[place]["length"]) for place in bones],
        back=back,
        moved=np.array(moved),
        scaled=bool(scale_joints),
        joints=bone_of[glb.accessor(attributes["JOINTS_0"])],
        weights=glb.accessor(attributes["WEIGHTS_0"]).astype(np.float64),
    )


def _matrices(quaternions: np.ndarray, translations: np.ndarray) -> np.ndarray:
    """(T, 4, 4) of glTF's quaternions, w last, and translations."""
    x, y, z, w = (quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)).T
    found = np.zeros((len(x), 4, 4))
    found[:, 0, :3] = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], 1)
    found[:, 1, :3] = np.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], 1)
    found[:, 2, :3] = np.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], 1)
    found[:, :3, 3], found[:, 3, 3] = translations, 1
    return found


def _quaternions(rotations: np.ndarray) -> np.ndarray:
    """(T, 4) quaternions, w first, of rotations (T, 3, 3); each in the half of the sphere in which the one before lies, so that none of the
    curves between them jumps. After Shepperd 1978: from whichever of the four components is largest."""
    trace = np.trace(rotations, axis1=1, axis2=2)
    diagonal = np.diagonal(rotations, axis1=1, axis2=2)
    r = rotations
    outer = np.empty((len(r), 4, 4))  # of four times the quaternion with itself
    outer[:, 0, 0] = 1 + trace
    outer[:, 0, 1] = outer[:, 1, 0] = r[:, 2, 1] - r[:, 1, 2]
    outer[:, 0, 2] = outer[:, 2, 0] = r[:, 0, 2] - r[:, 2, 0]
    outer[:, 0, 3] = outer[:, 3, 0] = r[:, 1, 0] - r[:, 0, 1]
    for i in range(3):
        outer[:, i + 1, i + 1] = 1 + 2 * diagonal[:, i] - trace
        for j in range(i):
            outer[:, i + 1, j + 1] = outer[:, j + 1, i + 1] = r[:, i, j] + r[:, j, i]
    largest = np.argmax(np.diagonal(outer, axis1=1, axis2=2), 1)
    found = outer[np.arange(len(r)), largest]
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    found[0] *= 1 if found[0, 0] >= 0 else -1
    for moment in range(1, len(found)):
        if found[moment] @ found[moment - 1] < 0:
            found[moment] *= -1
    return found


# Time


def _closing(at: np.ndarray) -> np.ndarray:
    """How much of the difference between first and last moment each takes on so that a loop closes: 0, and from three quarters on up to 1,
    without a jolt at either end."""
    begins = at[-1] - CLOSING * (at[-1] - at[0])
    share = np.clip((at - begins) / (at[-1] - begins), 0, 1)
    return share * share * (3 - 2 * share)


class Curves:
    """A new action that animates one data-block. Before 4.4 an action holds the curves itself; after it, under a slot."""

    def __init__(self, animated: bpy.types.ID, name: str, at: np.ndarray, loop: bool):
        self._at, self._loop = at, loop
        action = bpy.data.actions.new(name)
        data = animated.animation_data_create()
        if bpy.app.version < (4, 4, 0):
            action.id_root = animated.id_type
            self._holder, data.action = action, action
        else:
            slot = action.slots.new(id_type=animated.id_type, name=animated.name)
            self._holder = action.layers.new("Layer").strips.new(type="KEYFRAME").channelbag(slot, ensure=True)
            data.action, data.action_slot = action, slot
        if loop:
            action.use_frame_range = action.use_cyclic = True
            action.frame_start, action.frame_end = at[0], at[-1]

    def add(self, path: str, index: int, values: np.ndarray, keys: np.ndarray | None = None, group: str = "") -> None:
        """One curve through `values`, straight between them. keys: which moments they are of; None: every one."""
        at = self._at if keys is None else self._at[keys]
        curve = self._holder.fcurves.new(path, index=index)
        if group:
            curve.group = self._holder.groups.get(group) or self._holder.groups.new(group)
        points = curve.keyframe_points
        points.add(len(at))
        points.foreach_set("co", np.stack([at, values], 1).astype(np.float32).reshape(-1))
        linear = bpy.types.Keyframe.bl_rna.properties["interpolation"].enum_items["LINEAR"].value
        points.foreach_set("interpolation", np.full(len(at), linear, np.intc))
        if self._loop:
            cycles = curve.modifiers.new("CYCLES")
            cycles.mode_before = cycles.mode_after = "REPEAT"
        curve.update()


# The three ways


def _shape_keys(thing: bpy.types.Object, vertices: np.ndarray, names: list[str], at: np.ndarray, loop: bool, name: str) -> None:
    """One key for each moment, whose value is 1 there and 0 at its neighbours: between two moments the vertices go straight."""
    thing.shape_key_add(name="Basis", from_mix=False)
    made = [thing.shape_key_add(name=moment, from_mix=False) for moment in names]
    for key, places in zip(made, vertices, strict=True):
        key.points.foreach_set("co", places.reshape(-1))
    keys = thing.data.shape_keys
    keys.name = name
    curves, last = Curves(keys, name, at, loop), len(at) - 1
    for moment, key in enumerate(made):
        # Its first and last moment stand in every curve: a loop repeats what lies between a curve's own ends.
        points = np.unique(np.clip([0, moment - 1, moment, moment + 1, last], 0, last))
        curves.add(key.path_from_id("value"), 0, points == moment, points)


def _cache(thing: bpy.types.Object, vertices: np.ndarray, at: np.ndarray, loop: bool, name: str, scene: bpy.types.Scene) -> None:
    """A PC2 file and a Mesh Cache modifier that plays it by a curve on its evaluation frame: so the NLA can retime it, and it can loop."""
    path = _cache_path(name)
    step = (at[-1] - at[0]) / max(len(at) - 1, 1)
    try:
        with path.open("wb") as file:
            file.write(struct.pack("<12siiffi", b"POINTCACHE2\0", 1, vertices.shape[1], at[0], step or 1.0, len(vertices)))
            vertices.astype("<f4").tofile(file)
        shown = bpy.path.relpath(str(path)) if bpy.data.filepath and path.is_relative_to(_beside_file()) else str(path)
        modifier = thing.modifiers.new("Kiln motion", "MESH_CACHE")
        modifier.cache_format, modifier.filepath = "PC2", shown
        modifier.interpolation, modifier.time_mode, modifier.play_mode = "LINEAR", "FRAME", "CUSTOM"
        thing["kiln_cache"] = shown
        moments = np.arange(len(at))
        even = np.abs(np.diff(at) - step).max(initial=0) < 1e-4
        keys = np.unique([0, len(at) - 1]) if even else moments
        Curves(thing, name, at, loop).add(modifier.path_from_id("eval_frame"), 0, keys, keys)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _beside_file() -> Path:
    return Path(bpy.data.filepath).parent / "kiln_cache"


def _cache_path(name: str) -> Path:
    """A name that no other import has taken, beside the .blend; where that was never saved, in Kiln's own folder."""
    folder = _beside_file() if bpy.data.filepath else Path(bpy.utils.extension_path_user(__package__, path="kiln_cache", create=True))
    folder.mkdir(parents=True, exist_ok=True)
    stem, number = bpy.path.clean_name(name), 1
    while (path := folder / (f"{stem}.pc2" if number == 1 else f"{stem}_{number}.pc2")).exists():
        number += 1
    return path


def _armature(
    context: bpy.types.Context,
    thing: bpy.types.Object,
    rig: Rig,
    into: np.ndarray,
    order: np.ndarray,
    at: np.ndarray,
    loop: bool,
    name: str,
) -> bpy.types.Object:
    """Bones where the file has them, the mesh under them with its weights, and an action of the armature object."""
    armature = bpy.data.objects.new(f"{name} armature", bpy.data.armatures.new(f"{name} armature"))
    _bones(context, armature, rig, into)
    armature.show_in_front = True
    armature.location, armature.rotation_mode, armature.rotation_euler = thing.location, thing.rotation_mode, thing.rotation_euler
    thing.parent = armature
    thing.location = thing.rotation_euler = (0, 0, 0)
    thing.modifiers.new("Armature", "ARMATURE").object = armature
    _weigh(thing, rig, order)
    curves = Curves(armature, name, at, loop)
    for bone_name, channels in zip(rig.names, _channels(armature, rig, into), strict=True):
        bone = armature.pose.bones[bone_name]
        bone.rotation_mode = "QUATERNION"
        if loop:
            channels = _closed(channels, _closing(at))
        for property, values in channels.items():
            if property == "scale" and not rig.scaled:
                continue
            for index in range(values.shape[1]):
                curves.add(bone.path_from_id(property), index, values[:, index], group=bone.name)
    return armature


def _bones(context: bpy.types.Context, armature: bpy.types.Object, rig: Rig, into: np.ndarray) -> None:
    """The bones at rest. Bones exist in edit mode alone, which a scene of our own enters."""
    with scratch.scene(context) as scene:
        scene.collection.objects.link(armature)
        layer = scene.view_layers[0]
        layer.objects.active = armature
        layer.update()
        with context.temp_override(object=armature, active_object=armature, selected_objects=[armature]):
            bpy.ops.object.mode_set(mode="EDIT")
            size, made = np.cbrt(np.linalg.det(into[:3, :3])), []
            for number, rest in enumerate(into @ np.linalg.inv(rig.back)):
                bone = armature.data.edit_bones.new(rig.names[number])
                bone.head = rest[:3, 3]
                bone.tail = rest[:3, 3] + rest[:3, 1] * max(rig.lengths[number], 1e-6 / size)
                bone.align_roll(Vector(rest[:3, 2]))
                bone.inherit_scale = "NONE"
                bone.select = bone.select_head = bone.select_tail = True  # animation editors show the keys of selected bones
                if rig.parents[number] >= 0:
                    bone.parent = made[rig.parents[number]]
                made.append(bone)
            made.clear()
            bpy.ops.object.mode_set(mode="OBJECT")
        armature.select_set(False, view_layer=layer)
        scene.collection.objects.unlink(armature)
    if {bone.name for bone in armature.data.bones} != set(rig.names) or len(armature.data.bones) != len(rig.names):
        raise ValueError("armature.glb is damaged: it has bones of the same name, or of no length.")


def _weigh(thing: bpy.types.Object, rig: Rig, order: np.ndarray) -> None:
    groups = [thing.vertex_groups.new(name=name) for name in rig.names]
    joints, weights = rig.joints[order], rig.weights[order]
    # A bone may stand twice at one vertex: once itself, once as its scale joint.
    pairs, which = np.unique(np.arange(len(order))[:, None] * len(groups) + joints, return_inverse=True)
    totals = np.bincount(which.reshape(-1), weights.reshape(-1))
    for vertex, bone, weight in zip(*(each.tolist() for each in (*np.divmod(pairs, len(groups)), totals)), strict=True):
        if weight > 0:
            groups[bone].add([vertex], weight, "REPLACE")


def _channels(armature: bpy.types.Object, rig: Rig, into: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Of each bone the values of its channels at every moment, by its parent as Blender means them for bones that inherit no scale: the
    place by the parent's whole matrix, rotation and scale by its rotation alone."""
    rest = [np.array(armature.data.bones[name].matrix_local, np.float64) for name in rig.names]  # as Blender rounded them
    away = np.linalg.inv(into)
    posed, found = [], []
    for number, parent in enumerate(rig.parents):
        posed.append(into @ rig.moved[number] @ rig.back[number] @ away @ rest[number])
        placing, turning = rest[number], rest[number][:3, :3]
        if parent >= 0:
            offset = np.linalg.inv(rest[parent]) @ rest[number]
            placing, turning = posed[parent] @ offset, _directions(posed[parent][:, :3, :3]) @ offset[:3, :3]
        turned = np.linalg.inv(turning) @ posed[number][:, :3, :3]
        found.append(
            {
                "location": (np.linalg.inv(placing) @ posed[number])[:, :3, 3],
                "rotation_quaternion": _quaternions(_directions(turned)),
                "scale": np.linalg.norm(turned, axis=1),
            }
        )
    return found


def _directions(matrices: np.ndarray) -> np.ndarray:
    """Columns of unit length."""
    return matrices / np.linalg.norm(matrices, axis=-2, keepdims=True)


def _closed(channels: dict[str, np.ndarray], share: np.ndarray) -> dict[str, np.ndarray]:
    """Channels whose last moment is the first: the difference comes in by `share`, of rotations along the shortest turn."""
    closed = {name: values + share[:, None] * (values[0] - values[-1]) for name, values in channels.items()}
    turns = channels["rotation_quaternion"]
    missing = _product(turns[:1], turns[-1:] * [1, -1, -1, -1])[0]
    missing *= 1 if missing[0] >= 0 else -1
    half = np.arccos(min(missing[0], 1.0))
    axis = missing[1:] / max(np.linalg.norm(missing[1:]), 1e-12)
    part = np.concatenate([np.cos(share * half)[:, None], np.sin(share * half)[:, None] * axis], 1)
    closed["rotation_quaternion"] = _product(part, turns)
    return closed


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of quaternions, w first."""
    w, v, other, u = left[:, :1], left[:, 1:], right[:, :1], right[:, 1:]
    return np.concatenate([w * other - (v * u).sum(1, keepdims=True), w * u + other * v + np.cross(v, u)], 1)
