"""What the protocol's tests stand on: a real server process, a network that can be cut, and a peer that speaks the wire by hand."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import msgpack
import zmq

from protocol.client import Client
from protocol.connection import Connection

ROOT = Path(__file__).parents[2]


class Service:
    """A backend in its own process. Without workers its jobs wait for ever, which is what most of these tests want."""

    def __init__(self, home: Path, workers: int = 0, before: str = "", **options):
        self.home, self.path = home, home / "run" / "connection.json"
        code = f"{before}\nfrom pathlib import Path\nfrom backend.server import serve\n"
        self.code = code + f"serve(Path({str(home)!r}), workers={workers}, **{options!r})"
        self.process: subprocess.Popen | None = None
        self.seconds = 0.0

    def start(self) -> Service:
        """Starts it and waits until it answers; `seconds` says how long that took."""
        self.launch()
        start = time.perf_counter()
        while True:
            try:
                with self.client() as client:
                    client.hello()
                    break
            except Exception:
                assert self.process.poll() is None, f"the server ended: {self.log()}"
                assert time.perf_counter() - start < 30, f"the server does not answer: {self.log()}"
                time.sleep(0.005)
        self.seconds = time.perf_counter() - start
        return self

    def launch(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "KILN_HOME": str(self.home)}
        with open(self.home / "log", "ab") as log:
            self.process = subprocess.Popen([sys.executable, "-c", self.code], env=environment, stdout=log, stderr=log)

    def log(self) -> str:
        return (self.home / "log").read_text(errors="replace")

    def kill(self) -> None:
        """kill -9"""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
                raise

    def connection(self) -> Connection:
        return Connection.load(self.path)

    def client(self, **options) -> Client:
        return Client(self.connection(), **options)

    def peer(self, hello: bool = True, **changes) -> Peer:
        return Peer(replace(self.connection(), **changes), hello)

    def memory(self) -> int:
        """Bytes of memory that the process holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024


class Peer:
    """A client by hand: sends any frames, sees every frame."""

    def __init__(self, connection: Connection, hello: bool = True, curve: bool = True, receive: int = 1000, buffer: int = -1):
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, receive)
        self.socket.setsockopt(zmq.RCVBUF, buffer)
        if curve:
            self.socket.setsockopt(zmq.CURVE_SERVERKEY, connection.server_key.encode())
            self.socket.setsockopt(zmq.CURVE_PUBLICKEY, connection.client_key.encode())
            self.socket.setsockopt(zmq.CURVE_SECRETKEY, connection.client_secret.encode())
        self.socket.connect(connection.endpoint)
        if hello:
            reply, _ = self.ask("hello", protocol=[1, 0])
            assert reply["type"] == "reply", reply

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy(linger=0)

    def send(self, header: dict | bytes, *blobs: bytes) -> None:
        self.socket.send_multipart([header if isinstance(header, bytes) else msgpack.packb(header), *blobs])

    def receive(self, timeout: float = 5.0) -> tuple[dict, list[bytes]] | None:
        """(header, blobs) of the next message, or None."""
        if not self.socket.poll(timeout * 1000):
            return None
        header, *blobs = self.socket.recv_multipart()
        return msgpack.unpackb(header), blobs

    def ask(self, kind: str, *blobs: bytes, id: str | None = None, **fields) -> tuple[dict, list[bytes]]:
        """Sends a request and returns its answer; what else arrives meanwhile is passed over."""
        id = id or secrets.token_hex(8)
        self.send({"type": kind, "id": id, **fields}, *blobs)
        while True:
            message = self.receive()
            assert message is not None, f"no answer to {kind}"
            if message[0].get("to") == id:
                return message


class Network:
    """A TCP connection between client and server that counts, records and can be cut."""

    def __init__(self, connection: Connection, until: int | None = None):
        """until: bytes in either direction after which the line is cut, once."""
        self.port = int(connection.endpoint.rpartition(":")[2])
        self.up = self.down = 0
        self.recorded = bytearray()
        self.until, self.cuts, self.open = until, 0, True
        self.flowing = threading.Event()
        self.flowing.set()
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.connection = replace(connection, endpoint=f"tcp://127.0.0.1:{self.listener.getsockname()[1]}", path=None)
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()
        self.cut()

    def cut(self) -> None:
        for pair in self.pairs:
            for end in pair:
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
                end.close()
        self.pairs.clear()
        self.cuts += 1

    def hold(self) -> None:
        """From now on nothing gets through, and nobody is told."""
        self.flowing.clear()

    def go_on(self) -> None:
        self.flowing.set()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            if not self.open:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self.port))
            self.pairs.append((near, far))
            threading.Thread(target=self._carry, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._carry, args=(far, near, False), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        try:
            while data := source.recv(65536):
                if up:
                    self.up += len(data)
                    self.recorded += data[: max(0, 100_000 - len(self.recorded))]
                else:
                    self.down += len(data)
                self.flowing.wait()
                target.sendall(data)
                if self.until is not None and max(self.up, self.down) > self.until:
                    self.until = None
                    self.cut()
        except OSError:
            pass
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
