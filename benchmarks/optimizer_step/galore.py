"""GaLore without the SVD that it runs every 200 steps, and the time of that SVD."""

import time
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

# The papers' ranks for these sizes (arXiv:2403.03507, Table 2).
RANKS: Mapping[str, int] = {"60m": 128, "130m": 256, "350m": 256, "1b": 512}
_SCALE, _GAP = 0.25, 200


def rank_of(model: str, weights: list[Parameter]) -> int:
    """The paper's rank, or a quarter of the width for a size that it does not have."""
    return RANKS.get(model, min(min(weight.shape) for weight in weights) // 4)


def build_galore(lr: float) -> Callable[[list[Parameter], str], Optimizer]:
    """GaLoreAdamW whose projectors exist already, orthonormal and random: how long a step takes is the same.

    The library decomposes each gradient at its first step, which takes minutes for a large model on a processor, and
    then every 200 steps. Here the count starts at 1, so that no step of a benchmark is such a one.
    """

    def build(weights: list[Parameter], model: str) -> Optimizer:
        from galore_torch import GaLoreAdamW
        from galore_torch.galore_projector import GaLoreProjector

        rank = rank_of(model, weights)
        rule = {"rank": rank, "update_proj_gap": _GAP, "scale": _SCALE, "proj_type": "std"}
        optimizer = GaLoreAdamW([{"params": weights, **rule}], lr=lr, no_deprecation_warning=True)
        for weight in weights:
            projector = GaLoreProjector(rank, update_proj_gap=_GAP, scale=_SCALE, proj_type="std")
            m, n = weight.shape
            basis = torch.empty(rank, n) if m >= n else torch.empty(m, rank)
            torch.nn.init.orthogonal_(basis)
            projector.ortho_matrix = basis.to(weight)
            optimizer.state[weight].update({"step": 1, "projector": projector})
        return optimizer

    return build


def svd_seconds(weights: list[Parameter], model: str) -> float:
    """Seconds that the library takes to renew all projectors: one matrix of each shape is timed."""
    from galore_torch.galore_projector import GaLoreProjector

    projector = GaLoreProjector(rank_of(model, weights))
    seconds = 0.0
    for (m, n), count in Counter(tuple(weight.shape) for weight in weights).items():
        gradient = next(weight.grad for weight in weights if weight.shape == (m, n))
        started = time.perf_counter()
        basis = projector.get_orthogonal_matrix(gradient, projector.rank, type="right" if m >= n else "left")
        basis.sum().item()  # waits for the device
        seconds += count * (time.perf_counter() - started)
    return seconds
