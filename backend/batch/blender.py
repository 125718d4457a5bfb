"""A Blender in the background, spoken to in JSON lines: it reads models, renders their views and writes what Blender alone can write.

The other end is blender_addon/background.py, run in an installed Blender or in a Python that has bpy, from a checkout's two folders or from
an installed extension's one. It has factory settings and a user folder of its own, so that nobody's preferences are read or written. It
ends when its standard input does: none outlives the process that started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol import VERSION
from protocol.errors import KilnError

ROOT = Path(__file__).resolve().parents[2]
OLDEST = (4, 2)
START_SECONDS = 180  # a first start on a slow disk reads a gigabyte
QUIET_SECONDS = 1800  # without a word from a request: one view of the largest subjects takes minutes, a huge file some more
LOG_BYTES = 20 << 20
MISSING = ("no-blender", "no-extension")  # errors that no file is to blame for
Progress = Callable[[float, str], None]

# Runs in Blender: the extension's modules as a package that is not the extension, so that neither its panel nor its wheels are wanted.
START = """
import importlib.util, sys, types
folder, protocol, scratch = {arguments!a}
package = types.ModuleType("kiln_background")
package.__path__ = [folder]
sys.modules[package.__name__] = package
spec = importlib.util.spec_from_file_location("kiln_background.protocol", protocol + "/__init__.py", submodule_search_locations=[protocol])
sys.modules[spec.name] = package.protocol = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package.protocol)
from kiln_background import background
background.serve(scratch)
"""


@dataclass(frozen=True)
class Command:
    """A Blender that can be started: the executable, whether it is a Python that has bpy, and the Blender's version ("4.5.4 LTS")."""

    path: Path
    is_python: bool
    version: str

    def line(self, code: str) -> list[str]:
        if self.is_python:
            return [str(self.path), "-u", "-c", code]
        quiet = ["--background", "--factory-startup", "--disable-autoexec", "--offline-mode", "-noaudio"]
        return [str(self.path), *quiet, "--python-exit-code", "1", "--python-expr", code]


def find(given: str | Path | None = None) -> Command:
    """The Blender to use: `given` (an executable, a Python that has bpy, or the folder or macOS bundle of either), else KILN_BLENDER,
    else this checkout's own, else the first of those installed that is new enough. Raises KilnError("no-blender")."""
    named = given or os.environ.get("KILN_BLENDER")
    if named:
        path = Path(named).expanduser()
        found, reason = _look(_executable(path))
        if found is None:
            hint = f"Name the executable of Blender {_dotted(OLDEST)} or later, or a Python that has bpy."
            raise KilnError("no-blender", f"{path} cannot be used as Blender: {reason}.", hint)
        return found
    refused = []
    for path in _places():
        found, reason = _look(path)
        if found is not None:
            return found
        refused.append(f"{path}: {reason}")
    seen = f" Looked at {'; '.join(refused)}." if refused else ""
    hint = f"Install Blender {_dotted(OLDEST)} or later from blender.org, or name it: --blender PATH."
    raise KilnError("no-blender", f"No Blender was found that can be used.{seen}", hint)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _executable(path: Path) -> Path:
    """The executable in a folder or bundle that someone names."""
    inside = ["blender.exe", "Scripts/python.exe"] if sys.platform == "win32" else ["Contents/MacOS/Blender", "blender", "bin/python"]
    return next((path / name for name in inside if (path / name).is_file()), path)


def _look(path: Path) -> tuple[Command | None, str]:
    """The Blender of an executable, or why it cannot be used."""
    try:
        said = _output([str(path), "--version"])
        if is_python := re.search(r"^Python \d", said, re.MULTILINE) is not None:
            said = _output([str(path), "-c", "import bpy; print('Blender', bpy.app.version_string)"])
    except OSError as error:
        return None, f"it does not start ({error.strerror or error})"
    except subprocess.TimeoutExpired:
        return None, "it does not answer"
    found = re.search(r"^Blender ((\d+)\.(\d+)\S*.*)$", said, re.MULTILINE)
    if found is None:
        return None, "it is a Python without bpy" if is_python else "it does not say that it is Blender"
    if (int(found[2]), int(found[3])) < OLDEST:
        return None, f"Blender {found[1].strip()} is older than {_dotted(OLDEST)}"
    return Command(path, is_python, found[1].strip()), ""


def _output(command: list[str]) -> str:
    with tempfile.TemporaryDirectory(prefix="kiln-background-", ignore_cleanup_errors=True) as scratch:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, env=_variables(scratch),
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )  # fmt: skip
    return done.stdout.decode(errors="replace")


def _places() -> Iterator[Path]:
    """Where a Blender may be, without repeats: the newest of several versions first."""
    name = "Scripts/python.exe" if sys.platform == "win32" else "bin/python"
    found = [ROOT / ".venv" / folder / name for folder in ("blender", "blender-5.2", "blender-4.2")]
    if on_path := shutil.which("blender"):
        found.append(Path(on_path))
    if sys.platform == "win32":
        roots = [os.environ.get(name) for name in ("ProgramFiles", "ProgramW6432", "ProgramFiles(x86)", "LOCALAPPDATA")]
        for root in [Path(root) for root in roots if root]:
            found += _newest(root, "Blender Foundation/*/blender.exe") + _newest(root, "Programs/Blender Foundation/*/blender.exe")
            found += [root / "Steam/steamapps/common/Blender/blender.exe", root / "Microsoft/WindowsApps/blender.exe"]
    elif sys.platform == "darwin":
        for root in (Path("/Applications"), Path.home() / "Applications"):
            found += [root / "Blender.app/Contents/MacOS/Blender", *_newest(root, "Blender*.app/Contents/MacOS/Blender")]
    else:
        for root in (Path("/opt"), Path.home(), Path.home() / "Applications"):
            found += _newest(root, "blender*/blender")
        found.append(Path("/snap/bin/blender"))
    for path in dict.fromkeys(found):
        if os.path.lexists(path):  # an app alias of the Microsoft Store runs but cannot be followed
            yield path


def _newest(root: Path, pattern: str) -> list[Path]:
    def version(path: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", path.relative_to(root).as_posix())]

    with contextlib.suppress(OSError):
        return sorted(root.glob(pattern), key=version, reverse=True)
    return []


def extension() -> tuple[Path, Path]:
    """The folders of the extension's code and of its `protocol`: of the extension that KILN_EXTENSION names, else of this checkout, else
    of one that is installed in a Blender of this user and of this version of Kiln. Raises KilnError("no-extension")."""
    named = os.environ.get("KILN_EXTENSION")
    if not named and (ROOT / "blender_addon" / "background.py").is_file():
        return ROOT / "blender_addon", ROOT / "protocol"
    if sys.platform == "win32":
        homes = [Path(os.environ.get("APPDATA", "")) / "Blender Foundation" / "Blender"]
    elif sys.platform == "darwin":
        homes = [Path.home() / "Library" / "Application Support" / "Blender"]
    else:
        homes = [Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "blender"]
    folders = [Path(named)] if named else [folder for home in homes for folder in _newest(home, "*/extensions/*/kiln")]
    versions = []
    for folder in folders:
        try:
            version = tomllib.loads((folder / "blender_manifest.toml").read_text("utf-8"))["version"]
        except (OSError, ValueError, KeyError):
            continue
        if version == VERSION and (folder / "background.py").is_file():
            return folder, folder / "protocol"
        versions.append(f"{folder} is version {version}")
    seen = f": {', '.join(versions)}" if versions else ""
    hint = "Install the extension in Blender, or name its folder in KILN_EXTENSION."
    raise KilnError("no-extension", f"Kiln's extension {VERSION} for Blender was not found{seen}.", hint)


def _variables(scratch: str) -> dict[str, str]:
    """The environment of a Blender whose user folder and temporary files lie in `scratch`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BLENDER_USER_")}
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), scratch)
    return {**kept, **temporary, "BLENDER_USER_RESOURCES": scratch, "PYTHONDONTWRITEBYTECODE": "1"}


class Blender:
    """One Blender process, which does one request after the other. To be used by one thread; `kill` may come from another.

    A request that it refuses raises that KilnError and leaves it fit for the next; one in which it dies or hangs raises
    KilnError("blender-died"), and it is over. `restart` says that it has grown: close it and start another.
    """

    def __init__(self, command: Command, log: Path):
        """Starts it; what it prints is added to the file `log`. Raises KilnError("blender-died") where it does not come up."""
        folder, protocol = extension()
        self.command, self.log, self.restart = command, Path(log), False
        self._scratch = tempfile.mkdtemp(prefix="kiln-background-")
        self._number, self._doing = 0, "starting"
        code = START.format(arguments=(str(folder), str(protocol), self._scratch))
        apart: dict[str, Any] = {"start_new_session": True}  # Ctrl-C is for who reads the terminal
        if sys.platform == "win32":
            apart = {"creationflags": subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP}
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
                self.log.unlink()
            with open(self.log, "ab") as printed:
                streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": printed}
                self._process = subprocess.Popen(command.line(code), env=_variables(self._scratch), **streams, **apart)
        except OSError as error:
            shutil.rmtree(self._scratch, ignore_errors=True)
            reason = f"{command.path} cannot be started: {error.strerror or error}."
            raise KilnError("blender-died", reason, "Check it, or name another one: --blender PATH.") from error
        self._said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="Kiln Blender", daemon=True).start()
        self.version = self._next(START_SECONDS)["ready"]

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def request(self, do: str, progress: Progress | None = None, **fields: Any) -> dict[str, Any]:
        """Has it do something (see background.py) and returns its answer; `progress(fraction, text)` is called meanwhile, on this
        thread. Fields that are paths should be absolute: it has the same working directory, but no shell's habits."""
        self._number += 1
        what = fields.get("file") or fields.get("glb")
        self._doing = {"list": "reading", "capture": "capturing"}.get(do, "writing") + (f" {Path(what).name}" if what else "")
        line = json.dumps({"id": self._number, "do": do, **fields}, default=os.fspath).encode() + b"\n"
        with contextlib.suppress(OSError, ValueError):  # it is dead, which the answer tells
            self._process.stdin.write(line)
            self._process.stdin.flush()
        while True:
            said = self._next(QUIET_SECONDS)
            if said.get("id") != self._number:
                continue
            if "error" in said:
                raise KilnError.from_wire(said["error"])
            if "ok" in said:
                self.restart = bool(said["ok"].get("restart"))
                return said["ok"]
            if progress is not None:
                progress(said["fraction"], said["text"])

    def kill(self) -> None:
        """Ends it at once; a request that waits for it raises KilnError("blender-died")."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def close(self) -> None:
        """Lets it end; what it does not finish within some seconds is ended."""
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self.kill()

    def __enter__(self) -> Blender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _listen(self) -> None:
        with self._process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):  # what Blender prints before it comes to us
                    if isinstance(said := json.loads(line), dict):
                        self._said.put(said)
        self._said.put(None)

    def _next(self, seconds: float) -> dict[str, Any]:
        try:
            said = self._said.get(timeout=seconds)
        except queue.Empty:
            self.kill()
            hint = f"{self._last_lines()}Try the file in Blender's window."
            raise KilnError("blender-died", f"Blender said nothing for {seconds:.0f} s, {self._doing}, and was ended.", hint) from None
        if said is not None:
            return said
        self._said.put(None)  # for whoever asks again
        code = self._process.wait()
        self.kill()
        how = f"by signal {-code}" if code < 0 else f"with status {code & 0xFFFFFFFF:#x}" if code > 255 else f"with status {code}"
        hint = f"{self._last_lines()}Try the file in Blender's window; a lack of memory is a frequent reason."
        raise KilnError("blender-died", f"Blender {self.command.version} ended {how}, {self._doing}.", hint)

    def _last_lines(self) -> str:
        with contextlib.suppress(OSError), open(self.log, "rb") as log:
            log.seek(max(0, self.log.stat().st_size - 2000))
            lines = log.read().decode(errors="replace").strip().splitlines()
            if lines:
                return f"Its log, {self.log}, ends: {lines[-1][:200]} "
        return ""
