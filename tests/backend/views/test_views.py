"""Views from files: cameras exact, geometry in the unit frame, and a sentence for every bad input."""

import json
import math

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
        pixels = np.dstack([np.full((size, size, 3), 40 * index, np.uint8), cover])
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
        (lambda table, folder: table.update(frames="many"), "no list of frames"),
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
