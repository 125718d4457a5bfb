"""The terms that look at the Gaussians are the same for several views in torch, as the fit on a GPU takes them, and on the CPU."""

import importlib.util

import numpy as np
import pytest
import torch

from backend.splats import gpu, shape, shape_torch
from backend.splats.fit import SCHEDULE, fit
from backend.splats.raster_cpu import Rasteriser, camera_numbers, pack
from backend.splats.start import on_surface
from backend.views.ball import ball
from protocol import recipes
from tests.backend.splats.test_fit import psnr

if importlib.util.find_spec("warp") is None:
    pytest.skip("NOT RUN: the rasteriser for NVIDIA GPUs needs warp-lang (requirements/development.txt)", allow_module_level=True)

from backend.splats import raster_warp


def test_the_terms_of_shape_are_those_of_the_cpu():
    """Each term by itself, over two views: value and gradient, and the surface that a picture shows."""
    views, weight = ball(size=40, count=6), 0.7
    start = on_surface(views.for_fitting, 400, 0, np.random.default_rng(0))
    start.log_scales[:] += np.random.default_rng(1).normal(0, 0.5, start.log_scales.shape).astype(np.float32)
    start.means[::3] *= 1.4  # out of the hull
    both, count = views.cameras[:2], len(start)
    numbers, parameters = torch.tensor(np.stack([camera_numbers(view) for view in both])), pack(start)
    alpha, depth, normals = (values[:2] for values in (views.alpha, views.depth, views.normals))
    for name in ("normal", "consistency", "flat", "hull", "distortion"):
        weights = shape.ShapeWeights(**{"normal" if name == "consistency" else name: weight})
        matrix = torch.tensor(parameters[:, :count].copy(), requires_grad=True)
        planes = raster_warp.draw(matrix, numbers, 40, 40)
        surface = [torch.tensor(depth), torch.tensor(normals)]
        if name == "consistency":
            surface = list(shape_torch.surface_of_pictures(numbers, planes))
        if name == "distortion":
            ours = weight * shape_torch.distortion_of(raster_warp.draw, matrix, numbers, 40, 40)
        else:
            ours = shape_torch.shape_of(matrix, numbers, torch.tensor(alpha), *surface, weights)
        ours.backward()
        value, gradients = 0.0, np.zeros_like(parameters)
        for index, view in enumerate(both):
            rasteriser = Rasteriser()
            rasteriser.project(parameters, count, view)
            truth = depth[index], normals[index]
            if name == "consistency":
                truth = shape.surface_of_picture(view, rasteriser.cropped(rasteriser.compose()).copy())
                assert (np.abs(truth[0] - surface[0][index].numpy()) < 1e-4).mean() > 0.999
                assert (np.abs(truth[1] - surface[1][index].numpy()).max(-1) < 1e-2).mean() > 0.99
            if name == "distortion":
                value += shape.add_distortion(rasteriser, view, weight, gradients)
            else:
                value += shape.add_shape(rasteriser, alpha[index], *truth, weights, gradients)
        assert value > 0 and float(ours.detach()) == pytest.approx(value / 2, rel=2e-3), name
        off = np.linalg.norm(matrix.grad.numpy() - gradients[:, :count] / 2)
        assert off <= 1e-2 * np.linalg.norm(gradients / 2), name


def test_a_fit_takes_them_all():
    """With and without the views' own depth and normals, the loop of the GPU ends as near to the views as the CPU's does."""
    views = ball(size=24, count=14)
    bare = type(views)(views.cameras, views.images, views.alpha, None, None, views.holdout, views.frame)
    terms = {"normal_weight": 0.1, "consistency_weight": 0.05, "flat_weight": 0.01, "distortion_weight": 1.0, "hull_weight": 0.05}
    p = recipes.Fit(splats=400, iterations=30, device="cpu", **terms)
    for given in (views, bare):
        theirs = fit(given, p, 0)
        ours = gpu.fit_with(gpu._loaded_warp(), torch.device("cpu"), given.for_fitting, p, 0, gpu.silent, SCHEDULE)
        assert psnr(ours, views) > psnr(theirs, views) - 0.3
