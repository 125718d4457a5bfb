"""`animate`: renders of a moving object -> motion and dynamic splats -> surface carried through time -> keyframed mesh. No weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from backend.mesh.bake import bake_in_time
from backend.mesh.carry import carry
from backend.mesh.extract import extract
from backend.mesh.rig import solve
from backend.pipelines.animated_asset import AnimatedAsset, measure
from backend.pipelines.run import Run
from backend.splats import gpu
from backend.splats.fit_motion import fit_motion
from backend.splats.follow import follow, most_open
from backend.views.sequence import ViewSequence, load
from protocol import recipes
from protocol.errors import KilnError

STILL = 0.3  # of a pixel: nodes of what stands still stray less, by the noise of following


def animate(run: Run, folder: Path, p: recipes.Animate) -> AnimatedAsset:
    """The animated asset of the views in `folder` (SPEC.md, "Motion")."""
    run.begin("Read views")
    return from_sequence(run, load(folder, progress=run.progress), p)


def from_sequence(run: Run, views: ViewSequence, p: recipes.Animate) -> AnimatedAsset:
    run.log(gpu.sentence(p.fit.device))
    rest = run.stage("Choose the rest pose", most_open, views)
    surface = run.stage("Extract surface", extract, None, views.at(rest), p.surface)
    coarse = run.stage("Follow the motion", follow, surface, views, rest, p.fit, p.seed)
    pixel = np.median([np.linalg.norm(camera.centre) / camera.fx for camera in views.views.cameras])
    if np.linalg.norm(coarse.translations, axis=-1).max() < STILL * pixel:
        hint = "Choose other frames, or the recipe reconstruct for what does not move."
        raise KilnError("bad-input", "Nothing moves in these views.", hint)
    splats, motion = run.stage("Fit splats", fit_motion, views, coarse, p.fit, p.seed)
    moving = run.stage("Carry the surface", carry, surface, motion, views)
    mesh = run.stage("Bake texture", bake_in_time, moving, splats, views, p.texture)
    rig = run.stage("Solve the armature", solve, mesh, p.armature)
    scores = run.stage("Measure", measure, mesh, rig, splats, views, rest)
    return AnimatedAsset(mesh, rig, splats, rest, views.views.frame, scores, run.report(p))
