"""SinkGD, AdamW and Muon on the quickstart, baselines at the best rates of the study `nano`, as a report and pictures.

``python -m benchmarks.comparison [--root runs/comparison]``

Every run is the real command in a process of its own, one after another; one that is already complete in the root is
not made again. Writes the report into the root, the numbers of every run and the machine into
``benchmarks/results/comparison.json``, and the pictures of the README into ``docs/pictures``.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import describe
from lightning_multinorm.report.command import figures_folder, write_report
from lightning_multinorm.report.comparison import LOSS, compare
from lightning_multinorm.report.runs import Run, open_runs

ROOT = Path(__file__).parents[1]
RESULTS, PICTURES = ROOT / "benchmarks" / "results" / "comparison.json", ROOT / "docs" / "pictures"
_ADAMW, _MUON = (["--config", f"optimizer/{name}.yaml"] for name in ("adamw", "muon"))
_LR = "--model.optimizer.init_args.{}lr"
RUNS = {
    "sinkgd": [],
    "adamw": [*_ADAMW, _LR.format(""), "0.002"],
    "muon": [*_MUON, *(part for side in ("matrices", "rest") for part in (_LR.format(f"{side}.init_args."), "0.008"))],
    "auto": ["--model.optimizer.init_args.iterations", "auto"],
}
"""The first three are compared; ``auto`` is for its mean number of iterations."""
FIGURES = {
    "loss": "comparison",
    "norm_convergence_row_iterations_0": "norms_by_iteration",
    "norm_convergence_row_by_kind_0": "norms_by_kind",
}


def make(name: str, root: Path, steps: int) -> Run:
    """The run of a name, made unless it is complete in the root."""
    folder = root / name
    if not (folder.is_dir() and _steps(open_runs([folder])[0]) >= steps):
        command = [sys.executable, "-m", "lightning_multinorm", "fit", "--config", "quickstart.yaml"]
        options = ["--run.root", str(root), "--run.name", name, "--trainer.max_steps", str(steps)]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        subprocess.run([*command, *RUNS[name], *options], check=True, env={**os.environ, "PYTHONPATH": path})
    return open_runs([folder])[0]


def _steps(run: Run) -> float:
    return float(run.metrics[LOSS].steps[-1] + 1) if LOSS in run.metrics else 0


def numbers(run: Run) -> dict[str, Any]:
    """What the README may say of a run."""
    chosen = [series.values for name, series in run.metrics.items() if name.startswith("iterations/")]
    return {
        "name": run.name,
        "loss": run.last(LOSS),
        "bits_per_byte": run.last("val/bits_per_byte"),
        "tokens": run.last("tokens"),
        "seconds": run.last("seconds"),
        "optimizer_state_mib": run.last("memory/optimizer_state_mib"),
        "validation": dict(zip(run.metrics[LOSS].steps.tolist(), run.metrics[LOSS].values.tolist(), strict=True)),
        "mean_iterations": sum(map(float, (v.mean() for v in chosen))) / len(chosen) if chosen else None,
        "most_iterations": max(float(v.max()) for v in chosen) if chosen else None,
    }


def main() -> None:
    """Parse the command line, run what is missing, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    runs = [make(name, args.root, args.steps) for name in RUNS]
    compared = runs[:3]
    page = args.root / "report.html"
    write_report(compared, page)
    PICTURES.mkdir(exist_ok=True)
    for figure, picture in FIGURES.items():
        shutil.copy(figures_folder(page) / f"{figure}.png", PICTURES / f"{picture}.png")
    result = {
        "machine": describe(),
        "runs": [numbers(run) for run in runs],
        "reached": [asdict(found) for found in compare(compared, LOSS)],
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    Console().print_json(json.dumps(result["reached"]))


if __name__ == "__main__":
    main()
