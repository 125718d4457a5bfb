import dataclasses

import numpy as np
import pytest
import trimesh

from backend.mesh import bake as baking
from backend.mesh import raster, unwrap
from backend.mesh.bake import bake, vertex_normals
from backend.mesh.measure import psnr
from backend.mesh.mesh import Mesh
from backend.splats.model import SH_C0, Splats
from backend.views.views import Views
from protocol import recipes
from protocol.errors import Cancelled
from tests.backend.mesh.scenes import capture, glow, grey, rod, sphere, torus, union, waves, with_passes

TEXTURE = recipes.Texture(size=256)
BALL = trimesh.creation.icosphere(4, 0.6)
RING = trimesh.creation.torus(0.6, 0.22, 64, 32)


def as_mesh(shape: trimesh.Trimesh) -> Mesh:
    return Mesh(shape.vertices.astype(np.float32), shape.faces.astype(np.int32))


def quality(mesh, views: Views) -> float:
    scores = [psnr(raster.render(mesh, camera)[0], views.on_black()[i]) for i, camera in enumerate(views.cameras) if views.holdout[i]]
    return float(np.mean(scores))


@pytest.fixture(scope="module")
def ring_views() -> Views:
    return capture(torus(0.6, 0.22), waves)


def test_a_known_colour_is_recovered_and_seen_from_new_cameras(ring_views):
    assert quality(bake(as_mesh(RING), None, ring_views, TEXTURE), ring_views) > 32


def test_texels_hold_the_colour_of_their_place(ring_views):
    mesh = bake(as_mesh(RING), None, ring_views, TEXTURE)
    middle = mesh.vertices[mesh.faces].mean(1)
    uv = mesh.uv[mesh.faces].mean(1)
    row, column = ((1 - uv[:, 1]) * 256).astype(int), (uv[:, 0] * 256).astype(int)
    error = np.abs(mesh.base_color[row, column] / 255 - waves(middle))
    assert np.median(error) < 0.02 and np.quantile(error, 0.99) < 0.15


def test_what_stands_before_does_not_bleed_into_what_is_behind():
    near = np.array([1.0, 0.0, 0.0])

    def color(p):
        return np.where((p[..., :1] > 0.45), near, np.array([0.0, 0.0, 1.0]))

    views = capture(union(sphere(0.4), sphere(0.15, (0.7, 0, 0))), color, size=96)
    mesh = bake(as_mesh(trimesh.creation.icosphere(4, 0.4)), None, views, TEXTURE)
    place = mesh.vertices[mesh.faces].mean(1)
    uv = mesh.uv[mesh.faces].mean(1)
    texel = mesh.base_color[((1 - uv[:, 1]) * 256).astype(int), (uv[:, 0] * 256).astype(int)] / 255
    facing = place[:, 0] > 0.2
    assert texel[facing, 0].max() < 0.1 and texel[facing, 2].min() > 0.9


def test_no_background_creeps_in_at_silhouettes():
    views = capture(sphere(0.6), lambda p: np.ones(p.shape))
    dark = dataclasses.replace(views, images=np.where(views.alpha[..., None] > 0, views.images, 0).astype(np.float32))
    assert bake(as_mesh(BALL), None, dark, TEXTURE).base_color.min() > 240


def test_unseen_texels_take_the_splats_colour():
    views = capture(sphere(0.6), lambda p: np.ones(p.shape))
    above = dataclasses.replace(views, holdout=np.array([camera.centre[2] < 1.0 for camera in views.cameras]))
    count = 2000
    places = BALL.vertices[:count]
    green = np.tile((np.array([0.1, 0.8, 0.1]) - 0.5) / SH_C0, (len(places), 1, 1))
    splats = Splats(
        places.astype(np.float32),
        np.tile(np.array([1, 0, 0, 0], np.float32), (len(places), 1)),
        np.full((len(places), 3), -3, np.float32),
        np.full(len(places), 3, np.float32),
        green.astype(np.float32),
    )
    mesh = bake(as_mesh(BALL), splats, above, TEXTURE)
    low = mesh.vertices[mesh.faces].mean(1)[:, 2] < -0.57  # the lowest camera sees down to -0.54
    uv = mesh.uv[mesh.faces].mean(1)[low]
    texel = mesh.base_color[((1 - uv[:, 1]) * 256).astype(int), (uv[:, 0] * 256).astype(int)] / 255
    assert np.abs(texel - [0.1, 0.8, 0.1]).max() < 0.03


def test_charts_do_not_overlap_and_cover_a_fair_share(ring_views):
    mesh = bake(as_mesh(RING), None, ring_views, TEXTURE)
    assert mesh.uv.min() >= 0 and mesh.uv.max() <= 1
    uv = mesh.uv[mesh.faces].astype(float)
    side, other = uv[:, 1] - uv[:, 0], uv[:, 2] - uv[:, 0]
    area = np.abs(side[:, 0] * other[:, 1] - side[:, 1] * other[:, 0]).sum() / 2
    screen = mesh.uv.astype(np.float64) * 1024
    covered = (raster.z_buffer(screen, np.ones(len(screen)), mesh.faces, 1024, 1024)[1] >= 0).mean()
    assert covered == pytest.approx(area, rel=0.02)  # overlapping charts would cover less than the sum of their areas
    assert covered > 0.35  # of a small texture, where padding costs most


def test_the_cut_mesh_is_the_same_surface(ring_views):
    mesh = bake(as_mesh(RING), None, ring_views, TEXTURE)
    assert np.array_equal(mesh.vertices[mesh.faces], RING.vertices.astype(np.float32)[RING.faces])


def test_normals_are_smooth_across_seams_and_point_outward(ring_views):
    mesh = bake(as_mesh(RING), None, ring_views, TEXTURE)
    _, place = np.unique(mesh.vertices, axis=0, return_inverse=True)
    first = np.zeros(place.max() + 1, int)
    first[place.ravel()] = np.arange(len(mesh.vertices))
    assert np.allclose(mesh.normals, mesh.normals[first[place.ravel()]], atol=1e-6)
    ball = vertex_normals(as_mesh(BALL))
    assert ((ball * BALL.vertices / 0.6).sum(1) > 0.999).all()


def test_it_repeats_exactly(ring_views):
    first, second = (bake(as_mesh(RING), None, ring_views, TEXTURE) for _ in range(2))
    assert np.array_equal(first.base_color, second.base_color) and np.array_equal(first.uv, second.uv)


def test_more_pixels_than_the_solver_holds_still_solve(ring_views, monkeypatch):
    monkeypatch.setattr(baking, "RAYS", int(ring_views.alpha.sum()) // 3)
    solved = bake(as_mesh(RING), None, ring_views, TEXTURE)
    monkeypatch.setattr(baking, "SWEEPS", 0)
    blended = bake(as_mesh(RING), None, ring_views, TEXTURE)
    assert not np.array_equal(solved.base_color, blended.base_color)
    assert quality(solved, ring_views) > quality(blended, ring_views)


def test_cutting_charts_stops_when_cancelled():
    def cancel(done):
        raise Cancelled

    with pytest.raises(Cancelled):
        unwrap.unwrap(as_mesh(BALL), 256, 2, cancel)


def test_a_mesh_cut_in_parts_is_the_same_surface(monkeypatch):
    mesh = as_mesh(trimesh.creation.icosphere(4, 6.0))
    monkeypatch.setattr(unwrap, "WHOLE", 2000)
    monkeypatch.setattr(unwrap, "PART", 2000)
    source, flat, faces, chart = unwrap._cut(mesh.vertices, mesh.faces)
    uv = unwrap._pack(flat, faces, 512, 2)
    assert np.array_equal(source[faces], mesh.faces) and uv.min() >= 0 and uv.max() <= 1
    again, places, new = unwrap._cut_again(mesh.vertices, mesh.faces, source, flat, faces, chart, chart[:1])  # one chart cut anew
    assert np.array_equal(again[new], mesh.faces)
    others = chart != chart[0]
    assert np.array_equal(places[new][others], flat[faces][others]) and not np.array_equal(places[new][~others], flat[faces][~others])


def test_charts_are_few_and_keep_lengths_on_a_bumpy_surface():
    shape = trimesh.creation.icosphere(5, 0.6)
    bumpy = shape.vertices * (1 + 0.004 * np.random.default_rng(0).standard_normal((len(shape.vertices), 1)))
    mesh = Mesh(bumpy.astype(np.float32), shape.faces.astype(np.int32))
    source, uv, faces = unwrap.unwrap(mesh, 1024, 4)
    label = unwrap._labels(faces, len(source))[faces[:, 0]]
    assert label.max() + 1 < 40
    corner, place = mesh.vertices[source][faces].astype(float), uv[faces].astype(float)
    side, other = place[:, 1] - place[:, 0], place[:, 2] - place[:, 0]
    laid = side[:, 0] * other[:, 1] - side[:, 1] * other[:, 0]
    true = np.linalg.norm(np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), axis=1)
    scale = np.sqrt(np.abs(laid).sum() / true.sum())
    length = np.linalg.norm(corner[:, 1] - corner[:, 0], axis=1) * scale
    up = np.bincount(label, laid > 0) / np.bincount(label)
    assert ((up < 0.001) | (up > 0.999)).all()  # packing may mirror a chart, but none is folded
    assert 0.9 < np.quantile(np.linalg.norm(side, axis=1) / length, 0.05) and np.quantile(np.linalg.norm(side, axis=1) / length, 0.95) < 1.1


def test_a_chart_that_lies_over_itself_is_noticed():
    uv = np.array([[0, 0], [1, 0], [0, 1], [0.1, 0.1], [0.9, 0.1], [0.1, 0.9]], np.float32)
    faces = np.array([[0, 1, 2], [3, 4, 5]], np.int32)
    assert unwrap._folded(uv, faces, np.array([4, 4]), 64).tolist() == [4]
    apart = uv + np.array([[0, 0]] * 3 + [[2, 0]] * 3, np.float32)
    assert len(unwrap._folded(apart / 3, faces, np.array([4, 4]), 64)) == 0


@pytest.fixture(scope="module")
def full_views() -> Views:
    return with_passes(capture(torus(0.6, 0.22), waves, size=96), emission=glow)


@pytest.fixture(scope="module")
def full(full_views):
    return bake(as_mesh(RING), None, full_views, TEXTURE)


def held_out(views):
    return [(views.cameras[i], i) for i in np.flatnonzero(views.holdout)]


def test_material_is_recovered_where_new_cameras_look(full, full_views):
    errors = []
    for camera, i in held_out(full_views):
        found, there = raster.sample(full, camera, full.material / np.float32(255))
        both = there & (full_views.depth[i] > 0)
        errors.append(np.abs(found - full_views.material[i, ..., :2] / 255)[both].mean(0))
    assert np.mean(errors, 0)[0] < 0.03 and np.mean(errors, 0)[1] < 0.03
    assert full.opacity is None  # opaque all over


def test_normals_are_finer_than_the_mesh(full, full_views):
    def error(mesh):
        angles = []
        for camera, i in held_out(full_views):
            found, there = raster.normals(mesh, camera)
            both = there & (full_views.depth[i] > 0)
            angles.append(np.degrees(np.arccos(np.clip((found * full_views.normals[i]).sum(-1)[both], -1, 1))).mean())
        return np.mean(angles)

    assert error(full) < 5
    assert error(dataclasses.replace(full, normal_map=None)) > 15


def test_emission_brighter_than_white_keeps_its_strength(full, full_views):
    light = raster.linear_from_srgb(full.emission / np.float32(255)) * full.emission_strength
    middle = full.vertices[full.faces].mean(1)
    uv = full.uv[full.faces].mean(1)
    found = light[((1 - uv[:, 1]) * 256).astype(int), (uv[:, 0] * 256).astype(int)]
    assert full.emission_strength == pytest.approx(full_views.emission.max(), rel=0.05)
    assert np.abs(found - glow(middle)).mean() < 0.05


def test_what_is_given_off_nowhere_needs_no_map(full_views):
    dark = dataclasses.replace(full_views, emission=np.zeros_like(full_views.emission), normals=None)
    mesh = bake(as_mesh(RING), None, dark, TEXTURE)
    assert mesh.emission is None and mesh.normal_map is None and mesh.tangents is None and mesh.material is not None


def test_a_clear_half_is_told_from_an_opaque_one():
    def glass(p):
        return np.where(p[..., :1] > 0, np.array([0.1, 0.0, 0.4]), np.array([0.1, 0.0, 1.0]))

    views = with_passes(capture(sphere(0.6), grey), glass)
    clear = dataclasses.replace(
        views, alpha=np.where(views.depth > 0, views.alpha * views.material[..., 2] / 255, views.alpha).astype(np.float32)
    )
    mesh = bake(as_mesh(BALL), None, clear, TEXTURE)
    place = mesh.vertices[mesh.faces].mean(1)
    uv = mesh.uv[mesh.faces].mean(1)
    found = mesh.opacity[((1 - uv[:, 1]) * 256).astype(int), (uv[:, 0] * 256).astype(int)] / 255
    assert np.abs(found[place[:, 0] > 0.1] - 0.4).max() < 0.03 and found[place[:, 0] < -0.1].min() > 0.97
    assert np.abs(mesh.base_color.astype(int) - 128).max() <= 2


def test_material_that_no_view_saw_is_that_of_the_nearest_place(full_views):
    views = with_passes(
        capture(sphere(0.6), grey), lambda p: np.where(p[..., 2:] < -0.3, np.array([0.9, 1.0, 1.0]), np.array([0.2, 0.0, 1.0]))
    )
    above = dataclasses.replace(views, holdout=np.array([camera.centre[2] < 1.0 for camera in views.cameras]))
    mesh = bake(as_mesh(BALL), None, above, TEXTURE)
    low = mesh.vertices[mesh.faces].mean(1)[:, 2] < -0.57  # the lowest camera sees down to -0.54
    uv = mesh.uv[mesh.faces].mean(1)[low]
    rows, columns = ((1 - uv[:, 1]) * 256).astype(int), (uv[:, 0] * 256).astype(int)
    assert np.abs(mesh.material[rows, columns] / 255 - [0.9, 1.0]).max() < 0.02
    assert np.abs(mesh.normal_map[rows, columns].astype(int) - [128, 128, 255]).max() <= 1
    assert 0.8 < mesh.texels_seen < 1


def test_maps_do_not_depend_on_the_number_of_threads(full, full_views):
    import numba

    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        alone = bake(as_mesh(RING), None, full_views, TEXTURE)
    finally:
        numba.set_num_threads(before)
    for name in ("base_color", "material", "normal_map", "emission"):
        assert np.array_equal(getattr(alone, name), getattr(full, name)), name


def test_faces_without_area_do_no_harm(full_views):
    ring = as_mesh(RING)
    point, line = [[0, 0, 0]], [[0, 1, 1]]
    worse = Mesh(np.concatenate([ring.vertices, ring.vertices[:1]]), np.concatenate([ring.faces, point, line]).astype(np.int32))
    mesh = bake(worse, None, full_views, TEXTURE)
    assert len(mesh.faces) == len(worse.faces)
    assert np.isfinite(mesh.normals).all() and np.isfinite(mesh.tangents).all() and np.isfinite(mesh.uv).all()
    assert quality(mesh, full_views) > 30


def test_views_that_show_nothing_give_a_plain_mesh(full_views):
    empty = dataclasses.replace(full_views, alpha=np.zeros_like(full_views.alpha), depth=np.zeros_like(full_views.depth))
    mesh = bake(as_mesh(RING), None, empty, TEXTURE)
    assert mesh.texels_seen == 0 and not mesh.base_color.any()
    away = dataclasses.replace(full_views, cameras=[camera.moved((0, 0, 50), 1) for camera in full_views.cameras])  # looks elsewhere
    mesh = bake(as_mesh(RING), None, away, TEXTURE)
    assert mesh.texels_seen == 0


def test_normals_of_a_thin_part_are_right_where_the_mesh_lies_a_third_of_a_pixel_beside_it():
    wire = rod(0.02, 0.6)  # 1.2 pixels across
    views = capture(union(wire, sphere(0.3, (0.5, 0, 0))), grey)
    shape = trimesh.creation.cylinder(0.02, 1.2, sections=16)
    shape.apply_translation((0.007, 0.007, 0))  # a third of a pixel
    mesh = bake(as_mesh(shape.subdivide_to_size(0.05)), None, views, TEXTURE)
    errors = []
    for index in np.flatnonzero(views.holdout):
        found, there = raster.normals(mesh, views.cameras[index])
        point = views.cameras[index].unproject(views.depth[index])
        same = there & (views.depth[index] > 0) & (np.abs(wire(point.reshape(-1, 3)).reshape(there.shape)) < 0.001)
        errors.append(np.degrees(np.arccos(np.clip((found * views.normals[index]).sum(-1)[same], -1, 1))))
    assert len(np.concatenate(errors)) > 200
    assert np.concatenate(errors).mean() < 18
