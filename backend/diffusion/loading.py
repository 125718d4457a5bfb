"""Generators by name. One is loaded at a time, onto the device and at the precision that the memory plan of weights.py says, and stays for
the next job; the worker releases it when it has been idle for a while or when Blender renders.

Weights come from local folders in diffusers' layout, as safetensors only. The classes that a folder's model_index.json names are looked up
in a list of this file, never imported from the folder: no remote code, no pickles, nothing from the network.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from backend import weights
from backend.progress import Progress, silent
from protocol.errors import KilnError

# What a folder may be made of. A tokenizer of any class is opened by transformers' AutoTokenizer, which knows its own alone.
CLASSES = {
    "diffusers": {
        "AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLTemporalDecoder", "AutoencoderKLWan", "DDPMScheduler",
        "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler",
        "Flux2Transformer2DModel", "UNet2DConditionModel", "UNetSpatioTemporalConditionModel", "UniPCMultistepScheduler",
        "WanTransformer3DModel",
    },
    "transformers": {
        "CLIPImageProcessor", "CLIPImageProcessorPil", "CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModel",
        "CLIPVisionModelWithProjection", "Qwen3ForCausalLM", "UMT5EncoderModel",
    },
}  # fmt: skip
TOKENIZER = "Tokenizer"  # in the name of every class of tokenizers
WORKING_BYTES = 6_000_000_000  # of a GPU beside the weights: activations of the largest model here and its pictures


class Loaded(Protocol):
    model: str


_warm: Loaded | None = None
_changed: tuple[Path, int, int] | None = None  # by which LoRA's file, of what time and size
_device = ""  # where it is, or was to be
_plan: weights.Plan | None = None


def load(model: str, progress: Progress = silent, lora: Path | None = None) -> Any:
    """The generator of the registry's entry `model`, ready to run; the one that was loaded before makes room for it. Reports the memory
    plan. lora: a file that is added to its weights. Raises KilnError: no-weights, no-model, no-device, out-of-memory (too little is free),
    bad-weights, bad-parameter where the model takes no LoRA."""
    global _warm, _changed, _device, _plan
    one = weights.entry(model)
    change = None if lora is None else (lora.absolute(), lora.stat().st_mtime_ns, lora.stat().st_size)
    if _warm is not None and _warm.model == one.id and _changed == change:
        return _warm
    if lora is not None and one.loader in OPENERS and one.loader not in TAKES_LORA:
        raise KilnError("bad-parameter", f"{one.title} takes no LoRA.", "Choose the model that it was trained on, Wan's or SV3D.")
    release()
    weights.folder(one.id)
    device = compute_device()
    plan = weights.memory_plan(one.id, free_bytes(device), device)
    progress(0.0, f"Loading {one.title} ({plan.sentence})")
    if one.loader not in OPENERS:
        raise KilnError("bad-weights", f"{one.title} makes no pictures.", "Choose one of the models that the recipe lists.")
    _device, _plan = device, plan
    _warm = OPENERS[one.loader](one, device, plan, progress, lora)
    _changed = change
    return _warm


def is_warm() -> bool:
    return _warm is not None


def release() -> None:
    """Gives all memory of the loaded generator back."""
    global _warm
    if _warm is None:
        return
    _warm = None
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def loaded(model: str, progress: Progress = silent, lora: Path | None = None) -> Iterator[Any]:
    """`with loaded(id) as generator`: memory that runs out within ends the attempt, with everything given back and a KilnError
    "out-of-memory" that says what would fit."""
    error: KilnError | None = None
    begun = False
    try:
        generator = load(model, progress, lora)
        begun = True
        yield generator
    except Exception as reason:
        if not ran_out(reason) and not (begun and isinstance(reason, KilnError) and reason.code == "out-of-memory"):
            raise
        error = _out_of_memory(model, reason)
        traceback.clear_frames(reason.__traceback__)  # they hold tensors
    if error is not None:
        release()
        raise error from None


def ran_out(reason: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or in main memory."""
    return isinstance(reason, MemoryError) or type(reason).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(reason)


def _out_of_memory(model: str, reason: BaseException) -> KilnError:
    title, text = weights.entry(model).title, str(reason).strip().partition("\n")[0][:200]
    message = f"{title} ran out of memory{f' on {_device}' if _device else ''}: {text or type(reason).__name__}."
    hint = "Close what else uses the device, or choose a smaller model."
    if _plan is not None:
        try:
            less = weights.memory_plan(model, _plan.bytes - 1, _device)
            way = "offload" if less.offload else less.precision
            gigabytes = less.bytes / 1e9
            hint = (
                f"Close what else uses the device and retry; or start the backend with KILN_DEVICE_GB={gigabytes:.3g}: then it runs as "
                + way
                + (f", about {less.slower:.2g}x slower." if less.slower > 1 else ".")
            )
        except KilnError:
            pass  # it ran in the least memory already
    return KilnError("out-of-memory", message, hint)


def compute_device() -> str:
    """cuda where an NVIDIA or AMD GPU can be used, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def free_bytes(device: str) -> int:
    """What generators may take of the device's memory: what is free, and at most KILN_DEVICE_GB if that is set."""
    if device == "cpu":
        import psutil

        free = int(psutil.virtual_memory().available)
    else:
        import torch

        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    most = os.environ.get("KILN_DEVICE_GB", "")
    return min(free, int(float(most) * 1e9)) if most else free


def dtype(plan: weights.Plan) -> Any:
    """The torch type that weights of a plan are computed with: fp8 is for keeping them alone."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16}.get(plan.precision, torch.bfloat16)


def components(folder: Path, dtypes: dict[str, Any], progress: Progress = silent) -> dict[str, Any]:
    """The parts of a folder in diffusers' layout, by name, on the CPU; parts that model_index.json leaves out are None. dtypes: by part,
    "" for all others. Raises KilnError("bad-weights") for a class that is not in CLASSES and for files that do not fit it."""
    parts = index(folder)
    found: dict[str, Any] = {}
    for number, (name, (library, kind)) in enumerate(parts.items()):
        progress(number / len(parts), f"Loading {name.replace('_', ' ')}")
        found[name] = None if library is None else part(folder / name, library, kind, dtypes.get(name, dtypes[""]))
    return found


def index(folder: Path) -> dict[str, tuple[str | None, str | None]]:
    """The library and class of each part of a folder, all of them in CLASSES."""
    path = folder / "model_index.json"
    try:
        outline = json.loads(path.read_text(encoding="utf-8"))
        parts = {name: tuple(kind) for name, kind in outline.items() if isinstance(kind, list) and not name.startswith("_")}
    except (OSError, ValueError, AttributeError) as error:
        raise KilnError("bad-weights", f"{path} cannot be read: {error}.", "Remove these weights and download them again.") from None
    for name, kind in parts.items():
        _check(path, name, kind)
    return parts


def _check(path: Path, name: str, kind: tuple) -> None:
    if kind == (None, None):
        return
    library, called = kind if len(kind) == 2 else (None, None)
    allowed = called in CLASSES.get(library, ()) or library == "transformers" and isinstance(called, str) and TOKENIZER in called
    if not allowed or not name.isidentifier():
        raise KilnError(
            "bad-weights",
            f"{path} names {'.'.join(map(str, kind))} as its {name}, which Kiln does not load.",
            "Use weights of the registry.",
        )


def part(folder: Path, library: str, kind: str, dtype: Any = None, **more: Any) -> Any:
    """One part of a pipeline out of its folder."""
    import torch

    options: dict[str, Any] = {"local_files_only": True, **more}
    if library == "transformers" and TOKENIZER in kind:
        library, kind = "transformers", "AutoTokenizer"
    loads = getattr(importlib.import_module(library), kind)
    if isinstance(loads, type) and issubclass(loads, torch.nn.Module):
        options |= {"use_safetensors": True, "dtype": dtype}
    try:
        made = loads.from_pretrained(str(folder), **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if ran_out(error):
            raise
        text = str(error).strip().partition("\n")[0][:300]
        raise KilnError(
            "bad-weights", f"{folder.name} of {folder.parent} cannot be loaded: {text}", "Verify or repair these weights."
        ) from error
    return made.eval() if isinstance(made, torch.nn.Module) else made


def settle(pipe: Any, device: str, plan: weights.Plan, large: str) -> bool:
    """Brings a pipeline of components to its device as the plan says: all of it if there is room, else part by part as they work; with
    `plan.offload` even the parts layer by layer. fp8: the weights of the part `large` are kept so. Returns whether everything stays on the
    device."""
    import torch

    if plan.precision == "fp8":
        getattr(pipe, large).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype(plan))
    if device == "cpu":
        return True
    sizes = [_bytes(module) for module in pipe.components.values() if isinstance(module, torch.nn.Module)]
    room = free_bytes(device) - WORKING_BYTES
    if sum(sizes) <= room:
        pipe.to(device)
        return True
    if max(sizes) <= room and not plan.offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        ahead = torch.cuda.is_available()  # the next layer is on its way while one works
        pipe.enable_group_offload(
            torch.device(device), torch.device("cpu"), offload_type="leaf_level", use_stream=ahead, low_cpu_mem_usage=ahead
        )
    return False


def fuse(network: Any, called: str, file: Path) -> None:
    """Adds a LoRA, as `kiln train turntable` saves it, to the weights of a network, which diffusers calls `called`. Raises
    KilnError("bad-weights") where it does not fit all through; the network is then of no use any more."""
    import torch

    def misfit(what: str) -> KilnError:
        return KilnError("bad-weights", f"{file.name} does not fit this model: {what}.", "Use a LoRA that was trained on this very model.")

    layers = tensors(file)
    downs = [name for name in layers if name.endswith(".lora_A.weight")]
    if not downs or 2 * len(downs) != len(layers):
        raise misfit("it is no LoRA of Kiln's")
    for name in downs:
        module = name.removeprefix(f"{called}.").removesuffix(".lora_A.weight")
        down, up = layers[name].float(), layers.get(name.replace(".lora_A.", ".lora_B."))
        try:
            weight = network.get_submodule(module).weight
        except AttributeError:
            raise misfit(f"it has no layer {module}") from None
        if up is None or (up.shape[0], down.shape[1]) != tuple(weight.shape) or up.shape[1] != down.shape[0]:
            raise misfit(f"layer {module} is of another size")
        with torch.no_grad():
            weight.copy_(weight.float() + (up.float() @ down).to(weight.device))


def tensors(file: Path) -> dict[str, Any]:
    """Of a safetensors file; KilnError("bad-weights") where it is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise KilnError("bad-weights", f"{file.name} cannot be read: {error}.", "Give a LoRA as a safetensors file.") from None


# -- Who opens what: each takes an entry, the device, the plan and a LoRA's file or None, and imports what it needs ---------------------


def _wan(one: weights.Entry, device: str, plan: weights.Plan, progress: Progress, lora: Path | None) -> Any:
    from .wan import WanTurntable

    return WanTurntable.open(one.id, device, plan, progress, lora)


def _flux2_klein(one: weights.Entry, device: str, plan: weights.Plan, progress: Progress, lora: Path | None) -> Any:
    from .text_to_image import TextToImage

    return TextToImage.open(one.id, device, plan, progress)


def _sv3d(one: weights.Entry, device: str, plan: weights.Plan, progress: Progress, lora: Path | None) -> Any:
    from .memory import Place
    from .sv3d import load

    return load(weights.folder(one.id) / "sv3d_p.safetensors", Place(device, dtype(plan), plan.offload), progress=progress, lora=lora)


def _mv_adapter(one: weights.Entry, device: str, plan: weights.Plan, progress: Progress, lora: Path | None) -> Any:
    from .memory import Place
    from .mv_adapter import load

    file = weights.folder(one.id) / "mvadapter_i2mv_sdxl.safetensors"
    base, vae = (weights.folder(needed) for needed in one.needs)
    return load(file, base, vae, Place(device, dtype(plan), plan.offload), progress=progress)


OPENERS: dict[str, Callable[[weights.Entry, str, weights.Plan, Progress, Path | None], Any]] = {  # by the `class` that the registry says
    "tiny": _wan,
    "wan": _wan,
    "wan-lora": _wan,
    "sv3d": _sv3d,
    "mv-adapter": _mv_adapter,
    "flux2-klein": _flux2_klein,
}
TAKES_LORA = ("tiny", "wan", "wan-lora", "sv3d")


def _bytes(module: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensors in (module.parameters(), module.buffers()) for tensor in tensors)


@contextlib.contextmanager
def reporting(modules: list[Any], report: Callable[[], None]) -> Iterator[None]:
    """Calls `report` whenever one of these torch modules begins to work: what raises there stops a long evaluation in its middle."""
    handles = [module.register_forward_pre_hook(lambda *_: report()) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
