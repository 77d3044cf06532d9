"""Streaming text for pretraining: sources, tokenizer, packing, loaders, and the LightningDataModule over them."""

from lightning_multinorm.data.datamodule import TextDataModule as TextDataModule
from lightning_multinorm.data.errors import DataError as DataError
