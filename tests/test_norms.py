"""Every norm against its definition in NumPy, and against the laws of norms and of projections."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_multinorm.norms import ColumnNorm, FrobeniusNorm, MaxNorm, Norm, RowNorm, SpectralNorm

_NEWTON_SCHULZ = SpectralNorm("newton_schulz", k=30, beta=0.5)
_NORMS: dict[str, Norm] = {
    "row": RowNorm(),
    "column": ColumnNorm(),
    "frobenius": FrobeniusNorm(),
    "max": MaxNorm(),
    "spectral": SpectralNorm(),
    "newton_schulz": _NEWTON_SCHULZ,
}
_SHAPES = [(6, 10), (10, 6), (7, 7), (1, 9), (9, 1), (1, 1)]
every_norm = pytest.mark.parametrize("norm", _NORMS.values(), ids=_NORMS)
every_shape = pytest.mark.parametrize(("m", "n"), _SHAPES)
elementwise = pytest.mark.parametrize(
    "norm", [_NORMS[k] for k in ("row", "column", "frobenius", "max")], ids=lambda n: n.name
)


def _value(name: str, X: np.ndarray) -> float:
    """g(X) as the table of paper.md prints it."""
    m, n = X.shape
    if name == "row":
        return float(max(np.sqrt((X[i] ** 2).sum()) for i in range(m)) / np.sqrt(n))
    if name == "column":
        return float(max(np.sqrt((X[:, j] ** 2).sum()) for j in range(n)) / np.sqrt(m))
    if name == "frobenius":
        return float(np.sqrt((X**2).sum() / (m * n)))
    if name == "max":
        return float(abs(X).max())
    return float(np.sqrt(np.linalg.eigvalsh(X @ X.T).max() / max(m, n)))


def _projection(name: str, X: np.ndarray) -> np.ndarray:
    """P_g(X) as the table of paper.md prints it."""
    m, n = X.shape
    if name == "row":
        return np.stack([X[i] * np.sqrt(n / (X[i] ** 2).sum()) for i in range(m)])
    if name == "column":
        return np.stack([X[:, j] * np.sqrt(m / (X[:, j] ** 2).sum()) for j in range(n)], axis=1)
    if name == "frobenius":
        return X * np.sqrt(m * n / (X**2).sum())
    if name == "max":
        return np.where(X > 0, 1.0, -1.0)
    U, _, Vh = np.linalg.svd(X, full_matrices=False)
    return np.sqrt(max(m, n)) * (U @ Vh)


def _full(m: int, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random matrix of moderate condition, no entry of which is zero."""
    X = torch.randn(m, n, dtype=dtype)
    return X + 3 * torch.eye(m, n, dtype=dtype)


@every_norm
@every_shape
def test_value_and_projection_are_the_definition(norm: Norm, m: int, n: int) -> None:
    X = _full(m, n)
    assert_close(norm.value(X).item(), _value(norm.name, X.numpy()), rtol=1e-12, atol=0)
    expected = torch.from_numpy(_projection(norm.name, X.numpy()))
    assert_close(norm.project(X), expected, rtol=0, atol=1e-9)


@every_norm
@every_shape
def test_projection_has_norm_one_frobenius_norm_root_mn_and_no_residual(norm: Norm, m: int, n: int) -> None:
    P = norm.project(_full(m, n))
    assert_close(norm.value(P).item(), 1.0, rtol=0, atol=1e-9)
    assert_close(torch.linalg.norm(P).item(), (m * n) ** 0.5, rtol=1e-9, atol=0)
    assert norm.residual(P).item() < 1e-9
    assert_close(norm.residual(2 * P).item(), 1.0, rtol=1e-9, atol=0)


@every_norm
@every_shape
def test_projection_maximises_the_inner_product_over_the_unit_ball(norm: Norm, m: int, n: int) -> None:
    X = _full(m, n)
    best = (X * norm.project(X)).sum()
    competitors = torch.randn(200, m, n, dtype=torch.float64)
    near = norm.project(X) + 0.1 * torch.randn(200, m, n, dtype=torch.float64)
    for Z in torch.cat([competitors, near]):
        assert (X * (Z / norm.value(Z))).sum() <= best + 1e-9


@every_norm
@every_shape
def test_value_is_a_norm(norm: Norm, m: int, n: int) -> None:
    X, Y = _full(m, n), torch.randn(m, n, dtype=torch.float64)
    for a in (-3.0, 0.25, 1e-20, 1e20):
        assert_close(norm.value(a * X), abs(a) * norm.value(X), rtol=1e-12, atol=0)
    assert norm.value(X + Y) <= norm.value(X) + norm.value(Y) + 1e-12
    assert norm.value(0 * X) == 0


@every_norm
@pytest.mark.parametrize("k", [-100, -50, -1, 1, 33, 100])
def test_powers_of_two_change_no_bit_of_a_projection(norm: Norm, k: int) -> None:
    X = torch.randn(8, 12)
    assert torch.equal(norm.project(X * 2.0**k), norm.project(X))
    assert torch.equal(norm.value(X * 2.0**k), norm.value(X) * 2.0**k)


@every_norm
@pytest.mark.parametrize("scale", [1e-25, 1e-38, 1e25, 1e37])
def test_float32_is_safe_at_both_ends_of_its_range(norm: Norm, scale: float) -> None:
    X = (_full(8, 12) * scale).float()
    assert_close(norm.project(X).double(), norm.project(X.double()), rtol=0, atol=2e-5)
    assert_close(norm.value(X).double(), norm.value(X.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("norm", "shape"), [(RowNorm(), (8, 1)), (ColumnNorm(), (1, 12))], ids=["row", "column"])
def test_wildly_different_scales_do_not_disturb_each_other(norm: Norm, shape: tuple[int, int]) -> None:
    X = torch.randn(8, 12)
    scales = 10.0 ** torch.linspace(-30, 30, max(shape)).reshape(shape)
    assert_close(norm.project(X * scales), norm.project(X), rtol=1e-6, atol=0)


@every_norm
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (4, 0), (0, 0), (2, 0, 3), (0, 2, 3)])
def test_zero_and_empty_matrices_project_to_zero_with_value_and_residual_zero(
    norm: Norm, shape: tuple[int, ...]
) -> None:
    zero = torch.zeros(shape)
    assert torch.equal(norm.project(zero), zero)
    assert torch.equal(norm.value(zero), torch.zeros(shape[:-2]))
    assert torch.equal(norm.residual(zero), torch.zeros(shape[:-2]))


@every_norm
def test_zero_rows_and_columns_stay_zero(norm: Norm) -> None:
    X = _full(6, 8)
    X[2], X[:, 5] = 0, 0
    P = norm.project(X)
    assert P.isfinite().all()
    tolerance = 1e-12 if norm.name == "spectral" else 0.0
    assert P[2].abs().max() <= tolerance
    assert P[:, 5].abs().max() <= tolerance


@elementwise
def test_signs_are_preserved(norm: Norm) -> None:
    X = torch.randn(6, 8)
    assert torch.equal(norm.project(X).sign(), X.sign())


@every_norm
def test_permutations_and_batches_commute(norm: Norm) -> None:
    X = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    rows, columns = torch.randperm(6), torch.randperm(8)
    P = norm.project(X)
    assert_close(norm.project(X[..., rows, :][..., columns]), P[..., rows, :][..., columns], rtol=0, atol=1e-9)
    for law in (norm.project, norm.value, norm.residual):
        singly = torch.stack([torch.stack([law(X[i, j]) for j in range(3)]) for i in range(2)])
        assert_close(law(X), singly, rtol=0, atol=1e-9)


@every_norm
def test_transposed_and_strided_matrices_are_as_good_and_left_alone(norm: Norm) -> None:
    storage = torch.randn(16, 24, dtype=torch.float64)
    for view in (storage[::2, ::2], storage.mT[::3, ::2], storage[:8, :12].flip(0), storage[:, 3:9]):
        before = storage.clone()
        assert_close(norm.project(view), norm.project(view.contiguous()), rtol=0, atol=1e-9)
        assert torch.equal(storage, before)


@every_norm
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2), (torch.float32, 1e-5)])
def test_dtype_is_kept_and_only_the_result_is_rounded(norm: Norm, dtype: torch.dtype, tolerance: float) -> None:
    X = _full(9, 12).to(dtype)
    P = norm.project(X)
    assert P.dtype is dtype
    assert_close(P.double(), norm.project(X.double()), rtol=tolerance, atol=tolerance)
    assert norm.residual(X).dtype is torch.float32


@pytest.mark.parametrize("norm", [RowNorm(), ColumnNorm(), FrobeniusNorm(), MaxNorm(), _NEWTON_SCHULZ], ids=str)
def test_nan_stays_visible(norm: Norm) -> None:
    X = torch.randn(4, 5)
    X[1, 2] = float("nan")
    assert norm.project(X)[1, 2].isnan()
    assert norm.name == "spectral" or norm.value(X).isnan()


def test_residual_counts_each_row_by_its_relative_error() -> None:
    X = torch.tensor([[1.5, 1.5], [1.0, -1.0]], dtype=torch.float64)
    assert_close(RowNorm().residual(X).item(), (0.5**2 / 2) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
@pytest.mark.parametrize("norm", [RowNorm(), ColumnNorm(), FrobeniusNorm()], ids=str)
def test_integers_and_complex_numbers_are_refused(norm: Norm, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=str(dtype)):
        norm.project(torch.ones(2, 2, dtype=dtype))


def test_unknown_method_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="method='qr'"):
        SpectralNorm("qr")  # type: ignore[arg-type]


def test_representation_can_be_evaluated() -> None:
    for norm in _NORMS.values():
        assert repr(eval(repr(norm))) == repr(norm)
