"""SinkGD: SGD with SR-Sinkhorn-normalised gradients (arXiv:2502.06742, Algorithm 4)."""

from collections.abc import Sequence
from typing import Any, Literal, final, get_args

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_multinorm import sinkhorn
from lightning_multinorm.batch import Batch
from lightning_multinorm.optim import operator_norm
from lightning_multinorm.optim.auto_iterations import Iterations
from lightning_multinorm.optim.base import MultiNormOptimizer
from lightning_multinorm.optim.groups import Group
from lightning_multinorm.optim.observation import Measured
from lightning_multinorm.sinkhorn import select, sharded
from lightning_multinorm.sinkhorn.sharded import Job

Rescale = Literal["rms", "operator"]


@final
class SinkGD(MultiNormOptimizer):
    """Gradient descent with rows and columns of the gradient normalised in turn; no state on matrices.

    ``W <- W - lr · matrix_lr_scale · SR-Sinkhorn(G)`` for matrices (m, n), whose update has entries of RMS 1;
    Adam for embeddings, output head, norms and biases (arXiv:2502.06742, Algorithm 4, and its experiments).

    Args:
        params: ``model.named_parameters()`` (names choose the rule), ``parameter_groups(model)`` (modules choose it),
            groups with a "rule", or ``model.parameters()`` (all of two or more dimensions is normalised; warns).
        lr: learning rate of all groups (default: 0.02, the value that implementations of the paper agree on).
        matrix_lr_scale: the paper's α; a matrix changes by ``lr · matrix_lr_scale`` RMS per entry and step
            (default: 0.05, so 1e-3 at the peak).
        iterations: L, alternations of rows and columns (default: 5). "auto": every 32nd step makes
            ``max_iterations`` and measures how many each parameter needs to come within ``tolerance``; the steps until
            the next make so many. Differs from the paper. To measure, the host waits for the device once.
        weight_decay: decoupled, times the effective learning rate, on every group (default: 0).
        betas: Adam's, for what is not a matrix (default: (0.9, 0.999)).
        eps: Adam's, likewise (default: 1e-8).
        stochastic_rounding: round bfloat16 parameters up or down at random, so that the expected value is exact and
            no update is lost (default); to nearest if False. Other dtypes are always rounded to nearest.
        fallback_lr_scale: Adam's learning rate is ``lr · fallback_lr_scale`` (default: 1: one lr for all).
        tolerance: with ``iterations="auto"``, the largest residual of any norm that is let stand (default: 0.01).
        max_iterations: with ``iterations="auto"``, at most so many (default: 10).
        rescale: what size a matrix's update has. "rms" (default, the paper): entries of RMS 1. "operator": spectral
            norm √(m/n), so that ``lr · matrix_lr_scale`` is how much a step changes the RMS of an output whose input
            has RMS 1, whatever the width (arXiv:2310.17813, condition 1): a rate found on a narrow model carries over
            to a wide one. The norm is found without state, some 1 % too low and rarely 6 %, by eight steps of Lanczos'
            iteration, each of them one more read of G (two if rows are cut over ranks).
        kernel: what computes SR-Sinkhorn. "auto" (default) takes Numba on CPUs and Triton on GPUs where they are
            installed and the dtypes are float32, bfloat16 or float16, else plain PyTorch ("eager").

    Raises:
        ValueError: for hyper-parameters out of range, an unknown rule or kernel, or a rule that does not fit a shape.
        ModuleNotFoundError: for a kernel whose package is missing.
        TypeError: for complex or integer parameters.
    """

    _scheme = ("rescale",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        matrix_lr_scale: float = 0.05,
        iterations: Iterations = 5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        stochastic_rounding: bool = True,
        fallback_lr_scale: float = 1.0,
        tolerance: float = 0.01,
        max_iterations: int = 10,
        rescale: Rescale = "rms",
        kernel: sinkhorn.Kernel = "auto",
    ) -> None:
        select.check_kernel(kernel)
        if rescale not in get_args(Rescale):
            raise ValueError(f"SinkGD: rescale={rescale!r} is unknown; use 'rms' (the paper's) or 'operator'")
        self._kernel = kernel
        defaults = {
            "lr": lr,
            "iterations": iterations,
            "tolerance": tolerance,
            "max_iterations": max_iterations,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "stochastic_rounding": stochastic_rounding,
            "rescale": rescale,
        }
        super().__init__(params, defaults, matrix_lr_scale=matrix_lr_scale, fallback_lr_scale=fallback_lr_scale)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kernel": self._kernel}

    @property
    def width_exponent(self) -> float:
        """Its matrices' best rate falls with 1/width, as Adam's; not at all if the operator norm sets the size."""
        return 0.0 if self.defaults["rescale"] == "operator" else 1.0

    def _update_(self, batches: Sequence[Batch], group: Group) -> list[Measured]:
        if group["rescale"] == "operator":
            updates = (self._update_by_operator_norm_(batch) for batch in batches)
            return [seen for seen in updates if seen is not None]
        return [
            Measured(("row", "column"), *found.vectors, weights=found.weights, sums=found.sums)
            for found in sinkhorn.update_all_(batches, kernel=self._kernel)
            if found is not None
        ]

    def _update_by_operator_norm_(self, batch: Batch) -> Measured | None:
        dtypes = {batch.weights[0].dtype, batch.gradients[0].dtype}
        return operator_norm.update_whole_(batch, select.passes(self._kernel, batch.weights[0].device, dtypes))

    def _update_sharded_(
        self, jobs: Sequence[Job], group: Group, iterations: int, like: Tensor, *, observe: bool
    ) -> Measured | None:
        tensors = [x for job in jobs for piece in job.matrix.pieces for x in (piece.weight, piece.gradient)]
        passes = select.passes(self._kernel, like.device, {x.dtype for x in [*tensors, like]})
        if group["rescale"] == "operator":
            return operator_norm.update_(jobs, iterations, passes, like, observe=observe)
        found = sharded.update_(jobs, iterations, passes, like, trace=observe)
        return None if found is None else Measured(("row", "column"), *found.vectors)
