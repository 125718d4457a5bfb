"""Items of a batch on a Ray cluster: each is one Ray task that computes what a worker of the backend would, on whichever node has room.

Files travel by content. The driver puts each distinct input into Ray's object store once, in chunks. A task sends its results chunk by
chunk to the `Desk`, an actor on the driver's machine, which keeps them under their SHA-256: a result outlives the node that made it, and no
side holds more than a chunk of it in memory. The desk also takes what tasks report and tells them to stop. A node that is lost costs its
items one attempt: Ray runs them again, and where a stage was finished on that node, it lies in Kiln's folder there.

`ray` itself is an optional extra and imported where it is used.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend import disk
from backend.batch.engine import FINAL, Event, Kind
from backend.store import check_name
from protocol import VERSION, connection, recipes
from protocol.errors import KilnError

RAY = "ray==2.60.0"
CHUNK = 4 << 20  # bytes of a file in one message or object
CPUS = 4  # of a task where nothing else is said and every node has as many
RETRIES = 3  # of an item whose worker or node is lost
REPORT_SECONDS = 0.25  # between two messages of a task
POLL_SECONDS = 0.2
SLOTS_SECONDS = 5.0  # between two looks at which nodes there are
CANCEL_SECONDS = 10.0  # from cancel to killing a worker whose step does not yield
CONNECT_SECONDS = 5.0
LOOK_SECONDS = 60.0  # that nodes may take to say which Kiln they have
OBJECT_STORE = 1_000_000_000  # bytes of memory for inputs, of a cluster that is started here; more goes to the disk

# What a cluster that is started here hears on: loopback alone, and with a token, because whoever may speak to Ray may run code. (The first
# name is Ray's own for whether to use a network address, on every system.) Nothing is counted for or sent to anybody.
_LOCAL = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_enable_metrics_collection": "0",
    "RAY_worker_niceness": "5",  # as the backend's own worker
}
_ALWAYS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_task_oom_retries": "1",  # an item that needs too much memory is not tried for ever
    "RAY_NUM_REDIS_GET_RETRIES": "2",  # half a minute each, of looking for a cluster
}

JOIN = "This machine has to be a node of it: `ray start --address=HOST:PORT`. Then `--address auto` finds it."

log = logging.getLogger("kiln")


@dataclass
class _Job:
    id: str
    token: str  # of this submission of the job
    recipe: str
    values: dict[str, Any]
    hashes: set[str]  # of its inputs
    task: Any  # the ObjectRef of its outcome
    begun: bool = False
    stage: str = ""
    cancelled_at: float | None = None
    state: Kind | None = None  # one of FINAL, once it has ended
    results: dict[str, str] = field(default_factory=dict)  # name -> SHA-256


class RayEngine:
    """An `Engine` (engine.py) on a Ray cluster. Jobs end with the process that submitted them; what they finished is kept on their nodes.

    scratch: folder for results that were not fetched yet, on this machine; made, and removed by `close`. address: of a node of a running
    cluster that this machine belongs to ("auto" finds it); None starts one here that ends with this process. cpus: cores a task gets.

    Raises KilnError: no-ray, unavailable (no cluster answers), bad-version (a node has another Kiln or none).
    """

    def __init__(self, scratch: Path, address: str | None = None, cpus: int | None = None):
        self._jobs: dict[str, _Job] = {}
        self._files: dict[str, list[Any]] = {}  # SHA-256 of an input -> the ObjectRefs of its chunks
        self._events: list[Event] = []
        self._scratch = Path(scratch)
        self._temporary: Path | None = None
        self._closed = False
        self._ray = _imported(address)
        if address is not None and address != "auto":
            _check_address(address)
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(parents=True)
        self._joined = not self._ray.is_initialized()
        try:
            if self._joined:
                self._join(address)
            self._look_at_nodes()
            self._cpus = self._cpus_of_a_task(cpus)
            self.slots, self._looked = 1, -SLOTS_SECONDS
            self._count_slots()
            here = self._on(self._ray.get_runtime_context().get_node_id())
            self._desk = self._ray.remote(Desk).options(num_cpus=0, scheduling_strategy=here).remote(str(self._scratch))
            self._task = self._ray.remote(max_retries=RETRIES)(run_task)
        except BaseException:
            self.close()
            raise

    # -- Engine -------------------------------------------------------------------------------------------------------------------

    def submit(self, key: str, recipe: str, values: dict[str, Any], inputs: dict[str, Path], title: str) -> str:
        known = self._jobs.get(key)
        if known is not None and known.state not in ("failed", "cancelled") and known.cancelled_at is None:
            if known.state == "done":
                self._events.append(Event(key, "done", fraction=1.0))
            return key
        parameters = recipes.values(recipes.make(recipe, values))
        files = {check_name(name): self._put(name, Path(path)) for name, path in inputs.items()}
        order: dict[str, Any] = {
            "token": secrets.token_hex(8),
            "job": key,
            "title": title,
            "recipe": recipe,
            "parameters": parameters,
            "threads": self._cpus,
            "chunk": CHUNK,
        }
        gpus = 1 if self._has_gpu() and _asks_for_gpu(parameters) else 0
        task = self._task.options(name=title or recipe, num_cpus=self._cpus, num_gpus=gpus)
        refs = {name: (hash, self._files[hash]) for name, hash in files.items()}
        outcome = task.remote(VERSION, order, refs, self._desk)
        self._jobs[key] = _Job(key, order["token"], recipe, parameters, set(files.values()), outcome)
        return key

    def poll(self, timeout: float) -> list[Event]:
        until = time.monotonic() + timeout
        while True:
            self._count_slots()
            self._hear()
            if self._events or (left := until - time.monotonic()) <= 0:
                events, self._events = self._events, []
                return events
            tasks = [job.task for job in self._jobs.values() if job.state not in FINAL]
            if tasks:
                self._ray.wait(tasks, num_returns=1, timeout=min(POLL_SECONDS, left))
            else:
                time.sleep(min(POLL_SECONDS, left))

    def fetch(self, id: str, folder: Path) -> None:
        job = self._jobs.get(id)
        if job is None:
            raise KilnError("no-job", f"There is no job {id!r}.", "Its results were fetched and forgotten; submit it again.")
        folder.mkdir(parents=True, exist_ok=True)
        hashes = list(job.results.values())
        for name, hash in job.results.items():
            source, target = self._scratch / job.token / hash, folder / check_name(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            with disk.full_disk_named(folder):
                if hashes.count(hash) > 1 or not _linked(source, target):
                    shutil.copyfile(source, target)

    def forget(self, id: str) -> None:
        job = self._jobs.get(id)
        if job is None or job.state not in FINAL:
            return
        del self._jobs[id]
        shutil.rmtree(self._scratch / job.token, ignore_errors=True)
        for hash in job.hashes - {hash for other in self._jobs.values() for hash in other.hashes}:
            self._files.pop(hash, None)  # Ray frees an object with the last reference to it

    def cancel(self, id: str) -> None:
        job = self._jobs.get(id)
        if job is None or job.state in FINAL or job.cancelled_at is not None:
            return
        self._ask(self._desk.cancel.remote(job.token))  # its step stops at its next report
        job.cancelled_at = time.monotonic()
        if not job.begun:
            self._ray.cancel(job.task)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._joined:
            self._ray.shutdown()  # ends the tasks too
        else:  # whoever connected this process goes on with it
            for job in self._jobs.values():
                if job.state is None:
                    self._ray.cancel(job.task, force=True)
        for folder in (self._scratch, self._temporary):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    # -- The cluster --------------------------------------------------------------------------------------------------------------

    def _join(self, address: str | None) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        before = signal.getsignal(signal.SIGTERM)
        try:
            if address is not None:
                self._ray.init(address=address, **quiet)
            else:
                self._temporary = _temporary_folder()
                self._ray.init(
                    address="local", include_dashboard=False, object_store_memory=OBJECT_STORE, _temp_dir=str(self._temporary), **quiet
                )
        except Exception as error:  # Ray's own, ConnectionError, RuntimeError, ValueError
            text = str(error).strip().partition("\n")[0]
            if "ersion mismatch" in text:
                same = f"Every node needs the same Python and the same Ray; Kiln is tested with {RAY}."
                raise KilnError("bad-version", f"The cluster at {address} runs another Ray. {text}", same) from error
            if address is None:
                without = "`kiln batch` without --engine ray needs none."
                raise KilnError("unavailable", f"Ray does not start on this machine: {text}", without) from error
            raise KilnError("unavailable", f"No Ray cluster answers at {address}: {text}", JOIN) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # Ray's own would leave without a word to the report

    def _look_at_nodes(self) -> None:
        """Raises unless every node has this Kiln. A node that joins later refuses the first task it gets instead."""

        def look() -> tuple[str | None, str]:  # pickled by value, so that a node without Kiln can say so
            try:
                import backend.batch.ray_engine  # noqa: F401
                from protocol import VERSION
            except ImportError as error:
                return None, str(error)
            return VERSION, ""

        probe = self._ray.remote(num_cpus=0, max_retries=0)(look)
        asked = {probe.options(scheduling_strategy=self._on(node["NodeID"])).remote(): node for node in self._nodes()}
        ready, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_SECONDS)
        for answer in ready:
            name = asked[answer]["NodeManagerHostname"]
            try:
                version, problem = self._ray.get(answer)
            except self._ray.exceptions.RayError:
                continue  # a node that was lost meanwhile
            if version is None:
                hint = f"Install Kiln {VERSION} into the Python that runs Ray there, or take the node out of the cluster."
                raise KilnError("bad-version", f"The node {name} has no Kiln of this version: {problem}.", hint)
            if version != VERSION:
                raise other_version(name, version, VERSION)

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _on(self, node: str) -> Any:
        return self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)

    def _cpus_of_a_task(self, asked: int | None) -> int:
        found = [count for node in self._nodes() if (count := int(node["Resources"].get("CPU", 0)))]
        if not found:
            raise KilnError("unavailable", "No node of the Ray cluster offers cores.", "Start one with `ray start --num-cpus=N`.")
        if asked is not None and asked > max(found):
            raise KilnError(
                "bad-request",
                f"A task shall have {asked} cores, and no node has more than {max(found)}.",
                f"Ask for {max(found)} or fewer.",
            )
        return asked or min(CPUS, *found)

    def _has_gpu(self) -> bool:
        return any(node["Resources"].get("GPU", 0) >= 1 for node in self._nodes())

    def _count_slots(self) -> None:
        """How many tasks run at once, on GPUs or on cores alone: nodes come and go."""
        if time.monotonic() - self._looked < SLOTS_SECONDS:
            return
        self._looked = time.monotonic()
        resources = [node["Resources"] for node in self._nodes()]
        gpus = sum(int(one.get("GPU", 0)) for one in resources)
        self.slots = max(1, gpus, sum(int(one.get("CPU", 0)) // self._cpus for one in resources))

    # -- Tasks --------------------------------------------------------------------------------------------------------------------

    def _put(self, name: str, path: Path) -> str:
        """The SHA-256 of a file that is in the object store from here on."""
        try:
            with open(path, "rb") as file:
                hash = hashlib.file_digest(file, "sha256").hexdigest()
                if hash not in self._files:
                    file.seek(0)
                    self._files[hash] = [self._ray.put(chunk) for chunk in iter(lambda: file.read(CHUNK), b"")]
        except OSError as error:
            raise KilnError(
                "bad-input", f"The input {name} cannot be read: {error.strerror or error}.", f"Check the file {path}."
            ) from None
        except self._ray.exceptions.RayError as error:
            raise KilnError("no-space", f"Ray has no room for {path.name}: {_first_line(error)}", "Free some space on the disk.") from None
        return hash

    def _ask(self, answer: Any) -> Any:
        try:
            return self._ray.get(answer, timeout=LOOK_SECONDS)
        except self._ray.exceptions.RayError as error:
            raise KilnError("unavailable", f"The Ray cluster is gone: {_first_line(error)}", "Run the same command again.") from None

    def _hear(self) -> None:
        running = {job.task: job for job in self._jobs.values() if job.state not in FINAL}
        ended = self._ray.wait(list(running), num_returns=len(running), timeout=0)[0] if running else []
        by_token = {job.token: job for job in self._jobs.values()}
        for token, message in self._ask(self._desk.take.remote()):  # after the look at what ended: all that it said is there by then
            if (job := by_token.get(token)) is not None and job.state not in FINAL:
                self._hear_message(job, message)
        for task in ended:
            self._end(running[task])
        for job in running.values():
            if job.state not in FINAL and job.cancelled_at is not None and time.monotonic() - job.cancelled_at > CANCEL_SECONDS:
                self._ray.cancel(job.task, force=True)
                job.cancelled_at = time.monotonic()

    def _hear_message(self, job: _Job, message: dict[str, Any]) -> None:
        if message["kind"] == "begin":
            job.begun, job.stage = True, ""
            self._events.append(Event(job.id, "stage"))
            if message["attempt"] > 1:
                text = f"Its worker was lost; attempt {message['attempt']} begins on {message['node']}, with what is finished there."
                self._events.append(Event(job.id, "log", text=text))
        elif message["kind"] == "stage":
            job.stage = message["stage"]
            self._events.append(Event(job.id, "stage", job.stage))
        elif message["kind"] == "progress":
            self._events.append(Event(job.id, "progress", job.stage, message["fraction"], message["text"]))
        elif message["kind"] == "log":
            self._events.append(Event(job.id, "log", job.stage, text=message["text"]))

    def _end(self, job: _Job) -> None:
        outcome = self._outcome(job)
        job.state = "cancelled" if job.cancelled_at is not None else outcome["kind"]
        error = None
        if job.state == "done":
            job.results = outcome["results"]
        elif job.state == "failed":
            error = KilnError.from_wire(outcome["error"])
            if error.code == "internal":
                log.error("%s: %s", job.id, outcome.get("trace", error.message))
        self._events.append(Event(job.id, job.state, job.stage, 1.0 if job.state == "done" else 0.0, error=error))

    def _outcome(self, job: _Job) -> dict[str, Any]:
        from backend.worker import out_of_memory

        exceptions = self._ray.exceptions
        where = f" in {job.stage!r}" if job.stage else ""
        try:
            return self._ray.get(job.task)
        except exceptions.TaskCancelledError:
            return {"kind": "cancelled"}
        except exceptions.OutOfMemoryError as error:
            message = f"The node's memory did not suffice{where}: {_first_line(error)}"
            return _failed(out_of_memory(job.recipe, job.values, message))
        except exceptions.RayTaskError as error:  # around Kiln's own code, which lets nothing through
            hint = f"Is Kiln {VERSION} installed in the Python that runs Ray on every node?"
            return _failed(KilnError("bad-version", f"A node does not run Kiln's task: {_last_line(error)}", hint))
        except exceptions.RayError as error:  # WorkerCrashedError, NodeDiedError and their kin, after all attempts
            message = f"The worker was lost{where}, and so were {RETRIES} attempts before: {_first_line(error)}"
            return _failed(KilnError("worker-died", message, "Retry with a smaller preset; Ray's log on the node tells more."))


# -- On the driver's machine ---------------------------------------------------------------------------------------------------------------


class Desk:
    """The actor to which tasks report and send results: one folder a job, in it each under its SHA-256. One call at a time."""

    def __init__(self, folder: str):
        self._folder = Path(folder)
        self._attempts: dict[str, int] = {}
        self._stopped: set[str] = set()
        self._messages: list[tuple[str, dict[str, Any]]] = []

    def begin(self, token: str, node: str) -> int:
        """The number of the attempt that begins; those before count no more."""
        attempt = self._attempts[token] = self._attempts.get(token, 0) + 1
        self._messages.append((token, {"kind": "begin", "attempt": attempt, "node": node}))
        return attempt

    def report(self, token: str, attempt: int, messages: list[dict[str, Any]]) -> bool:
        """Takes news of an attempt; true if it is to stop."""
        if self._attempts.get(token) != attempt:
            return True
        for message in messages:
            last = self._messages[-1] if self._messages else None
            if last is not None and last[0] == token and last[1]["kind"] == message["kind"] == "progress":
                self._messages.pop()  # nobody has seen it, and nobody needs to
            self._messages.append((token, message))
        return token in self._stopped

    def cancel(self, token: str) -> None:
        self._stopped.add(token)

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        """The news since the last call, in order."""
        messages, self._messages = self._messages, []
        return messages

    def has(self, token: str, hash: str) -> bool:
        """Whether that result has arrived, from an earlier attempt or under another name."""
        return (self._folder / token / hash).is_file()

    def receive(self, token: str, attempt: int, hash: str, offset: int, chunk: bytes, last: bool) -> dict[str, str] | None:
        """Writes a part of a result; with the last one it is whole. An error as on the wire if it cannot."""
        folder = self._folder / token
        part = folder / f"{attempt}.part"
        try:
            folder.mkdir(exist_ok=True)
            with disk.full_disk_named(folder), open(part, "r+b" if offset else "wb") as file:
                file.seek(offset)
                file.write(chunk)
            if last:
                with open(part, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != hash:
                        return KilnError("damaged-result", "A result arrived damaged.", "Run the same command again.").to_wire()
                os.replace(part, folder / hash)
        except (OSError, KilnError) as error:
            if not isinstance(error, KilnError):
                error = KilnError("disk", f"A result cannot be written to {self._folder}: {error}.", "Check the disk.")
            return error.to_wire()
        return None


# -- On a node -----------------------------------------------------------------------------------------------------------------------------


def run_task(version: str, order: dict[str, Any], files: dict[str, tuple[str, list[Any]]], desk: Any) -> dict[str, Any]:
    """The Ray task: computes one job on this node and returns `{"kind": "done", "results": name -> SHA-256}`, cancelled or failed.

    Lets no exception through but those that end the process, so that Ray runs again what was lost and nothing else. A KilnError is returned
    as a map, because Ray would pickle it.
    """
    if version != VERSION:
        return _failed(other_version(socket.gethostname(), VERSION, version))
    os.environ.setdefault("NUMBA_NUM_THREADS", str(order["threads"]))  # read when it is imported; of OpenMP's threads Ray takes care itself
    import ray

    from backend import jobs, worker

    tell = _Telling(ray, desk, order["token"])
    reports = worker.Reports(tell, previews=False)
    folder, command = None, order
    try:
        store = connection.home() / "store"
        folder = _task_folder(connection.home())
        command = {**order, "folder": str(folder), "stages": str(store / "stages"), "stages_bytes": jobs.STAGE_BYTES}
        command["inputs"] = _received(ray, files, folder)
        outcome = worker.compute(command, reports, tell.cancelled)
        if outcome["kind"] == "done":
            tell({"kind": "stage", "stage": "Send results"})
            outcome["results"] = _sent(ray, desk, tell, folder / "results", outcome["results"], order["chunk"])
        return outcome
    except KilnError as error:
        return {"kind": "cancelled"} if tell.cancelled() else _failed(error)
    except BaseException as error:
        if tell.cancelled():
            return {"kind": "cancelled"}
        if isinstance(error, ray.exceptions.RayError):  # the driver is gone, and with it whoever waits for this
            raise
        return {**_failed(worker.describe(error, command, reports.stage)), "trace": traceback.format_exc()[-8000:]}
    finally:
        tell.close()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        worker.free_memory()


class _Telling:
    """Sends a task's reports in a thread of its own, so that no step waits for the network, and learns whether the task is to stop."""

    def __init__(self, ray: Any, desk: Any, token: str):
        self._ray, self._desk, self.token = ray, desk, token
        self.attempt = ray.get(desk.begin.remote(token, socket.gethostname()))
        self._messages: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._stop = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def __call__(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._messages.append(message)

    def cancelled(self) -> bool:
        return self._stop

    def close(self) -> None:
        """All that was said has arrived."""
        self._closing.set()
        self._thread.join()

    def _send(self) -> None:
        while True:
            closing = self._closing.wait(REPORT_SECONDS)
            with self._lock:
                messages, self._messages = self._messages, []
            try:
                self._stop = self._ray.get(self._desk.report.remote(self.token, self.attempt, messages)) or self._stop
            except self._ray.exceptions.RayError:  # the driver is gone
                self._stop = closing = True
            if closing:
                return


def _received(ray: Any, files: dict[str, tuple[str, list[Any]]], folder: Path) -> dict[str, list[str]]:
    """Writes each distinct input to the node's disk, and returns what `worker.lay_out` takes; it also checks the content."""
    arrived = folder / "arrived"
    arrived.mkdir()
    for hash, chunks in dict(files.values()).items():
        with disk.full_disk_named(folder), open(arrived / hash, "wb") as file:
            for chunk in chunks:
                file.write(ray.get(chunk))
    return {name: [str(arrived / hash), hash] for name, (hash, _) in files.items()}


def _sent(ray: Any, desk: Any, tell: _Telling, folder: Path, names: list[str], size_of_chunk: int) -> dict[str, str]:
    """Sends the results, each chunk when the one before has arrived; name -> SHA-256."""
    hashes: dict[str, str] = {}
    for number, name in enumerate(names):
        tell({"kind": "progress", "fraction": number / len(names), "text": name})
        with open(folder / name, "rb") as file:
            hash = hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
            if ray.get(desk.has.remote(tell.token, hash)):
                continue
            size, offset = file.tell(), 0
            file.seek(0)
            while True:
                chunk = file.read(size_of_chunk)
                last = offset + len(chunk) >= size
                if error := ray.get(desk.receive.remote(tell.token, tell.attempt, hash, offset, chunk, last)):
                    raise KilnError.from_wire(error)
                offset += len(chunk)
                if last:
                    break
    return hashes


def _task_folder(home: Path) -> Path:
    """A folder for this process's task on the node's disk. What killed processes of this machine left is removed; several machines may
    share the home."""
    folder = home / "ray" / socket.gethostname()
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.iterdir():
        if _is_over(left.name.partition("-")[0]):
            shutil.rmtree(left, ignore_errors=True)
    made = folder / f"{os.getpid()}-{secrets.token_hex(4)}"
    made.mkdir()
    return made


def _imported(address: str | None) -> Any:
    """The module `ray`, which reads its settings from the environment when it is imported."""
    for name, value in {**_ALWAYS, **({} if address else {**_LOCAL, "RAY_AUTH_TOKEN": secrets.token_hex(32)})}.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray._private.worker
        import ray.util.scheduling_strategies
    except ImportError as error:
        if error.name != "ray":
            raise
        raise KilnError(
            "no-ray", "`--engine ray` needs Ray, which is not installed.", f'Install it: "{sys.executable}" -m pip install {RAY}'
        ) from None
    # Pages of Ray's own state when a node is lost: `kiln batch` says in a line what that means.
    ray._private.worker.print_to_stdstream = lambda data, ignore_prefix: log.debug("Ray: %s", data)
    logging.getLogger("ray").addHandler(logging.NullHandler())
    return ray


def _check_address(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if "//" in address or not host or not port.isdecimal():
        raise KilnError("bad-request", f"{address!r} is not HOST:PORT of a Ray cluster, nor `auto`.", JOIN)
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise KilnError("unavailable", f"No Ray cluster answers at {address}: {error}.", JOIN) from None


def _temporary_folder() -> Path:
    """A private folder for a cluster that is started here: its sockets and logs. Its path is short, because a socket's may not be long.
    Those of processes that were killed are removed."""
    base = Path(tempfile.gettempdir() if sys.platform == "win32" else "/tmp")
    for left in base.glob("kiln-ray-*-*"):
        if _is_over(left.name.split("-")[2]):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"kiln-ray-{os.getpid()}-", dir=base))


def _is_over(pid: str) -> bool:
    """Whether that process of this machine has ended."""
    import psutil  # comes with what computes

    return pid.isdecimal() and not psutil.pid_exists(int(pid))


def _asks_for_gpu(parameters: dict[str, Any]) -> bool:
    return any(name.rpartition(".")[2] == "device" and value != "cpu" for name, value in parameters.items())


def other_version(node: str, there: str, here: str) -> KilnError:
    return KilnError(
        "bad-version", f"The node {node} has Kiln {there}, this batch is run by {here}.", f"Install Kiln {here} on every node."
    )


def _failed(error: KilnError) -> dict[str, Any]:
    return {"kind": "failed", "error": error.to_wire()}


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
        return True
    except OSError:  # another disk, or one without links
        return False


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]


def _last_line(error: BaseException) -> str:
    return str(error).strip().rpartition("\n")[2][:300]
