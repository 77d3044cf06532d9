"""Starting a run on several ranks, and killing it.

A run is the real command line. Its processes are forked from this one, which has imported everything already, with the
environment that ``torchrun`` gives them: so a kill costs seconds instead of a start of Python for every rank.
"""

import os
import random
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lightning_multinorm.cli import main

VOCABULARY, LENGTH, BATCH = 300, 24, 2
DATA_OPTIONS = [
    *("--data.tokenizer", "bpe", "--data.vocab_size", str(VOCABULARY), "--data.validation_fraction", "0.01"),
    *("--data.sequence_length", str(LENGTH), "--data.batch_size", str(BATCH)),
]
DEADLINE = 600.0


@dataclass(frozen=True)
class Cell:
    """One way of running.

    Attributes:
        name: What it is called in the table.
        ranks: Number of processes.
        source: Where the data lie.
        options: Arguments of the command line that it differs by.
    """

    name: str
    ranks: int
    source: Path
    options: tuple[str, ...] = ()


def arguments(cell: Cell, folder: Path, steps: int) -> list[str]:
    """The command line of a run that saves every fifth step, and goes on where there is something to go on from."""
    size = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": LENGTH, "attention_dropout": 0.1,
    }  # fmt: skip
    trainer = {
        "accelerator": "cpu", "devices": cell.ranks, "max_steps": steps, "limit_val_batches": 0,
        "log_every_n_steps": 1, "enable_progress_bar": "false", "enable_model_summary": "false",
    }  # fmt: skip
    checkpoint = {"monitor": "null", "filename": "{step}", "every_n_train_steps": 5, "save_top_k": 1}
    options = {
        **{f"model.config.{name}": value for name, value in size.items()},
        **{f"trainer.{name}": value for name, value in trainer.items()},
        **{f"checkpoint.{name}": value for name, value in checkpoint.items()},
        "model.size": "null", "data.source": cell.source, "run.root": folder, "run.name": "run", "run.report": "false",
    }  # fmt: skip
    written = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    record = ["--trainer.callbacks+=benchmarks.faults.record.Record", "--trainer.callbacks.folder", str(folder)]
    return ["fit", *written, *DATA_OPTIONS, *record, *cell.options, "--ckpt_path", "last"]


class Run:
    """The processes of one attempt at a run.

    Args:
        cell: how to run.
        folder: where the run, its records and what it prints go.
        steps: length of the run.
    """

    def __init__(self, cell: Cell, folder: Path, steps: int) -> None:
        self.folder = folder
        self.started = time.monotonic()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        sys.stdout.flush()
        self.processes = [self._fork(cell, rank, port, arguments(cell, folder, steps)) for rank in range(cell.ranks)]
        self.statuses: dict[int, int] = {}

    def _fork(self, cell: Cell, rank: int, port: int, args: list[str]) -> int:
        if process := os.fork():
            return process
        status = 70
        try:
            with (self.folder / f"rank{rank}.log").open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            if cell.ranks > 1:
                places = {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": cell.ranks, "LOCAL_WORLD_SIZE": cell.ranks}
                addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "faults"}
                os.environ.update({name: str(value) for name, value in (places | addresses).items()})
            sys.argv[1:] = args
            main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def steps(self) -> int:
        """Lines that the first rank has written so far, over all attempts."""
        with suppress(FileNotFoundError):
            return (self.folder / "rank0.jsonl").read_bytes().count(b"\n")
        return 0

    def saving(self) -> bool:
        """Whether something is being written under a temporary name."""
        return next(self.folder.glob("run/version_*/checkpoints/.*.tmp"), None) is not None

    def alive(self) -> list[int]:
        """Processes that have not ended."""
        for process in self.processes:
            if process not in self.statuses:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    self.statuses[process] = os.waitstatus_to_exitcode(status)
        return [process for process in self.processes if process not in self.statuses]

    def send(self, number: signal.Signals, chance: random.Random) -> None:
        """A signal to every process, one a little after the other, in random order."""
        processes = self.alive()
        chance.shuffle(processes)
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, number)
            time.sleep(chance.uniform(0, 0.02))

    def wait(self) -> list[int]:
        """Exit statuses by rank, once all have ended; what does not end in time is killed.

        Raises:
            TimeoutError: if one had to be killed.
        """
        while alive := self.alive():
            failed = any(status != 0 for status in self.statuses.values())
            if time.monotonic() > self.started + DEADLINE:
                for process in alive:
                    os.kill(process, signal.SIGKILL)
                raise TimeoutError(f"{self.folder.name}: ranks did not end in {DEADLINE:.0f} s; see its rank*.log")
            if failed:  # as torchrun does when a rank fails; a killed one never says good-bye to the others
                time.sleep(2.0)
                for process in self.alive():
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.01)
        return [self.statuses[process] for process in self.processes]
