"""What SR-Sinkhorn would do to the gradients of a model that trains with any optimizer, without touching them."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_multinorm.layouts import FlatSlice, is_dtensor, local, locate
from lightning_multinorm.optim.observation import (
    Measured,
    Observation,
    observe_sharded,
    observe_whole,
    sharded_weight_squares,
)
from lightning_multinorm.scaling import working_dtype
from lightning_multinorm.sinkhorn import Tracing, scalings, select, sharded
from lightning_multinorm.sinkhorn.tracing import weight_squares
from lightning_multinorm.views import as_matrices

_NORMS = ("row", "column")


class Shadow:
    """Measures the parameters that a policy would multi-normalise.

    Args:
        groups: of `parameter_groups(model)`; those with the rule "multinorm" are looked at.
        iterations: L.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], iterations: int) -> None:
        self._iterations = iterations
        self._views: dict[Tensor, Any] = {}
        self._slices: dict[Tensor, FlatSlice] = {}
        for group in groups:
            if group["rule"] == "multinorm":
                self._views |= {parameter: group["view"] for _, parameter in group["params"]}
                self._slices |= group.get("slices", {})

    @torch.no_grad()
    def observe(self) -> Iterator[tuple[Tensor, Observation]]:
        """Of every parameter with a gradient, as if lr were 1; with sharded parameters a collective call."""
        spread: dict[tuple[Any, ...], list[Tensor]] = {}
        whole: dict[torch.device, list[tuple[Tensor, Measured]]] = {}
        for parameter, view in self._views.items():
            if parameter.grad is None:
                continue
            if is_dtensor(parameter) or parameter in self._slices:
                spread.setdefault((parameter.device, working_dtype(parameter)), []).append(parameter)
                continue
            _, _, found = scalings(as_matrices(parameter.grad, view, like=parameter), self._iterations, trace=True)
            assert found is not None
            residuals, rows, columns = (x.unsqueeze(0) for x in found.vectors)
            weights = weight_squares([as_matrices(parameter, view)])
            measured = Measured(_NORMS, residuals, rows, columns, weights=weights)
            whole.setdefault(parameter.device, []).append((parameter, measured))
        for pairs in whole.values():  # all at once: these are many operations on little data
            told = observe_whole([measured for _, measured in pairs], 1.0)
            yield from ((parameter, seen) for (parameter, _), seen in zip(pairs, told, strict=True))
        for parameters in spread.values():
            yield from zip(parameters, self._of_sharded(parameters), strict=True)

    def _of_sharded(self, parameters: list[Tensor]) -> list[Observation]:
        jobs = [
            sharded.Job(matrix, k, 1.0)
            for k, p in enumerate(parameters)
            for matrix in locate(p, _gradient(p), self._views[p], self._slices.get(p))
        ]
        like = local(parameters[0])
        dtypes = {x.dtype for job in jobs for piece in job.matrix.pieces for x in (piece.weight, piece.gradient)}
        passes = select.passes("auto", like.device, {*dtypes, like.dtype})
        found: Tracing = sharded.trace(jobs, self._iterations, passes, like)
        return observe_sharded(Measured(_NORMS, *found.vectors), jobs, sharded_weight_squares(jobs, like))


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
