"""From the runs of a study to its answer: what each row needed to come to where each target ended."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np

from benchmarks.tokens_to_loss.plan import Known, Result, at_edge, best_rate, compared, job, rates
from benchmarks.tokens_to_loss.protocol import Optimizer, Protocol
from lightning_multinorm.report.comparison import first_step_at
from lightning_multinorm.report.runs import Series

Shares = list[float | None]


@dataclass(frozen=True)
class Reached:
    """How a row came to the final losses of a target, seed by seed; None for a seed where it did not.

    Attributes:
        along: tokens along the run of the full budget, over all tokens of the target's.
        own: tokens of the shortest budget whose own schedule ends no higher, likewise.
        along_seconds: seconds of training along the run, over all of the target's.
        own_seconds: of the shortest budget, likewise.
    """

    along: Shares
    own: Shares
    along_seconds: Shares
    own_seconds: Shares


@dataclass(frozen=True)
class Row:
    """What is known of an optimizer; losses and all that follows are empty before its tuning has ended.

    Attributes:
        name: of the row.
        tuning: final loss by learning rate on the first seed; infinite where the run failed.
        lr: the tuned rate.
        at_edge: whether that is the lowest or highest tried, so that a better one may lie beyond.
        complete: whether all of its runs were made.
        losses: final ones, seed by seed, infinite where a run failed.
        bits_per_byte: likewise, of those that did not fail.
        budgets: final losses by fraction, seed by seed.
        seconds: of training, mean over the seeds.
        state_mib: of the optimizer.
        failures: runs that failed, with the reason.
        reached: by target, as far as both have all their seeds.
        results: of the compared runs of the full budget, seed by seed.
    """

    name: str
    tuning: dict[float, float]
    lr: float | None
    at_edge: bool
    complete: bool
    losses: list[float]
    bits_per_byte: list[float]
    budgets: dict[float, list[float]]
    seconds: float | None
    state_mib: float | None
    failures: dict[str, str]
    reached: dict[str, Reached]
    results: list[Result]


def summarise(protocol: Protocol, known: Known) -> list[Row]:
    """The rows of which any run is known, the lowest final loss first, those not yet tuned last."""
    full = {row.name: _full_budget(protocol, row, known) for row in protocol.optimizers.values()}
    rows = [_row(protocol, optimizer, known, full) for optimizer in protocol.optimizers.values()]
    rows = [row for row in rows if row.tuning]
    return sorted(rows, key=lambda row: (not row.losses, mean(row.losses) if row.losses else 0.0))


def _full_budget(protocol: Protocol, optimizer: Optimizer, known: Known) -> list[Result]:
    lr = best_rate(protocol, optimizer, known)
    if lr is None:
        return []
    runs = [known.get(job(protocol, optimizer, lr, seed).name) for seed in protocol.seeds]
    return [run for run in runs if run is not None]


def _row(protocol: Protocol, optimizer: Optimizer, known: Known, full: dict[str, list[Result]]) -> Row:
    tried = {lr: run for lr, run in rates(protocol, optimizer, known).items() if run is not None}
    lr, runs = best_rate(protocol, optimizer, known), full[optimizer.name]
    jobs = [] if lr is None else compared(protocol, optimizer, lr)
    made = {job.name: known[job.name] for job in jobs if job.name in known}
    budgets: dict[float, list[Result]] = {}
    for result in made.values():
        budgets.setdefault(result.fraction, []).append(result)
    states = [
        run.measured["optimizer_state_mib"] for run in runs if run.measured.get("optimizer_state_mib") is not None
    ]
    whole = [run for run in runs if run.failure is None]
    return Row(
        name=optimizer.name,
        tuning={rate: run.final for rate, run in tried.items()},
        lr=lr,
        at_edge=lr is not None and at_edge(tried, lr),
        complete=lr is not None and len(made) == len(jobs),
        losses=[run.final for run in runs],
        bits_per_byte=[run.validation["bits_per_byte"][-1] for run in whole if run.validation["bits_per_byte"]],
        budgets={fraction: [run.final for run in results] for fraction, results in sorted(budgets.items())},
        seconds=mean(run.validation["seconds"][-1] for run in whole) if whole else None,
        state_mib=max(states) if states else None,
        failures={run.label: run.failure for run in (*tried.values(), *made.values()) if run.failure is not None},
        reached={
            target: _reached(protocol, runs, list(made.values()), full[target])
            for target in protocol.targets
            if len(runs) == len(full[target]) == len(protocol.seeds)
        },
        results=runs,
    )


def _reached(protocol: Protocol, runs: list[Result], made: list[Result], targets: list[Result]) -> Reached:
    reached = Reached([], [], [], [])
    for run, target in zip(runs, targets, strict=True):
        ends = {axis: target.validation[axis][-1] if target.validation[axis] else 0.0 for axis in ("tokens", "seconds")}
        shorter = [other for other in made if other.seed == run.seed and other.final <= target.final]
        first = min(shorter, key=lambda other: other.fraction, default=None)
        for axis, along, own in (
            ("tokens", reached.along, reached.own),
            ("seconds", reached.along_seconds, reached.own_seconds),
        ):
            at = along_curve(run, target.final, axis)
            along.append(_share(at, ends[axis], target))
            own.append(_share(None if first is None else first.validation[axis][-1], ends[axis], target))
    return reached


def _share(amount: float | None, whole: float, target: Result) -> float | None:
    """None, too, where the target itself has failed: anything reaches that."""
    return None if amount is None or target.failure is not None or whole <= 0 else amount / whole


def along_curve(run: Result, loss: float, axis: str) -> float | None:
    """Tokens or seconds at which a run's validation loss first is at a value, between two validations on a line."""
    if not run.validation[axis]:
        return None
    return first_step_at(Series(np.array(run.validation[axis]), np.array(run.validation["loss"])), loss)


def share_text(shares: Sequence[float | None]) -> str:
    """Mean over the seeds that came there, and how many that are if not all."""
    found = [share for share in shares if share is not None]
    if not shares:
        return "–"
    if not found:
        return "not within budget"
    some = "" if len(found) == len(shares) else f" ({len(found)} of {len(shares)} seeds)"
    return f"{mean(found):.2f}{some}"


def spread_text(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and the standard deviation where there are several."""
    if not values:
        return "–"
    if np.inf in values:
        return f"failed ({sum(value == np.inf for value in values)} of {len(values)} seeds)"
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
