"""Rows dealt over ranks: each exactly once an epoch for any number of ranks, and the same after any change of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_multinorm.data.prepared.rows import Dealt, RowOrder


def dealt_to_all(order: RowOrder, world_size: int, batch_size: int, batches: int, begin: int, first: int) -> list[int]:
    """What ranks get together, in the order of their steps."""
    steps = np.arange(first, first + batches)
    ranks = [Dealt(order, batch_size, rank, world_size, begin, first).rows(steps) for rank in range(world_size)]
    return [int(row) for step in range(batches) for rows in ranks for row in rows[step]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sequence_of_worlds_uses_up_one_order(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    order = RowOrder(count, seed=data.draw(st.integers(0, 3)), shuffle=data.draw(st.booleans()))
    seen: list[int] = []
    begin = first = 0
    for world_size, batch_size, batches in data.draw(
        st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=4)
    ):
        seen += dealt_to_all(order, world_size, batch_size, batches, begin, first)
        begin = Dealt(order, batch_size, 0, world_size, begin, first).used(first + batches)
        first += batches
        assert begin == len(seen)
    assert seen == order[np.arange(len(seen))].tolist()


def test_every_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    order = RowOrder(97, seed=3)
    epochs = order[np.arange(3 * 97)].reshape(3, 97)
    assert np.array_equal(np.sort(epochs), np.tile(np.arange(97), (3, 1)))
    assert (epochs[0] == epochs[1]).sum() < 10 and (epochs[1] == epochs[2]).sum() < 10
    assert not np.array_equal(RowOrder(97, seed=4)[np.arange(97)], epochs[0])


def test_unshuffled_rows_come_in_their_order() -> None:
    assert RowOrder(3, shuffle=False)[np.arange(7)].tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_batch_may_span_two_epochs(rank: int) -> None:
    dealt = Dealt(RowOrder(10, shuffle=False), batch_size=4, rank=rank, world_size=2)
    assert dealt.rows(np.array([1]))[0].tolist() == [[8, 9, 0, 1], [2, 3, 4, 5]][rank]
