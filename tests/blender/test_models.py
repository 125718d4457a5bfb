"""Models in the panel: what is drawn of each state, what the operators ask of the backend, and what they refuse."""

import time

import bpy
import pytest
from bl_ext.kiln_test.kiln import models, panel, session

from tests.blender.layout import Button, Layout

GB = 1_000_000_000


def entry(id, state="missing", pull=None, **changes):
    """A model as the backend tells it."""
    return {
        "id": id, "title": id.capitalize(), "purpose": f"What {id} is for.", "class": "wan", "state": state, "problem": "",
        "bytes": 5 * GB, "here": 0, "memory": {"bf16": 40.0, "offload": 16.0}, "accepted": "", "needs": [], "also": [], "gated": False,
        "licence": {"name": "Apache-2.0", "url": "https://example.org/licence", "commercial": "yes", "territory": "worldwide"},
        "bundled": state == "bundled", "pinned": True, "source": f"makers/{id}", "revision": "1" * 40, "checked": "",
        "plan": {"fits": True, "sentence": "needs 40 GB, 20 GB free: offload, about 2x slower"},
        "pull": None if pull is None else {"state": "running", "fraction": 0.0, "text": "", "error": None, **pull}, **changes,
    }  # fmt: skip


class Backend:
    """What the backend is asked, and what it answers: the entries as they stand."""

    def __init__(self):
        self.asked, self.entries, self.offline = [], [], None

    def tell(self, *entries):
        self.entries = list(entries)
        models.known.take({"entries": self.entries, "folder": "/w", "free": 100 * GB, "offline": self.offline})

    def ask(self, order, then, **values):
        if order == "weights":
            then({"entries": self.entries, "folder": "/w", "free": 100 * GB, "offline": self.offline}, None)
        else:
            self.asked.append((order, values))
            then(next(one for one in self.entries if one["id"] == values["id"]), None)
        return 1


@pytest.fixture
def backend(monkeypatch):
    made = Backend()
    monkeypatch.setattr(models, "known", models.Models())
    monkeypatch.setattr(session.current, "carry_out", made.ask)
    monkeypatch.setattr(session.current, "want_backend", lambda: None)
    monkeypatch.setattr(session.current, "link", object())
    monkeypatch.setattr(session.current, "backend", {**session.current.backend, "state": "running", "remote": False})
    monkeypatch.setattr(panel, "draw_text", lambda layout, context, text, icon="NONE", indent=0.0: layout.label(text=text, icon=icon))
    before = bpy.context.preferences.system.use_online_access
    bpy.context.preferences.system.use_online_access = True
    yield made
    bpy.context.preferences.system.use_online_access = before
    session.current.notices.clear()


def drawn(id):
    layout = Layout()
    models.draw_model(layout, bpy.context, (id,))
    return layout.seen


def words(seen):
    return " | ".join(one for one in seen if isinstance(one, str))


def refused(operator, **given):
    with pytest.raises(RuntimeError) as caught:
        operator(**given)
    return str(caught.value)


@pytest.mark.oldest
def test_each_state_shows_what_it_is_and_what_can_be_done(backend):
    backend.tell(
        entry("missing"), entry("partial", "partial", here=GB), entry("damaged", "damaged", problem="a.safetensors is gone"),
        entry("installed", "installed"), entry("bundled", "bundled"), entry("lost", bundled=True),
    )  # fmt: skip
    assert "Not installed: 5.0 GB, Apache-2.0" in words(drawn("missing")) and ("kiln.get_model", "missing") in drawn("missing")
    assert "about 2x slower" in words(drawn("missing"))
    assert "Partly downloaded" in words(drawn("partial")) and ("kiln.locate_model", "partial") in drawn("partial")
    assert "Damaged" in words(drawn("damaged")) and "a.safetensors is gone" in words(drawn("damaged"))
    for id in ("installed", "bundled"):
        assert not [one for one in drawn(id) if isinstance(one, Button)] and "Apache-2.0" in words(drawn(id))
    assert "Repair" in words(drawn("lost")) and ("kiln.get_model", "lost") not in drawn("lost")
    assert drawn("unheard-of") == [], "nothing before the backend has told of it"


@pytest.mark.oldest
def test_a_download_shows_how_far_it_is_and_can_be_cancelled(backend):
    backend.tell(entry("wan", "partial", pull={"fraction": 0.25, "text": "Wan: 22 GB of 90 GB, 35 MB/s"}))
    seen = drawn("wan")
    assert ("Downloading 25%", 0.25) in seen and "35 MB/s" in words(seen) and ("kiln.cancel_model", "wan") in seen
    assert ("kiln.get_model", "wan") not in seen
    backend.tell(entry("wan", "partial", pull={"state": "waiting"}))
    assert ("Waiting 0%", 0.0) in drawn("wan")


@pytest.mark.oldest
def test_a_failed_download_says_why_and_offers_to_go_on(backend):
    error = {"code": "bad-hash", "message": "a.safetensors is not the right file.", "hint": "Try again."}
    backend.tell(entry("wan", "partial", pull={"state": "failed", "error": error}))
    seen = drawn("wan")
    assert "a.safetensors is not the right file." in words(seen) and "Try again." in words(seen) and ("kiln.get_model", "wan") in seen


@pytest.mark.oldest
def test_a_model_that_needs_another_counts_both(backend):
    backend.tell(entry("base", bytes=90 * GB), entry("lora", bytes=GB, needs=["base"], also=["nickname"]))
    assert "91.0 GB" in words(drawn("nickname")) or "91 GB" in words(drawn("nickname"))
    backend.tell(entry("base", "installed"), entry("lora", bytes=GB, needs=["base"]))
    assert "Not installed: 1.0 GB" in words(drawn("lora"))
    backend.tell(entry("base", "partial", pull={"fraction": 0.5}), entry("lora", needs=["base"]))
    assert ("Downloading 50%", 0.5) in drawn("lora"), "whichever brings it"


@pytest.mark.oldest
def test_before_a_download_everything_is_told(backend):
    licence = {"name": "CC-BY-NC-4.0", "url": "https://example.org/nc", "commercial": "no", "territory": "worldwide"}
    conditions = {
        "name": "Stability",
        "url": "https://example.org/s",
        "commercial": "free below 1 M US$ of revenue",
        "territory": "worldwide",
    }
    backend.tell(entry("nc", licence=licence), entry("gated", licence=conditions, gated=True, pinned=False, needs=["nc"]))
    layout = Layout()
    models.draw_terms(layout, "gated")
    told = words(layout.seen)
    for part in (
        "Nc",
        "Gated",
        "5.0 GB",
        "40 GB (bf16)",
        "CC-BY-NC-4.0",
        "Not allowed",
        "below 1 M US$",
        "Worldwide",
        "HF_TOKEN",
        "10.0 GB to come",
    ):
        assert part in told, f"{part} in {told}"
    assert "https://example.org/nc" in [one.url for one in layout.seen if isinstance(one, Button)]


@pytest.mark.oldest
def test_nothing_is_fetched_without_consent_and_consent_is_passed_on(backend):
    backend.tell(entry("base"), entry("wan", needs=["base"]))
    error = refused(bpy.ops.kiln.get_model, model="wan")
    assert "Apache-2.0 of Base" in error and "Apache-2.0 of Wan" in error and backend.asked == []
    assert bpy.ops.kiln.get_model(model="wan", agree=True) == {"FINISHED"}
    assert backend.asked == [("pull_weights", {"id": "wan", "accept": True, "online": True})]
    backend.tell(entry("base", "installed"), entry("wan", "partial", accepted="2026-01-01", needs=["base"]))
    backend.asked.clear()
    bpy.ops.kiln.get_model(model="wan")
    assert backend.asked == [("pull_weights", {"id": "wan", "accept": False, "online": True})], "agreed to before"


@pytest.mark.oldest
def test_blenders_offline_mode_is_obeyed_and_a_folder_serves(backend, tmp_path):
    backend.tell(entry("wan"))
    bpy.context.preferences.system.use_online_access = False
    assert "Allow Online Access" in refused(bpy.ops.kiln.get_model, model="wan", agree=True) and backend.asked == []
    assert "licence" in refused(bpy.ops.kiln.locate_model, model="wan", filepath=str(tmp_path))
    bpy.ops.kiln.locate_model(model="wan", filepath=str(tmp_path), agree=True)
    assert backend.asked == [("pull_weights", {"id": "wan", "accept": True, "online": False, "source": str(tmp_path)})]


def test_a_backend_that_may_not_go_online_says_so(backend):
    backend.offline = {"code": "offline", "message": "KILN_OFFLINE is set, so Kiln fetches nothing.", "hint": "Unset it."}
    backend.tell(entry("wan"))
    assert "KILN_OFFLINE" in refused(bpy.ops.kiln.get_model, model="wan", agree=True) and backend.asked == []


def test_a_file_stands_for_its_folder_and_a_zip_for_itself(backend, tmp_path):
    backend.tell(entry("wan"))
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "bundle.zip").write_bytes(b"")
    for name, source in (("model.safetensors", tmp_path), ("bundle.zip", tmp_path / "bundle.zip")):
        bpy.ops.kiln.locate_model(model="wan", filepath=str(tmp_path / name), agree=True)
        assert backend.asked.pop()[1]["source"] == str(source)
    assert "no" in refused(bpy.ops.kiln.locate_model, model="wan", filepath=str(tmp_path / "nothing"), agree=True)
    session.current.backend["remote"] = True
    assert "another one" in refused(bpy.ops.kiln.locate_model, model="wan", filepath=str(tmp_path), agree=True)


@pytest.mark.oldest
def test_cancel_and_remove_reach_the_backend(backend):
    backend.tell(entry("base", "partial", pull={}), entry("wan", needs=["base"]))
    bpy.ops.kiln.cancel_model(model="wan")
    assert backend.asked == [("cancel_weights", {"id": "base"})]
    bpy.ops.kiln.remove_model("EXEC_DEFAULT", model="base")
    assert backend.asked[-1] == ("remove_weights", {"id": "base"})
    assert "no model 'nonsense'" in refused(bpy.ops.kiln.cancel_model, model="nonsense")


def test_the_backend_is_asked_only_while_somebody_looks_or_something_comes(backend):
    known = models.known
    known.link = session.current.link
    assert not known.due(), "nobody looks"
    known.seen = time.monotonic()
    assert known.due()
    known.refresh()
    assert not known.due(), "just asked"
    backend.tell(entry("wan", "partial", pull={}))
    known.asked, known.seen = time.monotonic() - 1.0, 0.0
    assert known.due(), "a download is followed even where nobody looks"
    session.current.backend["state"] = "stopped"
    assert not known.due()
    session.current.backend["state"] = "running"
    session.current.link = object()
    known.seen = time.monotonic()
    assert known.due() and known.entries == {}, "another backend has other models"


@pytest.mark.oldest
def test_the_panel_lists_all_with_their_details(backend):
    backend.tell(entry("wan"), entry("tiny", "bundled", gated=False), entry("sv3d", "installed", gated=True, pinned=False))
    layout = Layout()
    stand_in = type("Panel", (), {"layout": layout, "draw_details": staticmethod(models.KILN_PT_models.draw_details)})()
    models.KILN_PT_models.draw(stand_in, bpy.context)
    told = words(layout.seen)
    assert "What wan is for." in told and "Commercial: Allowed" in told and "Territory: Worldwide" in told
    buttons = [(one.id, one.model) for one in layout.seen if isinstance(one, Button)]
    assert ("kiln.get_model", "wan") in buttons and ("kiln.remove_model", "sv3d") in buttons
    assert ("kiln.remove_model", "wan") not in buttons and ("kiln.remove_model", "tiny") not in buttons
