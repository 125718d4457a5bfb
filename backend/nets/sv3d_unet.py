"""The denoiser of Stable Video 3D (Voleti et al. 2024, section 3): Stable Video Diffusion's spatio-temporal UNet, whose frames each have a
conditioning vector of their own, noise augmentation 256 | polar angle 512 | azimuth 512, where SVD has one vector for the whole clip.

Blocks and names are diffusers' (`UNetSpatioTemporalConditionModel`); only what is added to the time embedding differs. Below it, the way of
the published names (Stability-AI/generative-models and open_clip) into those of diffusers and transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from jaxtyping import Float
from torch import Tensor

# generative-models, configs/inference/sv3d_p.yaml, in diffusers' words (its 64 channels a head are 5, 10, 20 and 20 heads).
PUBLISHED = {
    "sample_size": 72,
    "in_channels": 8,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280,
    "layers_per_block": 2,
    "cross_attention_dim": 1024,
    "transformer_layers_per_block": 1,
    "num_attention_heads": (5, 10, 20, 20),
    "num_frames": 21,
}


class SV3DUNet(UNetSpatioTemporalConditionModel):
    """`addition_time_embed_dim` is the width of the augmentation's embedding; the angles' are the halves of what is left."""

    def forward(
        self,
        sample: Float[Tensor, "b f 8 h w"],
        noise: Float[Tensor, ""],
        seen: Float[Tensor, "b 1 c"],
        augmentation: Float[Tensor, "b f"],
        polar: Float[Tensor, "b f"],
        azimuth: Float[Tensor, "b f"],
    ) -> Float[Tensor, "b f 4 h w"]:
        """sample: noisy latents | latents of the input picture, the sides multiples of 8. noise: ln(sigma) / 4. seen: what CLIP saw in the
        picture. Angles in radians, polar from the pole down."""
        batch, frames = sample.shape[:2]
        augmented = self.config.addition_time_embed_dim
        angle = (self.config.projection_class_embeddings_input_dim - augmented) // 2
        vector = torch.cat([_waves(augmentation, augmented), _waves(polar, angle), _waves(azimuth, angle)], -1)
        time = _waves(noise.reshape(1), self.config.block_out_channels[0])
        embedding = self.time_embedding(time.to(sample.dtype)) + self.add_embedding(vector.to(sample.dtype))
        flags = sample.new_zeros(batch, frames)  # no frame is a picture of its own
        seen = seen.repeat_interleave(frames, 0)

        x = self.conv_in(sample.flatten(0, 1))
        skips: tuple[Tensor, ...] = (x,)
        for block in self.down_blocks:
            x, more = block(hidden_states=x, temb=embedding, image_only_indicator=flags, **_looks(block, seen))
            skips += more
        x = self.mid_block(hidden_states=x, temb=embedding, encoder_hidden_states=seen, image_only_indicator=flags)
        for block in self.up_blocks:
            count = len(block.resnets)
            skips, last = skips[:-count], skips[-count:]
            x = block(hidden_states=x, temb=embedding, res_hidden_states_tuple=last, image_only_indicator=flags, **_looks(block, seen))
        x = self.conv_out(self.conv_act(self.conv_norm_out(x)))
        return x.unflatten(0, (batch, frames))


def _waves(values: Float[Tensor, "..."], width: int) -> Float[Tensor, "... d"]:
    """Cosines, then sines, of frequencies 1 to 1/10000."""
    return get_timestep_embedding(values.flatten().float(), width, flip_sin_to_cos=True, downscale_freq_shift=0)


def _looks(block: torch.nn.Module, seen: Tensor) -> dict[str, Tensor]:
    return {"encoder_hidden_states": seen} if getattr(block, "has_cross_attention", False) else {}


_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {"time_stack": "temporal_transformer_blocks", "time_pos_embed.0": "time_pos_embed.linear_1",
              "time_pos_embed.2": "time_pos_embed.linear_2"}  # fmt: skip


def unet_name(published: str, layers: int = 2) -> str:
    """diffusers' name of a tensor of sgm's VideoUNet with `layers` residual blocks a level. KeyError if it belongs to none."""
    module, leaf = published.rsplit(".", 1)
    if module in _ENDS:
        return f"{_ENDS[module]}.{leaf}"
    found = re.fullmatch(r"(input_blocks|output_blocks)\.(\d+)\.(\d)\.(.+)", published)
    if found:
        side, number, part, rest = found[1], int(found[2]), int(found[3]), found[4]
        level, layer = divmod(number - 1 if side == "input_blocks" else number, layers + 1)
        level_name = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{level}"
        if rest.startswith("op."):
            return f"{level_name}.downsamplers.0.conv.{leaf}"
        if rest.startswith("conv."):
            return f"{level_name}.upsamplers.0.conv.{leaf}"
        if part == 0:
            return f"{level_name}.resnets.{layer}.{_resnet(rest)}"
        if part == 1:
            return f"{level_name}.attentions.{layer}.{_renamed(rest, _ATTENTION)}"
    found = re.fullmatch(r"middle_block\.([012])\.(.+)", published)
    if found:
        if found[1] == "1":
            return f"mid_block.attentions.0.{_renamed(found[2], _ATTENTION)}"
        return f"mid_block.resnets.{int(found[1]) // 2}.{_resnet(found[2])}"
    raise KeyError(published)


def _resnet(rest: str) -> str:
    if rest.startswith("time_mixer."):
        return rest
    if rest.startswith("time_stack."):
        return "temporal_res_block." + _renamed(rest.removeprefix("time_stack."), _RESNET, True)
    return "spatial_res_block." + _renamed(rest, _RESNET, True)


def _renamed(rest: str, names: Mapping[str, str], all_of_them: bool = False) -> str:
    for old, new in names.items():
        if rest.startswith(old + "."):
            return new + rest[len(old) :]
    if all_of_them:
        raise KeyError(rest)
    return rest


_VAE_BLOCKS = {"block_1": "resnets.0", "block_2": "resnets.1", "attn_1": "attentions.0"}
_VAE_PARTS = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "nin_shortcut": "conv_shortcut"}


def vae_name(published: str, levels: int = 4) -> str:
    """diffusers' name (`AutoencoderKL`) of a tensor of sgm's image autoencoder. KeyError if it belongs to none."""
    parts = published.split(".")
    if parts[0] in ("quant_conv", "post_quant_conv"):
        return published
    side, rest, leaf = parts[0], parts[1:-1], parts[-1]
    if side not in ("encoder", "decoder"):
        raise KeyError(published)
    if rest[0] == "norm_out":
        names = ["conv_norm_out"]
    elif rest[0] in ("conv_in", "conv_out"):
        names = rest
    elif rest[0] == "mid":
        part = _VAE_PARTS[rest[2]] if rest[1] == "attn_1" else _VAE_PARTS.get(rest[2], rest[2])
        names = ["mid_block", _VAE_BLOCKS[rest[1]], part]
    elif rest[0] in ("down", "up"):
        level = int(rest[1]) if rest[0] == "down" else levels - 1 - int(rest[1])
        sampled = rest[2] in ("downsample", "upsample")
        tail = [f"{rest[2]}rs.0", rest[3]] if sampled else [f"resnets.{rest[3]}", _VAE_PARTS.get(rest[4], rest[4])]
        names = [f"{rest[0]}_blocks.{level}", *tail]
    else:
        raise KeyError(published)
    return ".".join([side, *names, leaf])


_CLIP = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight",
    "ln_post.bias": "vision_model.post_layernorm.bias",
}
_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def clip_tensors(published: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
    """Names and tensors of transformers' `CLIPVisionModelWithProjection` out of one of open_clip's `visual`. KeyError for others."""
    if published == "proj":
        return [("visual_projection.weight", tensor.T.contiguous())]
    if published in _CLIP:
        return [(_CLIP[published], tensor)]
    found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", published)
    if not found:
        raise KeyError(published)
    layer, part, leaf = f"vision_model.encoder.layers.{found[1]}", found[2], found[3]
    if part == "attn.in_proj":  # open_clip keeps the three projections in one
        return [(f"{layer}.self_attn.{name}_proj.{leaf}", third.clone()) for name, third in zip("qkv", tensor.chunk(3), strict=True)]
    return [(f"{layer}.{_CLIP_LAYER[part]}.{leaf}", tensor)]
