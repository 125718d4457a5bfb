"""Stable Video 3D, the variant with poses (SV3D_p; Voleti et al. 2024, "SV3D: Novel Multi-view Synthesis and 3D Generation from a Single
Image using Latent Video Diffusion"): 21 views at exact cameras.

Facts from Stability-AI/generative-models: scripts/sampling/simple_video_sample.py (azimuths of 21 equal steps of which the last is the
input view, polar = 90 - elevation, augmentation 1e-5, the last frame is replaced by the picture, 50 steps),
scripts/sampling/configs/sv3d_p.yaml (preconditioning, sigmas 0.002 to 700, triangular guidance 1 to 2.5, encoders, first stage), issue 342
(lens 33.8 degrees, distance 2). The direction of the turn is that of scripts/demo/sv3d_helpers.py, plot_3D: the eye is at (cos e cos a,
cos e sin a, sin e), z up; so a growing azimuth takes the camera to its own right, as in `Orbit`, whose azimuths these are.

Departures. The solver is DPM-Solver++(2M), not Euler, so that 20 steps do. Frames are decoded by the image autoencoder that the file holds
for the conditioning (`conditioner.embedders.1.encoder`), as ComfyUI and chenguolin/sv3d-diffusers do, frame by frame; the first stage's
decoder is left out (the configuration calls it temporal, the size of the file says that it is none). Frames are handed out in order of
azimuth, the picture's own first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Bool, Float
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from backend.nets.sv3d_unet import PUBLISHED, SV3DUNet, clip_tensors, unet_name, vae_name
from backend.progress import Progress, silent
from backend.views.orbit import Orbit
from protocol.errors import KilnError

from .frames import decode, encode, on_background, palette, stepwise
from .loading import fuse
from .memory import Place
from .sigmas import karras, solve

FILE = "sv3d_p.safetensors"
ELEVATION, FOV = 10.0, 33.8  # degrees; the height is the sample script's and only a default
AUGMENTATION = 1e-5  # of noise on the picture in [-1, 1]
LOW, HIGH = 0.002, 700.0  # sigmas
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's, which open_clip keeps


@dataclass(frozen=True)
class Parts:
    """Configurations of the networks in the file, which has none of its own."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    clip: dict[str, Any]


# sv3d_p.yaml's autoencoder (ch 128, ch_mult 1 2 4 4, two blocks a level, 4 channels), and open_clip's ViT-H-14 (its model_configs).
AS_PUBLISHED = Parts(
    PUBLISHED,
    {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
        "sample_size": 576,
    },
    {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
)

_UNET, _VAE, _CLIP = "model.diffusion_model.", "conditioner.embedders.1.encoder.", "conditioner.embedders.0.open_clip.model.visual."
# What else is in the file is not read: the first stage (see above), and open_clip's text side, which its image encoder carries along.


class SV3D:
    """A `Turntable`."""

    model = "sv3d-p"
    any_elevation = True
    azimuths = None  # the orbit has them
    guidance = 2.5  # at the view opposite to the picture; 1 at the picture's own

    def __init__(self, unet: SV3DUNet, vae: AutoencoderKL, clip: CLIPVisionModelWithProjection, place: Place):
        self.unet, self.vae, self.clip, self.place = unet, vae, clip, place
        self.views = unet.config.num_frames
        self.size = unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
        self.orbit = Orbit.turn(self.views, ELEVATION, FOV)
        self.evaluations = 0
        if not place.offload:
            for network in (unet, vae, clip):
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
        """See `Turntable`. The prompt is not used: the model knows pictures only."""
        shown = on_background(picture, self.size)
        film = self._denoise(None, shown, orbit, steps, 1.0, guidance, seed, None, progress)
        film[0] = shown
        return film

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
        """See `Turntable`. The picture itself is always among the known frames."""
        shown = on_background(picture, self.size)
        known = frames.copy()
        known[0] = shown
        kept = np.zeros(self.views, bool) if keep is None else keep.copy()
        kept[0] = True
        film = self._denoise(known, shown, orbit, steps, strength, guidance, seed, kept, progress)
        film[kept] = known[kept]
        return film

    def _denoise(
        self,
        frames: Float[np.ndarray, "n s s 3"] | None,
        shown: Float[np.ndarray, "s s 3"],
        orbit: Orbit | None,
        steps: int,
        strength: float,
        guidance: float,
        seed: int,
        keep: Bool[np.ndarray, "n"] | None,
        progress: Progress,
    ) -> Float[np.ndarray, "n s s 3"]:
        """Frames in order of azimuth. Within, the model's order: the picture's own view is the last."""
        turn = orbit or self.orbit
        draw = torch.Generator().manual_seed(seed)
        place, dtype = self.place, self.place.dtype
        scale = self.vae.config.scaling_factor
        with place.at_work(self.clip):
            seen = self.clip(_for_clip(shown, self.clip.config.image_size).to(place.device, dtype)).image_embeds[:, None]
        augmented = shown + AUGMENTATION / 2 * torch.randn(shown.shape, generator=draw).numpy()
        with place.at_work(self.vae):
            given = encode(self.vae, augmented[None], progress)  # unscaled, unlike what is denoised
            clean = None if frames is None else encode(self.vae, np.roll(frames, -1, 0), progress) * scale
        preview = palette(given[0] * scale, shown)
        side = self.unet.config.sample_size
        noise = torch.randn((self.views, 4, side, side), generator=draw).to(place.device)
        azimuth = torch.tensor(np.radians(np.roll(turn.azimuths, -1)), dtype=torch.float32, device=place.device)[None]
        polar = torch.full_like(azimuth, math.radians(90 - turn.elevation))
        augmentation = torch.full_like(azimuth, AUGMENTATION)
        scales = _triangle(self.views, guidance).to(place.device)

        def run(noisy: Tensor, level: float, picture: Tensor, look: Tensor) -> Tensor:
            sample = torch.cat([noisy, picture.expand(self.views, -1, -1, -1)], 1).to(dtype)[None]
            self.evaluations += 1
            time = torch.tensor(math.log(level) / 4, device=place.device)
            return self.unet(sample, time, look, augmentation, polar, azimuth)[0].float()

        def denoise(x: Tensor, level: float) -> Tensor:
            noisy = x / math.sqrt(level**2 + 1)
            velocity = run(noisy, level, given, seen)
            if guidance > 1:
                free = run(noisy, level, torch.zeros_like(given), torch.zeros_like(seen))
                velocity = free + scales * (velocity - free)
            return x / (level**2 + 1) - level / math.sqrt(level**2 + 1) * velocity

        levels = karras(LOW, HIGH, steps, strength)
        start = clean if strength < 1 else None
        held = None if keep is None else torch.tensor(np.roll(keep, -1), device=place.device)
        with place.at_work(self.unet), stepwise(self.unet, steps, 2 if guidance > 1 else 1, progress) as report:
            latents = solve(denoise, start, noise, levels, clean, held, lambda step, guess: report(step, preview(guess[step % self.views])))
        with place.at_work(self.vae):
            return np.roll(decode(self.vae, latents / scale, progress), 1, 0)


def load(file: Path, place: Place, parts: Parts | None = None, progress: Progress = silent, lora: Path | None = None) -> SV3D:
    """The generator in `file`, of the published layout (sgm), with a LoRA of `kiln train turntable` or without. Raises KilnError
    "bad-weights" where a tensor is missing, unknown or of another shape than `parts`, or what was published, says."""
    parts = parts or AS_PUBLISHED
    with torch.device("meta"):
        unet = SV3DUNet.from_config(parts.unet)
        vae = AutoencoderKL.from_config(parts.vae)
        clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**parts.clip))
    layers, levels = parts.unet["layers_per_block"], len(parts.vae["block_out_channels"])
    networks = {
        _UNET: (unet, lambda name, tensor: [(unet_name(name, layers), tensor)], place.dtype),
        _VAE: (vae, lambda name, tensor: [(vae_name(name, levels), tensor)], torch.float32),  # half precision shows in its pictures
        _CLIP: (clip, clip_tensors, place.dtype),
    }
    _fill(file, networks, progress)
    # The one buffer that no file holds.
    clip.vision_model.embeddings.position_ids = torch.arange(clip.vision_model.embeddings.num_positions)[None]
    if lora is not None:
        fuse(unet, "unet", lora)
    for network in (unet, vae, clip):
        network.eval().requires_grad_(False)
    return SV3D(unet, vae, clip, place)


_Naming = Callable[[str, Tensor], Iterable[tuple[str, Tensor]]]


def _fill(file: Path, networks: dict[str, tuple[nn.Module, _Naming, torch.dtype]], progress: Progress) -> None:
    """Tensors of `file` into the networks whose prefixes their names have. Networks are filled one after the other, so that main memory
    holds each tensor once."""
    hint = "Repair the weights: `kiln weights verify sv3d-p`."
    with safe_open(str(file), framework="pt") as source:
        names = list(source.keys())
        done = 0
        for prefix, (network, naming, dtype) in networks.items():
            wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
            found: dict[str, Tensor] = {}
            for name in names:
                if not name.startswith(prefix):
                    continue
                progress(done / len(names), "Load Stable Video 3D")
                done += 1
                try:
                    renamed = list(naming(name.removeprefix(prefix), source.get_tensor(name)))
                except (LookupError, ValueError):
                    raise KilnError("bad-weights", f"{file.name} holds {name}, which is no part of SV3D_p.", hint) from None
                for new, tensor in renamed:
                    shape = wanted.get(new)
                    if shape is not None and shape != tensor.shape and shape == tensor.shape[:2] and tensor.numel() == shape.numel():
                        tensor = tensor.reshape(shape)  # sgm writes some projections as convolutions of one pixel
                    if shape != tensor.shape:
                        expected = "no part of it" if shape is None else f"{tuple(shape)} expected"
                        raise KilnError("bad-weights", f"{file.name}: {name} is {tuple(tensor.shape)}, {expected}.", hint)
                    found[new] = tensor.to(dtype)
            missing = wanted.keys() - found.keys()
            if missing:
                raise KilnError("bad-weights", f"{file.name} lacks {len(missing)} tensors, {min(missing)} among them.", hint)
            network.load_state_dict(found, assign=True)


def _triangle(views: int, high: float) -> Float[Tensor, "n 1 1 1"]:
    """Guidance of each frame, in the model's order: 1 at both ends, `high` in the middle (generative-models, TrianglePredictionGuider)."""
    along = torch.linspace(0, 1, views)
    return (1 + (high - 1) * (1 - (2 * along - 1).abs()))[:, None, None, None]


def _for_clip(shown: Float[np.ndarray, "s s 3"], size: int) -> Float[Tensor, "1 3 c c"]:
    picture = torch.from_numpy(np.ascontiguousarray(shown)).permute(2, 0, 1)[None]
    small = nn.functional.interpolate(picture, (size, size), mode="bicubic", align_corners=True, antialias=True)
    return (small - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
