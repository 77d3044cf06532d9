"""The tokens of a split as one stream, mapped into memory shard by shard, and rows out of it at random.

T = sequence length. Row k is `stream[k*T : k*T + T + 1]`, as `packing` cuts it. Stands on `manifest` and `errors`.
"""

from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.prepared.manifest import Manifest, shard_name

Tokens = NDArray[Any]


class TokenStream:
    """All shards of a split, one behind the other; nothing is read before it is asked for.

    Args:
        folder: Of prepared data.
        manifest: Its manifest.
        split: "train" or "validation".

    Raises:
        DataError: Naming the first file that is missing or has another size than it was written with.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        self._origin = (folder, manifest, split)
        self._type = manifest.token_type
        self._end_of_text = manifest.end_of_text
        lengths = [shard.tokens for shard in manifest.splits[split].shards]
        self._shards = [self._map(folder / shard_name(split, k), length) for k, length in enumerate(lengths)]
        self._starts = np.array([0, *accumulate(lengths)])

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStream, self._origin  # a worker process maps the files again

    def _map(self, path: Path, tokens: int) -> Tokens:
        expected = tokens * self._type.itemsize
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); copy the folder again.") from None
        if size != expected:
            raise DataError(
                f"{path} has {size} bytes, not the {expected} it was written with; copy it again, or delete it and run "
                "the same `prepare` again."
            )
        # Unlike numpy's, torch's map keeps no file open: there may be more shards than a process may open.
        kind = {2: torch.uint16, 4: torch.uint32}[self._type.itemsize]
        return torch.from_file(str(path), shared=False, size=tokens, dtype=kind).numpy().view(self._type)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row_count(self, sequence_length: int) -> int:
        """Rows which together have every token but the first as a target; the last may be shorter."""
        return -(-(len(self) - 1) // sequence_length)

    def beginning(self, tokens: int) -> Tokens:
        """A copy of the first tokens."""
        out = np.empty(min(tokens, len(self)), self._type)
        self._read(0, 0, out)
        return out

    def rows(self, numbers: NDArray[np.int64], sequence_length: int) -> Tokens:
        """Rows by their numbers.

        Args:
            numbers: Shape (B,).
            sequence_length: T.

        Returns:
            Shape (B, T + 1), in the type they are stored in; what the last row lacks is filled with end-of-text.
        """
        out = np.empty((len(numbers), sequence_length + 1), self._type)
        begins = numbers * sequence_length
        shards = np.searchsorted(self._starts, begins, side="right") - 1
        offsets = begins - self._starts[shards]
        for row, shard, offset in zip(out, shards.tolist(), offsets.tolist(), strict=True):
            part = self._shards[shard][offset : offset + sequence_length + 1]
            if len(part) == len(row):
                row[:] = part
            else:
                self._read(shard, offset, row)
        return out

    def _read(self, shard: int, offset: int, out: Tokens) -> None:
        """Fill `out` across the borders of shards, and behind the last with end-of-text."""
        done = 0
        while done < len(out) and shard < len(self._shards):
            part = self._shards[shard][offset : offset + len(out) - done]
            out[done : done + len(part)] = part
            done, shard, offset = done + len(part), shard + 1, 0
        out[done:] = self._end_of_text
