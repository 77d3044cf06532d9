"""The states of the random number generators, which Lightning's checkpoints leave out."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_multinorm.checkpoints.ranks import place, together

KEY = "random_states"
"""Entry of a checkpoint: one state for each rank, of tensors and plain values."""


class RandomState(Callback):
    """Keeps the states of Python's, NumPy's, torch's and the CUDA device's generators in checkpoints, for every rank.

    A resumed run draws the numbers that the uninterrupted one would have drawn. On another number of ranks all go on
    from the first's state, as all begin with the same seed; that is said in one line.
    """

    def __init__(self) -> None:
        self._loaded: list[dict[str, Any]] = []

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = together(lambda: _states(pl_module.device))

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint.get(KEY, [])

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Not earlier: setting up draws numbers, too."""
        states, self._loaded = self._loaded, []
        if not states:
            return
        rank, ranks = place()
        if len(states) != ranks:
            rank_zero_info(
                f"The checkpoint holds the random states of {len(states)} rank(s), this run has {ranks}: all go on "
                "from the first's."
            )
            rank = 0
        _restore(states[rank], pl_module.device)


def _states(device: torch.device) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    states = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _restore(states: dict[str, Any], device: torch.device) -> None:
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
