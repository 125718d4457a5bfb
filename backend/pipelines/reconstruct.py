"""`reconstruct`: an object's renders -> splats -> marching cubes -> textured mesh. Needs no weights."""

from __future__ import annotations

from pathlib import Path

from backend.mesh.bake import bake
from backend.mesh.extract import extract
from backend.pipelines.asset import Asset, measure
from backend.pipelines.run import Run
from backend.splats.fit import fit
from backend.views.views import load
from protocol import recipes


def reconstruct(run: Run, folder: Path, p: recipes.Reconstruct) -> Asset:
    """The asset of the views in `folder` (SPEC.md, "Views")."""
    views = load(folder)
    splats = run.stage("Fit splats", fit, views, p.fit, p.seed)
    surface = run.stage("Extract surface", extract, splats, views, p.surface)
    mesh = run.stage("Bake texture", bake, surface, splats, views, p.texture)
    scores = run.stage("Measure", measure, mesh, splats, views)
    return Asset(mesh, splats, views.frame, scores, run.report(p))
