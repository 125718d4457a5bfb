"""Training: from nothing, resumed, and as LoRA on the layers that turn the subject."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from backend import weights
from backend.diffusion import sv3d, wan
from backend.diffusion.memory import Place
from backend.train import autoencoder, lora, muon, objects, tiny, turntables
from backend.train.turntable import Settings, again_loss, first_frame_condition, flow_loss
from backend.views.orbit import Orbit
from protocol.errors import KilnError
from tests.backend.diffusion.published import SMALL_SV3D
from tests.backend.diffusion.published import sv3d as write_small
from tests.backend.diffusion.small_models import FRAMES, SIZE, wan_pipeline

FEW = Settings(steps=6, batch=2, rate=1e-2, warmup=1, cooldown=0.1, log=1, save=3, show=100)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Steps this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def turns():
    """Two turntables of 8 views."""
    return [
        turntables.Turntable(
            turntables.turntable(objects.make(seed), 20.0, SIZE, 8)[0], Orbit.turn(8, 20.0, turntables.FOV), f"turn {seed}"
        )
        for seed in range(2)
    ]


@pytest.fixture(scope="session")
def chunks():
    return [np.stack([(turntables.example(seed) * 255).astype(np.uint8) for seed in range(4)])]


@pytest.fixture(scope="session")
def components(chunks):
    return autoencoder.principal(torch.from_numpy(chunks[0].reshape(-1, 64, 64, 3)).float() / 127.5 - 1)


def test_muon_brings_a_matrix_near_to_an_orthogonal_one():
    matrix = torch.randn(24, 60, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.logspace(0, -1, 60))
    values = torch.linalg.svdvals(muon.orthogonal(matrix))
    assert 0.6 < values.min() and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(muon.orthogonal(matrix).flatten(), (left @ right).flatten(), 0) > 0.95


def test_wans_encoder_computes_the_components_and_each_frame_by_itself(chunks, components):
    vae = autoencoder.build(components, 0)
    video = torch.from_numpy(chunks[0][:1, :5]).float() / 127.5 - 1
    wanted = autoencoder.project(components, video).transpose(1, 2)
    with torch.no_grad():
        coded = vae.encode(video.permute(0, 4, 1, 2, 3)).latent_dist.mode()
        found = coded / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
        assert (found - wanted).abs().max() < 0.03 and wanted.std() > 0.5
        alone = torch.cat([vae.decode(coded[:, :, k : k + 1]).sample for k in range(5)], 2)
        assert torch.allclose(vae.decode(coded).sample, alone, atol=1e-5)
        with autoencoder.framewise(vae):
            quick = autoencoder.decode(vae, found[0].transpose(0, 1))
        assert torch.allclose(quick.transpose(0, 1).clamp(-1, 1), alone[0], atol=1e-4)


def test_the_quick_transformer_computes_what_wans_own_does():
    model = tiny.build_transformer(0, num_layers=2)
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    given = torch.randn(1, 33, 5, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([300.0]), torch.ones(1, 7, 16)
    with torch.no_grad():
        own = model(*given, return_dict=False)[0]
        with tiny.quick(model):
            assert torch.allclose(model(*given, return_dict=False)[0], own, atol=1e-5)
        told_other_words = model(given[0], given[1], -3 * given[2], return_dict=False)[0]
    assert torch.equal(told_other_words, own) and own.std() > 0.01


def started(folder, chunks, components, settings, again=tiny.AGAIN):
    model = tiny.build_transformer(0, num_layers=1, num_attention_heads=1, ffn_dim=64)
    return tiny.prepare(model, components, chunks, settings, folder, again)


def test_a_few_steps_lower_the_loss(tmp_path, chunks, components):
    run, loss = started(tmp_path, chunks, components, Settings(steps=24, batch=2, rate=1e-2, warmup=4, log=6), 0.0)
    run.train(loss)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and losses[-1] < 0.9 * losses[0]


def test_a_run_that_was_stopped_ends_in_the_same_bits(tmp_path, chunks, components):
    whole, loss = started(tmp_path / "whole", chunks, components, FEW)
    whole.train(loss)

    class Stopped(Exception):
        pass

    def stop(fraction, text="", preview=None):
        if fraction > 0.7:
            raise Stopped

    broken, loss = started(tmp_path / "broken", chunks, components, FEW)
    with pytest.raises(Stopped):
        broken.train(loss, progress=stop)
    resumed, loss = started(tmp_path / "broken", chunks, components, FEW)
    assert resumed.step == 3
    resumed.train(loss)
    for name, value in whole.parameters.items():
        assert torch.equal(value, resumed.parameters[name]) and torch.equal(whole.average[name], resumed.average[name]), name


def small_wan():
    pipe = wan_pipeline(True, True)
    return wan.WanTurntable("small", pipe, wan.Spec(FRAMES, SIZE, 1.0), previews=False)


@pytest.fixture(scope="session")
def small_sv3d(tmp_path_factory):
    file = tmp_path_factory.mktemp("sv3d") / sv3d.FILE
    write_small(file)
    return lambda added=None: sv3d.load(file, Place(), SMALL_SV3D, lora=added)


def trained(course, turns, folder, settings=FEW):
    before = {name: value.clone() for name, value in course.denoiser.state_dict().items()}
    file = lora.train(course, turns, folder, settings, rank=2, starts=2)
    after = course.denoiser.state_dict()
    frozen = {name.replace(".base_layer", ""): value for name, value in after.items() if "lora_" not in name}
    assert before.keys() == frozen.keys() and all(torch.equal(before[name], frozen[name]) for name in before)
    return file, {re.sub(r"\.lora_[AB]\..*", "", name) for name in after if "lora_" in name}


def test_lora_on_wan_learns_in_self_attention_alone_and_loads_into_a_fresh_pipeline(tmp_path, turns):
    generator = small_wan()
    file, layers = trained(lora.wan_course(generator, "", 3.0), turns, tmp_path)
    assert layers == {f"blocks.{k}.attn1.{name}" for k in range(2) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    assert [path.name for path in tmp_path.glob("sample-*")] == ["sample-000006.png"]
    fresh = small_wan()
    given = np.concatenate([turns[0].frames[0], np.ones((SIZE, SIZE, 1), np.float32)], 2)
    before = fresh.generate(given, "", None, 2, 1.0, 0)
    fresh.pipe.load_lora_weights(str(tmp_path), weight_name=lora.FILE)
    after = fresh.generate(given, "", None, 2, 1.0, 0)
    assert np.abs(after - before)[1:].max() > 1e-4
    other = small_wan()
    lora.load(other.pipe.transformer, file)
    assert np.abs(other.generate(given, "", None, 2, 1.0, 0) - after).max() < 1e-5


def test_lora_on_sv3d_learns_in_temporal_attention_alone_and_loads_again(tmp_path, turns, small_sv3d):
    generator = small_sv3d()
    file, layers = trained(lora.sv3d_course(generator, 1), turns[:1], tmp_path, Settings(steps=2, batch=1, rate=1e-2, warmup=1))
    assert layers and all(re.search(r"temporal_transformer_blocks\.\d+\.attn[12]\.(to_[qkv]|to_out\.0)$", name) for name in layers)
    everywhere = {
        name for name, _ in generator.unet.named_modules() if re.search(r"temporal_transformer_blocks\.\d+\.attn[12]\.to_q$", name)
    }
    assert {name for name in layers if name.endswith("to_q")} == everywhere
    given = np.concatenate([turns[0].frames[0], np.ones((SIZE, SIZE, 1), np.float32)], 2)
    fresh = small_sv3d()
    before = fresh.generate(given, "", None, 1, 1.0, 0)
    lora.load(fresh.unet, file)
    after = fresh.generate(given, "", None, 1, 1.0, 0)
    assert np.abs(after - before)[1:].max() > 1e-6
    assert np.abs(small_sv3d(file).generate(given, "", None, 1, 1.0, 0) - after).max() < 1e-5  # as `kiln run im3d --lora` loads it


def test_a_flow_that_is_known_has_no_loss():
    """Where clean latents are zero, the direction from them to the noise is x / s."""
    rng = torch.Generator().manual_seed(0)

    def perfect(x, times, text, return_dict):
        return (x[:, :4] / (times / 1000)[:, None, None, None, None],)

    clean = torch.zeros(3, 4, 2, 4, 4)
    assert flow_loss(perfect, clean, clean, torch.zeros(3, 1, 4), 2.0, rng) < 1e-6
    assert again_loss(perfect, clean, clean, torch.zeros(3, 1, 4), 2.0, rng) < 1e-6


def test_what_a_model_made_itself_is_led_back_to_the_truth():
    """A model that believes everything to be 0 says so of its own clips too: the error is all that the truth differs from it by, but for
    the given frame."""
    rng = torch.Generator().manual_seed(0)
    seen = []

    def believes_zero(x, times, text, return_dict):
        seen.append((x[:, :4], times / 1000, torch.is_grad_enabled()))
        return (x[:, :4] / (times / 1000)[:, None, None, None, None],)

    clean = torch.full((3, 4, 2, 4, 4), 2.0)
    assert again_loss(believes_zero, clean, clean, torch.zeros(3, 1, 4), 2.0, rng).item() == pytest.approx(1.5 * 4, rel=1e-5)
    assert [grad for *_, grad in seen] == [False] * (len(seen) - 1) + [True]
    noisy, level, _ = seen[-1]
    assert 0.35 <= level.min() and level.max() <= 0.9
    s = level[:, None, None, None]
    assert torch.allclose((noisy[:, :, 0] - (1 - s) * 2).flatten(1).std(1), level, rtol=0.3)  # the given frame is the true one, noised
    assert torch.allclose(noisy[:, :, 1].flatten(1).std(1), level, rtol=0.3) and noisy[:, :, 1].mean().abs() < 0.3


def test_a_model_that_is_no_generator_of_turntables_is_refused():
    with pytest.raises(KilnError, match="Linear cannot be trained"):
        lora.add(torch.nn.Linear(2, 2), 2, 0)


def test_the_shipped_model_loads_in_diffusers_own_pipeline_and_follows_the_picture():
    from diffusers import WanImageToVideoPipeline

    pipe = WanImageToVideoPipeline.from_pretrained(weights.SHIPPED / tiny.ID, local_files_only=True, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    true = turntables.example(tiny.HELD_OUT)
    generator = wan.WanTurntable(tiny.ID, pipe, wan.SPECS[tiny.ID], previews=False)
    made = generator.generate(np.concatenate([true[0], np.ones((64, 64, 1), np.float32)], 2), "", None, 6, 1.0, 0)
    assert made.shape == (tiny.FRAMES, tiny.SIZE, tiny.SIZE, 3)
    other = turntables.example(tiny.HELD_OUT + 1)
    assert np.abs(made[-1] - true[0]).mean() < 0.5 * np.abs(made[-1] - other[0]).mean()  # the turn closes at the picture
    words = torch.ones(1, 3, pipe.transformer.config.text_dim)
    shown = Image.fromarray((true[0] * 255).astype(np.uint8))
    clip = pipe(shown, prompt_embeds=words, height=64, width=64, num_frames=16, num_inference_steps=1, guidance_scale=1.0).frames[0]
    assert clip.shape == made.shape


def test_an_untrained_network_looks_from_each_place_at_the_same_place_of_the_given_frame(chunks, components, monkeypatch):
    model = tiny.build_transformer(0)
    clean = autoencoder.project(components, tiny.clips(chunks, 2, torch.Generator().manual_seed(0))).transpose(1, 2)
    condition = first_frame_condition(clean, autoencoder.project(components, torch.zeros(64, 64, 3)))
    shares, softmax = [], torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda scores, axis: shares.append(softmax(scores, axis)) or shares[-1])
    with torch.no_grad(), tiny.quick(model):
        model(torch.cat([torch.randn_like(clean), condition], 1), torch.full((2,), 1000.0), torch.zeros(2, 1, 16), return_dict=False)
    for share in shares:  # [clips heads tokens tokens]
        from_others_to_given = share[:, 0].unflatten(1, (17, 16)).unflatten(3, (17, 16))[:, 1:, :, 0]
        assert from_others_to_given.diagonal(dim1=-2, dim2=-1).mean() > 20 / (17 * 16)
    assert len(shares) == 8
