"""`mesh_splats`: the mesh of a splat file lies where its splats do, whatever tool wrote it, and what cannot be used is said."""

import dataclasses
import json

import numpy as np
import pytest
import trimesh
from PIL import Image

from backend.pipelines.mesh_splats import mesh_splats, read, subject
from backend.pipelines.run import Run
from backend.splats import ply, spz
from backend.splats.fit import fit
from backend.splats.model import Splats
from backend.splats.pictures import pictures, without_mist
from backend.splats.turn import Z_UP_FROM_Y_UP, turned
from backend.views.ball import ball
from backend.views.views import Frame
from protocol import recipes
from protocol.errors import Cancelled, KilnError
from tests.backend.splats import reference

SMALL = {"look.count": 20, "look.size": 96, "surface.grid": 48, "surface.faces": 2000, "texture.size": 128}
FRAME = Frame(np.array([10.0, -2.0, 3.0]), 5.0)  # a ball of 14 cm radius, away from the origin


@pytest.fixture(scope="module")
def fitted():
    """Splats whose own silhouettes lie on the ball's: with half as many steps they would be 2 % larger, and so would their mesh."""
    views = dataclasses.replace(ball(96, 20), depth=None, normals=None)
    return fit(views, recipes.Fit(splats=4000, iterations=300, sh_degree=1, device="cpu"), 0)


def shell(count=3000, radius=0.7, seed=0) -> Splats:
    """Opaque Gaussians on a sphere."""
    points = np.random.default_rng(seed).normal(size=(count, 3))
    points *= radius / np.linalg.norm(points, axis=1, keepdims=True)
    like = reference.cloud(count, 0, seed)
    return dataclasses.replace(
        like,
        means=points.astype(np.float32),
        log_scales=np.full((count, 3), np.log(0.03), np.float32),
        opacity_logits=np.full(count, 4, np.float32),
    )


def joined(*parts: Splats) -> Splats:
    return Splats(**{one.name: np.concatenate([getattr(part, one.name) for part in parts]) for one in dataclasses.fields(Splats)})


def meshed(folder, values=None, log=None):
    """Runs the recipe on the file in `folder`, and gives the folder of results."""
    run = Run(report=lambda event: log is not None and event["kind"] == "log" and log.append(event["text"]))
    asset = mesh_splats(run, folder, recipes.make("mesh_splats", {**SMALL, **(values or {})}))
    (folder / "out").mkdir()
    asset.save(folder / "out")
    return folder / "out"


@pytest.mark.parametrize("suffix", ["ply", "spz"])
def test_a_splat_file_becomes_a_mesh_where_its_splats_are(tmp_path, fitted, suffix):
    {"ply": ply, "spz": spz}[suffix].save(tmp_path / f"splats.{suffix}", fitted, FRAME)
    out = meshed(tmp_path)
    assert {path.name for path in out.iterdir()} == {
        "mesh.glb", "splats.ply", "splats.spz", "report.json", "comparison.png", "preview.png",
    }  # fmt: skip
    mesh = trimesh.load(out / "mesh.glb", force="mesh", process=False)
    mesh.merge_vertices(merge_tex=True, merge_norm=True)
    assert mesh.is_watertight and mesh.volume > 0
    centre = FRAME.centre[[0, 2, 1]] * [1, 1, -1]  # GLB has Y up
    radii = np.linalg.norm(mesh.vertices - centre, axis=1) * FRAME.scale
    assert abs(radii.mean() - 0.7) < 0.01 and np.abs(radii - 0.7).max() < 0.035  # a cell is 0.03 of these units
    report = json.loads((out / "report.json").read_text())
    assert report["recipe"] == "mesh_splats" and report["views"] == 20 and report["holdout_views"] == 3
    assert report["mesh_psnr"] > 24 and report["splats_psnr"] > 45 and report["file_splats"] == len(fitted) >= report["splats"]
    assert set(report["seconds"]) == {"Extract surface", "Bake texture", "Measure"}
    again = ply.load(out / "splats.ply")
    assert np.abs(np.median(again.means, 0) - FRAME.centre).max() < 0.03
    with Image.open(out / "comparison.png") as picture:
        assert picture.size == (3 * 96, 3 * 96)


def test_the_same_file_makes_the_same_mesh_and_the_log_counts_what_was_left_out(tmp_path, fitted):
    spoilt = dataclasses.replace(fitted, means=fitted.means.copy())
    spoilt.means[:7] = np.nan
    logs: tuple[list[str], list[str]] = ([], [])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        ply.save(tmp_path / name / "splats.ply", spoilt, FRAME)
    first, second = meshed(tmp_path / "a", log=logs[0]), meshed(tmp_path / "b", log=logs[1])
    assert (first / "mesh.glb").read_bytes() == (second / "mesh.glb").read_bytes()
    assert logs[0] == logs[1] and "7 of 4,000 Gaussians have values that are no numbers" in logs[0][0]


@pytest.mark.parametrize(("up", "rotation"), [("z_up", np.eye(3)), ("y_up", Z_UP_FROM_Y_UP.T), ("y_down", Z_UP_FROM_Y_UP)])
def test_the_way_up_can_be_chosen(tmp_path, up, rotation):
    """A file whose splats were turned so that this axis is up is read as it was before."""
    splats = reference.cloud(30, 2, 0)
    ply.save(tmp_path / "a.ply", turned(splats, rotation), Frame(np.zeros(3), 1.0))
    back = read(tmp_path, up)
    assert np.allclose(back.means, splats.means, atol=1e-6) and np.allclose(back.sh, splats.sh, atol=1e-5)


def test_the_way_up_of_an_spz_file_is_its_own(tmp_path):
    splats = reference.cloud(30, 0, 0)
    spz.save(tmp_path / "a.spz", splats, Frame(np.zeros(3), 1.0))  # the file has Y up
    assert np.allclose(read(tmp_path, "auto").means, splats.means, atol=1e-6)
    assert np.allclose(read(tmp_path, "y_up").means, splats.means, atol=1e-6)
    assert np.allclose(read(tmp_path, "z_up").means, splats.means[:, [0, 2, 1]] * [1, 1, -1], atol=1e-6)


def test_a_ply_of_another_tool_has_y_down_where_nothing_else_is_asked_for(tmp_path):
    splats, told = reference.cloud(30, 2, 0), []
    ply.save(tmp_path / "a.ply", splats, Frame(np.zeros(3), 1.0))
    assert np.allclose(read(tmp_path, "auto", told.append).means, splats.means, atol=1e-6) and told == []  # Kiln's own says Z
    content = (tmp_path / "a.ply").read_bytes()
    (tmp_path / "a.ply").write_bytes(content.replace(b"comment Kiln", b"comment Another"))
    foreign = read(tmp_path, "auto", told.append)
    assert np.allclose(foreign.means, splats.means[:, [0, 2, 1]] * [1, 1, -1], atol=1e-6)
    assert len(told) == 1 and "does not say which way is up" in told[0]
    assert np.array_equal(read(tmp_path, "z_up").means, splats.means)


def test_floaters_and_what_surrounds_the_subject_are_left_out(tmp_path):
    far = dataclasses.replace(shell(20, 6.0, 1), opacity_logits=np.full(20, -2, np.float32))
    sky = dataclasses.replace(shell(5, 0.5, 2), log_scales=np.full((5, 3), 2, np.float32))
    told = []
    kept, frame = subject(joined(shell(), far, sky), recipes.Subject(), told.append)
    assert len(kept) == 3000 and np.abs(frame.centre).max() < 0.02
    assert told == ["25 of 3,025 splats lie apart from the subject or are too large for it, and are left out."]
    assert 0.6 < np.linalg.norm(kept.means, axis=1).max() < 1


def test_what_follows_without_a_gap_belongs_to_the_subject():
    """An antenna of a hundredth of all splats, as long as the body."""
    antenna = shell(30, 0.7, 1)
    antenna.means[:] = np.linspace(0.7, 1.35, 30)[:, None] * np.array([0, 0, 1], np.float32)
    kept, _ = subject(joined(shell(), antenna), recipes.Subject())
    assert len(kept) == 3030


def test_faint_splats_around_the_subject_cast_no_silhouette():
    mist = dataclasses.replace(shell(2000, 0.95, 3), opacity_logits=np.full(2000, -3.2, np.float32))  # opacity 0.04
    views = pictures(without_mist(joined(shell(), mist)), FRAME, recipes.Look(count=8, size=64))
    bare = pictures(shell(), FRAME, recipes.Look(count=8, size=64))
    assert np.array_equal(views.alpha, bare.alpha) and bare.alpha.min() == 0
    assert len(without_mist(mist)) == 2000  # where there is nothing else


def test_a_ball_can_be_cut_out():
    two = shell(1000)
    two.means[:500, 0] += 10
    kept, frame = subject(two, recipes.Subject(radius=1.0, x=10.0))
    assert len(kept) == 500 and np.allclose(frame.centre, [10, 0, 0], atol=0.05)
    with pytest.raises(KilnError, match="No splats lie in the ball"):
        subject(two, recipes.Subject(radius=1.0, y=50.0))


@pytest.mark.parametrize("count", [1, 2])
def test_very_few_splats_still_make_pictures(count):
    kept, frame = subject(shell(count), recipes.Subject())
    views = pictures(kept, frame, recipes.Look(count=8, size=64))
    assert len(kept) == count and len(views) == 9 and views.alpha.max() > 0.5


def test_pictures_stop_when_the_job_is_cancelled(fitted):
    def stop(*report):
        raise Cancelled

    with pytest.raises(Cancelled):
        pictures(fitted, Frame(np.zeros(3), 1.0), recipes.Look(count=8, size=64), stop)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda splats, folder: (folder / "splats.ply").unlink(), "no splat file"),
        (lambda splats, folder: ply.save(folder / "more.ply", splats, FRAME), "2 splat files"),
        (lambda splats, folder: splats.means.fill(np.nan), "none of its 3,000 Gaussians can be drawn"),
        (lambda splats, folder: splats.log_scales.fill(-np.inf), "no size"),
        (lambda splats, folder: splats.opacity_logits.fill(-9), "nothing solid"),
    ],
)
def test_what_cannot_be_meshed_is_refused_in_a_sentence(tmp_path, change, says):
    splats = shell()
    ply.save(tmp_path / "splats.ply", splats, FRAME)
    change(splats, tmp_path)
    if (tmp_path / "splats.ply").exists():
        ply.save(tmp_path / "splats.ply", splats, FRAME)
    with pytest.raises(KilnError, match=says) as refused:
        meshed(tmp_path)
    assert refused.value.code == "bad-input" and refused.value.hint


def test_ten_million_splats_are_refused_before_they_are_read(tmp_path):
    ply.save(tmp_path / "splats.ply", shell(5), FRAME)
    content = (tmp_path / "splats.ply").read_bytes().replace(b"element vertex 5", b"element vertex 10000000")
    with open(tmp_path / "splats.ply", "wb") as file:
        file.write(content)
        file.truncate(len(content) + 10_000_000 * 68)  # a hole in the file, no bytes on the disk
    with pytest.raises(KilnError, match="10,000,000 Gaussians"):
        meshed(tmp_path)
