"""The training stream: what it yields, how many, in which process, and from where after a resume."""

import json
import pickle
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.files import read_documents
from lightning_multinorm.data.lanes import Lane, Place
from lightning_multinorm.data.loader import BatchLoader, TrainingBatches
from lightning_multinorm.data.packing import IGNORED
from lightning_multinorm.data.shards import Shards
from lightning_multinorm.data.sources import open_corpus
from lightning_multinorm.data.vocabulary import Vocabulary

# Whether torch finds the workers too many depends on the machine, not on what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

T, B = 16, 4


@pytest.fixture(scope="module")
def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    return Vocabulary(tokenizer)


@pytest.fixture(scope="module")
def documents(shards: Path) -> Shards:
    files = [str(path) for path in sorted(shards.iterdir())]
    # Documents of another file held out, so that training sees all of `texts`.
    assert len(list(read_documents(files[0], "text"))) == 40
    return open_corpus(files, validation_files=files[:1]).train


def make(documents: Shards, vocabulary: Vocabulary, batches: int, **options: Any) -> TrainingBatches:
    options = {"sequence_length": T, "batch_size": B, "total": batches, **options}
    return TrainingBatches(documents, vocabulary, **options)


def load(dataset: TrainingBatches, workers: int = 0, **options: Any) -> BatchLoader:
    dataset.workers = max(1, workers)
    return BatchLoader(dataset, workers, **options)


def inputs(batches: list[dict[str, Tensor]]) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in batches]


def test_a_batch_is_rows_of_one_stream(documents: Shards, vocabulary: Vocabulary) -> None:
    batches = list(load(make(documents, vocabulary, 10)))
    order = [text for _, text in islice(Lane(documents).documents(Place()), 200)]
    stream = torch.from_numpy(vocabulary.stream(order))
    assert torch.cat([batch["input_ids"] for batch in batches]).ravel().equal(stream[: 10 * B * T])
    assert torch.cat([batch["labels"] for batch in batches]).ravel().equal(stream[1 : 10 * B * T + 1])
    for batch in batches:
        assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
            "input_ids": (torch.int64, (B, T)),
            "labels": (torch.int64, (B, T)),
            "bytes": (torch.int64, (B,)),
        }
        assert batch["bytes"].equal(vocabulary.byte_lengths[batch["labels"]].sum(1))


def test_rows_with_gaps_become_ignored_labels(vocabulary: Vocabulary) -> None:
    stream = vocabulary.stream(["sink row column"])[:4]
    rows = torch.full((2, 6), IGNORED)
    rows[0, :4] = torch.from_numpy(stream)
    batch = vocabulary.batch(rows.numpy())
    assert batch["labels"].tolist() == [[*stream[1:].tolist(), IGNORED, IGNORED], [IGNORED] * 5]
    assert batch["input_ids"].min() >= 0  # an embedding can look them up
    assert batch["bytes"].tolist() == [int(vocabulary.byte_lengths[stream[1:]].sum()), 0]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("batches", [1, 2, 7])
def test_length_is_what_is_yielded(documents: Shards, vocabulary: Vocabulary, workers: int, batches: int) -> None:
    loader = load(make(documents, vocabulary, batches), workers)
    assert len(loader) == len(list(loader)) == batches


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_see_different_text(documents: Shards, vocabulary: Vocabulary, workers: int) -> None:
    rows = [
        tuple(row)
        for rank in range(2)
        for batch in load(make(documents, vocabulary, 8, rank=rank, world_size=2), workers)
        for row in batch["input_ids"].tolist()
    ]
    assert len(set(rows)) == len(rows) == 2 * 8 * B  # less than one epoch, so no row twice


def test_seed_decides(documents: Shards, vocabulary: Vocabulary) -> None:
    first, again, other = (inputs(list(make(documents, vocabulary, 3, seed=seed))) for seed in (0, 0, 1))
    assert first == again != other


def test_another_process_yields_the_same(documents: Shards, vocabulary: Vocabulary) -> None:
    dataset = make(documents, vocabulary, 4)
    here = inputs(list(dataset))
    assert inputs(list(load(dataset, 1))) == here
    assert inputs(list(pickle.loads(pickle.dumps(dataset)))) == here


@pytest.mark.parametrize("mixed", [{}, {"mix_rows": 3 * B}, {"packing": "paper", "mix_rows": 2 * B}])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_batch_is_one_to_go_on_after(
    documents: Shards, vocabulary: Vocabulary, workers: int, mixed: dict[str, Any]
) -> None:
    total, trained = 11, 0
    loader = load(make(documents, vocabulary, total, **mixed), workers)
    whole, states = [], []
    for trained, batch in enumerate(loader, start=1):
        whole.append(batch["input_ids"].tolist())
        assert loader.places(trained - 1) == (states[-1] if states else {})  # stopped before the batch was used
        states.append(loader.places(trained))
    assert trained == total
    for done in (1, 2, 5, 8, 10):
        places = {worker: Place(*place.state()) for worker, place in states[done - 1].items()}
        rest = load(
            make(documents, vocabulary, total, **mixed), workers, consumed=lambda d=done: d, resumed=(done, places)
        )
        assert inputs(list(rest)) == whole[done:]
        assert len(rest) == total  # Lightning counts from the beginning


def test_a_place_costs_nothing_to_go_on_from(documents: Shards, vocabulary: Vocabulary) -> None:
    """What was trained on is not tokenised again."""
    loader = load(make(documents, vocabulary, 20))
    batches = iter(loader)
    for _ in range(12):
        next(batches)
    read: list[Any] = []

    class Watched(Vocabulary):
        def encode(self, texts: Any) -> Any:
            read.extend(texts)
            return super().encode(texts)

    watched = make(documents, Watched(vocabulary.tokenizer), 20)
    watched.go_on(12, loader.places(12))
    next(iter(watched))
    assert read[0] == next(Lane(documents).documents(loader.places(12)[0]))[1]
    assert len(read) <= 64


def test_position_is_asked_late_and_again(documents: Shards, vocabulary: Vocabulary) -> None:
    done = [0]
    whole = inputs(list(load(make(documents, vocabulary, 6))))
    loader = load(make(documents, vocabulary, 6), consumed=lambda: done[0])
    iterator = iter(loader)
    for done[0] in (0, 1):
        next(iterator)
    done[0] = 2
    assert inputs(list(loader)) == whole[2:]  # an epoch that begins after two batches
    assert loader.state_dict() == {"batches": 2}
    done[0] = 3
    with pytest.raises(DataError, match="after 3 batches is not known"):
        next(iter(loader))


def test_errors_of_the_thread_are_raised_here(documents: Shards, vocabulary: Vocabulary) -> None:
    class Failing(Vocabulary):
        def batch(self, rows: Any) -> Any:
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        next(iter(load(make(documents, Failing(vocabulary.tokenizer), 6))))


def test_threads_end_with_their_iterator(documents: Shards, vocabulary: Vocabulary) -> None:
    iterator = iter(load(make(documents, vocabulary, 100)))
    next(iterator)
    assert any(thread.name.startswith("batches") for thread in threading.enumerate())
    iterator.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


def test_a_batch_is_replayed_from_its_position(documents: Shards, vocabulary: Vocabulary) -> None:
    for workers, rank in ((0, 0), (2, 1)):
        dataset = make(documents, vocabulary, 9, mix_rows=2 * B, world_size=2, rank=rank)
        loader = load(dataset, workers)
        for number, batch in enumerate(loader, start=1):
            position = dataset.position(*loader.last_places[number])
            again = replace(dataset, rank=0).replay(json.loads(json.dumps(position)))
            assert again.keys() == batch.keys()
            assert again["labels"].equal(batch["labels"])
            assert position["shard"] in documents.names


def test_a_used_up_loader_raises_instead_of_being_empty(documents: Shards, vocabulary: Vocabulary) -> None:
    loader = load(make(documents, vocabulary, 3), consumed=lambda: 3)
    with pytest.raises(DataError, match=r"all 3 batches are used up.*--trainer.max_steps"):
        next(iter(loader))


def test_random_numbers_of_the_model_are_left_alone(documents: Shards, vocabulary: Vocabulary) -> None:
    before = torch.get_rng_state()
    list(load(make(documents, vocabulary, 2)))
    assert torch.get_rng_state().equal(before)


def test_mixing_spreads_documents_over_batches_and_loses_nothing(documents: Shards, vocabulary: Vocabulary) -> None:
    def rows(batches: int, **options: int) -> list[tuple[int, ...]]:
        stream = make(documents, vocabulary, batches, **options)
        return [tuple(row.tolist()) for batch in stream for row in batch["input_ids"]]

    in_order, mixed = rows(60), rows(30, mix_rows=20 * B)
    assert mixed != in_order[: len(mixed)] and set(mixed) <= set(in_order)
    assert set(in_order[: 20 * B]) <= set(rows(60, mix_rows=20 * B))
    assert mixed == rows(30, mix_rows=20 * B) != rows(30, mix_rows=20 * B, seed=1)
