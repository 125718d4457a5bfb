"""The one thread that talks to the backend, and the watch over the backend's process. Knows no bpy.

The thread contract. `Link` owns the only client and with it the only socket. The main thread gives it orders (`ask`) made of plain values
and reads what it tells from one queue (`told`), also plain values:

    {"kind": "backend", "state": ..., "text": ..., "error": ..., "hello": ...}     what the backend is doing, whenever that changes
    {"kind": "jobs", "jobs": [...]}                                              every job, after each (re)connection
    {"kind": "job", "job": {...}}                                                one job that changed state
    {"kind": "event", "event": {...}}                                            stage, progress, log
    {"kind": "preview", "job": id, "path": file}                                 a new picture of a job
    {"kind": "transfer", "ticket": n, "fraction": f}                             how far an upload or a download is
    {"kind": "trouble", "error": {...}}                                          something that is in no order's answer
    {"kind": "answer", "ticket": n, "order": name, "result": ..., "error": ...}  exactly one for each order

Backend states: missing (not set up) · stopped · starting · running · unreachable (a remote one is silent) · failed (gave up restarting).
"""

from __future__ import annotations

import itertools
import os
import queue
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .protocol import client, connection
from .protocol.client import FINAL
from .protocol.errors import KilnError

RESTART_AFTER = (0.5, 2.0, 5.0, 15.0)  # seconds before each new attempt to keep a backend up that died; then it stays down and says why
STEADY = 120.0  # seconds that a backend has to run before earlier deaths are forgotten
START_TIME = 60.0  # seconds a starting backend may take to answer: a cold disk and a virus scanner are slow, a healthy one needs one second
LOOK_AGAIN = 2.0  # seconds between looks for a backend that somebody else started
LISTEN = 0.1  # seconds of listening for events between two looks at the orders
SHOWN = 20  # newest jobs whose pictures are fetched on connecting
LOG_TAIL = 40  # lines of the backend's log shown with an error
STOPPED = KilnError("backend-stopped", "The backend is stopped.", "Press Start in the Kiln tab.")
PATIENCE = 0.5  # seconds that a lost connection is tried again before the backend counts as gone
GONE = ("unavailable", "refused")  # errors that say that nobody answers
END_TIME = 10.0  # seconds that a backend which was told to end may take
URGENT = ("cancel", "stop", "give_up", "cancel_weights")  # orders that no transfer holds up
_FILE_NAME = re.compile(r"[0-9A-Za-z_]([0-9A-Za-z_.-]{0,150}[0-9A-Za-z_-])?")
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)", re.IGNORECASE)  # on Windows, whatever the suffix


@dataclass(frozen=True)
class Where:
    """Which backend to talk to."""

    log: Path  # what the local backend prints
    remote: Path | None = None  # connection file of a backend on another machine; None: this machine's
    python: Path | None = None  # Python of this machine's backend environment; None: not set up
    pythonpath: str = ""  # where that Python finds the backend's source, when it is not installed in it


def tail(log: Path) -> str:
    """The last lines of a log file."""
    try:
        with open(log, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 20_000))
            return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-LOG_TAIL:])
    except OSError:
        return ""


class _Interrupted(Exception):
    """A transfer makes way for an urgent order. It goes on afterwards where it was, or is given up by that order."""


class Link(threading.Thread):
    """Connects, obeys orders, listens; starts and restarts the local backend while it is wanted."""

    def __init__(self, where: Where, pictures: Path):
        super().__init__(name="Kiln client", daemon=True)
        self.told: queue.SimpleQueue = queue.SimpleQueue()
        self._orders: queue.SimpleQueue = queue.SimpleQueue()
        self._tickets = itertools.count(1)
        self._where = where
        self._pictures = pictures  # previews are written here, for Blender to load
        self._closing = threading.Event()
        self._stop_at_end = False
        self._waiting: list[tuple[int, str, dict]] = []  # orders held until the backend answers
        self._client: client.Client | None = None
        self._process: subprocess.Popen | None = None
        self._file_before: connection.Connection | None = None  # the connection file when the process was started
        self._wanted = False  # somebody asked for a running backend
        self._deaths = 0
        self._started_at = self._reached_at = 0.0
        self._device_asked = 0.0
        self._next_look = 0.0
        self._disk_told = False
        self._state: dict = {}

    # Called from the main thread

    def ask(self, order: str, **values) -> int:
        """Gives an order; the answer comes through `told` under the returned ticket."""
        ticket = next(self._tickets)
        self._orders.put((ticket, order, values))
        return ticket

    def close(self, stop_backend: bool = False, timeout: float = 3.0) -> None:
        """Ends the thread. The backend goes on until its queue is empty, unless it is told to stop."""
        self._stop_at_end = stop_backend
        self._closing.set()
        self._orders.put((0, "wake", {}))
        if self.is_alive():
            self.join(timeout)

    # The thread

    def run(self) -> None:
        while not self._closing.is_set():
            try:
                if self._client is None:
                    self._reach()
                self._obey()
                if self._client is not None:
                    self._listen()
            except KilnError as error:
                self._lose(error)
            except Exception as error:  # a fault of ours: shown like any other, and the thread stays alive
                traceback.print_exc()
                self._lose(KilnError("internal", f"Kiln's link to the backend failed: {error!r}.", traceback.format_exc(limit=3)))
        if self._client is not None:
            with suppress(KilnError):  # it is gone already
                self._obey()  # what was asked for just before
                if self._stop_at_end:
                    self._client.shutdown()
            self._client.close()

    def _tell(self, kind: str, **values) -> None:
        self.told.put({"kind": kind, **values})

    def _tell_state(self, state: str, text: str = "", error: KilnError | None = None, hello: dict | None = None) -> None:
        wire, remote = error.to_wire() if error else None, self._where.remote is not None
        now = {"state": state, "text": text, "error": wire, "hello": hello, "remote": remote}
        if now != self._state:
            self._state = now
            self._tell("backend", **now)

    # Reaching a backend

    def _reach(self) -> None:
        """One look for a backend; starts the local one when it is wanted."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + (0.1 if self._process else LOOK_AGAIN)
        path = self._where.remote or connection.default_path()
        failure = None
        try:
            found = connection.Connection.load(path)
            # A file of an earlier run lies there until the process that we started has written its own. Its process number does not
            # tell: on Windows an environment's python.exe only launches the real one.
            if self._process is None or self._process.poll() is not None or found != self._file_before:
                self._connect(found)
                return
        except KilnError as error:
            failure = error
        if self._where.remote:
            self._give_up("unreachable", failure)
        elif failure and failure.code in ("bad-version", "bad-connection", "no-curve"):
            self._give_up("failed", failure)
        elif self._process is not None:
            self._watch_start()
        elif self._where.python is None:
            self._give_up("missing", KilnError("no-backend", "Kiln's backend is not set up.", "Press Set Up Backend in the Kiln tab."))
        elif self._wanted and self._deaths <= len(RESTART_AFTER):
            self._start()
        elif self._state.get("state") != "failed":
            self._give_up("stopped", STOPPED)

    def _connect(self, found: connection.Connection) -> None:
        made = client.Client(found, patience=PATIENCE)
        try:
            hello = {**made.hello(), "device": made.status()["device"]}
            made.subscribe()
            jobs = made.jobs()
        except BaseException:
            made.close()
            raise
        self._client = made
        self._reached_at = time.monotonic()
        self._wanted = True  # once it was there, it is expected to stay
        self._tell_state("running", hello=hello)
        self._tell("jobs", jobs=jobs)
        for job in jobs[-SHOWN:]:
            with self._removed_meanwhile():
                self._show_last_preview(job)

    def _show_last_preview(self, job: dict) -> None:
        if job["state"] in FINAL and job["state"] != "done":
            return
        previews = [event for event in self._client.events(job["id"]) if event["kind"] == "preview"]
        if previews:
            self._fetch_picture(job["id"], previews[-1]["artifact"])

    def _start(self) -> None:
        wait = RESTART_AFTER[self._deaths - 1] if self._deaths else 0.0
        if time.monotonic() < self._started_at + wait:
            return
        self._tell_state("starting", "Starting the backend" if not self._deaths else f"Starting the backend again ({self._deaths})")
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "PYTHONPATH")}
        if self._where.pythonpath:
            environment["PYTHONPATH"] = self._where.pythonpath
        self._where.log.parent.mkdir(parents=True, exist_ok=True)
        # On its own feet: no console window, no signals from Blender's terminal, alive after Blender has closed.
        if sys.platform == "win32":
            apart = {"creationflags": subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP}
        else:
            apart = {"start_new_session": True}
        self._file_before = None
        with suppress(KilnError):
            self._file_before = connection.Connection.load(connection.default_path())
        try:
            with open(self._where.log, "ab") as log:
                self._process = subprocess.Popen(
                    [str(self._where.python), "-P", "-m", "backend.cli", "serve", "--until-idle"],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    env=environment, cwd=str(self._where.log.parent), **apart,
                )  # fmt: skip
        except OSError as error:
            self._wanted = False
            words = f"The backend cannot be started with {self._where.python}: {error.strerror or error}."
            self._give_up("failed", KilnError("backend-died", words, "Repair the backend, or check the Python in Kiln's preferences."))
        self._started_at = time.monotonic()

    def _watch_start(self) -> None:
        """The process was started and does not answer yet."""
        status = self._process.poll()
        if status is None and time.monotonic() < self._started_at + START_TIME:
            return
        if status is None:
            self._process.kill()
            status = "no answer"
        self._process = None
        self._died(f"The backend did not start ({f'exit status {status}' if status != 'no answer' else f'no answer in {START_TIME:g} s'}).")

    def _died(self, message: str) -> None:
        self._deaths += 1
        if self._deaths > len(RESTART_AFTER):
            error = KilnError("backend-died", f"{message} Kiln tried {self._deaths} times.", "See the log below; Repair often helps.")
            self._wanted = False
            self._deaths = 0
            self._give_up("failed", error, log=True)
        else:
            self._tell_state("starting", f"{message} Trying again.")

    def _give_up(self, state: str, error: KilnError | None, log: bool = False) -> None:
        """A state in which the backend's orders cannot be obeyed: each waiting one gets the reason."""
        self._tell_state(state, tail(self._where.log) if log else "", error)
        held, self._waiting = self._waiting, []
        for ticket, order, values in held:
            if hasattr(self, f"_local_{order}"):
                self._waiting.append((ticket, order, values))
            else:
                self._answer(ticket, order, error=error)

    def _lose(self, error: KilnError) -> None:
        """The backend stopped answering: what was running there is started again by it, so all we do is to bring it up."""
        if self._client is not None:
            self._client.close()
            self._client = None
        self._next_look = time.monotonic() + 0.2
        if self._where.remote:
            self._give_up("unreachable", error)
            return
        if time.monotonic() > self._reached_at + STEADY:
            self._deaths = 0
        if error.code not in GONE:  # not the backend's death: connect again, a little later
            self._next_look = time.monotonic() + LOOK_AGAIN
            self._give_up("failed", error)
            return
        if self._process is not None and self._process.poll() is None:
            self._process.kill()  # it lives and does not answer: a hang
            self._process.wait(5)
        self._process = None
        self._started_at = time.monotonic()
        if not connection.default_path().exists():  # it went in good order: somebody stopped it, here or in another Blender
            self._wanted = False
        if self._wanted:
            self._died("The backend ended unexpectedly.")
        else:
            self._give_up("stopped", STOPPED)

    # Obeying

    def _obey(self) -> None:
        """Carries out what was ordered; without a backend, holds what needs one."""
        self._take_orders(0.0 if self._client is not None else 0.1)
        held = 0  # orders at the front of the queue that need a backend while there is none
        while held < len(self._waiting):
            ticket, order, values = self._waiting[held]
            local = getattr(self, f"_local_{order}", None)
            if local is None and self._client is None:
                held += 1
                continue
            del self._waiting[held]
            try:
                result = (local or getattr(self, f"_order_{order}"))(ticket=ticket, **values)
            except _Interrupted:
                self._waiting.append((ticket, order, values))
            except KilnError as error:
                self._answer(ticket, order, error=error)
                if error.code in GONE:
                    raise  # to `run`, which looks for the backend again
            except OSError as error:
                self._answer(ticket, order, error=KilnError("disk", f"{error.strerror or error}: {error.filename or ''}".strip(": ") + ".",
                                                            "Make room or check the folder's permissions, then try again."))  # fmt: skip
            else:
                self._answer(ticket, order, result)

    def _take_orders(self, wait: float) -> None:
        """Puts what was ordered into the queue; waits for the first."""
        with suppress(queue.Empty):
            while True:
                given = self._orders.get(timeout=wait) if wait else self._orders.get_nowait()
                wait = 0.0
                if given[1] != "wake":
                    self._waiting.append(given)

    def _transferred(self, ticket: int, fraction: float) -> None:
        """A transfer's report, called for each part of a file."""
        self._tell("transfer", ticket=ticket, fraction=fraction)
        self._take_orders(0.0)
        if any(order in URGENT for _, order, _ in self._waiting):
            raise _Interrupted

    def _answer(self, ticket: int, order: str, result=None, error: KilnError | None = None) -> None:
        self._tell("answer", ticket=ticket, order=order, result=result, error=error.to_wire() if error else None)

    # Orders that need no backend

    def _local_start(self, ticket: int) -> None:
        self._wanted, self._deaths, self._next_look = True, 0, 0.0
        if self._client is None:  # said in any case: who asked reads what comes after it, whatever was the state before
            self._tell_state("starting", "Starting the backend")

    def _local_give_up(self, ticket: int, transfer: int) -> None:
        """Ends a transfer that is under way or waits."""
        for given in [given for given in self._waiting if given[0] == transfer]:
            self._waiting.remove(given)
            self._answer(transfer, given[1], error=KilnError("cancelled", "The transfer was cancelled.", ""))

    def _local_stop(self, ticket: int) -> None:
        self._wanted = False
        if self._client is not None:
            self._client.shutdown()
            self._client.close()
            self._client = None
            until = time.monotonic() + END_TIME
            while connection.default_path().exists() and time.monotonic() < until:
                time.sleep(0.03)
        if self._process is not None:
            try:
                self._process.wait(END_TIME)
            except subprocess.TimeoutExpired:
                self._process.kill()
            self._process = None
        self._next_look = time.monotonic() + 1.0
        self._give_up("stopped", STOPPED)

    def _local_release(self, ticket: int) -> None:
        """Blender renders: a backend on the same machine gives back the memory that it keeps for a next job."""
        if self._client is not None and not self._where.remote:
            self._client.release()

    # Orders to the backend

    def _order_submit(
        self, ticket: int, recipe: str, values: dict, inputs: dict, title: str, source: dict, id: str, base: str = "", without: tuple = ()
    ) -> dict:
        """base: a job whose inputs serve too, but those whose names begin with one of `without`; the backend has them."""
        if base:
            kept = {name: hash for name, hash in self._client.job(base)["inputs"].items() if not name.startswith(without)}
            inputs = {**kept, **inputs}

        def report(sent, total):
            self._transferred(ticket, sent / max(total, 1))

        return self._client.submit(recipe, values, inputs, title=title, source=source, progress=report, id=id)

    def _order_fetch(self, ticket: int, results: dict, folder: Path) -> Path:
        """Downloads results of a job into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        whole = sum(result["size"] for result in results.values()) or 1
        before = 0
        for name, result in results.items():

            def report(received, before=before):
                if self._closing.is_set():
                    raise KilnError("cancelled", "Blender closes.", "")
                self._transferred(ticket, (before + received) / whole)

            if not _FILE_NAME.fullmatch(name) or _DEVICE.match(name):
                raise KilnError("bad-result", f"The backend names a result {name!r}, which is no file name.", "Update Kiln on both sides.")
            self._client.download(result["hash"], folder / name, progress=report)
            before += result["size"]
        return folder

    def _order_cancel(self, ticket: int, job: str) -> None:
        self._client.cancel(job)

    def _order_retry(self, ticket: int, job: str) -> None:
        self._client.retry(job)

    def _order_take(self, ticket: int, job: str) -> None:
        self._client.take(job)

    def _order_remove(self, ticket: int, job: str) -> None:
        self._client.remove(job)

    def _order_weights(self, ticket: int) -> dict:
        return self._client.weights()

    def _order_pull_weights(self, ticket: int, id: str, accept: bool, online: bool, source: str = "") -> dict:
        return self._client.pull_weights(id, accept, online, source)

    def _order_cancel_weights(self, ticket: int, id: str) -> dict:
        return self._client.cancel_weights(id)

    def _order_remove_weights(self, ticket: int, id: str) -> dict:
        return self._client.remove_weights(id)

    # Listening

    def _listen(self) -> None:
        """Passes on what happened to the jobs."""
        if self._process is not None and self._process.poll() is not None:
            self._process = None  # another Blender's answers, or the connection breaks next
        self._learn_device()
        pictures: dict[str, str] = {}
        changed: list[str] = []
        for event in self._client.poll(LISTEN):
            if event["kind"] == "preview":
                pictures[event["job"]] = event["artifact"]  # of several, the newest
            elif event["kind"] in ("stage", "progress", "log"):
                self._tell("event", event=event)
            elif event["job"] not in changed:
                changed.append(event["job"])
        for name in changed:
            with self._removed_meanwhile():
                self._tell("job", job=self._client.job(name))
        for name, artifact in pictures.items():
            with self._removed_meanwhile():
                self._fetch_picture(name, artifact)

    @staticmethod
    @contextmanager
    def _removed_meanwhile() -> Iterator[None]:
        """What is told of a job that somebody has just removed is nothing to fail over."""
        try:
            yield
        except KilnError as error:
            if error.code not in ("no-job", "no-artifact"):
                raise

    def _learn_device(self) -> None:
        """The worker that knows the device starts after the server answers: asks again until it says."""
        hello = self._state["hello"]
        if hello["device"].get("kind", "unknown") == "unknown" and time.monotonic() > self._device_asked + 2.0:
            self._device_asked = time.monotonic()
            self._tell_state("running", hello={**hello, "device": self._client.status()["device"]})

    def _fetch_picture(self, job: str, artifact: str) -> None:
        path = self._pictures / f"{job}-{artifact[:16]}.png"
        if not path.exists():
            picture, part = self._client.blob(artifact), path.with_suffix(".part")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                part.write_bytes(picture)
                os.replace(part, path)
            except OSError as error:  # a full disk costs the picture, not the connection
                if not self._disk_told:
                    self._disk_told = True
                    words = f"A preview cannot be written: {error.strerror or error}: {path.parent}."
                    self._tell("trouble", error=KilnError("disk", words, "Make room on the disk of temporary files.").to_wire())
                return
            self._disk_told = False
        self._tell("preview", job=job, path=path)
