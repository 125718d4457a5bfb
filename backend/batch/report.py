"""What a batch came to, for programs (OUT/report.json) and for people (OUT/index.html, one page with pictures that works from the disk)."""

from __future__ import annotations

import contextlib
import html
import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from backend.batch import items
from backend.disk import size_text
from protocol import VERSION, picture

FIGURES = (
    "faces", "splats", "mesh_psnr", "splats_psnr", "normal_error", "roughness_error", "metallic_error", "charts", "texels_seen", "frames",
    "holdout_views", "bones", "armature_psnr", "game",
)  # fmt: skip
WRITE_SECONDS = 1.0  # between two versions of report.json
PAGE_SECONDS = 5.0  # and of index.html
SIDE = 320  # pixels of a thumbnail
LOW_PSNR = 25.0  # dB on held-out views: below, somebody should look at it
THUMBNAILS = "thumbnails"


class Writer:
    """Writes both reports into a folder, no more often than somebody can read."""

    def __init__(self, out: Path):
        self._out = out
        self._written = self._paged = -math.inf
        self._shown: list[str] = []

    def is_due(self) -> bool:
        return time.monotonic() >= self._written + WRITE_SECONDS

    def write(self, told: dict[str, Any], last: bool = False) -> None:
        now = time.monotonic()
        self._written = now
        items.write_json(self._out / "report.json", told)
        states = [item["state"] for item in told["items"]]
        if last or now >= self._paged + PAGE_SECONDS and states != self._shown:
            self._paged, self._shown = now, states
            items.write_text(self._out / "index.html", page(told, self._out))


def head(state: str, begun: float, seconds_left: float | None, out: Path, manifest: str) -> dict[str, Any]:
    """What report.json says of the whole run."""
    return {
        "kiln": VERSION, "state": state, "pid": os.getpid(), "begun": begun, "updated": time.time(), "seconds_left": seconds_left,
        "out": str(out), "manifest": manifest,
    }  # fmt: skip


def figures_of(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The figures of a result that people compare, and its warnings: from its report.json."""
    try:
        told = json.loads((folder / "report.json").read_bytes())
    except (OSError, ValueError):
        return {}, []
    found = {name: told[name] for name in FIGURES if told.get(name) is not None}
    with contextlib.suppress(OSError):
        found["glb_bytes"] = (folder / "mesh.glb").stat().st_size
    return found, [str(text) for text in told.get("warnings", ())]


def thumbnail(source: Path | None, out: Path, name: str, which: str, columns: int = 0) -> None:
    """A small copy of a picture as OUT/thumbnails/<name>.<which>.png; a picture that cannot be read has none. columns: of a sheet of square
    pictures, of which the first is taken."""
    if source is None:
        return
    from PIL import Image

    target = out / THUMBNAILS / f"{name}.{which}.png"
    with contextlib.suppress(OSError, ValueError, Image.DecompressionBombError), Image.open(source) as opened:
        image: Image.Image = opened
        if columns:
            image = image.crop((0, 0, image.width // columns, image.width // columns))
        image.thumbnail((SIDE, SIDE))
        target.parent.mkdir(parents=True, exist_ok=True)
        image.convert("RGBA").save(target)


def picture_among(inputs: dict[str, Path]) -> Path | None:
    """The first picture of a job's inputs."""
    return next((file for name, file in sorted(inputs.items()) if name.lower().endswith(picture.SUFFIXES)), None)


def spent(seconds: dict[str, float]) -> float:
    """Of an item: what its capture and its job took, without the wait in between."""
    return seconds.get("capture", 0.0) + seconds.get("compute", 0.0)


def duration(seconds: float) -> str:
    """For people: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


# -- The page --------------------------------------------------------------------------------------------------------------------------


def page(told: dict[str, Any], folder: Path) -> str:
    """index.html of a report: totals, what went wrong and what to do, then every item with its source and its result. folder: where the
    page will lie, which for a shard is not the folder of results; its links are relative to it."""
    way = quote(Path(os.path.relpath(told["out"], folder)).as_posix())
    found = told["items"]
    counts = {state: sum(item["state"] == state for item in found) for state in ("done", "failed", "cancelled")}
    warned = sum(bool(item["warnings"]) for item in found if item["state"] == "done")
    low = sum(_is_low(item) for item in found)
    open_items = len(found) - sum(counts.values())
    tiles = [
        ("good", counts["done"], "done"), ("bad", counts["failed"], "failed"), ("plain", counts["cancelled"], "cancelled"),
        ("plain", open_items, "to do"), ("look", low, f"below {LOW_PSNR:.0f} dB"), ("look", warned, "with warnings"),
    ]  # fmt: skip
    shown = "".join(f'<div class="tile {kind}"><b>{count}</b>{label}</div>' for kind, count, label in tiles if count or label == "done")
    wrong = [item for item in found if item["state"] in ("failed", "cancelled")]
    seconds = told["updated"] - told["begun"]
    state = {"running": "At work", "done": "Finished", "cancelled": "Cancelled", "failed": "Broken off"}[told["state"]]
    left = f", about {duration(told['seconds_left'])} left" if told["seconds_left"] else ""
    words = (
        f"{state} {time.strftime('%Y-%m-%d %H:%M', time.localtime(told['updated']))} after {duration(seconds)}{left}. Kiln {told['kiln']}."
    )
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=_text(Path(told["manifest"]).name),
        refresh='<meta http-equiv="refresh" content="5">' if told["state"] == "running" else "",
        words=_text(words),
        tiles=shown,
        trouble=_trouble(told),
        failures=_failures(wrong) if wrong else "",
        cards="".join(_card(number, item, way) for number, item in enumerate(found) if item["state"] != "failed"),
    )


def _trouble(told: dict[str, Any]) -> str:
    """What ended the whole run, or kept the library from being written."""
    errors = [told.get("error"), (told.get("library") or {}).get("error")]
    return "".join(f'<p class="trouble">{_text(error["message"])} {_text(error["hint"])}</p>' for error in errors if error)


def _failures(wrong: Iterable[dict[str, Any]]) -> str:
    rows = "".join(
        f"<tr><th>{_text(item['name'])}<small>{_text(Path(item['file']).name)}</small></th>"
        f"<td>{_text((item['error'] or {}).get('message', item['state']))}</td><td>{_text((item['error'] or {}).get('hint', ''))}</td></tr>"
        for item in wrong
    )
    return (
        '<section><h2>What went wrong</h2><div class="scroll"><table>'
        "<thead><tr><th>Item</th><th>Reason</th><th>What to do</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div><p>Once mended, the same command does these alone: an item whose file or parameters have"
        " changed is made anew, and <code>--retry-failed</code> tries the others again.</p></section>"
    )


def _card(number: int, item: dict[str, Any], way: str) -> str:
    """way: from the page to the folder of results, as a relative address."""
    figures, seconds, name = item["figures"], spent(item["seconds"]), item["name"]
    psnr = figures.get("mesh_psnr")
    facts = [
        (f"{psnr:.1f} dB", '<abbr title="PSNR of the mesh on views that the fit had not seen">alike</abbr>') if psnr is not None else None,
        (f"{figures['faces']:,}".replace(",", "\u202f"), "faces") if figures.get("faces") else None,
        (size_text(figures["glb_bytes"]), "") if figures.get("glb_bytes") else None,
        (duration(seconds), "") if seconds else None,
    ]
    origin = (Path(item["file"]).name, item["object"], f"{item['recipe']}, {item['preset']}")
    kind = "look" if item["warnings"] or _is_low(item) else "fine"
    states = {"done": "", "waiting": "waits", "cancelled": "cancelled"}
    state = states.get(item["state"], f"{item['stage'] or item['state']} {100 * item['fraction']:.0f}%")
    links = ""
    if item["state"] == "done":
        files = {
            "mesh.glb": "GLB", "game.glb": "game GLB", f"{name}.fbx": "FBX", "comparison.png": "comparison", "report.json": "figures",
        }  # fmt: skip
        there = {file: label for file, label in files.items() if (Path(item["folder"]) / file).is_file()}
        links = " ".join(f'<a href="{way}/{quote(name)}/{quote(file)}">{label}</a>' for file, label in there.items())
    warnings = "".join(f"<li>{_text(text)}</li>" for text in item["warnings"])
    notes = "".join(f"<p>{_text(text)}</p>" for text in item["notes"])
    low = f'<li class="low">{psnr:.1f} dB on views that the fit had not seen: compare the pictures.</li>' if _is_low(item) else ""
    return (
        f'<article class="{kind}" data-name="{_text(name.lower())}" data-number="{number}" data-seconds="{seconds:.0f}"'
        f' data-faces="{figures.get("faces", 0)}" data-psnr="{psnr if psnr is not None else 999:.2f}" data-kind="{kind}">'
        f'<div class="pair">{_picture(item, "source", way)}{_picture(item, "result", way)}</div><h3>{_text(name)}</h3>'
        f'<p class="from">{_text(" · ".join(filter(None, origin)))}</p>'
        f'<p class="facts">{"".join(f"<span><b>{value}</b> {unit}</span>" for value, unit in filter(None, facts))}'
        f"{f'<em>{_text(state)}</em>' if state else ''}</p>"
        f"{f'<ul>{low}{warnings}</ul>' if warnings or low else ''}{f'<details><summary>Notes</summary>{notes}</details>' if notes else ''}"
        f'<p class="links">{links}</p></article>'
    )


def _picture(item: dict[str, Any], which: str, way: str) -> str:
    path = Path(item["folder"]).parent / THUMBNAILS / f"{item['name']}.{which}.png"
    if not path.exists() or which == "result" and item["state"] != "done":
        return f'<figure class="none"><figcaption>{which}</figcaption></figure>'
    place = f"{way}/{THUMBNAILS}/{quote(path.name)}"
    return f'<figure><img src="{place}" alt="{which} of {_text(item["name"])}" loading="lazy"><figcaption>{which}</figcaption></figure>'


def _is_low(item: dict[str, Any]) -> bool:
    return item["state"] == "done" and item["figures"].get("mesh_psnr", 99.0) < LOW_PSNR


def _text(text: Any) -> str:
    return html.escape(str(text))
