"""Blender properties made from the recipes' definitions, and the job list's rows. A recipe's parameter `fit.iterations` is the property
`fit_iterations` here, in `scene.kiln.reconstruct` and in `bpy.ops.kiln.generate`."""

import bpy
from bpy.props import BoolProperty, CollectionProperty, EnumProperty, FloatProperty, IntProperty, PointerProperty, StringProperty
from bpy.types import PropertyGroup

from . import import_motion
from .protocol import recipes

PRESET_HELP = {
    "draft": "Quick look: seconds to half a minute, coarse",
    "standard": "Good for most objects",
    "high": "Fine detail, several times slower",
}


def identifier(name: str) -> str:
    """The Blender property of a recipe parameter: no dots in there."""
    return name.replace(".", "_")


def blender_property(parameter: recipes.Parameter, **more):
    """The bpy.props definition of one recipe parameter."""
    about = dict(name=parameter.label, description=parameter.help.rstrip("."), default=parameter.default, **more)
    if parameter.type is bool:
        return BoolProperty(**about)
    if parameter.options:
        return EnumProperty(items=[(value, _spoken(value, text), text) for value, text in parameter.options], **about)
    if parameter.type is str:  # not cut off at its longest, which Blender counts in bytes: the recipe's check says so
        return StringProperty(**about)
    subtype = {"subtype": "PIXEL"} if parameter.unit == "px" else {}
    if parameter.type is int:
        return IntProperty(min=int(parameter.low), max=int(parameter.high), **subtype, **about)
    return FloatProperty(min=parameter.low, max=parameter.high, precision=4 if parameter.default < 0.01 else 2, step=5, **about)


def _spoken(value: str, meaning: str) -> str:
    """A choice's name: what it means, shortly, where its own name is that of a file or model."""
    words = meaning.partition(":")[0].partition(",")[0] if "-" in value else value.replace("_", " ").capitalize()
    return words.replace("Gltf", "glTF")


def preset_items(recipe: type) -> list[tuple[str, str, str]]:
    return [(name, name.capitalize(), PRESET_HELP.get(name, "")) for name in recipe.PRESETS]


def takes(recipe: type, values: dict) -> str:
    """What a job will take, in words; the panel says how, "" as long as it is not there."""
    return ""


def batch_chosen() -> None:
    """Another batch was chosen in the list; the panel lists its items, nothing happens as long as it is not there."""


_shown_items: dict[tuple, list] = {}  # Blender does not keep the texts of items that a function returns


def _preset_items_now(recipe: type) -> list[tuple[str, str, str, str, int]]:
    """The presets with what each takes on the backend that is there now."""
    told = []
    for name in recipe.PRESETS:
        words = takes(recipe, recipes.values(recipes.make(recipe.NAME, preset=name)))
        told.append(f"{PRESET_HELP.get(name, '')}. {words}" if words else PRESET_HELP.get(name, ""))
    key = (recipe.NAME, *told)
    if key not in _shown_items:
        _shown_items[key] = [(name, name.capitalize(), told[i], "NONE", i) for i, name in enumerate(recipe.PRESETS)]
    return _shown_items[key]


def _group_class(recipe: type) -> type:
    """The PropertyGroup of one recipe: its preset and every parameter."""
    annotations = {
        "preset": EnumProperty(
            name="Preset",
            description="Sets every parameter; change single ones afterwards",
            items=lambda group, context: _preset_items_now(recipe),
            default=list(recipe.PRESETS).index("standard"),
            update=lambda group, context: apply_preset(group, recipe, group.preset),
        )
    }
    for parameter in recipes.parameters(recipe):
        name = identifier(parameter.name)
        if name in annotations:
            raise ValueError(f"{recipe.__name__}: two parameters would share the property {name!r}")
        annotations[name] = blender_property(parameter)
    return type(f"Kiln{recipe.__name__}", (PropertyGroup,), {"__annotations__": annotations, "__doc__": recipe.__doc__})


def apply_preset(group: PropertyGroup, recipe: type, preset: str) -> None:
    """Sets every parameter of `group` to the preset's value, but those that say what to make."""
    for name, value in recipes.values(recipes.make(recipe.NAME, preset=preset)).items():
        if name not in said(recipe):
            setattr(group, identifier(name), value)


def said(recipe: type) -> tuple[str, ...]:
    """Parameters that say what to make, with which model, how far and for which game engine: no preset knows better."""
    known = recipes.parameters(recipe)
    texts = (parameter.name for parameter in known if parameter.type is str and not parameter.options)
    others = (parameter.name for parameter in known if parameter.name == "generate.only" or parameter.group == "game")
    return tuple(dict.fromkeys((*texts, *recipe.WEIGHTS, *others)))


def value_of(group: PropertyGroup, parameter: recipes.Parameter):
    """One parameter's value. Blender keeps floats in 32 bits: seven digits give back what was typed (0.2, not 0.20000000298)."""
    value = getattr(group, identifier(parameter.name))
    return float(f"{value:.7g}") if parameter.type is float else value


def values(group: PropertyGroup, recipe: type) -> dict:
    """Every parameter of the recipe under its flat name, as the panel shows it."""
    return {parameter.name: value_of(group, parameter) for parameter in recipes.parameters(recipe)}


def changed(group: PropertyGroup, recipe: type) -> list[str]:
    """Names of the parameters that differ from the chosen preset."""
    preset = recipes.values(recipes.make(recipe.NAME, preset=group.preset))
    return [name for name, value in values(group, recipe).items() if value != preset[name] and name not in said(recipe)]


def preset_of(recipe: str, parameters: dict) -> str:
    """The preset that parameters are those of, or "custom"."""
    of_the_scene = ("capture.frame_start", "capture.frame_end") if parameters.get("capture.scene_frames") else ()
    free = (*of_the_scene, *said(recipes.recipe_named(recipe)))
    for preset in recipes.recipe_named(recipe).PRESETS:
        known = recipes.values(recipes.make(recipe, preset=preset))
        if {**known, **{name: parameters.get(name) for name in free}} == parameters:
            return preset
    return "custom"


GROUPS = {name: _group_class(recipe) for name, recipe in recipes.RECIPES.items()}


# How a result's motion comes onto the timeline: properties of the scene and of the import operator.
MOTION = {
    "motion": lambda **more: EnumProperty(
        name="Motion", description="How the result's motion comes onto the timeline", items=import_motion.WAYS, **more
    ),
    "loop": lambda **more: BoolProperty(
        name="Loop", description="Let the end of the motion turn into its beginning, and repeat it before and after", **more
    ),
    "start": lambda **more: IntProperty(name="Start Frame", description="Frame of the scene for the first moment", default=1, **more),
}


def motion(settings: PropertyGroup) -> import_motion.How:
    """How the scene's settings want motion on the timeline."""
    return import_motion.How(settings.motion, settings.motion_loop, settings.motion_start if settings.motion_own_start else None)


class KilnBatch(PropertyGroup):
    """What the next batch of this scene takes and where it goes; recipe and parameters are the panel's."""

    __annotations__ = {
        "source": EnumProperty(
            name="Items",
            description="What assets to make",
            items=[
                ("SELECTION", "Selection", "Each selected object becomes an asset"),
                ("COLLECTION", "Collection", "Each object, or each collection, in a collection becomes an asset"),
                ("FOLDER", "Folder", "Each model, picture or splat file in a folder becomes an asset"),
            ],
        ),
        "collection": PointerProperty(type=bpy.types.Collection, name="Collection", description="What to make assets of"),
        "each": EnumProperty(
            name="Each",
            description="What becomes an asset",
            items=[
                ("OBJECT", "Each Object", "Every object in the collection and in those below it"),
                ("COLLECTION", "Each Collection", "Every collection directly in it, as one asset"),
            ],
        ),
        "folder": StringProperty(name="Folder", description="A folder of files; folders in it count too", subtype="DIR_PATH"),
        "out": StringProperty(
            name="Output", description="Folder for the assets, one folder each; empty: one of Kiln's own", subtype="DIR_PATH"
        ),
        "fbx": BoolProperty(name="FBX Too", description="Write each asset as FBX as well"),
        "results": EnumProperty(
            name="Results Into",
            description="Where the results go besides the output folder",
            items=[
                ("COLLECTION", "Collection", "Into a collection of this file, when the batch is done"),
                ("LIBRARY", "Asset Library", "Into an asset library file, with catalog and previews"),
                ("FILES", "Folder Only", "Nowhere else"),
            ],
        ),
        "into": PointerProperty(type=bpy.types.Collection, name="Into", description="Where results go; empty: a new one for the batch"),
        "library": StringProperty(
            name="Library File", description="A .blend file, made if it is not there; best in a folder that is an asset library",
            subtype="FILE_PATH",
        ),
        "catalog": StringProperty(name="Catalog", description="Catalog of the assets; a / makes one inside another", default="Kiln"),
    }  # fmt: skip


class KilnSettings(PropertyGroup):
    """What the next Generate in this scene will do; saved with the .blend file."""

    __annotations__ = {
        "recipe": EnumProperty(
            name="Recipe",
            description="What to make of the source",
            items=[(name, recipe.TITLE, recipe.__doc__.strip().rstrip(".")) for name, recipe in recipes.RECIPES.items()],
        ),
        "source": EnumProperty(
            name="Source",
            description="What to capture",
            items=[
                ("SELECTION", "Selection", "The selected objects, as one subject"),
                ("COLLECTION", "Collection", "Everything in a collection, as one subject"),
            ],
        ),
        "collection": PointerProperty(type=bpy.types.Collection, name="Collection", description="What to capture"),
        "splats_source": EnumProperty(
            name="Splats",
            description="Which splats to make a mesh of",
            items=[
                ("OBJECT", "Active Object", "Splats in this scene, as cropped and placed: those of a result, or imported ones"),
                ("FILE", "File", "A .ply or .spz file, without importing it"),
            ],
        ),
        "splats_file": StringProperty(name="Splat File", description="A .ply or .spz file of Gaussian splats", subtype="FILE_PATH"),
        "picture_source": EnumProperty(
            name="Source",
            description="What to make an asset of",
            items=[
                ("FILE", "File", "A picture in a file; a prompt may say what it shows"),
                ("IMAGE", "Image", "A picture in this .blend file, as it looks: loaded, packed, painted or rendered"),
                ("VIEWS", "Views", "Pictures all around a subject: a turntable of your own, for which nothing is generated"),
                ("PROMPT", "Text", "Words alone: the picture is made first"),
            ],
        ),
        "picture_file": StringProperty(name="Picture", description="A picture of the subject from the front", subtype="FILE_PATH"),
        "picture_image": PointerProperty(type=bpy.types.Image, name="Picture", description="A picture of the subject from the front"),
        "picture_views": StringProperty(
            name="Views",
            description="A folder of pictures once round the subject in the order of their names, or with their cameras in transforms.json",
            subtype="DIR_PATH",
        ),
        "quads": BoolProperty(
            name="Quads",
            description="Remesh each result to quads when it comes in (QuadriFlow), with maps baked anew. Blender waits meanwhile",
        ),
        "quad_faces": IntProperty(name="Faces", description="About how many quads", default=5000, min=50, max=500_000),
        **{f"motion_{name}" if name != "motion" else name: made() for name, made in MOTION.items()},
        "motion_own_start": BoolProperty(
            name="Own Start Frame", description="Put the first moment at a frame of your choice, not at the one that it was captured at"
        ),
        "batch": PointerProperty(type=KilnBatch),
        **{name: PointerProperty(type=group) for name, group in GROUPS.items()},
    }


class KilnJobRow(PropertyGroup):
    """A row of the job list; everything else about the job stands in `session.jobs` under its `name`, the job's id."""


class KilnBatchRow(PropertyGroup):
    """A row of the list of batches, named by id, or of a batch's items, by name; the rest stands in `batch_panel.known`."""


class KilnWindow(PropertyGroup):
    """The panel's own state, not saved with a file."""

    jobs: CollectionProperty(type=KilnJobRow, options={"SKIP_SAVE"})
    active_job: IntProperty(name="Job", default=0, options={"SKIP_SAVE"})
    batches: CollectionProperty(type=KilnBatchRow, options={"SKIP_SAVE"})
    active_batch: IntProperty(name="Batch", default=0, options={"SKIP_SAVE"}, update=lambda window, context: batch_chosen())
    batch_items: CollectionProperty(type=KilnBatchRow, options={"SKIP_SAVE"})
    active_batch_item: IntProperty(name="Item", default=0, options={"SKIP_SAVE"})


CLASSES = (*GROUPS.values(), KilnBatch, KilnSettings, KilnJobRow, KilnBatchRow, KilnWindow)


def register():
    for cls in CLASSES:
        bpy.utils.register_class(cls)
    bpy.types.Scene.kiln = PointerProperty(type=KilnSettings)
    bpy.types.WindowManager.kiln = PointerProperty(type=KilnWindow)


def unregister():
    del bpy.types.WindowManager.kiln
    del bpy.types.Scene.kiln
    for cls in reversed(CLASSES):
        bpy.utils.unregister_class(cls)
