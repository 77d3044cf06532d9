"""A model whose steps depend on the random numbers they draw, on data that are always the same."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from parts import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Noisy(LightningModule):
    """Notes the loss of each step; torch, Python and NumPy all have a hand in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 1))
        self.losses: dict[int, float] = {}

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.layers(batch).square().mean() * (1 + random.random() + np.random.rand())
        self.losses[self.trainer.global_step] = loss.item()
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        """Nothing: how a validation can be broken off is what counts."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def same_batches(count: int) -> DataLoader[Any]:
    seeds = torch.Generator()  # what a loader draws for its workers is not drawn from the model's random numbers
    return DataLoader([torch.ones(8)] * count, batch_size=1, generator=seeds)  # type: ignore[arg-type]


def fit(folder: Path, ckpt: Path | None = None, batches: int = 12, **options: Any) -> tuple[Trainer, Noisy]:
    """12 micro-batches, with the random numbers of one seed."""
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    saving = any(isinstance(callback, ModelCheckpoint) for callback in options["callbacks"])
    run, model = trainer(folder, -1, max_epochs=1, enable_checkpointing=saving, **options), Noisy()
    run.fit(model, same_batches(batches), same_batches(3), ckpt_path=ckpt)
    return run, model
