import dataclasses

import numba
import numpy as np
import pytest
import trimesh
from scipy.spatial import cKDTree

from backend.mesh.extract import extract
from backend.progress import silent
from backend.splats.model import Splats
from backend.views.ball import ball
from protocol import recipes
from protocol.errors import Cancelled, KilnError
from tests.backend.mesh.scenes import box, capture, grey, minus, rod, sphere, torus, union

SURFACE = recipes.Surface(grid=64, faces=6000)


def surface_of(distance, p=SURFACE, **views) -> trimesh.Trimesh:
    mesh = extract(None, capture(distance, grey, **views), p)
    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)


def test_a_sphere_comes_back_closed_outward_and_within_a_fifth_of_a_cell():
    found = surface_of(sphere(0.7))
    assert found.is_watertight and found.is_winding_consistent
    assert found.volume == pytest.approx(4 / 3 * np.pi * 0.7**3, rel=0.01)  # positive: faces look outward
    cell = 1.4 / 64
    assert np.abs(np.linalg.norm(found.vertices, axis=1) - 0.7).mean() < cell / 5


def test_a_torus_keeps_its_hole_and_its_volume():
    found = surface_of(torus(0.6, 0.22))
    assert found.is_watertight and found.euler_number == 0
    assert found.volume == pytest.approx(2 * np.pi**2 * 0.6 * 0.22**2, rel=0.02)
    assert np.abs(torus(0.6, 0.22)(found.vertices)).max() < 1.4 / 64


def test_the_face_budget_is_kept_and_the_shape_with_it():
    found = surface_of(torus(0.6, 0.22), dataclasses.replace(SURFACE, faces=600))
    assert len(found.faces) <= 600
    assert found.is_watertight and found.euler_number == 0
    assert found.volume == pytest.approx(2 * np.pi**2 * 0.6 * 0.22**2, rel=0.03)


def test_more_handles_than_the_budget_has_triangles_for_close_on_a_coarser_grid():
    def sieve(p):  # 49 holes through a plate: at least 200 triangles
        holes = np.stack([np.hypot(p[..., 0] - x, p[..., 1] - y) for x in np.linspace(-0.5, 0.5, 7) for y in np.linspace(-0.5, 0.5, 7)])
        return np.maximum(box((0.6, 0.6, 0.05))(p), 0.04 - holes.min(0))

    fine = surface_of(sieve, dataclasses.replace(SURFACE, faces=3000), size=128)
    assert fine.euler_number < -60 and len(fine.faces) == 3000
    coarse = surface_of(sieve, dataclasses.replace(SURFACE, faces=150), size=128)
    assert len(coarse.faces) <= 150 and coarse.is_watertight
    assert coarse.extents == pytest.approx(fine.extents, abs=0.12)


def test_smoothing_does_not_shrink():
    rough = surface_of(sphere(0.5), dataclasses.replace(SURFACE, smoothing=0))
    smooth = surface_of(sphere(0.5), dataclasses.replace(SURFACE, smoothing=100))
    assert smooth.volume == pytest.approx(rough.volume, rel=0.005)


def test_a_hidden_hollow_makes_no_second_wall():
    found = surface_of(minus(box((0.5, 0.5, 0.5)), box((0.3, 0.3, 0.3))))
    assert found.body_count == 1
    assert found.volume == pytest.approx(1.0, rel=0.03)


def test_a_part_thinner_than_a_cell_has_its_own_thickness_where_views_have_normals():
    cell = 1.6 / 48
    wire = rod(0.35 * cell, 0.8)
    found = surface_of(union(wire, sphere(0.2, (0, 0, -0.6))), dataclasses.replace(SURFACE, grid=48), size=96)
    along = found.vertices[(found.vertices[:, 2] > -0.3) & (found.vertices[:, 2] < 0.7)]
    assert len(along) > 100
    assert np.abs(wire(along)).mean() < 0.06 * cell


def test_many_faces_get_a_grid_on_which_they_show_something():
    rough = dataclasses.replace(SURFACE, grid=32)
    few, many = (surface_of(sphere(0.7), dataclasses.replace(rough, faces=faces)) for faces in (20_000, 21_000))
    assert len(few.faces) < 10_000 < len(many.faces) <= 21_000


def test_a_part_thinner_than_a_cell_is_kept_from_end_to_end():
    cell = 1.6 / 64
    bar, foot = rod(0.2 * cell, 0.8), np.array([0.02, 0.013, 0])  # off the pixels' common border
    found = surface_of(union(sphere(0.3, (0, 0, -0.5)), lambda p: bar(p - foot)), size=96)
    assert found.is_watertight and found.body_count == 1
    assert found.bounds[1, 2] > 0.8 - cell
    above = found.vertices[found.vertices[:, 2] > 0]
    assert np.linalg.norm((above - foot)[:, :2], axis=1).max() < 1.6 * cell  # and not much fatter than the grid makes it


def test_a_thin_part_before_a_distant_surface_is_kept():
    bar = rod(0.03, 0.7)
    found = surface_of(union(box((0.1, 0.8, 0.8)), lambda p: bar(p - np.array([0.5, 0, 0]))), size=96)
    assert found.body_count == 2
    along = found.vertices[found.vertices[:, 0] > 0.35][:, 2]
    assert along.min() < -0.65 and along.max() > 0.65


def test_two_surfaces_at_a_step_are_not_joined_by_a_web():
    found = surface_of(union(box((0.8, 0.8, 0.05)), sphere(0.25, (0, 0, 0.6))))
    assert found.body_count == 2
    between = (np.abs(found.vertices[:, 2] - 0.2) < 0.08).sum()
    assert between == 0


def test_a_speck_is_dropped_and_a_real_piece_is_not():
    parts = union(sphere(0.4), sphere(0.2, (0.7, 0, 0)), sphere(0.03, (0, 0.8, 0)))
    assert surface_of(parts, dataclasses.replace(SURFACE, smallest_piece=0.01)).body_count == 2
    assert surface_of(parts, dataclasses.replace(SURFACE, smallest_piece=0.0)).body_count == 3


def test_what_no_view_sees_is_closed():
    views = capture(sphere(0.6), grey)
    above = np.array([camera.centre[2] > 0 for camera in views.cameras])
    mesh = extract(None, dataclasses.replace(views, holdout=~above), SURFACE)
    assert trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).is_watertight


@pytest.mark.parametrize("count", [12, 20])
@pytest.mark.parametrize("given", ["depth", "splats"])
def test_what_lies_beside_the_pictures_is_outside(count, given):
    """The corners of the box around this ball lie in few pictures or none, and no view sees through them all."""
    views = ball(96, count, 0.87)
    if given == "splats":
        views = dataclasses.replace(views, depth=None, normals=None)
    mesh = extract(shell_of_splats(0.87), views, SURFACE)
    assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - 0.87).max() < 0.06
    assert trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).body_count == 1


def test_a_subject_that_no_picture_holds_whole_stays_solid():
    views = ball(96, 60, 0.87)
    middle = slice(24, 72)
    cropped = dataclasses.replace(
        views,
        cameras=[dataclasses.replace(camera, width=48, height=48, cx=camera.cx - 24, cy=camera.cy - 24) for camera in views.cameras],
        **{key: np.ascontiguousarray(getattr(views, key)[:, middle, middle]) for key in ("images", "alpha", "depth", "normals")},
    )
    mesh = extract(None, cropped, SURFACE)
    assert trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).is_watertight
    assert np.linalg.norm(mesh.vertices, axis=1).min() > 0.87 - 0.06  # nothing is eaten away within


def test_an_antenna_a_pixel_wide_keeps_its_length_and_stays_on_its_box():
    """A pixel at the middle of these views is 0.027."""
    bar, body, foot = rod(0.012, 0.85), box((0.3, 0.25, 0.25)), np.array([0.11, 0.067, 0])
    views = capture(union(lambda p: body(p + [0, 0, 0.4]), lambda p: np.maximum(bar(p - foot), -0.4 - p[:, 2])), grey, size=80)
    mesh = extract(None, views, SURFACE)
    found = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    assert found.is_watertight and found.body_count == 1
    assert found.bounds[1, 2] == pytest.approx(0.862, abs=2 * 1.5 / 64)
    ends = np.stack([np.full(40, foot[0]), np.full(40, foot[1]), np.linspace(-0.1, 0.82, 40)], 1)
    assert cKDTree(found.subdivide_to_size(1 / 64).vertices).query(ends)[0].max() < 2 * 1.5 / 64  # all the way


def test_two_objects_are_kept_and_depth_that_the_silhouettes_deny_is_not():
    views = capture(union(sphere(0.3, (-0.5, 0, 0)), sphere(0.25, (0.5, 0.1, 0.2))), grey)
    depth = views.depth.copy()
    depth[0, 5:9, 5:9] = 3.5  # one view has depth where its own and the others' alpha show background
    assert views.alpha[0, 5:9, 5:9].max() == 0
    mesh = extract(None, dataclasses.replace(views, depth=depth), SURFACE)
    found = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    pieces = found.split(only_watertight=False)
    assert sorted(piece.centroid[0] > 0 for piece in pieces) == [False, True]
    assert sorted(piece.volume for piece in pieces) == pytest.approx([4 / 3 * np.pi * r**3 for r in (0.25, 0.3)], rel=0.05)


def test_held_out_views_are_not_used():
    views = capture(sphere(0.6), grey)
    spoiled = dataclasses.replace(views, depth=np.where(views.holdout[:, None, None], 1.0, views.depth).astype(np.float32))
    assert np.array_equal(extract(None, views, SURFACE).vertices, extract(None, spoiled, SURFACE).vertices)


def test_views_without_any_depth_are_refused_with_a_sentence():
    views = capture(sphere(0.6), grey)
    with pytest.raises(KilnError) as caught:
        extract(None, dataclasses.replace(views, depth=np.zeros_like(views.depth)), SURFACE)
    assert caught.value.code == "no-surface" and caught.value.hint


def test_it_stops_when_its_progress_report_says_so():
    def report(fraction, text="", preview=None):
        if fraction > 0.3:
            raise Cancelled

    with pytest.raises(Cancelled):
        extract(None, capture(sphere(0.6), grey, count=8, size=48), SURFACE, report)
    assert silent(1.0) is None


def shell_of_splats(radius: float, count: int = 6000) -> Splats:
    k = np.arange(count) + 0.5
    height, turn = 1 - 2 * k / count, np.pi * (1 + 5**0.5) * k
    ring = np.sqrt(1 - height**2)
    places = radius * np.stack([ring * np.cos(turn), ring * np.sin(turn), height], 1)
    return Splats(
        places.astype(np.float32),
        np.tile(np.array([1, 0, 0, 0], np.float32), (count, 1)),
        np.full((count, 3), np.log(1.5 * radius / np.sqrt(count)), np.float32),
        np.full(count, 2.0, np.float32),
        np.zeros((count, 1, 3), np.float32),
    )


def test_without_depth_splats_give_one_closed_wall():
    views = dataclasses.replace(capture(sphere(0.6), grey), depth=None, normals=None)
    mesh = extract(shell_of_splats(0.6), views, SURFACE)
    found = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    assert found.is_watertight and found.body_count == 1  # a shell of splats has an inner side, the surface has none
    assert np.abs(np.linalg.norm(found.vertices, axis=1) - 0.6).mean() < 0.02


def test_without_depth_and_without_splats_there_is_a_sentence():
    views = dataclasses.replace(capture(sphere(0.6), grey), depth=None, normals=None)
    nothing = Splats(*(np.zeros((0, *shape), np.float32) for shape in ((3,), (4,), (3,), (), (1, 3))))
    with pytest.raises(KilnError) as caught:
        extract(nothing, views, SURFACE)
    assert caught.value.code == "no-surface"


def wheel(p):
    """A rim, a hub and six spokes across the x axis, each spoke 0.012 thick: half a pixel of a view 96 pixels wide."""
    turned = p[:, [1, 2, 0]]
    parts = [torus(0.6, 0.06)(turned), sphere(0.12)(p)]
    for k in range(3):
        along = np.array([0, np.cos(k * np.pi / 3 + 0.2), np.sin(k * np.pi / 3 + 0.2)])
        reach = np.clip(p @ along, -0.6, 0.6)
        parts.append(np.linalg.norm(p - reach[:, None] * along, axis=1) - 0.006)
    return np.min(parts, axis=0)


def test_the_spokes_of_a_wheel_are_kept():
    found = surface_of(wheel, size=96)
    assert found.is_watertight
    away = np.linspace(0.16, 0.52, 60)
    turns = np.arange(6) * np.pi / 3 + 0.2
    places = np.concatenate([np.stack([0 * away, away * np.cos(t), away * np.sin(t)], 1) for t in turns])
    assert (cKDTree(found.subdivide_to_size(1 / 64).vertices).query(places)[0] < 1.3 / 64).mean() > 0.9  # recall within a cell


def test_one_view_gives_a_closed_mesh_or_a_sentence():
    views = capture(sphere(0.6), grey)
    first = np.arange(len(views)) == 0
    mesh = extract(None, dataclasses.replace(views, holdout=~first), SURFACE)
    assert trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).is_watertight


def test_views_of_two_different_subjects_give_a_closed_mesh_or_a_sentence():
    globe, bars = capture(sphere(0.6), grey), capture(union(rod(0.1, 0.9), box((0.8, 0.1, 0.1))), grey)
    other = (np.arange(len(globe)) % 2 == 1)[:, None, None]
    mixed = dataclasses.replace(
        globe,
        alpha=np.where(other, bars.alpha, globe.alpha),
        depth=np.where(other, bars.depth, globe.depth),
        normals=np.where(other[..., None], bars.normals, globe.normals),
    )
    for views in (mixed, dataclasses.replace(mixed, depth=None, normals=None)):
        try:
            mesh = extract(shell_of_splats(0.6), views, SURFACE)
        except KilnError as error:
            assert error.code == "no-surface" and error.hint
        else:
            assert trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).is_watertight


def test_without_silhouettes_the_mesh_is_closed():
    views = capture(sphere(0.6), grey)
    mesh = extract(shell_of_splats(0.6), dataclasses.replace(views, alpha=np.ones_like(views.alpha), depth=None, normals=None), SURFACE)
    assert trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).is_watertight


def test_the_mesh_does_not_depend_on_the_number_of_threads():
    views = capture(torus(0.6, 0.22), grey, count=12)
    threads = numba.get_num_threads()
    many = extract(None, views, SURFACE)
    numba.set_num_threads(1)
    try:
        one = extract(None, views, SURFACE)
    finally:
        numba.set_num_threads(threads)
    assert np.array_equal(many.vertices, one.vertices) and np.array_equal(many.faces, one.faces)
