"""The plan of a run: its optimizers side by side, from memory, communication and FLOPs of the parts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_multinorm.planning.activations import activations
from lightning_multinorm.planning.communication import Traffic, model_traffic, muon_traffic, optimizer_traffic
from lightning_multinorm.planning.compute import Compute, compute
from lightning_multinorm.planning.memory import Moment, moments
from lightning_multinorm.planning.parameters import place
from lightning_multinorm.planning.settings import Device, Layout, MicroBatch, Precision, Shape
from lightning_multinorm.planning.states import MakeOptimizer, OptimizerMemory, optimizer_memory


@dataclass(frozen=True)
class OptimizerPlan:
    """A run with one optimizer, on one device of it.

    Attributes:
        memory: what the optimizer itself takes.
        moments: what a device holds at each moment of a step that can be its peak.
        traffic: what the optimizer sends.
    """

    memory: OptimizerMemory
    moments: tuple[Moment, ...]
    traffic: Traffic

    @property
    def peak(self) -> Moment:
        """The moment at which most is held."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def weights_and_states(self) -> int:
        """Bytes of what the papers' memory tables count."""
        return self.peak.weights + self.peak.states


@dataclass(frozen=True)
class Plan:
    """What `plan` found out.

    Attributes:
        parameters: of the whole model.
        matrices: how many of them the norms are applied to.
        shape: the model's dimensions.
        batch: what one device trains on at a time.
        precision: number formats.
        layout: how the run is spread.
        optimizers: one for each that was asked for, in that order.
        traffic: what the strategy sends, whatever the optimizer.
        muon: for comparison, what an optimizer sends that needs whole matrices.
        compute: FLOPs of a token.
    """

    parameters: int
    matrices: int
    shape: Shape
    batch: MicroBatch
    precision: Precision
    layout: Layout
    optimizers: tuple[OptimizerPlan, ...]
    traffic: tuple[Traffic, ...]
    muon: Traffic
    compute: Compute

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step, over all devices."""
        return self.batch.tokens * self.batch.accumulate * self.layout.replicate * self.layout.shard


def plan(
    model: nn.Module,
    config: Any,
    groups: Iterable[Mapping[str, Any]],
    optimizers: Sequence[MakeOptimizer],
    batch: MicroBatch,
    precision: Precision,
    layout: Layout | None = None,
    device: Device = "gpu",
    *,
    released: bool = False,
) -> Plan:
    """Plan the training of a LLaMA.

    Args:
        model: the model, which the meta device can hold: only shapes and names are read.
        config: its `transformers.LlamaConfig`.
        groups: of its parameters, as `parameter_groups` returns them.
        optimizers: each called with groups.
        batch: what one device trains on at a time.
        precision: number formats.
        layout: how the run is spread; None for a single device.
        device: "gpu" or "cpu", which some optimizers step on differently.
        released: whether gradients are released inside the backward pass; only optimizers of this family can.

    Raises:
        UsageError: for what cannot be planned.
    """
    layout, groups, shape = layout or Layout(), list(groups), Shape.of(config)
    shape.check(layout)
    placed = place(model, groups, layout)
    saved = activations(shape, batch, precision, layout)
    parameters = sum(where.shape.numel() for where in placed)
    planned = []
    for make in optimizers:
        memory = optimizer_memory(make, groups, placed, precision.weights, device)
        free = released and memory.releases
        held = moments(placed, memory, saved, shape, batch, precision, layout, released=free)
        planned.append(OptimizerPlan(memory, tuple(held), optimizer_traffic(placed, memory, layout)))
    return Plan(
        parameters=parameters,
        matrices=sum(where.shape.numel() for where in placed if where.matrix),
        shape=shape,
        batch=batch,
        precision=precision,
        layout=layout,
        optimizers=tuple(planned),
        traffic=tuple(model_traffic(placed, shape, batch, precision, layout)),
        muon=muon_traffic(placed, precision, layout),
        compute=compute(parameters, shape, batch.length),
    )
