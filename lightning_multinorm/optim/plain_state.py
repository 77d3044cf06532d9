"""Objects in an optimizer's state as mappings of their attributes, so that a checkpoint holds data and no code."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_CLASS = "__class__"


def plain(value: Any) -> Any:
    """The value without objects: each is a mapping of its attributes, with the name of its class as ``__class__``."""
    if value is None or isinstance(value, Tensor | bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    kind = type(value)
    return {_CLASS: f"{kind.__module__}.{kind.__qualname__}", **plain(vars(value))}


def restored(value: Any, library: str, device: torch.device) -> Any:
    """The opposite of `plain`; nothing of an object's class is run.

    Args:
        value: what `plain` returned.
        library: the top package that objects may be of.
        device: where the tensors of objects go.

    Raises:
        ValueError: for an object of another package, or of a class that the package does not have.
    """
    if isinstance(value, list | tuple):
        return type(value)(restored(entry, library, device) for entry in value)
    if not isinstance(value, Mapping):
        return value
    if _CLASS not in value:
        return {key: restored(entry, library, device) for key, entry in value.items()}
    made: Any = object.__new__(_kind(value[_CLASS], library))
    for key, entry in value.items():
        if key != _CLASS:
            vars(made)[key] = restored(_moved(entry, device), library, device)
    return made


def _kind(path: str, library: str) -> type:
    module, _, name = path.rpartition(".")
    # What makes the objects has been imported by now; a checkpoint imports nothing.
    found = vars(sys.modules[module]).get(name) if module in sys.modules else None
    if module.partition(".")[0] != library or not isinstance(found, type) or found.__module__ != module:
        raise ValueError(f"the checkpoint's optimizer state holds a {path}, which {library} does not keep")
    return found


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_moved(entry, device) for entry in value)
    return value.to(device) if isinstance(value, Tensor) else value
