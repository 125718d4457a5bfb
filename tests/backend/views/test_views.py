"""Views from files: cameras exact, geometry in the unit frame, and a sentence for every bad input."""

import json
import math
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from backend.views import views as loading
from backend.views.cameras import OPENCV_FROM_OPENGL, look_at
from backend.views.views import load
from protocol.errors import KilnError

CENTRE, RADIUS, FOV = np.array([10.0, -20.0, 3.0]), 0.02, math.radians(40)


def write_views(folder, size=32, count=6, alpha="disk", **changes):
    """A ring of cameras that just hold a sphere, each with a disk for a picture; returns the world cameras."""
    distance = RADIUS / math.sin(FOV / 2)
    frames, cameras = [], []
    for index in range(count):
        angle = 2 * math.pi * index / count
        eye = CENTRE + distance * np.array([math.cos(angle) * 0.8, math.sin(angle) * 0.8, 0.6 * (-1) ** index])
        camera = look_at(eye, CENTRE, size, FOV)
        cameras.append(camera)
        y, x = np.mgrid[:size, :size] + 0.5
        disk = (np.hypot(x - size / 2, y - size / 2) < size / 3).astype(np.uint8) * 255
        cover = {"disk": disk, "none": disk * 0, "full": disk * 0 + 255}[alpha]
        pixels = np.dstack([np.full((size, size, 3), 40 * index % 256, np.uint8), cover])
        Image.fromarray(pixels, "RGBA").save(folder / f"color_{index:03}.png")
        depth = np.where(disk > 0, np.float32(distance), np.float32(0))
        np.savez_compressed(folder / f"geometry_{index:03}.npz", depth=depth, normal=np.zeros((size, size, 3), np.float16))
        frames.append(
            {
                "file_path": f"color_{index:03}.png",
                "geometry_file_path": f"geometry_{index:03}.npz",
                "split": "holdout" if index == count - 1 else "train",
                "transform_matrix": (camera.world_from_camera @ OPENCV_FROM_OPENGL).tolist(),
            }
        )
    table = {"w": size, "h": size, "fl_x": cameras[0].fx, "fl_y": cameras[0].fy, "cx": size / 2, "cy": size / 2, "frames": frames}
    table.update(changes)
    (folder / "transforms.json").write_text(json.dumps(table))
    return cameras


def test_unit_frame_is_the_sphere_that_all_cameras_hold(tmp_path):
    write_views(tmp_path)
    views = load(tmp_path)
    assert np.allclose(views.frame.centre, CENTRE, atol=1e-9)
    assert views.frame.scale == pytest.approx(1 / RADIUS, rel=1e-6)


def test_the_subjects_own_origin_stays_in_the_world(tmp_path):
    write_views(tmp_path)
    assert load(tmp_path).frame.pivot is None
    write_views(tmp_path, pivot=[10.5, -20, 2.25])
    assert load(tmp_path).frame.pivot.tolist() == [10.5, -20, 2.25]
    assert load(tmp_path).for_scoring.frame.pivot.tolist() == [10.5, -20, 2.25]


@pytest.mark.parametrize("pivot", [[1, 2], "base", [1, 2, None], [1, 2, math.nan], {"x": 1}])
def test_a_pivot_that_is_no_point_is_refused(tmp_path, pivot):
    write_views(tmp_path, pivot=pivot)
    with pytest.raises(KilnError, match="The pivot in transforms.json is no point"):
        load(tmp_path)


def test_moving_to_the_unit_frame_keeps_every_pixel_where_it_was(tmp_path):
    world = write_views(tmp_path)
    views = load(tmp_path)
    points = CENTRE + RADIUS * np.random.default_rng(0).uniform(-0.5, 0.5, (50, 3))
    for before, after in zip(world, views.cameras, strict=True):
        pixels, depth = before.project(points)
        unit_pixels, unit_depth = after.project((points - views.frame.centre) * views.frame.scale)
        assert np.allclose(pixels, unit_pixels, atol=1e-6)
        assert np.allclose(depth * views.frame.scale, unit_depth)
    assert np.allclose(views.frame.to_world((points - views.frame.centre) * views.frame.scale), points)


def test_depth_arrives_in_unit_lengths_and_unprojects_onto_its_own_pixels(tmp_path):
    write_views(tmp_path)
    views = load(tmp_path)
    camera, depth = views.cameras[2], views.depth[2]
    points = camera.unproject(depth)[depth > 0]
    pixels, back = camera.project(points)
    rows, columns = np.nonzero(depth)
    assert np.allclose(pixels, np.stack([columns, rows], 1) + 0.5, atol=1e-4)
    assert np.allclose(back, depth[depth > 0], rtol=1e-5)
    assert depth.max() == pytest.approx(1 / math.sin(FOV / 2), rel=1e-4)


def test_held_out_views_are_kept_from_the_fit(tmp_path):
    write_views(tmp_path)
    views = load(tmp_path)
    assert len(views.for_fitting) == 5 and len(views.for_scoring) == 1
    assert np.allclose(views.for_scoring.images, 200 / 255)


def test_the_original_nerf_layout_loads(tmp_path):
    cameras = write_views(tmp_path)
    table = json.loads((tmp_path / "transforms.json").read_text())
    for key in ("w", "h", "fl_x", "fl_y", "cx", "cy"):
        del table[key]
    for frame in table["frames"]:
        frame["file_path"] = frame["file_path"].removesuffix(".png")
        del frame["geometry_file_path"]
    (tmp_path / "transforms.json").write_text(json.dumps({**table, "camera_angle_x": FOV}))
    views = load(tmp_path)
    assert views.depth is None and views.cameras[0].fx == pytest.approx(cameras[0].fx)


def test_held_out_views_come_last_whatever_their_place_in_the_table(tmp_path):
    """So that the views to fit are one piece of each array, and need no copy."""
    write_views(tmp_path)
    table = json.loads((tmp_path / "transforms.json").read_text())
    table["frames"].insert(2, table["frames"].pop())
    (tmp_path / "transforms.json").write_text(json.dumps(table))
    views = load(tmp_path)
    assert views.holdout.tolist() == [False] * 5 + [True]
    assert np.allclose(views.images[:, 0, 0, 0] * 255, [0, 40, 80, 120, 160, 200])
    assert views.for_fitting.images.base is not None and np.shares_memory(views.for_fitting.images, views.images)


def test_normals_are_kept_as_they_were_stored(tmp_path):
    write_views(tmp_path)
    normal = np.random.default_rng(0).uniform(-0.5, 0.5, (32, 32, 3)).astype(np.float16)
    np.savez_compressed(tmp_path / "geometry_001.npz", depth=np.ones((32, 32), np.float32), normal=normal)
    views = load(tmp_path)
    assert views.normals.dtype == np.float16 and np.array_equal(views.normals[1], normal)


def add_materials(folder, **arrays):
    """Material passes for all views; those of view 2 with these arrays instead."""
    table = json.loads((folder / "transforms.json").read_text())
    for index, frame in enumerate(table["frames"]):
        frame["material_file_path"] = f"material_{index:03}.npz"
        np.savez_compressed(folder / f"material_{index:03}.npz", material=np.full((32, 32, 3), 10 * index, np.uint8))
    if arrays:
        np.savez_compressed(folder / "material_002.npz", **arrays)
    (folder / "transforms.json").write_text(json.dumps(table))


def test_material_passes_load_and_a_view_without_emission_gives_no_light(tmp_path):
    write_views(tmp_path)
    glow = np.random.default_rng(0).uniform(0, 30, (32, 32, 3)).astype(np.float16)
    add_materials(tmp_path, material=np.full((32, 32, 3), 99, np.uint8), emission=glow)
    views = load(tmp_path)
    assert views.material[:, 5, 5, 1].tolist() == [0, 10, 99, 30, 40, 50]
    assert np.array_equal(views.emission[2], glow) and not views.emission[[0, 1, 3, 4, 5]].any()
    assert np.array_equal(views.for_scoring.material, views.material[5:])


GOOD = np.zeros((32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    "arrays",
    [
        {"material": GOOD[:16]},
        {"material": GOOD[..., 0]},
        {"material": GOOD.astype(np.float32)},
        {"material": GOOD, "emission": GOOD},
        {"material": GOOD, "emission": np.full((32, 32, 3), np.nan, np.float16)},
        {"material": GOOD, "emission": np.full((32, 32, 3), -1, np.float16)},
        {"material": GOOD, "emission": np.full((32, 32, 3), 1e6, np.float32)},
        {"material": GOOD, "emission": np.zeros((32, 32), np.float16)},
        {"roughness": GOOD},
    ],
)
def test_material_passes_of_another_shape_or_kind_are_refused(tmp_path, arrays):
    write_views(tmp_path)
    add_materials(tmp_path, **arrays)
    with pytest.raises(KilnError, match=r"View 2 .*its material (has a wrong shape or values|cannot be read)"):
        load(tmp_path)


def geometry(folder, **changes):
    arrays = {"depth": np.ones((32, 32), np.float32), "normal": np.zeros((32, 32, 3), np.float16)}
    np.savez_compressed(folder / "geometry_002.npz", **{**arrays, **changes})


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def broken(change):
    def apply(folder):
        table = json.loads((folder / "transforms.json").read_text())
        change(table, folder)
        (folder / "transforms.json").write_text(json.dumps(table))

    return apply


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda table, folder: table.update(frames=table["frames"][:2]), "too few"),
        (lambda table, folder: table["frames"][0].update(file_path="../secret.png"), "outside its folder"),
        (lambda table, folder: table["frames"][1].update(transform_matrix=np.zeros((4, 4)).tolist()), "View 1"),
        (lambda table, folder: table["frames"][1].update(transform_matrix="no"), "no usable camera"),
        (lambda table, folder: (folder / "color_002.png").write_bytes(b"\x89PNG broken"), "View 2"),
        (lambda table, folder: (folder / "geometry_002.npz").write_bytes(b"PK broken"), "depth and normals cannot be read"),
        (lambda table, folder: truncate(folder / "geometry_002.npz"), "depth and normals cannot be read"),
        (lambda table, folder: np.savez_compressed(folder / "geometry_002.npz", depth=np.zeros((999, 999))), "larger than the picture"),
        (lambda table, folder: geometry(folder, depth=np.full((32, 32), np.nan, np.float32)), "depth or normals have a wrong"),
        (lambda table, folder: geometry(folder, depth=np.full((32, 32), -1, np.float32)), "depth or normals have a wrong"),
        (lambda table, folder: geometry(folder, normal=np.full((32, 32, 3), np.inf, np.float16)), "depth or normals have a wrong"),
        (lambda table, folder: geometry(folder, normal=np.full((32, 32, 3), np.nan, np.float32)), "depth or normals have a wrong"),
        (lambda table, folder: geometry(folder, depth=np.ones((32, 31), np.float32)), "depth or normals have a wrong"),
        (lambda table, folder: geometry(folder, depth=np.ones((32, 32), bool)), "depth or normals have a wrong"),
        (lambda table, folder: truncate(folder / "color_004.png"), "View 4 .* cannot be read"),
        (lambda table, folder: table.update(frames="many"), "no list of frames"),
        (lambda table, folder: table.update(frames=table["frames"][:1]), "1 views are too few"),
        (lambda table, folder: Image.new("RGBA", (8, 8)).save(folder / "color_003.png"), "another size"),
        (lambda table, folder: Image.new("L", (9000, 4)).save(folder / "color_000.png"), "9000 x 4"),
        (
            lambda table, folder: [frame.update(transform_matrix=table["frames"][0]["transform_matrix"]) for frame in table["frames"]],
            "one direction",
        ),
    ],
)
def test_bad_views_are_refused_with_what_is_wrong(tmp_path, change, sentence):
    write_views(tmp_path)
    broken(change)(tmp_path)
    if "another size" in sentence:
        (tmp_path / "geometry_003.npz").unlink()
        broken(lambda table, folder: table["frames"][3].pop("geometry_file_path"))(tmp_path)
    with pytest.raises(KilnError, match=sentence) as caught:
        load(tmp_path)
    assert caught.value.code == "bad-input" and caught.value.hint


def header_of_a_png(width, height):
    """A file that says how large it is, and holds nothing."""
    content = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + content + struct.pack(">I", zlib.crc32(content)) + struct.pack(">I", 0) + b"IDAT"


@pytest.mark.parametrize("side", [20_000, 9_000, 2_000_000])
def test_a_huge_picture_is_refused_by_its_header(tmp_path, side):
    write_views(tmp_path)
    (tmp_path / "color_001.png").write_bytes(header_of_a_png(side, side))
    with pytest.raises(KilnError, match=r"View 1 .*(larger than any view|9000 x 9000)") as caught:
        load(tmp_path)
    assert "8192" in caught.value.hint


def test_unknown_fields_are_passed_over(tmp_path):
    write_views(tmp_path, aabb_scale=16, applied_transform=[[1, 0, 0, 0]], orientation_override="none")
    broken(lambda table, folder: [frame.update(sharpness=12.5, colmap_im_id=3) for frame in table["frames"]])(tmp_path)
    assert len(load(tmp_path)) == 6


def silhouettes(folder, kinds):
    """Views whose pictures show a disk, a bar across it, or nothing, as their kinds say; 12 to fit and one held out."""
    write_views(folder, size=64, count=13)
    y, x = np.mgrid[:64, :64] + 0.5 - 32
    shapes = {"disk": np.hypot(x, y) < 20, "bar": (np.abs(x) < 30) & (np.abs(y) < 5), "nothing": x > 99}
    for index in range(13):
        cover = shapes[kinds[index % len(kinds)]].astype(np.uint8) * 255
        Image.fromarray(np.dstack([cover, cover, cover, cover]), "RGBA").save(folder / f"color_{index:03}.png")


def test_views_that_agree_but_for_a_few_are_taken(tmp_path):
    silhouettes(tmp_path, ["disk"] * 11 + ["bar"])
    assert len(load(tmp_path)) == 13


@pytest.mark.parametrize("kinds", [["disk", "bar"], ["disk", "nothing"]])
def test_views_of_two_subjects_are_refused(tmp_path, kinds):
    silhouettes(tmp_path, kinds)
    with pytest.raises(KilnError, match="silhouettes do not fit together") as caught:
        load(tmp_path)
    assert caught.value.code == "bad-input" and caught.value.hint


@pytest.mark.parametrize(("alpha", "sentence"), [("none", "empty"), ("full", "no alpha")])
def test_pictures_without_a_silhouette_are_refused(tmp_path, alpha, sentence):
    write_views(tmp_path, alpha=alpha)
    with pytest.raises(KilnError, match=sentence):
        load(tmp_path)


def test_a_folder_without_cameras_is_refused(tmp_path):
    with pytest.raises(KilnError, match="no transforms.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"k1": 0.1}, "distortion"), ({"camera_model": "OPENCV_FISHEYE"}, "distortion"), ({"w": 0}, "camera"), ({"h": "tall"}, "camera")],
)
def test_cameras_that_are_no_pinholes_are_refused(tmp_path, changes, says):
    write_views(tmp_path, **changes)
    with pytest.raises(KilnError, match=says):
        load(tmp_path)


def test_a_mirrored_camera_is_refused(tmp_path):
    write_views(tmp_path)
    table = json.loads((tmp_path / "transforms.json").read_text())
    for row in table["frames"][2]["transform_matrix"]:
        row[0] = -row[0]
    (tmp_path / "transforms.json").write_text(json.dumps(table))
    with pytest.raises(KilnError, match="mirrors"):
        load(tmp_path)


def test_too_many_pixels_are_refused_before_any_is_read(tmp_path, monkeypatch):
    write_views(tmp_path)
    monkeypatch.setattr(loading, "MOST_PIXELS", 32 * 32 * 6 - 1)
    monkeypatch.setattr(loading, "_read_image", None)
    with pytest.raises(KilnError, match="memory"):
        load(tmp_path)


def test_one_close_up_does_not_shrink_everybodys_sphere(tmp_path):
    write_views(tmp_path)
    table = json.loads((tmp_path / "transforms.json").read_text())
    matrix = np.array(table["frames"][0]["transform_matrix"])
    matrix[:3, 3] = CENTRE + 0.6 * (matrix[:3, 3] - CENTRE)
    table["frames"][0]["transform_matrix"] = matrix.tolist()
    (tmp_path / "transforms.json").write_text(json.dumps(table))
    assert load(tmp_path).frame.scale == pytest.approx(1 / RADIUS, rel=1e-6)
