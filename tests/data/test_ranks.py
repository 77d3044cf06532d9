"""Two real processes under DDP: disjoint text, exact resume, noted batches, every held-out token counted once."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from . import two_ranks

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Results:
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, two_ranks.__file__, str(folder), str(shards)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr[-3000:]
    assert len(list((folder / "cache" / "lightning_multinorm").iterdir())) == 1
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_ranks_train_on_different_text(results: Results) -> None:
    rows = [tuple(row) for result in results for batch in result["whole"] for row in batch]
    assert len(rows) == len(set(rows)) == 2 * 4 * 4


def test_each_rank_resumes_where_it_was(results: Results) -> None:
    for result in results:
        assert result["rest"] == result["whole"][2:]


def test_loss_spikes_note_the_batches_of_all_ranks(results: Results) -> None:
    for result, other in zip(results, reversed(results), strict=True):
        assert result["others_replayed"] == other["whole"]
        assert result["spike"]["loss"] == 0.5
        assert [(entry["rank"], entry["loss"]) for entry in result["spike"]["batches"]] == [(0, 0.0), (1, 1.0)]


def test_each_held_out_token_is_counted_once(results: Results) -> None:
    assert results[0]["batches"] == results[1]["batches"] > 1
    labels = Counter(results[0]["labels"] + results[1]["labels"])
    assert labels == Counter(results[0]["expected_labels"])
