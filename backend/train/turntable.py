"""Training of turntable generators: one loop for the small model from nothing (tiny.py) and for LoRA on large ones (lora.py).

Wan learns by flow matching: between a clip's latents and noise runs a straight line, and the network says its direction. The paper
(IM-3D, section 3.1 and A.1) fine-tunes its generator on turntables with the generator's own loss; so do we.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float

from backend.progress import Progress, silent


@dataclass(frozen=True)
class Settings:
    """steps: of the optimizer. batch: turntables a step. rate: AdamW's learning rate, and Muon's scaled to it. warmup: steps until the full
    rate; cooldown: share of the steps at the end over which it falls to nothing. shift: how far noise levels lean to the noisy end (Wan's
    flow shift). ema: of the weights that are kept. save, show: steps between checkpoints and between sample pictures."""

    steps: int
    batch: int
    rate: float
    warmup: int = 100
    cooldown: float = 0.3
    shift: float = 2.0
    ema: float = 0.998
    clip: float = 1.0
    seed: int = 0
    log: int = 20
    save: int = 200
    show: int = 400


def flow_loss(
    model,
    clean: Float[torch.Tensor, "b z t h w"],
    condition: Float[torch.Tensor, "b c t h w"],
    text: Float[torch.Tensor, "b n d"],
    shift: float,
    rng,
) -> torch.Tensor:
    """Rectified flow with logit-normal noise levels, as Wan: x = (1 - s) clean + s noise, and the network says noise - clean."""
    noise = torch.randn(clean.shape, generator=rng).to(clean)
    level = torch.sigmoid(torch.randn(len(clean), generator=rng))
    level = (shift * level / (1 + (shift - 1) * level)).to(clean)
    s = level[:, None, None, None, None]
    said = model(torch.cat([(1 - s) * clean + s * noise, condition], 1), level * 1000, text, return_dict=False)[0]
    return (said.float() - (noise - clean).float()).square().mean()


def again_loss(
    model,
    clean: Float[torch.Tensor, "b z t h w"],
    condition: Float[torch.Tensor, "b c t h w"],
    text: Float[torch.Tensor, "b n d"],
    shift: float,
    rng,
) -> torch.Tensor:
    """From noised clips of the model's own back to the true ones, as squared error of what is said to be clean.

    Where a turntable goes back to the model (IM-3D, section 3.4), and in every step of sampling but the first, it sees noised pictures of
    its own making; trained on noised truth alone it takes their faults for the subject's. So here what it makes of the given frame in one
    to three steps is noised, by 0.35 to 0.9 of the way, at times with the noise that it was made of."""
    begun = torch.randn(clean.shape, generator=rng).to(clean)
    steps = (1, 1, 2, 3)[int(torch.randint(4, (1,), generator=rng))]
    levels = [1 - step / steps for step in range(steps + 1)]
    levels = [shift * level / (1 + (shift - 1) * level) for level in levels]
    own = begun
    with torch.no_grad():
        for level, after in zip(levels, levels[1:], strict=False):
            times = torch.full((len(clean),), level * 1000).to(clean)
            own = own + (after - level) * model(torch.cat([own, condition], 1), times, text, return_dict=False)[0].float()
    own[:, :, 0] = clean[:, :, 0]
    fresh = torch.randn(clean.shape, generator=rng).to(clean)
    noise = begun if torch.rand((), generator=rng) < 0.3 else fresh
    level = (0.35 + 0.55 * torch.rand(len(clean), generator=rng)).to(clean)
    s = level[:, None, None, None, None]
    noisy = (1 - s) * own + s * noise
    said = model(torch.cat([noisy, condition], 1), level * 1000, text, return_dict=False)[0]
    return 1.5 * (noisy - s * said.float() - clean).square().mean()


def first_frame_condition(
    clean: Float[torch.Tensor, "b z t h w"], empty: Float[torch.Tensor, "z h w"], factor: int = 1
) -> Float[torch.Tensor, "b c t h w"]:
    """What Wan's pipeline appends for an autoencoder that codes frames by themselves: a mask of `factor` channels, the first frame's
    latents, and the latents of grey for the others."""
    condition = empty[None, :, None].to(clean).expand(clean.shape).clone()
    condition[:, :, 0] = clean[:, :, 0]
    mask = torch.zeros(len(clean), factor, *clean.shape[2:]).to(clean)
    mask[:, :, 0] = 1
    return torch.cat([mask, condition], 1)


class Run:
    """A training run in a folder: `state.pt` to go on from, `log.jsonl`, and sample pictures by whoever calls.

    parameters: by name, those that learn. loss(rng) -> a scalar that has gradients; it draws all its chances from the torch generator it is
    given, which is kept with the checkpoint: a run that was stopped and resumed ends in the same bits as one that was not.
    """

    def __init__(
        self, folder: Path, parameters: dict[str, torch.nn.Parameter], optimizers: Iterable[torch.optim.Optimizer], settings: Settings
    ):
        self.folder, self.parameters, self.optimizers, self.settings = Path(folder), parameters, list(optimizers), settings
        self.folder.mkdir(parents=True, exist_ok=True)
        self.step, self.seconds = 0, 0.0
        self.rng = torch.Generator().manual_seed(settings.seed)
        self.average = {name: value.detach().clone() for name, value in parameters.items()}
        if (self.folder / "state.pt").exists():
            self._load()

    def train(
        self, loss: Callable[[torch.Generator], torch.Tensor], show: Callable[[int], None] | None = None, progress: Progress = silent
    ):
        settings, began, total, count = self.settings, time.monotonic() - self.seconds, 0.0, 0
        while self.step < settings.steps:
            rate = settings.rate * rate_share(self.step, settings)
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
                for group in optimizer.param_groups:
                    group["lr"] = rate
            value = loss(self.rng)
            value.backward()
            norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), settings.clip)
            for optimizer in self.optimizers:
                optimizer.step()
            self.step += 1
            keep = min(settings.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                averages, now = list(self.average.values()), [p.detach() for p in self.parameters.values()]
                torch._foreach_lerp_(averages, now, 1 - keep)
            total, count, self.seconds = total + value.item(), count + 1, time.monotonic() - began
            if self.step % settings.log == 0 or self.step == settings.steps:
                self.log({"step": self.step, "loss": total / count, "norm": norm.item(), "rate": rate, "seconds": self.seconds})
                total, count = 0.0, 0
            progress(self.step / settings.steps, f"step {self.step} of {settings.steps}")
            if self.step % settings.save == 0 or self.step == settings.steps:
                self.save()
            if show is not None and (self.step % settings.show == 0 or self.step == settings.steps):
                show(self.step)

    @contextmanager
    def averaged(self):
        """Within, the parameters are their running averages."""
        kept = {name: value.detach().clone() for name, value in self.parameters.items()}
        try:
            self._set(self.average)
            yield
        finally:
            self._set(kept)

    def _set(self, values: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def log(self, figures: dict) -> None:
        with open(self.folder / "log.jsonl", "a") as out:
            out.write(json.dumps(figures) + "\n")

    def save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "settings": asdict(self.settings),
            "rng": self.rng.get_state(),
            "average": self.average,
            "parameters": {name: value.detach() for name, value in self.parameters.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, self.folder / "state.part")
        os.replace(self.folder / "state.part", self.folder / "state.pt")

    def _load(self) -> None:
        state = torch.load(self.folder / "state.pt", weights_only=True)
        self.step, self.seconds, self.average = state["step"], state["seconds"], state["average"]
        self.rng.set_state(state["rng"])
        self._set(state["parameters"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def rate_share(step: int, settings: Settings) -> float:
    """Warm-up, a plateau, and a straight way down: a run can be stopped on the plateau and brought to its end later."""
    left = (settings.steps - step) / max(1.0, settings.steps * settings.cooldown)
    return min(1.0, (step + 1) / settings.warmup, left)
