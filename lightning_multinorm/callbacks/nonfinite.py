"""NonFiniteGradients: a NaN or an infinity in a gradient never reaches a weight."""

import logging
import math
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_multinorm.errors import UsageError
from lightning_multinorm.layouts import FlatSlice, clean, flat_slices
from lightning_multinorm.layouts.clipping import gradient_norm, nonfinite_entries
from lightning_multinorm.optim.base import MultiNormOptimizer

IN_A_ROW = 100
"""Skipped steps without one between them that was taken, at which training stops."""
_NAMED = 3  # parameters in a message
_log = logging.getLogger(__name__)

Found = list[tuple[Tensor, int]]
"""Parameters, and how many entries of their gradients are NaN or infinite."""


class NonFiniteGradients(Callback):
    """Skips a step, or stops, if any gradient is NaN or infinite on any rank; in any Lightning project.

    Works with every optimizer of torch: a skipped step has no gradients, so it changes neither weights nor states, nor
    does weight decay. Under accumulation the whole window is dropped. Schedulers go on, and the step counts as one. A
    finite gradient is never skipped, however large. Costs one read of the gradients, and the host waits for the device
    once in a step.

    Under gradient release only the parameters with such a gradient are left as they are, for the others have been
    updated when it is seen. Under "16-mixed" the loss scaler skips by itself, and finds its scale by that: gradients
    are left to it and steps counted, but none stops training.

    Logs in every step ``train/gradient_norm``, l2, of all gradients together before clipping (infinite also if their
    squares overflow float32), and ``skipped_steps``, how many were skipped so far, also before the checkpoint that a
    run goes on from; and for each skipped step a line with the worst parameters. Steps are numbered from 0, as in the
    metrics.

    Args:
        action: "skip" the step (default), or "stop" training before it. After 100 skipped steps in a row training
            stops anyway.

    Raises:
        ValueError: for another action.
        UsageError: to stop, with the names of the parameters.
    """

    def __init__(self, action: Literal["skip", "stop"] = "skip") -> None:
        if action not in ("skip", "stop"):
            raise ValueError(f'action={action!r} must be "skip" or "stop"')
        self.action = action
        self.skipped = 0
        self._in_a_row = 0
        self._slices: dict[Any, FlatSlice] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._slices = {**flat_slices(trainer.strategy.model or pl_module)}

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm, found = self._look(trainer, parameters)
        released = optimizer.released if isinstance(optimizer, MultiNormOptimizer) else None
        if released is not None:
            norm = math.hypot(norm, math.sqrt(released.square))
            found = found + released.left
            released.left = []
        if not found:
            self._in_a_row = 0
        else:
            self._meet(trainer, pl_module, parameters, found, release=released is not None)
        # As tensors of the host: Lightning would move a number to the device, and wait for it.
        values = {"train/gradient_norm": torch.tensor(norm), "skipped_steps": torch.tensor(float(self.skipped))}
        pl_module.log_dict(values)

    def _look(self, trainer: Trainer, parameters: list[Tensor]) -> tuple[float, Found]:
        """The norm of all gradients, and those that are not finite.

        Reduced over replicas too. Their gradients are equal, but where each computes its own, as for norms under tensor
        parallelism, not always to the last bit; and if one alone skipped a step, the others would wait for it.
        """
        reduce = trainer.strategy.reduce
        norm = reduce(gradient_norm(parameters, self._slices), reduce_op="mean").item()
        if math.isfinite(norm):
            return norm, []
        entries = reduce(nonfinite_entries(parameters, self._slices), reduce_op="max").tolist()
        return norm, [(parameter, count) for parameter, count in zip(parameters, entries, strict=True) if count]

    def _meet(
        self, trainer: Trainer, pl_module: LightningModule, parameters: list[Tensor], found: Found, *, release: bool
    ) -> None:
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        where = f"step {trainer.global_step}: NaN or infinity in {_describe(pl_module, found, len(parameters))}"
        kept = "these were not updated" if release else "no weight was changed"
        if self.action == "stop" and not scaled:
            raise UsageError(
                f"{where}; {kept}, and training stops: go on from the last checkpoint with a lower learning rate or "
                "other data, or skip such steps with nonfinite.action=skip"
            )
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= IN_A_ROW:
            raise UsageError(
                f"{where}; so it was in {self._in_a_row} steps in a row, and {kept} in them: go on from an earlier "
                "checkpoint with a lower learning rate, or see with detect_anomaly=True where the first NaN is made"
            )
        if not scaled:
            for parameter in parameters:
                parameter.grad = None
        _warn(f"{where}; {kept}; skipped so far: {self.skipped}")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]


def _describe(module: LightningModule, found: Found, total: int) -> str:
    """The worst few by name."""
    names = {id(parameter): clean(name) for name, parameter in module.named_parameters()}
    worst = sorted(found, key=lambda entry: -entry[1])[:_NAMED]
    named = ", ".join(f"{names.get(id(parameter), 'a parameter')}: {count:,} entries" for parameter, count in worst)
    more = ", ..." if len(found) > _NAMED else ""
    return f"the gradients of {len(found)} of {total} parameters ({named}{more})"


@rank_zero_only
def _warn(line: str) -> None:
    _log.warning(line)
