"""`im3d`: a picture or a text -> turntable video -> splats fitted with image losses -> renders fed back to the video model -> marching
cubes -> textured mesh. After Melas-Kyriazi et al. 2024, "IM-3D": figure 2, sections 3.1 to 3.4, appendices A.1 and A.5."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from backend import weights
from backend.diffusion import text_to_image
from backend.diffusion.matte import matte, prepare, straight, way
from backend.diffusion.text_to_image import draw
from backend.diffusion.turntable import AS_THEY_COME, Turn, Weights, generate, refine, reroll
from backend.mesh.bake import bake
from backend.mesh.measure import psnr
from backend.mesh.mesh import TexturedMesh
from backend.mesh.refine import refine as refine_surface
from backend.nets import elevation
from backend.pipelines.asset import Asset, game_ready, measure, surfaces
from backend.pipelines.picture_asset import PictureAsset, TurntableAsset
from backend.pipelines.run import Run
from backend.splats.fit import runs_on_cuda
from backend.splats.fit_images import fit_images
from backend.splats.image_loss import settled
from backend.splats.model import Splats
from backend.splats.pictures import pictures, recolored, without_mist
from backend.splats.render import render
from backend.views.cameras import Camera
from backend.views.orbit import Orbit
from backend.views.picture import Picture, load_turntable, read
from backend.views.turning import turning
from backend.views.views import Frame, Views, load
from protocol import recipes
from protocol.errors import KilnError
from protocol.picture import LORA

LAST_SHARE = 0.4  # of the other parts: the fit's last one. The paper refines its views at steps 500 and 1000 of 1200
LOOKS = 48  # pictures of the splats that the mesh is made from
LARGEST = 512  # pixels of a view that splats are fitted to: all views and their features are held in memory
FINEST = 1024  # pixels of such a picture, at most


def im3d(run: Run, folder: Path, p: recipes.Im3d) -> PictureAsset | TurntableAsset:
    """The asset of the picture, the text or the turntable in `folder` (SPEC.md, "Picture")."""
    if (folder / "transforms.json").exists():
        run.begin("Read views")
        return from_views(run, reduced(run, load(folder, progress=run.progress)), None, False, None, None, p)
    model = AS_THEY_COME
    if any(folder.glob("view_*")):
        run.begin("Read views")
        frames, alpha = own_views(run, folder)
        turn = picture = None
    else:
        picture, alpha = the_picture(run, folder, p), None
        chosen, model = replace(p.generate, rerolls="", only=False), weights_of(folder, p)
        turn = run.stage("Generate views", generate, picture.rgba, chosen, p.seed, p.orbit.elevation, model)
        turn = edited(run, turn, picture, folder, model, p)
        frames = turn.frames
    if alpha is None:
        alpha = run.stage("Cut out the views", matte, frames, way(p.generate.matte)[0])
    exact = turn is not None and turn.calibrated
    orbit = turn.orbit if exact else first_guess(run, frames, p.orbit, turn)
    views = as_views(frames, alpha, orbit, picture)
    if p.generate.only:
        return TurntableAsset(views, {**run.report(p), "evaluations": turn.evaluations if turn else 0})
    return from_views(run, views, orbit, p.orbit.estimate and not exact, turn, picture, p, model)


def from_views(
    run: Run,
    views: Views,
    orbit: Orbit | None,
    estimate: bool,
    turn: Turn | None,
    picture: Picture | None,
    p: recipes.Im3d,
    model: Weights = AS_THEY_COME,
) -> PictureAsset:
    """The asset of a turntable. orbit: its cameras, None where the views' own are all there is to know; `estimate`: they are a guess, to be
    refined along with the splats. turn, picture: what the video model made, and of what; None where there is none to go back to. model: its
    weights."""
    compared, sentence = settled(p.fit.features)  # and not "auto", so that finished stages tell what they were made with
    run.log(sentence)
    fit, splats, agreement = replace(p.fit, features=compared), None, []
    rounds = 0 if turn is None else p.iterate.rounds
    for number, steps in enumerate(parts(p.fit.iterations, rounds)):
        stage = "Fit splats" if number == 0 else f"Fit on, round {number}"
        splats, found = run.stage(stage, fit_images, views, fit, p.seed, splats, steps, orbit if estimate else None)
        if found is not None:
            orbit, views = found, replace(views, cameras=found.cameras(views.images.shape[1]))
        agreement.append(agree(splats, views))
        if number < rounds:  # section 3.4. The noise is another in each round: what was made of one comes back out of the same
            renders = drawn(splats, turn.path(orbit).cameras(turn.film.shape[1]))
            turn = run.stage(
                f"Refine views, round {number + 1}", refine, turn, renders, picture.rgba, replace(p.generate, rerolls="", only=False),
                p.iterate.strength, p.iterate.steps, p.seed + 1 + number, model,
            )  # fmt: skip
            alpha = run.stage(f"Cut out the views, round {number + 1}", matte, turn.frames, way(p.generate.matte)[0])
            views = as_views(turn.frames, alpha, orbit, picture)
    splats = recolored(splats, views.cameras)
    solid = without_mist(splats)
    run.begin("Take pictures")
    side = min(FINEST, max(256, 2 * views.images.shape[1]))
    looks = pictures(solid, views.frame, recipes.Look(LOOKS, side), run.progress)
    surface, whole = surfaces(run, solid, looks, p.surface, p.game)
    if p.refine.on:  # appendix A.5
        whole = None  # the views have moved the surface away from it
        device = "cuda" if runs_on_cuda(p.fit.device) else "cpu"
        surface = run.stage("Refine the surface", refine_surface, surface, splats, views, p.refine, p.surface.faces, p.seed, device)
    mesh = run.stage("Bake texture", bake, surface, solid, looks, p.texture)
    scores = run.stage("Measure", measure, mesh, splats, views)
    game = game_ready(run, surface, mesh, whole, p.game, p.seed)
    report = {**run.report(p), "evaluations": turn.evaluations if turn else 0, "agreement": agreement, "orbit": told(orbit)}
    frame = views.frame if orbit is None else standing(mesh, p.placing.size)
    return PictureAsset(Asset(mesh, splats, frame, scores, report, game), views)


def the_picture(run: Run, folder: Path, p: recipes.Im3d) -> Picture:
    """The subject of the input picture, or of one that is made from the prompt, cut out and centred."""
    files = sorted(folder.glob("image.*"))
    if files:
        cut_out = p.generate.matte if read(files[0], 64)[1] is not None else way(p.generate.matte)[0]  # for finished stages: no "auto"
        return run.stage("Read the picture", prepare, files[0], cut_out)
    if not p.generate.prompt:
        raise KilnError(
            "bad-input", "There is neither a picture nor a prompt.", "Choose a picture, or say in generate.prompt what the subject is."
        )
    by = weights.revision(text_to_image.MODEL)
    return run.stage("Make a picture of the text", draw, p.generate.prompt, way(p.generate.matte)[0], p.seed, by)


def weights_of(folder: Path, p: recipes.Im3d) -> Weights:
    """Of the chosen model, and the user's own LoRA."""
    lora = folder / LORA
    return Weights(weights.revision(p.generate.model), lora if lora.exists() else None)


def edited(run: Run, turn: Turn, picture: Picture, folder: Path, model: Weights, p: recipes.Im3d) -> Turn:
    """The turntable with the views generated anew that `generate.rerolls` names, and those replaced that the user gave."""
    drawn_before: dict[int, int] = {}
    for view in numbers(p.generate.rerolls, len(turn.frames)):
        drawn_before[view] = draw_number = drawn_before.get(view, 0) + 1
        chosen = replace(p.generate, rerolls="", only=False)
        turn = run.stage(f"Generate view {view} anew", reroll, turn, view, draw_number, picture.rgba, chosen, p.seed, model)
    frames = turn.frames.copy()
    for path in sorted(folder.glob("replace_*")):
        (view,) = numbers(path.stem.removeprefix("replace_"), len(frames))
        frames[view] = replacement(path, p.generate.matte, frames.shape[1])
    return replace(turn, frames=frames)


def replacement(path: Path, how: str, size: int) -> Float[np.ndarray, "s s 3"]:
    """The user's picture in the place of a view, on white. A square one is taken to be a view that was worked on, its subject where it
    belongs; of others the subject is cut out and put in the middle."""
    color, alpha = read(path)
    if color.shape[0] != color.shape[1]:
        return prepare(path, how).on_white(size)
    if alpha is None:
        alpha = np.ones(color.shape[:2], np.float32)
    return Picture(np.dstack([color, alpha])).on_white(size)


def own_views(run: Run, folder: Path) -> tuple[Float[np.ndarray, "k s s 3"], Float[np.ndarray, "k s s"] | None]:
    """The user's turntable on white, at most LARGEST pixels wide, and its alpha, None where it has none."""
    frames, alpha = load_turntable(folder, run.progress)
    cover = np.ones(frames.shape[:3], np.float32) if alpha is None else alpha
    if frames.shape[1] > LARGEST:
        run.log(f"The views are fitted at {LARGEST} pixels.")
    size = min(LARGEST, frames.shape[1])
    views = np.stack([Picture(np.dstack(pair)).resized(size) for pair in zip(frames, cover, strict=True)])
    on_white = views[..., :3] * views[..., 3:] + 1 - views[..., 3:]
    return on_white.astype(np.float32), None if alpha is None else views[..., 3]


def reduced(run: Run, views: Views) -> Views:
    """Views with cameras at most LARGEST pixels wide and high, their colours and alpha alone: the fit of pictures looks at nothing else."""
    height, width = views.alpha.shape[1:]
    factor = LARGEST / max(width, height)
    if factor >= 1:
        return views
    run.log(f"The views are fitted at {LARGEST} pixels.")
    cameras = [camera.scaled(factor) for camera in views.cameras]
    size = cameras[0].width, cameras[0].height
    images, alpha = np.empty((len(views), size[1], size[0], 3), np.float32), np.empty((len(views), size[1], size[0]), np.float32)
    for number, (image, cover) in enumerate(zip(views.images, views.alpha, strict=True)):
        layers = [*np.moveaxis(image * cover[..., None], -1, 0), cover]  # a transparent pixel's colour counts for nothing
        small = [np.asarray(Image.fromarray(layer).resize(size, Image.Resampling.BOX)) for layer in layers]
        alpha[number] = small[3]
        images[number] = (np.stack(small[:3], -1) / np.maximum(small[3], 1e-6)[..., None]).clip(0, 1)
    return replace(views, cameras=cameras, images=images, alpha=alpha, depth=None, normals=None, material=None, emission=None)


def numbers(text: str, count: int) -> list[int]:
    """The views that a line of numbers names, or `KilnError("bad-parameter")`."""
    words = re.split(r"[\s,;]+", text.strip()) if text.strip() else []
    wrong = [word for word in words if not word.isdigit() or int(word) >= count]
    if wrong:
        raise KilnError("bad-parameter", f"There is no view {wrong[0]!r}.", f"The turntable has the views 0 to {count - 1}.")
    return [int(word) for word in words]


def first_guess(run: Run, frames: Float[np.ndarray, "k s s 3"], p: recipes.Orbit, turn: Turn | None) -> Orbit:
    """The turn's azimuths, equal steps where there is none, at the elevation that the network sees (appendix A.1), or at the given one."""
    height = run.stage("Estimate the elevation", elevation.estimate, frames) if p.estimate else p.elevation
    guess = Orbit.turn(len(frames), height, p.fov)
    if turn is not None:
        return replace(guess, azimuths=turn.orbit.azimuths)
    if p.estimate and turning(frames).direction < 0:
        run.log("The views turn the other way: the camera goes to the left.")
        return replace(guess, azimuths=-guess.azimuths)
    return guess


def as_views(frames: Float[np.ndarray, "k s s 3"], alpha: Float[np.ndarray, "k s s"], orbit: Orbit, picture: Picture | None) -> Views:
    """Frames on white with their mattes as views; the one from where the input picture was taken is the input picture, where the generator
    says so by giving it back (of some, all views are their own)."""
    size = frames.shape[1]
    colors = np.stack([straight(frame, cover, np.ones(3)) for frame, cover in zip(frames, alpha, strict=True)]).astype(np.float32)
    alpha = alpha.copy()
    nearest = int(np.abs((orbit.azimuths + 180) % 360 - 180).argmin())
    if picture is not None and abs((orbit.azimuths[nearest] + 180) % 360 - 180) < 1:
        given = picture.resized(size)
        if np.abs(given[..., :3] * given[..., 3:] + 1 - given[..., 3:] - frames[nearest]).mean() < 0.02:
            colors[nearest], alpha[nearest] = given[..., :3], given[..., 3]
    return Views(orbit.cameras(size), colors, alpha, None, None, np.zeros(len(frames), bool), Frame(np.zeros(3), 1.0))


def parts(iterations: int, rounds: int) -> list[int]:
    """The fit's steps before, between and after the rounds of refinement (appendix A.1)."""
    each = round(iterations / (rounds + LAST_SHARE)) if rounds else iterations
    return [each] * rounds + [iterations - each * rounds] if rounds else [iterations]


def drawn(splats: Splats, cameras: list[Camera]) -> Float[np.ndarray, "n s s 3"]:
    """What the cameras see of the splats, on white."""
    return np.stack([render(splats, camera, (1.0, 1.0, 1.0)).color for camera in cameras]).clip(0, 1).astype(np.float32)


def agree(splats: Splats, views: Views) -> float:
    """Mean PSNR, on white, of the splats against the views that they were fitted to: how much these agree with each other."""
    renders = drawn(splats, views.cameras)
    truth = views.images * views.alpha[..., None] + (1 - views.alpha[..., None])
    return round(float(np.mean([psnr(one, other) for one, other in zip(renders, truth)])), 3)


def standing(mesh: TexturedMesh, size: float) -> Frame:
    """The frame in which the mesh is `size` metres long and stands on the ground, over the origin."""
    low, high = mesh.vertices.min(0).astype(np.float64), mesh.vertices.max(0).astype(np.float64)
    scale = float((high - low).max()) / size
    return Frame(-np.array([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]]) / scale, scale)


def told(orbit: Orbit | None) -> dict | None:
    """The estimated cameras, for the report: degrees."""
    if orbit is None:
        return None
    return {
        "elevation": round(orbit.elevation, 2),
        "fov": round(orbit.fov, 2),
        "azimuths": [round(float(one), 2) for one in orbit.azimuths],
    }
