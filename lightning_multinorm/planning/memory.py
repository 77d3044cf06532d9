"""The moments of a training step that can be its peak, and what a device holds in each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_multinorm.planning.activations import Activations
from lightning_multinorm.planning.parameters import Placed
from lightning_multinorm.planning.settings import Layout, MicroBatch, Precision, Shape
from lightning_multinorm.planning.states import OptimizerMemory

FORWARD, LOSS, BACKWARD, STEP = "forward pass", "backward pass: loss", "backward pass: layers", "optimizer step"
PARTS = ("weights", "states", "gradients", "buckets", "gathered", "activations", "logits", "transient")


@dataclass(frozen=True)
class Moment:
    """Bytes that one device holds at one moment of a step.

    Attributes:
        name: what is going on.
        weights: what the device keeps of them.
        states: of the optimizer.
        gradients: complete ones, and those just made.
        buckets: DDP's copies of gradients.
        gathered: parameters that FSDP has put together, and gradients that it has not yet spread.
        activations: saved for the backward pass, and their gradients.
        logits: logits and what the loss makes of them.
        transient: what the optimizer holds while it steps.
    """

    name: str
    weights: int
    states: int
    gradients: int = 0
    buckets: int = 0
    gathered: int = 0
    activations: int = 0
    logits: int = 0
    transient: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, part) for part in PARTS)


def moments(
    placed: Sequence[Placed],
    optimizer: OptimizerMemory,
    saved: Activations,
    shape: Shape,
    batch: MicroBatch,
    precision: Precision,
    layout: Layout,
    *,
    released: bool = False,
) -> list[Moment]:
    """The moments that can be a step's peak, in their order; those of the layers' backward pass have one name.

    If gradients are accumulated, they are there always, and new ones are made beside them. If they are ``released``,
    no more than one is, or what FSDP has to spread of one layer.
    """
    width, narrow = precision.weights.itemsize, precision.products.itemsize
    weights = width * sum(place.local.numel() for place in placed)
    fsdp, accumulated = layout.shard > 1, weights if batch.accumulate > 1 else 0
    embedding = _owned(placed, "embed_tokens")
    head = _owned(placed, "lm_head") or embedding

    # FSDP keeps embedding, head and last norm together from the forward pass on, their gradients until the end of the
    # backward pass, and weights and gradients of two layers: the one in use, and the one that travels, in float32.
    ends = narrow * _gathered(placed, None) if fsdp else 0
    per_entry = 4 * narrow + (4 if narrow < 4 else 0)
    layers = per_entry * max(_gathered(placed, k) for k in range(shape.layers)) if fsdp else 0
    head_gradient = head * (narrow if fsdp else width)
    embedding_beside = embedding * width if not fsdp and (accumulated or shape.tied) else 0

    def held(name: str, gradients: int = 0, unspread: int = 0, **parts: int) -> Moment:
        """FSDP counts gradients that are not yet spread with what it has gathered."""
        parts["gathered"] = parts.get("gathered", 0) + (unspread if fsdp else 0)
        gradients += 0 if fsdp else unspread
        buckets = weights if layout.buckets else 0
        return Moment(name, weights, optimizer.states, gradients=gradients, buckets=buckets, **parts)

    everything = saved.layer * shape.layers + saved.ends
    held_at = [
        held(FORWARD, accumulated, gathered=ends, activations=everything, logits=saved.logits_forward),
        held(LOSS, accumulated, gathered=ends, activations=everything, logits=saved.logits_backward),
        held(BACKWARD, accumulated, head_gradient, gathered=ends, activations=everything, logits=saved.logits_gradient),
        held(
            BACKWARD,
            accumulated,
            0 if accumulated and not fsdp else head_gradient,
            gathered=ends + layers,
            activations=saved.layer * shape.layers + saved.in_flight,
        ),
        held(
            BACKWARD,
            accumulated or weights - (0 if fsdp or shape.tied else embedding * width),
            head_gradient if fsdp else 0,
            gathered=ends + layers,
            activations=saved.layer + saved.in_flight,
        ),
        held(
            BACKWARD,
            weights + embedding_beside,
            ends if fsdp else 0,
            gathered=ends,
            activations=saved.embedding_gradient,
        ),
        held(STEP, weights, transient=optimizer.transient or 0),
    ]
    if not released:
        return held_at
    # Updates happen in the backward pass, beside all that it holds.
    largest, transient = width * max(place.local.numel() for place in placed), optimizer.transient or 0
    return [
        replace(moment, gradients=min(moment.gradients, largest), transient=0 if moment.name == FORWARD else transient)
        for moment in held_at
    ]


def _gathered(placed: Sequence[Placed], layer: int | None) -> int:
    return sum(place.gathered.numel() for place in placed if place.layer == layer)


def _owned(placed: Sequence[Placed], owner: str) -> int:
    return sum(place.gathered.numel() for place in placed if place.name.endswith(f"{owner}.weight"))
