"""`sharded`'s passes over local parts on the CPU, compiled by Numba: float32, bfloat16 and float16, sums in float32.

Threads take one part after another.

Legend: G gradient (k, l) and W weight, parts of matrices; r, c scalings; R row sums, C column sums of ((r G) c)².
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_multinorm.rounding import key
from lightning_multinorm.sinkhorn import cpu_kernels as kernels
from lightning_multinorm.sinkhorn import cpu_rows, cpu_threads
from lightning_multinorm.sinkhorn.cpu_intrinsics import add
from lightning_multinorm.sinkhorn.cpu_jit import jit
from lightning_multinorm.sinkhorn.sharded import LIFT, Part

_KINDS = {torch.float32: cpu_rows.FLOAT32, torch.bfloat16: cpu_rows.BFLOAT16, torch.float16: cpu_rows.FLOAT16}
_LIFT = np.float32(LIFT)


def take_largest(parts: Sequence[Part]) -> None:
    """See `sharded.Passes`."""

    def take(part: Part, buffer: Any) -> None:
        _take_largest(*_matrix(part.gradient), *part.gradient.shape, part.R.numpy(), buffer)

    _each(take, parts)


def add_row_sums(parts: Sequence[Part]) -> None:
    """See `sharded.Passes`."""

    def sum_rows(part: Part, buffer: Any) -> None:
        r, c, R = part.r.numpy(), part.c.numpy(), part.R.numpy()
        _add_row_sums(*_matrix(part.gradient), *part.gradient.shape, r, c, R, buffer)

    _each(sum_rows, parts)


def add_column_sums(parts: Sequence[Part], lift: bool) -> None:
    """See `sharded.Passes`."""

    def sum_columns(part: Part, buffer: Any) -> None:
        vectors = (x.numpy() for x in (part.r, part.c, part.C, part.lifted))
        _add_column_sums(*_matrix(part.gradient), *part.gradient.shape, *vectors, lift, buffer)

    _each(sum_columns, parts)


def apply_(
    parts: Sequence[Part],
    lr: Sequence[float | Tensor],
    weight_decay: Sequence[float],
    seeds: Sequence[int | Tensor | None],
) -> None:
    """See `sharded.Passes`."""
    how = {
        id(part): (float(rate), decay, seed)
        for part, rate, decay, seed in zip(parts, lr, weight_decay, seeds, strict=True)
    }

    def update(part: Part, buffer: Any) -> None:
        rate, decay, seed = how[id(part)]
        rounding = seed is not None and part.weight.dtype is torch.bfloat16
        rows, columns = part.gradient.shape
        kernels.update(
            *_matrix(part.weight), *_matrix(part.gradient), 0, rows, columns, part.r.numpy(), part.c.numpy(),
            np.float32(rate), np.float32(1 - rate * decay), rounding, 0 if seed is None else key(int(seed), 0),
            False, buffer,
        )  # fmt: skip

    _each(update, parts)
    torch.autograd.graph.increment_version([part.weight for part in parts if not part.weight.is_inference()])


def _matrix(tensor: Tensor) -> tuple[int, int, int, int]:
    return tensor.data_ptr(), _KINDS[tensor.dtype], *tensor.stride()  # type: ignore[return-value]


def _each(task: Callable[[Part, Any], None], parts: Sequence[Part]) -> None:
    """task(part, buffer) for all parts; each thread takes the next one that is left."""
    remaining = iter(parts)
    longest = max((part.gradient.shape[1] for part in parts), default=0)

    def worker() -> None:
        buffer = np.zeros(kernels.BUFFER * longest, np.float32)
        for part in remaining:
            columns = part.gradient.shape[1]
            # Contiguous for every part: the machine code for strided rows would add up in another order.
            task(part, buffer[: kernels.BUFFER * columns].reshape(kernels.BUFFER, columns))

    others = min(torch.get_num_threads(), len(parts)) - 1
    futures = [cpu_threads.pool(os.getpid(), others).submit(worker) for _ in range(others)]
    worker()
    for future in futures:
        future.result()


@jit
def _take_largest(G: int, kind: int, row: int, column: int, m: int, n: int, R: Any, buffer: Any) -> None:
    size, x = cpu_rows.itemsize(kind), buffer[0]
    for i in range(m):
        cpu_rows.load(G + i * row * size, kind, column, n, x)
        largest = R[i]
        for j in range(n):
            # Written so that NaN wins, and stays.
            largest = largest if abs(x[j]) <= largest else abs(x[j])
        R[i] = largest


@jit
def _add_row_sums(
    G: int, kind: int, row: int, column: int, m: int, n: int, r: Any, c: Any, R: Any, buffer: Any
) -> None:
    size, x = cpu_rows.itemsize(kind), buffer[0]
    for i in range(m):
        cpu_rows.load(G + i * row * size, kind, column, n, x)
        scale, total = r[i], cpu_rows.ZERO
        for j in range(n):
            y = (x[j] * scale) * c[j]
            total = add(total, y * y)
        R[i] += total


@jit
def _add_column_sums(
    G: int, kind: int, row: int, column: int, m: int, n: int, r: Any, c: Any, C: Any, lifted: Any, lift: bool,
    buffer: Any,
) -> None:  # fmt: skip
    """In panels, as `cpu_kernels`: fewer roundings."""
    size, x, sums, lifted_sums = cpu_rows.itemsize(kind), buffer[0], buffer[1], buffer[2]
    for i0 in range(0, m, kernels.PANEL):
        sums[:] = cpu_rows.ZERO
        lifted_sums[:] = cpu_rows.ZERO
        for i in range(i0, min(i0 + kernels.PANEL, m)):
            cpu_rows.load(G + i * row * size, kind, column, n, x)
            scale = r[i]
            for j in range(n):
                y = (x[j] * scale) * c[j]
                sums[j] += y * y
            if lift:
                for j in range(n):
                    y = (x[j] * scale) * _LIFT  # c is 1
                    lifted_sums[j] += y * y
        for j in range(n):
            C[j] += sums[j]
            lifted[j] += lifted_sums[j]
