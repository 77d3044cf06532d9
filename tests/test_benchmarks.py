"""Benchmarks run, and write what they measured on what."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import width_transfer

ROOT = Path(__file__).parents[1]


def test_optimizer_step(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.optimizer_step", "--model", "tiny", "--rounds", "9", "--threads", "1"]
    subprocess.run(
        [*command, "--only", "sinkgd", "textbook", "--out", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=300,
    )
    (target,) = tmp_path.glob("*.json")
    result = json.loads(target.read_text())
    entries = result["contenders"]
    assert set(entries) == {"adamw", "sinkgd", "textbook"}
    assert entries["sinkgd"]["state_bytes"] == 0
    assert entries["adamw"]["state_bytes"] >= 2 * result["parameter_bytes"]
    seconds, reference = entries["sinkgd"]["seconds"], entries["sinkgd"]["reference_seconds"]
    assert len(seconds) == len(reference) == 9
    assert set(reference).isdisjoint(entries["adamw"]["seconds"])  # a step of AdamW's beside each, not one a round
    by_reference = [seconds[k] / reference[k] for k in sorted(range(9), key=reference.__getitem__)]
    assert entries["sinkgd"]["ratio_thirds"] == [sorted(by_reference[:3])[1], sorted(by_reference[6:])[1]]
    assert result["machine"]["versions"]["torch"]


def test_width_transfer_looks_until_the_best_rate_has_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of made-up losses: runs are kept, not made again, and what the base width's rate costs is told."""
    made = []

    def train(width: int, option: str, lr: float, data: object) -> float:
        made.append((width, option, lr))
        return math.inf if lr > 0.1 else 4 + abs(math.log2(lr / 0.02 * (width / 128)))

    monkeypatch.setattr(width_transfer, "train", train)
    monkeypatch.setattr(width_transfer, "batches", lambda steps: ([], []))
    for _ in range(2):
        sweep = width_transfer.Sweep(tmp_path / "found.json", 10)
        sweep.around(128, "plain", 0.08)
        sweep.around(256, "plain", sweep.best(128, "plain"))
        sweep.around(128, "base_width", 0.02)
    assert made == [(128, "plain", lr) for lr in (0.08, 0.04, 0.16, 0.02, 0.01)] + [
        (256, "plain", lr) for lr in (0.02, 0.01, 0.04, 0.005)
    ]
    rows = {(row["option"], row["width"]): row for row in sweep.transfer()}
    assert rows["plain", 256]["best_lr"] == 0.01 and rows["plain", 256]["excess"] == pytest.approx(0.25)
    assert rows["base_width", 128]["excess"] == 0
