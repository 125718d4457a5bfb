"""Losses on whole pictures, for views that do not quite agree (IM-3D, section 3.3): MS-SSIM (Wang et al. 2003), the distance of a network's
features (`backend.nets.lpips`), and a stand-in for it where there is no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from backend.nets.lpips import FeatureDistance, lpips

WINDOW, SIGMA = 11, 1.5  # pixels, of SSIM's Gaussian window (Wang et al. 2004)
C1, C2 = 0.01**2, 0.03**2  # its constants, for pictures in [0, 1]
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, section 3.2, from the finest scale
LEAST_SIDE = 16  # pixels of the coarsest scale


def scales(height: int, width: int) -> int:
    """How many scales a picture is compared at: five from 256 pixels, three at 64, one at 16."""
    side, count = min(height, width), 1
    while count < len(SCALE_WEIGHTS) and side // 2 >= LEAST_SIDE:
        side, count = side // 2, count + 1
    return count


def ms_ssim(a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"], count: int | None = None) -> Float[Tensor, "n"]:
    """Multi-scale structural similarity of pictures in [0, 1], 1 where they are the same (Wang et al. 2003, eq. 7), at `count` scales
    whose weights are made to add up to 1. Windows lie inside the picture; each scale has half the pixels of the one before.
    """
    count = scales(*a.shape[-2:]) if count is None else count
    weights = torch.tensor(SCALE_WEIGHTS[:count], device=a.device)
    weights, result = weights / weights.sum(), torch.ones((), device=a.device)
    for scale in range(count):
        contrast, structure = _ssim(a, b)
        # Anticorrelated pictures have a negative one, which has no power.
        factor = (structure if scale == count - 1 else contrast).clamp_min(1e-6)
        result = result * factor ** weights[scale]
        if scale < count - 1:
            a, b = functional.avg_pool2d(a, 2), functional.avg_pool2d(b, 2)
    return result.mean(1)


def _ssim(a: Tensor, b: Tensor) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
    """Means over each channel of contrast times structure, and of that times luminance."""
    down, across = _blur(a.shape[-2]).to(a.device), _blur(a.shape[-1]).to(a.device)
    mean_a, mean_b, square_a, square_b, product = (down @ torch.stack([a, b, a * a, b * b, a * b]) @ across.T).unbind()
    both, lengths = mean_a * mean_b, mean_a**2 + mean_b**2
    contrast = (2 * (product - both) + C2) / (square_a + square_b - lengths + C2)
    return contrast.mean((2, 3)), (contrast * (2 * both + C1) / (lengths + C1)).mean((2, 3))


@cache
def _blur(side: int) -> Float[Tensor, "inside side"]:
    """The window along one direction, at all places inside, as a matrix: torch's convolutions of single channels take ten times as long."""
    window = torch.exp(-0.5 * (torch.arange(WINDOW) - WINDOW // 2) ** 2 / SIGMA**2)
    rows = torch.zeros(side - WINDOW + 1, side)
    for place in range(len(rows)):
        rows[place, place : place + WINDOW] = window / window.sum()
    return rows


class Gradients(nn.Module):
    """Where no network is to be had: how much a picture rises from pixel to pixel, at several scales, and its colours at the coarsest. A
    view that is brighter than the others counts little, an edge that is missing much.

    Rises and falls by themselves, averaged over four pixels, as a network's first layers have them, were tried: they do not tell where an
    edge runs, and splats answered with speckles (boombox at 64 pixels, at four times today's weight: GMSD 0.082 instead of 0.067).
    """

    name = "gradients"

    def features(self, pictures: Float[Tensor, "n 3 h w"]) -> list[Float[Tensor, "n c y x"]]:
        """Differences of neighbours along x and y at each scale, last the colours."""
        found: list[Tensor] = []
        x = pictures
        for scale in range(min(4, scales(*pictures.shape[-2:]) + 1)):
            if scale:
                x = functional.avg_pool2d(x, 2)
            here = x[..., :-1, :-1]
            found.append(torch.cat([x[..., :-1, 1:] - here, x[..., 1:, :-1] - here], 1))
        return [*found, x]

    def between(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, "n"]:
        """The distance of pictures from their `features`."""
        differences = [(one - other).abs().mean((1, 2, 3)) for one, other in zip(a, b, strict=True)]
        return torch.stack(differences).mean(0)

    def forward(self, a: Float[Tensor, "n 3 h w"], b: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n"]:
        return self.between(self.features(a), self.features(b))


def settled(name: str) -> tuple[str, str]:
    """Which of the features `recipes.FitImages.features` means here, never "auto", and a sentence for the user.

    Raises `KilnError("no-weights")` where VGG16 is asked for by name and not installed.
    """
    from backend import weights
    from protocol.errors import KilnError

    if name in ("auto", "vgg16"):
        try:
            weights.folder("vgg16-lpips")
        except KilnError as error:
            if name == "vgg16" or error.code != "no-weights":
                raise
            return "gradients", (
                "VGG16 is not installed ('kiln weights pull vgg16-lpips'), so pictures are compared by their gradients in place of LPIPS: "
                "where views disagree, fine detail comes out softer."
            )
        return "vgg16", "Pictures are compared by LPIPS (VGG16)."
    if name == "kiln-features":
        return name, "Pictures are compared by Kiln's own small feature network."
    return name, "Pictures are compared by their gradients."


def comparer(name: str) -> FeatureDistance | Gradients:
    """What compares pictures in place of pixels, by a name that `settled` gives."""
    from backend import weights

    if name == "vgg16":
        return lpips(weights.folder("vgg16-lpips") / "model.safetensors")
    if name == "kiln-features":
        from backend.nets import features

        return FeatureDistance(name, features.load())
    return Gradients()
