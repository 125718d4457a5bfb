"""kiln-tiny-turntable: Wan2.1-I2V's classes at a size that one CPU core trains in an hour, from nothing but objects.py's objects.

    kiln train tiny --out FOLDER

makes it anew: turntables of procedural objects, the autoencoder's components and decoder (autoencoder.py), the transformer by flow matching
(turntable.py), and a folder as diffusers' WanImageToVideoPipeline loads it. A run that was stopped goes on where it was.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from jaxtyping import Float, UInt8

from backend.progress import Progress, silent
from backend.train import autoencoder, objects, turntables
from backend.train.muon import Muon, split
from backend.train.turntable import Run, Settings, again_loss, first_frame_condition, flow_loss

ID = "kiln-tiny-turntable"
FRAMES = 17  # 16 views, and the first once more: Wan's autoencoder takes 4 n + 1 frames, and the turn closes
SIZE = 64
SHIFT = 3.0  # of the noise levels, in training and in sampling
HELD_OUT = 1_000_000  # seeds from here on are never trained on
CHUNK = 250  # turntables of a file
SOME, SOME_UNTIL = 9, 0.75  # frames of each turn, the given one among them, that the first part of the training looks at; its share
AGAIN, AGAIN_FROM = 0.3, 0.4  # share of such steps, and of the training before the first
TRANSFORMER = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=3,
    attention_head_dim=64,
    in_channels=2 * autoencoder.CODE + 1,  # noisy latents, the mask of the frames that are given, their latents
    out_channels=autoencoder.CODE,
    text_dim=16,
    freq_dim=128,
    ffn_dim=768,
    num_layers=8,
    cross_attn_norm=False,
    rope_max_seq_len=32,
)


@dataclass(frozen=True)
class Recipe:
    """turntables: rendered for training. decoder: its steps. transformer: as Settings. For a model such as the shipped one, whose card
    tells how it came about."""

    turntables: int = 6750
    decoder: int = 3500
    transformer: Settings = Settings(steps=6000, batch=8, rate=3e-3, shift=SHIFT)


def build_transformer(seed: int, **changes) -> WanTransformer3DModel:
    """From nothing. Text has no way in: what cross-attention adds is zero and is never trained."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**(TRANSFORMER | changes))
    for block in model.blocks:
        for parameter in block.attn2.to_out[0].parameters():
            torch.nn.init.zeros_(parameter)
        block.attn2.requires_grad_(False)
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    see_places(model, seed)
    return model


def see_places(model: WanTransformer3DModel, seed: int) -> None:
    """Gives two heads a sense of place to begin with. In every layer head 0 looks at the same place in all frames, and at the given frame
    most of all; in the first four layers head 1 looks at the given frame the less the further away in time it is, in four ways.

    Wan knows places by rotary embeddings alone, whose frequencies are made for long clips of large pictures: on 4 x 4 tokens neighbours
    look alike until queries and keys have grown, which takes most of a run this short. So single pairs of channels get constant queries,
    and keys that are constant or say "the given frame" (its mask is 1), which the rotation turns into a preference for a place. What says
    so is read off the activations of the untrained network, layer by layer."""
    wide, code = model.config.attention_head_dim, autoencoder.CODE
    side = 2 * (wide // 6)  # channels of a head for rows, and as many for columns; the first ones are for time
    time = wide - 2 * side
    rng = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(8, code, FRAMES, 8, 8, generator=rng), torch.randn(8, code, FRAMES, 8, 8, generator=rng)
    level = torch.linspace(0.3, 1, 8)[:, None, None, None, None]
    condition = first_frame_condition(clean, torch.zeros(code, 8, 8))
    given = torch.cat([(1 - level) * clean + level * noise, condition], 1), level.flatten() * 1000, torch.zeros(8, 1, model.config.text_dim)
    with torch.no_grad():
        for number, block in enumerate(model.blocks):
            attn, seen = block.attn1, []
            hook = attn.to_k.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
            with quick(model):
                model(*given, return_dict=False)
            hook.remove()
            tokens = seen[0].unflatten(1, (FRAMES, -1))
            first, rest = tokens[:, 0].mean((0, 1)), tokens[:, 1:].mean((0, 1, 2))
            marker = 2.5 * (first - rest) / (first - rest).square().sum()
            for channel in (time, time + 2, time + side, time + side + 2):
                _constant(attn, channel)
                attn.to_k.bias[channel] = 2.0
            marked = [(time - 2, 0)]  # the slowest pair, which hardly turns
            if number < 4 and model.config.num_attention_heads > 1:
                marked.append((wide + (4, 2, 2, 4)[number], number // 2))
            for channel, quarter in marked:
                _constant(attn, channel, quarter)
                attn.to_k.weight[channel], attn.to_k.bias[channel] = marker, -(rest @ marker)


def _constant(attn, channel: int, quarter: int = 0) -> None:
    """A pair of channels whose query is the same for every token, a quarter turn on if `quarter`, and whose key is nothing yet."""
    for projection, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k)):
        projection.weight[channel : channel + 2], projection.bias[channel : channel + 2] = 0, 0
        norm.weight[channel : channel + 2] = 4.0
    attn.to_q.bias[channel + quarter] = 2.0


def _attend(attn, hidden, encoder_hidden_states=None, attention_mask=None, rotary=None):
    """Wan's self-attention, with plain products, which a CPU's bfloat16 units do faster than its fused kernel at a few hundred tokens."""
    b, n, _ = hidden.shape
    turn = torch.complex(rotary[0][0, :, 0, 0::2].float(), rotary[1][0, :, 0, 1::2].float())[None, :, None]

    def turned(x, norm):
        pairs = torch.view_as_complex(norm(x.float()).view(b, n, attn.heads, -1, 2))
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype).transpose(1, 2)

    query, key = turned(attn.to_q(hidden), attn.norm_q), turned(attn.to_k(hidden), attn.norm_k)
    value = attn.to_v(hidden).view(b, n, attn.heads, -1).transpose(1, 2)
    mixed = torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, -1) @ value
    return attn.to_out[0](mixed.transpose(1, 2).reshape(b, n, -1))


def _nothing(attn, hidden, encoder_hidden_states=None, attention_mask=None, rotary=None):
    return 0


@contextmanager
def quick(model: WanTransformer3DModel):
    """Within, a transformer of `build_transformer` computes the same in less time on a CPU."""
    kept = [(block.attn1.processor, block.attn2.processor) for block in model.blocks]
    for block in model.blocks:
        block.attn1.processor, block.attn2.processor = _attend, _nothing
    try:
        yield
    finally:
        for block, (first, second) in zip(model.blocks, kept, strict=True):
            block.attn1.processor, block.attn2.processor = first, second


@contextmanager
def frames_of(model: WanTransformer3DModel, index: list[int]):
    """Within, the clips that the transformer sees are these frames of a whole turn, each in its own place in time."""
    rope, own = model.rope, model.rope.forward

    def places(hidden):
        whole = hidden.new_empty(1, 1, FRAMES, *hidden.shape[3:])
        return tuple(part.unflatten(1, (FRAMES, -1))[:, index].flatten(1, 2) for part in own(whole))

    rope.forward = places
    try:
        yield
    finally:
        del rope.forward


# -- Data ----------------------------------------------------------------------------------------------------------------------------------


def render(folder: Path, count: int, progress: Progress = silent) -> list[UInt8[np.ndarray, "n k s s 3"]]:
    """The first `count` seeds' turntables, in files that are made once."""
    folder.mkdir(parents=True, exist_ok=True)
    chunks = []
    for first in range(0, count, CHUNK):
        path = folder / f"turntables-{first}.npy"
        seeds = range(first, min(first + CHUNK, count))
        if not path.exists():
            frames = np.empty((len(seeds), turntables.VIEWS, SIZE, SIZE, 3), np.uint8)
            for place, seed in enumerate(seeds):
                progress(seed / count, f"Rendering turntable {seed + 1} of {count}")
                frames[place] = turntables.example(seed, size=SIZE) * 255 + 0.5
            part = path.with_suffix(".part.npy")
            np.save(part, frames)
            part.replace(path)
        chunks.append(np.load(path, mmap_mode="r"))
    return chunks


_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


def clips(chunks: list[UInt8[np.ndarray, "n k s s 3"]], count: int, rng: torch.Generator) -> Float[torch.Tensor, "b t s s 3"]:
    """Turns in [-1, 1], the first frame once more at the end: five of eight begin in front, two within 22.5 degrees of it, one anywhere;
    some mirrored and turned the other way, colour bands in any order."""
    found = []
    for chunk, place, start, flip, order in torch.randint(0, 2**31, (count, 5), generator=rng).tolist():
        turns = chunks[chunk % len(chunks)]
        views = turns.shape[1]
        first = (start >> 3) if start % 8 == 0 else (start >> 3) % 3 - 1 if start % 8 < 3 else 0
        index = [(first + (-k if flip % 2 else k)) % views for k in range(views + 1)]
        frames = turns[place % len(turns)][index][..., list(_ORDERS[order % 6])]
        found.append(frames[:, :, ::-1] if flip % 2 else frames)
    return torch.from_numpy(np.stack(found)).float() / 127.5 - 1


def pictures(chunks: list[UInt8[np.ndarray, "n k s s 3"]], count: int, rng: np.random.Generator) -> Float[torch.Tensor, "b s s 3"]:
    """Single views in [-1, 1], mirrored and with colour bands in any order; some are two at once, to be busier than these."""

    def one():
        turns = chunks[rng.integers(len(chunks))]
        view = turns[rng.integers(len(turns)), rng.integers(turns.shape[1])][..., list(_ORDERS[rng.integers(6)])]
        return (view[:, ::-1] if rng.random() < 0.5 else view).astype(np.float32) / 127.5 - 1

    found = []
    for _ in range(count):
        view = one()
        if rng.random() < 0.15:
            share = rng.random()
            view = share * view + (1 - share) * one()
        found.append(view)
    return torch.from_numpy(np.stack(found))


# -- Training ------------------------------------------------------------------------------------------------------------------------------


def prepare(
    model: WanTransformer3DModel, components: autoencoder.Components, chunks: list, settings: Settings, out: Path, again: float = AGAIN
):
    """The run in `out`, gone on with if it was begun, and its loss. again: share of the steps that start from what the model makes itself,
    once it makes something."""
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    inner, rest = split(learning.items(), lambda name: name.startswith("blocks.") and "table" not in name)
    optimizers = [Muon(inner, settings.rate, weight_decay=0.01), torch.optim.AdamW(rest, settings.rate, (0.9, 0.98), weight_decay=0.0)]
    empty = autoencoder.project(components, torch.zeros(SIZE, SIZE, 3))
    text = torch.zeros(settings.batch, 1, model.config.text_dim)

    run = Run(out, learning, optimizers, settings)

    def loss(rng: torch.Generator) -> torch.Tensor:
        frames = list(range(FRAMES))
        if run.step < SOME_UNTIL * settings.steps:
            frames = [0, *sorted((1 + torch.randperm(FRAMES - 1, generator=rng)[: SOME - 1]).tolist())]
        seen = clips(chunks, settings.batch, rng)[:, frames]
        clean = autoencoder.project(components, seen).transpose(1, 2)
        own = run.step >= AGAIN_FROM * settings.steps and torch.rand((), generator=rng).item() < again
        with torch.autocast("cpu", torch.bfloat16), frames_of(model, frames):
            return (again_loss if own else flow_loss)(model, clean, first_frame_condition(clean, empty), text, settings.shift, rng)

    return run, loss


def make(out: Path, recipe: Recipe = Recipe(), progress: Progress = silent) -> Path:
    """All of it, from nothing, into `out / kiln-tiny-turntable`."""
    from backend.diffusion.wan import SPECS, WanTurntable
    from backend.train.lora import sheet

    torch.set_flush_denormal(True)  # what dies down into denormal numbers slows a CPU
    chunks = render(out / "data", recipe.turntables, lambda done, text="", preview=None: progress(0.15 * done, text))
    views = np.concatenate([chunk[::4, ::4].reshape(-1, SIZE, SIZE, 3) for chunk in chunks])
    symmetric = [views[..., list(order)] for order in _ORDERS]
    components = autoencoder.principal(
        torch.from_numpy(np.concatenate([*symmetric, *(v[:, :, ::-1] for v in symmetric)])).float() / 127.5 - 1
    )
    vae = autoencoder.build(components, 0)
    decoder = out / "decoder.pt"
    if decoder.exists():
        vae.load_state_dict(torch.load(decoder, weights_only=True))
    else:

        def told(step: int, figures: dict) -> None:
            progress(0.15 + 0.2 * step / recipe.decoder, f"Decoder, step {step} of {recipe.decoder}: {figures['psnr']:.2f} dB")

        autoencoder.train(vae, components, lambda rng, count: pictures(chunks, count, rng), recipe.decoder, 0, told)
        torch.save(vae.state_dict(), decoder)
    model = build_transformer(0)
    run, loss = prepare(model, components, chunks, recipe.transformer, out)
    held = [turntables.example(HELD_OUT + k, None if k < 3 else objects.HELD_OUT[k - 3]) for k in range(5)]

    def show(step: int) -> None:
        with run.averaged():
            generator = WanTurntable(ID, pipeline(model, vae, text=False), SPECS[ID], previews=False)
            rows = []
            for true in held:
                given = np.concatenate([true[0], np.ones((SIZE, SIZE, 1), np.float32)], 2)
                rows += [true, generator.generate(given, "", None, 12, 1.0, 0)[:-1]]
            sheet(rows, out / f"sample-{step:06d}.png")

    with quick(model):
        run.train(loss, show, lambda done, text="", preview=None: progress(0.35 + 0.65 * done, text))
    with run.averaged():
        return export(out / ID, model, vae)


# -- The folder ----------------------------------------------------------------------------------------------------------------------------


def pipeline(transformer: WanTransformer3DModel, vae: AutoencoderKLWan, text: bool = True) -> WanImageToVideoPipeline:
    """text: with a tokenizer and a text encoder, which the pipeline's own path wants though nothing reads what they say."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    tokenizer = encoder = None
    if text:
        torch.manual_seed(0)
        pieces = ["<pad>", "</s>", "<unk>", "▁", *(chr(code) for code in range(33, 127))]
        known = Tokenizer(models.Unigram([(piece, 0.0 if k < 3 else -4.0) for k, piece in enumerate(pieces)], unk_id=2))
        known.pre_tokenizer, known.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        tokenizer = T5TokenizerFast(tokenizer_object=known, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_ids=0)
        width = transformer.config.text_dim
        encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=width, num_layers=1, num_heads=2)).eval()
    return WanImageToVideoPipeline(tokenizer=tokenizer, text_encoder=encoder, vae=vae, scheduler=scheduler, transformer=transformer)


def export(folder: Path, transformer: WanTransformer3DModel, vae: AutoencoderKLWan, card: str = "") -> Path:
    """diffusers' layout, float16. The models themselves stay as they are."""
    import copy

    pipe = pipeline(copy.deepcopy(transformer), copy.deepcopy(vae))
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        part.half()
    pipe.save_pretrained(folder, safe_serialization=True)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes files that only their owner may read
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return folder
