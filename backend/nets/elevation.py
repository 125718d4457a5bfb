"""Guesses the elevation of a turntable's cameras from its pictures (IM-3D, appendix A.1): `kiln-elevation`, trained by
backend/train/elevation.py on turntables of procedural objects.

The paper averages DINO's features over four frames and puts a two-layer perceptron on top. Here the features are a small network's own, and
beside their mean over the frames stand their deviation and their maximum, place by place: what a point on a circle does over a turn, which
is an ellipse of the axes' ratio sin(elevation), shows there, in any shape. All three do not depend on the frames' order or number.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from backend.progress import Progress, silent
from protocol.errors import KilnError

FOLDER = Path(__file__).resolve().parent.parent / "data" / "kiln-elevation"
FILE = "model.safetensors"
SIDE = 64  # pixels of the frames that the network sees
FRAMES = 4  # of a turn, that it sees at once
RANGE = 0.0, 45.0  # degrees, of the training turntables


class Elevation(nn.Module):
    """Frames [n k 3 64 64] in [0, 1] on white -> elevation in degrees, [n]."""

    def __init__(self, wide: tuple[int, int, int, int] = (24, 48, 96, 128), inner: int = 128, spread: bool = True):
        super().__init__()
        first, second, third, fourth = wide
        self.spread = spread
        self.each = nn.Sequential(
            nn.Conv2d(3, first, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(first, second, 3, stride=2, padding=1), nn.ReLU()
        )
        self.turn = nn.Sequential(
            nn.Conv2d(second * (3 if spread else 1), third, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(third, fourth, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.height = nn.Sequential(
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(fourth * (SIDE // 16) ** 2, inner), nn.ReLU(), nn.Linear(inner, 1)
        )

    def forward(self, frames: Float[Tensor, "n k 3 s s"]) -> Float[Tensor, "n"]:
        maps = self.each((1 - frames).flatten(0, 1)).unflatten(0, frames.shape[:2])
        over = [maps.mean(1)]
        if self.spread:
            over += [(maps.var(1, correction=0) + 1e-4).sqrt(), maps.amax(1)]
        middle, reach = (RANGE[0] + RANGE[1]) / 2, (RANGE[1] - RANGE[0]) / 2
        return middle + reach * self.height(self.turn(torch.cat(over, 1)))[:, 0]


def estimate(frames: Float[np.ndarray, "k h w 3"], progress: Progress = silent) -> float:
    """Elevation in degrees of the cameras of a whole turn in equal steps; frames on white, sRGB in [0, 1], four or more.

    The mean over all sets of four frames a quarter turn apart, and over their mirror images. Within 0 to 45, where it was trained; what a
    fit begins with, not a measurement. `KilnError("no-weights")` where the network's file is missing.
    """
    progress(0.0, "Looking at the turn")
    count = len(frames)
    if count < FRAMES:
        raise KilnError("bad-input", f"{count} views are too few to see the elevation.", f"Give at least {FRAMES}, or set orbit.elevation.")
    seen = shrunk(torch.from_numpy(np.ascontiguousarray(np.asarray(frames, np.float32).transpose(0, 3, 1, 2))))
    starts = range(max(1, count // FRAMES))
    sets = torch.stack([seen[[(start + round(step * count / FRAMES)) % count for step in range(FRAMES)]] for start in starts])
    with torch.inference_mode():
        guesses = load()(torch.cat([sets, sets.flip(-1)]))
    return float(guesses.mean().clamp(*RANGE))


def shrunk(frames: Float[Tensor, "k 3 h w"]) -> Float[Tensor, "k 3 64 64"]:
    return F.interpolate(frames, size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)


def load(folder: Path = FOLDER) -> Elevation:
    """The trained network, not to be trained. `KilnError("no-weights")`."""
    return _loaded(Path(folder))


@functools.lru_cache(maxsize=2)
def _loaded(folder: Path) -> Elevation:
    try:
        weights = {name: values.float() for name, values in load_file(folder / FILE).items()}
        net = Elevation()
        net.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise KilnError(
            "no-weights", f"The elevation network in {folder} cannot be loaded: {error}.", "Install the backend again: it comes with Kiln."
        ) from None
    return net.requires_grad_(False).eval()
