"""Matrices of FSDP1's slices of flattened parameters, cut anywhere.

The frame is the whole matrix, and a slice is at most three pieces of it: the end of a row, whole rows, the beginning of
a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_multinorm.layouts.matrix import Groups, Piece, ShardedMatrix
from lightning_multinorm.views import View, stored_shapes


@dataclass(frozen=True)
class FlatSlice:
    """A contiguous slice of a flattened parameter, as FSDP1 keeps it.

    Attributes:
        shape: of the whole parameter.
        start: of the slice, in entries.
        group: the ranks that hold the other slices.
    """

    shape: torch.Size
    start: int
    group: Any


def is_flat_slice(tensor: Tensor) -> bool:
    """Whether FSDP1 has flattened this parameter, so that shape and name no longer tell what it is."""
    return bool(getattr(tensor, "_fsdp_flattened", False))


def flat_slices(model: nn.Module) -> dict[nn.Parameter, FlatSlice]:
    """Where the parameters of a model lie that FSDP1 has sharded (``use_orig_params=True``).

    Raises:
        ValueError: if FSDP1 was asked for ``use_orig_params=False``, which leaves no parameters to tell apart.
    """
    if not dist.is_available() or not dist.is_initialized():
        return {}
    from torch.distributed.fsdp import FullyShardedDataParallel

    found: dict[nn.Parameter, FlatSlice] = {}
    for module in FullyShardedDataParallel.fsdp_modules(model):
        handle: Any = module._handle
        if handle is None or not handle.uses_sharded_strategy:
            continue
        flat = handle.flat_param
        if flat._params is None:
            raise ValueError("FSDP1 with use_orig_params=False hides the parameters; set use_orig_params=True")
        for parameter, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
            start = info.intra_param_start_idx if info.in_shard else 0
            found[parameter] = FlatSlice(torch.Size(shape), start, module.process_group)
    return found


def matrices_of_slice(parameter: Tensor, gradient: Tensor, view: View, flat: FlatSlice) -> Iterator[ShardedMatrix]:
    stored = stored_shapes(flat.shape, view)
    groups: Groups = (flat.group,) if flat.group is not None else ()
    offset = 0
    for m, n in stored:
        pieces = [
            Piece(_cut(parameter, *span, *size), _cut(gradient, *span, *size), i, j)
            for span, i, j, *size in _rectangles(flat.start - offset, parameter.numel(), m, n)
        ]
        offset += m * n
        if view == "transposed":
            pieces = [Piece(W.mT, G.mT, j, i) for W, G, i, j in pieces]
            m, n = n, m
        whole = torch.arange(m), torch.arange(n)
        yield ShardedMatrix((m, n), (m, n), tuple(pieces), *whole, groups, groups, (), 1 / len(stored), True)


def _rectangles(start: int, count: int, m: int, n: int) -> Iterator[tuple[tuple[int, int], int, int, int, int]]:
    """Entries start .. start + count of a matrix (m, n): spans within the slice, first row and column, and size."""
    first, last = max(0, start), min(m * n, start + count)
    while first < last:
        i, j = divmod(first, n)
        k = 1 if j or last - first < n else (last - first) // n
        width = min(n - j, last - first) if k == 1 else n
        yield (first - start, first - start + k * width), i, j, k, width
        first += k * width


def _cut(flat: Tensor, start: int, stop: int, rows: int, columns: int) -> Tensor:
    return flat[start:stop].view(rows, columns)
