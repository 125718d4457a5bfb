# environment: blender
"""What a capture costs: seconds and bytes a view of the colour alone, and with each kind of passes beside it.

Each row is one subject at one size. The captures of a row run in turn, `--rounds` times over, and the least processor time of each counts,
so that ratios hold on a busy machine. One warm capture comes first: Cycles loads its kernels then.

    python build.py bench capture [--json FILE] [--assets DIR] [--sizes 256,512,1024]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import demo  # before bpy: it keeps the user's own preferences out

import bpy  # isort: skip

SCRATCH = demo.SCRATCH
KINDS = {
    "colour": {"geometry": False, "materials": False},
    "+ depth, normals": {"geometry": True, "materials": False},
    "+ materials": {"geometry": True, "materials": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, help="a folder of GLB files to measure too")
    parser.add_argument("--only", help="asset names, comma separated")
    parser.add_argument("--sizes", default="256,512,1024")
    parser.add_argument("--views", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    demo.blender_prints_to(SCRATCH / "blender.log")
    files = sorted(a.assets.glob("*.glb")) if a.assets else []
    if a.only:
        files = [file for file in files if file.stem in a.only.split(",")]
    _, capture, recipes = demo.extension()
    rows = []
    heads = "subject", "pixels", "views hold", "seconds", "ratio", "processor seconds", "ratio", "kB", "ratio"
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for make in [built_in, lambda: glowing(built_in()), *[lambda file=file: imported(file) for file in files]]:
        for size in (int(size) for size in a.sizes.split(",")):
            bpy.ops.wm.read_homefile(use_factory_startup=True, use_empty=True)
            rows += measured(capture, recipes, *make(), size, a.views, a.rounds)
    if a.json:
        a.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def built_in() -> tuple[str, list[bpy.types.Object]]:
    return "built-in", [demo.built_in_object()]


def glowing(subject: tuple[str, list[bpy.types.Object]]) -> tuple[str, list[bpy.types.Object]]:
    """The same with emission everywhere."""
    for thing in subject[1]:
        shader = thing.active_material.node_tree.nodes["Principled BSDF"]
        shader.inputs["Emission Color"].default_value, shader.inputs["Emission Strength"].default_value = (1, 0.5, 0.2, 1), 2.0
    return subject[0] + ", emitting", subject[1]


def imported(path: Path) -> tuple[str, list[bpy.types.Object]]:
    return path.stem, demo.import_object(path)


def measured(capture, recipes, name: str, things: list[bpy.types.Object], size: int, views: int, rounds: int) -> list[dict]:
    """A row for each of KINDS, of one view in times and bytes; prints them."""
    bpy.context.view_layer.update()
    subject = capture.subject(bpy.context, objects=things)
    least: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for kind, flags in KINDS.items():
            folder = SCRATCH / "views"
            shutil.rmtree(folder, ignore_errors=True)
            if number == 0 and kind != "colour":
                continue
            started, before = time.perf_counter(), os.times()
            demo.views_of(capture, subject, recipes.Capture(views=views, size=size, holdout=0, **flags), folder)
            after = os.times()
            spent = [time.perf_counter() - started, after.user + after.system - before.user - before.system]
            written = [sum(path.stat().st_size for path in folder.iterdir())]
            if number > 0:
                least[kind] = [min(pair) for pair in zip([*spent, *written], least.get(kind, [*spent, *written]), strict=True)]
    rows = []
    base = least["colour"]
    for kind, values in least.items():
        cells = []
        for value, first, scale, digits in zip(values, base, (1, 1, 1000), (3, 3, 1), strict=True):
            cells += [f"{value / views / scale:.{digits}f}", f"{value / first:.2f}"]
        print(f"| {name} | {size} | {kind} | " + " | ".join(cells) + " |")
        seconds, processor, size_bytes = (value / views for value in values)
        rows.append({"subject": name, "size": size, "kind": kind, "seconds": seconds, "processor_seconds": processor, "bytes": size_bytes})
    return rows


if __name__ == "__main__":
    try:
        main()
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)
