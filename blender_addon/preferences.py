"""What the user decides once: which backend, what happens to it when Blender closes, whether results come in by themselves."""

import os
from pathlib import Path

import bpy
from bpy.props import BoolProperty, EnumProperty, StringProperty


class KilnPreferences(bpy.types.AddonPreferences):
    bl_idname = __package__

    place: EnumProperty(
        name="Backend",
        description="Where the work is done",
        items=[
            ("LOCAL", "This Computer", "A process of its own on this computer, with its own Python"),
            ("REMOTE", "Another Computer", "A backend that runs elsewhere, reached by its connection file"),
        ],
    )
    connection_file: StringProperty(
        name="Connection File",
        description="Written by the backend on the other computer (kiln serve); who has this file may use that backend",
        subtype="FILE_PATH",
    )
    backend_python: StringProperty(
        name="Backend Python",
        description="A Python that has Kiln's backend already, instead of the environment that Kiln sets up; leave empty otherwise",
        subtype="FILE_PATH",
    )
    start_backend: BoolProperty(
        name="Start the Backend When the Kiln Tab Opens",
        description="Otherwise it starts with the first job",
        default=True,
    )
    on_close: EnumProperty(
        name="When Blender Closes",
        description="What the backend does with jobs that run or wait. It serves every Blender of yours on this computer",
        items=[
            ("FINISH", "Finish the Queue", "The backend finishes its jobs, then ends by itself; the next Blender finds the results"),
            ("STOP", "Stop, Resume Next Time", "The backend stops at once; its jobs go on from their last finished stage next time"),
        ],
    )
    auto_import: BoolProperty(
        name="Import Results When They Are Done",
        description="For jobs started in this file since Blender was opened; others wait in the list",
        default=True,
    )

    def draw(self, context):
        layout = self.layout
        layout.use_property_split = True
        layout.use_property_decorate = False
        layout.prop(self, "auto_import")
        layout.prop(self, "start_backend")
        layout.prop(self, "on_close")
        layout.separator()
        layout.prop(self, "place", expand=True)
        if self.place == "REMOTE":
            layout.prop(self, "connection_file")
        else:
            layout.prop(self, "backend_python", placeholder="Kiln's own")
        from . import panel  # late: the panel reads these preferences

        panel.draw_backend(layout.box(), context)


def get() -> "KilnPreferences":
    """The preferences, or their defaults where the extension was enabled without being saved in them."""
    addon = bpy.context.preferences.addons.get(__package__)
    return addon.preferences if addon and addon.preferences else Defaults()


class Defaults:
    place, connection_file, backend_python, start_backend, on_close, auto_import = "LOCAL", "", "", True, "FINISH", True


def backend_python() -> Path | None:
    """A backend Python that the user or the variable KILN_BACKEND_PYTHON names; None: use the environment that Kiln sets up."""
    named = os.environ.get("KILN_BACKEND_PYTHON") or get().backend_python
    return Path(bpy.path.abspath(named)) if named else None


def register():
    bpy.utils.register_class(KilnPreferences)


def unregister():
    bpy.utils.unregister_class(KilnPreferences)
