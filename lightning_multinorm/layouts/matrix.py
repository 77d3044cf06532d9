"""What a rank holds of a matrix."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Groups = tuple[Any, ...]
"""Process groups over which a sum is completed, one after another."""


class Piece(NamedTuple):
    """A rectangle of a frame: weight and gradient (k, l), and where its first row and column lie in the frame."""

    weight: Tensor
    gradient: Tensor
    row: int
    column: int


@dataclass(frozen=True)
class ShardedMatrix:
    """What this rank holds of one matrix.

    Attributes:
        shape: (m, n) of the whole matrix.
        frame: how many of its rows and columns this rank sees.
        pieces: what it holds of them; none, if its shard is empty.
        rows: the frame's rows among those of the matrix, int64.
        columns: likewise.
        row_groups: complete the sums over a row.
        column_groups: complete the sums over a column.
        batch_groups: hold other matrices of the same parameter.
        share: the part of its parameter that this matrix is: one of so many matrices of the same shape.
        flat: whether every rank's frame is the whole matrix, of a flat slice.
    """

    shape: tuple[int, int]
    frame: tuple[int, int]
    pieces: tuple[Piece, ...]
    rows: Tensor
    columns: Tensor
    row_groups: Groups
    column_groups: Groups
    batch_groups: Groups = ()
    share: float = 1.0
    flat: bool = False

    @property
    def row_frames(self) -> Groups:
        """Groups that put all rows together, for sums of what is known per row."""
        return (() if self.flat else self.column_groups) + self.batch_groups

    @property
    def column_frames(self) -> Groups:
        """Likewise for columns."""
        return (() if self.flat else self.row_groups) + self.batch_groups


def unsharded(weights: Tensor, gradients: Tensor) -> list[ShardedMatrix]:
    """Whole matrices (..., m, n), each as the shard of a matrix that no other rank has a part of."""
    return [_alone(W, G) for W, G in zip(_unbound(weights), _unbound(gradients), strict=True)]


def _alone(W: Tensor, G: Tensor) -> ShardedMatrix:
    (m, n), pieces = W.shape, (Piece(W, G, 0, 0),) if W.numel() else ()
    return ShardedMatrix((m, n), (m, n), pieces, torch.arange(m), torch.arange(n), (), ())


def _unbound(tensor: Tensor) -> Sequence[Tensor]:
    return [tensor] if tensor.ndim == 2 else tensor.flatten(0, -3).unbind()
