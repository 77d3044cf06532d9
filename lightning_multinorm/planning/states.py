"""What an optimizer keeps between steps, and what it holds for a moment in one.

The family of this package keeps nothing for matrices and two moments for the rest, by construction. Of every other
optimizer the state is counted, not guessed: it makes one step on parameters that have shapes but no memory.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_multinorm.errors import UsageError
from lightning_multinorm.norms import SpectralNorm
from lightning_multinorm.optim import SWAN, MultiNormGD, SinkGD
from lightning_multinorm.optim.base import MultiNormOptimizer
from lightning_multinorm.optim.fallback import ROUNDED_BYTES, rounded_block
from lightning_multinorm.planning.parameters import Placed
from lightning_multinorm.planning.settings import Device
from lightning_multinorm.sinkhorn.select import has_numba

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]
_STACK = 2**24  # entries that MultiNormGD and SWAN take at a time on an accelerator


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes that an optimizer takes on one device.

    Attributes:
        name: of its class.
        states: kept between steps.
        releases: whether it can release gradients inside the backward pass.
        transient: held during a step at most, beyond that; None if it is not known for this class.
        iterations: alternations of rows and columns whose sums travel between shards; None if it needs none.
        gathers: whether it needs each matrix as a whole,
        grams: but of those whose long side is sharded only the Gram matrix of the short one.
    """

    name: str
    states: int
    transient: int | None
    releases: bool = False
    iterations: int | None = None
    gathers: bool = False
    grams: bool = False


def optimizer_memory(
    make: MakeOptimizer,
    groups: Iterable[Mapping[str, Any]],
    placed: Sequence[Placed],
    dtype: torch.dtype,
    device: Device,
) -> OptimizerMemory:
    """States and transient memory of an optimizer on the parameters that one device keeps.

    Args:
        make: called with groups of parameters on the meta device; so it is built as in a run, and allocates nothing.
        groups: as `parameter_groups` returns them.
        placed: where their parameters lie.
        dtype: of weights and gradients.
        device: where the step will be made.

    Raises:
        UsageError: for an optimizer that cannot be built or stepped without memory.
    """
    local = {place.name: torch.empty(place.local, dtype=dtype, device="meta") for place in placed}
    built = [
        {**group, "params": [(name, nn.Parameter(local[name])) for name, _ in group["params"]]} for group in groups
    ]
    try:
        optimizer = make(built)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the optimizer cannot be built: {' '.join(str(error).split())}") from None
    name = type(optimizer).__name__
    if isinstance(optimizer, MultiNormOptimizer):
        by_adam = [p for group in optimizer.param_groups if group["rule"] == "adam" for p in group["params"]]
        matrices = [place for place in placed if place.matrix]
        return OptimizerMemory(
            name=name,
            states=sum(2 * p.nbytes + torch.float32.itemsize for p in by_adam),
            transient=max(_normalizing(optimizer, matrices, dtype, device), _rounding(optimizer, by_adam, device)),
            iterations=_most_iterations(optimizer) if isinstance(optimizer, SinkGD) else None,
            gathers=not isinstance(optimizer, SinkGD),
            grams=isinstance(optimizer, SWAN) and optimizer.defaults["whitening"] == "newton_schulz",
            releases=True,
        )
    return OptimizerMemory(name, _count_states(optimizer), _elementwise(optimizer, device))


def _normalizing(optimizer: Optimizer, matrices: Sequence[Placed], dtype: torch.dtype, device: Device) -> int:
    """Vectors for SinkGD; for the others some float32 copies of the matrices that they take at a time."""
    if isinstance(optimizer, SinkGD):
        # Row and column scalings and sums, and another column sum; of all matrices at once, when they are sharded.
        vectors = (2 * matrix.local[0] + 3 * matrix.local[-1] for matrix in matrices)
        return torch.float32.itemsize * sum(vectors)
    whitens = isinstance(optimizer, SWAN) or (
        isinstance(optimizer, MultiNormGD) and any(isinstance(norm, SpectralNorm) for norm in optimizer.norms)
    )
    most = 0
    for matrix in matrices:
        entries, side = matrix.shape.numel(), min(matrix.shape)
        together = sum(other.shape == matrix.shape for other in matrices)
        stack = min(together, max(1, _STACK // entries)) if device == "gpu" else 1
        copies = (3 + 2 * whitens + (dtype.itemsize < 4)) * entries + 2 * whitens * side**2  # measured
        most = max(most, stack * copies)
    return torch.float32.itemsize * most


def _rounding(optimizer: Optimizer, by_adam: Sequence[Tensor], device: Device) -> int:
    """What Adam with stochastic rounding computes in float32, a block at a time; compiled, entry by entry."""
    if not optimizer.defaults["stochastic_rounding"] or (device == "cpu" and has_numba()):
        return 0
    rounded = [p.numel() for p in by_adam if p.dtype is torch.bfloat16]
    return ROUNDED_BYTES * min(max(rounded, default=0), rounded_block("cpu" if device == "cpu" else "cuda"))


def _count_states(optimizer: Optimizer) -> int:
    for group in optimizer.param_groups:
        # The plain loop knows parameters without memory, and keeps the same state.
        group.update({switch: False for switch in ("fused", "foreach", "capturable") if switch in group})
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    try:
        optimizer.step()
    except Exception as error:  # whatever an unknown optimizer does
        reason = " ".join(str(error).split())[:120]
        raise UsageError(
            f"the states of {type(optimizer).__name__} cannot be counted: its step on parameters without memory ends "
            f"in {type(error).__name__}: {reason}. Plan with another, such as torch.optim.AdamW"
        ) from None
    return sum(_bytes(value) for state in optimizer.state.values() for value in state.values())


def _most_iterations(optimizer: SinkGD) -> int:
    iterations = optimizer.defaults["iterations"]
    return int(optimizer.defaults["max_iterations"] if iterations == "auto" else iterations)


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_bytes, value))
    return _bytes(getattr(value, "__dict__", {}))  # an object, such as GaLore's projectors, has tensors of its own


def _elementwise(optimizer: Optimizer, device: Device) -> int | None:
    """Temporaries of torch's own Adam and SGD; lists of tensors at once on accelerators, unless told otherwise."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    switches, defaults = optimizer.defaults, optimizer.defaults
    one, all_of_them = max(p.nbytes for p in parameters), sum(p.nbytes for p in parameters)
    at_once = switches.get("foreach") or (switches.get("foreach") is None and device == "gpu")
    if isinstance(optimizer, AdamW | Adam):
        return 0 if switches.get("fused") else all_of_them if at_once else 2 * one
    if isinstance(optimizer, SGD):
        copies = bool(defaults["weight_decay"]) or (bool(defaults["momentum"]) and bool(defaults["nesterov"]))
        return 0 if not copies or switches.get("fused") else all_of_them if at_once else one
    return None
