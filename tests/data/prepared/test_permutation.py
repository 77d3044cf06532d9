"""The order of rows: a bijection for any number of them, new in each epoch, and with no pattern that shows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_multinorm.data.prepared.permutation import shuffled

SEEDS = st.integers(0, 2**63)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 1000))
def test_every_number_comes_once(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(shuffled(np.arange(n), n, seed, epoch)), np.arange(n))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2**40, 2**60), start=st.integers(0, 2**39), seed=SEEDS)
def test_any_stretch_of_a_huge_order_is_found_without_the_rest(n: int, start: int, seed: int) -> None:
    stretch = shuffled(np.arange(start, start + 64), n, seed, 0)
    assert len(set(stretch.tolist())) == 64
    assert stretch.min() >= 0 and stretch.max() < n
    assert shuffled(np.array([start + 7]), n, seed, 0)[0] == stretch[7]


def test_seed_and_epoch_decide_and_nothing_else() -> None:
    positions = np.arange(1000)
    orders = [shuffled(positions, 1000, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert np.array_equal(orders[0], shuffled(positions, 1000, 0, 0))
    for k, order in enumerate(orders):
        for other in orders[:k]:
            assert (order == other).sum() < 20  # of 1000; by chance 1
    assert shuffled(positions.reshape(10, 100), 1000, 0, 0).tolist() == orders[0].reshape(10, 100).tolist()


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_every_number_is_as_likely_at_every_position(n: int) -> None:
    draws = 3000
    counts = np.zeros((n, n))
    for seed in range(draws):
        counts[np.arange(n), shuffled(np.arange(n), n, seed, 0)] += 1
    expected = draws / n
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_neighbours_are_torn_apart() -> None:
    n = 100_000
    order = shuffled(np.arange(n), n, 0, 0)
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.02
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    gaps = np.bincount(np.clip(np.abs(np.diff(order)), 0, 100))
    assert gaps[1] < 20 and gaps[100] > 0.99 * n  # of neighbours, by chance 2 remain
