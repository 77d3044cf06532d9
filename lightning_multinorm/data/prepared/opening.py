"""A folder of prepared data, opened to train and validate on. Stands on `batches`, `manifest` and `tokenizer`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.packing import Tokens, pack_all
from lightning_multinorm.data.prepared.batches import PreparedBatches
from lightning_multinorm.data.prepared.manifest import TOKENIZER, Manifest, read_manifest
from lightning_multinorm.data.prepared.rows import Dealt, RowOrder
from lightning_multinorm.data.prepared.stream import TokenStream
from lightning_multinorm.data.tokenizer import identify, load_tokenizer
from lightning_multinorm.data.vocabulary import Vocabulary


@dataclass(frozen=True)
class Prepared:
    """A complete folder.

    Attributes:
        folder: Where it lies.
        manifest: What it holds.
        train: The tokens to train on.
        validation: Those to validate on, in full documents.
    """

    folder: Path
    manifest: Manifest
    train: TokenStream
    validation: TokenStream

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the tokens were made with, out of the folder; no hub is asked.

        Raises:
            DataError: If it is damaged, or another one.
        """
        tokenizer = load_tokenizer(str(self.folder / TOKENIZER), [], 0)
        if identify(tokenizer) != self.manifest.tokenizer:
            raise DataError(f"{self.folder / TOKENIZER} is not what the tokens were made with; copy the folder again.")
        return tokenizer

    def batches(
        self,
        vocabulary: Vocabulary,
        sequence_length: int,
        batch_size: int,
        ranks: tuple[int, int],
        *,
        seed: int,
        shuffle: bool,
        total: int,
        resumed: Mapping[str, Any],
    ) -> PreparedBatches:
        """Batches to train on.

        Args:
            vocabulary: Of `load_tokenizer`.
            sequence_length: T.
            batch_size: B.
            ranks: This process, and the number of those that see different data.
            seed: Of the order of rows.
            shuffle: Whether there is to be any but that of the text.
            total: How many batches, those that are done included.
            resumed: State of a checkpoint, with the "rows" that were used up after its "batches"; or empty.
        """
        order = RowOrder(self.train.row_count(sequence_length), seed, shuffle)
        dealt = Dealt(order, batch_size, *ranks, begin=resumed.get("rows", 0), first=resumed.get("batches", 0))
        return PreparedBatches(self.train, vocabulary, sequence_length, dealt, total)

    def held_out_rows(self, sequence_length: int, limit: int) -> Tokens:
        """The first tokens of held-out documents as rows, the same as `evaluation.held_out_rows` makes of the texts.

        Args:
            sequence_length: T.
            limit: Tokens to keep.

        Returns:
            Shape (ceil(tokens / T), T + 1).

        Raises:
            DataError: If more are asked for than were prepared.
        """
        prepared = self.manifest.settings.get("data.validation_tokens", 0)
        if limit > prepared:
            raise DataError(
                f"data.validation_tokens is {limit}, but {self.folder} was prepared with {prepared}; set it to that or "
                "less, or prepare another folder."
            )
        if len(self.validation) == 0:
            return np.empty((0, sequence_length + 1), dtype=np.int64)
        tokens = np.concatenate([[self.manifest.end_of_text], self.validation.beginning(limit)], dtype=np.int64)
        return pack_all(tokens, sequence_length)


def open_prepared(source: str, options: Mapping[str, Any]) -> Prepared:
    """Open a folder and compare the options that its tokens depend on with those that they were made with.

    Args:
        source: The folder.
        options: By the names that the command line has for them ("data.tokenizer").

    Raises:
        DataError: If it is not complete, was made with other options, or lacks a part.
    """
    folder = Path(source).expanduser()
    manifest = read_manifest(folder)
    if not manifest.complete:
        raise DataError(f"{folder} is prepared in part only; finish it with: {manifest.command(folder)}")
    for name, now in options.items():
        before = manifest.settings.get(name)
        if before != now and name not in ("data.source", "data.validation_tokens"):
            raise DataError(
                f"{name} is {now!r}, but {folder} was prepared with {before!r}; set --{name} to that, or prepare "
                "another folder."
            )
    streams = {name: TokenStream(folder, manifest, name) for name in ("train", "validation")}
    if len(streams["train"]) < 2:
        raise DataError(f"{folder} holds no text to train on; prepare another folder of more documents.")
    return Prepared(folder, manifest, **streams)
