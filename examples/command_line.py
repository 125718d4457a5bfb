"""Makes an asset of each file that is named, by `blender --command kiln`: for shell scripts, build systems and farms.

    python examples/command_line.py assets mug.glb chair.blend --preset draft

What it does for each file is one command, which works in any shell:

    blender --command kiln run mug.glb --preset draft --set surface.faces=2000 --out assets/mug

The exit code says what became of it: 0 all well, 1 failed, 2 wrong usage, 3 no backend, 130 cancelled.
"""

import argparse
import subprocess
import sys
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("out", type=Path)
parser.add_argument("files", type=Path, nargs="+")
parser.add_argument("--preset", default="standard")
parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
parser.add_argument("--blender", default="blender", help="the executable")
given = parser.parse_args()

failed = []
for file in given.files:
    settings = [word for value in given.set for word in ("--set", value)]
    command = [given.blender, "--command", "kiln", "run", file, "--preset", given.preset, *settings, "--out", given.out / file.stem]
    code = subprocess.run(command).returncode
    if code in (2, 3, 130):  # the same would happen to the next one
        sys.exit(code)
    if code:
        failed.append(file.name)
print(f"{len(given.files) - len(failed)} of {len(given.files)} made" + (f"; failed: {', '.join(failed)}" if failed else ""))
sys.exit(1 if failed else 0)
