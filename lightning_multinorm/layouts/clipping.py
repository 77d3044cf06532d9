"""Clipping by the norm of all gradients together, however each of them is spread."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_multinorm.layouts import FlatSlice, Groups, all_reduce_, is_dtensor, local


def clip_(parameters: Iterable[Tensor], largest: float, slices: Mapping[Any, FlatSlice] | None = None) -> Tensor:
    """Scale gradients so that their common l2 norm is at most ``largest``; a collective call if any is spread.

    As `torch.nn.utils.clip_grad_norm_`, which cannot mix meshes, nor see through FSDP1's slices.

    Args:
        parameters: those without a gradient are left out, on all ranks alike.
        largest: the norm.
        slices: where FSDP1 has put parameters.

    Returns:
        The norm before, 0-d.
    """
    gradients: list[Tensor] = []
    sums: dict[Groups, Tensor] = {}
    device = torch.device("cpu")
    for parameter in parameters:
        groups = _groups(parameter, (slices or {}).get(parameter))
        device = parameter.device
        own = sums.setdefault(groups, torch.zeros((), device=device))
        if parameter.grad is not None:
            gradients.append(local(parameter.grad))
            own += torch.linalg.vector_norm(gradients[-1], dtype=torch.float32).square()
    totals = [all_reduce_(total, groups) for groups, total in sums.items()]
    norm = sum(totals, torch.zeros((), device=device)).sqrt()
    factor = (largest / (norm + 1e-6)).clamp(max=1)  # as torch, to the last digit
    for gradient in gradients:
        gradient.mul_(factor)
    return norm


def _groups(parameter: Tensor, flat: FlatSlice | None) -> Groups:
    if flat is not None:
        return (flat.group,)
    if not is_dtensor(parameter):
        return ()
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(placements) if not placement.is_replicate())
