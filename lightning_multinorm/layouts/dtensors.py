"""Matrices of DTensors on any mesh: each mesh dimension shards rows or columns, or replicates.

The frame is the local shard, one piece. Row sums are added over the mesh dimensions that shard columns, column sums
over those that shard rows; replicas (as in HSDP) are never added.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_multinorm.layouts.matrix import Groups, Piece, ShardedMatrix
from lightning_multinorm.views import View, as_matrices, stored_shapes

_PLAIN = (Tensor, nn.Parameter)  # asked of every parameter in every step


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the tensor is distributed; torch's distributed package is only imported where it is in use."""
    if type(tensor) in _PLAIN or not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def matrices_of_dtensor(parameter: Any, gradient: Any, view: View) -> list[ShardedMatrix]:
    _check_placements(parameter, gradient)
    W, G = parameter.to_local(), gradient.to_local()
    mesh, placements = parameter.device_mesh, parameter.placements
    ndim, sides = parameter.ndim, {"row": [], "column": [], "batch": []}  # type: ignore[var-annotated]
    for dim, placement in enumerate(placements):
        if placement.is_replicate() or mesh.size(dim) == 1:
            continue
        sides[_side(placement.dim % ndim, ndim, view)].append(mesh.get_group(dim))
    across_rows, across_columns = tuple(sides["row"]), tuple(sides["column"])
    if view == "qkv":
        return _split_qkv(parameter, W, G, across_rows, across_columns)
    (m, n), *others = stored_shapes(parameter.shape, view)
    m, n = (n, m) if view == "transposed" else (m, n)
    rows, columns = (_indices(parameter, side, view) for side in ("row", "column"))
    batch = tuple(sides["batch"])
    groups = across_columns, across_rows, batch
    matrices = (_flattened(as_matrices(W, view)), _flattened(as_matrices(G, view, like=W)))
    found = [
        ShardedMatrix(
            (m, n), (len(rows), len(columns)), (Piece(w, g, 0, 0),) if w.numel() else (), rows, columns,
            *groups, 1 / (1 + len(others)),
        )
        for w, g in zip(*matrices, strict=True)
    ]  # fmt: skip
    # A rank without any of a parameter's matrices takes part in the collectives all the same.
    return found or [ShardedMatrix((m, n), (0, 0), (), rows[:0], columns[:0], *groups, 0.0)]


def _flattened(tensor: Tensor) -> Sequence[Tensor]:
    return [tensor] if tensor.ndim == 2 else tensor.flatten(0, -3).unbind()


def _check_placements(parameter: Any, gradient: Any) -> None:
    if any(placement.is_partial() for placement in parameter.placements):
        raise ValueError(f"a parameter placed as {parameter.placements} is Partial; redistribute it to Shard first")
    if not is_dtensor(gradient) or tuple(gradient.placements) != tuple(parameter.placements):
        placed = gradient.placements if is_dtensor(gradient) else "no DTensor"
        raise ValueError(
            f"a gradient ({placed}) must be placed like its parameter ({parameter.placements}); "
            "use gradient.redistribute(placements=parameter.placements)"
        )


def _side(dim: int, ndim: int, view: View) -> Literal["row", "column", "batch"]:
    """What a dimension of the parameter is to its matrices."""
    if view == "batch":
        return "batch" if dim < ndim - 2 else "row" if dim == ndim - 2 else "column"
    if view == "transposed":
        return "column" if dim == 0 else "row"
    return "row" if dim == 0 else "column"


def _split_qkv(
    parameter: Any, W: Tensor, G: Tensor, across_rows: Groups, across_columns: Groups
) -> list[ShardedMatrix]:
    """Three matrices (m, n) stacked by rows, of each of which this rank may hold some."""
    m, n = parameter.shape[0] // 3, parameter.shape[1]
    held, columns = _indices(parameter, "row", "matrix"), _indices(parameter, "column", "matrix")
    found = []
    for k in range(3):
        mine = ((held >= k * m) & (held < (k + 1) * m)).nonzero().flatten()
        start = int(mine[0]) if len(mine) else 0
        span = slice(start, start + len(mine))
        if len(mine) and int(mine[-1]) != span.stop - 1:
            raise ValueError(f"packed q, k and v cannot be told apart in {parameter.placements}; use split_qkv=False")
        pieces = (Piece(W[span], G[span], 0, 0),) if W[span].numel() else ()
        found.append(
            ShardedMatrix(
                (m, n), (len(mine), W.shape[1]), pieces, held[span] - k * m, columns,
                across_columns, across_rows, (), 1 / 3,
            )
        )  # fmt: skip
    return found


def _indices(parameter: Any, side: str, view: View) -> Tensor:
    """Which of the whole matrix' rows or columns the local shard has, in its order."""
    ndim, shape = parameter.ndim, parameter.shape
    index, *others = [(dim, held_indices(parameter, dim)) for dim in range(ndim) if _side(dim, ndim, view) == side]
    held = index[1]
    for dim, inner in others:
        held = (held.unsqueeze(-1) * shape[dim] + inner).flatten()
    return held


def held_indices(parameter: Any, dim: int) -> Tensor:
    """Which indices of a dimension the local shard has; not to be changed."""
    return _held(parameter.shape[dim], dim, parameter.ndim, tuple(parameter.placements), parameter.device_mesh)


@lru_cache(maxsize=256)  # asked for every matrix in every step, and few differ
def _held(length: int, dim: int, ndim: int, placements: tuple[Any, ...], mesh: Any) -> Tensor:
    """Strided shards cut what the plain ones to their right on the mesh have left (FSDP2 over tensor parallelism)."""
    from torch.distributed.tensor.placement_types import _StridedShard

    index, coordinate = torch.arange(length), mesh.get_coordinate()
    cuts = [(k, p) for k, p in enumerate(placements) if p.is_shard() or isinstance(p, _StridedShard)]
    cuts = [(k, p) for k, p in cuts if p.dim % ndim == dim]
    plain = [k for k, p in cuts if not isinstance(p, _StridedShard)]
    strided = [k for k, p in cuts if isinstance(p, _StridedShard)]
    for k in plain + strided[::-1]:
        index = _chunk(index, mesh.size(k), coordinate[k])
    return index


def _chunk(index: Tensor, parts: int, k: int) -> Tensor:
    """The k-th of so many chunks as `torch.chunk` cuts them: the last ones may be shorter, or empty."""
    size = -(-len(index) // parts)
    return index[k * size : (k + 1) * size]
