"""How weights come here: downloads that resume, are checked and can be cancelled, from the registry's sources, a folder or a bundle.

Nothing here runs or unpickles what it fetched: only formats that hold plain numbers and text are accepted, and configurations that name
code are refused. A file's right hash comes from the registry where it is pinned there. Where it is not, the first download asks the hub
for the hash of each file at one commit and checks against it; the lock beside the weights keeps the SHA-256 of every file, and binds from
then on (trust on first use).

Files come by plain HTTP with byte ranges, through requests. huggingface_hub's own downloader was looked at and not taken: it cannot be
cancelled inside a file, compares sizes but not hashes, and knows one source. Its token serves repositories that ask for a login.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit

from backend import disk, weights
from backend.disk import size_text
from backend.weights import LOCK, UNDER_WAY, Entry, File
from protocol.errors import KilnError

LIBRARIES = ("diffusers", "transformers", None)  # that a pipeline's parts may come from; None stands for a part that is left out
CODE = ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code")  # fields of configurations that lead to code
READABLE = 64_000_000  # bytes of a configuration that is looked through
SPARE = 100_000_000  # bytes that stay free on the disk
ATTEMPTS, FIRST_ATTEMPTS = 6, 3  # at one source in a row without a new byte: after some came, and before
BACKOFF = 1.0  # seconds before the second attempt; doubled for each further one
TIMEOUTS = (10.0, 20.0)  # seconds for a connection, and for the next byte
PIECE = 1 << 18  # bytes read at once
REPORT = 0.2  # seconds between two reports
WINDOW = 5.0  # seconds that the told rate is averaged over

_Progress = Callable[..., None]  # backend.progress.Progress, without its numpy


def silent(fraction: float, text: str = "") -> None:
    """Report to nobody."""


class _Unfit(Exception):
    """A source does not have the file, or not the right one: the next may."""

    def __init__(self, error: KilnError):
        self.error = error


# -- What may be done ------------------------------------------------------------------------------------------------------------------


def offline(online: bool = True) -> KilnError | None:
    """Why nothing may be fetched from the network, if so. online: False where Blender's preferences forbid it."""
    other = "Or take the files from elsewhere: `kiln weights pull ID --from FOLDER`, or Locate in the list of models."
    if not online:
        return KilnError(
            "offline", "Blender does not allow online access.", f"Allow it in Preferences > System > Network > Allow Online Access. {other}"
        )
    for name in ("KILN_OFFLINE", "HF_HUB_OFFLINE"):
        if os.environ.get(name, "").lower() not in ("", "0", "no", "false", "off"):
            return KilnError("offline", f"{name} is set, so Kiln fetches nothing.", f"Unset it and start the backend again. {other}")
    return None


def permit(id: str, accept: bool = False, online: bool = True, source: Path | None = None) -> list[Entry]:
    """The entries that `pull` would fetch, after what can be refused at once: no-model, no-weights (of what ships with Kiln),
    licence-needed, offline."""
    wanted = [one for one in weights.chain(id) if weights.state(one.id) not in ("installed", "bundled")]
    for one in wanted:
        if one.bundled:
            weights.folder(one.id)  # says how to get it back
    unread = [one for one in wanted if not weights.accepted(one)]
    if unread and not accept:
        names = ", ".join(f"{one.licence.name} of {one.title}" for one in unread)
        raise KilnError(
            "licence-needed",
            f"You have not agreed to the licence yet: {names}.",
            f"Read what `kiln weights show {id}` or the panel tells of it; then agree there, or add --accept-licence.",
        )
    refused = offline(online) if source is None and wanted else None
    if refused is not None:
        raise refused
    for one in unread:
        weights.agree(one)
    return wanted


@contextlib.contextmanager
def _held(one: Entry) -> Iterator[None]:
    """The only one, of all processes, that changes an entry's files."""
    import filelock

    path = weights.root() / f".{one.id}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        message = f"Another download of {one.title} is under way."
        raise KilnError("busy", message, "Wait until it is done, or cancel it there.") from None
    try:
        yield
    finally:
        lock.release()


# -- Pull ------------------------------------------------------------------------------------------------------------------------------


def pull(id: str, accept: bool = False, online: bool = True, source: Path | None = None, progress: _Progress = silent) -> Path:
    """Fetches an entry and all that it needs, and returns its folder. What is there already is kept; a broken download goes on.

    accept: the user agrees to the licences. online: False where Blender's preferences forbid it. source: a folder or a bundle's zip to
    take the files from, instead of the network. progress(fraction, text) may raise `Cancelled`; what came is kept then.
    Raises `KilnError`: no-model, licence-needed, offline, busy, no-space, no-source, gated, bad-hash, bad-weights, bad-input, disk.
    """
    try:
        wanted = permit(id, accept, online, source)
        with contextlib.ExitStack() as held:
            for one in wanted:
                held.enter_context(_held(one))
            wanted = [one for one in wanted if weights.state(one.id) != "installed"]  # by another process, just now
            if source is not None:
                _take(wanted, Path(source), progress)
            elif wanted:
                _download(wanted, progress)
    except OSError as error:
        what = f"{error.filename or weights.root()}: {error.strerror or error}"
        raise KilnError("disk", f"The weights cannot be written: {what}.", "Check the folder, or set KILN_WEIGHTS to another.") from error
    return weights.folder(id)


def _download(wanted: list[Entry], progress: _Progress) -> None:
    import requests

    with requests.Session() as session:
        session.headers["User-Agent"] = "kiln"
        progress(0.0, "Asking what there is")
        plans = [(one, _plan(session, one, progress)) for one in wanted]
        meter = _Meter(plans, progress)
        _make_room(sum(file["bytes"] - _here(one, file) for one, plan in plans for file in plan["files"]))
        for one, plan in plans:
            weights.write(weights.place(one) / UNDER_WAY, plan)
            meter.entry = one.title
            for file in plan["files"]:
                if not _is_done(one, plan, file, meter):
                    _fetch(session, one, plan, file, meter)
                    weights.write(weights.place(one) / UNDER_WAY, plan)
            _lock(one, plan)


def _plan(session: Any, one: Entry, progress: _Progress) -> dict[str, Any]:
    """Which files, with sizes and hashes, make the entry: as a download that is under way began it, as the registry pins it, or as the hub
    tells. Its `files` have path, bytes, and sha256 or git."""
    for name in (UNDER_WAY, LOCK):
        known = weights.read(weights.place(one) / name)
        if known is not None and _agrees(one, known):
            return {**known, "files": [dict(file) for file in known["files"]]}
    if one.pinned:
        files = [{"path": file.path, "bytes": file.bytes, "sha256": file.sha256} for file in one.files]
        return {"id": one.id, "source": one.source, "revision": one.revision, "checked": "registry", "files": files}
    if "://" in one.source or not one.source:
        raise KilnError("bad-registry", f"{one.title} has no hashes to check it by, and its source tells none.", "Pin it in the registry.")
    return _ask_hub(session, one, progress)


def _agrees(one: Entry, known: dict[str, Any]) -> bool:
    """Whether what an earlier download settled fits what the registry says now."""
    files = known.get("files")
    if not isinstance(files, list) or one.revision and known.get("revision") != one.revision:
        return False
    settled = {file["path"]: file.get("sha256", "") for file in files}
    if any(file.path not in settled or file.sha256 and settled[file.path] not in (file.sha256, "") for file in one.files):
        return False
    return all(file.get("sha256") or file.get("git") for file in files)


def _ask_hub(session: Any, one: Entry, progress: _Progress) -> dict[str, Any]:
    """The files at the entry's commit, or at the newest if none is pinned, with the hashes that the hub has of them."""
    where = f"{_hub()}/api/models/{one.source}/revision/{quote(one.revision or 'main', safe='')}?blobs=true"
    listing = _listing(session, one, where, progress)
    revision = str(listing.get("sha", ""))
    found = {}
    for sibling in listing.get("siblings", []):
        large = sibling.get("lfs") or {}
        name, size = str(sibling.get("rfilename", "")), large.get("size", sibling.get("size"))
        found[name] = {"path": name, "bytes": size, "sha256": large.get("sha256", ""), "git": str(sibling.get("blobId") or "")}
    if one.files:
        absent = [file.path for file in one.files if file.path not in found]
        if absent:
            raise KilnError(
                "no-source", f"{one.source} has no {absent[0]} at {revision[:12]}.", "Update Kiln: its registry is out of date."
            )
        chosen = [found[file.path] for file in one.files]
    else:
        chosen = [file for name, file in sorted(found.items()) if _matches(name, one.patterns) and name.endswith(weights.SUFFIXES)]
    pins = {file.path: file for file in one.files}
    for file in chosen:
        weights.safe(file["path"])
        pin = pins.get(file["path"], File(""))
        if pin.sha256 and file["sha256"] and pin.sha256 != file["sha256"]:
            raise _wrong(one, file["path"], "the hub tells another hash than Kiln's registry")
        file["sha256"] = pin.sha256 or file["sha256"]
        if not isinstance(file["bytes"], int) or not (file["sha256"] or file["git"]):
            raise KilnError("no-source", f"The hub tells no size or hash of {file['path']}.", "Try again later.")
    if not chosen:
        raise KilnError("no-source", f"{one.source} has none of the files that {one.title} needs.", "Update Kiln.")
    return {"id": one.id, "source": one.source, "revision": revision, "checked": "hub", "files": chosen}


def _listing(session: Any, one: Entry, where: str, progress: _Progress) -> dict[str, Any]:
    import requests

    meter = _Meter([], progress)
    for attempt in range(FIRST_ATTEMPTS):
        try:
            answer = session.get(where, headers=_login(one), timeout=TIMEOUTS)
            if answer.status_code in (401, 403):
                raise _gated(one)
            if answer.status_code < 500 and answer.status_code != 429:
                answer.raise_for_status()
                return answer.json()
            trouble = f"it answers {answer.status_code}"
        except (requests.RequestException, ValueError) as error:
            trouble = _short(error)
            if getattr(error, "response", None) is not None:
                break
        if attempt < FIRST_ATTEMPTS - 1:
            meter.wait(BACKOFF * 2**attempt, f"{_host(where)}: {trouble}; trying again")
    raise KilnError("no-source", f"The hub does not tell what {one.title} is made of: {trouble}.", "Check the network, then try again.")


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Part by part: a * stays inside its folder."""
    parts = path.split("/")
    return any(len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted)) for wanted in (p.split("/") for p in patterns))


def _hub() -> str:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or weights.HUB


def _login(one: Entry) -> dict[str, str]:
    """For repositories that ask for one. requests drops it where the hub sends on to another host."""
    if not one.gated:
        return {}
    import huggingface_hub

    token = huggingface_hub.get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _gated(one: Entry) -> KilnError:
    return KilnError(
        "gated",
        f"{one.title} is only for users whom its owner let in.",
        f"Agree at {weights.HUB}/{one.source}, then set HF_TOKEN to a token of yours or run `hf auth login`, and try again.",
    )


def _sources(one: Entry, plan: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(URL, headers) of a file at each source."""
    for source in (one.source, *one.mirrors):
        if "://" in source:
            yield source.rstrip("/") + "/" + quote(path), {}
        elif source:
            repository, _, revision = source.partition("@")
            revision = revision or plan["revision"] or "main"
            login = _login(one) if source == one.source else {}
            yield f"{_hub()}/{repository}/resolve/{quote(revision, safe='')}/{quote(path)}", login


def _fetch(session: Any, one: Entry, plan: dict[str, Any], file: dict[str, Any], meter: _Meter) -> None:
    """Brings one file into its place, whole and checked. What is wrong is thrown away and tried at the next source."""
    target = weights.place(one) / file["path"]
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    trouble: KilnError | None = None
    for url, login in _sources(one, plan, file["path"]):
        for fresh in (False, True):  # a part that was resumed may be of another download: then once more, from the first byte
            if fresh:
                part.unlink(missing_ok=True)
            resumed = part.exists()
            try:
                with disk.full_disk_named(weights.root(), file["bytes"]):
                    digest = _transfer(session, url, login, one, file, part, meter)
                _settle(one, plan, file, part, digest)
                return
            except _Unfit as unfit:
                trouble = trouble if trouble is not None and unfit.error.code == "no-source" else unfit.error
                if unfit.error.code != "bad-hash":
                    break
                meter.back(part)
                part.unlink(missing_ok=True)
                if not resumed:
                    break
    raise trouble or KilnError("no-source", f"{one.title} has no source.", "Take it from a folder: `kiln weights pull ID --from FOLDER`.")


def _transfer(session: Any, url: str, login: dict[str, str], one: Entry, file: dict[str, Any], part: Path, meter: _Meter) -> _Digest:
    """Appends to `part` until it has all bytes; a broken connection is made again where it broke. Returns the digest of the whole."""
    import requests
    import urllib3

    digest = _Digest(file)
    name = PurePosixPath(file["path"]).name
    with open(part, "ab+") as output:
        output.seek(0)
        while piece := output.read(1 << 22):
            digest.update(piece)
            meter.step(len(piece), "checking what is here")
        idle, most = 0, FIRST_ATTEMPTS
        while digest.count < file["bytes"]:
            have, trouble = digest.count, ""
            headers = {"Accept-Encoding": "identity", **login} | ({"Range": f"bytes={have}-"} if have else {})
            try:
                with session.get(url, headers=headers, stream=True, timeout=TIMEOUTS) as answer:
                    _check_answer(one, url, answer, name)
                    if answer.status_code == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                        raise _Unfit(KilnError("no-source", f"{_host(url)} sends another part of {name} than was asked for.", ""))
                    if answer.status_code == 200 and have or answer.status_code == 416:  # it knows no ranges: from the start
                        meter.step(-have)
                        output.truncate(0)
                        digest = _Digest(file)
                    if answer.status_code in (200, 206):
                        while piece := answer.raw.read1(PIECE, decode_content=False):
                            output.write(piece)
                            digest.update(piece)
                            meter.step(len(piece))
                            if digest.count > file["bytes"]:
                                output.flush()
                                raise _Unfit(_wrong(one, file["path"], f"{_host(url)} sends more than its {file['bytes']} bytes"))
                    else:
                        trouble = f"it answers {answer.status_code}"
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                trouble = _short(error)
            idle, most = (0, ATTEMPTS) if digest.count > have else (idle + 1, most)
            if digest.count < file["bytes"]:
                if idle >= most:
                    hint = "What came is kept: try again when the network is better, and it goes on."
                    message = f"{name} of {one.title} does not come from {_host(url)}: {trouble or 'it breaks off'}."
                    raise _Unfit(KilnError("no-source", message, hint))
                meter.wait(BACKOFF * 2 ** max(0, idle - 1), f"{_host(url)}: {trouble or 'broke off'}; trying again")
        output.flush()
        os.fsync(output.fileno())
    return digest


def _check_answer(one: Entry, url: str, answer: Any, name: str) -> None:
    if urlsplit(url).scheme == "https" and urlsplit(answer.url).scheme != "https":
        raise _Unfit(KilnError("no-source", f"{_host(url)} sends on to a connection without encryption.", "Use another network."))
    if answer.status_code in (401, 403):
        raise _Unfit(_gated(one))
    if 400 <= answer.status_code < 500 and answer.status_code not in (408, 416, 429):
        raise _Unfit(KilnError("no-source", f"{_host(url)} has no {name} ({answer.status_code}).", "Update Kiln, or try again later."))


def _settle(one: Entry, plan: dict[str, Any], file: dict[str, Any], part: Path, digest: _Digest) -> None:
    """Checks a file that is whole, and moves it to its place."""
    right = digest.sha256 == file["sha256"] if file.get("sha256") else not file.get("git") or digest.git == file["git"]
    if not right or digest.count != file["bytes"]:
        raise _Unfit(_wrong(one, file["path"], "its hash is not the one that it must have"))
    try:
        refuse_code(part, file["path"])
    except KilnError:
        part.unlink()
        raise
    target = weights.place(one) / file["path"]
    disk.move(part, target)
    file["sha256"], file["mtime_ns"] = digest.sha256, target.stat().st_mtime_ns


def _lock(one: Entry, plan: dict[str, Any]) -> None:
    """Everything is here and checked: the lock says so. Files of what was here before go."""
    where = weights.place(one)
    before = weights.read(where / LOCK) or {"files": []}
    names = {file["path"] for file in plan["files"]}
    files = [{key: file[key] for key in ("path", "bytes", "sha256", "mtime_ns")} for file in plan["files"]]
    lock = {**plan, "files": files, "licence": one.licence.name, "accepted": weights.accepted(one), "fetched": time.strftime("%Y-%m-%d")}
    lock.pop("damaged", None)
    weights.write(where / LOCK, lock)
    for file in before["files"]:
        if file["path"] not in names:
            with contextlib.suppress(OSError, KilnError):
                (where / weights.safe(file["path"])).unlink()
    for leftover in (where / UNDER_WAY, *where.rglob("*.part")):
        leftover.unlink(missing_ok=True)


def _here(one: Entry, file: dict[str, Any]) -> int:
    """Bytes of a file that need no room any more."""
    target = weights.place(one) / file["path"]
    for path in (target, target.with_name(target.name + ".part")):
        with contextlib.suppress(OSError):
            return min(path.stat().st_size, file["bytes"])
    return 0


def _is_done(one: Entry, plan: dict[str, Any], file: dict[str, Any], meter: _Meter) -> bool:
    """Whether a file lies in its place with the right bytes; one with others is removed."""
    target = weights.place(one) / file["path"]
    try:
        found = target.stat()
    except OSError:
        return False
    if found.st_size == file["bytes"]:
        if file.get("sha256") and found.st_mtime_ns == file.get("mtime_ns") and not plan.get("damaged"):
            meter.step(file["bytes"])
            return True
        digest = _Digest(file)
        with open(target, "rb") as source:
            while piece := source.read(1 << 22):
                digest.update(piece)
                meter.step(len(piece), "checking what is here")
        with contextlib.suppress(_Unfit):
            _settle(one, plan, file, target, digest)
            return True
        meter.step(-file["bytes"])
    target.unlink()
    return False


def _make_room(needed: int) -> None:
    root = weights.root()
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if needed + SPARE > free:
        raise KilnError(
            "no-space",
            f"The weights need {size_text(needed)}, and the disk that holds {root} has {size_text(free)} free.",
            "Free some space there, or set KILN_WEIGHTS to a folder on another disk.",
        )


# -- From a folder or a bundle ---------------------------------------------------------------------------------------------------------


def _take(wanted: list[Entry], source: Path, progress: _Progress) -> None:
    """Takes entries from a folder (as the hub lays it out, as Kiln does, or the one file alone) or from a zip of `bundle`."""
    if not source.exists():
        raise KilnError("bad-input", f"There is no {source}.", "Give a folder with the files, or a bundle by `kiln weights bundle`.")
    with contextlib.ExitStack() as opened:
        box: _Folder | _Zip = _Folder(source) if source.is_dir() else _Zip(source, opened)
        plans = [(one, _local_plan(one, box)) for one in wanted]
        meter = _Meter(plans, progress)
        if not box.links(weights.root()):
            _make_room(sum(file["bytes"] - _here(one, file) for one, plan in plans for file in plan["files"]))
        for one, plan in plans:
            weights.write(weights.place(one) / UNDER_WAY, plan)
            meter.entry = one.title
            for file in plan["files"]:
                if not _is_done(one, plan, file, meter):
                    _take_file(one, plan, file, box, meter)
            _lock(one, plan)


def _local_plan(one: Entry, box: _Folder | _Zip) -> dict[str, Any]:
    """As `_plan`. Hashes that neither the registry nor a lock in the box tells are those of what is found: first use."""
    names = [file.path for file in one.files] or [name for name in box.names(one.id) if _matches(name, one.patterns)]
    lock = box.lock(one.id)
    known = {file["path"]: file for file in lock.get("files", []) if isinstance(file, dict) and "path" in file}
    pins = {file.path: file for file in one.files}
    if known and not one.files:
        names = [name for name in known if name.endswith(weights.SUFFIXES)]
    files: list[dict[str, Any]] = []
    absent = []
    checked = "registry"
    for name in names:
        size = box.size(one, weights.safe(name))
        if size is None:
            absent.append(name)
            continue
        pin = pins.get(name, File(name))
        told = known.get(name, {})
        sha256 = pin.sha256 or str(told.get("sha256", ""))
        if pin.bytes and size != pin.bytes or told.get("bytes", size) != size and not pin.bytes:
            raise _wrong(one, name, f"it has {size} bytes instead of {pin.bytes or told['bytes']}", box.name)
        files.append({"path": name, "bytes": size, "sha256": sha256})
        checked = "registry" if pin.sha256 and checked == "registry" else "bundle" if known else "folder"
    if absent or not files:
        first = absent[0] if absent else " or ".join(one.patterns)
        message = f"{box.name} lacks {len(absent) or 'all'} of the files of {one.title}, for example {first}."
        pickles = [name for name in box.names(one.id) if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
        hint = "Give the folder that holds them" + (
            f". {pickles[0]} is a pickle, which can run code and is not read: take the .safetensors of the same weights."
            if pickles
            else f"; its layout is that of {weights.HUB}/{one.source}."
        )
        raise KilnError("bad-input", message, hint)
    revision = str(lock.get("revision", "")) or one.revision
    return {"id": one.id, "source": str(box.name), "revision": revision, "checked": checked, "files": files}


def _take_file(one: Entry, plan: dict[str, Any], file: dict[str, Any], box: _Folder | _Zip, meter: _Meter) -> None:
    target = weights.place(one) / file["path"]
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    digest = _Digest(file)
    linked = box.link(one, file["path"], part)
    try:
        with disk.full_disk_named(weights.root(), file["bytes"]), box.open(one, file["path"]) as source:
            with contextlib.nullcontext() if linked else open(part, "wb") as output:
                while piece := source.read(1 << 20):
                    if output is not None:
                        output.write(piece)
                    digest.update(piece)
                    meter.step(len(piece))
                if output is not None:
                    output.flush()
                    os.fsync(output.fileno())
        _settle(one, plan, file, part, digest)
    except _Unfit as unfit:
        raise _wrong(one, file["path"], unfit.error.message.partition(": ")[2].rstrip("."), box.name) from None
    except zipfile.BadZipFile as error:
        raise KilnError("bad-input", f"{box.name} is damaged: {error}.", "Copy it here again.") from None
    finally:
        part.unlink(missing_ok=True)


class _Folder:
    """A folder of files, its own layout found by trying."""

    def __init__(self, path: Path):
        self.path, self.name = path, str(path)

    def names(self, id: str) -> list[str]:
        inside = self.path / id if (self.path / id).is_dir() else self.path
        return sorted(path.relative_to(inside).as_posix() for path in inside.rglob("*") if path.is_file())

    def lock(self, id: str) -> dict[str, Any]:
        for path in (self.path / id / LOCK, self.path / LOCK):
            found = weights.read(path)
            if found is not None and found.get("id") == id:
                return found
        return {}

    def find(self, one: Entry, path: str) -> Path | None:
        tries = [self.path / one.id / path, self.path / path]
        if len(one.files) == 1:
            tries.append(self.path / PurePosixPath(path).name)
        return next((found.resolve() for found in tries if found.is_file()), None)

    def size(self, one: Entry, path: str) -> int | None:
        found = self.find(one, path)
        return found.stat().st_size if found is not None else None

    def open(self, one: Entry, path: str) -> BinaryIO:
        found = self.find(one, path)
        if found is None:
            raise KilnError("bad-input", f"{path} has gone from {self.name}.", "Leave the folder alone until its files are taken.")
        return open(found, "rb")

    def links(self, root: Path) -> bool:
        """Whether its files can be linked instead of copied."""
        there = next(path for path in (root, *root.parents) if path.exists())
        return self.path.stat().st_dev == there.stat().st_dev and hasattr(os, "link")

    def link(self, one: Entry, path: str, target: Path) -> bool:
        found = self.find(one, path)
        try:
            os.link(found or path, target)
        except OSError:  # another disk, or a file system without links
            return False
        return True


class _Zip:
    """A bundle: `<id>/<path>` for every file, `<id>/kiln.lock.json` beside them."""

    def __init__(self, path: Path, opened: contextlib.ExitStack):
        self.name = str(path)
        try:
            self.zip = opened.enter_context(zipfile.ZipFile(path))
        except (zipfile.BadZipFile, OSError) as error:
            message = f"{path} is neither a folder nor a bundle: {error}."
            raise KilnError("bad-input", message, "`kiln weights bundle` makes bundles.") from None
        self.infos = {info.filename: info for info in self.zip.infolist() if not info.is_dir()}

    def names(self, id: str) -> list[str]:
        return sorted(name.removeprefix(f"{id}/") for name in self.infos if name.startswith(f"{id}/"))

    def lock(self, id: str) -> dict[str, Any]:
        info = self.infos.get(f"{id}/{LOCK}")
        if info is None or info.file_size > READABLE:
            return {}
        with contextlib.suppress(ValueError, zipfile.BadZipFile):
            found = json.loads(self.zip.read(info))
            return found if isinstance(found, dict) else {}
        return {}

    def size(self, one: Entry, path: str) -> int | None:
        info = self.infos.get(f"{one.id}/{path}")
        return info.file_size if info is not None else None

    def open(self, one: Entry, path: str) -> Any:
        return self.zip.open(self.infos[f"{one.id}/{path}"])

    def links(self, root: Path) -> bool:
        return False

    def link(self, one: Entry, path: str, target: Path) -> bool:
        return False


def bundle(ids: list[str], out: Path, progress: _Progress = silent) -> Path:
    """Writes installed entries, with all that they need, into a zip for machines without a network."""
    wanted = {one.id: one for id in ids for one in weights.chain(id) if not one.bundled}
    plans = []
    for one in wanted.values():
        weights.folder(one.id)
        plans.append((one, weights.read(weights.place(one) / LOCK)))
    if not plans:
        raise KilnError("bad-input", f"{', '.join(ids)} comes with Kiln and needs no bundle.", "")
    meter = _Meter(plans, progress)
    part = out.with_name(out.name + ".part")
    try:
        with disk.full_disk_named(out.parent), zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            for one, plan in plans:
                meter.entry = one.title
                archive.writestr(f"{one.id}/{LOCK}", json.dumps(plan, indent=1))
                for file in plan["files"]:
                    info = zipfile.ZipInfo(f"{one.id}/{file['path']}")
                    info.file_size = file["bytes"]
                    with open(weights.place(one) / file["path"], "rb") as source, archive.open(info, "w") as output:
                        while piece := source.read(1 << 20):
                            output.write(piece)
                            meter.step(len(piece))
        os.replace(part, out)
    except OSError as error:
        raise KilnError("disk", f"{out} cannot be written: {error.strerror or error}.", "Give another place.") from None
    finally:
        part.unlink(missing_ok=True)
    return out


# -- What is here ----------------------------------------------------------------------------------------------------------------------


def verify(id: str, progress: _Progress = silent) -> list[str]:
    """What is wrong with an installed entry, after reading every byte of it; nothing: it is as it was when it was fetched."""
    one = weights.entry(id)
    where = weights.place(one)
    lock = weights.read(where / LOCK) or {"files": []}
    files: list[dict[str, Any]] = lock["files"]
    if one.bundled:
        files = [{"path": file.path, "bytes": file.bytes, "sha256": file.sha256} for file in one.files]
    if weights.state(id) in ("missing", "partial"):
        weights.folder(id)  # says what is missing
    meter = _Meter([(one, {"files": files})], progress)
    meter.entry = one.title
    wrong = []
    for file in files:
        path = where / file["path"]
        if not path.is_file():
            wrong.append(f"{file['path']} is gone")
        elif file["sha256"] and weights.sha256(path, meter.step) != file["sha256"]:
            wrong.append(f"{file['path']} does not have the bytes that were checked")
    if not one.bundled:
        lock.pop("damaged", None)
        if wrong:
            lock["damaged"] = wrong[0]
        for file in lock["files"]:
            with contextlib.suppress(OSError):
                file["mtime_ns"] = (where / file["path"]).stat().st_mtime_ns
        weights.write(where / LOCK, lock)
    return wrong


def remove(id: str) -> int:
    """Deletes an entry's files, whole or half there; what it needs stays. Returns how many bytes that frees."""
    one = weights.entry(id)
    if one.bundled:
        raise KilnError("bad-state", f"{one.title} comes with Kiln and stays.", "")
    with _held(one):
        where = weights.place(one)
        freed = sum(path.stat().st_size for path in where.rglob("*") if path.is_file()) if where.is_dir() else 0
        try:
            if where.is_dir():
                (where / LOCK).unlink(missing_ok=True)  # first, so that half of it never counts as installed
                shutil.rmtree(where)
        except OSError as error:
            raise KilnError("disk", f"{where} cannot be removed: {error.strerror or error}.", "Close what uses it; try again.") from None
    return freed


# -- What is refused -------------------------------------------------------------------------------------------------------------------


def refuse_code(path: Path, name: str | None = None) -> None:
    """Raises `KilnError("bad-weights")` for a file that is not what its name says, or a configuration that leads to code."""
    name = name or path.name
    weights.safe(PurePosixPath(name).name)
    with open(path, "rb") as file:
        head = file.read(16)
        size = os.fstat(file.fileno()).st_size
        if name.endswith((".safetensors", ".onnx")) and (head[:1] == b"\x80" or head[:2] == b"PK"):
            raise _refused(name, "is a pickle by its content, which can run code")
        if name.endswith(".safetensors"):
            length = int.from_bytes(head[:8], "little")
            if size < 10 or length > size - 8 or head[8:9] != b"{":
                raise _refused(name, "is no safetensors file")
    if name.endswith(".json"):
        if size > READABLE:
            raise _refused(name, "is too long for a configuration")
        try:
            found = json.loads(path.read_bytes())
            leads = _leads_to_code(found)
        except (ValueError, RecursionError):
            raise _refused(name, "is no JSON") from None
        if leads:
            raise _refused(name, f"names code of its own ({leads})")
        if PurePosixPath(name).name == "model_index.json":
            _refuse_parts(found, name)


def _leads_to_code(found: Any) -> str:
    if isinstance(found, dict):
        for key, value in found.items():
            if key in CODE and value:
                return key
            if isinstance(value, (dict, list)):
                leads = _leads_to_code(value)
                if leads:
                    return leads
    elif isinstance(found, list):
        return next((leads for value in found if isinstance(value, (dict, list)) for leads in [_leads_to_code(value)] if leads), "")
    return ""


def _refuse_parts(found: Any, name: str) -> None:
    """A pipeline's parts are classes of diffusers and transformers, and the pipeline itself is no file beside them."""
    if not isinstance(found, dict) or not isinstance(found.get("_class_name", ""), str):
        raise _refused(name, "names a pipeline class of its own")
    for part, value in found.items():
        is_class = isinstance(value, list) and len(value) == 2 and all(one is None or isinstance(one, str) for one in value)
        if is_class and value[0] not in LIBRARIES:
            raise _refused(name, f"takes its {part} from {value[0]!r}, which is neither diffusers nor transformers")


def _refused(name: str, why: str) -> KilnError:
    return KilnError("bad-weights", f"{name} {why}.", "Kiln does not use it. Take the weights from their own source.")


def _wrong(one: Entry, path: str, why: str, where: str = "") -> KilnError:
    place = f" in {where}" if where else ""
    return KilnError(
        "bad-hash",
        f"{path} of {one.title}{place} is not the right file: {why}.",
        "It was thrown away. Try again; if it stays so, the source has changed or is damaged." if not where else "Take another copy.",
    )


def _host(url: str) -> str:
    return urlsplit(url).netloc


def _short(error: BaseException) -> str:
    """An exception of the network in few words: the innermost reason."""
    inner: Any = error
    while isinstance(getattr(inner, "reason", None), BaseException):
        inner = inner.reason
    while inner.args and isinstance(inner.args[-1], BaseException):
        inner = inner.args[-1]
    text = str(getattr(inner, "strerror", None) or inner).rpartition("): ")[2] or type(inner).__name__
    return text[:200].rstrip(".")


class _Digest:
    """The SHA-256 of a file, git's SHA-1 of it where only that is known, and how many bytes there were."""

    def __init__(self, file: dict[str, Any]):
        self._sha256 = hashlib.sha256()
        self._git = hashlib.sha1(b"blob %d\0" % file["bytes"], usedforsecurity=False)
        self._small, self.count = not file.get("sha256"), 0

    def update(self, piece: bytes) -> None:
        self._sha256.update(piece)
        if self._small:
            self._git.update(piece)
        self.count += len(piece)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @property
    def git(self) -> str:
        return self._git.hexdigest()


class _Meter:
    """Reports bytes done of all, several times a second; `progress` may raise to stop."""

    def __init__(self, plans: list[tuple[Entry, dict[str, Any]]], progress: _Progress):
        self.total = sum(file["bytes"] for _, plan in plans for file in plan["files"])
        self.done, self.entry = 0, ""
        self._progress, self._told = progress, 0.0
        self._marks: list[tuple[float, int]] = []

    def step(self, count: int, doing: str = "") -> None:
        self.done += count
        now = time.monotonic()
        if now - self._told < REPORT:
            return
        self._told = now
        self._marks = [mark for mark in self._marks if now - mark[0] < WINDOW] + [(now, self.done)]
        since, before = self._marks[0]
        rate = f", {size_text((self.done - before) / (now - since))}/s" if now - since > 0.5 and self.done > before and not doing else ""
        what = f"{size_text(self.done)} of {size_text(self.total)}{rate}"
        if not self.total:
            self._progress(0.0, doing)
            return
        self._progress(min(1.0, self.done / self.total), f"{self.entry}: {what}{', ' if doing else ''}{doing}")

    def back(self, part: Path) -> None:
        """What was in `part` does not count after all."""
        with contextlib.suppress(OSError):
            self.step(-part.stat().st_size)

    def wait(self, seconds: float, why: str) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.step(0, why)
            time.sleep(min(left, REPORT))
