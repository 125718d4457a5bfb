"""The run of a batch: captures in Blender ahead of the engine's jobs, results into their folders, and the report kept up to date.

`run` reads as the order of things. All state that must survive lies in the folder of results (items.py) and with the engine, which knows a
job by its key: a run that was killed anywhere and is begun again finds what is finished, what is captured, and the jobs under way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from backend import disk
from backend.batch import blender, items, manifest, report
from backend.batch.blenders import Blenders, News
from backend.batch.engine import ENDS_ALL, Engine, Event
from backend.batch.items import Folder
from backend.batch.manifest import Item
from backend.batch.work import Work, seconds_left
from protocol.errors import KilnError

ATTEMPTS = 2  # failures are tried once more, after all others
AHEAD = 2  # captures that wait for the engine beyond its slots, at most
TURN_SECONDS = 0.2  # that news of Blender waits while the engine is listened to
QUIET_TURN_SECONDS = 1.0  # that the cancel file waits
LOCK_SECONDS = 1.0  # after which a lock is held by a run
SHARDS = ".shards"
SPARE_BYTES = 500_000_000  # that captures leave free on the disk
PIXEL_BYTES = 12  # of a captured view: colour, depth, normals and materials, packed


class Tell(Protocol):
    """Who watches: one line that changes, and lines that stay."""

    def show(self, fraction: float, text: str) -> None: ...

    def say(self, text: str) -> None: ...


@dataclass(frozen=True)
class Options:
    out: Path
    manifest: str  # as it was given
    captures: int = 1  # Blenders at once
    blender: str | None = None  # executable; None finds one
    fbx: bool = False
    library: Path | None = None  # .blend that the results are put into
    catalog: str = ""
    only: tuple[str, ...] = ()  # patterns of names
    retry_failed: bool = False
    shard: tuple[int, int] | None = None  # (3, 20): the third of twenty runs that share the items, one beside the other

    @property
    def place(self) -> Path:
        """Where this run has its lock and its report: the folder of results, or for a shard one of its own."""
        return self.out if self.shard is None else self.out / items.WORK / SHARDS / "{}-of-{}".format(*self.shard)


def run(found: list[Item], options: Options, connect: Callable[[], Engine], tell: Tell) -> dict[str, Any]:
    """Makes every item of a manifest and returns report.json's content; its `state` is done, or cancelled.

    connect: gives the engine, when there is something for it to do. Raises KilnError where the whole cannot go on: a folder in use, no
    Blender, a full disk, a backend that is gone. What is finished stays finished.
    """
    with _held(options):
        batch = Batch(options, tell)
        try:
            batch.take_up(found)
            batch.begin(connect)
            while batch.is_unfinished:
                batch.stop_if_asked()
                batch.capture()
                batch.submit()
                batch.hear()
                batch.write()
            batch.fill_library()
            batch.end("done")
        except (KeyboardInterrupt, _Asked):
            batch.cancel()
            batch.end("cancelled")
        except KilnError as error:
            batch.end("failed", error)
            raise
        finally:
            batch.close()
        return batch.told


def plan(found: list[Item], options: Options, tell: Tell) -> list[Work]:
    """The items as a run would find them; nothing is written but Blender's log, elsewhere."""
    with tempfile.TemporaryDirectory() as scratch:
        batch = Batch(options, tell, Path(scratch))
        try:
            batch.take_up(found)
            return batch.works
        finally:
            batch.close()


class _Asked(Exception):
    """Somebody created the file OUT/cancel."""


@contextlib.contextmanager
def _held(options: Options) -> Iterator[None]:
    """The folder of results, for this run alone; a shard's beside others of as many shards, which have other items.

    Each takes its own lock before it looks at the others', so that of two that may not run at once at least one sees the other.
    """
    place = options.place / items.WORK
    with contextlib.ExitStack() as held:
        try:
            place.mkdir(parents=True, exist_ok=True)
            held.enter_context(disk.lock(place / "lock"))
            shards = sorted((options.out / items.WORK / SHARDS).glob(f"*/{items.WORK}"))
            if options.shard is None:
                for folder in shards:
                    held.enter_context(disk.lock(folder / "lock"))
            else:
                strangers = [folder for folder in shards if not folder.parent.name.endswith(f"-of-{options.shard[1]}")]
                for folder in (options.out / items.WORK, *strangers):
                    _see_free(folder / "lock")
        except BlockingIOError as error:
            holder = f" (process {error.args[0]})" if error.args[0] else ""
            raise KilnError(
                "already-running", f"Another batch{holder} writes to {options.out}.", "Wait for its end, cancel it, or name another --out."
            ) from None
        except OSError as error:
            words = f"{options.out} cannot be written to: {error.strerror or error}."
            if disk.is_full(error):
                raise KilnError("no-space", words, "Free some space; the same command goes on with what is not finished.") from None
            raise KilnError("bad-input", words, "Name another --out.") from None
        (options.place / "cancel").unlink(missing_ok=True)
        yield


def _see_free(lock: Path) -> None:
    """Raises BlockingIOError if a run holds the lock; another shard that looks at it holds it for a moment, too."""
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            disk.lock(lock).close()
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


class Batch:
    """The state of a run. scratch: where Blender prints, if not in the folder of results."""

    def __init__(self, options: Options, tell: Tell, scratch: Path | None = None):
        self.options, self.out, self.tell = options, options.out, tell
        self.works: list[Work] = []
        self.waiting: deque[Work] = deque()  # to be captured, or to be submitted if they need no capture
        self.captured: deque[Work] = deque()  # to be submitted
        self.jobs: dict[str, Work] = {}
        self.engine: Engine | None = None
        self.keeps, self.knows_all = scratch is None, False
        logs = scratch or options.place / items.WORK
        self.blenders = Blenders(options.captures, lambda: blender.find(options.blender), logs / "blender.log")
        self.told: dict[str, Any] = {}
        self.before: dict[str, Any] = items.read_json(options.place / "report.json") or {}  # of the run before
        self.library: dict[str, Any] | None = None
        self.started = time.time()
        self.largest = 0  # bytes of a capture so far
        self.writer = report.Writer(options.place)

    # -- Beginning ---------------------------------------------------------------------------------------------------------------------

    def take_up(self, found: list[Item]) -> None:
        """Takes .blend files apart, names all items, and finds out what is finished, captured, or failed for good."""
        if (old := self.options.place / "report.json").exists() and "items" not in self.before:
            raise KilnError("bad-manifest", f"{old} is not Kiln's, and would be written over.", "Name another --out.")
        wanted = manifest.named(manifest.resolved(found, self._subjects))
        if self.options.only and not any(manifest.matches(item, self.options.only) for item in wanted):
            names = ", ".join(item.name for item in wanted[:10])
            raise KilnError("bad-manifest", f"No item is called {' or '.join(self.options.only)}.", f"There are {names}.")
        for number, item in enumerate(wanted):
            self.tell.show(number / len(wanted), f"looking at {item.file.name}")
            work = Work(item, Folder(self.out, item.name), notes=[item.note] if item.note else [])
            self.works.append(work)
            if self.options.shard is not None and number % self.options.shard[1] != self.options.shard[0] - 1:
                work.leave_out("--shard")
            else:
                self._look(work)
        self.knows_all = True

    def _subjects(self, item: Item) -> list[dict[str, str]]:
        """The objects or collections of a .blend, by Blender; kept for the next run, as long as the file is the same."""
        key = [items.content_hash(item.file), item.object, item.collection, item.recipe]
        kept = self.out / items.WORK / "listings" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"
        with contextlib.suppress(OSError, ValueError):
            return json.loads(kept.read_bytes())["subjects"]
        fields = {"object": item.object or None, "collection": item.collection or None, "recipe": item.recipe}
        self.blenders.give(1, "list", file=str(item.file), **fields)
        while True:
            if self.keeps:
                self.stop_if_asked()
            for news in self.blenders.take(QUIET_TURN_SECONDS):
                if news.error is not None and news.key < ATTEMPTS:
                    self.blenders.give(news.key + 1, "list", file=str(item.file), **fields)
                elif news.error is not None:
                    raise news.error
                if news.answer is not None:
                    if self.keeps:
                        items.write_json(kept, {"subjects": news.answer["subjects"]})
                    return news.answer["subjects"]
                self.tell.show(news.fraction, news.text or f"looking into {item.file.name}")

    def _look(self, work: Work) -> None:
        item, folder = work.item, work.folder
        try:
            if item.error is not None:
                raise item.error
            if folder.is_foreign():
                hint = "Name another --out, or the item otherwise."
                raise KilnError("bad-manifest", f"{folder.results} holds files that are not Kiln's.", hint)
            work.fingerprint = items.fingerprint(item)
        except KilnError as error:
            work.at("failed")
            work.error = error
            return
        record, failure = folder.finished(work.fingerprint), folder.failure(work.fingerprint)
        if record is not None:
            work.record, work.is_old = record, True
            work.figures, work.seconds = record.get("figures", {}), record.get("seconds", {})
            work.add(record.get("warnings", ()))
            work.add(record.get("notes", ()), "notes")
            if self._is_complete(work):
                work.at("done", fraction=1.0, text="finished earlier")
                if self.keeps:  # what a run that was killed did not get to
                    self._show_result(work)
                    folder.clear_work()
                return
        elif failure is not None and not self.options.retry_failed:
            work.at("failed", text="failed in an earlier run")
            work.error = failure
            return
        if self.options.only and not manifest.matches(item, self.options.only):
            work.leave_out("--only")
            return
        self.waiting.append(work)

    def _is_complete(self, work: Work) -> bool:
        return work.record is not None and (not self.options.fbx or self._fbx(work) in work.record["files"])

    def _fbx(self, work: Work) -> str:
        return f"{work.item.name}.fbx"

    def begin(self, connect: Callable[[], Engine]) -> None:
        """Connects what the run needs, and refuses what cannot come to an end."""
        if any(work.item.kind == "model" or self.options.fbx for work in self.waiting) or self.options.library:
            self.blenders.check()
        for work in self.waiting:
            work.folder.forget_failure()
            if work.record is None:
                work.at("waiting")
        self.write()
        if any(work.record is None for work in self.waiting):
            self.engine = connect()

    # -- A turn ------------------------------------------------------------------------------------------------------------------------

    @property
    def is_unfinished(self) -> bool:
        return bool(self.waiting or self.captured or self.jobs or self.blenders.busy)

    def stop_if_asked(self) -> None:
        if (self.options.place / "cancel").exists():
            raise _Asked

    def capture(self) -> None:
        """Gives Blenders their next captures, as far ahead of the engine as its slots and the disk want; files need none.

        What the disk has no room for goes behind the others. If nothing else is left or under way, which might free some, the run ends.
        """
        taken, wanted = 0, 0
        for _ in range(len(self.waiting)):
            slots = self.engine.slots if self.engine is not None else 0
            ahead = len(self.captured) + self.blenders.busy
            work = self.waiting[0]
            if work.record is None and ahead >= max(slots, self.options.captures) + AHEAD:
                return
            if needed := self._lacking(work):
                wanted = needed
                self.waiting.rotate(-1)
                continue
            self.waiting.popleft()
            taken += 1
            work.attempts += 1
            with self._failing(work):
                self._prepare(work)
        if wanted and not (taken or self.jobs or self.captured or self.blenders.busy):
            free = disk.size_text(shutil.disk_usage(self.out).free)
            raise self._full(f"The disk of {self.out} has {free} left; a capture wants {disk.size_text(wanted)} free.")

    def _prepare(self, work: Work) -> None:
        item, folder = work.item, work.folder
        if work.record is not None:  # the results are there, an FBX of them is not
            self._export(work)
        elif item.kind != "model":
            work.inputs, work.values = items.direct_inputs(item), item.values
            self._take_captured(work)
        elif (kept := folder.captured(work.fingerprint)) is not None:
            self._use_capture(work, kept)
        else:
            shutil.rmtree(folder.inputs, ignore_errors=True)
            folder.inputs.mkdir(parents=True)
            work.at("waiting", text="waiting for Blender")
            fields: dict[str, Any] = {"file": str(item.file), "recipe": item.recipe, "values": item.values, "folder": str(folder.inputs)}
            self.blenders.give((work, "capture"), "capture", subject=item.subject, **fields)

    def _lacking(self, work: Work) -> int:
        """Bytes that its capture wants free on the disk, if they are not; 0 where there is room, or nothing to capture."""
        if work.record is not None or work.item.kind != "model":
            return 0
        values = work.item.values
        pixels = values.get("capture.views", 0) + values.get("capture.holdout", 0)
        needed = max(self.largest, pixels * values.get("capture.size", 0) ** 2 * PIXEL_BYTES) + SPARE_BYTES
        return needed if shutil.disk_usage(self.out).free < needed and work.folder.captured(work.fingerprint) is None else 0

    def submit(self) -> None:
        """Hands captured items to the engine: one more than it runs at once, so that it never waits for inputs."""
        while self.captured and self.engine is not None and len(self.jobs) <= self.engine.slots:
            work = self.captured.popleft()
            with self._failing(work):
                work.job = self.engine.submit(self._key(work), work.item.recipe, work.values, work.inputs or {}, work.item.name)
                work.submitted, work.begun = time.monotonic(), 0.0
                work.at("queued")
                self.jobs[work.job] = work

    def _key(self, work: Work) -> str:
        """By which the engine knows the job again: this item with these inputs, which Blender may make differently of the same file."""
        digest = hashlib.sha256(f"{self.out}\0{work.item.name}\0{work.fingerprint}".encode())
        for name, file in sorted((work.inputs or {}).items()):
            digest.update(f"\0{name}\0{items.content_hash(file)}".encode())
        return f"batch-{digest.hexdigest()[:40]}"

    def hear(self) -> None:
        """Waits a moment for news, and deals with it."""
        if self.jobs and self.engine is not None:
            for event in self.engine.poll(TURN_SECONDS if self.blenders.busy else QUIET_TURN_SECONDS):
                if (work := self.jobs.get(event.id)) is not None:
                    with self._failing(work):
                        self._hear_engine(work, event)
            said = self.blenders.take()
        else:
            said = self.blenders.take(QUIET_TURN_SECONDS if self.blenders.busy else 0.0)
        for news in said:
            work, do = news.key
            with self._failing(work):
                self._hear_blender(work, do, news)

    def _hear_engine(self, work: Work, event: Event) -> None:
        now = time.monotonic()
        if event.kind in ("stage", "progress"):
            work.begun = work.begun or now
            work.at("computing", event.stage or work.stage, event.fraction, event.text)
        elif event.kind == "log":
            if "\n" not in event.text:  # a defect's trace has many lines
                work.add([event.text], "notes")
        elif event.kind == "cancelled":
            del self.jobs[event.id]
            work.at("cancelled", text="cancelled in the backend")
            work.error = KilnError("cancelled", "Its job was cancelled in the backend.", "The same command goes on with it.")
        elif event.kind == "failed":
            del self.jobs[event.id]
            raise event.error or KilnError("internal", "The job failed without a reason.", "")
        elif event.kind == "done":
            del self.jobs[event.id]
            work.seconds["queue"] = round((work.begun or now) - work.submitted, 2)
            work.seconds["compute"] = round(now - (work.begun or now), 2)
            self._take_results(work)

    def _take_results(self, work: Work) -> None:
        engine, folder = self.engine, work.folder
        assert engine is not None
        work.at("computing", "Fetch results")
        shutil.rmtree(folder.fetched, ignore_errors=True)
        try:
            engine.fetch(work.job, folder.fetched)
        except (KilnError, OSError) as error:
            if not disk.is_full(error) and (not isinstance(error, KilnError) or error.code not in ENDS_ALL):
                engine.forget(work.job)  # results that cannot be read would be fetched again and again
            raise
        work.figures, found = report.figures_of(folder.fetched)
        work.add(found)
        work.record = folder.take_results(
            {
                "fingerprint": work.fingerprint, "name": work.item.name, "file": str(work.item.file), "subject": work.item.subject,
                "recipe": work.item.recipe, "preset": work.item.preset, "parameters": work.values, "seconds": work.seconds,
                "figures": work.figures, "warnings": work.warnings, "notes": work.notes, "source": work.source,
            }
        )  # fmt: skip
        self._show_result(work)
        engine.forget(work.job)
        if self._is_complete(work):
            self._finish(work)
        else:
            self._export(work)

    def _show_result(self, work: Work) -> None:
        folder, name = work.folder.results, work.item.name
        report.thumbnail(folder / "preview.png", self.out, name, "result")
        if work.item.kind == "splats":  # its first look at them, which is the first of the comparison
            report.thumbnail(folder / "comparison.png", self.out, name, "source", min(6, work.figures.get("holdout_views") or 6))

    def _export(self, work: Work) -> None:
        """Has an FBX made of the game's file if there is one, else of the mesh with its bones, else of the mesh."""
        assert work.record is not None
        glb = next((name for name in ("game.glb", "armature.glb", "mesh.glb") if name in work.record["files"]), None)
        if glb is None:
            raise KilnError("bad-input", f"{work.item.recipe} made no mesh, so there is no FBX of it.", "Leave out --fbx.")
        work.at("computing", "FBX", text="waiting for Blender")
        values, folder = work.record["parameters"], work.folder.results
        options = {name: values[f"game.{name}"] for name in ("engine", "up", "scale")} if glb == "game.glb" else {}
        self.blenders.give((work, "fbx"), "fbx", glb=str(folder / glb), out=str(folder / self._fbx(work)), options=options)

    def _hear_blender(self, work: Work, do: str, news: News) -> None:
        if news.error is not None:
            raise news.error
        if news.answer is None:
            state, stage = ("capturing", "Capture") if do == "capture" else ("computing", "FBX")
            work.at(state, stage, news.fraction, news.text)
        elif do == "capture":
            kept = work.folder.keep_captured(work.fingerprint, news.answer)
            report.thumbnail(Path(news.answer["picture"]) if news.answer.get("picture") else None, self.out, work.item.name, "source")
            self.largest = max(self.largest, sum(file.stat().st_size for file in kept["inputs"].values()))
            self._use_capture(work, kept)
        else:
            assert work.record is not None
            made = [Path(path).relative_to(work.folder.results).as_posix() for path in news.answer["files"]]
            work.record = work.folder.keep_record(work.record, list(dict.fromkeys([*work.record["files"], *made])))
            self._finish(work)

    def _use_capture(self, work: Work, kept: dict[str, Any]) -> None:
        work.inputs, work.values = kept["inputs"], kept.get("values") or work.item.values
        work.source = kept.get("source") or {}
        work.seconds["capture"] = kept.get("seconds") or 0.0
        work.add(kept.get("warnings") or ())
        self._take_captured(work)

    def _take_captured(self, work: Work) -> None:
        work.at("queued", text="waiting for the engine")
        self.captured.append(work)
        if work.item.kind != "model":
            report.thumbnail(report.picture_among(work.inputs or {}), self.out, work.item.name, "source")

    def _finish(self, work: Work) -> None:
        work.at("done", fraction=1.0)
        work.error = None
        work.folder.clear_work()
        self.tell.say(f"{work.item.name}: done in {report.duration(report.spent(work.seconds))}")

    # -- What goes wrong ---------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _failing(self, work: Work) -> Iterator[None]:
        """What an item meets is its own failure: tried again once, after the others. What all of them would meet ends the run."""
        try:
            yield
        except OSError as error:
            if disk.is_full(error):
                free = disk.size_text(shutil.disk_usage(self.out).free)
                raise self._full(f"The disk of {self.out} is full: {free} are left.") from error
            words = f"{error.filename or self.out}: {error.strerror or error}."
            self._fail(work, KilnError("disk", words, "Check the file, and the folder's permissions."))
        except KilnError as error:
            if error.code == "no-space":
                raise self._full(error.message) from error
            if error.code in (*ENDS_ALL, *blender.MISSING):
                raise
            self._fail(work, error)

    def _fail(self, work: Work, error: KilnError) -> None:
        work.error = error
        if work.attempts < ATTEMPTS:
            work.at("waiting", text=f"tried once: {error.message}")
            self.waiting.append(work)
            return
        work.at("failed")
        if work.record is None:
            work.folder.keep_failure(work.fingerprint, error)
        self.tell.say(f"{work.item.name}: failed ({error.code}). {error.message}")

    def _full(self, message: str) -> KilnError:
        return KilnError("no-space", message, "Free some space; the same command goes on with what is not finished.")

    # -- The end -----------------------------------------------------------------------------------------------------------------------

    def fill_library(self) -> None:
        """Puts every finished item into an asset library, in one go: Blender opens the file once."""
        if self.options.library is None:
            return
        assets = [
            {"name": work.item.name, "folder": str(work.folder.results), "source": (work.record or {}).get("source", {})}
            for work in self.works
            if work.state == "done"
        ]
        before = (self.before.get("library") or {}) if self.options.library.exists() and self.before.get("state") == "done" else {}
        self.library = {"file": str(self.options.library), "catalog": self.options.catalog, "assets": 0, "error": None}
        if before.get("assets") and {**before, "assets": 0} == self.library and all(work.is_old for work in self.works if work.record):
            self.library = before  # nothing has been made since
            return
        if not assets:
            return
        fields = {"assets": assets, "file": str(self.options.library), "catalog": self.options.catalog}
        self.blenders.give((None, "library"), "library", **fields)
        while self.blenders.busy:
            self.stop_if_asked()
            for news in self.blenders.take(QUIET_TURN_SECONDS):
                if news.answer is not None:
                    self.library["assets"] = news.answer.get("assets", len(assets))
                elif news.error is not None:
                    self.library["error"] = news.error.to_wire()
                    self.tell.say(f"The library was not written. {news.error}")
                else:
                    self.tell.show(news.fraction, f"asset library: {news.text}")
            self.write()

    def cancel(self) -> None:
        """Stops what is under way; the engine keeps what its jobs have finished, and the same command goes on with it."""
        self.blenders.close(now=True)
        if self.engine is not None:
            with contextlib.suppress(KilnError):
                for id in self.jobs:
                    self.engine.cancel(id)
        for work in self.works:
            if work.state in ("capturing", "queued", "computing") or work.state == "waiting" and not work.left_out:
                work.at("cancelled")

    def close(self) -> None:
        """Leaves nothing behind that runs, but the engine's jobs where the run broke off."""
        self.blenders.close(now=bool(self.blenders.busy))
        if self.engine is not None:
            self.engine.close()
            self.engine = None

    # -- Telling -----------------------------------------------------------------------------------------------------------------------

    def write(self) -> None:
        """Says how far it is: on the terminal, and in report.json and index.html, about once a second."""
        if self.writer.is_due():
            self.told = self._report("running")
            self._write()
            self._tell(self.told["seconds_left"])

    def end(self, state: str, error: KilnError | None = None) -> None:
        """Writes the report of a run that is over; one that failed has another error to tell than that this cannot be written.

        A run that ended before it knew its items leaves the report of the run before.
        """
        self.told = self._report(state, error)
        if not self.knows_all:
            return
        try:
            self._write(last=True)
        except (KilnError, OSError):
            if state != "failed":
                raise

    def _write(self, last: bool = False) -> None:
        try:
            self.writer.write(self.told, last)
        except KilnError as error:
            raise self._full(error.message) if error.code == "no-space" else error from None

    def _tell(self, left: float | None) -> None:
        counts = {state: sum(work.state == state for work in self.works) for state in ("done", "failed")}
        busy = [work for work in self.works if work.state in ("capturing", "computing")]
        parts = [
            f"{counts['done']} of {len(self.works)} done", f"{counts['failed']} failed" if counts["failed"] else "",
            f"{report.duration(left)} left" if left else "",
            *(f"{work.item.name} {work.stage.lower() or work.state} {100 * work.fraction:.0f}%" for work in busy),
        ]  # fmt: skip
        self.tell.show(sum(counts.values()) / max(len(self.works), 1), " · ".join(filter(None, parts)))

    def _report(self, state: str, error: KilnError | None = None) -> dict[str, Any]:
        left = self._seconds_left() if state == "running" else None
        whole = report.head(state, self.started, left, self.out, self.options.manifest)
        rest = {"error": error.to_wire() if error else None, "library": self.library, "items": [work.told() for work in self.works]}
        return {**whole, **rest}

    def _seconds_left(self) -> float | None:
        return seconds_left(self.works, self.options.captures, self.engine.slots if self.engine is not None else 1)


def exit_code(told: dict[str, Any]) -> int:
    """0 all went well, 1 some items failed, 130 cancelled."""
    if told["state"] == "cancelled":
        return 130
    library = told.get("library") or {}
    return int(any(item["state"] in ("failed", "cancelled") for item in told["items"]) or bool(library.get("error")))
