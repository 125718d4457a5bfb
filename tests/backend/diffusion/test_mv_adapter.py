"""MV-Adapter on SDXL: small files in the published layouts go through the real loader, and six views come out."""

import math

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from safetensors.torch import load_file, save_file

from backend.diffusion import loading, mv_adapter
from backend.diffusion.memory import Place
from backend.nets.mv_attention import MultiViewAttention, Reference
from protocol.errors import KilnError
from tests.backend.diffusion.published import mv_adapter as write_small
from tests.backend.diffusion.published import register

SIZE = 64


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("mv-adapter")
    return root, write_small(root)


@pytest.fixture(scope="session")
def model(written):
    root = written[0]
    return mv_adapter.load(root / mv_adapter.FILE, root / "sdxl", root / "vae", Place(), SIZE)


@pytest.fixture
def picture():
    at = np.linspace(-1, 1, 48, dtype=np.float32)
    x, y = np.meshgrid(at, at)
    return np.stack([0.5 + 0.4 * x, 0.5 + 0.4 * y, 0.3 + 0 * x, (x**2 + y**2 < 0.3).astype(np.float32)], -1)


def test_files_in_the_published_layouts_give_back_every_tensor(written, model):
    root, (pipe, encoder) = written
    for name in ("unet", "text_encoder", "text_encoder_2"):
        original, loaded = getattr(pipe, name).state_dict(), getattr(model.pipe, name).state_dict()
        assert original.keys() <= loaded.keys()
        for key, tensor in original.items():
            torch.testing.assert_close(loaded[key], tensor, rtol=0, atol=0, msg=key)
    adapter = load_file(root / mv_adapter.FILE)
    loaded = {**model.pipe.unet.state_dict(), **model.encoder.state_dict()}
    assert len(adapter) > 50
    for key, tensor in adapter.items():
        torch.testing.assert_close(loaded[key], tensor, rtol=0, atol=0, msg=key)
    ours = {key for key in loaded if "processor." in key or key.startswith("adapter.")}
    assert ours == adapter.keys()
    assert model.pipe.vae.config.scaling_factor == 0.5  # the autoencoder's own folder, not the one in SDXL's


def test_attention_is_the_published_formula():
    """Its own, plus along the rows of all views, plus at the reference; written out token by token."""
    torch.manual_seed(0)
    views, side, width, heads = 3, 4, 8, 2
    own = Attention(query_dim=width, heads=heads, dim_head=width // heads, processor=AttnProcessor2_0()).double()
    processor = MultiViewAttention("here", width, reference := Reference()).double()
    x, seen = torch.randn(views, side * side, width).double(), torch.randn(1, side * side, width).double()
    reference.seen["here"] = seen

    def attend(query, keys, values):  # one query
        result = []
        for head in range(heads):
            part = slice(head * width // heads, (head + 1) * width // heads)
            weights = torch.softmax(keys[:, part] @ query[part] / math.sqrt(width // heads), 0)
            result.append(weights @ values[:, part])
        return torch.cat(result)

    with torch.no_grad():
        plain = own(x)
        expected = plain.clone()
        query, key, value = (getattr(processor, f"to_{part}_mv")(x) for part in "qkv")
        ref_query = processor.to_q_ref(x)
        ref_key, ref_value = processor.to_k_ref(seen[0]), processor.to_v_ref(seen[0])
        for view in range(views):
            for row in range(side):
                tokens = slice(row * side, (row + 1) * side)
                keys, values = key[:, tokens].reshape(-1, width), value[:, tokens].reshape(-1, width)
                for token in range(row * side, (row + 1) * side):
                    expected[view, token] += processor.to_out_mv[0](attend(query[view, token], keys, values))
                    expected[view, token] += processor.to_out_ref[0](attend(ref_query[view, token], ref_key, ref_value))
        torch.testing.assert_close(processor(own, x), expected)
        reference.blind = True  # guidance withholds the reference: zeros in its place
        blind = processor(own, x)
        reference.blind, reference.seen["here"] = False, torch.zeros_like(seen)
        torch.testing.assert_close(processor(own, x), blind)
        reference.looking = True
        torch.testing.assert_close(processor(own, x), plain)
        torch.testing.assert_close(reference.seen["here"], x)


def test_six_views_are_made_on_white(model, picture):
    seen = []
    before = model.evaluations
    frames = model.generate(picture, "a ball", None, 2, 3.0, 7, lambda fraction, text="", preview=None: seen.append(fraction))
    assert frames.shape == (6, SIZE, SIZE, 3) and frames.dtype == np.float32
    assert np.isfinite(frames).all() and frames.min() >= 0 and frames.max() <= 1
    assert np.abs(frames[0] - frames[3]).max() > 1e-3
    assert model.evaluations - before == 4  # two guidance pairs
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1.0) and len(seen) > 2 * 2 * 5
    np.testing.assert_array_equal(model.generate(picture, "a ball", None, 2, 3.0, 7), frames)
    before = model.evaluations
    other = model.generate(np.where(picture[..., 3:] > 0, 1 - picture, picture), "a ball", None, 2, 1.0, 7)
    assert model.evaluations - before == 2 and np.abs(other - frames).max() > 1e-3


def test_known_frames_come_back_and_steer_the_others(model, picture):
    frames = np.random.default_rng(0).random((6, SIZE, SIZE, 3), np.float32)
    keep = np.array([True, True, False, True, True, True])
    one = model.refine(frames, picture, "", None, 2, 1.0, 1.0, 7, keep)
    np.testing.assert_array_equal(one[keep], frames[keep])
    other = frames.copy()
    other[1] = 1 - other[1]
    assert np.abs(model.refine(other, picture, "", None, 2, 1.0, 1.0, 7, keep)[2] - one[2]).max() > 1e-4


def test_refining_by_next_to_nothing_gives_back_what_went_in(model, picture, monkeypatch):
    monkeypatch.setattr(mv_adapter, "_regrounded", lambda frame, *greys: frame)  # an untrained decoder's pictures have no background
    frames = np.random.default_rng(0).random((6, 8, 8, 3), np.float32).repeat(8, 1).repeat(8, 2)
    with torch.no_grad():
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
        through = model.pipe.vae.decode(model.pipe.vae.encode(2 * pixels - 1).latent_dist.mode()).sample
    through = (through / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    monkeypatch.setattr(model, "_sigmas", np.geomspace(1e-4, 40, 1000))  # SDXL's own end at 0.03, which such a decoder shows
    little, much = (model.refine(frames, picture, "", None, 2, strength, 1.0, 7) for strength in (1e-3, 0.9))
    near, far = (float(np.abs(film - through).mean()) for film in (little, much))
    assert near < 0.03 and far > 3 * near, (near, far)


def test_grey_behind_a_subject_becomes_white_and_back():
    at = np.linspace(-1, 1, 96, dtype=np.float32)
    x, y = np.meshgrid(at, at)
    cover = np.clip((0.6 - np.hypot(x, y)) * 30, 0, 1)[..., None]
    subject = np.stack([0.9 + 0 * x, 0.2 + 0.1 * y, 0.1 + 0 * x], -1).astype(np.float32)
    grey, white = (subject * cover + behind * (1 - cover) for behind in (0.5, 1.0))
    assert np.abs(mv_adapter._regrounded(grey, 0.5, 1.0) - white).mean() < 0.01
    assert np.abs(mv_adapter._regrounded(white, 1.0, 0.5) - grey).mean() < 0.01


def test_the_subject_fills_nine_tenths_of_the_reference(picture):
    at = np.linspace(-1, 1, 400, dtype=np.float32)
    x, y = np.meshgrid(at, at)
    off_centre = np.stack([0.9 + 0 * x, 0.1 + 0 * x, 0.1 + 0 * x, (np.hypot(x - 0.3, 2 * (y + 0.2)) < 0.5).astype(np.float32)], -1)
    shown = mv_adapter.framed(off_centre, 200)
    rows, columns = np.nonzero(np.abs(shown - 0.5).max(-1) > 0.2)
    assert abs(np.ptp(columns) + 1 - 180) <= 2 and abs(np.ptp(rows) + 1 - 90) <= 2
    assert abs(rows.min() + rows.max() - 199) <= 2 and abs(columns.min() + columns.max() - 199) <= 2
    whole = mv_adapter.framed(np.concatenate([picture[..., :3], np.ones((48, 48, 1), np.float32)], -1), 48)
    np.testing.assert_allclose(whole, picture[..., :3], atol=1e-6)


def test_cameras_are_what_the_model_was_trained_with(model):
    # huanngzh/MV-Adapter, utils/mesh_utils/camera.py and utils/geometry.py: an eye at 1.8 (cos a, sin a, 0), a turned by -90 degrees; where
    # it looks and where it is, brought from [-1, 1] to [0, 1].
    turns = np.radians(np.array([0, 45, 90, 180, 270, 315]) - 90)
    eyes = np.stack([np.cos(turns), np.sin(turns), 0 * turns], 1)
    np.testing.assert_allclose(mv_adapter.rays(model.orbit).numpy(), (np.concatenate([-eyes, eyes], 1) + 1) / 2, atol=1e-6)
    # As pinholes with a long lens: points of the unit sphere are seen where parallel rays would.
    points = np.random.default_rng(0).normal(size=(2000, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    for camera in model.orbit.cameras(768):
        right, down = camera.camera_from_world[0, :3], camera.camera_from_world[1, :3]
        parallel = np.stack([points @ right, points @ down], 1) * 384 + 384
        assert np.abs(camera.project(points)[0] - parallel).max() < 0.4


def test_noise_is_shifted_at_the_noisy_end_only():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # SDXL's
    kept = np.cumprod(1 - betas)
    sigmas = mv_adapter.shifted(torch.from_numpy(kept))
    plain = np.sqrt((1 - kept) / kept)
    assert sigmas[0] == pytest.approx(plain[0]) and sigmas[-1] == pytest.approx(plain[-1] * math.sqrt(8))
    assert (np.diff(sigmas) > 0).all()
    levels = mv_adapter.ladder(sigmas, 4, 1.0)
    assert levels[0] == pytest.approx(sigmas[-1]) and levels[-1] == 0 and len(levels) == 5
    assert mv_adapter.ladder(sigmas, 4, 0.5)[0] == pytest.approx(np.interp(499.5, np.arange(1000), sigmas), rel=1e-2)


def test_a_file_that_does_not_fit_is_named(written, tmp_path):
    root = written[0]
    tensors = load_file(root / mv_adapter.FILE)
    tensors.pop("adapter.conv_in.weight")
    save_file(tensors, tmp_path / mv_adapter.FILE)
    with pytest.raises(KilnError, match="1 tensors, adapter.conv_in.weight among them") as caught:
        mv_adapter.load(tmp_path / mv_adapter.FILE, root / "sdxl", root / "vae", Place(), SIZE)
    assert caught.value.code == "bad-weights"


def test_the_registry_loads_it_offline_and_keeps_it(written, tmp_path, monkeypatch, picture):
    root = written[0]
    monkeypatch.setattr(mv_adapter, "SIZE", SIZE)
    (root / "adapter").mkdir()
    (root / "adapter" / mv_adapter.FILE).symlink_to(root / mv_adapter.FILE)
    needs = 'needs = ["sdxl", "vae"]'
    base, vae = ("sdxl", "sdxl", root / "sdxl", ""), ("vae", "sdxl-vae", root / "vae", "")
    register(tmp_path, monkeypatch, base, vae, ("mv-adapter-sdxl", "mv-adapter", root / "adapter", needs))
    model = loading.load("mv-adapter-sdxl")
    assert loading.load("mv-adapter-sdxl") is model and isinstance(model, mv_adapter.MVAdapter)
    frames = model.generate(picture, "", model.orbit, 1, 1.0, 7)
    assert frames.shape == (model.views, SIZE, SIZE, 3) and len(model.orbit.azimuths) == model.views
    loading.release()
