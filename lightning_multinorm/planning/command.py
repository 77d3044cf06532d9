"""``python -m lightning_multinorm plan``: from the configuration of a run to its plan, printed."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jsonargparse import Namespace
from rich.console import Console

from lightning_multinorm.data import TextDataModule
from lightning_multinorm.errors import UsageError
from lightning_multinorm.llama import LlamaPretraining
from lightning_multinorm.llama.parallel import build_llama
from lightning_multinorm.optim import SinkGD, parameter_groups
from lightning_multinorm.planning.estimate import Plan, plan
from lightning_multinorm.planning.settings import Layout, MicroBatch, Precision
from lightning_multinorm.planning.states import MakeOptimizer
from lightning_multinorm.planning.table import render

ADAMW: MakeOptimizer = partial(torch.optim.AdamW, fused=True)  # the packaged optimizer/adamw.yaml


class Planner:
    """Stands where the trainer would, and plans instead of training: it launches nothing and asks for no device.

    Args:
        trainer: the trainer's configuration.
    """

    def __init__(self, trainer: Namespace) -> None:
        self.trainer = trainer

    def plan(self, model: LlamaPretraining, datamodule: TextDataModule, devices: int | None = None) -> None:
        """Tell memory, communication and FLOPs of a run before it runs, beside AdamW; nothing is allocated.

        Args:
            model: the model of the configuration.
            datamodule: the data of the configuration, of which only sizes are read.
            devices: devices of a machine, whether they are here or not. Default: trainer.devices.
        """
        Console(highlight=False).print(render(self._plan(model, datamodule, devices)))

    def _plan(self, model: LlamaPretraining, datamodule: TextDataModule, devices: int | None) -> Plan:
        trainer = self.trainer
        model.model = build_llama(model.llama_config, torch.device("meta"))
        batch = MicroBatch(
            datamodule.batch_size, datamodule.sequence_length, trainer.accumulate_grad_batches, model.loss_chunk
        )
        layout = layout_of(
            trainer.strategy, count_devices(trainer.devices if devices is None else devices), trainer.num_nodes
        )
        groups = parameter_groups(model, policy=model.policy, overrides=model.rules, lr_scales=model.lr_scales)
        run = plan(
            model,
            model.llama_config,
            groups,
            [model.optimizer, ADAMW, SinkGD],
            batch,
            Precision.named(trainer.precision),
            layout,
            "cpu" if trainer.accelerator == "cpu" else "gpu",
            released=model.gradient_release,
        )
        chosen, adamw, sinkgd = run.optimizers
        beside = sinkgd if chosen.memory.name == adamw.memory.name else adamw
        return replace(run, optimizers=(chosen, beside))


def count_devices(devices: Any) -> int:
    """How many devices of a machine ``trainer.devices`` means; "auto" and -1 are those that are here, or one.

    Raises:
        UsageError: for what is no number and no list of devices.
    """
    if isinstance(devices, list) and devices:
        return len(devices)
    text = str(devices).strip()
    if text in ("auto", "-1"):
        return max(1, torch.cuda.device_count())
    if "," in text:
        return len([device for device in text.split(",") if device.strip()])
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"trainer.devices={devices!r} is no number of devices; plan for --devices 8, for example")
    return int(text)


def layout_of(strategy: str | Namespace | Mapping[str, Any], devices: int, machines: int) -> Layout:
    """How ``trainer.strategy`` spreads a run over so many machines of so many devices.

    Raises:
        UsageError: for a strategy that is not planned for.
    """
    if isinstance(strategy, str):
        name, options = strategy, {}
    else:
        name = str(strategy["class_path"]).rpartition(".")[2]
        options = dict(strategy.get("init_args") or {})
    world = devices * machines
    if name in ("auto", "single_device", "SingleDeviceStrategy"):
        if name != "auto" and world > 1:
            raise UsageError(f"trainer.strategy={name} is for one device, not for {world}; use ddp or fsdp2")
        return _ddp(world, {}) if world > 1 else Layout()
    if name == "DDPStrategy" or name.partition("_")[0] == "ddp":
        return _ddp(world, options)
    if name in ("fsdp", "fsdp2"):
        return Layout(name.upper(), shard=world)
    if name == "ShardedStrategy":
        tensor, replicas = options.get("tensor_parallel_size", 1), options.get("replicas", 1)
        tensor, replicas = devices if tensor == "machine" else tensor, machines if replicas == "machines" else replicas
        if world % (tensor * replicas):
            raise UsageError(f"tensor_parallel_size={tensor} × replicas={replicas} do not divide {world} devices")
        named = " and ".join(["FSDP2", *["tensor parallel"] * (tensor > 1)])
        return Layout(named, shard=world // tensor // replicas, replicate=replicas, tensor=tensor)
    if name in ("FSDPStrategy", "FlatStrategy"):
        return _fsdp(options, devices, machines)
    if name == "hsdp":
        return _hsdp(devices, machines)
    if name == "tp":
        return Layout("tensor parallel", shard=machines, tensor=devices)
    if name == "ModelParallelStrategy":
        sizes = {"data_parallel_size": machines, "tensor_parallel_size": devices}
        sizes |= {key: int(options[key]) for key in sizes if options.get(key, "auto") != "auto"}
        shard, tensor = sizes.values()
        if shard * tensor != world:
            raise UsageError(
                f"data_parallel_size={shard} × tensor_parallel_size={tensor} are not the {world} devices of "
                f"{machines} × {devices}; make them so, or plan for other --devices"
            )
        return Layout("FSDP2" if tensor == 1 else "FSDP2 and tensor parallel", shard=shard, tensor=tensor)
    raise UsageError(
        f"trainer.strategy={name} is not planned for; use auto, ddp, fsdp, fsdp2, hsdp, tp, or DDPStrategy, "
        "FSDPStrategy and ModelParallelStrategy by class path"
    )


def _ddp(world: int, options: Mapping[str, Any]) -> Layout:
    kwargs = {**options, **(options.get("dict_kwargs") or {})}
    return Layout("DDP", replicate=world, buckets=not kwargs.get("gradient_as_bucket_view", False))


def _fsdp(options: Mapping[str, Any], devices: int, machines: int) -> Layout:
    for option in ("cpu_offload", "activation_checkpointing", "activation_checkpointing_policy"):
        if options.get(option):
            raise UsageError(f"FSDPStrategy's {option} is not planned for; plan without it, as an upper bound")
    sharding = str(options.get("sharding_strategy", "FULL_SHARD")).rpartition(".")[2]
    if sharding == "FULL_SHARD":
        return Layout("FSDP", shard=devices * machines)
    if sharding == "HYBRID_SHARD":
        return _hsdp(devices, machines)
    raise UsageError(f"FSDPStrategy's sharding_strategy={sharding} is not planned for; use FULL_SHARD or HYBRID_SHARD")


def _hsdp(devices: int, machines: int) -> Layout:
    if machines < 2:
        raise UsageError(
            f"hsdp shards within a machine and replicates over machines, but trainer.num_nodes={machines}; set it to 2 "
            "or more, or use fsdp2"
        )
    return Layout("HSDP", replicate=machines, shard=devices)
