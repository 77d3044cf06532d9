"""A shuffled order of any number of rows that is computed where it is asked for, and never stored.

A Feistel network (with addition instead of exclusive or, so that its domain is a square just above n and not a
power of four) is a bijection whatever its round function is; what falls outside of n is sent through again until it
falls inside.
Calls nothing.
"""

import math

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6


def shuffled(positions: NDArray[np.int64], n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The numbers at positions of a pseudo-random permutation of 0, ..., n - 1.

    Args:
        positions: Any shape, each 0 <= position < n.
        n: How many numbers are permuted; at least 1.
        seed: 0 or more.
        epoch: 0 or more; each has an order of its own.

    Returns:
        The same shape.
    """
    side = math.isqrt(n - 1) + 1  # the smallest whose square holds n
    keys = np.random.SeedSequence((seed, epoch)).generate_state(_ROUNDS, np.uint64).astype(np.uint64)
    numbers = _feistel(positions.astype(np.uint64).ravel(), np.uint64(side), keys)
    while len(outside := np.flatnonzero(numbers >= n)):
        numbers[outside] = _feistel(numbers[outside], np.uint64(side), keys)
    return numbers.astype(np.int64).reshape(positions.shape)


def _feistel(numbers: NDArray[np.uint64], side: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 0, ..., side² - 1."""
    left, right = np.divmod(numbers, side)
    for key in keys:
        left, right = right, (left + _hash(right, key) % side) % side
    return left * side + right


def _hash(numbers: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """32 well-mixed bits: SplitMix64's multiplications and shifts."""
    mixed = (numbers ^ key) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed >> np.uint64(32)
