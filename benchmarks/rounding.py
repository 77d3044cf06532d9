"""Bfloat16 weights rounded to nearest and stochastically, beside float32, on the quickstart at several learning rates.

``python -m benchmarks.rounding [--rates 0.02 0.002 0.0005] [--steps 400]``

Each run is the real command in a process of its own. Prints a table, and writes the losses of every validation and the
machine into ``benchmarks/results/rounding.json``.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.training import run

RESULTS = Path(__file__).parent / "results" / "rounding.json"
NEAREST = "model.optimizer.init_args.stochastic_rounding=false"
KINDS = {
    "float32": ["trainer.precision=32-true"],
    "bfloat16, stochastic": ["trainer.precision=bf16-true"],
    "bfloat16, to nearest": ["trainer.precision=bf16-true", NEAREST],
}


def main() -> None:
    """Parse the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.02, 0.002, 0.0005])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    view = Table("lr", *KINDS, title=f"Quickstart, nats/token after {options.steps} steps")
    runs: list[dict[str, Any]] = []
    for rate in options.rates:
        row = []
        for kind, settings in KINDS.items():
            result = run("sinkgd", rate, options.seed, [f"trainer.max_steps={options.steps}", *settings])
            runs.append({"rounding": kind, **result})
            row.append(f"{result['loss']:.3f}")
            options.out.write_text(json.dumps({"machine": describe(), "runs": runs}, indent=1) + "\n")
        view.add_row(f"{rate:g}", *row)
    Console().print(view)


if __name__ == "__main__":
    main()
