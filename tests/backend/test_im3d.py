"""`im3d`: from a picture, or from views of one's own, to a mesh that stands where it should; what is done is not done again."""

import json

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from safetensors.torch import save_file

from backend.pipelines.asset import coded
from backend.pipelines.im3d import as_views, im3d, numbers, own_views, parts, reduced, replacement
from backend.pipelines.run import Run
from backend.train import objects, turntables
from backend.views.orbit import Orbit
from backend.views.picture import Picture
from backend.views.views import Frame, Views
from protocol import picture as wire
from protocol import recipes
from protocol.errors import KilnError

TINY = {
    "generate.model": "kiln-tiny-turntable", "generate.steps": 3, "generate.matte": "border", "iterate.rounds": 1, "iterate.steps": 2,
    "fit.start": 500, "fit.splats": 800, "fit.iterations": 60, "fit.features": "gradients", "surface.grid": 32, "surface.faces": 400,
    "texture.size": 64, "orbit.estimate": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def thing():
    return objects.make(900_000, objects.TRAINING[3])


@pytest.fixture(scope="module")
def picture(thing, tmp_path_factory):
    """A folder of inputs with a picture of an object that the model never saw."""
    folder = tmp_path_factory.mktemp("picture")
    color, alpha = turntables.picture(thing, Orbit.turn(1, 15.0, turntables.FOV).cameras(128)[0])
    Image.fromarray(coded(np.dstack([color, alpha]))).save(folder / "image.png")
    return folder


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def made(picture, stages, tmp_path_factory):
    """The results of a picture, and the stages of the run."""
    return results(picture, stages, {}, tmp_path_factory.mktemp("made"))


def results(folder, stages, values, out):
    run = Run(stages)
    im3d(run, folder, recipes.make("im3d", {**TINY, **values})).save(out)
    return out, run


def views_in(folder):
    return np.stack([np.asarray(Image.open(path), np.float32) / 255 for path in sorted(folder.glob("view_*.png"))])


def test_a_picture_becomes_an_asset_that_stands_on_the_ground_one_metre_long(made):
    out, _ = made
    mesh = trimesh.load(out / "mesh.glb", force="mesh")  # Y up
    mesh.merge_vertices(merge_tex=True, merge_norm=True)  # the file's are split at seams
    assert 0 < len(mesh.faces) <= 400 and mesh.is_watertight
    assert mesh.extents.max() == pytest.approx(1.0, rel=1e-4)
    assert mesh.bounds[0][1] == pytest.approx(0, abs=1e-4)
    assert np.allclose((mesh.bounds[0] + mesh.bounds[1])[[0, 2]], 0, atol=1e-4)
    report = json.loads((out / "report.json").read_text())
    assert report["recipe"] == "im3d" and len(report["agreement"]) == 2
    assert report["evaluations"] == 3 + 1  # the small model needs no guidance, one evaluation a step, and refines in one
    assert (out / "turntable.png").exists() and len(views_in(out)) == 16


def test_the_input_view_stays_the_input(made, picture):
    out, _ = made
    given = np.asarray(Image.open(picture / "image.png").convert("RGBA"), np.float32) / 255
    first = views_in(out)[0]
    cover = first[..., 3] > 0.9
    assert given[..., 3].mean() > 0.02 and cover.mean() > 0.02
    mean = (given[..., :3] * given[..., 3:]).sum((0, 1)) / given[..., 3].sum()
    assert np.abs(first[cover][:, :3].mean(0) - mean).max() < 0.03


def test_a_view_made_anew_and_a_view_replaced_change_and_the_rest_is_found_done(made, picture, stages, tmp_path):
    before, first = made
    assert first.cached == []
    again = {"generate.rerolls": "5", "generate.only": True, "iterate.rounds": 0}
    folder = tmp_path / "inputs"
    folder.mkdir()
    (folder / "image.png").write_bytes((picture / "image.png").read_bytes())
    own = np.zeros((64, 64, 4), np.uint8)
    own[16:48, 24:40] = (200, 30, 30, 255)
    Image.fromarray(own).save(folder / "replace_009.png")
    (tmp_path / "plain").mkdir()
    (tmp_path / "edited").mkdir()
    plain, _ = results(picture, stages, {"generate.only": True}, tmp_path / "plain")
    edited, run = results(folder, stages, again, tmp_path / "edited")
    assert "Generate views" in run.cached
    changed = np.abs(views_in(plain) - views_in(edited)).max((1, 2, 3)) > 0.02
    assert np.flatnonzero(changed).tolist() == [5, 9]
    replaced = views_in(edited)[9]
    assert np.abs(replaced[replaced[..., 3] > 0.9][:, :3].mean(0) - np.array([200, 30, 30]) / 255).max() < 0.05
    assert not (edited / "mesh.glb").exists()


def test_ones_own_turntable_needs_no_generator(thing, stages, tmp_path):
    frames, _ = turntables.turntable(thing, 25.0, 64, 8)
    for index, frame in enumerate(frames):
        Image.fromarray(coded(frame)).save(tmp_path / f"view_{index:03d}.png")
    out = tmp_path / "out"
    out.mkdir()
    _, run = results(tmp_path, stages, {"generate.model": "wan2.1-orbit", "orbit.elevation": 25.0, "fit.iterations": 150}, out)
    report = json.loads((out / "report.json").read_text())
    assert report["evaluations"] == 0 and report["orbit"]["elevation"] == 25.0 and report["agreement"][0] > 18
    assert not any("Generate" in name or "Refine" in name for name in run.seconds)


def test_own_views_with_soft_alpha_keep_their_colours(tmp_path):
    for index in range(4):
        view = np.full((64, 64, 4), (200, 100, 40, 0), np.uint8)
        view[16:48, 16:48, 3], view[20:44, 20:44, 3] = 128, 255
        Image.fromarray(view).save(tmp_path / f"view_{index:03d}.png")
    frames, alpha = own_views(Run(), tmp_path)
    views = as_views(frames, alpha, Orbit.turn(4, 10.0, 40.0), None)
    assert np.abs(views.images[alpha > 0.4] - np.array([200, 100, 40]) / 255).max() < 0.02
    assert frames[0, 0, 0].min() == 1  # what is transparent is white to whoever looks at pictures


def test_large_views_of_ones_own_are_reduced(tmp_path):
    for index in range(4):
        Image.new("RGB", (700, 700), (255, 255, 255)).save(tmp_path / f"view_{index:03d}.png")
    frames, alpha = own_views(Run(), tmp_path)
    assert frames.shape == (4, 512, 512, 3) and alpha is None


def test_large_views_with_cameras_are_reduced_with_them():
    orbit, side = Orbit.turn(3, 10.0, 40.0), 1024
    images, alpha = np.zeros((3, side, side, 3), np.float32), np.zeros((3, side, side), np.float32)
    images[:, 256:768, 256:512] = (0.8, 0.4, 0.2)
    alpha[:, 256:769, 256:512] = 1  # one row more than has a colour
    views = Views(orbit.cameras(side), images, alpha, alpha, images, np.array([0, 0, 1], bool), Frame(np.ones(3), 2.0))
    told = []
    small = reduced(Run(report=told.append), views)
    assert small.alpha.shape == (3, 512, 512) and small.depth is None and small.normals is None
    assert np.array_equal(small.holdout, views.holdout) and small.frame is views.frame
    assert any("512 pixels" in event.get("text", "") for event in told)
    assert np.allclose(small.images[:, 128:384, 128:256], (0.8, 0.4, 0.2), atol=1e-3) and small.alpha[0, 384, 200] == pytest.approx(0.5)
    points = np.array([[0.1, 0.2, -0.3], [0.0, 0.0, 0.0]])
    for camera, fine in zip(small.cameras, views.cameras, strict=True):
        assert np.allclose(2 * camera.project(points)[0], fine.project(points)[0])
    assert reduced(Run(), small) is small


def test_a_lora_of_ones_own_changes_the_views_and_another_one_again(picture, made, stages, tmp_path):
    def turned(number, scale):
        folder, out = tmp_path / f"in{number}", tmp_path / f"out{number}"
        folder.mkdir()
        out.mkdir()
        (folder / "image.png").write_bytes((picture / "image.png").read_bytes())
        layers = {f"transformer.blocks.3.attn1.to_v.lora_{side}.weight": scale * torch.ones(shape) for side, shape in SIDES}
        save_file(layers, tmp_path / "pytorch_lora_weights.safetensors")
        for name, file in wire.lora(tmp_path).items():
            (folder / name).write_bytes(file.read_bytes())
        _, run = results(folder, stages, {"generate.only": True}, out)
        return views_in(out), run.cached

    SIDES = (("A", (1, 192)), ("B", (192, 1)))
    plain, found = results(picture, stages, {"generate.only": True}, tmp_path)
    assert "Generate views" in found.cached
    (first, cached), (second, also) = turned(1, 0.1), turned(2, 0.2)
    assert "Generate views" not in cached + also
    for one, other in ((first, views_in(plain)), (second, first)):
        assert np.abs(one - other)[1:].max() > 0.02


def test_what_is_no_lora_is_said(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"")
    for wrong, told in ((tmp_path, "0 safetensors"), (tmp_path / "a.bin", "no LoRA"), (tmp_path / "b.safetensors", "no LoRA")):
        with pytest.raises(KilnError, match=told):
            wire.lora(wrong)
    assert wire.lora(None) == {}


def test_a_view_that_was_worked_on_keeps_its_subjects_place(tmp_path):
    view = np.zeros((64, 64, 4), np.uint8)
    view[10:20, 40:50] = (200, 30, 30, 255)
    Image.fromarray(view).save(tmp_path / "replace_003.png")
    subject = replacement(tmp_path / "replace_003.png", "border", 64).min(-1) < 0.5
    assert np.array_equal(np.argwhere(subject).min(0), [10, 40]) and np.array_equal(np.argwhere(subject).max(0), [19, 49])


def test_a_model_that_is_not_installed_is_named_with_size_and_licence(picture, tmp_path, monkeypatch):
    monkeypatch.setenv("KILN_WEIGHTS", str(tmp_path))
    with pytest.raises(KilnError) as caught:
        im3d(Run(), picture, recipes.make("im3d", {**TINY, "generate.model": "wan2.1-orbit"}))
    assert caught.value.code == "no-weights"
    told = f"{caught.value.message} {caught.value.hint}"
    assert "GB" in told and "Apache-2.0" in told and "kiln weights pull" in told


def test_neither_picture_nor_words_is_said(tmp_path):
    with pytest.raises(KilnError, match="neither a picture nor a prompt"):
        im3d(Run(), tmp_path, recipes.make("im3d", TINY))


def test_the_paper_refines_after_500_and_1000_of_1200_steps():
    assert parts(1200, 2) == [500, 500, 200]
    assert parts(1200, 0) == [1200]
    assert sum(parts(777, 3)) == 777


def test_numbers_of_views():
    assert numbers(" 3, 7 7", 16) == [3, 7, 7]
    assert numbers("", 16) == []
    for wrong in ("16", "-1", "two"):
        with pytest.raises(KilnError, match="There is no view"):
            numbers(wrong, 16)


def test_the_view_nearest_to_the_picture_is_the_picture():
    orbit = Orbit(np.array([90.0, 180.0, 270.0, 360.0]), 10.0, 33.8, 2.0)  # as SV3D's: the input view is the last
    frames, alpha = np.full((4, 8, 8, 3), 0.5, np.float32), np.ones((4, 8, 8), np.float32)
    own = as_views(frames, alpha, orbit, Picture(np.zeros((8, 8, 4), np.float32)))
    assert own.images[3].min() == 0.5 and own.alpha[3].min() == 1  # a generator's view of its own (MV-Adapter's front) stays
    frames[3] = 1.0  # the picture, given back on white
    views = as_views(frames, alpha, orbit, Picture(np.zeros((8, 8, 4), np.float32)))
    assert views.images[3].max() == 0 and views.alpha[3].max() == 0
    assert views.images[:3].min() == 0.5 and views.alpha[:3].min() == 1
