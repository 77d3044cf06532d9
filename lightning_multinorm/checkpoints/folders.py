"""Weights and optimizer states of spread models as folders of shards, in the format of `torch.distributed.checkpoint`.

The tensors are those of a single file, under ``state_dict.<name>`` and ``optimizer_<k>.<parameter's name>.<key>``. A
folder can be read with any number of ranks, and spread in any way.
"""

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.futures import Future
from torch.optim import Optimizer

from lightning_multinorm.checkpoints.damage import FILES, META, checksums
from lightning_multinorm.checkpoints.files import new_folder, system_error
from lightning_multinorm.checkpoints.metadata import Reader
from lightning_multinorm.checkpoints.ranks import together
from lightning_multinorm.checkpoints.spread import State
from lightning_multinorm.layouts import named_tensors


def shards(module: nn.Module, optimizers: list[Optimizer]) -> tuple[dict[str, Tensor], list[Any]]:
    """What a folder holds of a model and its optimizers, not copied.

    Returns:
        Tensors by their names in the folder, and for each optimizer its parameter groups, which are no tensors, and
        have to be kept elsewhere.
    """
    state: dict[str, Tensor] = {f"state_dict.{name}": tensor.detach() for name, tensor in named_tensors(module)}
    groups = []
    for k, optimizer in enumerate(optimizers):
        saved = optimizer.state_dict()
        groups.append(saved["param_groups"])
        names = _names(saved["param_groups"])
        for number, entries in saved["state"].items():
            state |= {f"optimizer_{k}.{names[number]}.{key}": torch.as_tensor(value) for key, value in entries.items()}
    return state, groups


def save_folder(path: Path, state: dict[str, Tensor], meta: State, group: dist.ProcessGroup | None = None) -> None:
    """Write every rank's shards, and beside them what is no tensor; a collective call.

    Args:
        path: of the folder, which appears when it is whole.
        state: what `shards` returned.
        meta: the same on every rank; the first's is written.
        group: of all ranks. Default: the default group.

    Raises:
        OSError: on every rank, if any could not write. What was at ``path`` is still there.
    """
    first = dist.get_rank() == 0
    with ExitStack() as stack:
        made = together(lambda: stack.enter_context(new_folder(path)) if first else None, group)
        temporary = next(folder for folder in made if folder is not None)
        together(lambda: _write(temporary, state, group), group)
        written = together(lambda: checksums(sorted(temporary.glob(f"__{dist.get_rank()}_*"))), group)
        if first:
            table = {name: entry for part in written for name, entry in part.items()}
            together(lambda: _finish(stack, temporary, {**meta, FILES: table}), group)
        else:
            together(lambda: None, group)


def _finish(stack: ExitStack, folder: Path, meta: State) -> None:
    meta[FILES] |= checksums([folder / ".metadata"])
    with (folder / META).open("wb") as file:
        torch.save(meta, file)
        file.flush()
        os.fsync(file.fileno())
    stack.close()  # the folder takes its name


def _write(folder: Path, state: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    try:
        dcp.save(state, storage_writer=_Writer(folder), process_group=group)
    except dcp.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, OSError)), causes[0]) from error


class _Writer(dcp.FileSystemWriter):
    """Says why it could not write: torch raises an error of its own on top, and only that reaches other ranks."""

    def write_data(self, *args: Any, **kwargs: Any) -> Future[list[Any]]:
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:
            raise system_error(error) from error


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
    dcp.load(wanted, storage_reader=Reader(path))
    for optimizer, saved in loads:
        optimizer.load_state_dict(saved)


def read_folder(path: Path, groups: list[Any]) -> tuple[State, list[State]]:
    """Weights and optimizer states of a folder as a single file would hold them; reads alone, on one process.

    Args:
        path: of the folder.
        groups: the parameter groups of each optimizer whose states are wanted; none, and weights alone are read.
    """
    stored = _stored(path)
    entries = [list(_entries(stored, k, saved_groups)) for k, saved_groups in enumerate(groups)]
    wanted = {key for key in stored if key.startswith("state_dict.")}
    wanted |= {key for optimizer in entries for _, _, key in optimizer}
    tensors = {
        key: torch.empty(place.size, dtype=place.properties.dtype) for key, place in stored.items() if key in wanted
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # that is meant
        dcp.load(tensors, storage_reader=Reader(path), no_dist=True)
    weights = {k.removeprefix("state_dict."): v for k, v in tensors.items() if k.startswith("state_dict.")}
    optimizers = []
    for found, saved_groups in zip(entries, groups, strict=True):
        state: dict[int, dict[str, Tensor]] = {}
        for number, name, key in found:
            state.setdefault(number, {})[name] = tensors[key]
        optimizers.append({"state": state, "param_groups": saved_groups})
    return weights, optimizers


def _stored(path: Path) -> dict[str, TensorStorageMetadata]:
    metadata = Reader(path).read_metadata().state_dict_metadata
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
