"""Roughness, metallic, opacity and emission of any shader graph, as arbitrary output variables (AOVs) of the render that gives depth.

No node can read a shader's closure, so beside the user's shaders arithmetic is built that computes what they say of the surface, Mix and
Add Shader weighing and summing it as Cycles does with closures, and two AOV outputs show it. The user's shaders still render, which keeps
normal maps and displacement. No node, link or value of theirs is touched.

What counts as the surface: the nearest one along the ray whose opacity is at least `OPAQUE`. Where it is less, a Transparent shader takes
the place of the user's, since Cycles goes on from a faint surface by chance alone, and the AOVs are 0, since Cycles adds up those of all
surfaces until the one whose depth and normal it writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import bpy
import numpy as np

from .base_color import borrowed, has_nodes, new_node, origin, swapped

MATERIAL, EMISSION = "kiln_material", "kiln_emission"  # the AOVs' names
OPAQUE = 0.1  # holes of cut-out leaves are none, window panes are surfaces
BRIGHTEST = 1e4  # of emission: float16 ends at 65504
BARE = (0.5, 0.0, 1.0)  # roughness, metallic, opacity of a surface without material
TRACE = 1e-4  # a lamp's share in the roughness: where nothing else is, it decides

Vector = bpy.types.NodeSocket | tuple[float, float, float] | None  # None is zero
Number = bpy.types.NodeSocket | float


class Said(NamedTuple):
    """What a shader says of its surface."""

    reflects: Vector  # roughness, metallic and 1, each times the share of the shader that this is true of
    through: Vector  # what passes straight through, by colour
    glows: Vector  # linear light


# Roughness and metallic of shaders without one of these sockets; None where the socket says it.
DIFFUSE, METAL, DIELECTRIC = (1.0, 0.0), (None, 1.0), (None, 0.0)
REFLECTS = {
    "ShaderNodeBsdfDiffuse": DIFFUSE,  # its "Roughness" is another: that of Oren and Nayar
    "ShaderNodeSubsurfaceScattering": DIFFUSE,
    "ShaderNodeBsdfTranslucent": DIFFUSE,
    "ShaderNodeBsdfSheen": DIFFUSE,
    "ShaderNodeBsdfToon": DIFFUSE,
    "ShaderNodeBsdfAnisotropic": METAL,  # named Glossy
    "ShaderNodeBsdfGlossy": METAL,
    "ShaderNodeBsdfMetallic": METAL,
    "ShaderNodeBsdfGlass": DIELECTRIC,
    "ShaderNodeBsdfRefraction": DIELECTRIC,
    "ShaderNodeBsdfHair": DIELECTRIC,
    "ShaderNodeBsdfHairPrincipled": DIELECTRIC,
}
ROUGHNESS_INPUTS = ("Roughness", "RoughnessU")


@contextmanager
def shown(materials: Iterable[bpy.types.Material], layer: bpy.types.ViewLayer, channels: bool) -> Iterator[None]:
    """Within this context `layer`, of a scene that goes away, renders depth and normals of surfaces that are not holes, and with `channels`
    the AOVs of `materials`: MATERIAL, and EMISSION if any of them may give off light. On leaving, also by an error, the materials are as
    they were."""
    groups: dict[int, _Group] = {}
    layer.pass_alpha_threshold = OPAQUE / 2  # what is fainter than OPAQUE is Transparent altogether
    with ExitStack() as undo:
        undo.callback(lambda: [bpy.data.node_groups.remove(group.copy) for group in groups.values()])
        glowing = False
        for material in materials:
            if has_nodes(material):
                glowing |= _write(material.node_tree, undo.enter_context(borrowed(material.node_tree)), groups, channels)
            elif channels:
                undo.enter_context(swapped(material, undo.enter_context(_like_without_nodes(material))))
        if channels:
            _add_pass(layer, MATERIAL)
        if glowing:
            _add_pass(layer, EMISSION)
        yield


def read(channels: dict[str, np.ndarray], layer: str, there: np.ndarray) -> dict[str, np.ndarray]:
    """What a view's `material_file_path` holds, from the render's channels; `there`: where depth shows a surface. `material` uint8 H x W x
    3; `emission` float16 H x W x 3, linear, only where the view shows some."""

    def pixels(name):
        return np.stack([channels[f"{layer}.{name}.{one}"] for one in "RGB"], -1)

    material = np.nan_to_num(pixels(MATERIAL)).clip(0, 1)
    material[material[..., 2] == 0] = BARE  # there, but no material of ours: there was none
    found = {"material": np.where(there[..., None], np.rint(material * 255), 0).astype(np.uint8)}
    if f"{layer}.{EMISSION}.R" in channels:
        emission = np.where(there[..., None], np.nan_to_num(pixels(EMISSION), posinf=BRIGHTEST).clip(0, BRIGHTEST), 0)
        if emission.any():
            found["emission"] = emission.astype(np.float16)
    return found


def _add_pass(layer: bpy.types.ViewLayer, name: str) -> None:
    added = layer.aovs.add()
    added.name, added.type = name, "COLOR"


def _write(tree: bpy.types.NodeTree, ours: list, groups: dict[int, _Group], channels: bool) -> bool:
    """Make a material's holes holes, and with `channels` add AOV outputs to its tree; whether one of them is for emission."""
    output = tree.get_output_node("CYCLES")
    surface = origin(output.inputs["Surface"]) if output else None
    if surface is None:
        return False
    sums = _Sums(tree, ours, groups)
    said = sums.of(surface)
    opacity, here = 1.0, 1.0
    if said.through is not None:
        opacity = sums.math("SUBTRACT", 1.0, sums.mean(said.through), clamp=True)
        here = sums.math("SUBTRACT", 1.0, sums.math("LESS_THAN", opacity, OPAQUE))
        mix, ends = (new_node(tree, f"ShaderNode{kind}", ours) for kind in ("MixShader", "OutputMaterial"))
        sums.put(here, mix.inputs[0])
        tree.links.new(new_node(tree, "ShaderNodeBsdfTransparent", ours).outputs[0], mix.inputs[1])
        tree.links.new(surface, mix.inputs[2])
        tree.links.new(mix.outputs[0], ends.inputs["Surface"])
        for link in output.inputs["Displacement"].links[:1]:
            tree.links.new(link.from_socket, ends.inputs["Displacement"])
        ends.target = "CYCLES"  # wins over outputs for all engines
        ends.is_active_output = True
    if not channels:
        return False
    roughness, metallic, share = sums.parts(said.reflects)
    share = sums.math("DIVIDE", here, share)
    shown_opacity = sums.math("MULTIPLY", opacity, here)
    sums.write(MATERIAL, sums.vector(sums.math("MULTIPLY", roughness, share), sums.math("MULTIPLY", metallic, share), shown_opacity))
    if said.glows is None:
        return False
    # As with the colour's straight alpha: what the solid part of the surface gives off.
    sums.write(EMISSION, sums.scaled(said.glows, sums.math("DIVIDE", here, opacity)))
    return True


@contextmanager
def _like_without_nodes(material: bpy.types.Material) -> Iterator[bpy.types.Material]:
    """A temporary material with nodes that says what one without nodes does."""
    stand_in = bpy.data.materials.new("Kiln plain")
    try:
        if not has_nodes(stand_in):
            stand_in.use_nodes = True
        sums = _Sums(stand_in.node_tree, [], {})
        sums.write(MATERIAL, (material.roughness, material.metallic, 1.0))
        yield stand_in
    finally:
        bpy.data.materials.remove(stand_in)


class _Group(NamedTuple):
    """A copy of a node group that also tells what its shaders say, by the identifiers of its shader sockets."""

    copy: bpy.types.NodeTree
    given: dict[str, Said]  # of shader inputs: identifiers of three further inputs
    told: dict[str, Said]  # of shader outputs: identifiers of three further outputs


class _Sums:
    """Arithmetic in one node tree, and what each of its shaders says, built once."""

    def __init__(self, tree: bpy.types.NodeTree, ours: list, groups: dict[int, _Group], given: dict[str, Said] | None = None):
        self.tree, self.ours, self.groups, self.given = tree, ours, groups, given or {}
        self.known: dict[tuple[str, str], Said] = {}

    def of(self, shader: bpy.types.NodeSocket | None) -> Said:
        if shader is None:
            return Said(None, None, None)
        key = (shader.node.name, shader.identifier)
        if key not in self.known:
            self.known[key] = self._say(shader)
        return self.known[key]

    def _say(self, shader: bpy.types.NodeSocket) -> Said:
        node = shader.node
        kind = node.bl_idname
        if kind == "ShaderNodeMixShader":
            first, second = self.of(origin(node.inputs[1])), self.of(origin(node.inputs[2]))
            share = self.clamped(self.number(node.inputs[0]))
            return Said(*(self.mixed(share, a, b) for a, b in zip(first, second, strict=True)))
        if kind == "ShaderNodeAddShader":
            first, second = self.of(origin(node.inputs[0])), self.of(origin(node.inputs[1]))
            return Said(*(self.added(a, b) for a, b in zip(first, second, strict=True)))
        if kind == "ShaderNodeGroup" and node.node_tree is not None:
            return self._said_by_group(node, shader)
        if kind == "NodeGroupInput":
            return Said(*(next(socket for socket in node.outputs if socket.identifier == one) for one in self.given[shader.identifier]))
        if kind == "ShaderNodeBsdfTransparent":
            return Said(None, self.color(node.inputs["Color"]), None)
        if kind == "ShaderNodeHoldout":
            return Said(None, None, None)  # the render leaves a hole there, and nothing behind it
        if kind == "ShaderNodeEmission":
            glow = self.scaled(self.color(node.inputs["Color"]), self.number(node.inputs["Strength"]))
            return Said((TRACE, 0.0, TRACE), None, glow)
        if kind == "ShaderNodeBsdfPrincipled":
            return self._said_by_principled(node)
        if kind == "ShaderNodeBsdfToon" and node.component == "GLOSSY":
            return Said(self.vector(self.clamped(self.number(node.inputs["Size"])), 1.0, 1.0), None, None)
        roughness, metallic = REFLECTS.get(kind, (None, 0.0))
        if roughness is None:
            socket = next((node.inputs[name] for name in ROUGHNESS_INPUTS if name in node.inputs), None)
            roughness = BARE[0] if socket is None else self.clamped(self.number(socket))
        return Said(self.vector(roughness, metallic, 1.0), None, None)

    def _said_by_principled(self, node: bpy.types.Node) -> Said:
        roughness, metallic, alpha = (self.clamped(self.number(node.inputs[name])) for name in ("Roughness", "Metallic", "Alpha"))
        glow = self.scaled(self.color(node.inputs["Emission Color"]), self.number(node.inputs["Emission Strength"]))
        if alpha == 1.0:
            return Said(self.vector(roughness, metallic, 1.0), None, glow)
        clear = self.math("SUBTRACT", 1.0, alpha)
        return Said(self.scaled(self.vector(roughness, metallic, 1.0), alpha), self.vector(clear, clear, clear), self.scaled(glow, alpha))

    def _said_by_group(self, node: bpy.types.Node, shader: bpy.types.NodeSocket) -> Said:
        group = self._group(node.node_tree)
        twin = new_node(self.tree, node.bl_idname, self.ours)
        twin.node_tree = group.copy
        inputs = {socket.identifier: socket for socket in twin.inputs}
        for old in node.inputs:
            if old.type == "SHADER":
                for value, identifier in zip(self.of(origin(old)), group.given[old.identifier], strict=True):
                    self.put(value, inputs[identifier])
            else:
                links = [link for link in old.links if not link.is_muted]
                if links:
                    self.tree.links.new(links[0].from_socket, inputs[old.identifier])
                elif hasattr(old, "default_value"):
                    inputs[old.identifier].default_value = old.default_value
        outputs = {socket.identifier: socket for socket in twin.outputs}
        found = {name: Said(*(one and outputs[one] for one in told)) for name, told in group.told.items()}
        for name, said in found.items():  # a second output of the same group node needs no second twin
            self.known[node.name, name] = said
        return found.get(shader.identifier, Said(None, None, None))

    def _group(self, group: bpy.types.NodeTree) -> _Group:
        """The telling copy of a node group; groups within groups too."""
        key = group.session_uid
        if key in self.groups:
            return self.groups[key]
        copy = group.copy()
        made = self.groups[key] = _Group(copy, {}, {})
        if copy.library is not None:
            copy.make_local()

        def further(name: str, direction: str) -> Said:
            add = copy.interface.new_socket
            return Said(*(add(f"{name} {what}", in_out=direction, socket_type="NodeSocketVector").identifier for what in Said._fields))

        for socket in [item for item in copy.interface.items_tree if item.item_type == "SOCKET"]:
            if socket.socket_type == "NodeSocketShader" and socket.in_out == "INPUT":
                made.given[socket.identifier] = further(socket.name, "INPUT")
        sums = _Sums(copy, [], self.groups, made.given)
        for output in [node for node in copy.nodes if node.bl_idname == "NodeGroupOutput" and node.is_active_output]:
            for name in [socket.identifier for socket in output.inputs if socket.type == "SHADER"]:
                said = sums.of(origin(next(socket for socket in output.inputs if socket.identifier == name)))
                told = further(name, "OUTPUT")
                sockets = {socket.identifier: socket for socket in output.inputs}  # the new ones among them
                for value, identifier in zip(said, told, strict=True):
                    sums.put(value, sockets[identifier])
                made.told[name] = Said(*(None if value is None else one for value, one in zip(said, told, strict=True)))
        return made

    # Values: constants where the graph has constants, or else sockets of new nodes

    def number(self, socket: bpy.types.NodeSocket) -> Number:
        links = [link for link in socket.links if not link.is_muted]
        return links[0].from_socket if links else float(socket.default_value)

    def color(self, socket: bpy.types.NodeSocket) -> Vector:
        links = [link for link in socket.links if not link.is_muted]
        return links[0].from_socket if links else tuple(float(value) for value in socket.default_value[:3])

    def clamped(self, value: Number) -> Number:
        return min(max(value, 0.0), 1.0) if isinstance(value, float) else self.math("ADD", value, 0.0, clamp=True)

    def math(self, operation: str, a: Number, b: Number, clamp: bool = False) -> Number:
        node = new_node(self.tree, "ShaderNodeMath", self.ours)
        node.operation, node.use_clamp = operation, clamp
        self.put(a, node.inputs[0])
        self.put(b, node.inputs[1])
        return node.outputs[0]

    def vector(self, x: Number, y: Number, z: Number) -> Vector:
        if isinstance(x, float) and isinstance(y, float) and isinstance(z, float):
            return x, y, z
        node = new_node(self.tree, "ShaderNodeCombineXYZ", self.ours)
        for value, socket in zip((x, y, z), node.inputs, strict=True):
            self.put(value, socket)
        return node.outputs[0]

    def parts(self, vector: Vector) -> list[Number]:
        if vector is None or isinstance(vector, tuple):
            return [float(value) for value in vector or (0, 0, 0)]
        node = new_node(self.tree, "ShaderNodeSeparateXYZ", self.ours)
        self.put(vector, node.inputs[0])
        return list(node.outputs)

    def mean(self, vector: Vector) -> Number:
        if vector is None:
            return 0.0
        node = self._vector_math("DOT_PRODUCT", vector, (1 / 3, 1 / 3, 1 / 3))
        return node.outputs["Value"]

    def added(self, a: Vector, b: Vector) -> Vector:
        if a is None or b is None:
            return b if a is None else a
        return self._vector_math("ADD", a, b).outputs["Vector"]

    def scaled(self, vector: Vector, by: Number) -> Vector:
        if vector is None or vector == (0.0, 0.0, 0.0) or isinstance(by, float) and by == 0.0:
            return None
        if isinstance(vector, tuple) and isinstance(by, float):
            return tuple(value * by for value in vector)
        node = self._vector_math("SCALE", vector, None)
        self.put(by, node.inputs["Scale"])
        return node.outputs["Vector"]

    def mixed(self, share: Number, a: Vector, b: Vector) -> Vector:
        return self.added(self.scaled(a, self.math("SUBTRACT", 1.0, share)), self.scaled(b, share))

    def put(self, value: Vector | Number, socket: bpy.types.NodeSocket) -> None:
        if isinstance(value, bpy.types.NodeSocket):
            self.tree.links.new(value, socket)
        elif value is not None:
            socket.default_value = value

    def write(self, name: str, value: Vector) -> None:
        node = new_node(self.tree, "ShaderNodeOutputAOV", self.ours)
        node.aov_name = name
        self.put((*value, 1.0) if isinstance(value, tuple) else value, node.inputs["Color"])

    def _vector_math(self, operation: str, a: Vector, b: Vector) -> bpy.types.Node:
        node = new_node(self.tree, "ShaderNodeVectorMath", self.ours)
        node.operation = operation
        self.put(a, node.inputs[0])
        self.put(b, node.inputs[1])
        return node
