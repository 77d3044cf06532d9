"""Lightning strategies for spread models, whose checkpoints an optimizer without state survives.

Registered under the names that ``Trainer(strategy=...)`` and ``--trainer.strategy`` take, once this module is imported:

- ``ddp``: each device holds the whole model (`torch.nn.parallel.DistributedDataParallel`);
- ``fsdp2``: weights, gradients and states sharded over all devices (`torch.distributed.fsdp.fully_shard`);
- ``hsdp``: sharded within each machine, replicated over the machines;
- ``tp``: tensor parallelism within each machine, ``fsdp2`` over the machines;
- ``fsdp``: FSDP1 (`torch.distributed.fsdp.FullyShardedDataParallel`), for projects that are built on it.

Lightning's own strategies fail, or take a step on zero gradients, when a checkpoint's optimizer has no state.
"""

import gc
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_multinorm.checkpoints.strategy import AgreedCheckpoints, SpreadCheckpoints
from lightning_multinorm.errors import UsageError
from lightning_multinorm.optim.base import MultiNormOptimizer


class ReplicatedStrategy(AgreedCheckpoints, DDPStrategy):
    """DDP, on all of whose ranks a run ends if a checkpoint cannot be written or read on one."""


class ShardedStrategy(SpreadCheckpoints, ModelParallelStrategy):
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


class FlatStrategy(SpreadCheckpoints, FSDPStrategy):
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


def end_communication() -> None:
    """Leave all process groups and join their threads; the last thing before a process ends.

    `destroy_process_group` forgets the groups, but DDP's reducer, held in a cycle, and device meshes, held in caches of
    DTensor, keep them alive. Then gloo's threads run into the end of the interpreter, and if one of them drops its last
    reference to a tensor there, it aborts the process: exit status 134 after a training that has succeeded.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    dist.destroy_process_group()
    for mesh in [found for found in gc.get_objects() if type(found) is DeviceMesh]:
        getattr(mesh, "_pg_registry", {}).clear()  # older versions of torch keep no groups here
    gc.collect()


def _register() -> None:
    for name, strategy, description, arguments in (
        ("ddp", ReplicatedStrategy, "Data parallel: each device holds the whole model", {}),
        ("fsdp2", ShardedStrategy, "FSDP2 over all devices", {}),
        ("hsdp", ShardedStrategy, "FSDP2 within each machine, replicated over machines", {"replicas": "machines"}),
        ("tp", ShardedStrategy, "Tensor parallelism within each machine", {"tensor_parallel_size": "machine"}),
        ("fsdp", FlatStrategy, "FSDP1", {}),
    ):
        StrategyRegistry.register(name, strategy, description=description, override=True, **arguments)


_register()
