"""A training of the quickstart as the real command, and a table of several."""

import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.table import Table


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
