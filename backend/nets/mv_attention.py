"""MV-Adapter's attention (Huang et al. 2024, "MV-Adapter: Multi-view Consistent Image Generation Made Easy", section 4.2): beside each
self-attention of an image UNet stand two copies of it, in parallel. One looks along the same row of all views, one at what the UNet itself
saw in a reference picture. Their outputs are added.

Names are the published ones (huanngzh/MV-Adapter, models/attention_processor.py, `DecoupledMVRowSelfAttnProcessor2_0`), so that the
published file fits: `...attn1.processor.to_q_mv.weight` ...
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


@dataclass
class Reference:
    """What all the attentions of one UNet share. seen: the inputs of each while the UNet looked at the reference, by name. looking: it is
    doing that now. blind: the reference is withheld, for guidance."""

    seen: dict[str, Tensor] = field(default_factory=dict)
    looking: bool = False
    blind: bool = False


class MultiViewAttention(nn.Module):
    """A self-attention's processor; the batch is the views."""

    def __init__(self, name: str, width: int, reference: Reference):
        super().__init__()
        self.name, self.reference = name, reference
        for copy in ("mv", "ref"):
            for part in "qkv":
                setattr(self, f"to_{part}_{copy}", nn.Linear(width, width, bias=False))
            setattr(self, f"to_out_{copy}", nn.ModuleList([nn.Linear(width, width)]))

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "v s c"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Float[Tensor, "v s c"]:
        x, heads = hidden_states, attn.heads
        own = attn.to_out[0](_attend(attn.to_q(x), attn.to_k(x), attn.to_v(x), heads))
        if self.reference.looking:
            self.reference.seen[self.name] = x
            return own
        views, pixels, width = x.shape
        side = math.isqrt(pixels)  # the pictures are square

        def rows(of: Tensor) -> Tensor:
            return of.reshape(views, side, side, width).transpose(0, 1).reshape(side, views * side, width)

        along = _attend(rows(self.to_q_mv(x)), rows(self.to_k_mv(x)), rows(self.to_v_mv(x)), heads)
        along = self.to_out_mv[0](along.reshape(side, views, side, width).transpose(0, 1).reshape(views, pixels, width))
        if self.reference.blind:  # keys and values of nothing are 0, and so is what they attend to
            at = self.to_out_ref[0](torch.zeros_like(x))
        else:
            seen = self.reference.seen[self.name]
            key, value = (of.expand(views, -1, -1) for of in (self.to_k_ref(seen), self.to_v_ref(seen)))
            at = self.to_out_ref[0](_attend(self.to_q_ref(x), key, value, heads))
        return own + along + at


def install(unet: UNet2DConditionModel) -> Reference:
    """Gives every self-attention of the UNet its two copies, untrained."""
    reference = Reference()
    processors = dict(unet.attn_processors)
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and name.endswith("attn1"):
            processors[f"{name}.processor"] = MultiViewAttention(f"{name}.processor", module.query_dim, reference)
    unet.set_attn_processor(processors)
    return reference


def _attend(
    query: Float[Tensor, "b s c"], key: Float[Tensor, "b t c"], value: Float[Tensor, "b t c"], heads: int
) -> Float[Tensor, "b s c"]:
    split = [of.unflatten(-1, (heads, -1)).transpose(1, 2) for of in (query, key, value)]
    return scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
