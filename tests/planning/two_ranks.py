"""Run by test_strategies.py as a program: two processes of FSDP2 make steps, the first says what it kept and sent."""

import json
import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from lightning_multinorm.llama.loss import token_losses
from lightning_multinorm.llama.parallel import build_llama
from lightning_multinorm.llama.sizes import llama_config
from lightning_multinorm.strategies import end_communication

# Odd sizes, which do not divide.
SMALL: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 64,
    "intermediate_size": 173,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def _bytes(tensor: Any) -> int:
    local: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.nbytes


def work(rank: int, store: str) -> None:
    """Two steps; the second is counted."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = build_llama(llama_config(None, SMALL), torch.device("cpu"), data_mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(301, (2, 16))
    for _ in range(2):
        optimizer.zero_grad()
        with CommDebugMode() as sent:
            token_losses(model(input_ids=tokens, use_cache=False).logits, tokens).mean().backward()
        optimizer.step()
    counts = {str(operation): count for operation, count in sent.get_comm_counts().items()}
    if rank == 0:
        parameters = list(model.parameters())
        result = {
            "weights": sum(map(_bytes, parameters)),
            "gradients": sum(_bytes(parameter.grad) for parameter in parameters),
            "states": sum(_bytes(value) for state in optimizer.state.values() for value in state.values()),
            "all_gathers": sum(count for name, count in counts.items() if "allgather" in name or "all_gather" in name),
            "reduce_scatters": sum(count for name, count in counts.items() if "reduce_scatter" in name),
        }
        print(json.dumps(result), flush=True)
    dist.barrier()
    end_communication()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, args=(os.path.join(folder, "store"),), nprocs=2)
