"""The golden cases: results in extended precision, written by `make_golden.py` without the package."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.load(Path(__file__).parent / "golden.npz")

SINKHORN = [key for key in _GOLDEN if "/sinkhorn_" in key]
WHITENED = [key for key in _GOLDEN if key.endswith("/whitened")]


@dataclass(frozen=True)
class Golden:
    """A gradient (m, n) and what must become of it, both float64; iterations is 0 for whitening."""

    gradient: Tensor
    expected: Tensor
    iterations: int


def load(key: str) -> Golden:
    """The case of a key such as "gaussian_48x80/sinkhorn_5" or "gaussian_48x80/whitened"."""
    name, _, what = key.partition("/")
    iterations = int(what.removeprefix("sinkhorn_")) if what.startswith("sinkhorn_") else 0
    return Golden(torch.from_numpy(_GOLDEN[f"{name}/input"]), torch.from_numpy(_GOLDEN[key]), iterations)
