"""Gaussian splats as a Blender object: a mesh of bare vertices with attributes, and a geometry-nodes modifier that shows each as what it
is, a Gaussian. Everything else in Blender (crop, move, join, select, colour) then works on them as on any points.

Attributes: `scale` (standard deviations along the splat's axes), `rotation` (quaternion), `color` (linear, as seen from all sides on
average), `opacity`, and `sh_1` to `sh_15` (spherical harmonics of degree 1 to 3, red green blue, where the splats have them). All in the
object's own frame and in Blender units.

How a splat is drawn: the modifier puts one low-poly sphere on each vertex, scaled and turned to the ellipsoid at which the Gaussian has
faded to 1/255. The shader transforms the line of sight into that sphere's own space, where the Gaussian is round: the alpha of a line that
passes the centre at d standard deviations is `opacity exp(-d^2 / 2)`, the peak along the line. Affine maps keep lines and their order, so
this holds under any object transform, with no camera in the set-up; 3D Gaussian Splatting (Kerbl et al. 2023, eq. 5) differs by its
affine approximation of perspective, which is nothing for small splats.

What stays different from viewers of splats: Blender adds up light, they add up sRGB values, so edges between bright and dark splats come
out lighter here; and it meets splats in the order of their near sides, they in that of their centres. Both are Blender's own.
"""

from __future__ import annotations

import bpy
import numpy as np

from . import splat_files
from .splat_files import Points

NAME = "Kiln splats"  # of the node group and of the materials, made once a file
LEAST_ALPHA = 1 / 255  # what 3D Gaussian Splatting itself leaves out
# Through transparent surfaces, two a splat. With fewer at most Cycles darkens splats (with 32 still in lines along their silhouettes); with
# fewer at least it ends rays by chance (Russian roulette), and even colours come out grainy.
BOUNCES = 64
EASY = 200_000  # splats that a viewport still turns smoothly; of more, it shows a share


def make_object(name: str, points: Points) -> bpy.types.Object:
    """A new object that holds and shows splats given in its own frame. It is in no collection yet."""
    mesh = bpy.data.meshes.new(name)
    mesh.vertices.add(len(points))
    mesh.vertices.foreach_set("co", points.means.astype(np.float32).ravel())
    rgba = np.concatenate([_linear(points.colors), np.ones((len(points), 1), np.float32)], 1)
    attributes = [
        ("scale", "FLOAT_VECTOR", "vector", points.scales),
        ("rotation", "QUATERNION", "value", points.quaternions),
        ("color", "FLOAT_COLOR", "color", rgba),
        ("opacity", "FLOAT", "value", points.opacities),
    ]
    attributes += [(f"sh_{i + 1}", "FLOAT_VECTOR", "vector", points.harmonics[:, i]) for i in range(points.harmonics.shape[1])]
    for attribute, kind, field, values in attributes:
        data = mesh.attributes.new(attribute, kind, "POINT").data
        data.foreach_set(field, np.ascontiguousarray(values, np.float32).ravel())
    mesh.color_attributes.active_color_name = "color"
    mesh.materials.append(_material(points.degree))
    mesh.update()
    thing = bpy.data.objects.new(name, mesh)
    modifier = thing.modifiers.new("Splats", "NODES")
    modifier.node_group = _node_group(points.degree)
    if len(points) > EASY:
        _set(modifier, "Viewport Share", EASY / len(points))
    return thing


def is_splats(thing: bpy.types.Object) -> bool:
    """Whether the object holds splats as `make_object` makes them, edited or not."""
    wanted = {"scale", "rotation", "color", "opacity"}
    return thing.type == "MESH" and wanted <= set(thing.data.attributes.keys()) and _display(thing) is not None


def advice(scene: bpy.types.Scene) -> str:
    """A sentence where the scene's render settings would not show splats as they are, else nothing. The settings are the user's."""
    if scene.render.engine != "CYCLES":
        return ""
    most, least = scene.cycles.transparent_max_bounces, scene.cycles.min_transparent_bounces
    if most < BOUNCES:
        return f"{most} transparent bounces darken splats in Cycles: set {BOUNCES}, here or in Light Paths."
    if least < BOUNCES:
        return f"Splats come out grainy in Cycles: set at least {BOUNCES} transparent bounces, here or in Sampling > Advanced."
    return ""


def points_of(thing: bpy.types.Object, context: bpy.types.Context | None = None) -> Points:
    """The splats of an object as they are now: after edits, modifiers and the object's transform, in world metres.

    Raises KilnError("bad-splats") where it holds none. The user's object, mode and selection are not touched.
    """
    context = context or bpy.context
    if not is_splats(thing):
        raise splat_files.bad(f"{thing.name} does not hold splats.", "Select splats that Kiln made or imported.")
    if thing.mode == "EDIT":
        thing.update_from_editmode()
    # A copy without the display, in a scene of its own: hidden objects are evaluated there too.
    scene, copy, mesh = bpy.data.scenes.new("Kiln splats"), thing.copy(), thing.data.copy()
    try:
        copy.data = mesh
        copy.modifiers.remove(_display(copy))
        copy.hide_viewport = False
        scene.frame_set(context.scene.frame_current)
        scene.collection.objects.link(copy)
        layer = scene.view_layers[0]
        layer.update()
        with context.temp_override(scene=scene, view_layer=layer):
            evaluated = copy.evaluated_get(layer.depsgraph)
            points = _points(evaluated.to_mesh(), thing.name)
            world = np.array(evaluated.matrix_world, np.float64)
            evaluated.to_mesh_clear()
    finally:
        bpy.data.objects.remove(copy)
        bpy.data.meshes.remove(mesh)
        bpy.data.scenes.remove(scene)
    metres = context.scene.unit_settings.scale_length
    for i, axis in enumerate("XYZ"):
        if _get(_display(thing), f"Mirror {axis}"):
            mirror = np.diag([-1.0 if k == i else 1.0 for k in range(3)])
            points = splat_files.joined(points, splat_files.transformed(points, mirror, np.zeros(3)))
    return splat_files.transformed(points, world[:3, :3] * metres, world[:3, 3] * metres)


def _points(mesh: bpy.types.Mesh, name: str) -> Points:
    count = len(mesh.vertices)
    if not count:
        raise splat_files.bad(f"{name} has no splats left.", "Undo what removed them.")

    def values(attribute: str, field: str, width: int) -> np.ndarray:
        found = mesh.attributes.get(attribute)
        if found is None or found.domain != "POINT":
            raise splat_files.bad(f"{name} has lost its attribute {attribute!r}.", "Undo what removed it.")
        flat = np.empty(count * width, np.float32)
        found.data.foreach_get(field, flat)
        return flat.reshape(count, width)

    means = np.empty(count * 3, np.float32)
    mesh.vertices.foreach_get("co", means)
    bases = next((i for i in range(15) if f"sh_{i + 1}" not in mesh.attributes), 15)
    bases = max(known for known in (0, 3, 8, 15) if known <= bases)
    harmonics = [values(f"sh_{i + 1}", "vector", 3) for i in range(bases)]
    quaternions = values("rotation", "value", 4)
    return Points(
        means=means.reshape(count, 3).astype(np.float64),
        scales=np.abs(values("scale", "vector", 3)),
        quaternions=quaternions / np.maximum(np.linalg.norm(quaternions, axis=1, keepdims=True), 1e-12),
        colors=_encoded(values("color", "color", 4)[:, :3]),
        opacities=np.clip(values("opacity", "value", 1)[:, 0], 0, 1),
        harmonics=np.stack(harmonics, 1) if bases else np.zeros((count, 0, 3), np.float32),
    )


def _linear(srgb: np.ndarray) -> np.ndarray:
    """Continued as it is at 0 and 1, so that harmonics that need more than [0, 1] keep it."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((np.maximum(srgb, 0) + 0.055) / 1.055) ** 2.4).astype(np.float32)


def _encoded(linear: np.ndarray) -> np.ndarray:
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055).astype(np.float32)


def _display(thing: bpy.types.Object) -> bpy.types.Modifier | None:
    """The modifier that shows the splats."""
    return next((m for m in thing.modifiers if m.type == "NODES" and m.node_group and m.node_group.name.startswith(NAME)), None)


def _socket(modifier: bpy.types.Modifier, name: str) -> str | None:
    """The identifier of the input with that name; None in files from before it was there."""
    entries = modifier.node_group.interface.items_tree
    return next((entry.identifier for entry in entries if entry.item_type == "SOCKET" and entry.name == name), None)


def _set(modifier: bpy.types.Modifier, name: str, value: float | bool) -> None:
    identifier = _socket(modifier, name)
    if hasattr(modifier, "properties"):  # Blender 5.2
        getattr(modifier.properties.inputs, identifier).value = value
    else:
        modifier[identifier] = value


def _get(modifier: bpy.types.Modifier, name: str) -> float | bool:
    identifier = _socket(modifier, name)
    if identifier is None:
        return False
    if hasattr(modifier, "properties"):
        return getattr(modifier.properties.inputs, identifier).value
    return modifier.get(identifier, False)


# The node group


def _name(degree: int) -> str:
    return f"{NAME} {degree}" if degree else NAME


def _node_group(degree: int) -> bpy.types.NodeTree:
    """Vertices with attributes -> one sphere each, in the ellipsoid at which the splat has faded away."""
    group = bpy.data.node_groups.get(_name(degree))
    if group is not None:
        return group
    group = bpy.data.node_groups.new(_name(degree), "GeometryNodeTree")
    group.is_modifier = True
    interface = group.interface
    interface.new_socket("Geometry", in_out="INPUT", socket_type="NodeSocketGeometry")

    def number(name: str, value: float, least: float, most: float, description: str) -> None:
        socket = interface.new_socket(name, in_out="INPUT", socket_type="NodeSocketFloat")
        socket.default_value, socket.min_value, socket.max_value, socket.description = value, least, most, description
        if most == 1:
            socket.subtype = "FACTOR"

    number("Size", 1.0, 0.0, 10.0, "Of the splats, beside their own")
    number("Least Opacity", 0.0, 0.0, 1.0, "Splats that are more transparent are not shown")
    number("Viewport Share", 1.0, 0.0, 1.0, "Of the splats that viewports show; renders show all")
    solid = interface.new_socket("Solid", in_out="INPUT", socket_type="NodeSocketBool")
    solid.description = "Show opaque ellipsoids of 1.5 standard deviations: quick, and the same in every engine"
    for axis in "XYZ":
        mirror = interface.new_socket(f"Mirror {axis}", in_out="INPUT", socket_type="NodeSocketBool")
        mirror.description = "Also show the splats mirrored at the object's origin. A Mirror modifier moves splats, but does not turn them"
    detail = interface.new_socket("Detail", in_out="INPUT", socket_type="NodeSocketInt")
    detail.default_value, detail.min_value, detail.max_value = 2, 1, 5
    detail.description = "Subdivisions of each ellipsoid; more only rounds the edges of solid ones"
    interface.new_socket("Geometry", in_out="OUTPUT", socket_type="NodeSocketGeometry")

    nodes, link = group.nodes, group.links.new

    def node(kind: str, x: float, y: float, **properties) -> bpy.types.Node:
        made = nodes.new(kind)
        made.location = (x, y)
        for key, value in properties.items():
            setattr(made, key, value)
        return made

    def attribute(name: str, kind: str, x: float, y: float) -> bpy.types.NodeSocket:
        made = node("GeometryNodeInputNamedAttribute", x, y, data_type=kind)
        made.inputs["Name"].default_value = name
        return next(output for output in made.outputs if output.enabled and output.name == "Attribute")

    def compute(kind: str, x: float, y: float, operation: str, *values, **properties) -> bpy.types.NodeSocket:
        made = node(kind, x, y, operation=operation, **properties)
        inputs = [socket for socket in made.inputs if socket.enabled]
        for socket, value in zip(inputs, values):
            if isinstance(value, (int, float)):
                socket.default_value = value
            else:
                link(value, socket)
        return made.outputs[0]

    def math(operation: str, x: float, y: float, *values) -> bpy.types.NodeSocket:
        return compute("ShaderNodeMath", x, y, operation, *values)

    def switch(kind: str, x: float, y: float, *values) -> bpy.types.NodeSocket:
        made = node("GeometryNodeSwitch", x, y, input_type=kind)
        for socket, value in zip([socket for socket in made.inputs if socket.enabled], values):
            if isinstance(value, (int, float)):
                socket.default_value = value
            else:
                link(value, socket)
        return next(output for output in made.outputs if output.enabled)

    given = node("NodeGroupInput", -1200, 0)
    sphere = node("GeometryNodeMeshIcoSphere", -600, -200)
    link(given.outputs["Detail"], sphere.inputs["Subdivisions"])
    smooth = node("GeometryNodeSetShadeSmooth", -400, -200)
    link(sphere.outputs["Mesh"], smooth.inputs[0])
    painted = node("GeometryNodeSetMaterial", -200, -200)
    painted.inputs["Material"].default_value = _material(degree)
    link(smooth.outputs[0], painted.inputs["Geometry"])

    # The radius at which opacity exp(-r^2 / 2) has fallen to LEAST_ALPHA: faint splats are small, and cost less.
    opacity = attribute("opacity", "FLOAT", -1200, 300)
    faint = math("LOGARITHM", -900, 300, math("MAXIMUM", -1000, 300, math("DIVIDE", -1100, 300, opacity, LEAST_ALPHA), 1.0), float(np.e))
    reach = math("SQRT", -700, 300, math("MULTIPLY", -800, 300, faint, 2.0))
    radius = switch("FLOAT", -500, 300, given.outputs["Solid"], reach, 1.5)
    share = node("GeometryNodeSwitch", -900, 600, input_type="FLOAT")
    values = [socket for socket in share.inputs if socket.enabled]
    link(node("GeometryNodeIsViewport", -1200, 600).outputs[0], values[0])
    values[1].default_value = 1.0
    link(given.outputs["Viewport Share"], values[2])
    chance = node("FunctionNodeRandomValue", -900, 800, data_type="FLOAT")
    lucky = compute(
        "FunctionNodeCompare", -700, 700, "LESS_EQUAL",
        next(output for output in chance.outputs if output.enabled), next(output for output in share.outputs if output.enabled),
        data_type="FLOAT",
    )  # fmt: skip
    dense = compute("FunctionNodeCompare", -700, 500, "GREATER_EQUAL", opacity, given.outputs["Least Opacity"], data_type="FLOAT")
    seen = compute("FunctionNodeCompare", -400, 300, "GREATER_THAN", reach, 0.0, data_type="FLOAT")
    both = compute("FunctionNodeBooleanMath", -400, 600, "AND", lucky, dense)
    visible = compute("FunctionNodeBooleanMath", -200, 500, "AND", both, seen)

    scaled = node("ShaderNodeVectorMath", -200, -500, operation="SCALE")
    link(attribute("scale", "FLOAT_VECTOR", -800, -500), scaled.inputs[0])
    link(math("MULTIPLY", -400, -500, radius, given.outputs["Size"]), scaled.inputs["Scale"])
    instances = node("GeometryNodeInstanceOnPoints", 100, 0)
    link(given.outputs["Geometry"], instances.inputs["Points"])
    link(visible, instances.inputs["Selection"])
    link(painted.outputs[0], instances.inputs["Instance"])
    turn = attribute("rotation", "QUATERNION", -400, -700)
    link(turn, instances.inputs["Rotation"])
    link(scaled.outputs[0], instances.inputs["Scale"])
    latest = instances.outputs[0]

    def store(name: str, kind: str, value: bpy.types.NodeSocket, x: float) -> None:
        nonlocal latest
        marked = node("GeometryNodeStoreNamedAttribute", x, 0, data_type=kind, domain="INSTANCE")
        marked.inputs["Name"].default_value = name
        link(latest, marked.inputs["Geometry"])
        link(value, next(socket for socket in marked.inputs if socket.enabled and socket.name == "Value"))
        latest = marked.outputs[0]

    # For the material: the sphere's radius in standard deviations, 0 for solid ones, and the opacity, in one attribute because EEVEE reads
    # no more than eight of an instance (GPU_MAX_UNIFORM_ATTR in Blender's source); and the sphere's frame, to take directions back from.
    drawn = node("ShaderNodeCombineXYZ", 250, 400)
    link(switch("FLOAT", 150, 300, given.outputs["Solid"], reach, 0.0), drawn.inputs[0])
    link(opacity, drawn.inputs[1])
    store("splat_drawn", "FLOAT_VECTOR", drawn.outputs[0], 350)
    if degree:
        for axis in range(3):
            along = node("FunctionNodeRotateVector", 350, -300 - 200 * axis)
            along.inputs["Vector"].default_value = [float(axis == i) for i in range(3)]
            link(turn, along.inputs["Rotation"])
            own = node("ShaderNodeSeparateXYZ", 150, -300 - 200 * axis)
            link(scaled.outputs[0], own.inputs[0])
            long = node("ShaderNodeVectorMath", 500, -300 - 200 * axis, operation="SCALE")
            link(along.outputs[0], long.inputs[0])
            link(own.outputs[axis], long.inputs["Scale"])
            store(f"splat_axis_{axis + 1}", "FLOAT_VECTOR", long.outputs[0], 550 + 200 * axis)
    for i, axis in enumerate("XYZ"):
        there = node("GeometryNodeTransform", 1250 + 600 * i, -200)
        there.inputs["Scale"].default_value = [-1.0 if k == i else 1.0 for k in range(3)]
        link(latest, there.inputs["Geometry"])
        both_sides = node("GeometryNodeJoinGeometry", 1450 + 600 * i, -100)
        link(latest, both_sides.inputs[0])
        link(there.outputs[0], both_sides.inputs[0])
        latest = switch("GEOMETRY", 1650 + 600 * i, 0, given.outputs[f"Mirror {axis}"], latest, both_sides.outputs[0])
    result = node("NodeGroupOutput", 3200, 0)
    link(latest, result.inputs[0])
    return group


# The material


def _material(degree: int) -> bpy.types.Material:
    """Emits the splat's colour where the line of sight meets it, as much as it is met. EEVEE shows harmonics of degree 1 at most."""
    material = bpy.data.materials.get(_name(degree))
    if material is not None:
        return material
    material = bpy.data.materials.new(_name(degree))
    if material.node_tree is None or bpy.app.version < (5, 0, 0):
        material.use_nodes = True
    material.surface_render_method = "DITHERED"
    material.cycles.emission_sampling = "NONE"  # thousands of little lamps would be sampled for nothing
    tree = material.node_tree
    tree.nodes.clear()
    link = tree.links.new

    def node(kind: str, x: float, y: float, **properties) -> bpy.types.Node:
        made = tree.nodes.new(kind)
        made.location = (x, y)
        for key, value in properties.items():
            setattr(made, key, value)
        return made

    def compute(kind: str, x: float, y: float, operation: str, *values) -> bpy.types.Node:
        made = node(kind, x, y, operation=operation)
        for socket, value in zip([socket for socket in made.inputs if socket.enabled], values):
            if isinstance(value, bpy.types.NodeSocket):
                link(value, socket)
            else:
                socket.default_value = value
        return made

    def math(operation: str, x: float, y: float, *values) -> bpy.types.NodeSocket:
        return compute("ShaderNodeMath", x, y, operation, *values).outputs[0]

    def vector(operation: str, x: float, y: float, *values) -> bpy.types.NodeSocket:
        made = compute("ShaderNodeVectorMath", x, y, operation, *values)
        return next(output for output in made.outputs if output.enabled)

    def attribute(name: str, x: float, y: float, output: str) -> bpy.types.NodeSocket:
        return node("ShaderNodeAttribute", x, y, attribute_type="INSTANCER", attribute_name=name).outputs[output]

    drawn = node("ShaderNodeSeparateXYZ", -1200, 100)
    link(attribute("splat_drawn", -1400, 100, "Vector"), drawn.inputs[0])
    radius, opacity = drawn.outputs[0], drawn.outputs[1]
    geometry = node("ShaderNodeNewGeometry", -1600, -400)
    sight = node("ShaderNodeVectorTransform", -1400, -400, vector_type="VECTOR", convert_from="WORLD", convert_to="OBJECT")
    link(geometry.outputs["Incoming"], sight.inputs[0])
    point = node("ShaderNodeTexCoord", -1400, -200).outputs["Object"]
    aside = vector("CROSS_PRODUCT", -1200, -200, point, sight.outputs[0])
    distance = math(
        "DIVIDE", -800, -300,
        vector("DOT_PRODUCT", -1000, -200, aside, aside), vector("DOT_PRODUCT", -1000, -400, sight.outputs[0], sight.outputs[0]),
    )  # fmt: skip
    squared = math("MULTIPLY", -600, -200, math("MULTIPLY", -800, 0, radius, radius), distance)
    peak = math("EXPONENT", -300, -200, math("MULTIPLY", -450, -200, squared, -0.5))
    faded = math("MULTIPLY", -150, -200, peak, opacity)
    front = math("SUBTRACT", -150, -400, 1.0, geometry.outputs["Backfacing"])  # a line of sight meets both sides of a sphere
    is_solid = math("LESS_THAN", -400, 50, radius, 1e-6)
    alpha = math("MAXIMUM", 150, -100, math("MULTIPLY", 0, -200, faded, front), is_solid)
    average = attribute("color", -400, 300, "Color")
    # Eight attributes of an instance are those of degree 1. More, which EEVEE would take for zeros, are for Cycles alone.
    targets = {"ALL": degree} if degree <= 1 else {"CYCLES": degree, "EEVEE": 1}
    for row, (target, bands) in enumerate(targets.items()):
        y = -600.0 * row
        color = _view_dependent(bands, average, sight.outputs[0], attribute, math, vector, node, link) if bands else average
        emission = node("ShaderNodeEmission", 1500, y + 200)
        link(vector("MAXIMUM", 1350, y + 300, color, (0.0, 0.0, 0.0)), emission.inputs["Color"])
        mix = node("ShaderNodeMixShader", 1700, y)
        link(alpha, mix.inputs[0])
        link(node("ShaderNodeBsdfTransparent", 1500, y + 50).outputs[0], mix.inputs[1])
        link(emission.outputs[0], mix.inputs[2])
        link(mix.outputs[0], node("ShaderNodeOutputMaterial", 1900, y, target=target).inputs["Surface"])
    return material


def _view_dependent(degree: int, color, sight, attribute, math, vector, node, link) -> bpy.types.NodeSocket:
    """Linear colour with the harmonics of degree 1 and more, which add to the sRGB value (Kerbl et al. 2023).

    sight: towards the viewer, in the sphere's own space. `splat_axis_*` take it to the object's, in which the harmonics are; they are
    functions of the direction from the viewer.
    """
    parts = node("ShaderNodeSeparateXYZ", -1400, 800)
    link(sight, parts.inputs[0])
    along = [
        vector("SCALE", -1200, 800 - 150 * i, attribute(f"splat_axis_{i + 1}", -1400, 650 - 150 * i, "Vector"), parts.outputs[i])
        for i in range(3)
    ]
    there = vector("NORMALIZE", -800, 800, vector("ADD", -900, 800, vector("ADD", -1000, 800, along[0], along[1]), along[2]))
    direction = node("ShaderNodeSeparateXYZ", -500, 800)
    link(vector("SCALE", -650, 800, there, -1.0), direction.inputs[0])
    x, y, z = (Term(math, direction.outputs[i]) for i in range(3))
    polynomials = splat_files.polynomials(x, y, z, x * x, y * y, z * z)
    summed = _curve(color, True, math, vector, node, link)
    for i, (factor, polynomial) in enumerate(zip(splat_files.FACTORS[: (degree + 1) ** 2 - 1], polynomials)):
        weight = polynomial * factor
        summed = vector(
            "ADD", 1000, -200 * i, summed, vector("SCALE", 800, -200 * i, attribute(f"sh_{i + 1}", 600, -200 * i, "Vector"), weight.socket)
        )
    return _curve(vector("MAXIMUM", 1200, 0, summed, (0.0, 0.0, 0.0)), False, math, vector, node, link)


class Term:
    """A number in a shader, written as arithmetic: every operation makes its Math node."""

    def __init__(self, math, socket: bpy.types.NodeSocket):
        self.math, self.socket = math, socket

    def _made(self, operation: str, left, right) -> Term:
        values = [value.socket if isinstance(value, Term) else float(value) for value in (left, right)]
        return Term(self.math, self.math(operation, 0, 1000, *values))

    def __add__(self, other) -> Term:
        return self._made("ADD", self, other)

    def __sub__(self, other) -> Term:
        return self._made("SUBTRACT", self, other)

    def __mul__(self, other) -> Term:
        return self._made("MULTIPLY", self, other)

    __rmul__ = __mul__


def _curve(color, encode: bool, math, vector, node, link) -> bpy.types.NodeSocket:
    """sRGB's transfer function, channel by channel: linear to encoded, or back."""
    parts = node("ShaderNodeSeparateXYZ", 0, 1200)
    link(color, parts.inputs[0])
    joined = node("ShaderNodeCombineXYZ", 400, 1200)
    for i in range(3):
        value = parts.outputs[i]
        if encode:
            low = math("MULTIPLY", 100, 1200, value, 12.92)
            power = math("POWER", 100, 1200, math("MAXIMUM", 100, 1200, value, 0.0), 1 / 2.4)
            high = math("SUBTRACT", 200, 1200, math("MULTIPLY", 200, 1200, power, 1.055), 0.055)
            is_low = math("LESS_THAN", 200, 1200, value, 0.0031308)
        else:
            low = math("MULTIPLY", 100, 1200, value, 1 / 12.92)
            high = math("POWER", 200, 1200, math("MULTIPLY", 100, 1200, math("ADD", 100, 1200, value, 0.055), 1 / 1.055), 2.4)
            is_low = math("LESS_THAN", 200, 1200, value, 0.04045)
        step = math("MULTIPLY", 300, 1200, is_low, math("SUBTRACT", 300, 1200, low, high))
        link(math("ADD", 300, 1200, high, step), joined.inputs[i])
    return joined.outputs[0]
