"""Laws of the optimizers' updates: invariances, zeros, batching, and how parameters lie (views)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_multinorm import SWAN, MultiNormGD, SinkGD, parameter_groups
from lightning_multinorm.norms import ColumnNorm, RowNorm, SpectralNorm

Make = Callable[..., torch.optim.Optimizer]
_OPTIMIZERS: dict[str, Make] = {
    "sinkgd": SinkGD,
    "swan": SWAN,
    "swan_svd": partial(SWAN, whitening="svd"),
    "swan_centred": partial(SWAN, center=True),
    "sinkhorn_whitening": partial(SWAN, normalization="sinkhorn", k=2, beta=0.5),
    "row_column": partial(MultiNormGD, norms=[RowNorm(), ColumnNorm()]),
    "spectral": partial(MultiNormGD, norms=[SpectralNorm()]),
}
every = pytest.mark.parametrize("make", _OPTIMIZERS.values(), ids=_OPTIMIZERS)


def _update(make: Make, gradient: Tensor, view: str = "matrix", weight: Tensor | None = None, **options: Any) -> Tensor:
    """What one step at rate 1 subtracts."""
    parameter = nn.Parameter(torch.zeros_like(gradient) if weight is None else weight)
    parameter.grad = gradient
    group = {"params": [("w", parameter)], "rule": "multinorm", "view": view, "name": "w"}
    make([group], lr=1.0, matrix_lr_scale=1.0, **options).step()
    return -parameter.detach()


def _rms(change: Tensor) -> float:
    return change.detach().square().mean().sqrt().item()


@every
@pytest.mark.parametrize("k", [-100, -37, -1, 5, 64, 100])
def test_powers_of_two_in_the_gradient_change_no_bit(make: Make, k: int) -> None:
    G = torch.randn(8, 12)
    assert torch.equal(_update(make, G * 2.0**k), _update(make, G))


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (9, 9)])
def test_update_has_rms_one(make: Make, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    update = _update(make, torch.randn(shape, dtype=dtype)).double()
    assert_close(_rms(update), 1.0, rtol=4e-3 if dtype is torch.bfloat16 else 1e-5, atol=0)


@every
def test_permutations_commute(make: Make) -> None:
    G = torch.randn(8, 12, dtype=torch.float64)
    rows, columns = torch.randperm(8), torch.randperm(12)
    assert_close(_update(make, G[rows][:, columns]), _update(make, G)[rows][:, columns], rtol=0, atol=1e-9)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gradient_leaves_the_weight_and_zero_rows_are_no_nan(make: Make, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 8, dtype=dtype)
    assert torch.equal(_update(make, torch.zeros(6, 8, dtype=dtype), weight=weight.clone()), -weight)
    G = torch.randn(6, 8, dtype=dtype)
    G[3] = 0
    update = _update(make, G)
    assert update.isfinite().all()
    assert update[3].abs().max() < 1e-6


@pytest.mark.parametrize("make", [v for k, v in _OPTIMIZERS.items() if k not in ("swan_svd", "spectral")])
def test_nan_reaches_the_weight(make: Make) -> None:
    G = torch.randn(6, 8)
    G[2, 4] = float("nan")
    assert _update(make, G)[2, 4].isnan()


@pytest.mark.parametrize("make", [v for k, v in _OPTIMIZERS.items() if k != "swan_centred"])  # which centres ones away
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (0, 4), (4, 0)])
def test_thin_and_empty_matrices(make: Make, shape: tuple[int, int]) -> None:
    assert_close(_update(make, torch.ones(shape)), torch.ones(shape))


@every
def test_gradient_is_left_alone(make: Make) -> None:
    G = torch.randn(6, 8)
    before = G.clone()
    _update(make, G, weight_decay=0.1)
    assert torch.equal(G, before)


@every
def test_strided_weights_and_gradients_equal_contiguous_ones(make: Make) -> None:
    G, W = torch.randn(8, 6, dtype=torch.float64).mT, torch.randn(12, 16, dtype=torch.float64)[::2, ::2]
    update = _update(make, G, weight=W.clone(memory_format=torch.preserve_format))
    assert_close(update, _update(make, G.contiguous(), weight=W.contiguous()), rtol=0, atol=1e-11)


@every
@pytest.mark.parametrize("count", [1, 2, 5])
def test_equal_shapes_in_one_batch_are_updated_as_one_by_one(make: Make, count: int) -> None:
    gradients = [torch.randn(6, 8, dtype=torch.float64) * 10.0**i for i in range(count)]
    parameters = [nn.Parameter(torch.zeros_like(G)) for G in gradients]
    for parameter, G in zip(parameters, gradients, strict=True):
        parameter.grad = G
    other = nn.Parameter(torch.zeros(8, 6))
    make(
        [(f"w{i}.weight", p) for i, p in enumerate([*parameters, other])],
        lr=1.0,
        matrix_lr_scale=1.0,
        stochastic_rounding=False,
    ).step()
    for parameter, G in zip(parameters, gradients, strict=True):
        assert_close(-parameter.detach(), _update(make, G), rtol=0, atol=1e-11)
    assert (other == 0).all()


@every
def test_equal_shapes_of_other_dtypes_are_not_mixed(make: Make) -> None:
    dtypes = (torch.float64, torch.bfloat16, torch.float32)
    gradients = [torch.randn(6, 8).to(dtype) for dtype in dtypes]
    parameters = [nn.Parameter(torch.zeros_like(G)) for G in gradients]
    for parameter, G in zip(parameters, gradients, strict=True):
        parameter.grad = G
    options = {"lr": 1.0, "matrix_lr_scale": 1.0, "stochastic_rounding": False}
    make([(f"w{i}.weight", p) for i, p in enumerate(parameters)], **options).step()
    for parameter, G in zip(parameters, gradients, strict=True):
        assert torch.equal(-parameter.detach(), _update(make, G, stochastic_rounding=False))


@every
def test_experts_are_normalised_one_by_one(make: Make) -> None:
    G = torch.randn(3, 6, 8, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    assert_close(_update(make, G, "batch"), torch.stack([_update(make, g) for g in G]), rtol=0, atol=1e-11)


@every
def test_packed_qkv_are_three_matrices(make: Make) -> None:
    G = torch.randn(12, 8, dtype=torch.float64)
    G[4:8] *= 100
    assert_close(_update(make, G, "qkv"), torch.cat([_update(make, g) for g in G.chunk(3)]), rtol=0, atol=1e-11)
    assert not torch.allclose(_update(make, G, "qkv"), _update(make, G), atol=1e-3)


@every
def test_transposed_matrices_have_their_columns_as_rows(make: Make) -> None:
    G = torch.randn(6, 10, dtype=torch.float64).exp()
    assert_close(_update(make, G, "transposed"), _update(make, G.mT.contiguous()).mT, rtol=0, atol=1e-11)


@every
@pytest.mark.parametrize("channels_last", [(False, False), (True, True), (True, False), (False, True)])
def test_convolutions_are_matrices_of_output_channels(make: Make, channels_last: tuple[bool, bool]) -> None:
    W, G = torch.randn(5, 4, 3, 2, dtype=torch.float64), torch.randn(5, 4, 3, 2, dtype=torch.float64)
    expected = _update(make, G.flatten(1), weight=W.flatten(1).clone()).view_as(W)
    weight, gradient = (
        x.to(memory_format=torch.channels_last if last else torch.contiguous_format).clone()
        for x, last in zip((W, G), channels_last, strict=True)
    )
    update = _update(make, gradient, "convolution", weight=weight)
    assert update.stride() == weight.stride()
    assert_close(update, expected, rtol=0, atol=1e-10)
    assert_close(-weight, expected, rtol=0, atol=1e-10)  # in place, in the memory it had


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolution_modules_train(dimensions: int, transposed: bool) -> None:
    name = f"Conv{'Transpose' if transposed else ''}{dimensions}d"
    convolution = getattr(nn, name)(3, 4, 3)
    convolution(torch.randn(2, 3, *[6] * dimensions)).square().sum().backward()
    before = convolution.weight.detach().clone()
    SinkGD(parameter_groups(convolution)).step()
    assert_close(_rms(convolution.weight - before), 1e-3, rtol=1e-3, atol=0)
