"""The Triton kernels of SR-Sinkhorn; `triton` launches them.

A kernel works on all matrices of a group at once: program ``pid`` belongs to matrix ``pid // (programs per matrix)``.
Matrices are found through a table in device memory, one entry of 4 int64 per matrix: the address of its gradient, the
address of its weight, its number in the list of the update, and padding (entries stay 16-byte aligned).

Sums are kept in a register per entry of a tile, added over tiles in order, and across programs by one program in a
fixed order: no atomics, so results repeat bit for bit.

Legend: G gradient (m, n), W weight, r (matrices, m), c (matrices, n); X = (r G) c; R_i row sums and C_j column sums of
X∘X; i rows, j columns; a_i powers of two.
"""

import triton
import triton.language as tl

# Offsets within an entry of the table.
_WEIGHT = tl.constexpr(1)
_NUMBER = tl.constexpr(2)
_ENTRY = tl.constexpr(4)

# Sums stop here: inf then leads to tiny scalings that are not zero, beside which inf stays inf.
_LARGEST_SUM = tl.constexpr(2.0**120)
# Scalings stay between these. A row of float32's largest numbers needs 2^-128, so the lower one is subnormal.
_SMALLEST, _LARGEST = tl.constexpr(2.0**-130), tl.constexpr((2 - 2**-23) * 2.0**127)

# A column of the first X may be 1e-30 of its neighbours, where squares underflow. Such a column is summed as (2^60 x)²,
# and its sum is kept as a negative number. Those with a larger sum than 2^-60 lose nothing as x².
_LIFT = tl.constexpr(2.0**60)
_LIFTED_BELOW = tl.constexpr(2.0**-60)


@triton.jit
def _matrix(address_in_table: tl.tensor, TYPE: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """The pointer to entry (0, 0) of a matrix; ALIGNED promises that it is a multiple of 16 bytes."""
    matrix = tl.load(address_in_table).to(tl.pointer_type(TYPE))
    if ALIGNED:
        matrix = tl.multiple_of(matrix, 16)
    return matrix


@triton.jit
def _tile(
    G: tl.tensor, i: tl.tensor, j: tl.tensor, m: tl.tensor, n: tl.tensor, stride_i: tl.tensor, stride_j: tl.tensor
) -> tl.tensor:
    """Rows i and columns j of G in float32, 0 beyond its edges. Offsets are 64-bit: they may exceed 2^31."""
    at = i.to(tl.int64)[:, None] * stride_i + j.to(tl.int64)[None, :] * stride_j
    return tl.load(G + at, mask=(i < m)[:, None] & (j < n)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _inverse_power_of_two(x: tl.tensor) -> tl.tensor:
    """`scaling.inverse_power_of_two`, out of the exponent bits: x = mantissa · 2^(e - 126) -> 2^(126 - e)."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) & 0xFF
    inverse = tl.minimum(tl.maximum(253 - exponent, 1), 253)
    inverse = tl.where((x == 0) | (exponent == 255), 127, inverse)
    return (inverse << 23).to(tl.float32, bitcast=True)


@triton.jit
def _step(target: tl.tensor, sums: tl.tensor) -> tl.tensor:
    """√(target / sums), 0 where the sum is 0. Two roots, since the quotient of a tiny sum would overflow."""
    finite = tl.where(sums > _LARGEST_SUM, _LARGEST_SUM, sums)  # written so that NaN stays NaN, here and below
    safe = tl.where(sums == 0, 1.0, finite)
    root = tl.div_rn(tl.sqrt_rn(tl.zeros_like(safe) + target), tl.sqrt_rn(safe))
    return tl.where(sums == 0, 0.0, root)


@triton.jit
def _scaled(scale: tl.tensor, step: tl.tensor) -> tl.tensor:
    """scale · step within the range of scalings; 0 stays 0."""
    product = scale * step
    product = tl.where(product < _SMALLEST, _SMALLEST, product)
    product = tl.where(product > _LARGEST, _LARGEST, product)
    return tl.where(step == 0, 0.0, product)


@triton.jit
def _squared_error(norms: tl.tensor) -> tl.tensor:
    """Sum of (norm - 1)² over norms that are not 0."""
    error = tl.where(norms == 0, 0.0, norms - 1)
    return tl.sum(error * error)


@triton.jit
def _relative_norms(sums: tl.tensor, target: tl.tensor) -> tl.tensor:
    """√(sums / target)."""
    return tl.sqrt_rn(tl.div_rn(sums, tl.zeros_like(sums) + target))


@triton.jit
def _kept(sums: tl.tensor, lifted_sums: tl.tensor) -> tl.tensor:
    """One number for both sums of a column: the lifted one, negative, where the plain one may have lost something."""
    return tl.where(sums >= _LIFTED_BELOW, sums, -lifted_sums)


@triton.jit
def rows_and_column_sums(
    table: tl.tensor, r: tl.tensor, c: tl.tensor, partials: tl.tensor, errors: tl.tensor,
    m: tl.tensor, n: tl.tensor, stride_i: tl.tensor, stride_j: tl.tensor, panels: tl.tensor,
    rows_per_panel: tl.tensor,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, FIRST: tl.constexpr, TRACE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """r for a panel of rows, and the panel's column sums with the new r: one read of G. Needs n <= BLOCK_N.

    Writes r, partials (matrices, panels, n) and, if TRACE, errors (matrices, panels) of the rows before this step.
    FIRST: r and c are 1 and not read; rows are brought into the middle of the range before they are squared.
    """
    pid = tl.program_id(0)
    matrix, first = (pid // panels).to(tl.int64), (pid % panels) * rows_per_panel
    G = _matrix(table + matrix * _ENTRY, TYPE, ALIGNED)
    j = tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if FIRST:
        lifted_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    else:
        c_j = tl.load(c + matrix * n + j, mask=j < n, other=0.0)
    error = 0.0
    for start in range(first, tl.minimum(first + rows_per_panel, m), BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        X = _tile(G, i, j, m, n, stride_i, stride_j)
        if FIRST:
            a = _inverse_power_of_two(tl.max(tl.abs(X), axis=1))
            small = X * a[:, None]
            r_i = _scaled(a, _step(n, tl.sum(small * small, axis=1)))
            X *= r_i[:, None]
            lifted = X * _LIFT
            lifted_sums += lifted * lifted
        else:
            r_i = tl.load(r + matrix * m + i, mask=i < m, other=0.0)
            before = (X * r_i[:, None]) * c_j[None, :]
            R = tl.sum(before * before, axis=1)
            if TRACE:
                error += _squared_error(_relative_norms(R, n))
            r_i = _scaled(r_i, _step(n, R))
            X = (X * r_i[:, None]) * c_j[None, :]
        sums += X * X
        tl.store(r + matrix * m + i, r_i, mask=i < m)
    C = tl.sum(sums, axis=0)
    if FIRST:
        C = _kept(C, tl.sum(lifted_sums, axis=0))
    tl.store(partials + pid.to(tl.int64) * n + j, C, mask=j < n)
    if TRACE:
        tl.store(errors + pid, error)


@triton.jit
def rows(
    table: tl.tensor, r: tl.tensor, c: tl.tensor, errors: tl.tensor,
    m: tl.tensor, n: tl.tensor, stride_i: tl.tensor, stride_j: tl.tensor, blocks: tl.tensor,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, FIRST: tl.constexpr, UPDATE: tl.constexpr, TRACE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """r for BLOCK_M rows of any length, read in tiles (twice if FIRST); errors (matrices, blocks) if TRACE.

    Without UPDATE only the errors are written.
    """
    pid = tl.program_id(0)
    matrix = (pid // blocks).to(tl.int64)
    G = _matrix(table + matrix * _ENTRY, TYPE, ALIGNED)
    i = (pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    if FIRST:
        largest = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, n, BLOCK_N):
            X = _tile(G, i, start + tl.arange(0, BLOCK_N), m, n, stride_i, stride_j)
            largest = tl.maximum(largest, tl.abs(X))
        r_i = _inverse_power_of_two(tl.max(largest, axis=1))
    else:
        r_i = tl.load(r + matrix * m + i, mask=i < m, other=0.0)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, n, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        X = _tile(G, i, j, m, n, stride_i, stride_j) * r_i[:, None]
        if not FIRST:
            X *= tl.load(c + matrix * n + j, mask=j < n, other=0.0)[None, :]
        sums += X * X
    R = tl.sum(sums, axis=1)
    if UPDATE:
        tl.store(r + matrix * m + i, _scaled(r_i, _step(n, R)), mask=i < m)
    if TRACE:
        tl.store(errors + pid, _squared_error(_relative_norms(R, n)))


@triton.jit
def column_sums(
    table: tl.tensor, r: tl.tensor, c: tl.tensor, partials: tl.tensor,
    m: tl.tensor, n: tl.tensor, stride_i: tl.tensor, stride_j: tl.tensor, panels: tl.tensor,
    rows_per_panel: tl.tensor, blocks: tl.tensor,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Column sums of X for BLOCK_N columns of a panel of rows -> partials (matrices, panels, n)."""
    pid = tl.program_id(0)
    panel = pid // blocks
    matrix, first = (panel // panels).to(tl.int64), (panel % panels) * rows_per_panel
    G = _matrix(table + matrix * _ENTRY, TYPE, ALIGNED)
    j = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if FIRST:
        lifted_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    else:
        c_j = tl.load(c + matrix * n + j, mask=j < n, other=0.0)
    for start in range(first, tl.minimum(first + rows_per_panel, m), BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        r_i = tl.load(r + matrix * m + i, mask=i < m, other=0.0)
        X = _tile(G, i, j, m, n, stride_i, stride_j) * r_i[:, None]
        if FIRST:
            lifted = X * _LIFT
            lifted_sums += lifted * lifted
        else:
            X *= c_j[None, :]
        sums += X * X
    C = tl.sum(sums, axis=0)
    if FIRST:
        C = _kept(C, tl.sum(lifted_sums, axis=0))
    tl.store(partials + panel.to(tl.int64) * n + j, C, mask=j < n)


@triton.jit
def columns(
    c: tl.tensor, partials: tl.tensor, errors: tl.tensor,
    m: tl.tensor, n: tl.tensor, panels: tl.tensor, blocks: tl.tensor,
    FIRST: tl.constexpr, TRACE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """c for BLOCK_N columns from the partial sums of all panels, BLOCK_M at a time.

    errors (matrices, blocks) of the columns after this step if TRACE.
    """
    pid = tl.program_id(0)
    matrix = (pid // blocks).to(tl.int64)
    j = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Read before the sums, whose barrier keeps it from what another thread writes below.
    scale = tl.zeros([BLOCK_N], tl.float32) if FIRST else tl.load(c + matrix * n + j, mask=j < n, other=0.0)
    sums, lifted_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, panels, BLOCK_M):
        p = start + tl.arange(0, BLOCK_M)
        at = (matrix * panels + p)[:, None] * n + j[None, :]
        part = tl.load(partials + at, mask=(p < panels)[:, None] & (j < n)[None, :], other=0.0)
        sums += tl.where(part < 0, 0.0, part)
        if FIRST:
            lifted_sums += tl.where(part < 0, -part, 0.0)
    C = tl.sum(sums, axis=0)
    if FIRST:
        C_lifted = tl.sum(lifted_sums, axis=0)
        scale = tl.where(C == 0, _LIFT, 1.0)
        C = tl.where(C == 0, C_lifted, C + C_lifted / _LIFT / _LIFT)
    step = _step(m, C)
    tl.store(c + matrix * n + j, _scaled(scale, step), mask=j < n)
    if TRACE:
        tl.store(errors + pid, _squared_error(step * _relative_norms(C, m)))


@triton.jit
def _lowbias32(x: tl.tensor) -> tl.tensor:
    """`rounding.lowbias32` in uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _bfloat16(x: tl.tensor, noise: tl.tensor, NOISY: tl.constexpr) -> tl.tensor:
    """float32 to bfloat16, to nearest even or by 16 bits of noise: either way by what is added before the cut."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = bits + (noise if NOISY else 0x7FFF + ((bits >> 16) & 1))
    is_finite = (bits & 0x7F800000) != 0x7F800000
    rounded = tl.where(is_finite, rounded, tl.where(x == x, bits, 0x7FC00000))
    return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["seed"])
def apply(
    table: tl.tensor, r: tl.tensor, c: tl.tensor, lr: tl.tensor, weight_decay: tl.tensor, seed: tl.tensor,
    m: tl.tensor, n: tl.tensor, stride_i: tl.tensor, stride_j: tl.tensor, weight_stride_i: tl.tensor,
    weight_stride_j: tl.tensor, row_blocks: tl.tensor, column_blocks: tl.tensor,
    TYPE: tl.constexpr, WEIGHT_TYPE: tl.constexpr, ALIGNED: tl.constexpr, LR_IN_MEMORY: tl.constexpr,
    NOISY: tl.constexpr, SEED_IN_MEMORY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """W <- (1 - lr · weight_decay) W - lr · (r G) c for one tile, rounded once; lr and seed may be pointers."""
    pid = tl.program_id(0)
    block = pid // column_blocks
    matrix = (block // row_blocks).to(tl.int64)
    entry = table + matrix * _ENTRY
    i = (block % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = (pid % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    G, W = _matrix(entry, TYPE, ALIGNED), _matrix(entry + _WEIGHT, WEIGHT_TYPE, ALIGNED)
    rate = tl.load(lr).to(tl.float32) if LR_IN_MEMORY else lr
    r_i = tl.load(r + matrix * m + i, mask=i < m, other=0.0)
    c_j = tl.load(c + matrix * n + j, mask=j < n, other=0.0)
    X = (_tile(G, i, j, m, n, stride_i, stride_j) * r_i[:, None]) * c_j[None, :]
    w = _tile(W, i, j, m, n, weight_stride_i, weight_stride_j) * (1 - rate * weight_decay) - rate * X
    if tl.bfloat16 == WEIGHT_TYPE:
        noise = tl.zeros([BLOCK_M, BLOCK_N], tl.uint32)
        if NOISY:
            number = (tl.load(seed) if SEED_IN_MEMORY else seed).to(tl.int64) + tl.load(entry + _NUMBER)
            # Entries are counted modulo 2^32, as `rounding.noise` does.
            place = i.to(tl.uint32)[:, None] * n + j.to(tl.uint32)[None, :]
            noise = _lowbias32(place ^ _lowbias32(number.to(tl.uint32))) >> 16
        w = _bfloat16(w, noise, NOISY)
    at = i.to(tl.int64)[:, None] * weight_stride_i + j.to(tl.int64)[None, :] * weight_stride_j
    tl.store(W + at, w.to(WEIGHT_TYPE), mask=(i < m)[:, None] & (j < n)[None, :])
