"""Stable Video 3D: a small file in the published layout goes through the real loader, and what comes out is a turntable."""

import math

import numpy as np
import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from backend.diffusion import loading, sv3d
from backend.diffusion.frames import on_background
from backend.diffusion.memory import Place
from protocol.errors import Cancelled, KilnError
from tests.backend.diffusion.published import SMALL_SV3D, register
from tests.backend.diffusion.published import sv3d as write_small


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    file = tmp_path_factory.mktemp("sv3d-p") / sv3d.FILE
    return file, write_small(file)


@pytest.fixture(scope="session")
def model(written):
    return sv3d.load(written[0], Place(), SMALL_SV3D)


@pytest.fixture
def picture():
    at = np.linspace(-1, 1, 48, dtype=np.float32)
    x, y = np.meshgrid(at, at)
    return np.stack([0.5 + 0.4 * x, 0.5 + 0.4 * y, 0.3 + 0 * x, (x**2 + y**2 < 0.5).astype(np.float32)], -1)


def test_a_file_in_the_published_layout_gives_back_every_tensor(written, model):
    for loaded, original in zip((model.unet, model.vae, model.clip), written[1], strict=True):
        state = loaded.state_dict()
        assert state.keys() == original.state_dict().keys()
        for name, tensor in original.state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=0, msg=name)


def test_names_of_the_unet_and_the_autoencoder_agree_with_diffusers_own_converters(written, model):
    file = load_file(written[0])
    theirs = convert_ldm_unet_checkpoint(file, {"layers_per_block": 2})
    state = model.unet.state_dict()
    spatial = {
        name.replace("spatial_res_block.", ""): tensor for name, tensor in state.items() if "temporal" not in name and "time_" not in name
    }
    assert len(spatial) > 200
    for name, tensor in spatial.items():
        if not name.startswith("add_embedding"):  # SVD's own, which the converter of 2D UNets does not know
            torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=0, msg=name)
    vae = {name.removeprefix("conditioner.embedders.1.encoder."): tensor for name, tensor in file.items() if "embedders.1" in name}
    theirs = convert_ldm_vae_checkpoint(vae, SMALL_SV3D.vae)
    assert theirs.keys() == model.vae.state_dict().keys()
    for name, tensor in model.vae.state_dict().items():
        torch.testing.assert_close(theirs[name].reshape(tensor.shape), tensor, rtol=0, atol=0, msg=name)


def test_the_image_encoder_sees_what_open_clips_does(written, model):
    prefix = "conditioner.embedders.0.open_clip.model.visual."
    w = {name.removeprefix(prefix): tensor for name, tensor in load_file(written[0]).items() if name.startswith(prefix)}
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    x = F.conv2d(pixels, w["conv1.weight"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([w["class_embedding"].expand(2, 1, -1), x], 1) + w["positional_embedding"]
    x = F.layer_norm(x, (32,), w["ln_pre.weight"], w["ln_pre.bias"])
    for layer in range(2):
        own = {name.removeprefix(f"transformer.resblocks.{layer}."): tensor for name, tensor in w.items() if f"resblocks.{layer}." in name}
        normed = F.layer_norm(x, (32,), own["ln_1.weight"], own["ln_1.bias"]).transpose(0, 1)
        attended = F.multi_head_attention_forward(
            normed, normed, normed, 32, 4, own["attn.in_proj_weight"], own["attn.in_proj_bias"], None, None, False, 0.0,
            own["attn.out_proj.weight"], own["attn.out_proj.bias"], need_weights=False,
        )[0]  # fmt: skip
        x = x + attended.transpose(0, 1)
        hidden = F.gelu(
            F.linear(F.layer_norm(x, (32,), own["ln_2.weight"], own["ln_2.bias"]), own["mlp.c_fc.weight"], own["mlp.c_fc.bias"])
        )
        x = x + F.linear(hidden, own["mlp.c_proj.weight"], own["mlp.c_proj.bias"])
    expected = F.layer_norm(x[:, 0], (32,), w["ln_post.weight"], w["ln_post.bias"]) @ w["proj"]
    with torch.no_grad():
        torch.testing.assert_close(model.clip(pixels).image_embeds, expected, rtol=1e-4, atol=1e-5)


def test_where_all_frames_stand_alike_the_unet_is_diffusers_own():
    config = {**SMALL_SV3D.unet, "projection_class_embeddings_input_dim": 3 * 16}  # three vectors of one width: SVD's layout
    torch.manual_seed(0)
    ours = sv3d.SV3DUNet.from_config(config).eval().double()  # norms over few pixels blow up what single precision rounds
    theirs = UNetSpatioTemporalConditionModel.from_config(config).eval().double()
    theirs.load_state_dict(ours.state_dict())
    draw = torch.Generator().manual_seed(2)
    sample, seen = torch.randn(1, 5, 8, 8, 8, generator=draw).double(), torch.randn(1, 1, 24, generator=draw).double()
    values = [0.3, 1.2, 2.5]
    with torch.no_grad():
        expected = theirs(sample, torch.tensor(0.7), seen, torch.tensor([values]), return_dict=False)[0]
        alike = [torch.full((1, 5), value) for value in values]
        torch.testing.assert_close(ours(sample, torch.tensor(0.7), seen, *alike), expected, rtol=1e-6, atol=1e-6)
        alike[2][0, 3] += 1.0
        assert (ours(sample, torch.tensor(0.7), seen, *alike) - expected)[0, 3].abs().max() > 1e-4


def test_a_turntable_is_made_and_shows_the_picture_first(model, picture):
    seen = []
    before = model.evaluations
    frames = model.generate(picture, "", None, 2, 2.5, 7, lambda fraction, text="", preview=None: seen.append((fraction, preview)))
    assert frames.shape == (5, 64, 64, 3) and frames.dtype == np.float32
    assert np.isfinite(frames).all() and frames.min() >= 0 and frames.max() <= 1
    np.testing.assert_array_equal(frames[0], on_background(picture, 64))
    assert np.ptp(frames[2]) > 0.01
    assert model.evaluations - before == 4  # two guidance pairs
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions) and fractions[-1] == pytest.approx(1.0) and len(seen) > 2 * 2 * 9
    assert any(preview is not None for _, preview in seen)
    np.testing.assert_array_equal(model.generate(picture, "", None, 2, 2.5, 7), frames)
    before = model.evaluations
    assert np.abs(model.generate(picture, "", None, 2, 1.0, 8) - frames).max() > 0.01
    assert model.evaluations - before == 2


def test_the_height_of_the_camera_reaches_the_model(model, picture):
    low, high = (model.generate(picture, "", sv3d.Orbit.turn(5, height, sv3d.FOV), 2, 1.0, 7) for height in (0.0, 60.0))
    assert np.abs(low[1:] - high[1:]).max() > 1e-3


def test_refining_by_next_to_nothing_gives_back_what_went_in(model, picture):
    frames = np.random.default_rng(0).random((5, 8, 8, 3), np.float32).repeat(8, 1).repeat(8, 2)
    with torch.no_grad():
        pixels = torch.from_numpy(frames[1:]).permute(0, 3, 1, 2)
        through = model.vae.decode(model.vae.encode(2 * pixels - 1).latent_dist.mode()).sample
    through = (through / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    little = model.refine(frames, picture, "", None, 2, 1e-3, 1.0, 7)
    much = model.refine(frames, picture, "", None, 2, 0.9, 1.0, 7)
    near, far = (float(np.abs(film[1:] - through).mean()) for film in (little, much))
    assert near < 0.03 and far > 3 * near, (near, far)  # `through`: as its autoencoder shows them


def test_known_frames_come_back_and_steer_the_others(model, picture):
    frames = np.random.default_rng(0).random((5, 64, 64, 3), np.float32)
    keep = np.array([False, True, True, False, True])
    one = model.refine(frames, picture, "", None, 2, 1.0, 1.0, 7, keep)
    np.testing.assert_array_equal(one[keep], frames[keep])
    np.testing.assert_array_equal(one[0], on_background(picture, 64))
    other = frames.copy()
    other[2] = 1 - other[2]
    two = model.refine(other, picture, "", None, 2, 1.0, 1.0, 7, keep)
    assert np.abs(two[3] - one[3]).max() > 1e-4
    free = frames.copy()
    free[3] = 0.5  # from pure noise, frames that are not kept do not count
    np.testing.assert_array_equal(model.refine(free, picture, "", None, 2, 1.0, 1.0, 7, keep), one)


def test_a_cancel_comes_through_within_a_step(model, picture):
    def stop(fraction, text="", preview=None):
        if 0.06 < fraction:
            raise Cancelled()

    before = model.evaluations
    with pytest.raises(Cancelled):
        model.generate(picture, "", None, 20, 2.5, 7, stop)
    assert model.evaluations - before == 1


def test_cameras_turn_as_the_published_ones_do(model):
    # generative-models, scripts/demo/sv3d_helpers.py: the eye at (cos e cos a, cos e sin a, sin e), z up. And
    # scripts/sampling/simple_video_sample.py: the picture is taken from azimuth 0, and is the last of the frames.
    azimuths, elevation = np.radians(np.linspace(0, 360, 22)[1:] % 360), math.radians(10)
    around = math.cos(elevation) * np.stack([np.cos(azimuths), np.sin(azimuths)])
    theirs = np.stack([*around, np.full(21, math.sin(elevation))], 1)
    orbit = sv3d.Orbit.turn(21, sv3d.ELEVATION, sv3d.FOV)
    ours = np.stack([camera.centre for camera in orbit.cameras(576)])[np.roll(np.arange(21), -1)] / orbit.distance
    quarter = np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1.0]])  # their front, +X, is our -Y; a turn about z, no mirror
    assert np.linalg.det(quarter) > 0
    np.testing.assert_allclose(ours, theirs @ quarter.T, atol=1e-9)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"out.2.weight": None}, "lacks 1 tensors, conv_out.weight"),
        ({"out.2.weight": (4, 32, 3, 5)}, r"\(4, 32, 3, 5\), \(4, 32, 3, 3\) expected"),
        ({"controlnet.weight": (1,)}, "no part of SV3D_p"),
    ],
)
def test_a_file_that_does_not_fit_is_named(written, tmp_path, change, words):
    tensors = load_file(written[0])
    for name, shape in change.items():
        tensors.pop("model.diffusion_model." + name, None)
        if shape:
            tensors["model.diffusion_model." + name] = torch.zeros(shape)
    save_file(tensors, tmp_path / sv3d.FILE)
    with pytest.raises(KilnError, match=words) as caught:
        sv3d.load(tmp_path / sv3d.FILE, Place(), SMALL_SV3D)
    assert caught.value.code == "bad-weights"


def test_the_registry_loads_it_offline_and_keeps_it(written, tmp_path, monkeypatch, picture):
    monkeypatch.setattr(sv3d, "AS_PUBLISHED", SMALL_SV3D)
    register(tmp_path, monkeypatch, ("sv3d-p", "sv3d", written[0].parent, ""))
    model = loading.load("sv3d-p")
    assert loading.load("sv3d-p") is model and isinstance(model, sv3d.SV3D)
    torch.testing.assert_close(model.unet.conv_in.weight, written[1][0].conv_in.weight, rtol=0, atol=0)
    frames = model.generate(picture, "", model.orbit, 1, 1.0, 7)
    assert frames.shape == (model.views, model.size, model.size, 3) and len(model.orbit.azimuths) == model.views
    loading.release()
