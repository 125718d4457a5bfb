"""No job is lost and none runs twice, whatever is killed, fills or hangs: with real workers and a recipe that goes wrong on demand."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from backend import jobs as jobs_module
from backend.jobs import Jobs
from backend.store import Store
from backend.worker import cores
from protocol.errors import KilnError
from tests.backend import steps_recipe  # enters the recipe `steps`, here and (by KILN_PIPELINES) in the workers
from tests.backend.ball import write_ball

ROOT = Path(__file__).parents[2]
INPUT = {"in/text.txt": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"}  # "hello"


class Backend:
    """Store and jobs without a socket, and what the listener heard."""

    def __init__(self, root, **options):
        self.marks = Path(os.environ["KILN_TEST_MARKS"])
        self.store = Store(root / "store", quota=options.pop("quota", None))
        self.heard = []
        self.jobs = Jobs(self.store, self.heard.append, **options)
        self.store.put(b"hello")

    def submit(self, request="r1", **values):
        return self.jobs.submit(request, "steps", values, INPUT, "a title", {"object": "Cube"})["id"]

    def wait(self, id, *states, seconds=60):
        states = states or ("done", "failed", "cancelled")
        deadline = time.monotonic() + seconds
        while (job := self.jobs.get(id))["state"] not in states:
            assert time.monotonic() < deadline, f"still {job['state']} in {job['stage']!r}: {self.log()}"
            time.sleep(0.01)
        return job

    def wait_for_stage(self, id, stage, seconds=60):
        deadline = time.monotonic() + seconds
        while (job := self.jobs.get(id))["stage"] != stage or job["fraction"] == 0:
            assert time.monotonic() < deadline, f"{job['state']} in {job['stage']!r} instead of {stage!r}: {self.log()}"
            time.sleep(0.01)

    def log(self):
        return (self.store.logs / "worker.log").read_text()[-3000:]

    @property
    def worker(self):
        return self.jobs._slots[0].process.pid

    def result(self, id, name):
        return self.store.path(self.jobs.get(id)["results"][name]["hash"]).read_text()

    def scaled(self):
        return self.marks.read_text().count("scale")

    def close(self):
        self.jobs.close()
        self.store.close()


@pytest.fixture
def begin(tmp_path, monkeypatch):
    monkeypatch.setenv("KILN_PIPELINES", "tests.backend.steps_recipe")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("KILN_TEST_MARKS", str(tmp_path / "marks"))
    opened = []

    def begin(started=True, **options):
        backend = Backend(options.pop("root", tmp_path), **options)
        opened.append(backend)
        if started:
            backend.jobs.start()
        return backend

    yield begin
    for backend in opened:
        backend.close()


def undisturbed(**values):
    numbers = steps_recipe.draw(b"hello", values.get("size", 1000), values.get("seed", 0), 0)
    return f"{float((numbers * values.get('factor', 2.0)).sum())!r}\n"


def assert_well_told(backend, id):
    """Numbers without gaps, the listener heard exactly what is stored, one end."""
    events = backend.jobs.events(id)
    assert [event["number"] for event in events] == list(range(1, len(events) + 1))
    deadline = time.monotonic() + 5
    while [event for event in backend.heard if event["job"] == id] != events:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kinds = [event["kind"] for event in events]
    assert kinds[0] == "queued" and kinds[-1] in ("done", "failed", "cancelled")
    return kinds


def assert_clean(backend):
    """Nothing of the job's run lies about."""
    deadline = time.monotonic() + 5
    while list(backend.store.runs.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list(backend.store.runs.iterdir()) == [] and list(backend.store.temporary.iterdir()) == []


def test_a_job_runs_to_done_and_tells_of_every_step(begin):
    backend = begin()
    id = backend.submit(seconds=0.6)
    job = backend.wait(id)
    assert job["state"] == "done" and job["error"] is None and job["attempts"] == 1 and job["fraction"] == 1.0
    assert job["title"] == "a title" and job["source"] == {"object": "Cube"} and job["parameters"]["seconds"] == 0.6
    assert set(job["results"]) == {"sum.txt", "more/stages.txt"} and backend.result(id, "sum.txt") == undisturbed()
    kinds = assert_well_told(backend, id)
    assert kinds.count("done") == kinds.count("started") == 1 and kinds.count("stage") == 5
    events = backend.jobs.events(id)
    assert [event["stage"] for event in events if event["kind"] == "stage"] == ["Read inputs", "Draw", "Scale", "Add", "Save"]
    assert len([event for event in events if event["kind"] == "progress"]) <= 5 + 3 * 0.6 * 10 + 3
    shown = [event for event in events if event["kind"] == "preview"]
    assert 2 <= len(shown) <= 5
    picture = backend.store.path(shown[-1]["artifact"]).read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and max(picture[16:20], picture[20:24]) == (512).to_bytes(4, "big")
    assert backend.jobs.events(id, after=len(events) - 2) == events[-2:]
    assert_clean(backend)


def test_the_same_request_twice_is_one_job_also_after_a_restart(begin):
    backend = begin(started=False)
    id = backend.submit()
    assert backend.submit() == id and len(backend.jobs.list()) == 1
    backend.close()
    again = begin()
    assert again.submit() == id
    assert again.wait(id)["state"] == "done"
    assert again.submit() == id and len(again.jobs.list()) == 1 and again.scaled() == 1


def test_jobs_run_in_the_order_in_which_they_came(begin):
    backend = begin()
    ids = [backend.submit(f"r{number}", seed=number) for number in range(5)]
    for id in ids:
        backend.wait(id)
    assert sorted(ids, key=lambda id: backend.jobs.get(id)["started"]) == ids
    assert backend.jobs.idle() and [job["id"] for job in backend.jobs.list()] == ids


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
@pytest.mark.parametrize("stage", ["Draw", "Scale", "Add"])
def test_after_a_killed_worker_the_job_goes_on_from_its_last_finished_stage(begin, stage):
    backend = begin()
    id = backend.submit(seconds=0.4)
    backend.wait_for_stage(id, stage)
    os.kill(backend.worker, signal.SIGKILL)
    job = backend.wait(id)
    assert job["state"] == "done" and job["attempts"] == 2 and backend.result(id, "sum.txt") == undisturbed()
    kinds = assert_well_told(backend, id)
    assert kinds.count("done") == 1 and kinds.count("queued") == 2
    finished = ["Draw", "Scale", "Add"][: ["Draw", "Scale", "Add"].index(stage)]
    assert backend.result(id, "more/stages.txt") == ",".join(finished)
    assert_clean(backend)


SERVER = """
import sys, time, tests.backend.steps_recipe
from backend.jobs import Jobs
from backend.store import Store
store = Store(sys.argv[1])
jobs = Jobs(store)
jobs.start()
store.put(b"hello")
id = jobs.submit("r1", "steps", {"seconds": 0.5}, {"in/text.txt": sys.argv[2]})["id"]
waiting = jobs.submit("r2", "steps", {"seed": 1}, {"in/text.txt": sys.argv[2]})["id"]
while jobs.get(id)["stage"] != "Scale":
    time.sleep(0.01)
print(id, waiting, jobs._slots[0].process.pid, flush=True)
time.sleep(60)
"""


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" if Path("/proc/self/stat").exists() else True


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
def test_after_a_killed_server_its_jobs_go_on_with_the_next_and_no_worker_stays(begin, tmp_path):  # begin: its environment
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path / "store"), INPUT["in/text.txt"]], stdout=subprocess.PIPE, text=True
    )
    id, waiting, worker = server.stdout.readline().split()
    server.kill()
    server.wait()
    deadline = time.monotonic() + 5
    while alive(int(worker)):
        assert time.monotonic() < deadline, "the worker outlives its server"
        time.sleep(0.02)
    backend = begin()
    assert [job["id"] for job in backend.jobs.list()] == [id, waiting]
    job = backend.wait(id)
    assert job["state"] == "done" and job["attempts"] == 2 and backend.result(id, "sum.txt") == undisturbed()
    assert backend.result(id, "more/stages.txt") == "Draw"
    assert [event["kind"] for event in backend.jobs.events(id)].count("done") == 1
    assert backend.wait(waiting)["state"] == "done" and backend.result(waiting, "sum.txt") == undisturbed(seed=1)
    assert_clean(backend)


def test_a_closed_backend_resumes_what_ran(begin):
    backend = begin()
    id = backend.submit(seconds=0.3)
    backend.wait_for_stage(id, "Scale")
    worker = backend.worker
    backend.close()
    assert not alive(worker)
    again = begin()
    assert again.wait(id)["state"] == "done" and again.result(id, "more/stages.txt") == "Draw"


def test_cancel_stops_a_step_at_its_next_report_and_keeps_the_worker(begin):
    backend = begin()
    id = backend.submit(seconds=30)
    backend.wait_for_stage(id, "Draw")
    worker, asked = backend.worker, time.monotonic()
    assert backend.jobs.cancel(id)["state"] == "cancelling"
    assert time.monotonic() - asked < 0.1
    job = backend.wait(id, seconds=2)
    assert job["state"] == "cancelled" and job["error"] is None and backend.worker == worker
    assert_well_told(backend, id)
    assert backend.wait(backend.submit("r2"))["state"] == "done" and backend.worker == worker
    assert_clean(backend)


def test_cancel_frees_the_worker_within_two_seconds_of_a_step_that_never_yields(begin):
    backend = begin()
    id, next_id = backend.submit(fault="stuck"), backend.submit("r2")
    while backend.jobs.get(id)["stage"] != "Scale":
        time.sleep(0.01)
    worker, asked = backend.worker, time.monotonic()
    backend.jobs.cancel(id)
    assert backend.jobs.cancel(id)["state"] == "cancelling"  # twice is once
    backend.wait(id, "cancelled", seconds=2.0)
    assert not alive(worker) and time.monotonic() - asked < 2.0
    assert backend.wait(next_id)["state"] == "done"
    assert_well_told(backend, id)
    assert_clean(backend)


def test_a_waiting_job_is_cancelled_at_once_and_an_ended_one_stays_as_it_is(begin):
    backend = begin(started=False)
    id = backend.submit()
    assert backend.jobs.cancel(id)["state"] == "cancelled" and backend.jobs.idle()
    backend.jobs.start()
    done = backend.submit("r2")
    backend.wait(done)
    assert backend.jobs.cancel(done)["state"] == "done" and backend.jobs.get(id)["attempts"] == 0


def test_a_backend_that_dies_while_it_cancels_does_not_run_the_job_again(begin):
    backend = begin()
    id = backend.submit(fault="stuck")
    while backend.jobs.get(id)["stage"] != "Scale":
        time.sleep(0.01)
    backend.jobs.cancel(id)
    backend.close()
    again = begin()
    assert again.jobs.get(id)["state"] == "cancelled" and again.scaled() == 1


def test_a_worker_that_dies_each_time_fails_the_job_after_three_attempts(begin):
    backend = begin()
    id, next_id = backend.submit(fault="exit"), backend.submit("r2", seed=1)
    job = backend.wait(id)
    assert job["state"] == "failed" and job["attempts"] == 3 and backend.scaled() >= 3
    assert job["error"]["code"] == "worker-died" and "code 3" in job["error"]["message"] and "'Scale'" in job["error"]["message"]
    assert "worker.log" in job["error"]["hint"]
    assert_well_told(backend, id)
    assert backend.wait(next_id)["state"] == "done"


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
def test_a_worker_that_the_system_kills_each_time_most_likely_lacks_memory(begin):
    backend = begin()
    error = backend.wait(backend.submit(fault="kill"))["error"]
    assert error["code"] == "out-of-memory" and "signal 9" in error["message"] and "size (now 1000, draft 10)" in error["hint"]


@pytest.mark.parametrize(
    ("fault", "code", "message", "hint"),
    [
        ("memory", "out-of-memory", "'Scale': Unable to allocate 90 TiB", "size (now 1000, draft 10)"),
        ("exception", "internal", "ZeroDivisionError in 'Scale': of all things", "log"),
        ("refuse", "bad-input", "These numbers are no good.", "Give better ones."),
        ("full", "no-space", "has no room", "KILN_HOME"),
    ],
)
def test_an_error_in_a_step_fails_the_job_with_what_to_do_and_the_worker_goes_on(begin, fault, code, message, hint):
    backend = begin()
    id = backend.submit(fault=fault)
    job = backend.wait(id)
    assert job["state"] == "failed" and job["attempts"] == 1 and job["error"]["code"] == code
    assert message in job["error"]["message"] and hint in job["error"]["hint"]
    events = backend.jobs.events(id)
    assert events[-1]["kind"] == "failed" and events[-1]["error"] == job["error"]
    assert ("ZeroDivisionError" in str([e["text"] for e in events if e["kind"] == "log"])) == (fault == "exception")
    assert backend.wait(backend.submit("r2"))["state"] == "done"
    assert_clean(backend)


@pytest.mark.skipif(os.name != "posix", reason="stops by signal")
def test_a_worker_without_a_sign_of_life_is_replaced(begin):
    backend = begin(silence_seconds=2.5)
    id = backend.submit(seconds=0.3)
    backend.wait_for_stage(id, "Scale")
    worker = backend.worker
    os.kill(worker, signal.SIGSTOP)
    job = backend.wait(id)
    assert job["state"] == "done" and job["attempts"] == 2 and not alive(worker)
    assert "no sign of life" in str([event.get("text") for event in backend.jobs.events(id)])


def test_retry_runs_a_job_again_from_what_it_had_finished(begin):
    backend = begin()
    id = backend.submit(seconds=0.5)
    backend.wait_for_stage(id, "Scale")
    backend.jobs.cancel(id)
    backend.wait(id, "cancelled")
    assert backend.jobs.retry(id)["state"] in ("queued", "running")
    assert backend.jobs.retry(id)["state"] in ("queued", "running")  # twice is once
    job = backend.wait(id)
    assert job["state"] == "done" and backend.result(id, "more/stages.txt") == "Draw"
    assert assert_well_told(backend, id).count("done") == 1
    with pytest.raises(KilnError, match="is done"):
        backend.jobs.retry(id)


def test_a_changed_later_parameter_finds_the_earlier_stages(begin):
    backend = begin()
    backend.wait(backend.submit())
    id = backend.submit("r2", factor=3.0)
    backend.wait(id)
    assert backend.result(id, "more/stages.txt") == "Draw" and backend.result(id, "sum.txt") == undisturbed(factor=3.0)
    again = backend.submit("r3")
    backend.wait(again)
    assert backend.result(again, "more/stages.txt") == "Draw,Scale,Add" and backend.scaled() == 2


@pytest.mark.parametrize(
    "damage", [lambda path: os.truncate(path, 100), lambda path: path.write_bytes(os.urandom(9000))], ids=["truncated", "garbage"]
)
def test_damaged_stage_files_are_computed_again(begin, damage):
    backend = begin()
    backend.wait(backend.submit())
    for path in backend.store.stages.iterdir():
        damage(path)
    id = backend.submit("r2")
    assert backend.wait(id)["state"] == "done"
    assert backend.result(id, "more/stages.txt") == "" and backend.result(id, "sum.txt") == undisturbed() and backend.scaled() == 2


def test_a_damaged_input_is_named_and_sent_again(begin):
    backend = begin()
    path = backend.store.path(INPUT["in/text.txt"])
    path.write_bytes(b"hellO")
    id = backend.submit()
    job = backend.wait(id)
    assert job["error"]["code"] == "damaged-input" and "in/text.txt" in job["error"]["message"]
    assert not backend.store.has(INPUT["in/text.txt"])
    with pytest.raises(KilnError, match="gone"):
        backend.jobs.retry(id)
    backend.store.put(b"hello")
    backend.jobs.retry(id)
    assert backend.wait(id)["state"] == "done"


def test_remove_frees_what_the_job_had_and_spares_what_runs(begin):
    backend = begin()
    id = backend.submit(seconds=0.5)
    backend.wait_for_stage(id, "Draw")
    with pytest.raises(KilnError, match="running"):
        backend.jobs.remove(id)
    results = backend.wait(id)["results"]
    backend.jobs.remove(id)
    assert [path for path in backend.store.artifacts.rglob("*") if path.is_file()] == []
    for call in (backend.jobs.get, backend.jobs.events, backend.jobs.cancel, backend.jobs.retry, backend.jobs.remove):
        with pytest.raises(KilnError) as caught:
            call(id)
        assert caught.value.code == "no-job"
    assert results and backend.jobs.list() == []
    backend.store.put(b"hello")
    assert backend.submit() != id  # its request is forgotten with it


def test_results_that_do_not_fit_fail_the_job_with_a_sentence(begin):
    backend = begin()
    backend.store.quota = 1
    id = backend.submit()
    job = backend.wait(id)
    assert job["state"] == "failed" and job["error"]["code"] == "no-space" and "limit" in job["error"]["message"]
    backend.store.quota = None
    backend.jobs.retry(id)
    assert backend.wait(id)["state"] == "done" and backend.scaled() == 1


@pytest.mark.parametrize("held", [1.0, float("inf")])
def test_a_result_that_another_program_holds_is_tried_again_and_then_fails_the_job(begin, monkeypatch, held):
    monkeypatch.setattr(jobs_module, "TAKE_SECONDS", 3.0)
    backend = begin()
    put, seen = backend.store.put, []

    def refused(content, take=False, **options):
        if take:
            seen.append(time.monotonic())
            if seen[-1] < seen[0] + held:
                raise PermissionError(13, "Permission denied")
        return put(content, take=take, **options)

    with monkeypatch.context() as patched:
        patched.setattr(backend.store, "put", refused)
        id = backend.submit()
        job = backend.wait(id)
    if held < 2:
        assert job["state"] == "done" and backend.result(id, "sum.txt") == undisturbed() and seen[-1] - seen[0] >= held
    else:
        assert job["state"] == "failed" and job["error"]["code"] == "disk" and "more/stages.txt cannot be taken" in job["error"]["message"]
        assert 1 < len(seen) < 40 and seen[-1] - seen[0] >= 2
        backend.jobs.retry(id)
        assert backend.wait(id)["state"] == "done" and backend.scaled() == 1
    assert_clean(backend)


@pytest.mark.parametrize("crashed", [True, False])
def test_a_job_under_which_the_backend_dies_each_time_fails_and_one_that_was_put_down_does_not(tmp_path, crashed):
    for restart in range(jobs_module.MOST_RESTARTS + 2):
        store = Store(tmp_path / "store")
        jobs = Jobs(store)
        if restart == 0:
            store.put(b"hello")
            id = jobs.submit("r1", "steps", {}, INPUT)["id"]
        job = jobs._jobs[id]
        if job["state"] == "queued":
            jobs._record(job, "started", state="running", attempts=restart + 1)
            if not crashed:
                jobs._slots[0].job = job
                jobs._closing = True
                jobs._loop()
        store.close()
    if crashed:
        assert job["state"] == "failed" and job["attempts"] == 1 + jobs_module.MOST_RESTARTS
        assert job["error"]["code"] == "worker-died" and "ended 6 times" in job["error"]["message"]
    else:
        assert job["state"] == "running" and job["attempts"] == 2 + jobs_module.MOST_RESTARTS


@pytest.mark.parametrize(("limit", "most"), [("max 100000", None), ("50000 100000", 1), ("100000 100000", 1), ("999900000 100000", None)])
def test_a_containers_share_of_the_cores_is_what_counts(tmp_path, limit, most):
    (tmp_path / "cpu.max").write_text(limit + "\n")
    assert cores(tmp_path / "cpu.max") == (most or cores(tmp_path / "none"))


def test_a_disk_that_fills_in_the_middle_ends_the_job_with_a_sentence_and_a_retry_finishes_it(small_disk, begin):
    backend = begin(root=small_disk)
    id = backend.submit(seconds=1.0, size=100_000)
    backend.wait_for_stage(id, "Draw")
    stop = threading.Event()

    def fill():  # and go on filling: what is freed is gone at once
        with open(small_disk / "other", "wb", buffering=0) as other:
            while not stop.is_set():
                try:
                    other.write(b"x" * 4096)
                except OSError:
                    time.sleep(0.001)

    filler = threading.Thread(target=fill)
    filler.start()
    job = backend.wait(id)
    stop.set()
    filler.join()
    assert job["state"] == "failed" and job["error"]["code"] == "no-space" and "no room" in job["error"]["message"]
    (small_disk / "other").unlink()
    deadline = time.monotonic() + 10
    while backend.jobs.events(id)[-1]["kind"] != "failed":  # written as soon as it can be
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert_clean(backend)
    backend.jobs.retry(id)
    job = backend.wait(id)
    assert job["state"] == "done" and backend.result(id, "sum.txt") == undisturbed(size=100_000)


def test_a_worker_that_cannot_be_started_fails_the_job(begin, monkeypatch):
    backend = begin(started=False)
    monkeypatch.setattr(jobs_module.sys, "executable", "/nowhere/python")
    backend.jobs.start()
    job = backend.wait(backend.submit())
    assert job["error"]["code"] == "worker-died" and "/nowhere/python" in job["error"]["message"]


def test_a_backend_without_jobs_learns_its_device(begin):
    backend = begin()
    deadline = time.monotonic() + 60
    while backend.jobs.device()["kind"] == "unknown":
        assert time.monotonic() < deadline, backend.log()
        time.sleep(0.05)
    device = backend.jobs.device()
    assert device["kind"] in ("cpu", "cuda", "rocm", "mps") and device["name"] and 0 < device["free_memory"] <= device["memory"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"recipe": "none"}, "bad-recipe"),
        ({"recipe": ["steps"]}, "bad-request"),
        ({"values": {"size": 0}}, "bad-parameter"),
        ({"values": {"unknown": 0}}, "bad-parameter"),
        ({"values": None}, "bad-request"),
        ({"inputs": {"../in/text.txt": INPUT["in/text.txt"]}}, "bad-input"),
        ({"inputs": {"a": INPUT["in/text.txt"], "A": INPUT["in/text.txt"]}}, "bad-input"),
        ({"inputs": {"a": INPUT["in/text.txt"], "a/b": INPUT["in/text.txt"]}}, "bad-input"),
        ({"inputs": {"a": "b" * 64}}, "no-artifact"),
        ({"inputs": {"a": "../../b"}}, "bad-hash"),
        ({"inputs": [1]}, "bad-input"),
        ({"request_id": ""}, "bad-request"),
        ({"source": {"blob": b"bytes"}}, "bad-request"),
    ],
)
def test_a_bad_submission_is_refused_and_leaves_no_job(begin, change, code):
    backend = begin(started=False)
    with pytest.raises(KilnError) as caught:
        backend.jobs.submit(**{"request_id": "r", "recipe": "steps", "values": {}, "inputs": INPUT, **change})
    assert caught.value.code == code and caught.value.hint
    assert backend.jobs.list() == [] and backend.store.load_jobs() == []


def test_an_old_jobs_progress_is_thinned_and_its_story_kept(begin, monkeypatch):
    backend = begin()
    id = backend.submit(seconds=0.5)
    backend.wait(id)
    now = time.time()
    monkeypatch.setattr(jobs_module.time, "time", lambda: now + 7200)
    backend.jobs._forget_progress()
    kinds = [event["kind"] for event in backend.jobs.events(id)]
    assert kinds.count("progress") == kinds.count("preview") == 1 and kinds.count("stage") == 5 and kinds[-1] == "done"
    kept = {event["artifact"] for event in backend.jobs.events(id) if event["kind"] == "preview"}
    held = {path.name for path in backend.store.artifacts.rglob("*") if path.is_file()}
    assert held == kept | set(INPUT.values()) | {result["hash"] for result in backend.jobs.get(id)["results"].values()}


def test_a_thousand_waiting_jobs_are_listed_and_taken_in_a_blink_of_the_server(begin):
    backend = begin(started=False)
    for number in range(1000):
        backend.submit(f"r{number}", seed=number)
    assert len(json.dumps(backend.jobs.list())) > 0 and len(backend.jobs.list()) == 1000
    backend.close()
    again = begin(started=False)
    assert [job["parameters"]["seed"] for job in again.jobs.list()] == list(range(1000))


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
def test_reconstruct_killed_in_two_stages_gives_the_files_of_an_undisturbed_run(begin, tmp_path):
    (tmp_path / "views").mkdir()
    write_ball(tmp_path / "views")
    backend = begin()
    inputs = {path.name: backend.store.put(path) for path in (tmp_path / "views").iterdir()}
    values = {
        "fit.iterations": 100,
        "fit.splats": 2000,
        "fit.device": "cpu",
        "surface.grid": 64,
        "surface.faces": 2000,
        "texture.size": 128,
    }
    made = []
    for request, stages in (("disturbed", ["Fit splats", "Extract surface"]), ("undisturbed", [])):
        id = backend.jobs.submit(request, "reconstruct", values, inputs)["id"]
        for stage in stages:
            backend.wait_for_stage(id, stage)
            os.kill(backend.worker, signal.SIGKILL)
            while backend.jobs.get(id)["stage"] == stage and backend.jobs.get(id)["state"] == "running":
                time.sleep(0.01)
        job = backend.wait(id, seconds=120)
        assert job["state"] == "done" and job["attempts"] == len(stages) + 1, job["error"]
        made.append({name: job["results"][name]["hash"] for name in ("mesh.glb", "splats.ply")})
        for path in backend.store.stages.iterdir():
            path.unlink()
    assert made[0] == made[1]
