"""Run the checks of modules in worlds of 2, 3 or 4 processes that talk through gloo."""

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.forks import fork

ROOT = Path(__file__).parents[2]
World = tuple[str, int]
"""A module of checks, and the number of processes."""
LEAVING = "leaves no thread behind"


def run(worlds: Sequence[World], folder: Path) -> dict[World, dict[str, str]]:
    """Every check of ``tests.distributed.<module>`` in every world; what went wrong on any rank, or ""."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "tests.distributed.world", json.dumps(worlds), str(folder)]
    subprocess.run(command, env=environment, cwd=ROOT, check=True)
    return {world: _failures(world[1], _place(world, folder)) for world in worlds}


def names(module: str, size: int) -> list[str]:
    """The checks of a module that a world of this size can run, and that it ends as it should."""
    found = importlib.import_module(f"tests.distributed.{module}").CHECKS
    return [*(name for name, check in found.items() if size in getattr(check, "sizes", (2, 3, 4))), LEAVING]


def _place(world: World, folder: Path) -> Path:
    module, size = world
    return folder / f"{module}{size}"


def _failures(size: int, folder: Path) -> dict[str, str]:
    failures: dict[str, str] = {}
    for rank in range(size):
        result = folder / f"{rank}.json"
        text = (folder / f"{rank}.log").read_text()
        found = json.loads(result.read_text()) if result.exists() else {"*": f"rank {rank} died:\n{text[-4000:]}"}
        for name, failure in found.items():
            failures[name] = failures.get(name, "") + (f"rank {rank}: {failure}\n" if failure else "")
    return failures


def _check(module: str, size: int, folder: Path, rank: int) -> None:
    """What one rank does."""
    from lightning_multinorm.strategies import (
        end_communication,
    )  # in the forks' parent alone, Lightning is slow to load

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    found = importlib.import_module(f"tests.distributed.{module}").CHECKS
    results: dict[str, str] = {}
    for name in names(module, size)[:-1]:
        torch.manual_seed(0)
        try:
            found[name]()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()[-3000:]
        (folder / f"{rank}.json").write_text(json.dumps(results))
        dist.barrier()
    end_communication()
    results[LEAVING] = ", ".join(thread for thread in _threads() if "gloo" in thread)
    (folder / f"{rank}.json").write_text(json.dumps(results))


def _threads() -> list[str]:
    """The names of this process's threads, where there is a /proc."""
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


def _main(worlds: Sequence[World], folder: Path) -> None:
    for module, _ in worlds:
        importlib.import_module(f"tests.distributed.{module}")
    for module, size in worlds:
        place = _place((module, size), folder)
        place.mkdir()
        fork(size, partial(_check, module, size, place), place)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]), Path(sys.argv[2]))
