"""`animate`: two balls, of which one swings around the other, come out as a mesh that does the same, in files that other programs read."""

import json

import numpy as np
import pytest
import trimesh
from PIL import Image

from backend.pipelines.animate import from_sequence
from backend.pipelines.animated_asset import frame_name
from backend.pipelines.run import Run
from backend.views.sequence import ViewSequence
from backend.views.views import Views
from protocol import recipes
from protocol.errors import Cancelled, KilnError
from tests.backend.splats import two_balls

MOMENTS = 4
SMALL = {
    "fit.splats": 1500, "fit.iterations": 200, "fit.nodes": 40, "fit.device": "cpu", "surface.grid": 64, "surface.faces": 1200,
    "texture.size": 128, "armature.bones": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def views():
    return two_balls.views(MOMENTS, fitted=8, size=80)


@pytest.fixture(scope="module")
def made(views, tmp_path_factory):
    folder = tmp_path_factory.mktemp("animate")
    events = []
    run = Run(folder / "stages", events.append)
    asset = from_sequence(run, views, recipes.make("animate", SMALL))
    (folder / "out").mkdir()
    asset.save(folder / "out")
    return folder, asset, events


def test_vertices_follow_the_balls(made, views):
    _, asset, _ = made
    rest = asset.mesh.vertices[asset.rest]
    centres = [np.array(centre) for _, centre in two_balls.poses(asset.rest)]
    ball = np.argmin([np.linalg.norm(rest - centre, axis=1) / radius for centre, radius in zip(centres, two_balls.RADII, strict=True)], 0)
    home = np.where(ball[:, None] == 0, *[(rest - centre) @ turn for turn, centre in two_balls.poses(asset.rest)])
    diagonal = np.linalg.norm(np.ptp(asset.mesh.vertices.reshape(-1, 3), axis=0))
    for moment in range(MOMENTS):
        truth = np.where(ball[:, None] == 0, *[home @ turn.T + centre for turn, centre in two_balls.poses(moment)])
        assert np.linalg.norm(asset.mesh.vertices[moment] - truth, axis=1).mean() < 0.015 * diagonal
    assert asset.report["seconds"].keys() >= {"Follow the motion", "Fit splats", "Solve the armature"}


def test_figures_tell_of_a_good_result(made):
    figures = made[1].scores.figures
    assert figures["splats_psnr"] > 22 and figures["mesh_psnr"] > 22 and figures["armature_psnr"] > 22
    assert figures["armature_error"] < 0.005 and 1 <= figures["bones"] <= 4
    assert figures["frames"] == [1, 2, 3, 4] and figures["fps"] == 24 and figures["texels_seen"] > 0.9


def test_files_are_there_and_another_reader_opens_them(made):
    folder, asset, _ = made
    names = {path.relative_to(folder / "out").as_posix() for path in (folder / "out").rglob("*") if path.is_file()}
    assert names == {
        "mesh.glb", "shape_keys.glb", "armature.glb", "splats.ply", "report.json", "comparison.png", "preview.png",
        *(f"turntable_{number:02}.png" for number in range(36)), *(f"splats_000{number}.ply" for number in (1, 2, 3, 4)),
    }  # fmt: skip
    for name in ("mesh.glb", "shape_keys.glb", "armature.glb"):
        mesh = trimesh.load(folder / "out" / name, force="mesh", process=False)
        assert len(mesh.faces) == len(asset.mesh.mesh.faces)
    report = json.loads((folder / "out" / "report.json").read_text("utf-8"))
    assert report["recipe"] == "animate" and report["rest_frame"] in report["frames"]
    with Image.open(folder / "out" / "turntable_35.png") as picture:
        assert picture.size == (192, 192) and picture.mode == "RGBA"


def test_a_second_run_computes_nothing_and_gives_the_same(made, views):
    folder, asset, _ = made
    run = Run(folder / "stages")
    again = from_sequence(run, views, recipes.make("animate", SMALL))
    assert len(run.cached) == 8
    assert np.array_equal(again.mesh.vertices, asset.mesh.vertices) and np.array_equal(again.splats.means, asset.splats.means)


def test_pictures_come_while_it_runs_and_cancelling_stops_it(made, views):
    _, _, events = made
    shown = {event["text"] for event in events if event.get("preview") is not None}
    assert shown
    seen = []

    def report(event):
        seen.append(event.get("stage"))

    with pytest.raises(Cancelled):
        from_sequence(Run(None, report, lambda: "Follow the motion" in seen), views, recipes.make("animate", SMALL))
    assert "Fit splats" not in seen


def test_what_stands_still_is_refused(views):
    """From other cameras at each moment."""
    order = [i for moment in range(MOMENTS) for i in np.flatnonzero(~views.views.holdout & (views.time == moment))]
    still = [two_balls.picture(views.views.cameras[i], 0) for i in order]
    images, alpha, depth, normals = (np.stack([one[part] for one in still]) for part in range(4))
    cameras = [views.views.cameras[i] for i in order]
    seen = Views(cameras, images, alpha, depth, normals, np.zeros(len(order), bool), views.views.frame)
    with pytest.raises(KilnError, match="Nothing moves"):
        from_sequence(Run(), ViewSequence(seen, views.time[order], views.frames, views.fps), recipes.make("animate", SMALL))


def test_frames_below_zero_and_between_others_have_names_of_their_own():
    names = [frame_name(number) for number in (-12, 0, 7, 12, 12.5, 12000)]
    assert names == ["n0012", "0000", "0007", "0012", "0012.5", "12000"]
