"""The engine that is Kiln's own backend, on this machine or where a connection file leads.

It outlives the backend: one that was killed is started again where it was this machine's own, and goes on with the jobs in its store; their
events come as if nothing had been.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from backend.batch.engine import FINAL, Event
from backend.store import check_name
from protocol.client import Client
from protocol.errors import KilnError

LOST = ("unavailable", "refused", "timeout")  # what a client says of a backend that is gone, or hangs
TIMES = 5  # that a backend may be lost without having done anything in between
LOOK_SECONDS = 15.0  # between two looks at jobs of which nothing is heard
_T = TypeVar("_T")


class Local:
    """connect: gives a client of a backend that answers, or raises KilnError; once there was one, it is asked for `patience` seconds."""

    def __init__(self, connect: Callable[[], Client], say: Callable[[str], None] = lambda text: None, patience: float = 0.0):
        self._connect, self._say, self._patience = connect, say, patience
        self._met = False
        self._states: dict[str, str] = {}  # of the jobs under way, as last told
        self._again: set[str] = set()  # jobs that were being cancelled when they were submitted anew
        self._events: list[Event] = []
        self._lost, self._looked = 0, 0.0
        self._client: Client | None = None
        self.slots: int = max(1, int(self._open().status().get("workers", 1)))

    def submit(self, key: str, recipe: str, values: dict[str, Any], inputs: dict[str, Path], title: str) -> str:
        job = self._persist(lambda client: client.submit(recipe, values, dict(inputs), title, {"batch": key}, id=key))
        if job["state"] in ("failed", "cancelled"):
            job = self._persist(lambda client: self._retried(client, job, key, recipe, values, inputs, title))
        elif job["state"] == "cancelling":
            self._again.add(job["id"])
        self._states[job["id"]] = job["state"]
        if job["state"] == "done":
            self._events.append(Event(job["id"], "done"))
        elif job["state"] == "running":
            self._events.append(Event(job["id"], "stage", job["stage"], job["fraction"], job["text"]))
        return job["id"]

    def poll(self, timeout: float) -> list[Event]:
        if not self._events:
            for told in self._persist(lambda client: client.poll(timeout)):
                self._hear(told)
            if time.monotonic() > self._looked + LOOK_SECONDS:
                self._look()
        found, self._events = self._events, []
        for event in found:
            if event.kind in FINAL:
                self._states.pop(event.id, None)
        return found

    def fetch(self, id: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, result in self._persist(lambda client: client.job(id))["results"].items():
            target = folder / check_name(name)
            self._persist(lambda client, hash=result["hash"], target=target: client.download(hash, target))  # type: ignore[misc]

    def forget(self, id: str) -> None:
        self._states.pop(id, None)
        try:
            self._persist(lambda client: client.remove(id))
        except KilnError as error:
            if error.code not in ("no-job", "bad-state"):  # gone, or somebody queued it again
                raise

    def cancel(self, id: str) -> None:
        self._again.discard(id)
        try:
            self._persist(lambda client: client.cancel(id))
        except KilnError as error:
            if error.code != "no-job":
                raise

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        self._client = None

    # -- Jobs ---------------------------------------------------------------------------------------------------------------------

    def _retried(
        self, client: Client, job: dict[str, Any], key: str, recipe: str, values: dict[str, Any], inputs: dict[str, Path], title: str
    ) -> dict[str, Any]:
        """A job that had ended badly, queued again; anew where its inputs are no more."""
        try:
            return client.retry(job["id"])
        except KilnError as error:
            if error.code not in ("damaged-input", "no-job"):
                raise
            if error.code == "damaged-input":
                client.remove(job["id"])
            return client.submit(recipe, values, dict(inputs), title, {"batch": key}, id=key)

    def _hear(self, event: dict[str, Any]) -> None:
        id, kind, text = event["job"], event["kind"], event.get("text", "")
        if id not in self._states:
            return
        self._lost = 0
        if kind == "stage":
            self._events.append(Event(id, "stage", event["stage"]))
        elif kind == "started":
            self._states[id] = "running"
            self._events.append(Event(id, "stage", "", 0.0, text))
        elif kind == "progress":
            self._events.append(Event(id, "progress", "", event["fraction"], text))
        elif kind == "log" or kind == "queued" and event["number"] > 1 and text:
            self._events.append(Event(id, "log", text=text))
        elif kind in FINAL:
            self._end(id, kind, event.get("error"))

    def _end(self, id: str, state: Any, error: dict[str, str] | None) -> None:
        """Tells of a job's end, once."""
        if self._states.get(id) in FINAL:
            return
        if state == "cancelled" and id in self._again:
            self._again.discard(id)
            self._states[id] = self._persist(lambda client: client.retry(id))["state"]
            return
        self._states[id] = state
        self._events.append(Event(id, state, error=KilnError.from_wire(error or {}) if state == "failed" else None))

    def _look(self) -> None:
        """Asks for every job under way: of one that somebody removed no event would ever come."""
        self._looked = time.monotonic()
        for id in list(self._states):
            try:
                job = self._persist(lambda client, id=id: client.job(id))  # type: ignore[misc]
            except KilnError as error:
                if error.code != "no-job":
                    raise
                job = {"state": "failed", "error": KilnError("no-job", "The job was removed from the backend.", "").to_wire()}
            if job["state"] in FINAL:
                self._end(id, job["state"], job["error"])

    # -- The backend --------------------------------------------------------------------------------------------------------------

    def _open(self) -> Client:
        give_up = time.monotonic() + self._patience
        while True:
            try:
                client = self._connect()
                try:
                    client.subscribe()
                except BaseException:
                    client.close()
                    raise
            except KilnError as error:
                if error.code not in LOST or not self._met or time.monotonic() >= give_up:
                    raise
                time.sleep(1.0)
            else:
                self._client, self._met = client, True
                self._looked = 0.0  # what happened before is not among its events
                return client

    def _persist(self, action: Callable[[Client], _T]) -> _T:
        """Does something with the backend; when that is lost, with the next one."""
        hint = "What is finished is kept; the same command goes on from there. `kiln doctor` checks this machine."
        while True:
            try:
                return action(self._client or self._open())
            except KilnError as error:
                if error.code not in LOST:
                    raise
                opened, self._lost = self._client is not None, self._lost + 1
                self.close()
                if not opened:
                    raise KilnError("unavailable", f"The backend is gone: {error.message}", f"{error.hint} {hint}".strip()) from error
                if self._lost >= TIMES:
                    words = f"The backend was lost {self._lost} times without getting anything done, the last time so: {error.message}"
                    raise KilnError("unavailable", words, hint) from error
                self._say(f"The backend is gone ({error.message}) It is looked for again.")
