"""Observers get a parameter and its trace: residuals as recomputed in float64 from gradient and update alone."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_multinorm import SWAN, MultiNormGD, SinkGD, alternating
from lightning_multinorm.norms import ColumnNorm, Norm, RowNorm, SpectralNorm
from lightning_multinorm.optim.observation import STATISTICS, Observation
from lightning_multinorm.sinkhorn import cpu, eager
from lightning_multinorm.sinkhorn.tracing import weight_squares

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
    "sinkgd_eager": (
        lambda params: SinkGD(params, iterations=_L, kernel="eager"),
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
    seen: list[tuple[Tensor, Observation]] = []
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
    traces: list[Observation] = []
    optimizer.observers.append(lambda _, trace: traces.append(trace))
    optimizer.step()
    squares = torch.stack([expected(matrix) for matrix in G]).square()
    assert_close(traces[0].residuals, squares.mean(0).sqrt(), rtol=1e-6, atol=1e-9)


def _statistics(G: Tensor, before: Tensor, after: Tensor) -> list[float]:
    """In float64, from gradient and weights alone; Hill's estimator as his paper has it."""
    G, before, after = G.double(), before.double(), after.double()
    rows = np.sort(G.norm(dim=1).numpy())[::-1]
    k = int(np.ceil(0.1 * len(rows)))
    tail = 1 / np.mean(np.log(rows[:k]) - np.log(rows[k]))
    change = (after - before).norm()
    zeros = [(G.abs().sum(dim) == 0).sum().item() for dim in (1, 0)]
    rms, ratio = change / G.numel() ** 0.5, change / before.norm()
    return [G.norm().item(), float(tail), *zeros, rms.item(), ratio.item()]


@cases
@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float64, 1.0), (torch.float32, 1.0), (torch.float32, 1e-25), (torch.float32, 1e25)]
)
def test_statistics_are_those_of_gradient_and_change(
    make: Callable[..., Any],
    norms: tuple[str, ...],
    expected: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    scale: float,
) -> None:
    W = nn.Parameter(torch.randn(24, 15, dtype=dtype) / 10)
    G = torch.randn(24, 15, dtype=torch.float64) * torch.randn(24, 1, dtype=torch.float64).exp()
    G[[3, 7]], G[:, 2] = 0, 0
    W.grad = (G * scale).to(dtype)
    optimizer = make([("w", W)])
    seen: list[Tensor] = []
    optimizer.observers.append(lambda _, observation: seen.append(observation.statistics))
    before = W.detach().clone()
    optimizer.step()
    assert len(seen[0]) == len(STATISTICS)
    wanted = torch.tensor(_statistics(W.grad, before, W.detach()), dtype=torch.float32)
    assert wanted[2:4].tolist() == [2, 1]
    assert_close(seen[0], wanted, rtol=1e-4, atol=0)


def test_statistics_of_several_matrices_in_one_parameter() -> None:
    W, G = torch.randn(3, 20, 8) / 10, torch.randn(3, 20, 8) * torch.randn(3, 20, 1).exp()
    G[1, 4], G[2, :, :2] = 0, 0
    parameter = nn.Parameter(W.clone())
    parameter.grad = G.clone()
    optimizer = SinkGD([{"params": [("w", parameter)], "rule": "multinorm", "view": "batch", "name": "w"}])
    seen: list[Tensor] = []
    optimizer.observers.append(lambda _, observation: seen.append(observation.statistics))
    optimizer.step()
    parts = [_statistics(*matrices) for matrices in zip(G, W, parameter.detach(), strict=True)]
    norms, tails, rows, columns, _, _ = zip(*parts, strict=True)
    change = (parameter.detach() - W).double()
    wanted = [
        np.linalg.norm(norms), len(tails) / sum(1 / tail for tail in tails), sum(rows), sum(columns),
        change.square().mean().sqrt(), change.norm() / W.norm(),
    ]  # fmt: skip
    assert_close(seen[0], torch.tensor([float(x) for x in wanted]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(24, 15), (2, 1), (1, 9), (9, 1), (600, 40), (3, 24, 15)], ids=str)
@pytest.mark.parametrize("alive", [1.0, 0.08, 0.0], ids=["all rows", "fewer rows than the tail", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_kernels_statistics_are_those_of_plain_pytorch(
    shape: tuple[int, ...], alive: float, dtype: torch.dtype, threads: int
) -> None:
    W, G = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    G[..., math.ceil(alive * shape[-2]) :, :] = 0
    told = {}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)  # a matrix for each thread, or panels of one
        for kernel in ("auto", "eager"):
            weight = nn.Parameter(W.clone())
            weight.grad = G.clone()
            optimizer = SinkGD([{"params": [("w", weight)], "rule": "multinorm"}], kernel=kernel)  # type: ignore[arg-type]
            optimizer.observers.append(lambda _, seen, kernel=kernel: told.update({kernel: seen.statistics}))
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    assert_close(told["auto"], told["eager"], rtol=1e-5, atol=0)


def test_squares_of_a_large_weight_are_not_added_up_in_float32() -> None:
    W = torch.randn(1024, 4096)
    assert_close(weight_squares([W])[0].double(), W.double().square().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("exponent", "tolerance"), [(2.0, 0.35), (6.0, 1.0)])
def test_the_tail_index_finds_the_exponent_of_a_power_law(exponent: float, tolerance: float) -> None:
    W, rows = nn.Parameter(torch.zeros(4096, 4)), torch.rand(4096, 1).clamp(min=1e-4) ** (-1 / exponent)
    W.grad = rows * torch.nn.functional.normalize(torch.randn(4096, 4), dim=1)
    optimizer = SinkGD([("w", W)])
    seen: list[Tensor] = []
    optimizer.observers.append(lambda _, observation: seen.append(observation.statistics))
    optimizer.step()
    assert abs(seen[0][STATISTICS.index("tail_index")].item() - exponent) < tolerance
    assert seen[0][STATISTICS.index("update_to_weight")] == 0  # of a weight that was zero


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
    monkeypatch.delattr(cpu, "update_all_")
    monkeypatch.setattr(alternating, "Trace", forbidden)
    model = TinyText()
    optimizer = make(model.named_parameters())
    backward(model, 0)
    optimizer.step()
    optimizer.observers.append(lambda parameter, trace: None)
    with pytest.raises(AssertionError, match="a residual was computed"):
        optimizer.step()
