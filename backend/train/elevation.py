"""Trains the elevation regressor on turntables of procedural objects (IM-3D, appendix A.1): `kiln train elevation`.

Elevation uniform in 0 to 45 degrees, as the paper's. The paper learns from 100,000 renders of real assets; to carry over from
simple shapes to others, these turntables vary in what does not tell the elevation: field of view, framing, colours, light, proportions, a
third of the objects tipped over, cameras a little off their places, and frames that disagree as generated ones do.

In the output folder: model.safetensors, checkpoint.safetensors (a run that was stopped goes on from it), log.jsonl, samples.png.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from pathlib import Path

import numba
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from backend.nets.elevation import FILE, FOVS, FRAMES, HEIGHTS, RANGE, SIDE, Elevation, mirrored, over_the_turn, silhouettes
from backend.progress import Progress, silent
from backend.train.objects import HELD_OUT, Object, make
from backend.train.turntables import picture
from backend.views.cameras import look_at
from backend.views.coherence import unexplained
from protocol.errors import KilnError

STORED = 8  # frames of each training turntable, of which the network sees some
LENSES = 25.0, 60.0  # degrees
TIPPED = 0.33  # share of the objects that do not stand as they were made
CHECKPOINT, LOG, SAMPLES, DATA = "checkpoint.safetensors", "log.jsonl", "samples.png", "turntables.npz"


@dataclasses.dataclass(frozen=True)
class Settings:
    """turntables: in the training set, one object each. weighed: of these, the ones on which the two guesses are weighed. looks: how
    often each of a turntable's two sets of four frames is varied. steps,
    batch: of the optimisation. rate: the highest, AdamW's. seed: of everything. report: steps between lines of the log, each with the
    error on held-out families, and checkpoints. measured: objects of held-out families."""

    turntables: int = 1600
    weighed: int = 150
    looks: int = 2
    steps: int = 1600
    batch: int = 32
    rate: float = 4e-3
    seed: int = 1
    report: int = 100
    measured: int = 32


def turn_of(thing: Object, elevation: float, views: int, rng: np.random.Generator, exact: bool = False) -> UInt8[np.ndarray, "k s s 4"]:
    """A turn around the object by cameras that are, unless `exact`, a little off their places: colours on white and coverage."""
    fov = rng.uniform(*LENSES)
    distance = 1 / math.sin(math.radians(fov / 2))
    sway, lean = (0.0, 0.0) if exact else (rng.uniform(0, 4), rng.uniform(0, 1.5))
    start, frames = rng.uniform(0, 360), np.empty((views, SIDE, SIDE, 4), np.uint8)
    for view in range(views):
        turn = math.radians(start + 360 * view / views + rng.normal() * sway)
        rise = math.radians(elevation + rng.normal() * lean)
        eye = distance * np.array([math.cos(rise) * math.sin(turn), -math.cos(rise) * math.cos(turn), math.sin(rise)])
        color, cover = picture(thing, look_at(eye, (0, 0, 0), SIDE, math.radians(fov)), supersample=2)
        frames[view] = (np.dstack([color, cover]) * 255 + 0.5).astype(np.uint8)
    return frames


def deformed(thing: Object, rng: np.random.Generator) -> Object:
    """Other proportions, and for some another pose: tipped over by any angle."""
    places = thing.vertices.astype(np.float64) * rng.uniform(0.65, 1.5, 3)
    if rng.random() < TIPPED:
        axis = rng.normal(size=3)
        axis /= np.linalg.norm(axis)
        angle = rng.uniform(0, math.pi)
        cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
        places = places @ (np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross).T  # Rodrigues
    places -= (places.min(0) + places.max(0)) / 2
    places *= rng.uniform(0.8, 0.97) / np.linalg.norm(places, axis=1).max()
    return dataclasses.replace(thing, vertices=places.astype(np.float32))


def turntables(count: int, seed: int, progress: Progress = silent) -> tuple[UInt8[np.ndarray, "n k s s 4"], Float[np.ndarray, "n"]]:
    """For training: `count` objects of the training families, each with a turn of STORED frames and its elevation in degrees."""
    frames, heights = np.empty((count, STORED, SIDE, SIDE, 4), np.uint8), np.empty(count, np.float32)
    for number in range(count):
        if number % 20 == 0:
            progress(number / count, f"turntable {number} of {count}")
        rng = np.random.default_rng([seed, 41, number])
        heights[number] = rng.uniform(*RANGE)
        frames[number] = turn_of(deformed(make(seed * 1_000_003 + number), rng), float(heights[number]), STORED, rng)
    return frames, heights


def held_out(count: int, seed: int, views: int = 16) -> tuple[UInt8[np.ndarray, "n k s s 4"], Float[np.ndarray, "n"], np.ndarray]:
    """For measuring: exact turns of objects as they are made, of the families that nothing is trained on; elevations; families."""
    frames, heights = np.empty((count, views, SIDE, SIDE, 4), np.uint8), np.empty(count, np.float32)
    families = np.array([HELD_OUT[number % len(HELD_OUT)] for number in range(count)])
    for number in range(count):
        rng = np.random.default_rng([seed, 43, number])
        heights[number] = rng.uniform(*RANGE)
        frames[number] = turn_of(make(seed + number, int(families[number])), float(heights[number]), views, rng, exact=True)
    return frames, heights, families


def on_white(frames: UInt8[np.ndarray, "... 4"]) -> Float[Tensor, "... 3 s s"]:
    """The stored colours, which are on white, channels first."""
    return torch.from_numpy(frames[..., :3]).movedim(-1, -3).float() / 255


def varied(frames: UInt8[np.ndarray, "n k s s 4"], draws: torch.Generator) -> Float[Tensor, "n k 3 s s"]:
    """What a batch of turns looks like to the network: framed, coloured and spoiled by chance."""
    count, views = frames.shape[:2]

    def draw(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=draws)

    stored = torch.from_numpy(frames).movedim(-1, 2).float() / 255
    # one framing for the turn, and a little for each frame
    zoom = draw(0.85, 1.3, count, 1).expand(-1, views) * (1 + 0.015 * torch.randn(count, views, generator=draws))
    shift = draw(-0.1, 0.1, count, 1, 2) + 0.015 * torch.randn(count, views, 2, generator=draws)
    flip = torch.where(torch.rand(count, 1, generator=draws) < 0.5, -1.0, 1.0).expand(-1, views)
    roll = 0.01 * torch.randn(count, views, generator=draws)
    matrix = torch.stack([torch.stack([flip * zoom, roll, shift[..., 0]], -1), torch.stack([-roll, zoom, shift[..., 1]], -1)], -2)
    grid = F.affine_grid(matrix.flatten(0, 1), [count * views, 4, SIDE, SIDE], align_corners=False)
    # coverage and how much darker than white, both 0 outside
    stored = torch.cat([1 - stored[:, :, :3], stored[:, :, 3:]], 2)
    moved = F.grid_sample(stored.flatten(0, 1), grid, padding_mode="zeros", align_corners=False).unflatten(0, (count, views))
    cover = moved[:, :, 3:].clamp(0, 1)
    color = ((1 - moved[:, :, :3]) - (1 - cover)) / cover.clamp_min(1e-2)
    order = torch.stack([torch.randperm(3, generator=draws) for _ in range(count)])[:, None, :, None, None].expand_as(color)
    color = color.clamp(0, 1).gather(2, order)
    grey = color.mean(2, keepdim=True)
    color = grey + (color - grey) * draw(0, 1.3, count, 1, 1, 1, 1)
    color = color.clamp(0, 1) ** torch.exp(draw(-0.6, 0.6, count, 1, 1, 1, 1))
    color = color * draw(0.5, 1.1, count, 1, 1, 1, 1) * (1 + 0.06 * torch.randn(count, views, 3, 1, 1, generator=draws))
    behind = torch.ones_like(color)
    other = torch.rand(count, 1, 1, 1, 1, generator=draws) < 0.1
    behind = torch.where(other, draw(0, 1, count, 1, 3, 1, 1).expand_as(color), behind)
    seen = color.clamp(0, 1) * cover + behind * (1 - cover)
    wave = F.interpolate(torch.randn(count * views, 3, 5, 5, generator=draws), size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    seen = seen + wave.unflatten(0, (count, views)) * cover * draw(0, 0.08, count, 1, 1, 1, 1)
    seen = seen + torch.randn(seen.shape, generator=draws) * draw(0, 0.04, count, 1, 1, 1, 1)
    soft = F.avg_pool2d(seen.flatten(0, 1), 3, stride=1, padding=1, count_include_pad=False).unflatten(0, (count, views))
    return torch.lerp(seen, soft, draw(0, 0.8, count, 1, 1, 1, 1)).clamp(0, 1)


def maps_of(frames: UInt8[np.ndarray, "n k s s 4"], looks: int, seed: int, progress: Progress = silent) -> tuple[Tensor, Tensor]:
    """What the network reads of every set of four frames, varied `looks` times, float16, and which turn each is of."""
    found, turn, batch = [], [], 25
    for start in range(0, len(frames), batch):
        draws = torch.Generator().manual_seed(seed * 1_000_003 + start)
        part = frames[start : start + batch]
        for look in range(2 * looks):
            progress(start / len(frames), f"turn {start} of {len(frames)}")
            found.append(over_the_turn(varied(part[:, look % 2 :: STORED // FRAMES], draws)).half())
            turn.append(torch.arange(start, start + len(part)))
    return torch.cat(found), torch.cat(turn)


def curves_of(frames: UInt8[np.ndarray, "n k s s 4"], progress: Progress = silent) -> Float[Tensor, "n f e"]:
    """How well the silhouettes of each turn fit together, for each field of view and height."""
    found = np.empty((len(frames), len(FOVS), len(HEIGHTS)), np.float32)
    turn = np.arange(frames.shape[1]) * 360.0 / frames.shape[1]
    for number, part in enumerate(frames):
        progress(number / len(frames), f"silhouettes of turn {number} of {len(frames)}")
        cover = silhouettes(on_white(part))
        for lens, fov in enumerate(FOVS):
            found[number, lens] = unexplained(cover, turn, HEIGHTS, fov)
    return torch.from_numpy(found)


def pictured(net: Elevation, frames: UInt8[np.ndarray, "n k s s 4"]) -> Float[Tensor, "n"]:
    """What the pictures alone say: the mean over sets of four and mirror images."""
    seen, every = on_white(frames), frames.shape[1] // FRAMES
    found = []
    with torch.inference_mode():
        for start in range(every):
            maps = over_the_turn(seen[:, start::every][:, :FRAMES])
            found += [net.read(maps), net.read(mirrored(maps))]
    return torch.stack(found).mean(0).clamp(*RANGE)


def weigh(
    net: Elevation, frames: UInt8[np.ndarray, "n k s s 4"], heights: Float[np.ndarray, "n"], seed: int, progress: Progress = silent
) -> None:
    """Trains the perceptron that weighs the two guesses, on turns of eight and of four frames."""
    torch.manual_seed(seed)
    net.eval()
    sets = [frames, frames[:, ::2]]
    curves = torch.cat(
        [curves_of(part, lambda share, text="", preview=None, n=n: progress((n + share) / 2, text)) for n, part in enumerate(sets)]
    )
    # Objects that the convolutions have learnt from look easier than new ones will: their guess is made as unsure as it was found to be.
    seen = torch.cat([pictured(net, part) for part in sets])
    truth = torch.from_numpy(heights).repeat(2)
    optimiser = torch.optim.AdamW(net.weigh.parameters(), lr=3e-3, weight_decay=3e-2)
    for _ in range(600):
        spoiled = (curves + 0.003 * torch.randn(len(curves), 1, 1) * torch.rand(curves.shape)).clamp_min(0)
        loss = (net(spoiled, (seen + 3 * torch.randn(seen.shape)).clamp(*RANGE)) - truth).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def moved(maps: Tensor, draws: torch.Generator) -> Tensor:
    """Mirrored half the time, and shifted by up to two places."""
    down, across = torch.randint(-2, 3, (2,), generator=draws).tolist()
    maps = torch.roll(maps, (down, across), (2, 3))
    return mirrored(maps) if torch.rand(1, generator=draws) < 0.5 else maps


def train(out: Path, p: Settings | None = None, spread: bool = True, progress: Progress = silent) -> float:
    """Trains into the folder `out`, going on from a checkpoint of the same settings there, and returns the mean error in degrees on
    objects of the held-out families. Deterministic for a given number of threads."""
    p = p or Settings()
    if min(p.turntables, p.looks, p.steps, p.batch, p.report) < 1:
        raise KilnError(
            "bad-parameter", f"Nothing is learnt from {p.turntables} turntables in {p.steps} steps.", "Give at least one of each."
        )
    out.mkdir(parents=True, exist_ok=True)
    numba.set_num_threads(1)  # pictures this small are drawn faster by one
    torch.manual_seed(p.seed)
    net = Elevation(spread=spread)
    optimiser = torch.optim.AdamW(net.parameters(), lr=p.rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, p.rate, total_steps=p.steps + 1, pct_start=0.1)
    told = json.dumps({**dataclasses.asdict(p), "spread": spread})
    begun = _resume(out / CHECKPOINT, told, net, optimiser, schedule)
    frames, heights = _data(out / DATA, p, lambda share, text="", preview=None: progress(0.2 * share, text))
    maps, turn = maps_of(frames, p.looks, p.seed, lambda share, text="", preview=None: progress(0.2 + 0.2 * share, text))
    test_frames, test_heights, _ = held_out(p.measured, 90_000_000, STORED)
    truth = torch.from_numpy(heights)[turn]
    net.train()
    running = 0.0
    for step in range(begun, p.steps):
        draws = torch.Generator().manual_seed(p.seed * 1_000_003 + step)
        torch.manual_seed(p.seed * 1_000_003 + step)  # what is dropped out: a run that goes on draws as one that was never stopped
        picked = torch.randint(len(maps), (p.batch,), generator=draws)
        loss = (net.read(moved(maps[picked].float(), draws)) - truth[picked]).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 100.0)
        optimiser.step()
        schedule.step()
        running += float(loss.detach()) / p.report
        progress(0.4 + 0.5 * step / p.steps, f"step {step} of {p.steps}")
        if (step + 1) % p.report == 0 or step + 1 == p.steps:
            net.eval()
            error = float(np.abs(pictured(net, test_frames).numpy() - test_heights).mean())
            net.train()
            line = json.dumps({"step": step + 1, "training": round(running, 3), "held_out": round(error, 3)})
            with (out / LOG).open("a", encoding="utf-8") as log:
                log.write(line + "\n")
            progress(0.4 + 0.5 * step / p.steps, line)
            _save(out / CHECKPOINT, told, net, optimiser, step + 1)
            _sheet(out / SAMPLES, test_frames)
            running = 0.0
    weigh(
        net,
        frames[: p.weighed],
        heights[: p.weighed],
        p.seed,
        progress=lambda share, text="", preview=None: progress(0.9 + 0.1 * share, text),
    )
    weights = {name: values.detach().half().contiguous() for name, values in net.state_dict().items()}
    save_file(weights, out / FILE, metadata={"licence": "CC0-1.0", "settings": told})
    with torch.inference_mode():
        found = net(curves_of(test_frames), pictured(net, test_frames)).clamp(*RANGE).numpy()
    return float(np.abs(found - test_heights).mean())


def _data(path: Path, p: Settings, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """The training turntables, from the file that an earlier run left, if it was made for the same settings."""
    if path.exists():
        with np.load(path, allow_pickle=False) as stored:
            if stored["made_for"].tolist() == [p.turntables, p.seed]:
                return stored["frames"], stored["heights"]
    frames, heights = turntables(p.turntables, p.seed, progress)
    unfinished = path.with_suffix(".new.npz")
    np.savez(unfinished, frames=frames, heights=heights, made_for=np.array([p.turntables, p.seed]))
    os.replace(unfinished, path)
    return frames, heights


def _save(path: Path, told: str, net: Elevation, optimiser: torch.optim.Optimizer, step: int) -> None:
    tensors = {f"net.{name}": values for name, values in net.state_dict().items()}
    for number, state in optimiser.state_dict()["state"].items():
        tensors.update({f"optimiser.{number}.{name}": torch.as_tensor(values) for name, values in state.items()})
    unfinished = path.with_suffix(".new")
    save_file({name: values.contiguous() for name, values in tensors.items()}, unfinished, metadata={"settings": told, "step": str(step)})
    os.replace(unfinished, path)


def _resume(path: Path, told: str, net: Elevation, optimiser: torch.optim.Optimizer, schedule) -> int:
    """The step to go on from: 0 where there is no checkpoint."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        about = file.metadata()
        if about.get("settings") != told:
            raise KilnError(
                "bad-input",
                f"{path.parent} holds a run with other settings.",
                "Give another --out, or the settings it was begun with.",
            )
        stored = {name: file.get_tensor(name) for name in file.keys()}
    net.load_state_dict({name[4:]: values for name, values in stored.items() if name.startswith("net.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, values in stored.items():
        if name.startswith("optimiser."):
            _, number, key = name.split(".", 2)
            state.setdefault(int(number), {})[key] = values
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    step = int(about["step"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the optimiser's steps lie in the run before
        for _ in range(step):
            schedule.step()
    return step


def _sheet(path: Path, frames: UInt8[np.ndarray, "n k s s 4"], rows: int = 8) -> None:
    """Some of the turns that the error is measured on."""
    Image.fromarray(np.concatenate([np.concatenate(list(turn[..., :3]), 1) for turn in frames[:rows]], 0)).save(path)
