"""Kills real training runs at random moments and lets them go on: what was lost, what was repeated, what differs?

``python -m benchmarks.faults [--kills 30] [--seed 0] [--cells single-stream ...] [--out FILE]``

Over one process, two under DDP and two under FSDP2 (both formats of checkpoints), on streamed, mixed and prepared data:
runs are sent SIGKILL or SIGTERM at a random moment, every third one while a checkpoint is being written, and are
started again with ``--ckpt_path last``, until they are through. Every batch of every rank is compared with that of a
run that was left alone, to the last bit of its loss, and so are all logged values but speeds.
"""

import argparse
import itertools
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.faults.compare import compare
from benchmarks.faults.data import faults_in_first_epoch, make_documents, prepare
from benchmarks.faults.runs import DATA_OPTIONS, Cell, Run
from benchmarks.machine import describe

RESULTS = Path(__file__).parents[1] / "results" / "faults.json"
SHARDED = "lightning_multinorm.strategies.ShardedStrategy"
STRATEGIES: dict[str, tuple[int, tuple[str, ...]]] = {
    "single": (1, ()),
    "ddp": (2, ("--trainer.strategy", "ddp")),
    "fsdp2-folder": (2, ("--trainer.strategy", "fsdp2")),
    "fsdp2-file": (2, ("--trainer.strategy", SHARDED, "--trainer.strategy.in_folders", "false")),
}
DATA = {
    "stream": ("--data.mix_rows", "0"),  # in the order of the documents, so that they can be told
    "mixed": ("--data.mix_rows", "10"),
    "prepared": (),
}
CELLS = [f"{strategy}-{data}" for strategy, data in itertools.product(STRATEGIES, DATA)]


def cell_of(name: str, folder: Path) -> Cell:
    """A cell of the matrix by its name."""
    strategy, _, data = name.rpartition("-")
    ranks, options = STRATEGIES[strategy]
    source = folder / ("prepared" if data == "prepared" else "shards")
    return Cell(name, ranks, source, (*options, *DATA[data]))


def interrupt(run: Run, chance: random.Random, number: signal.Signals, while_saving: bool, first: float) -> str:
    """Wait for a random moment of an attempt, and send a signal; says when it was.

    Args:
        run: what to kill.
        chance: of the moment.
        number: what to send.
        while_saving: whether to wait for a checkpoint to be written.
        first: earliest moment, in steps that this attempt has made.
    """
    before = run.steps()
    while run.alive() and run.steps() < before + first:
        time.sleep(0.002)
    if while_saving:
        while run.alive() and not run.saving():
            time.sleep(0.0002)
        moment = "saving"
    else:
        time.sleep(chance.uniform(0, 0.3))
        moment = f"step {run.steps()}"
    run.send(number, chance)
    return moment


def trial(cell: Cell, folder: Path, steps: int, kills: list[dict[str, Any]], chance: random.Random) -> dict[str, Any]:
    """A run that is left alone, and one that is killed as often as asked, and then ends."""
    whole, killed = folder / f"{cell.name}-whole", folder / f"{cell.name}-killed"
    for place in (whole, killed):
        place.mkdir()
    statuses = Run(cell, whole, steps).wait()
    if any(statuses):
        raise RuntimeError(f"{cell.name} fails by itself: {statuses}, see {whole}/rank0.log")
    moments = []
    for kill in kills:
        run = Run(cell, killed, steps)
        number = signal.SIGKILL if kill["kill"] else signal.SIGTERM
        moment = interrupt(run, chance, number, kill["saving"], first=chance.uniform(1, 0.5 * steps / len(kills)))
        moments.append({"signal": number.name, "moment": moment, "statuses": run.wait()})
    ended = Run(cell, killed, steps).wait()
    verdict = compare(whole, killed, cell.ranks)
    documents = faults_in_first_epoch(killed, cell.ranks, cell.source) if cell.name.endswith("stream") else None
    return {"cell": cell.name, "kills": moments, "ended": ended, **vars(verdict), "documents": documents}


def main() -> None:
    """Parse the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--folder", type=Path, help="where runs are kept; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chance = random.Random(options.seed)
    scratch = tempfile.TemporaryDirectory()
    folder = options.folder or Path(scratch.name)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    make_documents(folder / "shards", options.seed)
    if any(name.endswith("prepared") for name in options.cells):
        prepare(folder / "shards", folder / "prepared", DATA_OPTIONS)
    kills: dict[str, list[dict[str, Any]]] = {name: [] for name in options.cells}
    for number, name in zip(range(options.kills), itertools.cycle(options.cells), strict=False):
        kills[name].append({"kill": chance.random() < 0.6, "saving": number % 3 == 2})
    trials = []
    for name in track(options.cells, "Runs", transient=True):
        trials.append(trial(cell_of(name, folder), folder, options.steps, kills[name], chance))
    result = {"machine": describe(), "steps": options.steps, "seed": options.seed, "trials": trials}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    Console(width=120).print(table(trials))


def table(trials: list[dict[str, Any]]) -> Table:
    """A line for each cell, and their sums."""
    names = ("missing", "losses", "lost", "repeated", "documents", "logged", "repeated_steps")
    view = Table("run", "kills", "resumed", *names, title="Killed runs beside uninterrupted ones: what differs")
    for found in trials:
        resumed = len(found["kills"]) if not any(found["ended"]) else 0
        view.add_row(found["cell"], str(len(found["kills"])), str(resumed), *(str(found[name] or 0) for name in names))
    sums = (str(sum(found[name] or 0 for found in trials)) for name in names)
    total = sum(len(found["kills"]) for found in trials)
    view.add_row("all", str(total), str(sum(len(f["kills"]) for f in trials if not any(f["ended"]))), *sums)
    return view


if __name__ == "__main__":
    main()
