# environment: backend
"""What a game engine gets: levels of detail with their errors and where they switch, the volume error of collision hulls, and what a normal
map gains. For every folder of views, with their depth; without --views, on a built-in ball.

Gain: the mesh as grey clay (matt and a little glossy) under three lights, whole picture, black background, PSNR. Against the dense surface
that it was decimated from: 256 pixels, from 8 sides that no view has. Against the source itself: its normals as the held-out views have
them, by whatever bump and normal maps it has. Without a map, with the dense surface's, and with the one that the views' normals make.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import trimesh

from backend.mesh import raster
from backend.mesh.bake import bake, vertex_normals, with_normals
from backend.mesh.decimate import decimate
from backend.mesh.extract import dense
from backend.mesh.hulls import hulls, volume
from backend.mesh.lods import budgets, levels, switches
from backend.mesh.measure import psnr
from backend.mesh.mesh import Mesh, TexturedMesh
from backend.mesh.unwrap import unwrap
from backend.views.ball import ball
from backend.views.cameras import Camera, look_at
from backend.views.views import Views, load
from protocol import recipes

SIDES, PIXELS = 8, 256
LIGHTS = (((0.6, -0.5, 0.6), 0.75), ((-0.8, -0.2, 0.3), 0.35), ((0.1, 0.9, 0.2), 0.3))  # direction towards it, strength
AMBIENT, MATT, GLOSS, SHINE = 0.08, 0.8, 0.15, 24


def sides() -> list[Camera]:
    cameras = []
    for number in range(SIDES):
        height, turn = 0.8 * (2 * (number + 0.5) / SIDES - 1), 2.4 * number
        eye = np.array([np.cos(turn) * np.sqrt(1 - height**2), np.sin(turn) * np.sqrt(1 - height**2), height])
        cameras.append(look_at(eye * 3.5, (0, 0, 0), PIXELS, 0.6))
    return cameras


def clay(normals: np.ndarray, there: np.ndarray, camera: Camera) -> np.ndarray:
    """By Blinn and Phong's light, linear values encoded to sRGB."""
    eye = camera.centre / np.linalg.norm(camera.centre)
    light = np.full(there.shape, AMBIENT, np.float32)
    for direction, strength in LIGHTS:
        towards = np.asarray(direction) / np.linalg.norm(direction)
        half = (towards + eye) / np.linalg.norm(towards + eye)
        light += strength * (MATT * np.maximum(normals @ towards, 0) + GLOSS * np.maximum(normals @ half, 0) ** SHINE)
    return raster.srgb_from_linear(np.where(there, light, 0))


def lit(mesh: TexturedMesh, cameras: list[Camera]) -> list[np.ndarray]:
    return [clay(*raster.normals(mesh, camera), camera) for camera in cameras]


def blank(mesh: Mesh, size: int) -> TexturedMesh:
    source, uv, faces = unwrap(mesh, size, 4)
    normals = vertex_normals(mesh)[source].astype(np.float32)
    return TexturedMesh(mesh.vertices[source], normals, uv, faces, np.full((size, size, 3), 128, np.uint8))


def shown(mesh: Mesh) -> TexturedMesh:
    """To be drawn by its normals alone."""
    grey, normals = np.full((8, 8, 3), 128, np.uint8), vertex_normals(mesh).astype(np.float32)
    return TexturedMesh(mesh.vertices, normals, np.zeros((len(normals), 2), np.float32), mesh.faces, grey)


def likeness(mesh: TexturedMesh, cameras: list[Camera], truth: list[np.ndarray]) -> float:
    return float(np.mean([psnr(one, other) for one, other in zip(lit(mesh, cameras), truth)]))


def measured(name: str, views: Views, options: argparse.Namespace) -> dict:
    surface = dense(None, views, recipes.Surface(grid=options.grid))
    found: dict = {"name": name, "dense": len(surface.faces), "gain": []}
    cameras, held = sides(), views.for_scoring
    sources = {"dense surface": (cameras, lit(shown(surface), cameras))}
    if views.normals is not None:
        normals = held.normals.astype(np.float32)
        there = (normals != 0).any(-1)
        sources["held-out views"] = held.cameras, [clay(*each) for each in zip(normals, there, held.cameras)]
    for faces in options.faces:
        mesh = decimate(surface, faces)
        plain = blank(mesh, options.size)
        kinds = {"without": plain, "of the dense surface": with_normals(plain, surface)}
        if views.normals is not None:
            kinds["of the views"] = bake(mesh, None, views, recipes.Texture(size=options.size))
        for source, truth in sources.items():
            scores = {kind: likeness(one, *truth) for kind, one in kinds.items()}
            found["gain"].append({"faces": len(mesh.faces), "source": source, **scores})
    started = time.process_time()
    chain = levels(plain, budgets(len(plain.faces), 0.5, options.levels))
    found["levels"] = {
        "seconds": time.process_time() - started,
        "faces": [len(plain.faces), *(len(level.faces) for level in chain)],
        "error": [level.error / float(np.linalg.norm(np.ptp(plain.vertices, axis=0))) for level in chain],
        "size": switches(plain, chain),
    }
    found["hull"] = trimesh.Trimesh(mesh.vertices, mesh.faces).convex_hull.volume / volume(mesh)
    found["hulls"] = []
    for most in options.hulls:
        started = time.perf_counter()
        made = hulls(mesh, most)
        found["hulls"].append(
            {"most": most, "made": len(made.hulls), "error": made.error, "seconds": time.perf_counter() - started}
        )  # fmt: skip
    return found


def tables(results: list[dict]) -> None:
    print(
        "| asset | faces of each level | error, % of the diagonal | ends at a share of the screen's height | CPU s |\n|---|---|---|---|---|"
    )
    for one in results:
        level = one["levels"]
        errors, sizes = ", ".join(f"{100 * e:.2f}" for e in level["error"]), ", ".join(f"{s:.3f}" for s in level["size"])
        print(f"| {one['name']} | {', '.join(f'{n:,}' for n in level['faces'])} | {errors} | {sizes} | {level['seconds']:.1f} |")
    print("\n| asset | one hull, volume over the mesh's | at most | hulls | volume error | wall s |\n|---|---|---|---|---|---|")
    for one in results:
        for row in one["hulls"]:
            cells = f"{row['most']} | {row['made']} | {100 * row['error']:.1f} % | {row['seconds']:.1f}"
            print(f"| {one['name']} | {one['hull']:.2f} | {cells} |")
    print("\n| asset | faces | against | without | with the dense surface's | gain | with the views' | gain |\n" + "|---" * 8 + "|")
    gains: dict[tuple[str, str], list[float]] = {}
    for one in results:
        for row in one["gain"]:
            cells = f"{row['without']:.2f}"
            for kind in ("of the dense surface", "of the views"):
                if kind in row:
                    gain = row[kind] - row["without"]
                    gains.setdefault((row["source"], kind), []).append(gain)
                    cells += f" | {row[kind]:.2f} | {gain:+.2f}"
            print(f"| {one['name']} | {row['faces']:,} | {row['source']} | {cells} |")
    for (source, kind), values in gains.items():
        print(f"\nMedian gain of the map {kind} against the {source}: {statistics.median(values):.2f} dB ({len(values)} meshes).")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=Path, help="a folder of folders of views")
    parser.add_argument("--assets", nargs="*", help="names of some of the folders")
    parser.add_argument("--faces", type=int, nargs="+", default=[2000, 5000])
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--hulls", type=int, nargs="*", default=[16, 32])
    parser.add_argument("--size", type=int, default=1024, help="pixels of the texture")
    parser.add_argument("--grid", type=int, default=recipes.Surface().grid)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    folders = [None] if options.views is None else sorted(path.parent for path in options.views.glob("*/transforms.json"))
    for folder in folders:
        name = "ball" if folder is None else folder.name
        if options.assets and name not in options.assets:
            continue
        results.append(measured(name, ball(128, 20, 0.7) if folder is None else load(folder), options))
        print(f"{name} is done.", flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1), "utf-8")
    tables(results)


if __name__ == "__main__":
    main()
