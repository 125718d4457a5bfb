"""What goes from the store and what never does, and tables that an earlier Kiln wrote."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time

import pytest

from backend import housekeeping
from backend.housekeeping import Limits
from backend.jobs import Jobs
from backend.store import RESERVE, Store
from protocol.errors import KilnError
from tests.backend import steps_recipe  # enters the recipe `steps`
from tests.protocol.service import ROOT, Service

DAY = 86400.0
STATES = {"waits": "queued", "runs": "running", "untaken": "done", "taken": "done", "failed": "failed", "cancelled": "cancelled"}
STAYS = {"waits", "runs", "untaken"}


@pytest.fixture
def jobs(tmp_path):
    assert steps_recipe.Steps.NAME == "steps"
    made = Jobs(Store(tmp_path / "store"), workers=0)
    yield made
    made.store.close()


def fill(jobs: Jobs, age: float = 0.0) -> dict[str, str]:
    """A job of every kind, each with a file of 1000 bytes of its own; ids by what they are."""
    ids = {}
    for number, (name, state) in enumerate(STATES.items()):
        file = bytes([number]) * 1000
        id = ids[name] = jobs.submit(name, "steps", {}, {"in/text.txt": jobs.store.put(file)})["id"]
        ended = state in ("done", "failed", "cancelled")
        jobs._save(
            jobs._find(id),
            state=state,
            finished=time.time() - age + number if ended else None,
            taken=time.time() if name == "taken" else None,
        )
    jobs.store._wanted.clear()  # an hour later
    return ids


def left(jobs: Jobs, ids: dict[str, str]) -> set[str]:
    there = {job["id"] for job in jobs.list()}
    return {name for name, id in ids.items() if id in there}


def test_by_age_only_what_nobody_waits_for_goes(jobs):
    ids = fill(jobs, age=31 * DAY)
    told = housekeeping.clean(jobs, Limits(10**12, 30 * DAY), dry_run=True)
    assert left(jobs, ids) == set(ids) and told["freed"] == 3000
    assert housekeeping.clean(jobs, Limits(10**12, 30 * DAY)) == told
    assert left(jobs, ids) == STAYS
    for name in STAYS:
        (hash,) = jobs.get(ids[name])["inputs"].values()
        assert jobs.store.is_whole(hash)
    assert jobs.store.used() == 1000 * len(STAYS)


def test_nothing_goes_before_its_time(jobs):
    ids = fill(jobs, age=29 * DAY)
    assert housekeeping.clean(jobs, Limits(10**12, 30 * DAY)) == {"jobs": [], "stages": 0, "freed": 0}
    assert left(jobs, ids) == set(ids)


def test_over_the_limit_of_bytes_stages_go_first_then_the_oldest_and_never_what_is_waited_for(jobs):
    ids = fill(jobs)
    for name, used in (("old", 1000.0), ("new", 2000.0)):
        path = jobs.store.stages / name
        path.write_bytes(b"x" * 500)
        os.utime(path, (used, used))
    limits = Limits(6600, 30 * DAY)  # 7000 are there
    assert housekeeping.clean(jobs, limits)["stages"] == 1 and [path.name for path in jobs.store.stages.iterdir()] == ["new"]
    assert left(jobs, ids) == set(ids)
    housekeeping.clean(jobs, Limits(5100, 30 * DAY))
    assert not list(jobs.store.stages.iterdir()) and left(jobs, ids) == set(ids) - {"taken"}  # the first that ended
    housekeeping.clean(jobs, Limits(0, 30 * DAY))
    assert left(jobs, ids) == STAYS


def test_what_does_not_fit_makes_room_or_is_refused_with_what_to_do(jobs):
    ids = fill(jobs)
    jobs.store.quota = 6500
    jobs.store.make_room = lambda missing: housekeeping.make_room(jobs, Limits(6500, 30 * DAY), missing)
    jobs.store.put(b"n" * 1000)
    assert left(jobs, ids) == set(ids) - {"taken"}
    with pytest.raises(KilnError) as caught:
        jobs.store.put(b"m" * 3600)
    assert caught.value.code == "no-space" and "KILN_STORE_GB" in caught.value.hint
    assert left(jobs, ids) == STAYS


def test_a_disk_full_of_finished_stages_is_not_full(small_disk):
    jobs = Jobs(Store(small_disk / "store"), workers=0)
    jobs.store.make_room = lambda missing: housekeeping.make_room(jobs, Limits(10**12, 30 * DAY), missing)
    ids = fill(jobs)
    for number in range(40):
        if shutil.disk_usage(small_disk).free > RESERVE + 200_000:
            (jobs.store.stages / f"{number}").write_bytes(b"x" * 1_000_000)
    jobs.store.put(b"y" * 2_000_000)
    assert left(jobs, ids) == set(ids)
    jobs.store.close()


def test_a_job_can_be_taken_once_it_is_done_and_stays_taken(jobs):
    ids = fill(jobs)
    with pytest.raises(KilnError, match="queued"):
        jobs.take(ids["waits"])
    first = jobs.take(ids["untaken"])["taken"]
    assert first and jobs.take(ids["untaken"])["taken"] == first
    shown = housekeeping.show(jobs, Limits.of_environment())
    assert shown["untaken"] == {"jobs": [], "bytes": 0} and shown["unfinished"]["bytes"] == 2000 and shown["jobs"]["done"] == 2


def test_limits_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("KILN_STORE_GB", "2.5")
    monkeypatch.setenv("KILN_STORE_DAYS", "7")
    assert Limits.of_environment() == Limits(2_500_000_000, 7 * DAY)
    monkeypatch.setenv("KILN_STORE_GB", "0")
    monkeypatch.setenv("KILN_STORE_DAYS", "nonsense")
    assert Limits.of_environment().bytes > 10**15 and Limits.of_environment().seconds == 30 * DAY


def test_a_table_of_the_first_release_is_read(tmp_path):
    """The tables and a job as 0.1.0 wrote them, word for word."""
    (tmp_path / "store").mkdir()
    table = sqlite3.connect(tmp_path / "store" / "kiln.sqlite")
    table.execute("CREATE TABLE jobs (id TEXT PRIMARY KEY, request TEXT UNIQUE, position INTEGER NOT NULL, job TEXT NOT NULL)")
    table.execute(
        "CREATE TABLE events (job TEXT, number INTEGER, kind TEXT NOT NULL, event TEXT NOT NULL, PRIMARY KEY (job, number)) WITHOUT ROWID"
    )
    table.execute("CREATE TABLE refs (job TEXT, number INTEGER, hash TEXT, PRIMARY KEY (job, number, hash)) WITHOUT ROWID")
    table.execute("CREATE INDEX refs_by_hash ON refs (hash)")
    job = {
        "id": "0123456789ab", "recipe": "reconstruct", "parameters": {"seed": 0}, "title": "Cube", "source": {}, "state": "done",
        "stage": "Save",
        "fraction": 1.0, "text": "", "created": 1.0, "started": 2.0, "finished": 3.0, "attempts": 1, "error": None,
        "results": {"mesh.glb": {"hash": "a" * 64, "size": 5}}, "inputs": {"transforms.json": "b" * 64}, "request": "r", "position": 1,
        "deaths": 0, "restarts": 0,
    }  # fmt: skip
    table.execute("INSERT INTO jobs VALUES (?, ?, ?, ?)", (job["id"], "r", 1, json.dumps(job)))
    table.execute(
        "INSERT INTO events VALUES (?, ?, ?, ?)",
        (job["id"], 1, "done", json.dumps({"job": job["id"], "number": 1, "time": 3.0, "kind": "done"})),
    )
    table.execute("PRAGMA user_version = 1")
    table.commit()
    table.close()
    jobs = Jobs(Store(tmp_path / "store"), workers=0)
    (found,) = jobs.list()
    assert found["title"] == "Cube" and found["taken"] is None and found["results"] == job["results"]
    assert housekeeping.clean(jobs, Limits(0, 0.0))["jobs"] == []  # it may never have been imported
    jobs.take(found["id"])
    jobs.store.close()
    again = Jobs(Store(tmp_path / "store"), workers=0)
    assert again.list()[0]["taken"] and again.events(found["id"])[0]["kind"] == "done"
    again.store.close()


def test_kiln_store_shows_and_cleans(tmp_path):
    service = Service(tmp_path / "home").start()

    def kiln(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "KILN_HOME": str(service.home)}
        command = [sys.executable, "-m", "backend.cli", "store", *words]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    try:
        with service.client() as client:
            gone = client.submit("mesh_splats", {}, {"splats.ply": b"x" * 50_000})["id"]
            stays = client.submit("mesh_splats", {}, {"splats.ply": b"y" * 50_000})["id"]
            client.cancel(gone)
            assert "1 cancelled, 1 queued" in kiln("show") and "1 jobs that wait or run" in kiln("show")
            assert json.loads(kiln("clean", "--days", "0", "--dry-run", "--json"))["jobs"] == [gone]
            assert kiln("clean", "--days", "0").startswith("1 jobs and 0 finished stages went")
            assert [job["id"] for job in client.jobs()] == [stays]
    finally:
        service.stop()
