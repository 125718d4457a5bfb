"""Models: which trained weights the backend has, their size, memory and licence; fetching them with the user's consent, and removing them.

The backend does the work and outlives what happens here; while somebody looks, or something is fetched, it is asked how things stand.
`draw_model` shows single models wherever a choice of them is drawn; the panel Models lists all.
"""

from __future__ import annotations

import time
from pathlib import Path

import bpy
from bpy.props import BoolProperty, StringProperty
from bpy_extras.io_utils import ImportHelper

from . import session
from .protocol.errors import KilnError

TICK = 0.5  # seconds between two looks whether to ask
LOOK = 10.0  # seconds after which what is looked at is asked for again
HERE = ("installed", "bundled")
ACTIVE = ("waiting", "running", "cancelling")
ICONS = {"installed": "CHECKMARK", "bundled": "CHECKMARK", "partial": "PAUSE", "missing": "IMPORT", "damaged": "ERROR"}
WORDS = {
    "installed": "Installed",
    "bundled": "Comes with Kiln",
    "partial": "Partly downloaded",
    "missing": "Not installed",
    "damaged": "Damaged",
}
VERBS = {"partial": "Resume Download", "missing": "Download…", "damaged": "Repair"}
COMMERCIAL = {"yes": "Allowed", "no": "Not allowed"}
LETTERS = 62  # of a line in a dialog


class Models:
    """What the backend told last."""

    def __init__(self):
        self.entries: dict[str, dict] = {}
        self.free = 0  # bytes on the disk where they lie
        self.offline: KilnError | None = None  # why the backend may fetch nothing
        self.asked = self.seen = 0.0
        self.waits = False  # for an answer
        self.link = None  # which backend told it

    def find(self, id: str) -> dict | None:
        return self.entries.get(id) or next((one for one in self.entries.values() if id in one.get("also", ())), None)

    def chain(self, id: str) -> list[dict]:
        """An entry and what it needs, what is needed first."""
        one = self.find(id)
        if one is None:
            return []
        found = {each["id"]: each for needed in one["needs"] for each in self.chain(needed)}
        return [*found.values(), one]

    def absent(self, id: str) -> list[dict]:
        """What is to be fetched for an entry to work."""
        return [one for one in self.chain(id) if one["state"] not in HERE]

    def pull(self, id: str) -> dict | None:
        """The download that brings an entry, its own or that of something that it needs, if one is under way; else its own newest."""
        pulls = [one["pull"] for one in reversed(self.chain(id)) if one["pull"]]
        return next((pull for pull in pulls if pull["state"] in ACTIVE), (self.find(id) or {}).get("pull"))

    @property
    def active(self) -> bool:
        return any(one["pull"] and one["pull"]["state"] in ACTIVE for one in self.entries.values())

    def take(self, told: dict) -> None:
        """What `weights` answered."""
        before = self.entries, self.offline and self.offline.message
        self.entries = {one["id"]: one for one in told["entries"]}
        self.free = told["free"]
        self.offline = KilnError.from_wire(told["offline"]) if told["offline"] else None
        if before != (self.entries, self.offline and self.offline.message):
            session.redraw()

    def refresh(self) -> None:
        """Asks the backend; the answer comes later, in `blender -b` at once."""
        now = session.current
        self.waits, self.asked, self.link = True, time.monotonic(), now.link

        def then(told, error):
            self.waits = False
            if error is None:
                self.take(told)
            elif error.code not in ("unknown-message", "unavailable", "refused", "backend-stopped"):
                now.note(error)  # but for a backend that is gone, or of an older version, which has no models

        now.carry_out("weights", then)

    def due(self) -> bool:
        now, clock = session.current, time.monotonic()
        if self.link is not now.link:  # another backend
            self.entries, self.waits, self.asked = {}, False, 0.0
        if self.waits or now.backend["state"] != "running":
            return False
        return clock - self.asked >= (TICK if self.active else LOOK if self.seen > self.asked else float("inf"))  # drawn since

    def order(self, order: str, id: str, **values) -> None:
        """Has the backend change something, and shows what comes of it."""

        def then(told, error):
            if error is not None:
                session.current.note(error)
            else:
                self.entries[told["id"]] = {"plan": None, **self.entries.get(told["id"], {}), **told}
            self.asked = 0.0  # ask at the next look
            self.seen = time.monotonic()
            session.redraw()

        session.current.want_backend()
        session.current.carry_out(order, then, id=id, **values)


known = Models()


def _tick() -> float:
    if session.current is not None and known.due():
        known.refresh()
    return TICK


# Operators


def _refuse(operator: bpy.types.Operator, error: KilnError) -> set[str]:
    from . import operators

    return operators.refuse(operator, error)


class ModelOperator:
    """An operator on one model."""

    model: StringProperty(name="Model", description="The model's id, as `kiln weights` lists it", options={"SKIP_SAVE"})

    def chosen(self) -> dict:
        if bpy.app.background:
            session.current.want_backend()
            known.refresh()
        one = known.find(self.model)
        if one is None:
            hint = f"There are: {', '.join(known.entries)}." if known.entries else "Start the backend; it tells which there are."
            raise KilnError("no-model", f"The backend has no model {self.model!r}.", hint)
        return one

    def execute(self, context):
        try:
            self.act(context, self.chosen())
        except KilnError as error:
            return _refuse(self, error)
        return {"FINISHED"}


class ConsentOperator(ModelOperator):
    """Needs the user's consent to licences that were not agreed to before."""

    agree: BoolProperty(
        name="I Agree to the Licence",
        description="You have read size, memory, licence, commercial terms and territory, and agree to them",
        options={"SKIP_SAVE"},
    )

    def unread(self) -> list[dict]:
        return [one for one in known.absent(self.model) if not one["accepted"]]

    def consent(self) -> bool:
        unread = self.unread()
        if unread and not self.agree:
            names = ", ".join(f"{one['licence']['name']} of {one['title']}" for one in unread)
            raise KilnError("licence-needed", f"You have not agreed to the licence yet: {names}.", "Read it, then tick I Agree.")
        return self.agree

    def draw(self, context):
        draw_terms(self.layout, self.model)
        if self.unread():
            self.layout.prop(self, "agree", text="I Agree to the Licences" if len(self.unread()) > 1 else "I Agree to the Licence")


class KILN_OT_get_model(ConsentOperator, bpy.types.Operator):
    """Download this model to the backend, or go on with a download that broke off. Size, memory and licence are shown first"""

    bl_idname = "kiln.get_model"
    bl_label = "Download Model"

    def invoke(self, context, event):
        try:
            self.chosen()
            allowed()
        except KilnError as error:
            return _refuse(self, error)
        if not self.unread():
            return self.execute(context)
        return context.window_manager.invoke_props_dialog(self, width=460, confirm_text="Download")

    def act(self, context, one):
        allowed()
        known.order("pull_weights", one["id"], accept=self.consent(), online=bpy.app.online_access)


class KILN_OT_locate_model(ConsentOperator, ImportHelper, bpy.types.Operator):
    """Take this model's files from a folder, or from a bundle made by `kiln weights bundle`, instead of downloading them"""

    bl_idname = "kiln.locate_model"
    bl_label = "Locate Model"

    filename_ext = ""
    filter_glob: StringProperty(default="*.zip;*.safetensors;*.onnx", options={"HIDDEN"})

    def act(self, context, one):
        if session.current.backend["remote"]:
            command = f"`kiln weights pull {one['id']} --from FOLDER`"
            raise KilnError("bad-input", "The files must lie on the backend's machine, which is another one.", f"There, run {command}.")
        path = Path(bpy.path.abspath(self.filepath))
        if path.is_file() and path.suffix != ".zip":
            path = path.parent
        if not path.exists():
            raise KilnError("bad-input", f"There is no {path}.", "Choose a folder that holds the model's files, or a bundle.")
        known.order("pull_weights", one["id"], accept=self.consent(), online=bpy.app.online_access, source=str(path))


class KILN_OT_cancel_model(ModelOperator, bpy.types.Operator):
    """Stop this download; what came is kept, and Resume goes on"""

    bl_idname = "kiln.cancel_model"
    bl_label = "Cancel"

    def act(self, context, one):
        for each in known.chain(one["id"]):
            if each["pull"] and each["pull"]["state"] in ACTIVE:
                known.order("cancel_weights", each["id"])


class KILN_OT_remove_model(ModelOperator, bpy.types.Operator):
    """Delete this model's files from the backend's machine; it can be downloaded again"""

    bl_idname = "kiln.remove_model"
    bl_label = "Remove"

    def invoke(self, context, event):
        return context.window_manager.invoke_confirm(self, event)

    def act(self, context, one):
        known.order("remove_weights", one["id"])


def allowed() -> None:
    """Raises the sentence that says where to allow it, if Blender or the backend's machine lets nothing be fetched."""
    if not bpy.app.online_access:
        raise KilnError(
            "offline",
            "Blender does not allow online access, so no model is downloaded.",
            "Allow it in Preferences > System > Network > Allow Online Access, or take the files from a folder with Locate.",
        )
    if known.offline is not None:
        raise known.offline


# Drawing


def draw_terms(layout, id: str) -> None:
    """What a download brings, for a dialog: every entry that is not here yet."""
    from . import panel

    absent = known.absent(id)
    for one in absent:
        box = layout.box()
        row = box.row()
        row.label(text=one["title"], icon="IMPORT")
        row.operator("wm.url_open", text="Licence", icon="URL").url = one["licence"]["url"]
        if one["gated"]:
            row.operator("wm.url_open", text="Ask for Access", icon="URL").url = f"https://huggingface.co/{one['source']}"
        _lines(box, one["purpose"])
        column = box.column(align=True)
        for name, text in terms(one):
            if one is absent[-1] or name not in ("Memory", "Here"):  # what a model needs counts in its own memory
                row = column.split(factor=0.24)
                _lines(row, name)
                _lines(row, text, LETTERS * 3 // 4)
    total = sum(one["bytes"] - one["here"] for one in absent if one["bytes"])
    layout.label(
        text=f"In all {panel.size_text(total)} to come; {panel.size_text(known.free)} free on the backend's disk", icon="DISK_DRIVE"
    )


def terms(one: dict) -> list[tuple[str, str]]:
    """(name, text) of what a user must know of an entry."""
    from . import panel

    licence = one["licence"]
    memory = ", ".join(f"{need:g} GB ({way})" for way, need in one["memory"].items())
    found = [
        ("Size", panel.size_text(one["bytes"]) if one["bytes"] else "Told by the source"),
        ("Memory", memory),
        ("Licence", licence["name"]),
        ("Commercial", COMMERCIAL.get(licence["commercial"], _begun(licence["commercial"]))),
        ("Territory", _begun(licence["territory"])),
    ]
    if one.get("plan"):
        found.insert(2, ("Here", _begun(one["plan"]["sentence"])))
    if not one["pinned"]:
        found.append(("Check", "Against the hashes that its source tells at the first download"))
    if one["gated"]:
        found.append(("Login", "Its owner asks you to agree on the page; the backend needs a token, in HF_TOKEN or by `hf auth login`"))
    return found


def _begun(text: str) -> str:
    """With a capital, as on a line of its own."""
    return text[:1].upper() + text[1:]


def _lines(layout, text: str, letters: int = LETTERS) -> None:
    from . import panel

    column = layout.column(align=True)
    column.scale_y = 0.8
    for line in panel.wrapped(text, letters, len):
        column.label(text=line)


def draw_model(layout, context, model_ids: tuple[str, ...]) -> None:
    """Models with their state, and what can be done about it: for wherever one is chosen. Draws nothing before the backend has told."""
    known.seen = time.monotonic()
    for id in model_ids:
        if known.find(id) is not None:
            draw_state(layout, context, id)


def draw_state(layout, context, id: str) -> None:
    """Whether a model can be used, and else its download, from the first button to the last byte."""
    from . import panel

    one, absent, pull = known.find(id), known.absent(id), known.pull(id)
    plan = one.get("plan")
    column = layout.column(align=True)
    if pull and pull["state"] in ACTIVE:
        doing = {"waiting": "Waiting", "cancelling": "Cancelling"}.get(pull["state"], "Downloading")
        row = column.row(align=True)
        row.progress(factor=pull["fraction"], text=f"{doing} {pull['fraction']:.0%}")
        row.operator("kiln.cancel_model", text="", icon="X").model = one["id"]
        if pull["text"]:
            panel.draw_text(column, context, pull["text"])
    elif absent:
        size = sum(each["bytes"] for each in absent)
        licences = " and ".join(dict.fromkeys(each["licence"]["name"] for each in absent))
        worst = next((each for each in absent if each["state"] == "damaged"), absent[-1])
        sizes = f"{panel.size_text(size)}, " if size else ""
        panel.draw_text(column, context, f"{WORDS[worst['state']]}: {sizes}{licences}", ICONS[worst["state"]])
        if worst["problem"]:
            panel.draw_text(column, context, f"{worst['title']}: {worst['problem']}", "BLANK1")
        if pull and pull["state"] == "failed":
            panel.draw_error(layout.box(), context, KilnError.from_wire(pull["error"] or {}))
        row = layout.row(align=True)
        if worst["bundled"]:
            panel.draw_text(column, context, "It belongs to the backend: set that up again, or press Repair there.", "BLANK1")
        else:
            partial = any(each["state"] == "partial" for each in absent)
            verb = VERBS["partial" if partial else worst["state"]]
            row.operator("kiln.get_model", text=verb, icon="IMPORT").model = one["id"]
            row.operator("kiln.locate_model", text="", icon="FILE_FOLDER").model = one["id"]
    else:
        panel.draw_text(column, context, f"{WORDS[one['state']]}, {one['licence']['name']}", ICONS[one["state"]])
    if plan:
        panel.draw_text(column, context, _begun(plan["sentence"]), "MEMORY" if plan["fits"] else "ERROR")


class KILN_PT_models(bpy.types.Panel):
    bl_label = "Models"
    bl_space_type = "VIEW_3D"
    bl_region_type = "UI"
    bl_category = "Kiln"
    bl_order = 3
    bl_options = {"DEFAULT_CLOSED"}

    def draw(self, context):
        from . import panel

        layout = self.layout
        known.seen = time.monotonic()
        if not known.entries:
            panel.draw_text(layout, context, "The backend tells which models there are, once it runs.", "INFO")
            return
        if known.offline is not None:
            panel.draw_text(layout, context, f"{known.offline.message} {known.offline.hint}", "INFO")
        for one in known.entries.values():
            header, body = layout.panel(f"kiln_model_{one['id']}", default_closed=True)
            header.label(text=one["title"], icon=ICONS[one["state"]])
            right = header.row()
            right.alignment = "RIGHT"
            right.active = False
            if one["pull"] and one["pull"]["state"] in ACTIVE:
                right.label(text=f"{one['pull']['fraction']:.0%}")
            elif one["bytes"]:
                right.label(text=panel.size_text(one["bytes"]))
            if body:
                self.draw_details(body, context, one)

    @staticmethod
    def draw_details(body, context, one):
        from . import panel

        panel.draw_text(body, context, one["purpose"])
        for name, text in terms(one):
            if name != "Here":  # drawn with the state
                panel.draw_text(body, context, f"{name}: {text}")
        draw_state(body, context, one["id"])
        row = body.row(align=True)
        row.operator("wm.url_open", text="Licence", icon="URL").url = one["licence"]["url"]
        busy = bool(one["pull"] and one["pull"]["state"] in ACTIVE)
        if not one["bundled"] and one["state"] != "missing" and not busy:
            row.operator("kiln.remove_model", icon="TRASH").model = one["id"]


CLASSES = (KILN_OT_get_model, KILN_OT_locate_model, KILN_OT_cancel_model, KILN_OT_remove_model, KILN_PT_models)


def register():
    global known
    known = Models()
    for cls in CLASSES:
        bpy.utils.register_class(cls)
    if not bpy.app.background:
        bpy.app.timers.register(_tick, first_interval=TICK, persistent=True)


def unregister():
    if bpy.app.timers.is_registered(_tick):
        bpy.app.timers.unregister(_tick)
    for cls in reversed(CLASSES):
        bpy.utils.unregister_class(cls)
