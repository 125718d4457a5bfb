"""A world that is turned with its splats looks the same to a camera that is turned with it."""

import dataclasses

import numpy as np
import pytest
import torch
from gsplat.cuda._torch_impl import _spherical_harmonics
from scipy.spatial.transform import Rotation

from backend.splats.render import render
from backend.splats.turn import Z_UP_FROM_Y_UP, harmonics, turned
from backend.views.cameras import look_at
from tests.backend.splats import reference


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("rotation", [Z_UP_FROM_Y_UP, Rotation.from_rotvec([0.3, -1.1, 2.0]).as_matrix()])
def test_turned_splats_look_the_same_to_a_turned_camera(degree, rotation):
    splats = reference.cloud(60, degree, degree)
    camera = look_at((1.5, -2.0, 1.0), (0, 0, 0), 64, 0.7)
    pose = camera.camera_from_world.copy()
    pose[:3, :3] = pose[:3, :3] @ rotation.T
    before = render(splats, camera)
    after = render(turned(splats, rotation), dataclasses.replace(camera, camera_from_world=pose))
    assert np.abs(before.color - after.color).max() < 1e-4
    assert np.abs(before.alpha - after.alpha).max() < 1e-4
    assert before.color.max() > 0.5


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_the_harmonics_are_those_of_gsplat(degree):
    random = np.random.default_rng(degree)
    directions, weights = random.normal(size=(50, 3)), random.normal(size=(50, (degree + 1) ** 2, 3))
    expected = _spherical_harmonics(degree, torch.tensor(directions), torch.tensor(weights)).numpy()
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    assert np.allclose(np.einsum("nk,nkc->nc", harmonics(unit, degree), weights), expected, atol=1e-6)
