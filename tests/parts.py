"""Small real parts for tests that train: a tiny LLaMA, rows of random tokens, a quiet trainer, a recording logger."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader, Dataset

from lightning_multinorm import LlamaPretraining

VOCABULARY, LENGTH = 64, 16
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}
Batch = dict[str, torch.Tensor]


def tiny_llama(**arguments: Any) -> LlamaPretraining:
    torch.manual_seed(1)
    return LlamaPretraining(size=None, config=TINY, **arguments)


class Rows(Dataset[Batch]):
    """Rows of a learnable language: the next token is the last one plus one or two. Two bytes a token."""

    def __init__(self, count: int = 64) -> None:
        generator = torch.Generator().manual_seed(2)
        steps = torch.randint(1, 3, (count, LENGTH + 1), generator=generator)
        self.tokens = steps.cumsum(-1) % VOCABULARY

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Batch:
        row = self.tokens[index]
        return {"input_ids": row[:-1], "labels": row[1:], "bytes": torch.tensor(2 * LENGTH)}


def loader(count: int = 64, batch_size: int = 4) -> DataLoader[Batch]:
    return DataLoader(Rows(count), batch_size=batch_size)


class Recorder(Logger):
    """Keeps what it is given: (step, metrics)."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.records.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Not needed here."""

    def values(self, key: str) -> dict[int | None, float]:
        """Of one metric, by step."""
        return {step: metrics[key] for step, metrics in self.records if key in metrics}

    def keys(self, prefix: str) -> Iterator[str]:
        """Metrics whose name begins with a prefix."""
        yield from {key for _, metrics in self.records for key in metrics if key.startswith(prefix)}


def trainer(folder: Path, steps: int, **arguments: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "val_check_interval": 1.0,
    }
    return Trainer(default_root_dir=folder, max_steps=steps, **{**defaults, **arguments})
