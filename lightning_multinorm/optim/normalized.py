"""Updates by a normalised gradient that is formed as a whole: of whole matrices in stacks, and of gathered ones.

Legend: G gradient (..., m, n), W weight, X = normalize(G).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_multinorm.alternating import Trace
from lightning_multinorm.batch import Batch
from lightning_multinorm.layouts import ShardedMatrix, all_reduce_, cut, gather, reduce_
from lightning_multinorm.optim.observation import Measured, inverse_rms
from lightning_multinorm.scaling import power_of_two
from lightning_multinorm.sinkhorn import select
from lightning_multinorm.sinkhorn.eager import block_size
from lightning_multinorm.sinkhorn.sharded import Job, Part
from lightning_multinorm.sinkhorn.tracing import weight_squares

Normalize = Callable[[Tensor], tuple[Tensor, Trace | None]]
"""(k, ..., m, n) to as much, in float32 or wider, and its trace if it is observed."""

Direction = Callable[[ShardedMatrix], tuple[list[Tensor], Trace | None]]
"""A sharded matrix to this rank's pieces of X, and the trace (iterations, norms) if it is observed."""


def apply_normalized_(batch: Batch, normalize: Normalize) -> Measured | None:
    """``W <- (1 - lr · weight_decay) W - lr · normalize(G)`` for a batch, stacked up to a block."""
    weights, gradients, lr, weight_decay, seed = *batch[:4], batch.seed
    found, squares = [], weight_squares(weights) if batch.observe else None
    per_stack = max(1, block_size(gradients[0]) // max(1, gradients[0].numel()))
    for i in range(0, len(weights), per_stack):
        part = gradients[i : i + per_stack]
        G = torch.stack(list(part)) if len(part) > 1 else part[0].unsqueeze(0)
        G = G.to(torch.promote_types(G.dtype, torch.float32))
        X, trace = normalize(G)
        if trace is not None:
            found.append(_measured(G, X, trace))
        for k, (W, X_k) in enumerate(zip(weights[i : i + per_stack], X, strict=True), i):
            subtract_(W, X_k, lr, weight_decay, None if seed is None else seed + k * W.shape[:-2].numel())
    if not found:
        return None
    vectors = zip(*((seen.residuals, seen.rows, seen.columns, seen.mean_square) for seen in found), strict=True)
    residuals, rows, columns, mean_square = (torch.cat(parts) for parts in vectors)
    return Measured(found[0].norms, residuals, rows, columns, mean_square, squares)


def _measured(G: Tensor, X: Tensor, trace: Trace) -> Measured:
    """Of stacked matrices (k, ..., m, n)."""
    a = power_of_two(G, -1)
    rows = a.squeeze(-1) * inverse_rms((G * a).square().mean(-1))
    return Measured(trace.norms, trace.residuals, rows, G.any(-2).to(G.dtype), X.square().mean((-2, -1)))


def apply_sharded_(jobs: Sequence[Job], direction: Direction) -> Measured | None:
    """``W <- (1 - lr · weight_decay) W - lr X`` for sharded matrices, one after another.

    Args:
        jobs: the matrices, in the same order on every rank.
        direction: gives this rank's pieces of X.

    Returns:
        What was measured, or None.
    """
    errors: dict[int, Tensor] = {}
    norms: tuple[str, ...] = ()
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for job in jobs:
        pieces, trace = direction(job.matrix)
        if trace is not None:
            seen.append(_vectors(job.matrix, pieces, trace.residuals))
        for piece, X, seed in zip(job.matrix.pieces, pieces, job.seeds(), strict=True):
            subtract_(piece.weight, X, job.lr, job.weight_decay, seed)
        if trace is not None:
            norms = trace.norms
            error = trace.residuals.square() * job.matrix.share
            errors[job.parameter] = errors.get(job.parameter, torch.zeros_like(error)) + error
    if not errors:
        return None
    rows, columns, mean_squares = zip(*seen, strict=True)
    residuals = _over_batches(jobs, errors).sqrt()
    return Measured(norms, residuals, torch.cat(rows), torch.cat(columns), torch.stack(mean_squares))


def _vectors(matrix: ShardedMatrix, pieces: Sequence[Tensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of this rank's frame, as `Measured` has them, and the mean square of X, from its pieces."""
    rows, columns = (like.new_zeros(size, dtype=torch.float64) for size in matrix.frame)
    square = rows.new_zeros(1)
    for (_, G, i, j), X in zip(matrix.pieces, pieces, strict=True):
        squares = G.double().square()
        rows[i : i + len(G)] += squares.sum(-1)
        columns[j : j + G.shape[1]] += G.any(0)
        square += X.square().sum()
    all_reduce_(rows, matrix.row_groups)
    all_reduce_(columns, matrix.column_groups)
    all_reduce_(square, tuple(dict.fromkeys((*matrix.column_groups, *matrix.row_groups))))
    return inverse_rms(rows / matrix.shape[1]), columns, square[0] / (matrix.shape[0] * matrix.shape[1])


def gathered(matrix: ShardedMatrix, normalize: Normalize, like: Tensor) -> tuple[list[Tensor], Trace | None]:
    """This rank's pieces of normalize(G), of G gathered by all ranks that hold a part of it.

    Args:
        matrix: what this rank holds of G.
        normalize: of a batch of one.
        like: gives dtype and device where this rank's shard is empty.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    G = gather(matrix, [piece.gradient.to(dtype) for piece in matrix.pieces], like.new_empty(0, dtype=dtype))
    X, trace = normalize(G.unsqueeze(0))
    return cut(matrix, X[0]), None if trace is None else Trace(trace.norms, trace.residuals[0])


def _over_batches(jobs: Sequence[Job], errors: dict[int, Tensor]) -> Tensor:
    """(parameters, iterations, norms): the sums of all ranks that hold other matrices of a parameter."""
    stacked = torch.stack([errors[parameter] for parameter in sorted(errors)])
    flat, size = stacked.flatten(), stacked[0].numel()
    groups = {job.parameter: job.matrix.batch_groups for job in jobs}
    reduce_((flat,), [(slice(k * size, (k + 1) * size), groups[p]) for k, p in enumerate(sorted(errors))])
    return flat.view_as(stacked)


def subtract_(W: Tensor, X: Tensor, lr: float | Tensor, weight_decay: float, seed: Tensor | None) -> None:
    """``W <- (1 - lr · weight_decay) W - lr X``, rounded once; X (..., m, n) may be spoiled."""
    if W.dtype != X.dtype:
        _subtract_rounded_(W, X, lr, weight_decay, seed)
        return
    if weight_decay:
        W.mul_(1 - lr * weight_decay)
    if isinstance(lr, Tensor):
        W.sub_(X.mul_(lr))
    else:
        W.add_(X, alpha=-lr)


def _subtract_rounded_(W: Tensor, X: Tensor, lr: float | Tensor, weight_decay: float, seed: Tensor | None) -> None:
    """By the fused update of SR-Sinkhorn with scalings of 1: a large X is read, and W read and written, once."""
    if W.ndim > 2:
        for k, (W_k, X_k) in enumerate(zip(W, X, strict=True)):
            own = None if seed is None else seed + k * W_k.shape[:-2].numel()
            _subtract_rounded_(W_k, X_k, lr, weight_decay, own)
        return
    if not W.numel():
        return
    if W.ndim == 1:
        W, X = W.unsqueeze(0), X.unsqueeze(0)
    r, c, none = X.new_ones(W.shape[0]), X.new_ones(W.shape[1]), X.new_empty(0)
    passes = select.passes("auto", W.device, {W.dtype, X.dtype})
    passes.apply_([Part(W, X, r, c, none, none, none)], [lr], [weight_decay], [seed])
