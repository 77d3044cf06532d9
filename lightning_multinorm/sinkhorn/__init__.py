"""SR-Sinkhorn, the row/column pair of MultiNorm, at memory speed: the scalings (r, c) and the fused update.

`reference` is the definition; `eager` is plain PyTorch and serves every device. Both stand on torch alone.
"""

import torch
from torch import Tensor

from lightning_multinorm.sinkhorn.eager import scalings, update_

__all__ = ["scalings", "sr_sinkhorn", "update_"]


@torch.no_grad()
def sr_sinkhorn(gradient: Tensor, iterations: int = 5) -> Tensor:
    """Square-root Sinkhorn normalisation: rows to l2 norm √n, then columns to √m, L times (arXiv:2502.06742, Alg. 3).

    Nothing of the size of the gradient is allocated but the result. Signs never change; a zero row or column stays
    zero. Scaling the gradient by a power of two changes no bit of the result.

    Args:
        gradient: (..., m, n), m rows = output features; batched over leading dimensions; left unchanged.
        iterations: L.

    Returns:
        (..., m, n) in the dtype of ``gradient``; entries of RMS 1 (times the square root of the fraction of columns
        that are not zero). Vectors are kept, and sums taken, in float32 (float64 for float64).

    Raises:
        TypeError: for complex or integer gradients.
        ValueError: for fewer than two dimensions or negative iterations.
    """
    if not gradient.is_floating_point():
        raise TypeError(f"gradient must be real and floating-point, got dtype {gradient.dtype}")
    if gradient.ndim < 2:
        raise ValueError(f"gradient must have at least two dimensions, got shape {tuple(gradient.shape)}")
    if iterations < 0:
        raise ValueError(f"iterations={iterations} must not be negative")
    normalized = torch.zeros_like(gradient)
    update_([normalized], [gradient], lr=-1.0, iterations=iterations)
    return normalized
