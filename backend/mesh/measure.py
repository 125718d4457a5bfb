"""How good a result is: PSNR of pictures, and scores of a mesh against its source on the surface that can be seen from outside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import trimesh
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from backend.mesh import raster
from backend.mesh.mesh import Mesh, TexturedMesh
from backend.views.cameras import look_at
from protocol.errors import KilnError

SAMPLES = 200_000  # surface points a mesh
TRACKED = 5000  # points that are followed through time
CAMERAS = 100  # around the mesh; what none of them sees counts as hidden
PIXELS = 512
CEILING = 100.0  # dB: infinity has no place in JSON, nor in a mean


def psnr(a: Float[np.ndarray, "h w 3"], b: Float[np.ndarray, "h w 3"]) -> float:
    """Peak signal-to-noise ratio in dB over all pixels and channels, peak 1; at most CEILING, which equal pictures get."""
    error = float(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))
    return CEILING if error == 0 else min(CEILING, float(-10 * np.log10(error)))


def charts(mesh: TexturedMesh) -> tuple[int, float]:
    """How many UV charts there are, and the share of the texture's pixels whose centres they cover."""
    ends = mesh.faces[:, [0, 1, 1, 2]].reshape(-1, 2)
    graph = coo_matrix((np.ones(len(ends), bool), ends.T), shape=(len(mesh.vertices), len(mesh.vertices)))
    label = connected_components(graph, directed=False)[1]
    height, width = mesh.base_color.shape[:2]
    screen = np.stack([mesh.uv[:, 0].astype(np.float64) * width, (1 - mesh.uv[:, 1].astype(np.float64)) * height], 1)
    covered = raster.z_buffer(screen, np.ones(len(screen)), mesh.faces, width, height)[1] >= 0
    return len(np.unique(label[mesh.faces[:, 0]])), float(covered.mean())


def angle(a: Float[np.ndarray, "n 3"], b: Float[np.ndarray, "n 3"]) -> float:
    """Mean angle between directions of any length, degrees."""
    cosine = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean())


def score(mesh_path: Path | str, source_path: Path | str) -> dict[str, float | int | bool]:
    """Scores of a mesh file against its source file, both in one frame and scale.

    f1, f05: F-score of points within 1 % and 0.5 % of the source's bounding-box diagonal; precision05, recall05: its two parts.
    chamfer: mean of the two mean distances over the diagonal. hidden, source_hidden: share of the area that no camera outside sees.
    watertight: every edge between two faces once seam vertices are merged. bounds_error: largest difference of the bounding boxes over
    the diagonal.
    """
    return compare(_load(mesh_path), _load(source_path))


def compare(result: trimesh.Trimesh, source: trimesh.Trimesh) -> dict[str, float | int | bool]:
    """What `score` says of two meshes whose seam vertices are merged."""
    diagonal = float(np.linalg.norm(source.extents))
    of_source, source_hidden = _visible_points(source)
    of_result, hidden = _visible_points(result)
    to_source = cKDTree(of_source).query(of_result, workers=-1)[0] / diagonal
    to_result = cKDTree(of_result).query(of_source, workers=-1)[0] / diagonal

    def f_score(reach: float) -> float:
        precision, recall = float((to_source < reach).mean()), float((to_result < reach).mean())
        return 2 * precision * recall / max(precision + recall, 1e-9)

    return {
        "f1": f_score(0.01),
        "f05": f_score(0.005),
        "chamfer": float(to_source.mean() + to_result.mean()) / 2,
        "precision05": float((to_source < 0.005).mean()),
        "recall05": float((to_result < 0.005).mean()),
        "watertight": bool(result.is_watertight),
        "hidden": hidden,
        "source_hidden": source_hidden,
        "faces": len(result.faces),
        "bounds_error": float(np.abs(result.bounds - source.bounds).max()) / diagonal,
    }


def tracking(
    made: Float[np.ndarray, "t n 3"],
    faces: Int[np.ndarray, "f 3"],
    true: Float[np.ndarray, "t m 3"],
    true_faces: Int[np.ndarray, "g 3"],
    rest: int,
) -> Float[np.ndarray, "t p"]:
    """How far points of a moving mesh stray from the true ones: P points of the true surface, visible at moment `rest`, each tied there to
    the nearest point of the made surface, then both followed. Distances in units of the true mesh's bounding-box diagonal at rest.
    """
    source = trimesh.Trimesh(true[rest], true_faces, process=False)
    points, face, shares = _sampled(source, TRACKED)
    visible = _seen(source, points)
    face, shares = face[visible], shares[visible]
    ours = trimesh.Trimesh(made[rest], faces, process=False)
    places, own_face, own_shares = _sampled(ours, SAMPLES)
    nearest = cKDTree(places).query(points[visible], workers=-1)[1]
    followed = np.einsum("tpcx,pc->tpx", made[:, faces[own_face[nearest]]], own_shares[nearest])
    truth = np.einsum("tpcx,pc->tpx", true[:, true_faces[face]], shares)
    return np.linalg.norm(followed - truth, axis=-1) / float(np.linalg.norm(source.extents))


def _load(path: Path | str) -> trimesh.Trimesh:
    try:
        mesh = trimesh.load(path, force="mesh", process=False)
    except (OSError, ValueError, KeyError) as error:
        raise KilnError("bad-input", f"{Path(path).name} cannot be read as a mesh: {error}.", "Give a GLB, OBJ, PLY or STL file.") from None
    if len(mesh.faces) == 0:
        raise KilnError("bad-input", f"{Path(path).name} has no faces.", "Give a file with a mesh in it.")
    mesh.merge_vertices(merge_tex=True, merge_norm=True)
    return mesh


def _visible_points(mesh: trimesh.Trimesh) -> tuple[Float[np.ndarray, "n 3"], float]:
    """Points spread evenly over the area that some camera around the mesh sees, and the share of the area that none sees.

    The sampling is stratified: one random place in every 1 / SAMPLES of the area, from a fixed seed.
    """
    points = _sampled(mesh, SAMPLES)[0]
    seen = _seen(mesh, points)
    return points[seen], 1 - float(seen.mean())


def _sampled(mesh: trimesh.Trimesh, count: int) -> tuple[Float[np.ndarray, "n 3"], Int[np.ndarray, "n"], Float[np.ndarray, "n 3"]]:
    """Points spread evenly over the area, one in every 1 / count of it, their faces and shares of the corners."""
    corners = np.asarray(mesh.vertices)[mesh.faces]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    random = np.random.default_rng(0)
    along = (np.arange(count) + random.random(count)) / count * area.sum()
    face = np.minimum(np.searchsorted(np.cumsum(area), along), len(area) - 1)
    root, share = np.sqrt(random.random(count))[:, None], random.random(count)[:, None]
    a, b, c = corners[face, 0], corners[face, 1], corners[face, 2]
    points = a * (1 - root) + b * root * (1 - share) + c * root * share
    return points, face, np.concatenate([1 - root, root * (1 - share), root * share], 1)


def _seen(mesh: trimesh.Trimesh, points: Float[np.ndarray, "n 3"]) -> Bool[np.ndarray, "n"]:
    """Which points of the surface some camera around the mesh sees."""
    centre, radius = mesh.bounds.mean(0), float(np.linalg.norm(mesh.extents)) / 2
    unit = Mesh(((mesh.vertices - centre) / radius).astype(np.float32), np.asarray(mesh.faces, np.int32))
    places = (points - centre) / radius
    seen = np.zeros(len(points), bool)
    k = np.arange(CAMERAS) + 0.5
    height, turn = 1 - 2 * k / CAMERAS, np.pi * (1 + 5**0.5) * k  # the golden spiral
    ring = np.sqrt(1 - height**2)
    distance = 50.0  # radii: nearly parallel rays
    for direction in np.stack([ring * np.cos(turn), ring * np.sin(turn), height], 1):
        camera = look_at(direction * distance, (0, 0, 0), PIXELS, 2 * np.arcsin(1.02 / distance))
        depth = raster.depth(unit, camera)[0]
        depth[depth == 0] = np.inf
        still = np.flatnonzero(~seen)
        screen, z = camera.project(places[still])
        column, row = np.clip(screen.astype(int), 0, PIXELS - 1).T
        seen[still] = z <= depth[row, column] + 8 / PIXELS  # two pixels' slack in depth on a slope of 60 degrees
    return seen
