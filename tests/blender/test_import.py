"""Imports of results made here: a GLB by Blender's exporter and a PLY written by hand, both in the world of the source."""

import json
import math

import bpy
import numpy as np
import pytest
from bl_ext.kiln_test.kiln import capture, import_asset, splat_files, splat_nodes
from bl_ext.kiln_test.kiln.protocol import recipes
from bl_ext.kiln_test.kiln.protocol.errors import KilnError
from mathutils import Matrix, Quaternion
from PIL import Image

PROVENANCE = {"recipe": "reconstruct", "parameters": {"seed": 7, "fit.splats": 500}, "job": "job-1", "kiln": "1.2.3"}
SPLATS = 60


def world_vertices(thing):
    """Evaluated corners (n, 3) in Blender units."""
    mesh = thing.evaluated_get(bpy.context.evaluated_depsgraph_get()).to_mesh()
    corners = np.array([vertex.co[:] for vertex in mesh.vertices])
    matrix = np.array(thing.matrix_world)
    return corners @ matrix[:3, :3].T + matrix[:3, 3]


def box(points):
    return points.min(0), points.max(0)


def write_ply(path, means, scales, quaternions, colors, opacities):
    """Splats in the layout of the 3DGS code, with the properties that nobody needs (normals, higher harmonics)."""
    names = ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", *(f"f_rest_{i}" for i in range(9))]
    names += ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    table = np.zeros((len(means), len(names)), "<f4")
    table[:, :3], table[:, 6:9] = means, (np.asarray(colors) - 0.5) / 0.28209479177387814
    table[:, 18] = np.log(opacities / (1 - np.asarray(opacities)))
    table[:, 19:22], table[:, 22:] = np.log(scales), quaternions
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(means)}", *(f"property float {name}" for name in names)]
    path.write_bytes(("\n".join([*header, "end_header"]) + "\n").encode() + table.tobytes())


def make_results(folder, thing, unit_scale=1.0):
    """What the backend would return for `thing`: world metres, without parents, transforms or modifiers left over."""
    folder.mkdir(exist_ok=True)
    mesh = bpy.data.meshes.new_from_object(thing.evaluated_get(bpy.context.evaluated_depsgraph_get()))
    matrix = thing.matrix_world
    centre = np.array(matrix.translation, np.float64) * unit_scale
    # As the backend does: vertices near the origin, the place in the node, so that single precision loses nothing.
    mesh.transform(Matrix.Diagonal((unit_scale,) * 3).to_4x4() @ matrix.to_3x3().to_4x4())
    if matrix.determinant() < 0:
        mesh.flip_normals()
    made = bpy.data.materials.new("baked")
    if bpy.app.version < (5, 0, 0):
        made.use_nodes = True
    image = bpy.data.images.new("baked", 8, 8)
    texture = made.node_tree.nodes.new("ShaderNodeTexImage")
    texture.image = image
    made.node_tree.links.new(texture.outputs[0], made.node_tree.nodes["Principled BSDF"].inputs["Base Color"])
    mesh.materials.clear()
    mesh.materials.append(made)
    if not mesh.uv_layers:
        mesh.uv_layers.new()
    scratch = bpy.data.scenes.new("scratch")
    holder = bpy.data.objects.new("result", mesh)
    holder.location = centre
    scratch.collection.objects.link(holder)
    layer = scratch.view_layers[0]
    with bpy.context.temp_override(scene=scratch, view_layer=layer, active_object=None, object=None, edit_object=None):
        layer.update()
        bpy.ops.export_scene.gltf(filepath=str(folder / "mesh.glb"), use_active_scene=True)
    bpy.data.scenes.remove(scratch)
    bpy.data.objects.remove(holder)
    bpy.data.meshes.remove(mesh)
    bpy.data.materials.remove(made)
    bpy.data.images.remove(image)
    random = np.random.default_rng(0)
    means = random.normal(size=(SPLATS, 3)) + centre
    quaternions = random.normal(size=(SPLATS, 4)) * 3  # the layout does not ask for unit length
    splats = (
        means,
        random.uniform(0.01, 0.2, (SPLATS, 3)),
        quaternions,
        random.uniform(0, 1, (SPLATS, 3)),
        random.uniform(0.2, 0.9, SPLATS),
    )
    write_ply(folder / "splats.ply", *splats)
    Image.new("RGB", (64, 64), (200, 30, 30)).save(folder / "preview.png")
    return splats


def source_of(folder, **what):
    p = recipes.Capture(views=4, size=16, holdout=0, samples=1)
    _, source = capture.capture(capture.subject(bpy.context, **what), p, folder / "views")
    return json.loads(json.dumps(source))  # as it comes back from the backend


def placed(name):
    """A monkey in the given situation, with a subdivision modifier."""
    bpy.ops.mesh.primitive_monkey_add()
    thing = bpy.context.object
    thing.modifiers.new("fine", "SUBSURF").render_levels = 1
    scene = bpy.context.scene
    parent = bpy.data.objects.new("parent", None)
    scene.collection.objects.link(parent)
    if name == "moved, turned, stretched":
        thing.location, thing.rotation_euler, thing.scale = (3, -2, 5), (0.4, 1.0, 2.5), (1, 2, 0.5)
    elif name == "under a sheared and turned parent":
        parent.location, parent.rotation_euler, parent.scale = (1, 2, 3), (0.3, 0.5, 0.7), (1, 3, 0.5)
        thing.parent, thing.rotation_euler, thing.location = parent, (0.5, 0.1, 0.2), (1, 0, 0)
    elif name == "mirrored":
        thing.scale, thing.rotation_euler, thing.location = (-1, 1, 1.5), (0.1, 0.2, 0.3), (2, 0, 0)
    elif name == "in centimetres":
        scene.unit_settings.scale_length = 0.01
        thing.location, thing.rotation_euler, thing.scale = (30, 0, 12), (0, 0, 1), (50, 50, 50)
    elif name == "2 cm wide, 1 km away":
        thing.location, thing.scale, thing.rotation_euler = (1000, -1000, 100), (0.01, 0.01, 0.01), (0, 1, 0)
    bpy.context.view_layer.update()
    return thing


@pytest.mark.oldest
@pytest.mark.parametrize(
    "situation", ["moved, turned, stretched", "under a sheared and turned parent", "mirrored", "in centimetres", "2 cm wide, 1 km away"]
)
def test_the_result_lies_on_its_source_in_the_sources_frame(tmp_path, situation):
    """The same box in the world; place and turn of the object are the source's own, its scale is 1."""
    thing = placed(situation)
    unit = bpy.context.scene.unit_settings.scale_length
    means, scales, quaternions, colors, opacities = make_results(tmp_path, thing, unit)
    source = source_of(tmp_path, objects=[thing])
    imported = import_asset.import_asset(bpy.context, tmp_path, source, PROVENANCE)
    bpy.context.view_layer.update()
    result = imported.mesh_object
    wanted, got = world_vertices(thing), world_vertices(result)
    size = np.ptp(wanted, 0)
    precision = 1e-3 + np.abs(wanted).max() * 2e-7 / size.min()  # the second: what single precision leaves, far away
    assert np.abs(np.array(box(wanted)) - np.array(box(got))).max() < precision * size.min()
    assert np.allclose(result.matrix_world.translation, thing.matrix_world.translation, atol=1e-6)
    assert list(result.scale) == [1, 1, 1] and result.parent is None
    turn = thing.matrix_world.decompose()[1]
    assert result.matrix_world.to_quaternion().rotation_difference(turn).angle < 1e-3
    # every corner of the source is one of the result's: no mirroring, no swapped axes
    sample = wanted[:: len(wanted) // 50]
    nearest = np.linalg.norm(sample[:, None] - got[None], axis=2).min(1)
    assert nearest.max() < 2 * precision * size.min()

    splats = imported.splats_object
    there = np.array([vertex.co[:] for vertex in splats.data.vertices]) @ np.array(splats.matrix_world)[:3, :3].T
    assert np.allclose(there, means / unit - np.array(thing.matrix_world.translation), atol=1e-4 / unit)

    def read(name, field):
        return np.array([list(v) if hasattr(v := getattr(entry, field), "__len__") else v for entry in splats.data.attributes[name].data])

    assert np.allclose(read("scale", "vector"), scales / unit, rtol=1e-4)
    assert np.allclose(read("opacity", "value"), opacities, atol=1e-5)
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    assert np.allclose(read("color", "color")[:, :3], linear, atol=1e-5)
    for own, world in zip(read("rotation", "value"), quaternions, strict=True):
        here = splats.matrix_world.to_quaternion() @ Quaternion(own)
        assert abs(here.dot(Quaternion(world).normalized())) > math.cos(1e-3)  # q and -q are the same turn


@pytest.mark.oldest
def test_the_asset_tells_where_it_came_from_and_shows_the_mesh(tmp_path):
    bpy.ops.mesh.primitive_monkey_add()
    make_results(tmp_path, bpy.context.object)
    source = source_of(tmp_path)
    imported = import_asset.import_asset(bpy.context, tmp_path, source, PROVENANCE)
    collection, asset = imported.collection, imported.collection.asset_data
    assert collection.name == "Suzanne (Kiln)"
    assert {tag.name for tag in asset.tags} == {"Kiln", "reconstruct"}
    assert asset.author == "Kiln 1.2.3"
    for part in ("reconstruct", "seed: 7", "Suzanne", source["fingerprint"], "1.2.3"):
        assert part in asset.description
    assert collection["kiln_seed"] == 7 and json.loads(collection["kiln_parameters"]) == PROVENANCE["parameters"]
    assert collection["kiln_source_hash"] == source["fingerprint"] and len(source["fingerprint"]) == 64
    pixels = np.array(list(collection.preview.image_pixels_float)).reshape(-1, 4)
    assert pixels[:, 0].mean() > 3 * pixels[:, 1].mean()  # the red picture of the result
    mesh, splats = imported.mesh_object, imported.splats_object
    assert set(collection.objects) == {mesh, splats}
    (material,) = mesh.data.materials
    texture = next(node for node in material.node_tree.nodes if node.bl_idname == "ShaderNodeTexImage")
    assert material.name == "Suzanne (Kiln)" and texture.image.packed_file is not None
    assert texture.outputs[0].links[0].to_socket.name == "Base Color"

    def hidden():
        return [(thing.hide_viewport, thing.hide_render) for thing in (mesh, splats)]

    assert hidden() == [(False, False), (True, True)]
    import_asset.show(collection, "splats")
    assert hidden() == [(True, True), (False, False)]
    import_asset.show(collection, "both")
    assert hidden() == [(False, False), (False, False)]


def test_the_asset_is_in_a_catalog_that_stands_beside_the_file_once(tmp_path):
    bpy.ops.mesh.primitive_cube_add()
    make_results(tmp_path, bpy.context.object)
    source, catalogs = source_of(tmp_path), tmp_path / "blender_assets.cats.txt"
    unsaved = import_asset.import_asset(bpy.context, tmp_path, source, PROVENANCE).collection.asset_data
    assert unsaved.catalog_id and not catalogs.exists()
    catalogs.write_text("VERSION 1\n\n11111111-2222-3333-4444-555555555555:Props:Props\n", encoding="utf-8")
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "scene.blend"))
    for _ in range(2):
        saved = import_asset.import_asset(bpy.context, tmp_path, source, PROVENANCE).collection.asset_data
        assert saved.catalog_id == unsaved.catalog_id
    lines = catalogs.read_text(encoding="utf-8").splitlines()
    assert lines[2].endswith(":Props:Props") and lines[3:] == [f"{saved.catalog_id}:Kiln:Kiln"]


@pytest.mark.oldest
def test_a_result_with_all_maps_has_a_whole_material(tmp_path):
    """Roughness, metallic, normals, emission and opacity, as Blender's own exporter writes them: linked, named, packed, in their spaces."""
    bpy.ops.mesh.primitive_monkey_add()
    make_results(tmp_path, bpy.context.object)
    source = source_of(tmp_path)
    made = bpy.data.materials.new("all maps")
    if bpy.app.version < (5, 0, 0):
        made.use_nodes = True
    nodes, link = made.node_tree.nodes, made.node_tree.links.new
    principled = nodes["Principled BSDF"]

    def texture(name, color, data):
        image = bpy.data.images.new(name, 4, 4, alpha=True)
        image.colorspace_settings.name = "Non-Color" if data else "sRGB"
        image.pixels.foreach_set(np.tile(np.array(color, np.float32), 16))
        node = nodes.new("ShaderNodeTexImage")
        node.image = image
        return node

    base = texture("a", (0.5, 0.2, 0.1, 0.5), False)
    link(base.outputs["Color"], principled.inputs["Base Color"])
    link(base.outputs["Alpha"], principled.inputs["Alpha"])
    split = nodes.new("ShaderNodeSeparateColor")
    link(texture("b", (0, 0.6, 0.9, 1), True).outputs["Color"], split.inputs[0])
    link(split.outputs["Green"], principled.inputs["Roughness"])
    link(split.outputs["Blue"], principled.inputs["Metallic"])
    bend = nodes.new("ShaderNodeNormalMap")
    link(texture("c", (0.5, 0.5, 1, 1), True).outputs["Color"], bend.inputs["Color"])
    link(bend.outputs[0], principled.inputs["Normal"])
    link(texture("d", (0.1, 0.9, 0.1, 1), False).outputs["Color"], principled.inputs["Emission Color"])
    principled.inputs["Emission Strength"].default_value = 3.0
    thing = bpy.context.object
    thing.data.materials.clear()
    thing.data.materials.append(made)
    bpy.ops.export_scene.gltf(filepath=str(tmp_path / "mesh.glb"), use_selection=True)
    (tmp_path / "splats.spz").write_bytes(b"for other programs")
    imported = import_asset.import_asset(bpy.context, tmp_path, source, PROVENANCE)
    (material,) = imported.mesh_object.data.materials
    tree = material.node_tree
    images = {node.image.name: node.image for node in tree.nodes if node.bl_idname == "ShaderNodeTexImage"}
    title = "Suzanne (Kiln)"
    assert set(images) == {f"{title} {role}" for role in ("base color", "roughness metallic", "normal", "emission")}
    assert all(image.packed_file is not None for image in images.values())
    spaces = {name.removeprefix(f"{title} "): image.colorspace_settings.name for name, image in images.items()}
    assert spaces == {"base color": "sRGB", "roughness metallic": "Non-Color", "normal": "Non-Color", "emission": "sRGB"}
    shader = next(node for node in tree.nodes if node.bl_idname == "ShaderNodeBsdfPrincipled")
    for socket in ("Base Color", "Roughness", "Metallic", "Normal", "Emission Color", "Alpha"):
        assert shader.inputs[socket].is_linked, socket
    assert shader.inputs["Emission Strength"].default_value == pytest.approx(3)
    assert shader.inputs["Normal"].links[0].from_node.bl_idname == "ShaderNodeNormalMap"
    rough = images[f"{title} roughness metallic"].pixels[:4]
    assert np.allclose(rough[1:3], (0.6, 0.9), atol=0.005)
    assert [thing.name for thing in imported.collection.objects] == [f"{title} mesh", f"{title} splats"]


@pytest.mark.oldest
def test_provenance_survives_saving(tmp_path):
    bpy.ops.mesh.primitive_monkey_add()
    make_results(tmp_path, bpy.context.object)
    import_asset.import_asset(bpy.context, tmp_path, source_of(tmp_path), PROVENANCE)
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "scene.blend"))
    for name in ("mesh.glb", "splats.ply", "preview.png"):
        (tmp_path / name).unlink()  # the file holds all it needs
    bpy.ops.wm.open_mainfile(filepath=str(tmp_path / "scene.blend"))
    collection = bpy.data.collections["Suzanne (Kiln)"]
    assert collection.asset_data.author == "Kiln 1.2.3" and collection["kiln_seed"] == 7
    assert len(bpy.data.objects["Suzanne (Kiln) splats"].data.vertices) == SPLATS
    assert bpy.data.images["Suzanne (Kiln) base color"].pixels[3] == 1.0


@pytest.mark.oldest
@pytest.mark.parametrize("mode", ["OBJECT", "EDIT", "SCULPT"])
def test_mode_selection_and_scene_are_as_they_were(tmp_path, mode):
    bpy.ops.mesh.primitive_cube_add(location=(4, 0, 0))
    other = bpy.context.object
    bpy.ops.mesh.primitive_monkey_add()
    thing = bpy.context.object
    make_results(tmp_path, thing)
    source = source_of(tmp_path, objects=[thing])
    other.select_set(True)
    bpy.context.view_layer.objects.active = other
    bpy.ops.object.mode_set(mode=mode)

    def state():
        scene = bpy.context.scene
        chosen = sorted(t.name for t in scene.objects if t.select_get())
        counts = len(bpy.data.scenes), len(bpy.data.worlds), len(bpy.data.cameras), len(bpy.data.texts)
        return scene.name, chosen, bpy.context.object.name, [(t.name, t.mode) for t in (thing, other)], counts, bpy.context.collection.name

    before = state()
    imported = import_asset.import_asset(bpy.context, tmp_path, source, PROVENANCE)
    assert state() == before
    assert not imported.mesh_object.select_get()


@pytest.mark.oldest
def test_an_import_is_one_undo_step(tmp_path):
    bpy.ops.mesh.primitive_monkey_add()
    make_results(tmp_path, bpy.context.object)
    source = source_of(tmp_path)
    bpy.context.object.location.x = 1
    bpy.ops.ed.undo_push(message="one")
    bpy.context.object.location.x = 2
    bpy.ops.ed.undo_push(message="two")
    import_asset.import_asset(bpy.context, tmp_path, source, PROVENANCE)
    bpy.ops.ed.undo()
    assert "Suzanne (Kiln)" not in bpy.data.collections and bpy.data.objects["Suzanne"].location.x == 2
    assert not [mesh.name for mesh in bpy.data.meshes if "Kiln" in mesh.name]
    bpy.ops.ed.redo()
    assert len(bpy.data.collections["Suzanne (Kiln)"].objects) == 2
    bpy.ops.ed.undo()
    bpy.ops.ed.undo()
    assert bpy.data.objects["Suzanne"].location.x == 1


def test_the_collection_stands_beside_that_of_the_source(tmp_path):
    scene = bpy.context.scene
    outer, inner = bpy.data.collections.new("outer"), bpy.data.collections.new("inner")
    scene.collection.children.link(outer)
    outer.children.link(inner)
    bpy.ops.mesh.primitive_monkey_add()
    thing = bpy.context.object
    make_results(tmp_path, thing)
    source = source_of(tmp_path)
    assert import_asset.import_asset(bpy.context, tmp_path, source, PROVENANCE).collection in list(scene.collection.children)
    inner.objects.link(thing)
    scene.collection.objects.unlink(thing)
    assert import_asset.import_asset(bpy.context, tmp_path, source, PROVENANCE).collection in list(outer.children)
    whole = source_of(tmp_path, collection=inner)
    assert import_asset.import_asset(bpy.context, tmp_path, whole, PROVENANCE).collection in list(outer.children)
    bpy.data.objects.remove(thing)  # the source may be gone by the time the result is there
    assert import_asset.import_asset(bpy.context, tmp_path, source, PROVENANCE).collection in list(scene.collection.children)


def test_the_result_comes_into_the_scene_of_its_source_even_when_another_is_open(tmp_path):
    bpy.ops.mesh.primitive_monkey_add()
    make_results(tmp_path, bpy.context.object)
    source = source_of(tmp_path)
    first = bpy.context.scene
    bpy.context.window.scene = bpy.data.scenes.new("elsewhere")
    imported = import_asset.import_asset(bpy.context, tmp_path, source, PROVENANCE)
    assert imported.mesh_object.name in first.objects and not bpy.context.scene.objects
    assert bpy.context.scene.name == "elsewhere"


@pytest.mark.oldest
def test_a_damaged_result_leaves_nothing_behind(tmp_path):
    bpy.ops.mesh.primitive_monkey_add()
    make_results(tmp_path, bpy.context.object)
    source = source_of(tmp_path)

    def names():
        return {name: sorted(entry.name for entry in getattr(bpy.data, name)) for name in import_asset.CLEANED}

    before = names()
    good = (tmp_path / "splats.ply").read_bytes()
    (tmp_path / "splats.ply").write_bytes(good[:-100])
    with pytest.raises(KilnError, match="The result of Suzanne cannot be imported"):
        import_asset.import_asset(bpy.context, tmp_path, source, PROVENANCE)
    assert names() == before
    (tmp_path / "splats.ply").write_bytes(good)
    (tmp_path / "mesh.glb").write_bytes(b"not a GLB file at all")
    with pytest.raises(KilnError, match="The result of Suzanne cannot be imported"):
        import_asset.import_asset(bpy.context, tmp_path, source, PROVENANCE)
    assert names() == before
    (tmp_path / "mesh.glb").unlink()
    with pytest.raises(KilnError, match="has no mesh.glb"):
        import_asset.import_asset(bpy.context, tmp_path, source, PROVENANCE)


def test_any_error_of_an_importer_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    bpy.ops.mesh.primitive_monkey_add()
    make_results(tmp_path, bpy.context.object)
    source = source_of(tmp_path)
    before = set(bpy.data.objects), set(bpy.data.meshes), set(bpy.data.collections)
    monkeypatch.setattr(splat_files, "read", lambda path: [][0])
    with pytest.raises(KilnError, match="cannot be imported"):
        import_asset.import_asset(bpy.context, tmp_path, source, PROVENANCE)
    assert (set(bpy.data.objects), set(bpy.data.meshes), set(bpy.data.collections)) == before


@pytest.mark.oldest
def test_a_job_from_the_command_line_comes_in_where_its_results_lie(tmp_path):
    thing = placed("in centimetres")
    make_results(tmp_path, thing, 0.01)
    imported = import_asset.import_asset(bpy.context, tmp_path, {}, PROVENANCE)
    bpy.context.view_layer.update()
    assert imported.collection.name == "Kiln asset (Kiln)" and not any(imported.mesh_object.location)
    assert np.allclose(box(world_vertices(imported.mesh_object)), box(world_vertices(thing)), atol=0.01)


def test_two_results_of_one_source_stand_side_by_side(tmp_path):
    bpy.ops.mesh.primitive_monkey_add()
    make_results(tmp_path, bpy.context.object)
    source = source_of(tmp_path)
    first = import_asset.import_asset(bpy.context, tmp_path, source, PROVENANCE)
    second = import_asset.import_asset(bpy.context, tmp_path, source, PROVENANCE)
    assert first.collection.name == "Suzanne (Kiln)" and second.collection.name == "Suzanne (Kiln).001"
    assert len({node_group.name for node_group in bpy.data.node_groups if node_group.name.startswith(splat_nodes.NAME)}) == 1
    assert first.splats_object.data.materials[0] == second.splats_object.data.materials[0]
