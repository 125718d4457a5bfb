"""The backend's door: one ROUTER on which every client's messages arrive, served by one thread that never waits.

What may wait (SQLite, hashing, disks) runs on two small pools and comes back through a queue. Whoever reads slowly has its news left in the
job store and its files on the disk: nothing piles up here. SPEC.md in `protocol/` says what the messages mean.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import queue
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

from backend import disk, housekeeping
from backend.jobs import ENDED, Jobs
from backend.pulls import Pulls
from backend.store import Store, Upload, check_hash
from protocol import VERSION, messages
from protocol.client import bad_version
from protocol.connection import Connection, Keys, patiently, private_folder
from protocol.connection import home as default_home
from protocol.errors import KilnError
from protocol.messages import count, pack, take

PORT = 7645  # for clients on other machines, which need to find it again after a restart; on this machine the system picks one
IDLE_SECONDS = 10.0  # without a client and without work until a server that was started with until_idle ends
PROBE_SECONDS = 5.0  # between looks whether a silent client is still connected
HANDSHAKE_SECONDS = 5.0  # that a connection may take to prove its key
REOPEN_SECONDS = 10.0  # until a port that this backend has just closed is free again
STUCK_SECONDS = 60.0  # that a client may take nothing before it is forgotten
TICK = 0.5  # seconds between looks at the clock
RETRY = 0.02  # seconds between attempts to reach a client whose pipe is full
CHUNKS = 64  # of all uploads, and of all downloads, that may be on their way together: 16 MB
UNSENT = 2000  # answers kept for a client whose pipe is full, nearly all of them refusals
PIPE = 64  # messages on their way to one client, and from it
LOOPBACK = ("127.0.0.1", "localhost", "::1")

log = logging.getLogger("kiln")


def serve(home: Path | None = None, host: str = "127.0.0.1", port: int = 0, until_idle: bool = False, **options: Any) -> None:
    """Serves the Kiln folder `home` (the user's, unless given) until told to stop by a request, SIGINT or SIGTERM, or, with `until_idle`,
    until nobody needs it.

    Raises `KilnError`: already-running, port-taken, bad-host, no-curve, and what the store says (store-too-new, no-space, ...).
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")  # to standard error, unless the program has its own log
    server = Server(home or default_home(), host, port, until_idle, **options)
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
            if hasattr(signal, name):
                number = getattr(signal, name)
                before[number] = signal.signal(number, lambda *_: server.stop())
    try:
        server.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Session:
    """What is known of one connected client."""

    def __init__(self, identity: bytes, client: str, name: str):
        self.identity, self.client, self.name = identity, client, name
        self.heard = self.probed = time.monotonic()
        self.waiting = 0  # requests whose reply is not on its way
        self.unsent: deque[tuple[list[bytes], bool]] = deque()  # (frames, is it a reply) that did not fit into its pipe
        self.stuck: float | None = None  # since when its pipe is full
        self.retry_at = 0.0
        self.all = False  # subscribed to every job
        self.joining: dict[str, int] | None = None  # while a subscription is made: the number before the first event that happened since
        self.numbers: dict[str, int] = {}  # of the last event sent, of each job
        self.behind: dict[str, int] = {}  # jobs of which there is news in the store: the newest number known
        self.replay: deque[dict[str, Any]] = deque()  # events read from the store
        self.reading = False
        self.read_at = 0.0
        self.uploads: dict[int, _Upload] = {}
        self.downloads: dict[int, _Download] = {}


def _hold(session: _Session) -> None:
    """Its pipe is full: it is tried again a little later."""
    now = time.monotonic()
    session.stuck, session.retry_at = session.stuck or now, now + RETRY


class _Upload:
    """A file on its way in: `file` is the store's and belongs to the thread that writes."""

    def __init__(self, file: Upload, credit: int):
        self.file, self.credit, self.offset, self.size = file, credit, file.offset, file.size
        self.unwritten = 0  # chunks that wait for the disk
        self.error: KilnError | None = None


class _Download:
    """A file on its way out."""

    def __init__(self, file: Any, offset: int, size: int, credit: int):
        self.file, self.offset, self.size, self.credit = file, offset, size, credit
        self.untaken = 0  # chunks sent for which the client has not given credit again


class Server:
    """Made, it holds the lock, the store and the port; `run` serves."""

    def __init__(
        self,
        home: Path,
        host: str = "127.0.0.1",
        port: int = 0,
        until_idle: bool = False,
        idle_seconds: float = IDLE_SECONDS,
        workers: int = 1,
    ):
        self.home, self.host, self._asked_port = Path(home), host, port
        self._until_idle, self._idle_seconds = until_idle, idle_seconds
        self._started = self._busy_at = time.monotonic()
        self._stop_requested = self._stop_when_idle = self._rotation_due = False
        self._sessions: dict[bytes, _Session] = {}
        self._numbers = 0  # of transfers
        self._at_the_door: deque[float] = deque()  # when each connection came that has not proven its key yet
        self._refused, self._refusals_told, self._told_at = 0, 0, 0.0
        self._done: queue.SimpleQueue[tuple] = queue.SimpleQueue()
        self._wake_end, self._wake_start = socket.socketpair()
        self._wake_end.setblocking(False)
        self._wake_start.setblocking(False)
        with contextlib.ExitStack() as opened:
            opened.callback(self._wake_end.close)
            opened.callback(self._wake_start.close)
            private_folder(self.home)
            private_folder(self.home / "run")
            self._lock = _Lock(self.home / "run" / "lock")
            opened.callback(self._lock.close)
            self._keys = Keys.of(self.home)
            self._context = zmq.Context()
            opened.callback(self._context.destroy, linger=200)
            self._zap = self._context.socket(zmq.REP)
            self._zap.bind("inproc://zeromq.zap.01")  # before any server: from here on only known keys get in
            self._open(host, port)
            self.store = Store(self.home / "store")
            opened.callback(self.store.close)
            self.jobs = Jobs(self.store, self._listen, workers=workers)
            self._limits = housekeeping.Limits.of_environment()
            self.jobs.housekeeping = lambda: housekeeping.clean(self.jobs, self._limits)
            self.store.make_room = lambda missing: housekeeping.make_room(self.jobs, self._limits, missing)
            if self._limits.bytes < sys.maxsize:
                self.store.quota = self._limits.bytes
            self.pulls = Pulls()
            opened.callback(self.pulls.close)
            self._pool = ThreadPoolExecutor(4, "requests")
            self._files = ThreadPoolExecutor(1, "uploads")  # one: a file's chunks are written in their order
            opened.callback(self._pool.shutdown, cancel_futures=True)
            opened.callback(self._files.shutdown)
            self._opened = opened.pop_all()

    def stop(self) -> None:
        """Ends `run`; from any thread."""
        self._stop_requested = True
        self._wake()

    def run(self) -> None:
        try:
            self.jobs.start()
            self._write_connection()
            log.info("Kiln %s answers at %s (process %d)", VERSION, self.endpoint, os.getpid())
            if self.host not in LOOPBACK:
                remote = self.home / "run" / "remote.json"
                log.warning("It listens on the network. Other machines connect with a copy of %s; keep that file secret.", remote)
            self._loop()
        finally:
            self._remove_connection()
            with contextlib.suppress(KilnError, OSError):
                for session in list(self._sessions.values()):
                    self._forget(session)
            self.jobs.close(now=True)
            self._opened.close()
            log.info("Kiln has stopped.")

    # -- The loop -----------------------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        poller = self._poller()
        next_tick = 0.0
        while not self._stop_requested:
            if self._rotation_due:
                self._rotate()
                poller = self._poller()
            wait = TICK
            if any(session.stuck is not None for session in self._sessions.values()):
                wait = RETRY
            if any(self._may_send(session) for session in self._sessions.values()):
                wait = 0.0
            ready = dict(poller.poll(int(wait * 1000)))
            if self._wake_end.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    self._wake_end.recv(4096)
            self._take_done()
            if self._zap in ready:
                self._authorise()
            if self._router in ready:
                for _ in range(PIPE):
                    if not self._take_message():
                        break
            for session in list(self._sessions.values()):
                self._serve_session(session)
            if self._monitor in ready:
                self._watch_the_door()
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + TICK
                self._tick(now)

    def _poller(self) -> zmq.Poller:
        poller = zmq.Poller()
        for source in (self._router, self._zap, self._monitor, self._wake_end.fileno()):
            poller.register(source, zmq.POLLIN)
        return poller

    def _tick(self, now: float) -> None:
        """What is due by the clock."""
        disk.limit_log(2, self.home / "logs" / "server.log")  # where `kiln run` and Blender let it print
        for session in list(self._sessions.values()):
            if session.stuck is not None and now - session.stuck > STUCK_SECONDS:
                log.info("%s has read nothing for %.0f s; it gets what it missed when it returns.", session.name, now - session.stuck)
                self._forget(session)
            elif now - max(session.heard, session.probed) > PROBE_SECONDS and session.stuck is None:
                self._probe(session)
        while self._at_the_door and now - self._at_the_door[0] > HANDSHAKE_SECONDS + 1:
            self._at_the_door.popleft()
            self._refused += 1
        if self._refused > self._refusals_told and now - self._told_at >= 1.0:
            new = self._refused - self._refusals_told
            log.warning("Refused %d connections without the right keys (%d in all).", new, self._refused)
            self._refusals_told, self._told_at = self._refused, now
        if self._sessions and not self._stop_when_idle:
            self._busy_at = now
        elif self._until_idle or self._stop_when_idle:
            self._later(self._pool, lambda: self.pulls.idle() and self.jobs.idle(), self._consider_idle)

    def _consider_idle(self, idle: bool, error: KilnError | None) -> None:
        now = time.monotonic()
        if not idle or self._sessions and not self._stop_when_idle:
            self._busy_at = now
        elif self._stop_when_idle or now - self._busy_at >= self._idle_seconds:
            log.info("Nothing is queued or running%s: stopping.", "" if self._stop_when_idle else " and nobody is connected")
            self._stop_requested = True

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake
            self._wake_start.send(b"\0")

    def _listen(self, event: dict[str, Any]) -> None:
        """Called by Jobs from its thread."""
        self._done.put((self._deliver, (event,)))
        self._wake()

    def _later(self, pool: ThreadPoolExecutor, work: Callable[[], Any], then: Callable[[Any, KilnError | None], None]) -> None:
        """Runs `work` on a pool and `then(result, error)` on this thread."""

        def run() -> None:
            result, error = None, None
            try:
                result = work()
            except KilnError as refused:
                error = refused
            except Exception as fault:
                log.exception("A request failed")
                message = f"The backend failed: {type(fault).__name__}: {fault}."
                error = KilnError("internal", message, "Its log says more; please report it.")
            self._done.put((then, (result, error)))
            self._wake()

        pool.submit(run)

    def _take_done(self) -> None:
        for _ in range(self._done.qsize()):
            then, arguments = self._done.get()
            try:
                then(*arguments)
            except Exception:
                log.exception("A reply failed")

    # -- Sockets and keys ---------------------------------------------------------------------------------------------------------

    def _open(self, host: str, port: int) -> None:
        self._router = router = self._context.socket(zmq.ROUTER)
        for option, value in {
            zmq.LINGER: 200,  # milliseconds for the last replies
            zmq.ROUTER_MANDATORY: 1,  # say when a client is gone or takes nothing
            zmq.SNDHWM: PIPE,
            zmq.RCVHWM: PIPE,
            zmq.MAXMSGSIZE: messages.FRAME_BYTES + 1024,  # longer frames end the connection before they are read; encryption adds 33 bytes
            zmq.HANDSHAKE_IVL: int(1000 * HANDSHAKE_SECONDS),
            zmq.HEARTBEAT_IVL: 5000,
            zmq.HEARTBEAT_TIMEOUT: 15000,
            zmq.TCP_KEEPALIVE: 1,
            zmq.BACKLOG: 256,
            zmq.IPV6: int(":" in host),
            zmq.CURVE_SERVER: 1,
        }.items():
            router.setsockopt(option, value)
        router.setsockopt(zmq.ZAP_DOMAIN, b"kiln")
        router.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.server_key.encode())
        router.setsockopt(zmq.CURVE_SECRETKEY, self._keys.server_secret.encode())
        self._monitor = router.get_monitor_socket(
            zmq.EVENT_ACCEPTED
            | zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        )
        if not port and host not in LOOPBACK:
            port = PORT
        where = f"[{host}]" if ":" in host else "127.0.0.1" if host == "localhost" else host
        try:
            router.bind(f"tcp://{where}:{port or '*'}")
        except zmq.ZMQError as error:
            if error.errno == zmq.EADDRINUSE:
                raise KilnError("port-taken", f"Port {port} at {host} is taken by another program.", "Give another with --port.") from None
            message = f"Kiln cannot listen at {host}:{port}: {error.strerror}."
            raise KilnError("bad-host", message, "Give an address of this machine.") from None
        self.port = int(router.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2].rstrip("\0"))
        self.endpoint = f"tcp://{ {'0.0.0.0': '127.0.0.1', '[::]': '[::1]'}.get(where, where) }:{self.port}"

    def _write_connection(self) -> None:
        keys = self._keys
        made = Connection(self.endpoint, keys.server_key, keys.client_key, keys.client_secret, pid=os.getpid())
        made.save(self.home / "run" / "connection.json")
        remote = self.home / "run" / "remote.json"
        if self.host in LOOPBACK:
            remote.unlink(missing_ok=True)
        else:
            name = platform.node() if self.host in ("0.0.0.0", "::") else self.host
            outside = f"tcp://{f'[{name}]' if ':' in name else name}:{self.port}"
            Connection(outside, keys.server_key, keys.client_key, keys.client_secret, pid=os.getpid()).save(remote)

    def _remove_connection(self) -> None:
        for name in ("connection.json", "remote.json"):
            with contextlib.suppress(OSError):
                patiently((self.home / "run" / name).unlink)

    def _rotate(self) -> None:
        """New keys and a new door: whoever came in by the old keys is outside from here on. Jobs go on."""
        self._rotation_due = False
        for session in list(self._sessions.values()):
            self._forget(session)
        self._router.disable_monitor()
        self._monitor.close(linger=0)
        self._router.close()  # its last replies linger as they do at the end
        self._at_the_door.clear()
        self._keys = Keys.of(self.home, anew=True)
        deadline = time.monotonic() + REOPEN_SECONDS
        while True:
            try:
                self._open(self.host, self.port if self.host not in LOOPBACK else self._asked_port)
                break
            except KilnError as error:  # the old door still holds the port for a moment
                if error.code != "port-taken" or time.monotonic() > deadline:
                    raise
                time.sleep(RETRY)
        self._write_connection()
        log.info("The keys are new; connection files from before let nobody in any more.")

    def _authorise(self) -> None:
        """Answers ZeroMQ's question whether a key may come in (ZAP, RFC 27)."""
        with contextlib.suppress(zmq.Again):
            while True:
                version, request, _, _, _, mechanism, *credentials = self._zap.recv_multipart(zmq.NOBLOCK)
                known = mechanism == b"CURVE" and len(credentials) == 1 and z85.encode(credentials[0]).decode() == self._keys.client_key
                self._zap.send_multipart([version, request, b"200" if known else b"400", b"" if known else b"unknown key", b"client", b""])

    def _watch_the_door(self) -> None:
        """Counts who was refused: ZeroMQ tells of some; others come and are never admitted."""
        with contextlib.suppress(zmq.Again):
            while True:
                event = int.from_bytes(self._monitor.recv_multipart(zmq.NOBLOCK)[0][:2], sys.byteorder)
                if event == zmq.EVENT_ACCEPTED:
                    self._at_the_door.append(time.monotonic())
                elif self._at_the_door:
                    self._at_the_door.pop()
                    self._refused += event != zmq.EVENT_HANDSHAKE_SUCCEEDED

    # -- Out ----------------------------------------------------------------------------------------------------------------------

    def _put(self, identity: bytes, frames: list[bytes]) -> bool:
        """Whether the client's pipe took the message; False if it is full. Raises `zmq.ZMQError` (EHOSTUNREACH) if it is gone."""
        try:
            self._router.send_multipart([identity, *frames], zmq.NOBLOCK)
            return True
        except zmq.Again:
            return False

    def _send(self, session: _Session, frames: list[bytes], reply: bool = False) -> None:
        """Sends now or as soon as the client's pipe has room. A client that lets too much pile up is forgotten."""
        session.unsent.append((frames, reply))
        if session.stuck is None:
            self._flush(session)
        elif len(session.unsent) > UNSENT:
            self._forget(session)

    def _flush(self, session: _Session) -> bool:
        """Sends what waits; whether all of it went."""
        try:
            while session.unsent:
                frames, reply = session.unsent[0]
                if not self._put(session.identity, frames):
                    _hold(session)
                    return False
                session.unsent.popleft()
                session.waiting -= reply
        except zmq.ZMQError:
            self._forget(session)
            return False
        session.stuck = None
        return True

    def _probe(self, session: _Session) -> None:
        """Forgets a client that is gone; one that lives ignores the message."""
        session.probed = time.monotonic()
        self._send(session, [pack({"type": "ping"})])

    def _reply(self, session: _Session, to: str, **fields: Any) -> None:
        try:
            frame = pack({"type": "reply", "to": to, **fields}, messages.REPLY_BYTES)
        except KilnError as error:
            self._refuse(session, error, to=to)
        else:
            self._send(session, [frame], reply=True)

    def _refuse(self, session: _Session, error: KilnError, **about: Any) -> None:
        self._send(session, [pack({"type": "error", **about, "error": _cut(error)})], reply="to" in about)

    def _forget(self, session: _Session) -> None:
        """A client that is gone. What it sent of unfinished uploads stays for its return."""
        if self._sessions.get(session.identity) is session:
            del self._sessions[session.identity]
        session.unsent.clear()
        session.replay.clear()
        for upload in session.uploads.values():
            self._files.submit(upload.file.abort)
        for download in session.downloads.values():
            download.file.close()
        session.uploads.clear()
        session.downloads.clear()

    def _may_send(self, session: _Session) -> bool:
        if session.stuck is not None:
            return False
        return bool(session.replay) or any(map(self._is_due, session.downloads.values()))

    def _is_due(self, download: _Download) -> bool:
        return download.credit > 0 and download.untaken < self._share("downloads")

    def _share(self, kind: str) -> int:
        """Chunks that one transfer may have on its way, of those that all may have together. At least 4: so often clients give credit."""
        return max(4, min(messages.WINDOW, CHUNKS // max(1, sum(len(getattr(session, kind)) for session in self._sessions.values()))))

    def _serve_session(self, session: _Session) -> None:
        """One turn for a client: what waits, then events, then one chunk of each of its downloads."""
        if session.stuck is not None and time.monotonic() < session.retry_at or session.unsent and not self._flush(session):
            return
        try:
            while session.replay:
                event = session.replay[0]
                if not self._put(session.identity, [_pack_event(event)]):
                    _hold(session)
                    return
                session.numbers[event["job"]] = event["number"]
                session.replay.popleft()
            if session.behind and not session.reading and time.monotonic() >= session.read_at:
                self._read_behind(session)
            for number, download in list(session.downloads.items()):
                if self._is_due(download) and not self._send_chunk(session, number, download):
                    _hold(session)
                    return
        except zmq.ZMQError:
            self._forget(session)
            return
        session.stuck = None

    def _send_chunk(self, session: _Session, number: int, download: _Download) -> bool:
        try:
            download.file.seek(download.offset)
            blob = download.file.read(min(messages.CHUNK_BYTES, download.size - download.offset))
        except OSError as error:
            blob, reason = b"", error.strerror or str(error)
        else:
            reason = "it is shorter than it was"
        if not blob:
            self._end_download(session, number)
            refused = KilnError(
                "bad-artifact", f"The artifact cannot be read: {reason}.", "The backend's disk may be failing; run the job again."
            )
            self._refuse(session, refused, download=number)
            return True
        if not self._put(session.identity, [pack({"type": "chunk", "download": number, "offset": download.offset}), blob]):
            return False
        download.offset += len(blob)
        download.credit -= 1
        download.untaken += 1
        if download.offset == download.size:
            self._end_download(session, number)
        return True

    def _end_download(self, session: _Session, number: int) -> None:
        download = session.downloads.pop(number, None)
        if download is not None:
            download.file.close()

    # -- Events -------------------------------------------------------------------------------------------------------------------

    def _deliver(self, event: dict[str, Any]) -> None:
        """Sends a new event to whoever is up to date with its job; for the others it lies in the store."""
        job, number = event["job"], event["number"]
        frame = None
        for session in list(self._sessions.values()):
            if session.joining is not None:
                session.joining.setdefault(job, number - 1)
            if not session.all and job not in session.numbers:
                continue
            last = session.numbers.get(job, number - 1)
            if number <= last:
                continue
            if job not in session.behind and last == number - 1 and not session.unsent and session.stuck is None and not session.replay:
                frame = frame or _pack_event(event)
                try:
                    if self._put(session.identity, [frame]):
                        session.numbers[job] = number
                        continue
                except zmq.ZMQError:
                    self._forget(session)
                    continue
                _hold(session)
            session.numbers.setdefault(job, last)
            session.behind[job] = number

    def _read_behind(self, session: _Session) -> None:
        """Reads what a client has missed of one job."""
        job = next(iter(session.behind))
        after = session.numbers.get(job, 0)

        def replay(events: list[dict[str, Any]] | None, error: KilnError | None) -> None:
            session.reading = False
            newest = session.behind.get(job, 0)
            if error is not None:  # the job was removed
                session.behind.pop(job, None)
            elif session.numbers.get(job, 0) == after:  # else it subscribed anew meanwhile: read again
                session.replay.extend(events)
                if (events[-1]["number"] if events else after) >= newest:
                    session.behind.pop(job, None)
                elif not events:  # stored meanwhile, or not yet (a full disk): read again
                    session.read_at = time.monotonic() + RETRY

        session.reading = True
        self._later(self._pool, lambda: self.jobs.events(job, after), replay)

    # -- In -----------------------------------------------------------------------------------------------------------------------

    def _take_message(self) -> bool:
        """Takes one message off the socket; False when there is none."""
        try:
            identity = self._router.recv(zmq.NOBLOCK)
        except zmq.Again:
            return False
        frames: list[zmq.Frame] = []
        surplus, more = 0, True
        while more:
            frame = self._router.recv(copy=False)
            more = frame.more
            if len(frames) < messages.FRAMES:
                frames.append(frame)
            else:
                surplus += 1
        session = self._sessions.get(identity)
        to = None
        try:
            if not frames or surplus:
                raise KilnError("bad-message", f"A message has {len(frames) + surplus} frames.", "Send a header and at most one blob.")
            header = messages.unpack(frames[0].buffer)
            blob = frames[1] if len(frames) > 1 else None
            kind = header["type"]
            if session is not None:
                session.heard = time.monotonic()
                if kind in self._UNANSWERED:
                    self._UNANSWERED[kind](self, session, header, blob)
                    return True
            to = header.get("id")
            if not isinstance(to, str) or not 1 <= len(to) <= messages.ID_LENGTH:
                to = None
                raise KilnError(
                    "bad-message", f"A request needs an 'id', text of 1 to {messages.ID_LENGTH} characters.", "SPEC.md, Requests."
                )
            if kind == "hello":
                self._hello(identity, to, header)
            elif session is None:
                raise KilnError("no-hello", "The backend does not know this client (any more).", "Say hello first.")
            else:
                self._take_request(session, kind, to, header, blob)
        except KilnError as error:
            if session is not None and self._sessions.get(identity) is session:
                session.waiting += 1
                self._refuse(session, error, to=to)
            else:
                self._answer_stranger(identity, {"type": "error", "to": to, "error": _cut(error)})
        except Exception:  # a defect of ours, which must cost no other client its backend
            log.exception("A message failed")
            defect = KilnError("internal", "The backend failed at this message.", "Its log says more; please report it.")
            self._answer_stranger(identity, {"type": "error", "to": to, "error": defect.to_wire()})
        return True

    def _answer_stranger(self, identity: bytes, header: dict[str, Any]) -> None:
        with contextlib.suppress(zmq.ZMQError):  # gone, or it reads nothing: nothing is kept for it
            self._put(identity, [pack(header)])

    def _take_request(self, session: _Session, kind: str, to: str, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        if session.waiting >= messages.WAITING:
            raise KilnError("busy", f"{messages.WAITING} requests of this client wait for their replies.", "Wait for some of them.")
        if kind not in self._REQUESTS:
            raise KilnError("unknown-message", f"The backend does not know the message {kind[:40]!r}.", f"It speaks protocol {_version()}.")
        session.waiting += 1
        try:
            self._REQUESTS[kind](self, session, to, header, blob)
        except KilnError as error:
            self._refuse(session, error, to=to)

    def _answer_from(self, pool: ThreadPoolExecutor, session: _Session, to: str, work: Callable[[], dict[str, Any]]) -> None:
        """Replies with what `work`, run on a pool, returns."""

        def then(result: dict[str, Any] | None, error: KilnError | None) -> None:
            if self._sessions.get(session.identity) is session:
                if error is None:
                    self._reply(session, to, **result)
                else:
                    self._refuse(session, error, to=to)

        self._later(pool, work, then)

    # -- Requests -----------------------------------------------------------------------------------------------------------------

    def _hello(self, identity: bytes, to: str, header: dict[str, Any]) -> None:
        protocol = take(header, "protocol", list)
        if len(protocol) < 2 or not all(isinstance(number, int) and not isinstance(number, bool) for number in protocol[:2]):
            raise KilnError("bad-message", "The field 'protocol' of 'hello' must be [major, minor].", "SPEC.md, Versions.")
        if protocol[0] != messages.PROTOCOL[0]:
            raise bad_version(protocol[:2], messages.PROTOCOL)
        client, name = take(header, "client", str, ""), take(header, "name", str, "")
        for other in list(self._sessions.values()):
            if other.identity == identity or client and other.client == client:
                self._forget(other)  # the same client on a new connection
        if len(self._sessions) >= messages.CLIENTS:
            for other in list(self._sessions.values()):
                self._probe(other)
        if len(self._sessions) >= messages.CLIENTS:
            raise KilnError("too-many-clients", f"{messages.CLIENTS} clients are connected.", "Close one of them.")
        session = self._sessions[identity] = _Session(identity, client[: messages.ID_LENGTH], name[:200] or "A client")
        session.waiting += 1
        self._reply(
            session, to, protocol=list(messages.PROTOCOL), version=VERSION, host=platform.node(), pid=os.getpid(), time=time.time(),
            device=str(self.jobs.device().get("name", "")), limits=messages.limits(),
        )  # fmt: skip

    def _ping(self, session: _Session, to: str, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        self._reply(session, to, time=time.time())

    def _status(self, session: _Session, to: str, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        now = time.monotonic()
        clients = [{"name": other.name, "quiet": now - other.heard} for other in self._sessions.values()]

        def status() -> dict[str, Any]:
            return {
                "version": VERSION, "protocol": list(messages.PROTOCOL), "pid": os.getpid(), "host": platform.node(),
                "home": str(self.home), "endpoint": self.endpoint, "uptime": now - self._started, "device": self.jobs.device(),
                "jobs": dict(Counter(job["state"] for job in self.jobs.list())), "clients": clients, "refused": self._refused,
                "disk_free": shutil.disk_usage(self.home).free, "until_idle": self._until_idle or self._stop_when_idle,
                "workers": self.jobs.workers,
            }  # fmt: skip

        self._answer_from(self._pool, session, to, status)

    def _submit(self, session: _Session, to: str, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        recipe, values, inputs = take(header, "recipe", str), take(header, "values", dict, {}), take(header, "inputs", dict, {})
        title, source = take(header, "title", str, ""), take(header, "source", dict, {})
        if len(inputs) > messages.INPUTS:
            raise KilnError("too-large", f"A job takes at most {messages.INPUTS} input files, not {len(inputs)}.", "Use fewer views.")
        if not all(isinstance(name, str) and isinstance(hash, str) for name, hash in inputs.items()):
            raise KilnError("bad-message", "The field 'inputs' of 'submit' must map names to hashes.", "SPEC.md, Jobs.")
        pack({"type": "", "source": source}, messages.SOURCE_BYTES)
        title = title[: messages.TITLE_LENGTH]
        self._answer_from(self._pool, session, to, lambda: {"job": self.jobs.submit(to, recipe, values, inputs, title, source)})

    def _list(self, session: _Session, to: str, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        after = take(header, "after", str, "")

        def page() -> dict[str, Any]:
            listed = self.jobs.list()
            places = {job["id"]: place for place, job in enumerate(listed)}
            first = places.get(after, -1) + 1
            found: list[dict[str, Any]] = []
            size = 0
            for job in listed[first : first + messages.LIST_LENGTH]:
                del job["inputs"]
                size += len(pack({"job": job}, messages.REPLY_BYTES))
                if found and size > messages.PAGE_BYTES:
                    break
                found.append(job)
            return {"jobs": found, "first": first == 0, "more": first + len(found) < len(listed)}

        self._answer_from(self._pool, session, to, page)

    def _events(self, session: _Session, to: str, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        job, after = take(header, "job", str), count(header, "after", 0, 2**53, 0)

        def page() -> dict[str, Any]:
            events = self.jobs.events(job, after)
            found: list[dict[str, Any]] = []
            size = 0
            for event in events[: messages.LIST_LENGTH]:
                event = _fitting(event)
                size += len(pack(event))
                if found and size > messages.PAGE_BYTES:
                    break
                found.append(event)
            return {"events": found, "more": len(found) < len(events)}

        self._answer_from(self._pool, session, to, page)

    def _job(self, session: _Session, to: str, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        job = take(header, "job", str)
        action = {"job": self.jobs.get, "cancel": self.jobs.cancel, "retry": self.jobs.retry, "take": self.jobs.take}[header["type"]]
        self._answer_from(self._pool, session, to, lambda: {"job": action(job)})

    def _remove(self, session: _Session, to: str, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        job = take(header, "job", str)

        def remove() -> dict[str, Any]:
            self.jobs.remove(job)
            return {}

        self._answer_from(self._pool, session, to, remove)

    def _subscribe(self, session: _Session, to: str, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        everything, after = take(header, "all", bool, False), take(header, "after", dict, None)
        since = take(header, "since", (float, int), 0.0)
        if after is not None and not all(
            isinstance(job, str) and isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**53
            for job, number in after.items()
        ):
            raise KilnError("bad-message", "The field 'after' of 'subscribe' must map jobs to event numbers.", "SPEC.md, Events.")
        asked = time.time()
        session.joining = {}

        def gather() -> tuple[dict[str, int], dict[str, int], list[str]]:
            listed = self.jobs.list()
            known = {job["id"] for job in listed}
            gone = [job for job in after or {} if job not in known][: messages.LIST_LENGTH]
            given = {job: number for job, number in (after or {}).items() if job in known}
            current: dict[str, int] = {}
            if everything and after is None:
                current = {job["id"]: self.store.last_number(job["id"]) for job in listed if job["state"] not in ENDED}
            elif everything:
                given |= {
                    job["id"]: 0 for job in listed if job["id"] not in given and (job["state"] not in ENDED or job["finished"] >= since)
                }
            return given, current, gone

        def join(found: tuple[dict[str, int], dict[str, int], list[str]] | None, error: KilnError | None) -> None:
            if self._sessions.get(session.identity) is not session:
                return
            joining, session.joining = session.joining or {}, None
            if error is not None:
                self._refuse(session, error, to=to)
                return
            given, current, gone = found
            session.all = session.all or everything
            # Read anew whatever was half sent, and what happened while the numbers were gathered.
            stale = dict(given)
            for job, before in joining.items():
                if everything or job in session.numbers or job in given:
                    stale[job] = given.get(job, current.get(job, session.numbers.get(job, before)))
            for job in (*session.behind, *(event["job"] for event in session.replay)):
                stale.setdefault(job, session.numbers.get(job, 0))
            session.replay.clear()
            session.numbers |= current | stale
            session.behind |= dict.fromkeys(stale, 0)
            most = messages.MAP_LENGTH
            self._reply(session, to, numbers=dict(list(current.items())[-most:]), gone=gone, time=asked)

        self._later(self._pool, gather, join)

    def _release(self, session: _Session, to: str, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        self.jobs.release()
        self._reply(session, to)

    def _weights(self, session: _Session, to: str, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        entry = take(header, "entry", str, "")
        self._answer_from(self._pool, session, to, lambda: self.pulls.list(entry, self.jobs.device()))

    def _change_weights(self, session: _Session, to: str, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        entry, kind = take(header, "entry", str), header["type"]
        if kind == "weights.pull":
            accept, online = take(header, "accept", bool, False), take(header, "online", bool, True)
            source = take(header, "source", str, "")
            self._answer_from(self._pool, session, to, lambda: {"entry": self.pulls.start(entry, accept, online, source)})
        else:
            change = {"weights.cancel": self.pulls.cancel, "weights.remove": self.pulls.remove}[kind]
            self._answer_from(self._pool, session, to, lambda: {"entry": change(entry)})

    def _show_store(self, session: _Session, to: str, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        self._answer_from(self._pool, session, to, lambda: housekeeping.show(self.jobs, self._limits))

    def _clean_store(self, session: _Session, to: str, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        limits = housekeeping.Limits(
            count(header, "bytes", 0, sys.maxsize, self._limits.bytes), float(take(header, "seconds", (float, int), self._limits.seconds))
        )
        dry_run = take(header, "dry_run", bool, False)
        self._answer_from(self._pool, session, to, lambda: housekeeping.clean(self.jobs, limits, dry_run))

    def _ask_to_rotate(self, session: _Session, to: str, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        log.info("%s asked for new keys.", session.name)
        self._reply(session, to)
        self._rotation_due = True

    def _shutdown(self, session: _Session, to: str, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        mode = take(header, "mode", str, "now")
        if mode not in ("now", "idle"):
            raise KilnError("bad-message", f"The field 'mode' of 'shutdown' cannot be {mode[:40]!r}.", "Give 'now' or 'idle'.")
        self._reply(session, to)
        if mode == "now":
            log.info("%s asked to stop.", session.name)
            self._stop_requested = True
        else:
            self._stop_when_idle = True

    # -- Files in -----------------------------------------------------------------------------------------------------------------

    def _missing(self, session: _Session, to: str, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        hashes = take(header, "hashes", list)
        self._answer_from(self._pool, session, to, lambda: {"missing": [hash for hash in hashes if not self.store.has(check_hash(hash))]})

    def _upload(self, session: _Session, to: str, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        """Begins a file, or takes all of a small one."""
        hash, size = check_hash(take(header, "hash", str)), count(header, "size", 0, messages.ARTIFACT_BYTES)
        if blob is not None and len(blob.buffer) != size:
            raise KilnError(
                "bad-message", f"The blob of 'upload' has {len(blob.buffer)} bytes, not {size}.", "Send the whole file or no blob."
            )
        if len(session.uploads) >= messages.TRANSFERS:
            raise KilnError("busy", f"{messages.TRANSFERS} uploads of this client are under way.", "Finish one of them.")

        def begin() -> Upload | None:
            if self.store.has(hash):
                return None
            file = self.store.upload(hash, size)
            if blob is None:
                return file
            try:
                file.write(blob.buffer[file.offset :])
                file.finish()
            except BaseException:
                file.abort(keep=False)
                raise
            return None

        def begun(file: Upload | None, error: KilnError | None) -> None:
            if self._sessions.get(session.identity) is not session:
                if file is not None:
                    self._files.submit(file.abort)
            elif error is not None:
                self._refuse(session, error, to=to)
            elif file is None:
                self._reply(session, to, done=True)
            else:
                self._numbers += 1
                upload = session.uploads[self._numbers] = _Upload(file, self._share("uploads"))
                self._reply(session, to, done=False, upload=self._numbers, offset=file.offset, credit=upload.credit)

        self._later(self._files, begin, begun)

    def _take_chunk(self, session: _Session, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        number = take(header, "upload", int)
        upload = session.uploads.get(number)
        if upload is None or upload.error is not None:
            return  # it was refused, and its sender told so, while this chunk was on its way
        room = min(messages.CHUNK_BYTES, upload.size - upload.offset)
        if blob is None or not upload.credit or take(header, "offset", int) != upload.offset or len(blob.buffer) > room:
            message = f"A chunk of upload {number} came without credit, out of order or too long."
            self._fail_upload(session, number, upload, KilnError("bad-message", message, "SPEC.md, Uploads."))
            return
        upload.credit -= 1
        upload.unwritten += 1
        upload.offset += len(blob.buffer)

        def written(_: None, error: KilnError | None) -> None:
            if self._sessions.get(session.identity) is not session or session.uploads.get(number) is not upload:
                return
            if error is not None:
                self._fail_upload(session, number, upload, error)
                return
            upload.unwritten -= 1
            share = self._share("uploads")
            chunks = share - upload.credit - upload.unwritten
            if chunks >= share // 4:
                upload.credit += chunks
                self._send(session, [pack({"type": "credit", "upload": number, "chunks": chunks})])

        self._later(self._files, lambda: upload.file.write(blob.buffer), written)

    def _fail_upload(self, session: _Session, number: int, upload: _Upload, error: KilnError) -> None:
        upload.error = error
        self._files.submit(upload.file.abort)
        self._refuse(session, error, upload=number)

    def _finish(self, session: _Session, to: str, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        number = take(header, "upload", int)
        upload = session.uploads.pop(number, None)
        if upload is None:
            raise KilnError("no-transfer", f"There is no upload {number}.", "Begin it again; what arrived is kept.")
        if upload.error is not None:
            raise upload.error
        self._answer_from(self._files, session, to, lambda: {"hash": upload.file.finish()})

    # -- Files out ----------------------------------------------------------------------------------------------------------------

    def _download(self, session: _Session, to: str, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        artifact, offset = check_hash(take(header, "artifact", str)), count(header, "offset", 0, 2**53, 0)
        credit = count(header, "credit", 0, messages.WINDOW, messages.WINDOW)
        if len(session.downloads) >= messages.TRANSFERS:
            raise KilnError("busy", f"{messages.TRANSFERS} downloads of this client are under way.", "Finish or stop one of them.")
        try:
            file = open(self.store.path(artifact), "rb", buffering=0)
        except OSError as error:
            raise KilnError("bad-artifact", f"The artifact cannot be read: {error.strerror or error}.", "Run the job again.") from None
        size = os.fstat(file.fileno()).st_size
        if offset > size:
            file.close()
            raise KilnError("bad-offset", f"The artifact has {size} bytes; byte {offset} is not among them.", "Start from 0.")
        self._numbers += 1
        self._reply(session, to, download=self._numbers, size=size, offset=offset)
        if offset == size or self._sessions.get(session.identity) is not session:
            file.close()
        else:
            session.downloads[self._numbers] = _Download(file, offset, size, credit)

    def _credit(self, session: _Session, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        download = session.downloads.get(take(header, "download", int))
        if download is not None:
            chunks = count(header, "chunks", 1, messages.WINDOW)
            download.credit = min(download.credit + chunks, messages.WINDOW)
            download.untaken = max(download.untaken - chunks, 0)

    def _stop_download(self, session: _Session, header: dict[str, Any], blob: zmq.Frame | None) -> None:
        self._end_download(session, take(header, "download", int))

    _REQUESTS = {
        "ping": _ping, "status": _status, "submit": _submit, "jobs": _list, "job": _job, "cancel": _job, "retry": _job, "take": _job,
        "remove": _remove,
        "events": _events, "subscribe": _subscribe, "missing": _missing, "upload": _upload, "finish": _finish, "download": _download,
        "weights": _weights, "weights.pull": _change_weights, "weights.cancel": _change_weights, "weights.remove": _change_weights,
        "store": _show_store, "clean": _clean_store, "release": _release, "rotate": _ask_to_rotate, "shutdown": _shutdown,
    }  # fmt: skip
    _UNANSWERED = {"chunk": _take_chunk, "credit": _credit, "stop": _stop_download}


def is_served(home: Path) -> bool:
    """Whether a backend serves `home`, also one that has stopped answering and still puts things away."""
    try:
        _Lock(home / "run" / "lock").close()
    except KilnError:
        return True
    except FileNotFoundError:
        return False
    return False


class _Lock:
    """One backend to a home. The system drops the lock with the process, however it ends."""

    def __init__(self, path: Path):
        try:
            self._file = disk.lock(path)
        except BlockingIOError as error:
            (holder,) = error.args
            raise KilnError(
                "already-running", f"A Kiln backend already serves {path.parents[1]}" + (f" (process {holder})." if holder else "."),
                "Use that one, or stop it first with `kiln stop`.",
            ) from None  # fmt: skip

    def close(self) -> None:
        self._file.close()


def _version() -> str:
    return ".".join(str(number) for number in messages.PROTOCOL)


def _cut(error: KilnError) -> dict[str, str]:
    """An error for the wire; one that quotes much of what it refuses is cut."""
    return {key: text if len(text) <= 4000 else text[:4000] + "…" for key, text in error.to_wire().items()}


def _fitting(event: dict[str, Any]) -> dict[str, Any]:
    """The event, its longest text cut if it would not fit into a frame."""
    if len(json.dumps(event)) > messages.PAGE_BYTES:
        return {key: value[:10_000] + "…" if isinstance(value, str) and len(value) > 10_000 else value for key, value in event.items()}
    return event


def _pack_event(event: dict[str, Any]) -> bytes:
    return pack({"type": "event", "event": _fitting(event)}, messages.REPLY_BYTES)
