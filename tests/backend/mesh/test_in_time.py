"""A mesh in time: carried onto the surface that each moment's views have, and coloured from all of them."""

from dataclasses import replace

import numpy as np
import pytest

from backend.mesh import bake, raster
from backend.mesh.carry import carry
from backend.mesh.measure import psnr, tracking
from backend.mesh.mesh import Mesh, MovingMesh
from backend.splats.motion import Binding, Motion
from backend.splats.sequence import SplatSequence
from backend.views.sequence import ViewSequence
from protocol import recipes
from tests.backend.splats import reference, two_balls

MOMENTS = 4


@pytest.fixture(scope="module")
def views():
    return two_balls.views(MOMENTS, fitted=8, size=80)


def spheres(rings=16, segments=32):
    """Both balls at rest as one mesh, and which ball each vertex belongs to."""
    vertices, faces, ball = [], [], []
    for number, ((_, centre), radius) in enumerate(zip(two_balls.poses(0), two_balls.RADII, strict=True)):
        height, turn = np.meshgrid(np.linspace(0, np.pi, rings + 1)[1:-1], np.arange(segments) / segments * 2 * np.pi, indexing="ij")
        ring = np.stack([np.sin(height) * np.cos(turn), np.sin(height) * np.sin(turn), np.cos(height)], -1).reshape(-1, 3)
        unit = np.concatenate([[[0, 0, 1.0]], ring, [[0, 0, -1.0]]])
        first, last, start = 0, len(unit) - 1, sum(map(len, vertices))
        at = 1 + np.arange((rings - 1) * segments).reshape(rings - 1, segments)
        a, b, c, d = at[:-1], np.roll(at, -1, 1)[:-1], at[1:], np.roll(at, -1, 1)[1:]
        sides = np.concatenate([np.stack([a, c, b], -1).reshape(-1, 3), np.stack([b, c, d], -1).reshape(-1, 3)])
        top = np.stack([np.full(segments, first), at[0], np.roll(at[0], -1)], 1)
        bottom = np.stack([np.full(segments, last), np.roll(at[-1], -1), at[-1]], 1)
        vertices.append(unit * radius + centre)
        faces.append(np.concatenate([sides, top, bottom]) + start)
        ball.append(np.full(len(unit), number))
    return Mesh(np.concatenate(vertices).astype(np.float32), np.concatenate(faces).astype(np.int32)), np.concatenate(ball)


def bound(motion: Motion, mesh: Mesh, ball: np.ndarray) -> Motion:
    """The motion with the mesh's own vertices as anchors, as `follow` makes it."""
    anchors, of_anchor = two_balls.points(300)
    nearest = [np.flatnonzero(of_anchor == one)[np.argmin(np.linalg.norm(anchors[of_anchor == one] - point, axis=1))]
               for point, one in zip(mesh.vertices, ball, strict=True)]  # fmt: skip
    return replace(motion, anchors=mesh.vertices, anchoring=Binding(motion.anchoring.nodes[nearest], motion.anchoring.weights[nearest]))


def true_vertices(mesh: Mesh, ball: np.ndarray) -> np.ndarray:
    return np.stack([two_balls.carried(mesh.vertices, ball, moment) for moment in range(MOMENTS)])


def test_a_surface_is_drawn_to_the_depth_and_its_points_stay_the_points_that_they_are(views):
    mesh, ball = spheres()
    motion = bound(two_balls.motion(MOMENTS, error=0.01), mesh, ball)
    binding = motion.bind(mesh.vertices)
    plain = np.stack([motion.carry(mesh.vertices, binding, moment) for moment in range(MOMENTS)])
    moving = carry(mesh, motion, views)
    truth = true_vertices(mesh, ball)

    def off_surface(vertices):
        gaps = []
        for moment in range(1, MOMENTS):
            for one, ((_, centre), radius) in enumerate(zip(two_balls.poses(moment), two_balls.RADII, strict=True)):
                gaps.append(np.abs(np.linalg.norm(vertices[moment][ball == one] - centre, axis=1) - radius))
        return np.concatenate(gaps).mean()

    assert off_surface(moving.vertices) < 0.6 * off_surface(plain)
    assert np.array_equal(moving.vertices[0], mesh.vertices)
    strayed = np.linalg.norm(moving.vertices - truth, axis=-1)[1:]
    assert strayed.mean() < np.linalg.norm(plain - truth, axis=-1)[1:].mean()


def test_tracking_is_nought_for_the_true_motion_and_what_was_added_otherwise():
    mesh, ball = spheres()
    truth = true_vertices(mesh, ball).astype(float)
    diagonal = np.linalg.norm(np.ptp(truth[0], axis=0))
    # What is left is that a point is tied to one of many samples of the surface beside it.
    assert tracking(truth, mesh.faces, truth, mesh.faces, 0).mean() < 0.003
    moved = truth.copy()
    moved[2:, :, 0] += 0.05 * diagonal
    strayed = tracking(moved, mesh.faces, truth, mesh.faces, 0).mean(1)
    assert strayed[:2].max() < 0.003 and np.abs(strayed[2:] - 0.05).max() < 0.003


@pytest.fixture(scope="module")
def still_splats():
    splats = reference.cloud(10, 0, 0)
    places = np.tile(splats.means[None], (MOMENTS, 1, 1))
    turns = np.tile(np.float32([1, 0, 0, 0]), (MOMENTS, 10, 1))
    return SplatSequence(splats, places, turns)


def test_texture_of_all_moments_shows_what_held_out_views_show(views, still_splats):
    mesh, ball = spheres()
    moving = MovingMesh(true_vertices(mesh, ball), mesh.faces, 0, views.frames, views.fps)
    made = bake.bake_in_time(moving, still_splats, views, recipes.Texture(size=256))
    for moment in range(MOMENTS):
        posed = replace(made.mesh, vertices=made.vertices[moment], normals=made.normals[moment], normal_map=None, tangents=None)
        scored = views.scored_at(moment)
        color, _ = raster.render(posed, scored.cameras[0])
        assert psnr(color, scored.on_black()[0]) > 26
    # The balls' own shape is the mesh's: turned back to rest, the views' normals are the mesh's, whatever the moment.
    assert made.mesh.normal_map is not None
    upright = made.mesh.normal_map[..., 2][made.mesh.normal_map[..., 2] > 0] / 127.5 - 1
    assert np.degrees(np.arccos(np.clip(upright, -1, 1))).mean() < 6


def test_what_is_hidden_at_one_moment_is_coloured_from_another(views, still_splats):
    mesh, ball = spheres()
    moving = MovingMesh(true_vertices(mesh, ball), mesh.faces, 0, views.frames, views.fps)
    # At rest one camera alone; at the other moments all of them.
    kept = views.views.holdout | (views.time > 0) | (np.cumsum(views.time == 0) == 1)
    fewer = ViewSequence(views.views.subset(kept), views.time[kept], views.frames, views.fps)
    at_rest = fewer.time == 0
    alone = ViewSequence(fewer.views.subset(at_rest), fewer.time[at_rest], fewer.frames, fewer.fps)
    settings = recipes.Texture(size=128)
    assert bake.bake_in_time(moving, still_splats, alone, settings).mesh.texels_seen < 0.7
    assert bake.bake_in_time(moving, still_splats, fewer, settings).mesh.texels_seen > 0.95


def test_of_more_views_than_can_be_looked_at_some_of_all_cameras_and_moments_are(views, still_splats, monkeypatch):
    monkeypatch.setattr(bake, "MOST_PIXELS", 16 * 80 * 80)  # half of them
    mesh, ball = spheres()
    moving = MovingMesh(true_vertices(mesh, ball), mesh.faces, 0, views.frames, views.fps)
    only = views.views.holdout | (views.time > 0) | (np.cumsum(views.time == 0) == 1)
    fewer = ViewSequence(views.views.subset(only), views.time[only], views.frames, views.fps)
    assert bake.bake_in_time(moving, still_splats, fewer, recipes.Texture(size=128)).mesh.texels_seen > 0.9
