# environment: backend
"""What Ray costs over the backend of this machine: the same items through both engines of `kiln batch`, one job at a time on all cores.

Start-up is stated apart: until the engine answers, and its first item, which loads and compiles. Then the engines take turns with the same
items, files that neither has seen; the table gives the median of the runs. What both make has to be the same, by hash. The items are splat
files that become meshes, a few seconds each and no Blender: shorter than what people make, so that what Ray adds shows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from backend import cli
from backend.batch.engine import FINAL, Engine
from backend.batch.local import Local
from backend.batch.ray_engine import RayEngine
from backend.splats import ply
from backend.splats.model import Splats
from backend.views.views import Frame
from backend.worker import cores
from protocol import recipes

SMALL = {"look.count": 16, "look.size": 128, "surface.faces": 2000, "texture.size": 256}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=8, help="of a run (default: 8)")
    parser.add_argument("--runs", type=int, default=3, help="of each engine (default: 3)")
    parser.add_argument("--count", type=int, default=5_000, help="Gaussians of a file (default: 5000)")
    parser.add_argument("--grid", type=int, default=64, help="cells of the surface's grid along an edge (default: 64)")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="kiln-bench-"))
    engines: dict[str, Engine] = {}
    started: dict[str, list[float]] = {}
    runs: dict[str, list[float]] = {"local": [], "Ray": []}
    try:
        values = recipes.values(recipes.make("mesh_splats", {**SMALL, "surface.grid": a.grid}, "draft"))
        for name, start in (("local", local), ("Ray", lambda: RayEngine(root / "scratch", cpus=cores()))):
            os.environ["KILN_HOME"] = str(root / name)  # finished stages of one are not found by the other
            begun = time.perf_counter()
            engines[name] = start()
            started[name] = [time.perf_counter() - begun, make(engines[name], "first", files(root, -1, 1, a.count), values, root / name)[0]]
            print(f"{name}: answers after {started[name][0]:.1f} s, its first item after {started[name][1]:.1f} s more", flush=True)
        for number in range(a.runs):
            given = files(root, number, a.items, a.count)
            made = {}
            for name in ("local", "Ray") if number % 2 == 0 else ("Ray", "local"):
                seconds, made[name] = make(engines[name], f"run{number}", given, values, root / name)
                runs[name].append(seconds)
                print(f"run {number + 1}, {name}: {seconds:.2f} s", flush=True)
            assert made["local"] == made["Ray"], "the engines make different meshes"
    finally:
        for engine in engines.values():
            engine.close()
        os.environ["KILN_HOME"] = str(root / "local")
        cli.main(["stop"])
        shutil.rmtree(root, ignore_errors=True)

    medians = {name: statistics.median(seconds) for name, seconds in runs.items()}
    print(f"\n{a.items} items of {a.count} Gaussians, grid {a.grid}, {cores()} cores; median of {a.runs} interleaved runs")
    print("| engine | start-up, s | first item, s | run, s | an item, s | all runs, s |\n|---|--:|--:|--:|--:|--:|")
    for name, seconds in runs.items():
        begun, first = started[name]
        every = " ".join(f"{one:.2f}" for one in seconds)
        print(f"| {name} | {begun:.1f} | {first:.1f} | {medians[name]:.2f} | {medians[name] / a.items:.2f} | {every} |")
    print(f"Ray takes {100 * (medians['Ray'] / medians['local'] - 1):+.1f} %; what they make is the same, by hash.")
    if a.json:
        a.json.write_text(json.dumps({"started": started, "runs": runs, "medians": medians}, indent=1), encoding="utf-8")


def local() -> Local:
    return Local(lambda: cli._connect(argparse.Namespace(connection=None), start=True))


def files(root: Path, run: int, count: int, gaussians: int) -> dict[str, Path]:
    """Splats on spheres of different colours: no two files are the same, and all are as much work."""
    made = {}
    for number in range(count):
        random = np.random.default_rng([run + 1, number])
        points = random.normal(size=(gaussians, 3))
        points *= 0.7 / np.linalg.norm(points, axis=1, keepdims=True)
        splats = Splats(
            means=points.astype(np.float32),
            quaternions=np.tile(np.float32([1, 0, 0, 0]), (gaussians, 1)),
            log_scales=np.full((gaussians, 3), np.log(2.0 / np.sqrt(gaussians)), np.float32),
            opacity_logits=np.full(gaussians, 4, np.float32),
            sh=random.uniform(-1, 1, (gaussians, 1, 3)).astype(np.float32),
        )
        path = root / f"{run}-{number}.ply"
        ply.save(path, splats, Frame(np.zeros(3), 1.0))
        made[f"item{number}"] = path
    return made


def make(engine: Engine, run: str, given: dict[str, Path], values: dict, folder: Path) -> tuple[float, dict[str, str]]:
    """Seconds that an engine takes for all files, with one more submitted than it runs at once, as `kiln batch` does; and its meshes."""
    begun, waiting, hashes = time.perf_counter(), list(given.items()), {}
    under_way: dict[str, str] = {}
    while waiting or under_way:
        while waiting and len(under_way) <= engine.slots:
            name, path = waiting.pop(0)
            under_way[engine.submit(f"bench-{run}-{name}", "mesh_splats", values, {"splats.ply": path}, name)] = name
        for event in engine.poll(1.0):
            if event.kind in FINAL and event.id in under_way:
                name = under_way.pop(event.id)
                if event.kind != "done":
                    raise event.error or RuntimeError(f"{name} was cancelled")
                engine.fetch(event.id, folder / run / name)
                engine.forget(event.id)
                hashes[name] = hashlib.sha256((folder / run / name / "mesh.glb").read_bytes()).hexdigest()
    return time.perf_counter() - begun, hashes


if __name__ == "__main__":
    main()
