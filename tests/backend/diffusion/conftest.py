"""Small random models in a registry of their own."""

import numpy as np
import pytest

from tests.backend.diffusion.small_models import FRAMES, SIZE, lora, wan_pipeline


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """The folder of the models: `plain` (a latent frame is a frame, no CLIP, as Kiln's own small model), `video` (four frames to a latent
    frame and CLIP, as Wan 2.1), and `turning`, a LoRA of `video`. With them `pipes`, the pipelines that were saved."""
    root = tmp_path_factory.mktemp("models")
    pipes = {"plain": wan_pipeline(False, False), "video": wan_pipeline(True, True)}
    for name, pipe in pipes.items():
        pipe.save_pretrained(root / name)
    layers = lora(pipes["video"])
    pipes["video"].save_lora_weights(root / "turning", transformer_lora_layers=layers)
    entries = [("plain", "tiny", ""), ("video", "wan", ""), ("turning", "wan-lora", 'needs = ["video"]')]
    (root / "weights.toml").write_text(
        "\n".join(
            f'[[entry]]\nid = "{id}"\ntitle = "The {id} model"\npurpose = "Tests."\nclass = "{kind}"\nbundled = true\n{more}\n'
            'memory = { fp32 = 0.1 }\nlicence = { name = "none", url = "", commercial = "yes" }\n'
            for id, kind, more in entries
        )
    )
    return root, pipes


@pytest.fixture
def installed(models, monkeypatch):
    """The models stand in the registry. Returns the pipelines that they were saved from. What a test loads stays for the next one."""
    from backend import weights
    from backend.diffusion import wan

    root, pipes = models
    monkeypatch.setattr(weights, "SHIPPED", root)
    monkeypatch.setenv("KILN_WEIGHTS_REGISTRY", str(root / "weights.toml"))
    for id in ("plain", "video", "turning"):
        monkeypatch.setitem(wan.SPECS, id, wan.Spec(FRAMES, SIZE, 2.0, None, "{subject}", "blurry", scale=0.7, even=id == "plain"))
    return pipes


@pytest.fixture
def picture():
    """Straight RGBA with whole steps of a byte, opaque."""
    rng = np.random.default_rng(3)
    return np.dstack([rng.integers(0, 256, (SIZE, SIZE, 3)) / 255, np.ones((SIZE, SIZE))]).astype(np.float32)
