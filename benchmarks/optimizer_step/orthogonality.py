"""How orthogonal the updates of Muon and SWAN are: a cheaper iteration may simply be a coarser one."""

from collections.abc import Iterable

import torch
from torch.nn import Parameter
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.optimizer_step.contenders import CONTENDERS
from benchmarks.optimizer_step.matrices import Matrices

ORTHOGONALIZING = ("muon", "swan", "swan-k5")


def orthogonality(keys: Iterable[str], matrices: Matrices, model: str) -> dict[str, dict[str, dict[str, float]]]:
    """Singular values of one update, of an attention matrix and of a wide one, relative to their root mean square.

    Returns:
        For each contender and shape: "min", "lower_quartile", "median", "upper_quartile" and "max", all 1 for an
        orthogonal update, "rms_deviation" from 1, and "gflop" of its matrix products.
    """
    gradients = {tuple(gradient.shape): gradient for gradient in reversed(matrices.gradients)}
    result: dict[str, dict[str, dict[str, float]]] = {}
    for key in keys:
        result[key] = {}
        for (m, n), gradient in gradients.items():
            if m < n:
                continue  # the transpose of another
            W = Parameter(torch.zeros_like(gradient))
            W.grad = gradient.clone()
            with FlopCounterMode(display=False) as counter:
                CONTENDERS[key].build([W], model).step()
            values = torch.linalg.svdvals(W.detach().float())
            values /= values.square().mean().sqrt()
            spread = torch.quantile(values, torch.tensor([0, 0.25, 0.5, 0.75, 1.0], device=values.device)).tolist()
            names = ("min", "lower_quartile", "median", "upper_quartile", "max")
            deviation = (values - 1).square().mean().sqrt().item()
            result[key][f"{m}x{n}"] = {**dict(zip(names, spread, strict=True)), "rms_deviation": deviation}
            result[key][f"{m}x{n}"]["gflop"] = counter.get_total_flops() / 1e9
    return result
