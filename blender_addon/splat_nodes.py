"""Gaussian splats as a Blender object: a mesh of bare vertices with attributes, and a geometry-nodes modifier that shows each as an
ellipsoid. Everything else in Blender (crop, decimate, select, colour) then works on them as on any points.

Attributes: `scale` (standard deviations along the splat's axes), `rotation` (quaternion), `color` (linear, at the splat's front),
`opacity`. All in the object's own frame and in Blender units.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import bpy
import numpy as np

SH_C0 = 0.28209479177387814  # the constant spherical harmonic: colour = 0.5 + SH_C0 * f_dc
NAME = "Kiln splats"  # of the node group and of the material, made once a file
PLY_TYPES = {"float": "<f4", "float32": "<f4", "double": "<f8", "uchar": "u1", "uint8": "u1", "int": "<i4", "uint": "<u4"}


@dataclass(frozen=True)
class Points:
    """N splats as in a file, in its world."""

    means: np.ndarray  # (N, 3)
    scales: np.ndarray  # (N, 3) standard deviations
    quaternions: np.ndarray  # (N, 4), w first, unit length
    colors: np.ndarray  # (N, 3) sRGB
    opacities: np.ndarray  # (N,)


def read_ply(path: Path) -> Points:
    """Splats from a binary PLY file in the layout of 3D Gaussian Splatting. Another kind of file raises ValueError."""
    data = Path(path).read_bytes()
    end = data.find(b"end_header\n")
    lines = data[: max(end, 0)].decode("ascii", "replace").splitlines()
    if not lines or lines[0] != "ply" or "format binary_little_endian 1.0" not in lines:
        raise ValueError(f"{Path(path).name} is not a binary little-endian PLY file")
    elements = [line.split() for line in lines if line.startswith(("element", "property"))]
    if elements[:1] == [] or elements[0][:2] != ["element", "vertex"]:
        raise ValueError(f"{Path(path).name} does not begin with vertices")
    properties = []
    for words in elements[1:]:
        if words[0] == "element":
            break
        properties.append((words[2], PLY_TYPES[words[1]]))
    table = np.frombuffer(data, np.dtype(properties), int(elements[0][2]), end + len(b"end_header\n"))

    def columns(*names: str) -> np.ndarray:
        missing = [name for name in names if name not in table.dtype.names]
        if missing:
            raise ValueError(f"{Path(path).name} has no {missing[0]}: it does not hold splats")
        return np.stack([table[name].astype(np.float64) for name in names], 1)

    quaternions = columns("rot_0", "rot_1", "rot_2", "rot_3")
    return Points(
        means=columns("x", "y", "z"),
        scales=np.exp(columns("scale_0", "scale_1", "scale_2")),
        quaternions=quaternions / np.maximum(np.linalg.norm(quaternions, axis=1, keepdims=True), 1e-12),
        colors=np.clip(0.5 + SH_C0 * columns("f_dc_0", "f_dc_1", "f_dc_2"), 0, 1),
        opacities=1 / (1 + np.exp(-columns("opacity")[:, 0])),
    )


def make_object(name: str, points: Points) -> bpy.types.Object:
    """A new object that holds and shows splats given in its own frame. It is in no collection yet."""
    mesh = bpy.data.meshes.new(name)
    mesh.vertices.add(len(points.means))
    mesh.vertices.foreach_set("co", points.means.astype(np.float32).ravel())
    linear = np.where(points.colors <= 0.04045, points.colors / 12.92, ((points.colors + 0.055) / 1.055) ** 2.4)
    rgba = np.concatenate([linear, np.ones((len(linear), 1))], 1)
    for attribute, kind, field, values in (
        ("scale", "FLOAT_VECTOR", "vector", points.scales),
        ("rotation", "QUATERNION", "value", points.quaternions),
        ("color", "FLOAT_COLOR", "color", rgba),
        ("opacity", "FLOAT", "value", points.opacities),
    ):
        data = mesh.attributes.new(attribute, kind, "POINT").data
        data.foreach_set(field, np.ascontiguousarray(values, np.float32).ravel())
    material = bpy.data.materials.get(NAME) or _material()
    mesh.materials.append(material)
    mesh.update()
    thing = bpy.data.objects.new(name, mesh)
    modifier = thing.modifiers.new("Splats", "NODES")
    modifier.node_group = bpy.data.node_groups.get(NAME) or _node_group(material)
    return thing


def _node_group(material: bpy.types.Material) -> bpy.types.NodeTree:
    """Vertices with attributes -> one ellipsoid each, `Size` standard deviations large."""
    group = bpy.data.node_groups.new(NAME, "GeometryNodeTree")
    group.is_modifier = True
    interface = group.interface
    interface.new_socket("Geometry", in_out="INPUT", socket_type="NodeSocketGeometry")
    size = interface.new_socket("Size", in_out="INPUT", socket_type="NodeSocketFloat")
    size.default_value, size.min_value, size.max_value = 1.5, 0.0, 10.0
    size.description = "Radius of the ellipsoids, in standard deviations"
    least = interface.new_socket("Least Opacity", in_out="INPUT", socket_type="NodeSocketFloat")
    least.default_value, least.min_value, least.max_value = 0.1, 0.0, 1.0
    least.subtype = "FACTOR"
    least.description = "Splats that are more transparent are not shown"
    soft = interface.new_socket("Soft", in_out="INPUT", socket_type="NodeSocketBool")
    soft.default_value = False
    soft.description = "Fade towards the edges, as the splats themselves do; in Cycles, raise the transparent bounces for it"
    detail = interface.new_socket("Detail", in_out="INPUT", socket_type="NodeSocketInt")
    detail.default_value, detail.min_value, detail.max_value = 2, 1, 5
    detail.description = "Subdivisions of each ellipsoid"
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

    given = node("NodeGroupInput", -800, 0)
    sphere = node("GeometryNodeMeshIcoSphere", -400, -200)
    link(given.outputs["Detail"], sphere.inputs["Subdivisions"])
    smooth = node("GeometryNodeSetShadeSmooth", -200, -200)
    link(sphere.outputs["Mesh"], smooth.inputs[0])
    painted = node("GeometryNodeSetMaterial", 0, -200)
    painted.inputs["Material"].default_value = material
    link(smooth.outputs[0], painted.inputs["Geometry"])
    visible = node("FunctionNodeCompare", -400, 200, data_type="FLOAT", operation="GREATER_EQUAL")
    link(attribute("opacity", "FLOAT", -800, 250), visible.inputs[0])
    link(given.outputs["Least Opacity"], visible.inputs[1])
    scaled = node("ShaderNodeVectorMath", -400, -500, operation="SCALE")
    link(attribute("scale", "FLOAT_VECTOR", -800, -500), scaled.inputs[0])
    link(given.outputs["Size"], scaled.inputs["Scale"])
    instances = node("GeometryNodeInstanceOnPoints", 250, 0)
    link(given.outputs["Geometry"], instances.inputs["Points"])
    link(visible.outputs[0], instances.inputs["Selection"])
    link(painted.outputs[0], instances.inputs["Instance"])
    link(attribute("rotation", "QUATERNION", -400, -700), instances.inputs["Rotation"])
    link(scaled.outputs[0], instances.inputs["Scale"])
    # For the material: 0 where ellipsoids are solid, else their radius in standard deviations.
    radius = node("ShaderNodeMath", 250, 250, operation="MULTIPLY")
    link(given.outputs["Soft"], radius.inputs[0])
    link(given.outputs["Size"], radius.inputs[1])
    marked = node("GeometryNodeStoreNamedAttribute", 500, 0, data_type="FLOAT", domain="INSTANCE")
    marked.inputs["Name"].default_value = "soft_radius"
    link(instances.outputs[0], marked.inputs["Geometry"])
    link(radius.outputs[0], next(s for s in marked.inputs if s.enabled and s.name == "Value"))
    result = node("NodeGroupOutput", 750, 0)
    link(marked.outputs[0], result.inputs[0])
    return group


def _material() -> bpy.types.Material:
    """Emits the splat's colour; a soft one fades like its Gaussian.

    A line of sight that crosses a sphere of radius r at the angle a to its normal passes the centre at the distance r sin a, where the
    Gaussian's projection is exp(-(r sin a)^2 / 2).
    """
    material = bpy.data.materials.new(NAME)
    if material.node_tree is None or bpy.app.version < (5, 0, 0):
        material.use_nodes = True
    tree = material.node_tree
    tree.nodes.clear()
    link = tree.links.new

    def node(kind: str, x: float, y: float, **properties) -> bpy.types.Node:
        made = tree.nodes.new(kind)
        made.location = (x, y)
        for key, value in properties.items():
            setattr(made, key, value)
        return made

    def math(operation: str, x: float, y: float, *values) -> bpy.types.NodeSocket:
        made = node("ShaderNodeMath", x, y, operation=operation)
        for socket, value in zip(made.inputs, values):
            if isinstance(value, (int, float)):
                socket.default_value = value
            else:
                link(value, socket)
        return made.outputs[0]

    def attribute(name: str, x: float, y: float) -> bpy.types.Node:
        return node("ShaderNodeAttribute", x, y, attribute_type="INSTANCER", attribute_name=name)

    radius = attribute("soft_radius", -1200, -200).outputs["Fac"]
    facing = node("ShaderNodeLayerWeight", -1200, -400)
    facing.inputs["Blend"].default_value = 0.5
    cosine = math("SUBTRACT", -1000, -400, 1.0, facing.outputs["Facing"])
    sine_squared = math("SUBTRACT", -800, -400, 1.0, math("MULTIPLY", -900, -400, cosine, cosine))
    exponent = math("MULTIPLY", -600, -300, math("MULTIPLY", -700, -300, math("MULTIPLY", -800, -200, radius, radius), sine_squared), -0.5)
    faded = math("MULTIPLY", -400, -200, math("EXPONENT", -500, -300, exponent), attribute("opacity", -600, 0).outputs["Fac"])
    front = math("SUBTRACT", -400, -500, 1.0, node("ShaderNodeNewGeometry", -600, -600).outputs["Backfacing"])
    is_soft = math("GREATER_THAN", -400, 0, radius, 0.0)
    once = math("MULTIPLY", -300, -300, faded, front)  # a line of sight meets both sides of an ellipsoid
    alpha = math("ADD", 0, -200, math("SUBTRACT", -200, 0, 1.0, is_soft), math("MULTIPLY", -200, -200, is_soft, once))
    emission = node("ShaderNodeEmission", 0, 200)
    link(attribute("color", -300, 300).outputs["Color"], emission.inputs["Color"])
    mix = node("ShaderNodeMixShader", 250, 0)
    link(alpha, mix.inputs[0])
    link(node("ShaderNodeBsdfTransparent", 0, 50).outputs[0], mix.inputs[1])
    link(emission.outputs[0], mix.inputs[2])
    link(mix.outputs[0], node("ShaderNodeOutputMaterial", 450, 0).inputs["Surface"])
    return material
