"""A result's colours on other surfaces: read texel by texel, and everything of the user's stays as it was."""

import bmesh
import bpy
import numpy as np
import pytest
from bl_ext.kiln_test.kiln import rebake
from bl_ext.kiln_test.kiln.protocol.errors import KilnError
from mathutils import Matrix

SIDES = {  # of a cube: outward axis and sign -> linear colour
    (0, 1): (0.8, 0.1, 0.1), (0, -1): (0.1, 0.6, 0.1), (1, 1): (0.1, 0.1, 0.7),
    (1, -1): (0.7, 0.7, 0.1), (2, 1): (0.1, 0.6, 0.6), (2, -1): (0.5, 0.2, 0.6),
}  # fmt: skip
PLACE = Matrix.LocRotScale((30.0, -20.0, 5.0), Matrix.Rotation(0.6, 3, "Z").to_quaternion(), (0.5, 0.5, 0.5))


def srgb(linear):
    return 1.055 * np.asarray(linear) ** (1 / 2.4) - 0.055


def side_of(points):
    """The colour (n, 3) of a cube of the size 2 around the origin at points on it."""
    axis = np.abs(points).argmax(1)
    sign = np.sign(np.take_along_axis(points, axis[:, None], 1)[:, 0]).astype(int)
    return np.array([SIDES[pair] for pair in zip(axis.tolist(), sign.tolist())])


def cube(name, cuts=0, collection=None):
    """A cube with UVs: each side a cell of its own of a 3 x 2 grid."""
    shape = bmesh.new()
    bmesh.ops.create_cube(shape, size=2)
    if cuts:
        bmesh.ops.subdivide_edges(shape, edges=shape.edges, cuts=cuts, use_grid_fill=True)
    layer = shape.loops.layers.uv.new("Own")
    for face in shape.faces:
        centre = face.calc_center_median()
        axis = max(range(3), key=lambda i: abs(centre[i]))
        cell = 2 * axis + (centre[axis] > 0)
        across = [i for i in range(3) if i != axis]
        for loop in face.loops:
            u, v = ((loop.vert.co[i] + 1) / 2 * 0.9 + 0.05 for i in across)
            loop[layer].uv = ((cell % 3 + u) / 3, (cell // 3 + v) / 2)
    mesh = bpy.data.meshes.new(name)
    shape.to_mesh(mesh)
    shape.free()
    thing = bpy.data.objects.new(name, mesh)
    (collection or bpy.context.scene.collection).objects.link(thing)
    thing.matrix_world = PLACE
    return thing


def result(source="Box", cuts=7, roughness=False, triangles=True, emission=False):
    """What an import leaves: a mesh in a collection of its own, whose texture holds the colour of each side."""
    collection = bpy.data.collections.new(f"{source} (Kiln)")
    collection["kiln_job"], collection["kiln_source"] = "a", source
    bpy.context.scene.collection.children.link(collection)
    thing = cube(f"{source} mesh", cuts, collection)
    if triangles:  # as glTF holds it: triangles, and every corner with vertices of its own
        shape = bmesh.new()
        shape.from_mesh(thing.data)
        bmesh.ops.triangulate(shape, faces=shape.faces)
        bmesh.ops.split_edges(shape, edges=[edge for edge in shape.edges if edge.calc_face_angle(0) > 1])
        shape.to_mesh(thing.data)
        shape.free()
    material = bpy.data.materials.new(collection.name)
    material.use_nodes = True
    tree = material.node_tree
    shader = tree.nodes["Principled BSDF"]

    def textured(pixels, socket, is_data=False):
        image = bpy.data.images.new(f"{collection.name} base color", pixels.shape[1], pixels.shape[0], is_data=is_data)
        image.pixels.foreach_set(np.dstack([pixels, np.ones(pixels.shape[:2])]).astype(np.float32).ravel())
        image.pack()
        node = tree.nodes.new("ShaderNodeTexImage")
        node.image = image
        tree.links.new(node.outputs["Color"], socket)
        return node

    cells = np.zeros((64, 96, 3))
    for (axis, sign), color in SIDES.items():
        cell = 2 * axis + (sign > 0)
        cells[cell // 3 * 32 : cell // 3 * 32 + 32, cell % 3 * 32 : cell % 3 * 32 + 32] = color
    textured(srgb(cells), shader.inputs["Base Color"])
    if roughness:
        parts = tree.nodes.new("ShaderNodeSeparateColor")
        textured(np.dstack([np.ones((64, 96)), cells[..., 0], cells[..., 1]]), parts.inputs[0], is_data=True)
        tree.links.new(parts.outputs["Green"], shader.inputs["Roughness"])
        tree.links.new(parts.outputs["Blue"], shader.inputs["Metallic"])
    if emission:
        textured(srgb(cells), shader.inputs["Emission Color"])
        shader.inputs["Emission Strength"].default_value = 3.0
    thing.data.materials.append(material)
    bpy.context.view_layer.update()
    return thing


def texels(material, label):
    image = next(node.image for node in material.node_tree.nodes if node.bl_idname == "ShaderNodeTexImage" and label in node.image.name)
    pixels = np.empty(len(image.pixels), np.float32)
    image.pixels.foreach_get(pixels)
    return pixels.reshape(image.size[1], image.size[0], 4)


def on_surface(mesh, size):
    """Texels (rows, columns) in the middle of UV triangles, and the points of the surface (n, 3) that they show."""
    corners = rebake.triangles_in_uv(mesh, mesh.uv_layers.active)
    points = np.array([[mesh.vertices[i].co for i in triangle.vertices] for triangle in mesh.loop_triangles])
    generator = np.random.default_rng(0)
    weights = generator.dirichlet((2, 2, 2), 4000)
    which = generator.integers(len(corners), size=4000)
    uv = (corners[which] * weights[..., None]).sum(1)
    return np.minimum((uv[:, ::-1] * size).astype(int), size - 1).T, (points[which] * weights[..., None]).sum(1)


def state():
    """Everything that a bake must leave as it was."""
    scene, layer = bpy.context.scene, bpy.context.view_layer
    return {
        "scene": scene.name, "engine": scene.render.engine, "samples": scene.cycles.samples, "device": scene.cycles.device,
        "scenes": bpy.data.scenes.keys(), "active": layer.objects.active and layer.objects.active.name,
        "selected": sorted(thing.name for thing in layer.objects if thing.select_get()),
        "hidden": {thing.name: (thing.hide_viewport, thing.hide_render, thing.hide_get()) for thing in layer.objects},
        "places": {thing.name: tuple(map(tuple, thing.matrix_world)) for thing in layer.objects},
    }  # fmt: skip


def datablocks():
    return {kind: sorted(getattr(bpy.data, kind).keys()) for kind in ("objects", "meshes", "materials", "images", "scenes")}


@pytest.mark.oldest
def test_a_copy_of_the_source_wears_the_results_colours_on_its_own_uvs():
    source, made = cube("Box"), result(roughness=True, emission=True)
    source.select_set(True)
    bpy.context.view_layer.objects.active = source
    made.hide_set(True)
    before, plain = state(), list(source.data.materials)
    assert rebake.source_of(made, bpy.context.scene) == source
    copy = rebake.retexture(bpy.context, made, source, size=128)
    after = state()
    assert {key: after[key] for key in before if key not in ("hidden", "places")} == {
        key: before[key] for key in before if key not in ("hidden", "places")
    }
    assert all(after[key][name] == value for key in ("hidden", "places") for name, value in before[key].items())
    assert list(source.data.materials) == plain and copy.data != source.data
    assert copy.matrix_world == source.matrix_world and copy.name in bpy.context.scene.collection.objects
    (rows, columns), points = on_surface(copy.data, 128)
    material = copy.data.materials[0]
    assert np.abs(texels(material, "base color")[rows, columns, :3] - srgb(side_of(points))).mean() < 0.02
    assert np.abs(texels(material, "roughness")[rows, columns, 1:3] - side_of(points)[:, :2]).mean() < 0.02
    assert np.abs(texels(material, "emission")[rows, columns, :3] - srgb(side_of(points))).mean() < 0.02
    shader = next(node for node in material.node_tree.nodes if node.bl_idname == "ShaderNodeBsdfPrincipled")
    assert shader.inputs["Emission Strength"].default_value == 3.0 and shader.inputs["Roughness"].is_linked
    assert texels(material, "base color").min(axis=(0, 1))[:3].min() > 0.05, "holes between the charts"


def test_an_unwrapped_copy_gets_uvs_of_its_own_and_the_source_keeps_having_none():
    source, made = cube("Box"), result()
    source.data.uv_layers.remove(source.data.uv_layers[0])
    with pytest.raises(KilnError, match="has no UVs"):
        rebake.retexture(bpy.context, made, source, size=128)
    copy = rebake.retexture(bpy.context, made, source, size=128, unwrap=True)
    assert not source.data.uv_layers
    (rows, columns), points = on_surface(copy.data, 128)
    assert np.abs(texels(copy.data.materials[0], "base color")[rows, columns, :3] - srgb(side_of(points))).mean() < 0.02


def test_a_source_with_modifiers_is_baked_as_it_shows():
    source, made = cube("Box"), result()
    source.modifiers.new("Finer", "SUBSURF").subdivision_type = "SIMPLE"
    copy = rebake.retexture(bpy.context, made, source, size=128)
    assert [modifier.type for modifier in copy.modifiers] == ["SUBSURF"]
    (rows, columns), points = on_surface(copy.data, 128)
    assert np.abs(texels(copy.data.materials[0], "base color")[rows, columns, :3] - srgb(side_of(points))).mean() < 0.02


@pytest.mark.parametrize("call", ["retexture", "remesh_quads"])
def test_each_operator_is_one_undo_step(call):
    cube("Box")
    made = result(cuts=7).name
    operator = getattr(bpy.ops.kiln, call)
    bpy.ops.ed.undo_push(message="before")
    before, faces = datablocks(), len(bpy.data.objects[made].data.polygons)
    operator("EXEC_DEFAULT", True, result=made, size=64, **({"faces": 300} if call == "remesh_quads" else {}))
    after = datablocks()
    assert after != before or len(bpy.data.objects[made].data.polygons) != faces
    bpy.ops.ed.undo()
    assert datablocks() == before and len(bpy.data.objects[made].data.polygons) == faces
    bpy.ops.ed.redo()
    assert datablocks() == after


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda uv: uv * 3, "reaches from"),
        (lambda uv: uv * 0 + 0.5, "covers nothing"),
        (lambda uv: np.stack([uv[:, 0] % (1 / 3) * 3, uv[:, 1] % 0.5 * 2], 1), "more than once"),
    ],
)
def test_uvs_that_hold_no_picture_are_refused_and_nothing_is_left(change, words):
    source, made = cube("Box"), result()
    layer = source.data.uv_layers[0]
    uv = np.empty(len(source.data.loops) * 2, np.float32)
    layer.uv.foreach_get("vector", uv)
    layer.uv.foreach_set("vector", change(uv.reshape(-1, 2)).astype(np.float32).ravel())
    before = datablocks()
    with pytest.raises(KilnError, match=words) as failure:
        rebake.retexture(bpy.context, made, source, size=64)
    assert failure.value.code == "bad-uvs" and "Unwrap" in failure.value.hint
    assert datablocks() == before


def test_a_source_that_lies_elsewhere_is_refused_and_nothing_is_left():
    source, made = cube("Box"), result()
    source.matrix_world = Matrix()
    bpy.context.view_layer.update()
    before = datablocks()
    with pytest.raises(KilnError, match="within the ray distance"):
        rebake.retexture(bpy.context, made, source, size=64)
    assert datablocks() == before


def test_a_result_becomes_quads_that_are_closed_and_wear_the_same_colours():
    made = result(cuts=15)
    bpy.ops.mesh.primitive_uv_sphere_add()
    before, place = state(), made.matrix_world.copy()
    rebake.remesh_quads(bpy.context, made, faces=1500, size=512)
    after = state()
    assert after == before and made.matrix_world == place
    shape = bmesh.new()
    shape.from_mesh(made.data)
    sides = np.array([len(face.verts) for face in shape.faces])
    assert (sides == 4).mean() >= 0.95 and 500 < len(sides) < 4500
    assert all(len(edge.link_faces) == 2 for edge in shape.edges), "the surface has holes"
    shape.free()
    (rows, columns), points = on_surface(made.data, 512)
    inside = np.sort(np.abs(points), axis=1)[:, 1] < 0.85  # QuadriFlow rounds the cube's edges off
    wrong = np.abs(texels(made.data.materials[0], "base color")[rows, columns, :3] - srgb(side_of(points)))[inside]
    assert wrong.mean() < 0.02
    assert [image.name for image in bpy.data.images if "base color" in image.name] == ["Box (Kiln) base color"]


def test_what_quadriflow_cannot_do_is_said_and_the_triangles_stay():
    made = result(cuts=1)
    made.data.polygons.foreach_set("hide", np.zeros(len(made.data.polygons), bool))
    open_shape = bmesh.new()
    open_shape.from_mesh(made.data)
    for offset in (0.0, 0.5):  # two sheets through a third: more than two faces at an edge
        corners = [open_shape.verts.new((x, y, z)) for x, y, z in ((0, 0, 0), (1, 0, 0), (1, 1, offset))]
        open_shape.faces.new(corners)
    open_shape.faces.new([open_shape.verts.new(p) for p in ((0, 0, 0), (1, 0, 0), (0.5, -1, 0))])
    open_shape.to_mesh(made.data)
    open_shape.free()
    before, faces = datablocks(), len(made.data.polygons)
    with pytest.raises(KilnError) as failure:
        rebake.remesh_quads(bpy.context, made, faces=100)
    assert failure.value.code == "quads-failed" and "keeps its triangles" in failure.value.hint
    assert datablocks() == before and len(made.data.polygons) == faces


def test_a_hole_is_filled_from_its_neighbours_and_no_texel_stays_unknown():
    picture = np.full((32, 32, 3), 0.25, np.float32)
    known = np.zeros((32, 32), bool)
    known[4:12, 4:12] = True
    picture[~known] = 9.0
    assert np.allclose(rebake.filled(picture, known), 0.25)


def test_only_the_mesh_of_an_import_counts_as_a_result():
    assert rebake.is_result(result()) and not rebake.is_result(cube("Box")) and not rebake.is_result(None)
