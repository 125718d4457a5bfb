import numpy as np
import pytest
import trimesh

from backend.mesh.march import SIDE, march

STEPS = 1000.0


def surface(values: np.ndarray) -> trimesh.Trimesh:
    """Of a dense field, cut into the blocks that hold both signs."""
    counts = -(-(np.array(values.shape) - 1) // SIDE)
    padded = np.full(counts * SIDE + 1, 30000, np.int16)
    padded[tuple(slice(n) for n in values.shape)] = values
    blocks, places = [], []
    for place in np.ndindex(*counts):
        block = padded[tuple(slice(n * SIDE, n * SIDE + SIDE + 1) for n in place)]
        if block.min() < 0 <= block.max():
            blocks.append(block)
            places.append(place)
    mesh = march(np.stack(blocks), np.array(places), padded.shape, STEPS)
    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)


def enclosed(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.int16)
    for axis in range(3):
        border = np.moveaxis(values, axis, 0)
        border[0] = border[-1] = 1000
    return values


@pytest.mark.parametrize("seed", [0, 1])
def test_noise_has_every_case_and_comes_out_a_closed_manifold(seed):
    found = surface(enclosed(np.random.default_rng(seed).integers(-1000, 1000, (27, 20, 33))))
    sides = np.sort(found.edges, axis=1)
    assert (np.unique(sides, axis=0, return_counts=True)[1] == 2).all()  # across the borders of blocks too
    assert found.is_winding_consistent and found.volume > 0


def test_a_sphere_lies_where_it_should_and_faces_outward():
    places = np.stack(np.meshgrid(*[np.arange(40)] * 3, indexing="ij"), -1)
    found = surface(np.clip((np.linalg.norm(places - 19.4, axis=-1) - 13.3) * STEPS, -32000, 32000).astype(np.int16))
    assert found.is_watertight and found.euler_number == 2
    assert found.volume == pytest.approx(4 / 3 * np.pi * 13.3**3, rel=0.005)  # chords a cell long lie up to 2 / (8 x 13.3) cells inside
    assert np.abs(np.linalg.norm(found.vertices - 19.4, axis=1) - 13.3).max() < 0.05


def test_solids_that_touch_at_an_edge_stay_joined():
    values = np.full((6, 6, 6), 1000, np.int16)
    values[2, 2, 2] = values[3, 3, 2] = -1000
    assert surface(values).body_count == 1
