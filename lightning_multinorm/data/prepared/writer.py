"""Shards onto the disk: under its name a shard is whole, flushed and known by its checksum, or it is not there.

Stands on `manifest` and `errors`.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from lightning_multinorm.checkpoints.files import flush_folder
from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.prepared.manifest import Manifest, Place, Shard, shard_name

_CHUNK = 16 * 2**20
_REMEDY = "copy it again, or delete it and run the same `prepare` again, which writes it and those after it anew."


class ShardWriter:
    """Takes the tokens of a shard as they come; what is not closed leaves nothing behind.

    Args:
        path: The shard's name in the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens = 0
        self._documents = 0
        self._bytes = 0
        self._digest = hashlib.blake2b(digest_size=32)
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by close() or __exit__()

    def add(self, tokens: NDArray, documents: int, size: int) -> None:
        """Append the tokens of whole documents, of `size` bytes of text."""
        data = tokens.view(np.uint8).data
        self._digest.update(data)
        self._file.write(data)
        self.tokens += len(tokens)
        self._documents += documents
        self._bytes += size

    def close(self, next_place: Place) -> Shard:
        """Give the shard its name.

        Args:
            next_place: Where in the source the next one begins.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        flush_folder(self.path.parent)
        return Shard(self.tokens, self._documents, self._bytes, self._digest.hexdigest(), next_place)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            try:
                self._file.close()
            finally:  # closing a file on a full disk fails too
                self._temporary.unlink(missing_ok=True)


def verify(folder: Path, manifest: Manifest, progress: Callable[[int], None] = lambda size: None) -> None:
    """Read all shards and compare their checksums.

    Args:
        folder: Where they lie.
        manifest: What they should be.
        progress: Told the size of each piece that was read, in bytes.

    Raises:
        DataError: Naming the first that is not as it was written.
    """
    for name, split in manifest.splits.items():
        for number, shard in enumerate(split.shards):
            path = folder / shard_name(name, number)
            digest = hashlib.blake2b(digest_size=32)
            try:
                with open(path, "rb") as file:
                    while piece := file.read(_CHUNK):
                        digest.update(piece)
                        progress(len(piece))
            except OSError as error:
                raise DataError(f"{path} cannot be read ({error.strerror}); {_REMEDY}") from None
            if digest.hexdigest() != shard.checksum:
                raise DataError(f"{path} is not as it was written; {_REMEDY}")
