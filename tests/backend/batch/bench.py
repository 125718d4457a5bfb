"""`kiln batch` in processes of its own, for the tests of batches."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.backend import steps_recipe

ROOT = Path(__file__).parents[3]


class Bench:
    """A folder of inputs, and `kiln batch` on them. All of them share a home of Kiln's, because a backend takes seconds to warm up."""

    def __init__(self, folder: Path, home: Path):
        self.folder, self.out, self.home, self.marks = folder, folder / "out", home, home / "marks"
        self.begun, self.before = time.time(), 0
        self.before = self.computed()
        self.environment = {
            **os.environ, "KILN_HOME": str(home), "KILN_TEST_MARKS": str(self.marks), "PYTHONPATH": str(ROOT),
            "KILN_PIPELINES": "tests.backend.steps_recipe,tests.backend.batch.cores_recipe",
        }  # fmt: skip

    def begin(self, *words, command="batch"):
        where = ["list.toml", "--out", "out"] if command == "batch" else []
        return subprocess.Popen(
            [sys.executable, "-m", "backend.cli", command, *where, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=self.folder, env=self.environment,
        )  # fmt: skip

    def end(self, process, code=0):
        out, said = process.communicate(timeout=120)
        assert process.returncode == code, f"{process.returncode}: {out} {said}"
        return out + said

    def batch(self, *words, code=0):
        return self.end(self.begin(*words), code)

    def kiln(self, command, *words):
        return self.end(self.begin(*words, command=command))

    def items(self, *entries, **defaults):
        """list.toml: an item for each text, with the parameters that follow it."""
        lines = ["[defaults]", 'recipe = "steps"', f"parameters = {_table({'size': 10, **defaults})}"]
        for name, parameters in entries:
            (self.folder / name / "in").mkdir(parents=True, exist_ok=True)
            (self.folder / name / "in" / "text.txt").write_bytes(self.text(name))
            lines += ["[[items]]", f'file = "{name}"', f"parameters = {_table(parameters)}"]
        (self.folder / "list.toml").write_text("\n".join(lines))

    def report(self):
        return json.loads((self.out / "report.json").read_text())

    def states(self):
        return {item["name"]: item["state"] for item in self.report()["items"]}

    def until(self, ready, what):
        deadline = time.monotonic() + 90
        while True:
            with contextlib.suppress(OSError, ValueError, KeyError):
                if ready():
                    return
            assert time.monotonic() < deadline, f"{what}: {self.states()}"
            time.sleep(0.02)

    def computed(self):
        """How often the second stage really ran."""
        return (len(self.marks.read_text().splitlines()) if self.marks.exists() else 0) - self.before

    def text(self, name):
        """The content of an item's file, which no other test has: finished stages are kept for all jobs."""
        return f"{name} of {self.folder.name}".encode()

    def jobs(self):
        return [job for job in json.loads(self.kiln("jobs", "--json")) if job["created"] >= self.begun]

    def backend(self):
        return json.loads((self.home / "run" / "connection.json").read_text())["pid"]

    def is_right(self, name, **values):
        expected = steps_recipe.draw(self.text(name), values.get("size", 10), 0, 0) * 2.0
        return (self.out / name / "sum.txt").read_text() == f"{float(expected.sum())!r}\n"


def _table(parameters):
    return "{ " + ", ".join(f'"{name}" = {json.dumps(value)}' for name, value in parameters.items()) + " }"
