"""The input kind "picture" (SPEC.md): which files it may have and what they are called. Command line and extension gather them by this."""

from __future__ import annotations

import re
from pathlib import Path

from . import views
from .errors import KilnError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".avif")
MOVIES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ogv", ".wmv", ".flv", ".gif")
LORA = "lora.safetensors"  # the user's own, of the generator
LEAST_VIEWS = 4  # of a turntable
SMALLEST_SIDE, LARGEST_SIDE = 32, 8192  # pixels of a picture
_SIDE = re.compile(r"view_\d+", re.IGNORECASE)
_READS = ", ".join(suffix[1:] for suffix in SUFFIXES)


def gather(picture: Path | None, turntable: Path | None, prompt: str) -> dict[str, Path]:
    """The files to send, by the names that the recipe knows. picture: a file; turntable: a folder of views; of them at most one, and none
    where the prompt says what the subject is. Raises KilnError("bad-input")."""
    if picture is not None and turntable is not None:
        words = "A picture and a folder of views were given; one of them makes the asset."
        raise KilnError("bad-input", words, "Leave the views out, and they are made from the picture; or leave the picture out.")
    if picture is not None:
        return {f"image{check(picture).suffix.lower()}": picture}
    if turntable is not None:
        return _views(turntable)
    if not prompt.strip():
        words = "There is neither a picture, nor a prompt, nor a folder of views."
        raise KilnError("bad-input", words, "Choose a picture of the subject, or say in the prompt what it is.")
    return {}


def check(path: Path) -> Path:
    """The path of a picture that the backend may be able to read, by its name, or KilnError("bad-input")."""
    if path.is_dir():
        raise KilnError(
            "bad-input", f"{path} is a folder, not a picture.", "Choose one picture; a turntable's folder is given as its views."
        )
    named(path)
    if not path.is_file():
        raise KilnError("bad-input", f"There is no file {path}.", "Choose another picture.")
    return path


def named(path: Path) -> Path:
    """As `check`, by the name alone: nothing asks the disk."""
    suffix = path.suffix.lower()
    if suffix in MOVIES:
        hint = "Choose one picture of the subject. Of a video of a turntable, save the frames as pictures and give their folder as views."
        raise KilnError("bad-input", f"{path.name} is a video, not a picture.", hint)
    if suffix not in SUFFIXES:
        raise KilnError("bad-input", f"{path.name} is no picture of a kind that Kiln reads: {_READS}.", "Save it as PNG, with its alpha.")
    return path


def _views(folder: Path) -> dict[str, Path]:
    """A turntable's files: with their cameras where transforms.json lies there; else pictures in the order of their names."""
    folder = folder.parent if folder.name == "transforms.json" else folder
    if folder.is_file():
        hint = "Give the folder that holds the views; of a video, save the frames as pictures into one."
        raise KilnError("bad-input", f"{folder.name} is a file, not a folder of views.", hint)
    if not folder.is_dir():
        raise KilnError("bad-input", f"There is no folder {folder}.", "Choose the folder that holds the views.")
    if (folder / "transforms.json").is_file():
        return views.files(folder, views.names(folder))
    pictures = sorted((file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()), key=_in_order)
    pictures = [file for file in pictures if _SIDE.fullmatch(file.stem)] or pictures  # of a results folder, the turntable alone
    if len(pictures) < LEAST_VIEWS:
        count = {0: "no pictures", 1: "one picture"}.get(len(pictures), f"{len(pictures)} pictures")
        hint = f"A turntable needs {LEAST_VIEWS} or more, {_READS}, named in their order around the subject."
        raise KilnError("bad-input", f"{folder} holds {count}.", hint)
    if len(pictures) > views.MOST_VIEWS:
        hint = "Leave out every second one, or more: 16 show a subject."
        raise KilnError("bad-input", f"{folder} holds {len(pictures)} pictures; {views.MOST_VIEWS} are allowed.", hint)
    return {f"view_{number:03d}{file.suffix.lower()}": file for number, file in enumerate(pictures)}


def _in_order(file: Path) -> list[tuple[int, int, str]]:
    """frame_2 before frame_10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part.lower()) for part in re.split(r"(\d+)", file.name) if part]


def lora(path: Path | None) -> dict[str, Path]:
    """The file of a LoRA, or the one in a folder (as `kiln train turntable` leaves it), by the name that the recipe knows. Raises
    KilnError("bad-input")."""
    if path is None:
        return {}
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1:
        raise KilnError("bad-input", f"{path} holds {len(files)} safetensors files.", "Name the one that is the LoRA.")
    if not files[0].is_file() or files[0].suffix.lower() != ".safetensors":
        hint = "Give the safetensors file, or the folder of the run, that `kiln train turntable` made."
        raise KilnError("bad-input", f"{path} is no LoRA.", hint)
    return {LORA: files[0]}


# Views that a user is not content with


def rerolled(before: str, again: list[int]) -> str:
    """The parameter `generate.rerolls` with further views to generate anew: behind those of before, whose results are kept so."""
    return " ".join([*re.split(r"[\s,;]+", before.strip()), *map(str, sorted(again))]).strip()


def replacement(view: int, file: Path) -> str:
    """The name of the input that takes the place of a generated view."""
    return f"replace_{view:03d}{check(file).suffix.lower()}"
