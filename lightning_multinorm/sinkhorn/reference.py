"""SR-Sinkhorn as the paper writes it: the definition that every faster path is tested against."""

import torch
from torch import Tensor


def sr_sinkhorn(gradient: Tensor, iterations: int = 5) -> Tensor:
    """(..., m, n) -> (..., m, n), in float64; arXiv:2502.06742, Algorithm 3, with zero rows and columns left zero."""
    X = gradient.double()
    m, n = X.shape[-2:]
    for _ in range(iterations):
        row = torch.linalg.vector_norm(X, dim=-1, keepdim=True)
        X = X * torch.where(row == 0, 0, n**0.5 / row)
        column = torch.linalg.vector_norm(X, dim=-2, keepdim=True)
        X = X * torch.where(column == 0, 0, m**0.5 / column)
    return X
