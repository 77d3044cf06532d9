"""What watching the norms costs: steps with `NormConvergence` and steps without it, in turn, in one training.

``python -m benchmarks.telemetry [--model quickstart 60m] [--pairs 500]``

Lightning's own Trainer on the CPU, with the loggers of the command line (TensorBoard and CSV) and every step logged.
The callback observes and logs every second step; a step's time is from its start to the next step's, so that measuring,
moving to the host and logging all count. Prints a table, and writes every pair and the machine into
``benchmarks/results/telemetry.json``. Also checks the values that the last observed step logged against a recomputation
in float64 from the gradients of that step.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.machine import describe
from lightning_multinorm import LlamaPretraining, NormConvergence, multi_normalize
from lightning_multinorm.configurations import CONFIGS
from lightning_multinorm.norms import ColumnNorm, RowNorm

RESULTS = Path(__file__).parent / "results" / "telemetry.json"
_FLOOR = 1e-3  # residuals below are compared absolutely: rounding leaves 1e-7 of one that has converged
SIZES = {"quickstart": (16, 128), "60m": (4, 256)}


class Clock(Callback):
    """Notes when each step begins; keeps the gradients of one."""

    def __init__(self, keep: int) -> None:
        self.keep, self.starts = keep, list[float]()
        self.gradients: dict[str, Tensor] = {}

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append(time.perf_counter())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == self.keep:
            self.gradients = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}


def measure(model: str, pairs: int, per_iteration: bool) -> dict[str, Any]:
    """Seconds of steps with and without, in pairs, and the largest deviation of the residuals from float64."""
    torch.manual_seed(0)
    rows, length = SIZES[model]
    if model == "quickstart":
        fields = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())["model"]["config"]
        module = LlamaPretraining(size=None, config=fields)
    else:
        module = LlamaPretraining(size=model)  # type: ignore[arg-type]
    tokens = torch.randint(module.llama_config.vocab_size, (rows, length))
    batch = {"input_ids": tokens, "labels": tokens.roll(-1, dims=1)}
    steps = 2 * (pairs + 2) + 1
    clock, watch = Clock(steps - 1), NormConvergence(every_n_steps=2, per_iteration=per_iteration)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            log_every_n_steps=1,
            logger=[TensorBoardLogger(folder), CSVLogger(folder)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock, watch],
        ).fit(module, DataLoader([batch] * steps, batch_size=None))  # type: ignore[arg-type]
    times = [after - before for before, after in zip(clock.starts[4:-1], clock.starts[5:], strict=True)]
    return {
        "model": model,
        "batch": [rows, length],
        "per_iteration": per_iteration,
        "metrics": len(watch.metrics),
        "with": times[::2],
        "without": times[1::2],
        "largest_relative_deviation": deviation(watch.metrics, clock.gradients),
    }


def deviation(metrics: dict[str, float], gradients: dict[str, Tensor]) -> float:
    """The largest, of row residuals and gradient norms, from float64, as a share of the value + 0.001."""
    worst = 0.0
    for key, value in metrics.items():
        kind, _, name = key.partition("/")
        if kind == "gradient_norm":
            exact = gradients[name].double().norm().item()
        elif kind == "norm_convergence" and name.endswith("/row"):
            G = gradients[name.removesuffix("/row")].double()
            _, trace = multi_normalize(G, [RowNorm(), ColumnNorm()], 5, return_trace=True)
            exact = trace.residuals[-1, 0].item()
        else:
            continue
        worst = max(worst, abs(value - exact) / (exact + _FLOOR))
    return worst


def table(runs: list[dict[str, Any]]) -> Table:
    """One row for each run."""
    columns = ("model", "batch", "metrics a step", "step (ms)", "cost, median", "quartiles", "deviation from float64")
    view = Table(*columns, box=SIMPLE_HEAD)
    for run in runs:
        costs = [1e3 * (a - b) for a, b in zip(run["with"], run["without"], strict=True)]
        step = 1e3 * median(run["without"])
        low, middle, high = (f"{x:.2f} ms" for x in quantiles(costs, n=4))
        batch = " × ".join(map(str, run["batch"]))
        share = f"{median(costs) / step:.2%} ({middle})"
        told = f"{run['largest_relative_deviation']:.1e}"
        view.add_row(run["model"], batch, str(run["metrics"]), f"{step:.0f}", share, f"{low} to {high}", told)
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--pairs", type=int, default=500, help="of steps of the quickstart; a twentieth of the 60M")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    runs = [
        measure(model, args.pairs // (20 if model == "60m" else 1), detailed)
        for model in args.model
        for detailed in (False, True)
    ]
    Console(width=140).print(table(runs))
    args.out.write_text(json.dumps({"machine": describe(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
