"""Who may connect: what is refused before anything of it is parsed, and new keys."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from protocol.connection import Connection, acl_command
from protocol.errors import KilnError
from tests.protocol.service import ROOT, Peer, Service


@pytest.fixture
def service(tmp_path, monkeypatch):
    monkeypatch.setenv("KILN_PIPELINES", "tests.backend.steps_recipe")
    monkeypatch.setenv("KILN_TEST_MARKS", str(tmp_path / "marks"))
    made = Service(tmp_path / "home", workers=1).start()
    yield made
    made.stop()


def rotate(service: Service) -> str:
    command = [sys.executable, "-m", "backend.cli", "keys", "rotate"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KILN_HOME": str(service.home)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def let_in(connection: Connection) -> bool:
    with Peer(connection, hello=False) as peer:
        peer.send({"type": "hello", "id": "1", "protocol": [1, 0]})
        return peer.receive(1.5) is not None


def test_rotated_keys_shut_out_yesterdays_end_open_connections_and_leave_the_job_alone(service, tmp_path):
    shutil.copyfile(service.path, tmp_path / "carried.json")
    yesterday = Connection.load(tmp_path / "carried.json")
    with service.client() as client, Peer(yesterday) as open_before:
        job = client.submit("steps", {"seconds": 1.0}, {"in/text.txt": b"hello"})["id"]
        while client.job(job)["stage"] != "Draw":
            time.sleep(0.01)
        assert "keys are new" in rotate(service)
        today = service.connection()
        assert {today.server_key, today.client_key}.isdisjoint({yesterday.server_key, yesterday.client_key})
        open_before.send({"type": "ping", "id": "after"})
        assert open_before.receive(1.5) is None, "a connection that was open before is still served"
        moved = Connection(today.endpoint, yesterday.server_key, yesterday.client_key, yesterday.client_secret)
        half = Connection(today.endpoint, today.server_key, yesterday.client_key, yesterday.client_secret)
        assert not let_in(yesterday) and not let_in(moved) and not let_in(half)
        assert let_in(today)
        for _ in client.watch(job, timeout=60):  # this user's own client finds its way back by the connection file
            pass
        assert client.job(job)["state"] == "done" and client.job(job)["attempts"] == 1
        assert client.status()["refused"] >= 2


def test_keys_are_rotated_without_a_backend_too(service):
    before = service.connection()
    service.stop()
    rotate(service)
    service.start()
    assert service.connection().client_key != before.client_key
    with pytest.raises(KilnError), service.client() as client:
        client.connection = Connection(service.connection().endpoint, before.server_key, before.client_key, before.client_secret)
        client.patience = 0.0
        client.hello()


@pytest.mark.skipif(os.name != "posix", reason="modes")
def test_another_user_of_the_machine_reads_nothing(tmp_path):
    with tempfile.TemporaryDirectory() as open_to_all:
        os.chmod(open_to_all, 0o755)
        service = Service(Path(open_to_all) / "home").start()
        try:
            secret = (service.path, service.home / "keys" / "keys.json")
            for path in (service.home, *(path.parent for path in secret)):
                assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
            for path in secret:
                assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
                assert os.geteuid() or not readable_by_nobody(path)
            (Path(open_to_all) / "free").touch()
            assert os.geteuid() or readable_by_nobody(Path(open_to_all) / "free")
        finally:
            service.stop()


def readable_by_nobody(path: Path) -> bool:
    """Whether another user, whom root can become, opens it."""
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            open(path).close()
            os._exit(0)
        except PermissionError:
            os._exit(1)
        finally:
            os._exit(2)
    return {0: True, 1: False}[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]


def test_on_windows_the_users_own_rights_are_all(tmp_path):
    (tmp_path / "file").touch()
    assert acl_command(tmp_path / "file", "HOST\\anna")[2:] == ["/inheritance:r", "/grant:r", "HOST\\anna:F"]
    assert acl_command(tmp_path, "anna")[-1] == "anna:(OI)(CI)F"
