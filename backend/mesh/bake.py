"""A mesh's textures from the views: charts, a first blend of the sharpest views, then the texture that best explains all pixels.

Colour is averaged as linear light, as the renderer that made the views and the one that shows the texture both filter light before they
encode it to sRGB. Errors are weighed in sRGB, where people and PSNR see them. A pixel of the colour is a mean over its area; one of the
material, emission and normal passes is the value at its centre, and is explained as such.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from numba import prange
from scipy.ndimage import distance_transform_edt, maximum_filter, minimum_filter
from scipy.spatial import cKDTree

from backend.mesh import raster
from backend.mesh.cloud import cloud, surface_points
from backend.mesh.mesh import AnimatedMesh, Mesh, MovingMesh, TexturedMesh
from backend.mesh.nearest import triangles
from backend.mesh.raster import linear_from_srgb, srgb_from_linear
from backend.mesh.tangents import tangents
from backend.mesh.unwrap import unwrap
from backend.progress import Progress, silent
from backend.splats.model import SH_C0, Splats
from backend.splats.parallel import kernel, parallel_kernel
from backend.splats.sequence import SplatSequence
from backend.views.sequence import ViewSequence
from backend.views.views import Views
from protocol import recipes

BEST = 4  # views blended in a texel
SLACK = 0.012  # unit frame: what lies this much behind the depth seen is still taken for the same surface
UNCLEAN = 1e-3  # weight of a pixel at a silhouette or a step in depth: used where nothing else saw the place
MIXED = 0.1  # the same for the solver, which knows what such a pixel is a mixture of: parts thinner than a pixel have no other
LEAST = 0.1  # opacity of a mixed pixel
COVER = 0.35  # a mixed pixel is of use where the mesh covers about as much of it as its opacity says
FACING = 0.2  # cosine: a normal further from the mesh's own was seen on another side, or another part
BEND = 2.0  # pixel sizes: a larger second difference of depth is a step between two surfaces
SWEEPS = 16  # of the solver; more of them sharpen noise
MAP_SWEEPS = 4  # of the solver for material and normals: their pixels are points, with more noise between views than means over an area
RAYS = 12_000_000  # the solver's memory: 12 bytes each
NEIGHBOURS = 200_000  # seen texels among which an unseen one finds its nearest
CLEAR = 250  # 255ths: opacity from which on a texel counts as opaque
SPECK = 1e-4  # share of the texture that may be less: errors at outlines
FAINT = 1 / 255  # linear light below which nothing glows
TEXELS = 50_000  # looked up on the dense surface at a time
MOST_PIXELS = 30_000_000  # of a moving subject's views that are looked at


@dataclass(frozen=True)
class _Poses:
    """Where the mesh is in each of V views: at one of M moments."""

    vertices: Float[np.ndarray, "m n 3"]
    moment: Int[np.ndarray, "v"]


def bake(mesh: Mesh, splats: Splats | None, views: Views, p: recipes.Texture, progress: Progress = silent) -> TexturedMesh:
    """`mesh` cut into charts, with textures of p.size pixels a side. Uses the views that may be fitted alone.

    Colour always; roughness, metallic, opacity and emission where the views have material passes, a normal map where they have normals.
    Texels that no view saw take the colour of the splats around them, or of the nearest seen texel where there are no splats; the material
    of the nearest seen texel; and the mesh's own normal.
    """
    seen, p = views.for_fitting, replace(p, size=recipes.pixels(p))
    return _bake(mesh, _Poses(mesh.vertices[None], np.zeros(len(seen), np.int64)), splats, seen, p, progress)[0]


def bake_in_time(
    moving: MovingMesh, splats: SplatSequence, views: ViewSequence, p: recipes.Texture, progress: Progress = silent
) -> AnimatedMesh:
    """`bake` of a mesh that moves, from the views of all moments: what is hidden at one is coloured from another.

    Of many views those at rest are looked at, and as many of the others, drawn from all moments and cameras, as make up MOST_PIXELS.
    """
    p = replace(p, size=recipes.pixels(p))
    fitted = ~views.views.holdout
    used = fitted & (views.time == moving.rest)
    others = np.flatnonzero(fitted & ~used)
    room = max(MOST_PIXELS // views.views.alpha[0].size - int(used.sum()), 0)
    used[np.random.default_rng(0).permutation(others)[:room]] = True
    poses = _Poses(moving.vertices, views.time[used])
    made, source = _bake(moving.at(moving.rest), poses, splats.at(moving.rest), views.views.subset(used), p, progress)
    normals = np.stack([vertex_normals(moving.at(moment))[source] for moment in range(len(moving.vertices))])
    return AnimatedMesh(made, np.ascontiguousarray(moving.vertices[:, source]), normals.astype(np.float32), moving.frames, moving.fps)


def _bake(
    mesh: Mesh, poses: _Poses, splats: Splats | None, seen: Views, p: recipes.Texture, progress: Progress
) -> tuple[TexturedMesh, Int[np.ndarray, "n"]]:
    """The mesh at rest with its textures, and which vertex of `mesh` each of its vertices is."""
    progress(0.0, "Cutting charts")
    source, uv, faces = unwrap(mesh, p.size, p.padding, _between(progress, 0, 0.3, "Cutting charts"))
    turned = None
    if seen.normals is not None:
        normals = vertex_normals(mesh)[source]
        split, faces, turned = tangents(mesh.vertices[source], normals, uv, faces)
        source, uv = source[split], uv[split]
    vertices, normals = np.ascontiguousarray(mesh.vertices[source]), vertex_normals(mesh)[source].astype(np.float32)
    cut = Mesh(vertices, faces)

    looking = "Looking for each texel in the views"
    depths, clean, mixed, centred, at_rest = _surfaces(mesh, poses, seen, _between(progress, 0.3, 0.45, looking))
    seen = replace(seen, normals=at_rest)
    progress(0.45, looking)
    atlas = _lay_out(cut, normals, uv, p.size)
    directions = np.stack([vertex_normals(Mesh(placed, mesh.faces))[source] for placed in poses.vertices]).astype(np.float32)
    poses = _Poses(np.ascontiguousarray(poses.vertices[:, source]), poses.moment)
    choice = _choose(atlas, poses, directions, seen, depths, clean)
    del depths

    light = np.empty_like(seen.images)
    for i, image in enumerate(seen.images):
        progress(0.47 + 0.05 * i / len(seen), "Blending the best views")
        light[i] = linear_from_srgb(image)
    color, found = _blend(light, seen.alpha > 0, choice)
    if splats is not None and len(splats) and not found.all():
        progress(0.52, "Colouring what no view saw")
        color[~found] = _from_splats(splats, atlas.position[~found])
    else:
        _from_nearest(color, found, atlas)
    solving = "Solving for the texture"
    wanted = clean | mixed
    across = _supersample(wanted)
    if across == 1:  # one ray does not tell what a pixel is a mixture of
        wanted = clean
    rays = _trace(cut, poses, uv, seen, wanted, across, p.size, _between(progress, 0.55, 0.65, solving))
    trust = np.where(clean, np.float32(1), MIXED * seen.alpha)
    texture = _solve(atlas.spread(color), rays, light, trust, 1.0, True, SWEEPS, _between(progress, 0.65, 0.8, solving))
    base_color = _coded(srgb_from_linear(atlas.spread(texture[atlas.row, atlas.column])))
    del light, rays
    made = TexturedMesh(vertices, normals, uv, faces, base_color, tangents=turned, texels_seen=float(found.mean()) if len(found) else 0.0)

    if seen.normals is None and seen.material is None:
        return made, source
    return _maps(made, poses, atlas, choice, seen, clean, centred, _between(progress, 0.8, 1.0, "Solving for the maps")), source


def _maps(
    made: TexturedMesh,
    poses: _Poses,
    atlas: _Atlas,
    choice: _Choice,
    seen: Views,
    clean: Bool[np.ndarray, "v h w"],
    centred: Bool[np.ndarray, "v h w"],
    progress: Callable[[float], None],
) -> TexturedMesh:
    """`made` with what the passes tell of the surface itself: values at pixels' centres, where there is a surface."""
    shown, sure = seen.alpha > 0, clean
    if seen.normals is not None:
        shown &= (seen.normals != 0).any(-1)
    if seen.material is not None:
        shown &= seen.material[..., 2] > 0
    if seen.depth is not None:  # a pixel's centre shows what it shows, whatever lies around it
        shown &= centred
        clean = shown
    passes = {"normals": seen.normals, "material": seen.material, "emission": seen.emission}
    given = {name: values for name, values in passes.items() if values is not None}
    size = len(made.base_color)
    rays = _trace(Mesh(made.vertices, made.faces), poses, made.uv, seen, clean & shown, 1, size, lambda done: progress(0.1 * done))
    solved = {}
    for number, (name, one) in enumerate(given.items()):
        values = one / np.float32(255) if one.dtype == np.uint8 else np.asarray(one, np.float32)
        start, found = _blend(values, shown, choice)
        trust = None
        if name == "normals":
            start[~found] = atlas.direction[~found]
            if seen.depth is not None and len(poses.vertices) == 1:
                # At a step in depth, half a pixel aside another part is seen: there the points around a texel say more than pixels do
                _from_points(start, seen, atlas)
                trust = sure.astype(np.float32)
        else:
            _from_nearest(start, found, atlas)
        most = float(np.abs(values).max())
        part = _between(progress, 0.1 + 0.9 * number / len(given), 0.1 + 0.9 * (number + 1) / len(given))
        solved[name] = _solve(atlas.spread(start), rays, values, trust, most, False, MAP_SWEEPS, part)[atlas.row, atlas.column]
    if "normals" in solved and made.tangents is not None:
        frame = raster.tangent_frame(made.normals, made.tangents, atlas.corners, atlas.weights)
        made = replace(made, normal_map=_coded(atlas.spread(_tangent_space(solved["normals"], frame)) / 2 + 0.5))
    if "material" in solved:
        surface = _coded(atlas.spread(solved["material"]))
        opacity = surface[..., 2]
        clear = (opacity < CLEAR).mean() > SPECK
        made = replace(made, material=surface[..., :2].copy(), opacity=opacity.copy() if clear else None)
    if "emission" in solved and solved["emission"].max(initial=0) > FAINT:
        strength = max(1.0, float(solved["emission"].max()))
        made = replace(made, emission=_coded(srgb_from_linear(atlas.spread(solved["emission"] / strength))), emission_strength=strength)
    return made


def with_normals(mesh: TexturedMesh, dense: Mesh, progress: Progress = silent) -> TexturedMesh:
    """The mesh with a normal map of `dense`, the surface that it was decimated from, closed, in the same frame.

    A texel takes the smooth normal where the line along its own one meets the dense surface, in a cage twice as far as that lies from 99 of
    100 texels; the nearest place's where it meets none.
    """
    progress(0.0, "Laying the normal map out")
    split, faces, turned = tangents(mesh.vertices, mesh.normals, mesh.uv, mesh.faces)
    vertices, normals, uv = (np.ascontiguousarray(values[split]) for values in (mesh.vertices, mesh.normals, mesh.uv))
    atlas = _lay_out(Mesh(vertices, faces), normals, uv, len(mesh.base_color))
    near, smooth = triangles(dense), vertex_normals(dense)
    found = np.empty((len(atlas.position), 3), np.float32)
    parts = np.array_split(np.arange(len(found)), max(1, len(found) // TEXELS))
    cage = 2 * float(np.quantile(near.nearest(atlas.position[:: max(1, len(found) // TEXELS)])[0], 0.99)) if len(found) else 0.0
    for number, part in enumerate(parts):
        progress(number / len(parts), "Looking the dense surface up")
        place, direction = atlas.position[part], atlas.direction[part]
        face, weights = near.along(place, direction, cage)
        missed = np.flatnonzero(face < 0)
        if len(missed):
            _, face[missed], weights[missed] = near.nearest(place[missed])
        found[part] = (smooth[near.faces[face]] * weights[..., None]).sum(1)
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    frame = raster.tangent_frame(normals, turned, atlas.corners, atlas.weights)
    coded = _coded(atlas.spread(_tangent_space(found, frame)) / 2 + 0.5)
    return replace(mesh, vertices=vertices, normals=normals, uv=uv, faces=faces, tangents=turned, normal_map=coded)


def _between(progress: Callable[..., None], first: float, last: float, *text: str) -> Callable[[float], None]:
    """Reports a part of a step as [0, 1]."""
    return lambda done: progress(first + (last - first) * done, *text)


def vertex_normals(mesh: Mesh) -> Float[np.ndarray, "n 3"]:
    """Smooth unit normals: the faces' normals weighted by their angle at the vertex (Thuermer and Wuethrich 1998)."""
    corners = mesh.vertices.astype(np.float64)[mesh.faces]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-30)
    total = np.zeros((len(mesh.vertices), 3))
    for k in range(3):
        a, b = corners[:, (k + 1) % 3] - corners[:, k], corners[:, (k + 2) % 3] - corners[:, k]
        angle = np.arctan2(np.linalg.norm(np.cross(a, b), axis=1), (a * b).sum(1))
        for axis in range(3):
            total[:, axis] += np.bincount(mesh.faces[:, k], angle * normal[:, axis], len(total))
    length = np.linalg.norm(total, axis=1, keepdims=True)
    return np.where(length > 1e-12, total / np.maximum(length, 1e-12), np.array([0.0, 0.0, 1.0]))


@dataclass(frozen=True)
class _Atlas:
    """The t texels whose centres lie in a chart, and for every texel of the texture the nearest of them."""

    row: Int[np.ndarray, "t"]
    column: Int[np.ndarray, "t"]
    position: Float[np.ndarray, "t 3"]
    direction: Float[np.ndarray, "t 3"]  # the mesh's smooth normal
    corners: Int[np.ndarray, "t 3"]
    weights: Float[np.ndarray, "t 3"]
    nearest: Int[np.ndarray, "h w"]

    def spread(self, values: Float[np.ndarray, "t c"]) -> Float[np.ndarray, "h w c"]:
        """A texture. Between charts stands the nearest texel of one: no seams at small mip levels, and nothing dark."""
        return values[self.nearest] if len(values) else np.zeros((*self.nearest.shape, values.shape[1]), np.float32)


def _lay_out(cut: Mesh, normals: Float[np.ndarray, "n 3"], uv: Float[np.ndarray, "n 2"], size: int) -> _Atlas:
    screen = np.stack([uv[:, 0].astype(np.float64) * size, (1 - uv[:, 1].astype(np.float64)) * size], 1)
    flat = np.ones(len(screen))
    _, triangle = raster.z_buffer(screen, flat, cut.faces, size, size)
    place = np.argwhere(triangle >= 0)
    corners = cut.faces[triangle[place[:, 0], place[:, 1]]]
    weights = raster.corner_weights(screen, flat, corners, place).astype(np.float32)
    position, direction = _mix(cut.vertices, corners, weights), _mix(normals, corners, weights)
    direction /= np.maximum(np.linalg.norm(direction, axis=1, keepdims=True), 1e-12)
    number = np.cumsum(triangle.ravel() >= 0).reshape(size, size).astype(np.int32) - 1
    if len(place):
        row, column = distance_transform_edt(triangle < 0, return_distances=False, return_indices=True)
        number = number[row, column]
    return _Atlas(place[:, 0], place[:, 1], position, direction, corners, weights, number)


def _mix(values: Float[np.ndarray, "n 3"], corners: Int[np.ndarray, "t 3"], weights: Float[np.ndarray, "t 3"]) -> Float[np.ndarray, "t 3"]:
    values = np.asarray(values, np.float32)
    return values[corners[:, 0]] * weights[:, :1] + values[corners[:, 1]] * weights[:, 1:2] + values[corners[:, 2]] * weights[:, 2:]


def _surfaces(
    mesh: Mesh, poses: _Poses, seen: Views, progress: Callable[[float], None]
) -> tuple[
    Float[np.ndarray, "v h w"],
    Bool[np.ndarray, "v h w"],
    Bool[np.ndarray, "v h w"],
    Bool[np.ndarray, "v h w"],
    Float[np.ndarray, "v h w 3"] | None,
]:
    """Depth of what each pixel of the views sees; the pixels that see one surface of the mesh alone; those that may see several, with
    nothing before them that the mesh lacks; those whose centre sees the mesh's surface where the view has it, and on the same side; and the
    views' normals as they would be with the mesh at rest."""
    depths = np.empty(seen.alpha.shape, np.float32)
    clean, mixed, centred = np.empty(seen.alpha.shape, bool), np.empty(seen.alpha.shape, bool), np.zeros(seen.alpha.shape, bool)
    moves = len(poses.vertices) > 1
    at_rest = np.zeros_like(seen.normals) if moves and seen.normals is not None else seen.normals
    posed, smooth, moment = mesh, vertex_normals(mesh), -1
    for i, camera in enumerate(seen.cameras):
        progress(i / len(seen))
        if moves and poses.moment[i] != moment:  # views of one moment follow each other
            moment = poses.moment[i]
            posed = Mesh(poses.vertices[moment], mesh.faces)
            smooth = vertex_normals(posed)
        screen, inverse_depth = raster.project(posed.vertices, camera)
        inverse, triangle = raster.z_buffer(screen, inverse_depth, mesh.faces, camera.width, camera.height)
        depths[i] = np.where(triangle >= 0, 1 / np.where(triangle >= 0, inverse, 1), 0)
        cover = seen.alpha[i]
        if seen.material is not None:  # a pixel full of a clear surface is full, too
            opacity = seen.material[i, ..., 2]
            cover = np.where(opacity > 0, cover * 255 / np.maximum(opacity, 1), cover)
        given = None if seen.depth is None else seen.depth[i]
        if given is not None:  # what stands before the mesh in the view hides it, even if the mesh has no such part
            hidden = (given > 0) & (given < depths[i] - SLACK)
            depths[i][hidden] = given[hidden]
        clean[i] = _clean(depths[i], cover, given, camera.fx)
        mixed[i] = seen.alpha[i] > LEAST
        if given is not None:
            clean[i] &= ~hidden
            mixed[i] &= ~maximum_filter(hidden, 3)
            same = np.flatnonzero((triangle >= 0) & (given > 0) & ~hidden)
            gap = np.abs(given - depths[i]).ravel()[same]
            if seen.normals is not None:
                place = np.stack(np.divmod(same, camera.width), 1)
                corners = mesh.faces[triangle.ravel()[same]]
                weights = raster.corner_weights(screen, inverse_depth, corners, place)
                own = _mix(smooth, corners, weights.astype(np.float32))
                facing = (own * seen.normals[i].reshape(-1, 3)[same]).sum(1)
                same, gap = same[facing > FACING], gap[facing > FACING]
            centred[i].ravel()[same[gap < SLACK]] = True
        if moves and seen.normals is not None:
            there = triangle >= 0
            face = triangle[there]
            turned_back = _frames(mesh, face) @ np.swapaxes(_frames(posed, face), 1, 2)
            at_rest[i][there] = np.einsum("nij,nj->ni", turned_back, seen.normals[i][there].astype(np.float64))
    return depths, clean, mixed, centred, at_rest


def _frames(mesh: Mesh, face: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n 3 3"]:
    """Unit axes of faces as columns: along the first edge, across it, and the normal."""
    a, b, c = np.moveaxis(mesh.vertices.astype(np.float64)[mesh.faces[face]], 1, 0)
    along, normal = b - a, np.cross(b - a, c - a)
    along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-30)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-30)
    return np.stack([along, np.cross(normal, along), normal], -1)


def _clean(
    depth: Float[np.ndarray, "h w"], cover: Float[np.ndarray, "h w"], given: Float[np.ndarray, "h w"] | None, focal: float
) -> Bool[np.ndarray, "h w"]:
    """Pixels whose neighbourhood shows one surface of the mesh, no background, and the depth that the view itself has."""
    height, width = depth.shape
    framed = np.pad(depth, 1)

    def shifted(rows: int, columns: int):
        return framed[1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]

    clean = (minimum_filter(depth, 3) > 0) & (minimum_filter(cover, 3) > 0.98)
    for rows, columns in ((0, 1), (1, 0), (1, 1), (1, -1)):  # a step bends the line through a pixel's neighbours, a slope does not
        clean &= np.abs(shifted(rows, columns) + shifted(-rows, -columns) - 2 * depth) < BEND * depth / focal
    if given is not None:
        steep = maximum_filter(depth, 3) - minimum_filter(depth, 3)
        clean &= (given > 0) & (np.abs(given - depth) < SLACK + steep)
    return clean


@dataclass(frozen=True)
class _Choice:
    """For each texel the BEST views that see it: which (-1: none), their weights, the first of four pixels in each, the pixels' shares."""

    view: Int[np.ndarray, "t b"]
    weight: Float[np.ndarray, "t b"]
    pixel: Int[np.ndarray, "t b"]
    share: UInt8[np.ndarray, "t b 4"]


def _choose(
    atlas: _Atlas,
    poses: _Poses,
    directions: Float[np.ndarray, "m n 3"],
    seen: Views,
    depths: Float[np.ndarray, "v h w"],
    clean: Bool[np.ndarray, "v h w"],
) -> _Choice:
    cameras = np.stack([camera.camera_from_world for camera in seen.cameras])
    lenses = np.array([[camera.fx, camera.fy, camera.cx, camera.cy] for camera in seen.cameras])
    return _Choice(
        *_best_views(atlas.corners, atlas.weights, poses.vertices, directions, poses.moment, cameras, lenses, seen.alpha, depths, clean)
    )


@parallel_kernel
def _best_views(corners, weights, vertices, normals, moment, poses, lenses, alpha, depths, clean):
    """A view's weight is the texel's size in its picture times its angle: frontal views win, and pixels that are not clean hardly count."""
    count, views = len(corners), len(poses)
    height, width = alpha.shape[1:]
    chosen = np.full((count, BEST), np.int16(-1))
    weight = np.zeros((count, BEST), np.float32)
    pixel = np.zeros((count, BEST), np.int32)
    shares = np.zeros((count, BEST, 4), np.uint8)
    for t in prange(count):
        taps = np.zeros(4)
        first, second, third = corners[t, 0], corners[t, 1], corners[t, 2]
        wa, wb, wc = np.float64(weights[t, 0]), np.float64(weights[t, 1]), np.float64(weights[t, 2])
        for n in range(views):
            if n == 0 or moment[n] != moment[n - 1]:
                at, to = vertices[moment[n]], normals[moment[n]]
                px = wa * at[first, 0] + wb * at[second, 0] + wc * at[third, 0]
                py = wa * at[first, 1] + wb * at[second, 1] + wc * at[third, 1]
                pz = wa * at[first, 2] + wb * at[second, 2] + wc * at[third, 2]
                dx = wa * to[first, 0] + wb * to[second, 0] + wc * to[third, 0]
                dy = wa * to[first, 1] + wb * to[second, 1] + wc * to[third, 1]
                dz = wa * to[first, 2] + wb * to[second, 2] + wc * to[third, 2]
                length = np.sqrt(dx * dx + dy * dy + dz * dz)
                dx, dy, dz = dx / length, dy / length, dz / length
            m = poses[n]
            x = m[0, 0] * px + m[0, 1] * py + m[0, 2] * pz + m[0, 3]
            y = m[1, 0] * px + m[1, 1] * py + m[1, 2] * pz + m[1, 3]
            z = m[2, 0] * px + m[2, 1] * py + m[2, 2] * pz + m[2, 3]
            nx = m[0, 0] * dx + m[0, 1] * dy + m[0, 2] * dz
            ny = m[1, 0] * dx + m[1, 1] * dy + m[1, 2] * dz
            nz = m[2, 0] * dx + m[2, 1] * dy + m[2, 2] * dz
            cosine = -(x * nx + y * ny + z * nz) / np.sqrt(x * x + y * y + z * z)
            if z <= 0 or not cosine > 0.05:
                continue
            slot = 0
            for k in range(1, BEST):
                if weight[t, k] < weight[t, slot]:
                    slot = k
            most = cosine**4 / (z * z)
            if most <= weight[t, slot]:
                continue
            u, v = lenses[n, 0] * x / z + lenses[n, 2] - 0.5, lenses[n, 1] * y / z + lenses[n, 3] - 0.5
            if u < 0 or v < 0 or u >= width - 1 or v >= height - 1:
                continue
            c, r = int(u), int(v)
            a, b = u - c, v - r
            slack = SLACK + 2 * z / lenses[n, 0] * min(np.sqrt(1 / (cosine * cosine) - 1), 6.0)
            share, sharp = 0.0, 1.0
            for tap in range(4):
                i, j = r + tap // 2, c + tap % 2
                taps[tap] = 0.0
                if depths[n, i, j] <= 0 or abs(depths[n, i, j] - z) > slack:  # another surface, or none
                    sharp = UNCLEAN
                    continue
                if not clean[n, i, j]:
                    sharp = UNCLEAN
                taps[tap] = (b if tap // 2 else 1 - b) * (a if tap % 2 else 1 - a) * alpha[n, i, j]
                share += taps[tap]
            if share < 0.3 or sharp * most <= weight[t, slot]:
                continue
            weight[t, slot], chosen[t, slot], pixel[t, slot] = sharp * most, n, r * width + c
            for tap in range(4):
                shares[t, slot, tap] = np.uint8(255 * taps[tap] / share + 0.5)
    return chosen, weight, pixel, shares


def _blend(
    values: Float[np.ndarray, "v h w 3"], shown: Bool[np.ndarray, "v h w"], choice: _Choice
) -> tuple[Float[np.ndarray, "t 3"], Bool[np.ndarray, "t"]]:
    """Mean of each texel's chosen views where they show something; whether any did."""
    views, height, width = shown.shape
    color, total = _mean(
        values.reshape(views, height * width, 3),
        shown.reshape(views, height * width),
        width,
        choice.view,
        choice.weight,
        choice.pixel,
        choice.share,
    )
    return color, total > 0


@parallel_kernel
def _mean(values, shown, width, view, weight, pixel, share):
    color = np.zeros((len(view), 3), np.float32)
    total = np.zeros(len(view), np.float32)
    for t in prange(len(view)):
        for slot in range(view.shape[1]):
            n = view[t, slot]
            if n < 0:
                continue
            for tap in range(4):
                at = pixel[t, slot] + tap % 2 + (width if tap // 2 else 0)
                w = weight[t, slot] * np.float32(share[t, slot, tap])
                if w > 0 and shown[n, at]:
                    total[t] += w
                    for k in range(3):
                        color[t, k] += w * values[n, at, k]
        if total[t] > 0:
            for k in range(3):
                color[t, k] /= total[t]
    return color, total


def _from_nearest(color: Float[np.ndarray, "t 3"], found: Bool[np.ndarray, "t"], atlas: _Atlas) -> None:
    """Gives what was not found the value of the nearest place of the surface that was, in place."""
    known, unknown = np.flatnonzero(found), np.flatnonzero(~found)
    if len(known) and len(unknown):
        known = known[:: max(1, len(known) // NEIGHBOURS)]
        color[unknown] = color[known[cKDTree(atlas.position[known]).query(atlas.position[unknown])[1]]]


def _from_points(normals: Float[np.ndarray, "t 3"], seen: Views, atlas: _Atlas) -> None:
    """Gives each texel the normal of the surface points around it, in place, where there are some."""
    depth = np.where(seen.alpha > 0, seen.depth, 0)
    points, given, _ = surface_points(seen, depth)
    if len(points) == 0:
        return
    pixel = float(np.median([np.median(one[one > 0]) / camera.fx for one, camera in zip(depth, seen.cameras, strict=True) if one.any()]))
    found = cloud(points, given, pixel).around(atlas.position, atlas.direction)[1]
    there = (found != 0).any(1)
    normals[there] = found[there]


def _from_splats(splats: Splats, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """Linear colour of the nearest splats, weighted by opacity and distance; their constant harmonic alone."""
    opacity = 1 / (1 + np.exp(-splats.opacity_logits.astype(np.float64)))
    color = linear_from_srgb(np.clip(0.5 + SH_C0 * splats.sh[:, 0], 0, 1))
    near = min(8, len(splats))
    distance, index = cKDTree(splats.means).query(points, near)
    distance, index = distance.reshape(-1, near), index.reshape(-1, near)
    weight = opacity[index] / (distance**2 + 1e-6)
    return (color[index] * weight[..., None]).sum(1) / weight.sum(1, keepdims=True)


def _tangent_space(directions: Float[np.ndarray, "t 3"], frame: Float[np.ndarray, "t 3 3"]) -> Float[np.ndarray, "t 3"]:
    """World directions in terms of tangent, bitangent and normal, as a normal map holds them: unit length, on the outer side."""
    across, along, normal = frame[:, 0], frame[:, 1], frame[:, 2]
    parts = np.stack([(directions * np.cross(b, c)).sum(1) for b, c in ((along, normal), (normal, across), (across, along))], 1)
    parts *= np.sign((across * np.cross(along, normal)).sum(1))[:, None]  # Cramer's rule but for the length
    parts /= np.maximum(np.linalg.norm(parts, axis=1, keepdims=True), 1e-12)
    parts[:, 2] = np.maximum(parts[:, 2], 0.05)
    parts[(parts[:, :2] == 0).all(1), 2] = 1
    return (parts / np.linalg.norm(parts, axis=1, keepdims=True)).astype(np.float32)


def _coded(values: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    return (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)


@dataclass(frozen=True)
class _Rays:
    """Bilinear lookups that explain pixels: n pixels with r rays each, a pixel the mean of its rays."""

    pixel: Int[np.ndarray, "n"]  # among all pixels of all views
    texel: Int[np.ndarray, "n r"]  # the upper left of the four, counted along rows
    share: Int[np.ndarray, "n r 2"]  # of the lower and of the right ones, in 65535ths
    order: Int[np.ndarray, "n*r"]  # the rays by the texel's row
    rows: Int[np.ndarray, "h+1"]  # where each row begins in `order`


def _supersample(clean: Bool[np.ndarray, "v h w"]) -> int:
    """Rays along a pixel's side, as many as memory allows."""
    subject = int(clean.sum())
    return 3 if subject * 9 <= RAYS else 2 if subject * 4 <= RAYS else 1


def _trace(
    cut: Mesh,
    poses: _Poses,
    uv: Float[np.ndarray, "n 2"],
    seen: Views,
    wanted: Bool[np.ndarray, "v h w"],
    supersample: int,
    size: int,
    progress: Callable[[float], None],
) -> _Rays:
    """Rays of the wanted pixels that the mesh fills as far as their opacity says; where they are more than RAYS, of an even share of every
    view's."""
    subject = int(wanted.sum())
    random = np.random.default_rng(0)
    parts = [(np.zeros(0, np.int64), np.zeros((0, supersample**2), np.int32), np.zeros((0, supersample**2, 2), np.uint16))]
    for i, camera in enumerate(seen.cameras):
        progress(i / len(seen))
        pixels = np.flatnonzero(wanted[i])
        if subject > RAYS:
            pixels = pixels[random.random(len(pixels)) < RAYS / subject]
        fine = camera.scaled(supersample)
        screen, inverse = raster.project(poses.vertices[poses.moment[i]], fine)
        _, triangle = raster.z_buffer(screen, inverse, cut.faces, fine.width, fine.height)
        texel, share, cover = _lookups(screen, inverse, cut.faces, triangle, uv.astype(np.float64), pixels, supersample, size)
        use = (cover > 0) & (np.abs(cover - seen.alpha[i].ravel()[pixels]) < COVER) | (cover == 1)
        parts.append((pixels[use] + i * wanted[i].size, texel[use], share[use]))
    pixel, texel, share = (np.concatenate(part) for part in zip(*parts, strict=True))
    return _Rays(pixel, texel, share, *_by_row(texel.ravel(), size))


@parallel_kernel
def _lookups(screen, inverse_depth, faces, triangle, uv, pixels, supersample, size):
    """For each pixel's rays the first texel and the shares of the next ones; the share of the rays that meet the mesh.

    A ray that meets nothing repeats one that does: the pixel's colour is the mean of what it sees of the mesh.
    """
    count = supersample * supersample
    width = triangle.shape[1] // supersample
    texel = np.zeros((len(pixels), count), np.int32)
    share = np.zeros((len(pixels), count, 2), np.uint16)
    cover = np.zeros(len(pixels), np.float32)
    for n in prange(len(pixels)):
        met = 0
        for ray in range(count):
            y = pixels[n] // width * supersample + ray // supersample
            x = pixels[n] % width * supersample + ray % supersample
            f = triangle[y, x]
            if f < 0:
                continue
            face = faces[f]
            wa, wb, wc = raster.barycentric(screen, inverse_depth, face, x + 0.5, y + 0.5)
            u = wa * uv[face[0], 0] + wb * uv[face[1], 0] + wc * uv[face[2], 0]
            v = wa * uv[face[0], 1] + wb * uv[face[1], 1] + wc * uv[face[2], 1]
            column, row, right, lower = raster.texel_taps(u, v, size, size)
            texel[n, met] = row * size + column
            share[n, met, 0], share[n, met, 1] = np.uint16(lower * 65535 + 0.5), np.uint16(right * 65535 + 0.5)
            met += 1
        if met > 0:
            for ray in range(met, count):
                texel[n, ray], share[n, ray, 0], share[n, ray, 1] = texel[n, ray - met], share[n, ray - met, 0], share[n, ray - met, 1]
        cover[n] = met / count
    return texel, share, cover


@kernel
def _by_row(texel, size):
    """The rays' numbers sorted by the row of their texel, stably, and where each row begins."""
    rows = np.zeros(size + 1, np.int64)
    for n in range(len(texel)):
        rows[texel[n] // size + 1] += 1
    for row in range(size):
        rows[row + 1] += rows[row]
    cursor = rows[:-1].copy()
    order = np.empty(len(texel), np.int32)
    for n in range(len(texel)):
        row = texel[n] // size
        order[cursor[row]] = n
        cursor[row] += 1
    return order, rows


def _solve(
    texture: Float[np.ndarray, "h w 3"],
    rays: _Rays,
    values: Float[np.ndarray, "v h w 3"],
    trust: Float[np.ndarray, "v h w"] | None,
    most: float,
    encoded: bool,
    sweeps: int,
    progress: Callable[[float], None],
) -> Float[np.ndarray, "h w 3"]:
    """The texture whose lookups differ least from the pixels' values (SIRT: Gilbert 1972), from the given one.

    Each sweep spreads the pixels' errors back over the texels that they looked up. What no ray meets stays as it was. `encoded`: values are
    light in [0, most], and an error counts by how much it changes the sRGB value; otherwise they are [-most, most], as they are. `trust`:
    weights of the pixels, alike where None.
    """
    if len(rays.pixel) == 0:
        return texture
    target = values.reshape(-1, 3)[rays.pixel]
    weight = (1 / (target + 0.02) ** (2 * (1 - 1 / 2.4))).astype(np.float32) if encoded else np.ones_like(target)
    if trust is not None:
        weight *= trust.ravel()[rays.pixel, None]
    texture = np.array(texture, np.float32, order="C")
    reached = np.zeros_like(texture)
    least = 0.0 if encoded or values.min() >= 0 else -most
    lookups = rays.texel, rays.share
    for sweep in range(sweeps + 1):  # the first counts what reaches each texel
        progress(sweep / (sweeps + 1))
        error = weight if sweep == 0 else _errors(texture, target, weight, *lookups)
        _correct(texture, reached, error, *lookups, rays.order, rays.rows, np.float32(least), np.float32(most), sweep == 0)
    return texture


@parallel_kernel
def _errors(texture, target, weight, texel, share):
    """What the texture's pixels lack, weighted."""
    count, width = texel.shape[1], texture.shape[1]
    error = np.empty((len(texel), 3), np.float32)
    for n in prange(len(texel)):
        red, green, blue = np.float32(0), np.float32(0), np.float32(0)
        for ray in range(count):
            r, c = texel[n, ray] // width, texel[n, ray] % width
            b, a = share[n, ray, 0] * np.float32(1 / 65535), share[n, ray, 1] * np.float32(1 / 65535)
            one = np.float32(1)
            p, q, s, t = (one - b) * (one - a), (one - b) * a, b * (one - a), b * a
            red += p * texture[r, c, 0] + q * texture[r, c + 1, 0] + s * texture[r + 1, c, 0] + t * texture[r + 1, c + 1, 0]
            green += p * texture[r, c, 1] + q * texture[r, c + 1, 1] + s * texture[r + 1, c, 1] + t * texture[r + 1, c + 1, 1]
            blue += p * texture[r, c, 2] + q * texture[r, c + 1, 2] + s * texture[r + 1, c, 2] + t * texture[r + 1, c + 1, 2]
        error[n, 0] = (target[n, 0] - red / count) * weight[n, 0]
        error[n, 1] = (target[n, 1] - green / count) * weight[n, 1]
        error[n, 2] = (target[n, 2] - blue / count) * weight[n, 2]
    return error


@parallel_kernel
def _correct(texture, reached, error, texel, share, order, rows, least, most, counting):
    """Spreads errors over the texels that were looked up and corrects these by the mean that reaches them; or counts what would reach them.

    Each texture row is summed by one thread in one order: the result does not depend on their number.
    """
    height, width = texture.shape[:2]
    count = texel.shape[1]
    for row in prange(height):
        total = np.zeros((width, 3), np.float32)
        for lower in range(2):  # rays whose first texel is in this row, and those whose second is
            first = row - lower
            if first < 0:
                continue
            for slot in range(rows[first], rows[first + 1]):
                n, ray = order[slot] // count, order[slot] % count
                c = texel[n, ray] - first * width
                b, a = share[n, ray, 0] * np.float32(1 / 65535), share[n, ray, 1] * np.float32(1 / 65535)
                w = (b if lower else np.float32(1) - b) / np.float32(count)
                left, right = w * (np.float32(1) - a), w * a
                for k in range(3):
                    total[c, k] += error[n, k] * left
                    total[c + 1, k] += error[n, k] * right
        if counting:
            reached[row] = total
        else:
            for c in range(width):
                for k in range(3):
                    if reached[row, c, k] > 0:
                        step = np.float32(1.5) * total[c, k] / max(reached[row, c, k], np.float32(1e-6))
                        texture[row, c, k] = min(max(texture[row, c, k] + step, least), most)
