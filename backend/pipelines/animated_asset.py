"""What `animate` hands over: the files of an animated asset, and the figures and pictures that say how good it is."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from backend.mesh import glb, raster
from backend.mesh.measure import charts, psnr
from backend.mesh.mesh import AnimatedMesh, Rig, TexturedMesh
from backend.mesh.rig import posed
from backend.pipelines.asset import PAPER, coded, preview
from backend.progress import Progress, silent
from backend.splats import ply
from backend.splats.render import render
from backend.splats.sequence import SplatSequence
from backend.views.cameras import look_at
from backend.views.sequence import ViewSequence
from backend.views.views import Frame

SHOWN = 6  # moments of the comparison picture
TURNS = 36  # pictures of the turntable
TURNTABLE = 192  # pixels of each


@dataclass(frozen=True)
class MotionScores:
    """Figures and pictures of a result. `figures` is documented in SPEC.md, "report.json"."""

    figures: dict[str, Any]
    comparison: UInt8[np.ndarray, "h w 3"]  # a column a moment; rows: source, splats, mesh, mesh by its bones
    turntable: UInt8[np.ndarray, "n h w 4"]  # once round the mesh, while it moves
    preview: UInt8[np.ndarray, "h w 4"]  # the mesh at rest


@dataclass(frozen=True)
class AnimatedAsset:
    mesh: AnimatedMesh
    rig: Rig
    splats: SplatSequence
    rest: int
    frame: Frame
    scores: MotionScores
    report: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Every result: mesh.glb (at rest), shape_keys.glb, armature.glb (metres, Y up), splats.ply (at rest) and splats_NNNN.ply of each
        frame (metres, Z up), report.json, comparison.png, preview.png and turntable_NN.png."""
        glb.save(folder / "mesh.glb", self.mesh.mesh, self.frame, "mesh")
        glb.save_shape_keys(folder / "shape_keys.glb", self.mesh, self.frame, "mesh")
        glb.save_armature(folder / "armature.glb", self.mesh, self.rig, self.frame, "mesh")
        ply.save(folder / "splats.ply", self.splats.at(self.rest), self.frame)
        for moment, number in enumerate(self.mesh.frames):
            ply.save(folder / f"splats_{frame_name(number)}.ply", self.splats.at(moment), self.frame)
        Image.fromarray(self.scores.comparison).save(folder / "comparison.png")
        Image.fromarray(self.scores.preview).save(folder / "preview.png")
        for number, picture in enumerate(self.scores.turntable):
            Image.fromarray(picture).save(folder / f"turntable_{number:02}.png")
        report = {**self.report, **self.scores.figures}
        (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")


def frame_name(number: float) -> str:
    """A frame's number in file names: digits that sort as the frames do, before which frames below zero have an n."""
    whole, _, part = f"{abs(number):.3f}".rstrip("0").partition(".")
    return f"{'n' if number < 0 else ''}{whole:0>4}{'.' if part else ''}{part}"


def at(mesh: AnimatedMesh, moment: int) -> TexturedMesh:
    """The textured mesh of one moment, without the normal map, whose tangents are those at rest."""
    return replace(mesh.mesh, vertices=mesh.vertices[moment], normals=mesh.normals[moment], normal_map=None, tangents=None)


def measure(
    mesh: AnimatedMesh, rig: Rig, splats: SplatSequence, views: ViewSequence, rest: int, progress: Progress = silent
) -> MotionScores:
    """Renders splats, mesh and rigged mesh from the held-out cameras of each moment and compares.

    PSNR: mean over held-out views, whole image, sRGB values, on black. flicker: PSNR of the mesh's change from one moment to the next
    against the source's, seen by cameras that saw both. armature_error: mean distance of vertices by their bones from those by shape keys,
    over the diagonal of the bounding box of all moments. Without held-out views the figures are null.
    """
    moments = len(views)
    errors: dict[str, list[float]] = {"splats_psnr": [], "mesh_psnr": [], "armature_psnr": []}
    flicker, apart = [], []
    diagonal = float(np.linalg.norm(np.ptp(mesh.vertices.reshape(-1, 3), axis=0)))
    shown = {int(moment) for moment in np.linspace(0, moments - 1, min(SHOWN, moments)).round()}
    columns, before = [], {}
    for moment in range(moments):
        progress(0.8 * moment / moments, f"Moment {moment + 1} of {moments}")
        drawn_splats, still = splats.at(moment), at(mesh, moment)
        boned = posed(rig, mesh.mesh.vertices, moment)
        apart.append(np.linalg.norm(boned - mesh.vertices[moment], axis=1).mean() / diagonal)
        by_bones = replace(still, vertices=boned.astype(np.float32))
        scored = views.scored_at(moment)
        now = {}
        for camera, image, alpha in zip(scored.cameras, scored.images, scored.alpha, strict=True):
            truth = image * alpha[..., None]
            made = raster.render(still, camera)[0]
            errors["splats_psnr"].append(psnr(render(drawn_splats, camera).color, truth))
            errors["mesh_psnr"].append(psnr(made, truth))
            errors["armature_psnr"].append(psnr(raster.render(by_bones, camera)[0], truth))
            place = camera.camera_from_world.tobytes()
            now[place] = truth, made
            if place in before:
                flicker.append(psnr(made - before[place][1], truth - before[place][0]))
        before = now
        if moment in shown:
            chosen = scored if len(scored) else views.at(moment)
            camera, alpha = chosen.cameras[0], chosen.alpha[0]
            rows = [chosen.images[0] * alpha[..., None] + PAPER * (1 - alpha[..., None])]
            splatted = render(drawn_splats, camera)
            rows.append(splatted.color + PAPER * (1 - splatted.alpha[..., None]))
            rows += [raster.render(one, camera, tuple(PAPER.tolist()))[0] for one in (still, by_bones)]
            columns.append(np.concatenate(rows, 0))
    count, use = charts(mesh.mesh)
    figures: dict[str, Any] = {
        "frames": [round(float(number), 3) for number in mesh.frames],
        "fps": round(mesh.fps, 3),
        "rest_frame": round(float(mesh.frames[rest]), 3),
        "views": int((~views.views.holdout).sum()),
        "holdout_views": int(views.views.holdout.sum()),
        "splats": len(splats.splats),
        "faces": len(mesh.mesh.faces),
        "charts": count,
        "texture_use": round(use, 4),
        "texels_seen": None if mesh.mesh.texels_seen is None else round(mesh.mesh.texels_seen, 4),
        "bones": len(rig.heads),
        "armature_error": round(float(np.mean(apart)), 6),
        **{name: round(float(np.mean(values)), 4) if values else None for name, values in errors.items()},
        "flicker": round(float(np.mean(flicker)), 4) if flicker else None,
    }
    return MotionScores(figures, coded(np.concatenate(columns, 1)), _turntable(mesh, progress), preview(mesh.mesh))


def _turntable(mesh: AnimatedMesh, progress: Progress) -> UInt8[np.ndarray, "n h w 4"]:
    """Once round, at an even pace, through all moments."""
    corners = mesh.vertices.reshape(-1, 3)
    centre = (corners.min(0) + corners.max(0)) / 2
    field_of_view = math.radians(30)
    distance = float(np.linalg.norm(corners - centre, axis=1).max()) / math.sin(field_of_view / 2)
    pictures = []
    for turn in range(TURNS):
        progress(0.8 + 0.2 * turn / TURNS, "Taking pictures")
        moment = turn * len(mesh.frames) // TURNS
        angle = 2 * math.pi * turn / TURNS + math.radians(-60)
        eye = centre + distance * np.array([math.cos(angle) * 0.93, math.sin(angle) * 0.93, 0.37])
        pictures.append(_straight(*raster.render(at(mesh, moment), look_at(eye, centre, TURNTABLE, field_of_view))))
    return coded(np.stack(pictures))


def _straight(color: Float[np.ndarray, "h w 3"], alpha: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w 4"]:
    return np.dstack([color / np.maximum(alpha[..., None], 1e-3), alpha])
