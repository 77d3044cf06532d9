"""The README keeps its word: its commands are run as printed, and CI runs the ones it prints."""

import csv
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_multinorm.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.strip().splitlines()]
PREFIX = "python -m lightning_multinorm "


def subcommand(command: str) -> str:
    return command.partition(PREFIX)[2]


def run(command: str, folder: Path) -> str:
    """A command of the README, after its installation, in an empty folder."""
    _, _, command = command.rpartition("&& ")
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "160"}
    environment["OMP_NUM_THREADS"] = "1"  # other tests run beside it, and threads that share cores wait for each other
    args = shlex.split(command.replace("python", sys.executable, 1))
    done = subprocess.run(args, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the README's first command has been run."""
    folder = tmp_path_factory.mktemp("quickstart")
    run(COMMANDS[0], folder)
    return folder


@pytest.mark.slow
def test_first_command_ends_in_something_worth_looking_at(quickstart: Path) -> None:
    version = quickstart / "runs" / "quickstart" / "version_0"
    with (version / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))

    def column(name: str) -> list[float]:
        return [float(row[name]) for row in rows if row.get(name)]

    assert column("val/bits_per_byte")[-1] <= 1.8
    assert column("val/loss") == sorted(column("val/loss"), reverse=True)
    assert column("train/loss")[0] > 6 > 4.5 > sum(column("train/loss")[-5:]) / 5
    residuals = sum(name.startswith("norm_convergence/") for name in rows[0])
    assert residuals == 2 * 7 * 4 * (1 + 5)  # after the last iteration, and after each
    assert all(math.isfinite(value) for name in rows[0] if "norm_convergence" in name for value in column(name))
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


@pytest.mark.parametrize("command", [c for c in COMMANDS if PREFIX + "fit" in c], ids=subcommand)
def test_every_configuration_named_is_there(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning_multinorm"])
    with pytest.raises(SystemExit) as end:
        main([*shlex.split(subcommand(command)), "--print_config"])
    assert end.value.code in (None, 0)
    assert "max_steps" in capsys.readouterr().out


def test_ci_installs_and_tests_as_the_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    for part in COMMANDS[1].split(" && "):
        assert part in script.replace("--quiet ", "")


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 150
    for link in re.findall(r"\]\((?!https?://)([^)#]+)", README):
        assert (ROOT / link).exists(), link
