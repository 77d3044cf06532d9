"""Rules without state for what is no hidden matrix: embedding, output head, norm gains and biases.

SR-Sinkhorn fits neither embedding nor head. In an embedding's gradient the rows of tokens that the batch lacks are
zero: with k of m rows active it makes these √(m/k) too large. In a head's, all rows have a gradient in every step, and
if each step normalises them, the many small pushes away from a rare token weigh as much as the few large ones towards
it, and the model ends up expecting it too seldom. So the rules here take the root of an embedding's row norms, and clip
only the long rows of a head, those of frequent tokens; short ones stay in proportion.

As in `lightning_multinorm.sinkhorn`, no direction is formed as a whole. It is ``diag(r) G``, ``diag(r) G diag(c)`` or
``diag(r) G S`` with vectors r, c and a small matrix S, G is read in blocks of rows, and only vectors (and S) travel
between ranks. Directions have entries of RMS 1, and multiplying the gradient by a power of two changes no bit of them.

Legend: G gradient, W weight (m, n), m rows = tokens, n columns = features; r (m,), c (n,) scalings; S (n, n);
X = diag(r) G.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_multinorm.layouts import FlatSlice, Piece, ShardedMatrix, cut, gather, is_dtensor, local, locate
from lightning_multinorm.norms import MaxNorm
from lightning_multinorm.optim.normalized import subtract_
from lightning_multinorm.optim.scalings import (
    Rows,
    column_scaling,
    gram_of_columns,
    place,
    row_blocks,
    row_scaling,
    scaled_blocks,
    to_rms_one,
)
from lightning_multinorm.rounding import lowbias32
from lightning_multinorm.scaling import working_dtype
from lightning_multinorm.sinkhorn.eager import apply_part_
from lightning_multinorm.sinkhorn.sharded import Job
from lightning_multinorm.views import View, as_matrices
from lightning_multinorm.whitening import inverse_root, polar_newton_schulz


class MatrixRule(NamedTuple):
    """First rows are scaled, then columns.

    Attributes:
        rows: see `scalings.Rows`.
        columns: "kept"; "normalized", to equal norms; or "whitened", to about equal norms and right angles.
    """

    rows: Rows
    columns: Literal["kept", "normalized", "whitened"]


MATRIX_RULES: Mapping[str, MatrixRule] = {
    "row_root": MatrixRule("root", "kept"),
    "column": MatrixRule("kept", "normalized"),
    "clipped_column": MatrixRule("clipped", "normalized"),
    "clipped_whitened": MatrixRule("clipped", "whitened"),
}
"""row_root: rows divided by the square roots of their norms. column: columns normalised, as arXiv:2506.16659 (SCALE)
does with the output head, but without its momentum. clipped_column: long rows clipped first. clipped_whitened: then
whitened, by the Gram matrix of the columns and the Newton–Schulz iteration of arXiv:2412.13148 (k = 10, β = 0.8)."""

LR_SCALES: Mapping[str, float] = {
    "row_root": 1.0,
    "column": 0.5,
    "clipped_column": 0.5,
    "clipped_whitened": 0.5,
    "sign": 0.125,
}
"""Default "lr_scale" of each rule: the RMS change per entry and step, as a multiple of the learning rate. "sign" is for
vectors, and the only rule here that takes them: every entry changes by as much."""


def update_(
    parameters: Sequence[Tensor],
    group: Mapping[str, Any],
    lr: float | Tensor,
    seeds: Sequence[Tensor | None],
    slices: Mapping[Tensor, FlatSlice],
) -> None:
    """``W <- (1 - lr · weight_decay) W - lr · direction(G)`` for every parameter of a group, in place.

    With sharded parameters a collective call, equal on all ranks.

    Args:
        parameters: with gradients; whole, DTensors, or FSDP1's slices.
        group: its "rule", "view" and "weight_decay".
        lr: effective learning rate, a number or a 0-d tensor.
        seeds: for each parameter, what it is rounded by stochastically, or None.
        slices: what FSDP1's slices are slices of.
    """
    decay = group["weight_decay"]
    for parameter, seed in zip(parameters, seeds, strict=True):
        assert parameter.grad is not None
        if group["rule"] == "sign":
            _apply_sign_(local(parameter), local(parameter.grad), lr, decay, seed)
            continue
        rows, columns = MATRIX_RULES[group["rule"]]
        for i, matrix in enumerate(_matrices(parameter, parameter.grad, group["view"], slices.get(parameter))):
            job = Job(matrix, 0, lr, decay, None if seed is None else seed + i)
            if columns != "whitened":
                _apply_scaled_(job, rows, columns == "normalized", local(parameter))
            elif matrix.row_groups or matrix.flat or matrix.shape[0] < matrix.shape[1]:
                _apply_gathered_(job, rows, local(parameter))
            else:
                _apply_whitened_(job, rows, local(parameter))


def _matrices(parameter: Tensor, gradient: Tensor, view: View, place: FlatSlice | None) -> list[ShardedMatrix]:
    """The parameter's matrices; a whole one counts as a shard with no other rank."""
    if place is not None or is_dtensor(parameter):
        return locate(parameter, gradient, view, place)
    weights, gradients = as_matrices(parameter.detach(), view), as_matrices(gradient, view, like=parameter)
    return [_alone(W, G) for W, G in zip(_unbound(weights), _unbound(gradients), strict=True)]


def _alone(W: Tensor, G: Tensor) -> ShardedMatrix:
    (m, n), pieces = W.shape, (Piece(W, G, 0, 0),) if W.numel() else ()
    return ShardedMatrix((m, n), (m, n), pieces, torch.arange(m), torch.arange(n), (), ())


def _unbound(tensor: Tensor) -> Sequence[Tensor]:
    return [tensor] if tensor.ndim == 2 else tensor.flatten(0, -3).unbind()


def _apply_sign_(W: Tensor, G: Tensor, lr: float | Tensor, weight_decay: float, seed: Tensor | None) -> None:
    if W.ndim == 0:
        W, G = W.unsqueeze(0), G.unsqueeze(0)
    for rows in row_blocks(G):
        X = MaxNorm().project(G[rows]).to(torch.promote_types(W.dtype, torch.float32))
        subtract_(W[rows], X, lr, weight_decay, _seed(seed, rows))


def _apply_scaled_(job: Job, rows: Rows, normalized: bool, like: Tensor) -> None:
    r = row_scaling(job.matrix, rows, like)
    c = column_scaling(job.matrix, r) if normalized else r.new_ones(job.matrix.frame[1])
    for piece, seed in zip(job.matrix.pieces, job.seeds(), strict=True):
        i, j = place(piece)
        apply_part_(piece.weight, piece.gradient, r[i], c[j], job.lr, job.weight_decay, seed)


def _apply_whitened_(job: Job, rows: Rows, like: Tensor) -> None:
    r = row_scaling(job.matrix, rows, like)
    A = gram_of_columns(job.matrix, r)
    S = inverse_root(A.clone())
    S *= to_rms_one((S @ A * S).sum(), job.matrix.shape[0] * job.matrix.shape[1])  # S is symmetric, so this is ‖X S‖_F²
    for piece, seed in zip(job.matrix.pieces, job.seeds(), strict=True):
        for block, X in scaled_blocks(piece, r):
            subtract_(piece.weight[block], X @ S, job.lr, job.weight_decay, _seed(seed, block))


def _apply_gathered_(job: Job, rows: Rows, like: Tensor) -> None:
    """The same with X formed as a whole, on every rank: of matrices wider than high, or whose rows are cut in parts."""
    wide = like.new_empty(0, dtype=working_dtype(like))
    X = gather(job.matrix, [piece.gradient.to(wide) for piece in job.matrix.pieces], wide)
    X *= row_scaling(_alone(X, X), rows, like).unsqueeze(-1)
    X = polar_newton_schulz(X)
    X *= to_rms_one(X.square().sum(), X.numel())
    for piece, part, seed in zip(job.matrix.pieces, cut(job.matrix, X), job.seeds(), strict=True):
        subtract_(piece.weight, part, job.lr, job.weight_decay, seed)


def _seed(seed: Tensor | None, block: slice) -> Tensor | None:
    """Other noise for each block of rows."""
    return None if seed is None else lowbias32((seed + block.start) & 0xFFFFFFFF)
