"""Schedules: values worked out by hand, and what a checkpoint of them keeps."""

import math

import pytest
import torch

from lightning_multinorm.schedules import WarmupCosine, WarmupSchedule, WarmupStableDecay


def optimizer(*lrs: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in lrs], lr=1.0)


def rates(schedule: WarmupSchedule, steps: int, group: int = 0) -> list[float]:
    values = []
    for _ in range(steps):
        values.append(float(schedule.optimizer.param_groups[group]["lr"]))
        schedule.optimizer.step()
        schedule.step()
    return values


def test_cosine_rises_linearly_and_ends_at_a_tenth() -> None:
    lrs = rates(WarmupCosine(optimizer(2.0), total_steps=100, warmup=0.1, final=0.1), 101)
    assert lrs[:10] == pytest.approx([2 * (k + 1) / 11 for k in range(10)])
    assert max(lrs) == lrs[10] == 2.0
    assert lrs[55] == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2))))
    assert lrs[100] == pytest.approx(0.2)


def test_stable_decay_holds_the_peak_and_falls_to_zero() -> None:
    lrs = rates(WarmupStableDecay(optimizer(1.0), total_steps=100, warmup=0.1, decay=0.5), 101)
    assert lrs[10:56] == [1.0] * 46
    assert lrs[100] == pytest.approx(0.0)
    assert lrs[78] == pytest.approx(22 / 45)


def test_groups_keep_their_ratio() -> None:
    schedule = WarmupCosine(optimizer(1.0, 0.25), total_steps=20)
    for _ in range(15):
        first, second = (group["lr"] for group in schedule.optimizer.param_groups)
        assert second == first / 4
        schedule.optimizer.step()
        schedule.step()


def test_length_can_be_set_before_the_first_step() -> None:
    late, early = WarmupCosine(optimizer(1.0)), WarmupCosine(optimizer(1.0), total_steps=30)
    late.total_steps = 30
    assert rates(late, 30) == rates(early, 30)


def test_stepping_without_a_length_is_refused() -> None:
    schedule = WarmupCosine(optimizer(1.0))
    schedule.optimizer.step()
    with pytest.raises(RuntimeError, match="total_steps is None"):
        schedule.step()


def test_checkpoint_keeps_the_position_and_not_the_length() -> None:
    schedule = WarmupStableDecay(optimizer(1.0), total_steps=40, decay=0.3)
    rates(schedule, 17)
    state = schedule.state_dict()
    assert not {"_total_steps", "warmup", "final", "decay"} & state.keys()
    longer = WarmupStableDecay(optimizer(1.0), total_steps=400, decay=0.3)
    longer.load_state_dict(state)
    assert longer.last_epoch == 17 and longer.total_steps == 400


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"total_steps": 0}, "total_steps"), ({"warmup": 1.0}, "warmup"), ({"final": 2.0}, "final")],
)
def test_values_out_of_range_are_refused_by_name(arguments: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        WarmupCosine(optimizer(1.0), **arguments)
    with pytest.raises(ValueError, match="decay"):
        WarmupStableDecay(optimizer(1.0), decay=0.0)
