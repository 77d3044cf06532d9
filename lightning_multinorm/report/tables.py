"""Tables of points for figures: thinned out, with every axis that training can be drawn over, as CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_multinorm.report.runs import Numbers, Run, Series

Row = tuple[str | float | int | None, ...]
AXES = ("tokens", "time", "step")
_UNITS = (("h", 3600.0), ("min", 60.0), ("s", 1.0))


@dataclass(frozen=True)
class Clock:
    """The unit that the times of a report are in.

    Attributes:
        unit: "s", "min" or "h".
        seconds: in one.
    """

    unit: str
    seconds: float


def clock(runs: Sequence[Run]) -> Clock:
    """The largest unit of which the longest run has two."""
    longest = max((run.last("seconds") or 0.0 for run in runs), default=0.0)
    return Clock(*next((unit for unit in _UNITS if longest >= 2 * unit[1]), _UNITS[-1]))


def points(run: Run, series: Series, clock: Clock, most: int, *labels: str | int) -> list[Row]:
    """Rows (tokens, time, step, value, then the labels) of a metric, ``most`` at most."""
    thin = thinned(series, most)
    tokens, seconds = run.at("tokens", thin.steps), run.at("seconds", thin.steps)
    nothing = [None] * len(thin.steps)
    columns: tuple[Iterable[float | None], ...] = (
        nothing if tokens is None else tokens,
        nothing if seconds is None else seconds / clock.seconds,
        thin.steps,
        thin.values,
    )
    return [(*row, *labels) for row in zip(*columns, strict=True)]


def thinned(series: Series, most: int) -> Series:
    """Means over so many neighbours that no more than ``most`` are left; the series itself where it is short."""
    count = len(series.steps)
    if count <= most:
        return series
    starts = np.unique(np.linspace(0, count, most, endpoint=False).astype(int))
    sizes = np.diff(np.append(starts, count))

    def means(x: Numbers) -> Numbers:
        return np.add.reduceat(x, starts) / sizes

    return Series(means(series.steps), means(series.values))


def as_csv(header: Sequence[str], rows: Iterable[Row]) -> str:
    """Text of a table, its numbers in five digits: a third of what it takes as JSON."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([f"{cell:.5g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    return text.getvalue()
