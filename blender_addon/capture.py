"""Pictures of the selected subject from known cameras: colour with soft alpha, exact depth, normals and material, in SPEC.md's "Views"
layout.

Depth, normals and material come from one more render, at one sample through each pixel's centre, and show the nearest surface along that
ray whose opacity is at least a tenth (`material_passes.OPAQUE`): holes of cut-out leaves are none, a pane of glass is one.

Every step builds a temporary scene, renders in it, and takes it away again, so that between two steps the user's file holds nothing of
ours: undo, save and autosave may come at any moment. The subject's own objects are linked into that scene, and Blender's dependency graph
brings what they depend on (parents, targets, drivers) without showing it. Runs on the main thread; `Subject` is a plain
value that may cross threads and undo.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby, takewhile
from pathlib import Path
from typing import NamedTuple

import bpy
import numpy as np
from mathutils import Matrix, Quaternion, Vector

from . import base_color, exr, material_passes
from .protocol import recipes
from .protocol.errors import KilnError

FIELD_OF_VIEW = math.radians(40)
MARGIN = 1.02  # of the bounding sphere: pixel filters reach over the edge, and extremes are found to within 0.8 %
LAYER = "Kiln"
SURFACES = {"MESH", "CURVE", "SURFACE", "FONT", "META", "CURVES", "POINTCLOUD"}
BACKGROUND_DEPTH = 1e9  # Cycles writes 1e10 where no surface is
SEE_NOTHING = "Check its materials' transparency, and its visibility to cameras (Object properties > Visibility > Ray Visibility)."
RENDER_HANDLERS = [name for name in dir(bpy.app.handlers) if name.startswith("render_")]


# What to capture


@dataclass(frozen=True)
class Subject:
    """What is captured as one thing: names and session-wide ids, no references to Blender's data."""

    title: str  # the object's or collection's name, or "Cube and 2 more"
    kind: str  # "object", "objects" or "collection"
    scene: int  # session_uid
    view_layer: str
    objects: tuple[int, ...]  # session_uid each; of a collection, all that it does not hide in renders


def subject(
    context: bpy.types.Context, objects: list[bpy.types.Object] | None = None, collection: bpy.types.Collection | None = None
) -> Subject:
    """The given objects or collection, or else what is selected (in Edit and other modes also the objects in that mode).

    Raises KilnError("nothing-selected" or "bad-subject"). What only evaluation can tell (no faces, no size) `Capture` finds.
    """
    scene, layer = context.scene, context.view_layer
    if collection is not None:
        title, kind = collection.name, "collection"
        if not collection.all_objects:
            raise KilnError("bad-subject", f"Collection {title} is empty.", "Choose a collection that holds the object to rebuild.")
        things = list(dict.fromkeys(thing for branch in _rendered_branches(collection) for thing in branch.objects))
        if not things:
            raise KilnError("bad-subject", f"Collection {title} is hidden in renders.", "Turn its camera icon on in the Outliner.")
    else:
        if objects is None:
            objects = [thing for thing in layer.objects if thing.select_get(view_layer=layer)]
            active = layer.objects.active
            if active is not None and active.mode != "OBJECT" and active not in objects:
                objects.append(active)
        things = list(objects)
        if not things:
            raise KilnError("nothing-selected", "Nothing is selected.", "Select the object to rebuild, or choose a collection.")
        kind = "object" if len(things) == 1 else "objects"
        title = things[0].name if kind == "object" else f"{_first(things, layer).name} and {len(things) - 1} more"
    _refuse_what_cannot_render(things, title, kind, scene, layer)
    ids = tuple(thing.session_uid for thing in things)
    return Subject(title, kind, scene.session_uid, layer.name, ids)


def _first(things: list[bpy.types.Object], layer: bpy.types.ViewLayer) -> bpy.types.Object:
    return layer.objects.active if layer.objects.active in things else things[0]


def _refuse_what_cannot_render(things, title, kind, scene, layer) -> None:
    could = [thing for thing in things if thing.type in SURFACES or thing.instance_type != "NONE" or thing.particle_systems]
    if not could:
        if kind == "object":
            what = things[0].type.replace("_", " ").lower()
            article = "an" if what[0] in "aeiou" else "a"
            raise KilnError(
                "bad-subject",
                f"{title} is {article} {what}: it has no surface to rebuild.",
                "Select a mesh, a curve, a text, hair, or an empty that instances a collection.",
            )
        raise KilnError("bad-subject", f"{title}: none of these objects has a surface to rebuild.", "Select at least one mesh among them.")
    if kind != "collection":
        in_scene = set(scene.objects)  # sets: the panel asks at every redraw, with all that is selected
        could = [thing for thing in could if thing in in_scene]
        if not could:
            raise KilnError("bad-subject", f"{title} is not in scene {scene.name}.", "Link it to the scene, or choose another object.")
        shown = {thing for collection in _rendered_collections(layer) for thing in collection.objects}
        could = [thing for thing in could if thing in shown]
    if all(thing.hide_render for thing in could):
        be = "is" if kind != "objects" else "are all"
        hint = "Turn its camera icon on in the Outliner, and that of its collection."
        raise KilnError("bad-subject", f"{title} {be} hidden in renders.", hint)


def _rendered_branches(collection: bpy.types.Collection) -> list[bpy.types.Collection]:
    """A collection and those in it, without what is hidden in renders."""
    if collection.hide_render:
        return []
    return [collection, *(branch for child in collection.children for branch in _rendered_branches(child))]


def _rendered_collections(layer: bpy.types.ViewLayer) -> list[bpy.types.Collection]:
    """The collections of a view layer that renders show."""
    found, waiting = [], [layer.layer_collection]
    while waiting:
        branch = waiting.pop()
        if not branch.exclude and not branch.collection.hide_render:
            found.append(branch.collection)
            waiting.extend(branch.children)
    return found


# Where the cameras stand


def directions(count: int) -> np.ndarray:
    """`count` unit vectors (count, 3) from the subject to its cameras: both poles and evenly spaced rings between them, each turned
    against the next; fewer than six stand on one ring, up and down in turn. 24 are three rings; 48 are five."""
    if count < 6:
        elevations = np.where(np.arange(count) % 2, -1, 1) * math.radians(35.26)  # four make a tetrahedron
        return _on_sphere(np.arange(count) / count * 2 * math.pi - math.pi / 2, elevations)
    rings = min(range(1, 40), key=lambda r: abs(2 + sum(_ring_lengths(r)) * (r + 1) / math.pi - count))
    lengths = np.array(_ring_lengths(rings))
    ends = np.round(np.cumsum(lengths) / lengths.sum() * (count - 2)).astype(int)
    sizes = np.diff(ends, prepend=0)
    found = [[[0.0, 0.0, 1.0]]]
    for ring, size in enumerate(sizes):
        elevation = math.pi / 2 - math.pi * (ring + 1) / (rings + 1)
        angles = (np.arange(size) + 0.5 * (ring % 2)) / max(size, 1) * 2 * math.pi - math.pi / 2
        found.append(_on_sphere(angles, np.full(size, elevation)))
    return np.concatenate([*found, [[0.0, 0.0, -1.0]]])


def _ring_lengths(rings: int) -> list[float]:
    return [2 * math.pi * math.sin(math.pi * (ring + 1) / (rings + 1)) for ring in range(rings)]


def between(taken: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` unit vectors (count, 3), each the candidate of 100 random ones that lies farthest from all before it."""
    random = np.random.default_rng(seed)
    taken = np.asarray(taken)
    chosen = np.empty((0, 3))
    for _ in range(count):
        candidates = random.normal(size=(100, 3))
        candidates /= np.linalg.norm(candidates, axis=1, keepdims=True)
        nearest = (candidates @ np.concatenate([taken, chosen]).T).max(1)
        chosen = np.concatenate([chosen, candidates[nearest.argmin()][None]])
    return chosen


def _on_sphere(azimuth: np.ndarray, elevation: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], 1)


def _fibonacci(count: int) -> np.ndarray:
    height = 1 - (2 * np.arange(count) + 1) / count
    return _on_sphere(np.arange(count) * math.pi * (3 - math.sqrt(5)), np.arcsin(height))


def _looking_inwards(direction: np.ndarray) -> Quaternion:
    """The rotation of a camera in `direction` that looks at the origin, upright (at the poles, +Y is up)."""
    up = Vector((0, 0, 1)) if abs(direction[2]) < 0.999 else Vector((0, 1, 0))
    back = Vector(direction).normalized()
    right = up.cross(back).normalized()
    return Matrix((right, back.cross(right), back)).transposed().to_quaternion()


# What renders: measured on the evaluated scene


@dataclass
class _Evaluated:
    """What a render engine is given of the subject. Blender units, world axes."""

    points: list[np.ndarray] = field(default_factory=list)  # extreme points, (n, 3) each
    surfaces: int = 0
    materials: set[int] = field(default_factory=set)  # session_uid
    bare: set[int] = field(default_factory=set)  # objects with a surface without material, session_uid
    places: dict[int, Matrix] = field(default_factory=dict)  # of objects that are not instances, by session_uid
    instances: int = 0  # of the surfaces
    shapes: list[np.ndarray] | None = None  # if asked for: all points of each geometry, box corners where it shows again; (n, 3) each


class _Probe(bpy.types.RenderEngine):
    """A render engine that measures instead of rendering: the only way to see modifiers, particles and visibility as they render."""

    bl_idname = "KILN_PROBE"
    bl_label = "Kiln"
    outcome: _Evaluated | Exception | None = None
    shapes = False

    def render(self, depsgraph: bpy.types.Depsgraph) -> None:
        try:
            _Probe.outcome = _evaluated(depsgraph, _Probe.shapes)
        except Exception as error:  # Blender would print it and go on; _measure raises it again
            _Probe.outcome = error


def _measure(scene: bpy.types.Scene, shapes: bool = False) -> _Evaluated:
    bpy.utils.register_class(_Probe)
    before = scene.render.engine
    try:
        scene.render.engine = _Probe.bl_idname
        _Probe.outcome, _Probe.shapes = None, shapes
        bpy.ops.render.render(scene=scene.name)
    finally:
        scene.render.engine = before
        bpy.utils.unregister_class(_Probe)
    if not isinstance(_Probe.outcome, _Evaluated):
        raise _Probe.outcome or KilnError("capture-failed", "Blender did not evaluate the scene.", "Try again, or restart Blender.")
    return _Probe.outcome


def _evaluated(depsgraph: bpy.types.Depsgraph, shapes: bool) -> _Evaluated:
    found = _Evaluated(shapes=[] if shapes else None)
    cache: dict[int, np.ndarray] = {}  # extreme points of shared geometry, in its own frame, by its address
    kept = 0  # points
    for instance in depsgraph.object_instances:
        thing = instance.object
        if thing.type not in SURFACES:
            continue
        before = len(found.points)
        matrix = np.array(instance.matrix_world, np.float64)
        if not instance.is_instance:
            found.places[thing.original.session_uid] = instance.matrix_world.copy()
        if instance.show_self:
            key = thing.data.as_pointer()
            known = key in cache
            if not known:
                points = _surface_points(thing)
                cache[key] = points[_extremes(points @ matrix[:3, :3].T)]
            if len(cache[key]):
                found.surfaces += 1
                found.instances += instance.is_instance
                found.points.append(cache[key] @ matrix[:3, :3].T + matrix[:3, 3])
                if found.shapes is not None:
                    shape = _box_corners(cache[key]) if known else points
                    found.shapes.append((shape @ matrix[:3, :3].T + matrix[:3, 3]).astype(np.float32))
                _note_materials(thing, found)
        if instance.show_particles:
            strands = _hair_points(thing)
            if len(strands):
                found.surfaces += 1
                found.points.append(strands)
                if found.shapes is not None:
                    found.shapes.append(strands.astype(np.float32))
                _note_materials(thing, found)
        kept += sum(len(points) for points in found.points[before:])
        if kept > 50_000:  # forests have millions
            points = np.concatenate(found.points)
            found.points = [points[_extremes(points)]]
            kept = 0
    return found


def _surface_points(thing: bpy.types.Object) -> np.ndarray:
    """The corners (n, 3) of an evaluated object's surface in its own frame; none where it has no faces."""
    if thing.type in ("CURVES", "POINTCLOUD"):
        position = thing.data.attributes.get("position")
        return np.empty((0, 3)) if position is None else _read(position.data, "vector", 3)
    own = thing.type == "MESH" and not thing.data.is_editmode  # in Edit mode the faces are not in the mesh itself
    mesh = thing.data if own else thing.to_mesh()
    try:
        if mesh is None or len(mesh.polygons) == 0:
            return np.empty((0, 3))
        used = np.zeros(len(mesh.vertices), bool)
        used[_read(mesh.loops, "vertex_index", 1, np.int32)[:, 0]] = True
        return _read(mesh.vertices, "co", 3)[used]
    finally:
        if not own:
            thing.to_mesh_clear()


def _box_corners(points: np.ndarray) -> np.ndarray:
    """The corners (8, 3) of the box along the axes around points (n, 3)."""
    ends = np.stack([points.min(0), points.max(0)])
    return np.stack([ends[[i & 1, i >> 1 & 1, i >> 2], [0, 1, 2]] for i in range(8)])


def _hair_points(thing: bpy.types.Object) -> np.ndarray:
    """Points (n, 3) of an object's legacy particle hair, in the world; every strand up to some thousands."""
    points = []
    for modifier in thing.modifiers:
        if modifier.type != "PARTICLE_SYSTEM" or not modifier.show_render:
            continue
        system, settings = modifier.particle_system, modifier.particle_system.settings
        if settings.type != "HAIR" or settings.render_type != "PATH":
            continue
        parents, children = len(system.particles), len(system.child_particles)
        # Children replace their parents unless both are asked for, and come after them in the numbering.
        strands = range(0 if children == 0 or settings.use_parent_particles else parents, parents + children)
        last = 2**settings.render_step
        for strand in strands[:: 1 + len(strands) // 4000]:
            points += [system.co_hair(thing, particle_no=strand, step=step) for step in (0, last // 2, last)]
    return np.array(points, np.float64).reshape(-1, 3)


def _read(collection, attribute: str, width: int, dtype=np.float32) -> np.ndarray:
    values = np.empty(len(collection) * width, dtype)
    collection.foreach_get(attribute, values)
    return values.reshape(-1, width)


def _note_materials(thing: bpy.types.Object, found: _Evaluated) -> None:
    slots = [slot.material for slot in thing.material_slots]
    given = slots + list(getattr(thing.data, "materials", ()))  # geometry nodes set materials on the data alone
    found.materials.update(material.original.session_uid for material in given if material is not None)
    if None in slots or not any(given):
        found.bare.add(thing.original.session_uid)


AXES_AND_MORE = np.concatenate([np.eye(3), -np.eye(3), _fibonacci(300)])  # no direction is farther than 7.2 degrees from one of these


def _extremes(points: np.ndarray) -> np.ndarray:
    """Indices of the points that reach farthest in each of some hundred directions, the axes among them."""
    if len(points) <= len(AXES_AND_MORE):
        return np.arange(len(points))
    best = np.full(len(AXES_AND_MORE), -np.inf, np.float32)
    which = np.zeros(len(AXES_AND_MORE), np.int64)
    middle, axes = points.mean(0), AXES_AND_MORE.T.astype(np.float32)
    for start in range(0, len(points), 1 << 16):
        reach = (points[start : start + (1 << 16)] - middle).astype(np.float32) @ axes
        local = reach.argmax(0)
        value = np.take_along_axis(reach, local[None], 0)[0]
        better = value > best
        best[better], which[better] = value[better], local[better] + start
    return np.unique(which)


def bounding_sphere(points: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre (3,) and radius of a sphere around `points` (n, 3) within 1 % of the smallest: Badoiu and Clarkson 2003, a step towards the
    farthest point, each shorter than the last."""
    centre = (points.min(0) + points.max(0)) / 2
    for step in range(1, 1000):
        farthest = points[((points - centre) ** 2).sum(1).argmax()]
        centre = centre + (farthest - centre) / (step + 1)
    return centre, float(np.sqrt(((points - centre) ** 2).sum(1).max()))


# The temporary scene

# What a new scene must have from the user's, beside the objects, for these to evaluate as they render there.
FROM_SCENE = ("gravity", "use_gravity", "frame_start", "frame_end")
FROM_RENDER = (
    "fps", "fps_base", "hair_type", "hair_subdiv", "threads_mode", "threads",
    "use_simplify", "simplify_subdivision_render", "simplify_child_particles_render", "simplify_volumes",
)  # fmt: skip
FROM_CYCLES = (
    "feature_set", "shading_system", "dicing_rate", "dicing_camera", "max_subdivisions", "offscreen_dicing_scale",
    "texture_limit_render", "transparent_max_bounces",
)  # fmt: skip


@contextmanager
def _stage(subject: Subject, moved: dict[int, Matrix] | None = None) -> Iterator[bpy.types.Scene]:
    """A scene with the subject alone and a camera, like the user's in frame, units, simplification and forces; gone afterwards.

    `moved` moves objects, by their session_uid. Nothing may update this scene's own dependency graph: that would write the places of
    the objects in it to the user's data. Renders have theirs apart.
    """
    moved = moved or {}
    user_scene = _scene(subject)
    things = _things(subject)
    had_result = _render_result() is not None
    handlers = {name: list(getattr(bpy.app.handlers, name)) for name in RENDER_HANDLERS}
    with ExitStack() as undo:
        for name, before in handlers.items():  # other add-ons would take our renders for the user's
            getattr(bpy.app.handlers, name).clear()
            undo.callback(getattr(bpy.app.handlers, name).extend, before)
        if not had_result:
            undo.callback(lambda: _render_result() and bpy.data.images.remove(_render_result()))
        # Not a copy: Scene.copy() counts users of objects wrongly in 4.2, and would bring the user's keyed settings and markers along.
        scene = bpy.data.scenes.new("Kiln capture")
        undo.callback(_remove_scene, scene)
        scene.frame_set(user_scene.frame_current, subframe=user_scene.frame_subframe)
        scene.unit_settings.scale_length = user_scene.unit_settings.scale_length
        _carry(user_scene, scene, FROM_SCENE)
        _carry(user_scene.render, scene.render, FROM_RENDER)
        _carry(user_scene.cycles, scene.cycles, FROM_CYCLES)
        _carry(user_scene.cycles_curves, scene.cycles_curves)
        scene.view_layers[0].name = LAYER
        _link(scene, things)
        for thing in things:
            if thing.instance_type in ("VERTS", "FACES"):  # these instance their children, which must be in the scene for it
                _link(scene, thing.children_recursive)
        empties = [thing for thing in user_scene.objects if thing.type == "EMPTY" and not thing.hide_render]
        _link(scene, [empty for empty in empties if empty.field is not None and empty.field.type != "NONE"])  # forces act within a scene
        for thing in things:
            if thing.session_uid in moved:
                _move(scene, thing, moved[thing.session_uid], undo)
        camera = bpy.data.cameras.new("Kiln capture")
        undo.callback(bpy.data.cameras.remove, camera)  # and with it its object
        eye = bpy.data.objects.new("Kiln capture", camera)
        eye.rotation_mode = "QUATERNION"
        scene.collection.objects.link(eye)
        scene.camera = eye
        yield scene


def _remove_scene(scene: bpy.types.Scene) -> None:
    scene.render.use_persistent_data = False  # frees what the engine kept
    bpy.data.scenes.remove(scene)


def _carry(source, target, names=None) -> None:
    """Set the plain properties of `target` (those in `names`, or all) as `source` has them."""
    for rna in source.bl_rna.properties:
        if rna.is_readonly or rna.type == "COLLECTION" or names is not None and rna.identifier not in names:
            continue
        value = getattr(source, rna.identifier)
        if value != getattr(target, rna.identifier):
            setattr(target, rna.identifier, value)


def _render_result() -> bpy.types.Image | None:
    return next((image for image in bpy.data.images if image.type == "RENDER_RESULT"), None)


def _things(subject: Subject) -> list[bpy.types.Object]:
    known = {thing.session_uid: thing for thing in bpy.data.objects}
    if any(one not in known for one in subject.objects):
        raise KilnError(
            "subject-changed", f"{subject.title} was removed, or its removal undone.", "Select the object again and start anew."
        )
    return [known[one] for one in subject.objects]


def _scene(subject: Subject) -> bpy.types.Scene:
    found = next((scene for scene in bpy.data.scenes if scene.session_uid == subject.scene), None)
    if found is None:
        raise KilnError("subject-changed", f"The scene of {subject.title} was removed.", "Select the object again and start anew.")
    return found


def _link(scene: bpy.types.Scene, things: list[bpy.types.Object]) -> None:
    present = set(scene.collection.objects)
    for thing in things:
        if thing not in present:
            scene.collection.objects.link(thing)
            present.add(thing)


def _move(scene: bpy.types.Scene, thing: bpy.types.Object, motion: Matrix, undo: ExitStack) -> None:
    """Show an object of the scene moved, as an instance: its own place is the user's."""
    holder = bpy.data.collections.new("Kiln capture")
    undo.callback(bpy.data.collections.remove, holder)
    mover = bpy.data.objects.new("Kiln capture", None)
    undo.callback(bpy.data.objects.remove, mover)
    mover.instance_type, mover.instance_collection, mover.matrix_world = "COLLECTION", holder, motion
    scene.collection.objects.unlink(thing)
    holder.objects.link(thing)
    scene.collection.objects.link(mover)


def _common_settings(scene: bpy.types.Scene, size: int) -> None:
    render = scene.render
    render.resolution_x = render.resolution_y = size
    render.resolution_percentage = 100
    render.film_transparent = True
    render.dither_intensity = 0.0
    render.use_persistent_data = True  # only the camera moves from one view to the next
    try:
        scene.display_settings.display_device = "sRGB"
        scene.view_settings.view_transform = "Standard"
    except TypeError as error:
        raise KilnError(
            "capture-failed",
            "This Blender's colour configuration has no Standard view for sRGB.",
            "Start Blender without the OCIO environment variable.",
        ) from error
    scene.view_settings.look = "None"


def _picture_format(scene: bpy.types.Scene, file_format: str) -> None:
    settings = scene.render.image_settings
    if hasattr(settings, "media_type"):  # from 5.0 on, and before the format
        settings.media_type = "MULTI_LAYER_IMAGE" if file_format == "OPEN_EXR_MULTILAYER" else "IMAGE"
    settings.file_format = file_format
    settings.color_mode = "RGBA"
    if file_format == "PNG":
        settings.color_depth = "8"
        settings.compression = 15
    else:
        settings.color_depth = "32"
        settings.exr_codec = "NONE"  # read at once and taken away: packing costs more than it saves
        if hasattr(settings, "use_exr_interleave"):
            settings.use_exr_interleave = True


def _cycles(scene: bpy.types.Scene, samples: int, bounces: bool, filter_width: float) -> None:
    """Cycles with exactly `samples` samples a pixel, without bounces for data, with them (and then denoised) for light."""
    scene.render.engine = "CYCLES"
    cycles = scene.cycles
    # Data takes a moment on any CPU, while a GPU may first compile its kernels for minutes, inside a step that nobody can cancel.
    cycles.device = "GPU" if bounces and bpy.context.preferences.addons["cycles"].preferences.has_active_device() else "CPU"
    cycles.samples = samples
    cycles.time_limit = 0.0
    cycles.use_animated_seed = cycles.use_adaptive_sampling = cycles.use_camera_cull = cycles.use_distance_cull = False
    cycles.pixel_filter_type = "BOX" if filter_width < 0.1 else "BLACKMAN_HARRIS"
    cycles.filter_width = filter_width
    cycles.transparent_max_bounces = max(cycles.transparent_max_bounces, 64)  # leaves and hair stand many deep
    cycles.min_transparent_bounces = cycles.transparent_max_bounces  # else rays end by chance before they are through
    cycles.use_denoising = bounces
    if not bounces:
        cycles.max_bounces = 0
        cycles.use_light_tree = False  # every face that shows its colour counts as a lamp: building the tree of them takes seconds


@contextmanager
def _colors(scene: bpy.types.Scene, subject: Subject, p: recipes.Capture, evaluated: _Evaluated) -> Iterator[None]:
    """The scene set to render `p.color` into PNG files."""
    _common_settings(scene, p.size)
    _picture_format(scene, "PNG")
    with ExitStack() as undo:
        if p.color == "base_color":
            _cycles(scene, p.samples, bounces=False, filter_width=1.5)
            scene.world = undo.enter_context(_white_world())
            materials = _materials(evaluated)
            bare = [thing for thing in bpy.data.objects if thing.session_uid in evaluated.bare]
            if not materials:
                scene.view_layers[LAYER].material_override = undo.enter_context(base_color.plain(base_color.GREY))
            else:
                undo.enter_context(base_color.shown(materials, bare))
        else:
            _add_light(scene, subject)
            if p.color == "cycles":
                _cycles(scene, p.samples, bounces=True, filter_width=1.5)
            else:
                scene.render.engine = "BLENDER_EEVEE_NEXT" if bpy.app.version < (5, 0, 0) else "BLENDER_EEVEE"
                scene.eevee.taa_render_samples = p.samples
        yield


@contextmanager
def _data(scene: bpy.types.Scene, p: recipes.Capture, evaluated: _Evaluated) -> Iterator[None]:
    """The scene set to render depth, normals and material through the pixels' centres into multilayer EXR files."""
    _common_settings(scene, p.size)
    _picture_format(scene, "OPEN_EXR_MULTILAYER")
    _cycles(scene, samples=1, bounces=False, filter_width=0.01)
    scene.world = None
    layer = scene.view_layers[LAYER]
    layer.use_pass_z = True
    layer.use_pass_normal = p.geometry
    with material_passes.shown(_materials(evaluated), layer, channels=_wants_materials(p)):
        yield


def _wants_materials(p: recipes.Capture) -> bool:
    return p.materials and p.color == "base_color"  # lit pictures show no base colour that the other channels could go with


def _materials(evaluated: _Evaluated) -> list[bpy.types.Material]:
    return [material for material in bpy.data.materials if material.session_uid in evaluated.materials]


@contextmanager
def _white_world() -> Iterator[bpy.types.World]:
    """Lights what base_color cannot turn into emission (a script's shader, geometry that nodes make without a material)."""
    world = bpy.data.worlds.new("Kiln capture")
    try:
        if world.node_tree is None:
            world.use_nodes = True
        background = next(node for node in world.node_tree.nodes if node.bl_idname == "ShaderNodeBackground")
        background.inputs["Color"].default_value = (1, 1, 1, 1)
        yield world
    finally:
        bpy.data.worlds.remove(world)


def _add_light(scene: bpy.types.Scene, subject: Subject) -> None:
    """The user's lights, world, exposure and engine settings."""
    user_scene = _scene(subject)
    layer = user_scene.view_layers.get(subject.view_layer) or user_scene.view_layers[0]
    for collection in _rendered_collections(layer):
        _link(scene, [t for t in collection.objects if t.type in ("LIGHT", "LIGHT_PROBE") and not t.hide_render])
    scene.world = user_scene.world
    scene.view_settings.exposure = user_scene.view_settings.exposure
    _carry(user_scene.cycles, scene.cycles)
    _carry(user_scene.eevee, scene.eevee)


def _without_metadata(path: Path) -> None:
    """Take the texts out of a PNG file: Cycles writes render times there, and the same picture should have the same hash."""
    data = path.read_bytes()
    kept, position = [data[:8]], 8
    while position < len(data):
        (size,) = struct.unpack_from(">I", data, position)
        chunk = data[position : position + size + 12]
        if chunk[4:8] not in (b"tEXt", b"zTXt", b"iTXt", b"tIME"):
            kept.append(chunk)
        position += size + 12
    path.write_bytes(b"".join(kept))


def _shows_something(path: Path) -> bool:
    picture = bpy.data.images.load(str(path))
    try:
        values = np.empty(len(picture.pixels), np.float32)
        picture.pixels.foreach_get(values)
        return bool(values[3::4].any())
    finally:
        bpy.data.images.remove(picture)


def _render(scene: bpy.types.Scene, path: Path) -> None:
    # From 4.5 on, braces in this path stand for variables.
    scene.render.filepath = str(path) if bpy.app.version < (4, 5, 0) else str(path).replace("{", "{{").replace("}", "}}")
    path.unlink(missing_ok=True)
    try:
        outcome = bpy.ops.render.render(write_still=True, scene=scene.name)
    except RuntimeError as error:
        reason = str(error).removeprefix("Error: ").strip()
        raise KilnError("capture-failed", f"Blender could not render a view: {reason}", "Check the free space on the disk.") from error
    if "FINISHED" not in outcome or not path.is_file():
        raise KilnError("capture-failed", "Blender stopped rendering a view.", "Wait until other renders are done, and start anew.")


# The capture itself


@dataclass
class Moment:
    """The subject as it renders at one frame of the timeline. Blender units, world axes."""

    evaluated: _Evaluated
    moved: dict[int, Matrix]  # what simulation moves, by session_uid
    pose: tuple
    points: np.ndarray  # extreme points (n, 3), none where nothing of it renders

    @property
    def lowest(self) -> np.ndarray:
        return self.points.min(0)

    @property
    def highest(self) -> np.ndarray:
        return self.points.max(0)


def look(subject: Subject, shapes: bool = False) -> Moment:
    """Evaluates the subject as it renders now. `shapes`: keep all of its points."""
    with _idle(), _stage(subject) as scene:
        evaluated = _measure(scene, shapes)
        pose = _pose(subject)
    moved = _simulated_motion(subject, evaluated)
    if moved:
        with _stage(subject, moved) as scene:
            evaluated = _measure(scene, shapes)
    points = np.concatenate([np.empty((0, 3)), *evaluated.points])
    evaluated.points.clear()
    evaluated.places.clear()
    return Moment(evaluated, moved, pose, points[_extremes(points)])


class View(NamedTuple):
    """One picture to take."""

    moment: int
    direction: np.ndarray  # unit vector (3,) from the subject to the camera
    held_out: bool


class Capture:
    """Renders a subject view by view. `step()` does a little and returns whether more is to do; `finish()` returns the outcome.

    Between steps nothing of the capture is in the file. `close()` may come at any time and removes a picture that was left half done.

    steps, done: renders altogether, and so far. cameras: camera-to-world 4x4 each, OpenGL axes, metres, the held-out ones last.

    A still subject has one moment; capture_motion.MovingCapture has more, and says what differs: when they are, what its files are called.
    """

    def __init__(self, subject: Subject, p: recipes.Capture, folder: Path, seed: int = 0, like: "Capture | None" = None):
        """Evaluates the subject once as it renders, which finds its size and places the cameras; `like` another capture, from its cameras.

        Raises KilnError("bad-subject") where it has no faces or no size, "busy" while Blender renders.
        """
        fitted = directions(p.views)
        held_out = between(fitted, p.holdout, seed)
        views = [View(0, direction, held_out=False) for direction in fitted] + [View(0, direction, held_out=True) for direction in held_out]
        self._begin(subject, p, folder, views)
        self._moments = [look(subject)]
        if not len(self._moments[0].points):
            raise self._nothing_renders()
        self._place_cameras()
        if like is not None:
            self._centre, self._radius, self._views = like._centre, like._radius, like._views
            self.cameras = [self._camera(view.direction) for view in self._views]
        self._source = self._place()

    def _begin(self, subject: Subject, p: recipes.Capture, folder: Path, views: list[View]) -> None:
        """views: those of one moment follow one another."""
        self.subject, self.p, self.folder = subject, p, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if "cycles" not in bpy.context.preferences.addons:
            raise KilnError("capture-failed", "Cycles is turned off.", "Enable the add-on Cycles Render Engine in the preferences.")
        self._unit = _scene(subject).unit_settings.scale_length
        self._views, self._moments, self._shown, self.done = views, [], set(), 0
        kinds = ["color", "data"] if p.geometry or _wants_materials(p) else ["color"]
        runs = [list(numbers) for _, numbers in groupby(range(len(views)), lambda number: views[number].moment)]
        self._tasks = [(kind, number) for numbers in runs for kind in kinds for number in numbers]

    @property
    def steps(self) -> int:
        return len(self._tasks)

    def _place_cameras(self) -> None:
        """Around all that is seen at any moment."""
        points = np.concatenate([moment.points for moment in self._moments])
        self._centre, self._radius = bounding_sphere(points[_extremes(points)])
        if not np.isfinite(self._radius) or self._radius <= 1e-6 * max(1e-3, float(np.abs(self._centre).max())):
            raise KilnError("bad-subject", f"{self.subject.title} has no size: all its points lie in one place.", "Check its scale.")
        self.cameras = [self._camera(view.direction) for view in self._views]

    def step(self) -> bool:
        """Render the next view, or the next few where preparing the scene takes long beside rendering it; True while views remain."""
        if self.done == self.steps:
            return False
        try:
            self._step()
        except OSError as error:
            raise KilnError("capture-failed", f"A view cannot be written: {error}.", "Check the free space on the disk.") from error
        return self.done < self.steps

    def _step(self) -> None:
        kind, first = self._tasks[self.done]
        number = self._views[first].moment
        moment = self._moments[number]
        if kind == "data":
            self._refuse_unseen(number)
        run = takewhile(lambda task: task[0] == kind and self._views[task[1]].moment == number, self._tasks[self.done :])
        seconds, started = [], time.perf_counter()
        with _idle(), self._at(number), _stage(self.subject, moment.moved) as scene:
            if not _same_pose(_pose(self.subject), moment.pose):
                raise KilnError(
                    "subject-changed", f"{self.subject.title} moved while it was captured.", "Leave it until all views are there."
                )
            colors = kind == "color"
            prepare = _colors(scene, self.subject, self.p, moment.evaluated) if colors else _data(scene, self.p, moment.evaluated)
            with prepare:
                for _, view in run:
                    self._render_view(scene, kind, view)
                    self.done += 1
                    seconds.append(time.perf_counter() - started)
                    started += seconds[-1]
                    if _worth_a_pause(seconds):
                        break

    def finish(self) -> tuple[dict[str, Path], dict]:
        """Write transforms.json and return the job's inputs (every file by its name) and its source: a JSON map of what import_asset
        needs to place and name the result. Raises KilnError("bad-subject") if all views are empty."""
        if self.done < self.steps:
            raise RuntimeError("finish() comes after the last step()")
        for number in range(len(self._moments)):
            self._refuse_unseen(number)
        table = self._table()
        (self.folder / "transforms.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
        fingerprint, names = hashlib.sha256(), {"transforms.json": None}  # a set in order: several views may share a file
        for entry in table["frames"]:
            names |= dict.fromkeys(entry[key] for key in ("file_path", "geometry_file_path", "material_file_path") if key in entry)
            fingerprint.update((self.folder / entry["file_path"]).read_bytes())
        return {name: self.folder / name for name in names}, {**self._source, "fingerprint": fingerprint.hexdigest()}

    def close(self) -> None:
        unfinished = self.folder / "view.exr"
        if unfinished.is_file():
            unfinished.unlink()

    # What differs where there are several moments

    def _at(self, number: int) -> AbstractContextManager[None]:
        """The user's scene at a moment."""
        return nullcontext()

    def _file_name(self, kind: str, number: int) -> str:
        return f"{kind}_{number:03}" + (".png" if kind == "color" else ".npz")

    def _keep_passes(self, number: int, geometry: dict[str, np.ndarray], material: dict[str, np.ndarray]) -> None:
        if geometry:
            np.savez_compressed(self.folder / self._file_name("geometry", number), **geometry)
        if material:
            np.savez_compressed(self.folder / self._file_name("material", number), **material)

    def _entry(self, number: int) -> dict:
        """What transforms.json says of a view beside its camera."""
        entry = {"file_path": self._file_name("color", number)}
        if self.p.geometry:
            entry["geometry_file_path"] = self._file_name("geometry", number)
        if _wants_materials(self.p):
            entry["material_file_path"] = self._file_name("material", number)
        return entry

    def _nothing_renders(self) -> KilnError:
        return KilnError(
            "bad-subject",
            f"{self.subject.title} has no faces, hair or instances that render.",
            "Add some, or check the modifiers' and particles' visibility in renders.",
        )

    def _refuse_unseen(self, number: int) -> None:
        """Raises KilnError("bad-subject") if all pictures of a moment are empty."""
        if number not in self._shown:
            raise KilnError("bad-subject", f"{self.subject.title} renders as nothing: every view is empty.", SEE_NOTHING)

    # What does not

    def _camera(self, direction: np.ndarray) -> np.ndarray:
        """Camera-to-world (4, 4) in metres, as Blender will hold it in single precision."""
        place = Vector(self._centre + direction * self._distance)
        matrix = np.array(Matrix.LocRotScale(place, _looking_inwards(direction), None), np.float64)
        matrix[:3, 3] *= self._unit
        return matrix

    @property
    def _distance(self) -> float:
        return self._radius * MARGIN / math.sin(FIELD_OF_VIEW / 2)

    def _render_view(self, scene: bpy.types.Scene, kind: str, number: int) -> None:
        eye, view = scene.camera, self._views[number]
        eye.location = Vector(self._centre + view.direction * self._distance)
        eye.rotation_quaternion = _looking_inwards(view.direction)
        eye.data.sensor_fit = "HORIZONTAL"
        eye.data.angle = FIELD_OF_VIEW
        eye.data.clip_start = (self._distance - self._radius) * 0.5
        eye.data.clip_end = (self._distance + self._radius) * 2.0
        if kind == "color":
            path = self.folder / self._file_name("color", number)
            _render(scene, path)
            _without_metadata(path)
            if view.moment not in self._shown and _shows_something(path):
                self._shown.add(view.moment)
            return
        _render(scene, self.folder / "view.exr")
        channels = exr.read(self.folder / "view.exr")
        (self.folder / "view.exr").unlink()
        depth = channels[f"{LAYER}.Depth.Z"]
        there = (depth > 0) & (depth < BACKGROUND_DEPTH)
        geometry, material = {}, {}
        if self.p.geometry:
            normal = np.stack([channels[f"{LAYER}.Normal.{axis}"] for axis in "XYZ"], -1)
            normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-6)
            geometry = {
                "depth": np.where(there, depth * self._unit, 0).astype(np.float32),
                "normal": np.where(there[..., None], normal, 0).astype(np.float16),
            }
        if _wants_materials(self.p):
            material = material_passes.read(channels, LAYER, there)
        self._keep_passes(number, geometry, material)

    def _table(self) -> dict:
        size = self.p.size
        focal = size / 2 / math.tan(FIELD_OF_VIEW / 2)
        frames = [
            {
                **self._entry(number),
                "split": "holdout" if view.held_out else "train",
                "transform_matrix": matrix.tolist(),
            }
            for number, (view, matrix) in enumerate(zip(self._views, self.cameras, strict=True))
        ]
        pivot = {"pivot": self._source["pivot"]} if "pivot" in self._source else {}
        return {"w": size, "h": size, "fl_x": focal, "fl_y": focal, "cx": size / 2, "cy": size / 2, **pivot, "frames": frames}

    def _place(self) -> dict:
        """The source but for its fingerprint, as of now, which is the first moment."""
        scene, moment = _scene(self.subject), self._moments[0]
        first = _things(self.subject)[0]
        if self.subject.kind == "object":
            location, rotation, _ = first.matrix_world.decompose()
        else:
            location = Vector(((moment.lowest + moment.highest) / 2)[:2].tolist() + [float(moment.lowest[2])])
            rotation = Quaternion()
        pivot = _pivot(self.subject)
        return {
            "title": self.subject.title,
            "kind": self.subject.kind,
            "object": first.name,
            "collection": self.subject.title if self.subject.kind == "collection" else "",
            "scene": scene.name,
            "location": list(location),  # Blender units
            "rotation": list(rotation),  # quaternion, w first
            "unit_scale": self._unit,  # metres in a Blender unit
            **({"pivot": [value * self._unit for value in pivot]} if pivot is not None else {}),  # metres, world
            "dimensions": (moment.highest - moment.lowest).tolist(),  # Blender units, world axes
            "frame": scene.frame_current,
            "blender": bpy.app.version_string,
        }


def capture(subject: Subject, p: recipes.Capture, folder: Path, seed: int = 0, report=None) -> tuple[dict[str, Path], dict]:
    """All views at once. `report(done, steps)` is called after each step."""
    work = Capture(subject, p, folder, seed)
    try:
        while work.step():
            if report is not None:
                report(work.done, work.steps)
        return work.finish()
    finally:
        work.close()


def _pivot(subject: Subject) -> Vector | None:
    """The subject's own origin, world, Blender units: an object's; a collection's, from which instances of it hang; of several objects that
    of the one that they all hang from, if there is one."""
    if subject.kind == "collection":
        found = bpy.data.collections.get(subject.title)
        return found.instance_offset.copy() if found is not None else None
    roots = set()
    for thing in _things(subject):
        while thing.parent is not None:
            thing = thing.parent
        roots.add(thing)
    only = _things(subject)[0] if subject.kind == "object" else roots.pop() if len(roots) == 1 else None
    return only.matrix_world.translation.copy() if only is not None else None


def from_the_front(table: Path) -> Path:
    """Of captured views (their transforms.json) the one that shows the subject from the front, a little from the right and from above."""
    frames = json.loads(table.read_text("utf-8"))["frames"]

    def facing(frame):
        backwards = [row[2] for row in frame["transform_matrix"][:3]]  # from the subject to the camera
        return 0.45 * backwards[0] - 0.8 * backwards[1] + 0.4 * backwards[2]

    return table.parent / max(frames, key=facing)["file_path"]


def _simulated_motion(subject: Subject, evaluated: _Evaluated) -> dict[int, Matrix]:
    """From where rigid bodies and their children are without the simulation, which belongs to the user's scene, to where they are in that
    scene."""
    motions = {}
    if _scene(subject).rigidbody_world is None:
        return motions
    for thing in _things(subject):
        begun, above = evaluated.places.get(thing.session_uid), thing
        while above is not None and above.rigid_body is None:
            above = above.parent
        if above is not None and begun is not None and begun != thing.matrix_world:
            motions[thing.session_uid] = thing.matrix_world @ begun.inverted_safe()
    return motions


def _worth_a_pause(seconds: list[float]) -> bool:
    """Whether a step may end after views that took so long, the first with preparing the scene: once what it cost beyond the others is at
    most half of the whole."""
    return len(seconds) > 1 and sum(seconds) > 0.2 and sum(seconds[1:]) >= seconds[0] - min(seconds[1:])


@contextmanager
def _idle() -> Iterator[None]:
    """Refuse to start while Blender renders; leave its progress cursor alone."""
    if bpy.app.is_job_running("RENDER"):
        raise KilnError("busy", "Blender is rendering.", "Wait until the render is done, and start anew.")
    yield


def _pose(subject: Subject) -> tuple[int, float, np.ndarray]:
    """What must stay the same from view to view: the frame, and where the objects are, (n, 4, 4)."""
    scene = _scene(subject)
    places = np.array([thing.matrix_world for thing in _things(subject)], np.float32)
    return scene.frame_current, scene.frame_subframe, places


def _same_pose(one: tuple, other: tuple) -> bool:
    # A simulation's cache gives places back within single precision.
    return one[:2] == other[:2] and one[2].shape == other[2].shape and np.allclose(one[2], other[2], rtol=1e-5, atol=1e-6)
