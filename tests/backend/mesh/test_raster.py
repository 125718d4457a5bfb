import numpy as np
import pytest
import trimesh

from backend.mesh import raster
from backend.mesh.mesh import Mesh, TexturedMesh
from backend.views.cameras import look_at

CAMERA = look_at((2.5, 1.0, 1.2), (0, 0, 0), 96, 0.8)


def as_mesh(shape: trimesh.Trimesh) -> Mesh:
    return Mesh(shape.vertices.astype(np.float32), shape.faces.astype(np.int32))


def cast(shape: trimesh.Trimesh, camera):
    """Every ray against every triangle (Moeller and Trumbore 1997): depth along the axis, inf where nothing is, and the face."""
    ray = (camera.unproject(np.ones((camera.height, camera.width))) - camera.centre).reshape(-1, 3)  # one unit of depth long
    depth, face = np.full(len(ray), np.inf), np.full(len(ray), -1)
    for f, (a, b, c) in enumerate(shape.triangles):
        p = np.cross(ray, c - a)
        scale = p @ (b - a)
        scale = np.where(np.abs(scale) < 1e-15, np.nan, scale)
        u = p @ (camera.centre - a) / scale
        q = np.cross(camera.centre - a, b - a)
        v = ray @ q / scale
        t = (c - a) @ q / scale
        nearer = (u >= 0) & (v >= 0) & (u + v <= 1) & (t > 0) & (t < depth)
        depth[nearer], face[nearer] = t[nearer], f
    return depth, face


@pytest.mark.parametrize(
    "shape", [trimesh.creation.torus(0.6, 0.25, 24, 12), trimesh.creation.box((1.2, 0.7, 0.9)), trimesh.creation.icosphere(2)]
)
def test_depth_and_face_are_those_of_ray_casting(shape):
    depth, triangle = raster.depth(as_mesh(shape), CAMERA)
    expected, face = cast(shape, CAMERA)
    seen = depth.ravel() > 0
    assert (seen != np.isfinite(expected)).sum() <= 4  # centres on an outline to the last bit
    both = seen & np.isfinite(expected)
    assert np.abs(depth.ravel() - expected)[both].max() < 1e-4
    assert (triangle.ravel() == face)[both].mean() > 0.98  # on an edge either face is right


def test_faces_that_share_an_edge_leave_no_crack():
    corners = np.array([[-2, -2, 0], [2, -2, 0], [2, 2, 0], [-2, 2, 0], [0.1234, 0.0567, 0]], np.float32)
    fan = Mesh(corners, np.array([[0, 1, 4], [1, 2, 4], [2, 3, 4], [3, 0, 4]], np.int32))
    depth, _ = raster.depth(fan, look_at((0.01, 0.02, 3), (0, 0, 0), 200, 0.9))
    assert (depth > 0).all()


def test_nothing_behind_the_camera_is_drawn():
    shape = trimesh.creation.box((1, 1, 1))
    shape.apply_translation(2 * CAMERA.centre)
    assert (raster.depth(as_mesh(shape), CAMERA)[1] == -1).all()


def test_the_picture_does_not_depend_on_the_number_of_threads():
    import numba

    mesh = as_mesh(trimesh.creation.torus(0.6, 0.25))
    before = numba.get_num_threads()
    several = raster.depth(mesh, CAMERA)
    try:
        numba.set_num_threads(1)
        one = raster.depth(mesh, CAMERA)
    finally:
        numba.set_num_threads(before)
    assert np.array_equal(several[0], one[0]) and np.array_equal(several[1], one[1])


def quad(texture) -> TexturedMesh:
    """A square of 2 x 2 facing +Z, its texture upright for a viewer whose up is +Y."""
    vertices = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], np.float32)
    uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    normals = np.tile(np.array([[0, 0, 1]], np.float32), (4, 1))
    return TexturedMesh(vertices, normals, uv, np.array([[0, 1, 2], [0, 2, 3]], np.int32), texture)


def test_a_texture_stands_upright_and_keeps_its_colour():
    texture = np.zeros((8, 8, 3), np.uint8)
    texture[:4, :4] = (200, 0, 0)  # row 0 is the top: red at the upper left
    texture[4:, 4:] = (0, 0, 120)
    color, alpha = raster.render(quad(texture), look_at((0, 0, 4), (0, 0, 0), 64, 0.6), background=(0, 1, 0))
    assert alpha[32, 32] == 1 and alpha[0, 0] == 0
    assert np.allclose(color[0, 0], (0, 1, 0))
    assert np.allclose(color[20, 20], (200 / 255, 0, 0), atol=1e-3)
    assert np.allclose(color[44, 44], (0, 0, 120 / 255), atol=1e-3)


def test_light_is_averaged_not_code_values():
    texture = np.zeros((64, 64, 3), np.uint8)
    texture[::2] = 255  # finer than the pixels below
    color, _ = raster.render(quad(texture), look_at((0, 0, 4), (0, 0, 0), 16, 0.6), supersample=16)
    middle = color[6:10, 6:10].mean()
    assert middle == pytest.approx(0.7354, abs=0.02)  # sRGB of half the light, not 0.5


def test_coverage_is_soft_at_an_edge():
    _, alpha = raster.render(quad(np.full((4, 4, 3), 255, np.uint8)), look_at((0, 0, 4), (0, 0, 0), 61, 0.6), supersample=4)
    exact = (2 * 61 / (2 * np.tan(0.3)) / 4) ** 2  # pixels that the square covers
    assert alpha.sum() == pytest.approx(exact, rel=0.01)
    assert ((alpha > 0) & (alpha < 1)).any()
