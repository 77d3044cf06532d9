"""Each kind of file, each way to name files, and each way to get it wrong."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_multinorm.data import files
from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.files import find_files, name_documents, read_documents, stdlib_files

DOCUMENTS = ["first line\nsecond größe 🙂", "another"]


def json_lines(key: str = "text") -> str:
    return "".join(json.dumps({key: text, "timestamp": "t", "url": "u"}) + "\n" for text in DOCUMENTS)


def write_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(json_lines().encode()))


WRITERS: dict[str, Callable[[Path], object]] = {
    ".jsonl": lambda path: path.write_text(json_lines()),
    ".json": lambda path: path.write_text(json_lines()),
    ".jsonl.gz": write_gzip,
    ".json.gz": write_gzip,
    ".parquet": lambda path: pq.write_table(pa.table({"n": [1, 2], "text": DOCUMENTS}), path),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_documents_of_a_file_of_many(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    WRITERS[suffix](path)
    assert list(read_documents(str(path), "text")) == list(enumerate(DOCUMENTS))


@pytest.mark.parametrize("suffix", [".txt", ".py", ".md"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_text(DOCUMENTS[0], encoding="utf-8")
    assert list(read_documents(str(path), "text")) == [(0, DOCUMENTS[0])]


def test_text_field_names_the_key_or_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json_lines("content"))
    pq.write_table(pa.table({"content": DOCUMENTS}), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        assert list(read_documents(str(tmp_path / name), "content")) == list(enumerate(DOCUMENTS))
        with pytest.raises(DataError, match=rf"{name}.*'text' \(found: content.*--data.text_field"):
            list(read_documents(str(tmp_path / name), "text"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe", "not UTF-8.*leave it out"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b"[1, 2]\n", "line 1: no text under the key 'text'"),
        ("a.jsonl", b'{"text": null}\n', "line 1: no text under the key 'text'"),
        ("a.json.gz", b"plain", "not a complete gzip file"),
        ("a.json.gz", gzip.compress(json_lines().encode())[:-10], "not a complete gzip file"),
        ("a.parquet", b"plain", "not a Parquet file"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*{message}") as caught:
        list(read_documents(str(tmp_path / name), "text"))
    assert "\n" not in str(caught.value)


def test_blank_lines_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n" + json_lines() + "  \n")
    assert list(read_documents(str(tmp_path / "a.jsonl"), "text")) == list(enumerate(DOCUMENTS))


@pytest.mark.parametrize("suffix", WRITERS)
def test_reading_begins_anywhere(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    WRITERS[suffix](path)
    every = list(read_documents(str(path), "text"))
    for start, step in [(0, 1), (1, 1), (0, 2), (1, 3), (7, 1)]:
        assert list(read_documents(str(path), "text", start, step)) == every[start::step]


def test_lines_that_are_not_wanted_are_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('not JSON\n{"text": "wanted"}\n')
    assert list(read_documents(str(tmp_path / "a.jsonl"), "text", 1)) == [(1, "wanted")]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_too_long_a_document_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST", 2**20)
    (tmp_path / name).write_text('{"text": "' + "a" * 2**20 + '"}\n')
    with pytest.raises(DataError, match=rf"{name}.* is a document of more than 1 MiB.*split it"):
        list(read_documents(str(tmp_path / name), "text"))


def test_missing_file_is_named() -> None:
    with pytest.raises(DataError, match=r"/nowhere/a.txt cannot be read"):
        list(read_documents("/nowhere/a.txt", "text"))


def test_find_by_path_folder_glob_and_list(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    names = ["a.txt", "deep/b.jsonl", "deep/er/c.json.gz"]
    for name in [*names, "README.md", "deep/sums.sha256"]:
        (tmp_path / name).touch()
    paths = [str(tmp_path / name) for name in names]
    assert find_files(paths[0], "data.source") == paths[:1]
    assert find_files(str(tmp_path), "data.source") == paths  # recursive, other kinds left out
    assert find_files(str(tmp_path / "deep" / "*.jsonl"), "data.source") == [paths[1]]
    assert find_files(str(tmp_path / "**" / "*.json*"), "data.source") == paths[1:]
    assert find_files([paths[2], str(tmp_path), paths[0]], "data.source") == paths  # sorted, each once


@pytest.mark.parametrize("pattern", ["missing.txt", "*.jsonl", "empty"])
def test_a_pattern_without_files_is_refused(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=rf"data.validation_files: .*matches no file.*{'stdlib'}"):
        find_files(str(tmp_path / pattern), "data.validation_files")


def test_unknown_kind_and_empty_list_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.docx").touch()
    with pytest.raises(DataError, match=r"data.source: .*a.docx is of no known kind.*\.txt"):
        find_files(str(tmp_path / "*"), "data.source")
    with pytest.raises(DataError, match=r"data.source: the list is empty"):
        find_files([], "data.source")


def test_names_tell_file_and_position(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text(json_lines())
    names, texts = name_documents([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], "text")
    assert names == [f"{tmp_path}/a.txt", f"{tmp_path}/b.jsonl:1", f"{tmp_path}/b.jsonl:2"]
    assert texts == ["one", *DOCUMENTS]


def test_standard_library_without_tests_and_packages() -> None:
    files = stdlib_files()
    assert files == sorted(set(files))
    assert any(path.endswith("/argparse.py") for path in files)
    assert not any(part in path for path in files for part in ("/test/", "/tests/", "/idle_test/", "/site-packages/"))
    assert sum(Path(path).stat().st_size for path in files) > 5e6


def test_source_code_in_another_encoding_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes("# größe".encode("latin-1"))
    assert list(read_documents(str(tmp_path / "a.py"), "text")) == []
