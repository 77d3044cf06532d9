"""Where documents come from: C4 on the hub, local files, or the Python standard library.

Each source becomes a pair of streaming `datasets.IterableDataset`s with a "text" column, one to train on and one held
out; nothing is downloaded ahead or converted on disk. Stands on `files`, `hub` and `errors`.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from datasets import IterableDataset, load_dataset
from datasets.distributed import split_dataset_by_node

from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.files import find_files, read_documents, stdlib_files
from lightning_multinorm.data.hub import hub_is_reachable, reason

Part = Literal["train", "held-out", "all"]

_WITHOUT_HUB = (
    "data.source 'c4' streams allenai/c4 from the Hugging Face hub, which failed ({why}): "
    "train on what is here with --data.source stdlib (or on local files), "
    "or point --data.source at local copies of the shards (e.g. 'c4/en/*.json.gz')."
)


@dataclass(frozen=True)
class Corpus:
    """A source, split by document.

    Attributes:
        train: Documents to train on.
        held_out: Documents that training never sees.
        fingerprint: Identifies the training documents and their order, wherever the files lie; kept in checkpoints.
    """

    train: IterableDataset
    held_out: IterableDataset
    fingerprint: str


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


def _generate(files: list[str], text_field: str, part: Part, fraction: float) -> Iterator[dict[str, str]]:
    for path in files:
        for text in read_documents(path, text_field):
            if part == "all" or is_held_out(text, fraction) == (part == "held-out"):
                yield {"text": text}


def _identify(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def _stream(files: list[str], text_field: str, part: Part, fraction: float) -> IterableDataset:
    arguments = {"files": files, "text_field": text_field, "part": part, "fraction": fraction}
    # A list in gen_kwargs is what `datasets` cuts into shards: one file, one shard.
    return IterableDataset.from_generator(_generate, gen_kwargs=arguments)


def _local(files: list[str], text_field: str, validation_files: list[str] | None, fraction: float) -> Corpus:
    next(read_documents(files[0], text_field), None)  # a wrong text_field should fail now, not in a worker process
    names = [(os.path.basename(path), os.path.getsize(path)) for path in files]
    if validation_files is None:
        train = _stream(files, text_field, "train", fraction)
        held_out = _stream(files, text_field, "held-out", fraction)
        return Corpus(train, held_out, _identify(names, text_field, fraction))
    train = _stream(files, text_field, "all", 0.0)
    return Corpus(train, _stream(validation_files, text_field, "all", 0.0), _identify(names, text_field))


def _c4(split: str) -> IterableDataset:
    if not hub_is_reachable():
        raise DataError(_WITHOUT_HUB.format(why="it cannot be reached"))
    try:
        return load_dataset("allenai/c4", "en", split=split, streaming=True).select_columns(["text"])
    except Exception as error:  # datasets, fsspec and the hub client share no base class
        raise DataError(_WITHOUT_HUB.format(why=reason(error))) from None


def open_corpus(
    source: str | list[str],
    text_field: str = "text",
    validation_files: str | list[str] | None = None,
    validation_fraction: float = 0.01,
) -> Corpus:
    """Open a source for streaming.

    Args:
        source: `"stdlib"`, `"c4"`, or local files: a path, a folder, a glob, or a list of these.
        text_field: Key or column of the text in JSON lines and Parquet files.
        validation_files: Files to hold out, in the same forms; None takes C4's own validation split, or else
            `validation_fraction` of the source's documents.
        validation_fraction: Share of documents to hold out.

    Returns:
        The two streams.

    Raises:
        DataError: If files are missing or of an unknown kind, or the hub cannot be reached.
    """
    held_out = None if validation_files is None else find_files(validation_files, "data.validation_files")
    if source == "c4":
        train = _c4("train")
        validation = _c4("validation") if held_out is None else _stream(held_out, text_field, "all", 0.0)
        return Corpus(train, validation, _identify("allenai/c4", "en"))
    files = stdlib_files() if source == "stdlib" else find_files(source, "data.source")
    return _local(files, text_field, held_out, validation_fraction)


def shuffle_shards(documents: IterableDataset, seed: int) -> IterableDataset:
    """Shuffle the order of shards (files), anew in each epoch, and leave the documents inside them in order.

    C4 is shuffled already, and a buffer of shuffled documents could not be restored on resume.

    Args:
        documents: A stream.
        seed: The same on every rank.

    Returns:
        The shuffled stream; `datasets` mixes the epoch into the order.
    """
    # More than one input shard would interleave documents of several files: without loss, but with them all open.
    return documents.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)


def rank_share(documents: IterableDataset, rank: int, world_size: int) -> IterableDataset:
    """This rank's documents: over all ranks each document exactly once per epoch.

    Whole shards are dealt out where they divide evenly or are so many that one more or less does not matter;
    otherwise each rank reads all shards and keeps every `world_size`-th document.

    Args:
        documents: A stream, in the same order on every rank.
        rank: This process.
        world_size: Number of processes.

    Returns:
        A new dataset object, so that setting its epoch touches no other process (the counter is shared memory).
    """
    many = documents.num_shards >= 16 * world_size
    return split_dataset_by_node(documents, rank, world_size, strategy="shards" if many else "auto")
