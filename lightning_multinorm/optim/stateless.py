"""Rules without state for what is no hidden matrix: embedding, output head, norm gains and biases.

SR-Sinkhorn fits neither embedding nor head. In an embedding's gradient the rows of tokens that the batch lacks are
zero: with k of m rows active it makes these √(m/k) too large. In a head's, all rows have a gradient in every step: the
batches that lack a rare token push it away a little, the few that have it pull it by far more. If each step normalises
its rows, the pushes weigh as much as the pulls, and the model ends up expecting the token too seldom. What a row is
divided by must not depend on the batch, then, but may on the token: Adam divides by a root mean square over time, about
the square root of a token's frequency. The rule here finds as much without a memory, by a mean over rows in place of
one over time. A token's frequency is already in the weights, as the part of its logit that no context changes; a fit of
row norms to it tells what norm a token as frequent has. Most rows of a batch belong to tokens that it lacks, where that
norm is in proportion to the frequency, hence the square root of it. Of the rarer half of the tokens the fit is poor,
and a step too large for one feeds on itself: their rows are divided by about the same, and long rows clipped.

As in `lightning_multinorm.sinkhorn`, no direction is formed as a whole. It is ``diag(r) G diag(c)`` with vectors r and
c, G is read in blocks of rows, and only vectors travel between ranks. Directions have entries of RMS 1 (times the
square root of the fraction of columns that are not zero, if columns are normalised), and multiplying the gradient by a
power of two changes no bit of them.

Legend: G gradient, W weight (m, n), m rows = tokens, n columns = features; r (m,), c (n,) scalings.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_multinorm.layouts import FlatSlice, ShardedMatrix, is_dtensor, local, locate, unsharded
from lightning_multinorm.norms import MaxNorm
from lightning_multinorm.optim.normalized import subtract_
from lightning_multinorm.optim.scalings import Rows, column_scaling, place, row_blocks, row_scaling
from lightning_multinorm.rounding import lowbias32
from lightning_multinorm.sinkhorn import select
from lightning_multinorm.sinkhorn.sharded import Job, Part
from lightning_multinorm.views import View, as_matrices


class MatrixRule(NamedTuple):
    """First rows are scaled, then columns.

    Attributes:
        rows: see `scalings.Rows`.
        columns: "kept", or "normalized" to equal norms.
    """

    rows: Rows
    columns: Literal["kept", "normalized"]


MATRIX_RULES: Mapping[str, MatrixRule] = {
    "row_power": MatrixRule("powered", "kept"),
    "column": MatrixRule("kept", "normalized"),
    "balanced_column": MatrixRule("balanced", "normalized"),
}
"""row_power: rows keep the fourth roots of their norms. column: columns normalised, as arXiv:2506.16659 (SCALE) does
with the output head, but without its momentum. balanced_column: rows over the square roots of the norms expected of
them, and long ones clipped, first. See `scalings.Rows`."""

LR_SCALES: Mapping[str, float] = {
    "row_power": 1.0,
    "column": 0.5,
    "balanced_column": 0.5,
    "sign": 0.5,
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
            _apply_(job, rows, columns, local(parameter))


def _matrices(parameter: Tensor, gradient: Tensor, view: View, place: FlatSlice | None) -> list[ShardedMatrix]:
    """The parameter's matrices; a whole one counts as a shard with no other rank."""
    if place is not None or is_dtensor(parameter):
        return locate(parameter, gradient, view, place)
    return unsharded(as_matrices(parameter.detach(), view), as_matrices(gradient, view, like=parameter))


def _apply_sign_(W: Tensor, G: Tensor, lr: float | Tensor, weight_decay: float, seed: Tensor | None) -> None:
    if W.ndim == 0:
        W, G = W.unsqueeze(0), G.unsqueeze(0)
    for rows in row_blocks(G):
        X = MaxNorm().project(G[rows]).to(torch.promote_types(W.dtype, torch.float32))
        subtract_(W[rows], X, lr, weight_decay, _seed(seed, rows))


def _apply_(job: Job, rows: Rows, columns: Literal["kept", "normalized"], like: Tensor) -> None:
    r = row_scaling(job.matrix, rows, like)
    c = column_scaling(job.matrix, r) if columns == "normalized" else r.new_ones(job.matrix.frame[1])
    parts = [
        Part(piece.weight, piece.gradient, r[place(piece)[0]], c[place(piece)[1]], *(r[:0], c[:0], c[:0]))
        for piece in job.matrix.pieces
    ]
    dtypes = {x.dtype for part in parts for x in (part.weight, part.gradient)}
    passes = select.passes("auto", like.device, dtypes | {like.dtype})
    passes.apply_(parts, [job.lr] * len(parts), [job.weight_decay] * len(parts), job.seeds())


def _seed(seed: Tensor | None, block: slice) -> Tensor | None:
    """Other noise for each block of rows."""
    return None if seed is None else lowbias32((seed + block.start) & 0xFFFFFFFF)
