"""PLY files hold world metres in the layout that splat viewers read, and broken ones are refused in a sentence."""

import numpy as np
import pytest
import trimesh

from backend.splats import ply
from backend.views.views import Frame
from protocol.errors import KilnError
from tests.backend.splats import reference

UNIT = Frame(np.zeros(3), 1.0)


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_what_is_saved_comes_back(tmp_path, degree):
    splats = reference.cloud(37, degree, degree)
    ply.save(tmp_path / "a.ply", splats, UNIT)
    back = ply.load(tmp_path / "a.ply")
    for name in ("means", "quaternions", "log_scales", "opacity_logits", "sh"):
        assert np.array_equal(getattr(back, name), getattr(splats, name)), name
    assert [path.name for path in tmp_path.iterdir()] == ["a.ply"]


def test_another_reader_finds_the_3dgs_fields_in_world_metres(tmp_path):
    splats = reference.cloud(20, 2, 0)
    frame = Frame(np.array([10.0, -2.0, 3.0]), 0.5)  # the subject is twice as large in the world
    ply.save(tmp_path / "a.ply", splats, frame)
    fields = trimesh.load(tmp_path / "a.ply").metadata["_ply_raw"]["vertex"]["data"]
    assert list(fields.dtype.names[:9]) == ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
    assert list(fields.dtype.names[9:33]) == [f"f_rest_{i}" for i in range(24)]
    assert list(fields.dtype.names[33:]) == ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    assert np.allclose(np.ravel(fields["x"]), splats.means[:, 0] * 2 + 10, atol=1e-5)
    assert np.allclose(np.exp(np.ravel(fields["scale_1"])), 2 * np.exp(splats.log_scales[:, 1]), rtol=1e-5)
    assert np.array_equal(np.ravel(fields["f_dc_2"]), splats.sh[:, 0, 2])
    assert np.array_equal(np.ravel(fields["f_rest_0"]), splats.sh[:, 1, 0])  # channel by channel: red first
    assert np.array_equal(np.ravel(fields["f_rest_9"]), splats.sh[:, 2, 1])  # 8 of red, then green's second
    assert np.array_equal(np.ravel(fields["rot_0"]), splats.quaternions[:, 0])


def saved(tmp_path, **changes) -> bytes:
    splats = reference.cloud(5, 0, 0)
    for name, value in changes.items():
        getattr(splats, name)[2] = value
    ply.save(tmp_path / "good.ply", splats, UNIT)
    return (tmp_path / "good.ply").read_bytes()


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda folder: saved(folder)[:-10], "ends after 4 of 5"),
        (lambda folder: saved(folder, means=np.nan), "1 of 5 Gaussians have means"),
        (lambda folder: saved(folder, log_scales=-np.inf), "log_scales"),
        (lambda folder: saved(folder, log_scales=-200), "no size"),
        (lambda folder: saved(folder, quaternions=0), "no rotation"),
        (lambda folder: saved(folder).replace(b"float opacity", b"float opaciti"), "without opacity"),
        (lambda folder: saved(folder).replace(b"element vertex 5", b"element vertex 99999999999"), "99999999999"),
        (lambda folder: saved(folder).replace(b"element vertex 5", b"element vertex 0"), "no Gaussians"),
        (lambda folder: saved(folder).replace(b"binary_little", b"ascii_little"), "binary"),
        (lambda folder: b"solid stl\n" * 100, "not a binary"),
        (lambda folder: b"", "not a binary"),
        (lambda folder: b"ply\n" + b"comment x\n" * 10_000, "not a binary"),
    ],
)
def test_broken_files_are_refused_in_a_sentence(tmp_path, spoil, says):
    (tmp_path / "bad.ply").write_bytes(spoil(tmp_path))
    with pytest.raises(KilnError, match=says) as refused:
        ply.load(tmp_path / "bad.ply")
    assert refused.value.code == "bad-input" and "bad.ply" in refused.value.message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(KilnError, match="nowhere.ply"):
        ply.load(tmp_path / "nowhere.ply")
