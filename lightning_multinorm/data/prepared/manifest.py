"""What a folder of prepared data holds and how it came about: `manifest.json`, which appears whole or not at all.

Stands on `errors`.
"""

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from lightning_multinorm.checkpoints.files import new_file
from lightning_multinorm.data.errors import DataError

FORMAT = "lightning_multinorm tokens 1"
NAME = "manifest.json"
TOKENIZER = "tokenizer"

Place = tuple[int, int]
"""Where in a source a document is: number of its shard, and its own number in there."""


@dataclass(frozen=True)
class Shard:
    """One file of tokens.

    Attributes:
        tokens: How many it holds, at least one: the end-of-text of each document included.
        documents: How many it holds, all of them whole.
        bytes: UTF-8 bytes of their text.
        checksum: BLAKE2b of the file, 32 bytes in hexadecimal.
        next: Where in the source the next shard begins.
    """

    tokens: int
    documents: int
    bytes: int
    checksum: str
    next: Place

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Self:
        """A shard as JSON holds it."""
        shard, number = entry["next"]
        counts = [entry["tokens"] - 1, entry["documents"], entry["bytes"], shard, number]
        if any(type(count) is not int or count < 0 for count in counts) or type(entry["checksum"]) is not str:
            raise ValueError
        return cls(entry["tokens"], entry["documents"], entry["bytes"], entry["checksum"], (shard, number))


@dataclass
class Split:
    """The shards of "train" or "validation", in their order.

    Attributes:
        shards: Those that are written.
        complete: Whether these are all.
    """

    shards: list[Shard] = field(default_factory=list)
    complete: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents of all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def next(self) -> Place:
        """Where in the source the first shard that is missing begins."""
        return self.shards[-1].next if self.shards else (0, 0)


@dataclass
class Manifest:
    """A folder of prepared data.

    Attributes:
        settings: The options that decided its content, by the names that the command line has for them.
        corpus: Fingerprint of the documents that it was made of.
        tokenizer: Hash of the vocabulary, as `tokenizer.identify` makes it.
        end_of_text: Id put after each document.
        dtype: "uint16", or "uint32" for vocabularies that need it.
        splits: "validation" and "train".
    """

    settings: dict[str, Any]
    corpus: str
    tokenizer: str
    end_of_text: int
    dtype: str
    splits: dict[str, Split] = field(default_factory=lambda: {"validation": Split(), "train": Split()})

    @property
    def complete(self) -> bool:
        """Whether all shards are written."""
        return all(split.complete for split in self.splits.values())

    @property
    def token_type(self) -> np.dtype[Any]:
        """Of a token in a file."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def fingerprint(self) -> str:
        """Identifies the tokens to train on and their order, wherever the folder lies."""
        parts = [FORMAT, self.tokenizer, self.dtype, *(shard.checksum for shard in self.splits["train"].shards)]
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()

    def command(self, folder: Path) -> str:
        """The command that goes on with the folder, or checks it."""
        values = {**self.settings, "out": str(folder)}
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
        options = (word for name, text in texts.items() for word in (f"--{name}", text))
        return shlex.join(["python", "-m", "lightning_multinorm", "prepare", *options])

    def write(self, folder: Path) -> None:
        """Put it in the place of the one before, in one step."""
        text = json.dumps({"format": FORMAT, "complete": self.complete, **asdict(self)}, indent=1)
        with new_file(folder / NAME) as file:
            file.write(f"{text}\n".encode())


def shard_name(split: str, number: int) -> str:
    """Name of a file; not kept in the manifest, so that no manifest can point out of its folder."""
    return f"{split}-{number:05}.bin"


def is_prepared(source: str | list[str]) -> bool:
    """Whether `data.source` names a folder with a manifest, which makes it prepared data and no folder of texts."""
    return isinstance(source, str) and source not in ("c4", "stdlib") and (Path(source).expanduser() / NAME).is_file()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, from whoever it came: nothing in it is taken on trust but numbers and settings.

    Raises:
        DataError: If it cannot be read or is not one of this format.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or content["dtype"] not in ("uint16", "uint32"):
            raise ValueError
        splits = {
            name: Split([Shard.of(entry) for entry in split["shards"]], split["complete"] is True)
            for name, split in content["splits"].items()
        }
        settings, corpus = content["settings"], content["corpus"]
        manifest = Manifest(settings, corpus, content["tokenizer"], content["end_of_text"], content["dtype"], splits)
        types = [type(value) for value in (settings, corpus, manifest.tokenizer, manifest.end_of_text)]
        if splits.keys() != {"validation", "train"} or types != [dict, str, str, int]:
            raise ValueError
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path and its rights.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{path} is not a manifest of prepared data ({FORMAT}); copy the folder again or prepare it anew, or, if "
            "it is a folder of texts, name its files (a quoted glob)."
        ) from None
    return manifest
