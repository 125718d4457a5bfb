"""Gaussian splatting on an NVIDIA GPU from wheels alone: the pictures and gradients of `raster_cpu`, of several views at once.

The kernels are NVIDIA Warp's: its wheel brings the compiler (NVRTC), so that neither nvcc nor a host compiler is needed. The same source
runs on the CPU, for tests. One thread composes one pixel; 32 threads that share a vector unit hold 8 x 4 neighbouring pixels, whose
gradients by one Gaussian are summed among them before they reach memory. Sums by atomics repeat closely, not bit by bit.

After 3D Gaussian Splatting (Kerbl et al. 2023, sections 4 to 6 and appendix C), with the conventions of `raster_cpu`: see there.
"""
# ruff: noqa: UP018  (in a Warp kernel `float(0.0)` is a variable; a literal would be a constant that no loop may change)

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import warp as wp
from jaxtyping import Float

from . import parallel
from .raster_cpu import DILATION, LEAST_ALPHA, LEAST_TRANSMITTANCE, LOG_SCALE, MOST_ALPHA, NEAR, OPACITY, QUATERNION, SH, TILE

wp.config.log_level = wp.LOG_WARNING
wp.config.kernel_cache_dir = str(Path(parallel._FOLDER) / "warp")  # beside the CPU's compiled kernels: writable, and this user's own
wp.set_module_options({"enable_backward": False, "default_grid_stride": False})

RECORD = 8  # floats of a projected Gaussian: u, v, conic a b c, opacity, largest exponent, nothing
FEATURES = 4  # red, green, blue, depth
PLANES = 5  # the features and alpha
SLOT = 16  # floats of a gradient slot, of which twelve are used: see `raster_cpu.SLOT`
PIXELS = TILE * TILE  # threads of a block: the pixels of one tile
GAUSSIANS = 64  # threads of a block where a thread has a Gaussian of all views
ROOM = 1.5  # entries that are made room for, by those that were last needed
SPARE = 4096

_EDGE = wp.constant(TILE)
_PIXELS = wp.constant(PIXELS)
_NEAR = wp.constant(float(NEAR))
_DILATION = wp.constant(float(DILATION))
_LEAST_ALPHA = wp.constant(float(LEAST_ALPHA))
_MOST_ALPHA = wp.constant(float(MOST_ALPHA))
_LEAST_LEFT = wp.constant(float(LEAST_TRANSMITTANCE))
_QUATERNION = wp.constant(QUATERNION)
_LOG_SCALE = wp.constant(LOG_SCALE)
_OPACITY = wp.constant(OPACITY)
_SH = wp.constant(SH)

if TYPE_CHECKING:  # Warp's types are values
    Floats = Any
    Table = Any
    Ints = Any
    Longs = Any
else:
    Floats = wp.array(dtype=wp.float32)
    Table = wp.array2d(dtype=wp.float32)
    Ints = wp.array(dtype=wp.int32)
    Longs = wp.array(dtype=wp.int64)


# ---------------------------------------------------------------- what one thread shares with the 31 beside it (on the CPU it is alone)


@wp.func_native("""
#ifdef __CUDA_ARCH__
    return __expf(-x);
#else
    return ::expf(-x);
#endif
""")
def falloff(x: float) -> float: ...


@wp.func_native("""
#ifdef __CUDA_ARCH__
    const float4 q = *reinterpret_cast<const float4*>(values.data + 4 * static_cast<long long>(i));
    return wp::vec_t<4, float>(q.x, q.y, q.z, q.w);
#else
    const float* q = values.data + 4 * static_cast<long long>(i);
    return wp::vec_t<4, float>(q[0], q[1], q[2], q[3]);
#endif
""")
def quad(values: Floats, i: int) -> wp.vec4:
    """Four neighbouring floats in one load."""


@wp.func_native("""
#ifdef __CUDA_ARCH__
    return __any_sync(0xffffffffu, yes) != 0;
#else
    return yes;
#endif
""")
def any_thread(yes: bool) -> bool: ...


@wp.func_native("""
#ifdef __CUDA_ARCH__
    for (int other = 16; other > 0; other >>= 1) value = max(value, __shfl_xor_sync(0xffffffffu, value, other));
#endif
    return value;
""")
def greatest_of_threads(value: int) -> int: ...


# The sum of twelve values over 32 threads with 13 exchanges: at each step a thread hands half of its values to its partner and takes over
# the partner's other half (a transposed butterfly), so that twelve threads end up with one total each and add them to memory at once.
@wp.func_native("""
    float v[12] = {d0, d1, d2, d3, d4, d5, d6, d7, d8, d9, d10, d11};
    float* place = slots.data + 16 * static_cast<long long>(slot);
#ifdef __CUDA_ARCH__
    const int lane = threadIdx.x & 31;
    const bool b16 = lane & 16, b8 = lane & 8, b4 = lane & 4, b2 = lane & 2;
#pragma unroll
    for (int k = 0; k < 6; ++k) {
        const float given = b16 ? v[k] : v[k + 6], kept = b16 ? v[k + 6] : v[k];
        v[k] = kept + __shfl_xor_sync(0xffffffffu, given, 16);
    }
#pragma unroll
    for (int k = 0; k < 3; ++k) {
        const float given = b8 ? v[k] : v[k + 3], kept = b8 ? v[k + 3] : v[k];
        v[k] = kept + __shfl_xor_sync(0xffffffffu, given, 8);
    }
    {
        const float g0 = b4 ? v[0] : v[2], k0 = b4 ? v[2] : v[0];
        const float g1 = b4 ? v[1] : 0.0f, k1 = b4 ? 0.0f : v[1];
        v[0] = k0 + __shfl_xor_sync(0xffffffffu, g0, 4);
        v[1] = k1 + __shfl_xor_sync(0xffffffffu, g1, 4);
    }
    const float given = b2 ? v[0] : v[1], kept = b2 ? v[1] : v[0];
    float total = kept + __shfl_xor_sync(0xffffffffu, given, 2);
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    const int last = (b4 ? 2 : 0) + (b2 ? 1 : 0);
    if (last < 3 && (lane & 1) == 0) atomicAdd(place + (b16 ? 6 : 0) + (b8 ? 3 : 0) + last, total);
#else
    for (int k = 0; k < 12; ++k) place[k] += v[k];
#endif
""")
def add_of_threads(
    slots: Floats,
    slot: int,
    d0: float,
    d1: float,
    d2: float,
    d3: float,
    d4: float,
    d5: float,
    d6: float,
    d7: float,
    d8: float,
    d9: float,
    d10: float,
    d11: float,
): ...


# ---------------------------------------------------------------- projection


@wp.struct
class Seen:
    """A Gaussian before one camera. `spread`: its axes times their lengths, as columns, in camera axes; `across`, `down`: their images."""

    point: wp.vec3
    inverse_z: float
    aim_x: float  # x / z within the picture's bounds
    aim_y: float
    spread: wp.mat33
    across: wp.vec3
    down: wp.vec3
    xx: float
    xy: float
    yy: float
    opacity: float


@wp.func
def row_of(m: wp.mat33, i: int) -> wp.vec3:
    return wp.vec3(m[i, 0], m[i, 1], m[i, 2])


@wp.func
def turn_of(cameras: Table, view: int) -> wp.mat33:
    return wp.mat33(
        cameras[view, 0], cameras[view, 1], cameras[view, 2], cameras[view, 3], cameras[view, 4], cameras[view, 5],
        cameras[view, 6], cameras[view, 7], cameras[view, 8],
    )  # fmt: skip


@wp.func
def rotation_of(q: wp.vec4) -> wp.mat33:
    """Of a unit quaternion, w first."""
    w = q[0]
    x = q[1]
    y = q[2]
    z = q[3]
    return wp.mat33(
        1.0 - 2.0 * (y * y + z * z), 2.0 * (x * y - w * z), 2.0 * (x * z + w * y),
        2.0 * (x * y + w * z), 1.0 - 2.0 * (x * x + z * z), 2.0 * (y * z - w * x),
        2.0 * (x * z - w * y), 2.0 * (y * z + w * x), 1.0 - 2.0 * (x * x + y * y),
    )  # fmt: skip


@wp.func
def mean_of(parameters: Table, g: int) -> wp.vec3:
    return wp.vec3(parameters[0, g], parameters[1, g], parameters[2, g])


@wp.func
def quaternion_of(parameters: Table, g: int) -> wp.vec4:
    k = _QUATERNION
    return wp.vec4(parameters[k, g], parameters[k + 1, g], parameters[k + 2, g], parameters[k + 3, g])


@wp.func
def lengths_of(parameters: Table, g: int) -> wp.vec3:
    k = _LOG_SCALE
    most = 80.0
    return wp.vec3(
        wp.exp(wp.clamp(parameters[k, g], -most, most)),
        wp.exp(wp.clamp(parameters[k + 1, g], -most, most)),
        wp.exp(wp.clamp(parameters[k + 2, g], -most, most)),
    )


@wp.func
def inverse_length(squared: float) -> float:
    return 1.0 / wp.sqrt(wp.max(squared, 1.0e-20))


@wp.func
def seen_by(parameters: Table, g: int, cameras: Table, view: int) -> Seen:
    s = Seen()
    turn = turn_of(cameras, view)
    s.point = turn * mean_of(parameters, g) + wp.vec3(cameras[view, 9], cameras[view, 10], cameras[view, 11])
    s.inverse_z = 1.0 / wp.max(s.point[2], _NEAR)
    q = quaternion_of(parameters, g)
    s.spread = turn * (rotation_of(q * inverse_length(wp.dot(q, q))) * wp.diag(lengths_of(parameters, g)))
    s.aim_x = wp.min(wp.max(s.point[0] * s.inverse_z, cameras[view, 19]), cameras[view, 20])
    s.aim_y = wp.min(wp.max(s.point[1] * s.inverse_z, cameras[view, 21]), cameras[view, 22])
    depths = row_of(s.spread, 2)
    s.across = (cameras[view, 12] * s.inverse_z) * (row_of(s.spread, 0) - s.aim_x * depths)
    s.down = (cameras[view, 13] * s.inverse_z) * (row_of(s.spread, 1) - s.aim_y * depths)
    s.xx = wp.dot(s.across, s.across) + _DILATION
    s.xy = wp.dot(s.across, s.down)
    s.yy = wp.dot(s.down, s.down) + _DILATION
    s.opacity = 1.0 / (1.0 + wp.exp(-wp.clamp(parameters[_OPACITY, g], -80.0, 80.0)))
    return s


@wp.func
def gaze(parameters: Table, g: int, cameras: Table, view: int) -> wp.vec3:
    """From the eye to the Gaussian."""
    return mean_of(parameters, g) - wp.vec3(cameras[view, 16], cameras[view, 17], cameras[view, 18])


@wp.func
def base_of(k: int, d: wp.vec3) -> float:
    """Real spherical harmonics of a unit direction (Sloan 2013), in the signs of 3D Gaussian Splatting."""
    x = d[0]
    y = d[1]
    z = d[2]
    outer = 2.285228997322329 * z * z - 0.4570457994644658
    value = float(0.28209479177387814)
    if k == 1:
        value = -0.48860251190292 * y
    elif k == 2:
        value = 0.48860251190292 * z
    elif k == 3:
        value = -0.48860251190292 * x
    elif k == 4:
        value = 1.092548430592079 * x * y
    elif k == 5:
        value = -1.092548430592079 * y * z
    elif k == 6:
        value = 0.9461746957575601 * z * z - 0.3153915652525201
    elif k == 7:
        value = -1.092548430592079 * x * z
    elif k == 8:
        value = 0.5462742152960395 * (x * x - y * y)
    elif k == 9:
        value = -0.5900435899266435 * y * (3.0 * x * x - y * y)
    elif k == 10:
        value = 2.890611442640554 * x * y * z
    elif k == 11:
        value = -y * outer
    elif k == 12:
        value = z * (1.865881662950577 * z * z - 1.119528997770346)
    elif k == 13:
        value = -x * outer
    elif k == 14:
        value = 1.445305721320277 * z * (x * x - y * y)
    elif k == 15:
        value = -0.5900435899266435 * x * (x * x - 3.0 * y * y)
    return value


@wp.func
def base_slope_of(k: int, d: wp.vec3) -> wp.vec3:
    """The derivative of `base_of` by the direction."""
    c1 = 0.48860251190292
    c2 = 1.092548430592079
    c3 = 0.5900435899266435
    c4 = 2.890611442640554
    x = d[0]
    y = d[1]
    z = d[2]
    outer = 2.285228997322329 * z * z - 0.4570457994644658
    by_x = float(0.0)
    by_y = float(0.0)
    by_z = float(0.0)
    if k == 1:
        by_y = -c1
    elif k == 2:
        by_z = c1
    elif k == 3:
        by_x = -c1
    elif k == 4:
        by_x = c2 * y
        by_y = c2 * x
    elif k == 5:
        by_y = -c2 * z
        by_z = -c2 * y
    elif k == 6:
        by_z = 2.0 * 0.9461746957575601 * z
    elif k == 7:
        by_x = -c2 * z
        by_z = -c2 * x
    elif k == 8:
        by_x = c2 * x
        by_y = -c2 * y
    elif k == 9:
        by_x = -6.0 * c3 * x * y
        by_y = -3.0 * c3 * (x * x - y * y)
    elif k == 10:
        by_x = c4 * y * z
        by_y = c4 * x * z
        by_z = c4 * x * y
    elif k == 11:
        by_y = -outer
        by_z = -4.570457994644658 * y * z
    elif k == 12:
        by_z = 5.597644988851731 * z * z - 1.119528997770346
    elif k == 13:
        by_x = -outer
        by_z = -4.570457994644658 * x * z
    elif k == 14:
        by_x = c4 * x * z
        by_y = -c4 * y * z
        by_z = 1.445305721320277 * (x * x - y * y)
    elif k == 15:
        by_x = -3.0 * c3 * (x * x - y * y)
        by_y = 6.0 * c3 * x * y
    return wp.vec3(by_x, by_y, by_z)


@wp.func
def coefficient_of(parameters: Table, g: int, k: int) -> wp.vec3:
    row = _SH + 3 * k
    return wp.vec3(parameters[row, g], parameters[row + 1, g], parameters[row + 2, g])


@wp.func
def color_of(parameters: Table, g: int, bases: int, direction: wp.vec3) -> wp.vec3:
    """Colour before clamping: 0.5 + sum of coefficients times bases."""
    color = wp.vec3(0.5, 0.5, 0.5)
    for k in range(bases):
        color += base_of(k, direction) * coefficient_of(parameters, g, k)
    return color


@wp.func
def touches(tile_x: int, tile_y: int, u: float, v: float, a: float, b: float, c: float, most: float) -> bool:
    """Whether an ellipse reaches a pixel centre's place in a tile: the exact test of `raster_cpu.count_tiles`."""
    low_x = float(tile_x * _EDGE) + 0.5 - u
    low_y = float(tile_y * _EDGE) + 0.5 - v
    high_x = low_x + float(_EDGE - 1)
    high_y = low_y + float(_EDGE - 1)
    # The least exponent over a rectangle lies on the side nearest the centre, in x or in y.
    near_x = wp.clamp(0.0, low_x, high_x)
    near_y = wp.clamp(0.0, low_y, high_y)
    best_y = wp.clamp(-b / c * near_x, low_y, high_y)
    best_x = wp.clamp(-b / a * near_y, low_x, high_x)
    first = 0.5 * (a * near_x * near_x + c * best_y * best_y) + b * near_x * best_y
    second = 0.5 * (a * best_x * best_x + c * near_y * near_y) + b * best_x * near_y
    return wp.min(first, second) <= most * 1.0001 + 1.0e-4  # rounding may not lose a pixel


@wp.func
def tiles_of(u: float, v: float, reach_x: float, reach_y: float, tiles_x: int, tiles_y: int) -> wp.vec4i:
    """The tiles x0, y0, x1, y1 of a rectangle; empty where it misses the picture or is not a number."""
    size = float(_EDGE)
    if not (u + reach_x > 0.0 and u - reach_x < float(tiles_x) * size and v + reach_y > 0.0 and v - reach_y < float(tiles_y) * size):
        return wp.vec4i(0, 0, 0, 0)
    x0 = int(wp.max(u - reach_x, 0.0)) / _EDGE
    y0 = int(wp.max(v - reach_y, 0.0)) / _EDGE
    x1 = wp.min(int(wp.min(u + reach_x, 1.0e8)) / _EDGE + 1, tiles_x)
    y1 = wp.min(int(wp.min(v + reach_y, 1.0e8)) / _EDGE + 1, tiles_y)
    return wp.vec4i(x0, y0, x1, y1)


@wp.kernel
def project(
    parameters: Table,
    cameras: Table,
    count: int,
    bases: int,
    tiles_x: int,
    tiles_y: int,
    records: Floats,
    features: Floats,
    slopes: Floats,
    reaches: Floats,
    areas: Ints,
):
    """Every Gaussian before every camera: `records`, `features`, `slopes` of its depth by the picture, half sizes, and tiles it reaches."""
    i = wp.tid()
    view = i / count
    g = i - view * count
    s = seen_by(parameters, g, cameras, view)
    inverse = 1.0 / (s.xx * s.yy - s.xy * s.xy)
    u = cameras[view, 12] * s.point[0] * s.inverse_z + cameras[view, 14]
    v = cameras[view, 13] * s.point[1] * s.inverse_z + cameras[view, 15]
    a = s.yy * inverse
    b = -s.xy * inverse
    c = s.xx * inverse
    most = wp.log(s.opacity / _LEAST_ALPHA)  # an exponent above this brings alpha under 1/255: the opacity-aware extent
    area = int(0)
    if s.point[2] > _NEAR and most > 0.0:
        reach_x = wp.sqrt(2.0 * most * s.xx)
        reach_y = wp.sqrt(2.0 * most * s.yy)
        box = tiles_of(u, v, reach_x, reach_y, tiles_x, tiles_y)
        for y in range(box[1], box[3]):
            for x in range(box[0], box[2]):
                if touches(x, y, u, v, a, b, c, most):
                    area += 1
        reaches[2 * i] = reach_x
        reaches[2 * i + 1] = reach_y
    areas[i] = area
    if area > 0:
        records[8 * i] = u
        records[8 * i + 1] = v
        records[8 * i + 2] = a
        records[8 * i + 3] = b
        records[8 * i + 4] = c
        records[8 * i + 5] = s.opacity
        records[8 * i + 6] = most
        depths = row_of(s.spread, 2)
        zx = wp.dot(depths, s.across)
        zy = wp.dot(depths, s.down)
        slopes[2 * i] = a * zx + b * zy
        slopes[2 * i + 1] = b * zx + c * zy
        direction = gaze(parameters, g, cameras, view)
        color = color_of(parameters, g, bases, direction * inverse_length(wp.dot(direction, direction)))
        features[4 * i] = wp.max(color[0], 0.0)
        features[4 * i + 1] = wp.max(color[1], 0.0)
        features[4 * i + 2] = wp.max(color[2], 0.0)
        features[4 * i + 3] = s.point[2]


@wp.kernel
def list_entries(
    records: Floats,
    features: Floats,
    reaches: Floats,
    areas: Ints,
    ends: Longs,
    count: int,
    tiles_x: int,
    tiles_y: int,
    room: wp.int64,
    keys: Longs,
    entries: Ints,
):
    """One entry for each tile that a Gaussian reaches: its number, and (tile, depth) to sort by. Those without room are left out."""
    i = wp.tid()
    if areas[i] == 0:
        return
    place = ends[i] - wp.int64(areas[i])
    first_tile = (i / count) * tiles_x * tiles_y
    depth = wp.int64(wp.cast(features[4 * i + 3], wp.uint32))  # the bits of positive floats are in their order
    head = quad(records, 2 * i)
    tail = quad(records, 2 * i + 1)
    box = tiles_of(head[0], head[1], reaches[2 * i], reaches[2 * i + 1], tiles_x, tiles_y)
    for y in range(box[1], box[3]):
        for x in range(box[0], box[2]):
            if touches(x, y, head[0], head[1], head[2], head[3], tail[0], tail[2]):
                if place < room:
                    keys[place] = (wp.int64(first_tile + y * tiles_x + x) << wp.int64(32)) | depth
                    entries[place] = i
                place += wp.int64(1)


@wp.kernel
def close_list(ends: Longs, tiles: int, keys: Longs):
    """Places that hold no entry sort behind all tiles."""
    i = wp.tid()
    if wp.int64(i) >= ends[ends.shape[0] - 1]:
        keys[i] = wp.int64(tiles) << wp.int64(32)


@wp.kernel
def find_tiles(keys: Longs, count: int, starts: Ints, stops: Ints):
    i = wp.tid()
    tile = int(keys[i] >> wp.int64(32))
    if i == 0 or int(keys[i - 1] >> wp.int64(32)) != tile:
        starts[tile] = i
    if i == count - 1 or int(keys[i + 1] >> wp.int64(32)) != tile:
        stops[tile] = i + 1


# ---------------------------------------------------------------- compositing


@wp.func
def pixel_of(i: int, tiles_x: int, tiles_y: int) -> wp.vec4i:
    """Tile (counted through all views), view, column and row of a thread: 32 threads hold 8 x 4 pixels, and eight such groups a tile."""
    number = i / _PIXELS
    tile = number % (tiles_x * tiles_y)
    within = i % _PIXELS
    lane = within % 32
    group = within / 32
    x = (tile % tiles_x) * _EDGE + (group % 2) * 8 + lane % 8
    y = (tile / tiles_x) * _EDGE + (group / 2) * 4 + lane / 8
    return wp.vec4i(number, number / (tiles_x * tiles_y), x, y)


@wp.func
def first_plane(view: int, x: int, y: int, width: int, height: int) -> int:
    """Where a pixel's red lies in planes (view, plane, row, column)."""
    return view * 5 * width * height + y * width + x


@wp.func
def exponent(head: wp.vec4, tail: wp.vec4, dx: float, dy: float) -> float:
    """How far a place is from a Gaussian's centre: -log of its share in the opacity. head, tail: its record."""
    return 0.5 * (head[2] * dx * dx + tail[0] * dy * dy) + head[3] * dx * dy


@wp.kernel
def compose(
    starts: Ints,
    stops: Ints,
    entries: Ints,
    records: Floats,
    features: Floats,
    slopes: Floats,
    tiles_x: int,
    tiles_y: int,
    width: int,
    height: int,
    planes: Floats,
    lasts: Ints,
):
    """Front-to-back compositing into `planes` (view, plane, row, column). `lasts`: one past the last entry that each pixel took."""
    i = wp.tid()
    here = pixel_of(i, tiles_x, tiles_y)
    if here[2] >= width or here[3] >= height:
        lasts[i] = 0
        return
    x = float(here[2]) + 0.5
    y = float(here[3]) + 0.5
    transmittance = float(1.0)
    f0 = float(0.0)
    f1 = float(0.0)
    f2 = float(0.0)
    f3 = float(0.0)
    alpha = float(0.0)
    last = int(0)
    for e in range(starts[here[0]], stops[here[0]]):
        r = entries[e]
        head = quad(records, 2 * r)
        tail = quad(records, 2 * r + 1)
        dx = x - head[0]
        dy = y - head[1]
        sigma = exponent(head, tail, dx, dy)
        if sigma <= tail[2]:
            weight = transmittance * wp.min(tail[1] * falloff(sigma), _MOST_ALPHA)
            left = transmittance - weight
            if left <= _LEAST_LEFT:
                break
            feature = quad(features, r)
            f0 += weight * feature[0]
            f1 += weight * feature[1]
            f2 += weight * feature[2]
            f3 += weight * (feature[3] + slopes[2 * r] * dx + slopes[2 * r + 1] * dy)
            alpha += weight
            transmittance = left
            last = e + 1
    area = width * height
    place = first_plane(here[1], here[2], here[3], width, height)
    planes[place] = f0
    planes[place + area] = f1
    planes[place + 2 * area] = f2
    planes[place + 3 * area] = f3
    planes[place + 4 * area] = alpha
    lasts[i] = last


@wp.kernel
def compose_back(
    starts: Ints,
    entries: Ints,
    records: Floats,
    features: Floats,
    slopes: Floats,
    lasts: Ints,
    tiles_x: int,
    tiles_y: int,
    width: int,
    height: int,
    planes: Floats,
    gradients: Floats,
    slots: Floats,
):
    """Adds to `slots` the gradients of `planes`, front to back as `raster_cpu.compose_back` explains."""
    i = wp.tid()
    here = pixel_of(i, tiles_x, tiles_y)
    x = float(here[2]) + 0.5
    y = float(here[3]) + 0.5
    last = lasts[i]
    transmittance = float(1.0)
    rest = float(0.0)
    g0 = float(0.0)
    g1 = float(0.0)
    g2 = float(0.0)
    g3 = float(0.0)
    ga = float(0.0)
    if last > 0:
        area = width * height
        place = first_plane(here[1], here[2], here[3], width, height)
        g0 = gradients[place]
        g1 = gradients[place + area]
        g2 = gradients[place + 2 * area]
        g3 = gradients[place + 3 * area]
        ga = gradients[place + 4 * area]
        rest = g0 * planes[place] + g1 * planes[place + area] + g2 * planes[place + 2 * area]
        rest += g3 * planes[place + 3 * area] + ga * planes[place + 4 * area]
    # Neighbouring threads stay together from here on, since they add up their shares.
    for e in range(starts[here[0]], greatest_of_threads(last)):
        r = entries[e]
        head = quad(records, 2 * r)
        tail = quad(records, 2 * r + 1)
        dx = x - head[0]
        dy = y - head[1]
        sigma = exponent(head, tail, dx, dy)
        takes_part = e < last and sigma <= tail[2]
        if any_thread(takes_part):
            weight = float(0.0)
            by_sigma = float(0.0)
            if takes_part:
                raw = tail[1] * falloff(sigma)
                opaque = wp.min(raw, _MOST_ALPHA)
                weight = transmittance * opaque
                feature = quad(features, r)
                depth = feature[3] + slopes[2 * r] * dx + slopes[2 * r + 1] * dy
                product = feature[0] * g0 + feature[1] * g1 + feature[2] * g2 + depth * g3 + ga
                rest -= weight * product
                if raw < _MOST_ALPHA:
                    by_sigma = raw * (rest / (1.0 - opaque) - transmittance * product)  # dL/dsigma = -alpha dL/dalpha
                transmittance -= weight
            by_depth = weight * g3
            along_x = by_sigma * dx
            along_y = by_sigma * dy
            add_of_threads(
                slots, r, weight * g0, weight * g1, weight * g2, by_depth, by_sigma, along_x, along_y,
                along_x * dx, along_x * dy, along_y * dy, by_depth * dx, by_depth * dy,
            )  # fmt: skip


# ---------------------------------------------------------------- projection, backward


@wp.kernel
def project_back(
    parameters: Table,
    cameras: Table,
    views: int,
    bases: int,
    colored: bool,
    areas: Ints,
    slots: Floats,
    gradients: Table,
    pulled: Table,
):
    """The gradients of one Gaussian's parameters, summed over the views: the derivation of `raster_cpu.project_back`.

    `colored`: the features are red, green, blue and depth; else they are the caller's own, and only the geometry's part is found here.
    `pulled`: adds the length of its gradient by its place in the picture, in pixels, and in how many views there was one.
    """
    g = wp.tid()
    count = parameters.shape[1]
    rough = quaternion_of(parameters, g)
    shrink = inverse_length(wp.dot(rough, rough))
    q = rough * shrink
    rotation = rotation_of(q)
    lengths = lengths_of(parameters, g)
    d_mean = wp.vec3(0.0, 0.0, 0.0)
    d_axes = wp.mat33(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    d_logit = float(0.0)
    pull = float(0.0)
    seen = float(0.0)
    for view in range(views):
        i = view * count + g
        if areas[i] > 0:
            s = seen_by(parameters, g, cameras, view)
            turn = turn_of(cameras, view)
            d_feature = quad(slots, 4 * i)
            m = quad(slots, 4 * i + 1)  # moments of dL/dsigma: 1, x, y, xx
            n = quad(slots, 4 * i + 2)  # xy, yy, and dL/d(slopes)
            if not colored:
                d_feature = wp.vec4(0.0, 0.0, 0.0, 0.0)
                n = wp.vec4(n[0], n[1], 0.0, 0.0)
            inverse = 1.0 / (s.xx * s.yy - s.xy * s.xy)
            a = s.yy * inverse
            b = -s.xy * inverse
            c = s.xx * inverse
            # sigma = a dx^2 / 2 + b dx dy + c dy^2 / 2, dx = x - u.
            du = -(a * m[1] + b * m[2])
            dv = -(b * m[1] + c * m[2])
            da = 0.5 * m[3]
            db = n[0]
            dc = 0.5 * n[1]
            # The plane of depth: slopes (a zx + b zy, b zx + c zy) by the picture, through the centre.
            depths = row_of(s.spread, 2)
            zx = wp.dot(depths, s.across)
            zy = wp.dot(depths, s.down)
            d_depth = d_feature[3]
            du -= (a * zx + b * zy) * d_depth
            dv -= (b * zx + c * zy) * d_depth
            da += n[2] * zx
            db += n[2] * zy + n[3] * zx
            dc += n[3] * zy
            d_zx = a * n[2] + b * n[3]
            d_zy = b * n[2] + c * n[3]
            d_logit -= m[0] * (1.0 - s.opacity)
            # dL/dcov = -Q dL/dQ Q for the inverse Q of cov.
            half = 0.5 * db
            e0 = a * da + b * half
            e1 = a * half + b * dc
            e2 = b * da + c * half
            e3 = b * half + c * dc
            h0 = -(e0 * a + e1 * b)
            h1 = -(e0 * b + e1 * c)
            h2 = -(e2 * b + e3 * c)
            d_across = 2.0 * (h0 * s.across + h1 * s.down) + d_zx * depths
            d_down = 2.0 * (h1 * s.across + h2 * s.down) + d_zy * depths
            fx = cameras[view, 12]
            fy = cameras[view, 13]
            scale_x = fx * s.inverse_z
            scale_y = fy * s.inverse_z
            ratio_x = s.point[0] * s.inverse_z
            ratio_y = s.point[1] * s.inverse_z
            d_px = fx * du
            d_py = fy * dv
            if ratio_x > cameras[view, 19] and ratio_x < cameras[view, 20]:
                d_px -= scale_x * wp.dot(d_across, depths)
            if ratio_y > cameras[view, 21] and ratio_y < cameras[view, 22]:
                d_py -= scale_y * wp.dot(d_down, depths)
            d_px *= s.inverse_z
            d_py *= s.inverse_z
            stretch = wp.dot(d_across, s.across) + wp.dot(d_down, s.down)
            d_pz = d_depth - stretch * s.inverse_z - d_px * ratio_x - d_py * ratio_y
            d_mean += wp.transpose(turn) * wp.vec3(d_px, d_py, d_pz)
            d_row0 = scale_x * d_across
            d_row1 = scale_y * d_down
            d_row2 = d_zx * s.across + d_zy * s.down - s.aim_x * d_row0 - s.aim_y * d_row1
            d_spread = wp.mat33(
                d_row0[0], d_row0[1], d_row0[2], d_row1[0], d_row1[1], d_row1[2], d_row2[0], d_row2[1], d_row2[2]
            )  # fmt: skip
            d_axes += wp.transpose(turn) * d_spread

            gazing = gaze(parameters, g, cameras, view)
            nearness = inverse_length(wp.dot(gazing, gazing))
            direction = gazing * nearness
            color = color_of(parameters, g, bases, direction)
            d_color = wp.vec3(
                wp.where(color[0] > 0.0, d_feature[0], 0.0),
                wp.where(color[1] > 0.0, d_feature[1], 0.0),
                wp.where(color[2] > 0.0, d_feature[2], 0.0),
            )
            d_direction = wp.vec3(0.0, 0.0, 0.0)
            for k in range(bases):
                share = base_of(k, direction) * d_color
                for channel in range(3):
                    row = _SH + 3 * k + channel
                    gradients[row, g] = gradients[row, g] + share[channel]
                d_direction += wp.dot(d_color, coefficient_of(parameters, g, k)) * base_slope_of(k, direction)
            d_mean += nearness * (d_direction - wp.dot(d_direction, direction) * direction)
            strength = wp.sqrt(du * du + dv * dv)
            pull += strength
            seen += wp.where(strength > 0.0, 1.0, 0.0)

    d = d_axes * wp.diag(lengths)  # by the rotation times the logarithms of the lengths
    w = q[0]
    x = q[1]
    y = q[2]
    z = q[3]
    d_q = wp.vec4(
        2.0 * (y * d[0, 2] - z * d[0, 1] + z * d[1, 0] - x * d[1, 2] - y * d[2, 0] + x * d[2, 1]),
        2.0 * (y * d[0, 1] + z * d[0, 2] + y * d[1, 0] - w * d[1, 2] + z * d[2, 0] + w * d[2, 1]) - 4.0 * x * (d[1, 1] + d[2, 2]),
        2.0 * (x * d[0, 1] + w * d[0, 2] + x * d[1, 0] + z * d[1, 2] - w * d[2, 0] + z * d[2, 1]) - 4.0 * y * (d[0, 0] + d[2, 2]),
        2.0 * (x * d[0, 2] - w * d[0, 1] + w * d[1, 0] + y * d[1, 2] + x * d[2, 0] + y * d[2, 1]) - 4.0 * z * (d[0, 0] + d[1, 1]),
    )
    d_q = (d_q - wp.dot(q, d_q) * q) * shrink
    for k in range(3):
        gradients[k, g] = d_mean[k]
        gradients[_LOG_SCALE + k, g] = d[0, k] * rotation[0, k] + d[1, k] * rotation[1, k] + d[2, k] * rotation[2, k]
    for k in range(4):
        gradients[_QUATERNION + k, g] = d_q[k]
    gradients[_OPACITY, g] = d_logit
    pulled[0, g] = pulled[0, g] + pull
    pulled[1, g] = pulled[1, g] + seen


# ---------------------------------------------------------------- the whole pass


class Room:
    """How many entries to make room for, learnt from the last pictures of a fit, so that the host never waits for the GPU to count them.

    There is half as much again as was last known to be needed; the count comes back while later steps run. Should a step need more than
    there is room for, its picture lacks some Gaussians of its last view, and the next steps have the room.
    """

    def __init__(self) -> None:
        self.entries = 0
        self._heard: torch.Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def make(self, needed: torch.Tensor) -> int:
        """Places for a picture that needs `needed` (one int64, wherever it lies)."""
        if self.entries == 0 or not needed.is_cuda:
            self._fit(int(needed))
            return self.entries
        if self._event is not None and self._event.query():
            self._fit(int(self._heard))
            self._event = None
        if self._event is None:
            self._heard = torch.empty(1, dtype=torch.int64, pin_memory=True) if self._heard is None else self._heard
            self._heard.copy_(needed.reshape(1), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        return self.entries

    def _fit(self, needed: int) -> None:
        if not needed <= self.entries <= 2 * ROOM * needed + 2 * SPARE:
            self.entries = int(ROOM * needed) + SPARE


def _ctype(tensor: torch.Tensor):
    return wp.from_torch(tensor, requires_grad=False, return_ctype=True)


def launch(kernel, threads: int, tensors_and_numbers: list, device: torch.device, block: int = PIXELS) -> None:
    """Runs a kernel behind what torch has asked the device for."""
    inputs = [_ctype(one) if isinstance(one, torch.Tensor) else one for one in tensors_and_numbers]
    where = {"device": str(device), "stream": _stream(device)} if device.type == "cuda" else {"device": "cpu"}
    wp.launch(kernel, dim=threads, inputs=inputs, block_dim=block, record_tape=False, **where)


_STREAMS: dict[tuple[str, int], wp.Stream] = {}


def _stream(device: torch.device) -> wp.Stream:
    stream = torch.cuda.current_stream(device)
    key = (str(device), stream.cuda_stream)
    if key not in _STREAMS:
        _STREAMS[key] = wp.stream_from_torch(stream)
    return _STREAMS[key]


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameters, cameras, width, height, pulled, room, own):
        device, count, views = parameters.device, parameters.shape[1], len(cameras)
        parameters = parameters.detach().contiguous()
        bases = (len(parameters) - SH) // 3
        tiles_x, tiles_y = -(-width // TILE), -(-height // TILE)
        tiles, items = views * tiles_x * tiles_y, views * count

        def floats(*shape):
            return torch.empty(shape, dtype=torch.float32, device=device)

        records, features, slopes, reaches = floats(items * RECORD), floats(items * FEATURES), floats(items * 2), floats(items * 2)
        areas = torch.empty(items, dtype=torch.int32, device=device)
        seen = [parameters, cameras, count, bases, tiles_x, tiles_y, records, features, slopes, reaches, areas]
        launch(project, items, seen, device)
        ends = torch.cumsum(areas, 0, dtype=torch.int64)
        places = int(ends[-1]) if room is None else room.make(ends[-1])
        keys = torch.empty(2 * max(places, 1), dtype=torch.int64, device=device)
        entries = torch.empty(2 * max(places, 1), dtype=torch.int32, device=device)
        launch(list_entries, items, [records, features, reaches, areas, ends, count, tiles_x, tiles_y, places, keys, entries], device)
        ranges = torch.zeros((2, tiles + 1), dtype=torch.int32, device=device)
        if places:
            launch(close_list, places, [ends, tiles, keys], device)
            _sort(keys, entries, places, 32 + tiles.bit_length(), device)
            launch(find_tiles, places, [keys, places, ranges[0], ranges[1]], device)
        if own is not None:  # the depth that the list was sorted by is no longer needed
            features, slopes = own.detach().contiguous().view(-1), torch.zeros_like(slopes)
        planes = floats(views, PLANES, height, width)
        lasts = torch.empty(tiles * PIXELS, dtype=torch.int32, device=device)
        size = [tiles_x, tiles_y, width, height]
        composed = [ranges[0], ranges[1], entries, records, features, slopes, *size, planes.view(-1), lasts]
        launch(compose, tiles * PIXELS, composed, device)
        ctx.save_for_backward(parameters, cameras, records, features, slopes, areas, entries, ranges, planes, lasts)
        ctx.size, ctx.pulled, ctx.colored = size, pulled, own is None
        return planes

    @staticmethod
    def backward(ctx, gradients):
        parameters, cameras, records, features, slopes, areas, entries, ranges, planes, lasts = ctx.saved_tensors
        device = parameters.device
        slots = torch.zeros(len(areas) * SLOT, dtype=torch.float32, device=device)
        composed = [ranges[0], entries, records, features, slopes, lasts, *ctx.size]
        pulls = gradients.contiguous().view(-1)
        launch(compose_back, len(lasts), [*composed, planes.view(-1), pulls, slots], device)
        result = torch.zeros_like(parameters)
        pulled = torch.zeros((2, parameters.shape[1]), dtype=torch.float32, device=device) if ctx.pulled is None else ctx.pulled
        bases = (len(parameters) - SH) // 3
        projected = [parameters, cameras, len(cameras), bases, ctx.colored, areas, slots, result, pulled]
        launch(project_back, parameters.shape[1], projected, device, GAUSSIANS)
        by_own = None if ctx.colored else slots.view(len(cameras), -1, SLOT)[..., :FEATURES]
        return result, None, None, None, None, None, by_own


def _sort(keys: torch.Tensor, entries: torch.Tensor, count: int, bits: int, device: torch.device) -> None:
    """Entries by tile, nearest first, equal depths by number: a stable radix sort, in place."""
    arrays = [wp.from_torch(one, requires_grad=False) for one in (keys, entries)]
    if device.type == "cuda":
        with wp.ScopedStream(_stream(device), sync_enter=False):
            wp.utils.radix_sort_pairs(*arrays, count, 0, bits)
    else:
        wp.utils.radix_sort_pairs(*arrays, count, 0, bits)


def draw(
    parameters: Float[torch.Tensor, "rows n"],
    cameras: Float[torch.Tensor, "v 23"],
    width: int,
    height: int,
    pulled: Float[torch.Tensor, "2 n"] | None = None,
    room: Room | None = None,
    features: Float[torch.Tensor, "v n 4"] | None = None,
) -> Float[torch.Tensor, "v 5 h w"]:
    """Each camera's picture as planes (red, green, blue on black, accumulated depth, alpha), with gradients for the parameters.

    parameters: the rows of `raster_cpu.pack`, without its padding. cameras: rows of `raster_cpu.camera_numbers`, all of one picture size.
    pulled: on the way back, gets added for each Gaussian the length of its gradient by its place in the pictures, and the number of views
    that pulled it. room: kept from step to step of a fit, spares the host from waiting for the count of entries. features: composed in
    place of colour and depth, the same all over a Gaussian, with gradients of their own.
    """
    return _Draw.apply(parameters, cameras.contiguous(), width, height, pulled, room, features)
