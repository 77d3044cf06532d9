"""Checks on rules without state: an update of shards is the shards of the update, for placements and flat slices."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from lightning_multinorm import SinkGD
from lightning_multinorm.layouts import FlatSlice
from lightning_multinorm.optim.stateless import MATRIX_RULES
from tests.distributed.shards import ONE, SHAPES, TWO, flat_mesh, gradients, grid_mesh, sharded


def _train(rule: str, parameters: list[nn.Parameter], grads: list[list[Any]], **group: Any) -> None:
    groups = [{"params": parameters, "rule": rule, "view": "matrix", "lr_scale": 1.0, **group}]
    optimizer = SinkGD(groups, lr=0.5, weight_decay=0.1)
    for step in range(3):
        for parameter, own in zip(parameters, grads, strict=True):
            parameter.grad = own[step]
        optimizer.step()
    assert not optimizer.state


def placed(rule: str, mesh: Callable[[], Any], placements: tuple[Any, ...], kind: str) -> None:
    grads = [gradients(shape, kind=kind) for shape in SHAPES]
    weights = [torch.randn(shape) for shape in SHAPES]
    whole = [nn.Parameter(W.clone()) for W in weights]
    _train(rule, whole, grads)
    shards = [nn.Parameter(sharded(W, mesh(), placements)) for W in weights]
    _train(rule, shards, [[sharded(G, mesh(), placements) for G in own] for own in grads])
    for parameter, shard in zip(whole, shards, strict=True):
        assert_close(shard.data.full_tensor(), parameter.data, rtol=1e-4, atol=1e-5)


def sliced(rule: str) -> None:
    """FSDP1's slices, cut anywhere; some ranks may hold nothing."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for shape in SHAPES:
        W, grads = torch.randn(shape), gradients(shape)
        whole = nn.Parameter(W.clone())
        _train(rule, [whole], [grads])
        size = -(-W.numel() // world)
        cut = slice(rank * size, min((rank + 1) * size, W.numel()))
        own = nn.Parameter(W.flatten()[cut].clone())
        start = cut.start if own.numel() else 0
        slices = {own: FlatSlice(W.shape, start, dist.group.WORLD)}
        _train(rule, [own], [[G.flatten()[cut] for G in grads]], slices=slices)
        assert_close(own.data, whole.data.flatten()[cut], rtol=1e-4, atol=1e-5)


def _checks() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    for rule in (*MATRIX_RULES, "sign"):
        for (name, placements), kind in itertools.product(ONE.items(), ("plain", "zeros")):
            found[f"{rule}-{name}-{kind}"] = partial(placed, rule, flat_mesh, placements, kind)
            found[f"{rule}-{name}-{kind}"].sizes = (2, 3) if kind == "plain" else (3,)  # type: ignore[attr-defined]
        for name in ("hsdp", "grid", "columns-twice"):
            check = partial(placed, rule, grid_mesh, TWO[name], "plain")
            check.sizes = (4,)  # type: ignore[attr-defined]
            found[f"{rule}-{name}"] = check
        if rule in MATRIX_RULES:
            found[f"{rule}-sliced"] = partial(sliced, rule)
            found[f"{rule}-sliced"].sizes = (2, 4)  # type: ignore[attr-defined]
    return found


CHECKS = _checks()
