"""The Kiln tab in the 3D viewport's sidebar. Draws what `session` knows; asks nobody, waits for nothing."""

import time

import blf
import bpy

from . import capture_motion, models, preferences, properties, rebake, session, splat_nodes, turntable
from .protocol import estimates, recipes
from .protocol.client import FINAL
from .protocol.errors import KilnError

LOOK = {  # backend state: icon, words
    "looking": ("SORTTIME", "Looking for the backend"),
    "missing": ("IMPORT", "Backend is not set up"),
    "stopped": ("PAUSE", "Backend is stopped"),
    "starting": ("SORTTIME", "Backend is starting"),
    "running": ("CHECKMARK", "Ready"),
    "unreachable": ("UNLINKED", "Backend does not answer"),
    "failed": ("ERROR", "Backend failed"),
}
STATES = {"queued": "Waiting", "cancelling": "Cancelling", "failed": "Failed", "cancelled": "Cancelled"}
AT_THE_SOURCE = ("generate.model", "generate.prompt", "generate.only")  # parameters that are drawn there
WORDS_TO_PICTURE = "flux2-klein-4b"  # model that makes a picture where there are only words
HELPERS = {  # model: what is lost without it
    "isnet-general-use": "Without a matting network, a subject on a plain background is cut out by the border's colour.",
    "vgg16-lpips": "Without VGG16, views are compared by their gradients: surfaces come out less sharp.",
}
SETTING_UP = {"create": "Setting up the backend", "repair": "Repairing the backend", "remove": "Removing the backend"}


# Text


def wrapped(text: str, width: float, measure) -> list[str]:
    """`text` broken into lines no wider than `width` in the units of `measure(line)`; words wider than a line are broken too."""
    lines = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if measure(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            while measure(word) > width and len(word) > 1:
                fits = next((n for n in range(len(word) - 1, 1, -1) if measure(word[:n]) <= width), 1)
                lines.append(word[:fits])
                word = word[fits:]
            line = word
        lines.append(line)
    return lines


def draw_text(layout, context, text: str, icon: str = "NONE", indent: float = 0.0) -> None:
    """A sentence over as many lines as the region's width needs."""
    scale = context.preferences.system.ui_scale
    blf.size(0, context.preferences.ui_styles[0].widget.points * scale)
    margin = (52 + indent + (46 if icon != "NONE" else 0)) * scale  # panel edges, box edges, scroll bar, icon
    width = max(context.region.width - margin, 80 * scale)
    column = layout.column(align=True)
    for number, line in enumerate(wrapped(text, width, lambda words: blf.dimensions(0, words)[0])):
        row = column.row()
        row.scale_y = 0.75
        row.label(text=line, icon=icon if number == 0 else "BLANK1" if icon != "NONE" else "NONE")


def draw_error(box, context, error: KilnError, details: str = "", dismiss: int | None = None, job: str = "") -> None:
    """An error in full, with what to do; copyable, and gone when dismissed."""
    row = box.row()
    column = row.column()
    draw_text(column, context, error.message, "ERROR", indent=24 if dismiss is not None else 0)
    if dismiss is not None:
        row.operator("kiln.dismiss", text="", icon="X", emboss=False).index = dismiss
    if error.hint:
        draw_text(box, context, error.hint, "INFO")
    copy = box.operator("kiln.copy_details", icon="COPYDOWN")
    copy.text = f"{error.message}\n{error.hint}\n[{error.code}]\n{details}".strip()
    copy.job = job


def size_text(size: int) -> str:
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= step:
            return f"{size / step:.{1 if size < 100 * step else 0}f} {unit}"
    return f"{size} B"


def time_text(seconds: float) -> str:
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    return f"{seconds // 60} min {seconds % 60:02d} s" if seconds < 3600 else f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def about_text(seconds: float) -> str:
    """A time that is only about right: no more digits than it deserves."""
    step = next(step for limit, step in ((20, 1), (100, 5), (600, 10), (3600, 60), (float("inf"), 300)) if seconds < limit)
    seconds = max(step, round(seconds / step) * step)
    if seconds < 100:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes % 60 else f"{minutes // 60} h"


def estimate_text(expected: estimates.Estimate) -> str:
    backend = session.current.backend
    where = f" on {(backend['hello'] or {}).get('host', 'the other computer')}" if backend["remote"] else ""
    return f"About {about_text(expected.seconds)}, {size_text(expected.bytes)} of memory{where}"


def takes(recipe: type, values: dict) -> str:
    """For the tooltips of presets."""
    if not session.current:
        return ""
    return estimate_text(session.current.estimate(recipe.NAME, capture_motion.resolved(values, bpy.context.scene)))


def memory_warning(expected: estimates.Estimate) -> str:
    """A sentence where a job wants more main memory than the backend's machine has free; "" elsewhere."""
    free = session.current.device.get("free_memory") or 0
    if not free or session.current.gpu or expected.bytes <= free:
        return ""
    needs = f"This needs {size_text(expected.bytes)} of memory, and {size_text(free)} are free."
    return f"{needs} Close other programs, or choose a lower preset."


def day_text(moment: float) -> str:
    """The time of today, the day of other days."""
    then, today = time.localtime(moment), time.localtime()
    return time.strftime("%H:%M" if then[:3] == today[:3] else "%d %b", then)


# Parts


def draw_advice(layout, context, things) -> bool:
    """Why splats that are shown would not look as they are, if so; whether there was something to say."""
    shown = any(splat_nodes.is_splats(thing) and not (thing.hide_viewport and thing.hide_render) for thing in things)
    advice = splat_nodes.advice(context.scene) if shown else ""
    if advice:
        draw_text(layout, context, advice, "INFO")
    return bool(advice)


def draw_bounces(layout, scene) -> None:
    """Cycles' settings that the advice is about, for the user to change."""
    column = layout.column(align=True)
    column.prop(scene.cycles, "transparent_max_bounces", text="Most Bounces")
    column.prop(scene.cycles, "min_transparent_bounces", text="Least Bounces")


def backend_words(backend: dict) -> str:
    if backend["state"] == "running":
        hello = backend["hello"] or {}
        place = f" on {hello.get('host', 'another computer')}" if backend["remote"] else ""
        device = device_words(hello)
        return f"Ready{place}" + (f": {device}" if device else "")
    return LOOK[backend["state"]][1]


def device_words(hello: dict) -> str:
    device = hello.get("device") or {}
    return "" if device.get("kind", "unknown") == "unknown" else device.get("name") or device["kind"]


def draw_backend(layout, context) -> None:
    """What the backend is and what can be done about it; used by the panel and by the preferences."""
    now = session.current
    backend, setting_up = now.backend, now.setting_up
    if setting_up:
        draw_text(layout, context, SETTING_UP[setting_up.action], "IMPORT")
        layout.progress(factor=setting_up.fraction, text=f"{setting_up.fraction:.0%}")
        draw_text(layout, context, setting_up.text)
        row = layout.row(align=True)
        row.operator("kiln.cancel_set_up", icon="X")
        row.operator("kiln.open_log", icon="TEXT")
        return
    state = backend["state"]
    if state == "missing":
        draw_text(layout, context, "Kiln computes in a program of its own beside Blender. It has to be set up once.")
        if not bpy.app.online_access:
            draw_text(layout, context, "Blender is not allowed to go online.", "INTERNET_OFFLINE")
            if not bpy.app.online_access_override:
                layout.prop(context.preferences.system, "use_online_access")
        column = layout.column()
        column.scale_y = 1.5
        column.enabled = bpy.app.online_access
        column.operator("kiln.set_up_backend", icon="IMPORT")
        layout.operator("kiln.set_up_from_bundle", icon="FILE_FOLDER")
        if now.notices:  # a set-up that failed, most of all
            layout.operator("kiln.open_log", icon="TEXT")
        layout.operator("kiln.connect", text="Use Another Computer's…", icon="LINKED")
        return
    if backend["error"] and state in ("unreachable", "failed"):
        draw_error(layout, context, KilnError.from_wire(backend["error"]), backend["text"])
    elif backend["text"]:
        draw_text(layout, context, backend["text"])
    hello = backend["hello"] or {}
    if hello:
        for label, words in (("Device", device_words(hello)), ("Kiln", hello.get("version", "")), ("Computer", hello.get("host", ""))):
            split = layout.split(factor=0.32)
            split.label(text=label)
            split.label(text=words or "Not known yet")
    without = (hello.get("device") or {}).get("problem")
    if without:
        draw_text(layout, context, f"No GPU is used: {without}", "INFO")
    if backend["remote"]:
        split = layout.split(factor=0.32)
        split.label(text="File")
        split.label(text=preferences.get().connection_file)
        layout.operator("kiln.use_local", icon="UNLINKED")
        return
    if now.environment == "outdated":
        draw_text(layout, context, "The backend is of another version of Kiln. Jobs and results stay when it is updated.", "INFO")
        layout.operator("kiln.set_up_backend", text="Update Backend", icon="FILE_REFRESH")
    if now.disk is not None:
        split = layout.split(factor=0.32)
        split.label(text="On Disk")
        split.label(text=size_text(now.disk))
    row = layout.row(align=True)
    if state in ("stopped", "failed", "looking"):
        row.operator("kiln.start_backend", icon="PLAY")
    else:
        row.operator("kiln.stop_backend", icon="PAUSE")
    row.operator("kiln.open_log", icon="TEXT")
    row = layout.row(align=True)
    row.operator("kiln.repair_backend", icon="TOOL_SETTINGS")
    row.operator("kiln.remove_backend", icon="TRASH")
    layout.operator("kiln.set_up_from_bundle", text="Repair from Offline Bundle…", icon="FILE_FOLDER")
    layout.operator("kiln.connect", text="Use Another Computer's…", icon="LINKED")


def draw_parameters(layout, group, recipe: type, advanced: bool, without: tuple[str, ...] = ()) -> None:
    """The recipe's controls, each group under its name; but those whose names begin with one of `without`."""
    heading, column = None, None
    for parameter in recipes.parameters(recipe):
        if parameter.advanced != advanced or parameter.name.startswith(without or " "):
            continue
        name = parameter.group if "." in parameter.name else ""
        if column is None or name != heading:
            heading, column = name, layout.column(align=True)
            if name:
                column.label(text=name.capitalize())
        row = column.row(align=True)
        row.active = parameter.name not in ("capture.frame_start", "capture.frame_end") or not group.capture_scene_frames
        row.prop(group, properties.identifier(parameter.name))


def draw_game(layout, group, recipe: type) -> None:
    """What a game engine wants of the asset, in a box of its own: it says what is made beside mesh.glb, not how well."""
    found = [parameter for parameter in recipes.parameters(recipe) if parameter.group == "game"]
    if not found:
        return
    engine = group.bl_rna.properties["game_engine"].enum_items[group.game_engine]
    header, body = layout.panel("kiln_game", default_closed=True)
    header.label(text=f"Game Engine: {engine.name}")
    if not body:
        return
    body.prop(group, "game_engine")
    draw_text(body, bpy.context, engine.description, "INFO")
    column = body.column(align=True)
    column.active = group.game_engine != "none"
    for parameter in found[1:]:
        column.prop(group, properties.identifier(parameter.name))


def draw_picture(box, context, settings, group) -> None:
    """What a recipe that takes a picture starts from, and the model that makes views of it."""
    source = settings.picture_source
    box.row().prop(settings, "picture_source", expand=True)
    if source == "FILE":
        box.prop(settings, "picture_file", text="")
    elif source == "IMAGE":
        box.template_ID(settings, "picture_image", open="image.open")
    elif source == "VIEWS":
        box.prop(settings, "picture_views", text="")
        return
    icon = session.current.source_icon
    if icon and source != "PROMPT":
        box.template_icon(icon_value=icon, scale=6.0)
    box.prop(group, "generate_prompt", text="", placeholder="What it is, in words" if source == "PROMPT" else "What it shows, if you like")
    column = box.column(align=True)
    column.prop(group, "generate_model", text="")
    choices = group.bl_rna.properties["generate_model"].enum_items
    draw_text(column, context, choices[group.generate_model].description, "INFO")
    for id in wanted_models(settings, group):
        if id == WORDS_TO_PICTURE:
            column = box.column(align=True)
            draw_text(column, context, "A picture is made from the words first, by FLUX.2 klein.", "INFO")
        models.draw_model(column, context, (id,))
    draw_helpers(box, context, group)
    box.prop(group, "generate_only", text="Look at the Views First")


def wanted_models(settings, group) -> tuple[str, ...]:
    """What the job cannot do without."""
    words_alone = settings.picture_source == "PROMPT" or settings.picture_source == "FILE" and not settings.picture_file
    return (group.generate_model, *((WORDS_TO_PICTURE,) if words_alone else ()))


def missing_models(settings, recipe) -> list[str]:
    """Titles of models that a job of these settings needs and the backend, as far as it has told, has not got."""
    if recipe.INPUT != "picture" or settings.picture_source == "VIEWS":
        return []
    wanted = wanted_models(settings, getattr(settings, recipe.NAME))
    return list(dict.fromkeys(one["title"] for id in wanted for one in models.known.absent(id)))


def draw_helpers(box, context, group) -> None:
    """Models that make results better, and what stands in for those that are not there."""
    lacking = {id: words for id, words in HELPERS.items() if models.known.absent(id)}
    if group.generate_matte == "border":
        lacking.pop("isnet-general-use", None)
    if not lacking:
        return
    header, body = box.panel("kiln_helpers", default_closed=True)
    header.label(text=f"Better With ({len(lacking)})")
    for id, words in lacking.items() if body else ():
        draw_text(body, context, words, "INFO")
        models.draw_model(body, context, (id,))


def draw_views(box, context, job) -> None:
    """The turntable of a finished job, each view with what can be done about it."""
    table, data = job.turntable, job.data
    if table is None or not table.pictures:
        return
    asked = "mesh.glb" not in data["results"]  # the job stopped here, for the views to be looked at
    body = box
    if not asked:
        header, body = box.panel("kiln_views", default_closed=True)
        header.label(text=f"Views ({len(table.pictures)})")
    if not body:
        return
    own = not turntable.is_generated(data)
    width = context.region.width / context.preferences.system.ui_scale
    grid = body.grid_flow(row_major=True, columns=max(2, min(8, int(width / 62))), even_columns=True, even_rows=True, align=True)
    for number in table.pictures:
        cell = grid.column(align=True)
        picture = session.current.pictures.get(f"{data['id']}/view_{number}")
        cell.template_icon(icon_value=picture.icon_id if picture else 0, scale=3.0)
        if own:
            continue
        row = cell.row(align=True)
        if number == turntable.FRONT:
            row.alignment = "CENTER"
            row.label(text="Picture")
            continue
        again = row.operator("kiln.reroll_view", text=f"{number}", icon="FILE_REFRESH", depress=number in table.again)
        replaced = number in table.replaced
        instead = row.operator("kiln.replace_view", text="", icon="X" if replaced else "FILE_IMAGE", depress=replaced)
        again.job = instead.job = data["id"]
        again.view = instead.view = number
    if own:
        return
    if table.edited:
        draw_text(body, context, table.sentence())
    row = body.row(align=True)
    row.scale_y = 1.4
    look = row.row(align=True)
    look.enabled = table.edited
    again = look.operator("kiln.go_on", text="Change and Look", icon="HIDE_OFF")
    again.job, again.only = data["id"], True
    on = row.row(align=True)
    on.enabled = asked or table.edited
    on.operator("kiln.go_on", text="Go On" if asked else "Make Again", icon="PLAY").job = data["id"]


class KilnPanel:
    bl_space_type = "VIEW_3D"
    bl_region_type = "UI"
    bl_category = "Kiln"


class KILN_PT_backend(KilnPanel, bpy.types.Panel):
    bl_label = "Backend"
    bl_order = 0
    bl_options = {"HIDE_HEADER"}

    def draw(self, context):
        now, layout = session.current, self.layout
        now.tab_seen = True
        said = (now.backend["error"] or {}).get("code")  # stands in the backend's own box below
        for index, notice in enumerate(now.notices):
            if notice.error.code != said:
                draw_error(layout.box(), context, notice.error, notice.details, dismiss=index)
        state = now.backend["state"]
        if now.setting_up or state in ("missing", "unreachable", "failed"):
            box = layout.box()
            if not now.setting_up:
                box.label(text=LOOK[state][1], icon=LOOK[state][0])
            draw_backend(box, context)
            return
        header, body = layout.panel("kiln_backend", default_closed=True)
        header.label(text=backend_words(now.backend), icon=LOOK[state][0])
        if state == "stopped":
            header.operator("kiln.start_backend", text="Start", icon="PLAY")
        if body:
            draw_backend(body, context)


class KILN_PT_generate(KilnPanel, bpy.types.Panel):
    bl_label = "Generate"
    bl_order = 1

    def draw(self, context):
        now, layout = session.current, self.layout
        settings = context.scene.kiln
        recipe = recipes.RECIPES[settings.recipe]
        group = getattr(settings, settings.recipe)

        if len(recipes.RECIPES) > 1:
            layout.prop(settings, "recipe", text="")
        box = layout.box()
        subject = self.draw_source(box, context, settings, recipe)

        column = layout.column()
        column.use_property_split = True
        column.use_property_decorate = False
        row = column.row(align=True)
        row.prop(group, "preset", expand=False)
        changed = properties.changed(group, recipe)
        if changed:
            row.operator("kiln.reset_parameters", text="", icon="LOOP_BACK")
        values = capture_motion.resolved(properties.values(group, recipe), context.scene)
        own_views = recipe.INPUT == "picture" and settings.picture_source == "VIEWS"  # for these nothing is generated
        if own_views:
            values.update({"generate.steps": 0, "iterate.rounds": 0})
        expected = now.estimate(settings.recipe, values, getattr(subject, "count", None))
        draw_text(column, context, estimate_text(expected), "TIME")
        missing = missing_models(settings, recipe)
        if memory_warning(expected) and not missing:  # of a model, its own line above tells
            draw_text(column, context, memory_warning(expected), "ERROR")
        header, body = column.panel("kiln_parameters", default_closed=True)
        header.label(text=f"Parameters ({len(changed)} changed)" if changed else "Parameters")
        if body:
            without: tuple[str, ...] = ()
            if recipe.INPUT == "splats" and settings.splats_source == "OBJECT":
                without = ("subject.up",)
            elif own_views:
                without = ("generate.", "iterate.")
            elif recipe.INPUT == "picture":
                without = AT_THE_SOURCE
            without += ("game.",)
            draw_parameters(body, group, recipe, advanced=False, without=without)
            header, body = body.panel("kiln_advanced", default_closed=True)
            header.label(text="Advanced")
            if body:
                draw_parameters(body, group, recipe, advanced=True, without=without)
        draw_game(column, group, recipe)
        if recipe.INPUT != "motion":
            row = column.row(align=True, heading="Quads")
            row.prop(settings, "quads", text="")
            part = row.row(align=True)
            part.active = settings.quads
            part.prop(settings, "quad_faces", text="")

        if now.capture:
            done, total, title = now.capture
            layout.progress(factor=done / total, text=f"Preparing {done / total:.0%}")
            draw_text(layout, context, f"Preparing {title}. Esc stops it.")
        else:
            if missing:
                are = "is" if len(missing) == 1 else "are"
                draw_text(layout, context, f"{' and '.join(missing)} {are} not installed: see above, or choose another model.", "ERROR")
            column = layout.column()
            column.scale_y = 1.8
            column.enabled = subject is not None and not missing
            column.operator("kiln.generate", text="Generate", icon="SHADERFX")

    @staticmethod
    def draw_source(box, context, settings, recipe):
        """What the recipe starts from, and the subject that this makes; None with a sentence why there is none."""
        if recipe.INPUT == "splats":
            box.row().prop(settings, "splats_source", expand=True)
            if settings.splats_source == "FILE":
                box.prop(settings, "splats_file", text="")
        elif recipe.INPUT == "picture":
            draw_picture(box, context, settings, getattr(settings, recipe.NAME))
        else:
            box.row().prop(settings, "source", expand=True)
            if settings.source == "COLLECTION":
                box.prop(settings, "collection", text="")
        subject = None
        try:
            subject = session.chosen_subject(context)
        except KilnError as error:
            draw_text(box, context, error.message, "INFO")
            draw_text(box, context, error.hint, "BLANK1")
        if subject is not None and subject.kind == "splats":
            box.label(text=f"{subject.title}: {subject.count:,} splats", icon="POINTCLOUD_DATA")
        elif subject is not None and subject.kind in ("object", "objects"):
            box.label(text=subject.title, icon="OBJECT_DATA" if subject.kind == "object" else "GROUP")
        if recipe.INPUT == "motion":
            values = capture_motion.resolved(properties.values(getattr(settings, recipe.NAME), recipe), context.scene)
            try:
                draw_text(box, context, capture_motion.sentence(recipes.make(recipe.NAME, values).capture), "RENDER_ANIMATION")
            except KilnError as error:
                draw_text(box, context, error.message, "ERROR")
                draw_text(box, context, error.hint, "BLANK1")
                subject = None
        if recipe.INPUT == "splats":
            box.operator("kiln.import_splats", text="Import Splats…", icon="IMPORT")
        active = context.view_layer.objects.active
        if active is not None and splat_nodes.is_splats(active):
            for note in active.get("kiln_notes", "").splitlines():
                draw_text(box, context, note, "INFO")
            if draw_advice(box, context, [active]):
                draw_bounces(box, context.scene)
        return subject


class KILN_UL_jobs(bpy.types.UIList):
    def draw_item(self, context, layout, data, item, icon, active_data, active_property):
        job = session.current.jobs.get(item.name)
        if job is None:
            return
        row = layout.row()
        row.label(text=job.data["title"] or job.data["recipe"], icon=session.ICONS[job.state])
        right = row.row()
        right.alignment = "RIGHT"
        right.active = False
        if job.state == "running":
            right.label(text=f"{job.data['fraction'] or 0:.0%}")
        else:
            right.label(text=STATES.get(job.state) or day_text(job.data["finished"] or job.data["created"]))

    def filter_items(self, context, data, property):
        """Search by title: rows are named by id."""
        jobs, wanted = session.current.jobs, self.filter_name.lower()
        shown = [
            self.bitflag_filter_item if not wanted or wanted in (jobs[row.name].data["title"] if row.name in jobs else "").lower() else 0
            for row in getattr(data, property)
        ]
        return shown, []


class KILN_PT_jobs(KilnPanel, bpy.types.Panel):
    bl_label = "Jobs"
    bl_order = 2

    def draw(self, context):
        now, layout, window = session.current, self.layout, context.window_manager.kiln
        if not window.jobs:
            draw_text(layout, context, "Nothing yet. What you generate is listed here.")
            return
        layout.template_list("KILN_UL_jobs", "", window, "jobs", window, "active_job", rows=3, maxrows=6)
        job = now.jobs.get(window.jobs[min(window.active_job, len(window.jobs) - 1)].name)
        if job:
            self.draw_job(layout, context, job)

    def draw_job(self, layout, context, job):
        data, state = job.data, job.state
        imported = session.imports_of(job)
        box = layout.box()
        icon = session.current.icon(job)
        stopped = state == "done" and "mesh.glb" not in data["results"]  # after its views, which are shown one by one
        if icon and state != "failed" and not (stopped and job.turntable and job.turntable.pictures):
            box.template_icon(icon_value=icon, scale=max(4.0, min(10.0, context.region.width / context.preferences.system.ui_scale / 26)))
        if job.transfer is not None:
            box.progress(factor=job.transfer, text=f"{'Receiving' if state == 'done' else 'Sending'} {job.transfer:.0%}")
        elif state not in FINAL and session.current.backend["state"] != "running":
            draw_text(box, context, "Goes on when the backend runs again", "PAUSE")
        elif state in ("running", "cancelling"):
            doing = "Cancelling" if state == "cancelling" else data["stage"] or "Starting"
            box.progress(factor=data["fraction"] or 0.0, text=f"{doing} {data['fraction'] or 0:.0%}")
            if data["text"]:
                draw_text(box, context, data["text"][:1].upper() + data["text"][1:])
            if data["started"]:
                box.label(text=time_text(time.time() - data["started"]), icon="TIME")
        elif state == "queued":
            draw_text(box, context, "Waiting for its turn", "TIME")
        elif stopped:
            draw_text(box, context, "The views are ready. Change some, or go on.", "CHECKMARK")
        elif state == "done":
            took = time_text(data["finished"] - data["started"]) if data["finished"] and data["started"] else ""
            draw_text(box, context, f"Done in {took}" + (", in this file" if imported else ""), "CHECKMARK")
            waits = session.why_import_waits(job) if job.wants_import and job.results else ""
            if waits:
                draw_text(box, context, waits, "PAUSE")
            if any(len(collection.objects) > 1 for collection in imported):
                row = box.row(align=True)
                row.label(text="Show")
                for what in ("mesh", "splats", "both"):
                    show = row.operator("kiln.show", text=what.capitalize())
                    show.job, show.what = data["id"], what
                shown = [thing for collection in imported for thing in collection.objects if splat_nodes.is_splats(thing)]
                if context.view_layer.objects.active not in shown and draw_advice(box, context, shown):  # else it stands above
                    draw_bounces(box, context.scene)
            mesh = next((thing for collection in imported for thing in collection.objects if rebake.is_result(thing)), None)
            if mesh:
                row = box.row(align=True)
                row.operator("kiln.retexture", text="Retexture…", icon="UV").result = mesh.name
                if "kiln_motion" not in mesh:
                    quads = row.operator("kiln.remesh_quads", text="Quads", icon="MOD_REMESH")
                    quads.result, quads.faces = mesh.name, context.scene.kiln.quad_faces
        elif state == "failed":
            draw_error(box, context, KilnError.from_wire(data["error"] or {}), job=data["id"])
        else:
            draw_text(box, context, "Cancelled", "X")
        if state == "done":
            draw_views(box, context, job)
        self.draw_log(box, context, job.log)
        if state == "done" and data["recipe"] == "animate":
            self.draw_motion(box, context.scene.kiln)
        row = box.row(align=True)
        if state in ("queued", "running", "cancelling"):
            row.enabled = state != "cancelling"
            row.operator("kiln.cancel_job", icon="X").job = data["id"]
            return
        if state == "done" and not stopped:
            row.operator("kiln.import_job", text="Import Again" if imported else "Import", icon="IMPORT").job = data["id"]
        elif not stopped:
            row.operator("kiln.retry_job", icon="FILE_REFRESH").job = data["id"]
        row.operator("kiln.remove_job", icon="TRASH").job = data["id"]

    @staticmethod
    def draw_motion(box, settings):
        """How the motion comes in: chosen anew for every import, nothing is computed again."""
        column = box.column(align=True)
        column.prop(settings, "motion", text="")
        row = column.row(align=True)
        row.prop(settings, "motion_loop", toggle=True)
        row.prop(settings, "motion_own_start", text="", icon="TIME")
        part = row.row(align=True)
        part.active = settings.motion_own_start
        part.prop(settings, "motion_start", text="Start")

    @staticmethod
    def draw_log(box, context, lines: list[str]):
        """What the backend said about a job, such as why it used no GPU: a little at once, more on demand."""
        body = box
        if len(lines) > 2:
            header, body = box.panel("kiln_log", default_closed=True)
            header.label(text=f"Log ({len(lines)})")
        for line in lines if body else ():
            draw_text(body, context, line, "INFO")


CLASSES = (KILN_UL_jobs, KILN_PT_backend, KILN_PT_generate, KILN_PT_jobs)


def register():
    for cls in CLASSES:
        bpy.utils.register_class(cls)
    properties.takes = takes


def unregister():
    properties.takes = lambda recipe, values: ""
    for cls in reversed(CLASSES):
        bpy.utils.unregister_class(cls)
