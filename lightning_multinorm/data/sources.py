"""What `data.source` can name: C4 on the hub, files here or elsewhere, or the Python standard library.

Nothing is downloaded ahead or converted on disk. Stands on `shards`, `files`, `hub` and `errors`.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

from datasets import load_dataset_builder

from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.files import find_files, read_documents, stdlib_files
from lightning_multinorm.data.hub import hub_is_reachable, reason
from lightning_multinorm.data.shards import LocalShards, Shards, Split, StreamedShards

_C4 = "hf://datasets/allenai/c4/en/c4-{part}.*.json.gz"
_WITHOUT_HUB = (
    "data.source 'c4' streams allenai/c4 from the Hugging Face hub, which failed ({why}): "
    "train on what is here with --data.source stdlib (or on local files), "
    "or point --data.source at local copies of the shards (e.g. 'c4/en/*.json.gz')."
)
_BUILDERS = {".json.gz": "json", ".jsonl.gz": "json", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Corpus:
    """A source, split by document.

    Attributes:
        train: Documents to train on.
        held_out: Documents that training never sees.
        fingerprint: Identifies the training documents and their order, wherever the files lie; kept in checkpoints.
    """

    train: Shards
    held_out: Shards
    fingerprint: str


def _identify(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def _elsewhere(patterns: str | Sequence[str]) -> bool:
    """Whether these are addresses ("https://…", "hf://…", "s3://…"); refuses a mixture with local files."""
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    addresses = [pattern for pattern in listed if "://" in pattern]
    if addresses and len(addresses) < len(listed):
        raise DataError(
            f"data.source mixes local files with addresses ({addresses[0]}); give one kind, or copy the others here."
        )
    return bool(addresses)


def _stream(patterns: str | Sequence[str], text_field: str, split: Split) -> StreamedShards:
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    kinds = {next((kind for end, kind in _BUILDERS.items() if pattern.endswith(end)), None) for pattern in listed}
    if len(kinds) != 1 or None in kinds:
        raise DataError(
            f"data.source: addresses must all be JSON lines or all Parquet ({', '.join(_BUILDERS)}); got {listed}."
        )
    builder = load_dataset_builder(str(kinds.pop()), data_files={"train": listed})
    names = [str(name) for name in builder.config.data_files["train"]]
    return StreamedShards(names, builder.as_streaming_dataset("train"), text_field, split)


def _c4(part: str) -> StreamedShards:
    if not hub_is_reachable():
        raise DataError(_WITHOUT_HUB.format(why="it cannot be reached"))
    try:
        return _stream(_C4.format(part=part), "text", Split())
    except Exception as error:  # datasets, fsspec and the hub client share no base class
        raise DataError(_WITHOUT_HUB.format(why=reason(error))) from None


def _open(patterns: str | Sequence[str], parameter: str, text_field: str, split: Split) -> Shards:
    if not _elsewhere(patterns):
        local = patterns if isinstance(patterns, str) else list(patterns)
        return LocalShards(find_files(local, parameter), text_field, split)
    try:
        return _stream(patterns, text_field, split)
    except DataError:
        raise
    except Exception as error:  # as above
        raise DataError(
            f"{parameter}: {patterns} could not be opened ({reason(error)}); check the address and the connection."
        ) from None


def _sizes(shards: Shards) -> list[tuple[str, int]]:
    if isinstance(shards, StreamedShards):
        return [(os.path.basename(name), 0) for name in shards.names]
    return [(os.path.basename(path), os.path.getsize(path)) for path in shards.names]


def open_corpus(
    source: str | list[str],
    text_field: str = "text",
    validation_files: str | list[str] | None = None,
    validation_fraction: float = 0.01,
) -> Corpus:
    """Open a source for streaming.

    Args:
        source: `"stdlib"`, `"c4"`, or files: a path, a folder, a glob, an address, or a list of these.
        text_field: Key or column of the text in JSON lines and Parquet files.
        validation_files: Files to hold out, in the same forms; None takes C4's own validation split, or else
            `validation_fraction` of the source's documents.
        validation_fraction: Share of documents to hold out.

    Returns:
        The two parts.

    Raises:
        DataError: If files are missing or of an unknown kind, or an address cannot be reached.
    """
    held_out = None
    if validation_files is not None:
        held_out = _open(validation_files, "data.validation_files", text_field, Split())
    if source == "c4":
        return Corpus(_c4("train"), held_out or _c4("validation"), _identify("allenai/c4", "en"))
    patterns = stdlib_files() if source == "stdlib" else source
    split = Split() if held_out else Split("train", validation_fraction)
    train = _open(patterns, "data.source", text_field, split)
    if isinstance(train, LocalShards):
        next(read_documents(train.names[0], text_field), None)  # a wrong text_field should fail now, not in a worker
    parts = (_sizes(train), text_field) if held_out else (_sizes(train), text_field, validation_fraction)
    held_out = held_out or _open(patterns, "data.source", text_field, Split("held-out", validation_fraction))
    return Corpus(train, held_out, _identify(*parts))
