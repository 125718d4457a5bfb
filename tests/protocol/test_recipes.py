"""Recipes: one definition, checked values, and documents that follow it."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from protocol import recipes
from protocol.errors import KilnError

ROOT = Path(__file__).parents[2]


def test_a_value_goes_round_through_its_flat_name():
    made = recipes.make("reconstruct", {"fit.iterations": 77, "seed": 5}, "draft")
    assert (made.fit.iterations, made.seed) == (77, 5)
    assert made.surface.faces == recipes.Reconstruct.PRESETS["draft"]["surface.faces"]
    assert recipes.make("reconstruct", recipes.values(made)) == made


def test_recipes_cannot_be_changed_by_who_receives_them():
    made = recipes.make("reconstruct")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.fit.iterations = 1


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"fit.iterations": 10**9}, ("fit.iterations", "1000000000", "50 to 100000")),
        ({"fit.iterations": 100.5}, ("fit.iterations", "100.5", "whole number")),
        ({"fit.iterations": True}, ("fit.iterations", "True")),
        ({"fit.ssim_weight": float("nan")}, ("fit.ssim_weight", "nan")),
        ({"capture.color": "filmic"}, ("capture.color", "filmic", "base_color, cycles, eevee")),
        ({"capture.geometry": 1}, ("capture.geometry", "true or false")),
        ({"fit.iteration": 100}, ("fit.iteration", "fit.iterations")),
    ],
)
def test_a_bad_value_is_refused_by_name_with_what_is_allowed(values, named):
    with pytest.raises(KilnError) as caught:
        recipes.make("reconstruct", values)
    assert caught.value.code == "bad-parameter"
    assert all(word in str(caught.value) for word in named)


def test_every_value_can_be_said_as_text():
    for recipe in recipes.RECIPES.values():
        for parameter in recipes.parameters(recipe):
            said = parameter.check(parameter.read(f" {parameter.default} " if not parameter.options else str(parameter.default)))
            assert said == parameter.default and type(said) is type(parameter.default)
            with pytest.raises(KilnError, match=parameter.name):
                parameter.check(parameter.read("many\n"))
    (flag,) = (one for one in recipes.parameters(recipes.Reconstruct) if one.name == "capture.geometry")
    assert [flag.read(text) for text in ("on", "YES", "off", "0", "perhaps")] == [True, True, False, False, "perhaps"]


def test_unknown_recipes_and_presets_are_answered_with_the_known_ones():
    with pytest.raises(KilnError, match="reconstruct"):
        recipes.make("recontsruct")
    with pytest.raises(KilnError, match="draft, standard, high"):
        recipes.make("reconstruct", preset="best")


@pytest.mark.parametrize("recipe", recipes.RECIPES.values())
def test_every_preset_and_default_is_itself_allowed(recipe):
    for preset in recipe.PRESETS:
        assert recipes.make(recipe.NAME, preset=preset)
    for parameter in recipes.parameters(recipe):
        assert parameter.check(parameter.default) == parameter.default
        assert parameter.help.endswith("."), f"{parameter.name}: its help is one sentence"


def test_the_reference_table_is_current():
    written = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    # In a process of its own: other tests enter recipes of theirs.
    printed = subprocess.run([sys.executable, "-m", "protocol.recipes"], cwd=ROOT, check=True, capture_output=True, encoding="utf-8").stdout
    assert written == printed, "run: python -m protocol.recipes > docs/recipes.md"
