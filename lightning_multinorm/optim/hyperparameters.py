"""Keep an optimizer's hyper-parameters when a checkpoint is loaded into it.

`torch.optim.Optimizer.load_state_dict` takes learning rate, weight decay and the rest from the checkpoint. A run
that is resumed with a value changed on the command line means the new value.
"""

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_multinorm.optim.auto_iterations import STATE

_STATE = ("params", "param_names", "lr", "initial_lr", "rounding_steps", *STATE)


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Each group's hyper-parameters as configured; its learning rate before any schedule."""
    return [
        {key: value for key, value in group.items() if key not in _STATE}
        | {"initial_lr": group.get("initial_lr", group["lr"])}
        for group in optimizer.param_groups
    ]


def restore_hyperparameters(
    optimizer: Optimizer, schedulers: Iterable[LRScheduler], configured: list[dict[str, Any]]
) -> None:
    """Put the configured hyper-parameters back, and scale learning rates from the checkpoint's peak to the configured.

    Changes no bit where both agree.

    Args:
        optimizer: after loading a checkpoint.
        schedulers: those of the optimizer, after loading.
        configured: what `hyperparameters` returned before loading.
    """
    schedulers = list(schedulers)
    for k, (group, values) in enumerate(zip(optimizer.param_groups, configured, strict=True)):
        old, new = group.get("initial_lr", group["lr"]), values["initial_lr"]
        group.update({key: value for key, value in values.items() if key in group and key != "initial_lr"})
        if old == new:
            continue
        group["lr"] = group["lr"] * (new / old) if old else new
        group["initial_lr"] = new
        for scheduler in schedulers:
            scheduler.base_lrs[k] = new
