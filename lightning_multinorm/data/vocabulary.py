"""A tokenizer with what rows need to know of it: documents to tokens, and rows to batches.

B = sequences in a batch, T = sequence length. A batch is a dict of int64 tensors: "input_ids" (B, T), "labels" (B, T)
where labels[:, i] is the token after input_ids[:, i] or -100, "bytes" (B,), the UTF-8 bytes of the labels' text, and,
if documents are isolated, "position_ids" (B, T). Stands on `packing` and `tokenizer`.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_multinorm.data.packing import IGNORED, Tokens, join, restarting_positions
from lightning_multinorm.data.tokenizer import end_of_text_id, plain_backend, token_byte_lengths

Batch = dict[str, Tensor]

DOCUMENTS_AT_ONCE = 32  # enough for the tokenizer's threads, little enough that the first batch comes soon


class Vocabulary:
    """What a tokenizer makes of documents, and models of its tokens.

    Args:
        tokenizer: A fast tokenizer with an end-of-text token.
        isolate_documents: Whether batches tell attention where documents begin.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, isolate_documents: bool = False) -> None:
        self.tokenizer = tokenizer
        self.isolate_documents = isolate_documents
        self.end_of_text = end_of_text_id(tokenizer)
        self.byte_lengths = token_byte_lengths(tokenizer)

    @cached_property
    def _backend(self) -> Tokenizer:
        return plain_backend(self.tokenizer)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_backend"}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each document and nothing added; from any thread."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def stream(self, texts: Sequence[str]) -> Tokens:
        """Tokens of several documents, each followed by end-of-text."""
        return join(self.encode(texts), self.end_of_text)

    def batch(self, rows: Tokens) -> Batch:
        """Inputs, shifted labels and byte counts of rows.

        Args:
            rows: Shape (B, T + 1); `IGNORED` where there is no token.

        Returns:
            The batch described at the head of this file.
        """
        tokens = torch.from_numpy(rows)
        labels = tokens[:, 1:].contiguous()
        inputs = tokens[:, :-1].clone()
        inputs[inputs == IGNORED] = self.end_of_text  # any valid id: nothing is predicted from it
        sizes = torch.where(labels == IGNORED, 0, self.byte_lengths[labels.clamp(min=0)])
        batch = {"input_ids": inputs, "labels": labels, "bytes": sizes.sum(dim=1)}
        if self.isolate_documents:
            batch["position_ids"] = torch.from_numpy(restarting_positions(rows[:, :-1], self.end_of_text))
        return batch


def groups(texts: Iterator[str]) -> Iterator[list[str]]:
    """Documents in groups for the tokenizer."""
    while group := list(islice(texts, DOCUMENTS_AT_ONCE)):
        yield group
