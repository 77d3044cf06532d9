"""What a LLaMA of transformers, with fused attention (sdpa), keeps from the forward pass for the backward one.

Derived by hand from its modules, and held to what autograd saves by a test. Bytes per token; w is the width of a
product's output, s that of the residual stream, 4 a float32:

- a norm saves its input as float32 (4 h), the reciprocal root of each token (4), and the normalised vector before its
  gain (s h); what it returns is saved by the products that read it, once (w h), or under autocast once for each, since
  each makes its own copy;
- attention saves queries and output (2 w h), keys and values (2 w k), and float32 log-sum-exps (4 heads);
- the MLP saves gate, silu(gate), up and their product (4 w i); the products' weights are the parameters, and under
  autocast copies of them, which live as long;
- the output head saves its input; the loss saves log-probabilities in float32 (4 V), and while it runs holds more;
- head and loss in chunks (`llama.chunked`) save their gradients instead, made in the forward pass: of the head's input
  (w h), and of its weight, which several chunks add up in float32.
"""

from dataclasses import dataclass

import torch

from lightning_multinorm.llama.chunked import WORDS
from lightning_multinorm.planning.settings import Layout, MicroBatch, Precision, Shape


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one device.

    Attributes:
        layer: saved by one decoder layer, copies of weights included.
        ends: saved outside the layers: token ids, rotary tables, last norm, input and weight copy of the output head.
        in_flight: gradients of one layer's activations, which its backward pass makes on the way.
        embedding_gradient: what arrives at the embedding at last.
        logits_forward: the most that logits and loss hold in the forward pass.
        logits_saved: what of it the backward pass finds; part of the next.
        logits_backward: the most that they hold in the backward pass.
        logits_gradient: what the output head's backward pass then reads.
    """

    layer: int
    ends: int
    in_flight: int
    embedding_gradient: int
    logits_forward: int
    logits_saved: int
    logits_backward: int
    logits_gradient: int


def activations(shape: Shape, batch: MicroBatch, precision: Precision, layout: Layout) -> Activations:
    """Activations of a LLaMA's micro-batch.

    FSDP with a mixed precision casts parameters and inputs itself, so that activations are as with true 16 bits.
    """
    autocast = precision.mixed and layout.shard == 1
    w = precision.products.itemsize
    s = precision.weights.itemsize if autocast else w
    h, i = shape.hidden, shape.intermediate / layout.tensor
    q, k = (count * shape.head_dim / layout.tensor for count in (shape.heads, shape.kv_heads))

    norm = (4 + s) * h + 4
    read_by_attention, read_by_mlp = (3 * w * h, 2 * w * h) if autocast else (w * h, w * h)
    attention = 2 * w * (q + k) + 4 * shape.heads / layout.tensor
    per_token = 2 * norm + read_by_attention + attention + read_by_mlp + 4 * w * i
    layer_weights = h * (2 * q + 2 * k) + 3 * h * i
    head_weight = shape.vocabulary / layout.tensor * h
    copies = w if autocast else 0

    tables = 2 * batch.length * shape.head_dim * s
    ends: float = batch.tokens * (norm + 2 * torch.int64.itemsize) + tables
    if batch.loss_chunk is None:
        ends += batch.tokens * w * h + copies * head_weight
        loss = _whole(batch.tokens * shape.vocabulary, w)  # complete on each device, whatever the layout
    else:
        loss = _chunked(batch, w, precision.weights.itemsize, h, shape.vocabulary / layout.tensor, copied=autocast)
    return Activations(
        layer=round(batch.tokens * per_token + copies * layer_weights),
        ends=round(ends),
        in_flight=round(batch.tokens * (3 * w * i + 2 * 4 * h)),
        embedding_gradient=batch.tokens * h * s,
        **{f"logits_{name}": round(size) for name, size in loss.items()},
    )


def _whole(logits: int, w: int) -> dict[str, float]:
    """Bytes of the loss of all logits, by what they are of in `Activations`."""
    cast = 4 if w != 4 else 0
    return {
        "forward": logits * (w + cast + 4),  # as the head gives them, as float32, log-probabilities
        "saved": logits * 4,
        "backward": logits * 12,  # log-probabilities, their gradient, the gradient of the float32 logits
        "gradient": logits * w,
    }


def _chunked(batch: MicroBatch, w: int, p: int, h: int, vocabulary: float, copied: bool) -> dict[str, float]:
    """The same in chunks; p is the width of a weight, of which autocast makes a copy."""
    assert batch.loss_chunk is not None
    several = batch.tokens > batch.loss_chunk
    logits, weight = min(batch.tokens, batch.loss_chunk) * vocabulary, vocabulary * h
    hidden, total = w * batch.tokens * h, (4 if several else w) * weight
    cast, copy = w != 4, w * weight if copied else 0
    at_once = logits * (4 + (w if cast else 0))  # gradients in the logits' place, in float32 and as products read them
    products = total + ((w + 4) * min(vocabulary, WORDS) * h if several and cast else 0)
    return {
        "forward": copy + hidden * 2 + at_once + products,  # what the head reads, and its gradient
        "saved": hidden + total,
        "backward": hidden * 2 + 2 * total + (p * weight if total != p * weight else 0),  # as made, scaled, and cast
        "gradient": hidden,
    }
