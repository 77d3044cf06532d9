"""NormConvergence: how far each normalised gradient is from each norm, layer by layer, while a model trains."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_multinorm.alternating import Trace
from lightning_multinorm.errors import UsageError
from lightning_multinorm.layouts import clean
from lightning_multinorm.optim.base import MultiNormOptimizer
from lightning_multinorm.optim.groups import parameter_groups
from lightning_multinorm.sinkhorn import scalings
from lightning_multinorm.views import as_matrices


class NormConvergence(Callback):
    """Logs the residual of every norm for every multi-normalised parameter, in any Lightning project.

    Listens to the optimizer (`SinkGD`, `SWAN` or `MultiNormGD`): in a logged step the residuals fall out of the update
    itself, stay on the device, and are moved to the host once. A residual is ‖X − P(X)‖_F / √(mn), about the relative
    error of the norm: 0.01 for "row" says that rows are 1 % off √n in the root mean square.

    Logs ``norm_convergence/<parameter name>/<norm>`` after the last iteration to every logger of the trainer.

    Args:
        every_n_steps: log in every n-th optimizer step, beginning with the first. Default: 50.
        per_iteration: also log ``norm_convergence/<parameter name>/<norm>/<iteration>`` for each iteration, from 1.
        shadow: for a project that trains with any other optimizer: compute what SR-Sinkhorn (arXiv:2502.06742,
            Algorithm 3) would do to the gradients of the parameters that the papers' policy normalises, and leave them
            untouched. Costs L + 3 reads of those gradients in a logged step.
        iterations: L of the shadow mode. Default: 5.

    Raises:
        ValueError: for every_n_steps or iterations below 1.
        UsageError: at the start of training, if no optimizer of the family is there to listen to and shadow is off.
    """

    def __init__(
        self, every_n_steps: int = 50, per_iteration: bool = False, shadow: bool = False, iterations: int = 5
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        if iterations < 1:
            raise ValueError(f"iterations={iterations} must be at least 1")
        self.every_n_steps = every_n_steps
        self.per_iteration = per_iteration
        self.shadow = shadow
        self.iterations = iterations
        self._traces: dict[str, Trace] = {}
        self._names: dict[int, str] = {}
        self._shadowed: list[tuple[str, Tensor, Any]] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._names = {id(parameter): clean(name) for name, parameter in pl_module.named_parameters()}
        if self.shadow:
            self._shadowed = [
                (name, parameter, group["view"])
                for group in parameter_groups(pl_module)
                if group["rule"] == "multinorm"
                for name, parameter in group["params"]
            ]
        elif not any(isinstance(optimizer, MultiNormOptimizer) for optimizer in trainer.optimizers):
            names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
            raise UsageError(
                f"NormConvergence listens to SinkGD, SWAN or MultiNormGD, but this project trains with {names}; set "
                "shadow=True to watch what the norms would do to its gradients"
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.shadow or trainer.global_step % self.every_n_steps:
            return
        for optimizer in trainer.optimizers:  # before the backward pass, in which gradient release updates
            if isinstance(optimizer, MultiNormOptimizer) and self._observe not in optimizer.observers:
                optimizer.observers.append(self._observe)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self.shadow and not trainer.global_step % self.every_n_steps:
            self._compute_shadow()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._traces:
            return
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, MultiNormOptimizer) and self._observe in optimizer.observers:
                optimizer.observers.remove(self._observe)
        metrics = self._metrics()
        self._traces = {}
        for logger in trainer.loggers:
            # The step that was just taken, numbered from 0 as Lightning numbers the metrics of a training step.
            logger.log_metrics(metrics, step=trainer.global_step - 1)

    def _observe(self, parameter: Tensor, trace: Trace) -> None:
        self._traces[self._names[id(parameter)]] = trace

    @torch.no_grad()
    def _compute_shadow(self) -> None:
        for name, parameter, view in self._shadowed:
            if parameter.grad is not None:
                G = as_matrices(parameter.grad, view, like=parameter)
                _, _, residuals = scalings(G, self.iterations, trace=True)
                assert residuals is not None
                if residuals.ndim > 2:
                    residuals = residuals.flatten(0, -3).square().mean(0).sqrt()
                self._traces[name] = Trace(("row", "column"), residuals)

    def _metrics(self) -> dict[str, float]:
        """All residuals of the step, moved to the host in one piece."""
        traces = list(self._traces.items())
        values = iter(torch.cat([trace.residuals.flatten().float() for _, trace in traces]).tolist())
        metrics: dict[str, float] = {}
        for name, trace in traces:
            count = trace.residuals.shape[0]
            for iteration in range(1, count + 1):
                for norm in trace.norms:
                    key, value = f"norm_convergence/{name}/{norm}", next(values)
                    if self.per_iteration:
                        metrics[f"{key}/{iteration}"] = value
                    if iteration == count:
                        metrics[key] = value
        return metrics
