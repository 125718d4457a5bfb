#!/usr/bin/env python3
"""Sets Kiln up, runs it, tests it and packages it. Standard library only; `python build.py --help` lists the commands.

Two environments lie in `.venv`: `blender` (the bpy wheel that fits its Python, or the packages that a real Blender lacks) and `backend`
(what computes, with the `kiln` command; it runs this checkout's source). The tests add one for each further Blender whose Python is found.
pip finds its way here too: this file is the build backend that pyproject.toml names.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):
    sys.exit(
        "build.py needs Python 3.11 or later; %s is Python %d.%d.\n" % (sys.executable, *sys.version_info[:2])
        + "Run it with another one (python3.11 build.py ...), or install Python 3.11 from python.org."
    )

import argparse
import base64
import concurrent.futures
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import tarfile
import tempfile
import threading
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
CACHE = VENV / "cache"
LOCKS = ROOT / "requirements"

# Blender versions as bpy wheels, each with the Python that its wheel is for; blender-VERSION.txt is its lock file.
BLENDERS = {"4.5": (3, 11), "5.2": (3, 13)}
OLDEST = ("4.2", (3, 11))  # the oldest that the extension promises: tests marked `oldest`

# The wheels that the extension brings: Blender 4.2 to 5.0 run Python 3.11, from 5.1 on 3.13; Linux distributions build with newer ones.
EXTENSION_PYTHONS = ("3.11", "3.13", "3.14")
EXTENSION_PLATFORMS = {
    "linux-x64": [
        "manylinux_2_28_x86_64",
        "manylinux_2_27_x86_64",
        "manylinux_2_26_x86_64",
        "manylinux_2_17_x86_64",
        "manylinux2014_x86_64",
    ],
    "macos-arm64": ["macosx_11_0_arm64"],
    "macos-x64": ["macosx_11_0_x86_64", "macosx_10_15_x86_64"],
    "windows-x64": ["win_amd64"],
}

# The Khronos validator of glTF, which the tests run where there is node: its package on npm, and that file's SHA-256.
VALIDATOR = "gltf-validator@2.0.0-dev.3.10"
VALIDATOR_HASH = "4e03dbdc3bc0d1342afd5d2d7ae341a7e3474502ccb872b02dbbaddaee0fdec6"

# What the bpy wheel loads from the system: (library, Debian, Fedora, Arch). Without libEGL it imports, then its first picture ends it.
SYSTEM_LIBRARIES = [
    ("libXi.so.6", "libxi6", "libXi", "libxi"),
    ("libXfixes.so.3", "libxfixes3", "libXfixes", "libxfixes"),
    ("libXrender.so.1", "libxrender1", "libXrender", "libxrender"),
    ("libxkbcommon.so.0", "libxkbcommon0", "libxkbcommon", "libxkbcommon"),
    ("libSM.so.6", "libsm6", "libSM", "libsm"),
    ("libGL.so.1", "libgl1", "mesa-libGL", "libglvnd"),
    ("libEGL.so.1", "libegl1", "mesa-libEGL", "libglvnd"),
]


Work = Callable[[IO[bytes] | None], int]  # a part of the tests: prints into the file, or at once; its exit code


def _load(path: Path):
    """A module by its path: the extension's folder is no package outside Blender."""
    spec = importlib.util.spec_from_file_location(f"kiln_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


environment = _load(ROOT / "blender_addon" / "environment.py")
VERSION = runpy.run_path(str(ROOT / "protocol" / "__init__.py"))["VERSION"]


class Failed(Exception):
    """Ends build.py with this sentence."""


# Setting up


class Blender(NamedTuple):
    """A Blender to run things in. `command` turns the arguments of a Python (`FILE ...` or `-m MODULE ...`) into a command line."""

    version: str
    command: Callable[[Sequence[str]], list[str]]


class Environments:
    """Makes the environments that a command asks for, several at a time, and says where they are."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.interrupted = threading.Event()

    def backend(self) -> Path:
        """The Python of the backend's environment, which holds this checkout by reference."""
        editable = wheel(CACHE, editable=True)
        locks = [LOCKS / name for name in ("backend.txt", "tests.txt", "development.txt")]
        running = sys.version_info[:2]
        # 3.11 first: Blender 4.2 to 5.0 run it, so that a checkout computes with what most users compute with.
        versions = [(3, 11), *([running] if running in environment.PYTHONS else []), *environment.PYTHONS]
        return self._ready("backend", locks, versions, self.options.backend_python, editable)

    def backend_with_ray(self) -> Path:
        """The backend's environment and in it Ray, an optional extra that only tests and a benchmark need: 79 MB to download."""
        python = self.backend()
        wanted = environment.requirements(LOCKS / "ray.txt")
        has = "import importlib.metadata as m; print('ray==' + m.version('ray') if any(d.name == 'ray' for d in m.distributions()) else '')"
        if _output([python, "-I", "-c", has]).strip() != wanted[0].partition(";")[0].strip():
            print("Adding Ray to .venv/backend", flush=True)
            _call([*_pip(python), "install", "-qq", "--no-deps", "--only-binary=:all:", "-r", LOCKS / "ray.txt"])
        return python

    def blender(self) -> Blender:
        """The Blender that --blender or --blender-python names, else a bpy wheel for the running Python, else for one that is found."""
        if self.options.blender:
            return self._real_blender(self.options.blender)
        python = self.options.blender_python
        made = environment.about(VENV / "blender")
        if python:
            versions = [self._look(python)[1][:2]]
        elif made:
            versions = [tuple(int(part) for part in made["python"].split(".")[:2])]  # what is there is as good
        else:
            versions = [sys.version_info[:2], *BLENDERS.values()]
        fitting = {python_version: blender for blender, python_version in BLENDERS.items()}
        versions = [version for version in versions if version in fitting]
        if not versions:
            raise Failed(f"{python} is Python {_dotted(self._look(python)[1])}. {_bpy_fix()}")
        if python is None and not made:
            python = environment.find_python(versions)
            if python is None:
                raise Failed(f"No Python with a bpy wheel was found. {_bpy_fix()}")
            versions = [environment.look_at_python(python)[1][:2]]
        return self._bpy(fitting[versions[0]], "blender", versions[0], python)

    def further_blenders(self) -> list[Callable[[], Blender | None]]:
        """Makers of the other Blenders that the extension is tested under, None where their Python is missing; the last is the oldest."""
        if self.options.blender:
            return []  # asked for this one alone
        main = environment.about(VENV / "blender")
        have = main and tuple(int(part) for part in main["python"].split(".")[:2])
        others = [(blender, python) for blender, python in BLENDERS.items() if python != have]
        return [functools.partial(self._bpy, blender, f"blender-{blender}", python, optional=True) for blender, python in [*others, OLDEST]]

    def _bpy(
        self, version: str, folder: str, python_version: tuple[int, int], python: Path | None = None, optional: bool = False
    ) -> Blender | None:
        if optional and not environment.about(VENV / folder) and environment.find_python([python_version]) is None:
            print(f"There is no Python {_dotted(python_version)} on this machine: nothing runs under Blender {version}.", flush=True)
            return None
        locks = [LOCKS / f"blender-{version}.txt", LOCKS / "extension.txt", LOCKS / "tests.txt"]
        executable = self._ready(folder, locks, [python_version], python)
        return Blender(version, lambda arguments: [str(executable), *arguments])

    def _real_blender(self, blender: Path) -> Blender:
        """A real Blender, and beside it a folder with the packages that the tests need in its Python."""
        print_versions = "import sys, bpy; print('KILN', bpy.app.version_string.split()[0], '%d.%d' % sys.version_info[:2])"
        asked = _output([blender, "-b", "--factory-startup", "--python-expr", print_versions])
        found = re.search(r"KILN (\S+) (\S+)", asked)
        if not found:
            raise Failed(f"{blender} does not run as Blender in the background. It said:\n{asked[-2000:]}")
        version, python_version = found.groups()
        folder = VENV / f"real-blender-{version}-python-{python_version}"
        locks = [LOCKS / "extension.txt", LOCKS / "tests.txt"]
        wanted = environment.fingerprint(locks, None)
        marker = folder / "complete.txt"
        if not (marker.is_file() and marker.read_text() == wanted):
            shutil.rmtree(folder, ignore_errors=True)
            whole = [part for lock in locks for part in ("-r", str(lock))]
            options = ["-qq", "--only-binary=:all:", "--no-compile", "--python-version", python_version, "--target", str(folder)]
            _call([*_pip(self.backend()), "install", *options, *whole])
            marker.write_text(wanted)

        def command(arguments: Sequence[str]) -> list[str]:
            module = arguments[0] == "-m"
            argv = list(arguments[1:]) if module else list(arguments)
            run = (
                f"runpy.run_module({argv[0]!r}, run_name='__main__', alter_sys=True)"
                if module
                else f"runpy.run_path({argv[0]!r}, run_name='__main__')"
            )
            code = f"import sys, runpy; sys.path[:0] = {[str(ROOT), str(folder)]!r}; sys.argv = {argv!r}; {run}"
            return [str(blender), "-b", "--factory-startup", "--python-exit-code", "1", "--python-expr", code]

        return Blender(version, command)

    def _ready(
        self, name: str, locks: list[Path], versions: Sequence[tuple[int, int]], python: Path | None, wheel: Path | None = None
    ) -> Path:
        """Makes the environment if it is not what it should be; returns its Python."""
        target = VENV / name
        made = environment.about(target)
        same = made and (python is None or made["python"] == _dotted(self._look(python)[1]))
        if same and environment.state(target, locks, wheel) == "ready":
            return environment.python_in(target)
        fitting = " or ".join(dict.fromkeys(map(_dotted, versions)))
        if python is None:
            python = environment.find_python(versions)
            if python is None:
                fix = "Install one from python.org (on Debian and Ubuntu with python3-venv), or name it: --backend-python PATH."
                raise Failed(f".venv/{name}: no Python {fitting} that can make environments was found. {fix}")
        elif self._look(python)[1][:2] not in versions:
            raise Failed(f".venv/{name} needs Python {fitting}; {python} is {_dotted(self._look(python)[1])}. Name another one.")
        if made and not same:
            environment.remove(target)
        started = time.monotonic()
        said = ["", started]

        def report(fraction: float, text: str) -> None:
            if self.interrupted.is_set():
                raise KeyboardInterrupt
            now = time.monotonic()
            if now > said[1] + 3.0 and text != said[0]:
                said[:] = [text, now]
                print(f"  {name:<12} {fraction:4.0%}  {text}", flush=True)

        print(f"Setting up .venv/{name} with Python {_dotted(self._look(python)[1])}", flush=True)
        environment.create(target, python, locks, wheel, report=report)
        print(f"  {name:<12} ready after {time.monotonic() - started:.0f} s", flush=True)
        return environment.python_in(target)

    def _look(self, python: Path) -> tuple[Path, tuple[int, int, int], bool]:
        found = environment.look_at_python(python)
        if found is None:
            raise Failed(f"{python} is not a Python that runs.")
        return found

    def all_of(self, *makers: Callable):
        """Runs the makers at the same time; their results in order. Downloads wait on the network, unpacking on the disk."""
        with concurrent.futures.ThreadPoolExecutor(max(1, len(makers))) as pool:
            futures = [pool.submit(maker) for maker in makers]
            try:
                return [future.result() for future in futures]
            except BaseException:
                self.interrupted.set()
                raise


def _dotted(version: Iterable[int]) -> str:
    return ".".join(map(str, version))


def _bpy_fix() -> str:
    offered = ", ".join(f"{blender} on Python {_dotted(python)}" for blender, python in BLENDERS.items())
    fix = "Install one of these Pythons, name one (--blender-python PATH), or name a real Blender (--blender PATH)."
    return f"Blender comes as a wheel: {offered}. {fix}"


def system_libraries() -> None:
    """Installs what the bpy wheel needs from the system where that is possible, and says how where it is not."""
    if sys.platform != "linux":
        return
    missing = [row for row in SYSTEM_LIBRARIES if not _loads(row[0])]
    if not missing:
        return
    debian, fedora, arch = ([row[column] for row in missing] for column in (1, 2, 3))
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *debian]
    if shutil.which("apt-get") and os.geteuid() == 0:
        print("Installing system libraries that Blender needs:", *debian, flush=True)
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        if subprocess.run(install, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
            subprocess.run(["apt-get", "update"], env=quiet, stdout=subprocess.DEVNULL)  # a fresh machine knows no packages yet
            subprocess.run(install, env=quiet, stdout=subprocess.DEVNULL)
        missing = [row for row in missing if not _loads(row[0])]
        if not missing:
            return
    for tool, command in (
        ("apt-get", " ".join(["sudo", *install])),
        ("dnf", f"sudo dnf install {' '.join(fedora)}"),
        ("pacman", f"sudo pacman -S {' '.join(dict.fromkeys(arch))}"),
    ):
        if shutil.which(tool):
            raise Failed(f"Blender needs system libraries that are missing here. Install them, then run this again:\n  {command}")
    raise Failed(
        f"Blender needs system libraries that are missing here: {', '.join(row[0] for row in missing)}. Install them, then run this again."
    )


def gltf_validator() -> None:
    """Fetches the validator into .venv/cache, once. Without npm, or if that finds nothing, the tests that need it are skipped."""
    folder, npm = CACHE / VALIDATOR.replace("@", "-"), shutil.which("npm")
    if (folder / "package" / "package.json").is_file() or npm is None:
        return
    with tempfile.TemporaryDirectory(prefix="kiln-") as scratch:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run([npm, "pack", "--silent", VALIDATOR], cwd=scratch, capture_output=True, timeout=120)
        found = list(Path(scratch).glob("*.tgz"))
        if not found:
            print(f"{VALIDATOR} could not be fetched from npm.", flush=True)
            return
        if hashlib.sha256(found[0].read_bytes()).hexdigest() != VALIDATOR_HASH:
            raise Failed(f"npm gave another {VALIDATOR} than the one that is known.")
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.new")
        with tarfile.open(found[0]) as archive:
            archive.extractall(unfinished, filter="data")
        try:
            os.replace(unfinished, folder)
        except OSError:  # another run was first
            shutil.rmtree(unfinished, ignore_errors=True)


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _variables(backend: Path | None = None) -> dict[str, str]:
    """The process environment for what runs in the environments; compiled numba code, jobs and Blender's settings stay in `.venv`."""
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "NUMBA_CACHE_DIR": str(CACHE / "numba"),
        "BLENDER_USER_RESOURCES": str(CACHE / "blender"),
        "KILN_HOME": os.environ.get("KILN_HOME", str(VENV / "home")),  # demo and benchmarks leave the user's own backend and jobs alone
    }
    (CACHE / "blender").mkdir(parents=True, exist_ok=True)
    if backend:
        variables["KILN_BACKEND_PYTHON"] = str(backend)
    return variables


def _output(command: Sequence) -> str:
    try:
        done = subprocess.run(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout


def _call(command: Sequence, **options) -> None:
    code = subprocess.run(list(map(str, command)), **options).returncode
    if code:
        raise Failed(f"This failed (exit status {code}): {' '.join(map(str, command))}")


def _pip(python: Path) -> list[str]:
    return [str(python), "-I", "-m", "pip", "--disable-pip-version-check", "--no-input"]


# Commands


def setup(options: argparse.Namespace) -> None:
    """make both environments whole"""
    environments = Environments(options)
    system_libraries()
    backend, blender = environments.all_of(environments.backend, environments.blender)
    print(f"Ready: Blender {blender.version} in .venv, the backend on {environment.about(VENV / 'backend')['device']} with {backend}")


def demo(options: argparse.Namespace) -> None:
    """run the main job on a built-in object, or on --object FILE, and show where the pictures are"""
    environments = Environments(options)
    system_libraries()
    backend, blender = environments.all_of(environments.backend, environments.blender)
    arguments = [str(ROOT / "benchmarks" / "demo.py"), "--out", str(options.out), "--recipe", options.recipe, *options.further]
    if options.object:
        arguments += ["--object", str(options.object)]
    _call(blender.command(arguments), env=_variables(backend))
    print("\nThe results:")
    for name in sorted(path for path in options.out.iterdir() if path.is_file()):
        print(f"  {name}")


def bench(options: argparse.Namespace) -> None:
    """run benchmarks/bench_NAME.py in the environment that its first lines name"""
    script = ROOT / "benchmarks" / f"bench_{options.name}.py"
    if not script.is_file():
        names = sorted(path.stem.removeprefix("bench_") for path in script.parent.glob("bench_*.py"))
        raise Failed(f"There is no benchmark {options.name!r}. There are: {', '.join(names)}.")
    room = re.search(r"^# environment: (backend|blender)$", "".join(script.read_text("utf-8").splitlines(keepends=True)[:5]), re.MULTILINE)
    if not room:
        raise Failed(f"{script} does not say where it runs: its first line has to be '# environment: backend' or '# environment: blender'.")
    environments = Environments(options)
    arguments = [str(script), *(["--json", str(options.json)] if options.json else []), *options.further]
    if room[1] == "backend":
        backend = environments.backend()
        _call([backend, *arguments], env=_variables(backend))
    else:
        system_libraries()
        backend, blender = environments.all_of(environments.backend, environments.blender)
        _call(blender.command(arguments), env=_variables(backend))


def fuzz(options: argparse.Namespace) -> None:
    """hostile messages against a real backend; --count N, --seed S (docs/RELIABILITY.md)"""
    _harness("fuzz", options)


def faults(options: argparse.Namespace) -> None:
    """kill, fill, stop and damage what runs; --count N, --seed S (docs/RELIABILITY.md)"""
    _harness("faults", options)


def _harness(name: str, options: argparse.Namespace) -> None:
    backend = Environments(options).backend()
    _call([backend, "-m", f"tests.trust.{name}", *options.further], env=_variables(backend))


def lint(options: argparse.Namespace) -> None:
    """ruff and mypy; --fix mends and formats what they can"""
    code = _lint(Environments(options).backend(), options.fix)
    if code:
        sys.exit(code)


def _lint(python: Path, fix: bool = False) -> int:
    cache = ["--cache-dir", str(CACHE / "ruff")]
    commands = [
        ["ruff", "check", "--quiet", *cache, *(["--fix"] if fix else []), "."],
        ["ruff", "format", *cache, *([] if fix else ["--check"]), "."],
        ["mypy", "--no-error-summary"],
    ]
    return max(subprocess.run([str(python), "-m", *command], cwd=ROOT).returncode for command in commands)


def test(options: argparse.Namespace) -> None:
    """set everything up, then lint and run every test; further words go to pytest"""
    seconds: list[tuple[str, float, str]] = []

    begun = time.monotonic()
    environments = Environments(options)
    print("=== set-up", flush=True)
    system_libraries()
    gltf_validator()
    tests_of_ray = _split(options.further, ("tests/backend/batch",))[1] != []  # all, or some that the user names
    backend, blender = environments.all_of(environments.backend_with_ray if tests_of_ray else environments.backend, environments.blender)
    *others, oldest = environments.all_of(*environments.further_blenders()) or [None]  # which these are depends on the first one's Python
    seconds.append(("set-up", time.monotonic() - begun, "ok"))

    with _scratch() as scratch:
        kept: list[tuple[str, Path]] = []

        def lane(parts: Sequence[tuple[str, Work | None]], quiet: bool) -> None:
            """One part after the other. quiet: what they print is kept until all that is printed at once has ended."""
            for name, work in parts:
                if work is None:
                    continue
                started = time.monotonic()
                if quiet:
                    output = scratch / f"{len(kept)}.txt"
                    with output.open("wb") as file:
                        code = work(file)
                    kept.append((name, output))
                else:
                    print(f"\n=== {name}", flush=True)
                    code = work(None)
                seconds.append((name, time.monotonic() - started, "ok" if code == 0 else f"FAILED ({code})"))

        def pytest(command: Callable[[Sequence[str]], list[str]], *folders: str, marker: str = "") -> Work | None:
            """One run of pytest on those of the folders, or of the files that the user names, that lie in them."""
            words, chosen = _split(options.further, folders)
            there = [folder for folder in folders if (ROOT / folder).exists()] if chosen is None else chosen
            if not there:
                return None
            marks = " and ".join([*([marker] if marker else []), *([] if options.long else ["not long"])])
            own = folders[0].replace("/", "-")  # two of them run side by side
            cache, home = CACHE / "pytest" / own, scratch / own
            variables = {**_variables(backend), "KILN_HOME": str(home), "BLENDER_USER_RESOURCES": str(scratch / "blender")}
            arguments = ["-m", "pytest", "-q", "--rootdir", str(ROOT), "-o", f"cache_dir={cache}", "-m", marks, *words, *there]

            def work(output: IO[bytes] | None) -> int:
                code = subprocess.run(
                    command(arguments), cwd=ROOT, env=variables, stdout=output, stderr=output and subprocess.STDOUT
                ).returncode
                # 5: no test was found. A fault, unless the user asked for less than the whole.
                return 0 if code == 5 and options.further else code

            return work

        def in_backend(arguments: Sequence[str]) -> list[str]:
            return [str(backend), *arguments]

        processes = ("tests/backend/batch", "tests/trust", "tests/test_build.py")  # these mostly wait for processes
        there = [path for path in (ROOT / "tests/backend").iterdir() if path.is_dir() or path.name.startswith("test_")]
        modules = sorted(path.relative_to(ROOT).as_posix() for path in there if path.name != "__pycache__")
        here: list[tuple[str, Work | None]] = [
            ("lint", None if _split(options.further, ())[1] is not None else lambda output: _lint(backend)),
            ("backend", pytest(in_backend, "tests/protocol", *(path for path in modules if path not in processes))),
        ]
        beside: list[tuple[str, Work | None]] = [("batch and trust", pytest(in_backend, *processes))]
        for one in [blender, *(other for other in others if other)]:
            beside.append((f"Blender {one.version}", pytest(one.command, "tests/blender")))
            beside.append((f"end to end, Blender {one.version}", pytest(one.command, "tests/end_to_end")))
        if oldest:
            beside.append((f"Blender {oldest.version}", pytest(oldest.command, "tests/blender", "tests/end_to_end", marker="oldest")))
        if (os.cpu_count() or 1) > 1 and any(work for _, work in here):  # either is mostly one thread, which compiles or renders
            with concurrent.futures.ThreadPoolExecutor(1) as other:
                waiting = other.submit(lane, beside, True)
                lane(here, False)
                waiting.result()
        else:
            lane([*here, *beside], False)
        for name, output in kept:
            print(f"\n=== {name}\n{output.read_text('utf-8', 'replace')}", flush=True)

    print("\n=== seconds")
    for name, took, outcome in seconds:
        print(f"{took:8.1f}  {name:<32} {outcome}")
    print(f"{time.monotonic() - begun:8.1f}  total", flush=True)
    failed = [name for name, _, outcome in seconds if outcome != "ok"]
    if failed:
        raise Failed(f"Failed: {', '.join(failed)}.")


def _split(words: Sequence[str], folders: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """The user's words for pytest without the test files among them, and those files that lie in the folders; None if none is named."""
    files = [word for word in words if not word.startswith("-") and (ROOT / word.split("::")[0]).exists() and "tests" in Path(word).parts]
    if not files:
        return list(words), None
    inside = [word for word in files if any((ROOT / word.split("::")[0]).resolve().is_relative_to(ROOT / folder) for folder in folders)]
    return [word for word in words if word not in files], inside


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kiln-tests-", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "blender").mkdir()
        yield Path(folder)


def package(options: argparse.Namespace) -> None:
    """make the extension's zip and the backend's wheel in dist/; --offline-bundle adds a zip of all that the backend needs"""
    backend = Environments(options).backend()
    options.out.mkdir(parents=True, exist_ok=True)
    wheels = _extension_wheels(backend)
    made = [wheel(options.out), options.out / f"kiln-{VERSION}.zip"]
    with _scratch() as scratch:
        folder = scratch / "kiln"
        assemble(folder)
        (folder / "wheels").mkdir()
        for path in wheels:
            shutil.copyfile(path, folder / "wheels" / path.name)
        manifest = folder / "blender_manifest.toml"
        listed = "".join(f'    "./wheels/{path.name}",\n' for path in wheels)
        top, table, rest = manifest.read_text("utf-8").partition("\n[")  # a key of the whole stands before the first table
        manifest.write_text(f"{top}\nwheels = [\n{listed}]\n{table}{rest}", "utf-8")
        _zip(made[1], {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    if options.offline_bundle:
        made.append(_offline_bundle(backend, options.bundle_python, options.out))
    scripts = "bpy/*/scripts/addons_core/bl_pkg/cli/blender_ext.py"
    for tool in sorted([*VENV.glob(f"blender*/lib/python*/site-packages/{scripts}"), *VENV.glob(f"blender*/Lib/site-packages/{scripts}")]):
        _call([sys.executable, tool, "validate", made[1]], stdout=subprocess.DEVNULL)
        print(f"Blender {tool.parents[4].name} accepts {made[1].name}")
    for path in made:
        print(f"{path.stat().st_size / 1e6:8.1f} MB  {path}")


def assemble(target: Path) -> None:
    """The extension as a folder that Blender can load: with `protocol` inside, and the backend's wheel and lock file to set up from."""
    leave = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(ROOT / "blender_addon", target, ignore=leave, dirs_exist_ok=True)
    shutil.copytree(ROOT / "protocol", target / "protocol", ignore=leave, dirs_exist_ok=True)
    shutil.copyfile(ROOT / "LICENSE", target / "LICENSE")
    (target / "backend").mkdir(exist_ok=True)
    shutil.copyfile(LOCKS / "backend.txt", target / "backend" / "requirements.txt")
    wheel(target / "backend")


def _extension_wheels(python: Path) -> list[Path]:
    """The wheels of requirements/extension.txt for every Blender, downloaded once."""
    lock = LOCKS / "extension.txt"
    folder = CACHE / f"extension-wheels-{environment.fingerprint([lock], None)[:12]}"
    complete = folder / "complete.txt"
    if not complete.exists():

        def fetch(case: tuple[str, list[str]]) -> None:
            version, tags = case
            options = [
                "-qq",
                "--no-deps",
                "--only-binary=:all:",
                "--python-version",
                version,
                "--implementation",
                "cp",
                "--dest",
                folder,
            ]
            _call([*_pip(python), "download", *options, *(part for tag in tags for part in ("--platform", tag)), "-r", lock])

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(fetch, ((version, tags) for tags in EXTENSION_PLATFORMS.values() for version in EXTENSION_PYTHONS)))
        complete.touch()
    return sorted(folder.glob("*.whl"))


def _offline_bundle(python: Path, version: str | None, out: Path) -> Path:
    """A zip of the backend's lock as wheels, for this machine's kind of system and device and for the given Python."""
    torch = environment.torch_build()
    version = version or ".".join(environment.about(VENV / "backend")["python"].split(".")[:2])
    system = {"Linux": "linux", "Windows": "windows", "Darwin": "macos"}.get(platform.system(), platform.system().lower())
    path = out / f"kiln-backend-{VERSION}-offline-{system}-{platform.machine().lower()}-python{version}-{torch.device}.zip"
    with _scratch() as scratch:
        options = ["-qq", "--only-binary=:all:", "--python-version", version, "--dest", scratch / "wheels"]
        if torch.index and environment.reachable(torch.index):
            options += ["--extra-index-url", torch.index]
        _call([*_pip(python), "download", *options, "-r", LOCKS / "backend.txt", *torch.more])
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for file in sorted((scratch / "wheels").iterdir()):
                archive.write(file, file.name)
    return path


# The backend's wheel (and, by the same function, what links an environment to this checkout)


def wheel(folder: Path, editable: bool = False) -> Path:
    """Writes the backend's wheel, byte for byte the same for the same source; an editable one holds only the way to this checkout."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    name = project["name"].replace("-", "_")
    if editable:
        # In ASCII: Python 3.11 and 3.12 read this file in the locale's encoding.
        files = {f"{name}.pth": f"import sys; sys.path.append({ascii(str(ROOT))})\n".encode()}
    else:
        files = {
            path.relative_to(ROOT).as_posix(): path.read_bytes()
            for package in ("backend", "protocol")
            for path in sorted((ROOT / package).rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts
        }
    metadata = [
        "Metadata-Version: 2.4",
        f"Name: {project['name']}",
        f"Version: {VERSION}",
        f"Summary: {project['description']}",
        f"License-Expression: {project['license']}",
        "License-File: LICENSE",
        f"Requires-Python: {project['requires-python']}",
        *(f"Requires-Dist: {requirement}" for requirement in project["dependencies"]),
    ]
    for extra, requirements in project["optional-dependencies"].items():
        metadata += [f"Provides-Extra: {extra}", *(f"Requires-Dist: {requirement} ; extra == '{extra}'" for requirement in requirements)]
    scripts = ["[console_scripts]", *(f"{script} = {function}" for script, function in project["scripts"].items())]
    info = f"{name}-{VERSION}.dist-info"
    files[f"{info}/licenses/LICENSE"] = (ROOT / "LICENSE").read_bytes()
    files[f"{info}/entry_points.txt"] = _lines(scripts)
    files[f"{info}/METADATA"] = _lines(metadata)
    files[f"{info}/WHEEL"] = _lines(["Wheel-Version: 1.0", "Generator: build.py", "Root-Is-Purelib: true", "Tag: py3-none-any"])

    def hashed(data: bytes) -> str:
        return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()

    record = [f"{path},sha256={hashed(data)},{len(data)}" for path, data in files.items()]
    files[f"{info}/RECORD"] = _lines([*record, f"{info}/RECORD,,"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{VERSION}-py3-none-any.whl"
    _zip(path, files)
    return path


def _lines(lines: Sequence[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _zip(path: Path, files: dict[str, bytes]) -> None:
    """Writes a zip that depends on nothing but its files' names and contents, at once or not at all."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.new")
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            # Wheels are packed already.
            archive.writestr(entry, files[name], zipfile.ZIP_STORED if name.endswith(".whl") else zipfile.ZIP_DEFLATED)
    os.replace(unfinished, path)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None) -> str:  # PEP 517
    return wheel(Path(wheel_directory)).name


def build_editable(wheel_directory, config_settings=None, metadata_directory=None) -> str:  # PEP 660
    return wheel(Path(wheel_directory), editable=True).name


# The command line


def main() -> None:
    environments = argparse.ArgumentParser(add_help=False)
    environments.add_argument(
        "--blender-python", type=Path, metavar="PATH", help="the Python whose bpy wheel is Blender (3.11: 4.5 LTS, 3.13: 5.2 LTS)"
    )
    environments.add_argument("--blender", type=Path, metavar="PATH", help="a real Blender instead of the bpy wheel")
    environments.add_argument("--backend-python", type=Path, metavar="PATH", help="the Python for the backend's environment (3.11 to 3.13)")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="`build.py COMMAND --help` lists a command's options.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {}
    for function in (setup, demo, test, package, bench, fuzz, faults, lint):
        parsers[function] = commands.add_parser(
            function.__name__, help=function.__doc__, description=function.__doc__, parents=[environments]
        )
        parsers[function].set_defaults(function=function)
    parsers[demo].add_argument("--object", type=Path, metavar="FILE", help="a model to reconstruct (GLB, OBJ, PLY, FBX, BLEND)")
    parsers[demo].add_argument("--recipe", default="reconstruct", metavar="NAME")
    parsers[demo].add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="where the results go (default: %(default)s)")
    parsers[test].add_argument("--long", action="store_true", help="also the tests that take long")
    parsers[package].add_argument("--out", type=Path, default=Path("dist"), metavar="DIR", help="where they go (default: %(default)s)")
    parsers[package].add_argument("--offline-bundle", action="store_true", help="also a zip that sets the backend up without a network")
    parsers[package].add_argument(
        "--bundle-python", metavar="VERSION", help="the Python of the Blender that it is for (3.11 up to Blender 5.0, then 3.13)"
    )
    parsers[bench].add_argument("name", metavar="NAME")
    parsers[bench].add_argument("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    parsers[lint].add_argument("--fix", action="store_true", help="mend and format what can be")
    options, further = parser.parse_known_args()
    if further and options.function not in (demo, test, bench, fuzz, faults):
        parser.error(f"unknown: {' '.join(further)}")
    options.further = further
    try:
        options.function(options)
    except Failed as failure:
        sys.exit(f"build.py: {failure}")
    except environment.SetupError as failure:
        sys.exit(f"build.py: {failure.message}\n{failure.hint}".rstrip())
    except KeyboardInterrupt:
        sys.exit("build.py: interrupted; run it again to go on")


if __name__ == "__main__":
    main()
