"""How matrices lie across ranks, so that their rows and columns can be summed without gathering them.

Each rank sees a frame of a matrix: some of its rows and some of its columns. What it holds of the frame are pieces,
rectangles of entries. Sums over the entries that a rank holds, added up over the right groups of ranks, are the sums of
whole rows and columns. Where the pieces come from is told by `dtensors` (any mesh) and `flat` (FSDP1).

Legend: m rows = output features, n columns = input features.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_multinorm.layouts.dtensors import held_indices, is_dtensor, matrices_of_dtensor
from lightning_multinorm.layouts.flat import FlatSlice, flat_slices, is_flat_slice, matrices_of_slice
from lightning_multinorm.layouts.matrix import Groups, Piece, ShardedMatrix, unsharded
from lightning_multinorm.views import View

__all__ = [
    "FlatSlice", "Groups", "Piece", "ShardedMatrix", "all_reduce_", "clean", "cut", "flat_slices", "gather",
    "is_dtensor", "is_flat_slice", "local", "locate", "named_tensors", "own", "reduce_", "unsharded", "whole",
]  # fmt: skip

_WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_forward_module\.|_orig_mod\.|_checkpoint_wrapped_module\.")


def clean(name: str) -> str:
    """A parameter's name without what wrappers (FSDP1, compilation, checkpointing) put into it."""
    return _WRAPPERS.sub("", name)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory."""
    return tensor.detach().to_local() if is_dtensor(tensor) else tensor.detach()  # type: ignore[attr-defined]


def locate(parameter: Tensor, gradient: Tensor, view: View, flat: FlatSlice | None = None) -> list[ShardedMatrix]:
    """The matrices of a sharded parameter, in the same order on every rank.

    Args:
        parameter: a DTensor, or a 1-D slice if ``flat`` says of what.
        gradient: laid out like the parameter.
        view: how the parameter lies as a matrix.
        flat: the slice's place.

    Raises:
        ValueError: for a Partial parameter, a gradient placed otherwise than its parameter, or a shard that the view
            cannot be cut along.
    """
    if flat is not None:
        return list(matrices_of_slice(parameter, gradient, view, flat))
    return matrices_of_dtensor(parameter, gradient, view)


def all_reduce_(tensor: Tensor, groups: Groups, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """All-reduce in place over each group in turn; no groups, no collective."""
    for group in groups:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def reduce_(vectors: Sequence[Tensor], segments: Iterable[tuple[slice, Groups]], op: Any = dist.ReduceOp.SUM) -> None:
    """All-reduce parts of flat vectors in place, in one collective for all segments that share their groups.

    Args:
        vectors: of one length.
        segments: parts of them, and the groups over which each is completed; no groups, no collective.
        op: `torch.distributed.ReduceOp`; default: SUM.
    """
    by_groups: dict[Groups, list[slice]] = {}
    for segment, groups in segments:
        if groups:
            by_groups.setdefault(groups, []).append(segment)
    for groups, parts in by_groups.items():
        views = [vector[part] for vector in vectors for part in parts]
        joined = all_reduce_(torch.cat(views), groups, op)
        for view, reduced in zip(views, joined.split([len(view) for view in views]), strict=True):
            view.copy_(reduced)


def gather(matrix: ShardedMatrix, values: Sequence[Tensor], like: Tensor) -> Tensor:
    """The whole matrix (m, n) on every rank that sees a part of it, from the values of this rank's pieces.

    Zeros elsewhere, and a sum over ranks: exact for any layout, at twice the bytes of an all-gather.

    Args:
        matrix: where the pieces lie.
        values: as many tensors, of the pieces' shapes.
        like: gives dtype and device.
    """
    whole = like.new_zeros(matrix.shape)
    for place, value in zip(_places(matrix, whole.device), values, strict=True):
        whole[place] = value
    return all_reduce_(whole, tuple(dict.fromkeys((*matrix.column_groups, *matrix.row_groups))))


def cut(matrix: ShardedMatrix, whole: Tensor) -> list[Tensor]:
    """This rank's pieces of a whole matrix (m, n)."""
    return [whole[place] for place in _places(matrix, whole.device)]


def _places(matrix: ShardedMatrix, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for piece in matrix.pieces:
        size = piece.weight.shape
        rows = matrix.rows[piece.row : piece.row + size[0]]
        columns = matrix.columns[piece.column : piece.column + size[1]]
        yield rows.unsqueeze(-1).to(device), columns.to(device)


def whole(tensor: Tensor, flat: FlatSlice | None = None) -> Tensor:
    """All of a tensor that lies like a parameter, on every rank; the tensor itself if it is not sharded."""
    if flat is not None:
        entries = tensor.new_zeros(flat.shape.numel())
        entries[flat.start : flat.start + tensor.numel()] = tensor.detach().flatten()
        dist.all_reduce(entries, group=flat.group)
        return entries.view(flat.shape)
    return tensor.detach().full_tensor() if is_dtensor(tensor) else tensor.detach()  # type: ignore[attr-defined]


def own(whole: Tensor, like: Tensor, flat: FlatSlice | None = None) -> Tensor:
    """This rank's part of a whole tensor, laid out as the parameter ``like``; on the device of ``like``."""
    if flat is not None:
        return whole.flatten()[flat.start : flat.start + like.numel()].to(like.device)
    if not is_dtensor(like):
        return whole.to(like.device)
    from torch.distributed.tensor import DTensor

    part = whole
    for dim in range(whole.ndim):
        part = part.index_select(dim, held_indices(like, dim).to(whole.device))
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    part = part.to(local(like).device)
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by their clean names: what ``state_dict()`` has, however they are spread."""
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in part.named_parameters(recurse=False):
            yield clean(prefix + name), parameter
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                yield clean(prefix + name), buffer
