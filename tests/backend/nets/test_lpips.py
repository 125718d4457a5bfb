"""LPIPS computes what its paper says, with the published heads and with any VGG16 of the published keys and shapes."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from backend.nets.lpips import FeatureDistance, Vgg16, heads, lpips
from protocol.errors import KilnError

# torchvision's vgg16 (and timm's vgg16.tv_in1k): the number of each convolution in `features`, and its channels.
PUBLISHED = {
    0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256), 14: (256, 256), 17: (512, 256), 19: (512, 512),
    21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512),
}  # fmt: skip
TAPPED, POOLED = (2, 7, 14, 21, 28), (5, 10, 17, 24)  # convolutions whose rectified maps are compared, and those that follow a pooling


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A random VGG16 as timm publishes it, its classifier included (cut short)."""
    random = torch.Generator().manual_seed(0)
    tensors = {"pre_logits.fc1.weight": torch.zeros(4, 512, 7, 7), "head.fc.weight": torch.zeros(10, 4)}
    for number, (out, into) in PUBLISHED.items():
        tensors[f"features.{number}.weight"] = torch.randn(out, into, 3, 3, generator=random) * (2 / (9 * into)) ** 0.5
        tensors[f"features.{number}.bias"] = torch.randn(out, generator=random) * 0.1
    file = tmp_path_factory.mktemp("vgg") / "model.safetensors"
    save_file(tensors, file)
    return file, tensors


def by_hand(tensors, a, b) -> float:
    """Zhang et al. 2018, eq. 1, as the package lpips 0.1.4 computes it."""
    total = 0.0
    both = (2 * torch.cat([a, b]).double() - 1 - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor(
        [0.458, 0.448, 0.450]
    )[:, None, None]
    for number in PUBLISHED:
        if number in POOLED:
            both = functional.max_pool2d(both, 2, 2)
        weight, bias = tensors[f"features.{number}.weight"].double(), tensors[f"features.{number}.bias"].double()
        both = functional.conv2d(both, weight, bias, padding=1).clamp(min=0)
        if number in TAPPED:
            head = heads()[TAPPED.index(number)].double()
            unit = both / (both.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
            total += float(torch.einsum("c,chw->hw", head, (unit[0] - unit[1]) ** 2).mean())
    return total


def test_value_is_that_of_the_formula(stored):
    file, tensors = stored
    a, b = torch.rand((2, 1, 3, 32, 25), generator=torch.Generator().manual_seed(1))
    network = lpips(file)
    assert float(network(a, b)) == pytest.approx(by_hand(tensors, a, b), rel=1e-4)
    assert float(network(a, a)) == 0
    assert float(network.between(network.features(a), network.features(b))) == pytest.approx(float(network(a, b)), rel=1e-6)


def test_plain_pictures_have_gradients_that_are_numbers(stored):
    network = lpips(stored[0])
    a = torch.ones((1, 3, 16, 16), requires_grad=True)
    network(a, torch.zeros((1, 3, 16, 16))).sum().backward()
    assert torch.isfinite(a.grad).all() and all(not parameter.requires_grad for parameter in network.parameters())


def test_keys_and_shapes_are_torchvisions():
    found = {name: tuple(values.shape) for name, values in Vgg16().state_dict().items()}
    wanted = {f"features.{number}.weight": (*channels, 3, 3) for number, channels in PUBLISHED.items()}
    assert found == wanted | {f"features.{number}.bias": channels[:1] for number, channels in PUBLISHED.items()}
    assert sum(values.numel() for values in Vgg16().state_dict().values()) == 14_714_688


def test_heads_are_the_published_ones():
    found = heads()
    assert [len(head) for head in found] == [64, 128, 256, 512, 512]
    assert all(float(head.min()) > 0 for head in found)
    # Sums of lpips 0.1.4, weights/v0.1/vgg.pth
    assert [float(head.sum()) for head in found] == pytest.approx(SUMS, rel=1e-5)


SUMS = [6.92599, 8.85833, 17.51501, 51.52132, 47.03485]


@pytest.mark.parametrize("change", ["missing", "shape", "torn"])
def test_another_network_is_refused(stored, tmp_path, change):
    file, tensors = tmp_path / "model.safetensors", dict(stored[1])
    if change == "missing":
        del tensors["features.28.bias"]
    elif change == "shape":
        tensors["features.7.weight"] = torch.zeros(128, 128, 1, 1)
    save_file(tensors, file)
    if change == "torn":
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(KilnError, match="cannot be read" if change == "torn" else "not VGG16: .*features") as caught:
        lpips(file)
    assert caught.value.code == "bad-weights" and "pull" in caught.value.hint


def test_pictures_too_small_to_compare_are_refused(stored):
    with pytest.raises(KilnError, match="12 x 40"):
        lpips(stored[0])(torch.zeros(1, 3, 40, 12), torch.zeros(1, 3, 40, 12))


def test_without_heads_maps_count_the_same():
    class Two(torch.nn.Module):
        def forward(self, pictures):
            return [pictures, functional.avg_pool2d(pictures, 2)]

    a, b = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    a[:, 0], b[:, 1] = 0.5, 0.7  # at right angles in both maps: unit vectors two apart, squared
    assert float(FeatureDistance("two", Two())(a, b)) == pytest.approx(2, rel=1e-5)
