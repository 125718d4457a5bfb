"""Splats from views that do not quite agree, as a video model makes them: IM-3D, section 3.3 and appendix A.1.

The loss compares whole pictures: a network's features (LPIPS), MS-SSIM and the silhouette. A pixel's colour has no say of its own, so a
detail that each view shows a little elsewhere is not averaged away. Where the cameras are not known exactly they are found along with the
splats, by the gradient of the same loss through the rasteriser.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from backend.nets.lpips import FeatureDistance
from backend.progress import Progress, silent
from backend.views.cameras import Camera
from backend.views.orbit import Orbit
from backend.views.views import Views
from protocol import recipes
from protocol.errors import KilnError

from . import fit as shared
from . import gpu
from .autograd import ONE_THREAD, draw_views
from .image_loss import Gradients, comparer, ms_ssim, settled
from .model import Splats
from .raster_cpu import MEAN, QUATERNION, camera_numbers, pack, unpack
from .start import OPACITY

# Taken in turns. Generated pictures stand on white, which suits their edges best; on white alone, white splats around the subject would be
# right in every view.
BACKGROUNDS = (1.0, 0.0)


@dataclass(frozen=True)
class Cameras:
    """How far cameras may go in a whole fit if all steps went one way at the first rate; they step when every view has been looked at.

    azimuth, elevation: degrees. focal: of the logarithm of the focal length. rest: share of the fit, at its start, for which they stand
    still: there is nothing to align with yet. focal_rest: the same of the focal length, which shows in little but what the elevation shows
    too. end: factor on the rates at the end.
    """

    azimuth: float = 12.0
    elevation: float = 100.0
    focal: float = 4.0
    rest: float = 0.05
    focal_rest: float = 0.3
    end: float = 0.02


CAMERAS = Cameras()
BALL, EXTENT = 0.5, 0.04  # unit frame: radius of the ball in which Gaussians start, and their standard deviation
SCHEDULE = replace(shared.SCHEDULE, mean_rate=6e-3, growth_end=0.7)  # they have far to go
CONTINUED = 0.5  # of the schedule lies behind where a fit goes on from splats
PIXELS_A_STEP = 2**13  # on the CPU: several small views a step, or one large one


def fit_images(
    views: Views,
    p: recipes.FitImages,
    seed: int,
    start: Splats | None = None,
    iterations: int | None = None,
    orbit: Orbit | None = None,
    features: FeatureDistance | Gradients | None = None,
    progress: Progress = silent,
) -> tuple[Splats, Orbit | None]:
    """Splats (unit frame, at most `p.splats`) that look like the views, and the cameras that were found.

    start: where to go on from, with rates of the middle of a fit. iterations: in place of `p.iterations`. orbit: the cameras of the views
    that are fitted are about these, in place of `views.cameras`; elevation, field of view and every azimuth but the first view's are
    refined, and splats and orbit belong together. The size of the subject in pictures tells nothing of its distance, so the ratio of focal
    length to distance stays. features: what compares pictures, else what `p.features` names. Held-out views are not looked at.

    Same input, seed and device: the same splats, bit by bit on the CPU. Raises `KilnError("bad-input")` for views that no Gaussians can
    explain, "no-device" if `p.device` is not there, "no-weights" if the network asked for is not installed, "out-of-memory" on a GPU.
    """
    views = shared.checked(views.for_fitting)
    if orbit is not None and len(orbit.azimuths) != len(views):
        raise KilnError("bad-input", f"An orbit of {len(orbit.azimuths)} cameras does not fit {len(views)} views.", "Give one for each.")
    if max(p.lpips_weight, p.ssim_weight, p.mask_weight, p.l1_weight, p.l2_weight) == 0:
        raise KilnError("bad-parameter", "Nothing is left to fit by: all weights of the fit are 0.", "Give one of them a weight.")
    if features is None:
        name, sentence = settled(p.features)
        progress(0.0, sentence)
        features = comparer(name)
    engine, device = gpu.Engine("CPU", draw_views, gpu.loss_in_torch, list), torch.device("cpu")
    if shared.runs_on_cuda(p.device):
        found = gpu.engine_for_this_gpu(progress)
        if found is None:
            shared.runs_on_cuda(p.device)  # refuses where the GPU was asked for
        else:
            engine, device = found, torch.device("cuda")
    try:
        with _threads(views):
            return _fit(engine, device, features.to(device), views, p, seed, start, iterations or p.iterations, orbit, progress)
    except torch.cuda.OutOfMemoryError:
        raise KilnError(
            "out-of-memory", "The GPU's memory is full.", "Ask for fewer splats, close what else uses the GPU, or choose the device 'cpu'."
        ) from None


@contextlib.contextmanager
def _threads(views: Views) -> Iterator[None]:
    """Small pictures keep torch to one thread: handing out the work takes longer than doing it, much longer on a busy computer."""
    before = torch.get_num_threads()
    if views.alpha[0].size <= ONE_THREAD:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def at_centre(count: int, random: np.random.Generator) -> Splats:
    """Grey Gaussians in a ball around the origin: IM-3D, appendix A.1, which does not tell how large a ball."""
    means = random.normal(0, 1, (count, 3))
    means *= BALL * random.random((count, 1)) ** (1 / 3) / np.linalg.norm(means, axis=1, keepdims=True)
    return Splats(
        means.astype(np.float32),
        np.tile(np.array([1, 0, 0, 0], np.float32), (count, 1)),
        np.full((count, 3), np.log(EXTENT), np.float32),
        np.full(count, np.log(OPACITY / (1 - OPACITY)), np.float32),
        np.zeros((count, 1, 3), np.float32),
    )


def _fit(engine, device, features, views: Views, p: recipes.FitImages, seed: int, start, steps: int, orbit, progress: Progress):
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    behind = 0.0 if start is None else CONTINUED
    if start is None:
        start = at_centre(p.start, random)
    height, width = views.alpha.shape[1:]
    targets = _Targets(views, features if p.lpips_weight > 0 else None, device, progress)
    still = torch.tensor(np.stack([camera_numbers(camera) for camera in views.cameras]), device=device)
    preview = shared.preview_camera(views.cameras)

    state = gpu._State(torch, device, engine, pack(start)[:, : len(start)])
    first_count, rounds = state.count, [step for step in range(p.densify_every, round(steps * SCHEDULE.growth_end) + 1, p.densify_every)]
    at_once = gpu.VIEWS_A_STEP if device.type == "cuda" else max(1, min(gpu.VIEWS_A_STEP, PIXELS_A_STEP // (width * height)))
    orders, at_once = shared.Orders(len(views), random), min(at_once, len(views))
    turn = None if orbit is None else _Turn(orbit, width, device, steps * at_once / len(views))
    reported = time.monotonic()
    shown = reported - shared.PREVIEW_EVERY
    for step in range(steps):
        chosen = [orders.next() for _ in range(at_once)]
        matrix = torch.cat(state.parts)
        matrix.register_hook(gpu._only_numbers)
        if turn is None:
            planes = engine.draw(matrix, still[chosen], width, height, state.pulled, state.room)
        else:
            planes = turn.draw(engine, matrix, chosen, state)
        loss = loss_of(planes, targets, step % len(BACKGROUNDS), chosen, p, features)
        state.adam.zero_grad(set_to_none=True)
        loss.backward()
        done = behind + (1 - behind) * step / steps
        state.step(shared.rates(SCHEDULE, state.rows, done))
        if turn is not None:
            turn.step(at_once, done)
        if step + 1 in rounds:
            if not torch.isfinite(loss):
                raise KilnError(
                    "fit-diverged", f"The fit broke down at step {step}: its loss is no number.", "Try another seed or fewer splats."
                )
            # Room for more opens evenly: Gaussians that are split before they are where they belong are lost.
            share = (rounds.index(step + 1) + 1) / len(rounds)
            state.grow(max(first_count, round(first_count + share * (p.splats - first_count))), SCHEDULE, shared)
        now = time.monotonic()
        if now - reported > shared.REPORT_EVERY:
            picture = None
            if now - shown > shared.PREVIEW_EVERY:
                shown, picture = now, _preview(engine, state, preview, device)
            reported = time.monotonic()
            progress((step + 1) / steps, f"Step {step + 1} of {steps}, {state.count} splats, {engine.name}", picture)
    result = state.matrix()
    if not np.isfinite(result).all():
        raise KilnError("fit-diverged", "The fit broke down: some splats are not numbers.", "Try another seed or fewer splats.")
    splats = unpack(result, state.count)
    return (splats, None) if turn is None else turn.settled(splats)


class _Targets:
    """The views on each background, their alpha, and what the network makes of them, once for all."""

    def __init__(self, views: Views, features: FeatureDistance | Gradients | None, device, progress: Progress):
        self.alpha = torch.tensor(views.alpha, device=device)
        self.pictures, self.features = [], []
        for background in BACKGROUNDS:
            images = views.images * views.alpha[..., None] + background * (1 - views.alpha[..., None])
            pictures = torch.tensor(np.moveaxis(images, -1, 1).copy(), device=device)
            found = []
            with torch.no_grad():
                for number in range(len(views) if features is not None else 0):
                    progress(0.0, f"Looking at view {number + 1} of {len(views)}")
                    found.append([values.half() for values in features.features(pictures[number, None])])
            self.pictures.append(pictures)
            self.features.append([torch.cat(maps) for maps in zip(*found, strict=True)])  # half precision: of the distance, 0.1 %


def loss_of(
    planes: Float[Tensor, "v 5 h w"],
    targets: _Targets,
    ground: int,
    chosen: list[int],
    p: recipes.FitImages,
    features: FeatureDistance | Gradients,
) -> Float[Tensor, ""]:
    """IM-3D, section 3.3: the weighted sum of LPIPS, MS-SSIM and mask losses; L1 and L2 of pixels for comparison. ground: which of the
    backgrounds splats and views are looked at on."""
    alpha, truth = planes[:, 4], targets.pictures[ground][chosen]
    picture = planes[:, :3] + BACKGROUNDS[ground] * (1 - planes[:, 4:])
    loss = p.mask_weight * (alpha - targets.alpha[chosen]).abs().mean()
    if p.lpips_weight > 0:
        wanted = [maps[chosen].float() for maps in targets.features[ground]]
        loss = loss + p.lpips_weight * features.between(features.features(picture), wanted).mean()
    if p.ssim_weight > 0:
        loss = loss + p.ssim_weight * (1 - ms_ssim(picture, truth)).mean()
    if p.l1_weight > 0:
        loss = loss + p.l1_weight * (picture - truth).abs().mean()
    if p.l2_weight > 0:
        loss = loss + p.l2_weight * (picture - truth).square().mean()
    return loss


class _Turn:
    """The cameras of an orbit as parameters.

    Splats are always drawn by the plain cameras of the orbit as it stands. For the gradient their means pass through a motion that moves
    nothing at these values: the difference between the cameras as numbers and as parameters. A picture u = f x / (d + z) with f / d fixed
    changes with f as if depths were scaled by 1 / f. That the Gaussians' shapes turn and stretch too is left out of the gradient.
    """

    def __init__(self, orbit: Orbit, size: int, device, rounds: float):
        self.before, self.size, self.device = orbit, size, device
        self.azimuths = torch.zeros(len(orbit.azimuths), dtype=torch.float64, requires_grad=True)  # degrees, to be added
        self.elevation = torch.zeros((), dtype=torch.float64, requires_grad=True)
        self.focal = torch.zeros((), dtype=torch.float64, requires_grad=True)  # logarithm of the factor on focal length and distance
        self.looked = 0  # at views, since the last step
        self.rates = [travel / rounds for travel in (CAMERAS.azimuth, CAMERAS.elevation, CAMERAS.focal)]
        groups = [{"params": [one]} for one in (self.azimuths, self.elevation, self.focal)]
        self.adam = torch.optim.Adam(groups, betas=(0.8, 0.98), eps=1e-15)

    def orbit(self) -> Orbit:
        """As it stands."""
        factor = float(self.focal.detach().exp())
        half = np.arctan(np.tan(np.radians(self.before.fov) / 2) / factor)
        return Orbit(
            self.before.azimuths + self.azimuths.detach().numpy(),
            self.before.elevation + float(self.elevation.detach()),
            float(np.degrees(2 * half)),
            self.before.distance * factor,
        )

    def draw(self, engine: gpu.Engine, matrix: Tensor, chosen: list[int], state) -> Float[Tensor, "v 5 h w"]:
        """The chosen views' pictures, with gradients for the cameras."""
        now = self.orbit()
        cameras = replace(now, azimuths=now.azimuths[chosen]).cameras(self.size)
        turns = self._rotations(chosen)
        # Each view moves the splats in its own way, so each is drawn on its own.
        depth = torch.stack([torch.ones(()), torch.ones(()), torch.exp(self.focal.detach() - self.focal)])
        planes = []
        for number, camera in enumerate(cameras):
            there = turns[number].detach().T @ (depth[:, None] * turns[number])
            means = there.to(matrix) @ matrix[MEAN:QUATERNION]
            numbers = torch.tensor(camera_numbers(camera), device=self.device)[None]
            moved = torch.cat([means, matrix[QUATERNION:]])
            planes.append(engine.draw(moved, numbers, self.size, self.size, state.pulled, state.room))
        return torch.cat(planes)

    def _rotations(self, chosen: list[int]) -> Float[Tensor, "v 3 3"]:
        """Rows right, down, forward of each camera, as `Orbit.cameras` has them."""
        azimuths = torch.deg2rad(torch.from_numpy(self.before.azimuths) + self.azimuths)[chosen]
        elevation = torch.deg2rad(self.before.elevation + self.elevation).expand(len(chosen))
        across, along, up, out = azimuths.sin(), azimuths.cos(), elevation.sin(), elevation.cos()
        return torch.stack([
            along, across, torch.zeros_like(up),
            up * across, -up * along, -out,
            -out * across, out * along, -up,
        ], 1).reshape(-1, 3, 3)  # fmt: skip

    def step(self, looked: int, done: float) -> None:
        """After a look at so many views, with `done` of the schedule behind."""
        self.looked += looked
        if self.looked < len(self.azimuths):
            return
        self.looked -= len(self.azimuths)
        if done >= CAMERAS.rest:
            slower = CAMERAS.end ** ((done - CAMERAS.rest) / (1 - CAMERAS.rest))
            for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
                group["lr"] = rate * slower
            self.adam.param_groups[2]["lr"] *= done >= CAMERAS.focal_rest
            self.adam.step()
            with torch.no_grad():  # all azimuths at once turn the subject and nothing else
                self.azimuths -= self.azimuths.mean()
        self.adam.zero_grad(set_to_none=True)

    def settled(self, splats: Splats) -> tuple[Splats, Orbit]:
        """Splats and orbit turned so that the first view's azimuth is what it was."""
        orbit = self.orbit()
        turn = float(orbit.azimuths[0] - self.before.azimuths[0])
        half = np.radians(-turn) / 2
        w, x, y, z = splats.quaternions.astype(np.float64).T
        quaternions = np.stack([
            np.cos(half) * w - np.sin(half) * z, np.cos(half) * x - np.sin(half) * y,
            np.cos(half) * y + np.sin(half) * x, np.cos(half) * z + np.sin(half) * w,
        ], 1)  # fmt: skip
        across, along = np.cos(2 * half), np.sin(2 * half)
        means = splats.means @ np.array([[across, along, 0], [-along, across, 0], [0, 0, 1]])
        turned = replace(splats, means=means.astype(np.float32), quaternions=quaternions.astype(np.float32))
        return turned, replace(orbit, azimuths=orbit.azimuths - turn)


def _preview(engine: gpu.Engine, state, camera: Camera, device) -> Float[np.ndarray, "h w 3"]:
    with torch.no_grad():
        numbers = torch.tensor(camera_numbers(camera), device=device)[None]
        seen = engine.draw(torch.cat(state.parts), numbers, camera.width, camera.height)[0].cpu().numpy()
    return np.moveaxis(seen[:3] + shared.PAPER[:, None, None] * (1 - seen[4]), 0, -1).clip(0, 1)
