"""The multilayer OpenEXR files that Blender writes, read into numpy: one part, scan lines, no compression or ZIP.

Blender's Python has no way to the pixels of a multilayer file, and Blender ships no OpenImageIO for Python on every system.
Follows "The OpenEXR file layout" (openexr.com), as far as such files use it.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np

ROWS_PER_BLOCK = {0: 1, 2: 1, 3: 16}  # by compression: none, ZIP of single rows, ZIP of 16 rows
SAMPLE_TYPES = {0: np.dtype("<u4"), 1: np.dtype("<f2"), 2: np.dtype("<f4")}


def read(path: Path) -> dict[str, np.ndarray]:
    """Every channel as an H x W array (float32, float16 or uint32 as stored), row 0 at the top, under its name in the file:
    "ViewLayer.Depth.Z". A file of another kind raises ValueError that says what about it is not supported."""
    data = Path(path).read_bytes()
    try:
        return _parse(data)
    except (struct.error, zlib.error, IndexError, KeyError) as error:
        raise ValueError(f"{Path(path).name} is damaged or cut short: {error}") from error


def _parse(data: bytes) -> dict[str, np.ndarray]:
    magic, version = struct.unpack_from("<II", data)
    if magic != 20000630:
        raise ValueError("not an OpenEXR file")
    if version & 0x1A00:  # tiles, deep data, several parts
        raise ValueError("OpenEXR files with tiles, deep data or several parts are not supported")
    header, position = _header(data, 8)
    compression = header["compression"][0]
    if compression not in ROWS_PER_BLOCK:
        raise ValueError(f"OpenEXR compression {compression} is not supported, only none and ZIP")
    left, top, right, bottom = struct.unpack("<4i", header["dataWindow"])
    width, height = right - left + 1, bottom - top + 1
    channels = _channels(header["channels"])
    row_bytes = sum(width * dtype.itemsize for _, dtype in channels)
    rows = ROWS_PER_BLOCK[compression]
    blocks = -(-height // rows)
    pixels = np.empty((height, row_bytes), np.uint8)
    for offset in struct.unpack_from(f"<{blocks}Q", data, position):
        y, size = struct.unpack_from("<ii", data, offset)
        first = y - top
        count = min(rows, height - first)
        block = np.frombuffer(data[offset + 8 : offset + 8 + size], np.uint8)
        if size != count * row_bytes:  # a block that does not shrink is stored as it is
            block = _inflate(block)
        if len(block) != count * row_bytes:
            raise IndexError(f"the rows from {y} on are incomplete")
        pixels[first : first + count] = block.reshape(count, row_bytes)
    found, start = {}, 0
    for name, dtype in channels:
        stop = start + width * dtype.itemsize
        found[name] = np.ascontiguousarray(pixels[:, start:stop]).view(dtype)
        start = stop
    return found


def _inflate(block: np.ndarray) -> np.ndarray:
    """Undo zlib, then the difference between neighbouring bytes, then the split into even and odd bytes."""
    packed = np.frombuffer(zlib.decompress(block), np.uint8)
    steps = packed.astype(np.int64) - 128
    steps[0] += 128
    plain = np.cumsum(steps).astype(np.uint8)
    half = (len(plain) + 1) // 2
    whole = np.empty_like(plain)
    whole[0::2], whole[1::2] = plain[:half], plain[half:]
    return whole


def _header(data: bytes, position: int) -> tuple[dict[str, bytes], int]:
    """The attributes' raw values by name, and where the header ends."""
    attributes = {}
    while data[position]:
        name, position = _text(data, position)
        _, position = _text(data, position)
        (size,) = struct.unpack_from("<i", data, position)
        attributes[name] = data[position + 4 : position + 4 + size]
        position += 4 + size
    return attributes, position + 1


def _channels(data: bytes) -> list[tuple[str, np.dtype]]:
    """Name and sample type of each channel, in the order of the pixels in a row."""
    channels, position = [], 0
    while data[position]:
        name, position = _text(data, position)
        kind, _, x_step, y_step = struct.unpack_from("<iiii", data, position)
        if (x_step, y_step) != (1, 1):
            raise ValueError("OpenEXR channels with fewer samples than pixels are not supported")
        channels.append((name, SAMPLE_TYPES[kind]))
        position += 16
    return channels


def _text(data: bytes, position: int) -> tuple[str, int]:
    end = data.find(b"\0", position)
    if end < 0:
        raise IndexError("a name has no end")
    return data[position:end].decode("utf-8"), end + 1
