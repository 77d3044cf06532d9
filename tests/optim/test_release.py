"""Gradient release: the same weights to the last bit, and no gradient left."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR

from lightning_multinorm import SWAN, MultiNormGD, SinkGD, parameter_groups
from lightning_multinorm.norms import ColumnNorm, RowNorm
from lightning_multinorm.optim.release import release_gradients

from .models import TinyText, backward

MAKERS: dict[str, Callable[..., Any]] = {
    "sinkgd": SinkGD,
    "swan": SWAN,
    "multinormgd": partial(MultiNormGD, norms=[RowNorm(), ColumnNorm()]),
}


def train(model: nn.Module, make: Callable[..., Any], *, release: bool) -> Any:
    optimizer = make(parameter_groups(model), lr=0.1)
    schedule = LinearLR(optimizer, 1.0, 0.1, 4)
    if release:
        release_gradients(optimizer)
    for step in range(4):
        backward(model, step)
        if release:
            assert all(parameter.grad is None for parameter in model.parameters())
        optimizer.step()
        schedule.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_released_updates_are_those_after_backward(make: Callable[..., Any], dtype: torch.dtype) -> None:
    one = TinyText().to(dtype)
    two = deepcopy(one)
    first, second = train(one, make, release=False), train(two, make, release=True)
    for (name, parameter), other in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(parameter, other), name
        state, other_state = first.state[parameter], second.state[other]
        assert state.keys() == other_state.keys()
        assert all(torch.equal(value, other_state[key]) for key, value in state.items()), name


def test_a_released_parameter_used_twice_is_updated_once() -> None:
    """Hooks run when a gradient is complete, not at each contribution."""
    weight = nn.Parameter(torch.eye(3))
    optimizer = SinkGD([{"params": [weight], "rule": "multinorm", "view": "matrix"}], lr=1.0, matrix_lr_scale=1.0)
    release_gradients(optimizer)
    (weight @ weight).sum().backward()
    assert torch.allclose((torch.eye(3) - weight).square().mean(), torch.tensor(1.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("name", ["layers.1.weight", "embedding.weight"])
def test_a_parameter_whose_gradient_is_not_finite_is_left_alone(name: str, value: float) -> None:
    model = TinyText()
    optimizer = SinkGD(parameter_groups(model), weight_decay=0.1)
    parameters = dict(model.named_parameters())
    release_gradients(optimizer)
    for step in range(2):
        if step == 1:
            parameters[name].register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([2]), value))
        before = deepcopy((parameters, {n: optimizer.state[p] for n, p in parameters.items()}))
        backward(model, step)
        assert all(parameter.grad is None for parameter in parameters.values())
        if step == 0 or value == 3e38:
            optimizer.step()  # without a warning
        else:
            with pytest.warns(UserWarning, match="1 parameters were not updated"):
                optimizer.step()
    left = {n for n, p in parameters.items() if torch.equal(p, before[0][n])}
    assert left == ({name} if value != 3e38 else set())
    if left:
        state, kept = optimizer.state[parameters[name]], before[1][name]
        assert state.keys() == kept.keys() and all(torch.equal(state[key], kept[key]) for key in state)


def test_removed_handles_end_the_release() -> None:
    model = TinyText()
    for handle in release_gradients(SinkGD(parameter_groups(model))):
        handle.remove()
    model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
