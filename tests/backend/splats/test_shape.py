"""The terms of the loss that look at the Gaussians are differentiated as autograd does it, and do what they are for."""

import numpy as np
import pytest
import torch

from backend.splats.raster_cpu import LOG_SCALE, OPACITY, QUATERNION, Rasteriser, pack, unpack
from backend.splats.shape import ON_SURFACE, ShapeWeights, add_distortion, add_shape, surface_of_picture
from backend.views.cameras import look_at
from tests.backend.splats import reference

COUNT = 300


def scene(size=64):
    """Gaussians seen from outside; depth, normals and a silhouette of a random surface that some of them lie on."""
    camera = look_at((1.2, -2.2, 0.9), (0.1, 0, 0), size, 0.8)
    splats = reference.cloud(COUNT, 0, 3, size=0.03)
    random = np.random.default_rng(4)
    alpha = (random.random((size, size)) > 0.4).astype(np.float32)
    normals = random.normal(0, 1, (size, size, 3))
    normals = (normals / np.linalg.norm(normals, axis=-1, keepdims=True)).astype(np.float32)
    pixels, z = camera.project(splats.means.astype(float))
    x, y = np.floor(pixels).astype(int).T
    seen = (x >= 0) & (y >= 0) & (x < size) & (y < size)
    depth = np.zeros((size, size), np.float32)
    depth[y[seen], x[seen]] = z[seen]
    return camera, splats, alpha, depth, normals, (x, y, z, seen)


def rotations(q):
    w, x, y, z = torch.nn.functional.normalize(q, dim=1).unbind(1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y), 2 * (x * y + w * z), 1 - 2 * (x * x + z * z),
        2 * (y * z - w * x), 2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, 1).reshape(-1, 3, 3)


@pytest.mark.parametrize("weights", [ShapeWeights(normal=0.7), ShapeWeights(flat=0.4), ShapeWeights(hull=0.9), ShapeWeights(0.7, 0.4, 0.9)])
@pytest.mark.parametrize("threads", [1, 2])
def test_value_and_gradient_are_those_of_autograd(weights, threads):
    camera, splats, alpha, depth, normals, (x, y, z, seen) = scene()
    rasteriser = Rasteriser(threads)
    parameters = pack(splats)
    rasteriser.project(parameters, COUNT, camera)
    gradients = np.zeros_like(parameters)
    value = add_shape(rasteriser, alpha, depth, normals, weights, gradients)

    _, quaternions, log_scales, logits, _ = tensors = reference.tensors(splats)
    least = log_scales.argmin(1)
    expected = weights.flat * log_scales.min(1).values.exp().mean()
    pixel = (np.where(seen, y, 0), np.where(seen, x, 0))
    outside = torch.tensor(seen & (alpha[pixel] == 0))
    expected = expected + weights.hull * torch.where(outside, logits.sigmoid(), 0.0).mean()
    near = torch.tensor(seen & (np.abs(depth[pixel] - z) < ON_SURFACE))
    axis = rotations(quaternions)[torch.arange(COUNT), :, least]
    along = (axis * torch.tensor(normals[pixel], dtype=torch.float64)).sum(1)
    expected = expected + weights.normal * torch.where(near, 1 - along**2, 0.0).mean()
    expected.backward()

    assert 50 < int(near.sum()) and 20 < int(outside.sum()) < COUNT - 20
    assert value == pytest.approx(expected.item(), rel=1e-5)
    found = unpack(gradients, COUNT)
    for name, tensor in zip(("means", "quaternions", "log_scales", "opacity_logits"), tensors, strict=False):
        wanted = np.zeros_like(getattr(found, name)) if tensor.grad is None else tensor.grad.numpy()
        assert np.abs(getattr(found, name) - wanted).max() <= 1e-4 * np.abs(wanted).max() + 1e-12, name


def test_without_normals_there_is_no_normal_term():
    camera, splats, alpha, *_ = scene()
    rasteriser, parameters = Rasteriser(1), pack(splats)
    rasteriser.project(parameters, COUNT, camera)
    gradients = np.zeros_like(parameters)
    assert add_shape(rasteriser, alpha, None, None, ShapeWeights(normal=1.0), gradients) == 0
    assert not gradients.any()


def test_distortion_is_that_of_autograd():
    camera, splats, *_ = scene(48)
    rasteriser, parameters = Rasteriser(2), pack(splats)
    rasteriser.project(parameters, COUNT, camera)
    rasteriser.compose()
    gradients = np.zeros_like(parameters)
    value = add_distortion(rasteriser, camera, 0.8, gradients)

    tensors = reference.tensors(splats)
    turn, shift = torch.tensor(camera.camera_from_world[2, :3]), camera.camera_from_world[2, 3]
    z = tensors[0] @ turn + shift - float(np.linalg.norm(camera.centre))
    zero = torch.zeros_like(z)
    picture, alpha = reference.composed(tensors, camera, torch.stack([z, z * z, zero, zero], 1))
    expected = 0.8 * (alpha * picture[..., 1] - picture[..., 0] ** 2).mean()
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-4) and value > 0
    found = unpack(gradients, COUNT)
    for name, tensor in zip(("means", "quaternions", "log_scales", "opacity_logits"), tensors, strict=False):
        wanted = tensor.grad.numpy()
        assert np.linalg.norm(getattr(found, name) - wanted) <= 1e-3 * np.linalg.norm(wanted), name


def test_the_surface_of_a_picture_is_the_one_that_was_drawn():
    """A wall of flat Gaussians that faces the camera at a slant."""
    camera = look_at((0.0, -3.0, 0.0), (0, 0, 0), 64, 0.8)
    across = np.linspace(-0.8, 0.8, 40)
    x, z = (part.ravel() for part in np.meshgrid(across, across))
    splats = reference.cloud(len(x), 0, 0)
    splats.means[:] = np.stack([x, 0.3 * x, z], 1)
    splats.quaternions[:] = (np.cos(0.5 * np.arctan(0.3)), 0, 0, np.sin(0.5 * np.arctan(0.3)))
    splats.log_scales[:] = np.log((0.03, 0.002, 0.03))
    splats.opacity_logits[:] = 4
    rasteriser = Rasteriser(1)
    rasteriser.project(pack(splats), len(splats), camera)
    depth, normals = surface_of_picture(camera, rasteriser.cropped(rasteriser.compose()))
    middle = np.s_[20:44, 20:44]
    wanted = np.array([0.3, -1, 0]) / np.hypot(1, 0.3)
    assert np.abs((normals[middle] * wanted).sum(-1)).min() > 0.99
    assert np.abs(camera.unproject(depth)[middle] @ wanted).max() < 5e-3


def test_steps_down_the_gradient_turn_flatten_and_fade():
    camera, splats, alpha, depth, normals, _ = scene()
    rasteriser, parameters = Rasteriser(1), pack(splats)
    rasteriser.project(parameters, COUNT, camera)
    weights = ShapeWeights(normal=1.0, flat=1.0, hull=1.0)
    values = []
    for _ in range(30):
        gradients = np.zeros_like(parameters)
        values.append(add_shape(rasteriser, alpha, depth, normals, weights, gradients))
        parameters[QUATERNION : OPACITY + 1] -= 20 * gradients[QUATERNION : OPACITY + 1]
    assert values[-1] < 0.8 * values[0]
    assert parameters[LOG_SCALE:OPACITY, :COUNT].min(0).mean() < splats.log_scales.min(1).mean()
