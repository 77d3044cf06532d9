"""Where a model's parameters lie: which device holds how much of each, and which layer and rule each belongs to."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Size, nn

from lightning_multinorm.errors import UsageError
from lightning_multinorm.planning.settings import Layout

Split = Literal["rows", "columns"]

# Megatron's way of splitting a LLaMA: what reads the hidden vector by its outputs, what writes it by its inputs, the
# vocabulary by its ids.
_SPLITS: Mapping[str, Split] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", "embed_tokens"), "rows"),
    **dict.fromkeys(("o_proj", "down_proj"), "columns"),
}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class Placed:
    """A parameter, and what of it the device with the most of it holds.

    Attributes:
        name: as in ``named_parameters``.
        shape: of the whole parameter.
        gathered: what a device has while it computes with it.
        local: what a device keeps.
        layer: number of its decoder layer; None for embedding, output head and last norm.
        rule: what updates it, "multinorm" or "adam".
        split: how tensor parallelism cuts it.
    """

    name: str
    shape: Size
    gathered: Size
    local: Size
    layer: int | None
    rule: str
    split: Split | None

    @property
    def matrix(self) -> bool:
        """Whether the norms are applied to it."""
        return self.rule == "multinorm"


def place(model: nn.Module, groups: Iterable[Mapping[str, Any]], layout: Layout) -> list[Placed]:
    """Every parameter of the model, in its order, as the layout spreads it.

    Args:
        model: on any device; the meta device will do.
        groups: with "rule" and named "params", as `parameter_groups` returns them.
        layout: FSDP spreads the first dimension, of what tensor parallelism leaves.

    Raises:
        UsageError: for a parameter that tensor parallelism has no place for.
    """
    rules = {name: group["rule"] for group in groups for name, _ in group["params"]}
    placed = []
    for name, parameter in model.named_parameters():
        split = _split(name, parameter.ndim) if layout.tensor > 1 else None
        gathered = list(parameter.shape)
        if split:
            axis = 0 if split == "rows" else 1
            gathered[axis] = math.ceil(gathered[axis] / layout.tensor)
        local = [math.ceil(gathered[0] / layout.shard), *gathered[1:]]
        found = _LAYER.search(name)
        placed.append(
            Placed(
                name=name,
                shape=parameter.shape,
                gathered=Size(gathered),
                local=Size(local),
                layer=int(found[1]) if found else None,
                rule=rules.get(name, "adam"),
                split=split,
            )
        )
    return placed


def _split(name: str, dimensions: int) -> Split | None:
    if dimensions < 2:
        return None  # gains and biases are kept whole
    owner = name.split(".")[-2]
    if owner not in _SPLITS:
        raise UsageError(f"tensor parallelism of {name} is not planned for; only a LLaMA's own matrices are")
    return _SPLITS[owner]
