"""Tokens seen, time and memory taken, and tokens per second."""

import resource
import sys
import time
from collections import deque
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_multinorm.callbacks.termination import TerminationCheckpoint
from lightning_multinorm.flops import peak_flops
from lightning_multinorm.strategies import batches_side_by_side

C = TypeVar("C", bound=Callback)


class Throughput(Callback):
    """Logs tokens, time and memory of a training.

    ``tokens``: all that were trained on so far, by all ranks together: the labels of a batch that count in the loss, or
    the entries of ``batch["input_ids"]`` where a batch has no labels. ``seconds``: spent on batches so far, without
    validation, checkpoints and waiting for data; it goes on with a checkpoint, as tokens do.
    ``throughput/tokens_per_second``: over the last ``window`` batches. Time is of the host's clock, which an
    accelerator's queue follows. ``throughput/mfu``: share of the devices' dense peak that the model's own FLOPs make
    (model FLOPs utilisation; PaLM, arXiv:2204.02311, Appendix B), where ``pl_module.flops_per_token(length)`` tells
    them and `flops.PEAKS` knows the GPU; else it is not logged.

    ``memory/peak_mib``: the most that this rank has allocated on a CUDA device, or where it trains on none, the most
    that its process has had in memory. ``memory/optimizer_state_mib``: of the tensors in the optimizers' states on this
    rank, counted once, after the first step. ``parameters``: of the model, once, at the start.

    Args:
        window: batches to average over. Default: 50.
    """

    def __init__(self, window: int = 50) -> None:
        if window < 1:
            raise ValueError(f"window={window} must be at least 1")
        self._tokens: Tensor | int = 0  # on the device, which is not to be waited for in every step
        self._recent: deque[tuple[Tensor | int, float]] = deque(maxlen=window)
        self._started = 0.0
        self._seconds = 0.0
        self._state_mib: float | None = None
        self._full_rate: float | None = None  # tokens a second at the devices' peak; 0 where it is not known

    @property
    def tokens(self) -> int:
        """All that were trained on."""
        return int(self._tokens)

    @property
    def tokens_per_second(self) -> float:
        """Over the window; 0 before the first batch has ended."""
        return float(self._rate)

    @property
    def _rate(self) -> Tensor | float:
        seconds = sum(elapsed for _, elapsed in self._recent)
        return sum(tokens for tokens, _ in self._recent) / seconds if seconds else 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._state_mib = self._full_rate = None
        parameters = sum(parameter.numel() for parameter in pl_module.parameters())
        for logger in trainer.loggers:
            logger.log_metrics({"parameters": parameters}, step=trainer.global_step)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._full_rate is None:
            self._full_rate = _full_rate(trainer, pl_module, batch)
        self._started = time.perf_counter() - _saving(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        tokens = _tokens(trainer, batch)
        self._tokens = tokens + self._tokens
        elapsed = time.perf_counter() - _saving(trainer) - self._started
        self._recent.append((tokens, elapsed))
        self._seconds += elapsed
        measured = {"seconds": self._seconds, "memory/peak_mib": _peak_mib(pl_module.device)}
        if self._state_mib is None and trainer.global_step > 0:  # a step has made the states
            self._state_mib = sum(map(_state_mib, trainer.optimizers))
        if self._state_mib is not None:
            measured["memory/optimizer_state_mib"] = self._state_mib
        # Filled in on the device: a copy from the host, which Lightning would make of a number, waits for the queue.
        on_device = {name: torch.full((), value, device=pl_module.device) for name, value in measured.items()}
        rates = {"tokens": self._tokens.float(), "throughput/tokens_per_second": self._rate}
        if self._full_rate:
            rates["throughput/mfu"] = rates["throughput/tokens_per_second"] / self._full_rate
        pl_module.log_dict({**rates, **on_device}, on_epoch=False)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "seconds": self._seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._tokens = state_dict["tokens"]
        self._seconds = state_dict.get("seconds", 0.0)  # checkpoints from before it was counted


def _tokens(trainer: Trainer, batch: Any) -> Tensor:
    """Of all ranks together, 0-d."""
    if "labels" not in batch:
        return torch.tensor(batch["input_ids"].numel() * batches_side_by_side(trainer))
    everywhere = trainer.strategy.reduce((batch["labels"] >= 0).sum(), reduce_op="sum")
    return everywhere * batches_side_by_side(trainer) // trainer.world_size  # tensor parallel ranks share a batch


def _full_rate(trainer: Trainer, pl_module: LightningModule, batch: Any) -> float:
    """Tokens a second of all devices at their peak; 0 where that is not known."""
    flops = getattr(pl_module, "flops_per_token", None)
    if flops is None or pl_module.device.type != "cuda":
        return 0.0
    peak = peak_flops(torch.cuda.get_device_name(pl_module.device), trainer.precision) or 0.0
    return peak * trainer.world_size / flops(batch["input_ids"].shape[-1])


def _peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
    return resident / (2**20 if sys.platform == "darwin" else 2**10)


def _state_mib(optimizer: Optimizer) -> float:
    """Of the part that lies on this rank; a step counter is a tensor, too."""
    states = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum((state.to_local() if isinstance(state, DTensor) else state).nbytes for state in states) / 2**20


def _saving(trainer: Trainer) -> float:
    """Seconds spent so far in saving what was trained before a batch."""
    return sum(callback.seconds for callback in callbacks(trainer, TerminationCheckpoint))


def callbacks(trainer: Trainer, kind: type[C]) -> list[C]:
    """The trainer's callbacks of a kind."""
    attached: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in attached if isinstance(callback, kind)]
