"""Stages are computed once, found again when nothing that determines them changed, and never trusted when their file is damaged."""

import dataclasses
import hashlib
import os
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from backend.pipelines.run import Run, pack, unpack
from backend.splats.model import Splats
from backend.views.cameras import look_at
from backend.views.views import Frame, Views
from protocol import recipes
from protocol.errors import Cancelled

calls = []


def double(numbers, progress=None):
    calls.append("double")
    if progress is not None:
        progress(0.5, "half", None)
    return numbers * 2


def total(numbers, offset):
    calls.append("total")
    return float(numbers.sum() + offset)


@pytest.fixture(autouse=True)
def forget_calls():
    calls.clear()


def pipeline(run, numbers, offset):
    return run.stage("Total", total, run.stage("Double", double, numbers), offset)


def test_a_second_run_computes_nothing_and_returns_the_same(tmp_path):
    numbers = np.arange(5.0)
    first, again = Run(tmp_path), Run(tmp_path)
    assert pipeline(first, numbers, 1.0) == pipeline(again, numbers.copy(), 1.0) == 21.0
    assert calls == ["double", "total"]
    assert again.cached == ["Double", "Total"] and again.seconds == first.seconds


def test_a_changed_later_parameter_repeats_only_what_depends_on_it(tmp_path):
    pipeline(Run(tmp_path), np.arange(5.0), 1.0)
    assert pipeline(Run(tmp_path), np.arange(5.0), 2.0) == 22.0
    assert calls == ["double", "total", "total"]


@pytest.mark.parametrize(
    "changed", [np.arange(5.0) + 1e-12, np.arange(5.0, dtype=np.float32), np.arange(5.0).reshape(5, 1), np.arange(4.0)], ids=str
)
def test_any_change_of_an_array_counts(tmp_path, changed):
    pipeline(Run(tmp_path), np.arange(5.0), 1.0)
    pipeline(Run(tmp_path), changed, 1.0)
    assert calls == ["double", "total"] * 2


def test_without_a_folder_everything_is_computed():
    pipeline(Run(), np.arange(5.0), 1.0)
    pipeline(Run(), np.arange(5.0), 1.0)
    assert calls == ["double", "total"] * 2


def damage_end(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def damage_start(path):
    content = bytearray(path.read_bytes())
    content[50] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [damage_end, damage_start, lambda path: os.truncate(path, path.stat().st_size // 2), lambda path: os.truncate(path, 0)],
    ids=["last bit", "outline", "half", "empty"],
)
def test_a_damaged_stage_file_is_computed_again_and_replaced(tmp_path, damage):
    pipeline(Run(tmp_path), np.arange(1000.0), 1.0)
    for path in tmp_path.iterdir():
        damage(path)
    assert pipeline(Run(tmp_path), np.arange(1000.0), 1.0) == 999001.0
    assert calls == ["double", "total"] * 2
    pipeline(Run(tmp_path), np.arange(1000.0), 1.0)
    assert calls == ["double", "total"] * 2


def test_a_killed_writer_leaves_nothing_that_is_taken_for_a_stage(tmp_path):
    pipeline(Run(tmp_path), np.arange(5.0), 1.0)
    whole = next(tmp_path.glob("*.stage")).read_bytes()
    for path in tmp_path.glob("*.stage"):
        path.unlink()
    (tmp_path / "tmpabc").write_bytes(whole[:30])
    assert pipeline(Run(tmp_path), np.arange(5.0), 1.0) == 21.0
    assert calls == ["double", "total"] * 2


def test_a_stage_that_the_disk_has_no_room_for_is_not_kept_and_the_run_goes_on(small_disk):
    events = []
    (small_disk / "other").write_bytes(b"x" * 23_000_000)
    assert pipeline(Run(small_disk / "stages", events.append), np.ones(400_000), 1.0) == 800_001.0
    (text,) = [event["text"] for event in events if event["kind"] == "log"]
    assert "'Double' is not kept" in text and "no room" in text
    assert [path.suffix for path in (small_disk / "stages").iterdir()] == [".stage"]  # the sum alone, and no half of the other
    assert pipeline(Run(small_disk / "stages"), np.ones(400_000), 1.0) == 800_001.0
    assert calls == ["double", "total", "double"]


def test_the_least_recently_used_stages_go_first(tmp_path):
    first = np.zeros(10_000)
    for value in range(4):
        Run(tmp_path, most_bytes=400_000).stage("Double", double, first + value)
        for age, path in enumerate(sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)):
            os.utime(path, (1e9 - age, 1e9 - age))
        if value:
            Run(tmp_path).stage("Double", double, first)  # used again each time
    assert calls == ["double"] * 4
    Run(tmp_path, most_bytes=400_000).stage("Double", double, first + 9)  # one has to go: the oldest unused, which is 1
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 400_000
    Run(tmp_path).stage("Double", double, first)
    assert len(calls) == 5
    Run(tmp_path).stage("Double", double, first + 1)
    assert len(calls) == 6


def test_progress_reaches_the_listener_with_the_stage_it_belongs_to(tmp_path):
    events = []
    pipeline(Run(tmp_path, events.append), np.arange(5.0), 1.0)
    told = [(e["kind"], e.get("stage"), e.get("index"), e.get("fraction"), e.get("text")) for e in events]
    assert told == [
        ("stage", "Double", 0, None, None),
        ("progress", None, None, 0.5, "half"),
        ("progress", None, None, 1.0, ""),
        ("stage", "Total", 1, None, None),
        ("progress", None, None, 1.0, ""),
    ]


def test_a_cancelled_run_stops_inside_the_step_at_its_next_report():
    asked = iter([False, True])
    with pytest.raises(Cancelled):
        pipeline(Run(cancelled=lambda: next(asked)), np.arange(5.0), 1.0)
    assert calls == ["double"]


def same(a, b):
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(map(same, a.values(), b.values()))
    return type(a) is type(b) and repr(a) == repr(b)  # repr, because 0.0 == -0.0


def stored(value):
    return unpack(bytearray(b"".join(pack(value))))


def test_the_rooms_own_types_come_back_whole():
    rng = np.random.default_rng(0)
    cameras = [look_at((0, -3, 1 + i), (0, 0, 0), 8, 0.7) for i in range(3)]
    image = rng.random((3, 8, 8, 3), np.float32)
    views = Views(cameras, image, image[..., 0], None, image.astype(np.float16), np.array([False, True, False]), Frame(rng.random(3), 2.5))
    splats = Splats(*(rng.random(shape, np.float32) for shape in ((7, 3), (7, 4), (7, 3), (7,), (7, 4, 3))))
    for value in (views, splats, recipes.Reconstruct(), np.float32(0.1), np.zeros((0, 3), np.int32), image[:, ::2, ::-1]):
        assert same(value, stored(value))
    loaded = stored(splats)
    loaded.means[0] = 1.0  # as writable as a fresh result


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | arrays.arrays(st.sampled_from([np.uint8, np.int64, np.float16, np.float32, bool]), arrays.array_shapes(min_dims=0, min_side=0)),
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple)
    | st.dictionaries(st.text() | st.integers(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(plain)
def test_whatever_can_be_stored_comes_back_the_same(value):
    assert same(value, stored(value))


@given(plain, plain)
def test_values_share_a_stage_only_if_they_are_the_same(one, other):
    run = Run()
    assert (run._fingerprint(one) == run._fingerprint(other)) == same(one, other)


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, np.array([object()]), [lambda: 0], calls.append], ids=lambda value: type(value).__name__
)
def test_code_and_unknown_objects_are_refused_by_name(value):
    with pytest.raises(TypeError, match="stage"):
        pack({"inner": value})


def test_a_stage_file_cannot_name_code(tmp_path):
    import msgpack

    for name in ("os:system", "subprocess:Popen", "backend.worker:main", "backend.worker:os.system", "nowhere:Thing"):
        outline = msgpack.packb({"$dataclass": [name, {}]})
        rest = len(outline).to_bytes(8, "little") + outline
        with pytest.raises(ValueError, match="not what it was"):
            unpack(b"KILNSTAGE1" + hashlib.sha256(rest).digest() + rest)


def read_files(folder):
    calls.append("read")
    return sorted(path.read_bytes() for path in folder.iterdir())


def test_a_folder_counts_by_what_lies_in_it(tmp_path):
    stages, one, other = tmp_path / "stages", tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "a.txt").write_bytes(b"a")
    assert Run(stages).stage("Read", read_files, one) == Run(stages).stage("Read", read_files, other) == [b"a"]
    assert calls == ["read"]
    (other / "a.txt").write_bytes(b"b")
    assert Run(stages).stage("Read", read_files, other) == [b"b"]


def test_the_report_says_what_made_the_result(tmp_path):
    run = Run(tmp_path)
    pipeline(run, np.arange(5.0), 1.0)
    report = run.report(recipes.make("reconstruct", {"seed": 7}))
    assert report["recipe"] == "reconstruct" and report["parameters"]["seed"] == 7 and list(report["seconds"]) == ["Double", "Total"]
    assert {"kiln", "python", "numpy"} <= set(report["versions"])


def test_a_report_says_how_much_memory_the_run_took():
    run = Run()
    before = run.report(recipes.Reconstruct())["peak_memory"]
    held = np.ones(300_000_000, np.uint8)
    after = run.report(recipes.Reconstruct())["peak_memory"]
    del held
    assert after > 3e8
    if sys.platform == "linux":  # elsewhere an earlier test's memory counts too
        assert 2.5e8 < after - before < 4e8
        assert Run().report(recipes.Reconstruct())["peak_memory"] < after - 2.5e8
