"""UV charts, cut and packed by xatlas.

xatlas holds the GIL for as long as it works, half a minute for a large mesh: it runs in a process of its own, so that this one stays
alive to report and to be cancelled. Large meshes are split in space first, as the time grows faster than the number of faces.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import xatlas
from jaxtyping import Float, Int

from backend.mesh.mesh import Mesh
from backend.progress import Progress, silent
from protocol.errors import KilnError

MAX_COST = 8.0  # xatlas' price of a chart; its default of 2 cuts smooth surfaces into more charts
WHOLE = 25_000  # faces up to which a mesh is cut into charts as a whole, in a few seconds
PART = 5_000  # faces of a larger mesh that are cut together: each border between parts is a seam, but the time stays in proportion
FACES_A_SECOND = 5_000  # about, for the progress alone


def unwrap(
    mesh: Mesh, size: int, padding: int, progress: Progress = silent
) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n 2"], Int[np.ndarray, "f 3"]]:
    """Charts for a texture of size x size pixels, at least about `padding` pixels apart.

    Returns, for each vertex of the cut mesh, the vertex of `mesh` that it came from and its place in the texture ([0, 1], origin at the
    lower left), and the faces of the cut mesh in the order of `mesh.faces`.
    """
    # xatlas drops faces that are small in absolute terms: give it the mesh at a size of its liking
    points = mesh.vertices.astype(np.float64)
    extent = float(np.ptp(points, axis=0).max())
    if not np.isfinite(points).all() or extent == 0:
        raise KilnError("no-surface", "The surface has no extent, or vertices that are not numbers.", "Extract it again with another grid.")
    points = ((points - points.min(0)) * (10 / extent)).astype(np.float32)
    with tempfile.TemporaryDirectory(prefix="kiln-") as folder:
        given, cut, said = Path(folder, "given.npz"), Path(folder, "cut.npz"), Path(folder, "said.txt")
        np.savez(given, points=points, faces=mesh.faces, size=size, padding=padding)
        with said.open("wb") as log:
            command = [sys.executable, "-m", "backend.mesh.unwrap", str(given), str(cut)]
            process = subprocess.Popen(
                command,
                cwd=Path(__file__).parents[2],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),  # Windows: no console flashes up
            )
            started = time.monotonic()
            try:
                while process.poll() is None:
                    progress(1 - math.exp(-(time.monotonic() - started) * FACES_A_SECOND / len(mesh.faces)))
                    try:
                        process.wait(0.3)
                    except subprocess.TimeoutExpired:
                        pass
            finally:  # also when `progress` raised Cancelled
                if process.poll() is None:
                    process.kill()
                process.wait()
        if process.returncode != 0:
            last = said.read_text(errors="replace").strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
            raise KilnError("internal", f"Cutting the surface into charts failed: {last[0]}.", "Try fewer faces (surface.faces).")
        with np.load(cut, allow_pickle=False) as arrays:
            return arrays["source"], arrays["uv"], arrays["faces"]


def _parts(centres: Float[np.ndarray, "f 3"], faces: Int[np.ndarray, "f"]) -> list[Int[np.ndarray, "p"]]:
    """Faces in groups of at most PART that lie together: halved across the longest side until they fit."""
    if len(faces) <= PART:
        return [np.sort(faces)]
    axis = int(np.ptp(centres[faces], axis=0).argmax())
    order = faces[np.argsort(centres[faces, axis], kind="stable")]
    return _parts(centres, order[: len(order) // 2]) + _parts(centres, order[len(order) // 2 :])


def _cut(points: Float[np.ndarray, "n 3"], triangles: Int[np.ndarray, "f 3"], size: int, padding: int):
    atlas = xatlas.Atlas()
    everything = np.arange(len(triangles))
    parts = [everything] if len(triangles) <= WHOLE else _parts(points[triangles].mean(1), everything)
    used = []
    for part in parts:
        own, index = np.unique(triangles[part], return_inverse=True)
        used.append(own)
        atlas.add_mesh(points[own], index.reshape(-1, 3).astype(np.uint32))
    charts, pack = xatlas.ChartOptions(), xatlas.PackOptions()
    charts.max_cost = MAX_COST
    pack.resolution, pack.padding, pack.bilinear, pack.blockAlign = size, padding + 1, True, False
    pack.rotate_charts = True
    atlas.generate(charts, pack)
    sources, places, faces, count = [], [], np.empty((len(triangles), 3), np.int32), 0
    for number, (part, own) in enumerate(zip(parts, used, strict=True)):
        source, cut, uv = atlas[number]
        sources.append(own[source])
        places.append(uv)
        faces[part] = cut.astype(np.int64) + count
        count += len(source)
    # xatlas packs to about the asked size; one scale for both sides keeps texels square
    scale = np.array([atlas.width, atlas.height], np.float64) / max(atlas.width, atlas.height)
    return np.concatenate(sources).astype(np.int64), np.clip(np.concatenate(places) * scale, 0, 1).astype(np.float32), faces


if __name__ == "__main__":
    with np.load(sys.argv[1], allow_pickle=False) as arrays:
        source, uv, faces = _cut(arrays["points"], arrays["faces"], int(arrays["size"]), int(arrays["padding"]))
    np.savez(sys.argv[2], source=source, uv=uv, faces=faces)
