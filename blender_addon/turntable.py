"""The views of a job that starts from a picture, as the user goes through them: which are to be generated anew, which replaced, and the
job that goes on with that. The finished job itself is never changed."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from .protocol import picture, recipes
from .protocol.errors import KilnError

VIEW = re.compile(r"view_(\d{3})\.png")
FRONT = 0  # the view that shows the input picture itself


@dataclass
class Turntable:
    """Views of one job, and what is wanted of them."""

    folder: Path  # of their files, and of copies of pictures that replace some
    pictures: dict[int, Path] = field(default_factory=dict)  # the job's own views; none before they have arrived
    again: set[int] = field(default_factory=set)  # to be generated anew
    replaced: dict[int, Path] = field(default_factory=dict)  # by these pictures

    @property
    def edited(self) -> bool:
        return bool(self.again or self.replaced)

    def reroll(self, view: int) -> None:
        """Marks a view to be generated anew, or takes the mark away."""
        self._drop(view)
        self.again ^= {view}

    def replace(self, view: int, file: Path) -> None:
        """Puts a copy of a picture in a view's place. Raises KilnError("bad-input") for what is no picture by its name."""
        name = picture.replacement(view, file)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._drop(view)
        self.again.discard(view)
        self.replaced[view] = Path(shutil.copyfile(file, self.folder / name))

    def keep(self, view: int) -> None:
        """Takes back what was wanted of a view."""
        self._drop(view)
        self.again.discard(view)

    def _drop(self, view: int) -> None:
        if view in self.replaced:
            self.replaced.pop(view).unlink(missing_ok=True)

    def sentence(self) -> str:
        """What is wanted, in words; "" if nothing is."""
        parts = [f"{_views(self.again)} to be generated anew"] if self.again else []
        parts += [f"{_views(self.replaced)} replaced"] if self.replaced else []
        words = ", ".join(parts)
        return f"{words[0].upper()}{words[1:]}." if parts else ""


def _views(numbers) -> str:
    listed = [str(number) for number in sorted(numbers)]
    return f"view {listed[0]}" if len(listed) == 1 else f"views {', '.join(listed[:-1])} and {listed[-1]}"


def views_of(data: dict) -> dict[str, dict]:
    """A finished job's views among its results."""
    return {name: result for name, result in sorted(data["results"].items()) if VIEW.fullmatch(name)}


def is_generated(data: dict) -> bool:
    """Whether a job's views come from a model, so that some can be generated anew or replaced."""
    recipe = recipes.RECIPES.get(data["recipe"])
    return getattr(recipe, "INPUT", "") == "picture" and (data["source"] or {}).get("kind") != "views"


def onward(data: dict, table: Turntable, only: bool) -> tuple[object, tuple[str, ...]]:
    """The recipe of the job that goes on with what the user wants, and how the names of those inputs begin that no longer count.

    only: stop after the views again. Raises KilnError("bad-parameter") where a line of numbers can hold no more.
    """
    values = dict(data["parameters"])
    try:
        rerolls = picture.rerolled(values["generate.rerolls"], list(table.again))
        recipe = recipes.make(data["recipe"], {**values, "generate.rerolls": rerolls, "generate.only": only})
    except KeyError:
        raise KilnError("bad-parameter", "This job is of another version of Kiln.", "Start again from its picture.") from None
    return recipe, tuple(f"replace_{view:03d}." for view in sorted({*table.again, *table.replaced}))
