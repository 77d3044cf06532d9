"""What a run is, at its start, and what it reached and where that lies, at its end."""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.console import Console
from typing_extensions import override

from lightning_multinorm.callbacks.throughput import Throughput, callbacks
from lightning_multinorm.quantities import duration, quantity
from lightning_multinorm.report.command import write_report
from lightning_multinorm.report.drawing import EXTRA, installed
from lightning_multinorm.report.runs import LOG, open_runs
from lightning_multinorm.strategies import batches_side_by_side


class RunSummary(Callback):
    """Prints one line when training starts and a few when it ends, and then makes the report of the run, a page.

    Args:
        report: write report.html beside metrics.csv, where the extra that it needs is installed. Default: true.
    """

    def __init__(self, report: bool = True) -> None:
        self._report = report
        self._started = 0.0
        self._batch_tokens = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._batch_tokens:
            return
        self._batch_tokens = (
            batch["input_ids"].numel() * batches_side_by_side(trainer) * trainer.accumulate_grad_batches
        )
        parameters = sum(parameter.numel() for parameter in pl_module.parameters())
        optimizers = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
        line = f"{parameters:,} parameters · {optimizers} · {self._batch_tokens:,} tokens per step"
        if trainer.max_steps > 0:
            line += f" · {trainer.max_steps:,} steps · {quantity(trainer.max_steps * self._batch_tokens)} tokens"
        _print(line)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        names = ("val/loss", "val/perplexity", "val/bits_per_byte")
        reached = [f"{name} {values[name]:.4g}" for name in names if name in values]
        tokens = sum(throughput.tokens for throughput in callbacks(trainer, Throughput))
        _print(
            f"Reached  {', '.join(reached) or 'no validation'} after {quantity(tokens)} tokens, "
            f"{trainer.global_step:,} steps, {duration(time.monotonic() - self._started)}."
        )
        for checkpoint in callbacks(trainer, ModelCheckpoint):
            if path := checkpoint.best_model_path or checkpoint.last_model_path:
                _print(f"Weights  {path}")
        if trainer.log_dir:
            _print(f"Logs     {trainer.log_dir}  (metrics.csv; or: tensorboard --logdir {trainer.log_dir})")
        if self._report:
            _write_report(trainer)


@rank_zero_only
def _print(line: str) -> None:
    Console(soft_wrap=True).print(line, highlight=False, markup=False)


@rank_zero_only
def _write_report(trainer: Trainer) -> None:
    """The page of this run; whatever is in its way is one line, for the run itself has ended well."""
    for logger in trainer.loggers:
        logger.save()  # Lightning does so after this hook
    folder = Path(trainer.log_dir or "")
    if not trainer.log_dir or not (folder / LOG).is_file():
        return
    if not installed():
        _print(f"Report   {EXTRA}, then: python -m lightning_multinorm report {folder}")
        return
    try:
        write_report(open_runs([folder]), folder / "report.html", figures=False)
        _print(f"Report   {folder / 'report.html'}")
    except Exception as error:
        rank_zero_warn(f"No report was written of {folder}: {' '.join(str(error).split())}")
