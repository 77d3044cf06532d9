"""Truncation, flipped bits and missing files are found and named, and the newest whole checkpoint with them."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_multinorm.checkpoints.damage import META, damage
from lightning_multinorm.checkpoints.io import CheckpointFiles
from lightning_multinorm.checkpoints.last import newest, whole
from lightning_multinorm.errors import UsageError

from .files import flip, kill_itself, killed, save, save_folder, step, truncate

SHARDS = "__0_0.distcp"
SAVERS = {"file": save, "folder": save_folder}


@pytest.mark.parametrize("kind", SAVERS)
def test_a_whole_one_is_whole(tmp_path: Path, kind: str) -> None:
    path = SAVERS[kind](tmp_path / "a.ckpt", 3)
    assert damage(path) is None and whole(path) == path and step(path) == 3


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (flip, "damaged .*data/0 does not match its checksum"),
        (truncate, "truncated, or no checkpoint .*bytes"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "truncated"),
        (lambda path: os.truncate(path, 0), "empty"),
        (lambda path: path.write_bytes(b"\0" * 9000), "no checkpoint"),
        (Path.unlink, "no such file"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, harm: Callable[[Path], Any], found: str) -> None:
    good, path = save(tmp_path / "best.ckpt", 1), save(tmp_path / "last.ckpt", 2)
    harm(path)
    with pytest.raises(UsageError, match=rf"(?s)last\.ckpt is not usable: .*{found}.*whole checkpoint.*{good}$"):
        CheckpointFiles().load_checkpoint(path)


@pytest.mark.parametrize("name", [SHARDS, ".metadata", META])
@pytest.mark.parametrize(
    ("harm", "found"), [(flip, "damaged|checksum"), (truncate, "truncated"), (Path.unlink, "missing")]
)
def test_a_damaged_folder_is_refused(tmp_path: Path, name: str, harm: Callable[[Path], Any], found: str) -> None:
    path = save_folder(tmp_path / "last.ckpt")
    harm(path / name)
    with pytest.raises(UsageError, match=rf"last\.ckpt is not usable: .*{name}.*({found}).*no whole checkpoint beside"):
        CheckpointFiles().load_checkpoint(path)


def test_every_bit_counts(tmp_path: Path) -> None:
    """Wherever a bit flips, the checkpoint is found damaged, or reads as before."""
    path = tmp_path / "a.ckpt"
    generator = torch.Generator().manual_seed(0)
    unharmed = torch.load(save(path, 1), weights_only=True)
    whole_one, harmless = path.read_bytes(), 0
    for place in torch.randint(len(whole_one), (300,), generator=generator).tolist():
        path.write_bytes(whole_one[:place] + bytes([whole_one[place] ^ 4]) + whole_one[place + 1 :])
        if damage(path) is None:
            assert str(torch.load(path, weights_only=True)) == str(unharmed)
            harmless += 1
    assert harmless < 100


def test_ranks_share_the_files_out(tmp_path: Path) -> None:
    path = save_folder(tmp_path / "a.ckpt")
    truncate(path / SHARDS)
    assert sum(damage(path, rank, 2) is not None for rank in range(2)) == 1


def test_the_newest_by_when_it_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by its step: a run may go on from an early one; nor by the file's time, which copying loses."""
    times = iter([100.0, 200.0, 300.0])
    monkeypatch.setattr("lightning_multinorm.checkpoints.io.time.time", lambda: next(times))
    first, second = tmp_path / "version_0", tmp_path / "version_1"
    save(first / "best.ckpt", 400), save(first / "last.ckpt", 1000), save(second / "last.ckpt", 600)
    now = time.monotonic()
    for later, path in enumerate([second / "last.ckpt", first / "last.ckpt", first / "best.ckpt"]):
        os.utime(path, (now + later, now + later))
    assert newest([first, second]) == (second / "last.ckpt", {})
    assert newest([first, second], without=second / "last.ckpt")[0] == first / "last.ckpt"
    flip(second / "last.ckpt")
    path, passed = newest([first, second])
    assert path == first / "last.ckpt" and list(passed) == [second / "last.ckpt"]
    assert "checksum" in passed[second / "last.ckpt"]


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    (tmp_path / ".a.ckpt.x.tmp").write_text("half")
    assert newest([tmp_path, tmp_path / "nowhere"]) == (None, {})


def test_a_folder_set_aside_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_folder(tmp_path / "last.ckpt", 1)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_multinorm.checkpoints.files.os.replace", kill_itself)
        killed(lambda: save_folder(path, 2))
    assert not path.exists()
    found, _ = newest([tmp_path])
    assert found == tmp_path / ".last.ckpt.old" and step(found) == 1 and step(path) == 1
    save_folder(path, 3)
    assert step(path) == 3 and [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_lightnings_folders_have_no_table(tmp_path: Path) -> None:
    path = save_folder(tmp_path / "a.ckpt", 1)
    torch.save({"global_step": 1, "optimizer_groups": []}, path / META)
    assert damage(path) is None and step(path) == 1
    shutil.rmtree(path)
    assert damage(path) is not None
