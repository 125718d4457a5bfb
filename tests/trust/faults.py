"""Random faults at random moments of running jobs: `python build.py faults --count N [--seed S]`.

Each fault has a job of its own in a real backend: something is killed, stopped, filled, held or damaged in the middle of it, then whatever
is down is started again, as a person or Blender would. After that the job must end as promised: done, with the very files of an undisturbed
run, once; or with an error that a person can act on, after which a retry gives those files. No process, lock or temporary file may stay.
Closes with `N passed, N failed`. Linux only: it looks for processes in /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from protocol.client import Client
from protocol.connection import Connection
from tests.backend import steps_recipe
from tests.backend.ball import write_ball
from tests.protocol.service import ROOT, Network, Service

STAGES = {"steps": ("Read inputs", "Draw", "Scale", "Add", "Save"), "reconstruct": ("Fit splats", "Extract surface", "Bake texture")}
BALL = {"fit.iterations": 60, "fit.splats": 800, "fit.device": "cpu", "surface.grid": 40, "surface.faces": 600, "texture.size": 64}
REAL = 15  # every so many faults one job is a real reconstruction
ACTIONABLE = {"no-space", "worker-died", "damaged-input", "disk", "out-of-memory"}  # of a job that a fault ended: the hint says what to do
PATIENCE = 300.0  # seconds from the repair to the job's end, on a machine that has other things to do too
DISK = "192m"


class Lane:
    """One backend with a home of its own, in which faults happen one after the other."""

    def __init__(self, folder: Path, stall: float):
        self.folder, self.stall = folder, stall
        self.mounted = _mount(folder / "disk")
        self.home = folder / "disk" / "home"
        self.frozen, self.marks = folder / "frozen", folder / "marks"
        clock = (  # the clock of the day stands still while a file lies there
            f"import os, time\n_now, _stopped = time.time, []\ndef _time():\n    if not os.path.exists({str(self.frozen)!r}):\n"
            "        _stopped.clear()\n        return _now()\n    _stopped[:] = _stopped or [_now()]\n    return _stopped[0]\n"
            "time.time = _time"
        )
        self.service = Service(self.home, workers=1, before=clock).start()
        self.undisturbed: dict[str, str] = {}

    def close(self) -> list[str]:
        """Ends the backend; what is left of it afterwards, as sentences."""
        self.service.stop()
        left = [f"process {pid} outlives the backend" for pid in self.processes()]
        left += [f"{path.name} is left in run/" for path in (self.home / "run").glob("*.json")]
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder / "disk")], check=False)
        return left

    def processes(self) -> dict[int, str]:
        """Those that serve this home, by what they are: server or worker."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                if f"KILN_HOME={self.home}\0".encode() in (entry / "environ").read_bytes() + b"\0":
                    line = (entry / "cmdline").read_bytes()
                    if line and b"tests.trust.faults" not in line:
                        found[int(entry.name)] = "worker" if b"backend.worker" in line else "server"
        return found

    # -- One fault --------------------------------------------------------------------------------------------------------------------

    def suffer(self, number: int, seed: int) -> list[str]:
        """Lets one fault happen; what was not as it must be, as sentences."""
        chance = random.Random(f"{seed} {number}")
        kinds = list(FAULTS if self.mounted else {name: fault for name, fault in FAULTS.items() if name != "full disk"})
        kind = kinds[number % len(kinds)]  # each of them as often
        recipe = "reconstruct" if number % REAL == REAL - 1 else "steps"
        stage = chance.choice(STAGES[recipe])
        seconds = chance.uniform(0.15, 0.5)
        order = self.order(recipe, f"fault {seed} {number}", chance, seconds)
        (self.folder / "order.json").write_text(json.dumps(order))
        about = f"fault {number} ({kind} in {stage!r} of {recipe})"
        client: subprocess.Popen | None = None
        try:
            with contextlib.ExitStack() as held:
                network = held.enter_context(Network(self.service.connection())) if kind == "network stalls" else None
                client = self.start_client(network)
                self.wait_for(order["request"], stage)
                time.sleep(chance.random() * seconds)
                FAULTS[kind](self, chance, client, network)
            if client.poll() is None:
                client.wait(PATIENCE)
            problems = self.check(order)
        except Exception as error:  # a demand that could not even be looked at
            problems = [f"{type(error).__name__}: {error}"]
            with contextlib.suppress(Exception):  # the next fault finds nothing of this one
                self.restart()
                with self.service.client() as asked:
                    for job in asked.jobs():
                        asked.cancel(job["id"])
        finally:
            if client is not None and client.poll() is None:
                client.kill()
                client.wait()
            self.frozen.unlink(missing_ok=True)
        return [f"{about}: {problem}" for problem in problems]

    def order(self, recipe: str, request: str, chance: random.Random, seconds: float) -> dict[str, Any]:
        if recipe == "reconstruct":
            inputs = self.folder / "ball"
            if not inputs.exists():
                inputs.mkdir()
                write_ball(inputs)
            values = {**BALL, "seed": chance.randrange(2)}
        else:
            inputs = self.folder / f"text {request}"
            (inputs / "in").mkdir(parents=True)
            (inputs / "in" / "text.txt").write_bytes(request.encode())
            values = {"size": 200_000, "factor": float(chance.randrange(1, 9)), "seconds": seconds, "seed": chance.randrange(100)}
        return {"request": request, "recipe": recipe, "values": values, "inputs": str(inputs), "out": str(self.folder / "out")}

    def start_client(self, network: Network | None = None) -> subprocess.Popen:
        """A process that submits the order, waits for its end, and fetches the results."""
        path = self.service.path  # read again when the backend was started again
        if network is not None:
            path = self.folder / "connection.json"
            network.connection.save(path)
        command = [sys.executable, "-m", "tests.trust.faults", "--client", str(self.folder / "order.json"), "--connection", str(path)]
        with open(self.folder / "client.log", "ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log)

    def wait_for(self, request: str, stage: str) -> None:
        """Until the job is in that stage, or past it."""
        until = time.monotonic() + PATIENCE
        with self.service.client() as client:
            while time.monotonic() < until:
                found = [job for job in client.jobs() if job["title"] == request]
                if found and (found[0]["stage"] == stage or found[0]["state"] in ("done", "failed", "cancelled")):
                    return
                time.sleep(0.01)
        raise TimeoutError(f"the job did not come to {stage!r}")

    def restart(self) -> None:
        if self.service.process.poll() is None:
            self.service.kill()
        self.service.start()

    def check(self, order: dict[str, Any]) -> list[str]:
        """What is not as promised, after whatever is down was started again."""
        if self.service.process.poll() is not None:
            self.service.start()
        problems = []
        client = self.start_client()  # as the user's program, run again
        code = client.wait(PATIENCE)
        with self.service.client() as asked:
            jobs = [job for job in asked.jobs() if job["title"] == order["request"]]
            if len(jobs) != 1:
                return [f"{len(jobs)} jobs of one request"]
            job = asked.job(jobs[0]["id"])
            if job["state"] == "failed":
                error = job["error"]
                if error["code"] not in ACTIONABLE or not error["hint"]:
                    problems.append(f"it ended in {error}")
                asked.retry(job["id"])
                for _ in asked.watch(job["id"], timeout=PATIENCE):
                    pass
                job = asked.job(job["id"])
                code = self.start_client().wait(PATIENCE)
            if job["state"] != "done" or code:
                return [*problems, f"it is {job['state']} ({job['error']}), the client ended with {code}"]
            events = asked.events(job["id"])
            if sum(event["kind"] == "done" for event in events) != 1:
                problems.append("it is not told to be done exactly once")
            asked.remove(job["id"])
        problems += self.check_results(order)
        until = time.monotonic() + 10
        while (left := self.leftovers()) and time.monotonic() < until:
            time.sleep(0.05)
        return problems + left

    def check_results(self, order: dict[str, Any]) -> list[str]:
        out = Path(order["out"])
        if order["recipe"] == "steps":
            values = order["values"]
            numbers = steps_recipe.draw(order["request"].encode(), values["size"], values["seed"], 0)
            same = (out / "sum.txt").read_text() == f"{float((numbers * values['factor']).sum())!r}\n"
        else:
            hash = hashlib.sha256((out / "mesh.glb").read_bytes()).hexdigest()
            same = hash == self.undisturbed.setdefault(json.dumps(order["values"], sort_keys=True), self.undisturbed_hash(order))
        shutil.rmtree(out, ignore_errors=True)
        return [] if same else ["its results are not those of an undisturbed run"]

    def undisturbed_hash(self, order: dict[str, Any]) -> str:
        """Of mesh.glb, computed from nothing with nobody in the way."""
        for path in (self.home / "store" / "stages").iterdir():
            path.unlink()
        with self.service.client() as client:
            inputs = {path.name: path for path in Path(order["inputs"]).iterdir()}
            job = client.submit(order["recipe"], order["values"], inputs, title="undisturbed")
            for _ in client.watch(job["id"], timeout=PATIENCE):
                pass
            done = client.job(job["id"])
            client.remove(job["id"])
            return done["results"]["mesh.glb"]["hash"]

    def leftovers(self) -> list[str]:
        store = self.home / "store"
        left = [f"{path.relative_to(store)} is left" for folder in ("runs", "temporary", "uploads") for path in (store / folder).iterdir()]
        kinds = Counter(self.processes().values())
        if kinds["server"] != 1 or kinds["worker"] > 1:
            left.append(f"processes: {dict(kinds)}")
        return left

    # -- Faults -----------------------------------------------------------------------------------------------------------------------

    def kill(self, *kinds: str) -> None:
        for pid, kind in self.processes().items():
            if kind in kinds:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if "server" in kinds:
            self.service.process.wait()

    def _worker_dies(self, chance: random.Random, client: subprocess.Popen, network: Network | None) -> None:
        self.kill("worker")

    def _server_dies(self, chance: random.Random, client: subprocess.Popen, network: Network | None) -> None:
        self.kill("server")
        time.sleep(chance.random())
        self.service.start()

    def _client_dies(self, chance: random.Random, client: subprocess.Popen, network: Network | None) -> None:
        client.kill()
        client.wait()

    def _all_die(self, chance: random.Random, client: subprocess.Popen, network: Network | None) -> None:
        self.kill("server", "worker")
        client.kill()
        client.wait()
        self.service.start()

    def _full_disk(self, chance: random.Random, client: subprocess.Popen, network: Network | None) -> None:
        over, other = time.monotonic() + chance.uniform(0.5, 2), self.folder / "disk" / "other"
        with open(other, "wb", buffering=0) as file:
            while time.monotonic() < over:
                try:
                    file.write(b"x" * 65536)
                except OSError:
                    time.sleep(0.002)
        other.unlink()

    def _table_held(self, chance: random.Random, client: subprocess.Popen, network: Network | None) -> None:
        """Another program holds the job table when the backend starts again."""
        self.kill("server", "worker")
        holder = sqlite3.connect(self.home / "store" / "kiln.sqlite", timeout=10)
        holder.execute("BEGIN EXCLUSIVE")
        self.service.launch()
        code = self.service.process.wait(30)
        holder.rollback()
        holder.close()
        if not code or "holds" not in self.service.log():
            raise AssertionError("the backend did not say who holds its table")
        self.service.start()

    def _damaged_stage(self, chance: random.Random, client: subprocess.Popen, network: Network | None) -> None:
        self.kill("server", "worker")
        files = sorted((self.home / "store" / "stages").iterdir())
        for path in files[-3:]:
            content = bytearray(path.read_bytes())
            how = chance.choice(["cut", "empty", "flip", "gone"])
            if how == "flip" and content:
                content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            path.write_bytes(content if how == "flip" else content[: len(content) // 2 if how == "cut" else 0])
            if how == "gone":
                path.unlink()
        self.service.start()

    def _clock_stops(self, chance: random.Random, client: subprocess.Popen, network: Network | None) -> None:
        self.frozen.touch()
        time.sleep(chance.uniform(0.5, 2))
        if chance.random() < 0.5:
            self.kill("worker")
        client.wait(PATIENCE)  # it must end all the same
        self.frozen.unlink()

    def _pause(self, chance: random.Random, client: subprocess.Popen, network: Network | None) -> None:
        """The system takes a process's time away, as a laptop that sleeps does."""
        pids = [pid for pid, kind in self.processes().items() if kind == chance.choice(["worker", "server"])]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        time.sleep(chance.uniform(0.5, 3))
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _network_stalls(self, chance: random.Random, client: subprocess.Popen, network: Network | None) -> None:
        network.hold()
        time.sleep(self.stall)
        network.go_on()
        client.wait(PATIENCE)


FAULTS = {
    "worker dies": Lane._worker_dies, "server dies": Lane._server_dies, "client dies": Lane._client_dies, "all die": Lane._all_die,
    "full disk": Lane._full_disk, "table held": Lane._table_held, "damaged stage": Lane._damaged_stage, "clock stops": Lane._clock_stops,
    "paused": Lane._pause, "network stalls": Lane._network_stalls,
}  # fmt: skip


def _mount(folder: Path) -> bool:
    """A small disk of its own, where this system lets us have one."""
    folder.mkdir()
    mount = shutil.which("mount")
    if not mount or os.geteuid() != 0:
        return False
    return subprocess.run([mount, "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], capture_output=True).returncode == 0


def run_client(order: dict[str, Any], connection: Path) -> int:
    """Submits, waits, fetches; the same again finds the same job."""
    with Client(Connection.load(connection), timeout=10, patience=30) as client:
        folder = Path(order["inputs"])
        inputs = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        job = client.submit(order["recipe"], order["values"], inputs, title=order["request"], id=order["request"])
        for _ in client.watch(job["id"], timeout=PATIENCE, patience=PATIENCE):
            pass
        job = client.job(job["id"])
        if job["state"] != "done":
            return 1
        out = Path(order["out"])
        for name, result in job["results"].items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            client.download(result["hash"], out / name)
    return 0


def faults(count: int, seed: int = 0, lanes: int = 2, stall: float = 60.0) -> tuple[Counter[str], list[str]]:
    """Lets `count` faults happen. Returns how often each kind did, and what was not as it must be."""
    problems: list[str] = []
    kinds: Counter[str] = Counter()
    lock = threading.Lock()
    with tempfile.TemporaryDirectory(prefix="kiln-faults-", ignore_cleanup_errors=True) as scratch:
        os.environ["KILN_PIPELINES"] = "tests.backend.steps_recipe"
        os.environ["KILN_TEST_MARKS"] = str(Path(scratch) / "marks")

        def work(lane_number: int) -> None:
            folder = Path(scratch) / f"lane{lane_number}"
            folder.mkdir()
            lane = Lane(folder, stall)
            names = list(FAULTS if lane.mounted else {name for name in FAULTS if name != "full disk"})
            try:
                for number in range(lane_number, count, lanes):
                    found = lane.suffer(number, seed)
                    with lock:
                        kinds[names[number % len(names)]] += 1
                        problems.extend(found)
                        done = sum(kinds.values())
                    for problem in found:
                        print(f"FAILED  {problem}", flush=True)
                    if done % 20 == 0:
                        print(f"{done} of {count}", flush=True)
            finally:
                left = lane.close()
                with lock:
                    problems.extend(left)

        with ThreadPoolExecutor(lanes) as pool:
            for future in [pool.submit(work, number) for number in range(lanes)]:
                future.result()
    return kinds, problems


def main() -> int:
    parser = argparse.ArgumentParser(prog="build.py faults", description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="faults (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=2, help="backends that suffer side by side (default: %(default)s)")
    parser.add_argument("--stall", type=float, default=60.0, help="seconds for which a network stalls (default: %(default)s)")
    parser.add_argument("--client", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--connection", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.client:
        return run_client(json.loads(given.client.read_text()), given.connection)
    kinds, problems = faults(given.count, given.seed, given.lanes, given.stall)
    for kind, times in sorted(kinds.items()):
        print(f"{times:5}  {kind}")
    print(f"{given.count - len(problems)} passed, {len(problems)} failed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
