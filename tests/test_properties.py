"""Properties of norms and optimizers on matrices that nobody chose: any shape, zero rows and columns, any scale."""

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_multinorm import SWAN, MultiNormGD, SinkGD, multi_normalize, sr_sinkhorn
from lightning_multinorm.norms import ColumnNorm, FrobeniusNorm, MaxNorm, Norm, RowNorm, SpectralNorm

NORMS: list[Norm] = [RowNorm(), ColumnNorm(), FrobeniusNorm(), MaxNorm(), SpectralNorm()]
OPTIMIZERS: dict[str, Any] = {
    "sinkgd": SinkGD,
    "swan": SWAN,
    "multinorm": partial(MultiNormGD, norms=[RowNorm(), ColumnNorm()]),
}
examples = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def matrices(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal entries with some rows and columns zero, times a power of ten."""
    m, n = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    entries = np.random.default_rng(draw(st.integers(0, 10_000))).standard_normal((m, n))
    rows, columns = (draw(st.lists(st.booleans(), min_size=size, max_size=size)) for size in (m, n))
    entries[rows] = 0
    entries[:, columns] = 0
    return torch.tensor(entries * 10.0 ** draw(st.integers(-18, 18)), dtype=dtype)


@examples
@given(matrices(), st.sampled_from(NORMS), st.integers(-60, 60))
def test_projections_have_norm_one_and_are_projections(X: Tensor, norm: Norm, k: int) -> None:
    projected = norm.project(X)
    assert projected.isfinite().all()
    if not X.any():
        assert not projected.any()
        return
    assert_close(norm.value(projected).item(), 1.0, rtol=1e-9, atol=0)
    assert_close(norm.project(projected), projected, rtol=1e-7, atol=1e-7)
    assert_close(norm.project(X * 2.0**k), projected, rtol=1e-9, atol=1e-9)
    assert_close(norm.project(-X), -projected, rtol=1e-9, atol=1e-9)


@examples
@given(matrices(), st.integers(1, 6))
def test_sinkhorn_is_the_alternating_scheme_and_ends_on_columns(G: Tensor, iterations: int) -> None:
    X = sr_sinkhorn(G, iterations)
    assert_close(X, multi_normalize(G, [RowNorm(), ColumnNorm()], iterations), rtol=1e-9, atol=1e-9)
    assert torch.equal(X == 0, G == 0)
    used = G.any(0)
    assert_close(X[:, used].square().sum(0), torch.full((int(used.sum()),), float(len(G)), dtype=G.dtype))


@pytest.mark.parametrize("name", OPTIMIZERS)
@examples
@given(
    gradients=st.lists(st.integers(0, 1000), min_size=1, max_size=5), G=matrices(torch.float32), at=st.integers(0, 5)
)
def test_a_saved_state_goes_on_anywhere(name: str, gradients: list[int], G: Tensor, at: int) -> None:
    """Matrices and Adam's parameters alike, with decay; the gradient of a step is the one drawn, mixed with noise."""

    def make() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        parameters = [nn.Parameter(torch.ones_like(G)), nn.Parameter(torch.ones(G.shape[1]))]
        groups = [
            {"params": [("w", parameters[0])], "rule": "multinorm", "name": "matrix"},
            {"params": [("b", parameters[1])], "rule": "adam", "name": "norm"},
        ]
        return parameters, OPTIMIZERS[name](groups, lr=0.1, weight_decay=0.01)

    def step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
        noise = torch.randn(G.shape, generator=torch.Generator().manual_seed(seed))
        parameters[0].grad = G * noise
        parameters[1].grad = noise.sum(0)
        optimizer.step()

    whole, optimizer = make()
    again, other = make()
    for number, seed in enumerate(gradients):
        if number == at:
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share its tensors
            for parameter, saved in zip(again, whole, strict=True):
                parameter.data.copy_(saved.data)
        if number >= at:
            step(again, other, seed)
        step(whole, optimizer, seed)
        assert all(parameter.isfinite().all() for parameter in whole)
    if at < len(gradients):
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
