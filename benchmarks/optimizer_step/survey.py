"""One contender for itself, before the race: does it run, how large are its state and peak, how long is a step.

On a processor each is surveyed in a fresh process, where resident memory tells what a step needs:
``python -m benchmarks.optimizer_step.survey`` is that process.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.optimizer_step.contenders import CONTENDERS
from benchmarks.optimizer_step.matrices import Matrices
from benchmarks.optimizer_step.memory import ENVIRONMENT, peak_allocated, peak_cuda, peak_resident, state_bytes


@dataclass(frozen=True)
class Survey:
    """What was found out about a contender.

    Attributes:
        state: bytes of state.
        peak: bytes that a step holds beyond weights, gradients and state: the larger of the two below, or CUDA's count.
        peak_resident: growth of the resident set.
        peak_allocated: torch's own allocations.
        first_step: seconds of the first step, compilation included.
        upkeep: seconds of the work that no timed step has, every 200 steps.
        changes_gradient: whether a step writes to the gradients.
    """

    state: int
    peak: int
    peak_resident: int | None
    peak_allocated: int
    first_step: float
    second_step: float
    upkeep: float | None
    changes_gradient: bool


def survey(key: str, model: str, dtype: str, device: str, threads: int, limit: float) -> Survey | str:
    """Survey a contender, in a process of its own on a processor.

    Args:
        limit: seconds that the process may take.

    Returns:
        What was found out, or why it cannot take part.
    """
    if device == "cuda":
        result = _survey_or_reason(key, model, dtype, device)
        gc.collect()
        torch.cuda.empty_cache()
        return result
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "survey.json")
        command = [sys.executable, "-m", "benchmarks.optimizer_step.survey"]
        command += ["--contender", key, "--model", model, "--dtype", dtype, "--threads", str(threads)]
        try:
            process = subprocess.run(
                [*command, "--out", str(out)],
                capture_output=True,
                text=True,
                timeout=limit,
                env={**os.environ, **ENVIRONMENT},
            )
        except subprocess.TimeoutExpired:
            return f"three steps took longer than {limit:.0f} s"
        if not out.exists():
            return f"its process ended with {process.returncode}: {' '.join(process.stderr.split())[-200:]}"
        found = json.loads(out.read_text())
    return Survey(**found) if isinstance(found, dict) else str(found)


def _survey_or_reason(key: str, model: str, dtype: str, device: str) -> Survey | str:
    try:
        return _survey(key, model, dtype, device)
    except ModuleNotFoundError as error:
        package = CONTENDERS[key].package
        return f"not installed: {error.name}" + (f" (of {package})" if package and error.name != package else "")
    except Exception as error:  # whatever a library raises is the reason why it is missing
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _survey(key: str, model: str, dtype: str, device: str) -> Survey:
    contender = CONTENDERS[key]
    matrices = Matrices(model, getattr(torch, dtype), device)
    optimizer = contender.build(matrices.weights, model)

    def seconds() -> float:
        started = time.perf_counter()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    versions = matrices.versions()
    first, second = seconds(), seconds()
    changes_gradient = versions != matrices.versions()
    resident = None if device == "cuda" else peak_resident(optimizer.step)
    allocated = peak_cuda(optimizer.step) if device == "cuda" else peak_allocated(optimizer.step)
    return Survey(
        state=state_bytes(optimizer, [*matrices.weights, *matrices.gradients]),
        peak=max(resident or 0, allocated),
        peak_resident=resident,
        peak_allocated=allocated,
        first_step=first,
        second_step=second,
        upkeep=contender.upkeep(matrices.weights, model) if contender.upkeep else None,
        changes_gradient=changes_gradient,
    )


def main() -> None:
    """The process that surveys one contender on the processor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contender", choices=CONTENDERS, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = _survey_or_reason(options.contender, options.model, options.dtype, "cpu")
    options.out.write_text(json.dumps(found if isinstance(found, str) else asdict(found)))


if __name__ == "__main__":
    main()
