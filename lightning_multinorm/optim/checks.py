"""What the optimizers refuse, with the way out."""

from typing import Any

import torch
from torch import Tensor

from lightning_multinorm.layouts import is_flat_slice
from lightning_multinorm.optim.auto_iterations import check_iterations


def check_hyperparameters(owner: str, values: dict[str, Any]) -> None:
    """Raises ValueError for a value out of range."""
    for name in ("lr", "matrix_lr_scale", "fallback_lr_scale", "weight_decay", "eps"):
        if not values[name] >= 0:
            raise ValueError(f"{owner}: {name}={values[name]} must not be negative")
    if len(values["betas"]) != 2 or not all(0 <= beta < 1 for beta in values["betas"]):
        raise ValueError(f"{owner}: betas={values['betas']} must be two numbers in [0, 1)")
    if "tolerance" in values:
        check_iterations(owner, values["iterations"], values["tolerance"], values["max_iterations"])


def check_parameter(owner: str, name: str, parameter: Tensor, *, located: bool) -> None:
    """Raises TypeError for a complex or integer parameter, ValueError for a slice of which nobody knows what of."""
    if not parameter.is_floating_point():
        raise TypeError(
            f"{owner}: {name} is {parameter.dtype}; only real floating-point parameters are supported. "
            "View a complex one with torch.view_as_real, or give it to another optimizer"
        )
    if is_flat_slice(parameter) and not located:
        raise ValueError(
            f"{owner}: {name} is a slice of a parameter that FSDP1 has flattened, and no longer shows its rows and "
            "columns; give the optimizer parameter_groups(model) of the wrapped model, or shard with FSDP2 "
            "(torch.distributed.fsdp.fully_shard, strategy fsdp2)"
        )


def check_gradient(owner: str, name: str, gradient: Tensor) -> None:
    """Raises RuntimeError for a sparse gradient."""

    if gradient.layout is not torch.strided:
        raise RuntimeError(
            f"{owner}: the gradient of {name} is sparse; use sparse=False in its embedding, "
            "or give it to another optimizer"
        )
