"""Splats on their way to the backend: those of an object, as edited and placed, or those of a file, in SPEC.md's "Splats" layout.

Works as `capture.Capture` does, step by step on the main thread. `Subject` is a plain value that may cross threads and undo.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import bpy

from . import splat_files, splat_nodes
from .protocol.errors import KilnError

SUFFIXES = (".ply", ".spz")


@dataclass(frozen=True)
class Subject:
    """Splats to send: names and ids, no references to Blender's data."""

    title: str
    kind: str  # "splats" or "file"
    scene: str
    object: int = 0  # session_uid
    file: Path | None = None
    count: int | None = None  # of splats, where that is known without reading them


def subject(context: bpy.types.Context, thing: bpy.types.Object | None = None, file: str | Path | None = None) -> Subject:
    """The splats of a file, of the given object, or else of the active one. Raises KilnError("nothing-selected" or "bad-subject")."""
    scene = context.scene.name
    if file is not None:
        if not str(file):
            raise KilnError("nothing-selected", "No splat file is chosen.", "Choose a .ply or .spz file, or use the active object.")
        path = Path(bpy.path.abspath(str(file)))
        if path.suffix.lower() not in SUFFIXES:
            raise KilnError("bad-subject", f"{path.name} is no splat file.", "Choose a .ply or .spz file.")
        return Subject(path.stem, "file", scene, file=path)
    thing = thing or context.view_layer.objects.active
    if thing is None:
        hint = "Import splats and select them, or choose a file."
        raise KilnError("nothing-selected", "No splats are selected.", hint)
    if not splat_nodes.is_splats(thing):
        hint = "Select splats that Kiln made or imported, or choose a file."
        raise KilnError("bad-subject", f"{thing.name} does not hold splats.", hint)
    return Subject(thing.name, "splats", scene, object=thing.session_uid, count=len(thing.data.vertices))


class Export:
    """Writes a subject's splats to `folder`. `step()` does a little and returns whether more is to do; `finish()` returns the outcome.

    steps, done: parts of the work altogether, and so far.
    """

    def __init__(self, subject: Subject, folder: Path):
        """Raises KilnError("bad-input") for a file that is not there."""
        self.subject, self.folder = subject, Path(folder)
        self.steps, self.done = (0 if subject.file else 2), 0
        self._points: splat_files.Points | None = None
        self._path = subject.file or self.folder / "splats.ply"
        if subject.file and not subject.file.is_file():
            raise KilnError("bad-subject", f"There is no file {subject.file}.", "Choose another one.")
        self._source = self._place()

    def step(self) -> bool:
        if self.done == self.steps:
            return False
        if self._points is None:
            self._points = splat_nodes.points_of(self._thing())
        else:
            splat_files.write_ply(self._path, self._points)
        self.done += 1
        return self.done < self.steps

    def finish(self) -> tuple[dict[str, Path], dict]:
        """The job's one input, by its name, and its source: a JSON map of what import_asset needs to place and name the result."""
        if self.done < self.steps:
            raise RuntimeError("finish() comes after the last step()")
        count = len(self._points) if self._points else None
        with open(self._path, "rb") as file:
            fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
        return {f"splats{self._path.suffix.lower()}": self._path}, {**self._source, "fingerprint": fingerprint, "splats": count}

    def close(self) -> None:
        """Given up: the folder is its maker's to remove."""

    def _thing(self) -> bpy.types.Object:
        found = next((thing for thing in bpy.data.objects if thing.session_uid == self.subject.object), None)
        if found is None:
            raise KilnError("subject-changed", f"{self.subject.title} was removed.", "Select the splats again and start anew.")
        return found

    def _place(self) -> dict:
        """Where the result is to come in: its own frame is the object's. A file's splats stand in the world as they are."""
        scene = bpy.data.scenes[self.subject.scene]
        place = {"location": [0.0, 0.0, 0.0], "rotation": [1.0, 0.0, 0.0, 0.0]}
        name = ""
        if self.subject.object:
            thing = self._thing()
            name = thing.name
            location, rotation, _ = thing.matrix_world.decompose()
            place = {"location": list(location), "rotation": list(rotation)}
        return {
            "title": self.subject.title,
            "kind": self.subject.kind,
            "object": name,
            "collection": "",
            "scene": scene.name,
            **place,
            "unit_scale": scene.unit_settings.scale_length,
            "frame": scene.frame_current,
            "blender": bpy.app.version_string,
        }
