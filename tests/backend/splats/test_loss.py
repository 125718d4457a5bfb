"""The loss, its gradient and Adam's steps are torch's."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional

from backend.splats.loss import Adam, Weights, loss_and_gradients
from backend.splats.raster_cpu import Rasteriser, pack
from backend.views.cameras import look_at
from tests.backend.splats import reference

BACKGROUND = np.array([0.2, 0.9, 0.4], np.float32)


def torch_loss(planes, target, weights, counts=1.0):
    """Planes 5 x H x W: red, green, blue on black, accumulated depth, alpha; target's last two are alpha, depth."""
    background = torch.tensor(BACKGROUND, dtype=torch.float64)[:, None, None]
    a, b = planes[:3] + (1 - planes[4]) * background, target[:3] + (1 - target[3]) * background
    a = b + counts * (a - b)
    window = torch.exp(-0.5 * (torch.arange(11, dtype=torch.float64) - 5) ** 2 / 1.5**2)
    window = torch.outer(window, window) / window.sum() ** 2

    def blurred(x):
        return functional.conv2d(x[None], window.expand(3, 1, 11, 11), padding=5, groups=3)[0]

    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b, both = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2, blurred(a * b) - mean_a * mean_b
    ssim = (2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4) / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))
    depth = torch.where(target[4] > 0, (planes[3] - target[4] * planes[4]).abs() * counts, 0.0).mean()
    alpha = ((planes[4] - target[3]).abs() * counts).mean()
    return (1 - weights.ssim) * (a - b).abs().mean() + weights.ssim * (1 - ssim.mean()) + weights.alpha * alpha + weights.depth * depth


@pytest.mark.parametrize("weights", [Weights(0.3, 0.5, 0.7), Weights(0.0, 0.5, 0.0), Weights(1.0, 0.0, 0.0)], ids=str)
@pytest.mark.parametrize("size", [(84, 77), (64, 96), (150, 21)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all pixels", "some pixels"])
def test_value_and_gradient_are_those_of_autograd(weights, size, masked):
    """Splats and target each fill another part of the picture, some of it at the edges."""
    view = dataclasses.replace(look_at((1.2, -2.2, 0.9), (0.1, 0, 0), 60, 0.8), width=size[0], height=size[1])
    rasteriser, splats = Rasteriser(2), reference.cloud(100, 0, 1, size=0.05)
    rasteriser.project(pack(splats), len(splats), view)
    planes = rasteriser.compose()
    target = np.zeros_like(planes)
    bottom = min(40, size[1])
    target[:, 16:bottom, 16 : size[0]] = np.random.default_rng(0).random((5, bottom - 16, size[0] - 16))
    target[:3] *= target[3]
    target[4, :, :40] = 0
    counts = np.random.default_rng(1).random(planes.shape[1:], dtype=np.float32) if masked else None
    if counts is not None:
        counts[:, 30:50] = 0
    value, gradients = loss_and_gradients(
        rasteriser, planes, target, (1, 1, rasteriser.tiles_x, min(3, rasteriser.tiles_y)), BACKGROUND, weights, counts
    )

    theirs = torch.tensor(rasteriser.cropped(planes).copy(), dtype=torch.float64, requires_grad=True)
    expected = torch_loss(
        theirs,
        torch.tensor(rasteriser.cropped(target).copy(), dtype=torch.float64),
        weights,
        1.0 if counts is None else torch.tensor(rasteriser.cropped(counts)[0].copy(), dtype=torch.float64),
    )
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=2e-5)
    drawn = np.repeat(np.repeat(np.diff(rasteriser.starts).reshape(rasteriser.tiles_y, -1) > 0, 16, 0), 16, 1)[: size[1], : size[0]]
    assert drawn.any()
    ours = np.where(drawn, rasteriser.cropped(gradients), 0)  # elsewhere nothing is drawn and no gradient is written
    ours[4] -= (ours[:3] * BACKGROUND[:, None, None]).sum(0)  # the background's part is added in the backward pass of the splats
    for plane, wanted in zip(ours, theirs.grad.numpy(), strict=True):
        assert np.abs(plane - wanted)[drawn].max() <= 1e-4 * max(np.abs(wanted).max(), 1e-9)


def test_adam_steps_like_torchs():
    random = np.random.default_rng(0)
    parameters = random.normal(0, 1, (3, 32)).astype(np.float32)
    theirs = [torch.tensor(row.copy(), requires_grad=True) for row in parameters]
    rates = np.array([1e-3, 0.1, 2.0])
    torch_adam = torch.optim.Adam([{"params": [row], "lr": rate} for row, rate in zip(theirs, rates, strict=True)], eps=Adam.SMALL)
    adam = Adam(parameters)
    for _ in range(20):
        gradients = (random.normal(0, 1, parameters.shape) * 10.0 ** random.integers(-6, 3, parameters.shape)).astype(np.float32)
        adam.step(2, parameters, gradients, rates)
        for row, gradient in zip(theirs, gradients, strict=True):
            row.grad = torch.tensor(gradient)
        torch_adam.step()
    assert np.allclose(parameters, np.stack([row.detach().numpy() for row in theirs]), rtol=1e-4, atol=1e-4 * rates[:, None])


def test_a_gradient_that_is_not_a_number_moves_nothing():
    parameters = np.ones((1, 16), np.float32)
    gradients = np.zeros((1, 16), np.float32)
    gradients[0, :2] = np.nan, np.inf
    Adam(parameters).step(1, parameters, gradients, np.array([0.1]))
    assert np.array_equal(parameters, np.ones((1, 16)))


def test_what_memory_held_before_never_reaches_a_gradient():
    """Pictures whose height is no multiple of a tile have rows of padding, which nothing is drawn in."""
    splats, camera = reference.cloud(300, 0, 3, size=0.1), look_at((0, -3, 0.5), (0, 0, 0), 90, 0.7)
    rasteriser, parameters = Rasteriser(1), pack(splats)
    rasteriser.project(parameters, len(splats), camera)
    planes = rasteriser.compose()
    target = np.random.default_rng(0).random(planes.shape, dtype=np.float32)
    rasteriser.buffer("plane_gradients", planes.size)[:] = np.nan
    _, pulls = loss_and_gradients(rasteriser, planes, target, (0, 0, 6, 6), np.zeros(3), Weights(0.2, 0.5, 0.1))
    gradients = np.zeros_like(parameters)
    rasteriser.backward(pulls, np.zeros(3), gradients)
    assert np.isfinite(gradients).all()
