"""What a run is made of, as far as its memory depends on it: number formats, devices, the micro-batch, the model."""

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch

from lightning_multinorm.errors import UsageError

_FORMATS = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
_ALIASES = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "None": "32-true"}  # as Lightning reads them


@dataclass(frozen=True)
class Precision:
    """A precision of Lightning's trainer.

    Attributes:
        name: such as "bf16-true".
        weights: format of weights, gradients and optimizer states.
        products: format of matrix products, and of what they read and write.
    """

    name: str
    weights: torch.dtype
    products: torch.dtype

    @classmethod
    def named(cls, name: str | int | None) -> Self:
        """The precision that ``trainer.precision`` names.

        Raises:
            UsageError: for one that is not planned for.
        """
        full = _ALIASES.get(str(name), str(name))
        number, _, kind = full.partition("-")
        if number not in _FORMATS or kind not in ("true", "mixed") or full == "32-mixed":
            raise UsageError(
                f"trainer.precision={name!r} is not planned for; use one of 32-true, bf16-true, 16-true, bf16-mixed, "
                "16-mixed"
            )
        return cls(full, torch.float32 if kind == "mixed" else _FORMATS[number], _FORMATS[number])

    @property
    def mixed(self) -> bool:
        """Whether products are narrower than weights."""
        return self.weights != self.products


@dataclass(frozen=True)
class Layout:
    """How a run is spread: ``replicate · shard · tensor`` devices.

    Attributes:
        name: of the strategy, as it is printed.
        replicate: copies of the (sharded) model, whose gradients are averaged.
        shard: devices that FSDP spreads each parameter over, by rows.
        tensor: devices that tensor parallelism spreads each product over.
        buckets: whether DDP keeps a second copy of the gradients to send from.
    """

    name: str = "single device"
    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    buckets: bool = False

    def __post_init__(self) -> None:
        for axis in ("replicate", "shard", "tensor"):
            if getattr(self, axis) < 1:
                raise UsageError(f"{self.name}: {axis}={getattr(self, axis)} must be at least 1")

    @property
    def world(self) -> int:
        """Devices in all."""
        return self.replicate * self.shard * self.tensor

    @property
    def sharded(self) -> bool:
        """Whether no device holds all of a matrix."""
        return self.shard * self.tensor > 1


@dataclass(frozen=True)
class MicroBatch:
    """What one device trains on at a time.

    Attributes:
        sequences: of so many
        length: tokens.
        accumulate: micro-batches of an optimizer step.
        loss_chunk: tokens whose logits exist at a time; None for all.
    """

    sequences: int
    length: int
    accumulate: int = 1
    loss_chunk: int | None = None

    def __post_init__(self) -> None:
        for name in ("sequences", "length", "accumulate"):
            if getattr(self, name) < 1:
                raise UsageError(f"a micro-batch of {name}={getattr(self, name)} cannot be; it must be at least 1")

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.sequences * self.length


@dataclass(frozen=True)
class Shape:
    """A LLaMA's dimensions, which decide its activations and FLOPs."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False

    @classmethod
    def of(cls, config: Any) -> Self:
        """The dimensions in a `transformers.LlamaConfig`."""
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=config.num_key_value_heads or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
        )

    def check(self, layout: Layout) -> None:
        """Refuse more tensor-parallel devices than heads can be dealt to.

        Raises:
            UsageError: naming the heads.
        """
        if self.kv_heads % layout.tensor:
            raise UsageError(
                f"tensor parallelism over {layout.tensor} devices cannot deal out {self.heads} heads with "
                f"{self.kv_heads} of keys and values evenly; use a divisor of {self.kv_heads}"
            )


Device = Literal["cpu", "gpu"]
