"""Libraries that run in a process of their own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backend.mesh.own_process import in_own_process
from protocol.errors import Cancelled, KilnError

ROOT = Path(__file__).parents[3]


def ends(pid: int) -> bool:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def started(mark: Path) -> int:
    until = time.monotonic() + 60
    while not mark.exists() or not mark.read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    return int(mark.read_text())


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_it_ends_with_the_process_that_wanted_it(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-m", "tests.backend.mesh.sleeper", str(tmp_path / "mark")], cwd=ROOT, env=environment)
    child = started(tmp_path / "mark")
    parent.kill()
    parent.wait()
    assert ends(child)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_cancelled_it_is_gone_at_once(tmp_path):
    def cancel(fraction: float) -> None:
        if (tmp_path / "mark").exists() and (tmp_path / "mark").read_text():
            raise Cancelled

    with pytest.raises(Cancelled):
        in_own_process("tests.backend.mesh.sleeper", {"mark": str(tmp_path / "mark")}, 1.0, "Sleeping", "", cancel)
    assert ends(started(tmp_path / "mark"))


def test_what_ends_badly_says_so():
    with pytest.raises(KilnError, match="Looking failed: .*no_such_module"):
        in_own_process("tests.no_such_module", {}, 1.0, "Looking", "Look elsewhere.", lambda done: None)


def test_a_full_disk_is_told_as_one(small_disk, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    with pytest.raises(KilnError) as caught:
        in_own_process("tests.backend.mesh.sleeper", {"mark": "large"}, 1.0, "Answering", "", lambda done: None)
    assert caught.value.code == "no-space"
