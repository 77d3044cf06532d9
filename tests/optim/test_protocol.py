"""The `torch.optim` protocol: closures, groups, schedulers, state, copies, and what is left out."""

import io
import pickle
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.testing import assert_close

from lightning_multinorm import SWAN, MultiNormGD, SinkGD, parameter_groups
from lightning_multinorm.norms import ColumnNorm, RowNorm

from .models import TEXT_MATRICES, TinyText, backward

Make = Callable[..., torch.optim.Optimizer]
_OPTIMIZERS: dict[str, Make] = {
    "sinkgd": SinkGD,
    "swan": SWAN,
    "multinormgd": partial(MultiNormGD, norms=[RowNorm(), ColumnNorm()]),
}
every = pytest.mark.parametrize("make", _OPTIMIZERS.values(), ids=_OPTIMIZERS)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


def _assert_equal(model: nn.Module, other: nn.Module) -> None:
    for (name, parameter), (_, twin) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(parameter, twin), name


def _one_matrix(make: Make, **options: Any) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    weight = nn.Parameter(torch.zeros(6, 8, dtype=torch.float64))
    weight.grad = torch.randn(6, 8, dtype=torch.float64)
    return weight, make([("layer.weight", weight)], **options)


def _rms(change: Tensor) -> float:
    return change.detach().square().mean().sqrt().item()


@every
def test_closure_runs_once_with_gradients_before_the_update_and_its_loss_is_returned(make: Make) -> None:
    model, twin = TinyText(), TinyText()
    twin.load_state_dict(model.state_dict())
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return backward(model, 0)

    with torch.no_grad():
        loss = make(model.named_parameters()).step(closure)  # type: ignore[arg-type]
    expected = backward(twin, 0)
    assert make(twin.named_parameters()).step() is None
    assert calls == [True]
    assert_close(loss, expected)
    _assert_equal(model, twin)


@every
def test_each_group_has_its_own_lr_scale_and_decay(make: Make) -> None:
    G = torch.randn(6, 8, dtype=torch.float64)
    weights = [nn.Parameter(torch.full_like(G, 2.0)) for _ in range(3)]
    for weight in weights:
        weight.grad = G.clone()
    own: list[dict[str, Any]] = [{}, {"lr": 0.5, "weight_decay": 0.0}, {"lr_scale": 0.2, "weight_decay": 2.0}]
    groups = [
        {"params": [(f"{i}.weight", w)], "rule": "multinorm", "view": "matrix", "name": str(i), **keys}
        for i, (w, keys) in enumerate(zip(weights, own, strict=True))
    ]
    make(groups, lr=0.1, matrix_lr_scale=0.05, weight_decay=0.3).step()
    for weight, rate, decay in zip(weights, (0.005, 0.025, 0.02), (0.3, 0.0, 2.0), strict=True):
        step = (1 - rate * decay) * 2.0 - weight.detach()
        assert_close(_rms(step), rate, rtol=1e-9, atol=0)


@every
def test_weight_decay_is_decoupled_and_acts_without_a_gradient_direction(make: Make) -> None:
    weight, optimizer = _one_matrix(make, lr=0.1, matrix_lr_scale=0.5, weight_decay=2.0)
    weight.data.normal_()
    before = weight.detach().clone()
    assert weight.grad is not None
    weight.grad.zero_()
    optimizer.step()
    assert_close(weight.detach(), 0.9 * before)


_SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], schedulers.LRScheduler]] = {
    "LambdaLR": partial(schedulers.LambdaLR, lr_lambda=lambda step: 1 / (step + 1)),
    "MultiplicativeLR": partial(schedulers.MultiplicativeLR, lr_lambda=lambda step: 0.9),
    "StepLR": partial(schedulers.StepLR, step_size=2),
    "MultiStepLR": partial(schedulers.MultiStepLR, milestones=[1, 3]),
    "ConstantLR": partial(schedulers.ConstantLR, total_iters=2),
    "LinearLR": partial(schedulers.LinearLR, total_iters=3),
    "ExponentialLR": partial(schedulers.ExponentialLR, gamma=0.5),
    "PolynomialLR": partial(schedulers.PolynomialLR, total_iters=9),
    "CosineAnnealingLR": partial(schedulers.CosineAnnealingLR, T_max=8),
    "CosineAnnealingWarmRestarts": partial(schedulers.CosineAnnealingWarmRestarts, T_0=3),
    "CyclicLR": partial(schedulers.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": partial(schedulers.OneCycleLR, max_lr=0.1, total_steps=9),
    "ChainedScheduler": lambda optimizer: schedulers.ChainedScheduler(
        [schedulers.ExponentialLR(optimizer, 0.5), schedulers.StepLR(optimizer, 1)], optimizer
    ),
    "SequentialLR": lambda optimizer: schedulers.SequentialLR(
        optimizer, [schedulers.LinearLR(optimizer), schedulers.ExponentialLR(optimizer, 0.5)], milestones=[2]
    ),
}


def _assert_update_follows_lr(weight: nn.Parameter, optimizer: torch.optim.Optimizer, lr: float) -> None:
    before = weight.detach().clone()
    optimizer.step()
    assert_close(_rms(weight - before), lr * 0.05, rtol=1e-9, atol=1e-18)


@every
@pytest.mark.parametrize("kind", _SCHEDULERS)
def test_every_scheduler_drives_the_update(make: Make, kind: str) -> None:
    weight, optimizer = _one_matrix(make, lr=0.1)
    scheduler = _SCHEDULERS[kind](optimizer)
    rates = []
    for _ in range(5):
        rates.append(float(scheduler.get_last_lr()[0]))
        _assert_update_follows_lr(weight, optimizer, rates[-1])
        scheduler.step()
    assert len(set(rates)) > 1


@every
def test_reduce_on_plateau_drives_the_update(make: Make) -> None:
    weight, optimizer = _one_matrix(make, lr=0.1)
    scheduler = schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for rate in (0.1, 0.1, 0.05, 0.025):
        _assert_update_follows_lr(weight, optimizer, rate)
        scheduler.step(1.0)


@every
def test_lr_as_a_tensor_is_as_a_number_and_can_be_changed_in_place(make: Make) -> None:
    model, twin = TinyText().double(), TinyText().double()
    twin.load_state_dict(model.state_dict())
    lr = torch.tensor(0.03, dtype=torch.float64)
    optimizer = make(model.named_parameters(), lr=lr, weight_decay=0.1)
    plain = make(twin.named_parameters(), lr=0.03, weight_decay=0.1)
    _train(model, optimizer, range(2))
    lr.fill_(0.01)
    _train(twin, plain, range(2))
    for group in plain.param_groups:
        group["lr"] = 0.01
    _train(model, optimizer, range(2, 4))
    _train(twin, plain, range(2, 4))
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(parameter, other, rtol=1e-12, atol=1e-12)


@every
@pytest.mark.parametrize("through", ["memory", "file"])
def test_saved_state_gives_identical_further_steps(make: Make, through: str) -> None:
    model, twin = TinyText(), TinyText()
    optimizer = make(parameter_groups(model), lr=0.05, weight_decay=0.1)
    _train(model, optimizer, range(3))
    state = optimizer.state_dict()
    if through == "file":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    twin.load_state_dict(model.state_dict())
    restored = make(parameter_groups(twin), lr=1.0)
    restored.load_state_dict(deepcopy(state))
    _train(model, optimizer, range(3, 6))
    _train(twin, restored, range(3, 6))
    _assert_equal(model, twin)


@every
@pytest.mark.parametrize("copy", [deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_copies_continue_alike_and_take_new_groups(make: Make, copy: Callable[[Any], Any]) -> None:
    model = TinyText()
    optimizer = make(model.named_parameters(), lr=0.05)
    _train(model, optimizer, range(2))
    twin, twin_optimizer = copy((model, optimizer))
    _train(model, optimizer, range(2, 4))
    _train(twin, twin_optimizer, range(2, 4))
    _assert_equal(model, twin)
    twin_optimizer.add_param_group({"params": [("new.weight", nn.Parameter(torch.zeros(2, 3)))]})
    assert twin_optimizer.param_groups[-1]["lr_scale"] == 0.05


@every
def test_matrices_keep_no_state_and_the_rest_keeps_that_of_adamw(make: Make) -> None:
    model = TinyText()
    optimizer = make(model.named_parameters())
    adamw = torch.optim.AdamW(model.parameters())
    _train(model, optimizer, range(2))
    adamw.step()
    stateful = {name for name, parameter in model.named_parameters() if parameter in optimizer.state}
    assert stateful == {name for name, _ in model.named_parameters()} - set(TEXT_MATRICES)
    for parameter, state in optimizer.state.items():
        expected = adamw.state[parameter]
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}
        assert state["step"] == 2


@every
def test_parameters_without_a_gradient_are_skipped(make: Make) -> None:
    model = TinyText()
    optimizer = make(model.named_parameters(), weight_decay=0.5)
    optimizer.step()
    assert not optimizer.state
    backward(model, 0)
    untouched = ("embedding.weight", "layers.1.weight")
    before = {name: model.get_parameter(name).detach().clone() for name in untouched}
    for name in untouched:
        model.get_parameter(name).grad = None
    optimizer.step()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())


@every
def test_groups_can_be_added_later_and_are_routed(make: Make) -> None:
    model = TinyText()
    optimizer = make([("layers.0.weight", model.layers[0].weight)], lr=0.1)
    rest = [(name, p) for name, p in model.named_parameters() if name != "layers.0.weight"]
    optimizer.add_param_group({"params": rest, "lr": 0.2})
    rules = {n: (g["rule"], g["lr"]) for g in optimizer.param_groups for n in g["param_names"]}
    assert rules["layers.1.weight"] == ("multinorm", 0.2)
    assert rules["lm_head.weight"] == rules["embedding.weight"] == ("adam", 0.2)
    _train(model, optimizer, range(1))
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": rest[:1]})
