"""Where the frames of a turntable video were taken from, as far as the pictures alone tell: when the turn closes, whether it rests at its
ends, and which way it goes. Fitting refines what this begins (IM-3D takes the video's cameras for known; public video models give none).

Between its rests the turn is taken to be even: how much pictures change tells of the shape as much as of the speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy.ndimage import gaussian_filter

from .coherence import unexplained

COARSE, FINE = 24, 64  # pixels a side at which frames are compared, and at which their silhouettes are
AGAIN = 0.6  # a frame that differs from the first by less than this times a step shows it again, or a step beyond it
CONTRAST = 1.3  # of views from anywhere, to that of two neighbours, below which no view can be told to come again
NEXT = 1.7  # a last frame that differs from the first by less than this times a step is the one before it
REST = 0.08  # frames that change by less than this share of the typical change stand still
MOST = 12  # frames whose silhouettes are compared
HEIGHTS, LENS = np.arange(0.0, 46.0, 7.5), 40.0  # degrees, that silhouettes are tried with
SURE, CLEAR = 2.0, 0.001  # how much worse the other direction must fit: times, and share of the silhouettes


@dataclass(frozen=True)
class Turning:
    """azimuths: degrees, frame 0 at 0, as in `orbit.Orbit`: growing where the camera moves to the right, or the subject's front to the
    left. direction: 1 or -1, the sign of that, 0 where the silhouettes do not tell it (the azimuths then grow, and the turn the other way
    is as likely). closed: whether the first view was seen to come again."""

    azimuths: Float[np.ndarray, "n"]
    direction: int
    closed: bool


def azimuths(frames: Float[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n"]:
    """The azimuths that `turning` finds."""
    return turning(frames).azimuths


def turning(frames: Float[np.ndarray, "n h w 3"]) -> Turning:
    """The turn that frames, sRGB in [0, 1] on one colour, show: one whole turn, after which there may be the beginning of a second."""
    count = len(frames)
    if count < 3:
        return Turning(np.arange(count) * 360.0 / max(count, 1), 0, False)
    apart = _differences(frames)
    steps = _steps(apart)
    period, closed = _period(apart, steps)
    gone = np.concatenate([[0.0], np.cumsum(steps)])
    whole = period - int(period) if period < count - 1 else 0.0
    if period <= count - 1:
        length = gone[int(period)] + whole * (steps[min(int(period), count - 2)])
    else:
        length = gone[-1] + (period - (count - 1)) * (1.0 if steps[-1] > 0 else 0.0)
    even = gone * (360.0 / max(length, 1e-6))
    direction = _direction(frames, even)
    return Turning(even * (direction or 1), direction, closed)


def _small(frames: Float[np.ndarray, "n h w 3"], size: int) -> Float[np.ndarray, "n s s 3"]:
    pictures = [Image.fromarray((np.clip(frame, 0, 1) * 255 + 0.5).astype(np.uint8)) for frame in frames]
    return np.stack([np.asarray(one.resize((size, size), Image.Resampling.BOX), np.float32) / 255 for one in pictures])


def _differences(frames: Float[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n n"]:
    """Root mean square between every two frames, coarse and soft: what moves by less than a pixel there hardly counts."""
    small = gaussian_filter(_small(frames, COARSE), (0, 0.8, 0.8, 0)).reshape(len(frames), -1).astype(np.float64)
    square = (small * small).sum(1)
    return np.sqrt(np.maximum(square[:, None] + square[None] - 2 * small @ small.T, 0) / small.shape[1])


def _steps(apart: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "m"]:
    """1 for each step between frames, 0 for those at the beginning and the end in which nothing moves."""
    change = np.diag(apart, 1)
    moves = change > REST * np.median(change)
    steps = np.ones(len(change))
    if not moves.any():
        return steps
    first, last = np.flatnonzero(moves)[[0, -1]]
    steps[:first] = steps[last + 1 :] = 0.0
    return steps


def _period(apart: Float[np.ndarray, "n n"], steps: Float[np.ndarray, "m"]) -> tuple[float, bool]:
    """After how many frames the first view comes again, with a fraction, and whether that was seen. Where several lags fit, as with a
    subject that looks alike from several sides, the longest."""
    count = len(apart)
    step = float(np.median(np.diag(apart, 1)[steps > 0])) if (steps > 0).any() else 0.0
    begin = int(np.argmax(steps > 0))
    if step <= 1e-4:
        return float(count), False
    # the mean over the first few frames that have a partner: one alone may be spoiled
    mean = np.array(
        [np.mean([apart[begin + i, begin + i + lag] for i in range(min(3, count - begin - lag))]) for lag in range(count - begin)]
    )
    usual = float(np.median(mean[len(mean) // 4 : max(3 * len(mean) // 4, len(mean) // 4 + 1)]))
    limit = min(AGAIN * step, 0.5 * usual) if usual > CONTRAST * step else 0.0
    last = len(mean) - 1
    if usual > CONTRAST * step and mean[last] < NEXT * step and (mean[last] > AGAIN * step) and mean[last] <= mean[last - 1]:
        return float(begin + last + 1), True
    for lag in range(last, max(1, int(0.55 * count)) - 1, -1):
        falls = mean[lag] <= mean[lag - 1] and (lag == last or mean[lag] <= mean[lag + 1])
        if falls and mean[lag] < limit:
            if lag == last:
                return float(begin + lag), True
            # the bottom of a V through the two neighbours, since a difference grows evenly with the angle
            left, right = mean[lag - 1] - mean[lag], mean[lag + 1] - mean[lag]
            return float(begin + lag + 0.5 * (left - right) / max(left, right, 1e-9)), True
    return float(count), False


def _direction(frames: Float[np.ndarray, "n h w 3"], even: Float[np.ndarray, "n"]) -> int:
    """1 or -1, for which the silhouettes of the first turn fit together better at some height; 0 where both fit."""
    small = _small(frames, FINE)
    behind = np.median(np.concatenate([small[:, 0].reshape(-1, 3), small[:, -1].reshape(-1, 3)]), 0)
    once = np.flatnonzero((even < 359.0) & (np.diff(even, prepend=-1.0) > 0))
    some = once[np.unique(np.round(np.linspace(0, len(once) - 1, min(len(once), MOST))).astype(int))]
    cover = 1 - np.exp(-16 * np.sqrt(((small[some] - behind) ** 2).mean(3)))
    if len(some) < 4 or not (cover > 0.9).any():
        return 0
    there, back = (float(unexplained(cover, sign * even[some], HEIGHTS, LENS).min()) for sign in (1.0, -1.0))
    better, worse = min(there, back), max(there, back)
    if worse < SURE * better + CLEAR:
        return 0
    return 1 if there < back else -1
