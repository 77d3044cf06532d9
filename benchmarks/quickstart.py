"""The quickstart with every optimizer: same data, seed and number of tokens, one learning rate after another.

``python -m benchmarks.quickstart [--seeds 1 2 3] [--only sinkgd adamw] [--set trainer.max_steps=100]``

Each run is the real command in a process of its own, one at a time. Prints a table, and writes the losses of every
validation and the machine into ``benchmarks/results/quickstart.json``.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe

RESULTS = Path(__file__).parent / "results" / "quickstart.json"
RATES = {
    "sinkgd": [0.01, 0.04],
    "adamw": [1e-3, 2e-3, 3e-3, 5e-3],
    "swan": [0.02],
    "multinorm": [0.02],
    "sgd": [0.1, 0.5],
}


def run(optimizer: str, lr: float | None, seed: int, settings: list[str]) -> dict[str, Any]:
    """One training run; lr None is the configuration as it is packaged."""
    command = [sys.executable, "-m", "lightning_multinorm", "fit", "--config", "quickstart.yaml"]
    if lr is not None:
        command += ["--config", f"optimizer/{optimizer}.yaml", "--model.optimizer.init_args.lr", str(lr)]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--run.root", folder, "--seed_everything", str(seed)]
        started = time.monotonic()
        subprocess.run([*command, *(f"--{setting}" for setting in settings)], check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        [metrics] = Path(folder).rglob("metrics.csv")
        with metrics.open() as file:
            rows = list(csv.DictReader(file))
    curve = [
        {"step": int(row["step"]) + 1, "loss": float(row["val/loss"]), "bits_per_byte": float(row["val/bits_per_byte"])}
        for row in rows
        if row.get("val/loss")
    ]
    tokens = max(float(row["tokens"]) for row in rows if row.get("tokens"))
    return {
        "optimizer": optimizer,
        "lr": lr,
        "seed": seed,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "loss": curve[-1]["loss"],
        "bits_per_byte": curve[-1]["bits_per_byte"],
        "validation": curve,
    }


def table(runs: list[dict[str, Any]]) -> Table:
    """Best first; the spread over seeds, where there are several."""
    view = Table("optimizer", "lr", "val loss (nats/token)", "bits/byte", "runs", title="Quickstart, end of training")
    cells: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for result in runs:
        cells.setdefault((result["optimizer"], result["lr"]), []).append(result)

    def mean(results: list[dict[str, Any]], key: str) -> float:
        return sum(result[key] for result in results) / len(results)

    for (optimizer, lr), results in sorted(cells.items(), key=lambda cell: mean(cell[1], "loss")):
        losses = [result["loss"] for result in results]
        spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
        rate = "as packaged" if lr is None else f"{lr:g}"
        loss, bits = f"{mean(results, 'loss'):.3f}{spread}", f"{mean(results, 'bits_per_byte'):.3f}"
        view.add_row(optimizer, rate, loss, bits, str(len(results)))
    return view


def main() -> None:
    """Parse the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="options of every run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    plan: list[tuple[str, float | None]] = [("quickstart", None)]
    plan += [(optimizer, lr) for optimizer in options.only for lr in RATES[optimizer]]
    runs = []
    for seed in options.seeds:
        for optimizer, lr in plan:
            runs.append(run(optimizer, lr, seed, options.set))
            print(f"{optimizer:10} lr {lr} seed {seed}: {runs[-1]['loss']:.4f} nats/token, {runs[-1]['seconds']} s")
            result = {"machine": describe(), "settings": options.set, "runs": runs}
            options.out.parent.mkdir(exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(table(runs))


if __name__ == "__main__":
    main()
