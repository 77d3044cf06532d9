"""Laws of SR-Sinkhorn: invariances, zeros, range, dtypes, layouts; against the definition where a value is needed."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_multinorm import sr_sinkhorn
from lightning_multinorm.sinkhorn import reference, scalings


@pytest.fixture(autouse=True, params=["auto", "eager"])
def _every_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What "auto" takes here, Numba's for single precision and less, and plain PyTorch."""
    monkeypatch.setitem(globals(), "sr_sinkhorn", partial(sr_sinkhorn, kernel=request.param))
    monkeypatch.setitem(globals(), "scalings", partial(scalings, kernel=request.param))


_DTYPES = [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float32, 2e-6), (torch.float64, 1e-13)]


def _definition(G: Tensor, iterations: int = 5) -> Tensor:
    """Rows, then columns, one at a time, in float64; (m, n)."""
    X = G.double().clone()
    m, n = X.shape
    for _ in range(iterations):
        for i in range(m):
            length = X[i].square().sum().sqrt()
            X[i] = X[i] * (n**0.5 / length) if length > 0 else 0
        for j in range(n):
            length = X[:, j].square().sum().sqrt()
            X[:, j] = X[:, j] * (m**0.5 / length) if length > 0 else 0
    return X


@pytest.mark.parametrize("k", range(-100, 101, 10))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_powers_of_two_change_no_bit(k: int, dtype: torch.dtype) -> None:
    G = torch.randn(12, 20, dtype=dtype)
    assert torch.equal(sr_sinkhorn(G * 2.0**k), sr_sinkhorn(G))


@pytest.mark.parametrize("k", [-20, 3, 20])
def test_powers_of_two_on_rows_alone_change_no_bit(k: int) -> None:
    G = torch.randn(12, 20)
    scales = 2.0 ** (k * torch.randint(-3, 4, (12, 1)))
    assert torch.equal(sr_sinkhorn(G * scales), sr_sinkhorn(G))


def test_permutations_of_rows_and_columns_commute() -> None:
    G = torch.randn(13, 21, dtype=torch.float64)
    rows, columns = torch.randperm(13), torch.randperm(21)
    assert_close(sr_sinkhorn(G[rows][:, columns]), sr_sinkhorn(G)[rows][:, columns], rtol=1e-13, atol=0)


@pytest.mark.parametrize("iterations", [0, 1, 2, 5])
def test_columns_come_last_and_have_norm_root_m(iterations: int) -> None:
    G = torch.randn(12, 20, dtype=torch.float64)
    X = sr_sinkhorn(G, iterations)
    assert torch.equal(X.sign(), G.sign())
    if iterations == 0:
        assert torch.equal(X, G)
        return
    columns, rows = X.square().mean(0), X.square().mean(1)
    assert_close(columns, torch.ones_like(columns), rtol=0, atol=1e-13)
    assert (rows - 1).abs().max() > 1e-12  # the last half step is the columns'


def test_negation_and_signs() -> None:
    G = torch.randn(12, 20)
    assert torch.equal(sr_sinkhorn(-G), -sr_sinkhorn(G))
    assert torch.equal(sr_sinkhorn(G).sign(), G.sign())


def test_five_iterations_by_default() -> None:
    G = torch.randn(6, 9, dtype=torch.float64).exp()
    assert torch.equal(sr_sinkhorn(G), sr_sinkhorn(G, 5))
    assert not torch.equal(sr_sinkhorn(G), sr_sinkhorn(G, 6))


@pytest.mark.parametrize(("dtype", "eps"), _DTYPES)
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (1, 9), (9, 1), (1, 1), (33, 65)])
def test_every_dtype_and_shape_is_the_definition_and_kept(
    dtype: torch.dtype, eps: float, shape: tuple[int, int]
) -> None:
    G = torch.randn(shape).to(dtype)
    before = G.clone()
    X = sr_sinkhorn(G)
    assert X.dtype is dtype
    assert torch.equal(G, before)
    assert_close(X.double(), _definition(G), rtol=eps, atol=eps * 1e-3)


@pytest.mark.parametrize("rows", [[], [0], [1, 3]])
@pytest.mark.parametrize("columns", [[], [5], [0, 2]])
def test_zero_rows_and_columns_stay_zero(rows: list[int], columns: list[int]) -> None:
    G = torch.randn(5, 7)
    G[rows], G[:, columns] = 0, 0
    X = sr_sinkhorn(G)
    assert (X[rows] == 0).all()
    assert (X[:, columns] == 0).all()
    assert_close(X.double(), _definition(G), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "shape", [(4, 6), (1, 1), (0, 3), (3, 0), (0, 0), (2, 0, 3), (2, 3, 0), (0, 2, 3), (2, 0, 3, 4)]
)
@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_zero_and_empty_gradients_give_zero(shape: tuple[int, ...], iterations: int) -> None:
    assert torch.equal(sr_sinkhorn(torch.zeros(shape), iterations), torch.zeros(shape))
    r, c, found = scalings(torch.zeros(shape), iterations, trace=True)
    assert r.shape == shape[:-1]
    assert c.shape == (*shape[:-2], shape[-1])
    assert found is not None
    assert found.residuals.shape == (*shape[:-2], iterations, 2)
    assert (found.residuals == 0).all()
    assert found.rows.shape == r.shape


@pytest.mark.parametrize("scale", [1e-25, 1e-36, 1e25, 1e35])
@pytest.mark.parametrize("iterations", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ends_of_the_range_are_exact(scale: float, iterations: int, dtype: torch.dtype) -> None:
    columns = torch.randn(1, 20, dtype=torch.float64).exp()
    G = (torch.randn(12, 20, dtype=torch.float64) * columns * scale).to(dtype)
    result = sr_sinkhorn(G, iterations).double()
    assert_close(result, _definition(G, iterations), rtol=max(1e-5, torch.finfo(dtype).eps), atol=0)


def test_subnormal_gradients_stay_finite_and_keep_their_signs() -> None:
    """Their scalings lie beyond float32, so no exact result is asked for; rows of RMS above 3e-39 are exact."""
    G = torch.randint(-8, 9, (6, 8)) * 2.0**-149
    X = sr_sinkhorn(G)
    assert X.isfinite().all()
    assert (X * G >= 0).all()


_BEYOND = pytest.mark.xfail(strict=True, reason="an entry 1e-38 times the largest of its row is lost in float32")


@pytest.mark.parametrize(
    ("row_decades", "column_decades"), [(30, 0), (0, 15), (15, 15), pytest.param(0, 30, marks=_BEYOND)]
)
def test_wildly_different_rows_and_columns_are_exact(row_decades: int, column_decades: int) -> None:
    rows = 10.0 ** torch.linspace(-row_decades, row_decades, 12)[torch.randperm(12)]
    columns = 10.0 ** torch.linspace(-column_decades, column_decades, 20)[torch.randperm(20)]
    G = rows[:, None] * torch.randn(12, 20) * columns
    for iterations in (1, 5):
        result = sr_sinkhorn(G, iterations).double()
        assert_close(result, _definition(G, iterations), rtol=1e-5, atol=1e-30)


def test_a_pattern_without_total_support_stays_finite() -> None:
    """The upper triangle must vanish in the limit, so r and c diverge; the iterate follows the definition anyway."""
    G = torch.ones(4, 4).triu()
    for iterations in (1, 5, 50, 500):
        assert_close(sr_sinkhorn(G, iterations).double(), _definition(G, iterations), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("definition", [False, True])
def test_nan_stays_visible_and_nothing_beside_it_is_silently_zero(definition: bool, dtype: torch.dtype) -> None:
    G = torch.randn(5, 7, dtype=dtype)
    G[2, 3] = float("nan")
    X = reference.sr_sinkhorn(G) if definition else sr_sinkhorn(G)
    assert X[2].isnan().all()
    assert X[:, 3].isnan().all()
    assert (X != 0).all()


def test_infinity_stays_visible() -> None:
    G = torch.randn(5, 7)
    G[2, 3] = float("inf")
    assert not sr_sinkhorn(G)[2, 3].isfinite()


@pytest.mark.parametrize("batch", [(1,), (3,), (2, 2)])
@pytest.mark.parametrize("iterations", [1, 5])
def test_batch_is_one_by_one(batch: tuple[int, ...], iterations: int) -> None:
    G = torch.randn(*batch, 6, 9) * torch.randn(*batch, 1, 1).exp()
    one_by_one = torch.stack([sr_sinkhorn(matrix, iterations) for matrix in G.flatten(0, -3)]).view_as(G)
    assert_close(sr_sinkhorn(G, iterations), one_by_one, rtol=1e-6, atol=0)


def test_strided_gradients_equal_contiguous_ones_and_storage_is_left_alone() -> None:
    storage = torch.randn(18, 24, dtype=torch.float64)
    before = storage.clone()
    expanded = torch.randn(1, 24, dtype=torch.float64).expand(6, 24)
    for view in (storage.mT, storage[::2, ::3], storage[2:9, 5:].flip(1), storage.view(3, 6, 24).mT, expanded):
        X = sr_sinkhorn(view)
        assert X.shape == view.shape
        assert_close(X, sr_sinkhorn(view.contiguous()), rtol=1e-13, atol=0)
    assert torch.equal(storage, before)


def test_parameters_and_graphs_are_not_involved() -> None:
    G = torch.randn(4, 5, requires_grad=True)
    assert not sr_sinkhorn(G).requires_grad


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_matmul_precision_has_no_say(precision: str) -> None:
    G = torch.randn(64, 96)
    before = sr_sinkhorn(G)
    torch.set_float32_matmul_precision(precision)
    assert torch.equal(sr_sinkhorn(G), before)


def test_results_repeat_bit_for_bit() -> None:
    G = torch.randn(300, 1000)
    assert torch.equal(sr_sinkhorn(G), sr_sinkhorn(G.clone()))


@pytest.mark.parametrize(
    ("gradient", "iterations", "error", "message"),
    [
        (torch.ones(3, 3, dtype=torch.complex64), 5, TypeError, "complex64"),
        (torch.ones(3, 3, dtype=torch.int64), 5, TypeError, "int64"),
        (torch.ones(3), 5, ValueError, r"shape \(3,\)"),
        (torch.ones(3, 3), -1, ValueError, "iterations=-1"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    gradient: Tensor, iterations: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sr_sinkhorn(gradient, iterations)
