"""The command line as a user runs it: a process for each command, in an empty folder, on real files."""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_multinorm.cli import COMMANDS, main
from tests import commands

LLAMA = """
trainer: {accelerator: cpu, max_steps: 4, val_check_interval: 2, num_sanity_val_steps: 0, log_every_n_steps: 1}
model:
  size: null
  config: {vocab_size: 300, hidden_size: 32, intermediate_size: 88, num_hidden_layers: 2, num_attention_heads: 4}
data: {source: texts, vocab_size: 300, sequence_length: 16, batch_size: 4, validation_fraction: 0.3}
norm_convergence: {every_n_steps: 2}
run: {report: false}
"""
CONVERGENCE = "norm_convergence/model.model.layers.1.mlp.down_proj.weight/row"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An own configuration and C4-shaped shards."""
    (tmp_path / "own.yaml").write_text(LLAMA)
    (tmp_path / "texts").mkdir()
    for shard in range(3):
        with gzip.open(tmp_path / "texts" / f"c4-train.{shard:05}-of-00003.json.gz", "wt") as file:
            for document in range(30):
                text = " ".join(f"word{(shard * 7 + document * k) % 23}" for k in range(40))
                record = {"text": text, "timestamp": "2019-04-24T02:17:53Z", "url": "https://example.org"}
                file.write(json.dumps(record) + "\n")
    return tmp_path


def command(folder: Path, *args: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = commands.run(args, folder)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def fit(folder: Path, *args: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    return command(folder, "fit", "--config", "own.yaml", *args, status=status)


def column(folder: Path, name: str, version: int = 0) -> dict[int, float]:
    """A metric of a run, by step."""
    with (folder / "runs" / "llama" / f"version_{version}" / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def test_a_run_from_beginning_to_end(folder: Path) -> None:
    """fit, resume with another rate, validate and predict; every file is where the output says."""
    output = fit(folder, "--run.report", "true").stdout
    run = folder / "runs" / "llama" / "version_0"
    assert {"config.yaml", "metrics.csv", "checkpoints"} <= {path.name for path in run.iterdir()}
    assert list(run.glob("events.out.tfevents.*"))
    last = run / "checkpoints" / "last.ckpt"
    reached, weights, logs, report = output.strip().splitlines()[-4:]
    assert reached.startswith("Reached") and "val/bits_per_byte" in reached
    assert (folder / weights.split()[1]).is_file() and (folder / logs.split()[1]).is_dir()
    assert report.split() == ["Report", "runs/llama/version_0/report.html"] and (run / "report.html").is_file()
    assert set(column(folder, CONVERGENCE)) == {0, 2} and all(v < 1 for v in column(folder, CONVERGENCE).values())
    assert column(folder, "tokens")[3] == 4 * 4 * 16
    assert column(folder, "skipped_steps") == dict.fromkeys(range(4), 0)
    assert all(norm > 0 for norm in column(folder, "train/gradient_norm").values())
    assert len(column(folder, "val/perplexity")) == 2

    fit(folder, "--trainer.max_steps", "6", "--ckpt_path", str(last), "--model.optimizer.init_args.lr", "0.7")
    rates = column(folder, "lr-SinkGD/matrix", version=1)
    assert min(rates) == 4 and max(rates.values()) > 0.02  # the command line's 0.7, not the checkpoint's 0.02
    assert column(folder, "tokens", version=1)[5] == 6 * 4 * 16

    validated = command(folder, "validate", "--config", "own.yaml", "--ckpt_path", str(last)).stdout
    assert "val/bits_per_byte" in validated
    (folder / "a.txt").write_text("word1 word2 word3")
    predict = ("predict", "--config", "own.yaml", "--ckpt_path", str(last), "--data.predict_files", "[a.txt]")
    assert "a.txt" in command(folder, *predict, "--perplexity.out", "perplexity.csv").stdout
    with (folder / "perplexity.csv").open() as file:
        assert next(csv.DictReader(file))["bytes"] == "17"


def test_two_runs_with_one_seed_are_the_same(folder: Path) -> None:
    for _ in range(2):
        fit(folder, "--trainer.limit_val_batches", "1")
    for name in ("train/loss", "val/loss", CONVERGENCE):
        assert column(folder, name, 0) == column(folder, name, 1)


def test_two_ranks_train_as_one(folder: Path) -> None:
    """DDP: the same loss on the same held-out text, and the data split, not repeated."""
    fit(folder, "--config", "strategy/ddp.yaml", "--trainer.devices", "2", "--trainer.max_steps", "2")
    assert column(folder, "tokens")[1] == 2 * 2 * 4 * 16
    assert len(column(folder, "val/loss")) == 1


def here(folder: Path, patch: pytest.MonkeyPatch, *args: str) -> Any:
    """The exit status of ``fit`` in this process, for what ends before the training."""
    patch.chdir(folder)
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    patch.setattr(sys, "argv", ["lightning_multinorm"])
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "own.yaml", *args])
    return end.value.code


def test_print_config_shows_the_merged_configuration(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--config", "optimizer/adamw.yaml", "--trainer.max_steps", "9", "--print_config")
    assert here(folder, monkeypatch, *args) in (None, 0)
    printed = capsys.readouterr().out
    assert "class_path: torch.optim.AdamW" in printed and "max_steps: 9" in printed


def test_an_error_of_usage_is_one_line_and_no_stack_trace(folder: Path) -> None:
    done = fit(folder, "--config", "llama1B.yaml", status=2)
    assert "no packaged configuration. Did you mean llama1b.yaml?" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--data.source", "nowhere/*.jsonl"), "nowhere/*.jsonl"),
        (("--model.config.hidden_sise", "3"), "hidden_sise"),
        (("--model.config", '{"vocab_size": 260}'), "the model only 260: raise --model.config.vocab_size"),
        (("--data.sequence_length", "4096"), "data.sequence_length=4096"),
        (("--config", "optimizer/adamw.yaml", "--norm_convergence.shadow", "false"), "shadow=True"),
    ],
)
def test_an_error_of_usage_names_what_is_wrong(
    args: tuple[str, ...],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert here(folder, monkeypatch, *args) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_with_options_of_its_own_helps_and_refuses(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["lightning_multinorm"])
    for args, status in (([name, "--help"], 0), ([name, "--nonsense=1"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as stopped:
            main(args)
        assert stopped.value.code == status
        captured = capsys.readouterr()
        if status == 2:
            assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
        else:
            assert " ".join(str(COMMANDS[name].__doc__).splitlines()[0].split()) in " ".join(captured.out.split())
