"""Runs as their logs tell them: metrics by step, and the configuration; read as far as they were written."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from lightning_multinorm.errors import UsageError

LOG = "metrics.csv"
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """A metric over training.

    Attributes:
        steps: optimizer steps, from 0, ascending; (n,).
        values: (n,).
    """

    steps: Numbers
    values: Numbers

    @property
    def last(self) -> float:
        """The newest value."""
        return float(self.values[-1])


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: that tells it from the other runs of a report.
        folder: of its log.
        metrics: by name.
        config: of the run, flattened: "trainer.max_steps" -> 400; empty where none was kept.
    """

    name: str
    folder: Path
    metrics: dict[str, Series]
    config: dict[str, Any]

    def last(self, metric: str) -> float | None:
        """A metric's newest value; None if it was not logged."""
        return self.metrics[metric].last if metric in self.metrics else None

    def at(self, metric: str, steps: Numbers) -> Numbers | None:
        """A metric that grows with training, at any steps; it goes on at both ends as it began and ended.

        Returns:
            Values, as many as steps; None if it was not logged.
        """
        if metric not in self.metrics:
            return None
        known, values = self.metrics[metric].steps, self.metrics[metric].values
        if len(known) == 1:  # as if from the first step on
            return values[0] * (steps + 1) / (known[0] + 1)
        found = np.interp(steps, known, values)
        rates = np.diff(values) / np.diff(known)
        before, after = steps < known[0], steps > known[-1]
        found[before] = np.maximum(values[0] + rates[0] * (steps[before] - known[0]), 0)
        found[after] = values[-1] + rates[-1] * (steps[after] - known[-1])
        return found


def open_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read runs, each with a name of its own: as much of its path as it takes.

    Args:
        paths: folders with a metrics.csv, or with folders version_N of which the newest that has one is taken.

    Raises:
        UsageError: for what is no run, cannot be read, or is named twice.
    """
    folders = [find_log(Path(path)) for path in paths]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UsageError(f"the run {folder} is named twice; name each once")
    return [
        Run(name, folder, read_metrics(folder / LOG), read_config(folder))
        for name, folder in zip(_names(folders), folders, strict=True)
    ]


def find_log(path: Path) -> Path:
    """The folder with the log of a run.

    Raises:
        UsageError: if there is none.
    """
    if path.name == LOG and path.is_file():
        path = path.parent
    if (path / LOG).is_file():
        return path.resolve()
    versions = [log.parent for log in path.glob(f"version_*/{LOG}")]
    if not versions:
        what = "holds no metrics.csv" if path.is_dir() else "is no folder" if path.exists() else "is not there"
        raise UsageError(f"{path} {what}; name a run's folder, as runs/quickstart/version_0 or runs/quickstart")
    return max(versions, key=_version).resolve()


def _version(folder: Path) -> int:
    number = folder.name.removeprefix("version_")
    return int(number) if number.isdecimal() else -1


def read_metrics(path: Path) -> dict[str, Series]:
    """Metrics by name. A last line that was cut off is left out; of two values of a step the later counts.

    Raises:
        UsageError: for a file that is no log of steps.
    """
    found: dict[str, dict[int, float]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(_whole_lines(file))
            header = next(rows, [])
            if header and "step" not in header:
                raise UsageError(f"{path} has no column step; it is no log of a run")
            step_column = header.index("step") if header else 0
            names = [None if name in ("step", "epoch") else name for name in header]
            for row in rows:
                if len(row) != len(header) or not row[step_column]:
                    continue
                step = int(float(row[step_column]))
                for name, cell in zip(names, row, strict=True):
                    if cell and name is not None:
                        found.setdefault(name, {})[step] = float(cell)
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} cannot be read as a log of steps and numbers: {error}") from None
    return {name: series for name, values in sorted(found.items()) if (series := _series(values)) is not None}


def _whole_lines(lines: Iterator[str]) -> Iterator[str]:
    """Without a last one that is still being written, or never was to its end."""
    return (line for line in lines if line.endswith("\n"))


def _series(values: dict[int, float]) -> Series | None:
    """In the order of steps, without what is no finite number."""
    steps = np.array(sorted(values), dtype=np.float64)
    ordered = np.array([values[int(step)] for step in steps], dtype=np.float64)
    finite = np.isfinite(ordered)
    return Series(steps[finite], ordered[finite]) if finite.any() else None


def read_config(folder: Path) -> dict[str, Any]:
    """The run's config.yaml, flattened; empty if there is none.

    Raises:
        UsageError: if it is no YAML.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        return dict(_flat(yaml.safe_load(path.read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif key:
        yield key, json.dumps(value) if isinstance(value, list | dict) else value


def _names(folders: Sequence[Path]) -> list[str]:
    """As many of the last parts of their paths as tell the runs apart, without the version where that is enough."""
    of_versions = [folder.parent if _version(folder) >= 0 else folder for folder in folders]
    for paths in (of_versions, folders):
        if len(set(paths)) == len(paths):
            counts = range(1, max(len(path.parts) for path in paths) + 1)
            named = (["/".join(path.parts[-count:]) for path in paths] for count in counts)
            return next(names for names in named if len(set(names)) == len(names))
    raise AssertionError("runs are named once each")
