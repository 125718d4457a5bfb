"""Splats from views that do not quite agree: the fit explains what it is given, finds cameras, and says what it cannot do."""

import dataclasses

import numpy as np
import pytest

from backend.splats.fit_images import fit_images
from backend.splats.render import render
from backend.views.orbit import Orbit
from backend.views.views import Frame, Views
from protocol import recipes
from protocol.errors import KilnError
from tests.backend.splats import sphere

SIZE = 32
QUICK = recipes.FitImages(start=300, splats=800, iterations=240, features="gradients", device="cpu")


def seen(orbit: Orbit) -> Views:
    cameras = orbit.cameras(SIZE)
    images, alpha, _, _ = (np.stack(part) for part in zip(*(sphere.picture(camera) for camera in cameras), strict=True))
    return Views(cameras, images, alpha, None, None, np.zeros(len(cameras), bool), Frame(np.zeros(3), 1.0))


def psnr(splats, orbit: Orbit, views: Views) -> float:
    """On white, of the views by an orbit's cameras."""
    errors = []
    for camera, image, alpha in zip(orbit.cameras(SIZE), views.images, views.alpha, strict=True):
        truth = image * alpha[..., None] + 1 - alpha[..., None]
        errors.append(((render(splats, camera, (1, 1, 1)).color - truth) ** 2).mean())
    return float(-10 * np.log10(np.mean(errors)))


@pytest.fixture(scope="module")
def turntable() -> Orbit:
    return Orbit.turn(8, 15.0, 40.0)


def test_what_is_fitted_looks_right_from_elsewhere(turntable):
    splats, orbit = fit_images(seen(turntable), QUICK, 0)
    assert orbit is None and len(splats) <= QUICK.splats
    between = dataclasses.replace(turntable, azimuths=turntable.azimuths + 22.5, elevation=25.0)
    assert psnr(splats, between, seen(between)) > 22


def test_same_seed_same_splats(turntable):
    views = seen(turntable)
    a, b = (fit_images(views, dataclasses.replace(QUICK, iterations=50), 5)[0] for _ in range(2))
    assert np.array_equal(a.means, b.means) and np.array_equal(a.sh, b.sh)


def test_no_loss_is_left_when_all_are_switched_off(turntable):
    off = dataclasses.replace(QUICK, lpips_weight=0, ssim_weight=0, mask_weight=0, iterations=50)
    with pytest.raises(KilnError, match="weight"):
        fit_images(seen(turntable), off, 0)


def test_an_orbit_of_another_length_is_refused(turntable):
    with pytest.raises(KilnError, match="8 views"):
        fit_images(seen(turntable), QUICK, 0, orbit=Orbit.turn(7, 15.0, 40.0))
