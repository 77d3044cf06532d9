"""Whitening of a gradient matrix: (G Gᵀ)^(-1/2) G, by Newton–Schulz iteration or exactly by SVD.

Pure functions on batches of matrices, standing on torch alone. Both return the (approximate) polar factor U Vᵀ of
``G = U S Vᵀ``, whose singular values are 1 (or 0 where G has none); what scale it then takes is the caller's business.

Legend: G gradient (m, n), m rows = output features, n columns = input features; A = G Gᵀ; k iterations; β step size.
"""

from typing import Literal

import torch
from torch import Tensor

Orthogonalization = Literal["newton_schulz", "svd"]


def polar_newton_schulz(matrix: Tensor, *, k: int = 10, beta: float = 0.8) -> Tensor:
    """Approximate polar factor by the coupled Newton–Schulz iteration (arXiv:2412.13148, Algorithm 2).

    With ``A = G Gᵀ / ‖G Gᵀ‖_F``, ``Y = A`` and ``Z = I``, repeats ``Y <- β Y (3 I - Z Y)``, ``Z <- β (3 I - Z Y) Z``
    k times; then ``Z A^(1/2)`` holds the square roots of what ``t = Z Y`` has become for each eigenvalue,
    ``t <- β² t (3 - t)²``. Only β = 1/2 has 1 as its attracting fixed point (quadratic convergence to the exact
    factor, slow start: an eigenvalue grows by at most 9/4 a step). With SWAN's β = 0.8 small eigenvalues grow by up
    to 5.76 a step and the singular values end scattered over [0.56, 1.6], as Muon's do.

    The Gram matrix is formed on the shorter side, which gives the same factor. The scaling by the Frobenius norm keeps
    every eigenvalue in [0, 1], inside the basin of either β.

    Args:
        matrix: (..., m, n), any floating dtype; computed in float32 (float64 for float64).
        k: number of iterations.
        beta: step size β, in (0, 0.8].

    Returns:
        (..., m, n) in ``matrix``'s dtype. A zero matrix gives zeros.
    """
    if matrix.numel() == 0:
        return matrix.clone()
    G = matrix.to(torch.float64 if matrix.dtype is torch.float64 else torch.float32)
    tall = G.shape[-2] > G.shape[-1]
    if tall:
        G = G.mT
    G = G / _nonzero(G.abs().amax((-2, -1), keepdim=True))  # keeps the products below in range
    A = G @ G.mT
    scale = _nonzero(torch.linalg.vector_norm(A, dim=(-2, -1), keepdim=True))
    Y = A / scale
    identity = torch.eye(Y.shape[-1], dtype=Y.dtype, device=Y.device)
    Z = identity.expand_as(Y)
    for _ in range(k):
        T = beta * (3 * identity - Z @ Y)
        Y, Z = Y @ T, T @ Z
    G = (Z @ G) / scale.sqrt()
    return (G.mT if tall else G).to(matrix.dtype)


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
