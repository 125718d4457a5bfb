"""The small generator's autoencoder: Wan's own class (AutoencoderKLWan) with an encoder that is written down and a decoder that is learned.

The encoder is linear: the principal components of blocks of 8 x 8 pixels, put into the weights of Wan's encoder. It needs no training, and
latents of a picture cost one matrix product (`project`). The decoder learns to undo it from what the neighbouring blocks know.

Wan's convolutions reach two frames into the past. Here those taps are zero, so that every frame is coded by itself: views 22.5 degrees
apart share little that a convolution could use. The class, its files and what `encode` and `decode` do are Wan's.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from jaxtyping import Float

from backend.train.muon import Muon, split

CODE = 16  # numbers that a block of 8 x 8 pixels becomes
BLOCK = 8
CONFIG = dict(
    base_dim=32,
    z_dim=CODE,
    dim_mult=[1, 2, 2],
    num_res_blocks=1,
    attn_scales=[],
    temperal_downsample=[False, False],  # diffusers' spelling
    is_residual=True,  # as Wan 2.2: shortcuts around each change of resolution, with which it learns several times sooner
    in_channels=12,  # blocks of 2 x 2 pixels, as Wan 2.2's autoencoder takes them
    out_channels=12,
    patch_size=2,
    scale_factor_temporal=1,
    scale_factor_spatial=BLOCK,
)


@dataclass(frozen=True)
class Components:
    """Principal components of 8 x 8 blocks; a block's numbers run over channel, row, column. scale: what a coefficient is divided by
    for the transformer, the geometric mean of its own spread and of all, so that fine detail counts, but less than shape."""

    basis: Float[torch.Tensor, "192 16"]
    mean: Float[torch.Tensor, "192"]
    scale: Float[torch.Tensor, "16"]


def blocks(pictures: Float[torch.Tensor, "*n h w 3"]) -> Float[torch.Tensor, "*n hw 192"]:
    *n, h, w, _ = pictures.shape
    cut = pictures.reshape(-1, h // BLOCK, BLOCK, w // BLOCK, BLOCK, 3).permute(0, 1, 3, 5, 2, 4)
    return cut.reshape(*n, (h // BLOCK) * (w // BLOCK), 3 * BLOCK * BLOCK)


def principal(pictures: Float[torch.Tensor, "n h w 3"]) -> Components:
    """Of pictures in [-1, 1]."""
    rows = blocks(pictures).reshape(-1, 192).double()
    mean = rows.mean(0)
    spread, basis = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    basis, deviation = basis.flip(1)[:, :CODE], spread.flip(0)[:CODE].clamp(min=1e-12).sqrt()
    scale = (deviation * deviation.square().mean().sqrt()).sqrt()
    scale = scale * (deviation / scale).square().mean().sqrt()
    return Components(basis.float(), mean.float(), scale.float())


def project(components: Components, pictures: Float[torch.Tensor, "*n h w 3"]) -> Float[torch.Tensor, "*n 16 h8 w8"]:
    """Latents as the transformer sees them, of pictures in [-1, 1]."""
    *n, h, w, _ = pictures.shape
    codes = (blocks(pictures) - components.mean) @ (components.basis / components.scale)
    return codes.transpose(-1, -2).reshape(*n, CODE, h // BLOCK, w // BLOCK)


def build(components: Components, seed: int) -> AutoencoderKLWan:
    """Wan's class: the encoder that computes `components`, a decoder from nothing."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(**CONFIG, latents_mean=[0.0] * CODE, latents_std=components.scale.tolist())
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, WanCausalConv3d):
                module.weight[:, :, :-1] = 0
        vae.post_quant_conv.weight.zero_()[:, :, 0, 0, 0] = torch.diag(1 / components.scale)
        vae.post_quant_conv.bias.zero_()
        _write_encoder(vae, components)
    return vae


CONSTANT, SMALL = 1000.0, 0.02  # see _write_encoder


def _write_encoder(vae: AutoencoderKLWan, components: Components) -> None:
    """Weights of a linear map. What is not linear in Wan's encoder is made so: residual branches are zero, and before the last norm one
    channel carries a large constant, so that the norm divides by nearly the same number everywhere and leaves values so small that SiLU
    (x / 2 + x^2 / 4 + ...) is a straight line."""
    encoder = vae.encoder
    for parameter in encoder.parameters():
        parameter.zero_()
    width = encoder.conv_in.out_channels
    eye = torch.eye(12)
    encoder.conv_in.weight[:12, :, -1, 1, 1] = eye
    # where a block of 8 x 8 lies in Wan's order: patchify puts channel, column, row of 2 x 2 pixels into 12 channels
    place = torch.arange(192).view(3, 8, 8)
    cells = place.view(3, 4, 2, 4, 2).permute(0, 4, 2, 1, 3).reshape(12, 4, 4)  # channel of 12, row and column of 4
    # first halving: 4 x 4 pixels (2 x 2 cells of 12) to the best `width` of their 48 numbers, by the components' own covariance
    energy = torch.zeros(48, 48)
    for row in (0, 2):
        for column in (0, 2):
            part = components.basis[cells[:, row : row + 2, column : column + 2].reshape(12, 4).T.reshape(48)] * components.scale.square()
            energy += part @ part.T
    first = torch.linalg.eigh(energy)[1].flip(1)[:, :width]  # [48 width]; keeps nearly all that the components look at
    _write_halving(encoder.down_blocks[0], first.T.reshape(width, 4, 12), 12)
    encoder.down_blocks[1].resnets[0].conv_shortcut.weight[:width, :, 0, 0, 0] = torch.eye(width)
    # second halving: components of 8 x 8 in terms of the four quarters
    second = torch.zeros(CODE, 4, width)
    for k, (row, column) in enumerate(((0, 0), (0, 2), (2, 0), (2, 2))):
        rows = cells[:, row : row + 2, column : column + 2].reshape(12, 4).T.reshape(48)
        second[:, k] = components.basis[rows].T @ first
    _write_halving(encoder.down_blocks[1], second, width)
    # the last block doubles: its shortcut adds what came in
    encoder.mid_block.resnets[1].conv2.bias[-1] = CONSTANT
    wide = encoder.norm_out.gamma.shape[0]
    encoder.norm_out.gamma.fill_(SMALL)
    gain = CONSTANT / (math.sqrt(wide) * SMALL)  # undoes the norm; SiLU halves, the last block doubled
    encoder.conv_out.weight[torch.arange(CODE), torch.arange(CODE), -1, 1, 1] = gain
    vae.quant_conv.weight.zero_()[:, :, 0, 0, 0] = torch.eye(2 * CODE)
    vae.quant_conv.bias[:CODE] = -(components.basis.T @ components.mean)
    vae.quant_conv.bias[CODE:] = -12.0  # log variance: the code is sharp


def _write_halving(block, wanted: Float[torch.Tensor, "out 4 in"], used: int) -> None:
    """A strided convolution that, with the block's shortcut, maps 2 x 2 cells of `used` channels to the first channels as wanted."""
    for resnet in block.resnets:
        if not isinstance(resnet.conv_shortcut, torch.nn.Identity):
            used_in = resnet.conv_shortcut.weight.shape[1]
            resnet.conv_shortcut.weight[:used_in, :, 0, 0, 0] = torch.eye(used_in)
    conv = block.downsampler.resample[1]
    cells_in = block.avg_shortcut.in_channels
    probe = torch.eye(cells_in * 4).view(cells_in * 4, cells_in, 1, 2, 2)
    already = block.avg_shortcut(probe)[:, :, 0, 0, 0].T.reshape(-1, cells_in, 4).transpose(1, 2)  # [out 4 in]
    full = -already[:, :, :cells_in]
    full[: len(wanted), :, :used] += wanted
    conv.weight[:, :cells_in, :2, :2] = full.permute(0, 2, 1).reshape(len(full), cells_in, 2, 2)


def _last_tap(conv: WanCausalConv3d, x, cache_x=None):
    """The convolution without its past, many times cheaper on a CPU than Conv3d."""
    b, c, t, h, w = x.shape
    flat = x.transpose(1, 2).reshape(b * t, c, h, w).contiguous(memory_format=torch.channels_last)
    out = F.conv2d(flat, conv.weight[:, :, -1], conv.bias, padding=conv._padding[0])
    return out.reshape(b, t, *out.shape[1:]).transpose(1, 2)


@contextmanager
def framewise(vae: AutoencoderKLWan):
    """Within, its convolutions see one frame at a time; correct for an autoencoder of `build` alone."""
    convs = [
        module for module in vae.modules() if isinstance(module, WanCausalConv3d) and "forward" not in vars(module)
    ]  # it may be nested
    for conv in convs:
        conv.forward = _last_tap.__get__(conv)
    try:
        yield
    finally:
        for conv in convs:
            del conv.forward


def decode(vae: AutoencoderKLWan, codes: Float[torch.Tensor, "n 16 h8 w8"]) -> Float[torch.Tensor, "n 3 h w"]:
    """Of latents as the transformer sees them, each by itself."""
    scale = torch.tensor(vae.config.latents_std).to(codes)[:, None, None]
    return unpatchify(vae.decoder(vae.post_quant_conv((codes * scale)[:, :, None])), 2)[:, :, 0].float()


def train(
    vae: AutoencoderKLWan,
    components: Components,
    draw,
    steps: int,
    seed: int,
    log,
    batch: int = 12,
    rate: float = 3e-3,
    noise: float = 0.05,
):
    """The decoder on pictures [b h w 3] in [-1, 1] that `draw(rng, b)` gives: absolute error, that of both gradients, squared error. Codes
    get a little noise, for those of a generator are not exact. log(step, figures): called every 100 steps."""
    rng = np.random.default_rng([seed, 1])
    torch.manual_seed(seed)
    learning = [(name, p) for name, p in vae.named_parameters() if name.startswith(("decoder", "post_quant"))]
    vae.requires_grad_(False)
    for _, parameter in learning:
        parameter.requires_grad_(True)
    matrices, rest = split(learning, lambda name: not any(edge in name for edge in ("conv_in", "conv_out", "quant_conv")))
    optimizers = [Muon(matrices, rate), torch.optim.AdamW(rest, rate, (0.9, 0.99), weight_decay=0)]
    sums = np.zeros(2)
    with framewise(vae):
        for step in range(1, steps + 1):
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = rate * min(1, step / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            picture = draw(rng, batch)
            code = project(components, picture)
            code = code + noise * torch.rand(batch, 1, 1, 1) * torch.randn_like(code)
            with torch.autocast("cpu", torch.bfloat16):
                made = decode(vae, code)
            error = made - picture.permute(0, 3, 1, 2)
            across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
            loss = error.abs().mean() + across.abs().mean() + down.abs().mean() + error.square().mean()
            vae.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for _, p in learning], 1.0)
            for optimizer in optimizers:
                optimizer.step()
            sums += loss.item(), error.square().mean().item() / 4
            if step % 100 == 0:
                log(step, {"loss": sums[0] / 100, "psnr": -10 * math.log10(sums[1] / 100)})
                sums[:] = 0
