"""Ranks as forks of one process that has imported everything: a start of Python for each would cost more."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def fork(size: int, run: Callable[[int], None], folder: Path, limit: int = 280) -> list[int]:
    """Call ``run(rank)`` in ``size`` processes at once; what they print goes to ``folder/RANK.log``.

    Args:
        size: number of ranks.
        run: what a rank does.
        folder: of the logs.
        limit: seconds after which a rank is killed; one that hangs must not outlive the tests.

    Returns:
        Exit statuses, by rank; negative: killed by that signal.
    """
    processes = [os.fork() or _rank(run, rank, folder, limit) for rank in range(size)]
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def _rank(run: Callable[[int], None], rank: int, folder: Path, limit: int) -> int:
    signal.alarm(limit)
    status = 1
    try:
        log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        run(rank)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
