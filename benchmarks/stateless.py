"""The quickstart under the policies: the papers' (Adam beside the matrices), stateless ones, and what came near.

``python -m benchmarks.stateless [--seeds 1 2 3] [--only paper stateless] [--set trainer.max_steps=100]``

Each run is the real command in a process of its own, one at a time. Prints a table, and writes "runs" into
``benchmarks/results/stateless_policy.json``, whose "screening" (what was tried on the way, by the same model and data
without Lightning around it) and runs of other policies and seeds it keeps.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import describe
from benchmarks.training import run, table

RESULTS = Path(__file__).parent / "results" / "stateless_policy.json"
POLICIES: dict[str, str | dict[str, str]] = {
    "paper": "paper",
    "stateless": "stateless",
    **{
        f"stateless, {label}": {**rules, "norm": "sign", "bias": "sign"}
        for label, rules in {
            "head by column": {"embedding": "row_power", "head": "column"},
            "head by row_power": {"embedding": "row_power", "head": "row_power"},
            "both by Sinkhorn": {"embedding": "multinorm", "head": "multinorm"},
        }.items()
    },
}


def run_policy(name: str, seed: int, settings: list[str]) -> dict[str, Any]:
    """One training run of the quickstart under a policy."""
    policy = POLICIES[name]
    option = f"model.policy={policy if isinstance(policy, str) else json.dumps(policy)}"
    return {**run("quickstart", None, seed, [option, *settings]), "optimizer": name, "policy": policy}


def main() -> None:
    """Parse the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="options of every run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    plan = [(name, seed) for seed in options.seeds for name in options.only]
    earlier = kept.get("runs", []) if kept.get("settings") == options.set else []
    runs = [result for result in earlier if (result["optimizer"], result["seed"]) not in plan]
    for name, seed in plan:
        runs.append(run_policy(name, seed, options.set))
        print(f"{name}, seed {seed}: {runs[-1]['loss']:.4f} nats/token, {runs[-1]['seconds']} s")
        options.out.parent.mkdir(exist_ok=True)
        result = {**kept, "machine": describe(), "settings": options.set, "runs": runs}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(table(runs))


if __name__ == "__main__":
    main()
