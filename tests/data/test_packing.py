"""Laws of packing over many random documents and lengths: no token lost, none doubled, none padded."""

import numpy as np
import pytest

from lightning_multinorm.data.packing import IGNORED, join, pack, pack_all, share_of_rank

END = 0
CASES = [(seed, length) for seed in range(25) for length in (1, 2, 3, 7, 16, 64)]


def random_documents(seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 1000, size=rng.integers(0, 40)).tolist() for _ in range(rng.integers(1, 30))]


def test_join_puts_end_of_text_after_each_document() -> None:
    stream = join([[5, 6], [], [7]], end_of_text=END)
    assert stream.tolist() == [5, 6, END, END, 7, END]
    assert stream.dtype == np.int64


def test_join_of_nothing_is_empty() -> None:
    assert join([], end_of_text=END).shape == (0,)


@pytest.mark.parametrize(("seed", "length"), CASES)
def test_every_token_but_the_first_is_a_target_once(seed: int, length: int) -> None:
    stream = join(random_documents(seed), END)
    rows, rest = pack(stream, length)
    assert rows.shape == (max(0, len(stream) - 1) // length, length + 1)
    assert np.concatenate([rows[:, 1:].ravel(), rest[1:]]).tolist() == stream[1:].tolist()
    assert len(rest) <= length  # nothing that would fill a row is held back
    for k, row in enumerate(rows):
        assert row.tolist() == stream[k * length : k * length + length + 1].tolist()


@pytest.mark.parametrize(("seed", "length"), CASES)
def test_groups_of_documents_pack_like_all_at_once(seed: int, length: int) -> None:
    documents = random_documents(seed)
    expected, expected_rest = pack(join(documents, END), length)
    rows, rest = [], np.empty(0, dtype=np.int64)
    for start in range(0, len(documents), 3):
        more, rest = pack(np.concatenate([rest, join(documents[start : start + 3], END)]), length)
        rows.append(more)
    assert np.array_equal(np.concatenate(rows), expected)
    assert np.array_equal(rest, expected_rest)


@pytest.mark.parametrize(("seed", "length"), CASES)
def test_pack_all_keeps_the_rest_and_marks_what_is_missing(seed: int, length: int) -> None:
    stream = join(random_documents(seed), END)
    rows = pack_all(stream, length)
    targets = rows[:, 1:]
    assert targets[targets != IGNORED].tolist() == stream[1:].tolist()
    assert len(rows) == -(-(len(stream) - 1) // length)
    assert (rows[:, 0] != IGNORED).all()  # no row of padding alone


def test_packing_does_not_change_its_input() -> None:
    stream = np.arange(10)
    rows, _ = pack(stream, 3)
    rows[:] = -1
    assert stream.tolist() == list(range(10))


@pytest.mark.parametrize("count", range(8))
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_rows_equally_and_each_once(count: int, world_size: int) -> None:
    rows = np.arange(count * 2).reshape(count, 2)
    shares = [share_of_rank(rows, rank, world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {-(-count // world_size)}
    together = np.concatenate(shares)
    real = together[together[:, 0] != IGNORED]
    assert sorted(real.tolist()) == rows.tolist()
    assert (together[together[:, 0] == IGNORED] == IGNORED).all()
