"""Kiln in Blender: renders a selected object, has the backend make an asset of it, and brings that back. Scripts enter by `api.py`."""

from . import api, models, operators, panel, preferences, properties, session

PARTS = (properties, preferences, session, operators, panel, models)

__all__ = ["api", "register", "unregister"]


def register():
    for part in PARTS:
        part.register()


def unregister():
    for part in reversed(PARTS):
        part.unregister()
