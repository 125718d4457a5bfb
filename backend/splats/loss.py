"""What a fit minimises and how it steps, on the CPU: L1 + SSIM of the composed picture, L1 of alpha and depth, Adam. No torch.

3D Gaussian Splatting (Kerbl et al. 2023, eq. 7): (1 - w) L1 + w (1 - SSIM), with SSIM after Wang et al. 2004 in the usual 11 x 11 Gaussian
window (sigma 1.5, zeros beyond the picture's edge). Value and gradient come out of one pass over bands of rows that stay in the cache. Only
the part of the picture where the splats or the subject are is computed: elsewhere both pictures are the same plain colour.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from .parallel import kernel, run
from .raster_cpu import PLANES, TILE, Rasteriser
from .simd import at, load, ramp, root, size, spread, store, take, total, where, zeros

F = np.float32

_TAPS = np.exp(-0.5 * (np.arange(11) - 5) ** 2 / 1.5**2)
_K0, _K1, _K2, _K3, _K4, _K5 = (F(tap) for tap in (_TAPS / _TAPS.sum())[:6])
REACH = 5  # pixels that the window reaches to each side
_C1, _C2 = F(0.01**2), F(0.03**2)  # SSIM's constants for pictures in [0, 1]
_ONE, _TWO = F(1), F(2)
BAND = 32  # rows computed together
_MARGIN = 32  # columns of scratch on each side: twice the reach, in whole lanes
_SANE = F(1e12)  # larger gradients, or none at all, count as zero


@kernel
def blurred(values, place, step):
    """The window along one direction, at sixteen places."""
    far = _K0 * (load(values, place - 5 * step) + load(values, place + 5 * step))
    far = far + _K1 * (load(values, place - 4 * step) + load(values, place + 4 * step))
    far = far + _K2 * (load(values, place - 3 * step) + load(values, place + 3 * step))
    near = _K3 * (load(values, place - 2 * step) + load(values, place + 2 * step))
    near = near + _K4 * (load(values, place - step) + load(values, place + step))
    return far + (near + _K5 * load(values, place))


@kernel
def sign_of(x):
    return where(x > F(0), spread(_ONE), zeros()) - where(x < F(0), spread(_ONE), zeros())


@kernel
def compare(counter, x0, y0, x1, y1, width, height, row, planes, target, background, weights, counts, gradients, losses):
    """Loss (one number for each band and channel, to be added in order) and its gradient by the planes, in the pixels x0..x1, y0..y1.

    `target`: red, green, blue (on black), alpha, depth as planes like the picture's. `weights`: of L1, 1 - SSIM, alpha, depth, all divided
    by the number of values that their mean goes over. `counts` (a plane, or None): how much each pixel counts.
    """
    area = planes.shape[0] // PLANES
    bands = (y1 - y0 + BAND - 1) // BAND
    across = x1 - x0 + 2 * _MARGIN
    rows = BAND + 4 * REACH
    a, b = np.empty(rows * across, np.float32), np.empty(rows * across, np.float32)  # picture, target
    squares, products = np.empty(rows * across, np.float32), np.empty(rows * across, np.float32)
    d0, d1, d2 = np.empty(rows * across, np.float32), np.empty(rows * across, np.float32), np.empty(rows * across, np.float32)
    v0, v1 = np.empty(across, np.float32), np.empty(across, np.float32)
    v2, v3 = np.empty(across, np.float32), np.empty(across, np.float32)
    w_l1, w_ssim, w_alpha, w_depth = weights[0], weights[1], weights[2], weights[3]
    none = zeros()
    while True:
        item = take(counter)
        if item >= 4 * bands:
            break
        channel, top = item % 4, y0 + item // 4 * BAND
        bottom = min(top + BAND, y1)
        loss = none
        if channel == 3:
            for y in range(top, bottom):
                for x in range(x0, x1, 16):
                    place = y * row + x
                    alpha, depth = load(planes, 4 * area + place), load(planes, 3 * area + place)
                    off = alpha - load(target, 3 * area + place)
                    share_alpha, share_depth = spread(w_alpha), spread(w_depth)
                    if counts is not None:
                        here_counts = load(counts, place)
                        share_alpha, share_depth = share_alpha * here_counts, share_depth * here_counts
                    by_alpha = share_alpha * sign_of(off)
                    loss = loss + share_alpha * size(off)
                    truth = load(target, 4 * area + place)
                    # D - d A = sum of w (z - d): each Gaussian is drawn to the depth that the view has, in proportion to its share.
                    off = where(truth > F(0), depth - truth * alpha, none)
                    by_depth = share_depth * sign_of(off)
                    loss = loss + share_depth * size(off)
                    store(gradients, 3 * area + place, by_depth)
                    store(gradients, 4 * area + place, by_alpha - truth * by_depth)
            losses[item] = total(loss)
            continue

        back = at(background, channel)
        first = top - 2 * REACH  # picture row of the scratch's row 0
        used = bottom - top + 4 * REACH
        for r in range(used):
            y = first + r
            for x in range(0, across, 16):
                here, column = r * across + x, x0 - _MARGIN + x
                picture, truth = none, none
                if y >= 0 and y < height and column >= 0 and column < row:
                    place = y * row + column
                    picture = spread(back)
                    if y >= y0 and y < y1 and column >= x0 and column < x1:
                        picture = load(planes, channel * area + place) + back * (_ONE - load(planes, 4 * area + place))
                    truth = load(target, channel * area + place) + back * (_ONE - load(target, 3 * area + place))
                    if counts is not None:
                        picture = truth + load(counts, place) * (picture - truth)
                    inside = ramp() < F(width - column)
                    picture, truth = where(inside, picture, none), where(inside, truth, none)
                store(a, here, picture)
                store(b, here, truth)
                store(squares, here, picture * picture + truth * truth)
                store(products, here, picture * truth)

        if w_ssim > 0:
            for r in range(REACH, used - REACH):
                y = first + r
                for x in range(0, across, 16):
                    here = r * across + x
                    store(v0, x, blurred(a, here, across))
                    store(v1, x, blurred(b, here, across))
                    store(v2, x, blurred(squares, here, across))
                    store(v3, x, blurred(products, here, across))
                for x in range(16, across - 16, 16):
                    here, column = r * across + x, x0 - _MARGIN + x
                    inside = (ramp() < F(width - column)) & (ramp() >= F(-column))
                    if y < 0 or y >= height:
                        inside = ramp() < F(0)
                    mean_a, mean_b = blurred(v0, x, 1), blurred(v1, x, 1)
                    both = mean_a * mean_b
                    lengths = mean_a * mean_a + mean_b * mean_b
                    over1, over2 = _TWO * both + _C1, _TWO * (blurred(v3, x, 1) - both) + _C2
                    under1, under2 = lengths + _C1, blurred(v2, x, 1) - lengths + _C2
                    inverse = _ONE / (under1 * under2)
                    ssim = over1 * over2 * inverse
                    if y >= top and y < bottom and column >= x0 and column < x1:
                        loss = loss + where(inside, w_ssim * (_ONE - ssim), none)
                    store(d0, here, where(inside, _TWO * inverse * (mean_b * (over2 - over1) - ssim * mean_a * (under2 - under1)), none))
                    store(d1, here, where(inside, none - _TWO * ssim * under1 * inverse, none))
                    store(d2, here, where(inside, _TWO * over1 * inverse, none))
        for y in range(top, bottom):
            r = y - first
            if w_ssim > 0:
                for x in range(16, across - 16, 16):
                    here = r * across + x
                    store(v0, x, blurred(d0, here, across))
                    store(v1, x, blurred(d1, here, across))
                    store(v2, x, blurred(d2, here, across))
            for x in range(_MARGIN, across - _MARGIN, 16):
                here = r * across + x
                picture, truth = load(a, here), load(b, here)
                off = picture - truth
                loss = loss + w_l1 * size(off)
                gradient = w_l1 * sign_of(off)
                if w_ssim > 0:
                    gradient = gradient - w_ssim * (blurred(v0, x, 1) + picture * blurred(v1, x, 1) + truth * blurred(v2, x, 1))
                place = y * row + x0 - _MARGIN + x
                if counts is not None:
                    gradient = gradient * load(counts, place)
                store(gradients, channel * area + place, gradient)
        losses[item] = total(loss)


@kernel
def adam(counter, stride, parameters, gradients, first, second, rates, keep1, keep2, small):
    """One step of Adam (Kingma and Ba 2015) on a matrix, with a rate for each row that has the bias correction in it."""
    rows = len(rates)
    while True:
        row = take(counter)
        if row >= rows:
            break
        rate = rates[row]
        for place in range(row * stride, (row + 1) * stride, 16):
            gradient = load(gradients, place)
            gradient = where(size(gradient) < _SANE, gradient, zeros())  # also what is not a number
            m = keep1 * load(first, place) + (_ONE - keep1) * gradient
            v = keep2 * load(second, place) + (_ONE - keep2) * gradient * gradient
            store(first, place, m)
            store(second, place, v)
            store(parameters, place, load(parameters, place) - rate * m / (root(v) + small))


@dataclass(frozen=True)
class Weights:
    """Of the terms of the loss; each term is a mean over the picture's pixels (and channels)."""

    ssim: float  # share of 1 - SSIM; L1 has the rest
    alpha: float
    depth: float


def loss_and_gradients(
    rasteriser: Rasteriser,
    planes: Float[np.ndarray, "5 rows columns"],
    target: Float[np.ndarray, "5 rows columns"],
    subject: tuple[int, int, int, int],
    background: Float[np.ndarray, "3"],
    weights: Weights,
    counts: Float[np.ndarray, "rows columns"] | None = None,
) -> tuple[float, Float[np.ndarray, "5 rows columns"]]:
    """The loss of a picture that `rasteriser` has just composed, and its gradient for `Rasteriser.backward`.

    target: red, green, blue (on black), alpha, depth (0 where unknown). subject: x0, y0, x1, y1 in tiles, outside which target is empty.
    counts: how much each pixel counts, 0 to 1; where it is 0 the picture passes for the target, in SSIM's windows too. None: all count.
    """
    lit = np.nonzero(np.diff(rasteriser.starts).reshape(rasteriser.tiles_y, rasteriser.tiles_x))
    x0, y0, x1, y1 = subject
    if len(lit[0]):
        x0, y0 = min(x0, int(lit[1].min())), min(y0, int(lit[0].min()))
        x1, y1 = max(x1, int(lit[1].max()) + 1), max(y1, int(lit[0].max()) + 1)
    height, width, row = rasteriser.height, rasteriser.width, rasteriser.row
    x0, y0, x1, y1 = x0 * TILE, y0 * TILE, x1 * TILE, min(y1 * TILE, height)
    gradients = rasteriser.buffer("plane_gradients", planes.size)
    gradients.reshape(planes.shape)[:, height:] = 0  # rows of the padding: read by the way back, and not to be what memory happens to hold
    losses = np.zeros(4 * (-(-(y1 - y0) // BAND)), np.float32)
    pixels = width * height
    factors = np.array(
        [(1 - weights.ssim) / (3 * pixels), weights.ssim / (3 * pixels), weights.alpha / pixels, weights.depth / pixels], np.float32
    )
    run(
        rasteriser.threads, compare, x0, y0, x1, y1, width, height, row, planes.reshape(-1), target.reshape(-1),
        np.asarray(background, np.float32), factors, None if counts is None else counts.reshape(-1), gradients, losses,
    )  # fmt: skip
    return float(losses.sum(dtype=np.float64)), gradients.reshape(planes.shape)


class Adam:
    """Moments of a parameter matrix."""

    KEEP1, KEEP2, SMALL = 0.9, 0.999, 1e-15  # Kerbl et al. 2023's published code; gradients of means over pixels are tiny

    def __init__(self, parameters: Float[np.ndarray, "rows columns"]):
        self.first, self.second, self.steps = np.zeros_like(parameters), np.zeros_like(parameters), 0

    def step(self, threads: int, parameters: np.ndarray, gradients: np.ndarray, rates: Float[np.ndarray, "rows"]) -> None:
        """Moves `parameters` in place."""
        self.steps += 1
        rates = rates / (1 - self.KEEP1**self.steps) * (1 - self.KEEP2**self.steps) ** 0.5
        run(
            threads, adam, parameters.shape[1], parameters.reshape(-1), gradients.reshape(-1), self.first.reshape(-1),
            self.second.reshape(-1), rates.astype(np.float32), F(self.KEEP1), F(self.KEEP2), F(self.SMALL),
        )  # fmt: skip
