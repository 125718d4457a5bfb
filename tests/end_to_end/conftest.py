"""The real extension in bpy against a real backend process. The extension is enabled as in tests/blender; the backend lies in the Python
that KILN_BACKEND_PYTHON names, or in .venv/backend."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def pytest_configure(config):
    plugins = config.pluginmanager
    if not any(getattr(plugin, "MODULE", "") == "bl_ext.kiln_test.kiln" for plugin in plugins.get_plugins()):
        spec = importlib.util.spec_from_file_location("kiln_in_blender", ROOT / "tests" / "blender" / "conftest.py")
        shared = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(shared)
        plugins.register(shared)


@pytest.fixture(scope="session")
def backend_python():
    named = os.environ.get("KILN_BACKEND_PYTHON")
    python = Path(named) if named else ROOT / ".venv" / "backend" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        pytest.fail(f"No backend environment at {python}: `python build.py setup` makes one.")
    return python


@pytest.fixture(scope="session")
def blender_user(tmp_path_factory):
    """The user folder of a Blender that has the extension installed, as its own process finds it: bl_ext.user_default.kiln."""
    from bl_ext.kiln_test.kiln import session

    folder = tmp_path_factory.mktemp("user")
    target = folder / "extensions" / "user_default" / "kiln"
    shutil.copytree(Path(session.__file__).parent, target, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory, backend_python):
    """A Kiln folder of its own for the module's backend, which ends with the module."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("home")
    patch.setenv("KILN_HOME", str(folder))
    patch.setenv("KILN_BACKEND_PYTHON", str(backend_python))
    patch.setenv("PYTHONPATH", str(ROOT))
    yield folder
    from bl_ext.kiln_test.kiln import session

    session.current.stop_backend()
    patch.undo()


@pytest.fixture(autouse=True)
def fresh_session(request):
    """No notices and no choices of an earlier test; another backend is looked for at once."""
    if "home" not in request.fixturenames:
        return
    request.getfixturevalue("home")
    from bl_ext.kiln_test.kiln import session

    session.current.notices.clear()
    session.current._look_again = 0.0
