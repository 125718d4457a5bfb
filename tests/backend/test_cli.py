"""The `kiln` command as a person meets it: real processes, a backend that it starts itself, exit codes, sentences."""

import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from backend import cli, server
from protocol import connection, recipes
from protocol.errors import KilnError
from tests.backend import steps_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def kiln(tmp_path, monkeypatch):
    """`kiln(...)` runs the command in a home of its own; a backend that it left is stopped."""
    monkeypatch.setenv("KILN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KILN_PIPELINES", "tests.backend.steps_recipe")
    monkeypatch.setenv("KILN_TEST_MARKS", str(tmp_path / "marks"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "input" / "in").mkdir(parents=True)
    (tmp_path / "input" / "in" / "text.txt").write_bytes(b"hello")

    def begin(*words):
        command = [sys.executable, "-m", "backend.cli", *map(str, words)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)

    def run(*words, code=0):
        process = begin(*words)
        out, errors = process.communicate(timeout=120)
        assert process.returncode == code, f"{process.returncode}: {out} {errors}"
        return out if code == 0 else errors

    run.begin = begin
    yield run
    if (tmp_path / "home" / "run" / "connection.json").exists():
        pid = json.loads((tmp_path / "home" / "run" / "connection.json").read_text())["pid"]
        begin("stop").communicate(timeout=30)
        deadline = time.monotonic() + 10
        while running(pid):
            assert time.monotonic() < deadline, "the backend does not stop"
            time.sleep(0.05)


def running(pid):
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def expected(**values):
    numbers = steps_recipe.draw(b"hello", values.get("size", 1000), values.get("seed", 0), 0)
    return f"{float((numbers * values.get('factor', 2.0)).sum())!r}\n"


def test_run_starts_a_backend_follows_the_job_and_brings_the_results(kiln, tmp_path):
    kiln("run", "steps", "input", "--out", "out", "--factor", 3, "--size", 50)
    assert (tmp_path / "out" / "sum.txt").read_text() == expected(factor=3.0, size=50)
    assert (tmp_path / "out" / "more" / "stages.txt").read_text() == ""
    pid = json.loads((tmp_path / "home" / "run" / "connection.json").read_text())["pid"]
    job = json.loads(kiln("run", "steps", "input", "--out", "again", "--preset", "draft", "--seed", 2, "--title", "A name", "--json"))
    assert job["state"] == "done" and job["title"] == "A name" and job["parameters"]["size"] == 10 and job["parameters"]["seed"] == 2
    assert (tmp_path / "again" / "sum.txt").read_text() == expected(size=10, seed=2)
    assert json.loads((tmp_path / "home" / "run" / "connection.json").read_text())["pid"] == pid  # the same backend


def test_stop_returns_when_the_backend_is_gone_and_a_run_gets_a_new_one(kiln, tmp_path):
    kiln("run", "steps", "input", "--out", "out")
    kiln("stop")
    server._Lock(tmp_path / "home" / "run" / "lock").close()  # raises while a backend is there
    kiln("run", "steps", "input", "--out", "again")
    assert (tmp_path / "again" / "sum.txt").exists()


def test_a_run_waits_for_a_backend_that_is_still_ending(kiln, tmp_path):
    (tmp_path / "home" / "run").mkdir(parents=True)
    ending = server._Lock(tmp_path / "home" / "run" / "lock")
    process = kiln.begin("run", "steps", "input", "--out", "out")
    log = tmp_path / "home" / "logs" / "server.log"
    while not log.exists() or "already serves" not in log.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    ending.close()
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and (tmp_path / "out" / "sum.txt").exists(), errors


def test_a_killed_backend_whose_port_another_program_has_is_replaced(kiln, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:

        def hang_up():
            with contextlib.suppress(OSError):
                while True:
                    other.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        keys = connection.Keys.make()
        endpoint = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        stale = connection.Connection(endpoint, keys.server_key, keys.client_key, keys.client_secret)
        stale.save(tmp_path / "home" / "run" / "connection.json")
        assert "ended the handshake" in kiln("jobs", code=3)
        kiln("run", "steps", "input", "--out", "out")
        assert (tmp_path / "out" / "sum.txt").exists()


def test_progress_without_a_terminal_is_a_line_a_stage(kiln):
    process = kiln.begin("run", "steps", "input", "--out", "out", "--seconds", 0.3)
    out, errors = process.communicate(timeout=120)
    assert out == "" and process.returncode == 0
    lines = errors.splitlines()
    assert [line for line in lines if line in ("Draw", "Scale", "Add", "Save")] == ["Draw", "Scale", "Add", "Save"] and len(lines) < 10


def test_a_failed_job_says_why_and_what_to_do_and_can_be_retried(kiln):
    errors = kiln("run", "steps", "input", "--out", "out", "--fault", "refuse", code=1)
    assert "These numbers are no good." in errors and "Give better ones." in errors and "kiln jobs retry" in errors
    (job,) = json.loads(kiln("jobs", "--json"))
    assert job["state"] == "failed" and job["id"] in kiln("jobs", "list") and "bad-input" in kiln("jobs")
    assert "failed" in kiln("jobs", "download", job["id"], "--out", "out", code=1)
    assert kiln("jobs", "retry", job["id"]).strip() in ("queued", "running")


def test_jobs_are_shown_downloaded_and_removed(kiln, tmp_path):
    job = json.loads(kiln("run", "steps", "input", "--out", "out", "--json"))
    text = kiln("jobs", "show", job["id"])
    assert "state      done" in text and "factor = 2.0" in text and "sum.txt" in text
    assert json.loads(kiln("jobs", "show", job["id"], "--json"))["parameters"] == job["parameters"]
    kiln("jobs", "download", job["id"], "--out", "elsewhere")
    assert (tmp_path / "elsewhere" / "sum.txt").read_text() == expected()
    assert "is done" in kiln("jobs", "retry", job["id"], code=2)
    kiln("jobs", "remove", job["id"])
    assert kiln("jobs") == "" and "no job" in kiln("jobs", "show", job["id"], code=2)


@pytest.mark.skipif(os.name != "posix", reason="sends Ctrl-C as a signal")
def test_ctrl_c_cancels_the_job_and_leaves_the_backend(kiln):
    process = kiln.begin("run", "steps", "input", "--out", "out", "--seconds", 60)
    while "Draw" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130 and "kiln jobs retry" in errors
    (job,) = json.loads(kiln("jobs", "--json"))
    assert job["state"] == "cancelled"


def test_without_a_backend_jobs_says_how_to_start_one(kiln):
    assert "kiln serve" in kiln("jobs", code=3)
    assert "kiln serve" in kiln("stop", code=3)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "steps", "input", "--out", "out", "--size", "0"], "size cannot be 0"),
        (["run", "steps", "nowhere", "--out", "out"], "no folder nowhere"),
        (["run", "reconstruct", "input", "--out", "out"], "no transforms.json"),
        (["run", "reconstruct", "input", "--out", "out", "--fit-splats", "many"], "invalid int value"),
        (["run", "nothing", "input", "--out", "out"], "invalid choice"),
    ],
)
def test_bad_arguments_are_named_before_anything_starts(kiln, tmp_path, words, sentence):
    assert sentence in kiln(*words, code=2)
    assert not (tmp_path / "home").exists()


def test_every_parameter_of_a_recipe_is_a_flag_with_its_help(kiln):
    text = " ".join(kiln("run", "reconstruct", "--help").split())
    for parameter in recipes.parameters(recipes.Reconstruct):
        if parameter.group != "capture":
            assert f"--{parameter.name.replace('.', '-').replace('_', '-')} " in text
    assert "Triangles of the finished mesh, at most. (default: 20000, 100 to 2000000)" in text


def test_how_views_are_taken_is_no_flag_for_a_folder_of_views(kiln):
    assert "capture" not in kiln("run", "reconstruct", "--help")
    assert "unrecognized arguments" in kiln("run", "reconstruct", "input", "--out", "out", "--capture-views", 9, code=2)


def test_the_command_starts_without_heavy_libraries():
    code = "import sys; from backend import cli; cli._parser()\nprint({'torch', 'numba', 'numpy', 'scipy', 'PIL'} & set(sys.modules))"
    environment = {key: value for key, value in os.environ.items() if key != "KILN_PIPELINES"}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=environment, cwd=ROOT).strip() == "set()"


def test_views_are_the_files_that_transforms_json_names(tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("train/r_0.png", "train/r_1.png", "geometry.npz", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    frames = [{"file_path": "./train/r_0"}, {"file_path": "train/r_1.png", "geometry_file_path": "geometry.npz"}]
    (tmp_path / "transforms.json").write_text(json.dumps({"frames": frames}))
    found = cli.gather(tmp_path, "views")
    assert (
        set(found)
        == {"transforms.json", "train/r_0.png", "train/r_1.png", "geometry.npz"}
        == set(cli.gather(tmp_path / "transforms.json", "views"))
    )
    assert all(path.is_file() for path in found.values())
    (tmp_path / "train" / "r_1.png").unlink()
    with pytest.raises(KilnError, match="names train/r_1.png, which is not"):
        cli.gather(tmp_path, "views")
    (tmp_path / "transforms.json").write_text(json.dumps({"frames": [{"file_path": "../../secret.png"}]}))
    with pytest.raises(KilnError, match="cannot name an input"):
        cli.gather(tmp_path, "views")
    (tmp_path / "clip.mp4").write_bytes(b"")
    for kind in ("views", "motion"):
        with pytest.raises(KilnError, match="clip.mp4 is no folder of views") as caught:
            cli.gather(tmp_path / "clip.mp4", kind)
        assert "video" in caught.value.hint


def test_views_in_motion_may_share_their_files(tmp_path):
    for name in ("color_00001_000.png", "color_00001_001.png", "passes_00001.npz", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    passes = {"geometry_file_path": "passes_00001.npz", "material_file_path": "passes_00001.npz"}
    frames = [{"frame": 1, "file_path": f"color_00001_{layer:03}.png", **passes, "layer": layer} for layer in range(2)]
    (tmp_path / "transforms.json").write_text(json.dumps({"fps": 24.0, "frames": frames}))
    found = cli.gather(tmp_path, "motion")
    assert set(found) == {"transforms.json", "color_00001_000.png", "color_00001_001.png", "passes_00001.npz"}


def test_splats_are_one_file_under_the_name_that_the_recipe_knows(tmp_path):
    for name in ("Garden.PLY", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert cli.gather(tmp_path / "Garden.PLY", "splats") == {"splats.ply": tmp_path / "Garden.PLY"} == cli.gather(tmp_path, "splats")
    (tmp_path / "garden.spz").write_bytes(b"")
    assert cli.gather(tmp_path / "garden.spz", "splats") == {"splats.spz": tmp_path / "garden.spz"}
    with pytest.raises(KilnError, match="holds 2 .ply and .spz files"):
        cli.gather(tmp_path, "splats")
    (tmp_path / "splats.ply").write_bytes(b"")  # a folder of results
    assert cli.gather(tmp_path, "splats") == {"splats.ply": tmp_path / "splats.ply"}
    with pytest.raises(KilnError, match="notes.txt is not splats"):
        cli.gather(tmp_path / "notes.txt", "splats")
    with pytest.raises(KilnError, match="There is no"):
        cli.gather(tmp_path / "nowhere.ply", "splats")


@pytest.fixture
def pictures(tmp_path):
    """A picture, a video, a file of another kind and a folder of numbered frames."""
    for name in ("Fox.JPG", "clip.mp4", "fox.exr"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "turn").mkdir()
    for name in ("frame_10.png", "frame_9.png", "frame_100.jpg", "frame_11.png", "notes.txt"):
        (tmp_path / "turn" / name).write_bytes(b"")
    return tmp_path


def test_a_picture_is_one_file_whichever_way_it_is_given(pictures):
    fox = pictures / "Fox.JPG"
    for given in ((fox, None, None), (None, fox, None)):
        assert cli.gather_picture(*given, "") == ({"image.jpg": fox}, fox)
    assert cli.gather_picture(None, None, None, "a fox") == ({}, None)


def test_a_turntable_without_cameras_is_sent_in_the_order_of_its_numbers(pictures):
    turn = pictures / "turn"
    ordered = [turn / name for name in ("frame_9.png", "frame_10.png", "frame_11.png", "frame_100.jpg")]
    wanted = dict(zip(("view_000.png", "view_001.png", "view_002.png", "view_003.jpg"), ordered))
    for given in ((turn, None, None), (None, None, turn)):
        found, start = cli.gather_picture(*given, "")
        assert list(found.items()) == list(wanted.items()) and start == turn
    for name in ("view_000.png", "view_001.png", "view_002.png", "view_003.png", "preview.png", "comparison.png"):  # a results folder
        (turn / name).write_bytes(b"")
    assert list(cli.gather_picture(turn, None, None, "")[0]) == [f"view_{number:03d}.png" for number in range(4)]
    (turn / "transforms.json").write_text(json.dumps({"frames": [{"file_path": "frame_9.png"}]}))
    assert cli.gather_picture(None, None, turn, "")[0] == {
        "transforms.json": turn / "transforms.json", "frame_9.png": turn / "frame_9.png"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((None, None, None), "neither a picture, nor a prompt, nor a folder"),
        ((None, "turn", None), "turn is a folder, not a picture"),
        ((None, "clip.mp4", None), "clip.mp4 is a video, not a picture"),
        (("clip.mp4", None, None), "save the frames as pictures"),
        ((None, "fox.exr", None), "fox.exr is no picture of a kind that Kiln reads: png, jpg"),
        ((None, "nowhere.png", None), "There is no file"),
        ((None, "Fox.JPG", "turn"), "A picture and a folder of views were given"),
        (("Fox.JPG", "Fox.JPG", None), "Give one of INPUT, --image and --views"),
        ((None, None, "nowhere"), "There is no folder"),
        ((None, None, "Fox.JPG"), "Fox.JPG is a file, not a folder of views"),
        ((None, None, "."), "one picture"),
    ],
)
def test_what_is_no_picture_is_said_with_the_way_out(pictures, given, sentence):
    with pytest.raises(KilnError) as caught:
        cli.gather_picture(*(None if name is None else pictures / name for name in given), "")
    assert sentence in str(caught.value) and caught.value.code == "bad-input" and caught.value.hint


def test_doctor_reports_each_part_and_whether_a_backend_runs(kiln):
    findings = {finding["what"]: finding for finding in json.loads(kiln("doctor", "--json"))}
    assert {"kiln", "python", "packages", "device", "splats", "memory", "home", "backend"} <= set(findings)
    assert all(set(finding) == {"what", "state", "found", "fix"} for finding in findings.values())
    assert all((finding["state"] == "ok") == (finding["fix"] == "") for finding in findings.values())
    assert "none runs" in findings["backend"]["found"] and "home" in findings["home"]["found"]
    kiln("run", "steps", "input", "--out", "out")
    assert " runs on " in kiln("doctor").splitlines()[-1]


def test_doctor_names_a_missing_package_and_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KILN_HOME", str(tmp_path))
    real = importlib.metadata.version

    def version(name):
        if name == "xatlas":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "missing: xatlas" in text and "build.py setup" in text


def test_doctor_says_when_torch_does_not_fit_the_gpu(monkeypatch):
    from backend import worker

    notes = []
    found = {"kind": "cpu", "name": "CPU, 2 cores", "cores": 2, "memory": 8e9, "free_memory": 6e9, "torch": "2.13.0+cpu"}
    monkeypatch.setattr(worker, "device", lambda: found)
    monkeypatch.setattr(cli, "_nvidia_driver", lambda: "NVIDIA RTX 4090, driver 570.1")
    cli._examine_device(lambda what, found, problem="", warning="": notes.append((what, found, problem or warning)))
    device = notes[0]
    assert "driver 570.1" in device[1] and "built for the CPU" in device[2]
