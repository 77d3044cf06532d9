"""The benchmark of optimizer steps runs, and writes what it measured on what."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_optimizer_step(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.optimizer_step", "--model", "tiny", "--rounds", "2", "--threads", "1"]
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
    assert len(entries["sinkgd"]["seconds"]) == 2
    assert result["machine"]["versions"]["torch"]
