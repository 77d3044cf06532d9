"""What the CPU's machine code does to rows, one or four: reading, sums, the update, writing.

Matrices come as addresses with strides in elements, so that bfloat16, which NumPy lacks, and transposed views need no
copy of a matrix: a row that cannot be read as it lies is converted into a buffer.

Legend: c (n) scaling of the columns, r of a row; i rows, j columns.
"""

from typing import Any

import numpy as np
from numba import carray

from lightning_multinorm.sinkhorn import cpu_vectors
from lightning_multinorm.sinkhorn.cpu_intrinsics import (
    add,
    bfloat16_of_float,
    bfloat16_of_float_stochastic,
    float_of_half,
    half_of_float,
    narrow,
    pointer,
    widen,
)
from lightning_multinorm.sinkhorn.cpu_jit import inlined, jit
from lightning_multinorm.sinkhorn.cpu_vectors import BLOCK, WIDTH

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
LARGEST = np.float32(np.finfo(np.float32).max)
ONE, ZERO = np.float32(1), np.float32(0)


@jit
def floats(address: int, n: int) -> Any:
    return carray(pointer(address), (n,), np.float32)


@jit
def words(address: int, n: int) -> Any:
    return carray(pointer(address), (n,), np.uint16)


@jit
def itemsize(kind: int) -> int:
    return 4 if kind == FLOAT32 else 2


@inlined
def four_places(address: int, bytes_of_row: int, i: int, end: int, zeros: int) -> Any:
    """The addresses of rows i to i + 3, the first row being at ``address``; of those from ``end`` on, ``zeros``."""
    start = address + i * bytes_of_row
    return (
        start if i < end else zeros,
        start + bytes_of_row if i + 1 < end else zeros,
        start + 2 * bytes_of_row if i + 2 < end else zeros,
        start + 3 * bytes_of_row if i + 3 < end else zeros,
    )


@inlined
def four(places: Any, n: int, dtype: Any) -> Any:
    """Rows of n entries at four addresses."""
    return (
        carray(pointer(places[0]), (n,), dtype),
        carray(pointer(places[1]), (n,), dtype),
        carray(pointer(places[2]), (n,), dtype),
        carray(pointer(places[3]), (n,), dtype),
    )


@jit
def load(address: int, kind: int, stride: int, n: int, out: Any) -> None:
    """out[:n] <- the row of n elements at ``address`` in float32."""
    if kind == FLOAT32:
        entries = floats(address, (n - 1) * stride + 1)
        if stride == 1:
            for j in range(n):
                out[j] = entries[j]
        else:
            for j in range(n):
                out[j] = entries[j * stride]
        return
    entries = words(address, (n - 1) * stride + 1)
    if kind == BFLOAT16 and stride == 1:
        for j in range(n):
            out[j] = widen(entries[j])
    elif kind == BFLOAT16:
        for j in range(n):
            out[j] = widen(entries[j * stride])
    elif stride == 1:
        for j in range(n):
            out[j] = float_of_half(entries[j])
    else:
        for j in range(n):
            out[j] = float_of_half(entries[j * stride])


@jit
def store(x: Any, address: int, kind: int, stride: int, n: int, stochastic: bool, key: Any, entry: int) -> None:
    """The row of n elements at ``address`` <- x[:n], rounded; ``entry`` is the number of the first in its matrix."""
    if kind == FLOAT32:
        entries = floats(address, (n - 1) * stride + 1)
        for j in range(n):
            entries[j * stride] = x[j]
        return
    entries = words(address, (n - 1) * stride + 1)
    if kind == FLOAT16 and stride == 1:
        for j in range(n):
            entries[j] = half_of_float(x[j])
    elif kind == FLOAT16:
        for j in range(n):
            entries[j * stride] = half_of_float(x[j])
    elif stride == 1 and not stochastic:
        for j in range(n):
            entries[j] = bfloat16_of_float(x[j])
    elif stride == 1:
        for j in range(n):
            entries[j] = bfloat16_of_float_stochastic(x[j], key, entry, j)
    else:
        for j in range(n):
            entries[j * stride] = (
                bfloat16_of_float_stochastic(x[j], key, entry, j) if stochastic else bfloat16_of_float(x[j])
            )


@jit
def scale(x: Any, a: Any, b: Any, n: int) -> None:
    for j in range(n):
        x[j] = (x[j] * a) * b[j]


@inlined
def split(x: Any, out: Any) -> None:
    """out <- x in the order of `cpu_vectors`: even columns, then odd ones, of every block."""
    n = len(x)
    for j in range(0, n // BLOCK * BLOCK, BLOCK):
        for k in range(WIDTH):
            out[j + k], out[j + WIDTH + k] = x[j + 2 * k], x[j + 2 * k + 1]
    for j in range(n // BLOCK * BLOCK, n):
        out[j] = x[j]


@inlined
def join(x: Any, out: Any) -> None:
    """The way back of `split`."""
    n = len(x)
    for j in range(0, n // BLOCK * BLOCK, BLOCK):
        for k in range(WIDTH):
            out[j + 2 * k], out[j + 2 * k + 1] = x[j + k], x[j + WIDTH + k]
    for j in range(n // BLOCK * BLOCK, n):
        out[j] = x[j]


@jit
def rms(s: Any, count: int) -> Any:
    """Root of s / count, finite even where s is not, so that an infinite entry times its scaling stays infinite."""
    return np.sqrt((LARGEST if s > LARGEST else s) / np.float32(count))


@jit
def inverse(x: Any) -> Any:
    return ZERO if x == ZERO else ONE / x


@inlined
def four_rms(s: Any, count: int) -> Any:
    return rms(s[0], count), rms(s[1], count), rms(s[2], count), rms(s[3], count)


@inlined
def four_inverses(q: Any, i: int) -> Any:
    return inverse(q[i]), inverse(q[i + 1]), inverse(q[i + 2]), inverse(q[i + 3])


@inlined
def sum_of_squares(x: Any) -> Any:
    s = ZERO
    for j in range(len(x)):
        y = widen(x[j])
        s = add(s, y * y)
    return s


@inlined
def four_rows(x: Any, c: Any, y: Any, r: Any, sums: Any) -> Any:
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
def update_row(w: Any, g: Any, r: Any, c: Any, split_c: Any, keep: Any, ahead: int, key: Any, first: int) -> None:
    """`cpu_vectors.update`, with what remains of a row after the last whole block."""
    n = len(c)
    cpu_vectors.update(w, g, r, split_c, keep, n // BLOCK, ahead, key, first)
    for j in range(n // BLOCK * BLOCK, n):
        moved = widen(w[j]) * keep - (widen(g[j]) * r) * c[j]
        w[j] = narrow(moved, w[j]) if key is None else bfloat16_of_float_stochastic(moved, key, first, j)
