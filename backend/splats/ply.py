"""Splats on disk, in the PLY layout that 3D Gaussian Splatting's code introduced and every splat viewer reads.

One vertex a Gaussian: x y z, nx ny nz (0), f_dc_* and f_rest_* (spherical harmonics; the rest channel by channel), opacity (logit), scale_*
(natural logarithms), rot_* (quaternion, w first). Files hold world axes and metres (Z up); `load` keeps whatever frame a file has.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from backend.views.views import Frame
from protocol.errors import KilnError

from .model import Splats

MOST_SPLATS = 50_000_000
_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2",
    "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip


def _names(bases: int) -> list[str]:
    return [
        "x", "y", "z", "nx", "ny", "nz", *(f"f_dc_{i}" for i in range(3)), *(f"f_rest_{i}" for i in range(3 * (bases - 1))),
        "opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4)),
    ]  # fmt: skip


def save(path: Path, splats: Splats, frame: Frame) -> None:
    """Writes splats of the unit frame as a binary PLY in world metres. The file appears whole or not at all."""
    count, bases = len(splats), splats.sh.shape[1]
    names = _names(bases)
    table = np.zeros((count, len(names)), "<f4")
    table[:, 0:3] = frame.to_world(splats.means)
    table[:, 6:9] = splats.sh[:, 0]
    table[:, 9 : 6 + 3 * bases] = splats.sh[:, 1:].transpose(0, 2, 1).reshape(count, -1)
    table[:, -8] = splats.opacity_logits
    table[:, -7:-4] = splats.log_scales - np.log(frame.scale)
    table[:, -4:] = splats.quaternions
    header = ["ply", "format binary_little_endian 1.0", "comment Kiln, 3D Gaussian splats, metres, Z up", f"element vertex {count}"]
    header += [f"property float {name}" for name in names] + ["end_header", ""]
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write("\n".join(header).encode("ascii"))
        file.write(table.tobytes())
    os.replace(partial, path)


def load(path: Path) -> Splats:
    """The splats of a PLY file in its own frame, or `KilnError("bad-input")` that says what is wrong with it.

    Gaussians with values that are not finite, or with no extent at all, are refused: a viewer would draw nothing or everything.
    """
    name = Path(path).name
    try:
        with open(path, "rb") as file:
            count, layout = _read_header(file, name)
            missing = [n for n in _names(1) if n not in layout.names and n not in ("nx", "ny", "nz")]
            if missing:
                raise KilnError(
                    "bad-input", f"{name} is a PLY without {', '.join(missing)}.", "Export Gaussian splats, not a mesh or points."
                )
            rest = sum(n.startswith("f_rest_") for n in layout.names)
            bases = 1 + rest // 3
            if rest % 3 or bases not in (1, 4, 9, 16) or any(f"f_rest_{i}" not in layout.names for i in range(rest)):
                raise KilnError("bad-input", f"{name} has {rest} f_rest values.", "Degrees 0 to 3 have 0, 9, 24 or 45.")
            left = os.fstat(file.fileno()).st_size - file.tell()
            if left < count * layout.itemsize:
                raise KilnError("bad-input", f"{name} ends after {left // layout.itemsize} of {count} Gaussians.", "Copy it again.")
            rows = np.fromfile(file, layout, count)
    except OSError as error:
        raise KilnError("bad-input", f"{name} cannot be read: {error.strerror or error}.", "Check the path and its permissions.") from None

    def columns(*names: str) -> np.ndarray:
        return np.stack([rows[n] for n in names], -1).astype(np.float32)

    sh = np.empty((count, bases, 3), np.float32)
    sh[:, 0] = columns(*(f"f_dc_{i}" for i in range(3)))
    if rest:
        sh[:, 1:] = columns(*(f"f_rest_{i}" for i in range(rest))).reshape(count, 3, bases - 1).transpose(0, 2, 1)
    splats = Splats(
        means=columns("x", "y", "z"),
        quaternions=columns(*(f"rot_{i}" for i in range(4))),
        log_scales=columns(*(f"scale_{i}" for i in range(3))),
        opacity_logits=columns("opacity")[:, 0],
        sh=sh,
    )
    for field in ("means", "quaternions", "log_scales", "opacity_logits", "sh"):
        bad = ~np.isfinite(getattr(splats, field)).reshape(count, -1).all(1)
        if bad.any():
            raise KilnError("bad-input", f"{name}: {bad.sum()} of {count} Gaussians have {field} that are no numbers.", "Export it again.")
    empty = (np.exp(splats.log_scales.max(1)) == 0) | (np.linalg.norm(splats.quaternions, axis=1) == 0)
    if empty.any():
        problem = f"{name}: {empty.sum()} of {count} Gaussians have no size or no rotation."
        raise KilnError("bad-input", problem, "scale_* are natural logarithms; rot_* a quaternion, w first.")
    return splats


def _read_header(file, name: str) -> tuple[int, np.dtype]:
    not_ply = KilnError("bad-input", f"{name} is not a binary little-endian PLY file.", "Export the splats as binary PLY.")
    if file.readline(16).rstrip() != b"ply":
        raise not_ply
    count, fields, element, binary = None, [], None, False
    for _ in range(500):
        words = file.readline(1000).decode("ascii", "replace").split()
        if words[:1] == ["end_header"]:
            break
        if words[:1] == ["format"]:
            binary = words[1:2] == ["binary_little_endian"]
        elif words[:1] == ["element"] and len(words) == 3 and words[2].isdigit():
            if count is not None and words[1] != "vertex" and element == "vertex":
                element = words[1]  # what follows the Gaussians is not read
            elif words[1] == "vertex" and element is None:
                element, count = "vertex", int(words[2])
            else:
                raise KilnError("bad-input", f"{name}: its first element is not 'vertex'.", "Export it in the 3DGS layout.")
        elif words[:1] == ["property"] and element == "vertex":
            if len(words) != 3 or words[1] not in _TYPES or words[2] in dict(fields):
                raise KilnError(
                    "bad-input", f"{name}: its header has the property {' '.join(words[1:])!r}.", "Export it in the 3DGS layout."
                )
            fields.append((words[2], "<" + _TYPES[words[1]]))
    else:
        raise not_ply
    if not binary:
        raise not_ply
    if not count or not fields:
        raise KilnError("bad-input", f"{name} holds no Gaussians.", "Export it again.")
    if count > MOST_SPLATS:
        raise KilnError("bad-input", f"{name} says that it holds {count} Gaussians.", f"At most {MOST_SPLATS}.")
    return count, np.dtype(fields)
