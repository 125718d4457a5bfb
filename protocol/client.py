"""The one client: the extension, the command line and the tests talk to the backend through it. SPEC.md describes what it says.

Every call blocks, at most for its timeout. One thread owns a client; ZeroMQ's sockets must not be shared. When the connection breaks, a
call makes a new one (the connection file is read again, since a restarted backend may have another port) and goes on where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import re
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zmq

from . import VERSION, messages
from .connection import Connection
from .errors import KilnError

PING_AFTER = 5.0  # seconds of silence before the backend is asked whether it lives
PING_WAIT = 15.0  # seconds it then has
CONNECT_SECONDS = 5.0  # for one attempt, which on this machine takes a few milliseconds
MOST_EVENTS = 20_000  # pushed events kept for `poll`; those beyond are asked for again
LISTED = 4000  # jobs whose last event number is told when a subscription is renewed
BLOB_BYTES = 64_000_000
FINAL = ("done", "failed", "cancelled")

_BROKEN = (
    zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)  # fmt: skip


class _Lost(KilnError):
    """The connection broke; a new one may do."""

    def __init__(self, message: str, hint: str = "Start the backend, or look into its log.", code: str = "unavailable"):
        super().__init__(code, message, hint)


class Client:
    """timeout: seconds that a reply may take. patience: seconds that a lost backend is looked for again before a call fails."""

    def __init__(self, connection: Connection, timeout: float = 10.0, patience: float = 3.0, name: str = ""):
        if not zmq.has("curve"):
            raise KilnError(
                "no-curve",
                "This build of ZeroMQ cannot encrypt, and Kiln does not talk in the clear.",
                "Reinstall pyzmq: pip install -U pyzmq",
            )
        self.connection, self.timeout, self.patience = connection, timeout, patience
        self.name = name or f"Kiln {VERSION}"
        self._id = secrets.token_hex(16)  # the backend knows by it that a new connection replaces an old one
        self._count = 0
        self._context = zmq.Context()
        self._socket: zmq.Socket | None = None
        self._monitor: zmq.Socket | None = None
        self._hello: dict[str, Any] = {}
        self._met = False  # whether the backend ever answered
        self._heard = self._pinged = 0.0
        self._awaited: set[str] = set()
        self._replies: dict[str, dict[str, Any]] = {}
        self._subscribed = False  # to every job
        self._since: float | None = None  # by the backend's clock
        self._numbers: dict[str, int] = {}  # of the last event that arrived, of each subscribed job
        self._events: deque[dict[str, Any]] = deque()  # arrived, not yet polled
        self._overflowed = False
        self._upload: dict[str, Any] = {}  # the one under way: number, credit, error
        self._download: dict[str, Any] = {}  # the one under way: number, chunks

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection at once; the client cannot be used afterwards. Harmless twice."""
        self._disconnect()
        self._context.destroy(linger=0)

    # -- Questions ----------------------------------------------------------------------------------------------------------------

    def hello(self) -> dict[str, Any]:
        """What the backend said of itself when this connection was made: protocol, version, host, device, limits."""
        self._request("ping")
        return dict(self._hello)

    def status(self) -> dict[str, Any]:
        """version, pid, uptime, device, jobs by state, clients, disk_free: see SPEC.md."""
        return self._request("status")

    def ping(self) -> float:
        """Seconds that an answer takes."""
        start = time.monotonic()
        self._request("ping")
        return time.monotonic() - start

    # -- Jobs ---------------------------------------------------------------------------------------------------------------------

    def submit(
        self,
        recipe: str,
        values: dict[str, Any],
        inputs: dict[str, Path | bytes | str],
        title: str = "",
        source: dict[str, Any] | None = None,
        progress: Callable[[int, int], None] | None = None,
        id: str | None = None,
    ) -> dict[str, Any]:
        """Sends what the backend lacks of the inputs and queues a job; returns the job.

        inputs: file name -> the file, its bytes, or the hash of a file that the backend has from another job. progress(sent, total): bytes
        of the inputs that the backend has. id: the submission's own; the same id again, even from another client, gives the job of the
        first time. A broken connection does not make two jobs.
        """
        id = id or self._new_id()
        contents = {name: _content(name, content) for name, content in inputs.items() if not isinstance(content, str)}
        hashes = {name: content if isinstance(content, str) else contents[name][0] for name, content in inputs.items()}
        fields = {"recipe": recipe, "values": values, "inputs": hashes, "title": title, "source": source or {}}
        messages.pack({"type": "submit", "id": id, **fields})  # too large is said before anything is sent
        for attempt in (1, 2):
            self.upload({hash: (size, content) for hash, size, content in contents.values()}, progress)
            try:
                return _job(self._request("submit", id=id, **fields)["job"])
            except KilnError as error:
                if error.code != "no-artifact" or attempt == 2:  # once more: the store was cleaned in between
                    raise
        raise AssertionError("unreachable")

    def jobs(self) -> list[dict[str, Any]]:
        """Every job, oldest first, without its `inputs`."""
        found: dict[str, dict[str, Any]] = {}
        after = ""
        while True:
            page = self._request("jobs", after=after)
            if after and page["first"]:  # the job that the last page ended with is gone: from the start
                found.clear()
            found.update((job["id"], _job(job)) for job in page["jobs"])
            if not page["more"]:
                return list(found.values())
            after = page["jobs"][-1]["id"]

    def job(self, id: str) -> dict[str, Any]:
        return _job(self._request("job", job=id)["job"])

    def events(self, id: str, after: int = 0) -> list[dict[str, Any]]:
        """The job's stored events with numbers above `after`."""
        found: list[dict[str, Any]] = []
        while True:
            page = self._request("events", job=id, after=after)
            found += page["events"]
            if not page["more"]:
                return found
            after = found[-1]["number"]

    def cancel(self, id: str) -> dict[str, Any]:
        return _job(self._request("cancel", job=id)["job"])

    def retry(self, id: str) -> dict[str, Any]:
        return _job(self._request("retry", job=id)["job"])

    def take(self, id: str) -> dict[str, Any]:
        """Tells the backend that this client has what it wants of a done job's results: they may go when room is needed."""
        return _job(self._request("take", job=id)["job"])

    def remove(self, id: str) -> None:
        tries = []

        def remove() -> None:
            tries.append(id)
            self._exchange("remove", job=id)

        try:
            self._persist(remove)
        except KilnError as error:
            if error.code != "no-job" or len(tries) == 1:  # gone at the second try: the reply to the first was lost
                raise

    def shutdown(self, now: bool = True) -> None:
        """Ends the backend: now, and what runs resumes at its next start; or when nothing is queued or running."""
        self._request("shutdown", mode="now" if now else "idle")

    def store(self) -> dict[str, Any]:
        """What the backend keeps on its disk (SPEC.md, Housekeeping)."""
        return self._request("store")

    def clean_store(self, bytes: int | None = None, seconds: float | None = None, dry_run: bool = False) -> dict[str, Any]:
        """Makes these limits hold, the backend's own where they are None, as far as its rules allow; what went, or would."""
        return self._request("clean", bytes=bytes, seconds=seconds, dry_run=dry_run)

    def rotate_keys(self) -> None:
        """Makes the backend take new keys. Every connection ends, this one too; connection files of before let nobody in any more."""
        self._request("rotate")

    def release(self) -> None:
        """Networks that the backend keeps in memory for a next job go at once, or when the job that runs has ended."""
        self._request("release")

    # -- Weights ------------------------------------------------------------------------------------------------------------------

    def weights(self, id: str = "") -> dict[str, Any]:
        """The registry of weights, or one entry of it, and how each stands: entries, folder, free, offline. See SPEC.md."""
        return self._request("weights", entry=id)

    def pull_weights(self, id: str, accept: bool = False, online: bool = True, source: str = "") -> dict[str, Any]:
        """Begins a download, or goes on with one, and returns the entry; `weights` tells how far it is. accept: the user agrees to the
        licences. source: a folder or a bundle on the backend's machine to take the files from."""
        return self._request("weights.pull", entry=id, accept=accept, online=online, source=source)["entry"]

    def cancel_weights(self, id: str) -> dict[str, Any]:
        """Ends a download; what came is kept."""
        return self._request("weights.cancel", entry=id)["entry"]

    def remove_weights(self, id: str) -> dict[str, Any]:
        return self._request("weights.remove", entry=id)["entry"]

    # -- Events -------------------------------------------------------------------------------------------------------------------

    def subscribe(self) -> None:
        """From now on the backend sends the events of every job; `poll` returns them."""
        if not self._subscribed:
            self._subscribed = True
            self._persist(self._renew)

    def poll(self, timeout: float = 0.0) -> list[dict[str, Any]]:
        """The events that arrived since the last call; waits up to `timeout` seconds for the first. Misses none, repeats none."""
        until = time.monotonic() + timeout
        self._persist(self._listen, until)
        found = list(self._events)
        self._events.clear()
        return found

    def watch(self, id: str, after: int = 0, timeout: float | None = None, patience: float = 60.0) -> Iterator[dict[str, Any]]:
        """A job's events with numbers above `after`, as they come, until it ends. Survives a restart of the backend.

        timeout: seconds for all of it, then `KilnError("timeout")`. patience: seconds that a lost backend is looked for.
        """
        until = time.monotonic() + timeout if timeout is not None else float("inf")
        past = self.events(id, after)
        if not past and self.job(id)["state"] in FINAL:
            yield from self.events(id, after)  # it may have ended between the two questions
            return
        for event in past:
            after = event["number"]
            yield event
        if past and past[-1]["kind"] in FINAL:  # one further back was followed by a retry
            return
        if not self._subscribed:
            self._numbers[id] = after
            self._persist(self._renew, patience=patience)
        try:
            while True:
                for event in [event for event in self._events if event["job"] == id]:
                    self._events.remove(event)
                    if event["number"] > after:
                        after = event["number"]
                        yield event
                        if event["kind"] in FINAL:
                            return
                if time.monotonic() >= until:
                    raise KilnError("timeout", f"Job {id} did not end within {timeout:g} s.", "It goes on in the backend.")
                self._persist(self._listen, min(until, time.monotonic() + 1.0), patience=patience)
        finally:
            if not self._subscribed:
                self._numbers.pop(id, None)

    # -- Files --------------------------------------------------------------------------------------------------------------------

    def upload(self, files: dict[str, tuple[int, Path | bytes]], progress: Callable[[int, int], None] | None = None) -> None:
        """Sends what the backend lacks of `files`: hash -> (size, content)."""
        hashes, missing = list(files), []
        for start in range(0, len(hashes), messages.LIST_LENGTH):
            missing += self._request("missing", hashes=hashes[start : start + messages.LIST_LENGTH])["missing"]
        total = sum(size for size, _ in files.values())
        there = total - sum(files[hash][0] for hash in missing)
        report = progress or (lambda sent, total: None)
        report(there, total)
        small = [hash for hash in missing if files[hash][0] <= messages.CHUNK_BYTES]
        for start in range(0, len(small), messages.TRANSFERS):
            group = small[start : start + messages.TRANSFERS]
            self._persist(self._send_small, [(hash, *files[hash]) for hash in group])
            there += sum(files[hash][0] for hash in group)
            report(there, total)
        for hash in missing:
            size, content = files[hash]
            if size > messages.CHUNK_BYTES:
                self._persist(self._send_large, hash, size, content, lambda sent, before=there: report(before + sent, total))
                there += size
        if missing:
            report(total, total)

    def download(self, artifact: str, path: Path | str, progress: Callable[[int], None] | None = None) -> Path:
        """Writes an artifact (its hash) to `path`, whole and verified or not at all. progress(bytes so far).

        What arrived before a break, of this client or of an earlier one, is kept beside `path` and not fetched again.
        """
        path = Path(path)
        _check_hash(artifact)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{artifact[:16]}.part")
        for _ in range(2):
            digest = hashlib.sha256()
            with open(part, "ab+") as file:
                file.seek(0)
                while chunk := file.read(1 << 20):
                    digest.update(chunk)

                def write(chunk: memoryview, file=file, digest=digest) -> None:
                    file.write(chunk)
                    digest.update(chunk)
                    if progress is not None:
                        progress(file.tell())

                try:
                    self._persist(lambda: self._receive_artifact(artifact, file.tell(), write))
                except KilnError as error:
                    if error.code == "no-artifact" and not file.tell():
                        file.close()
                        part.unlink()
                    if error.code != "bad-offset":
                        raise
                    digest = hashlib.sha256()  # the part is longer than the artifact: not a part of it
            if digest.hexdigest() == artifact:
                os.replace(part, path)
                return path
            part.unlink()
        raise KilnError(
            "bad-hash", f"The artifact {artifact[:12]}… arrived damaged, twice.", "The backend's disk may be failing; run the job again."
        )

    def blob(self, artifact: str, most: int = BLOB_BYTES) -> bytes:
        """A small artifact's bytes, such as a preview picture's; verified."""
        _check_hash(artifact)
        found = bytearray()

        def write(chunk: memoryview) -> None:
            found.extend(chunk)

        self._persist(lambda: self._receive_artifact(artifact, len(found), write, most))
        if hashlib.sha256(found).hexdigest() != artifact:
            raise KilnError(
                "bad-hash", f"The artifact {artifact[:12]}… arrived damaged.", "The backend's disk may be failing; run the job again."
            )
        return bytes(found)

    def _send_small(self, files: list[tuple[str, int, Path | bytes]]) -> None:
        """Whole files, one message each, without waiting for one another's replies."""
        ids = []
        for hash, size, content in files:
            blob = content if isinstance(content, bytes) else Path(content).read_bytes()
            if len(blob) != size:
                raise _changed(content)
            ids.append(self._ask("upload", blob, hash=hash, size=size))
        try:
            for id in ids:
                self._answer(id, "upload", max(self.timeout, 60.0))
        finally:
            self._awaited.difference_update(ids)

    def _send_large(self, hash: str, size: int, content: Path | bytes, report: Callable[[int], None]) -> None:
        """One file in chunks, as many on their way as the backend allows, from where an earlier attempt stopped."""
        reply = self._exchange("upload", timeout=max(self.timeout, 120.0), hash=hash, size=size)  # it reads again what it has of the file
        if reply["done"]:
            return
        number, offset = reply["upload"], reply["offset"]
        self._upload = upload = {"number": number, "credit": reply["credit"], "error": None}
        with _reading(content) as file:
            file.seek(offset)
            while offset < size and upload["error"] is None:
                until = time.monotonic() + max(self.timeout, 60.0)  # a disk that writes back may pause for long
                while not upload["credit"] and upload["error"] is None:
                    self._receive(until, "take the next part of a file")
                if upload["error"] is not None:
                    break
                blob = file.read(min(messages.CHUNK_BYTES, size - offset))
                if not blob:
                    raise _changed(content)
                self._send({"type": "chunk", "upload": number, "offset": offset}, blob)
                upload["credit"] -= 1
                offset += len(blob)
                try:
                    report(offset)
                except BaseException:  # given up: a new connection has the backend close the unfinished file, and keep it
                    self._disconnect()
                    raise
                while self._take_next(0.0):
                    pass
        if upload["error"] is not None:
            raise upload["error"]
        self._exchange("finish", timeout=max(self.timeout, 120.0), upload=number)

    def _receive_artifact(self, artifact: str, offset: int, write: Callable[[memoryview], None], most: int | None = None) -> None:
        """Passes an artifact's bytes from `offset` on to `write`, asking for as many chunks at once as a window holds."""
        reply = self._exchange("download", artifact=artifact, offset=offset, credit=messages.WINDOW)
        number, size = reply["download"], reply["size"]
        self._download = download = {"number": number, "chunks": deque(), "error": None}
        taken = 0
        try:
            if most is not None and size > most:
                raise KilnError(
                    "too-large", f"The artifact {artifact[:12]}… has {size} bytes; {most} are expected.", "Download it to a file."
                )
            while offset < size:
                until = time.monotonic() + max(self.timeout, 30.0)
                while not download["chunks"] and download["error"] is None:
                    self._receive(until, "send the next part of a file")
                if download["error"] is not None:
                    raise download["error"]
                at, frame = download["chunks"].popleft()
                chunk = frame.buffer
                if at != offset or not len(chunk):
                    raise KilnError(
                        "bad-message", f"The backend sent byte {at} of a file where byte {offset} was due.", "Update Kiln on both sides."
                    )
                offset += len(chunk)
                taken += 1
                if taken % 4 == 0 and offset < size:
                    self._send({"type": "credit", "download": number, "chunks": 4})
                write(chunk)
        except _Lost:
            raise
        except BaseException:  # given up, or no room: the rest need not come
            self._download = {}
            with contextlib.suppress(KilnError):
                self._send({"type": "stop", "download": number})
            raise
        finally:
            self._download = {}

    # -- Requests and replies -----------------------------------------------------------------------------------------------------

    def _request(self, kind: str, id: str | None = None, **fields: Any) -> dict[str, Any]:
        """One request and its reply, over as many connections as it takes. The same id each time, so that the backend does it once."""
        id = id or self._new_id()
        return self._persist(lambda: self._exchange(kind, id=id, **fields))

    def _persist(self, action: Callable[..., Any], *arguments: Any, patience: float | None = None) -> Any:
        """Runs an action on a connection; when that breaks, on a new one, until `patience` is over."""
        give_up, wait = None, 0.05
        while True:
            try:
                if self._socket is None:
                    self._connect()
                return action(*arguments)
            except _Lost as lost:
                self._disconnect()
                now = time.monotonic()
                if give_up is None:
                    give_up = now + (self.patience if patience is None else patience) if self._met else now
                if now + wait > give_up:
                    raise KilnError(lost.code, lost.message, lost.hint) from None
                time.sleep(wait)
                wait = min(2 * wait, 2.0)
                self._look_again()

    def _look_again(self) -> None:
        """A restarted backend has written another connection file."""
        if self.connection.path is not None:
            with contextlib.suppress(KilnError):
                self.connection = Connection.load(self.connection.path)

    def _exchange(self, kind: str, id: str | None = None, timeout: float | None = None, **fields: Any) -> dict[str, Any]:
        id = self._ask(kind, None, id=id, **fields)
        try:
            return self._answer(id, kind, timeout)
        finally:
            self._awaited.discard(id)

    def _ask(self, kind: str, blob: bytes | None = None, id: str | None = None, **fields: Any) -> str:
        id = id or self._new_id()
        self._awaited.add(id)
        self._send({"type": kind, "id": id, **fields}, blob)
        return id

    def _answer(self, id: str, kind: str, timeout: float | None = None) -> dict[str, Any]:
        until = time.monotonic() + (timeout or self.timeout)
        while id not in self._replies:
            self._receive(until, f"answer {kind!r}")
        header = self._replies.pop(id)
        if header["type"] == "error":
            error = KilnError.from_wire(header.get("error") or {})
            if error.code == "no-hello":  # it forgot us: it was restarted, or we had not read for long
                raise _Lost(error.message, error.hint)
            raise error
        del header["type"], header["to"]
        return header

    def _new_id(self) -> str:
        self._count += 1
        return f"{self._id}-{self._count}-{secrets.token_hex(4)}"

    # -- The socket ---------------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """A new socket, the handshake, `hello`, and the subscriptions of the connection before."""
        where = self.connection
        self._socket = socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.IPV6, int("[" in where.endpoint))
        socket.setsockopt(zmq.RECONNECT_IVL, -1)  # this class reconnects, because it has to say hello again
        socket.setsockopt(zmq.MAXMSGSIZE, messages.REPLY_BYTES + 1024)
        socket.setsockopt(zmq.SNDHWM, 64)
        socket.setsockopt(zmq.RCVHWM, 64)
        socket.setsockopt(zmq.HANDSHAKE_IVL, int(CONNECT_SECONDS * 1000))
        socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15000)
        try:
            socket.setsockopt(zmq.CURVE_SERVERKEY, where.server_key.encode())
            socket.setsockopt(zmq.CURVE_PUBLICKEY, where.client_key.encode())
            socket.setsockopt(zmq.CURVE_SECRETKEY, where.client_secret.encode())
            self._monitor = socket.get_monitor_socket(_BROKEN | zmq.EVENT_HANDSHAKE_SUCCEEDED)
            self._monitor.setsockopt(zmq.LINGER, 0)
            socket.connect(where.endpoint)
        except (zmq.ZMQError, UnicodeEncodeError) as error:
            self._disconnect()
            raise KilnError(
                "bad-connection", f"The connection file names no usable endpoint and keys: {error}.", "Take a fresh one."
            ) from None
        try:
            if not self._monitor.poll(int(min(self.timeout, CONNECT_SECONDS) * 1000)):
                raise _Lost(
                    f"The Kiln backend at {where.endpoint} does not answer.", "Is that machine on, and is its firewall open for this port?"
                )
            event = int.from_bytes(self._monitor.recv_multipart()[0][:2], sys.byteorder)
            if event != zmq.EVENT_HANDSHAKE_SUCCEEDED:
                raise self._explain(event)
            self._heard, self._pinged = time.monotonic(), 0.0
            self._hello = self._exchange("hello", protocol=list(messages.PROTOCOL), client=self._id, name=self.name[:200])
            if self._hello["protocol"][0] != messages.PROTOCOL[0]:
                raise bad_version(messages.PROTOCOL, self._hello["protocol"])
            self._met = True
            if self._subscribed or self._numbers:
                self._renew()
        except BaseException:
            self._disconnect()
            raise

    def _renew(self) -> None:
        """Tells the backend which events to send: those after the last that arrived."""
        fields: dict[str, Any] = {}
        if not self._subscribed or self._since is not None:
            newest = list(self._numbers.items())[-LISTED:]
            fields = {"after": dict(newest), "since": self._since or 0.0}
        self._overflowed = False
        reply = self._exchange("subscribe", all=self._subscribed, **fields)
        for job in reply["gone"]:
            self._numbers.pop(job, None)
        for job, number in reply["numbers"].items():
            self._numbers[job] = max(number, self._numbers.get(job, 0))
        if self._since is None:
            self._since = reply["time"]

    def _disconnect(self) -> None:
        if self._socket is not None:
            if self._monitor is not None:
                self._socket.disable_monitor()
                self._monitor.close(linger=0)
            self._socket.close(linger=0)
        self._socket = self._monitor = None
        self._awaited.clear()
        self._replies.clear()
        self._upload, self._download = {}, {}

    def _send(self, header: dict[str, Any], blob: bytes | memoryview | None = None) -> None:
        frames: list[bytes | memoryview] = [messages.pack(header)]
        if blob is not None:
            frames.append(blob)
        if self._socket is None:
            raise _Lost("There is no connection to the Kiln backend.")
        while True:
            try:
                self._socket.send_multipart(frames, zmq.NOBLOCK)
                return
            except zmq.Again:
                poller = zmq.Poller()
                poller.register(self._socket, zmq.POLLOUT)
                poller.register(self._monitor, zmq.POLLIN)
                ready = dict(poller.poll(int(self.timeout * 1000)))
            except zmq.ZMQError as error:
                raise _Lost(f"The connection to the Kiln backend failed: {error.strerror}.") from None
            if self._monitor in ready:
                raise self._lost()
            if not ready:
                raise _Lost("The Kiln backend takes no messages any more.")

    def _listen(self, until: float) -> None:
        """Takes what arrives until there is an event, or until then."""
        for _ in range(MOST_EVENTS):
            if not self._take_next(0.0):
                break
        if self._overflowed and not self._events:
            self._renew()
        while not self._events and time.monotonic() < until:
            self._take_next(until)

    def _receive(self, until: float, what: str) -> None:
        """Takes one message, or raises when `until` has come without it."""
        if not self._take_next(until):
            raise KilnError(
                "timeout", f"The Kiln backend did not {what} in time.", "It may be overloaded; try again, or look into its log."
            )

    def _take_next(self, until: float) -> bool:
        """Waits for one message and deals with it; False when `until` came first. Raises `_Lost` when the connection is no more."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        while True:
            now = time.monotonic()
            quiet = self._heard + PING_AFTER if not self._pinged else self._pinged + PING_WAIT
            wait = max(0.0, min(until, quiet) - now)
            ready = dict(poller.poll(math.ceil(wait * 1000)))
            if self._socket in ready:
                self._take(*self._read())
                return True
            if self._monitor in ready:
                raise self._lost()
            now = time.monotonic()
            if now >= quiet:
                if self._pinged:
                    raise _Lost(
                        f"The Kiln backend has not said a word for {now - self._heard:.0f} s.", "It hangs; end it and start it again."
                    )
                self._send({"type": "ping", "id": self._new_id()})
                self._pinged = now
            elif now >= until:
                return False

    def _read(self) -> tuple[dict[str, Any], zmq.Frame | None]:
        frames = self._socket.recv_multipart(copy=False)
        try:
            header = messages.unpack(frames[0].buffer, messages.REPLY_BYTES, 2 * messages.NESTING)
        except KilnError as error:
            raise KilnError(
                "bad-message", f"The backend sent what this client cannot read: {error.message}", "Update Kiln on both sides."
            ) from None
        return header, frames[1] if len(frames) > 1 else None

    def _take(self, header: dict[str, Any], frame: zmq.Frame | None) -> None:
        """Puts a message where it is waited for. What nobody waits for, and what is newer than this client, is passed over."""
        self._heard, self._pinged = time.monotonic(), 0.0
        kind = header["type"]
        if kind == "reply" or kind == "error" and header.get("to") is not None:
            if header.get("to") in self._awaited:
                self._replies[header["to"]] = header
        elif kind == "event":
            self._take_event(header["event"])
        elif kind == "chunk" and frame is not None and header.get("download") == self._download.get("number", ...):
            self._download["chunks"].append((header["offset"], frame))
        elif kind == "credit" and header.get("upload") == self._upload.get("number", ...):
            self._upload["credit"] += header["chunks"]
        elif kind == "error":
            error = KilnError.from_wire(header.get("error") or {})
            for transfer, name in ((self._upload, "upload"), (self._download, "download")):
                if transfer and header.get(name) == transfer["number"]:
                    transfer["error"] = error
            if error.code == "no-hello":
                raise _Lost(error.message, error.hint)

    def _take_event(self, event: dict[str, Any]) -> None:
        job, number = _job_id(event["job"]), event["number"]
        if job not in self._numbers and not self._subscribed or number <= self._numbers.get(job, 0):
            return
        if len(self._events) >= MOST_EVENTS:
            self._overflowed = True
        if not self._overflowed:
            self._numbers.pop(job, None)  # to the end: the order is that of the newest event
            self._numbers[job] = number
            self._events.append(event)

    def _explain(self, event: int) -> _Lost:
        """Why no connection came about."""
        where = self.connection.endpoint
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return _Lost(f"The Kiln backend at {where} does not know this client's key.", "Copy its connection file again.", code="refused")
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            return _Lost(f"What listens at {where} is not a Kiln backend.", "Check the connection file.", code="refused")
        if event != zmq.EVENT_CLOSED:
            return _Lost(
                f"What listens at {where} ended the handshake: it is stopping, or has other keys than the connection file.",
                "Try again; if that does not help, copy its connection file again.",
                code="refused",
            )
        return _Lost(f"No Kiln backend listens at {where}.")

    def _lost(self) -> _Lost:
        return _Lost("The Kiln backend ended the connection.", "It may have been stopped; start it again or look into its log.")


def bad_version(client: Any, backend: Any) -> KilnError:
    """The sentence for two protocols that do not fit, on whichever side it is noticed."""

    def text(version: Any) -> str:
        return ".".join(str(number) for number in version) if isinstance(version, (list, tuple)) else str(version)

    try:
        older = "this client" if tuple(client) < tuple(backend) else "the backend"
    except TypeError:
        older = "the older side"
    return KilnError(
        "bad-version",
        f"The client speaks Kiln's protocol {text(client)}, the backend {text(backend)}.",
        f"Update {older}: they must share the first number.",
    )


def _content(name: str, content: Path | bytes) -> tuple[str, int, Path | bytes]:
    """(hash, size, content) of an input."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest(), len(content), content
    try:
        with open(content, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size, Path(content)
    except OSError as error:
        raise KilnError("bad-input", f"The input {name} cannot be read: {error.strerror or error}.", f"Check the file {content}.") from None


def _job(job: dict[str, Any]) -> dict[str, Any]:
    _job_id(job["id"])
    return job


def _job_id(id: Any) -> str:
    """A job's id as the backend tells it: clients name files and folders by it, so it must not lead anywhere else."""
    if not isinstance(id, str) or not re.fullmatch("[0-9A-Za-z-]{1,64}", id):
        raise KilnError("bad-message", f"The backend names a job {str(id)[:80]!r}, which is no job's id.", "Update Kiln on both sides.")
    return id


def _check_hash(artifact: str) -> None:
    if not re.fullmatch("[0-9a-f]{64}", artifact):
        raise KilnError("bad-hash", f"{artifact[:80]!r} is not an artifact's hash.", "Take it from a job's results or from an event.")


def _changed(content: Path | bytes) -> KilnError:
    return KilnError("bad-input", f"The file {content!s} changed while it was being sent.", "Submit again when nothing writes to it.")


def _reading(content: Path | bytes):
    if isinstance(content, bytes):
        return io.BytesIO(content)
    return open(content, "rb")
