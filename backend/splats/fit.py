"""Splats from views: 3D Gaussian Splatting (Kerbl et al. 2023) for short fits of one object.

Differences from the paper, all because a fit here is a thousand steps and not thirty thousand: Gaussians begin on the surface that is known
(depth) or bounded (visual hull), rates are higher, growth happens in a few rounds up to a fixed number, and a random background and the
views' alpha keep Gaussians out of empty space.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from backend.progress import Progress, silent
from backend.views.cameras import Camera
from backend.views.views import Views
from protocol import recipes
from protocol.errors import KilnError

from .loss import Adam, Weights, loss_and_gradients
from .model import Splats
from .raster_cpu import EMPTY, LOG_SCALE, MEAN, OPACITY, QUATERNION, SH, TILE, Rasteriser, columns, pack, unpack
from .shape import ShapeWeights, add_distortion, add_shape, surface_of_picture
from .start import in_hull, on_surface

PAPER = np.array([0.22, 0.22, 0.22], np.float32)  # behind the subject in previews
PREVIEW_SIDE = 384  # pixels, at most
REPORT_EVERY, PREVIEW_EVERY = 0.3, 1.0  # seconds


@dataclass(frozen=True)
class Schedule:
    """Numbers of the optimisation that no user needs. "Kerbl" is Kerbl et al. 2023 and its published code; lengths are of the unit frame.

    mean_rate: Adam's rate of positions at the start. Kerbl: 1.6e-4 of the scene's extent; short fits want more.
    mean_decay: factor on it at the end, reached exponentially. Kerbl: 0.01.
    quaternion_rate, log_scale_rate, opacity_rate, sh_rate: rates of the rest. Kerbl: 1e-3, 5e-3, 0.05, 2.5e-3.
    sh_rest_share: rate of the higher spherical harmonics by that of the constant one. Kerbl: 1/20.
    end_decay, surface_end_decay: factor on all rates but the positions' at the end, so that the last steps settle; the second where the
        surface is known and little has to be found.
    start_share, surface_share: Gaussians at the start by those asked for, in a hull and on a known surface; growth adds the rest. Halving
        the cells of a surface by its colours places them better than growth does.
    growth_rounds, growth_end: rounds of growth, evenly spaced, and the share of the fit by which they end. Kerbl: every 100 steps.
    least_opacity: Gaussians below it are removed in each round. Kerbl: 0.005.
    largest: standard deviation above which a Gaussian is removed. Kerbl: 0.1 of the scene's extent.
    split_offset, split_shrink: a split moves two halves apart along the longest axis by this many standard deviations each and divides
        that axis by split_shrink. Kerbl: both drawn at random; divides by 1.6.
    mean_share: share of the fit, at its end, over which the parameters are averaged where only colours are known (Polyak and Juditsky
        1992): each step follows one view alone, and the mean follows them all. On a surface that is known the last steps are short enough.
        On the CPU alone: a GPU looks at several views a step.
    """

    mean_rate: float = 7e-4
    mean_decay: float = 0.02
    quaternion_rate: float = 2e-2
    log_scale_rate: float = 3e-2
    opacity_rate: float = 0.1
    sh_rate: float = 4e-2
    sh_rest_share: float = 0.25
    end_decay: float = 0.2
    surface_end_decay: float = 0.05
    start_share: float = 0.7
    surface_share: float = 0.95
    growth_rounds: int = 4
    growth_end: float = 0.6
    least_opacity: float = 0.01
    largest: float = 0.3
    split_offset: float = 0.6
    split_shrink: float = 1.6
    mean_share: float = 0.1


SCHEDULE = Schedule()


def fit(
    views: Views,
    p: recipes.Fit,
    seed: int,
    progress: Progress = silent,
    schedule: Schedule = SCHEDULE,
    counts: Float[np.ndarray, "v h w"] | None = None,
) -> Splats:
    """Splats (unit frame) that look like the views from their cameras; at most `p.splats`. Held-out views are not looked at.

    counts: how much each pixel counts, 0 to 1 (any kind of number); a pixel of 0 may hold anything and is not looked at, though part of the
    subject may lie there. None: all count.

    Same views, parameters, seed and device: the same splats, bit by bit on the CPU. Raises `KilnError("bad-input")` for views that no
    Gaussians can explain, `KilnError("no-device")` if `p.device` is not there.
    """
    if counts is not None:
        views, counts = _counted(views, counts)
    views = checked(views.for_fitting)
    if views.depth is not None and views.normals is not None:
        schedule = replace(schedule, end_decay=schedule.surface_end_decay, mean_share=0.0)
    if runs_on_cuda(p.device):
        from .gpu import fit_on_cuda

        return fit_on_cuda(views, p, seed, progress, schedule, counts)
    return _fit_on_cpu(views, p, seed, progress, schedule, counts)


def _counted(views: Views, counts: np.ndarray) -> tuple[Views, Float[np.ndarray, "v h w"]]:
    """The views to be fitted, with pixels of no count black, solid and of unknown depth, and their counts."""
    counts = np.asarray(counts, np.float32)
    if counts.shape != views.alpha.shape or not (counts.min() >= 0 and counts.max() <= 1):
        raise KilnError(
            "bad-input",
            f"Pixels' counts of shape {counts.shape} do not fit views of shape {views.alpha.shape}, or are not from 0 to 1.",
            "Give one number from 0 to 1 for each pixel of each view.",
        )
    views, counts = views.for_fitting, counts[~views.holdout]
    if float(np.where(counts > 0, views.alpha, 0).max()) < 0.5:
        raise KilnError("bad-input", "No view shows anything solid where pixels count.", "Check which pixels are to be ignored.")
    ignored = counts == 0
    # Solid: the hull holds what any view may show there, and no term of the loss pushes splats away from it.
    return replace(
        views,
        images=np.where(ignored[..., None], np.float32(0), views.images),
        alpha=np.where(ignored, np.float32(1), views.alpha),
        depth=None if views.depth is None else np.where(ignored, np.float32(0), views.depth),
        normals=None if views.normals is None else np.where(ignored[..., None], np.zeros(1, views.normals.dtype), views.normals),
    ), counts


def checked(views: Views) -> Views:
    """The views, or `KilnError("bad-input")` if nothing can be fitted to them."""
    if len(views) < 2:
        raise KilnError(
            "bad-input", f"{len(views)} views are too few to fit.", "Give at least 3 from different sides, 16 or more for a good result."
        )
    for name in ("images", "alpha", "depth", "normals"):
        values = getattr(views, name)
        if values is not None and not np.isfinite(values).all():
            raise KilnError("bad-input", f"The views' {name} hold values that are not numbers.", "Capture the views again.")
    if float(views.alpha.max()) < 0.5:
        raise KilnError("bad-input", "No view shows anything solid: alpha stays below 0.5.", "Check that the subject is visible.")
    return views


def runs_on_cuda(device: str) -> bool:
    """Whether a fit on `device` ("auto", "cpu", "cuda") runs on an NVIDIA GPU."""
    if device == "cpu":
        return False
    from .gpu import why_not

    reason = why_not()
    if reason and device == "cuda":
        raise KilnError("no-device", f"The GPU cannot be used: {reason}.", "Choose the device 'auto' or 'cpu', or run 'kiln doctor'.")
    return not reason


def first_splats(
    views: Views,
    p: recipes.Fit,
    random: np.random.Generator,
    schedule: Schedule,
    counts: Float[np.ndarray, "v h w"] | None = None,
) -> Splats:
    """Where the fit begins: on the views' depth, or in their hull."""
    known = views.depth is not None and views.normals is not None
    count = max(int(p.splats * (schedule.surface_share if known else schedule.start_share)), min(p.splats, 200))
    place = on_surface if known else in_hull
    return place(views, count, p.sh_degree, random, counts)


def rates(schedule: Schedule, rows: int, done: float) -> Float[np.ndarray, "rows"]:
    """Adam's rate for each row of the parameter matrix when `done` of the fit (0 to 1) is behind."""
    end = schedule.end_decay**done
    found = np.full(rows, schedule.sh_rate * schedule.sh_rest_share * end)
    found[MEAN:QUATERNION] = schedule.mean_rate * schedule.mean_decay**done
    found[QUATERNION:LOG_SCALE] = schedule.quaternion_rate * end
    found[LOG_SCALE:OPACITY] = schedule.log_scale_rate * end
    found[OPACITY] = schedule.opacity_rate * end
    found[SH : SH + 3] = schedule.sh_rate * end
    return found


def growth_steps(iterations: int, schedule: Schedule) -> list[int]:
    """The steps after which Gaussians are pruned and grown."""
    return [round(iterations * schedule.growth_end * (i + 1) / schedule.growth_rounds) for i in range(schedule.growth_rounds)]


def pruned_and_grown(
    matrix: Float[np.ndarray, "rows n"], pull: Float[np.ndarray, "n"], seen: Float[np.ndarray, "n"], most: int, schedule: Schedule
) -> tuple[Float[np.ndarray, "rows m"], np.ndarray]:
    """The parameters after one round, and for each new column the old one whose moments it keeps (-1: none).

    pull: how strongly each Gaussian was pulled across the picture since the last round, summed over steps; seen: in how many steps.
    Transparent, huge and never seen ones go; the most strongly pulled are split along their longest axis, up to `most` in all.
    """
    opacity = 1 / (1 + np.exp(-matrix[OPACITY]))
    scales = matrix[LOG_SCALE:OPACITY]
    keep = (opacity >= schedule.least_opacity) & (scales.max(0) <= np.log(schedule.largest)) & (seen > 0) & np.isfinite(matrix).all(0)
    kept = np.nonzero(keep)[0]
    room = max(0, min(most - len(kept), len(kept) // 2))
    strength = pull[kept] / np.maximum(seen[kept], 1)
    split = kept[np.argsort(-strength, kind="stable")[:room]]
    whole = np.setdiff1d(kept, split, assume_unique=True)
    halves = np.concatenate([matrix[:, split], matrix[:, split]], 1)
    axis = scales[:, split].argmax(0)
    length = np.exp(scales[axis, split])
    direction = _axes(matrix[QUATERNION:LOG_SCALE, split], axis) * length * schedule.split_offset
    halves[MEAN:QUATERNION] += np.concatenate([direction, -direction], 1)
    halves[LOG_SCALE + np.tile(axis, 2), np.arange(halves.shape[1])] -= np.log(schedule.split_shrink)
    return np.concatenate([matrix[:, whole], halves], 1), np.concatenate([whole, np.full(halves.shape[1], -1)])


def _axes(quaternions: Float[np.ndarray, "4 n"], axis: np.ndarray) -> Float[np.ndarray, "3 n"]:
    """The chosen column of each rotation matrix."""
    w, x, y, z = quaternions / np.linalg.norm(quaternions, axis=0)
    columns = np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)],
        [2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)],
        [2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)],
    ])  # fmt: skip
    return columns[axis, :, np.arange(len(axis))].T


class Orders:
    """Which view each step looks at: every view once, in a new order each time round."""

    def __init__(self, views: int, random: np.random.Generator):
        self.views, self.random, self.left = views, random, []

    def next(self) -> int:
        if not self.left:
            self.left = self.random.permutation(self.views).tolist()
        return self.left.pop()


def _padded(values: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "rows columns"]:
    height, width = values.shape
    return np.pad(values, ((0, -height % TILE), (0, -width % TILE)))


def _target(views: Views, index: int) -> tuple[Float[np.ndarray, "5 rows columns"], tuple[int, int, int, int]]:
    """A view as planes (red, green, blue on black, alpha, depth) and the tiles x0, y0, x1, y1 that the subject touches."""
    alpha = views.alpha[index]
    depth = np.zeros_like(alpha) if views.depth is None else np.where(alpha > 0, views.depth[index], 0)
    layers = [*np.moveaxis(views.images[index] * alpha[..., None], -1, 0), alpha, depth]
    planes = np.stack([_padded(layer) for layer in layers]).astype(np.float32)
    y, x = np.nonzero(planes[3])
    if len(x) == 0:
        return planes, (0, 0, 1, 1)
    return planes, (int(x.min()) // TILE, int(y.min()) // TILE, int(x.max()) // TILE + 1, int(y.max()) // TILE + 1)


def preview_camera(cameras: list[Camera]) -> Camera:
    """The camera that sees most of the subject's front (-Y in Blender), from its left and a little from above."""
    camera = max(cameras, key=lambda one: float(one.world_from_camera[:3, 2] @ (-0.45, 0.8, -0.4)))
    return camera.scaled(min(1.0, PREVIEW_SIDE / max(camera.width, camera.height)))


def shape_weights(views: Views, p: recipes.Fit) -> ShapeWeights:
    """The terms that look at the Gaussians. Views that have normals say how the surface faces; else the fitted depth does.

    Where no view says how deep a surface lies, evenly coloured parts are explained as well by splats inside the object: without the
    distortion term Spot's body came out hollow (F-score at 0.5 % 0.968 instead of 0.996). Three other objects stayed as they were.
    """
    normal = p.consistency_weight if views.depth is None or views.normals is None else p.normal_weight
    return ShapeWeights(normal, p.flat_weight, p.hull_weight, p.distortion_weight if views.depth is None else 0.0)


def _fit_on_cpu(
    views: Views,
    p: recipes.Fit,
    seed: int,
    progress: Progress,
    schedule: Schedule,
    counts: Float[np.ndarray, "v h w"] | None,
) -> Splats:
    progress(0.0, "Placing splats")
    random = np.random.default_rng(seed)
    start = first_splats(views, p, random, schedule, counts)
    progress(0.02, "Preparing (the first time on a computer takes a few seconds more)")
    parameters, count = pack(start), len(start)
    targets = [_target(views, i) for i in range(len(views))]
    shares = None if counts is None else [_padded(one) for one in counts]
    weights = Weights(p.ssim_weight, p.alpha_weight, p.depth_weight if views.depth is not None else 0.0)
    shape = shape_weights(views, p)
    rasteriser, adam = Rasteriser(), Adam(parameters)
    gradients = np.zeros_like(parameters)
    pull, seen = np.zeros(count), np.zeros(count)
    orders, rounds, loss = Orders(len(views), random), set(growth_steps(p.iterations, schedule)), 0.0
    settling, settled, taken = p.iterations - max(1, round(p.iterations * schedule.mean_share)), np.zeros(parameters.shape), 0
    reported = time.monotonic()
    shown = reported - PREVIEW_EVERY  # the first report has a picture
    for step in range(p.iterations):
        index = orders.next()
        # Every other step is on black; the random colours in between are enough to keep splats from imitating a background.
        plain = step % 2 == 1 or not p.random_background
        background = np.zeros(3, np.float32) if plain else random.random(3, dtype=np.float32)
        rasteriser.project(parameters, count, views.cameras[index])
        planes = rasteriser.compose()
        loss, plane_gradients = loss_and_gradients(
            rasteriser, planes, *targets[index], background, weights, None if shares is None else shares[index]
        )
        if not np.isfinite(loss):
            raise KilnError(
                "fit-diverged", f"The fit broke down at step {step}: its loss is no number.", "Try another seed or fewer splats."
            )
        screen = rasteriser.backward(plane_gradients, background, gradients)
        if shape:
            depth, normals = (None, None) if views.depth is None else (views.depth[index], views.normals[index])
            if shape.normal > 0 and normals is None:
                depth, normals = surface_of_picture(views.cameras[index], rasteriser.cropped(planes))
            add_shape(rasteriser, views.alpha[index], depth, normals, shape, gradients)
        if shape.distortion > 0:
            add_distortion(rasteriser, views.cameras[index], shape.distortion, gradients)
        adam.step(rasteriser.threads, parameters, gradients, rates(schedule, len(parameters), step / p.iterations))
        pull += screen
        seen += screen > 0
        if step + 1 in rounds:
            grown, kept = pruned_and_grown(parameters[:, :count], pull, seen, p.splats, schedule)
            if grown.shape[1] == 0:
                raise KilnError("fit-diverged", "All splats have faded away.", "Check that pictures, alpha and cameras belong together.")
            parameters, count = _matrix(grown), grown.shape[1]
            adam.first, adam.second = (_matrix(np.where(kept >= 0, moments[:, kept], 0), 0) for moments in (adam.first, adam.second))
            gradients, pull, seen = np.zeros_like(parameters), np.zeros(count), np.zeros(count)
            settled, taken = np.zeros(parameters.shape), 0
        if step >= settling:
            settled += parameters
            taken += 1
        now = time.monotonic()
        if now - reported > REPORT_EVERY:
            reported, picture = now, None
            if now - shown > PREVIEW_EVERY:
                shown, picture = now, _preview(rasteriser, parameters, count, preview_camera(views.cameras))
            progress(0.02 + 0.98 * (step + 1) / p.iterations, f"Step {step + 1} of {p.iterations}, {count} splats", picture)
    return unpack((settled / taken).astype(np.float32), count)


def _matrix(values: Float[np.ndarray, "rows n"], empty: float | None = None) -> Float[np.ndarray, "rows columns"]:
    """Columns padded to whole lanes, with invisible Gaussians (or zeros)."""
    matrix = np.zeros((len(values), columns(values.shape[1])), np.float32)
    if empty is None:
        matrix[OPACITY] = EMPTY
        matrix[QUATERNION:LOG_SCALE] = 1
    matrix[:, : values.shape[1]] = values
    return matrix


def _preview(rasteriser: Rasteriser, parameters: np.ndarray, count: int, camera: Camera) -> Float[np.ndarray, "h w 3"]:
    rasteriser.project(parameters, count, camera)
    planes = rasteriser.cropped(rasteriser.compose())
    return np.clip(np.moveaxis(planes[:3], 0, -1) + PAPER * (1 - planes[4][..., None]), 0, 1)
