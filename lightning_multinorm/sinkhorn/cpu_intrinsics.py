"""Single operations that Numba lacks or widens to 64 bits, written for LLVM: they vectorise as they stand."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

LANES, BLOCK = 16, 64  # elements of a vector, which is a cache line in float32, and of what a loop takes at a time
_I8, _I16, _I32, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FUSED = ("contract",)
_EXPONENT, _QUIET_NAN = _I32(0x7F800000), _I32(0x7FC0)


@intrinsic
def pointer(typingctx: Any, address: Any) -> Any:
    """An integer address as a pointer, for `numba.carray`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], _I8.as_pointer())

    return types.voidptr(types.intp), codegen


@intrinsic
def take(typingctx: Any, address: Any) -> Any:
    """The integer at ``address``, which is one more for whoever comes next."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", where, ir.IntType(64)(1), "monotonic")

    return types.int64(types.intp), codegen


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Have the cache line at ``address`` brought into the second-level cache; any address will do, nothing is read."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _prefetch(builder, builder.inttoptr(arguments[0], _I8.as_pointer()))
        return context.get_dummy_value()

    return types.none(types.intp), codegen


@intrinsic
def update_ahead(typingctx: Any, w: Any, g: Any, r: Any, c: Any, keep: Any, blocks: Any, ahead: Any) -> Any:
    """w_j <- keep w_j - (r g_j) c_j for so many blocks of `BLOCK` elements; asks for each line ``ahead`` bytes early.

    g in float32, or bfloat16 as 16-bit words. In vectors, since LLVM makes none of a loop that prefetches.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        own = [make_array(signature.args[k])(context, builder, arguments[k]).data for k in (0, 1, 3)]
        r, keep = _filled(builder, arguments[2]), _filled(builder, arguments[4])
        with cgutils.for_range(builder, arguments[5]) as loop:
            for first in range(0, BLOCK, LANES):
                element = builder.add(builder.mul(loop.index, _I64(BLOCK)), _I64(first))
                W, G, C = (builder.gep(data, [element]) for data in own)
                _prefetch(builder, builder.gep(builder.bitcast(W, _I8.as_pointer()), [arguments[6]]))
                w, g, c = (_vector(builder, where) for where in (W, G, C))
                step = builder.fmul(builder.fmul(g, r), c)
                moved = builder.fsub(builder.fmul(w, keep, flags=_FUSED), step, flags=_FUSED)
                builder.store(moved, builder.bitcast(W, moved.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(w, g, types.float32, c, types.float32, types.intp, types.intp), codegen


def _prefetch(builder: Any, where: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(function, [where, _I32(0), _I32(2), _I32(1)])  # to be read, used twice or so, data


def _vector(builder: Any, where: Any) -> Any:
    """The vector of floats, or of words widened to floats, at ``where``."""
    element = where.type.pointee
    kind = ir.VectorType(element, LANES).as_pointer()
    x = builder.load(builder.bitcast(where, kind), align=4 if element == ir.FloatType() else 2)
    return x if element == ir.FloatType() else _widened(builder, x)


def _widened(builder: Any, words: Any) -> Any:
    """Of bfloat16 in the vector's words, the float32."""
    bits = builder.zext(words, ir.VectorType(_I32, LANES))
    upper = builder.shl(bits, ir.Constant(bits.type, [16] * LANES))
    return builder.bitcast(upper, ir.VectorType(ir.FloatType(), LANES))


def _filled(builder: Any, x: Any) -> Any:
    """A vector of x."""
    none = ir.Constant(ir.VectorType(x.type, LANES), ir.Undefined)
    first = builder.insert_element(none, x, _I32(0))
    return builder.shuffle_vector(first, none, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


@intrinsic
def add(typingctx: Any, x: Any, y: Any) -> Any:
    """x + y in whatever order suits the vector unit; only sums of positive terms use it."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments, flags=("reassoc", "contract"))

    return types.float32(types.float32, types.float32), codegen


@intrinsic
def float_of_bits(typingctx: Any, bits: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def bits_of_float(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _I32)

    return types.uint32(types.float32), codegen


@intrinsic
def widen(typingctx: Any, x: Any) -> Any:
    """A float32 as it is; a 16-bit word as the bfloat16 that it holds."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0] == types.float32:
            return arguments[0]
        return builder.bitcast(builder.shl(builder.zext(arguments[0], _I32), _I32(16)), ir.FloatType())

    return types.float32(types.float32 if x == types.float32 else types.uint16), codegen


@intrinsic
def float_of_half(typingctx: Any, word: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def half_of_float(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), _I16)

    return types.uint16(types.float32), codegen


@intrinsic
def bfloat16_of_float(typingctx: Any, x: Any) -> Any:
    """Rounded to nearest, ties to even."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], _I32)
        odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        return _cut_off(builder, arguments[0], bits, builder.add(odd, _I32(0x7FFF)))

    return types.uint16(types.float32), codegen


@intrinsic
def bfloat16_of_float_stochastic(typingctx: Any, x: Any, key: Any, first: Any, j: Any) -> Any:
    """Rounded stochastically with the noise of entry ``first + j``, as in `lightning_multinorm.rounding`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, key, first, j = arguments
        entry = builder.trunc(builder.add(first, j), _I32)
        noise = _lowbias32(builder, builder.xor(entry, key))
        return _cut_off(builder, x, builder.bitcast(x, _I32), builder.lshr(noise, _I32(16)))

    return types.uint16(types.float32, types.uint32, types.int64, types.int64), codegen


def _cut_off(builder: Any, x: Any, bits: Any, up: Any) -> Any:
    """The upper half of bits + up; infinity is left alone, and a NaN does not turn into it."""
    finite = builder.icmp_unsigned("!=", builder.and_(bits, _EXPONENT), _EXPONENT)
    word = builder.lshr(builder.select(finite, builder.add(bits, up), bits), _I32(16))
    return builder.trunc(builder.select(builder.fcmp_unordered("uno", x, x), _QUIET_NAN, word), _I16)


def _lowbias32(builder: Any, x: Any) -> Any:
    x = builder.xor(x, builder.lshr(x, _I32(16)))
    x = builder.mul(x, _I32(0x7FEB352D))
    x = builder.xor(x, builder.lshr(x, _I32(15)))
    x = builder.mul(x, _I32(0x846CA68B))
    return builder.xor(x, builder.lshr(x, _I32(16)))
