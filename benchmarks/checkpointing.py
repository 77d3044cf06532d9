"""How long a checkpoint holds training up: written at once, and beside the training.

``python -m benchmarks.checkpointing [--model 60m] [--precision 32-true bf16-true] [--rounds 8] [--folder .]``

One run of `LlamaPretraining` under Lightning's own Trainer on the CPU, in periods of some steps: periods that begin
with no checkpoint, with one written at once, and with one written beside the training take turns. "Blocked" is how long
`Trainer.save_checkpoint` takes; "stall" is how much longer a whole period takes than the median one without, so that
steps slowed down by the writing count, too. Prints a table, and writes every period and the machine into
``benchmarks/results/checkpointing.json``.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from benchmarks.machine import describe
from benchmarks.memory import module
from lightning_multinorm.checkpoints.io import CheckpointFiles

RESULTS = Path(__file__).parent / "results" / "checkpointing.json"
KINDS = ("none", "at once", "beside")
TOKENS = 64


class Periods(Callback):
    """Begins each period with what its turn is, and notes how long the period takes, in seconds."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.files = {"at once": CheckpointFiles(), "beside": CheckpointFiles(asynchronous=True)}
        self.periods: list[dict[str, Any]] = []
        self.size = 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        step = trainer.global_step - 2  # the first two warm up
        if step < 0 or step % self.steps:
            return
        now = time.perf_counter()
        if self.periods:
            self.periods[-1]["seconds"] = now - self.periods[-1].pop("began")
        self.files["beside"].wait()
        late = time.perf_counter() - now
        if self.periods:
            self.periods[-1]["unfinished"] = late
            self.size = max(self.size, *(file.stat().st_size for file in self.folder.iterdir()), 0)
        kind = KINDS[step // self.steps % len(KINDS)]
        began = time.perf_counter()
        if kind != "none":
            trainer.strategy.checkpoint_io = self.files[kind]
            trainer.save_checkpoint(self.folder / "last.ckpt")
        self.periods.append({"kind": kind, "began": began, "blocked": time.perf_counter() - began})


def measure(model: str, precision: Any, steps: int, rounds: int, folder: Path) -> dict[str, Any]:
    """The periods of one run."""
    torch.manual_seed(0)
    lightning_module = module(model, "sinkgd")
    tokens = torch.randint(lightning_module.llama_config.vocab_size, (1, TOKENS))
    total = 2 + steps * len(KINDS) * rounds
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        periods = Periods(Path(scratch), steps)
        Trainer(
            accelerator="cpu",
            devices=1,
            precision=precision,
            max_steps=total,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[periods],
        ).fit(
            lightning_module,
            DataLoader([{"input_ids": tokens, "labels": tokens.roll(-1, dims=1)}] * total, batch_size=None),  # type: ignore[arg-type]
        )
    done = [period for period in periods.periods if "seconds" in period]
    return {"model": model, "precision": precision, "steps": steps, "bytes": periods.size, "periods": done}


def summary(run: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Medians in seconds, and the quartiles of the stall."""
    periods = {kind: [period for period in run["periods"] if period["kind"] == kind] for kind in KINDS}
    undisturbed = median(period["seconds"] for period in periods["none"])
    found = {}
    for kind in KINDS:
        stalls = sorted(period["seconds"] + period["unfinished"] - undisturbed for period in periods[kind])
        found[kind] = {
            "blocked": median(period["blocked"] for period in periods[kind]),
            "stall": median(stalls),
            "lower": stalls[len(stalls) // 4],
            "upper": stalls[-1 - len(stalls) // 4],
        }
    return found


def table(runs: list[dict[str, Any]]) -> Table:
    """One row for each way, and what share of a checkpoint at once it costs."""
    view = Table(
        "model", "precision", "MB", "checkpoint", "blocked (s)", "stall (s)", "quartiles", "share", box=SIMPLE_HEAD
    )
    for run in runs:
        found = summary(run)
        for kind in KINDS:
            row = found[kind]
            shares = [f"{row[key] / found['at once'][key]:.0%}" for key in ("blocked", "stall")]
            times = f"{row['blocked']:.3f}", f"{row['stall']:.3f}", f"{row['lower']:.3f} to {row['upper']:.3f}"
            share = "" if kind == "none" else " / ".join(shares)
            view.add_row(run["model"], run["precision"], f"{run['bytes'] / 1e6:.0f}", kind, *times, share)
    return view


def main() -> None:
    """Parse the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["tiny", "60m", "130m"], default="60m")
    parser.add_argument("--precision", nargs="+", default=["32-true", "bf16-true"])
    parser.add_argument("--steps", type=int, default=12, help="of a period")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to write to")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    runs = []
    for precision in options.precision:
        load = os.getloadavg()[0]
        runs.append(measure(options.model, precision, options.steps, options.rounds, options.folder))
        runs[-1] |= {"load_before": load, "threads": torch.get_num_threads()}
    Console().print(table(runs))
    for run in runs:
        run["summary"] = summary(run)
    options.out.write_text(json.dumps({"machine": describe(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
