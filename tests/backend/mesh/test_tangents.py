import numpy as np
import pytest

from backend.mesh.tangents import tangents


def grid(side: int = 5):
    """A square in the plane z = 0, facing up, with its uv."""
    x, y = np.meshgrid(np.linspace(0, 1, side), np.linspace(0, 1, side))
    vertices = np.stack([x.ravel(), y.ravel(), np.zeros(side * side)], 1).astype(np.float32)
    k = np.arange(side * side).reshape(side, side)
    a, b, c, d = k[:-1, :-1].ravel(), k[:-1, 1:].ravel(), k[1:, 1:].ravel(), k[1:, :-1].ravel()
    faces = np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)]).astype(np.int32)
    return vertices, np.tile(np.float32([[0, 0, 1]]), (side * side, 1)), vertices[:, :2].copy(), faces


@pytest.mark.parametrize("turn", [0.0, 0.7, 2.5])
def test_the_tangent_points_where_u_grows(turn):
    vertices, normals, uv, faces = grid()
    c, s = np.cos(turn), np.sin(turn)
    source, cut, found = tangents(vertices, normals, (uv @ np.array([[c, s], [-s, c]])).astype(np.float32), faces)
    assert np.array_equal(source[cut], faces) and len(source) == len(vertices)
    assert np.allclose(found, [c, -s, 0, 1], atol=1e-5)  # u = c x - s y grows along (c, -s)


def test_a_mirrored_chart_has_the_other_sign_and_vertices_of_its_own():
    vertices, normals, uv, faces = grid()
    uv[:, 0] = np.abs(uv[:, 0] - 0.5)  # folded in the middle
    source, cut, found = tangents(vertices, normals, uv, faces)
    middle = vertices[faces].mean(1)[:, 0]
    assert np.array_equal(source[cut], faces)
    assert (found[cut][middle < 0.5][..., 3] == -1).all() and (found[cut][middle > 0.5][..., 3] == 1).all()
    assert np.allclose(found[cut][middle < 0.5][..., :3], [-1, 0, 0], atol=1e-6)
    bitangent = np.cross([0, 0, 1], found[:, :3]) * found[:, 3:]
    assert np.allclose(bitangent, [0, 1, 0], atol=1e-6)  # v grows upward on both sides
    assert len(source) == len(vertices) + 5  # those on the fold


def test_seams_of_the_vertex_table_alone_do_not_part_tangents():
    """Vertices that repeat with the same place, normal and uv are one."""
    vertices, normals, uv, faces = grid()
    bent = uv + 0.05 * np.sin(7 * uv[:, ::-1])
    whole = tangents(vertices, normals, bent.astype(np.float32), faces)[2][faces]
    loose = np.arange(faces.size).reshape(-1, 3)
    source, cut, found = tangents(*(values[faces.ravel()] for values in (vertices, normals, bent.astype(np.float32))), loose)
    assert np.allclose(found[cut], whole, atol=1e-6)


def test_faces_without_area_in_the_texture_still_get_a_unit_tangent():
    vertices, normals, uv, faces = grid()
    uv[:] = 0.25
    found = tangents(vertices, normals, uv, faces)[2]
    assert np.allclose(np.linalg.norm(found[:, :3], axis=1), 1) and np.allclose((found[:, :3] * normals).sum(1), 0)
