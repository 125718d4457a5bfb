"""What a message is on the wire: a msgpack map, then raw blobs. The numbers below are the limits that SPEC.md states, and they are
checked before memory is spent on what a peer sent."""

from __future__ import annotations

from typing import Any

import msgpack

from .errors import KilnError
from .views import MOST_FILES

PROTOCOL = (1, 1)  # (major, minor): a new major breaks old peers, a new minor only adds messages and fields

FRAME_BYTES = 512 * 1024  # one frame of a request: a header, or a blob
REPLY_BYTES = 2 * FRAME_BYTES  # one frame of an answer: a job's inputs come back beside its results
FRAMES = 2  # a header and at most one blob
CHUNK_BYTES = 250_000  # what one chunk of an upload or a download holds
WINDOW = 16  # chunks on their way at once: 4 MB
NESTING = 8  # maps and lists within one another
LIST_LENGTH = 1024
MAP_LENGTH = 16384
ID_LENGTH = 100  # characters of a request's id
INPUTS = MOST_FILES  # of one job
SOURCE_BYTES = 64 * 1024  # a job's provenance, packed
TITLE_LENGTH = 200  # characters
ARTIFACT_BYTES = 16 * 1024**3  # one file
PAGE_BYTES = 200_000  # of a list of jobs or events, as one reply holds it
CLIENTS = 64
WAITING = 32  # requests of one client that are not answered yet
TRANSFERS = 8  # uploads and downloads of one client at once


def limits() -> dict[str, int]:
    """The limits that a client has to know, as `hello` tells them."""
    return {
        "frame_bytes": FRAME_BYTES, "reply_bytes": REPLY_BYTES, "chunk_bytes": CHUNK_BYTES, "window": WINDOW, "nesting": NESTING,
        "list_length": LIST_LENGTH, "map_length": MAP_LENGTH, "inputs": INPUTS, "source_bytes": SOURCE_BYTES,
        "artifact_bytes": ARTIFACT_BYTES, "clients": CLIENTS, "waiting": WAITING, "transfers": TRANSFERS,
    }  # fmt: skip


def pack(header: dict[str, Any], most: int = FRAME_BYTES) -> bytes:
    """The header's frame; `KilnError("too-large")` if the other side would refuse it."""
    try:
        frame = msgpack.packb(header)
    except (TypeError, ValueError, OverflowError) as error:
        raise KilnError("bad-message", f"The message cannot be packed: {error}.", "Give text, numbers, lists and maps only.") from None
    if len(frame) > most:
        raise KilnError("too-large", f"The message takes {len(frame)} bytes; {most} are allowed.", "Send fewer files or less provenance.")
    return frame


def unpack(frame: bytes | memoryview, most: int = FRAME_BYTES, nesting: int = NESTING) -> dict[str, Any]:
    """The header in a frame that anybody may have written; `KilnError("bad-message")` says what is wrong with it."""
    if len(frame) > most:
        raise KilnError("too-large", f"The header takes {len(frame)} bytes; {most} are allowed.", "SPEC.md lists the limits.")
    try:
        header = msgpack.unpackb(
            frame, strict_map_key=True, max_array_len=LIST_LENGTH, max_map_len=MAP_LENGTH, max_str_len=most, max_bin_len=most, max_ext_len=0
        )
    except Exception as error:  # msgpack raises half a dozen types, depending on how it was built
        raise KilnError("bad-message", f"The header is not valid msgpack within the limits: {error!r:.200}.", "SPEC.md, Framing.") from None
    if not isinstance(header, dict) or not isinstance(header.get("type"), str):
        raise KilnError("bad-message", "The header is not a map with a text 'type'.", "SPEC.md, Framing.")
    level: list[Any] = [header]
    depth = 0
    while level:
        depth += 1
        if depth > nesting:
            raise KilnError("bad-message", f"The header nests deeper than {nesting} levels.", "SPEC.md, Limits.")
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]  # fmt: skip
    return header


def take(header: dict[str, Any], name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
    """A field of a header in the type that it must have; `KilnError("bad-message")` names the field. Absent or nil: the default."""
    value = header.get(name)
    if value is None and default is not ...:
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
        wanted = " or ".join(_NAMES[one] for one in kinds)
        raise KilnError(
            "bad-message", f"The field {name!r} of {header.get('type', '')[:40]!r} must be {wanted}.", "SPEC.md lists the messages."
        )
    return value


def count(header: dict[str, Any], name: str, low: int, high: int, default: Any = ...) -> int:
    """A whole-number field within [low, high]."""
    value = take(header, name, int, default)
    if not low <= value <= high:
        raise KilnError("bad-message", f"The field {name!r} of {header['type'][:40]!r} must lie in {low} to {high}.", "SPEC.md, Limits.")
    return value


_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "a map", list: "a list"}
