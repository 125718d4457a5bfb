"""The panel Batch: many assets of one press. It writes down what is asked for and starts `kiln batch` (batches.py), which goes on without
Blender; then it shows what that process tells, of this and of earlier sessions, and brings results in.

A thread looks at the files (`batches.Watch`), a timer takes in what it tells. Results come in one a tick, all of a batch as one undo step;
one that cannot come in is told and left out.
"""

from __future__ import annotations

import itertools
import json
import queue
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import bpy
from bpy.props import StringProperty
from mathutils import Vector

from . import batches, capture, capture_motion, import_asset, operators, panel, preferences, properties, session, splat_nodes
from .batches import Batch
from .protocol import recipes
from .protocol.errors import KilnError

TICK = 0.1  # seconds between two looks at what the thread told
LOOKED_AT = 1000  # objects at most that are looked at to say how many assets there would be: about a millisecond
FEW = 50  # objects that are looked at anew at each redraw; more of them once a second
PICTURES = 1  # thumbnails that are loaded in one tick: some milliseconds each
ICONS = {  # of batches and of their items
    "starting": "SORTTIME", "running": "RENDER_ANIMATION", "interrupted": "PAUSE", "done": "CHECKMARK", "failed": "ERROR",
    "cancelled": "X", "waiting": "TIME", "capturing": "OUTLINER_OB_CAMERA", "queued": "TIME", "computing": "RENDER_ANIMATION",
}  # fmt: skip
WORDS = {"waiting": "Waiting", "capturing": "Capturing", "queued": "Waiting", "failed": "Failed", "cancelled": "Cancelled"}


@dataclass
class Importing:
    """Results on their way into the open file."""

    batch: str
    title: str
    names: list[str]  # of the items that are still to come
    file: int  # session.file: it does not go on in another one
    asked: bool  # by the button: a running tool does not hold it up
    made: int = 0
    along: float = 0.0  # where the next one stands that has no place of its own, Blender units along X
    failed: list[KilnError] = field(default_factory=list)  # why some stayed out


class Batches:
    """What is known of the batches of this computer."""

    def __init__(self):
        self.all: dict[str, Batch] = {}  # newest first
        self.seen = False  # set when the panel's header is drawn first: before, nobody looks
        self.importing: Importing | None = None
        self.queue: list[Importing] = []  # that come after it
        self.wanted: set[tuple[str, str]] = set()  # thumbnails (batch, item) that were drawn and are not loaded
        self.watch: batches.Watch | None = None
        self.cancelling: set[str] = set()
        self._over: set[str] = set()  # batches whose end was told
        self.count: Count | None = None  # of what the settings ask for
        self.recount = False  # an older one was drawn

    def begin(self) -> None:
        if self.watch is None:
            self.watch = batches.Watch()
            self.watch.start()

    def close(self) -> None:
        if self.watch is not None:
            self.watch.close()

    def refresh(self) -> None:
        """Looks at once: for scripts and for what has just been changed here."""
        found = batches.Watch()
        found.look()
        self.take(found.batches())

    def take(self, told: dict[str, Batch]) -> None:
        """What the thread told: new rows, and results that are to come in by themselves."""
        before, self.all = self.all, told
        window = bpy.context.window_manager.kiln
        chosen = _chosen(window.batches, window.active_batch)
        _fill(window.batches, list(told))
        new = [id for id in told if id not in before]
        if before and len(new) == 1 and told[new[0]].order.session == session.current.id:
            chosen = new[0]  # started just now
        window.active_batch = list(told).index(chosen) if chosen in told else 0
        self.fill_items()
        for id, batch in told.items():
            if batch.active:
                self._over.discard(id)
                if id in self.cancelling and batch.state == "running":
                    batches.cancel(batch)  # once more: what was asked before the process had begun, it has not seen
            elif id not in self._over:
                self._over.add(id)
                self.cancelling.discard(id)
                if id in before:
                    self._ended(batch)

    def fill_items(self) -> None:
        window = bpy.context.window_manager.kiln
        batch = self.all.get(_chosen(window.batches, window.active_batch) or "")
        _fill(window.batch_items, [item["name"] for item in batch.items] if batch else [])

    def _ended(self, batch: Batch) -> None:
        """One that was seen at work is over."""
        order, now = batch.order, session.current
        if order.wants_import and (order.session, order.opened) == (now.id, now.file) and to_import(batch):
            self.bring_in(batch, asked=False)
        window = session.main_window()
        if window and not bpy.app.background:
            failed = batch.count("failed")
            words = f"{batch.count('done')} of {len(batch.items)} ready" + (f", {failed} failed, see the Kiln tab" if failed else "")
            with bpy.context.temp_override(window=window):
                bpy.ops.kiln.announce("INVOKE_DEFAULT", text=f"Kiln batch: {words}", failed=bool(failed) or batch.state != "done")

    # Results into the open file

    def bring_in(self, batch: Batch, asked: bool) -> None:
        """Begins to import a batch's results; those that the file holds already stay as they are. While another's come in, a person is
        refused, and a batch that has just ended waits for its turn."""
        names = to_import(batch)
        if not names:
            raise KilnError("no-results", f"There is nothing of {batch.order.title} to import.", "What it has is in this file already.")
        if self.importing and asked:
            raise KilnError("busy", f"Results of {self.importing.title} are coming in.", "Wait until they are there.")
        self.queue.append(Importing(batch.id, batch.order.title, names, session.current.file, asked))
        self.importing = self.importing or self.queue.pop(0)

    def import_next(self, context) -> bool:
        """Imports one result; whether there are more. One that cannot come in is noted, and the rest follows. The last one of a batch makes
        the undo step of all that came in."""
        work = self.importing
        batch = self.all.get(work.batch)
        here = work.file == session.current.file
        if batch is None or not here:
            work.names.clear()
        try:
            if work.names:
                self._import_one(context, work, batch, work.names.pop(0))
        except BaseException:  # Ctrl-C in a script
            work.names.clear()
            raise
        finally:
            if not work.names:
                self.importing = self.queue.pop(0) if self.queue else None
                if work.made and here:
                    import_asset.undo_step(context, f"Kiln: import {work.made} of {work.title}")
        return self.importing is not None

    def import_all(self, context) -> None:
        """Imports to the end, for scripts and `blender -b`; then raises the KilnError of what stayed out first."""
        work = self.importing
        while self.import_next(context):
            pass
        if work.failed:
            raise work.failed[0]

    def _import_one(self, context, work: Importing, batch: Batch, name: str) -> None:
        if name not in to_import(batch):  # it came in meanwhile
            return
        try:
            self._import(context, batch, name)
            work.made += 1
        except KilnError as error:
            work.failed.append(error)
            session.current.note(error)
        except Exception as error:
            words = f"The result {name} of {work.title} could not be imported: {error}."
            work.failed.append(KilnError("import", words, "Press Import Results to try again."))
            session.current.note(work.failed[-1], traceback.format_exc())

    def comes_in(self, batch: Batch) -> bool:
        """Whether its results are on their way in, or wait for their turn."""
        return any(work.batch == batch.id for work in (self.importing, *self.queue) if work)

    def _import(self, context, batch: Batch, name: str) -> None:
        folder, told, record = batch.out / name, {}, {}
        with suppress(OSError, ValueError):
            told = json.loads((folder / "report.json").read_text("utf-8"))
            record = json.loads((folder / "item.json").read_text("utf-8"))
        item = next(item for item in batch.items if item["name"] == name)
        parameters = told.get("parameters", {})
        provenance = {
            "recipe": item["recipe"], "parameters": parameters, "kiln": told.get("versions", {}).get("kiln", ""), "job": "",
            "preset": properties.preset_of(item["recipe"], parameters) if parameters else "",
        }  # fmt: skip
        source = {**(record.get("source") or {}), "title": name}
        own = Path(item["file"]).parent == batch.folder  # the copy of this file: the source stands in it
        if not own:
            source.pop("scene", None)
        made = import_asset.import_asset(
            context, folder, source, provenance, properties.motion(context.scene.kiln), home=home(context, batch), undo=False
        )
        made.collection["kiln_batch"] = f"{batch.id}/{name}"
        if not own:  # beside each other, in the order of the batch
            mesh = made.mesh_object
            left, right = (edge((mesh.matrix_basis @ Vector(corner)).x for corner in mesh.bound_box) for edge in (min, max))
            for thing in made.collection.objects:
                if thing.parent is None:
                    thing.location.x += self.importing.along - left
            self.importing.along += 1.25 * (right - left)

    # The timer

    def tick(self) -> float:
        try:
            moved = self._take_in() or self._load_pictures() or self._draw_count()
            if not moved and self.importing and not session.why_import_waits(self.importing):
                moved = True  # a tick does one thing: an import is long enough
                with bpy.context.temp_override(window=session.main_window()):
                    self.import_next(bpy.context)
        except KilnError as error:
            session.current.note(error)
            moved = True
        except Exception:  # a timer that raises is never called again
            traceback.print_exc()
            moved = True
        if moved:
            session.redraw()
        return TICK

    def _take_in(self) -> bool:
        if self.watch is None:
            if self.seen:
                self.begin()
            return False
        told = None
        with suppress(queue.Empty):
            while True:
                told = self.watch.told.get_nowait()
        if told is None:
            return False
        self.take(told)
        return True

    def _draw_count(self) -> bool:
        if not self.recount or time.monotonic() < self.count.at + 1.0:
            return False
        self.recount = False
        return True

    def _load_pictures(self) -> bool:
        found = session.current.pictures
        wanted, self.wanted = list(self.wanted), set()
        for id, name in wanted[:PICTURES]:
            picture = self.all[id].pictures.get(name) if id in self.all else None
            if picture and f"{id}/{picture.name}" not in found:
                found.load(f"{id}/{picture.name}", str(picture), "IMAGE").image_size[:]
        return bool(wanted)

    def icon(self, batch: Batch, name: str) -> int:
        """Blender's icon number of an item's thumbnail; 0 until it is loaded."""
        picture = batch.pictures.get(name)
        found = session.current.pictures.get(f"{batch.id}/{picture.name}") if picture else None
        if picture and found is None:
            self.wanted.add((batch.id, name))
        return found.icon_id if found else 0


known = Batches()


def _chosen(rows, active: int) -> str | None:
    return rows[active].name if active < len(rows) else None


def _fill(rows, names: list[str]) -> None:
    if names != [row.name for row in rows]:
        rows.clear()
        for name in names:
            rows.add().name = name


def imported(batch: Batch) -> set[str]:
    """Names of the items whose results the open file holds, looked up anew each time: undo and redo change that."""
    found = (collection.get("kiln_batch", "") for collection in bpy.data.collections)
    return {one.partition("/")[2] for one in found if one.startswith(f"{batch.id}/")}


def to_import(batch: Batch) -> list[str]:
    """Names of the finished items that the open file does not hold."""
    there = imported(batch)
    return [item["name"] for item in batch.items if item["state"] == "done" and item["name"] not in there]


def home(context, batch: Batch) -> bpy.types.Collection:
    """The collection that results go to: the chosen one, or a new one in the scene."""
    name = batch.order.collection or f"{batch.order.title} (Kiln batch)"
    found = bpy.data.collections.get(name)
    if found is None or not found.is_editable:
        found = bpy.data.collections.new(name)
    if found not in [context.scene.collection, *context.scene.collection.children_recursive]:
        context.scene.collection.children.link(found)
    return found


# What the panel asks for


def things(context) -> list:
    """The objects or collections that the settings choose; of a folder, its path. What cannot become an asset is left out."""
    return [thing for thing in looked_at(context) if thing is not None]


def looked_at(context) -> Iterator:
    """`things` one by one, and None for each object that is looked at in vain."""
    chosen, recipe = context.scene.kiln.batch, recipes.RECIPES[context.scene.kiln.recipe]
    if chosen.source == "FOLDER":
        if chosen.folder:
            yield Path(bpy.path.abspath(chosen.folder)).absolute()
    elif chosen.source == "COLLECTION" and chosen.collection is None:
        return
    elif chosen.source == "COLLECTION" and chosen.each == "COLLECTION":
        for child in chosen.collection.children:
            for thing in child.all_objects:
                if batches.is_surface(thing):
                    yield child
                    break
                yield None
    else:
        splats = recipe.INPUT == "splats"
        for thing in chosen.collection.all_objects if chosen.source == "COLLECTION" else context.selected_objects:
            fits = splat_nodes.is_splats(thing) if splats else batches.is_surface(thing) and not splat_nodes.is_splats(thing)
            yield thing if fits else None


@dataclass(frozen=True)
class Count:
    """How many assets the settings ask for, as far as the panel looked."""

    assets: int
    whole: bool  # False: there may be more
    looked_at: int
    of: tuple  # what was chosen
    at: float  # time.monotonic()


def counted(context) -> Count:
    """For the panel, which is drawn at each movement of the mouse: it looks at no more than LOOKED_AT objects, and at many of them no more
    than once a second. Where it shows what it saw a moment ago, the timer has it drawn once more."""
    chosen = context.scene.kiln.batch
    of = (
        chosen.collection.name_full if chosen.collection else "",
        context.scene.name,
        context.scene.kiln.recipe,
        chosen.source,
        chosen.folder,
        chosen.each,
    )
    before, now = known.count, time.monotonic()
    if before and before.of == of and before.looked_at > FEW and now < before.at + 1.0:
        known.recount = True
        return before
    seen = list(itertools.islice(looked_at(context), LOOKED_AT + 1))
    found = sum(thing is not None for thing in seen[:LOOKED_AT])
    known.recount = False
    known.count = Count(found, len(seen) <= LOOKED_AT, min(len(seen), LOOKED_AT), of, now)
    return known.count


def ordered(context) -> Batch:
    """Writes down what the panel's settings ask for, or KilnError says what is missing."""
    settings = context.scene.kiln
    chosen, recipe = settings.batch, recipes.RECIPES[settings.recipe]
    group, found = getattr(settings, recipe.NAME), things(context)
    if recipe.INPUT == "picture" and chosen.source != "FOLDER":
        raise KilnError("bad-subject", f"{recipe.TITLE} starts from pictures, not from objects.", "Choose a folder of pictures.")
    if not found:
        raise nothing(chosen, recipe)
    folder = found[0] if chosen.source == "FOLDER" else None
    if folder is not None and not folder.is_dir():
        raise KilnError("bad-input", f"There is no folder {folder}.", "Choose another one.")
    if folder is None and recipe.INPUT in ("views", "motion"):
        found = [thing for thing in found if _can_be_captured(context, thing, only=len(found) == 1)]
        if not found:
            raise nothing(chosen, recipe)
    if any(one.active and one.order.out == _out(chosen) for one in known.all.values()):
        raise KilnError("already-running", f"A batch is at work in {_out(chosen)}.", "Wait for it, or choose another output folder.")
    values = capture_motion.resolved(properties.values(group, recipe), context.scene)
    options, library = ["--fbx"] if chosen.fbx else [], ""
    if chosen.results == "LIBRARY":
        if not chosen.library.lower().endswith(".blend"):
            hint = "Choose a .blend file for the assets; it is made if it is not there."
            raise KilnError("bad-library", "No library file is chosen.", hint)
        library = str(Path(bpy.path.abspath(chosen.library)).absolute())
        batches.refuse_unwritable(Path(library).parent)
        options += ["--catalog", chosen.catalog] if chosen.catalog.strip() else []
    return batches.order(
        context, folder or batches.items_of(found), batches.wanted(recipe.NAME, group.preset, values), chosen.out, _title(chosen, found),
        options=options, library=library, collection=chosen.into.name if chosen.into and chosen.results == "COLLECTION" else "",
        wants_import=chosen.results == "COLLECTION" and preferences.get().auto_import,
    )  # fmt: skip


def nothing(chosen, recipe) -> KilnError:
    """Why there is nothing to make a batch of."""
    if chosen.source == "FOLDER":
        return KilnError("nothing-selected", "No folder is chosen.", "Choose one with models, pictures or splats.")
    if chosen.source == "COLLECTION" and chosen.collection is None:
        return KilnError("nothing-selected", "No collection is chosen.", "Choose one, or use the selection.")
    what = "hold splats" if recipe.INPUT == "splats" else "have a surface to rebuild"
    where = "selected" if chosen.source == "SELECTION" else "in this collection"
    return KilnError("nothing-selected", f"No objects are {where} that {what}.", "Select some, or choose a collection or a folder.")


def _can_be_captured(context, thing, only: bool) -> bool:
    """Whether the scene shows it; of a single one, KilnError says why not."""
    try:
        if isinstance(thing, bpy.types.Collection):
            capture.subject(context, collection=thing)
        else:
            capture.subject(context, objects=[thing])
    except KilnError:
        if only:
            raise
        return False
    return True


def _out(chosen) -> str:
    return str(Path(bpy.path.abspath(chosen.out)).absolute()) if chosen.out else ""


def _title(chosen, found: list) -> str:
    if chosen.source == "COLLECTION":
        return chosen.collection.name
    return found[0].name if len(found) == 1 else f"{found[0].name} and {len(found) - 1} more"


# Operators


class KILN_OT_start_batch(bpy.types.Operator):
    """Make an asset of each of these, in a process of its own that goes on when Blender closes. It works on a copy of this file"""

    bl_idname = "kiln.start_batch"
    bl_label = "Start Batch"
    bl_options = {"REGISTER"}

    def execute(self, context):
        try:
            batch = ordered(context)
            if bpy.app.background:  # a script's: waits, and brings results in where they are wanted
                batches.finish(batch)
                known.refresh()
                if batch.order.wants_import and known.all[batch.id].count("done"):
                    known.bring_in(known.all[batch.id], asked=True)
                    known.import_all(context)
            else:
                batches.start(batch)
                known.refresh()
                known.begin()
        except KilnError as error:
            return operators.refuse(self, error)
        session.redraw()
        return {"FINISHED"}


class BatchOperator:
    """An operator on one batch; without `batch`, on the one that is chosen in the list."""

    batch: StringProperty(name="Batch", description="The batch's id", options={"SKIP_SAVE"})

    def chosen(self, context) -> Batch:
        if bpy.app.background:
            known.refresh()
        window = context.window_manager.kiln
        id = self.batch or _chosen(window.batches, window.active_batch) or ""
        if id not in known.all:
            raise KilnError("no-batch", f"There is no batch {id!r}." if id else "There is no batch.", "")
        return known.all[id]

    def execute(self, context):
        try:
            self.act(context, self.chosen(context))
        except KilnError as error:
            return operators.refuse(self, error)
        session.redraw()
        return {"FINISHED"}


class KILN_OT_cancel_batch(BatchOperator, bpy.types.Operator):
    """Stop this batch; what is finished stays, and Resume goes on with the rest"""

    bl_idname = "kiln.cancel_batch"
    bl_label = "Cancel"

    def act(self, context, batch):
        batches.cancel(batch)
        known.cancelling.add(batch.id)


class KILN_OT_resume_batch(BatchOperator, bpy.types.Operator):
    """Go on with this batch: what is finished is not made again, what failed is tried anew"""

    bl_idname = "kiln.resume_batch"
    bl_label = "Resume"

    def act(self, context, batch):
        if batch.active:
            raise KilnError("already-running", f"{batch.order.title} is at work.", "Wait for its end.")
        if bpy.app.background:
            batches.finish(batch, again=True)
        else:
            batches.start(batch, again=True)
        known.refresh()


class KILN_OT_open_report(BatchOperator, bpy.types.Operator):
    """Show the batch's report in the web browser: pictures of sources and results, figures, warnings"""

    bl_idname = "kiln.open_report"
    bl_label = "Report"

    def act(self, context, batch):
        report = batch.out / "index.html"
        if not report.is_file():
            raise KilnError("no-report", f"There is no report {report} yet.", "It comes with the first results.")
        bpy.ops.wm.url_open(url=report.as_uri())


class KILN_OT_open_batch_folder(BatchOperator, bpy.types.Operator):
    """Open the folder of the results"""

    bl_idname = "kiln.open_batch_folder"
    bl_label = "Folder"

    def act(self, context, batch):
        bpy.ops.wm.path_open(filepath=str(batch.out))


class KILN_OT_import_batch(BatchOperator, bpy.types.Operator):
    """Bring the finished results into this file, as one undo step; those that are in it already stay as they are"""

    bl_idname = "kiln.import_batch"
    bl_label = "Import Results"

    def act(self, context, batch):
        known.bring_in(batch, asked=True)
        if bpy.app.background:
            known.import_all(context)  # with a window the timer does it, one at a time


class KILN_OT_remove_batch(BatchOperator, bpy.types.Operator):
    """Take this batch out of the list. Results in an output folder of your own stay; those in Kiln's are deleted"""

    bl_idname = "kiln.remove_batch"
    bl_label = "Remove"

    def invoke(self, context, event):
        return context.window_manager.invoke_confirm(self, event)

    def act(self, context, batch):
        if batch.active:
            raise KilnError("already-running", f"{batch.order.title} is at work.", "Cancel it first.")
        batches.remove(batch)
        known.refresh()


# The panel


class KILN_UL_batches(bpy.types.UIList):
    def draw_item(self, context, layout, data, item, icon, active_data, active_property):
        batch = known.all.get(item.name)
        if batch is None:
            return
        row = layout.row()
        row.label(text=batch.order.title, icon=look(batch))
        right = row.row()
        right.alignment = "RIGHT"
        right.active = False
        right.label(text=f"{batch.count('done')} of {len(batch.items)}" if batch.active else panel.day_text(batch.order.created))


class KILN_UL_batch_items(bpy.types.UIList):
    def draw_item(self, context, layout, data, item, icon, active_data, active_property):
        window = context.window_manager.kiln
        batch = known.all.get(_chosen(window.batches, window.active_batch) or "")
        told = next((one for one in batch.items if one["name"] == item.name), None) if batch else None
        if told is None:
            return
        row = layout.row()
        picture = known.icon(batch, item.name) if told["state"] == "done" else 0
        if picture:
            row.label(text=item.name, icon_value=picture)
        else:
            row.label(text=item.name, icon=ICONS[told["state"]])
        right = row.row()
        right.alignment = "RIGHT"
        right.active = False
        if told["state"] == "computing":
            right.label(text=f"{told['stage'] or 'Starting'} {told['fraction'] or 0:.0%}")
        elif told["state"] == "done":
            right.label(text="", icon="INFO" if told["warnings"] else "CHECKMARK")
        else:
            right.label(text=WORDS[told["state"]])


class KILN_PT_batch(panel.KilnPanel, bpy.types.Panel):
    bl_label = "Batch"
    bl_order = 2  # after the jobs, before the models
    bl_options = {"DEFAULT_CLOSED"}

    def draw_header_preset(self, context):
        known.seen = True
        at_work = [batch for batch in known.all.values() if batch.active]
        if at_work:
            self.layout.label(text=f"{sum(map(share, at_work)) / len(at_work):.0%}", icon="RENDER_ANIMATION")

    def draw(self, context):
        self.draw_order(self.layout, context)
        window = context.window_manager.kiln
        if not window.batches:
            return
        self.layout.separator()
        rows = len(window.batches)
        self.layout.template_list(
            "KILN_UL_batches", "", window, "batches", window, "active_batch", rows=min(2, rows), maxrows=4, sort_lock=True
        )
        batch = known.all.get(_chosen(window.batches, window.active_batch) or "")
        if batch:
            self.draw_batch(self.layout.box(), context, batch)

    @staticmethod
    def draw_order(layout, context):
        """What the next batch is to make, and where that goes."""
        settings = context.scene.kiln
        chosen, recipe = settings.batch, recipes.RECIPES[settings.recipe]
        box = layout.box()
        box.row().prop(chosen, "source", expand=True)
        if chosen.source == "COLLECTION":
            box.prop(chosen, "collection", text="")
            box.row().prop(chosen, "each", expand=True)
        elif chosen.source == "FOLDER":
            box.prop(chosen, "folder", text="")
        found = counted(context)
        some = found.assets > 0 or not found.whole
        if not some:
            error = nothing(chosen, recipe)
            panel.draw_text(box, context, error.message, "INFO")
            panel.draw_text(box, context, error.hint, "BLANK1")
        elif chosen.source != "FOLDER":
            panel.draw_text(box, context, order_text(context, found.assets, found.whole), "TIME")
        else:
            panel.draw_text(box, context, f"{recipe.TITLE}, {getattr(settings, recipe.NAME).preset}, as set above", "INFO")
        column = layout.column()
        column.use_property_split = True
        column.use_property_decorate = False
        column.prop(chosen, "out", placeholder="Kiln's own")
        column.prop(chosen, "results")
        if chosen.results == "COLLECTION":
            column.prop(chosen, "into")
        elif chosen.results == "LIBRARY":
            column.prop(chosen, "library")
            column.prop(chosen, "catalog")
        column.prop(chosen, "fbx")
        row = layout.column()
        row.scale_y = 1.5
        row.enabled = some
        row.operator("kiln.start_batch", icon="PLAY")

    @staticmethod
    def draw_batch(box, context, batch: Batch):
        """How a batch stands, item by item, and what can be done about it."""
        total, done, failed = len(batch.items), batch.count("done"), batch.count("failed")
        if batch.id in known.cancelling and batch.active:
            panel.draw_text(box, context, "Cancelling", "CANCEL")
        elif batch.state == "starting":
            panel.draw_text(box, context, "Starting", "SORTTIME")
        elif batch.state == "running":
            box.progress(factor=share(batch), text=f"{done} of {total}" + (f", {failed} failed" if failed else ""))
            left = batch.report.get("seconds_left")
            if left is not None:
                box.label(text=f"About {panel.about_text(left)} left", icon="TIME")
        elif batch.state == "interrupted":
            words = f"Stopped after {done} of {total}." if total else "It did not start."
            panel.draw_text(box, context, f"{words} Resume goes on where it was.", "PAUSE")
            for line in batch.said.splitlines()[-3:]:
                panel.draw_text(box, context, line, "BLANK1")
        else:
            words = f"{done} of {total} done" + (f", {failed} failed" if failed else "")
            panel.draw_text(box, context, f"Cancelled, {words}" if batch.state == "cancelled" else words, look(batch))
            if error := (batch.report or {}).get("error"):
                panel.draw_error(box, context, KilnError.from_wire(error))
        library = (batch.report or {}).get("library")
        if library and library["error"]:
            panel.draw_error(box, context, KilnError.from_wire(library["error"]))
        elif library and library["assets"]:
            panel.draw_text(box, context, f"{library['assets']} assets in {Path(library['file']).name}", "ASSET_MANAGER")
        importing = known.importing
        if importing and importing.batch == batch.id:
            waits = session.why_import_waits(importing)
            count = importing.made + len(importing.failed) + len(importing.names)
            if waits:
                panel.draw_text(box, context, waits, "PAUSE")
            else:
                box.progress(factor=importing.made / count, text=f"Importing {importing.made} of {count}")
        elif known.comes_in(batch):
            panel.draw_text(box, context, f"Comes in after {importing.title}", "TIME")
        if total:
            window = context.window_manager.kiln
            box.template_list(
                "KILN_UL_batch_items", "", window, "batch_items", window, "active_batch_item", rows=min(total, 4), maxrows=8, sort_lock=True
            )
            name = _chosen(window.batch_items, window.active_batch_item)
            item = next((one for one in batch.items if one["name"] == name), None)
            if item:
                draw_item(box, context, batch, item)
        row = box.row(align=True)
        if batch.active:
            row.operator("kiln.cancel_batch", icon="X").batch = batch.id
        elif batch.state in ("interrupted", "cancelled") or (batch.report or {}).get("error"):
            row.operator("kiln.resume_batch", icon="PLAY").batch = batch.id
        elif failed:
            row.operator("kiln.resume_batch", text="Retry Failed", icon="FILE_REFRESH").batch = batch.id
        if done and not batch.active and not known.comes_in(batch):
            part = row.row(align=True)
            part.enabled = bool(to_import(batch))
            part.operator("kiln.import_batch", text="Import Results" if part.enabled else "In This File", icon="IMPORT").batch = batch.id
        row = box.row(align=True)
        if total:
            row.operator("kiln.open_report", icon="WORLD").batch = batch.id
            row.operator("kiln.open_batch_folder", icon="FILE_FOLDER").batch = batch.id
        if not batch.active:
            row.operator("kiln.remove_batch", text="" if total else "Remove", icon="TRASH").batch = batch.id


def draw_item(box, context, batch: Batch, item: dict) -> None:
    """What is known of the chosen item."""
    picture = known.icon(batch, item["name"])
    if picture and item["state"] == "done":
        box.template_icon(icon_value=picture, scale=5.0)
    if item["error"]:
        panel.draw_error(box, context, KilnError.from_wire(item["error"]), f"{item['file']} {item['object'] or ''}")
    elif item["state"] in ("capturing", "computing"):
        box.progress(factor=item["fraction"] or 0.0, text=f"{item['stage'] or 'Starting'} {item['fraction'] or 0:.0%}")
        if item["text"]:
            panel.draw_text(box, context, item["text"][:1].upper() + item["text"][1:])
    elif item["state"] == "done":
        figures = item["figures"] or {}
        words = [f"{figures['faces']:,} faces"] if figures.get("faces") else []
        words += [f"{figures['mesh_psnr']:.1f} dB"] if figures.get("mesh_psnr") else []
        panel.draw_text(box, context, ", ".join([*words, panel.time_text(sum((item["seconds"] or {}).values()))]), "CHECKMARK")
    for warning in item["warnings"]:
        panel.draw_text(box, context, warning, "INFO")


def look(batch: Batch) -> str:
    """Its icon."""
    return "ERROR" if batch.state == "done" and batch.count("failed") else ICONS[batch.state]


def share(batch: Batch) -> float:
    """How far a batch is, in [0, 1]."""
    return batch.count(*batches.ENDED) / len(batch.items) if batch.items else 0.0


def order_text(context, count: int, whole: bool = True) -> str:
    """What is asked for in a line: how many, how, how long. Not `whole`: there may be more of them."""
    settings = context.scene.kiln
    recipe = recipes.RECIPES[settings.recipe]
    group = getattr(settings, recipe.NAME)
    changed = len(properties.changed(group, recipe))
    how = f"{recipe.TITLE}, {group.preset}" + (f" ({changed} changed)" if changed else "")
    expected = session.current.estimate(recipe.NAME, capture_motion.resolved(properties.values(group, recipe), context.scene))
    if not whole:
        return f"{count} or more assets: {how}. {panel.about_text(count * expected.seconds)} or more"
    return f"{count} asset{'s' if count != 1 else ''}: {how}. About {panel.about_text(count * expected.seconds)}"


def _tick() -> float:
    return known.tick() if session.current is not None else TICK


CLASSES = (
    KILN_OT_start_batch, KILN_OT_cancel_batch, KILN_OT_resume_batch, KILN_OT_open_report, KILN_OT_open_batch_folder, KILN_OT_import_batch,
    KILN_OT_remove_batch, KILN_UL_batches, KILN_UL_batch_items, KILN_PT_batch,
)  # fmt: skip


def register():
    global known
    known = Batches()
    for cls in CLASSES:
        bpy.utils.register_class(cls)
    properties.batch_chosen = known.fill_items
    if not bpy.app.background:
        bpy.app.timers.register(_tick, first_interval=TICK, persistent=True)


def unregister():
    if bpy.app.timers.is_registered(_tick):
        bpy.app.timers.unregister(_tick)
    known.close()
    properties.batch_chosen = lambda: None
    for cls in reversed(CLASSES):
        bpy.utils.unregister_class(cls)
