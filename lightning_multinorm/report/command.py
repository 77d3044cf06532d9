"""``python -m lightning_multinorm report``: what runs reached, from their logs."""

from collections.abc import Sequence

from rich.console import Console

from lightning_multinorm.arguments import OneLineParser
from lightning_multinorm.report.runs import open_runs


def report(args: Sequence[str]) -> None:
    """Tell what runs reached, from their logs.

    Args:
        args: of the command line, after its name.

    Raises:
        UsageError: for what is no run.
    """
    parser = OneLineParser(prog="python -m lightning_multinorm report", description=str(report.__doc__).split("\n")[0])
    parser.add_argument("runs", nargs="+", help="Folders of runs, as runs/quickstart/version_0 or runs/quickstart.")
    config = parser.parse_args(list(args))
    console = Console(soft_wrap=True)
    for run in open_runs(config.runs):
        console.print(f"{run.name}: val/loss {run.last('val/loss')} ({run.folder})", highlight=False, markup=False)
