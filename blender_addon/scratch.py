"""A scene of our own for Blender's operators to work in: in the user's they would change mode, selection and active object."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import bpy


@contextmanager
def scene(context: bpy.types.Context) -> Iterator[bpy.types.Scene]:
    """An empty scene that operators take for the one they are in. Its unit scale is 1. Gone afterwards; what was made in it stays."""
    scratch = bpy.data.scenes.new("Kiln import")
    try:
        with context.temp_override(
            scene=scratch,
            view_layer=scratch.view_layers[0],
            collection=scratch.collection,
            layer_collection=scratch.view_layers[0].layer_collection,
            object=None,
            active_object=None,
            edit_object=None,
            selected_objects=[],
        ):
            yield scratch
    finally:
        bpy.data.scenes.remove(scratch)
