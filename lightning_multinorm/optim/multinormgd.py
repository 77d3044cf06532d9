"""MNGD: gradient descent with any list of norms (arXiv:2502.06742, Algorithm 2)."""

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_multinorm.alternating import Trace, multi_normalize
from lightning_multinorm.batch import Batch
from lightning_multinorm.norms import Norm
from lightning_multinorm.optim.auto_iterations import Iterations
from lightning_multinorm.optim.base import MultiNormOptimizer
from lightning_multinorm.optim.groups import Group
from lightning_multinorm.optim.normalized import Normalize, apply_normalized_, apply_sharded_, gathered
from lightning_multinorm.optim.observation import Measured
from lightning_multinorm.sinkhorn.sharded import Job


@final
class MultiNormGD(MultiNormOptimizer):
    """Gradient descent with gradients normalised by several norms in turn; no state on matrices.

    ``W <- W - lr · matrix_lr_scale · MultiNorm(G, L, norms)`` for matrices (m, n); Adam for everything else
    (arXiv:2502.06742, Algorithm 2). For rows and columns `SinkGD` does the same faster. A sharded gradient is gathered,
    one matrix at a time, since a norm may ask for all of it.

    Args:
        params: as for `SinkGD`.
        norms: the norms, applied in this order, for example ``[RowNorm(), SpectralNorm()]``.
        lr: learning rate of all groups (default: 0.02).
        matrix_lr_scale: a matrix changes by ``lr · matrix_lr_scale`` RMS per entry and step (default: 0.05).
        iterations: L (default: 5), or "auto", as for `SinkGD`.
        weight_decay: decoupled, times the effective learning rate, on every group (default: 0).
        betas: Adam's, for what is not a matrix (default: (0.9, 0.999)).
        eps: Adam's, likewise (default: 1e-8).
        stochastic_rounding: round bfloat16 parameters at random, without bias (default), or to nearest.
        fallback_lr_scale: Adam's learning rate is ``lr · fallback_lr_scale`` (default: 1).
        tolerance: with ``iterations="auto"``, the largest residual of any norm that is let stand (default: 0.01).
        max_iterations: with ``iterations="auto"``, at most so many (default: 10).

    Raises:
        ValueError: for no norms, hyper-parameters out of range, an unknown rule, or a rule that does not fit a shape.
        TypeError: for complex or integer parameters.
    """

    _divisible = True

    def __init__(
        self,
        params: ParamsT,
        norms: Sequence[Norm],
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
    ) -> None:
        if not norms:
            raise ValueError("MultiNormGD: norms is empty; give at least one, such as RowNorm()")
        self.norms = tuple(norms)
        defaults = {
            "lr": lr,
            "iterations": iterations,
            "tolerance": tolerance,
            "max_iterations": max_iterations,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults, matrix_lr_scale=matrix_lr_scale, fallback_lr_scale=fallback_lr_scale)

    @property
    def width_exponent(self) -> float:
        """As SWAN's if a norm is spectral, else as SinkGD's."""
        return 0.5 if any(norm.name == "spectral" for norm in self.norms) else 1.0

    def _update_(self, batches: Sequence[Batch], group: Group) -> list[Measured]:
        updates = (apply_normalized_(batch, self._normalize(batch.iterations, batch.observe)) for batch in batches)
        return [seen for seen in updates if seen is not None]

    def _update_sharded_(
        self, jobs: Sequence[Job], group: Group, iterations: int, like: Tensor, *, observe: bool
    ) -> Measured | None:
        normalize = self._normalize(iterations, observe)
        return apply_sharded_(jobs, lambda matrix: gathered(matrix, normalize, like))

    def _normalize(self, iterations: int, observe: bool) -> Normalize:
        def normalize(G: Tensor) -> tuple[Tensor, Trace | None]:
            if observe:
                return multi_normalize(G, self.norms, iterations, return_trace=True)
            return multi_normalize(G, self.norms, iterations), None

        return normalize

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "norms": self.norms}
