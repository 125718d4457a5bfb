"""What Kiln knows while Blender runs: the backend's state, the jobs, what went wrong. Main thread only; `backend_link.Link` and the set-up
thread tell it things through queues, which one timer empties.

Nothing here keeps a reference to Blender data: jobs carry names and numbers (`source`) that are looked up again when a result comes in.
"""

from __future__ import annotations

import errno
import json
import math
import os
import queue
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import bpy
import bpy.utils.previews

from . import capture, capture_motion, environment, export, import_asset, import_motion, picture_input, preferences, properties, turntable
from .backend_link import Link, Where, tail
from .protocol import VERSION, connection, estimates, recipes
from .protocol.client import FINAL
from .protocol.errors import Cancelled, KilnError
from .protocol.picture import SUFFIXES as PICTURES

BUSY, IDLE = 0.1, 0.5  # seconds between two looks at the queues
SPLATS_OF_A_FRAME = re.compile(r"splats_n?\d+(\.\d+)?\.ply")
TURN = 0.1  # seconds that each picture of a turning result is shown
TURNS = 3  # that it makes before it rests, once it has come in or was chosen in the list
STORED = ("artifacts", "uploads", "stages", "runs", "temporary", "logs")  # the backend's folders in Kiln's home, beside its database
LOG_LINES = 20  # of a job's log, kept for the panel
ICONS = {"queued": "TIME", "running": "RENDER_ANIMATION", "cancelling": "CANCEL", "done": "CHECKMARK", "failed": "ERROR", "cancelled": "X"}


@dataclass
class Job:
    """A job as the panel shows it."""

    data: dict  # the backend's own record, kept current by its events
    file: int | None = None  # which opened file it was started from; None: an earlier session or another Blender
    picture: Path | None = None  # its newest preview
    transfer: float | None = None  # share of an upload or download under way
    results: Path | None = None  # folder of the downloaded results
    wants_import: bool = False  # bring it in as soon as it is done and Blender is free
    asked: bool = False  # by the Import button: a running tool does not hold it up
    inputs: dict = field(default_factory=dict)  # what the backend has not got yet
    views: Path | None = None  # the folder of those files, kept until they have arrived
    quads: int = 0  # faces to remesh the imported mesh to; 0 leaves its triangles
    motion: import_motion.How | None = None  # how its motion is to come in; None: as the scene's settings say
    base: str = ""  # the job whose inputs serve for this one too, until they have arrived
    without: tuple[str, ...] = ()  # but those whose names begin so
    turntable: turntable.Turntable | None = None  # its views, to go through, once they have been asked for
    cached: bool = False  # a stage was found finished: the job's seconds are not those of the work
    log: list[str] = field(default_factory=list)  # the backend's last lines about it

    @property
    def state(self) -> str:
        return self.data["state"]


@dataclass
class Notice:
    """Something to tell, kept in the panel until dismissed."""

    error: KilnError
    details: str = ""


current: Session | None = None
interrupted = threading.Event()  # Ctrl-C in `blender --command`: a render that it comes in swallows the exception


class Session:
    def __init__(self):
        self.id = uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="kiln-", dir=bpy.app.tempdir))  # views on their way out, results on their way in
        self.backend: dict = {"state": "looking", "text": "", "error": None, "hello": None, "remote": False}
        self.jobs: dict[str, Job] = {}
        self.notices: list[Notice] = []
        self.capture: tuple[int, int, str] | None = None  # done, all, title of the views or splats that are being prepared
        self.setting_up: SetUp | None = None
        self.file = 0  # counts opened files, so that a result never lands in a file that it was not made in
        self.tab_seen = False  # set by the panel's first draw
        self.started_once = False
        self.disk: int | None = None  # bytes of the backend's environment
        self.environment = "missing"  # environment.state()
        self.pictures = bpy.utils.previews.new()
        self.turntables: dict[str, list[str]] = {}  # names of the pictures of results that move, by job
        self.source_icon, self._source_shown = 0, ("", 0)  # of the picture that the panel would start from
        self.turning, self.turned_from, self.turned = "", 0.0, -math.inf  # the job that turns, since when, and when it was last drawn
        self._speeds: dict[str, float] = {}  # by recipe, until a job or the backend changes
        self._then: dict[int, Callable] = {}
        self._starting = 0  # ticket of the last "start" until it is answered
        self._uploads: dict[int, str] = {}
        self.where: Where | None = None
        self._look_again = 0.0
        self.link: Link | None = None  # made at the first use, so that a plain `blender -b` has no thread more

    def connect(self) -> None:
        """Starts the client thread for the chosen backend; a new one where another backend was chosen since."""
        if self.where and (time.monotonic() < self._look_again or self.setting_up):  # set-up waits for this link's answer
            return
        self._look_again = time.monotonic() + 1.0
        chosen = where()
        if chosen == self.where:
            return
        before, self.where = self.where, chosen
        dropped, self._then = self._then, {}
        if self.link:
            self.link.close(timeout=0)
            self._uploads.clear()
            if (before.remote, before.log) != (chosen.remote, chosen.log):  # else only its Python is another one
                self.jobs = {name: job for name, job in self.jobs.items() if name.startswith("sending-")}
            self.backend = {**self.backend, "state": "looking", "hello": None, "error": None}
        self.link = Link(chosen, self.folder / "pictures")
        self.link.start()
        for then in dropped.values():
            then(None, KilnError("unavailable", "Another backend was chosen meanwhile.", "Try again with that one."))
        if not bpy.app.background:
            self._look_at_environment()

    def close(self) -> None:
        if self.setting_up:
            self.setting_up.cancel()
        if self.link:
            self.link.close(stop_backend=preferences.get().on_close == "STOP" and not self.where.remote)
        bpy.utils.previews.remove(self.pictures)
        shutil.rmtree(self.folder, ignore_errors=True)

    # Orders

    def ask(self, order: str, then: Callable[[object, KilnError | None], None] | None = None, **values) -> int:
        """Gives the client thread an order; `then(result, error)` runs on the main thread with its answer. An error goes to the panel."""
        self.connect()
        ticket = self.link.ask(order, **values)
        self._then[ticket] = then or (lambda result, error: error and self.note(error))
        return ticket

    def note(self, error: KilnError, details: str = "") -> None:
        """Shows an error in the panel until it is dismissed."""
        self.notices = [old for old in self.notices if old.error.message != error.message] + [Notice(error, details)]
        redraw()

    def carry_out(self, order: str, then: Callable[[object, KilnError | None], None], **values) -> None:
        """Like `ask`; in `blender -b`, whose process may end right after, waits for the answer and raises its error."""
        if not bpy.app.background:
            self.ask(order, then, **values)
            return
        answers = []
        self.ask(order, lambda *answer: answers.append(answer), **values)
        self.wait(lambda: answers)
        result, error = answers[0]
        then(result, error)
        if error:
            raise error

    def submit(
        self,
        recipe,
        inputs: dict,
        source: dict,
        title: str,
        views: Path,
        picture: Path | None,
        base: str = "",
        without: tuple[str, ...] = (),
    ) -> Job:
        """Sends a recipe's inputs off as a job. `views` holds their files and is removed after they have arrived. base: a job whose inputs
        serve too, but those whose names begin with one of `without`."""
        shown = {
            "id": f"sending-{uuid.uuid4().hex}", "recipe": recipe.NAME, "parameters": recipes.values(recipe), "title": title,
            "source": source, "state": "queued", "stage": "", "fraction": 0.0, "text": "", "created": time.time(), "started": None,
            "finished": None,
            "attempts": 0, "error": None, "results": {}, "inputs": {},
        }  # fmt: skip
        job = Job(
            shown, file=self.file, picture=picture, wants_import=preferences.get().auto_import, inputs=inputs, views=views,
            base=base, without=without,
        )  # fmt: skip
        self.jobs[shown["id"]] = job
        self._show_picture(job)
        self._send(job)
        return job

    def _send(self, job: Job) -> None:
        """Sends a job's inputs. Where that fails it stays in the list with its reason; sending it again is the same submission."""
        shown = job.data
        shown.update(state="queued", finished=None, error=None)
        job.transfer = 0.0

        def sent(result, error):
            job.transfer = None
            if error:
                state = "cancelled" if error.code == "cancelled" else "failed"
                shown.update(state=state, finished=time.time(), error=error.to_wire())
            else:
                self.jobs.pop(shown["id"], None)
                known = self.jobs.get(result["id"])
                job.data = known.data if known else result
                job.picture = known.picture if known and known.picture else job.picture
                self.jobs[result["id"]] = job
                self._show_picture(job)
                shutil.rmtree(job.views, ignore_errors=True)
                job.inputs, job.views = {}, None
            self._sync_rows(select=job.data["id"])

        ticket = self.ask(
            "submit", sent, recipe=shown["recipe"], values=shown["parameters"], inputs=job.inputs, title=shown["title"],
            source=shown["source"], id=shown["id"], base=job.base, without=job.without,
        )  # fmt: skip
        self._uploads[ticket] = shown["id"]
        self._sync_rows(select=shown["id"])

    def fetch(self, job: Job, everything: bool = False) -> int:
        """Downloads a finished job's results into this session's folder; the splats of each frame, which no import uses, only where
        `everything` is wanted."""
        job.transfer = 0.0
        folder = self.folder / "results" / job.data["id"]

        def fetched(result, error):
            job.transfer = None
            if error:
                job.wants_import = False
                self.note(error)
            else:
                job.results = folder
                self._show_turntable(job)

        wanted = {name: result for name, result in job.data["results"].items() if everything or not SPLATS_OF_A_FRAME.fullmatch(name)}
        ticket = self.ask("fetch", fetched, results=wanted, folder=folder)
        self._uploads[ticket] = job.data["id"]
        return ticket

    def fetch_views(self, job: Job) -> None:
        """Downloads the turntable of a finished job, to be gone through in the panel."""
        job.turntable = table = turntable.Turntable(self.folder / "turntables" / job.data["id"])

        def fetched(result, error):
            if error:
                return self.note(error)
            table.pictures = {int(path.stem[-3:]): path for path in sorted(table.folder.glob("view_*.png"))}
            for number in table.pictures:
                self.show_view(job, number)

        self.ask("fetch", fetched, results=turntable.views_of(job.data), folder=table.folder)

    def show_view(self, job: Job, number: int) -> None:
        """Loads what is to be seen of a view now: the job's own, or what is to replace it."""
        table, name = job.turntable, f"{job.data['id']}/view_{number}"
        if name in self.pictures:
            del self.pictures[name]
        self.pictures.load(name, str(table.replaced.get(number, table.pictures[number])), "IMAGE").image_size[:]

    def go_on(self, job: Job, only: bool) -> Job:
        """Submits a job anew with what is wanted of its views: to be looked at again (`only`), or all the way. What was finished is found.
        Raises KilnError."""
        if job.turntable is None or not turntable.is_generated(job.data):
            raise KilnError(
                "no-views", f"{job.data['title']} has no generated views.", "Select a finished job that was made from a picture."
            )
        table = job.turntable
        recipe, without = turntable.onward(job.data, table, only)
        self.want_backend()
        folder = Path(tempfile.mkdtemp(prefix="replaced-", dir=self.folder))
        with disk_errors():
            inputs = {file.name: Path(shutil.copyfile(file, folder / file.name)) for file in table.replaced.values()}
        made = self.submit(recipe, inputs, job.data["source"], job.data["title"], folder, job.picture, job.data["id"], without)
        made.quads = job.quads
        for number in [*table.again, *table.replaced]:
            table.keep(number)
            self.show_view(job, number)
        self._took(job)
        return made

    def remove(self, job: Job) -> None:
        """Takes a job out of the list, with what the backend keeps for it."""

        def removed(result, error):
            if error and error.code != "no-job":
                return self.note(error)
            self._forget(job)

        if job.data["id"].startswith("sending-"):
            removed(None, None)
        else:
            self.carry_out("remove", removed, job=job.data["id"])

    def _forget(self, job: Job) -> None:
        self.jobs.pop(job.data["id"], None)
        self._drop_pictures(job.data["id"])
        for folder in (job.results, job.views, job.turntable and job.turntable.folder):
            if folder:
                shutil.rmtree(folder, ignore_errors=True)
        self._sync_rows()

    def import_results(self, context, job: Job) -> import_asset.Imported:
        """Brings downloaded results into the scene they came from, as one undo step."""
        provenance = {
            "job": job.data["id"], "recipe": job.data["recipe"], "parameters": job.data["parameters"], "kiln": VERSION,
            "preset": properties.preset_of(job.data["recipe"], job.data["parameters"]),
        }  # fmt: skip
        motion = job.motion or properties.motion(context.scene.kiln)
        imported = import_asset.import_asset(context, job.results, job.data["source"], provenance, motion)
        job.wants_import, job.asked, job.motion = False, False, None
        shutil.rmtree(job.results, ignore_errors=True)  # the backend keeps them; the file has its own copy now
        job.results = None
        self._took(job)
        return imported

    def _took(self, job: Job) -> None:
        """The backend may let go of the job's files when it needs room."""
        self.ask("take", lambda result, error: None, job=job.data["id"])  # an older backend knows no such thing, and keeps them

    # Listening

    def tick(self) -> float:
        """The timer: takes in what the threads told, brings finished results in, starts the backend that the open tab asks for."""
        try:
            self.connect()
            moved = self.drain()
            if self.tab_seen and not self.started_once and self.backend["state"] == "stopped" and preferences.get().start_backend:
                self.started_once = True  # who stops it afterwards means it
                self._start()
            self._bring_in()
            moved = self._show_source() or moved
        except Exception:  # a timer that raises is never called again
            traceback.print_exc()
            moved = True
        turning = time.monotonic() - self.turned < 10 * TURN
        if moved or turning:
            redraw()
        active = any(job.state not in FINAL or job.transfer is not None for job in self.jobs.values())
        if turning:
            return TURN
        return BUSY if active or moved or self.setting_up or self.backend["state"] in ("looking", "starting") else IDLE

    def _show_source(self) -> bool:
        """Loads the picture that the panel would start from, where that is another one than before. Not while drawing: it may be large."""
        settings = bpy.context.scene.kiln
        file, image = None, None
        if recipes.RECIPES[settings.recipe].INPUT != "picture":
            return False
        if settings.picture_source == "FILE" and settings.picture_file:
            file = Path(bpy.path.abspath(settings.picture_file))
        elif settings.picture_source == "IMAGE":
            image = settings.picture_image
        wanted = (str(file or ""), image.session_uid if image else 0)
        if wanted == self._source_shown:
            return False
        self._source_shown, self.source_icon = wanted, 0
        if "source" in self.pictures:
            del self.pictures["source"]
        if image:
            self.source_icon = image.preview_ensure().icon_id
        elif file:
            with suppress(OSError):
                if file.suffix.lower() in PICTURES and file.stat().st_size < picture_input.MOST_SHOWN:
                    self.source_icon = self.pictures.load("source", str(file), "IMAGE").icon_id
        return True

    def drain(self) -> bool:
        """Takes in everything that the threads have told. True if there was anything."""
        moved = False
        while True:
            try:
                message = self.link.told.get_nowait()
            except queue.Empty:
                break
            moved = True
            getattr(self, f"_on_{message.pop('kind')}")(**message)
        if self.setting_up and self.setting_up.take_in():
            moved = True
            if self.setting_up.finished:
                self._set_up_ended()
        if moved:
            self._sync_rows()
        return moved

    def _set_up_ended(self) -> None:
        work, self.setting_up = self.setting_up, None
        if work.error:
            self.note(work.error, tail(environment_log()))
        self._look_again = 0.0
        self.connect()
        self._look_at_environment()
        if work.finished and not work.error and work.action != "remove" and not work.cancelled:
            self._start()

    def _on_trouble(self, error) -> None:
        self.note(KilnError.from_wire(error))

    def _on_backend(self, **state) -> None:
        if self._starting and state["state"] != "running" and state["state"] != "starting":
            return  # of the time before the start that was asked for, which is told anew after it
        self.backend = state
        if state["state"] == "running":  # what was said about its absence is over
            self.notices = [notice for notice in self.notices if notice.error.code not in ("no-backend", "backend-died", "unavailable")]

    def _on_jobs(self, jobs) -> None:
        known, self.jobs = self.jobs, {name: job for name, job in self.jobs.items() if name.startswith("sending-")}
        for data in jobs:
            job = known.get(data["id"]) or Job(data)
            job.data = data
            self.jobs[data["id"]] = job
        for gone in set(known) - set(self.jobs):
            self._drop_pictures(gone)

    def _on_job(self, job) -> None:
        if job["id"] in self.jobs:
            before = self.jobs[job["id"]].state
            self.jobs[job["id"]].data = job
            if job["state"] != before and job["state"] in ("done", "failed"):
                self._announce(self.jobs[job["id"]])
        else:
            self.jobs[job["id"]] = Job(job)

    def _on_event(self, event) -> None:
        job = self.jobs.get(event["job"])
        if job and job.state not in FINAL:
            if event["kind"] == "stage":
                job.data.update(stage=event["stage"], fraction=0.0, text="")
                job.cached = job.cached or event["cached"]
            elif event["kind"] == "log":
                job.log = [*job.log, event["text"]][-LOG_LINES:]
            elif event["kind"] == "progress":
                job.data.update(fraction=event["fraction"], text=event["text"])

    def _on_preview(self, job, path) -> None:
        if job in self.jobs:
            self.jobs[job].picture = path
            self._show_picture(self.jobs[job])

    def _on_transfer(self, ticket, fraction) -> None:
        job = self.jobs.get(self._uploads.get(ticket, ""))
        if job:
            job.transfer = fraction

    def _on_answer(self, ticket, order, result, error) -> None:
        self._uploads.pop(ticket, None)
        then = self._then.pop(ticket, None)
        if then:
            then(result, KilnError.from_wire(error) if error else None)

    def _announce(self, job: Job) -> None:
        """A line in Blender's status bar; the panel has the rest."""
        text = f"Kiln: {job.data['title']} is ready" if job.state == "done" else f"Kiln: {job.data['title']} failed, see the Kiln tab"
        window = main_window()
        if window and not bpy.app.background:
            with bpy.context.temp_override(window=window):
                bpy.ops.kiln.announce("INVOKE_DEFAULT", text=text, failed=job.state == "failed")

    def _bring_in(self) -> None:
        """Fetches and imports what is wanted, as soon as nothing stands in the way; of the chosen job, its views too."""
        window = bpy.context.window_manager.kiln
        chosen = self.jobs.get(window.jobs[window.active_job].name) if window.active_job < len(window.jobs) else None
        if chosen and chosen.state == "done" and chosen.turntable is None and turntable.views_of(chosen.data):
            self.fetch_views(chosen)
        for job in list(self.jobs.values()):
            if not job.wants_import or job.state != "done" or job.transfer is not None:
                continue
            if "mesh.glb" not in job.data["results"]:
                job.wants_import = False  # it stopped after its views
            elif job.file is not None and job.file != self.file:
                job.wants_import = False  # another file is open: the list offers it there
            elif job.results is None:
                self.fetch(job)
            elif not why_import_waits(job):
                try:
                    with bpy.context.temp_override(window=main_window()):
                        made = self.import_results(bpy.context, job)
                        if job.quads:  # a modal operator: it says what it does before Blender is busy with it
                            bpy.ops.kiln.remesh_quads("INVOKE_DEFAULT", result=made.mesh_object.name, faces=job.quads)
                except KilnError as error:
                    job.wants_import = False
                    self.note(error)
                except Exception as error:
                    job.wants_import = False
                    self.note(KilnError("import", f"The result of {job.data['title']} could not be imported: {error}.",
                                        "Press Import to try again."), traceback.format_exc())  # fmt: skip

    def wait(self, ready: Callable[[], bool], report: Callable[[], None] = lambda: None) -> None:
        """Blocks until `ready()`, taking in messages meanwhile: for scripts and `blender -b`, where no timer runs."""
        self.connect()
        self.drain()
        while not ready():
            report()
            time.sleep(0.03)
            self.drain()

    # What operators and scripts ask for

    def order(self, job: Job, what: str) -> None:
        """Cancels or retries a job. Of one that has not reached the backend, the sending."""
        if job.data["id"].startswith("sending-"):
            ticket = next((ticket for ticket, name in self._uploads.items() if name == job.data["id"]), None)
            if what == "cancel" and ticket is not None:
                self.carry_out("give_up", lambda result, error: None, transfer=ticket)
            elif what == "retry" and job.transfer is None:
                self.want_backend()
                self._send(job)
            return
        if what == "cancel":
            job.data["state"] = "cancelling"  # shown at once; the backend answers in a moment

        def answered(result, error):
            if error and error.code == "no-job":
                self._forget(job)  # another Blender removed it
            elif error:
                self.note(error)

        self.carry_out(what, answered, job=job.data["id"])

    def _start(self) -> None:
        """Asks for a backend. From now on it counts as starting, until the client thread tells how that went."""

        def answered(result, error):
            if self._starting == ticket:
                self._starting = 0

        self._starting = ticket = self.ask("start", answered)
        if self.backend["state"] != "running":
            self.backend = {**self.backend, "state": "starting", "text": "", "error": None}

    def want_backend(self) -> None:
        """Makes sure that there is a backend to ask, or raises why there is none. Waits only in `blender -b`."""
        self.connect()
        if bpy.app.background:
            if self.where.python or self.where.remote:
                self._start()
            self.wait(lambda: not self._starting and self.backend["state"] not in ("looking", "starting"))
        state = self.backend["state"]
        if state in ("missing", "unreachable", "failed") and self.backend["error"]:
            raise KilnError.from_wire(self.backend["error"])
        if state in ("looking", "stopped"):
            self._start()

    def start_backend(self) -> None:
        self.notices = [notice for notice in self.notices if notice.error.code != "backend-died"]
        self.connect()
        if self.backend["state"] == "missing":
            raise KilnError.from_wire(self.backend["error"])
        if bpy.app.background:
            self.want_backend()
        else:
            self._start()

    def stop_backend(self) -> None:
        self._refuse_remote()
        self.carry_out("stop", lambda result, error: error and self.note(error))

    def _refuse_remote(self) -> None:
        """For what is done to this computer's backend alone: the other one may serve others."""
        self.connect()
        if self.where.remote:
            words = "The backend of another computer is in use, which is not stopped or set up from here."
            raise KilnError("remote", words, "Press Use This Computer first.")

    def need_jobs(self) -> None:
        """In `blender -b` nothing has listened yet: connects and waits for the list of jobs."""
        if bpy.app.background:
            self.want_backend()
            self.drain()

    def wait_for_results(self, job: Job, everything: bool = False) -> None:
        """Blocks until a job is done and its results are here; raises its error. Ctrl+C cancels it."""
        job.wants_import = False  # the caller imports

        def report():
            data = job.data
            if job.transfer is not None:
                terminal(f"{data['title']}: {'receiving' if job.state == 'done' else 'sending'} {job.transfer:.0%}")
            else:
                terminal(f"{data['title']}: {(data['stage'] or data['state']).lower()} {data['fraction'] or 0:.0%} {data['text']}")

        try:
            gone = ("failed", "unreachable", "missing", "stopped")
            self.wait(lambda: job.state in FINAL or job.data["id"] not in self.jobs or self.backend["state"] in gone, report)
        except KeyboardInterrupt:
            with suppress(KilnError):
                self.order(job, "cancel")
            raise
        if job.state not in FINAL and job.data["id"] not in self.jobs:
            raise KilnError("no-job", f"{job.data['title']} was removed.", "")
        if job.state not in FINAL:
            raise KilnError.from_wire(self.backend["error"])
        if job.state == "failed":
            raise KilnError.from_wire(job.data["error"])
        if job.state == "cancelled":
            raise KilnError("cancelled", f"{job.data['title']} was cancelled.", "")
        if job.results is None:
            before = len(self.notices)
            self.fetch(job, everything)
            self.wait(lambda: job.transfer is None, report)
            if job.results is None:
                raise self.notices[min(before, len(self.notices) - 1)].error

    def set_up(self, action: str, **options) -> None:
        """Starts to create, repair or remove the backend's environment; in `blender -b` waits for it."""
        if action != "remove" and not options.get("bundle") and not bpy.app.online_access:
            raise KilnError("offline", "Blender is not allowed to go online.", offline_hint())
        self._refuse_remote()
        work = self.setting_up = SetUp(action, **options)
        # The backend first: what runs cannot be exchanged. Its jobs go on when it is back.
        self.ask("stop", lambda result, error: work.refuse(error) if error else work.start())
        if bpy.app.background:
            self.wait(lambda: work.finished, lambda: terminal(f"Backend: {work.fraction:.0%} {work.text}"))
            if work.error:
                raise work.error

    def _look_at_environment(self) -> None:
        """Its state, and on a thread its size: thousands of files."""
        told, folder = self.link.told, environment_folder()
        if environment.python(folder):
            threading.Thread(target=lambda: told.put({"kind": "disk", "size": environment.size(folder)}), daemon=True).start()
        else:
            self.disk = None
        self.environment = environment.state(folder)

    def _on_disk(self, size) -> None:
        self.disk = size

    # What the panel draws

    def listed(self) -> list[Job]:
        """Newest first."""
        return sorted(self.jobs.values(), key=lambda job: -(job.data["created"] or 0))

    def _sync_rows(self, select: str | None = None) -> None:
        """Makes the job list's rows, which Blender needs as properties, those of `self.jobs`."""
        self._speeds.clear()
        window = bpy.context.window_manager.kiln
        wanted = [job.data["id"] for job in self.listed()]
        if wanted != [row.name for row in window.jobs]:
            chosen = window.jobs[window.active_job].name if window.active_job < len(window.jobs) else None
            window.jobs.clear()
            for name in wanted:
                window.jobs.add().name = name
            select = select or chosen
        if select in wanted:
            window.active_job = wanted.index(select)

    def icon(self, job: Job) -> int:
        """Blender's icon number of the job's newest picture, 0 without one."""
        name = self.picture_now(job)
        return self.pictures[name].icon_id if name in self.pictures else 0

    def picture_now(self, job: Job) -> str:
        """Under which name `pictures` has what to show of a job: its newest picture, or of what moves the picture of this moment."""
        turning = self.turntables.get(job.data["id"])
        if not turning:
            return job.data["id"]
        now = time.monotonic()
        if self.turning != job.data["id"]:
            self.turning, self.turned_from = job.data["id"], now
        number = int((now - self.turned_from) / TURN)
        if number >= TURNS * len(turning):
            return turning[0]
        self.turned = now  # the timer goes on drawing while somebody looks
        return turning[number % len(turning)]

    def _show_picture(self, job: Job) -> None:
        """Loads a job's newest picture now: Blender would do it later, and show a wheel meanwhile, twice a second."""
        name = job.data["id"]
        if name in self.pictures:
            del self.pictures[name]
        if job.picture:
            self.pictures.load(name, str(job.picture), "IMAGE").image_size[:]

    def _drop_pictures(self, job: str) -> None:
        views = [name for name in self.pictures if name.startswith(f"{job}/view_")]
        for name in [job, *self.turntables.pop(job, ()), *views]:
            if name in self.pictures:
                del self.pictures[name]

    def _show_turntable(self, job: Job) -> None:
        """Loads the pictures of a result that moves, if it has any."""
        names = []
        for path in sorted(job.results.glob("turntable_*.png")):
            names.append(f"{job.data['id']}/{path.stem}")
            if names[-1] not in self.pictures:
                self.pictures.load(names[-1], str(path), "IMAGE").image_size[:]
        if names:
            self.turntables[job.data["id"]], self.turning = names, ""

    def expected_seconds(self, recipe: str, values: dict) -> float | None:
        """The longest that a job with exactly these parameters took here (one that found finished stages took less); None without one:
        no guess is better than a wrong one."""
        took = [
            data["finished"] - data["started"]
            for data in (job.data for job in self.jobs.values())
            if data["state"] == "done" and data["attempts"] == 1 and data["recipe"] == recipe and data["parameters"] == values
        ]
        return max(took, default=None)

    def speed(self, recipe: str) -> float:
        """How fast this backend is beside two quiet cores: as its finished jobs tell, those of this recipe where there are any; without
        one, from its cores. Asked at each redraw, so that it is kept until something changes."""
        if recipe not in self._speeds:
            measured = self._measured(recipe) or self._measured(*recipes.RECIPES)
            guess = estimates.speed_of(self.device)
            self._speeds[recipe] = min(max(statistics.median(measured), 0.05), 20.0) if measured else guess
        return self._speeds[recipe]

    def _measured(self, *names: str) -> list[float]:
        """Of each set of parameters among the newest finished jobs, the seconds that two quiet cores would take over those that it took.
        The slowest of jobs with the same parameters counts: the others may have found finished stages."""
        found: dict[str, tuple[float, float]] = {}
        for job in self.listed()[:50]:
            data = job.data
            told = data["recipe"] != "animate" or "frame_start" in (data["source"] or {})  # else its parameters do not say how many frames
            if data["state"] == "done" and data["attempts"] == 1 and not job.cached and data["recipe"] in names and told:
                with suppress(KeyError, TypeError):  # parameters of another version of Kiln
                    expected = estimates.backend_seconds(data["recipe"], data["parameters"], self.gpu, (data["source"] or {}).get("splats"))
                    took = data["finished"] - data["started"]
                    key = json.dumps([data["recipe"], data["parameters"]], sort_keys=True)
                    if took > found.get(key, (0.0, 0.0))[1]:
                        found[key] = (expected, took)
        return [expected / took for expected, took in found.values()]

    @property
    def device(self) -> dict:
        """What the backend computes on, as far as it is known: {} before."""
        return (self.backend["hello"] or {}).get("device") or {}

    @property
    def gpu(self) -> bool:
        """Whether jobs run on a GPU: there is one, and nothing keeps the backend from using it."""
        return self.device.get("kind") == "cuda" and not self.device.get("problem")

    def estimate(self, recipe: str, values: dict, splats: int | None = None) -> estimates.Estimate:
        """What a job will take on this backend. Of one that ran with exactly these parameters, its own time."""
        expected = estimates.estimate(recipe, values, self.speed(recipe), self.gpu, splats)
        took = self.expected_seconds(recipe, values)
        if took is None:
            return expected
        return expected._replace(seconds=took + estimates.blender_seconds(recipe, values, splats))

    def about(self, job: str) -> str:
        """Everything worth knowing for who is asked for help: versions, the job's parameters, the backend's last log lines."""
        lines = [
            f"Kiln {VERSION}, Blender {bpy.app.version_string}, {sys.platform}",
            f"backend {self.backend['state']} {self.backend['hello']}",
        ]
        if job in self.jobs:
            data = self.jobs[job].data
            lines += [f"job {data['id']}: {data['recipe']} {data['parameters']}"]
        if self.link:
            lines.append(tail(self.where.log))
        return "\n".join(lines)


class Shoot:
    """From a subject to a submitted job: prepares what the recipe asks for, views, splats or a picture, step by step in a folder of its
    own, which is gone afterwards in any case."""

    def __init__(self, subject: capture.Subject | export.Subject | picture_input.Subject, recipe):
        """Raises KilnError where there is no backend to send the inputs to, or nothing to make them of."""
        current.want_backend()
        if subject.kind == "splats":  # they go out as they stand in the scene, whatever is set for files
            recipe = recipes.make(recipe.NAME, {**recipes.values(recipe), "subject.up": "auto"})
        if recipe.INPUT == "motion":  # the job's parameters say which frames it is of
            recipe = recipes.make(recipe.NAME, capture_motion.resolved(recipes.values(recipe), capture._scene(subject)))
        self.title, self.recipe = subject.title, recipe
        self.doing = {"views": "rendering", "motion": "rendering", "splats": "writing", "picture": "reading"}[recipe.INPUT]
        self.folder = Path(tempfile.mkdtemp(prefix=f"{recipe.INPUT}-", dir=current.folder))
        try:
            if recipe.INPUT == "views":
                self.capture = capture.Capture(subject, recipe.capture, self.folder, recipe.seed)
            elif recipe.INPUT == "motion":
                self.capture = capture_motion.MovingCapture(subject, recipe.capture, self.folder, recipe.seed)
            elif recipe.INPUT == "picture":
                self.capture = picture_input.Gathering(subject, self.folder)
            else:
                self.capture = export.Export(subject, self.folder)
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        current.capture = (0, self.capture.steps, self.title)

    def step(self) -> bool:
        """Does a little; False when everything is there."""
        with disk_errors(), quiet():
            more = self.capture.step()
        current.capture = (self.capture.done, self.capture.steps, self.title)
        return more

    def submit(self) -> Job:
        with disk_errors():
            inputs, source = self.capture.finish()
            picture = None
            if self.recipe.INPUT == "picture":
                shown = self.capture.shown()
            else:
                shown = capture.from_the_front(inputs["transforms.json"]) if "transforms.json" in inputs else None
            if shown:
                picture = current.folder / "pictures" / f"{self.folder.name}{shown.suffix.lower()}"
                picture.parent.mkdir(exist_ok=True)
                shutil.copyfile(shown, picture)
        self.capture.close()
        current.capture = None
        return current.submit(self.recipe, inputs, source, self.title, self.folder, picture)

    def close(self) -> None:
        """Given up: nothing is left."""
        self.capture.close()
        current.capture = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def all_at_once(self) -> Job:
        """All of it in one go, for scripts."""
        try:
            while self.step():
                terminal(f"{self.title}: {self.doing} {self.capture.done / self.capture.steps:.0%}")
                if interrupted.is_set():
                    raise KeyboardInterrupt
            return self.submit()
        except BaseException:
            self.close()
            raise


class SetUp(threading.Thread):
    """Creates, repairs or removes the backend's environment on a thread of its own."""

    def __init__(self, action: str, jobs: bool = False, **options):
        """`jobs`: with "remove", also what the backend keeps. options: those of `environment.create`."""
        super().__init__(name="Kiln set-up", daemon=True)
        self.action, self.jobs, self.options = action, jobs, options
        self.folder, self.log, self.home = environment_folder(), environment_log(), connection.home()  # asked for on the main thread
        self.fraction, self.text = 0.0, ""
        self.error: KilnError | None = None
        self.finished = False
        self._told: queue.SimpleQueue = queue.SimpleQueue()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    def refuse(self, error: KilnError) -> None:
        """Instead of a start."""
        self._told.put(("finished", error))

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def run(self) -> None:
        error = None
        try:
            if self.action == "remove":
                environment.remove(self.folder, self._report)
                if self.jobs:
                    self._report(1.0, "Removing jobs and results")
                    remove_store(self.home)
            else:
                environment.create(self.folder, report=self._report, log=self.log, **self.options)
        except Cancelled:
            pass
        except KilnError as failure:
            error = failure
        except environment.SetupError as failure:
            error = KilnError(failure.code, failure.message, failure.hint)
        except OSError as failure:
            words = f"{failure.strerror or failure}: {failure.filename or self.folder}."
            error = KilnError("disk", words, "Check the folder, then try again.")
        except Exception as failure:
            traceback.print_exc()
            error = KilnError("internal", f"The backend could not be set up: {failure!r}.", "The console has more.")
        self._told.put(("finished", error))

    def _report(self, fraction: float, text: str = "") -> None:
        if self._cancelled.is_set():
            raise Cancelled
        self._told.put((fraction, text))

    def take_in(self) -> bool:
        """Main thread: the newest report. True if there was one."""
        moved = False
        while True:
            try:
                first, second = self._told.get_nowait()
            except queue.Empty:
                return moved
            moved = True
            if first == "finished":
                self.finished, self.error = True, second
            else:
                self.fraction, self.text = first, second


def remove_store(home: Path) -> None:
    """Deletes what the backend keeps in Kiln's home (SPEC.md and backend/store.py name it), and nothing else that lies there."""
    staying = []
    for entry in [*(home / name for name in STORED), *home.glob("kiln.sqlite*")]:
        try:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
        except OSError as error:
            staying.append(f"{entry} ({error.strerror or error})")
    if staying:
        raise KilnError("disk", f"Not everything could be deleted: {', '.join(staying)}.", "Close what uses it, then delete it by hand.")


# Blender, seen from here


def chosen_subject(
    context,
    recipe: str | None = None,
    collection: str | None = None,
    file: str | None = None,
    image: str | None = None,
    views: str | None = None,
    prompt: str | None = None,
) -> capture.Subject | export.Subject | picture_input.Subject:
    """What the panel's source box says: the selection or the chosen collection; for a recipe that takes splats the active object or the
    chosen file; for one that takes a picture that, a folder of views or words. `collection`, `file`, `image`, `views` and `prompt` name
    others."""
    settings = context.scene.kiln
    kind = recipes.recipe_named(recipe or settings.recipe).INPUT
    if kind == "picture":
        if prompt is None:
            prompt = getattr(getattr(settings, recipe or settings.recipe), "generate_prompt", "")
        return _chosen_picture(context, settings, file, image, views, prompt)
    if kind == "splats":
        if file is None and settings.splats_source == "FILE":
            file = settings.splats_file
        return export.subject(context, file=file)
    if collection is not None:
        found = bpy.data.collections.get(collection)
        if found is None:
            raise KilnError("nothing-selected", f"There is no collection {collection!r}.", "Check its name in the Outliner.")
        return capture.subject(context, collection=found)
    if settings.source == "COLLECTION":
        if settings.collection is None:
            raise KilnError("nothing-selected", "No collection is chosen.", "Choose one, or use the selection.")
        return capture.subject(context, collection=settings.collection)
    return capture.subject(context)


def _chosen_picture(context, settings, file: str | None, image: str | None, views: str | None, prompt: str) -> picture_input.Subject:
    if file is None and image is None and views is None:
        source = settings.picture_source
        if source == "IMAGE" and settings.picture_image is None:
            raise KilnError("nothing-selected", "No image is chosen.", "Choose one, open one, or take a file.")
        if source == "VIEWS" and not settings.picture_views:
            raise KilnError("nothing-selected", "No folder of views is chosen.", "Choose one, or take a picture.")
        if source == "IMAGE":
            return picture_input.subject(context, prompt, image=settings.picture_image)
        file, views = settings.picture_file if source == "FILE" else "", settings.picture_views if source == "VIEWS" else ""
    found = bpy.data.images.get(image) if image else None
    if image and found is None:
        raise KilnError("nothing-selected", f"There is no image {image!r}.", "Check its name in the Image Editor.")
    return picture_input.subject(context, prompt, file, found, views or "")


@contextmanager
def disk_errors() -> Iterator[None]:
    """A disk that is full or write-protected, in words."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(current.folder).free
            words = f"The disk is full: {free / 1e6:.0f} MB are free at {current.folder}."
            raise KilnError("no-space", words, "Make room, then try again.") from error
        words = f"{error.strerror or error}: {error.filename or current.folder}."
        raise KilnError("disk", words, "Check the folder and its permissions.") from error


def user_folder() -> Path:
    """The extension's own folder, which outlives its updates: the backend's environment and the logs."""
    return Path(bpy.utils.extension_path_user(__package__, path="backend", create=True))


def environment_folder() -> Path:
    return user_folder() / "env"  # short: Windows counts the characters of a path


def environment_log() -> Path:
    return user_folder() / "set-up.log"


def where() -> Where:
    """The backend that the preferences choose."""
    chosen, log = preferences.get(), connection.home() / "logs" / "server.log"  # where `kiln run` writes it too
    if chosen.place == "REMOTE" and chosen.connection_file:
        return Where(remote=Path(bpy.path.abspath(chosen.connection_file)), log=log)
    named = preferences.backend_python()
    if named:
        return Where(python=named, pythonpath=os.environ.get("PYTHONPATH", ""), log=log)
    return Where(python=environment.python(environment_folder()), log=log)


def offline_hint() -> str:
    if bpy.app.online_access_override:
        return "Start Blender without --offline-mode, or set the backend up from an offline bundle."
    return "Turn on Allow Online Access in Preferences, System, Network, or set the backend up from an offline bundle."


def why_import_waits(job: Job) -> str:
    """What stands in the way of putting a result into the scene; empty when nothing does."""
    if current.capture or any(bpy.app.is_job_running(name) for name in ("RENDER", "OBJECT_BAKE")):
        return "Comes in when the render is done"
    if bpy.context.mode != "OBJECT":
        return "Comes in when you are back in Object Mode"
    if not job.asked and any(window.modal_operators for window in bpy.context.window_manager.windows):
        return "Comes in when the running tool ends, or with Import"
    return ""


def imports_of(job: Job) -> list[bpy.types.Collection]:
    """What the open file holds of the job's result, looked up anew each time: undo and redo change that."""
    return [collection for collection in bpy.data.collections if collection.get("kiln_job") == job.data["id"]]


def main_window() -> bpy.types.Window | None:
    windows = bpy.context.window_manager.windows
    return windows[0] if windows else None


def redraw() -> None:
    """Asks every sidebar to draw what changed."""
    for window in bpy.context.window_manager.windows:
        for area in window.screen.areas:
            if area.type in ("VIEW_3D", "PREFERENCES"):
                for region in area.regions:
                    if region.type in ("UI", "WINDOW") if area.type == "PREFERENCES" else region.type == "UI":
                        region.tag_redraw()


def show_tab(area: bpy.types.Area | None) -> None:
    """Opens a viewport's sidebar on the Kiln tab. A sidebar has its tabs once it was drawn, so that may take a moment."""
    if area is None or area.type != "VIEW_3D":
        return
    area.spaces.active.show_region_ui = True
    wanted, until = area.as_pointer(), time.monotonic() + 1.0  # a pointer to compare: the area may be gone by then

    def turn():
        for region in (
            region
            for window in bpy.context.window_manager.windows
            for area in window.screen.areas
            if area.as_pointer() == wanted
            for region in area.regions
            if region.type == "UI"
        ):
            try:
                region.active_panel_category = "Kiln"
            except (TypeError, AttributeError):
                return 0.05 if time.monotonic() < until else None
        return None

    if not bpy.app.background:
        bpy.app.timers.register(turn, first_interval=0.0)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps what Blender prints of every render, hundreds of lines, off the terminal of `blender -b`, where our own progress stands."""
    if not bpy.app.background:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(nowhere)
        os.close(kept)


_last_line = ("", 0.0)


def terminal(text: str, last: bool = False) -> None:
    """Progress for who runs `blender -b`: rewritten in place on a terminal; into a file, a line at most every two seconds."""
    global _last_line
    if text == _last_line[0] and not last:
        return
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="\n" if last else "", flush=True)
    elif last or time.monotonic() > _last_line[1] + 2:
        print(text, flush=True)
    else:
        return
    _last_line = (text, time.monotonic())


def _loaded(*_):
    """A file was opened: the link stays, results for the file before wait in the list."""
    if current:
        current.file += 1
        current.capture = None
        current._sync_rows()


_loaded = bpy.app.handlers.persistent(_loaded)


def _renders(*_):
    """A render begins, not one of our own. On whichever thread that is: an order in a queue is all that may happen here."""
    if current and current.link and not current.capture:
        current.link.ask("release")


_renders = bpy.app.handlers.persistent(_renders)


def _tick():
    return current.tick()


def register():
    global current
    current = Session()
    bpy.app.handlers.load_post.append(_loaded)
    bpy.app.handlers.render_init.append(_renders)
    if not bpy.app.background:
        bpy.app.timers.register(_tick, first_interval=BUSY, persistent=True)


def unregister():
    global current
    if bpy.app.timers.is_registered(_tick):
        bpy.app.timers.unregister(_tick)
    bpy.app.handlers.load_post.remove(_loaded)
    bpy.app.handlers.render_init.remove(_renders)
    current.close()
    current = None
