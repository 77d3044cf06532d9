"""Checks on single matrices: an update of shards is the shards of the update, for every placement and layout."""

import itertools
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing import assert_close

from lightning_multinorm import SWAN, MultiNormGD, SinkGD
from lightning_multinorm.layouts import cut, gather, locate
from lightning_multinorm.norms import ColumnNorm, RowNorm
from lightning_multinorm.optim.combined import Combined
from lightning_multinorm.optim.observation import Observation
from lightning_multinorm.optim.shadow import Shadow

Make = Callable[..., Any]

SHAPES = [(85, 33), (8, 12), (33, 85), (2, 7), (1, 5), (5, 1), (12, 8)]
ONE = {"rows": (Shard(0),), "columns": (Shard(1),), "whole": (Replicate(),)}
TWO = {
    "hsdp": (Replicate(), Shard(0)),
    "grid": (Shard(0), Shard(1)),
    "transposed-grid": (Shard(1), Shard(0)),
    "strided": (_StridedShard(0, split_factor=2), Shard(0)),
    "tp-replicated": (Shard(0), Replicate()),
    "columns-twice": (Shard(1), Shard(1)),
}
MAKERS: dict[str, Make] = {
    "sinkgd": SinkGD,
    "sinkgd-eager": partial(SinkGD, kernel="eager"),
    "auto": partial(SinkGD, iterations="auto", tolerance=0.02, max_iterations=7),
    "swan": partial(SWAN, k=6, beta=0.5),
    "swan-centred": partial(SWAN, center=True, k=4, beta=0.5),
    "sinkhorn-whitening": partial(SWAN, normalization="sinkhorn", k=2, beta=0.5),
    "operator": partial(SinkGD, rescale="operator"),
    "multinormgd": partial(MultiNormGD, norms=[RowNorm(), ColumnNorm()]),
}


def gradients(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, kind: str = "plain") -> list[Tensor]:
    """Three gradients with rows and columns of very different size; the same on all ranks."""
    generator = torch.Generator().manual_seed(sum(shape))
    found = []
    for _ in range(3):
        G = torch.randn(shape, generator=generator, dtype=torch.float64)
        G *= torch.randn(*shape[:-1], 1, generator=generator, dtype=torch.float64).exp()
        G *= torch.randn(shape[-1], generator=generator, dtype=torch.float64).exp()
        if kind == "wild":
            G *= 10.0 ** torch.randint(-12, 13, (*shape[:-1], 1), generator=generator)
            G *= 10.0 ** torch.randint(-12, 13, (shape[-1],), generator=generator)
        if kind == "zeros":
            G[..., 0, :] = 0
            G[..., -1] = 0
        found.append(G.to(dtype))
    return found


def train(
    parameters: list[nn.Parameter], grads: list[list[Any]], make: Make, view: str, **options: Any
) -> list[Observation]:
    """Three steps; the traces of all parameters."""
    group = {"params": parameters, "rule": "multinorm", "view": view}
    optimizer = make([group], lr=0.5, matrix_lr_scale=1.0, weight_decay=0.1, **options)
    seen: dict[nn.Parameter, Observation] = {}
    traces: list[Observation] = []
    optimizer.observers.append(seen.__setitem__)
    for step in range(3):
        for parameter, own in zip(parameters, grads, strict=True):
            parameter.grad = own[step]
        optimizer.step()
        traces += [seen.pop(parameter) for parameter in parameters]
    assert not optimizer.state
    return traces


def compare(
    mesh: Any,
    placements: tuple[Any, ...],
    shapes: list[tuple[int, ...]],
    make: Make,
    *,
    view: str = "matrix",
    dtype: torch.dtype = torch.float32,
    kind: str = "plain",
    tolerance: float = 1e-5,
) -> None:
    """Train whole and sharded; weights and residuals must agree, relative to a step's size."""
    grads = [gradients(shape, dtype, kind) for shape in shapes]
    weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
    whole = [nn.Parameter(W.clone()) for W in weights]
    expected = train(whole, grads, make, view)

    def place(tensor: Tensor) -> DTensor:
        return sharded(tensor, mesh, placements)

    shards = [nn.Parameter(place(W)) for W in weights]
    traces = train(shards, [[place(G) for G in own] for own in grads], make, view)
    for parameter, shard in zip(whole, shards, strict=True):
        assert_close(shard.data.full_tensor(), parameter.data, rtol=0, atol=tolerance)
    if make is SinkGD:
        traces += shadows(shards, view)
        expected += shadows(whole, view)
    for trace, other in zip(traces, expected, strict=True):
        assert trace.norms == other.norms
        assert_close(trace.residuals, other.residuals, rtol=1e-3, atol=20 * tolerance)
        assert_close(trace.statistics, other.statistics, rtol=1e-3 + tolerance, atol=0)


def shadows(parameters: list[nn.Parameter], view: str) -> list[Observation]:
    """What SR-Sinkhorn would do to the gradients that the last step has left."""
    shadow = Shadow([{"rule": "multinorm", "view": view, "params": [("w", p) for p in parameters]}], iterations=5)
    seen = dict(shadow.observe())
    return [seen[parameter] for parameter in parameters]


def sharded(tensor: Tensor, mesh: Any, placements: tuple[Any, ...]) -> DTensor:
    """As `distribute_tensor`; strided shards are cut as FSDP2 cuts what tensor parallelism has left."""
    if not any(isinstance(placement, _StridedShard) for placement in placements):
        return distribute_tensor(tensor, mesh, placements)
    outer, inner = mesh.get_coordinate()
    local = tensor.chunk(mesh.size(1), placements[1].dim)
    local = local[inner].chunk(mesh.size(0), placements[0].dim)
    own = local[outer] if outer < len(local) else tensor[:0]
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


@cache
def flat_mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


@cache
def grid_mesh() -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))


def on_one_dimension(name: str, maker: str, kind: str = "plain") -> None:
    compare(flat_mesh(), ONE[name], list(SHAPES), MAKERS[maker], kind=kind)


def on_two_dimensions(name: str, maker: str) -> None:
    shapes = [(84, 33), (8, 12), (33, 84)] if name == "strided" else list(SHAPES)
    compare(grid_mesh(), TWO[name], shapes, MAKERS[maker])  # type: ignore[arg-type]


def views(view: str, dim: int) -> None:
    shape = {"convolution": (9, 4, 3, 3), "transposed": (7, 10), "batch": (5, 6, 8), "qkv": (21, 6)}[view]
    for make in (SinkGD, partial(SinkGD, kernel="eager"), MAKERS["multinormgd"]):
        compare(flat_mesh(), (Shard(dim),), [shape, shape], make, view=view)
    compare(
        flat_mesh(), (Shard(dim),), [shape, shape], MAKERS["operator"], view=view, tolerance=1e-4
    )  # σ, by eight sums


def other_dtypes() -> None:
    for name in ONE:
        compare(flat_mesh(), ONE[name], list(SHAPES), MAKERS["sinkgd"], dtype=torch.float64, tolerance=1e-11)
        for dtype, tolerance in ((torch.bfloat16, 0.04), (torch.float16, 0.006)):
            plain = partial(SinkGD, stochastic_rounding=False)
            compare(flat_mesh(), ONE[name], list(SHAPES), plain, dtype=dtype, tolerance=tolerance)


def scale_changes_no_bit() -> None:
    for make, (_, placements) in itertools.product((MAKERS["sinkgd"], MAKERS["sinkgd-eager"]), ONE.items()):
        results = []
        for power in (0, -90, 70):
            G = gradients((21, 13))[0] * 2.0**power
            parameter = nn.Parameter(sharded(torch.zeros(21, 13), flat_mesh(), placements))
            train([parameter], [[sharded(G, flat_mesh(), placements)] * 3], make, "matrix")
            results.append(parameter.data.full_tensor())
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def gathered_is_whole() -> None:
    for (name, placements), shape in itertools.product(ONE.items(), SHAPES):
        W = torch.randn(shape)
        shard = sharded(W, flat_mesh(), placements)
        (matrix,) = locate(shard, shard, "matrix")
        assert torch.equal(gather(matrix, [piece.weight for piece in matrix.pieces], W), W), name
        for piece, own in zip(matrix.pieces, cut(matrix, W), strict=True):
            assert torch.equal(piece.weight, own)


def strided_is_gathered() -> None:
    W = torch.randn(84, 33)
    shard = sharded(W, grid_mesh(), TWO["strided"])
    (matrix,) = locate(shard, shard, "matrix")
    assert torch.equal(gather(matrix, [piece.weight for piece in matrix.pieces], W), W)
    assert torch.equal(shard.full_tensor(), W)


strided_is_gathered.sizes = (4,)  # type: ignore[attr-defined]


def replicas_stay_equal_in_bfloat16() -> None:
    """Stochastic rounding: the same noise on replicas, other noise on other shards, and no bias."""
    mesh, placements = grid_mesh(), TWO["hsdp"]
    parameter = nn.Parameter(sharded(torch.ones(64, 512, dtype=torch.bfloat16), mesh, placements))
    G = sharded(torch.ones(64, 512, dtype=torch.bfloat16), mesh, placements)
    group = {"params": [parameter], "rule": "multinorm", "view": "matrix"}
    optimizer = SinkGD([group], lr=2.0**-10, matrix_lr_scale=1.0)  # an eighth of what bfloat16 resolves below 1
    parameter.grad = G
    for _ in range(4):
        optimizer.step()
    local = parameter.data.to_local()
    others = [torch.empty_like(local) for _ in range(4)]
    dist.all_gather(others, local.contiguous())
    assert torch.equal(others[0], others[2])
    assert torch.equal(others[1], others[3])
    assert not torch.equal(others[0], others[1])
    assert abs(local.double().mean() - (1 - 4 * 2.0**-10)) < 2e-4


replicas_stay_equal_in_bfloat16.sizes = (4,)  # type: ignore[attr-defined]


def division_among_replicas() -> None:
    """Replicas that divide the work end with the same weights as one that does it all, bit for bit."""
    shapes = [(12, 8), (12, 8), (8, 12), (12, 8), (8, 12)]
    for make in (MAKERS["swan"], MAKERS["multinormgd"]):
        runs = []
        for group in (None, dist.group.WORLD):
            torch.manual_seed(1)
            parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
            for k, parameter in enumerate(parameters):
                parameter.grad = gradients(shapes[k])[k % 3]
            optimizer = make([{"params": parameters, "rule": "multinorm", "view": "matrix"}])
            optimizer.replicas = group
            traces: list[Observation] = []
            optimizer.observers.append(lambda parameter, trace, traces=traces: traces.append(trace))
            optimizer.step()
            runs.append((parameters, traces))
        for one, two in zip(*(run[0] for run in runs), strict=True):
            assert torch.equal(one, two)
        for one, two in zip(*(run[1] for run in runs), strict=True):
            assert torch.equal(one.residuals, two.residuals)
            assert torch.equal(one.statistics, two.statistics)


def refuses_partial() -> None:
    from torch.distributed.tensor import Partial

    partial_tensor = DTensor.from_local(torch.ones(4, 4), flat_mesh(), (Partial(),), run_check=False)
    try:
        locate(partial_tensor, partial_tensor, "matrix")
    except ValueError as error:
        assert "Partial" in str(error)
    else:
        raise AssertionError("a Partial parameter was taken")


def combined_with_torchs_alone() -> None:
    """Muon's products are of bfloat16, so that shards agree to its rounding; other libraries' are refused."""
    muon = partial(torch.optim.Muon, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for shape, placements in itertools.product([(85, 33), (8, 12)], [ONE["rows"], ONE["columns"]]):
        W, grads = torch.randn(shape), gradients(shape)
        whole, shards = nn.Parameter(W.clone()), nn.Parameter(sharded(W, flat_mesh(), placements))
        for parameter, own in ((whole, grads), (shards, [sharded(G, flat_mesh(), placements) for G in grads])):
            optimizer = Combined([("layers.0.weight", parameter)], muon, torch.optim.AdamW)
            for G in own:
                parameter.grad = G
                optimizer.step()
        change = (whole - W).norm()
        assert (shards.data.full_tensor() - whole).norm() < 0.05 * change
        try:
            Combined([("layers.0.weight", shards)], lambda groups: SinkGD(groups, lr=0.1), torch.optim.AdamW)
        except ValueError as error:
            assert "SinkGD of lightning_multinorm is not known to work on sharded matrices" in str(error)
        else:
            raise AssertionError("an optimizer that is not torch's was taken")


def _checks() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    variants = ("sinkgd-eager", "auto", "swan-centred", "sinkhorn-whitening")  # which differ within a rank alone
    for name, maker in itertools.product(ONE, MAKERS):
        found[f"{name}-{maker}"] = partial(on_one_dimension, name, maker)
        # Three is the number that cuts unevenly; four are in the grids below.
        sizes = (2,) if maker in variants else (2, 3, 4) if maker == "sinkgd" else (3,)
        found[f"{name}-{maker}"].sizes = sizes  # type: ignore[attr-defined]
    for name, maker in itertools.product(TWO, [maker for maker in MAKERS if maker not in variants]):
        found[f"{name}-{maker}"] = partial(on_two_dimensions, name, maker)
        found[f"{name}-{maker}"].sizes = (4,)  # type: ignore[attr-defined]
    for kind, maker in itertools.product(("wild", "zeros"), ("sinkgd", "sinkgd-eager")):
        for name in ONE:
            found[f"{name}-{kind}-{maker}"] = partial(on_one_dimension, name, maker, kind)
            found[f"{name}-{kind}-{maker}"].sizes = (3,)  # type: ignore[attr-defined]
    for view, dim in (("convolution", 0), ("convolution", 1), ("transposed", 0), ("transposed", 1), ("qkv", 0)):
        found[f"{view}-{dim}"] = partial(views, view, dim)
        found[f"{view}-{dim}"].sizes = (3,)  # type: ignore[attr-defined]
    for dim in range(3):
        found[f"batch-{dim}"] = partial(views, "batch", dim)
        found[f"batch-{dim}"].sizes = (2,)  # type: ignore[attr-defined]
    found["combined"] = combined_with_torchs_alone
    found["combined"].sizes = (3,)  # type: ignore[attr-defined]
    other_dtypes.sizes = (3,)  # type: ignore[attr-defined]
    for check in (
        other_dtypes, scale_changes_no_bit, gathered_is_whole, strided_is_gathered, replicas_stay_equal_in_bfloat16,
        division_among_replicas, refuses_partial,
    ):  # fmt: skip
        found[check.__name__] = check
    return found


CHECKS = _checks()
