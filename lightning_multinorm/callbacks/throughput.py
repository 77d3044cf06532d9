"""Tokens seen, and tokens per second."""

import time
from collections import deque
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_multinorm.callbacks.termination import TerminationCheckpoint
from lightning_multinorm.strategies import batches_side_by_side

C = TypeVar("C", bound=Callback)


class Throughput(Callback):
    """Logs ``tokens``, all that were trained on so far, and ``throughput/tokens_per_second``, of all ranks together.

    Tokens are the labels of a batch that count in the loss, or the entries of ``batch["input_ids"]`` where a batch has
    no labels. The rate is over the last ``window`` batches, without validation and checkpoints; it is the host's clock,
    which an accelerator's queue follows.

    Args:
        window: batches to average over. Default: 50.
    """

    def __init__(self, window: int = 50) -> None:
        if window < 1:
            raise ValueError(f"window={window} must be at least 1")
        self._tokens: Tensor | int = 0  # on the device, which is not to be waited for in every step
        self._recent: deque[tuple[Tensor | int, float]] = deque(maxlen=window)
        self._started = 0.0

    @property
    def tokens(self) -> int:
        """All that were trained on."""
        return int(self._tokens)

    @property
    def tokens_per_second(self) -> float:
        """Over the window; 0 before the first batch has ended."""
        return float(self._rate)

    @property
    def _rate(self) -> Tensor | float:
        seconds = sum(elapsed for _, elapsed in self._recent)
        return sum(tokens for tokens, _ in self._recent) / seconds if seconds else 0.0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._started = time.perf_counter() - _saving(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        tokens = _tokens(trainer, batch)
        self._tokens = tokens + self._tokens
        self._recent.append((tokens, time.perf_counter() - _saving(trainer) - self._started))
        pl_module.log_dict({"tokens": self._tokens.float(), "throughput/tokens_per_second": self._rate}, on_epoch=False)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._tokens = state_dict["tokens"]


def _tokens(trainer: Trainer, batch: Any) -> Tensor:
    """Of all ranks together, 0-d."""
    if "labels" not in batch:
        return torch.tensor(batch["input_ids"].numel() * batches_side_by_side(trainer))
    everywhere = trainer.strategy.reduce((batch["labels"] >= 0).sum(), reduce_op="sum")
    return everywhere * batches_side_by_side(trainer) // trainer.world_size  # tensor parallel ranks share a batch


def _saving(trainer: Trainer) -> float:
    """Seconds spent so far in saving what was trained before a batch."""
    return sum(callback.seconds for callback in callbacks(trainer, TerminationCheckpoint))


def callbacks(trainer: Trainer, kind: type[C]) -> list[C]:
    """The trainer's callbacks of a kind."""
    attached: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in attached if isinstance(callback, kind)]
