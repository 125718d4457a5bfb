"""Single steps of a batch, in this process: what it finds before it begins, what it hands out, and what it takes in."""

import contextlib
import errno
import json
import os

import pytest

from backend.batch import manifest, run
from backend.batch.engine import Event
from backend.batch.run import Batch, Options
from protocol.errors import KilnError


class Quiet:
    def show(self, fraction, text): ...

    def say(self, text): ...


@pytest.fixture
def found(tmp_path):
    """The items of a folder with two splat files."""
    props = tmp_path / "props"
    props.mkdir()
    for name in ("one", "two"):
        (props / f"{name}.spz").write_bytes(name.encode())
    return manifest.read(props, manifest.Overrides(), [])


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def begun(found, out, **more):
    batch = Batch(Options(out, "props", **more), Quiet())
    batch.take_up(found)
    return batch


def test_files_of_the_users_are_not_written_over(found, out):
    (out / "one").mkdir()
    (out / "one" / "mesh.glb").write_bytes(b"mine")
    one, two = begun(found, out).works
    assert one.state == "failed" and "holds files that are not Kiln's" in one.error.message and "Name another --out" in one.error.hint
    assert two.state == "waiting" and (out / "one" / "mesh.glb").read_bytes() == b"mine"


@pytest.mark.parametrize("content", ['{"total": 3}', "[1]", "a report"])
def test_a_report_of_somebody_elses_is_not_written_over(found, out, content):
    (out / "report.json").write_text(content)
    with pytest.raises(KilnError, match="report.json is not Kiln's") as refused:
        run.run(found, Options(out, "props"), lambda: pytest.fail("nothing is to be begun"), Quiet())
    assert refused.value.code == "bad-manifest" and (out / "report.json").read_text() == content


def test_a_report_of_kilns_is(found, out):
    (out / "report.json").write_text(json.dumps({"items": []}))
    assert len(begun(found, out).waiting) == 2


@pytest.mark.parametrize("runs, other", [((None,), (1, 3)), (((1, 3), (2, 3)), None), (((1, 3),), (1, 4)), (((1, 13),), (2, 3))])
def test_runs_that_would_share_items_do_not_run_at_once(out, monkeypatch, runs, other):
    monkeypatch.setattr(run, "LOCK_SECONDS", 0.1)
    with contextlib.ExitStack() as held:
        for shard in runs:
            held.enter_context(run._held(Options(out, "props", shard=shard)))
        with pytest.raises(KilnError, match=f"process {os.getpid()}") as refused, run._held(Options(out, "props", shard=other)):
            pass
        assert refused.value.code == "already-running"
    with run._held(Options(out, "props", shard=other)):
        pass


class Engine:
    """Takes jobs and notes what it was asked."""

    slots = 4

    def __init__(self):
        self.keys, self.forgotten, self.full = [], [], False

    def submit(self, key, recipe, values, inputs, title):
        self.keys.append(key)
        return key

    def poll(self, timeout):
        return [Event(key, "done") for key in self.keys]

    def fetch(self, id, folder):
        folder.mkdir(parents=True)
        (folder / "mesh.glb").write_bytes(b"1")
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")

    def forget(self, id):
        self.forgotten.append(id)

    def close(self): ...


def test_other_inputs_are_another_job_and_the_same_inputs_the_same(found, out, tmp_path):
    (tmp_path / "view.png").write_bytes(b"captured")
    keys = []
    for content in (b"captured", b"captured", b"captured anew"):
        (tmp_path / "view.png").write_bytes(content)
        batch = begun(found, out)
        batch.engine, work = Engine(), batch.works[0]
        work.inputs = {"view_0.png": tmp_path / "view.png"}
        batch.captured.append(work)
        batch.submit()
        keys += batch.engine.keys
    assert keys[0] == keys[1] != keys[2]


def test_a_disk_that_fills_while_results_come_leaves_them_with_the_engine(found, out):
    batch = begun(found[:1], out)
    batch.engine = Engine()
    batch.capture()
    batch.submit()
    batch.engine.full = True
    with pytest.raises(KilnError) as ended:
        batch.hear()
    assert ended.value.code == "no-space" and batch.engine.forgotten == []

    batch = begun(found[:1], out)  # the same command, once there is room
    batch.engine = Engine()
    batch.capture()
    batch.submit()
    batch.hear()
    assert batch.works[0].state == "done" and batch.engine.forgotten == batch.engine.keys


def test_a_disk_without_room_for_captures_holds_up_nothing_else(out, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SPARE_BYTES", 10**18)  # which no disk has
    for name in ("a.glb", "b.glb", "c.glb", "d.spz"):
        (tmp_path / "props" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "props" / name).write_bytes(name.encode())
    items = manifest.read(tmp_path / "props", manifest.Overrides(), [])
    kept = begun(items, out).works[2]
    kept.folder.inputs.mkdir(parents=True)
    (kept.folder.inputs / "view.png").write_bytes(b"1")
    kept.folder.keep_captured(kept.fingerprint, {"inputs": {"view.png": str(kept.folder.inputs / "view.png")}})

    batch = begun(items, out)
    batch.engine = Engine()
    batch.capture()
    assert [work.item.name for work in batch.captured] == ["c", "d"]
    assert [work.item.name for work in batch.waiting] == ["a", "b"]
    batch.submit()
    batch.capture()  # what is under way may free some room
    batch.hear()
    assert [work.state for work in batch.works] == ["waiting", "waiting", "done", "done"]
    with pytest.raises(KilnError, match="a capture wants") as ended:
        batch.capture()
    assert ended.value.code == "no-space"
