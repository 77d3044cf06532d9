"""Single operations that Numba lacks or widens to 64 bits, written for LLVM: they vectorise as they stand."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_I8, _I16, _I32, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_QUIET_NAN = 0x7FC00000


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
def narrow(typingctx: Any, x: Any, like: Any) -> Any:
    """x as it is, or as a 16-bit word that holds it in bfloat16, rounded to nearest: whichever ``like`` is."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return arguments[0] if like == types.float32 else _upper_half(builder, rounded(builder, arguments[0]))

    return like(types.float32, like), codegen


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
        return _upper_half(builder, rounded(builder, arguments[0]))

    return types.uint16(types.float32), codegen


@intrinsic
def bfloat16_of_float_stochastic(typingctx: Any, x: Any, key: Any, first: Any, j: Any) -> Any:
    """Rounded stochastically with the noise of entry ``first + j``, as in `lightning_multinorm.rounding`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, key, first, j = arguments
        entry = builder.trunc(builder.add(first, j), _I32)
        return _upper_half(builder, rounded(builder, x, builder.xor(entry, key)))

    return types.uint16(types.float32, types.uint32, types.int64, types.int64), codegen


def _upper_half(builder: Any, bits: Any) -> Any:
    return builder.trunc(builder.lshr(bits, _I32(16)), _I16)


def rounded(builder: Any, x: Any, noise: Any = None) -> Any:
    """The bits of x, a float or a vector of them, whose upper halves are x in bfloat16; what the lower are is open.

    To nearest, ties to even, or stochastically by ``noise``, entries' numbers xor the key. Infinity, whose lower half
    is 0, stays it, and a NaN does not turn into it.
    """
    kind = ir.VectorType(_I32, x.type.count) if isinstance(x.type, ir.VectorType) else _I32
    sixteen = constant(kind, 16)
    bits = builder.bitcast(x, kind)
    if noise is None:
        odd = builder.and_(builder.lshr(bits, sixteen), constant(kind, 1))
        up = builder.add(odd, constant(kind, 0x7FFF))
    else:
        up = builder.lshr(_lowbias32(builder, noise), sixteen)
    return builder.select(builder.fcmp_unordered("uno", x, x), constant(kind, _QUIET_NAN), builder.add(bits, up))


def _lowbias32(builder: Any, x: Any) -> Any:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = builder.xor(x, builder.lshr(x, constant(x.type, shift)))
        x = builder.mul(x, constant(x.type, factor))
    return builder.xor(x, builder.lshr(x, constant(x.type, 16)))


def constant(kind: Any, value: float) -> Any:
    """``value``, or a vector of it."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)
