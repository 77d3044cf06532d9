"""SR-Sinkhorn, the row/column pair of MultiNorm, at memory speed: the scalings (r, c) and the fused update.

`reference` is the definition. `eager` is plain PyTorch and serves every device and dtype; `cpu` (Numba) and `triton`
are the fast ones, with the same signatures, and `select` picks among them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_multinorm.batch import Batch
from lightning_multinorm.sinkhorn.select import Kernel, path
from lightning_multinorm.sinkhorn.tracing import Tracing

__all__ = ["Kernel", "Tracing", "scalings", "sr_sinkhorn", "update_", "update_all_"]


def scalings(
    gradient: Tensor, iterations: int, *, trace: bool = False, kernel: Kernel = "auto"
) -> tuple[Tensor, Tensor, Tracing | None]:
    """The vectors r and c with SR-Sinkhorn(G) = diag(r) G diag(c), without forming it.

    Args:
        gradient: (..., m, n).
        iterations: L >= 0.
        trace: also measure the residuals (one more read of G).
        kernel: which path computes; "auto" chooses by device and dtype.

    Returns:
        r (..., m) and c (..., n) in float32 (float64 for float64), to be applied as ``(r * G) * c``, rows first, so
        that no product leaves the range; and, if asked for, what was seen on the way. Zero rows and columns get the
        scaling 0.
    """
    return path(kernel, gradient).scalings(gradient, iterations, trace=trace)


def update_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    iterations: int = 5,
    trace: bool = False,
    seed: int | Tensor | None = None,
    kernel: Kernel = "auto",
) -> Tracing | None:
    """``W <- (1 - lr · weight_decay) W - lr · SR-Sinkhorn(G)``, in place, for matrices of one shape, dtype and device.

    Args:
        weights: (..., m, n) each.
        gradients: (..., m, n) each, as many; left unchanged.
        lr: RMS change per entry, as a number or a 0-d tensor.
        weight_decay: decoupled weight decay.
        iterations: L.
        trace: also return what was seen on the way (one more read of G).
        seed: rounds bfloat16 weights stochastically, with noise from this number (or 0-d int64 tensor) that is the
            same on every path; None rounds to nearest. Other dtypes are always rounded to nearest.
        kernel: which path computes; "auto" chooses by device and dtype.

    Returns:
        A tracing of (len(weights), ...) matrices, or None.
    """
    return path(kernel, weights[0], gradients[0]).update_(
        weights,
        gradients,
        lr=lr,
        weight_decay=weight_decay,
        iterations=iterations,
        trace=trace,
        seed=seed,
    )


def update_all_(batches: Sequence[Batch], *, kernel: Kernel = "auto") -> list[Tracing | None]:
    """`update_` for each of several batches, on one device; in one go where the path can take several shapes at once.

    Args:
        batches: each of matrices (..., m, n) of one shape and dtype, at a rate in RMS change per entry.
        kernel: which path computes; "auto" chooses by device and dtype.

    Returns:
        A tracing for each batch that asks to be observed, None for each other one.

    Raises:
        ModuleNotFoundError: for a kernel whose package is missing.
        TypeError: for a dtype that the kernel does not take.
        ValueError: for an unknown kernel, one for another device, or a batch of unlike matrices; Numba's path has
            then updated none.
    """
    paths = [path(kernel, batch.weights[0], batch.gradients[0]) for batch in batches]
    together = getattr(paths[0], "update_all_", None) if len(set(paths)) == 1 else None  # Numba's path has it
    if together is not None:
        return list(together(batches))
    return [
        one.update_(
            batch.weights,
            batch.gradients,
            lr=batch.lr,
            weight_decay=batch.weight_decay,
            iterations=batch.iterations,
            trace=batch.observe,
            seed=batch.seed,
        )
        for one, batch in zip(paths, batches, strict=True)
    ]


@torch.no_grad()
def sr_sinkhorn(gradient: Tensor, iterations: int = 5, *, kernel: Kernel = "auto") -> Tensor:
    """Square-root Sinkhorn normalisation: rows to l2 norm √n, then columns to √m, L times (arXiv:2502.06742, Alg. 3).

    Nothing of the size of the gradient is allocated but the result. Signs never change; a zero row or column stays
    zero. Scaling the gradient by a power of two changes no bit of the result.

    Args:
        gradient: (..., m, n), m rows = output features; batched over leading dimensions; left unchanged.
        iterations: L.
        kernel: which path computes; "auto" chooses by device and dtype.

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
    update_([normalized], [gradient], lr=-1.0, iterations=iterations, kernel=kernel)
    return normalized
