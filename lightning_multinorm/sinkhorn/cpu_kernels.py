"""The machine code of `cpu`: SR-Sinkhorn on one matrix or on a panel of its rows, compiled by Numba.

Rows are read and written by `cpu_rows`; where sums leave float32's range, `cpu_range` scales a matrix, and it is done
again.

Legend: G gradient (m, n), W weight; m rows = output features, n columns = input features; r (m), c (n) scalings;
a (m), b (n) powers of two; q (m) RMS of the rows of G diag(c), so r = 1 / q; i rows, j columns.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numba import carray

from lightning_multinorm.sinkhorn import cpu_range, tracing
from lightning_multinorm.sinkhorn.cpu_intrinsics import pointer, take
from lightning_multinorm.sinkhorn.cpu_jit import c_function, jit
from lightning_multinorm.sinkhorn.cpu_rows import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    ONE,
    ZERO,
    floats,
    four,
    four_inverses,
    four_places,
    four_rms,
    four_rows,
    inverse,
    itemsize,
    join,
    load,
    rms,
    scale,
    split,
    store,
    sum_of_squares,
    update_row,
    words,
)

PANEL = 256  # rows whose column sums are added up before they join the total: fewer roundings, and a unit of work
SPAN = 2**21  # bytes of rows that are read a first time before the first of them is read again
SUMS, _TAIL = len(tracing.SUMS), tracing.TAIL
_LANES, _PAGE = 16, 4096  # floats of a cache line; bytes
# A buffer's rows: two times four that are worked on, one of zeros, one to convert in, and c and sums for words.
_ZEROS, _STAGE, _SPLIT, _SUMS, BUFFER = 8, 9, 10, 11, 12


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
    if kind == BFLOAT16:
        own, scaling = buffer[_SUMS], buffer[_SPLIT]
        own[:] = ZERO
        if c is None:
            _read(G, kind, row, column, i0, i1, a, b, scaled, None, q, own, buffer, np.uint16)
        else:
            split(c, scaling)
            _read(G, kind, row, column, i0, i1, a, b, scaled, scaling, q, own, buffer, np.uint16)
        join(own, sums)
    else:
        sums[:] = ZERO
        _read(G, kind, row, column, i0, i1, a, b, scaled, c, q, sums, buffer, np.float32)


@jit
def _read(
    G: int, kind: int, row: int, column: int, i0: int, i1: int,
    a: Any, b: Any, scaled: bool, c: Any, q: Any, sums: Any, buffer: Any, dtype: Any,
) -> None:  # fmt: skip
    """`read_rows`, where c and sums lie in the order of ``dtype``: np.float32, or np.uint16 for bfloat16's words."""
    direct = column == 1 and kind != FLOAT16 and not scaled
    if c is None and direct:
        _read_first(G, kind, row, i0, i1, q, sums, buffer, dtype)
    else:
        _read_again(G, kind, row, column, direct, i0, i1, a, b, scaled, c, q, sums, buffer, dtype)


@jit
def _read_first(G: int, kind: int, row: int, i0: int, i1: int, q: Any, sums: Any, buffer: Any, dtype: Any) -> None:
    """Some rows' sums while they come from memory, and only then their columns'.

    A row would still be in the nearest cache right after its sum. But of the lines that the last-level cache was given
    and not asked for again, many are gone by the next iteration: up to a tenth of a step is lost that way.
    """
    n, bytes_of_row, zeros = len(sums), row * itemsize(kind), buffer.ctypes.data + _ZEROS * 4 * len(sums)
    count = max(1, SPAN // (4 * n * itemsize(kind))) * 4
    for start in range(i0, i1, count):
        stop = min(start + count, i1)
        for i in range(start, stop, 4):
            x = four_places(G, bytes_of_row, i, i1, zeros)
            s = four_rows(four(x, n, dtype), None, None, (ZERO, ZERO, ZERO, ZERO), sums)
            q[i], q[i + 1], q[i + 2], q[i + 3] = four_rms(s, n)
        for i in range(start, stop, 4):
            y = four_places(G, bytes_of_row, i, i1, zeros)
            four_rows(None, None, four(y, n, dtype), four_inverses(q, i), sums)


@jit
def _read_again(
    G: int, kind: int, row: int, column: int, direct: bool, i0: int, i1: int,
    a: Any, b: Any, scaled: bool, c: Any, q: Any, sums: Any, buffer: Any, dtype: Any,
) -> None:  # fmt: skip
    """The sums of four rows together with the columns of the four before, which lie in the nearest cache.

    In one loop, so that the next rows arrive while there is much to compute. It begins and ends with rows of zeros.
    """
    n, bytes_of_row, space = len(sums), row * itemsize(kind), buffer.ctypes.data
    zeros = space + _ZEROS * 4 * n
    y, r = (zeros, zeros, zeros, zeros), (ZERO, ZERO, ZERO, ZERO)
    for i in range(i0, i1 + 4, 4):
        if direct:
            x = four_places(G, bytes_of_row, i, i1, zeros)
        else:
            first = (i - i0) % 8  # rows of the buffer, by turns: the four before lie in the others
            x = four_places(space + first * 4 * n, 4 * n, 0, i1 - i, zeros)
            for k in range(min(4, i1 - i)):
                _convert(G + (i + k) * bytes_of_row, kind, column, n, a[i + k], b, scaled, x[k], buffer[_STAGE])
        s = four_rows(four(x, n, dtype), c, four(y, n, dtype), r, sums)
        if i < i1:
            q[i], q[i + 1], q[i + 2], q[i + 3] = four_rms(s, n)
            y, r = x, four_inverses(q, i)


@jit
def _convert(
    address: int, kind: int, column: int, n: int, a: Any, b: Any, scaled: bool, place: int, stage: Any
) -> None:  # fmt: skip
    """At ``place``, the row at ``address`` side by side, a · row · b if ``scaled``: bfloat16 as it is, else float32."""
    load(address, kind, column, n, stage)
    if scaled:
        scale(stage, a, b, n)
    store(stage, place, BFLOAT16 if kind == BFLOAT16 else FLOAT32, 1, n, False, np.uint32(0), 0)


@jit
def close(q: Any, scaling: Any) -> None:
    """scaling <- 1 / q, and 0 for 0."""
    for i in range(len(scaling)):
        scaling[i] = inverse(q[i])


@jit
def rms_of_columns(sums: Any, m: int) -> None:
    """Sums of squares -> RMS, in place."""
    for j in range(len(sums)):
        sums[j] = rms(sums[j], m)


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
def scalings(
    G: int, kind: int, row: int, column: int, iterations: int, trace: bool, residuals: Any, first: Any,
    r: Any, c: Any, q: Any, sums: Any, total: Any, a: Any, b: Any, buffer: Any,
) -> None:  # fmt: skip
    """r, c and, if asked for, residuals (L, 2) and the first r of one matrix, by one thread."""
    for scaled in (False, True):
        if scaled:
            cpu_range.equilibrate(G, kind, row, column, len(r), len(c), a, b, buffer)
        if _alternate(
            G, kind, row, column, iterations, trace, residuals, first, r, c, q, sums, total, a, b, scaled, buffer
        ):
            if scaled:
                cpu_range.unscale(r, a)
                cpu_range.unscale(c, b)
                if trace:
                    cpu_range.unscale(first, a)
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
        if first[i] != ZERO:
            squares += 1 / np.float64(first[i]) ** 2
            inverse[live] = first[i]
            live += 1
    sums[0], sums[1], sums[2], sums[3] = (
        squares * n,
        _inverse_tail_index(inverse[:live], m),
        m - live,
        cpu_range.zeros(c, n),
    )
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
    r[:] = ONE
    for j in range(len(c)):
        c[j] = ONE / b[j] if scaled else ONE


@jit
def _alternate(
    G: int, kind: int, row: int, column: int, iterations: int, trace: bool, residuals: Any, first: Any,
    r: Any, c: Any, q: Any, sums: Any, total: Any, a: Any, b: Any, scaled: bool, buffer: Any,
) -> bool:  # fmt: skip
    """False if sums are not to be trusted, which they always are if ``scaled``."""
    m, n = len(r), len(c)
    begin(r, c, b, scaled)
    for k in range(iterations + 1 if trace else iterations):
        total[:] = ZERO
        for i0 in range(0, m, PANEL):
            i1 = min(i0 + PANEL, m)
            if k == 0 and not scaled:  # c is still 1
                read_rows(G, kind, row, column, i0, i1, n, a, b, scaled, None, q, sums, buffer)
            else:
                read_rows(G, kind, row, column, i0, i1, n, a, b, scaled, c, q, sums, buffer)
            for j in range(n):
                total[j] += sums[j]
        rms_of_columns(total, m)
        if not scaled and not cpu_range.trusted(G, kind, row, column, r, c, q, total, k == 0):
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
    squares, w_words = 0.0, w_kind == BFLOAT16 and w_column == 1
    space = buffer.ctypes.data  # by address: an array would be counted in and out, atomically, for every row
    direct = w_column == 1 and w_kind != FLOAT16
    ahead = _PAGE if direct else 0  # a buffer is in cache, with nothing to ask for
    g_words, split_c = g_kind == BFLOAT16 and g_column == 1, buffer[_SPLIT]
    if w_words or g_words:
        split(c, split_c)
    for i in range(i0, i1):
        place, g_address = W + i * w_row * itemsize(w_kind), G + i * g_row * itemsize(g_kind)
        w_address = place if direct else space + 4 * n
        if not direct:
            load(place, w_kind, w_column, n, floats(w_address, n))
        if weigh and w_words:
            squares += np.float64(sum_of_squares(words(w_address, n)))
        elif weigh:
            squares += np.float64(sum_of_squares(floats(w_address, n)))
        if g_column != 1 or g_kind == FLOAT16:
            load(g_address, g_kind, g_column, n, floats(space, n))
            g_address = space
        rate = r[i] * lr
        if w_words and g_words and stochastic:
            update_row(words(w_address, n), words(g_address, n), rate, c, split_c, keep, ahead, np.uint32(key), i * n)
        elif w_words and g_words:
            update_row(words(w_address, n), words(g_address, n), rate, c, split_c, keep, ahead, None, 0)
        elif w_words and stochastic:
            update_row(words(w_address, n), floats(g_address, n), rate, c, split_c, keep, ahead, np.uint32(key), i * n)
        elif w_words:
            update_row(words(w_address, n), floats(g_address, n), rate, c, split_c, keep, ahead, None, 0)
        elif g_words:
            update_row(floats(w_address, n), words(g_address, n), rate, c, split_c, keep, ahead, None, 0)
        else:
            update_row(floats(w_address, n), floats(g_address, n), rate, c, c, keep, ahead, None, 0)
        if not direct:
            store(floats(w_address, n), place, w_kind, w_column, n, stochastic, np.uint32(key), i * n)
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
        buffer[_ZEROS] = ZERO
        _solve(matrices[k], r[:m], c[:n], q[: m + 3], sums[:n], total[:n], a[:m], b[:n], buffer)


@jit
def _solve(M: Any, r: Any, c: Any, q: Any, sums: Any, total: Any, a: Any, b: Any, buffer: Any) -> None:
    """The scalings of one matrix, kept if they have places, and the update of W."""
    m, n, trace = M.m, M.n, M.first != 0
    residuals = carray(pointer(M.residuals), (M.iterations if trace else 0, 2), np.float32)
    first = floats(M.first, m if trace else 0)
    scalings(
        M.G, M.g_kind, M.g_row, M.g_column, M.iterations, trace, residuals, first, r, c, q, sums, total, a, b, buffer
    )
    if M.r:
        floats(M.r, m)[:] = r
    if M.c:
        floats(M.c, n)[:] = c
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
    return c_function(_team, "void(intp)")


def _team(address: int) -> None:
    work(address)
