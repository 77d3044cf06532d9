"""The sized loader around batches that know where they come from, and the endless stream of training batches.

Stands on `lanes`, `vocabulary`, `ahead` and `errors`.
"""

import os
import signal
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from typing_extensions import override

from lightning_multinorm.data.ahead import ahead
from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.lanes import Lane, Packing, Place, pools
from lightning_multinorm.data.packing import Tokens
from lightning_multinorm.data.shards import Shards
from lightning_multinorm.data.vocabulary import Batch, Vocabulary

Places = dict[int, Place]
"""Where the next batch of each of a rank's workers comes from; a worker without one begins at the beginning."""

PLACE = "place"
"""Key under which a batch brings along its `Place`; taken out before the model sees it."""
_BATCHES_AHEAD = 2  # made while the model is busy


class Batches(IterableDataset[Batch]):
    """Whole batches in a fixed number, made in this process or in a `DataLoader`'s workers."""

    done: int = 0
    """Batches that are not to come in the next iteration, from the beginning."""

    @abstractmethod
    def __len__(self) -> int:
        """Batches in all, those which are done included."""

    @abstractmethod
    def batches(self, done: int) -> Iterator[Batch]:
        """Those batches after the first ``done`` ones that are this worker's."""

    def go_on(self, done: int, places: Places) -> None:
        """Begin the next iteration after ``done`` batches, of which the last ones came from these places."""
        self.done = done

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(self.done)


@dataclass(eq=False)
class TrainingBatches(Batches):
    """A fixed number of batches out of documents repeated for as many epochs as that takes.

    The stream is a function of the arguments alone; batch k comes from worker k mod workers, each of which reads a
    share of the documents of its own.

    Attributes:
        shards: The training documents.
        vocabulary: How to make tokens of them.
        sequence_length: T.
        batch_size: B.
        total: Batches in all.
        rank: This process among those that see different data.
        world_size: Number of these.
        seed: Of the shard order and the mixing.
        mix_rows: Rows that are shuffled together before they are cut into batches; 0 for the order of the documents.
        packing: How rows are made of documents.
        workers: Worker processes that will iterate; 1 if this process does.
        places: Where each of them goes on.
    """

    shards: Shards
    vocabulary: Vocabulary
    sequence_length: int
    batch_size: int
    total: int
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    mix_rows: int = 0
    packing: Packing = "stream"
    workers: int = 1
    places: Places = field(default_factory=dict)

    @override
    def __len__(self) -> int:
        return self.total

    @override
    def go_on(self, done: int, places: Places) -> None:
        self.done, self.places = done, places

    def identity(self) -> dict[str, Any]:
        """All that decides which batch comes at which step, but the shards and the tokenizer themselves."""
        names = ("world_size", "batch_size", "sequence_length", "packing", "mix_rows", "seed")
        return {**{name: getattr(self, name) for name in names}, "num_workers": self.workers}

    def position(self, worker: int, place: Place) -> dict[str, Any]:
        """Where a batch comes from, in plain numbers, and the name of the shard."""
        shard = self.lane(worker).order(place.epoch)[place.shard]
        return {"rank": self.rank, "worker": worker, "place": place.state(), "shard": self.shards.names[shard]}

    def replay(self, position: dict[str, Any]) -> Batch:
        """The batch of a position, of whatever rank."""
        stream = replace(self, rank=position["rank"])
        batch = next(stream.from_place(position["worker"], Place(*position["place"])))
        return {name: value for name, value in batch.items() if name != PLACE}

    def lane(self, worker: int) -> Lane:
        """The documents of one of this rank's workers."""
        return Lane(self.shards, self.seed, self.rank * self.workers + worker, self.world_size * self.workers)

    @override
    def batches(self, done: int) -> Iterator[Batch]:
        process = get_worker_info()
        # A `DataLoader` asks its processes in turn and begins with the first, wherever a resumed run's turn is.
        worker = (done + (process.id if process else 0)) % self.workers
        own = len(range(done + (process.id if process else 0), self.total, self.workers))
        yield from islice(self.from_place(worker, self.places.get(worker, Place())), own)

    def from_place(self, worker: int, start: Place) -> Iterator[Batch]:
        """A worker's batches from a place on, each with its place under the key `PLACE`, without end."""
        rows = self.batch_size * max(1, -(-self.mix_rows // self.batch_size))
        first = start.batch
        for place, pool in pools(
            self.lane(worker), self.vocabulary, self.sequence_length, rows, self.packing, replace(start, batch=0)
        ):
            if self.mix_rows:
                np.random.default_rng((self.seed, *place.state())).shuffle(pool)
            cut: Tokens = pool.reshape(-1, self.batch_size, pool.shape[1])
            for number in range(first, len(cut)):
                yield {**self.vocabulary.batch(cut[number]), PLACE: replace(place, batch=number)}  # type: ignore[dict-item]
            first = 0


def _one_thread(worker: int) -> None:
    # Each worker has a core; the tokenizer's own threads on top would warn about the fork and compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A signal to all processes of the run is for the training process, which ends the workers after it has saved.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class BatchLoader:
    """What the Trainer iterates over: sized, so that Lightning fetches nothing ahead and knows the end.

    Not a `DataLoader` itself: Lightning would warn on every run that an iterable dataset with a length might be wrong,
    and that few workers may be slow, which one tokenising thread of a million tokens a second is not.

    Its length counts all batches from the very beginning, also after a resume, because Lightning goes on with its own
    counter; the iterator yields only those which are still to come. It has a state for the same reason: to Lightning a
    loader without one "is not resumable".
    """

    def __init__(
        self,
        dataset: Batches,
        num_workers: int = 0,
        pin_memory: bool = False,
        consumed: Callable[[], int] = lambda: 0,
        resumed: tuple[int, Places] | None = None,
        recent: int = 2,
    ) -> None:
        """Wrap a dataset.

        Args:
            dataset: What to make.
            num_workers: Processes to make it in; 0 for a thread of this one.
            pin_memory: Whether batches go to page-locked memory.
            consumed: Number of batches the Trainer is done with; asked when the first batch is wanted.
            resumed: Number of batches that a checkpoint was done with, and from where its workers go on.
            recent: Batches whose places are kept in `last_places`.
        """
        self._batches = dataset  # under the name `dataset` Lightning would find it, and warn
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._consumed = consumed
        self._places: dict[int, Places] = {0: {}, **({resumed[0]: resumed[1]} if resumed else {})}
        self._recent = recent
        self.last_places: dict[int, tuple[int, Place]] = {}
        """Worker and place of the last batches, by the number of batches with which each is done."""

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        # A generator, so that `consumed` is asked at the first batch and not at `iter()`, which Lightning may call
        # before it has restored its counters from a checkpoint.
        if (done := self._consumed()) >= len(self) > 0:
            # Lightning would begin one empty epoch after another, for ever.
            raise DataError(
                f"all {len(self)} batches are used up after {done}, but the Trainer wants more; "
                "set --trainer.max_steps to a larger number."
            )
        places = self.places(done)
        self._batches.go_on(done, places)
        for number, batch in enumerate(self._made(), start=done):
            place = batch.pop(PLACE, None)
            if isinstance(place, Place):
                worker = number % max(1, self.num_workers)
                places = {**places, worker: replace(place, batch=place.batch + 1)}
                self.last_places[number + 1] = worker, place
                self.last_places.pop(number + 1 - self._recent, None)
            # The Trainer may be done with the batch before this one, or with this one, when it asks for the places.
            self._places = {0: {}, number: self._places.get(number, {}), number + 1: places}
            yield batch

    def _made(self) -> Iterator[Batch]:
        if self.num_workers == 0:
            yield from ahead(map(self._pinned, self._batches), _BATCHES_AHEAD)
            return
        yield from DataLoader(
            self._batches,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=_one_thread,
            generator=torch.Generator(),  # its seed for workers is not to be drawn from the model's random numbers
        )

    def _pinned(self, batch: Batch) -> Batch:
        if not self.pin_memory:
            return batch
        return {name: value.pin_memory() if name != PLACE else value for name, value in batch.items()}

    def places(self, done: int) -> Places:
        """Where each worker goes on after ``done`` batches: known of the last two, and of where training began.

        Raises:
            DataError: If it is not known.
        """
        if done not in self._places:
            raise DataError(
                f"the place in the data after {done} batches is not known; resume from a checkpoint that "
                "TextDataModule has written, or start anew from the weights alone."
            )
        return self._places[done]

    def state_dict(self) -> dict[str, Any]:
        """The number of batches consumed, the same on every rank."""
        return {"batches": self._consumed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do: Lightning restores the counter that `consumed` reads."""
