"""Pictures in and out of image autoencoders, and what is reported while a network denoises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from backend.progress import Progress

from .loading import reporting

BEFORE, AFTER = 0.05, 0.93  # of a generator's progress, where denoising begins and where decoding does


def on_background(picture: Float[np.ndarray, "h h 4"], size: int, background: float = 1.0) -> Float[np.ndarray, "s s 3"]:
    """The picture in front of one grey (1: white), `size` pixels a side."""
    color, alpha = picture[..., :3], picture[..., 3:]
    joined = np.concatenate([color * alpha, alpha], -1)
    resized = torch.from_numpy(np.ascontiguousarray(joined)).permute(2, 0, 1)[None]
    if resized.shape[-2:] != (size, size):
        resized = nn.functional.interpolate(resized, (size, size), mode="bicubic", antialias=True, align_corners=False)
    rgba = resized[0].permute(1, 2, 0).clamp(0, 1).numpy()
    return np.clip(rgba[..., :3] + (1 - rgba[..., 3:]) * background, 0, 1).astype(np.float32)


def encode(vae: nn.Module, frames: Float[np.ndarray, "n s s 3"], report: Progress) -> Float[Tensor, "n 4 t t"]:
    """The latents' modes, as the autoencoder makes them: not scaled. One frame at a time."""
    weight = next(vae.parameters())
    latents = []
    for number, frame in enumerate(frames):
        report(BEFORE * number / len(frames), "Encode the frames")
        pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].to(weight.device, weight.dtype)
        latents.append(vae.encode(2 * pixels - 1).latent_dist.mode().float())
    return torch.cat(latents)


def decode(vae: nn.Module, latents: Float[Tensor, "n 4 t t"], report: Progress) -> Float[np.ndarray, "n s s 3"]:
    """Pictures of unscaled latents. One frame at a time."""
    weight = next(vae.parameters())
    frames = []
    for number, latent in enumerate(latents):
        pixels = vae.decode(latent[None].to(weight.device, weight.dtype), return_dict=False)[0]
        frames.append((pixels[0].float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu().numpy())
        report(AFTER + (1 - AFTER) * (number + 1) / len(latents), "Decode the frames", frames[-1])
    return np.stack(frames)


def palette(latent: Float[Tensor, "4 t t"], shown: Float[np.ndarray, "s s 3"]) -> Callable[[Tensor], Float[np.ndarray, "t t 3"]]:
    """Quick pictures of latents: the linear map from latents to colours that is right, on the whole, for one picture and its latent."""
    side = latent.shape[-1]
    small = nn.functional.interpolate(torch.from_numpy(shown).permute(2, 0, 1)[None], (side, side), mode="area")[0]

    def terms(of: Tensor) -> Tensor:
        flat = of.float().cpu().flatten(1).T
        return torch.cat([flat, torch.ones(len(flat), 1)], 1)

    known = terms(latent)
    flat = 1e-3 * len(known) * torch.eye(known.shape[1])  # a picture of few colours says little about the others
    map_ = torch.linalg.solve(known.T @ known + flat, known.T @ small.flatten(1).T)
    return lambda other: (terms(other) @ map_).clamp(0, 1).reshape(side, side, 3).numpy()


@contextmanager
def stepwise(network: nn.Module, steps: int, evaluations: int, report: Progress) -> Iterator[Callable[[int, np.ndarray], None]]:
    """Reports each block that `network` works through, so that a cancel need not wait for the whole evaluation, and yields what reports a
    finished step: (step, preview)."""
    blocks = [*network.down_blocks, network.mid_block, *network.up_blocks]
    passed, done, last = 0, 0, None

    def block() -> None:
        nonlocal passed
        share = min(passed / (len(blocks) * evaluations), 1.0)
        report(BEFORE + (AFTER - BEFORE) * (done + share) / steps, f"Denoise, step {done + 1} of {steps}", last)
        passed += 1

    def step(number: int, preview: np.ndarray) -> None:
        nonlocal passed, done, last
        passed, done, last = 0, number, preview
        report(BEFORE + (AFTER - BEFORE) * number / steps, f"Denoise, step {number} of {steps}", preview)

    with reporting(blocks, block):
        yield step
