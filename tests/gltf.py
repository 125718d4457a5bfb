"""The Khronos validator of glTF, on files that Kiln writes. `build.py test` fetches it; it runs where there is node."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

PACKAGE = next((Path(__file__).parents[1] / ".venv" / "cache").glob("gltf-validator-*/package"), None)
SCRIPT = """
const validator = require(process.argv[1]), fs = require('fs');
Promise.all(process.argv.slice(2).map(path => validator.validateBytes(new Uint8Array(fs.readFileSync(path)), {maxIssues: 0})))
  .then(reports => console.log(JSON.stringify(reports)));
"""


def reports(*paths: Path) -> list[dict]:
    """The validator's report of each file; skips the test where it cannot run."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed: it runs the Khronos validator")
    if PACKAGE is None:
        pytest.skip("the Khronos validator is not in .venv/cache: `build.py test` fetches it where there is npm")
    command = [node, "-e", SCRIPT, "--", str(PACKAGE / "index.js"), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def faults(*paths: Path) -> list[str]:
    """Errors and warnings of all the files: name, severity (0: error, 1: warning) and words."""
    found = []
    for path, report in zip(paths, reports(*paths), strict=True):
        assert report["info"]["version"] == "2.0"
        issues = [issue for issue in report["issues"]["messages"] if issue["severity"] < 2]
        found += [f"{path.name}: {issue['severity']} {issue['message']} {issue.get('pointer', '')}" for issue in issues]
    return found
