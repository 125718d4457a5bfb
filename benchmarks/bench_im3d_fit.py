# environment: backend
"""The fit of `im3d` under views that disagree (IM-3D, Tables 2 and 3), and the estimation of a turntable's cameras. Prints Markdown
tables and saves a picture.

Turntables of every GLB in a folder are drawn exactly, 16 views at an elevation of 17 degrees; then each view is corrupted on its own:
warped by a smooth random field, turned in hue, changed in brightness. Scores are of eight exact views from other directions, in measures
that no fit here minimises:

- GMSD: deviation of gradient magnitude similarity (Xue et al. 2014); less is better.
- Fine detail: energy of the Laplacian inside the subject by that of the true view; 1 is right, less is blurred.
- Features: distance by a network that is not the loss's, as LPIPS compares; less is better.

The objects are not part of this repository: `--assets DIR` names a folder of GLB files (default: ../shared/assets/static).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import trimesh
from PIL import Image
from scipy.ndimage import convolve, gaussian_filter, map_coordinates

from backend.mesh import raster
from backend.mesh.mesh import TexturedMesh
from backend.nets.lpips import FeatureDistance
from backend.splats.fit_images import fit_images
from backend.splats.image_loss import comparer, settled
from backend.splats.model import Splats
from backend.splats.render import render
from backend.views.cameras import Camera
from backend.views.orbit import Orbit
from backend.views.views import Frame, Views
from protocol import recipes

HERE = Path(__file__).resolve().parent
ELEVATION, FOV = 17.0, 40.0
WARP, HUE, BRIGHTNESS = 0.02, 12.0, 0.12  # share of the width, degrees, share: each view's corruption, at most
MISSED, LENS, NOISE = 12.0, (0.7, 1.4), 0.05  # elevation error in degrees, factors on the field of view, azimuth noise by the step
METHODS = {
    "LPIPS-like + MS-SSIM + mask": {},
    "L2 in place of LPIPS": {"lpips_weight": 0.0, "l2_weight": 10.0},
    "L1 in place of LPIPS": {"lpips_weight": 0.0, "l1_weight": 10.0},
    "without LPIPS": {"lpips_weight": 0.0},
    "without MS-SSIM": {"ssim_weight": 0.0},
    "without mask": {"mask_weight": 0.0},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="build.py bench im3d_fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--assets", type=Path, default=HERE.parent.parent / "shared" / "assets" / "static")
    parser.add_argument("--out", type=Path, default=HERE.parent / "demo" / "im3d_fit")
    parser.add_argument("--only", help="asset names, comma separated")
    parser.add_argument("--tables", default="losses,views,cameras")
    parser.add_argument("--features", default="auto", help="what compares pictures in the fit: fit.features")
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--iterations", type=int, default=recipes.FitImages().iterations)
    parser.add_argument("--splats", type=int, default=8000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    files = [file for file in sorted(a.assets.glob("*.glb")) if not a.only or file.stem in a.only.split(",")]
    if not files:
        sys.exit(f"No GLB files in {a.assets}: name a folder with --assets.")
    a.out.mkdir(parents=True, exist_ok=True)
    p = recipes.FitImages(
        start=min(5000, a.splats // 2), splats=a.splats, iterations=a.iterations, features=a.features, device=a.device
    )  # fmt: skip
    name, sentence = settled(a.features)
    loss = comparer(name)
    print(f"{sentence} {a.size} px, {a.iterations} iterations, {a.splats} splats at most.\n", flush=True)
    judge = judge_beside(loss.name)
    results: dict[str, list[dict]] = {}
    for name, table in (("losses", losses), ("views", numbers), ("cameras", cameras)):
        if name in a.tables.split(","):
            rows = results[name] = []
            for file in files:
                rows += table(file.stem, load(file), a.size, p, loss, judge, a.out)
                if a.json:
                    a.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
            print(markdown(rows), flush=True)


# ---------------------------------------------------------------- the tables


def losses(asset: str, mesh: TexturedMesh, size: int, p, loss, judge, out: Path) -> list[dict]:
    """IM-3D, Table 2. Saves a picture: rows are the truth and the methods, columns held-out views."""
    orbit = Orbit.turn(16, ELEVATION, FOV)
    truth, views = pictures(mesh, elsewhere(orbit).cameras(size)), corrupted(pictures(mesh, orbit.cameras(size)), 0)
    rows, shown = [], [np.concatenate(list(white(truth))[:4], 1)]
    for method, changes in METHODS.items():
        started = time.process_time()
        splats, _ = fit_images(views, dataclasses.replace(p, **changes), 0, features=loss)
        seconds = time.process_time() - started
        seen = drawn(splats, truth.cameras)
        rows.append({"asset": asset, "method": method, **scores(seen, truth, judge), "CPU s": seconds})
        shown.append(np.concatenate(list(seen)[:4], 1))
        print(".", end="", file=sys.stderr, flush=True)
    shown.insert(0, np.concatenate(list(white(views))[:4], 1))
    Image.fromarray((np.concatenate(shown, 0).clip(0, 1) * 255).astype(np.uint8)).save(out / f"losses_{asset}.png")
    return rows


def numbers(asset: str, mesh: TexturedMesh, size: int, p, loss, judge, out: Path) -> list[dict]:
    """IM-3D, Table 3: the same fit to 16, 8 and 4 views."""
    rows = []
    for count in (16, 8, 4):
        orbit = Orbit.turn(count, ELEVATION, FOV)
        truth = pictures(mesh, elsewhere(Orbit.turn(16, ELEVATION, FOV)).cameras(size))
        splats, _ = fit_images(corrupted(pictures(mesh, orbit.cameras(size)), 0), p, 0, features=loss)
        rows.append({"asset": asset, "method": f"{count} views", **scores(drawn(splats, truth.cameras), truth, judge)})
        print(".", end="", file=sys.stderr, flush=True)
    return rows


def cameras(asset: str, mesh: TexturedMesh, size: int, p, loss, judge, out: Path) -> list[dict]:
    """Turntables whose elevation, field of view and azimuths are not what the fit is told, with estimation and without."""
    rows, random = [], np.random.default_rng(3)
    for missed, lens in ((MISSED, LENS[1]), (-MISSED, LENS[0])):
        told = Orbit.turn(16, 22.0 + missed, FOV * lens)
        noise = random.normal(0, NOISE * 360 / 16, 16)
        noise[0] = 0  # the first view is where azimuths are counted from
        true = Orbit(told.azimuths + noise, 22.0, FOV, Orbit.turn(1, 0.0, FOV).distance)
        views = pictures(mesh, true.cameras(size))
        truth = pictures(mesh, elsewhere(true).cameras(size))
        views = dataclasses.replace(views, cameras=told.cameras(size))
        for method, orbit in (("as told", None), ("estimated", told)):
            splats, found = fit_images(views, p, 0, orbit=orbit, features=loss)
            by = found or told
            seen = drawn(splats, [in_gauge(camera, true, by) for camera in truth.cameras])
            off = np.abs(by.azimuths - true.azimuths)[1:].mean()
            rows.append({
                "asset": asset, "method": f"{missed:+.0f} deg, lens x{lens}: {method}", **scores(seen, truth, judge),
                "elevation off": by.elevation - true.elevation, "fov": by.fov, "azimuths off": float(off),
            })  # fmt: skip
            print(".", end="", file=sys.stderr, flush=True)
    return rows


def markdown(rows: list[dict]) -> str:
    """The mean over assets of each method, and one table for each asset in the same rows."""
    columns = [name for name in rows[0] if name not in ("asset", "method")]
    lines = ["", f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    groups = {"mean": rows} | {
        asset: [row for row in rows if row["asset"] == asset] for asset in dict.fromkeys(row["asset"] for row in rows)
    }
    for group, members in groups.items():
        for method in dict.fromkeys(row["method"] for row in members):
            same = [row for row in members if row["method"] == method]
            values = [f"{np.mean([row[column] for row in same]):.4g}" for column in columns]
            lines.append(f"| {group}: {method} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- pictures


def load(file: Path) -> TexturedMesh:
    """The object of a GLB in Blender's axes, its largest radius 0.92."""
    parts = trimesh.load_scene(file).dump()
    mesh = trimesh.util.concatenate(parts) if len(parts) > 1 else parts[0]
    image = mesh.visual.material.baseColorTexture
    points = np.asarray(mesh.vertices)[:, [0, 2, 1]] * (1, -1, 1)
    points -= (points.min(0) + points.max(0)) / 2
    points *= 0.92 / np.linalg.norm(points, axis=1).max()
    return TexturedMesh(
        points.astype(np.float32), np.zeros_like(points, np.float32), np.asarray(mesh.visual.uv, np.float32),
        np.asarray(mesh.faces, np.int32), np.asarray(image.convert("RGB")),
    )  # fmt: skip


def pictures(mesh: TexturedMesh, cameras: list[Camera]) -> Views:
    found = [raster.render(mesh, camera) for camera in cameras]
    color, alpha = (np.stack(part).astype(np.float32) for part in zip(*found, strict=True))
    straight = np.where(alpha[..., None] > 0, color / np.maximum(alpha[..., None], 1e-6), 0).clip(0, 1)
    return Views(cameras, straight, alpha, None, None, np.zeros(len(cameras), bool), Frame(np.zeros(3), 1.0))


def elsewhere(orbit: Orbit) -> Orbit:
    """Eight directions between and above or below those of the turntable."""
    return Orbit(np.arange(8) * 45 + 11.25, orbit.elevation + 8, orbit.fov, orbit.distance)


def corrupted(views: Views, seed: int) -> Views:
    """Each view warped by a smooth field, turned in hue and changed in brightness, on its own."""
    random = np.random.default_rng(seed)
    size = views.alpha.shape[1]
    images, alphas = [], []
    for image, alpha in zip(views.images, views.alpha, strict=True):
        field = np.stack([gaussian_filter(random.normal(size=(size, size)), size / 10, mode="wrap") for _ in range(2)])
        field *= WARP * size / np.linalg.norm(field, axis=0).max()
        places = np.mgrid[:size, :size] + field
        layers = [
            map_coordinates(layer, places, order=1, mode="constant") for layer in (*np.moveaxis(image * alpha[..., None], -1, 0), alpha)
        ]
        cover = layers[3].clip(0, 1)
        straight = np.stack(layers[:3], -1) / np.maximum(cover, 1e-6)[..., None]
        turn = np.radians(random.uniform(-HUE, HUE))
        luma = straight @ (0.299, 0.587, 0.114)
        blue, red = straight[..., 2] - luma, straight[..., 0] - luma
        blue, red = np.cos(turn) * blue - np.sin(turn) * red, np.sin(turn) * blue + np.cos(turn) * red
        turned = np.stack([luma + red, luma - (0.299 * red + 0.114 * blue) / 0.587, luma + blue], -1)
        images.append((turned * (1 + random.uniform(-BRIGHTNESS, BRIGHTNESS))).clip(0, 1) * (cover > 0)[..., None])
        alphas.append(cover)
    return dataclasses.replace(views, images=np.stack(images).astype(np.float32), alpha=np.stack(alphas).astype(np.float32))


def drawn(splats: Splats, cameras: list[Camera]) -> np.ndarray:
    return np.stack([render(splats, camera, (1, 1, 1)).color for camera in cameras])


def white(views: Views) -> np.ndarray:
    return views.images * views.alpha[..., None] + 1 - views.alpha[..., None]


def in_gauge(camera: Camera, true: Orbit, by: Orbit) -> Camera:
    """A true camera in the world of an orbit that was told or found: pictures do not tell how large the subject is, only how large it is by
    the focal length over the distance, so the two worlds differ by that factor."""
    ratio = (np.tan(np.radians(true.fov) / 2) * true.distance) / (np.tan(np.radians(by.fov) / 2) * by.distance)
    return camera.moved(np.zeros(3), 1 / ratio)


# ---------------------------------------------------------------- scores


def scores(seen: np.ndarray, truth: Views, judge: FeatureDistance | None) -> dict[str, float]:
    wanted = white(truth)
    found = {
        "PSNR": float(np.mean([-10 * np.log10(((a - b) ** 2).mean()) for a, b in zip(seen, wanted, strict=True)])),
        "GMSD": float(np.mean([gmsd(a, b) for a, b in zip(seen, wanted, strict=True)])),
        "fine detail": float(np.mean([detail(a, b, cover) for a, b, cover in zip(seen, wanted, truth.alpha, strict=True)])),
    }
    if judge is not None:
        with torch.no_grad():
            a, b = (torch.tensor(np.moveaxis(one, -1, 1), dtype=torch.float32) for one in (seen, wanted))
            found[f"features ({judge.name})"] = float(judge(a, b).mean())
    return found


def luma(picture: np.ndarray) -> np.ndarray:
    return picture @ np.array([0.299, 0.587, 0.114]) * 255


def gmsd(a: np.ndarray, b: np.ndarray) -> float:
    """Xue et al. 2014: luma of 0 to 255 halved, Prewitt gradients, the constant 170."""
    maps = []
    for picture in (a, b):
        y = luma(picture)
        y = y[: len(y) // 2 * 2, : y.shape[1] // 2 * 2].reshape(len(y) // 2, 2, -1, 2).mean((1, 3))
        prewitt = np.array([[1, 0, -1]] * 3) / 3
        maps.append(np.hypot(convolve(y, prewitt, mode="nearest"), convolve(y, prewitt.T, mode="nearest")))
    one, other = maps
    return float(((2 * one * other + 170) / (one**2 + other**2 + 170)).std())


def detail(a: np.ndarray, b: np.ndarray, cover: np.ndarray) -> float:
    """Energy of the Laplacian of luma where the subject is, by the true picture's."""
    laplace = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    one, other = (float((convolve(luma(picture), laplace, mode="nearest")[cover > 0.99] ** 2).mean()) for picture in (a, b))
    return one / other


def judge_beside(loss: str) -> FeatureDistance | None:
    """A network trained here that is not the loss's."""
    from protocol.errors import KilnError

    try:
        return comparer("kiln-features") if loss != "kiln-features" else None
    except (KilnError, FileNotFoundError):
        return None


if __name__ == "__main__":
    main()
