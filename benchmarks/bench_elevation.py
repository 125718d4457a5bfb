# environment: backend
"""How well the elevation of a turntable is guessed from its pictures: mean error in degrees, against a constant guess.

    python build.py bench elevation [--objects 200] [--assets FOLDER]

Measured on objects of families that were held out of the training, by family; on the training families with objects that were not in it;
with 4 and 16 frames; with frames that disagree; and on the .glb files of FOLDER at ten elevations each, drawn by our own rasteriser.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numba
import numpy as np
import torch
import trimesh
from PIL import Image

from backend.nets.elevation import SIDE, estimate
from backend.train.elevation import held_out, turn_of, varied
from backend.train.objects import FAMILIES, TRAINING, Object, make
from backend.train.turntables import turntable

HEIGHTS = np.arange(0.0, 46.0, 5.0)
LONGEST = 0.06  # of a triangle's edges, so that colours at corners are as good as a texture in pictures of 64 pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--objects", type=int, default=200)
    parser.add_argument("--assets", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    numba.set_num_threads(1)

    frames, heights, families = held_out(given.objects, 1000)
    print(f"constant guess of 22.5 degrees: {np.abs(heights - 22.5).mean():.2f} (11.25 over all elevations)\n")
    print("| objects | frames | mean error | median | 90% below | bias |\n|---|---|---|---|---|---|")
    off = guessed(frames) - heights
    row(f"{len(heights)} of held-out families", 16, off)
    for family in np.unique(families):
        row(f"- {FAMILIES[family][0]}", 16, off[families == family])
    few = given.objects // 4
    row(f"{few} of these", 4, guessed(frames[:few, ::4]) - heights[:few])
    spoiled = varied(frames[:few, ::2], torch.Generator().manual_seed(0)).movedim(2, -1).numpy()
    row(f"{few} of these, frames spoiled as in training", 8, np.array([estimate(turn) for turn in spoiled]) - heights[:few])
    seen, truth = [], []
    for number in range(few):
        rng = np.random.default_rng([2000, number])
        truth.append(rng.uniform(0, 45))
        seen.append(turn_of(make(3_000_000 + number, int(TRAINING[number % len(TRAINING)])), truth[-1], 16, rng, exact=True))
    row(f"{few} new ones of the training families", 16, guessed(np.stack(seen)) - np.array(truth))

    if given.assets:
        print(
            "\n| asset | mean error | " + " | ".join(f"{height:.0f}" for height in HEIGHTS) + " |\n|---|---" + "|---" * len(HEIGHTS) + "|"
        )
        errors = []
        for path in sorted(given.assets.glob("*.glb")):
            thing = asset(path)
            found = np.array([estimate(turntable(thing, float(height), SIDE)[0]) for height in HEIGHTS])
            errors.append(np.abs(found - HEIGHTS).mean())
            guesses = " | ".join(f"{one:.0f}" for one in found)
            print(f"| {path.stem} | {errors[-1]:.2f} | {guesses} |", flush=True)
        print(f"\nmean over the assets: {np.mean(errors):.2f}")


def guessed(frames: np.ndarray) -> np.ndarray:
    return np.array([estimate(turn[..., :3].astype(np.float32) / 255) for turn in frames])


def row(name: str, views: int, off: np.ndarray) -> None:
    size = np.abs(off)
    print(
        f"| {name} | {views} | {size.mean():.2f} | {np.median(size):.2f} | {np.quantile(size, 0.9):.1f} | {off.mean():+.1f} |", flush=True
    )


def asset(path: Path) -> Object:
    """A glTF asset with its base colour at the corners of small triangles, lit by a sky, front to -Y, inside the unit sphere."""
    corners, colors = [], []
    scene = trimesh.load(path, force="scene")
    for mesh in scene.dump():
        triangles = np.asarray(mesh.triangles, np.float64)
        uv = getattr(mesh.visual, "uv", None)
        places = np.zeros((*triangles.shape[:2], 2)) if uv is None else np.asarray(uv)[mesh.faces]
        corners.append(triangles)
        colors.append((places, mesh.visual.material))
    everything = np.concatenate(corners).reshape(-1, 3)
    centre = (everything.min(0) + everything.max(0)) / 2
    scale = 0.95 / np.linalg.norm(everything - centre, axis=1).max()
    vertices, paint = [], []
    for triangles, (places, material) in zip(corners, colors, strict=True):
        triangles, places = split((triangles - centre) * scale, places)
        vertices.append(triangles.reshape(-1, 3)[:, [0, 2, 1]] * (1, -1, 1))  # Y up to Z up
        paint.append(base_color(material, places.reshape(-1, 2)))
    points = np.concatenate(vertices)
    faces = np.arange(len(points)).reshape(-1, 3)
    corner = points[faces]
    normal = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    up = np.repeat(normal[:, 2] / np.maximum(np.linalg.norm(normal, axis=1), 1e-12), 3)
    lit = np.concatenate(paint) * (0.8 + 0.2 * up)[:, None]
    return Object(points.astype(np.float32), faces.astype(np.int32), lit.clip(0, 1).astype(np.float32), -1)


def split(triangles: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Triangles [n 3 3] with texture coordinates [n 3 2], halved across their longest edges until these are short."""
    done = []
    both = np.concatenate([triangles, places], 2)
    while len(both):
        edge = np.linalg.norm((both - np.roll(both, -1, 1))[..., :3], axis=2)
        longest = edge.argmax(1)
        short = edge.max(1) < LONGEST
        done.append(both[short])
        both, longest = both[~short], longest[~short]
        order = (longest[:, None] + np.arange(3)) % 3
        a, b, c = np.take_along_axis(both, order[..., None], 1).swapaxes(0, 1)
        middle = (a + b) / 2
        both = np.concatenate([np.stack([a, middle, c], 1), np.stack([middle, b, c], 1)])
    found = np.concatenate(done)
    return found[..., :3], found[..., 3:]


def base_color(material, places: np.ndarray) -> np.ndarray:
    factor = np.ones(3) if material.baseColorFactor is None else np.asarray(material.baseColorFactor[:3]) / 255
    if material.baseColorTexture is None:
        return np.broadcast_to(factor, (len(places), 3))
    texture = np.asarray(material.baseColorTexture.convert("RGB").resize((256, 256), Image.Resampling.BOX), np.float64) / 255
    x, y = (places % 1 * (256, -256) + (0, 256)).astype(int).clip(0, 255).T
    return texture[y, x] * factor


if __name__ == "__main__":
    main()
