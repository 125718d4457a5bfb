"""Flamenco's job type: what Flamenco would make of it, and that the commands which come out make every asset once and one report."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
STAND_IN = Path(__file__).with_name("flamenco.js")
JOB_TYPE = ROOT / "farm" / "kiln_flamenco.js"
KILN = shutil.which("kiln", path=os.path.dirname(sys.executable))  # this environment's


@pytest.fixture
def compiled(tmp_path):
    """Compiles the job type with settings, as Flamenco Manager does; the tasks by their names."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node, which stands in for the JavaScript of Flamenco Manager")

    def compile(**settings):
        (tmp_path / "settings.json").write_text(json.dumps(settings))
        done = subprocess.run([node, STAND_IN, JOB_TYPE, tmp_path / "settings.json"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return {task["name"]: task for task in json.loads(done.stdout)["tasks"]}

    return compile


def arguments(task):
    (command,) = task["commands"]
    assert command["name"] == "exec"
    return [command["parameters"]["exe"], *command["parameters"]["args"]]


def test_the_items_are_dealt_out_and_the_report_waits_for_all(compiled):
    tasks = compiled(manifest="/farm/props.toml", out="/farm/out", tasks=3, preset="draft", fbx=True, library="/farm/props.blend")
    assert list(tasks) == ["items-1-of-3", "items-2-of-3", "items-3-of-3", "report"]
    assert tasks["report"]["dependencies"] == list(tasks)[:3]
    same = ["kiln", "batch", "/farm/props.toml", "--out", "/farm/out", "--preset", "draft", "--fbx", "--blender", "{blender}"]
    for number in (1, 2, 3):
        task = tasks[f"items-{number}-of-3"]
        assert arguments(task) == [*same, "--shard", f"{number}/3"] and task["dependencies"] == [] and task["type"] == "blender"
    assert arguments(tasks["report"]) == [*same, "--library", "/farm/props.blend"]


def test_a_job_without_tasks_is_refused(compiled):
    with pytest.raises(AssertionError, match="The number of tasks is 0"):
        compiled(manifest="/farm/props.toml", out="/farm/out", tasks=0)


@pytest.mark.skipif(KILN is None, reason="the command `kiln` is not installed beside this Python")
def test_what_flamenco_runs_makes_every_item_once_and_one_report(compiled, tmp_path):
    lines = ['defaults = { recipe = "steps", parameters = { size = 10 } }']
    for name in "abcde":
        (tmp_path / name / "in").mkdir(parents=True)
        (tmp_path / name / "in" / "text.txt").write_text(name)
        fault = ', parameters = { fault = "refuse" }' if name == "c" else ""
        lines += [f'[[items]]\nfile = "{name}"{fault}'.replace(", parameters", "\nparameters")]
    (tmp_path / "list.toml").write_text("\n".join(lines))
    out, home = tmp_path / "out", tmp_path / "home"
    variables = {
        **os.environ, "KILN_HOME": str(home), "KILN_TEST_MARKS": str(tmp_path / "marks"), "PYTHONPATH": str(ROOT),
        "KILN_PIPELINES": "tests.backend.steps_recipe",
    }  # fmt: skip

    def run(task):
        return subprocess.run(arguments(task), env=variables, capture_output=True, text=True, timeout=120)

    tasks = compiled(manifest=str(tmp_path / "list.toml"), out=str(out), tasks=2, kiln=KILN, blender="")
    try:
        shards = [subprocess.Popen(arguments(task), env=variables) for name, task in tasks.items() if name != "report"]  # two at a time
        assert [shard.wait(timeout=120) for shard in shards] == [0, 0], "an item that fails is no reason to run its shard again"
        assert not (out / "report.json").exists()
        assert all((out / name / "sum.txt").exists() == (name != "c") for name in "abcde")
        assert len((tmp_path / "marks").read_text().split()) == 6, "each once, and the one that fails twice"

        done = run(tasks["report"])
        assert done.returncode == 1 and "c: These numbers are no good. Give better ones." in done.stderr
        told = json.loads((out / "report.json").read_text())
        states = {item["name"]: item["state"] for item in told["items"]}
        assert states == {"a": "done", "b": "done", "c": "failed", "d": "done", "e": "done"} and (out / "index.html").exists()
        assert len((tmp_path / "marks").read_text().split()) == 6, "nothing was made again"
    finally:
        subprocess.run([KILN, "stop"], env=variables, capture_output=True, timeout=60)
