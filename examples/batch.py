"""Makes the assets that a manifest lists, several stages at once, and says what became of each.

    blender -b --python examples/batch.py -- examples/batch.toml assets
    blender -b props.blend --python examples/batch.py -- assets

The first is what `kiln batch examples/batch.toml --out assets` does, from Python; the second takes the open file's objects. Called again,
it makes only what is missing. docs/batch.md says what manifests hold and what lies in the folder afterwards.
"""

import sys

import bpy
from bl_ext.user_default.kiln import api

words = sys.argv[sys.argv.index("--") + 1 :]
items = words[0] if len(words) > 1 else [thing for thing in bpy.context.scene.objects if thing.type == "MESH"]

results = api.batch(items, out=words[-1])  # raises api.KilnError where nothing can be done at all
for result in results:
    if result.error:
        print(f"{result.name}: [{result.error.code}] {result.error.message}")
    else:
        print(f"{result.name}: {result.figures['faces']:,} faces in {result.folder}")
sys.exit(1 if any(result.error for result in results) else 0)
