"""How well kiln-tiny-turntable turns objects it never saw: PSNR and overlap of silhouettes of generated views against true ones, the input
view left out, beside two baselines that know nothing of turning: the input view again, and the mean view of that azimuth.

    python -m benchmarks.bench_tiny_turntable [--objects 24] [--steps 20] [--model FOLDER] [--sheet FILE.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline

from backend import weights
from backend.diffusion.wan import SPECS, WanTurntable
from backend.train import objects, tiny, turntables
from backend.train.lora import sheet

SHADE = 0.95  # below it in any band a pixel of a picture on white belongs to the object


def scores(made: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """PSNR in dB and overlap of silhouettes, of views but the first, averaged over views."""
    error = ((made - true)[1:] ** 2).mean((1, 2, 3))
    ours, theirs = made[1:].min(-1) < SHADE, true[1:].min(-1) < SHADE
    overlap = (ours & theirs).sum((1, 2)) / np.maximum((ours | theirs).sum((1, 2)), 1)
    return float((-10 * np.log10(np.maximum(error, 1e-10))).mean()), float(overlap.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=24, help="of families it was trained on, and as many of others")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model", type=Path, default=weights.SHIPPED / tiny.ID)
    parser.add_argument("--sheet", type=Path, help="picture of the first objects: true above, generated below")
    given = parser.parse_args()
    torch.set_num_threads(1)
    pipe = WanImageToVideoPipeline.from_pretrained(given.model, local_files_only=True, dtype=torch.float32)
    generator = WanTurntable(tiny.ID, pipe, SPECS[tiny.ID], previews=False)
    mean = np.mean([turntables.example(seed) for seed in range(200)], 0)
    rows = []
    print("| objects | PSNR | input again | mean object | silhouettes | input again | mean object |\n|---|---|---|---|---|---|---|")
    for name, families in (("trained families", [None]), ("held-out families", objects.HELD_OUT)):
        found = []
        for k in range(given.objects):
            true = turntables.example(tiny.HELD_OUT + k, families[k % len(families)])
            picture = np.concatenate([true[0], np.ones((*true.shape[1:3], 1), np.float32)], 2)
            made = generator.generate(picture, "", None, given.steps, 1.0, k)[: len(true)]
            found.append([*scores(made, true), *scores(np.broadcast_to(true[:1], true.shape), true), *scores(mean, true)])
            if k < 8:
                rows += [true, made]
        psnr, overlap, *others = np.mean(found, 0)
        cells = [f"{given.objects} of {name}", *(f"{v:.2f}" for v in (psnr, *others[::2])), *(f"{v:.3f}" for v in (overlap, *others[1::2]))]
        print("| " + " | ".join(cells) + " |")
    if given.sheet:
        sheet(rows, given.sheet)


if __name__ == "__main__":
    main()
