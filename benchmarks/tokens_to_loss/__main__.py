"""How many tokens does each optimizer need to come to the final loss of tuned AdamW, and of tuned Muon?

``python -m benchmarks.tokens_to_loss nano [--jobs 2] [--only sinkgd muon] [--root runs/study]``

Each optimizer is tuned over a grid of learning rates on the first seed, the grid extended while the best rate is at
its edge; then the best rate is trained with every seed, and for shorter budgets with schedules of their own. Each run
is the real command in a process of its own. What has ended lies in ``benchmarks/results/tokens_to_loss/<protocol>`` and
is not run again; what is interrupted goes on. Writes ``<protocol>.json``, ``.md``, ``.png`` and ``.svg`` beside that
folder. Protocols are YAML files, see ``benchmarks/protocols``; to add an optimizer, add a row to one.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from benchmarks.tokens_to_loss import report
from benchmarks.tokens_to_loss.charts import draw
from benchmarks.tokens_to_loss.plan import Result
from benchmarks.tokens_to_loss.protocol import Optimizer, Protocol, load
from benchmarks.tokens_to_loss.runs import Processes
from benchmarks.tokens_to_loss.study import Study
from benchmarks.tokens_to_loss.summary import summarise
from lightning_multinorm.errors import UsageError

RESULTS = Path(__file__).parents[1] / "results" / "tokens_to_loss"


def main(args: Sequence[str] | None = None) -> None:
    """Parse the command line, make what is missing, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", help="name in benchmarks/protocols, or path")
    parser.add_argument("--jobs", type=int, help="runs side by side; default: cores // threads")
    parser.add_argument("--threads", type=int, default=1, help="of each run, default: 1")
    parser.add_argument(
        "--only", nargs="*", metavar="NAME", help="rows to run; without a name, only write what there is"
    )
    parser.add_argument("--root", type=Path, default=Path("runs/study"), help="for the runs' folders")
    parser.add_argument("--out", type=Path, default=RESULTS, help="for the results")
    options = parser.parse_args(args)
    signal.signal(signal.SIGTERM, _interrupt)
    jobs = options.jobs or max(1, (os.cpu_count() or 1) // options.threads)
    try:
        protocol = load(options.protocol)
        rows = chosen(protocol, options.only)
    except UsageError as error:
        sys.exit(f"error: {error}")
    study = Study(protocol, options.out / protocol.name, Processes(options.root / protocol.name, options.threads))
    console = Console(width=150)
    try:
        for result in study.make(rows, jobs):
            console.print(line(result), highlight=False, soft_wrap=True)
            report.write(protocol, summarise(protocol, study.known), options.out)
    except KeyboardInterrupt:
        sys.exit("Interrupted; the same command goes on.")
    finish(study, options.out, console)
    sys.exit(1 if study.refused else 0)


def chosen(protocol: Protocol, only: Sequence[str] | None) -> list[Optimizer]:
    """The rows to run, without those whose packages are missing, which is said aloud.

    Raises:
        UsageError: for a name that the protocol has not got.
    """
    names = list(protocol.optimizers) if only is None else only
    for name in names:
        if name not in protocol.optimizers:
            raise UsageError(f"--only {name}: the protocol {protocol.name} has {', '.join(protocol.optimizers)}")
    rows = []
    for row in (protocol.optimizers[name] for name in names):
        missing = [package for package in row.needs if find_spec(package) is None]
        if missing:
            print(f"SKIPPED {row.name}: needs {', '.join(missing)}, see benchmarks/requirements.txt", file=sys.stderr)
        else:
            rows.append(row)
    return rows


def line(result: Result) -> str:
    """What is said of a run that has ended."""
    end = f"{result.loss:.4f} nats/token" if result.failure is None else f"FAILED, {result.failure}"
    return f"{result.label}: {end}, {result.measured['wall_seconds']:.0f} s"


def finish(study: Study, folder: Path, console: Console) -> None:
    """Tables, files, and the picture."""
    rows = summarise(study.protocol, study.known)
    if rows:
        report.write(study.protocol, rows, folder)
        draw(study.protocol, rows, folder)
        console.print(report.table(study.protocol, rows))
        console.print(report.tuning_table(rows))
    for row in rows:
        for where, why in row.failures.items():
            console.print(f"FAILED {where}: {why}", soft_wrap=True)
    for name, why in study.refused.items():
        console.print(f"STOPPED {name}: {why}", soft_wrap=True, markup=False)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
