"""Files on a disk that may fill and under a process that may be killed: a reader finds the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from protocol.errors import KilnError

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_UMASK = os.umask(0o077)  # there is no other way to read it
os.umask(_UMASK)
LOG_BYTES = 5_000_000
_WINDOWS_FULL = (39, 112)  # ERROR_HANDLE_DISK_FULL, ERROR_DISK_FULL


def no_space(folder: Path, needed: int = 0, limit: int | None = None) -> KilnError:
    """The sentence for a full disk, or for a store that reached its own `limit` in bytes."""
    wanted = f" for {size_text(needed)} more" if needed else ""
    if limit is not None:
        return KilnError(
            "no-space",
            f"The store {folder} has no room{wanted}: its limit is {size_text(limit)}.",
            "Import or remove finished jobs (`kiln store show` lists them), or raise the limit, KILN_STORE_GB.",
        )
    return KilnError(
        "no-space",
        f"The disk that holds {folder} has no room{wanted}: {size_text(shutil.disk_usage(folder).free)} are free.",
        "Free some space there (removing old jobs helps), or set KILN_HOME to a folder on another disk.",
    )


def size_text(count: float) -> str:
    """`count` bytes for people: 3.2 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"


def is_full(error: BaseException) -> bool:
    """Whether an exception means that the disk is full."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
    return isinstance(error, OSError) and (error.errno in _FULL or getattr(error, "winerror", None) in _WINDOWS_FULL)


@contextlib.contextmanager
def full_disk_named(folder: Path, needed: int = 0) -> Iterator[None]:
    """Turns "no space left on device" inside the block into `KilnError("no-space")` that says which disk and how much is free."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        if is_full(error):
            raise no_space(folder, needed) from error
        raise


def limit_log(stream: int, log: Path) -> None:
    """When `log` has more than `LOG_BYTES`, moves its text to `<log>.1`. `stream`: the file descriptor that appends to it.

    Copied and cut, not renamed: the processes that print to it have it open, and Windows renames no open file.
    """
    with contextlib.suppress(OSError):
        state = os.fstat(stream)
        if state.st_size > LOG_BYTES and os.path.samestat(state, log.stat()):  # what prints elsewhere is somebody else's
            shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            os.ftruncate(stream, 0)
            os.lseek(stream, 0, os.SEEK_SET)


def write(target: Path, chunks: Iterable[bytes | memoryview], temporary: Path, durable: bool = True, private: bool = True) -> None:
    """Writes `target` whole or not at all. `temporary` is a folder on the same disk. `durable`: it survives a power cut from here on.
    `private`: nobody else may read it; else who may read the user's files may."""
    handle, name = tempfile.mkstemp(dir=temporary)
    try:
        with full_disk_named(temporary), os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if not private:
            os.chmod(name, 0o666 & ~_UMASK)
        move(Path(name), target, durable)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def move(source: Path, target: Path, durable: bool = True) -> None:
    """Renames within one disk, over whatever lies at `target`."""
    with full_disk_named(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
        if durable and os.name == "posix":  # the rename itself lies in the folder's own data
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def lock(path: Path) -> IO[str]:
    """Holds the file for this process alone, until it is closed; the system drops it with the process, however that ends.

    The file then holds this process's id. Raises BlockingIOError, whose one argument is the holder's id as text, perhaps empty.
    """
    file = open(path, "a+")
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 20)  # beyond the text, which others may then still read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read(20).strip()
        file.close()
        raise BlockingIOError(holder) from None
    file.seek(0)
    file.truncate()
    file.write(str(os.getpid()))
    file.flush()
    return file
