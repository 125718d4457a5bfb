"""What `loss.py` minimises, for pictures of several views that lie on an NVIDIA GPU: value and gradient in four kernels of NVIDIA Warp.

The window goes over the pictures along the rows and then down the columns, each time for all that the next kernel needs at a place.
Places are counted in 32 bits, as Warp does: views too large for that together are compared some at a time.
"""
# ruff: noqa: UP018  (see raster_warp.py)

from __future__ import annotations

import torch
import warp as wp
from jaxtyping import Float

from .loss import _TAPS, Weights
from .raster_warp import Floats, launch, quad

wp.set_module_options({"enable_backward": False, "default_grid_stride": False})

MOST_VALUES = 2**31 - 1  # of one array
MAPS = 12  # values for each pixel between the kernels: four for each channel

_REACH = wp.constant(5)  # pixels that the window reaches to each side
_C1 = wp.constant(0.01**2)  # SSIM's constants for pictures in [0, 1]
_C2 = wp.constant(0.03**2)
_WINDOW = wp.constant(wp.types.vector(length=11, dtype=wp.float32)(*(float(tap) for tap in _TAPS / _TAPS.sum())))


@wp.func_native("""
#ifdef __CUDA_ARCH__
    *reinterpret_cast<float4*>(values.data + 4 * static_cast<long long>(i)) = make_float4(a, b, c, d);
#else
    float* q = values.data + 4 * static_cast<long long>(i);
    q[0] = a; q[1] = b; q[2] = c; q[3] = d;
#endif
""")
def set_quad(values: Floats, i: int, a: float, b: float, c: float, d: float): ...


@wp.func
def shade(values: Floats, first: int, alpha: int, background: float) -> float:
    """One channel at one place, composed on a background."""
    return values[first] + background * (1.0 - values[alpha])


@wp.kernel
def look_along(
    planes: Floats, targets: Floats, backgrounds: Floats, counts: Floats, masked: bool, width: int, height: int, maps: Floats
):  # fmt: skip
    """The window along the rows, of picture, target, the sum of their squares and their product; one thread a value of the picture."""
    i = wp.tid()
    x = i % width
    y = (i / width) % height
    channel = (i / (width * height)) % 3
    view = i / (3 * width * height)
    area = width * height
    row = view * 5 * area + y * width
    background = backgrounds[3 * view + channel]
    mean_a = float(0.0)
    mean_b = float(0.0)
    squares = float(0.0)
    product = float(0.0)
    for k in range(11):
        at = x + k - _REACH
        if at >= 0 and at < width:
            a = shade(planes, row + channel * area + at, row + 4 * area + at, background)
            b = shade(targets, row + channel * area + at, row + 3 * area + at, background)
            if masked:
                a = b + counts[view * area + y * width + at] * (a - b)
            tap = _WINDOW[k]
            mean_a += tap * a
            mean_b += tap * b
            squares += tap * (a * a + b * b)
            product += tap * a * b
    set_quad(maps, i, mean_a, mean_b, squares, product)


@wp.kernel
def look_down(maps: Floats, width: int, height: int, weight: float, slopes: Floats):
    """The window down the columns; SSIM's derivatives by the means, the squares and the product, and what it adds to the loss."""
    i = wp.tid()
    y = (i / width) % height
    total = wp.vec4(0.0, 0.0, 0.0, 0.0)
    for k in range(11):
        at = y + k - _REACH
        if at >= 0 and at < height:
            total += _WINDOW[k] * quad(maps, i + (k - _REACH) * width)
    mean_a = total[0]
    mean_b = total[1]
    both = mean_a * mean_b
    lengths = mean_a * mean_a + mean_b * mean_b
    over1 = 2.0 * both + _C1
    over2 = 2.0 * (total[3] - both) + _C2
    under1 = lengths + _C1
    under2 = total[2] - lengths + _C2
    inverse = 1.0 / (under1 * under2)
    ssim = over1 * over2 * inverse
    by_mean = 2.0 * inverse * (mean_b * (over2 - over1) - ssim * mean_a * (under2 - under1))
    set_quad(slopes, i, by_mean, -2.0 * ssim * under1 * inverse, 2.0 * over1 * inverse, weight * (1.0 - ssim))


@wp.kernel
def spread_along(slopes: Floats, width: int, maps: Floats):
    """The window along the rows over SSIM's derivatives; the loss is handed on."""
    i = wp.tid()
    x = i % width
    total = wp.vec4(0.0, 0.0, 0.0, 0.0)
    for k in range(11):
        at = x + k - _REACH
        if at >= 0 and at < width:
            total += _WINDOW[k] * quad(slopes, i + k - _REACH)
    set_quad(maps, i, total[0], total[1], total[2], slopes[4 * i + 3])


@wp.func
def signum(x: float) -> float:
    return wp.where(x > 0.0, 1.0, 0.0) - wp.where(x < 0.0, 1.0, 0.0)


@wp.kernel
def compare(
    planes: Floats,
    targets: Floats,
    backgrounds: Floats,
    counts: Floats,
    masked: bool,
    maps: Floats,
    width: int,
    height: int,
    w_l1: float,
    w_ssim: float,
    w_alpha: float,
    w_depth: float,
    gradients: Floats,
    losses: Floats,
):
    """Everything of one pixel: its share of the loss and the gradient of its five planes."""
    i = wp.tid()
    area = width * height
    view = i / area
    within = i % area
    y = within / width
    here = view * 5 * area + within
    share = float(1.0)
    if masked:
        share = counts[i]
    alpha = planes[here + 4 * area]
    truth = targets[here + 3 * area]
    off = alpha - truth
    by_alpha = share * w_alpha * signum(off)
    loss = share * w_alpha * wp.abs(off)
    # D - d A = sum of w (z - d): each Gaussian is drawn to the depth that the view has, in proportion to its share.
    known = targets[here + 4 * area]
    off = planes[here + 3 * area] - known * alpha
    by_depth = wp.where(known > 0.0, share * w_depth * signum(off), 0.0)
    loss += wp.where(known > 0.0, share * w_depth * wp.abs(off), 0.0)
    by_alpha -= known * by_depth
    for channel in range(3):
        background = backgrounds[3 * view + channel]
        a = planes[here + channel * area] + background * (1.0 - alpha)
        b = targets[here + channel * area] + background * (1.0 - truth)
        a = b + share * (a - b)
        gradient = w_l1 * signum(a - b)
        loss += w_l1 * wp.abs(a - b)
        if w_ssim > 0.0:
            place = (view * 3 + channel) * area + within
            total = wp.vec3(0.0, 0.0, 0.0)
            for k in range(11):
                at = y + k - _REACH
                if at >= 0 and at < height:
                    four = quad(maps, place + (k - _REACH) * width)
                    total += _WINDOW[k] * wp.vec3(four[0], four[1], four[2])
            gradient -= w_ssim * (total[0] + a * total[1] + b * total[2])
            loss += maps[4 * place + 3]
        gradient *= share
        gradients[here + channel * area] = gradient
        by_alpha -= background * gradient
    gradients[here + 3 * area] = by_depth
    gradients[here + 4 * area] = by_alpha
    losses[i] = loss


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, planes, targets, backgrounds, weights, counts):
        views, _, height, width = planes.shape
        planes, targets, backgrounds = planes.detach().contiguous(), targets.contiguous(), backgrounds.contiguous()
        gradients = torch.empty_like(planes)
        losses = torch.empty((views, height, width), dtype=torch.float32, device=planes.device)
        at_once = max(1, MOST_VALUES // (MAPS * height * width))
        for first in range(0, views, at_once):
            part = slice(first, first + at_once)
            some = None if counts is None else counts[part].contiguous()
            _compare(planes[part], targets[part], backgrounds[part], weights, some, views, gradients[part], losses[part])
        ctx.save_for_backward(gradients)
        return losses.sum()

    @staticmethod
    def backward(ctx, by_loss):
        (gradients,) = ctx.saved_tensors
        return gradients * by_loss, None, None, None, None


def _compare(planes, targets, backgrounds, weights: Weights, counts, all_views: int, gradients, losses) -> None:
    """Fills in loss and gradient of some views; means go over `all_views`."""
    views, _, height, width = planes.shape
    device, pixels, values = planes.device, views * height * width, 3 * all_views * height * width
    none = torch.empty(1, dtype=torch.float32, device=device)
    given = [planes.view(-1), targets.view(-1), backgrounds.view(-1), none if counts is None else counts.view(-1), counts is not None]
    maps = none
    if weights.ssim > 0:
        maps = torch.empty(MAPS * pixels, dtype=torch.float32, device=device)
        slopes = torch.empty_like(maps)
        launch(look_along, 3 * pixels, [*given, width, height, maps], device)
        launch(look_down, 3 * pixels, [maps, width, height, weights.ssim / values, slopes], device)
        launch(spread_along, 3 * pixels, [slopes, width, maps], device)
    factors = [(1 - weights.ssim) / values, weights.ssim / values, 3 * weights.alpha / values, 3 * weights.depth / values]
    launch(compare, pixels, [*given, maps, width, height, *factors, gradients.view(-1), losses.view(-1)], device)


def loss_of(
    planes: Float[torch.Tensor, "v 5 h w"],
    targets: Float[torch.Tensor, "v 5 h w"],
    backgrounds: Float[torch.Tensor, "v 3"],
    weights: Weights,
    counts: Float[torch.Tensor, "v h w"] | None = None,
) -> Float[torch.Tensor, ""]:
    """The mean over the pictures of what `loss.loss_and_gradients` says of one, with its gradient.

    planes: red, green, blue on black, depth, alpha. targets: red, green, blue on black, alpha, depth (0 where unknown). counts: how much
    each pixel counts, 0 to 1.
    """
    return _Loss.apply(planes, targets, backgrounds, weights, counts)
