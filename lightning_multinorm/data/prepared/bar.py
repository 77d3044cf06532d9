"""The progress of `prepare`: a bar with documents, tokens and speed, and in a log file a line for each shard instead.

Stands on `documents` and `prepare`.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from typing_extensions import override

from lightning_multinorm.data.prepared.documents import Tokenised
from lightning_multinorm.data.prepared.manifest import Place, Shard, Split
from lightning_multinorm.data.prepared.prepare import Report

_COUNTS = "{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens, {task.fields[speed]:,.0f} tokens/s"


class Position:
    """How far a source has been read, in bytes of its files.

    Args:
        names: Of the files; if one of them is not on this machine, nothing is known.
        start: Where reading begins.
    """

    def __init__(self, names: Sequence[str], start: Place) -> None:
        here = all(os.path.isfile(name) for name in names)
        self._sizes = [os.path.getsize(name) for name in names] if here else []
        self.total: int | None = sum(self._sizes) or None
        self._file = start[0]
        self._before = self._behind = sum(self._sizes[: self._file])
        self._text = self._text_behind = 0

    def after(self, documents: Tokenised) -> int:
        """Where it is after these documents; inside a file, judged by its text, of which one byte was one or less."""
        if not self._sizes:
            return 0
        file = documents.places[-1][0]
        if file > self._file:
            self._behind = sum(self._sizes[:file])
            self._text_behind += self._text
            self._file, self._text = file, 0
        self._text += int(documents.sizes.sum())
        ratio = (self._behind - self._before) / self._text_behind if self._text_behind else 1.0
        return self._behind + min(int(self._text * ratio), self._sizes[file])


class Bar(Report):
    """Shows a split as it is written.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(20), TaskProgressColumn(), TextColumn(_COUNTS))
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)

    @contextmanager
    def shown(self, name: str, files: Sequence[str], split: Split) -> Iterator[None]:
        """While the context lasts.

        Args:
            name: Of the split.
            files: Of the source.
            split: What there is of it already.
        """
        self._position = Position(files, split.next)
        self._documents, self._tokens, self._new = split.documents, split.tokens, 0
        self._began = time.monotonic()
        with self._progress:
            self._task = self._progress.add_task(name, total=self._position.total, **self._fields())
            yield

    def _fields(self) -> dict[str, Any]:
        speed = self._new / max(1e-9, time.monotonic() - self._began)
        return {"documents": self._documents, "tokens": self._tokens, "speed": speed}

    @override
    def wrote(self, documents: Tokenised) -> None:
        self._documents += len(documents.places)
        self._tokens += len(documents.tokens)
        self._new += len(documents.tokens)
        self._progress.update(self._task, completed=self._position.after(documents), **self._fields())

    @override
    def finished(self, path: Path, shard: Shard) -> None:
        if not self._console.is_terminal:
            speed = self._fields()["speed"]
            self._console.print(f"{path}: {shard.tokens:,} tokens of {shard.documents:,} documents, {speed:,.0f}/s")
