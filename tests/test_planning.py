"""The plan: the papers' figures, what autograd and torch's allocator count, laws of the arithmetic, and the command."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.memory import compare
from lightning_multinorm import SWAN, SinkGD, parameter_groups
from lightning_multinorm.errors import UsageError
from lightning_multinorm.llama.loss import token_losses
from lightning_multinorm.llama.sizes import llama_config
from lightning_multinorm.planning import Layout, MicroBatch, Plan, Precision, plan
from lightning_multinorm.planning.activations import activations
from lightning_multinorm.planning.command import count_devices, layout_of
from lightning_multinorm.planning.communication import gather_cost
from lightning_multinorm.planning.memory import PARTS
from lightning_multinorm.planning.settings import Shape
from lightning_multinorm.planning.states import MakeOptimizer

ADAMW = partial(torch.optim.AdamW, fused=True)
# Weights and states in GiB: arXiv:2502.07752, its Adam and its own optimizer without states on matrices. It prints
# 2.05 for the 350M's 2.056.
PAPERS = {"60m": (0.32, 0.23), "130m": (0.75, 0.43), "350m": (2.05, 0.93), "1b": (7.48, 2.98)}
SMALL = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 173, "num_hidden_layers": 2}
LAYOUTS = [
    Layout(),
    Layout("DDP", replicate=4, buckets=True),
    Layout("FSDP2", shard=4),
    Layout("HSDP", replicate=2, shard=4),
    Layout("TP", tensor=4),
    Layout("TP", shard=2, tensor=2),
]


def planned(
    size: Any = "60m",
    *optimizers: MakeOptimizer,
    config: dict[str, Any] | None = None,
    precision: str = "bf16-true",
    batch: MicroBatch | None = None,
    layout: Layout | None = None,
) -> Plan:
    llama = llama_config(size, config)
    with torch.device("meta"):
        model = LlamaForCausalLM(llama)
    return plan(
        model,
        llama,
        parameter_groups(model),
        optimizers or (SinkGD, ADAMW),
        batch or MicroBatch(4, 256),
        Precision.named(precision),
        layout,
    )


@pytest.mark.parametrize("size", PAPERS)
def test_weights_and_states_are_the_papers(size: str) -> None:
    sinkgd, adamw = planned(size).optimizers
    for optimizer, expected in zip((adamw, sinkgd), PAPERS[size], strict=True):
        assert optimizer.weights_and_states / 2**30 == pytest.approx(expected, abs=0.0066)


def test_nothing_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of the 7B makes no tensor of more than a step counter."""
    made: list[int] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.device.type != "meta":
                made.append(result.untyped_storage().nbytes())
            return result

    with Watch():
        planned("7b", SinkGD, torch.optim.AdamW, torch.optim.SGD)
    assert max(made, default=0) <= 2048  # rotary frequencies


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_activations_are_what_autograd_saves(precision: str, kv_heads: int) -> None:
    numbers, batch = Precision.named(precision), MicroBatch(3, 24)
    config = llama_config(None, {**SMALL, "num_attention_heads": 4, "num_key_value_heads": kv_heads})
    model = LlamaForCausalLM(config).to(numbers.weights)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(300, (batch.sequences, batch.length))
    autocast = torch.autocast("cpu", torch.bfloat16) if numbers.mixed else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        losses = token_losses(model(input_ids=tokens, use_cache=False).logits, tokens.clone())
    plan_of = activations(Shape.of(config), batch, numbers, Layout())
    assert losses.requires_grad
    total_weight = 4  # what the loss keeps of the number of its tokens
    expected = plan_of.layer * 2 + plan_of.ends + plan_of.logits_saved + total_weight
    assert sum(storage.nbytes() for storage in saved.values()) == expected


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("batch", [MicroBatch(2, 64), MicroBatch(1, 8, accumulate=2)])
def test_peak_is_what_a_real_run_holds(batch: MicroBatch, precision: str) -> None:
    row = compare("tiny", "adamw" if precision == "32-true" else "sinkgd", batch, precision)
    assert abs(row["deviation"]) < 0.05, row


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.name}{layout.world}")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_totals_are_sums_of_their_parts(layout: Layout, precision: str) -> None:
    run = planned("60m", precision=precision, layout=layout)
    for optimizer in run.optimizers:
        for moment in optimizer.moments:
            assert moment.total == sum(getattr(moment, part) for part in PARTS)
        assert optimizer.peak.total == max(moment.total for moment in optimizer.moments)
        assert optimizer.weights_and_states == optimizer.peak.weights + optimizer.memory.states


def test_precisions() -> None:
    true16, true32, mixed = (planned(precision=name).optimizers[1] for name in ("bf16-true", "32-true", "bf16-mixed"))
    assert true32.weights_and_states == pytest.approx(2 * true16.weights_and_states, rel=1e-4)
    assert mixed.weights_and_states == true32.weights_and_states
    assert Precision.named("bf16").name == "bf16-mixed" and Precision.named(32).name == "32-true"


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
    assert forward.bytes == gradients.bytes == round(2 * gather_cost(2 * run.parameters, 4))
    assert backward.bytes == round(2 * gather_cost(2 * layers, 4))


def test_sinkgd_sends_vectors_where_muon_sends_matrices() -> None:
    """n floats for each (m, n) and iteration, twice as many in the first, in one collective for all matrices."""
    run = planned("60m", partial(SinkGD, iterations=3), SWAN, layout=Layout("FSDP2", shard=8))
    own, swan = (optimizer.traffic for optimizer in run.optimizers)
    columns = 8 * (6 * 512 + 1376)
    assert own.collectives == 3 and own.bytes == round(2 * gather_cost(4 * columns * (3 + 1), 8))
    assert run.muon.bytes == round(gather_cost(2 * run.matrices, 8)) and run.muon.collectives == 7 * 8
    assert swan.bytes == 4 * run.muon.bytes  # gathered as float32, by a sum


def test_tensor_parallel_sums_rows_of_what_is_split_by_columns() -> None:
    run = planned("60m", partial(SinkGD, iterations=3), layout=Layout("TP", tensor=2))
    own = run.optimizers[0].traffic
    vectors = 8 * (5 * 512 + 2 * 512)  # columns of q, k, v, gate and up; rows of o and down
    assert own.collectives == 3 + 4 and own.bytes == 4 * vectors * (3 + 1)
    assert run.optimizers[0].peak.weights < 0.51 * 2 * run.parameters
    with pytest.raises(UsageError, match="3 devices cannot deal out 8 heads"):
        planned("60m", layout=Layout("TP", tensor=3))


class Wanderer(torch.optim.SGD):
    """An optimizer that needs values."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Look at a value."""
        self.param_groups[0]["params"][0].sum().item()


@pytest.mark.parametrize(
    ("make", "copies"),
    [
        (torch.optim.SGD, 0),
        (partial(torch.optim.SGD, momentum=0.9), 1),
        (partial(torch.optim.AdamW, amsgrad=True), 3),
        (torch.optim.RMSprop, 1),
        (torch.optim.Adagrad, 1),
    ],
)
def test_states_of_any_optimizer_are_counted(make: Callable[..., Any], copies: int) -> None:
    run = planned("60m", partial(make, lr=0.1))
    assert run.optimizers[0].memory.states == pytest.approx(2 * run.parameters * copies, abs=1000)


def test_flops_of_a_token() -> None:
    """By hand for the 60m: N without the embedding, and 12 · layers · width · length."""
    compute = planned("60m").compute
    assert compute.per_token == 6 * (58_073_600 - 32_000 * 512) + 12 * 8 * 512 * 256
    tied = planned("60m", config={"tie_word_embeddings": True}).compute
    assert tied.products == compute.products  # the one table is multiplied, by the output head


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: Precision.named("64-true"), "trainer.precision='64-true' is not planned for; use one of 32-true"),
        (lambda: layout_of("deepspeed", 2, 1), "trainer.strategy=deepspeed is not planned for; use auto"),
        (lambda: layout_of("hsdp", 8, 1), "trainer.num_nodes=1; set it to 2"),
        (lambda: layout_of("single_device", 2, 1), "is for one device, not for 2"),
        (lambda: layout_of({"class_path": "x.FSDPStrategy", "init_args": {"cpu_offload": True}}, 2, 1), "cpu_offload"),
        (lambda: count_devices("many"), "trainer.devices='many' is no number"),
        (lambda: MicroBatch(0, 256), "sequences=0"),
        (lambda: planned("60m", partial(Wanderer, lr=0.1)), "states of Wanderer cannot be counted"),
    ],
)
def test_what_is_unknown_is_refused_in_a_sentence(ask: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        ask()
    assert message in str(error.value)


def test_strategies_are_read_as_lightning_reads_them() -> None:
    two_axes = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}
    sizes = {"init_args": {"data_parallel_size": 2, "tensor_parallel_size": "auto"}}
    assert layout_of("auto", 1, 1) == Layout() and layout_of("auto", 2, 1).replicate == 2
    assert (layout_of("fsdp2", 8, 2).shard, layout_of("tp", 8, 2).shard, layout_of("tp", 8, 2).tensor) == (16, 2, 8)
    assert layout_of("hsdp", 8, 2) == Layout("HSDP", replicate=2, shard=8)
    assert layout_of({**two_axes, **sizes}, 4, 2).world == 8
    assert [count_devices(devices) for devices in (3, "3", "0,1", [4, 5], "auto")] == [3, 3, 2, 2, 1]


def command(folder: Path, *args: str, status: int = 0) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lightning_multinorm", "plan", *args],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert status or not done.stderr
    return done.stdout or done.stderr


def test_the_command_prints_a_table_and_nothing_else(tmp_path: Path) -> None:
    output = command(tmp_path, "--config", "llama1b.yaml")
    row = next(line for line in output.splitlines() if "weights and states" in line)
    assert row.split()[3:5] == ["2.98", "7.48"]
    assert output.startswith("1,339,082,752 parameters") and max(map(len, output.splitlines())) <= 100
    assert not list(tmp_path.iterdir())


def test_the_command_knows_overlays_and_overrides(tmp_path: Path) -> None:
    overlays = ("--config", "optimizer/adamw.yaml", "--config", "strategy/ddp.yaml", "--trainer.accelerator", "gpu")
    overrides = ("--trainer.precision", "bf16-mixed", "--devices", "8", "--data.batch_size", "2")
    output = command(tmp_path, "--config", "llama1b.yaml", *overlays, *overrides)
    assert "bf16-mixed, DDP over 8 devices" in output and "2 × 256 tokens on a device" in output
    row = next(line for line in output.splitlines() if "weights and states" in line)
    assert row.split()[3:5] == ["14.97", "5.97"]  # AdamW, and SinkGD beside it
    assert "64-true" in command(tmp_path, "--config", "llama1b.yaml", "--trainer.precision", "64-true", status=2)
