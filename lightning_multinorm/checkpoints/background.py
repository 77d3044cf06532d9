"""One thread beside the training that writes checkpoints in the order in which they were taken."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

_AT_MOST = 2  # a checkpoint and last.ckpt come together; each holds a copy of the weights


class Background:
    """Does one thing after another; after one has failed nothing more, until its error was raised here."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._pending: deque[Future[None]] = deque()
        self._failed = False

    def settle(self) -> None:
        """Wait until there is room for one more.

        Raises:
            Exception: of what was done and has failed.
        """
        while self._pending and (self._pending[0].done() or len(self._pending) >= _AT_MOST):
            self._finish_first()

    def submit(self, action: Callable[[], None]) -> None:
        """Do something later, in its turn."""
        self._pending.append(self._thread.submit(self._run, action))

    def wait(self) -> None:
        """Until everything is done.

        Raises:
            Exception: of what has failed.
        """
        while self._pending:
            self._finish_first()

    def _run(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except BaseException:
            self._failed = True
            raise

    def _finish_first(self) -> None:
        try:
            self._pending[0].result()
        except Exception:
            for later in self._pending:
                later.exception()  # so that none begins once the error is known
            self._pending.clear()
            self._failed = False
            raise
        self._pending.popleft()
