"""What parameters get that are no hidden matrices: Adam with decoupled weight decay, as in the papers.

The arithmetic is `torch.optim.adamw.adamw`'s, so the state has AdamW's names and its memory. Bfloat16 parameters that
are rounded stochastically are computed in float32, a block at a time; their second moments are rounded stochastically
too, since a decay of 1/1000 is below what bfloat16 resolves, and they could otherwise only grow.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lightning_multinorm.layouts import local
from lightning_multinorm.rounding import store_rounded_
from lightning_multinorm.sinkhorn.select import has_numba

ROUNDED_BYTES = 64
"""Temporary memory of a stochastically rounded step, for each entry of a block."""
_ROUNDED_CPU, _ROUNDED_ACCELERATOR = 2**15, 2**21
_SECOND = 0x9E3779B9  # tells the noise of the second moment from the weight's
_FUSED = ("cpu", "cuda")


def adam_(
    parameters: Sequence[Tensor],
    state: dict[Tensor, dict[str, Any]],
    group: dict[str, Any],
    lr: Any,
    seeds: Sequence[Tensor | None],
) -> None:
    """One Adam step on every parameter, in place.

    Args:
        parameters: of any shapes, with gradients; their ``state`` is created at their first step.
        state: the optimizer's.
        group: its "betas", "eps" and "weight_decay".
        lr: effective learning rate, a number or a 0-d tensor.
        seeds: for each parameter, what it is rounded by stochastically, or None.
    """
    for parameter in parameters:
        if not state[parameter]:
            state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    _plain_adam_([p for p, seed in zip(parameters, seeds, strict=True) if seed is None], state, group, lr)
    for parameter, seed in zip(parameters, seeds, strict=True):
        if seed is not None:
            _rounded_adam_(parameter, state[parameter], group, lr, seed)


def _plain_adam_(
    parameters: Sequence[Tensor], state: dict[Tensor, dict[str, Any]], group: dict[str, Any], lr: Any
) -> None:
    states = [state[parameter] for parameter in parameters]
    beta1, beta2 = group["betas"]
    fused = all(parameter.device.type in _FUSED for parameter in parameters)
    adamw(
        # Elementwise, so shards need nothing of each other.
        [local(parameter) for parameter in parameters],
        [local(parameter.grad) for parameter in parameters if parameter.grad is not None],
        [local(s["exp_avg"]) for s in states],
        [local(s["exp_avg_sq"]) for s in states],
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


def _rounded_adam_(parameter: Tensor, state: dict[str, Any], group: dict[str, Any], lr: Any, seed: Tensor) -> None:
    state["step"] += 1
    step, (beta1, beta2) = state["step"], group["betas"]
    rate, root = lr / (1 - beta1**step), (1 - beta2**step).sqrt()
    assert parameter.grad is not None
    tensors = [local(x) for x in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])]
    seeds = seed, seed + _SECOND
    compiled = has_numba() and all(
        x.is_contiguous() and x.dtype is torch.bfloat16 and x.device.type == "cpu" for x in tensors
    )
    if compiled:
        from lightning_multinorm.optim import cpu_adam

        w, g, m, v = (x.flatten() for x in tensors)
        how = {"lr": float(lr), "decay": group["weight_decay"], "betas": (beta1, beta2), "eps": group["eps"]}
        cpu_adam.step_(w, g, m, v, (int(seeds[0]), int(seeds[1])), rate=float(rate), root=float(root), **how)
        return
    flat = [x.flatten() for x in tensors]
    size = rounded_block(parameter.device.type)
    for start in range(0, flat[0].numel(), size):
        w, g, m, v = (x[start : start + size] for x in flat)
        gradient = g.float()
        mean, variance = m.float().lerp_(gradient, 1 - beta1), v.float().mul_(beta2)
        variance.addcmul_(gradient, gradient, value=1 - beta2)
        moved = w.float().mul_(1 - lr * group["weight_decay"])
        moved.sub_(mean.mul(rate).div_(variance.sqrt().div_(root).add_(group["eps"])))
        store_rounded_(w.unsqueeze(1), moved.unsqueeze(1), seeds[0], first=start)
        m.copy_(mean)
        store_rounded_(v.unsqueeze(1), variance.unsqueeze(1), seeds[1], first=start)


def rounded_block(device: str) -> int:
    """Entries that a stochastically rounded step takes at a time, on a type of device."""
    return _ROUNDED_CPU if device == "cpu" else _ROUNDED_ACCELERATOR
