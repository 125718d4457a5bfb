# environment: blender
"""`animate` on every animated object of a folder: its longest clip, 24 frames, 8 views a frame at 256 px, preset standard. Prints the table
of RESULTS.md.

The objects are not part of this repository: `--assets DIR` names a folder of GLB files (default: ../shared/assets/animated).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from bench_assets import shown

HERE = Path(__file__).resolve().parent
COLUMNS = (
    "splats_psnr mesh_psnr armature_psnr flicker f1 f1_worst f05 chamfer tracking_error tracking_error_95 fastest bones armature_error "
    "faces splats total_seconds peak_memory"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=HERE.parent.parent / "shared" / "assets" / "animated")
    parser.add_argument("--out", type=Path, default=HERE.parent / "demo" / "motion")
    parser.add_argument("--preset", default="standard")
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a recipe parameter, such as fit.nodes=500")
    parser.add_argument("--only", help="asset names, comma separated")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    files = [file for file in sorted(a.assets.glob("*.glb")) if not a.only or file.stem in a.only.split(",")]
    if not files:
        sys.exit(f"No GLB files in {a.assets}: name a folder with --assets.")
    reports = {}
    for file in files:
        out = a.out / file.stem
        flags = ["--recipe", "animate", "--preset", a.preset, "--frames", str(a.frames)]
        flags += [part for pair in a.set for part in ("--set", pair)]
        subprocess.run(
            [sys.executable, str(HERE / "demo.py"), "--object", str(file), "--out", str(out), *flags], check=True, env=os.environ
        )
        reports[file.stem] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    columns = [column for column in COLUMNS if all(report.get(column) is not None for report in reports.values())]
    print("| asset | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    for name, report in reports.items():
        print(f"| {name} | " + " | ".join(shown(report[column]) for column in columns) + " |")
    medians = [statistics.median(float(report[column]) for report in reports.values()) for column in columns]
    print("| **median** | " + " | ".join(shown(value) for value in medians) + " |")
    if a.json:
        a.json.write_text(json.dumps(reports, indent=1, allow_nan=False), encoding="utf-8")


if __name__ == "__main__":
    main()
