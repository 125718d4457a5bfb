"""What a batch is to make: a FOLDER of assets, or a list in TOML or CSV, as items whose every parameter is checked before anything runs.

What is wrong with one item (a file that is not there, a value out of range) stands in its `error`, and the others go on; a manifest that
cannot be understood as a whole is refused with the file and the line. docs/batch.md shows manifests.
"""

from __future__ import annotations

import csv
import dataclasses
import fnmatch
import glob
import json
import os
import re
import string
import tomllib
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protocol import picture, recipes
from protocol.errors import KilnError

MODELS = (".blend", ".glb", ".gltf", ".obj", ".fbx", ".usd", ".usda", ".usdc", ".usdz", ".ply", ".stl")  # Blender imports these
PRESET = "standard"
LONGEST_NAME = 80  # characters, so that OUT/<name>/<file> stays below what Windows takes
TAKEN_NAMES = ("thumbnails", "cancel", "index", "report")  # in the folder of results
_KEYS = ("file", "name", "recipe", "preset", "object", "collection", "parameters")
_MATERIAL = {  # what a file is -> the inputs that recipes can be given of it
    "model": ("views", "motion"),
    "picture": ("picture",),
    "splats": ("splats",),
    "views": ("views", "motion", "picture"),
}
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Item:
    """One asset to make. What `error` names keeps it from being made."""

    number: int  # in the manifest, from 1
    where: str  # in the manifest: "line 12"
    file: Path  # absolute; a folder where views were captured already
    kind: str  # "model", "picture", "splats" or "views"
    recipe: str
    preset: str
    values: dict[str, Any] = field(default_factory=dict)  # every parameter by its flat name
    pattern: str = ""  # of the name
    name: str = ""  # of the asset and its folder, once `named`
    object: str = ""  # of a .blend: objects by pattern
    collection: str = ""  # or collections
    subject: dict[str, str] | None = None  # {"kind": "object" or "collection", "name"}, once it is known
    note: str = ""  # for the report
    error: KilnError | None = None

    @property
    def has_many(self) -> bool:
        """Whether Blender must say which assets the file holds."""
        return self.error is None and self.subject is None and self.file.suffix.lower() == ".blend"


@dataclass(frozen=True)
class Overrides:
    """What the command line says over a manifest; texts are read by the parameter's type."""

    recipe: str = ""
    preset: str = ""
    parameters: dict[str, str] = field(default_factory=dict)
