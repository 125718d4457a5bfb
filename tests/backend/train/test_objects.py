"""Procedural objects and their turntables."""

import json

import numpy as np
import pytest
from PIL import Image

from backend.train import objects, turntables
from backend.views.orbit import Orbit
from protocol.errors import KilnError

EVERY = range(len(objects.FAMILIES))


def welded(thing):
    _, vertex = np.unique(np.round(thing.vertices.astype(float) * 2e4).astype(int), axis=0, return_inverse=True)
    faces = vertex.ravel()[thing.faces]
    return faces[(faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 0] != faces[:, 2])]


@pytest.mark.parametrize("family", EVERY)
def test_objects_are_closed_turned_outwards_and_in_the_unit_sphere(family):
    for seed in range(3):
        thing = objects.make(seed, family)
        assert thing.family == family and 0 <= thing.colors.min() and thing.colors.max() <= 1
        assert 0.8 < np.linalg.norm(thing.vertices, axis=1).max() < 1
        faces = welded(thing)
        edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
        count = faces.max() + 1
        assert np.array_equal(np.sort(edges @ [count, 1]), np.sort(edges @ [1, count]))  # each edge is met once each way
        corner = thing.vertices[thing.faces].astype(float)
        assert np.einsum("fi,fi->", corner[:, 0], np.cross(corner[:, 1], corner[:, 2])) > 0  # six times the volume


def test_a_seed_is_an_object_and_another_seed_another():
    first, again, other = objects.make(5), objects.make(5), objects.make(6)
    assert np.array_equal(first.vertices, again.vertices) and np.array_equal(first.colors, again.colors)
    assert first.vertices.shape != other.vertices.shape or np.abs(first.vertices - other.vertices).max() > 0.05
    for family in EVERY:
        one, two = (turntables.turntable(objects.make(seed, family), 20.0, 32, 1)[0] for seed in (1, 2))
        assert np.abs(one - two).mean() > 0.01


def test_training_draws_no_family_that_is_held_out():
    drawn = {objects.make(seed).family for seed in range(150)}
    assert not drawn & set(objects.HELD_OUT) and len(drawn) > 15


def test_azimuth_90_looks_from_the_positive_x_side():
    """A red ball at +X, a blue one at -Y, seen from 0 and 90 degrees at elevation 30."""
    balls = [objects.ellipsoid((0.15, 0.15, 0.15)) for _ in range(2)]
    places = np.array([[0.6, 0, 0], [0, -0.6, 0]])
    count = len(balls[0][0])
    thing = objects.Object(
        np.concatenate([ball[0] + place for ball, place in zip(balls, places, strict=True)]).astype(np.float32),
        np.concatenate([balls[0][2], balls[1][2] + count]).astype(np.int32),
        np.repeat(np.array([[1, 0, 0], [0, 0, 1]], np.float32), count, 0),
        0,
    )
    frames, cover = turntables.turntable(thing, 30.0, 96, 4)
    for frame, camera in zip(frames, Orbit.turn(4, 30.0, turntables.FOV).cameras(96), strict=True):
        for place, band in zip(places, (0, 2), strict=True):
            spots = np.argwhere((frame[..., band] > 0.9) & (frame[..., 2 - band] < 0.1))[:, ::-1] + 0.5
            assert np.abs(spots.mean(0) - camera.project(place[None])[0][0]).max() < 1.0
    red = [np.argwhere(frame[..., 2] < 0.1)[:, 1].mean() for frame in frames]
    assert red[0] > 56 and abs(red[1] - 48) < 2 and red[2] < 40  # on the right, in front, on the left
    assert ((cover == 0) == (frames.min(-1) == 1)).mean() > 0.99


def _written(folder, cameras, frames):
    folder.mkdir(exist_ok=True)
    entries = []
    for number, (camera, frame) in enumerate(zip(cameras, frames, strict=True)):
        Image.fromarray((frame * 255 + 0.5).astype(np.uint8), "RGBA").save(folder / f"{number}.png")
        matrix = camera.world_from_camera @ np.diag([1.0, -1, -1, 1])
        entries.append({"file_path": f"{number}.png", "transform_matrix": matrix.tolist()})
    size, angle = cameras[0].width, 2 * np.arctan(cameras[0].width / 2 / cameras[0].fx)
    (folder / "transforms.json").write_text(json.dumps({"camera_angle_x": angle, "w": size, "h": size, "frames": entries}))


def test_a_folder_of_views_is_read_as_a_turntable_or_refused(tmp_path):
    thing = objects.make(3, 5)
    orbit = Orbit.turn(12, 25.0, 35.0)
    colors, cover = turntables.turntable(thing, 25.0, 48, 12, 35.0)
    straight = (colors - (1 - cover[..., None])) / np.maximum(cover[..., None], 1e-6)
    pictures = np.concatenate([straight.clip(0, 1), cover[..., None]], 3)
    shuffled = np.roll(np.arange(12), 5)
    cameras = orbit.cameras(48)
    _written(tmp_path / "turn", [cameras[k] for k in shuffled], pictures[shuffled])
    found = turntables.read(tmp_path / "turn")
    assert np.abs(found.frames - colors).max() < 0.02
    assert abs(found.orbit.elevation - 25) < 0.01 and abs(found.orbit.fov - 35) < 0.01
    turned = found.from_view(3, 7, 24)
    assert turned.shape == (7, 24, 24, 3) and np.array_equal(turned[0], turned[6])
    assert np.abs(turned[1].mean() - found.frames[5].mean()) < 0.01

    uneven = Orbit(np.array([*orbit.azimuths[:-1], 345.0]), 25.0, 35.0, orbit.distance).cameras(48)
    _written(tmp_path / "uneven", uneven, pictures)
    with pytest.raises(KilnError, match="steps between neighbours"):
        turntables.read(tmp_path / "uneven")
    tilted = [*cameras[:-1], Orbit(orbit.azimuths[-1:], 40.0, 35.0, orbit.distance).cameras(48)[0]]
    _written(tmp_path / "tilted", tilted, pictures)
    with pytest.raises(KilnError, match="elevations"):
        turntables.read(tmp_path / "tilted")
