"""The endless order of documents, dealt over lanes, and rows of tokens out of one lane from any place on.

A lane is one process that makes batches: worker w of K on rank r is lane r·K + w. Everything here is a function of the
shards, the seed and the lane. A place in it is five integers; where a row begins inside a document is a place like any
other, so that what is left over of a document is found again, and need not be kept.
T = sequence length. Stands on `shards`, `vocabulary`, `packing` and `errors`.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from itertools import count, islice
from typing import Literal

import numpy as np

from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.packing import Tokens, pack, pad
from lightning_multinorm.data.shards import Shards
from lightning_multinorm.data.vocabulary import DOCUMENTS_AT_ONCE, Vocabulary

Packing = Literal["stream", "paper"]


@dataclass(frozen=True)
class Place:
    """Where a batch comes from: where its pool of rows begins, and which batch of the pool it is.

    Attributes:
        epoch: Which time through the shards.
        shard: Position of the shard in this epoch's order.
        document: Number of the document in the shard.
        token: Number of the token in the document.
        batch: Number of the batch in the pool.
    """

    epoch: int = 0
    shard: int = 0
    document: int = 0
    token: int = 0
    batch: int = 0

    def state(self) -> list[int]:
        """As plain numbers, for a checkpoint."""
        return list(astuple(self))


@dataclass(frozen=True)
class Lane:
    """One of the shares in which documents are dealt.

    Attributes:
        shards: Documents, in the same order on every rank.
        seed: Of the order of shards, which is another one in each epoch.
        number: This lane.
        lanes: How many there are.
    """

    shards: Shards
    seed: int = 0
    number: int = 0
    lanes: int = 1

    @property
    def takes_whole_shards(self) -> bool:
        """Whether shards are dealt whole: where they divide evenly, or one more or less does not matter."""
        return len(self.shards) % self.lanes == 0 or len(self.shards) >= 16 * self.lanes

    def order(self, epoch: int) -> list[int]:
        """The order of the shards in an epoch. Documents keep theirs: C4 is shuffled already."""
        return [int(shard) for shard in np.random.default_rng((self.seed, epoch)).permutation(len(self.shards))]

    def documents(self, start: Place) -> Iterator[tuple[Place, str]]:
        """This lane's documents from a place on; over all lanes each document exactly once per epoch.

        Yields:
            The place of a document's first token, and its text.

        Raises:
            DataError: If a whole epoch has no text for this lane.
        """
        place = replace(start, token=0, batch=0)
        for epoch in count(start.epoch):
            whole, found = (place.shard, place.document) == (0, 0), False
            for shard, index in enumerate(self.order(epoch)):
                first, step = self._share(shard)
                if shard < place.shard or step == 0:
                    continue
                if shard == place.shard:
                    first = max(first, place.document)
                for document, text in self.shards.documents(index, first, step):
                    found = found or bool(text)
                    yield Place(epoch, shard, document), text
            if whole and not found:
                raise DataError(
                    f"lane {self.number} of {self.lanes} (ranks × workers) found no text to train on; give more files "
                    "in --data.source, lower --data.validation_fraction, or use fewer ranks and --data.num_workers."
                )
            place = Place()

    def _share(self, shard: int) -> tuple[int, int]:
        """The first document of this lane in a shard, and the step to the next; a step of 0 if there is none."""
        if self.takes_whole_shards:
            return 0, int(shard % self.lanes == self.number)
        # Each shard begins with another lane, so that shards of one document are dealt too.
        return (self.number - shard) % self.lanes, self.lanes


def pools(
    lane: Lane, vocabulary: Vocabulary, sequence_length: int, rows: int, packing: Packing, start: Place
) -> Iterator[tuple[Place, Tokens]]:
    """Rows of a lane in pools of equal size, each with the place at which it begins.

    Args:
        lane: Whose documents.
        vocabulary: How to make tokens of them.
        sequence_length: T.
        rows: Size of a pool.
        packing: "stream", rows cut out of one stream without padding, or "paper", a row for each document.
        start: Where the first pool begins.

    Yields:
        The place, and rows of shape (rows, T + 1).
    """
    if packing == "stream":
        yield from _packed(lane, vocabulary, sequence_length, rows, start)
        return
    documents = lane.documents(start)
    while group := list(islice(documents, rows)):
        ids = vocabulary.encode([text for _, text in group])
        yield group[0][0], pad(ids, sequence_length, vocabulary.end_of_text)


def _packed(
    lane: Lane, vocabulary: Vocabulary, sequence_length: int, rows: int, start: Place
) -> Iterator[tuple[Place, Tokens]]:
    size, held = rows * sequence_length, 0  # a pool's last token is the next one's first
    pieces: deque[tuple[Place, Tokens]] = deque()
    documents = lane.documents(start)
    used = start.token  # of the first document
    while group := list(islice(documents, DOCUMENTS_AT_ONCE)):
        for (place, _), ids in zip(group, vocabulary.encode([text for _, text in group]), strict=True):
            ids.append(vocabulary.end_of_text)
            pieces.append((replace(place, token=used), np.array(ids[used:])))
            held, used = held + len(ids) - used, 0
        while held > size:
            yield pieces[0][0], pack(_first(pieces, size + 1), sequence_length)[0]
            _drop(pieces, size)
            held -= size


def _first(pieces: deque[tuple[Place, Tokens]], tokens: int) -> Tokens:
    parts = []
    for _, piece in pieces:
        parts.append(piece[:tokens])
        tokens -= len(parts[-1])
        if tokens == 0:
            break
    return np.concatenate(parts)


def _drop(pieces: deque[tuple[Place, Tokens]], tokens: int) -> None:
    while tokens:
        place, piece = pieces.popleft()
        if len(piece) > tokens:
            pieces.appendleft((replace(place, token=place.token + tokens), piece[tokens:]))
        tokens -= min(tokens, len(piece))
