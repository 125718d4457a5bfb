"""Fits reach what they promise on views that they have not seen, and say what is wrong with views that cannot be fitted."""

import dataclasses

import numpy as np
import pytest

from backend.splats import gpu
from backend.splats.fit import SCHEDULE, fit, growth_steps, pruned_and_grown
from backend.splats.raster_cpu import LOG_SCALE, OPACITY, Rasteriser, pack
from backend.splats.render import render
from backend.splats.start import in_hull, on_surface
from protocol import recipes
from protocol.errors import Cancelled, KilnError
from tests.backend.splats import reference, sphere

QUICK = recipes.Fit(splats=1500, iterations=300, device="cpu")


def psnr(splats, views) -> float:
    """Mean over the held-out views, on black."""
    held, found = views.for_scoring, []
    for camera, image, alpha in zip(held.cameras, held.images, held.alpha, strict=True):
        error = render(splats, camera).color - image * alpha[..., None]
        found.append(-10 * np.log10((error**2).mean()))
    return float(np.mean(found))


@pytest.fixture(scope="module")
def views():
    return sphere.views()


@pytest.fixture(scope="module")
def fitted(views):
    return fit(views, QUICK, seed=1)


def test_held_out_views_look_right(views, fitted):
    start = in_hull(views.for_fitting, QUICK.splats, 0, np.random.default_rng(1))
    assert psnr(start, views) < 22
    assert psnr(fitted, views) > 29.5
    assert len(fitted) <= QUICK.splats


def test_the_mean_of_the_last_steps_is_better_than_the_last_step(views, fitted):
    last = fit(views, QUICK, seed=1, schedule=dataclasses.replace(SCHEDULE, mean_share=0.0))
    assert len(last) == len(fitted) and np.abs(last.means - fitted.means).max() < 0.1  # the same fit otherwise
    assert psnr(fitted, views) > psnr(last, views) + 0.02


def depth_error(splats, views) -> float:
    """Mean over the held-out views' pixels where both have a surface."""
    errors = []
    for camera, truth in zip(views.for_scoring.cameras, views.for_scoring.depth, strict=True):
        seen = render(splats, camera).depth
        both = (seen > 0) & (truth > 0)
        assert both.sum() > 0.9 * (truth > 0).sum()
        errors.append(np.abs(seen - truth)[both].mean())
    return float(np.mean(errors))


def test_depth_of_the_views_draws_splats_to_the_surface():
    views = sphere.views(geometry=True)
    without, with_depth = (fit(views, dataclasses.replace(QUICK, iterations=200, depth_weight=weight), seed=1) for weight in (0.0, 2.0))
    assert depth_error(with_depth, views) < 0.75 * depth_error(without, views)
    assert psnr(without, views) > 29


def spread_in_depth(splats, views) -> float:
    """Standard deviation of the depths of the splats' centres that one pixel shows, mean over the held-out views' solid pixels."""
    found, parameters = [], pack(splats)
    for camera in views.for_scoring.cameras:
        rasteriser = Rasteriser()
        rasteriser.project(parameters, len(splats), camera)
        turn = camera.camera_from_world
        depth = (splats.means @ turn[2, :3] + turn[2, 3] - np.linalg.norm(camera.centre)).astype(np.float32)
        moments = np.stack([depth, depth**2, 0 * depth, 0 * depth], 1)
        first, second, _, _, alpha = rasteriser.cropped(rasteriser.compose(features=moments))
        solid = alpha > 0.9
        first, second = first[solid] / alpha[solid], second[solid] / alpha[solid]
        found.append(np.sqrt(np.maximum(second - first**2, 0)).mean())
    return float(np.mean(found))


def test_an_evenly_coloured_body_does_not_come_out_hollow():
    """Without depth, splats anywhere along a ray explain one colour; those of a pixel are to lie together all the same."""
    plain = sphere.views()
    plain = dataclasses.replace(plain, images=np.full_like(plain.images, 0.8))
    usual = recipes.Fit(splats=1000, iterations=800, device="cpu")
    together, apart = (fit(plain, p, seed=0) for p in (usual, dataclasses.replace(usual, distortion_weight=0.0)))
    assert spread_in_depth(together, plain) < 0.85 * spread_in_depth(apart, plain)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(views, fitted):
    again, other = fit(views, QUICK, seed=1), fit(views, QUICK, seed=2)
    for field in dataclasses.fields(fitted):
        assert np.array_equal(getattr(fitted, field.name), getattr(again, field.name))
    assert len(other) != len(fitted) or not np.array_equal(other.means, fitted.means)


def test_held_out_views_are_not_looked_at(views, fitted):
    spoilt = dataclasses.replace(views, images=views.images.copy(), alpha=views.alpha.copy())
    spoilt.images[views.holdout], spoilt.alpha[views.holdout] = 0.123, 1
    assert np.array_equal(fit(spoilt, QUICK, seed=1).means, fitted.means)


def test_colour_that_changes_with_the_view_needs_harmonics(views):
    """Each view tinted by the direction that it looks from: degree 1 explains it and degree 0 cannot."""
    eyes = np.stack([camera.centre / np.linalg.norm(camera.centre) for camera in views.cameras])
    tinted = dataclasses.replace(views, images=np.clip(0.5 * views.images + 0.25 + 0.2 * eyes[:, None, None], 0, 1).astype(np.float32))
    plain, harmonic = (psnr(fit(tinted, dataclasses.replace(QUICK, sh_degree=degree), seed=0), tinted) for degree in (0, 1))
    assert harmonic > plain + 2


def test_hull_points_lie_inside_every_silhouette(views):
    start = in_hull(views.for_fitting, 2000, 0, np.random.default_rng(0))
    assert len(start) == 2000
    cell = 2 / 96
    distance = np.linalg.norm(start.means, axis=1)
    assert np.quantile(distance, 0.99) < sphere.RADIUS + 4 * cell and distance.max() < sphere.RADIUS + 8 * cell
    assert distance.min() > sphere.RADIUS - 5 * cell  # a shell, not a ball
    for camera, alpha in zip(views.for_fitting.cameras, views.for_fitting.alpha, strict=True):
        pixels = np.floor(camera.project(start.means.astype(float))[0]).astype(int)
        grown = np.pad(alpha > 0, 3)
        near = np.any([np.roll(grown, (i, j), (0, 1)) for i in range(-3, 4) for j in range(-3, 4)], 0)
        assert near[pixels[:, 1] + 3, pixels[:, 0] + 3].mean() > 0.97


def test_points_of_depth_lie_flat_on_the_surface():
    views = sphere.views(geometry=True).for_fitting
    start = on_surface(views, 1000, 0, np.random.default_rng(0))
    assert 500 < len(start) <= 1000
    outward = start.means / np.linalg.norm(start.means, axis=1, keepdims=True)
    assert np.abs(np.linalg.norm(start.means, axis=1) - sphere.RADIUS).max() < 0.02
    w, x, y, z = start.quaternions.T
    thin = np.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], 1)  # the rotated z axis
    assert np.median(np.abs((thin * outward).sum(1))) > 0.99
    assert (start.log_scales.argmin(1) == 2).all()
    expected = sphere.color(outward)
    assert np.abs(0.5 + 0.28209479 * start.sh[:, 0] - expected).mean() < 0.06


def test_fine_print_gets_small_splats_and_a_plain_side_large_ones():
    """Half of the sphere is striped, half is plain: nearly all splats beyond the even ones lie in the stripes."""
    views = sphere.views(geometry=True).for_fitting
    points = np.stack([camera.unproject(depth) for camera, depth in zip(views.cameras, views.depth, strict=True)])
    stripes = 0.5 + 0.4 * np.sign(np.sin(60 * points[..., 2:]))
    painted = dataclasses.replace(views, images=np.where(points[..., :1] > 0, stripes, 0.5).repeat(3, -1).astype(np.float32))
    start = on_surface(painted, 1000, 0, np.random.default_rng(0))
    assert 900 < len(start) <= 1000
    striped = start.means[:, 0] > 0.03
    assert striped.sum() > 3 * (~striped).sum()
    assert np.median(start.log_scales[striped, 0]) < np.median(start.log_scales[~striped, 0]) - 0.3
    even = on_surface(dataclasses.replace(views, images=np.full_like(views.images, 0.5)), 1000, 0, np.random.default_rng(0))
    assert 100 < len(even) <= 1000 and 0.7 < (even.means[:, 0] > 0).mean() / 0.5 < 1.3


def test_growth_removes_what_is_useless_and_splits_what_is_pulled_hardest():
    random = np.random.default_rng(0)
    matrix = pack(reference.cloud(100, 0, 0))[:, :100]
    matrix[OPACITY] = 1
    matrix[OPACITY, :10] = -9  # transparent
    seen = np.full(100, 5.0)
    seen[10:15] = 0
    pull = random.random(100)
    pull[50] = 99
    grown, kept = pruned_and_grown(matrix, pull, seen, 90, SCHEDULE)
    gone = {*range(15), *np.nonzero(matrix[LOG_SCALE:OPACITY].max(0) > np.log(SCHEDULE.largest))[0].tolist()}
    stay = set(range(100)) - gone
    assert grown.shape[1] == 90 == len(kept)
    split = sorted(stay - set(kept.tolist()))
    assert len(split) == 90 - len(stay) and set(kept.tolist()) - {-1} == stay - set(split)
    assert min(pull[split]) >= max(pull[sorted(stay - set(split))]) and 50 in split
    halves = grown[:, kept < 0]
    middle = (halves[:3, : len(split)] + halves[:3, len(split) :]) / 2
    found = np.abs(middle - matrix[:3, 50:51]).sum(0)
    assert found.min() < 1e-5
    volumes = halves[LOG_SCALE:OPACITY, found.argmin()].sum() - matrix[LOG_SCALE:OPACITY, 50].sum()
    assert volumes == pytest.approx(-np.log(SCHEDULE.split_shrink), abs=1e-5)
    assert growth_steps(1000, SCHEDULE)[-1] < 1000


def test_a_fit_reports_and_can_be_stopped(views, monkeypatch):
    monkeypatch.setattr("backend.splats.fit.REPORT_EVERY", 0.05)  # seconds; a small fit is over in one
    heard = []

    def listen(fraction, text="", preview=None):
        heard.append((fraction, preview))

    fit(views, QUICK, 0, listen)
    fractions = [fraction for fraction, _ in heard]
    assert fractions == sorted(fractions) and len(fractions) > 3 and fractions[-1] <= 1
    pictures = [picture for _, picture in heard if picture is not None]
    assert pictures and pictures[0].shape == (64, 64, 3) and pictures[0].dtype == np.float32
    assert 0 <= pictures[0].min() and pictures[0].max() <= 1 and np.ptp(pictures[0]) > 0.2

    def stop(fraction, text="", preview=None):
        if fraction > 0.05:
            raise Cancelled

    with pytest.raises(Cancelled):
        fit(views, dataclasses.replace(QUICK, iterations=100_000), 0, stop)


@pytest.mark.parametrize("geometry", [False, True], ids=["colours", "geometry"])
def test_every_term_can_be_asked_for_and_repeats_bit_by_bit_on_any_number_of_threads(geometry, monkeypatch):
    views = sphere.views(geometry=geometry)
    weights = dict(normal_weight=0.05, consistency_weight=0.05, flat_weight=0.05, distortion_weight=1.0, hull_weight=0.05)
    asked = dataclasses.replace(QUICK, iterations=120, **weights)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr("backend.splats.fit.Rasteriser", lambda threads=threads: Rasteriser(threads))
        found.append(fit(views, asked, seed=3))
    for field in dataclasses.fields(found[0]):
        assert np.array_equal(getattr(found[0], field.name), getattr(found[1], field.name))
    plain = fit(views, dataclasses.replace(QUICK, iterations=120), seed=3)
    thin, usual = (np.median(splats.log_scales.min(1) - splats.log_scales.max(1)) for splats in (found[0], plain))
    assert psnr(found[0], views) > psnr(plain, views) - 2
    assert thin < usual  # flatter, in the middle


def broken(views, **changes):
    return dataclasses.replace(views, **changes)


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda v: broken(v, alpha=np.zeros_like(v.alpha)), "solid"),
        (lambda v: broken(v, images=np.full_like(v.images, np.nan)), "images"),
        (lambda v: broken(v, holdout=np.arange(len(v)) > 0), "too few"),
        (lambda v: broken(v, alpha=np.stack([np.where((np.arange(64) < 20) == i % 2, a, 0) for i, a in enumerate(v.alpha)])), "nothing"),
        (lambda v: broken(v, depth=np.zeros_like(v.alpha), normals=np.zeros_like(v.images)), "depth"),
    ],
    ids=["empty", "not numbers", "one view", "views that disagree", "no depth"],
)
def test_views_that_cannot_be_fitted_are_refused_in_a_sentence(views, spoil, says):
    with pytest.raises(KilnError, match=says) as refused:
        fit(spoil(views), QUICK, seed=0)
    assert refused.value.code == "bad-input" and refused.value.hint


@pytest.mark.parametrize("value", [0, 1], ids=["of nothing", "of everything"])
def test_half_the_views_without_a_silhouette(views, value):
    """Alpha all 0 in every other view leaves no hull; all 1 leaves the hull of the others."""
    alpha = views.alpha.copy()
    alpha[::2] = value
    spoilt = broken(views, alpha=alpha)
    if value == 0:
        with pytest.raises(KilnError, match="enclose nothing"):
            fit(spoilt, QUICK, seed=0)
    else:
        assert len(fit(spoilt, dataclasses.replace(QUICK, iterations=60), seed=0)) > 100


def test_pictures_without_a_silhouette_fit_or_are_refused(views):
    everything = broken(views, alpha=np.ones_like(views.alpha))
    splats = fit(everything, dataclasses.replace(QUICK, iterations=60), seed=0)
    assert 0 < len(splats) <= QUICK.splats and np.isfinite(splats.means).all()


def test_pictures_of_another_object_in_half_the_views_give_splats(views):
    """Another picture in the same silhouette: nothing explains both, and what comes out is finite."""
    images = views.images.copy()
    images[::2] = np.random.default_rng(0).random(images[::2].shape)
    splats = fit(broken(views, images=images), dataclasses.replace(QUICK, iterations=100), seed=0)
    assert len(splats) > 100
    for field in dataclasses.fields(splats):
        assert np.isfinite(getattr(splats, field.name)).all()


def stamped(views, nonsense):
    """The views with nonsense over the middle of every second one, and which pixels count."""
    counts = np.ones(views.alpha.shape, np.uint8)
    counts[::2, 24:40, 16:40] = 0
    spoilt = {}
    for name in ("images", "alpha", "depth", "normals"):
        values = getattr(views, name)
        if values is not None:
            spoilt[name] = values.copy()
            spoilt[name][counts == 0] = nonsense(values[counts == 0].shape)
    return broken(views, **spoilt), counts


@pytest.mark.parametrize("geometry", [False, True], ids=["colours", "geometry"])
def test_pixels_that_do_not_count_are_not_looked_at(geometry):
    views, p = sphere.views(geometry=geometry), dataclasses.replace(QUICK, iterations=100, hull_weight=0.05)
    (one, counts), (other, _) = stamped(views, np.ones), stamped(views, lambda shape: np.full(shape, np.nan))
    without, again = fit(one, p, seed=0, counts=counts), fit(other, p, seed=0, counts=counts.astype(np.float32))
    for field in dataclasses.fields(without):
        assert np.array_equal(getattr(without, field.name), getattr(again, field.name))
    assert psnr(without, views) > psnr(fit(views, p, seed=0), views) - 1
    assert psnr(without, views) > psnr(fit(one, p, seed=0), views) + 1


@pytest.mark.parametrize(
    "counts, says",
    [
        (lambda v: np.ones((3, 3)), "shape"),
        (lambda v: np.full(v.alpha.shape, 255, np.uint8), "0 to 1"),
        (lambda v: np.zeros(v.alpha.shape), "where pixels count"),
    ],
    ids=["another shape", "not shares", "none"],
)
def test_counts_that_do_not_fit_the_views_are_refused_in_a_sentence(views, counts, says):
    with pytest.raises(KilnError, match=says) as refused:
        fit(views, QUICK, seed=0, counts=counts(views))
    assert refused.value.code == "bad-input" and refused.value.hint


def test_asking_for_a_gpu_that_is_not_there_is_refused(views):
    if not gpu.why_not():
        pytest.skip("this machine has a GPU that gsplat runs on")
    with pytest.raises(KilnError) as refused:
        fit(views, dataclasses.replace(QUICK, device="cuda"), seed=0)
    assert refused.value.code == "no-device" and gpu.why_not() in refused.value.message
