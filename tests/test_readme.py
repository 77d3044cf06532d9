"""The README keeps its word: its commands are run as printed, and CI runs the ones it prints."""

import csv
import gzip
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_multinorm.cli import main
from lightning_multinorm.strategies import end_communication
from tests import commands

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.strip().splitlines()]
PREFIX = "python -m lightning_multinorm "
SIZES = {
    **{"vocab_size": 300, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 1},
    **{"num_attention_heads": 4, "num_key_value_heads": 4},
}
SMALL = {
    **{f"model.config.{name}": size for name, size in SIZES.items()},
    **{"data.tokenizer": "bpe", "data.vocab_size": 300, "data.validation_fraction": 0.3, "data.sequence_length": 16},
}
SHORT = {
    **{"data.batch_size": 2, "trainer.accelerator": "cpu", "trainer.max_steps": 2, "trainer.log_every_n_steps": 1},
    **{"trainer.accumulate_grad_batches": 2, "run.report": "false"},
}


def subcommand(command: str) -> str:
    return command.partition(PREFIX)[2]


def run(command: str, folder: Path) -> str:
    """A command of the README, in the folder of the first one."""
    done = commands.run(shlex.split(subcommand(command)), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_first(command: str, folder: Path) -> None:
    """The README's first command, after its installation, in an empty folder."""
    _, _, command = command.rpartition("&& ")
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "160"}
    environment["OMP_NUM_THREADS"] = "1"  # other tests run beside it, and threads that share cores wait for each other
    args = shlex.split(command.replace("python", sys.executable, 1))
    done = subprocess.run(args, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


def metrics(version: Path) -> list[dict[str, str]]:
    """What a run has logged."""
    with (version / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name)]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the README's first command has been run."""
    folder = tmp_path_factory.mktemp("quickstart")
    run_first(COMMANDS[0], folder)
    return folder


@pytest.mark.slow
def test_first_command_ends_in_something_worth_looking_at(quickstart: Path) -> None:
    version = quickstart / "runs" / "quickstart" / "version_0"
    rows = metrics(version)
    assert column(rows, "val/bits_per_byte")[-1] <= 1.8
    assert column(rows, "val/loss") == sorted(column(rows, "val/loss"), reverse=True)
    assert column(rows, "train/loss")[0] > 6 > 4.5 > sum(column(rows, "train/loss")[-5:]) / 5
    residuals = sum(name.startswith("norm_convergence/") for name in rows[0])
    assert residuals == 2 * 7 * 4 * (1 + 5)  # after the last iteration, and after each
    assert all(math.isfinite(value) for name in rows[0] if "norm_convergence" in name for value in column(rows, name))
    assert (version / "checkpoints" / "last.ckpt").is_file()
    assert "Residual of the row norm by iteration" in (version / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if "CKPT" in command], ids=subcommand)
def test_commands_on_a_checkpoint(command: str, quickstart: Path) -> None:
    checkpoint = quickstart / "runs" / "quickstart" / "version_0" / "checkpoints" / "last.ckpt"
    (quickstart / "README.md").write_text(README)
    output = run(command.replace("CKPT", str(checkpoint)), quickstart)
    assert "bits_per_byte" in output or "bits/byte" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [("generate", "def parse("), ("export", "quickstart-hf"), ("report", "figures, also in"), ("plan", "SinkGD")],
)
def test_commands_after_a_run_as_printed(name: str, said: str, quickstart: Path) -> None:
    (command,) = (command for command in COMMANDS if subcommand(command).startswith(f"{name} "))
    assert said in run(command, quickstart)


def test_every_training_as_printed_but_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the README's order, as one reads what another has written; C4 is out of reach."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning_multinorm"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # put back at the end as they were
        monkeypatch.delenv(name)
    (tmp_path / "texts").mkdir()
    lines = [json.dumps({"text": " ".join(f"word{name * k % 7} and {k}" for k in range(20))}) for name in range(60)]
    (tmp_path / "texts" / "all.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    commands = [c for c in COMMANDS[1:] if subcommand(c).startswith(("fit ", "prepare "))]
    assert len(commands) == 5
    for number, command in enumerate(commands):
        options = {**SMALL, **({**SHORT, "run.root": number} if subcommand(command).startswith("fit ") else {})}
        if "--data.source" not in command:
            options["data.source"] = "texts"
        main([*shlex.split(subcommand(command)), *(f"--{name}={value}" for name, value in options.items())])
        end_communication()
    versions = list(tmp_path.glob("?/llama*/version_0"))
    assert len(versions) == len(commands) - 1
    for version in versions:
        first, second = column(metrics(version), "train/loss")
        assert min(first, second) > 5 and max(first, second) < 6.5
        assert (version / "checkpoints" / "last.ckpt").exists()


def test_ci_installs_and_tests_as_the_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    for part in COMMANDS[1].split(" && "):
        assert part in script.replace("--quiet --no-compile ", "")


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 150
    for link in re.findall(r"\]\((?!https?://)([^)#]+)", README):
        assert (ROOT / link).exists(), link
