"""Mattes: the border's colour against known coverage, and rembg's own session with a small network of the same signature, offline."""

import io
import socket
import struct

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import zoom

from backend import weights
from backend.diffusion.matte import NETWORK, by_border, by_network, has_subject, matte, straight, way
from protocol.errors import KilnError


def ring(size=96, scale=4):
    """Coverage of a thick ring, with a hole through it, and a thin arm; antialiased."""
    y, x = np.mgrid[: size * scale, : size * scale] / (size * scale)
    away = np.hypot(x - 0.5, y - 0.55)
    solid = ((away < 0.3) & (away > 0.12)) | ((np.abs(x - y + 0.15) < 0.02) & (x > 0.06) & (x < 0.3))
    return solid.reshape(size, scale, size, scale).mean((1, 3)).astype(np.float32)


def on(cover, behind, color=(0.75, 0.3, 0.2)):
    y = np.linspace(0.8, 1.2, len(cover))[:, None, None]  # light from above
    return (cover[..., None] * np.asarray(color) * y + (1 - cover[..., None]) * behind).astype(np.float32)


def test_a_cut_out_on_white_is_exact_to_a_share_of_a_pixel():
    cover = ring()
    alpha = by_border(on(cover, np.ones(3)))
    assert np.abs(alpha - cover).max() < 0.25 and np.abs(alpha - cover).mean() < 0.002
    assert alpha[53, 48] == 0  # the hole


def test_gradients_and_jpeg_noise_are_background():
    cover = ring()
    y, x = np.mgrid[0:1:96j, 0:1:96j][:, :, :, None]
    frame = on(cover, 0.6 + 0.25 * x * np.array([1, 0.9, 0.8]) - 0.1 * y * y)
    packed = io.BytesIO()
    noisy = np.clip(frame + np.random.default_rng(0).normal(0, 0.01, frame.shape), 0, 1)
    Image.fromarray((noisy * 255).astype(np.uint8)).save(packed, "JPEG", quality=75)
    alpha = by_border(np.asarray(Image.open(packed), np.float32) / 255)
    assert ((alpha > 0.5) & (cover > 0.5)).sum() / ((alpha > 0.5) | (cover > 0.5)).sum() > 0.93
    assert alpha[:20, 60:].max() == 0


def test_white_patches_of_the_subject_are_no_holes():
    """White paint on a subject on white has shading, which background has not."""
    size = 96
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    away = np.hypot(x, y)
    frame = np.ones((size, size, 3), np.float32)
    frame[away < 0.7] = (0.3, 0.2, 0.1)
    paint = away < 0.35
    frame[paint] = (0.97 + 0.03 * x[paint])[:, None]
    alpha = by_border(frame)
    assert alpha[away < 0.6].min() > 0.9


def test_a_subject_may_leave_the_picture():
    frame = on(np.pad(np.ones((60, 40), np.float32), ((36, 0), (28, 28))), np.ones(3))
    alpha = by_border(frame)
    assert alpha[80:, 30:66].min() == 1 and alpha[:30].max() == 0


def test_specks_are_dropped_and_nothing_is_nothing():
    frame = on(ring(), np.ones(3))
    frame[5, 90] = 0
    assert by_border(frame)[5, 90] == 0
    empty = by_border(np.full((64, 64, 3), 0.5, np.float32))
    assert empty.max() == 0 and not has_subject(empty) and not has_subject(np.ones((64, 64)))


def test_colours_of_an_edge_are_the_subjects_own():
    cover = ring()
    frame = on(cover, np.ones(3))
    alpha = by_border(frame)
    for behind in (None, np.ones(3)):
        own = straight(frame, alpha, behind)
        seam = (alpha > 0.2) & (alpha < 0.9)
        assert np.abs(own[seam] - on(np.ones_like(cover), 0)[seam]).max() < 0.12


# --- ONNX, by hand: the package that writes it is not among what Kiln installs ------------------------------------------------------------


def _varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _field(number, value):
    """A protobuf field: text, bytes or an integer."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _value(name, channels):
    dims = b"".join(_field(1, _field(1, dim)) for dim in (1, channels, 1024, 1024))
    return _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, dims)))


def _tensor(name, dims, values):
    return b"".join(_field(1, dim) for dim in dims) + _field(2, 1) + _field(8, name) + _field(9, struct.pack(f"<{len(values)}f", *values))


def _node(kind, inputs, output):
    return b"".join(_field(1, name) for name in inputs) + _field(2, output) + _field(4, kind)


def small_network(gain=-20.0, bias=-20.0):
    """1 x 3 x 1024 x 1024 -> 1 x 1 x 1024 x 1024 as isnet-general-use: sigmoid(gain * red + bias), where red is in [-0.5, 0.5]."""
    graph = (
        _field(1, _node("Conv", ["image", "weight", "bias"], "sum")) + _field(1, _node("Sigmoid", ["sum"], "mask")) + _field(2, "small")
        + _field(5, _tensor("weight", (1, 3, 1, 1), [gain, 0.0, 0.0])) + _field(5, _tensor("bias", (1,), [bias]))
        + _field(11, _value("image", 3)) + _field(12, _value("mask", 1))
    )  # fmt: skip
    return _field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 13))


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the matte reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_rembg_runs_the_network_from_its_folder_and_nothing_else(tmp_path, offline):
    (tmp_path / f"{NETWORK}.onnx").write_bytes(small_network(bias=-4.0))
    frame = np.ones((80, 60, 3), np.float32)
    frame[20:60, 10:40] = (0.0, 0.5, 1.0)  # little red: the subject
    alpha = by_network(frame, tmp_path)
    assert alpha.shape == (80, 60) and alpha.dtype == np.float32
    assert alpha[25:55, 15:35].min() > 0.98 and alpha[:15].max() < 0.02


def test_where_the_network_is_unsure_everywhere_there_is_no_subject(tmp_path, offline):
    (tmp_path / f"{NETWORK}.onnx").write_bytes(small_network(gain=-1.0, bias=-4.0))
    frame = zoom(np.random.default_rng(0).random((4, 4, 3)), (16, 16, 1), order=1).astype(np.float32)
    assert by_network(frame, tmp_path).max() == 0


def test_a_network_that_is_none_gets_a_sentence(tmp_path, offline):
    for content in (None, b"no network"):
        if content:
            (tmp_path / f"{NETWORK}.onnx").write_bytes(content)
        with pytest.raises(KilnError, match="cannot be loaded") as error:
            by_network(np.ones((40, 40, 3), np.float32), tmp_path)
        assert error.value.code == "no-weights" and "kiln weights" in error.value.hint


def test_without_the_network_the_border_is_taken_and_that_is_said(monkeypatch, tmp_path, offline):
    monkeypatch.setenv("KILN_HOME", str(tmp_path))
    assert way("auto")[0] == "border" and "not installed" in way("auto")[1]
    said = []
    alpha = matte(on(ring(), np.ones(3))[None], "auto", lambda share, text="", preview=None: said.append(text))
    assert alpha.max() == 1 and "not installed" in said[-1]
    with pytest.raises(KilnError) as error:
        matte(on(ring(), np.ones(3))[None], "network")
    assert error.value.code == "no-weights"


def test_no_other_network_can_be_named():
    for name in ("withoutbg", "atlascloud", "u2net", ""):
        with pytest.raises(KilnError, match="no way"):
            way(name)
    assert weights.entry(NETWORK).id == NETWORK
