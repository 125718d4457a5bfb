"""The extension as Blender sees it: assembled into a folder, enabled as bl_ext.kiln_test.kiln, and an empty scene for every test."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = Path(tempfile.mkdtemp(prefix="kiln-blender-"))
os.environ["BLENDER_USER_RESOURCES"] = str(SCRATCH / "user")  # before bpy is imported: nobody's own preferences count

import bpy  # noqa: E402
import pytest  # noqa: E402

EXIT_STATUS = pytest.StashKey[int]()
REPOSITORY, MODULE = "kiln_test", "bl_ext.kiln_test.kiln"


def assemble(folder: Path) -> None:
    """The extension's folder: blender_addon/ with protocol/ as its subpackage."""
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "blender_addon", folder, ignore=skip)
    shutil.copytree(ROOT / "protocol", folder / "protocol", ignore=skip)


def enable() -> None:
    """Factory settings with the extension switched on, and an empty scene."""
    import addon_utils  # Blender's own; it can be found once bpy is there

    bpy.ops.wm.read_factory_settings(use_empty=True)
    repositories = bpy.context.preferences.extensions.repos
    if REPOSITORY not in [repository.module for repository in repositories]:
        repositories.new(name=REPOSITORY, module=REPOSITORY, custom_directory=str(SCRATCH / "extensions"))
    bpy.ops.preferences.addon_refresh()
    if addon_utils.enable(MODULE, default_set=True) is None:
        raise RuntimeError(f"{MODULE} does not register; the reason stands above")


def pytest_configure(config):
    assemble(SCRATCH / "extensions" / "kiln")
    enable()


def pytest_unconfigure(config):
    if MODULE in sys.modules:
        import addon_utils

        addon_utils.disable(MODULE)
    shutil.rmtree(SCRATCH, ignore_errors=True)
    if bpy.app.version < (4, 3):  # bpy 4.2 alone crashes after main() once its glTF exporter has run: it frees panels without Python
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash.get(EXIT_STATUS, 1))


def pytest_sessionfinish(session, exitstatus):
    session.config.stash[EXIT_STATUS] = int(exitstatus)


@pytest.fixture(autouse=True)
def empty_scene():
    """Every test begins with an empty file; preferences, and so the enabled extension, stay."""
    bpy.ops.wm.read_homefile(use_factory_startup=True, use_empty=True)
    yield
