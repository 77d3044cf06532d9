"""What an update by SR-Sinkhorn sees of its matrices on the way, for those who ask."""

from typing import NamedTuple

from torch import Tensor


class Tracing(NamedTuple):
    """Of matrices (..., m, n), in L >= 1 iterations; vectors that are there anyway.

    Attributes:
        residuals: (..., L, 2), of rows and columns after each iteration: RMS of norm / target - 1.
        rows: (..., m), 1 / RMS of every row of G: r after its first half step; 0 for a zero row.
        columns: (..., n), c after the last iteration; 0 for a zero column.
    """

    residuals: Tensor
    rows: Tensor
    columns: Tensor
