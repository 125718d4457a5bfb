"""The fit on an NVIDIA GPU: the start, the rounds of growth, rates and loss of `fit.py`, with several views a step, which fill the GPU and
cost little more than one.

Two engines draw: gsplat, where its kernels are built or a CUDA toolkit can build them, and else `raster_warp`, which needs wheels alone.
An engine is used when it draws what the CPU does (`_wrong`). Everything torch is imported late: a fit on the CPU neither waits for it nor
shares the cores with its threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from backend.progress import Progress, silent
from backend.views.cameras import look_at
from backend.views.views import Views
from protocol import recipes
from protocol.errors import KilnError

from .loss import Adam, Weights
from .model import Splats
from .raster_cpu import DILATION, LOG_SCALE, MEAN, NEAR, OPACITY, QUATERNION, SH, camera_numbers, pack, unpack

VIEWS_A_STEP = 4
WITHIN = 0.02  # of pictures (absolute) and gradients (relative) on the CPU: an engine that is further off is broken


# ---------------------------------------------------------------- which engine


@dataclass(frozen=True)
class Engine:
    """What draws and compares on the GPU; `draw` and `loss` have the signatures of `raster_warp.draw` and `loss_warp.loss_of`, and `room`
    makes what `draw` takes as its room, anew for each number of Gaussians."""

    name: str
    draw: Callable
    loss: Callable
    room: Callable = lambda: None


FOREIGN = (ImportError, OSError, RuntimeError, TypeError, ValueError, AttributeError)  # whatever a build of somebody else's may raise
_FAILED: dict[str, str] = {}  # engines that could not be loaded or drew nonsense in this process, and why


def why_not() -> str:
    """Why fits cannot run on a GPU here, as the end of a sentence; "" where an engine can be tried. Compiles nothing."""
    reason = why_no_cuda()
    if reason:
        return reason
    reasons = [why_no_gsplat(), why_no_warp()]
    return " and ".join(reasons) if all(reasons) else ""


@cache
def why_no_cuda() -> str:
    """Why torch cannot compute on a GPU."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver"
    import torch

    if torch.version.cuda is None:
        return f"the installed torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no usable NVIDIA GPU"
    return ""


def why_no_gsplat() -> str:
    """Why gsplat can neither be loaded nor be compiled."""
    if "gsplat" in _FAILED:
        return _FAILED["gsplat"]
    if importlib.util.find_spec("gsplat") is None:
        return "gsplat is not installed"
    return "" if gsplat_is_built() else _why_not_compile()


def gsplat_is_built() -> bool:
    """Whether gsplat's kernels come with its wheel or were compiled before, so that loading them takes a second."""
    if importlib.util.find_spec("gsplat.csrc") is not None:
        return True
    from torch.utils import cpp_extension

    try:
        folder = Path(cpp_extension._get_build_directory("gsplat_cuda", False))  # makes it
    except OSError:  # a home that cannot be written to
        return False
    return any((folder / f"gsplat_cuda{ending}").exists() for ending in (".so", ".pyd", ".lib"))


@cache
def _why_not_compile() -> str:
    """Why gsplat cannot be compiled: that takes a CUDA toolkit of torch's own version and a host compiler."""
    import torch
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    compiler = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None
    if not compiler:
        return "gsplat has no built kernels and there is no CUDA toolkit (nvcc) to build them"
    try:
        said = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    release = re.search(r"release (\d+)\.", said)
    if not release or not torch.version.cuda or release[1] != torch.version.cuda.split(".")[0]:
        version = f"CUDA {release[1]}" if release else "no CUDA that it names"
        return f"gsplat has no built kernels and {compiler} is of {version}, torch of CUDA {torch.version.cuda}"
    if shutil.which("cl" if sys.platform == "win32" else os.environ.get("CXX", "c++")) is None:
        return "gsplat has no built kernels and there is no C++ compiler to build them"
    return ""


def why_no_warp() -> str:
    """Why NVIDIA Warp cannot draw on the GPU."""
    if "Warp" in _FAILED:
        return _FAILED["Warp"]
    if importlib.util.find_spec("warp") is None:
        return "NVIDIA Warp is not installed"
    import warp

    if not warp.is_cuda_available():
        return f"NVIDIA Warp {warp.__version__} finds no GPU that it can use: the driver may be too old"
    return ""


def sentence(device: str) -> str:
    """Where a fit on `device` ("auto", "cpu", "cuda") runs and why, for a person."""
    if device == "cpu":
        return "The splats are fitted on the CPU, as asked."
    reason = why_not()
    return f"The splats are fitted on the CPU. The GPU is not used: {reason}." if reason else "The splats are fitted on the GPU."


def engine_for_this_gpu(progress: Progress = silent) -> Engine | None:
    """The engine that draws here, loaded, or None (`why_not` says why). The first use on a computer compiles kernels, and says so.

    A GPU without room says nothing about an engine: `torch.cuda.OutOfMemoryError` is passed on, and a later fit tries again.
    """
    import torch

    for name, why, load in (("gsplat", why_no_gsplat, _gsplat), ("Warp", why_no_warp, _warp)):
        if why():
            continue
        try:
            engine = load(progress)
            progress(0.0, f"Trying {name}")
            problem = _wrong(engine.draw, "cuda")
        except torch.cuda.OutOfMemoryError:
            raise
        except FOREIGN as error:
            problem = _said(error)
        if not problem:
            return engine
        _FAILED[name] = f"{name} {problem}"
        print(f"The GPU engine {_FAILED[name]}", file=sys.stderr)
    return None


def _said(error: Exception) -> str:
    last = (str(error).strip().splitlines() or [""])[-1]
    return f"could not be built or loaded ({type(error).__name__}: {last[:200]})"


def _gsplat(progress: Progress) -> Engine:
    if not gsplat_is_built():
        _compile_gsplat(progress)
    from gsplat.cuda._backend import _C

    if _C is None:
        raise ImportError("no kernels")
    return Engine("gsplat", draw_with_gsplat, _loss_beside_gsplat(progress))


def _loss_beside_gsplat(progress: Progress) -> Callable:
    """Warp's loss, the quicker one, where it gives what plain torch does; else torch's."""
    import torch

    if why_no_warp():
        return loss_in_torch
    try:
        loss = _warp(progress).loss
        problem = _wrong_loss(loss, "cuda")
    except torch.cuda.OutOfMemoryError:
        raise
    except FOREIGN as error:
        problem = _said(error)
    if not problem:
        return loss
    _FAILED["Warp"] = f"Warp {problem}"
    print(f"The GPU engine {_FAILED['Warp']}", file=sys.stderr)
    return loss_in_torch


@cache
def _loaded_warp() -> Engine:
    from . import loss_warp, raster_warp

    return Engine("Warp", raster_warp.draw, loss_warp.loss_of, raster_warp.Room)


def _warp(progress: Progress) -> Engine:
    progress(0.0, "Loading the GPU's kernels (compiled once on a computer, in some seconds)")
    return _loaded_warp()


def _compile_gsplat(progress: Progress) -> None:
    """Compiles gsplat's kernels in a process of its own, which ends when `progress` raises."""
    program = "import sys; from gsplat.cuda._backend import _C; sys.exit(_C is None)"
    group: dict = {} if sys.platform == "win32" else {"start_new_session": True}
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen([sys.executable, "-c", program], stdout=said, stderr=subprocess.STDOUT, **group)
        try:
            while process.poll() is None:
                elapsed = int(time.monotonic() - began)
                progress(0.0, f"Compiling gsplat for this GPU, once on a computer, some minutes: {elapsed // 60}:{elapsed % 60:02d}")
                time.sleep(0.25)
        finally:
            if process.poll() is None:
                _end(process)
        if process.returncode:
            said.seek(0)
            raise ImportError((said.read().strip().splitlines() or ["the compiler said nothing"])[-1])


def _end(process: subprocess.Popen) -> None:
    """Ends a process with all that it started."""
    if sys.platform == "win32":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wrong(draw: Callable, device: str) -> str:
    """What is wrong with an engine, as the end of a sentence: it draws some Gaussians, and the CPU's kernels say how that should look."""
    import torch

    from . import autograd

    random = np.random.default_rng(0)
    count, size = 64, 40
    splats = Splats(
        means=random.normal(0, 0.4, (count, 3)).astype(np.float32),
        quaternions=random.normal(0, 1, (count, 4)).astype(np.float32),
        log_scales=random.normal(-2.5, 0.5, (count, 3)).astype(np.float32),
        opacity_logits=random.normal(0.5, 1, count).astype(np.float32),
        sh=random.normal(0, 0.5, (count, 4, 3)).astype(np.float32),
    )
    camera = look_at((0.5, -3, 0.5), (0, 0, 0), size, 0.7)
    pulls = torch.tensor(random.normal(0, 1, (5, size, size)).astype(np.float32))
    fields = [splats.means, splats.quaternions, splats.log_scales, splats.opacity_logits, splats.sh]
    means, quaternions, log_scales, logits, sh = truth = [torch.tensor(field, requires_grad=True) for field in fields]
    color, depth, alpha = autograd.draw(means, quaternions, log_scales, logits, sh, camera)
    wanted = torch.cat([color.permute(2, 0, 1), depth[None], alpha[None]])
    (wanted * pulls).sum().backward()
    matrix = torch.tensor(pack(splats)[:, :count].copy(), device=device, requires_grad=True)
    planes = draw(matrix, torch.tensor(camera_numbers(camera), device=device)[None], size, size)[0]
    (planes * pulls.to(device)).sum().backward()
    off = float((planes.detach().cpu() - wanted.detach()).abs().max())
    if not off < WITHIN:
        return f"draws other pictures than the CPU (by {off:.2g})"
    gradients = torch.cat([part.grad.reshape(count, -1) for part in truth], 1).T
    off = float((matrix.grad.cpu() - gradients).norm() / gradients.norm())
    return "" if off < WITHIN else f"finds other gradients than the CPU (by {off:.2g})"


def _wrong_loss(loss: Callable, device: str) -> str:
    """What is wrong with a loss and its gradient, as the end of a sentence; plain torch says what they should be."""
    import torch

    random = torch.Generator().manual_seed(0)
    planes, targets = (torch.rand((2, 5, 24, 40), generator=random).to(device) for _ in range(2))
    backgrounds, counts = torch.rand((2, 3), generator=random).to(device), torch.rand((2, 24, 40), generator=random).to(device)
    found = []
    for one in (loss, loss_in_torch):
        drawn = planes.clone().requires_grad_()
        value = one(drawn, targets, backgrounds, Weights(0.2, 0.5, 0.1), counts)
        value.backward()
        found.append((value.item(), drawn.grad))
    (value, gradient), (truth, wanted) = found
    off = max(abs(value / truth - 1), float((gradient - wanted).norm() / wanted.norm()))
    return "" if off < WITHIN else f"finds another loss than torch (by {off:.2g})"


# ---------------------------------------------------------------- gsplat in this project's conventions


def draw_with_gsplat(parameters, cameras, width: int, height: int, pulled=None, room=None, features=None):
    """`raster_warp.draw` through gsplat (`room` is not needed: gsplat counts its entries itself)."""
    import gsplat
    import torch

    views, lenses = _matrices(cameras)
    rows = parameters.T
    means, quaternions = rows[:, MEAN:QUATERNION].contiguous(), rows[:, QUATERNION:LOG_SCALE].contiguous()
    scales = rows[:, LOG_SCALE:OPACITY].exp()
    sh = rows[:, SH:].reshape(len(rows), -1, 3)
    composed = features
    if features is None:
        directions = (means[None] - cameras[:, None, 16:19]).contiguous()
        degree = round(sh.shape[1] ** 0.5) - 1
        color = gsplat.spherical_harmonics(degree, directions, sh[None].expand(len(views), -1, -1, -1).contiguous())
        planes = _depth_planes(means, quaternions, scales, views, lenses, width, height)
        composed = torch.cat([torch.clamp_min(color + 0.5, 0.0), planes], -1)
    picture, alpha, meta = gsplat.rasterization(
        means=means,
        quats=quaternions,
        scales=scales,
        opacities=rows[:, OPACITY].sigmoid(),
        colors=composed,
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
    if pulled is not None and centres.requires_grad:

        def note(gradient):
            strength = gradient.norm(dim=-1)
            pulled[0] += strength.sum(0)
            pulled[1] += (strength > 0).sum(0)

        centres.register_hook(note)
    last = picture[..., 3]
    if features is None:
        x = torch.arange(width, device=means.device) + 0.5
        y = torch.arange(height, device=means.device)[:, None] + 0.5
        last = last + x * picture[..., 4] + y * picture[..., 5]
    return torch.cat([picture[..., :3].permute(0, 3, 1, 2), last[:, None], alpha.permute(0, 3, 1, 2)], 1)


def _matrices(cameras):
    """View matrices V x 4 x 4 and intrinsics V x 3 x 3 of `camera_numbers`."""
    import torch

    views = torch.eye(4, device=cameras.device).repeat(len(cameras), 1, 1)
    views[:, :3, :3], views[:, :3, 3] = cameras[:, :9].reshape(-1, 3, 3), cameras[:, 9:12]
    lenses = torch.eye(3, device=cameras.device).repeat(len(cameras), 1, 1)
    lenses[:, 0, 0], lenses[:, 1, 1], lenses[:, :2, 2] = cameras[:, 12], cameras[:, 13], cameras[:, 14:16]
    return views, lenses


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


def loss_in_torch(planes, targets, backgrounds, weights: Weights, counts=None):
    """`loss_warp.loss_of` in plain torch, for a GPU that Warp does not run on; several times slower."""
    import torch

    alpha, background = planes[:, 4:5], backgrounds[:, :, None, None]
    share = 1.0 if counts is None else counts[:, None]
    truth = targets[:, :3] + (1 - targets[:, 3:4]) * background
    picture = truth + share * (planes[:, :3] + (1 - alpha) * background - truth)
    loss = (1 - weights.ssim) * (picture - truth).abs().mean() + weights.alpha * (share * (alpha - targets[:, 3:4])).abs().mean()
    if weights.ssim > 0:
        loss = loss + weights.ssim * _dissimilarity(picture, truth)
    if weights.depth > 0:
        known = targets[:, 4:5]
        loss = loss + weights.depth * torch.where(known > 0, share * (planes[:, 3:4] - known * alpha).abs(), 0).mean()
    return loss


def _dissimilarity(a, b):
    """Mean of 1 - SSIM over pictures V x 3 x H x W; the window and constants of `loss.py`."""
    import torch
    from torch.nn import functional

    window = torch.exp(-0.5 * (torch.arange(11, device=a.device) - 5.0) ** 2 / 1.5**2)
    window = window / window.sum()

    def blurred(x):
        channels = x.shape[1]
        x = functional.conv2d(x, window[None, None, :, None].expand(channels, 1, 11, 1), padding=(5, 0), groups=channels)
        return functional.conv2d(x, window[None, None, None, :].expand(channels, 1, 1, 11), padding=(0, 5), groups=channels)

    mean_a, mean_b, squares, products = blurred(torch.cat([a, b, a * a + b * b, a * b], 1)).chunk(4, 1)
    both, lengths = mean_a * mean_b, mean_a**2 + mean_b**2
    ssim = (2 * both + 0.01**2) * (2 * (products - both) + 0.03**2) / ((lengths + 0.01**2) * (squares - lengths + 0.03**2))
    return 1 - ssim.mean()


# ---------------------------------------------------------------- the fit


def fit_on_cuda(views: Views, p: recipes.Fit, seed: int, progress: Progress, schedule, counts=None) -> Splats:
    """`fit.fit` on the first NVIDIA GPU. Gradients are summed by atomics: results repeat closely, not bit by bit.

    Where no engine turns out to work, the CPU fits, unless the GPU was asked for by name (`KilnError("no-device")`).
    """
    import torch

    from . import fit as shared

    try:
        engine = engine_for_this_gpu(progress)
        if engine is None:
            shared.runs_on_cuda(p.device)  # refuses where the GPU was asked for
            progress(0.0, sentence(p.device))
            return shared._fit_on_cpu(views, p, seed, progress, schedule, counts)
        return fit_with(engine, torch.device("cuda"), views, p, seed, progress, schedule, counts)
    except torch.cuda.OutOfMemoryError:
        free, all_of_it = (round(size / 2**30, 1) for size in torch.cuda.mem_get_info())
        raise KilnError(
            "out-of-memory", f"The GPU's memory is full ({free} of {all_of_it} GB free).",
            "Ask for fewer splats or smaller views, close what else uses the GPU, or choose the device 'cpu'.",
        ) from None  # fmt: skip


def fit_with(engine: Engine, device, views: Views, p: recipes.Fit, seed: int, progress: Progress, schedule, counts=None) -> Splats:
    """The fit by an engine on a torch device. Between reports and rounds of growth the host never waits for the device."""
    import torch

    from . import fit as shared
    from . import shape_torch

    progress(0.0, "Placing splats")
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    start = shared.first_splats(views, p, random, schedule, counts)
    progress(0.02, "Preparing the GPU")
    height, width = views.alpha.shape[1:]
    weights = Weights(p.ssim_weight, p.alpha_weight, p.depth_weight if views.depth is not None else 0.0)
    targets = torch.empty((len(views), 5, height, width), device=device)
    for index, target in enumerate(targets):
        target.copy_(torch.from_numpy(_target(views, index)))
    shares = None if counts is None else torch.tensor(counts, device=device)
    cameras = torch.tensor(np.stack([camera_numbers(camera) for camera in views.cameras]), device=device)
    shape = shared.shape_weights(views, p)
    normals = (
        torch.tensor(views.normals, device=device) if shape.normal > 0 and views.depth is not None and views.normals is not None else None
    )
    preview = shared.preview_camera(views.cameras)
    orders, rounds = shared.Orders(len(views), random), set(shared.growth_steps(p.iterations, schedule))
    at_once = min(VIEWS_A_STEP, len(views))
    looks = torch.tensor([[orders.next() for _ in range(at_once)] for _ in range(p.iterations)], device=device)
    black = torch.zeros((at_once, 3), device=device)

    state = _State(torch, device, engine, pack(start)[:, : len(start)])
    reported = time.monotonic()
    shown = reported - shared.PREVIEW_EVERY
    for step in range(p.iterations):
        chosen = looks[step]
        matrix = torch.cat(state.parts)
        matrix.register_hook(_only_numbers)
        before = cameras.index_select(0, chosen)
        target = targets.index_select(0, chosen)
        planes = engine.draw(matrix, before, width, height, state.pulled, state.room)
        plain = step % 2 == 1 or not p.random_background
        background = black if plain else torch.rand((at_once, 3), device=device)
        loss = engine.loss(planes, target, background, weights, None if shares is None else shares.index_select(0, chosen))
        if shape:
            depth, facing = target[:, 4], None if normals is None else normals.index_select(0, chosen).float()
            if shape.normal > 0 and facing is None:
                depth, facing = shape_torch.surface_of_pictures(before, planes)
            loss = loss + shape_torch.shape_of(matrix, before, target[:, 3], depth, facing, shape)
        if shape.distortion > 0:
            loss = loss + shape.distortion * shape_torch.distortion_of(engine.draw, matrix, before, width, height, state.room)
        state.adam.zero_grad(set_to_none=True)
        loss.backward()
        state.step(shared.rates(schedule, state.rows, step / p.iterations))
        if step + 1 in rounds:
            if not torch.isfinite(loss):
                raise KilnError(
                    "fit-diverged", f"The fit broke down at step {step}: its loss is no number.", "Try another seed or fewer splats."
                )
            state.grow(p.splats, schedule, shared)
        now = time.monotonic()
        if now - reported > shared.REPORT_EVERY:
            picture = None
            if now - shown > shared.PREVIEW_EVERY:
                shown = now
                with torch.no_grad():
                    camera = torch.tensor(camera_numbers(preview), device=device)[None]
                    seen = engine.draw(torch.cat(state.parts), camera, preview.width, preview.height)[0].cpu().numpy()
                picture = np.moveaxis(seen[:3] + shared.PAPER[:, None, None] * (1 - seen[4]), 0, -1).clip(0, 1)
            elif device.type == "cuda":
                torch.cuda.synchronize(device)  # what is reported as done is done
            reported = time.monotonic()
            done = 0.02 + 0.98 * (step + 1) / p.iterations
            progress(done, f"Step {step + 1} of {p.iterations}, {state.count} splats, GPU ({engine.name})", picture)
    result = state.matrix()
    if not np.isfinite(result).all():
        raise KilnError("fit-diverged", "The fit broke down: some splats are not numbers.", "Try another seed or fewer splats.")
    return unpack(result, state.count)


def _only_numbers(gradient):
    """What is not a number counts as zero, as it does on the CPU."""
    return gradient.nan_to_num(0.0, 0.0, 0.0)


def _target(views: Views, index: int) -> np.ndarray:
    """A view as planes: red, green, blue on black, alpha, depth (0 where unknown)."""
    alpha = views.alpha[index]
    depth = np.zeros_like(alpha) if views.depth is None else np.where(alpha > 0, views.depth[index], 0)
    layers = [*np.moveaxis(views.images[index] * alpha[..., None], -1, 0), alpha, depth]
    return np.ascontiguousarray(np.stack(layers), dtype=np.float32)


class _State:
    """What a fit changes: the parameters as one tensor for each range of rows that has a rate of its own, Adam, and what growth needs."""

    def __init__(self, torch, device, engine: Engine, matrix: np.ndarray, moments=None):
        self.torch, self.device, self.engine, self.rows = torch, device, engine, len(matrix)
        groups = [(MEAN, QUATERNION), (QUATERNION, LOG_SCALE), (LOG_SCALE, OPACITY), (OPACITY, SH), (SH, SH + 3), (SH + 3, self.rows)]
        self.groups = [(a, b) for a, b in groups if b > a]
        self.parts = [torch.tensor(matrix[a:b].copy(), device=device, requires_grad=True) for a, b in self.groups]
        keep = (Adam.KEEP1, Adam.KEEP2)
        self.adam = torch.optim.Adam([{"params": [part]} for part in self.parts], eps=Adam.SMALL, betas=keep, fused=True)
        if moments is not None:
            first, second, steps = moments
            for (a, b), part in zip(self.groups, self.parts, strict=True):
                self.adam.state[part] = {
                    "step": torch.tensor(float(steps), device=device),
                    "exp_avg": torch.tensor(first[a:b].copy(), device=device),
                    "exp_avg_sq": torch.tensor(second[a:b].copy(), device=device),
                }
        self.count = matrix.shape[1]
        self.pulled = torch.zeros((2, self.count), device=device)
        self.room = engine.room()

    def step(self, rates: np.ndarray) -> None:
        for (first_row, _), group in zip(self.groups, self.adam.param_groups, strict=True):
            group["lr"] = float(rates[first_row])
        self.adam.step()

    def matrix(self) -> np.ndarray:
        return self.torch.cat(self.parts).detach().cpu().numpy()

    def grow(self, most: int, schedule, shared) -> None:
        """One round of growth, in place; the moments go with their Gaussians."""
        states = [self.adam.state[part] for part in self.parts]
        steps = int(states[0]["step"])
        first, second = (self.torch.cat([state[name] for state in states]).cpu().numpy() for name in ("exp_avg", "exp_avg_sq"))
        pull, seen = self.pulled.cpu().numpy().astype(float)
        matrix, kept = shared.pruned_and_grown(self.matrix(), pull, seen, most, schedule)
        if matrix.shape[1] == 0:
            raise KilnError("fit-diverged", "All splats have faded away.", "Check that pictures, alpha and cameras belong together.")
        first, second = (np.where(kept >= 0, moments[:, kept], 0) for moments in (first, second))
        self.__init__(self.torch, self.device, self.engine, matrix, (first, second, steps))  # type: ignore[misc]
