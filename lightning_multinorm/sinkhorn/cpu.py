"""SR-Sinkhorn on the CPU at memory speed: one read of G per iteration, and the update of W fused into one more.

Threads take whole matrices as long as there are enough of them, and share a matrix by panels of rows otherwise. Sums
are added in the same order either way, so results do not depend on the number of threads.

Needs Numba (``pip install 'lightning-multinorm[numba]'``). Float32, bfloat16 and float16, in any mix.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_multinorm.batch import Batch
from lightning_multinorm.rounding import key
from lightning_multinorm.sinkhorn import cpu_kernels as kernels
from lightning_multinorm.sinkhorn import cpu_range, cpu_rows, cpu_threads
from lightning_multinorm.sinkhorn.tracing import SUMS, Tracing

_SHARED = [SUMS.index(name) for name in ("tail", "mean_square")]
_KINDS = {torch.float32: cpu_rows.FLOAT32, torch.bfloat16: cpu_rows.BFLOAT16, torch.float16: cpu_rows.FLOAT16}
_Floats = np.ndarray[Any, np.dtype[np.float32]]
_Item = TypeVar("_Item")


def scalings(gradient: Tensor, iterations: int, *, trace: bool = False) -> tuple[Tensor, Tensor, Tracing | None]:
    """See `lightning_multinorm.sinkhorn.scalings`; for tensors on the CPU, in float32.

    Raises:
        TypeError: for float64.
        ValueError: for a tensor that is not on the CPU.
    """
    Gs = _matrices([gradient], gradient.shape)
    *batch, m, n = gradient.shape
    r, c, residuals, rows = (torch.ones(*batch, *size) for size in ((m,), (n,), (iterations, 2), (m,)))
    found = Tracing(residuals.zero_(), rows, c)
    if gradient.numel():
        _solve([_Part(None, Gs, (m, n), iterations, _Kept.of(r, found, trace))])
    return r, c, found if trace else None


def update_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    iterations: int = 5,
    trace: bool = False,
    seed: Tensor | int | None = None,
) -> Tracing | None:
    """See `lightning_multinorm.sinkhorn.update_`; for tensors on the CPU, in float32.

    Raises:
        TypeError: for float64.
        ValueError: for tensors of several shapes or dtypes, or not on the CPU.
    """
    seed = None if seed is None else torch.as_tensor(seed)
    return update_all_([Batch(weights, gradients, lr, weight_decay, iterations, seed, trace)])[0]


def update_all_(batches: Sequence[Batch]) -> list[Tracing | None]:
    """`update_` of several batches, each of its own shape and dtypes: matrices of all of them side by side.

    Raises:
        TypeError: for float64.
        ValueError: for a batch of several shapes or dtypes, or one that is not on the CPU. Nothing is updated then.
    """
    parts = [_part(batch) for batch in batches]
    filled = [k for k, batch in enumerate(batches) if batch.gradients[0].numel()]
    for k in filled:  # before machine code has pushed all that Python knows of them out of the caches
        torch.autograd.graph.increment_version([W for W in batches[k].weights if not W.is_inference()])
    _solve([parts[k] for k in filled])
    for part, batch in zip(parts, batches, strict=True):
        if part.found is not None and part.found.sums is not None:
            part.found.sums[..., _SHARED] /= max(1, batch.gradients[0].shape[:-2].numel())
    return [part.found for part in parts]


class _Kept(NamedTuple):
    """Vectors of all matrices that are kept, one matrix a row; r and c of no use to anyone are not."""

    residuals: Tensor | None = None
    first: Tensor | None = None
    r: Tensor | None = None
    c: Tensor | None = None
    sums: Tensor | None = None

    @classmethod
    def of(cls, r: Tensor | None, found: Tracing, trace: bool = True) -> "_Kept":
        def by_matrix(x: Tensor, dims: int) -> Tensor:
            return x.view(count, *x.shape[x.ndim - dims :])

        count = found.columns.shape[:-1].numel()
        residuals, first = (by_matrix(found.residuals, 2), by_matrix(found.rows, 1)) if trace else (None, None)
        others = (None if x is None else by_matrix(x, 1) for x in (r, found.columns, found.sums))
        return cls(residuals, first, *others)


_Matrix = tuple[int, int, int, int]
"""Where a matrix lies: address, kind, and the strides of rows and columns in elements."""


class _Part(NamedTuple):
    """Matrices (m, n) of one shape and dtype: scalings of every G, kept or used for ``W <- keep · W - lr · X``."""

    Ws: list[_Matrix] | None
    Gs: list[_Matrix]
    shape: tuple[int, int]
    iterations: int
    kept: _Kept
    found: Tracing | None = None
    lr: float = 0.0
    keep: float = 1.0
    seed: int | None = None

    def key(self, number: int) -> int:
        """What the ``number``-th W is rounded by."""
        return 0 if self.seed is None else key(self.seed, number)


class _Work(NamedTuple):
    """What one thread needs besides G and W: vectors."""

    r: _Floats
    c: _Floats
    q: _Floats
    sums: _Floats
    total: _Floats
    a: _Floats
    b: _Floats
    buffer: _Floats

    @classmethod
    def empty(cls, m: int, n: int) -> "_Work":
        sizes = {"r": m, "c": n, "q": m + 3, "sums": n, "total": n, "a": m, "b": n}
        vectors = {name: np.empty(size, np.float32) for name, size in sizes.items()}
        return cls(**vectors, buffer=np.zeros((kernels.BUFFER, n), np.float32))


def _matrices(tensors: Sequence[Tensor], shape: torch.Size) -> list[_Matrix]:
    """The matrices of tensors (..., m, n), in order.

    Machine code trusts addresses: all tensors must be on the CPU, of one shape and of one dtype.
    """
    dtype = tensors[0].dtype
    if dtype not in _KINDS:
        raise TypeError(
            f"kernel='numba' computes in float32 and takes float32, bfloat16 and float16, got {dtype}; "
            "use kernel='eager'"
        )
    kind, found = _KINDS[dtype], []
    for tensor in tensors:
        if not tensor.is_cpu:
            raise ValueError(f"kernel='numba' works on the CPU, got a tensor on {tensor.device}; use kernel='auto'")
        if tensor.shape != shape or tensor.dtype != dtype:
            alike, got = f"{list(shape)} {dtype}", f"{list(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"matrices of one update must be alike, got {alike} and {got}")
        for matrix in _unbound(tensor) if len(shape) > 2 else (tensor,):
            row, column = matrix.stride()
            found.append((matrix.data_ptr(), kind, row, column))
    return found


def _unbound(tensor: Tensor) -> Iterator[Tensor]:
    for part in tensor.unbind():
        yield from _unbound(part) if part.ndim > 2 else (part,)


def _part(batch: Batch) -> _Part:
    """A batch as machine code sees it, with room for what is to be observed."""
    shape = batch.gradients[0].shape
    Ws, Gs = _matrices(batch.weights, shape), _matrices(batch.gradients, shape)
    if len(batch.weights) != len(batch.gradients):
        raise ValueError(f"{len(batch.weights)} weights do not match {len(batch.gradients)} gradients")
    *leading, m, n = len(batch.weights), *shape
    found, kept = None, _Kept()
    if batch.observe:
        residuals, rows, columns = (torch.zeros(*leading, *size) for size in ((batch.iterations, 2), (m,), (n,)))
        sums = torch.zeros(*leading, len(SUMS), dtype=torch.float64)
        found = Tracing(residuals, rows, columns, sums[..., SUMS.index("weight")], sums)
        kept = _Kept.of(None, found)
    lr, seed = float(batch.lr), None if batch.seed is None else int(batch.seed)
    return _Part(Ws, Gs, (m, n), batch.iterations, kept, found, lr, 1 - lr * batch.weight_decay, seed)


def _solve(parts: Sequence[_Part]) -> None:
    """Whole matrices side by side if there are enough of them, else all threads on one after another."""
    threads, count = torch.get_num_threads(), sum(len(part.Gs) for part in parts)
    if count < threads:
        for part in parts:
            for k in range(len(part.Gs)):
                _share(part, k, threads)
        return
    table, start = np.zeros(count, kernels.MATRIX), 0
    for part in sorted(parts, key=lambda part: -math.prod(part.shape)):  # large ones first, for threads to end together
        _fill(part, table[start : start + len(part.Gs)])
        start += len(part.Gs)
    m, n = (max(part.shape[k] for part in parts) for k in (0, 1))
    job = np.array([(0, count, table.ctypes.data, m, n)], kernels.JOB)
    cpu_threads.run(kernels.work, kernels.team(), job.ctypes.data, threads)


def _fill(part: _Part, table: Any) -> None:
    """Fill in a row of `kernels.MATRIX` for each G; what there is not stays 0."""
    for name in ("lr", "keep", "iterations"):
        table[name] = getattr(part, name)
    table["m"], table["n"] = part.shape
    table["G"], table["g_kind"], table["g_row"], table["g_column"] = np.array(part.Gs).T
    if part.Ws is not None:
        table["W"], table["w_kind"], table["w_row"], table["w_column"] = np.array(part.Ws).T
    if part.seed is not None:
        table["stochastic"], table["key"] = 1, [part.key(k) for k in range(len(part.Gs))]
    for name, vectors in zip(_Kept._fields, part.kept, strict=True):
        if vectors is not None:
            table[name] = vectors.data_ptr() + np.arange(len(vectors)) * vectors.stride(0) * vectors.element_size()


def _share(part: _Part, k: int, threads: int) -> None:
    """The ``k``-th matrix, by all threads."""
    G, work = part.Gs[k], _Work.empty(*part.shape)
    residuals, first, r, c, sums = (None if x is None else x[k].numpy() for x in part.kept)
    own = work._replace(r=work.r if r is None else r, c=work.c if c is None else c)
    if not _share_scalings(G, part.iterations, residuals, first, own, threads, scaled=False):
        cpu_range.equilibrate(*G, *part.shape, own.a, own.b, own.buffer)
        _share_scalings(G, part.iterations, residuals, first, own, threads, scaled=True)
        for scaling, powers in ((own.r, own.a), (own.c, own.b), (first, own.a)):
            if scaling is not None:
                cpu_range.unscale(scaling, powers)
    if part.Ws is not None:
        weights = _share_update(part, k, own, threads)
        if first is not None and sums is not None:
            kernels.summarize(first, own.c, weights, sums)


def _share_update(part: _Part, k: int, work: _Work, threads: int) -> float:
    assert part.Ws is not None
    matrices, weigh = (*part.Ws[k], *part.Gs[k]), part.kept.sums is not None
    rounding = (np.float32(part.lr), np.float32(part.keep), part.seed is not None, part.key(k))
    panels = _panels(len(work.r))
    squares = [0.0] * len(panels)

    def rows(item: tuple[int, tuple[int, int]], own: _Work) -> None:
        k, i = item
        squares[k] = kernels.update(*matrices, *i, len(work.c), work.r, work.c, *rounding, weigh, own.buffer)

    _run(rows, list(enumerate(panels)), len(work.r), len(work.c), threads)
    return sum(squares)


def _share_scalings(
    G: _Matrix,
    iterations: int,
    residuals: _Floats | None,
    first: _Floats | None,
    work: _Work,
    threads: int,
    *,
    scaled: bool,
) -> bool:
    """`kernels.scalings` by several threads, each of which takes the next panel of rows; False if not in range."""
    m, n = len(work.r), len(work.c)
    panels = _panels(m)
    partial = np.empty((len(panels), n), np.float32)
    c = work.c if scaled else None  # None: all ones, until the first iteration is over

    def read(item: tuple[int, tuple[int, int]], own: _Work) -> None:
        k, i = item
        kernels.read_rows(*G, *i, n, work.a, work.b, scaled, c, work.q, partial[k], own.buffer)

    kernels.begin(work.r, work.c, work.b, scaled)
    for k in range(iterations + (residuals is not None)):
        _run(read, list(enumerate(panels)), m, n, threads)
        total = np.add.reduce(partial, axis=0)
        kernels.rms_of_columns(total, m)
        if not scaled and not cpu_range.trusted(*G, work.r, work.c, work.q, total, k == 0):
            return False
        if residuals is not None and k > 0:
            residuals[k - 1, 0] = kernels.residual(work.q, work.r)
        if k < iterations:
            kernels.close(work.q, work.r)
            kernels.close(total, work.c)
            c = work.c
            if first is not None and k == 0:
                first[:] = work.r
            if residuals is not None:
                residuals[k, 1] = kernels.residual(total, work.c)
    return True


def _panels(m: int) -> list[tuple[int, int]]:
    return [(i, min(i + kernels.PANEL, m)) for i in range(0, m, kernels.PANEL)]


def _run(task: Callable[[_Item, _Work], None], items: Sequence[_Item], m: int, n: int, threads: int) -> None:
    """task(item, work) for all items; each thread takes the next one that is left."""
    remaining = iter(items)

    def worker() -> None:
        work = _Work.empty(m, n)
        for item in remaining:
            task(item, work)

    others = min(threads, len(items)) - 1
    futures = [cpu_threads.pool(os.getpid(), others).submit(worker) for _ in range(others)]
    worker()
    for future in futures:
        future.result()
