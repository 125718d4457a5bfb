"""index.html: what it shows of a report, that nothing in names or errors can break it, and that it needs nothing from elsewhere."""

import os
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image

from backend.batch import items, report


class Page(HTMLParser):
    """The links, pictures, texts and cards of a page; every tag must close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.words, self.cards = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [found[name] for name in ("src", "href") if name in found]
        if tag == "article":
            self.cards.append(found)
        if tag not in ("meta", "img", "input", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


def item(name, state="done", **more):
    return {
        "name": name, "file": f"/props/{name}.glb", "object": "", "recipe": "reconstruct", "preset": "draft", "state": state, "stage": "",
        "fraction": 1.0, "text": "", "attempts": 1, "error": None, "warnings": [], "notes": [], "folder": "", "seconds": {}, "figures": {},
        "earlier": False, **more,
    }  # fmt: skip


def told(out, items, state="done", **more):
    for one in items:
        one["folder"] = str(out / one["name"])
    found = {"error": None, "library": None, "items": items, **more}
    return {**report.head(state, 0.0, None, out, "/props/<b>list.toml"), **found, "updated": 700.0}


@pytest.fixture
def out(tmp_path):
    (tmp_path / "a b#").mkdir()
    (tmp_path / "a b#" / "mesh.glb").write_bytes(b"")
    for which in ("source", "result"):
        picture = tmp_path / f"{which}.png"
        Image.new("RGBA", (1200, 900)).save(picture)
        report.thumbnail(picture, tmp_path, "a b#", which)
    return tmp_path


@pytest.mark.parametrize("place", [".", ".work/.shards/3-of-20"])
def test_everything_that_is_shown_lies_beside_it(out, place):
    folder = out / place
    folder.mkdir(parents=True, exist_ok=True)
    page = Page(report.page(told(out, [item("a b#"), item("c")]), folder))
    assert len(page.links) == 3  # two thumbnails and the GLB; what is not there is not linked
    for link in page.links:
        assert not urlsplit(link).scheme and not urlsplit(link).netloc and (folder / unquote(link)).is_file()
    assert Image.open(out / "thumbnails" / "a b#.source.png").size == (320, 240)


def test_totals_failures_and_figures(out):
    broken = {"code": "bad-file", "message": 'It is <i>"broken" & torn</i>.', "hint": "Export it again."}
    items = [
        item(
            "fine",
            figures={"faces": 12345, "mesh_psnr": 31.26, "glb_bytes": 1_250_000},
            seconds={"capture": 30.0, "compute": 70.0, "queue": 500.0},
        ),
        item("poor", figures={"faces": 10, "mesh_psnr": 19.0}),
        item("warned", warnings=["It has two clips."], notes=["The fit ran on the CPU."]),
        item("broken", "failed", error=broken),
        item("later", "waiting"),
    ]  # fmt: skip
    page = Page(report.page(told(out, items), out))
    words = " ".join(" ".join(page.words).split())
    for shown in (
        "3 done",
        "1 failed",
        "1 to do",
        "1 below 25 dB",
        "1 with warnings",
        "Finished",
        "after 12 min",
        "<b>list.toml",
    ):
        assert shown in words, shown
    for shown in (
        'It is <i>"broken" & torn</i>.',
        "Export it again.",
        "12 345 faces",
        "31.3 dB alike",
        "1.2 MB",
        "2 min",
        "It has two clips.",
    ):
        assert shown in words, shown
    assert words.index("What went wrong") < words.index("fine") and [card["data-name"] for card in page.cards] == [
        "fine",
        "poor",
        "warned",
        "later",
    ]
    assert [card["data-kind"] for card in page.cards] == ["fine", "look", "look", "fine"]


def test_a_run_that_broke_off_says_why(out):
    error = {"code": "no-space", "message": "The disk is full.", "hint": "Free some space."}
    library = {"file": "x.blend", "assets": 0, "error": {"code": "bad-file", "message": "The library is damaged.", "hint": ""}}
    words = " ".join(Page(report.page(told(out, [item("a", "waiting")], "failed", error=error, library=library), out)).words)
    assert "Broken off" in words and "The disk is full. Free some space." in words and "The library is damaged." in words
    assert 'http-equiv="refresh"' in report.page(told(out, [item("a", "computing")], "running"), out)


def test_a_picture_that_cannot_be_read_has_no_thumbnail(tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    for source in (tmp_path / "torn.png", tmp_path / "gone.png", None):
        report.thumbnail(source, tmp_path, "a", "source")
    assert not (tmp_path / "thumbnails").exists()


@pytest.mark.parametrize("seconds, text", [(0, "0 s"), (89, "89 s"), (91, "2 min"), (5399, "1 h 30 min"), (3600 * 26, "26 h 00 min")])
def test_durations_for_people(seconds, text):
    assert report.duration(seconds) == text


def test_figures_come_from_the_result(tmp_path):
    assert report.figures_of(tmp_path) == ({}, [])
    (tmp_path / "report.json").write_text('{"faces": 5, "mesh_psnr": null, "versions": {}, "warnings": ["Look."]}')
    (tmp_path / "mesh.glb").write_bytes(bytes(7))
    assert report.figures_of(tmp_path) == ({"faces": 5, "glb_bytes": 7}, ["Look."])
    assert report.picture_among({"b.npz": Path("b.npz"), "view_1.png": Path("x.png")}) == Path("x.png")


@pytest.mark.skipif(os.name != "posix", reason="modes")
def test_whoever_may_read_the_users_files_may_read_the_report(tmp_path):
    (tmp_path / "ordinary").touch()
    items.write_text(tmp_path / "index.html", "<p>")
    assert (tmp_path / "index.html").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
