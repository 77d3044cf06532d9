"""The alternating scheme over any list of norms: MultiNorm (arXiv:2502.06742, Algorithm 1), with a trace of residuals.

Stands on the norms alone. The row/column pair has a faster home in `sinkhorn`; this is the general and the precise one.

Legend: X iterate (m, n); P_k projection of the k-th norm; L iterations; K norms.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from lightning_multinorm.norms import Norm

_MOST_ITERATIONS = 10_000
_PATIENCE = 50  # iterations without a 1 % better residual after which a tolerance counts as out of reach


@dataclass(frozen=True)
class Trace:
    """How an alternating normalisation converged.

    Attributes:
        norms: names of the norms, in order.
        residuals: (iterations run, len(norms)); for a batch (..., iterations run, len(norms)).
            ``residuals[l, k]`` is ‖X − P_k(X)‖_F / √(mn) after full iteration l + 1: about the relative error of
            the k-th norm, 0 once X is its own projection.
    """

    norms: tuple[str, ...]
    residuals: Tensor


@overload
def multi_normalize(
    gradient: Tensor,
    norms: Sequence[Norm],
    iterations: int | None = None,
    tolerance: float | None = None,
    return_trace: Literal[False] = False,
) -> Tensor: ...


@overload
def multi_normalize(
    gradient: Tensor,
    norms: Sequence[Norm],
    iterations: int | None = None,
    tolerance: float | None = None,
    *,
    return_trace: Literal[True],
) -> tuple[Tensor, Trace]: ...


@torch.no_grad()
def multi_normalize(
    gradient: Tensor,
    norms: Sequence[Norm],
    iterations: int | None = None,
    tolerance: float | None = None,
    return_trace: bool = False,
) -> Tensor | tuple[Tensor, Trace]:
    """Normalise a gradient by several norms in turn (MultiNorm; arXiv:2502.06742, Algorithm 1).

    ``X = G; repeat L times: for k = 1..K: X = P_k(X)``. Computed in float32 (float64 for float64 input).

    Args:
        gradient: (..., m, n), m rows = output features; batched over leading dimensions.
        norms: the norms g_1..g_K, applied in this order.
        iterations: L. Default: 5, as in the paper; with a tolerance, as many as it takes.
        tolerance: stop once every residual, of every matrix of the batch, is at most this; 1e-12 is in reach
            in float64.
        return_trace: also return the residuals after each full iteration (one more projection per norm and iteration).

    Returns:
        (..., m, n) in the dtype of ``gradient``, of entries with RMS 1 (up to zero rows and columns); or that and a
        `Trace`.

    Raises:
        ValueError: for no norms, negative iterations or tolerance, or fewer than two dimensions.
        TypeError: for complex or integer gradients.

    Warns:
        UserWarning: if a tolerance without a number of iterations is out of reach, as it is when zero rows or columns
            leave the norms without a common point; the last iterate is returned.
    """
    _check(gradient, norms, iterations, tolerance)
    X = gradient.to(torch.float64 if gradient.dtype is torch.float64 else torch.float32)
    limit = iterations if iterations is not None else 5 if tolerance is None else _MOST_ITERATIONS
    residuals: list[Tensor] = []
    best, best_at, worst = float("inf"), 0, float("inf")
    for iteration in range(limit):
        for norm in norms:
            X = norm.project(X)
        if return_trace or tolerance is not None:
            residuals.append(torch.stack([norm.residual(X) for norm in norms], dim=-1))
        if tolerance is not None:
            worst = residuals[-1].max().item() if residuals[-1].numel() else 0.0
            if worst < 0.99 * best:
                best, best_at = worst, iteration
            if worst <= tolerance or (iterations is None and iteration - best_at >= _PATIENCE):
                break
    if tolerance is not None and iterations is None and not worst <= tolerance:
        warnings.warn(
            f"tolerance={tolerance} was not reached: the largest residual is {worst:.3g} after {len(residuals)} "
            "iterations; zero rows or columns, low precision or heavy tails can put it out of reach",
            stacklevel=3,  # past the decorator
        )
    X = X.to(gradient.dtype)
    if not return_trace:
        return X
    empty = X.new_zeros(*X.shape[:-2], 0, len(norms), dtype=torch.float32)
    return X, Trace(tuple(norm.name for norm in norms), torch.stack(residuals, dim=-2) if residuals else empty)


def _check(gradient: Tensor, norms: Sequence[Norm], iterations: int | None, tolerance: float | None) -> None:
    if not gradient.is_floating_point():
        raise TypeError(f"gradient must be real and floating-point, got dtype {gradient.dtype}")
    if gradient.ndim < 2:
        raise ValueError(f"gradient must have at least two dimensions, got shape {tuple(gradient.shape)}")
    if not norms:
        raise ValueError("norms is empty; give at least one, such as RowNorm()")
    if iterations is not None and iterations < 0:
        raise ValueError(f"iterations={iterations} must not be negative")
    if tolerance is not None and tolerance < 0:
        raise ValueError(f"tolerance={tolerance} must not be negative")
