"""Azimuths of turntable videos against the cameras that they were drawn with."""

import math

import numpy as np
import pytest

from backend.train.objects import make
from backend.train.turntables import picture
from backend.views.coherence import unexplained
from backend.views.orbit import Orbit
from backend.views.turning import azimuths, turning


def clip(angles, thing=None, elevation=15.0, size=48):
    """Frames at the given azimuths of an object that looks different from every side."""
    thing = thing or make(3, 6)  # a car
    shots = Orbit(np.asarray(angles, float), elevation, 40.0, 1 / math.sin(math.radians(20.0))).cameras(size)
    frames = np.stack([picture(thing, shot, supersample=2)[0] for shot in shots])
    return (frames + np.random.default_rng(0).normal(0, 0.01, frames.shape)).clip(0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def turn():
    """24 frames, 15 degrees apart."""
    return clip(np.arange(24) * 15.0)


def off(found, truth):
    """Degrees, in the worse case, but for the direction."""
    return min(np.abs(found - truth).max(), np.abs(found + truth).max())


def test_a_whole_turn_is_even(turn):
    assert off(azimuths(turn), np.arange(24) * 15.0) < 0.1
    assert off(azimuths(turn[::2]), np.arange(12) * 30.0) < 0.1


def test_a_turn_whose_last_frame_is_the_first_again(turn):
    found = turning(np.concatenate([turn, turn[:1]]))
    assert found.closed and off(found.azimuths, np.arange(25) * 15.0) < 3


def test_a_clip_that_goes_on_into_a_second_turn_is_seen_to(turn):
    found = turning(np.concatenate([turn, turn[:7]]))
    assert found.closed and off(found.azimuths, np.arange(31) * 15.0) < 4


def test_a_closure_between_two_frames():
    """14 degrees a frame: 25.7 frames a turn."""
    angles = np.arange(30) * 14.0
    assert off(azimuths(clip(angles)), angles) < 8


def test_rests_at_the_ends_do_not_turn(turn):
    resting = np.concatenate([turn[:1]] * 4 + [turn] + [turn[-1:]] * 3)
    truth = np.concatenate([np.zeros(4), np.arange(24) * 15.0, np.full(3, 345.0)])
    assert off(azimuths(resting), truth) < 16  # whether the last step closes the turn is not seen


def test_the_direction_shows_in_which_way_the_front_goes(turn):
    there, back = turning(turn), turning(np.concatenate([turn[:1], turn[:0:-1]]))
    assert there.direction == 1 and there.azimuths[1] > 0
    assert back.direction == -1 and back.azimuths[1] < 0


def test_what_looks_the_same_from_everywhere_is_taken_to_turn_once(turn):
    frames = np.repeat(turn[:1], 16, 0)
    found = turning(frames)
    assert found.direction == 0 and not found.closed
    assert np.isfinite(found.azimuths).all() and len(found.azimuths) == 16


def test_silhouettes_fit_together_at_their_own_height_and_field_of_view(turn):
    heights = np.arange(0.0, 46.0, 7.5)
    cover = (np.abs(clip(np.arange(8) * 45.0, elevation=30.0, size=64) - 1).max(3) > 0.1).astype(np.float32)
    at = np.arange(8) * 45.0
    fits = unexplained(cover, at, heights, 40.0)
    assert heights[fits.argmin()] == 30.0 and fits.min() < 0.01 < fits.max()
    assert fits.min() < unexplained(cover, at, heights, 60.0).min()
    assert fits.min() < 0.5 * unexplained(cover, -at, heights, 40.0).min()
