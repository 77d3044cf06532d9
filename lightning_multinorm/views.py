"""How a parameter lies in memory as a matrix, or as a batch of them, with output features as rows.

Every view shares the parameter's memory, so that an update in place reaches it.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

View = Literal["matrix", "transposed", "convolution", "batch", "qkv"]
"""matrix: (m, n) as it is. transposed: (n, m), as GPT-2's Conv1D stores it. convolution: (out, in, k, ...) counts as
(out, in·k·...). batch: (..., m, n), one matrix per expert. qkv: (3m, n), three matrices stacked, as in
`torch.nn.MultiheadAttention.in_proj_weight`."""


def as_matrices(tensor: Tensor, view: View, like: Tensor | None = None) -> Tensor:
    """``tensor`` as (m, n) or (..., m, n).

    Args:
        tensor: a parameter or its gradient.
        view: how it lies.
        like: the parameter, if ``tensor`` is its gradient: the columns of a convolution are then in the same order.

    Raises:
        ValueError: if the shape does not fit the view.
    """
    if view == "matrix" and tensor.ndim == 2:  # nearly all, asked for twice in every step
        return tensor
    check_view(tensor.shape, view)
    if view == "transposed":
        return tensor.mT
    if view == "qkv":
        return tensor.unflatten(0, (3, -1))
    if view == "convolution":
        strides = (tensor if like is None else like).stride()
        # Channels-last kernels cannot be flattened in the order of their dimensions, but in that of their strides.
        order = sorted(range(1, tensor.ndim), key=lambda dim: -strides[dim])
        tensor = tensor.permute(0, *order)
        return tensor.flatten(1) if like is not None or tensor.numel() == 0 else tensor.view(len(tensor), -1)
    return tensor


def check_view(shape: Sequence[int], view: View) -> None:
    """Raises ValueError if a tensor of this shape cannot be seen through ``view``."""
    shape = tuple(shape)
    if view not in get_args(View):
        raise ValueError(f"view={view!r} is unknown; use one of {', '.join(get_args(View))}")
    fits = {"matrix": len(shape) == 2, "transposed": len(shape) == 2, "qkv": len(shape) == 2 and shape[0] % 3 == 0}
    if not fits.get(view, len(shape) >= 2):
        raise ValueError(f"a tensor of shape {shape} is no {view!r}")


def matrix_count(shape: Sequence[int], view: View) -> int:
    """How many matrices a tensor of this shape holds."""
    return math.prod(shape[:-2]) if view == "batch" else 3 if view == "qkv" else 1


def stored_shapes(shape: Sequence[int], view: View) -> list[tuple[int, int]]:
    """The matrices that lie in a contiguous tensor one after another, as they are stored."""
    if view == "qkv":
        return [(shape[0] // 3, shape[1])] * 3
    if view == "batch":
        return [(shape[-2], shape[-1])] * math.prod(shape[:-2])
    return [(shape[0], math.prod(shape[1:]))]
