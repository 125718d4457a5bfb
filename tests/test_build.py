"""build.py and blender_addon/environment.py: environments, the backend's wheel, the extension's folder and zip.

Environments are made from bundles of small wheels that the tests write, so that nothing here but `package` needs a network.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

import build
import protocol

ROOT = Path(__file__).resolve().parents[1]
environment = build.environment
PYTHON = Path(sys.executable)


def small_wheel(folder: Path, name: str, version: str) -> Path:
    """A wheel with one module that knows its version, and one script of the same name."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"VERSION = {version!r}\n\n\ndef main():\n    print(VERSION)\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[console_scripts]\n{name} = {name}:main\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in files.items():
            archive.writestr(inside, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{inside},,\n" for inside in [*files, f"{info}/RECORD"]))
    return path


def lock_file(path: Path, *lines: str) -> Path:
    path.write_text("# what the test needs\n" + "\n".join(lines) + "\n")
    return path


def said_by(target: Path, code: str) -> str:
    return subprocess.run([environment.python(target), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_an_environment_lives_from_missing_to_removed(tmp_path):
    target, bundle = tmp_path / "environment", tmp_path / "bundle.zip"
    with zipfile.ZipFile(bundle, "w") as archive:
        for path in (small_wheel(tmp_path / "wheels", "alpha", "1.0"), small_wheel(tmp_path / "wheels", "alpha", "2.0")):
            archive.write(path, path.name)
    lock, program = lock_file(tmp_path / "lock.txt", "alpha==1.0"), small_wheel(tmp_path, "program", "0.1")
    assert environment.state(target, [lock], program) == "missing"

    told = []
    environment.create(target, PYTHON, [lock], program, bundle=bundle, report=lambda fraction, text: told.append((fraction, text)))
    assert environment.state(target, [lock], program) == "ready"
    assert said_by(target, "import alpha; print(alpha.VERSION)") == "1.0"
    script = environment.python_in(target).with_name("program.exe" if sys.platform == "win32" else "program")
    assert subprocess.run([script], capture_output=True, text=True).stdout.strip() == "0.1"
    assert [fraction for fraction, _ in told] == sorted(fraction for fraction, _ in told) and told[-1][0] == 1.0
    assert environment.size(target) >= sum(path.stat().st_size for path in target.rglob("*.py") if not path.is_symlink()) > 1e6

    # A new version is exchanged in place: what else lies there stays.
    (target / "sentinel").touch()
    lock_file(lock, "alpha==2.0")
    assert environment.state(target, [lock], program) == "outdated"
    environment.create(target, PYTHON, [lock], program, bundle=bundle)
    assert said_by(target, "import alpha; print(alpha.VERSION)") == "2.0" and (target / "sentinel").exists()

    # Repair makes a ready one anew.
    environment.create(target, PYTHON, [lock], program, bundle=bundle)
    assert not (target / "sentinel").exists() and environment.state(target, [lock], program) == "ready"

    # A repair that fails or is cancelled leaves the environment that worked.
    (target / "sentinel").touch()
    small_wheel(tmp_path / "others", "beta", "1.0")
    with pytest.raises(environment.SetupError, match="alpha==2.0"):
        environment.create(target, PYTHON, [lock], program, bundle=tmp_path / "others")
    assert environment.state(target, [lock], program) == "ready" and (target / "sentinel").exists()
    assert said_by(target, "import alpha; print(alpha.VERSION)") == "2.0"
    assert not [path for path in tmp_path.iterdir() if "removed" in path.name]

    # What cannot be had is named, with where to read on; an update that failed leaves nothing that counts as whole.
    lock_file(lock, "alpha==3.0")
    with pytest.raises(environment.SetupError, match="alpha==3.0") as caught:
        environment.create(target, PYTHON, [lock], program, bundle=bundle, log=tmp_path / "set-up.log")
    assert str(tmp_path / "set-up.log") in caught.value.hint and "alpha==3.0" in (tmp_path / "set-up.log").read_text()
    assert environment.state(target, [lock], program) == "incomplete" and environment.python(target) is None

    environment.remove(target)
    assert environment.state(target, [lock], program) == "missing" and environment.size(target) == 0
    assert not [path for path in tmp_path.iterdir() if "removed" in path.name]


def test_an_environment_whose_python_is_gone_is_not_ready(tmp_path):
    """As after an update of the Blender that it was made with."""
    lock, python = lock_file(tmp_path / "lock.txt"), environment.python_in(tmp_path)
    python.parent.mkdir()
    python.touch()
    (tmp_path / environment.MARKER).write_text(json.dumps({"fingerprint": environment.fingerprint([lock], None)}))
    (tmp_path / "pyvenv.cfg").write_text(f"home = {python.parent}\n")
    assert environment.state(tmp_path, [lock]) == "ready"
    (tmp_path / "pyvenv.cfg").write_text(f"home = {tmp_path / 'gone'}\n")
    assert environment.state(tmp_path, [lock]) == "incomplete"


def test_a_changed_wheel_of_the_same_version_makes_an_environment_outdated(tmp_path):
    lock, program = lock_file(tmp_path / "lock.txt"), small_wheel(tmp_path, "program", "0.1")
    before = environment.fingerprint([lock], program)
    lock_file(lock, "# another comment")
    assert environment.fingerprint([lock], program) == before
    with zipfile.ZipFile(program, "a") as archive:
        archive.writestr("more.py", "")
    assert environment.fingerprint([lock], program) != before


def commands_with(word: str) -> list[bytes]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended meanwhile
            found.append(path.read_bytes())
    return [command for command in found if word.encode() in command]


def test_a_cancelled_setup_ends_its_processes_and_resumes_and_two_do_the_work_once(tmp_path):
    class Cancelled(Exception):
        pass

    target, bundle = tmp_path / "environment", tmp_path / "wheels"
    small_wheel(bundle, "alpha", "1.0")
    lock = lock_file(tmp_path / "lock.txt", "alpha==1.0")

    for moment in ("Making an empty environment", "Looking for packages"):

        def cancel(fraction, text, moment=moment):
            if text == moment:
                raise Cancelled

        with pytest.raises(Cancelled):
            environment.create(target, PYTHON, [lock], bundle=bundle, report=cancel)
        assert environment.state(target, [lock]) == "incomplete" and environment.python(target) is None
        if sys.platform == "linux":
            until = time.monotonic() + 20  # killed with its group; on a busy machine it is there a moment longer
            while (left := commands_with(str(target))) and time.monotonic() < until:
                time.sleep(0.05)
            assert not left

    told: list[str] = []

    def create():
        environment.create(target, PYTHON, [lock], bundle=bundle, report=lambda fraction, text: told.append(text))

    both = [threading.Thread(target=create) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert environment.state(target, [lock]) == "ready"
    assert "Waiting for another set-up of the same environment" in told and told.count("Ready") == 1


def test_what_cannot_be_set_up_is_said_with_what_to_do(tmp_path):
    lock = lock_file(tmp_path / "lock.txt", "alpha==3.0")
    with pytest.raises(environment.SetupError, match="not a Python that runs"):
        environment.create(tmp_path / "environment", tmp_path / "nothing", [lock])

    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(environment.SetupError, match="not an offline bundle"):
        environment.create(tmp_path / "environment", PYTHON, [lock], bundle=tmp_path / "text.zip")

    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "beta-1.0-cp39-cp39-win_amd64.whl").touch()
    with pytest.raises(environment.SetupError, match=r"needs Python 3\.9|needs 3\.9"):  # the Python that the bundle was made for
        environment.create(tmp_path / "environment", PYTHON, [lock], small_wheel(tmp_path, "program", "0.1"), bundle=tmp_path / "bundle")

    with pytest.raises(environment.SetupError, match="no backend"):
        environment.create(tmp_path / "environment")  # a checkout is no packaged extension


def test_too_long_paths_are_said_before_anything_is_fetched(tmp_path, monkeypatch):
    lock = lock_file(tmp_path / "lock.txt", "torch==2.13.0")
    target = tmp_path / ("long" * 15) / "environment"
    monkeypatch.setattr(environment, "_long_paths", lambda: False)  # as on Windows, unless someone turned them on
    with pytest.raises(environment.SetupError, match="allows paths of 259 characters"):
        environment.create(target, PYTHON, [lock], torch=environment.Torch("cpu", None, 0.0, "test"))
    assert not target.exists()


def test_a_folder_with_other_things_is_never_removed(tmp_path):
    (tmp_path / "precious.blend").touch()
    with pytest.raises(environment.SetupError, match="other things"):
        environment.remove(tmp_path)
    assert (tmp_path / "precious.blend").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="stands in for nvidia-smi with a shell script")
@pytest.mark.parametrize(
    "answer, device, index",
    [
        ("NVIDIA H200, 580.95.05, 9.0", "cuda", "cu130"),
        ("NVIDIA GeForce RTX 5090, 581.29, 12.0", "cuda", "cu130"),
        ("NVIDIA GeForce RTX 3090, 550.54.14, 8.6", "cuda", "cu126"),  # a driver too old for CUDA 13
        ("NVIDIA GeForce GTX 1080, 580.95.05, 6.1", "cuda", "cu126"),  # a card too old for CUDA 13
        ("NVIDIA GeForce RTX 5090, 550.54.14, 12.0", "cpu", "cpu"),  # a card too new for CUDA 12.6 with a driver too old for 13
        ("NVIDIA GeForce GTX 680, 470.256.02, 3.0", "cpu", "cpu"),
    ],
)
def test_the_build_of_torch_fits_card_and_driver(tmp_path, monkeypatch, answer, device, index):
    if sys.platform != "linux":
        pytest.skip("Apple's computers have no NVIDIA card")
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{answer}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    chosen = environment.torch_build()
    assert (chosen.device, chosen.index) == (device, f"https://download.pytorch.org/whl/{index}")


def test_what_a_device_wants_beside_the_lock_is_installed_where_the_lock_leaves_it_open(tmp_path):
    """`Torch.more`: a lock's own version comes first, and a bundle that was made for another device goes without."""
    bundle, log = tmp_path / "wheels", tmp_path / "set-up.log"
    for name, version in (("torch", "2.0"), ("extra", "1.0"), ("extra", "2.0")):
        small_wheel(bundle, name, version)
    chosen = environment.Torch("cuda", None, 0.0, "test", ("extra==1.0", "absent==1.0"))
    plain, own = lock_file(tmp_path / "plain.txt", "torch==2.0"), lock_file(tmp_path / "own.txt", "torch==2.0", "extra==2.0")
    for lock, version in ((plain, "1.0"), (own, "2.0")):
        target = tmp_path / lock.stem
        environment.create(target, PYTHON, [lock], torch=chosen, bundle=bundle, log=log)
        assert said_by(target, "import extra; print(extra.VERSION)") == version


def test_an_index_that_cannot_be_reached_is_found_out_soon():
    assert not environment.reachable("http://127.0.0.1:9")  # the discard port: nobody listens


def test_a_python_is_found_by_its_version():
    base, version, able = environment.look_at_python(PYTHON)
    assert version == sys.version_info[:3] and able and base.resolve() == Path(sys._base_executable).resolve()
    found = environment.find_python([(2, 6), sys.version_info[:2]])
    assert environment.look_at_python(found)[1][:2] == sys.version_info[:2]
    assert environment.find_python([(2, 6)]) is None


def test_build_says_which_python_it_needs():
    old = next((found for minor in (10, 9, 8, 7) if (found := environment.find_python([(3, minor)]))), None)
    if old is None:
        pytest.skip("no Python before 3.11 on this machine")
    done = subprocess.run([old, ROOT / "build.py", "setup"], capture_output=True, text=True)
    assert done.returncode == 1 and "needs Python 3.11 or later" in done.stderr and "python3.11 build.py" in done.stderr


def pins(lock: Path) -> dict[str, str]:
    return dict(re.fullmatch(r"([\w.-]+)==([^ ;]+).*", line).groups() for line in environment.requirements(lock))


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_package_here_is_pinned_and_has_its_pin():
    """Holds in the environment that build.py made: nothing came in beside the locks (a GPU's own packages aside)."""
    if not (Path(sys.prefix) / environment.MARKER).exists():
        pytest.skip("this Python is not of an environment that build.py made")
    wanted = {
        name: version for lock in ("backend", "tests", "development") for name, version in pins(ROOT / f"requirements/{lock}.txt").items()
    }
    # Of this environment's own folder: setuptools, once imported, puts what it brings on the path too.
    installed = importlib.metadata.distributions(path=[sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    here = {plain(one.metadata["Name"]): one.version.split("+")[0] for one in installed}
    assert here.pop("kiln-backend") == protocol.VERSION
    if "ray" in here:  # `build.py test` adds the optional extra
        wanted |= pins(ROOT / "requirements/ray.txt")
    accelerator = re.compile("nvidia|cuda|triton|pytorch-triton")
    assert {name: version for name, version in here.items() if not accelerator.match(name)} == {
        name: version for name, version in wanted.items() if name != "colorama" or sys.platform == "win32"
    }


def test_locks_agree_with_each_other_and_with_what_the_backend_asks_for():
    locks = {path.stem: pins(path) for path in (ROOT / "requirements").glob("*.txt")}
    assert all(locks["backend"][name] == version for name, version in locks["extension"].items())
    for others in ("tests", "development"):
        shared = locks["backend"].keys() & locks[others].keys()
        assert {name: locks["backend"][name] for name in shared} == {name: locks[others][name] for name in shared}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {plain(name.split("==")[0]) for name in project["dependencies"]} <= locks["backend"].keys()
    assert dict(name.split("==") for name in project["optional-dependencies"]["ray"]) == locks["ray"]
    manifest = tomllib.loads((ROOT / "blender_addon/blender_manifest.toml").read_text())
    assert manifest["version"] == protocol.VERSION and manifest["blender_version_min"] == build.OLDEST[0] + ".0"


def test_pip_makes_the_same_wheel_that_build_makes(tmp_path):
    mine = build.wheel(tmp_path / "mine")
    command = [
        PYTHON,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--disable-pip-version-check",
        "-w",
        tmp_path / "pip",
        ROOT,
    ]
    subprocess.run(command, check=True)
    (theirs,) = (tmp_path / "pip").iterdir()
    assert theirs.name == mine.name and theirs.read_bytes() == mine.read_bytes()


def test_the_way_to_a_checkout_is_found_whatever_its_folder_is_called(tmp_path, monkeypatch):
    folder = tmp_path / "Zoë's 窯 checkout"
    shutil.copytree(ROOT / "protocol", folder / "protocol")
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    monkeypatch.setattr(build, "ROOT", folder)
    with zipfile.ZipFile(build.wheel(tmp_path, editable=True)) as archive:
        archive.extract("kiln_backend.pth", tmp_path / "site")
    assert (tmp_path / "site" / "kiln_backend.pth").read_bytes().isascii()
    code = f"import site; site.addsitedir({str(tmp_path / 'site')!r}); import protocol; print(ascii(protocol.__file__))"
    # -S: without the environment's own packages, this checkout among them
    said = subprocess.check_output([sys.executable, "-I", "-S", "-c", code], text=True, cwd=tmp_path)
    assert said.strip() == ascii(str(folder / "protocol" / "__init__.py"))


def test_the_wheel_holds_the_backend_and_protocol_whole_and_nothing_else(tmp_path):
    with zipfile.ZipFile(build.wheel(tmp_path)) as archive:
        assert archive.testzip() is None
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    in_git = subprocess.run(["git", "ls-files", "backend", "protocol"], cwd=ROOT, capture_output=True, text=True)
    if in_git.returncode:
        pytest.skip("not a git checkout")
    assert inside >= {name for name in in_git.stdout.split() if (ROOT / name).exists()}
    assert {name.split("/")[0] for name in inside} == {"backend", "protocol"} and not [name for name in inside if "__pycache__" in name]


def test_the_assembled_extension_can_set_its_backend_up(tmp_path):
    build.assemble(tmp_path / "kiln")
    spec = importlib.util.spec_from_file_location("environment_of_the_extension", tmp_path / "kiln" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    (lock,), wheel = module.shipped()
    assert module.requirements(lock) == environment.requirements(ROOT / "requirements/backend.txt")
    assert wheel.read_bytes() == build.wheel(tmp_path).read_bytes()
    assert (tmp_path / "kiln/protocol/recipes.py").read_bytes() == (ROOT / "protocol/recipes.py").read_bytes()


def test_the_package_is_what_blender_accepts_with_wheels_for_every_blender(tmp_path):
    done = subprocess.run([PYTHON, ROOT / "build.py", "package", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for folder in (ROOT / ".venv").glob("blender*/lib/python*/site-packages/bpy/[0-9]*"):
        assert f"Blender {folder.name} accepts" in done.stdout
    with zipfile.ZipFile(tmp_path / f"kiln-{protocol.VERSION}.zip") as archive:
        names = archive.namelist()
        manifest = tomllib.loads(archive.read("blender_manifest.toml").decode())
    wheels = sorted(name.removeprefix("wheels/") for name in names if name.startswith("wheels/"))
    assert manifest["wheels"] == [f"./wheels/{name}" for name in wheels]
    for platform in ("manylinux_2_28_x86_64", "win_amd64", r"macosx_1\d_\d+_(x86_64|universal2)", r"macosx_1\d_\d+_(arm64|universal2)"):
        for package, pythons in {"msgpack": ("cp311-cp311", "cp313-cp313", "cp314-cp314"), "pyzmq": ("cp311-cp311", "cp312-abi3")}.items():
            for python in pythons:
                assert [name for name in wheels if re.fullmatch(rf"{package}-[\d.]+-{python}-.*{platform}\.whl", name)], (
                    package,
                    python,
                    platform,
                )
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_words_for_pytest_reach_the_parts_they_name():
    words = ["-x", "tests/backend/test_store.py::test_one", "-k", "ply", "tests/blender"]
    assert build._split(words, ["tests/blender"]) == (["-x", "-k", "ply"], ["tests/blender"])
    assert build._split(words, ["tests/backend", "tests/protocol"]) == (["-x", "-k", "ply"], ["tests/backend/test_store.py::test_one"])
    assert build._split(words, ["tests/end_to_end"]) == (["-x", "-k", "ply"], [])
    assert build._split(["-x"], ["tests/blender"]) == (["-x"], None)
