"""Where the subject is, on a sparse grid: blocks of values near its surface, and for every other block whether it lies outside or inside.

The *sign* comes from visibility, as in space carving (Kutulakos and Seitz 2000): a place is outside if some view sees through it or sees
something behind it, and inside if views have it in their pictures, hidden. What lies beside a picture is not hidden: a view with nothing
but background along its border holds its subject whole and votes against it, and more views have to hide a place than vote so.

A pyramid of the nearest and farthest depth over each view's pixels, as in hierarchical z-buffers (Greene et al. 1993), decides many points
at once: boxes of the grid are halved until all their points are known to be on one side, and values are computed for what is left, a layer
of a few points.

A block is skipped only by rules that each of its points alone would obey too, so points that two blocks share never differ in sign.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numba import prange

from backend.mesh.march import SIDE
from backend.progress import Progress, silent
from backend.splats.parallel import kernel, parallel_kernel
from backend.views.cameras import Camera

REACH = 4.0  # cells: the field is cut off beyond this distance
STEPS = 8000  # the field is kept as int16, this many steps a cell
AGREE = 0.5  # cells: views that see the same surface within this distance are averaged
BEHIND = 2.0  # cells: a view whose surface lies as much before a place knows nothing of it
STEEPEST = 6.0  # depth change between neighbouring pixels, in pixel sizes, above which they show two surfaces
FAINTEST = 0.06  # alpha below which a pixel shows background alone
COARSE = 4  # blocks along a side of the boxes at which the search begins
OUTSIDE, INSIDE, UNKNOWN = -1, -2, -3  # in place of a block's number
BATCH = 2048  # blocks between two reports
FREE, HIDDEN, VOTES, SLACK = 0, 1, 2, 3  # places in a field's rule
EXACT_VOTES, ROUGH_VOTES = 1, 4  # views that have to see a place free for it to be outside
ROUGH_REACH = 2.5  # times the depth's own uncertainty: how far around a surface its estimates are averaged


@dataclass(frozen=True)
class Sights:
    """What carving looks up in the views: each one's pose, lens, 1 / depth, what its 2 x 2 blocks of pixels show, alpha at silhouettes, and
    a pyramid of bounds."""

    poses: Float[np.ndarray, "v 4 4"]
    lenses: Float[np.ndarray, "v 5"]  # fx, fy, cx, cy; and 1 if the picture's border shows background alone, else 0
    inverse: Float[np.ndarray, "v h w"]
    kind: Int[np.ndarray, "v h w"]
    rim: Float[np.ndarray, "v 2 h w"]
    bounds: Float[np.ndarray, "v 3 cells"]  # levels one after another, finest first; `_bound` says of what
    levels: Int[np.ndarray, "levels 3"]  # where each starts, its height and width


@dataclass
class Field:
    """Values at the points `origin + cell * (i, j, k)`, positive outside, STEPS of a cell. index: each block's number, OUTSIDE or INSIDE;
    blocks: their (SIDE + 1)^3 points; places: where each block stands in the index."""

    origin: Float[np.ndarray, "3"]
    cell: float
    shape: tuple[int, ...]  # points
    index: Int[np.ndarray, "a b c"]
    blocks: Int[np.ndarray, "n s s s"]
    # FREE: distance by which VOTES views have to see a place free; HIDDEN; SLACK: the depth's uncertainty, or 0
    rule: Float[np.ndarray, "4"]
    places: Int[np.ndarray, "n 3"]


def sights(cameras: list[Camera], depth: Float[np.ndarray, "v h w"], alpha: Float[np.ndarray, "v h w"]) -> Sights:
    """The views as `carve` reads them. depth: along the axis, 0 where nothing is."""
    _, height, width = depth.shape
    levels, start = [], 0
    rows, columns = height - 1, width - 1  # blocks of 2 x 2 pixels
    while True:
        levels.append((start, rows, columns))
        start += rows * columns
        if rows <= 1 and columns <= 1:
            break
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    table = np.array(levels, np.int64)
    inverse, kind = np.empty(depth.shape, np.float32), np.empty(depth.shape, np.uint8)
    rim, bounds = np.empty((len(depth), 2, height, width), np.float32), np.empty((len(depth), 3, start), np.float32)
    borders = [np.concatenate([a[0], a[-1], a[:, 0], a[:, -1]]) for a in np.maximum(alpha, depth > 0)]
    lenses = np.array([[c.fx, c.fy, c.cx, c.cy, border.max() < FAINTEST] for c, border in zip(cameras, borders, strict=True)])
    for i, camera in enumerate(cameras):
        inverse[i], kind[i], rim[i] = _prepare(depth[i], alpha[i], camera.fx, camera.fy)
        _bound(inverse[i], kind[i], lenses[i], table, bounds[i])
    poses = np.stack([camera.camera_from_world for camera in cameras])
    return Sights(poses, lenses, inverse, kind, rim, bounds, table)


def carve(
    seen: Sights,
    origin: Float[np.ndarray, "3"],
    cell: float,
    shape: tuple[int, ...],
    progress: Progress = silent,
    slack: float = 0.0,
    solid: Callable[[Int[np.ndarray, "n s s s"], Int[np.ndarray, "n 3"]], None] | None = None,
) -> Field:
    """The field over a grid of `shape` points, the outermost of which are outside: the surface is closed where no view looked.

    slack: how uncertain the depth is, unit frame; 0 for exact depth, of which one view is proof. With uncertain depth the distances
    are averaged over the views (Curless and Levoy 1996), and ROUGH_VOTES views have to see a place free by more than `slack` to overrule
    the average; silhouettes are proof as before. `solid` may put a second opinion into the new blocks, steps as the field's: what either
    holds to be inside is inside.
    """
    counts = tuple(-(-(n - 1) // SIDE) for n in shape)
    rule = np.array([slack, ROUGH_REACH * slack, ROUGH_VOTES, slack] if slack > 0 else [AGREE * cell, BEHIND * cell, EXACT_VOTES, 0.0])
    field = Field(
        np.asarray(origin, np.float64), float(cell), shape, np.empty(counts, np.int32),
        np.empty((0,) + (SIDE + 1,) * 3, np.int16), rule, np.empty((0, 3), np.int32),
    )  # fmt: skip
    boxes = np.stack(np.meshgrid(*(np.arange(0, n, COARSE) for n in counts), indexing="ij"), -1).reshape(-1, 3)
    for first in range(0, len(boxes), BATCH):
        progress(0.1 * first / len(boxes), "Carving")
        _search(field.index, boxes[first : first + BATCH], field.origin, field.cell, rule, np.array(shape), *_parts(seen))
    found = np.argwhere(field.index == UNKNOWN)
    activate(field, seen, found, lambda done, text="", preview=None: progress(0.1 + 0.9 * done, text), solid)
    return field


def activate(
    field: Field,
    seen: Sights,
    places: Int[np.ndarray, "n 3"],
    progress: Progress = silent,
    solid: Callable[[Int[np.ndarray, "n s s s"], Int[np.ndarray, "n 3"]], None] | None = None,
) -> None:
    """Computes the blocks at `places`, none of which has values yet."""
    places = np.ascontiguousarray(places, np.int32)
    blocks = np.full((len(places),) + (SIDE + 1,) * 3, np.int16(REACH * STEPS))
    for first in range(0, len(places), BATCH):
        progress(first / len(places), "Carving")
        part = slice(first, first + BATCH)
        if solid is not None:
            solid(blocks[part], places[part])
        _compute(blocks[part], places[part], field.origin, field.cell, field.rule, np.array(field.shape), *_parts(seen))
    field.index[tuple(places.T)] = len(field.blocks) + np.arange(len(places), dtype=np.int32)
    field.blocks = np.concatenate([field.blocks, blocks])
    field.places = np.concatenate([field.places, places])


def _parts(seen: Sights):
    return seen.poses, seen.lenses, seen.inverse, seen.kind, seen.rim, seen.bounds, seen.levels


@kernel
def _prepare(depth, alpha, fx, fy):
    """1 / depth, what each 2 x 2 block of pixels shows, and the alpha at a silhouette.

    kind[r, c] for the block whose first pixel is (r, c): 0 background alone, 1 one smooth surface, 2 a rim against the background, 3 a
    step between two surfaces. rim: alpha, and the alpha above which a pixel belongs to the subject: half of what its neighbourhood
    reaches, so that parts thinner than a pixel are not taken for background.
    """
    height, width = depth.shape
    inverse = np.zeros((height, width), np.float32)
    kind = np.zeros((height, width), np.uint8)
    rim = np.zeros((2, height, width), np.float32)
    rim[0] = alpha
    for r in range(height):
        for c in range(width):
            if depth[r, c] > 0:
                inverse[r, c] = 1 / depth[r, c]
            most = FAINTEST
            for i in range(max(0, r - 1), min(height, r + 2)):
                for j in range(max(0, c - 1), min(width, c + 2)):
                    most = max(most, float(alpha[i, j]))
            rim[1, r, c] = most / 2
    for r in range(height - 1):
        for c in range(width - 1):
            near, far, hits, faint = np.inf, 0.0, 0, 0
            for i in range(r, r + 2):
                for j in range(c, c + 2):
                    if depth[i, j] > 0:
                        near, far, hits = min(near, depth[i, j]), max(far, depth[i, j]), hits + 1
                    if alpha[i, j] < FAINTEST:
                        faint += 1
            if hits == 0:
                kind[r, c] = 0 if faint == 4 else 2
            elif hits < 4:
                kind[r, c] = 2
            else:
                kind[r, c] = 1 if far - near < STEEPEST * near / min(fx, fy) else 3
    return inverse, kind, rim


@kernel
def _bound(inverse, kind, lens, levels, bounds):
    """Level 0, for each 2 x 2 block of pixels: q, the largest 1 / depth, before which all is free; the smallest, behind which all is
    hidden; and the largest length by which `_signed_distance` divides 1 - z q. Then the same over pairs of pairs."""
    fx, fy, cx, cy = lens[0], lens[1], lens[2], lens[3]
    _, rows, columns = levels[0]
    for r in range(rows):
        for c in range(columns):
            q00, q01, q10, q11 = inverse[r, c], inverse[r, c + 1], inverse[r + 1, c], inverse[r + 1, c + 1]
            largest = max(max(q00, q01), max(q10, q11))
            shows, n = kind[r, c], r * columns + c
            bounds[0, n], bounds[1, n], bounds[2, n] = largest, 0, largest
            if shows == 1 or shows == 3:
                bounds[1, n] = min(min(q00, q01), min(q10, q11))
            if shows == 1:
                qx, qy = max(abs(q01 - q00), abs(q11 - q10)) * fx, max(abs(q10 - q00), abs(q11 - q01)) * fy
                px, py = (abs(c + 1 - cx) + 1) / fx, (abs(r + 1 - cy) + 1) / fy
                qz = largest + qx * px + qy * py
                bounds[2, n] = np.sqrt(qx * qx + qy * qy + qz * qz)
            elif shows == 2 and largest == 0:
                bounds[0, n] = np.inf  # neither surface nor background: nothing is known to be free
    for level in range(1, len(levels)):
        below, high, wide = levels[level - 1]
        start, rows, columns = levels[level]
        for r in range(rows):
            for c in range(columns):
                largest, smallest, longest = np.float32(0), np.float32(np.inf), np.float32(0)
                for i in range(2 * r, min(2 * r + 2, high)):
                    for j in range(2 * c, min(2 * c + 2, wide)):
                        n = below + i * wide + j
                        largest = max(largest, bounds[0, n])
                        smallest = min(smallest, bounds[1, n])
                        longest = max(longest, bounds[2, n])
                n = start + r * columns + c
                bounds[0, n], bounds[1, n], bounds[2, n] = largest, smallest, longest


@kernel
def _verdict(low, high, origin, cell, rule, n, poses, lenses, bounds, levels):
    """What one view says of all grid points from `low` to `high`: 2 it sees the background through them, 1 they are free by more than
    rule[FREE], -1 they are hidden by more than rule[HIDDEN], -2 they are not in the picture, 0 it cannot tell or they differ."""
    fx, fy, cx, cy = lenses[n, 0], lenses[n, 1], lenses[n, 2], lenses[n, 3]
    left, right, top, bottom = np.inf, -np.inf, np.inf, -np.inf
    near, far, behind = np.inf, -np.inf, 0
    for corner in range(8):
        wx = origin[0] + (high[0] if corner & 1 else low[0]) * cell
        wy = origin[1] + (high[1] if corner & 2 else low[1]) * cell
        wz = origin[2] + (high[2] if corner & 4 else low[2]) * cell
        z = poses[n, 2, 0] * wx + poses[n, 2, 1] * wy + poses[n, 2, 2] * wz + poses[n, 2, 3]
        if z <= 1e-6:
            behind += 1
            continue
        u = fx * (poses[n, 0, 0] * wx + poses[n, 0, 1] * wy + poses[n, 0, 2] * wz + poses[n, 0, 3]) / z + cx - 0.5
        v = fy * (poses[n, 1, 0] * wx + poses[n, 1, 1] * wy + poses[n, 1, 2] * wz + poses[n, 1, 3]) / z + cy - 0.5
        left, right, top, bottom = min(left, u), max(right, u), min(top, v), max(bottom, v)
        near, far = min(near, z), max(far, z)
    if behind > 0:
        return -2 if behind == 8 else 0
    rows, columns = levels[0, 1], levels[0, 2]
    slack = 1e-6  # pixels: rounding
    left, right, top, bottom = left - slack, right + slack, top - slack, bottom + slack
    if right < 0 or bottom < 0 or left >= columns or top >= rows:
        return -2
    whole = left >= 0 and top >= 0 and right < columns and bottom < rows
    c0, c1 = int(max(left, 0.0)), int(min(right, columns - 1.0))
    r0, r1 = int(max(top, 0.0)), int(min(bottom, rows - 1.0))
    level = 0
    while (c1 >> level) - (c0 >> level) > 2 or (r1 >> level) - (r0 >> level) > 2:
        level += 1
    start, _, wide = levels[level]
    largest, smallest, longest = np.float32(0), np.float32(np.inf), np.float32(0)
    for r in range(r0 >> level, (r1 >> level) + 1):
        for c in range(c0 >> level, (c1 >> level) + 1):
            k = start + r * wide + c
            largest, smallest, longest = max(largest, bounds[n, 0, k]), min(smallest, bounds[n, 1, k]), max(longest, bounds[n, 2, k])
    if whole and largest == 0:
        return 2
    if whole and 1 - far * largest > rule[FREE] * longest + 1e-6:
        return 1
    if whole and near * smallest - 1 > rule[HIDDEN] * longest + 1e-6:
        return -1
    return 0


@kernel
def _sift(low, high, shape, origin, cell, rule, poses, lenses, bounds, levels, views, hidden, kept):
    """Puts those of `views` into `kept` that may still have a say in the box; returns their number, or OUTSIDE or INSIDE if it is decided.
    And `hidden` with their votes that have not: how many views hide the whole box, less those that hold their subject without it."""
    edge = False  # the grid's outermost points are outside, and so is what the last blocks have beyond them
    for axis in range(3):
        if low[axis] >= shape[axis] - 1 or high[axis] <= 0:
            return OUTSIDE, hidden
        edge |= low[axis] <= 0 or high[axis] >= shape[axis] - 1
    count, free = 0, 0
    for n in views:
        says = _verdict(low, high, origin, cell, rule, n, poses, lenses, bounds, levels)
        free += says == 1
        if says == 2 or free >= rule[VOTES]:
            return OUTSIDE, hidden
        if says >= 0:
            kept[count] = n
            count += 1
        else:
            hidden += 1 if says == -1 else -int(lenses[n, 4])
    if count == 0 and hidden <= 0:
        return OUTSIDE, hidden
    return (INSIDE if count == 0 and not edge else count), hidden


@parallel_kernel
def _search(index, boxes, origin, cell, rule, shape, poses, lenses, inverse, kind, rim, bounds, levels):
    """Decides every block: OUTSIDE, INSIDE, or UNKNOWN where the surface may be. boxes: first blocks of COARSE^3 each."""
    everyone = np.arange(len(poses))
    for n in prange(len(boxes)):
        kept, fewer, last = np.empty(len(poses), np.int64), np.empty(len(poses), np.int64), np.empty(len(poses), np.int64)
        low, high = np.empty(3, np.int64), np.empty(3, np.int64)
        first = boxes[n]
        for axis in range(3):
            low[axis], high[axis] = first[axis] * SIDE, (first[axis] + COARSE) * SIDE
        count, votes = _sift(low, high, shape, origin, cell, rule, poses, lenses, bounds, levels, everyone, 0, kept)
        for half in range(8):
            a0, b0, c0 = first[0] + 2 * (half & 1), first[1] + 2 * (half >> 1 & 1), first[2] + 2 * (half >> 2)
            found, among = count, votes
            if count >= 0:
                low[0], low[1], low[2] = a0 * SIDE, b0 * SIDE, c0 * SIDE
                high[0], high[1], high[2] = (a0 + 2) * SIDE, (b0 + 2) * SIDE, (c0 + 2) * SIDE
                found, among = _sift(low, high, shape, origin, cell, rule, poses, lenses, bounds, levels, kept[:count], votes, fewer)
            for part in range(8):
                a, b, c = a0 + (part & 1), b0 + (part >> 1 & 1), c0 + (part >> 2)
                if a >= index.shape[0] or b >= index.shape[1] or c >= index.shape[2]:
                    continue
                state = found
                if found >= 0:
                    low[0], low[1], low[2] = a * SIDE, b * SIDE, c * SIDE
                    high[0], high[1], high[2] = (a + 1) * SIDE, (b + 1) * SIDE, (c + 1) * SIDE
                    state, _ = _sift(low, high, shape, origin, cell, rule, poses, lenses, bounds, levels, fewer[:found], among, last)
                index[a, b, c] = state if state < 0 else UNKNOWN


@parallel_kernel
def _compute(blocks, places, origin, cell, rule, shape, poses, lenses, inverse, kind, rim, bounds, levels):
    everyone = np.arange(len(poses))
    outside = np.int16(REACH * STEPS)
    for n in prange(len(blocks)):
        block = blocks[n]
        solid = block.copy()
        block[:] = outside
        known = np.zeros(block.shape, np.bool_)
        kept, fewer, last = np.empty(len(poses), np.int64), np.empty(len(poses), np.int64), np.empty(len(poses), np.int64)
        distances, weights = np.empty(len(poses)), np.empty(len(poses))
        low, high, part = np.empty(3, np.int64), np.empty(3, np.int64), np.empty(3, np.int64)
        for axis in range(3):
            low[axis], high[axis] = places[n, axis] * SIDE, (places[n, axis] + 1) * SIDE
        count, votes = _sift(low, high, shape, origin, cell, rule, poses, lenses, bounds, levels, everyone, 0, kept)
        if count == INSIDE:
            block[:] = -outside
        if count < 0:
            continue
        for quarter in range(8):  # halved once, and once more
            low[0] = places[n, 0] * SIDE + (quarter & 1) * 4
            low[1] = places[n, 1] * SIDE + (quarter >> 1 & 1) * 4
            low[2] = places[n, 2] * SIDE + (quarter >> 2) * 4
            high[:] = low + 4
            found, among = _sift(low, high, shape, origin, cell, rule, poses, lenses, bounds, levels, kept[:count], votes, fewer)
            for eighth in range(8):
                part[0] = low[0] + (eighth & 1) * 2
                part[1] = low[1] + (eighth >> 1 & 1) * 2
                part[2] = low[2] + (eighth >> 2) * 2
                state, hidden = found, among
                if found >= 0:
                    high[:] = part + 2
                    state, hidden = _sift(part, high, shape, origin, cell, rule, poses, lenses, bounds, levels, fewer[:found], among, last)
                if state == OUTSIDE:
                    continue
                for i in range(part[0], part[0] + 3):
                    for j in range(part[1], part[1] + 3):
                        for k in range(part[2], part[2] + 3):
                            a, b, c = i - places[n, 0] * SIDE, j - places[n, 1] * SIDE, k - places[n, 2] * SIDE
                            if known[a, b, c]:
                                continue
                            if state == INSIDE:
                                block[a, b, c] = -outside
                            elif 0 < i < shape[0] - 1 and 0 < j < shape[1] - 1 and 0 < k < shape[2] - 1:
                                x, y, z = origin[0] + i * cell, origin[1] + j * cell, origin[2] + k * cell
                                known[a, b, c] = True
                                if rule[SLACK] > 0:
                                    block[a, b, c] = _fused(
                                        x, y, z, solid[a, b, c], cell, rule, poses, lenses, inverse, kind, rim, last[:state], hidden
                                    )
                                else:
                                    block[a, b, c] = _value(
                                        x, y, z, cell, poses, lenses, inverse, kind, rim, last[:state], hidden, distances, weights
                                    )


@kernel
def _value(wx, wy, wz, cell, poses, lenses, inverse, kind, rim, views, hidden, distances, weights):
    """The largest free distance over the views, averaged over those that agree; STEPS of a cell, cut off at REACH. hidden: votes of views
    that are not in `views`."""
    largest, per_cell = -REACH, 1 / cell
    for slot in range(len(views)):
        n = views[slot]
        x = poses[n, 0, 0] * wx + poses[n, 0, 1] * wy + poses[n, 0, 2] * wz + poses[n, 0, 3]
        y = poses[n, 1, 0] * wx + poses[n, 1, 1] * wy + poses[n, 1, 2] * wz + poses[n, 1, 3]
        z = poses[n, 2, 0] * wx + poses[n, 2, 1] * wy + poses[n, 2, 2] * wz + poses[n, 2, 3]
        shown, distance, weights[slot] = _signed_distance(x, y, z, n, lenses, inverse, kind, rim)
        hidden += 1 if shown else -int(lenses[n, 4])
        distances[slot] = distance * per_cell
        if distances[slot] < -BEHIND:
            distances[slot] = -np.inf
        largest = max(largest, distances[slot])
        if largest >= REACH:
            return np.int16(REACH * STEPS)
    if hidden <= 0:
        return np.int16(REACH * STEPS)
    if largest > -REACH:
        total, weight = largest * 1e-3, 1e-3
        for slot in range(len(views)):
            apart = largest - distances[slot]
            if apart < AGREE and weights[slot] > 0:
                w = weights[slot] * (1 - apart / AGREE)
                total += w * distances[slot]
                weight += w
        largest = total / weight
    return np.int16(max(largest, -REACH) * STEPS)


@kernel
def _fused(wx, wy, wz, solid, cell, rule, poses, lenses, inverse, kind, rim, views, hidden):
    """The mean of the views' distances along their rays, each cut off at rule[HIDDEN], or `solid` where that is deeper inside; but outside
    where the silhouettes or rule[VOTES] views say so. STEPS of a cell, cut off at REACH."""
    reach = rule[HIDDEN]
    total, count, beyond = 0.0, 0, -np.inf
    freest = np.full(ROUGH_VOTES, -np.inf)
    for n in views:
        x = poses[n, 0, 0] * wx + poses[n, 0, 1] * wy + poses[n, 0, 2] * wz + poses[n, 0, 3]
        y = poses[n, 1, 0] * wx + poses[n, 1, 1] * wy + poses[n, 1, 2] * wz + poses[n, 1, 3]
        z = poses[n, 2, 0] * wx + poses[n, 2, 1] * wy + poses[n, 2, 2] * wz + poses[n, 2, 3]
        u = lenses[n, 0] * x / max(z, 1e-6) + lenses[n, 2] - 0.5
        v = lenses[n, 1] * y / max(z, 1e-6) + lenses[n, 3] - 0.5
        if z <= 1e-6 or u < 0 or v < 0 or u >= inverse.shape[2] - 1 or v >= inverse.shape[1] - 1:
            hidden -= int(lenses[n, 4])
            continue
        hidden += 1
        c, r = int(u), int(v)
        a, b = u - c, v - r
        shows = kind[n, r, c]
        if shows == 0:
            return np.int16(REACH * STEPS)
        if shows == 1:
            upper = inverse[n, r, c] * (1 - a) + inverse[n, r, c + 1] * a
            q = upper * (1 - b) + (inverse[n, r + 1, c] * (1 - a) + inverse[n, r + 1, c + 1] * a) * b
        else:
            q = float(inverse[n, r + (b >= 0.5), c + (a >= 0.5)])
        open_sky = False
        if shows == 2:
            given, level = _between(rim, n, 0, r, c, a, b), _between(rim, n, 1, r, c, a, b)
            beyond = max(beyond, (level - given) / (2 * level) * 1.5 * z / lenses[n, 0])
            if q <= 0:
                open_sky = given < level
                q = float(max(max(inverse[n, r, c], inverse[n, r, c + 1]), max(inverse[n, r + 1, c], inverse[n, r + 1, c + 1])))
                if q <= 0:
                    continue
        distance = np.inf if open_sky else 1 / q - z
        if distance < -reach:
            continue
        total += min(distance, reach)
        count += 1
        for slot in range(ROUGH_VOTES):  # the largest few, in order
            if distance > freest[slot]:
                freest[slot], distance = distance, freest[slot]
    if hidden <= 0:
        return np.int16(REACH * STEPS)
    value = total / count / cell if count > 0 else -REACH
    value = min(value, solid / STEPS)
    value = max(value, max(freest[-1] - rule[SLACK], beyond) / cell)
    return np.int16(min(max(value, -REACH), REACH) * STEPS)


@parallel_kernel
def within(points, seen_poses, lenses, kind):
    """Which places (world) no view sees the background at."""
    inside = np.ones(len(points), np.bool_)
    for p in prange(len(points)):
        for n in range(len(seen_poses)):
            m = seen_poses[n]
            z = m[2, 0] * points[p, 0] + m[2, 1] * points[p, 1] + m[2, 2] * points[p, 2] + m[2, 3]
            if z <= 1e-6:
                continue
            u = lenses[n, 0] * (m[0, 0] * points[p, 0] + m[0, 1] * points[p, 1] + m[0, 2] * points[p, 2] + m[0, 3]) / z + lenses[n, 2] - 0.5
            v = lenses[n, 1] * (m[1, 0] * points[p, 0] + m[1, 1] * points[p, 1] + m[1, 2] * points[p, 2] + m[1, 3]) / z + lenses[n, 3] - 0.5
            if u < 0 or v < 0 or u >= kind.shape[2] - 1 or v >= kind.shape[1] - 1:
                continue
            if kind[n, int(v), int(u)] == 0:
                inside[p] = False
                break
    return inside


@kernel
def _signed_distance(x, y, z, n, lenses, inverse, kind, rim):
    """Whether a place (camera axes) lies in one view's picture; how far in front of what the view sees there, in world units, -inf where
    it says nothing; and the squared cosine of the view's angle to the surface, 0 where it is unknown.

    On a smooth surface 1 / depth, linear over the screen on any plane, gives the tangent plane, and the distance is the one to that plane.
    """
    if z <= 1e-6:
        return False, -np.inf, 0.0
    fx, fy = lenses[n, 0], lenses[n, 1]
    px, py = x / z, y / z
    u, v = fx * px + lenses[n, 2] - 0.5, fy * py + lenses[n, 3] - 0.5
    if u < 0 or v < 0 or u >= inverse.shape[2] - 1 or v >= inverse.shape[1] - 1:
        return False, -np.inf, 0.0
    c, r = int(u), int(v)
    a, b = u - c, v - r
    shows = kind[n, r, c]
    if shows == 0:
        return True, np.inf, 0.0
    q00, q01, q10, q11 = inverse[n, r, c], inverse[n, r, c + 1], inverse[n, r + 1, c], inverse[n, r + 1, c + 1]
    if shows == 1:
        q = (q00 * (1 - a) + q01 * a) * (1 - b) + (q10 * (1 - a) + q11 * a) * b
        qx = ((q01 - q00) * (1 - b) + (q11 - q10) * b) * fx
        qy = ((q10 - q00) * (1 - a) + (q11 - q01) * a) * fy
        qz = q - qx * px - qy * py
        square = qx * qx + qy * qy + qz * qz
        return True, (1 - z * q) / np.sqrt(square), q * q / (square * (1 + px * px + py * py))
    # Several surfaces share these pixels: only what lies in front of all of them is free
    nearest = max(max(q00, q01), max(q10, q11))
    distance = 1 / nearest - z if nearest > 0 else -np.inf
    if shows == 2:  # the rest is background, and the silhouette runs where alpha crosses `rim`
        given, level = _between(rim, n, 0, r, c, a, b), _between(rim, n, 1, r, c, a, b)
        distance = max(distance, (level - given) / (2 * level) * 1.5 * z / fx)
    return True, distance, 0.0


@kernel
def _between(maps, n, m, r, c, a, b):
    upper = maps[n, m, r, c] * (1 - a) + maps[n, m, r, c + 1] * a
    return upper * (1 - b) + (maps[n, m, r + 1, c] * (1 - a) + maps[n, m, r + 1, c + 1] * a) * b


@kernel
def lookup(index, blocks, x, y, z):
    """The field between grid points (a place in cells), in cells; 0 outside the grid."""
    i, j, k = int(x), int(y), int(z)
    if x < 0 or y < 0 or z < 0 or i >= index.shape[0] * SIDE or j >= index.shape[1] * SIDE or k >= index.shape[2] * SIDE:
        return 0.0
    number = index[i // SIDE, j // SIDE, k // SIDE]
    if number < 0:
        return REACH if number == OUTSIDE else -REACH
    block = blocks[number]
    a, b, c = x - i, y - j, z - k
    i, j, k = i % SIDE, j % SIDE, k % SIDE
    value = 0.0
    for di in range(2):
        for dj in range(2):
            for dk in range(2):
                value += (a if di else 1 - a) * (b if dj else 1 - b) * (c if dk else 1 - c) * block[i + di, j + dj, k + dk]
    return value / STEPS


@parallel_kernel
def lookups(index, blocks, points):
    """`lookup` at many places."""
    values = np.empty(len(points))
    for n in prange(len(points)):
        values[n] = lookup(index, blocks, points[n, 0], points[n, 1], points[n, 2])
    return values
