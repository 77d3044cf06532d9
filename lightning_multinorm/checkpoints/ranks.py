"""What is done on every rank succeeds on all of them, or fails on all of them."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from lightning_multinorm.errors import UsageError

T = TypeVar("T")


def place() -> tuple[int, int]:
    """This process's rank, and how many there are; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def together(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Do something on every rank, and return the results of all by rank; a collective call, if there are several.

    Args:
        action: what to do on this rank. Its result is pickled.
        group: of all ranks. Default: the default group.

    Raises:
        Exception: on every rank, if it failed on any: its own, or the first rank's that failed.
    """
    if place()[1] == 1:
        return [action()]
    own: Exception | None = None
    outcome: tuple[Any, Exception | None]
    try:
        outcome = action(), None
    except Exception as error:
        own = error
        plain = isinstance(error, OSError | UsageError)  # not every other can be pickled
        outcome = None, error if plain else RuntimeError(f"{type(error).__name__}: {error}")
    outcomes: list[tuple[T, Exception | None]] = [None] * dist.get_world_size(group)  # type: ignore[list-item]
    dist.all_gather_object(outcomes, outcome, group=group)
    failures = [failure for _, failure in outcomes if failure is not None]
    if failures:
        raise own or failures[0]
    return [result for result, _ in outcomes]
