"""Lanes: every document once an epoch however many share them, and rows that go on from any place."""

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.lanes import Lane, Packing, Place, pools
from lightning_multinorm.data.packing import IGNORED
from lightning_multinorm.data.shards import Shards, Split
from lightning_multinorm.data.sources import open_corpus
from lightning_multinorm.data.vocabulary import Vocabulary

from .texts import make_texts, write_shards


class MemoryShards(Shards):
    """Shards of texts at hand."""

    def __init__(self, texts: Sequence[Sequence[str]], split: Split | None = None) -> None:
        self.texts_of = texts
        self.names = [str(index) for index in range(len(texts))]
        self.split = split or Split()

    @override
    def _read(self, index: int, start: int, step: int) -> Iterator[tuple[int, str]]:
        return islice(enumerate(self.texts_of[index]), start, None, step)


def epoch_of(lane: Lane, epoch: int = 0) -> list[str]:
    """Empty if the lane finds nothing in it."""
    own: list[str] = []
    with contextlib.suppress(DataError):
        for place, text in lane.documents(Place(epoch)):
            if place.epoch > epoch:
                break
            own.append(text)
    return own


@pytest.fixture(scope="module")
def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    return Vocabulary(tokenizer)


# -- dealing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("ranks", [2, 3])
def test_c4_shaped_shards_are_read_once_an_epoch(tmp_path: Path, ranks: int, workers: int, epoch: int) -> None:
    texts = make_texts(83, seed=5)
    write_shards(tmp_path, texts, 5)
    (tmp_path / "held.txt").write_text("held out")
    shards = open_corpus(str(tmp_path / "*.json.gz"), validation_files=str(tmp_path / "held.txt")).train
    lanes = ranks * workers
    shares = [epoch_of(Lane(shards, 7, lane, lanes), epoch) for lane in range(lanes)]
    assert Counter(itertools.chain(*shares)) == Counter(texts)
    assert max(map(len, shares)) - min(map(len, shares)) <= 5  # one a shard at most


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=40),
    lanes=st.integers(1, 9),
    seed=st.integers(0, 3),
    fraction=st.sampled_from([0.0, 0.3]),
)
def test_any_number_of_lanes_reads_every_document_once(
    sizes: list[int], lanes: int, seed: int, fraction: float
) -> None:
    texts = [[f"{shard}.{document}" for document in range(size)] for shard, size in enumerate(sizes)]
    shards = MemoryShards(texts, Split("train", fraction))
    for epoch in range(2):
        seen: list[str] = []
        for lane in range(lanes):
            seen += epoch_of(Lane(shards, seed, lane, lanes), epoch)
        assert sorted(seen) == sorted(text for text in itertools.chain(*texts) if text in shards.split)


def test_many_shards_are_dealt_whole() -> None:
    shards = MemoryShards([[f"{shard}.{document}" for document in range(3)] for shard in range(70)])
    for lane in range(3):
        own = epoch_of(Lane(shards, 0, lane, 3))
        assert own[::3] == [text.replace(".2", ".0") for text in own[2::3]]  # no lane opens another one's shards


def test_order_depends_on_seed_and_epoch_alone() -> None:
    shards = MemoryShards([[f"{shard}.{document}" for document in range(4)] for shard in range(5)])
    orders = {(seed, epoch): epoch_of(Lane(shards, seed), epoch) for seed in range(3) for epoch in range(3)}
    assert orders[1, 2] == epoch_of(Lane(shards, 1), 2)
    assert len({tuple(order) for order in orders.values()}) >= 7
    # Within a shard documents keep their order, and shards are not interleaved.
    for order in orders.values():
        assert sum(a[0] != b[0] for a, b in pairwise(order)) == 4
        assert all(a < b for a, b in pairwise(order) if a[0] == b[0])


@pytest.mark.parametrize("start", [Place(), Place(3, 0, 1)])
def test_a_lane_without_documents_raises_instead_of_waiting(start: Place) -> None:
    with pytest.raises(DataError, match=r"lane 0 of 1 .*found no text to train on.*--data.source"):
        next(Lane(MemoryShards([[]])).documents(start))
    with pytest.raises(DataError, match=r"lane 1 of 2 .*found no text to train on"):
        list(islice(Lane(MemoryShards([["only one"]]), 0, 1, 2).documents(start), 1))


# -- rows ------------------------------------------------------------------------------------------------------------


def test_packed_rows_are_one_stream_over_epochs(vocabulary: Vocabulary) -> None:
    lane = Lane(MemoryShards([make_texts(7, seed=shard) for shard in range(3)]))
    documents = [text for epoch in range(3) for text in epoch_of(lane, epoch)]
    stream = vocabulary.stream(documents)
    count = (len(stream) - 1) // (16 * 3)
    rows = np.concatenate([pool for _, pool in islice(pools(lane, vocabulary, 16, 3, "stream", Place()), count)])
    assert rows[:, :-1].ravel().tolist() == stream[: count * 48].tolist()
    assert rows[:, 1:].ravel().tolist() == stream[1 : count * 48 + 1].tolist()


def test_padded_rows_are_the_papers(vocabulary: Vocabulary) -> None:
    """What GaLore's script makes: T tokens with the end among them, cut off or filled up, and shifted in the model."""
    texts = ["row", "sink row column " * 9, ""]
    ((_, rows),) = islice(pools(Lane(MemoryShards([texts])), vocabulary, 8, 3, "paper", Place()), 1)
    for row, text in zip(rows.tolist(), texts, strict=True):
        expected = [*vocabulary.encode([text])[0][:7], vocabulary.end_of_text]
        assert row == expected + [IGNORED] * (9 - len(expected))
    batch = vocabulary.batch(rows)
    assert int((batch["labels"] != IGNORED).sum()) == sum(int((row != IGNORED).sum()) - 1 for row in rows)


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.integers(0, 60), min_size=1, max_size=12),
    shards=st.integers(1, 3),
    lanes=st.integers(1, 2),
    rows=st.integers(1, 6),
    length=st.integers(1, 24),
    packing=st.sampled_from(["stream", "paper"]),
)
def test_every_place_is_a_place_to_go_on_from(
    vocabulary: Vocabulary,
    documents: list[int],
    shards: int,
    lanes: int,
    rows: int,
    length: int,
    packing: Packing,
) -> None:
    texts = [f"{number} " + "sink " * words for number, words in enumerate(documents)]
    lane = Lane(MemoryShards([texts[shard::shards] for shard in range(shards)]), 1, lanes - 1, lanes)
    try:
        whole = list(islice(pools(lane, vocabulary, length, rows, packing, Place()), 6))
    except DataError:
        return  # no document for this lane
    for number, (place, _) in enumerate(whole):
        again = list(islice(pools(lane, vocabulary, length, rows, packing, place), 6 - number))
        for (place_before, before), (place_after, after) in zip(whole[number:], again, strict=True):
            assert place_before == place_after
            assert before.tolist() == after.tolist()


def test_a_long_document_is_not_copied_for_every_pool(vocabulary: Vocabulary) -> None:
    lane = Lane(MemoryShards([["sink " * 20_000]]))
    (first, pool), (second, _) = islice(pools(lane, vocabulary, 4, 2, "stream", Place()), 2)
    assert (first, second) == (Place(), Place(token=8))
    assert pool.nbytes < 1000


# -- batches ---------------------------------------------------------------------------------------------------------


def test_isolated_documents_have_positions_of_their_own(vocabulary: Vocabulary) -> None:
    isolating = Vocabulary(vocabulary.tokenizer, isolate_documents=True)
    end = vocabulary.end_of_text
    batch = isolating.batch(np.array([[5, 6, end, 7, 8, end, end, 9, 1]]))
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 0, 1]]
    assert "position_ids" not in vocabulary.batch(np.array([[5, 6]]))
