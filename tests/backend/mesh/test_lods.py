"""Levels of detail: as few faces as asked, near to the mesh by an independent measure, and with the texture where it was."""

import numpy as np
import pytest
import trimesh

from backend.mesh import lods
from backend.mesh.bake import _lay_out, vertex_normals
from backend.mesh.mesh import Mesh, TexturedMesh
from backend.mesh.nearest import triangles
from backend.mesh.unwrap import unwrap

SIZE = 256


def textured(shape: trimesh.Trimesh) -> TexturedMesh:
    """The shape, in charts, its texture telling each texel's own place: within [-1, 1], a 128th a step."""
    mesh = Mesh(shape.vertices.astype(np.float32), shape.faces.astype(np.int32))
    source, uv, faces = unwrap(mesh, SIZE, 2)
    cut, normals = Mesh(mesh.vertices[source], faces), vertex_normals(mesh)[source].astype(np.float32)
    atlas = _lay_out(cut, normals, uv, SIZE)
    places = np.clip(np.round(atlas.spread(atlas.position) * 127.5 + 127.5), 0, 255).astype(np.uint8)
    return TexturedMesh(cut.vertices, normals, uv, faces, places)


@pytest.fixture(scope="module")
def torus():
    return textured(trimesh.creation.torus(0.7, 0.25, 64, 32))


@pytest.fixture(scope="module")
def chain(torus):
    return lods.levels(torus, lods.budgets(len(torus.faces), 0.5, 5))


def welded(level):
    places, index = np.unique(level.vertices, axis=0, return_inverse=True)
    return trimesh.Trimesh(places, index.reshape(-1)[level.faces], process=False)


def test_every_level_has_as_many_faces_as_asked_and_stays_closed(torus, chain):
    assert len(torus.faces) == 4096 and [len(level.faces) for level in chain] == [2048, 1024, 512, 256, 128]
    for level in chain:
        found = welded(level)
        assert found.is_watertight and found.is_winding_consistent and found.euler_number == 0
        assert np.allclose(np.linalg.norm(level.normals, axis=1), 1, atol=1e-5)


def test_the_texture_stays_where_it_was(torus, chain):
    random = np.random.default_rng(0)
    for level in chain:
        weights = random.dirichlet(np.ones(3), len(level.faces))[..., None]
        places = (level.vertices[level.faces] * weights).sum(1)
        uv = (level.uv[level.faces] * weights).sum(1)
        column, row = (uv * [SIZE, -SIZE] + [0, SIZE]).astype(int).clip(0, SIZE - 1).T
        told = torus.base_color[row, column] / 127.5 - 1
        away = np.linalg.norm(told - places, axis=1)
        assert np.quantile(away, 0.9) < 0.02 + 3 * level.error  # a texel is 0.01 wide


def test_the_error_of_a_level_is_its_distance_from_the_torus(chain):
    for level in chain:
        points = trimesh.sample.sample_surface(welded(level), 4000, seed=1)[0]
        gap = np.abs(np.hypot(np.hypot(points[:, 0], points[:, 1]) - 0.7, points[:, 2]) - 0.25)
        assert np.quantile(gap, 0.99) < 1.2 * level.error + 0.003  # the mesh itself lies so far from the true torus
    assert all(one.error < other.error for one, other in zip(chain, chain[1:]))


def test_levels_switch_where_their_error_is_a_pixel_of_1080(torus, chain):
    sizes = lods.switches(torus, chain)
    assert sizes == sorted(sizes, reverse=True) and all(0 < size <= 1 for size in sizes)
    radius = np.linalg.norm(torus.vertices - (torus.vertices.min(0) + torus.vertices.max(0)) / 2, axis=1).max()
    pixels = [size * 1080 * level.error / (2 * radius) for size, level in zip(sizes, chain) if size < 1]
    assert pixels and np.allclose(pixels, 1, rtol=0.01)


def test_charts_of_one_face_each_do_not_keep_levels_from_being_small():
    shape = trimesh.creation.icosphere(3, 0.8)
    vertices = shape.vertices[shape.faces].reshape(-1, 3).astype(np.float32)
    uv = np.random.default_rng(0).random((len(vertices), 2)).astype(np.float32)
    normals = (vertices / np.linalg.norm(vertices, axis=1, keepdims=True)).astype(np.float32)
    mesh = TexturedMesh(vertices, normals, uv, np.arange(len(vertices), dtype=np.int32).reshape(-1, 3), np.zeros((8, 8, 3), np.uint8))
    wanted = [640, 100, 10, 4]
    assert all(0 < len(level.faces) <= most for level, most in zip(lods.levels(mesh, wanted), wanted))


def test_equal_meshes_give_equal_levels(torus, chain):
    again = lods.levels(torus, lods.budgets(len(torus.faces), 0.5, 5)[:2])
    for one, other in zip(again, chain):
        assert np.array_equal(one.vertices, other.vertices) and np.array_equal(one.uv, other.uv) and one.error == other.error


def test_nearest_places_are_those_of_a_search_through_all_triangles():
    shape = trimesh.creation.torus(0.7, 0.25, 24, 12)
    points = np.random.default_rng(0).normal(size=(100, 3))
    distance, face, weights = triangles(Mesh(shape.vertices, shape.faces)).nearest(points)
    for number, point in enumerate(points):
        nearest = trimesh.triangles.closest_point(shape.triangles, np.repeat(point[None], len(shape.faces), 0))
        assert distance[number] == pytest.approx(np.linalg.norm(nearest - point, axis=1).min(), abs=1e-9)
    found = (shape.triangles[face] * weights[..., None]).sum(1)
    assert np.allclose(np.linalg.norm(found - points, axis=1), distance)


def test_lines_meet_the_surface_that_looks_their_way():
    shape = trimesh.creation.icosphere(4, 0.7)
    outward = np.random.default_rng(0).normal(size=(500, 3))
    outward /= np.linalg.norm(outward, axis=1, keepdims=True)
    near = triangles(Mesh(shape.vertices, shape.faces))
    face, weights = near.along(outward * 0.74, outward, 0.06)
    found = (shape.triangles[face] * weights[..., None]).sum(1)
    assert (face >= 0).all() and np.allclose(np.cross(found, outward), 0, atol=1e-9)
    assert (near.along(outward * 0.74, outward, 0.01)[0] < 0).all()  # beyond reach
    assert (near.along(outward * 0.74, -outward, 0.06)[0] < 0).all()  # the other side
