"""Pictures of one subject with exact cameras, loaded from a folder in the `transforms.json` layout that NeRF tools share.

SPEC.md ("Views") describes the files. Behind this loader everything lives in the *unit frame*: the world moved and scaled so that what all
cameras see together is the unit sphere. `Frame` takes results back.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy.typing import ArrayLike
from PIL import Image
from scipy.ndimage import binary_dilation

from backend.progress import Progress, silent
from protocol.errors import KilnError
from protocol.views import MOST_PIXELS, MOST_VIEWS

from .cameras import OPENCV_FROM_OPENGL, Camera

LARGEST_SIDE = 8192  # pixels
DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")  # of lenses, as COLMAP and nerfstudio write it
PINHOLES = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV")  # OPENCV without distortion is one too
BRIGHTEST = 10_000.0  # of emission: what float16 holds, and some to spare
MOST_LAYERS = 250  # views in one .npz file: the most that a recipe takes of a moment
HULL_GRID, HULL_PIXELS = 32, 64  # cells along each side, and pixels across a silhouette, to see whether the views fit together
HULL_VOTES = 0.9  # share of the views whose silhouettes must hold a cell of the hull
EXPLAINED = 0.9  # of a silhouette, by the hull, on average: 1 where views agree, 0.3 to 0.95 where half of them show something else


@dataclass(frozen=True)
class Frame:
    """`unit = (world - centre) * scale`; world in metres, Z up. pivot: the subject's own origin in the world, None if it is not known."""

    centre: Float[np.ndarray, "3"]
    scale: float
    pivot: Float[np.ndarray, "3"] | None = None

    def to_world(self, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
        return np.asarray(points, np.float64) / self.scale + self.centre


@dataclass(frozen=True)
class Views:
    """V pictures of H x W pixels of one subject, cameras in the unit frame.

    images: sRGB in [0, 1], straight alpha. holdout: views that no fit may use. What follows is None if the input has none, and 0 where
    nothing is. depth: unit-frame distance along the camera's axis. normals: world axes, unit length, with bump and normal maps; views from
    files have them as float16. material:
    roughness, metallic and opacity of the nearest surface in 255ths, not antialiased. emission: linear light that it gives off itself.
    """

    cameras: list[Camera]
    images: Float[np.ndarray, "v h w 3"]
    alpha: Float[np.ndarray, "v h w"]
    depth: Float[np.ndarray, "v h w"] | None
    normals: Float[np.ndarray, "v h w 3"] | None
    holdout: Bool[np.ndarray, "v"]
    frame: Frame
    material: UInt8[np.ndarray, "v h w 3"] | None = None
    emission: Float[np.ndarray, "v h w 3"] | None = None  # float16

    def __len__(self) -> int:
        return len(self.cameras)

    def subset(self, chosen: Bool[np.ndarray, "v"]) -> Views:
        """The views where `chosen` is true; their pictures are shared, not copied, where they follow one another."""
        places = np.flatnonzero(chosen)
        chosen = np.asarray(chosen, bool)
        run = slice(places[0], places[-1] + 1) if len(places) and np.ptp(places) == len(places) - 1 else chosen

        def part(values):
            return None if values is None else values[run]

        return Views(
            cameras=[camera for camera, keep in zip(self.cameras, chosen, strict=True) if keep],
            images=self.images[run],
            alpha=self.alpha[run],
            depth=part(self.depth),
            normals=part(self.normals),
            holdout=self.holdout[run],
            frame=self.frame,
            material=part(self.material),
            emission=part(self.emission),
        )

    @property
    def for_fitting(self) -> Views:
        return self.subset(~self.holdout)

    @property
    def for_scoring(self) -> Views:
        return self.subset(self.holdout)

    def on_black(self) -> Float[np.ndarray, "v h w 3"]:
        """The pictures composed on black: what PSNR is measured on."""
        return self.images * self.alpha[..., None]


class Entry(NamedTuple):
    """What `transforms.json` says of one view."""

    where: str  # the view in words
    values: dict

    @property
    def held_out(self) -> bool:
        return self.values.get("split", "train") != "train"


def load(folder: Path, progress: Progress = silent) -> Views:
    """The views of `folder/transforms.json`, held-out ones last, or `KilnError("bad-input")` that names the file and what is wrong."""
    table, entries = read_table(folder)
    entries.sort(key=lambda entry: entry.held_out)  # then parts of the arrays need no copy (`Views.subset`)
    if sum(not entry.held_out for entry in entries) < 3:
        raise KilnError(
            "bad-input", f"{len(entries)} views are too few.", "Give at least 3 views from different sides, 16 or more for a good result."
        )
    views = in_unit_frame(read(folder, table, entries, progress))
    fitted = views.for_fitting
    check_silhouettes(fitted.cameras, fitted.alpha)
    return views


def read(folder: Path, table: dict, entries: list[Entry], progress: Progress = silent) -> Views:
    """The views of these entries in their order, in the world's frame: metres. Raises as `load` does."""
    holdout = np.array([entry.held_out for entry in entries], bool)
    width, height = _size(folder, entries[0])
    if width * height * len(entries) > MOST_PIXELS:
        raise KilnError(
            "bad-input",
            f"{len(entries)} views of {width} x {height} pixels are too much to hold in memory.",
            f"At most {MOST_PIXELS // 1_000_000} million pixels over all views: give fewer or smaller ones.",
        )
    has_geometry = all("geometry_file_path" in entry.values for entry in entries)
    shape = (len(entries), height, width)
    images, alpha = np.empty((*shape, 3), np.float32), np.empty(shape, np.float32)
    depth, normals = (np.empty_like(alpha), np.empty(images.shape, np.float16)) if has_geometry else (None, None)
    has_material = all("material_file_path" in entry.values for entry in entries)
    material, emission = np.empty(images.shape, np.uint8) if has_material else None, None
    cameras, files = [], _Arrays(folder, (height, width))
    for number, entry in enumerate(entries):
        progress(number / len(entries), f"view {number + 1} of {len(entries)}")
        if _size(folder, entry) != (width, height):
            raise KilnError("bad-input", f"{entry.where} has another size than view 0.", "Render all views at one size.")
        images[number], alpha[number] = _read_image(folder, entry)
        cameras.append(_camera({**table, **entry.values}, width, height, entry.where))
        if depth is not None and normals is not None:
            depth[number], normals[number] = _geometry(files, entry)
        if material is not None:
            material[number], light = _material(files, entry)
            if light is not None and light.any():
                emission = np.zeros(images.shape, np.float16) if emission is None else emission
                emission[number] = light
    if max(float(one.mean()) for one in alpha) < 1e-5:
        raise KilnError("bad-input", "All views are empty: alpha is 0 everywhere.", "Check that the object is visible in renders.")
    if float(alpha.min()) > 0.99:
        raise KilnError(
            "bad-input",
            "The pictures have no alpha: nothing tells the subject from the background.",
            "Save RGBA PNGs with a transparent background (in Blender: Render > Film > Transparent), or cut the subject out first.",
        )
    return Views(cameras, images, alpha, depth, normals, holdout, Frame(np.zeros(3), 1.0, _pivot(table)), material, emission)


def _pivot(table: dict) -> np.ndarray | None:
    if table.get("pivot") is None:
        return None
    try:
        pivot = np.array(table["pivot"], np.float64)
    except (TypeError, ValueError):
        pivot = np.empty(0)
    if pivot.shape != (3,) or not np.isfinite(pivot).all():
        words = f"The pivot in transforms.json is no point: {table['pivot']!r:.60}."
        raise KilnError("bad-input", words, "Write [x, y, z] in metres, or leave it out.")
    return pivot


def in_unit_frame(views: Views) -> Views:
    """The views of `read` moved and scaled so that what all cameras see together is the unit sphere. Their depth is scaled in place."""
    unit = _unit_frame(views.cameras)
    if views.depth is not None:
        np.multiply(views.depth, np.float32(unit.scale), out=views.depth)
    cameras = [camera.moved(unit.centre, unit.scale) for camera in views.cameras]
    return replace(views, cameras=cameras, frame=replace(unit, pivot=views.frame.pivot))


def check_silhouettes(
    cameras: list[Camera], alpha: Float[np.ndarray, "v h w"], low: ArrayLike = -1.0, high: ArrayLike = 1.0, when: str = ""
) -> None:
    """Refuses views that cannot show one subject: the visual hull of their silhouettes (Laurentini 1994), coarse and with slack, leaves
    much of the silhouettes empty. The hull is looked for between the corners `low` and `high`, (3,), in the unit frame."""
    axis = (np.arange(HULL_GRID) + 0.5) / HULL_GRID
    cells = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3) * np.subtract(high, low) + np.asarray(low)
    inside, seen = np.zeros(len(cells), np.int32), np.zeros(len(cells), np.int32)
    looks = []
    for camera, cover in zip(cameras, alpha, strict=True):
        step = max(1, max(cover.shape) // HULL_PIXELS)
        rows, columns = np.arange(0, cover.shape[0], step), np.arange(0, cover.shape[1], step)
        silhouette = np.maximum.reduceat(np.maximum.reduceat(cover, rows, 0), columns, 1) > 0.5
        pixels, depth = camera.project(cells)
        x, y = np.floor(np.clip(pixels / step, -1, max(silhouette.shape))).astype(int).T
        shown = (depth > 0) & (x >= 0) & (y >= 0) & (x < silhouette.shape[1]) & (y < silhouette.shape[0])
        places = y[shown], x[shown]
        inside[shown] += binary_dilation(silhouette, np.ones((3, 3)))[places]
        seen += shown
        looks.append((silhouette, shown, places))
    usable = seen >= len(cameras) / 2
    hull = usable & (inside >= HULL_VOTES * seen)
    explained = []
    for silhouette, shown, places in looks:
        filled, reached = np.zeros_like(silhouette), np.zeros_like(silhouette)
        reached[tuple(place[usable[shown]] for place in places)] = True
        filled[tuple(place[hull[shown]] for place in places)] = True
        countable = silhouette & reached  # what lies beyond the cells, no hull could explain
        if countable.any():
            explained.append((countable & binary_dilation(filled, np.ones((3, 3)))).sum() / countable.sum())
    if explained and float(np.mean(explained)) < EXPLAINED:
        raise KilnError(
            "bad-input", f"The views{when} do not show one subject: their silhouettes do not fit together.",
            "Check that each picture has its own camera, and that alpha shows the same subject in all of them.",
        )  # fmt: skip


def read_table(folder: Path, most: int = MOST_VIEWS) -> tuple[dict, list[Entry]]:
    """`transforms.json`, and its entries in its order."""
    path = folder / "transforms.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KilnError(
            "bad-input", f"There is no transforms.json in {folder.name}.", "Give a folder of views with their cameras."
        ) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise KilnError("bad-input", f"transforms.json is not valid JSON: {error}.", "Write the file again.") from None
    if not isinstance(table, dict) or not isinstance(table.get("frames"), list) or not all(isinstance(f, dict) for f in table["frames"]):
        raise KilnError("bad-input", "transforms.json has no list of frames.", "It needs a 'frames' list with one entry a view.")
    if len(table["frames"]) > most:
        raise KilnError("bad-input", f"{len(table['frames'])} views are too many.", f"At most {most}.")
    return table, [
        Entry(f"View {number} ({frame.get('file_path', 'no file_path')})", frame) for number, frame in enumerate(table["frames"])
    ]


def _inside(folder: Path, name: object, where: str) -> Path:
    path = (folder / str(name)).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise KilnError("bad-input", f"{where} names a file outside its folder.", "Use paths relative to transforms.json.")
    return path


def _picture(folder: Path, entry: Entry) -> Path:
    path = _inside(folder, entry.values.get("file_path", ""), entry.where)
    return path if path.suffix else path.with_suffix(".png")  # the original NeRF scenes leave it out


def _size(folder: Path, entry: Entry) -> tuple[int, int]:
    """Width and height, from the file's header alone."""
    where = entry.where
    try:
        with Image.open(_picture(folder, entry)) as picture:
            width, height = picture.size
    except Image.DecompressionBombError:  # Pillow's limit comes before ours: 180 million pixels
        raise KilnError("bad-input", f"{where} is larger than any view can be.", f"At most {LARGEST_SIDE} pixels a side.") from None
    except (OSError, ValueError) as error:
        raise KilnError("bad-input", f"{where} cannot be read: {error}.", "Save it again as PNG.") from None
    if max(width, height) > LARGEST_SIDE:
        raise KilnError("bad-input", f"{where} is {width} x {height} pixels.", f"At most {LARGEST_SIDE} a side.")
    return width, height


def _read_image(folder: Path, entry: Entry) -> tuple[np.ndarray, np.ndarray]:
    try:
        with Image.open(_picture(folder, entry)) as picture:
            pixels = np.asarray(picture.convert("RGBA"), np.float32)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise KilnError("bad-input", f"{entry.where} cannot be read: {error}.", "Save it again as PNG.") from None
    pixels /= np.float32(255)
    return pixels[..., :3], pixels[..., 3]


class _Arrays:
    """The .npz files of a folder of views. One that holds several views is read once if they follow one another."""

    def __init__(self, folder: Path, shape: tuple[int, int]):
        self.folder, self.shape = folder, shape
        self._path: Path | None = None
        self._arrays: dict[str, np.ndarray] = {}

    def of(self, entry: Entry, key: str, names: tuple[str, ...], what: str) -> dict[str, np.ndarray]:
        """The arrays of the file that the entry has under `key`, among them `names`: this view's alone."""
        path, layer = _inside(self.folder, entry.values[key], entry.where), entry.values.get("layer")
        if path != self._path or layer is None:
            layers = 1 if layer is None else MOST_LAYERS
            self._arrays = _read_arrays(path, layers * self.shape[0] * self.shape[1], f"{entry.where}: its {what}")
            self._path = path
        missing = [name for name in names if name not in self._arrays]
        if missing:
            raise KilnError("bad-input", f"{entry.where}: its {what} cannot be read: no {missing[0]} in it.", "Capture the views again.")
        if layer is None:
            return self._arrays
        if not isinstance(layer, int) or not all(array.ndim > 2 and 0 <= layer < len(array) for array in self._arrays.values()):
            raise KilnError("bad-input", f"{entry.where}: its {what} have no layer {layer!r:.20}.", "Capture the views again.")
        return {name: array[layer] for name, array in self._arrays.items()}


def _geometry(files: _Arrays, entry: Entry) -> tuple[np.ndarray, np.ndarray]:
    arrays = files.of(entry, "geometry_file_path", ("depth", "normal"), "depth and normals")
    depth, normal = arrays["depth"], arrays["normal"]
    wrong = depth.shape != files.shape or normal.shape != (*files.shape, 3) or {depth.dtype.kind, normal.dtype.kind} != {"f"}
    if wrong or not np.isfinite(depth).all() or float(depth.min()) < 0 or not float(np.abs(normal).max()) < 2:
        raise KilnError("bad-input", f"{entry.where}: its depth or normals have a wrong shape or values.", "Capture the views again.")
    return depth, normal


def _material(files: _Arrays, entry: Entry) -> tuple[np.ndarray, np.ndarray | None]:
    arrays = files.of(entry, "material_file_path", ("material",), "material")
    material, emission = arrays["material"], arrays.get("emission")
    wrong = material.shape != (*files.shape, 3) or material.dtype != np.uint8
    if emission is not None:
        wrong = wrong or emission.shape != (*files.shape, 3) or emission.dtype.kind != "f"
        wrong = wrong or not (float(emission.min()) >= 0 and float(emission.max()) <= BRIGHTEST)  # neither is true of what is no number
    if wrong:
        raise KilnError("bad-input", f"{entry.where}: its material has a wrong shape or values.", "Capture the views again.")
    return material, emission


def _read_arrays(path: Path, pixels: int, what: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file that shows at most so many pixels."""
    largest = 3 * 8 * pixels + 4096  # bytes of three doubles a pixel and a header: what unpacks to more is no picture
    try:
        with zipfile.ZipFile(path) as packed:
            if any(entry.file_size > largest for entry in packed.infolist()):
                raise ValueError("its arrays are larger than the picture")
        with np.load(path, allow_pickle=False) as packed:
            return {name: packed[name] for name in packed.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise KilnError("bad-input", f"{what} cannot be read: {error}.", "Capture the views again.") from None


def _camera(entry: dict, width: int, height: int, where: str) -> Camera:
    try:
        matrix = np.array(entry["transform_matrix"], np.float64)
        focal = 0.5 * width / np.tan(0.5 * float(entry["camera_angle_x"])) if "fl_x" not in entry else float(entry["fl_x"])
        fx, fy = focal, float(entry.get("fl_y", focal))
        cx, cy = float(entry.get("cx", width / 2)), float(entry.get("cy", height / 2))
        scale_x, scale_y = width / float(entry.get("w", width)), height / float(entry.get("h", height))
        bends = any(float(entry.get(name) or 0) != 0 for name in DISTORTION)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise KilnError(
            "bad-input", f"{where} has no usable camera: {error}.", "Each frame needs transform_matrix, and fl_x or camera_angle_x."
        ) from None
    if bends or entry.get("camera_model", "PINHOLE") not in PINHOLES:
        raise KilnError("bad-input", f"{where} has lens distortion.", "Undistort the pictures first, and give pinhole cameras.")
    rotation = matrix[:3, :3] if matrix.shape == (4, 4) else np.zeros((3, 3))
    usable = np.isfinite(matrix).all() and np.isfinite([fx, fy, cx, cy, scale_x, scale_y]).all() and min(fx, fy, scale_x, scale_y) > 0
    if not usable or not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3):
        raise KilnError(
            "bad-input", f"{where}: its transform_matrix is not a rotation and a place.", "Write camera-to-world matrices without scale."
        )
    if np.linalg.det(rotation) < 0:
        raise KilnError("bad-input", f"{where}: its transform_matrix mirrors the world.", "Write rotations: no axis may be negated alone.")
    left, _, right = np.linalg.svd(rotation)  # JSON rounds; camera matrices are inverted by transposing
    matrix[:3, :3] = left @ right
    camera_from_world = np.linalg.inv(matrix @ OPENCV_FROM_OPENGL)
    return Camera(width, height, fx * scale_x, fy * scale_y, cx * scale_x, cy * scale_y, camera_from_world)


def _unit_frame(cameras: list[Camera]) -> Frame:
    """The sphere that the cameras see whole: centre nearest to all optical axes, radius up to the side of the frustum that is narrowest but
    for a quarter of the cameras: close-ups do not shrink everybody's sphere."""
    axes = np.stack([camera.world_from_camera[:3, 2] for camera in cameras])
    eyes = np.stack([camera.centre for camera in cameras])
    across = np.eye(3) - axes[:, :, None] * axes[:, None, :]
    system = across.sum(0)
    if np.linalg.eigvalsh(system)[0] < 1e-6 * len(cameras):
        raise KilnError("bad-input", "All cameras look in one direction.", "Give views from different sides of the subject.")
    centre = np.linalg.solve(system, (across @ eyes[:, :, None]).sum(0)[:, 0])
    half = np.array([min(camera.width / camera.fx, camera.height / camera.fy) / 2 for camera in cameras])
    distance = np.linalg.norm(eyes - centre, axis=1)
    radius = float(np.quantile(distance * half / np.hypot(1.0, half), 0.25, method="lower"))
    if not radius > 0 or distance.min() <= radius:
        raise KilnError("bad-input", "The cameras do not stand around one subject.", "Let every camera look at the subject from outside.")
    return Frame(centre, 1.0 / radius)
