"""What goes from the store, and when.

A limit of bytes (KILN_STORE_GB) and one of age (KILN_STORE_DAYS) hold together, looked at every ten minutes:

- Jobs that wait or run, and done ones whose results nobody has taken yet, stay, with all their files, whatever the limits say.
- Other jobs go, with the files that only they refer to, once they ended longer ago than the limit of age.
- Over the limit of bytes, finished stages go first, the longest unused ones before others: they only save time. Then the jobs that
  may go, those that ended first before others.

What still does not fit is refused with a sentence (`no-space`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from backend.jobs import ENDED, Jobs
from backend.store import size_of
from protocol.errors import KilnError


def _setting(name: str, default: float) -> float:
    try:
        return max(0.0, float(os.environ.get(name, default)))
    except ValueError:
        return default


@dataclass(frozen=True)
class Limits:
    """bytes: of artifacts, unfinished uploads and stages together. seconds: since a job's end."""

    bytes: int
    seconds: float

    @classmethod
    def of_environment(cls) -> Limits:
        """0 in either stands for no limit."""
        return cls(int(_setting("KILN_STORE_GB", 50.0) * 1e9) or sys.maxsize, _setting("KILN_STORE_DAYS", 30.0) * 86400 or float("inf"))


def may_go(job: dict[str, Any]) -> bool:
    """Whether a job has ended and nobody waits for what it has."""
    return job["state"] in ("failed", "cancelled") or job["state"] == "done" and job["taken"] is not None


def clean(jobs: Jobs, limits: Limits, dry_run: bool = False, now: float | None = None) -> dict[str, Any]:
    """Makes the limits hold as far as the rules above allow. Returns `jobs`: the ids that went (or would), `stages`: how many, and
    `freed`: bytes, about."""
    now = time.time() if now is None else now
    ended = sorted((job for job in jobs.list() if may_go(job)), key=lambda job: job["finished"] or 0.0)
    own = jobs.store.own_bytes()
    used = jobs.store.used()
    going = [job["id"] for job in ended if now - (job["finished"] or 0.0) > limits.seconds]
    freed = sum(own.get(id, 0) for id in going)
    stages = 0
    for _, size, path in sorted(_stages(jobs)):
        if used - freed <= limits.bytes:
            break
        if not dry_run:
            try:
                path.unlink()
            except OSError:  # a worker reads it, on Windows
                continue
        stages, freed = stages + 1, freed + size
    for job in ended:
        if used - freed <= limits.bytes:
            break
        if job["id"] not in going:
            going.append(job["id"])
            freed += own.get(job["id"], 0)
    if not dry_run:
        for id in going:
            with contextlib.suppress(KilnError):  # removed or retried meanwhile
                jobs.remove(id)
    return {"jobs": going, "stages": stages, "freed": freed}


def make_room(jobs: Jobs, limits: Limits, missing: int) -> None:
    """Frees so many bytes, as far as may be: what takes the last of a disk may be finished stages alone."""
    clean(jobs, dataclasses.replace(limits, bytes=max(0, min(limits.bytes, jobs.store.used()) - missing)))


def show(jobs: Jobs, limits: Limits) -> dict[str, Any]:
    """Where the store lies, what is in it, and what the limits are: bytes and seconds."""
    store = jobs.store
    listed, own = jobs.list(), store.own_bytes()
    untaken = [job["id"] for job in listed if job["state"] == "done" and job["taken"] is None]
    return {
        "folder": str(store.root),
        "bytes": {name: size_of(folder) for name, folder in _places(jobs).items()},
        "limit": limits.bytes if limits.bytes < sys.maxsize else None,
        "days": limits.seconds / 86400 if limits.seconds < float("inf") else None,
        "jobs": dict(Counter(job["state"] for job in listed)),
        "untaken": {"jobs": untaken, "bytes": sum(own.get(id, 0) for id in untaken)},
        "unfinished": {
            "jobs": [job["id"] for job in listed if job["state"] not in ENDED],
            "bytes": sum(own.get(job["id"], 0) for job in listed if job["state"] not in ENDED),
        },
    }


def _places(jobs: Jobs) -> dict[str, Any]:
    store = jobs.store
    return {"artifacts": store.artifacts, "uploads": store.uploads, "stages": store.stages, "logs": store.logs}


def _stages(jobs: Jobs) -> list[tuple[float, int, Any]]:
    """Finished stages: (last use, bytes, path)."""
    found = []
    for path in jobs.store.stages.iterdir():
        with contextlib.suppress(OSError):
            state = path.stat()
            found.append((state.st_mtime, state.st_size, path))
    return found
