"""Where documents lie: numbered shards, each read from any document on. Stands on `files`, `hub` and `errors`."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from datasets import IterableDataset
from typing_extensions import override

from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.files import read_documents
from lightning_multinorm.data.hub import reason

Part = Literal["train", "held-out", "all"]


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out part, decided by its content alone.

    Copies of a document land on the same side, in any process and in any file, so nothing leaks.

    Args:
        text: The document.
        fraction: Expected share of documents held out.

    Returns:
        True for held out.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


@dataclass(frozen=True)
class Split:
    """A part of the documents.

    Attributes:
        part: "train" or "held-out" by `is_held_out`, or "all".
        fraction: Expected share held out.
    """

    part: Part = "all"
    fraction: float = 0.0

    def __contains__(self, text: str) -> bool:
        return self.part == "all" or is_held_out(text, self.fraction) == (self.part == "held-out")


class Shards(ABC):
    """Documents in shards.

    A document's number counts all documents of its shard, those of the other split included, so that it is found again
    without reading the text of those before it.

    Attributes:
        names: What to call each shard.
        split: The part of the documents that is read.
    """

    names: Sequence[str]
    split: Split

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def _read(self, index: int, start: int, step: int) -> Iterator[tuple[int, str]]:
        """Documents of either split."""

    def documents(self, index: int, start: int = 0, step: int = 1) -> Iterator[tuple[int, str]]:
        """Documents of one shard.

        Args:
            index: Which shard.
            start: Number of the first document.
            step: Every how-manieth from there on.

        Yields:
            Number and text of those that belong to the split.

        Raises:
            DataError: If the shard cannot be read.
        """
        return (document for document in self._read(index, start, step) if document[1] in self.split)

    def texts(self) -> Iterator[str]:
        """All documents, shard by shard."""
        for index in range(len(self)):
            yield from (text for _, text in self.documents(index))


@dataclass(frozen=True)
class LocalShards(Shards):
    """Files on this machine; one of no known kind is read as plain text.

    Attributes:
        names: Their paths.
        text_field: Key or column of the text in JSON lines and Parquet files.
        split: The part of the documents that is read.
    """

    names: Sequence[str]
    text_field: str = "text"
    split: Split = Split()

    @override
    def _read(self, index: int, start: int, step: int) -> Iterator[tuple[int, str]]:
        return read_documents(self.names[index], self.text_field, start, step)


@dataclass(frozen=True)
class StreamedShards(Shards):
    """Files elsewhere, streamed by `datasets`, which tries again when a connection breaks.

    Attributes:
        names: Their addresses.
        stream: All of them, one shard each, with a column of text.
        text_field: That column.
        split: The part of the documents that is read.
    """

    names: Sequence[str]
    stream: IterableDataset
    text_field: str = "text"
    split: Split = Split()

    @override
    def _read(self, index: int, start: int, step: int) -> Iterator[tuple[int, str]]:
        shard = self.stream.shard(num_shards=len(self.names), index=index).skip(start)
        try:
            for number, example in enumerate(shard, start):
                if (number - start) % step == 0:
                    yield number, self._text(example, index)
        except DataError:
            raise
        except Exception as error:  # datasets, fsspec and the hub client share no base class
            raise DataError(
                f"{self.names[index]} could not be read ({reason(error)}); check the connection and the file, and "
                "go on with --ckpt_path last."
            ) from None

    def _text(self, example: dict[str, object], index: int) -> str:
        text = example.get(self.text_field)
        if type(text) is not str:
            raise DataError(
                f"{self.names[index]}: no text under the key {self.text_field!r} (found: {', '.join(example)}); "
                "set --data.text_field to the key that holds the text."
            )
        return text
