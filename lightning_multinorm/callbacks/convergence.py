"""NormConvergence: how far each normalised gradient is from each norm, layer by layer, while a model trains."""

import re
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_multinorm.callbacks.telemetry import Telemetry
from lightning_multinorm.callbacks.tensorboard import TENSORBOARD_STEPS, Scalars, draw_maps, lay_out
from lightning_multinorm.errors import UsageError
from lightning_multinorm.layouts import clean
from lightning_multinorm.optim.base import MultiNormOptimizer
from lightning_multinorm.optim.groups import parameter_groups
from lightning_multinorm.optim.observation import Observation
from lightning_multinorm.optim.shadow import Shadow
from lightning_multinorm.strategies import is_flat


class NormConvergence(Callback):
    """Logs the residual of every norm for every multi-normalised parameter, in any Lightning project.

    Listens to the optimizer (`SinkGD`, `SWAN` or `MultiNormGD`): in a logged step the residuals fall out of the update
    itself, stay on the device, and are moved to the host once, when the step is logged. A residual is
    ‖X − P(X)‖_F / √(mn), about the relative error of the norm: 0.01 for "row" says that rows are 1 % off √n in the root
    mean square.

    Logs to every logger of the trainer, in steps of the optimizer:

    - ``norm_convergence/<parameter>/<norm>`` after the last iteration, and ``.../<iteration>`` after each, on request;
    - ``norm_convergence_by_layer/<layer>/<norm>`` and ``norm_convergence_by_kind/<kind>/<norm>``, root mean squares
      over parameters: the layer is the first number in a parameter's name, the kind the name of its module;
    - ``gradient_norm/<parameter>``, ``tail_index/...``, ``dead_rows/...``, ``dead_columns/...``, ``update_rms/...`` and
      ``update_to_weight/...``, see `optim.observation.STATISTICS`;
    - ``iterations/<parameter>`` if the optimizer chooses them (``iterations="auto"``).

    TensorBoard gets single parameters in every tenth step at most, for its writer is slow, layers and kinds always. It
    also gets maps of the residuals, layers by kinds and layers by iterations, at every validation and at the end, and
    a layout under "Custom Scalars".

    Args:
        every_n_steps: log in every n-th optimizer step, beginning with the first. Default: 50.
        per_iteration: also log the residuals after each iteration, from 1. Default: False. MLflow's file store cannot
            keep these, whose names begin with another's; its databases can.
        shadow: for a project that trains with any other optimizer: compute what SR-Sinkhorn (arXiv:2502.06742,
            Algorithm 3) would do to the gradients of the parameters that the papers' policy normalises, and leave them
            untouched. Costs L + 3 reads of those gradients in a logged step; logs nothing of updates. Default: False.
        iterations: L of the shadow mode. Default: 5.
        include: a regular expression; only parameters in whose names it is found are logged. Default: all.
        exclude: likewise, of parameters that are not. Default: none.
        warn_above: warn, once for each parameter, that it has not converged if its largest residual after the last
            iteration is above this. Default: never.

    Raises:
        ValueError: for every_n_steps or iterations below 1, or what is no regular expression.
        UsageError: at the start of training, if no optimizer of the family is there to listen to and shadow is off.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        per_iteration: bool = False,
        shadow: bool = False,
        iterations: int = 5,
        include: str | None = None,
        exclude: str | None = None,
        warn_above: float | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        if iterations < 1:
            raise ValueError(f"iterations={iterations} must be at least 1")
        self.every_n_steps = every_n_steps
        self.per_iteration = per_iteration
        self.shadow = shadow
        self.iterations = iterations
        self.include, self.exclude = _pattern("include", include), _pattern("exclude", exclude)
        self.warn_above = warn_above
        self._telemetry, self._scalars = Telemetry(per_iteration, updates=not shadow), Scalars()
        self._seen: dict[str, Observation] = {}
        self._names: dict[int, str] = {}
        self._shadow: Shadow | None = None
        self._warned: set[str] = set()

    @property
    def metrics(self) -> dict[str, float]:
        """What was logged last; also after a checkpoint was loaded."""
        return dict(self._telemetry.metrics)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        named = ((clean(name), parameter) for name, parameter in pl_module.named_parameters())
        self._names = {id(parameter): name for name, parameter in named if self._wants(name)}
        if self.shadow:
            model = trainer.strategy.model if is_flat(trainer) else pl_module
            self._shadow = Shadow(parameter_groups(model), self.iterations)  # type: ignore[arg-type]
        elif not _optimizers(trainer):
            names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
            raise UsageError(
                f"NormConvergence listens to SinkGD, SWAN or MultiNormGD, but this project trains with {names}; set "
                "shadow=True to watch what the norms would do to its gradients"
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.shadow or trainer.global_step % self.every_n_steps:
            return
        for optimizer in _optimizers(trainer):  # before the backward pass, in which gradient release updates
            if self._observe not in optimizer.observers:
                optimizer.observers.append(self._observe)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self._shadow is not None and not trainer.global_step % self.every_n_steps:
            for parameter, observation in self._shadow.observe():  # on all ranks, whatever is logged
                self._observe(parameter, observation)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._seen:
            return
        optimizers = _optimizers(trainer)
        for optimizer in optimizers:
            if self._observe in optimizer.observers:
                optimizer.observers.remove(self._observe)
        seen, self._seen = self._seen, {}
        chosen = any(group.get("iterations") == "auto" for optimizer in optimizers for group in optimizer.param_groups)
        metrics = self._telemetry.read(seen, iterations=chosen)
        self._warn()
        step = trainer.global_step - 1  # the one just taken, from 0, as Lightning numbers those of training
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                all_of_them = self.every_n_steps >= TENSORBOARD_STEPS or step % TENSORBOARD_STEPS == 0
                self._scalars.log(logger, metrics if all_of_them else self._telemetry.means, step)
            else:
                logger.log_metrics(metrics, step=step)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._draw(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"warned": sorted(self._warned), "metrics": self.metrics}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._warned = set(state_dict["warned"])
        self._telemetry.metrics = dict(state_dict["metrics"])

    def _wants(self, name: str) -> bool:
        included = self.include is None or self.include.search(name)
        return bool(included) and not (self.exclude is not None and self.exclude.search(name))

    def _observe(self, parameter: Tensor, observation: Observation) -> None:
        if name := self._names.get(id(parameter)):
            self._seen[name] = observation

    def _warn(self) -> None:
        if self.warn_above is None:
            return
        worst = self._telemetry.worst()
        new = {name: found for name, found in worst.items() if found[0] > self.warn_above and name not in self._warned}
        if not new:
            return
        self._warned |= new.keys()
        told = "; ".join(
            f"{self._telemetry.title(name)} has not converged: residual {residual:.2g} after {count} iterations"
            for name, (residual, count) in list(new.items())[:5]
        )
        more = f"; and {len(new) - 5} more" if len(new) > 5 else ""
        rank_zero_warn(f"{told}{more}. Raise the optimizer's iterations, or let it choose them with iterations='auto'")

    def _draw(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                lay_out(logger, self._telemetry)
                draw_maps(logger, self._telemetry, trainer.global_step - 1)


def _optimizers(trainer: Trainer) -> list[MultiNormOptimizer]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, MultiNormOptimizer)]


def _pattern(name: str, expression: str | None) -> re.Pattern[str] | None:
    try:
        return None if expression is None else re.compile(expression)
    except re.error as error:
        raise ValueError(f"{name}={expression!r} is no regular expression: {error}") from None
