"""The subcommand: what it prints and leaves behind, alone and twice, and what it refuses in one line."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lightning_multinorm.cli import main
from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.prepared.bar import Bar, Position
from lightning_multinorm.data.prepared.command import Preparer
from lightning_multinorm.data.prepared.documents import Tokenised
from lightning_multinorm.data.prepared.manifest import Split, read_manifest

from .sources import MemoryShards, prepare


def prepared(data: Any, out: Path, **options: Any) -> None:
    Preparer().prepare(None, data, str(out), **options)  # type: ignore[arg-type]  # no model is looked at


def test_the_command_line_prepares(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "own.yaml"
    config.write_text(f"data: {{source: {shards}, vocab_size: 300, validation_fraction: 0.1}}\n")
    out = tmp_path / "tokens"
    arguments = ["prepare", "--config", str(config), "--out", str(out), "--shard_tokens", "3000"]
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    main()
    manifest = read_manifest(out)
    shown = capsys.readouterr().out
    train = manifest.splits["train"]
    assert f"train: {train.tokens:,} tokens of {train.documents} documents" in shown
    assert f"{out / 'train-00000.bin'}: 3,0" in shown  # a line for each, where no bar can be
    assert f"is complete. Train on it with --data.source {out}" in shown
    assert len(train.shards) == 1 + train.tokens // 3100 and manifest.settings["shard_tokens"] == 3000
    assert train.documents + manifest.splits["validation"].documents == 200


def test_a_second_time_it_checks(make_data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared(make_data(), tmp_path)
    prepared(make_data(), tmp_path)
    assert "is already complete; all checksums are right" in capsys.readouterr().out
    path = tmp_path / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"??")
    with pytest.raises(DataError, match=r"train-00000.bin is not as it was written"):
        prepared(make_data(), tmp_path)


def test_ctrl_c_says_how_to_go_on(
    make_data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Bar, "wrote", interrupted)
        with pytest.raises(SystemExit) as ended:
            prepared(make_data(), tmp_path)
    assert ended.value.code == 130
    assert capsys.readouterr().err == f"Interrupted; the same command goes on from what is complete in {tmp_path}.\n"
    prepared(make_data(), tmp_path)
    assert read_manifest(tmp_path).complete


def test_what_cannot_be_prepared_is_refused(make_data: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shard_tokens is 0; set it to 1 or more"):
        prepared(make_data(), tmp_path, shard_tokens=0)
    prepared(make_data(), tmp_path)
    with pytest.raises(DataError, match="is prepared already; name the text"):
        prepared(make_data(source=str(tmp_path)), tmp_path / "again")


# -- progress --------------------------------------------------------------------------------------------------------


def piece(file: int, size: int) -> Tokenised:
    return Tokenised(np.zeros(3), np.array([3]), np.array([size]), [(file, 1)])


def test_position_is_judged_by_files_and_the_text_in_them(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in "abc"]
    for name in names:
        Path(name).write_bytes(b"." * 100)  # of 400 bytes of text each, compressed
    position = Position(names, (0, 0))
    assert position.total == 300
    assert [position.after(piece(file, 200)) for file in (0, 0, 1, 1, 2)] == [100, 100, 150, 200, 250]
    assert Position(names, (2, 5)).after(piece(2, 30)) == 230
    assert Position(["hf://elsewhere"], (0, 0)).total is None
    assert Position(["hf://elsewhere"], (0, 0)).after(piece(0, 5)) == 0


def test_the_bar_counts_from_what_there_is(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    manifest = prepare(tmp_path, texts, tokenizer)
    split = Split(manifest.splits["train"].shards[:1])
    screen = io.StringIO()
    bar = Bar(Console(file=screen, force_terminal=True, width=160))
    with bar.shown("train", MemoryShards(texts, held_out=False).names, split):
        bar.wrote(piece(2, 10))
    assert f"{split.documents + 1:,} documents, {split.tokens + 3:,} tokens" in screen.getvalue()
