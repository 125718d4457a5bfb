"""Where the frames of a turntable video were taken from, as far as the pictures alone tell: when the turn closes, whether it rests at its
ends, and which way it goes. Fitting refines what this begins (IM-3D takes the video's cameras for known; public video models give none).

Between its rests the turn is taken to be even: how much pictures change tells of the shape as much as of the speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from PIL import Image
from scipy.ndimage import gaussian_filter

COARSE, FINE = 24, 64  # pixels a side at which frames are compared, and at which their parts are followed
AGAIN = 0.6  # a frame that differs from the first by less than this times a step shows it again, or a step beyond it
CONTRAST = 1.3  # of views from anywhere, to that of two neighbours, below which no view can be told to come again
NEXT = 1.7  # a last frame that differs from the first by less than this times a step is the one before it
REST = 0.08  # frames that change by less than this share of the typical change stand still
SURE = 3.0  # standard errors by which a direction must show
LEAP = 22.5  # degrees between the frames that are followed, at most where they lie closer


@dataclass(frozen=True)
class Turning:
    """azimuths: degrees, frame 0 at 0, as in `orbit.Orbit`: growing where the camera moves to the right, or the subject's front to the
    left. direction: 1 or -1, the sign of that, 0 where the pictures do not tell it (the azimuths then grow, and the mirrored turn is as
    likely). closed: whether the first view was seen to come again."""

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


def choose(frames: Float[np.ndarray, "n h w 3"], views: int) -> tuple[Int[np.ndarray, "k"], Float[np.ndarray, "k"]]:
    """Frames nearest to `views` equal steps of one turn, frame 0 first, none twice; and their azimuths."""
    found = azimuths(frames)
    free, chosen = set(range(len(found))), []
    sign = -1.0 if found[-1] < 0 else 1.0
    for target in np.arange(min(views, len(found))) * 360.0 / views:
        nearest = min(sorted(free), key=lambda index: abs(_signed(found[index] - sign * target)))
        free.remove(nearest)
        chosen.append(nearest)
    return np.array(chosen, np.int64), found[chosen]


def _signed(angle: float) -> float:
    return (angle + 180.0) % 360.0 - 180.0


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
    lags = np.arange(count - begin)
    # the mean over the first few frames that have a partner: one alone may be spoiled
    mean = np.array([np.mean([apart[begin + i, begin + i + lag] for i in range(min(3, count - begin - lag))]) for lag in lags])
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
    """1 where the subject's near side moves to the left, -1 where to the right, 0 where that does not show.

    What is near the camera moves against its far side, and hides it: in the middle of the subject, its lower part first (from above, the
    far part of its top is seen above the near one), patterns follow the near side. Each pair of frames votes by how much better they match
    when moved to one side than to the other.
    """
    small = _small(frames, FINE)
    behind = np.median(np.concatenate([small[:, 0].reshape(-1, 3), small[:, -1].reshape(-1, 3)]), 0)
    solid = np.abs(small - behind).max(3).max(0) > 0.06
    if solid.sum() < 40:
        return 0
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    top, bottom = rows[0] + (rows[-1] - rows[0]) * 3 // 10, rows[-1] + 1
    centre, reach = (columns[0] + columns[-1] + 1) // 2, max(3, (columns[-1] - columns[0]) * 3 // 10)
    sharp = small - gaussian_filter(small, (0, 3, 3, 0))
    most = max(2, int((columns[-1] - columns[0]) * 0.3))
    step = float(np.median(np.diff(even)[np.diff(even) > 0])) if (np.diff(even) > 0).any() else 360.0 / len(frames)
    leap = max(1, int(LEAP / max(step, 1e-6) + 0.5))
    votes = []
    for index in range(0, len(frames) - leap, max(1, leap // 2)):
        one, other = sharp[index], sharp[index + leap]
        low, high = max(centre - reach, 0), min(centre + reach, FINE)
        patch = one[top:bottom, low:high]
        match = {}
        for move in range(-most, most + 1):
            if low + move >= 0 and high + move <= FINE:
                part = other[top:bottom, low + move : high + move]
                match[move] = float((patch * part).sum() / max(np.sqrt((patch**2).sum() * (part**2).sum()), 1e-9))
        left = max((value for move, value in match.items() if move < 0), default=0.0)
        right = max((value for move, value in match.items() if move > 0), default=0.0)
        votes.append(left - right)
    spread = float(np.std(votes)) / max(np.sqrt(len(votes)), 1.0) + 0.003
    score = float(np.mean(votes)) / spread
    return 0 if abs(score) < SURE else 1 if score > 0 else -1
