"""The connection file: where the backend listens and the keys that let a client in. Whoever can read it may connect, nobody else can.

Keys last (`keys/keys.json`), so that a connection file which was carried to another machine stays valid when the backend restarts.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from . import VERSION, messages
from .errors import KilnError

HELD_SECONDS = 1.0  # that another program may hold a file before that is an error
_T = TypeVar("_T")


def home() -> Path:
    """The user's Kiln folder: $KILN_HOME, or `kiln` in the system's place for a user's data."""
    if os.environ.get("KILN_HOME"):
        return Path(os.environ["KILN_HOME"]).expanduser().absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "Kiln"
    if sys.platform == "darwin":
        return Path.home() / "Library/Application Support/Kiln"
    shared = os.environ.get("XDG_DATA_HOME", "")
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".local/share") / "kiln"


def default_path() -> Path:
    """The connection file of this machine's backend."""
    return home() / "run" / "connection.json"


def remote_path() -> Path:
    """The connection file to carry to another machine; there is one only while the backend listens on the network."""
    return home() / "run" / "remote.json"


@dataclass(frozen=True)
class Connection:
    """Everything a client needs to reach a backend. Keys are CURVE keys in Z85."""

    endpoint: str  # tcp://127.0.0.1:41733
    server_key: str
    client_key: str
    client_secret: str
    protocol: tuple[int, int] = messages.PROTOCOL
    version: str = VERSION  # of the Kiln that wrote the file
    pid: int = 0  # of the backend, on its own machine
    path: Path | None = field(default=None, compare=False)  # where it was read from; a client looks there again when the backend is gone

    @classmethod
    def load(cls, path: Path | str) -> Connection:
        path = Path(path)
        try:
            text = patiently(path.read_bytes).decode()
        except FileNotFoundError:
            raise KilnError("unavailable", f"No Kiln backend runs: there is no file {path}.", "Start one with `kiln serve`.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise KilnError("bad-connection", f"The connection file {path} cannot be read: {error}.", "Check whose file it is.") from None
        try:
            found = json.loads(text)
            return cls(
                endpoint=_text(found, "endpoint"), server_key=_key(found, "server_key"), client_key=_key(found, "client_key"),
                client_secret=_key(found, "client_secret"), protocol=(int(found["protocol"][0]), int(found["protocol"][1])),
                version=str(found.get("version", "")), pid=int(found.get("pid", 0)), path=path,
            )  # fmt: skip
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise KilnError(
                "bad-connection",
                f"{path} is not a Kiln connection file ({error}).",
                "Take run/connection.json from the backend's Kiln folder.",
            ) from None

    def save(self, path: Path) -> None:
        values = asdict(self)
        del values["path"]
        write_private(path, json.dumps(values, indent=2) + "\n")


@dataclass(frozen=True)
class Keys:
    """The backend's key pair, and the pair that its clients prove themselves with."""

    server_key: str
    server_secret: str
    client_key: str
    client_secret: str

    @classmethod
    def make(cls) -> Keys:
        import zmq

        if not zmq.has("curve"):
            raise KilnError(
                "no-curve",
                "This build of ZeroMQ cannot encrypt, and Kiln does not talk in the clear.",
                "Reinstall pyzmq: pip install -U pyzmq",
            )
        server, client = zmq.curve_keypair(), zmq.curve_keypair()
        return cls(*(key.decode() for key in (*server, *client)))

    @classmethod
    def of(cls, folder: Path, anew: bool = False) -> Keys:
        """The keys of the backend whose home is `folder`; made at its first start, and `anew` to shut out whoever has the old ones."""
        path = folder / "keys" / "keys.json"
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):  # a damaged file is replaced
            found = {} if anew else json.loads(patiently(path.read_bytes))
            return cls(*(_key(found, name) for name in ("server_key", "server_secret", "client_key", "client_secret")))
        keys = cls.make()
        write_private(path, json.dumps(asdict(keys), indent=2) + "\n")
        return keys


def _text(found: dict, name: str) -> str:
    if not isinstance(found[name], str) or not found[name]:
        raise ValueError(f"{name} is not text")
    return found[name]


def _key(found: dict, name: str) -> str:
    if len(_text(found, name)) != 40:
        raise ValueError(f"{name} is not a key of 40 characters")
    return found[name]


def patiently(action: Callable[[], _T]) -> _T:
    """What `action` returns. Tries again for a moment: Windows replaces no file while somebody reads it, and reads none meanwhile."""
    give_up = time.monotonic() + HELD_SECONDS
    while True:
        try:
            return action()
        except PermissionError:
            if time.monotonic() >= give_up:
                raise
            time.sleep(0.02)


def write_private(path: Path, text: str) -> None:
    """Writes a file whole or not at all, readable by this user alone from its first byte on."""
    private_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            if sys.platform == "win32":
                _own(temporary)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        patiently(lambda: os.replace(temporary, path))
    except OSError as error:
        raise KilnError(
            "disk", f"{path} cannot be written: {error.strerror or error}.", "Make room, or check the folder's permissions."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def private_folder(folder: Path) -> None:
    """Creates a folder that only this user can enter, and closes one that others could."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if sys.platform == "win32":
            _own(folder)
        elif folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise KilnError(
            "disk", f"{folder} cannot be made private: {error.strerror or error}.", "Check the folder's owner and permissions."
        ) from error


def acl_command(path: Path, user: str) -> list[str]:
    """The Windows command that leaves `user` as the only one with rights on `path` (and, for a folder, on what it will hold)."""
    rights = "(OI)(CI)F" if path.is_dir() else "F"
    return ["icacls", str(path), "/inheritance:r", "/grant:r", f"{user}:{rights}"]


def _own(path: Path) -> None:
    user = os.environ.get("USERNAME", "")
    domain = os.environ.get("USERDOMAIN", "")
    if user:  # without it the folder keeps the rights of the user's own data folder, which are private too
        name = f"{domain}\\{user}" if domain else user
        subprocess.run(acl_command(path, name), check=False, capture_output=True, creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0))
