"""Run by test_resume.py as a program: trains a small LLaMA under one strategy after another, and goes on.

Usage: python -m tests.distributed.resume FOLDER '[[DEVICES, [{"name": ..., "strategy": ..., ...}, ...]], ...]'
"""

import json
import os
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_multinorm import SWAN, LlamaPretraining, SinkGD, strategies
from lightning_multinorm.checkpoints.io import CheckpointFiles
from lightning_multinorm.schedules import WarmupCosine
from tests.distributed.forks import fork

STEPS, ROWS, LENGTH, VOCABULARY = 8, 4, 12, 51


class Numbered(Dataset[dict[str, Tensor]]):
    """Row k is drawn from seed k."""

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        tokens = torch.randint(VOCABULARY, (LENGTH + 1,), generator=torch.Generator().manual_seed(k))
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}

    def __len__(self) -> int:
        return STEPS * ROWS


class Rest(Sampler[int]):
    """A rank's share of the rows that no step has seen; every step sees the same rows, however many ranks there are."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        shares = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        start = self.trainer.global_step * ROWS
        return iter(range(start + shares["rank"], STEPS * ROWS, shares["num_replicas"]))

    def __len__(self) -> int:
        return STEPS * ROWS // (self.trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        shares = (self.trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]
        return DataLoader(Numbered(), ROWS // shares, sampler=Rest(self.trainer))


class Record(Callback):
    """Notes each step's loss."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *_: Any) -> None:
        loss = outputs["loss"].detach().clone()
        self.losses[trainer.global_step] = trainer.strategy.reduce(loss, reduce_op="mean").item()


def matrices_alone(groups: list[dict[str, Any]], lr: float) -> SinkGD:
    """No parameter keeps state: all but matrices stay as they are."""
    return SinkGD([group for group in groups if group["rule"] == "multinorm"], lr=lr)


OPTIMIZERS: dict[str, Any] = {
    "sinkgd": SinkGD,
    "swan": SWAN,
    "adamw": torch.optim.AdamW,
    "stateless": matrices_alone,
}


def train(
    folder: Path,
    devices: int,
    name: str,
    strategy: str,
    options: dict[str, Any] | None = None,
    optimizer: str = "sinkgd",
    precision: Any = "32-true",
    ckpt_path: str | None = None,
    background: bool = False,
) -> None:
    """One run; its losses by step go to ``name``.json, its checkpoints into the folder ``name``."""
    seed_everything(0, verbose=False)
    size = {
        "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": LENGTH,
    }  # fmt: skip
    record = Record()
    saving = ModelCheckpoint(folder / name, "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu", devices=devices, precision=precision, max_steps=STEPS, callbacks=[record, saving],
        strategy=strategy if options is None else getattr(strategies, strategy)(**options),
        logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        plugins=[CheckpointFiles(background)], use_distributed_sampler=False,
    )  # fmt: skip
    module = LlamaPretraining(
        None, size, optimizer=lambda groups: OPTIMIZERS[optimizer](groups, lr=0.01), scheduler=WarmupCosine
    )
    trainer.fit(module, Data(), ckpt_path=ckpt_path if ckpt_path is None else folder / ckpt_path)
    if trainer.is_global_zero:
        (folder / f"{name}.json").write_text(json.dumps(record.losses))


def rank_of(folder: Path, devices: int, runs: list[dict[str, Any]], port: int, rank: int) -> None:
    """What one of several ranks does, with the environment that torchrun gives it."""
    torch.set_num_threads(1)
    if devices > 1:
        places = {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": devices, "LOCAL_WORLD_SIZE": devices, "GROUP_RANK": 0}
        addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "resume"}
        os.environ.update({name: str(value) for name, value in (places | addresses).items()})
    for run in runs:
        train(folder, devices, **run)


def main(folder: Path, launches: list[tuple[int, list[dict[str, Any]]]]) -> None:
    """One launch after another; the first that fails ends with what its ranks have printed."""
    for devices, runs in launches:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        statuses = fork(devices, partial(rank_of, folder, devices, runs, port), folder)
        if any(statuses):
            logs = "\n".join((folder / f"{rank}.log").read_text()[-2000:] for rank in range(devices))
            sys.exit(f"{[run['name'] for run in runs]} ended with {statuses}:\n{logs}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
