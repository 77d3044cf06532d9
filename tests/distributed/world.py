"""Run the checks of a module in 2, 3 or 4 processes that talk through gloo, all in one go: starting is what costs."""

import importlib
import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen, TimeoutExpired

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]


def run(module: str, size: int, folder: Path, limit: float = 280) -> dict[str, str]:
    """Every check of ``tests.distributed.<module>`` by ``size`` processes; what went wrong on any rank, or ""."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "tests.distributed.world", module, str(size), str(folder)]
    logs = [(folder / f"{rank}.log").open("w") for rank in range(size)]
    processes = [
        Popen([*command, str(rank)], stdin=DEVNULL, stdout=log, stderr=STDOUT, env=environment, cwd=ROOT)
        for rank, log in enumerate(logs)
    ]
    deadline = time.monotonic() + limit
    for process in processes:
        try:
            process.wait(max(1, deadline - time.monotonic()))
        except TimeoutExpired:  # a rank that hangs must not outlive the tests
            process.kill()
            process.wait()
    for log in logs:
        log.close()
    failures: dict[str, str] = {}
    for rank in range(size):
        result = folder / f"{rank}.json"
        text = (folder / f"{rank}.log").read_text()
        found = json.loads(result.read_text()) if result.exists() else {"*": f"rank {rank} died:\n{text[-4000:]}"}
        for name, failure in found.items():
            failures[name] = failures.get(name, "") + (f"rank {rank}: {failure}\n" if failure else "")
    return failures


def names(module: str, size: int) -> list[str]:
    """The checks of a module that a world of this size can run."""
    found = importlib.import_module(f"tests.distributed.{module}").CHECKS
    return [name for name, check in found.items() if size in getattr(check, "sizes", (2, 3, 4))]


def _main(module: str, size: int, folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    found = importlib.import_module(f"tests.distributed.{module}").CHECKS
    results: dict[str, str] = {}
    for name in names(module, size):
        torch.manual_seed(0)
        try:
            found[name]()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()[-3000:]
        (folder / f"{rank}.json").write_text(json.dumps(results))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
