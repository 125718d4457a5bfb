"""Words to a picture, by a small random model of FLUX.2 klein's classes."""

import numpy as np
import pytest
import torch

from backend import weights
from backend.diffusion import loading, text_to_image
from protocol.errors import Cancelled, KilnError
from tests.backend.diffusion.small_models import klein_pipeline

SIDE = 16


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("klein")
    pipe = klein_pipeline()
    pipe.save_pretrained(root / text_to_image.MODEL)
    (root / "weights.toml").write_text(
        f'[[entry]]\nid = "{text_to_image.MODEL}"\ntitle = "Klein"\npurpose = "Tests."\nclass = "flux2-klein"\nbundled = true\n'
        'memory = { fp32 = 0.1 }\nlicence = { name = "none", url = "", commercial = "yes" }\n'
    )
    return root, pipe


@pytest.fixture
def klein(saved, monkeypatch):
    """The pipeline whose files are installed."""
    root, pipe = saved
    monkeypatch.setattr(weights, "SHIPPED", root)
    monkeypatch.setenv("KILN_WEIGHTS_REGISTRY", str(root / "weights.toml"))
    monkeypatch.setattr(text_to_image, "SIZE", SIDE)
    yield pipe
    loading.release()


def test_the_words_are_drawn_on_a_plain_background_in_four_steps(klein):
    model, evaluations = loading.load(text_to_image.MODEL), []
    model.pipe.transformer.register_forward_hook(lambda *_: evaluations.append(1))
    made = model.draw("a red ball", 5)
    assert len(evaluations) == 4 and made.shape == (SIDE, SIDE, 3) and made.dtype == np.float32
    theirs = klein(
        prompt="a red ball, a single object, centred on a plain white background, whole object visible, seen from the front and slightly "
        "above",
        height=SIDE, width=SIDE, num_inference_steps=4, generator=torch.Generator().manual_seed(5), output_type="np",
    ).images[0]  # fmt: skip
    assert np.abs(made - theirs).max() < 1e-5
    assert np.array_equal(made, model.draw("a red ball", 5))
    assert np.abs(made - model.draw("a red ball", 6)).max() > 0.01


def test_a_drawing_can_be_cancelled(klein):
    def cancel(fraction, text="", preview=None):
        if "step 2" in text:
            raise Cancelled

    with pytest.raises(Cancelled):
        loading.load(text_to_image.MODEL).draw("a red ball", 5, cancel)


def test_what_was_drawn_is_looked_at_like_any_picture(klein):
    with pytest.raises(KilnError) as refused:
        text_to_image.draw("a red ball", "border", 1)
    assert refused.value.code == "bad-input"
    with pytest.raises(KilnError) as empty:
        text_to_image.draw("  ", "border", 1)
    assert empty.value.code == "bad-input"
