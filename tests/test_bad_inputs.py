"""The command line answers bad inputs in a line: one of each kind, in this process; `benchmarks.bad_inputs` has all."""

import shlex
from pathlib import Path

import pytest

from benchmarks.bad_inputs.__main__ import contents, judge
from benchmarks.bad_inputs.cases import KINDS, Case
from lightning_multinorm.cli import main

CHEAP = {
    "no subcommand": "{fit,validate,",
    "unknown option": "data.batch_sise is not known; did you mean data.batch_size?",
    "unknown argument of a class": "did you mean iterations?",
    "binary": "own.yaml is no text: byte 128 is not UTF-8",
    "no YAML": "own.yaml, line 3 is no YAML",
    "a list": "own.yaml is a list; it must be sections",
    "a number for a section": "trainer is 3; it must be a section",
    "unknown key": "data.batch_sise is not known; did you mean data.batch_size?",
    "unknown strategy": "trainer.strategy=fsdp3 is not known; did you mean fsdp",
    "GPU that is not there": "trainer.accelerator=gpu, but torch finds no GPU",
    "folder that cannot be written": "a.txt/runs/quickstart cannot be written: Not a directory; name another",
    "no checkpoint": "own.ckpt is not usable",
    "negative learning rate": "lr=-1.0 must not be negative",
    "rule that is no regular expression": "is no regular expression",
    "no step": "trainer.max_steps is 0",
    "validation often": "Invalid time format for `val_check_interval`",
    "JSON lines that are not UTF-8": "a.jsonl, line 1: not UTF-8",
    "empty file": "found no text to train on",
}
CASES = {case.name: case for cases in KINDS.values() for case in cases if case.name in CHEAP}


@pytest.mark.parametrize("name", CHEAP)
def test_a_bad_input_is_met_with_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case: Case = CASES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning_multinorm"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if case.file is not None:
        case.make(tmp_path / case.file)
    arguments = shlex.split(case.arguments, posix=False)
    if "quickstart.yaml" in arguments and "--data.source" not in case.arguments:  # a tokenizer in no time
        (tmp_path / "small.txt").write_text("one good line of text " * 100)
        arguments += ["--data.source=small.txt", "--data.vocab_size=257"]
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    found = judge(int(stopped.value.code or 0), capsys.readouterr().err, before, contents(tmp_path))
    assert (found.status, found.wrong) == (2, "")
    assert CHEAP[name] in found.message


@pytest.mark.parametrize("devices", ["auto", "1", "[0]", "-1"])
def test_more_processes_than_devices_are_met_with_one_line(
    devices: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning_multinorm"])
    for name, value in (("TORCHELASTIC_RUN_ID", "none"), ("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "quickstart.yaml", "--trainer.accelerator", "cpu", f"--trainer.devices={devices}"])
    assert stopped.value.code == 2
    assert "is 1 on this machine, but torchrun has started 2 processes" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
