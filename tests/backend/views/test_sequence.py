"""Views of a moving subject: their order in time, one frame for all, files shared by several views, and a sentence for every bad input."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from backend.views import views as stills
from backend.views.cameras import OPENCV_FROM_OPENGL, around
from backend.views.sequence import load
from protocol.errors import KilnError

FIELD_OF_VIEW, SIZE, RADIUS = math.radians(40), 32, 0.25
COUNT = 7  # views of each moment, of which the last is held out


def centre(frame):
    return np.array([0.1 * frame - 0.6, 0.2, 0.0])


def write(folder, frames=(4, 6, 10), packed=True, ball=centre):
    """A ball on its way along x, all views of a moment in one file of passes, written in no order of time; returns its table."""
    entries = []
    for frame in frames:
        depths, normals, materials = [], [], []
        for index, camera in enumerate(around(COUNT, SIZE, FIELD_OF_VIEW)):
            rays = camera.unproject(np.ones((SIZE, SIZE))) - camera.centre  # of depth 1
            middle = ball(frame) - camera.centre
            along, squared = rays @ middle, (rays * rays).sum(-1)
            inside = along**2 - squared * (middle @ middle - RADIUS**2)
            depth = np.where(inside > 0, (along - np.sqrt(np.maximum(inside, 0))) / squared, 0).astype(np.float32)
            normal = np.where((depth > 0)[..., None], (camera.unproject(depth) - ball(frame)) / RADIUS, 0).astype(np.float16)
            name = f"color_{frame:05}_{index:03}.png"
            pixels = np.full((SIZE, SIZE, 4), 10 * frame + index, np.uint8)
            pixels[..., 3] = np.where(depth > 0, 255, 0)
            Image.fromarray(pixels, "RGBA").save(folder / name)
            passes = {"geometry_file_path": f"passes_{frame:05}.npz", "material_file_path": f"passes_{frame:05}.npz", "layer": index}
            if not packed:
                own = f"passes_{frame:05}_{index:03}.npz"
                passes = {"geometry_file_path": own, "material_file_path": own}
                np.savez_compressed(folder / own, depth=depth, normal=normal, material=np.full((SIZE, SIZE, 3), index, np.uint8))
            depths.append(depth), normals.append(normal), materials.append(np.full((SIZE, SIZE, 3), index, np.uint8))
            split = "holdout" if index == COUNT - 1 else "train"
            matrix = (camera.world_from_camera @ OPENCV_FROM_OPENGL).tolist()
            entries.append({"frame": frame, "file_path": name, **passes, "split": split, "transform_matrix": matrix})
        if packed:
            np.savez_compressed(
                folder / f"passes_{frame:05}.npz", depth=np.stack(depths), normal=np.stack(normals), material=np.stack(materials)
            )
    order = np.random.default_rng(0).permutation(len(entries))
    table = {"fps": 24.0, "camera_angle_x": FIELD_OF_VIEW, "w": SIZE, "h": SIZE, "frames": [entries[one] for one in order]}
    (folder / "transforms.json").write_text(json.dumps(table))
    return table


@pytest.mark.parametrize("packed", [True, False], ids=["one file a moment", "one file a view"])
def test_views_come_in_the_order_of_time_with_their_own_passes(tmp_path, packed):
    write(tmp_path, packed=packed)
    sequence = load(tmp_path)
    assert len(sequence) == 3 and sequence.frames.tolist() == [4, 6, 10] and sequence.fps == 24
    assert sequence.views.holdout.tolist() == [False] * 18 + [True] * 3
    assert sequence.time.tolist() == [0] * 6 + [1] * 6 + [2] * 6 + [0, 1, 2]
    for moment, frame in enumerate((4, 6, 10)):
        views, scored = sequence.at(moment), sequence.scored_at(moment)
        assert len(views) == 6 and len(scored) == 1 and scored.holdout.all()
        assert np.shares_memory(views.images, sequence.views.images)
        for camera, picture, depth, material in zip(views.cameras, views.images, views.depth, views.material, strict=True):
            assert np.allclose(picture, (10 * frame + material[0, 0, 0]) / 255)  # colour and passes of one view
            points = views.frame.to_world(camera.unproject(depth)[depth > 0])
            assert np.allclose(np.linalg.norm(points - centre(frame), axis=1), RADIUS, atol=1e-4)


def test_one_unit_frame_holds_all_moments(tmp_path):
    write(tmp_path)
    sequence = load(tmp_path)
    assert sequence.views.frame.scale == pytest.approx(1.0, rel=1e-6) and np.allclose(sequence.views.frame.centre, 0, atol=1e-9)


def test_a_file_of_several_views_is_read_once(tmp_path, monkeypatch):
    write(tmp_path)
    read, opened = stills._read_arrays, []
    monkeypatch.setattr(stills, "_read_arrays", lambda path, *more: opened.append(path.name) or read(path, *more))
    load(tmp_path)
    assert len(opened) == 6  # each moment's once among the views to fit, once among those held out


def test_more_views_than_a_still_may_have(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(stills, "MOST_VIEWS", 20)
    assert len(load(tmp_path).views) == 21


def change(folder, apply):
    table = json.loads((folder / "transforms.json").read_text())
    table["frames"].sort(key=lambda entry: entry["file_path"])
    apply(table)
    (folder / "transforms.json").write_text(json.dumps(table))


def each(apply):
    return lambda table: [apply(entry) for entry in table["frames"]]


def keep(wanted):
    return lambda table: table.update(frames=[entry for number, entry in enumerate(table["frames"]) if wanted(number, entry)])


@pytest.mark.parametrize(
    ("apply", "sentence", "hint"),
    [
        (lambda table: table.pop("fps"), "how many frames a second", "fps"),
        (lambda table: table.update(fps=0), "how many frames a second", "fps"),
        (lambda table: table.update(fps="24"), "how many frames a second", "fps"),
        (lambda table: table["frames"][3].pop("frame"), "View 3 .*does not say which frame", "reconstruct"),
        (lambda table: table["frames"][3].update(frame=math.nan), "View 3 .*does not say which frame", "reconstruct"),
        (each(lambda entry: entry.update(frame=4)), "All views show frame 4", "reconstruct"),
        (lambda table: table.update(frames=[]), "no views", "2 frames"),
        (keep(lambda number, entry: number % COUNT == 0), "seen by one camera only", "cameras or more at every frame"),
        (keep(lambda number, entry: entry["frame"] != 6 or number % COUNT < 2), "Frame 6 has 2 views to fit", "at least 3"),
        (each(lambda entry: entry.pop("geometry_file_path")), "has no depth and normals", "geometry_file_path"),
        (lambda table: table["frames"][8].update(layer=9), "View 8 .*no layer 9", "again"),
        (lambda table: table["frames"][8].update(layer=-1), "View 8 .*no layer -1", "again"),
        (lambda table: table["frames"][8].update(layer="1"), "View 8 .*no layer '1'", "again"),
        (lambda table: table["frames"][8].update(geometry_file_path="../passes.npz"), "outside its folder", "relative"),
        (each(lambda entry: entry.pop("layer")), "depth or normals have a wrong shape|larger than the picture", "again"),
    ],
)
def test_bad_tables_are_refused_with_what_is_wrong(tmp_path, apply, sentence, hint):
    write(tmp_path)
    change(tmp_path, apply)
    with pytest.raises(KilnError, match=sentence) as caught:
        load(tmp_path)
    assert caught.value.code == "bad-input" and hint in caught.value.hint


def rewrite(folder, frame, **arrays):
    path = folder / f"passes_{frame:05}.npz"
    with np.load(path) as packed:
        kept = dict(packed)
    np.savez_compressed(path, **{**kept, **{name: apply(kept[name].copy()) for name, apply in arrays.items()}})


def poison(depth):
    depth[2, 5, 5] = np.nan
    return depth


def hide(folder, frame, views=range(COUNT)):
    for index in views:
        path = folder / f"color_{frame:05}_{index:03}.png"
        pixels = np.array(Image.open(path))
        pixels[..., 3] = 0
        Image.fromarray(pixels, "RGBA").save(path)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: rewrite(folder, 6, depth=poison), "color_00006_002.png.*wrong shape or values"),
        (lambda folder: rewrite(folder, 6, depth=lambda depth: depth[:, :-1]), r"color_00006_00\d.png.*wrong shape or values"),
        (lambda folder: rewrite(folder, 6, depth=lambda depth: depth[:3]), r"color_00006_00\d.png.*no layer"),
        (lambda folder: (folder / "passes_00006.npz").write_bytes(b"PK broken"), "depth and normals cannot be read"),
        (lambda folder: (folder / "passes_00006.npz").unlink(), "depth and normals cannot be read"),
        (lambda folder: hide(folder, 6), "At frame 6 all views are empty"),
        (lambda folder: rewrite(folder, 10, depth=np.zeros_like), "At frame 10 all views are empty"),
        (lambda folder: hide(folder, 10, range(0, 6, 2)), "views of frame 10 do not show one subject"),
    ],
)
def test_bad_pictures_are_refused_with_the_frame(tmp_path, spoil, sentence):
    write(tmp_path)
    spoil(tmp_path)
    with pytest.raises(KilnError, match=sentence) as caught:
        load(tmp_path)
    assert caught.value.code == "bad-input" and caught.value.hint


def test_a_subject_that_leaves_the_pictures_is_refused(tmp_path):
    write(tmp_path, frames=(4, 6, 15), ball=lambda frame: centre(frame) * np.array([1.1, 1, 1]))
    with pytest.raises(KilnError, match=r"leaves the pictures: it reaches the edge of \d+ of 21 views, first at frame 15"):
        load(tmp_path)


def test_a_small_subject_far_from_the_middle_is_taken(tmp_path):
    """Its hull is looked for where it is at each moment: in the cells of a whole still it would fall between them."""
    write(tmp_path, frames=range(0, 12, 2))
    assert len(load(tmp_path)) == 6
