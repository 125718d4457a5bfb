"""The CPU kernels as one differentiable torch function, for pipelines that need losses of their own."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float

from backend.views.cameras import Camera

from .parallel import THREADS
from .raster_cpu import EMPTY, LOG_SCALE, OPACITY, QUATERNION, TILE, Rasteriser, columns

ONE_THREAD = 128**2  # pixels of a picture, up to which handing out work to threads costs more than it saves


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameters, camera, threads, pulled, room):
        rows, count = parameters.shape
        matrix = np.zeros((rows, columns(count)), np.float32)
        matrix[QUATERNION:LOG_SCALE], matrix[OPACITY] = 1, EMPTY
        matrix[:, :count] = parameters.detach().cpu().numpy()
        rasteriser = room.pop() if room else Rasteriser(threads)
        ctx.rasteriser, ctx.matrix, ctx.like, ctx.pulled, ctx.room = rasteriser, matrix, parameters, pulled, room
        rasteriser.project(matrix, count, camera)
        return torch.from_numpy(rasteriser.cropped(rasteriser.compose()).copy()).to(parameters)

    @staticmethod
    def backward(ctx, gradients):
        height, width = gradients.shape[1:]
        padded = np.zeros((5, -(-height // TILE) * TILE, -(-width // TILE) * TILE), np.float32)
        padded[:, :height, :width] = gradients.cpu().numpy()
        result = np.zeros_like(ctx.matrix)
        screen = torch.from_numpy(ctx.rasteriser.backward(padded, np.zeros(3), result))
        if ctx.pulled is not None:
            ctx.pulled[0] += screen
            ctx.pulled[1] += screen > 0
        if ctx.room is not None:
            ctx.room.append(ctx.rasteriser)
        return torch.from_numpy(result[:, : ctx.like.shape[1]].copy()).to(ctx.like), None, None, None, None


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
    planes = _Draw.apply(parameters.T, camera, threads, None, None)
    return planes[:3].permute(1, 2, 0), planes[3], planes[4]


def draw_views(
    parameters: Float[torch.Tensor, "rows n"],
    cameras: Float[torch.Tensor, "v 23"],
    width: int,
    height: int,
    pulled: Float[torch.Tensor, "2 n"] | None = None,
    room: list[Rasteriser] | None = None,
) -> Float[torch.Tensor, "v 5 h w"]:
    """`raster_warp.draw` on the CPU. room: rasterisers at rest, kept from step to step of a fit, which spare fresh memory."""
    threads = 1 if width * height <= ONE_THREAD else THREADS
    every = [_camera(numbers, width, height) for numbers in cameras.double().cpu().numpy()]
    return torch.stack([_Draw.apply(parameters, camera, threads, pulled, room) for camera in every])


def _camera(numbers: Float[np.ndarray, "23"], width: int, height: int) -> Camera:
    """The camera of `raster_cpu.camera_numbers`."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = numbers[:9].reshape(3, 3), numbers[9:12]
    fx, fy, cx, cy = numbers[12:16].tolist()
    return Camera(width, height, fx, fy, cx, cy, matrix)
