"""The newest whole checkpoint of a run."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lightning_multinorm.checkpoints.damage import META, damage
from lightning_multinorm.checkpoints.files import existing, set_aside
from lightning_multinorm.checkpoints.ranks import place, together
from lightning_multinorm.errors import UsageError

SAVED_AT = "saved_at"
"""Entry of a checkpoint: when its writing began, in seconds since 1970. Unlike a file's time it survives copying."""
SUFFIX = ".ckpt"


def newest(folders: Iterable[Path], *, without: Path | None = None) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint, by when it was saved: after a run was resumed from an earlier one, its steps repeat.

    Args:
        folders: with checkpoints in them.
        without: a checkpoint to leave out.

    Returns:
        Its path, None if there is none; and the newer ones that were passed over, with what is wrong with each.
    """
    found = [path for folder in folders for path in [*folder.glob(f"[!.]*{SUFFIX}"), *set_aside(folder)]]
    passed: dict[Path, str] = {}
    for path in sorted((path for path in found if path != without), key=_saved_at, reverse=True):
        wrong = damage(path)
        if wrong is None:
            return path, passed
        passed[path] = wrong
    return None, passed


def whole(path: Path) -> Path:
    """Where a checkpoint lies, once it was found to be whole; a collective call, which reads all of it.

    Raises:
        UsageError: on every rank, naming what is wrong, and the newest whole checkpoint beside it.
    """
    path, (rank, ranks) = existing(path), place()
    wrongs = together(lambda: damage(path, rank, ranks) if rank == 0 or path.is_dir() else None)
    for wrong in wrongs:
        if wrong is not None:
            raise UsageError(f"the checkpoint {path} is not usable: {wrong}. {beside(path)}")
    return path


def beside(path: Path) -> str:
    """A sentence on the newest whole checkpoint beside one that is not."""
    other, _ = newest([path.parent], without=path)
    return f"The newest whole checkpoint beside it is {other}" if other else "There is no whole checkpoint beside it"


def _saved_at(path: Path) -> float:
    try:
        file = path / META if path.is_dir() else path
        state: dict[str, Any] = torch.load(file, mmap=True, map_location="cpu", weights_only=True)
        return float(state[SAVED_AT])
    except Exception:  # damaged, of a stranger, or of another program: this is only to sort by
        return path.stat().st_mtime
