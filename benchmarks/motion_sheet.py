# environment: backend
"""The second half of a moving demo, in the backend's environment: scores the delivered animation and draws strips of source above result.

Reads what benchmarks/demo_motion.py left in its folder; completes `report.json` and writes `strip.png`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image

from backend.mesh.measure import compare, tracking
from benchmarks.contact_sheet import sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scratch", type=Path, required=True, help="tracks.npz and pictures of source and imported result")
    a = parser.parse_args()
    report = json.loads((a.out / "report.json").read_text(encoding="utf-8"))
    with np.load(a.scratch / "tracks.npz") as given:
        true, true_faces, made, faces = (given[name] for name in ("true", "true_faces", "made", "faces"))
    rest = report["frames"].index(report["rest_frame"])
    report |= scores(made, faces, true, true_faces, rest)
    (a.out / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    shown = range(len(list(a.scratch.glob("source_*"))))
    views = sorted(path.name for path in (a.scratch / "source_0").glob("color_*.png"))
    best = max(views, key=lambda view: sum(cover(a.scratch / f"source_{number}" / view) for number in shown))
    rows = [(name, [picture(a.scratch / f"{name}_{number}" / best) for number in shown]) for name in ("source", "result")]
    sheet(rows).save(a.out / "strip.png")
    print_report(report)


def scores(made: np.ndarray, faces: np.ndarray, true: np.ndarray, true_faces: np.ndarray, rest: int) -> dict[str, float]:
    """Means over frames of the surface's scores (measure.score); how far true points and the mesh's own stray apart; the fastest vertices.

    tracking_error: mean over points and frames, tracking_error_95: the 95th percentile, in units of the diagonal at rest. fastest: the
    mesh's fastest vertex between two frames by the source's.
    """
    frames = []
    for ours, theirs in zip(made, true, strict=True):
        pair = [trimesh.Trimesh(points, triangles, process=False) for points, triangles in ((ours, faces), (theirs, true_faces))]
        for mesh in pair:
            mesh.merge_vertices(merge_tex=True, merge_norm=True)
        frames.append(compare(*pair))
    strayed = tracking(made, faces, true, true_faces, rest)
    speed = [float(np.linalg.norm(np.diff(vertices, axis=0), axis=-1).max()) for vertices in (made, true)]
    found = {name: float(np.mean([frame[name] for frame in frames])) for name in ("f1", "f05", "chamfer")}
    found |= {"f1_worst": min(float(frame["f1"]) for frame in frames)}
    found |= {
        "tracking_error": float(strayed.mean()),
        "tracking_error_95": float(np.percentile(strayed, 95)),
        "fastest": speed[0] / speed[1],
    }
    return {name: round(value, 5) for name, value in found.items()}


def cover(path: Path) -> float:
    """How much of a picture its subject fills."""
    return float(np.asarray(Image.open(path).getchannel("A"), np.float32).mean())


def picture(path: Path) -> np.ndarray:
    pixels = np.asarray(Image.open(path).convert("RGBA"), np.float32) / 255
    return pixels[..., :3] * pixels[..., 3:] + 0.22 * (1 - pixels[..., 3:])


def decibels(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f} dB"


def print_report(report: dict) -> None:
    r = report
    seconds = "  ".join(f"{name} {value:.1f}" for name, value in r["seconds"].items())
    print(f"""
held-out PSNR   splats {decibels(r["splats_psnr"])}   shape keys {decibels(r["mesh_psnr"])}   armature {decibels(r["armature_psnr"])}
change          {decibels(r["flicker"])} between frames, against the source's
surface         Chamfer {r["chamfer"]:.5f}   F-score {r["f1"]:.3f} at 1%, worst frame {r["f1_worst"]:.3f}   {r["f05"]:.3f} at 0.5%
tracking        mean {r["tracking_error"]:.2%}   95th percentile {r["tracking_error_95"]:.2%}   fastest {r["fastest"]:.2f} x the source's
armature        {r["bones"]} bones   mean vertex error {r["armature_error"]:.3%} of the diagonal
mesh            {r["faces"]} faces   {len(r["frames"])} frames   splats {r["splats"]}   peak memory {(r["peak_memory"] or 0) / 1e9:.2f} GB
seconds         {seconds}   from button to imported asset {r["total_seconds"]:.1f}
""")


if __name__ == "__main__":
    main()
