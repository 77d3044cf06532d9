"""Weights and optimizer states of spread models, to and from checkpoints that do not depend on how they are spread.

Two formats: a single file, which holds what the whole model's and the optimizer's ``state_dict()`` would, and a folder
of shards in the format of `torch.distributed.checkpoint`, whose tensors are the same, under ``state_dict.<name>`` and
``optimizer_<k>.<parameter's name>.<key>``. Either can be read with any number of ranks, and spread in any way.

An optimizer without state is the ordinary case: it has no entry, and nothing is made up for it, neither a step on zero
gradients nor a tensor in its name.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from lightning_multinorm import layouts
from lightning_multinorm.layouts import FlatSlice, named_tensors

Slices = Mapping[nn.Parameter, FlatSlice]
State = dict[str, Any]


def is_folder(path: Path) -> bool:
    """Whether a checkpoint is a folder of shards."""
    return path.is_dir() and (path / ".metadata").is_file()


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


def save_folder(path: Path, module: nn.Module, optimizers: list[Optimizer]) -> list[Any]:
    """Write every rank's shards; a collective call.

    Returns:
        For each optimizer its parameter groups, which are no tensors, and have to be kept elsewhere.
    """
    state: dict[str, Tensor] = {f"state_dict.{name}": tensor.detach() for name, tensor in named_tensors(module)}
    groups = []
    for k, optimizer in enumerate(optimizers):
        saved = optimizer.state_dict()
        groups.append(saved["param_groups"])
        names = _names(saved["param_groups"])
        for number, entries in saved["state"].items():
            state |= {f"optimizer_{k}.{names[number]}.{key}": torch.as_tensor(value) for key, value in entries.items()}
    dcp.save(state, checkpoint_id=path)
    return groups


def load_folder(path: Path, module: nn.Module, optimizers: list[Optimizer], groups: list[Any], *, strict: bool) -> None:
    """Read this rank's shards of a folder that any number of ranks has written; a collective call.

    Raises:
        KeyError: if ``strict`` and names differ.
    """
    stored = _stored(path)
    state = {f"state_dict.{name}": tensor.detach() for name, tensor in named_tensors(module)}
    missing = sorted(state.keys() - stored.keys())
    if missing and strict:
        raise KeyError(f"the checkpoint does not fit the model: it lacks {missing[:3]}")
    wanted: dict[str, Tensor] = {name: tensor for name, tensor in state.items() if name in stored}
    loads = []
    for k, (optimizer, saved_groups) in enumerate(zip(optimizers, groups, strict=True)):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        found: dict[int, dict[str, Tensor]] = {}
        for number, name, key in _entries(stored, k, saved_groups):
            parameter, place = parameters[number], stored[key]
            alike = place.size == parameter.shape
            dtype = place.properties.dtype
            value = torch.zeros_like(parameter, dtype=dtype) if alike else torch.zeros(place.size, dtype=dtype)
            found.setdefault(number, {})[name] = wanted[key] = value
        loads.append((optimizer, {"state": found, "param_groups": saved_groups}))
    dcp.load(wanted, checkpoint_id=path)
    for optimizer, saved in loads:
        optimizer.load_state_dict(saved)


def read_folder(path: Path, groups: list[Any]) -> tuple[State, list[State]]:
    """Weights and optimizer states of a folder as a single file would hold them; reads alone, on one process."""
    stored = _stored(path)
    tensors = {key: torch.empty(place.size, dtype=place.properties.dtype) for key, place in stored.items()}
    dcp.load(tensors, checkpoint_id=path, no_dist=True)
    weights = {k.removeprefix("state_dict."): v for k, v in tensors.items() if k.startswith("state_dict.")}
    optimizers = []
    for k, saved_groups in enumerate(groups):
        state: dict[int, dict[str, Tensor]] = {}
        for number, name, key in _entries(stored, k, saved_groups):
            state.setdefault(number, {})[name] = tensors[key]
        optimizers.append({"state": state, "param_groups": saved_groups})
    return weights, optimizers


def _stored(path: Path) -> dict[str, TensorStorageMetadata]:
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return {key: place for key, place in metadata.items() if isinstance(place, TensorStorageMetadata)}


def _entries(stored: Iterable[str], optimizer: int, groups: list[Any]) -> Iterator[tuple[int, str, str]]:
    """The states that a folder has of an optimizer: number of the parameter, name of the entry, key in the folder."""
    by_parameter: dict[str, list[str]] = {}
    for key in stored:
        by_parameter.setdefault(key.rpartition(".")[0], []).append(key)
    for number, name in _names(groups).items():
        for key in by_parameter.get(f"optimizer_{optimizer}.{name}", []):
            yield number, key.rpartition(".")[2], key


def _names(groups: list[Any]) -> dict[int, str]:
    """Each parameter's name by its number; the number itself where the optimizer was given no names."""
    names: dict[int, str] = {}
    for group in groups:
        own = group.get("param_names", [str(number) for number in group["params"]])
        names |= dict(zip(group["params"], own, strict=True))
    return names


def _mapped(state: State, optimizer: Optimizer, change: Callable[[Tensor, Any], Any]) -> State:
    """A state dict with every entry of a parameter's state changed."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    changed = {
        number: {key: change(parameters[number], value) for key, value in entries.items()}
        for number, entries in state["state"].items()
    }
    return {**state, "state": changed}
