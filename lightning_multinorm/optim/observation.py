"""What observers are told of a parameter's update: how its norms converged, what gradient and update are like.

Everything is made of vectors that the update has anyway, and of the weight's norm, which costs one read of it; nothing
leaves the device. Statistics are sums over the matrices of a parameter, so that ranks can add up theirs.

Legend: G gradient (m, n), W weight, X normalised gradient; ξ = 1 / tail index.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_multinorm.layouts import reduce_
from lightning_multinorm.sinkhorn.sharded import Job
from lightning_multinorm.sinkhorn.tracing import SUMS, TAIL, squares

STATISTICS = ("gradient_norm", "tail_index", "dead_rows", "dead_columns", "update_rms", "update_to_weight")
"""The names of what is told, in order. The gradient's norm is ‖G‖_F. The tail index is Hill's estimate of the exponent
with which the largest tenth of the row norms of G falls off, at most 1000; small is heavy-tailed, at 2 and below there
is no variance. Dead rows and columns are those of G that are zero. The update's RMS is of the change of W, its ratio to
the weight ‖change of W‖_F / ‖W‖_F, 0 for a weight that is zero."""

_NO_TAIL = 1e-3  # the smallest ξ told


class Observation(NamedTuple):
    """Of one parameter in one step; on its device.

    Attributes:
        norms: names of the norms, in order.
        residuals: (L, len(norms)) after each iteration, ‖X − P(X)‖_F / √(mn); root mean square of several matrices.
        statistics: (len(STATISTICS),), in the order of `STATISTICS`.
    """

    norms: tuple[str, ...]
    residuals: Tensor
    statistics: Tensor


Observer = Callable[[Tensor, Observation], None]
"""Called with a parameter and what was observed of its update."""


class Measured(NamedTuple):
    """Of the matrices of p parameters that were updated together.

    Attributes:
        norms: names of the norms, in order.
        residuals: (p, ..., L, len(norms)); of sharded ones (p, L, len(norms)), equal on all ranks.
        rows: (p, ..., m), 1 / RMS of every row of G, 0 for a zero row; of sharded ones as in `sharded.update_`.
        columns: (p, ..., n), 0 for a zero column of G; of sharded ones likewise.
        mean_square: (p, ...) of X, or of each job; None if it is the share of columns that are not zero.
        weights: (p, ...), ‖W‖_F² before the update; None of sharded ones.
        sums: (p, ..., len(SUMS)), what else would be added up from all these, if a kernel has done so.
    """

    norms: tuple[str, ...]
    residuals: Tensor
    rows: Tensor
    columns: Tensor
    mean_square: Tensor | None = None
    weights: Tensor | None = None
    sums: Tensor | None = None


def inverse_rms(squares: Tensor) -> Tensor:
    """Mean squares of rows to what `Measured.rows` holds."""
    return torch.where(squares == 0, 0, squares.rsqrt())


def observe_whole(updates: Sequence[Measured], lr: float | Tensor) -> list[Observation]:
    """Of each parameter of some updates at one rate, from its matrices."""
    by_update = [measured.sums for measured in updates if measured.sums is not None]
    if len(by_update) < len(updates):
        by_update = _sums_of(updates)
    sums = torch.cat([x if x.ndim == 2 else x.flatten(1, -2).sum(1) for x in by_update])
    residuals = []
    for measured in updates:
        errors = measured.residuals
        errors = errors.flatten(1, -3).square().mean(1).sqrt() if errors.ndim > 3 else errors
        residuals += [(measured.norms, error) for error in errors.unbind()]
    statistics = _statistics(sums, lr).unbind()
    return [Observation(*errors, told) for errors, told in zip(residuals, statistics, strict=True)]


def _sums_of(updates: Sequence[Measured]) -> list[Tensor]:
    """For each update (p, ..., len(SUMS))."""
    rows, live, mean_squares, weights, shapes, shares = [], [], [], [], list[tuple[int, int]](), list[float]()
    for measured in updates:
        assert measured.weights is not None
        rows.append(measured.rows.flatten(0, -2))
        live.append(measured.columns.count_nonzero(-1).flatten())
        mean_squares.append(None if measured.mean_square is None else measured.mean_square.flatten())
        weights.append(measured.weights.flatten())
        shapes += [(measured.rows.shape[-1], measured.columns.shape[-1])] * len(rows[-1])
        shares += [len(measured.weights) / len(rows[-1])] * len(rows[-1])
    found = [x for x in mean_squares if x is not None]
    sums = _sums(
        rows, torch.cat(live), tuple(shapes), tuple(shares), torch.cat(weights), torch.cat(found) if found else None
    )
    parts = sums.split([len(part) for part in rows])
    return [part.view(*measured.rows.shape[:-1], len(SUMS)) for part, measured in zip(parts, updates, strict=True)]


def sharded_weight_squares(jobs: Sequence[Job], like: Tensor) -> Tensor:
    """‖W‖_F² (jobs,) of whole matrices; a collective call, before the update."""
    zero = like.new_zeros((), dtype=_working(like))
    found = torch.stack([sum((squares(piece.weight) for piece in job.matrix.pieces), start=zero) for job in jobs])
    groups = [tuple(dict.fromkeys((*job.matrix.column_groups, *job.matrix.row_groups))) for job in jobs]
    reduce_((found,), [(slice(k, k + 1), group) for k, group in enumerate(groups)])
    return found


def observe_sharded(measured: Measured, jobs: Sequence[Job], weights: Tensor) -> list[Observation]:
    """Of each parameter, from all jobs, in their order; a collective call."""
    rows, live = _whole_rows(measured.rows, jobs), live_columns(measured.columns, jobs)
    sums = weights.new_zeros(len(measured.residuals), len(SUMS), dtype=_wide(weights))
    shapes, shares = tuple(job.matrix.shape for job in jobs), tuple(job.matrix.share for job in jobs)
    by_job = _sums([row.unsqueeze(0) for row in rows], live, shapes, shares, weights, measured.mean_square)
    for job, found in zip(jobs, by_job.unbind(), strict=True):
        if job.matrix.share:  # else it stands for a shard that holds no matrix at all
            sums[job.parameter] += found
    groups = {job.parameter: job.matrix.batch_groups for job in jobs}
    reduce_((sums.view(-1),), [(slice(p * len(SUMS), (p + 1) * len(SUMS)), found) for p, found in groups.items()])
    rates = {job.parameter: job.lr for job in jobs}
    statistics = [_statistics(sums[p], rates[p]) for p in range(len(sums))]
    return [Observation(measured.norms, *found) for found in zip(measured.residuals.unbind(), statistics, strict=True)]


def _sums(
    rows: Sequence[Tensor],
    live_columns: Tensor,
    shapes: tuple[tuple[int, int], ...],
    shares: tuple[float, ...],
    weight_squares: Tensor,
    mean_square: Tensor | None,
) -> Tensor:
    """What adds up over the matrices of a parameter, each of them a share of it: (matrices, len(SUMS)).

    All matrices at once, their rows filled up with zeros: these are many operations on little data.
    """
    joined = rows[0]
    if len(rows) > 1:
        joined = rows[0].new_zeros(len(shapes), max(m for m, _ in shapes))
        for place, part in zip(joined.split([len(part) for part in rows]), rows, strict=True):
            place[:, : part.shape[1]] = part
    fixed = _constants(shapes, shares, joined.device, _wide(joined))
    live = joined != 0
    inverse = torch.where(live, joined, torch.inf)  # of rows that are zero, and of those filled up
    mean = live_columns / fixed.n if mean_square is None else mean_square
    tail = _inverse_tail_index(inverse, fixed) if inverse.shape[-1] else torch.zeros_like(mean)
    mean_squares = inverse.to(_wide(inverse)).reciprocal_().square_()  # of rows
    columns = [mean_squares.sum(-1) * fixed.n, tail * fixed.share, fixed.m - live.sum(-1), fixed.n - live_columns]
    return torch.stack([*columns, mean * fixed.share, weight_squares, fixed.entries], -1)


class _Constants(NamedTuple):
    """Of each matrix."""

    m: Tensor
    n: Tensor
    entries: Tensor
    share: Tensor
    last: Tensor  # (matrices, 1): the place, by size, of the first row that is no longer of the tail
    weights: Tensor  # (matrices, longest tail): 1 / k for the k rows of the tail


@lru_cache(maxsize=64)
def _constants(
    shapes: tuple[tuple[int, int], ...], shares: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> _Constants:
    """Made once, for a copy to the device waits for it."""
    tails = [max(0, min(math.ceil(TAIL * m), m - 1)) for m, _ in shapes]
    weights = torch.zeros(len(shapes), max(tails) + 1, dtype=dtype)
    for row, k in zip(weights, tails, strict=True):
        row[:k] = 1 / max(1, k)
    numbers = ([m for m, _ in shapes], [max(1, n) for _, n in shapes], [m * n for m, n in shapes], shares)
    m, n, entries, share = (torch.tensor(values, dtype=dtype).to(device) for values in numbers)
    return _Constants(m, n, entries, share, torch.tensor(tails).unsqueeze(-1).to(device), weights.to(device))


def _inverse_tail_index(inverse: Tensor, fixed: _Constants) -> Tensor:
    """Hill's estimator of ξ from 1 / x (matrices, m): the mean of log(x_i / x_{k+1}) over the k largest x of each."""
    smallest = inverse.topk(fixed.weights.shape[-1], largest=False).values.to(fixed.weights.dtype)
    # log1p, as MKL's log makes even a few numbers wait for all threads, which on a busy machine takes milliseconds.
    logs = (smallest.gather(-1, fixed.last) / smallest).sub_(1).log1p_().nan_to_num_(0, torch.inf, 0)
    return torch.where(fixed.weights == 0, 0, logs * fixed.weights).sum(-1)


def _statistics(sums: Tensor, lr: float | Tensor) -> Tensor:
    """(..., len(SUMS)) to (..., len(STATISTICS)), in float32."""
    gradient, tail, dead_rows, dead_columns, mean_square, weight, entries = sums.unbind(-1)
    rms = mean_square.sqrt() * lr
    ratio = torch.where(weight == 0, 0, rms * entries.sqrt() / weight.sqrt())
    index = tail.clamp(min=_NO_TAIL).reciprocal()
    return torch.stack([gradient.sqrt(), index, dead_rows, dead_columns, rms, ratio], -1).float()


def _whole_rows(rows: Tensor, jobs: Sequence[Job]) -> list[Tensor]:
    """(m,) of every job's matrix, from the frames of all ranks."""
    frames = rows.split([job.matrix.frame[0] for job in jobs])
    lengths = [job.matrix.shape[0] for job in jobs]
    joined = rows.new_zeros(sum(lengths))
    whole = joined.split(lengths)
    for place, frame, job in zip(whole, frames, jobs, strict=True):
        place[job.matrix.rows.to(rows.device)] = frame
    starts = [sum(lengths[:k]) for k in range(len(lengths))]
    groups = [() if job.matrix.flat else job.matrix.column_groups for job in jobs]
    reduce_((joined,), [(slice(i, i + m), g) for i, m, g in zip(starts, lengths, groups, strict=True)])
    return list(whole)


def live_columns(columns: Tensor, jobs: Sequence[Job]) -> Tensor:
    """How many columns of each job's matrix are not zero, (jobs,), from the frames of all ranks; a collective call."""
    frames = columns.split([job.matrix.frame[1] for job in jobs])
    live = torch.stack([frame.count_nonzero() for frame in frames])
    groups = [() if job.matrix.flat else job.matrix.row_groups for job in jobs]
    reduce_((live,), [(slice(k, k + 1), g) for k, g in enumerate(groups)])
    return live


def _working(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _wide(tensor: Tensor) -> torch.dtype:
    """Squares of 1e±25 need float64, which not every accelerator has."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
