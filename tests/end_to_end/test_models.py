"""From the panel's buttons to files on the backend's disk: a model is downloaded, seen, and removed by the real extension and backend."""

import random
import time

import bpy
import pytest
from bl_ext.kiln_test.kiln import models, session

from tests.backend.hub import Hub, pinned, registry, safetensors

TENSOR = safetensors(random.Random(1).randbytes(400_000))
COMMIT = "1" * 40


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    found = Hub({"makers/model": {COMMIT: {"model.safetensors": TENSOR}}})
    entry = {"id": "model", "source": "makers/model", "revision": COMMIT, "files": [pinned("model.safetensors", TENSOR)]}
    patch = pytest.MonkeyPatch()  # before the backend starts, which inherits it
    patch.setenv("HF_ENDPOINT", found.url)
    for name in ("HF_HUB_OFFLINE", "KILN_OFFLINE"):
        patch.setenv(name, "0")
    patch.setenv("KILN_WEIGHTS_REGISTRY", str(registry(tmp_path_factory.mktemp("registry") / "r.toml", entry)))
    yield found
    patch.undo()
    found.close()


def until(ready):
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline, models.known.find("model")
        time.sleep(0.05)
        models.known.refresh()


def test_a_model_comes_and_goes(hub, home):
    online = bpy.context.preferences.system.use_online_access
    bpy.context.preferences.system.use_online_access = True
    hub.rate["model.safetensors"] = 100_000
    try:
        bpy.ops.kiln.get_model(model="model", agree=True)
        until(lambda: (models.known.pull("model") or {}).get("fraction", 0) > 0.2)
        bpy.ops.kiln.cancel_model(model="model")
        until(lambda: models.known.pull("model")["state"] == "cancelled")
        assert models.known.find("model")["state"] == "partial"
        hub.rate.clear()
        bpy.ops.kiln.get_model(model="model")
        until(lambda: models.known.find("model")["state"] == "installed")
        assert (home / "weights/model/model.safetensors").read_bytes() == TENSOR
        bpy.ops.kiln.remove_model("EXEC_DEFAULT", model="model")
        until(lambda: models.known.find("model")["state"] == "missing")
        assert not session.current.notices
    finally:
        bpy.context.preferences.system.use_online_access = online
