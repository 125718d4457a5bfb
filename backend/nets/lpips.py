"""LPIPS: how different two pictures look to a network (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric", eq. 1), version 0.1 with VGG16, and the same formula over any other network of feature maps.

VGG16's convolutions come from the weights registry (`vgg16-lpips`: torchvision's ImageNet weights as timm publishes them). The linear
heads, 1,472 numbers of the package lpips 0.1.4 (BSD-2-Clause), lie in `backend/data`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from protocol.errors import KilnError

HEADS = Path(__file__).resolve().parent.parent / "data" / "lpips_vgg_heads.safetensors"
CONVOLUTIONS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # of VGG16, block by block; pooling between
# What the published code (lpips 0.1.4, ScalingLayer) subtracts from and divides pictures in [-1, 1] by.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
AGAIN = "Run 'kiln weights remove vgg16-lpips' and 'kiln weights pull vgg16-lpips'."
SMALLEST = 16  # pixels a side: four poolings


class Vgg16(nn.Module):
    """The convolutions of VGG16 (Simonyan and Zisserman 2015, configuration D), keyed as torchvision's: `features.0.weight` ...

    Takes pictures N x 3 x H x W in [0, 1], gives the maps after relu1_2, 2_2, 3_3, 4_3 and 5_3.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = []
        self.taps, channels = [], 3
        for block in CONVOLUTIONS:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for wide in block:
                layers += [nn.Conv2d(channels, wide, 3, padding=1), nn.ReLU(inplace=True)]
                channels = wide
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)

    def forward(self, pictures: Float[Tensor, "n 3 h w"]) -> list[Tensor]:
        if min(pictures.shape[-2:]) < SMALLEST:
            height, width = pictures.shape[-2:]
            raise KilnError("bad-input", f"LPIPS cannot compare pictures of {width} x {height}.", f"Give at least {SMALLEST} a side.")
        x, maps = (2 * pictures - 1 - self.shift) / self.scale, []
        for number, layer in enumerate(self.features):
            # A tap is handed out, so what follows it must not write into it; it is a pooling, which does not.
            x = layer(x)
            if number in self.taps:
                maps.append(x)
        return maps


class FeatureDistance(nn.Module):
    """LPIPS' formula over a network's maps: channels to unit length at each place, squared differences weighted by `heads` and summed over
    channels, averaged over places, added over maps. Without heads all channels weigh the same and maps are averaged.

    network: pictures N x 3 x H x W in [0, 1] -> list of N x C x H' x W'. It is frozen here.
    """

    def __init__(self, name: str, network: nn.Module, heads: Sequence[Float[Tensor, "c"]] | None = None):
        super().__init__()
        self.name, self.network = name, network.eval().requires_grad_(False)
        self.heads = None if heads is None else nn.ParameterList(nn.Parameter(head, requires_grad=False) for head in heads)

    def features(self, pictures: Float[Tensor, "n 3 h w"]) -> list[Float[Tensor, "n c y x"]]:
        """Maps whose summed squared differences are the distance."""
        found = []
        for number, values in enumerate(maps := self.network(pictures)):
            # The published code adds 1e-10 to the length; under the root it keeps the gradient finite where nothing responds.
            unit = values * (values.square().sum(1, keepdim=True) + 1e-10).rsqrt()
            weight = 1 / len(maps) if self.heads is None else self.heads[number][:, None, None]
            found.append(unit * weight**0.5)
        return found

    def between(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, "n"]:
        """The distance of pictures from their `features`."""
        return sum(
            ((one - other).square().sum(1).mean((1, 2)) for one, other in zip(a, b, strict=True)), torch.zeros((), device=a[0].device)
        )

    def forward(self, a: Float[Tensor, "n 3 h w"], b: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n"]:
        return self.between(self.features(a), self.features(b))


def vgg_from(file: Path) -> Vgg16:
    """VGG16 with the weights of a .safetensors file that has torchvision's keys; what stands beside the convolutions is left out.

    Raises `KilnError("bad-weights")` where one is missing or has another shape.
    """
    from safetensors import SafetensorError, safe_open

    network = Vgg16()
    wanted = network.state_dict()
    try:
        with safe_open(file, "pt") as stored:
            names = set(stored.keys())
            missing = [name for name in wanted if name not in names]
            if missing:
                raise KilnError("bad-weights", f"{file.name} is not VGG16: it has no {missing[0]}.", AGAIN)
            found = {name: stored.get_tensor(name) for name in wanted}
    except (OSError, SafetensorError) as error:
        raise KilnError("bad-weights", f"{file.name} cannot be read: {error}.", AGAIN) from None
    for name, values in found.items():
        if values.shape != wanted[name].shape:
            shapes = f"{tuple(values.shape)} instead of {tuple(wanted[name].shape)}"
            raise KilnError("bad-weights", f"{file.name} is not VGG16: {name} has shape {shapes}.", AGAIN)
    network.load_state_dict({name: values.float() for name, values in found.items()})
    return network


def heads() -> list[Float[Tensor, "c"]]:
    """The five linear heads that were fitted to people's judgements (Zhang et al. 2018, version 0.1, VGG16)."""
    from safetensors.torch import load_file

    stored = load_file(HEADS)
    return [stored[f"lin{number}"] for number in range(len(CONVOLUTIONS))]


def lpips(file: Path) -> FeatureDistance:
    """LPIPS as published, with VGG16 from `file`."""
    return FeatureDistance("vgg16", vgg_from(file), heads())
