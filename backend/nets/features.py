"""A small convolutional network whose features compare pictures: `kiln-features`, trained by backend/train/features.py on pictures of
procedural objects. It stands in LPIPS's place (Zhang et al. 2018, arXiv 1801.03924) where VGG's weights are not to be had; it is not LPIPS.

Five maps at strides 1, 2, 4, 8 and 16; subsampling is low-passed (Zhang 2019, arXiv 1904.11486), so that a small shift of the picture is a
small change of the features. `backend.nets.lpips.FeatureDistance` makes a distance of them.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from protocol.errors import KilnError

FOLDER = Path(__file__).resolve().parent.parent / "data" / "kiln-features"
FILE = "model.safetensors"
WIDTHS = (16, 32, 64, 112, 160)  # channels at strides 1, 2, 4, 8, 16


class Features(nn.Module):
    """Two 3 x 3 convolutions a level, each followed by a rectifier. Where `normed`, as in training, batch normalisation lies between; a
    trained network has it folded into its convolutions."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS, normed: bool = False):
        super().__init__()
        self.widths = tuple(widths)
        self.levels = nn.ModuleList()
        for before, width in zip((3, *widths), widths, strict=False):
            layers: list[nn.Module] = []
            for inner in (before, width):
                layers.append(nn.Conv2d(inner, width, 3, padding=1, bias=not normed))
                layers += [nn.BatchNorm2d(width)] if normed else []
                layers.append(nn.ReLU())
            self.levels.append(nn.Sequential(*layers))

    def forward(self, pictures: Float[Tensor, "n 3 h w"]) -> list[Float[Tensor, "n c h w"]]:
        """sRGB in [0, 1], 32 pixels a side or more. One map for each level, finest first."""
        x, maps = (pictures - 0.5) * 4, []
        for number, level in enumerate(self.levels):
            x = level(x if number == 0 else halved(x))
            maps.append(x)
        return maps

    def folded(self) -> Features:
        """The same function without batch normalisation."""
        plain = Features(self.widths)
        for level, target in zip(self.levels, plain.levels, strict=True):
            parts, convolutions = list(level), [part for part in target if isinstance(part, nn.Conv2d)]
            for number, convolution in enumerate(convolutions):
                source, norm = parts[3 * number], parts[3 * number + 1]
                scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
                convolution.weight.data = (source.weight * scale[:, None, None, None]).detach().clone()
                convolution.bias.data = (norm.bias - norm.running_mean * scale).detach().clone()
        return plain


def halved(maps: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
    """Every second pixel after a binomial low pass."""
    kernel = maps.new_tensor([0.125, 0.375, 0.375, 0.125])  # even, so that the new pixels lie in the middle of four
    kernel = (kernel[:, None] * kernel[None]).expand(maps.shape[1], 1, 4, 4)
    return F.conv2d(F.pad(maps, (1, 1, 1, 1), mode="replicate"), kernel, stride=2, groups=maps.shape[1])


def load(folder: Path = FOLDER, device: str = "cpu") -> Features:
    """The trained network, ready to use and not to be trained. `KilnError("no-weights")` where its file is missing or another's."""
    return _loaded(Path(folder), device)


@functools.lru_cache(maxsize=4)
def _loaded(folder: Path, device: str) -> Features:
    path = folder / FILE
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name).float() for name in file.keys()}
        widths = tuple(weights[f"levels.{level}.0.weight"].shape[0] for level in range(sum(name.endswith(".0.bias") for name in weights)))
        net = Features(widths)
        net.load_state_dict(weights)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise KilnError(
            "no-weights", f"The feature network in {folder} cannot be loaded: {error}.", "Install the backend again: it comes with Kiln."
        ) from None
    return net.requires_grad_(False).eval().to(device)
