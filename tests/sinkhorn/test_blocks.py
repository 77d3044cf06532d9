"""The factored form: scalings, residuals, the fused update, and that reading by blocks of rows changes nothing."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarks.optimizer_step.memory import peak_allocated
from lightning_multinorm.scaling import working_dtype
from lightning_multinorm.sinkhorn import eager, reference, scalings, update_

_BLOCKS = [1, 7, 20, 45, 97, 250]  # less than a row, part of a matrix, more than one matrix


@pytest.fixture(params=_BLOCKS)
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of so few entries that the matrices of these tests span several."""
    monkeypatch.setattr(eager, "_BLOCK_CPU", request.param)


@pytest.fixture(autouse=True, params=["auto", "eager"])
def _every_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What "auto" takes here, Numba's for single precision and less, and plain PyTorch."""
    monkeypatch.setitem(globals(), "scalings", partial(scalings, kernel=request.param))
    monkeypatch.setitem(globals(), "update_", partial(update_, kernel=request.param))


def _residuals(G: Tensor, iterations: int) -> Tensor:
    """(L, 2): relative errors of row and column norms, root mean square, of the iterates written out in float64."""
    m, n = G.shape
    errors = []
    for k in range(1, iterations + 1):
        X = reference.sr_sinkhorn(G, k)
        lengths = (X.norm(dim=1) / n**0.5, X.norm(dim=0) / m**0.5)
        errors.append([torch.where(s > 0, s - 1, 0).square().mean().sqrt() for s in lengths])
    return torch.tensor(errors, dtype=torch.float64)


def _check_scalings(G: Tensor, iterations: int, rtol: float) -> None:
    r, c, found = scalings(G, iterations, trace=True)
    assert r.dtype is c.dtype is (torch.float64 if G.dtype is torch.float64 else torch.float32)
    assert found is not None
    rms = G.double().square().mean(-1).sqrt()
    assert_close(found.rows.double(), torch.where(rms == 0, 0, 1 / rms), rtol=rtol, atol=0)
    assert torch.equal(found.columns, c)
    for k, matrix in enumerate(G):
        product = (r[k].double()[:, None] * matrix.double()) * c[k].double()
        assert_close(product, reference.sr_sinkhorn(matrix, iterations), rtol=rtol, atol=0)
        assert_close(found.residuals[k].double(), _residuals(matrix, iterations), rtol=10 * rtol, atol=2 * rtol)


def _gradients(count: int, dtype: torch.dtype) -> Tensor:
    G = torch.randn(count, 9, 15) * torch.randn(count, 9, 1).exp() * torch.randn(count, 1, 15).exp()
    G[:, 4], G[:, :, 3] = 0, 0
    return G.to(dtype)


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 5e-6)])
def test_scalings_and_residuals_are_those_of_the_definition(dtype: torch.dtype, rtol: float, iterations: int) -> None:
    _check_scalings(_gradients(3, dtype), iterations, rtol)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("iterations", [1, 5])
def test_scalings_and_residuals_by_blocks_of_rows(iterations: int) -> None:
    _check_scalings(_gradients(3, torch.float64), iterations, 1e-12)


def test_no_trace_is_made_unless_asked_for() -> None:
    G = _gradients(2, torch.float32)
    r, c, found = scalings(G, 5)
    traced_r, traced_c, _ = scalings(G, 5, trace=True)
    assert found is None
    assert torch.equal(r, traced_r)
    assert torch.equal(c, traced_c)
    assert update_([torch.zeros(2, 9, 15)], [G], lr=1.0) is None


def test_zero_rows_and_columns_get_the_scaling_zero() -> None:
    r, c, _ = scalings(_gradients(2, torch.float32), 5)
    assert (r[:, 4] == 0).all()
    assert (c[:, 3] == 0).all()


def _update(weights: Tensor, G: Tensor, lr: float | Tensor, weight_decay: float, iterations: int) -> Tensor:
    """(1 - lr · decay) W - lr · X in float64, matrix by matrix."""
    rate = float(lr)
    steps = torch.stack([reference.sr_sinkhorn(matrix, iterations) for matrix in G])
    return (1 - rate * weight_decay) * weights.double() - rate * steps


def _check_update(dtypes: tuple[torch.dtype, torch.dtype], lr: float | Tensor, weight_decay: float) -> None:
    W, G = torch.randn(5, 9, 15).to(dtypes[0]), _gradients(5, dtypes[1])
    expected, before = _update(W, G, lr, weight_decay, 3), G.clone()
    weights = list(W.clone())
    found = update_(weights, list(G), lr=lr, weight_decay=weight_decay, iterations=3, trace=True)
    half_ulp = torch.finfo(dtypes[0]).eps / 2
    assert_close(torch.stack(weights).double(), expected, rtol=1.01 * half_ulp, atol=4e-6)
    assert torch.equal(G, before)
    assert found is not None
    assert [x.shape for x in found.vectors] == [(5, 3, 2), (5, 9), (5, 15)]
    assert found.weights is not None
    assert_close(found.weights.double(), W.double().square().sum((1, 2)), rtol=1e-6, atol=0)
    assert_close(found.residuals.double(), torch.stack([_residuals(matrix, 3) for matrix in G]), rtol=2e-4, atol=1e-6)
    as_batch = W.clone()
    update_([as_batch], [G], lr=lr, weight_decay=weight_decay, iterations=3)
    assert_close(as_batch.double(), expected, rtol=1.01 * half_ulp, atol=4e-6)


_DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
]


@pytest.mark.parametrize("dtypes", _DTYPES, ids=str)
@pytest.mark.parametrize("lr", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.7])
def test_update(dtypes: tuple[torch.dtype, torch.dtype], lr: float | Tensor, weight_decay: float) -> None:
    _check_update(dtypes, lr, weight_decay)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtypes", _DTYPES[:3], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.7])
def test_update_by_blocks_of_rows(dtypes: tuple[torch.dtype, torch.dtype], weight_decay: float) -> None:
    _check_update(dtypes, 0.3, weight_decay)


def test_a_matrix_larger_than_a_block_is_read_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    G = torch.randn(1000, 600)
    assert G.numel() > eager.block_size(G)
    r, c, _ = scalings(G, 5)
    monkeypatch.setattr(eager, "_BLOCK_CPU", G.numel())
    whole_r, whole_c, _ = scalings(G, 5)
    assert_close(r, whole_r, rtol=2e-6, atol=0)
    assert_close(c, whole_c, rtol=2e-6, atol=0)


def test_update_of_a_view_reaches_its_storage_and_nothing_else() -> None:
    storage, G = torch.zeros(10, 12), torch.randn(6, 5)
    update_([storage[1:6, 3:9].mT], [G], lr=-1.0)
    assert_close(storage[1:6, 3:9].mT.double(), reference.sr_sinkhorn(G), rtol=1e-5, atol=0)
    storage[1:6, 3:9] = 0
    assert (storage == 0).all()


def test_blocks_change_no_bit_of_stochastic_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is numbered by entry, wherever a block begins."""
    W, G, rounded = torch.randn(2, 20, 7).bfloat16(), torch.randn(2, 20, 7), []
    for size in [*_BLOCKS, eager._BLOCK_CPU]:
        monkeypatch.setattr(eager, "_BLOCK_CPU", size)
        rounded.append(W.clone())
        r, c = torch.ones(2, 20), torch.ones(2, 7)  # the scalings' sums would depend on the blocks
        eager._apply_(rounded[-1], G, r, c, 1e-3, 0.1, 5, 0)
    assert all(torch.equal(rounded[0], other) for other in rounded[1:])


@pytest.mark.parametrize("dtypes", _DTYPES[:4], ids=str)
@pytest.mark.parametrize("seed", [None, 3], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("shape", [(700, 600), (40, 60, 40)], ids=["blocks of a matrix", "matrices of a block"])
def test_an_update_allocates_one_block_and_vectors(
    dtypes: tuple[torch.dtype, torch.dtype], seed: int | None, shape: tuple[int, ...]
) -> None:
    W, G = torch.zeros(shape, dtype=dtypes[0]), torch.randn(shape).to(dtypes[1])
    *batch, m, n = shape
    block, vectors = eager.block_size(G) * working_dtype(G).itemsize, 16 * math.prod(batch) * (m + n) * 4
    assert peak_allocated(lambda: update_([W], [G], lr=0.1, seed=seed)) <= block + vectors


@pytest.mark.parametrize("iterations", [5, 300])
def test_rounding_does_not_add_up(iterations: int) -> None:
    """X follows r and c only within an iteration; it is made of G anew for the next."""
    G = torch.randn(60, 40) * torch.randn(60, 1).exp()
    r, c, _ = scalings(G, iterations)
    assert_close(r[:, None].double() * G * c, reference.sr_sinkhorn(G, iterations), rtol=2e-6, atol=0)
