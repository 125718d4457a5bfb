"""Makes an asset with Blender as a Python module: no Blender is installed, `pip install bpy` is all.

    python examples/with_bpy.py kiln-0.1.0.zip assets/suzanne
    python examples/with_bpy.py kiln-0.1.0.zip assets/suzanne '{"preset": "draft", "game.engine": "godot"}'

The zip is the extension (`python build.py package` makes it). KILN_BACKEND_PYTHON names a Python that has the backend, such as
.venv/backend/bin/python of a checkout; without it, `bpy.ops.kiln.set_up_backend()` downloads one.
"""

import json
import sys
from pathlib import Path

import bpy

extension, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
settings = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}

# A module starts with factory settings, so the extension is installed anew: that is a copy of some files.
bpy.ops.extensions.package_install_files(repo="user_default", filepath=str(extension), enable_on_install=True)
from bl_ext.user_default.kiln import api  # noqa: E402 - it is there from now on

bpy.ops.wm.read_homefile(use_empty=True)
bpy.ops.mesh.primitive_monkey_add()

# `run` and its like import what they make; `compute` leaves files alone.
made = api.compute("reconstruct", bpy.context.object, out, **settings)
print(f"{made.name}: {made.figures['faces']:,} faces, {made.figures['mesh_psnr']:.1f} dB, in {made.folder}")
