"""Everything that a button, a script or a key can ask of Kiln: `bpy.ops.kiln.*`. In `blender -b` kiln.generate and kiln.import_job block,
with progress on the terminal; with a window they return at once and the timer goes on."""

import dataclasses
from pathlib import Path

import bpy
from bpy.props import BoolProperty, CollectionProperty, EnumProperty, FloatProperty, IntProperty, StringProperty
from bpy_extras.io_utils import ImportHelper

from . import capture_motion, import_asset, preferences, properties, rebake, session, turntable
from .protocol import connection, picture, recipes
from .protocol.errors import KilnError

# While views are rendered the scene stays as it is, so only looking around is passed on.
LOOKING_AROUND = {
    "MIDDLEMOUSE", "WHEELUPMOUSE", "WHEELDOWNMOUSE", "WHEELINMOUSE", "WHEELOUTMOUSE", "TRACKPADPAN", "TRACKPADZOOM", "MOUSEROTATE",
    "MOUSESMARTZOOM", "NDOF_MOTION", "WINDOW_DEACTIVATE", "INBETWEEN_MOUSEMOVE", "MOUSEMOVE",
}  # fmt: skip


def refuse(operator: bpy.types.Operator, error: KilnError) -> set[str]:
    """Shows an error in the panel and as the operator's report, which a script gets as an exception."""
    session.current.note(error)
    operator.report({"ERROR"}, str(error))
    return {"CANCELLED"}


def every_parameter() -> dict[str, recipes.Parameter]:
    """The parameters of all recipes by their Blender name; of recipes that share one, the first defines it."""
    found: dict[str, recipes.Parameter] = {}
    for recipe in recipes.RECIPES.values():
        for parameter in recipes.parameters(recipe):
            found.setdefault(properties.identifier(parameter.name), parameter)
    return found


class KILN_OT_generate(bpy.types.Operator):
    """Make an asset of the source: render it from all sides, or send its splats or its picture"""

    bl_idname = "kiln.generate"
    bl_label = "Generate"
    bl_options = {"REGISTER"}

    # A parameter that is not given comes from `preset` where that is given, else from the scene's settings, as in the panel.
    __annotations__ = {
        "recipe": EnumProperty(
            name="Recipe",
            items=[(name, recipe.TITLE, recipe.__doc__.strip().rstrip(".")) for name, recipe in recipes.RECIPES.items()],
            options={"SKIP_SAVE"},
        ),
        "preset": EnumProperty(
            name="Preset",
            items=list({item[0]: item for recipe in recipes.RECIPES.values() for item in properties.preset_items(recipe)}.values()),
            default="standard",
            options={"SKIP_SAVE"},
        ),
        "collection": StringProperty(name="Collection", description="Capture this collection, not the selection", options={"SKIP_SAVE"}),
        "file": StringProperty(
            name="File", description="Take these splats, not the active object; or this picture", subtype="FILE_PATH", options={"SKIP_SAVE"}
        ),
        "image": StringProperty(name="Image", description="Take this image of the .blend file", options={"SKIP_SAVE"}),
        "views": StringProperty(
            name="Views", description="Take this folder of pictures, once round the subject", subtype="DIR_PATH", options={"SKIP_SAVE"}
        ),
        **{name: properties.blender_property(parameter, options={"SKIP_SAVE"}) for name, parameter in every_parameter().items()},
    }

    @classmethod
    def poll(cls, context):
        if session.current is None or session.current.capture:
            cls.poll_message_set("Kiln is preparing a job")
            return False
        return True

    def values(self, context) -> tuple[str, dict]:
        """The recipe and its parameters: what was passed, over the preset or the scene's settings."""
        settings = context.scene.kiln
        name = self.recipe if self.properties.is_property_set("recipe") else settings.recipe
        recipe = recipes.recipe_named(name)
        if self.properties.is_property_set("preset"):
            values = recipes.values(recipes.make(name, preset=self.preset))
        else:
            values = properties.values(getattr(settings, name), recipe)
        given = {
            parameter.name: properties.value_of(self.properties, parameter)
            for parameter in recipes.parameters(recipe)
            if self.properties.is_property_set(properties.identifier(parameter.name))
        }
        return name, recipes.values(recipes.make(name, {**values, **capture_motion.with_own_range(given)}))

    def begin(self, context) -> None:
        """Everything that can refuse before the first view is rendered."""
        name, values = self.values(context)
        chosen = ("collection", "file", "image", "views")
        given = {which: getattr(self, which) for which in chosen if self.properties.is_property_set(which)}
        subject = session.chosen_subject(context, name, **given, prompt=values.get("generate.prompt", ""))
        self.shoot = session.Shoot(subject, recipes.make(name, values))

    def invoke(self, context, event):
        if bpy.app.background:
            return self.execute(context)
        try:
            self.begin(context)
        except KilnError as error:
            return refuse(self, error)
        self.timer = context.window_manager.event_timer_add(0.01, window=context.window)
        context.window_manager.modal_handler_add(self)
        context.workspace.status_text_set(f"Kiln: {self.shoot.doing} {self.shoot.title} · Esc: stop")
        session.redraw()
        return {"RUNNING_MODAL"}

    def modal(self, context, event):
        if event.type == "ESC":
            self.cancel(context)
            return {"CANCELLED"}
        if event.type != "TIMER":
            return {"PASS_THROUGH"} if event.type in LOOKING_AROUND else {"RUNNING_MODAL"}
        try:
            if self.shoot.step():
                session.redraw()
                return {"RUNNING_MODAL"}
            self.submitted(context, self.shoot.submit())
        except KilnError as error:
            self.cancel(context)
            return refuse(self, error)
        except BaseException:
            self.cancel(context)
            raise
        self.leave(context)
        return {"FINISHED"}

    def submitted(self, context, job: session.Job) -> session.Job:
        settings = context.scene.kiln
        job.quads = settings.quad_faces if settings.quads and self.shoot.recipe.INPUT != "motion" else 0  # quads stand still
        return job

    def cancel(self, context):
        """Esc, an error, or Blender closing: the scene is as it was."""
        self.shoot.close()
        self.leave(context)

    def leave(self, context) -> None:
        context.window_manager.event_timer_remove(self.timer)
        context.workspace.status_text_set(None)
        session.redraw()

    def execute(self, context):
        """From a script: renders at once. In `blender -b` also waits for the result and imports it."""
        try:
            self.begin(context)
            job = self.submitted(context, self.shoot.all_at_once())
            if bpy.app.background and job.data["parameters"].get("generate.only"):
                session.current.wait_for_results(job)  # the views, which lie in job.results; nothing to import
            elif bpy.app.background:
                session.current.wait_for_results(job)
                made = session.current.import_results(context, job)
                if job.quads:
                    with session.quiet():
                        rebake.remesh_quads(context, made.mesh_object, job.quads)
        except KilnError as error:
            return refuse(self, error)
        return {"FINISHED"}


class JobOperator:
    """An operator on one job of the list; without `job`, on the one that is chosen there."""

    job: StringProperty(name="Job", description="The job's id", options={"SKIP_SAVE"})

    def chosen(self, context) -> session.Job:
        now = session.current
        now.need_jobs()
        window = context.window_manager.kiln
        name = self.job or (window.jobs[window.active_job].name if window.active_job < len(window.jobs) else "")
        if name not in now.jobs:
            raise KilnError("no-job", f"There is no job {name!r}." if name else "There is no job.", "")
        return now.jobs[name]

    def execute(self, context):
        try:
            self.act(context, self.chosen(context))
        except KilnError as error:
            return refuse(self, error)
        return {"FINISHED"}


class KILN_OT_cancel_job(JobOperator, bpy.types.Operator):
    """Stop this job; what it had finished is kept for a retry"""

    bl_idname = "kiln.cancel_job"
    bl_label = "Cancel"

    def act(self, context, job):
        session.current.order(job, "cancel")


class KILN_OT_retry_job(JobOperator, bpy.types.Operator):
    """Run this job again; stages that were finished are not repeated"""

    bl_idname = "kiln.retry_job"
    bl_label = "Retry"

    def act(self, context, job):
        session.current.order(job, "retry")


class KILN_OT_import_job(JobOperator, bpy.types.Operator):
    """Bring the result into the scene, where its source stands"""

    bl_idname = "kiln.import_job"
    bl_label = "Import"
    bl_options = {"REGISTER"}

    # Of results that move; what is not given comes from the scene's settings, as in the panel.
    __annotations__ = {name: made(options={"SKIP_SAVE"}) for name, made in properties.MOTION.items()}

    def act(self, context, job):
        if job.state != "done":
            raise KilnError("not-done", f"{job.data['title']} is not done.", "Import it when it is.")
        if "mesh.glb" not in job.data["results"]:
            raise KilnError("no-mesh", f"{job.data['title']} stopped after its views, as was asked.", "Press Go On for the asset.")
        named = {"motion": "way", "loop": "loop", "start": "start"}
        given = {named[name]: getattr(self, name) for name in named if self.properties.is_property_set(name)}
        job.motion = dataclasses.replace(properties.motion(context.scene.kiln), **given)
        if bpy.app.background:
            session.current.wait_for_results(job)
            session.current.import_results(context, job)
        else:  # the timer does it, at once unless something stands in the way
            job.file, job.wants_import, job.asked = session.current.file, True, True


class ViewOperator(JobOperator):
    """An operator on one view of a job's turntable."""

    view: IntProperty(name="View", description="The view's number", min=0, options={"SKIP_SAVE"})

    def table(self, job: session.Job):
        """The job's views, or KilnError."""
        if not turntable.is_generated(job.data) or job.turntable is None or self.view not in job.turntable.pictures:
            raise KilnError("no-views", f"{job.data['title']} has no view {self.view} to change.", "Choose one of a generated turntable.")
        if self.view == turntable.FRONT:
            raise KilnError("no-views", f"View {self.view} is the picture itself.", "Change another view, or start from another picture.")
        return job.turntable


class KILN_OT_reroll_view(ViewOperator, bpy.types.Operator):
    """Generate this view anew, differently. Press again to keep it"""

    bl_idname = "kiln.reroll_view"
    bl_label = "Re-roll View"

    def act(self, context, job):
        self.table(job).reroll(self.view)
        session.current.show_view(job, self.view)
        session.redraw()


class KILN_OT_replace_view(ViewOperator, ImportHelper, bpy.types.Operator):
    """Put a picture of your own in this view's place. Where there is one, take it away again"""

    bl_idname = "kiln.replace_view"
    bl_label = "Replace View"

    filename_ext = ".png"
    filter_glob: StringProperty(default=";".join(f"*{suffix}" for suffix in picture.SUFFIXES), options={"HIDDEN"})

    def invoke(self, context, event):
        try:
            job = self.chosen(context)
            if self.view not in self.table(job).replaced:
                return super().invoke(context, event)
            job.turntable.keep(self.view)
            session.current.show_view(job, self.view)
        except KilnError as error:
            return refuse(self, error)
        session.redraw()
        return {"FINISHED"}

    def act(self, context, job):
        with session.disk_errors():
            self.table(job).replace(self.view, Path(bpy.path.abspath(self.filepath)))
        session.current.show_view(job, self.view)
        session.redraw()


class KILN_OT_go_on(JobOperator, bpy.types.Operator):
    """Make the asset of these views"""

    bl_idname = "kiln.go_on"
    bl_label = "Go On"

    only: BoolProperty(name="Views Only", description="Change the views as asked, and stop to look at them again", options={"SKIP_SAVE"})

    @classmethod
    def description(cls, context, properties):
        return (
            "Change the views as marked, to look at them again" if properties.only else "Make the asset of these views, changed as marked"
        )

    def act(self, context, job):
        made = session.current.go_on(job, self.only)
        if bpy.app.background:
            session.current.wait_for_results(made)
            if not self.only:
                session.current.import_results(context, made)


class KILN_OT_use_picture(ImportHelper, bpy.types.Operator):
    """Make an asset of a picture: puts it into the Kiln tab as the source, where Generate starts"""

    bl_idname = "kiln.use_picture"
    bl_label = "Picture to 3D"
    bl_options = {"REGISTER", "UNDO"}

    filename_ext = ".png"
    filepath: StringProperty(subtype="FILE_PATH", options={"SKIP_SAVE"})
    filter_glob: StringProperty(default=";".join(f"*{suffix}" for suffix in picture.SUFFIXES), options={"HIDDEN"})

    def invoke(self, context, event):
        return self.execute(context) if self.filepath else super().invoke(context, event)  # dropped: chosen already

    def execute(self, context):
        settings = context.scene.kiln
        try:
            picture.named(Path(self.filepath))
        except KilnError as error:
            return refuse(self, error)
        settings.recipe, settings.picture_source, settings.picture_file = "im3d", "FILE", self.filepath
        session.show_tab(context.area)
        return {"FINISHED"}


class KILN_FH_picture(bpy.types.FileHandler):
    """Pictures dropped into a viewport. Blender asks whether they are for this, or for its own reference images."""

    bl_idname = "KILN_FH_picture"
    bl_label = "Picture to 3D"
    bl_import_operator = "kiln.use_picture"
    bl_file_extensions = ";".join(picture.SUFFIXES)

    @classmethod
    def poll_drop(cls, context):
        return context.area is not None and context.area.type == "VIEW_3D"


class KILN_OT_show(JobOperator, bpy.types.Operator):
    """Show the mesh, the splats or both of every import of this result in this file"""

    bl_idname = "kiln.show"
    bl_label = "Show"
    bl_options = {"REGISTER", "UNDO"}

    what: EnumProperty(
        name="Show",
        items=[("mesh", "Mesh", "The textured mesh"), ("splats", "Splats", "The Gaussian splats"), ("both", "Both", "Mesh and splats")],
        options={"SKIP_SAVE"},
    )

    @classmethod
    def description(cls, context, properties):
        return f"Show {'the ' if properties.what != 'both' else ''}{properties.what} of this result, in the viewport and in renders"

    def act(self, context, job):
        for collection in session.imports_of(job):
            import_asset.show(collection, self.what)


class KILN_OT_import_splats(ImportHelper, bpy.types.Operator):
    """Import Gaussian splats from PLY or SPZ files"""

    bl_idname = "kiln.import_splats"
    bl_label = "Import Splats"
    bl_options = {"REGISTER"}  # the import makes its own undo step

    filename_ext = ".ply"
    filter_glob: StringProperty(default="*.ply;*.spz", options={"HIDDEN"})
    directory: StringProperty(subtype="DIR_PATH", options={"SKIP_SAVE", "HIDDEN"})
    files: CollectionProperty(type=bpy.types.OperatorFileListElement, options={"SKIP_SAVE", "HIDDEN"})

    @classmethod
    def poll(cls, context):
        if context.mode != "OBJECT":
            cls.poll_message_set("Leave the mode that you are in")
            return False
        return True

    def invoke(self, context, event):
        if self.files and self.directory:  # dropped: the files are chosen already
            return self.execute(context)
        return super().invoke(context, event)

    def execute(self, context):
        paths = [Path(self.directory, file.name) for file in self.files if file.name] if self.directory else []
        try:
            for path in paths or [Path(bpy.path.abspath(self.filepath))]:
                made = import_asset.import_splats(context, path, select=True)
                for note in made.get("kiln_notes", "").splitlines():
                    self.report({"WARNING"}, note)
        except KilnError as error:
            return refuse(self, error)
        return {"FINISHED"}


class KILN_FH_splats(bpy.types.FileHandler):
    """Splats dropped into a viewport. Not PLY, which Blender's own importer of meshes takes."""

    bl_idname = "KILN_FH_splats"
    bl_label = "Gaussian Splats"
    bl_import_operator = "kiln.import_splats"
    bl_file_extensions = ".spz"

    @classmethod
    def poll_drop(cls, context):
        return context.area is not None and context.area.type in ("VIEW_3D", "OUTLINER")


def import_menu(self, context):
    self.layout.operator("kiln.import_splats", text="Gaussian Splats (.ply/.spz)")


class ResultOperator:
    """Bakes the maps of an imported result anew, in one go: first says so, then Blender is busy with it."""

    result: StringProperty(name="Result", description="The result's mesh object; empty: the active object", options={"SKIP_SAVE"})

    @classmethod
    def poll(cls, context):
        if session.current is None or session.current.capture:
            cls.poll_message_set("Kiln is preparing a job")
            return False
        if context.mode != "OBJECT":
            cls.poll_message_set("Leave the mode that you are in")
            return False
        return True

    def mesh(self, context) -> bpy.types.Object:
        """The result to work on, or KilnError."""
        thing = bpy.data.objects.get(self.result) if self.result else context.view_layer.objects.active  # perhaps of another scene
        if not rebake.is_result(thing):
            what = f"{thing.name} is no result of Kiln." if thing else f"There is no result {self.result!r}."
            raise KilnError("bad-target", what, "Select the mesh of an imported result.")
        return thing

    def start(self, context):
        """Says what comes and has it begin after the screen shows that."""
        context.workspace.status_text_set(self.saying)
        self.timer = context.window_manager.event_timer_add(0.1, window=context.window)
        self.ticks = 0
        context.window_manager.modal_handler_add(self)
        return {"RUNNING_MODAL"}

    def modal(self, context, event):
        if event.type != "TIMER":
            return {"RUNNING_MODAL"}
        self.ticks += 1
        if self.ticks < 3:
            return {"RUNNING_MODAL"}
        self.cancel(context)
        return self.execute(context)

    def cancel(self, context):
        context.window_manager.event_timer_remove(self.timer)
        context.workspace.status_text_set(None)

    def execute(self, context):
        manager = context.window_manager
        manager.progress_begin(0, 100)
        try:
            mesh = self.mesh(context)
            with session.quiet():
                self.work(context, mesh, lambda fraction, text: manager.progress_update(100 * fraction))
        except KilnError as error:
            return refuse(self, error)
        finally:
            manager.progress_end()
        session.redraw()
        return {"FINISHED"}


class KILN_OT_retexture(ResultOperator, bpy.types.Operator):
    """Make a copy of the source that wears this result's maps on its own topology and UVs"""

    bl_idname = "kiln.retexture"
    bl_label = "Retexture Source"
    bl_options = {"REGISTER", "UNDO"}
    saying = "Kiln bakes the result's maps onto the source's UVs"

    target: StringProperty(name="Object", description="What to retexture a copy of; empty: the result's source", options={"SKIP_SAVE"})
    size: IntProperty(name="Texture Size", description="Width and height of the new maps", default=1024, min=64, max=8192, subtype="PIXEL")
    uv_map: StringProperty(name="UV Map", description="Empty: the one that renders use", options={"SKIP_SAVE"})
    distance: FloatProperty(
        name="Ray Distance",
        description="How far result and source may lie apart. 0: 2 % of the source's size",
        default=0.0, min=0.0, subtype="DISTANCE", options={"SKIP_SAVE"},
    )  # fmt: skip
    unwrap: BoolProperty(
        name="Unwrap the Copy", description="Lay the copy's UVs out anew (Smart UV Project)", default=False, options={"SKIP_SAVE"}
    )

    def source(self, context, mesh) -> bpy.types.Object:
        if self.target:
            found = context.scene.objects.get(self.target)
            if found is None or found.type not in rebake.TARGETS or found == mesh:
                raise KilnError("bad-target", f"{self.target} cannot be retextured.", "Choose another object with a surface.")
            return found
        found = rebake.source_of(mesh, context.scene)
        if found is None:
            raise KilnError("bad-target", f"The source of {mesh.name} is not in this scene.", "Choose the object to retexture.")
        return found

    def invoke(self, context, event):
        if bpy.app.background:
            return self.execute(context)
        try:
            mesh = self.mesh(context)
        except KilnError as error:
            return refuse(self, error)
        self.result, found = mesh.name, rebake.source_of(mesh, context.scene)
        self.target = self.target or (found.name if found else "")
        return context.window_manager.invoke_props_dialog(self)

    def draw(self, context):
        layout = self.layout
        layout.use_property_split = True
        layout.use_property_decorate = False
        layout.prop_search(self, "target", context.scene, "objects")
        found = context.scene.objects.get(self.target)
        layout.prop(self, "unwrap")
        if not self.unwrap and found is not None and found.type == "MESH":
            layout.prop_search(self, "uv_map", found.data, "uv_layers")
        layout.prop(self, "size")
        layout.prop(self, "distance")

    def work(self, context, mesh, report):
        rebake.retexture(
            context, mesh, self.source(context, mesh), self.size, self.uv_map, self.distance, self.unwrap, report
        )  # fmt: skip


class KILN_OT_remesh_quads(ResultOperator, bpy.types.Operator):
    """Turn this result's triangles into quads (QuadriFlow) and bake its maps onto them; undo brings the triangles back"""

    bl_idname = "kiln.remesh_quads"
    bl_label = "Remesh to Quads"
    bl_options = {"REGISTER", "UNDO"}
    saying = "Kiln remeshes the result to quads and bakes its maps anew"

    faces: IntProperty(name="Faces", description="About how many quads", default=5000, min=50, max=500_000)
    size: IntProperty(name="Texture Size", description="0: as large as now", default=0, min=0, max=8192, options={"SKIP_SAVE"})

    def invoke(self, context, event):
        return self.execute(context) if bpy.app.background else self.start(context)

    def work(self, context, mesh, report):
        rebake.remesh_quads(context, mesh, self.faces, self.size, report)


class KILN_OT_remove_job(JobOperator, bpy.types.Operator):
    """Take this job and its results out of the list for good; what was imported stays"""

    bl_idname = "kiln.remove_job"
    bl_label = "Remove"

    def invoke(self, context, event):
        return context.window_manager.invoke_confirm(self, event)

    def act(self, context, job):
        session.current.remove(job)


class KILN_OT_start_backend(bpy.types.Operator):
    """Start the program that computes"""

    bl_idname = "kiln.start_backend"
    bl_label = "Start"

    def execute(self, context):
        try:
            session.current.start_backend()
        except KilnError as error:
            return refuse(self, error)
        return {"FINISHED"}


class KILN_OT_stop_backend(bpy.types.Operator):
    """Stop the program that computes; its jobs go on from their last finished stage when it starts again"""

    bl_idname = "kiln.stop_backend"
    bl_label = "Stop"

    def invoke(self, context, event):
        if any(job.state == "running" for job in session.current.jobs.values()):
            return context.window_manager.invoke_confirm(self, event)
        return self.execute(context)

    def execute(self, context):
        try:
            session.current.stop_backend()
        except KilnError as error:
            return refuse(self, error)
        return {"FINISHED"}


class SetUpOperator:
    """Changes the backend's environment on a thread; in `blender -b` waits for it."""

    action = "create"

    @classmethod
    def poll(cls, context):
        if session.current is None or session.current.setting_up:
            cls.poll_message_set("The backend is being set up")
            return False
        return True

    def execute(self, context):
        try:
            session.current.set_up(self.action, **self.arguments())
        except KilnError as error:
            return refuse(self, error)
        return {"FINISHED"}

    def arguments(self) -> dict:
        return {}


class KILN_OT_set_up_backend(SetUpOperator, bpy.types.Operator):
    """Download what Kiln computes with and set it up in this extension's own folder"""

    bl_idname = "kiln.set_up_backend"
    bl_label = "Set Up Backend"


class KILN_OT_set_up_from_bundle(SetUpOperator, ImportHelper, bpy.types.Operator):
    """Set the backend up from an offline bundle, without the internet"""

    bl_idname = "kiln.set_up_from_bundle"
    bl_label = "Set Up from Offline Bundle…"

    filename_ext = ".zip"
    filter_glob: StringProperty(default="*.zip", options={"HIDDEN"})

    def arguments(self):
        return {"bundle": Path(self.filepath)}


class KILN_OT_repair_backend(SetUpOperator, bpy.types.Operator):
    """Delete the backend's environment and set it up anew, which downloads it again; jobs and results are kept"""

    bl_idname = "kiln.repair_backend"
    bl_label = "Repair"
    action = "repair"


class KILN_OT_remove_backend(SetUpOperator, bpy.types.Operator):
    """Delete the backend's environment from this computer; it can be set up again"""

    bl_idname = "kiln.remove_backend"
    bl_label = "Remove"
    action = "remove"

    jobs: BoolProperty(name="Jobs and Results Too", description="Also delete the job list and every result that the backend keeps")

    def invoke(self, context, event):
        return context.window_manager.invoke_props_dialog(self)

    def arguments(self):
        return {"jobs": self.jobs}


class KILN_OT_cancel_set_up(bpy.types.Operator):
    """Stop setting up; what was downloaded is kept for the next try"""

    bl_idname = "kiln.cancel_set_up"
    bl_label = "Cancel"

    def execute(self, context):
        if session.current.setting_up:
            session.current.setting_up.cancel()
        return {"FINISHED"}


class KILN_OT_connect(ImportHelper, bpy.types.Operator):
    """Use the backend on another computer by the connection file that it wrote there"""

    bl_idname = "kiln.connect"
    bl_label = "Connect"

    filename_ext = ".json"
    filter_glob: StringProperty(default="*.json", options={"HIDDEN"})

    def execute(self, context):
        try:
            connection.Connection.load(Path(self.filepath))
        except KilnError as error:
            return refuse(self, error)
        chosen = preferences.get()
        chosen.connection_file, chosen.place = self.filepath, "REMOTE"
        context.preferences.is_dirty = True  # saved with the others when Blender closes
        session.current.connect()
        return {"FINISHED"}


class KILN_OT_use_local(bpy.types.Operator):
    """Use this computer's backend again"""

    bl_idname = "kiln.use_local"
    bl_label = "Use This Computer"

    def execute(self, context):
        preferences.get().place = "LOCAL"
        context.preferences.is_dirty = True
        session.current.connect()
        return {"FINISHED"}


class KILN_OT_reset_parameters(bpy.types.Operator):
    """Set every parameter to the preset's value again"""

    bl_idname = "kiln.reset_parameters"
    bl_label = "Reset to Preset"
    bl_options = {"REGISTER", "UNDO"}

    def execute(self, context):
        settings = context.scene.kiln
        group = getattr(settings, settings.recipe)
        properties.apply_preset(group, recipes.RECIPES[settings.recipe], group.preset)
        return {"FINISHED"}


class KILN_OT_dismiss(bpy.types.Operator):
    """Read and understood"""

    bl_idname = "kiln.dismiss"
    bl_label = "Dismiss"

    index: IntProperty(options={"SKIP_SAVE"})

    def execute(self, context):
        if self.index < len(session.current.notices):
            del session.current.notices[self.index]
        session.redraw()
        return {"FINISHED"}


class KILN_OT_copy_details(bpy.types.Operator):
    """Copy everything that is known about this error, to search for it or to send it"""

    bl_idname = "kiln.copy_details"
    bl_label = "Copy Details"

    text: StringProperty(options={"SKIP_SAVE"})
    job: StringProperty(options={"SKIP_SAVE"})

    def execute(self, context):
        context.window_manager.clipboard = f"{self.text}\n{session.current.about(self.job)}"
        self.report({"INFO"}, "Copied")
        return {"FINISHED"}


class KILN_OT_open_log(bpy.types.Operator):
    """Open the log file of the backend, or of its set-up where there is no backend yet"""

    bl_idname = "kiln.open_log"
    bl_label = "Log"

    def execute(self, context):
        now = session.current
        now.connect()
        log = session.environment_log() if now.setting_up or now.backend["state"] == "missing" else now.where.log
        if not log.is_file():
            return refuse(self, KilnError("no-log", f"There is no log {log} yet.", ""))
        bpy.ops.wm.path_open(filepath=str(log))
        return {"FINISHED"}


class KILN_OT_announce(bpy.types.Operator):
    """Puts a line into Blender's status bar"""

    bl_idname = "kiln.announce"
    bl_label = "Kiln"
    bl_options = {"INTERNAL"}

    text: StringProperty(options={"SKIP_SAVE"})
    failed: BoolProperty(options={"SKIP_SAVE"})

    def execute(self, context):
        self.report({"WARNING" if self.failed else "INFO"}, self.text)
        return {"FINISHED"}


CLASSES = (
    KILN_OT_generate, KILN_OT_cancel_job, KILN_OT_retry_job, KILN_OT_import_job, KILN_OT_show, KILN_OT_remove_job, KILN_OT_start_backend,
    KILN_OT_stop_backend, KILN_OT_set_up_backend, KILN_OT_set_up_from_bundle, KILN_OT_repair_backend, KILN_OT_remove_backend,
    KILN_OT_cancel_set_up, KILN_OT_connect, KILN_OT_use_local, KILN_OT_reset_parameters, KILN_OT_dismiss, KILN_OT_copy_details,
    KILN_OT_open_log, KILN_OT_announce, KILN_OT_import_splats, KILN_FH_splats, KILN_OT_retexture, KILN_OT_remesh_quads,
    KILN_OT_reroll_view, KILN_OT_replace_view, KILN_OT_go_on, KILN_OT_use_picture, KILN_FH_picture,
)  # fmt: skip


def register():
    for cls in CLASSES:
        bpy.utils.register_class(cls)
    bpy.types.TOPBAR_MT_file_import.append(import_menu)


def unregister():
    bpy.types.TOPBAR_MT_file_import.remove(import_menu)
    for cls in reversed(CLASSES):
        bpy.utils.unregister_class(cls)
