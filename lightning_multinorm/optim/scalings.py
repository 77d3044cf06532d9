"""Scalings of the rows and columns of a gradient that may be spread over ranks, for the rules in `stateless`.

G is read in blocks of rows; nothing of its size is allocated, and only vectors travel between ranks. As powers of two
are taken out first, no square leaves the range, and multiplying G by a power of two changes no bit of ``diag(r) G``.

Legend: G gradient (m, n), m rows = tokens, n columns = features; N_i norm of row i; r (m,), c (n,) scalings; a, b
powers of two. Vectors are those of this rank's frame of the matrix, see `lightning_multinorm.layouts`.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_multinorm.layouts import Piece, ShardedMatrix, all_reduce_
from lightning_multinorm.scaling import inverse_power_of_two, largest_magnitude, working_dtype
from lightning_multinorm.sinkhorn.eager import block_size, product

Rows = Literal["kept", "powered", "balanced"]
"""What becomes of a row's norm N. kept: N. powered: N^`EXPONENT`. balanced: x / √(1 + (x / K)²) with x = N / √(1 + E).
E is the norm to be expected of a row of its offset, over the geometric mean of all norms, see `_expected_norms`. K is
`KNEE` times the root mean square of x over the rows that are not zero: longer rows are clipped."""

EXPONENT = 0.25
KNEE = 4.0
_NO_ROW = 10_000  # exponent of a row that is zero, beyond any other


def row_scaling(matrix: ShardedMatrix, rows: Rows, like: Tensor) -> Tensor:
    """r for the frame's rows: ``diag(r) G`` has rows of the norms that ``rows`` says, times what makes its RMS 1.

    Norms are worked on as logarithms, so that no square of a small row is lost beside a large one. With
    a_i N_i = s_i in [1/2, √n) and a_i = 2^e a_0, a_0 of the row with the largest entry, log2 N_i is log2 s_i - e in
    units of 1 / a_0.
    """
    a, norms, exponent = _row_norms(matrix, like)
    logs = torch.where(norms > 0, norms.log2() - exponent, -torch.inf)
    inverse = torch.where(norms > 0, a / norms, 0)
    if rows == "powered":
        logs = logs * EXPONENT
    if rows == "balanced":
        expected = _expected_norms(matrix, inverse, logs)
        logs = _clipped(logs - torch.logaddexp2(expected, torch.zeros_like(expected)) / 2, matrix)
    weights = _over_largest(logs, matrix)
    squared = all_reduce_(weights.square().sum(), matrix.row_frames)
    return weights * inverse * torch.where(squared > 0, (matrix.shape[0] * matrix.shape[1] / squared).sqrt(), 0)


def _clipped(logs: Tensor, matrix: ShardedMatrix) -> Tensor:
    """log2 of x / √(1 + (x / K)²) for log2 of norms x."""
    squares = _over_largest(logs, matrix).square()
    count, total = all_reduce_(torch.stack([(logs > -torch.inf).sum(), squares.sum()]), matrix.row_frames)
    return logs - torch.log2(1 + squares * torch.where(total > 0, count / (KNEE**2 * total), 0)) / 2


def _expected_norms(matrix: ShardedMatrix, inverse: Tensor, logs: Tensor) -> Tensor:
    """log2 of the norm that a row of its offset has on average, over that of all rows; the averages are geometric.

    The offset of row i is z_i = W_i u with u the sum of all rows of G, each over its norm (``inverse``). In a softmax
    head u is the mean hidden state but for its size, so z_i is what makes token i frequent whatever the context. The
    logarithms are fitted by a straight line in z, by least squares over the rows that are not zero.
    """
    z, found = _offsets(matrix, inverse), logs > -torch.inf
    z = z * inverse_power_of_two(_largest(z.abs(), matrix))
    z, logs = torch.where(found, z, 0), torch.where(found, logs, 0)
    count, *sums = all_reduce_(torch.stack([found.sum(), z.sum(), logs.sum()]), matrix.row_frames)
    z, logs = (torch.where(found, x - total / count.clamp(min=1), 0) for x, total in zip((z, logs), sums, strict=True))
    variance, covariance = all_reduce_(torch.stack([z.square().sum(), (z * logs).sum()]), matrix.row_frames)
    return z * torch.where(variance > 0, covariance / variance, 0)


def _offsets(matrix: ShardedMatrix, inverse: Tensor) -> Tensor:
    """W u for the frame's rows, u the sum of the rows of diag(inverse) G."""
    u, z = inverse.new_zeros(matrix.frame[1]), torch.zeros_like(inverse)
    for piece in matrix.pieces:
        for _, X in _scaled_blocks(piece, inverse):
            u[place(piece)[1]] += X.sum(0)
    all_reduce_(u, matrix.column_groups)
    for piece in matrix.pieces:
        rows, columns = place(piece)
        for block in row_blocks(piece.weight):
            z[rows][block] += (piece.weight[block] * u[columns]).sum(-1)  # no product of matrices: see `eager`
    return all_reduce_(z, matrix.row_groups)


def column_scaling(matrix: ShardedMatrix, r: Tensor) -> Tensor:
    """c for the frame's columns: the columns of ``diag(r) G diag(c)`` have norm √m."""
    largest, squares = (r.new_zeros(matrix.frame[1]) for _ in range(2))
    for piece in matrix.pieces:
        _, columns = place(piece)
        for _, X in _scaled_blocks(piece, r):
            largest[columns] = torch.maximum(largest[columns], largest_magnitude(X, 0))
    b = inverse_power_of_two(all_reduce_(largest, matrix.column_groups, dist.ReduceOp.MAX))
    for piece in matrix.pieces:
        _, columns = place(piece)
        for _, X in _scaled_blocks(piece, r):
            squares[columns] += X.mul_(b[columns]).square_().sum(0)
    all_reduce_(squares, matrix.column_groups)
    return torch.where(squares > 0, b * matrix.shape[0] ** 0.5 / torch.where(squares > 0, squares, 1).sqrt(), 0)


def _scaled_blocks(piece: Piece, scaling: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """diag(scaling) G, a block of rows after another, in a buffer that the caller may spoil."""
    rows, _ = place(piece)
    buffer = None
    for block in row_blocks(piece.gradient):
        G = piece.gradient[block]
        buffer = scaling.new_empty(G.shape) if buffer is None else buffer[: len(G)]
        yield block, product(G, scaling[rows][block].unsqueeze(-1), buffer)


def row_blocks(G: Tensor) -> Iterator[slice]:
    """Slices of the first dimension, each of about a block of entries."""
    step = max(1, block_size(G) // max(1, G.numel() // max(1, len(G))))
    for i in range(0, len(G), step):
        yield slice(i, min(i + step, len(G)))


def place(piece: Piece) -> tuple[slice, slice]:
    """The piece's rows and columns in the frame."""
    rows, columns = piece.gradient.shape
    return slice(piece.row, piece.row + rows), slice(piece.column, piece.column + columns)


def _row_norms(matrix: ShardedMatrix, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a, a_i N_i, and the exponents e of a_i = 2^e a_0; zero rows have the exponent of no row."""
    largest, squares = (torch.zeros(matrix.frame[0], dtype=working_dtype(like), device=like.device) for _ in range(2))
    for piece in matrix.pieces:
        rows, _ = place(piece)
        for block in row_blocks(piece.gradient):
            found = largest_magnitude(piece.gradient[block], -1).to(largest.dtype)
            largest[rows][block] = torch.maximum(largest[rows][block], found)
    a = inverse_power_of_two(all_reduce_(largest, matrix.row_groups, dist.ReduceOp.MAX))
    for piece in matrix.pieces:
        rows, _ = place(piece)
        for block, X in _scaled_blocks(piece, a):
            squares[rows][block] += X.square_().sum(-1)
    all_reduce_(squares, matrix.row_groups)
    exponent = torch.where(largest > 0, torch.frexp(a).exponent, _NO_ROW)
    smallest = exponent.amin() if len(exponent) else exponent.new_full((), _NO_ROW)
    all_reduce_(smallest, matrix.row_frames, dist.ReduceOp.MIN)
    return a, squares.sqrt(), (exponent - smallest).to(a.dtype)


def _over_largest(logs: Tensor, matrix: ShardedMatrix) -> Tensor:
    """Norms from their log2, over the largest of all rows of the matrix."""
    largest = _largest(logs, matrix)
    return torch.exp2(logs - torch.where(largest == -torch.inf, 0, largest))


def _largest(values: Tensor, matrix: ShardedMatrix) -> Tensor:
    """Over all rows of the matrix."""
    largest = values.amax() if len(values) else values.new_full((), -torch.inf)
    return all_reduce_(largest, matrix.row_frames, dist.ReduceOp.MAX)
