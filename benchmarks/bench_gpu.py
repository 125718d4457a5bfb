# environment: backend
"""The splats' fit on an NVIDIA GPU, by gsplat and by the rasteriser that needs wheels alone, beside the CPU's.

On a machine with CUDA: fits of a procedural object at 512 px (1000 iterations, 16 and 24 views, held-out PSNR, seconds, peak memory), one
step's forward and backward pass in milliseconds and its memory at 20k, 100k and 1M splats, and how far pictures and gradients are from the
CPU's. Without CUDA it says so, compares the rasteriser's kernels with the CPU's on the CPU, and is done.

    python build.py bench gpu [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch
import trimesh

from backend.mesh import raster
from backend.mesh.mesh import TexturedMesh
from backend.splats import gpu
from backend.splats.fit import SCHEDULE, fit
from backend.splats.model import Splats
from backend.splats.raster_cpu import Rasteriser, camera_numbers, pack
from backend.splats.render import render
from backend.views.cameras import look_at
from backend.views.views import Frame, Views
from protocol import recipes

SIZE, ITERATIONS = 512, 1000
COUNTS = (20_000, 100_000, 1_000_000)
WARM, ROUNDS = 5, 30


def subject() -> TexturedMesh:
    """A striped torus in the unit ball."""
    shape = trimesh.creation.torus(0.62, 0.3, 96, 48)
    angle = np.arctan2(shape.vertices[:, 1], shape.vertices[:, 0]) / (2 * np.pi) + 0.5
    uv = np.stack([angle * 0.98 + 0.01, np.clip(shape.vertices[:, 2] + 0.5, 0, 1)], 1)
    y, x = np.mgrid[0:256, 0:256] / 256
    texture = (127 + 120 * np.stack([np.sin(40 * x), np.sin(30 * y + 9 * x), np.cos(55 * x - 20 * y)], -1)).astype(np.uint8)
    vertices = (shape.vertices / np.linalg.norm(shape.vertices, axis=1).max()).astype(np.float32)
    faces = np.asarray(shape.faces, np.int32)
    return TexturedMesh(vertices, np.zeros_like(vertices), uv.astype(np.float32), faces, np.ascontiguousarray(texture))


def views_of(mesh: TexturedMesh, count: int, size: int, held_out: int = 4) -> Views:
    """`count` views all around and some more between them that are held out."""
    heights = 1 - 2 * (np.arange(count + held_out) + 0.5) / (count + held_out)
    cameras = []
    for i, height in enumerate(heights * 0.9):
        eye = np.array([np.sqrt(1 - height**2) * np.cos(2.399963 * i), np.sqrt(1 - height**2) * np.sin(2.399963 * i), height])
        cameras.append(look_at(eye / np.sin(np.radians(20)), (0, 0, 0), size, np.radians(40)))
    pictures = [raster.render(mesh, camera) for camera in cameras]
    alpha = np.stack([cover for _, cover in pictures]).astype(np.float32)
    images = np.stack([color for color, _ in pictures]).astype(np.float32) / np.maximum(alpha, 1e-6)[..., None]
    holdout = np.zeros(len(cameras), bool)
    holdout[np.linspace(1, len(cameras) - 2, held_out).astype(int)] = True
    return Views(cameras, images, alpha, None, None, holdout, Frame(np.zeros(3), 1.0))


def psnr(splats: Splats, views: Views) -> float:
    held = views.for_scoring
    errors = [
        ((render(splats, camera).color - image * alpha[..., None]) ** 2).mean()
        for camera, image, alpha in zip(held.cameras, held.images, held.alpha, strict=True)
    ]
    return float(np.mean([-10 * np.log10(error) for error in errors]))


def cloud(count: int, degree: int = 0) -> Splats:
    """Gaussians in the unit ball, as large as those of a fit with so many, mostly opaque."""
    random = np.random.default_rng(0)
    means = random.normal(0, 1, (count, 3))
    means *= (0.7 + 0.02 * random.normal(0, 1, (count, 1))) / np.linalg.norm(means, axis=1, keepdims=True)
    scale = 0.7 * np.sqrt(4 * np.pi / count)
    return Splats(
        means=means.astype(np.float32),
        quaternions=random.normal(0, 1, (count, 4)).astype(np.float32),
        log_scales=(np.log(scale) + random.normal(-0.5, 0.4, (count, 3))).astype(np.float32),
        opacity_logits=random.normal(1, 1.5, count).astype(np.float32),
        sh=random.normal(0, 0.5, (count, (degree + 1) ** 2, 3)).astype(np.float32),
    )


def cameras_around(count: int, size: int):
    eyes = [(3 * np.cos(i), 3 * np.sin(i), 0.8 * np.cos(2 * i)) for i in range(count)]
    return [look_at(eye, (0, 0, 0), size, 0.7) for eye in eyes]


def differences(draw, device: str, count: int, size: int, views: int = 2, degree: int = 3) -> dict:
    """The largest difference of a picture, and of a gradient row in proportion to its length, from the CPU's."""
    splats, cameras = cloud(count, degree), cameras_around(views, size)
    parameters = pack(splats)
    matrix = torch.tensor(parameters[:, :count].copy(), device=device, requires_grad=True)
    numbers = torch.tensor(np.stack([camera_numbers(camera) for camera in cameras]), device=device)
    planes = draw(matrix, numbers, size, size)
    pulls = np.random.default_rng(1).normal(0, 1, planes.shape).astype(np.float32)
    (planes * torch.tensor(pulls, device=device)).sum().backward()
    total, image = np.zeros_like(parameters), 0.0
    for camera, ours, pull in zip(cameras, planes.detach().cpu().numpy(), pulls, strict=True):
        rasteriser, gradients = Rasteriser(), np.zeros_like(parameters)
        rasteriser.project(parameters, count, camera)
        padded = rasteriser.compose()
        image = max(image, float(np.abs(rasteriser.cropped(padded) - ours).max()))
        given = np.zeros_like(padded)
        given[:, :size, :size] = pull
        rasteriser.backward(given, np.zeros(3), gradients)
        total += gradients
    total, found = total[:, :count], matrix.grad.cpu().numpy()
    off = np.linalg.norm(found - total, axis=1) / np.linalg.norm(total, axis=1)
    return {"image": float(image), "gradient": float(off.max())}


def step_times(engine: gpu.Engine, count: int, views: int) -> dict:
    """Milliseconds of a forward and backward pass over several views, median of many, and the GPU memory at their peak."""
    matrix = torch.tensor(pack(cloud(count))[:, :count].copy(), device="cuda", requires_grad=True)
    numbers = torch.tensor(np.stack([camera_numbers(camera) for camera in cameras_around(views, SIZE)]), device="cuda")
    room, seconds = engine.room(), []
    used = memory_of_others()
    peak = 0
    for number in range(WARM + ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        engine.draw(matrix, numbers, SIZE, SIZE, None, room).square().mean().backward()
        torch.cuda.synchronize()
        if number >= WARM:
            seconds.append(time.perf_counter() - start)
        matrix.grad = None
        peak = max(peak, memory_of_others())
    return {"splats": count, "views": views, "ms": round(1e3 * float(np.median(seconds)), 3), "megabytes": round((peak - used) / 2**20)}


def memory_of_others() -> int:
    """Bytes of the GPU that are in use, whoever uses them: Warp has memory that torch does not know of."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def fit_row(name: str, views: Views, work) -> dict:
    """One fit: seconds without the first use of its kernels, held-out PSNR, memory."""
    start = time.perf_counter()
    splats = work()
    seconds = time.perf_counter() - start
    memory = round(torch.cuda.max_memory_allocated() / 2**20) if torch.cuda.is_available() else 0
    count = len(views.for_fitting)
    return {
        "engine": name, "views": count, "pixels": views.cameras[0].width, "splats": len(splats), "iterations": ITERATIONS,
        "seconds": round(seconds, 2), "psnr": round(psnr(splats, views), 2), "megabytes": memory,
    }  # fmt: skip


def table(rows: list[dict]) -> None:
    fields = list(rows[0])
    print("| " + " | ".join(fields) + " |\n" + "|---" * len(fields) + "|")
    for row in rows:
        print("| " + " | ".join(str(row[field]) for field in fields) + " |", flush=True)


def engines() -> list[gpu.Engine]:
    found = []
    for name, why, load in (("gsplat", gpu.why_no_gsplat, gpu._gsplat), ("Warp", gpu.why_no_warp, gpu._warp)):
        reason = why()
        if reason:
            print(f"{name} is left out: {reason}.")
            continue
        start = time.perf_counter()
        engine = load(lambda fraction, text="", preview=None: print(f"\r{text:<100}", end="", flush=True))
        problem = gpu._wrong(engine.draw, "cuda")
        print(f"\n{name} is ready after {time.perf_counter() - start:.1f} s{f', but it {problem} and is left out' if problem else ''}.")
        if not problem:
            found.append(engine)
    return found


def without_cuda() -> dict:
    try:
        from backend.splats import raster_warp
    except ImportError as error:
        print(f"The rasteriser of the GPU is not installed ({error}).")
        return {}
    start = time.perf_counter()
    rows = [{"splats": count, **differences(raster_warp.draw, "cpu", count, 64)} for count in (200, 2000)]
    print(
        f"Its kernels, run on the CPU, against the CPU's own rasteriser (64 px, 2 views, SH degree 3; {time.perf_counter() - start:.1f} s):"
    )
    table(rows)
    return {"differences": rows}


def with_cuda() -> dict:
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}")
    found: dict = {"device": name, "differences": [], "steps": [], "fits": []}
    there = engines()
    if not there:
        return found
    for engine in there:
        found["differences"].append({"engine": engine.name, **differences(engine.draw, "cuda", 20_000, 256)})
    table(found["differences"])
    for engine in there:
        for count in COUNTS:
            for views in (1, gpu.VIEWS_A_STEP):
                torch.cuda.empty_cache()
                found["steps"].append({"engine": engine.name, **step_times(engine, count, views)})
    table(found["steps"])
    p = recipes.Fit(iterations=ITERATIONS)
    for count in (16, 24):
        views = views_of(subject(), count, SIZE)
        for engine in there:
            device = torch.device("cuda")
            short = dataclasses.replace(p, iterations=50)
            gpu.fit_with(engine, device, views.for_fitting, short, 0, gpu.silent, SCHEDULE)  # the first use of every kernel
            torch.cuda.reset_peak_memory_stats()
            work = [engine, device, views.for_fitting, p, 0, gpu.silent, SCHEDULE]
            found["fits"].append(fit_row(engine.name, views, lambda work=work: gpu.fit_with(*work)))
        torch.cuda.reset_peak_memory_stats()
        on_cpu = dataclasses.replace(p, device="cpu")
        found["fits"].append(fit_row("CPU", views, lambda views=views, on_cpu=on_cpu: fit(views, on_cpu, 0)))
    table(found["fits"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    reason = gpu.why_no_cuda()
    if reason:
        print(f"No GPU is measured here: {reason}.")
    found = without_cuda() if reason else with_cuda()
    if options.json:
        options.json.write_text(json.dumps({"no_gpu": reason, **found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
