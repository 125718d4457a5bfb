"""Trains the feature networks: `python -m backend.train.features --out FOLDER`, two minutes on one core.

Two tasks. "shape": from a picture that was blurred and made noisy in places, tell at each place the surface's normal, its depth, what is
subject, the colour before the damage, and the damage. Features that can say all that see edges, shading, texture and sharpness. That is the
network `kiln-features` that comes with Kiln. "instance": tell which of many pictures another crop of it in other light belongs to
(instance discrimination by a contrastive loss; van den Oord et al. 2018, arXiv 1807.03748) and what kind of object it shows: another
network from other pictures by another task, for measuring what was optimised against the first.

All pictures are renders of the procedural objects in objects.py, with noise of many scales multiplied in as texture.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numba
import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from backend.mesh.raster import corner_weights, project, z_buffer
from backend.nets.features import FILE, FOLDER, WIDTHS, Features
from backend.progress import Progress, silent
from backend.train.objects import FAMILIES, TRAINING, Object, make
from backend.views.cameras import look_at

SIDE, CROP = 88, 64  # pixels of the stored renders, and of what the network sees
VIEWS = 4  # of each object
BLUR, NOISE = 2.5, 0.12  # the strongest damage: pixels and sRGB, standard deviations
MEASURE_WIDTHS = (12, 24, 48, 96, 128)
LEVEL_NAMES = ("normal", "depth", "cover", "color", "damage")
WEIGHTS = {"normal": 1.0, "depth": 1.0, "cover": 0.5, "color": 3.0, "damage": 1.0}  # of the losses, so that each matters


def render(thing: Object, azimuth: float, elevation: float, fov: float, reach: float, size: int) -> Float[np.ndarray, "s s 8"]:
    """sRGB (3), coverage, normals in the camera's axes (3) and depth less the distance of the object's centre; 0 where nothing is. Degrees.
    reach: 1 just holds the unit sphere, less comes nearer."""
    distance, turn, rise = reach / math.sin(math.radians(fov / 2)), math.radians(azimuth), math.radians(elevation)
    eye = distance * np.array([math.cos(rise) * math.sin(turn), -math.cos(rise) * math.cos(turn), math.sin(rise)])
    camera = look_at(eye, (0, 0, 0), 2 * size, math.radians(fov))
    screen, inverse_depth = project(thing.vertices, camera)
    _, triangle = z_buffer(screen, inverse_depth, thing.faces, camera.width, camera.height)
    place = np.argwhere(triangle >= 0)
    shown = thing.faces[triangle[place[:, 0], place[:, 1]]]
    weights = corner_weights(screen, inverse_depth, shown, place).astype(np.float32)
    corners = thing.vertices[shown]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    depth = 1 / np.einsum("tk,tk->t", weights, inverse_depth[shown]) - distance
    found = np.zeros((camera.height, camera.width, 8), np.float32)
    values = [np.einsum("tkc,tk->tc", thing.colors[shown], weights), np.ones((len(place), 1)), normal @ camera.camera_from_world[:3, :3].T]
    found[place[:, 0], place[:, 1]] = np.concatenate([*values, depth[:, None]], 1)
    return found.reshape(size, 2, size, 2, 8).mean((1, 3))  # colours multiplied by coverage


def renders(count: int, seed: int, progress: Progress = silent) -> tuple[Tensor, Tensor]:
    """`count` renders [n 8 s s] as float16, VIEWS of each object from all sides, and each one's family."""
    stored, families = torch.empty((count, 8, SIDE, SIDE), dtype=torch.float16), torch.empty(count, dtype=torch.long)
    rng = np.random.default_rng([seed, 31])
    thing = make(seed)
    for number in range(count):
        if number % VIEWS == 0:
            progress(number / count, f"picture {number} of {count}")
            thing = make(seed * 1_000_003 + number)
        picture = render(thing, rng.uniform(0, 360), rng.uniform(-15, 60), rng.uniform(25, 60), rng.choice([1.0, 1.0, 0.75, 0.55]), SIDE)
        stored[number] = torch.from_numpy(picture.transpose(2, 0, 1)).half()
        families[number] = thing.family
    return stored, families


def noise(count: int, channels: int, size: int, draws: torch.Generator) -> Tensor:
    """Noise with a random mix of scales, about unit variance."""
    total = torch.zeros(count, channels, size, size)
    for cells in (3, 6, 12, 24, size):
        grid = torch.randn(count, channels, cells, cells, generator=draws)
        layer = grid if cells == size else F.interpolate(grid, size=(size, size), mode="bicubic", align_corners=False)
        total += layer * torch.rand(count, 1, 1, 1, generator=draws) ** 2
    return total / total.std((1, 2, 3), keepdim=True).clamp_min(1e-3)


def crops(stored: Tensor, picked: Tensor, draws: torch.Generator, upright: bool = True) -> Tensor:
    """The picked renders [n 8 c c], each moved, scaled, mirrored and, if not `upright`, turned by chance."""
    count = len(picked)
    zoom = 1 + 0.45 * torch.rand(count, generator=draws)
    turn = (torch.rand(count, generator=draws) - 0.5) * (0.2 if upright else 1.0)
    flip = torch.where(torch.rand(count, generator=draws) < 0.5, -1.0, 1.0)
    shift = (torch.rand(count, 2, generator=draws) - 0.5) * 0.5
    row = torch.stack([turn.cos() * flip / zoom, -turn.sin() / zoom, shift[:, 0]], 1)
    other = torch.stack([turn.sin() * flip / zoom, turn.cos() / zoom, shift[:, 1]], 1)
    grid = F.affine_grid(torch.stack([row, other], 1), [count, 8, CROP, CROP], align_corners=False)
    cut = F.grid_sample(stored[picked].float(), grid, padding_mode="zeros", align_corners=False)
    # What mirrors and turns the picture does so to the normals in it.
    across, down = cut[:, 4].clone(), cut[:, 5].clone()
    c, s, f = turn.cos()[:, None, None], turn.sin()[:, None, None], flip[:, None, None]
    cut[:, 4], cut[:, 5] = f * (c * across + s * down), -s * across + c * down
    return cut


def dressed(cut: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures [n 3 c c] of crops: texture on the subject, its colours and the light changed, a background behind; and coverage."""
    count = len(cut)

    def draw(low, high, channels=1):
        return low + (high - low) * torch.rand(count, channels, 1, 1, generator=draws)

    cover = cut[:, 3:4].clamp(0, 1)
    color = cut[:, :3] / cover.clamp_min(1e-2)
    texture = noise(count, 3, CROP, draws)
    grey = texture[:, :1].expand(-1, 3, -1, -1)
    texture = torch.where(draw(0, 1) < 0.5, grey, texture)
    color = color * (1 + texture * draw(-0.1, 0.35).clamp_min(0))
    color = (color * draw(0.6, 1.2) * draw(0.85, 1.15, 3) + draw(-0.08, 0.08)).clamp(0, 1)
    color = color[:, torch.randperm(3, generator=draws)]
    kind = draw(0, 1)
    busy = (draw(0, 1, 3) + noise(count, 3, CROP, draws) * draw(0.02, 0.25)).clamp(0, 1)
    behind = torch.where(kind < 0.5, torch.ones_like(busy), torch.where(kind < 0.6, torch.zeros_like(busy), busy))
    behind = torch.where((kind >= 0.6) & (kind < 0.75), draw(0, 1, 3).expand_as(busy), behind)
    return color * cover + behind * (1 - cover), cover


def damaged(pictures: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Blurred and made noisy, most of them only in a part; and how much of each [n 2 c c] in shares of the strongest."""
    count = len(pictures)
    where = (noise(count, 1, CROP, draws) > 0.6 * torch.randn(count, 1, 1, 1, generator=draws)).float()
    where = torch.where(torch.rand(count, 1, 1, 1, generator=draws) < 0.3, torch.ones_like(where), where)
    sigma = torch.rand(count, generator=draws) * (torch.rand(count, generator=draws) < 0.6)
    strength = torch.rand(count, generator=draws) ** 2 * (torch.rand(count, generator=draws) < 0.5)
    across = torch.arange(-7, 8.0)
    kernel = torch.exp(-0.5 * (across / (sigma[:, None] * BLUR).clamp_min(1e-2)) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    blurred = F.pad(pictures, (7, 7, 7, 7), mode="replicate").permute(1, 0, 2, 3)
    blurred = F.conv2d(F.conv2d(blurred, kernel[:, None, None], groups=count), kernel[:, None, :, None], groups=count).permute(1, 0, 2, 3)
    amount = torch.stack([sigma, strength], 1)[:, :, None, None] * where
    mixed = pictures + (blurred - pictures) * where
    mixed = mixed + torch.randn(pictures.shape, generator=draws) * NOISE * amount[:, 1:]
    return mixed.clamp(0, 1), amount


class Shape(nn.Module):
    """What the "shape" task asks of the features, at every second pixel. Thrown away after training."""

    def __init__(self, widths: tuple[int, ...], inner: int = 40):
        super().__init__()
        self.sides = nn.ModuleList(nn.Conv2d(width, inner, 1) for width in widths[1:])
        self.fine = nn.Sequential(nn.Conv2d(inner + widths[0], inner, 3, padding=1), nn.ReLU(), nn.Conv2d(inner, 3 + 1 + 1 + 3 + 2, 1))

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        x = self.sides[-1](maps[-1])
        for side, level in zip(reversed(self.sides[:-1]), reversed(maps[1:-1]), strict=True):
            x = F.relu(F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False) + side(level))
        parts = self.fine(torch.cat([x, F.avg_pool2d(maps[0], 2)], 1)).split([3, 1, 1, 3, 2], 1)
        return dict(zip(LEVEL_NAMES, parts, strict=True))


def shape_loss(given: dict[str, Tensor], cut: Tensor, clean: Tensor, amount: Tensor) -> dict[str, Tensor]:
    """Mean errors at half the size; of normals and depth only on the subject."""
    half = F.avg_pool2d(torch.cat([cut, clean, amount], 1), 2)
    cover = half[:, 3:4].clamp(0, 1)
    solid = (cover > 0.9).float()
    share = solid.sum().clamp_min(1)
    normal, depth = half[:, 4:7] / cover.clamp_min(0.1), half[:, 7:8] / cover.clamp_min(0.1)
    return {
        "normal": (solid * (F.normalize(given["normal"], dim=1) - F.normalize(normal, dim=1)).square()).sum() / share,
        "depth": (solid * (given["depth"] - depth).abs()).sum() / share,
        "cover": F.binary_cross_entropy_with_logits(given["cover"], cover),
        "color": (given["color"] - half[:, 8:11]).abs().mean(),
        "damage": (given["damage"] - half[:, 11:13]).abs().mean(),
    }


class Instance(nn.Module):
    """What the "instance" task asks: a direction for each picture, from every level, and the family. Thrown away after training."""

    def __init__(self, widths: tuple[int, ...], inner: int = 96):
        super().__init__()
        self.places = nn.ModuleList(nn.Linear(2 * width, inner) for width in widths)
        self.family = nn.Linear(2 * widths[-1], len(FAMILIES))

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        pooled = [torch.cat([level.mean((2, 3)), level.std((2, 3))], 1) for level in maps]
        return [F.normalize(place(one), dim=1) for place, one in zip(self.places, pooled, strict=True)], self.family(pooled[-1])


def instance_loss(head: Instance, one: list[Tensor], other: list[Tensor], family: Tensor) -> dict[str, Tensor]:
    ours, kind = head(one)
    theirs, _ = head(other)
    right = torch.arange(len(family))
    told = [F.cross_entropy(a @ b.T / 0.1, right) for a, b in zip(ours, theirs, strict=True)]
    return {"same": torch.stack(told).mean(), "kind": 0.3 * F.cross_entropy(kind, family)}


def train(task: str, count: int, steps: int, batch: int, seed: int, progress: Progress = silent, log=lambda line: None) -> Features:
    """The network of a task ("shape" or "instance"), batch normalisation folded away. Deterministic for a given number of threads."""
    numba.set_num_threads(1)  # pictures this small are drawn faster by one
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)
    stored, families = renders(count, seed, lambda share, text="", preview=None: progress(0.3 * share, text))
    widths = WIDTHS if task == "shape" else MEASURE_WIDTHS
    net = Features(widths, normed=True).to(memory_format=torch.channels_last)  # a sixth faster on a CPU
    head = Shape(widths) if task == "shape" else Instance(widths)
    optimiser = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps, pct_start=0.1)
    sums: dict[str, float] = {}
    for step in range(steps):
        picked = torch.randint(count, (batch,), generator=draws)
        if task == "shape":
            cut = crops(stored, picked, draws)
            clean, _ = dressed(cut, draws)
            seen, amount = damaged(clean, draws)
            losses = shape_loss(head(net(_last(seen))), cut, clean, amount)
            loss = torch.stack([WEIGHTS[name] * value for name, value in losses.items()]).sum()
        else:
            one, other = (damaged(dressed(crops(stored, picked, draws, False), draws)[0], draws)[0] for _ in range(2))
            losses = instance_loss(head, net(_last(one)), net(_last(other)), families[picked])
            loss = torch.stack(list(losses.values())).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach()) / 50
        if (step + 1) % 50 == 0:
            log(json.dumps({"step": step + 1, **{name: round(value, 4) for name, value in sums.items()}}))
            sums = {}
        progress(0.3 + 0.7 * step / steps, f"step {step} of {steps}")
    return net.eval().folded()


def _last(pictures: Tensor) -> Tensor:
    return pictures.contiguous(memory_format=torch.channels_last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", choices=("shape", "instance"), default="shape")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=None, help="default: 1 for shape, 2 for instance")
    given = parser.parse_args()
    torch.set_num_threads(1)
    begun, last = time.time(), [0.0]

    def say(share, text="", preview=None):
        if time.time() - last[0] > 20:
            last[0] = time.time()
            print(f"{time.time() - begun:.0f} s: {100 * share:.0f}%, {text}", flush=True)

    seed = given.seed if given.seed is not None else {"shape": 1, "instance": 2}[given.task]
    net = train(given.task, given.pictures, given.steps, given.batch, seed, say, lambda line: print(line, flush=True))
    given.out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in net.state_dict().items()}
    save_file(weights, given.out / FILE, metadata={"task": given.task, "licence": "CC0-1.0", "families": str(len(TRAINING))})
    print(f"{sum(value.numel() for value in weights.values())} numbers in {given.out / FILE}", flush=True)


if __name__ == "__main__":
    main()
