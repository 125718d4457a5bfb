"""A tube swept along a curve that bends, turns about itself or opens like a fork: where every point of it is at each moment is known."""

import numpy as np
import pytest

from backend.mesh import raster
from backend.mesh.mesh import Mesh, TexturedMesh
from backend.splats.follow import follow, most_open
from backend.views.cameras import around
from backend.views.sequence import ViewSequence
from backend.views.views import Frame, Views
from protocol import recipes

ROUND, RADIUS, SIZE = 16, 0.11, 112
SETTINGS = recipes.FitMotion(nodes=60)


def tube(curve, turn=0.0, flat=0.0):
    """Rings of ROUND + 1 points (the last is the first again, for the texture's seam) around a curve in the x-z plane, rounded off."""
    along = np.gradient(curve, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    side = np.array([0.0, 1.0, 0.0])
    angle = np.linspace(0, 2 * np.pi, ROUND + 1) + turn
    across = np.cross(along, side)
    ends = np.sqrt(np.clip(1 - np.linspace(-1, 1, len(curve)) ** 16, 0, 1))  # rounded
    ring = np.cos(angle)[None, :, None] * side + np.sin(angle)[None, :, None] * across[:, None]
    ring = ring * (1 + flat * np.cos(2 * (angle - turn)))[None, :, None]
    return (curve[:, None] + RADIUS * ends[:, None, None] * ring).reshape(-1, 3).astype(np.float32)


def connected(rings):
    """Faces of the tube with its seam, and which welded vertex each of its vertices is."""
    row, column = (one.ravel() for one in np.meshgrid(np.arange(rings - 1), np.arange(ROUND), indexing="ij"))
    a = row * (ROUND + 1) + column
    b, c, d = a + 1, a + ROUND + 1, a + ROUND + 2
    place = np.arange(rings * (ROUND + 1))
    return np.concatenate([np.stack([a, b, c], 1), np.stack([b, d, c], 1)]).astype(np.int32), (place // (ROUND + 1), place % (ROUND + 1))


def filmed(moments, texture):
    """What six cameras see of a tube at each moment, and its surface there, welded at the seam."""
    rings = len(moments[0]) // (ROUND + 1)
    faces, (row, column) = connected(rings)
    uv = np.stack([column / ROUND, row / (rings - 1)], 1).astype(np.float32)
    welded = row * ROUND + column % ROUND
    first = np.unique(welded, return_index=True)[1]
    images, alphas, depths, normals, cameras, time = [], [], [], [], [], []
    for moment, vertices in enumerate(moments):
        smooth = np.zeros((len(first), 3))
        for corner in range(3):
            np.add.at(smooth, welded[faces[:, corner]], np.cross(*(vertices[faces[:, k]] - vertices[faces[:, 0]] for k in (1, 2))))
        smooth = (smooth / np.maximum(np.linalg.norm(smooth, axis=1, keepdims=True), 1e-12))[welded].astype(np.float32)
        mesh = TexturedMesh(vertices, smooth, uv, faces, texture)
        for camera in around(6, SIZE, 0.6):
            color, there = raster.sample(mesh, camera, texture / np.float32(255))
            images.append(color), alphas.append(there.astype(np.float32)), cameras.append(camera), time.append(moment)
            depths.append(raster.depth(mesh, camera)[0]), normals.append(raster.normals(mesh, camera)[0].astype(np.float16))
    still = np.zeros(len(cameras), bool)
    views = Views(cameras, *(np.stack(one) for one in (images, alphas, depths, normals)), still, Frame(np.zeros(3), 1.0))
    sequence = ViewSequence(views, np.array(time), np.arange(len(moments), dtype=float), 24.0)
    return sequence, [Mesh(vertices[first], welded[faces].astype(np.int32)) for vertices in moments]


def spots():
    """Soft dots of colour all over, the same on both sides of the seam."""
    y, x = np.mgrid[0:128, 0:128] / 128 * 2 * np.pi
    waves = [np.sin(3 * x + y) * np.cos(5 * y), np.cos(2 * x - 4 * y), np.sin(4 * x) * np.sin(3 * y + 1)]
    return (127 + 120 * np.stack(waves, -1)).astype(np.uint8)


def plain():
    return np.full((4, 4, 3), (200, 120, 60), np.uint8)


def bar(bend, turn=0.0, flat=0.0):
    """A bar of length 1.3 that bends along a circle by `bend` radians, held in its middle."""
    s = np.linspace(-0.65, 0.65, 40)
    k = bend / 1.3
    curve = np.stack([(1 - np.cos(k * s)) / k, 0 * s, np.sin(k * s) / k], 1) if abs(k) > 1e-6 else np.stack([0 * s, 0 * s, s], 1)
    return tube(curve, turn, flat)


def fork(opening):
    """A U whose legs stand 0.04 apart at rest, much nearer than nodes are to each other, and open by `opening` radians."""
    legs = np.linspace(0, 1.0, 24)[:, None]
    arc = np.linspace(0, np.pi, 14)[1:-1, None]
    gap = RADIUS + 0.02
    bow = np.concatenate([-gap * np.cos(arc), 0 * arc, 0.4 + gap * np.sin(arc)], 1)
    left = np.concatenate([-gap - np.sin(opening) * (1 - legs), 0 * legs, 0.4 - np.cos(opening) * (1 - legs)], 1)
    right = left[::-1] * (-1, 1, 1)
    return tube(np.concatenate([left, bow, right]))


def errors(motion, surfaces):
    """Of all vertices at each moment, in percent of the box's diagonal."""
    diagonal = np.linalg.norm(np.ptp(surfaces[motion.rest].vertices, axis=0))
    found = [motion.carry(motion.anchors, motion.anchoring, moment) for moment in range(len(motion))]
    return [100 * np.linalg.norm(one - true.vertices, axis=1) / diagonal for one, true in zip(found, surfaces, strict=True)]


def test_a_flat_bar_of_one_colour_is_followed_as_it_bends_by_its_shape():
    views, surfaces = filmed([bar(bend, flat=0.4) for bend in (-0.4, 0.0, 0.4, 0.8)], plain())
    found = errors(follow(surfaces[1], views, 1, SETTINGS, 0), surfaces)
    assert found[1].max() < 1e-3  # rest
    still = errors(_unmoved(surfaces[1], len(surfaces)), surfaces)
    for moment in (0, 2, 3):
        assert found[moment].mean() < 0.6 and found[moment].mean() < 0.2 * still[moment].mean()


def test_a_turn_about_its_own_axis_is_followed_by_colour_alone():
    views, surfaces = filmed([bar(0.0, turn) for turn in (-0.25, 0.0, 0.25, 0.5)], spots())
    found = errors(follow(surfaces[1], views, 1, SETTINGS, 0), surfaces)
    still = errors(_unmoved(surfaces[1], len(surfaces)), surfaces)
    for moment in (0, 2, 3):
        assert found[moment].mean() < 0.15 * still[moment].mean()


def test_legs_that_touch_are_carried_each_by_its_own_nodes():
    views, surfaces = filmed([fork(opening) for opening in (0.0, 0.12, 0.24)], spots())
    motion = follow(surfaces[0], views, 0, SETTINGS, 0)
    low = motion.anchors[:, 2] < 0.0
    side = np.sign(motion.anchors[:, 0])
    carriers = np.sign(motion.nodes[motion.anchoring.nodes, 0])
    foreign = (motion.anchoring.weights * (carriers != side[:, None])).sum(1)
    assert low.sum() > 200 and foreign[low].max() == 0
    assert errors(motion, surfaces)[2].mean() < 0.7


def test_the_most_open_moment_is_where_legs_stand_apart_and_of_equals_the_middle_one():
    views, _ = filmed([fork(opening) for opening in (0.0, 0.02, 0.3)], plain())
    assert most_open(views) == 2
    views, _ = filmed([bar(bend) for bend in (0.0, 0.01, 0.02, 0.03, 0.04)], plain())
    assert most_open(views) == 2


def test_weights_sum_to_one_and_rest_is_the_identity():
    views, surfaces = filmed([bar(0.0), bar(0.1)], spots())
    motion = follow(surfaces[1], views, 1, SETTINGS, 3)
    assert np.allclose(motion.anchoring.weights.sum(1), 1, atol=1e-5) and motion.anchoring.nodes.max() < len(motion.nodes) == SETTINGS.nodes
    assert np.array_equal(motion.rotations[1], np.tile(np.float32([1, 0, 0, 0]), (SETTINGS.nodes, 1))) and not motion.translations[1].any()
    again = follow(surfaces[1], views, 1, SETTINGS, 3)
    assert np.array_equal(motion.translations, again.translations) and np.array_equal(motion.rotations, again.rotations)


def test_progress_rises_and_stops_the_work_when_it_raises():
    views, surfaces = filmed([bar(0.0), bar(0.05), bar(0.1)], plain())
    told = []

    def report(fraction, text="", preview=None):
        told.append(fraction)
        if fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow(surfaces[0], views, 0, SETTINGS, 0, report)
    assert told == sorted(told) and len(told) > 3 and told[-1] < 1


def _unmoved(surface, moments):
    """The motion of what stands still."""
    from backend.splats.motion import Binding, Motion

    count = len(surface.vertices)
    return Motion(
        0,
        surface.vertices,
        np.tile(np.float32([1, 0, 0, 0]), (moments, count, 1)),
        np.zeros((moments, count, 3), np.float32),
        surface.vertices,
        Binding(np.arange(count, dtype=np.int32)[:, None], np.ones((count, 1), np.float32)),
    )
