"""The solver of denoising ladders, where the solution is known: data that are spread normally, so that the best guess is a share of what is
seen."""

import math

import pytest
import torch

from backend.diffusion.sigmas import karras, solve

SPREAD = 0.7


def best_guess(x, level):
    return x * SPREAD**2 / (SPREAD**2 + level**2)


def error(steps):
    """Of the solver's end, against the flow's: x(level) shrinks as the spread of noisy data does."""
    noise = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = karras(0.01, 20.0, steps)
    exact = noise * levels[0] * SPREAD / math.sqrt(SPREAD**2 + levels[0] ** 2)
    return float((solve(best_guess, None, noise, levels) - exact).abs().max())


def test_it_is_of_second_order():
    errors = [error(steps) for steps in (10, 20, 40)]
    assert errors[0] < 0.2
    assert errors[0] / errors[1] > 3.5 and errors[1] / errors[2] > 3.5  # first order halves, second quarters


def test_a_ladder_goes_from_its_share_of_the_top_to_nothing():
    whole, half = karras(0.002, 700.0, 20), karras(0.002, 700.0, 20, 0.5)
    assert whole[0] == pytest.approx(700) and whole[-2] == pytest.approx(0.002) and whole[-1] == 0 and len(whole) == 21
    assert half[0] == pytest.approx(((700 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7) and half[-2] == pytest.approx(0.002)
    assert all(upper > lower for upper, lower in zip(whole[:-1], whole[1:], strict=True))


def test_known_frames_are_at_each_level_what_they_would_be_there_and_end_as_they_are():
    draw = torch.Generator().manual_seed(1)
    noise, known = torch.randn(3, 1, 2, 2, generator=draw), torch.randn(3, 1, 2, 2, generator=draw)
    keep = torch.tensor([True, False, True])
    levels, seen = karras(0.01, 20.0, 6), []

    def guess(x, level):
        seen.append(level)
        torch.testing.assert_close(x[keep], (known + noise * level)[keep])
        return best_guess(x, level)

    told = []
    end = solve(guess, known, noise, levels, known, keep, lambda step, clean: told.append(step))
    assert seen == levels[:-1] and told == [1, 2, 3, 4, 5, 6]
    torch.testing.assert_close(end[keep], known[keep], rtol=0, atol=0)
    assert (end[1] - known[1]).abs().max() > 0.01
