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
from backend.mesh.measure import psnr
from backend.mesh.mesh import TexturedMesh
from backend.progress import Progress, silent
from backend.splats import ply
from backend.splats.model import Splats
from backend.splats.render import render
from backend.views.cameras import look_at
from backend.views.views import Frame, Views

SHOWN = 6  # columns of the comparison picture
PAPER = np.array([0.22, 0.22, 0.22], np.float32)  # behind the subject in pictures for people


@dataclass(frozen=True)
class Scores:
    """Figures and a picture of a result. `figures` is documented in SPEC.md, "report.json"."""

    figures: dict[str, Any]
    comparison: UInt8[np.ndarray, "h w 3"]  # rows: views, splats, mesh
    preview: UInt8[np.ndarray, "h w 4"]  # the mesh from the front and a little from above, straight alpha


@dataclass(frozen=True)
class Asset:
    mesh: TexturedMesh
    splats: Splats
    frame: Frame
    scores: Scores
    report: dict[str, Any]

    def save(self, folder: Path) -> None:
        """mesh.glb (metres, Y up), splats.ply (3DGS layout, metres, Z up), report.json, comparison.png, preview.png: every result."""
        glb.save(folder / "mesh.glb", self.mesh, self.frame, "mesh")
        ply.save(folder / "splats.ply", self.splats, self.frame)
        Image.fromarray(self.scores.comparison).save(folder / "comparison.png")
        Image.fromarray(self.scores.preview).save(folder / "preview.png")
        report = {**self.report, **self.scores.figures}
        (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")


def measure(mesh: TexturedMesh, splats: Splats, views: Views, progress: Progress = silent) -> Scores:
    """Renders splats and mesh from the held-out cameras and compares.

    PSNR is the mean over held-out views of each view's PSNR, whole image, sRGB values, on black (and on white). Without held-out views
    the figures are null and the comparison shows views that the fit has seen.
    """
    scored = np.flatnonzero(views.holdout) if views.holdout.any() else np.arange(min(len(views), SHOWN))
    rows: dict[str, list[np.ndarray]] = {"views": [], "splats": [], "mesh": []}
    errors: dict[str, list[float]] = {"splats_psnr": [], "splats_psnr_white": [], "mesh_psnr": [], "mesh_psnr_white": []}
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
        if number < SHOWN:
            rows["views"].append(truth + PAPER * (1 - alpha[..., None]))
    figures: dict[str, Any] = {
        "views": int((~views.holdout).sum()),
        "holdout_views": int(views.holdout.sum()),
        "splats": len(splats),
        "faces": len(mesh.faces),
        **{name: round(float(np.mean(values)), 3) if views.holdout.any() else None for name, values in errors.items()},
    }
    return Scores(figures, _sheet(list(rows.values())), _preview(mesh))


def _preview(mesh: TexturedMesh) -> UInt8[np.ndarray, "h w 4"]:
    """For asset browsers and lists."""
    field_of_view = math.radians(30)
    front = np.array([0.45, -0.8, 0.4]) / np.linalg.norm([0.45, -0.8, 0.4])
    centre = (mesh.vertices.min(0) + mesh.vertices.max(0)) / 2
    radius = float(np.linalg.norm(mesh.vertices - centre, axis=1).max())
    camera = look_at(centre + front * radius / math.sin(field_of_view / 2), centre, 256, field_of_view)
    color, alpha = raster.render(mesh, camera)
    straight = color / np.maximum(alpha[..., None], 1e-3)
    return _bytes(np.dstack([straight, alpha]))


def _sheet(rows: list[list[Float[np.ndarray, "h w 3"]]]) -> UInt8[np.ndarray, "h w 3"]:
    picture = np.concatenate([np.concatenate(row, 1) for row in rows], 0)
    return _bytes(picture)


def _bytes(picture: np.ndarray) -> np.ndarray:
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
