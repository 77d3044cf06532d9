"""Twenty steps of every optimizer on a text model and on a LLaMA against the textbook versions in `reference`."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_multinorm import SWAN, MultiNormGD, SinkGD, parameter_groups
from lightning_multinorm.norms import ColumnNorm, FrobeniusNorm, MaxNorm, Norm, RowNorm, SpectralNorm

from . import reference
from .models import LLAMA_MATRICES, TEXT_MATRICES, Logits, TinyText, backward

_STEPS = 20


@final
class MeanNorm(Norm):
    """A user's own: the mean magnitude."""

    name = "mean"

    def value(self, matrix: Tensor) -> Tensor:
        return matrix.abs().mean((-2, -1))

    def project(self, matrix: Tensor) -> Tensor:
        return matrix / self.value(matrix)[..., None, None]


def _mean(G: np.ndarray) -> np.ndarray:
    return G / abs(G).mean()


def _sinkhorn(iterations: int) -> reference.Update:
    return reference.chain(reference.rows, reference.columns, iterations=iterations)


def _swan(whiten: reference.Update, normalize: reference.Update = reference.rows) -> reference.Update:
    return reference.chain(normalize, whiten, reference.frobenius)


@dataclass(frozen=True)
class Case:
    """An optimizer, the update it must make, and the hyper-parameters that both share."""

    name: str
    optimizer: Callable[..., torch.optim.Optimizer]
    update: reference.Update
    own: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)


_ALL = {"lr": 0.01, "matrix_lr_scale": 0.3, "fallback_lr_scale": 0.5, "weight_decay": 0.2}
_CASES = [
    Case("sinkgd", SinkGD, _sinkhorn(5)),
    Case("sinkgd_once", SinkGD, _sinkhorn(1), {"iterations": 1}),
    Case("sinkgd_all", SinkGD, _sinkhorn(2), {"iterations": 2}, {**_ALL, "betas": (0.8, 0.9), "eps": 1e-3}),
    Case("swan", SWAN, _swan(reference.newton_schulz(10, 0.8))),
    Case("swan_six", SWAN, _swan(reference.newton_schulz(6, 0.5)), {"k": 6, "beta": 0.5}, {"weight_decay": 0.3}),
    Case("swan_svd", SWAN, _swan(reference.polar), {"whitening": "svd"}, _ALL),
    Case("swan_centred", SWAN, _swan(reference.newton_schulz(10, 0.8), reference.centered_rows), {"center": True}),
    Case(
        "sinkhorn_whitening",
        SWAN,
        _swan(reference.newton_schulz(2, 0.5), _sinkhorn(3)),
        {"normalization": "sinkhorn", "iterations": 3, "k": 2, "beta": 0.5},
        _ALL,
    ),
    Case("pair", MultiNormGD, _sinkhorn(5), {"norms": [RowNorm(), ColumnNorm()]}, _ALL),
    Case(
        "spectral",
        MultiNormGD,
        reference.chain(reference.columns, reference.polar, iterations=2),
        {"norms": [ColumnNorm(), SpectralNorm()], "iterations": 2},
    ),
    Case("sign", MultiNormGD, np.sign, {"norms": [MaxNorm()]}, {"lr": 0.003}),
    Case("length", MultiNormGD, reference.frobenius, {"norms": [FrobeniusNorm()], "iterations": 1}),
    Case(
        "own_norm",
        MultiNormGD,
        reference.chain(_mean, reference.columns),
        {"norms": [MeanNorm(), ColumnNorm()], "iterations": 1},
    ),
]
_MODELS: dict[str, tuple[Callable[[], nn.Module], Iterable[str]]] = {
    "text": (TinyText, TEXT_MATRICES),
    "llama": (Logits, LLAMA_MATRICES),
}
cases = pytest.mark.parametrize("case", _CASES, ids=lambda case: case.name)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer | reference.Reference) -> list[Tensor]:
    losses = []
    for step in range(_STEPS):
        losses.append(backward(model, step))
        optimizer.step()
    return losses


def _assert_close(model: nn.Module, plain: nn.Module, rtol: float, atol: float) -> None:
    for (name, parameter), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert parameter.dtype is other.dtype
        assert_close(parameter, other, rtol=rtol, atol=atol, msg=partial("{}: {}".format, name))


@cases
@pytest.mark.parametrize("kind", _MODELS)
@pytest.mark.parametrize("by", ["names", "modules"])
def test_twenty_steps_in_float64(case: Case, kind: str, by: str) -> None:
    make, matrices = _MODELS[kind]
    model = make().double()
    plain = deepcopy(model)
    params = model.named_parameters() if by == "names" else parameter_groups(model)
    losses = _train(model, case.optimizer(params, **case.own, **case.shared))
    expected = _train(plain, reference.Reference(plain, matrices, case.update, **case.shared))
    assert_close(losses, expected, rtol=1e-6, atol=0)
    _assert_close(model, plain, rtol=1e-5, atol=1e-8)


@cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
def test_one_step_at_lower_precision(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    model = TinyText().to(dtype)
    plain = deepcopy(model)
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        noise = torch.randn(parameter.shape)
        parameter.grad = (noise + 3 * torch.eye(*noise.shape) if noise.ndim == 2 else noise).to(dtype)
        other.grad = parameter.grad.clone()
    case.optimizer(model.named_parameters(), **case.own, **case.shared).step()
    reference.Reference(plain, TEXT_MATRICES, case.update, **case.shared).step()
    _assert_close(model, plain, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("optimizer", [SinkGD, SWAN])
def test_bfloat16_model_learns_a_batch_by_heart(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    model = TinyText().bfloat16()
    chosen = optimizer(model.named_parameters())
    for _ in range(60):
        loss = backward(model, 0)
        chosen.step()
    assert loss < 1.0
    assert all(parameter.isfinite().all() for parameter in model.parameters())
