"""A user's picture: whatever it is stored as, its subject comes out upright, in sRGB, cut out, centred; and a sentence for what is none."""

import io
import math
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from scipy.ndimage import gaussian_filter

from backend.diffusion.matte import prepare
from backend.views.picture import FRACTION, LARGEST_SIDE, load_turntable, read
from protocol.errors import KilnError

ORANGE, BLUE = (230, 120, 20), (20, 60, 200)


def arrow(height=120, width=160, behind=(255, 255, 255)):
    """A subject that tells left from right and up from down: an orange block with a blue square at its upper left corner."""
    picture = np.full((height, width, 3), behind, np.uint8)
    picture[30:90, 50:110] = ORANGE
    picture[30:50, 50:70] = BLUE
    return picture


def colors_of(picture):
    """The colours in the middle of the upper left corner, and of the block, of a prepared picture."""
    size = len(picture.rgba)
    corner, middle = round(size * (0.5 - FRACTION / 3)), round(size * 0.65)
    return picture.rgba[corner, corner, :3] * 255, picture.rgba[middle, middle, :3] * 255


def is_the_arrow(picture, within=4.0):
    blue, orange = colors_of(picture)
    assert np.abs(blue - BLUE).max() <= within and np.abs(orange - ORANGE).max() <= within


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp"])
def test_formats(tmp_path, suffix):
    Image.fromarray(arrow()).save(tmp_path / f"a{suffix}", **({"quality": 95, "subsampling": 0} if suffix == ".jpg" else {}))
    is_the_arrow(prepare(tmp_path / f"a{suffix}", size=128), 12 if suffix in (".jpg", ".webp") else 2)


def test_palette_with_transparency(tmp_path):
    picture = Image.fromarray(arrow(behind=(0, 255, 0))).quantize(4)
    picture.save(tmp_path / "a.png", transparency=picture.getpixel((0, 0)))
    prepared = prepare(tmp_path / "a.png", size=128)
    is_the_arrow(prepared)
    assert "transparency" in prepared.note and prepared.rgba[2, 2, 3] == 0


def test_cmyk(tmp_path):
    Image.fromarray(arrow()).convert("CMYK").save(tmp_path / "a.jpg", quality=98, subsampling=0)
    is_the_arrow(prepare(tmp_path / "a.jpg", size=128), 8)


def test_sixteen_bits(tmp_path):
    grey = arrow()[..., 0].astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "a.png")
    color, alpha = read(tmp_path / "a.png")
    assert alpha is None and np.abs(color - grey[..., None] / 65535).max() < 1e-6
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in arrow().astype(np.uint16) * 257)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 160, 120, 16, 2, 0, 0, 0)
    (tmp_path / "rgb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    is_the_arrow(prepare(tmp_path / "rgb.png", size=128), 2)


@pytest.mark.parametrize("turn", [3, 6, 8, 5])
def test_pictures_are_turned_as_the_camera_was_held(tmp_path, turn):
    back = {3: lambda p: p[::-1, ::-1], 6: lambda p: np.rot90(p), 8: lambda p: np.rot90(p, -1), 5: lambda p: p.transpose(1, 0, 2)}[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(np.ascontiguousarray(back(arrow()))).save(tmp_path / "a.png", exif=exif)
    is_the_arrow(prepare(tmp_path / "a.png", size=128))


def test_a_color_profile_is_heeded(tmp_path):
    """A profile of linear light, made here: 0.5 in the file is 0.735 in sRGB."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with_gamma_one = bytearray(srgb)
    for tag in (b"rTRC", b"gTRC", b"bTRC"):
        place = with_gamma_one.index(tag, 128)
        offset = struct.unpack(">I", with_gamma_one[place + 4 : place + 8])[0]
        with_gamma_one[offset : offset + 14] = b"curv" + struct.pack(">IIH", 0, 1, 256)  # one entry: a gamma of 1.0
        with_gamma_one[place + 8 : place + 12] = struct.pack(">I", 14)
    Image.new("RGB", (64, 64), (128, 128, 128)).save(tmp_path / "a.png", icc_profile=bytes(with_gamma_one))
    color, _ = read(tmp_path / "a.png")
    light = 128 / 255
    assert color.mean() == pytest.approx(1.055 * light ** (1 / 2.4) - 0.055, abs=0.01)
    Image.new("RGB", (64, 64), (128, 128, 128)).save(tmp_path / "b.png", icc_profile=b"no profile at all")
    assert read(tmp_path / "b.png")[0].mean() == pytest.approx(light, abs=1e-3)


def test_the_subject_is_centred_with_the_margin_asked_for(tmp_path):
    Image.fromarray(arrow(400, 300)[:, ::-1]).save(tmp_path / "a.png")
    for fraction in (0.6, 0.85):
        alpha = prepare(tmp_path / "a.png", size=200, fraction=fraction).rgba[..., 3]
        rows, columns = np.flatnonzero((alpha > 0.5).any(1)), np.flatnonzero((alpha > 0.5).any(0))
        assert abs(len(rows) - 200 * fraction) <= 2 and abs(len(columns) - 200 * fraction) <= 2
        assert abs(rows.mean() - 99.5) <= 1 and abs(columns.mean() - 99.5) <= 1


def test_edges_keep_the_subjects_colour(tmp_path):
    """A soft red disk cut out of green: no green is left in its edge."""
    y, x = np.mgrid[:200, :200]
    cover = gaussian_filter((np.hypot(x - 100, y - 100) < 60).astype(float), 1.2)[..., None]
    Image.fromarray((cover * (220, 30, 30) + (1 - cover) * (30, 220, 30)).astype(np.uint8)).save(tmp_path / "a.png")
    prepared = prepare(tmp_path / "a.png", size=200)
    edge = (prepared.rgba[..., 3] > 0.1) & (prepared.rgba[..., 3] < 0.9)
    assert edge.sum() > 300
    assert prepared.rgba[edge][:, 1].max() < 0.3
    white = prepared.on_white(100)
    assert white.shape == (100, 100, 3) and np.allclose(white[0, 0], 1) and white[50, 50, 0] > 0.8


def too_large(folder):
    header = struct.pack(">IIBBBBB", 16000, 16000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT")


def a_little_too_large(folder):
    Image.new("1", (LARGEST_SIDE + 1, 40)).save(folder / "a.png")


def too_small(folder):
    Image.fromarray(arrow()).resize((16, 16)).save(folder / "a.png")


def no_picture(folder):
    (folder / "a.png").write_text("a letter")


def truncated(folder):
    packed = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)).save(packed, "PNG")
    (folder / "a.png").write_bytes(packed.getvalue()[:5000])


def empty(folder):
    Image.new("RGB", (200, 200), (240, 240, 240)).save(folder / "a.png")


def transparent(folder):
    Image.new("RGBA", (200, 200), (240, 0, 0, 0)).save(folder / "a.png")


def all_over(folder):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (200, 200, 3), np.uint8)).save(folder / "a.png")


def tiny_subject(folder):
    picture = np.full((200, 200, 3), 255, np.uint8)
    picture[100:114, 90:104] = 0
    Image.fromarray(picture).save(folder / "a.png")


@pytest.mark.parametrize(
    "make, says",
    [
        (too_large, "more than 8192 x 8192 pixels"),
        (a_little_too_large, "8193 x 40 pixels: too large"),
        (too_small, "16 x 16 pixels: too small"),
        (no_picture, "no picture that Kiln can read"),
        (truncated, "cannot be read"),
        (empty, "No object was found in a.png: nothing stands out"),
        (transparent, "no object in it"),
        (all_over, "no background of one colour"),
        (tiny_subject, "only 14 pixels large"),
        (lambda folder: None, "There is no picture a.png"),
    ],
)
def test_bad_pictures_get_a_sentence(tmp_path, make, says):
    make(tmp_path)
    with pytest.raises(KilnError, match=says) as error:
        prepare(tmp_path / "a.png", "border")
    assert error.value.code == "bad-input" and error.value.hint.endswith(".")


def test_a_turntable_comes_in_the_order_of_its_numbers(tmp_path):
    for number in (10, 2, 1, 0):
        Image.new("RGB", (64, 48), (number, 0, 0)).save(tmp_path / f"view_{number}.png")
    (tmp_path / "notes.txt").write_text("no view")
    frames, alpha = load_turntable(tmp_path)
    assert alpha is None and frames.shape == (4, 64, 64, 3)
    assert np.allclose(frames[:, 32, 32, 0] * 255, [0, 1, 2, 10])


def test_a_turntable_with_alpha_gets_transparent_margins(tmp_path):
    for number in range(4):
        rgba = np.zeros((48, 64, 4), np.uint8)
        rgba[10:40, 20:50] = (200, 100, 0, 255)
        Image.fromarray(rgba).save(tmp_path / f"view_{number}.png")
    frames, alpha = load_turntable(tmp_path)
    assert alpha.shape == (4, 64, 64) and alpha[:, :18].max() == 0 and alpha.sum() == 4 * 30 * 30
    assert math.isclose(frames[0, 30, 30, 0] * 255, 200, abs_tol=0.01)


def test_a_turntable_needs_four_views_of_one_size(tmp_path):
    for number in range(3):
        Image.new("RGB", (64, 64)).save(tmp_path / f"view_{number}.png")
    with pytest.raises(KilnError, match="too few"):
        load_turntable(tmp_path)
    Image.new("RGB", (80, 64)).save(tmp_path / "view_3.png")
    with pytest.raises(KilnError, match=r"view_3.png is 80 x 64 pixels, but view_0.png 64 x 64"):
        load_turntable(tmp_path)
