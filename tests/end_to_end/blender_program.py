"""The `blender` program by the bpy wheel, for where no Blender is installed: those of its arguments that examples/ uses, with the same
effects and exit codes. Kiln's extension is installed in the user folder that BLENDER_USER_RESOURCES names.

    python blender_program.py [-b] [FILE.blend] [--python SCRIPT -- WORDS | --command kiln WORDS]
"""

import os
import runpy
import sys

import bpy

bpy.ops.preferences.addon_refresh()
bpy.ops.preferences.addon_enable(module="bl_ext.user_default.kiln")  # a real Blender reads from its preferences that it is on


def main(words: list[str]) -> int:
    while words:
        word = words.pop(0)
        if word == "--command":
            from bl_ext.user_default.kiln import commands

            name, *rest = words
            assert name == "kiln"
            return commands.main(rest)
        if word == "--python":
            runpy.run_path(words[0], run_name="__main__")
            return 0
        if word != "-b":
            bpy.ops.wm.open_mainfile(filepath=word)
    return 0


try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code if isinstance(end.code, int) else 1 if end.code else 0
bpy.ops.preferences.addon_disable(module="bl_ext.user_default.kiln")
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # bpy 4.2 crashes when it is taken down after its glTF exporter has run
