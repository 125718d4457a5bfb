"""Collision hulls: convex, few, and filling the mesh, by trimesh and by counting cells."""

import numpy as np
import pytest
import trimesh

from backend.mesh.hulls import Hulls, hulls, union
from backend.mesh.mesh import Mesh
from protocol.errors import Cancelled


def mesh(shape: trimesh.Trimesh) -> Mesh:
    return Mesh(shape.vertices.astype(np.float32), shape.faces.astype(np.int32))


def solid(found: Hulls) -> list[trimesh.Trimesh]:
    return [trimesh.Trimesh(hull.vertices, hull.faces) for hull in found.hulls]


TORUS = trimesh.creation.torus(0.7, 0.25, 24, 12)


@pytest.fixture(scope="module")
def torus():
    return hulls(mesh(TORUS), 16)


def test_hulls_are_convex_closed_and_at_most_as_many_as_asked(torus):
    assert 1 < len(torus.hulls) <= 16
    for hull in solid(torus):
        assert hull.is_watertight and hull.is_convex and hull.volume > 0 and len(hull.vertices) <= 64


def test_their_union_is_within_a_tenth_of_the_volume_and_the_error_told_is_true(torus):
    assert torus.error <= 0.1
    axis = np.arange(-1, 1, 0.04) + 0.02
    cells = np.stack(np.meshgrid(axis, axis, axis[np.abs(axis) < 0.4], indexing="ij"), -1).reshape(-1, 3)
    inside = np.zeros(len(cells), bool)
    for hull in solid(torus):
        inside |= ((cells @ hull.face_normals.T) <= (hull.face_normals * hull.triangles[:, 0]).sum(1)).all(1)
    counted = inside.sum() * 0.04**3
    assert abs(counted / TORUS.volume - 1) == pytest.approx(torus.error, abs=0.02)


def test_a_convex_mesh_is_one_hull():
    found = hulls(mesh(trimesh.creation.box((1, 2, 3)).subdivide_to_size(0.5)), 16)
    assert len(found.hulls) == 1 and found.error < 0.01
    assert solid(found)[0].volume == pytest.approx(6, rel=0.01)


def test_what_several_hulls_share_counts_once():
    boxes = [trimesh.creation.box((1, 1, 1)), trimesh.creation.box((1, 1, 1)).apply_translation((0.5, 0, 0))]
    assert union([mesh(box) for box in boxes]) == pytest.approx(1.5, rel=0.03)


def test_the_same_seed_gives_the_same_hulls(torus):
    again = hulls(mesh(TORUS), 16)
    assert again.error == torus.error and len(again.hulls) == len(torus.hulls)
    assert all(np.array_equal(one.vertices, other.vertices) for one, other in zip(again.hulls, torus.hulls))


def test_cancelling_stops_the_cutting_in_the_middle():
    reports = []

    def progress(fraction, text="", preview=None):
        reports.append(fraction)
        if len(reports) == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        hulls(mesh(trimesh.creation.torus(0.7, 0.25, 96, 48)), 8, progress=progress)
    assert len(reports) == 2
