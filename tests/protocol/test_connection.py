import os
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from protocol import connection
from protocol.connection import Connection, Keys
from protocol.errors import KilnError

posix = pytest.mark.skipif(os.name != "posix", reason="file modes")


@pytest.fixture
def made() -> Connection:
    keys = Keys.make()
    return Connection("tcp://127.0.0.1:1234", keys.server_key, keys.client_key, keys.client_secret, pid=7)


def test_a_connection_file_says_what_was_saved(made, tmp_path):
    made.save(tmp_path / "run" / "connection.json")
    found = Connection.load(tmp_path / "run" / "connection.json")
    assert found == made
    assert found.path == tmp_path / "run" / "connection.json"


@posix
def test_only_the_user_can_read_the_file_and_its_folder(made, tmp_path):
    (tmp_path / "run").mkdir(mode=0o755)
    before = os.umask(0)
    try:
        made.save(tmp_path / "run" / "connection.json")
        made.save(tmp_path / "run" / "connection.json")  # over an older one too
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "run" / "connection.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
    assert os.listdir(tmp_path / "run") == ["connection.json"]


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(made, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(KilnError, match="run"):
        made.save(tmp_path / "run" / "connection.json")


@pytest.mark.parametrize(("module", "name"), [(os, "replace"), (Path, "read_bytes")])
def test_a_file_that_another_process_holds_for_a_moment_is_tried_again(made, tmp_path, monkeypatch, module, name):
    real, tries = getattr(module, name), []

    def held(*arguments):
        tries.append(name)
        if len(tries) < 4:
            raise PermissionError(13, "The process cannot access the file because it is being used by another process")
        return real(*arguments)

    monkeypatch.setattr(module, name, held)
    made.save(tmp_path / "connection.json")
    assert Connection.load(tmp_path / "connection.json") == made and len(tries) == 4
    assert os.listdir(tmp_path) == ["connection.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"endpoint": 5}', "\0", '{"endpoint": "tcp://x:1", "server_key": "short"}'])
def test_a_file_that_is_none_is_refused_with_its_name(text, tmp_path):
    (tmp_path / "some.json").write_text(text)
    with pytest.raises(KilnError, match=r"some\.json") as caught:
        Connection.load(tmp_path / "some.json")
    assert caught.value.code == "bad-connection"


def test_fields_that_this_version_does_not_know_are_passed_over(made, tmp_path):
    path = tmp_path / "connection.json"
    made.save(path)
    path.write_text(path.read_text().replace("{", '{"colour": "blue",', 1))
    assert Connection.load(path) == made


def test_no_file_means_no_backend(tmp_path):
    with pytest.raises(KilnError) as caught:
        Connection.load(tmp_path / "connection.json")
    assert caught.value.code == "unavailable" and "kiln serve" in caught.value.hint


def test_keys_last_and_damaged_ones_are_replaced(tmp_path):
    first = Keys.of(tmp_path)
    assert Keys.of(tmp_path) == first
    path = tmp_path / "keys" / "keys.json"
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text(path.read_text()[:50])
    second = Keys.of(tmp_path)
    assert second != first and Keys.of(tmp_path) == second
    assert len({*vars(second).values()}) == 4


def test_home_follows_the_system_and_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("KILN_HOME", str(tmp_path))
    assert connection.home() == tmp_path
    assert connection.default_path() == tmp_path / "run" / "connection.json"
    monkeypatch.delenv("KILN_HOME")
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    places = {"linux": Path("/data/kiln"), "darwin": Path.home() / "Library/Application Support/Kiln", "win32": Path("/local/Kiln")}
    for system, place in places.items():
        monkeypatch.setattr(sys, "platform", system)
        assert connection.home() == place
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")  # the specification says to pass it over
    assert connection.home() == Path.home() / ".local/share/kiln"


def test_on_windows_the_user_alone_gets_rights(tmp_path):
    assert connection.acl_command(tmp_path / "f", r"PC\ann") == ["icacls", str(tmp_path / "f"), "/inheritance:r", "/grant:r", r"PC\ann:F"]
    assert connection.acl_command(tmp_path, "ann")[-1] == "ann:(OI)(CI)F"


def test_the_secret_key_is_not_the_public_one(made):
    assert made.client_secret != made.client_key
    assert replace(made, path=Path("x")) == made
