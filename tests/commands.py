"""The command line in forks of a process that has imported it: for most commands a start of Python takes longest.

What is special about the first process of a run, as under ``python -m``, is tested on the README's first command.
"""

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run(args: Sequence[str], folder: Path, limit: int = 300, **variables: str) -> subprocess.CompletedProcess[str]:
    """``python -m lightning_multinorm ARGS`` in a folder, on one core, with caches of its own.

    Args:
        args: after the module's name.
        folder: working directory; the caches are in its ``cache``.
        limit: seconds until the command is ended by a signal.
        variables: of its environment, besides; too late for what is read when a library is imported.
    """
    own = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "160"}
    environment = {**os.environ, **own, **variables}
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    output = folder / ".output"
    request = {"args": list(args), "folder": str(folder), "environment": environment, "limit": limit}
    server.stdin.write(json.dumps(request | {"output": str(output)}) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the process that forks for commands has ended"
    texts = [Path(f"{output}.{number}") for number in (1, 2)]
    done = subprocess.CompletedProcess(list(args), int(answer), *(text.read_text() for text in texts))
    for text in texts:
        text.unlink()
    return done


@cache
def _server() -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "tests.commands"]
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # the end of its input ends it
    return server


def _serve() -> dict[str, Any] | None:
    """Answer each request with its exit status; a fork returns the request that it is to carry out."""
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        child = os.fork()
        if child == 0:
            return request
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


def _become(args: Sequence[str], folder: str, environment: Mapping[str, str], limit: int, output: str) -> None:
    """What a new process has of its own: arguments, directory, environment, and where its output goes."""
    signal.alarm(limit)
    for number in (1, 2):
        file = os.open(f"{output}.{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["lightning_multinorm", *args]
    runpy.run_module("lightning_multinorm", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    import lightning_multinorm.cli
    import lightning_multinorm.llama  # noqa: F401

    if (request := _serve()) is not None:
        _become(**request)
