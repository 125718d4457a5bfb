"""PLY files hold world metres in the layout that splat viewers read; those of other tools are read, and broken ones are refused in a
sentence."""

import dataclasses

import numpy as np
import pytest
import trimesh

from backend.splats import clean, ply
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


FIELDS = ("means", "quaternions", "log_scales", "opacity_logits", "sh")


def written(path, columns, order="<", comments=(), after=b"", more=""):
    """A PLY file from columns of numbers, byte by byte as its header says."""
    kinds = {"f4": "float", "f8": "double", "u1": "uchar", "i4": "int"}
    count = len(next(iter(columns.values())))
    rows = np.empty(count, [(name, order + values.dtype.str[1:]) for name, values in columns.items()])
    for name, values in columns.items():
        rows[name] = values
    header = f"ply\nformat binary_{'little' if order == '<' else 'big'}_endian 1.0\n"
    header += "".join(f"comment {comment}\n" for comment in comments) + f"element vertex {count}\n"
    header += "".join(f"property {kinds[values.dtype.str[1:]]} {name}\n" for name, values in columns.items()) + more + "end_header\n"
    path.write_bytes(header.encode() + rows.tobytes() + after)


def columns_of(splats, kind="f4"):
    """Splats under the names of the 3DGS code, the higher harmonics channel by channel."""
    found = {name: splats.means[:, i] for i, name in enumerate("xyz")}
    found |= {f"f_dc_{c}": splats.sh[:, 0, c] for c in range(3)}
    of_channel = splats.sh.shape[1] - 1
    found |= {f"f_rest_{c * of_channel + k}": splats.sh[:, 1 + k, c] for c in range(3) for k in range(of_channel)}
    found |= {"opacity": splats.opacity_logits} | {f"scale_{i}": splats.log_scales[:, i] for i in range(3)}
    found |= {f"rot_{i}": splats.quaternions[:, i] for i in range(4)}
    return {name: values.astype(kind) for name, values in found.items()}


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize(("kind", "order"), [("f4", "<"), ("f8", "<"), ("f4", ">")])
def test_other_tools_files_are_read_in_any_order_and_number_type(tmp_path, degree, kind, order):
    splats = reference.cloud(70, degree, degree)
    columns = columns_of(splats, kind) | {"nx": np.zeros(70, "f4"), "label": np.arange(70, dtype="u1"), "id": np.arange(70, dtype="i4")}
    names = np.random.default_rng(degree).permutation(list(columns))
    face = "element face 1\nproperty list uchar int vertex_indices\n"
    written(tmp_path / "a.ply", {name: columns[name] for name in names}, order, ["Vertical Axis: z"], b"\0" * 13, face)
    told = []
    read = ply.load(tmp_path / "a.ply", told.append)
    for name in FIELDS:
        assert np.array_equal(getattr(read, name), getattr(splats, name)), name
    assert told == []


def test_many_splats_are_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(ply, "BLOCK", 16)
    splats, reports = reference.cloud(50, 1, 0), []
    ply.save(tmp_path / "a.ply", splats, UNIT)
    read = ply.load(tmp_path / "a.ply", progress=lambda done, text: reports.append(done))
    assert np.array_equal(read.sh, splats.sh) and reports == [0, 16 / 50, 32 / 50, 48 / 50]


def test_the_fourth_degree_is_left_out_and_said(tmp_path):
    splats = dataclasses.replace(reference.cloud(9, 0, 0), sh=np.random.default_rng(0).normal(size=(9, 25, 3)).astype(np.float32))
    written(tmp_path / "a.ply", columns_of(splats))
    told = []
    assert np.array_equal(ply.load(tmp_path / "a.ply", told.append).sh, splats.sh[:, :16])
    assert len(told) == 1 and "fourth degree" in told[0]


def test_splats_that_cannot_be_drawn_are_left_out_counted_and_said(tmp_path):
    splats = reference.cloud(40, 1, 0)
    splats.means[1, 2] = np.nan
    splats.sh[2, 3, 1] = np.inf
    splats.log_scales[3] = -np.inf
    splats.log_scales[4] = -200
    splats.log_scales[5, 0] = 200
    splats.quaternions[6] = 0
    splats.opacity_logits[7] = np.nan
    splats.opacity_logits[8] = np.inf  # opaque
    splats.log_scales[9, 2] = -np.inf  # flat
    ply.save(tmp_path / "a.ply", splats, UNIT)
    told = []
    read = ply.load(tmp_path / "a.ply", told.append)
    kept = np.setdiff1d(np.arange(40), [1, 2, 3, 4, 5, 6, 7])
    assert np.array_equal(read.means, splats.means[kept])
    assert read.opacity_logits[1] == 30 and read.log_scales[2, 2] == clean.LEAST_LOG
    assert [sentence.split(": ")[1] for sentence in told] == [
        "3 of 40 Gaussians have values that are no numbers and are left out.",
        "2 of 40 Gaussians have no size and are left out.",
        "1 of 40 Gaussians have no end and are left out.",
        "1 of 40 Gaussians have no rotation and are left out.",
    ]


def test_doubles_beyond_single_precision_are_left_out(tmp_path):
    columns = columns_of(reference.cloud(5, 0, 0), "f8")
    columns["y"][2] = 1e300
    written(tmp_path / "a.ply", columns)
    assert len(ply.load(tmp_path / "a.ply")) == 4


def packed(splats, with_colors, with_sh):
    """SuperSplat's compressed PLY, one splat at a time, and what it can hold of the splats."""

    def put(shares, widths):
        number = 0
        for share, width in zip(shares, widths, strict=True):
            number = number << width | round(float(share) * (2**width - 1))
        return number

    names = ["x", "y", "z", "scale_x", "scale_y", "scale_z"] + (["r", "g", "b"] if with_colors else [])
    colors = 0.5 + ply.SH_C0 * splats.sh[:, 0]
    values = np.concatenate([splats.means, splats.log_scales] + ([colors] if with_colors else []), 1)
    count, chunks, rows, rest = len(splats), b"", b"", b""
    for first in range(0, count, 256):
        part = values[first : first + 256]
        low, high = part.min(0).astype("<f4"), part.max(0).astype("<f4")
        groups = [slice(0, 3), slice(3, 6), slice(6, 9)][: len(names) // 3]
        chunks += b"".join(low[group].tobytes() + high[group].tobytes() for group in groups)
        for n in range(first, min(first + 256, count)):
            shares = (values[n] - low) / (high - low)
            q = splats.quaternions[n] / np.linalg.norm(splats.quaternions[n])
            largest = int(np.abs(q).argmax())
            q = np.delete(q * np.sign(q[largest]), largest) / np.sqrt(2) + 0.5
            color = shares[6:9] if with_colors else np.clip(colors[n], 0, 1)
            opacity = 1 / (1 + np.exp(-splats.opacity_logits[n]))
            words = [put(shares[:3], (11, 10, 11)), put([largest / 3, *q], (2, 10, 10, 10)), put(shares[3:6], (11, 10, 11)),
                     put([*color, opacity], (8, 8, 8, 8))]  # fmt: skip
            rows += np.array(words, "<u4").tobytes()
            rest += np.clip(np.floor((splats.sh[n, 1:].T.ravel() / 8 + 0.5) * 256), 0, 255).astype("u1").tobytes()
    header = f"ply\nformat binary_little_endian 1.0\ncomment Generated by SuperSplat 2.4.1\nelement chunk {-(-count // 256)}\n"
    for group in range(0, len(names), 3):
        header += "".join(f"property float {end}_{name}\n" for end in ("min", "max") for name in names[group : group + 3])
    header += f"element vertex {count}\n" + "".join(f"property uint packed_{n}\n" for n in ("position", "rotation", "scale", "color"))
    if with_sh:
        header += f"element sh {count}\n" + "".join(f"property uchar f_rest_{i}\n" for i in range(3 * splats.sh.shape[1] - 3))
    return header.encode() + b"end_header\n" + chunks + rows + (rest if with_sh else b"")


@pytest.mark.parametrize(("with_colors", "degree"), [(False, 0), (True, 0), (True, 1), (True, 3)])
def test_supersplats_compressed_files_are_read(tmp_path, with_colors, degree):
    splats = reference.cloud(300, degree, degree)
    (tmp_path / "a.compressed.ply").write_bytes(packed(splats, with_colors, degree > 0))
    read = ply.load(tmp_path / "a.compressed.ply")
    assert np.abs(read.means - splats.means).max() < 2e-3
    assert np.abs(read.log_scales - splats.log_scales).max() < 3e-3
    unit = splats.quaternions / np.linalg.norm(splats.quaternions, axis=1, keepdims=True)
    assert np.abs((read.quaternions * unit).sum(1)).min() > 1 - 1e-5
    assert np.abs(1 / (1 + np.exp(-read.opacity_logits)) - 1 / (1 + np.exp(-splats.opacity_logits))).max() < 2.5e-3
    given = splats.sh[:, 0] if with_colors else (np.clip(0.5 + ply.SH_C0 * splats.sh[:, 0], 0, 1) - 0.5) / ply.SH_C0
    assert np.abs(read.sh[:, 0] - given).max() < 0.02
    assert np.abs(read.sh[:, 1:] - splats.sh[:, 1:]).max(initial=0) < 0.02


def saved(tmp_path, **changes) -> bytes:
    splats = reference.cloud(5, 0, 0)
    for name, value in changes.items():
        getattr(splats, name)[:] = value
    ply.save(tmp_path / "good.ply", splats, UNIT)
    return (tmp_path / "good.ply").read_bytes()


def points(tmp_path, colored, faces=False) -> bytes:
    columns = {name: np.zeros(9, "f4") for name in "xyz"} | {name: np.zeros(9, "u1") for name in ("red", "green", "blue") if colored}
    written(tmp_path / "p.ply", columns, more="element face 3\nproperty list uchar int vertex_indices\n" if faces else "")
    return (tmp_path / "p.ply").read_bytes()


def before_vertices(element):
    """A whole file but for a header with one more element."""
    header = f"ply\nformat binary_little_endian 1.0\n{element}element vertex 20\n"
    return (header + "".join(f"property float {name}\n" for name in ply._names(1)) + "end_header\n").encode() + bytes(20 * 68)


def compressed(last, more, ranges=()):
    """The header of SuperSplat's compressed PLY with three splats, its last property and what follows as given, and zeros."""
    header = "ply\nformat binary_little_endian 1.0\nelement chunk 1\n"
    header += "".join(f"property float {end}_{of}\n" for of in ("x", "y", "z", "scale_x", "scale_y", "scale_z") for end in ("min", "max"))
    header += "".join(f"property float {name}\n" for name in ranges)
    header += "element vertex 3\n" + "".join(f"property uint packed_{what}\n" for what in ("position", "rotation", "scale"))
    return (header + f"{last}\n{more}end_header\n").encode() + bytes(200)


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda folder: saved(folder)[:-10], "ends after 4 of 5"),
        (lambda folder: saved(folder, means=np.nan), "none of its 5 Gaussians can be drawn: they have values that are no numbers"),
        (lambda folder: saved(folder, log_scales=-200), "no size"),
        (lambda folder: saved(folder, quaternions=0), "no rotation"),
        (lambda folder: saved(folder).replace(b"float opacity", b"float opaciti"), "has no opacity"),
        (lambda folder: points(folder, True), "a coloured point cloud, not Gaussian splats"),
        (lambda folder: points(folder, False), "a point cloud, not Gaussian splats"),
        (lambda folder: points(folder, True, True), "a mesh, not Gaussian splats"),
        (lambda folder: saved(folder).replace(b"element vertex 5", b"element vertex 99999999999"), "99,999,999,999"),
        (lambda folder: saved(folder).replace(b"element vertex 5", b"element vertex 10000000"), "10,000,000 Gaussians; at most"),
        (lambda folder: saved(folder).replace(b"element vertex 5", b"element vertex 0"), "no Gaussians"),
        (lambda folder: saved(folder).replace(b"element vertex 5", b"element point 5"), "no Gaussians"),
        (lambda folder: saved(folder).replace(b"binary_little_endian", b"ascii"), "a text PLY"),
        (lambda folder: saved(folder).replace(b"property float nx", b"property quad nx"), "quad nx"),
        (lambda folder: packed(reference.cloud(9, 1, 0), True, True)[:-50], "ends after 3 of 9 rows of 'sh'"),
        (
            lambda folder: packed(reference.cloud(9, 0, 0), True, False).replace(b"max_scale_x", b"max_scale_q"),
            "of a kind that Kiln cannot",
        ),
        (lambda folder: b"solid stl\n" * 100, "not a PLY"),
        (lambda folder: b"", "not a PLY"),
        (lambda folder: b"ply\n" + b"comment x\n" * 10_000, "not a PLY"),
        (lambda folder: b"ply\nelement vertex 3\nend_header\n", "not a PLY"),
        (lambda folder: b"ply\nformat binary_little_endian 1.0\nelement vertex -3\nend_header\n", "the element 'vertex -3'"),
        (lambda folder: before_vertices("element far " + "9" * 30 + "\nproperty float x\n"), "the element 'far 9999"),
        (lambda folder: before_vertices("element far " + "9" * 11 + "\nproperty float x\n"), "ends after 0 of 20 Gaussians"),
        (lambda folder: compressed("property float packed_color", ""), "compressed PLY of a kind"),
        (lambda folder: compressed("property uint packed_color", "element sh 3\n"), "compressed PLY of a kind"),
        (lambda folder: compressed("property uint packed_color", "", ("min_r",)), "compressed PLY of a kind"),
    ],
)
def test_broken_files_are_refused_in_a_sentence(tmp_path, spoil, says):
    (tmp_path / "bad.ply").write_bytes(spoil(tmp_path))
    with pytest.raises(KilnError, match=says) as refused:
        ply.load(tmp_path / "bad.ply")
    assert refused.value.code == "bad-input" and "bad.ply" in refused.value.message and refused.value.hint


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(KilnError, match="nowhere.ply"):
        ply.load(tmp_path / "nowhere.ply")
