"""Artifacts are what their hash says or are not there; a full disk has its sentence; nothing that a job needs is ever collected."""

import hashlib
import os
import sqlite3
import subprocess
import sys
import time

import pytest

from backend import disk
from backend import store as store_module
from backend.store import Store, check_name
from protocol.errors import KilnError


def sha(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path / "store")
    yield opened
    opened.close()


def job(id="j1", inputs=(), results=(), **changes):
    return {
        "id": id, "request": id, "position": 1, "inputs": {f"{n}": h for n, h in enumerate(inputs)},
        "results": {f"{n}": {"hash": h, "size": 1} for n, h in enumerate(results)}, **changes,
    }  # fmt: skip


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_an_artifact_is_found_under_the_hash_of_its_bytes(store, tmp_path):
    (tmp_path / "file").write_bytes(b"from a file")
    for content, put in ((b"bytes", b"bytes"), (b"from a file", tmp_path / "file"), (b"", b"")):
        hash = store.put(put)
        assert hash == sha(content) and store.has(hash) and store.size(hash) == len(content) and store.path(hash).read_bytes() == content
    assert (tmp_path / "file").exists()


def test_a_taken_file_is_moved_and_a_second_copy_costs_nothing(store):
    for _ in range(2):
        (store.temporary / "result").write_bytes(b"result")
        assert store.put(store.temporary / "result", take=True) == sha(b"result")
        assert files(store.temporary) == []
    assert len(files(store.artifacts)) == 1


@pytest.mark.parametrize(
    "hash", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 65, "/" + "a" * 63, None, 5, b"a" * 64, "a" * 64 + "\n"]
)
def test_what_is_not_a_hash_never_becomes_a_path(store, hash):
    for call in (store.has, store.path, store.size, lambda h: store.upload(h, 1)):
        with pytest.raises(KilnError) as caught:
            call(hash)
        assert caught.value.code == "bad-hash"


@pytest.mark.parametrize("damage", [b"longer than before", b"bytez"])
def test_what_is_put_again_replaces_a_damaged_artifact(store, damage):
    hash = store.put(b"bytes")
    file = store.temporary / "made"
    for put, take in ((b"bytes", False), (file, True)):
        file.write_bytes(b"bytes")
        store.path(hash).write_bytes(damage)
        assert store.put(put, take=take) == hash and store.path(hash).read_bytes() == b"bytes"


def test_a_log_that_grew_large_starts_anew_and_one_old_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "LOG_BYTES", 100)
    path, other = tmp_path / "server.log", tmp_path / "other.log"
    with open(path, "ab", buffering=0) as log, open(other, "ab", buffering=0) as elsewhere:
        for start in (b"first ", b"second "):
            log.write(start + b"x" * 100)
            disk.limit_log(log.fileno(), path)
        log.write(b"new\n")
        elsewhere.write(b"y" * 200)
        disk.limit_log(elsewhere.fileno(), path)
        disk.limit_log(log.fileno(), path)
    assert path.read_bytes() == b"new\n" and (tmp_path / "server.log.1").read_bytes() == b"second " + b"x" * 100
    assert len(other.read_bytes()) == 200 and len(list(tmp_path.iterdir())) == 3


def test_a_missing_artifact_has_its_error(store):
    assert not store.has("a" * 64)
    with pytest.raises(KilnError) as caught:
        store.path("a" * 64)
    assert caught.value.code == "no-artifact" and caught.value.hint


def test_an_upload_goes_on_where_it_stopped_even_in_another_backend(tmp_path):
    content = os.urandom(100_000)
    store = Store(tmp_path)
    upload = store.upload(sha(content), len(content))
    upload.write(content[:30_000])
    upload.abort()
    upload = store.upload(sha(content), len(content))
    assert upload.offset == 30_000
    upload.write(content[30_000:60_000])
    store.close()  # as after kill -9: the upload was never ended
    upload._file.close()
    store = Store(tmp_path)
    upload = store.upload(sha(content), len(content))
    assert upload.offset == 60_000
    upload.write(memoryview(content)[60_000:])
    assert upload.finish() == sha(content)
    assert store.path(sha(content)).read_bytes() == content and files(store.uploads) == []
    store.close()


def test_two_clients_may_send_one_file_at_once(store):
    content = b"x" * 5000
    one, two = store.upload(sha(content), 5000), store.upload(sha(content), 5000)
    one.write(content[:100])
    two.write(content)
    two.finish()
    one.write(content[100:])
    assert one.finish() == sha(content)
    assert store.path(sha(content)).read_bytes() == content and files(store.uploads) == []


@pytest.mark.parametrize("sent", [b"other content", b"content", b"content, and more", b""])
def test_an_upload_that_is_not_what_it_said_leaves_nothing(store, sent):
    said = b"content, all"
    upload = store.upload(sha(said), len(said))
    with pytest.raises(KilnError) as caught:
        upload.write(sent)
        upload.finish()
    assert caught.value.code == "bad-hash"
    assert not store.has(sha(said)) and files(store.uploads) == [] and store.upload(sha(said), len(said)).offset == 0


def test_a_damaged_part_is_noticed_and_the_next_try_starts_afresh(store):
    content = os.urandom(1000)
    upload = store.upload(sha(content), 1000)
    upload.write(content[:500])
    upload.abort()
    part = files(store.uploads)[0]
    part.write_bytes(b"\0" * 500)
    upload = store.upload(sha(content), 1000)
    upload.write(content[upload.offset :])
    with pytest.raises(KilnError):
        upload.finish()
    upload = store.upload(sha(content), 1000)
    assert upload.offset == 0
    upload.write(content)
    assert upload.finish() == sha(content)


def test_removing_a_job_removes_what_only_it_refers_to(store):
    own, shared, result = store.put(b"own"), store.put(b"shared"), store.put(b"result")
    preview = store.put(b"preview")
    with store.transaction():
        store.save_job(job("j1", [own, shared], [result]))
        store.save_job(job("j2", [shared]))
        store.add_event({"job": "j1", "number": 1, "kind": "preview"}, [preview])
    store.remove_job("j1")
    assert [store._path(hash).exists() for hash in (own, shared, result, preview)] == [False, True, False, False]
    assert store.events("j1") == [] and [found["id"] for found in store.load_jobs()] == ["j2"]


def test_an_artifact_that_a_client_just_asked_for_outlives_the_job_that_had_it(store):
    hash = store.put(b"input")
    with store.transaction():
        store.save_job(job("j1", [hash]))
    assert store.has(hash)  # a client: "no need to send it"
    store.remove_job("j1")
    assert store.has(hash)


def test_what_nobody_refers_to_goes_after_an_hour(tmp_path):
    store = Store(tmp_path)
    kept, fresh, old = store.put(b"kept"), store.put(b"fresh"), store.put(b"old")
    with store.transaction():
        store.save_job(job("j1", [kept]))
    part = store.uploads / f"{'a' * 64}.part"
    part.write_bytes(b"long ago")
    for path, age in ((store.path(old), 7200), (store.path(kept), 7200), (part, 8 * 86400)):
        os.utime(path, (time.time() - age, time.time() - age))
    store.close()
    store = Store(tmp_path)
    assert [store._path(hash).exists() for hash in (kept, fresh, old)] == [True, True, False] and not part.exists()
    store.close()


def test_an_earlier_backends_leftovers_are_cleared(tmp_path):
    store = Store(tmp_path)
    (store.temporary / "tmpx").write_bytes(b"half")
    (store.runs / "job" / "inputs").mkdir(parents=True)
    (store.runs / "job" / "inputs" / "a").write_bytes(b"a")
    store.close()
    store = Store(tmp_path)
    assert files(store.temporary) == [] and list(store.runs.iterdir()) == []
    store.close()


def test_a_transaction_happens_whole_or_not_at_all(store):
    with pytest.raises(RuntimeError), store.transaction():
        store.save_job(job("j1"))
        store.add_event({"job": "j1", "number": 1, "kind": "queued"})
        raise RuntimeError
    assert store.load_jobs() == [] and store.events("j1") == []


def test_events_are_replayed_after_a_number_and_thinned_to_the_newest(store):
    preview = [store.put(b"%d" % number) for number in range(4)]
    with store.transaction():
        store.add_event({"job": "j1", "number": 1, "kind": "queued"})
        for number in range(4):
            store.add_event({"job": "j1", "number": number + 2, "kind": "preview"}, [preview[number]])
    assert [event["number"] for event in store.events("j1", 3)] == [4, 5]
    store.thin_events("j1", "preview", 2)
    assert [event["number"] for event in store.events("j1")] == [1, 4, 5] and store.last_number("j1") == 5
    assert [store._path(hash).exists() for hash in preview] == [False, False, True, True]


HOLD = "import sys, time; from backend.store import Store; s = Store(sys.argv[1]); print('open', flush=True); time.sleep(60)"


def test_one_backend_at_a_time_and_a_killed_one_leaves_no_lock(tmp_path, monkeypatch):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert other.stdout.readline().strip() == b"open"
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: real(*a, **{**k, "timeout": 0.2}))
    with pytest.raises(KilnError) as caught:
        Store(tmp_path)
    assert caught.value.code == "store-in-use"
    other.kill()
    other.wait()
    Store(tmp_path).close()


def test_a_table_that_is_none_and_one_of_a_newer_kiln_are_named(tmp_path):
    (tmp_path / "kiln.sqlite").write_bytes(b"this is no database, whatever its name says" * 100)
    with pytest.raises(KilnError) as caught:
        Store(tmp_path)
    assert caught.value.code == "store-damaged"
    (tmp_path / "kiln.sqlite").unlink()
    Store(tmp_path).close()
    database = sqlite3.connect(tmp_path / "kiln.sqlite")
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(KilnError) as caught:
        Store(tmp_path)
    assert caught.value.code == "store-too-new"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a", "a/../b", "/a", "a//b", "a/", "a\\b", "C:a", "a\0b", "a\nb", "nul", "a/COM1.png", "a ", "a.", "x" * 241,
     "a/" * 9 + "a", 5, None],
)  # fmt: skip
def test_names_that_leave_their_folder_on_any_system_are_refused(name):
    with pytest.raises(KilnError) as caught:
        check_name(name)
    assert caught.value.code == "bad-input"


def test_ordinary_names_pass():
    for name in ("transforms.json", "views/color_000.png", "ansichten/größe 1.png", ".hidden", "a..b", "console.txt"):
        assert check_name(name) == name


def test_a_quota_is_a_full_disk(tmp_path):
    store = Store(tmp_path, quota=10_000)
    store.put(b"a" * 6000)
    for call in (lambda: store.put(b"b" * 6000), lambda: store.upload(sha(b""), 6000)):
        with pytest.raises(KilnError, match="limit is 10.0 kB") as caught:
            call()
        assert caught.value.code == "no-space" and caught.value.hint
    store.close()


def test_a_full_disk_is_named_with_what_is_needed_and_free_and_leaves_no_halves(small_disk):
    store = Store(small_disk / "store")
    with pytest.raises(KilnError, match=r"has no room for 50\.0 MB more: [0-9.]+ MB are free") as caught:
        store.upload(sha(b""), 50_000_000)
    assert caught.value.code == "no-space" and "KILN_HOME" in caught.value.hint
    content = os.urandom(10_000_000)
    upload = store.upload(sha(content), len(content))  # it fits now; then something else fills the disk
    (small_disk / "other").write_bytes(b"x" * 14_000_000)
    with pytest.raises(KilnError) as caught:
        upload.write(content)
    assert caught.value.code == "no-space" and files(store.uploads) == []
    (small_disk / "other").unlink()
    upload = store.upload(sha(content), len(content))
    upload.write(content)
    assert upload.finish() == sha(content)
    store.close()


def test_the_job_table_still_takes_the_news_that_the_disk_is_full(small_disk):
    store = Store(small_disk)
    with store.transaction():
        store.save_job(job("j1"))
    filler = open(small_disk / "other", "wb", buffering=0)
    try:
        while True:
            filler.write(b"x" * 4096)
    except OSError:
        pass
    refused = written = 0
    for number in range(300):
        try:
            with store.transaction(durable=True):
                store.add_event({"job": "j1", "number": number, "kind": "failed", "text": "x" * 1000})
            written += 1
        except KilnError as error:
            assert error.code == "no-space"
            refused += 1
    filler.close()
    assert written >= 290 and len(store.events("j1", -1)) == written
    assert refused <= 10
    store.close()
    os.unlink(small_disk / "other")
    again = Store(small_disk)
    assert len(again.events("j1", -1)) == written and (small_disk / "ballast").exists()
    again.close()


def test_opening_the_store_needs_no_heavy_library():
    code = "import sys, backend.store, backend.jobs; print([n for n in ('torch', 'numba', 'numpy', 'scipy', 'PIL') if n in sys.modules])"
    environment = {key: value for key, value in os.environ.items() if key != "KILN_PIPELINES"}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=environment).strip() == "[]"


def test_the_store_is_its_owners_alone(store):
    if os.name == "posix":
        assert store.root.stat().st_mode & 0o077 == 0
    assert store_module.RESERVE > store_module.BALLAST
