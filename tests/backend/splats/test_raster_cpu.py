"""The CPU rasteriser draws, and differentiates, what gsplat's own plain-torch mathematics says."""

import dataclasses
import os
import re
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch

from backend.splats import autograd
from backend.splats.model import Splats
from backend.splats.raster_cpu import Rasteriser, compose, compose_back, pack, unpack
from backend.splats.render import render
from backend.views.cameras import look_at
from tests.backend.splats import reference

BACKGROUND = np.array([0.3, 0.5, 0.9], np.float32)


def camera(width=44, height=37):
    """Not square, centre off the middle, no multiple of a tile."""
    square = look_at((1.2, -2.2, 0.9), (0.1, 0, 0), 40, 0.8)
    return dataclasses.replace(square, width=width, height=height, fy=square.fy * 1.1, cx=20.3, cy=17.9)


def scene(degree: int, seed: int) -> Splats:
    """Some Gaussians nearly opaque, some behind the camera, some far outside the picture, one across all of it."""
    splats = reference.cloud(200, degree, seed)
    splats.opacity_logits[:20] = 8
    splats.means[20:30] = (2.4, -4.4, 1.8)
    splats.means[30:40] += (3.0, 3.0, 0.0)
    splats.log_scales[40] = 0.0
    return splats


def drawn(splats, view, threads=2):
    rasteriser = Rasteriser(threads)
    parameters = pack(splats)
    rasteriser.project(parameters, len(splats), view)
    return rasteriser, parameters, rasteriser.compose()


def agrees(ours: np.ndarray, theirs: torch.Tensor, within: float) -> bool:
    theirs = theirs.detach().numpy()
    return (
        np.linalg.norm(ours - theirs) <= within * np.linalg.norm(theirs)
        and np.abs(ours - theirs).max() <= 3 * within * np.abs(theirs).max()
    )


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_picture_and_gradients_agree_with_gsplats_torch_mathematics(degree):
    splats, view = scene(degree, degree), camera()
    rasteriser, parameters, planes = drawn(splats, view)
    ours = np.array(rasteriser.cropped(planes))

    tensors = reference.tensors(splats)
    picture, alpha = reference.composed(tensors, view)
    assert np.abs(ours[:4] - picture.detach().numpy().transpose(2, 0, 1)).max() < 2e-5
    assert np.abs(ours[4] - alpha.detach().numpy()).max() < 5e-6
    assert ours[4].max() > 0.99 and ours[4].min() < 0.5  # the scene has both

    pulls = np.random.default_rng(1).normal(0, 1, ours.shape).astype(np.float32)
    padded = np.zeros_like(planes)
    padded[:, : view.height, : view.width] = pulls
    gradients = np.zeros_like(parameters)
    rasteriser.backward(padded, BACKGROUND, gradients)

    background = torch.tensor(BACKGROUND, dtype=torch.float64)
    wanted = torch.tensor(pulls, dtype=torch.float64)
    on_background = picture[..., :3] + (1 - alpha)[..., None] * background
    value = (on_background * wanted[:3].permute(1, 2, 0)).sum() + (picture[..., 3] * wanted[3]).sum() + (alpha * wanted[4]).sum()
    value.backward()
    found = unpack(gradients, len(splats))
    for name, tensor in zip(("means", "quaternions", "log_scales", "opacity_logits", "sh"), tensors, strict=True):
        assert agrees(getattr(found, name), tensor.grad, 3e-5), name


def test_as_a_torch_function_it_takes_any_loss():
    """A loss of all three results, through torch: the same gradients as the dense expression in double precision."""
    splats, view = scene(1, 5), camera()
    ours, theirs = [t.detach().float().requires_grad_() for t in reference.tensors(splats)], reference.tensors(splats)

    def loss(color, depth, alpha):
        return (color**2).mean() + (depth * alpha).mean() + torch.sin(3 * alpha).mean()

    loss(*autograd.draw(*ours, view)).backward()
    picture, alpha = reference.composed(theirs, view)
    loss(picture[..., :3], picture[..., 3], alpha).backward()
    for mine, wanted in zip(ours, theirs, strict=True):
        assert agrees(mine.grad.numpy(), wanted.grad, 3e-5)


def test_other_features_are_composed_and_differentiated_alike():
    splats, view = scene(0, 7), camera()
    random = np.random.default_rng(2)
    features = random.normal(0, 1, (len(splats), 4)).astype(np.float32)
    rasteriser, parameters, planes = drawn(splats, view)
    pulls = random.normal(0, 1, planes.shape).astype(np.float32)
    gradients = np.zeros_like(parameters)
    composed = rasteriser.cropped(rasteriser.compose(features=features)).copy()
    by_features = rasteriser.backward(pulls, np.zeros(3), gradients, more=True)

    tensors = reference.tensors(splats)
    theirs = torch.tensor(features, dtype=torch.float64, requires_grad=True)
    picture, alpha = reference.composed(tensors, view, theirs)
    assert np.abs(composed[:4] - picture.detach().numpy().transpose(2, 0, 1)).max() < 2e-5
    wanted = torch.tensor(rasteriser.cropped(pulls).copy(), dtype=torch.float64)
    ((picture * wanted[:4].permute(1, 2, 0)).sum() + (alpha * wanted[4]).sum()).backward()
    assert agrees(by_features, theirs.grad, 3e-5)
    assert agrees(unpack(gradients, len(splats)).means, tensors[0].grad, 3e-5)


def test_results_are_the_same_bits_on_any_number_of_threads():
    splats, view = reference.cloud(3000, 1, 3, size=0.03), look_at((0, -3, 0.5), (0, 0, 0), 150, 0.7)
    pulls = np.random.default_rng(0).normal(0, 1, (5, 160, 160)).astype(np.float32)
    results = []
    for threads in (1, 2, 5, 1):
        rasteriser, parameters, planes = drawn(splats, view, threads)
        gradients = np.zeros_like(parameters)
        rasteriser.backward(pulls, BACKGROUND, gradients)
        results.append((planes.copy(), gradients))
    for planes, gradients in results[1:]:
        assert np.array_equal(planes, results[0][0]) and np.array_equal(gradients, results[0][1])
    assert np.abs(results[0][1]).max() > 0


def test_nothing_to_see_is_an_empty_picture():
    splats, view = reference.cloud(50, 0, 0), camera()
    for hidden in (
        dataclasses.replace(splats, opacity_logits=np.full(50, -20, np.float32)),
        dataclasses.replace(splats, means=splats.means + np.float32(100)),
        dataclasses.replace(splats, means=np.full((50, 3), np.nan, np.float32)),
    ):
        picture = render(hidden, view, (0.25, 0.5, 0.75))
        assert picture.alpha.max() == 0 and picture.depth.max() == 0
        assert np.array_equal(picture.color, np.broadcast_to(np.float32([0.25, 0.5, 0.75]), picture.color.shape))


def test_median_depth_is_the_front_of_what_hides_the_rest():
    """A wall of opaque Gaussians at depth 2 before one at depth 3: the depth is 2 there, and 0 beside the walls."""
    x, y = np.meshgrid(np.linspace(-0.5, 0.5, 21), np.linspace(-0.5, 0.5, 21))
    wall = np.stack([x.ravel(), np.zeros(441), y.ravel()], 1)
    means = np.concatenate([wall + (0, 1, 0), wall]).astype(np.float32)
    splats = Splats(
        means, np.tile(np.float32([1, 0, 0, 0]), (882, 1)), np.full((882, 3), np.log(0.04), np.float32),
        np.full(882, 6, np.float32), np.zeros((882, 1, 3), np.float32),
    )  # fmt: skip
    picture = render(splats, look_at((0, -2, 0), (0, 0, 0), 64, 1.2))
    assert abs(picture.depth[32, 32] - 2) < 5e-3
    assert picture.depth[2, 2] == 0 and picture.alpha[2, 2] == 0


PACKED = r"\b(v?mulps|vfn?m(add|sub)\d+ps|fm(ul|la|ls)(\.4s)?\s+v\d)"  # x86 and ARM
SCALAR = r"\b(v?mulss|vfn?m(add|sub)\d+ss|fn?m(add|sub)\s|fmul\s+s\d)"


@pytest.mark.parametrize("worker", [compose, compose_back], ids=["forward", "backward"])
def test_inner_loops_are_vector_code(worker):
    """A kernel that fell back to scalars would multiply lane by lane. (Compiled afresh: what comes from the cache has no listing.)"""
    rasteriser, parameters, planes = drawn(scene(0, 0), camera())
    rasteriser.backward(np.zeros_like(planes), BACKGROUND, np.zeros_like(parameters))
    fresh = numba.njit(worker.py_func, nogil=True, error_model="numpy")
    fresh.compile(worker.signatures[0])
    assembly = "\n".join(fresh.inspect_asm().values())
    packed, scalar = len(re.findall(PACKED, assembly)), len(re.findall(SCALAR, assembly))
    assert packed > 20 and packed > 4 * scalar


def test_kernels_run_where_nothing_can_be_written(tmp_path):
    """Neither the home nor the code's folder is writable: a temporary folder holds the compiled kernels."""
    program = "from backend.splats.parallel import _FOLDER; import tempfile; print(_FOLDER.startswith(tempfile.gettempdir()))"
    nowhere = tmp_path / "file"
    nowhere.write_text("not a folder")
    environment = {**os.environ, "HOME": str(nowhere), "XDG_CACHE_HOME": str(nowhere / "cache"), "LOCALAPPDATA": str(nowhere / "cache")}
    environment.pop("NUMBA_CACHE_DIR", None)
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "True", result.stderr


def test_compiled_kernels_are_kept(tmp_path):
    """A second process starts with the first one's code: no kernel is compiled again."""
    program = (
        "import numpy as np; from backend.splats.raster_cpu import project, sort_by_depth\n"
        "z = np.zeros(16, np.float32); i = np.zeros(16, np.int32); s = np.zeros(16, np.int64)\n"
        "sort_by_depth(16, i, z, i, i, s); print(sum(sort_by_depth.stats.cache_hits.values()))"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    hits = [
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120).stdout.strip()
        for _ in range(2)
    ]
    assert hits == ["0", "1"]
