"""The plugin: what a full disk leaves, what a stranger's file may not do, and writing beside the training."""

import pickle
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from lightning_multinorm.checkpoints import io
from lightning_multinorm.checkpoints.damage import FILES, META, checksums
from lightning_multinorm.checkpoints.io import CheckpointFiles
from lightning_multinorm.checkpoints.metadata import Reader
from lightning_multinorm.errors import UsageError

from .files import save, save_folder, state, step


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The next write beyond this fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("good", [True, False])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_leaves_the_last_good_one(tmp_path: Path, good: bool, asynchronous: bool) -> None:
    files = CheckpointFiles(asynchronous)
    path = tmp_path / "last.ckpt"
    if good:
        save(path, 1)
    known = rf"the last good one is {path}" if good else "there is no good one"
    with (
        largest_file(5000),
        pytest.raises(UsageError, match=rf"{path} could not be written \(File too large\); {known}"),
    ):
        files.save_checkpoint(state(2), path)
        files.teardown()
    assert [p.name for p in tmp_path.iterdir()] == (["last.ckpt"] if good else [])
    assert not good or step(path) == 1
    files.save_checkpoint(state(3), path)
    files.teardown()
    assert step(path) == 3


def test_what_cannot_be_saved_at_all_is_no_matter_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        CheckpointFiles().save_checkpoint({"function": lambda: None}, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return open, (str(self.target), "w")


def test_a_strangers_file_runs_nothing(tmp_path: Path) -> None:
    path, trace = tmp_path / "a.ckpt", tmp_path / "trace"
    torch.save({**state(), "callbacks": {"x": Payload(trace)}}, path)
    for weights_only in (None, True):
        with pytest.raises(UsageError, match=r"a\.ckpt holds more than tensors and plain values \(.*open\)"):
            CheckpointFiles().load_checkpoint(path, weights_only=weights_only)
        assert not trace.exists()
    CheckpointFiles().load_checkpoint(path, weights_only=False)["callbacks"]["x"].close()
    assert trace.exists()  # so the payload works


@pytest.mark.parametrize("name", [META, ".metadata"])
def test_a_strangers_folder_runs_nothing(tmp_path: Path, name: str) -> None:
    path, trace = save_folder(tmp_path / "a.ckpt"), tmp_path / "trace"
    if name == META:
        torch.save({"optimizer_groups": [], "x": Payload(trace)}, path / META)
    else:
        metadata = Reader(path).read_metadata()
        metadata.planner_data = Payload(trace)
        write_metadata(path, metadata)
    with pytest.raises(UsageError, match=r"open.*|ill will.*open"):
        CheckpointFiles().load_checkpoint(path)
    assert not trace.exists()


def test_a_strangers_folder_reads_no_other_file(tmp_path: Path) -> None:
    path = save_folder(tmp_path / "a.ckpt")
    metadata = Reader(path).read_metadata()
    for place in metadata.storage_data.values():
        place.relative_path = "../b.ckpt/__0_0.distcp"
    write_metadata(path, metadata)
    with pytest.raises(UsageError, match=r"names \.\./b\.ckpt.*no file of the folder"):
        CheckpointFiles().load_checkpoint(path)


def write_metadata(path: Path, metadata: Metadata) -> None:
    """With the right checksums, as a stranger would."""
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    table = checksums([file for file in path.iterdir() if file.name != META])
    torch.save({"optimizer_groups": [], FILES: table}, path / META)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing waits for this event."""
    event, write = threading.Event(), io.write_file

    def wait(checkpoint: Any, target: Path) -> None:
        assert event.wait(60)
        write(checkpoint, target)

    monkeypatch.setattr(io, "write_file", wait)
    yield event
    event.set()


def test_training_goes_on_while_a_copy_is_written(tmp_path: Path, held: threading.Event) -> None:
    files, checkpoint = CheckpointFiles(asynchronous=True), state(1)
    files.save_checkpoint(checkpoint, tmp_path / "a.ckpt")
    checkpoint["state_dict"]["weight"].fill_(7)  # the next step
    assert list(tmp_path.iterdir()) == []
    held.set()
    files.teardown()
    assert step(tmp_path / "a.ckpt") == 1


def test_shared_memory_is_written_once(tmp_path: Path) -> None:
    files, weight = CheckpointFiles(asynchronous=True), torch.ones(100, 100)
    for number in (1, 2):  # the second time into the memory of the first
        weight.fill_(number)
        tensors = {"embedding": weight, "head": weight.detach(), "row": weight[0]}
        files.save_checkpoint({"state_dict": tensors}, tmp_path / "a")
        files.teardown()
        saved = CheckpointFiles().load_checkpoint(tmp_path / "a")["state_dict"]
        assert all(tensor.unique().tolist() == [number] for tensor in saved.values())
        assert saved["embedding"].data_ptr() == saved["head"].data_ptr() and saved["row"].shape == (100,)


def test_the_old_one_is_removed_after_the_new_one_is_there(tmp_path: Path, held: threading.Event) -> None:
    files = CheckpointFiles(asynchronous=True)
    torch.save(state(1), tmp_path / "old.ckpt")
    files.save_checkpoint(state(2), tmp_path / "new.ckpt")
    files.remove_checkpoint(tmp_path / "old.ckpt")
    assert step(tmp_path / "old.ckpt") == 1
    held.set()
    files.teardown()
    assert [p.name for p in tmp_path.iterdir()] == ["new.ckpt"]


def test_after_an_error_nothing_is_removed(tmp_path: Path) -> None:
    files = CheckpointFiles(asynchronous=True)
    save(tmp_path / "old.ckpt", 1)
    with largest_file(5000), pytest.raises(UsageError, match=r"new\.ckpt could not be written.*good one is .*old"):
        files.save_checkpoint(state(2), tmp_path / "new.ckpt")
        files.remove_checkpoint(tmp_path / "old.ckpt")
        files.teardown()
    assert step(tmp_path / "old.ckpt") == 1


def test_an_error_comes_up_with_the_next_checkpoint(tmp_path: Path) -> None:
    files = CheckpointFiles(asynchronous=True)
    assert files.background is not None
    with largest_file(5000):
        files.save_checkpoint(state(1), tmp_path / "a.ckpt")
        files.background._pending[0].exception()
    with pytest.raises(UsageError, match=r"a\.ckpt could not be written"):
        files.save_checkpoint(state(2), tmp_path / "b.ckpt")
    files.teardown()  # once is enough
    assert list(tmp_path.iterdir()) == []


def test_at_most_two_wait(tmp_path: Path, held: threading.Event) -> None:
    files = CheckpointFiles(asynchronous=True)
    for number in (1, 2):
        files.save_checkpoint(state(number), tmp_path / f"{number}.ckpt")
    third = threading.Thread(target=files.save_checkpoint, args=(state(3), tmp_path / "3.ckpt"))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    held.set()
    third.join()
    files.teardown()
    assert [step(tmp_path / f"{number}.ckpt") for number in (1, 2, 3)] == [1, 2, 3]
