"""Creates, repairs and removes Python environments: the backend's, from Blender's "Set up backend" button, and all of `build.py`'s.

Standard library only, and no import of the rest of Kiln, because `build.py` loads this file by its path. An environment is a venv that pip
fills from lock files. Its last file is a marker that says what it was made from, so that an interrupted set-up is never taken for a whole
one. Downloads are kept in pip's own cache; proxies, certificates and package indexes are those that pip is configured for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import queue
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PYTHONS = ((3, 11), (3, 12), (3, 13))  # that every package of the backend has a ready-made wheel for
PYTORCH = "https://download.pytorch.org/whl/"  # PyTorch's public index; below it a folder for each device
# NVIDIA Warp, which draws and fits splats on a GPU without a compiler. Only where it runs: 149 MB to download, 392 MB on disk. Its newest
# wheels need CUDA 13 as PyTorch's do, and 1.17.0 is the last that brings CUDA 12.
WARP, WARP_FOR_CUDA_12 = "warp-lang==1.19.0", "warp-lang==1.17.0"
MARKER = "kiln-environment.json"  # what a finished environment was made from; "null" while it is being made
CONSOLE = {"creationflags": subprocess.CREATE_NO_WINDOW} if sys.platform == "win32" else {}  # no window flashes up from Blender
REPORT_EVERY = 0.2  # seconds
LONGEST = 200  # characters of the longest path in an environment with PyTorch: 171 below Lib/site-packages, and some to spare

Report = Callable[[float, str], None]  # fraction done in [0, 1] and what is being done; raises to cancel


class SetupError(Exception):
    """Something a person can act on: `message` says what happened, `hint` what to do."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(f"{message} {hint}".strip())
        self.code, self.message, self.hint = "set-up", message, hint


def silent(fraction: float, text: str) -> None:
    pass


# Looking at an environment


def python_in(target: Path) -> Path:
    """Where the environment's Python lies, whether it is there or not."""
    return target / "Scripts" / "python.exe" if sys.platform == "win32" else target / "bin" / "python"


def python(target: Path) -> Path | None:
    """The Python of a finished environment, None where there is none."""
    return python_in(target) if about(target) else None


def about(target: Path) -> dict | None:
    """What a finished environment was made from: fingerprint, python ("3.11.7"), device, seconds. None if it is unfinished or broken."""
    try:
        made = json.loads((target / MARKER).read_text("utf-8"))
        home = re.search(r"^home\s*=\s*(.+)$", (target / "pyvenv.cfg").read_text("utf-8"), re.MULTILINE)
    except (OSError, ValueError):
        return None
    # A venv dies with the Python it was made from, for example when Blender is updated.
    return made if home and Path(home[1].strip()).is_dir() and python_in(target).exists() else None


def fingerprint(locks: Sequence[Path], wheel: Path | None) -> str:
    """What an environment has to hold: changes with any lock file and with the wheel."""
    digest = hashlib.sha256()
    for lock in locks:
        digest.update(b"\n".join(line.encode() for line in requirements(lock)) + b"\0")
    if wheel:
        digest.update(wheel.name.encode() + b"\0" + wheel.read_bytes())
    return digest.hexdigest()


def requirements(lock: Path) -> list[str]:
    """The requirement lines of a lock file, without comments."""
    lines = (line.split("#")[0].strip() for line in lock.read_text("utf-8").splitlines())
    return [line for line in lines if line]


def shipped() -> tuple[list[Path], Path | None]:
    """The backend's lock files and wheel that lie in the packaged extension, beside this file."""
    folder = Path(__file__).resolve().parent / "backend"
    return sorted(folder.glob("*.txt")), next(iter(sorted(folder.glob("*.whl"))), None)


def state(target: Path, locks: Sequence[Path] | None = None, wheel: Path | None = None) -> str:
    """ "missing", "incomplete" (unfinished or broken), "outdated" (made from other versions) or "ready"."""
    if not target.exists():
        return "missing"
    made = about(target)
    if made is None:
        return "incomplete"
    if locks is None:
        locks, wheel = shipped()
    return "ready" if made["fingerprint"] == fingerprint(locks, wheel) else "outdated"


def size(target: Path) -> int:
    """Bytes on disk; takes some tenths of a second for a large environment."""
    total = 0
    folders = [target]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:
            pass  # removed while we count, or never there
    return total


# Choosing a Python and a PyTorch


def find_python(versions: Sequence[tuple[int, int]]) -> Path | None:
    """A Python of the first of these versions that this machine has, able to make environments."""
    for version in versions:
        for candidate in _candidates(version):
            found = look_at_python(candidate)
            if found and found[1][:2] == version and found[2]:
                return found[0]
    return None


def look_at_python(candidate: Path | str) -> tuple[Path, tuple[int, int, int], bool] | None:
    """The base Python behind a command, its version, and whether it can make environments; None if it does not run."""
    code = (
        "import sys, json, importlib.util as u; print(json.dumps([getattr(sys, '_base_executable', None) or sys.executable, "
        "list(sys.version_info[:3]), bool(u.find_spec('venv') and u.find_spec('ensurepip'))]))"
    )
    command = [str(candidate)] if isinstance(candidate, Path) else candidate.split()
    try:
        done = subprocess.run([*command, "-I", "-c", code], capture_output=True, text=True, timeout=20, env=_clean_environment(), **CONSOLE)
        executable, version, able = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return Path(executable), tuple(version), able


def _candidates(version: tuple[int, int]) -> Iterator[Path | str]:
    """Commands that may be this Python: the running one, what PATH has, and where installers put it."""
    major, minor = version
    if sys.version_info[:2] == version:
        yield Path(sys.executable)
    folders = [Path(folder) for folder in os.get_exec_path() if folder]
    home = Path.home()
    if sys.platform == "win32":
        yield f"py -{major}.{minor}"
        for root in (os.environ.get("LOCALAPPDATA", ""), os.environ.get("PROGRAMFILES", "")):
            yield Path(root) / "Programs" / "Python" / f"Python{major}{minor}" / "python.exe"
            yield Path(root) / f"Python{major}{minor}" / "python.exe"
    else:
        pyenv = Path(os.environ.get("PYENV_ROOT", home / ".pyenv"))
        managed = Path(os.environ.get("UV_PYTHON_INSTALL_DIR", home / ".local/share/uv/python"))
        for found in (pyenv / "versions").glob(f"{major}.{minor}.*"), managed.glob(f"cpython-{major}.{minor}.*"):
            folders += [folder / "bin" for folder in sorted(found, reverse=True)]
        folders += [Path("/usr/local/bin"), Path("/opt/homebrew/bin"), Path("/usr/bin")]
        folders += [Path(f"/Library/Frameworks/Python.framework/Versions/{major}.{minor}/bin")]
    name = f"python{major}.{minor}" + (".exe" if sys.platform == "win32" else "")
    for folder in dict.fromkeys(folders):
        if (folder / name).exists():
            yield folder / name


@dataclass(frozen=True)
class Torch:
    """A build of PyTorch: what it computes on, the index that offers it (None: pip's own), the disk an environment with it takes, and
    what else that device wants beside the lock files."""

    device: str  # "cuda", "rocm", "apple" or "cpu"
    index: str | None
    gigabytes: float
    why: str
    more: tuple[str, ...] = ()


def torch_build() -> Torch:
    """The build of PyTorch 2.13 that fits this machine's device. Its release notes name CUDA 12.6 and 13.0 and ROCm 7.2."""
    system, machine = platform.system(), platform.machine().lower()
    if system == "Darwin":
        if machine != "arm64":
            raise SetupError(
                "There is no PyTorch for Macs with an Intel processor any more.",
                "Let a backend on another computer do the work: choose Remote in Kiln's preferences.",
            )
        return Torch("apple", None, 1.6, "Apple silicon")
    gpu = _answer(["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"])
    if gpu:
        name, driver, capability = ([part.strip() for part in gpu.splitlines()[0].split(",")] + ["", ""])[:3]
        driver_major, capability = _number(driver), _number(capability)
        # Driver branches: NVIDIA's CUDA release notes. Architectures: PyTorch's release matrix (13.0 from Turing on, 12.6 up to Hopper).
        if driver_major >= 580 and capability >= 7.5:
            return Torch("cuda", PYTORCH + "cu130", 8.4, f"{name}, driver {driver}: CUDA 13.0", (WARP,))
        if driver_major >= 525 and 5.0 <= capability < 10.0:
            return Torch("cuda", PYTORCH + "cu126", 8.4, f"{name}, driver {driver}: CUDA 12.6", (WARP_FOR_CUDA_12,))
        why = f"{name} with driver {driver} fits no CUDA build (a driver from 580 on is needed; the card must be from 2014 or later): CPU"
        return Torch("cpu", PYTORCH + "cpu" if system == "Linux" else None, 2.0, why)
    if system == "Linux" and "gfx" in _answer(["rocminfo"]):
        return Torch("rocm", PYTORCH + "rocm7.2", 20.0, "an AMD GPU: ROCm 7.2")
    # On Windows pip's own index has the CPU build; on Linux it has the CUDA one, which is several GB larger.
    return Torch("cpu", PYTORCH + "cpu" if system == "Linux" else None, 2.0, "no GPU found: CPU")


def _answer(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15, **CONSOLE)
    except (OSError, subprocess.TimeoutExpired):
        return ""  # not installed, or a driver that hangs: as good as no device
    return done.stdout.strip() if done.returncode == 0 else ""


def _number(text: str) -> float:
    found = re.match(r"\d+(\.\d+)?", text)
    return float(found[0]) if found else 0.0


def reachable(index: str, timeout: float = 5.0) -> bool:
    """Whether an index can be reached at all: pip would try each package there again and again before it goes on without."""
    try:
        with urllib.request.urlopen(urllib.request.Request(index + "/torch/", method="HEAD"), timeout=timeout):
            return True
    except urllib.error.HTTPError:
        return False
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # it is there; whom to trust is pip's to decide, which has more certificates
    except OSError:
        return False


# Making and removing


def create(
    target: Path,
    python: Path | None = None,
    locks: Sequence[Path] | None = None,
    wheel: Path | None = None,
    *,
    torch: Torch | None = None,
    bundle: Path | None = None,
    report: Report = silent,
    log: Path | None = None,
) -> None:
    """Makes the environment whole: a missing or broken one anew, an outdated one by exchanging what changed, a ready one anew (repair).

    `python` makes it (default: the running one where it fits, else one that is found). `locks` and `wheel` fill it (default: what the
    packaged extension brings). `torch` is the build to take when a lock names torch (default: what fits the device). `bundle` is a folder
    or zip of wheels that is used instead of any index. `report` is called at least twice a second; when it raises, pip is ended and the
    exception goes on. Everything that pip says goes to `log`. Raises `SetupError`.
    """
    if locks is None:
        locks, wheel = shipped()
        if not locks or wheel is None:
            raise SetupError("This copy of Kiln holds no backend.", "Install the zip that `build.py package` makes.")
    target = Path(os.path.abspath(target))
    log = log or target.with_name(target.name + ".log")
    started = time.monotonic()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target, report) as waited:
            if waited and state(target, locks, wheel) == "ready":
                return
            with open(log, "w", encoding="utf-8", errors="replace") as lines:
                _create(target, python, locks, wheel, torch, bundle, report, lines, started)
    except OSError as error:
        raise SetupError(
            f"{error.strerror or error}: {error.filename or target}.", "Make room or check the folder's permissions, then try again."
        ) from error


def _create(target, python, locks, wheel, torch, bundle, report, log, started) -> None:
    wanted = fingerprint(locks, wheel)
    names = [line for lock in locks for line in requirements(lock)]
    if any(line.startswith("torch==") for line in names):
        torch = torch or torch_build()
        _check_room(target, torch.gigabytes)
        _check_length(target)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_wheels_of(bundle))
        base, version = _base_python(python, _pythons_of(folder) or PYTHONS if wheel else ())
        run = _Commands(report, log, version)
        before = about(target)
        in_place = before and before["fingerprint"] != wanted and before["python"].split(".")[:2] == version.split(".")[:2]
        if not in_place:
            # What works is kept until its successor does, where there is room for both.
            keep = before and (not torch or shutil.disk_usage(target.parent).free > torch.gigabytes * 1e9)
            stack.enter_context(_replaced(target, report, bool(keep)))
        (target / MARKER).write_text("null")
        if not in_place:
            run("Making an empty environment", [str(base), "-I", "-u", "-X", "utf8", "-m", "venv", str(target)], 0.0, 0.03)
        pip = [str(python_in(target)), "-I", "-u", "-X", "utf8", "-m", "pip", "--disable-pip-version-check", "--no-input"]
        # No compiler is needed, ever; byte code is written when a module is first imported, which is sooner than for all of them now.
        install = [*pip, "install", "--only-binary=:all:", "--no-compile", "--no-warn-script-location"]
        if folder:
            install += ["--no-index", "--find-links", str(folder)]
        elif torch and torch.index:
            report(0.03, f"Looking for PyTorch ({torch.why})")
            if reachable(torch.index):
                install += ["--extra-index-url", torch.index]
            elif torch.device == "rocm":
                raise SetupError(f"{torch.index} cannot be reached.", "Check the network: only that index has PyTorch for AMD GPUs.")
        own = next((line for line in names if line.startswith("pip==")), None)
        if own:  # first: the one that a Python brings along may be too old to know the system's certificates
            run("Fetching pip", [*install, own], 0.03, 0.05, certificates=not folder)
            install.append("--progress-bar=raw")
        whole = [part for lock in locks for part in ("-r", str(lock))]
        locked = {line.split("==")[0] for line in names}
        further = [one for one in (torch.more if torch else ()) if one.split("==")[0] not in locked]
        if folder:  # one that was made for another device goes without
            further = [one for one in further if any(folder.glob(one.split("==")[0].replace("-", "_") + "-*.whl"))]
        whole += further
        run("Looking for packages", [*install, *whole], 0.05, 0.97 if wheel else 1.0, expected=len(names))
        if wheel:  # by itself: an update of Kiln with the same version number still counts
            update = [*install, "--no-deps", "--no-index", "--force-reinstall", str(wheel)]
            run("Installing Kiln's backend", update, 0.97, 1.0)
        made = {
            "fingerprint": wanted,
            "python": version,
            "device": torch.device if torch else None,
            "seconds": round(time.monotonic() - started, 1),
        }
        unfinished = target / (MARKER + ".new")
        unfinished.write_text(json.dumps(made, indent=1), "utf-8")
        os.replace(unfinished, target / MARKER)
    report(1.0, "Ready")


def remove(target: Path, report: Report = silent) -> None:
    """Deletes an environment, whole or not; refuses a folder that is none."""
    _delete(_put_aside(target, report))
    report(1.0, "Removed")


@contextlib.contextmanager
def _replaced(target: Path, report: Report, keep: bool) -> Iterator[None]:
    """An empty folder where the environment was. With `keep`, an error within this context brings the old one back: it has to be made
    at its final place, because its scripts name that, and so the old one makes way."""
    aside = _put_aside(target, report)
    if not keep:
        _delete(aside)
    target.mkdir()
    try:
        yield
    except BaseException:
        if keep:
            with contextlib.suppress(OSError):
                _delete(target)
                aside.rename(target)
        raise
    with contextlib.suppress(OSError):  # what stays goes with the next repair or removal
        _delete(aside)


def _put_aside(target: Path, report: Report) -> Path:
    """Renames an environment and returns where it lies now, if there was one."""
    doomed = target.with_name(target.name + ".removed")
    _delete(doomed)
    if target.exists():
        ours = (target / MARKER).exists() or (target / "pyvenv.cfg").exists()
        if not ours and any(target.iterdir()):
            raise SetupError(f"{target} holds other things than a Kiln environment.", "Move them away, or choose another folder.")
        report(0.0, "Removing the environment")
        try:
            target.rename(doomed)  # all or nothing: on Windows a running backend keeps its files, and then nothing is lost
        except OSError as error:
            raise SetupError(
                f"{target} is in use: {error.strerror or error}.", "Stop the backend and close other Blenders, then try again."
            ) from error
    return doomed


def _delete(folder: Path) -> None:
    def writable_then_again(function, path, _):
        os.chmod(path, 0o700)
        function(path)

    if folder.exists():
        shutil.rmtree(folder, onerror=writable_then_again)


@contextlib.contextmanager
def _alone(target: Path, report: Report) -> Iterator[bool]:
    """Only one set-up of a target at a time, on the whole machine; whether we had to wait for it. The lock goes with its process."""
    waited = False
    with open(target.with_name(target.name + ".lock"), "a+b") as file:
        while not _lock(file):
            waited = True
            report(0.0, "Waiting for another set-up of the same environment")
            time.sleep(REPORT_EVERY)
        yield waited


def _lock(file) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _base_python(python: Path | None, versions: Sequence[tuple[int, int]]) -> tuple[Path, str]:
    """The Python to make an environment from, checked, and its version."""
    fitting = ", ".join(f"{major}.{minor}" for major, minor in versions)
    asked = python or Path(sys.executable)
    found = look_at_python(asked)
    if python is None and versions and not (found and found[1][:2] in versions and found[2]):
        other = find_python(versions)
        if other is None:
            have = f"Python {'.'.join(map(str, found[1]))}" if found else str(asked)
            raise SetupError(
                f"Kiln's backend needs Python {fitting}; {have} does not fit.",
                "Install Python 3.11 from python.org (on Debian and Ubuntu with python3-venv), then try again.",
            )
        found = look_at_python(other)
    if found is None:
        raise SetupError(f"{asked} is not a Python that runs.", "Name another one.")
    base, version, able = found
    if versions and version[:2] not in versions:
        raise SetupError(f"{base} is Python {'.'.join(map(str, version))}; Kiln's backend needs {fitting}.", "Name another Python.")
    if not able:
        raise SetupError(
            f"{base} cannot make environments.",
            "On Debian and Ubuntu: apt-get install python3-venv. Elsewhere: use Python from python.org.",
        )
    return base, ".".join(map(str, version))


def _check_room(target: Path, gigabytes: float) -> None:
    free = shutil.disk_usage(target.parent).free / 1e9
    if free < gigabytes and not target.exists():
        raise SetupError(f"{gigabytes:g} GB are needed in {target.parent}, {free:.1f} GB are free.", "Make room, then try again.")


def _check_length(target: Path) -> None:
    longest = len(str(target)) + LONGEST
    if longest >= 260 and not _long_paths():
        raise SetupError(
            f"Windows allows paths of 259 characters here; in {target} they would have {longest}.",
            'Turn long paths on (LongPathsEnabled; Microsoft\'s page "Maximum Path Length Limitation" says how), restart, then try again.',
        )


def _long_paths() -> bool:
    """Whether programs may use paths of 260 characters and more."""
    if sys.platform != "win32":
        return True
    import winreg

    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"SYSTEM\CurrentControlSet\Control\FileSystem") as key:
            return winreg.QueryValueEx(key, "LongPathsEnabled")[0] == 1
    except OSError:
        return False


@contextlib.contextmanager
def _wheels_of(bundle: Path | None) -> Iterator[Path | None]:
    """The folder of wheels of an offline bundle, unpacked for as long as it is needed."""
    if bundle is None or bundle.is_dir():
        if bundle and not any(bundle.glob("*.whl")):
            raise SetupError(f"{bundle} holds no wheels.", "Choose the folder or zip that `build.py package --offline-bundle` made.")
        yield bundle
        return
    with tempfile.TemporaryDirectory(prefix="kiln-bundle-") as folder:
        try:
            with zipfile.ZipFile(bundle) as archive:
                wheels = [name for name in archive.namelist() if name.endswith(".whl") and "/" not in name and "\\" not in name]
                archive.extractall(folder, wheels)
        except (zipfile.BadZipFile, FileNotFoundError) as error:
            raise SetupError(
                f"{bundle} is not an offline bundle: {error}.", "Choose the zip that `build.py package --offline-bundle` made."
            ) from error
        if not wheels:
            raise SetupError(f"{bundle} holds no wheels.", "Choose the zip that `build.py package --offline-bundle` made.")
        yield Path(folder)


def _pythons_of(folder: Path | None) -> list[tuple[int, int]]:
    """The Python versions that a bundle was made for: those that its compiled wheels are for."""
    found = (re.search(r"-cp3(\d+)-cp3\1-", path.name) for path in folder.glob("*.whl")) if folder else ()
    return sorted({(3, int(one[1])) for one in found if one})


def _clean_environment() -> dict[str, str]:
    """This process's environment without what would lead a fresh Python into Blender's or the user's own packages."""
    unwanted = (
        "PYTHONHOME",
        "PYTHONPATH",
        "PYTHONSTARTUP",
        "VIRTUAL_ENV",
        "PIP_TARGET",
        "PIP_PREFIX",
        "PIP_USER",
        "PIP_REQUIRE_VIRTUALENV",
        "__PYVENV_LAUNCHER__",
    )
    return {name: value for name, value in os.environ.items() if name not in unwanted}


class _Commands:
    """Runs pip and its like: their output goes to the log, progress to the report, and failures become sentences."""

    def __init__(self, report: Report, log, version: str):
        self.report, self.log, self.version = report, log, version

    def __call__(self, text: str, command: list[str], begin: float, end: float, expected: int = 0, certificates: bool = False) -> None:
        self.log.write("$ " + " ".join(command) + "\n")
        with contextlib.ExitStack() as stack:
            environment = _clean_environment()
            if certificates and not any(environment.get(name) for name in ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")):
                bundle = stack.enter_context(_system_certificates())
                if bundle:
                    environment["PIP_CERT"] = bundle
            apart = {} if sys.platform == "win32" else {"start_new_session": True}  # so that it can be ended with all it started
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
                text=True, encoding="utf-8", errors="replace", **apart, **CONSOLE,
            )  # fmt: skip
            try:
                said = self._follow(process, text, begin, end, expected)
            finally:
                if process.poll() is None:
                    _end(process)
        if process.returncode:
            raise _failure(said, process.returncode, Path(self.log.name), self.version)

    def _follow(self, process, text: str, begin: float, end: float, expected: int) -> list[str]:
        """Reports until the process ends; returns what it said last. Fetching is three quarters of the way, unpacking the rest."""
        lines: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=lambda: [*map(lines.put, process.stdout), lines.put(None)], daemon=True).start()
        said: list[str] = []
        seen, share, part, reported = 0, 0.0, "", 0.0
        while True:
            try:
                line = lines.get(timeout=REPORT_EVERY)
            except queue.Empty:
                line = ""
            if line is None:
                process.wait()
                return said
            line = line.strip()
            if received := re.fullmatch(r"Progress (\d+) of (\d+)", line):
                have, whole = int(received[1]), int(received[2])
                part = f", {have / 1e6:.0f} of {whole / 1e6:.0f} MB" if whole > 5e6 else ""
            elif line:
                self.log.write(line + "\n")
                said = [*said[-80:], line]
                if got := re.match(
                    r"(?:Collecting|Requirement already satisfied:|Processing) +(?:\S*/)?([A-Za-z][\w.]*)", line.replace("\\", "/")
                ):
                    seen, part = seen + 1, ""
                    share = 0.75 * min(seen / expected, 1.0) if expected else 0.0
                    text = f"Fetching {got[1]}"
                elif line.startswith("Installing collected packages"):
                    share, text, part = 0.75, "Installing the packages", ""
            if time.monotonic() > reported + REPORT_EVERY:
                reported = time.monotonic()
                self.log.flush()
                self.report(begin + (end - begin) * share, text + part)


def _end(process) -> None:
    if sys.platform == "win32":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, **CONSOLE)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _system_certificates() -> Iterator[str | None]:
    """The system's certificates with Python's defaults as one file, for a pip that is too old to ask the system itself (before 24.2)."""
    found = ssl.create_default_context().get_ca_certs(binary_form=True)
    if not found:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="kiln-certificates-") as folder:
        path = Path(folder) / "certificates.pem"
        path.write_text("".join(ssl.DER_cert_to_PEM_cert(certificate) for certificate in found), "ascii")
        yield str(path)


def _failure(said: list[str], code: int, log: Path, version: str) -> SetupError:
    """What pip's last words mean for a person."""
    words = "\n".join(said)
    told = next(
        (line.removeprefix("ERROR: ") for line in reversed(said) if line.startswith("ERROR: ")), said[-1] if said else f"exit status {code}"
    )
    log_at = f"All of pip's output: {log}"
    if "No space left on device" in words or "Errno 28" in words:
        return SetupError("The disk is full.", f"Make room, then try again: what was downloaded is kept. {log_at}")
    if "CERTIFICATE_VERIFY_FAILED" in words:
        return SetupError(
            "A download was refused: its certificate is not trusted here.",
            f"Behind a company proxy set PIP_CERT to its certificate file. {log_at}",
        )
    if "ProxyError" in words or "407 Proxy" in words:
        return SetupError("The proxy refused a download.", f"Check HTTPS_PROXY. {log_at}")
    if any(
        sign in words
        for sign in (
            "NewConnectionError",
            "NameResolutionError",
            "ConnectTimeout",
            "ReadTimeout",
            "Connection broken",
            "Network is unreachable",
        )
    ):
        return SetupError("The package index cannot be reached.", f"Check the network and try again, or use an offline bundle. {log_at}")
    if missing := re.search(r"No matching distribution found for (\S+)", words):
        here = f"Python {version} on {platform.system()} {platform.machine()}"
        return SetupError(f"pip found no ready-made {missing[1]} for {here}.", f"Look at pip's index settings. {log_at}")
    return SetupError(f"pip failed: {told.rstrip('.')}.", log_at)
