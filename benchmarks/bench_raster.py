# environment: backend
"""Milliseconds of one full training iteration on the CPU, beside the machine's matrix product and gsplat's own torch mathematics.

An iteration is projection, sort, binning, picture, loss (random background, L1, SSIM, alpha), gradients and Adam, on Gaussians that a
500-step fit of the same views has shaped. `ms` is the least of many; `sgemm_gflops` the most of float32 matrix products run in between, so
that `ms * sgemm_gflops / 1000` (GFLOP) compares machines. `gsplat_ms` is what gsplat 1.5.3 can do on a CPU: projection, covariance and
harmonics forward and backward in torch, without any picture.

    python build.py bench raster [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import trimesh

from backend.mesh import raster
from backend.mesh.mesh import TexturedMesh
from backend.splats import fit, loss
from backend.splats.parallel import THREADS
from backend.splats.raster_cpu import Rasteriser, pack
from backend.views.cameras import look_at
from backend.views.views import Frame, Views
from protocol import recipes

SPOT = Path(__file__).resolve().parent.parent.parent / "shared" / "assets" / "static" / "spot.glb"
COUNTS, SIZES = (5_000, 20_000, 50_000), (256, 512)
VIEWS = (9, 24, 72)  # of which a fit of 20,000 splats at 256 px is timed for its growth with views
ROUNDS = 10


def subject() -> tuple[str, TexturedMesh]:
    """Spot in the unit ball; where it is not at hand, a striped torus, which has about as many tile intersections at the same count."""
    if SPOT.exists():
        name, shape = "spot", trimesh.load(SPOT, force="mesh")
        texture = np.asarray(shape.visual.material.baseColorTexture.convert("RGB"))
        uv = np.asarray(shape.visual.uv)
    else:
        name, shape = "torus", trimesh.creation.torus(0.62, 0.3, 96, 48)
        angle = np.arctan2(shape.vertices[:, 1], shape.vertices[:, 0]) / (2 * np.pi) + 0.5
        uv = np.stack([angle * 0.98 + 0.01, np.clip(shape.vertices[:, 2] + 0.5, 0, 1)], 1)
        y, x = np.mgrid[0:256, 0:256] / 256
        waves = [np.sin(40 * x), np.sin(30 * y + 9 * x), np.cos(55 * x - 20 * y)]
        texture = (127 + 120 * np.stack(waves, -1)).astype(np.uint8)
    vertices = shape.vertices - shape.bounds.mean(0)
    vertices = vertices[:, [0, 2, 1]] * (1, -1, 1) / np.linalg.norm(vertices, axis=1).max()
    normals = np.zeros_like(vertices)
    return name, TexturedMesh(
        *(values.astype(np.float32) for values in (vertices, normals, uv)), np.asarray(shape.faces, np.int32), np.ascontiguousarray(texture)
    )


def views_of(mesh: TexturedMesh, size: int, count: int = 24) -> Views:
    """`count` views on three rings."""
    cameras = []
    for elevation in np.radians((-20, 15, 50)):
        for azimuth in np.arange(count // 3) * 2 * np.pi / (count // 3):
            direction = np.array([np.cos(elevation) * np.sin(azimuth), -np.cos(elevation) * np.cos(azimuth), np.sin(elevation)])
            cameras.append(look_at(1.05 / np.sin(np.radians(20)) * direction, (0, 0, 0), size, np.radians(40)))
    pictures = [raster.render(mesh, camera) for camera in cameras]
    alpha = np.stack([cover for _, cover in pictures]).astype(np.float32)
    images = np.stack([color for color, _ in pictures]).astype(np.float32) / np.maximum(alpha, 1e-6)[..., None]
    return Views(cameras, images, alpha, None, None, np.zeros(len(cameras), bool), Frame(np.zeros(3), 1.0))


def sgemm() -> float:
    """GFLOP/s of one 1536 x 1536 product."""
    a = np.ones((1536, 1536), np.float32)
    start = time.perf_counter()
    a @ a
    return 2 * 1536**3 / (time.perf_counter() - start) / 1e9


def gsplat_projection(splats, camera) -> float:
    """Milliseconds of gsplat's torch projection, covariance and spherical harmonics, forward and backward."""
    import torch
    from gsplat.cuda._torch_impl import _fully_fused_projection, _quat_scale_to_covar_preci, _spherical_harmonics

    torch.set_num_threads(THREADS)
    fields = (splats.means, splats.quaternions, splats.log_scales, splats.sh)
    means, quaternions, scales, sh = (torch.tensor(field, requires_grad=True) for field in fields)
    view = torch.tensor(camera.camera_from_world, dtype=torch.float32)[None]
    lens = torch.tensor([[camera.fx, 0, camera.cx], [0, camera.fy, camera.cy], [0, 0, 1]], dtype=torch.float32)[None]
    eye = torch.tensor(camera.centre, dtype=torch.float32)
    least = np.inf
    for _ in range(10):
        start = time.perf_counter()
        covariance, _ = _quat_scale_to_covar_preci(quaternions, scales.exp(), compute_preci=False)
        _, centres, depths, conics, _ = _fully_fused_projection(means, covariance, view, lens, camera.width, camera.height)
        (centres.sum() + depths.sum() + conics.sum() + _spherical_harmonics(0, means - eye, sh).sum()).backward()
        least = min(least, time.perf_counter() - start)
    return 1e3 * least


def measure(views: Views, count: int) -> dict:
    """One row."""
    splats = fit.fit(views, recipes.Fit(splats=count, iterations=500, device="cpu"), 0, schedule=fit.Schedule(start_share=1.0))
    matrix = pack(splats)
    rasteriser, adam, gradients = Rasteriser(), loss.Adam(matrix), np.zeros_like(matrix)
    targets = [fit._target(views, i) for i in range(len(views))]
    weights, still = loss.Weights(0.2, 0.5, 0.0), np.zeros(len(matrix))  # Adam runs with a rate of 0: every round does the same work
    random = np.random.default_rng(0)
    best, product, entries = np.full(len(views), np.inf), 0.0, 0
    for _ in range(ROUNDS):
        product = max(product, sgemm())
        for i, camera in enumerate(views.cameras):
            start = time.perf_counter()
            background = random.random(3, dtype=np.float32)
            rasteriser.project(matrix, len(splats), camera)
            _, pulls = loss.loss_and_gradients(rasteriser, rasteriser.compose(), *targets[i], background, weights)
            rasteriser.backward(pulls, background, gradients)
            adam.step(rasteriser.threads, matrix, gradients, still)
            best[i] = min(best[i], time.perf_counter() - start)
            entries = max(entries, rasteriser.entry_count)
    ms = 1e3 * float(best.mean())
    return {
        "splats": len(splats), "pixels": views.cameras[0].width, "intersections": entries, "ms": round(ms, 2),
        "sgemm_gflops": round(product, 1), "gflop": round(ms * product / 1e3, 2),
        "gsplat_ms": round(gsplat_projection(splats, views.cameras[0]), 1), "threads": THREADS,
    }  # fmt: skip


def exponent(across: list[float], ms: list[float]) -> float:
    """Slope of log(ms) over log(across)."""
    return float(np.polyfit(np.log(across), np.log(ms), 1)[0])


def seconds_of_a_fit(views: Views) -> float:
    """Of 200 steps with 20,000 splats, preparation included."""
    start = time.perf_counter()
    fit.fit(views, recipes.Fit(splats=20_000, iterations=200, device="cpu"), 0)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    name, mesh = subject()
    rows = []
    print(f"Subject: {name}, 24 views, {THREADS} threads")
    print("| splats | pixels | intersections | ms | sgemm GFLOP/s | ms x sgemm, GFLOP | gsplat's projection in torch, ms |")
    print("|---|---|---|---|---|---|---|")
    for size in SIZES:
        views = views_of(mesh, size)
        for count in COUNTS:
            row = {"subject": name, **measure(views, count)}
            rows.append(row)
            fields = ("splats", "pixels", "intersections", "ms", "sgemm_gflops", "gflop", "gsplat_ms")
            print("| " + " | ".join(str(row[field]) for field in fields) + " |", flush=True)
    print("\n| what grows | at | ms grow with the power |\n|---|---|---|")
    for size in SIZES:
        of_size = [row for row in rows if row["pixels"] == size]
        power = exponent([row["splats"] for row in of_size], [row["ms"] for row in of_size])
        print(f"| splats, {COUNTS[0]} to {COUNTS[-1]} | {size} px | {power:.2f} |")
    for place, count in enumerate(COUNTS):
        of_count = rows[place :: len(COUNTS)]
        power = exponent([row["pixels"] ** 2 for row in of_count], [row["ms"] for row in of_count])
        print(f"| pixels of a view, {SIZES[0]}^2 to {SIZES[-1]}^2 | {count} splats | {power:.2f} |")
    fits = [min(seconds_of_a_fit(views_of(mesh, 256, count)) for _ in range(2)) for count in VIEWS]
    print(f"| views, {VIEWS[0]} to {VIEWS[-1]}, of a fit of 200 steps | 20000 splats, 256 px | {exponent(list(VIEWS), fits):.2f} |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
