"""Bfloat16 parameters move by what they should on average, whatever updates them; their noise is part of the state."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_multinorm import SWAN, MultiNormGD, SinkGD, parameter_groups
from lightning_multinorm.norms import ColumnNorm, RowNorm
from lightning_multinorm.optim.normalized import subtract_
from lightning_multinorm.rounding import noise, round_to_bfloat16
from lightning_multinorm.sinkhorn import select

from .models import TinyText, backward

Make = Callable[..., Any]
MAKERS: dict[str, Make] = {
    "sinkgd": SinkGD,
    "sinkgd-eager": partial(SinkGD, kernel="eager"),
    "swan": SWAN,
    "multinormgd": partial(MultiNormGD, norms=[RowNorm(), ColumnNorm()]),
}
STEP = 2.0**-11  # a sixteenth of what bfloat16 resolves above 1, an eighth of what it does below


def _moved(make: Make, rule: str, **options: Any) -> torch.Tensor:
    """Where 4096 ones are after ten steps of size STEP, in float64."""
    parameter = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    # Ones for Adam's sake, whose step is then lr; of SWAN only a full-rank gradient has entries of size 1.
    parameter.grad = torch.ones_like(parameter)
    group = {"params": [parameter], "rule": rule, "view": "matrix"}
    optimizer = make([group], lr=STEP, matrix_lr_scale=1.0, **options)
    for _ in range(10):
        optimizer.step()
    return parameter.detach().double()


@pytest.mark.parametrize("rule", ["multinorm", "adam"])
@pytest.mark.parametrize("name", ["sinkgd", "sinkgd-eager", "multinormgd"])
def test_small_steps_add_up_on_average(name: str, rule: str) -> None:
    moved = _moved(MAKERS[name], rule)
    # Each of 40 960 flips between neighbours 2^-8 apart.
    assert abs(moved.mean() - (1 - 10 * STEP)) < 4 * 2.0**-8 / 2 / 40_960**0.5 * 10**0.5
    assert moved.unique().numel() > 1


@pytest.mark.parametrize("rule", ["multinorm", "adam"])
@pytest.mark.parametrize("name", ["sinkgd", "multinormgd"])
def test_rounding_to_nearest_loses_small_steps(name: str, rule: str) -> None:
    assert torch.equal(_moved(MAKERS[name], rule, stochastic_rounding=False), torch.ones(64, 64, dtype=torch.float64))


def test_adam_in_bfloat16_is_adam_in_float64_on_average() -> None:
    """Two hundred steps of 4096 equal parameters; plain bfloat16 second moments would not decay."""
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal(200) * np.where(np.arange(200) < 20, 10.0, 0.1)
    parameter = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = SinkGD([{"params": [parameter], "rule": "adam", "view": "matrix"}], lr=1e-3, betas=(0.9, 0.99))
    w, m, v = 1.0, 0.0, 0.0
    for t, gradient in enumerate(gradients, 1):
        g = float(torch.tensor(gradient, dtype=torch.bfloat16))
        parameter.grad = torch.full_like(parameter, g)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        w -= 1e-3 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)) ** 0.5 + 1e-8)
    assert abs(parameter.double().mean() - w) < 2e-3
    variance = optimizer.state[parameter]["exp_avg_sq"].double().mean()
    assert abs(variance / v - 1) < 0.02


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_noise_is_part_of_the_state(make: Make) -> None:
    """Interrupted and resumed is uninterrupted, bit for bit; another run of the same steps too."""

    def steps(model: nn.Module, optimizer: Any, numbers: range) -> None:
        for step in numbers:
            backward(model, step)
            optimizer.step()

    start = TinyText().bfloat16()
    whole, first = deepcopy(start), deepcopy(start)
    steps(whole, make(parameter_groups(whole)), range(6))
    optimizer = make(parameter_groups(first))
    steps(first, optimizer, range(3))
    rest = deepcopy(first)
    resumed = make(parameter_groups(rest))
    resumed.load_state_dict(optimizer.state_dict())
    steps(rest, resumed, range(3, 6))
    for one, two in zip(whole.parameters(), rest.parameters(), strict=True):
        assert torch.equal(one, two)


def test_equal_parameters_are_rounded_by_noise_of_their_own() -> None:
    parameters = [nn.Parameter(torch.ones(32, 32, dtype=torch.bfloat16)) for _ in range(4)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    rules = ["multinorm", "multinorm", "adam", "adam"]
    groups = [{"params": [p], "rule": rule, "view": "matrix"} for p, rule in zip(parameters, rules, strict=True)]
    SinkGD(groups, lr=2.0**-10, matrix_lr_scale=1.0).step()
    drawn = [tuple((p < 1).flatten().tolist()) for p in parameters]
    assert len(set(drawn)) == 4


def test_float32_has_no_noise_and_no_count() -> None:
    model = TinyText()
    optimizer = SinkGD(parameter_groups(model))
    backward(model, 0)
    optimizer.step()
    assert all("rounding_steps" not in group for group in optimizer.param_groups)


@pytest.mark.parametrize("shape", [(5, 130), (7,), (2, 3, 5, 7), (0, 5)], ids=str)
@pytest.mark.parametrize("numba", [True, False])
def test_a_formed_direction_is_subtracted_with_the_noise_of_each_matrix(
    shape: tuple[int, ...], numba: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly, as products with powers of two are exact."""
    if not numba:
        monkeypatch.setattr(select, "_fastest", lambda *_: "eager")
    W, X, seed = torch.randn(shape).bfloat16(), torch.randn(shape), torch.tensor(11)
    moved = (W.float() * 0.5 - X * 0.25).view(W.shape[:-2].numel(), *(shape[-2:] if len(shape) > 1 else (1, *shape)))
    rounded = [
        round_to_bfloat16(x, noise(11 + k, 0, slice(0, len(x)), x.shape[1], x.device)) for k, x in enumerate(moved)
    ]
    subtract_(W, X, 0.25, 2.0, seed)
    assert torch.equal(W, torch.stack(rounded).view(shape))
