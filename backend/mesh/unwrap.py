"""UV charts, cut and packed by xatlas."""

from __future__ import annotations

import numpy as np
import xatlas
from jaxtyping import Float, Int

from backend.mesh.mesh import Mesh
from protocol.errors import KilnError

MAX_COST = 8.0  # xatlas' price of a chart; its default of 2 cuts smooth surfaces into more charts


def unwrap(mesh: Mesh, size: int, padding: int) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n 2"], Int[np.ndarray, "f 3"]]:
    """Charts for a texture of size x size pixels, at least about `padding` pixels apart.

    Returns, for each vertex of the cut mesh, the vertex of `mesh` that it came from and its place in the texture ([0, 1], origin at the
    lower left), and the faces of the cut mesh in the order of `mesh.faces`.
    """
    # xatlas drops faces that are small in absolute terms: give it the mesh at a size of its liking
    points = mesh.vertices.astype(np.float64)
    extent = float(np.ptp(points, axis=0).max())
    if not np.isfinite(points).all() or extent == 0:
        raise KilnError("no-surface", "The surface has no extent, or vertices that are not numbers.", "Extract it again with another grid.")
    atlas = xatlas.Atlas()
    atlas.add_mesh(((points - points.min(0)) * (10 / extent)).astype(np.float32), mesh.faces.astype(np.uint32))
    charts, pack = xatlas.ChartOptions(), xatlas.PackOptions()
    charts.max_cost = MAX_COST
    pack.resolution, pack.padding, pack.bilinear, pack.blockAlign = size, padding + 1, True, False
    pack.rotate_charts = True
    atlas.generate(charts, pack)
    source, faces, uv = atlas[0]
    # xatlas packs to about the asked size; one scale for both sides keeps texels square
    scale = np.array([atlas.width, atlas.height], np.float64) / max(atlas.width, atlas.height)
    return source.astype(np.int64), np.clip(uv * scale, 0, 1).astype(np.float32), faces.astype(np.int32)
