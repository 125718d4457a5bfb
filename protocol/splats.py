"""Which files hold Gaussian splats."""

from __future__ import annotations

from pathlib import Path

from .errors import KilnError

HEADER_BYTES = 8192  # of a PLY, in which its properties are named


def is_splats(file: Path) -> bool:
    """Whether a file holds splats: an .spz by its name, a .ply by the properties that its header names (3DGS, or SuperSplat's compressed
    layout), and not a mesh or a point cloud. Raises `KilnError("bad-input")` where a .ply cannot be read."""
    suffix = file.suffix.lower()
    if suffix != ".ply":
        return suffix == ".spz"
    try:
        with open(file, "rb") as content:
            head = content.read(HEADER_BYTES).partition(b"end_header")[0]
    except OSError as error:
        raise KilnError("bad-input", f"{file.name} cannot be read: {error.strerror or error}.", "Check the file.") from None
    return b" f_dc_0" in head or b" packed_position" in head
