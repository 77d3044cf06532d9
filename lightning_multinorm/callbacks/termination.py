"""A checkpoint when the run is asked to end, as schedulers of clusters do some time before they kill it."""

import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_multinorm.errors import UsageError

EXIT_STATUS = 128 + signal.SIGTERM
"""143, what a shell reports of a process that SIGTERM has ended."""


class TerminationCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, which also saves when the process is sent SIGTERM, and ends it with status 143.

    Checkpoints of a step are saved once its values are logged, before the next batch: a run that is killed while it
    saves has then lost no line of its log. Asked to end, it ends there too, or after a batch of validation, on all
    ranks together, whichever of them got the signal. The checkpoint is ``last.ckpt`` where ``save_last`` is true, else
    ``stopped-step=N.ckpt``. More signals meanwhile change nothing. While it trains, this takes the place of other
    handlers of SIGTERM: Lightning's begins a collective call wherever the signal finds the process.

    A validation that was broken off is not made up for when the run goes on.

    With ``save_on_exception``, weights are not saved from within a step, where they may be half updated.

    Args:
        *args: `ModelCheckpoint`'s.
        **kwargs: `ModelCheckpoint`'s.
    """

    seconds = 0.0
    """Time that steps have been held up by saving."""
    _asked = False
    _step = 0
    _stepped = False
    _group: dist.ProcessGroup | None = None

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._listen(trainer)
        self._step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stepped |= trainer.global_step > self._step  # no checkpoint holds the gradients between micro-batches
        self._step = trainer.global_step

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        for counts in (progress.total, progress.current):
            counts.ready -= 1  # this batch is not to be counted in a checkpoint of the one before
        self._after_step(trainer, pl_module)
        for counts in (progress.total, progress.current):
            counts.ready += 1

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._after_step(trainer, pl_module)
        super().on_train_epoch_end(trainer, pl_module)

    def _after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._stepped:
            return
        self._stepped, started = False, time.perf_counter()
        super().on_train_batch_end(trainer, pl_module, None, None, 0)
        self._end_if_asked(trainer)
        self.seconds += time.perf_counter() - started

    @override
    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        for logger in trainer.loggers:
            logger.save()
        super()._save_checkpoint(trainer, filepath)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._end_if_asked(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException | UsageError):  # saved, or not to be saved
            return
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if self.save_on_exception and progress.started > progress.processed:
            rank_zero_warn(
                "The error came in the middle of a step: the weights may be half updated, and are not saved."
            )
            return
        super().on_exception(trainer, pl_module, exception)

    def _listen(self, trainer: Trainer) -> None:
        if trainer.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")  # agreeing must not wait for an accelerator
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: Any) -> None:
        self._asked = True

    def _end_if_asked(self, trainer: Trainer) -> None:
        asked = torch.tensor(self._asked, dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        if not asked:
            return
        if not trainer.sanity_checking and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = self._save_all(trainer)
            rank_zero_info(f"Asked to end (SIGTERM): step {trainer.global_step} is saved in {path}.")
        # A rank that Lightning has started must end well, or the first would be killed at once.
        environment = trainer.strategy.cluster_environment if trainer.world_size > 1 else None  # type: ignore[attr-defined]
        started = isinstance(environment, LightningEnvironment) and environment.local_rank() > 0
        raise SIGTERMException(0 if started else EXIT_STATUS)

    def _save_all(self, trainer: Trainer) -> str:
        metrics = self._monitor_candidates(trainer)
        if self.save_last is True and not self.save_weights_only:
            self._save_last_checkpoint(trainer, metrics)
            return self.last_model_path
        path = self.format_checkpoint_name(metrics, "stopped-{step}")
        trainer.save_checkpoint(path)
        return path
