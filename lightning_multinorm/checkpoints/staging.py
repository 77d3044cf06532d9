"""Copies of checkpoints in host memory, from which they are written while the training goes on."""

from collections import defaultdict
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_multinorm.checkpoints.spread import State


class Staging:
    """Host memory that is used again by the next copies: new memory takes several times as long to fill.

    Pinned where tensors come from an accelerator. Shards are copied into new memory, since a `DTensor` makes its own.
    """

    def __init__(self) -> None:
        self._free: dict[Any, list[Tensor]] = defaultdict(list)

    def copy(self, state: State) -> tuple[State, list[Tensor]]:
        """A copy of all tensors, in which those that share memory still do; and what to give to `release` after use."""
        used: list[Tensor] = []
        copies: dict[Any, Tensor] = {}

        def place(tensor: Tensor) -> Tensor:
            tensor = tensor.detach()
            if isinstance(tensor, DTensor):
                return tensor.to("cpu", copy=True)
            same = tensor.data_ptr(), tensor.device, tensor.shape, tensor.stride(), tensor.dtype
            if same not in copies:
                free = self._free[_kind(tensor)]
                buffer = free.pop() if free else _new(tensor)
                used.append(buffer)
                copies[same] = buffer.copy_(tensor)
            return copies[same]

        return apply_to_collection(state, Tensor, place), used

    def release(self, used: list[Tensor]) -> None:
        """The copies were written."""
        for buffer in used:
            self._free[_kind(buffer)].append(buffer)


def _kind(tensor: Tensor) -> Any:
    return tensor.shape, tensor.dtype


def _new(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
