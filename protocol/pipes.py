"""The pipes on which a process of Kiln's talks with the one that started it, kept apart from what libraries print."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import IO, Any


def take() -> tuple[IO[bytes], IO[bytes]]:
    """Standard input and output for the parent alone. Whatever else reads gets nothing; what else prints goes to standard error, a log."""
    commands, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    if sys.platform == "win32":
        import msvcrt

        for handle in (commands, replies):
            msvcrt.setmode(handle, os.O_BINARY)
    sys.stdout = sys.stderr = io.TextIOWrapper(_Log(), errors="backslashreplace", write_through=True)
    return os.fdopen(commands, "rb"), os.fdopen(replies, "wb")


class _Log(io.RawIOBase):
    """The log file. A disk that is full takes no more of it, which is no reason for a step that prints to fail."""

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        with contextlib.suppress(OSError):
            os.write(2, content)
        return len(content)
