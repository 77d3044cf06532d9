"""Documents of a source, from any of them on, as tokens: read in a thread while the ones before are tokenised.

Stands on `ahead`, `manifest`, `packing`, `shards` and `vocabulary`.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_multinorm.data.ahead import ahead
from lightning_multinorm.data.packing import join
from lightning_multinorm.data.prepared.manifest import Place
from lightning_multinorm.data.shards import Shards
from lightning_multinorm.data.vocabulary import Vocabulary

_TEXT_AT_ONCE = 2**20  # characters: enough for the tokenizer's threads
_GROUPS_AHEAD = 4


@dataclass(frozen=True)
class Tokenised:
    """Successive documents.

    Attributes:
        tokens: Of all of them, an end-of-text after each.
        ends: Where in `tokens` each document ends, with its end-of-text.
        sizes: UTF-8 bytes of each.
        places: Where in the source the document after each one is.
    """

    tokens: NDArray[Any]
    ends: NDArray[np.int64]
    sizes: NDArray[np.int64]
    places: list[Place]

    def split(self, tokens: int) -> tuple["Tokenised", "Tokenised | None"]:
        """The first documents, until they have so many tokens or more, and the others, if there are any."""
        count = int(np.searchsorted(self.ends, tokens)) + 1
        if count >= len(self.places):
            return self, None
        end = self.ends[count - 1]
        first = Tokenised(self.tokens[:end], self.ends[:count], self.sizes[:count], self.places[:count])
        rest = Tokenised(self.tokens[end:], self.ends[count:] - end, self.sizes[count:], self.places[count:])
        return first, rest


def tokenised(shards: Shards, start: Place, vocabulary: Vocabulary, dtype: np.dtype[Any]) -> Generator[Tokenised]:
    """All documents from a place on, in groups.

    Args:
        shards: The source.
        start: Of the first document.
        vocabulary: How to make tokens of them; its tokenizer uses threads of its own.
        dtype: Of the tokens.

    Yields:
        Groups of about a megabyte of text, and one document at least.

    Raises:
        DataError: As the source raises it.
    """
    for places, texts, sizes in ahead(_groups(shards, start), _GROUPS_AHEAD, "documents"):
        documents = vocabulary.encode(texts)
        ends = np.cumsum([len(document) + 1 for document in documents])
        yield Tokenised(join(documents, vocabulary.end_of_text).astype(dtype), ends, np.array(sizes), places)


Group = tuple[list[Place], list[str], list[int]]


def _groups(shards: Shards, start: Place) -> Iterator[Group]:
    places, texts, sizes, held = list[Place](), list[str](), list[int](), 0
    for index in range(start[0], len(shards)):
        for number, text in shards.documents(index, start[1] if index == start[0] else 0):
            places.append((index, number + 1))
            texts.append(text)
            sizes.append(len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")))
            held += len(text) + 1
            if held >= _TEXT_AT_ONCE:
                yield places, texts, sizes
                places, texts, sizes, held = [], [], [], 0
    if texts:
        yield places, texts, sizes
