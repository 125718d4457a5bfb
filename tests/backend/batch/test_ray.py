"""The Ray engine on a cluster of two nodes: what comes back is what the local worker makes, whatever happens to a node in the middle."""

import hashlib
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from backend import worker
from backend.batch import ray_engine
from backend.batch.engine import FINAL
from backend.batch.ray_engine import Desk, RayEngine, run_task
from backend.splats import ply
from backend.splats.model import Splats
from backend.views.views import Frame
from protocol import VERSION, recipes
from protocol.errors import KilnError
from tests.backend import steps_recipe  # noqa: F401 - enters the recipe `steps`, here and (by KILN_PIPELINES) on the nodes

PATIENCE = 90.0  # seconds until a test gives up
SPLATS = {"look.count": 16, "look.size": 64, "surface.grid": 32, "surface.faces": 200, "texture.size": 64}
STORE = 100_000_000  # bytes of the object store of a node


def needs_ray():
    if importlib.util.find_spec("ray") is None:  # not imported: that reads its settings
        pytest.skip("Ray is an optional extra: pip install --no-deps -r requirements/ray.txt")


@pytest.fixture(scope="module")
def farm():
    """An engine on a cluster of two nodes with one core each, `first` and `second`, which have a Kiln folder each."""
    needs_ray()
    if sys.platform != "linux":
        pytest.skip("Ray makes a cluster of several nodes on one machine on Linux only")
    root = Path(tempfile.mkdtemp(prefix="kr-"))  # short: Ray's sockets lie below, and their paths may have 107 characters
    os.makedirs(root / "tmp")
    with pytest.MonkeyPatch.context() as patch:
        settings = {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TMPDIR": str(root / "tmp"),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_metrics_collection": "0", "RAY_worker_niceness": "0",
            "KILN_PIPELINES": "tests.backend.steps_recipe", "KILN_TEST_MARKS": str(root / "marks"),
        }  # fmt: skip
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.setattr(ray_engine, "CHUNK", 10_000)
        from ray.cluster_utils import Cluster

        def node(name):
            variables = {"KILN_HOME": str(root / name), "KILN_TEST_MARKS": str(root / f"{name}-marks")}
            return {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False, "env_vars": variables}

        cluster = Cluster(initialize_head=True, head_node_args=node("first"))
        engine = None
        try:
            second = cluster.add_node(**node("second"))
            engine = RayEngine(root / "scratch", cluster.address)
            yield Farm(engine, cluster, second, root)
        finally:
            if engine is not None:
                engine.close()
            cluster.shutdown()
            shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def unused_tcp_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Farm(SimpleNamespace):
    def __init__(self, engine, cluster, second, root):
        super().__init__(engine=engine, cluster=cluster, second=second, root=root)
        self.text = root / "text.txt"
        self.text.write_text("hello")

    def submit(self, key, **values):
        return self.engine.submit(key, "steps", values, {"in/text.txt": self.text}, key)

    def follow(self, ids, meanwhile=lambda event: None):
        """id -> its last event, once all have ended; `meanwhile` hears every event."""
        ends, until = {}, time.monotonic() + PATIENCE
        while set(ids) - set(ends):
            assert time.monotonic() < until, f"only {sorted(ends)} of {ids} have ended"
            for event in self.engine.poll(0.5):
                meanwhile(event)
                if event.kind in FINAL:
                    assert event.id not in ends, "a job ends once"
                    ends[event.id] = event
        return ends

    def fetched(self, id):
        """What a job made: name -> content."""
        folder = self.root / "out" / id
        self.engine.fetch(id, folder)
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def local(self, recipe, values, inputs):
        """The same by the function that the backend's own worker calls."""
        files = {name: [str(path), hashlib.sha256(path.read_bytes()).hexdigest()] for name, path in inputs.items()}
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            command = {
                "recipe": recipe, "parameters": recipes.values(recipes.make(recipe, values)), "inputs": files, "folder": f"{folder}/job",
                "stages": f"{folder}/stages", "stages_bytes": 10**9,
            }  # fmt: skip
            outcome = worker.compute(command, worker.Reports(lambda message: None), lambda: False)
            assert outcome["kind"] == "done", outcome
            return {name: (Path(folder) / "job" / "results" / name).read_bytes() for name in outcome["results"]}

    def tasks_on(self, node):
        """The processes that compute there."""
        return [int(path.name.partition("-")[0]) for path in (self.root / node / "ray").glob("*/*-*")]


def some_splats(folder) -> Path:
    """A file of opaque Gaussians on a sphere."""
    count = 800
    points = np.random.default_rng(0).normal(size=(count, 3))
    points *= 0.7 / np.linalg.norm(points, axis=1, keepdims=True)
    splats = Splats(
        means=points.astype(np.float32),
        quaternions=np.tile(np.float32([1, 0, 0, 0]), (count, 1)),
        log_scales=np.full((count, 3), np.log(0.06), np.float32),
        opacity_logits=np.full(count, 4, np.float32),
        sh=np.random.default_rng(1).uniform(-1, 1, (count, 1, 3)).astype(np.float32),
    )
    ply.save(folder / "splats.ply", splats, Frame(np.zeros(3), 1.0))
    return folder / "splats.ply"


def test_what_a_node_makes_is_what_the_local_worker_makes(farm):
    file = some_splats(farm.root)
    ours = farm.local("mesh_splats", SPLATS, {"splats.ply": file})
    mesh = farm.engine.submit("mesh", "mesh_splats", SPLATS, {"splats.ply": file}, "A ball")
    told = []
    assert farm.follow([mesh], told.append)[mesh].kind == "done"
    theirs = farm.fetched(mesh)
    assert set(ours) == set(theirs) and len(theirs["mesh.glb"]) > ray_engine.CHUNK
    assert [name for name in ours if ours[name] != theirs[name]] == ["report.json"]  # which tells the seconds that it took
    stages = [event.stage for event in told if event.kind == "stage" and event.stage]
    assert [stage for stage in stages if stage in ("Extract surface", "Bake texture", "Measure")] == [
        "Extract surface",
        "Bake texture",
        "Measure",
    ]
    assert stages[0] == "Read inputs" and stages[-2:] == ["Save", "Send results"]
    assert any(event.kind == "progress" and 0 < event.fraction < 1 for event in told)


def test_an_input_is_put_once_for_all_items_that_use_it(farm):
    ids = [farm.submit(f"same {seed}", seed=seed) for seed in range(3)]
    shared = [hash for job in (farm.engine._jobs[id] for id in ids) for hash in job.hashes]
    assert len(set(shared)) == 1 and shared[0] in farm.engine._files
    assert farm.submit("same 1", seed=1) == ids[1]  # the same key: the same job
    ends = farm.follow(ids)
    assert all(end.kind == "done" for end in ends.values())
    results = [farm.root / "scratch" / farm.engine._jobs[id].token for id in ids]
    assert all(any(folder.iterdir()) for folder in results)
    for id in ids:
        farm.engine.forget(id)
        farm.engine.forget(id)
    assert shared[0] not in farm.engine._files
    assert not any(folder.exists() for folder in results)


def test_a_cancelled_job_stops_in_the_middle_of_a_step_and_can_be_submitted_again(farm):
    id = farm.submit("long", seconds=60.0)
    end = farm.follow([id], lambda event: event.stage == "Draw" and farm.engine.cancel(id))[id]
    assert end.kind == "cancelled" and end.error is None
    waiting = [farm.submit(f"waits {number}", seconds=60.0, seed=number) for number in range(4)]  # two of them for a free core
    for one in waiting:
        farm.engine.cancel(one)
    assert {end.kind for end in farm.follow(waiting).values()} == {"cancelled"}
    assert farm.follow([farm.submit("long")])["long"].kind == "done"


def test_what_goes_wrong_on_a_node_arrives_with_its_code(farm):
    faults = {"refuse": "bad-input", "memory": "out-of-memory", "exception": "internal", "full": "no-space"}
    ids = {fault: farm.submit(fault, fault=fault) for fault in faults}
    ends = farm.follow(ids.values())
    assert {fault: ends[ids[fault]].error.code for fault in faults} == faults
    assert ends["refuse"].error.hint == "Give better ones."
    with pytest.raises(KilnError, match="size cannot be 0") as refused:
        farm.submit("value", size=0)
    assert refused.value.code == "bad-parameter"
    with pytest.raises(KilnError, match="cannot be read") as refused:
        farm.engine.submit("file", "steps", {}, {"in/text.txt": farm.root / "none"}, "")
    assert refused.value.code == "bad-input"


def test_a_node_with_another_kiln_is_named(farm, monkeypatch):
    monkeypatch.setattr(ray_engine, "VERSION", "99.0")
    with pytest.raises(KilnError, match=f"has Kiln {VERSION}, this batch is run by 99.0") as refused:
        RayEngine(farm.root / "other", farm.cluster.address)
    assert refused.value.code == "bad-version"


def test_no_asset_is_lost_when_a_node_is_killed_in_the_middle(farm):
    ids = {seed: farm.submit(f"asset {seed}", seconds=0.3, seed=seed) for seed in range(100, 106)}
    killed, told = [], []

    def kill(event):
        told.append(event.text)
        if event.kind == "stage" and not killed and farm.tasks_on("second"):
            killed.append(farm.tasks_on("second"))
            farm.cluster.remove_node(farm.second, allow_graceful=False)  # SIGKILL to all of its processes

    ends = farm.follow(ids.values(), kill)
    assert killed and sum("attempt 2" in text for text in told) >= 1
    assert {end.kind for end in ends.values()} == {"done"}
    for seed, id in ids.items():
        local = farm.local("steps", {"seed": seed}, {"in/text.txt": farm.text})
        assert farm.fetched(id)["sum.txt"] == local["sum.txt"]
    assert not any((farm.root / "first" / "ray").glob("*/*-*")), "no task leaves its folder behind"


def test_a_worker_that_is_killed_costs_one_attempt_and_no_finished_stage(farm):
    """After the test above there is one node, and so it is the same that goes on."""
    id = farm.submit("killed", seconds=1.0, seed=7)
    killed, told = [], []

    def kill(event):
        told.append(event.text)
        if event.stage == "Scale" and not killed:
            killed.extend(farm.tasks_on("first"))
            os.kill(killed[0], signal.SIGKILL)

    assert farm.follow([id], kill)[id].kind == "done"
    assert len(killed) == 1 and sum("attempt 2" in text for text in told) == 1
    made = farm.fetched(id)
    assert made["sum.txt"] == farm.local("steps", {"seed": 7}, {"in/text.txt": farm.text})["sum.txt"]
    assert made["more/stages.txt"] == b"Draw"  # found finished
    assert farm.tasks_on("first") == [], "what the killed process left is gone too"


def test_a_cluster_that_is_not_there_is_said_at_once(tmp_path, unused_tcp_port):
    needs_ray()
    for address, code in {f"127.0.0.1:{unused_tcp_port}": "unavailable", "ray://farm:10001": "bad-request", "farm": "bad-request"}.items():
        with pytest.raises(KilnError) as refused:
            RayEngine(tmp_path / "scratch", address)
        assert refused.value.code == code and address in refused.value.message


@pytest.mark.skipif(sys.platform == "win32", reason="asks processes what they listen on, as POSIX lets their owner")
def test_a_cluster_that_kiln_starts_hears_on_loopback_and_ends_with_the_batch(tmp_path):
    needs_ray()
    import psutil

    (tmp_path / "asset" / "in").mkdir(parents=True)
    (tmp_path / "asset" / "in" / "text.txt").write_text("hello")
    (tmp_path / "list.toml").write_text('[[items]]\nfile = "asset"\nrecipe = "steps"\nparameters = { seconds = 0.5, size = 10 }\n')
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "KILN_HOME": str(tmp_path / "home"), "KILN_TEST_MARKS": str(tmp_path / "marks"), "KILN_PIPELINES": "tests.backend.steps_recipe",
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }  # fmt: skip
    command = [sys.executable, "-m", "backend.cli", "batch", "list.toml", "--out", "out", "--engine", "ray"]
    batch = psutil.Popen(command, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + PATIENCE
    while not (tmp_path / "marks").exists():  # in the second stage
        assert batch.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    processes = [batch, *batch.children(recursive=True)]
    listening = [one.laddr.ip for process in processes for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN]
    assert len(listening) >= 4 and all(ip.removeprefix("::ffff:") == "127.0.0.1" for ip in listening)
    said = batch.communicate(timeout=PATIENCE)[0]
    assert batch.returncode == 0 and "1 done" in said, said
    assert (tmp_path / "out" / "asset" / "sum.txt").exists()
    assert [path.name for path in (tmp_path / "out" / ".work").iterdir() if path.name != "lock"] == []
    assert not list(Path("/tmp").glob(f"kiln-ray-{batch.pid}-*"))
    assert psutil.wait_procs(processes, timeout=10)[1] == []


def test_results_arrive_whole_or_not_at_all(tmp_path):
    desk, content = Desk(str(tmp_path)), bytes(range(256)) * 40
    hash = hashlib.sha256(content).hexdigest()
    assert desk.begin("job", "node") == 1
    assert desk.receive("job", 1, hash, 0, content[:6000], last=False) is None
    assert desk.begin("job", "node") == 2 and desk.report("job", 1, []), "an attempt that was given up is told to stop"
    assert not desk.has("job", hash)
    assert desk.receive("job", 2, hash, 0, content[:6000], last=False) is None
    assert desk.receive("job", 2, hash, 6000, content[:4240], last=True)["code"] == "damaged-result"
    assert not desk.has("job", hash)
    for offset in (0, 6000):
        assert desk.receive("job", 2, hash, offset, content[offset : offset + 6000], last=offset > 0) is None
    assert (tmp_path / "job" / hash).read_bytes() == content


def test_a_node_that_joins_with_another_kiln_refuses_its_task():
    outcome = run_task("99.0", {}, {}, None)
    assert outcome["kind"] == "failed" and outcome["error"]["code"] == "bad-version" and "99.0" in outcome["error"]["message"]


def test_without_ray_the_way_to_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(KilnError) as refused:
        RayEngine(tmp_path / "scratch")
    assert refused.value.code == "no-ray" and "pip install ray==" in refused.value.hint
    pin = (Path(__file__).parents[3] / "requirements" / "ray.txt").read_text()
    assert ray_engine.RAY in pin
