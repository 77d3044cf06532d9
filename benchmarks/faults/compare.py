"""What a run that was killed has to have in common with one that was not: everything."""

import csv
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]


@dataclass
class Verdict:
    """What differs between an interrupted run and an uninterrupted one.

    Attributes:
        missing: Steps (of a rank) that the stitched run lacks.
        losses: Steps whose loss differs in any attempt that made them.
        lost: Tokens of the uninterrupted run that no surviving step of the interrupted one was trained on.
        repeated: Tokens that its surviving steps were trained on more often.
        logged: Logged values that differ.
        repeated_steps: Steps done again, because they came after the last checkpoint; not a fault.
    """

    missing: int = 0
    losses: int = 0
    lost: int = 0
    repeated: int = 0
    logged: int = 0
    repeated_steps: int = 0


def lines(path: Path) -> list[Line]:
    """The records of a rank; a last line that a kill has cut off is left out."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def compare(whole: Path, stitched: Path, ranks: int) -> Verdict:
    """Compare two folders of records.

    Args:
        whole: of the uninterrupted run.
        stitched: of the interrupted one, all attempts one after the other.
        ranks: how many wrote.
    """
    verdict = Verdict()
    for rank in range(ranks):
        expected = {line["step"]: line for line in lines(whole / f"rank{rank}.jsonl")}
        attempts = lines(stitched / f"rank{rank}.jsonl")
        last = {line["step"]: line for line in attempts}  # what a later attempt did counts
        verdict.repeated_steps += len(attempts) - len(last)
        verdict.missing += len(expected.keys() ^ last.keys())
        verdict.losses += sum(line["loss"] != expected[line["step"]]["loss"] for line in attempts)
        before, after = (_rows(found.values()) for found in (expected, last))
        verdict.lost += sum(len(row) * count for row, count in (before - after).items())
        verdict.repeated += sum(len(row) * count for row, count in (after - before).items())
    verdict.logged = _differing(_metrics(whole), _metrics(stitched))
    return verdict


def _rows(found: Any) -> Counter[tuple[int, ...]]:
    return Counter(tuple(row) for line in found for row in line["rows"])


MEASURED = ("throughput/", "memory/", "seconds", "parameters")
"""Metrics of the machine's time and memory, and of a version's beginning, which differ between equal trainings."""


def _metrics(folder: Path) -> dict[tuple[int, str], str]:
    """Logged values by step and name, later versions of the run over earlier ones."""
    values: dict[tuple[int, str], str] = {}
    versions = sorted(folder.glob("run/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    for path in versions:
        with path.open() as file:
            for row in csv.DictReader(file):
                step = int(row["step"])
                values |= {(step, name): value for name, value in row.items() if value and name != "step"}
    return {key: value for key, value in values.items() if not key[1].startswith(MEASURED)}


def _differing(expected: dict[tuple[int, str], str], found: dict[tuple[int, str], str]) -> int:
    return sum(expected.get(key) != found.get(key) for key in expected.keys() | found.keys())
