"""Textbook versions of the optimizers in NumPy loops and scalar recursions, with torch's own AdamW for the rest.

Nothing of the package is used: which parameter is a matrix, and how it lies, is said by the test.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

Array = np.ndarray
Update = Callable[[Array], Array]
"""From a gradient (m, n) in float64 to an update with entries of RMS 1."""


def rows(G: Array) -> Array:
    """Each row to l2 norm √n; arXiv:2502.06742, Section 3."""
    X = G.copy()
    for i in range(len(X)):
        length = np.sqrt((X[i] * X[i]).sum())
        X[i] = np.sqrt(X.shape[1]) * X[i] / length if length > 0 else 0
    return X


def columns(G: Array) -> Array:
    """Each column to l2 norm √m."""
    return rows(G.T).T


def frobenius(G: Array) -> Array:
    """The whole matrix to RMS 1."""
    return G / np.sqrt((G * G).mean())


def polar(G: Array) -> Array:
    """√max(m, n) · U Vᵀ."""
    U, _, Vh = np.linalg.svd(G, full_matrices=False)
    return np.sqrt(max(G.shape)) * (U @ Vh)


def newton_schulz(k: int, beta: float) -> Update:
    """√max(m, n) · U diag(s) Vᵀ, where each singular value s follows the scalar Newton–Schulz recursion."""

    def update(G: Array) -> Array:
        U, s, Vh = np.linalg.svd(G, full_matrices=False)
        root = s / np.sqrt(np.sqrt((s**4).sum()))
        y, z = root * root, np.ones_like(root)
        for _ in range(k):
            y, z = beta * y * (3 - z * y), beta * (3 - z * y) * z
        return np.sqrt(max(G.shape)) * (U * (z * root)) @ Vh

    return update


def centered_rows(G: Array) -> Array:
    """GradNorm as first printed (arXiv:2412.13148): each row minus its mean, over its standard deviation."""
    return np.stack([(row - row.mean()) / row.std() for row in G])


def chain(*steps: Update, iterations: int = 1) -> Update:
    """The steps in turn, as often as said: MultiNorm, Algorithm 1."""

    def update(G: Array) -> Array:
        for _ in range(iterations):
            for step in steps:
                G = step(G)
        return G

    return update


@dataclass
class Reference:
    """``W <- (1 - rate · decay) W - rate · update(G)`` with ``rate = lr · matrix_lr_scale``; AdamW for the rest.

    Attributes:
        model: whose parameters are updated.
        matrices: names of the parameters that are matrices.
        update: of a matrix.
    """

    model: nn.Module
    matrices: Iterable[str]
    update: Update
    lr: float = 0.02
    matrix_lr_scale: float = 0.05
    fallback_lr_scale: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    adam: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        chosen = set(self.matrices)
        rest = [p for name, p in self.model.named_parameters() if name not in chosen]
        self.chosen: Sequence[Tensor] = [p for name, p in self.model.named_parameters() if name in chosen]
        assert len(self.chosen) == len(chosen)
        self.adam = torch.optim.AdamW(
            rest, lr=self.lr * self.fallback_lr_scale, weight_decay=self.weight_decay, betas=self.betas, eps=self.eps
        )

    @torch.no_grad()
    def step(self) -> None:
        """One step on every parameter."""
        rate = self.lr * self.matrix_lr_scale
        for W in self.chosen:
            assert W.grad is not None
            step = torch.from_numpy(self.update(W.grad.double().numpy()))
            W.copy_((1 - rate * self.weight_decay) * W.double() - rate * step)
        self.adam.step()
