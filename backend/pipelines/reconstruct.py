"""`reconstruct`: an object's renders -> splats -> marching cubes -> textured mesh. Needs no weights."""

from __future__ import annotations

from pathlib import Path

from backend.mesh.bake import bake
from backend.pipelines.asset import Asset, game_ready, measure, surfaces
from backend.pipelines.run import Run
from backend.splats import gpu
from backend.splats.fit import fit
from backend.views.ball import ball
from backend.views.views import Views, load
from protocol import recipes


def reconstruct(run: Run, folder: Path, p: recipes.Reconstruct) -> Asset:
    """The asset of the views in `folder` (SPEC.md, "Views")."""
    run.begin("Read views")
    return from_views(run, load(folder, progress=run.progress), p)


def from_views(run: Run, views: Views, p: recipes.Reconstruct) -> Asset:
    run.log(gpu.sentence(p.fit.device))
    splats = run.stage("Fit splats", fit, views, p.fit, p.seed)
    where_depth_is_missing = splats if views.depth is None else None  # exact depth places the surface better than any splat
    surface, whole = surfaces(run, where_depth_is_missing, views, p.surface, p.game)
    mesh = run.stage("Bake texture", bake, surface, splats, views, p.texture)
    scores = run.stage("Measure", measure, mesh, splats, views)
    game = game_ready(run, surface, mesh, whole, p.game, p.seed)
    return Asset(mesh, splats, views.frame, scores, run.report(p), game)


def warm_up() -> None:
    """Compiles what the CPU path runs, or loads it from the cache of compiled code, by reconstructing a small ball."""
    smallest = {"fit.splats": 500, "fit.iterations": 50, "surface.grid": 32, "surface.faces": 200, "texture.size": 64}
    from_views(Run(), ball(size=48, count=8), recipes.make("reconstruct", smallest))
