"""Which runs a study still needs, given those it has: rates on the first seed, then the other seeds, then budgets."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from benchmarks.tokens_to_loss.protocol import Optimizer, Protocol
from lightning_multinorm.configurations import find_config


@dataclass(frozen=True)
class Job:
    """A run to make.

    Attributes:
        optimizer: name of its row.
        lr: learning rate.
        seed: of weights.
        fraction: of the full budget.
        steps: the same in optimizer steps.
        options: of the command line after ``fit`` that decide what is trained.
    """

    optimizer: str
    lr: float
    seed: int
    fraction: float
    steps: int
    options: tuple[str, ...]

    @property
    def key(self) -> str:
        """Of the options and of what the configurations say that they name, comments aside; not of the code.

        A change of the code does not void what was measured, which would make every commit cost hours; each result
        names the commit that it is of. To make a run anew, delete its result and its folder.
        """
        contents = [
            _content(find_config(value))
            for option, value in zip(self.options, self.options[1:], strict=False)
            if option == "--config"
        ]
        return hashlib.sha256(json.dumps([self.options, contents], sort_keys=True).encode()).hexdigest()[:8]

    @property
    def name(self) -> str:
        """Of its folder and its result."""
        return f"{self.optimizer}-{self.lr:g}-{self.seed}-{self.fraction:g}-{self.key}"


def _content(path: str) -> Any:
    return _parsed(path, os.stat(path).st_mtime_ns)


@lru_cache
def _parsed(path: str, changed: int) -> Any:
    """Parsing is slow, and asked for by the hundred."""
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Result:
    """A run that has ended.

    Attributes:
        optimizer, lr, seed, fraction, steps: of its `Job`.
        loss: of the validation at its end, nats per token; None if the run failed.
        failure: why; None if it did not.
        validation: columns "step", "tokens", "loss", "bits_per_byte" and "seconds" (of training), a row for each.
        train: columns "step" and "loss", thinned.
        measured: what else is to be known of it: wall time, state, threads, version, options and so on.
    """

    optimizer: str
    lr: float
    seed: int
    fraction: float
    steps: int
    loss: float | None
    failure: str | None
    validation: Mapping[str, list[float]]
    train: Mapping[str, list[float]]
    measured: Mapping[str, Any]

    @property
    def final(self) -> float:
        """The loss at the end; infinite for a run that failed."""
        return math.inf if self.loss is None else self.loss

    @property
    def label(self) -> str:
        """What it is called in words."""
        return f"{self.optimizer}, lr {self.lr:g}, seed {self.seed}, budget {self.fraction:g}"

    def text(self) -> str:
        """As JSON, a line for each attribute."""
        lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in asdict(self).items())
        return "{\n" + ",\n".join(lines) + "\n}\n"


Known = Mapping[str, Result]
"""Results by the names of their jobs."""


def job(protocol: Protocol, optimizer: Optimizer, lr: float, seed: int, fraction: float = 1.0) -> Job:
    """The run of a row at a rate, a seed and a budget."""
    steps = protocol.steps_of(fraction)
    options = [part for config in (*protocol.configs, *optimizer.configs) for part in ("--config", config)]
    values = {**(protocol.set or {}), **(optimizer.set or {}), **dict.fromkeys(optimizer.lr, lr)}
    values |= {"trainer.max_steps": steps, "seed_everything": seed}
    for name, value in values.items():
        options += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return Job(optimizer.name, lr, seed, fraction, steps, tuple(options))


def rates(protocol: Protocol, optimizer: Optimizer, known: Known) -> dict[float, Result | None]:
    """The rates to tune over, ascending, with their runs as far as they are known.

    If the best of all is at an edge of the grid, the grid is extended there by a step, and again; where every run
    failed, the lowest rate counts as the best.
    """

    def at(lr: float) -> Result | None:
        return known.get(job(protocol, optimizer, lr, protocol.seeds[0]).name)

    tried = {lr: at(lr) for lr in map(float, optimizer.grid)}
    for _ in range(protocol.max_extensions):
        if (best := _best(tried)) is None:
            break
        if best == min(tried):
            lr = best / protocol.grid_ratio
        elif best == max(tried):
            lr = best * protocol.grid_ratio
        else:
            break
        lr = float(f"{lr:.6g}")
        tried = dict(sorted({**tried, lr: at(lr)}.items()))
    return tried


def _best(tried: Mapping[float, Result | None]) -> float | None:
    """The rate with the lowest loss, of equal ones the lowest; None while any is unknown."""
    losses = {lr: result.final for lr, result in tried.items() if result is not None}
    return min(losses, key=lambda lr: (losses[lr], lr)) if len(losses) == len(tried) else None


def best_rate(protocol: Protocol, optimizer: Optimizer, known: Known) -> float | None:
    """The tuned rate; None before tuning has ended."""
    return _best(rates(protocol, optimizer, known))


def compared(protocol: Protocol, optimizer: Optimizer, lr: float) -> list[Job]:
    """The runs at the tuned rate: every seed at the full budget, then at the shorter ones."""
    fractions = (1.0, *sorted(protocol.budgets)) if optimizer.budgets else (1.0,)
    return [job(protocol, optimizer, lr, seed, fraction) for fraction in fractions for seed in protocol.seeds]


def wanted(protocol: Protocol, optimizer: Optimizer, known: Known) -> list[Job]:
    """The runs to make next, in this order and side by side; none once the row is complete."""
    tried = rates(protocol, optimizer, known)
    if missing := [job(protocol, optimizer, lr, protocol.seeds[0]) for lr, result in tried.items() if result is None]:
        return missing
    lr = _best(tried)
    assert lr is not None  # no rate is missing
    return [job for job in compared(protocol, optimizer, lr) if job.name not in known]


def read(folder: Path) -> dict[str, Result]:
    """The results that lie in a folder, by name."""
    return {path.stem: Result(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))}


def at_edge(optimizer_rates: Iterable[float], lr: float) -> bool:
    """Whether a rate is the lowest or the highest of those that were tried."""
    tried = list(optimizer_rates)
    return lr in (min(tried), max(tried))
