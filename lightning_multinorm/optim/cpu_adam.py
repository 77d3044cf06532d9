"""One stochastically rounded Adam step of a bfloat16 parameter on the CPU, compiled by Numba; see `fallback`.

Legend: w weight, g gradient, m and v first and second moments, all as 16-bit words; entries in order.
"""

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_multinorm.rounding import key
from lightning_multinorm.sinkhorn import cpu_threads
from lightning_multinorm.sinkhorn.cpu_intrinsics import bfloat16_of_float, bfloat16_of_float_stochastic, widen
from lightning_multinorm.sinkhorn.cpu_jit import jit

_BLOCK = 2**16


def step_(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    seeds: tuple[int, int],
    *,
    lr: float,
    decay: float,
    betas: tuple[float, float],
    rate: float,
    root: float,
    eps: float,
) -> None:
    """In place, for contiguous bfloat16 tensors of one size.

    Args:
        w: weight.
        g: gradient.
        m: first moment, rounded to nearest.
        v: second moment.
        seeds: of the noise that rounds w and v.
        lr: effective learning rate.
        decay: decoupled weight decay.
        betas: Adam's.
        rate: ``lr / (1 - beta1^t)``.
        root: ``sqrt(1 - beta2^t)``.
        eps: Adam's.
    """
    words = [x.view(torch.int16).numpy().view(np.uint16) for x in (w, g, m, v)]
    numbers = [np.float32(x) for x in (1 - lr * decay, *betas, rate, root, eps)]
    keys = [np.uint32(key(seed, 0)) for seed in seeds]
    blocks = iter(range(0, w.numel(), _BLOCK))

    def worker() -> None:
        for start in blocks:
            _step(*(x[start : start + _BLOCK] for x in words), *numbers, *keys, start)

    others = min(torch.get_num_threads(), -(-w.numel() // _BLOCK)) - 1
    futures = [cpu_threads.pool(os.getpid(), others).submit(worker) for _ in range(others)]
    worker()
    for future in futures:
        future.result()
    torch.autograd.graph.increment_version([x for x in (w, m, v) if not x.is_inference()])


@jit
def _step(
    w: Any, g: Any, m: Any, v: Any, keep: Any, beta1: Any, beta2: Any, rate: Any, root: Any, eps: Any,
    w_key: Any, v_key: Any, start: int,
) -> None:  # fmt: skip
    one = np.float32(1)
    for j in range(len(w)):
        gradient = widen(g[j])
        mean, variance = widen(m[j]), widen(v[j])
        mean = mean + (gradient - mean) * (one - beta1)
        variance = variance * beta2 + (gradient * gradient) * (one - beta2)
        moved = widen(w[j]) * keep - (mean * rate) / (np.sqrt(variance) / root + eps)
        w[j] = bfloat16_of_float_stochastic(moved, w_key, start, j)
        m[j] = bfloat16_of_float(mean)
        v[j] = bfloat16_of_float_stochastic(variance, v_key, start, j)
