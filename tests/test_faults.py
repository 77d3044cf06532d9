"""Runs killed at random moments lose and repeat nothing: a short version of ``python -m benchmarks.faults``."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CELLS = ("single-mixed", "ddp-prepared", "fsdp2-folder-stream")


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-m", "benchmarks.faults", "--kills", "6", "--steps", "90", "--seed", "1"]
    command += ["--cells", *CELLS, "--folder", str(folder), "--out", str(folder / "faults.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads((folder / "faults.json").read_text())["trials"]
    return found


@pytest.mark.slow
def test_runs_were_killed_in_every_way(trials: list[dict[str, Any]]) -> None:
    kills = [kill for trial in trials for kill in trial["kills"]]
    assert len(kills) == 6
    assert {kill["signal"] for kill in kills} == {"SIGKILL", "SIGTERM"}
    assert any(kill["moment"] == "saving" for kill in kills)
    for kill in kills:
        expected = {"SIGKILL": -9, "SIGTERM": 143}[kill["signal"]]
        assert set(kill["statuses"]) == {expected}


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_nothing_is_lost_repeated_or_different(trials: list[dict[str, Any]], name: str) -> None:
    [trial] = [trial for trial in trials if trial["cell"] == name]
    assert not any(trial["ended"])
    assert [trial[what] for what in ("missing", "losses", "lost", "repeated", "logged")] == [0] * 5
    if name.endswith("stream"):
        assert trial["documents"] == 0
