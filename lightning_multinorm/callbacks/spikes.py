"""LossSpikes: steps whose loss is far above what was to be expected, with the place of their batches in the data."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_multinorm.errors import UsageError

FILE = "spikes.jsonl"
WINDOW = 20
"""Steps that the running estimate looks back, and steps before the first spike can be told."""
_LEAST = 0.01  # of the expected loss: what is less is no spike, however quiet the loss was
_log = logging.getLogger(__name__)


class LossSpikes(Callback):
    """Logs each step whose loss is a spike or not finite, with the batches it was computed from, to replay them.

    The loss x of a step is the mean over ranks and micro-batches. It is compared with a running mean m and a running
    mean deviation d, both by w = 1 / min(steps, 20)::

        spike      x - m > max(threshold · d, 0.01 · |m|), from the 21st step on; any x that is NaN or infinite
        e          x - m, cut to ± that bound, so that a spike hardly moves the estimate
        m, d       m + w · e, d + w · (|e| - d)

    A falling loss lies below m and raises d, so that it is no spike, however steep; what is one, is larger then. If the
    loss stays up, the bound grows by a quarter in a step until that is the expected loss. m, d and the count are in
    checkpoints.

    A spike is a line in the log, and one of JSON at the end of ``spikes.jsonl`` in the trainer's ``log_dir`` (without a
    logger there is none): "step", from 0 as in the metrics, "loss", "expected" (m), "deviation" (d), and "batches", one
    entry for each micro-batch of each rank: "rank" among those with different data, "batch", counted from 1 since
    training began, its own "loss", and its "position", what the data module's ``batch_position(batch)`` returns, if it
    has that, as `TextDataModule`, which makes the batch again by ``replay(position)``. A number that is not finite is
    null.

    Reads one number from the device in a step, after `NonFiniteGradients`, if that comes first, has waited for it.

    Args:
        threshold: how many mean deviations above the mean are a spike. Default: 6.

    Raises:
        ValueError: for a threshold that is not positive.
        UsageError: at the start of training, for a module with manual optimization, whose losses are not seen.
    """

    def __init__(self, threshold: float = 6.0) -> None:
        if not threshold > 0:
            raise ValueError(f"threshold={threshold} must be positive")
        self.threshold = threshold
        self._steps, self._expected, self._deviation = 0, 0.0, 0.0
        self._losses: list[Tensor] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise UsageError(
                f"LossSpikes cannot see the losses of {type(pl_module).__name__}, which sets "
                "automatic_optimization=False; leave this callback out"
            )
        self._losses = []

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())  # divided by the micro-batches of a step, and scaled in float16

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self._losses:  # the training step returned none
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        factor = trainer.accumulate_grad_batches / (1 if scaler is None else scaler.get_scale())
        losses = torch.stack(self._losses).float() * factor
        self._losses = []
        loss = float(trainer.strategy.reduce(losses.mean(), reduce_op="mean"))
        if self.is_spike(loss):
            self._report(trainer, loss, losses.tolist())
        self.update(loss)

    def is_spike(self, loss: float) -> bool:
        """Whether a loss is far above what was to be expected, or no number."""
        return not math.isfinite(loss) or (self._steps >= WINDOW and loss - self._expected > self._bound)

    def update(self, loss: float) -> None:
        """Take a loss into the running estimate, unless it is not finite."""
        if not math.isfinite(loss):
            return
        self._steps += 1
        if self._steps == 1:
            self._expected = loss
        weight, error = 1 / min(self._steps, WINDOW), loss - self._expected
        if self._steps > WINDOW:
            error = min(max(error, -self._bound), self._bound)
        self._expected += weight * error
        self._deviation += weight * (abs(error) - self._deviation)

    @property
    def _bound(self) -> float:
        # A loss that never changed tells nothing of how far it may.
        return max(self.threshold * self._deviation, _LEAST * abs(self._expected)) or math.inf

    def _report(self, trainer: Trainer, loss: float, losses: list[float]) -> None:
        """On all ranks, of which each knows its own batches."""
        batches = _of_all_ranks(trainer, _own_batches(trainer, losses))
        folder = trainer.log_dir if trainer.loggers else None  # asks all ranks
        values = {"loss": loss, "expected": self._expected, "deviation": self._deviation}
        numbers = {name: _finite(value) for name, value in values.items()}
        _write(folder, {"step": trainer.global_step, **numbers, "batches": batches})

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "expected": self._expected, "deviation": self._deviation}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps, self._expected = state_dict["steps"], state_dict["expected"]
        self._deviation = state_dict["deviation"]


def _own_batches(trainer: Trainer, losses: list[float]) -> list[dict[str, Any]]:
    """The step's micro-batches on this rank, of which the last is the one that is trained on now."""
    position = getattr(getattr(trainer, "datamodule", None), "batch_position", lambda batches: None)
    rank = (trainer.distributed_sampler_kwargs or {"rank": 0})["rank"]
    last: int = trainer.fit_loop.epoch_loop.batch_progress.total.ready
    numbered = enumerate(losses, start=last - len(losses) + 1)
    return [{"rank": rank, "batch": k, "loss": _finite(loss), "position": position(k)} for k, loss in numbered]


def _of_all_ranks(trainer: Trainer, own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of ranks that share their data, as under tensor parallelism, one's."""
    parts = [own]
    if trainer.world_size > 1:
        parts = [own] * trainer.world_size
        dist.all_gather_object(parts, own)
    return list({(entry["rank"], entry["batch"]): entry for part in parts for entry in part}.values())


@rank_zero_only
def _write(folder: str | None, line: dict[str, Any]) -> None:
    loss = "is not finite" if line["loss"] is None else f"{line['loss']:.4g} is a spike"
    text = f"step {line['step']}: the loss {loss}; expected {line['expected']:.4g}"
    if folder is not None:
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        text += f"; its batches are noted in {path}"
    _log.warning(text)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
