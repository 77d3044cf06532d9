"""The examples run, shortened, as they stand; each does what its line in examples/README.md says."""

import csv
import importlib.util
import json
import os
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
LONGEST = 100  # lines


def load(name: str) -> Any:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_pytorch_learns(capsys: pytest.CaptureFixture[str]) -> None:
    losses = load("plain_pytorch").main(steps=100)
    assert losses[0] > 5.4 and sum(losses[-20:]) / 20 < 3.2  # log 256 = 5.5
    rules = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines() if "parameters" in line)
    assert rules == {"matrix": "multinorm", **dict.fromkeys(("embedding", "head", "norm", "bias"), "adam")}


def test_hugging_faces_trainer_learns_on_its_own_schedule(tmp_path: Path) -> None:
    trainer = load("huggingface_trainer").main(40, str(tmp_path))
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[0]["loss"] > 3.5 > 2.8 > log[-1]["loss"]
    rates = [entry["learning_rate"] for entry in log]
    assert rates[0] == pytest.approx(0.02, rel=0.3) and rates[-1] < 0.001 and rates[1:] == sorted(rates[1:])[::-1]
    rules = {group["name"]: group["rule"] for group in trainer.optimizer.param_groups}
    assert rules["matrix"] == "multinorm" and rules["embedding"] == "adam"


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, str]]]:
    """Runs a script of the vision project, and returns the rows of its log."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "vision"))

    def run(script: str, *args: str) -> list[dict[str, str]]:
        folder = tmp_path / f"{script}{len(args)}"
        logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(folder)]
        options = ["--trainer.max_epochs", "3", "--trainer.accelerator", "cpu"]
        monkeypatch.setattr("sys.argv", [script, "fit", *args, *options, *logger])
        runpy.run_path(str(EXAMPLES / "vision" / script), run_name="__main__")
        [metrics] = folder.rglob("metrics.csv")
        with metrics.open() as file:
            return list(csv.DictReader(file))

    return run


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name)]


def test_a_project_takes_optimizer_and_callback_by_two_lines(digits: Any) -> None:
    rows = digits("digits_sinkgd.py")
    assert column(rows, "val/accuracy")[-1] > 0.6
    watched = {name for name in rows[0] if name.startswith("norm_convergence/")}
    assert {"norm_convergence/patches.0.weight/row", "norm_convergence/blocks.1.linear2.weight/column"} <= watched
    assert any("self_attn.in_proj_weight" in name for name in watched)
    assert not any("head" in name or "positions" in name for name in watched)
    assert all(column(rows, name) for name in watched)
    original, changed = ((EXAMPLES / "vision" / name).read_text() for name in ("digits.py", "digits_sinkgd.py"))
    assert "multinorm" not in original.partition('"""\n')[2].replace("lightning-multinorm", "")
    assert len(re.findall(r"  # line (one|two):", changed)) == 2


def test_a_project_is_watched_by_configuration_alone(digits: Any) -> None:
    alone = digits("digits.py")
    watched = digits("digits.py", "--config", str(EXAMPLES / "vision" / "shadow.yaml"))
    assert column(watched, "norm_convergence/patches.2.weight/row")
    assert column(watched, "train/loss") == column(alone, "train/loss")  # AdamW goes on as if nobody looked
    assert column(watched, "val/accuracy") == column(alone, "val/accuracy")


def test_torchrun_trains_on_two_processes(tmp_path: Path) -> None:
    texts = (" ".join(f"word{name * k % 7} and {k}" for k in range(20)) for name in range(60))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    options = ["--config", "quickstart.yaml", "--config", "strategy/fsdp2.yaml", "--trainer.accelerator", "cpu"]
    options += [
        "--trainer.max_steps",
        "2",
        "--trainer.val_check_interval",
        "2",
        "--run.name",
        "two",
        "--run.report",
        "false",
    ]
    options += ["--data.source", "texts.jsonl", "--data.vocab_size", "300", "--data.validation_fraction", "0.3"]
    options += ["--data.sequence_length", "16", "--data.batch_size", "2", "--norm_convergence.every_n_steps", "1"]
    options += [part for key, value in model.items() for part in (f"--model.config.{key}", str(value))]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "DEVICES": "2", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": search_path()}
    environment["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES.parent), *sys.path])
    command = ["bash", str(EXAMPLES / "torchrun.sh"), *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "there is no whole checkpoint" in done.stdout + done.stderr  # --ckpt_path last, the first time
    shards = tmp_path / "runs" / "two" / "version_0" / "checkpoints" / "last.ckpt"
    assert {path.name for path in shards.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    assert torch.load(shards / "meta.pt", weights_only=True)["callbacks"]["Throughput"]["tokens"] == 2 * 2 * 2 * 16


def search_path() -> str:
    """With this Python's own programs first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


@pytest.mark.parametrize(("status", "ends", "queued"), [(0, 0, []), (143, 0, ["requeue 42"]), (1, 1, [])])
def test_slurm_queues_a_job_again_that_was_asked_to_end(
    status: int, ends: int, queued: list[str], tmp_path: Path
) -> None:
    """With stand-ins for SLURM's two programs, since there is no cluster here."""
    for name, end in (("srun", status), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/{name}.log\nexit {end}\n')
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8"}
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **slurm}
    command = ["bash", str(EXAMPLES / "slurm.sh"), "--config", "llama1b.yaml"]
    assert subprocess.run(command, env=environment, timeout=60).returncode == ends
    told = (tmp_path / "srun.log").read_text()
    assert "-m lightning_multinorm fit --config llama1b.yaml --trainer.num_nodes 2 --trainer.devices 8" in told
    assert told.endswith("--ckpt_path last\n")
    log = tmp_path / "scontrol.log"
    assert (log.read_text().splitlines() if log.exists() else []) == queued
    assert "#SBATCH --signal=TERM@" in (EXAMPLES / "slurm.sh").read_text()


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.*")), ids=lambda path: path.name)
def test_examples_are_short_and_listed(path: Path) -> None:
    if path.suffix in (".py", ".sh", ".yaml"):
        assert len(path.read_text().splitlines()) <= LONGEST
        listed = (EXAMPLES / "README.md").read_text() + (EXAMPLES / "vision" / "digits_sinkgd.py").read_text()
        assert path.name in listed
    if path.suffix == ".sh":
        assert subprocess.run(["bash", "-n", str(path)], timeout=60).returncode == 0
        assert os.access(path, os.X_OK)
