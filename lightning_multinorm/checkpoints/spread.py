"""Weights and optimizer states of spread models as whole tensors, as the whole model's ``state_dict()`` has them.

An optimizer without state is the ordinary case: it has no entry, and nothing is made up for it, neither a step on zero
gradients nor a tensor in its name.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_multinorm import layouts
from lightning_multinorm.layouts import FlatSlice, named_tensors

Slices = Mapping[nn.Parameter, FlatSlice]
State = dict[str, Any]


def whole_weights(module: nn.Module, slices: Slices, *, keep: bool) -> State:
    """``module.state_dict()`` with whole tensors on the CPU; a collective call.

    Args:
        module: spread over ranks.
        slices: where FSDP1 has put its parameters.
        keep: whether this rank wants the result; others get an empty one.
    """
    state: State = {}
    for name, tensor in named_tensors(module):
        value = layouts.whole(tensor, slices.get(tensor))  # type: ignore[call-overload]
        if keep:
            state[name] = value.cpu().clone()
    return state


def load_whole_weights(module: nn.Module, state: Mapping[str, Tensor], slices: Slices, *, strict: bool) -> None:
    """Copy whole tensors into a module that is spread over ranks; every rank reads its part.

    Raises:
        KeyError: if ``strict`` and names differ.
    """
    own = dict(named_tensors(module))
    if strict and own.keys() != state.keys():
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        raise KeyError(
            f"the checkpoint does not fit the model: it lacks {missing[:3]}, and has {unknown[:3]} beyond it"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if name in state:
                part = layouts.own(state[name], tensor, slices.get(tensor))  # type: ignore[call-overload]
                layouts.local(tensor).copy_(layouts.local(part))


def whole_optimizer(optimizer: Optimizer, slices: Slices, *, keep: bool) -> State:
    """``optimizer.state_dict()`` with whole tensors on the CPU; a collective call, empty where not kept."""

    def gather(parameter: Tensor, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.shape == parameter.shape:
            value = layouts.whole(value, slices.get(parameter))  # type: ignore[call-overload]
        return value.detach().cpu().clone() if keep else None

    state = _mapped(optimizer.state_dict(), optimizer, gather)
    return state if keep else {}


def load_whole_optimizer(optimizer: Optimizer, state: State, slices: Slices) -> None:
    """Load what `whole_optimizer` returned, on every rank."""

    def place(parameter: Tensor, value: Any) -> Any:
        flat = slices.get(parameter)  # type: ignore[call-overload]
        shape = parameter.shape if flat is None else flat.shape
        whole = isinstance(value, Tensor) and value.shape == shape
        return layouts.own(value, parameter, flat) if whole else value

    optimizer.load_state_dict(_mapped(state, optimizer, place))


def _mapped(state: State, optimizer: Optimizer, change: Callable[[Tensor, Any], Any]) -> State:
    """A state dict with every entry of a parameter's state changed."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    changed = {
        number: {key: change(parameters[number], value) for key, value in entries.items()}
        for number, entries in state["state"].items()
    }
    return {**state, "state": changed}
