# environment: backend
"""What refining the surface brings: splats fitted to colour alone, marching cubes, and the same moved by the views, both baked alike.

`rings` rows: the folder's own fitted views, all around the subject, without depth, normals and material. `orbit` rows (--orbit): 16
views of the true mesh on one circle, 15 degrees up, 40 degrees wide, as a turntable's; Kiln's own rasteriser draws them from the true
mesh with a texture baked from the folder's views. Chamfer distance and F-score are those of the reports, over the source's diagonal;
PSNR is the mean over the folder's held-out views, on black. Processor seconds are of the refinement alone. Without --views, on a
built-in ball.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import trimesh
from bench_surface import subjects, write

from backend.mesh import raster
from backend.mesh.bake import bake
from backend.mesh.extract import extract
from backend.mesh.measure import psnr, score
from backend.mesh.mesh import Mesh, TexturedMesh
from backend.mesh.refine import refine
from backend.splats.fit import fit
from backend.splats.model import Splats
from backend.views.orbit import Orbit
from backend.views.views import Views
from protocol import recipes

COLUMNS = ("asset", "views", "Chamfer", "refined", "F 0.5%", "refined", "PSNR", "refined", "closed", "faces", "seconds")
ORBIT_VIEWS, ELEVATION, FIELD_OF_VIEW = 16, 15.0, 40.0


def on_orbit(views: Views, source: Path) -> Views:
    """A turntable of the true mesh in the views' frame, and their held-out views to score by."""
    true = trimesh.load(source, force="mesh", process=False)
    true.merge_vertices(merge_tex=True, merge_norm=True)
    points = np.asarray(true.vertices)
    if source.suffix in (".glb", ".gltf"):
        points = np.stack([points[:, 0], -points[:, 2], points[:, 1]], 1)
    placed = Mesh(((points - views.frame.centre) * views.frame.scale).astype(np.float32), np.asarray(true.faces, np.int32))
    shown = bake(placed, None, views, recipes.Texture(size=2048))
    cameras = Orbit.turn(ORBIT_VIEWS, ELEVATION, FIELD_OF_VIEW).cameras(views.alpha.shape[2])
    drawn = [raster.render(shown, camera, supersample=5) for camera in cameras]
    alpha = np.stack([cover for _, cover in drawn]).astype(np.float32)
    images = np.stack([color for color, _ in drawn]) / np.maximum(alpha, 1e-6)[..., None]
    held = views.for_scoring
    return Views(
        [*cameras, *held.cameras], np.concatenate([np.clip(images, 0, 1).astype(np.float32), held.images]),
        np.concatenate([alpha, held.alpha]), None, None, np.arange(len(cameras) + len(held)) >= len(cameras), views.frame,
    )  # fmt: skip


def fitted(views: Views, cache: Path | None) -> Splats:
    """The splats of a fit from colour alone, kept in a file for the next run."""
    if cache is not None and cache.is_file():
        return pickle.loads(cache.read_bytes())
    splats = fit(views, recipes.Fit(device="cpu"), 0)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_bytes(pickle.dumps(splats))
    return splats


def mesh_psnr(mesh: TexturedMesh, views: Views) -> float:
    scored = views.for_scoring
    truths = scored.on_black()
    return float(np.mean([psnr(raster.render(mesh, camera)[0], truth) for camera, truth in zip(scored.cameras, truths, strict=True)]))


def row(name: str, kind: str, views: Views, source: Path | None, a: argparse.Namespace) -> dict:
    bare = dataclasses.replace(views, depth=None, normals=None, material=None, emission=None)
    splats = fitted(bare, None if a.cache is None else a.cache / f"{name}_{kind}.pickle")
    surface = recipes.Surface(grid=a.grid, faces=a.faces)
    plain = extract(splats, bare, surface)
    wanted = dataclasses.replace(recipes.RefineSurface(on=True), **({"iterations": a.iterations} if a.iterations else {}))
    start = time.process_time()
    moved = refine(plain, splats, bare, wanted, a.faces, 0)
    found: dict = {"asset": name, "views": kind, "seconds": round(time.process_time() - start, 1), "faces": len(moved.faces)}
    with tempfile.TemporaryDirectory() as folder:
        for key, mesh in (("plain", plain), ("refined", moved)):
            if source is not None:
                write(mesh, views, Path(folder) / "mesh.ply", source.suffix in (".glb", ".gltf"))
                found |= {f"{key}_{name}": value for name, value in score(Path(folder) / "mesh.ply", source).items()}
            if views.holdout.any() and not a.no_psnr:
                found[f"{key}_psnr"] = mesh_psnr(bake(mesh, splats, bare, recipes.Texture(size=a.texture)), bare)
    return found


def line(entry: dict) -> str:
    cells = [entry["asset"], entry["views"]]
    for name, form in (("chamfer", ".2e"), ("f05", ".4f"), ("psnr", ".2f")):
        cells += [format(entry[f"{key}_{name}"], form) if f"{key}_{name}" in entry else "" for key in ("plain", "refined")]
    closed = entry.get("refined_watertight")
    return (
        "| " + " | ".join([*cells, "" if closed is None else "yes" if closed else "no", str(entry["faces"]), str(entry["seconds"])]) + " |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--views", type=Path, metavar="DIR", help="folders of views, each with its transforms.json")
    parser.add_argument("--sources", type=Path, metavar="DIR", help="the true meshes, named as the folders are, as GLB")
    parser.add_argument("--only", metavar="REGEX", default="", help="the folders whose name this is found in")
    parser.add_argument("--orbit", choices=("no", "too", "only"), default="no", help="turntables of the true meshes")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where fitted splats are kept between runs")
    parser.add_argument("--grid", type=int, default=recipes.Surface().grid, help="of marching cubes")
    parser.add_argument("--faces", type=int, default=recipes.Surface().faces)
    parser.add_argument("--iterations", type=int, help="of the refinement, if not its default")
    parser.add_argument("--texture", type=int, default=512, help="size of the textures whose PSNR is measured")
    parser.add_argument("--no-psnr", action="store_true", help="leave out baking")
    parser.add_argument("--json", type=Path, metavar="FILE")
    a = parser.parse_args()
    rows = []
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, views, source in subjects(a, Path(scratch)):
            if not re.search(a.only, name):
                continue
            if a.orbit != "only":
                rows.append(row(name, "rings", views, source, a))
                print(line(rows[-1]), flush=True)
            if a.orbit != "no" and source is not None:
                rows.append(row(name, "orbit", on_orbit(views, source), source, a))
                print(line(rows[-1]), flush=True)
    if not rows:
        sys.exit("No folder of views fits: name one with --views that holds folders with transforms.json.")
    better = [[e[f"refined_{n}"] - e[f"plain_{n}"] if f"plain_{n}" in e else 0 for n in ("chamfer", "psnr")] for e in rows]
    print(f"\nlower Chamfer distance: {sum(c < 0 for c, _ in better)} of {len(rows)}; higher PSNR: {sum(q > 0 for _, q in better)}")
    if a.json:
        a.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
