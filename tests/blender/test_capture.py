"""Capture against ray casts, known colours and projections, and the user's file before against after."""

import dataclasses
import json
import math
import os
import time

import bmesh
import bpy
import numpy as np
import pytest
from bl_ext.kiln_test.kiln import capture, exr
from bl_ext.kiln_test.kiln.protocol import recipes
from bl_ext.kiln_test.kiln.protocol.errors import KilnError
from mathutils import Quaternion, Vector
from PIL import Image

QUICK = recipes.Capture(views=6, size=48, holdout=0, samples=4)


# Scenes and pictures


def add(kind="cube", **options):
    """A primitive at the origin, alone selected and active."""
    getattr(bpy.ops.mesh, f"primitive_{kind}_add")(**options)
    return bpy.context.object


def material(name="material"):
    """A new material with its default Principled node, and that node."""
    made = bpy.data.materials.new(name)
    if bpy.app.version < (5, 0, 0):
        made.use_nodes = True
    return made, made.node_tree.nodes["Principled BSDF"]


def plain(color, name="plain"):
    made, shader = material(name)
    shader.inputs["Base Color"].default_value = (*color, 1)
    return made


def take(folder, p=QUICK, **what):
    inputs, source = capture.capture(capture.subject(bpy.context, **what), p, folder)
    return json.loads((folder / "transforms.json").read_text()), inputs, source


def pictures(folder, table):
    """Linear colour (V, H, W, 3) and alpha (V, H, W) of a capture."""
    pixels = np.stack([np.asarray(Image.open(folder / frame["file_path"]), np.float64) / 255 for frame in table["frames"]])
    color = pixels[..., :3]
    return np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4), pixels[..., 3]


def geometry(folder, table):
    loaded = [np.load(folder / frame["geometry_file_path"]) for frame in table["frames"]]
    return np.stack([each["depth"] for each in loaded]), np.stack([each["normal"] for each in loaded]).astype(np.float64)


def surfaces(folder, table):
    """Roughness, metallic and opacity (V, H, W, 3) in [0, 1], and emission (V, H, W, 3), of a capture."""
    loaded = [np.load(folder / frame["material_file_path"]) for frame in table["frames"]]
    material = np.stack([each["material"] for each in loaded])
    assert material.dtype == np.uint8
    emission = [each["emission"] if "emission" in each else np.zeros(material.shape[1:]) for each in loaded]
    return material / 255, np.stack(emission).astype(np.float64)


def rays(table, frame):
    """Origin (3,), axis (3,) and unit directions (H, W, 3) of the rays through a view's pixel centres, from the file alone."""
    matrix = np.array(frame["transform_matrix"])
    u, v = np.meshgrid(np.arange(table["w"]) + 0.5, np.arange(table["h"]) + 0.5)
    local = np.stack([(u - table["cx"]) / table["fl_x"], -(v - table["cy"]) / table["fl_y"], -np.ones_like(u)], -1)
    directions = local @ matrix[:3, :3].T
    return matrix[:3, 3], -matrix[:3, 2], directions / np.linalg.norm(directions, axis=-1, keepdims=True)


def inside(alpha):
    """Pixels well away from any edge."""
    full = alpha == 1
    for axis in (-2, -1):
        full = full & np.roll(full, 1, axis) & np.roll(full, -1, axis)
    return full


def bounds(folder, table):
    """The box of everything that depth shows, in metres."""
    depth, _ = geometry(folder, table)
    points = []
    for frame, picture in zip(table["frames"], depth, strict=True):
        eye, axis, directions = rays(table, frame)
        points.append((eye + directions * (picture / (directions @ axis))[..., None])[picture > 0])
    points = np.concatenate(points)
    return points.min(0), points.max(0)


# Cameras and geometry


@pytest.mark.oldest
@pytest.mark.parametrize("unit_scale", [1.0, 0.01])
def test_depth_and_normals_are_those_of_a_ray_through_each_pixels_centre(tmp_path, unit_scale):
    """A ray cast in the scene sees the same surface, at the same place and with the same normal; files are in metres."""
    monkey = add("monkey", location=(3, -2, 1), rotation=(0.3, 0.2, 1))
    bpy.ops.object.shade_flat()
    scene = bpy.context.scene
    scene.unit_settings.scale_length = unit_scale
    table, _, _ = take(tmp_path)
    depth, normal = geometry(tmp_path, table)
    tree = bpy.context.evaluated_depsgraph_get()
    hits = misses = 0
    distances, angles = [], []
    for frame, seen, facing in zip(table["frames"], depth, normal, strict=True):
        eye, axis, directions = rays(table, frame)
        for row in range(0, 48, 3):
            for column in range(0, 48, 3):
                direction = directions[row, column]
                hit, place, there, _, thing, _ = scene.ray_cast(tree, Vector(eye / unit_scale), Vector(direction))
                if not hit or not seen[row, column]:
                    misses += hit != bool(seen[row, column])
                    continue
                hits += 1
                assert thing == monkey
                distances.append((np.array(place) * unit_scale - eye) @ axis - seen[row, column])
                turned = np.array(there) * -np.sign(np.array(there) @ direction)  # Cycles turns normals towards the camera
                angles.append(turned @ facing[row, column])
    assert hits > 300 and misses <= 2
    assert np.median(np.abs(distances)) < 1e-5 * unit_scale * 5
    assert np.quantile(np.abs(distances), 0.99) < 1e-3 * unit_scale * 5
    assert np.quantile(angles, 0.02) > 0.999


@pytest.mark.parametrize("count", [4, 5, 6, 8, 12, 16, 24, 48, 100, 200])
def test_cameras_surround_the_subject(count):
    """No direction is much farther from a camera than a best possible arrangement allows, top and bottom included."""
    directions = capture.directions(count)
    assert directions.shape == (count, 3) and np.allclose(np.linalg.norm(directions, axis=1), 1)
    random = np.random.default_rng(1).normal(size=(5000, 3))
    random /= np.linalg.norm(random, axis=1, keepdims=True)
    gap = np.arccos((random @ directions.T).max(1).min())
    ideal = math.acos(1 - 2 / count)  # radius of `count` caps that would cover the sphere without overlap
    assert gap < 1.75 * ideal


def test_held_out_views_lie_between_the_others_and_follow_the_seed():
    fitted = capture.directions(24)
    held = capture.between(fitted, 6, seed=0)
    nearest = np.degrees(np.arccos((held @ fitted.T).max(1)))
    assert nearest.min() > 12
    assert np.array_equal(held, capture.between(fitted, 6, seed=0))
    assert not np.allclose(held, capture.between(fitted, 6, seed=1))


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("size", "place"), [(0.02, (0, 0, 0)), (2.0, (10_000, -10_000, 300)), (300.0, (0, 0, 0))], ids=["2 cm", "10 km away", "300 m"]
)
def test_every_view_just_holds_the_subject_at_any_size_and_place(tmp_path, size, place):
    """All axes meet in the middle of the sphere around the subject, which fills the views; nothing is cut or clipped."""
    add("uv_sphere", radius=size / 2, location=place, segments=64, ring_count=32)
    table, _, _ = take(tmp_path, dataclasses.replace(QUICK, size=96))
    _, alpha = pictures(tmp_path, table)
    edge = np.concatenate([alpha[:, 0], alpha[:, -1], alpha[:, :, 0], alpha[:, :, -1]], 1)
    assert edge.max() < 0.3  # a pixel filter reaches over the margin, with one sample in four at most
    assert alpha.mean() > 0.9 * math.pi / 4  # a disk that touches all four sides, less the margin
    for frame in table["frames"]:
        matrix = np.array(frame["transform_matrix"])
        towards = np.array(place) - matrix[:3, 3]
        assert -matrix[:3, 2] @ towards / np.linalg.norm(towards) > 1 - 1e-5
    depth, _ = geometry(tmp_path, table)
    assert ((depth > 0) == (alpha > 0.5)).mean() > 0.97
    low, high = bounds(tmp_path, table)
    assert np.allclose(high - low, size, rtol=0.05)


def test_bounding_sphere_is_close_to_the_smallest():
    points = np.random.default_rng(0).normal(size=(400, 3))
    points *= np.array([3, 1, 0.2]) / np.linalg.norm(points, axis=1, keepdims=True)
    points = np.concatenate([points, [[3, 0, 0], [-3, 0, 0]]]) + 7
    centre, radius = capture.bounding_sphere(points)
    assert np.linalg.norm(points - centre, axis=1).max() <= radius * (1 + 1e-9)
    assert radius == pytest.approx(3, rel=0.01)


@pytest.mark.oldest
def test_files_are_complete_and_the_same_every_time(tmp_path):
    add("monkey")
    p = dataclasses.replace(QUICK, holdout=2, size=64)
    table, inputs, source = take(tmp_path / "a", p)
    _, again, source_again = take(tmp_path / "b", p)
    assert [frame["split"] for frame in table["frames"]] == ["train"] * 6 + ["holdout"] * 2
    assert set(inputs) == {path.name for path in (tmp_path / "a").iterdir()} and len(inputs) == 25
    assert all(inputs[name].read_bytes() == again[name].read_bytes() for name in inputs)
    assert source == source_again
    assert json.loads(json.dumps(source)) == source
    assert Image.open(inputs["color_000.png"]).mode == "RGBA"
    assert not any("geometry" in name for name in take(tmp_path / "c", dataclasses.replace(QUICK, geometry=False))[1])


def test_alpha_is_soft_and_straight(tmp_path):
    """Edge pixels are covered in part, and keep the colour of the surface."""
    add("uv_sphere").data.materials.append(plain((0.9, 0.2, 0.05)))
    table, _, _ = take(tmp_path, dataclasses.replace(QUICK, samples=16))
    color, alpha = pictures(tmp_path, table)
    partly = (alpha > 0.2) & (alpha < 0.8)
    assert partly.sum() > 100
    assert np.allclose(color[partly], (0.9, 0.2, 0.05), atol=0.02)


# Base colour


def in_group(tree, name, build):
    """A group node in `tree` whose group is made by build(group tree, group output)."""
    group = bpy.data.node_groups.new(name, "ShaderNodeTree")
    group.interface.new_socket("Shader", in_out="OUTPUT", socket_type="NodeSocketShader")
    group.interface.new_socket("Tint", in_out="INPUT", socket_type="NodeSocketColor")
    group.interface.new_socket("Inner", in_out="INPUT", socket_type="NodeSocketShader")
    given, result = group.nodes.new("NodeGroupInput"), group.nodes.new("NodeGroupOutput")
    build(group, given, result)
    node = tree.nodes.new("ShaderNodeGroup")
    node.node_tree = group
    return node


def diffuse(tree, color):
    node = tree.nodes.new("ShaderNodeBsdfDiffuse")
    node.inputs["Color"].default_value = (*color, 1)
    return node.outputs[0]


def graph_principled_metal(tree, shader, output):
    shader.inputs["Base Color"].default_value = (0.2, 0.4, 0.6, 1)
    shader.inputs["Metallic"].default_value = 1.0
    shader.inputs["Emission Strength"].default_value = 5.0
    return (0.2, 0.4, 0.6)


def graph_mixed(tree, shader, output):
    shader.inputs["Base Color"].default_value = (0.8, 0.0, 0.4, 1)
    mix = tree.nodes.new("ShaderNodeMixShader")
    mix.inputs[0].default_value = 0.25
    tree.links.new(shader.outputs[0], mix.inputs[1])
    tree.links.new(diffuse(tree, (0.1, 0.5, 0.0)), mix.inputs[2])
    tree.links.new(mix.outputs[0], output.inputs[0])
    return (0.625, 0.125, 0.3)


def graph_glass_and_glow(tree, shader, output):
    glass, glow, add = (tree.nodes.new(kind) for kind in ("ShaderNodeBsdfGlass", "ShaderNodeEmission", "ShaderNodeAddShader"))
    glass.inputs["Color"].default_value = (0.3, 0.3, 0.3, 1)
    glow.inputs["Color"].default_value = (0.1, 0.2, 0.3, 1)
    glow.inputs["Strength"].default_value = 50
    tree.links.new(glass.outputs[0], add.inputs[0])
    tree.links.new(glow.outputs[0], add.inputs[1])
    tree.links.new(add.outputs[0], output.inputs[0])
    return (0.4, 0.5, 0.6)


def graph_nested_groups(tree, shader, output):
    def inner(group, given, result):
        node = group.nodes.new("ShaderNodeBsdfGlossy")
        group.links.new(given.outputs["Tint"], node.inputs["Color"])
        mix = group.nodes.new("ShaderNodeMixShader")
        group.links.new(node.outputs[0], mix.inputs[1])
        group.links.new(given.outputs["Inner"], mix.inputs[2])
        group.links.new(mix.outputs[0], result.inputs[0])

    def outer(group, given, result):
        node = in_group(group, "inner", inner)
        group.links.new(given.outputs["Tint"], node.inputs["Tint"])
        group.links.new(given.outputs["Inner"], node.inputs["Inner"])
        group.links.new(node.outputs[0], result.inputs[0])

    node = in_group(tree, "outer", outer)
    node.inputs["Tint"].default_value = (0.6, 0.2, 0.0, 1)
    tree.links.new(diffuse(tree, (0.0, 0.2, 0.8)), node.inputs["Inner"])
    tree.links.new(node.outputs[0], output.inputs[0])
    return (0.3, 0.2, 0.4)


def graph_reroute_mute_and_second_output(tree, shader, output):
    """Through a reroute and a muted mix; and the output for EEVEE does not count."""
    reroute, mix, other = (tree.nodes.new(kind) for kind in ("NodeReroute", "ShaderNodeMixShader", "ShaderNodeOutputMaterial"))
    mix.mute = True
    other.target = "EEVEE"
    tree.links.new(diffuse(tree, (1, 1, 1)), other.inputs[0])
    tree.links.new(diffuse(tree, (0.5, 0.25, 0.75)), reroute.inputs[0])
    tree.links.new(reroute.outputs[0], mix.inputs[1])
    tree.links.new(mix.outputs[0], output.inputs[0])
    return (0.5, 0.25, 0.75)


def graph_vertex_colors(tree, shader, output):
    mesh = bpy.context.object.data
    colors = mesh.attributes.new("paint", "FLOAT_COLOR", "CORNER").data
    colors.foreach_set("color", [0.7, 0.1, 0.3, 1.0] * len(colors))
    node = tree.nodes.new("ShaderNodeVertexColor")
    node.layer_name = "paint"
    tree.links.new(node.outputs[0], shader.inputs["Base Color"])
    return (0.7, 0.1, 0.3)


def graph_texture(tree, shader, output):
    image = bpy.data.images.new("texture", 4, 4)
    image.colorspace_settings.name = "Non-Color"
    image.pixels[:] = [0.25, 0.5, 0.125, 1.0] * 16
    node = tree.nodes.new("ShaderNodeTexImage")
    node.image = image
    tree.links.new(node.outputs[0], shader.inputs["Base Color"])
    return (0.25, 0.5, 0.125)


def graph_subsurface_with_displacement(tree, shader, output):
    """Displacement stays: it is shape, not light."""
    shader.inputs["Base Color"].default_value = (0.3, 0.6, 0.1, 1)
    node = tree.nodes.new("ShaderNodeDisplacement")
    node.inputs["Height"].default_value = 0.7
    tree.links.new(node.outputs[0], output.inputs["Displacement"])
    return (0.3, 0.6, 0.1)


GRAPHS = [value for name, value in list(globals().items()) if name.startswith("graph_")]


@pytest.mark.oldest
@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.__name__.removeprefix("graph_"))
def test_base_color_of_any_shader_graph_is_exact_and_the_graph_stays_as_it_was(tmp_path, graph):
    thing = add("uv_sphere")
    made, shader = material()
    tree = made.node_tree
    expected = graph(tree, shader, tree.nodes["Material Output"])
    thing.data.materials.append(made)
    tree.nodes.active = shader
    before = contents(tree)
    table, _, _ = take(tmp_path)
    color, alpha = pictures(tmp_path, table)
    seen = color[inside(alpha)]
    assert len(seen) > 1000
    assert np.abs(seen - expected).max() < 0.006  # half a step of 8 bits is 0.0045 in linear values at the bright end
    assert contents(tree) == before


def contents(tree):
    """Everything in a node tree and its groups: nodes in order with their values and flags, links in order."""
    nodes = []
    for node in tree.nodes:
        flags = (node.name, node.bl_idname, node.select, node.mute, tuple(node.location), getattr(node, "is_active_output", None))
        given = [socket.default_value for socket in node.inputs if hasattr(socket, "default_value")]
        values = [str(tuple(value) if hasattr(value, "__len__") else value) for value in given]
        inner = contents(node.node_tree) if getattr(node, "node_tree", None) else None
        nodes.append((flags, values, inner))
    links = [(k.from_node.name, k.from_socket.identifier, k.to_node.name, k.to_socket.identifier, k.is_muted) for k in tree.links]
    return nodes, links, tree.nodes.active and tree.nodes.active.name


def test_transparency_is_alpha(tmp_path):
    """Principled's Alpha, and a Transparent shader in a mix, both uncover in part."""
    near = {}
    for name in ("principled", "mixed"):
        bpy.ops.wm.read_homefile(use_factory_startup=True, use_empty=True)
        thing = add("plane")
        made, shader = material()
        shader.inputs["Base Color"].default_value = (0.2, 0.6, 0.4, 1)
        if name == "principled":
            shader.inputs["Alpha"].default_value = 0.5
        else:
            tree = made.node_tree
            mix = tree.nodes.new("ShaderNodeMixShader")
            tree.links.new(tree.nodes.new("ShaderNodeBsdfTransparent").outputs[0], mix.inputs[1])
            tree.links.new(shader.outputs[0], mix.inputs[2])
            tree.links.new(mix.outputs[0], tree.nodes["Material Output"].inputs[0])
        thing.data.materials.append(made)
        table, _, _ = take(tmp_path / name, dataclasses.replace(QUICK, samples=64))
        color, alpha = pictures(tmp_path / name, table)
        middle = alpha[0, 20:28, 20:28], color[0, 20:28, 20:28]  # view 0 looks down from the pole
        near[name] = middle[0].mean()
        assert np.allclose(middle[1], (0.2, 0.6, 0.4), atol=0.03)
    assert near["principled"] == pytest.approx(0.5, abs=0.05)
    assert near["mixed"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.oldest
def test_surfaces_without_material_are_grey_and_get_none(tmp_path):
    """Alone, beside a painted object, and as an empty slot."""
    bare = add("uv_sphere")
    table, _, _ = take(tmp_path / "alone")
    color, alpha = pictures(tmp_path / "alone", table)
    assert np.abs(color[inside(alpha)] - 0.8).max() < 0.006
    slotted = add("uv_sphere", location=(3, 0, 0))
    slotted.data.materials.append(None)
    painted = add("uv_sphere", location=(6, 0, 0))
    painted.data.materials.append(plain((0.8, 0, 0)))
    table, _, _ = take(tmp_path / "three", objects=[bare, slotted, painted])
    color, alpha = pictures(tmp_path / "three", table)
    seen = color[inside(alpha)]
    grey, red = np.abs(seen - 0.8).max(1) < 0.01, np.abs(seen - (0.8, 0, 0)).max(1) < 0.01
    assert grey.sum() > 1.5 * red.sum() > 100
    assert (grey | red).mean() > 0.95  # the rest are pixels where one hides another in part
    assert len(bare.data.materials) == 0 and slotted.data.materials[:] == [None] and not bare.material_slots


@pytest.mark.oldest
@pytest.mark.parametrize("mode", ["OBJECT", "EDIT"])
def test_faces_without_slots_keep_their_material_indices(tmp_path, mode):
    bare = add("cube")
    wanted = [0, 1, 2, 1, 0, 3]
    bare.data.attributes.new("material_index", "INT", "FACE").data.foreach_set("value", wanted)
    painted = add("cube", location=(3, 0, 0))
    painted.data.materials.append(plain((0.8, 0, 0)))
    bpy.context.view_layer.objects.active = bare
    bpy.ops.object.mode_set(mode=mode)
    take(tmp_path, objects=[bare, painted])
    bpy.ops.object.mode_set(mode="OBJECT")
    assert [face.material_index for face in bare.data.polygons] == wanted and not bare.material_slots


@pytest.mark.skipif(bpy.app.version >= (5, 0, 0), reason="every material has nodes from 5.0 on")
@pytest.mark.oldest
def test_material_without_nodes_shows_its_viewport_color(tmp_path):
    thing = add("uv_sphere")
    made = bpy.data.materials.new("no nodes")
    made.diffuse_color = (0.1, 0.7, 0.2, 1)
    thing.data.materials.append(made)
    table, _, _ = take(tmp_path)
    color, alpha = pictures(tmp_path, table)
    assert np.abs(color[inside(alpha)] - (0.1, 0.7, 0.2)).max() < 0.006
    assert thing.data.materials[:] == [made] and made.node_tree is None and not made.use_nodes and made.users == 1


def test_view_settings_of_the_scene_do_not_matter(tmp_path):
    thing = add("uv_sphere")
    thing.data.materials.append(plain((0.5, 0.3, 0.1)))
    scene = bpy.context.scene
    scene.view_settings.view_transform, scene.view_settings.exposure, scene.view_settings.gamma = "AgX", 2, 1.5
    scene.cycles.film_exposure, scene.render.resolution_percentage, scene.render.use_border = 3, 20, True
    scene.render.pixel_aspect_x, scene.render.use_stamp = 2, True
    scene.timeline_markers.new("cut", frame=1).camera = bpy.data.objects.new("other", bpy.data.cameras.new("other"))
    table, _, _ = take(tmp_path)
    color, alpha = pictures(tmp_path, table)
    assert np.abs(color[inside(alpha)] - (0.5, 0.3, 0.1)).max() < 0.006


@pytest.mark.parametrize("engine", ["cycles", pytest.param("eevee", marks=pytest.mark.long)])
def test_lit_color_follows_the_scenes_lights_without_its_other_objects(tmp_path, engine):
    """From above, where the sun stands, all is bright; from the side only the upper half is; the wall beside is not seen."""
    thing = add("uv_sphere")
    thing.data.materials.append(plain((0.8, 0.8, 0.8)))
    sun = bpy.data.objects.new("sun", bpy.data.lights.new("sun", "SUN"))
    sun.data.energy = 3
    bpy.context.scene.collection.objects.link(sun)
    wall = add("cube", location=(2.5, 0, 0))
    p = recipes.Capture(views=6, size=24, holdout=0, samples=1 if engine == "eevee" else 16, color=engine, geometry=False)
    work = capture.Capture(capture.subject(bpy.context, objects=[thing]), p, tmp_path)
    while work.done < 2:  # EEVEE takes seconds a view without a graphics card
        work.step()
    (above, side), (cover, _) = pictures(tmp_path, {"frames": [{"file_path": f"color_00{view}.png"} for view in (0, 1)]})
    assert above[8:16, 8:16].mean() > 0.4
    assert side[4:10, 8:16].mean() > 4 * side[14:20, 8:16].mean()
    assert cover.mean() < 0.8 and wall.name in bpy.context.scene.objects


# Materials


def say_principled(tree, shader, output):
    shader.inputs["Roughness"].default_value, shader.inputs["Metallic"].default_value = 0.3, 0.7
    shader.inputs["Emission Color"].default_value, shader.inputs["Emission Strength"].default_value = (0.2, 0.5, 1.0, 1), 3.0
    return (0.3, 0.7, 1.0), (0.6, 1.5, 3.0)


def say_mixed(tree, shader, output):
    """Three quarters of a polished metal, one of chalk."""
    shader.inputs["Roughness"].default_value, shader.inputs["Metallic"].default_value = 0.2, 1.0
    mix = tree.nodes.new("ShaderNodeMixShader")
    mix.inputs[0].default_value = 0.25
    tree.links.new(shader.outputs[0], mix.inputs[1])
    tree.links.new(diffuse(tree, (0.1, 0.5, 0.0)), mix.inputs[2])
    tree.links.new(mix.outputs[0], output.inputs[0])
    return (0.4, 0.75, 1.0), (0, 0, 0)


def say_nested_groups(tree, shader, output):
    """Twice the same group at other roughness, one in the other; a shader and a lamp enter from outside."""

    def build(group):
        group.interface.new_socket("Shader", in_out="OUTPUT", socket_type="NodeSocketShader")
        group.interface.new_socket("Sheen", in_out="INPUT", socket_type="NodeSocketFloat")
        group.interface.new_socket("Inner", in_out="INPUT", socket_type="NodeSocketShader")
        given, result, glossy, mix = (
            group.nodes.new(kind) for kind in ("NodeGroupInput", "NodeGroupOutput", "ShaderNodeBsdfAnisotropic", "ShaderNodeMixShader")
        )
        group.links.new(given.outputs["Sheen"], glossy.inputs["Roughness"])
        group.links.new(glossy.outputs[0], mix.inputs[1])
        group.links.new(given.outputs["Inner"], mix.inputs[2])
        group.links.new(mix.outputs[0], result.inputs[0])

    half = bpy.data.node_groups.new("half", "ShaderNodeTree")
    build(half)
    outer = bpy.data.node_groups.new("outer", "ShaderNodeTree")
    outer.interface.new_socket("Shader", in_out="OUTPUT", socket_type="NodeSocketShader")
    outer.interface.new_socket("Inner", in_out="INPUT", socket_type="NodeSocketShader")
    given, result, node = (outer.nodes.new(kind) for kind in ("NodeGroupInput", "NodeGroupOutput", "ShaderNodeGroup"))
    node.node_tree = half
    node.inputs["Sheen"].default_value = 0.8
    outer.links.new(given.outputs["Inner"], node.inputs["Inner"])
    outer.links.new(node.outputs[0], result.inputs[0])
    first, second, glow, add = (
        tree.nodes.new(kind) for kind in ("ShaderNodeGroup", "ShaderNodeGroup", "ShaderNodeEmission", "ShaderNodeAddShader")
    )
    first.node_tree, second.node_tree = half, outer
    first.inputs["Sheen"].default_value = 0.4
    glow.inputs["Color"].default_value, glow.inputs["Strength"].default_value = (1.0, 0.5, 0.25, 1), 8.0
    tree.links.new(diffuse(tree, (0, 0, 0)), add.inputs[0])
    tree.links.new(glow.outputs[0], add.inputs[1])
    tree.links.new(add.outputs[0], second.inputs["Inner"])
    tree.links.new(second.outputs[0], first.inputs["Inner"])
    tree.links.new(first.outputs[0], output.inputs[0])
    return (0.5 * 0.4 + 0.5 * (0.5 * 0.8 + 0.5 * 1.0), 0.75, 1.0), (2.0, 1.0, 0.5)


def say_half_clear(tree, shader, output):
    """What is there of the surface keeps its roughness and its light; its opacity says how much is there."""
    shader.inputs["Roughness"].default_value, shader.inputs["Metallic"].default_value, shader.inputs["Alpha"].default_value = 0.8, 0.4, 0.5
    shader.inputs["Emission Color"].default_value, shader.inputs["Emission Strength"].default_value = (1, 0.5, 0, 1), 2.0
    return (0.8, 0.4, 0.5), (2, 1, 0)


def say_mixed_with_transparent(tree, shader, output):
    shader.inputs["Roughness"].default_value, shader.inputs["Metallic"].default_value = 0.9, 0.2
    mix, clear = tree.nodes.new("ShaderNodeMixShader"), tree.nodes.new("ShaderNodeBsdfTransparent")
    clear.inputs["Color"].default_value = (1.0, 0.5, 0.0, 1)  # coloured: half of the light on average
    mix.inputs[0].default_value = 0.4
    tree.links.new(clear.outputs[0], mix.inputs[1])
    tree.links.new(shader.outputs[0], mix.inputs[2])
    tree.links.new(mix.outputs[0], output.inputs[0])
    return (0.9, 0.2, 0.7), (0, 0, 0)


def say_vertex_colors(tree, shader, output):
    colors = bpy.context.object.data.attributes.new("paint", "FLOAT_COLOR", "CORNER").data
    colors.foreach_set("color", [0.7, 0.1, 0.3, 1.0] * len(colors))
    node, parts = tree.nodes.new("ShaderNodeVertexColor"), tree.nodes.new("ShaderNodeSeparateColor")
    node.layer_name = "paint"
    tree.links.new(node.outputs[0], parts.inputs[0])
    tree.links.new(parts.outputs[0], shader.inputs["Roughness"])
    tree.links.new(parts.outputs[2], shader.inputs["Metallic"])
    return (0.7, 0.3, 1.0), (0, 0, 0)


def say_glass_and_glow(tree, shader, output):
    glass, glow, add = (tree.nodes.new(kind) for kind in ("ShaderNodeBsdfGlass", "ShaderNodeEmission", "ShaderNodeAddShader"))
    glass.inputs["Roughness"].default_value = 0.25
    glow.inputs["Color"].default_value, glow.inputs["Strength"].default_value = (0.1, 0.2, 0.3, 1), 50
    tree.links.new(glass.outputs[0], add.inputs[0])
    tree.links.new(glow.outputs[0], add.inputs[1])
    tree.links.new(add.outputs[0], output.inputs[0])
    return (0.25, 0.0, 1.0), (5, 10, 15)


def say_lamp(tree, shader, output):
    """As bright as a film set's: cut at what the file can hold."""
    glow = tree.nodes.new("ShaderNodeEmission")
    glow.inputs["Color"].default_value, glow.inputs["Strength"].default_value = (1.0, 0.001, 0.0, 1), 1e6
    tree.links.new(glow.outputs[0], output.inputs[0])
    return (1.0, 0.0, 1.0), (1e4, 1e3, 0)


def say_reroute_mute_and_second_output(tree, shader, output):
    reroute, mix, other = (tree.nodes.new(kind) for kind in ("NodeReroute", "ShaderNodeMixShader", "ShaderNodeOutputMaterial"))
    shader.inputs["Roughness"].default_value = 0.35
    mix.mute = True
    other.target = "EEVEE"
    tree.links.new(diffuse(tree, (1, 1, 1)), other.inputs[0])
    tree.links.new(shader.outputs[0], reroute.inputs[0])
    tree.links.new(reroute.outputs[0], mix.inputs[1])
    tree.links.new(mix.outputs[0], output.inputs[0])
    return (0.35, 0.0, 1.0), (0, 0, 0)


def say_out_of_range(tree, shader, output):
    """Cycles clamps what is linked; a texture's overshoot must not count in a mix either."""
    three, mix = tree.nodes.new("ShaderNodeValue"), tree.nodes.new("ShaderNodeMixShader")
    three.outputs[0].default_value = 3.0
    glossy = tree.nodes.new("ShaderNodeBsdfAnisotropic")
    glossy.inputs["Roughness"].default_value = 0.0
    for name in ("Roughness", "Metallic", "Alpha"):
        tree.links.new(three.outputs[0], shader.inputs[name])
    tree.links.new(shader.outputs[0], mix.inputs[1])
    tree.links.new(glossy.outputs[0], mix.inputs[2])
    tree.links.new(mix.outputs[0], output.inputs[0])
    return (0.5, 1.0, 1.0), (0, 0, 0)


def say_subsurface_with_displacement(tree, shader, output):
    shader.inputs["Subsurface Weight"].default_value, shader.inputs["Roughness"].default_value = 1.0, 0.15
    node = tree.nodes.new("ShaderNodeDisplacement")
    node.inputs["Height"].default_value = 0.7
    tree.links.new(node.outputs[0], output.inputs["Displacement"])
    return (0.15, 0.0, 1.0), (0, 0, 0)


SAYINGS = [value for name, value in list(globals().items()) if name.startswith("say_")]


@pytest.mark.oldest
@pytest.mark.parametrize("graph", SAYINGS, ids=lambda graph: graph.__name__.removeprefix("say_"))
def test_material_channels_of_any_shader_graph_are_exact_and_the_graph_stays_as_it_was(tmp_path, graph):
    thing = add("uv_sphere")
    made, shader = material()
    tree = made.node_tree
    expected, light = graph(tree, shader, tree.nodes["Material Output"])
    thing.data.materials.append(made)
    tree.nodes.active = shader
    before = contents(tree), len(bpy.data.node_groups), len(bpy.data.materials)
    table, _, _ = take(tmp_path)
    found, emission = surfaces(tmp_path, table)
    depth, _ = geometry(tmp_path, table)
    there = depth > 0
    assert there.sum() > 5000
    assert np.abs(found[there] - expected).max() < 0.003  # half a step of 8 bits is 0.002
    assert np.allclose(emission[there], light, rtol=1e-3)
    assert not found[~there].any() and not emission[~there].any()
    assert any(light) == any("emission" in np.load(tmp_path / frame["material_file_path"]) for frame in table["frames"])
    assert (contents(tree), len(bpy.data.node_groups), len(bpy.data.materials)) == before


@pytest.mark.parametrize(
    ("kind", "inputs", "expected"),
    [
        ("BsdfDiffuse", {"Roughness": 0.2}, (1, 0)),
        ("BsdfTranslucent", {}, (1, 0)),
        ("SubsurfaceScattering", {}, (1, 0)),
        ("BsdfSheen", {"Roughness": 0.3}, (1, 0)),
        ("BsdfToon", {"Size": 0.3}, (1, 0)),
        ("BsdfAnisotropic", {"Roughness": 0.3}, (0.3, 1)),
        ("BsdfRefraction", {"Roughness": 0.3}, (0.3, 0)),
        ("BsdfHair", {"RoughnessU": 0.3}, (0.3, 0)),
        ("BsdfHairPrincipled", {"Roughness": 0.3}, (0.3, 0)),
        ("BsdfMetallic", {"Roughness": 0.3}, (0.3, 1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_shaders_without_roughness_or_metallic_get_what_they_look_like(tmp_path, kind, inputs, expected):
    thing = add("uv_sphere")
    made, _ = material()
    if not hasattr(bpy.types, "ShaderNode" + kind):
        pytest.skip(f"this Blender has no {kind}")
    node = made.node_tree.nodes.new("ShaderNode" + kind)
    for name, value in inputs.items():
        node.inputs[name].default_value = value
    made.node_tree.links.new(node.outputs[0], made.node_tree.nodes["Material Output"].inputs[0])
    thing.data.materials.append(made)
    table, _, _ = take(tmp_path)
    found, _ = surfaces(tmp_path, table)
    there = found[..., 2] > 0
    assert there.sum() > 5000 and np.abs(found[there] - (*expected, 1)).max() < 0.003


def test_a_procedural_texture_is_what_a_render_of_it_shows(tmp_path):
    """Noise drives roughness and emission; rendered as plain emission by Blender alone, each pixel has the same value."""
    thing = add("monkey")
    made, shader = material()
    tree = made.node_tree
    noise = tree.nodes.new("ShaderNodeTexNoise")
    noise.inputs["Scale"].default_value = 3
    tree.links.new(noise.outputs[0], shader.inputs["Roughness"])
    tree.links.new(noise.outputs["Color"], shader.inputs["Emission Color"])
    shader.inputs["Emission Strength"].default_value = 2
    thing.data.materials.append(made)
    table, _, _ = take(tmp_path)
    found, emission = surfaces(tmp_path, table)
    glow = tree.nodes.new("ShaderNodeEmission")
    tree.links.new(glow.outputs[0], tree.nodes["Material Output"].inputs[0])
    for output, values in ((noise.outputs[0], np.repeat(found[..., :1], 3, -1)), (noise.outputs["Color"], emission / 2)):
        tree.links.new(output, glow.inputs["Color"])
        for view in (0, 1, 5):
            shown = rendered(table, table["frames"][view], tmp_path / "shown.exr")
            there = shown[..., 3] == 1
            assert there.sum() > 500 and shown[there][:, 0].std() > 0.05
            assert np.quantile(np.abs(shown[there][:, :3] - values[view][there]), 0.99) < 0.003


def rendered(table, frame, path):
    """Linear colour and alpha (H, W, 4) through the pixels' centres of a view, by Blender alone."""
    scene = bpy.context.scene
    camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    scene.collection.objects.link(camera)
    camera.matrix_world = np.array(frame["transform_matrix"]).T.tolist()
    camera.data.angle = 2 * math.atan(table["w"] / 2 / table["fl_x"])
    scene.camera, scene.render.engine, scene.render.film_transparent = camera, "CYCLES", True
    scene.cycles.samples, scene.cycles.max_bounces, scene.cycles.use_denoising = 1, 0, False
    scene.cycles.pixel_filter_type, scene.cycles.filter_width = "BOX", 0.01
    scene.render.resolution_x = scene.render.resolution_y = table["w"]
    settings = scene.render.image_settings
    if hasattr(settings, "media_type"):
        settings.media_type = "MULTI_LAYER_IMAGE"
    settings.file_format, settings.exr_codec, settings.color_depth = "OPEN_EXR_MULTILAYER", "ZIP", "32"
    if hasattr(settings, "use_exr_interleave"):
        settings.use_exr_interleave = True
    scene.render.filepath = str(path)
    bpy.ops.render.render(write_still=True)
    bpy.data.objects.remove(camera)
    channels = exr.read(path)
    return np.stack([channels[f"{scene.view_layers[0].name}.Combined.{one}"] for one in "RGBA"], -1)


@pytest.mark.oldest
@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.3, 1.0])
def test_a_hole_is_no_surface_and_a_pane_is_one(tmp_path, alpha):
    """Below a tenth, depth and material are those of what lies behind; above, those of the pane, and the opacity its own."""
    floor, pane = add("plane", size=4), add("plane", size=2, location=(0, 0, 1))
    for thing, rough, opacity in ((floor, 0.9, 1.0), (pane, 0.2, alpha)):
        made, shader = material()
        shader.inputs["Roughness"].default_value, shader.inputs["Alpha"].default_value = rough, opacity
        shader.inputs["Emission Color"].default_value, shader.inputs["Emission Strength"].default_value = (1, 1, 1, 1), rough
        thing.data.materials.append(made)
    table, _, _ = take(tmp_path, objects=[floor, pane])
    found, emission = surfaces(tmp_path, table)
    depth, _ = geometry(tmp_path, table)
    eye, _, _ = rays(table, table["frames"][0])  # from above
    middle = slice(20, 28)
    solid = alpha > 0.1
    assert np.allclose(eye[2] - depth[0, middle, middle], 1.0 if solid else 0.0, atol=1e-4)
    assert np.allclose(found[0, middle, middle], (0.2, 0, alpha) if solid else (0.9, 0, 1), atol=0.003)
    assert np.allclose(emission[0, middle, middle], 0.2 if solid else 0.9, rtol=1e-3)
    assert ((depth > 0) == (found[..., 2] > 0)).all()
    if solid:  # with nothing behind, the picture's alpha is the opacity
        table, _, _ = take(tmp_path / "alone", dataclasses.replace(QUICK, samples=64), objects=[pane])
        found, _ = surfaces(tmp_path / "alone", table)
        _, cover = pictures(tmp_path / "alone", table)
        assert np.allclose(found[0, middle, middle, 2], cover[0, middle, middle].mean(), atol=0.03)


def test_surfaces_without_a_material_have_blenders_default(tmp_path):
    bare, slotted, painted = add("uv_sphere"), add("uv_sphere", location=(3, 0, 0)), add("uv_sphere", location=(6, 0, 0))
    slotted.data.materials.append(None)
    made, shader = material()
    shader.inputs["Roughness"].default_value, shader.inputs["Metallic"].default_value = 0.1, 1
    painted.data.materials.append(made)
    for name, things in (("alone", [bare]), ("three", [bare, slotted, painted])):
        table, _, _ = take(tmp_path / name, objects=things)
        found, _ = surfaces(tmp_path / name, table)
        depth, _ = geometry(tmp_path / name, table)
        seen = found[depth > 0]
        default, metal = np.abs(seen - (0.5, 0, 1)).max(1) < 0.003, np.abs(seen - (0.1, 1, 1)).max(1) < 0.003
        assert (default | metal).all() and default.sum() > 500 and metal.any() == (name == "three")


@pytest.mark.skipif(bpy.app.version >= (5, 0, 0), reason="every material has nodes from 5.0 on")
@pytest.mark.oldest
def test_material_without_nodes_has_its_own_roughness_and_metallic(tmp_path):
    thing = add("uv_sphere")
    made = bpy.data.materials.new("no nodes")
    made.roughness, made.metallic = 0.7, 0.25
    thing.data.materials.append(made)
    table, _, _ = take(tmp_path)
    found, _ = surfaces(tmp_path, table)
    assert np.abs(found[found[..., 2] > 0] - (0.7, 0.25, 1)).max() < 0.003
    assert thing.data.materials[:] == [made] and made.node_tree is None and made.users == 1


def rough(roughness, metallic, name="rough"):
    made, shader = material(name)
    shader.inputs["Roughness"].default_value, shader.inputs["Metallic"].default_value = roughness, metallic
    return made


@pytest.mark.oldest
def test_material_channels_reach_instances_hair_and_linked_materials(tmp_path):
    """Geometry nodes' Set Material on instances, particle hair, and a material that lives in another file."""
    thing = add("plane")
    group = bpy.data.node_groups.new("scatter", "GeometryNodeTree")
    group.interface.new_socket("Geometry", in_out="INPUT", socket_type="NodeSocketGeometry")
    group.interface.new_socket("Geometry", in_out="OUTPUT", socket_type="NodeSocketGeometry")
    given, points, cube, paint, result = (
        group.nodes.new(kind)
        for kind in ("NodeGroupInput", "GeometryNodeInstanceOnPoints", "GeometryNodeMeshCube", "GeometryNodeSetMaterial", "NodeGroupOutput")
    )
    paint.inputs["Material"].default_value = rough(0.15, 0.6)
    group.links.new(given.outputs[0], points.inputs["Points"])
    group.links.new(cube.outputs[0], paint.inputs["Geometry"])
    group.links.new(paint.outputs[0], points.inputs["Instance"])
    group.links.new(points.outputs[0], result.inputs[0])
    thing.modifiers.new("scatter", "NODES").node_group = group

    def check(name, things, expected):
        table, _, _ = take(tmp_path / name, objects=things)
        found, _ = surfaces(tmp_path / name, table)
        there = found[..., 2] > 0
        assert there.sum() > 500 and np.abs(found[there] - (*expected, 1)).max() < 0.003

    check("instances", [thing], (0.15, 0.6))
    ball = add("uv_sphere", radius=0.5)
    ball.data.materials.append(rough(0.85, 0.3))
    bpy.ops.object.particle_system_add()
    settings = ball.particle_systems[0].settings
    settings.type, settings.count, settings.hair_length = "HAIR", 300, 1.0
    ball.show_instancer_for_render = False
    check("hair", [ball], (0.85, 0.3))
    owned = add("uv_sphere")
    owned.name = "library sphere"
    owned.data.materials.append(rough(0.45, 0.9, "library material"))
    path = tmp_path / "library.blend"
    bpy.data.libraries.write(str(path), {owned})
    bpy.ops.wm.read_homefile(use_factory_startup=True, use_empty=True)
    with bpy.data.libraries.load(str(path), link=True) as (_, here):
        here.objects = ["library sphere"]
    linked = here.objects[0]
    bpy.context.scene.collection.objects.link(linked)
    before = contents(linked.data.materials[0].node_tree)
    check("linked", [linked], (0.45, 0.9))
    assert linked.library is not None and contents(linked.data.materials[0].node_tree) == before


def test_an_imported_gltf_has_the_channels_of_its_maps_from_the_same_cameras(tmp_path):
    """Roughness and metallic packed in one image, a normal map and emission survive export and import; `like` takes the cameras over."""
    thing = add("cube", size=1)
    made, shader = material()
    tree = made.node_tree
    values = {"Roughness": (0.0, 0.6, 0.2), "Normal": (0.5, 0.5, 1.0), "Emission Color": (0.2, 0.4, 0.8)}
    for name, color in values.items():
        image = bpy.data.images.new(name, 4, 4)
        image.colorspace_settings.name = "Non-Color" if name != "Emission Color" else "sRGB"
        image.pixels[:] = [*color, 1.0] * 16
        image.file_format = "PNG"
        image.pack()
        node = tree.nodes.new("ShaderNodeTexImage")
        node.image = image
        if name == "Roughness":
            parts = tree.nodes.new("ShaderNodeSeparateColor")
            tree.links.new(node.outputs[0], parts.inputs[0])
            tree.links.new(parts.outputs[1], shader.inputs["Roughness"])
            tree.links.new(parts.outputs[2], shader.inputs["Metallic"])
        elif name == "Normal":
            bump = tree.nodes.new("ShaderNodeNormalMap")
            tree.links.new(node.outputs[0], bump.inputs["Color"])
            tree.links.new(bump.outputs[0], shader.inputs["Normal"])
        else:
            tree.links.new(node.outputs[0], shader.inputs["Emission Color"])
            shader.inputs["Emission Strength"].default_value = 4.0
    thing.data.materials.append(made)
    first = capture.Capture(capture.subject(bpy.context), QUICK, tmp_path / "first")
    while first.step():
        pass
    first.finish()
    bpy.ops.export_scene.gltf(filepath=str(tmp_path / "cube.glb"), export_format="GLB", use_selection=True)
    bpy.data.objects.remove(thing)
    bpy.ops.import_scene.gltf(filepath=str(tmp_path / "cube.glb"))
    again = capture.Capture(capture.subject(bpy.context), QUICK, tmp_path / "again", like=first)
    while again.step():
        pass
    again.finish()
    table, other = (json.loads((tmp_path / name / "transforms.json").read_text()) for name in ("first", "again"))
    assert table == other
    glow = np.array(values["Emission Color"])
    glow = np.where(glow <= 0.04045, glow / 12.92, ((glow + 0.055) / 1.055) ** 2.4) * 4
    for name in ("first", "again"):
        found, emission = surfaces(tmp_path / name, table)
        there = found[..., 2] > 0
        assert there.sum() > 3000
        assert np.abs(found[there] - (0.6, 0.2, 1)).max() < 0.005  # images have 8 bits, too
        assert np.allclose(emission[there], glow, rtol=0.02)
    depth, normal = geometry(tmp_path / "first", table)
    depths, normals = geometry(tmp_path / "again", table)
    both = (depth > 0) & (depths > 0)
    assert np.allclose(depth[both], depths[both], atol=1e-4) and np.quantile(np.abs(normal - normals)[both], 0.99) < 0.01


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({"materials": False}, {"color", "geometry"}),
        ({"geometry": False}, {"color", "material"}),
        ({"geometry": False, "materials": False}, {"color"}),
        ({"color": "cycles", "samples": 1}, {"color", "geometry"}),
    ],
    ids=["without materials", "without geometry", "colour alone", "lit"],
)
def test_only_what_is_asked_for_is_rendered(tmp_path, change, kinds):
    add("cube").data.materials.append(plain((0.8, 0.8, 0.8)))
    table, inputs, _ = take(tmp_path, dataclasses.replace(QUICK, size=16, **change))
    assert {name.split("_")[0] for name in inputs if name != "transforms.json"} == kinds
    assert {path.name for path in tmp_path.iterdir()} == set(inputs)
    for frame in table["frames"]:
        assert ("geometry_file_path" in frame, "material_file_path" in frame) == ("geometry" in kinds, "material" in kinds)


# Every kind of subject


def test_modifiers_count_as_they_render_not_as_the_viewport_shows_them(tmp_path):
    thing = add("cube", size=1)
    array = thing.modifiers.new("array", "ARRAY")
    array.count, array.show_viewport = 4, False
    hidden = thing.modifiers.new("only here", "ARRAY")
    hidden.count, hidden.show_render, hidden.relative_offset_displace = 4, False, (0, 1, 0)
    table, _, source = take(tmp_path)
    assert np.allclose(source["dimensions"], (4, 1, 1), atol=1e-4)
    low, high = bounds(tmp_path, table)
    assert np.allclose(high - low, (4, 1, 1), atol=0.15)


def test_targets_parents_and_drivers_outside_the_subject_act_but_are_not_seen(tmp_path):
    """A boolean's cutter, a parent, a constraint's target and a driver's object all stay out of the picture and do their work."""
    cutter = add("cube", size=1, location=(0, 0, 0.5))
    parent = bpy.data.objects.new("parent", None)
    target = bpy.data.objects.new("target", None)
    control = add("cube", location=(50, 0, 0))
    for empty in (parent, target):
        bpy.context.scene.collection.objects.link(empty)
    parent.location, target.location = (5, 0, 0), (0, 7, 0)
    thing = add("cube", size=1)
    thing.modifiers.new("cut", "BOOLEAN").object = cutter
    thing.parent = parent
    cutter.parent = parent
    constraint = thing.constraints.new("COPY_LOCATION")
    constraint.target, constraint.use_x, constraint.use_z = target, False, False
    thing.modifiers["cut"].solver = "EXACT"
    cutter.location.y = 7
    driver = thing.driver_add("scale", 0).driver
    driver.type = "SCRIPTED"
    variable = driver.variables.new()
    variable.name, variable.targets[0].id, variable.targets[0].data_path = "place", control, "location.x"
    driver.expression = "place / 50 * 2"
    bpy.context.view_layer.update()
    table, _, source = take(tmp_path, objects=[thing])
    low, high = bounds(tmp_path, table)
    # twice as wide by the driver, at (5, 7, 0) by parent and constraint, the upper half of the middle cut away
    assert np.allclose(low, (4, 6.5, -0.5), atol=0.1) and np.allclose(high, (6, 7.5, 0.5), atol=0.1)
    depth, _ = geometry(tmp_path, table)
    eye, axis, directions = rays(table, table["frames"][0])  # from above, into the cut
    middle = eye + directions[24, 24] * depth[0, 24, 24] / (directions[24, 24] @ axis)
    assert middle[2] == pytest.approx(0.0, abs=0.02)


def test_collections_instances_and_multi_selections_are_one_subject(tmp_path):
    inner = bpy.data.collections.new("inner")
    ball = add("uv_sphere", radius=0.5)
    inner.objects.link(ball)
    bpy.context.scene.collection.objects.unlink(ball)
    empty = bpy.data.objects.new("instance", None)
    empty.instance_type, empty.instance_collection, empty.location = "COLLECTION", inner, (10, 0, 0)
    bpy.context.scene.collection.objects.link(empty)
    _, _, source = take(tmp_path / "instance", objects=[empty])
    assert np.allclose(source["dimensions"], 1, atol=0.02) and source["location"] == pytest.approx([10, 0, 0])
    cube = add("cube", size=1, location=(13, 0, 0))
    _, _, source = take(tmp_path / "both", objects=[cube, empty])
    assert source["kind"] == "objects" and source["title"] == "Cube and 1 more"
    assert np.allclose(source["dimensions"], (4, 1, 1), atol=0.02)
    assert source["location"] == pytest.approx([11.5, 0, -0.5], abs=0.01) and source["rotation"] == [1, 0, 0, 0]
    group = bpy.data.collections.new("group")
    bpy.context.scene.collection.children.link(group)
    group.objects.link(cube)
    hidden = add("cube", size=20)
    hidden.hide_render = True
    group.objects.link(hidden)
    _, _, source = take(tmp_path / "collection", collection=group)
    assert source["title"] == "group" and np.allclose(source["dimensions"], 1, atol=1e-3)


@pytest.mark.oldest
def test_hair_and_particle_instances_are_seen_and_measured(tmp_path):
    """Hair longer than its ball widens the views; red hair is red; a particle system that shows only instances has a size too."""
    thing = add("uv_sphere", radius=0.5)
    thing.data.materials.append(plain((0.8, 0.05, 0.05)))
    bpy.ops.object.particle_system_add()
    settings = thing.particle_systems[0].settings
    settings.type, settings.count, settings.hair_length = "HAIR", 300, 1.0
    table, _, source = take(tmp_path / "hair", dataclasses.replace(QUICK, size=96))
    assert max(source["dimensions"]) > 2.4
    color, alpha = pictures(tmp_path / "hair", table)
    assert alpha[:, 48].max(0)[:30].max() > 0.3  # strands far outside of the ball
    assert np.abs(color[alpha > 0.5] - (0.8, 0.05, 0.05)).max() < 0.05
    leaf = add("cube", size=0.2, location=(30, 0, 0))
    settings.render_type, settings.instance_object, settings.particle_size = "OBJECT", leaf, 1.0
    thing.show_instancer_for_render = False
    _, _, source = take(tmp_path / "leaves", objects=[thing])
    assert 1.0 < max(source["dimensions"]) < 2.0


def test_geometry_nodes_materials_and_instances_are_seen(tmp_path):
    """A node group that replaces the mesh by instances of a cube with its own material."""
    thing = add("plane")
    group = bpy.data.node_groups.new("scatter", "GeometryNodeTree")
    group.interface.new_socket("Geometry", in_out="INPUT", socket_type="NodeSocketGeometry")
    group.interface.new_socket("Geometry", in_out="OUTPUT", socket_type="NodeSocketGeometry")
    given, points, cube, paint, result = (
        group.nodes.new(kind)
        for kind in ("NodeGroupInput", "GeometryNodeInstanceOnPoints", "GeometryNodeMeshCube", "GeometryNodeSetMaterial", "NodeGroupOutput")
    )
    paint.inputs["Material"].default_value = plain((0.1, 0.2, 0.7))
    group.links.new(given.outputs[0], points.inputs["Points"])
    group.links.new(cube.outputs[0], paint.inputs["Geometry"])
    group.links.new(paint.outputs[0], points.inputs["Instance"])
    group.links.new(points.outputs[0], result.inputs[0])
    thing.modifiers.new("scatter", "NODES").node_group = group
    table, _, source = take(tmp_path)
    assert np.allclose(source["dimensions"], (3, 3, 1), atol=1e-3)
    color, alpha = pictures(tmp_path, table)
    assert np.abs(color[inside(alpha)] - (0.1, 0.2, 0.7)).max() < 0.006


def test_curves_texts_and_metaballs_are_surfaces(tmp_path):
    bpy.ops.object.text_add()
    bpy.context.object.data.extrude = 0.1
    assert take(tmp_path / "text")[2]["dimensions"][2] == pytest.approx(0.2, abs=0.01)
    bpy.ops.curve.primitive_bezier_circle_add(radius=1)
    bpy.context.object.data.bevel_depth = 0.2
    assert take(tmp_path / "curve")[2]["dimensions"] == pytest.approx([2.4, 2.4, 0.4], abs=0.05)
    bpy.ops.object.metaball_add(radius=1)
    assert min(take(tmp_path / "meta")[2]["dimensions"]) > 0.5


def test_rigid_bodies_are_captured_where_they_have_fallen_to(tmp_path):
    thing = add("cube", size=1, location=(0, 0, 10))
    bpy.ops.rigidbody.world_add()
    bpy.ops.rigidbody.object_add()
    for frame in range(1, 21):
        bpy.context.scene.frame_set(frame)
    fallen = thing.matrix_world.translation.z
    table, _, source = take(tmp_path)
    low, high = bounds(tmp_path, table)
    assert fallen < 8 and (low[2] + high[2]) / 2 == pytest.approx(fallen, abs=0.05)
    assert source["location"][2] == pytest.approx(fallen, abs=1e-4)
    assert bpy.context.scene.frame_current == 20 and thing.matrix_world.translation.z == pytest.approx(fallen)


def test_animation_and_simplification_are_those_of_the_scene_at_its_frame(tmp_path):
    thing = add("cube", size=1)
    thing.location.x = 0
    thing.keyframe_insert("location", frame=1)
    thing.location.x = 10
    thing.keyframe_insert("location", frame=11)
    levels = thing.modifiers.new("fine", "SUBSURF")
    levels.render_levels = 3
    scene = bpy.context.scene
    scene.render.use_simplify, scene.render.simplify_subdivision_render = True, 0
    scene.frame_set(6)
    table, _, source = take(tmp_path)
    assert source["location"][0] == pytest.approx(5, abs=1e-4)
    low, high = bounds(tmp_path, table)
    assert np.allclose((low + high) / 2, (5, 0, 0), atol=0.03)
    assert source["dimensions"] == pytest.approx([1, 1, 1], abs=1e-4)  # subdivided, it would be smaller


def test_vertex_instances_of_children_are_seen(tmp_path):
    parent = add("plane", size=4)
    child = add("cube", size=1)
    child.parent = parent
    parent.instance_type, parent.show_instancer_for_render = "VERTS", False
    _, _, source = take(tmp_path, objects=[parent])
    assert np.allclose(source["dimensions"], (5, 5, 1), atol=1e-3)


@pytest.mark.oldest
def test_linked_and_overridden_objects_are_captured_and_stay_linked(tmp_path):
    thing = add("uv_sphere")
    thing.name = "library sphere"
    thing.data.materials.append(plain((0.6, 0.1, 0.2), "library material"))
    path = tmp_path / "library.blend"
    bpy.data.libraries.write(str(path), {thing})
    bpy.ops.wm.read_homefile(use_factory_startup=True, use_empty=True)
    with bpy.data.libraries.load(str(path), link=True) as (there, here):
        here.objects = there.objects
    linked = here.objects[0]
    bpy.context.scene.collection.objects.link(linked)
    before = contents(linked.data.materials[0].node_tree)
    table, _, _ = take(tmp_path / "linked", objects=[linked])
    color, alpha = pictures(tmp_path / "linked", table)
    assert np.abs(color[inside(alpha)] - (0.6, 0.1, 0.2)).max() < 0.006
    assert linked.library is not None and contents(linked.data.materials[0].node_tree) == before
    override = linked.override_create(remap_local_usages=True)
    override.location.x = 4
    bpy.context.view_layer.update()
    _, _, source = take(tmp_path / "override", objects=[override])
    assert source["location"] == pytest.approx([4, 0, 0])


@pytest.mark.oldest
def test_edit_mode_is_captured_as_it_stands_and_not_left(tmp_path):
    thing = add("cube", size=1)
    bpy.ops.object.mode_set(mode="EDIT")
    mesh = bmesh.from_edit_mesh(thing.data)
    bmesh.ops.translate(mesh, verts=[v for v in mesh.verts if v.co.z > 0], vec=(0, 0, 3))
    bmesh.update_edit_mesh(thing.data)
    table, _, source = take(tmp_path)
    assert source["dimensions"] == pytest.approx([1, 1, 4])
    low, high = bounds(tmp_path, table)
    assert np.allclose(high - low, (1, 1, 4), atol=0.2)
    assert thing.mode == "EDIT"
    thing.select_set(False)
    assert capture.subject(bpy.context).title == "Cube"  # in Edit mode the object counts without being selected


# What cannot be captured


def refusal(tmp_path, **what):
    with pytest.raises(KilnError) as error:
        take(tmp_path, **what)
    return error.value


@pytest.mark.oldest
def test_each_impossible_subject_gets_its_sentence(tmp_path):
    scene = bpy.context.scene

    def only(thing):
        if thing.name not in scene.objects:
            scene.collection.objects.link(thing)
        for other in scene.objects:
            other.select_set(other == thing)
        bpy.context.view_layer.objects.active = thing
        return refusal(tmp_path)

    bpy.ops.object.select_all(action="DESELECT")
    nothing = refusal(tmp_path)
    assert (nothing.code, nothing.message) == ("nothing-selected", "Nothing is selected.")
    camera = only(bpy.data.objects.new("Camera", bpy.data.cameras.new("Camera")))
    assert (camera.code, camera.message) == ("bad-subject", "Camera is a camera: it has no surface to rebuild.")
    assert only(bpy.data.objects.new("Sun", bpy.data.lights.new("Sun", "SUN"))).message == "Sun is a light: it has no surface to rebuild."
    assert only(bpy.data.objects.new("Empty", None)).message == "Empty is an empty: it has no surface to rebuild."
    assert only(bpy.data.objects.new("Bare", bpy.data.meshes.new("Bare"))).message == "Bare has no faces, hair or instances that render."
    wire = add("circle")
    assert only(wire).message == "Circle has no faces, hair or instances that render."
    hidden = add("cube")
    hidden.hide_render = True
    assert only(hidden).message == "Cube is hidden in renders."
    point = add("cube")
    point.name, point.scale = "Point", (0, 0, 0)
    assert only(point).message == "Point has no size: all its points lie in one place."
    glass = add("cube")
    glass.name = "Glass"
    glass.visible_camera = False
    assert only(glass).message == "Glass renders as nothing: every view is empty."
    empty = bpy.data.collections.new("Nothing in it")
    assert refusal(tmp_path, collection=empty).message == "Collection Nothing in it is empty."
    stray = bpy.data.objects.new("Stray", bpy.data.meshes.new("Stray"))
    assert refusal(tmp_path, objects=[stray]).message == "Stray is not in scene Scene."
    assert all(error.hint for error in (nothing, camera))


def test_what_is_selected_is_soon_known_even_of_thousands():
    """The panel asks at every redraw. Twice the objects take about twice the time, not four times."""
    mesh = bpy.data.meshes.new("shared")
    seconds = []
    for _ in range(2):
        for _ in range(3000):
            thing = bpy.data.objects.new("one", mesh)
            bpy.context.scene.collection.objects.link(thing)
            thing.select_set(True)
        times = []
        for _ in range(3):
            started = time.process_time()  # not the wall clock: other programs run too
            subject = capture.subject(bpy.context)
            times.append(time.process_time() - started)
        seconds.append(min(times))
    assert len(subject.objects) == 6000 and seconds[1] < 3 * seconds[0] + 0.01


def test_thousands_of_instances_are_measured_in_little_memory(tmp_path):
    """2000 instances of 500 points: as wide as they stand, while only their extremes are kept."""
    mesh = bpy.data.meshes.new("ground")
    side = np.arange(2000) % 100
    mesh.from_pydata(np.stack([side, np.arange(2000) // 100, 0 * side], 1).tolist(), [], [])
    ground = bpy.data.objects.new("ground", mesh)
    bpy.context.scene.collection.objects.link(ground)
    ball = add("uv_sphere", radius=0.4)
    ball.parent, ground.instance_type = ground, "VERTS"
    subject = capture.subject(bpy.context, objects=[ground])
    with capture._stage(subject) as scene:
        found = capture._measure(scene)
    assert found.surfaces == 2000 and sum(len(points) for points in found.points) < 60_000
    assert np.allclose(capture.Capture(subject, QUICK, tmp_path)._source["dimensions"], (99.8, 19.8, 0.8), atol=0.01)


def test_an_object_in_a_hidden_collection_is_hidden(tmp_path):
    cube = add("cube")
    collection = bpy.data.collections.new("away")
    bpy.context.scene.collection.children.link(collection)
    collection.objects.link(cube)
    bpy.context.scene.collection.objects.unlink(cube)
    collection.hide_render = True
    assert refusal(tmp_path, objects=[cube]).message == "Cube is hidden in renders."


def test_without_cycles_the_preferences_are_named(tmp_path):
    import addon_utils

    add("cube")
    addon_utils.disable("cycles", default_set=True)
    try:
        assert refusal(tmp_path).message == "Cycles is turned off."
    finally:
        addon_utils.enable("cycles", default_set=True)


def test_a_subject_that_moves_or_goes_between_two_views_ends_the_capture(tmp_path):
    cube = add("cube")
    work = capture.Capture(capture.subject(bpy.context), dataclasses.replace(QUICK, views=20), tmp_path)
    work.step()
    cube.location.x = 1
    bpy.context.view_layer.update()
    with pytest.raises(KilnError, match="moved while it was captured"):
        work.step()
    bpy.data.objects.remove(cube)
    with pytest.raises(KilnError) as error:
        work.step()
    assert error.value.code == "subject-changed"


# What the user had stays


def everything():
    """Names in bpy.data, every plain setting of the scene and its render, selection, mode, and what is open."""
    names = {}
    for collection in dir(bpy.data):
        found = getattr(bpy.data, collection)
        if isinstance(found, bpy.types.bpy_prop_collection):
            names[collection] = [(entry.name, entry.users) for entry in found]
    scene = bpy.context.scene
    settings = {}
    image, view = scene.render.image_settings, scene.view_settings
    for part in (scene, scene.render, image, scene.cycles, view, scene.display_settings, scene.view_layers[0]):
        for rna in part.bl_rna.properties:
            if rna.type in ("BOOLEAN", "INT", "FLOAT", "STRING", "ENUM"):
                if (rna.identifier, part) != ("use_nodes", scene):  # reading it warns from 5.0 on
                    settings[part.bl_rna.identifier, rna.identifier] = str(getattr(part, rna.identifier))
    chosen = [thing.name for thing in scene.objects if thing.select_get()], bpy.context.object and bpy.context.object.name, bpy.context.mode
    where = [list(row) for thing in scene.objects for row in thing.matrix_world]
    handlers = {name: list(getattr(bpy.app.handlers, name)) for name in dir(bpy.app.handlers) if name.startswith("render_")}
    return names, settings, chosen, where, handlers, scene.name, bpy.context.window and bpy.context.window.scene.name


def furnished():
    """A scene with something in it of everything that a capture touches."""
    first = add("monkey", location=(1, 2, 3), rotation=(1, 0.5, 0.2))
    first.data.materials.append(plain((0.3, 0.3, 0.9)))
    bare = add("cube", location=(3, 0, 0))
    other = add("cube", location=(0, 5, 0))
    other.data.materials.append(plain((1, 0, 0), "other"))
    camera = bpy.data.objects.new("users camera", bpy.data.cameras.new("users camera"))
    scene = bpy.context.scene
    scene.collection.objects.link(camera)
    scene.camera, scene.world = camera, bpy.data.worlds.new("users world")
    scene.render.engine, scene.render.filepath = "BLENDER_WORKBENCH", "//users.png"
    scene.frame_set(17, subframe=0.25)
    scene.view_layers.new("second")
    for thing in scene.objects:
        thing.select_set(thing in (first, bare))
    bpy.context.view_layer.objects.active = other
    bpy.app.handlers.render_post.append(called)
    CALLS.clear()
    return first, bare


CALLS = []


def called(*_):
    CALLS.append(1)


@pytest.mark.oldest
@pytest.mark.parametrize("end", ["finished", "cancelled", "failed", "failed later"])
def test_everything_is_as_it_was_after_a_capture(tmp_path, end):
    first, bare = furnished()
    trees = [contents(m.node_tree) for m in bpy.data.materials]
    before = everything()
    work = capture.Capture(capture.subject(bpy.context), QUICK, tmp_path / "views")
    assert everything() == before
    if end == "finished":
        while work.step():
            assert everything() == before  # between two views too: the user may save or undo then
        work.finish()
    elif end == "cancelled":
        work.step()
    else:
        while work.done < (1 if end == "failed" else 6):  # of 6 pictures, then come depth and materials
            work.step()
        for path in (tmp_path / "views").iterdir():
            path.unlink()
        (tmp_path / "views").rmdir()
        (tmp_path / "views").write_text("a file where a folder should be")
        with pytest.raises(KilnError) as error:
            while work.step():
                pass
        assert error.value.code == "capture-failed"
    work.close()
    assert everything() == before
    assert [contents(m.node_tree) for m in bpy.data.materials] == trees
    assert not CALLS  # other add-ons' render handlers were not told
    bpy.app.handlers.render_post.remove(called)


def test_the_users_last_render_stays(tmp_path):
    """What an Image Editor shows of F12 is the same picture after a capture."""
    furnished()
    scene = bpy.context.scene
    scene.render.resolution_x = scene.render.resolution_y = 32
    bpy.ops.render.render()
    result = bpy.data.images["Render Result"]
    result.save_render(str(tmp_path / "before.png"), scene=scene)
    take(tmp_path / "views")
    result = bpy.data.images["Render Result"]
    result.save_render(str(tmp_path / "after.png"), scene=scene)
    before, after = (np.asarray(Image.open(tmp_path / name)) for name in ("before.png", "after.png"))
    assert before.max() > before.min() and np.array_equal(before, after)
    bpy.app.handlers.render_post.remove(called)


def test_a_capture_is_no_undo_step(tmp_path):
    cube = add("cube")
    name = cube.name
    cube.location.x = 1
    bpy.ops.ed.undo_push(message="one")
    cube.location.x = 2
    bpy.ops.ed.undo_push(message="two")
    take(tmp_path)
    bpy.ops.ed.undo()
    assert bpy.data.objects[name].location.x == 1
    bpy.ops.ed.redo()
    assert bpy.data.objects[name].location.x == 2
    assert len(bpy.data.scenes) == 1


@pytest.mark.long
def test_memory_does_not_grow_with_captures(tmp_path):
    """Renders leave nothing behind in the process."""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")
    add("monkey").modifiers.new("fine", "SUBSURF").render_levels = 2
    p = dataclasses.replace(QUICK, views=4, size=16, samples=1)

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(2):
        take(tmp_path, p)
    before = resident()
    for _ in range(5):
        take(tmp_path, p)
    assert resident() - before < 30e6  # one such scene, kept 10 times, would be twice that


def test_a_turned_and_mirrored_object_has_a_rigid_frame(tmp_path):
    """The frame for the result: the object's place and turn, without scale, shear or mirroring."""
    parent = bpy.data.objects.new("parent", None)
    bpy.context.scene.collection.objects.link(parent)
    parent.scale, parent.rotation_euler = (1, 3, 0.5), (0.2, 0.4, 0.6)
    thing = add("monkey", rotation=(1, 2, 3))
    thing.parent, thing.scale, thing.location = parent, (-2, 1, 1), (1, 2, 3)
    bpy.context.view_layer.update()
    _, _, source = take(tmp_path, objects=[thing])
    assert source["location"] == pytest.approx(list(thing.matrix_world.translation), abs=1e-5)
    turn = Quaternion(source["rotation"]).to_matrix()
    assert turn.determinant() == pytest.approx(1, abs=1e-5)
