"""Rows to validate, test and predict on: tokenised once, held in memory, every token a label exactly once.

T = sequence length, B = sequences in a batch. Stands on `loader`, `vocabulary` and `packing`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from typing_extensions import override

from lightning_multinorm.data.loader import Batches
from lightning_multinorm.data.packing import Tokens, pack_all
from lightning_multinorm.data.vocabulary import Batch, Vocabulary, groups


@dataclass(eq=False)
class MemoryBatches(Batches):
    """Rows held in memory, in order, in batches of which the last may be smaller.

    Attributes:
        vocabulary: How to read the rows.
        rows: Shape (rows, T + 1).
        batch_size: B.
        documents: Shape (rows,), added to the batches as "document"; None for no such key.
    """

    vocabulary: Vocabulary
    rows: Tokens
    batch_size: int
    documents: Tokens | None = None

    @override
    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    @override
    def batches(self, done: int) -> Iterator[Batch]:
        for start in range(done * self.batch_size, len(self.rows), self.batch_size):
            part = slice(start, start + self.batch_size)
            batch = self.vocabulary.batch(self.rows[part])
            if self.documents is not None:
                batch["document"] = torch.from_numpy(self.documents[part])
            yield batch


def held_out_rows(texts: Iterator[str], vocabulary: Vocabulary, sequence_length: int, limit: int) -> Tokens:
    """The first tokens of held-out documents as rows, each of these tokens a target exactly once.

    An end-of-text before the first document lets its first token be predicted like that of any other.

    Args:
        texts: The documents.
        vocabulary: How to make tokens of them.
        sequence_length: T.
        limit: Tokens to keep.

    Returns:
        Shape (ceil(tokens / T), T + 1).
    """
    parts = [np.array([vocabulary.end_of_text])]
    missing = limit
    for group in groups(texts):
        parts.append(vocabulary.stream(group)[:missing])
        missing -= len(parts[-1])
        if missing == 0:
            break
    return pack_all(np.concatenate(parts), sequence_length)


def document_rows(texts: list[str], vocabulary: Vocabulary, sequence_length: int) -> tuple[Tokens, Tokens]:
    """Windows for the perplexity of each document: every token of it a target exactly once.

    Args:
        texts: The documents; one without tokens gets no window.
        vocabulary: How to make tokens of them.
        sequence_length: T; a window's first token is predicted from the one before it, but not from earlier windows.

    Returns:
        The windows, shape (windows, T + 1), and the index of each one's document, shape (windows,).
    """
    start = [vocabulary.end_of_text]
    streams = [np.array(start + ids) for group in groups(iter(texts)) for ids in vocabulary.encode(group)]
    windows = [pack_all(stream, sequence_length) for stream in streams]
    owners = np.repeat(np.arange(len(windows)), [len(rows) for rows in windows])
    return np.concatenate([np.empty((0, sequence_length + 1), dtype=np.int64), *windows]), owners
