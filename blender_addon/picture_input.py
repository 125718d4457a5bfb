"""A picture, a turntable or words on their way to the backend, in SPEC.md's "Picture" layout. `Gathering` works as `capture.Capture` does,
step by step on the main thread; `Subject` is a plain value that may cross threads and undo."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import bpy

from .protocol import picture
from .protocol.errors import KilnError

NOT_ONE = {"MOVIE": "a movie", "SEQUENCE": "a sequence of pictures", "TILED": "made of tiles"}  # kinds of images that are not one picture


@dataclass(frozen=True)
class Subject:
    """What an asset is to be made of: names and ids, no references to Blender's data."""

    title: str
    kind: str  # "picture", "image" (of this .blend file), "views" or "prompt"
    scene: str
    file: Path | None = None  # the picture, or the folder of views
    image: int = 0  # session_uid


def subject(
    context: bpy.types.Context, prompt: str, file: str | Path | None = None, image: bpy.types.Image | None = None, views: str | Path = ""
) -> Subject:
    """The file, the image, the folder of views, or without all of these the words. Asks no disk: the panel draws what this says.
    Raises KilnError("nothing-selected" or "bad-subject")."""
    scene = context.scene.name
    if image is not None:
        if image.source in NOT_ONE:
            words = f"{image.name} is {NOT_ONE[image.source]}, not one picture."
            raise KilnError("bad-subject", words, "Save the picture that you mean as a file of its own, and choose that.")
        return Subject(image.name, "image", scene, image=image.session_uid)
    if file:
        path = Path(bpy.path.abspath(str(file)))
        return Subject(path.stem, "picture", scene, file=_checked(picture.named, path))
    if views:
        path = Path(bpy.path.abspath(str(views)))
        return Subject(path.name or path.parent.name, "views", scene, file=path)
    if not prompt.strip():
        hint = "Choose a picture of the subject, or say in the prompt what it is."
        raise KilnError("nothing-selected", "There is neither a picture nor a prompt.", hint)
    return Subject(prompt.strip()[:60], "prompt", scene)


def _checked(check, *given):
    """Whatever protocol.picture says of a file, as of a subject."""
    try:
        return check(*given)
    except KilnError as error:
        raise KilnError("bad-subject", error.message, error.hint) from None


class Gathering:
    """Brings a subject's files together. `step()` does a little and returns whether more is to do; `finish()` returns the outcome.

    steps, done: parts of the work altogether, and so far.
    """

    def __init__(self, subject: Subject, folder: Path):
        """Raises KilnError("bad-subject") for a file that is not there, or of another kind."""
        self.subject, self.folder = subject, Path(folder)
        self._inputs: dict[str, Path] = {}
        self._digest = hashlib.sha256()
        if subject.file:
            turntable = subject.file if subject.kind == "views" else None
            self._inputs = _checked(picture.gather, None if turntable else subject.file, turntable, "")
        if subject.image:
            self._inputs = {"image.png": self.folder / "image.png"}
        self.steps, self.done = max(1, len(self._inputs)), 0
        self._source = self._place()

    def step(self) -> bool:
        if self.subject.image and not self.done:
            save(self._image(), self._inputs["image.png"])
        if self._inputs:  # one file a step: views may be many and large
            name, path = list(self._inputs.items())[self.done]
            self._digest.update(name.encode() + b"\0")
            with open(path, "rb") as file:
                self._digest.update(hashlib.file_digest(file, "sha256").digest())
        self.done += 1
        return self.done < self.steps

    def finish(self) -> tuple[dict[str, Path], dict]:
        """The job's inputs, by their names, and its source: a JSON map of what import_asset needs to place and name the result."""
        if self.done < self.steps:
            raise RuntimeError("finish() comes after the last step()")
        return self._inputs, {**self._source, "fingerprint": self._digest.hexdigest() if self._inputs else ""}

    def shown(self) -> Path | None:
        """A picture of the subject, for the job list."""
        path = next((path for name, path in self._inputs.items() if name.startswith(("image.", "view_000."))), None)
        return path if path and path.stat().st_size < MOST_SHOWN else None

    def close(self) -> None:
        """Given up: the folder is its maker's to remove."""

    def _image(self) -> bpy.types.Image:
        found = next((image for image in bpy.data.images if image.session_uid == self.subject.image), None)
        if found is None:
            raise KilnError("subject-changed", f"{self.subject.title} was removed.", "Choose another picture.")
        return found

    def _place(self) -> dict:
        """Where the result is to come in: what has no place of its own stands at the 3D cursor; views with cameras have one."""
        scene = bpy.data.scenes[self.subject.scene]
        placed = "transforms.json" in self._inputs
        where = {} if placed else {"location": list(scene.cursor.location), "anchor": [0.0, 0.0, 0.0]}
        return {
            "title": self.subject.title,
            "kind": self.subject.kind,
            "object": "",
            "collection": "",
            "scene": scene.name,
            "location": [0.0, 0.0, 0.0],
            "rotation": [1.0, 0.0, 0.0, 0.0],
            **where,
            "unit_scale": scene.unit_settings.scale_length,
            "frame": scene.frame_current,
            "blender": bpy.app.version_string,
        }


MOST_SHOWN = 20_000_000  # bytes of a picture that is read for its icon: Blender waits meanwhile


def save(image: bpy.types.Image, path: Path) -> Path:
    """Writes an image of Blender's, whatever it is stored as and wherever (packed, painted, generated, floats, a render), as 8-bit sRGB
    with straight alpha: as it looks in the Standard view. Raises KilnError("bad-subject")."""
    if max(image.size) > picture.LARGEST_SIDE:
        words = f"{image.name} is {image.size[0]} x {image.size[1]} pixels; {picture.LARGEST_SIDE} a side are allowed."
        raise KilnError("bad-subject", words, "Scale it down: Image, Resize in the Image Editor. 512 to 2048 pixels are a good size.")
    scene = bpy.data.scenes.new("Kiln picture")
    try:
        scene.display_settings.display_device = "sRGB"
        view = scene.view_settings
        view.view_transform, view.look, view.exposure, view.gamma = "Standard", "None", 0.0, 1.0
        settings = scene.render.image_settings
        settings.file_format, settings.color_mode, settings.color_depth = "PNG", "RGBA", "8"
        image.save_render(str(path), scene=scene)
    except RuntimeError as error:
        hint = "Choose another picture, or find its file again: File, External Data, Find Missing Files."
        reason = str(error).strip().removeprefix("Error: ")
        raise KilnError("bad-subject", f"{image.name} cannot be written as a picture: {reason}", hint) from None
    finally:
        bpy.data.scenes.remove(scene)
    if not path.is_file():
        raise KilnError("bad-subject", f"{image.name} shows nothing.", "Choose another picture.")
    return path
