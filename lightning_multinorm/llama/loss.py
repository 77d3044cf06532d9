"""Next-token loss as sums and counts, which add up exactly over batches and ranks, and the metric that adds them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

IGNORE = -100
"""Label of a position that is not to be predicted."""


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each position in nats, in float32; 0 where the label is `IGNORE`.

    Args:
        logits: (B, T, vocabulary), any floating dtype.
        labels: (B, T); ``labels[b, t]`` is the token that follows position t.

    Returns:
        (B, T).
    """
    flat = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return flat.view_as(labels)


class TokenLoss(Metric):
    """Loss per token over any number of batches and ranks: sums of nats, tokens and bytes, divided once."""

    full_state_update = False
    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, labels: Tensor, text_bytes: Tensor | None = None) -> None:
        """Add a batch: losses (B, T) in nats, labels (B, T), and the bytes (B,) of the text they stand for."""
        # In place it would stay in the half precision that a module of bf16-true casts every state to.
        self.nats = self.nats.double() + losses.sum(dtype=torch.float64)
        self.tokens += (labels != IGNORE).sum()
        if text_bytes is not None:
            self.bytes += text_bytes.sum()

    def compute(self) -> dict[str, Tensor]:
        """``loss`` in nats per token, ``perplexity`` per token and, if bytes were given, ``bits_per_byte``."""
        loss = self.nats / self.tokens
        values = {"loss": loss, "perplexity": loss.exp()}
        if self.bytes > 0:
            values["bits_per_byte"] = self.nats / (math.log(2) * self.bytes)
        return values
