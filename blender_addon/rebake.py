"""What a Kiln result shows, baked onto another surface: a copy of its source with the source's own UVs, or quads made of the result itself.

Cycles bakes "selected to active" in a scene of its own that holds copies alone, so that the user's scene, engine, selection and visibility
are never touched. Nothing but the finished objects stays in the file, and after an error nothing at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import bpy
import numpy as np
from mathutils import Matrix

from .protocol.errors import KilnError

DISTANCE = 0.02  # default ray distance as a share of the target's diagonal: beyond what a coarse result is off
OVERLAP = 0.02  # share of the UV area that may be used twice: touching charts and slivers, not a mirrored half
OUTSIDE = 1e-3  # UVs may lie outside the unit square by that much
DILATED = 6  # texels around each chart that repeat its edge exactly; the rest of the picture is filled smoothly
MOST_MISSED = 0.25  # share of the texels without a surface in reach above which a result is no use
ISLAND_MARGIN = 0.003  # between charts that we make ourselves, as a share of the picture

TARGETS = ("MESH", "CURVE", "SURFACE", "FONT", "META")  # objects that have, or make, a mesh
# What is baked as emission, from which sockets. Roughness and metallic lie in green and blue, as in glTF's own pictures.
SOCKETS = {"reach": (), "color": ("Base Color",), "numbers": ("Alpha", "Roughness", "Metallic"), "emission": ("Emission Color",)}

Report = Callable[[float, str], None]


def quietly(fraction: float, text: str) -> None:
    """No report."""


@dataclass
class _Maps:
    """Baked pictures, size x size each, bottom row first; None where the result has one value for all of the surface."""

    color: np.ndarray  # linear RGB
    alpha: np.ndarray | None = None
    surface: np.ndarray | None = None  # (..., 2): roughness, metallic
    normal: np.ndarray | None = None  # tangent space, as the picture holds it
    emission: np.ndarray | None = None  # linear RGB
    missed: float = 0.0  # share of the covered texels that no ray reached
    values: dict[str, object] = field(default_factory=dict)  # of the sockets that are no picture


# What operators ask for


def is_result(thing: bpy.types.Object | None) -> bool:
    """Whether an object is the mesh of an imported Kiln result."""
    if thing is None or thing.type != "MESH" or not thing.data.polygons:
        return False
    return any("kiln_job" in collection for collection in thing.users_collection) and bool(thing.data.materials)


def source_of(thing: bpy.types.Object, scene: bpy.types.Scene) -> bpy.types.Object | None:
    """The object that a result was made of, where it is still there under its name."""
    for collection in thing.users_collection:
        found = scene.objects.get(collection.get("kiln_source", ""))
        if found is not None and found != thing and found.type in TARGETS:
            return found
    return None


def retexture(
    context: bpy.types.Context,
    result: bpy.types.Object,
    target: bpy.types.Object,
    size: int = 1024,
    uv_map: str = "",
    distance: float = 0.0,
    unwrap: bool = False,
    report: Report = quietly,
) -> bpy.types.Object:
    """A copy of `target`, beside it, that wears what `result` shows, in new pictures on the copy's own UVs.

    uv_map: its name; "" is the one that renders use. distance: how far, in scene units, the two surfaces may lie apart; 0 is 2 % of the
    target's diagonal. unwrap: lay the copy's UVs out anew (Smart UV Project) instead.
    Raises KilnError("bad-target", "bad-uvs", "bake-failed"); then nothing has changed.
    """
    _refuse_what_cannot_bake(context, result)
    name = f"{target.name} retextured"
    with _all_or_nothing():
        copy = _copy(context, target, name)
        if unwrap:
            report(0.0, "Unwrapping")
            _unwrap(context, copy.data)
        here = Matrix.Translation(-result.matrix_world.translation)  # single precision: the origin is where the result is
        shape = _shape(context, copy, here @ target.matrix_world)
        if uv_map and not unwrap:
            if uv_map not in shape.uv_layers:
                raise KilnError("bad-uvs", f"{target.name} has no UV map {uv_map!r}.", "Choose another one.")
            shape.uv_layers[uv_map].active = shape.uv_layers[uv_map].active_render = True
        _refuse_uvs(shape, target.name)
        reach = distance or DISTANCE * _diagonal(shape)
        maps = _bake(context, result, here, shape, size, reach, report)
        _refuse_misses(maps, target.name)
        _dress(copy.data, _material(name, maps, _render_layer(shape).name))
        for slot in copy.material_slots:
            slot.link = "DATA"
        bpy.data.meshes.remove(shape)
        for collection in _homes(context, target):
            collection.objects.link(copy)
        copy.select_set(False)  # it was copied with the source's selection
    return copy


def remesh_quads(
    context: bpy.types.Context, result: bpy.types.Object, faces: int = 5000, size: int = 0, report: Report = quietly
) -> bpy.types.Object:
    """Gives a result about `faces` quads instead of its triangles (QuadriFlow), with UVs and pictures of its own, and returns it.

    size: of the new pictures; 0 is that of the result's. The triangles come back by undo.
    Raises KilnError("bad-target", "quads-failed" or "bake-failed"); then the result keeps its triangles.
    """
    _refuse_what_cannot_bake(context, result)
    if "kiln_motion" in result:
        raise KilnError("bad-target", f"{result.name} moves, and its quads would stand still.", "Remesh a result that stands still.")
    size = size or max((image.size[0] for image in _images(result)), default=1024)
    with _all_or_nothing():
        report(0.0, "Finding quads")
        quads = _quads(context, result, faces)
        report(0.4, "Unwrapping")
        _unwrap(context, quads)
        shape = quads.copy()
        here = result.matrix_world.inverted_safe()
        maps = _bake(context, result, here, shape, size, DISTANCE * _diagonal(shape), lambda part, text: report(0.5 + part / 2, text))
        _refuse_misses(maps, result.name)
        bpy.data.meshes.remove(shape)
        name, triangles = result.data.materials[0].name, result.data
        pictures, materials = _images(result), list(triangles.materials)
        _dress(quads, _material(name, maps, quads.uv_layers[0].name))
        result.data = quads  # last of what can fail: the object would go with its mesh
        for kind, given in ((bpy.data.meshes, [triangles]), (bpy.data.materials, materials), (bpy.data.images, pictures)):
            for one in given:
                if not one.use_fake_user and not bpy.data.user_map(subset=[one])[one]:  # `users` counts wrongly in 4.2
                    kind.remove(one)  # undo brings it back; its name is free now
        quads.name, quads.materials[0].name = f"{name} mesh", name
        for picture in _images(result):
            picture.name = re.sub(r"\.\d{3}$", "", picture.name)
    return result


# Refusals


def _refuse_what_cannot_bake(context: bpy.types.Context, result: bpy.types.Object) -> None:
    if context.mode != "OBJECT":
        raise KilnError("bad-target", "Baking needs Object Mode.", "Leave the mode that you are in.")
    if "cycles" not in context.preferences.addons:
        raise KilnError("bake-failed", "Cycles is turned off, which bakes.", "Enable the add-on Cycles Render Engine in the preferences.")
    if any(bpy.app.is_job_running(name) for name in ("RENDER", "OBJECT_BAKE")):
        raise KilnError("busy", "Blender is rendering.", "Wait until the render is done.")
    if any(_principled(material) is None for material in result.data.materials):
        raise KilnError("bad-target", f"{result.name} has a material without a Principled BSDF.", "Import the result again.")


def _refuse_uvs(shape: bpy.types.Mesh, name: str) -> None:
    again = "Choose another UV map, or turn on Unwrap, which lays the copy's UVs out anew."
    if not shape.polygons:
        raise KilnError("bad-target", f"{name} has no faces.", "Choose a mesh.")
    if not shape.uv_layers:
        raise KilnError("bad-uvs", f"{name} has no UVs.", "Unwrap it, or turn on Unwrap, which does that on the copy.")
    layer = _render_layer(shape)
    corners = triangles_in_uv(shape, layer)
    if not np.isfinite(corners).all() or corners.min() < -OUTSIDE or corners.max() > 1 + OUTSIDE:
        words = f"The UV map {layer.name} of {name} reaches from {corners.min():.2f} to {corners.max():.2f}: a picture covers 0 to 1."
        raise KilnError("bad-uvs", words, again)
    count = coverage(corners, 512)
    if not count.any():
        raise KilnError("bad-uvs", f"The UV map {layer.name} of {name} covers nothing.", again)
    twice = (count > 1).sum() / (count > 0).sum()
    if twice > OVERLAP:
        words = f"The UV map {layer.name} of {name} uses {twice:.0%} of its area more than once, so that parts would share one colour."
        raise KilnError("bad-uvs", words, again)


def _refuse_misses(maps: _Maps, name: str) -> None:
    if maps.missed > MOST_MISSED:
        words = f"{maps.missed:.0%} of the surface of {name} has no result within the ray distance."
        raise KilnError("bake-failed", words, "Raise the ray distance, or check that result and object lie in the same place.")


def _render_layer(shape: bpy.types.Mesh) -> bpy.types.MeshUVLoopLayer:
    return next(layer for layer in shape.uv_layers if layer.active_render)


def triangles_in_uv(shape: bpy.types.Mesh, layer: bpy.types.MeshUVLoopLayer) -> np.ndarray:
    """(triangles, 3, 2)."""
    uv = np.empty(len(shape.loops) * 2, np.float32)
    layer.uv.foreach_get("vector", uv)
    shape.calc_loop_triangles()
    loops = np.empty(len(shape.loop_triangles) * 3, np.int32)
    shape.loop_triangles.foreach_get("loops", loops)
    return uv.reshape(-1, 2)[loops].reshape(-1, 3, 2)


def coverage(corners: np.ndarray, size: int) -> np.ndarray:
    """How many of the UV triangles (n, 3, 2) hold each texel's centre: (size, size), bottom row first."""
    count = np.zeros((size, size), np.int32)
    points = corners.astype(np.float64) * size - 0.5  # so that pixel centres are whole numbers
    edges = np.roll(points, -1, 1) - points
    area = edges[:, 0, 0] * edges[:, 1, 1] - edges[:, 0, 1] * edges[:, 1, 0]
    keep = np.abs(area) > 1e-9
    points, edges, area = points[keep], edges[keep], area[keep]
    low = np.clip(np.ceil(points.min(1)), 0, size).astype(np.int64)
    high = np.clip(np.floor(points.max(1)) + 1, 0, size).astype(np.int64)
    extent = np.maximum(high - low, 0)
    pixels = extent.prod(1)
    order = np.flatnonzero(pixels)
    at = 0
    while at < len(order):  # so many triangles at once that their boxes hold four million pixels
        taken = max(1, int(np.searchsorted(np.cumsum(pixels[order[at:]]), 4_000_000)))
        chunk = order[at : at + taken]
        at += taken
        which = np.repeat(chunk, pixels[chunk])
        local = np.arange(len(which)) - np.repeat(np.cumsum(pixels[chunk]) - pixels[chunk], pixels[chunk])
        x, y = low[which, 0] + local % extent[which, 0], low[which, 1] + local // extent[which, 0]
        inside = np.ones(len(which), bool)
        for corner in range(3):
            start, edge = points[which, corner], edges[which, corner]
            side = edge[:, 0] * (y - start[:, 1]) - edge[:, 1] * (x - start[:, 0])
            inside &= side * np.sign(area[which]) > 1e-9 * np.abs(area[which])  # a centre on a shared edge counts for neither
        np.add.at(count, (y[inside], x[inside]), 1)
    return count


# Shapes


@contextmanager
def _all_or_nothing() -> Iterator[None]:
    """After an error nothing that was made stays in the file."""
    kinds = ("objects", "meshes", "materials", "images", "scenes")
    before = {kind: set(getattr(bpy.data, kind)) for kind in kinds}
    try:
        yield
    except Exception as error:
        for kind, known in before.items():
            for made in set(getattr(bpy.data, kind)) - known:
                getattr(bpy.data, kind).remove(made)
        if isinstance(error, KilnError):
            raise
        reason = str(error).removeprefix("Error: ").strip()
        raise KilnError("bake-failed", f"Blender could not bake: {reason}", "Check the mesh, then try again.") from error


def _copy(context: bpy.types.Context, target: bpy.types.Object, name: str) -> bpy.types.Object:
    """A copy with data of its own, in no collection yet; of what is no mesh, the mesh that it makes."""
    if target.type == "MESH":
        copy = target.copy()
        copy.data = target.data.copy()
    else:
        shape = bpy.data.meshes.new_from_object(target.evaluated_get(context.evaluated_depsgraph_get()))
        copy = bpy.data.objects.new(name, shape)
        copy.matrix_world = target.matrix_world
    copy.name = copy.data.name = name
    return copy


def _shape(context: bpy.types.Context, copy: bpy.types.Object, place: Matrix) -> bpy.types.Mesh:
    """The mesh of an object that is in no scene, with its modifiers, in the world where it stands at `place`."""
    if not copy.modifiers:
        shape = copy.data.copy()
    else:
        scene = bpy.data.scenes.new("Kiln bake")
        try:
            scene.collection.objects.link(copy)
            with context.temp_override(scene=scene, view_layer=scene.view_layers[0]):
                graph = context.evaluated_depsgraph_get()
            shape = bpy.data.meshes.new_from_object(copy.evaluated_get(graph), preserve_all_data_layers=True, depsgraph=graph)
        finally:
            bpy.data.scenes.remove(scene)
    shape.transform(place)
    if place.determinant() < 0:
        shape.flip_normals()
    return shape


def _homes(context: bpy.types.Context, thing: bpy.types.Object) -> list[bpy.types.Collection]:
    """The collections that hold an object and can hold another; the scene's own where there are none."""
    branches = [context.scene.collection, *context.scene.collection.children_recursive]
    return [home for home in branches if thing.name in home.objects and home.is_editable] or [context.scene.collection]


def _diagonal(shape: bpy.types.Mesh) -> float:
    points = _points(shape)
    return float(np.linalg.norm(points.max(0) - points.min(0)))


def _points(shape: bpy.types.Mesh) -> np.ndarray:
    points = np.empty(len(shape.vertices) * 3, np.float32)
    shape.vertices.foreach_get("co", points)
    return points.reshape(-1, 3)


def _quads(context: bpy.types.Context, result: bpy.types.Object, faces: int) -> bpy.types.Mesh:
    """A new mesh of quads over the result's surface, in its frame."""
    shape = _welded(result.data)
    kept = "The result keeps its triangles. Another number of faces may work."
    with _stage(context, [shape]):
        try:
            outcome = bpy.ops.object.quadriflow_remesh(mode="FACES", target_faces=faces, use_mesh_symmetry=False)
        except RuntimeError as error:
            reason = str(error).removeprefix("Error: ").strip()
            raise KilnError("quads-failed", f"QuadriFlow cannot remesh {result.name}: {reason}", kept) from error
    sides = np.empty(len(shape.polygons), np.int32)
    shape.polygons.foreach_get("loop_total", sides)
    if "FINISHED" not in outcome or not len(sides) or (sides == 4).mean() < 0.9:
        raise KilnError("quads-failed", f"QuadriFlow found no quads for {result.name}.", kept)
    shape.polygons.foreach_set("use_smooth", np.ones(len(sides), bool))
    return shape


def _welded(given: bpy.types.Mesh) -> bpy.types.Mesh:
    """The bare surface: vertices in one place, which glTF splits along the charts, are one; faces that lose their area by that go."""
    given.calc_loop_triangles()
    corners = np.empty(len(given.loop_triangles) * 3, np.int32)
    given.loop_triangles.foreach_get("vertices", corners)
    points, number = np.unique(_points(given), axis=0, return_inverse=True)
    faces = number.reshape(-1)[corners].reshape(-1, 3)
    faces = faces[(faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])]
    shape = bpy.data.meshes.new(given.name)
    shape.vertices.add(len(points))
    shape.vertices.foreach_set("co", points.ravel())
    shape.loops.add(faces.size)
    shape.loops.foreach_set("vertex_index", faces.astype(np.int32).ravel())
    shape.polygons.add(len(faces))
    shape.polygons.foreach_set("loop_start", np.arange(0, faces.size, 3, dtype=np.int32))
    shape.update(calc_edges=True)
    return shape


def _unwrap(context: bpy.types.Context, shape: bpy.types.Mesh) -> None:
    """Smart UV Project on all faces, into a map that becomes the active one."""
    layer = shape.uv_layers.new(name="Kiln UVs")
    layer.active = layer.active_render = True
    shape.polygons.foreach_set("select", np.ones(len(shape.polygons), bool))
    shape.polygons.foreach_set("hide", np.zeros(len(shape.polygons), bool))
    with _stage(context, [shape]) as (thing,):
        with context.temp_override(edit_object=thing):
            bpy.ops.object.mode_set(mode="EDIT")
            try:
                bpy.ops.mesh.select_all(action="SELECT")
                bpy.ops.uv.smart_project(angle_limit=1.15, island_margin=ISLAND_MARGIN)
            finally:
                bpy.ops.object.mode_set(mode="OBJECT")


@contextmanager
def _stage(context: bpy.types.Context, shapes: list[bpy.types.Mesh]) -> Iterator[list[bpy.types.Object]]:
    """A scene that holds the meshes alone, as the context of operators; the first is active. Scene and objects are gone afterwards."""
    scene = bpy.data.scenes.new("Kiln bake")
    things = [bpy.data.objects.new("Kiln bake", shape) for shape in shapes]
    try:
        layer = scene.view_layers[0]
        for thing in things:
            scene.collection.objects.link(thing)
            thing.select_set(True, view_layer=layer)
        layer.objects.active = things[0]
        with context.temp_override(
            scene=scene, view_layer=layer, collection=scene.collection, object=things[0], active_object=things[0], edit_object=None,
            selected_objects=things, selected_editable_objects=things,
        ):  # fmt: skip
            yield things
    finally:
        for thing in things:
            bpy.data.objects.remove(thing)
        bpy.data.scenes.remove(scene)


# Materials


def _principled(material: bpy.types.Material | None) -> bpy.types.Node | None:
    if material is None or material.node_tree is None:
        return None
    return next((node for node in material.node_tree.nodes if node.bl_idname == "ShaderNodeBsdfPrincipled"), None)


def _images(thing: bpy.types.Object) -> list[bpy.types.Image]:
    nodes = [node for material in thing.data.materials if material and material.node_tree for node in material.node_tree.nodes]
    return [node.image for node in nodes if node.bl_idname == "ShaderNodeTexImage" and node.image is not None]


def _emitting(material: bpy.types.Material, sockets: tuple[str, ...]) -> bpy.types.Material:
    """A copy that gives off what feeds a colour socket of its Principled BSDF, three number sockets as red, green and blue, or white."""
    copy = material.copy()
    shader, tree = _principled(copy), copy.node_tree
    emission = tree.nodes.new("ShaderNodeEmission")
    if not sockets:
        emission.inputs["Color"].default_value = (1, 1, 1, 1)
    elif len(sockets) == 1:
        _feed(tree, shader.inputs[sockets[0]], emission.inputs["Color"])
    else:
        mixed = tree.nodes.new("ShaderNodeCombineColor")
        for name, into in zip(sockets, mixed.inputs):
            _feed(tree, shader.inputs[name], into)
        tree.links.new(mixed.outputs[0], emission.inputs["Color"])
    output = tree.get_output_node("CYCLES") or tree.nodes.new("ShaderNodeOutputMaterial")
    tree.links.new(emission.outputs[0], output.inputs["Surface"])
    return copy


def _feed(tree: bpy.types.NodeTree, given: bpy.types.NodeSocket, into: bpy.types.NodeSocket) -> None:
    if given.is_linked:
        tree.links.new(given.links[0].from_socket, into)
    else:
        into.default_value = given.default_value


# Baking


def _bake(
    context: bpy.types.Context, result: bpy.types.Object, here: Matrix, shape: bpy.types.Mesh, size: int, reach: float, report: Report
) -> _Maps:
    """Bakes what `result` shows onto `shape`, a mesh with a render UV map in the frame that `here` takes the world to."""
    shaders = [_principled(material) for material in result.data.materials]

    def pictured(name: str) -> bool:
        """Whether a socket needs a picture: fed by a texture, or another value in each material."""
        inputs = [shader.inputs[name] for shader in shaders]
        plain = [tuple(one.default_value) if one.type in ("RGBA", "VECTOR") else one.default_value for one in inputs]
        return any(one.is_linked for one in inputs) or len(set(plain)) > 1

    wanted = {
        "color": True,
        "numbers": any(pictured(name) for name in ("Roughness", "Metallic", "Alpha")),
        "emission": pictured("Emission Color"),
        "normal": any(shader.inputs["Normal"].is_linked for shader in shaders),
    }
    steps = ["reach", *(name for name, needed in wanted.items() if needed)]
    if "kiln_motion" in result:  # as it stands at this frame, where the target stands too
        source = bpy.data.meshes.new_from_object(result.evaluated_get(context.evaluated_depsgraph_get()))
    else:
        source = result.data.copy()
    source.transform(here @ result.matrix_world)
    shape.materials.clear()
    picture = bpy.data.images.new("Kiln bake", size, size, alpha=True, float_buffer=True, is_data=True)
    holder = _holding(picture)
    shape.materials.append(holder)
    originals = list(source.materials)
    baked: dict[str, np.ndarray] = {}
    try:
        with _stage(context, [shape, source]):
            scene = context.scene
            scene.render.engine = "CYCLES"
            cycles = scene.cycles
            cycles.device, cycles.samples, cycles.max_bounces = "CPU", 1, 0
            cycles.use_adaptive_sampling = cycles.use_denoising = cycles.use_light_tree = False
            for number, name in enumerate(steps):
                report(number / len(steps), f"Baking {name}")
                sockets = SOCKETS.get(name)
                shown = originals if sockets is None else [_emitting(material, sockets) for material in originals]
                for index, material in enumerate(shown):
                    source.materials[index] = material
                try:
                    bpy.ops.object.bake(
                        type="NORMAL" if sockets is None else "EMIT", normal_space="TANGENT", use_selected_to_active=True,
                        cage_extrusion=reach, max_ray_distance=2 * reach, margin=0, use_clear=True, target="IMAGE_TEXTURES",
                        save_mode="INTERNAL",
                    )  # fmt: skip
                finally:
                    for index, material in enumerate(originals):
                        source.materials[index] = material
                    for material in shown if sockets is not None else ():
                        bpy.data.materials.remove(material)
                texels = np.empty(size * size * 4, np.float32)
                picture.pixels.foreach_get(texels)
                baked[name] = texels.reshape(size, size, 4)
    finally:
        for made, kind in ((picture, bpy.data.images), (holder, bpy.data.materials), (source, bpy.data.meshes)):
            kind.remove(made)
    reached = baked["reach"][..., 0] > 0.5  # alpha is 1 for rays that met nothing, too
    covered = coverage(triangles_in_uv(shape, _render_layer(shape)), size) > 0
    maps = _Maps(color=filled(baked["color"][..., :3], reached), missed=float((covered & ~reached).sum() / max(covered.sum(), 1)))
    for name in ("Roughness", "Metallic", "Alpha", "Emission Color", "Emission Strength"):
        value = shaders[0].inputs[name].default_value
        maps.values[name] = value if isinstance(value, float) else tuple(value)
    if wanted["numbers"]:
        numbers = filled(baked["numbers"][..., :3], reached)
        maps.alpha = numbers[..., 0] if pictured("Alpha") else None
        maps.surface = numbers[..., 1:] if pictured("Roughness") or pictured("Metallic") else None
    if wanted["emission"]:
        maps.emission = filled(baked["emission"][..., :3], reached)
    if wanted["normal"]:
        maps.normal = filled(baked["normal"][..., :3], reached)
    report(1.0, "Baked")
    return maps


def filled(picture: np.ndarray, known: np.ndarray) -> np.ndarray:
    """`picture` (h, w, c) with its unknown texels made from the known ones (h, w): near ones from their neighbours, the rest smoothly, so
    that neither a bilinear lookup nor a smaller mip level meets a hole."""
    picture, known = np.where(known[..., None], picture, 0).astype(np.float32), known.copy()
    if not known.any() or known.all():
        return picture
    for _ in range(DILATED):
        total, count = np.zeros_like(picture), np.zeros(known.shape, np.float32)
        padded, weight = np.pad(picture, ((1, 1), (1, 1), (0, 0))), np.pad(known.astype(np.float32), 1)
        for y in range(3):
            for x in range(3):
                window = (slice(y, y + known.shape[0]), slice(x, x + known.shape[1]))
                total += padded[window]
                count += weight[window]
        new = ~known & (count > 0)
        picture[new] = total[new] / count[new, None]
        known |= new
    return _pulled(picture, known.astype(np.float32))


def _pulled(picture: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Push-pull: what is unknown takes the value of the next coarser picture, in which more is known."""
    if weight.all() or min(weight.shape) < 2:
        return picture
    h, w = (-(-side // 2) * 2 for side in weight.shape)
    pad = ((0, h - weight.shape[0]), (0, w - weight.shape[1]))
    sums = np.pad(picture * weight[..., None], (*pad, (0, 0))).reshape(h // 2, 2, w // 2, 2, -1).sum((1, 3))
    counts = np.pad(weight, pad).reshape(h // 2, 2, w // 2, 2).sum((1, 3))
    coarse = _pulled(sums / np.maximum(counts, 1e-6)[..., None], (counts > 0).astype(np.float32))
    fine = coarse.repeat(2, 0).repeat(2, 1)[: weight.shape[0], : weight.shape[1]]
    return np.where(weight[..., None] > 0, picture, fine)


# What comes of it


def _holding(picture: bpy.types.Image) -> bpy.types.Material:
    """A material whose active node is the picture to bake into."""
    material = bpy.data.materials.new("Kiln bake")
    _with_nodes(material)
    node = material.node_tree.nodes.new("ShaderNodeTexImage")
    node.image = picture
    material.node_tree.nodes.active = node
    return material


def _with_nodes(material: bpy.types.Material) -> None:
    if material.node_tree is None or bpy.app.version < (5, 0, 0):
        material.use_nodes = True


def _dress(shape: bpy.types.Mesh, material: bpy.types.Material) -> None:
    shape.materials.clear()
    shape.materials.append(material)
    shape.polygons.foreach_set("material_index", np.zeros(len(shape.polygons), np.int32))
    shape.update()


def _picture(name: str, values: np.ndarray, alpha: np.ndarray | None, is_data: bool) -> bpy.types.Image:
    """A packed 8-bit picture of values (h, w, 3) as they are to be stored."""
    size = len(values)
    image = bpy.data.images.new(name, size, size, alpha=alpha is not None, is_data=is_data)
    opaque = np.ones((size, size), np.float32)
    stored = np.dstack([values, opaque if alpha is None else alpha]).astype(np.float32)
    image.pixels.foreach_set(np.clip(stored, 0, 1).ravel())
    image.pack()
    return image


def _encoded(linear: np.ndarray) -> np.ndarray:
    """sRGB."""
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _material(name: str, maps: _Maps, uv_map: str) -> bpy.types.Material:
    """Principled BSDF fed by the maps, as the glTF importer and exporter lay it out."""
    material = bpy.data.materials.new(name)
    _with_nodes(material)
    tree = material.node_tree
    tree.nodes.clear()
    shader, output = tree.nodes.new("ShaderNodeBsdfPrincipled"), tree.nodes.new("ShaderNodeOutputMaterial")
    output.location = (300, 0)
    tree.links.new(shader.outputs[0], output.inputs["Surface"])
    for socket, value in maps.values.items():
        shader.inputs[socket].default_value = value
    place = tree.nodes.new("ShaderNodeUVMap")
    place.uv_map, place.location = uv_map, (-1100, 0)

    def shown(label: str, values: np.ndarray, y: float, alpha: np.ndarray | None = None, is_data: bool = False) -> bpy.types.Node:
        node = tree.nodes.new("ShaderNodeTexImage")
        node.image, node.location = _picture(f"{name} {label}", values, alpha, is_data), (-800, y)
        tree.links.new(place.outputs[0], node.inputs["Vector"])
        return node

    base = shown("base color", _encoded(maps.color), 400, maps.alpha)
    tree.links.new(base.outputs["Color"], shader.inputs["Base Color"])
    if maps.alpha is not None:
        tree.links.new(base.outputs["Alpha"], shader.inputs["Alpha"])
    if maps.surface is not None:
        numbers = shown("roughness metallic", np.dstack([np.ones_like(maps.surface[..., :1]), maps.surface]), 100, is_data=True)
        parts = tree.nodes.new("ShaderNodeSeparateColor")
        parts.location = (-400, 100)
        tree.links.new(numbers.outputs["Color"], parts.inputs[0])
        tree.links.new(parts.outputs["Green"], shader.inputs["Roughness"])
        tree.links.new(parts.outputs["Blue"], shader.inputs["Metallic"])
    if maps.normal is not None:
        bumps = tree.nodes.new("ShaderNodeNormalMap")
        bumps.uv_map, bumps.location = uv_map, (-400, -500)
        tree.links.new(shown("normal", maps.normal, -500, is_data=True).outputs["Color"], bumps.inputs["Color"])
        tree.links.new(bumps.outputs[0], shader.inputs["Normal"])
    if maps.emission is not None:
        glow = shown("emission", _encoded(maps.emission), -200)
        tree.links.new(glow.outputs["Color"], shader.inputs["Emission Color"])
    return material
