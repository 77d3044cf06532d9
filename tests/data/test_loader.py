"""The training stream: what it yields, how many, in which process, and from where after a resume."""

import pickle
from pathlib import Path

import pytest
import torch
from datasets import IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.files import read_documents
from lightning_multinorm.data.loader import BatchLoader, TrainingBatches, Vocabulary
from lightning_multinorm.data.packing import IGNORED
from lightning_multinorm.data.sources import open_corpus, rank_share, shuffle_shards

# Whether torch finds the workers too many depends on the machine, not on what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

T, B = 16, 4


@pytest.fixture(scope="module")
def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    return Vocabulary(tokenizer)


@pytest.fixture(scope="module")
def documents(shards: Path) -> IterableDataset:
    files = [str(path) for path in sorted(shards.iterdir())]
    # Documents of another file held out, so that training sees all of `texts`.
    assert len(list(read_documents(files[0], "text"))) == 40
    return open_corpus(files, validation_files=files[:1]).train


def make(documents: IterableDataset, vocabulary: Vocabulary, batches: int, **options: int) -> TrainingBatches:
    return TrainingBatches(documents, vocabulary, sequence_length=T, batch_size=B, batches=batches, **options)


def inputs(batches: list[dict[str, Tensor]]) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in batches]


def test_a_batch_is_rows_of_one_stream(documents: IterableDataset, vocabulary: Vocabulary) -> None:
    batches = list(make(documents, vocabulary, 10))
    order = [example["text"] for example in rank_share(shuffle_shards(documents, 0), 0, 1)]
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
def test_length_is_what_is_yielded(
    documents: IterableDataset, vocabulary: Vocabulary, workers: int, batches: int
) -> None:
    loader = BatchLoader(make(documents, vocabulary, batches), num_workers=workers)
    assert len(loader) == len(list(loader)) == batches


def test_stream_goes_on_for_many_epochs_in_new_orders(documents: IterableDataset, vocabulary: Vocabulary) -> None:
    orders = []
    for epoch in range(3):
        share = rank_share(shuffle_shards(documents, 0), 0, 1)
        share.set_epoch(epoch)
        orders += [example["text"] for example in share]
    stream = torch.from_numpy(vocabulary.stream(orders))
    count = (len(stream) - 1) // (B * T)
    batches = list(make(documents, vocabulary, count))
    # Nothing is lost where one epoch ends and the next begins.
    assert torch.cat([batch["labels"] for batch in batches]).ravel().equal(stream[1 : count * B * T + 1])


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_see_different_text(documents: IterableDataset, vocabulary: Vocabulary, workers: int) -> None:
    rows = [
        tuple(row)
        for rank in range(2)
        for batch in BatchLoader(make(documents, vocabulary, 8, rank=rank, world_size=2), num_workers=workers)
        for row in batch["input_ids"].tolist()
    ]
    assert len(set(rows)) == len(rows) == 2 * 8 * B  # less than one epoch, so no row twice


def test_seed_decides(documents: IterableDataset, vocabulary: Vocabulary) -> None:
    first, again, other = (inputs(list(make(documents, vocabulary, 3, seed=seed))) for seed in (0, 0, 1))
    assert first == again != other


def test_another_process_yields_the_same(documents: IterableDataset, vocabulary: Vocabulary) -> None:
    dataset = make(documents, vocabulary, 4)
    here = inputs(list(dataset))
    assert inputs(list(BatchLoader(dataset, num_workers=1))) == here
    assert inputs(list(pickle.loads(pickle.dumps(dataset)))) == here


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("done", [0, 1, 5, 8, 10])
def test_resume_yields_what_is_left(
    documents: IterableDataset, vocabulary: Vocabulary, workers: int, done: int
) -> None:
    total = 11
    whole = inputs(list(BatchLoader(make(documents, vocabulary, total), num_workers=workers)))
    loader = BatchLoader(make(documents, vocabulary, total), num_workers=workers, consumed=lambda: done)
    assert inputs(list(loader)) == whole[done:]
    assert len(loader) == total  # Lightning counts from the beginning


def test_position_is_asked_late_and_again(documents: IterableDataset, vocabulary: Vocabulary) -> None:
    done = [0]
    loader = BatchLoader(make(documents, vocabulary, 6), consumed=lambda: done[0])
    whole = inputs(list(loader))
    iterator = iter(loader)
    done[0] = 2  # as when Lightning restores a checkpoint after `iter`
    assert inputs(list(iterator)) == whole[2:]
    done[0] = 4
    assert inputs(list(loader)) == whole[4:]
    assert loader.state_dict() == {"batches": 4}


def test_a_used_up_loader_raises_instead_of_being_empty(documents: IterableDataset, vocabulary: Vocabulary) -> None:
    loader = BatchLoader(make(documents, vocabulary, 3), consumed=lambda: 3)
    with pytest.raises(DataError, match=r"all 3 batches are used up.*--trainer.max_steps"):
        next(iter(loader))


def test_random_numbers_of_the_model_are_left_alone(documents: IterableDataset, vocabulary: Vocabulary) -> None:
    before = torch.get_rng_state()
    list(BatchLoader(make(documents, vocabulary, 2)))
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_no_document_raises_instead_of_waiting(
    tmp_path: Path, vocabulary: Vocabulary, rank: int, world_size: int
) -> None:
    lines = {1: "", 2: '{"text": "only one"}\n'}[world_size]
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.txt").write_text("held out")
    documents = open_corpus(str(tmp_path / "a.jsonl"), validation_files=str(tmp_path / "b.txt")).train
    with pytest.raises(DataError, match=rf"rank {rank} of {world_size} found no training document.*--data.source"):
        next(iter(make(documents, vocabulary, 1, rank=rank, world_size=world_size)))


def test_mixing_spreads_documents_over_batches_and_loses_nothing(
    documents: IterableDataset, vocabulary: Vocabulary
) -> None:
    def rows(batches: int, **options: int) -> list[tuple[int, ...]]:
        stream = make(documents, vocabulary, batches, **options)
        return [tuple(row.tolist()) for batch in stream for row in batch["input_ids"]]

    in_order, mixed = rows(60), rows(30, mix_rows=20 * B)
    assert mixed != in_order[: len(mixed)] and set(mixed) <= set(in_order)
    assert set(in_order[: 20 * B]) <= set(rows(60, mix_rows=20 * B))
    assert mixed == rows(30, mix_rows=20 * B) != rows(30, mix_rows=20 * B, seed=1)
    resumed = make(documents, vocabulary, 30, mix_rows=20 * B)
    resumed.start_after(7, workers=0)
    assert [tuple(row.tolist()) for batch in resumed for row in batch["input_ids"]] == mixed[7 * B :]
