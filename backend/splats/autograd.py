"""The CPU kernels as one differentiable torch function, for pipelines that need losses of their own."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float

from backend.views.cameras import Camera

from .parallel import THREADS
from .raster_cpu import EMPTY, LOG_SCALE, OPACITY, QUATERNION, TILE, Rasteriser, columns


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameters, camera, threads):
        count = len(parameters)
        matrix = np.zeros((parameters.shape[1], columns(count)), np.float32)
        matrix[QUATERNION:LOG_SCALE], matrix[OPACITY] = 1, EMPTY
        matrix[:, :count] = parameters.detach().cpu().numpy().T
        ctx.rasteriser, ctx.matrix, ctx.like = Rasteriser(threads), matrix, parameters
        ctx.rasteriser.project(matrix, count, camera)
        return torch.from_numpy(ctx.rasteriser.cropped(ctx.rasteriser.compose()).copy()).to(parameters)

    @staticmethod
    def backward(ctx, gradients):
        height, width = gradients.shape[1:]
        padded = np.zeros((5, -(-height // TILE) * TILE, -(-width // TILE) * TILE), np.float32)
        padded[:, :height, :width] = gradients.cpu().numpy()
        result = np.zeros_like(ctx.matrix)
        ctx.rasteriser.backward(padded, np.zeros(3), result)
        return torch.from_numpy(result[:, : len(ctx.like)].T.copy()).to(ctx.like), None, None


def draw(
    means: Float[torch.Tensor, "n 3"],
    quaternions: Float[torch.Tensor, "n 4"],
    log_scales: Float[torch.Tensor, "n 3"],
    opacity_logits: Float[torch.Tensor, "n"],
    sh: Float[torch.Tensor, "n k 3"],
    camera: Camera,
    threads: int = THREADS,
) -> tuple[Float[torch.Tensor, "h w 3"], Float[torch.Tensor, "h w"], Float[torch.Tensor, "h w"]]:
    """Colour on black, accumulated depth (sum of weight times depth) and alpha, with gradients for all five arrays. Runs on the CPU."""
    parameters = torch.cat([means, quaternions, log_scales, opacity_logits[:, None], sh.flatten(1)], 1)
    planes = _Draw.apply(parameters, camera, threads)
    return planes[:3].permute(1, 2, 0), planes[3], planes[4]
