"""What a folder of views may hold (SPEC.md, "Views" and "Motion"): the extension refuses more before it renders, the backend before it
reads."""

import json
import posixpath
from pathlib import Path

from .errors import KilnError

MOST_VIEWS = 500  # of a still subject
MOST_MOVING_VIEWS = 5500  # over all frames
MOST_FILES = 5600  # of one job: named as a capture names them, they fit into one request
MOST_PIXELS = 500_000_000  # over all views: about 14 GB with depth, normals and material


def names(folder: Path) -> list[str]:
    """The files that the folder's transforms.json names, relative to it, as they stand there: who sends them checks them."""
    table = folder / "transforms.json"
    try:
        frames = json.loads(table.read_text(encoding="utf-8"))["frames"]
        found = [frame[key] for frame in frames for key in ("file_path", "geometry_file_path", "material_file_path") if key in frame]
        return list(dict.fromkeys(posixpath.normpath(name if posixpath.splitext(name)[1] else name + ".png") for name in found))
    except FileNotFoundError:
        raise KilnError("bad-input", f"There is no transforms.json in {folder}.", "Give a folder of views with their cameras.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KilnError("bad-input", f"{table} is no list of views: {error!r}.", "Write it again; SPEC.md says what it holds.") from None


def files(folder: Path, wanted: list[str]) -> dict[str, Path]:
    """transforms.json and the files that it names, each of which is there."""
    found = {"transforms.json": folder / "transforms.json", **{name: folder / name for name in wanted}}
    for name, file in found.items():
        if not file.is_file():
            raise KilnError("bad-input", f"transforms.json names {name}, which is not in {folder}.", "Add the file, or remove its frame.")
    return found
