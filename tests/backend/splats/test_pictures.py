"""What cameras see of splats, and the colours of what they do not see."""

import dataclasses

import numpy as np

from backend.splats.model import SH_C0, Splats
from backend.splats.pictures import recolored, shown
from backend.views.cameras import around, look_at


def ball(radius: float, color, count: int = 1500) -> Splats:
    """Opaque Gaussians on a sphere."""
    heights, turns = 1 - 2 * (np.arange(count) + 0.5) / count, np.arange(count) * 2.399963
    across = np.sqrt(1 - heights**2)
    means = radius * np.stack([across * np.cos(turns), across * np.sin(turns), heights], 1)
    return Splats(
        means.astype(np.float32),
        np.tile(np.array([1, 0, 0, 0], np.float32), (count, 1)),
        np.full((count, 3), np.log(0.07 * radius), np.float32),
        np.full(count, 6.0, np.float32),
        np.tile((np.asarray(color, np.float32) - 0.5) / SH_C0, (count, 1, 1)).astype(np.float32),
    )


def both(first: Splats, second: Splats) -> Splats:
    return Splats(**{one.name: np.concatenate([getattr(first, one.name), getattr(second, one.name)]) for one in dataclasses.fields(Splats)})


def test_a_lone_splat_is_seen_whole():
    one = dataclasses.replace(ball(0.5, (1, 0, 0), 1), means=np.zeros((1, 3), np.float32))
    assert 0.7 < shown(one, around(4, 128, 0.7))[0] <= 1.0  # its faintest skirts are not drawn


def test_what_lies_within_takes_the_colours_around_it():
    splats = both(ball(0.8, (0.2, 0.6, 0.3)), ball(0.3, (1, 1, 1), 200))
    cameras = around(12, 96, 0.7)
    visible = shown(splats, cameras)
    assert visible[:1500].min() > 0.05 > visible[1500:].max()
    colors = 0.5 + SH_C0 * recolored(splats, cameras).sh[:, 0]
    assert np.abs(colors - np.array([0.2, 0.6, 0.3])).max() < 1e-5


def test_the_side_that_no_camera_sees_is_not_seen():
    splats = ball(0.8, (0.5, 0.5, 0.5))
    visible = shown(splats, [look_at((0, -3, 0), (0, 0, 0), 96, 0.7)])
    assert visible[splats.means[:, 1] < -0.4].min() > 0.05 and visible[splats.means[:, 1] > 0.4].max() < 0.05
