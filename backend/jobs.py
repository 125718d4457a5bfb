"""The job table: states, the queue, and the worker processes that empty it.

States: queued -> running -> done | failed | cancelled, with cancelling between running and cancelled. A job that a client was told of is
on disk. When a worker ends in the middle (crash, kill, 60 s without a sign of life), its job goes back to the queue and resumes from its
last finished stage, at most three times. When the server ends, its jobs resume with the next one; one under which it crashes again and
again fails.

Event numbers of a job rise by one. Events that change the state are kept as long as the job; of progress and log only the newest thousand,
of previews the newest twenty, and an hour after the job's end just the last of each, so a replay can have gaps there.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import queue
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backend import disk
from backend.store import Store, check_hash, check_name
from backend.worker import cores, out_of_memory, read_frame, write_frame
from protocol import recipes
from protocol.errors import KilnError

MOST_ATTEMPTS = 3
MOST_RESTARTS = 5  # of the backend in the middle of one job, other than by a request: more, and the job itself is what ends it
MOST_QUEUED = 10_000
MOST_INPUTS = 5_600
CANCEL_SECONDS = 1.5  # from cancel to killing a worker whose step does not yield
SILENCE_SECONDS = 60.0  # without a sign of life until a worker counts as hung
TAKE_SECONDS = 5.0  # that another program, such as a virus scanner, may hold a result
STARTING = 3  # times as long while it may still load libraries
KEPT = {"progress": 1000, "log": 1000, "preview": 20}  # newest events of a job that stay for a replay
STAGE_BYTES = int(float(os.environ.get("KILN_STAGES_GB", "20")) * 1e9)  # finished stages kept on disk

ENDED = ("done", "failed", "cancelled")
_WIRE = (
    "id", "recipe", "parameters", "title", "source", "state", "stage", "fraction", "text", "created", "started", "finished", "attempts",
    "error", "results", "inputs", "taken",
)  # fmt: skip


log = logging.getLogger("kiln")


class Jobs:
    """`listener(event)` is called for every stored event, in order, from this object's own thread. `workers`: jobs at once, each in a
    process of its own."""

    def __init__(
        self,
        store: Store,
        listener: Callable[[dict[str, Any]], None] = lambda event: None,
        workers: int = 1,
        cancel_seconds: float = CANCEL_SECONDS,
        silence_seconds: float = SILENCE_SECONDS,
    ):
        self.store, self.workers, self._listener = store, workers, listener
        self._cancel_seconds, self._silence_seconds = cancel_seconds, silence_seconds
        self._lock = store.lock
        self._jobs: dict[str, dict[str, Any]] = {}  # every job, as on disk but with the progress of running ones
        self._requests: dict[str, str] = {}
        self._numbers: dict[str, int] = {}  # of each job's last event
        self._outbox: deque[dict[str, Any]] = deque()
        self._unsaved: deque[dict[str, Any]] = deque()  # events that the full disk did not take yet
        self._inbox: queue.SimpleQueue[tuple] = queue.SimpleQueue()
        self._slots = [_Slot(number) for number in range(workers)]
        self._device: dict[str, Any] = {"kind": "unknown", "name": "the worker is starting"}
        self._closing = False
        self._complained = ""
        self._thread: threading.Thread | None = None
        self.housekeeping: Callable[[], Any] = lambda: None  # called every ten minutes from this object's own thread
        self._recover()

    # -- For the server, from any thread ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread that runs jobs, and a worker ahead of the first one."""
        self._thread = threading.Thread(target=self._loop, name="jobs", daemon=True)
        self._thread.start()

    def close(self, now: bool = True) -> None:
        """Ends the workers. `now`: at once, and what ran resumes with the next backend; otherwise when all jobs have ended."""
        while not now and not self.idle():
            time.sleep(0.05)
        self._closing = True
        self._wake()
        if self._thread is not None:
            self._thread.join()

    def submit(
        self,
        request_id: str,
        recipe: str,
        values: dict[str, Any],
        inputs: dict[str, str],
        title: str = "",
        source: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Queues a job and returns it; when it returns, the job is on disk. The same `request_id` again returns the same job.

        inputs: file name -> hash of an artifact that is here. Raises `KilnError`: bad-recipe, bad-parameter, bad-input, bad-request,
        no-artifact (its message names the file), queue-full, no-space.
        """
        if not isinstance(request_id, str) or not 1 <= len(request_id) <= 100:
            raise KilnError(
                "bad-request", "A job needs a request id of 1 to 100 characters.", "Give each submission its own, such as a UUID."
            )
        if not isinstance(recipe, str) or not isinstance(values, dict):
            raise KilnError("bad-request", "A job needs a recipe's name and a map of parameter values.", "SPEC.md shows the message.")
        parameters = recipes.values(recipes.make(recipe, values))
        _check_inputs(inputs)
        try:
            source = json.loads(json.dumps(source or {}))
        except (TypeError, ValueError) as error:
            raise KilnError(
                "bad-request", f"The provenance cannot be stored: {error}.", "Give text, numbers, lists and maps only."
            ) from None
        with self._lock:
            if request_id in self._requests:
                return self.get(self._requests[request_id])
            for name, hash in inputs.items():
                if not self.store.has(hash):
                    raise KilnError("no-artifact", f"The input {name} ({hash[:12]}…) has not been sent.", "Upload it, then submit again.")
            if sum(job["state"] == "queued" for job in self._jobs.values()) >= MOST_QUEUED:
                raise KilnError("queue-full", f"{MOST_QUEUED} jobs wait already.", "Wait until some have ended.")
            job: dict[str, Any] = {
                "id": secrets.token_hex(6), "recipe": recipe, "parameters": parameters, "title": str(title)[:200], "source": source,
                "state": "queued", "stage": "", "fraction": 0.0, "text": "", "created": time.time(), "started": None, "finished": None,
                "attempts": 0, "error": None, "results": {}, "inputs": dict(inputs), "taken": None,
                "request": request_id, "position": self._last_position() + 1, "deaths": 0, "restarts": 0,
            }  # fmt: skip
            self._jobs[job["id"]], self._numbers[job["id"]] = job, 0
            try:
                self._record(job, "queued", durable=True)
            except BaseException:
                del self._jobs[job["id"]], self._numbers[job["id"]]
                raise
            self._requests[request_id] = job["id"]
            self._wake()
            return _wire(job)

    def events(self, id: str, after: int = 0) -> list[dict[str, Any]]:
        """The stored events of a job with numbers above `after`."""
        self._find(id)
        return self.store.events(id, after)

    def list(self) -> list[dict[str, Any]]:
        """All jobs, oldest first."""
        with self._lock:
            return [_wire(job) for job in self._jobs.values()]

    def get(self, id: str) -> dict[str, Any]:
        with self._lock:
            return _wire(self._find(id))

    def cancel(self, id: str) -> dict[str, Any]:
        """A queued job is cancelled at once, a running one within two seconds; one that has ended stays as it is."""
        with self._lock:
            job = self._find(id)
            if job["state"] == "queued":
                self._record(job, "cancelled", durable=True, state="cancelled", finished=time.time(), text="")
            elif job["state"] == "running":
                self._save(job, state="cancelling")
                self._inbox.put(("cancel", id))
            self._wake()
            return _wire(job)

    def retry(self, id: str) -> dict[str, Any]:
        """Queues a failed or cancelled job again, as the last; stages that it finished are not repeated. Waiting or running: no change."""
        with self._lock:
            job = self._find(id)
            if job["state"] == "done":
                raise KilnError("bad-state", f"Job {id} is done.", "Submit a new job to compute it again.")
            if job["state"] in ("failed", "cancelled"):
                missing = [name for name, hash in job["inputs"].items() if not self.store.has(hash)]
                if missing:
                    raise KilnError("damaged-input", f"The input {missing[0]} of job {id} is gone.", "Submit the job again with its files.")
                self._record(
                    job, "queued", durable=True, state="queued", position=self._last_position() + 1, deaths=0, restarts=0,
                    error=None, stage="", fraction=0.0, text="", started=None, finished=None,
                )  # fmt: skip
                self._wake()
            return _wire(job)

    def take(self, id: str) -> dict[str, Any]:
        """Notes that a client has what it wants of a done job's results: from here on they may go (housekeeping.py)."""
        with self._lock:
            job = self._find(id)
            if job["state"] != "done":
                raise KilnError("bad-state", f"Job {id} is {job['state']}.", "Results are there when it is done.")
            if job["taken"] is None:
                self._save(job, taken=time.time())
            return _wire(job)

    def remove(self, id: str) -> None:
        """Forgets a job that does not run, with its events and every artifact that no other job refers to."""
        with self._lock:
            job = self._find(id)
            if job["state"] in ("running", "cancelling"):
                raise KilnError("bad-state", f"Job {id} is running.", "Cancel it first.")
            self.store.remove_job(id)
            del self._jobs[id], self._numbers[id], self._requests[job["request"]]

    def idle(self) -> bool:
        """Whether no job waits or runs."""
        with self._lock:
            return all(job["state"] in ENDED for job in self._jobs.values())

    def release(self) -> None:
        """Workers give back what memory networks hold between jobs; one that runs a job, after it."""
        for slot in self._slots:
            slot.send({"command": "release"})

    def device(self) -> dict[str, Any]:
        """What the worker computes on, as it reported last (`worker.device`); `kind` is unknown until it has."""
        return dict(self._device)

    # -- The table ----------------------------------------------------------------------------------------------------------------

    def _recover(self) -> None:
        for job in self.store.load_jobs():
            self._jobs[job["id"]] = job = {"taken": None, **job}  # a table of 0.1.0 has jobs without it
            self._requests[job["request"]] = job["id"]
            self._numbers[job["id"]] = self.store.last_number(job["id"])
            if job["state"] == "cancelling":
                self._record(job, "cancelled", state="cancelled", finished=time.time())
            elif job["state"] == "running":
                job["restarts"] = job.get("restarts", 0) + (not job.pop("put_down", False))
                if job["restarts"] > MOST_RESTARTS:
                    message = f"The backend ended {job['restarts']} times while it ran this job."
                    hint = "Most likely the job takes the machine's memory or crashes its driver: retry with a smaller preset."
                    self._fail(job, KilnError("worker-died", message, hint))
                    continue
                self._record(job, "queued", {"text": "The backend was restarted."}, state="queued", stage="", fraction=0.0, text="")
        self._jobs = dict(sorted(self._jobs.items(), key=lambda item: item[1]["created"]))

    def _find(self, id: str) -> dict[str, Any]:
        if id not in self._jobs:
            raise KilnError("no-job", f"There is no job {str(id)[:40]!r}.", "It may have been removed; list the jobs.")
        return self._jobs[id]

    def _last_position(self) -> int:
        return max((job["position"] for job in self._jobs.values()), default=0)

    def _save(self, job: dict[str, Any], **changes: Any) -> None:
        with self.store.transaction():
            self.store.save_job({**job, **changes})
        job.update(changes)

    def _record(
        self, job: dict[str, Any], kind: str, fields: dict[str, Any] | None = None, artifacts: tuple[str, ...] = (), durable: bool = False,
        **changes: Any,
    ) -> None:  # fmt: skip
        """Stores an event, and with it the changes that it tells of; either both are on disk afterwards or this raises and neither is.

        But on a disk without a byte left a job still fails or is cancelled for all to see; that is written when there is room, and if the
        backend ends before, the job resumes.
        """
        with self._lock:
            event = {"job": job["id"], "number": self._numbers[job["id"]] + 1, "time": time.time(), "kind": kind, **(fields or {})}
            changed = {**job, **changes}
            try:
                self._write_unsaved()
                with self.store.transaction(durable):
                    if kind not in KEPT:  # progress alone is not worth a row: a job that resumes starts it anew
                        self.store.save_job(changed)
                    self.store.add_event(event, artifacts)
            except KilnError as error:
                if error.code != "no-space" or kind not in ("failed", "cancelled"):
                    raise
                self._unsaved.append(event)
            job.update(changes)
            self._numbers[job["id"]] += 1
            self._outbox.append(event)
            if kind in KEPT and event["number"] % (KEPT[kind] // 4) == 0:
                self.store.thin_events(job["id"], kind, KEPT[kind])

    def _write_unsaved(self) -> None:
        with self._lock:
            while self._unsaved:
                event = self._unsaved[0]
                if event["job"] in self._jobs:
                    with self.store.transaction(durable=True):
                        self.store.save_job(self._jobs[event["job"]])
                        self.store.add_event(event)
                self._unsaved.popleft()

    def _forget_progress(self) -> None:
        """An hour after a job's end nobody replays its progress."""
        with self._lock:
            for job in self._jobs.values():
                if job["state"] in ENDED and not job.get("thinned") and time.time() - (job["finished"] or 0) > 3600:
                    for kind in KEPT:
                        self.store.thin_events(job["id"], kind, 1)
                    self._save(job, thinned=True)
            self.store.collect()

    # -- The thread that runs jobs ------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        self._inbox.put(("wake",))

    def _loop(self) -> None:
        if self.workers > 1:
            _gpus()  # asked once, ahead of the first worker and outside of the lock
        last, next_housekeeping = time.monotonic(), 0.0
        while not self._closing:
            busy = any(slot.cancel_at is not None for slot in self._slots)
            try:
                self._handle(self._inbox.get(timeout=0.1 if busy else 1.0))
            except queue.Empty:
                pass
            now = time.monotonic()
            # A machine that slept, or a stopped clock, must not look like a silent worker: no turn counts more than two seconds.
            passed, last = min(now - last, 2.0), now
            for slot in self._slots:
                try:
                    self._tend(slot, passed)
                except _Held:
                    pass
                except Exception as error:  # said in the log, tried again at the next turn; no job is lost
                    self._complain(error)
                    time.sleep(0.2)
            self._deliver()
            try:
                self._write_unsaved()
                if now >= next_housekeeping:
                    next_housekeeping = now + 600
                    self._forget_progress()
                    self.housekeeping()
            except Exception as error:
                self._complain(error)
        for slot in self._slots:
            if slot.job is not None and slot.job["state"] == "running":
                with contextlib.suppress(Exception):  # then it counts as a crash, of which five are allowed
                    self._save(slot.job, put_down=True)
            slot.end()
        self._deliver()

    def _complain(self, error: Exception) -> None:
        # Through `logging`, which never raises: standard error may lie on the disk that is full.
        if not isinstance(error, KilnError):
            log.error("The scheduler: %s", error, exc_info=error)
        elif error.message != self._complained:
            log.error("The scheduler: %s", error.message)
            self._complained = error.message

    def _deliver(self) -> None:
        while self._outbox:
            event = self._outbox.popleft()
            try:
                self._listener(event)
            except Exception as error:
                self._complain(error)

    def _handle(self, item: tuple) -> None:
        if item[0] == "cancel":
            for slot in self._slots:
                if slot.job is not None and slot.job["id"] == item[1]:
                    slot.cancel_at = time.monotonic() + self._cancel_seconds
                    slot.send({"command": "cancel", "job": item[1]})
        elif item[0] == "worker":
            _, number, process, message = item
            slot = self._slots[number]
            if slot.process is process:
                slot.silence = 0.0
                slot.messages.append(message)

    def _tend(self, slot: _Slot, passed: float) -> None:
        """One turn for a worker: what it said, whether it lives, what it does next."""
        while slot.messages:
            message = slot.messages[0]
            self._hear(slot, message)  # if this raises, the message stays for the next turn
            if slot.messages:
                slot.messages.popleft()
        if slot.process is not None:
            slot.silence += passed
            if slot.cancel_at is not None and time.monotonic() >= slot.cancel_at:
                slot.end()
                self._record(slot.job, "cancelled", durable=True, state="cancelled", finished=time.time(), text="")
                slot.free()
            elif slot.silence > self._silence_seconds * (1 if slot.warm else STARTING):
                self._died(slot, f"gave no sign of life for {slot.silence:.0f} s")
        if slot.process is None and slot.job is not None:  # its end could not be written down
            self._settle(slot)
        if slot.job is None:
            with self._lock:
                waiting = [job for job in self._jobs.values() if job["state"] == "queued"]
                job = min(waiting, key=lambda job: job["position"], default=None)
                if slot.process is None and (job is not None or slot.failures < 2):
                    try:
                        slot.begin(self.store, self._inbox, len(self._slots))
                    except OSError as error:
                        slot.failures += 1
                        if job is not None:
                            failure = KilnError(
                                "worker-died", f"The worker cannot be started: {error}.", "`kiln doctor` says what is wrong."
                            )
                            self._fail(job, disk.no_space(self.store.root) if disk.is_full(error) else failure)
                        return
                if job is not None:
                    try:
                        self._run(slot, job)
                    except KilnError as error:  # the disk is full: it waits, and says what for
                        job["text"] = error.message
                        raise

    def _run(self, slot: _Slot, job: dict[str, Any]) -> None:
        folder = self.store.runs / f"{job['id']}-{secrets.token_hex(4)}"
        attempt = job["attempts"] + 1
        self._record(
            job, "started", {"attempt": attempt, "text": "" if slot.ready else "Starting the worker"}, state="running", attempts=attempt,
            started=time.time(), stage="", fraction=0.0, text="" if slot.ready else "Starting the worker",
        )  # fmt: skip
        slot.job, slot.folder, slot.cancel_at, slot.death = job, folder, None, ""
        inputs = {name: [str(self.store.artifacts / hash[:2] / hash), hash] for name, hash in job["inputs"].items()}
        slot.send(
            {
                "command": "run", "job": job["id"], "title": job["title"], "recipe": job["recipe"], "parameters": job["parameters"],
                "inputs": inputs, "folder": str(folder), "stages": str(self.store.stages), "stages_bytes": STAGE_BYTES,
            }
        )  # fmt: skip

    def _hear(self, slot: _Slot, message: dict[str, Any] | None) -> None:
        if message is None:
            self._died(slot, "")
            return
        kind, job = message["kind"], slot.job
        if kind == "ready":
            slot.ready, slot.failures = True, 0
        elif kind == "device":
            self._device = message["device"]
        elif kind == "warm":
            slot.warm = True
        if job is None or message.get("job") != job["id"]:
            return
        if kind in ("stage", "progress", "preview", "log"):
            try:
                self._hear_progress(job, message)
            except KilnError as error:  # no room for news of the job is no reason to end it
                if error.code != "no-space":
                    raise
        elif job["state"] == "cancelling" or kind == "cancelled":
            self._record(job, "cancelled", durable=True, state="cancelled", finished=time.time(), text="")
            slot.free()
        elif kind == "done":
            try:
                results = message.setdefault("taken", {})  # kept there: if the table is full, this message is heard again
                for name in message["results"]:
                    results[name] = results.get(name) or self._take(slot.folder / "results" / name)
            except KilnError as error:
                self._fail(job, error)
            except OSError as error:
                now = time.monotonic()
                if now < message.setdefault("give_up", now + TAKE_SECONDS):
                    raise _Held from error
                log.error("The result %s of job %s: %s", name, job["id"], error)
                self._fail(
                    job,
                    KilnError(
                        "disk",
                        f"The result {name} cannot be taken: {error.strerror or error}.",
                        f"A virus scanner may hold or remove it: let it spare {self.store.root}, then retry.",
                    ),
                )
            else:
                self._record(
                    job, "done", {"results": results}, durable=True, state="done", results=results, finished=time.time(), fraction=1.0,
                    text="", error=None,
                )  # fmt: skip
            slot.free()
        elif kind == "failed":
            failure = KilnError.from_wire(message["error"])
            if failure.code == "damaged-input":
                for hash in set(job["inputs"].values()):
                    if not self.store.is_whole(hash):
                        self.store.discard(hash)
            if failure.code == "internal":
                self._record(job, "log", {"text": message["trace"]})
            self._fail(job, failure)
            slot.free()
            if failure.code == "out-of-memory":
                slot.end()  # a new process is the one sure way to give all of it back

    def _hear_progress(self, job: dict[str, Any], message: dict[str, Any]) -> None:
        fields = {key: value for key, value in message.items() if key not in ("kind", "job", "png")}
        if message["kind"] == "stage":
            self._record(job, "stage", fields, stage=message["stage"], fraction=0.0, text="")
        elif message["kind"] == "progress":
            self._record(job, "progress", fields, fraction=message["fraction"], text=message["text"])
        elif message["kind"] == "preview":
            hash = self.store.put(message["png"], durable=False)
            self._record(job, "preview", {"artifact": hash, "size": len(message["png"])}, artifacts=(hash,))
        else:
            self._record(job, "log", fields)

    def _take(self, path: Path) -> dict[str, Any]:
        size = path.stat().st_size
        if self.store.quota is not None:
            self.store.check_space(size)
        return {"hash": self.store.put(path, take=True), "size": size}

    def _fail(self, job: dict[str, Any], error: KilnError) -> None:
        self._record(job, "failed", {"error": error.to_wire()}, durable=True, state="failed", error=error.to_wire(), finished=time.time())

    def _died(self, slot: _Slot, why: str) -> None:
        """A worker ended, or is as good as dead: what that means for its job, once."""
        code = slot.end(0.0 if why else 2.0)
        if not slot.ready:
            slot.failures += 1
        slot.death = why or _ending(code)
        slot.out_of_memory = not why and code in (-9, 137)
        if slot.job is not None:
            self._settle(slot)

    def _settle(self, slot: _Slot) -> None:
        job, deaths = slot.job, slot.job["deaths"] + 1
        if job["state"] == "cancelling":
            self._record(job, "cancelled", durable=True, state="cancelled", finished=time.time(), text="")
        elif deaths < MOST_ATTEMPTS:
            text = f"The worker {slot.death}; the job goes on from its last finished stage."
            try:
                self._record(job, "queued", {"text": text}, state="queued", deaths=deaths, stage="", fraction=0.0, text=text)
            except KilnError as full:
                if full.code != "no-space":
                    raise
                self._fail(job, full)
        else:
            where = f" in {job['stage']!r}" if job["stage"] else ""
            message = f"The worker {slot.death}{where}, and so did {deaths - 1} attempts before."
            if slot.out_of_memory:
                error = out_of_memory(job["recipe"], job["parameters"], message + " Most likely the system ran out of memory.")
            else:
                last_words = f"The worker's last words, in {self.store.logs / 'worker.log'}: {_tail(self.store.logs)}"
                hint = f"Retry with a smaller preset. {last_words}"
                error = KilnError("worker-died", message, hint)
            self._fail(job, error)
        slot.free()


class _Held(Exception):
    """Another program holds a file for the moment: the same again at the next turn."""


class _Slot:
    """One worker process, its job, and what it said that is not dealt with yet."""

    def __init__(self, number: int):
        self.number = number
        self.process: subprocess.Popen | None = None
        self.messages: deque[dict[str, Any] | None] = deque()  # None: it ended
        self.commands: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()  # None: no more
        self.job: dict[str, Any] | None = None
        self.folder: Path | None = None
        self.cancel_at: float | None = None
        self.silence = 0.0
        self.ready = self.warm = False
        self.failures = 0  # to get ready, in a row: a broken installation is not started again and again without a job
        self.death, self.out_of_memory = "", False

    def begin(self, store: Store, inbox: queue.SimpleQueue, slots: int) -> None:
        environment = dict(os.environ)
        package = str(Path(__file__).resolve().parents[1])
        paths = [package, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in paths)  # its working folder is another
        if slots > 1 and (gpus := _gpus()) > 1:
            environment.setdefault("CUDA_VISIBLE_DEVICES", str(self.number % gpus))
        # Numba counts the cores that it may run on, which in a container can be many more than its share of their time. Of several workers
        # each gets its share, also of OpenMP and BLAS: threads beyond the cores cost more than they give.
        share = str(max(1, cores() // slots))
        for threads in ("NUMBA_NUM_THREADS", *(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS") if slots > 1 else ())):
            environment.setdefault(threads, share)
        flags = 0
        if sys.platform == "win32":
            flags = subprocess.CREATE_NO_WINDOW | subprocess.BELOW_NORMAL_PRIORITY_CLASS
        with open(store.logs / "worker.log", "ab") as errors:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "backend.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env=environment, cwd=store.root, creationflags=flags,
            )  # fmt: skip
        self.process, self.ready, self.warm, self.silence = process, False, False, 0.0
        self.messages.clear()

        def read() -> None:
            try:
                while (message := read_frame(process.stdout)) is not None:
                    inbox.put(("worker", self.number, process, message))
            except (OSError, ValueError) as error:
                log.error("What the worker said cannot be read: %s", error)
            inbox.put(("worker", self.number, process, None))

        commands = self.commands = queue.SimpleQueue()

        def write() -> None:  # in a thread, because a stopped worker takes nothing off its pipe
            with contextlib.suppress(OSError):  # it has ended; its reader says so
                while (message := commands.get()) is not None:
                    write_frame(process.stdin, message)
            with contextlib.suppress(OSError):
                process.stdin.close()

        for target in (read, write):
            threading.Thread(target=target, name=f"worker {process.pid} {target.__name__}", daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        self.commands.put(message)

    def end(self, patience: float = 0.0) -> int:
        """Ends the process, whatever it does, and returns its exit code. `patience`: seconds for one that is ending by itself."""
        process, self.process = self.process, None
        self.messages.clear()
        if process is None:
            return 0
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
        self.commands.put(None)
        process.stdout.close()
        return process.wait()

    def free(self) -> None:
        """The job has ended; the process stays warm."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.job = self.folder = self.cancel_at = None


@functools.cache
def _gpus() -> int:
    """NVIDIA cards here, as their driver lists them."""
    program = shutil.which("nvidia-smi")
    try:
        listed = subprocess.run([program, "--list-gpus"], capture_output=True, text=True, timeout=10) if program else None
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed else 0


def _check_inputs(inputs: dict[str, str]) -> None:
    if not isinstance(inputs, dict) or len(inputs) > MOST_INPUTS:
        raise KilnError("bad-input", f"A job takes a map of at most {MOST_INPUTS} input files.", "Give file names and hashes.")
    folded: set[str] = set()
    for name, hash in inputs.items():
        check_name(name)
        check_hash(hash)
        folded.add(name.casefold())
    parents = {"/".join(parts[:count]) for parts in (name.split("/") for name in folded) for count in range(1, len(parts))}
    if len(folded) < len(inputs) or folded & parents:
        raise KilnError(
            "bad-input", "Two inputs have one name on some systems.", "Let names differ in more than case, and no file be a folder."
        )


def _wire(job: dict[str, Any]) -> dict[str, Any]:
    return {key: job[key] for key in _WIRE}


def _ending(code: int) -> str:
    if code < 0:
        return f"was ended by signal {-code}"
    return f"ended with code {code}" if code < 2**31 else f"crashed with code {code:#x}"  # Windows reports exceptions so


def _tail(logs: Path) -> str:
    try:
        with open(logs / "worker.log", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4000))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return "(none)"
    return " | ".join(line.strip() for line in lines[-3:])[:500] or "(none)"
