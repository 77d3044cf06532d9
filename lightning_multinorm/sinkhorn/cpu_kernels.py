"""The machine code of `cpu`: SR-Sinkhorn on one matrix or on a panel of its rows, compiled by Numba.

Matrices come as addresses with strides in elements, so that bfloat16, which NumPy lacks, and transposed views need no
copy of a matrix: a row that cannot be read as it lies is converted into a buffer.

A product by r or c may leave float32's range when a gradient lies at its ends. Sums are therefore watched: if one is
too small or too large to be trusted, the matrix is done again on diag(a) G diag(b), where a and b are powers of two
that bring every row's and column's largest entry near 1. Powers of two change no rounding, so both ways agree to the
last bit wherever both are in range, and ordinary gradients pay nothing.

All in one file, longer than others: Numba's cache of machine code looks at the file of a function alone, and would not
notice a change in another. After a change in `cpu_intrinsics` or `cpu_vectors`, touch this one.

Legend: G gradient (m, n), W weight; m rows = output features, n columns = input features; r (m), c (n) scalings;
a (m), b (n) powers of two; q (m) RMS of the rows of G diag(c), so r = 1 / q; i rows, j columns.
"""

import math
from functools import lru_cache, partial
from typing import Any

import numba
import numpy as np
from numba import carray

from lightning_multinorm.sinkhorn import cpu_vectors, tracing
from lightning_multinorm.sinkhorn.cpu_intrinsics import (
    add,
    bfloat16_of_float,
    bfloat16_of_float_stochastic,
    bits_of_float,
    float_of_bits,
    float_of_half,
    half_of_float,
    narrow,
    pointer,
    prefetch,
    take,
    widen,
)
from lightning_multinorm.sinkhorn.cpu_vectors import BLOCK, WIDTH

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
PANEL = 256  # rows whose column sums are added up before they join the total: fewer roundings, and a unit of work

SUMS, _TAIL = len(tracing.SUMS), tracing.TAIL
_LARGEST = np.float32(np.finfo(np.float32).max)
_TRUSTED_LOW, _TRUSTED_HIGH = np.float32(2.0**-40), np.float32(2.0**40)  # of a root mean square
_PAGE, _LINES, _LANES = 4096, 16, 16  # bytes; cache lines; floats of one
SPAN = 2**21  # bytes of rows that are read a first time before the first of them is read again
_ONE, _ZERO = np.float32(1), np.float32(0)
# A buffer's rows: two times four that are worked on, one of zeros, one to convert in, and c and sums for words.
_ZEROS, _STAGE, _SPLIT, _SUMS, BUFFER = 8, 9, 10, 11, 12


def jit(function: Any, **options: Any) -> Any:
    # "contract" allows fused multiply-add and nothing else: reassociating a product would leave the range.
    compiler = partial(numba.njit, nogil=True, error_model="numpy", fastmath={"contract"}, **options)
    try:
        return compiler(cache=True)(function)
    except RuntimeError:  # no folder to keep machine code in: every process compiles anew, a few seconds
        return compiler()(function)


inlined = partial(jit, forceinline=True)  # for what works on a row or four: calls took some 4 % of a step


@jit
def load(address: int, kind: int, stride: int, n: int, out: Any) -> None:
    """out[:n] <- the row of n elements at ``address`` in float32."""
    if kind == FLOAT32:
        floats = _floats(address, (n - 1) * stride + 1)
        if stride == 1:
            for j in range(n):
                out[j] = floats[j]
        else:
            for j in range(n):
                out[j] = floats[j * stride]
        return
    words = _words(address, (n - 1) * stride + 1)
    if kind == BFLOAT16 and stride == 1:
        for j in range(n):
            out[j] = widen(words[j])
    elif kind == BFLOAT16:
        for j in range(n):
            out[j] = widen(words[j * stride])
    elif stride == 1:
        for j in range(n):
            out[j] = float_of_half(words[j])
    else:
        for j in range(n):
            out[j] = float_of_half(words[j * stride])


@jit
def _store(x: Any, address: int, kind: int, stride: int, n: int, stochastic: bool, key: Any, entry: int) -> None:
    """The row of n elements at ``address`` <- x[:n], rounded; ``entry`` is the number of the first in its matrix."""
    if kind == FLOAT32:
        floats = _floats(address, (n - 1) * stride + 1)
        for j in range(n):
            floats[j * stride] = x[j]
        return
    words = _words(address, (n - 1) * stride + 1)
    if kind == FLOAT16 and stride == 1:
        for j in range(n):
            words[j] = half_of_float(x[j])
    elif kind == FLOAT16:
        for j in range(n):
            words[j * stride] = half_of_float(x[j])
    elif stride == 1 and not stochastic:
        for j in range(n):
            words[j] = bfloat16_of_float(x[j])
    elif stride == 1:
        for j in range(n):
            words[j] = bfloat16_of_float_stochastic(x[j], key, entry, j)
    else:
        for j in range(n):
            words[j * stride] = (
                bfloat16_of_float_stochastic(x[j], key, entry, j) if stochastic else bfloat16_of_float(x[j])
            )


@inlined
def _four_rows(x: Any, c: Any, y: Any, r: Any, sums: Any) -> Any:
    """`cpu_vectors.four_rows`, with what remains of a row after the last whole block."""
    n = len(sums)
    s0, s1, s2, s3 = cpu_vectors.four_rows(x, c, y, r, sums, n // BLOCK)
    for j in range(n // BLOCK * BLOCK, n):
        if x is not None:
            z0, z1, z2, z3 = widen(x[0][j]), widen(x[1][j]), widen(x[2][j]), widen(x[3][j])
            if c is not None:
                z0, z1, z2, z3 = z0 * c[j], z1 * c[j], z2 * c[j], z3 * c[j]
            s0, s1, s2, s3 = s0 + z0 * z0, s1 + z1 * z1, s2 + z2 * z2, s3 + z3 * z3
        if y is not None:
            z0, z1, z2, z3 = widen(y[0][j]) * r[0], widen(y[1][j]) * r[1], widen(y[2][j]) * r[2], widen(y[3][j]) * r[3]
            sums[j] = (((sums[j] + z0 * z0) + z1 * z1) + z2 * z2) + z3 * z3
    return s0, s1, s2, s3


@inlined
def _split(x: Any, out: Any) -> None:
    """out <- x in the order of `cpu_vectors`: even columns, then odd ones, of every block."""
    n = len(x)
    for j in range(0, n // BLOCK * BLOCK, BLOCK):
        for k in range(WIDTH):
            out[j + k], out[j + WIDTH + k] = x[j + 2 * k], x[j + 2 * k + 1]
    for j in range(n // BLOCK * BLOCK, n):
        out[j] = x[j]


@inlined
def _join(x: Any, out: Any) -> None:
    """The way back of `_split`."""
    n = len(x)
    for j in range(0, n // BLOCK * BLOCK, BLOCK):
        for k in range(WIDTH):
            out[j + 2 * k], out[j + 2 * k + 1] = x[j + k], x[j + WIDTH + k]
    for j in range(n // BLOCK * BLOCK, n):
        out[j] = x[j]


@inlined
def _sum_of_squares(x: Any) -> Any:
    s = _ZERO
    for j in range(len(x)):
        y = widen(x[j])
        s = add(s, y * y)
    return s


@jit
def _ask_ahead(address: int) -> None:
    """Ask for some lines one page further on, as the processor's own prefetchers stop at the border of a page.

    For what comes from memory, not from a cache. Of 8 to 48 lines, 16 measured best; all 48 of a row cost time.
    """
    for line in range(_LINES):
        prefetch(address + _PAGE + 64 * line)


@jit
def _rms(s: Any, count: int) -> Any:
    """Root of s / count, finite even where s is not, so that an infinite entry times its scaling stays infinite."""
    return np.sqrt((_LARGEST if s > _LARGEST else s) / np.float32(count))


@jit
def _inverse(x: Any) -> Any:
    return _ZERO if x == _ZERO else _ONE / x


@jit
def read_rows(
    G: int, kind: int, row: int, column: int, i0: int, i1: int, n: int,
    a: Any, b: Any, scaled: bool, c: Any, q: Any, sums: Any, buffer: Any,
) -> None:  # fmt: skip
    """q[i0:i1] <- RMS of the rows i0..i1 of G diag(c); sums <- their column sums of (r_i G_ij)².

    ``c`` None is all ones, the first time that G is read. ``row`` and ``column`` are G's strides; with ``scaled``,
    diag(a) G diag(b) takes the place of G. Rows beyond i1 are zeros, so q needs room for three more. Bfloat16 is read
    as it is, and put back into bfloat16 when scaled, which is exact: one loop, and so one order of summation, for both.
    """
    direct = column == 1 and kind != FLOAT16 and not scaled
    if kind == BFLOAT16:
        own, scaling = buffer[_SUMS], buffer[_SPLIT]
        own[:] = _ZERO
        if c is None and direct:
            _read_first(G, kind, row, i0, i1, q, own, buffer)
        elif c is None:
            _read_again(G, kind, row, column, direct, i0, i1, a, b, scaled, None, q, own, buffer)
        else:
            _split(c, scaling)
            _read_again(G, kind, row, column, direct, i0, i1, a, b, scaled, scaling, q, own, buffer)
        _join(own, sums)
    else:
        sums[:] = _ZERO
        if c is None and direct:
            _read_first(G, kind, row, i0, i1, q, sums, buffer)
        else:
            _read_again(G, kind, row, column, direct, i0, i1, a, b, scaled, c, q, sums, buffer)


@jit
def _read_first(G: int, kind: int, row: int, i0: int, i1: int, q: Any, sums: Any, buffer: Any) -> None:
    """Some rows' sums while they come from memory, and only then their columns'.

    A row would still be in the nearest cache right after its sum. But of the lines that the last-level cache was given
    and not asked for again, many are gone by the next iteration: up to a tenth of a step is lost that way.
    """
    n, size, none = len(sums), 4 if kind == FLOAT32 else 2, (_ZERO, _ZERO, _ZERO, _ZERO)
    p, last = np.empty(4, np.int64), buffer.ctypes.data + _ZEROS * n * 4
    count = max(1, SPAN // (4 * row * size)) * 4
    for start in range(i0, i1, count):
        stop = min(start + count, i1)
        for columns in (False, True):
            for i in range(start, stop, 4):
                for k in range(4):
                    p[k] = G + (i + k) * row * size if i + k < i1 else last
                if columns:
                    r = (_inverse(q[i]), _inverse(q[i + 1]), _inverse(q[i + 2]), _inverse(q[i + 3]))
                    if kind == BFLOAT16:
                        _four_rows(None, None, _four_words(p, 0, n), r, sums)
                    else:
                        _four_rows(None, None, _four_floats(p, 0, n), r, sums)
                else:
                    if kind == BFLOAT16:
                        s = _four_rows(_four_words(p, 0, n), None, None, none, sums)
                    else:
                        s = _four_rows(_four_floats(p, 0, n), None, None, none, sums)
                    q[i], q[i + 1], q[i + 2], q[i + 3] = _rms(s[0], n), _rms(s[1], n), _rms(s[2], n), _rms(s[3], n)


@jit
def _read_again(
    G: int, kind: int, row: int, column: int, direct: bool, i0: int, i1: int,
    a: Any, b: Any, scaled: bool, c: Any, q: Any, sums: Any, buffer: Any,
) -> None:  # fmt: skip
    """The sums of four rows together with the columns of the four before, which lie in the nearest cache.

    In one loop, so that the next rows arrive while there is much to compute. It begins and ends with rows of zeros.
    """
    n, size, rows = len(sums), 4 if kind == FLOAT32 else 2, buffer.ctypes.data
    p, r, half = np.empty(8, np.int64), (_ZERO, _ZERO, _ZERO, _ZERO), 0
    p[4:] = rows + _ZEROS * n * 4
    for i in range(i0, i1 + 4, 4):
        for k in range(4):
            if i + k >= i1:
                p[k] = rows + _ZEROS * n * 4
            elif direct:
                p[k] = G + (i + k) * row * size
            else:
                p[k] = rows + (half + k) * n * 4
                load(G + (i + k) * row * size, kind, column, n, buffer[_STAGE])
                if scaled:
                    _scale(buffer[_STAGE], a[i + k], b, n)
                _store(buffer[_STAGE], p[k], BFLOAT16 if kind == BFLOAT16 else FLOAT32, 1, n, False, np.uint32(0), 0)
        half = 4 - half
        if kind == BFLOAT16:
            s = _four_rows(_four_words(p, 0, n), c, _four_words(p, 4, n), r, sums)
        else:
            s = _four_rows(_four_floats(p, 0, n), c, _four_floats(p, 4, n), r, sums)
        if i < i1:
            q[i], q[i + 1], q[i + 2], q[i + 3] = _rms(s[0], n), _rms(s[1], n), _rms(s[2], n), _rms(s[3], n)
            r = (_inverse(q[i]), _inverse(q[i + 1]), _inverse(q[i + 2]), _inverse(q[i + 3]))
            for k in range(4):
                p[4 + k] = p[k]


@inlined
def _four_floats(p: Any, first: int, n: int) -> Any:
    return (_floats(p[first], n), _floats(p[first + 1], n), _floats(p[first + 2], n), _floats(p[first + 3], n))


@inlined
def _four_words(p: Any, first: int, n: int) -> Any:
    return (_words(p[first], n), _words(p[first + 1], n), _words(p[first + 2], n), _words(p[first + 3], n))


@jit
def _floats(address: int, n: int) -> Any:
    return carray(pointer(address), (n,), np.float32)


@jit
def _words(address: int, n: int) -> Any:
    return carray(pointer(address), (n,), np.uint16)


@jit
def _scale(x: Any, a: Any, b: Any, n: int) -> None:
    for j in range(n):
        x[j] = (x[j] * a) * b[j]


@jit
def close(q: Any, scaling: Any) -> None:
    """scaling <- 1 / q, and 0 for 0."""
    for i in range(len(scaling)):
        scaling[i] = _inverse(q[i])


@jit
def rms_of_columns(sums: Any, m: int) -> None:
    """Sums of squares -> RMS, in place."""
    for j in range(len(sums)):
        sums[j] = _rms(sums[j], m)


@jit
def residual(q: Any, scaling: Any) -> float:
    """RMS over i of q_i · scaling_i - 1, without those that are zero."""
    total = 0.0
    for i in range(len(scaling)):
        relative = np.float64(q[i] * scaling[i])
        if relative != 0:
            total += (relative - 1) ** 2
    return np.sqrt(total / len(scaling))


@jit
def trusted(G: int, kind: int, row: int, column: int, r: Any, c: Any, q: Any, p: Any, first: bool) -> bool:
    """Whether every RMS of rows (q) and columns (p) is well inside float32's range, or zero for good reason.

    r and c are still the scalings of the iteration before.
    """
    m, n = len(r), len(c)
    if _outside(q, m) + _outside(p, n):
        return False
    if not (_zeros(q, m) or _zeros(p, n)):
        return True
    size = 4 if kind == FLOAT32 else 2
    for i in range(m):
        if q[i] == _ZERO and r[i] != _ZERO and not (first and _is_zero(G + i * row * size, kind, column, n)):
            return False
    for j in range(n):
        if p[j] == _ZERO and c[j] != _ZERO and not (first and _is_zero(G + j * column * size, kind, row, m)):
            return False
    return True


@jit
def _outside(x: Any, count: int) -> Any:
    number = np.int32(0)
    for i in range(count):
        number += np.int32(not (_TRUSTED_LOW <= x[i] <= _TRUSTED_HIGH) and x[i] != _ZERO)
    return number


@jit
def _zeros(x: Any, count: int) -> Any:
    number = np.int32(0)
    for i in range(count):
        number += np.int32(x[i] == _ZERO)
    return number


@jit
def _is_zero(address: int, kind: int, stride: int, n: int) -> bool:
    if kind == FLOAT32:
        floats = _floats(address, (n - 1) * stride + 1)
        for j in range(n):
            if floats[j * stride] != _ZERO:
                return False
        return True
    words = _words(address, (n - 1) * stride + 1)
    for j in range(n):
        if words[j * stride] & np.uint16(0x7FFF):
            return False
    return True


@jit
def equilibrate(G: int, kind: int, row: int, column: int, m: int, n: int, a: Any, b: Any, buffer: Any) -> None:
    """a, b <- powers of two that bring the largest entry of every row, then of every column, into [1/2, 1)."""
    size = 4 if kind == FLOAT32 else 2
    x = buffer[0]
    for j in range(n):
        b[j] = _ZERO
    for i in range(m):
        load(G + i * row * size, kind, column, n, x)
        largest = _ZERO
        for j in range(n):
            largest = max(largest, abs(x[j]))
        a[i] = _inverse_power_of_two(largest)
        for j in range(n):
            b[j] = max(b[j], abs(x[j] * a[i]))
    for j in range(n):
        b[j] = _inverse_power_of_two(b[j])


@jit
def _inverse_power_of_two(x: Any) -> Any:
    """As `lightning_multinorm.scaling.inverse_power_of_two`."""
    if not _ZERO < x <= _LARGEST:
        return _ONE
    exponent: Any = np.int64(bits_of_float(x) >> np.uint32(23)) - 126
    return float_of_bits(np.uint32(127 + min(126, max(-126, -exponent))) << np.uint32(23))


@jit
def unscale(x: Any, powers: Any) -> None:
    """x <- x · powers, kept finite: a scaling beyond the range is as large as the range allows."""
    for i in range(len(x)):
        product = x[i] * powers[i]
        x[i] = _LARGEST if product > _LARGEST else product


@jit
def scalings(
    G: int, kind: int, row: int, column: int, iterations: int, trace: bool, residuals: Any, first: Any,
    r: Any, c: Any, q: Any, sums: Any, total: Any, a: Any, b: Any, buffer: Any,
) -> None:  # fmt: skip
    """r, c and, if asked for, residuals (L, 2) and the first r of one matrix, by one thread."""
    for scaled in (False, True):
        if scaled:
            equilibrate(G, kind, row, column, len(r), len(c), a, b, buffer)
        if _alternate(
            G, kind, row, column, iterations, trace, residuals, first, r, c, q, sums, total, a, b, scaled, buffer
        ):
            if scaled:
                unscale(r, a)
                unscale(c, b)
                if trace:
                    unscale(first, a)
            return


@jit
def summarize(first: Any, c: Any, weights: float, sums: Any) -> None:
    """The `tracing.SUMS` of one matrix, from ``first`` (m), 1 / RMS of the rows of G, the last c (n) and ‖W‖_F².

    Mean squares and ξ in full: whoever knows how many matrices a parameter has takes the share.
    """
    m, n = len(first), len(c)
    squares, live = 0.0, 0
    inverse = np.empty(m, np.float32)  # of rows that are not zero
    for i in range(m):
        if first[i] != _ZERO:
            squares += 1 / np.float64(first[i]) ** 2
            inverse[live] = first[i]
            live += 1
    sums[0], sums[1], sums[2], sums[3] = squares * n, _inverse_tail_index(inverse[:live], m), m - live, _zeros(c, n)
    sums[4], sums[5], sums[6] = (n - sums[3]) / n, weights, m * n


@jit
def _inverse_tail_index(inverse: Any, m: int) -> float:
    """ξ by Hill's estimator over the `tracing.TAIL` of m rows; infinite if fewer are not zero, 0 if none is."""
    k = max(0, min(math.ceil(_TAIL * m), m - 1))
    if k == 0 or len(inverse) == 0:
        return 0.0
    if len(inverse) <= k:
        return np.inf
    smallest = np.partition(inverse, k)[: k + 1]
    total = 0.0
    for i in range(k):
        total += math.log(np.float64(smallest[k]) / np.float64(smallest[i]))
    return total / k


@jit
def begin(r: Any, c: Any, b: Any, scaled: bool) -> None:
    """The first row sums are those of G itself, not of diag(a) G diag(b)."""
    r[:] = _ONE
    for j in range(len(c)):
        c[j] = _ONE / b[j] if scaled else _ONE


@jit
def _alternate(
    G: int, kind: int, row: int, column: int, iterations: int, trace: bool, residuals: Any, first: Any,
    r: Any, c: Any, q: Any, sums: Any, total: Any, a: Any, b: Any, scaled: bool, buffer: Any,
) -> bool:  # fmt: skip
    """False if sums are not to be trusted, which they always are if ``scaled``."""
    m, n = len(r), len(c)
    begin(r, c, b, scaled)
    for k in range(iterations + 1 if trace else iterations):
        total[:] = _ZERO
        for i0 in range(0, m, PANEL):
            i1 = min(i0 + PANEL, m)
            if k == 0 and not scaled:  # c is still 1
                read_rows(G, kind, row, column, i0, i1, n, a, b, scaled, None, q, sums, buffer)
            else:
                read_rows(G, kind, row, column, i0, i1, n, a, b, scaled, c, q, sums, buffer)
            for j in range(n):
                total[j] += sums[j]
        rms_of_columns(total, m)
        if not scaled and not trusted(G, kind, row, column, r, c, q, total, k == 0):
            return False
        if trace and k > 0:
            residuals[k - 1, 0] = residual(q, r)
        if k < iterations:
            close(q, r)
            close(total, c)
            if trace:
                residuals[k, 1] = residual(total, c)
                if k == 0:
                    first[:] = r
    return True


@jit
def update(
    W: int, w_kind: int, w_row: int, w_column: int, G: int, g_kind: int, g_row: int, g_column: int,
    i0: int, i1: int, n: int, r: Any, c: Any, lr: Any, keep: Any, stochastic: bool, key: int, weigh: bool, buffer: Any,
) -> float:  # fmt: skip
    """Rows i0..i1 of W <- keep · W - (lr r_i G_ij) c_j, rounded once; to ``weigh``, the sum of their squares before."""
    squares, words = 0.0, w_kind == BFLOAT16 and w_column == 1
    rows = buffer.ctypes.data  # by address: an array would be counted in and out, atomically, for every row
    w_size, g_size = 4 if w_kind == FLOAT32 else 2, 4 if g_kind == FLOAT32 else 2
    direct = w_column == 1 and w_kind != FLOAT16
    ahead = _PAGE if direct else 0  # a buffer is in cache, with nothing to ask for
    g_words, split = g_kind == BFLOAT16 and g_column == 1, buffer[_SPLIT]
    if words or g_words:
        _split(c, split)
    for i in range(i0, i1):
        w_address, g_address = W + i * w_row * w_size, G + i * g_row * g_size
        if not direct:
            _ask_ahead(w_address)
            load(w_address, w_kind, w_column, n, _floats(rows + 4 * n, n))
            w_address = rows + 4 * n
        if weigh and words:
            squares += np.float64(_sum_of_squares(_words(w_address, n)))
        elif weigh:
            squares += np.float64(_sum_of_squares(_floats(w_address, n)))
        if g_column != 1 or g_kind == FLOAT16:
            load(g_address, g_kind, g_column, n, _floats(rows, n))
            g_address = rows
        rate = r[i] * lr
        if words and g_words and stochastic:
            _update_row(_words(w_address, n), _words(g_address, n), rate, c, split, keep, ahead, np.uint32(key), i * n)
        elif words and g_words:
            _update_row(_words(w_address, n), _words(g_address, n), rate, c, split, keep, ahead, None, 0)
        elif words and stochastic:
            _update_row(_words(w_address, n), _floats(g_address, n), rate, c, split, keep, ahead, np.uint32(key), i * n)
        elif words:
            _update_row(_words(w_address, n), _floats(g_address, n), rate, c, split, keep, ahead, None, 0)
        elif g_words:
            _update_row(_floats(w_address, n), _words(g_address, n), rate, c, split, keep, ahead, None, 0)
        else:
            _update_row(_floats(w_address, n), _floats(g_address, n), rate, c, c, keep, ahead, None, 0)
        if not direct:
            _store(
                _floats(w_address, n), W + i * w_row * w_size, w_kind, w_column, n, stochastic, np.uint32(key), i * n
            )
    return squares


# A job: so many matrices, and the most rows and columns of any; and a row for each. Addresses are integers.
JOB = np.dtype([(name, np.int64) for name in ("next", "count", "matrices", "m", "n")])
MATRIX = np.dtype(
    [(name, np.int64) for name in ("W", "w_kind", "w_row", "w_column", "G", "g_kind", "g_row", "g_column", "m", "n")]
    + [(name, np.int64) for name in ("iterations", "stochastic", "key", "residuals", "first", "r", "c", "sums")]
    + [("lr", np.float64), ("keep", np.float64)]
)


@jit
def _vector(length: int) -> Any:
    """(length,) from the beginning of a cache line, unlike NumPy's: loads from two lines cost up to 2 % of a step."""
    space = np.empty(length + _LANES, np.float32)
    start = -space.ctypes.data // 4 % _LANES
    return space[start : start + length]


@jit
def work(address: int) -> None:
    """Take one matrix of a job after another."""
    job = carray(pointer(address), (1,), JOB)[0]
    matrices = carray(pointer(job.matrices), (job.count,), MATRIX)
    r, a, q = _vector(job.m), _vector(job.m), _vector(job.m + 3)
    c, b, sums, total = _vector(job.n), _vector(job.n), _vector(job.n), _vector(job.n)
    rows = _vector(BUFFER * job.n)
    while True:
        k = take(address)
        if k >= job.count:
            return
        m, n = matrices[k].m, matrices[k].n
        buffer = rows[: BUFFER * n].reshape(BUFFER, n)
        buffer[_ZEROS] = _ZERO
        _solve(matrices[k], r[:m], c[:n], q[: m + 3], sums[:n], total[:n], a[:m], b[:n], buffer)


@jit
def _solve(M: Any, r: Any, c: Any, q: Any, sums: Any, total: Any, a: Any, b: Any, buffer: Any) -> None:
    """The scalings of one matrix, kept if they have places, and the update of W."""
    m, n, trace = M.m, M.n, M.first != 0
    residuals = carray(pointer(M.residuals), (M.iterations if trace else 0, 2), np.float32)
    first = _floats(M.first, m if trace else 0)
    scalings(
        M.G, M.g_kind, M.g_row, M.g_column, M.iterations, trace, residuals, first, r, c, q, sums, total, a, b, buffer
    )
    if M.r:
        _floats(M.r, m)[:] = r
    if M.c:
        _floats(M.c, n)[:] = c
    if M.W:
        lr, keep = np.float32(M.lr), np.float32(M.keep)
        weights = update(
            M.W, M.w_kind, M.w_row, M.w_column, M.G, M.g_kind, M.g_row, M.g_column,
            0, m, n, r, c, lr, keep, M.stochastic != 0, M.key, M.sums != 0, buffer,
        )  # fmt: skip
        if M.sums:
            summarize(first, c, weights, carray(pointer(M.sums), (SUMS,), np.float64))


@lru_cache
def team() -> Any:
    """`work` as a C function, compiled when first asked for."""
    try:
        return numba.cfunc("void(intp)", cache=True)(_team)
    except RuntimeError:
        return numba.cfunc("void(intp)")(_team)


def _team(address: int) -> None:
    work(address)


@inlined
def _update_row(w: Any, g: Any, r: Any, c: Any, split: Any, keep: Any, ahead: int, key: Any, first: int) -> None:
    """`cpu_vectors.update`, with what remains of a row after the last whole block."""
    n = len(c)
    cpu_vectors.update(w, g, r, split, keep, n // BLOCK, ahead, key, first)
    for j in range(n // BLOCK * BLOCK, n):
        moved = widen(w[j]) * keep - (widen(g[j]) * r) * c[j]
        w[j] = narrow(moved, w[j]) if key is None else bfloat16_of_float_stochastic(moved, key, first, j)
