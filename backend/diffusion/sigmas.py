"""Denoising down a ladder of noise levels, for networks whose noise only grows (x = clean + sigma * noise): the fast solver
DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), which begins anywhere on the ladder and holds known frames in place.

diffusers' schedulers begin at the top only, or count steps that are left out; a partial denoise is a shorter ladder here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Denoiser = Callable[[Float[Tensor, "n c h w"], float], Float[Tensor, "n c h w"]]  # (noisy, sigma) -> its guess of what is clean


def karras(low: float, high: float, steps: int, share: float = 1.0, bend: float = 7.0) -> list[float]:
    """`steps` levels from `share` of the way up to `high`, down to `low`, and 0 (Karras et al. 2022, eq. 5)."""
    top, bottom = high ** (1 / bend), low ** (1 / bend)
    begin = bottom + share * (top - bottom)
    return [(begin + step / max(steps - 1, 1) * (bottom - begin)) ** bend for step in range(steps)] + [0.0]


def solve(
    denoise: Denoiser,
    start: Float[Tensor, "n c h w"] | None,
    noise: Float[Tensor, "n c h w"],
    levels: list[float],
    known: Float[Tensor, "n c h w"] | None = None,
    keep: Bool[Tensor, "n"] | None = None,
    told: Callable[[int, Tensor], None] = lambda step, clean: None,
) -> Float[Tensor, "n c h w"]:
    """From `start` (None: nothing) under `noise` at the first of `levels` down to the last, 0. Frames that `keep` marks are `known`: they
    are at every level what they would be there. told(steps done, guess of the clean frames) after each step; it may raise."""
    x = noise * levels[0] if start is None else start + noise * levels[0]
    before, stride = None, 0.0
    for step, (level, after) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        if keep is not None:
            x = torch.where(keep[:, None, None, None], known + noise * level, x)
        clean = denoise(x, level)
        if after == 0:
            x = clean
        else:
            last, stride = stride, math.log(level / after)
            guess = clean
            if before is not None:
                ratio = stride / (2 * last)
                guess = (1 + ratio) * clean - ratio * before
            x = after / level * x - math.expm1(-stride) * guess
            before = clean
        told(step + 1, clean)
    return x if keep is None else torch.where(keep[:, None, None, None], known, x)
