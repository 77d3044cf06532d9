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
_FACTORS = 0x7FEB352D, 0x846CA68B
_BLOCK_CPU, _BLOCK_ACCELERATOR = 2**15, 2**22  # entries that are rounded at a time, at 8 bytes each

_Integers = TypeVar("_Integers", int, Tensor)


def lowbias32(x: _Integers) -> _Integers:
    """A well-mixed 32-bit hash of each 32-bit number; tensors hold both in int64."""
    x = x ^ (x >> 16)
    x = (x * _FACTORS[0]) & _MASK
    x = x ^ (x >> 15)
    x = (x * _FACTORS[1]) & _MASK
    return x ^ (x >> 16)


def key(seed: _Integers, matrix: int) -> _Integers:
    """What tells the noise of the ``matrix``-th matrix of an update from that of the others; 32 bits."""
    return lowbias32((seed + matrix) & _MASK)


def noise(seed: int | Tensor, matrix: int, rows: slice, columns: int, device: torch.device) -> Tensor:
    """Uniform 16-bit noise for rows of the ``matrix``-th (·, columns) matrix of an update: int32 (rows, columns).

    The upper half of `lowbias32`, in place and in int32, which wraps around as the hash does.
    """
    if device.type == "cpu":
        own = torch.tensor(key(int(seed), matrix))
    else:
        own = key(torch.as_tensor(seed, dtype=torch.int64, device=device), matrix)
    first = (rows.start * columns + 2**31) % 2**32 - 2**31  # the low 32 bits, as int32 has them
    x = torch.arange((rows.stop - rows.start) * columns, dtype=torch.int32, device=device).view(-1, columns)
    x += first
    x ^= own.to(torch.int32)
    for shift, factor in zip((16, 15), _FACTORS, strict=True):
        x ^= _shifted(x, shift)
        x *= factor - 2**32 if factor >= 2**31 else factor
    return _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits, of int32 taken as 32 bits without a sign."""
    return (x >> bits).bitwise_and_((1 << 32 - bits) - 1)


def store_rounded_(W: Tensor, x: Tensor, seed: int | Tensor, matrix: int = 0, first: int = 0) -> None:
    """W <- x, rounded stochastically; in blocks of rows, for noise takes more room than what it rounds.

    Args:
        W: (m, n) in bfloat16.
        x: as large, in float32.
        seed: of the update.
        matrix: W's number in the update.
        first: number of W's first row, if it is a part of its matrix.
    """
    m, n = W.shape
    step = max(1, (_BLOCK_CPU if W.device.type == "cpu" else _BLOCK_ACCELERATOR) // max(1, n))
    for i in range(0, m, step):
        stop = min(i + step, m)
        draws = noise(seed, matrix, slice(first + i, first + stop), n, W.device)
        W[i:stop].copy_(_rounded_(draws, x[i:stop]))


def round_to_bfloat16(x: Tensor, noise: Tensor) -> Tensor:
    """float32 ``x`` to bfloat16: up in magnitude if its lower half plus the noise overflows, else down."""
    return _rounded_(noise.to(torch.int32, copy=True), x).to(torch.bfloat16)


def _rounded_(noise: Tensor, x: Tensor) -> Tensor:
    """The float32 that `round_to_bfloat16` makes bfloat16 of, in place of the noise."""
    rounded = noise.add_(x.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)
    # Infinity stays as it is. NaN might not: the clamped x is NaN where x is, and else less than anything.
    return torch.maximum(rounded, x.clamp(max=-torch.inf), out=rounded)
