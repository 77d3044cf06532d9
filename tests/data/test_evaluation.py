"""Held-out rows and windows of documents: every token a label exactly once, on one rank or several."""

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from lightning_multinorm.data.evaluation import MemoryBatches, document_rows, held_out_rows
from lightning_multinorm.data.packing import IGNORED, share_of_rank
from lightning_multinorm.data.vocabulary import Vocabulary

from .texts import make_texts

T = 16


@pytest.fixture(scope="module")
def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    return Vocabulary(tokenizer)


def labels_of(rows: np.ndarray) -> list[int]:
    targets = rows[:, 1:]
    return targets[targets != IGNORED].tolist()


@pytest.mark.parametrize("limit", [1, 15, 16, 17, 100, 10**6])
def test_the_first_tokens_are_labels_once(vocabulary: Vocabulary, limit: int) -> None:
    texts = make_texts(70, seed=5)
    rows = held_out_rows(iter(texts), vocabulary, T, limit)
    stream = vocabulary.stream(texts)
    assert labels_of(rows) == stream[:limit].tolist()
    assert rows.shape == (-(-min(limit, len(stream)) // T), T + 1)
    assert rows[0, 0] == vocabulary.end_of_text


def test_no_more_documents_are_read_than_needed(vocabulary: Vocabulary) -> None:
    texts = iter(make_texts(200, seed=5))
    held_out_rows(texts, vocabulary, T, 10)
    assert next(texts, None) is not None


def test_no_documents_no_rows(vocabulary: Vocabulary) -> None:
    assert held_out_rows(iter([]), vocabulary, T, 100).shape == (0, T + 1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_ranks_count_each_token_once(vocabulary: Vocabulary, world_size: int, batch_size: int) -> None:
    texts = make_texts(40, seed=6)
    rows = held_out_rows(iter(texts), vocabulary, T, 10**6)
    loaders = [
        MemoryBatches(vocabulary, share_of_rank(rows, rank, world_size), batch_size) for rank in range(world_size)
    ]
    batches = [list(loader) for loader in loaders]
    assert len({len(own) for own in batches}) == 1  # a rank that ends early would leave the others waiting
    assert [len(loader) for loader in loaders] == [len(own) for own in batches]
    seen = torch.cat([batch["labels"].ravel() for own in batches for batch in own])
    assert Counter(seen[seen != IGNORED].tolist()) == Counter(vocabulary.stream(texts).tolist())
    size = sum(int(batch["bytes"].sum()) for own in batches for batch in own)
    assert size == sum(len(text.encode()) for text in texts)


def test_each_token_of_a_document_is_predicted_once(vocabulary: Vocabulary) -> None:
    texts = ["", *make_texts(40, seed=7), "", "sink"]
    rows, owners = document_rows(texts, vocabulary, T)
    assert len(rows) == len(owners)
    for index, ids in enumerate(vocabulary.encode(texts)):
        own = rows[owners == index]
        assert labels_of(own) == ids
        assert len(own) == -(-len(ids) // T)
        inputs = own[:, :-1][own[:, 1:] != IGNORED].tolist()
        assert inputs == [vocabulary.end_of_text, *ids][: len(ids)]  # each follows the token before it


def test_documents_can_be_told_apart_in_batches(vocabulary: Vocabulary) -> None:
    texts = make_texts(9, seed=8)
    rows, owners = document_rows(texts, vocabulary, T)
    sizes = Counter[int]()
    for rank in range(2):
        share = share_of_rank(rows, rank, 2), 4, share_of_rank(owners, rank, 2)
        for batch in MemoryBatches(vocabulary, *share):
            for document, size in zip(batch["document"].tolist(), batch["bytes"].tolist(), strict=True):
                sizes[document] += size
    assert sizes.pop(IGNORED, 0) == 0
    assert sizes == {index: len(text.encode()) for index, text in enumerate(texts)}


def test_no_text_no_windows(vocabulary: Vocabulary) -> None:
    rows, owners = document_rows([], vocabulary, T)
    assert (rows.shape, owners.shape) == ((0, T + 1), (0,))
