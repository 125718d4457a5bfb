"""Gaussians that move, from views of a moving subject: one set of them at rest, carried by the nodes of a coarse motion, and both refined
by what the views of all moments show.

Sparse-controlled Gaussian Splatting (Huang et al. 2024, SC-GS, sections 4.1 to 4.3) without its network: the nodes' transforms at each
moment are the parameters, held together by as-rigid-as-possible energy (Sorkine and Alexa 2007) and by their neighbours in time. What nodes
cannot say, a small change of each Gaussian at each moment does, in the last part of the fit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial import cKDTree

from backend.progress import Progress, silent
from backend.views.sequence import ViewSequence
from backend.views.views import Views
from protocol import recipes
from protocol.errors import KilnError

from . import fit
from .loss import Adam, Weights, loss_and_gradients
from .model import Splats
from .motion import Binding, Motion, matrices
from .moving import OWN_COLOR, OWN_MEAN, OWN_OPACITY, OWN_ROWS, Carried, across, by_quaternion, own_gradients
from .raster_cpu import Rasteriser, columns, pack, unpack
from .sequence import SplatSequence
from .start import on_points, surface_points

TURN, SHIFT, NODE_ROWS = 0, 4, 7  # rows of a moment's node parameters: quaternion, translation
KEPT_TARGETS = 1 << 30  # bytes of views that are kept ready to be compared with
BORROWED = 8  # moments, at most, whose points begin what the rest pose hides
APART = 0.02  # unit frame; points of other moments begin Gaussians where the rest pose has none this near


@dataclass(frozen=True)
class Schedule:
    """Numbers of the optimisation that no user needs. Lengths are of the unit frame.

    splats: the Gaussians' own (fit.py).
    turn_rate, shift_rate: Adam's rates of the nodes' quaternions and translations at the start; node_decay: factor on them at the end.
    nodes_from: share of the fit before which nodes stay as they came, while the Gaussians find their colours.
    rigidity, smoothness: what a weight of 1 in the recipe means. All energies are of lengths over the mean distance of linked nodes.
    trust: weight of nodes' distance from where they came, so that what looks alike everywhere does not slide.
    links: nodes that each node is held to.
    own_from: share of the fit from which Gaussians leave their nodes.
    own_mean_rate, own_color_rate, own_opacity_rate: Adam's rates of that.
    own_mean_weight, own_color_weight, own_opacity_weight: of its squares and of the squares of its difference from the moments beside it,
        summed over Gaussians: the pictures' loss pulls single Gaussians with about 1e-5 per unit of length.
    """

    splats: fit.Schedule = fit.Schedule()
    turn_rate: float = 6e-3
    shift_rate: float = 2e-3
    node_decay: float = 0.1
    nodes_from: float = 0.05
    rigidity: float = 1e-2
    smoothness: float = 1e-2
    trust: float = 0.3
    links: int = 8
    own_from: float = 0.65
    own_mean_rate: float = 2e-4
    own_color_rate: float = 1e-2
    own_opacity_rate: float = 2e-2
    own_mean_weight: float = 1e-3
    own_color_weight: float = 1e-6
    own_opacity_weight: float = 1e-6


SCHEDULE = Schedule()


def fit_motion(
    views: ViewSequence, motion: Motion, p: recipes.FitMotion, seed: int, progress: Progress = silent, schedule: Schedule = SCHEDULE
) -> tuple[SplatSequence, Motion]:
    """Moving splats (unit frame, at most `p.splats`) that look like the views, and the motion that carries them; its nodes, anchors and
    rest are those of `motion`. Held-out views are not looked at.

    Same views, motion, parameters, seed and device: the same result, bit by bit on the CPU. Raises `KilnError("bad-input")` for views
    without depth and normals or that no Gaussians can explain, `KilnError("no-device")` if `p.device` is not there.
    """
    check(views, motion)
    if fit.runs_on_cuda(p.device):
        from .fit_motion_gpu import fit_on_cuda

        return fit_on_cuda(views, motion, p, seed, progress, schedule)
    return fit_on_cpu(views, motion, p, seed, progress, schedule)


def check(views: ViewSequence, motion: Motion) -> None:
    """`KilnError("bad-input")` if nothing can be fitted to the views."""
    fitted = fit.checked(views.views.for_fitting)
    if fitted.depth is None or fitted.normals is None:
        raise KilnError("bad-input", "The views of the moving subject have no depth and normals.", "Capture them with Kiln's add-on.")
    if len(views) != len(motion):
        raise KilnError("bad-input", f"The motion has {len(motion)} moments and the views have {len(views)}.", "Follow these views.")


def first_splats(
    views: ViewSequence, motion: Motion, p: recipes.FitMotion, random: np.random.Generator, schedule: Schedule
) -> tuple[Splats, Binding]:
    """Gaussians on the surface at rest: where the moment of rest shows it, and where another moment does, carried back from there."""
    parts = [surface_points(views.at(motion.rest))]
    bindings = [motion.bind(parts[0][0])]
    known = cKDTree(parts[0][0])
    others = [moment for moment in range(len(views)) if moment != motion.rest]
    for moment in [others[i] for i in np.unique(np.linspace(0, len(others) - 1, BORROWED).round().astype(int))] if others else []:
        points, colors, normals, weights = surface_points(views.at(moment))
        moved = motion.carry(motion.anchors, motion.anchoring, moment)
        _, nearest = cKDTree(moved).query(points, workers=-1)
        binding = Binding(motion.anchoring.nodes[nearest], motion.anchoring.weights[nearest])
        turns = matrices(motion.turns(binding, moment))
        # One step of the fixed point x <- x - R^-1 (carry(x) - moved): exact where the blend is one rigid motion.
        still = motion.anchors[nearest] + np.einsum("nji,nj->ni", turns, points - moved[nearest])
        still -= np.einsum("nji,nj->ni", turns, motion.carry(still, binding, moment) - points)
        new = known.query(still, distance_upper_bound=APART, workers=-1)[0] > APART
        if new.any():
            normals = np.einsum("nji,nj->ni", turns, normals)
            parts.append((still[new], colors[new], normals[new], weights[new]))
            bindings.append(Binding(binding.nodes[new], binding.weights[new]))
    points, colors, normals, weights = (np.concatenate(part) for part in zip(*parts, strict=True))
    count = max(int(p.splats * schedule.splats.surface_share), min(p.splats, 200))
    splats = on_points(points, colors, normals, weights, count, p.sh_degree, random)
    # Each takes the binding of the nearest point that made it: at rest, what moves apart may touch.
    _, nearest = cKDTree(points).query(splats.means, workers=-1)
    nodes, shares = np.concatenate([one.nodes for one in bindings]), np.concatenate([one.weights for one in bindings])
    return splats, Binding(nodes[nearest], shares[nearest])


# ---------------------------------------------------------------- what holds nodes together


@dataclass(frozen=True)
class Links:
    """Pairs of nodes that carry the same points: `first` and `second` of each, both ways round, and the mean distance at rest."""

    first: Int[np.ndarray, "l"]
    second: Int[np.ndarray, "l"]
    length: float


def links_of(motion: Motion, most: int) -> Links:
    """Each node's links to the `most` nodes that share the most with it: neighbours along the surface, not across a gap."""
    count, several = len(motion.nodes), motion.anchoring.nodes.shape[1]
    shared = np.zeros((count, count))
    for i in range(several):
        for j in range(several):
            if i != j:
                np.add.at(
                    shared,
                    (motion.anchoring.nodes[:, i], motion.anchoring.nodes[:, j]),
                    motion.anchoring.weights[:, i] * motion.anchoring.weights[:, j],
                )
    np.fill_diagonal(shared, 0)
    strongest = np.argsort(-shared, axis=1, kind="stable")[:, :most]
    first = np.repeat(np.arange(count), strongest.shape[1])
    second = strongest.reshape(-1)
    linked = shared[first, second] > 0
    first, second = first[linked], second[linked]
    apart = np.linalg.norm(motion.nodes[first] - motion.nodes[second], axis=1)
    return Links(first, second, float(apart.mean()) if len(apart) else 1.0)


def rigidity(
    nodes: Float[np.ndarray, "m 3"], rotations: Float[np.ndarray, "m 4"], translations: Float[np.ndarray, "m 3"], links: Links
) -> tuple[float, Float[np.ndarray, "m 4"], Float[np.ndarray, "m 3"]]:
    """As-rigid-as-possible energy of one moment (Sorkine and Alexa 2007, eq. 3), a mean over links, and its gradients by unit quaternions
    and translations."""
    if not len(links.first):
        return 0.0, np.zeros_like(rotations), np.zeros_like(translations)
    places, scale = nodes + translations, 1 / (len(links.first) * links.length**2)
    turned = np.einsum("lij,lj->li", matrices(rotations)[links.first], nodes[links.second] - nodes[links.first])
    off = turned - (places[links.second] - places[links.first])
    by_shift = _sums(links.first, off, len(nodes)) - _sums(links.second, off, len(nodes))
    by_turn = by_quaternion(_sums(links.first, np.cross(turned, off), len(nodes)), rotations)
    return scale * float((off**2).sum()), 2 * scale * by_turn, 2 * scale * by_shift


def smoothness(translations: Float[np.ndarray, "t m 3"], moment: int, links: Links) -> tuple[float, Float[np.ndarray, "m 3"]]:
    """How far nodes are from the middle between the moments beside, squared, a mean over nodes; its gradient at that moment alone."""
    if not 0 < moment < len(translations) - 1:
        return 0.0, np.zeros_like(translations[0])
    off = translations[moment] - (translations[moment - 1] + translations[moment + 1]) / 2
    scale = 1 / (off.shape[0] * links.length**2)
    return scale * float((off**2).sum()), 2 * scale * off


def trust(translations: Float[np.ndarray, "m 3"], given: Float[np.ndarray, "m 3"], links: Links) -> tuple[float, Float[np.ndarray, "m 3"]]:
    """How far the nodes of one moment are from given places, squared, a mean over nodes; its gradient."""
    off = translations - given
    scale = 1 / (len(off) * links.length**2)
    return scale * float((off**2).sum()), 2 * scale * off


def _sums(places: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    return np.stack([np.bincount(places, column, count) for column in values.T], 1)


# ---------------------------------------------------------------- the fit


def fit_on_cpu(
    views: ViewSequence, motion: Motion, p: recipes.FitMotion, seed: int, progress: Progress, schedule: Schedule
) -> tuple[SplatSequence, Motion]:
    progress(0.0, "Placing splats")
    random = np.random.default_rng(seed)
    rates_of_splats = replace(schedule.splats, end_decay=schedule.splats.surface_end_decay)
    start, binding = first_splats(views, motion, p, random, schedule)
    progress(0.02, "Preparing (the first time on a computer takes a few seconds more)")
    fitted, time_of = views.views.for_fitting, views.time[~views.views.holdout]
    target = targets_of(fitted)
    weights = Weights(p.ssim_weight, p.alpha_weight, p.depth_weight)
    links = links_of(motion, schedule.links)
    rasteriser, count = Rasteriser(), len(start)
    still = pack(start)
    moved, gradients, adam = still.copy(), np.zeros_like(still), Adam(still)
    carried = Carried(rasteriser.threads, motion.nodes, binding, still.shape[1])
    nodes = np.zeros((len(motion), NODE_ROWS, columns(len(motion.nodes))), np.float32)
    of_nodes = nodes[..., : len(motion.nodes)]
    of_nodes[:, TURN:SHIFT], of_nodes[:, SHIFT:] = motion.rotations.transpose(0, 2, 1), motion.translations.transpose(0, 2, 1)
    node_adams, node_gradients = [Adam(one) for one in nodes], np.zeros_like(nodes[0])
    own = own_adams = own_gradient = None
    pull, seen = np.zeros(count), np.zeros(count)
    orders, rounds = fit.Orders(len(fitted), random), set(fit.growth_steps(p.iterations, schedule.splats))
    previews = Previews(views)
    reported = time.monotonic() - fit.REPORT_EVERY  # the first step is told, with a picture
    shown = reported - fit.PREVIEW_EVERY
    for step in range(p.iterations):
        done = step / p.iterations
        index = orders.next()
        moment = int(time_of[index])
        background = np.zeros(3, np.float32) if step % 2 else random.random(3, dtype=np.float32)
        if own is None and done >= schedule.own_from and (p.residual or p.opacity) and step + 1 > max(rounds):
            own = np.zeros((len(motion), OWN_ROWS, still.shape[1]), np.float32)
            own_adams, own_gradient = [Adam(one) for one in own], np.zeros_like(own[0])
        rotations, translations = of_nodes[moment, TURN:SHIFT].T, of_nodes[moment, SHIFT:].T
        carried.carry(still, rotations, translations, None if own is None else own[moment], moved)
        rasteriser.project(moved, count, fitted.cameras[index])
        planes = rasteriser.compose()
        loss, plane_gradients = loss_and_gradients(rasteriser, planes, *target(index), background, weights)
        if not np.isfinite(loss):
            raise KilnError(
                "fit-diverged", f"The fit broke down at step {step}: its loss is no number.", "Try another seed or fewer splats."
            )
        screen = rasteriser.backward(plane_gradients, background, gradients)
        if own is not None and own_adams is not None and own_gradient is not None:
            own_gradients(gradients, own_gradient)
            hold_own(own, moment, own_gradient, schedule)
        by_turn, by_shift = carried.carry_back(still, gradients)
        adam.step(rasteriser.threads, still, gradients, fit.rates(rates_of_splats, len(still), done))
        if done >= schedule.nodes_from and moment != motion.rest:
            _, turn, shift = rigidity(motion.nodes, rotations, translations, links)
            _, slow = smoothness(of_nodes[:, SHIFT:].transpose(0, 2, 1), moment, links)
            rigid, smooth = p.rigidity_weight * schedule.rigidity, p.smoothness_weight * schedule.smoothness
            used = node_gradients[:, : len(motion.nodes)]
            used[TURN:SHIFT] = across(by_turn + rigid * turn, rotations).T
            _, back = trust(translations, motion.translations[moment], links)
            used[SHIFT:] = (by_shift + rigid * shift + smooth * slow + schedule.trust * back).T
            node_adams[moment].step(rasteriser.threads, nodes[moment], node_gradients, node_rates(schedule, done))
            of_nodes[moment, TURN:SHIFT] /= np.linalg.norm(of_nodes[moment, TURN:SHIFT], axis=0)
        if own is not None and own_adams is not None and own_gradient is not None:
            own_adams[moment].step(rasteriser.threads, own[moment], own_gradient, own_rates(schedule, p, done))
        pull += screen
        seen += screen > 0
        if step + 1 in rounds:
            still, kept, parents = grown(still[:, :count], pull, seen, p.splats, schedule)
            count = len(parents)
            binding = Binding(binding.nodes[parents], binding.weights[parents])
            adam.first, adam.second = (fit._matrix(np.where(kept >= 0, moments[:, kept], 0), 0) for moments in (adam.first, adam.second))
            moved, gradients, pull, seen = still.copy(), np.zeros_like(still), np.zeros(count), np.zeros(count)
            carried = Carried(rasteriser.threads, motion.nodes, binding, still.shape[1])
        now = time.monotonic()
        if now - reported > fit.REPORT_EVERY:
            reported, picture = now, None
            if now - shown > fit.PREVIEW_EVERY:
                shown, (moment, index) = now, previews.next()
                carried.carry(
                    still, of_nodes[moment, TURN:SHIFT].T, of_nodes[moment, SHIFT:].T, None if own is None else own[moment], moved
                )
                rasteriser.project(moved, count, fitted.cameras[index])
                picture = side_by_side(fitted, index, rasteriser.cropped(rasteriser.compose()))
            progress(0.02 + 0.98 * (step + 1) / p.iterations, f"Step {step + 1} of {p.iterations}, {count} splats", picture)
    refined = replace(
        motion,
        rotations=np.ascontiguousarray(of_nodes[:, TURN:SHIFT].transpose(0, 2, 1)),
        translations=np.ascontiguousarray(of_nodes[:, SHIFT:].transpose(0, 2, 1)),
    )
    return sequence_of(unpack(still, count), binding, refined, None if own is None else own[..., :count], p), refined


def targets_of(views: Views) -> Callable[[int], tuple[Float[np.ndarray, "5 rows columns"], tuple[int, int, int, int]]]:
    """`fit._target` of views by their number; as many are kept as have room."""
    each = 5 * 4 * views.alpha[0].size
    return lru_cache(maxsize=max(1, KEPT_TARGETS // each))(lambda index: fit._target(views, index))


def node_rates(schedule: Schedule, done: float) -> Float[np.ndarray, "7"]:
    decay = schedule.node_decay**done
    return np.array([schedule.turn_rate] * 4 + [schedule.shift_rate] * 3) * decay


def own_rates(schedule: Schedule, p: recipes.FitMotion, done: float) -> Float[np.ndarray, "7"]:
    """Rates fall to a tenth over the part of the fit in which Gaussians leave their nodes."""
    decay = 0.1 ** ((done - schedule.own_from) / (1 - schedule.own_from))
    found = np.zeros(OWN_ROWS)
    if p.residual:
        found[OWN_MEAN:OWN_COLOR], found[OWN_COLOR:OWN_OPACITY] = schedule.own_mean_rate, schedule.own_color_rate
    if p.opacity:
        found[OWN_OPACITY] = schedule.own_opacity_rate
    return found * decay


def hold_own(own: Float[np.ndarray, "t 7 columns"], moment: int, gradient: Float[np.ndarray, "7 columns"], schedule: Schedule) -> None:
    """Adds what draws the Gaussians' own changes of a moment to zero and to the moments beside it."""
    here = own[moment]
    beside = [own[other] for other in (moment - 1, moment + 1) if 0 <= other < len(own)]
    pull = here + sum((here - other for other in beside), np.zeros_like(here)) / max(len(beside), 1)
    pull[OWN_MEAN:OWN_COLOR] *= np.float32(2 * schedule.own_mean_weight)
    pull[OWN_COLOR:OWN_OPACITY] *= np.float32(2 * schedule.own_color_weight)
    pull[OWN_OPACITY] *= np.float32(2 * schedule.own_opacity_weight)
    gradient += pull


def grown(
    still: Float[np.ndarray, "rows n"], pull: np.ndarray, seen: np.ndarray, most: int, schedule: Schedule
) -> tuple[Float[np.ndarray, "rows columns"], np.ndarray, np.ndarray]:
    """A round of growth (`fit.pruned_and_grown`): the padded matrix, the columns whose moments are kept, and each column's parent."""
    numbered = np.concatenate([still, np.arange(still.shape[1], dtype=np.float64)[None]])
    numbered, kept = fit.pruned_and_grown(numbered, pull, seen, most, schedule.splats)
    if numbered.shape[1] == 0:
        raise KilnError("fit-diverged", "All splats have faded away.", "Check that pictures, alpha and cameras belong together.")
    return fit._matrix(numbered[:-1]), kept, numbered[-1].astype(np.int64)


def sequence_of(
    splats: Splats, binding: Binding, motion: Motion, own: Float[np.ndarray, "t 7 n"] | None, p: recipes.FitMotion
) -> SplatSequence:
    """What a fit has found, as a sequence."""
    means = np.stack([motion.carry(splats.means, binding, moment) for moment in range(len(motion))])
    turns = np.stack([motion.turns(binding, moment) for moment in range(len(motion))])
    splats = replace(splats, quaternions=splats.quaternions / np.maximum(np.linalg.norm(splats.quaternions, axis=1, keepdims=True), 1e-9))
    if own is None:
        return SplatSequence(splats, means, turns)
    rows = own.transpose(0, 2, 1)
    return SplatSequence(
        splats,
        means + rows[..., OWN_MEAN:OWN_COLOR],
        turns,
        opacity_logits=np.ascontiguousarray(rows[..., OWN_OPACITY]) if p.opacity else None,
        colors=np.ascontiguousarray(rows[..., OWN_COLOR:OWN_OPACITY]) if p.residual else None,
    )


class Previews:
    """Which view each preview shows: the moments one after another, each from the view nearest to the usual side."""

    def __init__(self, views: ViewSequence):
        time_of, cameras = views.time[~views.views.holdout], views.views.for_fitting.cameras
        self.looks = []
        for moment in range(len(views)):
            of_moment = np.nonzero(time_of == moment)[0]
            if len(of_moment):
                chosen = fit.preview_camera([cameras[i] for i in of_moment]).camera_from_world
                self.looks.append((moment, next(int(i) for i in of_moment if cameras[i].camera_from_world is chosen)))
        self.at = -1

    def next(self) -> tuple[int, int]:
        """A moment, and the number of a fitted view of it."""
        self.at = (self.at + 1) % len(self.looks)
        return self.looks[self.at]


def side_by_side(views: Views, index: int, planes: Float[np.ndarray, "5 h w"]) -> Float[np.ndarray, "h w2 3"]:
    """A view and, to its right, what is drawn of it."""
    alpha = views.alpha[index][..., None]
    source = views.images[index] * alpha + fit.PAPER * (1 - alpha)
    result = np.moveaxis(planes[:3], 0, -1) + fit.PAPER * (1 - planes[4][..., None])
    return np.clip(np.concatenate([source, result], 1), 0, 1).astype(np.float32)
