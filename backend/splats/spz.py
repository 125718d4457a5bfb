"""Splats in SPZ, Niantic's open compressed format (github.com/nianticlabs/spz): a quarter of a PLY or less, and read by most splat
viewers.

A gzip stream: 16 bytes of header, then field by field, each for all Gaussians: positions (24-bit fixed point), alphas, colours, log-scales
(8 bits), rotations (32 bits in version 3), spherical harmonics (8 bits). Files hold metres in right-up-back axes (Y up), as the format's
documentation says and as mesh.glb has them; here they are turned to Z up. Version 3 is written, 1 to 3 are read; version 4 is another
container around Zstandard streams.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from backend.progress import Progress, silent
from backend.views.views import Frame
from protocol.errors import KilnError

from .clean import check_count, cleaned
from .model import Splats
from .turn import Z_UP_FROM_Y_UP, turned

MAGIC = 0x5053474E  # "NGSP"
VERSION = 3
HEADER = struct.Struct("<IIIBBBB")  # magic, version, Gaussians, degree, fractional bits, flags, reserved
EXTENDED = 2  # the flag of a file with vendors' records between the header and the Gaussians
COLOR = 0.15  # colour bytes hold 0.5 + COLOR * f_dc: a range that is wider than what can be shown
BUCKETS = (8, 16)  # steps of the spherical harmonics' bytes, of degree 1 and of the others: fewer values pack better
LEVEL = 6  # of gzip: higher ones take twice the time for 1 %
SMALLEST_THREE = 511 * math.sqrt(2)  # a component that is not the largest is at most sqrt(1/2); 9 bits and a sign hold it
MOST_FRACTION = 24  # bits: a sixteen-millionth of a metre
PIECE = 1 << 22  # bytes between two reports


def save(path: Path, splats: Splats, frame: Frame) -> None:
    """Writes splats of the unit frame in world metres. The file appears whole or not at all.

    Off by rounding at most: 0.03 in log-scales (from 0.05 mm), 0.002 in opacity, 0.004 in colour, 0.28 degrees; positions to
    2^-22 of the largest coordinate.
    """
    there = turned(splats, Z_UP_FROM_Y_UP.T)
    centre = Z_UP_FROM_Y_UP.T @ frame.centre
    places = there.means.astype(np.float64) / frame.scale + centre
    largest = max(float(np.abs(places).max(initial=0)), 1e-30)
    fraction = int(np.clip(22 - math.ceil(math.log2(largest)), 0, MOST_FRACTION))
    if largest * 2.0**fraction >= 2**23 - 1:
        raise KilnError("bad-input", f"Splats lie {largest:.3g} m from the origin, too far for an SPZ file.", "Move them nearer.")
    degree = round(there.sh.shape[1] ** 0.5) - 1
    content = [
        HEADER.pack(MAGIC, VERSION, len(there), degree, fraction, 0, 0),
        _fixed(places, fraction),
        _bytes(255 / (1 + np.exp(-there.opacity_logits.astype(np.float64)))),
        _bytes(255 * (0.5 + COLOR * there.sh[:, 0])),
        _bytes(16 * (there.log_scales - math.log(frame.scale) + 10)),
        _smallest_three(there.quaternions),
    ]
    rest = there.sh[:, 1:]
    bucket = np.where(np.arange(rest.shape[1]) < 3, *BUCKETS)[:, None]
    content.append(_bytes(np.minimum(np.round((rest * 128 + 128) / bucket) * bucket, 255)))
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file, gzip.GzipFile("", "wb", LEVEL, file, mtime=0) as packed:  # no name, no time: same splats, same bytes
        for part in content:
            packed.write(part)
    os.replace(partial, path)


def load(path: Path, say: Callable[[str], None] = lambda sentence: None, progress: Progress = silent) -> Splats:
    """The splats of an SPZ file in metres, Z up, or `KilnError("bad-input")` that says what is wrong with it.

    Gaussians that cannot be drawn are left out; a sentence to `say` counts them. `KilnError` if none is left.
    """
    name = Path(path).name
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            file.seek(0)
            if start[:4] == struct.pack("<I", MAGIC):
                version = struct.unpack("<I", start[4:8])[0] if len(start) == 8 else "?"
                raise KilnError("bad-input", f"{name} is SPZ version {version}; 1 to 3 can be read.", "Save it as version 3, or as PLY.")
            if start[:2] != b"\x1f\x8b":
                raise KilnError("bad-input", f"{name} is not an SPZ file.", "Give splats as SPZ or PLY.")
            with gzip.GzipFile(fileobj=file) as packed:
                return cleaned(_read(packed, name, say, progress), name, say)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise KilnError("bad-input", f"{name} is damaged or not whole: {error}.", "Copy it again.") from None
    except OSError as error:
        raise KilnError("bad-input", f"{name} cannot be read: {error.strerror or error}.", "Check the path and its permissions.") from None


def _read(packed: gzip.GzipFile, name: str, say: Callable[[str], None], progress: Progress) -> Splats:
    header = packed.read(HEADER.size)
    if len(header) < HEADER.size or HEADER.unpack(header)[0] != MAGIC:
        raise KilnError("bad-input", f"{name} is a gzip file, but not SPZ.", "Give splats as SPZ or PLY.")
    _, version, count, degree, fraction, flags, _ = HEADER.unpack(header)
    if version not in (1, 2, 3):
        raise KilnError("bad-input", f"{name} is SPZ version {version}; 1 to 3 can be read.", "Save it as version 3, or as PLY.")
    if degree > 4 or fraction > 30 or flags & EXTENDED:
        raise KilnError("bad-input", f"{name} uses parts of SPZ that Kiln cannot read.", "Save it as plain SPZ version 3, or as PLY.")
    check_count(count, name)

    higher = 3 * ((degree + 1) ** 2 - 1)  # bytes of the spherical harmonics but for the constant one
    whole = count * ({1: 6}.get(version, 9) + 1 + 3 + 3 + (4 if version == 3 else 3) + higher)
    done = 0

    def take(width: int, kind: str = "u1") -> np.ndarray:
        nonlocal done
        values = np.empty((count, width), kind)
        content = values.reshape(-1).view(np.uint8).data
        at = 0
        while at < len(content):
            progress(done / whole, f"{count:,} splats")
            got = packed.readinto(content[at : at + PIECE])
            if not got:
                raise KilnError("bad-input", f"{name} ends before its {count:,} Gaussians do.", "Copy it again.")
            at, done = at + got, done + got
        return values

    if version == 1:
        means = take(3, "<f2").astype(np.float32)
    else:
        low, middle, high = np.moveaxis(take(9).reshape(count, 3, 3), -1, 0).astype(np.int32)
        means = ((low | middle << 8 | (high << 24 >> 8)) / 2.0**fraction).astype(np.float32)
    opacity = np.clip(take(1)[:, 0].astype(np.float64), 0.5, 254.5) / 255  # bytes 0 and 255 are rounded: their logits would be infinite
    constant = ((take(3) / 255 - 0.5) / COLOR).astype(np.float32)
    log_scales = take(3) / 16 - 10
    if version == 3:
        quaternions = _from_smallest_three(take(1, "<u4")[:, 0])
    else:
        axis = take(3) / 127.5 - 1
        quaternions = np.concatenate([np.sqrt(np.maximum(1 - (axis**2).sum(1, keepdims=True), 0)), axis], 1)
    rest = take(higher).reshape(count, higher // 3, 3)
    if degree > 3:
        say(f"{name}: the fourth degree of its spherical harmonics is left out.")
    sh = np.concatenate([constant[:, None], (rest[:, :15].astype(np.float32) - 128) / 128], 1)
    read = Splats(
        means=means,
        quaternions=quaternions.astype(np.float32),
        log_scales=log_scales.astype(np.float32),
        opacity_logits=np.log(opacity / (1 - opacity)).astype(np.float32),
        sh=sh,
    )
    return turned(read, Z_UP_FROM_Y_UP)


def _bytes(values: np.ndarray) -> bytes:
    return np.clip(np.round(values), 0, 255).astype(np.uint8).tobytes()


def _fixed(places: Float[np.ndarray, "n 3"], fraction: int) -> bytes:
    """24-bit two's complement, little-endian."""
    whole = np.round(places * 2.0**fraction).astype("<i4")
    return np.ascontiguousarray(whole.view(np.uint8).reshape(*whole.shape, 4)[..., :3]).tobytes()


def _smallest_three(quaternions: Float[np.ndarray, "n 4"]) -> bytes:
    """Two bits that name the largest of x, y, z, w, then the three others in that order: a sign and 9 bits each, highest bits first."""
    q = quaternions[:, [1, 2, 3, 0]].astype(np.float64)
    q /= np.maximum(np.linalg.norm(q, axis=1, keepdims=True), 1e-30)
    largest = np.abs(q).argmax(1)
    each = np.arange(len(q))
    q *= np.where(q[each, largest] < 0, -1, 1)[:, None]  # -q is the same rotation
    packed = largest.astype(np.uint32)
    for step in range(3):
        value = q[each, step + (step >= largest)]
        size = np.minimum(np.round(np.abs(value) * SMALLEST_THREE), 511).astype(np.uint32)
        packed = packed << 10 | (value < 0).astype(np.uint32) << 9 | size
    return packed.astype("<u4").tobytes()


def _from_smallest_three(packed: UInt8[np.ndarray, "n"]) -> Float[np.ndarray, "n 4"]:
    """Quaternions, w first."""
    largest = (packed >> 30).astype(int)
    q = np.zeros((len(packed), 4))
    each = np.arange(len(packed))
    for step in range(3):
        field = packed >> (20 - 10 * step)
        value = (field & 511) / SMALLEST_THREE
        q[each, step + (step >= largest)] = np.where(field & 512, -value, value)
    q[each, largest] = np.sqrt(np.maximum(1 - (q**2).sum(1), 0))
    return q[:, [3, 0, 1, 2]]
