"""The loop of `im3d` (IM-3D, section 3.4): does one round through the generator make the views agree, and the asset better?

Procedural objects that `kiln-tiny-turntable` never saw: a turntable of each is generated from one picture and fitted, once without and once
with a round of refinement, in the same number of steps. Agreement: mean PSNR of the splats against the views that they were fitted to last.
Held out: PSNR on white and GMSD (0 is best) of the splats against true pictures between those views.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from backend import weights
from backend.diffusion import wan
from backend.diffusion.matte import matte
from backend.diffusion.turntable import generate, refine
from backend.mesh.measure import psnr
from backend.pipelines.asset import coded
from backend.pipelines.im3d import agree, as_views, drawn, parts
from backend.splats.fit_images import fit_images
from backend.splats.model import Splats
from backend.train import objects, turntables
from backend.views.orbit import Orbit
from backend.views.picture import Picture
from benchmarks.bench_im3d_fit import gmsd
from protocol import recipes

MODEL = "kiln-tiny-turntable"
FIRST = 900_000  # seeds from here on are no training data
SIZE = 64


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--objects", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--strength", type=float, default=recipes.Iterate().strength)
    parser.add_argument("--steps", type=int, help="of denoising in a round; default: the model's own")
    parser.add_argument("--model", type=Path, help="a folder as diffusers writes it, in place of the shipped one; it is called as that is")
    parser.add_argument("--sheet", type=Path, help="where to put a picture of the first objects")
    given = parser.parse_args(arguments)
    if given.steps:
        wan.SPECS[MODEL] = replace(wan.SPECS[MODEL], again=given.steps)
    if given.model:
        weights.SHIPPED = given.model.absolute().parent
    rows, pictures = [], []
    print("| object | family | agreement without | with a round | held out without | with | GMSD without | with |\n" + "|---" * 8 + "|")
    for number in range(given.objects):
        seed = FIRST + number
        family = (objects.HELD_OUT if number % 4 == 3 else objects.TRAINING)[
            number % 4 if number % 4 == 3 else number % len(objects.TRAINING)
        ]
        row, shown = loop(seed, family, given.iterations, given.strength)
        rows.append(row)
        pictures.append(shown)
        held_out = " (held out)" if family in objects.HELD_OUT else ""
        print(f"| {seed} | {family}{held_out} | " + " | ".join(f"{value:.3f}" for value in row) + " |", flush=True)
    mean = np.mean(rows, 0)
    print("| **mean** | | " + " | ".join(f"{value:.3f}" for value in mean) + " |")
    table = np.array(rows)
    for name, before, after, sign in (("agreement", 0, 1, 1), ("held-out PSNR", 2, 3, 1), ("held-out GMSD", 4, 5, -1)):
        print(f"{name}: better in {int((sign * (table[:, after] - table[:, before]) > 0).sum())} of {len(rows)}")
    if given.sheet:
        Image.fromarray(coded(np.concatenate(pictures[:8]))).save(given.sheet)


def loop(seed: int, family: int, iterations: int, strength: float) -> tuple[list[float], np.ndarray]:
    """The row of the table, and a picture: generated views, splats without, refined views, splats with, the truth; four views each."""
    thing = objects.make(seed, family)
    elevation = float(np.random.default_rng(seed).uniform(*turntables.ELEVATIONS))
    p = recipes.Im3d(generate=recipes.Generate(model=MODEL), fit=recipes.FitImages(iterations=iterations, splats=5000))
    color, alpha = turntables.picture(thing, Orbit.turn(1, elevation, turntables.FOV).cameras(4 * SIZE)[0])
    picture = Picture(np.dstack([color, alpha]).astype(np.float32))
    turn = generate(picture.rgba, p.generate, seed)
    orbit = Orbit.turn(len(turn.frames), elevation, turntables.FOV)
    first = as_views(turn.frames, matte(turn.frames, "border"), orbit, picture)

    without, _ = fit_images(first, p.fit, seed, None, iterations, None)
    before, after = parts(iterations, 1)
    splats, _ = fit_images(first, p.fit, seed, None, before, None)
    again = refine(
        turn,
        drawn(splats, turn.path(orbit).cameras(SIZE)),
        picture.rgba,
        p.generate,
        strength,
        max(p.iterate.steps, wan.SPECS[MODEL].again),
        seed + 1,
    )
    second = as_views(again.frames, matte(again.frames, "border"), orbit, picture)
    refined, _ = fit_images(second, p.fit, seed, splats, after, None)

    step = 360 / len(turn.frames)
    between = replace(orbit, azimuths=orbit.azimuths + step / 2).cameras(SIZE)
    truth = np.stack([turntables.picture(thing, camera)[0] for camera in between])
    row = [agree(without, first), agree(refined, second)]
    row += [held_out(one, between, truth)[0] for one in (without, refined)]
    row += [held_out(one, between, truth)[1] for one in (without, refined)]
    places = [2, 5, 8, 12]
    shown = [turn.frames[places], drawn(without, between)[places], again.frames[places], drawn(refined, between)[places], truth[places]]
    return row, np.concatenate([np.concatenate(list(part), 1) for part in shown], 1)


def held_out(splats: Splats, cameras: list, truth: np.ndarray) -> tuple[float, float]:
    renders = drawn(splats, cameras)
    pairs = list(zip(renders, truth, strict=True))
    return float(np.mean([psnr(*pair) for pair in pairs])), float(np.mean([gmsd(*pair) for pair in pairs]))


if __name__ == "__main__":
    main()
