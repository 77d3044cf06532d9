"""Makes the runs of a protocol, as many side by side as are allowed, the first rows of the protocol first."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from benchmarks.tokens_to_loss.plan import Job, Result, read, wanted
from benchmarks.tokens_to_loss.protocol import Optimizer, Protocol
from lightning_multinorm.errors import UsageError


class Study:
    """A protocol with the results that there are.

    Args:
        protocol: what is studied.
        folder: of the results, one file for each run; what lies there is not run again.
        run: makes a run, in any thread.

    Attributes:
        known: results by name, of this protocol and of its earlier versions.
        refused: why no more runs of a row are made, by its name.
    """

    def __init__(self, protocol: Protocol, folder: Path, run: Callable[[Job], Result]) -> None:
        self.protocol, self._folder, self._run = protocol, folder, run
        folder.mkdir(parents=True, exist_ok=True)
        self.known = read(folder)
        self.refused: dict[str, str] = {}

    def make(self, rows: Sequence[Optimizer], jobs: int) -> Iterator[Result]:
        """Make the runs that rows still need, and give each result once it is on disk.

        A row whose command is refused is left at that, and the others go on; so does a run that fails, for that is
        a result.
        """
        running: dict[Future[Result], Job] = {}
        with ThreadPoolExecutor(jobs) as pool:
            try:
                while True:
                    for job in self._next(rows, [job.name for job in running.values()])[: jobs - len(running)]:
                        running[pool.submit(self._run, job)] = job
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        job = running.pop(future)
                        try:
                            result = future.result()
                        except UsageError as error:
                            self.refused[job.optimizer] = str(error)
                            continue
                        self._keep(job, result)
                        yield result
            finally:
                stop = getattr(self._run, "stop", None)
                if running and stop is not None:
                    stop()

    def _next(self, rows: Sequence[Optimizer], running: Sequence[str]) -> list[Job]:
        jobs = [job for row in rows if row.name not in self.refused for job in wanted(self.protocol, row, self.known)]
        return [job for job in jobs if job.name not in running]

    def _keep(self, job: Job, result: Result) -> None:
        self.known[job.name] = result
        target = self._folder / f"{job.name}.json"
        partial = target.with_suffix(".part")
        partial.write_text(result.text())
        partial.replace(target)  # whole or absent
