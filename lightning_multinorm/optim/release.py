"""Gradient release: each parameter is updated inside backward, as soon as its gradient is complete, and that is freed.

No more than one gradient (under FSDP2, one block's) is ever alive. The arithmetic is that of a step after backward:
updates of one parameter never depend on another's.
"""

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_multinorm.layouts import is_dtensor, is_flat_slice
from lightning_multinorm.layouts.clipping import gradient_norm, nonfinite_entries
from lightning_multinorm.optim.base import MultiNormOptimizer


@dataclass
class Released:
    """The gradients of a step that are gone when it ends.

    Attributes:
        square: of their common norm.
        left: parameters that were not updated, and how many entries of their gradients were NaN or infinite.
    """

    square: float = 0.0
    left: list[tuple[Tensor, int]] = field(default_factory=list)


def release_gradients(optimizer: MultiNormOptimizer) -> list[RemovableHandle]:
    """Update every parameter of an optimizer inside backward, and free its gradient.

    Call ``optimizer.step()`` after backward as before: it finds no gradients, counts the step, and lets schedulers go
    on. What needs all gradients at once, or a parameter's gradient of several backward passes, cannot be had:
    accumulation, clipping by the norm of all gradients (which changes nothing for normalised matrices anyway), and
    float16's loss scaling.

    A parameter whose gradient is NaN or infinite anywhere, on any rank, is not updated, nor is its state; the others
    are. ``optimizer.step()`` warns of it, unless someone has taken it from ``optimizer.released``, as the callback
    `NonFiniteGradients` does. To know it, the host waits for each gradient.

    Args:
        optimizer: its parameters whole on one device, or DTensors, whose gradients FSDP2 has reduced by then.

    Returns:
        Handles that end the release when they are removed.

    Raises:
        ValueError: if gradients would be used before other ranks' have been added: under DDP and FSDP1, which reduce
            them later.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(is_flat_slice(p) for p in parameters):
        raise ValueError(
            "gradient release cannot work under FSDP1, which reduces gradients after they are seen; use fsdp2"
        )
    spread = any(is_dtensor(p) for p in parameters)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and not spread:
        raise ValueError(
            f"gradient release on {dist.get_world_size()} ranks would use gradients before DDP has averaged them, and "
            "the ranks would part; use fsdp2, which reduces them first, or a single device"
        )
    optimizer.released = Released()

    def update(parameter: Tensor) -> None:
        released, norm = optimizer.released, gradient_norm([parameter]).item()
        assert released is not None
        released.square += norm * norm
        # A norm that is not finite may be that of a gradient that is, but whose squares overflow.
        wrong = 0 if math.isfinite(norm) else int(nonfinite_entries([parameter]))
        if wrong:
            released.left.append((parameter, wrong))
        else:
            optimizer.step_parameter(parameter)
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(update) for p in parameters if p.requires_grad]
    return [*hooks, optimizer.register_step_post_hook(_end_step)]


def _end_step(optimizer: Any, *_: Any) -> None:
    if optimizer.released.left:
        warnings.warn(
            f"{len(optimizer.released.left)} parameters were not updated in this step, since their gradients were NaN "
            "or infinite; lower the learning rate if that goes on",
            stacklevel=3,  # where step() was called
        )
    optimizer.released = Released()
