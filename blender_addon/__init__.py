"""Kiln in Blender: renders a selected object, has the backend make an asset of it, and brings that back. Scripts enter by `api.py`."""

from . import api, batch_panel, commands, models, operators, panel, preferences, properties, session

PARTS = (properties, preferences, session, operators, panel, models, batch_panel, commands)

__all__ = ["api", "register", "unregister"]


def register():
    for part in PARTS:
        part.register()


def unregister():
    for part in reversed(PARTS):
        part.unregister()
