# environment: backend
"""The backend under load: a thousand queued jobs, sixteen clients, large files, a reader that reads nothing; transfers against bare CURVE.

    python build.py bench load [--parts answers,memory,speed] [--clients 16] [--jobs 1000] [--gigabytes 2]

Percentiles are of single requests, seen by the client that asked. `speed` runs kind against kind, interleaved, and gives ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import zmq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from protocol import messages  # noqa: E402
from protocol.connection import Connection  # noqa: E402
from tests.backend.ball import write_ball  # noqa: E402
from tests.protocol.service import Peer, Service  # noqa: E402

MB = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(prog="build.py bench load", description=__doc__)
    parser.add_argument("--parts", default="answers,memory,speed")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement of answers")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the result that is fetched")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ask", type=Path, metavar="CONNECTION", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.ask:
        print(json.dumps(ask(Connection.load(given.ask), given.seconds, given.threads)))
        return
    found = {}
    with tempfile.TemporaryDirectory(prefix="kiln-load-") as scratch:
        for part in given.parts.split(","):
            found[part] = {"answers": answers, "memory": memory, "speed": speed}[part](given, Path(scratch) / part)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


# -- Answers ---------------------------------------------------------------------------------------------------------------------------


def answers(given: argparse.Namespace, folder: Path) -> dict:
    """How long list, submit, cancel and ping take while jobs wait, one computes, and others ask too."""
    folder.mkdir(parents=True)
    (folder / "ball").mkdir()
    write_ball(folder / "ball")
    service = Service(folder / "home", workers=1).start()
    try:
        with service.client() as client:
            ball = {path.name: path for path in (folder / "ball").iterdir()}
            client.submit("reconstruct", {"fit.iterations": 100_000, "fit.splats": 2000, "fit.device": "cpu"}, ball, title="computes")
            for number in range(given.jobs):
                client.submit("mesh_splats", {}, {"splats.ply": b"waits"}, title=f"waits {number}")
            until = time.monotonic() + 120
            while not any(job["stage"] == "Fit splats" for job in client.jobs()):
                assert time.monotonic() < until, "the job does not compute"
                time.sleep(0.2)
        print(f"\n{given.jobs} jobs wait, one computes, {given.clients} clients ask without a pause\n")
        print("| who else | request | count | median | 99 % | worst |\n|---|---|---|---|---|---|")
        tables = {"nobody": _asked(service, given)}
        with _reads_nothing(service, folder):
            tables["a client that reads nothing"] = _asked(service, given)
        for who, table in tables.items():
            for kind, waits in sorted(table.items()):
                ordered = sorted(waits)
                row = (statistics.median(ordered), ordered[int(0.99 * len(ordered))], ordered[-1])
                print(f"| {who} | {kind} | {len(waits)} | " + " | ".join(f"{1000 * value:.1f} ms" for value in row) + " |")
                tables[who][kind] = row
        return tables
    finally:
        service.stop()


def _asked(service: Service, given: argparse.Namespace) -> dict[str, list[float]]:
    processes = 2
    command = [
        sys.executable,
        __file__,
        "--ask",
        str(service.path),
        "--seconds",
        str(given.seconds),
        "--threads",
        str(given.clients // processes),
    ]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    found: dict[str, list[float]] = defaultdict(list)
    for process in started:
        for kind, waits in json.loads(process.communicate()[0]).items():
            found[kind] += waits
    return dict(found)


def ask(connection: Connection, seconds: float, threads: int) -> dict[str, list[float]]:
    """Some clients in one process, each with its own connection, that ask one thing after the other, four times a second all of it."""
    found: dict[str, list[float]] = defaultdict(list)

    def work(number: int) -> None:
        with Peer(connection) as peer:
            until = time.monotonic() + seconds
            time.sleep(0.25 * number / threads)

            def timed(kind: str, **fields) -> dict:
                start = time.perf_counter()
                reply, _ = peer.ask(kind, **fields)
                found[kind].append(time.perf_counter() - start)
                assert reply["type"] == "reply", reply
                return reply

            hash = hashlib.sha256(b"waits").hexdigest()
            while time.monotonic() < until:
                turn = time.monotonic()
                timed("ping")
                timed("jobs", after="")
                job = timed("submit", recipe="mesh_splats", values={}, inputs={"splats.ply": hash})["job"]["id"]
                timed("events", job=job, after=0)  # how far it is
                timed("cancel", job=job)
                peer.ask("remove", job=job)
                time.sleep(max(0.0, 0.25 - (time.monotonic() - turn)))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return found


@contextlib.contextmanager
def _reads_nothing(service: Service, folder: Path):
    """A client that asked for all events and a large file, and takes neither off its socket."""
    path = folder / "large"
    path.write_bytes(os.urandom(50 * MB))
    with service.client() as client:
        client.upload({_hash(path): (path.stat().st_size, path)})
    with Peer(service.connection(), receive=1, buffer=4096) as peer:
        peer.ask("subscribe", all=True)
        for number in range(messages.TRANSFERS):
            peer.send({"type": "download", "id": f"d{number}", "artifact": _hash(path), "offset": 0, "credit": messages.WINDOW})
        time.sleep(0.5)
        yield


# -- Memory ----------------------------------------------------------------------------------------------------------------------------


def memory(given: argparse.Namespace, folder: Path) -> dict:
    """How much either side grows by while a large input is sent and a large result fetched."""
    folder.mkdir(parents=True)
    service = Service(folder / "home").start()
    found = {}
    try:
        with service.client() as client:
            client.ping()
            print("\n| transfer | bytes | server grows by | client grows by |\n|---|---|---|---|")
            for name, size in (("input", 200 * MB), ("result", int(given.gigabytes * 1000) * MB)):
                path = folder / name
                with open(path, "wb") as file:
                    block = os.urandom(MB)
                    for number in range(size // MB):
                        file.write(number.to_bytes(8, "big") + block[8:])
                hash = _hash(path)
                for direction in ("sent", "fetched"):
                    _forget_peak(service.process.pid)
                    _forget_peak(os.getpid())
                    before = _memory(service.process.pid), _memory(os.getpid())
                    if direction == "sent":
                        client.upload({hash: (size, path)})
                    else:
                        path.unlink()
                        client.download(hash, path)
                    grown = [_memory(pid, "VmHWM") - held for pid, held in zip((service.process.pid, os.getpid()), before)]
                    print(f"| {name} {direction} | {size / MB:.0f} MB | {grown[0] / MB:.1f} MB | {grown[1] / MB:.1f} MB |")
                    found[f"{name} {direction}"] = grown
                path.unlink()
        return found
    finally:
        service.stop()


def _memory(pid: int, which: str = "VmRSS") -> int:
    return int(Path(f"/proc/{pid}/status").read_text().partition(f"{which}:")[2].split()[0]) * 1024


def _forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


# -- Speed -----------------------------------------------------------------------------------------------------------------------------


def speed(given: argparse.Namespace, folder: Path) -> dict:
    """Megabytes a second of uploads and downloads, against a bare CURVE push of the same bytes between two processes."""
    folder.mkdir(parents=True)
    size = 200 * MB
    service = Service(folder / "home").start()
    found: dict[str, list[float]] = defaultdict(list)
    try:
        with service.client() as client:
            client.ping()
            for number in range(given.rounds):
                path = folder / "file"
                path.write_bytes(number.to_bytes(8, "big") + os.urandom(size - 8))
                hash = _hash(path)
                found["bare push, hashed and written"].append(_push(path, folder / "pushed", True))
                start = time.perf_counter()
                client.upload({hash: (size, path)})
                found["upload"].append(size / MB / (time.perf_counter() - start))
                found["bare push, discarded"].append(_push(path, folder / "pushed", False))
                start = time.perf_counter()
                client._receive_artifact(hash, 0, lambda chunk: None)  # the client without its file
                found["download, discarded"].append(size / MB / (time.perf_counter() - start))
    finally:
        service.stop()
    print("\n| transfer | MB/s, median |\n|---|---|")
    for kind, values in found.items():
        print(f"| {kind} | {statistics.median(values):.0f} |")
    ratios = {
        "upload": statistics.median(a / b for a, b in zip(found["upload"], found["bare push, hashed and written"])),
        "download": statistics.median(a / b for a, b in zip(found["download, discarded"], found["bare push, discarded"])),
    }
    print(f"\nUpload {ratios['upload']:.2f}x, download {ratios['download']:.2f}x of the bare push (bar 0.8).")
    return {**found, "ratios": ratios}


PULL = """
import hashlib, sys, zmq
port, server_key, secret, target, size = sys.argv[1:]
context = zmq.Context()
pull = context.socket(zmq.PULL)
pull.setsockopt(zmq.CURVE_SERVER, 1)
pull.setsockopt(zmq.CURVE_PUBLICKEY, server_key.encode())
pull.setsockopt(zmq.CURVE_SECRETKEY, secret.encode())
print(pull.bind_to_random_port("tcp://127.0.0.1"), flush=True)
left, digest = int(size), hashlib.sha256()
file = open(target, "wb", buffering=0) if target else None
while left:
    chunk = pull.recv(copy=False).buffer
    left -= len(chunk)
    if file:
        digest.update(chunk)
        file.write(chunk)
print("done", flush=True)
"""


def _push(path: Path, target: Path, keep: bool) -> float:
    """MB/s of a file pushed through a CURVE socket in chunks as large as the protocol's."""
    (server_key, secret), (client_key, client_secret) = zmq.curve_keypair(), zmq.curve_keypair()
    size = path.stat().st_size
    arguments = ["0", server_key.decode(), secret.decode(), str(target) if keep else "", str(size)]
    process = subprocess.Popen([sys.executable, "-c", PULL, *arguments], stdout=subprocess.PIPE, text=True)
    port = int(process.stdout.readline())
    context = zmq.Context()
    push = context.socket(zmq.PUSH)
    push.setsockopt(zmq.CURVE_SERVERKEY, server_key)
    push.setsockopt(zmq.CURVE_PUBLICKEY, client_key)
    push.setsockopt(zmq.CURVE_SECRETKEY, client_secret)
    push.setsockopt(zmq.SNDHWM, messages.WINDOW)
    push.connect(f"tcp://127.0.0.1:{port}")
    start = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(messages.CHUNK_BYTES):
            push.send(chunk)
    assert process.stdout.readline() == "done\n"
    seconds = time.perf_counter() - start
    context.destroy(linger=0)
    process.wait()
    return size / MB / seconds


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
