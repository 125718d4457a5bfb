"""Small checkpoints in the layouts in which the large ones are published, written by tables of their own."""

import re

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from backend.diffusion.sv3d import Parts
from backend.nets.sv3d_unet import SV3DUNet

SMALL_SV3D = Parts(
    {
        "sample_size": 8,
        "in_channels": 8,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal",) * 3 + ("DownBlockSpatioTemporal",),
        "up_block_types": ("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * 3,
        "block_out_channels": (32, 32, 64, 64),
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 16 + 2 * 32,
        "layers_per_block": 2,
        "cross_attention_dim": 24,
        "num_attention_heads": (2, 2, 4, 4),
        "num_frames": 5,
    },
    {
        "block_out_channels": (32, 32, 32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
        "sample_size": 64,
    },
    {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": 14,
        "image_size": 56,
        "projection_dim": 24,
        "hidden_act": "gelu",
    },
)


def sv3d(file):
    """Writes a small SV3D_p in the published layout (sgm) and gives its networks."""
    torch.manual_seed(3)
    unet = SV3DUNet.from_config(SMALL_SV3D.unet)
    vae = AutoencoderKL.from_config(SMALL_SV3D.vae)
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**SMALL_SV3D.clip))
    for network in (unet, vae, clip):
        network.eval()
        for tensor in network.parameters():  # no two tensors alike, no bias 0, so that a swap shows
            tensor.data.add_(0.02 * torch.randn_like(tensor))
    tensors = {"model.diffusion_model." + sgm_unet(name): tensor for name, tensor in unet.state_dict().items()}
    for name, tensor in vae.state_dict().items():
        square = ".attentions." in name and tensor.ndim == 2
        tensors["conditioner.embedders.1.encoder." + sgm_vae(name)] = tensor[..., None, None] if square else tensor
    tensors |= {"conditioner.embedders.0.open_clip.model.visual." + name: tensor for name, tensor in open_clip(clip.state_dict()).items()}
    tensors["first_stage_model.decoder.conv_in.weight"] = torch.zeros(3)  # not read
    tensors["conditioner.embedders.0.open_clip.model.token_embedding.weight"] = torch.zeros(3)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return unet, vae, clip


def sgm_unet(name):
    """The name in generative-models' VideoUNet of a tensor of diffusers' spatio-temporal UNet, two residual blocks a level."""
    for ours, theirs in {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }.items():
        if name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    inner = {
        "spatial_res_block": "",
        "temporal_res_block": "time_stack",
        "temporal_transformer_blocks": "time_stack",
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    found = re.fullmatch(r"(?:(down|up)_blocks\.(\d)|(mid)_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)", name)
    side, level, middle, kind, number, rest = found.groups()
    if kind == "resnets":
        rest = ".".join(word for word in (inner.get(word, word) for word in rest.split(".")) if word)
    if kind == "attentions":
        rest = (
            rest.replace("temporal_transformer_blocks", "time_stack")
            .replace("embed.linear_1", "embed.0")
            .replace("embed.linear_2", "embed.2")
        )
    if middle:
        return f"middle_block.{2 * int(number) if kind == 'resnets' else 1}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{3 * int(level) + 3}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":  # after the attention where there is one
        return f"output_blocks.{3 * int(level) + 2}.{1 if level == '0' else 2}.{rest}"
    block = 3 * int(level) + int(number) + (1 if side == "down" else 0)
    return f"{'input' if side == 'down' else 'output'}_blocks.{block}.{1 if kind == 'attentions' else 0}.{rest}"


def sgm_vae(name):
    """The name in the autoencoder of latent diffusion of a tensor of diffusers' AutoencoderKL with four levels."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm").replace("to_out.0", "proj_out")
    name = re.sub(r"attn_1\.to_([qkv])", r"attn_1.\1", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{3 - int(found[1])}.block", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{3 - int(found[1])}.upsample", name)


def open_clip(state):
    """open_clip's `visual` out of the tensors of transformers' CLIPVisionModelWithProjection."""
    tensors = {"proj": state["visual_projection.weight"].T}
    for name, tensor in state.items():
        name = name.removeprefix("vision_model.")
        if name.startswith("encoder.layers.") and "self_attn" not in name:
            number, part, leaf = name.removeprefix("encoder.layers.").split(".", 1)[0], *name.rsplit(".", 2)[-2:]
            theirs = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}[part]
            tensors[f"transformer.resblocks.{number}.{theirs}.{leaf}"] = tensor
    for number in range(1 + max(int(name.split(".")[3]) for name in state if ".encoder.layers." in name)):
        layer = f"vision_model.encoder.layers.{number}.self_attn."
        for leaf in ("weight", "bias"):
            third = [state[f"{layer}{part}_proj.{leaf}"] for part in "qkv"]
            tensors[f"transformer.resblocks.{number}.attn.in_proj_{leaf}"] = torch.cat(third)
            tensors[f"transformer.resblocks.{number}.attn.out_proj.{leaf}"] = state[f"{layer}out_proj.{leaf}"]
    for theirs, ours in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        for leaf in ("weight", "bias"):
            tensors[f"{theirs}.{leaf}"] = state[f"vision_model.{ours}.{leaf}"]
    embeddings = "vision_model.embeddings."
    tensors["class_embedding"] = state[embeddings + "class_embedding"]
    tensors["positional_embedding"] = state[embeddings + "position_embedding.weight"]
    tensors["conv1.weight"] = state[embeddings + "patch_embedding.weight"]
    return tensors


def mv_adapter(root):
    """Writes a small SDXL in diffusers' layout at half precision's names, an autoencoder of its own, and MV-Adapter's file, under `root`;
    gives the pipeline and the condition encoder."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, T2IAdapter, UNet2DConditionModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

    torch.manual_seed(4)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32, 64), layers_per_block=1, cross_attention_dim=16 + 24,
        transformer_layers_per_block=(1, 1, 2), attention_head_dim=(2, 2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=24 + 6 * 8, norm_num_groups=16,
    )  # fmt: skip
    vae = AutoencoderKL.from_config({**SMALL_SV3D.vae, "scaling_factor": 0.5})
    words = ["<pad>", "</s>", "<unk>", "high", "quality", "a", "ball", "watermark", "ugly"]
    known = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=known, model_max_length=77, **marks)
    text = {
        "vocab_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_config(SMALL_SV3D.vae),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=16, **text)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=24, projection_dim=24, **text)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1),
        add_watermarker=False,
    )
    for network in (unet, vae, pipe.text_encoder, pipe.text_encoder_2):
        network.eval()
    pipe.save_pretrained(root / "sdxl", variant="fp16")
    vae.save_pretrained(root / "vae")
    encoder = T2IAdapter(in_channels=6, channels=[32, 32, 64, 64], num_res_blocks=2, downscale_factor=16, adapter_type="full_adapter_xl")
    adapter = dict(encoder.state_dict())
    for name, module in unet.named_modules():  # huanngzh/MV-Adapter, models/attention_processor.py and loaders/
        if name.endswith(".attn1"):
            width = module.to_q.weight.shape[0]
            for copy in ("mv", "ref"):
                for part in ("to_q", "to_k", "to_v", "to_out"):
                    leaf = f"{name}.processor.{part}_{copy}{'.0' if part == 'to_out' else ''}"
                    adapter[f"{leaf}.weight"] = 0.2 * torch.randn(width, width)
                    if part == "to_out":
                        adapter[f"{leaf}.bias"] = 0.1 * torch.randn(width)
    save_file(adapter, root / "mvadapter_i2mv_sdxl.safetensors")
    return pipe, encoder


def register(folder, monkeypatch, *entries):
    """Weights that are already here, as the registry knows them: (id, class, their folder, more of the entry)."""
    from backend import weights

    shipped = folder / "shipped"
    shipped.mkdir()
    lines = []
    for id, kind, where, more in entries:
        (shipped / id).symlink_to(where)
        lines += ["[[entry]]", f'id = "{id}"', f'title = "Small {id}"', 'purpose = "Tests."', f'class = "{kind}"', "bundled = true", more]
        lines += ["memory = { fp32 = 0.1 }", 'licence = { name = "none", url = "", commercial = "yes" }', ""]
    (folder / "weights.toml").write_text("\n".join(lines))
    monkeypatch.setattr(weights, "SHIPPED", shipped)
    monkeypatch.setenv("KILN_WEIGHTS_REGISTRY", str(folder / "weights.toml"))
