"""Moving splats: the chain rule back to nodes and rest is right, and a fit mends the motion that it began with."""

import dataclasses
import importlib.util

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from backend.splats import fit_motion as fitting
from backend.splats import fit_motion_gpu, gpu
from backend.splats.fit_motion import fit_motion
from backend.splats.motion import Binding, Motion, product
from backend.splats.moving import OWN_ROWS, Carried, own_gradients
from backend.splats.raster_cpu import OPACITY, SH, Rasteriser, pack
from backend.splats.render import render
from protocol import recipes
from protocol.errors import Cancelled, KilnError
from tests.backend.splats import two_balls
from tests.backend.splats.test_raster_cpu import scene

QUICK = recipes.FitMotion(splats=1200, iterations=300, nodes=28, device="cpu")
MOMENTS = 4


@pytest.fixture(scope="module")
def views():
    return two_balls.views(MOMENTS)


@pytest.fixture(scope="module")
def coarse():
    return two_balls.motion(MOMENTS, error=0.02)


@pytest.fixture(scope="module")
def fitted(views, coarse):
    return fit_motion(views, coarse, QUICK, seed=1)


def psnr(sequence, views) -> float:
    """Mean over the held-out views of all moments, on black."""
    found = []
    for moment in range(len(views)):
        held = views.scored_at(moment)
        for camera, picture in zip(held.cameras, held.on_black(), strict=True):
            found.append(-10 * np.log10(((render(sequence.at(moment), camera).color - picture) ** 2).mean()))
    return float(np.mean(found))


def tracking(motion: Motion) -> float:
    """Mean distance of carried points of the balls from where they are."""
    rest, ball = two_balls.points(200)
    binding = motion.bind(rest)
    off = [motion.carry(rest, binding, moment) - two_balls.carried(rest, ball, moment) for moment in range(len(motion))]
    return float(np.linalg.norm(off, axis=2).mean())


# ---------------------------------------------------------------- the chain rule


def bound(seed: int = 0):
    """Some Gaussians with three nodes each of five, a pull on every number of theirs once moved, and one moment of the nodes."""
    random = np.random.default_rng(seed)
    splats = scene(1, seed)
    count = len(splats)
    weights = random.random((count, 3))
    binding = Binding(random.integers(0, 5, (count, 3)).astype(np.int32), (weights / weights.sum(1, keepdims=True)).astype(np.float32))
    still = pack(splats)
    nodes, shifts = random.normal(0, 0.5, (5, 3)).astype(np.float32), random.normal(0, 0.1, (5, 3)).astype(np.float32)
    turns = np.concatenate([np.ones((5, 1)), random.normal(0, 0.4, (5, 3))], 1) * np.array([1, -1, 1, -1, 1])[:, None]
    turns = (turns / np.linalg.norm(turns, axis=1, keepdims=True)).astype(np.float32)
    own = np.zeros((OWN_ROWS, still.shape[1]), np.float32)
    own[:, :count] = random.normal(0, 0.1, (OWN_ROWS, count))
    pull = np.zeros_like(still)
    pull[:, :count] = random.normal(0, 1, (len(still), count))
    return still, count, binding, nodes, turns, shifts, own, pull


def test_means_and_rotations_move_as_the_motion_says():
    still, count, binding, nodes, turns, shifts, own, _ = bound()
    identity = np.tile(np.array([1, 0, 0, 0], np.float32), (5, 1))
    motion = Motion(0, nodes, np.stack([identity, turns]), np.stack([0 * shifts, shifts]), nodes, binding)
    moved = still.copy()
    Carried(2, nodes, binding, still.shape[1]).carry(still, turns, shifts, own, moved)
    assert np.abs(moved[:3, :count].T - own[:3, :count].T - motion.carry(still[:3, :count].T, binding, 1)).max() < 1e-5
    expected, found = product(motion.turns(binding, 1), still[3:7, :count].T), moved[3:7, :count].T
    expected, found = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in (expected, found))
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(moved[OPACITY] - still[OPACITY] - own[6]).max() < 1e-5
    assert np.abs(moved[SH : SH + 3] - still[SH : SH + 3] - own[3:6]).max() < 1e-5


@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_are_those_of_autograd(seed):
    still, count, binding, nodes, turns, shifts, own, pull = bound(seed)
    carried = Carried(2, nodes, binding, still.shape[1])
    moved, gradients, by_own = still.copy(), pull.copy(), np.zeros_like(own)
    carried.carry(still, turns, shifts, own, moved)
    own_gradients(gradients, by_own)
    by_turn, by_shift = carried.carry_back(still, gradients)

    wide = {"dtype": torch.float64, "requires_grad": True}
    tensors = [torch.tensor(values, **wide) for values in (still[:, :count], turns.T, shifts.T, own[:, :count])]
    carriers, shares = torch.tensor(binding.nodes.astype(np.int64)), torch.tensor(binding.weights.astype(np.float64))
    matrix = fit_motion_gpu.carry(tensors[0], torch.tensor(nodes.astype(np.float64)), carriers, shares, *tensors[1:])
    assert np.abs(matrix.detach().numpy() - moved[:, :count]).max() < 1e-5
    (matrix * torch.tensor(pull[:, :count].astype(np.float64))).sum().backward()
    for found, tensor in zip((gradients[:, :count], by_turn.T, by_shift.T, by_own[:, :count]), tensors, strict=True):
        truth = tensor.grad.numpy()
        assert np.abs(found - truth).max() < 1e-4 * np.abs(truth).max()


def test_energies_and_their_gradients_are_those_of_autograd():
    motion = two_balls.motion(MOMENTS, error=0.05)
    links = fitting.links_of(motion, 4)
    first, second = torch.tensor(links.first), torch.tensor(links.second)
    turns = torch.tensor(motion.rotations[2].T.astype(np.float64), requires_grad=True)
    shifts = [torch.tensor(one.T.astype(np.float64), requires_grad=True) for one in motion.translations]
    energy, by_turn, by_shift = fitting.rigidity(motion.nodes, motion.rotations[2], motion.translations[2], links)
    rough, by_place = fitting.smoothness(motion.translations, 2, links)
    theirs = fit_motion_gpu.rigidity(torch.tensor(motion.nodes.astype(np.float64)), turns, shifts[2], first, second, links.length)
    theirs.backward()
    assert energy > 0.01 and np.isclose(energy, theirs.item(), rtol=1e-4)
    assert np.abs(by_turn - turns.grad.numpy().T).max() < 1e-4 * np.abs(by_turn).max()
    assert np.abs(by_shift - shifts[2].grad.numpy().T).max() < 1e-4 * np.abs(by_shift).max()
    shifts[2].grad = None
    theirs = fit_motion_gpu.smoothness(shifts, 2, links.length)
    theirs.backward()
    assert np.isclose(rough, theirs.item(), rtol=1e-4)
    assert np.abs(by_place - shifts[2].grad.numpy().T).max() < 1e-4 * np.abs(by_place).max() and shifts[1].grad is None
    shifts[2].grad = None
    far, back = fitting.trust(motion.translations[2], motion.translations[1], links)
    theirs = fit_motion_gpu.trust(shifts[2], shifts[1].detach(), links.length)
    theirs.backward()
    assert np.isclose(far, theirs.item(), rtol=1e-4) and np.abs(back - shifts[2].grad.numpy().T).max() < 1e-4 * np.abs(back).max()
    own = np.random.default_rng(0).normal(0, 1, (3, OWN_ROWS, 16)).astype(np.float32)
    gradient = np.zeros_like(own[0])
    fitting.hold_own(own, 2, gradient, fitting.SCHEDULE)
    tensors = {moment: torch.tensor(own[moment], requires_grad=True) for moment in (1, 2)}
    fit_motion_gpu.own_energy(tensors, 2, fitting.SCHEDULE).backward()
    assert np.abs(gradient - tensors[2].grad.numpy()).max() < 1e-5 * np.abs(gradient).max()


def test_a_rigid_motion_has_no_energy_and_parts_that_do_not_touch_have_no_links():
    links = fitting.links_of(two_balls.motion(MOMENTS), 8)
    assert ((links.first < 14) == (links.second < 14)).all()
    motion = two_balls.motion(MOMENTS)
    for moment in range(MOMENTS):
        assert fitting.rigidity(motion.nodes, motion.rotations[moment], motion.translations[moment], links)[0] < 1e-9


# ---------------------------------------------------------------- the whole fit


def test_a_fit_shows_every_moment_and_mends_the_motion(views, coarse, fitted):
    sequence, motion = fitted
    assert len(sequence) == MOMENTS and len(sequence.splats) <= QUICK.splats
    unmoved = fit_motion(views, two_balls.still(MOMENTS), dataclasses.replace(QUICK, iterations=60), seed=1)[0]
    assert psnr(unmoved, views) < 20
    assert psnr(sequence, views) > 26
    assert tracking(motion) < 0.75 * tracking(coarse)
    assert np.array_equal(motion.rotations[0], coarse.rotations[0]) and np.array_equal(motion.translations[0], coarse.translations[0])
    assert np.allclose(np.linalg.norm(motion.rotations, axis=2), 1, atol=1e-5)


def test_what_nodes_cannot_say_splats_do_by_themselves(views, coarse, fitted):
    plain = fit_motion(views, coarse, dataclasses.replace(QUICK, residual=False, opacity=False), seed=1)[0]
    assert plain.colors is None and plain.opacity_logits is None
    assert fitted[0].colors is not None and fitted[0].opacity_logits is not None
    assert psnr(fitted[0], views) > psnr(plain, views)


def test_one_seed_gives_one_result_with_any_number_of_threads(views, coarse, monkeypatch):
    quick = dataclasses.replace(QUICK, iterations=60)
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(fitting, "Rasteriser", lambda threads=threads: Rasteriser(threads))
        results.append(fit_motion(views, coarse, quick, seed=1))
    (one, motion), (other, again) = results
    assert np.array_equal(one.means, other.means) and np.array_equal(one.turns, other.turns)
    assert np.array_equal(one.colors, other.colors) and np.array_equal(one.splats.sh, other.splats.sh)
    assert np.array_equal(motion.rotations, again.rotations) and np.array_equal(motion.translations, again.translations)


def test_parts_that_rest_hides_are_borrowed_from_other_moments(views):
    """Cameras at rest that all look from one side: the other side begins where later moments show it."""
    keep = (views.time > 0) | (np.stack([camera.centre for camera in views.views.cameras])[:, 2] > 0.2)
    part = dataclasses.replace(views, views=views.views.subset(keep), time=views.time[keep])
    motion = two_balls.motion(MOMENTS)
    splats, binding = fitting.first_splats(part, motion, QUICK, np.random.default_rng(0), fitting.SCHEDULE)
    truth = two_balls.points(200)[0]
    shares = [(cKDTree(points).query(truth)[0] < 0.06).mean() for points in (fitting.surface_points(part.at(0))[0], splats.means)]
    assert shares[0] < 0.75 and shares[1] > 0.95
    centres = [centre for _, centre in two_balls.poses(0)]
    surface = [np.abs(np.linalg.norm(splats.means - centre, axis=1) - r) for centre, r in zip(centres, two_balls.RADII, strict=True)]
    assert np.quantile(np.minimum(*surface), 0.95) < 0.03
    ball = (surface[1] < surface[0]).astype(int)
    assert ((binding.nodes[:, 0] >= 14) == ball).mean() > 0.97


def test_cancelling_stops_the_fit_and_previews_show_source_and_result(views, coarse):
    pictures = []

    def listen(fraction, text, preview=None):
        if preview is not None:
            pictures.append(preview)
            raise Cancelled

    with pytest.raises(Cancelled):
        fit_motion(views, coarse, QUICK, seed=1, progress=listen)
    size = views.views.alpha.shape[1]
    assert pictures[0].shape == (size, 2 * size, 3)
    source, result = pictures[0][:, :size], pictures[0][:, size:]
    assert source.std() > 0.05 and np.abs(source - result).mean() < 0.1


def test_views_without_depth_and_motions_of_other_lengths_are_refused(views, coarse):
    flat = dataclasses.replace(views, views=dataclasses.replace(views.views, depth=None, normals=None))
    with pytest.raises(KilnError, match="no depth"):
        fit_motion(flat, coarse, QUICK, seed=0)
    with pytest.raises(KilnError, match="3 moments"):
        fit_motion(views, two_balls.motion(3), QUICK, seed=0)


@pytest.mark.skipif(importlib.util.find_spec("warp") is None, reason="NOT RUN: needs warp-lang (requirements/development.txt)")
def test_the_engine_for_gpus_fits_the_same():
    """Four views a step, so it is ahead of the CPU after as many steps."""
    few, near = two_balls.views(3, size=32), two_balls.motion(3, error=0.02)
    quick = dataclasses.replace(QUICK, splats=400, iterations=20)
    device, silent = torch.device("cpu"), lambda *_: None
    sequence, motion = fit_motion_gpu.fit_with(gpu._loaded_warp(), device, few, near, quick, 1, silent, fitting.SCHEDULE)
    assert len(sequence) == 3 and sequence.colors is not None and np.abs(sequence.colors).max() > 0
    assert psnr(sequence, few) > psnr(fit_motion(few, near, quick, seed=1)[0], few)
    assert np.array_equal(motion.translations[0], near.translations[0])
    moved = np.linalg.norm(motion.translations - near.translations, axis=2)[1:]
    assert (moved > 1e-4).mean() > 0.9 and moved.max() < 0.05
