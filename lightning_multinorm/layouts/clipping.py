"""The norm of all gradients together, however each of them is spread: to clip by, and to see that all are finite."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_multinorm.layouts import FlatSlice, Groups, all_reduce_, is_dtensor, local, reduce_

Slices = Mapping[Any, FlatSlice]
"""Where FSDP1 has put parameters."""
_BLOCK = 1 << 16


def clip_(parameters: Iterable[Tensor], largest: float, slices: Slices | None = None) -> Tensor:
    """Scale gradients so that their common l2 norm is at most ``largest``; a collective call if any is spread.

    As `torch.nn.utils.clip_grad_norm_`, which cannot mix meshes, nor see through FSDP1's slices. As there, gradients
    whose squares overflow become zero.

    Args:
        parameters: those without a gradient are left out, on all ranks alike.
        largest: the norm.
        slices: where FSDP1 has put parameters.

    Returns:
        The norm before, 0-d.
    """
    parameters = list(parameters)
    norm = gradient_norm(parameters, slices)
    factor = (largest / (norm + 1e-6)).clamp(max=1)  # as torch, to the last digit
    for parameter in parameters:
        if parameter.grad is not None:
            local(parameter.grad).mul_(factor)
    return norm


def gradient_norm(parameters: Iterable[Tensor], slices: Slices | None = None) -> Tensor:
    """The common l2 norm of gradients, 0-d, the same on all ranks; a collective call if any is spread.

    Not finite if an entry is not; but also infinite if the squares overflow float32, from entries of 2e19 on, which
    `nonfinite_entries` tells apart.

    Args:
        parameters: those without a gradient are left out, on all ranks alike.
        slices: where FSDP1 has put parameters.
    """
    norms: dict[Groups, list[Tensor]] = {}
    device = torch.device("cpu")
    for parameter in parameters:
        own = norms.setdefault(_groups(parameter, (slices or {}).get(parameter)), [])
        device = parameter.device
        if parameter.grad is not None:
            own += _norms(_entries(parameter.grad))
    total = torch.zeros((), device=device)
    for groups, own in norms.items():
        square = torch.zeros((), device=device)
        if own:
            square += torch.stack([norm.to(device) for norm in own]).square().sum()
        total += all_reduce_(square, groups)
    return total.sqrt()


def nonfinite_entries(parameters: Sequence[Tensor], slices: Slices | None = None) -> Tensor:
    """How many entries of each parameter's gradient are NaN or infinite; a collective call if any is spread.

    Args:
        parameters: 0 for those without a gradient.
        slices: where FSDP1 has put parameters.

    Returns:
        (len(parameters),), int64, over all ranks that hold shards.
    """
    counts = torch.zeros(len(parameters), dtype=torch.int64, device=parameters[0].device if parameters else None)
    for count, parameter in zip(counts, parameters, strict=True):
        if parameter.grad is not None:
            count += _entries(parameter.grad).isfinite().logical_not_().sum().to(counts.device)
    groups = [_groups(parameter, (slices or {}).get(parameter)) for parameter in parameters]
    reduce_((counts,), [(slice(k, k + 1), own) for k, own in enumerate(groups)])
    return counts


def _norms(entries: Tensor) -> list[Tensor]:
    """The norms of parts of a gradient, at least in float32."""
    dtype = torch.promote_types(entries.dtype, torch.float32)
    # On CPUs torch copies what is to be widened as a whole, which gradient release cannot afford.
    whole = entries.dtype == dtype or entries.device.type != "cpu"
    parts = (entries,) if whole else entries.flatten().split(_BLOCK)
    return [torch.linalg.vector_norm(part, dtype=dtype) for part in parts]


def _entries(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else local(gradient)


def _groups(parameter: Tensor, flat: FlatSlice | None) -> Groups:
    if flat is not None:
        return (flat.group,)
    if not is_dtensor(parameter):
        return ()
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(placements) if not placement.is_replicate())
