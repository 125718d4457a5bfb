"""SPZ files decode to the splats that went in when read by the published layout alone, and files of other tools are read by it."""

import dataclasses
import gzip
import math
import struct

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from backend.splats import spz
from backend.splats.render import render
from backend.views.cameras import look_at
from backend.views.views import Frame
from protocol.errors import KilnError
from tests.backend.splats import reference

UNIT = Frame(np.zeros(3), 1.0)


def decode(content: bytes) -> list[dict]:
    """Gaussians of an SPZ file of version 2 or 3 in its own axes, one at a time, by the layout that its README publishes."""
    data = gzip.decompress(content)
    magic, version, count, degree, fraction, flags, reserved = struct.unpack_from("<4sIIBBBB", data)
    assert (magic, flags, reserved) == (b"NGSP", 0, 0)
    higher = [0, 3, 8, 15][degree]
    widths = [9, 1, 3, 3, 4 if version == 3 else 3, 3 * higher]
    starts = [16 + count * sum(widths[:i]) for i in range(6)]
    assert len(data) == 16 + count * sum(widths)
    found = []
    for n in range(count):
        part = [data[start + n * width : start + (n + 1) * width] for start, width in zip(starts, widths, strict=True)]
        place = [int.from_bytes(part[0][3 * i : 3 * i + 3], "little", signed=True) / 2**fraction for i in range(3)]
        rotation = [0.0] * 4  # x y z w
        if version == 3:
            (bits,) = struct.unpack("<I", part[4])
            largest = bits >> 30
            for i in reversed([k for k in range(4) if k != largest]):
                rotation[i] = (bits & 0x1FF) / 511 * math.sqrt(0.5) * (-1 if bits & 0x200 else 1)
                bits >>= 10
            rotation[largest] = math.sqrt(1 - sum(value * value for value in rotation))
        else:
            rotation[:3] = [byte / 127.5 - 1 for byte in part[4]]
            rotation[3] = math.sqrt(max(0.0, 1 - sum(value * value for value in rotation[:3])))
        found.append(
            {
                "place": place,
                "opacity": part[1][0] / 255,
                "f_dc": [(byte / 255 - 0.5) / 0.15 for byte in part[2]],
                "log_scale": [byte / 16 - 10 for byte in part[3]],
                "rotation": rotation,
                "sh": [[(part[5][3 * k + c] - 128) / 128 for c in range(3)] for k in range(higher)],
            }
        )
    return found


def ordinary(count, degree, seed):
    """A cloud whose colours and harmonics are within what SPZ can hold, as fitted ones are."""
    splats = reference.cloud(count, degree, seed)
    return dataclasses.replace(splats, sh=np.clip(splats.sh / 2, -0.95, 0.95), opacity_logits=np.clip(splats.opacity_logits, -4, 4))


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_an_independent_decoder_finds_the_splats_in_metres_with_y_up(tmp_path, degree):
    splats = ordinary(300, degree, degree)
    frame = Frame(np.array([1.0, -2.0, 3.0]), 5.0)
    spz.save(tmp_path / "a.spz", splats, frame)
    assert [path.name for path in tmp_path.iterdir()] == ["a.spz"]
    found = decode((tmp_path / "a.spz").read_bytes())
    world = frame.to_world(splats.means)
    assert np.allclose([one["place"] for one in found], world[:, [0, 2, 1]] * [1, 1, -1], atol=2e-6)
    assert np.allclose([one["opacity"] for one in found], 1 / (1 + np.exp(-splats.opacity_logits)), atol=0.51 / 255)
    assert np.allclose([one["f_dc"] for one in found], splats.sh[:, 0], atol=0.51 / 255 / 0.15)
    assert np.allclose([one["log_scale"] for one in found], splats.log_scales - np.log(5), atol=0.51 / 16)
    y_up = Rotation.from_euler("x", -90, degrees=True) * Rotation.from_quat(splats.quaternions[:, [1, 2, 3, 0]])
    off = (Rotation.from_quat([one["rotation"] for one in found]) * y_up.inv()).magnitude()
    assert np.degrees(off).max() < 0.28


@pytest.mark.parametrize(("degree", "bound"), [(0, 0.02), (3, 0.09)])
def test_what_comes_back_looks_the_same(tmp_path, degree, bound):
    splats = ordinary(200, degree, 5)
    spz.save(tmp_path / "a.spz", splats, UNIT)
    back = spz.load(tmp_path / "a.spz")
    for eye in ((1.5, -2.0, 1.0), (-2.0, 1.0, 0.4), (0.1, 0.2, -2.6)):  # the harmonics must have come back to their directions
        camera = look_at(eye, (0, 0, 0), 64, 0.7)
        difference = np.abs(render(splats, camera).color - render(back, camera).color)
        assert difference.max() < 3 * bound and difference.mean() < bound / 4


@pytest.mark.parametrize("version", [1, 2])
def test_older_versions_are_read(tmp_path, version):
    place = np.array([[0.5, -1.25, 2.0], [-3.0, 0.0, 0.125]])
    if version == 1:
        places = place.astype("<f2").tobytes()
    else:
        places = b"".join(round(value * 4096).to_bytes(3, "little", signed=True) for value in place.ravel())
    rotation = bytes([128, 217, 128, 128, 128, 37])  # 90 degrees about y, -90 about z
    content = struct.pack("<4sIIBBBB", b"NGSP", version, 2, 1, 12, 0, 0) + places + bytes([128, 64]) + bytes([255, 128, 0] * 2)
    content += bytes([80, 96, 112] * 2) + rotation + bytes([128, 192, 64] * 6)
    (tmp_path / "old.spz").write_bytes(gzip.compress(content))
    read = spz.load(tmp_path / "old.spz")
    assert np.allclose(read.means, place[:, [0, 2, 1]] * [1, -1, 1], atol=1e-3)
    assert np.allclose(1 / (1 + np.exp(-read.opacity_logits)), [128 / 255, 64 / 255], atol=1e-6)
    assert np.allclose(read.sh[:, 0], [3.3333, 0.0131, -3.3333], atol=1e-3)
    assert np.allclose(read.log_scales, [-5, -4, -3])
    there = Rotation.from_quat(read.quaternions[:, [1, 2, 3, 0]])
    own = Rotation.from_euler("x", 90, degrees=True) * Rotation.from_euler("yz", [[90, 0], [0, -90]], degrees=True)
    assert np.degrees((there * own.inv()).magnitude()).max() < 1.5
    assert np.allclose(np.abs(read.sh[:, 1:, 1:]), 0.5) and np.allclose(read.sh[:, 1:, 0], 0)


def test_the_same_splats_make_the_same_bytes(tmp_path):
    splats = ordinary(50, 1, 1)
    spz.save(tmp_path / "a.spz", splats, UNIT)
    spz.save(tmp_path / "b.spz", splats, UNIT)
    assert (tmp_path / "a.spz").read_bytes() == (tmp_path / "b.spz").read_bytes()


@pytest.mark.parametrize("away", [0.0, 10.0])
def test_small_things_keep_their_places(tmp_path, away):
    """A ring of two centimetres, perhaps ten metres from the origin: the number of fractional bits follows the coordinates."""
    splats, frame = ordinary(100, 0, 2), Frame(np.array([away, 0.0, 0.0]), 100.0)
    spz.save(tmp_path / "a.spz", splats, frame)
    assert np.abs(spz.load(tmp_path / "a.spz").means - frame.to_world(splats.means)).max() < (5e-6 if away else 5e-8)


def spoilt(tmp_path, change):
    spz.save(tmp_path / "a.spz", ordinary(20, 1, 0), UNIT)
    data = bytearray(gzip.decompress((tmp_path / "a.spz").read_bytes()))
    change(data)
    return gzip.compress(bytes(data))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: b"", "not an SPZ"),
        (lambda folder: b"solid stl" * 10, "not an SPZ"),
        (lambda folder: gzip.compress(b"no splats in here"), "gzip file, but not SPZ"),
        (lambda folder: b"NGSP" + struct.pack("<I", 4) + bytes(24), "version 4"),
        (lambda folder: spoilt(folder, lambda data: data.__setitem__(4, 9)), "version 9"),
        (lambda folder: spoilt(folder, lambda data: data.__setitem__(12, 7)), "parts of SPZ"),
        (lambda folder: spoilt(folder, lambda data: data.__setitem__(14, 2)), "parts of SPZ"),
        (lambda folder: spoilt(folder, lambda data: data.__delitem__(slice(-5, None))), "ends before its 20"),
        (lambda folder: spoilt(folder, lambda data: data.__setitem__(slice(8, 12), bytes(4))), "no Gaussians"),
        (lambda folder: spoilt(folder, lambda data: data.__setitem__(slice(8, 12), struct.pack("<I", 10_000_000))), "10,000,000"),
        (lambda folder: spoilt(folder, lambda data: None)[:-30], "damaged"),
        (lambda folder: spoilt(folder, lambda data: None)[:60] + bytes(40), "damaged"),
    ],
)
def test_broken_files_are_refused_in_a_sentence(tmp_path, spoil, says):
    (tmp_path / "bad.spz").write_bytes(spoil(tmp_path))
    with pytest.raises(KilnError, match=says) as refused:
        spz.load(tmp_path / "bad.spz")
    assert refused.value.code == "bad-input" and "bad.spz" in refused.value.message and refused.value.hint


def test_splats_too_far_away_are_refused(tmp_path):
    with pytest.raises(KilnError, match="too far"):
        spz.save(tmp_path / "a.spz", ordinary(5, 0, 0), Frame(np.array([1e8, 0, 0]), 1.0))
