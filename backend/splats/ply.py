"""Splats on disk, in the PLY layout that 3D Gaussian Splatting's code introduced and every splat viewer reads.

One vertex a Gaussian: x y z, nx ny nz (0), f_dc_* and f_rest_* (spherical harmonics; the rest channel by channel), opacity (logit), scale_*
(natural logarithms), rot_* (quaternion, w first). Files of Kiln hold world axes and metres (Z up). `load` keeps whatever frame a file has,
takes the properties in any order and number type, and reads SuperSplat's compressed PLY too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float

from backend.progress import Progress, silent
from backend.views.views import Frame
from protocol.errors import KilnError

from .clean import check_count, cleaned
from .model import SH_C0, Splats

BLOCK = 1 << 16  # Gaussians read at a time
CHUNK = 256  # Gaussians of a compressed PLY that share their ranges
MADE_HERE = "comment Kiln, 3D Gaussian splats, metres, Z up"  # a line of the header; blender_addon/splat_files.py knows it too
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
    header = ["ply", "format binary_little_endian 1.0", MADE_HERE, f"element vertex {count}"]
    header += [f"property float {name}" for name in names] + ["end_header", ""]
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write("\n".join(header).encode("ascii"))
        file.write(table.tobytes())
    os.replace(partial, path)


def load(path: Path, say: Callable[[str], None] = lambda sentence: None, progress: Progress = silent) -> Splats:
    """The splats of a PLY file in its own frame, or `KilnError("bad-input")` that says what is wrong with it.

    Gaussians that cannot be drawn are left out; a sentence to `say` counts them. `KilnError` if none is left.
    """
    name = Path(path).name
    try:
        with open(path, "rb") as file:
            elements = {element.name: element for element in _read_header(file, name)}
            vertices = elements.get("vertex")
            check_count(vertices.count if vertices else 0, name)
            packed = vertices is not None and "chunk" in elements and "packed_position" in (vertices.layout.names or ())
            return cleaned((_read_packed if packed else _read)(file, elements, name, say, progress), name, say)
    except OSError as error:
        raise KilnError("bad-input", f"{name} cannot be read: {error.strerror or error}.", "Check the path and its permissions.") from None


def says_z_up(path: Path) -> bool:
    """Whether the header of a PLY file, one that `load` takes, says that Kiln wrote it, with Z up. Of others nothing is known."""
    with open(path, "rb") as file:
        header = file.read(1 << 16).partition(b"end_header")[0]
    return MADE_HERE.encode() in header.splitlines()


@dataclass(frozen=True)
class _Element:
    name: str
    count: int
    layout: np.dtype
    start: int  # byte of the file where its rows begin


def _read(file: BinaryIO, elements: dict[str, _Element], name: str, say: Callable[[str], None], progress: Progress) -> Splats:
    vertices = elements["vertex"]
    given, count = vertices.layout.names or (), vertices.count
    missing = [needed for needed in _names(1) if needed not in given and needed not in ("nx", "ny", "nz")]
    if missing:
        what = "a PLY"
        if "x" in given and "opacity" in missing:
            what = "a mesh" if "face" in elements else "a coloured point cloud" if "red" in given else "a point cloud"
        without = f"it has no {', '.join(missing)}"
        raise KilnError("bad-input", f"{name} is {what}, not Gaussian splats: {without}.", "Export it from a tool that makes splats.")
    rest = sum(one.startswith("f_rest_") for one in given)
    of_channel = rest // 3
    if rest not in (0, 9, 24, 45, 72) or any(f"f_rest_{i}" not in given for i in range(rest)):
        raise KilnError("bad-input", f"{name} has {rest} f_rest values.", "Degrees 0 to 3 of spherical harmonics have 0, 9, 24 or 45.")
    if of_channel > 15:
        say(f"{name}: the fourth degree of its spherical harmonics is left out.")
    kept = [f"f_rest_{channel * of_channel + k}" for k in range(min(of_channel, 15)) for channel in range(3)]
    bases = 1 + len(kept) // 3
    read = Splats(*(np.empty((count, *shape), np.float32) for shape in ((3,), (4,), (3,), (), (bases, 3))))
    columns = (
        (read.means, ["x", "y", "z"]),
        (read.quaternions, [f"rot_{i}" for i in range(4)]),
        (read.log_scales, [f"scale_{i}" for i in range(3)]),
        (read.opacity_logits.reshape(count, 1), ["opacity"]),
        (read.sh.reshape(count, 3 * bases), [f"f_dc_{i}" for i in range(3)] + kept),
    )
    for first in range(0, count, BLOCK):
        progress(first / count, f"{first:,} of {count:,} splats")
        rows = _rows(file, vertices, name, first, min(BLOCK, count - first))
        with np.errstate(over="ignore", invalid="ignore"):  # doubles beyond float32 become infinite, and are left out
            for target, names in columns:
                for column, one in enumerate(names):
                    target[first : first + len(rows), column] = rows[one]
    return read


def _read_packed(file: BinaryIO, elements: dict[str, _Element], name: str, say: Callable[[str], None], progress: Progress) -> Splats:
    """SuperSplat's compressed PLY: 16 bytes a Gaussian, within ranges that CHUNK Gaussians share; all numbers are shares of a range."""
    vertices, chunks = elements["vertex"], elements["chunk"]
    wanted = [f"packed_{what}" for what in ("position", "rotation", "scale", "color")]
    has_color_ranges = any(f"{end}_{channel}" in (chunks.layout.names or ()) for end in ("min", "max") for channel in "rgb")
    ranged = ["x", "y", "z", "scale_x", "scale_y", "scale_z"] + ["r", "g", "b"] * has_color_ranges
    ranges = [f"{end}_{what}" for what in ranged for end in ("min", "max")]
    unknown = KilnError("bad-input", f"{name} is a compressed PLY of a kind that Kiln cannot read.", "Export it as plain PLY or as SPZ.")
    missing = [one for one in wanted if one not in vertices.layout.names] + [one for one in ranges if one not in chunks.layout.names]
    if missing or chunks.count != -(-vertices.count // CHUNK) or any(vertices.layout[one].str[1:] != "u4" for one in wanted):
        raise unknown
    rest_names = elements["sh"].layout.names or () if "sh" in elements else ()
    of_channel = len(rest_names) // 3
    if "sh" in elements and (of_channel not in (3, 8, 15) or any(f"f_rest_{i}" not in rest_names for i in range(3 * of_channel))):
        raise unknown
    progress(0.0, f"{vertices.count:,} splats")
    chunk = _rows(file, chunks, name, 0, chunks.count)
    rows = _rows(file, vertices, name, 0, vertices.count)
    of = np.arange(vertices.count) // CHUNK

    def spread(shares: np.ndarray, names: list[str]) -> np.ndarray:
        low, high = (np.stack([chunk[f"{end}_{one}"] for one in names], 1).astype(np.float32) for end in ("min", "max"))
        return low[of] + shares * (high - low)[of]

    color = _shares(rows["packed_color"], (8, 8, 8, 8))
    if has_color_ranges:
        color[:, :3] = spread(color[:, :3], ["r", "g", "b"])
    alpha = np.clip(color[:, 3], 0.5 / 255, 254.5 / 255)  # bytes 0 and 255 are rounded: their logits would be infinite
    sh = ((color[:, :3] - 0.5) / SH_C0)[:, None]
    if "sh" in elements:
        progress(0.5, f"{vertices.count:,} splats")
        table = _rows(file, elements["sh"], name, 0, vertices.count)
        rest = np.stack([table[f"f_rest_{i}"] for i in range(3 * of_channel)], 1).astype(np.float32)
        shares = np.where(rest == 0, 0, np.where(rest == 255, 1, (rest + 0.5) / 256)).astype(np.float32)
        sh = np.concatenate([sh, ((shares - 0.5) * 8).reshape(-1, 3, of_channel).transpose(0, 2, 1)], 1)
    return Splats(
        means=spread(_shares(rows["packed_position"], (11, 10, 11)), ["x", "y", "z"]),
        quaternions=_packed_quaternions(rows["packed_rotation"]),
        log_scales=spread(_shares(rows["packed_scale"], (11, 10, 11)), ["scale_x", "scale_y", "scale_z"]),
        opacity_logits=np.log(alpha / (1 - alpha)),
        sh=np.ascontiguousarray(sh, np.float32),
    )


def _shares(packed: np.ndarray, bits: tuple[int, ...]) -> Float[np.ndarray, "n k"]:
    """Fields of a 32-bit number, highest first, as shares of their greatest value."""
    starts = 32 - np.cumsum(bits)
    fields = [(packed >> np.uint32(start)) & np.uint32(2**width - 1) for start, width in zip(starts, bits, strict=True)]
    return np.stack([field / (2**width - 1) for field, width in zip(fields, bits, strict=True)], 1).astype(np.float32)


def _packed_quaternions(packed: np.ndarray) -> Float[np.ndarray, "n 4"]:
    """w first: two bits name the largest of w, x, y, z; the others follow in that order."""
    largest = (packed >> np.uint32(30)).astype(int)
    three = (_shares(packed, (2, 10, 10, 10))[:, 1:] - 0.5) * np.float32(2**0.5)
    q = np.empty((len(packed), 4), np.float32)
    each = np.arange(len(packed))
    for step in range(3):
        q[each, step + (step >= largest)] = three[:, step]
    q[each, largest] = np.sqrt(np.maximum(1 - (three**2).sum(1), 0))
    return q


def _rows(file: BinaryIO, element: _Element, name: str, first: int, count: int) -> np.ndarray:
    file.seek(element.start + first * element.layout.itemsize)
    rows = np.fromfile(file, element.layout, count)
    if len(rows) < count:
        what = "Gaussians" if element.name == "vertex" else f"rows of {element.name!r}"
        raise KilnError("bad-input", f"{name} ends after {first + len(rows):,} of {element.count:,} {what}.", "Copy it again.")
    return rows


def _read_header(file: BinaryIO, name: str) -> list[_Element]:
    """The elements up to the first one with lists in it: what follows a list cannot be found without reading it."""
    not_ply = KilnError("bad-input", f"{name} is not a PLY file.", "Give Gaussian splats as binary PLY or as SPZ.")
    if file.readline(16).rstrip() != b"ply":
        raise not_ply
    order, found = "", []
    for _ in range(1000):
        words = file.readline(1000).decode("ascii", "replace").split()
        if words[:1] == ["end_header"]:
            break
        if words[:1] == ["format"]:
            order = {"binary_little_endian": "<", "binary_big_endian": ">"}.get(words[1] if len(words) > 1 else "", "")
            if not order:
                raise KilnError("bad-input", f"{name} is a text PLY.", "Export the splats as binary PLY or as SPZ.")
        elif words[:1] == ["element"]:
            if len(words) != 3 or not words[2].isdigit() or len(words[2]) > 15:  # places in larger files fit no 64 bits
                raise KilnError("bad-input", f"{name}: its header has the element {' '.join(words[1:])!r}.", "Export it again.")
            found.append((words[1], int(words[2]), []))
        elif words[:1] == ["property"] and found:
            if words[1:2] == ["list"]:
                found[-1][2].append(None)
            elif len(words) != 3 or words[1] not in _TYPES or words[2] in [one[0] for one in found[-1][2] if one]:
                raise KilnError("bad-input", f"{name}: its header has the property {' '.join(words[1:])!r}.", "Export it again.")
            else:
                found[-1][2].append((words[2], order + _TYPES[words[1]]))
    else:
        raise not_ply
    if not order:
        raise not_ply
    elements, start = [], file.tell()
    for kind, count, fields in found:
        if None in fields:
            elements.append(_Element(kind, count, np.dtype([]), start))
            break
        elements.append(_Element(kind, count, np.dtype(fields), start))
        start += count * elements[-1].layout.itemsize
    return elements
