"""Progress of a training run: a Rich bar in a terminal, a line now and then where the output is a file or a pipe."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from typing_extensions import override

from lightning_multinorm.callbacks.throughput import Throughput, callbacks
from lightning_multinorm.quantities import duration, quantity


class TrainingProgress(RichProgressBar):
    """Shows loss, tokens seen, tokens per second and time left.

    Args:
        lines: where the output is no terminal, print this many lines over the run instead of a bar. Default: 20.
        refresh_rate: see `RichProgressBar`. Default: 4 per second.
    """

    def __init__(self, lines: int = 20, refresh_rate: int = 4) -> None:
        super().__init__(refresh_rate=refresh_rate)
        if lines < 1:
            raise ValueError(f"lines={lines} must be at least 1")
        self._lines = lines
        self._output = Console(soft_wrap=True)
        self._shown: tuple[float, dict[str, int | str | float | dict[str, float]]] = (0.0, {})
        self._begun_at = 0
        self._timed_from = (0.0, 0)
        self._printed = -1

    @override
    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        # Reading a metric waits for the device, so it is done twice a second, not in every step.
        if time.monotonic() - self._shown[0] > 0.5:
            self._shown = (time.monotonic(), dict(_metrics(trainer)))
        return self._shown[1]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun_at = trainer.global_step
        if self._output.is_terminal:
            super().on_train_start(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._output.is_terminal:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            return
        every = max(1, trainer.max_steps // self._lines) if trainer.max_steps > 0 else 100
        step = trainer.global_step
        first = self._begun_at + 1
        if step > self._printed and (step % every == 0 or step == first) and step >= first:
            self._printed = step  # once, however many micro-batches a step has
            if step == first:  # which compiles, and tells nothing of those to come
                self._timed_from = (time.monotonic(), step)
            self._print_line(trainer, step)

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        # Lightning's is "Epoch 0/-2" for a run that is as long as its steps.
        return "Training".ljust(len(self.validation_description))

    @rank_zero_only
    def _print_line(self, trainer: Trainer, step: int) -> None:
        total = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        parts = [f"step {step:>{len(total)}}{total}", *(f"{name} {value}" for name, value in _metrics(trainer).items())]
        since, done = self._timed_from
        if trainer.max_steps > 0 and step > done:
            left = (time.monotonic() - since) / (step - done) * (trainer.max_steps - step)
            parts.append(f"{duration(left)} left")
        self._output.print(" · ".join(parts), highlight=False)


def _metrics(trainer: Trainer) -> dict[str, str]:
    values = {}
    if "train/loss" in trainer.callback_metrics:
        values["loss"] = f"{trainer.callback_metrics['train/loss'].item():.3f}"
    for throughput in callbacks(trainer, Throughput):
        values["tokens"] = quantity(throughput.tokens)
        values["tokens/s"] = quantity(throughput.tokens_per_second)
    return values
