"""Output head and loss together, some tokens at a time, so that the logits of all tokens never exist at once."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from lightning_multinorm.llama.loss import IGNORE

WORDS = 4096
"""Of a weight's gradient in 16 bits, so many rows are made at a time to be added up in 32."""


class Part(NamedTuple):
    """The words that one rank of tensor parallelism has: as many as its weight has rows, beginning with ``first``."""

    group: dist.ProcessGroup
    first: int


def chunked_loss(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of the logits ``hidden @ weight.T``, which are made and forgotten chunk by chunk.

    Products are in the dtype of autocast, or else in that of ``hidden``, everything after them in float32 (float64 of
    float64). The gradients of the sum are made in the same pass, so that no product is computed twice: the cost is that
    of the plain loss, the memory that of one chunk and of the two gradients.

    Args:
        hidden: (..., h), what the output head reads.
        weight: (vocabulary, h) of the output head; a DTensor in rows, if tensor parallelism has cut it.
        labels: (...), `IGNORE` where nothing is to be predicted.
        chunk: tokens at a time, at least 1.

    Returns:
        The sum of all losses, which gradients go through once, and the loss of each label, without gradients; 0 where
        it is `IGNORE`.
    """
    part = None
    if isinstance(weight, DTensor):
        mesh = weight.device_mesh
        rows = -(-weight.shape[0] // mesh.size())  # of each rank but the last ones, as DTensor cuts
        part, weight = Part(mesh.get_group(), rows * mesh.get_local_rank()), weight.to_local()
    backward = torch.is_grad_enabled()
    total, losses = _ChunkedLoss.apply(hidden.flatten(0, -2), weight, labels.flatten(), chunk, part, backward)
    return total, losses.view_as(labels)


class _ChunkedLoss(Function):
    """Forward makes the gradients of the sum; backward has only to scale them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, part: Part | None, backward: bool
    ) -> tuple[Tensor, Tensor]:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        losses, gradients = [], _Gradients(wide=len(labels) > chunk)
        with torch.autocast(kind, enabled=False):
            W = weight.to(dtype)
            for rows, targets in zip(hidden.split(chunk), labels.split(chunk), strict=True):
                X = rows.to(dtype)
                nats, D = _softmax(X @ W.T, targets, part)
                losses.append(nats)
                if backward:
                    gradients.add(D.to(dtype), X, W, targets == IGNORE)
                del D  # before the next one is made
        joined = torch.cat(losses)
        ctx.mark_non_differentiable(joined)
        ctx.dtypes, ctx.part = (hidden.dtype, weight.dtype), part
        if backward:
            ctx.save_for_backward(torch.cat(gradients.hidden), gradients.weight)
        return joined.sum(), joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight = (
            (unscaled * gradient).to(dtype) for unscaled, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        if ctx.part is not None:  # each rank has the share of its words
            dist.all_reduce(of_hidden, group=ctx.part.group)
        return of_hidden, of_weight, None, None, None, None


class _Gradients:
    """Of the sum of losses: of the hidden states in pieces, of the weight added up, in float32 at least if ``wide``."""

    def __init__(self, wide: bool) -> None:
        self.hidden: list[Tensor] = []
        self.weight: Tensor | None = None
        self._wide = wide

    def add(self, D: Tensor, X: Tensor, W: Tensor, ignored: Tensor) -> None:
        """The share of some tokens, from the gradients D of their logits; those of ignored ones do not count."""
        none = ignored[:, None]  # D is as wide as the vocabulary: its rows are cheaper zeroed in the products
        self.hidden.append((D @ W).masked_fill_(none, 0))
        X = X.masked_fill(none, 0)
        dtype = torch.promote_types(D.dtype, torch.float32) if self._wide else D.dtype
        if dtype == D.dtype:
            self.weight = D.T @ X if self.weight is None else self.weight.addmm_(D.T, X)
            return
        if self.weight is None:
            self.weight = torch.zeros_like(W, dtype=dtype)
        for rows, words in zip(self.weight.split(WORDS), D.T.split(WORDS), strict=True):
            rows += words @ X


def _softmax(logits: Tensor, labels: Tensor, part: Part | None) -> tuple[Tensor, Tensor]:
    """The loss of each label, and the gradients of the logits (tokens, words) in their place, `IGNORE` not minded.

    Of ``part`` the words of one rank; losses are the same on all ranks.
    """
    D = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = D.amax(-1, keepdim=True)
    if part is not None:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=part.group)
    index, own = labels, labels != IGNORE
    if part is not None:
        index = labels - part.first
        own = (index >= 0) & (index < D.shape[-1])
    index = index.masked_fill(~own, 0)[:, None]
    chosen = D.sub_(top).gather(-1, index).squeeze(-1)
    sums = torch.stack([chosen.masked_fill_(~own, 0), D.exp_().sum(-1)])
    if part is not None:
        dist.all_reduce(sums, group=part.group)
    chosen, total = sums
    nats = (total.log() - chosen).masked_fill_(labels == IGNORE, 0)
    return nats, D.div_(total[:, None]).scatter_add_(-1, index, -own.to(D.dtype)[:, None])
