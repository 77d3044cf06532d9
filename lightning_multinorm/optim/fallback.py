"""What parameters get that are no hidden matrices: Adam with decoupled weight decay, as in the papers.

The arithmetic is `torch.optim.adamw.adamw`'s, so the state has AdamW's names and its memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

_FUSED = ("cpu", "cuda")


def adam_(parameters: Sequence[Tensor], state: dict[Tensor, dict[str, Any]], group: dict[str, Any], lr: Any) -> None:
    """One Adam step on every parameter that has a gradient, in place.

    Args:
        parameters: of any shapes; their gradients are read, their ``state`` created at their first step.
        state: the optimizer's.
        group: its "betas", "eps" and "weight_decay".
        lr: effective learning rate, a number or a 0-d tensor.
    """
    for parameter in parameters:
        if not state[parameter]:
            state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    states = [state[parameter] for parameter in parameters]
    beta1, beta2 = group["betas"]
    fused = all(parameter.device.type in _FUSED for parameter in parameters)
    adamw(
        list(parameters),
        [parameter.grad for parameter in parameters if parameter.grad is not None],
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        [s["step"] for s in states],
        fused=fused,
        foreach=False if fused else None,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
