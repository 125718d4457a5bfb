"""Weights over the wire: listed, fetched in the background while clients come and go, cancelled and removed."""

import os
import random
import time

import pytest

from protocol.errors import KilnError
from tests.backend.hub import Hub, pinned, registry, safetensors

TENSOR = safetensors(random.Random(1).randbytes(600_000))
COMMIT = "1" * 40


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub, and this process's environment for servers that use it."""
    folder = tmp_path_factory.mktemp("registry")
    found = Hub({f"makers/{name}": {COMMIT: {"model.safetensors": TENSOR}} for name in ("one", "two")})
    entries = [
        {"id": name, "source": f"makers/{name}", "revision": COMMIT, "files": [pinned("model.safetensors", TENSOR)]}
        for name in ("one", "two")
    ]
    path = registry(folder / "r.toml", *entries)
    given = {"HF_ENDPOINT": found.url, "KILN_WEIGHTS_REGISTRY": str(path), "HF_HUB_OFFLINE": "0", "KILN_OFFLINE": "0"}
    before = dict(os.environ)
    os.environ.update(given)
    yield found
    os.environ.clear()
    os.environ.update(before)
    found.close()


@pytest.fixture(autouse=True)
def unhurried(hub):
    yield
    hub.rate.clear()
    hub.wrong.clear()


@pytest.fixture(scope="module")
def server(hub, service):  # the hub first: the server inherits its address
    return service


def entry(client, id):
    return client.weights(id)["entries"][0]


def ended(client, id):
    deadline = time.monotonic() + 30
    while (found := entry(client, id))["pull"]["state"] in ("waiting", "running", "cancelling"):
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


def refusal(code, action, *arguments, **options):
    with pytest.raises(KilnError) as caught:
        action(*arguments, **options)
    assert caught.value.code == code
    return caught.value


def test_the_list_tells_what_a_person_must_know(server, client):
    found = client.weights()
    one = next(one for one in found["entries"] if one["id"] == "one")
    assert (one["state"], one["bytes"], one["pull"], one["accepted"]) == ("missing", len(TENSOR), None, "")
    assert one["licence"] == {"name": "MIT", "url": "https://example.org/mit", "commercial": "yes", "territory": "worldwide"}
    assert found["free"] > 0 and found["offline"] is None and found["folder"] == str(server.home / "weights")
    assert {"wan2.1-i2v-14b-480p", "kiln-tiny-turntable"} <= {one["id"] for one in found["entries"]}
    assert one["plan"] is None, "no worker has told its memory"


def test_refusals_are_answers(server, client):
    refusal("no-model", client.weights, "nonsense")
    refusal("no-model", client.pull_weights, "nonsense")
    refusal("licence-needed", client.pull_weights, "one")
    assert "Online Access" in refusal("offline", client.pull_weights, "one", accept=True, online=False).hint
    refusal("bad-input", client.pull_weights, "one", accept=True, source="relative/path")
    refusal("bad-state", client.remove_weights, "kiln-tiny-turntable")
    assert entry(client, "one")["pull"] is None


def test_a_download_outlives_the_client_that_asked_for_it(server, hub):
    hub.rate["model.safetensors"] = 400_000
    with server.client() as first:
        assert first.pull_weights("one", accept=True)["pull"]["state"] in ("waiting", "running")
        assert first.pull_weights("one")["pull"]["state"] in ("waiting", "running"), "asking again changes nothing"
    with server.client() as second:
        seen, slowest = set(), 0.0
        while (found := entry(second, "one"))["pull"]["state"] != "done":
            assert found["pull"]["error"] is None, found
            seen.add(round(found["pull"]["fraction"], 3))
            slowest = max(slowest, second.ping())
            time.sleep(0.02)
        assert len(seen) > 2 and found["state"] == "installed" and found["checked"] == "registry"
        assert slowest < 5.0, "the server answers all the while"
        assert len(hub.ranges("model.safetensors")) == 1
        assert second.remove_weights("one")["state"] == "missing" and second.remove_weights("one")["pull"] is None


def test_cancelled_it_keeps_what_came_and_goes_on(server, hub, client):
    hub.rate["model.safetensors"] = 150_000
    client.pull_weights("one", accept=True)
    while entry(client, "one")["here"] < 50_000:
        time.sleep(0.02)
    refusal("bad-state", client.remove_weights, "one")
    client.cancel_weights("one")
    found = ended(client, "one")
    assert found["pull"]["state"] == "cancelled" and found["state"] == "partial" and found["here"] > 0
    hub.rate.clear()
    client.pull_weights("one")
    assert ended(client, "one")["state"] == "installed" and hub.ranges("model.safetensors")[-1] != ""
    assert client.cancel_weights("one")["pull"]["state"] == "done", "too late changes nothing"
    client.remove_weights("one")


def test_one_after_the_other_and_a_waiting_one_can_be_cancelled(server, hub, client):
    hub.rate["model.safetensors"] = 100_000
    client.pull_weights("one", accept=True)
    while entry(client, "one")["here"] < 10_000:
        time.sleep(0.02)
    assert client.pull_weights("two", accept=True)["pull"]["state"] == "waiting"
    client.cancel_weights("two")
    assert ended(client, "two")["pull"]["state"] == "cancelled" and entry(client, "one")["pull"]["state"] == "running"
    client.pull_weights("two")
    client.cancel_weights("one")
    hub.rate.clear()
    assert ended(client, "two")["state"] == "installed" and entry(client, "one")["state"] == "partial", "its turn comes"
    client.remove_weights("one"), client.remove_weights("two")


def test_what_fails_says_why(server, hub, client):
    hub.wrong["model.safetensors"] = TENSOR[:-1] + b"!"
    client.pull_weights("one", accept=True)
    found = ended(client, "one")
    assert found["pull"]["state"] == "failed" and found["pull"]["error"]["code"] == "bad-hash"
    assert "model.safetensors" in found["pull"]["error"]["message"] and found["pull"]["error"]["hint"]
    assert client.remove_weights("one")["state"] == "missing"


def test_a_killed_backend_leaves_what_came(services, hub):
    hub.rate["model.safetensors"] = 150_000
    server = services().start()
    with server.client() as client:
        client.pull_weights("one", accept=True)
        while entry(client, "one")["here"] < 50_000:
            time.sleep(0.02)
    server.kill()
    hub.rate.clear()
    server.start()
    with server.client() as client:
        assert (entry(client, "one")["state"], entry(client, "one")["pull"]) == ("partial", None)
        client.pull_weights("one")
        assert ended(client, "one")["state"] == "installed" and hub.ranges("model.safetensors")[-1] != ""


def test_a_backend_that_is_to_end_when_idle_finishes_its_download_first(services, hub):
    hub.rate["model.safetensors"] = 500_000
    server = services().start()
    with server.client() as client:
        client.pull_weights("one", accept=True)
        client.shutdown(now=False)
    server.process.wait(30)
    assert (server.home / "weights/one/kiln.lock.json").is_file()
