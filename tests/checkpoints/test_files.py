"""Files and folders appear whole or not at all, whatever ends the process, and nothing is left of what was not."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from lightning_multinorm.checkpoints import files
from lightning_multinorm.checkpoints.files import existing, new_file, new_folder, remove

from .files import kill_itself, killed


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(target: Path, text: str = "new") -> None:
    with new_file(target) as file:
        file.write(text.encode())


def write_folder(target: Path, text: str = "new") -> None:
    with new_folder(target) as folder:
        (folder / "shard").write_text(text)


def read(target: Path) -> str:
    return (target / "shard" if target.is_dir() else target).read_text()


WRITERS = {"file": write, "folder": write_folder}


@pytest.mark.parametrize("before", [None, "file", "folder", "link"])
@pytest.mark.parametrize("kind", WRITERS)
def test_it_replaces_whatever_was_there(tmp_path: Path, before: str | None, kind: str) -> None:
    target = tmp_path / "deeper" / "last.ckpt"
    if before == "link":
        write_folder(tmp_path / "best.ckpt", "best")
        target.parent.mkdir()
        target.symlink_to(tmp_path / "best.ckpt")
    elif before:
        WRITERS[before](target, "old")
    WRITERS[kind](target)
    assert read(target) == "new" and names(target.parent) == ["last.ckpt"]
    assert before != "link" or read(tmp_path / "best.ckpt") == "best"


@pytest.mark.parametrize("kind", WRITERS)
def test_it_is_private_until_it_is_there(tmp_path: Path, kind: str) -> None:
    make = {"file": new_file, "folder": new_folder}[kind]
    with make(tmp_path / "a.ckpt"):
        (hidden,) = tmp_path.iterdir()
        assert hidden.name.startswith(".a.ckpt.") and stat.S_IMODE(hidden.stat().st_mode) & 0o077 == 0
    mask = os.umask(0)
    os.umask(mask)
    allowed = 0o666 if kind == "file" else 0o777
    assert stat.S_IMODE((tmp_path / "a.ckpt").stat().st_mode) == allowed & ~mask


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", WRITERS)
def test_an_error_leaves_what_was_there(tmp_path: Path, kind: str, error: Any) -> None:
    target = tmp_path / "last.ckpt"
    WRITERS[kind](target, "old")
    make: Any = {"file": new_file, "folder": new_folder}[kind]
    with pytest.raises(error), make(target) as opened:
        opened.write(b"half") if kind == "file" else (opened / "shard").write_text("half")
        raise error
    assert read(target) == "old" and names(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("where", ["fsync", "fchmod", "replace", "flush_folder", "remove"])
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("before", [None, "file", "folder"])
def test_killed_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, kind: str, before: str | None
) -> None:
    """Either the old one or the new one is there, and the next write tidies up."""
    if where == "fchmod" and kind == "folder":
        where = "chmod"
    if where == "remove" and (before is None or (kind, before) == ("file", "file")):
        pytest.skip("nothing is removed")
    target = tmp_path / "last.ckpt"
    if before:
        WRITERS[before](target, "old")
    with monkeypatch.context() as patch:
        patch.setattr(files if where in ("flush_folder", "remove") else files.os, where, kill_itself)
        killed(lambda: WRITERS[kind](target))
    if where in ("flush_folder", "remove"):
        assert read(existing(target)) == "new"
    elif before:
        assert read(existing(target)) == "old"
    else:
        assert not existing(target).exists() and len(names(tmp_path)) == 1
    WRITERS[kind](tmp_path / "other.ckpt")
    assert names(tmp_path) == (["last.ckpt"] if before or where in ("flush_folder", "remove") else []) + ["other.ckpt"]
    assert not before or read(target) == ("new" if where in ("flush_folder", "remove") else "old")


def test_a_folder_that_cannot_take_its_name_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "last.ckpt", "old")

    def refuse(*_: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        write_folder(tmp_path / "last.ckpt")
    assert read(tmp_path / "last.ckpt") == "old" and names(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_being_written_is_left_alone(tmp_path: Path, kind: str) -> None:
    make = {"file": new_file, "folder": new_folder}[kind]
    with make(tmp_path / "a.ckpt"):
        write(tmp_path / "b.ckpt")
    assert names(tmp_path) == ["a.ckpt", "b.ckpt"]


def test_what_others_have_hidden_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("*")
    (tmp_path / "notes.tmp").write_text("mine")
    (tmp_path / ".tmp").mkdir()
    write(tmp_path / "a.ckpt")
    assert names(tmp_path) == [".gitignore", ".tmp", "a.ckpt", "notes.tmp"]


def test_a_folder_is_removed_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "best.ckpt")
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda path, **_: kill_itself() if path.exists() else None)
        killed(lambda: remove(tmp_path / "best.ckpt"))
    assert names(tmp_path) == [".best.ckpt.removed.tmp"]
    write(tmp_path / "a.ckpt")
    assert names(tmp_path) == ["a.ckpt"]
    remove(tmp_path / "a.ckpt")
    remove(tmp_path / "a.ckpt")
    assert names(tmp_path) == []
