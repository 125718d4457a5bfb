"""What the run relies on of an engine, with the one that is Kiln's own backend."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from backend.batch import local
from backend.batch.engine import FINAL
from protocol import recipes
from protocol.client import Client
from protocol.connection import Connection
from protocol.errors import KilnError
from tests.backend.batch.bench import Bench


class Served:
    """A backend of its own, and engines on it."""

    def __init__(self, folder):
        self.bench, self.file = Bench(folder, folder / "home"), folder / "text.txt"
        self.file.write_bytes(b"hello")
        self.process = None

    def start(self):
        environment = {**self.bench.environment, "PYTHONPATH": os.environ.get("PYTHONPATH", "") or self.bench.environment["PYTHONPATH"]}
        self.process = subprocess.Popen([sys.executable, "-m", "backend.cli", "serve"], env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(KilnError), self.client() as client:
                client.hello()
                return
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def client(self):
        return Client(Connection.load(self.bench.home / "run" / "connection.json"))

    def submit(self, engine, key, **values):
        every = recipes.values(recipes.make("steps", {"size": 10, **values}))
        return engine.submit(key, "steps", every, {"in/text.txt": self.file}, "A name")

    def kill(self):
        self.process.send_signal(signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("served"))
    served.start()
    yield served
    served.kill()


@pytest.fixture
def engine(served):
    engine = local.Local(served.client)
    yield engine
    engine.close()


def end_of(engine, id):
    deadline = time.monotonic() + 60
    while True:
        for event in engine.poll(1.0):
            if event.id == id and event.kind in FINAL:
                return event
        assert time.monotonic() < deadline


def test_a_key_is_a_job_also_for_the_next_process(served, engine, tmp_path):
    id = served.submit(engine, "one")
    assert served.submit(engine, "one") == id and served.submit(engine, "two") != id
    assert end_of(engine, id).kind == "done"
    with contextlib.closing(local.Local(served.client)) as other:
        assert served.submit(other, "one") == id and end_of(other, id).kind == "done"  # its end is told once more
        other.fetch(id, tmp_path / "results")
        assert {path.name for path in (tmp_path / "results").rglob("*.txt")} == {"sum.txt", "stages.txt"}
        other.forget(id)
        other.forget(id)
        with pytest.raises(KilnError):
            other.fetch(id, tmp_path / "results")
    assert served.submit(engine, "one") != id


def test_what_failed_or_was_cancelled_runs_again(served, engine):
    id = served.submit(engine, "bad", fault="refuse")
    event = end_of(engine, id)
    assert event.kind == "failed" and event.error.code == "bad-input" and event.error.hint
    assert served.submit(engine, "bad", fault="refuse") == id and end_of(engine, id).kind == "failed"
    id = served.submit(engine, "slow", seconds=60.0)
    engine.cancel(id)
    assert served.submit(engine, "slow", seconds=60.0) == id  # while it is being cancelled, perhaps
    engine.cancel(id)
    assert end_of(engine, id).kind == "cancelled"
    engine.cancel(id)


def test_a_job_that_is_removed_has_failed(served, engine, monkeypatch):
    id = served.submit(engine, "gone", seconds=60.0)
    with served.client() as client:
        client.cancel(id)
        while client.job(id)["state"] != "cancelled":
            time.sleep(0.05)
        client.remove(id)
    engine._client.poll(0.5)  # the news of its end, which this engine shall not have heard
    monkeypatch.setattr(local, "LOOK_SECONDS", 0.0)
    event = end_of(engine, id)
    assert event.kind == "failed" and event.error.code == "no-job"


def test_a_backend_that_is_gone_for_good_ends_it_with_a_sentence(served, engine):
    id = served.submit(engine, "kept", seconds=0.2)
    served.kill()
    said = []
    engine._say = said.append
    with pytest.raises(KilnError) as gone:
        end_of(engine, id)
    assert gone.value.code == "unavailable" and "the same command goes on" in gone.value.hint
    assert gone.value.message.startswith("The backend is gone") and len(said) == 1
    served.start()
    with contextlib.closing(local.Local(served.client)) as other:
        assert served.submit(other, "kept", seconds=0.2) == id and end_of(other, id).kind == "done"
