"""An item's files in the folder of results, and by which of them an item counts as captured, as finished, or as failed for good.

    OUT/<name>/                the recipe's results, and item.json: what they were made of
    OUT/.work/<name>/inputs/   captured views; inputs.json beside it says that they are whole
    OUT/.work/<name>/failure.json

Everything is keyed by a fingerprint of what determines the result, so a changed source, parameter or Kiln makes an item anew.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from backend import disk, inputs
from backend.batch.manifest import RECORD, Item
from backend.store import check_name
from protocol import VERSION, recipes, views
from protocol.connection import patiently
from protocol.errors import KilnError

WORK = ".work"


def fingerprint(item: Item) -> str:
    """SHA-256 of the source's content, the recipe with every parameter, the name, and Kiln's version. Raises KilnError("bad-input")."""
    digest = hashlib.sha256()
    table = [VERSION, item.recipe, item.values, item.subject, item.name]
    digest.update(json.dumps(table, sort_keys=True).encode())
    for file in sources(item):
        digest.update(content_hash(file).encode())
    return digest.hexdigest()


def content_hash(file: Path) -> str:
    """SHA-256 of a file's bytes, or KilnError("bad-input")."""
    try:
        state = file.stat()
        return _hashed(file, state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise KilnError("bad-input", f"{file} cannot be read: {error.strerror or error}.", "Check the file and its permissions.") from None


@functools.lru_cache(maxsize=100_000)  # many items come of one .blend
def _hashed(file: Path, size: int, changed: int) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def sources(item: Item) -> list[Path]:
    """The files that an item is made of: the one that it names, and those that a model in text names in turn."""
    if item.kind == "views":
        folder = item.file if item.file.is_dir() else item.file.parent
        with contextlib.suppress(KilnError):  # what is wrong with it is said when it is read
            return [folder / "transforms.json", *(file for name in sorted(views.names(folder)) if (file := folder / name).is_file())]
        return [folder / "transforms.json"]
    if item.file.is_dir():
        return sorted(file for file in item.file.rglob("*") if file.is_file())
    companions = {".gltf": _of_gltf, ".obj": _of_obj}.get(item.file.suffix.lower(), lambda file: [])
    return [item.file, *sorted({file for file in companions(item.file) if file.is_file()})]


def _of_gltf(file: Path) -> list[Path]:
    try:
        table = json.loads(file.read_bytes())
        named = [one["uri"] for kind in ("buffers", "images") for one in table.get(kind, ()) if "uri" in one]
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return []
    return [file.parent / unquote(uri) for uri in named if not uri.startswith("data:")]


def _of_obj(file: Path) -> list[Path]:
    """The materials of an .obj, and the pictures of each: the rest of a line that begins with mtllib or map."""
    found = []
    with contextlib.suppress(OSError), open(file, "rb") as lines:
        for line in lines:
            word, _, rest = line.strip().partition(b" ")
            if word == b"mtllib":
                library = file.parent / os.fsdecode(rest.strip())
                found += [library, *_of_obj(library)]
            elif word.lower().startswith((b"map_", b"bump", b"norm", b"disp")) and rest:
                found += [file.parent / os.fsdecode(name) for name in (rest.strip(), rest.split()[-1])]  # options may stand before it
    return found


def direct_inputs(item: Item) -> dict[str, Path]:
    """The input files of an item that needs no Blender, by their names on the wire. Raises KilnError("bad-input")."""
    wanted = recipes.RECIPES[item.recipe].INPUT
    return inputs.gather_picture(item.file, None, None, "")[0] if wanted == "picture" else inputs.gather(item.file, wanted)


class Folder:
    """Where one item's files lie."""

    def __init__(self, out: Path, name: str):
        self.results, self.work = out / name, out / WORK / name
        self.inputs, self.fetched = self.work / "inputs", self.work / "results"

    # -- What an earlier run left ------------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any] | None:
        """item.json, of whatever was finished here."""
        return read_json(self.results / RECORD)

    def is_foreign(self) -> bool:
        """Whether files lie here that are not Kiln's, which writes item.json first and last."""
        return not (self.results / RECORD).exists() and any(not path.is_dir() for path in self.results.rglob("*"))

    def finished(self, fingerprint: str) -> dict[str, Any] | None:
        """item.json if it is of this fingerprint and all of its files are there."""
        record = self.record()
        if record is None or record.get("fingerprint") != fingerprint or not isinstance(record.get("files"), dict):
            return None
        with contextlib.suppress(OSError):
            if all((self.results / name).stat().st_size == size for name, size in record["files"].items()):
                return record
        return None

    def captured(self, fingerprint: str) -> dict[str, Any] | None:
        """What `keep_captured` kept, its paths made whole."""
        found = read_json(self.work / "inputs.json")
        if found is None or found.get("fingerprint") != fingerprint:
            return None
        files = {name: self.work / path for name, path in found["inputs"].items()}
        return {**found, "inputs": files} if all(file.is_file() for file in files.values()) else None

    def failure(self, fingerprint: str) -> KilnError | None:
        """Why an earlier run gave it up."""
        found = read_json(self.work / "failure.json")
        return KilnError.from_wire(found["error"]) if found is not None and found.get("fingerprint") == fingerprint else None

    # -- What this run leaves -----------------------------------------------------------------------------------------------------------

    def keep_captured(self, fingerprint: str, answer: dict[str, Any]) -> dict[str, Any]:
        """Notes that the capture is whole. answer: Blender's; its files lie in `inputs`."""
        files = {name: Path(path).relative_to(self.work).as_posix() for name, path in answer["inputs"].items()}
        kept = {key: answer.get(key) for key in ("values", "warnings", "seconds", "source")}
        write_json(self.work / "inputs.json", {"fingerprint": fingerprint, "inputs": files, **kept})
        return self.captured(fingerprint) or {}

    def keep_failure(self, fingerprint: str, error: KilnError) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        write_json(self.work / "failure.json", {"fingerprint": fingerprint, "error": error.to_wire()})
        shutil.rmtree(self.inputs, ignore_errors=True)

    def forget_failure(self) -> None:
        (self.work / "failure.json").unlink(missing_ok=True)

    def take_results(self, record: dict[str, Any]) -> dict[str, Any]:
        """Moves what was fetched to its place and writes item.json, last. Files of an earlier result that are no more go; others stay."""
        before = self.record() or {}
        unfinished = json.dumps({"files": before.get("files", {})})  # says whose folder it is, and by no fingerprint counts as finished
        patiently(lambda: disk.write(self.results / RECORD, [unfinished.encode()], self.work, durable=False))
        fetched = sorted(path.relative_to(self.fetched).as_posix() for path in self.fetched.rglob("*") if path.is_file())
        for name in set(before.get("files", ())) - set(fetched):
            with contextlib.suppress(OSError, KilnError):
                (self.results / check_name(name)).unlink()
        for name in fetched:
            (self.results / name).parent.mkdir(parents=True, exist_ok=True)
            patiently(lambda name=name: os.replace(self.fetched / name, self.results / name))  # type: ignore[misc]
        return self.keep_record({**record, "kiln": VERSION, "finished": time.time()}, fetched)

    def keep_record(self, record: dict[str, Any], names: list[str]) -> dict[str, Any]:
        """Writes item.json, with the sizes of the files that must be there for the item to count as finished."""
        record = {**record, "files": {name: (self.results / name).stat().st_size for name in names}}
        write_json(self.results / RECORD, record)
        return record

    def clear_work(self) -> None:
        """The item is finished: what was captured is needed no more."""
        shutil.rmtree(self.work, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, default=os.fspath) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    patiently(lambda: disk.write(path, [text.encode()], path.parent, durable=False, private=False))


def read_json(path: Path) -> Any:
    """A JSON map, or None where there is none that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
