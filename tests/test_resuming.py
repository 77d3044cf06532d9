"""``--ckpt_path last`` is the newest whole checkpoint of a run, wherever it may lie."""

import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints.files import flip, save, save_folder
from jsonargparse import Namespace

from lightning_multinorm.cli import MultiNormCLI, PlanningTrainer
from lightning_multinorm.configurations import CONFIGS
from lightning_multinorm.errors import UsageError
from lightning_multinorm.resuming import last_checkpoint


def config(root: Path, logger: Any = None, dirpath: Path | None = None) -> Namespace:
    return Namespace(
        run=Namespace(root=str(root), name="llama"),
        checkpoint=Namespace(dirpath=dirpath),
        trainer=Namespace(logger=logger, default_root_dir=str(root)),
    )


@pytest.mark.parametrize("kind", [save, save_folder])
def test_the_newest_whole_one_of_all_versions(tmp_path: Path, kind: Any) -> None:
    run = tmp_path / "llama"
    kind(run / "version_2" / "checkpoints" / "last.ckpt", 4)
    newest = kind(run / "version_10" / "checkpoints" / "last.ckpt", 6)
    (run / "version_11" / "checkpoints").mkdir(parents=True)  # it was killed before it saved
    kind(tmp_path / "other" / "version_0" / "checkpoints" / "last.ckpt", 9)
    half = run / "version_2" / "checkpoints" / ".best.ckpt.abc.tmp"
    half.touch()
    assert last_checkpoint(config(tmp_path), "fit") == newest and not half.exists()
    flip(newest / "__0_0.distcp" if newest.is_dir() else newest)
    with pytest.warns(UserWarning, match=rf"{newest} is not usable, and passed over: .*checksum"):
        found = last_checkpoint(config(tmp_path), "validate")
    assert found == run / "version_2" / "checkpoints" / "last.ckpt"


def test_there_may_be_none_to_begin_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert last_checkpoint(config(tmp_path), "fit") is None
    assert f"no whole checkpoint in {tmp_path}/llama/version_*/checkpoints; the run begins anew" in caplog.text
    with pytest.raises(UsageError, match=r"no whole checkpoint in .*name one, or train first"):
        last_checkpoint(config(tmp_path), "test")


def test_where_the_run_keeps_them(tmp_path: Path) -> None:
    own, without = save(tmp_path / "own" / "last.ckpt"), save(tmp_path / "checkpoints" / "last.ckpt")
    assert last_checkpoint(config(tmp_path, dirpath=own.parent), "fit") == own
    assert last_checkpoint(config(tmp_path, logger=False), "fit") == without
    with pytest.raises(UsageError, match=r"set checkpoint\.dirpath"):
        last_checkpoint(config(tmp_path, logger=Namespace(class_path="WandbLogger")), "fit")


class Idle(PlanningTrainer):
    """Notes what it was to go on from."""

    found: Any = "nothing"

    def fit(self, model: Any, datamodule: Any = None, ckpt_path: str | None = None) -> None:  # type: ignore[override]
        """Leave everything as it was built."""
        Idle.found = ckpt_path


def test_a_damaged_one_is_left_to_the_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It checks, and ends in one line; the command line itself reads nothing of it."""
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"half")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning_multinorm"])
    MultiNormCLI(["fit", "--config", str(CONFIGS / "quickstart.yaml"), "--ckpt_path", str(path)], trainer_class=Idle)
    assert Idle.found == str(path)


@pytest.mark.parametrize("there", [True, False])
def test_the_command_line_and_the_processes_it_starts_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    path = tmp_path / "runs" / "quickstart" / "version_0" / "checkpoints" / "last.ckpt"
    if there:
        save(path)
    monkeypatch.chdir(tmp_path)
    first = ["lightning_multinorm", "fit", "--config", str(CONFIGS / "quickstart.yaml"), "--ckpt_path", "last"]
    monkeypatch.setattr(sys, "argv", first)
    for _ in range(2):  # the second time as a process for another device
        MultiNormCLI(trainer_class=Idle)
        assert Idle.found == (str(path.relative_to(tmp_path)) if there else None)
        assert sys.argv[-2:] == ["--ckpt_path", str(path.relative_to(tmp_path)) if there else "null"]
        assert len(sys.argv) == len(first)
        path.unlink(missing_ok=True)
