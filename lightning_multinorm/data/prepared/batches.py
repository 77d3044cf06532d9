"""Training batches out of prepared data. Stands on `stream` and `rows`.

B = sequences in a batch, T = sequence length.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info
from typing_extensions import override

from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.loader import Batches
from lightning_multinorm.data.packing import IGNORED, restarting_positions
from lightning_multinorm.data.prepared.rows import Dealt
from lightning_multinorm.data.prepared.stream import TokenStream
from lightning_multinorm.data.vocabulary import Batch, Vocabulary

_ROWS_AT_ONCE = 4096  # whose order is worked out together, which costs little more than for one batch


@dataclass(eq=False)
class PreparedBatches(Batches):
    """A fixed number of batches, any of which is made without those before it.

    Attributes:
        stream: The tokens.
        vocabulary: What they stand for.
        sequence_length: T.
        dealt: Which rows make which batch.
        total: Batches in all, those before `dealt.first` included.
    """

    stream: TokenStream
    vocabulary: Vocabulary
    sequence_length: int
    dealt: Dealt
    total: int

    @override
    def __len__(self) -> int:
        return self.total

    @override
    def batches(self, done: int) -> Iterator[Batch]:
        worker = get_worker_info()
        index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        numbers = range(done + index, self.total, workers)
        at_once = max(1, _ROWS_AT_ONCE // self.dealt.batch_size)
        for start in range(0, len(numbers), at_once):
            for rows in self.dealt.rows(np.array(numbers[start : start + at_once])):
                yield self.batch(rows)

    def identity(self) -> dict[str, Any]:
        """All that decides the order of rows, but the tokens themselves."""
        order = self.dealt.order
        return {"sequence_length": self.sequence_length, "seed": order.seed, "mix_rows": int(order.shuffle)}

    def position(self, number: int) -> dict[str, Any]:
        """Where a batch comes from, in plain numbers."""
        return {"position": self.dealt.position(number)}

    def replay(self, position: dict[str, Any]) -> Batch:
        """The batch of a position, of whatever rank."""
        return self.batch(self.dealt.order[position["position"] + np.arange(self.dealt.batch_size)])

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        """The batch of rows.

        Args:
            rows: Shape (B,), their numbers.

        Returns:
            As `Vocabulary.batch` makes it, in fewer passes, since there are no gaps but at the very end.

        Raises:
            DataError: If a shard holds ids that the tokenizer does not have.
        """
        stored = self.stream.rows(rows, self.sequence_length)
        inputs, labels = stored[:, :-1].astype(np.int64), stored[:, 1:].astype(np.int64)
        try:
            sizes = self.vocabulary.byte_lengths.numpy()[labels]
        except IndexError:
            raise DataError(
                f"data.source holds tokens up to {labels.max()}, which its tokenizer does not have; run the `prepare` "
                "that made it again, which checks all shards."
            ) from None
        last = self.dealt.order.count - 1
        targets = len(self.stream) - 1 - last * self.sequence_length
        if targets < self.sequence_length and (shorter := rows == last).any():
            labels[shorter, targets:] = IGNORED
            sizes[shorter, targets:] = 0
        batch = {"input_ids": inputs, "labels": labels, "bytes": sizes.sum(axis=1)}
        if self.vocabulary.isolate_documents:
            batch["position_ids"] = restarting_positions(inputs, self.vocabulary.end_of_text)
        return {name: torch.from_numpy(value) for name, value in batch.items()}
