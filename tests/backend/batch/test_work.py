"""How long the rest of a batch will take."""

from pathlib import Path

import pytest

from backend.batch.items import Folder
from backend.batch.manifest import Item
from backend.batch.work import Work, seconds_left
from protocol import recipes


def work(state, preset="draft", kind="model", **more):
    values = recipes.values(recipes.make("reconstruct", {}, preset))
    return Work(Item(1, "", Path("a.glb"), kind, "reconstruct", preset, values, name="a"), Folder(Path("out"), "a"), state, **more)


def done(capture, compute, preset="draft"):
    one = work("done", preset)
    one.seconds = {"capture": capture * one.cost[0], "compute": compute * one.cost[1]}
    return one


def test_nothing_is_said_before_an_item_has_finished():
    assert seconds_left([work("waiting"), work("computing"), work("failed")], 1, 1) is None


def test_finished_items_say_how_fast_this_machine_is():
    capture, compute = work("waiting").cost
    rest = [work("waiting"), work("queued"), work("failed"), work("waiting", left_out=True)]
    assert seconds_left([done(1, 3), *rest], 1, 1) == pytest.approx(6 * compute, abs=0.1)
    assert seconds_left([done(1, 3), *rest], 1, 2) == pytest.approx(3 * compute, abs=0.1)
    assert seconds_left([done(100, 1), *rest], 1, 1) == pytest.approx(100 * capture, abs=0.1)  # Blender is what takes longer
    assert seconds_left([done(100, 1), *rest], 4, 1) == pytest.approx(max(25 * capture, 2 * compute), abs=0.1)


def test_items_of_the_same_preset_tell_best():
    slow, fast = work("waiting", "standard"), work("waiting", "draft")
    assert seconds_left([done(1, 4, "standard"), done(1, 2, "draft"), slow], 1, 1) == pytest.approx(4 * slow.cost[1], abs=0.1)
    assert seconds_left([done(1, 4, "standard"), done(1, 2, "standard"), fast], 1, 1) == pytest.approx(3 * fast.cost[1], abs=0.1)
