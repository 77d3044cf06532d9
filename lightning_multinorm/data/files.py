"""Local text files: which ones a path, folder or glob means, and the documents in each of them.

Stands on `errors` alone; `sources` makes streams of what is read here.
"""

import contextlib
import glob
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from io import BufferedIOBase
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_multinorm.data.errors import DataError

# Directories of the standard library that hold its tests, or are not the standard library at all.
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


LONGEST = 64 * 2**20
"""Bytes of the longest document: the tokenizer takes some fifty times a document's bytes of memory."""
Documents = Iterator[tuple[int, str]]
"""Number and text of each document of a file that is wanted."""


def _check_length(size: int, where: str) -> None:
    if size > LONGEST:
        raise DataError(
            f"{where} is a document of more than {LONGEST >> 20} MiB, too long to be tokenised in one piece; "
            "split it into several documents."
        )


def _read_text(path: str, text_field: str, start: int, step: int) -> Documents:
    if start > 0:
        return
    _check_length(os.path.getsize(path), path)
    try:
        yield 0, Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; convert it (iconv -t utf-8) or leave it out.") from None


def _read_source_code(path: str, text_field: str, start: int, step: int) -> Documents:
    # A source file in another encoding is legal Python, so one of them is no reason to stop.
    with contextlib.suppress(DataError):
        yield from _read_text(path, text_field, start, step)


def _parse_lines(file: BufferedIOBase, path: str, text_field: str, start: int, step: int) -> Documents:
    lines = iter(partial(file.readline, LONGEST + 1), b"")  # the limit also keeps a binary file from filling memory
    full = ((number, line) for number, line in enumerate(lines, start=1) if not line.isspace())
    # Lines that are not wanted are not parsed: on a rank that shares a file with others, these are most.
    for document, (number, line) in islice(enumerate(full), start, None, step):
        _check_length(len(line), f"{path}, line {number}")
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            raise DataError(f"{path}, line {number}: not UTF-8; convert the file (iconv -t utf-8).") from None
        except ValueError:
            raise DataError(f"{path}, line {number}: not JSON; the file must hold one JSON object a line.") from None
        text = record.get(text_field) if type(record) is dict else None
        if type(text) is not str:
            found = ", ".join(record) if type(record) is dict else type(record).__name__
            raise DataError(
                f"{path}, line {number}: no text under the key {text_field!r} (found: {found}); "
                "set --data.text_field to the key that holds the text."
            )
        yield document, text


def _read_json_lines(path: str, text_field: str, start: int, step: int) -> Documents:
    with open(path, "rb") as file:
        yield from _parse_lines(file, path, text_field, start, step)


def _read_gzip_json_lines(path: str, text_field: str, start: int, step: int) -> Documents:
    try:
        with gzip.open(path, "rb") as file:
            yield from _parse_lines(file, path, text_field, start, step)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"{path} is not a complete gzip file; copy it again or leave it out.") from None


def _read_parquet(path: str, text_field: str, start: int, step: int) -> Documents:
    try:
        with pq.ParquetFile(path) as table:
            if text_field not in table.schema_arrow.names:
                raise DataError(
                    f"{path}: no column {text_field!r} (found: {', '.join(table.schema_arrow.names)}); "
                    "set --data.text_field to the column that holds the text."
                )
            batches = table.iter_batches(batch_size=256, columns=[text_field])
            rows = chain.from_iterable(batch.column(0) for batch in batches)
            for document, text in islice(enumerate(rows), start, None, step):
                if text.is_valid:
                    yield document, text.as_py()
    except pa.ArrowInvalid:
        raise DataError(f"{path} is not a Parquet file; copy it again or leave it out.") from None


# File name endings and how to read them. Any mixture is fine: only the text leaves the reader.
_READERS: dict[str, Callable[[str, str, int, int], Documents]] = {
    ".txt": _read_text,
    ".py": _read_source_code,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".jsonl.gz": _read_gzip_json_lines,
    ".json.gz": _read_gzip_json_lines,
    ".parquet": _read_parquet,
}

_WHOLE_FILES = {".txt", ".py", None}  # kinds of which a file is one document


def _suffix(path: str) -> str | None:
    return next((suffix for suffix in _READERS if path.endswith(suffix)), None)


def read_documents(path: str, text_field: str, start: int = 0, step: int = 1) -> Documents:
    """The documents of one file, in its order.

    Args:
        path: A local file; an ending that is not known is read as plain text.
        text_field: Key (JSON lines) or column (Parquet) that holds the text.
        start: Number of the first document wanted; they count from 0, and blank lines do not count.
        step: Every how-manieth from there on.

    Yields:
        Number and text: one per file, line or row, depending on the kind.

    Raises:
        DataError: If the file is broken or has no such key or column.
    """
    try:
        yield from _READERS[_suffix(path) or ".txt"](path, text_field, start, step)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check the path and its rights.") from None


def name_documents(paths: list[str], text_field: str) -> tuple[list[str], list[str]]:
    """The documents of several files with a name for each: the file's, and ":n" for the n-th line or row.

    Args:
        paths: Files; one of no known kind is read as plain text.
        text_field: As in `read_documents`.

    Returns:
        Names and texts.

    Raises:
        DataError: If a file cannot be read.
    """
    names: list[str] = []
    texts: list[str] = []
    for path in paths:
        for number, text in read_documents(path, text_field):
            names.append(path if _suffix(path) in _WHOLE_FILES else f"{path}:{number + 1}")
            texts.append(text)
    return names, texts


def _match(pattern: str) -> list[str]:
    path = os.path.expanduser(pattern)
    if os.path.isdir(path):
        inside = glob.glob(os.path.join(glob.escape(path), "**", "*"), recursive=True)
        # A folder may hold a README or checksums; only what is asked for by name must be readable.
        return [name for name in inside if os.path.isfile(name) and _suffix(name)]
    if os.path.isfile(path):
        return [path]
    return [name for name in glob.glob(path, recursive=True) if os.path.isfile(name)]


def find_files(patterns: str | list[str], parameter: str) -> list[str]:
    """The files that paths, folders (searched recursively) and globs stand for.

    Args:
        patterns: One pattern or a list of them.
        parameter: The user's name of this setting, for messages ("data.source").

    Returns:
        Sorted, each file once.

    Raises:
        DataError: If a pattern matches nothing, or a file's kind is not known.
    """
    found: set[str] = set()
    for pattern in [patterns] if type(patterns) is str else patterns:
        matches = _match(pattern)
        if not matches:
            raise DataError(
                f"{parameter}: {pattern!r} matches no file ending in {', '.join(_READERS)}; give an existing file, "
                'a folder, a quoted glob, or one of the names "stdlib" and "c4".'
            )
        for name in matches:
            if _suffix(name) is None:
                raise DataError(
                    f"{parameter}: {name} is of no known kind; rename or convert it to one of {', '.join(_READERS)}."
                )
        found.update(matches)
    if not found:
        raise DataError(f"{parameter}: the list is empty; name at least one file, folder or glob.")
    return sorted(found)


def stdlib_files() -> list[str]:
    """The Python standard library's own modules on this machine, without their tests (about 12 MB)."""
    found: list[str] = []
    for folder, subfolders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
        found.extend(os.path.join(folder, name) for name in names if name.endswith(".py"))
    return sorted(found)
