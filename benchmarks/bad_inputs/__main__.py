"""Gives the command line every bad input there is a case of, and notes what it answers.

``python -m benchmarks.bad_inputs [--only WORD] [--out FILE]``

Each case is a process of its own in a folder that is made for it. It must end with another status than 0, one last line
that begins with "error: ", and no stack trace, and every file that was there must be as it was.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track

from benchmarks.bad_inputs.cases import KINDS, Case

RESULTS = Path(__file__).parents[1] / "results" / "bad_inputs.md"
HEAD = """# Bad inputs, and the line that answers each

Written by `python -m benchmarks.bad_inputs`: every case is a process of its own, `python -m lightning_multinorm` with
the arguments of the case, in a folder with the file of the case. Each of the {count} cases ends with the exit status
below and the message below as the last line of stderr, after "error: ", without a stack trace or a page of usage, and
leaves every file that was there as it was.
"""


class Answer(NamedTuple):
    """What a case ended with."""

    status: int
    message: str
    wrong: str


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def judge(status: int, stderr: str, before: dict[str, str], after: dict[str, str]) -> Answer:
    """What a case must not do."""
    message = (stderr.strip().splitlines() or [""])[-1]
    wrong = []
    if status == 0:
        wrong.append("exit status 0")
    if "Traceback" in stderr:
        wrong.append("stack trace")
    if not message.startswith("error: ") or stderr.count("error: ") > 1 or "usage:" in stderr:
        wrong.append("not one line")
    wrong += [f"{name} has changed" for name, content in before.items() if after.get(name) != content]
    return Answer(status, message.removeprefix("error: "), ", ".join(wrong))


def answer(case: Case, cache: Path) -> Answer:
    """Run a case in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if case.file is not None:
            case.make(folder / case.file)
        before = contents(folder)
        done = subprocess.run(
            [sys.executable, "-m", "lightning_multinorm", *shlex.split(case.arguments, posix=False)],
            cwd=folder,
            env={**os.environ, "XDG_CACHE_HOME": str(cache)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        return judge(done.returncode, done.stderr, before, contents(folder))


def table(answers: dict[str, list[tuple[Case, Answer]]]) -> str:
    """The page of results."""
    lines = [HEAD.format(count=sum(map(len, answers.values())))]
    for kind, rows in answers.items():
        lines += [f"## {kind}\n", "| bad input | status | message |", "|---|---|---|"]
        lines += [f"| {case.name} | {found.status} | {_cell(found.message)} |" for case, found in rows]
        lines.append("")
    return "\n".join(lines)


def _cell(message: str) -> str:
    return "`" + message.replace("|", "\\|").replace("`", "'") + "`"


def main() -> None:
    parser = argparse.ArgumentParser(description="Bad inputs and their messages.")
    parser.add_argument("--only", default="", help="Cases whose name or arguments hold this; nothing is written.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    chosen = {
        kind: [case for case in cases if options.only in f"{case.name} {case.arguments}"]
        for kind, cases in KINDS.items()
    }
    console, failures = Console(soft_wrap=True), 0
    answers: dict[str, list[tuple[Case, Answer]]] = {kind: [] for kind in chosen}
    with tempfile.TemporaryDirectory() as cache:
        for kind, case in track([(kind, case) for kind, cases in chosen.items() for case in cases], console=console):
            found = answer(case, Path(cache))
            answers[kind].append((case, found))
            failures += bool(found.wrong)
            console.print(
                f"{found.status} {case.name}: {found.message} {found.wrong and f'({found.wrong})'}", markup=False
            )
    if not options.only:
        options.out.write_text(table(answers))
    if failures:
        sys.exit(f"{failures} cases are not answered as they must be")


if __name__ == "__main__":
    main()
