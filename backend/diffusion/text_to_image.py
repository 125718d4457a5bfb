"""A picture of what a prompt says, for the turntable to begin with: FLUX.2 klein 4B (Apache-2.0), distilled to four steps."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from jaxtyping import Float
from PIL import Image

from backend import weights
from backend.diffusion import loading
from backend.diffusion.matte import prepare
from backend.progress import Progress, silent
from backend.views.picture import Picture
from protocol.errors import KilnError

MODEL = "flux2-klein-4b"
SIZE = 768  # pixels; turntables are smaller
STEPS = 4  # with no guidance: the model card
PROMPT = "{subject}, a single object, centred on a plain white background, whole object visible, seen from the front and slightly above"


def draw(prompt: str, matte: str, seed: int, revision: str = "", progress: Progress = silent) -> Picture:
    """The subject of a picture that is made from words, cut out as `prepare` does it (matte: its `how`). The same words and seed draw the
    same by the same weights; revision: `weights.revision` of them, by which finished stages are told apart. Raises KilnError: bad-input,
    and what `loading.loaded` raises."""
    subject = " ".join(prompt.split()).rstrip(".,")
    if not subject:
        raise KilnError("bad-input", "There is neither a picture nor a prompt.", "Choose a picture, or say what the subject is.")
    with loading.loaded(MODEL, progress) as model:
        made = model.draw(subject, seed, progress)
    with TemporaryDirectory() as folder:  # from here on it is a picture like any other
        path = Path(folder) / "drawing.png"
        Image.fromarray((made * 255 + 0.5).astype(np.uint8)).save(path)
        return prepare(path, matte, progress=lambda fraction, text="", preview=None: progress(0.9 + 0.1 * fraction, text, preview))


class TextToImage:
    """FLUX.2 klein, ready to run."""

    def __init__(self, model: str, pipe: Flux2KleinPipeline, size: int):
        self.model, self.pipe, self.size = model, pipe, size
        pipe.set_progress_bar_config(disable=True)

    @classmethod
    def open(cls, id: str, device: str, plan: weights.Plan, progress: Progress = silent) -> TextToImage:
        parts = loading.components(weights.folder(id), {"": loading.dtype(plan)}, progress)
        try:
            pipe = Flux2KleinPipeline(**parts, is_distilled=True)
        except TypeError as error:
            raise KilnError("bad-weights", f"{id} is no FLUX.2 klein: {error}.", "Use weights of the registry.") from None
        loading.settle(pipe, device, plan, "transformer")
        return cls(id, pipe, SIZE)

    @torch.no_grad()
    def draw(self, subject: str, seed: int, progress: Progress = silent) -> Float[np.ndarray, "s s 3"]:
        pipe = self.pipe
        blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
        done = 0

        def report() -> None:
            nonlocal done
            step = min(done // len(blocks), STEPS - 1)
            progress(min(0.1 + 0.75 * done / (len(blocks) * STEPS), 0.85), f"Drawing, step {step + 1} of {STEPS}")
            done += 1

        progress(0.0, "Reading the prompt")
        try:
            with loading.reporting(blocks, report):
                picture = pipe(
                    prompt=PROMPT.format(subject=subject),
                    height=self.size,
                    width=self.size,
                    num_inference_steps=STEPS,
                    guidance_scale=1.0,
                    generator=torch.Generator("cpu").manual_seed(seed),
                    output_type="np",
                ).images[0]
        finally:
            pipe.maybe_free_model_hooks()
        picture = np.clip(picture, 0, 1).astype(np.float32)
        progress(0.9, "", picture)
        return picture
