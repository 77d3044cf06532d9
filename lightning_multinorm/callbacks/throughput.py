"""Tokens seen, and tokens per second."""

import time
from collections import deque
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_multinorm.strategies import batches_side_by_side

C = TypeVar("C", bound=Callback)


class Throughput(Callback):
    """Logs ``tokens``, all that were trained on so far, and ``throughput/tokens_per_second``, of all ranks together.

    Tokens are the entries of ``batch["input_ids"]``. The rate is over the last ``window`` batches, without validation
    and checkpoints; it is the host's clock, which an accelerator's queue follows.

    Args:
        window: batches to average over. Default: 50.
    """

    def __init__(self, window: int = 50) -> None:
        if window < 1:
            raise ValueError(f"window={window} must be at least 1")
        self.tokens = 0
        self._recent: deque[tuple[int, float]] = deque(maxlen=window)
        self._started = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Over the window; 0 before the first batch has ended."""
        seconds = sum(elapsed for _, elapsed in self._recent)
        return sum(tokens for tokens, _ in self._recent) / seconds if seconds else 0.0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._started = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        tokens = batch["input_ids"].numel() * batches_side_by_side(trainer)
        self.tokens += tokens
        self._recent.append((tokens, time.perf_counter() - self._started))
        pl_module.log_dict(
            {"tokens": float(self.tokens), "throughput/tokens_per_second": self.tokens_per_second}, on_epoch=False
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens = state_dict["tokens"]


def callbacks(trainer: Trainer, kind: type[C]) -> list[C]:
    """The trainer's callbacks of a kind."""
    attached: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in attached if isinstance(callback, kind)]
