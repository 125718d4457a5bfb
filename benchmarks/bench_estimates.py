# environment: backend
"""What the stages cost, and how far protocol/estimates.py is off: every constant of its table, fitted anew to runs over a small design of
parameters, and each run's time and memory beside what the table as it stands and the fitted one say.

Each run is a process of its own, warmed up as a worker is. The subject is a patterned ball; `--views` names folders of captured views
(SPEC.md) that are run too, with fewer of them and coarser parameters. `--reports` names the JSON of `bench assets`, whose rest, the time in
Blender, is compared with the terms for it. Run it on a quiet machine with two cores; the constants go into protocol/estimates.py by hand.

    python build.py bench estimates [--views FOLDER ...] [--reports FILE] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.optimize import nnls

from backend import worker
from backend.pipelines import PIPELINES
from backend.pipelines.run import Run, peak_memory
from backend.splats import ply
from backend.splats.model import Splats
from backend.views.ball import ball
from backend.views.views import Frame, Views
from protocol import estimates, recipes

STAGES = {  # as pipelines call them
    "Read views": "read", "Read splats": "read", "Fit splats": "fit", "Take pictures": "look", "Extract surface": "extract",
    "Bake texture": "bake", "Measure": "measure", "Decimate": "extract", "Bake normals": "game", "Levels of detail": "game",
    "Collision hulls": "game",
}  # fmt: skip
RECONSTRUCT: list[dict[str, Any]] = [  # changes of the preset standard; one thing at a time, then the presets themselves
    {"capture.size": 256, "fit.iterations": 300},
    {"capture.size": 256, "fit.iterations": 300, "fit.splats": 60_000},
    {"capture.size": 256, "fit.iterations": 1000, "fit.splats": 8000, "surface.grid": 112},
    {"capture.size": 512, "fit.iterations": 300, "surface.faces": 80_000},
    {"capture.size": 512, "fit.iterations": 300, "texture.size": 2048},
    {"capture.size": 512, "fit.iterations": 300, "surface.grid": 384, "capture.views": 48},
    {"capture.size": 1024, "fit.iterations": 300, "capture.views": 16},
    recipes.Reconstruct.PRESETS["draft"],
    recipes.Reconstruct.PRESETS["standard"],
]
MESH_SPLATS: list[tuple[int, dict[str, Any]]] = [  # splats in the file; changes
    (20_000, {"look.size": 256}),
    (20_000, {}),
    (500_000, {"look.size": 256, "look.count": 24}),
    (200_000, recipes.MeshSplats.PRESETS["draft"]),
]
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--views", type=Path, nargs="*", default=[], help="folders of captured views")
    parser.add_argument("--reports", type=Path, help="JSON of bench assets")
    parser.add_argument("--quick", action="store_true", help="two runs, to see that it works")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.row:
        print(json.dumps(measured(json.loads(a.row))))
        return
    design: list[Row] = [{"recipe": "reconstruct", "values": values} for values in RECONSTRUCT]
    design += [{"recipe": "mesh_splats", "values": values, "splats": count} for count, values in MESH_SPLATS]
    for folder in a.views:
        table = json.loads((folder / "transforms.json").read_text())
        held = sum(frame.get("split") == "holdout" for frame in table["frames"])
        own = {"capture.size": table["w"], "capture.holdout": held, "capture.views": len(table["frames"]) - held}
        for values in ({"fit.iterations": 300, "surface.grid": 160}, {}):
            design.append({"recipe": "reconstruct", "values": {**own, **values}, "views": str(folder)})
    if a.quick:
        design = [design[7], design[-1 if a.views else 9]]
    rows = []
    for row in design:
        done = subprocess.run([sys.executable, __file__, "--row", json.dumps(row)], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        rows.append({**row, **json.loads(done.stdout.splitlines()[-1])})
        print(f"{len(rows)} of {len(design)}: {row['values']} {sum(rows[-1]['seconds'].values()):.1f} s", file=sys.stderr)
    seconds, memory = fitted_seconds(rows), fitted_bytes(rows)
    show_constants("SECONDS", seconds, 1.0)
    show_constants("BYTES", memory, 1.0)
    errors = show_rows(rows, seconds, memory)
    if a.reports:
        show_blender(json.loads(a.reports.read_text()))
    if a.json:
        a.json.write_text(json.dumps({"rows": rows, "SECONDS": seconds, "BYTES": memory, "errors": errors}, indent=1))


# One run


def measured(row: Row) -> Row:
    """Seconds and the peak of memory of each stage of one job, in this process, after what a worker does to warm up."""
    import importlib

    module, name = PIPELINES[row["recipe"]]
    pipeline = importlib.import_module(module)
    recipe = recipes.make(row["recipe"], row["values"])
    marks: list[tuple[str, float, int]] = []  # stage, when it began, the peak of memory before

    def report(event: dict[str, Any]) -> None:
        if event["kind"] == "stage":
            mark(event["stage"])

    def mark(stage: str) -> None:
        marks.append((stage, time.perf_counter(), peak_memory() or 0))
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(row["views"]) if "views" in row else Path(scratch)
        if row["recipe"] == "mesh_splats":
            ply.save(folder / "splats.ply", ball_of_splats(row["splats"]), Frame(np.zeros(3), 1.0))
        elif "views" not in row:
            save(ball(recipe.capture.size, recipe.capture.views + recipe.capture.holdout), folder, recipe.capture.holdout)
        worker.warm_up(lambda: True)
        getattr(pipeline, name)(Run(report=report), folder, recipe)
        mark("end")
    seconds: dict[str, float] = {}
    memory: dict[str, float] = {}
    for (stage, begun, _), (_, ended, peak) in zip(marks, marks[1:]):
        key = STAGES[stage]
        seconds[key] = seconds.get(key, 0.0) + ended - begun
        memory[key] = max(memory.get(key, 0), peak)
    return {"seconds": seconds, "bytes": memory}


def save(views: Views, folder: Path, holdout: int) -> None:
    """Views as files, with material passes as the extension renders them."""
    frames = []
    for number, camera in enumerate(views.cameras):
        color, geometry, material = (f"{kind}_{number:03}" for kind in ("color", "geometry", "material"))
        picture = np.dstack([views.images[number], views.alpha[number]])
        Image.fromarray((picture * 255 + 0.5).astype(np.uint8)).save(folder / f"{color}.png")
        assert views.depth is not None and views.normals is not None
        normal = np.where(views.alpha[number][..., None] > 0, views.normals[number], 0).astype(np.float16)
        np.savez_compressed(folder / f"{geometry}.npz", depth=views.depth[number], normal=normal)
        hit = views.alpha[number] > 0
        np.savez_compressed(folder / f"{material}.npz", material=np.where(hit[..., None], (128, 0, 255), 0).astype(np.uint8))
        matrix = camera.world_from_camera.copy()
        matrix[:3, 1:3] *= -1  # OpenCV axes to OpenGL's
        frames.append(
            {
                "file_path": f"{color}.png",
                "geometry_file_path": f"{geometry}.npz",
                "material_file_path": f"{material}.npz",
                "split": "holdout" if number >= len(views) - holdout else "train",
                "transform_matrix": matrix.tolist(),
            }
        )
    camera = views.cameras[0]
    table = {"w": camera.width, "h": camera.height, "fl_x": camera.fx, "fl_y": camera.fy, "cx": camera.cx, "cy": camera.cy}
    (folder / "transforms.json").write_text(json.dumps({**table, "frames": frames}))


def ball_of_splats(count: int) -> Splats:
    """Opaque splats on a ball of the radius 0.7."""
    random = np.random.default_rng(0)
    means = random.normal(size=(count, 3))
    means *= 0.7 / np.linalg.norm(means, axis=1, keepdims=True)
    spacing = np.sqrt(4 * np.pi * 0.7**2 / count)
    fields = (
        means,
        np.tile([1.0, 0, 0, 0], (count, 1)),
        np.full((count, 3), np.log(spacing)),
        np.full(count, 3.0),
        np.sin(6 * means)[:, None],
    )
    return Splats(*(values.astype(np.float32) for values in fields))


# The table


def known(row: Row) -> dict[str, Any]:
    values = recipes.values(recipes.make(row["recipe"], row["values"]))
    return estimates.known(row["recipe"], values, row.get("splats"))


def fitted_seconds(rows: list[Row]) -> dict[str, dict[str, float]]:
    """The table's constants that come nearest to the runs, in relative error, none below 0."""
    found = {}
    for stage, terms in estimates.SECONDS.items():
        there = [row for row in rows if stage in row["seconds"]]
        if not there:
            continue  # Blender's stages, and a GPU's
        matrix = np.array([[estimates.QUANTITIES[name](known(row)) for name in terms] for row in there])
        took = np.array([row["seconds"][stage] for row in there])
        found[stage] = dict(zip(terms, nnls(matrix / took[:, None], np.ones(len(took)))[0].tolist()))
    return found


def fitted_bytes(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Base and stages at once: the peak in a stage is the sum of both."""
    columns = [(stage, name) for stage, terms in estimates.BYTES.items() for name in terms]
    matrix, peaks = [], []
    for row in rows:
        for stage in estimates.BYTES.keys() & row["bytes"].keys():
            quantities = known(row)
            matrix.append([estimates.QUANTITIES[name](quantities) if owner in ("base", stage) else 0.0 for owner, name in columns])
            peaks.append(row["bytes"][stage])
    scale = np.array(peaks)
    solved = nnls(np.array(matrix) / scale[:, None], np.ones(len(scale)))[0]
    found: dict[str, dict[str, float]] = {}
    for (stage, name), value in zip(columns, solved.tolist()):
        found.setdefault(stage, {})[name] = value
    return found


def show_constants(name: str, table: dict[str, dict[str, float]], unit: float) -> None:
    print(f"\n{name}, fitted (in the table now)\n")
    now = getattr(estimates, name)
    for stage, terms in table.items():
        for quantity, value in terms.items():
            print(f"    {stage:9} {quantity:26} {value / unit:10.3g}  ({now[stage][quantity] / unit:.3g})")


def show_rows(rows: list[Row], seconds: dict[str, dict[str, float]], memory: dict[str, dict[str, float]]) -> dict[str, float]:
    """Each run beside both tables. Returns the largest relative errors of each."""
    print("\n| recipe | changed | s | table | fitted | MB | table | fitted |\n|---|---|---|---|---|---|---|---|")
    errors = {"table_seconds": 0.0, "fitted_seconds": 0.0, "table_bytes": 0.0, "fitted_bytes": 0.0}
    for row in rows:
        values = recipes.values(recipes.make(row["recipe"], row["values"]))
        quantities = known(row)
        took, peak = sum(row["seconds"].values()), max(row["bytes"].values())
        told = {
            "table_seconds": estimates.backend_seconds(row["recipe"], values, False, row.get("splats")) / took,
            "fitted_seconds": sum(total(seconds[stage], quantities) for stage in row["seconds"]) / took,
            "table_bytes": estimates.peak_bytes(row["recipe"], values, row.get("splats")) / peak,
            "fitted_bytes": (
                total(memory["base"], quantities) + max(total(memory[stage], quantities) for stage in row["bytes"] if stage in memory)
            ) / peak,
        }  # fmt: skip
        for name, ratio in told.items():
            errors[name] = max(errors[name], abs(ratio - 1))
        changed = ", ".join(f"{name} {value}" for name, value in row["values"].items()) + (" (captured)" if "views" in row else "")
        cells = [f"{told[name] - 1:+.0%}" for name in told]
        print(f"| {row['recipe']} | {changed or 'standard'} | {took:.1f} | {cells[0]} | {cells[1]} "
              f"| {peak / 1e6:.0f} | {cells[2]} | {cells[3]} |")  # fmt: skip
    print("\nLargest error: " + ", ".join(f"{name.replace('_', ' ')} {error:.0%}" for name, error in errors.items()))
    return errors


def total(terms: dict[str, float], quantities: dict[str, Any]) -> float:
    return sum(each * estimates.QUANTITIES[name](quantities) for name, each in terms.items())


def show_blender(reports: dict[str, dict[str, Any]]) -> None:
    """What jobs took beyond the backend's stages, beside the terms for Blender, and whole jobs beside their estimate."""
    print("\n| asset | rest, s | terms for Blender | whole, s | estimate | error |\n|---|---|---|---|---|---|")
    for asset, report in reports.items():
        values, whole = report["parameters"], report["total_seconds"]
        rest = whole - sum(report["seconds"].values())
        expected = estimates.estimate(report["recipe"], values).seconds
        blender = estimates.blender_seconds(report["recipe"], values)
        print(f"| {asset} | {rest:.1f} | {blender:.1f} | {whole:.1f} | {expected:.1f} | {expected / whole - 1:+.0%} |")


if __name__ == "__main__":
    main()
