"""Documents that can be told apart, in shards such as C4's, and what was read of them."""

import gzip
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from benchmarks.faults.compare import lines
from benchmarks.faults.runs import VOCABULARY
from lightning_multinorm.cli import main
from lightning_multinorm.data import TextDataModule

SHARDS = 5
WORDS = ["sink", "row", "column", "norm", "größe", "行列", "gradient", "the", "of", "matrix", "step", "🙂"]


def make_documents(folder: Path, seed: int, count: int = 60) -> None:
    """Documents of 1 to 60 words, no two alike, with C4's keys."""
    folder.mkdir()
    chance = random.Random(seed)
    texts = [f"{number}: " + " ".join(chance.choices(WORDS, k=chance.randint(1, 60))) for number in range(count)]
    for shard in range(SHARDS):
        with gzip.open(folder / f"c4-train.{shard:05d}-of-{SHARDS:05d}.json.gz", "wt", encoding="utf-8") as file:
            for text in texts[shard::SHARDS]:
                record = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org"}
                file.write(json.dumps(record) + "\n")


def prepare(source: Path, out: Path, options: list[str]) -> None:
    """The real command, in a process of its own."""
    if (process := os.fork()) == 0:
        try:
            sys.argv[1:] = ["prepare", "--data.source", str(source), *options, "--out", str(out)]
            main()
        except BaseException:
            os._exit(1)
        os._exit(0)
    if os.waitpid(process, 0)[1]:
        raise RuntimeError(f"prepare of {source} failed")


def faults_in_first_epoch(records: Path, ranks: int, source: Path) -> int:
    """Training documents that the ranks together did not read exactly once before any came again.

    Args:
        records: of a run on the stream, its rows in the documents' order.
        ranks: how many wrote.
        source: the shards.
    """
    data = TextDataModule(str(source), vocab_size=VOCABULARY)
    tokenizer = data.tokenizer
    read: Counter[str] = Counter()
    for rank in range(ranks):
        last = {line["step"]: line for line in lines(records / f"rank{rank}.jsonl")}
        tokens = [token for step in sorted(last) for row in last[step]["rows"] for token in row]
        own: set[str] = set()
        for text in _documents(tokens, tokenizer):
            if text in own:
                break
            own.add(text)
        else:
            raise RuntimeError("the run is shorter than an epoch; give it more --steps")
        read.update(own)
    expected = Counter(data.corpus.train.texts())
    return sum((read - expected).values()) + sum((expected - read).values())


def _documents(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The whole documents of a stream; what it breaks off in is left out."""
    found, own = [], list[int]()
    for token in tokens:
        if token == tokenizer.eos_token_id:
            found.append(tokenizer.decode(own))
            own = []
        else:
            own.append(token)
    return found
