"""SR-Sinkhorn in factored form, in plain PyTorch: works on any device and dtype, allocates vectors and one block.

The iterate is always ``diag(r) G diag(c)``. On the squares S = G∘G, with u = r∘r and v = c∘c, one iteration of
arXiv:2502.06742, Algorithm 3 is the classic Sinkhorn–Knopp step for row sums n and column sums m,

    u_i = n / (S v)_i ,    v_j = m / (Sᵀ u)_j ,

so an iteration reads G once, and the update of the weight once more. G is read in blocks of rows; nothing the size of G
is allocated unless G itself is smaller than a block.

Legend: G gradient (B, m, n), W weight; m rows = output features, n columns = input features; r, u (B, m); c, v (B, n);
a (B, m), b (B, n) powers of two; L iterations.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_multinorm.rounding import store_rounded_
from lightning_multinorm.scaling import inverse_power_of_two, working_dtype
from lightning_multinorm.sinkhorn.tracing import Tracing, weight_squares

# Entries of one block: small enough to stay in a CPU's cache and to be no weight in memory, large enough to keep an
# accelerator busy.
_BLOCK_CPU, _BLOCK_ACCELERATOR = 2**17, 2**24


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


def _alternate(G: Tensor, iterations: int, found: Tracing | None) -> tuple[Tensor, Tensor]:
    """r (B, m) and c (B, n) for G (B, m, n), whose matrices fit a block unless B = 1; fills residuals and rows.

    Squares and products go into two buffers, since large new tensors cost more than the arithmetic; a single block is
    squared once. The sums are sums, not matrix-vector products: a lowered matmul precision must not reach them.
    """
    m, n = G.shape[-2:]
    a, b = _equilibrate(G)
    blocks = _row_blocks(G)
    buffer, product = (a.new_empty(len(G), len(range(m)[blocks[0]]), n) for _ in range(2))
    whole = _squares(G, a, b, buffer) if len(blocks) == 1 else None

    def read() -> Iterator[tuple[slice, Tensor]]:
        for rows in blocks:
            yield rows, _squares(G[:, rows], a[:, rows], b, buffer) if whole is None else whole

    u, residuals = torch.ones_like(a), None if found is None else found.residuals
    v = b.square().reciprocal()  # the first row sums are those of G itself, not of diag(a) G diag(b)
    for iteration in range(iterations):
        column_sums = torch.zeros_like(b)
        for rows, S in read():
            row_sums = torch.mul(S, v.unsqueeze(-2), out=product[:, : S.shape[1]]).sum(-1)
            if residuals is not None and iteration > 0:
                residuals[:, iteration - 1, 0] += _squared_error(row_sums * u[:, rows], n)
            u[:, rows] = _quotient(n, row_sums)
            column_sums += torch.mul(S, u[:, rows, None], out=product[:, : S.shape[1]]).sum(-2)
        v = _quotient(m, column_sums)
        if found is not None and iteration == 0:
            found.rows.copy_(_finite(a * u.sqrt()))
        if residuals is not None:
            residuals[:, iteration, 1] = _squared_error(column_sums * v, m)
    if residuals is not None:
        for rows, S in read():
            residuals[:, -1, 0] += _squared_error(
                torch.mul(S, v.unsqueeze(-2), out=product[:, : S.shape[1]]).sum(-1) * u[:, rows], n
            )
        residuals[..., 0].div_(m)
        residuals[..., 1].div_(n)
        residuals.sqrt_()
    return _finite(a * u.sqrt()), _finite(b * v.sqrt())


def _equilibrate(G: Tensor) -> tuple[Tensor, Tensor]:
    """Powers of two a, b: every row, then every column, of diag(a) G diag(b) gets its largest entry into [1/2, 1).

    Then squares do not overflow, and underflow only where an entry is lost beside the largest of its row or column.
    """
    blocks = _row_blocks(G)
    dtype = working_dtype(G)
    a = inverse_power_of_two(torch.cat([_largest(G[:, rows], -1) for rows in blocks], dim=1).to(dtype))
    largest = torch.zeros(len(G), G.shape[-1], dtype=dtype, device=G.device)
    buffer = a.new_empty(len(G), len(range(G.shape[1])[blocks[0]]), G.shape[-1])
    for rows in blocks:
        scaled = _product(G[:, rows], a[:, rows, None], buffer[:, : len(range(G.shape[1])[rows])])
        largest = torch.maximum(largest, _largest(scaled, -2))
    return a, inverse_power_of_two(largest)


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
    if W.ndim > 2 and (seed is not None or W.numel() > block_size(W)):
        for k, (W_k, G_k, r_k, c_k) in enumerate(zip(W, G, r, c, strict=True)):
            _apply_(W_k, G_k, r_k, c_k, lr, weight_decay, seed, number + k * W_k.shape[:-2].numel())
        return
    blocks = [slice(None)] if W.ndim > 2 else _row_blocks(G.unsqueeze(0), 1 if seed is None else 2)  # room for noise
    buffer = r.new_empty(G[..., blocks[0], :].shape) if blocks else None
    for rows in blocks:
        W_rows, G_rows = W[..., rows, :], G[..., rows, :]
        assert buffer is not None
        step = _product(G_rows, r[..., rows, None] * lr, buffer[..., : G_rows.shape[-2], :])
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


def _squares(G: Tensor, a: Tensor, b: Tensor, buffer: Tensor) -> Tensor:
    return _product(G, a.unsqueeze(-1), buffer[:, : G.shape[1]]).mul_(b.unsqueeze(-2)).square_()


def _product(G: Tensor, scaling: Tensor, out: Tensor) -> Tensor:
    """out <- G · scaling; another dtype's G is converted there first, for `torch.mul` would make a new tensor of it."""
    return torch.mul(G, scaling, out=out) if G.dtype == out.dtype else out.copy_(G).mul_(scaling)


def _largest(G: Tensor, dim: int) -> Tensor:
    return torch.linalg.vector_norm(G, float("inf"), dim=dim) if G.numel() else G.sum(dim)


def _quotient(numerator: int, sums: Tensor) -> Tensor:
    """numerator / sums, 0 where the sum is 0, and finite, so that a diverging pair of scalings never makes inf · 0."""
    return torch.where(sums == 0, 0, _finite(numerator / _finite(sums)))


def _finite(x: Tensor) -> Tensor:
    return x.clamp(max=torch.finfo(x.dtype).max)


def _squared_error(squared_norms: Tensor, target: int) -> Tensor:
    """Sum over i of (norm_i / √target − 1)², without those that are zero: (B, k) -> (B,)."""
    relative = (squared_norms / target).sqrt()
    return torch.where(relative == 0, 0, relative - 1).square().sum(-1)
