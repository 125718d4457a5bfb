"""What computes the items of a batch: the backend of this machine or another (local.py), or a Ray cluster (ray_engine.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from protocol.errors import KilnError

Kind = Literal["stage", "progress", "log", "done", "failed", "cancelled"]
FINAL: tuple[Kind, ...] = ("done", "failed", "cancelled")
ENDS_ALL = ("unavailable", "refused", "no-space")


@dataclass(frozen=True)
class Event:
    """News of a job. `stage` and `fraction` (of that stage, 0 to 1) say how far it is; `text` is for people; `error` goes with `failed`."""

    id: str  # of the job
    kind: Kind
    stage: str = ""
    fraction: float = 0.0
    text: str = ""
    error: KilnError | None = None


class Engine(Protocol):
    """One thread owns an engine: no method is called from two.

    What a single item meets comes as a `failed` event, or as a KilnError of `submit` and `fetch`. What ends the whole run, such as a
    backend that is gone for good or a disk without room, is a KilnError with a code of `ENDS_ALL`.
    """

    slots: int  # jobs that run at once; the run keeps about slots + 1 submitted

    def submit(self, key: str, recipe: str, values: dict[str, Any], inputs: dict[str, Path], title: str) -> str:
        """Queues a job and returns its id. The same key (at most 100 characters) gives the same job, also to another process after a crash:
        one that waits, runs or is done as it is (its end comes as an event once more); one that failed or was cancelled runs again.

        values: every parameter of the recipe by its flat name. inputs: the name of each file on the wire -> the file.
        """

    def poll(self, timeout: float) -> list[Event]:
        """The news since the last call, of jobs that this engine was given; waits up to `timeout` seconds for the first."""

    def fetch(self, id: str, folder: Path) -> None:
        """Writes all results of a job that is done into the folder, under their names."""

    def forget(self, id: str) -> None:
        """Frees what a job that has ended holds: its results, and inputs that no other job refers to. Harmless twice."""

    def cancel(self, id: str) -> None:
        """Stops a job; its last event follows. One that has ended stays as it is."""

    def close(self) -> None:
        """Ends the connection. Jobs that are under way go on, and `submit` with their key finds them again. Harmless twice."""
