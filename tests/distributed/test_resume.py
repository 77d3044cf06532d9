"""Resumed runs go on as if nothing had happened, in either format, and on other ranks and strategies too.

Runs that are killed are in test_faults.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.world import ROOT

FILES: dict[str, Any] = {"strategy": "ShardedStrategy", "options": {"in_folders": False}}
FLAT: dict[str, Any] = {"strategy": "FlatStrategy", "options": {}}  # by name it asks for a GPU
SPREAD: dict[str, dict[str, Any]] = {
    "folder": {"strategy": "fsdp2"},
    "file": FILES,
    "stateless-folder": {"strategy": "fsdp2", "optimizer": "stateless"},
    "stateless-file": {**FILES, "optimizer": "stateless"},
    "swan": {"strategy": "fsdp2", "optimizer": "swan"},
    "adamw": {"strategy": "fsdp2", "optimizer": "adamw"},
    "rounded": {"strategy": "fsdp2", "precision": "bf16-true"},
    "fsdp1": FLAT,
    "tp": {"strategy": "tp"},
    "ddp": {"strategy": "ddp"},
    "background": {"strategy": "fsdp2", "background": True},
}
AFTER = "step=4.ckpt"
ONTO: dict[str, tuple[str, dict[str, Any]]] = {  # what goes on from where, under which strategy
    "one-rank-to-two": ("single", {"strategy": "fsdp2"}),
    "one-rank-to-ddp": ("single", {"strategy": "ddp"}),
    "folder-to-ddp": ("folder", {"strategy": "ddp"}),
    "folder-to-file": ("folder", FILES),
    "folder-to-fsdp1": ("folder", FLAT),
    "ddp-to-folder": ("ddp", {"strategy": "fsdp2"}),
    "fsdp1-to-tp": ("fsdp1", {"strategy": "tp"}),
    "tp-to-folder": ("tp", {"strategy": "fsdp2"}),
}
ON_FOUR: dict[str, dict[str, Any]] = {
    "hsdp": {"strategy": "ShardedStrategy", "options": {"replicas": 2}},
    "grid": {"strategy": "ShardedStrategy", "options": {"tensor_parallel_size": 2}},
}
TO_ONE = ("folder", "file", "fsdp1", "tp")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the losses of all runs."""
    folder = tmp_path_factory.mktemp("resume")
    again = [{"name": f"{name}-again", "ckpt_path": f"{name}/{AFTER}", **how} for name, how in SPREAD.items()]
    onto = [{"name": name, "ckpt_path": f"{source}/{AFTER}", **how} for name, (source, how) in ONTO.items()]
    launches = [
        (1, [{"name": "single", "strategy": "auto"}]),
        (2, [{"name": name, **how} for name, how in SPREAD.items()]),
        (2, again + onto),
        (4, [{"name": name, **how} for name, how in ON_FOUR.items()]),
        (4, [{"name": "hsdp-to-grid", "ckpt_path": f"hsdp/{AFTER}", **ON_FOUR["grid"]}]),
        (1, [{"name": f"{n}-to-one", "strategy": "auto", "ckpt_path": f"{n}/{AFTER}"} for n in TO_ONE]),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "tests.distributed.resume", str(folder), json.dumps(launches)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def losses(folder: Path, name: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize("name", SPREAD)
def test_a_resumed_run_is_the_uninterrupted_one(runs: Path, name: str) -> None:
    whole, rest = losses(runs, name), losses(runs, f"{name}-again")
    assert list(rest) == ["5", "6", "7", "8"]
    assert rest == {step: whole[step] for step in rest}


def test_the_format_is_the_one_asked_for(runs: Path) -> None:
    assert (runs / "folder" / AFTER).is_dir()
    assert (runs / "file" / AFTER).is_file()


ALIKE = [name for name, how in SPREAD.items() if "optimizer" not in how and name != "rounded"]


@pytest.mark.parametrize("name", [*ALIKE, *ON_FOUR])
def test_every_strategy_trains_as_one_device(runs: Path, name: str) -> None:
    assert losses(runs, name) == pytest.approx(losses(runs, "single"), abs=1e-5)


@pytest.mark.parametrize("name", [*ONTO, "hsdp-to-grid", *(f"{name}-to-one" for name in TO_ONE)])
def test_a_run_goes_on_with_other_ranks_and_strategies(runs: Path, name: str) -> None:
    whole, rest = losses(runs, "single"), losses(runs, name)
    assert list(rest) == ["5", "6", "7", "8"]
    assert rest == pytest.approx({step: whole[step] for step in rest}, abs=1e-5)


def test_a_checkpoint_without_states_is_small(runs: Path) -> None:
    """No entry is made up for parameters that have no state."""
    folder = runs / "stateless-folder" / AFTER
    weights = sum(file.stat().st_size for file in (runs / "folder" / AFTER).iterdir())
    assert sum(file.stat().st_size for file in folder.iterdir()) < weights
