# environment: blender
"""`animate` on every animated object of a folder: its longest clip, 24 frames, 8 views a frame at 256 px, preset standard. Prints the table
of RESULTS.md.

The objects are not part of this repository: `--assets DIR` names a folder of GLB files (default: ../shared/assets/animated).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench_assets import print_table, report_of

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
    flags = ["--recipe", "animate", "--preset", a.preset, "--frames", str(a.frames)]
    flags += [part for pair in a.set for part in ("--set", pair)]
    reports = {file.stem: report_of(file, a.out, flags) for file in files}
    print_table(reports, COLUMNS)
    if a.json:
        a.json.write_text(json.dumps(reports, indent=1, allow_nan=False), encoding="utf-8")


if __name__ == "__main__":
    main()
