"""``python -m lightning_multinorm prepare``: from the configuration of a run to a folder of its tokens."""

import sys
from functools import partial
from pathlib import Path

from lightning.pytorch import LightningModule
from rich.console import Console
from rich.progress import Progress

from lightning_multinorm.data.datamodule import TextDataModule
from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.prepared.bar import Bar
from lightning_multinorm.data.prepared.manifest import is_prepared
from lightning_multinorm.data.prepared.prepare import begin, opened, write_split
from lightning_multinorm.data.prepared.writer import verify


class Preparer:
    """Stands where the trainer would, and prepares its data: no model is built, and no device looked for."""

    def prepare(
        self, model: LightningModule, datamodule: TextDataModule, out: str, shard_tokens: int = 100_000_000
    ) -> None:
        """Tokenise the text of a configuration once, for any number of trainings; go on where it was interrupted.

        Args:
            model: the model of the configuration, which is not looked at.
            datamodule: the data of the configuration.
            out: folder to write, or to go on with; if it is complete, its checksums are verified.
            shard_tokens: tokens in a file, more or less; an interrupted run goes on behind the last whole file.
        """
        if shard_tokens < 1:
            raise DataError(f"shard_tokens is {shard_tokens}; set it to 1 or more, e.g. 100000000.")
        if is_prepared(datamodule.source):
            raise DataError(f"data.source {datamodule.source} is prepared already; name the text that it is made of.")
        folder = Path(out).expanduser()
        try:
            with opened(folder):
                _prepare(folder, datamodule, shard_tokens)
        except KeyboardInterrupt:
            print(f"Interrupted; the same command goes on from what is complete in {folder}.", file=sys.stderr)
            sys.exit(130)


def _prepare(folder: Path, data: TextDataModule, shard_tokens: int) -> None:
    console = Console(highlight=False, soft_wrap=True)
    settings = {**data.token_options, "shard_tokens": shard_tokens}
    manifest, vocabulary = begin(folder, settings, data.corpus.fingerprint, lambda: data.tokenizer)
    found = "already complete" if manifest.complete else "complete"
    if manifest.complete:
        size = sum(split.tokens for split in manifest.splits.values()) * manifest.token_type.itemsize
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("checksums", total=size)
            verify(folder, manifest, partial(progress.advance, task))
    else:
        bar = Bar(console)
        for name, source in (("validation", data.corpus.held_out), ("train", data.corpus.train)):
            limit = data.validation_tokens if name == "validation" else None
            with bar.shown(name, source.names, manifest.splits[name]):
                write_split(folder, manifest, name, source, vocabulary, shard_tokens, limit, bar)
    for name, split in manifest.splits.items():
        console.print(
            f"{name}: {split.tokens:,} tokens of {split.documents:,} documents, {split.bytes:,} bytes of text, in "
            f"{len(split.shards)} file{'s' * (len(split.shards) != 1)}"
        )
    checked = "; all checksums are right" if found.startswith("already") else ""
    console.print(f"{folder} is {found}{checked}. Train on it with --data.source {folder.resolve()}")
