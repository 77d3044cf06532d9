"""A run as the real command in a process of its own, and what is kept of it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

import lightning_multinorm
from benchmarks.tokens_to_loss.plan import Job, Result
from lightning_multinorm.errors import UsageError
from lightning_multinorm.report.comparison import BITS, LOSS
from lightning_multinorm.report.runs import LOG, Run, Series, read_metrics

ROOT = Path(__file__).parents[2]
_ATTEMPTS = 3  # of a run that something else ends, as a scheduler does, or the system when memory is short
_PATIENCE = 20.0  # seconds for a run that is asked to end to write its checkpoint
_TRAIN_POINTS, _LOG_LINES, _LOG_WIDTH = 60, 4, 200  # of a result, so that it stays below 10 kB


class Processes:
    """Runs jobs, several threads at a time, and ends what is running when it is told to.

    An interrupted run goes on from its last checkpoint when it is run again.

    Args:
        root: folder for the runs' own folders.
        threads: of each process.
    """

    def __init__(self, root: Path, threads: int) -> None:
        self._root, self._threads = root.resolve(), threads
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock, self._stopped = Lock(), False

    def __call__(self, job: Job) -> Result:
        """Run to its end.

        Raises:
            UsageError: if the command refuses the options, or the process was ended from outside.
        """
        folder = self._root / job.name
        folder.mkdir(parents=True, exist_ok=True)
        started, code = time.monotonic(), commit()
        with (folder / "log.txt").open("ab") as log:
            for _ in range(_ATTEMPTS):
                status = self._wait(self._start([*command(job, self._root), "--ckpt_path", "last"], log))
                if not _ended_from_outside(status):
                    break
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        if status == 2:
            raise UsageError(f"{job.name} was refused: {lines[-1] if lines else ''} (see {folder / 'log.txt'})")
        if _ended_from_outside(status):
            raise UsageError(
                f"{job.name} was ended from outside {_ATTEMPTS} times, status {status}; it goes on if it is run again"
            )
        measured = {
            "wall_seconds": round(time.monotonic() - started, 1),
            "threads": self._threads,
            "version": lightning_multinorm.__version__,
            "torch": version("torch"),
            "commit": code,
            "options": list(job.options),
            "log": [line.replace(str(self._root), "ROOT")[:_LOG_WIDTH] for line in lines if line][-_LOG_LINES:],
        }
        return harvest(job, folder, status, measured)

    def _start(self, arguments: list[str], log: Any) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(self._threads)}
        with self._lock:
            if self._stopped:
                raise UsageError("the study was interrupted")
            process = subprocess.Popen(
                arguments, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )
            self._running.add(process)
        return process

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        status = process.wait()
        with self._lock:
            self._running.discard(process)
        return status

    def stop(self) -> None:
        """End what is running: with a checkpoint if it is soon enough, else at once."""
        with self._lock:
            self._stopped, running = True, list(self._running)
        for number, patience in ((signal.SIGTERM, _PATIENCE), (signal.SIGKILL, None)):
            for process in running:
                if process.poll() is None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, number)
            until = None if patience is None else time.monotonic() + patience
            for process in running:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(None if until is None else max(0.0, until - time.monotonic()))


def _ended_from_outside(status: int) -> bool:
    """By a signal, or with the status that tells of one."""
    return status < 0 or status > 128


def command(job: Job, root: Path) -> list[str]:
    """The command line of a job."""
    place = ["--run.root", str(root), "--run.name", job.name, "--run.report", "false"]
    return [sys.executable, "-m", "lightning_multinorm", "fit", *job.options, *place]


def harvest(job: Job, folder: Path, status: int, measured: Mapping[str, Any]) -> Result:
    """What is kept of a run that has ended; it failed if it left with an error or without a loss at its last step."""
    run = Run(job.name, folder, _metrics(folder), {})
    validation = _validation(run)
    whole = bool(validation["step"]) and validation["step"][-1] == job.steps
    failure = f"exit status {status}" if status else None if whole else "no finite validation loss at its last step"
    if failure and not status and len(_logs(folder)) > 1:
        failure += "; if an interruption broke it off, delete this result and the run's folder"
    values = {field: value for field, value in asdict(job).items() if field != "options"}
    state = run.last("memory/optimizer_state_mib")
    return Result(
        **values,
        loss=None if failure else validation["loss"][-1],
        failure=failure,
        validation=validation,
        train=_train(run),
        measured={"optimizer_state_mib": None if state is None else round(state, 4), **measured},
    )


def _metrics(folder: Path) -> dict[str, Series]:
    """Of all versions of a run together: each began where the one before was interrupted."""
    found: dict[str, dict[float, float]] = {}
    for log in _logs(folder):
        for name, series in read_metrics(log).items():
            found.setdefault(name, {}).update(zip(series.steps.tolist(), series.values.tolist(), strict=True))
    merged = {name: sorted(values.items()) for name, values in found.items()}
    return {name: Series(*map(np.array, zip(*values, strict=True))) for name, values in merged.items()}


def _logs(folder: Path) -> list[Path]:
    """Of its versions, in their order."""
    return sorted(folder.glob(f"version_*/{LOG}"), key=lambda log: int(log.parent.name.rpartition("_")[2]))


def _validation(run: Run) -> dict[str, list[float]]:
    columns: dict[str, list[float]] = {"step": [], "tokens": [], "loss": [], "bits_per_byte": [], "seconds": []}
    if LOSS not in run.metrics:
        return columns
    losses = run.metrics[LOSS]
    columns["step"] = [int(step) + 1 for step in losses.steps]
    columns["loss"] = [round(value, 6) for value in losses.values.tolist()]
    for column, metric, digits in (("tokens", "tokens", 0), ("bits_per_byte", BITS, 6), ("seconds", "seconds", 2)):
        values = run.at(metric, losses.steps)
        columns[column] = [] if values is None else [round(value, digits) for value in values.tolist()]
    return columns


def _train(run: Run) -> dict[str, list[float]]:
    series = run.metrics.get("train/loss")
    if series is None:
        return {"step": [], "loss": []}
    every = max(1, -(-len(series.steps) // _TRAIN_POINTS))
    steps, losses = series.steps[::-1][::every][::-1], series.values[::-1][::every][::-1]
    return {"step": [int(step) + 1 for step in steps], "loss": [round(loss, 4) for loss in losses.tolist()]}


def commit() -> str:
    """That is checked out, with "-changed" if what trains differs from it; "unknown" outside of a repository."""
    found = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", "lightning_multinorm", "configs")
    return f"{found}-changed" if changed else found or "unknown"


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
