"""Every network that Kiln loads from elsewhere is what was published: made on the meta device from its published configuration, its tensors
have the names and shapes of `manifests.json`, and as many parameters; and what others saw of the published files agrees.

manifests.json has an entry for each part: `class` and `config`, `parameters`, `tensors` and a `digest` of all names and shapes (these tell
when a library renames or reshapes something), and what comes from elsewhere: `spots`, names with shapes; `counted`, a number of parameters
that somebody stated; `config_file`, whose hash the registry pins and which must be this very configuration; `files`, published files whose
size, to the byte, follows from the names, shapes and types in them; `index`, the same of a list of shards; `unread`, what a file holds
beside. Sizes are the registry's, or `bytes`. `source` says where from, `evidence` how strong it is: V seen in the published files or in
what made them, I inferred.
"""

import hashlib
import importlib
import json
import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from backend import weights

MANIFESTS = json.loads(Path(__file__).with_name("manifests.json").read_text())
BYTES = {"F16": 2, "BF16": 2, "F32": 4, "I64": 8}


@pytest.fixture(scope="module", params=range(len(MANIFESTS)), ids=[f"{part['entry']} {part['part']}".strip() for part in MANIFESTS])
def made(request):
    part = MANIFESTS[request.param]
    return part, build(part)


def build(part):
    """The network of a manifest, without memory for its tensors."""
    module, name = part["class"].rsplit(".", 1)
    kind = getattr(importlib.import_module(module), name)
    config = {name: value for name, value in part["config"].items() if not name.startswith("_")}
    with torch.device("meta"):
        if module == "transformers":
            network = kind(kind.config_class(**config))
        elif hasattr(kind, "from_config"):
            network = kind.from_config(config)
        else:
            network = kind(**config)
        if "adapter" in part:
            from backend.nets.mv_attention import install

            install(network)
    return network


def layout(part, network):
    """Shapes of what a file of this part holds, by name."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items() if part.get("adapter", "") in name}


def digest(shapes):
    lines = "\n".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in sorted(shapes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def count(part, network):
    named = {name: tensor for name, tensor in network.named_parameters() if part.get("adapter", "") in name}
    return sum(tensor.numel() for tensor in named.values())  # tied ones once


def test_names_shapes_and_number_of_parameters(made):
    part, network = made
    shapes = layout(part, network)
    for name, shape in part["spots"].items():
        assert shapes.get(name) == tuple(shape), name
    assert count(part, network) == part["parameters"]
    assert (len(shapes), digest(shapes)) == (part["tensors"], part["digest"])
    if "counted" in part:
        unread = part.get("unread", {"count": 0, "names": ""})
        assert part["parameters"] + unread["count"] == part["counted"]
        assert not unread["count"] or unread["names"] in network._keys_to_ignore_on_load_unexpected
    assert part["source"] and part["evidence"][0] in "VI"


def test_configurations_are_the_published_files():
    """To the byte: their hash is the one that the registry pins."""
    parts = [part for part in MANIFESTS if "config_file" in part]
    assert len(parts) >= 5
    for part in parts:
        text = json.dumps(part["config"], indent=2, sort_keys=True) + "\n"
        pinned = {file.path: file.sha256 for file in weights.entry(part["entry"]).files}[part["config_file"]]
        assert hashlib.sha256(text.encode()).hexdigest() == pinned, part["config_file"]


def test_published_files_have_the_size_that_follows_from_names_shapes_and_types():
    """A safetensors file is 8 bytes, a JSON text of names, types, shapes and places, and the tensors: one name that is a letter longer, or
    one tensor of another shape, shows in its size."""
    held, files = defaultdict(dict), {}
    for part in MANIFESTS:
        for path, told in part.get("files", {}).items():
            for name, shape in layout(part, build(part)).items():
                kind = told.get("types", {}).get(name, told["type"])
                held[part["entry"], path][told.get("prefix", "") + name] = (kind, shape)
            files[part["entry"], path] = told
    assert len(held) >= 8
    for (entry, path), tensors in held.items():
        told = files[entry, path]
        size = {file.path: file.bytes for file in weights.entry(entry).files}[path] or told["bytes"]
        assert abs(size - safetensors_size(tensors, told.get("note", True))) <= told.get("within", 0), (entry, path)


def safetensors_size(tensors, note):
    """note: that it was torch's tensors; with it came padding to 8 bytes."""
    order = sorted(tensors, key=lambda name: (-BYTES[tensors[name][0]], name))
    header, at = {"__metadata__": {"format": "pt"}} if note else {}, 0
    for name in order:
        kind, shape = tensors[name]
        end = at + BYTES[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    long = len(json.dumps(header, separators=(",", ":")))
    return 8 + long + (-long % 8 if note else 0) + at


def test_an_index_of_shards_has_the_size_that_follows_from_the_names_in_it():
    for part in MANIFESTS:
        for path, told in part.get("index", {}).items():
            files = {file.path: file.bytes for file in weights.entry(part["entry"]).files}
            shapes = layout(part, build(part))
            shapes.pop(told["tied"])
            total = told["bytes_each"] * sum(math.prod(shape) for shape in shapes.values())
            named = {name: Path(told["shards"][0]).name for name in shapes}
            metadata = {"total_parameters": part["parameters"], "total_size": total}
            text = json.dumps({"metadata": metadata, "weight_map": named}, indent=2, sort_keys=True) + "\n"
            assert files[path] == len(text)
            headers = sum(files[shard] for shard in told["shards"]) - total
            assert 0 < headers < 200 * len(shapes)  # the rest is what the shards say of themselves


def test_stable_video_3ds_file_is_as_large_as_its_parts():
    """It has no configuration beside it. Its UNet, its two encoders and, which Kiln does not read, open_clip's text side and the decoder of
    the first stage, an image decoder: with a temporal one the file would be 56 MB larger."""
    parts = {part["part"]: part for part in MANIFESTS if part["entry"] == "sv3d-p"}
    vae = build(parts["vae"]).state_dict()
    decoder = sum(tensor.numel() for name, tensor in vae.items() if name.startswith(("decoder.", "post_quant_conv.")))
    text = 49408 * 1024 + 77 * 1024 + 2 * 1024 + 1024 * 1024 + 1  # tokens, places, last norm, projection, scale
    numbers = sum(part["parameters"] for part in parts.values()) + decoder + text
    assert abs(4 * numbers - weights.entry("sv3d-p").bytes) < 5e6  # which is known to 10 MB


def test_at_full_size_the_parts_fit_together():
    """Shapes only: what goes in and comes out of the two UNets at the sizes that they were trained for."""
    parts = {(part["entry"], part["part"]): part for part in MANIFESTS}
    with torch.device("meta"), torch.no_grad():
        views = torch.empty(1, 21)
        unet = build(parts["sv3d-p", "unet"]).to("meta")  # its mixing factors are made elsewhere
        out = unet(torch.empty(1, 21, 8, 72, 72), torch.empty(()), torch.empty(1, 1, 1024), views, views, views)
        assert out.shape == (1, 21, 4, 72, 72)
        unet, hints = build(parts["mv-adapter-sdxl", "attention"]), build(parts["mv-adapter-sdxl", "encoder"])
        reference = next(part.reference for part in unet.attn_processors.values() if hasattr(part, "reference"))

        def run(count, more):
            told = {"text_embeds": torch.empty(count, 1280), "time_ids": torch.empty(count, 6)}
            return unet(torch.empty(count, 4, 96, 96), torch.empty(()), torch.empty(count, 77, 2048), added_cond_kwargs=told, **more).sample

        reference.looking = True
        run(1, {})
        reference.looking = False
        assert len(reference.seen) == 70
        cameras = hints(torch.empty(6, 6, 768, 768))
        assert run(6, {"down_intrablock_additional_residuals": cameras}).shape == (6, 4, 96, 96)
        assert not cameras  # all four were used


def test_each_registry_entry_that_kiln_makes_a_network_of_has_a_manifest():
    known = {part["entry"] for part in MANIFESTS}
    elsewhere = {
        "wan2.1-orbit-lora",  # no network of its own: below
        "isnet-general-use",  # an ONNX graph, which rembg runs
        "lpips-vgg-linear",  # 1472 numbers, which Kiln ships
    }
    for one in weights.entries().values():
        assert one.bundled or one.id in known | elsewhere, one.id


@pytest.mark.parametrize("names", ["lora_A lora_B", "lora_down lora_up"])
def test_a_lora_of_wans_names_fits_the_transformer(names):
    """Orbit LoRAs are published with the names of Wan's own code (diffusion-pipe's `lora_A`, kohya's `lora_down`); diffusers brings them
    into those of its transformer, all of them, and with fitting shapes."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers

    part = next(part for part in MANIFESTS if part["part"] == "transformer" and part["entry"].startswith("wan"))
    with torch.device("meta"):
        down, up = names.split()
        wide = {"ffn.0": (5120, 13824), "ffn.2": (13824, 5120)}
        layers = [f"{kind}_attn.{at}" for kind in ("self", "cross") for at in "qkvo"] + ["cross_attn.k_img", "cross_attn.v_img", *wide]
        published = {}
        for block in range(40):
            for layer in layers:
                into, out = wide.get(layer, (5120, 5120))
                published[f"diffusion_model.blocks.{block}.{layer}.{down}.weight"] = torch.empty(32, into)
                published[f"diffusion_model.blocks.{block}.{layer}.{up}.weight"] = torch.empty(out, 32)
        converted = _convert_non_diffusers_wan_lora_to_diffusers(dict(published))
    shapes = layout(part, build(part))
    assert len(converted) == len(published) == 2 * 40 * 12
    for name, tensor in converted.items():
        module, side = name.removeprefix("transformer.").rsplit(".lora_", 1)
        out, into = shapes[f"{module}.weight"]
        assert tuple(tensor.shape) == ((32, into) if side == "A.weight" else (out, 32)), name
