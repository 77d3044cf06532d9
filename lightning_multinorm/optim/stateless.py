"""Rules without state for what is no hidden matrix: embedding, output head, norm gains and biases.

SR-Sinkhorn does not fit an embedding: rows of tokens that the batch lacks are zero, so with k of m rows active it makes
these √(m/k) too large, and it raises rows of mere noise to full norm. The rules here keep a power of the rows' norms
instead, so that rare rows move less than frequent ones, but more than in proportion: no floor is needed.

As in `lightning_multinorm.sinkhorn`, no direction is formed as a whole. It is ``diag(r) G``, ``diag(r) G diag(c)`` or
``diag(r) G S`` with vectors r, c and a small matrix S, G is read in blocks of rows, and only vectors (and Gram
matrices) travel between ranks. Directions have entries of RMS 1, and multiplying the gradient by a power of two changes
no bit of them.

Legend: G gradient, W weight (m, n), m rows = tokens, n columns = features; r (m,), c (n,) scalings; S (n, n); N_i norms
of rows; X = diag(r) G; a, b powers of two.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_multinorm.layouts import FlatSlice, Groups, Piece, ShardedMatrix, cut, gather, is_dtensor, local, locate
from lightning_multinorm.norms import MaxNorm
from lightning_multinorm.optim.normalized import subtract_
from lightning_multinorm.rounding import lowbias32
from lightning_multinorm.scaling import inverse_power_of_two, working_dtype
from lightning_multinorm.sinkhorn.eager import apply_part_, block_size
from lightning_multinorm.sinkhorn.sharded import Job
from lightning_multinorm.views import View, as_matrices
from lightning_multinorm.whitening import inverse_root, polar_newton_schulz


@dataclass(frozen=True)
class RowPower:
    """Rows keep their norm to a power, and then columns are made alike.

    Attributes:
        power: p; row i of X has norm N_i^p. 1 leaves rows as they are, 0 gives all that are not zero the same norm.
        columns: "none"; "normalized", to equal norms; or "whitened", to equal norms and right angles.
    """

    power: float
    columns: Literal["none", "normalized", "whitened"]


MATRIX_RULES: Mapping[str, RowPower] = {
    "row_root": RowPower(0.5, "none"),
    "row_root_column": RowPower(0.5, "normalized"),
    "row_root_whitened": RowPower(0.5, "whitened"),
    "column": RowPower(1.0, "normalized"),
}
"""row_root: rows divided by the square roots of their norms. row_root_column: then columns normalised.
row_root_whitened: then whitened by the Gram matrix of the columns, by the Newton–Schulz iteration of arXiv:2412.13148.
column: columns normalised, as arXiv:2506.16659 (SCALE) does with the output head, but without its momentum."""

_NO_ROW = 10_000  # exponent of a row that is zero, beyond any other


LR_SCALES: Mapping[str, float] = {
    "row_root": 1.0,
    "row_root_column": 0.25,
    "row_root_whitened": 0.25,
    "column": 0.25,
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
        rule = MATRIX_RULES[group["rule"]]
        for i, matrix in enumerate(_matrices(parameter, parameter.grad, group["view"], slices.get(parameter))):
            job = Job(matrix, 0, lr, decay, None if seed is None else seed + i)
            if rule.columns == "whitened":
                _apply_whitened_(job, rule.power, local(parameter))
            else:
                _apply_scaled_(job, rule, local(parameter))


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
    for rows in _row_blocks(G):
        X = MaxNorm().project(G[rows]).to(torch.promote_types(W.dtype, torch.float32))
        subtract_(W[rows], X, lr, weight_decay, _seed(seed, rows))


def _apply_scaled_(job: Job, rule: RowPower, like: Tensor) -> None:
    r = _row_scaling(job.matrix, rule.power, like)
    c = _column_scaling(job.matrix, r) if rule.columns == "normalized" else r.new_ones(job.matrix.frame[1])
    for piece, seed in zip(job.matrix.pieces, job.seeds(), strict=True):
        rows, columns = _place(piece)
        apply_part_(piece.weight, piece.gradient, r[rows], c[columns], job.lr, job.weight_decay, seed)


def _apply_whitened_(job: Job, power: float, like: Tensor) -> None:
    matrix, (m, n) = job.matrix, job.matrix.shape
    if matrix.row_groups or matrix.flat or m < n:
        _apply_gathered_(job, power, like)
        return
    r = _row_scaling(matrix, power, like)
    A = r.new_zeros(n, n)
    for piece in matrix.pieces:
        for _, X in _scaled_blocks(piece, r):
            A.addmm_(X.mT, X)
    _all_reduce(A, matrix.column_groups)
    S = inverse_root(A.clone())
    S *= _to_rms_one((S @ A * S).sum(), m * n)  # S is symmetric, so this is ‖X S‖_F²
    for piece, seed in zip(matrix.pieces, job.seeds(), strict=True):
        for rows, X in _scaled_blocks(piece, r):
            subtract_(piece.weight[rows], X @ S, job.lr, job.weight_decay, _seed(seed, rows))


def _apply_gathered_(job: Job, power: float, like: Tensor) -> None:
    """The same with X formed as a whole, on every rank: of matrices wider than high, or whose rows are cut in parts."""
    wide = like.new_empty(0, dtype=working_dtype(like))
    X = gather(job.matrix, [piece.gradient.to(wide) for piece in job.matrix.pieces], wide)
    X *= _row_scaling(_alone(X, X), power, like).unsqueeze(-1)
    X = polar_newton_schulz(X)
    X *= _to_rms_one(X.square().sum(), X.numel())
    for piece, part, seed in zip(job.matrix.pieces, cut(job.matrix, X), job.seeds(), strict=True):
        subtract_(piece.weight, part, job.lr, job.weight_decay, seed)


def _to_rms_one(squared: Tensor, count: int) -> Tensor:
    return torch.where(squared > 0, (count / squared).sqrt(), 0)


def _row_scaling(matrix: ShardedMatrix, power: float, like: Tensor) -> Tensor:
    """r for the frame's rows: ``diag(r) G`` has rows of norms N_i^power, times what makes its entries RMS 1.

    With a_i N_i = s_i in [1/2, √n) and a_i = 2^e a_0, a_0 of the largest row, N_i is s_i 2^-e in units of 1/a_0, and
    no square of a small row is lost beside a large one.
    """
    (m, n), frame = matrix.shape, matrix.frame
    largest, squares = (torch.zeros(frame[0], dtype=working_dtype(like), device=like.device) for _ in range(2))
    for piece in matrix.pieces:
        rows, _ = _place(piece)
        for block in _row_blocks(piece.gradient):
            found = torch.linalg.vector_norm(piece.gradient[block], float("inf"), dim=-1).to(largest.dtype)
            largest[rows][block] = torch.maximum(largest[rows][block], found)
    _all_reduce(largest, matrix.row_groups, dist.ReduceOp.MAX)
    a = inverse_power_of_two(largest)
    for piece in matrix.pieces:
        for block, X in _scaled_blocks(piece, a):
            squares[_place(piece)[0]][block] += X.square_().sum(-1)
    _all_reduce(squares, matrix.row_groups)
    exponent = torch.where(largest > 0, torch.frexp(a).exponent, _NO_ROW)
    smallest = exponent.amin() if len(exponent) else exponent.new_full((), _NO_ROW)
    _all_reduce(smallest, matrix.row_frames, dist.ReduceOp.MIN)
    # In two factors, since 2^-e may be below the range where 2^-e a_i is not.
    half = torch.exp2((exponent - smallest).to(a.dtype) * (-power / 2))
    half = torch.where(largest > 0, half, 0)
    norms = torch.where(squares > 0, squares, 1).sqrt()
    total = (norms.pow(power) * half * half).square().sum()
    _all_reduce(total, matrix.row_frames)
    return norms.pow_(power - 1).mul_(a).mul_(half).mul_(half).mul_(_to_rms_one(total, m * n))


def _column_scaling(matrix: ShardedMatrix, r: Tensor) -> Tensor:
    """c for the frame's columns: the columns of ``diag(r) G diag(c)`` have norm √m."""
    largest, squares = (r.new_zeros(matrix.frame[1]) for _ in range(2))
    for piece in matrix.pieces:
        _, columns = _place(piece)
        for _, X in _scaled_blocks(piece, r):
            found = torch.linalg.vector_norm(X, float("inf"), dim=0)
            largest[columns] = torch.maximum(largest[columns], found)
    _all_reduce(largest, matrix.column_groups, dist.ReduceOp.MAX)
    b = inverse_power_of_two(largest)
    for piece in matrix.pieces:
        _, columns = _place(piece)
        for _, X in _scaled_blocks(piece, r):
            squares[columns] += X.mul_(b[columns]).square_().sum(0)
    _all_reduce(squares, matrix.column_groups)
    return torch.where(squares > 0, b * matrix.shape[0] ** 0.5 / squares.sqrt(), 0)


def _scaled_blocks(piece: Piece, scaling: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """diag(scaling) G, a block of rows after another, in a buffer that the caller may spoil."""
    rows, _ = _place(piece)
    buffer = None
    for block in _row_blocks(piece.gradient):
        G = piece.gradient[block]
        buffer = scaling.new_empty(G.shape) if buffer is None else buffer[: len(G)]
        yield block, torch.mul(G, scaling[rows][block].unsqueeze(-1), out=buffer)


def _row_blocks(G: Tensor) -> Iterator[slice]:
    step = max(1, block_size(G) // max(1, G.numel() // max(1, len(G))))
    for i in range(0, len(G), step):
        yield slice(i, min(i + step, len(G)))


def _place(piece: Piece) -> tuple[slice, slice]:
    rows, columns = piece.gradient.shape
    return slice(piece.row, piece.row + rows), slice(piece.column, piece.column + columns)


def _seed(seed: Tensor | None, rows: slice) -> Tensor | None:
    """Other noise for each block of rows."""
    return None if seed is None else lowbias32((seed + rows.start) & 0xFFFFFFFF)


def _all_reduce(tensor: Tensor, groups: Groups, op: Any = None) -> None:
    for group in groups:
        dist.all_reduce(tensor, op=op or dist.ReduceOp.SUM, group=group)
