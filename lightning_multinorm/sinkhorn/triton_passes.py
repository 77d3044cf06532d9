"""`sharded`'s passes over local parts on a GPU, by Triton: float32, bfloat16 and float16, sums in float32.

One launch for each part. A program adds up whole rows, or a tile's width of columns over a panel of rows, in a fixed
order and without atomics, so results repeat bit for bit; column sums of panels are added by PyTorch.

Legend: G gradient (m, n) and W weight, parts of matrices; r, c scalings; R row sums, C column sums of X∘X, X = (r G) c;
i rows, j columns.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_multinorm.sinkhorn import triton as whole
from lightning_multinorm.sinkhorn.sharded import LIFT, Part

_TILE_M, _TILE_N, _PANEL = 16, 256, 512
_LIFT = tl.constexpr(LIFT)


def take_largest(parts: Sequence[Part]) -> None:
    """See `sharded.Passes`."""
    for part in parts:
        m, n = part.gradient.shape
        _row_pass[(triton.cdiv(m, _TILE_M),)](
            part.gradient, part.r, part.c, part.R, m, n, *part.gradient.stride(),
            LARGEST=True, BLOCK_M=_TILE_M, BLOCK_N=_TILE_N, enable_fp_fusion=False,
        )  # fmt: skip


def add_row_sums(parts: Sequence[Part]) -> None:
    """See `sharded.Passes`."""
    for part in parts:
        m, n = part.gradient.shape
        _row_pass[(triton.cdiv(m, _TILE_M),)](
            part.gradient, part.r, part.c, part.R, m, n, *part.gradient.stride(),
            LARGEST=False, BLOCK_M=_TILE_M, BLOCK_N=_TILE_N, enable_fp_fusion=False,
        )  # fmt: skip


def add_column_sums(parts: Sequence[Part], lift: bool) -> None:
    """See `sharded.Passes`."""
    for part in parts:
        m, n = part.gradient.shape
        panels = triton.cdiv(m, _PANEL)
        sums = torch.empty(2 if lift else 1, panels, n, dtype=torch.float32, device=part.C.device)
        _column_pass[(triton.cdiv(n, _TILE_N), panels)](
            part.gradient, part.r, part.c, sums, m, n, *part.gradient.stride(), sums.stride(0),
            LIFTED=lift, PANEL=_PANEL, BLOCK_M=_TILE_M, BLOCK_N=_TILE_N, enable_fp_fusion=False,
        )  # fmt: skip
        part.C.add_(sums[0].sum(0))
        if lift:
            part.lifted.add_(sums[1].sum(0))


def apply_(
    parts: Sequence[Part],
    lr: Sequence[float | Tensor],
    weight_decay: Sequence[float],
    seeds: Sequence[int | Tensor | None],
) -> None:
    """See `sharded.Passes`."""
    for part, rate, decay, seed in zip(parts, lr, weight_decay, seeds, strict=True):
        whole.apply_(part.weight, part.gradient, part.r, part.c, rate, decay, seed)


@triton.jit
def _row_pass(
    G: tl.tensor, r: tl.tensor, c: tl.tensor, R: tl.tensor, m: tl.tensor, n: tl.tensor, stride_i: tl.tensor,
    stride_j: tl.tensor, LARGEST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """R += row sums, or with LARGEST the larger of R and the rows' largest magnitudes, for BLOCK_M rows."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r_i = tl.load(r + i, mask=i < m, other=0.0)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, n, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        at = i.to(tl.int64)[:, None] * stride_i + j.to(tl.int64)[None, :] * stride_j
        X = tl.load(G + at, mask=(i < m)[:, None] & (j < n)[None, :], other=0.0).to(tl.float32)
        if LARGEST:
            total = tl.maximum(total, tl.abs(X), propagate_nan=tl.PropagateNan.ALL)
        else:
            X = (X * r_i[:, None]) * tl.load(c + j, mask=j < n, other=0.0)[None, :]
            total += X * X
    before = tl.load(R + i, mask=i < m, other=0.0)
    if LARGEST:
        after = tl.maximum(before, tl.max(total, axis=1), propagate_nan=tl.PropagateNan.ALL)
    else:
        after = before + tl.sum(total, axis=1)
    tl.store(R + i, after, mask=i < m)


@triton.jit
def _column_pass(
    G: tl.tensor, r: tl.tensor, c: tl.tensor, sums: tl.tensor, m: tl.tensor, n: tl.tensor, stride_i: tl.tensor,
    stride_j: tl.tensor, lifted_at: tl.tensor, LIFTED: tl.constexpr, PANEL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """sums (2, panels, n) <- column sums of X over a panel of rows, and of 2^60 X if LIFTED."""
    j, panel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    c_j = tl.load(c + j, mask=j < n, other=0.0)
    total, lifted = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(panel * PANEL, tl.minimum((panel + 1) * PANEL, m), BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        at = i.to(tl.int64)[:, None] * stride_i + j.to(tl.int64)[None, :] * stride_j
        X = tl.load(G + at, mask=(i < m)[:, None] & (j < n)[None, :], other=0.0).to(tl.float32)
        X = (X * tl.load(r + i, mask=i < m, other=0.0)[:, None]) * c_j[None, :]
        total += X * X
        if LIFTED:
            X *= _LIFT
            lifted += X * X
    tl.store(sums + panel * n + j, tl.sum(total, axis=0), mask=j < n)
    if LIFTED:
        tl.store(sums + lifted_at + panel * n + j, tl.sum(lifted, axis=0), mask=j < n)
