"""Splats in files and in Blender: read, drawn as the Gaussians they are, edited, and taken back out."""

import gzip
import math
import struct

import bpy
import numpy as np
import pytest
from bl_ext.kiln_test.kiln import import_asset, splat_files, splat_nodes
from bl_ext.kiln_test.kiln.protocol.errors import KilnError
from mathutils import Euler, Matrix, Quaternion
from PIL import Image

FIELDS = ("means", "scales", "quaternions", "colors", "opacities", "harmonics")


def some(count=20, degree=0, seed=0):
    random = np.random.default_rng(seed)
    quaternions = random.normal(size=(count, 4))
    return splat_files.Points(
        means=random.normal(size=(count, 3)),
        scales=random.uniform(0.05, 0.3, (count, 3)).astype(np.float32),
        quaternions=(quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)).astype(np.float32),
        colors=random.uniform(0.1, 0.9, (count, 3)).astype(np.float32),
        opacities=random.uniform(0.2, 0.9, count).astype(np.float32),
        harmonics=random.uniform(-0.3, 0.3, (count, (degree + 1) ** 2 - 1, 3)).astype(np.float32),
    )


def covariances(points):
    axes = np.array([np.array(Quaternion(q).to_matrix()) for q in points.quaternions]) * np.asarray(points.scales, float)[:, None, :]
    return axes @ axes.transpose(0, 2, 1)


def added(points, name="splats"):
    thing = splat_nodes.make_object(name, points)
    bpy.context.scene.collection.objects.link(thing)
    bpy.context.view_layer.objects.active = thing
    thing.select_set(True)
    bpy.context.view_layer.update()
    return thing


def foreign_ply(path, points, kind="<f4", newline="\n", order=None):
    """As another tool may write it: other order, number type and line ends, and properties that nobody asked for."""
    names = [
        "red",
        "opacity",
        "rot_3",
        "rot_0",
        "rot_2",
        "rot_1",
        "z",
        "y",
        "x",
        "scale_2",
        "scale_0",
        "scale_1",
        "f_dc_2",
        "f_dc_0",
        "f_dc_1",
    ]
    names += [f"f_rest_{i}" for i in range(3 * points.harmonics.shape[1])][::-1] + ["confidence"]
    table = np.zeros(len(points), [(name, "u1" if name == "red" else kind) for name in names])
    table["opacity"] = np.log(points.opacities / (1 - points.opacities))
    for i in range(4):
        table[f"rot_{i}"] = points.quaternions[:, i] * 3
    for i in range(3):
        table["xyz"[i]], table[f"scale_{i}"] = points.means[:, i], np.log(points.scales[:, i])
        table[f"f_dc_{i}"] = (points.colors[:, i] - 0.5) / 0.28209479177387814
        for j in range(bases := points.harmonics.shape[1]):
            table[f"f_rest_{i * bases + j}"] = points.harmonics[:, j, i]
    types = {"<f4": "float", "<f8": "double"}
    header = ["ply", "comment from elsewhere", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    header += [f"property {'uchar' if name == 'red' else types[kind]} {name}" for name in names]
    header += ["element face 1", "property list uchar int vertex_indices", "end_header", ""]
    path.write_bytes(newline.join(header).encode() + table.tobytes() + b"\x00")
    return table


@pytest.mark.oldest
@pytest.mark.parametrize(("degree", "kind", "newline"), [(0, "<f4", "\n"), (1, "<f8", "\r\n"), (2, "<f4", "\n"), (3, "<f4", "\r\n")])
def test_a_ply_of_any_order_is_read_and_given_back_with_its_harmonics(tmp_path, degree, kind, newline):
    points = some(degree=degree)
    foreign_ply(tmp_path / "foreign.ply", points, kind, newline)
    read = splat_files.read(tmp_path / "foreign.ply")
    assert read.degree == degree and not read.z_up and not read.notes
    splat_files.write_ply(tmp_path / "back.ply", splat_nodes.points_of(added(read)))
    back = splat_files.read(tmp_path / "back.ply")
    for field in FIELDS:
        for given in (read, back):
            assert np.allclose(getattr(given, field), getattr(points, field), atol=2e-5), field
    assert back.z_up  # Blender's world


def compressed_ply(points, colored):
    """SuperSplat's compressed PLY, packed splat by splat from the description of the format: chunks of 256 splats that share the ranges of
    places, logarithms of scales and colours; four 32-bit words a splat, the first field highest; then bytes of harmonics."""

    def word(*fields):
        number = 0
        for share, bits in fields:
            number = number << bits | round(float(share) * (2**bits - 1))
        return struct.pack("<I", number)

    groups = [("x", "y", "z"), ("scale_x", "scale_y", "scale_z"), ("r", "g", "b")][: 3 if colored else 2]
    ranged = np.concatenate([points.means, np.log(points.scales), points.colors], 1)[:, : 3 * len(groups)]
    count, chunks, words, rest = len(points), b"", b"", b""
    for first in range(0, count, 256):
        some_rows = ranged[first : first + 256]
        low, high = some_rows.min(0).astype("<f4"), some_rows.max(0).astype("<f4")
        for group in range(0, len(low), 3):
            chunks += low[group : group + 3].tobytes() + high[group : group + 3].tobytes()
        for i in range(first, min(first + 256, count)):
            x, y, z, sx, sy, sz, *rgb = (ranged[i] - low) / (high - low)
            words += word((x, 11), (y, 10), (z, 11))
            q = points.quaternions[i].astype(float)
            largest = int(np.abs(q).argmax())
            three = np.delete(q * np.sign(q[largest]), largest) / math.sqrt(2) + 0.5
            words += word((largest / 3, 2), *((part, 10) for part in three))
            words += word((sx, 11), (sy, 10), (sz, 11))
            words += word(*((part, 8) for part in (*(rgb or points.colors[i]), points.opacities[i])))
            rest += bytes(int(np.clip(math.floor((h / 8 + 0.5) * 256), 0, 255)) for h in points.harmonics[i].T.ravel())
    header = f"ply\nformat binary_little_endian 1.0\ncomment Generated by SuperSplat 2.4.1\nelement chunk {-(-count // 256)}\n"
    header += "".join(f"property float {end}_{name}\n" for group in groups for end in ("min", "max") for name in group)
    header += f"element vertex {count}\n" + "".join(f"property uint packed_{n}\n" for n in ("position", "rotation", "scale", "color"))
    if rest:
        header += f"element sh {count}\n" + "".join(f"property uchar f_rest_{i}\n" for i in range(3 * points.harmonics.shape[1]))
    return header.encode() + b"end_header\n" + chunks + words + rest


@pytest.mark.oldest
@pytest.mark.parametrize(("colored", "degree"), [(False, 0), (True, 0), (True, 1), (True, 3)])
def test_supersplats_compressed_ply_is_read_to_its_rounding(tmp_path, colored, degree):
    points = some(300, degree, degree)  # the last chunk is not full
    (tmp_path / "a.compressed.ply").write_bytes(compressed_ply(points, colored))
    read = splat_files.read(tmp_path / "a.compressed.ply")
    assert len(read) == 300 and read.degree == degree and not read.z_up and not read.notes
    assert np.abs(read.means - points.means).max() < np.ptp(points.means) / 2**10
    assert np.abs(np.log(read.scales / points.scales)).max() < 2e-3
    assert np.abs((read.quaternions * points.quaternions).sum(1)).min() > 1 - 1e-5
    assert np.abs(read.colors - points.colors).max() < 2.5e-3 and np.abs(read.opacities - points.opacities).max() < 2.5e-3
    assert np.abs(read.harmonics - points.harmonics).max(initial=0) < 0.02
    thing = import_asset.import_splats(bpy.context, tmp_path / "a.compressed.ply")
    assert splat_nodes.is_splats(thing) and len(thing.data.vertices) == 300


@pytest.mark.parametrize("degree", [0, 3])
def test_spz_keeps_splats_to_its_rounding(tmp_path, degree):
    points = some(200, degree)
    splat_files.write_spz(tmp_path / "a.spz", points)
    read = splat_files.read(tmp_path / "a.spz")
    assert np.abs(read.means - points.means).max() < 1e-6
    assert np.abs(np.log(read.scales / points.scales)).max() < 0.04
    assert (np.abs((read.quaternions * points.quaternions).sum(1)) > math.cos(math.radians(0.15))).all()
    assert np.abs(read.colors - points.colors).max() < 0.005 and np.abs(read.opacities - points.opacities).max() < 0.003
    assert read.harmonics.shape == points.harmonics.shape
    if degree:  # turned to Y up and back, rounded to 1/16 and 1/8 between
        assert np.abs(read.harmonics - points.harmonics).max() < 0.15


@pytest.mark.oldest
def test_an_spz_of_version_2_is_read_by_the_formats_description(tmp_path):
    """One splat, packed by hand: Y up in the file, Z up in Blender."""
    content = struct.pack("<IIIBBBB", 0x5053474E, 2, 1, 0, 12, 0, 0)
    content += b"".join(struct.pack("<i", round(v * 4096))[:3] for v in (1.0, 2.0, -3.0))
    content += bytes([204]) + bytes([255, 128, 0]) + bytes([128, 144, 160]) + bytes([128, 128, 218])
    (tmp_path / "a.spz").write_bytes(gzip.compress(content))
    read = splat_files.read(tmp_path / "a.spz")
    assert np.allclose(read.means, [[1, 3, 2]])
    assert np.allclose(read.scales, np.exp([[-2, -1, 0]])) and np.allclose(read.opacities, 0.8)
    assert np.allclose((read.colors - 0.5) / 0.2820948, [[0.5 / 0.15, 0.5 / 255 / 0.15, -0.5 / 0.15]], atol=1e-4)
    axis = np.array([128, 128, 218]) / 127.5 - 1
    turn = Quaternion((1, 0, 0), math.pi / 2) @ Quaternion((math.sqrt(1 - axis @ axis), *axis))
    assert abs(Quaternion(read.quaternions[0]).dot(turn)) > 1 - 1e-5


@pytest.mark.oldest
def test_what_cannot_be_drawn_is_left_out_and_counted(tmp_path):
    points = some(10)
    points.means[0, 0] = np.nan
    points.scales[1] = 0
    points.quaternions[2] = 0
    points.colors[3] = np.inf
    with np.errstate(divide="ignore"):
        foreign_ply(tmp_path / "a.ply", points)
    read = splat_files.read(tmp_path / "a.ply")
    assert len(read) == 6 and np.allclose(read.means, points.means[4:], atol=1e-6)
    assert [note.split(" of ")[0] for note in read.notes] == ["a.ply: 2", "a.ply: 1", "a.ply: 1"]
    thing = import_asset.import_splats(bpy.context, tmp_path / "a.ply")
    assert "2 of 10 splats have values that are no numbers" in thing["kiln_notes"]


@pytest.mark.oldest
def test_what_is_no_splat_file_is_said_and_nothing_is_imported(tmp_path):
    whole = tmp_path / "whole.ply"
    splat_files.write_ply(whole, some(50))
    good = whole.read_bytes()
    splat_files.write_spz(tmp_path / "whole.spz", some(50))
    packed = (tmp_path / "whole.spz").read_bytes()
    header = b"ply\nformat binary_little_endian 1.0\n"
    many = good.replace(b"element vertex 50\n", b"element vertex 10000000\n")
    broken = some(3)
    broken.means[:] = np.nan
    splat_files.write_ply(tmp_path / "nothing.ply", broken)
    compressed = compressed_ply(some(300, 1), True)
    cases = [
        (compressed[:-50], "ends after 294 of 300 rows of 'sh'"),
        (compressed.replace(b"max_scale_x", b"max_scale_q"), "compressed PLY of a kind"),
        (compressed.replace(b"uint packed_color", b"float packed_color"), "compressed PLY of a kind"),
        (compressed.replace(b"element chunk 2", b"element chunk 3"), "compressed PLY of a kind"),
        (compressed.replace(b"element sh 300", b"element sh 299"), "compressed PLY of a kind"),
        (compressed.replace(b"f_rest_8", b"f_rest_9"), "compressed PLY of a kind"),
        (compressed.replace(b"element chunk 2", b"element chunk 39063").replace(b" 300\n", b" 10000000\n"), "at most 5,000,000"),
        (b"nonsense", "neither a PLY nor an SPZ"),
        (b"", "neither a PLY nor an SPZ"),
        (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n0\n", "is ascii"),
        (b"ply\nformat binary_big_endian 1.0\nelement vertex 1\nproperty float x\nend_header\n", "is binary_big_endian"),
        (b"ply\n" + b"\x00" * 5000, "header has no end"),
        (header + b"element vertex 1\nproperty float x\nproperty float y\nend_header\n", "does not hold splats"),
        (header + b"element chunk 1\nproperty float min_x\nelement vertex 1\nend_header\n", "does not hold splats"),
        (header + b"element vertex 1\nproperty list uchar int x\nend_header\n", "property 'list uchar int x'"),
        (good[:-100], "ends after 48 of 50"),
        (good.replace(b"element vertex 50\n", b"element vertex 0\n"), "holds no splats"),
        (many, "holds 10,000,000 splats; at most 5,000,000"),
        (packed[:-200], "damaged or not whole"),
        (gzip.compress(b"some text"), "gzip file, but not SPZ"),
        (gzip.compress(struct.pack("<IIIBBBB", 0x5053474E, 3, 10**7, 0, 12, 0, 0)), "at most 5,000,000"),
        (gzip.compress(struct.pack("<IIIBBBB", 0x5053474E, 3, 10, 0, 12, 0, 0)), "ends before its 10"),
        (gzip.compress(struct.pack("<IIIBBBB", 0x5053474E, 9, 10, 0, 12, 0, 0)), "SPZ version 9"),
        ((tmp_path / "nothing.ply").read_bytes(), "none of its 3 splats can be drawn"),
    ]
    before = len(bpy.data.objects), len(bpy.data.meshes)
    for content, sentence in cases:
        (tmp_path / "a.ply").write_bytes(content)
        with pytest.raises(KilnError, match=sentence) as caught:
            import_asset.import_splats(bpy.context, tmp_path / "a.ply")
        assert caught.value.code == "bad-splats"
    with pytest.raises(KilnError, match="cannot be read"):
        splat_files.read(tmp_path / "missing.ply")
    assert (len(bpy.data.objects), len(bpy.data.meshes)) == before


@pytest.mark.oldest
def test_an_import_is_one_undo_step_at_the_cursor_and_leaves_selection_and_mode(tmp_path):
    splat_files.write_ply(tmp_path / "a.ply", some(30, 1))
    bpy.context.scene.unit_settings.scale_length = 0.01
    bpy.ops.mesh.primitive_cube_add()
    bpy.ops.object.mode_set(mode="EDIT")
    bpy.context.scene.cursor.location = (1, 2, 3)
    bpy.ops.ed.undo_push(message="before")
    thing = import_asset.import_splats(bpy.context, tmp_path / "a.ply")
    assert bpy.context.object.name == "Cube" and bpy.context.mode == "EDIT_MESH" and not thing.select_get()
    bpy.context.view_layer.update()
    points = splat_nodes.points_of(thing)
    assert np.allclose(points.means, some(30, 1).means + np.array([1, 2, 3]) * 0.01, atol=1e-5)
    assert np.allclose(points.scales, some(30, 1).scales, rtol=1e-4)
    bpy.ops.ed.undo()
    assert "a" not in bpy.data.objects and "Cube" in bpy.data.objects


@pytest.mark.oldest
def test_points_of_follows_crops_transforms_joins_and_modifiers():
    points = some(40, 2)
    thing = added(points)
    thing.location, thing.rotation_euler, thing.scale = (1, 2, 3), (0.3, 0.5, 0.7), (2, -1, 0.5)
    bpy.context.view_layer.update()
    matrix = np.array(thing.matrix_world, float)
    # cropped in Edit Mode, and asked for while still in it
    bpy.ops.object.mode_set(mode="EDIT")
    bpy.ops.mesh.select_all(action="DESELECT")
    bpy.ops.object.mode_set(mode="OBJECT")
    for vertex in thing.data.vertices:
        vertex.select = vertex.index < 15
    bpy.ops.object.mode_set(mode="EDIT")
    bpy.ops.mesh.delete(type="VERT")
    now = splat_nodes.points_of(thing)
    assert bpy.context.mode == "EDIT_MESH" and len(now) == 25
    bpy.ops.object.mode_set(mode="OBJECT")
    kept = np.arange(15, 40)
    assert np.allclose(now.means, points.means[kept] @ matrix[:3, :3].T + matrix[:3, 3], atol=1e-5)
    linear = matrix[:3, :3]
    assert np.allclose(covariances(now), linear @ covariances(points)[kept] @ linear.T, atol=1e-5)
    assert np.allclose(now.colors, points.colors[kept], atol=1e-5) and now.harmonics.shape == (25, 8, 3)
    # hidden, and with a modifier in front
    thing.hide_viewport = True
    array = thing.modifiers.new("Array", "ARRAY")
    array.use_relative_offset, array.use_constant_offset, array.constant_offset_displace = False, True, (5, 0, 0)
    thing.modifiers.move(1, 0)
    twice = splat_nodes.points_of(thing)
    assert len(twice) == 50
    assert np.allclose(twice.means[25:] - twice.means[:25], linear @ [5, 0, 0], atol=1e-4)
    assert [m.name for m in thing.modifiers] == ["Array", "Splats"] and thing.hide_viewport
    # joined with others
    thing.hide_viewport = False
    thing.modifiers.remove(array)
    other = added(some(10, 2, 1), "other")
    bpy.context.view_layer.objects.active = thing
    thing.select_set(True)
    bpy.ops.object.join()
    assert len(splat_nodes.points_of(thing)) == 35 and "other" not in bpy.data.objects
    assert {scene.name for scene in bpy.data.scenes} == {bpy.context.scene.name}
    del other
    bpy.ops.mesh.primitive_cube_add()
    with pytest.raises(KilnError, match="Cube does not hold splats"):
        splat_nodes.points_of(bpy.context.object)


@pytest.mark.oldest
def test_mirrored_splats_are_shown_and_taken_out_mirrored():
    """The modifier's own mirrors: their spheres are the reflected ellipsoids, and so are the splats that `points_of` gives."""
    points = some(6, 1)
    thing = added(points)
    modifier = thing.modifiers["Splats"]
    for name in ("Mirror X", "Mirror Z"):
        splat_nodes._set(modifier, name, True)
    thing.update_tag()
    bpy.context.view_layer.update()
    shown = [np.array(entry.matrix_world) for entry in bpy.context.evaluated_depsgraph_get().object_instances if entry.is_instance]
    now = splat_nodes.points_of(thing)
    assert len(shown) == len(now) == 24
    flips = [np.diag(signs) for signs in ((1, 1, 1), (-1, 1, 1), (1, 1, -1), (-1, 1, -1))]
    for k, flip in enumerate(flips):
        part = slice(6 * k, 6 * k + 6)
        assert np.allclose(now.means[part], points.means @ flip, atol=1e-5)
        wanted = flip @ covariances(points) @ flip
        assert np.allclose(covariances(now)[part], wanted, atol=1e-5)
        for mean, covariance, opacity in zip(points.means @ flip, wanted, points.opacities):
            sphere = min(shown, key=lambda matrix: np.linalg.norm(matrix[:3, 3] - mean))
            ellipsoid = sphere[:3, :3] @ sphere[:3, :3].T / (2 * math.log(opacity * 255))
            assert np.allclose(ellipsoid, covariance, atol=1e-4)
    along = np.array([[0.6, 0, 0.8]])
    before = splat_files.basis(along, 1)[0, 1:] @ points.harmonics[0]
    after = splat_files.basis(along @ flips[1], 1)[0, 1:] @ now.harmonics[6]
    assert np.allclose(before, after, atol=1e-5)


@pytest.mark.oldest
def test_of_very_many_splats_viewports_show_a_share(monkeypatch):
    monkeypatch.setattr(splat_nodes, "EASY", 50)
    added(some(500))
    shown = [entry for entry in bpy.context.evaluated_depsgraph_get().object_instances if entry.is_instance]
    assert 20 < len(shown) < 100


def test_harmonics_turn_with_their_splats():
    """Seen along a turned direction, turned splats have the colour that they had along the direction before."""
    points = some(5, 3)
    turn = np.array(Euler((0.3, -1.1, 2.0)).to_matrix())
    turned = splat_files.transformed(points, 2 * turn, np.zeros(3))
    directions = np.random.default_rng(1).normal(size=(50, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    before = np.einsum("dk,nkc->dnc", splat_files.basis(directions, 3)[:, 1:], points.harmonics)
    after = np.einsum("dk,nkc->dnc", splat_files.basis(directions @ turn.T, 3)[:, 1:], turned.harmonics)
    assert np.allclose(before, after, atol=1e-5)


def picture(path, samples=64, engine="CYCLES"):
    """F12 from above: an orthographic camera of 4 x 4, 64 x 64 pixels; straight RGBA in [0, 1], rows top down."""
    scene = bpy.context.scene
    camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    scene.collection.objects.link(camera)
    camera.data.type, camera.data.ortho_scale, camera.location = "ORTHO", 4, (0, 0, 10)
    scene.camera = camera
    render = scene.render
    render.engine, render.resolution_x, render.resolution_y, render.film_transparent = engine, 64, 64, True
    render.dither_intensity, render.filepath, scene.view_settings.view_transform = 0, str(path), "Standard"
    render.image_settings.file_format, render.image_settings.color_mode = "PNG", "RGBA"
    scene.cycles.samples, scene.cycles.use_denoising, scene.cycles.use_adaptive_sampling = samples, False, False
    scene.cycles.pixel_filter_type, scene.eevee.taa_render_samples = "BOX", samples
    bpy.ops.render.render(write_still=True)
    bpy.data.objects.remove(camera)
    return np.asarray(Image.open(path), float) / 255


EEVEE = "BLENDER_EEVEE" if bpy.app.version >= (5, 0, 0) else "BLENDER_EEVEE_NEXT"
SHAPES = [(1, 1, 1), (1.5, 0.5, 2.0), (-1, 0.7, 1)]


@pytest.mark.parametrize(("engine", "scale"), [*(("CYCLES", s) for s in SHAPES), pytest.param(EEVEE, SHAPES[1], marks=pytest.mark.long)])
def test_f12_shows_gaussians_at_their_size_turn_colour_and_opacity(tmp_path, engine, scale):
    """Against the projection of the covariance, which for parallel lines of sight is exact, under any object transform."""
    points = splat_files.Points(
        means=np.array([[0.3, -0.2, 0.0]]),
        scales=np.array([[0.6, 0.15, 0.3]], np.float32),
        quaternions=np.array([Quaternion((1, 2, 3), 1.0)[:]], np.float32),
        colors=np.array([[0.8, 0.3, 0.1]], np.float32),
        opacities=np.array([0.8], np.float32),
    )
    thing = added(points)
    thing.rotation_euler, thing.scale = (0.4, 0.2, 0.9), scale
    bpy.context.view_layer.update()
    got = picture(tmp_path / "a.png", 64, engine)
    linear = np.array(thing.matrix_world, float)[:3, :3]
    place = (linear @ points.means[0])[:2]
    covariance = (linear @ covariances(points)[0] @ linear.T)[:2, :2]
    fine = (np.arange(64 * 4) + 0.5) / 256 * 4 - 2  # four lines of sight a pixel and axis
    x, y = np.meshgrid(fine, -fine)
    away = np.stack([x, y], -1) - place
    wanted = 0.8 * np.exp(-0.5 * np.einsum("hwi,ij,hwj->hw", away, np.linalg.inv(covariance), away))
    wanted = np.where(wanted > 1 / 255, wanted, 0).reshape(64, 4, 64, 4).mean((1, 3))
    off = np.abs(got[..., 3] - wanted)
    # EEVEE dithers: 64 samples of a probability of a half are off by 0.06, in one of 4096 pixels by four times that; its filter blurs
    assert off.max() < (0.02 if engine == "CYCLES" else 0.25) and off.mean() < (0.003 if engine == "CYCLES" else 0.02)
    assert np.abs(got[wanted > 0.5][:, :3] - [0.8, 0.3, 0.1]).max() < 0.01


@pytest.mark.oldest
def test_the_evaluated_spheres_hold_the_part_of_a_splat_that_is_not_faint():
    """One sphere a splat, from which opacity has faded to 1/255: its axes are those of the splat."""
    turn = Quaternion((1, 0, 0), 0.7) @ Quaternion((0, 0, 1), 0.4)
    points = splat_files.Points(
        means=np.array([[1.0, 2, 3], [5, 5, 5]]),
        scales=np.array([[0.4, 0.1, 0.2]] * 2, np.float32),
        quaternions=np.array([turn[:]] * 2, np.float32),
        colors=np.full((2, 3), 0.5, np.float32),
        opacities=np.array([0.8, 0.001], np.float32),
    )
    added(points)
    shown = [np.array(entry.matrix_world) for entry in bpy.context.evaluated_depsgraph_get().object_instances if entry.is_instance]
    assert len(shown) == 1  # the second is fainter than what can be seen
    reach = math.sqrt(2 * math.log(0.8 * 255))
    assert np.allclose(shown[0][:3, 3], (1, 2, 3), atol=1e-6)
    assert np.allclose(shown[0][:3, :3], np.array(turn.to_matrix()) * np.array([0.4, 0.1, 0.2]) * reach, atol=1e-4)


@pytest.mark.parametrize(
    ("engine", "degree", "shown"),
    [("CYCLES", 3, 3), ("CYCLES", 1, 1), *(pytest.param(EEVEE, degree, 1, marks=pytest.mark.long) for degree in (1, 3))],
)
def test_f12_shows_what_depends_on_the_direction_of_view(tmp_path, engine, degree, shown):
    """EEVEE, which reads eight attributes of an instance, shows the first degree alone."""
    points = some(1, degree, 4)
    points.means[:] = 0
    points.scales[:] = 0.6
    points.opacities[:] = 0.95
    points.colors[:] = 0.5
    for turn in (Euler((0, 0, 0)), Euler((1.2, 0.3, -0.8))):
        thing = added(points)
        thing.rotation_euler = turn
        bpy.context.view_layer.update()
        got = picture(tmp_path / "a.png", 4, engine)[30:34, 30:34, :3].mean((0, 1))
        along = np.array(turn.to_matrix()).T @ [0, 0, -1]  # from the viewer, in the splat's own world
        bases = (shown + 1) ** 2
        wanted = 0.5 + splat_files.basis(along[None], shown)[0, 1:] @ points.harmonics[0, : bases - 1]
        assert np.ptp(wanted) > 0.05 and np.abs(got - np.clip(wanted, 0, 1)).max() < 0.01
        bpy.data.objects.remove(thing)


def test_bounces_that_darken_splats_or_make_them_grainy_are_said_and_left_to_the_user():
    scene = bpy.context.scene
    scene.render.engine, scene.cycles.transparent_max_bounces, scene.cycles.min_transparent_bounces = "CYCLES", 8, 0
    assert "8 transparent bounces darken" in splat_nodes.advice(scene) and scene.cycles.transparent_max_bounces == 8
    scene.cycles.transparent_max_bounces = 64
    assert "grainy" in splat_nodes.advice(scene) and scene.cycles.min_transparent_bounces == 0
    scene.cycles.min_transparent_bounces = 64
    assert splat_nodes.advice(scene) == ""
    scene.render.engine, scene.cycles.transparent_max_bounces = EEVEE, 8
    assert splat_nodes.advice(scene) == ""


def test_with_enough_transparent_bounces_cycles_shows_even_splats_without_grain(tmp_path):
    """Each line of sight then ends where it would by the splats' own opacity, not by chance."""
    points = some(3000)
    points.means[:] *= (1, 1, 0.1)
    points.colors[:] = 0.6
    added(points)
    scene = bpy.context.scene
    scene.cycles.transparent_max_bounces, grain = 64, []
    for least in (0, 64):
        scene.cycles.min_transparent_bounces = least
        seen = picture(tmp_path / "a.png", 1)
        grain.append(seen[..., :3][seen[..., 3] > 0.99].std())
    assert grain[1] < 0.01 < grain[0]


def test_matrices_and_quaternions_are_blenders():
    points = some(30)
    for quaternion, matrix in zip(points.quaternions, splat_files.rotations(points.quaternions), strict=True):
        assert np.allclose(matrix, np.array(Matrix(Quaternion(quaternion).to_matrix())), atol=1e-6)
