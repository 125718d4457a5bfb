"""A small hub on this machine, for tests: the real HTTP that the hub speaks, and the ways in which it can go wrong."""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


def safetensors(content: bytes, name: str = "weight") -> bytes:
    """A file of one tensor of bytes."""
    header = json.dumps({name: {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}}).encode()
    return len(header).to_bytes(8, "little") + header + content


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """Repositories: {"owner/name": {commit: {path: content}}}, the newest commit last.

    Faults, all by a file's path: cut (numbers of bytes after which a connection breaks, one for each request), wrong (bytes sent instead),
    rate (bytes a second), status (answers instead of the file, one for each request), no_ranges. `asked` lists (path, range, token).
    """

    def __init__(self, repositories: dict[str, dict[str, dict[str, bytes]]]):
        self.repositories = repositories
        self.asked: list[tuple[str, str, str]] = []
        self.cut: dict[str, list[int]] = {}
        self.wrong: dict[str, bytes] = {}
        self.rate: dict[str, int] = {}
        self.status: dict[str, list[int]] = {}
        self.no_ranges: set[str] = set()
        self.token = ""  # that repositories ask for
        self.elsewhere = ""  # address that files are sent on to, as the hub does with its large ones
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub._answer(self)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def ranges(self, path: str) -> list[str]:
        """The ranges that a file was asked for with, "" for all of it."""
        return [asked for name, asked, _ in self.asked if name == path]

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path, token = unquote(request.path), request.headers.get("Authorization", "").removeprefix("Bearer ")
        if path.startswith("/api/models/"):
            owner, name, _, revision = path.partition("?")[0].removeprefix("/api/models/").split("/", 3)
            self._list(request, f"{owner}/{name}", revision, token)
            return
        parts = path.lstrip("/").split("/")
        if len(parts) > 4 and parts[2] == "resolve":
            if self.elsewhere:
                self._send(request, 302, b"", {"Location": self.elsewhere + request.path})
                return
            commits = self.repositories.get("/".join(parts[:2]), {})
            found = self._commit(commits, parts[3])[1].get("/".join(parts[4:]))
            file = "/".join(parts[4:])
        else:  # a plain folder
            file = parts[-1]
            found = next((files[file] for commits in self.repositories.values() for files in commits.values() if file in files), None)
        self.asked.append((file, request.headers.get("Range", "").removeprefix("bytes="), token))
        if self.token and token != self.token:
            self._send(request, 401, b"no")
        elif self.status.get(file):
            self._send(request, self.status[file].pop(0), b"")
        elif found is None:
            self._send(request, 404, b"")
        else:
            self._send_file(request, file, self.wrong.get(file, found))

    @staticmethod
    def _commit(commits: dict[str, dict[str, bytes]], revision: str) -> tuple[str, dict[str, bytes]]:
        if revision == "main" and commits:
            return list(commits.items())[-1]
        return revision, commits.get(revision, {})

    def _list(self, request: BaseHTTPRequestHandler, repository: str, revision: str, token: str) -> None:
        self.asked.append((f"api/{repository}", "", token))
        commit, files = self._commit(self.repositories.get(repository, {}), revision)
        if self.token and token != self.token:
            self._send(request, 401, b"{}")
        elif not files:
            self._send(request, 404, b"{}")
        else:
            siblings: list[dict] = []
            for name, content in files.items():
                one = {"rfilename": name, "size": len(content), "blobId": git_sha1(content)}
                if name.endswith((".safetensors", ".bin")):  # those that lie in large-file storage
                    one["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 135}
                siblings.append(one)
            self._send(request, 200, json.dumps({"sha": commit, "siblings": siblings}).encode())

    def _send_file(self, request: BaseHTTPRequestHandler, file: str, content: bytes) -> None:
        asked = request.headers.get("Range", "")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and file not in self.no_ranges else 0
        if start >= len(content) and start:
            self._send(request, 416, b"")
            return
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        rest = content[start:]
        cuts = self.cut.get(file)
        most = cuts.pop(0) if cuts else len(rest)
        self._send(request, 206 if start else 200, rest[:most], headers, length=len(rest), rate=self.rate.get(file, 0))
        if most < len(rest):
            request.close_connection = True

    @staticmethod
    def _send(request, status: int, content: bytes, headers: dict[str, str] | None = None, length: int | None = None, rate: int = 0):
        try:
            request.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(content) if length is None else length)}.items():
                request.send_header(name, value)
            request.end_headers()
            step = max(1, rate // 20) if rate else max(1, len(content))
            for begin in range(0, len(content), step):
                request.wfile.write(content[begin : begin + step])
                request.wfile.flush()
                if rate:
                    time.sleep(0.05)
        except OSError:  # the client went away
            request.close_connection = True


def registry(path: Path, *entries: dict) -> Path:
    """Writes a registry file; each entry needs an id only."""
    lines = []
    for entry in entries:
        entry = {"title": entry["id"].capitalize(), "purpose": "For a test.", "class": "test", "memory": {"fp32": 1.0}, **entry}
        entry.setdefault("licence", {"name": "MIT", "url": "https://example.org/mit", "commercial": "yes"})
        lines += ["[[entry]]", *(f"{key} = {_toml(value)}" for key, value in entry.items()), ""]
    path.write_text("\n".join(lines))
    return path


def _toml(value) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return "[" + ", ".join(map(_toml, value)) + "]" if isinstance(value, list) else json.dumps(value)


def pinned(path: str, content: bytes) -> dict:
    return {"path": path, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
