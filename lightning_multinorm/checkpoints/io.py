"""The plugin that writes and reads single-file checkpoints for Lightning's Trainer."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from lightning_multinorm.checkpoints.background import Background
from lightning_multinorm.checkpoints.damage import is_folder
from lightning_multinorm.checkpoints.files import new_file, remove, system_error
from lightning_multinorm.checkpoints.last import SAVED_AT, newest, whole
from lightning_multinorm.checkpoints.reading import read_file, read_whole
from lightning_multinorm.checkpoints.spread import State
from lightning_multinorm.errors import UsageError

_Path = str | Path


class CheckpointFiles(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all, are checked before they are read, and run no code when read.

    For any Trainer: ``Trainer(plugins=[CheckpointFiles()])``; the strategies of this package use it by themselves. It
    also reads folders of shards. Paths with a protocol ("s3://...") are left to Lightning.

    Args:
        asynchronous: write beside the training, which goes on once the tensors are copied; needs memory for two copies.
            An error ends the run at the next checkpoint, or at the end of the training. Default: False.

    Raises:
        UsageError: from writing, with the reason, and the last good checkpoint; from reading, with what is wrong.
    """

    def __init__(self, asynchronous: bool = False) -> None:
        self.background = Background() if asynchronous else None

    @override
    def save_checkpoint(self, checkpoint: State, path: _Path, storage_options: Any | None = None) -> None:
        if storage_options is not None or _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target, checkpoint = Path(path), {**checkpoint, SAVED_AT: time.time()}
        if self.background is None:
            write_file(checkpoint, target)
            return
        self.background.settle()
        self.background.write(checkpoint, lambda copied: write_file(copied, target))

    @override
    def load_checkpoint(
        self, path: _Path, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> State:
        """Read a checkpoint; with a process group, every rank has to."""
        if _is_remote(path):
            return super().load_checkpoint(
                path, map_location or (lambda storage, _: storage), weights_only is not False
            )
        self.wait()
        found = whole(Path(path))
        if is_folder(found):
            return read_whole(found, weights_only)
        return read_file(found, weights_only, map_location=map_location or "cpu")

    @override
    def remove_checkpoint(self, path: _Path) -> None:
        """Remove it, after what is being written: until then it may be the last good one."""
        if _is_remote(path):
            super().remove_checkpoint(path)
        elif self.background is None:
            remove(Path(path))
        else:
            self.background.submit(lambda: remove(Path(path)))

    def wait(self) -> None:
        """Until what was to be written is on the disk."""
        if self.background is not None:
            self.background.wait()

    @override
    def teardown(self) -> None:
        self.wait()


def write_file(checkpoint: State, target: Path) -> None:
    """Write a single-file checkpoint.

    Raises:
        UsageError: see `CheckpointFiles`.
    """
    with explained(target), new_file(target) as file:
        torch.save(checkpoint, file)


@contextmanager
def explained(target: Path) -> Iterator[None]:
    """Say in one sentence why a checkpoint could not be written, and which is the last good one."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = system_error(error)
        if not isinstance(cause, OSError):
            raise
        good, _ = newest([target.parent])
        good_one = f"the last good one is {good}" if good else f"there is no good one in {target.parent} yet"
        raise UsageError(
            f"the checkpoint {target} could not be written ({cause.strerror or cause}); {good_one}. Make room, then go "
            "on with --ckpt_path last"
        ) from error


def _is_remote(path: _Path) -> bool:
    return "://" in str(path)
