"""Observers get a parameter and its trace: residuals as recomputed in float64 from gradient and update alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_multinorm import SWAN, MultiNormGD, SinkGD, alternating
from lightning_multinorm.alternating import Trace
from lightning_multinorm.norms import ColumnNorm, Norm, RowNorm, SpectralNorm
from lightning_multinorm.sinkhorn import cpu, eager

from . import reference
from .models import TEXT_MATRICES, TinyText, backward

_PROJECTIONS = {"row": reference.rows, "column": reference.columns, "spectral": reference.polar}
_L = 3


def _residuals(G: Tensor, steps: tuple[str, ...], measured: tuple[str, ...], iterations: int) -> Tensor:
    """(L, K): ‖X − P(X)‖_F / √(mn), by the textbook."""
    X, residuals = G.double().numpy(), []
    for _ in range(iterations):
        for step in steps:
            X = _PROJECTIONS[step](X)
        residuals.append([np.sqrt(((X - _PROJECTIONS[name](X)) ** 2).mean()) for name in measured])
    return torch.tensor(residuals)


def _swan_residuals(G: Tensor) -> Tensor:
    X = reference.frobenius(reference.newton_schulz(10, 0.8)(reference.rows(G.double().numpy())))
    return torch.tensor([[np.sqrt(((X - P(X)) ** 2).mean()) for P in (reference.rows, reference.polar)]])


_PAIR: list[Norm] = [RowNorm(), ColumnNorm()]
_MIXED: list[Norm] = [SpectralNorm(), RowNorm()]
_CASES: dict[str, tuple[Callable[..., Any], tuple[str, ...], Callable[[Tensor], Tensor]]] = {
    "sinkgd": (
        lambda params: SinkGD(params, iterations=_L),
        ("row", "column"),
        lambda G: _residuals(G, ("row", "column"), ("row", "column"), _L),
    ),
    "row_column": (
        lambda params: MultiNormGD(params, _PAIR, iterations=_L),
        ("row", "column"),
        lambda G: _residuals(G, ("row", "column"), ("row", "column"), _L),
    ),
    "spectral_row": (
        lambda params: MultiNormGD(params, _MIXED, iterations=_L),
        ("spectral", "row"),
        lambda G: _residuals(G, ("spectral", "row"), ("spectral", "row"), _L),
    ),
    "swan": (SWAN, ("row", "spectral"), _swan_residuals),
}
cases = pytest.mark.parametrize(("make", "norms", "expected"), _CASES.values(), ids=_CASES)


@cases
def test_every_matrix_is_observed_once_a_step_with_the_residuals_of_the_textbook(
    make: Callable[..., Any], norms: tuple[str, ...], expected: Callable[[Tensor], Tensor]
) -> None:
    model = TinyText().double()
    for name in TEXT_MATRICES:
        weight = model.get_parameter(name)
        weight.grad = torch.randn_like(weight) + torch.eye(*weight.shape, dtype=weight.dtype)
    optimizer = make(model.named_parameters())
    seen: list[tuple[Tensor, Trace]] = []
    twice: list[Tensor] = []
    optimizer.observers += [lambda *args: seen.append(args), lambda parameter, trace: twice.append(parameter)]
    optimizer.step()
    assert {id(p) for p, _ in seen} == {id(model.get_parameter(name)) for name in TEXT_MATRICES}
    assert [id(p) for p, _ in seen] == [id(p) for p in twice]
    assert len(seen) == len(TEXT_MATRICES)
    for parameter, trace in seen:
        assert parameter.grad is not None
        assert trace.norms == norms
        assert_close(trace.residuals, expected(parameter.grad), rtol=1e-7, atol=1e-7)


@cases
@pytest.mark.parametrize("view", ["batch", "qkv"])
def test_several_matrices_in_one_parameter_are_observed_by_their_root_mean_square(
    make: Callable[..., Any], norms: tuple[str, ...], expected: Callable[[Tensor], Tensor], view: str
) -> None:
    G = torch.randn(3, 5, 8, dtype=torch.float64)
    parameter = nn.Parameter(torch.zeros_like(G) if view == "batch" else torch.zeros(15, 8, dtype=torch.float64))
    parameter.grad = G.view_as(parameter).clone()
    optimizer = make([{"params": [("w", parameter)], "rule": "multinorm", "view": view, "name": "w"}])
    traces: list[Trace] = []
    optimizer.observers.append(lambda _, trace: traces.append(trace))
    optimizer.step()
    squares = torch.stack([expected(matrix) for matrix in G]).square()
    assert_close(traces[0].residuals, squares.mean(0).sqrt(), rtol=1e-6, atol=1e-9)


@cases
def test_observing_changes_no_bit_of_the_training(
    make: Callable[..., Any], norms: tuple[str, ...], expected: Callable[[Tensor], Tensor]
) -> None:
    model, twin = TinyText().bfloat16(), TinyText().bfloat16()
    twin.load_state_dict(model.state_dict())
    observed, plain = make(model.named_parameters()), make(twin.named_parameters())
    residuals: list[Tensor] = []
    observed.observers.append(lambda parameter, trace: residuals.append(trace.residuals))
    for step in range(3):
        for net, optimizer in ((model, observed), (twin, plain)):
            backward(net, step)
            optimizer.step()
    assert all(r.isfinite().all() and r.dtype is torch.float32 for r in residuals)
    assert len(residuals) == 3 * len(TEXT_MATRICES)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other)


@cases
def test_without_an_observer_no_trace_is_computed(
    make: Callable[..., Any],
    norms: tuple[str, ...],
    expected: Callable[[Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a residual was computed")

    monkeypatch.setattr(Norm, "residual", forbidden)
    monkeypatch.setattr(eager, "_squared_error", forbidden)
    monkeypatch.setattr(cpu, "update_", eager.update_)  # machine code cannot be patched
    monkeypatch.setattr(alternating, "Trace", forbidden)
    model = TinyText()
    optimizer = make(model.named_parameters())
    backward(model, 0)
    optimizer.step()
    optimizer.observers.append(lambda parameter, trace: None)
    with pytest.raises(AssertionError, match="a residual was computed"):
        optimizer.step()
