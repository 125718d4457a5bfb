"""The elevation regressor that ships, on objects of families that it has not seen; and its training, which can be stopped and goes on."""

import json

import numpy as np
import pytest
import torch

from backend import cli
from backend.nets.elevation import FILE, FOLDER, RANGE, estimate, load, mirrored, over_the_turn
from backend.train.elevation import CHECKPOINT, LOG, SAMPLES, Settings, held_out, train
from protocol.errors import Cancelled, KilnError

SMALL = Settings(turntables=8, weighed=3, looks=1, steps=6, batch=4, report=3, measured=2)


@pytest.fixture(scope="module")
def turns():
    frames, heights, _ = held_out(20, 500, 8)
    return frames[..., :3].astype(np.float32) / 255, heights


def test_held_out_families_are_guessed_far_better_than_by_a_constant(turns):
    frames, heights = turns
    error = np.abs([estimate(turn) - height for turn, height in zip(frames, heights)]).mean()
    assert error < 5 < 0.5 * np.abs(heights - 22.5).mean()


def test_the_start_of_the_turn_its_direction_and_the_size_of_frames_do_not_matter(turns):
    for turn in turns[0][:1]:
        guess = estimate(turn)
        assert RANGE[0] <= guess <= RANGE[1]
        assert estimate(np.roll(turn, 3, 0)) == pytest.approx(guess, abs=2.5)
        assert estimate(turn[::-1]) == pytest.approx(guess, abs=2.5)
        assert estimate(turn.repeat(2, 1).repeat(2, 2)) == pytest.approx(guess, abs=2.5)


def test_mirrored_maps_are_those_of_mirrored_frames(turns):
    frames = torch.from_numpy(turns[0][:2, ::2]).movedim(-1, 2)
    assert torch.allclose(mirrored(over_the_turn(frames)), over_the_turn(frames.flip(-1)), atol=1e-5)


def test_fewer_than_four_views_get_a_sentence(turns):
    with pytest.raises(KilnError, match="too few to see the elevation"):
        estimate(turns[0][0, :3])


def test_weights_are_small_and_missing_ones_get_a_sentence(tmp_path):
    assert (FOLDER / FILE).stat().st_size < 4_000_000
    with pytest.raises(KilnError, match="cannot be loaded") as error:
        load(tmp_path)
    assert error.value.code == "no-weights"


@pytest.mark.long
def test_training_that_was_stopped_goes_on_to_the_same_weights(tmp_path):
    def stop(share, text="", preview=None):
        if (tmp_path / "stopped" / CHECKPOINT).exists() and text.startswith("step 4"):
            raise Cancelled

    with pytest.raises(Cancelled):
        train(tmp_path / "stopped", SMALL, progress=stop)
    assert not (tmp_path / "stopped" / FILE).exists()
    train(tmp_path / "stopped", SMALL)
    error = train(tmp_path / "whole", SMALL)
    one, other = load(tmp_path / "stopped").state_dict(), load(tmp_path / "whole").state_dict()
    assert all(torch.allclose(one[name], other[name], atol=1e-3) for name in one)
    steps = [json.loads(line)["step"] for line in (tmp_path / "stopped" / LOG).read_text().splitlines()]
    assert steps == [3, 6] and 0 < error < 45 and (tmp_path / "whole" / SAMPLES).exists()
    with pytest.raises(KilnError, match="other settings"):
        train(tmp_path / "whole", Settings(turntables=4, weighed=3, looks=1, steps=6, batch=4, report=3, measured=2))


@pytest.mark.long
def test_the_command_line_trains(tmp_path, capsys):
    assert cli.main(["train", "elevation", "--out", str(tmp_path / "run"), "--turntables", "4", "--steps", "1"]) == 0
    assert "Mean error" in capsys.readouterr().out and (tmp_path / "run" / FILE).exists()
    assert cli.main(["train", "elevation", "--out", str(tmp_path), "--steps", "0"]) == cli.BAD
