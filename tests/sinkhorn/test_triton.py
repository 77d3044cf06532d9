"""The Triton path against the definition, the eager path and `rounding`: on a GPU, and in Triton's interpreter.

The interpreter works only where TRITON_INTERPRET is set before anything imports Triton, and the libraries that other
tests need import it: so one test runs this file in a process of its own.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from reference.golden import Golden
from torch import Tensor
from torch.testing import assert_close

from lightning_multinorm.rounding import noise, round_to_bfloat16
from lightning_multinorm.sinkhorn import eager, eager_passes, reference
from lightning_multinorm.sinkhorn.sharded import Part

from .conftest import INTERPRETED

pytest.importorskip("triton")
from lightning_multinorm.sinkhorn import triton as fast
from lightning_multinorm.sinkhorn import triton_passes

# NumPy, in the interpreter, remarks on the infinities of the tests about infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

# Largest tile, longest row of the fused form, least scratch, bytes of cache.
_CUTS = {
    "as it comes": (4096, 16384, 2**16, 2**26),
    "fused, several panels of several tiles": (512, 16384, 2**16, 2**26),
    "fused, one panel, groups of one": (2048, 16384, 0, 2),
    "split, several panels, groups of two": (512, 1, 2**16, 4096),
}
_SHAPES = [(85, 33), (1, 9), (9, 1), (1, 1), (33, 65), (2, 1100), (2, 2, 12, 20)]
_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=_CUTS.values(), ids=_CUTS)
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Matrices as small as those of the tests in many panels, tiles and groups, in both forms."""
    tile, longest_row, least_scratch, cache_bytes = request.param
    monkeypatch.setattr(fast, "_TILE", tile)
    monkeypatch.setattr(fast, "_LONGEST_ROW", longest_row)
    monkeypatch.setattr(fast, "_LEAST_SCRATCH", least_scratch)
    monkeypatch.setattr(fast, "_WARPS_PER_PROCESSOR", 1)
    monkeypatch.setattr(fast, "_chip", lambda _: fast._Chip(processors=4, cache_bytes=cache_bytes))
    fast._plan.cache_clear()
    yield
    fast._plan.cache_clear()


def _normalized(G: Tensor, iterations: int = 5) -> Tensor:
    W = torch.zeros_like(G)
    fast.update_([W], [G], lr=-1.0, iterations=iterations)
    return W


def _gradient(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    G = torch.randn(shape) * torch.randn(*shape[:-1], 1).exp() * torch.randn(*shape[:-2], 1, shape[-1]).exp()
    if min(shape[-2:]) > 4:
        G[..., 4, :], G[..., 3] = 0, 0
    return G.to(device, dtype)


@pytest.mark.skipif(INTERPRETED, reason="is what runs this")
def test_in_the_interpreter() -> None:
    files = Path(__file__), Path(__file__).with_name("test_triton_launches.py")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_scalings_and_residuals_are_those_of_the_definition(shape: tuple[int, ...], device: torch.device) -> None:
    _check_scalings(_gradient(*shape, device=device))


@pytest.mark.usefixtures("cut")
def test_scalings_of_a_gradient_stored_by_columns(device: torch.device) -> None:
    _check_scalings(_gradient(90, 70, device=device).mT)


def _check_scalings(G: Tensor) -> None:
    for iterations in (1, 3):
        r, c, found = fast.scalings(G, iterations, trace=True)
        assert r.dtype is c.dtype is torch.float32
        product = (r.double().unsqueeze(-1) * G.double()) * c.double().unsqueeze(-2)
        assert_close(product, reference.sr_sinkhorn(G, iterations), rtol=5e-6, atol=0)
        expected = eager.scalings(G.double(), iterations, trace=True)[2]
        assert found is not None
        assert expected is not None
        assert_close(found.residuals.double(), expected.residuals, rtol=5e-5, atol=2e-6)
        assert_close(found.rows.double(), expected.rows, rtol=5e-6, atol=0)
        assert torch.equal(found.columns, c)
    untraced_r, untraced_c, none = fast.scalings(G, 3)
    assert none is None
    assert torch.equal(untraced_r, r)
    assert torch.equal(untraced_c, c)


def test_golden(device: torch.device, golden_sinkhorn: Golden) -> None:
    if INTERPRETED and golden_sinkhorn.iterations > 5:
        pytest.skip("the interpreter is slow")
    G = golden_sinkhorn.gradient.to(device, torch.float32)
    assert_close(_normalized(G, golden_sinkhorn.iterations).cpu().double(), golden_sinkhorn.expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("gradient_dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", _DTYPES, ids=str)
def test_update(weight_dtype: torch.dtype, gradient_dtype: torch.dtype, device: torch.device) -> None:
    _check_update(weight_dtype, gradient_dtype, device)


@pytest.mark.usefixtures("cut")
def test_update_however_cut(device: torch.device) -> None:
    _check_update(torch.float32, torch.bfloat16, device)


def _check_update(weight_dtype: torch.dtype, gradient_dtype: torch.dtype, device: torch.device) -> None:
    """Lists of batches, with a rate of each kind; rounded once."""
    W = torch.randn(2, 2, 9, 15, device=device).to(weight_dtype)
    G = _gradient(2, 2, 9, 15, device=device, dtype=gradient_dtype)
    before = G.clone()
    for lr, weight_decay in ((0.3, 0.0), (torch.tensor(0.3, device=device), 0.7)):
        weights, exact, by_eager = W.clone(), W.float().clone(), W.clone()
        options = {"lr": lr, "weight_decay": weight_decay, "iterations": 2}
        found = fast.update_(list(weights), list(G), **options, trace=True)
        assert fast.update_(list(exact), list(G), **options) is None
        expected = eager.update_(list(by_eager), list(G), **options, trace=True)
        assert found is not None
        assert expected is not None
        assert found.residuals.shape == (2, 2, 2, 2)
        assert found.weights is not None
        assert_close(found.weights.double(), W.double().square().sum((-2, -1)), rtol=1e-6, atol=0)
        for ours, theirs in zip(found.vectors, expected.vectors, strict=True):
            assert_close(ours, theirs, rtol=1e-4, atol=2e-6)
        wanted = (1 - 0.3 * weight_decay) * W.double() - 0.3 * reference.sr_sinkhorn(G, 2)
        assert_close(exact.double(), wanted, rtol=0, atol=4e-6)
        assert torch.equal(weights, exact.to(weight_dtype))
        assert_close(weights, by_eager, rtol=2 * torch.finfo(weight_dtype).eps, atol=4e-6)
    assert torch.equal(G, before)


@pytest.mark.usefixtures("cut")
def test_views_are_neither_copied_nor_left(device: torch.device) -> None:
    """Every layout of gradient and weight in one list: results and residuals in its order, and nothing beside."""
    storage = torch.randn(40, 60, device=device)
    gradients = [
        storage[:20, :12].mT,
        storage[:12, :20],
        storage[10:34:2, ::3],
        storage[:1, :20].expand(12, 20),
        storage.view(60, 40).mT[5:17, 9:29],
        storage[3:15, 7:27],
    ]
    memory = torch.zeros(3, 50, 50, device=device)
    views = [x[1:13, 3:23] if k % 2 else x[1:21, 3:15].mT for k, x in enumerate(memory)]
    views += [x[21:45:2, 26:46] if k % 2 else x[30:50, 26:50:2].mT for k, x in enumerate(memory)]
    before = storage.clone()
    found = fast.update_(views, gradients, lr=-1.0, iterations=2, trace=True)
    assert found is not None
    for k, G in enumerate(gradients):
        assert_close(views[k].double(), reference.sr_sinkhorn(G, 2), rtol=1e-5, atol=0)
        expected = eager.scalings(G, 2, trace=True)[2]
        assert expected is not None
        for ours, theirs in zip(found.vectors, expected.vectors, strict=True):
            assert_close(ours[k], theirs, rtol=5e-5, atol=2e-6)
    for view in views:
        view.zero_()
    assert (memory == 0).all()
    assert torch.equal(storage, before)
    batch = storage.view(2, 3, 20, 20)[:, :, 4:].mT
    assert_close(_normalized(batch).double(), reference.sr_sinkhorn(batch), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("seed", "in_memory"), [(0, False), (1, True), (-5, False), (-5, True), (2**40 + 77, False)])
def test_stochastic_rounding_is_that_of_rounding(seed: int, in_memory: bool, device: torch.device) -> None:
    W, G = torch.randn(2, 3, 9, 15, device=device), _gradient(2, 3, 9, 15, device=device)
    weights = [W[0].bfloat16(), W[1].bfloat16().mT.contiguous().mT]  # of two layouts: numbers go through the list
    exact = [w.float() for w in weights]
    fast.update_(exact, list(G), lr=0.01, weight_decay=0.1, iterations=1)
    given = torch.tensor(seed, device=device) if in_memory else seed
    fast.update_(weights, list(G), lr=0.01, weight_decay=0.1, iterations=1, seed=given)
    for k, (rounded, w) in enumerate(zip(weights, exact, strict=True)):
        for b in range(3):
            expected = round_to_bfloat16(w[b], noise(seed, 3 * k + b, slice(0, 9), 15, device))
            assert torch.equal(rounded[b], expected)
    unmoved = torch.randn(9, 15, device=device).half()
    seeded = unmoved.clone()
    fast.update_([unmoved], [G[0, 0]], lr=0.01, iterations=1)
    fast.update_([seeded], [G[0, 0]], lr=0.01, iterations=1, seed=given)
    assert torch.equal(seeded, unmoved)


def test_rounding_keeps_what_is_not_finite(device: torch.device) -> None:
    W = torch.tensor([[torch.inf, -torch.inf, torch.nan, 3.38e38, 0.0]], device=device).bfloat16()
    for seed in (None, 3):
        result = W.clone()
        fast.update_([result], [torch.zeros(1, 5, device=device)], lr=0.1, seed=seed)
        assert_close(result, W, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_powers_of_two_change_no_bit(dtype: torch.dtype, device: torch.device) -> None:
    G = torch.randn(12, 20, device=device).to(dtype)
    expected = _normalized(G)
    for k in (-100, -37, 1, 100):
        assert torch.equal(_normalized(G * 2.0**k), expected)
    rows = 2.0 ** (7 * torch.randint(-3, 4, (12, 1), device=device)).to(dtype)
    assert torch.equal(_normalized(G * rows), expected)
    assert torch.equal(_normalized(-G), -expected)


@pytest.mark.usefixtures("cut")
def test_both_ends_of_the_range_are_exact(device: torch.device) -> None:
    scales = torch.tensor([1e-36, 1e-25, 1e25, 1e36, 1e37], dtype=torch.float64).view(5, 1, 1)
    G = torch.randn(5, 12, 20, dtype=torch.float64).mul(scales).float().to(device)
    assert_close(_normalized(G).double(), reference.sr_sinkhorn(G), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("cut")
def test_wildly_different_rows_and_columns_are_exact(device: torch.device) -> None:
    decades = torch.tensor([[30, 0], [0, 15], [15, 15]])
    rows = 10.0 ** (decades[:, :1] * torch.linspace(-1, 1, 12)[torch.randperm(12)])
    columns = 10.0 ** (decades[:, 1:] * torch.linspace(-1, 1, 20)[torch.randperm(20)])
    G = (rows[:, :, None] * torch.randn(3, 12, 20) * columns[:, None]).to(device)
    for iterations in (1, 5):
        assert_close(_normalized(G, iterations).double(), reference.sr_sinkhorn(G, iterations), rtol=1e-5, atol=1e-30)


@pytest.mark.usefixtures("cut")
def test_subnormal_nan_and_infinite_gradients(device: torch.device) -> None:
    G = (torch.randint(-8, 9, (6, 8)) * 2.0**-149).to(device)
    X = _normalized(G)
    assert X.isfinite().all()
    assert (X * G >= 0).all()
    assert (X.sign() * G.sign() >= 0).all()
    G = torch.randn(5, 7, device=device)
    G[2, 3] = torch.nan
    X = _normalized(G)
    assert X[2].isnan().all()
    assert X[:, 3].isnan().all()
    assert (X != 0).all()
    G[2, 3] = torch.inf
    for iterations in (1, 5):
        X = _normalized(G, iterations)
        assert not X[2, 3].isfinite()
        assert (X != 0).all()


@pytest.mark.usefixtures("cut")
def test_zero_rows_columns_and_matrices_stay_zero(device: torch.device) -> None:
    G = torch.randn(3, 5, 7, device=device)
    G[0, [1, 3]], G[1, :, [0, 2]], G[2] = 0, 0, 0
    r, c, found = fast.scalings(G, 3, trace=True)
    assert (r[0, [1, 3]] == 0).all()
    assert (c[1, [0, 2]] == 0).all()
    assert found is not None
    assert (found.residuals[2] == 0).all()
    assert_close(_normalized(G).double(), reference.sr_sinkhorn(G), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 0, 3), (0, 2, 3)])
@pytest.mark.parametrize("iterations", [0, 2])
def test_empty_gradients(shape: tuple[int, ...], iterations: int, device: torch.device) -> None:
    r, c, found = fast.scalings(torch.zeros(shape, device=device), iterations, trace=True)
    assert r.shape == shape[:-1]
    assert c.shape == (*shape[:-2], shape[-1])
    assert found is not None
    assert found.residuals.shape == (*shape[:-2], iterations, 2)
    W = torch.zeros(shape, device=device)
    assert fast.update_([W], [W.clone()], lr=0.1, iterations=iterations) is None


def test_no_iterations_leave_the_gradient_as_it_is(device: torch.device) -> None:
    G = torch.randn(2, 4, 6, device=device)
    assert torch.equal(_normalized(G, 0), G)


def test_a_pattern_without_total_support_stays_finite(device: torch.device) -> None:
    G = torch.ones(4, 4, device=device).triu()
    for iterations in (1, 5, 50):
        assert_close(_normalized(G, iterations).double(), reference.sr_sinkhorn(G, iterations), rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("cut")
def test_permutations_commute_and_results_repeat(device: torch.device) -> None:
    G = torch.randn(30, 40, device=device)
    rows, columns = torch.randperm(30), torch.randperm(40)
    X = _normalized(G)
    assert_close(_normalized(G[rows][:, columns]), X[rows][:, columns], rtol=2e-6, atol=0)
    assert torch.equal(_normalized(G.clone()), X)


def test_autograd_learns_that_weights_changed(device: torch.device) -> None:
    W = torch.nn.Parameter(torch.ones(3, 4, device=device))
    version = W._version
    fast.update_([W], [torch.randn(3, 4, device=device)], lr=0.1)
    assert W._version > version


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("shape", [(85, 33), (1, 300), (600, 5), (17, 513)])
def test_passes_over_parts_are_those_of_plain_pytorch(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    """Row and column sums, largest entries and the update, for parts that are views of larger matrices."""
    G = _gradient(*shape, device=device, dtype=dtype)
    outer = torch.zeros(shape[0] + 2, shape[1] + 3, device=device, dtype=dtype)
    outer[1:-1, 2:-1] = G
    results = []
    for passes, gradient in ((eager_passes, G), (triton_passes, outer[1:-1, 2:-1])):
        torch.manual_seed(1)
        vectors = [torch.rand(k) + 0.5 for k in (shape[0], shape[1], shape[0], shape[1], shape[1])]
        W = torch.randn(shape).to(dtype)
        part = Part(W.to(device), gradient, *(vector.to(device) for vector in vectors))
        passes.add_row_sums([part])
        passes.add_column_sums([part], lift=True)
        passes.take_largest([part])
        passes.apply_([part], [0.1], [0.01], [7])
        results.append((part.R, part.C, part.lifted, part.weight.float()))
    for one, two in zip(*results, strict=True):
        assert_close(one, two, rtol=1e-5, atol=1e-6)
