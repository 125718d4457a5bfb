"""MV-Adapter on SDXL, from one picture (Huang et al. 2024, "MV-Adapter: Multi-view Consistent Image Generation Made Easy"): six views of a
subject, 768 px, for smaller cards than video models need.

Facts from huanngzh/MV-Adapter: scripts/inference_i2mv_sdxl.py (azimuths, orthographic box of half width 0.55, reference at 0.9 of the frame
on mid grey, prompts, guidance 3, 50 steps, noise shifted by 8), utils/geometry.py (the cameras' six numbers), schedulers/ (the shift),
pipelines/pipeline_mvadapter_i2mv_sdxl.py (the condition encoder, the pass over the reference at time 0, guidance that withholds it).
Azimuths there are turned by -90 degrees into eyes (cos a, sin a, 0), z up: 0 looks from -Y and 90 from +X, as in `Orbit`.

The cameras are orthographic, and `Orbit` knows pinholes only: the lens is so long (`FOV`) that no point of the unit sphere is seen more
than 0.4 px off at 768 px. The six views are of the subject's own front, sides and back, as the model thinks they are (issue 42 there): none
of them is the picture's own view, so none is replaced by it, and the picture's height does not matter. They come in front of grey; here
they are cut out by that and put on white, and the other way round on the way in.

Departures: the solver is DPM-Solver++(2M), not Euler, so that 20 steps do; the reference's latent is the mode, not a sample.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline, T2IAdapter
from jaxtyping import Bool, Float
from safetensors.torch import load_file
from torch import Tensor

from backend.nets.mv_attention import install
from backend.progress import Progress, silent
from backend.views.orbit import Orbit
from protocol.errors import KilnError

from .frames import decode, encode, on_background, palette, stepwise
from .loading import index, part
from .matte import by_border, straight
from .memory import Place
from .sigmas import solve

FILE = "mvadapter_i2mv_sdxl.safetensors"
SIZE = 768
AZIMUTHS = (0.0, 45.0, 90.0, 180.0, 270.0, 315.0)
FOV = 0.2  # degrees
GREY = 0.5
FRAMED = 0.9  # share of the frame that the longer side of the reference fills
SHIFT = 8.0  # by which the signal-to-noise ratio is divided at the noisy end
PROMPT, NEGATIVE = "high quality", "watermark, ugly, deformed, noisy, blurry, low contrast"
ENCODER = {"in_channels": 6, "num_res_blocks": 2, "downscale_factor": 16, "adapter_type": "full_adapter_xl"}


class MVAdapter:
    """A `Turntable`. The pass over the reference, a sixth of an evaluation and one for all steps, is not counted."""

    model = "mv-adapter-sdxl"
    any_elevation = False
    azimuths = None  # the orbit has them
    guidance = 3.0
    views = len(AZIMUTHS)

    def __init__(self, pipe: StableDiffusionXLPipeline, encoder: T2IAdapter, place: Place, size: int = SIZE):
        """pipe: SDXL with MV-Adapter's attention in its UNet (`install`)."""
        self.pipe, self.encoder, self.place, self.size = pipe, encoder, place, size
        self.reference = next(part.reference for part in pipe.unet.attn_processors.values() if hasattr(part, "reference"))
        self.orbit = Orbit(np.array(AZIMUTHS), 0.0, FOV, 1 / math.sin(math.radians(FOV) / 2))
        self.evaluations = 0
        self._sigmas = shifted(pipe.scheduler.alphas_cumprod)
        if not place.offload:
            for network in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, encoder):
                network.to(place.device)

    def generate(
        self,
        picture: Float[np.ndarray, "h h 4"],
        prompt: str,
        orbit: Orbit | None,
        steps: int,
        guidance: float,
        seed: int,
        progress: Progress = silent,
    ) -> Float[np.ndarray, "n s s 3"]:
        """See `Turntable`."""
        return self._denoise(None, picture, prompt, steps, 1.0, guidance, seed, None, progress)

    def refine(
        self,
        frames: Float[np.ndarray, "n s s 3"],
        picture: Float[np.ndarray, "h h 4"],
        prompt: str,
        orbit: Orbit | None,
        steps: int,
        strength: float,
        guidance: float,
        seed: int,
        keep: Bool[np.ndarray, "n"] | None = None,
        progress: Progress = silent,
    ) -> Float[np.ndarray, "n s s 3"]:
        """See `Turntable`."""
        film = self._denoise(frames, picture, prompt, steps, strength, guidance, seed, keep, progress)
        if keep is not None:
            film[keep] = frames[keep]
        return film

    def _denoise(
        self,
        frames: Float[np.ndarray, "n s s 3"] | None,
        picture: Float[np.ndarray, "h h 4"],
        prompt: str,
        steps: int,
        strength: float,
        guidance: float,
        seed: int,
        keep: Bool[np.ndarray, "n"] | None,
        progress: Progress,
    ) -> Float[np.ndarray, "n s s 3"]:
        pipe, place = self.pipe, self.place
        unet, vae, device, dtype = pipe.unet, pipe.vae, place.device, place.dtype
        scale = vae.config.scaling_factor
        with place.at_work(pipe.text_encoder, pipe.text_encoder_2):
            text, no_text, pooled, no_pooled = pipe.encode_prompt(
                f"{prompt}, {PROMPT}" if prompt else PROMPT, device=device, negative_prompt=NEGATIVE, do_classifier_free_guidance=True
            )
        shown = framed(picture, self.size)
        with place.at_work(vae):
            given = encode(vae, shown[None], progress) * scale
            clean = None
            if frames is not None:
                clean = encode(vae, np.stack([_regrounded(frame, 1.0, GREY) for frame in frames]), progress) * scale
        preview = palette(given[0], shown)
        with place.at_work(self.encoder):
            cameras = rays(self.orbit).to(device, dtype)[:, :, None, None].expand(-1, -1, self.size, self.size)
            hints = self.encoder(cameras)
        sizes = torch.tensor([[self.size, self.size, 0, 0, self.size, self.size]], device=device, dtype=dtype)

        def run(noisy: Tensor, time: float, words: Tensor, pool: Tensor, hinted: bool = True) -> Tensor:
            count = len(noisy)
            return unet(
                noisy.to(dtype),
                torch.tensor(time, device=device),
                encoder_hidden_states=words.expand(count, -1, -1),
                added_cond_kwargs={"text_embeds": pool.expand(count, -1), "time_ids": sizes.expand(count, -1)},
                down_intrablock_additional_residuals=list(hints) if hinted else None,
                return_dict=False,
            )[0].float()

        def denoise(x: Tensor, level: float) -> Tensor:
            noisy = x / math.sqrt(level**2 + 1)
            time = float(np.interp(math.log(level), np.log(self._sigmas), np.arange(len(self._sigmas))))
            self.evaluations += 2 if guidance > 1 else 1
            noise = run(noisy, time, text, pooled)
            if guidance > 1:
                self.reference.blind = True
                free = run(noisy, time, no_text, no_pooled)
                self.reference.blind = False
                noise = free + guidance * (noise - free)
            return x - level * noise

        draw = torch.Generator().manual_seed(seed)
        start = clean if strength < 1 else None
        noise = torch.randn((self.views, *given.shape[1:]), generator=draw).to(device)
        held = None if keep is None else torch.tensor(keep, device=device)
        levels = ladder(self._sigmas, steps, strength)
        try:
            with place.at_work(unet), stepwise(unet, steps, 2 if guidance > 1 else 1, progress) as report:
                self.reference.looking = True
                run(given, 0.0, text, pooled, hinted=False)
                self.reference.looking = False
                latents = solve(
                    denoise, start, noise, levels, clean, held, lambda step, guess: report(step, preview(guess[step % self.views]))
                )
        finally:
            self.reference.seen.clear()
            self.reference.looking = self.reference.blind = False
        with place.at_work(vae):
            film = decode(vae, latents / scale, progress)
        return np.stack([_regrounded(frame, GREY, 1.0) for frame in film])


def load(file: Path, base: Path, vae: Path, place: Place, size: int | None = None, progress: Progress = silent) -> MVAdapter:
    """The generator out of MV-Adapter's `file`, SDXL's folder and its autoencoder's, all as they are published. KilnError "bad-weights"
    where the file does not fit the UNet in `base`."""
    parts: dict[str, Any] = {}
    for name, (library, kind) in index(base).items():
        progress(0.1 * len(parts), f"Load SDXL: {name.replace('_', ' ')}")
        if name == "vae":
            parts[name] = part(vae, "diffusers", "AutoencoderKL", place.dtype)  # SDXL's own overflows at half precision
        else:
            half = {"variant": "fp16"} if any((base / name).glob("*.fp16.safetensors")) else {}
            parts[name] = None if library is None else part(base / name, library, kind, place.dtype, **half)
    pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    progress(0.6, "Load MV-Adapter")
    install(pipe.unet)
    widths = pipe.unet.config.block_out_channels
    encoder = T2IAdapter(channels=[*widths, widths[-1]], **ENCODER)
    tensors = load_file(file)
    for network, ours in ((pipe.unet, "processor."), (encoder, "")):
        wanted = {name: tensor.shape for name, tensor in network.state_dict().items() if ours in name}
        found = {name: tensors.pop(name).to(place.dtype) for name in wanted if name in tensors}
        wrong = [name for name in wanted if name not in found or found[name].shape != wanted[name]]
        if wrong:
            hint = "Repair the weights: `kiln weights verify mv-adapter-sdxl`."
            raise KilnError("bad-weights", f"{file.name} does not fit SDXL: {len(wrong)} tensors, {wrong[0]} among them.", hint)
        network.load_state_dict(found, strict=False)
    for network in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, encoder):
        network.to(place.dtype).eval().requires_grad_(False)
    return MVAdapter(pipe, encoder, place, size or SIZE)


def shifted(kept: Float[Tensor, "t"]) -> Float[np.ndarray, "t"]:
    """Sigmas of a noise schedule, `kept` its cumulated alphas, whose signal-to-noise ratio is divided by `SHIFT` at the noisy end and less
    towards the clean one (schedulers/scheduling_shift_snr.py, "interpolated")."""
    kept_ = kept.double().numpy()
    ratio = np.log(kept_ / (1 - kept_)) - np.log(SHIFT) * np.linspace(0, 1, len(kept_))
    return np.exp(-ratio / 2)


def ladder(sigmas: Float[np.ndarray, "t"], steps: int, share: float) -> list[float]:
    """`steps` levels at equal steps of time, from `share` of it down, and 0."""
    times = (len(sigmas) - 1) * share * (1 - np.arange(steps) / steps)
    return [*np.exp(np.interp(times, np.arange(len(sigmas)), np.log(sigmas))).tolist(), 0.0]


def rays(orbit: Orbit) -> Float[Tensor, "v 6"]:
    """What the model is told of each orthographic camera, in [0, 1]: where it looks, and where it is, both as directions. Constant over
    the picture, for the rays are parallel."""
    eyes = np.stack([camera.centre for camera in orbit.cameras(1)])
    eyes /= np.linalg.norm(eyes, axis=1, keepdims=True)
    return torch.tensor((np.concatenate([-eyes, eyes], 1) + 1) / 2, dtype=torch.float32)


def framed(picture: Float[np.ndarray, "h h 4"], size: int) -> Float[np.ndarray, "s s 3"]:
    """The subject in the middle of a grey square of which its longer side fills 0.9; all of the picture if nothing is cut out."""
    seen = np.argwhere(picture[..., 3] > 1 / 255)
    if len(seen) == 0 or picture[..., 3].min() > 0.5:
        return on_background(picture, size, GREY)
    (top, left), (bottom, right) = seen.min(0), seen.max(0) + 1
    subject = picture[top:bottom, left:right]
    side = round(max(subject.shape[:2]) / FRAMED)
    square = np.zeros((side, side, 4), np.float32)
    down, across = (side - subject.shape[0]) // 2, (side - subject.shape[1]) // 2
    square[down : down + subject.shape[0], across : across + subject.shape[1]] = subject
    return on_background(square, size, GREY)


def _regrounded(frame: Float[np.ndarray, "s s 3"], behind: float, other: float) -> Float[np.ndarray, "s s 3"]:
    """The subject in front of the grey `behind`, in front of `other`; as it is where that cannot be told."""
    try:
        alpha = by_border(frame)
    except KilnError:
        return frame
    cover = alpha[..., None]
    return (straight(frame, alpha, np.full(3, behind)) * cover + other * (1 - cover)).astype(np.float32)
