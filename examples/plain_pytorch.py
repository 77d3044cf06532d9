"""SinkGD in a plain PyTorch loop: torch alone, a small network that predicts the next byte of Python's own modules.

python examples/plain_pytorch.py [--steps 300]
"""

import argparse
import inspect
import random
import statistics
import textwrap

import torch
from torch import Tensor, nn

from lightning_multinorm import SinkGD, parameter_groups

CONTEXT = 16  # bytes that the network sees


class NextByte(nn.Module):
    """An embedding of bytes, two hidden layers, and a head."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 32)
        self.hidden = nn.Sequential(
            nn.Linear(CONTEXT * 32, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()
        )
        self.head = nn.Linear(width, 256)

    def forward(self, context: Tensor) -> Tensor:
        """Logits (B, 256) for bytes (B, CONTEXT)."""
        return self.head(self.hidden(self.embedding(context).flatten(1)))


def text() -> Tensor:
    """The sources of some modules, as bytes."""
    sources = "".join(inspect.getsource(module) for module in (argparse, inspect, random, statistics, textwrap))
    return torch.tensor(list(sources.encode()))


def batches(data: Tensor, count: int, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Random places of a text: what comes before, and the byte that follows."""
    starts = torch.randint(len(data) - CONTEXT, (count, size))
    return [(data[start[:, None] + torch.arange(CONTEXT)], data[start + CONTEXT]) for start in starts]


def main(steps: int = 300) -> list[float]:
    """Train for some steps, and return the loss of each, in nats per byte."""
    torch.manual_seed(0)
    model = NextByte()
    # Hidden matrices are multi-normalised; embedding, head, norm and biases get Adam, inside the same optimizer.
    optimizer = SinkGD(parameter_groups(model), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for step, (context, following) in enumerate(batches(text(), steps), start=1):
        loss = nn.functional.cross_entropy(model(context), following)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step:>4}  loss {sum(losses[-50:]) / 50:.3f}")
    for group in optimizer.param_groups:
        print(f"{group['name']:<10} {group['rule']:<10} {sum(p.numel() for p in group['params']):>7,} parameters")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)
