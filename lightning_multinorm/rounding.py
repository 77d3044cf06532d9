"""Stochastic rounding to bfloat16, from noise that every path computes alike.

Rounding to nearest loses every update below half a unit in the last place (1/256 of the weight): weights stand still.
Rounding up with the probability of the part that is cut off keeps the expected value exact. The noise of an entry is
a hash of (seed, matrix, entry), so plain PyTorch, the CPU kernel and the Triton kernel round the same way, whatever
the order in which they visit entries, and a run repeats from its seed. The low 32 bits of a seed count; matrices of
one update add their number to it, so seeds of different steps should be drawn at random, not counted.

The hash is the 32-bit finaliser "lowbias32" of C. Wellons' hash-prospector (found by search for the least bias).
"""

from typing import TypeVar

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF

_Integers = TypeVar("_Integers", int, Tensor)


def lowbias32(x: _Integers) -> _Integers:
    """A well-mixed 32-bit hash of each 32-bit number; tensors hold both in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def key(seed: _Integers, matrix: int) -> _Integers:
    """What tells the noise of the ``matrix``-th matrix of an update from that of the others; 32 bits."""
    return lowbias32((seed + matrix) & _MASK)


def noise(seed: int | Tensor, matrix: int, rows: slice, columns: int, device: torch.device) -> Tensor:
    """Uniform 16-bit noise for rows of the ``matrix``-th (·, columns) matrix of an update: int64 (rows, columns)."""
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device)
    entry = torch.arange(rows.start * columns, rows.stop * columns, device=device).view(-1, columns)
    return lowbias32((entry & _MASK) ^ key(seed, matrix)) >> 16


def round_to_bfloat16(x: Tensor, noise: Tensor) -> Tensor:
    """float32 ``x`` to bfloat16: up in magnitude if its lower half plus the noise overflows, else down."""
    bits = x.view(torch.int32)
    rounded = ((bits + noise.to(torch.int32)) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)
