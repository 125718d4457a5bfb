"""Losses on whole pictures agree with independent implementations, and see what pixels do not."""

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from backend.splats.image_loss import SCALE_WEIGHTS, Gradients, comparer, ms_ssim, scales, settled


def pictures(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size
    a = np.stack([0.5 + 0.3 * np.sin(20 * x + 9 * y), x * y, 0.5 + 0.4 * np.cos(31 * y)])
    b = np.roll(a, 2, 2) * 0.9 + random.normal(0, 0.05, a.shape)
    return tuple(torch.tensor(one.clip(0, 1)[None], dtype=torch.float32) for one in (a, b))


def halved(x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2).mean((1, 3))


def by_skimage(a: np.ndarray, b: np.ndarray, count: int) -> float:
    """One channel's MS-SSIM from skimage's SSIM at each scale. A huge C1 leaves contrast and structure alone; 5 pixels of each side see
    beyond the picture and are cut away."""
    weights = np.array(SCALE_WEIGHTS[:count]) / sum(SCALE_WEIGHTS[:count])
    result = 1.0
    for scale, weight in enumerate(weights):
        own = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0, "full": True}
        last = scale == count - 1
        values = structural_similarity(a, b, K1=0.01 if last else 1e5, **own)[1][5:-5, 5:-5]
        result *= values.mean() ** weight
        if not last:
            a, b = halved(a), halved(b)
    return float(result)


@pytest.mark.parametrize("size, count", [(64, 3), (176, 4), (176, 5)])
def test_ms_ssim_is_that_of_skimage_scale_by_scale(size, count):
    a, b = pictures(size)
    wanted = np.mean([by_skimage(a[0, c].double().numpy(), b[0, c].double().numpy(), count) for c in range(3)])
    assert float(ms_ssim(a, b, count)) == pytest.approx(wanted, abs=2e-5)


def test_ms_ssim_of_five_scales_is_that_of_pytorch_msssim():
    a, b = pictures(176)
    assert float(ms_ssim(a, b, 5)) == pytest.approx(PYTORCH_MSSSIM, abs=2e-5)  # the published weights add up to 1.0001


PYTORCH_MSSSIM = 0.906348  # pytorch_msssim 1.0.0: ms_ssim(a, b, data_range=1)


def test_as_many_scales_as_the_picture_has_room_for():
    assert [scales(size, size) for size in (16, 31, 32, 64, 128, 256, 512)] == [1, 1, 2, 3, 4, 5, 5]


def test_the_same_picture_is_the_best_and_gradients_are_numbers():
    a, _ = pictures(64)
    x = a.clone().requires_grad_()
    similarity = ms_ssim(x, a)
    similarity.sum().backward()
    assert float(similarity.detach()) == pytest.approx(1, abs=1e-5) and torch.isfinite(x.grad).all()


def test_where_there_is_no_network_slopes_are_compared_at_each_scale():
    """A ramp of 0.01 a pixel against black: 0.01, 0.02, 0.04, 0.08 along x at four scales, nothing along y, and the mean colour 0.315."""
    ramp = (0.01 * torch.arange(64.0)).expand(1, 3, 64, 64)
    compared = Gradients()
    wanted = ((0.01 + 0.02 + 0.04 + 0.08) / 2 + 0.315) / 5
    assert float(compared(ramp, torch.zeros(1, 3, 64, 64))) == pytest.approx(wanted, rel=1e-5)
    assert float(compared(ramp, ramp)) == 0


def test_without_vgg_the_user_is_told_what_is_lost(monkeypatch, tmp_path):
    monkeypatch.setenv("KILN_HOME", str(tmp_path))
    name, sentence = settled("auto")
    assert isinstance(comparer(name), Gradients) and "vgg16-lpips" in sentence and "softer" in sentence
