"""Documents in memory, in shards, and folders prepared from them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_multinorm.data.prepared.manifest import Manifest
from lightning_multinorm.data.prepared.prepare import SILENT, Report, begin, opened, write_split
from lightning_multinorm.data.shards import Shards, Split

SETTINGS: dict[str, Any] = {
    "data.source": "memory",
    "data.tokenizer": "bpe",
    "data.vocab_size": 300,
    "data.text_field": "text",
    "data.validation_files": None,
    "data.validation_fraction": 0.1,
    "data.validation_tokens": 400,
    "shard_tokens": 2000,
}


class MemoryShards(Shards):
    """Documents dealt over three shards."""

    def __init__(self, texts: Sequence[str], held_out: bool) -> None:
        self.names = [f"shard {k}" for k in range(3)]
        self.split = Split("held-out" if held_out else "train", 0.2)
        self._shards = [texts[k::3] for k in range(3)]

    def _read(self, index: int, start: int, step: int) -> Iterator[tuple[int, str]]:
        return iter(list(enumerate(self._shards[index]))[start::step])


def prepare(
    folder: Path,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any] = SETTINGS,
    corpus: str = "of memory",
    report: Report = SILENT,
) -> Manifest:
    """As the command does it, from three shards in memory."""
    with opened(folder):
        manifest, vocabulary = begin(folder, settings, corpus, lambda: tokenizer)
        for name, limit in (("validation", settings["data.validation_tokens"]), ("train", None)):
            source = MemoryShards(texts, held_out=name == "validation")
            write_split(folder, manifest, name, source, vocabulary, settings["shard_tokens"], limit, report)
    return manifest
