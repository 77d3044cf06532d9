"""Lightning strategies for spread models, whose checkpoints an optimizer without state survives.

Registered under the names that ``Trainer(strategy=...)`` and ``--trainer.strategy`` take, once this module is imported:

- ``fsdp2``: weights, gradients and states sharded over all devices (`torch.distributed.fsdp.fully_shard`);
- ``hsdp``: sharded within each machine, replicated over the machines;
- ``tp``: tensor parallelism within each machine, ``fsdp2`` over the machines;
- ``fsdp``: FSDP1 (`torch.distributed.fsdp.FullyShardedDataParallel`), for projects that are built on it.

Lightning's own strategies fail, or take a step on zero gradients, when a checkpoint's optimizer has no state.
"""

import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_multinorm import checkpoints
from lightning_multinorm.errors import UsageError
from lightning_multinorm.layouts import flat_slices
from lightning_multinorm.optim.base import MultiNormOptimizer

META = "meta.pt"
"""In a folder of shards: what a checkpoint holds beside tensors. Lightning's name."""
_Path = str | Path


class _SpreadCheckpoints(Strategy):
    """Checkpoints that do not depend on how a model is spread; see `checkpoints`."""

    in_folders: bool = False
    """Whether a checkpoint is a folder into which every rank writes its shards, or a single file."""

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self.in_folders:
            return {}  # `save_checkpoint` reads the module itself
        return checkpoints.whole_weights(self._module, self._slices, keep=self.is_global_zero)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if self.in_folders:
            return {}
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return checkpoints.whole_optimizer(optimizer, self._slices, keep=self.is_global_zero)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: `load_checkpoint` has loaded the weights already."""

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing: `load_checkpoint` has loaded the states already."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _Path, storage_options: Any = None) -> None:
        path = Path(self.broadcast(filepath))
        if not self.in_folders:
            if self.is_global_zero and checkpoints.is_folder(path):
                shutil.rmtree(path)
            Strategy.save_checkpoint(self, checkpoint, path, storage_options)  # past what is between in the MRO
            return
        if self.is_global_zero and path.is_file():
            path.unlink()
        self.barrier()
        # Lightning leaves the optimizers out of a checkpoint of weights alone.
        optimizers = self.optimizers if checkpoint.pop("optimizer_states", None) is not None else []
        checkpoint.pop("state_dict", None)
        groups = checkpoints.save_folder(path, self._module, optimizers)
        if self.is_global_zero:
            torch.save({**checkpoint, "optimizer_groups": groups}, path / META)
        self.barrier()

    @override
    def load_checkpoint(self, checkpoint_path: _Path, weights_only: bool | None = None) -> dict[str, Any]:
        path, strict = Path(self.broadcast(checkpoint_path)), self._module.strict_loading
        optimizers = self.optimizers if self._module.trainer.state.fn == TrainerFn.FITTING else []
        slices = self._slices
        if checkpoints.is_folder(path) and not slices:
            meta: dict[str, Any] = torch.load(path / META, map_location="cpu", weights_only=weights_only)
            groups = meta.pop("optimizer_groups", [])
            _check_optimizers(path, optimizers, groups)
            checkpoints.load_folder(path, self._module, optimizers, groups[: len(optimizers)], strict=strict)
            return meta
        checkpoint = read_whole(path, weights_only)
        checkpoints.load_whole_weights(self._module, checkpoint.pop("state_dict"), slices, strict=strict)
        states = checkpoint.pop("optimizer_states", [])
        _check_optimizers(path, optimizers, states)
        for optimizer, state in zip(optimizers, states, strict=False):
            checkpoints.load_whole_optimizer(optimizer, state, slices)
        return checkpoint

    @property
    def _module(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _slices(self) -> checkpoints.Slices:
        return flat_slices(self.model) if self.model is not None else {}


def _check_optimizers(path: Path, optimizers: list[Optimizer], saved: list[Any]) -> None:
    if optimizers and len(saved) != len(optimizers):
        raise UsageError(
            f"{path} holds {len(saved)} optimizers, this run has {len(optimizers)}: to begin a new run from its "
            "weights, load them with load_from_checkpoint; to go on, give the configuration that wrote it"
        )


class ShardedStrategy(_SpreadCheckpoints, ModelParallelStrategy):
    """FSDP2, alone, replicated over groups of devices (HSDP) or over tensor parallelism.

    The LightningModule shards itself in ``configure_model``, over ``trainer.strategy.data_mesh`` and ``tensor_mesh``,
    as `LlamaPretraining` does and Lightning's `ModelParallelStrategy` asks for.

    Args:
        tensor_parallel_size: devices that share each layer's matrices; "machine": all of a machine. Default: 1, none.
        replicas: groups of devices that hold the same shards; "machines": one for each machine. Default: 1.
        in_folders: save each rank's shards into a folder (default), or whole tensors into a single file.
        reshard_after_forward: free gathered weights after a block's forward pass and gather them again for the backward
            pass (default), or keep them.
        process_group_backend: of `torch.distributed`; default: by device.
        timeout: of a collective.

    Raises:
        UsageError: at setup, if the sizes do not divide the number of devices.
    """

    def __init__(
        self,
        tensor_parallel_size: int | Literal["machine"] = 1,
        replicas: int | Literal["machines"] = 1,
        in_folders: bool = True,
        reshard_after_forward: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=in_folders, process_group_backend=process_group_backend, timeout=timeout
        )
        self.in_folders = in_folders
        self.reshard_after_forward = reshard_after_forward
        self._asked = tensor_parallel_size, replicas

    @override
    def setup_environment(self) -> None:
        tensor, replicas = self._asked
        tensor = self.num_processes if tensor == "machine" else tensor
        replicas = self.num_nodes if replicas == "machines" else replicas
        world = self.num_processes * self.num_nodes
        if world % (tensor * replicas):
            raise UsageError(
                f"tensor_parallel_size={tensor} times replicas={replicas} must divide the number of devices, {world}"
            )
        self._tensor_parallel_size, self._data_parallel_size = tensor, world // tensor
        super().setup_environment()
        self._replicas = replicas
        if replicas > 1:
            shape, names = (replicas, world // tensor // replicas, tensor), ("replicate", "shard", "tensor_parallel")
            mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
            mesh["replicate", "shard"]._flatten("data_parallel")  # found under this name by Lightning
            self._device_mesh = mesh
            self._module._device_mesh = mesh

    @property
    def data_mesh(self) -> DeviceMesh | None:
        """For FSDP2: one dimension, or two to replicate over the first; None if tensor parallelism takes all."""
        if self._replicas > 1:
            return self.device_mesh["replicate", "shard"]
        mesh = self.device_mesh["data_parallel"]
        return mesh if mesh.size() > 1 or self.tensor_mesh is None else None

    @property
    def tensor_mesh(self) -> DeviceMesh | None:
        """For tensor parallelism; None if there is none."""
        mesh = self.device_mesh["tensor_parallel"]
        return mesh if mesh.size() > 1 else None

    @property
    def mixed_precision(self) -> MixedPrecisionPolicy:
        """FSDP2's: gradients are always added up in float32; "bf16-mixed" gathers weights in bfloat16."""
        mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        return MixedPrecisionPolicy(param_dtype=mixed.get(self.precision_plugin.precision), reduce_dtype=torch.float32)


class FlatStrategy(_SpreadCheckpoints, FSDPStrategy):
    """FSDP1, with parameters kept apart, so that rows and columns are still known; single-file checkpoints.

    Modules in a ``ModuleList`` (blocks) are wrapped each, unless ``auto_wrap_policy`` says otherwise. A LightningModule
    gives its optimizer ``parameter_groups(self.trainer.strategy.model)``, as `LlamaPretraining` does.

    Args:
        **kwargs: `lightning.pytorch.strategies.FSDPStrategy`'s.
    """

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.pop("state_dict_type", "full") != "full":
            raise UsageError("FSDP1 saves single files here; for checkpoints in shards use the strategy fsdp2")
        super().__init__(state_dict_type="full", **kwargs)

    @override
    def _setup_model(self, model: nn.Module) -> nn.Module:
        blocks = {type(block) for part in model.modules() if isinstance(part, nn.ModuleList) for block in part}
        self.kwargs.setdefault("auto_wrap_policy", ModuleWrapPolicy(blocks))
        return FullyShardedDataParallel(
            model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device,
            **{**self.kwargs, "use_orig_params": True},
        )


class FolderReadingIO(TorchCheckpointIO):
    """Lets a model that is not sharded continue from a folder of shards."""

    @override
    def load_checkpoint(self, path: _Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if checkpoints.is_folder(Path(path)):
            return read_whole(Path(path), kwargs.get("weights_only"))
        return super().load_checkpoint(path, *args, **kwargs)


def read_whole(path: Path, weights_only: bool | None = None) -> dict[str, Any]:
    """A checkpoint with whole tensors on the CPU, whether it is a file or a folder of shards; reads alone.

    Raises:
        UsageError: if it is neither.
    """
    if checkpoints.is_folder(path):
        meta: dict[str, Any] = torch.load(path / META, map_location="cpu", weights_only=weights_only)
        weights, optimizers = checkpoints.read_folder(path, meta.pop("optimizer_groups", []))
        return {**meta, "state_dict": weights, **({"optimizer_states": optimizers} if optimizers else {})}
    if not path.is_file():
        raise UsageError(f"{path} is no checkpoint: neither a file nor a folder of shards")
    checkpoint: dict[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
    return checkpoint


def batches_side_by_side(trainer: Trainer) -> int:
    """How many different batches the devices take at a time: one for each that tensor parallelism does not share."""
    shares = trainer.distributed_sampler_kwargs
    return int(shares["num_replicas"]) if shares else 1


def is_flat(trainer: Trainer) -> bool:
    """Whether FSDP1 has flattened the parameters of the trainer's model."""
    return isinstance(trainer.strategy.model, FullyShardedDataParallel)


def check_release(trainer: Trainer, optimizer: Optimizer) -> MultiNormOptimizer:
    """The optimizer, if releasing its gradients does not change the training.

    Raises:
        UsageError: with the option that stands in its way.
    """
    if not isinstance(optimizer, MultiNormOptimizer):
        raise UsageError(
            f"gradient_release is for SinkGD, SWAN and MultiNormGD, not for {type(optimizer).__name__}; turn it off"
        )
    if trainer.accumulate_grad_batches != 1:
        raise UsageError(
            f"gradient_release cannot accumulate over {trainer.accumulate_grad_batches} batches, since a gradient is "
            "used and freed as soon as it is made; set trainer.accumulate_grad_batches=1, or turn gradient_release off"
        )
    if trainer.gradient_clip_val:
        raise UsageError(
            f"gradient_release cannot clip gradients (trainer.gradient_clip_val={trainer.gradient_clip_val}): their "
            "norm is known when the last is made, and then the first are gone; set it to null, or turn release off"
        )
    if trainer.precision.startswith("16"):
        raise UsageError(
            f"gradient_release cannot undo the loss scaling of trainer.precision={trainer.precision}; use bf16-true, "
            "bf16-mixed or 32-true"
        )
    if is_flat(trainer) or (isinstance(trainer.strategy, DDPStrategy) and trainer.world_size > 1):
        raise UsageError(
            "gradient_release under DDP or FSDP1 would use gradients that other ranks' have not been added to yet; use "
            "the strategy fsdp2, or a single device"
        )
    return optimizer


def _register() -> None:
    for name, strategy, description, arguments in (
        ("fsdp2", ShardedStrategy, "FSDP2 over all devices", {}),
        ("hsdp", ShardedStrategy, "FSDP2 within each machine, replicated over machines", {"replicas": "machines"}),
        ("tp", ShardedStrategy, "Tensor parallelism within each machine", {"tensor_parallel_size": "machine"}),
        ("fsdp", FlatStrategy, "FSDP1", {}),
    ):
        StrategyRegistry.register(name, strategy, description=description, override=True, **arguments)


_register()
