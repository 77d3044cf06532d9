"""What an update of whole matrices works on."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Whole matrices (..., m, n) of one shape, dtype and device that are updated together.

    Attributes:
        weights: updated in place.
        gradients: as many, left unchanged.
        lr: effective learning rate: RMS change per entry.
        weight_decay: decoupled weight decay.
        iterations: L, for those that have one.
        seed: rounds bfloat16 weights stochastically, or None.
        observe: whether the update returns what it has measured.
    """

    weights: Sequence[Tensor]
    gradients: Sequence[Tensor]
    lr: float | Tensor
    weight_decay: float
    iterations: int = 5
    seed: Tensor | None = None
    observe: bool = False
