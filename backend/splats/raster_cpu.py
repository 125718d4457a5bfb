"""Gaussian splatting on the CPU, forward and backward, without torch: the pictures of gsplat 1.5.3's "classic" `rasterization` with
an `eps2d` of 0.1.

3D Gaussian Splatting (Kerbl et al. 2023, section 4-6; EWA projection after Zwicker et al. 2001), organised for vector units: sixteen
Gaussians at a time are projected, pixels are composed in blocks of 4 x 4, and one global depth sort orders all tiles. Tiles write their
gradients into one slot for each (Gaussian, tile), which are summed in a fixed order: the result is bitwise the same on any number of
threads. Depth alone differs from gsplat's: a Gaussian's depth at a pixel lies on the ray (`slopes`), not at its centre for all pixels.

Parameters live in one float32 matrix with a row for each scalar and a column for each Gaussian, padded to a multiple of 16 columns
(`pack`). Pictures live in planes that are padded to whole tiles.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from backend.views.cameras import Camera

from .model import SH_C0, Splats
from .parallel import THREADS, kernel, run
from .simd import (
    at,
    bits,
    block_x,
    block_y,
    greatest,
    least,
    load,
    load_block,
    logarithm,
    lowest_bit,
    root,
    spread,
    store,
    store_block,
    take,
    totals,
    two_to_the,
    where,
    zeros,
)  # fmt: skip

F = np.float32

TILE = 16  # pixels; a tile has 4 x 4 blocks of 4 x 4 pixels, so its blocks fit the bits of one mask
NEAR = F(0.01)  # camera-space depth below which nothing is drawn (gsplat's near_plane)
# Pixels^2 added to the projected covariance (gsplat's eps2d): about a pixel's own size, as in Mip-Splatting (Yu et al. 2024, section 5.2).
# The 0.3 of 3D Gaussian Splatting blurs: with 0.1, held-out views of six objects, fitted from colour alone, gain 0.3 to 1.0 dB.
DILATION = F(0.1)
LEAST_ALPHA = F(1 / 255)
MOST_ALPHA = F(0.999)
LEAST_TRANSMITTANCE = F(1e-4)  # a pixel stops before the Gaussian that would take it below

# Rows of the parameter matrix; the spherical harmonics follow, coefficient by coefficient, red, green, blue.
MEAN, QUATERNION, LOG_SCALE, OPACITY, SH = 0, 3, 7, 10, 11
EMPTY = F(-30.0)  # opacity logit of the padding: invisible

# A record holds what compositing needs of a projected Gaussian: u, v, conic a b c, opacity, largest exponent, nothing.
RECORD = 8
FEATURES = 4  # composed together: red, green, blue, depth; more come in further groups of four
PLANES = 5  # four features and alpha
# Floats of a gradient slot: four features, the sums of dL/dsigma * (1, dx, dy, dx^2, dx dy, dy^2), the last feature's two slopes.
SLOT = 16
CHUNK = 256  # Gaussians projected as one piece of work
BANDS = 16  # pieces of the depth order that are binned at the same time

HALF, ONE, TWO = F(0.5), F(1), F(2)


def columns(count: int) -> int:
    return -(-max(count, 1) // 16) * 16


def pack(splats: Splats) -> Float[np.ndarray, "rows columns"]:
    """The parameter matrix of splats."""
    count, bases = len(splats), splats.sh.shape[1]
    matrix = np.zeros((SH + 3 * bases, columns(count)), np.float32)
    matrix[OPACITY] = EMPTY
    matrix[QUATERNION] = 1
    matrix[MEAN:QUATERNION, :count] = splats.means.T
    matrix[QUATERNION:LOG_SCALE, :count] = splats.quaternions.T
    matrix[LOG_SCALE:OPACITY, :count] = splats.log_scales.T
    matrix[OPACITY, :count] = splats.opacity_logits
    matrix[SH:, :count] = splats.sh.reshape(count, 3 * bases).T
    return matrix


def unpack(matrix: Float[np.ndarray, "rows columns"], count: int) -> Splats:
    """The splats (or, of a gradient matrix, their gradients) of the first `count` columns."""
    rows = np.ascontiguousarray(matrix[:, :count].T)
    return Splats(
        means=rows[:, MEAN:QUATERNION].copy(),
        quaternions=rows[:, QUATERNION:LOG_SCALE].copy(),
        log_scales=rows[:, LOG_SCALE:OPACITY].copy(),
        opacity_logits=rows[:, OPACITY].copy(),
        sh=rows[:, SH:].reshape(count, -1, 3).copy(),
    )


# ---------------------------------------------------------------- elementary functions

_E0, _E1, _E2, _E3, _E4, _E5 = (
    F(c) for c in (0.9999999058956826, -0.9999914354337517, 0.4998691698834155, -0.16591692013424927, 0.039673792637322576,
                   -0.005787115558377201)
)  # fmt: skip
_P0, _P1, _P2, _P3, _P4, _P5, _P6 = (
    F(c) for c in (1.0000000005541656, 0.693147205737265, 0.24022646890627578, 0.05550328776969987, 0.009618488957822162,
                   0.0013399931217586024, 0.00015345811811726148)
)  # fmt: skip
_EIGHTH = F(0.125)
_LOG2_E, _TO_WHOLE = F(1.4426950408889634), F(12582912.0)  # adding and subtracting 1.5 * 2^23 rounds to a whole number
_HIGHEST = F(80.0)


@kernel
def falloff(sigma):
    """exp(-sigma) for 0 <= sigma <= 5.6, which is all that reaches 1/255, to 8e-7. Minimax on sigma / 8, squared three times."""
    x = sigma * _EIGHTH
    y = ((((_E5 * x + _E4) * x + _E3) * x + _E2) * x + _E1) * x + _E0
    y = y * y
    y = y * y
    return y * y


@kernel
def exponential(x):
    """exp(x), clamped to |x| <= 80."""
    x = least(greatest(x, -_HIGHEST), _HIGHEST) * _LOG2_E
    whole = (x + _TO_WHOLE) - _TO_WHOLE
    x = x - whole
    return ((((((_P6 * x + _P5) * x + _P4) * x + _P3) * x + _P2) * x + _P1) * x + _P0) * two_to_the(whole)


# ---------------------------------------------------------------- projection

_C0 = F(SH_C0)
_C1 = F(0.48860251190292)
_C2A, _C2B, _C2C = F(1.092548430592079), F(0.9461746957575601), F(0.3153915652525201)
_C2D = F(0.5462742152960395)
_C3A, _C3B, _C3C = F(1.865881662950577), F(1.119528997770346), F(2.285228997322329)
_C3D, _C3E = F(0.4570457994644658), F(1.445305721320277)
_C3F = F(0.5900435899266435)
_TINY = F(1e-20)
_FIVE = F(5.0)
_THREE = F(3.0)
_FOUR = F(4.0)
_SIX = F(6.0)


@kernel
def bases_of(degree, x, y, z, values, dx, dy, dz):
    """Real spherical harmonics of a unit direction up to degree 3 and their derivatives by x, y and z, as rows of sixteen.

    The constants are Sloan, Efficient Spherical Harmonic Evaluation (JCGT 2013), in the signs of 3D Gaussian Splatting.
    """
    none = zeros()
    store(values, 0, spread(_C0))
    store(dx, 0, none)
    store(dy, 0, none)
    store(dz, 0, none)
    if degree >= 1:
        one = spread(_C1)
        store(values, 16, none - _C1 * y)
        store(dx, 16, none)
        store(dy, 16, none - one)
        store(dz, 16, none)
        store(values, 32, _C1 * z)
        store(dx, 32, none)
        store(dy, 32, none)
        store(dz, 32, one)
        store(values, 48, none - _C1 * x)
        store(dx, 48, none - one)
        store(dy, 48, none)
        store(dz, 48, none)
    if degree >= 2:
        store(values, 64, _C2A * x * y)
        store(dx, 64, _C2A * y)
        store(dy, 64, _C2A * x)
        store(dz, 64, none)
        store(values, 80, none - _C2A * y * z)
        store(dx, 80, none)
        store(dy, 80, none - _C2A * z)
        store(dz, 80, none - _C2A * y)
        store(values, 96, _C2B * z * z - _C2C)
        store(dx, 96, none)
        store(dy, 96, none)
        store(dz, 96, TWO * _C2B * z)
        store(values, 112, none - _C2A * x * z)
        store(dx, 112, none - _C2A * z)
        store(dy, 112, none)
        store(dz, 112, none - _C2A * x)
        store(values, 128, _C2D * (x * x - y * y))
        store(dx, 128, TWO * _C2D * x)
        store(dy, 128, none - TWO * _C2D * y)
        store(dz, 128, none)
    if degree >= 3:
        outer = _C3C * z * z - _C3D
        store(values, 144, none - _C3F * y * (_THREE * x * x - y * y))
        store(dx, 144, none - _SIX * _C3F * x * y)
        store(dy, 144, none - _THREE * _C3F * (x * x - y * y))
        store(dz, 144, none)
        store(values, 160, TWO * _C3E * x * y * z)
        store(dx, 160, TWO * _C3E * y * z)
        store(dy, 160, TWO * _C3E * x * z)
        store(dz, 160, TWO * _C3E * x * y)
        store(values, 176, none - y * outer)
        store(dx, 176, none)
        store(dy, 176, none - outer)
        store(dz, 176, none - TWO * _C3C * y * z)
        store(values, 192, z * (_C3A * z * z - _C3B))
        store(dx, 192, none)
        store(dy, 192, none)
        store(dz, 192, _THREE * _C3A * z * z - _C3B)
        store(values, 208, none - x * outer)
        store(dx, 208, none - outer)
        store(dy, 208, none)
        store(dz, 208, none - TWO * _C3C * x * z)
        store(values, 224, _C3E * z * (x * x - y * y))
        store(dx, 224, TWO * _C3E * x * z)
        store(dy, 224, none - TWO * _C3E * y * z)
        store(dz, 224, _C3E * (x * x - y * y))
        store(values, 240, none - _C3F * x * (x * x - _THREE * y * y))
        store(dx, 240, none - _THREE * _C3F * (x * x - y * y))
        store(dy, 240, _SIX * _C3F * x * y)
        store(dz, 240, none)


@kernel
def color_of(parameters, stride, g, degree, values, channel):
    """Colour before clamping: 0.5 + sum of coefficients times bases."""
    color = spread(HALF)
    for k in range((degree + 1) * (degree + 1)):
        color = color + load(values, 16 * k) * load(parameters, (SH + 3 * k + channel) * stride + g)
    return color


@kernel
def camera_point(parameters, stride, g, camera):
    x, y, z = load(parameters, g), load(parameters, stride + g), load(parameters, 2 * stride + g)
    return (
        at(camera, 0) * x + at(camera, 1) * y + at(camera, 2) * z + at(camera, 9),
        at(camera, 3) * x + at(camera, 4) * y + at(camera, 5) * z + at(camera, 10),
        at(camera, 6) * x + at(camera, 7) * y + at(camera, 8) * z + at(camera, 11),
    )


@kernel
def unit_quaternion(parameters, stride, g):
    w, x = load(parameters, 3 * stride + g), load(parameters, 4 * stride + g)
    y, z = load(parameters, 5 * stride + g), load(parameters, 6 * stride + g)
    inverse = ONE / root(greatest(w * w + x * x + y * y + z * z, _TINY))
    return w * inverse, x * inverse, y * inverse, z * inverse, inverse


@kernel
def rotation_of(w, x, y, z):
    return (
        ONE - TWO * (y * y + z * z), TWO * (x * y - w * z), TWO * (x * z + w * y),
        TWO * (x * y + w * z), ONE - TWO * (x * x + z * z), TWO * (y * z - w * x),
        TWO * (x * z - w * y), TWO * (y * z + w * x), ONE - TWO * (x * x + y * y),
    )  # fmt: skip


@kernel
def turned(camera, a, b, c):
    """The camera's rotation times a column."""
    return (
        at(camera, 0) * a + at(camera, 1) * b + at(camera, 2) * c,
        at(camera, 3) * a + at(camera, 4) * b + at(camera, 5) * c,
        at(camera, 6) * a + at(camera, 7) * b + at(camera, 8) * c,
    )


@kernel
def turned_back(camera, a, b, c):
    return (
        at(camera, 0) * a + at(camera, 3) * b + at(camera, 6) * c,
        at(camera, 1) * a + at(camera, 4) * b + at(camera, 7) * c,
        at(camera, 2) * a + at(camera, 5) * b + at(camera, 8) * c,
    )


@kernel
def project(counter, count, parameters, stride, degree, camera, tiles_x, tiles_y, records, features, slopes, rectangles, areas, depths):
    """Records, features and tile rectangles (x0, y0, x1, y1) of all Gaussians; `areas` counts the tiles, 0 for what no pixel sees.

    `slopes`: how a Gaussian's depth changes by x and y of the picture, in pixels: the mean of z given x and y.
    """
    scratch = np.empty(16 * 16, np.float32)
    values, dx, dy, dz = np.empty(256, np.float32), np.empty(256, np.float32), np.empty(256, np.float32), np.empty(256, np.float32)
    none = zeros()
    while True:
        first = take(counter) * CHUNK
        if first >= count:
            break
        for g in range(first, min(first + CHUNK, stride), 16):
            px, py, pz = camera_point(parameters, stride, g, camera)
            z = greatest(pz, NEAR)
            inverse_z = ONE / z
            qw, qx, qy, qz, _ = unit_quaternion(parameters, stride, g)
            r00, r01, r02, r10, r11, r12, r20, r21, r22 = rotation_of(qw, qx, qy, qz)
            s0 = exponential(load(parameters, 7 * stride + g))
            s1 = exponential(load(parameters, 8 * stride + g))
            s2 = exponential(load(parameters, 9 * stride + g))
            n00, n10, n20 = turned(camera, r00 * s0, r10 * s0, r20 * s0)
            n01, n11, n21 = turned(camera, r01 * s1, r11 * s1, r21 * s1)
            n02, n12, n22 = turned(camera, r02 * s2, r12 * s2, r22 * s2)
            slope_x = least(greatest(px * inverse_z, at(camera, 19)), at(camera, 20))
            slope_y = least(greatest(py * inverse_z, at(camera, 21)), at(camera, 22))
            jx, jy = at(camera, 12) * inverse_z, at(camera, 13) * inverse_z
            t00, t01, t02 = jx * (n00 - slope_x * n20), jx * (n01 - slope_x * n21), jx * (n02 - slope_x * n22)
            t10, t11, t12 = jy * (n10 - slope_y * n20), jy * (n11 - slope_y * n21), jy * (n12 - slope_y * n22)
            cov_xx = t00 * t00 + t01 * t01 + t02 * t02 + DILATION
            cov_xy = t00 * t10 + t01 * t11 + t02 * t12
            cov_yy = t10 * t10 + t11 * t11 + t12 * t12 + DILATION
            inverse_det = ONE / (cov_xx * cov_yy - cov_xy * cov_xy)
            opacity = ONE / (ONE + exponential(none - load(parameters, 10 * stride + g)))
            # An exponent above this brings alpha under 1/255: the exact, opacity-aware extent.
            most = logarithm(opacity * (ONE / LEAST_ALPHA))
            most = where(pz > NEAR, most, spread(-ONE))
            reach = TWO * greatest(most, F(0))
            store(scratch, 0, at(camera, 12) * px * inverse_z + at(camera, 14))
            store(scratch, 16, at(camera, 13) * py * inverse_z + at(camera, 15))
            store(scratch, 32, cov_yy * inverse_det)
            store(scratch, 48, none - cov_xy * inverse_det)
            store(scratch, 64, cov_xx * inverse_det)
            store(scratch, 80, opacity)
            store(scratch, 96, most)
            store(scratch, 112, root(reach * cov_xx))
            store(scratch, 128, root(reach * cov_yy))
            ex, ey, ez = (
                load(parameters, g) - at(camera, 16),
                load(parameters, stride + g) - at(camera, 17),
                load(parameters, 2 * stride + g) - at(camera, 18),
            )
            inverse = ONE / root(greatest(ex * ex + ey * ey + ez * ez, _TINY))
            bases_of(degree, ex * inverse, ey * inverse, ez * inverse, values, dx, dy, dz)
            for channel in range(3):
                store(scratch, 144 + 16 * channel, greatest(color_of(parameters, stride, g, degree, values, channel), F(0)))
            store(scratch, 192, pz)
            cov_zx, cov_zy = n20 * t00 + n21 * t01 + n22 * t02, n20 * t10 + n21 * t11 + n22 * t12
            store(scratch, 208, (cov_yy * cov_zx - cov_xy * cov_zy) * inverse_det)
            store(scratch, 224, (cov_xx * cov_zy - cov_xy * cov_zx) * inverse_det)
            for i in range(min(16, count - g)):
                record = (g + i) * RECORD
                for k in range(7):
                    records[record + k] = scratch[16 * k + i]
                for k in range(FEATURES):
                    features[(g + i) * FEATURES + k] = scratch[144 + 16 * k + i]
                depths[g + i] = scratch[192 + i]
                slopes[2 * (g + i)], slopes[2 * (g + i) + 1] = scratch[208 + i], scratch[224 + i]
                u, v, ru, rv = scratch[i], scratch[16 + i], scratch[112 + i], scratch[128 + i]
                areas[g + i] = 0
                # Comparisons fail for what is not a number, so that nothing undefined is ever rounded to a tile.
                if scratch[96 + i] > 0 and u + ru > 0 and u - ru < tiles_x * TILE and v + rv > 0 and v - rv < tiles_y * TILE:
                    x0, y0 = int(max(u - ru, F(0))) // TILE, int(max(v - rv, F(0))) // TILE
                    x1 = min(int(min(u + ru, F(1e8))) // TILE + 1, tiles_x)
                    y1 = min(int(min(v + rv, F(1e8))) // TILE + 1, tiles_y)
                    rectangles[4 * (g + i)], rectangles[4 * (g + i) + 1] = x0, y0
                    rectangles[4 * (g + i) + 2], rectangles[4 * (g + i) + 3] = x1, y1
                    areas[g + i] = max(x1 - x0, 0) * max(y1 - y0, 0)


@kernel
def sort_by_depth(count, areas, depths, order, other, slots):
    """Fills `order` with the visible Gaussians, nearest first (equal depths by number), and `slots` with the first gradient slot of each.

    Returns (visible Gaussians, slots). A radix sort of the bits of positive floats, eleven at a time.
    """
    keys = depths.view(np.uint32)
    histogram = np.zeros((3, 2048), np.int64)
    visible, needed = 0, 0
    for g in range(count):
        slots[g] = needed
        needed += areas[g]
        if areas[g] > 0:
            other[visible] = g
            visible += 1
            key = keys[g]
            histogram[0, key & 2047] += 1
            histogram[1, (key >> 11) & 2047] += 1
            histogram[2, key >> 22] += 1
    for digit in range(3):
        start = 0
        for value in range(2048):
            here = histogram[digit, value]
            histogram[digit, value] = start
            start += here
        shift = np.uint32(11 * digit)
        source, target = (other, order) if digit % 2 == 0 else (order, other)
        for i in range(visible):
            g = source[i]
            value = (keys[g] >> shift) & np.uint32(2047)
            target[histogram[digit, value]] = g
            histogram[digit, value] += 1
    return visible, needed


# ---------------------------------------------------------------- binning


@kernel
def count_tiles(counter, visible, order, records, rectangles, slots, tiles_x, masks, counts):
    """Which 4 x 4 blocks of which tiles each ellipse reaches (bits of `masks`, by slot), and tiles' entries for each band of the order."""
    tiles = counts.shape[1]
    column, row = block_x() * _FOUR + HALF, block_y() * _FOUR + HALF  # first pixel centre of each block
    while True:
        band = take(counter)
        if band >= BANDS:
            break
        for tile in range(tiles):
            counts[band, tile] = 0
        for rank in range(band * visible // BANDS, (band + 1) * visible // BANDS):
            g = order[rank]
            record = g * RECORD
            u, v = at(records, record), at(records, record + 1)
            a, b, c = at(records, record + 2), at(records, record + 3), at(records, record + 4)
            most = at(records, record + 6) * F(1.0001) + F(1e-4)  # rounding may not lose a pixel
            to_y, to_x = -b / c, -b / a
            slot = slots[g]
            for ty in range(rectangles[4 * g + 1], rectangles[4 * g + 3]):
                low_y = row + (F(ty * TILE) - v)
                high_y = low_y + _THREE
                near_y = least(greatest(low_y, F(0)), high_y)
                for tx in range(rectangles[4 * g], rectangles[4 * g + 2]):
                    low_x = column + (F(tx * TILE) - u)
                    high_x = low_x + _THREE
                    # The least exponent over a rectangle lies on the side nearest the centre, in x or in y.
                    near_x = least(greatest(low_x, F(0)), high_x)
                    best_y = least(greatest(to_y * near_x, low_y), high_y)
                    best_x = least(greatest(to_x * near_y, low_x), high_x)
                    first = HALF * (a * near_x * near_x + c * best_y * best_y) + b * near_x * best_y
                    second = HALF * (a * best_x * best_x + c * near_y * near_y) + b * best_x * near_y
                    mask = bits(least(first, second) <= spread(most))
                    masks[slot] = mask
                    slot += 1
                    if mask != 0:
                        counts[band, ty * tiles_x + tx] += 1


@kernel
def start_tiles(counts, starts):
    """Turns counts into positions: tile by tile and, in a tile, band by band, so that every tile's entries end up in depth order."""
    position = 0
    for tile in range(counts.shape[1]):
        starts[tile] = position
        for band in range(BANDS):
            here = counts[band, tile]
            counts[band, tile] = position
            position += here
    starts[counts.shape[1]] = position
    return position


@kernel
def fill_tiles(counter, visible, order, rectangles, slots, tiles_x, masks, counts, entries):
    """Entries of the tiles: (Gaussian, slot, mask)."""
    while True:
        band = take(counter)
        if band >= BANDS:
            break
        for rank in range(band * visible // BANDS, (band + 1) * visible // BANDS):
            g = order[rank]
            slot = slots[g]
            for ty in range(rectangles[4 * g + 1], rectangles[4 * g + 3]):
                for tx in range(rectangles[4 * g], rectangles[4 * g + 2]):
                    if masks[slot] != 0:
                        tile = ty * tiles_x + tx
                        position = counts[band, tile]
                        counts[band, tile] = position + 1
                        entries[3 * position], entries[3 * position + 1], entries[3 * position + 2] = g, slot, masks[slot]
                    slot += 1


# ---------------------------------------------------------------- compositing


@kernel
def compose(
    counter,
    tile_order,
    starts,
    longest,
    entries,
    records,
    features,
    tiles_x,
    width,
    height,
    stride,
    crossing,
    slopes,
    planes,
    crossed,
    reached,
):
    """Front-to-back compositing into `planes` (four features, alpha), `stride` x rows each. `reached`: the blocks that an entry changed.

    The last feature is a plane over the picture: its value at the Gaussian's centre and its `slopes` by x and y. With a `crossing` (not
    None), `crossed` gets it from the Gaussian at which transmittance falls to that.
    """
    area = planes.shape[0] // PLANES
    lists = np.empty((16, longest), np.int32)
    lengths = np.empty(16, np.int64)
    column, row = block_x() + HALF, block_y() + HALF
    none = zeros()
    while True:
        number = take(counter)
        if number >= len(tile_order):
            break
        tile = tile_order[number]
        start, end = starts[tile], starts[tile + 1]
        for block in range(16):
            lengths[block] = 0
        for entry in range(start, end):
            mask = np.int64(entries[3 * entry + 2])
            reached[entry] = 0
            while mask != 0:
                block = lowest_bit(mask)
                lists[block, lengths[block]] = entry
                lengths[block] += 1
                mask &= mask - 1
        for block in range(16):
            x0, y0 = (tile % tiles_x) * TILE + (block & 3) * 4, (tile // tiles_x) * TILE + (block >> 2) * 4
            x, y = column + F(x0), row + F(y0)
            transmittance = where((x < F(width)) & (y < F(height)), spread(ONE), none)
            f0, f1, f2, f3, alpha = none, none, none, none, none
            median = none
            for i in range(lengths[block]):
                entry = lists[block, i]
                g = entries[3 * entry]
                record, feature = g * RECORD, g * FEATURES
                dx, dy = x - at(records, record), y - at(records, record + 1)
                sigma = HALF * (at(records, record + 2) * dx * dx + at(records, record + 4) * dy * dy) + at(records, record + 3) * dx * dy
                opaque = least(at(records, record + 5) * falloff(sigma), MOST_ALPHA)
                opaque = where(sigma <= at(records, record + 6), opaque, none)
                weight = transmittance * opaque
                left = transmittance - weight
                going = left > LEAST_TRANSMITTANCE
                weight = where(going, weight, none)
                last = at(features, feature + 3) + at(slopes, 2 * g) * dx + at(slopes, 2 * g + 1) * dy
                if crossing is not None:
                    median = where((transmittance > crossing) & (left <= crossing) & going, last, median)
                transmittance = where(going, left, none)
                f0 = f0 + weight * at(features, feature)
                f1 = f1 + weight * at(features, feature + 1)
                f2 = f2 + weight * at(features, feature + 2)
                f3 = f3 + weight * last
                alpha = alpha + weight
                if bits(weight > F(0)) != 0:
                    reached[entry] |= 1 << block
                elif bits(transmittance > F(0)) == 0:
                    break
            corner = y0 * stride + x0
            store_block(planes, corner, stride, f0)
            store_block(planes, area + corner, stride, f1)
            store_block(planes, 2 * area + corner, stride, f2)
            store_block(planes, 3 * area + corner, stride, f3)
            store_block(planes, 4 * area + corner, stride, alpha)
            if crossing is not None:
                store_block(crossed, corner, stride, median)


@kernel
def compose_back(
    counter,
    tile_order,
    starts,
    entries,
    records,
    features,
    slopes,
    tiles_x,
    width,
    height,
    stride,
    background,
    planes,
    gradients,
    reached,
    slots,
):
    """Gradient slots from the gradients of `planes`: 3DGS's backward pass, run front to back like the forward pass.

    With R the part of dL/dC . C that lies behind a Gaussian, dL/dalpha = T G - R / (1 - alpha), where G is the gradient's product with its
    features; R is what is left of the pixel's total after taking off each weight's share, so nothing needs to be divided back out.
    `gradients` has the layout of `planes`; the picture was composed on `background` (for the first three features).
    """
    area = planes.shape[0] // PLANES
    state = np.empty(7 * 256, np.float32)  # for each block: transmittance, R, gradients of four features and of alpha
    column, row = block_x() + HALF, block_y() + HALF
    none = zeros()
    while True:
        number = take(counter)
        if number >= len(tile_order):
            break
        tile = tile_order[number]
        if starts[tile] == starts[tile + 1]:
            continue
        left_edge, top_edge = (tile % tiles_x) * TILE, (tile // tiles_x) * TILE
        for block in range(16):
            x0, y0 = left_edge + (block & 3) * 4, top_edge + (block >> 2) * 4
            corner, here = y0 * stride + x0, block * 112
            g0, g1 = load_block(gradients, corner, stride), load_block(gradients, area + corner, stride)
            g2, g3 = load_block(gradients, 2 * area + corner, stride), load_block(gradients, 3 * area + corner, stride)
            ga = load_block(gradients, 4 * area + corner, stride)
            ga = ga - at(background, 0) * g0 - at(background, 1) * g1 - at(background, 2) * g2
            rest = g0 * load_block(planes, corner, stride) + g1 * load_block(planes, area + corner, stride)
            rest = rest + g2 * load_block(planes, 2 * area + corner, stride) + g3 * load_block(planes, 3 * area + corner, stride)
            rest = rest + ga * load_block(planes, 4 * area + corner, stride)
            x, y = column + F(x0), row + F(y0)
            store(state, here, where((x < F(width)) & (y < F(height)), spread(ONE), none))
            store(state, here + 16, rest)
            store(state, here + 32, g0)
            store(state, here + 48, g1)
            store(state, here + 64, g2)
            store(state, here + 80, g3)
            store(state, here + 96, ga)
        for entry in range(starts[tile], starts[tile + 1]):
            mask = np.int64(reached[entry])
            slot = entries[3 * entry + 1] * SLOT
            if mask == 0:
                store(slots, slot, none)
                continue
            g = entries[3 * entry]
            record, feature = g * RECORD, g * FEATURES
            a, b, c = at(records, record + 2), at(records, record + 3), at(records, record + 4)
            opacity, most = at(records, record + 5), at(records, record + 6)
            c0, c1, c2, c3 = at(features, feature), at(features, feature + 1), at(features, feature + 2), at(features, feature + 3)
            slope_x, slope_y = at(slopes, 2 * g), at(slopes, 2 * g + 1)
            from_x, from_y = column + (F(left_edge) - at(records, record)), row + (F(top_edge) - at(records, record + 1))
            d0, d1, d2, d3 = none, none, none, none
            s1, sx, sy, sxx, sxy, syy, zx, zy = none, none, none, none, none, none, none, none
            while mask != 0:
                block = lowest_bit(mask)
                mask &= mask - 1
                here = block * 112
                dx, dy = from_x + F((block & 3) * 4), from_y + F((block >> 2) * 4)
                sigma = HALF * (a * dx * dx + c * dy * dy) + b * dx * dy
                raw = opacity * falloff(sigma)
                opaque = where(sigma <= most, least(raw, MOST_ALPHA), none)
                transmittance = load(state, here)
                weight = transmittance * opaque
                left = transmittance - weight
                going = left > LEAST_TRANSMITTANCE
                weight = where(going, weight, none)
                g0, g1, g2, g3 = load(state, here + 32), load(state, here + 48), load(state, here + 64), load(state, here + 80)
                last = c3 + slope_x * dx + slope_y * dy
                product = c0 * g0 + c1 * g1 + c2 * g2 + last * g3 + load(state, here + 96)
                rest = load(state, here + 16) - weight * product
                store(state, here, where(going, left, none))
                store(state, here + 16, rest)
                d0 = d0 + weight * g0
                d1 = d1 + weight * g1
                d2 = d2 + weight * g2
                by_last = weight * g3
                d3 = d3 + by_last
                zx = zx + by_last * dx
                zy = zy + by_last * dy
                by_sigma = raw * (rest / (ONE - opaque) - transmittance * product)  # dL/dsigma = -alpha dL/dalpha
                by_sigma = where((weight > F(0)) & (raw < MOST_ALPHA), by_sigma, none)
                s1 = s1 + by_sigma
                along_x, along_y = by_sigma * dx, by_sigma * dy
                sx = sx + along_x
                sy = sy + along_y
                sxx = sxx + along_x * dx
                sxy = sxy + along_x * dy
                syy = syy + along_y * dy
            store(slots, slot, totals(d0, d1, d2, d3, s1, sx, sy, sxx, sxy, syy, zx, zy))


# ---------------------------------------------------------------- projection, backward


@kernel
def sum_slots(areas, slots, masks, gradients, g, count, scratch):
    """The slots of sixteen Gaussians, summed, as columns: scratch[16 k + i] is sum k of Gaussian g + i."""
    for i in range(16):
        sums = zeros()
        if g + i < count:
            for slot in range(slots[g + i], slots[g + i] + areas[g + i]):
                if masks[slot] != 0:
                    sums = sums + load(gradients, slot * SLOT)
        store(scratch, 256 + 16 * i, sums)
    for k in range(12):
        for i in range(16):
            scratch[16 * k + i] = scratch[256 + 16 * i + k]


@kernel
def project_back(
    counter,
    count,
    parameters,
    stride,
    degree,
    camera,
    records,
    areas,
    slots,
    masks,
    slot_gradients,
    colored,
    more_geometry,
    gradients,
    screen,
):
    """The gradient matrix from gradient slots. `screen` gets the length of each Gaussian's gradient by its place in the picture, in pixels.

    `colored`: the four features are red, green, blue and depth; otherwise they are the caller's own, and their sums go to `screen`'s
    place, four to a Gaussian, while geometry is added to what `gradients` holds already (`more_geometry`).
    """
    scratch = np.empty(512, np.float32)
    values, by_x, by_y, by_z = np.empty(256, np.float32), np.empty(256, np.float32), np.empty(256, np.float32), np.empty(256, np.float32)
    none = zeros()
    while True:
        first = take(counter) * CHUNK
        if first >= count:
            break
        for g in range(first, min(first + CHUNK, stride), 16):
            sum_slots(areas, slots, masks, slot_gradients, g, count, scratch)
            px, py, pz = camera_point(parameters, stride, g, camera)
            z = greatest(pz, NEAR)
            inverse_z = ONE / z
            qw, qx, qy, qz, q_inverse = unit_quaternion(parameters, stride, g)
            r00, r01, r02, r10, r11, r12, r20, r21, r22 = rotation_of(qw, qx, qy, qz)
            s0 = exponential(load(parameters, 7 * stride + g))
            s1 = exponential(load(parameters, 8 * stride + g))
            s2 = exponential(load(parameters, 9 * stride + g))
            n00, n10, n20 = turned(camera, r00 * s0, r10 * s0, r20 * s0)
            n01, n11, n21 = turned(camera, r01 * s1, r11 * s1, r21 * s1)
            n02, n12, n22 = turned(camera, r02 * s2, r12 * s2, r22 * s2)
            ratio_x, ratio_y = px * inverse_z, py * inverse_z
            slope_x = least(greatest(ratio_x, at(camera, 19)), at(camera, 20))
            slope_y = least(greatest(ratio_y, at(camera, 21)), at(camera, 22))
            jx, jy = at(camera, 12) * inverse_z, at(camera, 13) * inverse_z
            t00, t01, t02 = jx * (n00 - slope_x * n20), jx * (n01 - slope_x * n21), jx * (n02 - slope_x * n22)
            t10, t11, t12 = jy * (n10 - slope_y * n20), jy * (n11 - slope_y * n21), jy * (n12 - slope_y * n22)
            cov_xx = t00 * t00 + t01 * t01 + t02 * t02 + DILATION
            cov_xy = t00 * t10 + t01 * t11 + t02 * t12
            cov_yy = t10 * t10 + t11 * t11 + t12 * t12 + DILATION
            inverse_det = ONE / (cov_xx * cov_yy - cov_xy * cov_xy)
            a, b, c = cov_yy * inverse_det, none - cov_xy * inverse_det, cov_xx * inverse_det
            opacity = ONE / (ONE + exponential(none - load(parameters, 10 * stride + g)))

            # Moments of dL/dsigma: sigma = a dx^2 / 2 + b dx dy + c dy^2 / 2, dx = x - u.
            m1, mx, my = load(scratch, 64), load(scratch, 80), load(scratch, 96)
            du, dv = none - (a * mx + b * my), none - (b * mx + c * my)
            da, db, dc = HALF * load(scratch, 112), load(scratch, 128), HALF * load(scratch, 144)
            d_czx, d_czy = none, none
            if colored:
                # The plane of depth: slopes (a czx + b czy, b czx + c czy) by the picture, through the centre.
                czx, czy = n20 * t00 + n21 * t01 + n22 * t02, n20 * t10 + n21 * t11 + n22 * t12
                d_depth, d_zx, d_zy = load(scratch, 48), load(scratch, 160), load(scratch, 176)
                du, dv = du - (a * czx + b * czy) * d_depth, dv - (b * czx + c * czy) * d_depth
                da, db, dc = da + d_zx * czx, db + d_zx * czy + d_zy * czx, dc + d_zy * czy
                d_czx, d_czy = a * d_zx + b * d_zy, b * d_zx + c * d_zy
            d_logit = none - m1 * (ONE - opacity)  # dL/do = -m1 / o, times the sigmoid's o (1 - o)
            # dL/dcov = -Q dL/dQ Q for the inverse Q of cov.
            hb = HALF * db
            e0, e1 = a * da + b * hb, a * hb + b * dc
            e2, e3 = b * da + c * hb, b * hb + c * dc
            h0, h1, h2 = none - (e0 * a + e1 * b), none - (e0 * b + e1 * c), none - (e2 * b + e3 * c)
            u00, u01, u02 = TWO * (h0 * t00 + h1 * t10), TWO * (h0 * t01 + h1 * t11), TWO * (h0 * t02 + h1 * t12)
            u10, u11, u12 = TWO * (h1 * t00 + h2 * t10), TWO * (h1 * t01 + h2 * t11), TWO * (h1 * t02 + h2 * t12)
            u00, u01, u02 = u00 + d_czx * n20, u01 + d_czx * n21, u02 + d_czx * n22
            u10, u11, u12 = u10 + d_czy * n20, u11 + d_czy * n21, u12 + d_czy * n22
            d_slope_x = none - jx * (u00 * n20 + u01 * n21 + u02 * n22)
            d_slope_y = none - jy * (u10 * n20 + u11 * n21 + u12 * n22)
            inside_x = (ratio_x > at(camera, 19)) & (ratio_x < at(camera, 20))
            inside_y = (ratio_y > at(camera, 21)) & (ratio_y < at(camera, 22))
            d_slope_x, d_slope_y = where(inside_x, d_slope_x, none), where(inside_y, d_slope_y, none)
            d_px = (at(camera, 12) * du + d_slope_x) * inverse_z
            d_py = (at(camera, 13) * dv + d_slope_y) * inverse_z
            stretch = u00 * t00 + u01 * t01 + u02 * t02 + u10 * t10 + u11 * t11 + u12 * t12
            d_pz = none - stretch * inverse_z - d_px * ratio_x - d_py * ratio_y
            if colored:
                d_pz = d_pz + load(scratch, 48)
            d_mx, d_my, d_mz = turned_back(camera, d_px, d_py, d_pz)

            k0, k1 = jx * slope_x, jy * slope_y
            m00, m10, m20 = turned_back(camera, jx * u00, jy * u10, d_czx * t00 + d_czy * t10 - k0 * u00 - k1 * u10)
            m01, m11, m21 = turned_back(camera, jx * u01, jy * u11, d_czx * t01 + d_czy * t11 - k0 * u01 - k1 * u11)
            m02, m12, m22 = turned_back(camera, jx * u02, jy * u12, d_czx * t02 + d_czy * t12 - k0 * u02 - k1 * u12)
            m00, m10, m20 = m00 * s0, m10 * s0, m20 * s0
            m01, m11, m21 = m01 * s1, m11 * s1, m21 * s1
            m02, m12, m22 = m02 * s2, m12 * s2, m22 * s2
            d_s0 = m00 * r00 + m10 * r10 + m20 * r20
            d_s1 = m01 * r01 + m11 * r11 + m21 * r21
            d_s2 = m02 * r02 + m12 * r12 + m22 * r22
            d_w = TWO * (qy * m02 - qz * m01 + qz * m10 - qx * m12 - qy * m20 + qx * m21)
            d_x = TWO * (qy * m01 + qz * m02 + qy * m10 - qw * m12 + qz * m20 + qw * m21) - _FOUR * qx * (m11 + m22)
            d_y = TWO * (qx * m01 + qw * m02 + qx * m10 + qz * m12 - qw * m20 + qz * m21) - _FOUR * qy * (m00 + m22)
            d_z = TWO * (qx * m02 - qw * m01 + qw * m10 + qy * m12 + qx * m20 + qy * m21) - _FOUR * qz * (m00 + m11)
            radial = qw * d_w + qx * d_x + qy * d_y + qz * d_z

            if colored:
                ex, ey, ez = (
                    load(parameters, g) - at(camera, 16),
                    load(parameters, stride + g) - at(camera, 17),
                    load(parameters, 2 * stride + g) - at(camera, 18),
                )
                inverse = ONE / root(greatest(ex * ex + ey * ey + ez * ez, _TINY))
                ex, ey, ez = ex * inverse, ey * inverse, ez * inverse
                bases_of(degree, ex, ey, ez, values, by_x, by_y, by_z)
                d_ex, d_ey, d_ez = none, none, none
                for channel in range(3):
                    d_color = load(scratch, 16 * channel)
                    d_color = where(color_of(parameters, stride, g, degree, values, channel) > F(0), d_color, none)
                    for k in range((degree + 1) * (degree + 1)):
                        place = (SH + 3 * k + channel) * stride + g
                        store(gradients, place, load(values, 16 * k) * d_color)
                        if k > 0:
                            pull = d_color * load(parameters, place)
                            d_ex = d_ex + pull * load(by_x, 16 * k)
                            d_ey = d_ey + pull * load(by_y, 16 * k)
                            d_ez = d_ez + pull * load(by_z, 16 * k)
                along = d_ex * ex + d_ey * ey + d_ez * ez
                d_mx = d_mx + (d_ex - along * ex) * inverse
                d_my = d_my + (d_ey - along * ey) * inverse
                d_mz = d_mz + (d_ez - along * ez) * inverse
                store(screen, g, root(du * du + dv * dv))
            else:
                for i in range(min(16, count - g)):
                    for k in range(FEATURES):
                        screen[(g + i) * FEATURES + k] = scratch[16 * k + i]

            store(scratch, 0, d_mx)
            store(scratch, 16, d_my)
            store(scratch, 32, d_mz)
            store(scratch, 48, (d_w - qw * radial) * q_inverse)
            store(scratch, 64, (d_x - qx * radial) * q_inverse)
            store(scratch, 80, (d_y - qy * radial) * q_inverse)
            store(scratch, 96, (d_z - qz * radial) * q_inverse)
            store(scratch, 112, d_s0)
            store(scratch, 128, d_s1)
            store(scratch, 144, d_s2)
            store(scratch, 160, d_logit)
            for k in range(SH):
                gradient = load(scratch, 16 * k)
                if more_geometry:
                    gradient = gradient + load(gradients, k * stride + g)
                store(gradients, k * stride + g, gradient)


# ---------------------------------------------------------------- the whole pass


class Rasteriser:
    """Work buffers for drawing splats from one camera at a time, reused from call to call.

    `project` comes first, then `compose` for the picture, then `backward` for its gradients; each call overwrites what the one before
    returned. Not to be shared between threads; any number of Rasterisers may work at the same time.
    """

    def __init__(self, threads: int = THREADS):
        self.threads = threads
        self._buffers: dict[str, np.ndarray] = {}

    def buffer(self, name: str, size: int, dtype=np.float32) -> np.ndarray:
        """A flat array that lasts from call to call: fresh memory costs more in page faults than the work done in it."""
        held = self._buffers.get(name)
        if held is None or len(held) < size:
            held = self._buffers[name] = np.empty(size + size // 4, dtype)
        return held[:size]

    def project(self, parameters: Float[np.ndarray, "rows columns"], count: int, camera: Camera) -> None:
        """Projects, sorts and bins `count` Gaussians of a parameter matrix for a camera."""
        self.parameters, self.count = parameters.reshape(-1), count
        self.stride = parameters.shape[1]
        self.degree = round(((len(parameters) - SH) // 3) ** 0.5) - 1
        self.width, self.height = camera.width, camera.height
        self.tiles_x, self.tiles_y = -(-camera.width // TILE), -(-camera.height // TILE)
        self.row = self.tiles_x * TILE  # pixels a padded row
        self.area = self.row * self.tiles_y * TILE
        self.camera = camera_numbers(camera)
        self.records = self.buffer("records", count * RECORD)
        self.features = self.buffer("features", count * FEATURES)
        self.slopes = self.buffer("slopes", count * 2)
        rectangles = self.buffer("rectangles", count * 4, np.int32)
        self.areas = self.buffer("areas", count, np.int32)
        depths = self.buffer("depths", count)
        run(
            self.threads, project, count, self.parameters, self.stride, self.degree, self.camera, self.tiles_x, self.tiles_y,
            self.records, self.features, self.slopes, rectangles, self.areas, depths,
        )  # fmt: skip
        order, other = self.buffer("order", count, np.int32), self.buffer("other", count, np.int32)
        self.slots = self.buffer("slots", count, np.int64)
        visible, self.slot_count = sort_by_depth(count, self.areas, depths, order, other, self.slots)
        tiles = self.tiles_x * self.tiles_y
        self.masks = self.buffer("masks", self.slot_count, np.uint16)
        counts = self.buffer("counts", BANDS * tiles, np.int32).reshape(BANDS, tiles)
        run(self.threads, count_tiles, visible, order, self.records, rectangles, self.slots, self.tiles_x, self.masks, counts)
        self.starts = self.buffer("starts", tiles + 1, np.int32)
        self.entry_count = start_tiles(counts, self.starts)
        self.entries = self.buffer("entries", 3 * self.entry_count, np.int32)
        run(self.threads, fill_tiles, visible, order, rectangles, self.slots, self.tiles_x, self.masks, counts, self.entries)
        lengths = np.diff(self.starts)
        self.longest = int(lengths.max())
        self.tile_order = np.argsort(-lengths, kind="stable")  # the longest first, so that no thread is left with one at the end
        self.reached = self.buffer("reached", self.entry_count, np.int32)

    def compose(
        self, crossing: float | None = None, features: Float[np.ndarray, "n 4"] | None = None
    ) -> Float[np.ndarray, "5 rows columns"]:
        """Four feature planes (red, green, blue, depth, or `features`, N x 4) and alpha, padded to whole tiles, on black.

        With `crossing`, `self.crossed` becomes the depth at which transmittance falls to it (0 where it does not).
        """
        self.planes = self.buffer("planes", PLANES * self.area)
        self.composed = self.features if features is None else features.reshape(-1)
        if features is None:
            self.planar = self.slopes
        else:
            self.planar = self.buffer("no_slopes", 2 * self.count)
            self.planar[:] = 0
        self.crossed = self.buffer("crossed", self.area if crossing is not None else 1)
        run(
            self.threads, compose, self.tile_order, self.starts, self.longest, self.entries, self.records, self.composed, self.tiles_x,
            self.width, self.height, self.row, None if crossing is None else F(crossing), self.planar, self.planes, self.crossed,
            self.reached,
        )  # fmt: skip
        return self.planes.reshape(PLANES, -1, self.row)

    def backward(self, gradients: Float[np.ndarray, "5 rows columns"], background: Float[np.ndarray, "3"], result: np.ndarray, more=False):
        """Writes into `result` (like the parameters) the gradient of the last picture; returns the length of the one by screen place.

        For a picture of other features, adds (`more`) the geometry's part to `result` instead and returns the features' gradients, N x 4.
        """
        slot_gradients = self.buffer("slot_gradients", self.slot_count * SLOT)
        background = np.asarray(background, np.float32)
        run(
            self.threads, compose_back, self.tile_order, self.starts, self.entries, self.records, self.composed, self.planar, self.tiles_x,
            self.width, self.height, self.row, background, self.planes, gradients.reshape(-1), self.reached, slot_gradients,
        )  # fmt: skip
        colored = self.composed is self.features
        screen = self.buffer("screen", self.stride) if colored else self.buffer("feature_gradients", self.count * FEATURES)
        run(
            self.threads, project_back, self.count, self.parameters, self.stride, self.degree, self.camera, self.records, self.areas,
            self.slots, self.masks, slot_gradients, colored, more, result.reshape(-1), screen,
        )  # fmt: skip
        return screen[: self.count] if colored else screen.reshape(self.count, FEATURES)

    def cropped(self, planes: np.ndarray) -> np.ndarray:
        """Planes without the padding."""
        return planes.reshape(-1, self.area // self.row, self.row)[:, : self.height, : self.width]


def camera_numbers(camera: Camera) -> Float[np.ndarray, "23"]:
    """Rotation, translation, intrinsics, eye, and the slopes beyond which gsplat clamps the projection's derivative."""
    slack_x, slack_y = 0.15 * camera.width / camera.fx, 0.15 * camera.height / camera.fy
    return np.concatenate([
        camera.camera_from_world[:3, :3].ravel(), camera.camera_from_world[:3, 3],
        [camera.fx, camera.fy, camera.cx, camera.cy], camera.centre,
        [-camera.cx / camera.fx - slack_x, (camera.width - camera.cx) / camera.fx + slack_x],
        [-camera.cy / camera.fy - slack_y, (camera.height - camera.cy) / camera.fy + slack_y],
    ]).astype(np.float32)  # fmt: skip
