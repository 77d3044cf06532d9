"""Two optimizers as one: the same bits as side by side, over schedules and checkpoints, and what it refuses."""

import io
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR

from lightning_multinorm import parameter_groups
from lightning_multinorm.optim.combined import Combined
from lightning_multinorm.optim.hyperparameters import hyperparameters, restore_hyperparameters

from .models import TEXT_MATRICES, TinyText, backward

MUON = partial(Muon, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
ADAMW = partial(AdamW, lr=0.003, weight_decay=0.2, fused=True)


class Basis:
    """What a library may keep in a state: an object that holds a tensor, in a list."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        self.step = 0
        self.vectors = [torch.eye(n, dtype=dtype)]

    def turn(self, G: Tensor) -> Tensor:
        self.step += 1
        self.vectors[0] = self.vectors[0].lerp(torch.linalg.qr(G.float().T @ G.float())[0].to(G.dtype), 1 / self.step)
        return G @ self.vectors[0]


class Turned(torch.optim.Optimizer):
    """SGD in a basis that it remembers, as GaLore's is."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                basis = self.state[p].setdefault("basis", Basis(p.shape[1], p.dtype))
                p.sub_(basis.turn(p.grad), alpha=group["lr"] * group.get("factor", 1))


def _combined(model: nn.Module, matrices: Callable[..., Any] = MUON, **arguments: Any) -> Combined:
    return Combined(parameter_groups(model), matrices, ADAMW, **arguments)


def _schedule(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: (step + 1) / 5)


def _train(model: nn.Module, steps: range, *optimizers: Any) -> None:
    """With optimizers and their schedules."""
    for step in steps:
        backward(model, step)
        for optimizer in optimizers:
            optimizer.step()


def _assert_equal(model: nn.Module, other: nn.Module) -> None:
    for (name, parameter), (_, twin) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(parameter, twin), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_as_the_two_side_by_side(dtype: torch.dtype) -> None:
    model = TinyText().to(dtype)
    twin = deepcopy(model)
    named = dict(twin.named_parameters())
    muon = MUON([named[name] for name in TEXT_MATRICES])
    adamw = ADAMW([parameter for name, parameter in named.items() if name not in TEXT_MATRICES])
    combined = _combined(model)
    _train(model, range(6), combined, _schedule(combined))
    _train(twin, range(6), muon, adamw, _schedule(muon), _schedule(adamw))
    _assert_equal(model, twin)


def test_groups_are_those_of_the_model_each_with_its_rate() -> None:
    model = TinyText()
    combined = _combined(model, matrix_group={"momentum": 0.5})
    names = [group["name"] for group in combined.param_groups]
    assert names == [group["name"] for group in parameter_groups(model)]
    rates = {group["name"]: group["lr"] for group in combined.param_groups}
    assert rates == {name: 0.01 if name == "matrix" else 0.003 for name in names}
    assert {group["name"] for group in combined.param_groups if group.get("momentum") == 0.5} == {"matrix"}
    schedule = _schedule(combined)
    _train(model, range(1), combined, schedule)
    assert schedule.get_last_lr() == [rate * 2 / 5 for rate in rates.values()]


def test_state_is_each_ones_own_and_no_more() -> None:
    model = TinyText()
    combined = _combined(model)
    _train(model, range(1), combined)
    for name, parameter in model.named_parameters():
        held = {"momentum_buffer"} if name in TEXT_MATRICES else {"step", "exp_avg", "exp_avg_sq"}
        assert combined.state[parameter].keys() == held
    count = sum(entry.nbytes for entries in combined.state.values() for entry in entries.values())
    matrices = [parameter for name, parameter in model.named_parameters() if name in TEXT_MATRICES]
    rest = [parameter for name, parameter in model.named_parameters() if name not in TEXT_MATRICES]
    assert count == sum(p.nbytes for p in matrices) + sum(2 * p.nbytes + 4 for p in rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("matrices", [MUON, Turned], ids=["muon", "objects"])
def test_goes_on_from_a_file_to_the_last_bit(matrices: Callable[..., Any], dtype: torch.dtype) -> None:
    model = TinyText().to(dtype)
    combined = _combined(model, matrices)
    schedule = _schedule(combined)
    _train(model, range(3), combined, schedule)
    file = io.BytesIO()
    torch.save([model.state_dict(), combined.state_dict(), schedule.state_dict()], file)
    _train(model, range(3, 6), combined, schedule)

    file.seek(0)
    twin = TinyText().to(dtype)
    again = _combined(twin, matrices)
    later = _schedule(again)
    for part, saved in zip([twin, again, later], torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    _train(twin, range(3, 6), again, later)
    _assert_equal(model, twin)
    assert all(expert.state is again.state for expert in again.experts)


def test_a_copy_goes_on_alone() -> None:
    model = TinyText()
    combined = _combined(model, Turned)
    _train(model, range(2), combined)
    twin, again = deepcopy((model, combined))
    _train(twin, range(2, 4), again)
    _train(model, range(2, 4), combined)
    _assert_equal(model, twin)


def test_configured_values_win_over_a_checkpoints() -> None:
    model = TinyText()
    old = _combined(model)
    _train(model, range(2), old, _schedule(old))
    new = _combined(model, partial(MUON, lr=0.02, momentum=0.9))
    schedule, configured = _schedule(new), hyperparameters(new)
    new.load_state_dict(old.state_dict())
    restore_hyperparameters(new, [schedule], configured)
    muon = next(group for group in new.experts[0].param_groups)
    assert (muon["lr"], muon["momentum"], muon["initial_lr"]) == (pytest.approx(0.02 * 3 / 5), 0.9, 0.02)


def test_closure_runs_once_with_gradients_before_both() -> None:
    model, twin = TinyText(), TinyText()
    twin.load_state_dict(model.state_dict())
    calls = []

    def closure() -> Any:
        calls.append(torch.is_grad_enabled())
        return backward(model, 0)

    with torch.no_grad():
        loss = _combined(model).step(closure)
    expected, other = backward(twin, 0), _combined(twin)
    assert other.step() is None
    assert calls == [True] and loss == expected
    _assert_equal(model, twin)


def test_one_alone_where_there_is_nothing_for_the_other() -> None:
    weight = nn.Parameter(torch.ones(4, 3))
    combined = Combined([("layers.0.weight", weight)], MUON, ADAMW)
    assert [type(expert) for expert in combined.experts] == [Muon]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda model: model.parameters(), "without names"),
        (lambda model: parameter_groups(model, policy="stateless"), "no rule='row_power', which group embedding asks"),
        (lambda model: [{**group, "slices": {}} for group in parameter_groups(model)], "under FSDP1"),
    ],
)
def test_what_it_cannot_tell_apart_is_refused(groups: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Combined(groups(TinyText()), MUON, ADAMW)


def test_later_groups_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="when it is built"):
        _combined(TinyText()).add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})


def test_other_checkpoints_are_refused() -> None:
    model = TinyText()
    combined = _combined(model, Turned)
    _train(model, range(1), combined)
    saved = combined.state_dict()
    with pytest.raises(ValueError, match="other parameter groups"):
        combined.load_state_dict({**saved, "param_groups": saved["param_groups"][1:]})
    found = next(entries["basis"] for entries in saved["state"].values() if "basis" in entries)
    for kind in ("collections.OrderedDict", f"{Turned.__module__}.Tensor", f"{Turned.__module__}.backward"):
        found["__class__"] = kind
        with pytest.raises(ValueError, match=f"holds a {kind}, which"):
            combined.load_state_dict(saved)
