"""A stream's place in checkpoints: that of every rank, and a refusal of any other stream. Stands on `loader`, `errors`.

A checkpoint is written by one rank and read by all, and Lightning keeps rank 0's state of the data alone.
"""

from typing import Any

import torch

from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.lanes import Place
from lightning_multinorm.data.loader import Places

State = dict[str, Any]


def gather_places(own: Places, rank: int, world_size: int) -> list[dict[int, list[int]]]:
    """The places of all ranks' workers, by rank, as plain numbers; a collective call.

    Args:
        own: This process's.
        rank: This process among those that see different data.
        world_size: Number of these; processes that share a batch share its place.
    """
    plain = {worker: place.state() for worker, place in own.items()}
    if world_size == 1:
        return [plain]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, (rank, plain))
    return [places for _, places in sorted(dict(gathered).items())]


def resumed_places(state: State, rank: int) -> tuple[int, Places] | None:
    """Of a checkpoint: how many batches each rank was done with, and where this one's workers go on; None without."""
    if "rows" in state:  # of prepared data, whose batches are found by their number alone
        return state["batches"], {}
    if "places" not in state:
        return None
    return state["batches"], {worker: Place(*numbers) for worker, numbers in state["places"][rank].items()}


def refuse_other_data(saved: State, identity: State) -> None:
    """Compare the stream of a checkpoint with the one that is asked for.

    Raises:
        DataError: If they differ.
    """
    for name, value in identity.items():
        before = saved.get(name, value)
        if before != value:
            raise DataError(
                f"the checkpoint was trained with data.{name} = {before}, now it is {value}, so its place in the "
                f"data cannot be found again; restore that {name}, or start anew from the weights alone."
            )
