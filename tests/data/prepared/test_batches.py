"""Batches of prepared data: what `Vocabulary.batch` would make of the same rows, from any batch on, in any process."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.loader import BatchLoader
from lightning_multinorm.data.packing import IGNORED, pack_all
from lightning_multinorm.data.prepared.batches import PreparedBatches
from lightning_multinorm.data.prepared.opening import open_prepared
from lightning_multinorm.data.vocabulary import Vocabulary

from .sources import SETTINGS, MemoryShards, prepare

# Whether torch finds the workers too many depends on the machine, not on what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

T, B = 16, 4
OPTIONS = {name: value for name, value in SETTINGS.items() if name.startswith("data.")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(folder, texts, tokenizer)
    return folder


def make(folder: Path, total: int, isolate: bool = False, **options: Any) -> PreparedBatches:
    prepared = open_prepared(str(folder), OPTIONS)
    settings = {"ranks": (0, 1), "seed": 0, "shuffle": True, "resumed": {}, **options}
    return prepared.batches(Vocabulary(prepared.load_tokenizer(), isolate), T, B, total=total, **settings)


def seen(batches: Any) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in batches]


@pytest.mark.parametrize("isolate", [False, True])
def test_batches_are_those_of_the_texts(folder: Path, texts: list[str], isolate: bool) -> None:
    batches = make(folder, 0, isolate, shuffle=False)
    vocabulary = batches.vocabulary
    vocabulary.byte_lengths[vocabulary.end_of_text] = 13  # as where an ordinary token ends documents
    rows = pack_all(vocabulary.stream(list(MemoryShards(texts, held_out=False).texts())), T)
    assert (rows[-1] == IGNORED).any()  # or nothing would be filled up
    for start in range(0, len(rows), 50):
        numbers = np.arange(start, min(start + 50, len(rows)))
        made, expected = batches.batch(numbers), vocabulary.batch(rows[numbers])
        assert made.keys() == expected.keys()
        for name, value in expected.items():
            assert made[name].dtype == value.dtype and made[name].is_contiguous()
            # Positions in what is filled up are nobody's: nothing is predicted there, and nothing looks back from it.
            there = (
                expected["labels"] != IGNORED if name == "position_ids" else torch.ones_like(value, dtype=torch.bool)
            )
            assert made[name][there].equal(value[there]), name


def test_every_token_but_the_first_is_a_target_once_an_epoch(folder: Path, texts: list[str]) -> None:
    batches = make(folder, 0)
    stream = batches.vocabulary.stream(list(MemoryShards(texts, held_out=False).texts()))
    count = batches.dealt.order.count
    labels = np.concatenate([batches.batch(batches.dealt.order[np.arange(count)])["labels"].numpy().ravel()])
    assert np.array_equal(np.sort(labels[labels != IGNORED]), np.sort(stream[1:]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 3, 10])
def test_any_batch_is_the_first_to_be_made(folder: Path, workers: int, done: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("lightning_multinorm.data.prepared.batches._ROWS_AT_ONCE", 3 * B)
    whole = seen(make(folder, 11).batches(0))
    assert len(whole) == 11 and len({tuple(row) for batch in whole for row in batch}) == 11 * B
    loader = BatchLoader(make(folder, 11), workers, consumed=lambda: done, resumed=(done, {}))
    assert seen(loader) == whole[done:]


def test_a_batch_far_away_costs_no_more(folder: Path) -> None:
    batches = make(folder, 10**15)
    far = next(batches.batches(10**14))
    assert far["input_ids"].equal(batches.batch(batches.dealt.rows(np.array([10**14]))[0])["input_ids"])


def test_ranks_of_another_number_go_on(folder: Path) -> None:
    """1 rank, then 2, then 3: together they see what one rank would have seen."""
    expected = [row for batch in seen(make(folder, 12).batches(0)) for row in batch]
    found, state = [], {}
    for world_size, batches in ((1, 1), (2, 1), (3, 3)):
        done = state.get("batches", 0)
        ranks = [make(folder, done + batches, ranks=(rank, world_size), resumed=state) for rank in range(world_size)]
        for step in zip(*(seen(rank.batches(done)) for rank in ranks), strict=True):
            found += [row for batch in step for row in batch]
        state = {"batches": done + batches, "rows": ranks[0].dealt.used(done + batches)}
    assert found == expected


def test_a_batch_can_be_replayed_by_another_rank(folder: Path) -> None:
    of_rank_1 = make(folder, 6, ranks=(1, 2))
    batch = next(of_rank_1.batches(4))
    again = make(folder, 0).replay(of_rank_1.position(4))
    assert all(again[name].equal(value) for name, value in batch.items())


def test_the_seed_decides(folder: Path) -> None:
    assert seen(make(folder, 3).batches(0)) != seen(make(folder, 3, seed=1).batches(0))


def test_tokens_that_the_tokenizer_does_not_have_are_not_handed_out(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    prepare(tmp_path, texts[:40], tokenizer)
    path = tmp_path / "train-00000.bin"
    tokens = np.fromfile(path, "<u2")
    tokens[10] = 65_000
    tokens.tofile(path)
    with pytest.raises(DataError, match="tokens up to 65000, which its tokenizer does not have"):
        make(tmp_path, 0).batch(np.array([0]))
