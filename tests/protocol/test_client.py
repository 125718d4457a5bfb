"""The client against a real server over real sockets: who gets in, what is said once, what survives a cut line and a killed server."""

import hashlib
import os
import signal
import socket
import threading
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
import zmq

from protocol import messages
from protocol.client import Client
from protocol.connection import Keys
from protocol.errors import KilnError
from tests.protocol.service import Network, Peer

SMALL = {"transforms.json": b'{"frames": []}'}


def submit(client: Client, **options) -> dict:
    """A job that waits for ever: no worker runs."""
    return client.submit("reconstruct", {}, SMALL, **options)


def random_file(path: Path, size: int) -> Path:
    path.write_bytes(os.urandom(size))
    return path


# -- Versions ------------------------------------------------------------------------------------------------------------------------


def test_hello_names_both_sides(client):
    hello = client.hello()
    assert hello["protocol"] == list(messages.PROTOCOL)
    assert hello["version"] and hello["host"] and hello["device"] and hello["limits"]["chunk_bytes"] == messages.CHUNK_BYTES


@pytest.mark.parametrize("theirs, who", [([2, 0], "the backend"), ([0, 9], "this client")])
def test_another_major_version_is_refused_with_both_versions(service, theirs, who):
    with service.peer(hello=False) as peer:
        answer, _ = peer.ask("hello", protocol=theirs)
        assert answer["error"]["code"] == "bad-version"
        assert "1.1" in answer["error"]["message"] and ".".join(map(str, theirs)) in answer["error"]["message"]
        assert who in answer["error"]["hint"]
        answer, _ = peer.ask("status")
        assert answer["error"]["code"] == "no-hello"


def test_a_newer_minor_version_is_welcome(service):
    with service.peer(hello=False) as peer:
        assert peer.ask("hello", protocol=[1, 99])[0]["protocol"] == list(messages.PROTOCOL)


def test_this_client_tells_an_older_and_a_newer_backend(services):
    server = services(before="import protocol.messages\nprotocol.messages.PROTOCOL = (2, 3)")
    server.launch()
    while not server.path.exists():
        time.sleep(0.01)
    with server.client() as client, pytest.raises(KilnError) as caught:
        client.status()
    assert caught.value.code == "bad-version"
    assert "1.1" in caught.value.message and "2.3" in caught.value.message and "this client" in caught.value.hint


def test_unknown_messages_and_fields_do_no_harm(service):
    with service.peer() as peer:
        answer, _ = peer.ask("teleport", where="moon")
        assert answer["error"]["code"] == "unknown-message" and "teleport" in answer["error"]["message"]
        assert peer.ask("ping", colour="blue", nested={"a": [1, {"b": 2}]})[0]["type"] == "reply"


def test_the_client_passes_over_what_is_newer_than_it(services):
    """A server of a later minor version sends a message and fields that this client has never heard of."""
    patch = """
import backend.server as server
reply = server.Server._reply
def chatty(self, session, to, **fields):
    self._send(session, [server.pack({"type": "gossip", "about": {"a": [1]}})])
    reply(self, session, to, **fields, rumour="x")
server.Server._reply = chatty
"""
    with services(before=patch).start().client() as client:
        assert client.status()["jobs"] == {}


# -- Keys ----------------------------------------------------------------------------------------------------------------------------


def test_a_client_with_another_key_is_refused(service):
    stranger = Keys.make()
    connection = replace(service.connection(), client_key=stranger.client_key, client_secret=stranger.client_secret)
    with Client(connection) as client, pytest.raises(KilnError) as caught:
        client.hello()
    assert caught.value.code == "refused" and "connection file" in caught.value.hint


def test_a_known_public_key_without_its_secret_is_refused(service):
    connection = replace(service.connection(), client_secret=Keys.make().client_secret)
    with Client(connection, timeout=2) as client, pytest.raises(KilnError) as caught:
        client.hello()
    assert caught.value.code in ("refused", "unavailable", "bad-connection")


def test_a_server_with_another_key_is_not_trusted(service):
    with Client(replace(service.connection(), server_key=Keys.make().server_key), timeout=2) as client, pytest.raises(KilnError) as caught:
        client.hello()
    assert caught.value.code in ("refused", "unavailable")


def test_a_plain_text_client_is_not_heard(service):
    with service.client() as client:
        before = client.status()["refused"]
        with Peer(service.connection(), hello=False, curve=False) as peer:
            peer.send({"type": "hello", "id": "1", "protocol": [1, 0]})
            peer.send({"type": "shutdown", "id": "2"})
            assert peer.receive(0.5) is None
        assert client.status()["refused"] > before


def test_what_is_no_kiln_at_all_is_told_so(tmp_path, service):
    with socket.create_server(("127.0.0.1", 0)) as other:

        def talk():
            near, _ = other.accept()
            near.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            near.close()

        threading.Thread(target=talk, daemon=True).start()
        elsewhere = replace(service.connection(), endpoint=f"tcp://127.0.0.1:{other.getsockname()[1]}")
        with Client(elsewhere, timeout=2) as client, pytest.raises(KilnError) as caught:
            client.hello()
    assert caught.value.code in ("refused", "unavailable") and elsewhere.endpoint in caught.value.message


def test_a_recorded_conversation_is_worth_nothing(service):
    """Everything that a client sent, sent again by someone who has no keys."""
    with Network(service.connection()) as network:
        with Client(network.connection) as client:
            job = submit(client, title="recorded")
        recorded = bytes(network.recorded)
    with service.client() as client:
        client.remove(job["id"])
        before = client.status()
        with socket.create_connection(("127.0.0.1", network.port)) as thief:
            thief.sendall(recorded)
            thief.settimeout(1.0)
            try:
                while thief.recv(65536):
                    pass
            except OSError:
                pass
        after = client.status()
        assert after["jobs"] == before["jobs"] and len(after["clients"]) == len(before["clients"])


def test_nothing_that_is_sent_can_be_read_on_the_way(service):
    with Network(service.connection()) as network, Client(network.connection) as client:
        submit(client, title="a title that stands out")
        assert len(network.recorded) > 500 and b"stands out" not in network.recorded and b"submit" not in network.recorded


def test_nobody_there_is_said_at_once(service):
    with socket.create_server(("127.0.0.1", 0)) as other:
        free = other.getsockname()[1]
    with Client(replace(service.connection(), endpoint=f"tcp://127.0.0.1:{free}")) as client, pytest.raises(KilnError) as caught:
        start = time.monotonic()
        client.hello()
    assert caught.value.code == "unavailable" and str(free) in caught.value.message
    assert time.monotonic() - start < 3


# -- Requests ------------------------------------------------------------------------------------------------------------------------


def test_a_job_can_be_followed_from_submission_to_removal(client):
    values, source = {"fit.iterations": 123}, {"object": "Süzanne", "nested": {"a": [1, 2.5, None, True]}}
    job = client.submit("reconstruct", values, SMALL, title="a mug", source=source)
    assert (job["recipe"], job["title"], job["source"], job["state"]) == ("reconstruct", "a mug", source, "queued")
    assert job["parameters"]["fit.iterations"] == 123 and job["parameters"]["texture.size"] == 1024
    assert job["inputs"] == {"transforms.json": hashlib.sha256(SMALL["transforms.json"]).hexdigest()}
    assert client.job(job["id"]) == job
    listed = {one["id"]: one for one in client.jobs()}[job["id"]]
    assert listed == {key: value for key, value in job.items() if key != "inputs"}
    assert client.cancel(job["id"])["state"] == "cancelled" == client.cancel(job["id"])["state"]
    assert client.retry(job["id"])["state"] == "queued"
    assert [event["kind"] for event in client.events(job["id"])] == ["queued", "cancelled", "queued"]
    assert [event["number"] for event in client.events(job["id"], after=1)] == [2, 3]
    client.remove(job["id"])
    for ask in (client.job, client.cancel, client.retry, client.remove, client.events):
        with pytest.raises(KilnError) as caught:
            ask(job["id"])
        assert caught.value.code == "no-job"


@pytest.mark.parametrize("id", ["../../etc", "a/b", "C:a", "", "a" * 65, None, 7])
def test_a_job_whose_id_would_lead_into_another_folder_is_refused(client, monkeypatch, id):
    monkeypatch.setattr(client, "_request", lambda *_, **__: {"job": {"id": id}, "jobs": [{"id": id}], "more": False, "first": True})
    client._subscribed = True
    asked = (client.jobs, lambda: client.job("a"), lambda: client.retry("a"), lambda: client._take_event({"job": id, "number": 1}))
    for ask in asked:
        with pytest.raises(KilnError) as caught:
            ask()
        assert caught.value.code == "bad-message"


@pytest.mark.parametrize(
    "recipe, values, inputs, code, named",
    [
        ("nonsense", {}, SMALL, "bad-recipe", "nonsense"),
        ("reconstruct", {"fit.iterations": -5}, SMALL, "bad-parameter", "fit.iterations"),
        ("reconstruct", {"fit.iterations": [1]}, SMALL, "bad-parameter", "fit.iterations"),
        ("reconstruct", {"fit.device": {"a": 1}}, SMALL, "bad-parameter", "fit.device"),
        ("reconstruct", {"fit.colour": 5}, SMALL, "bad-parameter", "fit.colour"),
    ],
)
def test_what_is_wrong_with_a_job_is_named(client, recipe, values, inputs, code, named):
    before = len(client.jobs())
    with pytest.raises(KilnError) as caught:
        client.submit(recipe, values, inputs)
    assert caught.value.code == code and named in caught.value.message and caught.value.hint
    assert len(client.jobs()) == before


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "a/../../b", "C:\\x", "a\\b", "a//b", "nul", "con.txt", "a\0b", "", ".", "x" * 999]
)
def test_an_input_cannot_leave_its_folder(client, name):
    with pytest.raises(KilnError) as caught:
        client.submit("reconstruct", {}, {name: b"x"})
    assert caught.value.code == "bad-input"


def test_an_input_of_another_job_serves_by_its_hash(client):
    first = submit(client)
    again = client.submit("reconstruct", {}, {"transforms.json": first["inputs"]["transforms.json"], "more.png": b"more"})
    assert again["inputs"] == {**first["inputs"], "more.png": hashlib.sha256(b"more").hexdigest()}
    with pytest.raises(KilnError) as caught:
        client.submit("reconstruct", {}, {"transforms.json": "0" * 64})
    assert caught.value.code == "no-artifact"


def test_the_same_submission_twice_is_one_job(service, client):
    first = submit(client, id="the-same")
    with service.client() as other:
        assert submit(other, id="the-same")["id"] == first["id"]
    with service.peer() as peer:
        inputs = first["inputs"]
        for _ in range(5):
            peer.send({"type": "submit", "id": "at-once", "recipe": "reconstruct", "values": {}, "inputs": inputs})
        made = Counter(peer.receive()[0]["job"]["id"] for _ in range(5))
    assert len(made) == 1
    assert sum(job["id"] in made for job in client.jobs()) == 1


def test_a_submission_sent_again_after_a_crash_is_one_job(services):
    server = services().start()
    with server.client() as client:
        first = submit(client, id="before")
    server.kill()
    server.start()
    with server.client() as client:
        assert submit(client, id="before")["id"] == first["id"]
        assert len(client.jobs()) == 1


def test_a_thousand_jobs_are_listed_page_by_page(services):
    with services().start().client() as client:
        hash = hashlib.sha256(SMALL["transforms.json"]).hexdigest()
        client.upload({hash: (len(SMALL["transforms.json"]), SMALL["transforms.json"])})
        inputs = {"transforms.json": hash}
        made = [client._request("submit", recipe="reconstruct", inputs=inputs, title=f"{i}")["job"]["id"] for i in range(1000)]
        assert [job["id"] for job in client.jobs()] == made


def test_a_job_with_the_most_inputs_fits_and_one_more_does_not(client):
    names = [f"views/a_picture_{i}.png" for i in range(messages.INPUTS + 1)]
    with pytest.raises(KilnError) as caught:
        client.submit("reconstruct", {}, dict.fromkeys(names, b"x"))
    assert caught.value.code == "too-large"
    job = client.submit("reconstruct", {}, dict.fromkeys(names[:-1], b"x"))
    assert len(client.job(job["id"])["inputs"]) == messages.INPUTS


def test_two_clients_with_one_key_do_not_mix(service):
    with service.client() as a, service.client() as b:
        job_a, job_b = submit(a, title="a"), submit(b, title="b")
        assert a.job(job_b["id"])["title"] == "b" and b.job(job_a["id"])["title"] == "a"


# -- Files ---------------------------------------------------------------------------------------------------------------------------


def test_only_what_the_backend_lacks_is_sent(service, tmp_path):
    big = random_file(tmp_path / "big", 3_000_000)
    files = {"big": big, "again": big, "small": b"small", "empty": b""}
    files |= {"edge": os.urandom(messages.CHUNK_BYTES), "over": os.urandom(messages.CHUNK_BYTES + 1)}
    with Network(service.connection()) as network, Client(network.connection) as client:
        seen = []
        job = client.submit("reconstruct", {}, files, progress=lambda sent, total: seen.append((sent, total)))
        total = 3_000_000 + 5 + 2 * messages.CHUNK_BYTES + 1
        assert seen[0] == (0, total) and seen[-1] == (total, total) and seen == sorted(seen)
        assert total < network.up < 1.1 * total
        before = network.up
        client.submit("reconstruct", {}, {**files, "new": b"a new one"})
        assert network.up - before < 10_000
        for name, content in files.items():
            expected = content if isinstance(content, bytes) else content.read_bytes()
            assert client.download(job["inputs"][name], tmp_path / "back").read_bytes() == expected


def test_an_upload_goes_on_where_the_line_was_cut(service, tmp_path):
    size = 20_000_000
    big = random_file(tmp_path / "big", size)
    with Network(service.connection(), until=size // 2) as network, Client(network.connection) as client:
        job = client.submit("reconstruct", {}, {"big": big})
        assert network.cuts == 1 and network.up < 1.4 * size
    with service.client() as client:
        assert hashlib.sha256(client.blob(job["inputs"]["big"])).hexdigest() == hashlib.sha256(big.read_bytes()).hexdigest()


def test_an_upload_that_was_given_up_goes_on_where_it_was(client, tmp_path):
    path, size = random_file(tmp_path / "large", 5_000_000), 5_000_000
    hash = hashlib.sha256(path.read_bytes()).hexdigest()

    def give_up(sent, total):
        if sent > 3_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.upload({hash: (size, path)}, give_up)
    sent = []
    client.upload({hash: (size, path)}, lambda there, total: sent.append(there))
    assert min(there for there in sent if there) > 1_000_000 and sent[-1] == size
    assert client.blob(hash) == path.read_bytes()


def test_an_upload_goes_on_after_the_server_was_killed(services, tmp_path):
    server, size = services().start(), 30_000_000
    big = random_file(tmp_path / "big", size)
    with server.client(patience=20) as client:
        done = []

        def kill_in_the_middle(sent, total):
            if sent > size // 2 and not done:
                done.append(sent)
                server.kill()
                threading.Thread(target=server.start).start()

        job = client.submit("reconstruct", {}, {"big": big}, progress=kill_in_the_middle)
        assert done
        assert client.download(job["inputs"]["big"], tmp_path / "back").read_bytes() == big.read_bytes()
        assert list((server.home / "store" / "uploads").iterdir()) == []


def test_an_upload_that_is_not_what_its_hash_says_is_refused(service):
    hash = hashlib.sha256(b"right").hexdigest()
    with service.peer() as peer:
        assert peer.ask("upload", b"wrong", hash=hash, size=5)[0]["error"]["code"] == "bad-hash"
        begun, _ = peer.ask("upload", hash=hash, size=5)
        peer.send({"type": "chunk", "upload": begun["upload"], "offset": 0}, b"wrong")
        assert peer.ask("finish", upload=begun["upload"])[0]["error"]["code"] == "bad-hash"
        assert peer.ask("missing", hashes=[hash])[0]["missing"] == [hash]
        begun, _ = peer.ask("upload", hash=hash, size=5)
        assert begun["offset"] == 0
        peer.send({"type": "chunk", "upload": begun["upload"], "offset": 0}, b"right")
        assert peer.ask("finish", upload=begun["upload"])[0]["hash"] == hash
        assert peer.ask("missing", hashes=[hash])[0]["missing"] == []


@pytest.mark.parametrize("offset, blob", [(1, b"x"), (0, b"longer than announced"), (0, None), (-1, b"x")])
def test_a_chunk_out_of_order_ends_its_upload_with_an_error(service, offset, blob):
    hash = hashlib.sha256(os.urandom(8)).hexdigest()
    with service.peer() as peer:
        begun, _ = peer.ask("upload", hash=hash, size=5)
        peer.send({"type": "chunk", "upload": begun["upload"], "offset": offset}, *([] if blob is None else [blob]))
        error, _ = peer.receive()
        assert error["upload"] == begun["upload"] and error["error"]["code"] == "bad-message"
        assert peer.ask("finish", upload=begun["upload"])[0]["error"]["code"] == "bad-message"


def test_chunks_beyond_the_credit_are_refused(service):
    hash = hashlib.sha256(os.urandom(8)).hexdigest()
    with service.peer() as peer:
        begun, _ = peer.ask("upload", hash=hash, size=10**9)
        for number in range(500):  # more than any window, quicker than they can be granted
            peer.send({"type": "chunk", "upload": begun["upload"], "offset": number}, b"x")
        codes = []
        while message := peer.receive(1.0):
            codes += [message[0]["error"]["code"]] if message[0]["type"] == "error" else []
        assert codes in ([], ["bad-message"])  # none, if the disk kept up
        assert peer.ask("ping")[0]["type"] == "reply"


def test_a_download_goes_on_where_the_line_was_cut(service, client, tmp_path):
    size = 20_000_000
    content = os.urandom(size)
    job = client.submit("reconstruct", {}, {"big": content})
    with Network(service.connection(), until=size // 2) as network, Client(network.connection) as remote:
        sizes = []
        remote.download(job["inputs"]["big"], tmp_path / "back", sizes.append)
        assert network.cuts == 1 and network.down < 1.5 * size
        assert sizes == sorted(sizes) and sizes[-1] == size
    assert (tmp_path / "back").read_bytes() == content
    assert os.listdir(tmp_path) == ["back"]


def test_a_download_that_was_given_up_is_taken_up_by_another_client(service, client, tmp_path):
    size = 10_000_000
    content = os.urandom(size)
    artifact = client.submit("reconstruct", {}, {"big": content})["inputs"]["big"]

    def give_up(received):
        if received > size // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.download(artifact, tmp_path / "back", give_up)
    assert not (tmp_path / "back").exists()
    assert client.ping() < 5  # the client that gave up still works
    with Network(service.connection()) as network, Client(network.connection) as other:
        other.download(artifact, tmp_path / "back")
        assert network.down < 0.6 * size
    assert (tmp_path / "back").read_bytes() == content


@pytest.mark.parametrize("damage", ["flipped", "longer", "whole"])
def test_a_damaged_part_is_noticed(client, tmp_path, damage):
    content = os.urandom(1_000_000)
    artifact = client.submit("reconstruct", {}, {"big": content})["inputs"]["big"]
    part = {"flipped": b"!" + content[1:500_000], "longer": content + b"!", "whole": content}[damage]
    (tmp_path / f"back.{artifact[:16]}.part").write_bytes(part)
    assert client.download(artifact, tmp_path / "back").read_bytes() == content
    assert os.listdir(tmp_path) == ["back"]


def test_an_artifact_that_is_not_there(client, tmp_path):
    for artifact, code in (("0" * 64, "no-artifact"), ("../../etc/passwd", "bad-hash"), ("", "bad-hash")):
        for fetch in (lambda: client.download(artifact, tmp_path / "x"), lambda: client.blob(artifact)):  # noqa: B023
            with pytest.raises(KilnError) as caught:
                fetch()
            assert caught.value.code == code
    assert os.listdir(tmp_path) == []


def test_a_blob_larger_than_expected_is_refused(client):
    artifact = client.submit("reconstruct", {}, {"big": os.urandom(1_000_000)})["inputs"]["big"]
    with pytest.raises(KilnError) as caught:
        client.blob(artifact, most=999_999)
    assert caught.value.code == "too-large"
    assert len(client.blob(artifact, most=1_000_000)) == 1_000_000


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads the server's memory from /proc")
@pytest.mark.parametrize("size", [60_000_000, pytest.param(2_000_000_000, marks=pytest.mark.long)])
def test_a_large_file_takes_little_memory_on_either_side(services, tmp_path, size):
    server = services().start()
    with open(tmp_path / "big", "wb") as file:
        for _ in range(size // 1_000_000):
            file.write(os.urandom(1_000_000))
    with server.client() as client:
        submit(client)
        before, most = server.memory(), []
        tracemalloc.start()
        job = client.submit("reconstruct", {}, {"big": tmp_path / "big"}, progress=lambda *_: most.append(server.memory()))
        client.download(job["inputs"]["big"], tmp_path / "back", lambda _: most.append(server.memory()))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    print(f"{size / 1e6:.0f} MB: server +{(max(most) - before) / 1e6:.1f} MB, client +{peak / 1e6:.1f} MB")
    assert max(most) - before < 32_000_000 and peak < 16_000_000


def test_a_client_that_does_not_read_slows_nobody(service, client, tmp_path):
    content = os.urandom(8_000_000)
    artifact = client.submit("reconstruct", {}, {"big": content})["inputs"]["big"]
    with service.peer() as first, service.peer() as second:
        for peer in (first, second):  # they ask for much and take nothing
            peer.send({"type": "subscribe", "id": "s", "all": True, "after": {}})
            for number in range(messages.TRANSFERS):
                peer.send({"type": "download", "id": f"{number}", "artifact": artifact})
            for number in range(40):
                peer.send({"type": "jobs", "id": f"j{number}"})
        waits = [client.ping() for _ in range(200)]
        client.download(artifact, tmp_path / "back")
        assert sorted(waits)[-3] < 0.5
    assert (tmp_path / "back").read_bytes() == content


def test_many_transfers_at_once_all_arrive(service):
    contents = [os.urandom(3_000_000 + number) for number in range(24)]
    returned: list[bool] = []

    def go_and_come(content: bytes) -> None:
        with service.client(timeout=60) as client:
            artifact = client.submit("reconstruct", {}, {"big": content})["inputs"]["big"]
            returned.append(client.blob(artifact) == content)

    threads = [threading.Thread(target=go_and_come, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert returned == [True] * len(contents)


# -- Events --------------------------------------------------------------------------------------------------------------------------


def numbers(events: list[dict], job: str) -> list[int]:
    return [event["number"] for event in events if event["job"] == job]


def gather(client: Client, job: str, last: int, seconds: float = 5.0) -> list[dict]:
    """What `poll` gives until event `last` of a job."""
    found, until = [], time.monotonic() + seconds
    while last not in numbers(found, job) and time.monotonic() < until:
        found += client.poll(0.2)
    return found + client.poll(0.2)  # and what should not come


def test_a_subscriber_hears_of_every_job_from_then_on(service, client):
    old = submit(client)
    with service.client() as listener:
        listener.subscribe()
        listener.poll(0.1)
        new = submit(client)
        client.cancel(new["id"])
        client.cancel(old["id"])
        heard = gather(listener, old["id"], 2)
    assert [(event["job"], event["number"], event["kind"]) for event in heard] == [
        (new["id"], 1, "queued"), (new["id"], 2, "cancelled"), (old["id"], 2, "cancelled"),
    ]  # fmt: skip


def test_poll_waits_no_longer_than_asked(service):
    with service.client() as listener:
        listener.subscribe()
        start = time.monotonic()
        assert listener.poll(0.3) == []
        assert 0.25 < time.monotonic() - start < 2
        assert listener.poll() == []


def test_after_a_cut_line_exactly_the_missed_events_come(service, client):
    old, waiting = submit(client), submit(client)
    ended = submit(client)
    client.cancel(ended["id"])
    with Network(service.connection()) as network, Client(network.connection) as listener:
        listener.subscribe()
        client.cancel(old["id"])
        assert numbers(gather(listener, old["id"], 2), old["id"]) == [2]
        network.open = False
        network.cut()
        client.retry(old["id"])
        client.cancel(old["id"])
        new = submit(client)
        client.cancel(new["id"])
        client.cancel(waiting["id"])
        network.open = True
        client.retry(old["id"])
        heard = gather(listener, old["id"], 5)
    assert numbers(heard, old["id"]) == [3, 4, 5]
    assert numbers(heard, new["id"]) == [1, 2]
    assert numbers(heard, waiting["id"]) == [2]
    assert len(heard) == 6  # and nothing of the job that had ended before


def test_after_a_killed_server_exactly_the_missed_events_come(services):
    server = services().start()
    with server.client(patience=20) as listener:
        job = submit(listener)
        listener.subscribe()
        listener.cancel(job["id"])
        assert numbers(gather(listener, job["id"], 2), job["id"]) == [2]
        server.kill()
        server.start()
        with server.client() as other:
            other.retry(job["id"])
            new = submit(other)
        heard = gather(listener, new["id"], 1)
        assert numbers(heard, job["id"]) == [3] and numbers(heard, new["id"]) == [1] and len(heard) == 2


def test_a_client_that_slept_gets_every_event_once(service, client):
    """More events than any pipe holds, while the subscriber reads nothing."""
    with service.client() as listener:
        listener.subscribe()
        jobs = [submit(client)["id"] for _ in range(20)]
        for _ in range(15):
            for job in jobs:
                client.cancel(job)
                client.retry(job)
        heard, until = [], time.monotonic() + 20
        while len(heard) < 20 * 31 and time.monotonic() < until:
            heard += listener.poll(0.5)
        heard += listener.poll(0.3)
    for job in jobs:
        assert numbers(heard, job) == list(range(1, 32))


NARROW = """
import zmq, backend.server
backend.server.PIPE = 2
make = zmq.Context.socket
def narrow(self, *arguments, **options):
    made = make(self, *arguments, **options)
    made.setsockopt(zmq.SNDBUF, 4096)
    return made
zmq.Context.socket = narrow
"""


def test_events_that_fit_into_no_pipe_come_from_the_store(services):
    """A subscriber that reads nothing behind a connection that holds little: what happens meanwhile comes when it reads."""
    server = services(before=NARROW).start()
    with server.client() as client, Peer(server.connection(), receive=1, buffer=4096) as peer:
        peer.ask("subscribe", all=True)
        jobs = [submit(client)["id"] for _ in range(10)]
        for _ in range(20):
            for job in jobs:
                client.cancel(job)
                client.retry(job)
        late = submit(client)["id"]
        heard = []
        while message := peer.receive(2.0):
            heard += [message[0]["event"]] if message[0]["type"] == "event" else []
        assert client.events(jobs[0])[-1]["number"] == 41
    for job in jobs:
        assert numbers(heard, job) == list(range(1, 42))
    assert numbers(heard, late) == [1]


def test_what_happens_while_a_subscription_is_made_is_not_lost(services):
    slow = """
import time, backend.store
read = backend.store.Store.last_number
def slowly(self, job):
    number = read(self, job)
    if hasattr(self, "started"):
        time.sleep(0.7)
    return number
backend.store.Store.last_number = slowly
import backend.server
start = backend.server.Jobs.start
def begin(self):
    start(self)
    self.store.started = True
backend.server.Jobs.start = begin
"""
    server = services(before=slow).start()
    with server.client() as client, server.client() as listener:
        old = submit(client)["id"]
        listener.hello()
        made: list[str] = []

        def meanwhile():
            time.sleep(0.3)
            with server.client() as other:
                other.cancel(old)
                made.append(submit(other)["id"])

        thread = threading.Thread(target=meanwhile)
        thread.start()
        start = time.monotonic()
        listener.subscribe()
        assert time.monotonic() - start > 0.6  # else this shows nothing
        thread.join()
        heard = gather(listener, made[0], 1)
    assert numbers(heard, old) == [2] and numbers(heard, made[0]) == [1]


def test_an_event_that_comes_twice_is_told_once(services):
    stutter = """
from backend.server import Server
put = Server._put
def twice(self, identity, frames):
    if b"event" in frames[0][:20]:
        put(self, identity, frames)
    return put(self, identity, frames)
Server._put = twice
"""
    server = services(before=stutter).start()
    with server.client() as client, server.peer() as peer:
        client.subscribe()
        peer.ask("subscribe", all=True)
        job = submit(client)["id"]
        client.cancel(job)
        assert numbers(gather(client, job, 2), job) == [1, 2]
        assert [peer.receive()[0]["event"]["number"] for _ in range(4)] == [1, 1, 2, 2]


def test_more_events_than_the_client_keeps_are_asked_for_again(service, client, monkeypatch):
    monkeypatch.setattr("protocol.client.MOST_EVENTS", 5)
    with service.client() as listener:
        listener.subscribe()
        job = submit(client)["id"]
        for _ in range(10):
            client.cancel(job)
            client.retry(job)
        listener.ping()
        heard, until = [], time.monotonic() + 10
        while len(heard) < 21 and time.monotonic() < until:
            heard += listener.poll(0.2)
    assert numbers(heard, job) == list(range(1, 22))


def test_watch_tells_the_past_and_the_present_until_the_end(service, client):
    job = submit(client)["id"]
    client.cancel(job)
    client.retry(job)  # an end that was not the last
    threading.Timer(0.3, lambda: service_cancel(service, job)).start()
    assert [event["kind"] for event in client.watch(job, timeout=10)] == ["queued", "cancelled", "queued", "cancelled"]
    assert [event["number"] for event in client.watch(job, after=2)] == [3, 4]
    assert list(client.watch(job, after=4)) == []
    with pytest.raises(KilnError) as caught:
        list(client.watch("nothing"))
    assert caught.value.code == "no-job"


def service_cancel(service, job: str) -> None:
    with service.client() as other:
        other.cancel(job)


def test_watch_and_subscribe_share_a_client(service, client):
    client.subscribe()
    job, other = submit(client)["id"], submit(client)["id"]
    threading.Timer(0.2, lambda: service_cancel(service, job)).start()
    assert [event["number"] for event in client.watch(job, timeout=10)] == [1, 2]
    assert numbers(client.poll(0.5), other) == [1]


def test_watch_has_an_end(client):
    with pytest.raises(KilnError) as caught:
        list(client.watch(submit(client)["id"], timeout=0.3))
    assert caught.value.code == "timeout"


def test_watch_survives_a_killed_server_on_another_port(services):
    server = services().start()
    with server.client() as client:
        job = submit(client)["id"]
        before = server.connection().endpoint

        def restart():
            server.kill()
            time.sleep(0.5)
            server.start()
            service_cancel(server, job)

        watching = client.watch(job, timeout=30)
        assert next(watching)["kind"] == "queued"
        thread = threading.Thread(target=restart)
        thread.start()
        assert [event["kind"] for event in watching] == ["cancelled"]
        thread.join()
        assert server.connection().endpoint != before


def test_a_backend_that_stays_away_is_named(services):
    server = services().start()
    with server.client(patience=0.5) as client:
        client.hello()
        server.kill()
        with pytest.raises(KilnError) as caught:
            client.jobs()
        assert caught.value.code == "unavailable" and caught.value.hint
        server.start()
        assert client.jobs() == []


@pytest.mark.skipif(os.name != "posix", reason="stops the process with a signal")
def test_a_backend_that_hangs_is_named(services, monkeypatch):
    monkeypatch.setattr("protocol.client.PING_AFTER", 0.3)
    monkeypatch.setattr("protocol.client.PING_WAIT", 0.5)
    server = services().start()
    with server.client(patience=0.0) as client:
        client.subscribe()
        server.process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(KilnError) as caught:
                client.poll(10)
        finally:
            server.process.send_signal(signal.SIGCONT)
    assert caught.value.code == "unavailable" and "word" in caught.value.message


# -- Bad input -----------------------------------------------------------------------------------------------------------------------


def test_requests_before_hello_and_without_id_are_refused(service):
    with service.peer(hello=False) as peer:
        assert peer.ask("status")[0]["error"]["code"] == "no-hello"
        peer.send({"type": "ping"})
        error, _ = peer.receive()
        assert error["error"]["code"] == "bad-message" and error["to"] is None
    with service.peer() as peer:
        for id in (None, 5, "", "x" * 101, ["a"], {"a": 1}):
            peer.send({"type": "ping", "id": id})
            assert peer.receive()[0]["error"]["code"] == "bad-message"


garbage = {
    "no frames but an empty one": [b""],
    "bytes": [b"\xc1\xff\x00"],
    "three frames": [msgpack.packb({"type": "ping", "id": "x"}), b"1", b"2"],
    "100,000 frames": [msgpack.packb({"type": "ping", "id": "x"})] + [b""] * 100_000,
    "a bomb": [b"\x82\xa4type\xa1x\xa1a" + b"\xdc\x04\x00" * 100_000],
    "nesting": [msgpack.packb({"type": "ping", "id": "x", "a": [[[[[[[[[[[[[]]]]]]]]]]]]]})],
    "a list": [msgpack.packb([1, 2, 3])],
}


@pytest.mark.parametrize("frames", garbage.values(), ids=garbage.keys())
def test_garbage_gets_a_typed_error(service, client, frames):
    with service.peer() as peer:
        peer.socket.send_multipart(frames)
        error, _ = peer.receive(10)
        assert error["type"] == "error" and error["error"]["code"] == "bad-message" and error["error"]["message"]
        assert peer.ask("ping")[0]["type"] == "reply"
    assert client.ping() < 5


wrong = [None, True, -1, 5, 2**60, 1.5, "x", "x" * 3000, b"x", [], ["x", 5], {}, {"x": 5}, {"x": "y"}]
fields = {
    "hello": ["protocol", "client", "name"],
    "status": ["x"],
    "submit": ["recipe", "values", "inputs", "title", "source"],
    "jobs": ["after"],
    "job": ["job"],
    "cancel": ["job"],
    "retry": ["job"],
    "remove": ["job"],
    "events": ["job", "after"],
    "subscribe": ["all", "after", "since"],
    "missing": ["hashes"],
    "upload": ["hash", "size"],
    "finish": ["upload"],
    "download": ["artifact", "offset", "credit"],
    "chunk": ["upload", "offset"],
    "credit": ["download", "chunks"],
    "stop": ["download"],
    "ping": ["id"],
    "shutdown": ["mode"],
}
right = {
    "protocol": [1, 0],
    "recipe": "reconstruct",
    "inputs": {"a": "0" * 64},
    "hash": "0" * 64,
    "size": 5,
    "artifact": "0" * 64,
    "job": "x",
    "mode": "later",
    "upload": 1,
    "download": 1,
    "chunks": 1,
    "offset": 0,
    "hashes": [],
}


def test_every_field_of_every_message_may_be_wrong(service, client):
    """Each request with each wrong value in each field: exactly one answer each, and the server lives."""
    with service.peer() as peer:
        for kind, names in fields.items():
            for name in names:
                for value in wrong[kind == "shutdown" :]:  # without a mode it means now
                    given = {other: right[other] for other in names if other in right} | {name: value}
                    if kind in ("chunk", "credit", "stop"):
                        peer.send({"type": kind, **given}, b"blob")
                    elif kind == "ping":
                        peer.send({"type": kind, **given})
                    else:
                        answer, _ = peer.ask(kind, **given)
                        assert answer["type"] == "reply" or answer["error"]["code"] not in ("", "internal"), (kind, name, value, answer)
        assert peer.ask("hello", protocol=[1, 0])[0]["type"] == "reply"
        assert peer.ask("ping")[0]["type"] == "reply"
    assert client.ping() < 5
    assert "Traceback" not in service.log()


def test_a_frame_over_the_limit_ends_only_its_own_connection(service, client):
    with service.peer() as peer:
        peer.send({"type": "ping", "id": "x"}, b"x" * (messages.FRAME_BYTES + 100_000))
        assert peer.receive(1.0) is None
    assert client.ping() < 5


def test_a_client_that_asks_and_never_listens_is_dropped(service, client):
    with Peer(service.connection(), receive=1) as peer:
        for number in range(3000):
            try:
                peer.socket.send(msgpack.packb({"type": "jobs", "id": f"{number}"}), zmq.NOBLOCK)
            except zmq.Again:
                break
        assert client.ping() < 5
        assert client.status()["clients"]


def test_too_many_unanswered_requests_are_refused(service):
    with service.peer() as peer:
        for number in range(500):
            peer.send({"type": "status", "id": f"{number}"})
        answers = [peer.receive(10)[0] for _ in range(500)]
        assert {answer["to"] for answer in answers} == {f"{number}" for number in range(500)}
        assert {answer["error"]["code"] for answer in answers if answer["type"] == "error"} <= {"busy"}
        assert peer.ask("ping")[0]["type"] == "reply"


def test_one_client_too_many_is_told_so_and_places_become_free(services):
    server = services().start()
    peers = [server.peer() for _ in range(messages.CLIENTS)]
    try:
        with server.client() as client, pytest.raises(KilnError) as caught:
            client.hello()
        assert caught.value.code == "too-many-clients"
        peers.pop().__exit__()
        time.sleep(0.2)
        with server.client() as client:
            assert len(client.status()["clients"]) == messages.CLIENTS
    finally:
        for peer in peers:
            peer.__exit__()
