"""Whitening of a gradient matrix: (G Gᵀ)^(-1/2) G, by Newton–Schulz iteration or exactly by SVD.

Pure functions on batches of matrices. Both return the (approximate) polar factor U Vᵀ of ``G = U S Vᵀ``, whose singular
values are 1 (or 0 where G has none); what scale it then takes is the caller's business.

Legend: G gradient (m, n), m rows = output features, n columns = input features; A = G Gᵀ; k iterations; β step size.
"""

from typing import Literal

import torch
from torch import Tensor

from lightning_multinorm.scaling import largest_magnitude

Orthogonalization = Literal["newton_schulz", "svd"]


def polar_newton_schulz(matrix: Tensor, *, k: int = 10, beta: float = 0.8, dtype: torch.dtype | None = None) -> Tensor:
    """Approximate polar factor by the Newton–Schulz iteration of arXiv:2412.13148, Algorithm 2.

    As printed, it is coupled: with ``A = G Gᵀ / ‖G Gᵀ‖_F``, ``Y = A`` and ``Z = I``, repeat ``Y <- β Y (3 I - Z Y)``,
    ``Z <- β (3 I - Z Y) Z`` k times and return ``Z G / √‖G Gᵀ‖_F``. Y, Z and A commute, so every singular value σ of
    the result follows ``σ <- β σ (3 - σ²)``, and the same numbers come out of iterating on the matrix itself,
    ``X <- β (3 I - X Xᵀ) X``, with two products (m, m, n) per step in place of three (m, m, m). The cheaper of the two
    is taken; in bfloat16 always the second, since A holds σ², whose small values bfloat16 cannot resolve.

    Only β = 1/2 has 1 as its attracting fixed point (quadratic convergence to the exact factor, slow start: σ grows by
    at most 3/2 a step). With SWAN's β = 0.8 small σ grow by up to 2.4 a step and end scattered over [0.56, 1.6], as
    Muon's do. The shorter side counts as m, which gives the same factor. The scaling by the Frobenius norm keeps every
    σ in [0, 1], inside the basin of either β.

    Args:
        matrix: (..., m, n), any floating dtype.
        k: number of iterations.
        beta: step size β, in (0, 0.8].
        dtype: of the products; None is float32 (float64 for float64), bfloat16 is faster and good to about 1/100.

    Returns:
        (..., m, n) in ``matrix``'s dtype. A zero matrix gives zeros.
    """
    if matrix.numel() == 0:
        return matrix.clone()
    working = torch.float64 if matrix.dtype is torch.float64 else torch.float32
    products = dtype or working
    G = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    *batch, m, n = G.shape
    largest = _nonzero(largest_magnitude(G, (-2, -1), keepdim=True)).to(working)
    X = torch.div(G, largest, out=torch.empty_like(G, dtype=products)).reshape(-1, m, n)  # keeps products in range
    A = _gram(X).to(working)
    scale = _nonzero(torch.linalg.vector_norm(A, dim=(-2, -1), keepdim=True))
    T = _identity(A) * (3 * beta) - A.mul_(beta / scale)  # of the first step; it takes over the scaling of X, once
    if products is torch.bfloat16 or 2 * n <= 3 * m:
        X = _product(T.div_(scale.sqrt()).to(products), X)
        together = 2 if 7 * n > 12 * m else 1
        for _ in range((k - 1) // together):
            X = _step(X, beta) if together == 1 else _two_steps(X, beta)
        for _ in range((k - 1) % together):
            X = _step(X, beta)
    else:
        X = _product(_coupled(A.div_(beta), T, k, beta).div_(scale.sqrt()), X)
    X = X.reshape(*batch, m, n)
    return (X if G is matrix else X.mT).to(matrix.dtype)


def inverse_root(gram: Tensor, *, k: int = 10, beta: float = 0.8) -> Tensor:
    """The Newton–Schulz approximation of A^(-1/2): what `polar_newton_schulz` multiplies G by, from ``A = G Gᵀ``.

    Args:
        gram: (m, m), in float32 or float64; may be spoiled.
        k: number of iterations.
        beta: step size β.

    Returns:
        (m, m). A zero matrix gives a multiple of the identity.
    """
    A = gram.unsqueeze(0)
    scale = _nonzero(torch.linalg.vector_norm(A, dim=(-2, -1), keepdim=True))
    A = A.div_(scale)
    T = _identity(A) * (3 * beta) - A * beta
    return _coupled(A, T, k, beta).div_(scale.sqrt())[0]


def _coupled(A: Tensor, T: Tensor, k: int, beta: float) -> Tensor:
    """Z after k steps of the coupled iteration from A of Frobenius norm 1, the first of which is T."""
    Z, Y = T, _product(A, T)
    for step in range(1, k):
        T = _product(Z, Y, plus=_identity(Y), beta=3 * beta, alpha=-beta)
        Z = _product(T, Z)
        if step < k - 1:
            Y = _product(Y, T)
    return Z


def _step(X: Tensor, beta: float) -> Tensor:
    """β (3 I - X Xᵀ) X, for X (b, m, n)."""
    return _product(_gram(X), X, plus=X, beta=3 * beta, alpha=-beta)


def _two_steps(X: Tensor, beta: float) -> Tensor:
    """The same twice: with t = X Xᵀ and T = β (3 I - t) it is β (3 I - T t T) T X. For X much wider than high."""
    t = _gram(X)
    T = t * -beta
    T.diagonal(dim1=-2, dim2=-1).add_(3 * beta)
    second = _product(_product(T, t), T, plus=_identity(t), beta=3 * beta, alpha=-beta)
    return _product(_product(second, T), X)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)


def _gram(X: Tensor) -> Tensor:
    """X Xᵀ; of a large one the upper right quarter is mirrored, which saves a quarter of the work."""
    half = X.shape[-2] // 2
    if half < 256:
        return _product(X, X.mT)
    upper, lower = X[:, :half], X[:, half:]
    A = X.new_empty(len(X), X.shape[-2], X.shape[-2])
    A[:, :half, :half], A[:, half:, half:] = _product(upper, upper.mT), _product(lower, lower.mT)
    A[:, :half, half:] = _product(upper, lower.mT)
    A[:, half:, :half] = A[:, :half, half:].mT
    return A


def _product(A: Tensor, B: Tensor, *, plus: Tensor | None = None, beta: float = 0, alpha: float = 1) -> Tensor:
    """beta · plus + alpha · A B over a batch; a batch of one goes to the plain product, often the faster routine."""
    if len(A) == 1:
        A, B = A[0], B[0]
        return (A @ B if plus is None else torch.addmm(plus[0], A, B, beta=beta, alpha=alpha)).unsqueeze(0)
    return A @ B if plus is None else torch.baddbmm(plus, A, B, beta=beta, alpha=alpha)


def polar_svd(matrix: Tensor) -> Tensor:
    """Exact polar factor U Vᵀ by SVD, in float32 (float64 for float64).

    Directions whose singular value vanishes (below ``max(m, n) · eps · σ_max``) are dropped: they belong to noise.

    Args:
        matrix: (..., m, n), any floating dtype.

    Returns:
        (..., m, n) in ``matrix``'s dtype. A zero matrix gives zeros.
    """
    if matrix.numel() == 0:
        return matrix.clone()
    G = matrix.to(torch.float64 if matrix.dtype is torch.float64 else torch.float32)
    G = G / _nonzero(G.abs().amax((-2, -1), keepdim=True))
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    cutoff = max(G.shape[-2:]) * torch.finfo(G.dtype).eps * S.amax(-1, keepdim=True)
    return ((U * (cutoff < S).to(U.dtype).unsqueeze(-2)) @ Vh).to(matrix.dtype)


def _nonzero(x: Tensor) -> Tensor:
    """x, with zeros replaced by ones, to divide by."""
    return torch.where(x == 0, 1, x)
