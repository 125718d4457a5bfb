"""Splats from views that do not quite agree: the fit explains what it is given, finds cameras, and says what it cannot do."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from backend.splats import gpu
from backend.splats.autograd import draw_views
from backend.splats.fit_images import _Turn, at_centre, fit_images
from backend.splats.raster_cpu import pack
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


def test_cameras_are_found_along_with_the_splats(turntable):
    """Told an elevation 12 degrees too high, a lens too short and azimuths 5 % of a step off, the fit that estimates them beats the one
    that does not by more than 2 dB, from directions of neither; splats and orbit belong together, and the first view stays where it was."""
    noise = np.array([0, 2, -1, -3, 1, 2, -2, 1.5])
    true = dataclasses.replace(turntable, azimuths=turntable.azimuths + noise)
    told = Orbit.turn(8, 27.0, 50.0)
    views = dataclasses.replace(seen(true), cameras=told.cameras(SIZE))
    ratio = (np.tan(np.radians(20)) * true.distance) / (np.tan(np.radians(25)) * told.distance)
    between = dataclasses.replace(true, azimuths=turntable.azimuths + 22.5)
    scores = []
    for orbit in (None, told):
        splats, found = fit_images(views, QUICK, 0, orbit=orbit)
        # Told and true world differ in size: pictures show the focal length by the distance, not the distance.
        larger = dataclasses.replace(splats, means=splats.means * ratio, log_scales=splats.log_scales + np.float32(np.log(ratio)))
        scores.append(psnr(larger, between, seen(between)))
    assert found is not None and found.azimuths[0] == pytest.approx(0)
    assert abs(found.elevation - 15) < 6
    assert psnr(splats, found, seen(true)) > scores[0]
    assert scores[1] > scores[0] + 2


def test_what_a_camera_changes_is_what_its_gradient_says(turntable):
    """Central differences of the distance from the picture of another camera, by azimuth, elevation and focal length. Gaussians are round:
    that their shapes turn is left out."""
    random = np.random.default_rng(0)
    start = at_centre(100, random)
    start = dataclasses.replace(
        start, log_scales=start.log_scales + np.float32(0.7), sh=random.normal(size=start.sh.shape).astype(np.float32)
    )
    matrix = torch.tensor(pack(start)[:, : len(start)].copy())
    engine, state = gpu.Engine("CPU", draw_views, None), SimpleNamespace(pulled=None, room=None)

    def drawn(**changes: float):
        turn = _Turn(turntable, SIZE, torch.device("cpu"), 10)
        with torch.no_grad():
            for name, value in changes.items():
                getattr(turn, name).fill_(value)
        return turn, turn.draw(engine, matrix, [3], state)[:, [0, 1, 2, 4]]  # depth counts from another place

    wanted = drawn(azimuths=4.0, elevation=5.0, focal=0.3)[1].detach()
    # Off the axis a Gaussian that moves away shows a little more of its depth, which the focal length's gradient leaves out.
    for name, step, within in (("azimuths", 0.3, 0.05), ("elevation", 0.3, 0.05), ("focal", 0.03, 0.15)):
        higher, lower = (float((drawn(**{name: sign * step})[1] - wanted).square().sum().detach()) for sign in (1, -1))
        turn, picture = drawn()
        (picture - wanted).square().sum().backward()
        assert float(getattr(turn, name).grad.sum()) == pytest.approx((higher - lower) / (2 * step), rel=within), name


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
