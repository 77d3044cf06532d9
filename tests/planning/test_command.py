"""The subcommand: what it reads from a configuration, what it prints, and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_multinorm.errors import UsageError
from lightning_multinorm.planning import Layout, MicroBatch, Precision
from lightning_multinorm.planning.command import count_devices, layout_of
from tests import commands

from .plans import planned


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
        (lambda: count_devices(0), "trainer.devices=0 is no number"),
        (lambda: planned("60m", torch.optim.Muon), "cannot be built: Muon only supports 2D parameters"),
        (lambda: count_devices("many"), "trainer.devices='many' is no number"),
        (lambda: MicroBatch(0, 256), "sequences=0"),
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
    done = commands.run(["plan", *args], folder, COLUMNS="100")
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
