"""From documents to batches: the endless training stream, and the sized loader around it.

B = sequences in a batch, T = sequence length. A batch is a dict of int64 tensors: "input_ids" (B, T), "labels" (B, T)
where labels[:, i] is the token after input_ids[:, i] or -100, and "bytes" (B,), the UTF-8 bytes of the labels' text.
Stands on `packing`, `tokenizer`, `sources` and `errors`.
"""

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.packing import IGNORED, Tokens, join, pack
from lightning_multinorm.data.sources import rank_share, shuffle_shards
from lightning_multinorm.data.tokenizer import encode, end_of_text_id, token_byte_lengths

Batch = dict[str, Tensor]

_DOCUMENTS_AT_ONCE = 32  # enough for the tokenizer's threads, little enough that the first batch comes soon


class Vocabulary:
    """A tokenizer with what rows need to know of it, worked out once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.end_of_text = end_of_text_id(tokenizer)
        self.byte_lengths = token_byte_lengths(tokenizer)

    def stream(self, texts: list[str]) -> Tokens:
        """Tokens of several documents, each followed by end-of-text."""
        return join(encode(self.tokenizer, texts), self.end_of_text)

    def batch(self, rows: Tokens) -> Batch:
        """Inputs, shifted labels and byte counts of rows.

        Args:
            rows: Shape (B, T + 1); `IGNORED` where there is no token.

        Returns:
            The batch described at the head of this file.
        """
        tokens = torch.from_numpy(rows)
        labels = tokens[:, 1:].contiguous()
        inputs = tokens[:, :-1].clone()
        inputs[inputs == IGNORED] = self.end_of_text  # any valid id: nothing is predicted from it
        sizes = torch.where(labels == IGNORED, 0, self.byte_lengths[labels.clamp(min=0)])
        return {"input_ids": inputs, "labels": labels, "bytes": sizes.sum(dim=1)}


def groups(texts: Iterator[str]) -> Iterator[list[str]]:
    """Documents in groups for the tokenizer."""
    while group := list(islice(texts, _DOCUMENTS_AT_ONCE)):
        yield group


class Batches(IterableDataset[Batch]):
    """Whole batches in a fixed number, made in this process or in a `DataLoader`'s workers."""

    @abstractmethod
    def __len__(self) -> int:
        """Batches in all."""

    @abstractmethod
    def start_after(self, done: int, workers: int) -> int:
        """Leave out the first batches in the iterations to come.

        Args:
            done: How many.
            workers: Worker processes that will iterate; 0 for none.

        Returns:
            How many of them come all the same, at the beginning, and are to be thrown away.
        """


@dataclass(eq=False)
class TrainingBatches(Batches):
    """A fixed number of batches out of documents repeated for as many epochs as that takes.

    The stream is a function of the arguments alone; batch k comes from worker k mod workers. After a resume the
    stream is replayed up to `skip`, which is exact and costs the time to tokenise what was trained on.

    Attributes:
        documents: The training documents.
        vocabulary: How to make tokens of them.
        sequence_length: T.
        batch_size: B.
        batches: Batches in all, the skipped ones included; split over the workers.
        rank: This process among those that see different data.
        world_size: Number of these.
        seed: Of the shard order and the mixing.
        mix_rows: Rows that are shuffled together before they are cut into batches; 0 for the order of the documents.
        skip: Batches not to be yielded, from the beginning; rounded down to a multiple of the number of workers.
    """

    documents: datasets.IterableDataset
    vocabulary: Vocabulary
    sequence_length: int
    batch_size: int
    batches: int
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    mix_rows: int = 0
    skip: int = 0

    @override
    def __len__(self) -> int:
        return self.batches

    @override
    def start_after(self, done: int, workers: int) -> int:
        self.skip = done
        return done % max(1, workers)  # workers start together, at a full round

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        own = len(range(index, self.batches, workers))
        for rows in islice(self._batches_of_rows(), self.skip // workers, own):
            yield self.vocabulary.batch(rows)

    def _batches_of_rows(self) -> Iterator[Tokens]:
        ready: list[Tokens] = []
        rest = np.empty(0, dtype=np.int64)
        for texts in self._groups_of_documents():
            rows, rest = pack(np.concatenate([rest, self.vocabulary.stream(texts)]), self.sequence_length)
            ready.append(rows)
            if sum(map(len, ready)) >= max(self.batch_size, self.mix_rows):
                pool = np.concatenate(ready)
                if self.mix_rows:
                    # A function of what is mixed, so that a replayed stream is mixed alike.
                    np.random.default_rng((self.seed, len(pool), int(pool.sum()))).shuffle(pool)
                full = len(pool) - len(pool) % self.batch_size
                yield from pool[:full].reshape(-1, self.batch_size, self.sequence_length + 1)
                ready = [pool[full:]]

    def _groups_of_documents(self) -> Iterator[list[str]]:
        shuffled = shuffle_shards(self.documents, self.seed)
        for epoch in count():
            share = rank_share(shuffled, self.rank, self.world_size)
            share.set_epoch(epoch)
            empty = True
            for texts in groups(example["text"] for example in share):
                empty = False
                yield texts
            if empty:
                raise DataError(
                    f"rank {self.rank} of {self.world_size} found no training document; give more files in "
                    "--data.source, lower --data.validation_fraction, or use fewer ranks and --data.num_workers."
                )


def _one_thread(worker: int) -> None:
    # Each worker has a core; the tokenizer's own threads on top would warn about the fork and compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


class BatchLoader:
    """What the Trainer iterates over: sized, so that Lightning fetches nothing ahead and knows the end.

    Not a `DataLoader` itself: Lightning would warn on every run that an iterable dataset with a length might be wrong,
    and that few workers may be slow, which one tokenising process of a million tokens a second is not.

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
    ) -> None:
        """Wrap a dataset.

        Args:
            dataset: What to make in the workers.
            num_workers: Processes to make them in.
            pin_memory: Whether batches go to page-locked memory.
            consumed: Number of batches the Trainer is done with; asked when the first batch is wanted.
        """
        self._batches = dataset  # under the name `dataset` Lightning would find it, and warn
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._consumed = consumed

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
        surplus = self._batches.start_after(done, self.num_workers)
        loader = DataLoader(
            self._batches,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=_one_thread if self.num_workers else None,
            generator=torch.Generator(),  # its seed for workers is not to be drawn from the model's random numbers
        )
        yield from islice(loader, surplus, None)

    def state_dict(self) -> dict[str, Any]:
        """The number of batches consumed, the same on every rank."""
        return {"batches": self._consumed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do: Lightning restores the counter that `consumed` reads."""
