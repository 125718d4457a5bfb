"""The server process: how it starts, whom it serves, how it ends; and a job from submission to results through socket, queue and worker."""

import contextlib
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from protocol import messages
from protocol.client import Client
from protocol.connection import Connection
from protocol.errors import KilnError
from tests.backend import steps_recipe  # enters the recipe `steps`
from tests.protocol.service import ROOT, Peer, Service

posix = pytest.mark.skipif(os.name != "posix", reason="signals")


@pytest.fixture
def make(tmp_path: Path, monkeypatch):
    """Makes servers for this test's home folder, and ends them."""
    monkeypatch.setenv("KILN_PIPELINES", "tests.backend.steps_recipe")
    monkeypatch.setenv("KILN_TEST_MARKS", str(tmp_path / "marks"))
    made = []

    def make(**options) -> Service:
        made.append(Service(tmp_path / "home", **options))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture(scope="module")
def working(tmp_path_factory):
    """One server with a worker, for the tests that leave it whole."""
    folder = tmp_path_factory.mktemp("working")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILN_PIPELINES", "tests.backend.steps_recipe")
        patch.setenv("KILN_TEST_MARKS", str(folder / "marks"))
        server = Service(folder / "home", workers=1).start()
    yield server
    server.stop()


def ended(process: subprocess.Popen, seconds: float = 10.0) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def submit(client: Client, **values) -> dict:
    return client.submit("steps", values, {"in/text.txt": b"hello"})


# -- Start ---------------------------------------------------------------------------------------------------------------------------


def test_it_answers_within_a_second_of_its_start(make):
    seconds = []
    for _ in range(3):
        server = make(workers=1).start()
        seconds.append(server.seconds)
        server.stop()
    print(f"answers {min(seconds):.2f} s after its start")
    assert min(seconds) < 3.0  # a second, on a machine that does nothing else


def test_it_imports_nothing_heavy():
    code = "import sys, backend.server; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "numba", "numpy", "scipy", "PIL", "trimesh"} & set(loaded)


@posix
def test_only_this_user_can_read_what_it_writes(make):
    server = make().start()
    home = server.home
    assert (
        stat.S_IMODE(home.stat().st_mode)
        == stat.S_IMODE((home / "run").stat().st_mode)
        == stat.S_IMODE((home / "keys").stat().st_mode)
        == 0o700
    )
    assert stat.S_IMODE(server.path.stat().st_mode) == stat.S_IMODE((home / "keys" / "keys.json").stat().st_mode) == 0o600
    assert server.connection().pid == server.process.pid
    assert not (home / "run" / "remote.json").exists()


def test_a_second_server_for_the_same_home_says_who_serves_it(make):
    first = make().start()
    second = subprocess.run([sys.executable, "-c", first.code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert second.returncode != 0 and "already-running" not in second.stdout
    assert f"A Kiln backend already serves {first.home} (process {first.process.pid})" in second.stderr
    with first.client() as client:
        assert client.status()["pid"] == first.process.pid


def test_a_killed_server_leaves_nothing_in_the_way(make):
    server = make().start()
    server.kill()
    assert server.path.exists()
    with Client(Connection.load(server.path)) as client, pytest.raises(KilnError) as caught:
        client.hello()
    assert caught.value.code == "unavailable"
    server.start()
    with server.client() as client:
        assert client.status()["pid"] == server.process.pid


def test_a_copied_connection_file_stays_valid_over_a_restart(make):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    server = make(port=port).start()
    copied = Connection.load(server.path)
    server.stop()
    assert not server.path.exists()
    server.start()
    with Client(copied) as client:
        assert client.hello()["pid"] == server.process.pid


def test_a_port_that_is_taken_is_named(make):
    with socket.create_server(("127.0.0.1", 0)) as other:
        server = make(port=other.getsockname()[1])
        server.launch()
        assert ended(server.process) == 1
        assert f"Port {other.getsockname()[1]}" in server.log() and "--port" in server.log()


def test_an_address_of_another_machine_is_refused(make):
    server = make(host="203.0.113.1")
    server.launch()
    assert ended(server.process) == 1
    assert "203.0.113.1" in server.log() and "address of this machine" in server.log()


def test_on_the_network_it_says_so_and_writes_a_file_to_carry_away(make):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    server = make(host="0.0.0.0", port=port).start()
    assert "listens on the network" in server.log() and "remote.json" in server.log()
    local, remote = server.connection(), Connection.load(server.home / "run" / "remote.json")
    assert local.endpoint == f"tcp://127.0.0.1:{port}"
    assert remote.endpoint.endswith(f":{port}") and "0.0.0.0" not in remote.endpoint and remote.server_key == local.server_key
    server.stop()
    assert os.listdir(server.home / "run") == ["lock"]


# -- End -----------------------------------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(make, number):
    server = make(workers=1).start()
    with server.client() as client:
        submit(client, seconds=30.0)
        wait_for(lambda: client.jobs()[0]["state"] == "running")
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        workers = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        server.process.send_signal(number)
        assert ended(server.process) == 0
        assert "Kiln has stopped" in server.log() and "Traceback" not in server.log()
        assert not server.path.exists()
        assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    server.start()
    with server.client() as client:
        assert client.jobs()[0]["state"] in ("queued", "running")


def test_a_request_ends_it_at_once(make):
    server = make(workers=1).start()
    with server.client() as client:
        submit(client, seconds=30.0)
        client.shutdown()
    assert ended(server.process) == 0


def test_a_request_ends_it_when_all_is_done(make):
    server = make(workers=1).start()
    with server.client(patience=0) as client:
        jobs = [submit(client, seconds=0.3, seed=seed)["id"] for seed in range(2)]
        client.shutdown(now=False)
        for job in jobs:
            assert [event["kind"] for event in client.watch(job, timeout=60)][-1] == "done"
        assert ended(server.process) == 0


def test_until_idle_it_waits_for_clients_and_for_jobs(make):
    server = make(workers=1, until_idle=True, idle_seconds=0.5).start()
    with server.client() as client:
        client.hello()
        assert ended(server.process, 1.5) is None
        submit(client, seconds=1.0)
    assert ended(server.process, 1.5) is None  # the job of the client that has left
    assert ended(server.process, 60) == 0
    assert "nobody is connected" in server.log()
    with make().start().client() as client:
        assert client.jobs()[0]["state"] == "done"


@posix
def test_a_client_that_was_killed_does_not_count_for_long(make):
    server = make(until_idle=True, idle_seconds=0.5).start()
    code = (
        "import time\nfrom protocol.client import Client\nfrom protocol.connection import Connection\n"
        f"client = Client(Connection.load({str(server.path)!r}))\nclient.hello()\nprint('hello', flush=True)\ntime.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "hello\n"
    assert ended(server.process, 1.5) is None
    child.kill()
    child.wait()
    assert ended(server.process, 15) == 0


# -- Service -------------------------------------------------------------------------------------------------------------------------


def wait_for(condition, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.02)


def test_a_job_goes_from_its_inputs_to_its_results(working, tmp_path):
    with working.client() as client:
        client.subscribe()
        job = submit(client, seconds=0.3, size=500, seed=3)
        events = list(client.watch(job["id"], timeout=60))
        kinds = [event["kind"] for event in events]
        assert [event["number"] for event in events] == list(range(1, len(events) + 1))
        assert [kind for kind in dict.fromkeys(kinds) if kind != "log"] == ["queued", "started", "stage", "progress", "preview", "done"]
        assert [event["stage"] for event in events if event["kind"] == "stage"] == ["Read inputs", "Draw", "Scale", "Add", "Save"]
        picture = next(event for event in events if event["kind"] == "preview")["artifact"]
        assert client.blob(picture).startswith(b"\x89PNG\r\n")
        job = client.job(job["id"])
        assert job["state"] == "done" and job["fraction"] == 1.0 and set(job["results"]) == {"sum.txt", "more/stages.txt"}
        for name, result in job["results"].items():
            path = client.download(result["hash"], tmp_path / "out" / name)
            assert path.stat().st_size == result["size"]
        numbers = steps_recipe.draw(b"hello", 500, 3, 0)
        assert (tmp_path / "out" / "sum.txt").read_text() == f"{float((numbers * 2.0).sum())!r}\n"
        wait_for(lambda: client.status()["device"]["kind"] in ("cpu", "cuda", "rocm", "mps"), 60)


def test_a_running_job_can_be_cancelled_from_another_client(working):
    with working.client() as client, working.client() as other:
        job = submit(client, seconds=30.0)["id"]
        wait_for(lambda: client.job(job)["state"] == "running")
        start = time.monotonic()
        assert other.cancel(job)["state"] == "cancelling"
        assert time.monotonic() - start < 1
        assert [event["kind"] for event in client.watch(job, timeout=10)][-1] == "cancelled"


def test_a_failed_job_tells_everyone_the_same_sentence(working):
    with working.client() as client:
        job = submit(client, fault="refuse")["id"]
        last = list(client.watch(job, timeout=60))[-1]
        assert last["kind"] == "failed" and last["error"] == client.job(job)["error"]
        assert last["error"] == {"code": "bad-input", "message": "These numbers are no good.", "hint": "Give better ones."}


def test_a_job_goes_on_after_the_server_was_killed_and_the_watcher_sees_it(make):
    server = make(workers=1).start()
    with server.client() as client:
        job = submit(client, seconds=1.0)["id"]
        seen = []
        for event in client.watch(job, timeout=90):
            seen.append(event)
            if event["kind"] == "stage" and event["stage"] == "Scale" and not any(one.get("restarted") for one in seen):
                seen.append({"kind": "", "restarted": True})
                server.kill()
                threading.Thread(target=server.start).start()
        numbers = [event["number"] for event in seen if "number" in event]
        assert numbers == sorted(set(numbers)) and seen[-1]["kind"] == "done"
        assert [event["number"] for event in client.events(job)] == [number for number in numbers]


def test_refused_connections_are_counted_and_told_once_a_second(make):
    server = make().start()
    start = time.monotonic()
    for _ in range(30):
        with socket.create_connection(("127.0.0.1", int(server.connection().endpoint.rpartition(":")[2]))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            stranger.settimeout(2)
            with contextlib.suppress(OSError):
                while stranger.recv(4096):
                    pass
    with server.client() as client:
        wait_for(lambda: client.status()["refused"] == 30, 20)
        time.sleep(1.2)
    told = [int(number) for number in re.findall(r"Refused (\d+) connections", server.log())]
    assert sum(told) == 30 and len(told) <= time.monotonic() - start + 1


def test_half_a_handshake_holds_nobody_up(make):
    server = make().start()
    port = int(server.connection().endpoint.rpartition(":")[2])
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
    for stranger in strangers:
        stranger.sendall(b"\xff\0\0\0\0\0\0\0\x01\x7f\x03")
    with server.client() as client:
        assert client.ping() < 5
    for stranger in strangers:
        stranger.close()


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads the server's memory from /proc")
def test_a_flood_of_bad_messages_costs_neither_memory_nor_the_others(make):
    server = make().start()
    connection = server.connection()
    stop = threading.Event()

    def flood(seed: int) -> None:
        with Peer(connection) as peer:
            number = 0
            while not stop.is_set():
                number += 1
                frames = [
                    [b"\xc1" * 100],
                    [b"\x82\xa4type\xa1x\xa1a" + b"\xdc\x04\x00" * 50_000],
                    [b"\x82\xa4type\xa4ping\xa2id\xa1x", *[b"blob"] * 50],
                    [b"\x82\xa4type\xa4nope\xa2id\xa1x"],
                    [os.urandom(50_000)],
                ][(number + seed) % 5]
                peer.socket.send_multipart(frames)
                while peer.socket.poll(0):
                    peer.socket.recv_multipart()

    with server.client() as client:
        client.hello()
        floods = [threading.Thread(target=flood, args=(seed,)) for seed in range(2)]
        for one in floods:
            one.start()
        time.sleep(1.0)
        before = server.memory()
        waits = sorted(client.ping() for _ in range(100))
        time.sleep(1.0)
        after = server.memory()
        stop.set()
        for one in floods:
            one.join()
        assert client.ping() < 5
    print(f"ping under a flood: median {1000 * waits[50]:.1f} ms, worst {1000 * waits[-1]:.1f} ms; memory +{(after - before) / 1e6:.1f} MB")
    assert waits[50] < 0.5 and after - before < 50_000_000
    assert "Traceback" not in server.log()


def test_the_limits_that_it_tells_are_those_of_the_protocol(make):
    with make().start().client() as client:
        assert client.hello()["limits"] == messages.limits()
