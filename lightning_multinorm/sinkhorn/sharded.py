"""SR-Sinkhorn of matrices that are spread over ranks: only vectors travel, and all matrices' vectors together.

The scalings r of all matrices lie one after another in one vector, and so do the scalings c. A half step adds up sums
of squares of what this rank holds, completes them by one all-reduce for all matrices together, and moves the scalings.
A matrix is never gathered. With rows sharded, as FSDP2 does, that makes L collectives of n floats per matrix (twice as
many in the first), one more if residuals are asked for, and one more if columns are sharded.

Products are taken as (r G) c with the scalings so far, so all but the first are near 1. In the first iteration rows are
brought into the middle of the range by powers of two a, and columns are summed twice, as they are and times 2^60, since
one may be 1e-30 of its neighbours, where squares underflow.

Legend: G gradient (m, n), W weight; r, c scalings; R row sums, C column sums of ((r G) c)²; L iterations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_multinorm.layouts import Groups, ShardedMatrix, reduce_
from lightning_multinorm.rounding import lowbias32
from lightning_multinorm.scaling import inverse_power_of_two, working_dtype
from lightning_multinorm.sinkhorn.tracing import Tracing

LIFT = 2.0**60
_LIFTED_BELOW = 2.0**-60  # a column with a larger sum loses nothing without the lift
_LARGEST_SUM = 2.0**120
_SMALLEST, _LARGEST = 2.0**-130, (2 - 2**-23) * 2.0**127  # of a scaling


class Part(NamedTuple):
    """What a rank holds of a matrix, as (k, l), with its stretches of the common vectors."""

    weight: Tensor
    gradient: Tensor
    r: Tensor
    c: Tensor
    R: Tensor
    C: Tensor
    lifted: Tensor


class Passes(Protocol):
    """One read of every part; sums are added to what is there. `eager_passes` and `cpu_passes` provide it."""

    def add_row_sums(self, parts: Sequence[Part]) -> None:
        """R += sums over columns of ((r G) c)²."""

    def add_column_sums(self, parts: Sequence[Part], lift: bool) -> None:
        """C += sums over rows of ((r G) c)²; with ``lift``, lifted += those of (2^60 (r G) c)²."""

    def take_largest(self, parts: Sequence[Part]) -> None:
        """R <- the larger of R and the largest magnitude of each row of G."""

    def apply_(
        self, parts: Sequence[Part], lr: Sequence[float | Tensor], weight_decay: Sequence[float],
        seeds: Sequence[int | Tensor | None],
    ) -> None:  # fmt: skip
        """W <- (1 - lr · weight_decay) W - lr · (r G) c, rounded once, stochastically for those with a seed."""


@dataclass(frozen=True)
class Job:
    """A matrix to update, and how.

    Attributes:
        matrix: what this rank holds of it.
        parameter: the number of the parameter that it belongs to, among those that are updated together.
        lr: effective learning rate.
        weight_decay: decoupled weight decay.
        seed: rounds a bfloat16 weight stochastically; the same on all ranks. Noise depends on the place of a piece, so
            replicas round alike.
    """

    matrix: ShardedMatrix
    parameter: int
    lr: float | Tensor
    weight_decay: float = 0.0
    seed: Tensor | None = None

    def seeds(self) -> list[Tensor | None]:
        """One for each piece."""
        if self.seed is None:
            return [None] * len(self.matrix.pieces)
        places = (place(self.matrix, piece.row, piece.column) for piece in self.matrix.pieces)
        return [lowbias32((self.seed + at) & 0xFFFFFFFF) for at in places]


def update_(
    jobs: Sequence[Job],
    iterations: int,
    passes: Passes,
    like: Tensor,
    *,
    trace: bool = False,
) -> Tracing | None:
    """SinkGD's update of sharded matrices, of any shapes, on one device; a collective call, equal on all ranks.

    Args:
        jobs: the matrices, in the same order on every rank.
        iterations: L.
        passes: what reads and updates the local parts.
        like: a gradient, for device and dtype where this rank's shards are all empty.
        trace: also return what was seen on the way.

    Returns:
        A tracing, or None: residuals (parameters, L, 2), equal on all ranks; rows and columns of this rank's frames of
        the jobs' matrices, one after another.
    """
    work = alternated(jobs, iterations, passes, like, trace=trace)
    work.apply_(passes)
    return work.tracing()


def trace(jobs: Sequence[Job], iterations: int, passes: Passes, like: Tensor) -> Tracing:
    """What `update_` would see, without the update; a collective call."""
    found = alternated(jobs, iterations, passes, like, trace=True).tracing()
    assert found is not None
    return found


def alternated(jobs: Sequence[Job], iterations: int, passes: Passes, like: Tensor, *, trace: bool) -> "Work":
    """The scalings of `update_`, found and not applied yet; a collective call."""
    work = Work(jobs, iterations, like, trace)
    work.begin(passes)
    for k in range(iterations):
        work.step_rows(passes, k)
        work.step_columns(passes, k)
    if trace and iterations:
        work.measure_rows(passes)
    return work


class Work:
    """The common vectors, and the half steps on them.

    Attributes:
        r: scalings of the rows of all frames, one frame after another.
        c: likewise of the columns.
        row_spans: where each matrix' rows lie in r.
        column_spans: likewise in c.
    """

    def __init__(self, jobs: Sequence[Job], iterations: int, like: Tensor, trace: bool) -> None:
        device, dtype = like.device, working_dtype(like)
        self.matrices = [job.matrix for job in jobs]
        rows, columns = ([matrix.frame[side] for matrix in self.matrices] for side in (0, 1))
        self.r, self.R = (torch.zeros(sum(rows), dtype=dtype, device=device) for _ in range(2))
        self.c, self.C, self.lifted = (torch.ones(sum(columns), dtype=dtype, device=device) for _ in range(3))
        self.row_spans, self.column_spans = _spans(rows), _spans(columns)
        self.m = _spread([matrix.shape[0] for matrix in self.matrices], columns, self.C)
        self.n = _spread([matrix.shape[1] for matrix in self.matrices], rows, self.R)
        self.parts = [part for k, matrix in enumerate(self.matrices) for part in self._parts(k, matrix)]
        self.jobs, self.iterations, self.rows = jobs, iterations, self.r
        count = 1 + max(job.parameter for job in jobs)
        self.errors = torch.zeros(count, iterations, 2, dtype=dtype, device=device) if trace else None

    def _parts(self, k: int, matrix: ShardedMatrix) -> list[Part]:
        i, j = self.row_spans[k].start, self.column_spans[k].start
        found = []
        for W, G, row, column in matrix.pieces:
            rows, columns = slice(i + row, i + row + len(G)), slice(j + column, j + column + G.shape[1])
            vectors = self.r[rows], self.c[columns], self.R[rows], self.C[columns], self.lifted[columns]
            found.append(Part(W, G, *vectors))
        return found

    def begin(self, passes: Passes) -> None:
        """r <- powers of two that bring the largest entry of each row into [1/2, 1); c is 1."""
        passes.take_largest(self.parts)
        self._reduce_rows(dist.ReduceOp.MAX)
        self.r.copy_(inverse_power_of_two(self.R))

    def step_rows(self, passes: Passes, k: int) -> None:
        """The half step on rows of the k-th iteration."""
        self._sum_rows(passes)
        if k:
            self._add_row_errors(k - 1)
        _scale_(self.r, _step(self.n, self.R))
        if k == 0 and self.errors is not None:
            self.rows = self.r.clone()

    def step_columns(self, passes: Passes, k: int) -> None:
        """The half step on columns."""
        self.C.zero_()
        self.lifted.zero_()
        passes.add_column_sums(self.parts, k == 0)
        sums = (self.C, self.lifted) if k == 0 else (self.C,)
        reduce_(sums, zip(self.column_spans, (matrix.column_groups for matrix in self.matrices), strict=True))
        C = self.C
        if k == 0:
            lifted = C < _LIFTED_BELOW
            C = torch.where(lifted, self.lifted, C)
            self.c.copy_(torch.where(lifted, LIFT, 1))
        step = _step(self.m, C)
        _scale_(self.c, step)
        self._add_errors(_relative(C, self.m) * step, self.column_spans, k, 1)

    def measure_rows(self, passes: Passes) -> None:
        """What the last columns' step has done to the rows."""
        self._sum_rows(passes)
        self._add_row_errors(self.iterations - 1)

    def apply_(self, passes: Passes) -> None:
        """Update the weights by the scalings as they are."""
        owners = [job for job in self.jobs for _ in job.matrix.pieces]
        seeds = [seed for job in self.jobs for seed in job.seeds()]
        passes.apply_(self.parts, [job.lr for job in owners], [job.weight_decay for job in owners], seeds)

    def tracing(self) -> Tracing | None:
        """Residuals are root mean squares over all rows, or columns, of all matrices of a parameter."""
        if self.errors is None:
            return None
        for side in (0, 1):
            groups: dict[int, Groups] = {}
            for job in self.jobs:
                groups[job.parameter] = job.matrix.row_frames if side == 0 else job.matrix.column_frames
            flat = self.errors[..., side].flatten()
            spans = [(slice(p * self.iterations, (p + 1) * self.iterations), g) for p, g in groups.items()]
            reduce_((flat,), spans)
            self.errors[..., side] = flat.view(-1, self.iterations)
        return Tracing(self.errors.sqrt(), self.rows, self.c)

    def _sum_rows(self, passes: Passes) -> None:
        self.R.zero_()
        passes.add_row_sums(self.parts)
        self._reduce_rows(dist.ReduceOp.SUM)

    def _reduce_rows(self, op: dist.ReduceOp.RedOpType) -> None:
        reduce_((self.R,), zip(self.row_spans, (matrix.row_groups for matrix in self.matrices), strict=True), op)

    def _add_row_errors(self, k: int) -> None:
        self._add_errors(_relative(self.R, self.n), self.row_spans, k, 0)

    def _add_errors(self, norms: Tensor, spans: Sequence[slice], k: int, side: int) -> None:
        """If asked for: mean of (norm - 1)² over the rows (side 0) or columns (1) of a parameter's matrices."""
        if self.errors is None:
            return
        errors = torch.where(norms == 0, 0, (norms - 1).square())
        for job, span in zip(self.jobs, spans, strict=True):
            total = errors[span].sum() * (job.matrix.share / job.matrix.shape[side])
            self.errors[job.parameter, k, side] += total


def _spans(lengths: Sequence[int]) -> list[slice]:
    ends = [sum(lengths[: k + 1]) for k in range(len(lengths))]
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def _spread(values: Sequence[int], lengths: Sequence[int], like: Tensor) -> Tensor:
    """values[k], lengths[k] times."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).repeat_interleave(
        torch.tensor(lengths, device=like.device)
    )


def _step(target: Tensor, sums: Tensor) -> Tensor:
    """√(target / sums), 0 where the sum is 0; two roots, since the quotient of a tiny sum would overflow."""
    finite = sums.clamp(max=_LARGEST_SUM)
    return torch.where(sums == 0, 0, target.sqrt() / torch.where(sums == 0, 1, finite).sqrt())


def _scale_(scaling: Tensor, step: Tensor) -> None:
    """scaling <- scaling · step within the range of scalings; 0 where the step is."""
    scaling.copy_(torch.where(step == 0, 0, (scaling * step).clamp(_SMALLEST, _LARGEST)))


def _relative(sums: Tensor, target: Tensor) -> Tensor:
    return (sums / target).sqrt()


def place(matrix: ShardedMatrix, row: int, column: int) -> int:
    """A number that tells the pieces of a matrix apart, the same on replicas."""
    return lowbias32(int(matrix.rows[row]) * matrix.shape[1] + int(matrix.columns[column]) & 0xFFFFFFFF)
