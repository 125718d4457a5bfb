"""Downloads of weights that the server runs for its clients: one at a time, each in a thread, until it is done, cancelled or failed.

Clients come and go; what a download is at is asked for. When the backend ends, what came is kept, and the next `start` goes on.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from backend import fetch, weights
from backend.weights import Entry
from protocol.errors import Cancelled, KilnError

CLOSING = 3.0  # seconds that downloads have to notice that the backend ends
TURN = 0.1  # seconds between looks of a waiting download whether it is cancelled

log = logging.getLogger("kiln")


class _Pull:
    """One download; `state`: waiting, running, cancelling, done, failed or cancelled."""

    def __init__(self) -> None:
        self.state, self.fraction, self.text = "waiting", 0.0, ""
        self.error: dict[str, str] | None = None
        self.stop = threading.Event()
        self.thread: threading.Thread | None = None

    @property
    def active(self) -> bool:
        return self.state in ("waiting", "running", "cancelling")

    def report(self, fraction: float, text: str = "") -> None:
        if self.stop.is_set():
            raise Cancelled
        self.fraction, self.text = fraction, text

    def to_wire(self) -> dict[str, Any]:
        return {"state": self.state, "fraction": self.fraction, "text": self.text, "error": self.error}


def _plan(one: Entry, device: dict[str, Any]) -> dict[str, Any] | None:
    """The memory plan in words; None while nobody knows the device."""
    if device.get("kind", "unknown") == "unknown" or not device.get("free_memory"):
        return None
    try:
        return {"fits": True, "sentence": weights.memory_plan(one.id, device["free_memory"], device["kind"]).sentence}
    except KilnError as refused:
        return {"fits": False, "sentence": f"{refused.message} {refused.hint}"}


class Pulls:
    """Called from any thread."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._turn = threading.Lock()  # one download at a time: more would share the same line
        self._pulls: dict[str, _Pull] = {}

    def list(self, id: str = "", device: dict[str, Any] | None = None) -> dict[str, Any]:
        """One entry, or all, as `weights.describe` tells, each with its download in `pull`, and with what the memory of `device` (as the
        worker describes it) makes of it in `plan`; and what a download would meet."""
        found = [weights.entry(id)] if id else list(weights.entries().values())
        refused = fetch.offline()
        root = weights.root()
        there = next(path for path in (root, *root.parents) if path.exists())
        return {
            "entries": [{**self.describe(one), "plan": _plan(one, device or {})} for one in found],
            "folder": str(root), "free": shutil.disk_usage(there).free,
            "offline": refused.to_wire() if refused is not None else None,
        }  # fmt: skip

    def describe(self, one: Entry) -> dict[str, Any]:
        pull = self._pulls.get(one.id)
        return {**weights.describe(one), "pull": pull.to_wire() if pull is not None else None}

    def start(self, id: str, accept: bool, online: bool, source: str = "") -> dict[str, Any]:
        """Begins a download, or goes on with one; of one that is under way nothing changes. Raises what `fetch.permit` does."""
        one = weights.entry(id)
        given = Path(source) if source else None
        if given is not None and not given.is_absolute():
            raise KilnError("bad-input", f"{source} is no full path.", "Give the path of a folder or a bundle on the backend's machine.")
        with self._guard:
            pull = self._pulls.get(one.id)
            if pull is None or not pull.active:
                fetch.permit(one.id, accept, online, given)
                pull = self._pulls[one.id] = _Pull()
                pull.thread = threading.Thread(target=self._run, args=(one, pull, online, given), name=f"pull {one.id}", daemon=True)
                pull.thread.start()
        return self.describe(one)

    def cancel(self, id: str) -> dict[str, Any]:
        """Ends a download; what came is kept."""
        one = weights.entry(id)
        with self._guard:
            pull = self._pulls.get(one.id)
            if pull is not None and pull.active:
                pull.state = "cancelling"
                pull.stop.set()
        return self.describe(one)

    def remove(self, id: str) -> dict[str, Any]:
        one = weights.entry(id)
        with self._guard:
            pull = self._pulls.get(one.id)
            if pull is not None and pull.active:
                raise KilnError("bad-state", f"{one.title} is being downloaded.", "Cancel the download first.")
            self._pulls.pop(one.id, None)
        fetch.remove(one.id)
        return self.describe(one)

    def idle(self) -> bool:
        return not any(pull.active for pull in list(self._pulls.values()))

    def close(self) -> None:
        """Ends them all, within seconds: a thread that waits for the network is left to die with the process."""
        with self._guard:
            pulls = [pull for pull in self._pulls.values() if pull.active]
            for pull in pulls:
                pull.stop.set()
        until = time.monotonic() + CLOSING
        for pull in pulls:
            if pull.thread is not None:
                pull.thread.join(max(0.0, until - time.monotonic()))

    def _run(self, one: Entry, pull: _Pull, online: bool, source: Path | None) -> None:
        try:
            while not self._turn.acquire(timeout=TURN):
                pull.report(0.0, "Waiting for another download")
            try:
                self._proceed(pull, "running")
                fetch.pull(one.id, False, online, source, pull.report)
            finally:
                self._turn.release()
            pull.fraction, pull.text, pull.state = 1.0, "", "done"
        except Cancelled:
            pull.state = "cancelled"
        except KilnError as refused:
            pull.error, pull.state = refused.to_wire(), "failed"
        except Exception as fault:
            log.exception("A download failed")
            defect = KilnError("internal", f"The download failed: {type(fault).__name__}: {fault}.", "The backend's log says more.")
            pull.error, pull.state = defect.to_wire(), "failed"
        log.info("%s: %s", one.id, pull.state)

    def _proceed(self, pull: _Pull, state: str) -> None:
        with self._guard:
            if pull.stop.is_set():
                raise Cancelled
            pull.state = state
