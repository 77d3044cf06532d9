"""What travels between devices in an optimizer step: collectives, and bytes that each device sends.

Bytes are those of the ring algorithms: an all-gather or reduce-scatter of S bytes over N devices sends S (N - 1) / N
from each, an all-reduce twice that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_multinorm.planning.parameters import Placed
from lightning_multinorm.planning.settings import Layout, MicroBatch, Precision, Shape
from lightning_multinorm.planning.states import OptimizerMemory

_BUCKET = 25 * 2**20  # DDP's
_FLOAT = 4


@dataclass(frozen=True)
class Traffic:
    """What one cause sends in an optimizer step.

    Attributes:
        name: the cause.
        collectives: how many, per device.
        bytes: sent by each device.
    """

    name: str
    collectives: int
    bytes: int


def gather_cost(size: float, devices: int) -> float:
    """Bytes that each of ``devices`` sends so that all have, or one has reduced, ``size`` bytes."""
    return size * (devices - 1) / devices


def model_traffic(
    placed: Sequence[Placed], shape: Shape, batch: MicroBatch, precision: Precision, layout: Layout
) -> list[Traffic]:
    """What the strategy sends, whatever the optimizer."""
    traffic = []
    micro, width = batch.accumulate, precision.products.itemsize
    kept = sum(place.local.numel() for place in placed)
    if layout.tensor > 1:
        vectors = batch.tokens * shape.hidden * width
        # After attention and MLP, and before them on the way back; after the embedding, and before the head likewise.
        reductions = 4 * shape.layers + 2
        traffic.append(
            Traffic(
                "tensor parallel: all-reduce of hidden vectors",
                reductions * micro,
                round(2 * gather_cost(vectors, layout.tensor) * reductions * micro),
            )
        )
        if batch.loss_chunk is None:
            logits = batch.tokens * shape.vocabulary * width
            sent = Traffic(
                "tensor parallel: all-gather of logits", micro, round(gather_cost(logits, layout.tensor) * micro)
            )
        else:  # of each token: the largest logit, the label's, and the sum of exponentials
            chunks, sums = -(-batch.tokens // batch.loss_chunk) * micro, 3 * batch.tokens * _FLOAT
            size = round(2 * gather_cost(sums, layout.tensor) * micro)
            sent = Traffic("tensor parallel: all-reduce of the loss's sums", 2 * chunks, size)
        traffic.append(sent)
    if layout.shard > 1:
        all_of_it = width * sum(place.gathered.numel() for place in placed)
        layers = width * sum(place.gathered.numel() for place in placed if place.layer is not None)
        units = shape.layers + 1
        for name, count, size in (
            ("FSDP: all-gather of weights, forward", units, all_of_it),
            ("FSDP: all-gather of layers again, backward", shape.layers, layers),
            ("FSDP: reduce-scatter of gradients, in float32", units, all_of_it * _FLOAT // width),
        ):
            traffic.append(Traffic(name, count * micro, round(gather_cost(size, layout.shard) * micro)))
    if layout.replicate > 1:
        # DDP waits for the last micro-batch; FSDP does not.
        times = 1 if layout.buckets or layout.shard == 1 else micro
        size = kept * (precision.weights.itemsize if layout.shard == 1 else _FLOAT)
        count = math.ceil(size / _BUCKET) if layout.shard == 1 else shape.layers + 1
        traffic.append(
            Traffic(
                "all-reduce of gradients",
                count * times,
                round(2 * gather_cost(size, layout.replicate) * times),
            )
        )
    return traffic


def optimizer_traffic(placed: Sequence[Placed], optimizer: OptimizerMemory, layout: Layout) -> Traffic:
    """What the optimizer sends of its own, once a step."""
    matrices = [place for place in placed if place.matrix]
    if not layout.sharded or (optimizer.iterations is None and not optimizer.gathers):
        return Traffic(optimizer.name, 0, 0)
    if optimizer.gathers:
        # As a sum of float32 that are zero where a device holds nothing, which is exact for every layout.
        by_gram = [p for p in matrices if optimizer.grams and layout.tensor == 1 and p.shape[0] >= p.shape[1]]
        size = _FLOAT * sum(place.shape.numel() for place in matrices if place not in by_gram)
        size += _FLOAT * sum(place.shape[1] ** 2 + 1 for place in by_gram)  # and the norm
        collectives = len(matrices) + len(by_gram)
        return Traffic(optimizer.name, collectives, round(2 * gather_cost(size, layout.shard * layout.tensor)))
    assert optimizer.iterations is not None
    passes = optimizer.iterations + 1  # in the first, columns are summed at two scales, or rows looked through
    sent = 0.0
    column_groups: set[tuple[int, ...]] = set()
    for place in matrices:
        # Rows lie on the devices of FSDP, and on those of a tensor-parallel split by outputs.
        axes = (layout.shard, layout.tensor if place.split == "rows" else 1)
        groups = tuple(devices for devices in axes if devices > 1)
        column_groups.add(groups)
        sent += sum(2 * gather_cost(place.local[-1] * _FLOAT * passes, devices) for devices in groups)
        if place.split == "columns":
            sent += 2 * gather_cost(place.local[0] * _FLOAT * passes, layout.tensor)
    collectives = optimizer.iterations * sum(map(len, column_groups))
    collectives += passes if any(place.split == "columns" for place in matrices) else 0
    return Traffic(optimizer.name, collectives, round(sent))


def muon_traffic(placed: Sequence[Placed], precision: Precision, layout: Layout) -> Traffic:
    """For comparison: each matrix' gradient gathered once, as Muon needs it."""
    matrices = [place for place in placed if place.matrix] if layout.sharded else []
    size = precision.weights.itemsize * sum(place.shape.numel() for place in matrices)
    return Traffic("Muon", len(matrices), round(gather_cost(size, layout.shard * layout.tensor)))
