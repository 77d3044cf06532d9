"""What SinkGD sends under FSDP2, counted from the collectives really made, beside what FSDP2 itself sends.

``python -m benchmarks.communication [--model 60m 1b] [--ranks 2 4] [--out benchmarks/results/communication.json]``

Processes on this machine train for two steps through gloo; the collectives of the second are counted as PyTorch
dispatches them. Bytes are what each rank sends by the ring algorithms: S (N - 1) / N for an all-gather or a
reduce-scatter of S bytes over N ranks, twice that for an all-reduce. Then, on paper, the 7B on more GPUs than are here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from benchmarks.machine import describe
from lightning_multinorm import SWAN, MultiNormGD, SinkGD, parameter_groups
from lightning_multinorm.llama.parallel import build_llama
from lightning_multinorm.llama.sizes import llama_config
from lightning_multinorm.norms import ColumnNorm, RowNorm
from lightning_multinorm.planning.communication import Traffic
from lightning_multinorm.planning.estimate import plan
from lightning_multinorm.planning.settings import Layout, MicroBatch, Precision
from lightning_multinorm.strategies import end_communication

RESULTS = Path(__file__).parent / "results" / "communication.json"
GPUS = (8, 64, 1024)
SLOW = ("SinkGD", "AdamW")  # the others would whiten and gather the 1b's matrices for many minutes on a few cores
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SinkGD": SinkGD,
    "SWAN": SWAN,
    "MultiNormGD": lambda groups: MultiNormGD(groups, norms=[RowNorm(), ColumnNorm()]),
    "AdamW": torch.optim.AdamW,
}


class Counter(TorchDispatchMode):
    """Notes every collective: its kind, and the bytes of all ranks' parts together."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name() if func.namespace == "c10d" else ""
        if func.name().startswith("_c10d_functional::all_gather_into_tensor"):
            self.seen.append(("all-gather", args[0].nbytes * args[1]))
        elif "allreduce" in name:
            self.seen.append(("all-reduce", sum(x.nbytes for x in args[0])))
        elif "allgather_base" in name:
            self.seen.append(("all-gather", args[0].nbytes))
        elif "allgather" in name:
            self.seen.append(("all-gather", sum(x.nbytes for part in args[0] for x in part)))
        elif "reduce_scatter_base" in name:
            self.seen.append(("reduce-scatter", args[1].nbytes))
        elif name and "barrier" not in name and "wait" not in name:
            raise RuntimeError(f"{name} is not counted yet")
        return func(*args, **(kwargs or {}))

    def total(self, ranks: int) -> dict[str, float]:
        """Collectives, and the bytes that each rank sends."""
        sent = sum(size * (2 if kind == "all-reduce" else 1) for kind, size in self.seen) * (ranks - 1) / ranks
        return {"collectives": len(self.seen), "bytes": sent}


def gather_matrices(groups: list[dict[str, Any]]) -> None:
    """What Muon needs: the gradient of each matrix, whole."""
    for group in groups:
        if group["rule"] == "multinorm":
            for _, parameter in group["params"]:
                parameter.grad.full_tensor()


def work(model: str, folder: Path, rank: int, ranks: int) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.bfloat16)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), ranks), rank=rank, world_size=ranks)
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (ranks,))
    llama = build_llama(llama_config(model), torch.device("cpu"), data_mesh=mesh, precision=precision)
    groups = parameter_groups(llama)
    tokens = torch.randint(1000, (1, 8))
    backward(llama, tokens)
    found: dict[str, dict[str, float]] = {}
    with Counter() as counter:
        backward(llama, tokens)
    found["FSDP2"] = counter.total(ranks)
    with Counter() as counter:
        gather_matrices(groups)
    found["gathering as Muon does"] = counter.total(ranks)
    for name in SLOW if model == "1b" else OPTIMIZERS:
        optimizer = OPTIMIZERS[name]([{**group, "params": list(group["params"])} for group in groups])
        with Counter() as counter:
            optimizer.step()
        found[name] = counter.total(ranks)
        del optimizer
    if rank == 0:
        (folder / "counted.json").write_text(json.dumps(found))
    end_communication()


def backward(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    """Gradients of a small batch; the traffic does not depend on it."""
    llama.zero_grad()
    llama(input_ids=tokens, use_cache=False).logits.float().square().mean().backward()


def count(model: str, ranks: int) -> dict[str, dict[str, float]]:
    """By what sends it: collectives, and bytes per rank."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.communication", "--work", model, folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes = [subprocess.Popen([*command, str(rank), str(ranks)], env=environment) for rank in range(ranks)]
        statuses = [process.wait() for process in processes]
        if any(statuses):
            raise SystemExit(f"a process of {model} on {ranks} ranks failed; see above")
        counted: dict[str, dict[str, float]] = json.loads((Path(folder) / "counted.json").read_text())
        return counted


def on_paper(model: str, gpus: int) -> dict[str, dict[str, float]]:
    """The same from the plan."""
    config = llama_config(model)
    llama = build_llama(config, torch.device("meta"))
    groups = parameter_groups(llama)
    layout = Layout("FSDP2", shard=gpus)
    run = plan(llama, config, groups, [SinkGD, SWAN], MicroBatch(1, 256), Precision.named("bf16-true"), layout)

    def total(traffic: list[Traffic]) -> dict[str, float]:
        return {"collectives": sum(t.collectives for t in traffic), "bytes": sum(t.bytes for t in traffic)}

    planned = {optimizer.memory.name: total([optimizer.traffic]) for optimizer in run.optimizers}
    return {"FSDP2": total(list(run.traffic)), "gathering as Muon does": total([run.muon]), **planned}


def table(title: str, found: dict[str, dict[str, float]]) -> Table:
    """One row for each sender, in the share of FSDP2's bytes."""
    view = Table("sender", "collectives", "MiB a rank sends", "of FSDP2's bytes", title=title)
    for name, sent in found.items():
        share = sent["bytes"] / found["FSDP2"]["bytes"]
        view.add_row(name, f"{sent['collectives']:.0f}", f"{sent['bytes'] / 2**20:,.2f}", f"{share:.4%}")
    return view


def main() -> None:
    """Parse the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["60m", "1b"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        model, folder, rank, ranks = options.work
        work(model, Path(folder), int(rank), int(ranks))
        return
    console = Console()
    result: dict[str, Any] = {"machine": describe(), "dtype": "bfloat16", "counted": [], "on paper": []}
    for model in options.model:
        for ranks in options.ranks if model != "1b" else options.ranks[:1]:  # four copies of 1b want more memory
            found = count(model, ranks)
            result["counted"].append({"model": model, "ranks": ranks, "sent": found})
            console.print(table(f"{model} on {ranks} ranks, counted", found))
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    for gpus in GPUS:
        found = on_paper("7b", gpus)
        result["on paper"].append({"model": "7b", "ranks": gpus, "sent": found})
        console.print(table(f"7b on {gpus} GPUs, on paper", found))
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
