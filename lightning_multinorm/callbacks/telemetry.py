"""From what optimizers tell of their updates to named numbers: by parameter, by layer and by kind of matrix."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

from lightning_multinorm.optim.observation import STATISTICS, Observation
from lightning_multinorm.parameter_names import kind_of, layer_of

_OF_UPDATES = ("update_rms", "update_to_weight")
_Columns = Callable[[str, int], list[tuple[str, int]]]
"""A parameter's name and number of iterations to the columns of a map, each with an iteration from 0."""


class _Plan(NamedTuple):
    """Where the numbers of a step lie, once they are one after another: kept, since names are the same every time."""

    values: dict[str, int]  # metric -> place
    means: dict[str, list[int]]  # metric -> places to take the root mean square of
    last: dict[str, list[int]]  # parameter -> places of its residuals after the last iteration
    counts: dict[str, int]  # parameter -> iterations


class Telemetry:
    """The metrics of the last step that was read.

    Args:
        per_iteration: also name the residuals after each iteration.
        updates: also name what is told of updates.
    """

    def __init__(self, per_iteration: bool, updates: bool) -> None:
        self.metrics: dict[str, float] = {}
        self._per_iteration, self._updates = per_iteration, updates
        self._plan, self._shape = _Plan({}, {}, {}, {}), ()  # type: tuple[_Plan, tuple[object, ...]]
        self._observed: dict[str, Observation] = {}
        self._values: list[float] = []

    def read(self, seen: Mapping[str, Observation], *, iterations: bool) -> dict[str, float]:
        """All numbers of a step, moved to the host in one piece.

        Args:
            seen: by the names of parameters.
            iterations: whether to name how many were made.
        """
        shape = (iterations, *((name, found.norms, len(found.residuals)) for name, found in seen.items()))
        if shape != self._shape:
            self._plan, self._shape = self._planned(seen), shape
        self._observed = dict(seen)
        self._values = values = _to_host([x for found in seen.values() for x in (found.residuals, found.statistics)])
        plan = self._plan
        self.metrics = {key: values[at] for key, at in plan.values.items()}
        for key, places in plan.means.items():
            self.metrics[key] = math.hypot(*[values[at] for at in places]) / math.sqrt(len(places))
        if iterations:
            self.metrics |= {f"iterations/{name}": float(count) for name, count in plan.counts.items()}
        return self.metrics

    @property
    def means(self) -> dict[str, float]:
        """Those of the metrics that are of layers and kinds."""
        return {key: self.metrics[key] for key in self._plan.means}

    def worst(self) -> dict[str, tuple[float, int]]:
        """Of each parameter: its largest residual after the last iteration, and how many that were."""
        found = {name: max(self._values[at] for at in places) for name, places in self._plan.last.items()}
        return {name: (residual, self._plan.counts[name]) for name, residual in found.items()}

    @staticmethod
    def title(name: str) -> str:
        """A parameter's name for people: "layer 3 o_proj"."""
        layer = layer_of(name)
        return name if layer is None else f"layer {layer} {kind_of(name)}"

    @property
    def norms(self) -> list[str]:
        """All that were observed, in order."""
        return list(dict.fromkeys(norm for found in self._observed.values() for norm in found.norms))

    def by_kind(self, norm: str) -> dict[tuple[str, str], float]:
        """Residuals after the last iteration by (layer, kind)."""
        return self._map(norm, lambda name, count: [(kind_of(name), count - 1)])

    def by_iteration(self, norm: str) -> dict[tuple[str, str], float]:
        """Residuals by (layer, iteration from 1)."""
        return self._map(norm, lambda name, count: [(str(k + 1), k) for k in range(count)])

    def _map(self, norm: str, columns: _Columns) -> dict[tuple[str, str], float]:
        """Root mean squares over the parameters that share a layer and a column."""
        squares: dict[tuple[str, str], list[float]] = {}
        for name, start, found in _places(self._observed):
            layer = layer_of(name)
            if layer is None or norm not in found.norms:
                continue
            for column, iteration in columns(name, len(found.residuals)):
                at = start + iteration * len(found.norms) + found.norms.index(norm)
                squares.setdefault((str(layer), column), []).append(self._values[at] ** 2)
        return {key: math.sqrt(sum(values) / len(values)) for key, values in squares.items()}

    def _planned(self, seen: Mapping[str, Observation]) -> _Plan:
        plan = _Plan({}, {}, {}, {})
        for name, start, found in _places(seen):
            layer, kind, count, width = layer_of(name), kind_of(name), len(found.residuals), len(found.norms)
            plan.counts[name] = count
            for k, norm in enumerate(found.norms):
                key, last = f"norm_convergence/{name}/{norm}", start + (count - 1) * width + k
                plan.values[key] = last
                plan.last.setdefault(name, []).append(last)
                plan.means.setdefault(f"norm_convergence_by_kind/{kind}/{norm}", []).append(last)
                if layer is not None:
                    plan.means.setdefault(f"norm_convergence_by_layer/{layer}/{norm}", []).append(last)
                if self._per_iteration:
                    plan.values.update({f"{key}/{i + 1}": start + i * width + k for i in range(count)})
            for k, statistic in enumerate(STATISTICS):
                if self._updates or statistic not in _OF_UPDATES:
                    plan.values[f"{statistic}/{name}"] = start + count * width + k
        return plan


def _places(seen: Mapping[str, Observation]) -> Iterator[tuple[str, int, Observation]]:
    """Each observation, and where its numbers begin."""
    start = 0
    for name, found in seen.items():
        yield name, start, found
        start += found.residuals.numel() + len(STATISTICS)


def _to_host(tensors: Iterable[torch.Tensor]) -> list[float]:
    """All entries, in order; one transfer for each device."""
    flat = [tensor.flatten() for tensor in tensors]
    if len({tensor.device for tensor in flat}) > 1:
        flat = [tensor.cpu() for tensor in flat]
    return torch.cat(flat).tolist()
