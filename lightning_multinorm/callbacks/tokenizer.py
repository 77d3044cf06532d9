"""Keeps the tokenizer of a run beside its checkpoints."""

from functools import partial
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_multinorm.callbacks.throughput import callbacks
from lightning_multinorm.checkpoints.ranks import together
from lightning_multinorm.data import TextDataModule
from lightning_multinorm.data.kept import keep_tokenizer


class RunTokenizer(Callback):
    """Saves the tokenizer of a `TextDataModule` when training starts, for `generate` and `export` to find.

    Raises:
        UsageError: if the checkpoints would lie among those of another tokenizer.
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, TextDataModule):
            return
        run = Path(trainer.log_dir) if trainer.loggers and trainer.log_dir else None
        for folder in {str(checkpoint.dirpath) for checkpoint in callbacks(trainer, ModelCheckpoint)}:
            if "://" in folder:
                rank_zero_info(f"The tokenizer is not kept in {folder}; generate and export will need --tokenizer.")
                continue
            together(partial(self._keep, trainer, data, Path(folder), run))

    @staticmethod
    def _keep(trainer: Trainer, data: TextDataModule, folder: Path, run: Path | None) -> None:
        if trainer.is_global_zero:
            keep_tokenizer(data.tokenizer, folder, run)
