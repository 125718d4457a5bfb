"""kiln-features: what ships compares pictures as eyes roughly do, and can be trained again."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from backend.nets.features import FILE, FOLDER, Features, load
from backend.nets.lpips import FeatureDistance
from backend.train.features import train
from backend.train.objects import HELD_OUT, make
from backend.train.turntables import turntable
from protocol.errors import KilnError


@pytest.fixture(scope="module")
def pictures():
    """Objects of families that the network has not seen, with fine texture."""
    views = np.concatenate([turntable(make(seed, family), 20.0, 96, 2)[0] for seed, family in enumerate(HELD_OUT)])
    grain = np.random.default_rng(0).normal(0, 0.06, views.shape[:3])[..., None] * (views.min(-1, keepdims=True) < 0.98)
    return torch.from_numpy((views + grain).clip(0, 1).astype(np.float32)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def distance():
    apart = FeatureDistance("kiln-features", load())

    def measure(a, b):
        with torch.inference_mode():
            return apart(a, b)

    return measure


def blurred(pictures, sigma):
    return torch.from_numpy(gaussian_filter(pictures.numpy(), (0, 0, sigma, sigma), mode="nearest"))


def warped(pictures, share):
    draws = torch.Generator().manual_seed(0)
    count, _, height, width = pictures.shape
    field = F.interpolate(torch.randn(count, 2, 5, 5, generator=draws), size=(height, width), mode="bicubic", align_corners=False)
    grid = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), [count, 3, height, width], align_corners=False)
    return F.grid_sample(pictures, grid + 2 * share * field.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)


def noisy(pictures, strength):
    draws = torch.Generator().manual_seed(0)
    return (pictures + strength * torch.randn(pictures.shape, generator=draws)).clamp(0, 1)


@pytest.mark.parametrize(
    "spoil, strengths", [(blurred, (0.5, 1, 2, 4)), (noisy, (0.02, 0.05, 0.1, 0.2)), (warped, (0.005, 0.01, 0.02, 0.04))]
)
def test_the_distance_grows_with_what_is_done_to_a_picture(pictures, distance, spoil, strengths):
    found = [float(distance(pictures, spoil(pictures, strength)).mean()) for strength in strengths]
    assert 0 < found[0] and all(more > 1.2 * less for less, more in zip(found, found[1:]))


def test_blur_counts_more_than_a_shift_that_changes_pixels_as_much(pictures, distance):
    shifted = torch.roll(pictures, 1, 3)
    changed = (shifted - pictures).square().mean((1, 2, 3))
    soft = []
    for one, much in zip(pictures, changed):
        low, high = 0.2, 12.0
        for _ in range(8):
            middle = (low + high) / 2
            trial = blurred(one[None], middle)
            low, high = (middle, high) if (trial - one).square().mean() < much else (low, middle)
        soft.append(trial)
    assert (distance(pictures, torch.cat(soft)) > distance(pictures, shifted)).all()


def test_five_maps_at_five_scales(pictures):
    for size in (64, 96):
        maps = load()(pictures[:1, :, :size, :size])
        assert [level.shape[-1] for level in maps] == [size // stride for stride in (1, 2, 4, 8, 16)]
    assert 0.3e6 < sum(weight.numel() for weight in load().parameters()) < 1e6
    assert (FOLDER / FILE).stat().st_size < 4_000_000
    assert not any(weight.requires_grad for weight in load().parameters())


def test_gradients_reach_the_picture(pictures):
    picture = pictures[:1].clone().requires_grad_()
    FeatureDistance("kiln-features", load())(picture, blurred(pictures[:1], 1.0)).sum().backward()
    assert torch.isfinite(picture.grad).all() and float(picture.grad.abs().max()) > 0


def test_folding_batch_normalisation_changes_nothing():
    torch.manual_seed(0)
    net = Features((8, 12), normed=True)
    pictures = torch.rand(4, 3, 32, 32)
    for _ in range(3):
        net(pictures)  # in training: moves the running statistics
    net.eval()
    for one, other in zip(net(pictures), net.folded()(pictures), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("task", ["shape", pytest.param("instance", marks=pytest.mark.long)])
def test_training_is_repeatable(task):
    one, other = (train(task, 8, 3, 4, 5).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.isfinite(values).all() for values in one.values())


def test_missing_and_foreign_weights_get_a_sentence(tmp_path):
    with pytest.raises(KilnError, match="cannot be loaded") as error:
        load(tmp_path)
    assert error.value.code == "no-weights"
    save_file({"something.else": torch.zeros(2)}, tmp_path / FILE)
    with pytest.raises(KilnError, match="cannot be loaded"):
        load(tmp_path)
