"""Perplexity of documents, from what `LlamaPretraining.predict_step` returns."""

import csv
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from typing_extensions import override

from lightning_multinorm.errors import UsageError


class DocumentPerplexity(Callback):
    """Adds the rows of each document up, prints a table, and writes it as CSV if asked.

    Per document: tokens, UTF-8 bytes, nats per token, perplexity, bits per byte; and all of them together. Names come
    from the data module's ``predict_names``.

    Args:
        out: CSV file to write; an existing one is not overwritten. Default: none.
    """

    def __init__(self, out: Path | None = None) -> None:
        self.out = None if out is None else Path(out)
        self._sums: Tensor | None = None

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.out is not None and self.out.exists():
            raise UsageError(f"perplexity.out={self.out} exists; name another file, or move it away")
        documents = len(trainer.datamodule.predict_names)  # type: ignore[attr-defined]
        self._sums = torch.zeros(documents, 3, dtype=torch.float64)  # nats, tokens, bytes

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self._sums is not None
        rows = torch.stack([outputs[name].double().cpu() for name in ("nats", "tokens", "bytes")], dim=-1)
        documents = outputs["document"].cpu()
        own = documents >= 0  # the others fill up a rank's share
        self._sums.index_add_(0, documents[own], rows[own])

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._sums is not None
        sums = trainer.strategy.reduce(self._sums.to(pl_module.device), reduce_op="sum")
        if not trainer.is_global_zero:
            return
        names = [*trainer.datamodule.predict_names, "all"]  # type: ignore[attr-defined]
        assert isinstance(sums, Tensor)
        rows = [_row(name, *values) for name, values in zip(names, [*sums.tolist(), sums.sum(0).tolist()], strict=True)]
        table = Table("document", "tokens", "bytes", "nats/token", "perplexity", "bits/byte")
        for name, tokens, size, *rates in rows:
            table.add_row(name, f"{tokens:,}", f"{size:,}", *(f"{rate:.4g}" for rate in rates))
        Console().print(table)
        if self.out is not None:
            with self.out.open("x", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["document", "tokens", "bytes", "nats_per_token", "perplexity", "bits_per_byte"])
                writer.writerows(rows)


def _row(name: str, nats: float, tokens: float, size: float) -> tuple[str, int, int, float, float, float]:
    loss = nats / tokens if tokens else math.nan
    bits = nats / math.log(2) / size if size else math.nan
    return name, int(tokens), int(size), loss, math.exp(min(loss, 700)), bits
