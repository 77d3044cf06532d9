"""Tokens a second of a whole training step: this project's trainer beside plain loops of PyTorch, and litgpt's model.

``python -m benchmarks.throughput [--model nano 60m] [--rounds 5] [--steps 10]``
``python -m benchmarks.throughput --model 1b --length 1024 --precision bf16-true --compile --base "trainer adamw"``

The second is for a GPU, where each trains at its largest batch.

- *trainer*: the real command ``fit`` with its packaged configuration, loggers and all callbacks that are always there
  (residuals of the norms and logs every tenth step), and its data module replaced;
- *plain*: the same model of transformers, loss of all logits, and nothing else in the loop;
- *litgpt*: litgpt's model and loss, if it is installed (``pip install --no-deps litgpt``), in the same plain loop.

All train on the same packed rows of random tokens, in one process, in turns, in another order each round. A turn builds
everything anew, lets some steps pass, and times the next ``--steps`` together. Told are medians over rounds, and of the
ratios to ``--base`` (*plain adamw*) in the same round, with quartiles. MFU is the share of the dense peak that the
model's own FLOPs make: of a GPU's data sheet, or on a CPU of the fastest of ten products of 2048 × 2048 matrices,
measured here.
Prints a table, and writes all turns and the machine into ``benchmarks/results/throughput.json``.
"""

import argparse
import gc
import json
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.throughput_turns import CONTENDERS, Setting, litgpt_is_here
from lightning_multinorm.flops import peak_flops

RESULTS = Path(__file__).parent / "results" / "throughput.json"
ROWS = {"nano": 16, "60m": 4}  # on a CPU
LENGTHS = {"nano": 128}  # else 256


def largest(contender: str, setting: Setting) -> int:
    """The most rows of a batch that a contender can train on here, a power of two; 0 if not even one."""
    rows = 0
    while True:
        try:
            CONTENDERS[contender](setting.of(rows=max(1, 2 * rows), steps=1))
        except torch.OutOfMemoryError:
            return rows
        finally:
            release()
        rows = max(1, 2 * rows)


def release() -> None:
    """Give back what a turn held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak(precision: str) -> float | None:
    """FLOP/s of this machine's device; None for a GPU whose data sheet is not known."""
    if torch.cuda.is_available():
        return peak_flops(torch.cuda.get_device_name(), precision)
    A = torch.randn(2048, 2048, dtype=torch.bfloat16 if precision.startswith("bf16") else torch.float32)
    fastest = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        A @ A
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * 2048**3 / fastest


def measure(setting: Setting, contenders: list[str], rounds: int, rows: int | None) -> dict[str, Any]:
    """Tokens a second of each contender in each round."""
    sizes = {name: largest(name, setting) if rows is None else rows for name in contenders}
    fitting = [name for name, size in sizes.items() if size]
    rates: dict[str, list[float]] = {name: [] for name in fitting}
    peaks = []
    for turn in range(rounds):
        peaks.append(peak(setting.precision) or 0.0)
        for name in fitting[turn % len(fitting) :] + fitting[: turn % len(fitting)]:
            seconds = CONTENDERS[name](setting.of(rows=sizes[name]))
            rates[name].append(setting.steps * sizes[name] * setting.length / seconds)
            release()
    return {
        **setting.told(),
        "rows": sizes,
        "flops_per_token": setting.flops_per_token(),
        "peak_flops": max(peaks),
        "tokens_per_second": rates,
    }


def ratios(run: dict[str, Any], contender: str, base: str) -> list[float]:
    """Of a contender's rate to the base's, round by round."""
    rates = run["tokens_per_second"]
    return [mine / other for mine, other in zip(rates[contender], rates.get(base, []), strict=False)]


def table(run: dict[str, Any], base: str) -> Table:
    """One row for each contender."""
    title = f"{run['model']}, {run['length']} tokens a row, {run['precision']}{', compiled' * run['compiled']}"
    view = Table("", "rows", "tokens/s", "MFU", f"of {base}", "quartiles", title=title, box=SIMPLE_HEAD)
    for name, rates in run["tokens_per_second"].items():
        rate, paired = median(rates), ratios(run, name, base)
        share = f"{rate * run['flops_per_token'] / run['peak_flops']:.1%}" if run["peak_flops"] else "unknown"
        low, _, high = quantiles(paired, n=4) if len(paired) > 1 else (float("nan"),) * 3
        ratio = f"{median(paired):.3f}" if paired else ""
        view.add_row(name, str(run["rows"][name]), f"{rate:,.0f}", share, ratio, f"{low:.3f} to {high:.3f}")
    return view


def main() -> None:
    """Parse the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["nano", "60m"], help="nano (the quickstart's) or a paper's size")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="timed together in a turn")
    parser.add_argument("--rows", type=int, help="of a batch; default: 16 of nano and 4 else, on a GPU what fits")
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-true"])
    parser.add_argument("--compile", action="store_true", help="each block, of every contender")
    parser.add_argument("--length", type=int, help="tokens of a row; default: 128 of nano and 256 else")
    parser.add_argument("--base", choices=CONTENDERS, default="plain adamw", help="what rates are compared with")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    contenders = [name for name in options.only if litgpt_is_here() or not name.startswith("litgpt")]
    if len(contenders) < len(options.only):
        print("litgpt is not installed, so it is left out: pip install --no-deps litgpt")
    runs = []
    for model in options.model:
        length = options.length or LENGTHS.get(model, 256)
        setting = Setting(model, options.steps, options.precision, options.compile, length)
        rows = options.rows or (None if torch.cuda.is_available() else ROWS.get(model, 4))
        runs.append(measure(setting, contenders, options.rounds, rows))
        Console().print(table(runs[-1], options.base))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"machine": describe(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
