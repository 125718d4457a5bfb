"""The fit of moving Gaussians on an NVIDIA GPU: the start, the rounds of growth, rates and energies of `fit_motion.py`, through torch's
autograd and an engine of `gpu.py`, with several views of one moment a step."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from backend.progress import Progress
from backend.views.sequence import ViewSequence
from protocol import recipes
from protocol.errors import KilnError

from . import fit as shared
from . import fit_motion as ours
from . import gpu
from .loss import Adam, Weights
from .motion import Binding, Motion
from .moving import OWN_COLOR, OWN_MEAN, OWN_OPACITY, OWN_ROWS
from .raster_cpu import LOG_SCALE, MEAN, OPACITY, QUATERNION, SH, camera_numbers, pack, unpack
from .sequence import SplatSequence


def fit_on_cuda(
    views: ViewSequence, motion: Motion, p: recipes.FitMotion, seed: int, progress: Progress, schedule: ours.Schedule
) -> tuple[SplatSequence, Motion]:
    """`fit_motion.fit_motion` on the first NVIDIA GPU. Results repeat closely, not bit by bit.

    Where no engine turns out to work, the CPU fits, unless the GPU was asked for by name (`KilnError("no-device")`).
    """
    import torch

    try:
        engine = gpu.engine_for_this_gpu(progress)
        if engine is None:
            shared.runs_on_cuda(p.device)  # refuses where the GPU was asked for
            progress(0.0, gpu.sentence(p.device))
            return ours.fit_on_cpu(views, motion, p, seed, progress, schedule)
        return fit_with(engine, torch.device("cuda"), views, motion, p, seed, progress, schedule)
    except torch.cuda.OutOfMemoryError:
        free, all_of_it = (round(size / 2**30, 1) for size in torch.cuda.mem_get_info())
        raise KilnError(
            "out-of-memory", f"The GPU's memory is full ({free} of {all_of_it} GB free).",
            "Ask for fewer splats, frames or smaller views, close what else uses the GPU, or choose the device 'cpu'.",
        ) from None  # fmt: skip


def carry(still, nodes, carriers, weights, turns, shifts, own=None):
    """`moving.Carried.carry` as a function of torch tensors: rows x N, M x 3, N x K, N x K, 4 x M (any length), 3 x M, 7 x N."""
    import torch

    unit = torch.nn.functional.normalize(turns, dim=0).T
    points = still[MEAN:QUATERNION].T
    # Each node takes x to R x + (c + t - R c).
    rotation = _matrices(unit)
    offsets = nodes + shifts.T - torch.einsum("mij,mj->mi", rotation, nodes)
    blended = (rotation.reshape(-1, 9)[carriers] * weights[..., None]).sum(1).reshape(-1, 3, 3)
    means = torch.einsum("nij,nj->ni", blended, points) + (offsets[carriers] * weights[..., None]).sum(1)
    several = unit[carriers]
    signs = torch.where((several * several[:, :1]).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    a, b, c, d = (several * signs * weights[..., None]).sum(1).unbind(-1)
    w, x, y, z = still[QUATERNION:LOG_SCALE]
    quaternions = torch.stack(
        [a * w - b * x - c * y - d * z, a * x + b * w + c * z - d * y, a * y - b * z + c * w + d * x, a * z + b * y - c * x + d * w]
    )
    if own is None:
        return torch.cat([means.T, quaternions, still[LOG_SCALE:]])
    return torch.cat([
        means.T + own[OWN_MEAN:OWN_COLOR], quaternions, still[LOG_SCALE:OPACITY], still[OPACITY:SH] + own[OWN_OPACITY:],
        still[SH : SH + 3] + own[OWN_COLOR:OWN_OPACITY], still[SH + 3 :],
    ])  # fmt: skip


def _matrices(quaternions):
    import torch

    w, x, y, z = quaternions.unbind(-1)
    return torch.stack([
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ], -1).reshape(-1, 3, 3)  # fmt: skip


def rigidity(nodes, turns, shifts, first, second, length: float):
    """`fit_motion.rigidity`'s energy as a function of torch tensors; `first`, `second`: the links."""
    import torch

    if not len(first):
        return shifts.sum() * 0
    rotation, places = _matrices(torch.nn.functional.normalize(turns, dim=0).T), nodes + shifts.T
    off = torch.einsum("lij,lj->li", rotation[first], nodes[second] - nodes[first]) - (places[second] - places[first])
    return (off**2).sum() / (len(first) * length**2)


def smoothness(shifts, moment: int, length: float):
    """`fit_motion.smoothness`'s energy; `shifts`: a tensor 3 x M for each moment, of which only that moment's gets a gradient."""
    if not 0 < moment < len(shifts) - 1:
        return shifts[moment].sum() * 0
    off = shifts[moment] - (shifts[moment - 1].detach() + shifts[moment + 1].detach()) / 2
    return (off**2).sum() / (off.shape[1] * length**2)


def trust(shift, given, length: float):
    """`fit_motion.trust`'s energy; 3 x M."""
    return ((shift - given) ** 2).sum() / (shift.shape[1] * length**2)


def own_energy(own, moment: int, schedule: ours.Schedule):
    """What `fit_motion.hold_own` has the gradient of; `own`: tensors 7 x N by moment, of that moment and those beside it."""
    import torch

    weights = torch.tensor(
        [schedule.own_mean_weight] * 3 + [schedule.own_color_weight] * 3 + [schedule.own_opacity_weight], device=own[moment].device
    )[:, None]
    energy = (weights * own[moment] ** 2).sum()
    beside = [own[other].detach() for other in (moment - 1, moment + 1) if other in own]
    for other in beside:
        energy = energy + (weights * (own[moment] - other) ** 2).sum() / len(beside)
    return energy


class _Growth:
    """`fit.pruned_and_grown`, remembering which Gaussian each came from."""

    def pruned_and_grown(self, matrix, pull, seen, most: int, schedule):
        numbered = np.concatenate([matrix, np.arange(matrix.shape[1], dtype=np.float64)[None]])
        numbered, kept = shared.pruned_and_grown(numbered, pull, seen, most, schedule)
        self.parents = numbered[-1].astype(np.int64)
        return numbered[:-1].astype(np.float32), kept


def fit_with(
    engine: gpu.Engine, device, views: ViewSequence, motion: Motion, p: recipes.FitMotion, seed: int, progress: Progress, schedule
) -> tuple[SplatSequence, Motion]:
    """The fit by an engine on a torch device."""
    import torch

    progress(0.0, "Placing splats")
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    of_splats = replace(schedule.splats, end_decay=schedule.splats.surface_end_decay)
    start, binding = ours.first_splats(views, motion, p, random, schedule)
    progress(0.02, "Preparing the GPU")
    fitted, time_of = views.views.for_fitting, views.time[~views.views.holdout]
    height, width = fitted.alpha.shape[1:]
    weights = Weights(p.ssim_weight, p.alpha_weight, p.depth_weight)
    targets = torch.empty((len(fitted), 5, height, width), device=device)
    for index, target in enumerate(targets):
        target.copy_(torch.from_numpy(gpu._target(fitted, index)))
    cameras = torch.tensor(np.stack([camera_numbers(camera) for camera in fitted.cameras]), device=device)
    links = ours.links_of(motion, schedule.links)
    first, second = torch.tensor(links.first, device=device), torch.tensor(links.second, device=device)
    nodes = torch.tensor(motion.nodes, device=device)
    turns = [torch.tensor(one.T.copy(), device=device, requires_grad=True) for one in motion.rotations]
    shifts = [torch.tensor(one.T.copy(), device=device, requires_grad=True) for one in motion.translations]
    given = [one.detach().clone() for one in shifts]
    keep = {"eps": Adam.SMALL, "betas": (Adam.KEEP1, Adam.KEEP2)}
    node_adam = torch.optim.Adam([{"params": turns}, {"params": shifts}], **keep)
    own_parts: list = []
    own_adam = None

    def bound():
        return torch.tensor(binding.nodes.astype(np.int64), device=device), torch.tensor(binding.weights, device=device)

    carriers, shares = bound()
    seen_moments = np.unique(time_of)
    looks = {moment: np.nonzero(time_of == moment)[0] for moment in seen_moments}
    orders = {moment: shared.Orders(len(looks[moment]), random) for moment in seen_moments}
    moments, rounds = shared.Orders(len(seen_moments), random), set(shared.growth_steps(p.iterations, schedule.splats))
    previews = ours.Previews(views)
    state = gpu._State(torch, device, engine, pack(start)[:, : len(start)])
    reported = time.monotonic() - shared.REPORT_EVERY  # the first step is told, with a picture
    shown = reported - shared.PREVIEW_EVERY
    for step in range(p.iterations):
        done = step / p.iterations
        moment = int(seen_moments[moments.next()])
        at_once = min(gpu.VIEWS_A_STEP, len(looks[moment]))
        chosen = torch.tensor([int(looks[moment][orders[moment].next()]) for _ in range(at_once)], device=device)
        if not own_parts and done >= schedule.own_from and (p.residual or p.opacity) and step + 1 > max(rounds):
            sizes = (OWN_COLOR - OWN_MEAN, OWN_OPACITY - OWN_COLOR, OWN_ROWS - OWN_OPACITY)
            own_parts = [
                [torch.zeros((size, state.count), device=device, requires_grad=True) for size in sizes] for _ in range(len(motion))
            ]
            own_adam = torch.optim.Adam([{"params": [parts[i] for parts in own_parts]} for i in range(3)], **keep)
        own = {other: torch.cat(own_parts[other]) for other in range(moment - 1, moment + 2) if 0 <= other < len(own_parts)}
        free = done >= schedule.nodes_from and moment != motion.rest
        turn, shift = (turns[moment], shifts[moment]) if free else (turns[moment].detach(), shifts[moment].detach())
        still = torch.cat(state.parts)
        still.register_hook(gpu._only_numbers)
        matrix = carry(still, nodes, carriers, shares, turn, shift, own[moment] if own else None)
        planes = engine.draw(matrix, cameras.index_select(0, chosen), width, height, state.pulled, state.room)
        background = torch.zeros((at_once, 3), device=device) if step % 2 else torch.rand((at_once, 3), device=device)
        loss = engine.loss(planes, targets.index_select(0, chosen), background, weights)
        if free:
            loss = loss + p.rigidity_weight * schedule.rigidity * rigidity(nodes, turn, shift, first, second, links.length)
            loss = loss + p.smoothness_weight * schedule.smoothness * smoothness(shifts, moment, links.length)
            loss = loss + schedule.trust * trust(shift, given[moment], links.length)
        if own:
            loss = loss + own_energy(own, moment, schedule)
        state.adam.zero_grad(set_to_none=True)
        node_adam.zero_grad(set_to_none=True)
        if own_adam is not None:
            own_adam.zero_grad(set_to_none=True)
        loss.backward()
        state.step(shared.rates(of_splats, state.rows, done))
        rates = ours.node_rates(schedule, done)
        node_adam.param_groups[0]["lr"], node_adam.param_groups[1]["lr"] = float(rates[0]), float(rates[-1])
        for part in (turns[moment], shifts[moment]):
            if part.grad is not None:
                part.grad.nan_to_num_(0.0, 0.0, 0.0)
        node_adam.step()
        with torch.no_grad():
            turns[moment] /= turns[moment].norm(dim=0, keepdim=True)
        if own_adam is not None:
            rates = ours.own_rates(schedule, p, done)
            for group, row in zip(own_adam.param_groups, (OWN_MEAN, OWN_COLOR, OWN_OPACITY), strict=True):
                group["lr"] = float(rates[row])
            for part in own_parts[moment]:
                part.grad.nan_to_num_(0.0, 0.0, 0.0)
            own_adam.step()
        if step + 1 in rounds:
            if not torch.isfinite(loss):
                raise KilnError(
                    "fit-diverged", f"The fit broke down at step {step}: its loss is no number.", "Try another seed or fewer splats."
                )
            growth = _Growth()
            state.grow(p.splats, schedule.splats, growth)
            binding = Binding(binding.nodes[growth.parents], binding.weights[growth.parents])
            carriers, shares = bound()
        now = time.monotonic()
        if now - reported > shared.REPORT_EVERY:
            picture = None
            if now - shown > shared.PREVIEW_EVERY:
                shown, (moment, index) = now, previews.next()
                with torch.no_grad():
                    own_here = torch.cat(own_parts[moment]) if own_parts else None
                    matrix = carry(torch.cat(state.parts), nodes, carriers, shares, turns[moment], shifts[moment], own_here)
                    seen = engine.draw(matrix, cameras[index][None], width, height)[0].cpu().numpy()
                picture = ours.side_by_side(fitted, index, seen)
            elif device.type == "cuda":
                torch.cuda.synchronize(device)  # what is reported as done is done
            reported = time.monotonic()
            text = f"Step {step + 1} of {p.iterations}, {state.count} splats, GPU ({engine.name})"
            progress(0.02 + 0.98 * (step + 1) / p.iterations, text, picture)
    result = state.matrix()
    if not np.isfinite(result).all():
        raise KilnError("fit-diverged", "The fit broke down: some splats are not numbers.", "Try another seed or fewer splats.")
    refined = replace(
        motion,
        rotations=np.stack([one.detach().cpu().numpy().T for one in turns]).astype(np.float32),
        translations=np.stack([one.detach().cpu().numpy().T for one in shifts]).astype(np.float32),
    )
    changes = np.stack([torch.cat(parts).detach().cpu().numpy() for parts in own_parts]) if own_parts else None
    return ours.sequence_of(unpack(result, state.count), binding, refined, changes, p), refined
