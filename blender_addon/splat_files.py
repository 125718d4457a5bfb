"""Gaussian splats in files: the PLY layout of 3D Gaussian Splatting (Kerbl et al. 2023), SuperSplat's compressed PLY (read only), and SPZ,
the compressed one of github.com/nianticlabs/spz. numpy and the standard library only; nothing here knows Blender.

What is written can be read by any viewer of splats. What is read may come from anywhere: its properties in any order and beside others,
damaged, or larger than memory.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import numpy as np

from .protocol.errors import KilnError

SH_C0 = 0.28209479177387814  # the constant spherical harmonic: colour = 0.5 + SH_C0 * f_dc
MOST_SPLATS = 5_000_000  # with all harmonics, reading and showing take up to 1 kB each
TINY, HUGE = np.exp(-50.0), np.exp(50.0)  # of standard deviations: what lies beyond is nothing, or everything
Z_UP_FROM_Y_UP = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
PLY_TYPES = {
    "char": "<i1", "int8": "<i1", "uchar": "<u1", "uint8": "<u1", "short": "<i2", "int16": "<i2", "ushort": "<u2", "uint16": "<u2",
    "int": "<i4", "int32": "<i4", "uint": "<u4", "uint32": "<u4", "float": "<f4", "float32": "<f4", "double": "<f8", "float64": "<f8",
}  # fmt: skip
REQUIRED = ("x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4)))
PACKED = ("packed_position", "packed_rotation", "packed_scale", "packed_color")  # in place of REQUIRED, in compressed PLY
CHUNK = 256  # splats of a compressed PLY that share their ranges
MADE_HERE = "comment Kiln, 3D Gaussian splats, metres, Z up"
SPZ_MAGIC, SPZ_VERSION = 0x5053474E, 3
SPZ_HEADER = struct.Struct("<IIIBBBB")  # magic, version, splats, degree, fractional bits, flags, reserved
SPZ_COLOR = 0.15  # colour bytes hold 0.5 + SPZ_COLOR * f_dc


@dataclass(frozen=True)
class Points:
    """N splats in one world, float32 but for the places, which may be far from the origin."""

    means: np.ndarray  # (N, 3) float64
    scales: np.ndarray  # (N, 3) standard deviations along the axes of the quaternion
    quaternions: np.ndarray  # (N, 4), w first, unit length
    colors: np.ndarray  # (N, 3) sRGB, as seen from all sides on average; beyond 0 and 1 where a file says so
    opacities: np.ndarray  # (N,)
    harmonics: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 3), np.float32))  # (N, 0, 3, 8 or 15, 3): degrees 1 to 3
    z_up: bool = True  # False where a file does not say which way is up
    notes: tuple[str, ...] = ()  # sentences for people: what was left out

    def __post_init__(self) -> None:
        if len(self.harmonics) != len(self.means):
            object.__setattr__(self, "harmonics", np.zeros((len(self.means), 0, 3), np.float32))

    def __len__(self) -> int:
        return len(self.means)

    @property
    def degree(self) -> int:
        return round((self.harmonics.shape[1] + 1) ** 0.5) - 1


def read(path: str | os.PathLike) -> Points:
    """The splats of a PLY or SPZ file. PLY keeps the file's axes, SPZ is turned to Z up.

    Splats that cannot be drawn (values that are no numbers, no size) are left out and counted in `notes`.
    Raises KilnError("bad-splats"): not such a file, damaged, too large, or nothing in it to draw.
    """
    path = Path(path)
    with _readable(path), open(path, "rb") as file:
        start = file.read(4)
        file.seek(0)
        if start[:3] == b"ply":
            points = _read_ply(file, path.name)
        elif start[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=file) as packed:
                points = _read_spz(packed, path.name)
        elif start == struct.pack("<I", SPZ_MAGIC):
            raise bad(f"{path.name} is SPZ of a version that Kiln cannot read.", "Save it as SPZ version 3 or as PLY.")
        else:
            raise bad(f"{path.name} is neither a PLY nor an SPZ file.", "Choose Gaussian splats in one of these formats.")
    return _cleaned(points, path.name)


def bad(message: str, hint: str) -> KilnError:
    return KilnError("bad-splats", message, hint)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise bad(f"{path.name} is damaged or not whole: {error}.", "Copy it again.") from None
    except OSError as error:
        raise bad(f"{path.name} cannot be read: {error.strerror or error}.", "Check the path and its permissions.") from None
    except MemoryError:
        raise bad(f"{path.name} needs more memory than there is.", "Crop it in a splat editor and export it again.") from None


def _check_count(count: int, name: str) -> None:
    """Before memory is spent."""
    if count == 0:
        raise bad(f"{name} holds no splats.", "Export it again.")
    if count > MOST_SPLATS:
        hint = "Crop it to the subject in a splat editor and export it again."
        raise bad(f"{name} holds {count:,} splats; at most {MOST_SPLATS:,} can be read.", hint)


def _cleaned(points: Points, name: str) -> Points:
    with np.errstate(invalid="ignore"):
        largest = points.scales.max(1)
        problems = {
            "values that are no numbers": ~(
                np.isfinite(points.means).all(1) & np.isfinite(points.quaternions).all(1) & np.isfinite(points.colors).all(1)
                & np.isfinite(points.harmonics).all((1, 2)) & ~np.isnan(points.scales).any(1) & ~np.isnan(points.opacities)
            ),
            "no size": largest < TINY,
            "no end": largest > HUGE,
            "no rotation": np.linalg.norm(points.quaternions, axis=1) < 0.5,
        }  # fmt: skip
    keep, notes = np.ones(len(points), bool), list(points.notes)
    for what, found in problems.items():
        found &= keep
        keep &= ~found
        if found.any():
            notes.append(f"{name}: {found.sum():,} of {len(points):,} splats have {what} and are left out.")
    if not keep.any():
        raise bad(f"{name}: none of its {len(points):,} splats can be drawn: {notes[-1].split(' splats ')[-1]}", "Export it again.")
    if keep.all():
        return replace(points, scales=np.maximum(points.scales, np.float32(TINY)))
    return Points(
        means=points.means[keep],
        scales=np.maximum(points.scales[keep], np.float32(TINY)),
        quaternions=points.quaternions[keep],
        colors=points.colors[keep],
        opacities=points.opacities[keep],
        harmonics=points.harmonics[keep],
        z_up=points.z_up,
        notes=tuple(notes),
    )


# PLY


@dataclass(frozen=True)
class _Element:
    name: str
    count: int
    layout: np.dtype
    start: int  # byte of the file where its rows begin


def _read_ply(file: IO[bytes], name: str) -> Points:
    elements, z_up = _ply_header(file, name)
    vertices = elements.get("vertex", _Element("vertex", 0, np.dtype([]), 0))
    given = vertices.layout.names or ()
    if "chunk" in elements and set(PACKED) <= set(given):
        return _read_packed(file, elements, name)
    missing = [needed for needed in REQUIRED if needed not in given]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise bad(f"{name} has no {missing[0]}{more}: it does not hold splats.", "Choose Gaussian splats, not a mesh or points.")
    rest = sum(entry.startswith("f_rest_") for entry in given)
    if rest not in (0, 9, 24, 45) or any(f"f_rest_{i}" not in given for i in range(rest)):
        raise bad(f"{name} has {rest} f_rest values; degrees 0 to 3 have 0, 9, 24 or 45.", "Export it with another degree.")
    _check_count(vertices.count, name)
    rows = _ply_rows(file, vertices, name)
    with np.errstate(over="ignore", invalid="ignore"):
        return Points(
            means=_columns(rows, "x", "y", "z").astype(np.float64),
            scales=np.exp(_columns(rows, "scale_0", "scale_1", "scale_2")),
            quaternions=_unit(_columns(rows, "rot_0", "rot_1", "rot_2", "rot_3")),
            colors=0.5 + np.float32(SH_C0) * _columns(rows, "f_dc_0", "f_dc_1", "f_dc_2"),
            opacities=1 / (1 + np.exp(-_columns(rows, "opacity")[:, 0])),
            harmonics=_by_basis(_columns(rows, *(f"f_rest_{i}" for i in range(rest)))),
            z_up=z_up,
        )


def _read_packed(file: IO[bytes], elements: dict[str, _Element], name: str) -> Points:
    """SuperSplat's compressed PLY (PlayCanvas): 16 bytes a splat. All numbers are shares of ranges that CHUNK splats have in common; the
    quaternion's largest component is left out, with two bits that name it among w, x, y, z; harmonics are bytes, -4 to 4."""
    vertices, chunks, harmonics = elements["vertex"], elements["chunk"], elements.get("sh")
    colored = "min_r" in (chunks.layout.names or ())  # older files have no ranges of colour
    ranged = ("x", "y", "z", "scale_x", "scale_y", "scale_z", *("r", "g", "b") * colored)
    rest_names = (harmonics.layout.names or ()) if harmonics else ()
    rest = tuple(f"f_rest_{i}" for i in range(len(rest_names)))
    if (
        any(f"{end}_{one}" not in (chunks.layout.names or ()) for one in ranged for end in ("min", "max"))
        or any(vertices.layout[one] != np.dtype("<u4") for one in PACKED)
        or chunks.count != -(-vertices.count // CHUNK)
        or (harmonics and (len(rest) not in (9, 24, 45) or set(rest) != set(rest_names) or harmonics.count != vertices.count))
    ):
        raise bad(f"{name} is a compressed PLY of a kind that Kiln cannot read.", "Export it as plain PLY or as SPZ.")
    _check_count(vertices.count, name)
    ranges = _ply_rows(file, chunks, name)
    rows = _ply_rows(file, vertices, name)
    chunk = np.arange(vertices.count) // CHUNK

    def spread(shares: np.ndarray, *names: str) -> np.ndarray:
        low, high = (_columns(ranges, *(f"{end}_{one}" for one in names)) for end in ("min", "max"))
        return low[chunk] + shares * (high - low)[chunk]

    with np.errstate(over="ignore", invalid="ignore"):
        colors = _shares(rows["packed_color"], 8, 8, 8, 8)
        largest = rows["packed_rotation"] >> 30
        others = (_shares(rows["packed_rotation"], 2, 10, 10, 10)[:, 1:] - 0.5) * np.float32(2**0.5)
        quaternions = np.empty((vertices.count, 4), np.float32)
        quaternions[np.arange(4) != largest[:, None]] = others.ravel()
        quaternions[np.arange(4) == largest[:, None]] = np.sqrt(np.maximum(1 - (others**2).sum(1), 0))
        bands = _columns(_ply_rows(file, harmonics, name), *rest) if harmonics else np.zeros((vertices.count, 0), np.float32)
        return Points(
            means=spread(_shares(rows["packed_position"], 11, 10, 11), "x", "y", "z").astype(np.float64),
            scales=np.exp(spread(_shares(rows["packed_scale"], 11, 10, 11), "scale_x", "scale_y", "scale_z")),
            quaternions=_unit(quaternions),
            colors=spread(colors[:, :3], "r", "g", "b") if colored else colors[:, :3],
            opacities=np.clip(colors[:, 3], 0.5 / 255, 254.5 / 255),  # 0 and 255 were rounded: their logits would be infinite
            harmonics=_by_basis(np.select([bands == 0, bands == 255], [-4, 4], (bands + 0.5) / 32 - 4).astype(np.float32)),
            z_up=False,
        )


def _shares(packed: np.ndarray, *bits: int) -> np.ndarray:
    """(N, fields) of 32-bit numbers that hold fields of so many bits, highest first, each as a share of its greatest value."""
    shifts = 32 - np.cumsum(bits)
    return np.stack([(packed >> shift & 2**width - 1) / (2**width - 1) for shift, width in zip(shifts, bits, strict=True)], 1, dtype="f4")


def _columns(rows: np.ndarray, *names: str) -> np.ndarray:
    return np.stack([rows[entry].astype(np.float32) for entry in names], 1) if names else np.zeros((len(rows), 0), np.float32)


def _by_basis(rest: np.ndarray) -> np.ndarray:
    """(N, bases, 3) of f_rest values, which files keep channel by channel."""
    return np.ascontiguousarray(rest.reshape(len(rest), 3, rest.shape[1] // 3).transpose(0, 2, 1))


def _ply_rows(file: IO[bytes], element: _Element, name: str) -> np.ndarray:
    left = (file.seek(0, os.SEEK_END) - element.start) // max(element.layout.itemsize, 1)
    if left < element.count:
        what = "splats" if element.name == "vertex" else f"rows of {element.name!r}"
        raise bad(f"{name} ends after {max(left, 0):,} of {element.count:,} {what}.", "Copy it again.")
    file.seek(element.start)
    return np.fromfile(file, element.layout, element.count)


def _ply_header(file: IO[bytes], name: str) -> tuple[dict[str, _Element], bool]:
    """The elements up to the first one with lists in it, behind which nothing can be found without reading it; and whether the file says
    that Z is up."""
    kind, found, z_up = "", [], False
    for _ in range(1000):
        line = file.readline(1000).decode("ascii", "replace").strip()
        words = line.split()
        if words == ["end_header"]:
            break
        z_up |= line == MADE_HERE
        if words[:1] == ["format"]:
            kind = words[1] if len(words) > 1 else ""
        elif words[:1] == ["element"]:
            if len(words) != 3 or not words[2].isdigit() or len(words[2]) > 15 or words[1] in [one[0] for one in found]:
                raise bad(f"{name}: its header has the element {' '.join(words[1:])!r}.", "Export it again.")
            found.append((words[1], int(words[2]), {}))
        elif words[:1] == ["property"] and found:
            here, _, fields = found[-1]
            if words[1:2] == ["list"] and here != "vertex":
                fields["list"] = None
            elif len(words) != 3 or words[1] not in PLY_TYPES or words[2] in fields:
                hint = "Export it in the layout of 3D Gaussian Splatting."
                raise bad(f"{name}: its header has the property {' '.join(words[1:])!r}.", hint)
            else:
                fields[words[2]] = PLY_TYPES[words[1]]
    else:
        raise bad(f"{name} is not a PLY file: its header has no end.", "Copy or export it again.")
    if kind != "binary_little_endian":
        raise bad(f"{name} is {kind or 'of no stated format'}; Kiln reads binary_little_endian PLY.", "Export it as binary PLY.")
    elements, start = {}, file.tell()
    for what, count, fields in found:
        if None in fields.values():
            break
        elements[what] = _Element(what, count, np.dtype(list(fields.items())), start)
        start += count * elements[what].layout.itemsize
    return elements, z_up


def write_ply(path: str | os.PathLike, points: Points) -> None:
    """A PLY file of all that `points` holds. It appears whole or not at all; KilnError("bad-splats") if it cannot be written."""
    bases = points.harmonics.shape[1]
    names = [
        *"xyz", "nx", "ny", "nz", *(f"f_dc_{i}" for i in range(3)), *(f"f_rest_{i}" for i in range(3 * bases)),
        "opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4)),
    ]  # fmt: skip
    table = np.zeros((len(points), len(names)), "<f4")
    table[:, :3] = points.means
    table[:, 6:9] = (points.colors - 0.5) / SH_C0
    table[:, 9:-8] = points.harmonics.transpose(0, 2, 1).reshape(len(points), -1)
    table[:, -8] = _logit(points.opacities)
    table[:, -7:-4] = np.log(np.maximum(points.scales, TINY))
    table[:, -4:] = points.quaternions
    header = ["ply", "format binary_little_endian 1.0"] + [MADE_HERE] * points.z_up
    header += [f"element vertex {len(points)}", *(f"property float {entry}" for entry in names), "end_header\n"]

    def content(file: IO[bytes]) -> None:
        file.write("\n".join(header).encode("ascii"))
        file.write(table.tobytes())

    _write(Path(path), content)


def _write(path: Path, content: Callable[[IO[bytes]], None]) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        try:
            with open(partial, "wb") as file:
                content(file)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise bad(f"{path.name} cannot be written: {error.strerror or error}.", "Choose another folder, or free some space.") from None


# SPZ


def _read_spz(packed: IO[bytes], name: str) -> Points:
    header = packed.read(SPZ_HEADER.size)
    if len(header) < SPZ_HEADER.size or SPZ_HEADER.unpack(header)[0] != SPZ_MAGIC:
        raise bad(f"{name} is a gzip file, but not SPZ.", "Choose Gaussian splats as PLY or SPZ.")
    _, version, count, degree, fraction, flags, _ = SPZ_HEADER.unpack(header)
    if version not in (1, 2, 3):
        raise bad(f"{name} is SPZ version {version}; 1 to 3 can be read.", "Save it as version 3 or as PLY.")
    if degree > 4 or fraction > 30 or flags & 2:  # 2: vendors' records stand between header and splats
        raise bad(f"{name} uses parts of SPZ that Kiln cannot read.", "Save it as plain SPZ version 3 or as PLY.")
    _check_count(count, name)

    def take(width: int) -> np.ndarray:
        content = packed.read(count * width)
        if len(content) < count * width:
            raise bad(f"{name} ends before its {count:,} splats do.", "Copy it again.")
        return np.frombuffer(content, np.uint8).reshape(count, width)

    if version == 1:
        means = take(6).view("<f2").astype(np.float64)
    else:
        fixed = np.zeros((count, 3, 4), np.uint8)
        fixed[..., 1:] = take(9).reshape(count, 3, 3)  # into the upper bytes, so that the shift keeps the sign
        means = (fixed.view("<i4")[..., 0] >> 8) / 2.0**fraction
    opacities = np.clip(take(1)[:, 0], 0.5, 254.5).astype(np.float32) / 255  # 0 and 255 were rounded: their logits would be infinite
    constant = (take(3).astype(np.float32) / 255 - 0.5) / SPZ_COLOR
    scales = np.exp(take(3).astype(np.float32) / 16 - 10)
    quaternions = np.empty((count, 4), np.float32)
    if version == 3:
        packed_rotations = take(4).view("<u4")[:, 0]
        largest = packed_rotations >> 30
        parts = [_signed_ten_bits(packed_rotations >> shift) for shift in (20, 10, 0)]
        missing = np.sqrt(np.maximum(1 - sum(part**2 for part in parts), 0))
        for axis in range(4):  # x, y, z, w in the file
            others = [parts[axis - (axis > which)] if axis != which else missing for which in range(4)]
            quaternions[:, (axis + 1) % 4] = np.choose(largest, others)
    else:
        quaternions[:, 1:] = take(3) / np.float32(127.5) - 1
        quaternions[:, 0] = np.sqrt(np.maximum(1 - (quaternions[:, 1:] ** 2).sum(1), 0))
    rest = take(3 * ((degree + 1) ** 2 - 1)).reshape(count, -1, 3)[:, :15]
    points = Points(
        means=means,
        scales=scales,
        quaternions=_unit(quaternions),
        colors=0.5 + np.float32(SH_C0) * constant,
        opacities=opacities,
        harmonics=(rest.astype(np.float32) - 128) / 128,
        notes=(f"{name}: the fourth degree of its spherical harmonics is left out.",) if degree > 3 else (),
    )
    return transformed(points, Z_UP_FROM_Y_UP, np.zeros(3))


def _signed_ten_bits(packed: np.ndarray) -> np.ndarray:
    """A sign and nine bits of size; the largest size is sqrt(1/2), which only the greatest component of a quaternion exceeds."""
    size = (packed & 511).astype(np.float32) * np.float32(0.5**0.5 / 511)
    return np.where(packed & 512, -size, size)


def write_spz(path: str | os.PathLike, points: Points) -> None:
    """An SPZ file, version 3: about a tenth of the PLY, rounded to 8 bits (places to 2^-22 of the largest). KilnError("bad-splats") if it
    cannot be written."""
    there = transformed(points, Z_UP_FROM_Y_UP.T, np.zeros(3))
    reach = max(float(np.abs(there.means).max(initial=0)), 1e-30)
    fraction = int(np.clip(22 - np.ceil(np.log2(reach)), 0, 24))
    if reach >= 2.0 ** (23 - fraction) - 1:
        raise bad(f"The splats lie {reach:.3g} m from the origin, too far for an SPZ file.", "Move them nearer, or save as PLY.")
    fixed = np.round(there.means * 2.0**fraction).astype("<i4")
    q = there.quaternions[:, [1, 2, 3, 0]].astype(np.float64)
    largest = np.abs(q).argmax(1)
    each = np.arange(len(q))
    q *= np.where(q[each, largest] < 0, -1, 1)[:, None]  # -q is the same rotation
    packed = largest.astype(np.uint32)
    for step in range(3):
        value = q[each, step + (step >= largest)]
        size = np.minimum(np.round(np.abs(value) * 511 * 2**0.5), 511).astype(np.uint32)
        packed = packed << 10 | (value < 0).astype(np.uint32) << 9 | size
    step = np.where(np.arange(there.harmonics.shape[1]) < 3, 8, 16)[:, None]  # fewer values pack better; the reference's steps
    parts = [
        SPZ_HEADER.pack(SPZ_MAGIC, SPZ_VERSION, len(there), there.degree, fraction, 0, 0),
        np.ascontiguousarray(fixed.view(np.uint8).reshape(-1, 3, 4)[..., :3]).tobytes(),
        _bytes(255 * there.opacities),
        _bytes(255 * (0.5 + SPZ_COLOR * (there.colors - 0.5) / SH_C0)),
        _bytes(16 * (np.log(np.maximum(there.scales, TINY)) + 10)),
        packed.astype("<u4").tobytes(),
        _bytes(np.round((there.harmonics * 128 + 128) / step) * step),
    ]

    def content(file: IO[bytes]) -> None:
        with gzip.GzipFile("", "wb", 6, file, mtime=0) as stream:  # neither name nor time: the same splats are the same bytes
            for part in parts:
                stream.write(part)

    _write(Path(path), content)


def _bytes(values: np.ndarray) -> bytes:
    return np.clip(np.round(values), 0, 255).astype(np.uint8).tobytes()


# Splats in other places


def transformed(points: Points, matrix: np.ndarray, offset: np.ndarray) -> Points:
    """The splats after `x -> matrix @ x + offset` of their world, any invertible 3x3 matrix: a Gaussian stays one, with the covariance
    matrix C matrix^T; what depends on the direction of view turns with the nearest rotation (mirrored where the matrix mirrors)."""
    matrix = np.asarray(matrix, np.float64)
    u, size, vt = np.linalg.svd(matrix)
    turn = u @ vt
    if np.ptp(size) < 1e-6 * size[0] and np.linalg.det(turn) > 0:
        quaternions = _unit(_product(_quaternions_of(turn[None])[0], points.quaternions))
        scales = points.scales * np.float32(size.mean())
    else:
        # Of matrix R diag(s), the left singular vectors and the singular values are the new axes and deviations.
        axes, deviations, _ = np.linalg.svd(matrix @ rotations(points.quaternions) * points.scales[:, None, :].astype(np.float64))
        axes[:, :, 2] *= np.sign(np.linalg.det(axes))[:, None]
        quaternions, scales = _quaternions_of(axes).astype(np.float32), deviations.astype(np.float32)
    harmonics = points.harmonics
    if harmonics.shape[1] and not np.allclose(turn, np.eye(3), atol=1e-7):
        harmonics = np.einsum("kj,njc->nkc", _of_harmonics(turn, harmonics.shape[1] + 1), harmonics, optimize=True).astype(np.float32)
    return replace(points, means=points.means @ matrix.T + offset, scales=scales, quaternions=quaternions, harmonics=harmonics)


def joined(first: Points, second: Points) -> Points:
    """Both, of one degree."""
    parts = ("means", "scales", "quaternions", "colors", "opacities", "harmonics")
    return replace(first, **{name: np.concatenate([getattr(first, name), getattr(second, name)]) for name in parts})


def rotations(quaternions: np.ndarray) -> np.ndarray:
    """(N, 3, 3) of unit quaternions, w first."""
    w, x, y, z = quaternions.T.astype(np.float64)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def _quaternions_of(matrices: np.ndarray) -> np.ndarray:
    """(N, 4), w first, of rotations (N, 3, 3): of the four products q q_i, the row whose q_i is largest, which loses nothing."""
    m = matrices
    diagonal = m[:, 0, 0], m[:, 1, 1], m[:, 2, 2]
    a, b, c = m[:, 2, 1], m[:, 0, 2], m[:, 1, 0]
    d, e, f = m[:, 1, 2], m[:, 2, 0], m[:, 0, 1]
    x, y, z = diagonal
    table = np.stack(
        [
            np.stack([1 + x + y + z, a - d, b - e, c - f], 1),
            np.stack([a - d, 1 + x - y - z, f + c, b + e], 1),
            np.stack([b - e, f + c, 1 - x + y - z, d + a], 1),
            np.stack([c - f, b + e, d + a, 1 - x - y + z], 1),
        ],
        1,
    )
    best = np.einsum("nii->ni", table).argmax(1)
    return _unit(table[np.arange(len(m)), best])


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    w, x, y, z = left
    return right @ np.array([[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]], np.float64).T


def _unit(quaternions: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(quaternions, axis=1, keepdims=True)
    return (quaternions / np.maximum(length, 1e-12)).astype(np.float32)


def basis(directions: np.ndarray, degree: int) -> np.ndarray:
    """(N, (degree + 1)^2) real spherical harmonics of unit directions, in the order and with the signs of Kerbl et al. 2023's code."""
    x, y, z = np.asarray(directions, np.float64).T
    xx, yy, zz = x * x, y * y, z * z
    values = [np.full_like(x, SH_C0)]
    values += [factor * polynomial for factor, polynomial in zip(FACTORS, polynomials(x, y, z, xx, yy, zz), strict=True)]
    return np.stack(values[: (degree + 1) ** 2], 1)


FACTORS = (
    -0.4886025119029199, 0.4886025119029199, -0.4886025119029199,
    1.0925484305920792, -1.0925484305920792, 0.31539156525252005, -1.0925484305920792, 0.5462742152960396,
    -0.5900435899266435, 2.890611442640554, -0.4570457994644658, 0.3731763325901154, -0.4570457994644658, 1.445305721320277,
    -0.5900435899266435,
)  # fmt: skip


def polynomials(x, y, z, xx, yy, zz) -> list[np.ndarray]:
    return [
        y, z, x,
        x * y, y * z, 2 * zz - xx - yy, x * z, xx - yy,
        y * (3 * xx - yy), x * y * z, y * (4 * zz - xx - yy), z * (2 * zz - 3 * xx - 3 * yy), x * (4 * zz - xx - yy), z * (xx - yy),
        x * (xx - 3 * yy),
    ]  # fmt: skip


def _of_harmonics(turn: np.ndarray, bases: int) -> np.ndarray:
    """What a turned world does to the coefficients without the constant one: Y(d) c' = Y(turn^T d) c, solved on directions enough."""
    directions = np.random.default_rng(0).normal(size=(8 * bases, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    degree = round(bases**0.5) - 1
    solved = np.linalg.lstsq(basis(directions, degree), basis(directions @ turn, degree), rcond=None)[0]
    return solved[1:, 1:]


def _logit(opacities: np.ndarray) -> np.ndarray:
    inside = np.clip(opacities.astype(np.float64), 1e-7, 1 - 1e-7)
    return np.log(inside / (1 - inside))
