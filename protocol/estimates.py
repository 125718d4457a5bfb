"""What a job will take, before it runs: seconds and memory from a cost model of its stages.

Each stage costs a sum of terms, a constant times a quantity of the recipe's parameters. The constants are those of two quiet cores
(`python build.py bench estimates` measures and prints them); a machine's speed, one number, scales the seconds that the backend spends.
The extension learns that number from the jobs that the backend has done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from . import recipes

Values = dict[str, Any]  # a recipe's parameters by their flat names


class Estimate(NamedTuple):
    seconds: float  # from the button to the imported asset
    bytes: float  # of memory that the computing process holds at most


SPLATS = 200_000  # of an input whose number is not known yet
LOOKS = 48  # pictures of splats, to make a mesh of what was generated
SERIAL = 0.25  # share of the work that more cores do not speed up


class Model(NamedTuple):
    """What generates views."""

    side: int  # pixels of a view
    seconds: float  # of an evaluation on two quiet cores
    gpu_seconds: float  # of one on a GPU that holds it
    bytes: float  # that it takes of main memory where there is no GPU


MODELS = {
    "kiln-tiny-turntable": Model(64, 0.4, 0.02, 1.2e9),
    "mv-adapter-sdxl": Model(768, 150, 0.8, 15e9),
    "sv3d-p": Model(576, 200, 1.0, 10e9),
    "wan2.1-orbit": Model(480, 12_000, 8.0, 45e9),
}

# What costs grow with. `count`, `size`: pictures to look at and their width, captured or taken of splats.
QUANTITIES: dict[str, Callable[[Values], float]] = {
    "job": lambda v: 1,
    "views": lambda v: v["count"],
    "frames": lambda v: v["frames"],  # of a moving subject
    "megapixels of a frame": lambda v: v["count"] * v["size"] ** 2 / 1e6 / v["frames"],
    "frames x kilosplats": lambda v: v["frames"] * v["splats"] / 1e3,
    "fitted megapixels": lambda v: min(v["count"] * v["size"] ** 2 / 1e6, 53),  # a moving fit keeps no more of them prepared
    "baked megapixels": lambda v: min(v["count"] * v["size"] ** 2 / 1e6, 30),  # nor looks its bake at more
    "frames x nodes": lambda v: v["frames"] * v["fit.nodes"],
    "frames x kilofaces": lambda v: v["frames"] * v["surface.faces"] / 1e3,
    "megapixels": lambda v: v["count"] * v["size"] ** 2 / 1e6,  # of all views
    "generated megapixels": lambda v: v["generate.views"] * MODELS[v["generate.model"]].side ** 2 / 1e6,
    "seconds of the model": lambda v: evaluations(v) * MODELS[v["generate.model"]].seconds,
    "seconds of the model on a GPU": lambda v: evaluations(v) * MODELS[v["generate.model"]].gpu_seconds,
    "bytes of the model": lambda v: MODELS[v["generate.model"]].bytes,
    "iterations x generated megapixels": lambda v: v["fit.iterations"] * MODELS[v["generate.model"]].side ** 2 / 1e6,
    "moves of the surface": lambda v: v["refine.on"] * v["refine.iterations"] * v["refine.grid"] ** 2 / 1e6,
    "rendered megapixels": lambda v: v["count"] * v["size"] ** 2 / 1e6 * v.get("capture.samples", 0) / 16,
    "iterations": lambda v: v["fit.iterations"],
    "iterations x megapixels": lambda v: v["fit.iterations"] * v["size"] ** 2 / 1e6,  # of one view: each step draws one
    "iterations x kilosplats": lambda v: v["fit.iterations"] * v["splats"] / 1e3,
    "kilosplats": lambda v: v["splats"] / 1e3,
    "views x kilosplats": lambda v: v["count"] * v["splats"] / 1e3,
    "megacells": lambda v: recipes.cells(v["surface.grid"], v["surface.faces"]) ** 3 / 1e6,
    "surface kilocells": lambda v: recipes.cells(v["surface.grid"], v["surface.faces"]) ** 2 / 1e3,  # on the surface
    "kilofaces": lambda v: v["surface.faces"] / 1e3,
    "megatexels": lambda v: v["texture.size"] ** 2 / 1e6,
    "levels x kilofaces": lambda v: v["game.lods"] * v["surface.faces"] / 1e3,
    "hulls": lambda v: v["game.hulls"],
}

# Seconds on two quiet cores, by stage and quantity. Stages in IN_BLENDER run there, at that computer's speed.
SECONDS: dict[str, dict[str, float]] = {
    "capture": {
        "views": 0.16,  # a render's fixed cost: depth, normals and materials beside the colour
        "rendered megapixels": 0.5,  # colour at 16 samples
        "megapixels": 0.25,  # reading and compressing the exact passes
    },
    "export": {
        "kilosplats": 0.002,  # reading the object, writing the file
    },
    "read": {
        "job": 0.1,  # the worker picks the job up
        "megapixels": 0.06,  # PNG and npz
    },
    "fit": {
        "iterations": 0.1e-3,  # what a step costs with nothing to draw
        "iterations x megapixels": 0.07,  # forward, loss and backward per pixel
        "iterations x kilosplats": 0.11e-3,  # projection, binning and Adam per splat
    },
    "fit on a GPU": {
        "job": 3.0,  # torch and the kernels come up
        "iterations": 4.0e-3,
        "iterations x megapixels": 2.0e-3,
    },
    "generate": {
        "job": 12.0,  # libraries and weights come up
        "seconds of the model": 1.0,
    },
    "generate on a GPU": {
        "job": 20.0,
        "seconds of the model on a GPU": 1.0,
    },
    "fit to pictures": {
        "iterations": 20e-3,  # features of small pictures
        "iterations x generated megapixels": 2.0,
        "iterations x kilosplats": 0.3e-3,
    },
    "fit to pictures on a GPU": {
        "job": 3.0,
        "iterations": 15e-3,
        "iterations x generated megapixels": 20e-3,
    },
    "move": {
        "job": 0.1,
        "moves of the surface": 50.0,
    },
    "follow": {
        "megapixels": 0.5,  # the surfaces that the nodes are drawn to
        "frames": 0.5,
        "frames x nodes": 1.0e-3,  # the equations that move them
    },
    "armature": {
        "frames x kilofaces": 0.05,
    },
    "look": {
        "views x kilosplats": 0.11e-3,  # drawing each picture once
        "megapixels": 0.065,
    },
    "extract": {
        "job": 0.05,
        "megapixels": 0.14,  # visibility of the cells in every view
        "surface kilocells": 0.02,  # marching cubes, smoothing, and decimation from that many triangles
    },
    "extract a frame": {
        "job": 0.05,
        "megapixels of a frame": 0.14,
        "surface kilocells": 0.02,
    },
    "bake": {
        "job": 0.4,
        "kilofaces": 0.2,  # charts
        "megatexels": 1.9,  # rasterising and solving the texture
        "megapixels": 0.3,  # every view is looked up
    },
    "bake in time": {
        "job": 0.4,
        "kilofaces": 0.2,
        "megatexels": 1.9,
        "baked megapixels": 0.3,
    },
    "measure": {
        "views": 0.004,
        "megapixels": 0.06,
    },
    "game": {
        "job": 1.0,
        "levels x kilofaces": 0.02,
        "hulls": 0.4,  # cutting and merging; shapes of thin parts take several times as long
        "megatexels": 2.0,  # looking the dense surface up, where views have no normals
    },
    "import": {
        "job": 0.5,  # transfer and Blender's importer
        "megatexels": 0.1,
    },
}

# Bytes that a stage holds at most, by stage and quantity; `base` is held in all of them.
BYTES: dict[str, dict[str, float]] = {
    "base": {
        "job": 0.46e9,  # Python, numba with its compiled kernels, and torch, which tells the worker of GPUs
        "megapixels": 17e6,  # the views: colour, alpha, depth, normals and materials
    },
    "fit": {
        "kilosplats": 0.1e6,  # parameters, gradients, moments
        "megapixels": 58e6,  # what is precomputed of each view
    },
    "generate": {
        "bytes of the model": 1.0,
        "kilosplats": 0.1e6,  # their renders go back to it
    },
    "fit to pictures": {
        "kilosplats": 0.1e6,
        "generated megapixels": 250e6,  # features of each view
    },
    "look": {
        "kilosplats": 0.3e6,
        "megapixels": 5e6,
    },
    "extract": {
        "megacells": 8e6,  # blocks of the grid near the surface
        "surface kilocells": 1.2e6,  # triangles before decimation
        "megapixels": 46e6,  # distances from each view's outline
    },
    "bake": {
        "megatexels": 180e6,  # positions, weights and colours of each texel
        "megapixels": 40e6,
        "kilofaces": 1e6,  # charts
    },
    "measure": {
        "megapixels": 62e6,  # pictures of splats and mesh beside the views
    },
    # Of what moves, all views stay for all stages, with more of each than what `base` counts
    "fit in time": {
        "kilosplats": 0.1e6,
        "frames x kilosplats": 0.15e6,  # where each is at each moment, and its moments of Adam
        "megapixels": 12e6,
        "fitted megapixels": 20e6,
    },
    "extract a frame": {
        "megacells": 8e6,
        "surface kilocells": 1.2e6,
        "megapixels": 12e6,
        "megapixels of a frame": 46e6,
    },
    "bake in time": {
        "megatexels": 180e6,
        "megapixels": 12e6,
        "baked megapixels": 40e6,
        "kilofaces": 1e6,
    },
}

STAGES = {"reconstruct": ("capture", "read", "fit", "extract", "bake", "measure", "import"),
          "animate": ("capture", "read", "follow", "fit in time", "extract a frame", "bake in time", "armature", "measure in time",
                      "import"),
          "mesh_splats": ("export", "read", "look", "extract", "bake", "measure", "import"),
          "im3d": ("read", "generate", "fit to pictures", "look", "extract", "move", "bake", "measure", "import")}  # fmt: skip
GAME = ("game",)  # where an engine's file is asked for
AT_FIRST = ("read", "generate")  # of a job that stops after its views
IN_BLENDER = ("capture", "export", "import")


def stage_seconds(recipe: str, values: Values, gpu: bool = False, splats: int | None = None) -> dict[str, float]:
    """Seconds of each stage on two quiet cores. splats: how many the input has, for recipes that start from them."""
    quantities = known(recipe, values, splats)
    where = " on a GPU" if gpu and values.get("fit.device") != "cpu" else ""
    stages = AT_FIRST if values.get("generate.only") else STAGES[recipe] + (GAME if values.get("game.engine", "none") != "none" else ())
    named = {stage: stage if stage in SECONDS else stage.removesuffix(" in time") for stage in stages}
    return {stage: _sum(SECONDS.get(name + where, SECONDS[name]), quantities) for stage, name in named.items()}


def backend_seconds(recipe: str, values: Values, gpu: bool = False, splats: int | None = None) -> float:
    """What the backend spends of `estimate`'s seconds, on two quiet cores."""
    return sum(seconds for stage, seconds in stage_seconds(recipe, values, gpu, splats).items() if stage not in IN_BLENDER)


def blender_seconds(recipe: str, values: Values, splats: int | None = None) -> float:
    """What Blender spends of `estimate`'s seconds."""
    return sum(seconds for stage, seconds in stage_seconds(recipe, values, False, splats).items() if stage in IN_BLENDER)


def peak_bytes(recipe: str, values: Values, splats: int | None = None) -> float:
    """Memory that the computing process holds at most. A fit on a GPU needs less of it; that is not counted off."""
    quantities = known(recipe, values, splats)
    return _sum(BYTES["base"], quantities) + max(_sum(BYTES[stage], quantities) for stage in STAGES[recipe] if stage in BYTES)


def estimate(recipe: str, values: Values, speed: float = 1.0, gpu: bool = False, splats: int | None = None) -> Estimate:
    """What a job of `recipe` with all of its parameters will take.

    speed: of the backend's machine, with two quiet cores as 1. gpu: whether it fits on an NVIDIA GPU. splats: as in `stage_seconds`.
    """
    seconds = backend_seconds(recipe, values, gpu, splats) / speed + blender_seconds(recipe, values, splats)
    return Estimate(seconds, peak_bytes(recipe, values, splats))


def speed_of(device: dict[str, Any]) -> float:
    """A first guess at a machine's speed from its number of cores (Amdahl's law), until its own jobs tell better."""
    cores = device.get("cores") or 2
    return 1 / (SERIAL + (1 - SERIAL) * 2 / cores)


def evaluations(values: Values) -> float:
    """Of the model that generates views, over the whole job; those with guidance are pairs."""
    again = 0 if values["generate.only"] else values["iterate.rounds"] * values["iterate.steps"]
    return 2 * (values["generate.steps"] + again)


def known(recipe: str, values: Values, splats: int | None) -> Values:
    """The parameters, with the numbers that recipes name differently under one name."""
    if recipes.recipe_named(recipe).INPUT == "picture":
        side = min(1024, max(256, 2 * MODELS[values["generate.model"]].side))
        return {**values, "count": LOOKS, "size": side, "splats": values["fit.splats"]}
    if recipes.recipe_named(recipe).INPUT == "splats":
        return {**values, "count": values["look.count"], "size": values["look.size"], "splats": splats or SPLATS}
    views = values["capture.views"] + values["capture.holdout"]
    if recipes.recipe_named(recipe).INPUT == "motion":
        frames = max(1, (values["capture.frame_end"] - values["capture.frame_start"]) // values["capture.frame_step"] + 1)
        return {**values, "count": frames * views, "frames": frames, "size": values["capture.size"], "splats": values["fit.splats"]}
    return {**values, "count": views, "size": values["capture.size"], "splats": values["fit.splats"]}


def _sum(terms: dict[str, float], values: Values) -> float:
    return sum(each * QUANTITIES[quantity](values) for quantity, each in terms.items())
