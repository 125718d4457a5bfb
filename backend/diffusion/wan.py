"""Turntables by Wan image-to-video models (Wan 2.1, Apache-2.0), with or without a LoRA that turns the camera once around the subject.

The parts are those of diffusers' WanImageToVideoPipeline; the denoising loop is ours, because the pipeline cannot start in the middle of
its schedule (IM-3D, section 3.4) nor keep known frames. Latents are normalised by the VAE's mean and deviation, and a flow model predicts
noise - x0, so that x_sigma = (1 - sigma) x0 + sigma noise. Nobody knows the cameras of these frames: they are estimated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline
from jaxtyping import Bool, Float
from PIL import Image

from backend import weights
from backend.diffusion import loading
from backend.diffusion.frames import on_background
from backend.progress import Progress, silent
from backend.views.orbit import Orbit
from protocol.errors import KilnError

PREVIEWS = 6  # of one run
MOST_WORDS = 512  # tokens of a prompt, as Wan was trained
AGAINST = (
    "blurry, low quality, JPEG artifacts, deformed, the object moves, the object changes its shape, still picture, cut, text, subtitles, "
    "cluttered background, shadows on the background"
)


@dataclass(frozen=True)
class Spec:
    """What the weights' own files do not say. frames: of one turn, the last closes it. size: pixels. guidance: at most 1 is none.
    flow_shift: None is the scheduler's own. prompt: with {subject}. scale: of the LoRA. even: the frames are known to be equal steps.
    again: most steps in which frames are refined."""

    frames: int
    size: int
    guidance: float
    flow_shift: float | None = None
    prompt: str = "{subject}"
    against: str = ""
    scale: float = 1.0
    even: bool = False
    again: int = 100


SPECS = {
    # 81 frames at 480 pixels are what the model was trained on.
    "wan2.1-i2v-14b-480p": Spec(
        81, 480, 5.0, 3.0, "The camera turns once around {subject}, which stands still on a plain white background.", AGAINST
    ),
    # Trigger words, scale 1, guidance 6 and shift 5: the model card.
    "wan2.1-orbit-lora": Spec(
        81,
        480,
        6.0,
        5.0,
        "The video shows {subject} on a plain white background. The camera performs a 0rb4it 360 degree orbit around {subject}.",
        AGAINST,
    ),
    # train/tiny.py. What lies under the noise it knows better on average, which is what one step says, than as any one clip.
    "kiln-tiny-turntable": Spec(17, 64, 1.0, even=True, again=1),
}


class WanTurntable:
    """A Wan model, ready to run: the interface `Turntable`. lora: the entry and the scale of the LoRA that is in it."""

    orbit: Orbit | None = None
    any_elevation = False

    def __init__(self, model: str, pipe: WanImageToVideoPipeline, spec: Spec, lora: tuple[str, float] | None = None, previews: bool = True):
        self.model, self.pipe, self.spec, self.lora, self.previews = model, pipe, spec, lora, previews
        self.views, self.size, self.guidance = spec.frames, spec.size, spec.guidance
        self.azimuths = np.linspace(0, 360, spec.frames) if spec.even else None
        self.evaluations = 0
        self._words: dict[str, torch.Tensor] = {}  # of prompts: the rounds of one asset ask for the same
        config = pipe.vae.config
        self._step = config.scale_factor_temporal  # frames of a latent frame, but of the first, which is one
        self._mean, self._std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
        multiple = config.scale_factor_spatial * pipe.transformer.config.patch_size[1]
        if (spec.frames - 1) % self._step or (spec.frames - 1) % 4 or spec.size % multiple:
            raise ValueError(
                f"{spec.frames} frames of {spec.size} pixels do not fit into latents of {self._step} frames, {multiple} pixels"
            )

    @classmethod
    def open(cls, id: str, device: str, plan: weights.Plan, progress: Progress = silent, lora: Path | None = None) -> WanTurntable:
        """Loads an entry of class wan or tiny, or a LoRA together with the model that it needs. lora: a file of the user's own. LoRAs
        become part of the weights."""
        one = weights.entry(id)
        is_lora = one.loader == "wan-lora"
        base = weights.entry(one.needs[0]) if is_lora else one
        # The VAE loses visibly at half precision, and is small.
        parts = loading.components(weights.folder(base.id), {"": loading.dtype(plan), "vae": torch.float32}, progress)
        try:
            pipe = WanImageToVideoPipeline(**{"text_encoder": None, "tokenizer": None, **parts})
        except TypeError as error:
            raise KilnError(
                "bad-weights", f"{base.title} is no image-to-video model of Wan's: {error}.", "Use weights of the registry."
            ) from None
        spec = SPECS.get(one.id) or SPECS[base.id]
        if is_lora:
            progress(0.95, "Loading the LoRA")
            _fuse(pipe, _only_file(weights.folder(one.id)), spec.scale)
        if lora is not None:
            progress(0.97, "Loading the user's LoRA")
            _fuse(pipe, lora, 1.0)
        stays = loading.settle(pipe, device, plan, "transformer")
        if device != "cpu" and (plan.offload or plan.precision == "fp8"):
            pipe.vae.enable_tiling()
        return cls(one.id, pipe, spec, (one.id, spec.scale) if is_lora else None, previews=stays)

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
        return self._run(picture, prompt, steps, 1.0, guidance, seed, None, np.zeros(self.views, bool), progress)

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
        keep = np.zeros(self.views, bool) if keep is None else keep
        steps = min(steps, self.spec.again) if strength < 1 else steps
        return self._run(picture, prompt, steps, strength, guidance, seed, frames, keep, progress)

    @torch.no_grad()
    def _run(
        self,
        picture: Float[np.ndarray, "h h 4"],
        prompt: str,
        steps: int,
        strength: float,
        guidance: float,
        seed: int,
        frames: Float[np.ndarray, "n s s 3"] | None,
        keep: Bool[np.ndarray, "n"],
        progress: Progress,
    ) -> Float[np.ndarray, "n s s 3"]:
        if frames is not None and frames.shape != (self.views, self.size, self.size, 3):
            raise ValueError(f"frames of {frames.shape}")
        try:
            first = on_background(picture, self.size)
            noise = self._noise(seed)
            known = None
            if frames is not None and (strength < 1 or keep.any()):
                frames = frames.copy()
                frames[0] = first  # the input view stays the input
                known = self._encode(frames, lambda done: progress(0.04 * done, "Encoding the views"))
            condition = self._condition(first, lambda done: progress(0.04 + 0.04 * done, "Encoding the picture"))
            latents = self._denoise(noise, condition, first, prompt, steps, strength, guidance, known, keep, _part(progress, 0.08, 0.9))
            made = self._decode(latents, lambda done: progress(0.9 + 0.1 * done, "Decoding the views"))
        finally:
            self.pipe.maybe_free_model_hooks()
        made[0] = first
        if frames is not None:
            made[keep] = frames[keep]
        return made

    def _denoise(
        self,
        noise: torch.Tensor,
        condition: torch.Tensor,
        first: Float[np.ndarray, "s s 3"],
        prompt: str,
        steps: int,
        strength: float,
        guidance: float,
        known: torch.Tensor | None,
        keep: Bool[np.ndarray, "n"],
        progress: Progress = silent,
    ) -> torch.Tensor:
        """Latents [1 c t h w] after `steps` steps from the share `strength` of the schedule on. known: latents of given frames, of which
        `strength` < 1 starts; of frames to keep they are put back, with the noise that is due, before every step."""
        pipe, device = self.pipe, self.pipe._execution_device
        transformer = pipe.transformer
        progress(0.0, "Reading the prompt")
        dtype = transformer.patch_embedding.weight.dtype  # layers that are kept as fp8 compute in this type too
        wanted = self._embed(self._prompt(prompt)).to(device, dtype)
        against = self._embed(self.spec.against).to(device, dtype) if guidance > 1 else None
        image = None
        if transformer.config.image_dim is not None:
            image = pipe.encode_image(Image.fromarray((first * 255 + 0.5).astype(np.uint8)), device).to(device, dtype)
        scheduler = self._schedule(steps, strength)
        noise, condition = noise.to(device), condition.to(device)
        known = None if known is None else known.to(device)
        held = self._latent_frames(keep) if known is not None else np.zeros(noise.shape[2], bool)
        sigmas = scheduler.sigmas.tolist()
        latents = noise
        if known is not None and strength < 1:
            latents = (1 - sigmas[0]) * known + sigmas[0] * noise
        evaluations = steps * (1 if against is None else 2)
        begun = self.evaluations
        blocks = len(transformer.blocks)
        at = 0  # blocks that have begun

        def report() -> None:
            nonlocal at
            done = self.evaluations - begun
            progress(min(1.0, (done + (at % blocks) / blocks) / evaluations), f"Step {done * steps // evaluations + 1} of {steps}")
            at += 1

        with loading.reporting(list(transformer.blocks), report):
            for number, timestep in enumerate(scheduler.timesteps.to(device)):
                if held.any():
                    latents[:, :, held] = (1 - sigmas[number]) * known[:, :, held] + sigmas[number] * noise[:, :, held]
                given = torch.cat([latents, condition], 1).to(dtype)
                flow = self._evaluate(given, timestep, wanted, image)
                if against is not None:
                    away = self._evaluate(given, timestep, against, image)
                    flow = away + guidance * (flow - away)
                if self.previews and number and number % max(1, steps // PREVIEWS) == 0:
                    guess = latents - sigmas[number] * flow
                    progress((self.evaluations - begun) / evaluations, f"Step {number + 1} of {steps}", self._preview(guess))
                latents = scheduler.step(flow, timestep, latents, return_dict=False)[0]
        if held.any():
            latents[:, :, held] = known[:, :, held]
        return latents

    def _evaluate(self, latents: torch.Tensor, timestep: torch.Tensor, words: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
        flow = self.pipe.transformer(
            hidden_states=latents,
            timestep=timestep.expand(1),
            encoder_hidden_states=words,
            encoder_hidden_states_image=image,
            return_dict=False,
        )[0]
        self.evaluations += 1
        return flow

    def _schedule(self, steps: int, strength: float) -> UniPCMultistepScheduler:
        """`steps` steps from the share `strength` of the noise schedule down to none, spaced as the whole schedule is."""
        config = self.pipe.scheduler.config
        shift = self.spec.flow_shift or config.get("flow_shift") or config.get("shift") or 1.0
        train = config.get("num_train_timesteps", 1000)
        scheduler = UniPCMultistepScheduler(
            num_train_timesteps=train,
            solver_order=config.get("solver_order", 2),
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
        )
        scheduler.set_timesteps(sigmas=np.linspace(strength, min(1 / train, strength / (steps + 1)), steps + 1)[:-1])
        scheduler.set_begin_index(0)
        return scheduler

    # -- What the model is told ------------------------------------------------------------------------------------------------------

    def _prompt(self, subject: str) -> str:
        return self.spec.prompt.format(subject=" ".join(subject.split()).rstrip(".") or "a single object")

    def _embed(self, text: str) -> torch.Tensor:
        """[1 512 d]: the words' embedding, zeros behind them; one token of zeros where the model reads no text."""
        pipe = self.pipe
        if pipe.text_encoder is None:
            return torch.zeros(1, 1, pipe.transformer.config.text_dim)
        if text not in self._words:
            tokens = pipe.tokenizer(text, padding="max_length", max_length=MOST_WORDS, truncation=True, return_tensors="pt")
            device = pipe._execution_device
            mask = tokens.attention_mask.to(device)
            told = pipe.text_encoder(tokens.input_ids.to(device), mask).last_hidden_state
            self._words[text] = (told * mask[..., None].to(told.dtype)).cpu()
        return self._words[text]

    def _condition(self, first: Float[np.ndarray, "s s 3"], report: Any) -> torch.Tensor:
        """[1 m+c t h w]: which frames are given, m frames to a latent one, and latents of the first frame with grey behind it."""
        video = np.full((self.views, self.size, self.size, 3), 0.5, np.float32)
        video[0] = first
        latents = self._encode(video, report)
        given = torch.zeros(1, self._step, *latents.shape[2:])
        given[:, :, 0] = 1
        return torch.cat([given.to(latents), latents], 1)

    # -- Latents ---------------------------------------------------------------------------------------------------------------------

    def _noise(self, seed: int) -> torch.Tensor:
        """Made on the CPU: one seed is one noise on every device."""
        config = self.pipe.vae.config
        side = self.size // config.scale_factor_spatial
        shape = (1, config.z_dim, (self.views - 1) // self._step + 1, side, side)
        return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))

    def _latent_frames(self, keep: Bool[np.ndarray, "n"]) -> Bool[np.ndarray, "t"]:
        """Which latent frames hold frames to keep alone."""
        return np.concatenate([keep[:1], keep[1:].reshape(-1, self._step).all(1)])

    def _encode(self, frames: Float[np.ndarray, "n s s 3"], report: Any) -> torch.Tensor:
        vae = self.pipe.vae
        video = torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)[None] * 2 - 1
        with loading.reporting([vae.encoder], _counted(report, 1 + (self.views - 1) // 4)):
            latents = vae.encode(video.to(self.pipe._execution_device, vae.dtype)).latent_dist.mode().float()
        return (latents - self._mean.to(latents)) / self._std.to(latents)

    def _decode(self, latents: torch.Tensor, report: Any) -> Float[np.ndarray, "n s s 3"]:
        vae = self.pipe.vae
        latents = latents.float() * self._std.to(latents.device) + self._mean.to(latents.device)
        with loading.reporting([vae.decoder], _counted(report, latents.shape[2])):
            video = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
        return (video[0].permute(1, 2, 3, 0).cpu().numpy() + 1) / 2

    def _preview(self, latents: torch.Tensor) -> Float[np.ndarray, "h w 3"]:
        """Four of the views, decoded one by one as if each were a video's first frame: rough, and quick."""
        count = latents.shape[2]
        some = torch.cat([latents[:, :, at : at + 1] for at in (0, count // 4, count // 2, 3 * count // 4)])
        vae = self.pipe.vae
        some = some.float() * self._std.to(some.device) + self._mean.to(some.device)
        views = vae.decode(some.to(vae.dtype), return_dict=False)[0].float()[:, :, 0].permute(0, 2, 3, 1).cpu().numpy()
        return np.concatenate(list((views + 1) / 2), 1)


def _only_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise KilnError("bad-weights", f"{folder} holds {len(files)} files of weights, not one LoRA.", "Download it again.")
    return files[0]


def _fuse(pipe: WanImageToVideoPipeline, file: Path, scale: float) -> None:
    """Adds a LoRA, of any tool's naming that diffusers knows, to the weights: then it costs nothing, and fp8 and offload need not know of
    it. diffusers only logs which of its layers the model does not have; here all have to fit."""
    layers = loading.tensors(file)
    count = sum(name.endswith((".lora_A.weight", ".lora_down.weight", ".lora.down.weight")) for name in layers)
    try:
        pipe.load_lora_weights(layers, adapter_name="turn")
        found = sum("lora_A" in name for name in pipe.transformer.state_dict())
        if found < max(count, 1):
            raise ValueError(f"{found} of its {count} layers are the model's.")
        pipe.fuse_lora(components=["transformer"], lora_scale=scale, adapter_names=["turn"])
    except (ValueError, KeyError, RuntimeError) as error:
        text = str(error).strip().partition("\n")[0][:300]
        raise KilnError("bad-weights", f"{file.name} does not fit its model: {text}", "Use a LoRA of this very model.") from error
    pipe.unload_lora_weights()


def _part(progress: Progress, start: float, end: float) -> Progress:
    def report(fraction: float, text: str = "", preview: np.ndarray | None = None) -> None:
        progress(start + (end - start) * fraction, text, preview)

    return report


def _counted(report: Any, count: int) -> Any:
    calls = 0

    def step() -> None:
        nonlocal calls
        report(min(1.0, calls / count))
        calls += 1

    return step
