"""Which rows a batch consists of: epochs without end of all rows, dealt over ranks batch by batch.

Stands on `permutation`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_multinorm.data.prepared.permutation import shuffled


@dataclass(frozen=True)
class RowOrder:
    """An endless order of rows in which each epoch has every row once.

    Attributes:
        count: Rows in all.
        seed: Of the order.
        shuffle: Whether each epoch has a random order of its own, or all have the one of the text.
    """

    count: int
    seed: int = 0
    shuffle: bool = True

    def __getitem__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of the rows at positions; the same shape."""
        epochs, rows = np.divmod(positions, self.count)
        if self.shuffle:
            for epoch in np.unique(epochs):
                chosen = epochs == epoch
                rows[chosen] = shuffled(rows[chosen], self.count, self.seed, int(epoch))
        return rows


@dataclass(frozen=True)
class Dealt:
    """The part of the order that one rank gets.

    Since all ranks together always use up the order without gaps, where they are is one number, and any other number
    of ranks and batch size can go on from there.

    Attributes:
        order: The rows.
        batch_size: B.
        rank: This process among those that see different data.
        world_size: Number of these.
        begin: Rows that all ranks together had used up before `first`.
        first: Number of the batch from which on this holds.
    """

    order: RowOrder
    batch_size: int
    rank: int = 0
    world_size: int = 1
    begin: int = 0
    first: int = 0

    def used(self, batch: int) -> int:
        """Rows that all ranks together have used up before a batch."""
        return self.begin + (batch - self.first) * self.world_size * self.batch_size

    def position(self, batch: int) -> int:
        """Where in the order a batch of this rank begins."""
        return self.used(batch) + self.rank * self.batch_size

    def rows(self, batches: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of the rows of batches.

        Args:
            batches: Shape (n,), numbers of batches, `first` or more.

        Returns:
            Shape (n, B).
        """
        begins = self.position(0) + batches * self.world_size * self.batch_size
        return self.order[begins[:, None] + np.arange(self.batch_size)]
