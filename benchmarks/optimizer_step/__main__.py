"""Cost of one optimizer step on the hidden matrices of the paper's models: SinkGD beside its alternatives.

``python -m benchmarks.optimizer_step --model 130m --dtype float32 [--device cpu] [--rounds 15] [--only sinkgd muon]``
``python -m benchmarks.optimizer_step --model all --dtype all --device cuda``
``python -m benchmarks.optimizer_step --plot``

Every round takes one step of every contender on the same weights and gradients, in an order drawn anew, and each time
is compared with that of a step of fused AdamW right before or after it. Only ``step()`` is timed. Prints a table and
writes ``benchmarks/results/optimizer_step_<model>_<dtype>_<device>.json``; benchmarks/requirements.txt lists the
libraries, and a contender whose library is not installed is listed with the reason.
"""

import argparse
import gc
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.optimizer_step import report
from benchmarks.optimizer_step.contenders import CONTENDERS, REFERENCE
from benchmarks.optimizer_step.matrices import DTYPES, MODELS, Matrices, shapes
from benchmarks.optimizer_step.measure import Timing, copy_bandwidth, plan_blocks, run_block
from benchmarks.optimizer_step.memory import total_bytes
from benchmarks.optimizer_step.orthogonality import ORTHOGONALIZING, orthogonality
from benchmarks.optimizer_step.plot import plot
from benchmarks.optimizer_step.survey import Survey, survey

_CONSOLE = Console() if Console().is_terminal else Console(width=150)


def compare(model: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Survey, race and report for one size and dtype."""
    device, rounds = options.device, options.rounds
    torch.compiler.reset()  # a graph for each shape: a sweep would reach the limit of recompilations
    surveys: dict[str, Survey] = {}
    missing: dict[str, str] = {}
    for key in options.only:
        _tell(f"{model} {dtype}: surveying {key}")
        found = survey(key, model, dtype, device, options.threads, options.limit)
        if isinstance(found, Survey):
            surveys[key] = found
        else:
            missing[key] = found
    if REFERENCE not in surveys:
        raise SystemExit(f"{REFERENCE}, which all are compared with, did not run: {missing[REFERENCE]}")
    shared = 2 * getattr(torch, dtype).itemsize * sum(m * n for m, n in shapes(model))
    blocks, too_large = plan_blocks(surveys, shared, total_bytes(device))
    missing |= dict.fromkeys(too_large, f"does not fit the memory of this machine beside {REFERENCE}")

    bandwidth = copy_bandwidth(device)
    matrices = Matrices(model, getattr(torch, dtype), device)
    timings: dict[str, Timing] = {}
    for block in blocks:
        timed, failed = run_block(block, matrices, model, rounds, lambda text: _tell(f"{model} {dtype}: {text}"))
        missing |= failed
        for key, timing in timed.items():
            timings.setdefault(key, Timing()).pairs += timing.pairs
    orthogonalizing = [key for key in ORTHOGONALIZING if key in timings]
    spread = orthogonality(orthogonalizing, matrices, model)
    entries = {key: report.entry(key, timing, surveys[key], matrices, bandwidth) for key, timing in timings.items()}
    run = {"model": model, "dtype": dtype, "device": device, "threads": options.threads, "rounds": rounds}
    return report.result({**run, "seed": matrices.seed}, matrices, bandwidth, blocks, entries, missing, spread)


def main() -> None:
    """Parse the command line, run, print, write."""
    options = _parse()
    if options.plot:
        for target in plot(options.out):
            _tell(f"wrote {target}")
        return
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for libraries with an OpenMP of their own
    for model in MODELS if options.model == "all" else [options.model]:
        for dtype in DTYPES if options.dtype == "all" else [options.dtype]:
            content = compare(model, dtype, options)
            target = report.write(options.out, content)
            _CONSOLE.print(report.table(content))
            _tell(f"wrote {target}")
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["tiny", *MODELS, "all"], default="130m")
    parser.add_argument("--dtype", choices=[*DTYPES, "all"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="adamw is always run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, default=900, help="seconds for the survey of a contender on a processor")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the results")
    parser.add_argument("--plot", action="store_true", help="draw all results of the folder, and run nothing")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    options.only = [REFERENCE, *(key for key in options.only if key != REFERENCE)]
    return options


def _tell(text: str) -> None:
    _CONSOLE.print(text, style="dim", highlight=False)


if __name__ == "__main__":
    main()
