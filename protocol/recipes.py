"""What a user can ask for: one frozen dataclass a recipe, from which the panel, the command line, the backend's checks and the
reference table are all made.

A recipe is a dataclass of groups (`capture`, `fit`, ...), each a dataclass of parameters. On the wire, in the panel and on the command
line a parameter has one flat name, `group.parameter` (`--fit-iterations` as a flag). Adding one: CONTRIBUTING.md.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .errors import KilnError


@dataclass(frozen=True)
class Parameter:
    """One control: everything that a panel, a command line or a check needs to know of it."""

    name: str  # flat: "fit.iterations"
    type: type  # bool, int, float or str
    default: Any
    help: str  # one sentence
    low: float | None = None
    high: float | None = None  # of a text: its characters, at most
    unit: str = ""  # "px", "deg", "" where it is a plain count or ratio
    options: tuple[tuple[str, str], ...] = ()  # (value, what it means), for a choice
    advanced: bool = False  # shown in a closed sub-panel

    @property
    def group(self) -> str:
        return self.name.partition(".")[0]

    @property
    def label(self) -> str:
        words = self.name.rpartition(".")[2].replace("_", " ").capitalize()
        for spoken in ("SH ", "SSIM", "LPIPS", "FOV", "LOD"):  # spherical harmonics, structural similarity, field of view, level of detail
            words = words.replace(spoken.capitalize(), spoken)
        return words

    def read(self, text: str) -> Any:
        """The value that a command line or a table's cell says, for `check`; a text that says none stays, to be refused there."""
        if self.type is bool:
            spoken = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}
            return spoken.get(text.strip().lower(), text)
        if self.type in (int, float) and not self.options:
            for kind in (int, float):
                try:
                    return kind(text)
                except ValueError:
                    pass
        return text

    def check(self, value: Any) -> Any:
        """The value in this parameter's type, or a `KilnError` that names the parameter, the value and what is allowed."""
        if self.type is bool:
            if isinstance(value, bool):
                return value
            raise self._refuse(value, "true or false")
        if self.options:
            names = [name for name, _ in self.options]
            if value in names:
                return value
            raise self._refuse(value, "one of " + ", ".join(names))
        if self.type is str:
            if isinstance(value, str) and len(value) <= self.high and value.isprintable():
                return value.strip()
            raise self._refuse(value, f"a line of text of at most {self.high:.0f} characters")
        unit = f" {self.unit}" if self.unit else ""
        kind = "a whole number" if self.type is int else "a number"
        allowed = f"{kind} from {self.low:.12g} to {self.high:.12g}{unit}"
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._refuse(value, allowed)
        if self.type is int and value != int(value) or not self.low <= value <= self.high:
            raise self._refuse(value, allowed)
        return self.type(value)

    def _refuse(self, value: Any, allowed: str) -> KilnError:
        return KilnError("bad-parameter", f"{self.name} cannot be {value!r}.", f"Allowed: {allowed}.")


def _number(default, low, high, help, unit="", advanced=False):
    return field(default=default, metadata=dict(help=help, low=low, high=high, unit=unit, advanced=advanced))


def _choice(default, options, help, advanced=False):
    return field(default=default, metadata=dict(help=help, options=tuple(options.items()), advanced=advanced))


def _text(longest, help, advanced=False, default=""):
    return field(default=default, metadata=dict(help=help, high=longest, advanced=advanced))


def _flag(default, help, advanced=False):
    return field(default=default, metadata=dict(help=help, advanced=advanced))


COLORS = {
    "base_color": "The material's own colour, without light: the asset can be relit",
    "cycles": "As Cycles renders it in the scene's light",
    "eevee": "As EEVEE renders it in the scene's light",
}
DEVICES = {"auto": "An NVIDIA GPU where one can be used, else the CPU", "cpu": "The CPU", "cuda": "An NVIDIA GPU"}


@dataclass(frozen=True)
class Capture:
    """How the extension renders the subject. The backend records it and does not use it."""

    views: int = _number(24, 4, 200, "Cameras around the subject, on rings and at the poles.")
    size: int = _number(512, 64, 4096, "Width and height of each view.", "px")
    color: str = _choice("base_color", COLORS, "What the views show.")
    samples: int = _number(16, 1, 4096, "Render samples a pixel.", advanced=True)
    geometry: bool = _flag(True, "Render exact depth and normals beside the colour.", advanced=True)
    materials: bool = _flag(
        True, "Render roughness, metallic, opacity and emission beside the base colour, for the asset's own maps.", advanced=True
    )
    holdout: int = _number(6, 0, 50, "Extra views kept out of the fit, to score the result.", advanced=True)


@dataclass(frozen=True)
class Fit:
    """Splats from views. Rates and weights follow 3D Gaussian Splatting (Kerbl et al. 2023, section 5 and its published code), raised
    for short fits of one object."""

    splats: int = _number(20_000, 500, 2_000_000, "Gaussians in the finished model, at most.")
    iterations: int = _number(1000, 50, 100_000, "Optimisation steps, one view each.")
    sh_degree: int = _number(0, 0, 3, "Degree of the colour's change with the viewing direction; 0 for unlit colour.")
    device: str = _choice("auto", DEVICES, "Where the fit runs.", True)
    ssim_weight: float = _number(0.2, 0.0, 1.0, "Share of structural similarity in the colour loss; the rest is L1.", advanced=True)
    alpha_weight: float = _number(0.5, 0.0, 100.0, "Weight of the silhouette's L1 loss.", advanced=True)
    depth_weight: float = _number(0.1, 0.0, 100.0, "Weight of the depth's L1 loss, where views have depth.", advanced=True)
    normal_weight: float = _number(
        0.0, 0.0, 100.0, "Weight of the angle between flat splats and the views' normals, where views have them.", advanced=True
    )
    consistency_weight: float = _number(
        0.0, 0.0, 100.0, "Weight of the angle between flat splats and the fitted depth's normals, where views have none.", advanced=True
    )
    flat_weight: float = _number(0.0, 0.0, 100.0, "Weight of the splats' thickness.", advanced=True)
    distortion_weight: float = _number(
        0.1,
        0.0,
        1000.0,
        "Weight of the spread in depth of the splats that one pixel shows, where views have no depth; takes half again the time.",
        advanced=True,
    )
    hull_weight: float = _number(0.0, 0.0, 100.0, "Weight of the opacity of splats outside the silhouettes.", advanced=True)
    random_background: bool = _flag(
        True, "Compose every second step on another plain colour, the rest on black, so that no splat imitates the background.", True
    )


@dataclass(frozen=True)
class Surface:
    """A closed mesh: visibility decides inside and outside; exact depth, or the splats where views have none, place the surface; marching
    cubes."""

    grid: int = _number(
        224, 32, 512, "Cells along the longest side of the marching-cubes grid; more where that many faces need it: 384 for 80,000."
    )
    faces: int = _number(20_000, 100, 2_000_000, "Triangles of the finished mesh, at most.")
    smoothing: int = _number(10, 0, 200, "Taubin smoothing passes; they do not shrink the object.", advanced=True)
    smallest_piece: float = _number(
        0.001, 0.0, 1.0, "Pieces with a smaller share of the whole area are removed as floaters.", advanced=True
    )


def cells(grid: int, faces: int) -> int:
    """Cells along the longest side that a surface is found with: as asked, but of more than 20,000 faces hardly one would show anything
    new on a grid that is coarser than they are."""
    return grid if faces <= 20_000 else max(grid, min(512, round(1.3576 * math.sqrt(faces))))


@dataclass(frozen=True)
class Texture:
    """UV charts and the colour baked into them from the views."""

    size: int = _number(1024, 64, 8192, "Width and height of the texture.", "px")
    padding: int = _number(
        4, 0, 64, "Pixels of colour around each chart, against seams at a distance; down to 2 where charts are many and small.", "px", True
    )
    power_of_two: bool = _flag(False, "Round the texture's size down to a power of two, as some graphics cards and engines want it.", True)


def pixels(texture: Texture) -> int:
    """Width and height of the texture as it is made."""
    return 1 << (texture.size.bit_length() - 1) if texture.power_of_two else texture.size


@dataclass(frozen=True)
class Subject:
    """What of the splats becomes the mesh. Lengths and places are those of the file, with Z up."""

    up: str = _choice(
        "auto",
        {
            "auto": "Y in an SPZ file, Z in a PLY that Kiln wrote, against Y in a PLY of any other tool",
            "z_up": "The file's Z axis: Kiln, Blender, nerfstudio",
            "y_up": "The file's Y axis: SPZ, glTF, three.js",
            "y_down": "Against the file's Y axis: COLMAP and most tools that make splats from photographs",
        },
        "Which way is up in the file.",
    )
    keep: float = _number(
        0.95, 0.05, 1.0, "Share of the splats around their middle that surely is the subject; lower it to leave out more of a background."
    )
    radius: float = _number(0.0, 0.0, 1e6, "Only the splats in a ball of this radius are used; 0 uses all.", "m")
    x: float = _number(0.0, -1e6, 1e6, "Centre of the ball, along X.", "m", advanced=True)
    y: float = _number(0.0, -1e6, 1e6, "Centre of the ball, along Y.", "m", advanced=True)
    z: float = _number(0.0, -1e6, 1e6, "Centre of the ball, along Z.", "m", advanced=True)


@dataclass(frozen=True)
class Look:
    """Pictures that the backend itself takes of splats, to make a mesh from."""

    count: int = _number(48, 16, 200, "Cameras around the splats.")
    size: int = _number(512, 64, 2048, "Width and height of each picture.", "px")


@dataclass(frozen=True)
class CaptureMotion:
    """How the extension renders a moving subject: a few cameras at every chosen frame, others from frame to frame."""

    scene_frames: bool = _flag(True, "Take the scene's frame range.")
    frame_start: int = _number(1, -1_000_000, 1_000_000, "First frame, where the scene's range is not taken.")
    frame_end: int = _number(24, -1_000_000, 1_000_000, "Last frame, where the scene's range is not taken.")
    frame_step: int = _number(1, 1, 1000, "Every so many frames one is captured.")
    views: int = _number(8, 4, 200, "Cameras that see each frame.")
    cameras: int = _number(
        24, 4, 200, "Cameras altogether, rounded up to whole sets: each set surrounds the subject, and sees every so many frames."
    )
    size: int = _number(256, 64, 4096, "Width and height of each view.", "px")
    color: str = _choice("base_color", COLORS, "What the views show.")
    samples: int = _number(16, 1, 4096, "Render samples a pixel.", advanced=True)
    materials: bool = _flag(
        True, "Render roughness, metallic, opacity and emission beside the base colour, for the asset's own maps.", advanced=True
    )
    holdout: int = _number(2, 0, 50, "Extra views of each frame kept out of the fit, to score the result.", advanced=True)


@dataclass(frozen=True)
class FitMotion:
    """Motion and splats from views of a moving subject: sparse control nodes after Huang et al. 2024 (SC-GS), placed by embedded
    deformation (Sumner et al. 2007) and refined by the splats' own pictures."""

    splats: int = _number(12_000, 500, 2_000_000, "Gaussians in the finished model, at most.")
    iterations: int = _number(3000, 50, 100_000, "Optimisation steps over all frames, one view each.")
    nodes: int = _number(300, 20, 5000, "Control nodes that carry the motion.")
    sh_degree: int = _number(0, 0, 3, "Degree of the colour's change with the viewing direction; 0 for unlit colour.")
    device: str = _choice("auto", DEVICES, "Where the fit runs.", True)
    ssim_weight: float = _number(0.2, 0.0, 1.0, "Share of structural similarity in the colour loss; the rest is L1.", advanced=True)
    alpha_weight: float = _number(0.5, 0.0, 100.0, "Weight of the silhouette's L1 loss.", advanced=True)
    depth_weight: float = _number(0.1, 0.0, 100.0, "Weight of the depth's L1 loss, where views have depth.", advanced=True)
    rigidity_weight: float = _number(1.0, 0.0, 1000.0, "How strongly neighbouring nodes move as one rigid body.", advanced=True)
    smoothness_weight: float = _number(0.1, 0.0, 1000.0, "How strongly nodes keep their speed from frame to frame.", advanced=True)
    residual: bool = _flag(True, "Let each splat leave its nodes a little, frame by frame.", advanced=True)
    opacity: bool = _flag(True, "Let splats fade in and out: parts that appear.", advanced=True)


@dataclass(frozen=True)
class Armature:
    """Bones and weights solved from the moving vertices (smooth skinning decomposition, Le and Deng 2012), at most four weights
    a vertex."""

    bones: int = _number(24, 1, 128, "Bones, at most; fewer where these explain the motion.")
    scale: bool = _flag(True, "Bones may scale, so that stretching parts follow.")


TURNTABLES = {
    "wan2.1-orbit": "Wan 2.1 image-to-video, 14B, with an orbit LoRA: best quality, Apache licence, 16 GB of GPU memory or more",
    "sv3d-p": "Stable Video 3D: exact cameras; Stability's licence, which may exclude commercial use",
    "mv-adapter-sdxl": "MV-Adapter on SDXL: six exact views on smaller cards; OpenRAIL++ licence",
    "kiln-tiny-turntable": "Kiln's own small model, 64 px, for trying things out: it is installed and runs anywhere",
}


@dataclass(frozen=True)
class Generate:
    """The turntable: K views of the subject by a video model that sees one picture of it (IM-3D, section 3.1)."""

    model: str = _choice("wan2.1-orbit", TURNTABLES, "What generates the views; `kiln weights` tells its size, memory and licence.")
    prompt: str = _text(500, "What the subject is, in words; without a picture, the picture is made from them.")
    views: int = _number(16, 4, 64, "Views of the turntable, at most as many as the model makes.")
    steps: int = _number(20, 2, 100, "Denoising steps; with guidance each takes two evaluations of the model.")
    guidance: float = _number(0.0, 0.0, 20.0, "How strictly the model follows picture and prompt; 0 takes the model's own.", advanced=True)
    matte: str = _choice(
        "auto",
        {
            "auto": "The picture's alpha if it has one, else the matting network, else the border's colour",
            "network": "The matting network isnet-general-use",
            "border": "What differs from the border's colour",
        },
        "How the subject is cut out of picture and views.",
        True,
    )
    rerolls: str = _text(200, "Numbers of views that are generated anew, for example 3 7; a number twice draws twice.", True)
    only: bool = _flag(False, "Stop after the turntable, to look at its views and re-roll or replace some before going on.")


@dataclass(frozen=True)
class Orbit:
    """The cameras of a turntable that has none: one elevation, one field of view, and each view's azimuth."""

    estimate: bool = _flag(
        True, "Estimate the cameras, beginning with a network's guess of the elevation, and refine them with the splats."
    )
    elevation: float = _number(
        15.0, -30.0, 80.0, "Height of the camera above the subject's equator, where it is not estimated.", "deg", True
    )
    fov: float = _number(40.0, 5.0, 100.0, "Field of view; where cameras are estimated, what the estimate begins with.", "deg", True)


@dataclass(frozen=True)
class FitImages:
    """Splats from views that do not quite agree, by losses on images (IM-3D, section 3.3 and appendix A.1, whose numbers these are)."""

    start: int = _number(5000, 100, 100_000, "Gaussians at the start, around the centre.")
    splats: int = _number(20_000, 500, 2_000_000, "Gaussians in the finished model, at most.")
    iterations: int = _number(1200, 50, 100_000, "Optimisation steps, refinement by the video model included.")
    densify_every: int = _number(50, 10, 1000, "Steps between rounds of growing and pruning.", advanced=True)
    lpips_weight: float = _number(
        10.0, 0.0, 1000.0, "Weight of LPIPS, the distance between a network's features of the pictures.", advanced=True
    )
    ssim_weight: float = _number(0.2, 0.0, 1000.0, "Weight of multi-scale structural similarity.", advanced=True)
    mask_weight: float = _number(1.0, 0.0, 1000.0, "Weight of the silhouette.", advanced=True)
    l1_weight: float = _number(0.0, 0.0, 1000.0, "Weight of the pixels' absolute difference.", advanced=True)
    l2_weight: float = _number(
        0.0, 0.0, 1000.0, "Weight of the pixels' squared difference: what the paper compares against.", advanced=True
    )
    features: str = _choice(
        "auto",
        {
            "auto": "VGG16 if its weights are installed, else gradients of the pictures",
            "vgg16": "LPIPS as published (Zhang et al. 2018)",
            "kiln-features": "Kiln's own small feature network",
            "gradients": "Differences of the pictures' gradients at several scales",
        },
        "What compares pictures in place of pixels.",
        True,
    )
    device: str = _choice("auto", DEVICES, "Where the fit runs.", True)


@dataclass(frozen=True)
class Iterate:
    """Renders noised and denoised by the video model, and fitted again (IM-3D, section 3.4)."""

    rounds: int = _number(2, 0, 10, "How often the renders go back to the video model.")
    steps: int = _number(10, 1, 100, "Denoising steps of each round, at most: kiln-tiny-turntable takes one.")
    strength: float = _number(0.5, 0.05, 1.0, "How much noise the renders get: the share of the schedule that is run again.", advanced=True)


@dataclass(frozen=True)
class RefineSurface:
    """The surface moved by the views, as a deformable tetrahedral grid (IM-3D, appendix A.5; Shen et al. 2021, DMTet)."""

    on: bool = _flag(False, "Optimise the surface against the views after marching cubes.")
    iterations: int = _number(150, 20, 10_000, "Optimisation steps, one view each.", advanced=True)
    grid: int = _number(48, 12, 256, "Cubes of the tetrahedral grid across a ball with as much surface as the subject.", advanced=True)


@dataclass(frozen=True)
class Placing:
    """Where the finished asset stands: a picture tells no size."""

    size: float = _number(1.0, 0.001, 1000.0, "Longest side of the asset.", "m")


ENGINES = {
    "none": "No file for a game engine",
    "gltf": "Any reader of glTF 2.0: levels by MSFT_lod, hulls as nodes NAME-collision-01",
    "godot": "Godot 4: hulls become collision shapes; it makes its own levels and passes over the file's",
    "unity": "Unity: levels NAME_LOD0, NAME_LOD1, ... make a LOD Group, of an FBX; hulls NAME_Collider_01",
    "unreal": "Unreal Engine 5: hulls UCX_NAME_01 become the mesh's collision; Nanite takes the first level",
}
PIVOTS = {
    "base": "The middle of the underside: it stands where it is put",
    "centre": "The middle of the box around it",
    "source": "The source object's own origin, or the base where that is not known",
    "world": "The scene's origin",
}


UPS = {"y": "Y up, as glTF says and engines expect", "z": "Z up, against glTF, for tools that do not turn it"}


@dataclass(frozen=True)
class Game:
    """game.glb beside mesh.glb: the mesh with further levels of detail, collision hulls, one material, names and axes as an engine wants
    them."""

    engine: str = _choice("none", ENGINES, "For which engine names and hulls are written.")
    name: str = _text(100, "The asset's name in the file; {name} stands for the job's own.", default="{name}")
    lods: int = _number(3, 0, 6, "Levels of detail beyond the mesh itself.")
    lod_ratio: float = _number(0.5, 0.05, 0.95, "Triangles of a level as a share of the level before.")
    lod_sizes: str = _text(
        100,
        "Shares of the screen's height below which each next level is shown, and nothing below the last if there is one more, as"
        " 0.5 0.2 0.1; empty: where the level's error is a pixel of 1080.",
        True,
    )
    hulls: int = _number(16, 0, 64, "Convex collision hulls, at most; fewer where these come within a twentieth of the volume.")
    pivot: str = _choice("base", PIVOTS, "What lies at the origin.")
    up: str = _choice("y", UPS, "Which axis of the file points up.", True)
    scale: float = _number(1.0, 0.0001, 10_000.0, "Units of the file for a metre.", advanced=True)
    channels: int = _number(
        12,
        3,
        12,
        "8-bit texture channels over all maps: colour 3, opacity 1, normals 3, roughness and metallic 2, emission 3 are kept in this order"
        " while they fit.",
        advanced=True,
    )


def lod_sizes(game: Game) -> list[float]:
    """The shares of the screen's height at which each level ends (0: never), by `game.lod_sizes`; empty if it is. Raises
    `KilnError("bad-parameter")`."""
    words = game.lod_sizes.replace(",", " ").replace(";", " ").split()
    if not words:
        return []
    try:
        sizes = [float(word) for word in words]
    except ValueError:
        sizes = []
    falling = all(one > other for one, other in zip(sizes, sizes[1:]))
    if len(sizes) not in (game.lods, game.lods + 1) or not falling or not all(0 <= one <= 1 for one in sizes):
        allowed = (
            f"{game.lods} falling numbers from 0 to 1, one where each next level of game.lods begins, and one more for the last's end."
        )
        raise KilnError("bad-parameter", f"game.lod_sizes cannot be {game.lod_sizes!r}.", f"Allowed: {allowed}")
    return sizes if len(sizes) > game.lods else [*sizes, 0.0]


@dataclass(frozen=True)
class Reconstruct:
    """Renders of an object -> splats -> surface -> textured mesh."""

    NAME: ClassVar[str] = "reconstruct"
    TITLE: ClassVar[str] = "Reconstruct"
    INPUT: ClassVar[str] = "views"  # what a job of this recipe uploads; SPEC.md says which files
    WEIGHTS: ClassVar[tuple[str, ...]] = ()
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "draft": {
            "capture.views": 16, "capture.size": 256, "fit.splats": 8000, "fit.iterations": 300,
            "surface.grid": 112, "surface.faces": 5000, "texture.size": 512,
        },
        "standard": {},
        "high": {
            "capture.views": 48, "capture.size": 1024, "fit.splats": 60_000, "fit.iterations": 3000,
            "surface.grid": 384, "surface.faces": 80_000, "texture.size": 2048,
        },
    }  # fmt: skip

    capture: Capture = Capture()
    fit: Fit = Fit()
    surface: Surface = Surface()
    texture: Texture = Texture()
    game: Game = Game()
    seed: int = _number(0, 0, 2**31 - 1, "Start of every random draw: same seed, same device, same result.", advanced=True)


@dataclass(frozen=True)
class MeshSplats:
    """Gaussian splats from any tool -> surface -> textured mesh."""

    NAME: ClassVar[str] = "mesh_splats"
    TITLE: ClassVar[str] = "Mesh from Splats"
    INPUT: ClassVar[str] = "splats"
    WEIGHTS: ClassVar[tuple[str, ...]] = ()
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "draft": {"look.count": 24, "look.size": 256, "surface.grid": 112, "surface.faces": 5000, "texture.size": 512},
        "standard": {},
        "high": {"look.count": 96, "look.size": 1024, "surface.grid": 384, "surface.faces": 80_000, "texture.size": 2048},
    }

    subject: Subject = Subject()
    look: Look = Look()
    surface: Surface = Surface()
    texture: Texture = Texture()
    game: Game = Game()


@dataclass(frozen=True)
class Animate:
    """Renders of a moving object -> motion and dynamic splats -> surface carried through time -> keyframed mesh."""

    NAME: ClassVar[str] = "animate"
    TITLE: ClassVar[str] = "Animate"
    INPUT: ClassVar[str] = "motion"
    WEIGHTS: ClassVar[tuple[str, ...]] = ()
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "draft": {
            "capture.views": 6, "capture.size": 128, "fit.splats": 5000, "fit.iterations": 1000, "fit.nodes": 150,
            "surface.grid": 96, "surface.faces": 4000, "texture.size": 512,
        },
        "standard": {},
        "high": {
            "capture.views": 12, "capture.cameras": 36, "capture.size": 512, "fit.splats": 30_000, "fit.iterations": 12_000,
            "fit.nodes": 600, "surface.grid": 256, "surface.faces": 30_000, "texture.size": 2048,
        },
    }  # fmt: skip

    capture: CaptureMotion = CaptureMotion()
    fit: FitMotion = FitMotion()
    surface: Surface = Surface(grid=160, faces=10_000)
    texture: Texture = Texture()
    armature: Armature = Armature()
    seed: int = _number(0, 0, 2**31 - 1, "Start of every random draw: same seed, same device, same result.", advanced=True)


@dataclass(frozen=True)
class Im3d:
    """A picture or a text -> turntable video -> splats fitted with image losses -> renders fed back to the video model -> textured mesh."""

    NAME: ClassVar[str] = "im3d"
    TITLE: ClassVar[str] = "Picture to 3D"
    INPUT: ClassVar[str] = "picture"
    WEIGHTS: ClassVar[tuple[str, ...]] = ("generate.model",)  # parameters that name weights
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "draft": {
            "generate.steps": 12, "iterate.rounds": 1, "iterate.steps": 6, "fit.splats": 8000, "fit.iterations": 600,
            "surface.grid": 96, "surface.faces": 5000, "texture.size": 512,
        },
        "standard": {},
        "high": {
            "fit.splats": 60_000, "fit.iterations": 2400, "surface.grid": 256, "surface.faces": 40_000, "texture.size": 2048,
            "refine.on": True,
        },
    }  # fmt: skip

    generate: Generate = Generate()
    orbit: Orbit = Orbit()
    fit: FitImages = FitImages()
    iterate: Iterate = Iterate()
    surface: Surface = Surface(grid=128, faces=10_000)
    refine: RefineSurface = RefineSurface()
    texture: Texture = Texture()
    placing: Placing = Placing()
    game: Game = Game()
    seed: int = _number(0, 0, 2**31 - 1, "Start of every random draw: same seed, same device, same result.", advanced=True)


RECIPES: dict[str, Any] = {recipe.NAME: recipe for recipe in (Reconstruct, Animate, Im3d, MeshSplats)}


def recipe_named(name: str) -> Any:
    """The recipe class called `name`, or a `KilnError` that lists the recipes."""
    if name not in RECIPES:
        raise KilnError("bad-recipe", f"There is no recipe {name!r}.", f"Recipes: {', '.join(RECIPES)}.")
    return RECIPES[name]


def parameters(recipe: Any) -> list[Parameter]:
    """Every parameter of a recipe class, in the order of its definition, under its flat name."""
    found = []
    for entry in dataclasses.fields(recipe):
        if dataclasses.is_dataclass(entry.default):
            for inner in dataclasses.fields(entry.default):  # a recipe may want another default than its part has
                found.append(_parameter(f"{entry.name}.{inner.name}", inner, getattr(entry.default, inner.name)))
        else:
            found.append(_parameter(entry.name, entry, entry.default))
    return found


def _parameter(name: str, entry: dataclasses.Field, default: Any) -> Parameter:
    return Parameter(name=name, type=type(default), default=default, **entry.metadata)


def make(name: str, values: dict[str, Any] | None = None, preset: str = "standard"):
    """A recipe instance from flat values over a preset. Unknown names and bad values raise `KilnError("bad-parameter")`."""
    recipe = recipe_named(name)
    if preset not in recipe.PRESETS:
        raise KilnError("bad-parameter", f"{name} has no preset {preset!r}.", f"Presets: {', '.join(recipe.PRESETS)}.")
    known = {p.name: p for p in parameters(recipe)}
    chosen = {**recipe.PRESETS[preset], **(values or {})}
    for given in chosen:
        if given not in known:
            raise KilnError("bad-parameter", f"{name} has no parameter {given!r}.", f"Parameters: {', '.join(known)}.")
    groups: dict[str, Any] = {}
    for flat_name, value in chosen.items():
        group, _, inner = flat_name.rpartition(".")
        groups.setdefault(group, {})[inner] = known[flat_name].check(value)
    top = groups.pop("", {})
    defaults: dict[str, Any] = {entry.name: entry.default for entry in dataclasses.fields(recipe)}
    made = recipe(**top, **{group: dataclasses.replace(defaults[group], **inner) for group, inner in groups.items()})
    if hasattr(made, "game"):
        lod_sizes(made.game)
    return made


def values(recipe: Any) -> dict[str, Any]:
    """The flat values of a recipe instance: what goes over the wire, into reports and into an asset's provenance."""
    found = {}
    for parameter in parameters(type(recipe)):
        owner = getattr(recipe, parameter.group) if "." in parameter.name else recipe
        found[parameter.name] = getattr(owner, parameter.name.rpartition(".")[2])
    return found


def reference() -> str:
    """The reference table of every recipe, as Markdown: docs/recipes.md holds it."""
    lines = ["# Recipes", "", "Made from `protocol/recipes.py` by `python -m protocol.recipes`; a test keeps it current."]
    for recipe in RECIPES.values():
        presets = [preset for preset in recipe.PRESETS if preset != "standard"]
        lines += ["", f"## {recipe.NAME}", "", (recipe.__doc__ or "").strip(), ""]
        lines += [f"| parameter | standard | {' | '.join(presets)} | allowed | what it does |", "|---" * (len(presets) + 4) + "|"]
        for parameter in parameters(recipe):
            others = [recipe.PRESETS[preset].get(parameter.name, parameter.default) for preset in presets]
            shown = " | ".join(_shown(value) for value in (recipe.PRESETS["standard"].get(parameter.name, parameter.default), *others))
            help = parameter.help + "".join(f"<br>`{name}`: {meaning}." for name, meaning in parameter.options)
            lines.append(f"| `{parameter.name}` | {shown} | {_allowed(parameter)} | {help} |")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return "on" if value is True else "off" if value is False else f"{value}"


def _allowed(parameter: Parameter) -> str:
    if parameter.options:
        return ", ".join(name for name, _ in parameter.options)
    if parameter.type is str:
        return f"text of at most {parameter.high:.0f} characters"
    return "on, off" if parameter.type is bool else f"{parameter.low:.12g} to {parameter.high:.12g} {parameter.unit}".strip()


if __name__ == "__main__":
    print(reference(), end="")
