"""What tests share: a disk that is small enough to fill."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

# Who starts the tests in the background of a shell ignores Ctrl-C, which every process started here would inherit
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 24 MB, where this system lets a test mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if sys.platform != "linux" or os.geteuid() != 0 or not mount:
        pytest.skip("needs Linux and root for a small tmpfs")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this container may not mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)
