"""Preparing: what is in the folder, going on after being stopped anywhere, and what is refused."""

import errno
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.prepared import documents, writer
from lightning_multinorm.data.prepared.manifest import Manifest, read_manifest
from lightning_multinorm.data.prepared.prepare import Report, begin, opened
from lightning_multinorm.data.prepared.writer import verify
from lightning_multinorm.data.tokenizer import end_of_text_id, identify, load_tokenizer
from lightning_multinorm.data.vocabulary import Vocabulary

from .sources import SETTINGS, MemoryShards, prepare


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that end in the middle of shards, and shards in the middle of groups."""
    monkeypatch.setattr(documents, "_TEXT_AT_ONCE", 1500)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Path:
    """A folder prepared without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "made"
    prepare(folder, texts, tokenizer)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Every file but the lock, by its hash."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tokens(folder: Path, split: str) -> np.ndarray:
    """What the files hold, read with nothing of the package."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = sorted(folder.glob(f"{split}-*.bin"))
    return np.concatenate([np.fromfile(path, "<u2" if manifest["dtype"] == "uint16" else "<u4") for path in files])


def test_files_hold_every_document_once_and_in_order(
    whole: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    training, held_out = (list(MemoryShards(texts, held_out).texts()) for held_out in (False, True))
    end = end_of_text_id(tokenizer)
    assert np.array_equal(tokens(whole, "train"), Vocabulary(tokenizer).stream(training))
    stream, validation = Vocabulary(tokenizer).stream(held_out), tokens(whole, "validation")
    assert np.array_equal(validation, stream[: len(validation)])
    assert 400 <= len(validation) < 600 and validation[-1] == end  # whole documents, just enough of them


def test_the_manifest_counts_what_is_there(whole: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    manifest = read_manifest(whole)
    assert manifest.complete and manifest.tokenizer == identify(tokenizer) and manifest.settings == SETTINGS
    training = list(MemoryShards(texts, held_out=False).texts())
    split = manifest.splits["train"]
    assert (split.documents, split.bytes) == (len(training), sum(len(text.encode()) for text in training))
    assert len(split.shards) > 3
    for number, shard in enumerate(split.shards):
        data = (whole / f"train-{number:05}.bin").read_bytes()
        assert shard.checksum == hashlib.blake2b(data, digest_size=32).hexdigest()
        assert len(data) == 2 * shard.tokens
        assert np.frombuffer(data, "<u2")[-1] == manifest.end_of_text  # no document is cut
        assert shard.tokens >= 2000 or number == len(split.shards) - 1
    assert contents(whole).keys() == {
        "manifest.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        *(f"train-{number:05}.bin" for number in range(len(split.shards))),
        "validation-00000.bin",
    }
    assert identify(load_tokenizer(str(whole / "tokenizer"), [], 0)) == manifest.tokenizer


def test_a_large_vocabulary_takes_four_bytes(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_multinorm.data.prepared.prepare.largest_text_id", lambda _: 2**16)
    manifest = prepare(tmp_path, texts[:30], tokenizer)
    assert (tmp_path / "train-00000.bin").stat().st_size == 4 * manifest.splits["train"].shards[0].tokens
    training = list(MemoryShards(texts[:30], held_out=False).texts())
    assert np.array_equal(tokens(tmp_path, "train"), Vocabulary(tokenizer).stream(training))


# -- interruption ----------------------------------------------------------------------------------------------------


class PowerCut(BaseException):
    pass


STEPS = [(os, "replace"), (os, "rename"), (os, "fsync"), (writer.ShardWriter, "add"), (writer.ShardWriter, "close")]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[name for _, name in STEPS])
def test_stopped_at_any_step_it_goes_on_to_the_same_bytes(
    owner: Any,
    name: str,
    after: bool,
    whole: Path,
    tmp_path: Path,
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each attempt is stopped one step later than the one before, in everything that touches the disk."""
    real, calls, limit = getattr(owner, name), 0, 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > limit and not after:
            raise PowerCut
        result = real(*args, **kwargs)
        if calls > limit:
            raise PowerCut
        return result

    monkeypatch.setattr(owner, name, failing)
    folder, cuts = tmp_path / "made", 0
    for limit in (0, 0, 1, 2, 3, 1, 5, 4, 7, 99_999):  # noqa: B007 - read by `failing`
        calls = 0
        try:
            prepare(folder, texts, tokenizer)
        except PowerCut:
            cuts += 1
            if (folder / "manifest.json").exists():
                verify(folder, read_manifest(folder))
    assert cuts >= 1
    assert contents(folder) == contents(whole)


class Telling(Report):
    """Tells another process of every piece that was written, and waits to be killed after the tenth."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.pieces = 0

    def wrote(self, documents: Any) -> None:
        self.pieces += 1
        self.connection.send(self.pieces)
        while self.pieces == 10:
            signal.pause()


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_killed_as_a_process_it_goes_on_to_the_same_bytes(
    whole: Path, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # its threads are not there in a forked process
    processes = multiprocessing.get_context("fork")  # imports nothing again
    told, telling = processes.Pipe(duplex=False)
    process = processes.Process(target=prepare, args=(tmp_path, texts, tokenizer), kwargs={"report": Telling(telling)})
    process.start()
    assert [told.recv() for _ in range(10)][-1] == 10
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not read_manifest(tmp_path).complete and list(tmp_path.glob("train-*.bin.tmp"))
    prepare(tmp_path, texts, tokenizer)
    assert contents(tmp_path) == contents(whole)


def test_a_full_disk_is_one_sentence_and_no_loss(
    whole: Path, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = writer.ShardWriter.add, 0

    def full(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*args)

    monkeypatch.setattr(writer.ShardWriter, "add", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\).*same command again"):
        prepare(tmp_path, texts, tokenizer)
    assert not list(tmp_path.glob("*.tmp"))
    assert read_manifest(tmp_path).splits["train"].shards
    prepare(tmp_path, texts, tokenizer)
    assert contents(tmp_path) == contents(whole)


def test_a_run_goes_on_with_the_tokenizer_it_saved(whole: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with opened(whole):
        _, vocabulary = begin(whole, SETTINGS, "of memory", lambda: pytest.fail("made another"))
    assert identify(vocabulary.tokenizer) == identify(tokenizer)


def test_what_is_complete_is_left_alone(whole: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir() if path.name != ".lock"}
    prepare(whole, texts, tokenizer)
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir() if path.name != ".lock"} == before


def test_an_error_of_the_source_is_raised_and_mended(
    whole: Path, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MemoryShards._read

    def broken(self: MemoryShards, index: int, start: int, step: int) -> Iterator[tuple[int, str]]:
        for number, text in real(self, index, start, step):
            if (index, number) == (1, 33):
                raise DataError("shard 1 is broken.")
            yield number, text

    with monkeypatch.context() as patch:
        patch.setattr(MemoryShards, "_read", broken)
        with pytest.raises(DataError, match="shard 1 is broken"):
            prepare(tmp_path, texts, tokenizer)
    prepare(tmp_path, texts, tokenizer)
    assert contents(tmp_path) == contents(whole)


# -- damage and refusals ---------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Path:
    prepare(tmp_path / "made", texts, tokenizer)
    return tmp_path / "made"


def test_damage_is_found_named_and_mended(
    whole: Path, made: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    path = made / "train-00002.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    sizes: list[int] = []
    with pytest.raises(DataError, match=r"train-00002.bin is not as it was written.*delete it"):
        verify(made, read_manifest(made), sizes.append)
    assert sizes
    path.unlink()
    with pytest.raises(DataError, match=r"train-00002.bin cannot be read"):
        verify(made, read_manifest(made))
    prepare(made, texts, tokenizer)
    assert contents(made) == contents(whole)


@pytest.mark.parametrize(
    ("name", "value"), [("data.vocab_size", 310), ("data.text_field", "body"), ("shard_tokens", 999)]
)
def test_another_configuration_is_refused(
    name: str, value: Any, made: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    before = contents(made)
    with pytest.raises(DataError, match=rf"begun with {name} = .*, now it is {value!r}; nothing in it was touched"):
        prepare(made, texts, tokenizer, {**SETTINGS, name: value})
    assert contents(made) == before


def test_other_documents_are_refused_and_another_name_for_them_is_not(
    made: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    prepare(made, texts, tokenizer, {**SETTINGS, "data.source": "./memory"})
    with pytest.raises(DataError, match=r"begun with other documents than data.source memory"):
        prepare(made, texts, tokenizer, corpus="changed")


def test_another_tokenizer_is_refused_where_none_was_saved_yet(
    made: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (made / "tokenizer").rename(tmp_path / "away")
    with pytest.raises(DataError, match="is not the one"):
        prepare(made, texts, load_tokenizer("bpe", texts, 310, tmp_path))


def test_a_folder_of_something_else_is_refused(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"holds thesis.tex and no prepared data; nothing in it was touched"):
        prepare(tmp_path, texts, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(DataError, match=r"thesis.tex cannot be written \(File exists\)"):
        prepare(tmp_path / "thesis.tex", texts, tokenizer)


def test_two_at_once_are_refused(tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    with opened(tmp_path), pytest.raises(DataError, match="in use by another"):
        prepare(tmp_path, texts, tokenizer)
    prepare(tmp_path, texts, tokenizer)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "another"},
        {"dtype": "object"},
        {"splits": {}},
        {"splits": {"train": {"shards": [{"tokens": -1}], "complete": True}}},
        {"settings": "none"},
        {"end_of_text": "0"},
    ],
)
def test_a_manifest_that_is_none_is_refused(change: dict[str, Any], made: Path) -> None:
    path = made / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=r"manifest.json is not a manifest of prepared data"):
        read_manifest(made)
    path.write_text("{")
    with pytest.raises(DataError, match=r"manifest.json is not a manifest of prepared data"):
        read_manifest(made)
    path.unlink()
    with pytest.raises(DataError, match=r"manifest.json cannot be read"):
        read_manifest(made)


def test_the_fingerprint_is_of_what_is_trained_on(
    whole: Path, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    manifest = read_manifest(whole)
    assert manifest.fingerprint == prepare(tmp_path / "elsewhere", texts, tokenizer).fingerprint
    assert manifest.fingerprint != prepare(tmp_path / "fewer", texts[:-5], tokenizer).fingerprint


def test_the_command_to_finish_is_a_command() -> None:
    manifest = Manifest({**SETTINGS, "data.source": ["a b.txt", "c.txt"], "x; rm": 1}, "", "", 0, "uint16")
    command = manifest.command(Path("out"))
    assert """--data.source '["a b.txt", "c.txt"]' --data.tokenizer bpe --data.vocab_size 300""" in command
    assert "--data.validation_files null --data.validation_fraction 0.1 --data.validation_tokens 400" in command
    # A manifest may come from a stranger, and its command is made to be copied into a shell.
    assert command.endswith("--shard_tokens 2000 '--x; rm' 1 --out out")
