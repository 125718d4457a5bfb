"""Generators by name: one is loaded at a time and stays for the next job."""

from __future__ import annotations

from backend.progress import Progress, silent
from protocol.errors import KilnError

from .turntable import Turntable


def load(model: str, progress: Progress = silent) -> Turntable:
    """The generator `model` of the registry, ready to run. Raises KilnError: no-weights."""
    raise KilnError("no-weights", f"{model} cannot be loaded.")
