"""Made-up documents and the files they come in."""

import gzip
import json
import random
from pathlib import Path

WORDS = ["sink", "row", "column", "norm", "größe", "行列", "gradient", "the", "of", "épsilon", "🙂", "matrix", "step"]


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Documents of 1 to 60 words, no two alike."""
    rng = random.Random(seed)
    return [f"{seed}.{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for i in range(count)]


def write_shards(folder: Path, texts: list[str], count: int) -> list[Path]:
    """C4's own layout: gzip, one JSON object a line, with its three keys."""
    paths = []
    for shard in range(count):
        path = folder / f"c4-train.{shard:05d}-of-{count:05d}.json.gz"
        with gzip.open(path, "wt", encoding="utf-8") as file:
            for text in texts[shard::count]:
                record = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org"}
                file.write(json.dumps(record) + "\n")
        paths.append(path)
    return paths
