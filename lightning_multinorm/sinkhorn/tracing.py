"""What an update by SR-Sinkhorn sees of its matrices on the way, for those who ask."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SUMS = ("gradient", "tail", "dead_rows", "dead_columns", "mean_square", "weight", "entries")
"""What adds up over the matrices of a parameter, in order: ‖G‖_F², ξ = 1 / tail index, zero rows and columns of G, the
mean square of X, ‖W‖_F², and m · n. Of ξ and the mean square each matrix gives its share of the parameter's."""

TAIL = 0.1  # of the rows, the largest, from which ξ is estimated


class Tracing(NamedTuple):
    """Of matrices (..., m, n), in L >= 1 iterations; vectors that are there anyway.

    Attributes:
        residuals: (..., L, 2), of rows and columns after each iteration: RMS of norm / target - 1.
        rows: (..., m), 1 / RMS of every row of G: r after its first half step; 0 for a zero row.
        columns: (..., n), c after the last iteration; 0 for a zero column.
        weights: (...), ‖W‖_F² before the update; None where nothing was updated.
        sums: (..., len(SUMS)), in float64, where the path adds up for nothing; else None.
    """

    residuals: Tensor
    rows: Tensor
    columns: Tensor
    weights: Tensor | None = None
    sums: Tensor | None = None

    @property
    def vectors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Residuals, rows and columns."""
        return self[:3]


def weight_squares(weights: Sequence[Tensor]) -> Tensor:
    """‖W‖_F² (p, ...) of matrices (..., m, n) of one shape and dtype; to be taken before the update."""
    if weights[0].device.type != "cpu" and weights[0].ndim == 2 and weights[0].dtype in (torch.float32, torch.float64):
        return torch.stack(torch._foreach_norm(list(weights))).square_()
    return torch.stack([squares(W) for W in weights])


def squares(W: Tensor) -> Tensor:
    """‖W‖_F² (...), in float32 or wider; nothing of W's size is allocated.

    By rows, since one sum of millions of squares in float32 is off by a thousandth on the CPU.
    """
    dtype = torch.promote_types(W.dtype, torch.float32)
    return torch.linalg.vector_norm(W, dim=-1, dtype=dtype).square().sum(-1)
