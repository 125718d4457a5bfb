# environment: backend
"""The demo's second half, in the backend's environment: scores the delivered files and draws source, splats and imported mesh side by side.

Reads what benchmarks/demo.py left in its folder; completes `report.json` and writes `contact_sheet.png`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from backend.mesh.measure import psnr, score
from backend.splats import ply
from backend.splats.render import render
from backend.views.views import Views, load

PAPER = 0.22  # grey behind the subject
COLUMNS = 6
WIDEST = 320  # pixels of a picture on the sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--views", type=Path, required=True, help="the captured views, transforms.json and all")
    parser.add_argument("--imported", type=Path, required=True, help="the imported mesh from the same held-out cameras")
    parser.add_argument("--source", type=Path, required=True, help="the source's mesh, for scoring alone")
    a = parser.parse_args()
    report = json.loads((a.out / "report.json").read_text(encoding="utf-8"))
    source, imported = load(a.views), load(a.imported)
    delivered = ply.load(a.out / "splats.ply")
    means = ((delivered.means - source.frame.centre) * source.frame.scale).astype(np.float32)
    splats = dataclasses.replace(delivered, means=means, log_scales=delivered.log_scales + np.float32(np.log(source.frame.scale)))
    held = np.flatnonzero(source.holdout)
    rows: dict[str, list[np.ndarray]] = {"source": [], "splats": [], "mesh": []}
    black: dict[str, list[float]] = {"splats": [], "mesh": []}
    white: dict[str, list[float]] = {"splats": [], "mesh": []}
    for index in held:
        splatted = render(splats, source.cameras[index])
        pictures = {
            "source": (source.images[index] * source.alpha[index][..., None], source.alpha[index]),
            "splats": (splatted.color, splatted.alpha),
            "mesh": (imported.images[index] * imported.alpha[index][..., None], imported.alpha[index]),
        }
        truth, cover = pictures["source"]
        for name, (color, alpha) in pictures.items():
            if len(rows[name]) < COLUMNS:
                rows[name].append(color + PAPER * (1 - alpha[..., None]))
            if name != "source":
                black[name].append(psnr(color, truth))
                white[name].append(psnr(color + 1 - alpha[..., None], truth + 1 - cover[..., None]))
    for name in black:
        report[f"{name}_psnr"] = round(float(np.mean(black[name])), 3)
        report[f"{name}_psnr_white"] = round(float(np.mean(white[name])), 3)
    report |= map_errors(source.for_scoring, imported.for_scoring) | score(a.out / "mesh.glb", a.source)
    (a.out / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    titles = {
        "source": "Source, from cameras that no step had seen",
        "splats": f"Splats, {report['splats_psnr']:.1f} dB",
        "mesh": f"Imported mesh, {report['mesh_psnr']:.1f} dB, {report['faces']:,} faces",
    }
    sheet([(titles[name], row) for name, row in rows.items()]).save(a.out / "contact_sheet.png", optimize=True)
    print_report(report)


def map_errors(source: Views, imported: Views) -> dict[str, float]:
    """Mean errors of what Blender shows of the imported mesh's maps, on held-out pixels whose centre shows the same surface in both."""
    if source.depth is None or imported.depth is None or source.normals is None or imported.normals is None:
        return {}
    close = np.abs(source.depth - imported.depth) < 0.02  # of the radius of what the cameras see whole
    both = (source.depth > 0) & (imported.depth > 0) & close
    cosine = (source.normals.astype(np.float32) * imported.normals).sum(-1)[both]
    errors = {"normal_error": float(np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean())}
    if source.material is not None and imported.material is not None:
        off = np.abs(source.material.astype(np.float32) - imported.material)[both].mean(0) / 255
        errors |= {"roughness_error": float(off[0]), "metallic_error": float(off[1]), "opacity_error": float(off[2])}
    return {name: round(value, 4) for name, value in errors.items()}


def sheet(rows: list[tuple[str, list[np.ndarray]]]) -> Image.Image:
    """One labelled row for each entry."""
    height, width = rows[0][1][0].shape[:2]
    height, width = round(height * min(1, WIDEST / width)), min(width, WIDEST)
    band = max(20, width // 11)
    picture = Image.new("RGB", (width * len(rows[0][1]), (height + band) * len(rows)), (30, 30, 30))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=band * 0.55)
    for number, (name, row) in enumerate(rows):
        top = number * (height + band)
        draw.text((band / 3, top + band / 2), name, fill=(230, 230, 230), font=font, anchor="lm")
        for column, image in enumerate(row):
            pixels = Image.fromarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8))
            picture.paste(pixels.resize((width, height), Image.Resampling.LANCZOS), (column * width, top + band))
    return picture


def print_report(report: dict) -> None:
    seconds = "  ".join(f"{name} {value:.1f}" for name, value in report["seconds"].items())
    maps = f"normals {report['normal_error']:.1f} degrees" if "normal_error" in report else "none"
    for name in ("roughness", "metallic"):
        if f"{name}_error" in report:
            maps += f"   {name} {report[f'{name}_error']:.4f}"
    print(f"""
held-out PSNR   splats {report["splats_psnr"]:.2f} dB   textured mesh {report["mesh_psnr"]:.2f} dB   (black background)
                splats {report["splats_psnr_white"]:.2f} dB   textured mesh {report["mesh_psnr_white"]:.2f} dB   (white background)
surface         Chamfer {report["chamfer"]:.5f}   F-score {report["f1"]:.3f} at 1%   {report["f05"]:.3f} at 0.5% of the diagonal
mesh            {report["faces"]} faces   closed: {"yes" if report["watertight"] else "no"}   hidden area {report["hidden"]:.1%}
maps            {maps}
splats          {report["splats"]}   peak memory {report["peak_memory"] / 1e9:.2f} GB
seconds         {seconds}   from button to imported asset {report["total_seconds"]:.1f}
""")


if __name__ == "__main__":
    main()
