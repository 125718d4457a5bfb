"""Makes an asset of every object that is selected in a .blend file, beside it, and saves all that under a new name.

    blender -b props.blend --python examples/in_blender.py -- assets.blend
    blender -b props.blend --python examples/in_blender.py -- assets.blend '{"preset": "draft", "surface.faces": 2000}'

Kiln is installed in this Blender, and its backend is set up (`blender --online-mode --command kiln setup`). In the text editor of a Blender
with a window the same lines work; the window waits meanwhile.
"""

import json
import sys

import bpy
from bl_ext.user_default.kiln import api

words = sys.argv[sys.argv.index("--") + 1 :]  # what comes before is Blender's
target, settings = words[0], json.loads(words[1]) if len(words) > 1 else {}

failed = 0
for thing in [thing for thing in bpy.context.selected_objects if thing.type == "MESH"]:
    try:
        made = api.reconstruct(thing, **settings)
    except api.KilnError as error:  # .code is for scripts, .message and .hint are for people
        print(f"{thing.name}: [{error.code}] {error.message} {error.hint}")
        failed += 1
        continue
    made.mesh_object.location.x += 1.5 * made.mesh_object.dimensions.x
    print(f"{thing.name}: {len(made.mesh_object.data.polygons):,} faces in the collection {made.collection.name}")

bpy.ops.wm.save_as_mainfile(filepath=target)
sys.exit(1 if failed else 0)
