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


def test_removed_handles_end_the_release() -> None:
    model = TinyText()
    for handle in release_gradients(SinkGD(parameter_groups(model))):
        handle.remove()
    model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
