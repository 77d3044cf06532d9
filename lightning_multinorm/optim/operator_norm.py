"""The spectral norm of normalised gradients ``diag(r) G diag(c)``, whole or spread over ranks, without forming them.

By a few steps of Lanczos' iteration on XᵀX with X = diag(r) G diag(c): as many products as power iteration, and several
times its accuracy where singular values lie close. It starts from a vector whose entries hang on the numbers of columns
alone, so nothing is remembered between steps, and shards see the same vector as a whole matrix. A step reads G once, in
blocks of rows, twice if rows are cut; all matrices' vectors travel together, in two or three collectives a step.

Legend: G gradient (m, n); r (m,), c (n,) scalings; v Lanczos vector (n,), y = X v (m,), z = XᵀX v (n,).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_multinorm.batch import Batch
from lightning_multinorm.layouts import Groups, Piece, ShardedMatrix, reduce_, unsharded
from lightning_multinorm.optim.observation import Measured, live_columns
from lightning_multinorm.optim.scalings import place, row_blocks
from lightning_multinorm.rounding import lowbias32
from lightning_multinorm.sinkhorn.sharded import Job, Passes, alternated
from lightning_multinorm.sinkhorn.tracing import weight_squares

STEPS = 8
"""The result is some 1 % too low for the flattest spectra (Gaussian entries), rarely 6 %, where the start happens to be
almost orthogonal to what is sought; far less where a few singular values stand out, as in gradients; never too high."""

_SQUARINGS = 18
"""Of a matrix (STEPS, STEPS): of eigenvalues that lie close, the result may be a mean, too low by at most 1e-6. They do
lie close: where G has fewer directions than there are steps, rounding makes all but copies of them."""


class Scaled:
    """Matrices X = diag(r) G diag(c) of any shapes on one device, their vectors one after another.

    Args:
        matrices: what this rank holds of each G; in the same order on every rank.
        r: of all frames' rows, one frame after another.
        c: likewise of columns.
    """

    def __init__(self, matrices: Sequence[ShardedMatrix], r: Tensor, c: Tensor) -> None:
        self.matrices, self.r, self.c = matrices, r, c
        self.rows, self.columns = (_spans([matrix.frame[side] for matrix in matrices]) for side in (0, 1))

    def norms(self) -> Tensor:
        """The largest singular value of each matrix, (k,); 0 for a zero matrix; NaN where G has one.

        A collective call, equal on all ranks.
        """
        v, before, offdiagonal = self._start(), torch.zeros_like(self.c), self.c.new_zeros(len(self.matrices))
        T = self.c.new_zeros(len(self.matrices), STEPS, STEPS)
        for k in range(STEPS):
            z = self._gram(v)
            T[:, k, k] = diagonal = self._dots(v, z)
            if k + 1 == STEPS:
                break
            z = z.sub_(self.spread(diagonal) * v).sub_(self.spread(offdiagonal) * before)
            offdiagonal = self._dots(z, z).sqrt()
            T[:, k, k + 1] = T[:, k + 1, k] = offdiagonal
            before, v = v, z.div_(self.spread(torch.where(offdiagonal == 0, 1, offdiagonal)))
        return _largest_eigenvalue(T).sqrt()

    def _start(self) -> Tensor:
        """Of norm 1, and not of signs: they can be orthogonal to a single row of ±1, and to what two columns share."""
        found = []
        for matrix in self.matrices:
            numbers = torch.arange(1, matrix.shape[1] + 1, device=self.c.device)
            v = lowbias32(numbers).to(self.c.dtype) / 2**31 - 1
            found.append((v / torch.linalg.vector_norm(v))[matrix.columns])
        return torch.cat(found)

    def _gram(self, v: Tensor) -> Tensor:
        """XᵀX v."""
        v, y, z = self.c * v, torch.zeros_like(self.r), torch.zeros_like(self.c)
        for k, matrix in enumerate(self.matrices):
            for rows, columns, G in self._blocks(k, matrix):
                own, r = G @ v[columns], self.r[rows]
                y[rows] += own
                if not matrix.row_groups:  # rows are complete
                    z[columns] += (r * (r * own)) @ G  # never r²: it would leave the range
        reduce_((y,), zip(self.rows, (matrix.row_groups for matrix in self.matrices), strict=True))
        for k, matrix in enumerate(self.matrices):
            for rows, columns, G in self._blocks(k, matrix) if matrix.row_groups else ():
                r = self.r[rows]
                z[columns] += (r * (r * y[rows])) @ G
        reduce_((z,), zip(self.columns, (matrix.column_groups for matrix in self.matrices), strict=True))
        return z.mul_(self.c)

    def _blocks(self, k: int, matrix: ShardedMatrix) -> Iterator[tuple[slice, slice, Tensor]]:
        """Blocks of rows of G, and where they lie among all rows and columns."""
        for piece in matrix.pieces:
            first, columns = self._place(k, piece)
            for block in row_blocks(piece.gradient):
                rows = slice(first.start + block.start, first.start + block.stop)
                yield rows, columns, piece.gradient[block].to(self.r.dtype)

    def _place(self, k: int, piece: Piece) -> tuple[slice, slice]:
        (rows, columns), i, j = place(piece), self.rows[k].start, self.columns[k].start
        return slice(i + rows.start, i + rows.stop), slice(j + columns.start, j + columns.stop)

    def _dots(self, x: Tensor, y: Tensor) -> Tensor:
        """Of each matrix."""
        dots = torch.stack([(x[span] * y[span]).sum() for span in self.columns])
        frames: list[Groups] = [() if matrix.flat else matrix.row_groups for matrix in self.matrices]
        reduce_((dots,), [(slice(k, k + 1), groups) for k, groups in enumerate(frames)])
        return dots

    def spread(self, values: Tensor) -> Tensor:
        """values[k] for each column of the k-th matrix."""
        return torch.cat(
            [value.expand(span.stop - span.start) for value, span in zip(values, self.columns, strict=True)]
        )


def update_(jobs: Sequence[Job], iterations: int, passes: Passes, like: Tensor, *, observe: bool) -> Measured | None:
    """`sinkhorn.sharded.update_` with updates of spectral norm √(m/n), in place of entries of RMS 1."""
    work = alternated(jobs, iterations, passes, like, trace=observe)
    scaled = Scaled(work.matrices, work.r, work.c)
    norms = scaled.norms()
    targets = norms.new_tensor([(job.matrix.shape[0] / max(1, job.matrix.shape[1])) ** 0.5 for job in jobs])
    factors = torch.where(norms == 0, 0, targets / torch.where(norms == 0, 1, norms))
    work.c.mul_(scaled.spread(factors))
    work.apply_(passes)
    found = work.tracing()
    if found is None:
        return None
    live = live_columns(found.columns, jobs) / norms.new_tensor([max(1, job.matrix.shape[1]) for job in jobs])
    return Measured(("row", "column"), *found.vectors, live * factors.square())


def update_whole_(batch: Batch, passes: Passes) -> Measured | None:
    """`update_` of whole matrices, which count as shards that no other rank has a part of."""
    pairs = zip(batch.weights, batch.gradients, strict=True)
    matrices = [matrix for W, G in pairs for matrix in unsharded(W, G)]
    seeds = [None if batch.seed is None else batch.seed + k for k in range(len(matrices))]
    jobs = [
        Job(matrix, k, batch.lr, batch.weight_decay, seed)
        for k, (matrix, seed) in enumerate(zip(matrices, seeds, strict=True))
    ]
    if not jobs:
        return None
    squares = weight_squares(batch.weights) if batch.observe else None
    found = update_(jobs, batch.iterations, passes, batch.weights[0], observe=batch.observe)
    if found is None:
        return None
    assert found.mean_square is not None
    *several, _, _ = len(batch.weights), *batch.weights[0].shape
    residuals = found.residuals.view(*several, *found.residuals.shape[1:])
    rows, columns = found.rows.view(*several, -1), found.columns.view(*several, -1)
    return Measured(found.norms, residuals, rows, columns, found.mean_square.view(several), squares)


def _largest_eigenvalue(T: Tensor) -> Tensor:
    """Of positive semidefinite matrices (k, q, q), by squaring: no factorisation, for which a host would wait."""
    trace = T.diagonal(dim1=-2, dim2=-1).sum(-1)
    P = T / torch.where(trace == 0, 1, trace)[:, None, None]
    for _ in range(_SQUARINGS):
        P = (P.unsqueeze(-1) * P.unsqueeze(-3)).sum(-2)
        trace = P.diagonal(dim1=-2, dim2=-1).sum(-1)
        P = P / torch.where(trace == 0, 1, trace)[:, None, None]
    return (P * T).sum((-2, -1))


def _spans(lengths: Sequence[int]) -> list[slice]:
    ends = [sum(lengths[: k + 1]) for k in range(len(lengths))]
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
