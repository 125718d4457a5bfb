"""Which trained weights there are, under which licence, where they lie, whether they are whole, and what memory they need.

`weights.toml` beside this file is the registry. `folder` is what loaders ask. How weights come here is in fetch.py, which leaves a lock
beside them: every file with its size and hash. No torch in this file: the server and the command line import it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from backend import disk
from backend.disk import size_text
from protocol import connection
from protocol.errors import KilnError

REGISTRY = Path(__file__).with_name("weights.toml")
SHIPPED = Path(__file__).with_name("data")  # of entries that come with Kiln
LOCK, UNDER_WAY = "kiln.lock.json", "kiln.pull.json"
# What holds numbers and text only. A tokenizer's .jinja template is text that transformers renders in jinja's sandbox.
SUFFIXES = (".safetensors", ".onnx", ".json", ".txt", ".model", ".jinja")
SLOWER = {"bf16": 1.0, "fp16": 1.0, "fp32": 1.0, "fp8": 1.1, "offload": 2.0}  # what a way of holding the weights costs in time, about
PANEL = "the Kiln tab under Models"
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class File:
    """A file of an entry, by its path with forward slashes. An empty hash and a size of 0 mean: not pinned."""

    path: str
    bytes: int = 0
    sha256: str = ""
    git: str = ""  # the hub's SHA-1 of a small file, as git names it; never from the registry


@dataclass(frozen=True)
class Licence:
    name: str
    url: str
    commercial: str  # "yes", "no" or the conditions
    territory: str = "worldwide"


@dataclass(frozen=True)
class Entry:
    """One set of weights. `memory`: GB that the device must have free, by precision, best first; `offload` keeps in main memory what is
    not at work. What it `needs` counts in it."""

    id: str
    title: str
    purpose: str
    loader: str  # which class of ours loads it
    source: str = ""  # a hub repository, "owner/name", or the URL of a folder
    mirrors: tuple[str, ...] = ()  # the same, at the same revision
    revision: str = ""  # the hub's commit
    files: tuple[File, ...] = ()
    patterns: tuple[str, ...] = ()  # instead of files, where their list is taken from the hub
    about: int = 0  # bytes in all, where the files' sizes are not all pinned
    licence: Licence = field(default_factory=lambda: Licence("", "", ""))
    memory: dict[str, float] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    also: tuple[str, ...] = ()  # other names of it
    gated: bool = False  # its owner lets in only who has asked on the hub's page
    bundled: bool = False  # it comes with Kiln

    @property
    def pinned(self) -> bool:
        return bool(self.files) and not self.patterns and all(file.sha256 and file.bytes for file in self.files)

    @property
    def bytes(self) -> int:
        """Of its files; 0 where nobody told."""
        return self.about or sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class Plan:
    """How weights are held on a device. `precision`: bf16, fp16, fp8 or fp32. `sentence` tells people what was weighed."""

    precision: str
    offload: bool
    bytes: int  # that it needs free on the device
    slower: float  # than the best way of holding them
    sentence: str


# -- The registry ----------------------------------------------------------------------------------------------------------------------


def entries() -> dict[str, Entry]:
    """All entries by id: Kiln's own, then those of the file that KILN_WEIGHTS_REGISTRY names, which may replace some of them."""
    own = os.environ.get("KILN_WEIGHTS_REGISTRY", "")
    found = dict(_registry(REGISTRY, REGISTRY.stat().st_mtime_ns))
    if own:
        try:
            found |= _registry(Path(own), Path(own).stat().st_mtime_ns)
        except OSError as error:
            raise KilnError("bad-registry", f"{own} cannot be read: {error.strerror}.", "Check KILN_WEIGHTS_REGISTRY.") from None
    return found


def entry(id: str) -> Entry:
    """`KilnError("no-model")` names those that there are."""
    known = entries()
    found = known.get(id) or next((one for one in known.values() if id in one.also), None)
    if found is None:
        raise KilnError("no-model", f"There are no weights called {id!r}.", f"There are: {', '.join(known)}.")
    return found


def chain(id: str) -> list[Entry]:
    """The entry and all that it needs, in the order in which they are fetched."""
    found: dict[str, Entry] = {}

    def visit(one: Entry) -> None:
        for needed in one.needs:
            visit(entry(needed))
        found[one.id] = one

    visit(entry(id))
    return list(found.values())


@functools.lru_cache(maxsize=4)
def _registry(path: Path, changed: int) -> dict[str, Entry]:
    try:
        found = {one.id: one for one in map(_entry, tomllib.loads(path.read_text(encoding="utf-8"))["entry"])}
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise KilnError("bad-registry", f"{path} is no registry of weights: {error}.", "weights.toml in Kiln shows the form.") from None
    return found


def _entry(values: dict[str, Any]) -> Entry:
    values = dict(values)
    files = tuple(File(safe(one["path"]), int(one.get("bytes", 0)), one.get("sha256", "").lower()) for one in values.pop("files", []))
    licence = Licence(**values.pop("licence"))
    values |= {name: tuple(values.get(name, ())) for name in ("mirrors", "patterns", "needs", "also")}
    id = values["id"]
    if not id or not all(letter.isascii() and (letter.isalnum() or letter in ".-") for letter in id) or id.startswith("."):
        raise ValueError(f"{id!r} cannot name a folder")
    return Entry(files=files, licence=licence, loader=values.pop("class"), **values)


def safe(path: str) -> str:
    """A path that stays in its folder and whose kind of file is accepted."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path or PurePosixPath(path).as_posix() != path:
        raise KilnError("bad-weights", f"{path!r} is no path inside a folder of weights.", "Take the weights from their own source.")
    if not path.endswith(SUFFIXES):
        raise KilnError(
            "bad-weights", f"{path} is not a kind of file that Kiln accepts.",
            f"It reads {', '.join(SUFFIXES)}: pickles (.bin, .pt, .ckpt) and Python files can run code.",
        )  # fmt: skip
    return path


# -- Where they lie, and whether they are whole ------------------------------------------------------------------------------------------


def root() -> Path:
    """The folder of all weights: $KILN_WEIGHTS, else `weights` in Kiln's home."""
    given = os.environ.get("KILN_WEIGHTS", "")
    return Path(given).expanduser().absolute() if given else connection.home() / "weights"


def place(one: Entry) -> Path:
    """Where an entry's files lie, or will lie."""
    return SHIPPED / one.id if one.bundled else root() / one.id


def state(id: str) -> str:
    """installed, bundled (it came with Kiln), partial (a download to go on with), missing, or damaged."""
    return _state(entry(id))[0]


def _state(one: Entry) -> tuple[str, str]:
    """The state and, if it is damaged, what is wrong. Looks at names and sizes only: as quick as a listing must be."""
    where = place(one)
    if one.bundled:
        names = [file.path for file in one.files] or [file.name for file in where.glob("*.safetensors")] or ["*/*.safetensors"]
        there = all(any(where.glob(name)) for name in names)
        wrong = [file.path for file in one.files if there and file.bytes and (where / file.path).stat().st_size != file.bytes]
        return ("damaged", f"{wrong[0]} has another size") if wrong else ("bundled" if there else "missing", "")
    lock = read(where / LOCK)
    if lock is None:
        begun = (where / UNDER_WAY).is_file() or where.is_dir() and any(where.rglob("*.part"))
        return "partial" if begun else "missing", ""
    wrong_text = lock.get("damaged") or _differs(one, lock)
    for file in lock["files"]:
        path = where / file["path"]
        if not path.is_file():
            wrong_text = wrong_text or f"{file['path']} is gone"
        elif path.stat().st_size != file["bytes"]:
            wrong_text = wrong_text or f"{file['path']} has {path.stat().st_size} bytes, not {file['bytes']}"
    return ("damaged", wrong_text) if wrong_text else ("installed", "")


def _differs(one: Entry, lock: dict[str, Any]) -> str:
    """Where the registry pins something else than what is installed, in words."""
    locked = {file["path"]: file["sha256"] for file in lock["files"]}
    for file in one.files:
        if file.path not in locked:
            return f"{file.path} is missing"
        if file.sha256 and file.sha256 != locked[file.path]:
            return f"{file.path} is of another revision"
    return ""


def folder(id: str) -> Path:
    """The folder of an entry whose files, and those of all that it needs, are complete and were checked.

    A file that was changed since its check is checked again. `KilnError("no-weights")` says what is missing, how large it is, under which
    licence, and how to get it.
    """
    for one in chain(id):
        kind, wrong = _state(one)
        if kind == "installed":
            wrong = _recheck(one)
        if kind not in ("installed", "bundled") or wrong:
            raise _no_weights(one, "damaged" if wrong else kind, wrong)
    return place(entry(id))


def revision(id: str) -> str:
    """What tells the files of an entry, and of all that it needs, from those of another revision: a hash, which says nothing of what comes
    with Kiln and is told by Kiln's own version."""
    digest = hashlib.sha256()
    for one in chain(id):
        for file in (read(place(one) / LOCK) or {}).get("files", []):
            digest.update(f"{one.id} {file['path']} {file['sha256']}\0".encode())
    return digest.hexdigest()


def _no_weights(one: Entry, kind: str, wrong: str) -> KilnError:
    if one.bundled:
        message = f"{one.title} belongs to Kiln and is not where it should be ({place(one)}{': ' + wrong if wrong else ''})."
        return KilnError("no-weights", message, "Set the backend up again: `python build.py setup`, or Repair in Blender's preferences.")
    size = f"{size_text(one.bytes)}, " if one.bytes else ""
    what = {"partial": "are only partly here", "damaged": f"are damaged: {wrong}"}.get(kind, "are not installed")
    verb = {"partial": "Go on with the download", "damaged": "Repair them"}.get(kind, "Download them")
    command = f"kiln weights pull {one.id}" + ("" if accepted(one) else " --accept-licence")
    return KilnError(
        "no-weights", f"The weights of {one.title} ({size}licence {one.licence.name}) {what}.", f"{verb} in {PANEL}, or: `{command}`."
    )


def _recheck(one: Entry) -> str:
    """What is wrong with files that changed since they were checked; they are hashed again."""
    where = place(one)
    lock = read(where / LOCK)
    if lock is None:
        return "its lock is gone"
    changed = False
    for file in lock["files"]:
        path = where / file["path"]
        now = path.stat().st_mtime_ns
        if now == file.get("mtime_ns"):
            continue
        if sha256(path) != file["sha256"]:
            lock["damaged"] = f"{file['path']} does not have the bytes that were checked"
            break
        file["mtime_ns"], changed = now, True
    if changed or lock.get("damaged"):
        with contextlib.suppress(OSError, KilnError):  # a folder that cannot be written to is checked each time
            write(where / LOCK, lock)
    return lock.get("damaged", "")


# -- Memory ------------------------------------------------------------------------------------------------------------------------------


def memory_plan(id: str, free_bytes: int, device: str) -> Plan:
    """The best way of holding an entry's weights that fits into `free_bytes` of `device` ("cpu", or a GPU: "cuda", "cuda:1", "mps").

    `KilnError`: out-of-memory where none fits, no-device where the entry wants a GPU.
    """
    one = entry(id)
    cpu = device.partition(":")[0] == "cpu"
    anywhere = set(one.memory) == {"fp32"}  # small networks are held alike on every device
    ways = {way: int(1e9 * need) for way, need in one.memory.items() if anywhere or (way == "fp32") == cpu}
    if not ways:
        where, other = ("a GPU", "the CPU") if cpu else ("the CPU", "a GPU")
        hint = "Set the device to the CPU."
        if cpu:
            hint = "Compute on a machine with one. From a picture, kiln-tiny-turntable needs none."
        raise KilnError("no-device", f"{one.title} runs on {where} only, and this would be {other}.", hint)
    best = next(iter(ways))
    whole = f"needs {_gigabytes(ways[best])}, {_gigabytes(free_bytes)} free"
    for way, need in ways.items():
        if need <= free_bytes:
            slower = SLOWER[way] / SLOWER[best]
            sentence = f"{whole}: {way}" + (f", about {slower:.2g}x slower" if slower > 1 else "")
            precision = next(name for name in ways if name != "offload") if way == "offload" else way
            return Plan(precision, way == "offload", need, slower, sentence)
    way, need = min(ways.items(), key=lambda item: item[1])
    how = "by offload" if way == "offload" else f"as {way}"
    hint = f"With {_gigabytes(need)} free it would run {how}. Close what else uses the device, or choose a smaller model."
    raise KilnError("out-of-memory", f"{one.title} {whole}.", hint)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.0f} GB" if count >= 10e9 else f"{count / 1e9:.1f} GB"


# -- Licences ----------------------------------------------------------------------------------------------------------------------------


def accepted(one: Entry) -> str:
    """When the user agreed to the entry's licence, as a date, or "". What comes with Kiln needs no consent of its own."""
    found = (read(root() / "licences.json") or {}).get(one.id, {})
    same = found.get("licence") == one.licence.name and found.get("url") == one.licence.url
    return found.get("date", "") if same else ""


def terms(one: Entry) -> str:
    """What a user should know before agreeing to a download, in lines."""
    memory = ", ".join(f"{way} {need:g} GB" for way, need in one.memory.items())
    commercial = {"yes": "allowed", "no": "not allowed"}.get(one.licence.commercial, one.licence.commercial)
    known = "every file is pinned" if one.pinned else "at a pinned commit" if one.revision else "not pinned: the first download binds"
    lines = [
        f"{one.title} ({one.id}): {one.purpose}",
        f"  Size       {size_text(one.bytes) if one.bytes else 'told by the hub'}, {'with Kiln' if one.bundled else known}",
        f"  Memory     {memory}",
        f"  Licence    {one.licence.name}, {one.licence.url}",
        f"  Commercial {commercial}",
        f"  Territory  {one.licence.territory}",
    ]
    if one.gated:
        lines.append(f"  Login      agree at {HUB}/{one.source} first; then a token, in HF_TOKEN or by `hf auth login`")
    return "\n".join(lines)


def describe(one: Entry) -> dict[str, Any]:
    """An entry and how it stands, for lists, as plain values."""
    kind, wrong = _state(one)
    where = place(one)
    lock = read(where / LOCK) or {}
    here = sum(path.stat().st_size for path in where.rglob("*") if path.is_file()) if kind != "missing" and where.is_dir() else 0
    size = one.bytes or sum(file["bytes"] for file in lock.get("files", [])) or (here if one.bundled else 0)
    return {
        "id": one.id, "title": one.title, "purpose": one.purpose, "class": one.loader, "state": kind, "problem": wrong,
        "bytes": size, "here": here, "memory": dict(one.memory),
        "licence": asdict(one.licence), "accepted": accepted(one), "needs": list(one.needs), "also": list(one.also),
        "gated": one.gated, "bundled": one.bundled,
        "pinned": one.pinned or one.bundled, "source": one.source, "revision": one.revision or lock.get("revision", ""),
        "checked": lock.get("checked", ""),
    }  # fmt: skip


def agree(one: Entry) -> None:
    """Records that the user accepts the entry's licence, with the date."""
    path = root() / "licences.json"
    known = read(path) or {}
    known[one.id] = {"licence": one.licence.name, "url": one.licence.url, "date": time.strftime("%Y-%m-%d")}
    write(path, known)


# -- Files of ours -----------------------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any] | None:
    """A small file of ours; None if it is not there or is not whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write(path, [json.dumps(values, indent=1).encode()], path.parent)


def sha256(path: Path, step: Callable[[int], None] = lambda count: None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as source:
        while piece := source.read(1 << 22):
            digest.update(piece)
            step(len(piece))
    return digest.hexdigest()
