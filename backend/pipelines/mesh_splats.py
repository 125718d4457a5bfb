"""`mesh_splats`: Gaussian splats from any tool -> pictures of them from all around -> marching cubes -> textured mesh. Needs no weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float

from backend.mesh.bake import bake
from backend.pipelines.asset import Asset, game_ready, measure, surfaces
from backend.pipelines.run import Run
from backend.progress import Progress, silent
from backend.splats import ply, spz
from backend.splats.clean import chosen
from backend.splats.model import Splats
from backend.splats.pictures import pictures, without_mist
from backend.splats.turn import Z_UP_FROM_Y_UP, turned
from backend.views.views import Frame
from protocol import recipes
from protocol.errors import KilnError

READERS = {".ply": ply.load, ".spz": spz.load}
Z_UP = {"z_up": np.eye(3), "y_up": Z_UP_FROM_Y_UP, "y_down": Z_UP_FROM_Y_UP.T}  # from a file's axes
GAP = 0.05  # of the subject's radius: empty space beyond which lie floaters and background
FARTHEST = 2.0  # radii of the share that is surely the subject: how far parts without a gap may reach
MARGIN = 1.05  # of the pictures around the subject, whose border has to show background alone
LARGEST = 0.3  # of the subject's radius: standard deviation from which a splat is background, sky or mist


def mesh_splats(run: Run, folder: Path, p: recipes.MeshSplats) -> Asset:
    """The asset of the one splat file in `folder` (SPEC.md, "Splats")."""
    run.begin("Read splats")
    given = read(folder, p.subject.up, run.log, run.progress)
    splats, frame = subject(given, p.subject, run.log)
    run.begin("Take pictures")
    solid = without_mist(splats)
    views = pictures(solid, frame, p.look, run.progress)
    surface, whole = surfaces(run, solid, views, p.surface, p.game)
    mesh = run.stage("Bake texture", bake, surface, solid, views, p.texture)
    scores = run.stage("Measure", measure, mesh, solid, views)
    game = game_ready(run, surface, mesh, whole, p.game)
    return Asset(mesh, splats, frame, scores, {**run.report(p), "file_splats": len(given)}, game)


def read(folder: Path, up: str, say: Callable[[str], None] = lambda sentence: None, progress: Progress = silent) -> Splats:
    """The splats of the file in `folder`, turned to Z up, in the file's units (metres, by Kiln's convention)."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in READERS]
    if len(files) != 1:
        found = f"{len(files)} splat files" if files else "no splat file"
        raise KilnError("bad-input", f"The input has {found}.", "Give one .ply or .spz file.")
    suffix = files[0].suffix.lower()
    splats = READERS[suffix](files[0], say, progress)
    if suffix == ".spz":  # spz.load has turned Y up already
        return splats if up == "auto" else turned(splats, Z_UP[up] @ Z_UP_FROM_Y_UP.T)
    if up == "auto" and not ply.says_z_up(files[0]):
        say("The file does not say which way is up; Y is taken to point down, as in most. subject.up chooses another axis.")
        up = "y_down"
    return turned(splats, Z_UP["z_up" if up == "auto" else up])


def subject(splats: Splats, p: recipes.Subject, say: Callable[[str], None] = lambda sentence: None) -> tuple[Splats, Frame]:
    """The splats of the subject in the unit frame, without what floats far from it or surrounds it.

    `p.keep` of all opacity, nearest to the middle, is the subject; so is what follows outwards without a gap. The unit sphere holds it.
    """
    count = len(splats)
    if p.radius > 0:
        splats = chosen(splats, np.linalg.norm(splats.means - np.array([p.x, p.y, p.z]), axis=1) <= p.radius)
        if not len(splats):
            raise KilnError(
                "bad-input", "No splats lie in the ball that is to be cut out.", "Move subject.x, y and z, or set subject.radius to 0."
            )
    opacity = 1 / (1 + np.exp(-splats.opacity_logits.astype(np.float64)))
    middle = np.array([_quantile(splats.means[:, axis].astype(np.float64), opacity, 0.5) for axis in range(3)])
    distance = np.linalg.norm(splats.means - middle, axis=1)
    sure = _quantile(distance, opacity, p.keep)
    beyond = np.sort(distance[(distance > sure) & (distance <= FARTHEST * sure)], kind="stable")
    gaps = np.flatnonzero(np.diff(beyond, prepend=sure) > GAP * sure)
    reach = float(max([sure, *beyond[: gaps[0] if len(gaps) else len(beyond)][-1:]]))
    size = np.exp(splats.log_scales.max(1).astype(np.float64))
    near = distance <= reach
    keep = near & (size <= LARGEST * reach)
    if not keep.any():  # few splats, as large as the whole
        keep = near
    if keep.sum() < count:
        say(f"{count - keep.sum():,} of {count:,} splats lie apart from the subject or are too large for it, and are left out.")
    splats, size = chosen(splats, keep), size[keep]
    centre = (splats.means.min(0).astype(np.float64) + splats.means.max(0)) / 2
    extent = np.linalg.norm(splats.means - centre, axis=1)
    soft = np.minimum(2 * size, 0.1 * reach) if reach > 0 else 2 * size
    frame = Frame(centre, 1 / (MARGIN * float((extent + soft).max())))
    moved = dataclasses.replace(
        splats,
        means=((splats.means - centre) * frame.scale).astype(np.float32),
        log_scales=(splats.log_scales + np.log(frame.scale)).astype(np.float32),
    )
    return moved, frame


def _quantile(values: Float[np.ndarray, "n"], weights: Float[np.ndarray, "n"], share: float) -> float:
    """The value below which `share` of the weight lies."""
    order = np.argsort(values, kind="stable")
    sums = np.cumsum(weights[order])
    return float(values[order[min(np.searchsorted(sums, share * sums[-1]), len(values) - 1)]])
