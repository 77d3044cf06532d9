"""Somebody else's Lightning project: convolutions and attention on scikit-learn's images of digits, trained by AdamW.

It knows nothing of lightning-multinorm. What it takes from there by two lines is in `digits_sinkgd.py`, what by
configuration alone in `shadow.yaml`.

python digits.py fit [--config shadow.yaml]
"""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Batch = list[Tensor]


class Digits(LightningModule):
    """A small vision transformer behind two convolutions; ten classes.

    Args:
        width: channels of the attention layers.
        optimizer: called with the parameters.
    """

    def __init__(
        self, width: int = 64, optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.patches = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, width, 2, stride=2), nn.Flatten(2)
        )
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        layers = [nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True) for _ in range(2)]
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) for images (B, 1, 8, 8)."""
        tokens = self.patches(images).transpose(1, 2) + self.positions
        return self.head(self.blocks(tokens).mean(1))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        images, digits = batch
        loss = nn.functional.cross_entropy(self(images), digits)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Share of digits that are recognised."""
        images, digits = batch
        self.log("val/accuracy", (self(images).argmax(1) == digits).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As configured."""
        return self.optimizer(self.parameters())


class DigitsData(LightningDataModule):
    """1 797 images (1, 8, 8) with values from 0 to 1; every sixth is held out.

    Args:
        batch_size: images in a batch.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """They come with scikit-learn."""
        images, digits = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
        images, held_out = images.view(-1, 1, 8, 8).float() / 16, torch.arange(len(digits)) % 6 == 0
        self.train = TensorDataset(images[~held_out], digits[~held_out])
        self.val = TensorDataset(images[held_out], digits[held_out])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled."""
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Held out."""
        return DataLoader(self.val, 300)


if __name__ == "__main__":
    LightningCLI(
        Digits,
        DigitsData,
        trainer_defaults={"max_epochs": 10, "log_every_n_steps": 10},
        seed_everything_default=0,
        auto_configure_optimizers=False,
    )
