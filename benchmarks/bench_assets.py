# environment: blender
"""The main job on every static object of a folder: 24 views at 256 px, preset standard, all in one backend. Prints the table of RESULTS.md.

The objects are not part of this repository: `--assets DIR` names a folder of GLB files (default: ../shared/assets/static).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
COLUMNS = (
    "splats_psnr splats_psnr_white mesh_psnr mesh_psnr_white f1 f05 chamfer watertight hidden source_hidden faces bounds_error "
    "roughness_error metallic_error normal_error charts texture_use total_seconds peak_memory"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=HERE.parent.parent / "shared" / "assets" / "static")
    parser.add_argument("--out", type=Path, default=HERE.parent / "demo" / "assets")
    parser.add_argument("--preset", default="standard")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--views", type=int, default=24)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a recipe parameter, such as surface.faces=80000")
    parser.add_argument("--only", help="asset names, comma separated")
    parser.add_argument("--keep-views", type=Path, metavar="DIR", help="leave each object's views in DIR/NAME, for bench fit")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    files = sorted(a.assets.glob("*.glb"))
    if a.only:
        files = [file for file in files if file.stem in a.only.split(",")]
    if not files:
        sys.exit(f"No GLB files in {a.assets}: name a folder with --assets.")
    reports = {}
    for file in files:
        flags = ["--set", f"capture.size={a.size}", "--set", f"capture.views={a.views}", "--preset", a.preset]
        flags += [part for pair in a.set for part in ("--set", pair)]
        flags += ["--keep-views", str(a.keep_views / file.stem)] if a.keep_views else []
        reports[file.stem] = report_of(file, a.out, flags)
    print_table(reports, COLUMNS)
    if a.json:
        a.json.write_text(json.dumps(reports, indent=1, allow_nan=False), encoding="utf-8")


def report_of(file: Path, out: Path, flags: list[str]) -> dict:
    """The demo's report of one object."""
    command = [sys.executable, str(HERE / "demo.py"), "--object", str(file), "--out", str(out / file.stem), *flags]
    subprocess.run(command, check=True, env=os.environ)
    return json.loads((out / file.stem / "report.json").read_text(encoding="utf-8"))


def print_table(reports: dict[str, dict], names: list[str]) -> None:
    """A row for each object and one of medians, of the figures that all reports have."""
    columns = [column for column in names if all(report.get(column) is not None for report in reports.values())]
    print("| asset | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    for name, report in reports.items():
        print(f"| {name} | " + " | ".join(shown(report[column]) for column in columns) + " |")
    medians = [statistics.median(float(report[column]) for report in reports.values()) for column in columns]
    print("| **median** | " + " | ".join(shown(value) for value in medians) + " |")


def shown(value: float | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if abs(value) > 1e8:  # bytes
        return f"{value / 1e9:.2f} GB"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"


if __name__ == "__main__":
    main()
