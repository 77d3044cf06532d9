"""Norms of a matrix and the projections that the alternating scheme is made of (arXiv:2502.06742, Section 3).

A norm knows three things of a batch of matrices ``(..., m, n)``: its ``value``, the projection
``P_g(X) = argmax { <X, Z> : g(Z) = 1 }`` and the ``residual``, how far X is from being its own projection. To add one,
subclass `Norm`, name it, and write ``value`` and ``project``.

Every norm here is scaled so that a projection has Frobenius norm √(mn), that is entries of RMS 1: the equal length that
the paper's fixed-point theorem asks for. Zero rows, columns and matrices project to zero, never to NaN, and entries
anywhere in the range of the dtype are safe, since rows, columns and matrices are first scaled by powers of two.

Legend: X matrix (m, n), m rows = output features, n columns = input features.
"""

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from lightning_multinorm.scaling import power_of_two, working_dtype
from lightning_multinorm.whitening import Orthogonalization, polar_newton_schulz, polar_svd


class Norm(ABC):
    """A norm g on matrices. Subclasses set `name` (used in metric names) and write `value` and `project`."""

    name: str

    @abstractmethod
    def value(self, matrix: Tensor) -> Tensor:
        """g(X): (..., m, n) -> (...)."""

    @abstractmethod
    def project(self, matrix: Tensor) -> Tensor:
        """P_g(X): (..., m, n) -> (..., m, n), in ``matrix``'s dtype; of Frobenius norm √(mn) unless X has zeros."""

    @final
    def residual(self, matrix: Tensor) -> Tensor:
        """‖X − P_g(X)‖_F / √(mn): (..., m, n) -> (...). 0 exactly where X is its own projection."""
        X = matrix.to(working_dtype(matrix))
        return _root_mean_square(X - self.project(X))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


@final
class RowNorm(Norm):
    """``max_i ‖X_i,:‖₂ / √n``; the projection gives every row the l2 norm √n."""

    name = "row"

    def value(self, matrix: Tensor) -> Tensor:
        return _max(_l2(matrix, -1)) / (matrix.shape[-1] or 1) ** 0.5

    def project(self, matrix: Tensor) -> Tensor:
        return _normalize(matrix, -1, matrix.shape[-1] ** 0.5)


@final
class ColumnNorm(Norm):
    """``max_j ‖X_:,j‖₂ / √m``; the projection gives every column the l2 norm √m."""

    name = "column"

    def value(self, matrix: Tensor) -> Tensor:
        return _max(_l2(matrix, -2)) / (matrix.shape[-2] or 1) ** 0.5

    def project(self, matrix: Tensor) -> Tensor:
        return _normalize(matrix, -2, matrix.shape[-2] ** 0.5)


@final
class FrobeniusNorm(Norm):
    """‖X‖_F / √(mn); the projection scales the matrix as a whole."""

    name = "frobenius"

    def value(self, matrix: Tensor) -> Tensor:
        return _l2(matrix, (-2, -1)).squeeze((-2, -1)) / (matrix.shape[-2] * matrix.shape[-1] or 1) ** 0.5

    def project(self, matrix: Tensor) -> Tensor:
        return _normalize(matrix, (-2, -1), (matrix.shape[-2] * matrix.shape[-1]) ** 0.5)


@final
class MaxNorm(Norm):
    """``max_ij |X_ij|``; the projection is the sign."""

    name = "max"

    def value(self, matrix: Tensor) -> Tensor:
        return _max(matrix.abs())

    def project(self, matrix: Tensor) -> Tensor:
        return torch.where(matrix.isnan(), matrix, matrix.sign())  # torch's sign of NaN is 0


@final
class SpectralNorm(Norm):
    """σ_max(X) / √max(m, n); the projection is √max(m, n) · U Vᵀ.

    Args:
        method: "svd" (default) is exact; "newton_schulz" iterates ``k`` times with step ``beta``
            (see `whitening.polar_newton_schulz`), far cheaper and only matrix products.
        k: Newton–Schulz iterations.
        beta: Newton–Schulz step; 0.5 converges to U Vᵀ, 0.8 is SWAN's.
        dtype: of Newton–Schulz' products: None (float32, float64 for float64) or torch.bfloat16.

    Raises:
        ValueError: for an unknown method.
    """

    name = "spectral"

    def __init__(
        self, method: Orthogonalization = "svd", k: int = 10, beta: float = 0.8, dtype: torch.dtype | None = None
    ) -> None:
        if method not in ("svd", "newton_schulz"):
            raise ValueError(f"method={method!r} is unknown; use 'svd' or 'newton_schulz'")
        self.method = method
        self.k = k
        self.beta = beta
        self.dtype = dtype

    def value(self, matrix: Tensor) -> Tensor:
        X = matrix.to(working_dtype(matrix))
        if X.numel() == 0:
            return X.new_zeros(X.shape[:-2])
        scale = power_of_two(X, (-2, -1))
        return torch.linalg.matrix_norm(X * scale, 2) / scale.squeeze((-2, -1)) / max(X.shape[-2:]) ** 0.5

    def project(self, matrix: Tensor) -> Tensor:
        if self.method == "svd":
            polar = polar_svd(matrix)
        else:
            polar = polar_newton_schulz(matrix, k=self.k, beta=self.beta, dtype=self.dtype)
        return max(matrix.shape[-2:]) ** 0.5 * polar

    def __repr__(self) -> str:
        return f"SpectralNorm(method={self.method!r}, k={self.k}, beta={self.beta})"


def _l2(matrix: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """l2 norm over dim, kept; safe from under- and overflow of the squares."""
    X = matrix.to(working_dtype(matrix))
    scale = power_of_two(X, dim)
    return torch.linalg.vector_norm(X * scale, dim=dim, keepdim=True) / scale


def _normalize(matrix: Tensor, dim: int | tuple[int, int], target: float) -> Tensor:
    """matrix with l2 norm target over dim; what is zero stays zero."""
    X = matrix.to(working_dtype(matrix))
    X = X * power_of_two(X, dim)
    norm = torch.linalg.vector_norm(X, dim=dim, keepdim=True)
    return X.mul_(torch.where(norm == 0, 0, target / norm)).to(matrix.dtype)


def _max(values: Tensor) -> Tensor:
    return values.amax((-2, -1)) if values.numel() else values.new_zeros(values.shape[:-2])


def _root_mean_square(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=(-2, -1)) / (matrix.shape[-2] * matrix.shape[-1] or 1) ** 0.5
