# environment: blender
"""How long Kiln holds Blender's main thread while a result comes: the timer's ticks from submission to the fetched files, then the import.

    python build.py bench session [--preset standard] [--rounds 3] [--json FILE]

The bars: 99.9 % of the ticks within 4 ms; the import, a step of its own, within 300 ms for 20,000 faces.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import demo  # before bpy: it keeps the user's own preferences out

import bpy  # isort: skip

PAUSE = 0.01  # seconds between ticks, ten times as often as Blender's timer has them: more chances to meet what is slow


def main() -> None:
    parser = argparse.ArgumentParser(prog="build.py bench session", description=__doc__)
    parser.add_argument("--preset", default="standard")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    api, capture, recipes = demo.extension()
    from bl_ext.checkout.kiln import session

    thing = demo.built_in_object()
    ticks, imports, faces = [], [], []
    for number in range(given.rounds):
        subject = capture.subject(bpy.context, objects=[thing])
        recipe = recipes.make("reconstruct", {"seed": number}, given.preset)
        job = session.Shoot(subject, recipe).all_at_once()
        job.wants_import = False
        asked = False
        while job.results is None:
            start = time.perf_counter()
            session.current.tick()
            ticks.append(time.perf_counter() - start)
            assert job.state not in ("failed", "cancelled"), job.data["error"]
            if job.state == "done" and not asked:
                asked = True
                session.current.fetch(job)
            time.sleep(PAUSE)
        start = time.perf_counter()
        made = session.current.import_results(bpy.context, job)
        imports.append(time.perf_counter() - start)
        faces.append(len(made.mesh_object.data.polygons))
    ticks.sort()
    found = {
        "ticks": len(ticks), "median": ticks[len(ticks) // 2], "99.9 %": ticks[int(0.999 * len(ticks))], "worst": ticks[-1],
        "imports": imports, "faces": faces,
    }  # fmt: skip
    print("\n| ticks | median | 99.9 % | worst |\n|---|---|---|---|")
    print(f"| {len(ticks)} | " + " | ".join(f"{1000 * found[name]:.2f} ms" for name in ("median", "99.9 %", "worst")) + " |")
    print("\n| faces | import |\n|---|---|")
    for count, seconds in zip(faces, imports, strict=True):
        print(f"| {count} | {1000 * seconds:.0f} ms |")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))
    shutil.rmtree(demo.SCRATCH, ignore_errors=True)


if __name__ == "__main__":
    main()
