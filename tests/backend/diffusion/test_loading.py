"""What is loaded, from what, how it is let go, and what becomes of a generator whose memory runs out."""

import gc
import json
import os
import shutil
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from backend import weights
from backend.diffusion import loading, turntable
from backend.diffusion.wan import Spec, WanTurntable
from backend.jobs import Jobs
from backend.store import Store
from backend.worker import read_frame, write_frame
from protocol import recipes
from protocol.errors import KilnError
from tests.backend.diffusion import held_recipe
from tests.backend.diffusion.small_models import FRAMES, SIZE, wan_pipeline


def test_one_generator_stays_loaded_and_makes_room_for_another(installed):
    plain = loading.load("plain")
    assert loading.load("plain") is plain and loading.is_warm()
    video = loading.load("video")
    assert video.model == "video" and loading.load("plain") is not plain
    loading.release()
    assert not loading.is_warm()


def test_the_memory_plan_is_told(installed):
    told = []
    loading.release()
    loading.load("plain", lambda fraction, text="", preview=None: told.append(text))
    assert "needs 0.1 GB" in told[0] and any("transformer" in text for text in told)


def test_a_lora_adds_its_product_to_the_weights_at_its_scale(installed, models, picture):
    root, pipes = models
    made = loading.load("turning")
    assert made.lora == ("turning", 0.7) and made.model == "turning"
    layers = load_file(root / "turning" / "pytorch_lora_weights.safetensors")
    name = "blocks.1.attn1.to_q"
    down, up = (layers[f"transformer.{name}.lora_{letter}.weight"] for letter in "AB")
    before, after = (pipe.transformer.get_submodule(name).weight for pipe in (pipes["video"], made.pipe))
    torch.testing.assert_close(after.data, before.data + 0.7 * up @ down)
    turned = made.generate(picture, "", None, 2, 1.0, 1)
    straight = loading.load("video").generate(picture, "", None, 2, 1.0, 1)
    assert np.abs(turned - straight)[1:].max() > 1e-3


def test_a_lora_of_another_model_is_refused(installed, models, tmp_path, monkeypatch):
    root, _ = models
    other = tmp_path / "shipped"
    shutil.copytree(root, other)
    layers = load_file(root / "turning" / "pytorch_lora_weights.safetensors")
    from safetensors.torch import save_file

    save_file({name: torch.zeros(3, *tensor.shape[1:]) for name, tensor in layers.items()}, next((other / "turning").glob("*.safetensors")))
    monkeypatch.setattr(weights, "SHIPPED", other)
    with pytest.raises(KilnError, match="does not fit") as refused:
        loading.load("turning")
    assert refused.value.code == "bad-weights"


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("vae", ["os", "system"]),
        ("vae", ["diffusers", "AutoencoderDC"]),
        ("scheduler", ["my_code", "UniPCMultistepScheduler"]),
        ("text_encoder", ["transformers", "BertModel"]),
        ("../vae", ["diffusers", "AutoencoderKLWan"]),
        ("vae", ["diffusers"]),
    ],
)
def test_classes_that_are_not_on_the_list_are_not_loaded(tmp_path, part, kind):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanImageToVideoPipeline", part: kind}))
    with pytest.raises(KilnError, match="does not load") as refused:
        loading.components(tmp_path, {"": torch.float32})
    assert refused.value.code == "bad-weights"


def test_pickles_are_not_read(models, tmp_path):
    root, pipes = models
    folder = tmp_path / "plain"
    shutil.copytree(root / "plain", folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(pipes["plain"].vae.state_dict(), folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(KilnError, match="vae") as refused:
        loading.components(folder, {"": torch.float32})
    assert refused.value.code == "bad-weights"


def test_weights_that_are_not_here_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("KILN_WEIGHTS", str(tmp_path))
    with pytest.raises(KilnError) as refused:
        loading.load("wan2.1-orbit")
    assert refused.value.code == "no-weights" and "Wan 2.1" in str(refused.value)


def test_too_little_memory_is_said_before_anything_is_loaded(installed, monkeypatch):
    monkeypatch.setenv("KILN_DEVICE_GB", "0.05")
    loading.release()
    with pytest.raises(KilnError, match="needs 0.1 GB") as refused:
        loading.load("plain")
    assert refused.value.code == "out-of-memory" and not loading.is_warm()


def test_memory_that_runs_out_ends_the_attempt_and_the_next_one_runs(installed, picture):
    p = recipes.Generate(model="plain", steps=2, guidance=1.0, views=4)
    expected = turntable.generate(picture, p, 1)

    def take_too_much(*_):
        torch.empty(1 << 50, dtype=torch.uint8)  # torch's own allocator refuses

    held = weakref.ref(loading.load("plain").pipe.transformer)
    held().blocks[1].register_forward_pre_hook(take_too_much)
    with pytest.raises(KilnError, match="ran out of memory") as ended:
        turntable.generate(picture, p, 1)
    assert ended.value.code == "out-of-memory" and ended.value.hint and not loading.is_warm()
    del ended
    gc.collect()
    assert held() is None  # not even the traceback holds the network
    assert np.array_equal(turntable.generate(picture, p, 1).frames, expected.frames)


def test_the_next_step_of_the_plan_is_named(monkeypatch):
    monkeypatch.setattr(loading, "_device", "cuda")
    monkeypatch.setattr(loading, "_plan", weights.memory_plan("wan2.1-orbit", 50 * 10**9, "cuda"))
    error = loading._out_of_memory("wan2.1-orbit", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))
    assert "KILN_DEVICE_GB=24" in error.hint and "fp8" in error.hint and "Tried to allocate" in error.message


def test_networks_stay_for_the_next_job_until_somebody_asks_for_their_memory(tmp_path, monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "held", held_recipe.Held)
    monkeypatch.setenv("KILN_PIPELINES", held_recipe.__name__)
    jobs = Jobs(Store(tmp_path))
    jobs.start()

    def found(name):
        job = jobs.submit(name, "held", {}, {})["id"]
        while jobs.get(job)["state"] not in ("done", "failed"):
            time.sleep(0.05)
        return list(jobs.get(job)["results"])

    try:
        assert found("one") == ["cold"]
        assert found("two") == ["warm"]
        jobs.release()
        assert found("three") == ["cold"]
    finally:
        jobs.close()


def test_an_idle_worker_gives_their_memory_back(tmp_path):
    (tmp_path / "logs").mkdir()
    settings = {
        "PYTHONPATH": str(Path(__file__).parents[3]), "KILN_PIPELINES": held_recipe.__name__, "KILN_IDLE_SECONDS": "0.2",
    }  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "backend.worker"], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, **settings},
    ) as worker:  # fmt: skip

        def found(job):
            command = {"command": "run", "job": job, "recipe": "held", "parameters": {}, "inputs": {}, "folder": str(tmp_path / job)}
            write_frame(worker.stdin, {**command, "stages": str(tmp_path / "stages"), "stages_bytes": 10**6})
            while (message := read_frame(worker.stdout))["kind"] != "done":
                assert message["kind"] != "failed", message
            return message["results"]

        assert found("one") == ["cold"]
        assert any(b"given back" in line for line in worker.stderr)
        assert found("two") == ["cold"]
        worker.stdin.close()


def test_parts_that_take_turns_in_memory_make_the_same_views(picture, monkeypatch):
    plan, views = weights.Plan("fp32", False, 0, 1.0, ""), []
    part = 300_000  # bytes: room for any part, not for all of them
    for room, offload, way in ((10**9, False, "all"), (part, False, "parts"), (0, False, "layers"), (part, True, "layers")):
        pipe = wan_pipeline(True, True)
        monkeypatch.setattr(loading, "free_bytes", lambda device, room=room: loading.WORKING_BYTES + room)
        assert loading.settle(pipe, "cpu:0", replace(plan, offload=offload), "transformer") == (way == "all")
        assert hasattr(pipe.vae, "_hf_hook") == (way == "parts") and hasattr(pipe.vae.quant_conv, "_diffusers_hook") == (way == "layers")
        views.append(WanTurntable("small", pipe, Spec(FRAMES, SIZE, 1.0)).generate(picture, "a red ball", None, 2, 1.0, 1))
    assert all(np.array_equal(views[0], other) for other in views[1:])


def test_half_and_quarter_precision_make_nearly_the_same_views(installed, picture):
    def made(precision):
        model = WanTurntable.open("turning", "cpu", weights.Plan(precision, False, 0, 1.0, ""))
        return model.generate(picture, "a red ball", None, 2, 1.0, 1)[1:], model.pipe.transformer

    (exact, _), (half, _), (quarter, transformer) = made("fp32"), made("bf16"), made("fp8")
    assert transformer.blocks[0].ffn.net[2].weight.dtype == torch.float8_e4m3fn  # at rest
    errors = np.abs(half - exact).mean(), np.abs(quarter - exact).mean()
    assert 0 < errors[0] < 0.01 and errors[0] < errors[1] < 0.05 and exact.std() > 0.05


def test_a_lora_of_the_users_own_changes_the_weights_and_is_part_of_what_is_warm(installed, models):
    root, pipes = models
    file = root / "turning" / "pytorch_lora_weights.safetensors"
    made = loading.load("video", lora=file)
    layers, name = load_file(file), "blocks.1.attn1.to_v"
    down, up = (layers[f"transformer.{name}.lora_{letter}.weight"] for letter in "AB")
    before = pipes["video"].transformer.get_submodule(name).weight
    torch.testing.assert_close(made.pipe.transformer.get_submodule(name).weight.data, before.data + up @ down)
    assert loading.load("video", lora=file) is made
    plain = loading.load("video")
    assert plain is not made and torch.equal(plain.pipe.transformer.get_submodule(name).weight, before)


def test_a_lora_that_the_model_has_no_place_for_is_refused(installed, models, tmp_path):
    from safetensors.torch import save_file

    layers = load_file(models[0] / "turning" / "pytorch_lora_weights.safetensors")
    deeper = {name.replace("blocks.1.", "blocks.7."): tensor for name, tensor in layers.items()}
    of_sv3d = {name.replace("transformer.", "unet."): tensor for name, tensor in layers.items()}
    for number, wrong in enumerate((deeper, of_sv3d, {"weight": torch.zeros(2)})):
        save_file(wrong, tmp_path / f"{number}.safetensors")
        with pytest.raises(KilnError, match=f"{number}.safetensors does not fit") as refused:
            loading.load("video", lora=tmp_path / f"{number}.safetensors")
        assert refused.value.code == "bad-weights"
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(KilnError, match="cannot be read"):
        loading.load("video", lora=tmp_path / "text.safetensors")


def test_models_that_take_no_lora_say_so(models):
    with pytest.raises(KilnError, match="takes no LoRA"):
        loading.load("mv-adapter-sdxl", lora=models[0] / "turning" / "pytorch_lora_weights.safetensors")


def test_a_network_takes_the_lora_that_was_saved_for_it(tmp_path):
    from safetensors.torch import save_file

    network = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()).bfloat16()
    before, down, up = network[0].weight.detach().float().clone(), torch.ones(2, 4), torch.ones(3, 2)
    save_file({"unet.0.lora_A.weight": down, "unet.0.lora_B.weight": up}, tmp_path / "a.safetensors")
    loading.fuse(network, "unet", tmp_path / "a.safetensors")
    torch.testing.assert_close(network[0].weight.float(), before + 2, atol=0.02, rtol=0)
    for name, shape, told in (("1", (3, 2), "no layer 1|layer 1"), ("0", (4, 2), "another size"), ("9", (3, 2), "no layer 9")):
        wrong = {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": torch.ones(shape)}
        save_file(wrong, tmp_path / "b.safetensors")
        with pytest.raises(KilnError, match=told):
            loading.fuse(network, "unet", tmp_path / "b.safetensors")
