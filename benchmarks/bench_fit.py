# environment: backend
"""Fits every folder of views in a folder, from the colours alone and, where the views have depth and normals, with them. Prints a table.

`build.py bench assets --keep-views DIR` leaves such folders: DIR/NAME/transforms.json and its pictures. PSNR is the mean over the held-out
(or the fitted) views, composed on black or on white. Seconds are of fitting alone, with the kernels compiled before.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from backend.splats.fit import fit
from backend.splats.model import Splats
from backend.splats.render import render
from backend.views.views import Views, load
from protocol import recipes
from protocol.errors import KilnError

COLUMNS = ("splats", "seconds", "held_out", "held_out_white", "fitted")


def main() -> None:
    parser = argparse.ArgumentParser(prog="build.py bench fit", description=__doc__)
    parser.add_argument("--views", type=Path, required=True, help="a folder of view folders, each with a transforms.json")
    parser.add_argument("--preset", default="standard")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a recipe parameter, such as fit.iterations=2000")
    parser.add_argument("--seeds", type=int, default=1, help="fits of each, with the seeds 0, 1, ...")
    parser.add_argument("--only", help="names of view folders, comma separated")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    folders = sorted(path.parent for path in a.views.glob("*/transforms.json"))
    if a.only:
        folders = [folder for folder in folders if folder.name in a.only.split(",")]
    if not folders:
        sys.exit(f"No folder in {a.views} has a transforms.json.")
    values = {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in a.set)}
    p = recipes.make("reconstruct", {"fit.device": a.device, **values}, a.preset).fit

    rows: list[dict] = []
    for folder in folders:
        try:
            views = load(folder)
        except KilnError as error:
            sys.exit(f"{folder.name}: {error}")
        if not views.holdout.any():
            sys.exit(f"{folder.name} holds no view out of the fit: there is nothing to score on.")
        plain = dataclasses.replace(views, depth=None, normals=None)
        if not rows:
            fit(plain, dataclasses.replace(p, iterations=50), 0)  # compiles
        for seed in range(a.seeds):
            for input, given in (("colour", plain), ("geometry", views)):
                if input == "colour" or (views.depth is not None and views.normals is not None):
                    rows.append({"asset": folder.name, "input": input, "seed": seed, **measured(given, p, seed)})
                    print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(table(rows))
    if a.json:
        report = {"cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), "rows": rows}
        a.json.write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")


def measured(views: Views, p: recipes.Fit, seed: int) -> dict:
    started, used = time.perf_counter(), time.process_time()
    splats = fit(views, p, seed)
    return {
        "splats": len(splats), "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used,
        "held_out": psnr(splats, views.for_scoring, 0), "held_out_white": psnr(splats, views.for_scoring, 1),
        "fitted": psnr(splats, views.for_fitting, 0),
    }  # fmt: skip


def psnr(splats: Splats, views: Views, background: float) -> float:
    """Mean over the views, dB."""
    found = []
    for camera, image, alpha in zip(views.cameras, views.images, views.alpha, strict=True):
        truth = image * alpha[..., None] + background * (1 - alpha[..., None])
        drawn = np.clip(render(splats, camera, (background,) * 3).color, 0, 1)
        found.append(-10 * np.log10(max(float(((drawn - truth) ** 2).mean()), 1e-10)))
    return float(np.mean(found))


def table(rows: list[dict]) -> str:
    inputs = [name for name in ("colour", "geometry") if any(row["input"] == name for row in rows)]
    heads = [f"{name}: {column.replace('_', ' ')}" for name in inputs for column in COLUMNS]
    lines = ["| asset | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for asset in sorted({row["asset"] for row in rows}):
        lines.append(
            f"| {asset} | " + " | ".join(shown(cells(rows, name, column, asset), column) for name in inputs for column in COLUMNS) + " |"
        )
    lines.append("| **median** | " + " | ".join(shown(cells(rows, name, column), column) for name in inputs for column in COLUMNS) + " |")
    return "\n".join(lines)


def cells(rows: list[dict], input: str, column: str, asset: str | None = None) -> list[float]:
    """An asset's values, or the mean over the seeds of every asset."""
    if asset is not None:
        return [row[column] for row in rows if row["input"] == input and row["asset"] == asset]
    names = {row["asset"] for row in rows if row["input"] == input}
    return [statistics.mean(cells(rows, input, column, name)) for name in names]


def shown(values: list[float], column: str) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.0f}" if column == "splats" else f"{statistics.median(values):.2f}"


if __name__ == "__main__":
    main()
