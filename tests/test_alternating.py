"""MultiNorm against plain NumPy loops: iterates, traces, stopping, and the paper's convergence table."""

from collections.abc import Callable
from typing import Any, final

import numpy as np
import pytest
import torch
from reference.golden import Golden
from torch import Tensor
from torch.testing import assert_close

from lightning_multinorm import multi_normalize
from lightning_multinorm.norms import ColumnNorm, FrobeniusNorm, MaxNorm, Norm, RowNorm, SpectralNorm

_PAIR = (RowNorm(), ColumnNorm())


@final
class BlockNorm(Norm):
    """A user's own: the largest RMS of the left and the right half."""

    name = "halves"

    def value(self, matrix: Tensor) -> Tensor:
        return torch.stack([half.square().mean((-2, -1)).sqrt() for half in matrix.chunk(2, -1)]).amax(0)

    def project(self, matrix: Tensor) -> Tensor:
        halves = [half / half.square().mean((-2, -1), keepdim=True).sqrt() for half in matrix.chunk(2, -1)]
        return torch.cat(halves, -1)


def _halves(X: np.ndarray) -> np.ndarray:
    return np.concatenate([half / np.sqrt((half**2).mean()) for half in np.split(X, 2, axis=1)], axis=1)


def _polar(X: np.ndarray) -> np.ndarray:
    U, _, Vh = np.linalg.svd(X, full_matrices=False)
    return np.sqrt(max(X.shape)) * U @ Vh


_PLAIN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "row": lambda X: X / np.sqrt((X**2).mean(1, keepdims=True)),
    "column": lambda X: X / np.sqrt((X**2).mean(0, keepdims=True)),
    "frobenius": lambda X: X / np.sqrt((X**2).mean()),
    "max": np.sign,
    "spectral": _polar,
    "halves": _halves,
}
_LISTS: list[tuple[Norm, ...]] = [
    _PAIR,
    _PAIR[::-1],
    (RowNorm(), SpectralNorm()),
    (SpectralNorm(), RowNorm(), ColumnNorm()),
    (MaxNorm(),),
    (FrobeniusNorm(), ColumnNorm()),
    (BlockNorm(), RowNorm()),
]


def _loop(G: Tensor, norms: tuple[Norm, ...], iterations: int) -> tuple[Tensor, Tensor]:
    """Iterate and residuals (iterations, norms), by the definitions above alone."""
    X, residuals = G.numpy(), []
    for _ in range(iterations):
        for norm in norms:
            X = _PLAIN[norm.name](X)
        residuals.append([np.sqrt(((X - _PLAIN[norm.name](X)) ** 2).mean()) for norm in norms])
    return torch.from_numpy(X), torch.tensor(residuals, dtype=torch.float64)


@pytest.mark.parametrize("norms", _LISTS, ids=lambda norms: "-".join(norm.name for norm in norms))
@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_iterate_and_trace_are_those_of_the_plain_loop(norms: tuple[Norm, ...], iterations: int) -> None:
    G = torch.randn(8, 12, dtype=torch.float64)
    before = G.clone()
    X, trace = multi_normalize(G, norms, iterations, return_trace=True)
    expected, residuals = _loop(G, norms, iterations)
    assert_close(X, expected, rtol=0, atol=1e-11)
    assert trace.norms == tuple(norm.name for norm in norms)
    assert trace.residuals.shape == (iterations, len(norms))
    assert_close(trace.residuals, residuals, rtol=0, atol=1e-11)
    assert torch.equal(multi_normalize(G, norms, iterations), X)
    assert torch.equal(G, before)


def test_five_iterations_by_default() -> None:
    G = torch.randn(6, 9, dtype=torch.float64).exp()
    assert torch.equal(multi_normalize(G, _PAIR), multi_normalize(G, _PAIR, 5))
    assert not torch.equal(multi_normalize(G, _PAIR), multi_normalize(G, _PAIR, 4))


def test_zero_iterations_return_the_gradient_and_an_empty_trace() -> None:
    G = torch.randn(2, 3, 4)
    X, trace = multi_normalize(G, _PAIR, 0, return_trace=True)
    assert torch.equal(X, G)
    assert trace.residuals.shape == (2, 0, 2)


@pytest.mark.parametrize("shape", [(64, 96), (3, 40, 40)])
def test_tolerance_of_1e_12_is_reached_in_float64(shape: tuple[int, ...]) -> None:
    G = torch.randn(shape, dtype=torch.float64)
    X, trace = multi_normalize(G, _PAIR, tolerance=1e-12, return_trace=True)
    worst = trace.residuals.flatten(0, -3).amax((0, -1)) if len(shape) > 2 else trace.residuals.amax(-1)
    assert worst[-1] <= 1e-12
    assert (worst[:-1] > 1e-12).all()  # it stops no later than it may
    assert_close(X.square().mean(-1), torch.ones(shape[:-1], dtype=torch.float64), rtol=0, atol=1e-11)
    assert_close(X.square().mean(-2), torch.ones_like(X[..., 0, :]), rtol=0, atol=1e-11)


def test_iterations_cap_a_tolerance_without_a_warning() -> None:
    G = torch.randn(64, 96, dtype=torch.float64).exp()
    X, trace = multi_normalize(G, _PAIR, 2, tolerance=1e-12, return_trace=True)
    assert len(trace.residuals) == 2
    assert torch.equal(X, multi_normalize(G, _PAIR, 2))
    _, early = multi_normalize(G, _PAIR, 500, tolerance=1e-3, return_trace=True)
    assert len(early.residuals) < 20


def test_unreachable_tolerance_warns_and_returns_the_best() -> None:
    G = torch.randn(8, 12, dtype=torch.float64)
    G[0], G[:, :2] = 0, 0
    with pytest.warns(UserWarning, match=r"tolerance=1e-12 was not reached.*zero rows") as caught:
        X, trace = multi_normalize(G, _PAIR, tolerance=1e-12, return_trace=True)
    assert caught[0].filename == __file__
    assert len(trace.residuals) < 1000
    assert X.isfinite().all()
    assert (X[0] == 0).all()
    best = trace.residuals.amax(-1).min()
    assert max(norm.residual(X) for norm in _PAIR) <= 1.01 * best


def test_batch_is_one_by_one() -> None:
    G = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    X, trace = multi_normalize(G, _PAIR, 3, return_trace=True)
    assert trace.residuals.shape == (2, 3, 3, 2)
    for i in range(2):
        for j in range(3):
            single, single_trace = multi_normalize(G[i, j], _PAIR, 3, return_trace=True)
            assert_close(X[i, j], single, rtol=0, atol=1e-13)
            assert_close(trace.residuals[i, j], single_trace.residuals, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_rounded_once_at_the_end(dtype: torch.dtype, golden_sinkhorn: Golden) -> None:
    largest = golden_sinkhorn.gradient.abs().max().clamp(min=1e-30)  # so that float16 can hold the case
    G = (golden_sinkhorn.gradient / largest).to(dtype)
    X = multi_normalize(G, _PAIR, golden_sinkhorn.iterations)
    exact = multi_normalize(G.double(), _PAIR, golden_sinkhorn.iterations)
    assert X.dtype is dtype
    assert_close(X.double(), exact, rtol=1.01 * torch.finfo(dtype).eps / 2 + 1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 0, 3), (0, 2, 3)])
def test_empty_gradients_stay_empty(shape: tuple[int, ...]) -> None:
    X, trace = multi_normalize(torch.zeros(shape), _PAIR, tolerance=1e-3, return_trace=True)
    assert X.shape == shape
    assert trace.residuals.shape[:-2] == shape[:-2]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"norms": []}, ValueError, "norms is empty"),
        ({"iterations": -1}, ValueError, "iterations=-1"),
        ({"tolerance": -1e-3}, ValueError, "tolerance=-0.001"),
        ({"gradient": torch.ones(3)}, ValueError, r"shape \(3,\)"),
        ({"gradient": torch.ones(3, 3, dtype=torch.complex64)}, TypeError, "complex64"),
        ({"gradient": torch.ones(3, 3, dtype=torch.int32)}, TypeError, "int32"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        multi_normalize(**{"gradient": torch.ones(3, 3), "norms": _PAIR, **arguments})


def _row_error(X: Tensor) -> float:
    return (X.square().mean(-1).sqrt() - 1).abs().max().item()


_LOG_NORMAL = "log-normal row and column scales"
_TABLE = [
    *[("Gaussian", L, error) for L, error in ((1, 6e-3), (2, 5e-5), (3, 6e-7), (5, 9e-11))],
    *[(_LOG_NORMAL, L, error) for L, error in ((1, 0.43), (2, 4e-3), (3, 4e-5), (5, 7e-9))],
]


@pytest.mark.parametrize(("kind", "iterations", "error"), _TABLE)
def test_convergence_table_of_the_paper_notes(kind: str, iterations: int, error: float) -> None:
    G = torch.randn(512, 512, dtype=torch.float64)
    if kind == _LOG_NORMAL:
        G = G * torch.randn(512, 1, dtype=torch.float64).exp() * torch.randn(1, 512, dtype=torch.float64).exp()
    X = multi_normalize(G, _PAIR, iterations)
    assert error / 10 < _row_error(X) < error * 10
    assert_close(X.square().mean(-2), torch.ones(512, dtype=torch.float64), rtol=0, atol=1e-13)
