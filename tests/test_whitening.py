"""Whitening against the golden polar factors, against the scalar recursion of Newton–Schulz, and against laws."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from reference.golden import WHITENED, Golden, load
from torch import Tensor
from torch.testing import assert_close

from lightning_multinorm.norms import SpectralNorm
from lightning_multinorm.whitening import _gram, polar_newton_schulz, polar_svd

Polar = Callable[[Tensor], Tensor]
_EXACT: dict[str, Polar] = {"svd": polar_svd, "newton_schulz": partial(polar_newton_schulz, k=40, beta=0.5)}
_ALL: dict[str, Polar] = {**_EXACT, "swan": partial(polar_newton_schulz, k=10, beta=0.8)}
exact = pytest.mark.parametrize("polar", _EXACT.values(), ids=_EXACT)
every = pytest.mark.parametrize("polar", _ALL.values(), ids=_ALL)


def _condition(matrix: Tensor) -> float:
    return torch.linalg.cond(matrix.double()).item()


def _with_singular_values(values: Tensor, m: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix U diag(values) Vᵀ with random U (m, k) and Vᵀ (k, n)."""
    U = torch.linalg.qr(torch.randn(m, len(values), dtype=values.dtype)).Q
    Vh = torch.linalg.qr(torch.randn(n, len(values), dtype=values.dtype)).Q.mT
    return (U * values) @ Vh, U, Vh


def test_svd_is_golden_up_to_the_condition(golden_whitened: Golden) -> None:
    """The polar factor moves by about κ(G) · ε; the worst case, of wildly scaled rows and columns, has κ = 1.1e8."""
    G, expected = golden_whitened.gradient, golden_whitened.expected
    tolerance = max(1e-13, 4e-16 * _condition(G)) * max(G.shape) ** 0.5
    assert_close(SpectralNorm("svd").project(G), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("key", [key for key in WHITENED if not key.startswith("lognormal")])
def test_newton_schulz_is_golden_up_to_the_condition_of_the_gram_matrix(key: str) -> None:
    """It starts from G Gᵀ, of condition κ(G)²: good to κ² · ε, after 2 log(κ) / log(9/4) steps and a few more."""
    golden = load(key)
    tolerance = max(1e-12, 4e-16 * _condition(golden.gradient) ** 2) * max(golden.gradient.shape) ** 0.5
    assert tolerance < 1e-8
    whitened = SpectralNorm("newton_schulz", k=60, beta=0.5).project(golden.gradient)
    assert_close(whitened, golden.expected, rtol=0, atol=tolerance)


def test_newton_schulz_leaves_what_the_gram_matrix_cannot_resolve_between_zero_and_one() -> None:
    """κ² · ε > 1: the smallest directions are lost, the largest half is right."""
    golden = load("lognormal_scales_64x64/whitened")
    singular = torch.linalg.svdvals(polar_newton_schulz(golden.gradient, k=60, beta=0.5))
    assert singular.max() < 1 + 1e-6
    assert singular[:32].min() > 1 - 1e-6


@pytest.mark.parametrize(("m", "n"), [(6, 6), (6, 11), (11, 6)])
@pytest.mark.parametrize("beta", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_newton_schulz_follows_the_recursion_of_each_singular_value(k: int, beta: float, m: int, n: int) -> None:
    """With y = σ² / ‖σ²‖ and z = 1: y <- βy(3 - zy), z <- β(3 - zy)z; σ ends as z · √y₀ (arXiv:2412.13148, Alg. 2)."""
    sigma = torch.tensor([2.0, 1.5, 1.0, 0.3, 0.1, 0.01], dtype=torch.float64)
    G, U, Vh = _with_singular_values(sigma, m, n)
    start = sigma**2 / (sigma**4).sum().sqrt()
    y, z = start, torch.ones_like(start)
    for _ in range(k):
        y, z = beta * y * (3 - z * y), beta * (3 - z * y) * z
    assert_close(polar_newton_schulz(G, k=k, beta=beta), (U * (z * start.sqrt())) @ Vh, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("m", "n"), [(24, 24), (24, 60), (60, 24)])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_bfloat16_follows_the_recursion_to_its_precision(k: int, m: int, n: int) -> None:
    """Also of small singular values, which the Gram matrix in bfloat16 would have lost."""
    sigma = torch.logspace(0, -3, 24, dtype=torch.float64)
    G, U, Vh = _with_singular_values(sigma, m, n)
    s = sigma / (sigma**4).sum() ** 0.25
    for _ in range(k):
        s = 0.8 * s * (3 - s**2)
    X = polar_newton_schulz(G.float(), k=k, dtype=torch.bfloat16)
    assert X.dtype is torch.float32
    along = (U.mT @ X.double() @ Vh.mT).diagonal()
    assert_close(along, s, rtol=0.05, atol=0.02)
    assert (X.double() - (U * s) @ Vh).norm() < 0.05 * s.norm()


def test_the_mirrored_gram_matrix_is_the_gram_matrix() -> None:
    X = torch.randn(2, 515, 40, dtype=torch.float64)
    assert_close(_gram(X), X @ X.mT, rtol=1e-12, atol=1e-12)
    assert torch.equal(_gram(X)[:, :257, 257:], _gram(X)[:, 257:, :257].mT)


@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_both_forms_of_the_iteration_are_the_same(k: int) -> None:
    """Square matrices are iterated themselves, wide ones (here by columns of zeros) through their Gram matrix."""
    G = torch.randn(12, 12, dtype=torch.float64)
    wide = torch.cat([G, torch.zeros(12, 60, dtype=torch.float64)], dim=1)
    assert_close(polar_newton_schulz(wide, k=k)[:, :12], polar_newton_schulz(G, k=k), rtol=0, atol=1e-10)


def test_swan_scatters_singular_values_within_the_documented_range() -> None:
    singular = torch.linalg.svdvals(polar_newton_schulz(torch.randn(64, 96, dtype=torch.float64)))
    assert 0.55 < singular.min() < 0.9
    assert 1.1 < singular.max() < 1.61


@exact
@pytest.mark.parametrize(("m", "n"), [(5, 9), (9, 5), (7, 7), (1, 6), (6, 1), (1, 1)])
def test_exact_factor_is_orthonormal_and_leaves_a_symmetric_positive_part(polar: Polar, m: int, n: int) -> None:
    G = torch.randn(m, n, dtype=torch.float64)
    Q = polar(G)
    gram = Q @ Q.mT if m <= n else Q.mT @ Q
    assert_close(gram, torch.eye(min(m, n), dtype=torch.float64), rtol=0, atol=1e-9)
    positive = Q @ G.mT if m <= n else G.mT @ Q
    assert_close(positive, positive.mT, rtol=0, atol=1e-9)
    assert torch.linalg.eigvalsh(positive).min() > 0


def test_svd_drops_directions_of_noise() -> None:
    G, U, Vh = _with_singular_values(torch.tensor([3.0, 1.0], dtype=torch.float64), 8, 6)
    assert_close(polar_svd(G), U @ Vh, rtol=0, atol=1e-13)


@every
@pytest.mark.parametrize("k", [-100, -63, -1, 1, 40, 100])
def test_powers_of_two_change_no_bit(polar: Polar, k: int) -> None:
    G = torch.randn(12, 20)
    assert torch.equal(polar(G * 2.0**k), polar(G))


@every
@pytest.mark.parametrize("shape", [(5, 3), (0, 4), (4, 0), (0, 0), (2, 0, 3), (0, 2, 3)])
def test_zero_and_empty_give_zero(polar: Polar, shape: tuple[int, ...]) -> None:
    assert torch.equal(polar(torch.zeros(shape)), torch.zeros(shape))


@every
@pytest.mark.parametrize("batch", [(3,), (2, 2)])
def test_batch_is_one_by_one(polar: Polar, batch: tuple[int, ...]) -> None:
    G = torch.randn(*batch, 6, 9, dtype=torch.float64)
    one_by_one = torch.stack([polar(matrix) for matrix in G.flatten(0, -3)]).view_as(G)
    assert_close(polar(G), one_by_one, rtol=0, atol=1e-12)


@every
@pytest.mark.parametrize(
    ("dtype", "eps"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float32, 1e-5), (torch.float64, 1e-10)]
)
def test_each_dtype_is_kept_and_as_good_as_it_can_be(polar: Polar, dtype: torch.dtype, eps: float) -> None:
    G, _, _ = _with_singular_values(torch.linspace(0.5, 2, 8, dtype=torch.float64), 8, 12)
    G = G.to(dtype)
    before = G.clone()
    result = polar(G)
    assert result.dtype is dtype
    assert torch.equal(G, before)
    assert_close(result.double(), polar(G.double()), rtol=0, atol=eps)


@every
def test_transpose_and_sign_commute(polar: Polar) -> None:
    G = torch.randn(6, 9, dtype=torch.float64)
    assert_close(polar(G.mT), polar(G).mT, rtol=0, atol=1e-10)
    assert_close(polar(-G), -polar(G), rtol=0, atol=1e-10)
