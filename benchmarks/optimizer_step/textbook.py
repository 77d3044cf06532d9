"""SinkGD as the paper writes it, to compare with: every half iteration rewrites the whole matrix."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer


def textbook_update_(W: Tensor, G: Tensor, lr: float, iterations: int) -> None:
    """arXiv:2502.06742, Algorithms 3 and 4, in the dtype of G; W and G (m, n)."""
    m, n = G.shape
    X = G
    for _ in range(iterations):
        X = X * (math.sqrt(n) / X.norm(dim=1, keepdim=True))
        X = X * (math.sqrt(m) / X.norm(dim=0, keepdim=True))
    W.sub_(X, alpha=lr)


class Textbook(Optimizer):
    """One matrix after another, eager or each compiled by ``torch.compile`` for its shape."""

    def __init__(self, params: Iterable[Parameter], lr: float, iterations: int = 5, compiled: bool = False) -> None:
        super().__init__(params, {"lr": lr, "iterations": iterations})
        self._update_: Callable[[Tensor, Tensor, float, int], None] = textbook_update_
        if compiled:
            self._update_ = torch.compile(textbook_update_, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; takes no closure."""
        for group in self.param_groups:
            for W in group["params"]:
                self._update_(W, W.grad, group["lr"], group["iterations"])
