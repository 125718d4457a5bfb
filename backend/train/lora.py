"""LoRA on a large turntable generator with turntables of the user's own assets: `kiln train turntable`.

Only what turns the subject learns (IM-3D, section 3.1 fine-tunes a video model, whose pictures are good already): the temporal layers of
the SVD family, where time has layers of its own, and the self-attention of Wan, where space and time are one. Turntables become latents
once, before the training, and what made them leaves the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backend import weights
from backend.diffusion import loading
from backend.progress import Progress, silent
from backend.train import turntables
from backend.train.turntable import Run, Settings, flow_loss
from protocol.errors import KilnError

FILE = "pytorch_lora_weights.safetensors"  # as diffusers names it
PROJECTIONS = r"(to_q|to_k|to_v|to_out\.0)"
TARGETS = {  # by the denoiser's class: the names of the layers that learn, and what diffusers calls the part
    "WanTransformer3DModel": ("transformer", rf"blocks\.\d+\.attn1\.{PROJECTIONS}"),
    "UNetSpatioTemporalConditionModel": ("unet", rf".*\.temporal_transformer_blocks\.\d+\.attn[12]\.{PROJECTIONS}"),
}
LOG_SIGMA = (
    0.7,
    1.6,
)  # mean and deviation of ln(sigma) in training (Blattmann et al. 2023, "Stable Video Diffusion", table 9: video at 576 pixels)


def targets(model: nn.Module) -> tuple[str, str]:
    """What diffusers calls this part of a pipeline, and the pattern of the layers that learn in it."""
    for kind in type(model).__mro__:
        if kind.__name__ in TARGETS:
            return TARGETS[kind.__name__]
    raise KilnError("bad-parameter", f"{type(model).__name__} cannot be trained on turntables.", "Choose a Wan model or SV3D.")


def add(model: nn.Module, rank: int, seed: int) -> dict[str, nn.Parameter]:
    """Puts LoRA layers of a rank into a denoiser and freezes the rest. Returns what learns, by name: float32, and at first adds nothing."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets(model)[1]), model)
    learning = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    for parameter in learning.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return learning


def save(model: nn.Module, folder: Path, values: dict[str, Tensor] | None = None) -> Path:
    """Writes the LoRA as diffusers' pipelines read it. values: by the names of `add`, in place of the model's own."""
    from peft import get_peft_model_state_dict

    state = model.state_dict()
    layers = get_peft_model_state_dict(model, state_dict={**state, **(values or {})})
    part = targets(model)[0]
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"{part}.{name}": tensor.float().contiguous().cpu() for name, tensor in layers.items()}, folder / FILE, {"format": "pt"})
    return folder / FILE


def load(model: nn.Module, file: Path) -> None:
    """Puts a saved LoRA into a fresh denoiser; of Wan's, diffusers' `load_lora_weights` does the same."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    part, pattern = targets(model)
    layers = {name.removeprefix(f"{part}."): tensor for name, tensor in load_file(file).items()}
    rank = next(tensor.shape[0] for name, tensor in layers.items() if name.endswith("lora_A.weight"))
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern), model)
    set_peft_model_state_dict(model, layers)


# -- Courses: what one family's training step is ---------------------------------------------------------------------------------------


@dataclass
class Course:
    """A model in training. denoiser: the part that learns. loss(clips, rng): of clips as `encode` made them. show(turntable): frames that
    the model makes of a turntable's first view now."""

    denoiser: nn.Module
    frames: int
    size: int
    encode: Callable[[turntables.Turntable, int], dict[str, Tensor]]
    loss: Callable[[dict[str, Tensor], torch.Generator], Tensor]
    show: Callable[[turntables.Turntable], Float[np.ndarray, "n s s 3"]]
    settle: Callable[[], None] = lambda: None


def wan_course(generator: Any, prompt: str, shift: float) -> Course:
    """Of a WanTurntable (diffusion/wan.py). prompt: what all the turntables show."""
    transformer = generator.pipe.transformer

    def encode(turn: turntables.Turntable, first: int) -> dict[str, Tensor]:
        frames = turn.from_view(first, generator.views, generator.size)
        with torch.no_grad():
            clip = {
                "clean": generator._encode(frames, lambda done: None),
                "condition": generator._condition(frames[0], lambda done: None),
                "text": generator._embed(generator._prompt(prompt)),
            }
            if transformer.config.image_dim is not None:
                shown = Image.fromarray((frames[0] * 255 + 0.5).astype(np.uint8))
                clip["image"] = generator.pipe.encode_image(shown, generator.pipe._execution_device)
        return {name: value[0].cpu() for name, value in clip.items()}

    def loss(clips: dict[str, Tensor], rng: torch.Generator) -> Tensor:
        first = next(transformer.parameters())

        def denoise(latents, times, text, return_dict):
            image = clips["image"].to(first) if "image" in clips else None
            with torch.autocast(first.device.type, torch.bfloat16, enabled=first.device.type == "cuda"):
                return transformer(latents.to(first.dtype), times, text.to(first), image, return_dict=return_dict)

        clean, condition = (clips[name].to(first.device) for name in ("clean", "condition"))
        return flow_loss(denoise, clean, condition, clips["text"], shift, rng)

    def show(turn: turntables.Turntable) -> np.ndarray:
        given = np.concatenate([turn.frames[0], np.ones((*turn.frames[0].shape[:2], 1), np.float32)], 2)
        return generator.generate(given, prompt, None, 12, generator.guidance, 0)

    return Course(transformer, generator.views, generator.size, encode, loss, show)


def sv3d_course(generator: Any, steps: int = 12) -> Course:
    """Of an SV3D (diffusion/sv3d.py): velocity of a clip whose noise grows without bounds, as Stable Video Diffusion was trained.
    steps: of sample pictures."""
    from backend.diffusion.frames import encode as latents_of
    from backend.diffusion.sv3d import AUGMENTATION, _for_clip

    unet, vae, clip = generator.unet, generator.vae, generator.clip

    def encode(turn: turntables.Turntable, first: int) -> dict[str, Tensor]:
        frames = turn.from_view(first, generator.views + 1, generator.size)[:-1]
        with generator.place.at_work(vae, clip):
            given = latents_of(vae, frames[:1], silent)
            clean = latents_of(vae, np.roll(frames, -1, 0), silent) * vae.config.scaling_factor
            seen = clip(_for_clip(frames[0], clip.config.image_size).to(generator.place.device, generator.place.dtype)).image_embeds
        azimuth = torch.tensor(np.radians(np.roll(np.arange(generator.views) * 360 / generator.views, -1)), dtype=torch.float32)
        polar = torch.full_like(azimuth, math.radians(90 - turn.orbit.elevation))
        return {"clean": clean.cpu(), "given": given[0].cpu(), "seen": seen.cpu(), "azimuth": azimuth, "polar": polar}

    def loss(clips: dict[str, Tensor], rng: torch.Generator) -> Tensor:
        first = next(unet.parameters())
        total = torch.zeros((), device=first.device)
        count = len(clips["clean"])
        for index in range(count):  # one noise level at a time: the network takes one
            one = {name: value[index].to(first.device) for name, value in clips.items()}
            sigma = math.exp(LOG_SIGMA[0] + LOG_SIGMA[1] * torch.randn((), generator=rng).item())
            clean = one["clean"].float()
            noise = torch.randn(clean.shape, generator=rng).to(clean)
            scale = math.sqrt(sigma**2 + 1)
            sample = torch.cat([(clean + sigma * noise) / scale, one["given"].float().expand_as(clean)], 1).to(first.dtype)
            time = torch.tensor(math.log(sigma) / 4, device=first.device)
            augmentation = torch.full_like(one["azimuth"], AUGMENTATION)[None]
            said = unet(sample[None], time, one["seen"][None].to(first.dtype), augmentation, one["polar"][None], one["azimuth"][None])[0]
            total = (
                total + (said.float() - (noise - sigma * clean) / scale).square().mean()
            )  # v of x / scale, whose noise share is sigma / scale
        return total / count

    def show(turn: turntables.Turntable) -> np.ndarray:
        given = np.concatenate([turn.frames[0], np.ones((*turn.frames[0].shape[:2], 1), np.float32)], 2)
        return generator.generate(given, "", None, steps, generator.guidance, 0)

    return Course(unet, generator.views, generator.size, encode, loss, show)


def train(
    course: Course,
    turns: list[turntables.Turntable],
    out: Path,
    settings: Settings,
    rank: int = 16,
    starts: int = 4,
    progress: Progress = silent,
) -> Path:
    """Fine-tunes on turntables, each seen from `starts` of its views as the first one, and returns the LoRA's file (its running average).
    In the folder: state.pt to go on from, log.jsonl, sample pictures of the first turntables, true above, made below."""
    needed = course.frames - 1
    for turn in turns:
        if len(turn.frames) < min(needed, 8):
            raise KilnError("bad-input", f"{turn.name} has {len(turn.frames)} views.", f"The model makes {course.frames} frames of a turn.")
    clips = []
    for number, turn in enumerate(turns):
        for start in range(starts):
            progress(0.1 * (number + start / starts) / len(turns), f"Encoding {turn.name}")
            clips.append(course.encode(turn, start * len(turn.frames) // starts))
    learning = add(course.denoiser, rank, settings.seed)
    if hasattr(course.denoiser, "enable_gradient_checkpointing") and next(course.denoiser.parameters()).is_cuda:
        course.denoiser.enable_gradient_checkpointing()
    course.denoiser.train()
    course.settle()
    run = Run(out, learning, [torch.optim.AdamW(learning.values(), settings.rate, weight_decay=1e-2)], settings)

    def loss(rng: torch.Generator) -> Tensor:
        chosen = [clips[k] for k in torch.randint(len(clips), (settings.batch,), generator=rng).tolist()]
        return course.loss({name: torch.stack([clip[name] for clip in chosen]) for name in chosen[0]}, rng)

    def show(step: int) -> None:
        save(course.denoiser, out, run.average)
        with run.averaged(), torch.no_grad():
            course.denoiser.eval()
            rows = []
            for turn in turns[:2]:
                true = turn.from_view(0, course.frames, course.size)
                rows += [true, course.show(turn)]
            course.denoiser.train()
        sheet(rows, out / f"sample-{step:06d}.png")

    def told(fraction: float, text: str = "", preview: np.ndarray | None = None) -> None:
        progress(0.1 + 0.9 * fraction, text, preview)

    run.train(loss, show, told)
    return save(course.denoiser, out, run.average)


def sheet(rows: list[Float[np.ndarray, "n s s 3"]], path: Path, most: int = 17) -> None:
    """Clips as rows of a picture, of long ones every so manieth frame."""
    lines = [np.concatenate(list(row[:: math.ceil(len(row) / most)]), 1) for row in rows]
    Image.fromarray((np.concatenate(lines).clip(0, 1) * 255 + 0.5).astype(np.uint8)).save(path)


def fine_tune(
    model: str,
    folders: list[Path],
    out: Path,
    settings: Settings,
    rank: int = 16,
    prompt: str = "",
    progress: Progress = silent,
) -> Path:
    """`kiln train turntable`: the registry's generator `model` on folders of views. Raises KilnError: bad-input for folders that hold no
    turntable, no-weights, out-of-memory, bad-parameter for a model that this cannot train."""
    turns = [turntables.read(folder) for folder in folders]
    if not turns:
        raise KilnError("bad-input", "There is no turntable to learn from.", "Give one or more folders of views.")
    one = weights.entry(model)
    if one.loader not in ("tiny", "wan", "wan-lora", "sv3d"):
        raise KilnError("bad-parameter", f"{one.title} cannot be trained on turntables.", "Choose a Wan model or SV3D.")
    with loading.loaded(model, progress) as generator:
        course = sv3d_course(generator) if one.loader == "sv3d" else wan_course(generator, prompt, generator.spec.flow_shift or 3.0)
        return train(course, turns, out, settings, rank, progress=progress)
