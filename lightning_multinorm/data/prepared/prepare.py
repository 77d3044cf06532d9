"""A source into a folder of prepared data, from the beginning or from where an interrupted run stopped.

What is on the disk is at any moment a manifest of shards that are whole, so that a run may be killed anywhere: the same
command goes on behind the last of them, and ends with the same bytes as if it had not been. Stands on `writer`,
`documents`, `manifest`, `shards`, `vocabulary` and `tokenizer`.
"""

import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.hub import reason
from lightning_multinorm.data.prepared.documents import Tokenised, tokenised
from lightning_multinorm.data.prepared.manifest import (
    NAME,
    TOKENIZER,
    Manifest,
    Shard,
    Split,
    read_manifest,
    shard_name,
)
from lightning_multinorm.data.prepared.writer import ShardWriter
from lightning_multinorm.data.shards import Shards
from lightning_multinorm.data.tokenizer import end_of_text_id, identify, largest_text_id, load_tokenizer
from lightning_multinorm.data.vocabulary import Vocabulary

_LOCK = ".lock"


class Report:
    """Told what has been written; this one keeps it to itself."""

    def wrote(self, documents: Tokenised) -> None:
        """Documents into the shard that is being written."""

    def finished(self, path: Path, shard: Shard) -> None:
        """A shard."""


SILENT = Report()


@contextmanager
def opened(folder: Path) -> Iterator[None]:
    """A folder to prepare into, made if it is not there, for this process alone.

    Raises:
        DataError: If it holds anything else, or another process is at it, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        strange = {path.name for path in folder.iterdir()} - {_LOCK, f"{NAME}.tmp"}
        if strange and not (folder / NAME).exists():
            raise DataError(
                f"{folder} holds {min(strange)} and no prepared data; nothing in it was touched: name an empty or a "
                "new folder with --out."
            )
        with open(folder / _LOCK, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DataError(
                    f"{folder} is in use by another `prepare`, or its file system has no locks ({error.strerror}); "
                    "wait for the other to end, or name another folder with --out."
                ) from None
            yield
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written ({error.strerror}); what is complete is kept, so put that right and run the "
            "same command again."
        ) from None


def begin(
    folder: Path, settings: dict[str, Any], corpus: str, load: Callable[[], PreTrainedTokenizerBase]
) -> tuple[Manifest, Vocabulary]:
    """The manifest of a folder and the tokenizer saved in it, new ones or those of the run to go on with.

    Args:
        folder: As `opened` gives it.
        settings: The options that decide what is written.
        corpus: Fingerprint of the documents.
        load: Makes the tokenizer where the folder has none yet.

    Raises:
        DataError: If the folder was begun with other settings or documents.
    """
    saved = folder / TOKENIZER
    if (folder / NAME).exists():
        manifest = read_manifest(folder)
        _refuse_other(folder, manifest, settings, corpus)
        tokenizer = load_tokenizer(str(saved), [], 0) if saved.is_dir() else load()
        if identify(tokenizer) != manifest.tokenizer:
            raise DataError(f"the tokenizer is not the one {folder} was begun with; name another folder with --out.")
    else:
        tokenizer = load()
        dtype = "uint16" if largest_text_id(tokenizer) < 2**16 else "uint32"
        manifest = Manifest(settings, corpus, identify(tokenizer), end_of_text_id(tokenizer), dtype)
        manifest.write(folder)
    if not saved.is_dir():
        _save_tokenizer(tokenizer, saved)
    _forget_missing(folder, manifest)
    return manifest, Vocabulary(tokenizer)


def _refuse_other(folder: Path, manifest: Manifest, settings: dict[str, Any], corpus: str) -> None:
    for name, now in settings.items():
        before = manifest.settings.get(name)
        if before != now and name != "data.source":  # the same documents may have been named in another way
            raise DataError(
                f"{folder} was begun with {name} = {before!r}, now it is {now!r}; nothing in it was touched: restore "
                f"that {name}, or name another folder with --out."
            )
    if manifest.corpus != corpus:
        raise DataError(
            f"{folder} was begun with other documents than data.source {settings['data.source']} has now; nothing in "
            "it was touched: restore them, or name another folder with --out."
        )


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        tokenizer.save_pretrained(temporary)
    except Exception as error:  # tokenizers raises Exception itself
        raise DataError(f"the tokenizer cannot be saved in {path.parent} ({reason(error)}); free some space.") from None
    os.rename(temporary, path)


def _forget_missing(folder: Path, manifest: Manifest) -> None:
    """Shards that were deleted, and those after them, are to be written anew."""
    for name, split in manifest.splits.items():
        for number in range(len(split.shards)):
            if not (folder / shard_name(name, number)).exists():
                manifest.splits[name] = Split(split.shards[:number])
                break


def write_split(
    folder: Path,
    manifest: Manifest,
    name: str,
    source: Shards,
    vocabulary: Vocabulary,
    shard_tokens: int,
    limit: int | None = None,
    report: Report = SILENT,
) -> None:
    """Write the shards of a split that are missing.

    Args:
        folder: Where to.
        manifest: Of the folder; on the disk too it gets each shard as soon as that is whole.
        name: "train" or "validation".
        source: All documents of the split.
        vocabulary: How to make tokens of them.
        shard_tokens: A shard ends behind the document that brings it to so many.
        limit: The split ends behind the document that brings it to so many; None for all of it.
        report: Told of the documents as they are written.
    """
    split = manifest.splits[name]
    if split.complete:
        return
    end = sys.maxsize if limit is None else limit
    with closing(tokenised(source, split.next, vocabulary, manifest.token_type)) as groups:
        rest = next(groups, None) if split.tokens < end else None
        while rest is not None and split.tokens < end:
            goal = min(shard_tokens, end - split.tokens)
            path = folder / shard_name(name, len(split.shards))
            with ShardWriter(path) as writer:
                while rest is not None and writer.tokens < goal:
                    documents, rest = rest.split(goal - writer.tokens)
                    writer.add(documents.tokens, len(documents.places), int(documents.sizes.sum()))
                    report.wrote(documents)
                    rest = rest or next(groups, None)
                split.shards.append(writer.close(documents.places[-1]))
            manifest.write(folder)
            report.finished(path, split.shards[-1])
    split.complete = True
    manifest.write(folder)
