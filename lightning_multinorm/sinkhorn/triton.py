"""SR-Sinkhorn on a GPU at memory speed: all matrices of one shape in one launch per half step, by Triton.

Matrices whose gradients fit half of the L2 cache together make a group, and a group goes through all its iterations
and the update of its weights before the next one starts: only the first iteration reads G from memory, the others find
it in the cache. An iteration takes one of two forms:

- fused: a program owns a panel of rows and holds whole rows in registers, so that it knows r before it adds a row to
  its column sums: one read of G. Each program leaves n partial column sums, which a second kernel adds.
- split: one kernel for r, one for the column sums, two reads. It works in tiles, for rows too long for registers and
  for matrices stored by columns, and it needs few partial sums: for a large matrix alone, where those of enough
  programs to fill the GPU would take more than the hundredth of the gradients' bytes that scratch may take.

There is no host synchronisation and, after the first call with the same tensors, no copy to the device: a call can be
captured in a CUDA graph after one like it. Nothing the size of a gradient is allocated; results repeat bit for bit.

Legend: G gradient (m, n), W weight; r (matrices, m), c (matrices, n); L iterations.
"""

import contextlib
import itertools
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from lightning_multinorm.sinkhorn import triton_kernels as kernels
from lightning_multinorm.sinkhorn.tracing import Tracing, weight_squares

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Entries of a tile and of a warp: with 16 per thread, G, its sums and c fit the registers.
_TILE, _PER_WARP = 4096, 512
_LONGEST_ROW = 16384  # that is held in registers, by 32 warps, as many as a program may have
_WARPS_PER_PROCESSOR = 24  # while some wait for their row sums, others load
# Scratch may take a hundredth of the gradients' bytes, or this many bytes.
_SCRATCH, _LEAST_SCRATCH = 0.01, 2**16

_TABLES: OrderedDict[Hashable, "list[_Table]"] = OrderedDict()
_MOST_TABLES = 64
_CAPTURED: dict[Hashable, "list[_Table]"] = {}  # what CUDA graphs read must stay where it is


class _Chip(NamedTuple):
    processors: int
    cache_bytes: int  # of L2


class _Table(NamedTuple):
    """Where matrices of one layout lie: int64 (matrices, 4) on the device; strides of rows and columns in entries."""

    addresses: Tensor
    gradient_strides: tuple[int, int]
    weight_strides: tuple[int, int]
    aligned: bool
    stream: torch.cuda.Stream | None  # that it was copied on


class _Plan(NamedTuple):
    """How matrices of one shape and layout are cut into groups, panels of rows and tiles (rows, columns)."""

    group: int
    fused: bool
    panels: int
    rows_per_panel: int
    row_tile: tuple[int, int]
    column_tile: tuple[int, int]  # of the split form's column sums
    update_tile: tuple[int, int]


def scalings(gradient: Tensor, iterations: int, *, trace: bool = False) -> tuple[Tensor, Tensor, Tracing | None]:
    """As `lightning_multinorm.sinkhorn.eager.scalings`, for tensors on a GPU; in float32.

    Raises:
        TypeError: for other dtypes than float32, bfloat16 and float16.
    """
    _check([gradient])
    *batch, m, n = gradient.shape
    count = math.prod(batch)
    r, c = _new(torch.ones, gradient, count, m), _new(torch.ones, gradient, count, n)
    found = _traced(gradient, count, m, n, iterations)._replace(columns=c) if trace else None
    if gradient.numel() and iterations:
        with _on(gradient.device):
            (table,) = _tables([gradient], [gradient])
            work = _Work(table, gradient, gradient)
            for part in work.groups():
                seen = None if found is None else Tracing(*(x[part] for x in found.vectors))
                work.alternate(part, r[part], c[part], iterations, seen)
    if found is not None:
        found = Tracing(*(x.view(*batch, *x.shape[1:]) for x in found.vectors))
    return r.view(*batch, m), c.view(*batch, n), found


def update_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    iterations: int = 5,
    trace: bool = False,
    seed: int | Tensor | None = None,
) -> Tracing | None:
    """As `lightning_multinorm.sinkhorn.eager.update_`, for tensors on a GPU; in float32, rounded once at the end.

    Weights and gradients may have any strides. ``lr`` and ``seed`` (int64) may be 0-d tensors on the device: they are
    read there, so that a captured graph follows them. A seed rounds bfloat16 weights as `lightning_multinorm.rounding`
    does, None to nearest; matrices are numbered over the whole list.

    Raises:
        TypeError: for other dtypes than float32, bfloat16 and float16.
        ValueError: for weights or gradients of several shapes, dtypes or devices.
        RuntimeError: in the capture of a CUDA graph, for tensors that no call has seen before.
    """
    _check(weights)
    _check(gradients)
    W, G = weights[0], gradients[0]
    if len(weights) != len(gradients) or W.shape != G.shape or W.device != G.device:
        raise ValueError(f"{len(weights)} weights {[*W.shape]} do not match {len(gradients)} gradients {[*G.shape]}")
    *batch, m, n = G.shape
    found = _traced(G, len(weights) * math.prod(batch), m, n, iterations) if trace else None
    squares = weight_squares(weights) if trace else None
    if G.numel():
        with _on(G.device):
            rate = lr if isinstance(lr, Tensor) and lr.device == G.device else float(lr)
            if seed is not None and not (isinstance(seed, Tensor) and seed.device == G.device):
                seed = int(seed) & 0xFFFFFFFF
            for table in _tables(weights, gradients):
                work = _Work(table, W, G)
                r, c = (_new(torch.ones, G, work.plan.group, k) for k in (m, n))
                seen = _traced(G, len(table.addresses), m, n, iterations) if trace else None
                for part in work.groups():
                    own = None if seen is None else Tracing(*(x[part] for x in seen.vectors))
                    if iterations:
                        work.alternate(part, r, c, iterations, own)
                    if own is not None:
                        own.columns.copy_(c[: len(own.columns)])
                    work.apply_(part, r, c, rate, weight_decay, seed)
                if found is not None and seen is not None:
                    for all_of_them, those in zip(found.vectors, seen.vectors, strict=True):
                        all_of_them.index_copy_(0, table.addresses[:, 2], those)
        torch.autograd.graph.increment_version([W for W in weights if not W.is_inference()])
    if found is None:
        return None
    residuals, rows, columns = (x.view(len(weights), *batch, *x.shape[1:]) for x in found.vectors)
    return Tracing(residuals, rows, columns, squares)


def apply_(
    W: Tensor, G: Tensor, r: Tensor, c: Tensor, lr: float | Tensor, weight_decay: float, seed: int | Tensor | None
) -> None:
    """``W <- (1 - lr · weight_decay) W - lr · (r G) c`` for a matrix, or a part of one, with known scalings."""
    with _on(G.device):
        rate = lr if isinstance(lr, Tensor) and lr.device == G.device else float(lr)
        if seed is not None and not (isinstance(seed, Tensor) and seed.device == G.device):
            seed = int(seed) & 0xFFFFFFFF
        (table,) = _tables([W], [G])
        _Work(table, W, G).apply_(slice(0, 1), r, c, rate, weight_decay, seed)
    torch.autograd.graph.increment_version([W] if not W.is_inference() else [])


class _Work:
    """All matrices of a table, their plan, and the launches over a group of them."""

    def __init__(self, table: _Table, W: Tensor, G: Tensor) -> None:
        self.table, (self.m, self.n) = table, G.shape[-2:]
        strides = table.gradient_strides, table.weight_strides
        self.plan = _plan(len(table.addresses), self.m, self.n, G.element_size(), strides, _chip(G.device))
        self.partials = _new(torch.empty, G, self.plan.group, self.plan.panels, self.n)
        self.weight_type = _TYPES[W.dtype]
        self.matrix = {"TYPE": _TYPES[G.dtype], "ALIGNED": table.aligned}

    def groups(self) -> Iterator[slice]:
        for k in range(0, len(self.table.addresses), self.plan.group):
            yield slice(k, k + self.plan.group)

    def alternate(self, part: slice, r: Tensor, c: Tensor, iterations: int, found: Tracing | None) -> None:
        """All iterations for one group: fills r and c, and residuals and rows of what is found."""
        table, plan, trace = self.table.addresses[part], self.plan, found is not None
        residuals = None if found is None else found.residuals
        count, shape = len(table), (self.m, self.n, *self.table.gradient_strides)
        panels, width = (plan.panels, plan.rows_per_panel), min(128, next_power_of_2(self.n))
        rows, columns, blocks = cdiv(self.m, plan.row_tile[0]), cdiv(self.n, plan.column_tile[1]), cdiv(self.n, width)
        # Sums of squared errors by the programs that made them, (matrices, programs).
        row_errors = _new(torch.empty, r, count, (plan.panels if plan.fused else rows) if trace else 0)
        column_errors = _new(torch.empty, r, count, blocks if trace else 0)
        how: dict[str, Any]
        args: tuple[Any, ...]
        for k in range(iterations):
            how = self.matrix | {"FIRST": k == 0}
            measured = trace and k > 0  # each read of G measures the rows that the iteration before has left
            if plan.fused:
                args = (table, r, c, self.partials, row_errors, *shape, *panels)
                _launch(kernels.rows_and_column_sums, count * plan.panels, plan.row_tile, args, **how, TRACE=measured)
            else:
                args = (table, r, c, row_errors, *shape, rows)
                _launch(kernels.rows, count * rows, plan.row_tile, args, **how, UPDATE=True, TRACE=measured)
                args = (table, r, c, self.partials, *shape, *panels, columns)
                _launch(kernels.column_sums, count * plan.panels * columns, plan.column_tile, args, **how)
            if residuals is not None and measured:
                residuals[:, k - 1, 0] = row_errors.sum(-1)
            if found is not None and k == 0:
                found.rows.copy_(r[:count])
            tile = min(16, next_power_of_2(plan.panels)), width
            args = (c, self.partials, column_errors, self.m, self.n, plan.panels, blocks)
            _launch(kernels.columns, count * blocks, tile, args, FIRST=k == 0, TRACE=trace)
            if residuals is not None:
                residuals[:, k, 1] = column_errors.sum(-1)
        if residuals is not None:
            row_errors = _new(torch.empty, r, count, rows)
            args, how = (table, r, c, row_errors, *shape, rows), self.matrix | {"FIRST": False}
            _launch(kernels.rows, count * rows, plan.row_tile, args, **how, UPDATE=False, TRACE=True)
            residuals[:, -1, 0] = row_errors.sum(-1)
            residuals[..., 0].div_(self.m)
            residuals[..., 1].div_(self.n)
            residuals.sqrt_()

    def apply_(
        self, part: slice, r: Tensor, c: Tensor, lr: float | Tensor, decay: float, seed: int | Tensor | None
    ) -> None:
        """The update of the weights of one group."""
        table, tile = self.table.addresses[part], self.plan.update_tile
        shape = (self.m, self.n, *self.table.gradient_strides, *self.table.weight_strides)
        blocks = cdiv(self.m, tile[0]), cdiv(self.n, tile[1])
        _launch(
            kernels.apply,
            len(table) * blocks[0] * blocks[1],
            tile,
            (table, r, c, lr, decay, 0 if seed is None else seed, *shape, *blocks),
            **self.matrix,
            WEIGHT_TYPE=self.weight_type,
            LR_IN_MEMORY=isinstance(lr, Tensor),
            NOISY=seed is not None and self.weight_type is tl.bfloat16,
            SEED_IN_MEMORY=isinstance(seed, Tensor),
        )


@lru_cache(maxsize=256)
def _plan(
    count: int, m: int, n: int, itemsize: int, strides: tuple[tuple[int, int], tuple[int, int]], chip: _Chip
) -> _Plan:
    """The cut for ``count`` matrices (m, n): enough programs to fill the GPU, within the bound on scratch."""
    size = m * n * itemsize
    group = min(count, max(1, chip.cache_bytes // 2 // size))
    scratch = max(_LEAST_SCRATCH, int(_SCRATCH * count * size)) // (4 * group)  # floats per matrix of a group
    affordable = max(1, (scratch - m - n) // n)  # panels
    by_columns, weight_by_columns = (stride_i < stride_j for stride_i, stride_j in strides)
    update_tile = _tile(64 if by_columns or weight_by_columns else 1024, m, n)

    # Of matrices stored by columns, a tile takes as many rows as make whole memory transactions.
    row_tile = max(16 if by_columns else 1, _tile(_LONGEST_ROW, m, n)[0]), next_power_of_2(n)
    wanted = min(cdiv(_programs(row_tile, chip), group), cdiv(m, row_tile[0]))
    # Two reads, at least one of them from the cache, cost less than two thirds of the GPU idle.
    if math.prod(row_tile) <= _LONGEST_ROW and 3 * affordable >= wanted:
        panels = _panels(m, min(wanted, affordable), row_tile[0])
        return _Plan(group, True, *panels, row_tile, row_tile, update_tile)

    row_tile, column_tile = _tile(64 if by_columns else 1024, m, n), _tile(64 if by_columns else 128, m, n)
    while row_tile[0] > 1 and not by_columns and group * cdiv(m, row_tile[0]) < chip.processors:
        row_tile = row_tile[0] // 2, row_tile[1]
    wanted = min(cdiv(_programs(column_tile, chip), group * cdiv(n, column_tile[1])), cdiv(m, column_tile[0]))
    return _Plan(group, False, *_panels(m, min(wanted, affordable), column_tile[0]), row_tile, column_tile, update_tile)


def _panels(m: int, most: int, rows: int) -> tuple[int, int]:
    """At most ``most`` panels of a multiple of ``rows`` rows: how many, and rows per panel."""
    per_panel = cdiv(cdiv(m, most), rows) * rows
    return cdiv(m, per_panel), per_panel


def _tile(width: int, m: int, n: int) -> tuple[int, int]:
    """Rows and columns of a tile of about `_TILE` entries, no wider than ``width`` and no larger than the matrix."""
    columns = min(width, next_power_of_2(n))
    return max(1, min(_TILE // columns, next_power_of_2(m))), columns


def _programs(tile: tuple[int, int], chip: _Chip) -> int:
    return chip.processors * max(1, _WARPS_PER_PROCESSOR // _warps(tile))


def _warps(tile: tuple[int, int]) -> int:
    return max(1, min(32, math.prod(tile) // _PER_WARP))


def _launch(kernel: Any, programs: int, tile: tuple[int, int], args: tuple[Any, ...], **constants: Any) -> None:
    """Without fused multiply-adds, so that results do not depend on what else is compiled into a kernel."""
    shape = {"BLOCK_M": tile[0], "BLOCK_N": tile[1], "num_warps": _warps(tile)}
    kernel[(programs,)](*args, **constants, **shape, enable_fp_fusion=False)


def _new(make: Callable[..., Tensor], like: Tensor, *shape: int) -> Tensor:
    return make(shape, dtype=torch.float32, device=like.device)


def _traced(like: Tensor, count: int, m: int, n: int, iterations: int) -> Tracing:
    return Tracing(*(_new(torch.zeros, like, count, *size) for size in ((iterations, 2), (m,), (n,))))


def _tables(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[_Table]:
    """One table per layout, cached: in steady state tensors stay where they are."""
    W, G = weights[0], gradients[0]
    key = G.device, G.shape, W.dtype, G.dtype, tuple((x.data_ptr(), x.stride()) for x in (*weights, *gradients))
    stream = torch.cuda.current_stream(G.device) if G.is_cuda else None
    capturing = G.is_cuda and torch.cuda.is_current_stream_capturing()
    tables = _TABLES.get(key) or _CAPTURED.get(key)
    if tables is None:
        if capturing:
            raise RuntimeError("run the update once on the same tensors before it is captured in a CUDA graph")
        tables = _made_tables(weights, gradients, stream)
    if capturing:
        _CAPTURED[key] = tables
    else:
        for table in tables:
            if stream and table.stream and stream != table.stream:
                stream.wait_stream(table.stream)
                table.addresses.record_stream(stream)
    _TABLES[key] = tables
    _TABLES.move_to_end(key)
    if len(_TABLES) > _MOST_TABLES:
        _TABLES.popitem(last=False)
    return tables


def _made_tables(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], stream: torch.cuda.Stream | None
) -> list[_Table]:
    by_strides: dict[Any, list[tuple[int, ...]]] = defaultdict(list)
    number = 0
    for W, G in zip(weights, gradients, strict=True):
        entries = by_strides[G.stride()[-2:], W.stride()[-2:]]
        for g, w in zip(_addresses(G), _addresses(W), strict=True):
            entries.append((g, w, number, 0))
            number += 1
    tables = []
    for (gradient_strides, weight_strides), entries in by_strides.items():
        # From pinned memory the copy waits for nothing.
        addresses = torch.tensor(entries, dtype=torch.int64, pin_memory=stream is not None)
        addresses = addresses.to(gradients[0].device, non_blocking=True)
        aligned = all(g % 16 == 0 and w % 16 == 0 for g, w, *_ in entries)
        tables.append(_Table(addresses, gradient_strides, weight_strides, aligned, stream))
    return tables


def _addresses(tensor: Tensor) -> Iterator[int]:
    """The address of each matrix (·, ·) of a tensor (..., m, n)."""
    for index in itertools.product(*map(range, tensor.shape[:-2])):
        offset = sum(k * stride for k, stride in zip(index, tensor.stride()[:-2], strict=True))
        yield tensor.data_ptr() + offset * tensor.element_size()


@lru_cache
def _chip(device: torch.device) -> _Chip:
    if device.type != "cuda":  # Triton's interpreter
        return _Chip(processors=4, cache_bytes=2**26)
    properties = torch.cuda.get_device_properties(device)
    return _Chip(properties.multi_processor_count, properties.L2_cache_size)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _check(tensors: Sequence[Tensor]) -> None:
    """Kernels trust addresses: all tensors must be of one shape, dtype and device."""
    first = tensors[0]
    if first.dtype not in _TYPES:
        raise TypeError(f"{first.dtype} is not for the Triton kernels; use lightning_multinorm.sinkhorn.eager instead")
    kinds = {(x.shape, x.dtype, x.device) for x in tensors}
    if len(kinds) > 1:
        raise ValueError(f"matrices of one update must be of one shape, dtype and device, got {kinds}")
