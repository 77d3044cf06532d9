"""How Lightning strategies save and load: agreed by all ranks, and not depending on how a model is spread."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_multinorm.checkpoints import spread
from lightning_multinorm.checkpoints.damage import is_folder
from lightning_multinorm.checkpoints.folders import load_folder, save_folder, shards
from lightning_multinorm.checkpoints.io import CheckpointFiles, explained
from lightning_multinorm.checkpoints.last import SAVED_AT, whole
from lightning_multinorm.checkpoints.ranks import together
from lightning_multinorm.checkpoints.reading import read_meta, read_whole
from lightning_multinorm.checkpoints.spread import State
from lightning_multinorm.errors import UsageError
from lightning_multinorm.layouts import flat_slices

_Path = str | Path


class AgreedCheckpoints(Strategy):
    """A checkpoint that one rank cannot write ends the run on all of them."""

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        """`CheckpointFiles`, unless the Trainer was given another plugin."""
        if self._checkpoint_io is None:
            self._checkpoint_io = CheckpointFiles()
        return super().checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @override
    def save_checkpoint(self, checkpoint: State, filepath: _Path, storage_options: Any = None) -> None:
        io = self.checkpoint_io
        together(lambda: io.save_checkpoint(checkpoint, filepath, storage_options) if self.is_global_zero else None)


class SpreadCheckpoints(AgreedCheckpoints):
    """Checkpoints that do not depend on how a model is spread; see `spread` and `folders`."""

    in_folders: bool = False
    """Whether a checkpoint is a folder into which every rank writes its shards, or a single file."""
    _writers: dist.ProcessGroup | None = None  # for what is written beside the training

    @override
    def lightning_module_state_dict(self) -> State:
        if self.in_folders:
            return {}  # `save_checkpoint` reads the module itself
        return spread.whole_weights(self._module, self._slices, keep=self.is_global_zero)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> State:
        if self.in_folders:
            return {}
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return spread.whole_optimizer(optimizer, self._slices, keep=self.is_global_zero)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: `load_checkpoint` has loaded the weights already."""

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing: `load_checkpoint` has loaded the states already."""

    @override
    def save_checkpoint(self, checkpoint: State, filepath: _Path, storage_options: Any = None) -> None:
        path = Path(self.broadcast(filepath))
        if not self.in_folders:
            AgreedCheckpoints.save_checkpoint(self, checkpoint, path, storage_options)  # past Lightning's
            return
        # Lightning leaves the optimizers out of a checkpoint of weights alone.
        optimizers = self.optimizers if checkpoint.pop("optimizer_states", None) is not None else []
        checkpoint.pop("state_dict", None)
        state, groups = shards(self._module, optimizers)
        meta = {**checkpoint, "optimizer_groups": groups, SAVED_AT: time.time()}
        background = self.checkpoint_io.background if isinstance(self.checkpoint_io, CheckpointFiles) else None
        if background is None:
            with explained(path):
                save_folder(path, state, meta)
            return
        together(background.settle)
        if self._writers is None:
            self._writers = dist.new_group(backend="gloo")
        background.write({"shards": state, "meta": meta}, lambda copied: self._write_copy(path, **copied))

    def _write_copy(self, path: Path, shards: dict[str, Tensor], meta: State) -> None:
        with explained(path):
            save_folder(path, shards, meta, self._writers)

    @override
    def load_checkpoint(self, checkpoint_path: _Path, weights_only: bool | None = None) -> State:
        if isinstance(self.checkpoint_io, CheckpointFiles):
            self.checkpoint_io.wait()
        path, strict = whole(Path(self.broadcast(checkpoint_path))), self._module.strict_loading
        optimizers = self.optimizers if self._module.trainer.state.fn == TrainerFn.FITTING else []
        slices = self._slices
        if is_folder(path) and not slices:
            meta = read_meta(path, weights_only)
            groups = meta.pop("optimizer_groups", [])
            _check_optimizers(path, optimizers, groups)
            load_folder(path, self._module, optimizers, groups[: len(optimizers)], strict=strict)
            return meta
        checkpoint = read_whole(path, weights_only)
        spread.load_whole_weights(self._module, checkpoint.pop("state_dict"), slices, strict=strict)
        states = checkpoint.pop("optimizer_states", [])
        _check_optimizers(path, optimizers, states)
        for optimizer, state in zip(optimizers, states, strict=False):
            spread.load_whole_optimizer(optimizer, state, slices)
        return checkpoint

    @property
    def _module(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _slices(self) -> spread.Slices:
        return flat_slices(self.model) if self.model is not None else {}


def _check_optimizers(path: Path, optimizers: list[Optimizer], saved: list[Any]) -> None:
    if optimizers and len(saved) != len(optimizers):
        raise UsageError(
            f"{path} holds {len(saved)} optimizers, this run has {len(optimizers)}: to begin a new run from its "
            "weights, load them with load_from_checkpoint; to go on, give the configuration that wrote it"
        )
