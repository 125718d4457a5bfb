import numpy as np
import pytest
import trimesh
from scipy.spatial import cKDTree

from backend.mesh.decimate import decimate
from backend.mesh.mesh import Mesh


def reduce(shape: trimesh.Trimesh, faces: int) -> trimesh.Trimesh:
    mesh = decimate(Mesh(shape.vertices.astype(np.float32), shape.faces.astype(np.int32)), faces)
    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)


@pytest.mark.parametrize("faces", [2000, 200, 60])
def test_a_torus_stays_a_closed_torus(faces):
    found = reduce(trimesh.creation.torus(0.7, 0.25, 96, 48), faces)
    assert len(found.faces) <= faces
    assert found.is_watertight and found.is_winding_consistent and found.euler_number == 0
    assert (found.area_faces > 1e-9).all()


def test_flat_sides_and_sharp_edges_cost_nothing():
    found = reduce(trimesh.creation.box((1, 1, 1)).subdivide_to_size(0.1), 12)
    assert found.is_watertight and len(found.faces) == 12
    assert found.volume == pytest.approx(1, abs=1e-3)


def test_no_request_breaks_the_surface():
    found = reduce(trimesh.creation.icosphere(3), 1)
    assert found.is_watertight and found.volume > 0 and len(found.faces) >= 4


def test_it_beats_or_equals_an_independent_library_on_error():
    import fast_simplification

    shape = trimesh.creation.icosphere(5)
    ours = reduce(shape, 1000)
    points, faces = fast_simplification.simplify(shape.vertices, shape.faces, target_count=1000)

    def error(mesh):
        places, _ = trimesh.sample.sample_surface(mesh, 20000, seed=0)
        return np.abs(np.linalg.norm(places, axis=1) - 1).mean()

    assert error(ours) <= 1.1 * error(trimesh.Trimesh(points, faces))


def test_a_box_of_200_faces_keeps_its_edges():
    found = reduce(trimesh.creation.box((1, 0.6, 0.4)).subdivide_to_size(0.03), 200)
    assert found.is_watertight and len(found.faces) <= 200
    corners = np.stack(np.meshgrid([-0.5, 0.5], [-0.3, 0.3], [-0.2, 0.2]), -1).reshape(-1, 3)
    rims = np.concatenate([a + (b - a) * np.linspace(0, 1, 50)[:, None] for a in corners for b in corners if (a != b).sum() == 1])
    on_surface = cKDTree(found.subdivide_to_size(0.005).vertices)  # half of that from one to the next along an edge that is sharp
    assert on_surface.query(rims)[0].max() < 0.003
    assert found.volume == pytest.approx(0.24, rel=1e-4)


def test_a_decimated_sphere_keeps_its_volume():
    shape = trimesh.creation.icosphere(5)
    assert reduce(shape, 1000).volume == pytest.approx(shape.volume, rel=0.005)


def test_equal_inputs_give_equal_meshes():
    shape = trimesh.creation.torus(0.7, 0.25, 96, 48)
    assert np.array_equal(reduce(shape, 500).vertices, reduce(shape, 500).vertices)
