"""What a recipe hands over: the files of a finished asset, and the figures and pictures that say how good it is."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from backend.mesh import glb, raster
from backend.mesh.bake import with_normals
from backend.mesh.extract import dense, extract, within_budget
from backend.mesh.game import GameAsset, asset_name, budgeted, shortfalls
from backend.mesh.hulls import hulls
from backend.mesh.lods import budgets, levels
from backend.mesh.measure import angle, charts, psnr
from backend.mesh.mesh import Mesh, TexturedMesh
from backend.pipelines.run import Run
from backend.progress import Progress, silent
from backend.splats import ply, spz
from backend.splats.model import Splats
from backend.splats.render import render
from backend.views.cameras import look_at
from backend.views.views import Frame, Views
from protocol import recipes

SHOWN = 6  # columns of the comparison picture
PAPER = np.array([0.22, 0.22, 0.22], np.float32)  # behind the subject in pictures for people


@dataclass(frozen=True)
class Scores:
    """Figures and a picture of a result. `figures` is documented in SPEC.md, "report.json"."""

    figures: dict[str, Any]
    comparison: UInt8[
        np.ndarray, "h w 3"
    ]  # rows: views, splats, mesh; of the mesh, if it has them, normals, and roughness (green) with metallic (blue)
    preview: UInt8[np.ndarray, "h w 4"]  # the mesh from the front and a little from above, straight alpha


@dataclass(frozen=True)
class Asset:
    mesh: TexturedMesh
    splats: Splats
    frame: Frame
    scores: Scores
    report: dict[str, Any]
    game: GameAsset | None = None

    def save(self, folder: Path) -> None:
        """Every result: mesh.glb (metres, Y up), game.glb if it was asked for, splats.ply (3DGS layout, metres, Z up), splats.spz (metres,
        Y up), report.json, comparison.png, preview.png."""
        glb.save(folder / "mesh.glb", self.mesh, self.frame, "mesh")
        ply.save(folder / "splats.ply", self.splats, self.frame)
        spz.save(folder / "splats.spz", self.splats, self.frame)
        Image.fromarray(self.scores.comparison).save(folder / "comparison.png")
        Image.fromarray(self.scores.preview).save(folder / "preview.png")
        report = {**self.report, **self.scores.figures}
        if self.game is not None:
            report |= {"game": self.game.save(folder / "game.glb", self.frame), "warnings": self.game.warnings}
        (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")


def surfaces(run: Run, splats: Splats | None, views: Views, p: recipes.Surface, game: recipes.Game) -> tuple[Mesh, Mesh | None]:
    """The surface with the faces asked for, and the dense one that it was decimated from where a normal map is to be made of that."""
    if game.engine == "none" or views.normals is not None:
        return run.stage("Extract surface", extract, splats, views, p), None
    whole = run.stage("Extract surface", dense, splats, views, p)
    return run.stage("Decimate", within_budget, whole, splats, views, p), whole


def game_ready(run: Run, surface: Mesh, mesh: TexturedMesh, whole: Mesh | None, p: recipes.Game, seed: int = 0) -> GameAsset | None:
    """What game.glb holds, or None where none is asked for. surface: the mesh without texture and seams. whole: as `surfaces` gives it."""
    if p.engine == "none":
        return None
    if whole is not None:
        mesh = run.stage("Bake normals", with_normals, mesh, whole)
    mesh, warnings = budgeted(mesh, p.channels)
    chain = run.stage("Levels of detail", levels, mesh, budgets(len(mesh.faces), p.lod_ratio, p.lods)) if p.lods else []
    found = run.stage("Collision hulls", hulls, surface, p.hulls, seed) if p.hulls else None
    warnings += shortfalls(found, p.hulls)
    for sentence in warnings:
        run.log(sentence)
    return GameAsset(mesh, chain, found, p, asset_name(p.name, run.title), warnings)


def measure(mesh: TexturedMesh, splats: Splats, views: Views, progress: Progress = silent) -> Scores:
    """Renders splats and mesh from the held-out cameras and compares, the mesh's maps too where the views have such passes.

    PSNR is the mean over held-out views of each view's PSNR, whole image, sRGB values, on black (and on white). Without held-out views
    the figures are null and the comparison shows views that the fit has seen.
    """
    scored = np.flatnonzero(views.holdout) if views.holdout.any() else np.arange(min(len(views), SHOWN))
    rows: dict[str, list[np.ndarray]] = {"views": [], "splats": [], "mesh": [], "normals": [], "material": []}
    errors: dict[str, list[float]] = {"splats_psnr": [], "splats_psnr_white": [], "mesh_psnr": [], "mesh_psnr_white": []}
    errors |= {"roughness_error": [], "metallic_error": [], "normal_error": []}
    for number, index in enumerate(scored):
        progress(number / len(scored), f"view {number + 1} of {len(scored)}")
        camera, alpha = views.cameras[index], views.alpha[index]
        truth = views.images[index] * alpha[..., None]
        splatted = render(splats, camera)
        mesh_color, mesh_alpha = raster.render(mesh, camera)
        for name, color, cover in (("splats", splatted.color, splatted.alpha), ("mesh", mesh_color, mesh_alpha)):
            errors[f"{name}_psnr"].append(psnr(color, truth))
            errors[f"{name}_psnr_white"].append(psnr(color + (1 - cover[..., None]), truth + (1 - alpha[..., None])))
            if number < SHOWN:
                rows[name].append(color + PAPER * (1 - cover[..., None]))
        map_errors, pictures = _compare_maps(mesh, views, int(index))
        for name, error in map_errors.items():
            errors[name].append(error)
        for name, picture in pictures.items():
            if number < SHOWN:
                rows[name].append(picture)
        if number < SHOWN:
            rows["views"].append(truth + PAPER * (1 - alpha[..., None]))
    count, use = charts(mesh)
    figures: dict[str, Any] = {
        "views": int((~views.holdout).sum()),
        "holdout_views": int(views.holdout.sum()),
        "splats": len(splats),
        "faces": len(mesh.faces),
        "charts": count,
        "texture_use": round(use, 4),
        "texels_seen": None if mesh.texels_seen is None else round(mesh.texels_seen, 4),
        **{name: round(float(np.mean(values)), 4) if views.holdout.any() and values else None for name, values in errors.items()},
    }
    return Scores(figures, _sheet([row for row in rows.values() if row]), preview(mesh))


def _compare_maps(mesh: TexturedMesh, views: Views, index: int) -> tuple[dict[str, float], dict[str, Float[np.ndarray, "h w 3"]]]:
    """Mean errors of the mesh's maps against a view's passes, at pixels' centres where both have a surface, and pictures of the maps."""
    camera, errors, pictures = views.cameras[index], {}, {}
    if views.normals is not None:
        found, there = raster.normals(mesh, camera)
        both = there & (views.normals[index] != 0).any(-1)
        if both.any():
            errors["normal_error"] = angle(found[both], views.normals[index][both])
        if mesh.normal_map is not None:
            pictures["normals"] = np.where(there[..., None], found / 2 + 0.5, PAPER)
    if views.material is not None and mesh.material is not None:
        surface, there = raster.sample(mesh, camera, mesh.material / np.float32(255))
        both = there & (views.material[index, ..., 2] > 0)
        if both.any():
            error = np.abs(surface[both] - views.material[index, ..., :2][both] / 255).mean(0)
            errors |= {"roughness_error": float(error[0]), "metallic_error": float(error[1])}
        pictures["material"] = np.where(there[..., None], np.dstack([np.zeros_like(surface[..., 0]), surface]), PAPER)
    return errors, pictures


def preview(mesh: TexturedMesh) -> UInt8[np.ndarray, "h w 4"]:
    """For asset browsers and lists."""
    field_of_view = math.radians(30)
    front = np.array([0.45, -0.8, 0.4]) / np.linalg.norm([0.45, -0.8, 0.4])
    centre = (mesh.vertices.min(0) + mesh.vertices.max(0)) / 2
    radius = float(np.linalg.norm(mesh.vertices - centre, axis=1).max())
    camera = look_at(centre + front * radius / math.sin(field_of_view / 2), centre, 256, field_of_view)
    color, alpha = raster.render(mesh, camera)
    straight = color / np.maximum(alpha[..., None], 1e-3)
    return coded(np.dstack([straight, alpha]))


def _sheet(rows: list[list[Float[np.ndarray, "h w 3"]]]) -> UInt8[np.ndarray, "h w 3"]:
    picture = np.concatenate([np.concatenate(row, 1) for row in rows], 0)
    return coded(picture)


def coded(picture: np.ndarray) -> np.ndarray:
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
