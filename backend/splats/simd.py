"""Sixteen float32 lanes as one numba value, so that kernels say what the vector unit does instead of hoping for the auto-vectoriser.

`Lanes` lowers to LLVM's `<16 x float>`, `Mask` to `<16 x i1>`; LLVM turns them into AVX-512, pairs of AVX2 or quadruples of NEON registers.
Scalars (float32) mix freely with `Lanes` in arithmetic. Arrays are flat and C-contiguous; `load`, `store` and `at` skip numba's
wrap-around of negative indices, which is what keeps ordinary indexing from being vectorised.
"""

from __future__ import annotations

import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, register_model

WIDTH = 16
BLOCK = 4  # the lanes of a 4 x 4 block of pixels: lane = 4 y + x

_FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
_BITS = ir.VectorType(ir.IntType(1), WIDTH)
_CONTRACT = ("contract", "nsz")  # a * b + c may fuse; nothing else is reordered, so results do not depend on the surroundings


class _Lanes(types.Type):
    def __init__(self):
        super().__init__(name="float32x16")


class _Mask(types.Type):
    def __init__(self):
        super().__init__(name="bool_x16")


Lanes, Mask = _Lanes(), _Mask()


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _FLOATS)


@register_model(_Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _BITS)


def _constant(values) -> ir.Constant:
    return ir.Constant(_FLOATS, [ir.Constant(ir.FloatType(), float(value)) for value in values])


def _spread(builder, value):
    """The lanes of a value that is a scalar or lanes already."""
    if value.type == _FLOATS:
        return value
    first = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [ir.Constant(ir.IntType(32), 0)] * WIDTH)
    return builder.shuffle_vector(first, ir.Constant(_FLOATS, ir.Undefined), zeros)


def _infix(symbol, result, emit):
    """Types and lowers a binary operator on (lanes, lanes), (lanes, scalar) and (scalar, lanes)."""
    pairs = [(Lanes, Lanes), (Lanes, types.float32), (types.float32, Lanes)]

    @infer_global(symbol)
    class _Typing(ConcreteTemplate):
        cases = [signature(result, *pair) for pair in pairs]

    for pair in pairs:

        @lower_builtin(symbol, *pair)
        def _lower(context, builder, sig, args):
            return emit(builder, _spread(builder, args[0]), _spread(builder, args[1]))


_infix(operator.add, Lanes, lambda b, x, y: b.fadd(x, y, flags=_CONTRACT))
_infix(operator.sub, Lanes, lambda b, x, y: b.fsub(x, y, flags=_CONTRACT))
_infix(operator.mul, Lanes, lambda b, x, y: b.fmul(x, y, flags=_CONTRACT))
_infix(operator.truediv, Lanes, lambda b, x, y: b.fdiv(x, y, flags=_CONTRACT))
_infix(operator.lt, Mask, lambda b, x, y: b.fcmp_ordered("<", x, y))
_infix(operator.le, Mask, lambda b, x, y: b.fcmp_ordered("<=", x, y))
_infix(operator.ge, Mask, lambda b, x, y: b.fcmp_ordered(">=", x, y))
_infix(operator.gt, Mask, lambda b, x, y: b.fcmp_ordered(">", x, y))


@infer_global(operator.and_)
class _AndTyping(ConcreteTemplate):
    cases = [signature(Mask, Mask, Mask)]


@lower_builtin(operator.and_, Mask, Mask)
def _lower_and(context, builder, sig, args):
    return builder.and_(*args)


def _element(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return cgutils.gep_inbounds(builder, data, index)


def _is_float_array(kind) -> bool:
    return isinstance(kind, types.Array) and kind.ndim == 1 and kind.dtype == types.float32 and kind.layout == "C"


@intrinsic
def load(typing, array, index):
    """Sixteen consecutive floats from `array[index]` on."""
    if not _is_float_array(array) or not isinstance(index, types.Integer):
        return None

    def emit(context, builder, sig, args):
        pointer = _element(context, builder, sig.args[0], *args)
        return builder.load(builder.bitcast(pointer, _FLOATS.as_pointer()), align=4)

    return Lanes(array, index), emit


@intrinsic
def store(typing, array, index, value):
    """Writes sixteen consecutive floats from `array[index]` on."""
    if not _is_float_array(array) or not isinstance(index, types.Integer) or value != Lanes:
        return None

    def emit(context, builder, sig, args):
        pointer = _element(context, builder, sig.args[0], args[0], args[1])
        builder.store(args[2], builder.bitcast(pointer, _FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, index, value), emit


@intrinsic
def at(typing, array, index):
    """`array[index]` for an index known to be in range and not negative."""
    if not isinstance(array, types.Array) or array.ndim != 1 or array.layout != "C":
        return None

    def emit(context, builder, sig, args):
        pointer = _element(context, builder, sig.args[0], *args)
        return context.unpack_value(builder, sig.args[0].dtype, pointer)

    return array.dtype(array, index), emit


@intrinsic
def spread(typing, value):
    """The same float32 in every lane."""
    if value != types.float32:
        return None
    return Lanes(value), lambda context, builder, sig, args: _spread(builder, args[0])


def _lane_constant(values, doc):
    @intrinsic
    def constant(typing):
        return Lanes(), lambda context, builder, sig, args: _constant(values)

    constant.__doc__ = doc
    return constant


zeros = _lane_constant([0.0] * WIDTH, "Zero in every lane.")
ramp = _lane_constant(range(WIDTH), "Lane i holds i.")
block_x = _lane_constant([i % BLOCK for i in range(WIDTH)], "The column of each lane in a 4 x 4 block.")
block_y = _lane_constant([i // BLOCK for i in range(WIDTH)], "The row of each lane in a 4 x 4 block.")


@intrinsic
def where(typing, mask, yes, no):
    """Lane by lane, `yes` where the mask is set."""
    if mask != Mask or yes != Lanes or no != Lanes:
        return None
    return Lanes(mask, yes, no), lambda context, builder, sig, args: builder.select(*args)


def _two_operands(name):
    @intrinsic
    def function(typing, left, right):
        if Lanes not in (left, right):
            return None

        def emit(context, builder, sig, args):
            x, y = (_spread(builder, value) for value in args)
            return builder.select(builder.fcmp_ordered("<" if name == "least" else ">", x, y), x, y)

        return Lanes(left, right), emit

    return function


least = _two_operands("least")  # lane by lane the smaller of two
greatest = _two_operands("greatest")


def _vector_intrinsic(builder, name):
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(_FLOATS, [_FLOATS]), f"llvm.{name}.v{WIDTH}f32")


@intrinsic
def root(typing, value):
    """Square roots."""
    if value != Lanes:
        return None

    def emit(context, builder, sig, args):
        return builder.call(_vector_intrinsic(builder, "sqrt"), args)

    return Lanes(value), emit


@intrinsic
def size(typing, value):
    """Absolute values."""
    if value != Lanes:
        return None

    def emit(context, builder, sig, args):
        return builder.call(_vector_intrinsic(builder, "fabs"), args)

    return Lanes(value), emit


@intrinsic
def total(typing, value):
    """The sum of all lanes, always added in the same order."""
    if value != Lanes:
        return None

    def emit(context, builder, sig, args):
        lanes, width = args[0], WIDTH
        index = ir.IntType(32)
        while width > 1:
            width //= 2
            half = ir.VectorType(index, width)
            low = builder.shuffle_vector(lanes, lanes, ir.Constant(half, [ir.Constant(index, i) for i in range(width)]))
            high = builder.shuffle_vector(lanes, lanes, ir.Constant(half, [ir.Constant(index, i + width) for i in range(width)]))
            lanes = builder.fadd(low, high)
        return builder.extract_element(lanes, ir.Constant(index, 0))

    return types.float32(value), emit


@intrinsic
def bits(typing, mask):
    """The mask as a whole number, lane i in bit i."""
    if mask != Mask:
        return None

    def emit(context, builder, sig, args):
        return builder.zext(builder.bitcast(args[0], ir.IntType(WIDTH)), ir.IntType(64))

    return types.int64(mask), emit


@intrinsic
def lowest_bit(typing, value):
    """The number of the lowest set bit of an integer that is not 0."""
    if not isinstance(value, types.Integer):
        return None

    def emit(context, builder, sig, args):
        return context.cast(builder, builder.cttz(args[0], ir.Constant(ir.IntType(1), 1)), sig.args[0], types.int64)

    return types.int64(value), emit


@intrinsic
def take(typing, counter):
    """`counter[0]` before adding 1 to it, atomically: hands out pieces of work to whichever thread comes first."""
    if not isinstance(counter, types.Array) or counter.dtype != types.int64:
        return None

    def emit(context, builder, sig, args):
        pointer = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), emit


def _numbers(values) -> ir.Constant:
    index = ir.IntType(32)
    return ir.Constant(ir.VectorType(index, len(values)), [ir.Constant(index, value) for value in values])


_ROW = ir.VectorType(ir.FloatType(), BLOCK)


@intrinsic
def load_block(typing, array, index, stride):
    """A 4 x 4 block of a row-major picture: its upper left pixel at `array[index]`, `stride` pixels a row."""
    if not _is_float_array(array) or not isinstance(index, types.Integer) or not isinstance(stride, types.Integer):
        return None

    def emit(context, builder, sig, args):
        first = _element(context, builder, sig.args[0], args[0], args[1])
        stride = context.cast(builder, args[2], sig.args[2], types.intp)
        rows = []
        for y in range(BLOCK):
            pointer = builder.gep(first, [builder.mul(stride, ir.Constant(stride.type, y))])
            rows.append(builder.load(builder.bitcast(pointer, _ROW.as_pointer()), align=4))
        upper, lower = (builder.shuffle_vector(a, b, _numbers(range(8))) for a, b in (rows[:2], rows[2:]))
        return builder.shuffle_vector(upper, lower, _numbers(range(16)))

    return Lanes(array, index, stride), emit


@intrinsic
def store_block(typing, array, index, stride, value):
    """Writes a 4 x 4 block into a row-major picture."""
    if not _is_float_array(array) or not isinstance(index, types.Integer) or not isinstance(stride, types.Integer) or value != Lanes:
        return None

    def emit(context, builder, sig, args):
        first = _element(context, builder, sig.args[0], args[0], args[1])
        stride = context.cast(builder, args[2], sig.args[2], types.intp)
        for y in range(BLOCK):
            pointer = builder.gep(first, [builder.mul(stride, ir.Constant(stride.type, y))])
            row = builder.shuffle_vector(args[3], args[3], _numbers(range(BLOCK * y, BLOCK * y + BLOCK)))
            builder.store(row, builder.bitcast(pointer, _ROW.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, index, stride, value), emit


@intrinsic
def totals(typing, a, b, c, d, e, f, g, h, i, j, k, m):
    """Lane n holds the sum of all lanes of argument n: twelve sums for the price of about three."""
    if any(value != Lanes for value in (a, b, c, d, e, f, g, h, i, j, k, m)):
        return None

    def emit(context, builder, sig, args):
        level = list(args) + [_constant([0.0] * WIDTH)] * (WIDTH - len(args))
        group = 1
        while len(level) > 1:
            # Sums of neighbouring groups of lanes; the two inputs' groups alternate in the result.
            starts = [start for base in range(0, WIDTH, 2 * group) for start in (base, WIDTH + base)]
            low = _numbers([start + lane for start in starts for lane in range(group)])
            high = _numbers([start + group + lane for start in starts for lane in range(group)])
            level = [
                builder.fadd(builder.shuffle_vector(x, y, low), builder.shuffle_vector(x, y, high))
                for x, y in zip(level[::2], level[1::2], strict=True)
            ]
            group *= 2
        return level[0]

    return Lanes(a, b, c, d, e, f, g, h, i, j, k, m), emit


@intrinsic
def two_to_the(typing, exponent):
    """2**n for whole n from -126 to 127."""
    if exponent != Lanes:
        return None

    def emit(context, builder, sig, args):
        whole = ir.VectorType(ir.IntType(32), WIDTH)
        number = builder.add(builder.fptosi(args[0], whole), _numbers([127] * WIDTH))
        return builder.bitcast(builder.shl(number, _numbers([23] * WIDTH)), _FLOATS)

    return Lanes(exponent), emit


@intrinsic
def logarithm(typing, value):
    """Natural logarithms, one call of the C library for each lane: not for inner loops."""
    if value != Lanes:
        return None
    return Lanes(value), lambda context, builder, sig, args: builder.call(_vector_intrinsic(builder, "log"), args)
