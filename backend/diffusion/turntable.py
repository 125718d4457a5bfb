"""Turntables: a generator makes pictures of a subject from all around out of one picture of it, or makes given ones agree with what it has
learnt (IM-3D, sections 3.1 and 3.4). Here are the interface that every generator has and the three stages that a pipeline calls; generators
are in wan.py, sv3d.py and mv_adapter.py, and loading.py loads them.

Pictures that go into a generator are straight RGBA with a square side, pictures that come out RGB on white, all float32 sRGB in [0, 1].
A generator always makes all of its frames. The views, which the splats are fitted to, are chosen among them, evenly in azimuth.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from backend.diffusion.loading import loaded
from backend.progress import Progress, silent
from backend.views import turning
from backend.views.orbit import Orbit
from protocol import recipes
from protocol.errors import KilnError

_START = Orbit.turn(1, 15.0, 40.0)  # lens and height that an estimate begins with


class Turntable(Protocol):
    """A loaded generator.

    model: its id in the registry. views: frames that it makes, n below; of an uncalibrated one that is more than a pipeline asks for, and
    the last frame may close the turn. size: pixels of a frame's side. orbit: the exact cameras of its n frames, None where nobody knows
    them. any_elevation: whether they may stand at another height than `orbit` has. azimuths: degrees, where these alone are known and
    `orbit` is None; None, and they are estimated. guidance: its own scale. evaluations: of the denoiser since it was loaded; a guidance
    pair counts as two.
    """

    model: str
    views: int
    size: int
    orbit: Orbit | None
    any_elevation: bool
    azimuths: Float[np.ndarray, "n"] | None
    guidance: float
    evaluations: int

    def generate(
        self,
        picture: Float[np.ndarray, "h h 4"],
        prompt: str,
        orbit: Orbit | None,
        steps: int,
        guidance: float,
        seed: int,
        progress: Progress = silent,
    ) -> Float[np.ndarray, "n s s 3"]:
        """All n frames from noise. picture: any size, the subject cut out or on a background of its own. prompt: what the subject is, or
        ""; the generator adds what it needs. orbit: `self.orbit`, at the picture's own height if `any_elevation`; None if that is None.
        guidance: used as given; at most 1 is none, one evaluation a step. Equal arguments, equal
        frames. Raises Cancelled through `progress`, KilnError "out-of-memory"."""

    def refine(
        self,
        frames: Float[np.ndarray, "n s s 3"],
        picture: Float[np.ndarray, "h h 4"],
        prompt: str,
        orbit: Orbit | None,
        steps: int,
        strength: float,
        guidance: float,
        seed: int,
        keep: Bool[np.ndarray, "n"] | None = None,
        progress: Progress = silent,
    ) -> Float[np.ndarray, "n s s 3"]:
        """The frames noised up to the share `strength` in (0, 1] of the schedule and denoised in at most `steps` steps (1: from pure noise,
        the frames count only where they are kept). Conditioned as `generate` is; the frame that shows the picture's own view is the
        picture. keep: frames that are known: they steer the others at every step and come back as they were."""


@dataclass(frozen=True)
class Weights:
    """What parameters do not say of a model's weights, so that finished stages are told apart by it. revision: `weights.revision`. lora: a
    file that is added to them."""

    revision: str = ""
    lora: Path | None = None


AS_THEY_COME = Weights()


@dataclass(frozen=True)
class Turn:
    """One turn around the subject.

    frames: the views, in order of azimuth, the input picture's own first where it is among them. orbit: their cameras, a first guess where
    not `calibrated`. evaluations: of the denoiser for all that led here. film: every frame of the generator, which it needs to go on.
    shown: the cameras of these, as `orbit` (the last may be at 360 degrees: the turn closed). chosen: which of the film the views are.
    """

    frames: Float[np.ndarray, "k s s 3"]
    orbit: Orbit
    calibrated: bool
    evaluations: int
    model: str
    film: UInt8[np.ndarray, "n s s 3"]
    shown: Orbit
    chosen: Int[np.ndarray, "k"]

    def path(self, orbit: Orbit) -> Orbit:
        """The cameras of the whole film where the views have those of `orbit` (as estimated, say): what `refine` wants renders from."""
        if self.calibrated:
            return self.shown
        # Between the views, which are in order, a camera moves as it was thought to: shifted as much as its neighbours are.
        at, shift = self.orbit.azimuths, _signed(orbit.azimuths - self.orbit.azimuths)
        return dataclasses.replace(orbit, azimuths=self.shown.azimuths + np.interp(self.shown.azimuths, at, shift, period=360.0))


def generate(
    picture: Float[np.ndarray, "h h 4"],
    p: recipes.Generate,
    seed: int,
    elevation: float = 10.0,
    weights: Weights = AS_THEY_COME,
    progress: Progress = silent,
) -> Turn:
    """`p.views` views, or as many as the model makes. elevation: of the picture's camera, degrees; only some calibrated models use it."""
    with loaded(p.model, progress, weights.lora) as model:
        orbit = model.orbit
        if orbit is not None and model.any_elevation:
            orbit = dataclasses.replace(orbit, elevation=elevation)
        before = model.evaluations
        film = model.generate(picture, p.prompt, orbit, p.steps, p.guidance or model.guidance, seed, progress)
        return _turn(model, film, orbit, p.views, model.evaluations - before)


def refine(
    turn: Turn,
    renders: Float[np.ndarray, "n s s 3"],
    picture: Float[np.ndarray, "h h 4"],
    p: recipes.Generate,
    strength: float,
    steps: int,
    seed: int,
    weights: Weights = AS_THEY_COME,
    progress: Progress = silent,
) -> Turn:
    """The turn that the model makes of `renders`, which are seen from `turn.path(orbit).cameras(size)` on white: noised to `strength`,
    denoised in `steps` (IM-3D, section 3.4). Cameras and choice of views stay."""
    with loaded(p.model, progress, weights.lora) as model:
        before = model.evaluations
        orbit = turn.shown if turn.calibrated else None
        film = model.refine(renders, picture, p.prompt, orbit, steps, strength, p.guidance or model.guidance, seed, None, progress)
        return _with(turn, film, film[turn.chosen], model.evaluations - before)


def reroll(
    turn: Turn,
    view: int,
    draw: int,
    picture: Float[np.ndarray, "h h 4"],
    p: recipes.Generate,
    seed: int,
    weights: Weights = AS_THEY_COME,
    progress: Progress = silent,
) -> Turn:
    """The turn with the view number `view` (from 0) made anew from noise, all others as they are, replaced ones too. draw: how manieth
    try; another gives another picture."""
    if not 0 <= view < len(turn.frames):
        raise KilnError("bad-parameter", f"There is no view {view}.", f"Views are numbered from 0 to {len(turn.frames) - 1}.")
    if abs(_signed(turn.orbit.azimuths[view : view + 1])[0]) < 1e-6:
        raise KilnError("bad-parameter", f"View {view} is the input picture itself.", "Re-roll another view, or give another picture.")
    known = turn.film.astype(np.float32) / 255
    known[turn.chosen] = turn.frames
    at = turn.chosen[view]
    keep = np.ones(len(known), bool)
    keep[at] = False
    orbit = turn.shown if turn.calibrated else None
    draws = int(np.random.SeedSequence((seed, view, draw)).generate_state(1)[0])
    with loaded(p.model, progress, weights.lora) as model:
        before = model.evaluations
        film = model.refine(known, picture, p.prompt, orbit, p.steps, 1.0, p.guidance or model.guidance, draws, keep, progress)
        frames = turn.frames.copy()
        frames[view] = film[at]
        return _with(turn, film, frames, model.evaluations - before)


def choose(azimuths: Float[np.ndarray, "n"], views: int) -> Int[np.ndarray, "k"]:
    """Which of n frames are nearest to `views` equal steps from azimuth 0 on, none twice: at most n, and of two frames that show one
    direction (a turn that closes) at most one."""
    free = {index for index in range(len(azimuths)) if not np.any(np.abs(_signed(azimuths[:index] - azimuths[index])) < 1e-6)}
    views = min(views, len(free))
    chosen = []
    for target in np.arange(views) * 360.0 / views:
        nearest = min(sorted(free), key=lambda index: abs(_signed(azimuths[index : index + 1] - target)[0]))
        free.remove(nearest)
        chosen.append(nearest)
    return np.array(chosen, np.int64)


def _turn(model: Turntable, film: Float[np.ndarray, "n s s 3"], orbit: Orbit | None, views: int, evaluations: int) -> Turn:
    shown = orbit
    if shown is None:
        shown = dataclasses.replace(_START, azimuths=turning.azimuths(film) if model.azimuths is None else model.azimuths)
    chosen = choose(shown.azimuths, views)
    cameras = dataclasses.replace(shown, azimuths=shown.azimuths[chosen])
    return Turn(film[chosen], cameras, orbit is not None, evaluations, model.model, _bytes(film), shown, chosen)


def _with(turn: Turn, film: Float[np.ndarray, "n s s 3"], frames: Float[np.ndarray, "k s s 3"], evaluations: int) -> Turn:
    return dataclasses.replace(turn, film=_bytes(film), frames=frames, evaluations=turn.evaluations + evaluations)


def _bytes(film: Float[np.ndarray, "n s s 3"]) -> UInt8[np.ndarray, "n s s 3"]:
    return (np.clip(film, 0, 1) * 255 + 0.5).astype(np.uint8)


def _signed(angles: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """In [-180, 180)."""
    return (angles + 180.0) % 360.0 - 180.0
