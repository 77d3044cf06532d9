"""Updates by a normalised gradient that is formed as a whole: of whole matrices in stacks, and of gathered ones.

Legend: G gradient (..., m, n), W weight, X = normalize(G).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_multinorm.alternating import Trace
from lightning_multinorm.layouts import ShardedMatrix, cut, gather, reduce_
from lightning_multinorm.rounding import noise, round_to_bfloat16
from lightning_multinorm.sinkhorn.eager import block_size
from lightning_multinorm.sinkhorn.sharded import Job

Normalize = Callable[[Tensor], tuple[Tensor, Trace | None]]
"""(k, ..., m, n) to as much, in float32 or wider, and its trace if it is observed."""

Direction = Callable[[ShardedMatrix], tuple[list[Tensor], Trace | None]]
"""A sharded matrix to this rank's pieces of X, and the trace (iterations, norms) if it is observed."""


class Batch(NamedTuple):
    """Whole matrices (..., m, n) of one shape, dtype and device that are updated together.

    Attributes:
        weights: updated in place.
        gradients: as many, left unchanged.
        lr: effective learning rate: RMS change per entry.
        weight_decay: decoupled weight decay.
        seed: rounds bfloat16 weights stochastically, or None.
        observe: whether the update returns a trace, whose residuals are (len(weights), ..., iterations, norms).
    """

    weights: Sequence[Tensor]
    gradients: Sequence[Tensor]
    lr: float | Tensor
    weight_decay: float
    seed: Tensor | None = None
    observe: bool = False


def apply_normalized_(batch: Batch, normalize: Normalize) -> Trace | None:
    """``W <- (1 - lr · weight_decay) W - lr · normalize(G)`` for a batch, stacked up to a block."""
    weights, gradients, lr, weight_decay, seed, _ = batch
    traces = []
    per_stack = max(1, block_size(gradients[0]) // max(1, gradients[0].numel()))
    for i in range(0, len(weights), per_stack):
        part = gradients[i : i + per_stack]
        G = torch.stack(list(part)) if len(part) > 1 else part[0].unsqueeze(0)
        X, trace = normalize(G.to(torch.promote_types(G.dtype, torch.float32)))
        for k, (W, X_k) in enumerate(zip(weights[i : i + per_stack], X, strict=True), i):
            subtract_(W, X_k, lr, weight_decay, None if seed is None else seed + k * W.shape[:-2].numel())
        traces.append(trace)
    kept = [trace for trace in traces if trace is not None]
    return Trace(kept[0].norms, torch.cat([trace.residuals for trace in kept])) if kept else None


def apply_sharded_(jobs: Sequence[Job], direction: Direction) -> Trace | None:
    """``W <- (1 - lr · weight_decay) W - lr X`` for sharded matrices, one after another.

    Args:
        jobs: the matrices, in the same order on every rank.
        direction: gives this rank's pieces of X.

    Returns:
        A trace of residuals (parameters, iterations, norms), or None.
    """
    errors: dict[int, Tensor] = {}
    norms: tuple[str, ...] = ()
    for job in jobs:
        pieces, trace = direction(job.matrix)
        for piece, X, seed in zip(job.matrix.pieces, pieces, job.seeds(), strict=True):
            subtract_(piece.weight, X, job.lr, job.weight_decay, seed)
        if trace is not None:
            norms = trace.norms
            error = trace.residuals.square() * job.matrix.share
            errors[job.parameter] = errors.get(job.parameter, torch.zeros_like(error)) + error
    return Trace(norms, _over_batches(jobs, errors).sqrt()) if errors else None


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
        moved = W.to(X.dtype).mul_(1 - lr * weight_decay).sub_(X.mul_(lr))
        if seed is not None and W.dtype is torch.bfloat16:
            rows = slice(0, W.shape[:-1].numel())
            moved = round_to_bfloat16(moved, noise(seed, 0, rows, W.shape[-1], W.device).view_as(moved))
        W.copy_(moved)
        return
    if weight_decay:
        W.mul_(1 - lr * weight_decay)
    if isinstance(lr, Tensor):
        W.sub_(X.mul_(lr))
    else:
        W.add_(X, alpha=-lr)
