"""Weights as they are listed, fetched, checked, resumed, refused, bundled and removed, against a hub on this machine that can fail."""

import io
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from backend import cli, fetch, weights
from protocol.errors import Cancelled, KilnError
from tests.backend.hub import Hub, pinned, registry, safetensors

ROOT = Path(__file__).parents[2]
COMMIT, NEWER = "1" * 40, "2" * 40
CONFIG = json.dumps({"_class_name": "UNet", "width": 8}).encode()
TENSOR = safetensors(random.Random(1).randbytes(600_000))
SMALL = safetensors(random.Random(2).randbytes(3000))
MODEL = {"unet/config.json": CONFIG, "unet/model.safetensors": TENSOR}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with some repositories, and registry entries for them: model (pinned), fresh (not pinned), adapter (needs model), ..."""
    found = Hub(
        {
            "makers/model": {COMMIT: {**MODEL, "unet/model.bin": b"\x80\x04pickle", "README.md": b"hello"}},
            "makers/copy": {COMMIT: MODEL},
            "makers/adapter": {COMMIT: {"adapter.safetensors": SMALL}},
        }
    )
    monkeypatch.setenv("KILN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", found.url)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_HUB_OFFLINE", "KILN_OFFLINE", "HF_TOKEN", "KILN_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fetch, "BACKOFF", 0.01)
    pins = [pinned(path, content) for path, content in MODEL.items()]
    patterns = ["*/*.json", "*/*.safetensors"]
    entries = [
        {"id": "model", "source": "makers/model", "revision": COMMIT, "files": pins, "mirrors": ["makers/copy"], "memory": {"fp16": 2.0}},
        {"id": "fresh", "source": "makers/model", "patterns": patterns, "about": 600_000},
        {"id": "adapter", "source": "makers/adapter", "patterns": ["*.safetensors"], "needs": ["model"], "also": ["nickname"]},
        {"id": "plain", "source": f"{found.url}/files", "files": [pinned("adapter.safetensors", SMALL)]},
        {"id": "closed", "source": "makers/adapter", "revision": COMMIT, "files": [pinned("adapter.safetensors", SMALL)], "gated": True},
    ]
    monkeypatch.setenv("KILN_WEIGHTS_REGISTRY", str(registry(tmp_path / "registry.toml", *entries)))
    yield found
    found.close()


def refusal(code, action, *arguments, **options) -> KilnError:
    with pytest.raises(KilnError) as caught:
        action(*arguments, **options)
    assert caught.value.code == code, caught.value
    return caught.value


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != weights.LOCK]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def kiln(capsys):
    def run(*words, code=0) -> str:
        assert cli.main(["weights", *map(str, words)]) == code
        out, errors = capsys.readouterr()
        return out if code == 0 else errors

    return run


# -- The registry that ships -----------------------------------------------------------------------------------------------------------


def test_every_entry_that_ships_says_what_a_user_must_know():
    for one in weights._registry(weights.REGISTRY, 0).values():
        assert one.title and one.purpose.endswith(".") and one.loader and one.memory, one.id
        assert one.licence.name and one.licence.url.startswith("https://") and one.licence.commercial and one.licence.territory, one.id
        assert one.bundled or one.source and (one.files or one.patterns), one.id
        assert one.revision == "" or len(one.revision) == 40 and int(one.revision, 16) >= 0, one.id
        for file in one.files:
            assert file.sha256 == "" or len(file.sha256) == 64 and int(file.sha256, 16) >= 0, (one.id, file.path)
        if "://" in one.source:
            assert one.pinned, f"{one.id} comes from where nobody tells hashes"
        for needed in one.needs:
            weights.entry(needed)


def test_what_the_recipes_offer_is_in_the_registry():
    from protocol import recipes

    for recipe in recipes.RECIPES.values():
        named = {parameter.name: parameter for parameter in recipes.parameters(recipe)}
        for name in getattr(recipe, "WEIGHTS", ()):
            for model, _ in named[name].options:
                weights.entry(model)


@pytest.mark.parametrize(
    "path", ["model.bin", "model.pt", "a/run.py", "../model.safetensors", "/etc/model.json", "a\\b.json", "C:/a.json", "a//b.json", ""]
)
def test_a_registry_cannot_name_pickles_code_or_ways_out(path, tmp_path, monkeypatch):
    files = [{"path": path, "bytes": 3, "sha256": "0" * 64}]
    monkeypatch.setenv("KILN_WEIGHTS_REGISTRY", str(registry(tmp_path / "r.toml", {"id": "bad", "source": "a/b", "files": files})))
    refusal("bad-weights", weights.entries)


@pytest.mark.parametrize("text", ["entry = 3", "[[entry]]\nid = '..'", "[[entry]]\nid = 'a'", "nonsense"])
def test_a_registry_that_is_none_is_named(text, tmp_path, monkeypatch):
    (tmp_path / "r.toml").write_text(text)
    monkeypatch.setenv("KILN_WEIGHTS_REGISTRY", str(tmp_path / "r.toml"))
    assert "r.toml" in refusal("bad-registry", weights.entries).message


def test_the_server_stays_free_of_heavy_modules():
    heavy = ("torch", "numpy", "requests", "huggingface_hub")
    code = f"import sys, backend.weights, backend.fetch; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout.strip() == "[]", done.stderr


# -- Memory ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "free, precision, offload, sentence",
    [
        (80e9, "bf16", False, "needs 40 GB, 80 GB free: bf16"),
        (30e9, "fp8", False, "needs 40 GB, 30 GB free: fp8, about 1.1x slower"),
        (17e9, "bf16", True, "needs 40 GB, 17 GB free: offload, about 2x slower"),
    ],
)
def test_the_memory_plan_says_what_it_weighed(free, precision, offload, sentence):
    plan = weights.memory_plan("wan2.1-i2v-14b-480p", int(free), "cuda:0")
    assert (plan.precision, plan.offload, plan.sentence) == (precision, offload, sentence) and plan.bytes <= free


def test_too_little_memory_is_a_sentence_with_the_way_out():
    error = refusal("out-of-memory", weights.memory_plan, "wan2.1-i2v-14b-480p", 9_000_000_000, "cuda")
    assert "needs 40 GB, 9.0 GB free" in error.message and "16 GB" in error.hint
    assert "GPU" in refusal("no-device", weights.memory_plan, "wan2.1-i2v-14b-480p", 500_000_000_000, "cpu").message
    assert weights.memory_plan("kiln-tiny-turntable", 4_000_000_000, "cpu").precision == "fp32"
    assert weights.memory_plan("kiln-tiny-turntable", 4_000_000_000, "cuda").precision == "fp32"


# -- Downloads -------------------------------------------------------------------------------------------------------------------------


def test_no_weights_names_size_licence_and_the_way_to_them(hub):
    error = refusal("no-weights", weights.folder, "model")
    assert "600 kB" in error.message and "MIT" in error.message
    assert "kiln weights pull model --accept-licence" in error.hint and "Models" in error.hint
    refusal("no-model", weights.folder, "nonsense")


def test_what_is_pulled_is_whole_locked_and_given_out(hub):
    seen = []
    folder = fetch.pull("model", accept=True, progress=lambda fraction, text: seen.append((fraction, text)))
    assert contents(folder) == MODEL and folder == weights.folder("model") and weights.state("model") == "installed"
    lock = json.loads((folder / weights.LOCK).read_text())
    assert lock["checked"] == "registry" and lock["revision"] == COMMIT and lock["licence"] == "MIT" and lock["accepted"]
    assert not any(path.startswith("api/") for path, _, _ in hub.asked), "what is pinned needs no listing"
    before = len(hub.asked)
    assert fetch.pull("model") == folder and len(hub.asked) == before, "what is here is not fetched again"


def test_weights_of_another_revision_are_told_apart_also_where_others_need_them(hub):
    fetch.pull("adapter", accept=True)
    before = weights.revision("adapter"), weights.revision("model")
    assert weights.revision("nickname") == before[0] != before[1]
    lock = weights.read(weights.place(weights.entry("model")) / weights.LOCK)
    lock["files"][0] |= {"sha256": "0" * 64}
    weights.write(weights.place(weights.entry("model")) / weights.LOCK, lock)
    assert weights.revision("adapter") != before[0] and weights.revision("model") != before[1]


def test_what_is_not_pinned_binds_at_its_first_download(hub):
    folder = fetch.pull("fresh", accept=True)
    assert contents(folder) == MODEL, "pickles and pages are left where they are"
    lock = json.loads((folder / weights.LOCK).read_text())
    assert lock["revision"] == COMMIT and lock["checked"] == "hub"
    assert all(len(file["sha256"]) == 64 for file in lock["files"]), "also of small files, whose hash the hub tells by git's rules"
    # A new commit appears, and one file here is damaged: the repair takes the bytes of the first time, or none.
    changed = safetensors(random.Random(3).randbytes(600_000))
    hub.repositories["makers/model"][NEWER] = {**MODEL, "unet/model.safetensors": changed}
    (folder / "unet/model.safetensors").write_bytes(changed)
    assert "bytes that were checked" in refusal("no-weights", weights.folder, "fresh").message and weights.state("fresh") == "damaged"
    assert contents(fetch.pull("fresh")) == MODEL and weights.state("fresh") == "installed"


def test_needs_come_first_and_are_demanded(hub):
    refusal("no-weights", weights.folder, "adapter")
    folder = fetch.pull("nickname", accept=True)
    assert contents(folder) == {"adapter.safetensors": SMALL} and weights.state("model") == "installed"
    fetch.remove("model")
    assert "Model" in refusal("no-weights", weights.folder, "adapter").message


def test_a_broken_connection_goes_on_where_it_broke(hub):
    hub.cut["model.safetensors"] = []
    hub.cut["unet/model.safetensors"] = [100_000, 250_000, 1]
    assert contents(fetch.pull("model", accept=True)) == MODEL
    assert hub.ranges("unet/model.safetensors") == ["", "100000-", "350000-", "350001-"]


def test_a_source_without_ranges_starts_again(hub):
    hub.cut["unet/model.safetensors"] = [100_000]
    hub.no_ranges.add("unet/model.safetensors")
    assert contents(fetch.pull("model", accept=True)) == MODEL


def test_a_busy_source_is_asked_again(hub):
    hub.status["unet/config.json"] = [503, 429]
    assert contents(fetch.pull("model", accept=True)) == MODEL and len(hub.ranges("unet/config.json")) == 3


def test_cancelled_keeps_what_came(hub):
    hub.rate["unet/model.safetensors"] = 1_000_000

    def progress(fraction, text):
        if fraction > 0.3:
            raise Cancelled

    with pytest.raises(Cancelled):
        fetch.pull("model", accept=True, progress=progress)
    assert weights.state("model") == "partial" and "only partly" in refusal("no-weights", weights.folder, "model").message
    hub.rate.clear()
    assert contents(fetch.pull("model")) == MODEL
    assert int(hub.ranges("unet/model.safetensors")[-1].rstrip("-")) > 100_000 and len(hub.ranges("unet/config.json")) == 1


def test_killed_in_the_middle_it_resumes(hub):
    hub.rate["unet/model.safetensors"] = 200_000
    command = [sys.executable, "-m", "backend.cli", "weights", "pull", "model", "--accept-licence"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    part = weights.root() / "model/unet/model.safetensors.part"
    deadline = time.monotonic() + 30
    while not part.exists() or part.stat().st_size < 50_000:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert weights.state("model") == "partial"
    hub.rate.clear()
    assert contents(fetch.pull("model")) == MODEL and hub.ranges("unet/model.safetensors")[-1] != ""


def test_half_of_something_else_is_thrown_away(hub):
    part = weights.root() / "model/unet/model.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 200_000)
    assert contents(fetch.pull("model", accept=True)) == MODEL
    assert hub.ranges("unet/model.safetensors") == ["200000-", ""]


def test_a_wrong_hash_is_refused_by_name_and_nothing_stays(hub):
    hub.wrong["unet/model.safetensors"] = TENSOR[:-1] + b"!"
    error = refusal("bad-hash", fetch.pull, "model", accept=True)
    assert "unet/model.safetensors" in error.message and "hash" in error.message
    assert not (weights.root() / "model/unet/model.safetensors").exists() and weights.state("model") == "partial"
    del hub.wrong["unet/model.safetensors"]
    assert contents(fetch.pull("model")) == MODEL


def test_more_than_the_file_is_refused_before_it_fills_the_disk(hub):
    hub.wrong["unet/model.safetensors"] = TENSOR + b"!" * 5_000_000
    assert "sends more" in refusal("bad-hash", fetch.pull, "model", accept=True).message
    assert sum(path.stat().st_size for path in weights.root().rglob("*") if path.is_file()) < 700_000


def test_a_small_file_that_the_hub_knows_by_git_is_checked_too(hub):
    hub.wrong["unet/config.json"] = CONFIG.replace(b"8", b"9")
    refusal("bad-hash", fetch.pull, "fresh", accept=True)


def test_a_mirror_steps_in(hub):
    del hub.repositories["makers/model"]
    assert contents(fetch.pull("model", accept=True)) == MODEL


def test_without_any_source_the_sentence_says_who_failed(hub):
    hub.repositories.clear()
    error = refusal("no-source", fetch.pull, "model", accept=True)
    assert "127.0.0.1" in error.message and "404" in error.message
    hub.close()
    assert "127.0.0.1" in refusal("no-source", fetch.pull, "model", accept=True).message


def test_while_it_tries_again_it_can_be_cancelled(hub, monkeypatch):
    monkeypatch.setattr(fetch, "BACKOFF", 60.0)
    hub.close()

    def progress(fraction, text):
        if "trying again" in text:
            raise Cancelled

    for id in ("model", "fresh"):  # the file's own server, and the hub that tells what there is
        with pytest.raises(Cancelled):
            fetch.pull(id, accept=True, progress=progress)


def test_a_pinned_hash_outweighs_the_hubs(hub, tmp_path, monkeypatch):
    files = [{"path": "adapter.safetensors", "sha256": "0" * 64}]
    entry = {"id": "other", "source": "makers/adapter", "revision": COMMIT, "files": files}
    monkeypatch.setenv("KILN_WEIGHTS_REGISTRY", str(registry(tmp_path / "r.toml", entry)))
    assert "registry" in refusal("bad-hash", fetch.pull, "other", accept=True).message


def test_a_registry_that_moves_on_makes_the_old_files_stale(hub, tmp_path, monkeypatch):
    fetch.pull("model", accept=True)
    new = {"unet/config.json": CONFIG, "unet/other.safetensors": SMALL}
    hub.repositories["makers/model"][NEWER] = new
    entry = {"id": "model", "source": "makers/model", "revision": NEWER, "files": [pinned(path, content) for path, content in new.items()]}
    monkeypatch.setenv("KILN_WEIGHTS_REGISTRY", str(registry(tmp_path / "r.toml", entry)))
    assert weights.state("model") == "damaged"
    assert contents(fetch.pull("model")) == new, "and the file that is no longer part of it is gone"


def test_plain_addresses_serve_as_well(hub):
    assert contents(fetch.pull("plain", accept=True)) == {"adapter.safetensors": SMALL}


def test_a_gated_repository_gets_the_token_and_nobody_else_does(hub, monkeypatch):
    hub.token = "hf_secret"
    error = refusal("gated", fetch.pull, "closed", accept=True)
    assert "makers/adapter" in error.hint and "HF_TOKEN" in error.hint
    store = Hub(hub.repositories)  # large files lie on another host
    hub.elsewhere = store.url.replace("127.0.0.1", "localhost")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    try:
        assert contents(fetch.pull("closed", accept=True)) == {"adapter.safetensors": SMALL}
        assert [token for _, _, token in store.asked] == [""], "the token stays with the hub"
        fetch.pull("model", accept=True)
        assert all(token == "" for path, _, token in (*hub.asked, *store.asked) if path.startswith("unet/"))
    finally:
        store.close()


# -- What is asked first ---------------------------------------------------------------------------------------------------------------


def test_a_licence_is_agreed_to_once_and_recorded(hub):
    error = refusal("licence-needed", fetch.pull, "model")
    assert "MIT of Model" in error.message and not hub.asked
    fetch.pull("model", accept=True)
    record = json.loads((weights.root() / "licences.json").read_text())["model"]
    assert record["licence"] == "MIT" and record["date"] == time.strftime("%Y-%m-%d")
    fetch.remove("model")
    fetch.pull("model")  # once is enough


def test_another_licence_is_asked_for_again(hub, tmp_path, monkeypatch):
    fetch.pull("plain", accept=True)
    fetch.remove("plain")
    licence = {"name": "Other", "url": "https://example.org/other", "commercial": "no"}
    entry = {"id": "plain", "source": f"{hub.url}/files", "files": [pinned("adapter.safetensors", SMALL)], "licence": licence}
    monkeypatch.setenv("KILN_WEIGHTS_REGISTRY", str(registry(tmp_path / "r.toml", entry)))
    refusal("licence-needed", fetch.pull, "plain")


def test_the_terms_tell_size_memory_licence_territory_and_commerce(tmp_path, monkeypatch):
    licence = {"name": "CC-BY-NC-4.0", "url": "https://creativecommons.org/licenses/by-nc/4.0/", "commercial": "no"}
    entry = {"id": "views", "source": "a/b", "about": 5_580_000_000, "patterns": ["*"], "memory": {"fp16": 6.0}, "licence": licence}
    monkeypatch.setenv("KILN_WEIGHTS_REGISTRY", str(registry(tmp_path / "r.toml", entry)))
    text = weights.terms(weights.entry("views"))
    for part in ("5.6 GB", "fp16 6 GB", "CC-BY-NC-4.0", "not allowed", "worldwide"):
        assert part in text
    assert "stabilityai/sv3d" in weights.terms(weights.entry("sv3d-p")).partition("Login")[2]


@pytest.mark.parametrize("switch", ["KILN_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_nothing_is_asked(hub, monkeypatch, switch):
    monkeypatch.setenv(switch, "1")
    assert switch in refusal("offline", fetch.pull, "model", accept=True).message and not hub.asked
    monkeypatch.setenv(switch, "0")
    fetch.pull("model", accept=True)
    monkeypatch.setenv(switch, "1")
    assert fetch.pull("model") == weights.folder("model"), "what is here is here"


def test_blenders_word_counts(hub):
    error = refusal("offline", fetch.pull, "model", accept=True, online=False)
    assert "Allow Online Access" in error.hint and not hub.asked


def test_a_full_disk_is_told_before_anything_comes(hub, small_disk, monkeypatch):
    monkeypatch.setenv("KILN_WEIGHTS", str(small_disk / "weights"))
    error = refusal("no-space", fetch.pull, "model", accept=True)
    assert "600 kB" in error.message and "KILN_WEIGHTS" in error.hint and not hub.asked
    monkeypatch.setattr(fetch, "SPARE", 0)  # and one that fills up on the way leaves what came
    (small_disk / "ballast").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 700_000))
    hub.rate["unet/model.safetensors"] = 1_000_000

    def fill(fraction, text):
        if fraction > 0.2 and not (small_disk / "more").exists():
            (small_disk / "more").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 50_000))

    assert "no room" in refusal("no-space", fetch.pull, "model", accept=True, progress=fill).message
    assert weights.state("model") == "partial"
    (small_disk / "ballast").unlink()
    hub.rate.clear()
    assert contents(fetch.pull("model")) == MODEL


def test_a_place_that_is_no_folder_is_told(hub, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("KILN_WEIGHTS", str(tmp_path / "file"))
    error = refusal("disk", fetch.pull, "model", accept=True)
    assert "file" in error.message and "KILN_WEIGHTS" in error.hint


def test_of_two_pulls_at_once_one_works(hub):
    begun, tried = threading.Event(), threading.Event()

    def hold(fraction, text):
        if fraction > 0.0:
            begun.set()
            tried.wait(30)

    first = threading.Thread(target=fetch.pull, args=("model",), kwargs={"accept": True, "progress": hold})
    first.start()
    assert begun.wait(30)
    assert "under way" in refusal("busy", fetch.pull, "model").message
    assert refusal("busy", fetch.remove, "model")
    tried.set()
    first.join()
    assert contents(weights.folder("model")) == MODEL and len(hub.ranges("unet/model.safetensors")) == 1


# -- What is refused -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", {"auto_map": {"AutoModel": "model.Thing"}}),
        ("unet/config.json", {"deep": [{"trust_remote_code": True}]}),
        ("model_index.json", {"_class_name": ["pipeline", "Mine"]}),
        ("model_index.json", {"_class_name": "Wan", "vae": ["my_module", "Vae"]}),
        ("config.json", b"not json"),
        ("config.json", b"[" * 200_000),
        ("model.safetensors", b"\x80\x04\x95pickled by torch"),
        ("model.safetensors", b"PK\x03\x04 a zip, as torch saves"),
        ("model.safetensors", b"\xff" * 40),
        ("model.onnx", b"PK\x03\x04"),
    ],
)
def test_what_could_run_code_is_refused(tmp_path, name, content):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert name in refusal("bad-weights", fetch.refuse_code, path, name).message


def test_what_is_plain_passes(tmp_path):
    index = {"_class_name": "Zero123PlusPipeline", "vae": ["diffusers", "AutoencoderKL"], "extra": [None, None], "ramp": [0.1, 0.2]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").write_bytes(SMALL)
    for path in tmp_path.iterdir():
        fetch.refuse_code(path, path.name)


def test_a_pickle_behind_the_right_name_and_hash_is_not_kept(hub, tmp_path, monkeypatch):
    pickled = b"\x80\x04\x95" + b"x" * 100
    hub.repositories["makers/evil"] = {COMMIT: {"model.safetensors": pickled}}
    entry = {"id": "evil", "source": "makers/evil", "revision": COMMIT, "files": [pinned("model.safetensors", pickled)]}
    monkeypatch.setenv("KILN_WEIGHTS_REGISTRY", str(registry(tmp_path / "r.toml", entry)))
    refusal("bad-weights", fetch.pull, "evil", accept=True)
    assert not list((weights.root() / "evil").rglob("*.safetensors*"))


# -- Folders and bundles ---------------------------------------------------------------------------------------------------------------


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("id", ["model", "fresh"])
def test_a_folder_serves_without_a_network(hub, tmp_path, monkeypatch, id):
    monkeypatch.setenv("KILN_OFFLINE", "1")
    own = write(tmp_path / "own", {**MODEL, "unet/model.bin": b"\x80\x04"})
    folder = fetch.pull(id, accept=True, source=own)
    assert contents(folder) == MODEL and not hub.asked
    lock = json.loads((folder / weights.LOCK).read_text())
    assert lock["checked"] == {"model": "registry", "fresh": "folder"}[id], "the list says how far it was checked"
    assert contents(own)["unet/model.safetensors"] == TENSOR, "the user's own files stay"


def test_a_folder_of_the_hubs_cache_serves_through_its_links(hub, tmp_path):
    blobs = write(tmp_path / "blobs", {"a": CONFIG, "b": TENSOR})
    snapshot = tmp_path / "snapshots" / COMMIT / "unet"
    snapshot.mkdir(parents=True)
    for name, blob in (("config.json", "a"), ("model.safetensors", "b")):
        (snapshot / name).symlink_to(blobs / blob)
    folder = fetch.pull("model", accept=True, source=snapshot.parent)
    assert contents(folder) == MODEL and not any(path.is_symlink() for path in folder.rglob("*"))


def test_a_folder_with_wrong_files_is_refused_and_kept(hub, tmp_path):
    own = write(tmp_path / "own", {**MODEL, "unet/model.safetensors": TENSOR[:-1] + b"!"})
    assert "own" in refusal("bad-hash", fetch.pull, "model", accept=True, source=own).message
    assert (own / "unet/model.safetensors").is_file() and not list((weights.root() / "model").rglob("model.safetensors*"))
    write(own, {"unet/model.safetensors": TENSOR[:-1]})
    refusal("bad-hash", fetch.pull, "model", accept=True, source=own)


def test_a_folder_of_pickles_is_told_so(hub, tmp_path):
    own = write(tmp_path / "own", {"unet/config.json": CONFIG, "unet/model.bin": b"\x80\x04"})
    error = refusal("bad-input", fetch.pull, "model", accept=True, source=own)
    assert "unet/model.safetensors" in error.message and "unet/model.bin is a pickle" in error.hint
    refusal("bad-input", fetch.pull, "model", accept=True, source=tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"no zip")
    refusal("bad-input", fetch.pull, "model", accept=True, source=tmp_path / "file")


@pytest.mark.parametrize("id", ["adapter", "fresh"])
def test_a_bundle_carries_weights_to_a_machine_without_network(hub, tmp_path, monkeypatch, id):
    fetch.pull(id, accept=True)
    path = fetch.bundle([id], tmp_path / "bundle.zip")
    expected = {one.id: contents(weights.place(one)) for one in weights.chain(id)}
    with zipfile.ZipFile(path) as archive:
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    monkeypatch.setenv("KILN_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("KILN_OFFLINE", "1")
    asked = len(hub.asked)
    fetch.pull(id, accept=True, source=path)
    assert {one.id: contents(weights.place(one)) for one in weights.chain(id)} == expected and len(hub.asked) == asked
    assert json.loads((weights.folder(id) / weights.LOCK).read_text())["revision"] == COMMIT


def test_a_damaged_bundle_is_refused(hub, tmp_path):
    fetch.pull("fresh", accept=True)
    path = fetch.bundle(["fresh"], tmp_path / "bundle.zip")
    fetch.remove("fresh")
    broken = bytearray(path.read_bytes())
    broken[len(broken) // 2] ^= 1
    path.write_bytes(broken)
    refusal("bad-input", fetch.pull, "fresh", source=path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "forged.zip", "w") as forged:
        for name in archive.namelist():
            forged.writestr(name, SMALL if name.endswith("model.safetensors") else archive.read(name))
    refusal("bad-hash", fetch.pull, "fresh", source=tmp_path / "forged.zip")
    assert weights.state("fresh") == "partial"


# -- Afterwards ------------------------------------------------------------------------------------------------------------------------


def test_files_that_changed_are_noticed(hub):
    folder = fetch.pull("model", accept=True)
    target = folder / "unet/model.safetensors"
    os.utime(target)
    assert weights.folder("model") == folder, "touched, but the same"
    target.write_bytes(TENSOR[:-1] + b"!")
    assert fetch.verify("model") == ["unet/model.safetensors does not have the bytes that were checked"]
    assert weights.state("model") == "damaged" and "damaged" in refusal("no-weights", weights.folder, "model").message
    before = len(hub.ranges("unet/config.json"))
    assert contents(fetch.pull("model")) == MODEL and fetch.verify("model") == []
    assert len(hub.ranges("unet/config.json")) == before, "only what is damaged is fetched again"
    target.unlink()
    assert weights.state("model") == "damaged"


def test_removed_is_gone(hub):
    fetch.pull("model", accept=True)
    assert fetch.remove("model") > 600_000
    assert weights.state("model") == "missing" and not (weights.root() / "model").exists() and fetch.remove("model") == 0
    refusal("bad-state", fetch.remove, "kiln-tiny-turntable")


@pytest.mark.parametrize("answer, code", [("y\n", 0), ("n\n", 2), ("", 2)])
def test_on_a_terminal_the_command_asks(hub, kiln, monkeypatch, answer, code):
    terminal = io.StringIO(answer)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    kiln("pull", "plain", code=code)
    assert weights.state("plain") == ("installed" if code == 0 else "missing")


def test_the_command_does_all_of_it(hub, tmp_path, kiln):
    states = {one["id"]: one["state"] for one in json.loads(kiln("list", "--json"))}
    assert states["model"] == states["adapter"] == "missing" and "isnet-general-use" in states
    assert "Licence    MIT" in kiln("pull", "adapter", code=2), "without consent it tells the terms and stops"
    kiln("pull", "adapter", "--accept-licence")
    listed = kiln()
    assert [line.split()[1] for line in listed.splitlines() if line.split()[0] in ("model", "adapter")] == ["installed", "installed"]
    assert "checked by the hub" in kiln("show", "adapter")
    kiln("bundle", "adapter", "--out", tmp_path / "b.zip")
    (weights.root() / "model/unet/config.json").write_bytes(b"{}")
    assert "kiln weights pull model" in kiln("verify", "model", "adapter", code=1)
    kiln("pull", "model", "--from", tmp_path / "b.zip")
    assert "as it was fetched" in kiln("verify", "model")
    assert "freed" in kiln("remove", "model") and weights.state("model") == "missing"
    assert "no-such" in kiln("show", "no-such", code=2)
