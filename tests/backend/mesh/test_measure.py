import numpy as np
import pytest
import trimesh

from backend.mesh.measure import angle, charts, psnr, score
from backend.mesh.mesh import TexturedMesh
from protocol.errors import KilnError


@pytest.fixture
def written(tmp_path):
    def write(shape: trimesh.Trimesh, name: str):
        shape.export(tmp_path / name)
        return tmp_path / name

    return write


def test_psnr_is_that_of_skimage():
    from skimage.metrics import peak_signal_noise_ratio

    random = np.random.default_rng(0)
    a, b = random.random((20, 30, 3)), random.random((20, 30, 3))
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1.0))
    assert psnr(a, a) == 100  # the ceiling: reports are JSON


def test_a_mesh_is_perfect_against_itself(written):
    path = written(trimesh.creation.torus(0.5, 0.2, 64, 32), "torus.glb")
    found = score(path, path)
    assert found["f1"] == found["f05"] == 1.0 and found["watertight"] and found["bounds_error"] == 0
    assert found["chamfer"] < 1.5e-3 and found["hidden"] < 0.001


def test_a_known_offset_gives_the_known_distance(written):
    source = trimesh.creation.icosphere(5, 1.0)
    larger = trimesh.creation.icosphere(5, 1.03)
    found = score(written(larger, "larger.ply"), written(source, "source.ply"))
    assert found["chamfer"] == pytest.approx(0.03 / (2 * np.sqrt(3)), rel=0.05)
    assert found["f1"] == 1.0 and found["f05"] == 0.0
    assert found["bounds_error"] == pytest.approx(0.03 / (2 * np.sqrt(3)), rel=0.01)


def test_an_inner_wall_is_hidden_and_costs_no_precision(written):
    outer, inner = trimesh.creation.icosphere(4, 1.0), trimesh.creation.icosphere(4, 0.5)
    found = score(written(trimesh.util.concatenate([outer, inner]), "double.ply"), written(outer, "single.ply"))
    assert found["hidden"] == pytest.approx(0.2, abs=0.01)  # of the area: 0.25 / 1.25
    assert found["f05"] == 1.0


def test_a_missing_half_costs_recall_alone_and_is_not_closed(written):
    ball = trimesh.creation.icosphere(4, 1.0)
    half = trimesh.Trimesh(ball.vertices, ball.faces[ball.triangles_center[:, 2] > 0])
    found = score(written(half, "half.ply"), written(ball, "ball.ply"))
    assert found["precision05"] > 0.99 and found["recall05"] == pytest.approx(0.5, abs=0.02)
    assert not found["watertight"]


def test_a_file_without_a_mesh_is_refused(tmp_path):
    (tmp_path / "empty.obj").write_text("v 0 0 0\n")
    with pytest.raises(KilnError) as caught:
        score(tmp_path / "empty.obj", tmp_path / "empty.obj")
    assert caught.value.code == "bad-input"


def test_charts_are_counted_and_their_share_of_the_texture_is_exact():
    uv = np.array([[0, 0], [0.5, 0], [0.5, 0.5], [0, 0.5], [0.75, 0.75], [1, 0.75], [1, 1]], np.float32)
    faces = np.array([[0, 1, 2], [0, 2, 3], [4, 5, 6]], np.int32)
    mesh = TexturedMesh(np.zeros((7, 3), np.float32), np.zeros((7, 3), np.float32), uv, faces, np.zeros((256, 256, 3), np.uint8))
    count, use = charts(mesh)
    assert count == 2 and use == pytest.approx(0.25 + 0.03125, abs=0.002)


def test_angles_are_degrees_whatever_the_length():
    a, b = np.array([[2.0, 0, 0], [0, 1, 0]]), np.array([[1.0, 1, 0], [0, 3, 0]])
    assert angle(a, b) == pytest.approx(22.5)
