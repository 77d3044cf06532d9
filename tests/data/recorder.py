"""A model of one number that notes its batches, and Trainers that print nothing."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_multinorm.data import TextDataModule
from lightning_multinorm.data.packing import IGNORED


class Recorder(LightningModule):
    """Notes the inputs of each batch it sees; stops with an error before step `fail_at`."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[list[int]]] = []
        self.fail_at = fail_at

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        if len(self.seen) == self.fail_at:
            raise RuntimeError("power cut")
        self.seen.append(batch["input_ids"].tolist())
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("tokens", (batch["labels"] != IGNORED).sum().float(), reduce_fx="sum")

    test_step = validation_step

    def predict_step(self, batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(folder: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"accelerator": "cpu", "devices": 1, "limit_val_batches": 0, "enable_checkpointing": False}
    return Trainer(default_root_dir=folder, **{**quiet, **defaults, **options})


def train(
    folder: Path, data: TextDataModule, ckpt: Path | None = None, fail_at: int | None = None, **options: Any
) -> Any:
    model = Recorder(fail_at)
    trainer = make_trainer(folder, **options)
    trainer.fit(model, data, ckpt_path=ckpt)
    return model, trainer


def checkpoint_each_step(folder: Path) -> dict[str, Any]:
    callback = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)
    return {"callbacks": [callback], "enable_checkpointing": True}
