"""Sources: the held-out split, files here and elsewhere, C4."""

import functools
import http.server
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from lightning_multinorm.data import sources
from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.shards import Shards, StreamedShards, is_held_out
from lightning_multinorm.data.sources import open_corpus

from .texts import make_texts, write_shards


def read(shards: Shards) -> list[str]:
    return list(shards.texts())


# -- the held-out split ----------------------------------------------------------------------------------------------


def test_split_by_document_is_disjoint_and_complete(shards: Path, texts: list[str]) -> None:
    corpus = open_corpus(str(shards), validation_fraction=0.2)
    train, held_out = read(corpus.train), read(corpus.held_out)
    assert Counter(train + held_out) == Counter(texts)
    assert 20 <= len(held_out) <= 60  # 40 expected of 200


def test_split_is_the_same_in_another_process(texts: list[str]) -> None:
    code = (
        "import sys; from lightning_multinorm.data.shards import is_held_out\n"
        "print([is_held_out(text, 0.2) for text in sys.argv[1:]])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(
        [sys.executable, "-c", code, *texts], env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == str([is_held_out(text, 0.2) for text in texts])


def test_split_is_pinned() -> None:
    # Another hash would move documents across the border between a checkpoint and its resume.
    assert [i for i in range(16) if is_held_out(f"document {i}", 0.5)] == [0, 1, 2, 6, 7, 9, 11, 15]


def test_copies_land_on_the_same_side(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, make_texts(60, seed=3), 2)
    corpus = open_corpus([str(tmp_path / "a"), str(tmp_path / "b")], validation_fraction=0.3)
    assert set(read(corpus.held_out)) and not set(read(corpus.train)) & set(read(corpus.held_out))


def test_validation_files_leave_the_source_whole(shards: Path, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("held out")
    corpus = open_corpus(str(shards), validation_files=str(tmp_path / "held.txt"), validation_fraction=0.5)
    assert Counter(read(corpus.train)) == Counter(texts)
    assert read(corpus.held_out) == ["held out"]


def test_kinds_can_be_mixed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.jsonl").write_text('{"text": "json", "extra": 1}\n')
    corpus = open_corpus(str(tmp_path), validation_files=str(tmp_path / "a.txt"))
    assert read(corpus.train) == ["plain", "json"]


def test_fingerprint_follows_the_files_and_not_their_place(tmp_path: Path) -> None:
    fingerprints = {}
    for name, seed in (("here", 0), ("there", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, make_texts(20, seed), 2)
        fingerprints[name] = open_corpus(str(tmp_path / name)).fingerprint
    assert fingerprints["here"] == fingerprints["there"] != fingerprints["other"]
    assert open_corpus(str(tmp_path / "here"), validation_fraction=0.5).fingerprint != fingerprints["here"]


def test_wrong_text_field_fails_at_once(shards: Path) -> None:
    with pytest.raises(DataError, match=r"'content' \(found: text, timestamp, url\)"):
        open_corpus(str(shards), text_field="content")


def test_standard_library_is_a_source() -> None:
    corpus = open_corpus("stdlib", validation_fraction=0.02)
    held_out = read(corpus.held_out)
    assert len(corpus.train) > 300
    assert 1 <= len(held_out) < 60
    assert not set(held_out) & set(read(corpus.train))


# -- C4 --------------------------------------------------------------------------------------------------------------


def test_c4_without_hub_names_both_ways_out(no_hub: Callable[[str], None]) -> None:
    no_hub("sources")
    with pytest.raises(DataError, match=r"--data.source stdlib .*c4/en/\*\.json\.gz") as caught:
        open_corpus("c4")
    assert caught.value.__cause__ is None
    assert "\n" not in str(caught.value)


def test_c4_that_fails_later_says_why_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Too many requests.\nRead the documentation.")

    monkeypatch.setattr(sources, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(sources, "load_dataset_builder", fail)
    with pytest.raises(DataError, match=r"failed \(ConnectionError: Too many requests\): train on") as caught:
        open_corpus("c4")
    assert caught.value.__suppress_context__


def test_c4_is_its_own_files_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Builder:
        def __init__(self, kind: str, data_files: dict[str, list[str]]) -> None:
            asked.append((kind, *data_files["train"]))
            self.config = self
            self.data_files = data_files

        def as_streaming_dataset(self, split: str) -> Any:
            return Dataset.from_list([{"text": self.data_files[split][0]}]).to_iterable_dataset()

    monkeypatch.setattr(sources, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(sources, "load_dataset_builder", Builder)
    corpus = open_corpus("c4")
    train, validation = (f"hf://datasets/allenai/c4/en/c4-{part}.*.json.gz" for part in ("train", "validation"))
    assert asked == [("json", train), ("json", validation)]
    assert (read(corpus.train), read(corpus.held_out)) == ([train], [validation])


# -- elsewhere -------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(shards: Path) -> Iterator[str]:
    """The address of a real web server that has the shards."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=shards)) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def test_addresses_are_streamed_like_files(server: str, shards: Path) -> None:
    files = sorted(path.name for path in shards.iterdir())
    here, there = open_corpus(str(shards)), open_corpus([f"{server}/{name}" for name in files])
    assert isinstance(there.train, StreamedShards)
    assert (read(there.train), read(there.held_out)) == (read(here.train), read(here.held_out))
    assert list(there.train.documents(2, 5, 3)) == list(here.train.documents(2, 5, 3))
    assert there.fingerprint == open_corpus([f"{server}/./{name}" for name in files]).fingerprint


def test_an_address_without_a_file_is_explained(server: str) -> None:
    with pytest.raises(DataError, match=r"nothing.json.gz.* could not be opened \(FileNotFoundError") as caught:
        open_corpus([f"{server}/nothing.json.gz"])
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_gone_later_is_named(shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "gone.json.gz"
    file.write_bytes(sorted(shards.iterdir())[0].read_bytes())
    train = open_corpus([f"file://{file}"]).train
    file.unlink()
    with pytest.raises(DataError, match=r"gone.json.gz could not be read .*--ckpt_path last") as caught:
        read(train)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "remedy"),
    [
        (["http://127.0.0.1/a.json.gz", "texts"], "mixes local files with addresses"),
        (["http://127.0.0.1/a.csv"], "must all be JSON lines or all Parquet"),
        (["http://127.0.0.1/a.json", "http://127.0.0.1/a.parquet"], "must all be JSON lines or all Parquet"),
    ],
)
def test_addresses_that_cannot_be_streamed_are_refused(source: list[str], remedy: str) -> None:
    with pytest.raises(DataError, match=remedy):
        open_corpus(source)
