"""SWAN's direction of a matrix whose long side is sharded, from all-reduced vectors and one small Gram matrix.

With rows sharded, ``GᵀG`` (n, n) is a sum over ranks, and ``G (GᵀG)^(-1/2)`` needs no row of another rank; with columns
sharded the same holds for ``G Gᵀ`` (m, m), from the left.

Legend: G this rank's part of the gradient, X of its direction; whole matrix (m, n); A Gram matrix.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_multinorm.layouts import Groups, ShardedMatrix, all_reduce_
from lightning_multinorm.scaling import inverse_power_of_two, largest_magnitude
from lightning_multinorm.sinkhorn import select
from lightning_multinorm.sinkhorn.sharded import Job, alternated
from lightning_multinorm.whitening import inverse_root


def has_local_gram(matrix: ShardedMatrix) -> bool:
    """Whether one side is sharded, the long one, and no row or column is cut in pieces beyond that."""
    m, n = matrix.shape
    if matrix.flat or bool(matrix.row_groups) == bool(matrix.column_groups):
        return False
    return m >= n if matrix.column_groups else n >= m


def whitened(matrix: ShardedMatrix, normalized: Tensor, *, k: int, beta: float) -> list[Tensor]:
    """√(mn) X / ‖X‖_F with ``X = GradWhitening(normalized)``: one piece, in the dtype of ``normalized``.

    Args:
        matrix: what this rank holds of G.
        normalized: as much of the normalised G; zeros of its frame if that is nothing.
        k: Newton–Schulz iterations.
        beta: Newton–Schulz step.
    """
    (m, n), by_rows, X = matrix.shape, bool(matrix.column_groups), normalized
    A = all_reduce_(X.mT @ X if by_rows else X @ X.mT, matrix.column_groups or matrix.row_groups)
    root = inverse_root(A, k=k, beta=beta)
    X = X @ root if by_rows else root @ X
    norm = all_reduce_(X.square().sum(), matrix.column_groups + matrix.row_groups).sqrt()
    X = X.mul_((m * n) ** 0.5 / torch.where(norm == 0, 1, norm))
    return [X] if matrix.pieces else []


def row_normalized(matrix: ShardedMatrix, like: Tensor, *, center: bool) -> Tensor:
    """GradNorm of what this rank holds of G, in float32 (float64 for float64).

    Args:
        matrix: what that is.
        like: gives dtype and device where it is nothing.
        center: subtract each row's mean as well.
    """
    n = matrix.shape[1]
    X = _row_norm(_held(matrix, like), n, matrix.row_groups)
    if center:
        X = _row_norm(X - all_reduce_(X.sum(-1, keepdim=True), matrix.row_groups) / n, n, matrix.row_groups)
    return X


def sinkhorn_normalized(matrix: ShardedMatrix, like: Tensor, iterations: int) -> Tensor:
    """SR-Sinkhorn of what this rank holds of G, likewise, from all-reduced vectors."""
    passes = select.passes("auto", like.device, {like.dtype, *(piece.gradient.dtype for piece in matrix.pieces)})
    work = alternated([Job(matrix, 0, 0.0)], iterations, passes, like, trace=False)
    return _held(matrix, like).mul(work.r.unsqueeze(-1)).mul_(work.c)


def _held(matrix: ShardedMatrix, like: Tensor) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    return matrix.pieces[0].gradient.to(dtype) if matrix.pieces else like.new_zeros(matrix.frame, dtype=dtype)


def _row_norm(G: Tensor, n: int, groups: Groups) -> Tensor:
    """`norms.RowNorm.project` of rows whose n columns the groups share."""
    X = G * inverse_power_of_two(all_reduce_(largest_magnitude(G, -1, keepdim=True), groups, dist.ReduceOp.MAX))
    norm = all_reduce_(X.square().sum(-1, keepdim=True), groups).sqrt()
    return X.mul_(torch.where(norm == 0, 0, n**0.5 / norm))
