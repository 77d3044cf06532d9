"""What a comparison of runs comes to: how soon one reached where another ended, and how they were configured apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_multinorm.report.runs import Numbers, Run, Series

LOSS, BITS = "val/loss", "val/bits_per_byte"


@dataclass(frozen=True)
class Reached:
    """How a run came to the value that another ended with.

    Attributes:
        run: its name.
        other: the other's name.
        target: the other's last value.
        tokens: of the run at that value, over those of the other at its end; None if it never came there, or tokens
            were not logged.
        seconds: likewise.
        best: the run's lowest value.
    """

    run: str
    other: str
    target: float
    tokens: float | None
    seconds: float | None
    best: float


def target_metric(runs: Sequence[Run]) -> str | None:
    """The metric that runs can be compared in: the loss a token, or where their tokens differ, bits a byte.

    Returns:
        Its name; None unless every run has it.
    """
    vocabularies = {tuple(str(run.config.get(f"data.{key}")) for key in ("tokenizer", "vocab_size")) for run in runs}
    metric = LOSS if len(vocabularies) <= 1 else BITS
    return metric if all(metric in run.metrics for run in runs) else None


def compare(runs: Sequence[Run], metric: str) -> list[Reached]:
    """Every run with every other's last value as its target."""
    found = []
    for run in runs:
        for other in runs:
            if run is not other:
                series, target = run.metrics[metric], other.metrics[metric].last
                step = first_step_at(series, target)
                tokens, seconds = (_ratio(run, other, metric, axis, step) for axis in ("tokens", "seconds"))
                found.append(Reached(run.name, other.name, target, tokens, seconds, float(series.values.min())))
    return found


def first_step_at(series: Series, target: float) -> float | None:
    """The step, between two values on a straight line, at which a falling metric first is at a target; else None."""
    below = np.flatnonzero(series.values <= target)
    if not len(below):
        return None
    after = int(below[0])
    if after == 0:
        return float(series.steps[0])
    (x0, x1), (y0, y1) = series.steps[after - 1 : after + 1], series.values[after - 1 : after + 1]
    return float(x0 + (x1 - x0) * (y0 - target) / (y0 - y1))


def _ratio(run: Run, other: Run, metric: str, axis: str, step: float | None) -> float | None:
    if step is None:
        return None
    own = run.at(axis, np.array([step]))
    whole: Numbers | None = other.at(axis, other.metrics[metric].steps[-1:])
    return None if own is None or whole is None or whole[0] <= 0 else float(own[0] / whole[0])


def differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Keys of the configurations with a value for each run, of those keys alone whose values differ.

    A key that a run has not got is ``None`` there, as null is: most often it is another class that has it.
    """
    configured = [run.config for run in runs if run.config]
    if len(configured) < 2:
        return []
    keys = list(dict.fromkeys(key for config in configured for key in config))
    rows = [(key, [run.config.get(key) for run in runs]) for key in keys]
    return [
        (key, values)
        for key, values in rows
        if len({repr(value) for value, run in zip(values, runs, strict=True) if run.config}) > 1
    ]
