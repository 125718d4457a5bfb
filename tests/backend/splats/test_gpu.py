"""On an NVIDIA GPU, gsplat draws and fits what the CPU does. Without one these tests are skipped, and say why."""

import dataclasses

import numpy as np
import pytest

from backend.splats import gpu
from backend.splats.fit import fit
from backend.splats.raster_cpu import Rasteriser, pack
from backend.views.cameras import look_at
from protocol import recipes
from tests.backend.splats import reference, sphere
from tests.backend.splats.test_fit import psnr

pytestmark = pytest.mark.skipif(bool(gpu.why_not()), reason=f"NOT RUN: the GPU path needs an NVIDIA GPU with gsplat, and {gpu.why_not()}")


def test_pictures_and_gradients_are_those_of_the_cpu():
    import torch

    splats, view = reference.cloud(2000, 2, 0, size=0.04), look_at((0.5, -3, 0.5), (0, 0, 0), 128, 0.7)
    rasteriser, parameters = Rasteriser(), pack(splats)
    rasteriser.project(parameters, len(splats), view)
    planes = rasteriser.compose()
    matrix = torch.tensor(parameters[:, : len(splats)].T.copy(), device="cuda", requires_grad=True)
    color, depth, alpha, _ = gpu.draw(matrix, gpu._cameras([view], "cuda"), 128, 128, 2)
    theirs = torch.cat([color[0].permute(2, 0, 1), depth, alpha])
    assert np.abs(rasteriser.cropped(planes) - theirs.detach().cpu().numpy()).max() < 1e-3
    pulls = np.random.default_rng(0).normal(0, 1, planes.shape).astype(np.float32)
    gradients = np.zeros_like(parameters)
    rasteriser.backward(pulls, np.zeros(3), gradients)
    (theirs * torch.tensor(pulls, device="cuda")).sum().backward()
    wanted = matrix.grad.T.cpu().numpy()
    for row, truth in zip(gradients[:, : len(splats)], wanted, strict=True):
        assert np.linalg.norm(row - truth) <= 1e-2 * np.linalg.norm(truth)


def test_a_fit_is_as_good_as_the_cpus():
    views = sphere.views()
    p = recipes.Fit(splats=1500, iterations=300, device="cuda")
    ours, theirs = fit(views, dataclasses.replace(p, device="cpu"), 0), fit(views, p, 0)
    assert psnr(theirs, views) > psnr(ours, views) - 0.3
