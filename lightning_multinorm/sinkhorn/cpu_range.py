"""Whether sums are to be trusted, and powers of two that bring a matrix into float32's range, for the CPU.

A product by r or c may leave the range when a gradient lies at its ends. If a sum is too small or too large to be
trusted, the matrix is done again on diag(a) G diag(b), where a and b are powers of two that bring every row's and
column's largest entry near 1. Powers of two change no rounding, so both ways agree to the last bit wherever both are in
range, and ordinary gradients pay nothing.

Legend: G gradient (m, n); r (m), c (n) scalings; a (m), b (n) powers of two; q (m) and p (n) RMS of rows and columns.
"""

from typing import Any

import numpy as np

from lightning_multinorm.sinkhorn.cpu_intrinsics import bits_of_float, float_of_bits
from lightning_multinorm.sinkhorn.cpu_jit import jit
from lightning_multinorm.sinkhorn.cpu_rows import FLOAT32, LARGEST, ONE, ZERO, floats, itemsize, load, words

_TRUSTED_LOW, _TRUSTED_HIGH = np.float32(2.0**-40), np.float32(2.0**40)  # of a root mean square


@jit
def trusted(G: int, kind: int, row: int, column: int, r: Any, c: Any, q: Any, p: Any, first: bool) -> bool:
    """Whether every RMS of rows (q) and columns (p) is well inside float32's range, or zero for good reason.

    r and c are still the scalings of the iteration before.
    """
    m, n = len(r), len(c)
    if _outside(q, m) + _outside(p, n):
        return False
    if not (zeros(q, m) or zeros(p, n)):
        return True
    size = itemsize(kind)
    for i in range(m):
        if q[i] == ZERO and r[i] != ZERO and not (first and _is_zero(G + i * row * size, kind, column, n)):
            return False
    for j in range(n):
        if p[j] == ZERO and c[j] != ZERO and not (first and _is_zero(G + j * column * size, kind, row, m)):
            return False
    return True


@jit
def _outside(x: Any, count: int) -> Any:
    number = np.int32(0)
    for i in range(count):
        number += np.int32(not (_TRUSTED_LOW <= x[i] <= _TRUSTED_HIGH) and x[i] != ZERO)
    return number


@jit
def zeros(x: Any, count: int) -> Any:
    number = np.int32(0)
    for i in range(count):
        number += np.int32(x[i] == ZERO)
    return number


@jit
def _is_zero(address: int, kind: int, stride: int, n: int) -> bool:
    if kind == FLOAT32:
        entries = floats(address, (n - 1) * stride + 1)
        for j in range(n):
            if entries[j * stride] != ZERO:
                return False
        return True
    entries = words(address, (n - 1) * stride + 1)
    for j in range(n):
        if entries[j * stride] & np.uint16(0x7FFF):
            return False
    return True


@jit
def equilibrate(G: int, kind: int, row: int, column: int, m: int, n: int, a: Any, b: Any, buffer: Any) -> None:
    """a, b <- powers of two that bring the largest entry of every row, then of every column, into [1/2, 1)."""
    size, x = itemsize(kind), buffer[0]
    for j in range(n):
        b[j] = ZERO
    for i in range(m):
        load(G + i * row * size, kind, column, n, x)
        largest = ZERO
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
    if not ZERO < x <= LARGEST:
        return ONE
    exponent: Any = np.int64(bits_of_float(x) >> np.uint32(23)) - 126
    return float_of_bits(np.uint32(127 + min(126, max(-126, -exponent))) << np.uint32(23))


@jit
def unscale(x: Any, powers: Any) -> None:
    """x <- x · powers, kept finite: a scaling beyond the range is as large as the range allows."""
    for i in range(len(x)):
        product = x[i] * powers[i]
        x[i] = LARGEST if product > LARGEST else product
