"""Hostile clients that hold a valid key, against the real server over real sockets: `python build.py fuzz --count N [--seed S]`.

Several processes make up messages with hypothesis, each a little or badly wrong, in sequences over connections of their own, and check that
each is answered as SPEC.md says. Meanwhile others half shake hands, claim 2 GB, send 100,000 frames or read nothing, and one well-behaved
client measures how long it waits. Closes with `N passed, N failed`: messages, and demands on the server as a whole.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import msgpack
import zmq
from hypothesis import strategies as st

from protocol import messages
from protocol.connection import Connection
from protocol.errors import KilnError
from tests.protocol.service import ROOT, Peer, Service

SEQUENCE = 24  # messages of one sequence, at most
PATIENCE = 20.0  # seconds until a message counts as not answered
SILENT = ("chunk", "credit", "stop")  # requests without an answer, unless they are wrong
CODES = {
    "bad-message", "too-large", "bad-version", "no-hello", "unknown-message", "too-many-clients", "busy", "bad-recipe", "bad-parameter",
    "bad-request", "bad-input", "no-artifact", "bad-hash", "bad-offset", "no-transfer", "bad-artifact", "damaged-input", "no-job",
    "bad-state", "queue-full", "no-space", "no-model", "licence-needed", "offline",
}  # fmt: skip  # SPEC.md, Errors, but `internal`: that is a defect
MEMORY = 50_000_000  # bytes by which the server may grow
SLOWEST = 0.1  # seconds that 99.9 % of a healthy client's requests may take under fire
FACTOR = 3.0  # times the quiet run's


# -- Messages --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """What a message may name that exists."""

    jobs: tuple[str, ...]
    artifacts: tuple[str, ...]


def sequences(known: Known) -> st.SearchStrategy[list[list[bytes]]]:
    return st.lists(st.one_of(*[_requests(known)] * 6, _mutilated(known), _garbage()), min_size=1, max_size=SEQUENCE)


def _anything() -> st.SearchStrategy[Any]:
    plain = st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=12), st.binary(max_size=12),
        st.sampled_from(["", "../../etc/passwd", "CON", "\0", "é" * 300, "a" * 70_000, 2**53, -1, 1e308, b"\xff" * 40]),
    )  # fmt: skip
    return st.recursive(
        plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=8
    )


def _fields(known: Known) -> dict[str, dict[str, st.SearchStrategy[Any]]]:
    """Of every request, its fields with values that it may have."""
    job = st.sampled_from([*known.jobs, "no-such-job", ""])
    hash = st.sampled_from([*known.artifacts, "0" * 64, "f" * 63, "../" * 20])
    number, small = st.integers(-2, 2**54), st.integers(-1, 40)
    words, anything = st.text(max_size=5), _anything()
    parameters = st.dictionaries(st.sampled_from(["fit.splats", "fit.iterations", "seed", "no.such"]), anything, max_size=2)
    # what would end the run's point is left out: an accepted job, a real download of weights, a shutdown
    return {
        "hello": {
            "protocol": st.sampled_from([[1, 1], [1, 0], [1, 99], [2, 0], [0, 9], [], ["1", "1"], [1]]),
            "client": st.sampled_from(["", f"attacker {os.getpid()}"]), "name": words,
        },
        "ping": {}, "status": {}, "release": {},
        "submit": {
            "recipe": st.sampled_from(["reconstruct", "animate", "im3d", "mesh_splats", "nothing"]), "values": parameters,
            "inputs": st.sampled_from(["transforms.json", "../x", "a/b.png", "CON", "x" * 300]).map(lambda name: {name: "1" * 64}),
            "title": words, "source": st.one_of(st.just({}), st.dictionaries(words, anything, max_size=2)),
        },
        "jobs": {"after": job}, "job": {"job": job}, "cancel": {"job": job}, "retry": {"job": job},
        "remove": {"job": st.just("no-such-job")},
        "events": {"job": job, "after": number},
        "subscribe": {"all": st.booleans(), "after": st.dictionaries(job, small, max_size=3), "since": st.floats()},
        "missing": {"hashes": st.lists(hash, max_size=5)},
        "upload": {"hash": hash, "size": st.one_of(small, number)},
        "chunk": {"upload": small, "offset": st.one_of(small, number)}, "finish": {"upload": small},
        "download": {"artifact": hash, "offset": st.one_of(st.just(0), number), "credit": small},
        "credit": {"download": small, "chunks": small}, "stop": {"download": small},
        "weights": {"entry": st.sampled_from(["", "wan2.1-i2v-14b-480p", "nothing"])},
        "weights.pull": {"entry": st.sampled_from(["nothing", ""]), "accept": st.booleans(), "online": st.just(False), "source": words},
        "weights.cancel": {"entry": st.just("nothing")}, "weights.remove": {"entry": st.just("nothing")},
        "shutdown": {"mode": st.sampled_from(["later", "", "NOW"])},
        "no.such.message": {},
    }  # fmt: skip


def _requests(known: Known) -> st.SearchStrategy[list[bytes]]:
    """Requests that are right, or wrong in a field or two, with none, one or too many blobs."""

    def request(kind: str, fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[list[bytes]]:
        right = st.fixed_dictionaries(fields)
        # never weights that exist, nor another's name, which would take over its connection
        spoilt = [name for name in (*fields, "id", "more") if name not in ("entry", "client")]
        changes = st.one_of(st.just({}), st.dictionaries(st.sampled_from(spoilt), _anything(), min_size=1, max_size=2))
        blobs = st.sampled_from([*[()] * 12, (b"",), (b"x" * 11,), (b"x" * 11,), (b"x" * 200_000,), (b"", b""), (b"x",) * 40])
        return st.tuples(right, changes, blobs).map(lambda drawn: _frames(kind, {**drawn[0], **drawn[1]}, drawn[2]))

    return st.one_of(*(request(kind, fields) for kind, fields in _fields(known).items()))


def _frames(kind: str, fields: dict[str, Any], blobs: tuple[bytes, ...]) -> list[bytes]:
    header = {"type": kind, "id": secrets.token_hex(8), **fields}
    if kind == "shutdown" and header.get("mode") in ("now", "idle", None):
        header["mode"] = "later"
    try:
        return [msgpack.packb(header), *blobs]
    except (ValueError, OverflowError, TypeError, UnicodeEncodeError):  # text that is no UTF-8, and the like
        return [msgpack.packb({"type": kind, "id": secrets.token_hex(8)}), *blobs]


def _mutilated(known: Known) -> st.SearchStrategy[list[bytes]]:
    """Headers with bytes changed, cut off or put in between."""

    def harm(drawn: tuple[list[bytes], int, bytes, int]) -> list[bytes]:
        frames, place, put, cut = drawn
        header = frames[0]
        at = place % (len(header) + 1)
        if header[at + cut :].find(b"shutdown") >= 0 or b"shutdown" in header:  # one byte less could make it a real one
            return [b"\xc1", *frames[1:]]
        return [header[:at] + put + header[at + cut :], *frames[1:]]

    return st.tuples(_requests(known), st.integers(0, 500), st.binary(max_size=6), st.integers(0, 9)).map(harm)


def _garbage() -> st.SearchStrategy[list[bytes]]:
    bombs = [
        b"",
        b"\x82\xa4type\xa4ping\xa2id\xdb\x7f\xff\xff\xff",  # text of 2 GB
        b"\x82\xa4type\xa4ping\xa2id\xc6\x7f\xff\xff\xffx",  # bytes of 2 GB
        b"\x82\xa4type\xa1x\xa1a" + b"\xdc\x04\x00" * 50_000,  # lists in lists
        b"\x81" * 100_000,  # maps in maps
        b"\xdd\xff\xff\xff\xff",  # a list of 4 G
        b"\xdf\xff\xff\xff\xff",
        b"\xc7\xff\x01" + b"x" * 255,  # an extension type
        b"x" * (messages.FRAME_BYTES - 1),
        msgpack.packb({"type": "ping", "id": "x" * 101}),
        msgpack.packb({"type": 5, "id": "x"}),
        msgpack.packb([1, 2, 3]),
    ]
    return st.one_of(st.sampled_from(bombs).map(lambda bomb: [bomb]), st.lists(st.binary(max_size=60), min_size=1, max_size=4))


# -- One attacker ----------------------------------------------------------------------------------------------------------------------


class Attacker:
    """One process: sends sequences and looks at what comes back. `failures` holds a line for each message that was not answered well."""

    def __init__(self, connection: Connection, known: Known):
        self.connection, self.known = connection, known
        self.sent = 0
        self.failures: list[str] = []
        self.codes: Counter[str] = Counter()
        self.peer = Peer(connection)

    def attack(self, count: int, seed: int) -> None:
        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=2**31 - 1, deadline=None, database=None, phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        @hypothesis.given(sequences(self.known))
        def run(sequence: list[list[bytes]]) -> None:
            if self.sent >= count:
                raise KeyboardInterrupt  # the one way out of hypothesis before its number of examples
            self.take(sequence)

        with contextlib.suppress(KeyboardInterrupt):
            run()

    def take(self, sequence: list[list[bytes]]) -> None:
        """Sends a sequence at once, and waits for its answers."""
        expected: Counter[str] = Counter()
        nameless = 0  # answers that can name no request
        for frames in sequence:
            self.peer.socket.send_multipart(frames)
            self.sent += 1
            id, kind = _addressed(frames)
            if id is None and kind not in SILENT:
                nameless += 1
            elif kind == "hello":  # it begins anew: what was asked before may go unanswered
                expected, nameless = Counter({id: 1}), 0
            elif kind not in SILENT:
                expected[id] += 1
        until = time.monotonic() + PATIENCE
        begins_anew = any(_addressed(frames)[1] == "hello" for frames in sequence)
        back = secrets.token_hex(8)
        self.peer.send({"type": "ping", "id": back})
        expected[back] += 1
        while expected or nameless > 0:
            message = self.peer.receive(max(0.0, until - time.monotonic()))
            if message is None:
                self.fail(f"not answered: {dict(expected)} and {nameless} without an id, of {_shown(sequence)}")
                self.peer.__exit__()
                self.peer = Peer(self.connection)
                return
            header = message[0]
            to = header.get("to")
            if not _well_formed(header):
                self.fail(f"answered {header!r:.500}, to one of {_shown(sequence)}")
            if header.get("type") == "error":
                self.codes[header["error"]["code"]] += 1
                nameless -= to is None and "upload" not in header and "download" not in header
            if to in expected:
                expected[to] -= 1
                expected += Counter()
            elif to is not None and not begins_anew:
                self.fail(f"answered twice: {header!r:.300}")
        if begins_anew:
            self.peer.ask("hello", protocol=[1, 0])

    def fail(self, text: str) -> None:
        self.failures.append(text)
        if len(self.failures) > 20:
            raise KeyboardInterrupt


def _addressed(frames: list[bytes]) -> tuple[str | None, str]:
    """The id that an answer must carry, None where the message is so broken that it has none, and the message's type."""
    if len(frames) > messages.FRAMES:
        return None, ""
    try:
        header = messages.unpack(frames[0])
    except KilnError:
        return None, ""
    id = header.get("id")
    if header["type"] in SILENT:
        return None, header["type"]
    return (id if isinstance(id, str) and 1 <= len(id) <= messages.ID_LENGTH else None), header["type"]


def _well_formed(header: dict[str, Any]) -> bool:
    kind = header.get("type")
    if kind == "error":
        error = header.get("error")
        return (
            isinstance(error, dict) and error.get("code") in CODES and all(isinstance(error.get(part), str) for part in ("message", "hint"))
        )
    return kind in ("reply", "event", "chunk", "credit", "ping")


def _shown(sequence: list[list[bytes]]) -> str:
    return repr([[frame[:80] for frame in frames[:3]] for frames in sequence])[:1500]


# -- Others at the door ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def siege(connection: Connection) -> Iterator[Counter[str]]:
    """As long as it is open: clients that do what no message can. Yields how often each was done."""
    done: Counter[str] = Counter()
    over = threading.Event()
    address = ("127.0.0.1", int(connection.endpoint.rpartition(":")[2]))
    greeting = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01CURVE" + b"\0" * 15 + b"\0" * 32

    def half_a_handshake() -> None:
        with socket.create_connection(address, 5) as stranger:
            stranger.sendall(greeting[: 11 + done["half a handshake"] % 50])
            over.wait(0.05)

    def claims_2_gb() -> None:
        with socket.create_connection(address, 5) as stranger:
            stranger.sendall(greeting + b"\x06" + struct.pack(">Q", 2**31) + b"x" * 1000)
            over.wait(0.05)

    def plain_text() -> None:
        with socket.create_connection(address, 5) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)

    def many_frames() -> None:
        with Peer(connection) as peer:
            peer.socket.send_multipart([msgpack.packb({"type": "ping", "id": "x"})] + [b""] * 100_000)
            header, _ = peer.receive(PATIENCE) or ({}, [])
            assert header.get("type") == "error", "100,000 frames were not refused"

    def too_long_a_frame() -> None:
        with Peer(connection) as peer:
            peer.socket.send_multipart([b"x" * (messages.FRAME_BYTES + 2000)])
            assert peer.receive(0.5) is None

    def reads_nothing() -> None:
        with Peer(connection, receive=1, buffer=4096) as peer:
            for number in range(2000):
                with contextlib.suppress(zmq.Again):
                    peer.socket.send(msgpack.packb({"type": "status", "id": str(number)}), zmq.NOBLOCK)
            over.wait(0.5)

    ways = {
        "half a handshake": half_a_handshake, "claims 2 GB": claims_2_gb, "plain text": plain_text, "100,000 frames": many_frames,
        "too long a frame": too_long_a_frame, "reads nothing": reads_nothing,
    }  # fmt: skip
    failures: list[str] = []

    def run() -> None:
        while not over.is_set():
            for name, way in ways.items():
                if name == "100,000 frames" and done["plain text"] % 10:  # to take them off its socket keeps the server busy for a moment
                    continue
                try:
                    way()
                    done[name] += 1
                except (AssertionError, zmq.ZMQError) as error:
                    failures.append(f"{name}: {error}")
                except OSError:  # the server shut the door
                    done[name] += 1
                if over.wait(0.1):
                    return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()
        done["failures"] = len(failures)
        for failure in failures[:5]:
            print(failure, flush=True)


@contextlib.contextmanager
def healthy(connection: Connection) -> Iterator[list[float]]:
    """A client that asks for the time every few milliseconds. Yields the seconds that each answer took."""
    waits: list[float] = []
    over = threading.Event()

    def run() -> None:
        with Peer(connection) as peer:
            while not over.wait(0.004):
                start = time.perf_counter()
                peer.ask("ping")
                waits.append(time.perf_counter() - start)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield waits
    finally:
        over.set()
        thread.join()


def slowest(waits: list[float]) -> float:
    """The 99.9th percentile."""
    ordered = sorted(waits)
    return ordered[min(len(ordered) - 1, int(0.999 * len(ordered)))]


# -- The whole -------------------------------------------------------------------------------------------------------------------------


def fuzz(count: int, seed: int = 0, attackers: int = 4, quiet_seconds: float = 5.0) -> dict[str, Any]:
    """Runs it all. The result's `failures` are sentences, `figures` what was measured."""
    with tempfile.TemporaryDirectory(prefix="kiln-fuzz-") as scratch:
        folder = Path(scratch)
        os.environ["KILN_WEIGHTS"] = str(folder / "weights")
        service = Service(folder / "home").start()
        try:
            return _fuzz(service, folder, count, seed, attackers, quiet_seconds)
        finally:
            service.stop()


def _fuzz(service: Service, folder: Path, count: int, seed: int, attackers: int, quiet_seconds: float) -> dict[str, Any]:
    connection = service.connection()
    with service.client() as client:
        made = [client.submit("mesh_splats", {}, {"splats.ply": secrets.token_bytes(1000)}) for _ in range(4)]
        treasure = client.submit("mesh_splats", {}, {"splats.ply": secrets.token_bytes(300_000)}, title="must stay as it is")
    treasure_hash = next(iter(treasure["inputs"].values()))
    known = {"jobs": [job["id"] for job in made], "artifacts": [*(next(iter(job["inputs"].values())) for job in made), treasure_hash]}
    (folder / "known.json").write_text(json.dumps(known))

    def send(messages_each: int, first: int) -> list[dict[str, Any]]:
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.trust.fuzz", "--attack", str(service.path), "--known", str(folder / "known.json"),
                 "--count", str(messages_each), "--seed", str(first + number)],
                cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
            )
            for number in range(attackers)
        ]  # fmt: skip
        found = []
        for process in started:
            output = process.communicate()[0]
            last = output.strip().rpartition("\n")[2]
            found.append(
                json.loads(last) if process.returncode == 0 else {"sent": 0, "failures": [f"an attacker broke: {last}"], "codes": {}}
            )
        return found

    with healthy(connection) as quiet:
        time.sleep(quiet_seconds)
    found = send(max(50, count // 200), 1_000_000 + seed)  # so that what is made once is there: threads, caches
    before = service.memory()
    begun = time.monotonic()
    with healthy(connection) as waits, siege(connection) as besieged:
        found += send(-(-count // attackers), seed)
    seconds = time.monotonic() - begun
    after = service.memory()

    failures = [line for one in found for line in one["failures"]]
    sent = sum(one["sent"] for one in found)
    codes: Counter[str] = Counter()
    for one in found:
        codes.update(one["codes"])
    alone, fired = slowest(quiet), slowest(waits)
    demands = {
        "the server lives": service.process.poll() is None,
        "its log tells of no defect": "Traceback" not in service.log(),
        f"its memory grew by {(after - before) / 1e6:.1f} MB, at most {MEMORY / 1e6:.0f}": after - before <= MEMORY,
        f"99.9 % of {len(waits)} pings took {1000 * fired:.1f} ms at most, of the quiet ones {1000 * alone:.1f}": (
            fired <= min(SLOWEST, FACTOR * alone)
        ),
        "besiegers were refused": not besieged.pop("failures"),
    }
    if demands["the server lives"]:
        with service.client() as client:
            demands["jobs that no message named are as they were"] = (
                client.job(treasure["id"]) == {**treasure, **{key: client.job(treasure["id"])[key] for key in ("text",)}}
                and len(client.blob(treasure_hash)) == 300_000
            )
    failures += [f"not so: {text}" for text, kept in demands.items() if not kept]
    return {
        "passed": sent - sum(len(one["failures"]) for one in found) + sum(demands.values()),
        "failures": failures,
        "demands": list(demands),
        "figures": {
            "messages": sent, "seconds": round(seconds, 1), "codes": dict(codes.most_common()), "besieged": dict(besieged),
            "memory_growth": after - before, "quiet": alone, "under_fire": fired, "ratio": fired / alone, "pings": len(waits),
        },
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="build.py fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=20_000, help="messages altogether (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attackers", type=int, default=4, help="processes that attack (default: %(default)s)")
    parser.add_argument("--attack", type=Path, metavar="CONNECTION", help=argparse.SUPPRESS)
    parser.add_argument("--known", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.attack:
        known = json.loads(given.known.read_text())
        attacker = Attacker(Connection.load(given.attack), Known(tuple(known["jobs"]), tuple(known["artifacts"])))
        attacker.attack(given.count, given.seed)
        print(json.dumps({"sent": attacker.sent, "failures": attacker.failures, "codes": attacker.codes}))
        return 0
    result = fuzz(given.count, given.seed, given.attackers)
    print(json.dumps(result["figures"], indent=1))
    for text in result["demands"]:
        print(f"  {text}")
    for failure in result["failures"]:
        print(f"FAILED  {failure}")
    print(f"{result['passed']} passed, {len(result['failures'])} failed")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
