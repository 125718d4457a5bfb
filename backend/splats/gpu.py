"""The fit on an NVIDIA GPU: gsplat's kernels and torch's Adam, with the start, the rounds of growth, rates and loss of `fit.py`.

Each step looks at several views at once, which fills the GPU and costs little more than one. Everything torch is imported late: a fit
on the CPU neither waits for it nor shares the cores with its threads. gsplat compiles its kernels on first use where none are installed.
"""

from __future__ import annotations

import ctypes
import sys
import time
from functools import cache

import numpy as np

from backend.progress import Progress
from backend.views.cameras import Camera
from backend.views.views import Views
from protocol import recipes
from protocol.errors import KilnError

from .loss import Adam
from .model import Splats
from .raster_cpu import DILATION, LOG_SCALE, MEAN, NEAR, OPACITY, QUATERNION, SH

VIEWS_A_STEP = 4


@cache
def why_not() -> str:
    """Why fits cannot run here, as the end of a sentence; "" if they can. May compile gsplat, which takes minutes the first time."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver"
    import torch

    if torch.version.cuda is None:
        return f"the installed torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no usable NVIDIA GPU"
    try:
        from gsplat.cuda._backend import _C
    except Exception as error:  # a failed compilation ends in whatever the compiler's wrapper raises
        return f"gsplat's kernels could not be built or loaded ({type(error).__name__}: {str(error).strip().splitlines()[-1:]})"
    if _C is None:
        return "gsplat has no built kernels and there is no CUDA toolkit (nvcc) to build them"
    return ""


def draw(parameters, cameras, width: int, height: int, sh_degree: int):
    """gsplat's picture of each camera in the conventions of `raster_cpu`.

    parameters: the rows of the parameter matrix as (N, rows) on the GPU. cameras: (view matrices V x 4 x 4, intrinsics V x 3 x 3).
    Returns colour on black V x H x W x 3, accumulated depth V x H x W, alpha V x H x W, and projected centres with their gradient retained.
    """
    import gsplat
    import torch

    views, lenses = cameras
    means, quaternions = parameters[:, MEAN:QUATERNION], parameters[:, QUATERNION:LOG_SCALE]
    scales = parameters[:, LOG_SCALE:OPACITY].exp()
    sh = parameters[:, SH:].reshape(len(parameters), -1, 3)
    eyes = torch.linalg.inv(views)[:, :3, 3]
    directions = (means[None] - eyes[:, None]).contiguous()
    color = gsplat.spherical_harmonics(sh_degree, directions, sh[None].expand(len(views), -1, -1, -1).contiguous())
    planes = _depth_planes(means, quaternions, scales, views, lenses, width, height)
    features, alpha, meta = gsplat.rasterization(
        means=means,
        quats=quaternions,
        scales=scales,
        opacities=parameters[:, OPACITY].sigmoid(),
        colors=torch.cat([torch.clamp_min(color + 0.5, 0.0), planes], -1),
        viewmats=views,
        Ks=lenses,
        width=width,
        height=height,
        near_plane=float(NEAR),
        eps2d=float(DILATION),
        packed=False,
        rasterize_mode="classic",
    )
    centres = meta["means2d"]
    if centres.requires_grad:
        centres.retain_grad()
    y, x = torch.meshgrid(torch.arange(height, device=means.device) + 0.5, torch.arange(width, device=means.device) + 0.5, indexing="ij")
    depth = features[..., 3] + x * features[..., 4] + y * features[..., 5]
    return features[..., :3], depth, alpha[..., 0], centres


def _depth_planes(means, quaternions, scales, views, lenses, width: int, height: int):
    """Each Gaussian's depth as a plane over the picture, V x N x (value at pixel 0, 0; slopes by x and y): `slopes` of `raster_cpu`."""
    import torch

    turn = views[:, :3, :3]
    x, y, z = (torch.einsum("vij,nj->vni", turn, means) + views[:, None, :3, 3]).unbind(-1)
    z = z.clamp_min(float(NEAR))
    fx, fy, cx, cy = (lenses[:, i, j, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    u, v = fx * x / z + cx, fy * y / z + cy
    slack_x, slack_y = 0.15 * width / fx, 0.15 * height / fy
    along_x = torch.minimum(torch.maximum(x / z, -cx / fx - slack_x), (width - cx) / fx + slack_x)
    along_y = torch.minimum(torch.maximum(y / z, -cy / fy - slack_y), (height - cy) / fy + slack_y)
    q = torch.nn.functional.normalize(quaternions, dim=-1)
    a, b, c, d = q.unbind(-1)
    axes = torch.stack([
        1 - 2 * (c * c + d * d), 2 * (b * c - a * d), 2 * (b * d + a * c),
        2 * (b * c + a * d), 1 - 2 * (b * b + d * d), 2 * (c * d - a * b),
        2 * (b * d - a * c), 2 * (c * d + a * b), 1 - 2 * (b * b + c * c),
    ], -1).reshape(-1, 3, 3)  # fmt: skip
    spread = torch.einsum("vij,njk->vnik", turn, axes * scales[:, None, :])
    across_x = (fx / z)[..., None] * (spread[:, :, 0] - along_x[..., None] * spread[:, :, 2])
    across_y = (fy / z)[..., None] * (spread[:, :, 1] - along_y[..., None] * spread[:, :, 2])
    xx, yy = (across_x**2).sum(-1) + float(DILATION), (across_y**2).sum(-1) + float(DILATION)
    xy = (across_x * across_y).sum(-1)
    zx, zy = (across_x * spread[:, :, 2]).sum(-1), (across_y * spread[:, :, 2]).sum(-1)
    determinant = xx * yy - xy * xy
    slope_x, slope_y = (yy * zx - xy * zy) / determinant, (xx * zy - xy * zx) / determinant
    return torch.stack([z - slope_x * u - slope_y * v, slope_x, slope_y], -1)


def _cameras(cameras: list[Camera], device):
    import torch

    views = np.stack([camera.camera_from_world for camera in cameras])
    lenses = np.array([[[c.fx, 0, c.cx], [0, c.fy, c.cy], [0, 0, 1]] for c in cameras])
    return torch.tensor(views, dtype=torch.float32, device=device), torch.tensor(lenses, dtype=torch.float32, device=device)


def _dissimilarity(a, b, window):
    """Mean of 1 - SSIM over pictures V x 3 x H x W; the window and constants of `loss.py`."""
    import torch
    from torch.nn import functional

    def blurred(x):
        channels = x.shape[1]
        x = functional.conv2d(x, window[None, None, :, None].expand(channels, 1, 11, 1), padding=(5, 0), groups=channels)
        return functional.conv2d(x, window[None, None, None, :].expand(channels, 1, 1, 11), padding=(0, 5), groups=channels)

    mean_a, mean_b, squares, products = blurred(torch.cat([a, b, a * a + b * b, a * b], 1)).chunk(4, 1)
    both, lengths = mean_a * mean_b, mean_a**2 + mean_b**2
    ssim = (2 * both + 0.01**2) * (2 * (products - both) + 0.03**2) / ((lengths + 0.01**2) * (squares - lengths + 0.03**2))
    return 1 - ssim.mean()


def fit_on_cuda(views: Views, p: recipes.Fit, seed: int, progress: Progress, schedule) -> Splats:
    """`fit.fit` on the first NVIDIA GPU. Gradients are summed by atomics: results repeat closely, not bit by bit."""
    import torch

    from . import fit as shared
    from .raster_cpu import unpack

    device = torch.device("cuda")
    try:
        return _fit(torch, device, views, p, seed, progress, schedule, shared, unpack)
    except torch.cuda.OutOfMemoryError:
        free, all_of_it = (round(size / 2**30, 1) for size in torch.cuda.mem_get_info())
        raise KilnError(
            "out-of-memory", f"The GPU's memory is full ({free} of {all_of_it} GB free).",
            "Ask for fewer splats or smaller views, close what else uses the GPU, or choose the device 'cpu'.",
        ) from None  # fmt: skip


def _fit(torch, device, views, p, seed, progress, schedule, shared, unpack) -> Splats:
    progress(0.0, "Placing splats")
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    start = shared.first_splats(views, p, random, schedule)
    matrix = shared.pack(start)[:, : len(start)]
    progress(0.02, "Preparing the GPU")
    height, width = views.alpha.shape[1:]
    alphas = torch.tensor(views.alpha, device=device)
    targets = torch.tensor(views.images, device=device) * alphas[..., None]
    depths = None if views.depth is None else torch.tensor(np.where(views.alpha > 0, views.depth, 0), device=device)
    every_view, every_lens = _cameras(views.cameras, device)
    preview = shared.preview_camera(views.cameras)
    window = torch.exp(-0.5 * (torch.arange(11, device=device) - 5.0) ** 2 / 1.5**2)
    window /= window.sum()

    def optimiser(matrix: np.ndarray, moments=None):
        """One tensor for each row range that has its own rate, and Adam over them."""
        groups = [(MEAN, QUATERNION), (QUATERNION, LOG_SCALE), (LOG_SCALE, OPACITY), (OPACITY, SH), (SH, SH + 3), (SH + 3, len(matrix))]
        groups = [(a, b) for a, b in groups if b > a]
        parts = [torch.tensor(matrix[a:b].T.copy(), device=device, requires_grad=True) for a, b in groups]
        adam = torch.optim.Adam([{"params": [part]} for part in parts], eps=Adam.SMALL, betas=(Adam.KEEP1, Adam.KEEP2), fused=True)
        if moments is not None:
            first, second, steps = moments
            for (a, b), part in zip(groups, parts, strict=True):
                adam.state[part] = {
                    "step": torch.tensor(float(steps), device=device),
                    "exp_avg": torch.tensor(first[a:b].T.copy(), device=device),
                    "exp_avg_sq": torch.tensor(second[a:b].T.copy(), device=device),
                }
        return groups, parts, adam

    groups, parts, adam = optimiser(matrix)
    count = len(parts[0])
    pull, seen = torch.zeros(count, device=device), torch.zeros(count, device=device)
    orders, rounds = shared.Orders(len(views), random), set(shared.growth_steps(p.iterations, schedule))
    reported = time.monotonic()
    shown = reported - shared.PREVIEW_EVERY
    for step in range(p.iterations):
        chosen = [orders.next() for _ in range(min(VIEWS_A_STEP, len(views)))]
        color, depth, alpha, centres = draw(torch.cat(parts, 1), (every_view[chosen], every_lens[chosen]), width, height, p.sh_degree)
        background = torch.rand(len(chosen), 1, 1, 3, device=device)
        if step % 2 == 1 or not p.random_background:
            background.zero_()
        picture = color + (1 - alpha[..., None]) * background
        truth = targets[chosen] + (1 - alphas[chosen][..., None]) * background
        loss = (1 - p.ssim_weight) * (picture - truth).abs().mean() + p.alpha_weight * (alpha - alphas[chosen]).abs().mean()
        if p.ssim_weight > 0:
            loss = loss + p.ssim_weight * _dissimilarity(picture.permute(0, 3, 1, 2), truth.permute(0, 3, 1, 2), window)
        if depths is not None and p.depth_weight > 0:
            known = depths[chosen]
            loss = loss + p.depth_weight * torch.where(known > 0, (depth - known * alpha).abs(), 0).mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        rates = shared.rates(schedule, len(matrix), step / p.iterations)
        for (first_row, _), group in zip(groups, adam.param_groups, strict=True):
            group["lr"] = float(rates[first_row])
        adam.step()
        with torch.no_grad():
            moved = centres.grad.norm(dim=-1)
            pull += moved.sum(0)
            seen += (moved > 0).sum(0)
        if step + 1 in rounds:
            if not torch.isfinite(loss):
                raise KilnError(
                    "fit-diverged", f"The fit broke down at step {step}: its loss is no number.", "Try another seed or fewer splats."
                )
            states = [adam.state[part] for part in parts]
            steps = int(states[0]["step"])
            first, second = (torch.cat([state[name] for state in states], 1).T.cpu().numpy() for name in ("exp_avg", "exp_avg_sq"))
            matrix = torch.cat(parts, 1).detach().T.cpu().numpy()
            matrix, kept = shared.pruned_and_grown(matrix, pull.cpu().numpy(), seen.cpu().numpy(), p.splats, schedule)
            if matrix.shape[1] == 0:
                raise KilnError("fit-diverged", "All splats have faded away.", "Check that pictures, alpha and cameras belong together.")
            first, second = (np.where(kept >= 0, moments[:, kept], 0) for moments in (first, second))
            groups, parts, adam = optimiser(matrix, (first, second, steps))
            count = len(parts[0])
            pull, seen = torch.zeros(count, device=device), torch.zeros(count, device=device)
        now = time.monotonic()
        if now - reported > shared.REPORT_EVERY:
            reported, picture = now, None
            if now - shown > shared.PREVIEW_EVERY:
                shown = now
                with torch.no_grad():
                    color, _, alpha, _ = draw(torch.cat(parts, 1), _cameras([preview], device), preview.width, preview.height, p.sh_degree)
                    picture = (color[0].cpu().numpy() + shared.PAPER * (1 - alpha[0].cpu().numpy()[..., None])).clip(0, 1)
            progress(0.02 + 0.98 * (step + 1) / p.iterations, f"Step {step + 1} of {p.iterations}, {count} splats, GPU", picture)
    result = torch.cat(parts, 1).detach().T.cpu().numpy()
    if not np.isfinite(result).all():
        raise KilnError("fit-diverged", "The fit broke down: some splats are not numbers.", "Try another seed or fewer splats.")
    return unpack(result, count)
