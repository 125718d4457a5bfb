# environment: backend
"""`kiln batch` on many models: what it costs over single runs, what workers bring, and what is lost when everything is killed.

    python build.py bench batch --assets FOLDER [--part items cold workers standard kill] [--items 30] [--preset draft] [--set NAME=VALUE]

Items are the models of FOLDER at several settings, generated primitives, and four broken files. Every run has a home of its own, so that no
stage is found finished; kernels are compiled before the first. The parts:

items     one command for all: every good one is made, every broken one named
cold      groups of items in one command, against a command for each item with the backend ended in between, in turns
workers   the same items with one worker and with two, in turns
standard  the wall time at preset standard over the sum of the captures' and stages' own times
kill      SIGKILL to everything in the middle, then the same command: what was done again
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trimesh

PARTS = ("items", "cold", "workers", "standard", "kill")
SETTINGS: tuple[dict[str, Any], ...] = ({}, {"surface.faces": 2000}, {"texture.size": 256}, {"fit.sh_degree": 1})  # items differ by these
BROKEN = ("cut.glb", "text.fbx", "empty.obj", "points.obj")


@dataclass(frozen=True)
class Item:
    name: str
    file: Path
    parameters: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "assets" / "static")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--items", type=int, default=30, help="of them 4 broken, where there are more than 4 (default: 30)")
    parser.add_argument("--groups", type=int, default=3, help="turns of the parts cold and workers (default: 3)")
    parser.add_argument("--preset", default="draft")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--out", type=Path, help="keep the folders of results here")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kiln-bench-") as scratch:
        root = a.out or Path(scratch)
        good = items_of(a.assets, root / "sources", a.items - len(BROKEN) if a.items > len(BROKEN) else a.items)
        runs = Runs(root, a.preset, [part for pair in a.set for part in ("--set", pair)])
        runs.batch("warm", good[:1])  # compiles what no run should pay for
        found = {}
        for part in a.part:
            found[part] = {"items": all_items, "cold": cold, "workers": workers, "standard": standard, "kill": kill}[part](runs, good, a)
            print(f"\n### {part}\n\n{table(found[part])}", flush=True)
        if a.json:
            a.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


# -- Items -----------------------------------------------------------------------------------------------------------------------------


def items_of(assets: Path, folder: Path, count: int) -> list[Item]:
    """The models of a folder and generated primitives, in turns, each at the next of the settings when its turn comes again."""
    folder.mkdir(parents=True, exist_ok=True)
    models = sorted(assets.glob("*.glb")) + primitives(folder)
    if not models:
        sys.exit(f"No GLB files in {assets}: name a folder with --assets.")
    found = []
    for number in range(count):
        file, turn = models[number % len(models)], number // len(models)
        found.append(Item(f"{file.stem}_{turn}", file, SETTINGS[(turn + number) % len(SETTINGS)] | {"seed": turn}))
    return found


def primitives(folder: Path) -> list[Path]:
    made = {
        "box": trimesh.creation.box((1, 0.6, 0.4)),
        "ball": trimesh.creation.icosphere(3),
        "torus": trimesh.creation.torus(1.0, 0.3),
        "cylinder": trimesh.creation.cylinder(0.4, 1.2),
        "capsule": trimesh.creation.capsule(1.0, 0.3),
    }
    for name, mesh in made.items():
        mesh.export(folder / f"{name}.obj")
    return [folder / f"{name}.obj" for name in made]


def broken(folder: Path, whole: Path) -> list[Item]:
    contents = (whole.read_bytes()[:3000], b"This is no FBX.", b"", b"v 0 0 0\nv 1 0 0\n")
    for name, content in zip(BROKEN, contents):
        (folder / name).write_bytes(content)
    return [Item(name.replace(".", "_"), folder / name, {}) for name in BROKEN]


# -- Runs ------------------------------------------------------------------------------------------------------------------------------


class Runs:
    """`kiln batch` as a command, each run in a home of its own."""

    def __init__(self, root: Path, preset: str, words: list[str]):
        self.root, self.preset, self.words = root, preset, words
        self._count = 0

    def prepare(self, name: str, items: list[Item], preset: str = "") -> tuple[list[str], dict[str, str], Path]:
        """The command, its environment, and the folder of its results."""
        self._count += 1
        place = self.root / f"{self._count:02d}-{name}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        lines = ["[defaults]", f'preset = "{preset or self.preset}"']
        for item in items:
            values = ", ".join(f'"{name}" = {json.dumps(value)}' for name, value in item.parameters.items())
            lines += ["[[items]]", f"file = {json.dumps(str(item.file))}", f'name = "{item.name}"', f"parameters = {{ {values} }}"]
        (place / "list.toml").write_text("\n".join(lines), encoding="utf-8")
        command = [sys.executable, "-m", "backend.cli", "batch", str(place / "list.toml"), "--out", str(place / "out"), *self.words]
        return command, {**os.environ, "KILN_HOME": str(place / "home")}, place / "out"

    def batch(self, name: str, items: list[Item], *words: str, preset: str = "") -> tuple[float, dict[str, Any]]:
        """Seconds of a run from nothing, backend and Blender started and all results fetched, and its report."""
        command, environment, out = self.prepare(name, items, preset)
        started = time.perf_counter()
        done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        if done.returncode not in (0, 1):
            sys.exit(f"kiln batch ended with {done.returncode}: {done.stderr}")
        stop(environment)
        told = json.loads((out / "report.json").read_text(encoding="utf-8"))
        shutil.rmtree(out.parent / "home", ignore_errors=True)
        return seconds, told


def stop(environment: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-m", "backend.cli", "stop"], env=environment, capture_output=True)


def states(told: dict[str, Any]) -> dict[str, str]:
    return {item["name"]: item["state"] for item in told["items"]}


def own_seconds(told: dict[str, Any]) -> float:
    """What captures and stages of all finished items took by their own clocks."""
    total = 0.0
    for item in told["items"]:
        if item["state"] == "done":
            report = json.loads((Path(item["folder"]) / "report.json").read_text(encoding="utf-8"))
            total += item["seconds"].get("capture", 0.0) + sum(report["seconds"].values())
    return total


def groups(items: list[Item], count: int) -> list[list[Item]]:
    return [group for number in range(count) if (group := items[number::count])]


# -- Parts -----------------------------------------------------------------------------------------------------------------------------


def all_items(runs: Runs, good: list[Item], a: argparse.Namespace) -> list[dict[str, Any]]:
    bad = broken(runs.root / "sources", good[0].file) if a.items > len(BROKEN) else []
    seconds, told = runs.batch("items", [*good, *bad])
    found = states(told)
    rows = [
        {
            "items": len(told["items"]),
            "made": sum(found[item.name] == "done" for item in good),
            "of": len(good),
            "broken, named": sum(found[item.name] == "failed" for item in bad),
            "seconds": round(seconds, 1),
            "seconds an item": round(seconds / len(told["items"]), 1),
        }
    ]
    for item in told["items"]:
        if item["error"]:
            print(f"{item['name']}: {item['error']['message']} {item['error']['hint']}")
    return rows


def cold(runs: Runs, good: list[Item], a: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for number, group in enumerate(groups(good, a.groups)):
        row: dict[str, Any] = {"group": number + 1, "items": len(group)}
        for what in ("cold", "batch") if number % 2 == 0 else ("batch", "cold"):
            if what == "batch":
                row["batch, s"] = round(runs.batch("batch", group)[0], 1)
            else:
                row["one by one, s"] = round(sum(runs.batch("cold", [item])[0] for item in group), 1)
        row["ratio"] = round(row["batch, s"] / row["one by one, s"], 3)
        rows.append(row)
    return [*rows, total(rows, "batch, s", "one by one, s")]


def workers(runs: Runs, good: list[Item], a: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for number, group in enumerate(groups(good, a.groups)):
        row: dict[str, Any] = {"group": number + 1, "items": len(group)}
        for count in (1, 2) if number % 2 == 0 else (2, 1):
            words = ("--workers", str(count), "--captures", str(count))
            row[f"{count} worker{'s' * (count > 1)}, s"] = round(runs.batch(f"workers{count}", group, *words)[0], 1)
        row["ratio"] = round(row["2 workers, s"] / row["1 worker, s"], 3)
        rows.append(row)
    return [*rows, total(rows, "2 workers, s", "1 worker, s")]


def standard(runs: Runs, good: list[Item], a: argparse.Namespace) -> list[dict[str, Any]]:
    some = good[: max(1, min(len(good), 6))]
    seconds, told = runs.batch("standard", some, preset="standard")
    own = own_seconds(told)
    return [
        {
            "items": len(some), "made": sum(state == "done" for state in states(told).values()), "batch, s": round(seconds, 1),
            "stages' own, s": round(own, 1), "ratio": round(seconds / own, 3),
        }
    ]  # fmt: skip


def kill(runs: Runs, good: list[Item], a: argparse.Namespace) -> list[dict[str, Any]]:
    """Kills when a third is done and a job computes; the second run has to leave what was done as it is."""
    some = good[: max(3, min(len(good), 9))]
    command, environment, out = runs.prepare("kill", some)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            found = list(states(json.loads((out / "report.json").read_text(encoding="utf-8"))).values())
            if found.count("done") >= len(some) // 3 and "computing" in found:
                break
        time.sleep(0.05)
    at_work = [
        name for name, state in states(json.loads((out / "report.json").read_text(encoding="utf-8"))).items() if state == "computing"
    ]
    everything = [process.pid, *descendants(process.pid)]
    for pid in everything:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    before = {item.name: changed for item in some if (changed := written(out, item.name))}
    started = time.perf_counter()
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    left = [pid for pid in everything if Path(f"/proc/{pid}").exists()]
    stop(environment)
    told = json.loads((out / "report.json").read_text(encoding="utf-8"))
    reports = [json.loads((out / name / "report.json").read_text(encoding="utf-8")) for name in at_work]
    return [
        {
            "items": len(some), "processes killed": len(everything), "done before": len(before),
            "made again": sum(written(out, name) != changed for name, changed in before.items()),
            "stages found of those at work": ", ".join(f"{len(one['cached_stages'])} of {len(one['seconds'])}" for one in reports),
            "made at last": sum(state == "done" for state in states(told).values()), "exit code": again.returncode,
            "second run, s": round(seconds, 1), "processes left": len(left),
        }
    ]  # fmt: skip


def written(out: Path, name: str) -> int:
    """When an item was finished; 0 where it is not."""
    with contextlib.suppress(OSError):
        return (out / name / "item.json").stat().st_mtime_ns
    return 0


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and theirs (Linux)."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [child for child, parent in parents.items() if parent == pid]
    return found + [below for child in found for below in descendants(child)]


# -- Tables ----------------------------------------------------------------------------------------------------------------------------


def total(rows: list[dict[str, Any]], over: str, under: str) -> dict[str, Any]:
    sums = {name: round(sum(row[name] for row in rows), 1) for name in ("items", over, under)}
    return {"group": "all", **sums, "ratio": round(sums[over] / sums[under], 3)}


def table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows)])


if __name__ == "__main__":
    main()
