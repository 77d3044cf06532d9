"""What a run has done, written down while it does it: every batch of every rank, as exactly as it can be compared."""

import json
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


class Record(Callback):
    """Appends a line for each batch trained on to ``rankR.jsonl``: its number, its loss to the last bit, its rows.

    Args:
        folder: where the lines go; those of earlier attempts at the same run are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        line = {
            "process": os.getpid(),
            "step": trainer.global_step,
            "loss": outputs["loss"].item().hex(),
            "rows": batch["input_ids"].tolist(),
        }
        # One write of one line: a killed process leaves whole lines, but perhaps for the last.
        with (self.folder / f"rank{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
