"""`kiln batch` as a person meets it: real processes and a real backend, killed, cancelled, filled up, and begun again."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from backend import worker


def is_alive(pid):
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        with contextlib.suppress(OSError):  # Linux: one that nobody has waited for yet is dead
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return True
    return False


def test_good_items_are_made_bad_ones_named_and_nothing_is_done_twice(bench):
    bench.items(("a", {}), ("b", {"size": 20}), ("bad", {"fault": "refuse"}), ("worse", {"size": -1}), ("c", {}))
    said = bench.batch(code=1)
    assert bench.states() == {"a": "done", "b": "done", "bad": "failed", "worse": "failed", "c": "done"}
    assert bench.is_right("a") and bench.is_right("b", size=20) and bench.is_right("c")
    found = {item["name"]: item for item in bench.report()["items"]}
    assert found["bad"]["attempts"] == 2 and found["bad"]["error"]["code"] == "bad-input" and found["worse"]["attempts"] == 0
    assert "These numbers are no good. Give better ones." in said and "list.toml, line 13: size cannot be -1. Allowed:" in said
    record = json.loads((bench.out / "b" / "item.json").read_text())
    assert record["parameters"]["size"] == 20 and set(record["files"]) == {"sum.txt", "more/stages.txt"}
    assert bench.computed() == 5  # three, and the bad one twice
    assert [job["title"] for job in bench.jobs()] == ["bad"]  # of what is fetched the backend keeps nothing

    page = (bench.out / "index.html").read_text(encoding="utf-8")
    assert "These numbers are no good." in page and "<b>3</b>done" in page and "<b>2</b>failed" in page

    bench.batch(code=1)
    assert bench.computed() == 5 and bench.states()["bad"] == "failed"
    assert all(item["earlier"] for item in bench.report()["items"] if item["state"] == "done")

    bench.batch("--retry-failed", code=1)
    assert bench.computed() == 7
    bench.items(("a", {}), ("b", {"size": 30}), ("c", {}))  # one changed, the bad ones mended away
    (bench.out / "c" / "sum.txt").unlink()
    bench.batch()
    assert bench.is_right("b", size=30) and bench.is_right("c") and bench.computed() == 8  # c's stages are kept: it was fetched anew


def test_a_batch_that_is_killed_goes_on_where_it_was(bench):
    bench.items(*((name, {"seconds": 0.4}) for name in "abcd"))
    process = bench.begin()
    bench.until(lambda: bench.states()["a"] == "done", "the first is done")
    before = (bench.out / "a" / "item.json").read_bytes()
    process.kill()
    process.communicate()
    bench.batch()
    assert set(bench.states().values()) == {"done"} and all(bench.is_right(name) for name in "abcd")
    assert bench.computed() == 4 and (bench.out / "a" / "item.json").read_bytes() == before
    assert not [path for path in (bench.out / ".work").iterdir() if path.is_dir()]


@pytest.mark.skipif(sys.platform == "win32", reason="finds the backend's worker by /proc or ps")
def test_all_killed_at_once_costs_the_running_stages_alone(bench):
    bench.items(*((name, {"seconds": 0.4}) for name in "abc"))
    process = bench.begin()
    bench.until(lambda: bench.states()["a"] == "done" and bench.states()["b"] == "computing", "the second is under way")
    backend = bench.backend()
    workers = subprocess.run(["pgrep", "-P", str(backend)], capture_output=True, text=True).stdout.split()
    for pid in (process.pid, backend, *map(int, workers)):
        with contextlib.suppress(ProcessLookupError):  # a worker ends with its backend
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    bench.batch()
    assert set(bench.states().values()) == {"done"} and all(bench.is_right(name) for name in "abc")
    assert 3 <= bench.computed() <= 4
    assert not any(is_alive(int(pid)) for pid in (backend, *workers))


@pytest.mark.skipif(sys.platform == "win32", reason="kills as POSIX does")
def test_a_backend_that_dies_is_followed_by_another(bench):
    bench.items(*((name, {"seconds": 0.4}) for name in "abc"))
    process = bench.begin()
    bench.until(lambda: bench.states()["a"] == "done", "the first is done")
    os.kill(bench.backend(), signal.SIGKILL)
    assert "The backend is gone" in bench.end(process)
    assert set(bench.states().values()) == {"done"} and all(bench.is_right(name) for name in "abc")
    assert [item["attempts"] for item in bench.report()["items"]] == [1, 1, 1]  # a lost backend is no item's failure


def test_cancelled_by_a_file_or_by_ctrl_c_it_goes_on_later(bench):
    bench.items(("a", {"seconds": 0.2}), ("b", {"seconds": 2.5}), ("c", {"seconds": 2.5}))  # time to be cancelled in, on a busy machine too
    process = bench.begin()
    bench.until(lambda: bench.states()["b"] == "computing", "the second is under way")
    (bench.out / "cancel").touch()
    assert "the same command goes on" in bench.end(process, 130)
    assert bench.report()["state"] == "cancelled" and bench.states()["a"] == "done" and bench.states()["c"] == "cancelled"

    if sys.platform != "win32":
        process = bench.begin()
        bench.until(lambda: "computing" in bench.states().values(), "another is under way")
        process.send_signal(signal.SIGINT)
        bench.end(process, 130)
        assert bench.states()["a"] == "done" and "cancelled" in bench.states().values() and "computing" not in bench.states().values()
    assert not any(job["state"] in ("queued", "running") for job in bench.jobs())

    bench.batch()
    assert set(bench.states().values()) == {"done"} and not (bench.out / "cancel").exists()
    assert bench.computed() <= 5  # at most the stage that ran when it was cancelled is done again


def test_one_batch_to_a_folder(bench):
    bench.items(("a", {"seconds": 60}))
    process = bench.begin()
    bench.until(lambda: bench.states()["a"] == "computing", "it is under way")
    assert f"Another batch (process {process.pid}) writes to" in bench.batch(code=4)
    (bench.out / "cancel").touch()
    bench.end(process, 130)


def test_a_job_that_somebody_cancels_or_removes(bench):
    bench.items(("a", {"seconds": 60}), ("b", {}))
    process = bench.begin()
    bench.until(lambda: bench.states()["a"] == "computing", "the first is under way")
    job = next(job["id"] for job in bench.jobs() if job["title"] == "a")
    bench.kiln("jobs", "cancel", job)
    assert "1 done, 1 cancelled" in bench.end(process, 1)
    process = bench.begin()  # it goes on with the same job
    bench.until(lambda: bench.states()["a"] == "computing", "it is under way again")
    bench.kiln("jobs", "cancel", job)
    bench.end(process, 1)
    bench.kiln("jobs", "remove", job)
    bench.items(("a", {}), ("b", {}))
    bench.batch()
    assert bench.is_right("a") and bench.is_right("b")


def test_only_some_items_and_a_look_before(bench):
    bench.items(("chair", {}), ("lamp", {}), ("bad", {"size": -1}))
    said = bench.batch("--dry-run", code=1)
    assert "2 of 3 items to make" in said and "size cannot be -1" in said and not bench.out.exists()
    bench.batch("--only", "CH*", code=1)
    assert bench.states() == {"chair": "done", "lamp": "waiting", "bad": "failed"}
    assert "chair                            is finished" in bench.batch("--dry-run", code=1)
    assert "No item is called table" in bench.batch("--only", "table", code=2) and bench.report()["state"] == "done"
    assert json.loads(bench.batch("--json", code=1).partition("\nBatch")[0].rpartition("}")[0] + "}")["state"] == "done"


def test_workers_run_side_by_side_and_share_the_cores(bench):
    for name in ("a", "b"):
        (bench.folder / name).mkdir()
        (bench.folder / name / "x.txt").write_text(name)
    (bench.folder / "list.toml").write_text('[defaults]\nrecipe = "cores"\n[[items]]\nfile = "a"\n[[items]]\nfile = "b"\n')
    for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS"):
        bench.environment.pop(name, None)
    with contextlib.suppress(AssertionError):  # none may run
        bench.kiln("stop")
    bench.batch("--workers", 2)
    (begun, ended, *threads), (begun2, ended2, *threads2) = ((bench.out / name / "threads.txt").read_text().split() for name in ("a", "b"))
    assert max(float(begun), float(begun2)) < min(float(ended), float(ended2))
    assert threads == threads2 == [str(max(1, worker.cores() // 2))] * 2
    (bench.out / "a" / "threads.txt").unlink()
    assert "A backend runs already, with --workers 2" in bench.batch("--workers", 1)
    bench.kiln("stop")


def test_a_full_disk_ends_it_with_a_sentence_and_costs_nothing(bench, small_disk):
    bench.items(("a", {}), ("b", {}))
    bench.out = small_disk / "out"
    bench.out.mkdir()
    (bench.folder / "out").symlink_to(bench.out)
    bench.batch("--only", "a")
    with open(small_disk / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert "Free some space; the same command goes on" in bench.batch(code=1)
    assert bench.is_right("a") and bench.states() == {"a": "done", "b": "waiting"}
    (small_disk / "ballast").unlink()
    bench.batch()
    assert bench.is_right("b") and bench.computed() == 2
