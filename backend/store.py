"""What the backend keeps on disk: the job table and event log in SQLite (WAL), artifacts as files named by their SHA-256.

    kiln.sqlite         jobs, events, and which job refers to which artifact; one backend at a time holds it
    artifacts/ab/abcd…  whole files, never changed
    uploads/abcd….part  uploads that a client has not finished; it may go on where it stopped
    stages/             finished stages, kept by pipelines/run.py
    runs/               inputs and results of the job that runs now
    temporary/          files on their way to a place above
    logs/               what the worker printed

Every call is safe from any thread. Nothing here knows what a job means; jobs.py does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from backend import disk
from protocol.errors import KilnError

SCHEMA = 1  # PRAGMA user_version; a change adds a step to _migrate
RESERVE = 8_000_000  # bytes that stay free for the job table
BALLAST = 2_000_000  # bytes given back to a full disk so that the table can still say that it is full
WANTED_SECONDS = 3600.0  # an artifact that no job refers to yet stays this long after a client asked for it or sent it
PART_SECONDS = 7 * 86400.0  # an unfinished upload stays this long
COUNTED_SECONDS = 10.0  # for which the bytes used are taken as counted, with what was let in since
CHUNK = 1 << 20

_HASH = re.compile("[0-9a-f]{64}")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)", re.IGNORECASE)  # devices on Windows, whatever the suffix


def check_hash(hash: object) -> str:
    """`hash` if it is a SHA-256 in lower-case hex, else `KilnError("bad-hash")`. Keeps file names out of the artifact folder's paths."""
    if isinstance(hash, str) and _HASH.fullmatch(hash):
        return hash
    raise KilnError(
        "bad-hash", f"{str(hash)[:80]!r} is not an artifact's hash.", "Give the SHA-256 of its bytes as 64 lower-case hex digits."
    )


def check_name(name: Any) -> str:
    """`name` if it is a relative path with forward slashes that stays in its folder on every system, else `KilnError("bad-input")`."""
    parts = name.split("/") if isinstance(name, str) and len(name) <= 240 else []
    fits = 1 <= len(parts) <= 8 and not any(
        part in ("", ".", "..")
        or part[-1] in ". "
        or _RESERVED.match(part)
        or any(c in '\\:*?"<>|' or ord(c) < 32 or ord(c) == 127 for c in part)
        for part in parts
    )
    if not fits:
        raise KilnError("bad-input", f"{str(name)[:80]!r} cannot name an input file.", "Use a relative path such as 'views/color_000.png'.")
    return name


class Store:
    """`root` is created if needed. `quota`: most bytes of artifacts, uploads and stages together; None leaves that to the disk."""

    def __init__(self, root: Path, quota: int | None = None):
        self.root, self.quota = Path(root), quota
        self.artifacts, self.uploads, self.stages = self.root / "artifacts", self.root / "uploads", self.root / "stages"
        self.runs, self.temporary, self.logs = self.root / "runs", self.root / "temporary", self.root / "logs"
        self.lock = threading.RLock()
        self._depth = 0
        self._wanted: dict[str, float] = {}
        self._counted, self._counted_at = 0, float("-inf")  # bytes used, and when that was looked up
        self.make_room: Callable[[int], None] = lambda missing: None  # asked to free so many bytes before others are refused
        self._uploading: set[Path] = set()
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with disk.full_disk_named(self.root):
            for folder in (self.artifacts, self.uploads, self.stages, self.runs, self.temporary, self.logs):
                folder.mkdir(exist_ok=True)
            self._database = self._open()
        self._sweep()

    def close(self) -> None:
        with self.lock:
            self._database.close()

    # -- Artifacts ----------------------------------------------------------------------------------------------------------------

    def has(self, hash: str) -> bool:
        """Whether the artifact is here. If it is, it stays for an hour even if no job refers to it, so that a client need not send it."""
        with self.lock:
            if not self._path(hash).is_file():
                return False
            self._wanted[hash] = time.monotonic()
            return True

    def path(self, hash: str) -> Path:
        """The artifact's file, to be read only; `KilnError("no-artifact")` if it is not here."""
        path = self._path(hash)
        if not path.is_file():
            raise KilnError("no-artifact", f"The backend has no artifact {hash[:12]}….", "Its job may have been removed; run it again.")
        return path

    def size(self, hash: str) -> int:
        return self.path(hash).stat().st_size

    def put(self, content: bytes | Path, take: bool = False, durable: bool = True) -> str:
        """Stores bytes or a file's content and returns its hash. `take`: moves the file, which must lie on the store's own disk."""
        if isinstance(content, bytes):
            hash, size = hashlib.sha256(content).hexdigest(), len(content)
            chunks: Iterable[bytes] = [content]
        else:
            with open(content, "rb") as file:
                hash, size = hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size
            chunks = _chunks(content)
        target = self._path(hash)
        with self.lock:
            self._wanted[hash] = time.monotonic()  # from here on nobody collects it
        if self.is_whole(hash):  # a damaged one is replaced
            if take and isinstance(content, Path):
                content.unlink()
        elif take and isinstance(content, Path):
            with disk.full_disk_named(self.root), open(content, "rb+") as file:
                os.fsync(file.fileno())
            disk.move(content, target, durable)
        else:
            self.check_space(size)
            disk.write(target, chunks, self.temporary, durable)
        return hash

    def upload(self, hash: str, size: int) -> Upload:
        """An upload of `size` bytes with that hash; it goes on where an earlier one stopped. `KilnError("no-space")` if it cannot fit."""
        check_hash(hash)
        with self.lock:
            path, number = self.uploads / f"{hash}.part", 1
            while path in self._uploading:  # two clients send the same file at once: each its own part
                path, number = self.uploads / f"{hash}-{number}.part", number + 1
            there = path.stat().st_size if path.is_file() else 0
            self.check_space(max(size - there, 0))
            self._uploading.add(path)
        try:
            return Upload(self, path, hash, size)
        except BaseException:
            self._uploading.discard(path)
            raise

    def is_whole(self, hash: str) -> bool:
        """Whether the artifact is here and its bytes are still what its hash says."""
        try:
            with open(self._path(hash), "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == hash
        except FileNotFoundError:
            return False

    def discard(self, hash: str) -> None:
        """Removes an artifact whose bytes turned out damaged, whoever refers to it, so that the next upload sends it again."""
        with self.lock:
            self._wanted.pop(hash, None)
            self._path(hash).unlink(missing_ok=True)

    def collect(self, hashes: Iterable[str] | None = None) -> int:
        """Removes the artifacts that no job refers to and nobody has just asked for, of `hashes` or of all; returns the bytes freed."""
        freed = 0
        with self.lock:
            now = time.monotonic()
            self._wanted = {hash: at for hash, at in self._wanted.items() if now - at < WANTED_SECONDS}
            referred = {hash for (hash,) in self._database.execute("SELECT DISTINCT hash FROM refs")} if hashes is None else None
            for hash in [path.name for path in self.artifacts.glob("*/*")] if hashes is None else hashes:
                used = hash in referred if referred is not None else self._is_referred(hash)
                if used or hash in self._wanted:
                    continue
                path = self._path(hash)
                with contextlib.suppress(OSError):  # gone already, or still being downloaded on Windows: the next sweep takes it
                    size = path.stat().st_size
                    path.unlink()
                    freed += size
        return freed

    def check_space(self, needed: int) -> None:
        """`KilnError("no-space")` unless `needed` more bytes fit beside what the job table needs."""
        missing = needed + RESERVE - shutil.disk_usage(self.root).free
        if missing > 0:
            self.make_room(missing)
            if shutil.disk_usage(self.root).free < needed + RESERVE:
                raise disk.no_space(self.root, needed)
        if self.quota is None:
            return
        if time.monotonic() - self._counted_at > COUNTED_SECONDS or self._counted + needed > self.quota:
            self._count()
        if self._counted + needed > self.quota:
            self.make_room(self._counted + needed - self.quota)
            self._count()
            if self._counted + needed > self.quota:
                raise disk.no_space(self.root, needed, self.quota)
        self._counted += needed

    def _count(self) -> None:
        self._counted, self._counted_at = self.used(), time.monotonic()

    def used(self) -> int:
        """Bytes of artifacts, unfinished uploads and stages."""
        return sum(size_of(folder) for folder in (self.artifacts, self.uploads, self.stages))

    def own_bytes(self) -> dict[str, int]:
        """Of each job, the bytes of the artifacts that no other job refers to."""
        with self.lock:
            rows = self._database.execute("SELECT MIN(job), hash FROM refs GROUP BY hash HAVING COUNT(DISTINCT job) = 1").fetchall()
        found: dict[str, int] = {}
        for job, hash in rows:
            with contextlib.suppress(OSError):
                found[job] = found.get(job, 0) + self._path(hash).stat().st_size
        return found

    def _path(self, hash: str) -> Path:
        check_hash(hash)
        return self.artifacts / hash[:2] / hash

    def _is_referred(self, hash: str) -> bool:
        return self._database.execute("SELECT 1 FROM refs WHERE hash = ? LIMIT 1", (hash,)).fetchone() is not None

    def _sweep(self) -> None:
        """Clears what an earlier backend left when it was killed."""
        for folder in (self.temporary, self.runs):
            for left in folder.iterdir():
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)
        now = time.time()
        for part in self.uploads.iterdir():
            if now - part.stat().st_mtime > PART_SECONDS:
                part.unlink(missing_ok=True)
        for path in self.artifacts.glob("*/*"):
            if now - path.stat().st_mtime < WANTED_SECONDS:
                self._wanted[path.name] = time.monotonic()  # a client may have sent it just before the backend died
        self.collect()
        self._ballast()

    # -- Jobs and events ----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self, durable: bool = False) -> Iterator[None]:
        """All changes inside happen or none. `durable`: they survive a power cut; without it, a kill of any process."""
        with self.lock:
            if self._depth:
                yield
                return
            for attempt in (1, 2):
                try:
                    self._database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                    self._database.execute("BEGIN IMMEDIATE")
                    break
                except sqlite3.Error as error:
                    if attempt == 2 or not self._drop_ballast(error):
                        raise
            self._depth = 1
            try:
                with disk.full_disk_named(self.root):
                    yield
                    self._database.execute("COMMIT")
            except BaseException as error:
                with contextlib.suppress(sqlite3.Error):  # SQLite rolls back by itself when the disk is full
                    self._database.execute("ROLLBACK")
                self._drop_ballast(error)
                raise
            finally:
                self._depth = 0

    def load_jobs(self) -> list[dict[str, Any]]:
        """Every job as it was saved, in the order of the queue."""
        with self.lock:
            return [json.loads(job) for (job,) in self._database.execute("SELECT job FROM jobs ORDER BY position")]

    def save_job(self, job: dict[str, Any]) -> None:
        """Inserts or replaces; call inside a transaction. Artifacts that it names as inputs and results stay until the job is removed."""
        self._database.execute(
            "INSERT INTO jobs (id, request, position, job) VALUES (:id, :request, :position, :job)"
            " ON CONFLICT (id) DO UPDATE SET position = :position, job = :job",
            {"id": job["id"], "request": job["request"], "position": job["position"], "job": json.dumps(job)},
        )
        named = [*job["inputs"].values(), *(result["hash"] for result in job["results"].values())]
        self._refer(job["id"], 0, named)

    def add_event(self, event: dict[str, Any], artifacts: Iterable[str] = ()) -> None:
        """Appends; call inside a transaction. The artifacts it shows stay as long as the event."""
        self._database.execute(
            "INSERT INTO events (job, number, kind, event) VALUES (?, ?, ?, ?)",
            (event["job"], event["number"], event["kind"], json.dumps(event)),
        )
        self._refer(event["job"], event["number"], artifacts)

    def events(self, job: str, after: int = 0) -> list[dict[str, Any]]:
        with self.lock:
            rows = self._database.execute("SELECT event FROM events WHERE job = ? AND number > ? ORDER BY number", (job, after))
            return [json.loads(event) for (event,) in rows]

    def last_number(self, job: str) -> int:
        with self.lock:
            return self._database.execute("SELECT COALESCE(MAX(number), 0) FROM events WHERE job = ?", (job,)).fetchone()[0]

    def thin_events(self, job: str, kind: str, keep: int) -> None:
        """Forgets all but the newest `keep` events of one kind, and the artifacts that only those showed."""
        with self.transaction():
            old = "SELECT number FROM events WHERE job = ? AND kind = ? ORDER BY number DESC LIMIT -1 OFFSET ?"
            numbers = [number for (number,) in self._database.execute(old, (job, kind, keep))]
            freed = []
            for number in numbers:
                freed += self._database.execute("SELECT hash FROM refs WHERE job = ? AND number = ?", (job, number)).fetchall()
                self._database.execute("DELETE FROM refs WHERE job = ? AND number = ?", (job, number))
                self._database.execute("DELETE FROM events WHERE job = ? AND number = ?", (job, number))
        self.collect([hash for (hash,) in freed])

    def remove_job(self, job: str) -> None:
        """Removes a job, its events and the artifacts that no other job refers to."""
        with self.transaction(durable=True):
            freed = self._database.execute("SELECT DISTINCT hash FROM refs WHERE job = ?", (job,)).fetchall()
            for table, column in (("jobs", "id"), ("events", "job"), ("refs", "job")):
                self._database.execute(f"DELETE FROM {table} WHERE {column} = ?", (job,))
        self.collect([hash for (hash,) in freed])

    def _refer(self, job: str, number: int, hashes: Iterable[str]) -> None:
        for hash in hashes:
            self._database.execute("INSERT OR IGNORE INTO refs (job, number, hash) VALUES (?, ?, ?)", (job, number, hash))
            self._wanted.pop(hash, None)  # the reference keeps it from here on

    # -- The database file --------------------------------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        file = self.root / "kiln.sqlite"
        database = sqlite3.connect(file, timeout=5, isolation_level=None, check_same_thread=False)
        try:
            # The lock belongs to the process, so it cannot be left behind, and no second backend can run the same jobs.
            database.execute("PRAGMA locking_mode = EXCLUSIVE")
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA wal_autocheckpoint = 128")  # pages: a log of half a megabyte, small beside the ballast
            database.execute("BEGIN IMMEDIATE")
            self._migrate(database)
            database.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            database.close()
            if disk.is_full(error):
                raise
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise KilnError(
                    "store-in-use", f"Another backend, or another program, holds {file}.", "Use the running backend, or end it first."
                ) from None
            raise KilnError(
                "store-damaged", f"The job table {file} cannot be read: {error}.", f"Rename {file.name} and start again; artifacts stay."
            ) from error
        except BaseException:
            database.close()
            raise
        return database

    def _migrate(self, database: sqlite3.Connection) -> None:
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA:
            raise KilnError(
                "store-too-new",
                f"{self.root} was written by a newer Kiln (table version {version}, this one knows {SCHEMA}).",
                "Update Kiln.",
            )
        if version < 1:
            database.execute("CREATE TABLE jobs (id TEXT PRIMARY KEY, request TEXT UNIQUE, position INTEGER NOT NULL, job TEXT NOT NULL)")
            database.execute(
                "CREATE TABLE events (job TEXT, number INTEGER, kind TEXT NOT NULL, event TEXT NOT NULL, PRIMARY KEY (job, number))"
                " WITHOUT ROWID"
            )
            database.execute(  # number: the event that shows the artifact; 0 for a job's inputs and results
                "CREATE TABLE refs (job TEXT, number INTEGER, hash TEXT, PRIMARY KEY (job, number, hash)) WITHOUT ROWID"
            )
            database.execute("CREATE INDEX refs_by_hash ON refs (hash)")
        database.execute(f"PRAGMA user_version = {SCHEMA}")

    def _ballast(self) -> None:
        """Two megabytes that a full disk gets back, so that "the disk is full" can still be written down."""
        path = self.root / "ballast"
        if not path.exists() and shutil.disk_usage(self.root).free > 4 * BALLAST:
            with contextlib.suppress(KilnError):  # filled in this very moment: the table does without
                disk.write(path, [secrets.token_bytes(BALLAST)], self.temporary)  # random: file systems compress zeros away

    def _drop_ballast(self, error: BaseException) -> bool:
        cause = error if isinstance(error, sqlite3.Error) else error.__cause__
        path = self.root / "ballast"
        if cause is None or not disk.is_full(cause) or not path.exists():
            return False
        path.unlink(missing_ok=True)
        return True


class Upload:
    """One file on its way in. `offset`: how much is here already; the sender goes on from there."""

    def __init__(self, store: Store, path: Path, hash: str, size: int):
        self.hash, self.size, self._store, self._path = hash, size, store, path
        self._digest = hashlib.sha256()
        with disk.full_disk_named(store.root, size):
            self._file = open(path, "ab+", buffering=0)  # nothing waits in a buffer that a full disk could refuse later
        self.offset = self._file.seek(0, os.SEEK_END)
        if self.offset > size:
            self._file.truncate(0)
            self.offset = 0
        self._file.seek(0)
        while chunk := self._file.read(CHUNK):
            self._digest.update(chunk)

    def write(self, content: bytes | memoryview) -> None:
        """Appends. More than was announced is refused with `KilnError("bad-hash")`."""
        if self.offset + len(content) > self.size:
            self.abort(keep=False)
            raise KilnError("bad-hash", f"More than the announced {self.size} bytes were sent.", "Send the file again.")
        try:
            with disk.full_disk_named(self._store.root, self.size - self.offset):
                rest = memoryview(content)
                while rest:
                    rest = rest[self._file.write(rest) :]
        except KilnError:
            self.abort(keep=False)
            raise
        self._digest.update(content)
        self.offset += len(content)

    def finish(self) -> str:
        """Makes the file an artifact, if it is what its hash says, else `KilnError("bad-hash")`."""
        found = self._digest.hexdigest()
        if self.offset != self.size or found != self.hash:
            self.abort(keep=False)
            raise KilnError(
                "bad-hash",
                f"{self.offset} of {self.size} bytes arrived, with the hash {found[:12]}… instead of {self.hash[:12]}….",
                "Send the file again.",
            )
        try:
            with disk.full_disk_named(self._store.root):
                os.fsync(self._file.fileno())
            self._file.close()
            with self._store.lock:
                self._store._wanted[self.hash] = time.monotonic()
                if self._store._path(self.hash).is_file():
                    self._path.unlink()  # another client was quicker
                else:
                    disk.move(self._path, self._store._path(self.hash))
        finally:
            self.abort()
        return self.hash

    def abort(self, keep: bool = True) -> None:
        """Ends the upload. `keep`: what arrived stays for a client that comes back. Harmless after `finish`."""
        self._file.close()
        if not keep:
            self._path.unlink(missing_ok=True)
        self._store._uploading.discard(self._path)


def size_of(folder: Path) -> int:
    """Bytes of all files below `folder`; those that vanish meanwhile count nothing."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
