"""The answer of a study as a table, in Markdown and as JSON."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.machine import describe
from benchmarks.tokens_to_loss.protocol import Protocol
from benchmarks.tokens_to_loss.summary import Row, share_text, spread_text


def columns(protocol: Protocol, row: Row) -> dict[str, str]:
    """A line of the table of results: heading -> cell."""
    edge = " (edge)" if row.at_edge else ""
    cells = {
        "optimizer": row.name + ("" if row.complete else " (incomplete)"),
        "lr": "–" if row.lr is None else f"{row.lr:g}{edge}",
        "val loss, nats/token": spread_text(row.losses),
        "bits/byte": spread_text(row.bits_per_byte),
    }
    for target in protocol.targets:
        reached = row.reached.get(target)
        cells[f"to {target}: along"] = share_text(reached.along if reached else [])
        cells[f"to {target}: own"] = share_text(reached.own if reached and len(row.budgets) > 1 else [])
        cells[f"to {target}: time"] = share_text(reached.along_seconds if reached else [])
    return {**cells, "state, MiB": "–" if row.state_mib is None else f"{row.state_mib:.2f}"}


def tuning(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """All rates that were tried, and how each ended."""
    return [
        (row.name, ", ".join(f"{lr:g}: {loss:.3f}" if loss < math.inf else f"{lr:g}: failed" for lr, loss in pairs))
        for row in rows
        if (pairs := sorted(row.tuning.items()))
    ]


def table(protocol: Protocol, rows: Sequence[Row]) -> Table:
    """For the console."""
    view = Table(title=f"{protocol.name}: {_size(protocol)}")
    for name in columns(protocol, rows[0]):
        view.add_column(name)
    for row in rows:
        view.add_row(*columns(protocol, row).values())
    return view


def tuning_table(rows: Sequence[Row]) -> Table:
    """For the console: final loss by learning rate."""
    view = Table("optimizer", "final loss by learning rate, first seed")
    for name, losses in tuning(rows):
        view.add_row(name, losses)
    return view


def write(protocol: Protocol, rows: Sequence[Row], folder: Path) -> None:
    """``<protocol>.json`` and ``<protocol>.md``."""
    content = {
        "protocol": asdict(protocol),
        "tokens_per_step": protocol.tokens_per_step,
        "machine": describe(),
        "commits": sorted({str(result.measured["commit"]) for row in rows for result in row.results}),
        "rows": [_entry(row) for row in rows],
    }
    (folder / f"{protocol.name}.json").write_text(json.dumps(_finite(content), indent=1) + "\n")
    (folder / f"{protocol.name}.md").write_text(markdown(protocol, rows))


def markdown(protocol: Protocol, rows: Sequence[Row]) -> str:
    """The table of results, what its columns mean, all rates, and what failed."""
    lines = [f"# Tokens to loss: {protocol.name}", "", f"{_size(protocol)}, by", ""]
    lines += [f"    python -m benchmarks.tokens_to_loss {protocol.name}", ""]
    if rows:
        lines += _markdown_table([columns(protocol, row) for row in rows])
    lines += ["", *_explanations(protocol), "", f"![Validation loss over tokens]({protocol.name}.png)", ""]
    lines += ["## Learning rates", "", "Final validation loss on the first seed; the lowest is compared.", ""]
    lines += _markdown_table([{"optimizer": name, "learning rate: loss": losses} for name, losses in tuning(rows)])
    failures = [f"- {where}: {why}" for row in rows for where, why in row.failures.items()]
    return "\n".join([*lines, *(["", "## Runs that failed", "", *failures] if failures else [])]) + "\n"


def _explanations(protocol: Protocol) -> list[str]:
    seeds, budgets = len(protocol.seeds), ", ".join(f"{budget:g}" for budget in (*protocol.budgets, 1.0))
    return [
        f"Means over {seeds} seed(s), ± standard deviation. *To X*: tokens until the validation loss with which the",
        "tuned X ended with the same seed, over X's tokens. *Along*: on the curve of the full budget, between two",
        "validations on a line. *Own*: of the shortest budget with a schedule of its own that ends no higher, out of",
        f"{budgets}; 1: the next shorter was not enough. *Time*: seconds of training *along* the",
        "curve, likewise, the first step's compilation included, beside other runs. *(edge)*: the best rate is",
        "the last that was tried. *State*: of the optimizer.",
    ]


def _markdown_table(lines: Sequence[dict[str, str]]) -> list[str]:
    if not lines:
        return []
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
    return [f"| {' | '.join(cells)} |" for cells in rows]


def _size(protocol: Protocol) -> str:
    tokens = f"{protocol.tokens_per_step:,} tokens ({protocol.steps * protocol.tokens_per_step / 1e6:.3g} million)"
    return f"{', '.join(protocol.configs)}, {protocol.steps} steps of {tokens}"


def _entry(row: Row) -> dict[str, Any]:
    return {key: value for key, value in asdict(row).items() if key != "results"}


def _finite(value: Any) -> Any:
    """JSON knows no infinity: null is a run that failed."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
