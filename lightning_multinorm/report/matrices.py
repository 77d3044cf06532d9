"""What was logged of single matrices, gathered by layer and by kind."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from lightning_multinorm.parameter_names import kind_of, layer_of
from lightning_multinorm.report.runs import Numbers, Run, Series

RESIDUAL = "norm_convergence"
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # in which a block applies them
K = TypeVar("K", int, str, tuple[int, str])


@dataclass(frozen=True)
class Measure:
    """A quantity that is logged as ``PREFIX/<parameter>``, or ``norm_convergence/<parameter>/<norm>``.

    Attributes:
        prefix: of the metric's name.
        title: of a figure, which begins with it.
        axis: title of its axis.
        combine: "rms", "mean" or "sum" over the matrices of a layer or kind, or "norm", the root of the sum of squares.
        log: whether it spans powers of ten.
        norm: that a residual is of.
    """

    prefix: str
    title: str
    axis: str
    combine: str
    log: bool = False
    norm: str = ""

    @property
    def name(self) -> str:
        """For a file."""
        return "_".join(filter(None, (self.prefix, re.sub(r"\W+", "_", self.norm))))


MEASURES = (
    Measure("update_to_weight", "Update-to-weight ratio", "RMS of the update / RMS of the weight", "rms", log=True),
    Measure("gradient_norm", "Gradient norm", "Frobenius norm of the gradient", "norm", log=True),
    Measure("tail_index", "Tail index", "Tail index (mean over matrices)", "mean"),
    Measure("dead_rows", "Dead rows", "Rows of the gradient that are zero", "sum"),
    Measure("dead_columns", "Dead columns", "Columns of the gradient that are zero", "sum"),
    Measure("iterations", "Iterations", "Iterations until the tolerance (mean)", "mean"),
)

_COMBINE: Mapping[str, Callable[[Any, Any, Any], Numbers]] = {  # of sums, sums of squares and counts
    "rms": lambda sums, squares, counts: np.sqrt(squares / counts),
    "norm": lambda sums, squares, counts: np.sqrt(squares),
    "mean": lambda sums, squares, counts: sums / counts,
    "sum": lambda sums, squares, counts: sums,
}


def residual(norm: str) -> Measure:
    """The residual of a norm after the last iteration."""
    return Measure(RESIDUAL, f"Residual of the {norm} norm", f"Residual, {norm} (RMS)", "rms", log=True, norm=norm)


def place_of_kind(kind: str) -> tuple[int, str]:
    """Sorts kinds as a block of a LLaMA applies them; others come after, by name."""
    return (_ORDER.index(kind) if kind in _ORDER else len(_ORDER), kind)


def norms(run: Run) -> list[str]:
    """Whose residuals were logged."""
    parts = [name.split("/") for name in run.metrics if name.startswith((f"{RESIDUAL}/", f"{RESIDUAL}_by_"))]
    return sorted({part[2] for part in parts if len(part) > 2})


def by_parameter(run: Run, measure: Measure) -> dict[str, Series]:
    """What was logged of each matrix."""
    found = {}
    for name, series in run.metrics.items():
        prefix, _, rest = name.partition("/")
        parameter, _, norm = rest.partition("/")
        if prefix == measure.prefix and norm == measure.norm:
            found[parameter] = series
    return found


def by_layer(run: Run, measure: Measure) -> dict[int, Series]:
    """Combined over the matrices of a layer; as the run logged it itself, if it did."""
    own = by_parameter(run, Measure(f"{measure.prefix}_by_layer", "", "", measure.combine, norm=measure.norm))
    logged = {int(layer): series for layer, series in own.items() if layer.isdecimal()}
    return logged or _combined(
        ((layer_of(name), series) for name, series in by_parameter(run, measure).items()), measure
    )


def by_kind(run: Run, measure: Measure) -> dict[str, Series]:
    """Combined over the matrices of a kind; as the run logged it itself, if it did."""
    own = by_parameter(run, Measure(f"{measure.prefix}_by_kind", "", "", measure.combine, norm=measure.norm))
    kinds = ((kind_of(name), series) for name, series in by_parameter(run, measure).items())
    found = own or _combined(kinds, measure)
    return {kind: found[kind] for kind in sorted(found, key=place_of_kind)}


def last_by_layer_and_kind(run: Run, measure: Measure) -> dict[tuple[int, str], float]:
    """The newest values, combined over the matrices that are in one layer and of one kind."""
    places = ((layer_of(name), kind_of(name), series) for name, series in by_parameter(run, measure).items())
    placed = _combined((((layer, kind), series) for layer, kind, series in places if layer is not None), measure)
    return {place: series.last for place, series in placed.items()}


def last_by_iteration(run: Run, norm: str) -> dict[tuple[int, int], float]:
    """The newest residuals of layers after each iteration from 1; empty unless every iteration was logged."""
    found: dict[tuple[int, int], float] = {}
    iterations = {int(end) for name in run.metrics if (end := name.rpartition("/")[2]).isdecimal() and norm in name}
    for iteration in sorted(iterations):
        measure = Measure(RESIDUAL, "", "", "rms", norm=f"{norm}/{iteration}")
        found |= {(layer, iteration): series.last for layer, series in by_layer(run, measure).items()}
    return found


def _combined(series: Iterable[tuple[K | None, Series]], measure: Measure) -> dict[K, Series]:
    """Series with one key made one, over the steps that any of them has."""
    groups: dict[K, list[Series]] = {}
    for key, one in series:
        if key is not None:
            groups.setdefault(key, []).append(one)
    combined = {}
    for key in sorted(groups):
        steps, inverse = np.unique(np.concatenate([one.steps for one in groups[key]]), return_inverse=True)
        values = np.concatenate([one.values for one in groups[key]])
        sums = np.bincount(inverse, values)
        squares, counts = np.bincount(inverse, values**2), np.bincount(inverse)
        combined[key] = Series(steps, _COMBINE[measure.combine](sums, squares, counts))
    return combined
