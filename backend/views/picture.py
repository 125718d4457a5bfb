"""A user's picture, read whatever it is stored as, and its subject in the middle of a square; and a folder of a user's own views.

What the file says of itself is heeded: colour profile, rotation, palette, transparency, 16 bits, CMYK. Sizes are checked before a pixel is
unpacked.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageCms, ImageOps

from backend.progress import Progress, silent
from protocol.errors import KilnError
from protocol.picture import LARGEST_SIDE, LEAST_VIEWS, SMALLEST_SIDE, SUFFIXES
from protocol.views import MOST_PIXELS, MOST_VIEWS

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000")
READABLE = "PNG, JPEG, WebP, TIFF, BMP or AVIF"
FRACTION = 0.85  # of the side, that the subject's longer side takes: what a turntable leaves for the parts that turn towards the camera
SMALLEST_SUBJECT = 16  # pixels, the longer side
_BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    AttributeError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True)
class Picture:
    """rgba: square, sRGB in [0, 1], straight alpha; the subject stands in the middle. note: a sentence on how it was cut out."""

    rgba: Float[np.ndarray, "s s 4"]
    note: str = ""

    def resized(self, size: int) -> Float[np.ndarray, "n n 4"]:
        """The picture with `size` pixels a side."""
        return self.rgba if size == len(self.rgba) else _scaled(self.rgba, (0, 0, len(self.rgba), len(self.rgba)), size)

    def on_white(self, size: int) -> Float[np.ndarray, "n n 3"]:
        """With `size` pixels a side, composed on white."""
        rgba = self.resized(size)
        return rgba[..., :3] * rgba[..., 3:] + (1 - rgba[..., 3:])


def centred(
    color: Float[np.ndarray, "h w 3"], alpha: Float[np.ndarray, "h w"], size: int, fraction: float, name: str
) -> Float[np.ndarray, "s s 4"]:
    """The subject in the middle of a square of `size` pixels, its longer side `fraction` of that.

    Raises `KilnError("bad-input")` if it is too small in the picture `name`.
    """
    left, top, side = _frame(alpha, fraction, name)
    return _scaled(np.dstack([color, alpha]), (left, top, left + side, top + side), size)


def load_turntable(folder: Path, progress: Progress = silent) -> tuple[Float[np.ndarray, "k s s 3"], Float[np.ndarray, "k s s"] | None]:
    """The pictures of a folder in the order of the numbers in their names, float32 sRGB, and their alpha, None where they have none.

    Pictures that are not square get margins: transparent ones, or of their border's colours. With alpha the colours are straight.
    `KilnError("bad-input")` for fewer than four, different sizes, and whatever cannot be read.
    """
    folder = Path(folder)
    paths = sorted((path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")), key=_by_number)
    if not LEAST_VIEWS <= len(paths) <= MOST_VIEWS:
        raise KilnError(
            "bad-input",
            f"{len(paths)} pictures in {folder.name} are too {'few' if len(paths) < LEAST_VIEWS else 'many'} for a turntable.",
            f"Give {LEAST_VIEWS} to {MOST_VIEWS} views of one turn, named view_000.png, view_001.png and so on; 16 are a good number.",
        )
    frames, covers, first = [], [], (0, 0)
    for number, path in enumerate(paths):
        progress(number / len(paths), f"view {number + 1} of {len(paths)}")
        color, alpha = read(path)
        if number == 0:
            first = color.shape[:2]
            if first[0] * first[1] * len(paths) > MOST_PIXELS:
                raise KilnError(
                    "bad-input",
                    f"{len(paths)} views of {first[1]} x {first[0]} pixels are too much to hold in memory.",
                    f"At most {MOST_PIXELS // 1_000_000} million pixels over all views: give fewer or smaller ones.",
                )
        if color.shape[:2] != first:
            raise KilnError(
                "bad-input",
                f"{path.name} is {color.shape[1]} x {color.shape[0]} pixels, but {paths[0].name} {first[1]} x {first[0]}.",
                "All views need one size.",
            )
        frames.append(color)
        covers.append(alpha)
    colors = _squared(np.stack(frames), "edge")
    if all(cover is None for cover in covers):
        return colors, None
    covers = [np.ones(first, np.float32) if cover is None else cover for cover in covers]
    return colors, _squared(np.stack(covers), "constant")


def read(path: Path, most: int = LARGEST_SIDE) -> tuple[Float[np.ndarray, "h w 3"], Float[np.ndarray, "h w"] | None]:
    """sRGB in [0, 1], straight, upright, and alpha, None if it says nothing. most: pixels of the longer side that are wanted; larger
    pictures come reduced. Raises `KilnError("bad-input")` as `prepare` does."""
    with _opened(path) as picture:
        try:
            return _pixels(picture, most)
        except (*_BROKEN, Image.DecompressionBombError) as error:
            raise KilnError(
                "bad-input", f"{path.name} cannot be read: {_plain(error)}.", "The file may be damaged: save it again."
            ) from None
        except MemoryError:
            raise KilnError("bad-input", f"{path.name} does not fit into memory.", "Scale it down; 1024 pixels suffice.") from None


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture with only its header read, its size allowed."""
    allowed = f"Between {SMALLEST_SIDE} and {LARGEST_SIDE} pixels a side are allowed; 512 to 2048 are a good size."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            picture = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        raise KilnError("bad-input", f"{path.name} has more than {LARGEST_SIDE} x {LARGEST_SIDE} pixels.", allowed) from None
    except FileNotFoundError:
        raise KilnError("bad-input", f"There is no picture {path.name}.", "Choose a picture file.") from None
    except _BROKEN as error:
        reason = "" if isinstance(error, Image.UnidentifiedImageError) else f" ({_plain(error)})"
        raise KilnError("bad-input", f"{path.name} is no picture that Kiln can read{reason}.", f"Give {READABLE}.") from None
    with picture:
        width, height = picture.size
        if max(width, height) > LARGEST_SIDE or min(width, height) < SMALLEST_SIDE:
            wrong = "large" if max(width, height) > LARGEST_SIDE else "small"
            raise KilnError("bad-input", f"{path.name} is {width} x {height} pixels: too {wrong}.", allowed)
        yield picture


def _pixels(picture: Image.Image, most: int) -> tuple[np.ndarray, np.ndarray | None]:
    if max(picture.size) > most:
        picture.draft(None, (most, most))  # a JPEG unpacks to a half, a quarter or an eighth at no cost
    profile = picture.info.get("icc_profile")
    picture.load()
    picture = ImageOps.exif_transpose(_without_bad_exif(picture))
    if max(picture.size) > 2 * most:
        picture = picture.reduce(max(picture.size) // most)
    if picture.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I", "F"):
        grey = np.asarray(picture).astype(np.float32)
        grey = np.nan_to_num(grey) / _white_of(picture.mode, float(np.nan_to_num(grey).max(initial=0)))
        return np.repeat(np.clip(grey, 0, 1)[..., None], 3, 2), None
    alpha = None
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        alpha = np.asarray(picture.getchannel("A"), np.float32) / np.float32(255)
        picture = picture.convert("RGB")
    elif picture.mode in ("P", "1", "HSV", "YCbCr"):
        picture = picture.convert("RGB")
    picture = _in_srgb(picture, profile)
    color = np.asarray(picture.convert("RGB"), np.float32) / np.float32(255)
    if alpha is not None and float((alpha < 0.99).mean()) < 1e-4:
        alpha = None
    return color, alpha


def _without_bad_exif(picture: Image.Image) -> Image.Image:
    """The picture, told to be upright if what its EXIF block says of that cannot be read."""
    try:
        picture.getexif().get(0x0112)
    except _BROKEN:
        plain = picture.copy()
        plain.info.pop("exif", None)
        return plain
    return picture


def _white_of(mode: str, largest: float) -> float:
    """The value of white in a picture of one channel of more than 8 bits, which may hold less than its type could."""
    if mode == "F":
        return max(largest, 1.0)
    return 65535.0 if largest <= 65535 else 2.0**32 - 1 if largest > 2**31 - 1 else 2.0**31 - 1


def _in_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Converted by the profile that came with the picture; one that is damaged or belongs to other channels is as good as none."""
    spaces = {"RGB": "RGB", "CMYK": "CMYK", "L": "GRAY", "LAB": "Lab"}
    if not profile or picture.mode not in spaces:
        return picture
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != spaces[picture.mode]:
            return picture
        return ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB") or picture
    except (ImageCms.PyCMSError, *_BROKEN):
        return picture


def _frame(alpha: np.ndarray, fraction: float, name: str) -> tuple[float, float, float]:
    """Left, top and side of the square, in pixels, in which the subject's longer side takes `fraction`."""
    seen = alpha > 0.1
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    bottom, right = rows[-1] + 1, columns[-1] + 1
    longer = max(bottom - rows[0], right - columns[0])
    if longer < SMALLEST_SUBJECT:
        raise KilnError(
            "bad-input", f"The object in {name} is only {longer} pixels large.", "Give a larger picture, or one taken from nearer."
        )
    side = float(longer / fraction)
    return (columns[0] + right - side) / 2, (rows[0] + bottom - side) / 2, side


def _scaled(rgba: np.ndarray, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """A part of the picture, which may reach beyond it, at `size` pixels a side. Filtered with alpha multiplied in: what is transparent has
    no colour to give."""
    margin = int(np.ceil(max(0.0, -box[0], -box[1], box[2] - rgba.shape[1], box[3] - rgba.shape[0])))
    pieces = np.pad(np.dstack([rgba[..., :3] * rgba[..., 3:], rgba[..., 3]]), ((margin, margin), (margin, margin), (0, 0))).astype(
        np.float32
    )
    window = (box[0] + margin, box[1] + margin, box[2] + margin, box[3] + margin)
    filter = Image.Resampling.LANCZOS
    planes = [
        np.asarray(Image.fromarray(np.ascontiguousarray(pieces[..., channel]), "F").resize((size, size), filter, box=window))
        for channel in range(4)
    ]
    cover = np.clip(planes[3], 0, 1)
    color = np.stack(planes[:3], -1) / np.maximum(cover, 1e-3)[..., None]
    return np.dstack([np.clip(color, 0, 1), cover]).astype(np.float32)


def _squared(pictures: np.ndarray, mode: str) -> np.ndarray:
    """With margins at both sides of the shorter side."""
    height, width = pictures.shape[1:3]
    side = max(height, width)
    if height == width:
        return pictures
    above, left = (side - height) // 2, (side - width) // 2
    margins = ((0, 0), (above, side - height - above), (left, side - width - left), *(((0, 0),) if pictures.ndim == 4 else ()))
    return np.pad(pictures, margins, "edge" if mode == "edge" else "constant")


def _by_number(path: Path) -> list:
    """view_2 before view_10."""
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", path.name)]


def _plain(error: BaseException) -> str:
    return str(error).rstrip(".") or type(error).__name__
