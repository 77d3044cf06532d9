"""Writes golden.npz: SR-Sinkhorn and exact-whitening results in extended precision.

Independent of the package: plain NumPy loops in np.longdouble, one line per line of the
algorithm, so that a test against these numbers is a test against the definition.

SR-Sinkhorn (m x n):  repeat L times: rows to l2-norm sqrt(n), then columns to l2-norm sqrt(m);
a row or column that is all zero stays zero.
Whitening (m <= n, full rank): sqrt(n) * U V^T from the thin SVD of the input; for m > n the
transpose is whitened, sqrt(m) * U V^T.
"""

import numpy as np


def sr_sinkhorn(g, iterations):
    x = np.array(g, dtype=np.longdouble)
    m, n = x.shape
    for _ in range(iterations):
        for axis, target in ((1, np.sqrt(np.longdouble(n))), (0, np.sqrt(np.longdouble(m)))):
            norm = np.sqrt((x * x).sum(axis=axis, keepdims=True))
            x = np.where(norm > 0, x * (target / np.where(norm > 0, norm, 1)), 0)
    return x


def whiten(g):
    g = np.array(g, dtype=np.float64)
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    return np.sqrt(max(g.shape)) * (u @ vt)


def main():
    rng = np.random.default_rng(2502_06742)
    cases = {
        "gaussian_48x80": rng.standard_normal((48, 80)),
        "gaussian_80x48": rng.standard_normal((80, 48)),
        "lognormal_scales_64x64": rng.standard_normal((64, 64))
        * np.exp(2 * rng.standard_normal((64, 1)))
        * np.exp(2 * rng.standard_normal((1, 64))),
        "rank4_plus_noise_64x96": rng.standard_normal((64, 4)) @ rng.standard_normal((4, 96)) * 30
        + rng.standard_normal((64, 96)),
        "student_t_72x40": rng.standard_t(2, (72, 40)),
        "one_row_1x33": rng.standard_normal((1, 33)),
        "one_column_33x1": rng.standard_normal((33, 1)),
        "one_entry_1x1": np.array([[-3.0]]),
    }
    zero = rng.standard_normal((24, 36))
    zero[5] = 0
    zero[:, 7] = 0
    cases["zero_row_and_column_24x36"] = zero
    cases["all_zero_9x11"] = np.zeros((9, 11))
    cases["tiny_scale_32x32"] = rng.standard_normal((32, 32)) * 2.0**-90
    cases["huge_scale_32x32"] = rng.standard_normal((32, 32)) * 2.0**90

    out = {}
    for name, g in cases.items():
        g = g.astype(np.float32).astype(np.float64)  # exactly representable inputs
        out[f"{name}/input"] = g
        for iterations in (1, 2, 5, 50):
            out[f"{name}/sinkhorn_{iterations}"] = sr_sinkhorn(g, iterations).astype(np.float64)
        if np.linalg.matrix_rank(g / max(np.abs(g).max(), 1e-300)) == min(g.shape):
            out[f"{name}/whitened"] = whiten(g)
    np.savez_compressed("golden.npz", **out)


if __name__ == "__main__":
    main()
