"""Learning rate schedules with a warm-up, as classes that a configuration file can name.

Both multiply each group's initial learning rate by a factor of the step, so groups keep their ratios.
"""

import math
from abc import abstractmethod
from typing import Any, final

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupSchedule(LRScheduler):
    """A factor of the step over a run of known length: linear warm-up, then what the subclass says.

    Args:
        optimizer: the optimizer.
        total_steps: length of the run in optimizer steps. None leaves it to be set before the first step, as
            `LlamaPretraining` does with the trainer's number of steps.
        warmup: fraction of the run that is linear warm-up, in [0, 1). Default: 0.1.
        final: factor at the end of the run, in [0, 1]. Default: 0.1.
        last_epoch: as in torch.

    Raises:
        ValueError: for a value out of range.
        RuntimeError: when stepped without total_steps.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        warmup: float = 0.1,
        final: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps={total_steps} must be at least 1")
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup={warmup} must be a fraction of the run, in [0, 1)")
        if not 0 <= final <= 1:
            raise ValueError(f"final={final} must be a fraction of the peak, in [0, 1]")
        self._total_steps = total_steps
        self.warmup = warmup
        self.final = final
        super().__init__(optimizer, last_epoch)

    @property
    def total_steps(self) -> int | None:
        """Length of the run in optimizer steps. Setting it moves the learning rates to the new schedule at once."""
        return self._total_steps

    @total_steps.setter
    def total_steps(self, value: int) -> None:
        self._total_steps = value
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr
        self._last_lr = self.get_lr()

    @abstractmethod
    def after_warmup(self, progress: float) -> float:
        """The factor, for the progress in [0, 1] from the end of the warm-up to the end of the run."""

    def get_lr(self) -> list[float | Tensor]:
        """Learning rate of each group at the current step."""
        return [base * self._factor(self.last_epoch) for base in self.base_lrs]

    def _factor(self, step: int) -> float:
        if self._total_steps is None:
            if step > 0:
                raise RuntimeError(
                    f"{type(self).__name__}: total_steps is None; pass it, or set it before the first step"
                )
            return 0.0
        warmup_steps = round(self.warmup * self._total_steps)
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return self.after_warmup(min(1.0, (step - warmup_steps) / max(1, self._total_steps - warmup_steps)))

    def state_dict(self) -> dict[str, Any]:
        """The position in the run; its length and shape belong to the configuration, not to the checkpoint."""
        return {key: value for key, value in super().state_dict().items() if key not in _CONFIGURATION}


_CONFIGURATION = ("_total_steps", "warmup", "final", "decay")


@final
class WarmupCosine(WarmupSchedule):
    """Linear warm-up, then a cosine from the peak to ``final`` times the peak (the papers': 10 % and 10 %)."""

    def after_warmup(self, progress: float) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


@final
class WarmupStableDecay(WarmupSchedule):
    """Linear warm-up, the peak, then a linear decay to ``final`` times the peak over the last part of the run.

    Args:
        optimizer: the optimizer.
        total_steps: as in `WarmupSchedule`.
        warmup: as in `WarmupSchedule`.
        final: as in `WarmupSchedule`; default here: 0.
        decay: fraction of what follows the warm-up that decays, in (0, 1]. Default: 0.2.
        last_epoch: as in torch.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        warmup: float = 0.1,
        final: float = 0.0,
        decay: float = 0.2,
        last_epoch: int = -1,
    ) -> None:
        if not 0 < decay <= 1:
            raise ValueError(f"decay={decay} must be in (0, 1]")
        self.decay = decay
        super().__init__(optimizer, total_steps, warmup, final, last_epoch)

    def after_warmup(self, progress: float) -> float:
        return 1 - (1 - self.final) * max(0.0, (progress - (1 - self.decay)) / self.decay)
