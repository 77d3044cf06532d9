"""`sharded`'s passes over local parts in plain PyTorch: any device and dtype; allocates one block of rows."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_multinorm.scaling import largest_magnitude
from lightning_multinorm.sinkhorn.eager import apply_part_, block_size, product
from lightning_multinorm.sinkhorn.sharded import LIFT, Part


def take_largest(parts: Sequence[Part]) -> None:
    """See `sharded.Passes`."""
    for part in parts:
        for rows in _blocks(part.gradient):
            part.R[rows] = torch.maximum(part.R[rows], largest_magnitude(part.gradient[rows], -1).to(part.R.dtype))


def add_row_sums(parts: Sequence[Part]) -> None:
    """See `sharded.Passes`."""
    for part in parts:
        for rows, X in _products(part):
            part.R[rows] += X.square_().sum(-1)


def add_column_sums(parts: Sequence[Part], lift: bool) -> None:
    """See `sharded.Passes`."""
    for part in parts:
        for _, X in _products(part):
            if lift:
                part.lifted.add_((X * LIFT).square_().sum(0))
            part.C.add_(X.square_().sum(0))


def apply_(
    parts: Sequence[Part],
    lr: Sequence[float | Tensor],
    weight_decay: Sequence[float],
    seeds: Sequence[int | Tensor | None],
) -> None:
    """See `sharded.Passes`."""
    for part, rate, decay, seed in zip(parts, lr, weight_decay, seeds, strict=True):
        apply_part_(part.weight, part.gradient, part.r, part.c, rate, decay, seed)


def _products(part: Part) -> Iterator[tuple[slice, Tensor]]:
    """(r G) c, a block of rows after another, in a buffer that the caller may spoil."""
    buffer = None
    for rows in _blocks(part.gradient):
        G = part.gradient[rows]
        buffer = torch.empty(G.shape, dtype=part.r.dtype, device=G.device) if buffer is None else buffer[: len(G)]
        yield rows, product(G, part.r[rows].unsqueeze(-1), buffer).mul_(part.c)


def _blocks(G: Tensor) -> Iterator[slice]:
    step = max(1, block_size(G) // max(1, G.shape[1]))
    for i in range(0, len(G), step):
        yield slice(i, min(i + step, len(G)))
