"""Interleaved rounds: in each, every contender takes one step on the same matrices, in an order that is drawn anew.

Next to each step, before or after it, the reference takes one: a shared machine's memory changes its speed within
seconds, so what is compared must be close in time.
"""

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.optim import Optimizer

from benchmarks.optimizer_step.contenders import CONTENDERS, REFERENCE
from benchmarks.optimizer_step.matrices import Matrices
from benchmarks.optimizer_step.survey import Survey

_CACHE_BYTES = 64 * 2**20  # more than the last level of cache holds
_COPY_BYTES = 256 * 2**20
_WARM_UP = 2
_SLOW, _SLOW_ROUNDS = 20, 3  # a contender so many times slower than the reference is timed in so few rounds

_Pair = tuple[float, float]


@dataclass
class Timing:
    """Seconds of a contender's steps, and of the reference's next to them."""

    pairs: list[_Pair] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """The contender's own."""
        return [own for own, _ in self.pairs]

    @property
    def ratios(self) -> list[float]:
        """To the reference, pair by pair."""
        return [own / reference for own, reference in self.pairs]


def plan_blocks(surveys: Mapping[str, Survey], shared: int, memory: int) -> tuple[list[list[str]], list[str]]:
    """Split the contenders so that the states alive together fit the memory.

    Args:
        surveys: of the contenders, the reference among them.
        shared: bytes of weights and gradients.
        memory: bytes of the device.

    Returns:
        Blocks, each with the reference first, that take at most 60 % of the memory (90 % for a pair, and where the
        reference alone takes more than 60 %); and the contenders that do not fit even so.
    """

    def need(block: Sequence[str]) -> int:
        return shared + sum(surveys[key].state for key in block) + max(surveys[key].peak for key in block)

    rest = [key for key in surveys if key != REFERENCE]
    too_large = [key for key in rest if need([REFERENCE, key]) > 0.9 * memory]
    limit = (0.6 if need([REFERENCE]) <= 0.6 * memory else 0.9) * memory
    blocks = [[REFERENCE]]
    for key in rest:
        if key in too_large:
            continue
        if len(blocks[-1]) > 1 and need([*blocks[-1], key]) > limit:
            blocks.append([REFERENCE])
        blocks[-1].append(key)
    return blocks, too_large


def run_block(
    block: Sequence[str], matrices: Matrices, model: str, rounds: int, tell: Callable[[str], None]
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time a block that holds the reference; also returns why contenders fell out."""
    device = matrices.weights[0].device.type
    flush = torch.zeros(_CACHE_BYTES // 4, device=device)
    optimizers: dict[str, Optimizer] = {}
    failed: dict[str, str] = {}
    warm: dict[str, float] = {}

    def step(key: str) -> float:
        versions = matrices.versions()
        flush.add_(1)
        _synchronize(device)
        started = time.perf_counter()
        optimizers[key].step()
        _synchronize(device)
        seconds = time.perf_counter() - started
        if versions != matrices.versions():
            matrices.restore_gradients()
        return seconds

    for key in block:
        tell(f"warming up {key}")
        try:
            optimizers[key] = CONTENDERS[key].build(matrices.weights, model)
            warm[key] = [step(key) for _ in range(_WARM_UP)][-1]
        except Exception as error:  # it ran when it was surveyed: say why not now, and go on
            failed[key] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            optimizers.pop(key, None)
            if key == REFERENCE:
                raise
    few = {round(k * (rounds - 1) / max(1, _SLOW_ROUNDS - 1)) for k in range(_SLOW_ROUNDS)}
    timings = {key: Timing() for key in optimizers}
    order = random.Random(matrices.seed)
    for i in range(rounds):
        tell(f"round {i + 1} of {rounds}")
        keys = [key for key in optimizers if i in few or warm[key] <= _SLOW * warm[REFERENCE]]
        order.shuffle(keys)
        for key in keys:
            pair = [key] if key == REFERENCE else [REFERENCE, key]
            order.shuffle(pair)
            seconds = {one: step(one) for one in pair}
            timings[key].pairs.append((seconds[key], seconds[REFERENCE]))
    optimizers.clear()
    gc.collect()
    return timings, failed


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of the best of some copies of a large buffer."""
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    best = float("inf")
    for _ in range(10):
        _synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * _COPY_BYTES / best


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
