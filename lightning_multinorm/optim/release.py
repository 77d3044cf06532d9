"""Gradient release: each parameter is updated inside backward, as soon as its gradient is complete, and that is freed.

No more than one gradient (under FSDP2, one block's) is ever alive. The arithmetic is that of a step after backward:
updates of one parameter never depend on another's.
"""

import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_multinorm.layouts import is_dtensor, is_flat_slice
from lightning_multinorm.optim.base import MultiNormOptimizer


def release_gradients(optimizer: MultiNormOptimizer) -> list[RemovableHandle]:
    """Update every parameter of an optimizer inside backward, and free its gradient.

    Call ``optimizer.step()`` after backward as before: it finds no gradients, counts the step, and lets schedulers go
    on. What needs all gradients at once, or a parameter's gradient of several backward passes, cannot be had:
    accumulation, clipping by the norm of all gradients (which changes nothing for normalised matrices anyway), and
    float16's loss scaling.

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

    def update(parameter: Tensor) -> None:
        optimizer.step_parameter(parameter)
        parameter.grad = None

    return [p.register_post_accumulate_grad_hook(update) for p in parameters if p.requires_grad]
