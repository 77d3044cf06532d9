"""SWAN: SGD with row-normalised, whitened gradients (arXiv:2412.13148, Algorithm 1)."""

from collections.abc import Sequence
from typing import Literal, final, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_multinorm import sinkhorn
from lightning_multinorm.alternating import Trace
from lightning_multinorm.batch import Batch
from lightning_multinorm.layouts import ShardedMatrix, gather
from lightning_multinorm.norms import ColumnNorm, RowNorm, SpectralNorm
from lightning_multinorm.optim.base import MultiNormOptimizer
from lightning_multinorm.optim.gram import has_local_gram, row_normalized, sinkhorn_normalized, whitened
from lightning_multinorm.optim.groups import Group
from lightning_multinorm.optim.normalized import Normalize, apply_normalized_, apply_sharded_, gathered
from lightning_multinorm.optim.observation import Measured
from lightning_multinorm.sinkhorn.sharded import Job
from lightning_multinorm.whitening import Orthogonalization, polar_newton_schulz, polar_svd

Normalization = Literal["row", "sinkhorn"]

# What the residuals are measured against.
_ROW, _COLUMN, _SPECTRAL = RowNorm(), ColumnNorm(), SpectralNorm("newton_schulz", k=20, beta=0.5)


@final
class SWAN(MultiNormOptimizer):
    """Gradient descent with gradients normalised by rows and then whitened; no state on matrices.

    ``W <- W - lr · matrix_lr_scale · √(mn) · X / ‖X‖_F`` with ``X = GradWhitening(GradNorm(G))``, an update with
    entries of RMS 1 for matrices (m, n); Adam for everything else (arXiv:2412.13148, Algorithms 1 to 3). In the terms
    of arXiv:2502.06742 this is MultiNorm with the row and the spectral norm, L = 1.

    ``normalization="sinkhorn"`` differs from the paper: rows and columns are normalised in turn by SR-Sinkhorn, in
    place of rows alone, and then whitened. With few Newton–Schulz steps (k = 1 or 2) that is SinkGD with its large
    singular values held back and its small ones raised. Rows and columns of the result are no longer exactly even.

    Of a sharded matrix only the Gram matrix of its short side travels if the long side is sharded, and is whitened in
    float32; else, and for "svd", the gradient is gathered, one matrix at a time.

    Args:
        params: as for `SinkGD`.
        lr: learning rate of all groups (default: 0.02).
        matrix_lr_scale: a matrix changes by ``lr · matrix_lr_scale`` RMS per entry and step (default: 0.05).
        whitening: "newton_schulz" (default) or "svd", the exact polar factor.
        k: Newton–Schulz iterations (default: 10; like β's, from implementations of the paper, not checked against it).
        beta: Newton–Schulz step β (default: 0.8; 0.5 converges to the exact factor, but needs more iterations).
        precision: of Newton–Schulz' products: "float32" (default) or "bfloat16", as Muon's, faster where the hardware
            multiplies bfloat16; singular values move by about 1/100.
        center: subtract each row's mean in GradNorm. Default: False; the paper's first version did.
        normalization: what comes before whitening: "row" (default, the paper's GradNorm) or "sinkhorn", SR-Sinkhorn
            (arXiv:2502.06742, Algorithm 3).
        iterations: L of SR-Sinkhorn (default: 5); "row" needs none.
        weight_decay: decoupled, times the effective learning rate, on every group (default: 0).
        betas: Adam's, for what is not a matrix (default: (0.9, 0.999)).
        eps: Adam's, likewise (default: 1e-8).
        stochastic_rounding: round bfloat16 parameters at random, without bias (default), or to nearest.
        fallback_lr_scale: Adam's learning rate is ``lr · fallback_lr_scale`` (default: 1).

    Raises:
        ValueError: for hyper-parameters out of range, an unknown rule, or a rule that does not fit a shape.
        TypeError: for complex or integer parameters.
    """

    _scheme = ("whitening", "k", "beta", "precision", "center", "normalization")
    _divisible = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        matrix_lr_scale: float = 0.05,
        whitening: Orthogonalization = "newton_schulz",
        k: int = 10,
        beta: float = 0.8,
        precision: Literal["float32", "bfloat16"] = "float32",
        center: bool = False,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        normalization: Normalization = "row",
        iterations: int = 5,
        stochastic_rounding: bool = True,
        fallback_lr_scale: float = 1.0,
    ) -> None:
        SpectralNorm(whitening)  # refuses an unknown one
        if k < 1:
            raise ValueError(f"SWAN: k={k} must be at least 1")
        if not 0 < beta <= 0.8:
            raise ValueError(f"SWAN: beta={beta} must be in (0, 0.8]; beyond, the iteration diverges")
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"SWAN: precision={precision!r} is unknown; use 'float32' or 'bfloat16'")
        if normalization not in get_args(Normalization):
            raise ValueError(f"SWAN: normalization={normalization!r} is unknown; use 'row' or 'sinkhorn'")
        if center and normalization != "row":
            raise ValueError(
                "SWAN: center=True goes with normalization='row' alone; centred columns would not stay even"
            )
        if not (type(iterations) is int and iterations >= 1):
            raise ValueError(f"SWAN: iterations={iterations!r} must be at least 1")
        defaults = {
            "lr": lr,
            "whitening": whitening,
            "k": k,
            "beta": beta,
            "precision": precision,
            "center": center,
            "normalization": normalization,
            "iterations": iterations,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults, matrix_lr_scale=matrix_lr_scale, fallback_lr_scale=fallback_lr_scale)

    @property
    def width_exponent(self) -> float:
        """The spectral norm of a whitened update with entries of RMS 1 grows as √width."""
        return 0.5

    def _update_(self, batches: Sequence[Batch], group: Group) -> list[Measured]:
        updates = (apply_normalized_(batch, _normalize(group, batch.observe)) for batch in batches)
        return [seen for seen in updates if seen is not None]

    def _update_sharded_(
        self, jobs: Sequence[Job], group: Group, iterations: int, like: Tensor, *, observe: bool
    ) -> Measured | None:
        normalize = _normalize(group, observe)

        def direction(matrix: ShardedMatrix) -> tuple[list[Tensor], Trace | None]:
            if group["whitening"] == "svd" or not has_local_gram(matrix):
                return gathered(matrix, normalize, like)
            normalized = _normalized(matrix, like, group)
            pieces = whitened(matrix, normalized, k=group["k"], beta=group["beta"])
            if not observe:
                return pieces, None
            wide = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
            return pieces, _trace(gather(matrix, pieces, wide), group)

        return apply_sharded_(jobs, direction)


def _normalize(group: Group, observe: bool) -> Normalize:
    dtype = torch.bfloat16 if group["precision"] == "bfloat16" else None

    def normalize(G: Tensor) -> tuple[Tensor, Trace | None]:
        if group["normalization"] == "sinkhorn":
            X = sinkhorn.sr_sinkhorn(G, group["iterations"])
        else:
            X = RowNorm().project(G)
        if group["center"]:
            X = RowNorm().project(X - X.mean(-1, keepdim=True))
        if group["whitening"] == "svd":
            X = polar_svd(X)
        else:
            X = polar_newton_schulz(X, k=group["k"], beta=group["beta"], dtype=dtype)
        norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
        X.mul_((X.shape[-2] * X.shape[-1]) ** 0.5 / torch.where(norm == 0, 1, norm))
        return X, _trace(X, group) if observe else None

    return normalize


def _normalized(matrix: ShardedMatrix, like: Tensor, group: Group) -> Tensor:
    """What this rank holds of the gradient, normalised; see `gram`."""
    if group["normalization"] == "sinkhorn":
        return sinkhorn_normalized(matrix, like, group["iterations"])
    return row_normalized(matrix, like, center=group["center"])


def _trace(X: Tensor, group: Group) -> Trace:
    """X (..., m, n) after the one iteration."""
    norms = (_ROW, _COLUMN, _SPECTRAL) if group["normalization"] == "sinkhorn" else (_ROW, _SPECTRAL)
    residuals = torch.stack([norm.residual(X) for norm in norms], dim=-1)
    return Trace(tuple(norm.name for norm in norms), residuals.unsqueeze(-2))
