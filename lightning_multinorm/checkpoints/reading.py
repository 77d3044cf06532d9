"""Checkpoints of either format as a single file would hold them; nothing in them is run unless that is asked for."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from lightning_multinorm.checkpoints.damage import FILES, META, is_folder
from lightning_multinorm.checkpoints.files import existing
from lightning_multinorm.checkpoints.folders import read_folder
from lightning_multinorm.checkpoints.spread import State
from lightning_multinorm.errors import UsageError


def read_whole(path: Path, weights_only: bool | None = None) -> State:
    """A checkpoint with whole tensors on the CPU, whether it is a file or a folder of shards; reads alone.

    Args:
        path: of the checkpoint.
        weights_only: False reads any Python object from it, which can run code: only for what one trusts. Default:
            tensors and plain values alone.

    Raises:
        UsageError: if it is neither, is damaged, or holds more than that.
    """
    path = existing(path)
    if not is_folder(path):
        return read_file(path, weights_only, mmap=True)
    meta = read_meta(path, weights_only)
    groups = meta.pop("optimizer_groups", [])
    weights, optimizers = read_folder(path, groups)
    return {**meta, "state_dict": weights, **({"optimizer_states": optimizers} if optimizers else {})}


def read_weights(path: Path) -> State:
    """A checkpoint without the states of its optimizers, which are neither read nor kept in memory.

    The tensors of a single file stay on the disk until they are used. Raises as `read_whole` does.
    """
    path = existing(path)
    if is_folder(path):
        meta = read_meta(path)
        meta.pop("optimizer_groups", None)
        return {**meta, "state_dict": read_folder(path, [])[0]}
    state = read_file(path, mmap=True)
    if not isinstance(state, dict):
        raise UsageError(f"{path} is no checkpoint, but a {type(state).__name__}")
    state.pop("optimizer_states", None)
    return state


def read_meta(folder: Path, weights_only: bool | None = None) -> State:
    """What a folder of shards holds beside tensors."""
    meta = read_file(folder / META, weights_only)
    meta.pop(FILES, None)
    return meta


def read_file(path: Path, weights_only: bool | None = None, *, mmap: bool = False, map_location: Any = "cpu") -> State:
    """A file that `torch.save` has written; see `read_whole`."""
    if not path.is_file():
        raise UsageError(f"{path} is no checkpoint: neither a file nor a folder of shards")
    safe = weights_only is not False  # torch and Lightning take None for either, depending on their versions
    try:
        state: State = torch.load(path, mmap=mmap, map_location=map_location, weights_only=safe)
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise UsageError(f"{path} is damaged, or no checkpoint ({_first_line(error)})") from error
    return state


def _refused(path: Path, error: pickle.UnpicklingError) -> UsageError:
    found = re.search(r"GLOBAL (\S+)", str(error))
    what = found[1] if found else _first_line(error)
    return UsageError(
        f"{path} holds more than tensors and plain values ({what}), and reading that could run code; nothing was read. "
        "If you know where it comes from, read it with weights_only=False"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
