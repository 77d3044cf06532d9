"""Checks on folders of shards: written and read by all ranks, or by none."""

import resource
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.testing import assert_close

from lightning_multinorm.checkpoints import folders
from lightning_multinorm.checkpoints.background import Background
from lightning_multinorm.checkpoints.folders import load_folder, save_folder, shards
from lightning_multinorm.checkpoints.io import CheckpointFiles, explained
from lightning_multinorm.checkpoints.last import whole
from lightning_multinorm.checkpoints.ranks import together
from lightning_multinorm.errors import UsageError
from tests.distributed.shards import flat_mesh, sharded


def shared_folder() -> Path:
    """A new one, the same on all ranks."""
    return together(lambda: Path(tempfile.mkdtemp()) if dist.get_rank() == 0 else Path())[0]


def model(value: float) -> nn.Module:
    layer = nn.Linear(64, 101, bias=False)  # uneven shards
    layer.weight = nn.Parameter(sharded(torch.full((101, 64), float(value)), flat_mesh(), (Shard(0),)))
    return layer


def value(path: Path) -> float:
    """That of a folder's weights."""
    found = model(-1)
    load_folder(whole(path), found, [], [], strict=True)
    weight: Any = found.weight
    whole_weight: Tensor = weight.full_tensor()
    assert_close(whole_weight, torch.full_like(whole_weight, whole_weight[0, 0].item()))
    return whole_weight[0, 0].item()


def raised(action: Callable[[], Any]) -> str:
    """What it fails with, on every rank."""
    try:
        action()
    except (UsageError, OSError) as error:
        return str(error)
    raise AssertionError("it did not fail")


def save(path: Path, value: float) -> None:
    with explained(path):
        save_folder(path, shards(model(value), [])[0], {"global_step": value})


def one_rank_with_a_full_disk_fails_all() -> None:
    path, last = shared_folder() / "last.ckpt", dist.get_world_size() - 1
    save(path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for rank in (0, last):
        if dist.get_rank() == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
        message = raised(lambda: save(path, 2))
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert f"{path} could not be written (File too large); the last good one is {path}" in message
        assert value(path) == 1 and [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    save(path, 3)
    assert value(path) == 3
    dist.barrier()


def damage_of_one_ranks_file_is_known_to_all() -> None:
    path = shared_folder() / "last.ckpt"
    save(path, 1)
    for rank in range(dist.get_world_size()):
        file = path / f"__{rank}_0.distcp"
        if dist.get_rank() == 0:
            content = file.read_bytes()
            file.write_bytes(content[:-500] + b"x" + content[-499:])
        dist.barrier()
        assert f"{file.name} is damaged" in raised(lambda: value(path))
        dist.barrier()
        if dist.get_rank() == 0:
            file.write_bytes(content)
        dist.barrier()
    assert value(path) == 1


def an_error_of_one_rank_is_every_ranks() -> None:
    for rank in range(dist.get_world_size()):

        def fail(rank: int = rank) -> None:
            if dist.get_rank() == rank:
                raise UsageError(f"rank {rank} says so")

        assert raised(lambda: together(fail)) == f"rank {rank} says so"
    assert together(dist.get_rank) == list(range(dist.get_world_size()))


def shards_are_written_beside_the_training() -> None:
    """What is trained meanwhile, collective calls included, does not change what was taken."""
    path, background, group = shared_folder() / "last.ckpt", Background(), dist.new_group(backend="gloo")
    trained, held, write = model(5), threading.Event(), folders._write

    def wait(*args: Any) -> None:
        assert held.wait(60)
        write(*args)

    folders._write = wait
    background.write(shards(trained, [])[0], lambda taken: save_folder(path, taken, {"global_step": 5}, group))
    with torch.no_grad():
        for _ in range(3):
            total = torch.ones(1)
            dist.all_reduce(total)
            trained.weight += total
    assert not path.exists()
    held.set()
    background.wait()
    folders._write = write
    dist.barrier()
    assert value(path) == 5


def a_single_file_of_one_rank_is_read_by_all() -> None:
    path = shared_folder() / "a.ckpt"
    if dist.get_rank() == 0:
        CheckpointFiles().save_checkpoint({"global_step": 1}, path)
    dist.barrier()
    assert CheckpointFiles().load_checkpoint(path)["global_step"] == 1
    dist.barrier()
    if dist.get_rank() == 0:
        path.write_bytes(path.read_bytes()[:-9])
    dist.barrier()
    assert "truncated" in raised(lambda: CheckpointFiles().load_checkpoint(path))


CHECKS: dict[str, Callable[[], None]] = {}
for _check in (
    one_rank_with_a_full_disk_fails_all,
    damage_of_one_ranks_file_is_known_to_all,
    an_error_of_one_rank_is_every_ranks,
    shards_are_written_beside_the_training,
    a_single_file_of_one_rank_is_read_by_all,
):
    CHECKS[_check.__name__] = _check
    _check.sizes = (2,)  # type: ignore[attr-defined]
