"""SR-Sinkhorn in factored form, in plain PyTorch: works on any device and dtype, allocates vectors and one block.

The iterate is always ``diag(r) G diag(c)``. With its squares X_ij = (r_i G_ij c_j)², one iteration of arXiv:2502.06742,
Algorithm 3 for row sums n and column sums m is

    ρ = X 1 ,   r_i <- r_i √(n / ρ_i) ,   X_ij <- X_ij n / ρ_i ,   κ = Xᵀ 1 ,   c_j <- c_j √(m / κ_j) .

X is made of G one block of rows after another, so an iteration reads G once, and the update of the weight once more.
Nothing the size of G is allocated unless G is smaller than a block; such matrices are stacked besides, which is a copy.

Legend: G gradient (B, m, n), W weight; m rows = output features, n columns = input features; r, a (B, m); c (B, n);
a powers of two; L iterations.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_multinorm.rounding import store_rounded_
from lightning_multinorm.scaling import inverse_power_of_two, largest_magnitude, working_dtype
from lightning_multinorm.sinkhorn.tracing import Tracing, weight_squares

# Entries of one block. On a CPU it stays in cache, and below 1 % of the smallest of the paper's models in bfloat16; an
# accelerator needs more to be busy.
_BLOCK_CPU, _BLOCK_ACCELERATOR = 3 * 2**15, 2**24


def scalings(gradient: Tensor, iterations: int, *, trace: bool = False) -> tuple[Tensor, Tensor, Tracing | None]:
    """See `lightning_multinorm.sinkhorn.scalings`."""
    *batch, m, n = gradient.shape
    G = gradient.reshape(math.prod(batch), m, n)
    r = torch.ones(len(G), m, dtype=working_dtype(G), device=G.device)
    c = torch.ones(len(G), n, dtype=r.dtype, device=G.device)
    found = Tracing(r.new_zeros(len(G), iterations, 2), r.new_zeros(r.shape), c) if trace else None
    step = max(1, block_size(G) // max(1, m * n))
    for i in range(0, len(G) if iterations and G.numel() else 0, step):
        part = slice(i, i + step)
        seen = None if found is None else Tracing(*(x[part] for x in found.vectors))
        r[part], c[part] = _alternate(G[part], iterations, seen)
    if found is not None:
        found = Tracing(*(x.reshape(*batch, *x.shape[1:]) for x in found.vectors))
    return r.reshape(*batch, m), c.reshape(*batch, n), found


def update_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    iterations: int = 5,
    trace: bool = False,
    seed: int | Tensor | None = None,
) -> Tracing | None:
    """See `lightning_multinorm.sinkhorn.update_`."""
    traces, squares = [], weight_squares(weights) if trace else None
    per_stack = max(1, block_size(gradients[0]) // max(1, gradients[0].numel()))
    for i in range(0, len(weights), per_stack):
        part = gradients[i : i + per_stack]
        # A stack is a copy, so only matrices that fit a block together are stacked: it saves calls, not memory.
        G = torch.stack(list(part)) if len(part) > 1 else part[0].unsqueeze(0)
        r, c, found = scalings(G, iterations, trace=trace)
        matrices = gradients[0].shape[:-2].numel()
        for k, (W, G_k, r_k, c_k) in enumerate(zip(weights[i : i + per_stack], part, r, c, strict=True), i):
            # Noise is numbered by matrix, so a batch that is rounded stochastically is taken one matrix at a time.
            _apply_(W, G_k, r_k, c_k, lr, weight_decay, seed if W.dtype is torch.bfloat16 else None, k * matrices)
        traces.append(found)
    if not trace:
        return None
    kept = [found.vectors for found in traces if found is not None]
    residuals, rows, columns = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return Tracing(residuals, rows, columns, squares)


def apply_part_(
    W: Tensor, G: Tensor, r: Tensor, c: Tensor, lr: float | Tensor, weight_decay: float, seed: int | Tensor | None
) -> None:
    """``W <- (1 - lr · weight_decay) W - lr · (r G) c`` for one matrix, or a part of one."""
    _apply_(W, G, r, c, lr, weight_decay, seed if W.dtype is torch.bfloat16 else None, 0)


def block_size(tensor: Tensor) -> int:
    """Number of entries that are worked on at a time on the device of ``tensor``."""
    return _BLOCK_CPU if tensor.device.type == "cpu" else _BLOCK_ACCELERATOR


def product(G: Tensor, scaling: Tensor, out: Tensor) -> Tensor:
    """out <- G · scaling; another dtype's G is converted there first, for `torch.mul` would make a new tensor of it."""
    return torch.mul(G, scaling, out=out) if G.dtype == out.dtype else out.copy_(G).mul_(scaling)


class _Block(NamedTuple):
    """Rows of G (B, k, n), their part of r (B, k), and where X is computed of them (B, k, n); views."""

    G: Tensor
    r: Tensor
    place: Tensor


def _alternate(G: Tensor, iterations: int, found: Tracing | None) -> tuple[Tensor, Tensor]:
    """r (B, m) and c (B, n) for G (B, m, n), whose matrices fit a block unless B = 1; fills residuals and rows.

    All products go into one block of memory, since new tensors of that size cost more than the arithmetic. The sums are
    sums, not matrix-vector products: a lowered matmul precision must not reach them.
    """
    batch, m, n = G.shape
    rows = _row_blocks(G)
    r = G.new_empty(batch, m, dtype=working_dtype(G))
    space = r.new_empty(batch, rows[0].stop, n)
    blocks = [_Block(G[:, part], r[:, part], space[:, : part.stop - part.start]) for part in rows]
    c = _first_rows(blocks, r.new_zeros(batch, n))
    residuals = None if found is None else found.residuals
    if found is not None:
        found.rows.copy_(r)
    for iteration in range(iterations):
        column_sums = torch.zeros_like(c)
        for block in blocks:
            X = _squares(block, c)
            if iteration > 0:
                row_sums = X.sum(-1)
                if residuals is not None:
                    residuals[:, iteration - 1, 0] += _squared_error(row_sums, n)
                change = _quotient(n, row_sums)
                _multiply_(block.r, change.sqrt())
                X.mul_(change.unsqueeze(-1))
            column_sums += X.sum(-2)
        change = _quotient(m, column_sums)
        _multiply_(c, change.sqrt())
        if residuals is not None:
            residuals[:, iteration, 1] = _squared_error(column_sums * change, m)
    if residuals is not None:
        for block in blocks:
            residuals[:, -1, 0] += _squared_error(_squares(block, c).sum(-1), n)
        residuals[..., 0].div_(m)
        residuals[..., 1].div_(n)
        residuals.sqrt_()
    return r, c


def _first_rows(blocks: Sequence[_Block], c: Tensor) -> Tensor:
    """Fill in the r that normalises the rows of G; from c (B, n) of zeros, return one of powers of two to begin with.

    Every row, then every column, gets its largest entry into [1/2, 1) first. Then squares do not overflow, and
    underflow only where an entry is lost beside the largest of its row or column.
    """
    for G, r, place in blocks:
        a = inverse_power_of_two(largest_magnitude(place.copy_(G), -1))
        torch.maximum(c, largest_magnitude(place.mul_(a.unsqueeze(-1)), -2), out=c)
        _multiply_(r.copy_(a), _quotient(place.shape[-1], place.square_().sum(-1)).sqrt())
    return inverse_power_of_two(c)


def _squares(block: _Block, c: Tensor) -> Tensor:
    """X of a block: the squares of diag(r) G diag(c)."""
    return product(block.G, block.r.unsqueeze(-1), block.place).mul_(c.unsqueeze(-2)).square_()


def _apply_(
    W: Tensor,
    G: Tensor,
    r: Tensor,
    c: Tensor,
    lr: float | Tensor,
    weight_decay: float,
    seed: int | Tensor | None,
    number: int,
) -> None:
    """W <- (1 - lr · weight_decay) W - lr · (r G) c, by blocks; W and G (..., m, n), the first the number-th matrix."""
    if W.ndim > 2 and (W.dtype != r.dtype or W.numel() > block_size(W)):
        for k, (W_k, G_k, r_k, c_k) in enumerate(zip(W, G, r, c, strict=True)):
            _apply_(W_k, G_k, r_k, c_k, lr, weight_decay, seed, number + k * W_k.shape[:-2].numel())
        return
    parts = 1 if W.dtype == r.dtype else 4  # the step, W in its precision, and twice that for noise
    blocks = [slice(None)] if W.ndim > 2 else _row_blocks(G.unsqueeze(0), parts)
    buffer = r.new_empty(G[..., blocks[0], :].shape) if blocks else None
    for rows in blocks:
        W_rows, G_rows = W[..., rows, :], G[..., rows, :]
        assert buffer is not None
        step = product(G_rows, r[..., rows, None] * lr, buffer[..., : G_rows.shape[-2], :])
        step.mul_(c.unsqueeze(-2))
        if W.dtype == r.dtype:
            if weight_decay:
                W_rows.mul_(1 - lr * weight_decay)
            W_rows.sub_(step)
            continue
        moved = W_rows.to(r.dtype).mul_(1 - lr * weight_decay).sub_(step)
        if seed is not None:
            store_rounded_(W_rows, moved, seed, number, rows.start)
        else:
            W_rows.copy_(moved)  # rounds to the weight's precision once, at the end
        del moved  # before the next block's is made


def _row_blocks(G: Tensor, parts: int = 1) -> list[slice]:
    """Rows of G (B, m, n) that are worked on at a time, a block or one of so many parts of one."""
    batch, m, n = G.shape
    rows = max(1, block_size(G) // parts // max(1, batch * n))
    return [slice(i, min(i + rows, m)) for i in range(0, m, rows)]


def _quotient(numerator: int, sums: Tensor) -> Tensor:
    """numerator / sums, 0 where the sum is 0, and finite, so that a diverging pair of scalings never makes inf · 0."""
    limits = torch.finfo(sums.dtype)
    smallest = max(2 * numerator / limits.max, limits.tiny)  # whose quotient is finite, however it is rounded
    return torch.div(numerator, sums.clamp(smallest, limits.max)).mul_(sums.sign())


def _multiply_(scaling: Tensor, change: Tensor) -> None:
    """scaling <- scaling · change, kept finite likewise."""
    scaling.mul_(change).clamp_(max=torch.finfo(scaling.dtype).max)


def _squared_error(squared_norms: Tensor, target: int) -> Tensor:
    """Sum over i of (norm_i / √target − 1)², without those that are zero: (B, k) -> (B,)."""
    relative = (squared_norms / target).sqrt()
    return torch.where(relative == 0, 0, relative - 1).square().sum(-1)
