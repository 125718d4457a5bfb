"""Materials that show their base colour alone, whatever their node graph: what the default capture renders.

Next to every shader node a twin is built that emits the node's colour, Mix and Add Shader mixing the twins, and a Material Output of ours
that Cycles prefers shows them. No node, link or value of the user's graph is touched, so taking ours away again restores it exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import bmesh
import bpy

GREY = (0.8, 0.8, 0.8, 1.0)  # what Blender gives a surface without a material
SEE_THROUGH = {"ShaderNodeBsdfTransparent", "ShaderNodeHoldout", "ShaderNodeBsdfRayPortal"}  # kept: they say where nothing is
COLOR_INPUTS = ("Base Color", "Color")


@contextmanager
def shown(materials: Iterable[bpy.types.Material], bare: Iterable[bpy.types.Object]) -> Iterator[None]:
    """Within this context Cycles sees `materials` as their base colour, without light, and `bare` objects in Blender's default grey
    where they have no material. On leaving, also by an error, everything is as it was."""
    groups = {}  # node groups' copies, shared by all materials
    with ExitStack() as undo:
        undo.callback(lambda: [bpy.data.node_groups.remove(copy) for copy in groups.values()])
        for material in materials:
            if has_nodes(material):
                undo.enter_context(_unlit(material, groups))
            else:
                stand_in = undo.enter_context(plain((*material.diffuse_color[:3], 1.0)))
                undo.enter_context(swapped(material, stand_in))
        bare = list(bare)
        if bare:
            grey = undo.enter_context(plain(GREY))
            for thing in bare:
                undo.enter_context(_covered(thing, grey))
        yield


@contextmanager
def plain(color: tuple[float, float, float, float]) -> Iterator[bpy.types.Material]:
    """A temporary material that emits one linear colour."""
    material = bpy.data.materials.new("Kiln plain")
    try:
        if not has_nodes(material):
            material.use_nodes = True
        tree = material.node_tree
        tree.nodes.clear()
        emission = tree.nodes.new("ShaderNodeEmission")
        emission.inputs["Color"].default_value = color
        output = tree.nodes.new("ShaderNodeOutputMaterial")
        tree.links.new(emission.outputs[0], output.inputs["Surface"])
        yield material
    finally:
        bpy.data.materials.remove(material)


def has_nodes(material: bpy.types.Material) -> bool:
    # From 5.0 on every material has nodes, and the property only warns that it will go.
    return material.node_tree is not None and (bpy.app.version >= (5, 0, 0) or material.use_nodes)


@contextmanager
def swapped(material: bpy.types.Material, stand_in: bpy.types.Material) -> Iterator[None]:
    """A material without nodes shows its viewport colour; turning nodes on would leave it a tree, so another takes its place instead."""
    material.user_remap(stand_in)
    try:
        yield
    finally:
        stand_in.user_remap(material)


@contextmanager
def _covered(thing: bpy.types.Object, grey: bpy.types.Material) -> Iterator[None]:
    """Fill the empty material slots of an object, or give it one."""
    slots = [slot for slot in thing.material_slots if slot.material is None]
    added = not thing.material_slots
    given = [part.material_index for part in _parts(thing)] if added else []
    try:
        if added:
            thing.data.materials.append(grey)
        for slot in slots:
            slot.material = grey
        yield
    finally:
        for slot in slots:
            slot.material = None
        if added:
            thing.data.materials.clear()  # sets every index to 0
            if any(given):
                for part, index in zip(_parts(thing), given, strict=True):
                    part.material_index = index


def _parts(thing: bpy.types.Object) -> Iterable:
    """What has a material index: faces, splines or letters; in Edit mode those being edited."""
    data = thing.data
    if thing.type == "MESH":
        if data.is_editmode:
            return bmesh.from_edit_mesh(data).faces
        return data.polygons
    if thing.type == "FONT":
        return data.body_format
    return data.splines if thing.type in ("CURVE", "SURFACE") else ()


@contextmanager
def borrowed(tree: bpy.types.NodeTree) -> Iterator[list[bpy.types.Node]]:
    """Nodes added to the yielded list (`new_node` does) are gone afterwards; selection, active node and active output are as they were."""
    ours = []
    active = tree.nodes.active
    selected = [node for node in tree.nodes if node.select]
    cycles_outputs = [n for n in tree.nodes if n.bl_idname == "ShaderNodeOutputMaterial" and n.target == "CYCLES" and n.is_active_output]
    try:
        yield ours
    finally:
        for node in ours:
            tree.nodes.remove(node)
        for node in cycles_outputs:
            node.is_active_output = True
        for node in selected:
            node.select = True
        tree.nodes.active = active


@contextmanager
def _unlit(material: bpy.types.Material, groups: dict) -> Iterator[None]:
    tree = material.node_tree
    with borrowed(tree) as ours:
        old = tree.get_output_node("CYCLES")
        surface = origin(old.inputs["Surface"]) if old else None
        if surface is not None:
            output = new_node(tree, "ShaderNodeOutputMaterial", ours)
            output.target = "CYCLES"  # wins over outputs for all engines, and EEVEE keeps its own
            output.is_active_output = True
            tree.links.new(_Twins(tree, ours, groups).of(surface), output.inputs["Surface"])
            _feed(tree, old.inputs["Displacement"], output.inputs["Displacement"], value=False)
        yield


def new_node(tree: bpy.types.NodeTree, kind: str, ours: list) -> bpy.types.Node:
    node = tree.nodes.new(kind)
    node.select = False
    ours.append(node)
    return node


def origin(socket: bpy.types.NodeSocket) -> bpy.types.NodeSocket | None:
    """The output that feeds an input, through reroutes and muted nodes; None where nothing does."""
    while True:
        links = [link for link in socket.links if not link.is_muted and link.is_valid]
        if not links:
            return None
        output, node = links[0].from_socket, links[0].from_node
        if node.bl_idname == "NodeReroute":
            socket = node.inputs[0]
        elif node.mute:
            through = [link.from_socket for link in node.internal_links if link.to_socket == output]
            if not through:
                return None
            socket = through[0]
        else:
            return output


def _feed(tree: bpy.types.NodeTree, old: bpy.types.NodeSocket, new: bpy.types.NodeSocket, value: bool = True) -> None:
    """Give `new` what `old` gets: the same link, or else (with `value`) the same value."""
    links = [link for link in old.links if not link.is_muted]
    if links:
        tree.links.new(links[0].from_socket, new)
    elif value:
        new.default_value = old.default_value


class _Twins:
    """The emitting twins of one node tree's shaders, each built once."""

    def __init__(self, tree: bpy.types.NodeTree, ours: list, groups: dict):
        self.tree, self.ours, self.groups = tree, ours, groups
        self.built = {}

    def of(self, shader: bpy.types.NodeSocket) -> bpy.types.NodeSocket:
        """An output that emits the base colour of the shader output `shader`."""
        key = (shader.node.name, shader.identifier)
        if key not in self.built:
            self.built[key] = self._build(shader)
        return self.built[key]

    def _build(self, shader: bpy.types.NodeSocket) -> bpy.types.NodeSocket:
        node = shader.node
        if node.bl_idname == "ShaderNodeMixShader":
            twin = self._new(node.bl_idname)
            _feed(self.tree, node.inputs[0], twin.inputs[0])
            self._connect(node.inputs[1], twin.inputs[1])
            self._connect(node.inputs[2], twin.inputs[2])
            return twin.outputs[0]
        if node.bl_idname == "ShaderNodeAddShader":
            twin = self._new(node.bl_idname)
            self._connect(node.inputs[0], twin.inputs[0])
            self._connect(node.inputs[1], twin.inputs[1])
            return twin.outputs[0]
        if node.bl_idname == "ShaderNodeGroup" and node.node_tree is not None:
            twin = self._new(node.bl_idname)
            twin.node_tree = self._group(node.node_tree)
            for old, new in zip(node.inputs, twin.inputs, strict=True):
                if old.type == "SHADER":
                    self._connect(old, new)
                else:
                    _feed(self.tree, old, new, value=hasattr(old, "default_value"))
            return next(output for output in twin.outputs if output.identifier == shader.identifier)
        if node.bl_idname in SEE_THROUGH or node.bl_idname == "NodeGroupInput":
            return shader  # a shader that enters a group was replaced outside
        if node.bl_idname == "ShaderNodeEmission":
            return self._emission(node.inputs["Color"], strength=node.inputs["Strength"])
        if node.bl_idname == "ShaderNodeBsdfHairPrincipled" and node.parametrization == "MELANIN":
            twin = self._new("ShaderNodeEmission")
            twin.inputs["Color"].default_value = _melanin_color(node)
            return twin.outputs[0]
        color = next((node.inputs[name] for name in COLOR_INPUTS if name in node.inputs), None)
        if color is None:
            return shader  # unknown to us: seen in the white light that the capture's world gives
        return self._with_alpha(self._emission(color), node.inputs.get("Alpha"))

    def _new(self, kind: str) -> bpy.types.Node:
        return new_node(self.tree, kind, self.ours)

    def _connect(self, old: bpy.types.NodeSocket, new: bpy.types.NodeSocket) -> None:
        shader = origin(old)
        if shader is not None:
            self.tree.links.new(self.of(shader), new)

    def _emission(self, color: bpy.types.NodeSocket, strength: bpy.types.NodeSocket | None = None) -> bpy.types.NodeSocket:
        twin = self._new("ShaderNodeEmission")
        _feed(self.tree, color, twin.inputs["Color"])
        if strength is not None:  # a lamp's colour is its colour however bright, but one that is off adds nothing
            at_most_one = self._new("ShaderNodeMath")
            at_most_one.operation = "MINIMUM"
            _feed(self.tree, strength, at_most_one.inputs[0])
            at_most_one.inputs[1].default_value = 1.0
            self.tree.links.new(at_most_one.outputs[0], twin.inputs["Strength"])
        return twin.outputs[0]

    def _with_alpha(self, shader: bpy.types.NodeSocket, alpha: bpy.types.NodeSocket | None) -> bpy.types.NodeSocket:
        if alpha is None or not alpha.is_linked and alpha.default_value >= 1.0:
            return shader
        mix = self._new("ShaderNodeMixShader")
        _feed(self.tree, alpha, mix.inputs[0])
        self.tree.links.new(self._new("ShaderNodeBsdfTransparent").outputs[0], mix.inputs[1])
        self.tree.links.new(shader, mix.inputs[2])
        return mix.outputs[0]

    def _group(self, group: bpy.types.NodeTree) -> bpy.types.NodeTree:
        """A copy of a node group whose shader outputs are replaced by twins; groups within groups too."""
        key = group.session_uid
        if key not in self.groups:
            copy = group.copy()
            if copy.library is not None:
                copy.make_local()
            self.groups[key] = copy
            twins = _Twins(copy, [], self.groups)
            for output in [node for node in copy.nodes if node.bl_idname == "NodeGroupOutput" and node.is_active_output]:
                for socket in output.inputs:
                    if socket.type == "SHADER":
                        twins._connect(socket, socket)
        return self.groups[key]


def _melanin_color(node: bpy.types.Node) -> tuple[float, float, float, float]:
    """The colour of a Principled Hair's unlinked melanin values: Chiang et al. 2016, "A practical and controllable hair and fur model",
    eq. 9 inverted, with the pigments' absorption after d'Eon et al. 2011."""
    amount, redness = node.inputs["Melanin"].default_value, node.inputs["Melanin Redness"].default_value
    radial = node.inputs["Radial Roughness"].default_value if "Radial Roughness" in node.inputs else 0.3
    amount = -math.log(max(1.0 - amount, 1e-4))
    eumelanin, pheomelanin = amount * (1.0 - redness), amount * redness
    x = radial
    falloff = 5.969 - 0.215 * x + 2.532 * x**2 - 10.73 * x**3 + 5.574 * x**4 + 0.245 * x**5
    absorption = [eumelanin * e + pheomelanin * p for e, p in ((0.506, 0.343), (0.841, 0.733), (1.653, 1.924))]
    return (*(math.exp(-math.sqrt(sigma) * falloff) for sigma in absorption), 1.0)
