"""How matrices lie across ranks, so that their rows and columns can be summed without gathering them.

Each rank sees a frame of a matrix: some of its rows and some of its columns. What it holds of the frame are pieces,
rectangles of entries. Sums over the entries that a rank holds, added up over the right groups of ranks, are the sums of
whole rows and columns:

- DTensor on any mesh, ``Shard`` along rows or columns by each mesh dimension, strided shards and ``Replicate``: the
  frame is the local shard, one piece. Row sums are added over the mesh dimensions that shard columns, column sums over
  those that shard rows; replicas (as in HSDP) are never added.
- `FlatSlice`, FSDP1's slice of a flattened parameter, cut anywhere: the frame is the whole matrix, and the slice is at
  most three pieces of it: the end of a row, whole rows, the beginning of a row.

Legend: m rows = output features, n columns = input features.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_multinorm.views import View, as_matrices

Groups = tuple[Any, ...]
"""Process groups over which a sum is completed, one after another."""


class Piece(NamedTuple):
    """A rectangle of a frame: weight and gradient (k, l), and where its first row and column lie in the frame."""

    weight: Tensor
    gradient: Tensor
    row: int
    column: int


@dataclass(frozen=True)
class ShardedMatrix:
    """What this rank holds of one matrix.

    Attributes:
        shape: (m, n) of the whole matrix.
        frame: how many of its rows and columns this rank sees.
        pieces: what it holds of them; none, if its shard is empty.
        rows: the frame's rows among those of the matrix, int64.
        columns: likewise.
        row_groups: complete the sums over a row.
        column_groups: complete the sums over a column.
        batch_groups: hold other matrices of the same parameter.
        share: the part of its parameter that this matrix is: one of so many matrices of the same shape.
        flat: whether every rank's frame is the whole matrix, of a flat slice.
    """

    shape: tuple[int, int]
    frame: tuple[int, int]
    pieces: tuple[Piece, ...]
    rows: Tensor
    columns: Tensor
    row_groups: Groups
    column_groups: Groups
    batch_groups: Groups = ()
    share: float = 1.0
    flat: bool = False

    @property
    def row_frames(self) -> Groups:
        """Groups that put all rows together, for sums of what is known per row."""
        return (() if self.flat else self.column_groups) + self.batch_groups

    @property
    def column_frames(self) -> Groups:
        """Likewise for columns."""
        return (() if self.flat else self.row_groups) + self.batch_groups


@dataclass(frozen=True)
class FlatSlice:
    """A contiguous slice of a flattened parameter, as FSDP1 keeps it.

    Attributes:
        shape: of the whole parameter.
        start: of the slice, in entries.
        group: the ranks that hold the other slices.
    """

    shape: torch.Size
    start: int
    group: Any


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the tensor is distributed; torch's distributed package is only imported where it is in use."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory."""
    return tensor.detach().to_local() if is_dtensor(tensor) else tensor.detach()  # type: ignore[attr-defined]


def is_flat_slice(tensor: Tensor) -> bool:
    """Whether FSDP1 has flattened this parameter, so that shape and name no longer tell what it is."""
    return bool(getattr(tensor, "_fsdp_flattened", False))


def flat_slices(model: nn.Module) -> dict[nn.Parameter, FlatSlice]:
    """Where the parameters of a model lie that FSDP1 has sharded (``use_orig_params=True``).

    Raises:
        ValueError: if FSDP1 was asked for ``use_orig_params=False``, which leaves no parameters to tell apart.
    """
    if not dist.is_available() or not dist.is_initialized():
        return {}
    from torch.distributed.fsdp import FullyShardedDataParallel

    found: dict[nn.Parameter, FlatSlice] = {}
    for module in FullyShardedDataParallel.fsdp_modules(model):
        handle: Any = module._handle
        if handle is None or not handle.uses_sharded_strategy:
            continue
        flat = handle.flat_param
        if flat._params is None:
            raise ValueError("FSDP1 with use_orig_params=False hides the parameters; set use_orig_params=True")
        for parameter, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
            start = info.intra_param_start_idx if info.in_shard else 0
            found[parameter] = FlatSlice(torch.Size(shape), start, module.process_group)
    return found


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
        return list(_of_flat_slice(parameter, gradient, view, flat))
    return _of_dtensor(parameter, gradient, view)


def _of_flat_slice(parameter: Tensor, gradient: Tensor, view: View, flat: FlatSlice) -> Iterator[ShardedMatrix]:
    stored = _stored_shapes(flat.shape, view)
    groups: Groups = (flat.group,) if flat.group is not None else ()
    offset = 0
    for m, n in stored:
        pieces = [
            Piece(_cut(parameter, *span, *size), _cut(gradient, *span, *size), i, j)
            for span, i, j, *size in _rectangles(flat.start - offset, parameter.numel(), m, n)
        ]
        offset += m * n
        if view == "transposed":
            pieces = [Piece(W.mT, G.mT, j, i) for W, G, i, j in pieces]
            m, n = n, m
        whole = torch.arange(m), torch.arange(n)
        yield ShardedMatrix((m, n), (m, n), tuple(pieces), *whole, groups, groups, (), 1 / len(stored), True)


def _stored_shapes(shape: torch.Size, view: View) -> list[tuple[int, int]]:
    """The matrices that lie in memory one after another."""
    if view == "qkv":
        return [(shape[0] // 3, shape[1])] * 3
    if view == "batch":
        return [(shape[-2], shape[-1])] * shape[:-2].numel()
    return [(shape[0], shape[1:].numel())]


def _rectangles(start: int, count: int, m: int, n: int) -> Iterator[tuple[tuple[int, int], int, int, int, int]]:
    """Entries start .. start + count of a matrix (m, n): spans within the slice, first row and column, and size."""
    first, last = max(0, start), min(m * n, start + count)
    while first < last:
        i, j = divmod(first, n)
        k = 1 if j or last - first < n else (last - first) // n
        width = min(n - j, last - first) if k == 1 else n
        yield (first - start, first - start + k * width), i, j, k, width
        first += k * width


def _cut(flat: Tensor, start: int, stop: int, rows: int, columns: int) -> Tensor:
    return flat[start:stop].view(rows, columns)


def _of_dtensor(parameter: Any, gradient: Any, view: View) -> list[ShardedMatrix]:
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
    (m, n), *others = _stored_shapes(parameter.shape, view)
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
    """Which of the whole matrix' rows or columns the local shard has, in its order.

    Strided shards cut what the plain ones to their right on the mesh have left (FSDP2 over tensor parallelism).
    """
    from torch.distributed.tensor.placement_types import _StridedShard

    ndim, shape = parameter.ndim, parameter.shape
    dims = [dim for dim in range(ndim) if _side(dim, ndim, view) == side]
    coordinate = parameter.device_mesh.get_coordinate()
    per_dim = []
    for dim in dims:
        index = torch.arange(shape[dim])
        cuts = [(k, p) for k, p in enumerate(parameter.placements) if p.is_shard() or isinstance(p, _StridedShard)]
        cuts = [(k, p) for k, p in cuts if p.dim % ndim == dim]
        plain = [k for k, p in cuts if not isinstance(p, _StridedShard)]
        strided = [k for k, p in cuts if isinstance(p, _StridedShard)]
        for k in plain + strided[::-1]:
            index = _chunk(index, parameter.device_mesh.size(k), coordinate[k])
        per_dim.append(index)
    index = per_dim[0]
    for dim, inner in zip(dims[1:], per_dim[1:], strict=True):
        index = (index.unsqueeze(-1) * shape[dim] + inner).flatten()
    return index


def _chunk(index: Tensor, parts: int, k: int) -> Tensor:
    """The k-th of so many chunks as `torch.chunk` cuts them: the last ones may be shorter, or empty."""
    size = -(-len(index) // parts)
    return index[k * size : (k + 1) * size]


def reduce_(vectors: Sequence[Tensor], segments: Iterable[tuple[slice, Groups]], op: Any = None) -> None:
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
        joined = torch.cat(views)
        for group in groups:
            dist.all_reduce(joined, op=op or dist.ReduceOp.SUM, group=group)
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
    for group in dict.fromkeys((*matrix.column_groups, *matrix.row_groups)):
        dist.all_reduce(whole, group=group)
    return whole


def cut(matrix: ShardedMatrix, whole: Tensor) -> list[Tensor]:
    """This rank's pieces of a whole matrix (m, n)."""
    return [whole[place] for place in _places(matrix, whole.device)]


def _places(matrix: ShardedMatrix, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for piece in matrix.pieces:
        size = piece.weight.shape
        rows = matrix.rows[piece.row : piece.row + size[0]]
        columns = matrix.columns[piece.column : piece.column + size[1]]
        yield rows.unsqueeze(-1).to(device), columns.to(device)
