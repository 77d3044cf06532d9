"""SR-Sinkhorn on the CPU at memory speed: one read of G per iteration, and the update of W fused into one more.

Threads take whole matrices as long as there are enough of them, and share a matrix by panels of rows otherwise. Sums
are added in the same order either way, so results do not depend on the number of threads.

Needs Numba (``pip install 'lightning-multinorm[numba]'``). Float32, bfloat16 and float16, in any mix.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_multinorm.rounding import key
from lightning_multinorm.sinkhorn import cpu_kernels as kernels

_KINDS = {torch.float32: kernels.FLOAT32, torch.bfloat16: kernels.BFLOAT16, torch.float16: kernels.FLOAT16}
_Floats = np.ndarray[Any, np.dtype[np.float32]]
_Item = TypeVar("_Item")


def scalings(gradient: Tensor, iterations: int, *, trace: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `lightning_multinorm.sinkhorn.scalings`; for tensors on the CPU; in float32.

    Raises:
        TypeError: for float64.
    """
    *batch, m, n = gradient.shape
    r, c, residuals = torch.ones(*batch, m), torch.ones(*batch, n), torch.zeros(*batch, iterations, 2)
    if gradient.numel():
        Gs = _matrices([gradient])
        outputs = [x.view(len(Gs), *x.shape[len(batch) :]).numpy() for x in (r, c, residuals)]

        def find(k: int, work: _Work, threads: int) -> None:
            own = work._replace(r=outputs[0][k], c=outputs[1][k])
            _find_scalings(Gs[k], iterations, outputs[2][k] if trace else None, own, threads)

        _over_matrices(find, len(Gs), m, n)
    return r, c, residuals if trace else None


def update_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    iterations: int = 5,
    trace: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor | None:
    """See `lightning_multinorm.sinkhorn.update_`; for tensors on the CPU; in float32.

    Raises:
        TypeError: for float64.
    """
    *batch, m, n = gradients[0].shape
    residuals = torch.zeros(len(weights), *batch, iterations, 2)
    if gradients[0].numel():
        Ws, Gs = _matrices(weights), _matrices(gradients)
        traces = residuals.view(len(Gs), iterations, 2).numpy()
        rate = float(lr)
        step, keep = np.float32(rate), np.float32(1 - rate * weight_decay)

        def change(k: int, work: _Work, threads: int) -> None:
            noise = 0 if seed is None else key(int(seed), k)
            rounding = (step, keep, seed is not None, noise)
            if threads == 1:
                kernels.step(*Ws[k], *Gs[k], iterations, trace, traces[k], *rounding, *work)
                return
            _find_scalings(Gs[k], iterations, traces[k] if trace else None, work, threads)

            def rows(i: tuple[int, int], own: _Work) -> None:
                kernels.update(*Ws[k], *Gs[k], *i, n, work.r, work.c, *rounding, own.buffer)

            _run(rows, _panels(m), m, n, threads)

        _over_matrices(change, len(Gs), m, n)
        torch.autograd.graph.increment_version([W for W in weights if not W.is_inference()])
    return residuals if trace else None


class _Matrix(NamedTuple):
    """Where a matrix lies; strides in elements."""

    address: int
    kind: int
    row_stride: int
    column_stride: int


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


def _matrices(tensors: Sequence[Tensor]) -> list[_Matrix]:
    """The matrices of tensors (..., m, n), in order."""
    found = []
    for tensor in tensors:
        if tensor.dtype not in _KINDS:
            raise TypeError(
                f"kernel='numba' computes in float32 and takes float32, bfloat16 and float16, got {tensor.dtype}; "
                "use kernel='eager'"
            )
        if tensor.ndim > 2:
            found += _matrices(tensor.unbind())
        else:
            found.append(_Matrix(tensor.data_ptr(), _KINDS[tensor.dtype], *tensor.stride()))
    return found


def _find_scalings(G: _Matrix, iterations: int, residuals: _Floats | None, work: _Work, threads: int) -> None:
    """work.r, work.c <- the scalings of G; ``residuals`` (L, 2), if any, are filled."""
    if threads == 1:
        trace = residuals is not None
        kernels.scalings(*G, iterations, trace, residuals if trace else np.zeros((0, 2), np.float32), *work)
    elif not _share_scalings(G, iterations, residuals, work, threads, scaled=False):
        m, n = len(work.r), len(work.c)
        kernels.equilibrate(*G, m, n, work.a, work.b, work.buffer)
        _share_scalings(G, iterations, residuals, work, threads, scaled=True)
        kernels.unscale(work.r, work.a)
        kernels.unscale(work.c, work.b)


def _share_scalings(
    G: _Matrix, iterations: int, residuals: _Floats | None, work: _Work, threads: int, *, scaled: bool
) -> bool:
    """`kernels.scalings` by several threads, each of which takes the next panel of rows; False if not in range."""
    m, n = len(work.r), len(work.c)
    panels = _panels(m)
    partial = np.empty((len(panels), n), np.float32)

    def read(item: tuple[int, tuple[int, int]], own: _Work) -> None:
        k, i = item
        kernels.read_rows(*G, *i, n, work.a, work.b, scaled, work.c, work.q, partial[k], own.buffer)

    kernels.begin(work.r, work.c, work.b, scaled)
    for k in range(iterations + (residuals is not None)):
        _run(read, list(enumerate(panels)), m, n, threads)
        total = np.add.reduce(partial, axis=0)
        kernels.rms_of_columns(total, m)
        if not scaled and not kernels.trusted(*G, work.r, work.c, work.q, total, k == 0):
            return False
        if residuals is not None and k > 0:
            residuals[k - 1, 0] = kernels.residual(work.q, work.r)
        if k < iterations:
            kernels.close(work.q, work.r)
            kernels.close(total, work.c)
            if residuals is not None:
                residuals[k, 1] = kernels.residual(total, work.c)
    return True


def _panels(m: int) -> list[tuple[int, int]]:
    return [(i, min(i + kernels.PANEL, m)) for i in range(0, m, kernels.PANEL)]


def _over_matrices(task: Callable[[int, _Work, int], None], count: int, m: int, n: int) -> None:
    """task(k, work, threads) for every matrix: whole ones side by side if there are enough, else one after another."""
    threads = torch.get_num_threads()
    if count >= threads:
        _run(lambda k, work: task(k, work, 1), range(count), m, n, threads)
    else:
        work = _Work.empty(m, n)
        for k in range(count):
            task(k, work, min(threads, len(_panels(m))))


def _run(task: Callable[[_Item, _Work], None], items: Sequence[_Item], m: int, n: int, threads: int) -> None:
    """task(item, work) for all items; each thread takes the next one that is left."""
    remaining = iter(items)

    def worker() -> None:
        work = _Work.empty(m, n)
        for item in remaining:
            task(item, work)

    others = min(threads, len(items)) - 1
    futures = [_pool(os.getpid(), others).submit(worker) for _ in range(others)]
    worker()
    for future in futures:
        future.result()


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """One pool, kept; a forked child, whose threads are gone, gets its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="sinkhorn")
