"""Loops over whole rows in vectors, by hand: LLVM makes none of a loop that prefetches, and a slow one of bfloat16.

Rows are taken by blocks of two vectors. Of float32 these are a block's halves. Bfloat16 is read as words of 32 bits,
whose lower and upper halves are a block's even and odd columns: one shift or one mask widens them, where taking them in
order needs shuffles too. What goes along with such rows, c and the sums, has to lie in that order: `cpu_rows.split`.

Legend: rows x, y and g of the gradient and w of the weight, each (n); r the scaling of a row, c (n) of the columns; j
the first column of a block.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from lightning_multinorm.sinkhorn.cpu_intrinsics import constant, rounded

WIDTH = 16 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 8  # floats of a vector
BLOCK = 2 * WIDTH
_LINE = 64  # bytes
_I8, _I32, _I64, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_WORDS, _FLOATS = ir.VectorType(_I32, WIDTH), ir.VectorType(_FLOAT, WIDTH)
_EVEN, _ODD = list(range(0, BLOCK, 2)), list(range(1, BLOCK, 2))
_CONTRACT = ("contract",)


@intrinsic
def four_rows(typingctx: Any, x: Any, c: Any, y: Any, r: Any, sums: Any, blocks: Any) -> Any:
    """Four sums of (x_j c_j)², one of each row x, while sums_j grows by the (r y_j)² of four rows y with an r each.

    ``x`` and ``y`` are four rows of float32, or of bfloat16 as 16-bit words. Any of ``c``, then all ones, ``x``, whose
    sums are then 0, and ``y`` may be None. Rows x alone come from memory, and so one after another, which suits the
    prefetchers; a row adds up to the same, to the last bit, either way.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        X, C, Y, S = (_pointers(context, builder, signature.args[k], arguments[k]) for k in (0, 1, 2, 4))
        R = [_filled(builder, one) for one in cgutils.unpack_tuple(builder, arguments[3], 4)]
        totals = [cgutils.alloca_once_value(builder, constant(_FLOATS, 0.0)) for _ in range(4)]
        for rows in [range(4)] if Y else [range(k, k + 1) for k in range(4 if X else 0)]:
            with _blocks(builder, arguments[5]) as j:
                scalings = [_block(builder, one, j) for one in C]
                sums = _block(builder, S[0], j) if Y else []
                for k in rows:
                    for half in range(2):
                        if X:
                            z = _block(builder, X[k], j)[half]
                            z = builder.fmul(z, scalings[0][half]) if C else z
                            builder.store(_plus_square(builder, builder.load(totals[k]), z), totals[k])
                        if Y:
                            z = builder.fmul(_block(builder, Y[k], j)[half], R[k])
                            sums[half] = _plus_square(builder, sums[half], z)
                if Y:
                    _store_block(builder, sums, S[0], j)
        return cgutils.pack_array(builder, [_added_up(builder, builder.load(total)) for total in totals])

    return types.UniTuple(types.float32, 4)(x, c, y, r, sums, types.intp), codegen


@intrinsic
def update(
    typingctx: Any, w: Any, g: Any, r: Any, c: Any, keep: Any, blocks: Any, ahead: Any, key: Any, first: Any
) -> Any:
    """w_j <- keep w_j - (r g_j) c_j for so many blocks; asks for each line of w ``ahead`` bytes early.

    Rows of float32, or of bfloat16 as 16-bit words; if either is, c is split. Words are rounded stochastically, as
    entries ``first + j``, unless ``key`` is None.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        W, G, C = (_pointers(context, builder, signature.args[k], arguments[k])[0] for k in (0, 1, 3))
        r, keep = _filled(builder, arguments[2]), _filled(builder, arguments[4])
        in_order = W.type == G.type == _FLOAT.as_pointer()
        key = None if signature.args[7] == types.none else _filled(builder, arguments[7])
        with _blocks(builder, arguments[5]) as j:
            _prefetch_block(builder, W, j, arguments[6])
            w, g, c = _block(builder, W, j, in_order), _block(builder, G, j, in_order), _block(builder, C, j)
            for half, columns in enumerate((_EVEN, _ODD)):
                step = builder.fmul(builder.fmul(g[half], r), c[half])
                kept = builder.fmul(w[half], keep, flags=_CONTRACT)
                w[half] = builder.fsub(kept, step, flags=_CONTRACT)
                if W.type != _FLOAT.as_pointer():
                    entry = _filled(builder, builder.trunc(builder.add(arguments[8], j), _I32))
                    entries = builder.add(entry, ir.Constant(_WORDS, columns))
                    w[half] = rounded(builder, w[half], None if key is None else builder.xor(entries, key))
            _store_block(builder, w, W, j, in_order)
        return context.get_dummy_value()

    return types.none(w, g, types.float32, c, types.float32, types.intp, types.intp, key, types.intp), codegen


def _pointers(context: Any, builder: Any, kind: Any, value: Any) -> list[Any]:
    """Where the entries of an array are, or of each in a tuple; nothing of None."""
    if kind == types.none:
        return []
    if isinstance(kind, types.Array):
        return [make_array(kind)(context, builder, value).data]
    arrays = cgutils.unpack_tuple(builder, value, len(kind))
    return [make_array(one)(context, builder, array).data for one, array in zip(kind, arrays, strict=True)]


@contextmanager
def _blocks(builder: Any, count: Any) -> Iterator[Any]:
    """A loop over so many blocks: the number of the first entry in each."""
    with cgutils.for_range(builder, count) as loop:
        yield builder.mul(loop.index, _I64(BLOCK))


def _block(builder: Any, row: Any, j: Any, in_order: bool = True) -> list[Any]:
    """Two vectors: halves of floats, or even and odd columns of words, and of floats if not ``in_order``."""
    if row.type != _FLOAT.as_pointer():
        words = builder.load(builder.bitcast(builder.gep(row, [j]), _WORDS.as_pointer()), align=2)
        lower = builder.shl(words, constant(_WORDS, 16))
        return [builder.bitcast(x, _FLOATS) for x in (lower, _upper(builder, words))]
    where = (builder.gep(row, [builder.add(j, _I64(first))]) for first in (0, WIDTH))
    halves = [builder.load(builder.bitcast(x, _FLOATS.as_pointer()), align=4) for x in where]
    return halves if in_order else [_shuffled(builder, halves, columns) for columns in (_EVEN, _ODD)]


def _store_block(builder: Any, vectors: list[Any], row: Any, j: Any, in_order: bool = True) -> None:
    """The way back of `_block`; for words, of vectors of bits, whose upper halves are kept."""
    if row.type != _FLOAT.as_pointer():
        words = builder.or_(builder.lshr(vectors[0], constant(_WORDS, 16)), _upper(builder, vectors[1]))
        builder.store(words, builder.bitcast(builder.gep(row, [j]), _WORDS.as_pointer()), align=2)
        return
    if not in_order:
        columns = [k // 2 + k % 2 * WIDTH for k in range(BLOCK)]
        vectors = [_shuffled(builder, vectors, columns[:WIDTH]), _shuffled(builder, vectors, columns[WIDTH:])]
    for x, first in zip(vectors, (0, WIDTH), strict=True):
        where = builder.gep(row, [builder.add(j, _I64(first))])
        builder.store(x, builder.bitcast(where, _FLOATS.as_pointer()), align=4)


def _prefetch_block(builder: Any, row: Any, j: Any, ahead: Any) -> None:
    """Have a block's lines brought into the second-level cache, early; any address will do, nothing is read."""
    kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    where = builder.gep(builder.bitcast(builder.gep(row, [j]), _I8.as_pointer()), [ahead])
    for line in range(0, BLOCK * (4 if row.type == _FLOAT.as_pointer() else 2), _LINE):
        # To be read, used twice or so, data.
        builder.call(prefetch, [builder.gep(where, [_I64(line)]), _I32(0), _I32(2), _I32(1)])


def _upper(builder: Any, words: Any) -> Any:
    return builder.and_(words, constant(_WORDS, 0xFFFF0000))


def _plus_square(builder: Any, total: Any, x: Any) -> Any:
    return builder.fadd(total, builder.fmul(x, x, flags=_CONTRACT), flags=_CONTRACT)


def _added_up(builder: Any, x: Any) -> Any:
    """The sum of a vector, halves onto halves."""
    width = WIDTH
    while width > 1:
        width //= 2
        x = builder.fadd(*(_shuffled(builder, [x, x], list(range(k, k + width))) for k in (0, width)))
    return builder.extract_element(x, _I32(0))


def _filled(builder: Any, x: Any) -> Any:
    """A vector of x."""
    none = ir.Constant(ir.VectorType(x.type, WIDTH), ir.Undefined)
    return _shuffled(builder, [builder.insert_element(none, x, _I32(0)), none], [0] * WIDTH)


def _shuffled(builder: Any, vectors: list[Any], entries: list[int]) -> Any:
    return builder.shuffle_vector(*vectors, ir.Constant(ir.VectorType(_I32, len(entries)), entries))
