"""Run by test_ranks.py as a program: two processes train, resume and validate, and each writes down what it saw."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_multinorm.callbacks import LossSpikes
from lightning_multinorm.callbacks.spikes import FILE
from lightning_multinorm.data import TextDataModule
from lightning_multinorm.strategies import end_communication


class Recorder(LightningModule):
    """Notes the inputs of each training batch and counts the labels of validation batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[list[int]]] = []
        self.labels: list[int] = []
        self.batches = 0

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.seen.append(batch["input_ids"].tolist())
        return self.weight.sum() + self.global_rank

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.batches += 1
        self.labels += batch["labels"][batch["labels"] >= 0].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(folder: Path, source: str) -> dict[str, Any]:
    def make(**options: Any) -> tuple[Trainer, TextDataModule]:
        data = TextDataModule(source, vocab_size=300, sequence_length=16, batch_size=4, validation_fraction=0.1)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        shared = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_steps": 4, "default_root_dir": folder}
        return Trainer(**{**quiet, **shared, **options}), data

    whole, rest, validated = Recorder(), Recorder(), Recorder()
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)
    spikes = LossSpikes()
    spikes.load_state_dict({"steps": 100, "expected": -1.0, "deviation": 0.0})  # each step is a spike
    trainer, data = make(callbacks=[saving, spikes], limit_val_batches=0, logger=CSVLogger(folder))
    trainer.fit(whole, data)
    lines = [json.loads(line) for line in (Path(trainer.log_dir or "") / FILE).read_text().splitlines()]
    other = 1 - trainer.global_rank
    positions = [entry["position"] for line in lines for entry in line["batches"] if entry["rank"] == other]
    replayed = [data.replay(position)["input_ids"].tolist() for position in positions]
    trainer, data = make(enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(rest, data, ckpt_path=folder / "step=2.ckpt")
    trainer, data = make(enable_checkpointing=False)
    trainer.validate(validated, data, verbose=False)
    held_out = list(data.corpus.held_out.texts())
    return {
        "rank": trainer.global_rank,
        "whole": whole.seen,
        "others_replayed": replayed,
        "spike": lines[0],
        "rest": rest.seen,
        "labels": validated.labels,
        "batches": validated.batches,
        "expected_labels": data._vocabulary.stream(held_out).tolist(),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    result = run(folder, sys.argv[2])
    (folder / f"rank{result['rank']}.json").write_text(json.dumps(result))
    end_communication()
