"""Guesses the elevation of a turntable's cameras from its pictures (IM-3D, appendix A.1): `kiln-elevation`, trained by
backend/train/elevation.py on turntables of procedural objects.

The paper averages DINO's features over four frames and puts a two-layer perceptron on top. Here two guesses are made, and a two-layer
perceptron weighs them. One is geometry (backend/views/coherence.py): from which height the silhouettes of the whole turn fit together, for
three fields of view. It needs no training and carries over to any shape but those that look alike all around. For these there is the other
one, from pictures: fixed filters look at each frame (silhouette, darkness, colourfulness, edges by direction), and their mean over four
frames, beside their deviation and maximum, is read by three convolutions.
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

from backend.diffusion.matte import by_border
from backend.progress import Progress, silent
from backend.views.coherence import unexplained
from backend.views.turning import CLEAR, SURE
from protocol.errors import KilnError

FOLDER = Path(__file__).resolve().parent.parent / "data" / "kiln-elevation"
FILE = "model.safetensors"
SIDE = 64  # pixels of the frames that the network sees
FRAMES = 4  # of a turn, that it sees at once
LOOKS = 9  # of the filters
FOVS = 30.0, 42.0, 54.0  # degrees, that the silhouettes are tried with
HEIGHTS = np.arange(0.0, 46.0, 5.0)
MOST = 16  # frames whose silhouettes are looked at
RANGE = 0.0, 45.0  # degrees, of the training turntables


class Elevation(nn.Module):
    """What is learnt of it: `read` guesses from pictures, calling it weighs that against the silhouettes."""

    def __init__(self, wide: tuple[int, int, int] = (48, 96, 128), inner: int = 128, spread: bool = True):
        super().__init__()
        self.spread = spread
        layers: list[nn.Module] = []
        for before, width in zip((LOOKS * (3 if spread else 1), *wide), wide, strict=False):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.turn = nn.Sequential(*layers)
        places = wide[-1] * (SIDE // 16) ** 2
        self.height = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(places, inner), nn.ReLU(), nn.Linear(inner, 1))
        self.weigh = nn.Sequential(nn.Linear(len(FOVS) * (len(HEIGHTS) + 3) + 1, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, curves: Float[Tensor, "n f e"], seen: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Degrees from the silhouettes' `coherence.unexplained` for each of FOVS and HEIGHTS, and from what `read` guessed, degrees."""
        low, high = curves.amin(2), curves.amax(2)
        fits = low_point(curves)
        best = fits.gather(1, low.argmin(1, keepdim=True))[:, 0]
        shape = (curves - low[..., None]) / (high - low + 1e-3)[..., None]
        told = torch.cat([shape.flatten(1), (low + 1e-4).log() / 4, (high - low + 1e-4).log() / 4, fits / 45, seen[:, None] / 45], 1)
        share = torch.sigmoid(self.weigh(told)[:, 0] + 2)
        return share * best + (1 - share) * seen

    def read(self, maps: Float[Tensor, "n c y x"]) -> Float[Tensor, "n"]:
        """Degrees from `over_the_turn`."""
        middle, reach = (RANGE[0] + RANGE[1]) / 2, (RANGE[1] - RANGE[0]) / 2
        return middle + reach * self.height(self.turn(maps if self.spread else maps[:, :LOOKS]))[:, 0]


def over_the_turn(frames: Float[Tensor, "n k 3 s s"]) -> Float[Tensor, "n c y x"]:
    """What fixed filters see in the frames, at half their size: mean, deviation and maximum over them."""
    gone = 1 - frames
    dark, any_color = gone.mean(2), (gone.square().mean(2) + 1e-8).sqrt()
    solid = 1 - torch.exp(-8 * any_color)
    across, down, edge = _slope(dark, -1), _slope(dark, -2), _slope(solid, -2)
    looks = [
        dark,
        gone.amax(2) - gone.amin(2),
        solid,
        F.relu(across),
        F.relu(-across),
        F.relu(down),
        F.relu(-down),
        F.relu(edge),
        F.relu(-edge),
    ]
    maps = F.avg_pool2d(torch.stack(looks, 2).flatten(0, 1), 2).unflatten(0, frames.shape[:2])
    return 3 * torch.cat([maps.mean(1), (maps.var(1, correction=0) + 1e-4).sqrt(), maps.amax(1)], 1)


def mirrored(maps: Float[Tensor, "n c y x"]) -> Float[Tensor, "n c y x"]:
    """What `over_the_turn` gives for mirrored frames."""
    order = torch.arange(maps.shape[1])
    order[3::LOOKS], order[4::LOOKS] = order[4::LOOKS].clone(), order[3::LOOKS].clone()
    return maps.flip(-1)[:, order]


def _slope(values: Float[Tensor, "n k s s"], axis: int) -> Float[Tensor, "n k s s"]:
    """Central differences, 0 at the ends."""
    inner = (values.narrow(axis, 2, values.shape[axis] - 2) - values.narrow(axis, 0, values.shape[axis] - 2)) * 2
    return F.pad(inner, (1, 1, 0, 0) if axis == -1 else (0, 0, 1, 1))


def estimate(frames: Float[np.ndarray, "k h w 3"], azimuths: Float[np.ndarray, "k"] | None = None, progress: Progress = silent) -> float:
    """Elevation in degrees of a turn's cameras; square frames on white, sRGB in [0, 1], four or more. azimuths: degrees, as in
    `orbit.Orbit`; equal steps of one turn if None. Whether the turn goes the other way
    round than these say is looked at.

    Within 0 to 45, where it was trained; what a fit begins with, not a measurement. `KilnError("no-weights")` where the network's file is
    missing.
    """
    progress(0.0, "Looking at the turn")
    count = len(frames)
    if count < FRAMES:
        raise KilnError("bad-input", f"{count} views are too few to see the elevation.", f"Give at least {FRAMES}, or set orbit.elevation.")
    turn = np.arange(count) * 360.0 / count if azimuths is None else np.asarray(azimuths, float)
    seen = shrunk(torch.from_numpy(np.ascontiguousarray(np.asarray(frames, np.float32).transpose(0, 3, 1, 2))))
    some = np.unique(np.round(np.arange(min(count, MOST)) * count / min(count, MOST)).astype(int))
    cover = silhouettes(seen[some])
    curves = np.empty((len(FOVS), len(HEIGHTS)), np.float32)
    back = unexplained(cover, -turn[some], HEIGHTS, FOVS[1])
    if SURE * back.min() + CLEAR < unexplained(cover, turn[some], HEIGHTS, FOVS[1]).min():
        turn = -turn  # it goes the other way round
    for number, fov in enumerate(FOVS):
        progress((1 + number) / (1 + len(FOVS)), "Looking from which height the silhouettes fit together")
        curves[number] = unexplained(cover, turn[some], HEIGHTS, fov)
    starts = range(max(1, count // FRAMES))
    sets = torch.stack([seen[[(start + round(step * count / FRAMES)) % count for step in range(FRAMES)]] for start in starts])
    net = load()
    with torch.inference_mode():
        maps = over_the_turn(sets)
        pictured = net.read(torch.cat([maps, mirrored(maps)])).mean().clamp(*RANGE)
        return float(net(torch.from_numpy(curves)[None], pictured[None])[0].clamp(*RANGE))


def silhouettes(frames: Float[Tensor, "k 3 s s"]) -> Float[np.ndarray, "k s s"]:
    """Coverage, by the border's colour; where that tells nothing, by how far a pixel is from white."""
    covers = []
    for frame in frames:
        try:
            covers.append(by_border(frame.permute(1, 2, 0).numpy()))
        except KilnError:
            covers.append(1 - torch.exp(-8 * (1 - frame).square().mean(0).sqrt()).numpy())
    return np.stack(covers).astype(np.float32)


def low_point(curves: Float[Tensor, "n f e"]) -> Float[Tensor, "n f"]:
    """Where each curve is lowest, degrees: of the parabola through its lowest point and the two beside it."""
    at = curves.argmin(2, keepdim=True)
    middle = at.clamp(1, curves.shape[2] - 2)
    before, here, after = (curves.gather(2, middle + step)[..., 0] for step in (-1, 0, 1))
    bend = (before + after - 2 * here).clamp_min(1e-9)
    shift = (0.5 * (before - after) / bend).clamp(-1, 1)
    step = float(HEIGHTS[1] - HEIGHTS[0])
    inside = (at == middle)[..., 0]
    return torch.where(inside, middle[..., 0] + shift, at[..., 0].to(shift.dtype)) * step + float(HEIGHTS[0])


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
