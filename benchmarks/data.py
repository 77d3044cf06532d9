"""Tokens a second of streamed and of prepared text, beside plain `datasets` and `DataLoader`, and what models take.

``python -m benchmarks.data [--rounds 5] [--seconds 3]``

The text is the Python standard library with its tests, cut into documents of about 2 000 characters as C4's are, in 16
gzipped JSON shards; the tokenizer is a byte-level BPE of 32 000 ids trained on it. All contenders hand out the same
kind of batches, 32 rows of 256 tokens:

- plain: a tokenizer call for each document in `datasets`' streaming `map`, cut off or padded to a row, and a
  `DataLoader`, as the papers' code does it. All tokens of a document count, also those that are cut off.
- streamed: what `data.source FILES` trains on, packed without padding.
- prepared: what `data.source FOLDER` trains on, all rows shuffled, copies of one shard that together are larger than
  the processor's caches.

Each is measured in processes of its own, as many at a time as are given, for some seconds after the first batches, in
rounds with an order that is drawn anew; medians of the sums over processes. Prints a table, and writes it and the
machine into ``benchmarks/results/data.json``.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import random
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from lightning_multinorm.data.loader import BatchLoader, TrainingBatches
from lightning_multinorm.data.packing import IGNORED
from lightning_multinorm.data.prepared.manifest import read_manifest, shard_name
from lightning_multinorm.data.prepared.opening import open_prepared
from lightning_multinorm.data.prepared.prepare import begin, opened, write_split
from lightning_multinorm.data.sources import Corpus, open_corpus
from lightning_multinorm.data.tokenizer import load_tokenizer
from lightning_multinorm.data.vocabulary import Vocabulary
from lightning_multinorm.llama.parallel import build_llama
from lightning_multinorm.llama.sizes import llama_config
from lightning_multinorm.planning.compute import PEAKS, compute
from lightning_multinorm.planning.settings import Shape

RESULTS = Path(__file__).parent / "results" / "data.json"
B, T = 32, 256
SHARDS, DOCUMENT, VOCABULARY = 16, 2000, 32_000
COPIES = 16  # of the prepared shard
ENDLESS = 10**9
WARM_UP = 20
FASTEST = max(PEAKS, key=lambda name: PEAKS[name])
CASES = {
    "plain, 0 workers": ("plain", 0),
    "plain, 2 workers": ("plain", 2),
    "streamed, 0 workers": ("streamed", 0),
    "streamed, 2 workers": ("streamed", 2),
    "prepared, 0 workers": ("prepared", 0),
}


def write_texts(folder: Path) -> None:
    """The standard library in documents, in gzipped JSON lines."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    documents = [text[start : start + DOCUMENT] for text in texts for start in range(0, len(text), DOCUMENT)]
    random.Random(0).shuffle(documents)
    for number in range(SHARDS):
        with gzip.open(folder / f"c4-train.{number:05}-of-{SHARDS:05}.json.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in documents[number::SHARDS])


def source(folder: Path) -> Corpus:
    """The texts, nothing held out that matters."""
    return open_corpus(str(folder / "texts"), validation_fraction=1e-6)


def vocabulary(folder: Path) -> Vocabulary:
    """Of the tokenizer in the folder."""
    return Vocabulary(load_tokenizer(str(folder / "tokenizer"), [], 0))


def prepare(folder: Path) -> dict[str, Any]:
    """Tokenise the texts once; how fast that was."""
    out, corpus = folder / "prepared", source(folder)
    settings = {"data.source": str(folder / "texts"), "data.validation_tokens": 1}
    began = time.perf_counter()
    with opened(out):
        manifest, words = begin(out, settings, corpus.fingerprint, lambda: vocabulary(folder).tokenizer)
        for name, shards in (("validation", corpus.held_out), ("train", corpus.train)):
            write_split(out, manifest, name, shards, words, 10**9)
        seconds, split = time.perf_counter() - began, manifest.splits["train"]
        for copy in range(1, COPIES):
            shutil.copy(out / shard_name("train", 0), out / shard_name("train", copy))
        tokens, documents = split.tokens, split.documents
        split.shards *= COPIES
        manifest.write(out)
    return {"tokens": tokens, "documents": documents, "bytes": 2 * tokens, "tokens_per_second": tokens / seconds}


def plain(folder: Path, workers: int, rank: int, world_size: int) -> Iterator[int]:
    """Tokens of each batch."""
    from datasets import load_dataset
    from datasets.distributed import split_dataset_by_node
    from torch.utils.data import DataLoader

    tokenizer = vocabulary(folder).tokenizer
    tokenizer.pad_token = tokenizer.eos_token

    def rows(example: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer(example["text"])["input_ids"]
        row = ids[:T] + [tokenizer.pad_token_id] * (T - len(ids))
        return {"input_ids": row, "labels": row, "tokens": len(ids)}

    files = sorted(str(path) for path in (folder / "texts").iterdir())
    stream = load_dataset("json", data_files=files, split="train", streaming=True)
    stream = split_dataset_by_node(stream, rank, world_size).map(rows, remove_columns=["text"]).with_format("torch")
    while True:
        for batch in DataLoader(stream, batch_size=B, num_workers=workers):
            yield int(batch["tokens"].sum())


def streamed(folder: Path, workers: int, rank: int, world_size: int) -> Iterator[int]:
    """Tokens of each batch."""
    corpus = source(folder)
    batches = TrainingBatches(
        corpus.train, vocabulary(folder), T, B, ENDLESS, rank, world_size, mix_rows=1024, workers=max(1, workers)
    )
    yield from _tokens(BatchLoader(batches, workers))


def prepared(folder: Path, workers: int, rank: int, world_size: int) -> Iterator[int]:
    """Tokens of each batch."""
    out = folder / "prepared"
    ready = open_prepared(str(out), read_manifest(out).settings)
    ranks, words = (rank, world_size), Vocabulary(ready.load_tokenizer())
    batches = ready.batches(words, T, B, ranks, seed=0, shuffle=True, total=ENDLESS, resumed={})
    yield from _tokens(BatchLoader(batches, workers))


def _tokens(loader: BatchLoader) -> Iterator[int]:
    for batch in loader:
        assert batch["labels"][0, 0] != IGNORED
        yield batch["labels"].numel()


def process(case: str, folder: Path, seconds: float, rank: int, ready: Any, results: Any) -> None:
    """Measure one of the processes that work side by side."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for workers, as it is where no process was spawned
    kind, workers = CASES[case]
    counts = globals()[kind](folder, workers, rank, ready.parties)
    for _ in range(WARM_UP):
        next(counts)
    ready.wait()
    tokens, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        tokens += next(counts)
    results.put(tokens / passed)
    results.close()
    results.join_thread()
    os._exit(0)  # worker processes need not be waited for


def measure(case: str, folder: Path, seconds: float, processes: int) -> float:
    """Tokens a second of so many processes together."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(processes), context.Queue()
    started = [
        context.Process(target=process, args=(case, folder, seconds, rank, ready, results)) for rank in range(processes)
    ]
    for each in started:
        each.start()
    total = sum(results.get(timeout=120) for _ in started)
    for each in started:
        each.join()
    return float(total)


def consumption(size: Any) -> float:
    """Tokens a second that a model takes on the fastest GPU of `plan`'s table, as `plan` estimates it."""
    config = llama_config(size, None)
    parameters = sum(parameter.numel() for parameter in build_llama(config, torch.device("meta")).parameters())
    return compute(parameters, Shape.of(config), T).tokens_per_second(PEAKS[FASTEST], 1)


def summary(preparing: dict[str, Any], runs: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """What is written, after full rounds."""
    return {
        "machine": {**describe(), "load_average": os.getloadavg()},
        "batch": {"rows": B, "tokens": T},
        "prepare": preparing,
        "taken": {size: consumption(size) for size in ("60m", "1b")},
        "median": {case: {count: median(each) for count, each in found.items()} for case, found in runs.items()},
        "rounds": runs,
    }


def table(result: dict[str, Any]) -> Table:
    """Millions of tokens a second, and how many times those of the best plain one that is."""
    view = Table("", "1 process", "2 processes", title="Million tokens a second (× plain, the better of the two)")
    medians = result["median"]
    base = {count: max(medians[case][count] for case in CASES if case.startswith("plain")) for count in ("1", "2")}
    for case, found in medians.items():
        view.add_row(case, *(f"{found[count] / 1e6:.2f} ({found[count] / base[count]:.1f} ×)" for count in ("1", "2")))
    view.add_row("prepare", f"{result['prepare']['tokens_per_second'] / 1e6:.2f}", "")
    for size, taken in result["taken"].items():
        view.add_row(f"taken by the {size} on an {FASTEST}", f"{taken / 1e6:.2f}", "")
    return view


def main() -> None:
    """Parse the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    runs: dict[str, dict[str, list[float]]] = {case: {"1": [], "2": []} for case in CASES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "texts").mkdir()
        write_texts(folder / "texts")
        load_tokenizer("bpe", source(folder).train.texts(), VOCABULARY).save_pretrained(folder / "tokenizer")
        preparing = prepare(folder)
        for number in range(options.rounds):
            order = [(case, count) for case in CASES for count in (1, 2)]
            for case, count in random.Random(number).sample(order, len(order)):
                runs[case][str(count)].append(measure(case, folder, options.seconds, count))
                print(f"round {number + 1}: {case}, {count} process(es): {runs[case][str(count)][-1] / 1e6:.2f} M/s")
            result = summary(preparing, runs)  # kept after every round, should a later one be cut off
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(table(result))


if __name__ == "__main__":
    main()
