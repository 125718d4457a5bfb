# environment: backend
"""How good and how dear the surface is: for every folder of views, with the depth and normals that they carry and from colour alone.

Scores against the visible true surface, processor seconds (user and system, all threads) of each phase, and in a child process by how much
the peak of resident memory rises at the preset's grid and at 512. Recall within 0.5% of the diagonal is also stated apart for thin parts:
true surface behind which the opposite side lies within 0.5% of the diagonal. Without --views, on a built-in ball.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import re
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import trimesh
from scipy.spatial import cKDTree

from backend.mesh.extract import extract
from backend.mesh.measure import score
from backend.mesh.mesh import Mesh
from backend.pipelines.reconstruct import warm_up
from backend.splats.fit import fit
from backend.splats.model import Splats
from backend.views.ball import ball
from backend.views.views import Views, load
from protocol import recipes

GRIDS = (recipes.Surface().grid, 512)
BALL_RADIUS = 0.7  # what `ball` draws
COLUMNS = (
    "views", "from", "F 1%", "F 0.5%", "Chamfer", "thin recall", "closed", "hidden", "faces", "seconds", "phases", "MB at 224", "MB at 512",
)  # fmt: skip
NEAR = 0.005  # of the diagonal
THIN_SAMPLES = 4000


class Phases:
    """A progress report that adds up the processor seconds between reports, by their text."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.text, self.since = "", time.process_time()

    def __call__(self, fraction: float, text: str = "", preview=None) -> None:
        now = time.process_time()
        if self.text:
            self.seconds[self.text] = self.seconds.get(self.text, 0.0) + now - self.since
        self.text, self.since = text or self.text, now


def peak_megabytes(splats: Splats | None, views: Views, grid: int) -> float:
    """By how much the peak of resident memory rises while the surface is found, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure_peak, args=(sender, splats, views, grid))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return float("nan")  # the child's own error stands above
    finally:
        child.join()


def _measure_peak(sender, splats: Splats | None, views: Views, grid: int) -> None:
    import resource
    import sys

    warm_up()
    unit = 1 / 1024 if sys.platform == "darwin" else 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    extract(splats, views, recipes.Surface(grid=grid))
    sender.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before) / 1024)


def write(mesh: Mesh, views: Views, path: Path, glb_axes: bool) -> None:
    points = views.frame.to_world(mesh.vertices)
    if glb_axes:  # Y up, as glTF has it
        points = np.stack([points[:, 0], points[:, 2], -points[:, 1]], 1)
    trimesh.Trimesh(points, mesh.faces, process=False).export(path)


def thin_recall(mesh_path: Path, source_path: Path) -> dict[str, float]:
    """The share of the true surface that is part of something thinner than NEAR, and how much of that the mesh comes within NEAR of."""
    mesh, source = (trimesh.load(path, force="mesh", process=False) for path in (mesh_path, source_path))
    near = NEAR * float(np.linalg.norm(source.extents))
    points, face = trimesh.sample.sample_surface(source, THIN_SAMPLES, seed=0)
    others, of = trimesh.sample.sample_surface(source, 400_000, seed=1)
    tree, normals = cKDTree(others), source.face_normals
    is_thin = np.zeros(len(points), bool)
    for depth in np.linspace(0.1, 1.0, 10) * near:  # is the other side's surface there?
        distance, index = tree.query(points - normals[face] * depth, workers=-1)
        is_thin |= (distance < 0.1 * near) & ((normals[face] * normals[of[index]]).sum(1) < -0.5)
    thin = points[is_thin]
    dense = trimesh.sample.sample_surface(mesh, 400_000, seed=0)[0]
    found = {"thin_share": len(thin) / len(points)}
    if len(thin):
        found["thin_recall"] = float((cKDTree(dense).query(thin, workers=-1)[0] < near).mean())
    return found


def row(name: str, views: Views, splats: Splats | None, source: Path | None, memory: bool, p: recipes.Surface) -> dict:
    phases, start = Phases(), time.process_time()
    mesh = extract(splats, views, p, phases)
    phases(1.0)
    seconds = time.process_time() - start
    found = {
        "views": name,
        "from": "passes" if splats is None else "colour",
        "faces": len(mesh.faces),
        "seconds": round(seconds, 2),
        "phases": {text: round(value, 2) for text, value in phases.seconds.items()},
    }
    if source is not None:
        with tempfile.TemporaryDirectory() as folder:
            write(mesh, views, Path(folder) / "mesh.ply", source.suffix in (".glb", ".gltf"))
            found |= score(Path(folder) / "mesh.ply", source) | thin_recall(Path(folder) / "mesh.ply", source)
    if memory:
        found |= {f"peak_mb_{grid}": round(peak_megabytes(splats, views, grid)) for grid in GRIDS}
    return found


def line(entry: dict) -> str:
    def text(key: str, form: str) -> str:
        return format(entry[key], form) if key in entry else ""

    cells = [entry["views"], entry["from"], text("f1", ".3f"), text("f05", ".3f"), text("chamfer", ".1e"), text("thin_recall", ".3f")]
    cells += ["" if "watertight" not in entry else "yes" if entry["watertight"] else "no", text("hidden", ".1%"), str(entry["faces"])]
    cells += [text("seconds", ".2f"), ", ".join(f"{name.lower()} {value}" for name, value in entry["phases"].items())]
    cells += [text(f"peak_mb_{grid}", "") for grid in GRIDS]
    return "| " + " | ".join(cells) + " |"


def subjects(a: argparse.Namespace, scratch: Path):
    """Name, views and true mesh of each; a folder of views may hold its true mesh as mesh.ply in the cameras' world."""
    if a.views is None:
        views = ball(size=128, count=24)
        truth = trimesh.creation.icosphere(5, radius=BALL_RADIUS)
        truth.vertices = views.frame.to_world(truth.vertices)
        truth.export(scratch / "ball.ply")
        yield "ball", views, scratch / "ball.ply"
        return
    for table in sorted(a.views.glob("*/transforms.json")):
        folder = table.parent
        own = folder / "mesh.ply"
        named = [] if a.sources is None else [a.sources / f"{re.sub(r'_[0-9]+$', '', folder.name)}.glb"]
        yield folder.name, load(folder), next((path for path in [own, *named] if path.is_file()), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--views", type=Path, metavar="DIR", help="folders of views, each with its transforms.json")
    parser.add_argument("--sources", type=Path, metavar="DIR", help="the true meshes, named as the folders are up to a final _SIZE, as GLB")
    parser.add_argument("--only", metavar="REGEX", default="", help="the folders whose name this is found in")
    parser.add_argument("--grid", type=int, default=recipes.Surface().grid, help="of the scored meshes")
    parser.add_argument("--faces", type=int, default=recipes.Surface().faces, help="of the scored meshes")
    parser.add_argument("--no-colour", action="store_true", help="leave out the fits from colour alone")
    parser.add_argument("--no-memory", action="store_true", help="leave out what needs a process of its own for each figure")
    parser.add_argument("--json", type=Path, metavar="FILE")
    a = parser.parse_args()
    warm_up()
    rows = []
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    with tempfile.TemporaryDirectory() as scratch:
        for name, views, source in subjects(a, Path(scratch)):
            if not re.search(a.only, name):
                continue
            bare = dataclasses.replace(views, depth=None, normals=None, material=None, emission=None)
            for given in (views, bare):
                if given is views and views.depth is None or given is bare and a.no_colour:
                    continue
                splats = None if given is views else fit(bare, recipes.Fit(device="cpu"), 0)
                rows.append(row(name, given, splats, source, not a.no_memory, recipes.Surface(grid=a.grid, faces=a.faces)))
                print(line(rows[-1]), flush=True)
    for kind in ("passes", "colour"):
        scored = [entry for entry in rows if entry["from"] == kind and "f05" in entry]
        if len(scored) > 1:
            medians = ", ".join(f"{key} {statistics.median(entry[key] for entry in scored):.4f}" for key in ("f1", "f05", "chamfer"))
            print(f"\n{kind}: medians {medians}; worst f05 {min(entry['f05'] for entry in scored):.4f}")
    if a.json:
        a.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
