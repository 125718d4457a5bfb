"""Pictures of one subject with exact cameras, loaded from a folder in the `transforms.json` layout that NeRF tools share.

SPEC.md ("Views") describes the files. Behind this loader everything lives in the *unit frame*: the world moved and scaled so that what all
cameras see together is the unit sphere. `Frame` takes results back.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from scipy.ndimage import binary_dilation

from backend.progress import Progress, silent
from protocol.errors import KilnError

from .cameras import OPENCV_FROM_OPENGL, Camera

LARGEST_SIDE = 8192  # pixels
DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")  # of lenses, as COLMAP and nerfstudio write it
PINHOLES = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV")  # OPENCV without distortion is one too
MOST_VIEWS = 500
BRIGHTEST = 10_000.0  # of emission: what float16 holds, and some to spare
MOST_PIXELS = 500_000_000  # over all views: about 14 GB with depth, normals and material
HULL_GRID, HULL_PIXELS = 32, 64  # cells along each side, and pixels across a silhouette, to see whether the views fit together
HULL_VOTES = 0.9  # share of the views whose silhouettes must hold a cell of the hull
EXPLAINED = 0.9  # of a silhouette, by the hull, on average: 1 where views agree, 0.3 to 0.95 where half of them show something else


@dataclass(frozen=True)
class Frame:
    """`unit = (world - centre) * scale`; world in metres, Z up."""

    centre: Float[np.ndarray, "3"]
    scale: float

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


def load(folder: Path, progress: Progress = silent) -> Views:
    """The views of `folder/transforms.json`, held-out ones last, or `KilnError("bad-input")` that names the file and what is wrong."""
    table = _read_table(folder)
    numbered = [(f"View {number} ({frame.get('file_path', 'no file_path')})", frame) for number, frame in enumerate(table["frames"])]
    numbered.sort(key=lambda one: one[1].get("split", "train") != "train")  # then parts of the arrays need no copy (`Views.subset`)
    names, frames = [name for name, _ in numbered], [frame for _, frame in numbered]
    holdout = np.array([frame.get("split", "train") != "train" for frame in frames], bool)
    if (~holdout).sum() < 3:
        raise KilnError(
            "bad-input", f"{len(frames)} views are too few.", "Give at least 3 views from different sides, 16 or more for a good result."
        )
    width, height = _size(folder, frames[0], names[0])
    if width * height * len(frames) > MOST_PIXELS:
        raise KilnError(
            "bad-input",
            f"{len(frames)} views of {width} x {height} pixels are too much to hold in memory.",
            f"At most {MOST_PIXELS // 1_000_000} million pixels over all views: give fewer or smaller ones.",
        )
    has_geometry = all("geometry_file_path" in frame for frame in frames)
    images, alpha = np.empty((len(frames), height, width, 3), np.float32), np.empty((len(frames), height, width), np.float32)
    depth, normals = (np.empty_like(alpha), np.empty(images.shape, np.float16)) if has_geometry else (None, None)
    has_material = all("material_file_path" in frame for frame in frames)
    material, emission = np.empty(images.shape, np.uint8) if has_material else None, None
    cameras = []
    for number, (frame, where) in enumerate(zip(frames, names, strict=True)):
        progress(number / len(frames), f"view {number + 1} of {len(frames)}")
        if _size(folder, frame, where) != (width, height):
            raise KilnError("bad-input", f"{where} has another size than view 0.", "Render all views at one size.")
        images[number], alpha[number] = _read_image(folder, frame, where)
        cameras.append(_camera({**table, **frame}, width, height, where))
        if depth is not None and normals is not None:
            depth[number], normals[number] = _read_geometry(folder, frame, (height, width), where)
        if material is not None:
            material[number], light = _read_material(folder, frame, (height, width), where)
            if light is not None:
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
    unit = _unit_frame(cameras)
    if depth is not None:
        depth *= np.float32(unit.scale)
    moved = [camera.moved(unit.centre, unit.scale) for camera in cameras]
    _check_silhouettes([camera for camera, kept in zip(moved, holdout, strict=True) if not kept], alpha[: int((~holdout).sum())])
    return Views(moved, images, alpha, depth, normals, holdout, unit, material, emission)


def _check_silhouettes(cameras: list[Camera], alpha: Float[np.ndarray, "v h w"]) -> None:
    """Refuses views that cannot show one subject: the visual hull of their silhouettes (Laurentini 1994), coarse and with slack, leaves
    much of the silhouettes empty."""
    axis = (np.arange(HULL_GRID) + 0.5) / HULL_GRID * 2 - 1
    cells = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
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
            "bad-input", "The views do not show one subject: their silhouettes do not fit together.",
            "Check that each picture has its own camera, and that alpha shows the same subject in all of them.",
        )  # fmt: skip


def _read_table(folder: Path) -> dict:
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
    if len(table["frames"]) > MOST_VIEWS:
        raise KilnError("bad-input", f"{len(table['frames'])} views are too many.", f"At most {MOST_VIEWS}.")
    return table


def _inside(folder: Path, name: object, where: str) -> Path:
    path = (folder / str(name)).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise KilnError("bad-input", f"{where} names a file outside its folder.", "Use paths relative to transforms.json.")
    return path


def _picture(folder: Path, frame: dict, where: str) -> Path:
    path = _inside(folder, frame.get("file_path", ""), where)
    return path if path.suffix else path.with_suffix(".png")  # the original NeRF scenes leave it out


def _size(folder: Path, frame: dict, where: str) -> tuple[int, int]:
    """Width and height, from the file's header alone."""
    try:
        with Image.open(_picture(folder, frame, where)) as picture:
            width, height = picture.size
    except Image.DecompressionBombError:  # Pillow's limit comes before ours: 180 million pixels
        raise KilnError("bad-input", f"{where} is larger than any view can be.", f"At most {LARGEST_SIDE} pixels a side.") from None
    except (OSError, ValueError) as error:
        raise KilnError("bad-input", f"{where} cannot be read: {error}.", "Save it again as PNG.") from None
    if max(width, height) > LARGEST_SIDE:
        raise KilnError("bad-input", f"{where} is {width} x {height} pixels.", f"At most {LARGEST_SIDE} a side.")
    return width, height


def _read_image(folder: Path, frame: dict, where: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        with Image.open(_picture(folder, frame, where)) as picture:
            pixels = np.asarray(picture.convert("RGBA"), np.float32)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise KilnError("bad-input", f"{where} cannot be read: {error}.", "Save it again as PNG.") from None
    pixels /= np.float32(255)
    return pixels[..., :3], pixels[..., 3]


def _read_geometry(folder: Path, frame: dict, shape: tuple[int, int], where: str) -> tuple[np.ndarray, np.ndarray]:
    arrays = _read_arrays(
        _inside(folder, frame["geometry_file_path"], where), ("depth", "normal"), shape, f"{where}: its depth and normals"
    )
    depth, normal = arrays["depth"], arrays["normal"]
    wrong = depth.shape != shape or normal.shape != (*shape, 3) or {depth.dtype.kind, normal.dtype.kind} != {"f"}
    if wrong or not np.isfinite(depth).all() or float(depth.min()) < 0 or not float(np.abs(normal).max()) < 2:
        raise KilnError("bad-input", f"{where}: its depth or normals have a wrong shape or values.", "Capture the views again.")
    return depth, normal


def _read_material(folder: Path, frame: dict, shape: tuple[int, int], where: str) -> tuple[np.ndarray, np.ndarray | None]:
    arrays = _read_arrays(_inside(folder, frame["material_file_path"], where), ("material",), shape, f"{where}: its material")
    material, emission = arrays["material"], arrays.get("emission")
    wrong = material.shape != (*shape, 3) or material.dtype != np.uint8
    if emission is not None:
        wrong = wrong or emission.shape != (*shape, 3) or emission.dtype.kind != "f"
        wrong = wrong or not (float(emission.min()) >= 0 and float(emission.max()) <= BRIGHTEST)  # neither is true of what is no number
    if wrong:
        raise KilnError("bad-input", f"{where}: its material has a wrong shape or values.", "Capture the views again.")
    return material, emission


def _read_arrays(path: Path, names: tuple[str, ...], shape: tuple[int, int], what: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, among them `names`."""
    largest = 3 * 8 * shape[0] * shape[1] + 4096  # bytes of three doubles a pixel and a header: what unpacks to more is no picture
    try:
        with zipfile.ZipFile(path) as packed:
            if any(entry.file_size > largest for entry in packed.infolist()):
                raise ValueError("its arrays are larger than the picture")
        with np.load(path, allow_pickle=False) as packed:
            arrays = {name: packed[name] for name in packed.files}
        return {**arrays, **{name: arrays[name] for name in names}}
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
