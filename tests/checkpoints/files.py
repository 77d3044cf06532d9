"""Small checkpoints, ways to damage them, and a process that is killed."""

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from lightning_multinorm.checkpoints.damage import FILES, META, checksums
from lightning_multinorm.checkpoints.files import new_folder
from lightning_multinorm.checkpoints.io import CheckpointFiles


def state(step: int = 0) -> dict[str, Any]:
    return {"global_step": step, "state_dict": {"weight": torch.full((64, 64), float(step))}}


def save(path: Path, step: int = 0) -> Path:
    CheckpointFiles().save_checkpoint(state(step), path)
    return path


def save_folder(path: Path, step: int = 0) -> Path:
    """What `folders.save_folder` writes, by one process without a process group."""
    with new_folder(path) as folder:
        tensors = {f"state_dict.{name}": tensor for name, tensor in state(step)["state_dict"].items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
        meta = {"global_step": step, "optimizer_groups": [], FILES: checksums(sorted(folder.iterdir()))}
        torch.save(meta, folder / META)
    return path


def step(path: Path) -> int:
    """Of a checkpoint, whose weights have to agree."""
    loaded = CheckpointFiles().load_checkpoint(path)
    assert loaded["state_dict"]["weight"].unique().tolist() == [loaded["global_step"]]
    return int(loaded["global_step"])


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """One bit: of the pickle's keys in a folder's `META`, else in the middle, which is of a tensor."""
    place = path.read_bytes().find(b"optimizer_groups") if path.name == META else path.stat().st_size // 2
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def killed(action: Callable[[], Any]) -> None:
    """Do something in a process that has to be killed while it does."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def kill_itself(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
