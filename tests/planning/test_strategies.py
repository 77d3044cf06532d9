"""Strategies: what each device keeps and sends, by hand, and as two real processes keep and send it."""

import json
import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from lightning_multinorm import SWAN, SinkGD
from lightning_multinorm.errors import UsageError
from lightning_multinorm.llama.sizes import llama_config
from lightning_multinorm.planning import Layout, MicroBatch
from lightning_multinorm.planning.communication import gather_cost

from . import two_ranks
from .plans import planned


def test_ddp_keeps_everything_on_each_device_and_averages_once() -> None:
    batch = MicroBatch(4, 256, accumulate=8)
    alone, run = planned(batch=batch), planned(batch=batch, layout=Layout("DDP", replicate=4, buckets=True))
    weights = 2 * run.parameters
    assert run.optimizers[0].weights_and_states == alone.optimizers[0].weights_and_states
    assert run.optimizers[0].peak.total == alone.optimizers[0].peak.total + weights  # the buckets
    [traffic] = run.traffic
    assert traffic.bytes == 2 * weights * 3 // 4 and run.optimizers[0].traffic.collectives == 0


def test_fsdp_divides_what_is_kept_and_gathers_twice() -> None:
    run = planned(batch=MicroBatch(4, 256, accumulate=2), layout=Layout("FSDP2", shard=4))
    for sharded, alone in zip(run.optimizers, planned().optimizers, strict=True):
        assert sharded.weights_and_states == pytest.approx(alone.weights_and_states / 4, rel=1e-3)
    forward, backward, gradients = run.traffic
    layers = sum(p.numel() for p in LlamaForCausalLM(llama_config("60m")).model.layers.parameters())
    assert (forward.collectives, backward.collectives, gradients.collectives) == (2 * 9, 2 * 8, 2 * 9)
    assert forward.bytes == round(2 * gather_cost(2 * run.parameters, 4))
    assert gradients.bytes == round(2 * gather_cost(4 * run.parameters, 4))  # added up in float32
    assert backward.bytes == round(2 * gather_cost(2 * layers, 4))


def test_sinkgd_sends_vectors_where_muon_sends_matrices() -> None:
    """n floats for each (m, n) and iteration, twice as many in the first, in one collective for all matrices."""
    run = planned("60m", partial(SinkGD, iterations=3), SWAN, layout=Layout("FSDP2", shard=8))
    own, swan = (optimizer.traffic for optimizer in run.optimizers)
    columns = 8 * (6 * 512 + 1376)
    assert own.collectives == 3 and own.bytes == round(2 * gather_cost(4 * columns * (3 + 1), 8))
    assert run.muon.bytes == round(gather_cost(2 * run.matrices, 8)) and run.muon.collectives == 7 * 8
    long = sum((1376 - 512) * 512 for _ in range(2 * 8))  # what Gram matrices of gate and up save
    sent = 2 * gather_cost(4 * (run.matrices - long + 8 * 6), 8)  # gathered as float32, by a sum; and 48 norms
    assert swan.bytes == round(sent) and swan.collectives == 7 * 8 + 6 * 8


def test_tensor_parallel_sums_rows_of_what_is_split_by_columns() -> None:
    run = planned("60m", partial(SinkGD, iterations=3), layout=Layout("TP", tensor=2))
    own = run.optimizers[0].traffic
    vectors = 8 * (5 * 512 + 2 * 512)  # columns of q, k, v, gate and up; rows of o and down
    assert own.collectives == 3 + 4 and own.bytes == 4 * vectors * (3 + 1)
    assert run.optimizers[0].peak.weights < 0.51 * 2 * run.parameters
    with pytest.raises(UsageError, match="3 devices cannot deal out 8 heads"):
        planned("60m", layout=Layout("TP", tensor=3))


@pytest.fixture(scope="module")
def ranks() -> dict[str, Any]:
    """What the first of two real processes kept and sent."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, two_ranks.__file__], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_two_processes_of_fsdp_keep_and_send_as_planned(ranks: dict[str, Any]) -> None:
    run = planned(None, torch.optim.AdamW, config=two_ranks.SMALL, precision="32-true", layout=Layout("FSDP2", shard=2))
    [optimizer] = run.optimizers
    step = next(moment for moment in optimizer.moments if moment.name == "optimizer step")
    assert ranks["weights"] == step.weights and ranks["gradients"] == step.gradients
    assert ranks["states"] == optimizer.memory.states
    assert ranks["all_gathers"] == sum(t.collectives for t in run.traffic if "all-gather" in t.name)
    assert ranks["reduce_scatters"] == sum(t.collectives for t in run.traffic if "reduce-scatter" in t.name)
